"""The spike guard: which steps it skips, that they leave no trace, and that nothing waits for it."""

import math

import pytest
import torch
from torch import nn

from training import checkpoint
from training.log import read_metrics
from training.optim import Optimizer, SpikeGuard
from training.pretrain import SKIPS_IN_A_ROW, next_token_loss, train


def verdicts(guard, losses, norms=None):
    norms = norms or [1.0 + 0.01 * (i % 3) for i in range(len(losses))]
    return [int(guard(torch.tensor(a), torch.tensor(b))) for a, b in zip(losses, norms)]


def test_skips_what_stands_out_of_the_window():
    calm = [2.0 + 0.01 * (i % 5) for i in range(40)]
    assert verdicts(SpikeGuard(6, 32), [*calm, 3.0, 2.0, math.nan, 2.0, math.inf, 2.0]) == [0] * 40 + [1, 0, 1, 0, 1, 0]
    assert verdicts(SpikeGuard(6, 32), calm, [1 + 0.01 * (i % 5) for i in range(39)] + [9.0])[-1] == 1, "norms, too"
    assert verdicts(SpikeGuard(6, 32), [*calm, 0.1])[-1] == 0, "a fall is no spike"
    assert sum(verdicts(SpikeGuard(6, 32), [11 * 0.97**i for i in range(200)])) == 0, "nor is the start of a training"
    assert verdicts(SpikeGuard(6, 32), [2.0, 2.01, 2.0, 50.0]) == [0] * 4, "three steps are no statistics"
    assert sum(verdicts(SpikeGuard(6, 32), [2.0] * 60)) == 0, "equal losses have no deviation"


def test_skipped_steps_do_not_move_the_window():
    guard = SpikeGuard(6, 8)
    verdicts(guard, [2.0 + 0.01 * (i % 5) for i in range(20)])
    before = guard.recent.clone(), int(guard.taken)
    assert verdicts(guard, [5.0] * 30) == [1] * 30
    assert torch.equal(guard.recent, before[0]) and int(guard.taken) == before[1] == 20


def test_the_rolling_window_is_the_last_steps():
    guard = SpikeGuard(1e6, 4)
    verdicts(guard, [float(i) for i in range(11)])
    assert sorted(guard.recent[0].tolist()) == [7, 8, 9, 10]


class Layers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 6)])
        self.to(dtype)


@pytest.mark.usefixtures("adamw_both")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("states, dtype", [("float32", torch.float32), ("float32", torch.bfloat16),
                                           ("float32-moments", torch.bfloat16), ("bfloat16", torch.bfloat16)], ids=str)
def test_a_skipped_step_leaves_no_trace(kind, states, dtype):
    """Bit for bit, whatever the gradients; and a guard that skips nothing changes nothing."""
    def run(values, guard):
        model = Layers(dtype)
        optimizer = Optimizer(model, kind=kind, states=states, guard=guard)
        snapshots = []
        for value in values:
            torch.manual_seed(1)
            for p in model.parameters():
                (p * (torch.randn_like(p) * value)).sum().backward()
            optimizer.step(1e-2, 1.0, loss=torch.tensor(float(value)))
            tensors = dict(model.named_parameters()) | optimizer.state_tensors()
            snapshots.append({k: t.detach().clone() for k, t in tensors.items() if k not in ("step", "guard.recent", "guard.taken")})
        return snapshots

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    shots = run([1.0, 1.0, math.nan, math.inf, 1.0], SpikeGuard(6, 64))
    assert same(shots[1], shots[2]) and same(shots[2], shots[3]) and not same(shots[3], shots[4])
    assert all(t.isfinite().all() for t in shots[4].values())
    assert all(same(a, b) for a, b in zip(run([1.0, 1.1, 0.9], SpikeGuard(6, 64)), run([1.0, 1.1, 0.9], None)))


def spoiled(at, value=1e3):
    """A loss that is ``value`` times too large in these steps (from 1)."""
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        return next_token_loss(model, batch) * (value if calls[0] in at else 1)

    return loss


@pytest.mark.parametrize("value", [1e3, math.nan])
def test_a_run_with_a_bad_batch_goes_on_and_says_so(make_config, value):
    config = make_config(steps=20, spike_sigma=6.0, spike_window=8)
    train(config, loss_fn=spoiled({9}, value), quiet=True)
    records = read_metrics(config.out)
    (skip,) = [r for r in records if r["kind"] == "skipped"]
    assert skip["step"] == 9 and (skip["first_row"], skip["rows"]) == (32, 4) and skip["seed"] == 0
    taken = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in taken] == [*range(1, 9), *range(10, 21)] and taken[-1]["loss"] < taken[0]["loss"] - 0.5


def test_resumes_bitwise_with_the_guards_window(make_config):
    class Stop(Exception):
        pass

    def stopping(after, spoil):
        loss, calls = spoiled(spoil), [0]

        def inner(model, batch):
            calls[0] += 1
            if calls[0] > after:
                raise Stop
            return loss(model, batch)

        return inner

    settings = {"steps": 20, "spike_sigma": 6.0, "spike_window": 8}
    straight, broken = make_config("a", **settings), make_config("b", **settings)
    expected = train(straight, loss_fn=spoiled({9, 15}), quiet=True)
    with pytest.raises(Stop):
        train(broken, loss_fn=stopping(13, {9}), quiet=True)
    got = train(broken, loss_fn=spoiled({15 - 12}), quiet=True)
    a, b = (checkpoint.read(p).load_model("cpu").state_dict() for p in (expected, got))
    assert all(torch.equal(a[k], b[k]) for k in a)
    skips = [[r["step"] for r in read_metrics(c.out) if r["kind"] == "skipped"] for c in (straight, broken)]
    assert skips == [[9, 15], [9, 15]]


def test_too_many_in_a_row_stop_the_run(make_config):
    config = make_config(steps=60, spike_sigma=6.0, spike_window=8, log_every=4)
    with pytest.raises(FloatingPointError, match=rf"step 35: {SKIPS_IN_A_ROW} steps in a row were skipped"):
        train(config, loss_fn=spoiled(set(range(20, 61))), quiet=True)
    assert checkpoint.latest(config.out / "checkpoints").step <= 32


@pytest.mark.gpu
def test_the_guard_reads_nothing_from_the_device():
    model = Layers(torch.bfloat16).cuda()
    optimizer = Optimizer(model, states="bfloat16", guard=SpikeGuard(6, 8, "cuda"))
    x = torch.randn(3, 6, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        loss = model.layers[1](model.layers[0](x)).float().square().mean()
        loss.backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(1e-3, 1.0, loss=loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sigma, window", [(0, 8), (-1, 8), (6, 1)])
def test_bad_guards(sigma, window):
    with pytest.raises(ValueError, match="expected sigma > 0 and window >= 2"):
        SpikeGuard(sigma, window)
