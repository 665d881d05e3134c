import math

import pytest
import torch

from qwen3_model.model import Qwen3
from training.data.packing import IGNORE, Batch, PackedLoader
from training.data.shards import TokenShards
from training.optim import AdamW, clip_grad_norm_, lr_scale
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
    norm = clip_grad_norm_(grads, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for g, p in zip(grads, params):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=0)


def test_clip_refuses_zero():
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_grad_norm_([torch.ones(2)], 0)


def quadratic(dtype):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=True), torch.nn.Linear(5, 4, bias=True)).to(dtype)
    return model, torch.randn(8, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adamw_is_torch_adamw_on_float32_masters(dtype):
    model, x = quadratic(dtype)
    reference = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in model.named_parameters()}
    groups = [{"params": [p for p in reference.values() if p.dim() == d], "weight_decay": wd} for d, wd in ((2, 0.1), (1, 0.0))]
    plain = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(model, weight_decay=0.1)
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


def test_small_updates_are_not_lost_in_bf16():
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = AdamW(model, weight_decay=0.0)
    for _ in range(20):  # each update is an eighth of bfloat16's step at 1
        model.weight.float().sum().backward()
        optimizer.step(5e-4, 1e9)
    assert model.weight.float().mean().item() == pytest.approx(1 - 0.01, abs=3e-3)


def test_weight_decay_leaves_norms_alone(model_config):
    model = Qwen3(model_config).init_weights(0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = AdamW(model, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, 1.0)
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.dim() == 2 else 1.0)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_round_trip_is_bitwise(dtype):
    a, x = quadratic(dtype)
    b, _ = quadratic(dtype)
    first, second = AdamW(a), AdamW(b)

    def step(model, optimizer):
        model(x).float().square().sum().backward()
        optimizer.step(0.05, 1.0)

    for _ in range(3):
        step(a, first)
    b.load_state_dict(a.state_dict())
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    for _ in range(3):
        step(a, first)
        step(b, second)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("exp_avg.0.weight"), "exp_avg.0.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"extra is \(1,\); expected none"),
        (lambda s: s.update({"exp_avg_sq.1.bias": torch.ones(9)}), r"exp_avg_sq.1.bias is \(9,\); expected \(4,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_states_that_do_not_fit(change, words):
    model, x = quadratic(torch.float32)
    optimizer = AdamW(model)
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
        optimizer = AdamW(model)
        loss, norm, kept = train_step(model, optimizer, batches, next_token_loss, lr=1e-3, max_grad_norm=1e9)
        assert kept == 44
        torch.testing.assert_close(loss, mean, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        results.append((loss, norm))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
