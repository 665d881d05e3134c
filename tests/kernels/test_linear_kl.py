from functools import partial

import pytest
import torch
from common import DEVICE, parametrize_dtype, randn

from qwen3_kernels import linear_kl, selfcheck
from qwen3_kernels.ops.linear_kl import linear_kl_ref

N, H, T, V, K = 37, 24, 40, 96, 5
parametrize_direction = pytest.mark.parametrize("direction", ["forward", "reverse"])


def inputs_for(dtype, top=False, scale=1.0, N=N):
    x = {"hidden": randn(N, H, dtype=dtype), "head": randn(V, H, dtype=dtype, scale=scale * H**-0.5)}
    teacher = {"teacher_hidden": randn(N, T, dtype=dtype), "teacher_head": randn(V, T, dtype=dtype, scale=scale * T**-0.5)}
    if not top:
        return x, teacher
    logits = (teacher["teacher_hidden"] @ teacher["teacher_head"].T).float()
    logprobs, ids = logits.log_softmax(-1).topk(K)
    return x, {"teacher_top": (ids, logprobs)}


def check(x, teacher, chunk_tokens=None, **options):
    def wide(value):
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.cpu().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else (
            value.cpu() if isinstance(value, torch.Tensor) else value)

    run = lambda f, args, other: selfcheck.outputs_and_grads(lambda **kw: f(**kw, **other), args)  # noqa: E731
    truth = run(linear_kl_ref, {n: wide(t) for n, t in x.items()}, {n: wide(t) for n, t in (teacher | options).items()})
    plain, got = (run(f, x, teacher | options) for f in (linear_kl_ref, partial(linear_kl, chunk_tokens=chunk_tokens)))
    ratios = list(map(selfcheck.error_ratio, got, plain, truth))
    assert max(ratios) <= selfcheck.LIMIT, ratios


@parametrize_dtype
@parametrize_direction
@pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_error_rule(dtype, direction, top, reduction):
    check(*inputs_for(dtype, top), direction=direction, reduction=reduction)


@parametrize_dtype
@parametrize_direction
@pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
@pytest.mark.parametrize("chunks", [4, 11, 40, 128])
def test_error_rule_over_many_chunks(dtype, direction, top, chunks):
    """Sums over chunks do not add up their roundings."""
    tokens = 440 // chunks
    check(*inputs_for(dtype, top, N=tokens * chunks), direction=direction, reduction="sum", chunk_tokens=tokens)


@parametrize_direction
def test_float64_stays_float64_over_many_chunks(direction):
    x, teacher = inputs_for(torch.float64)
    grads = [selfcheck.outputs_and_grads(lambda **kw: linear_kl(**kw, **teacher, direction=direction, chunk_tokens=n), x)
             for n in (N, 2)]
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-15)


@parametrize_direction
@pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
def test_temperature_mask_and_num_items(direction, top):
    mask = torch.rand(N, device=DEVICE)
    mask[::4] = 0
    check(*inputs_for(torch.float32, top, 3.0), direction=direction, temperature=0.7, mask=mask, reduction="num_items",
          num_items=11.0)


@parametrize_direction
@pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
def test_gradcheck(direction, top):
    x, teacher = inputs_for(torch.float64, top)
    if top:
        teacher["teacher_top"] = (teacher["teacher_top"][0], teacher["teacher_top"][1].double())
    hidden, head = x["hidden"][:4].requires_grad_(), x["head"].requires_grad_()
    teacher = {n: tuple(t[:4] for t in v) if isinstance(v, tuple) else (v[:4] if n == "teacher_hidden" else v)
               for n, v in teacher.items()}
    f = lambda a, b: linear_kl(a, b, **teacher, direction=direction)  # noqa: E731
    loss = f(hidden, head)
    loss.backward()
    for leaf in (hidden, head):  # by differences along random directions: the op's gradient is scaled in place, once
        step = torch.randn_like(leaf) * 1e-6
        with torch.no_grad():
            moved = [f(hidden + s * step, head) if leaf is hidden else f(hidden, head + s * step) for s in (1, -1)]
        torch.testing.assert_close((moved[0] - moved[1]) / 2, (leaf.grad * step).sum(), rtol=1e-5, atol=1e-14)


