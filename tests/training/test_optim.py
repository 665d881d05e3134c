import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_model.model import Qwen3
from training import optim
from training.data.packing import IGNORE, Batch, PackedLoader
from training.data.shards import TokenShards
from training.optim import OPTIMIZERS, STATES, Optimizer, clip_factor, lr_scale, round_stochastic_
from training.pretrain import next_token_loss, train_step


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("wsd", 0, 0.1), ("wsd", 9, 1.0), ("wsd", 10, 1.0), ("wsd", 60, 1.0),
        ("wsd", 70, 0.55), ("wsd", 99, 0.1 + 0.9 * (1 - math.sqrt(39 / 40))),
        ("cosine", 4, 0.5), ("cosine", 10, 1.0), ("cosine", 55, 0.55), ("cosine", 85, 0.1 + 0.45 * (1 + math.cos(5 * math.pi / 6))),
    ],
)
def test_golden_schedules(schedule, step, expected):
    decay = 40 if schedule == "wsd" else None
    got = lr_scale(step, total=100, warmup=10, schedule=schedule, decay=decay, floor=0.1)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_schedules_rise_then_never_rise_again(schedule):
    scales = [lr_scale(s, total=97, warmup=13, schedule=schedule) for s in range(97)]
    assert scales[:13] == sorted(scales[:13]) and max(scales) == 1.0
    assert scales[12:] == sorted(scales[12:], reverse=True) and 0 < scales[-1] < 0.13


@pytest.mark.parametrize(
    "options, words",
    [
        ({"schedule": "linear"}, "schedule is 'linear'"), ({"step": 100}, "step is 100"), ({"step": -1}, "step is -1"),
        ({"warmup": 70, "decay": 40}, "warmup 70, decay 40"), ({"floor": 1.5}, "floor 1.5"), ({"decay": -1}, "decay -1"),
    ],
    ids=str,
)
def test_bad_schedules(options, words):
    with pytest.raises(ValueError, match=words):
        lr_scale(**({"step": 0, "total": 100, "warmup": 0} | options))


@pytest.mark.parametrize("max_norm", [0.3, 1e3, math.inf])
def test_clip_equals_torch(max_norm):
    grads = [torch.randn(7, 5), torch.randn(11), torch.randn(2, 3, 4) * 3]
    params = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm, factor = clip_factor(grads, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for g, p in zip(grads, params):
        torch.testing.assert_close(g * factor, p.grad, rtol=1e-6, atol=0)


def test_clip_refuses_zero():
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_factor([torch.ones(2)], 0)


def quadratic(dtype):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=True), torch.nn.Linear(5, 4, bias=True)).to(dtype)
    return model, torch.randn(8, 6).to(dtype)


@pytest.mark.usefixtures("adamw_both")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adamw_is_torch_adamw_on_float32_masters(dtype):
    model, x = quadratic(dtype)
    reference = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in model.named_parameters()}
    groups = [{"params": [p for p in reference.values() if p.dim() == d], "weight_decay": wd} for d, wd in ((2, 0.1), (1, 0.0))]
    plain = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    ours = Optimizer(model, weight_decay=0.1)
    for _ in range(6):
        weights = {n: p.to(dtype).detach().requires_grad_() for n, p in reference.items()}
        grads = torch.autograd.grad(torch.func.functional_call(model, weights, x).float().square().sum(), weights.values())
        for p, g in zip(reference.values(), grads):
            p.grad = g.float()
        expected = torch.nn.utils.clip_grad_norm_(reference.values(), 1.0)
        plain.step()
        model(x).float().square().sum().backward()
        torch.testing.assert_close(ours.step(0.05, 1.0), expected, rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        assert p.dtype == dtype and p.grad is None
        torch.testing.assert_close(p, reference[name].to(dtype), rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-7)


@pytest.mark.usefixtures("adamw_both")
@pytest.mark.parametrize("states", STATES)
def test_small_updates_are_not_lost_in_bf16(states):
    model = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nearest = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = Optimizer(model, states=states, weight_decay=0.0)
    plain = torch.optim.AdamW([nearest], 5e-4, weight_decay=0.0)
    for _ in range(20):  # each update is an eighth of bfloat16's step below 1
        model.weight.float().sum().backward()
        optimizer.step(5e-4, 1e9)
        nearest.float().sum().backward()
        plain.step()
    assert (nearest == 1).all(), "rounding to nearest loses them"
    tolerance = 3e-3 if states == "float32" else 3e-4
    assert model.weight.float().mean().item() == pytest.approx(1 - 0.01, abs=tolerance)


@pytest.mark.usefixtures("adamw_both")
def test_weight_decay_leaves_norms_alone(model_config):
    model = Qwen3(model_config).init_weights(0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, 1.0)
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.dim() == 2 else 1.0)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased():
    n, generator = 200_000, torch.Generator().manual_seed(1)
    for value in (1.001, -3.14159, 1e-30, -65537.1, 1.0078124, 0.3, -1e-40, 1.5, 0.0, -0.0):
        x = torch.full((n,), value)
        got = torch.empty(n, dtype=torch.bfloat16)
        round_stochastic_(got, x, generator)
        down, up = sorted(float(v) for v in neighbours(x[0]))
        assert set(got.float().tolist()) == ({down, up} if down < up else {down}), value
        share = (x[0].item() - down) / (up - down) if down < up else 0.0
        deviation = (up - down) * math.sqrt(share * (1 - share) / n)  # of the mean
        assert abs(got.double().mean().item() - x[0].item()) <= 5 * deviation, value


