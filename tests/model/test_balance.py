"""Losses on what the routers did: against their definitions in fp64, over processes and micro-steps, without padding."""

import math
import sys

import pytest
import torch
from hf import EXPERTS, ours
from processes import Python

from qwen3_kernels import moe_router
from qwen3_model.balance import GlobalCounts, balance_loss, expert_counts, load, z_loss
from qwen3_model.moe import Routing, load_balancing_loss

E, K = 6, 2


def routings(N=12, layers=3, mask=None, dtype=torch.float32):
    found = []
    for _ in range(layers):
        logits = (2 * torch.randn(N, E)).to(dtype).requires_grad_()
        _, ids, stats = moe_router(logits, K, mask=mask, return_stats=True)
        found.append(Routing(logits, ids, stats))
    return found


def by_hand(routing, counts, mask):
    """E · Σ f · P of each layer and the mean of them, in fp64; and the z-loss."""
    kept, losses, squares = mask.bool(), [], []
    for r, count in zip(routing, counts.double()):
        logits = r.logits.double()[kept]
        losses.append(E * (count / count.sum() * K * logits.softmax(-1).mean(0)).sum())
        squares.append(logits.logsumexp(-1).square().mean())
    return torch.stack(losses).mean(), torch.stack(squares).mean()


@pytest.mark.parametrize("padded", [False, True])
def test_against_the_definitions(padded):
    mask = torch.arange(12) % 4 > 0 if padded else None
    routing = routings(mask=mask)
    counts = expert_counts(routing, mask)
    kept = torch.ones(12, dtype=torch.bool) if mask is None else mask
    for r, count in zip(routing, counts):
        assert count.tolist() == [(r.expert_ids[kept] == e).sum().item() for e in range(E)]
    logits = [r.logits for r in routing]
    for got, want in zip((balance_loss(routing, counts, mask), z_loss(routing, mask)), by_hand(routing, counts, kept)):
        assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-5)
        for g, w in zip(*(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (got, want))):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7)
            assert w.abs().max() > 0 and (g[~kept] == 0).all()


def test_all_gradients_of_the_router_are_one_kernel(monkeypatch):
    """Weights, balance and z-loss: the logits' gradient is written once."""
    op = sys.modules[moe_router.__module__]
    calls, right = [], op._torch_backward
    monkeypatch.setattr(op, "_torch_backward", lambda *args: calls.append(args[:3]) or right(*args))
    logits = torch.randn(9, E, requires_grad=True)
    weights, ids, stats = moe_router(logits, K, return_stats=True)
    routing = [Routing(logits, ids, stats)]
    loss = weights.square().sum() + balance_loss(routing, expert_counts(routing)) + z_loss(routing)
    loss.backward()
    assert len(calls) == 1 and all(g is not None for g in calls[0])


def test_one_layer_is_transformers_loss():
    (r,) = routings(layers=1)
    got = balance_loss([r], expert_counts([r]))
    assert got.item() == pytest.approx(load_balancing_loss([r.logits], E, K).item(), rel=1e-5)


def test_balanced_and_collapsed():
    balanced = torch.zeros(30, E)
    for n in range(30):
        balanced[n, [n % E, (n + 1) % E]] = 5.0
    collapsed = torch.zeros(30, E)
    collapsed[:, :2] = 60.0
    for logits, want, entropy, dead in ((balanced, K, math.log(E), 0), (collapsed, E, math.log(2), 4)):
        _, ids, stats = moe_router(logits, K, return_stats=True)
        routing = [Routing(logits, ids, stats)]
        counts = expert_counts(routing)
        assert balance_loss(routing, counts).item() == pytest.approx(want, rel=1e-5)
        metrics = load(counts)
        assert metrics.max_over_mean.item() == pytest.approx(1 if dead == 0 else E / 2)
        assert metrics.entropy.item() == pytest.approx(entropy, rel=1e-5) and metrics.dead.item() == dead
    empty = load(torch.zeros(2, E, dtype=torch.int64))
    assert empty.max_over_mean.tolist() == [0, 0] and empty.entropy.tolist() == [0, 0] and empty.dead.tolist() == [E, E]


def test_micro_steps_add_up():
    """After the last one the counts are those of all tokens; f changes, P stays the micro-step's own."""
    routing = routings(N=24)
    total = GlobalCounts()
    parts = [[Routing(r.logits[s], r.expert_ids[s], r.stats) for r in routing] for s in (slice(0, 8), slice(8, 24))]
    first = total.add(expert_counts(parts[0]))
    assert torch.equal(first, expert_counts(parts[0]))
    assert torch.equal(total.add(expert_counts(parts[1])), expert_counts(routing))
    assert torch.equal(first, expert_counts(parts[0])), "what was handed out does not change"
    total.reset()
    assert torch.equal(total.add(first), first)


WORKER = """
import sys, torch, torch.distributed as dist
from qwen3_model.balance import GlobalCounts
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
counts = torch.arange(6).view(1, 6) * (rank + 1)
total = GlobalCounts()
for step in (1, 2):
    assert total.add(counts).tolist() == (torch.arange(6).view(1, 6) * step * world * (world + 1) // 2).tolist()
assert counts.tolist() == (torch.arange(6).view(1, 6) * (rank + 1)).tolist()
group = [dist.new_group([r]) for r in range(world)][rank]
assert GlobalCounts(group).add(counts).tolist() == counts.tolist()
dist.destroy_process_group()
print("fine")
"""


def test_counts_of_all_processes(tmp_path):
    workers = [Python("-c", WORKER, str(rank), "2", str(tmp_path / "store")) for rank in range(2)]
    for worker in workers:
        out, error = worker.communicate()
        assert worker.returncode == 0 and out == "fine\n", error


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_through_the_model(numerics, recompute):
    """Padding is left out, the routers get the loss's gradient."""
    model, tokens = ours(EXPERTS, numerics=numerics), torch.randint(96, (2, 7))
    model.recompute = recompute
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    _, routing = model(tokens, token_mask=mask, return_routing=True)
    counts = expert_counts(routing, mask)
    assert counts.sum(1).tolist() == [11 * K] * 3
    for r, count in zip(routing, counts):
        torch.testing.assert_close(r.stats.prob_sum, r.logits.softmax(-1)[mask.flatten().bool()].sum(0))
    (balance_loss(routing, counts, mask) + z_loss(routing, mask)).backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: balance_loss([], torch.zeros(0, E)), "balance_loss: routing is empty"),
        (lambda r: balance_loss(r, torch.zeros(3, 5)), r"balance_loss: counts has shape \(3, 5\); expected \(3, 6\)"),
        (lambda r: balance_loss([x._replace(stats=None) for x in r], torch.zeros(3, E)),
         "balance_loss: routing has no stats"),
        (lambda r: z_loss(r, torch.ones(11)), r"z_loss: mask has shape \(11,\); expected 12 entries"),
        (lambda r: expert_counts(r, torch.ones(11)), "expert_counts: mask has shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(routings())