@parametrize_direction
def test_equal_distributions_have_none(direction):
    x, _ = inputs_for(torch.float32)
    hidden = x["hidden"].clone().requires_grad_()
    loss = linear_kl(hidden, x["head"], x["hidden"], x["head"], direction=direction)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and hidden.grad.abs().max() < 1e-7


def test_chunks_and_tokens():
    x, teacher = inputs_for(torch.float32)
    whole, tokens = linear_kl(**x, **teacher, return_tokens=True)
    parts, same = linear_kl(**x, **teacher, return_tokens=True, chunk_tokens=5)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(tokens, same)
    torch.testing.assert_close(tokens.mean(), whole)
    assert tokens.shape == (N,) and not tokens.requires_grad


def test_all_top_tokens_is_the_whole_head():
    """K = V - 1 names every class: the same divergence as through the head."""
    x, teacher = inputs_for(torch.float64)
    logp = (teacher["teacher_hidden"] @ teacher["teacher_head"].T).log_softmax(-1)
    logprobs, ids = logp.topk(V - 1)
    torch.testing.assert_close(linear_kl(**x, teacher_top=(ids, logprobs)), linear_kl(**x, **teacher))


@parametrize_direction
def test_a_teacher_whose_top_has_all_the_probability(direction):
    x, _ = inputs_for(torch.float32)
    ids = torch.arange(N, device=DEVICE).unsqueeze(1)
    hidden = x["hidden"].clone().requires_grad_()
    loss = linear_kl(hidden, x["head"], teacher_top=(ids, torch.zeros(N, 1, device=DEVICE)), direction=direction)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and loss > 0


def test_no_gradient_reaches_the_teacher():
    x, teacher = inputs_for(torch.float32)
    for t in (*x.values(), *teacher.values()):
        t.requires_grad_()
    linear_kl(**x, **teacher).backward()
    assert all(t.grad is not None for t in x.values()) and all(t.grad is None for t in teacher.values())


@pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
def test_registration_and_compile(top):
    x, teacher = inputs_for(torch.float32, top)
    torch._dynamo.reset()
    f = lambda **kw: linear_kl(**kw, **teacher)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(selfcheck.outputs_and_grads(f, x), selfcheck.outputs_and_grads(compiled, x), strict=True):
        torch.testing.assert_close(a, b)
    th, tw = (teacher.get(n) for n in ("teacher_hidden", "teacher_head"))
    ids, logprobs = teacher.get("teacher_top", (None, None))
    args = (x["hidden"].requires_grad_(), x["head"].requires_grad_(), torch.ones(N, device=DEVICE), th, tw, ids, logprobs, True,
            True, False, 1.0, 16)
    torch.library.opcheck(torch.ops.qwen3.linear_kl.default, args,
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


GOOD = {"hidden": torch.ones(3, 8), "head": torch.ones(16, 8)}
TEACHER = {"teacher_hidden": torch.ones(3, 4), "teacher_head": torch.ones(16, 4)}


@pytest.mark.parametrize(
    "args, error, words",
    [
        ({}, ValueError, "teacher is given as"),
        ({"teacher_hidden": torch.ones(3, 4)}, ValueError, "teacher is given as"),
        (TEACHER | {"teacher_head": torch.ones(15, 4)}, ValueError, r"teacher_head is \(15, 4\)"),
        (TEACHER | {"teacher_hidden": torch.ones(2, 4)}, ValueError, r"teacher_hidden is \(2, 4\)"),
        (TEACHER | {"mask": torch.ones(2)}, ValueError, r"mask is \(2,\)"),
        (TEACHER | {"direction": "both"}, ValueError, "direction is 'both'"),
        (TEACHER | {"reduction": "none"}, ValueError, "reduction is 'none'"),
        (TEACHER | {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"teacher_top": (torch.zeros(3, 16, dtype=torch.int64), torch.zeros(3, 16))}, ValueError, "teacher_top ids is"),
        ({"teacher_top": (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1))}, ValueError, "log-probabilities is"),
        (TEACHER | {"head": torch.ones(16, 8, dtype=torch.bfloat16)}, TypeError, "head is torch.bfloat16"),
    ],
)
def test_bad_input(args, error, words):
    with pytest.raises(error, match=words):
        linear_kl(**(GOOD | args))