def neighbours(x):
    """The bfloat16 values around a float32, as float32."""
    bits = x.view(torch.int32)
    below = bits & -65536
    return [b.view(torch.float32) for b in (below, below + (65536 if bits != below else 0))]


def test_stochastic_rounding_keeps_what_is_not_finite():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)  # CUDA's NaN is the first
    nan = bits.view(torch.float32)
    x = torch.cat((nan, torch.tensor([math.inf, -math.inf])))
    got = torch.empty(6, dtype=torch.bfloat16)
    for seed in range(50):
        round_stochastic_(got, x, torch.Generator().manual_seed(seed))
        assert got[:4].isnan().all() and got[4:].tolist() == [math.inf, -math.inf]


@pytest.mark.usefixtures("adamw_both")
@pytest.mark.parametrize("states", STATES[1:])
def test_without_masters_the_mean_step_is_the_float32_step(states):
    """4,096 weights go the same way, apart from their rounding."""
    model = torch.nn.Linear(4096, 1, bias=False).to(torch.bfloat16)
    exact = torch.nn.Parameter(torch.empty(1, 4096))
    with torch.no_grad():
        model.weight.fill_(0.7)
        exact.copy_(model.weight)
    ours, plain = Optimizer(model, states=states), torch.optim.AdamW([exact], 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(8):
        grad = torch.full((1, 4096), 0.03 * (1 + step % 3))
        model.weight.grad, exact.grad = grad.bfloat16(), grad.bfloat16().float()
        ours.step(1e-3, math.inf)
        plain.step()
    state = ours.state_tensors()
    assert abs(model.weight.double().mean() - exact.double().mean()) < 5 * 2**-8 / math.sqrt(4096)
    assert len(model.weight.unique()) > 1 and model.weight.grad is None
    for key, moment in (("exp_avg", plain.state[exact]["exp_avg"]), ("exp_avg_sq", plain.state[exact]["exp_avg_sq"])):
        got = state[f"{key}.weight"]
        assert got.dtype == (torch.bfloat16 if states == "bfloat16" else torch.float32)
        torch.testing.assert_close(got.double().mean(), moment.double().mean(), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("adamw_both")
def test_rounding_is_a_function_of_seed_step_and_name():
    def trained(*, seed=0, steps=2, frozen=False):
        model, x = quadratic(torch.bfloat16)
        model[0].requires_grad_(not frozen)
        optimizer = Optimizer(model, states="bfloat16", seed=seed)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step(1e-3, math.inf)
        return torch.cat([p.detach().flatten() for p in model[1].parameters()])

    first = trained()
    assert torch.equal(trained(), first) and torch.equal(trained(frozen=True), first), "other parameters do not matter"
    assert not torch.equal(trained(seed=1), first)
    twins = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(2)]).to(torch.bfloat16)
    for twin in twins:
        torch.nn.init.ones_(twin.weight)
        twin.weight.grad = torch.ones_like(twin.weight)
    Optimizer(twins, states="bfloat16").step(1e-3, math.inf)
    assert not torch.equal(twins[0].weight, twins[1].weight), "each has noise of its own"


def test_pieces_change_nothing_but_the_order_of_sums(monkeypatch):
    results = []
    for piece in (1 << 22, 7):
        monkeypatch.setattr(optim, "PIECE", piece)
        torch.manual_seed(3)
        model = experts()
        optimizer = Optimizer(model, kind="muon")
        monkeypatch.setattr(optimizer, "_in_pieces", lambda name: True)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step(0.01, 1.0)
        results.append([*model.parameters(), *optimizer.state_tensors().values()])
    for a, b in zip(*results):  # up to the order of sums; a step is 2e-3 and more
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-4)


# ---- Muon ------------------------------------------------------------------------------------------------------------


def experts():
    """A module named as in the model: an embedding, three experts of width 4, a router and a norm."""
    layer = torch.nn.Module()
    for name, shape in (("gate_up_proj", (3, 8, 6)), ("down_proj", (3, 6, 4)), ("router", (3, 6)), ("norm", (6,))):
        layer.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
    return torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 6), "layers": torch.nn.ModuleList([layer])})


def muon_by_the_paper(weight, grads, lr, weight_decay):
    """Jordan et al. 2024 in float64, one matrix; the learning rate scaled as by Liu et al. 2025."""
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = 0.95 * momentum + grad
        x = grad + 0.95 * momentum
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weight = weight * (1 - lr * weight_decay) - lr * 0.2 * max(x.shape) ** 0.5 * x
    return weight


@pytest.mark.parametrize("states, limit", [("float32", 0.02), ("float32-moments", 0.02), ("bfloat16", 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_muon_is_the_papers_step_for_each_matrix(states, limit, dtype):
    model = experts().to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, lr = Optimizer(model, kind="muon", states=states, weight_decay=0.1), 0.02
    history = [{n: torch.randn(p.shape).to(dtype) for n, p in model.named_parameters()} for _ in range(4)]
    for grads in history:
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
            for hook in (p._post_accumulate_grad_hooks or {}).values():
                hook(p)
        optimizer.step(lr, math.inf)
    for name, p in model.named_parameters():
        if "layers" not in name or p.dim() < 2:
            continue
        split = lambda t: t.double().reshape(-1, 4 if "gate_up" in name else t.shape[-2], t.shape[-1])  # noqa: E731
        old = split(before[name])
        want = torch.stack([
            muon_by_the_paper(w, [split(grads[name])[i] for grads in history], lr, 0.1) for i, w in enumerate(old)
        ])
        rounding = 0.0 if dtype == torch.float32 else 2**-7 * 2 * want.abs()
        error = ((split(p.detach()) - want).abs() - rounding).clamp(min=0).norm() / (want - old).norm()
        assert error <= limit, name


def test_muon_agrees_with_torchs_on_one_matrix():
    model = torch.nn.ModuleDict({"layers": torch.nn.Linear(12, 20, bias=False)})
    same = torch.nn.Parameter(model["layers"].weight.detach().clone())
    plain = torch.optim.Muon([same], 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours, start = Optimizer(model, kind="muon", weight_decay=0.1), same.detach().clone()
    for _ in range(5):
        grad = torch.randn(20, 12)
        same.grad, model["layers"].weight.grad = grad.clone(), grad.clone()
        plain.step()
        ours.step(0.02, math.inf)
    moved = (same - start).norm()
    assert (model["layers"].weight - same).norm() <= 0.02 * moved
    # About 0.2 a step, as AdamW's: five steps in random directions, Nesterov's momentum in common.
    assert 0.2 < (moved / 0.02 / math.sqrt(240)).item() < 1.0


def test_muon_takes_the_layers_matrices_and_adamw_the_rest(model_config):
    moe = dataclasses.replace(model_config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    for config in (model_config, moe):
        model = Qwen3(config).init_weights(0)
        state = Optimizer(model, kind="muon").state_tensors()
        for name, p in model.named_parameters():
            keys = ("momentum",) if "layers" in name and p.dim() >= 2 else ("exp_avg", "exp_avg_sq")
            assert tuple(k.split(".")[0] for k in state if k.endswith(f".{name}")) == keys
    with pytest.raises(ValueError, match="no parameter is a matrix below 'layers'"):
        Optimizer(quadratic(torch.float32)[0], kind="muon")


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_muon_learns(model_config, make_data, states, moe):
    if moe:
        model_config = dataclasses.replace(model_config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    loader = PackedLoader(TokenShards(make_data([60] * 20, counting=True)), seq_len=32, rows=4, seed=0)
    model = Qwen3(model_config).init_weights(0).to(torch.bfloat16)
    optimizer = Optimizer(model, kind="muon", states=states)
    losses = [
        train_step(model, optimizer, [loader.batch(s)], next_token_loss, lr=0.01, max_grad_norm=1.0)[0].item()
        for s in range(30)
    ]
    assert losses[0] == pytest.approx(math.log(64), rel=0.05) and losses[-1] < losses[0] - 2.4  # AdamW's part alone: 2.2


# ---- state, host syncs, options --------------------------------------------------------------------------------------


def parts(kind):
    torch.manual_seed(3)
    return experts() if kind == "muon" else quadratic(torch.float32)[0]


@pytest.mark.usefixtures("adamw_both")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_round_trip_is_bitwise(kind, states, dtype):
    a, b = parts(kind).to(dtype), parts(kind).to(dtype)
    first, second = (Optimizer(m, kind=kind, states=states) for m in (a, b))

    def step(model, optimizer):
        sum(p.float().sin().square().sum() for p in model.parameters()).backward()
        optimizer.step(0.05, 1.0)

    for _ in range(3):
        step(a, first)
    b.load_state_dict(a.state_dict())
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    for _ in range(3):
        step(a, first)
        step(b, second)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert first.state_tensors()["step"] == 6


class NoHostSync(TorchDispatchMode):
    """Raises where a value goes from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), f"{func} reads"
        return func(*args, **(kwargs or {}))


def test_the_check_for_host_syncs_checks():
    with NoHostSync(), pytest.raises(AssertionError, match="reads"):
        torch.ones(2).sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_reads_nothing_from_the_device(kind, states, dtype, monkeypatch):
    model = parts(kind).to(dtype)
    optimizer = Optimizer(model, kind=kind, states=states)
    sum(p.float().sin().square().sum() for p in model.parameters()).backward()
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with NoHostSync():
        optimizer.step(0.05, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_on_the_gpu_does_not_wait_for_it(kind, states):
    model = parts(kind).to("cuda", torch.bfloat16)
    optimizer = Optimizer(model, kind=kind, states=states)
    for _ in range(2):
        sum(p.float().sin().square().sum() for p in model.parameters()).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(0.05, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options, words",
    [({"kind": "sgd"}, "kind is 'sgd'; expected one of"), ({"states": "int8"}, "states is 'int8'; expected one of")],
)
def test_unknown_options(options, words):
    with pytest.raises(ValueError, match=words):
        Optimizer(quadratic(torch.float32)[0], **options)


def test_frozen_parameters_have_no_state():
    model, _ = quadratic(torch.bfloat16)
    model[0].requires_grad_(False)
    assert not [k for k in Optimizer(model).state_tensors() if ".0." in k]


def test_other_dtypes():
    with pytest.raises(ValueError, match="0.weight is torch.float16; expected"):
        Optimizer(quadratic(torch.float16)[0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("exp_avg.0.weight"), "exp_avg.0.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"extra is torch.float32 \(1,\); expected none"),
        (lambda s: s.update({"exp_avg_sq.1.bias": torch.ones(9)}),
         r"exp_avg_sq.1.bias is torch.float32 \(9,\); expected torch.float32 \(4,\)"),
        (lambda s: s.update({"exp_avg.1.bias": torch.ones(4).bfloat16()}),
         r"exp_avg.1.bias is torch.bfloat16 \(4,\); expected torch.float32"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_states_that_do_not_fit(change, words):
    model, x = quadratic(torch.float32)
    optimizer = Optimizer(model)
    model(x).sum().backward()
    optimizer.step(0.1, 1.0)
    state = optimizer.state_tensors()
    change(state)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_tensors(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_accumulation_weighs_labels_not_micro_steps(make_data, model_config, dtype):
    loader = PackedLoader(TokenShards(make_data([30, 44, 51])), seq_len=16, rows=4, seed=0)
    whole = loader.batch(0)
    whole.labels[:40:2] = IGNORE  # the first micro-step keeps half as many labels as the second
    ends = whole.cu_seqlens.tolist()
    assert 32 in ends
    halves = [
        Batch(whole.tokens[a:b], whole.labels[a:b],
              torch.tensor([e - a for e in ends if a <= e <= b], dtype=torch.int32)) for a, b in ((0, 32), (32, 64))
    ]
    results = []
    for batches in ([whole], halves):
        model = Qwen3(model_config).init_weights(0).to(dtype)
        mean = next_token_loss(model, whole) / 44
        optimizer = Optimizer(model)
        loss, norm, kept = train_step(model, optimizer, batches, next_token_loss, lr=1e-3, max_grad_norm=1e9)
        assert kept == 44
        torch.testing.assert_close(loss, mean, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        results.append((loss, norm))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
