from functools import partial

import pytest
import torch
from common import DEVICE, backends, check_repeatable, parametrize_dtype, pick, randn

from qwen3_kernels import dispatch, linear_kl, selfcheck
from qwen3_kernels.ops.linear_kl import divergences_ref, linear_kl_ref
from training.memory import allocated

OP = "linear_kl"
N, H, T, V, K = 37, 24, 40, 96, 5
ROUND = 4096 if DEVICE == "cuda" else 128  # classes that the Triton kernels read at once: see small_rounds
parametrize_direction = pytest.mark.parametrize("direction", ["forward", "reverse"])
parametrize_teacher = pytest.mark.parametrize("top", [False, True], ids=["head", "top-k"])
parametrize_backend = pytest.mark.parametrize("backend", ["torch", *backends(OP)])


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """The interpreter is slow: there few classes are several rounds."""
    if DEVICE == "cpu":
        kernels = dispatch.backend(OP, "triton")
        monkeypatch.setattr(kernels, "_ROUND", kernels._ROUND | {"DEPTH": 2, "LANES": ROUND // 2})
        monkeypatch.setattr(kernels, "_BLOCK", kernels._BLOCK | {"BLOCK": ROUND})


def inputs_for(dtype, top=False, scale=1.0, N=N, V=V, teacher_scale=None):
    x = {"hidden": randn(N, H, dtype=dtype), "head": randn(V, H, dtype=dtype, scale=scale * H**-0.5)}
    scale = scale if teacher_scale is None else teacher_scale
    teacher = {"teacher_hidden": randn(N, T, dtype=dtype), "teacher_head": randn(V, T, dtype=dtype, scale=scale * T**-0.5)}
    return x, top_of(**teacher) if top else teacher


def top_of(teacher_hidden, teacher_head, temperature=1.0):
    logits = (teacher_hidden @ teacher_head.T).float() / temperature
    logprobs, ids = logits.log_softmax(-1).topk(K)
    return {"teacher_top": (ids, logprobs)}


def tokens_of_ref(x, teacher, **options):
    teacher = {"teacher_hidden": None, "teacher_head": None, "teacher_top": None} | teacher
    with torch.no_grad():
        return divergences_ref(**x, **teacher, **options)


def check(x, teacher, backend="torch", chunk_tokens=None, each=False, **options):
    """The error rule for loss and gradients, and where ``each`` of the tokens counts, for those in place of the loss."""
    def wide(value):
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.cpu().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else (
            value.cpu() if isinstance(value, torch.Tensor) else value)

    run = lambda f, args, other: selfcheck.outputs_and_grads(lambda **kw: f(**kw, **other), args)  # noqa: E731
    wide_x, wide_teacher = ({n: wide(t) for n, t in d.items()} for d in (x, teacher))
    truth = run(linear_kl_ref, wide_x, wide_teacher | {n: wide(t) for n, t in options.items()})
    plain = run(linear_kl_ref, x, teacher | options)
    with dispatch.use(backend, OP):
        got = run(partial(linear_kl, chunk_tokens=chunk_tokens), x, teacher | options)
    if each:
        same = {n: t for n, t in options.items() if n in ("direction", "temperature")}
        truth[0], plain[0] = tokens_of_ref(wide_x, wide_teacher, **same), tokens_of_ref(x, teacher, **same)
        with dispatch.use(backend, OP), torch.no_grad():
            got[0] = linear_kl(**x, **teacher, **options, return_tokens=True)[1]
    ratios = list(map(selfcheck.error_ratio, got, plain, truth))
    assert max(ratios) <= selfcheck.LIMIT, ratios


@parametrize_backend
@parametrize_dtype
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_error_rule(backend, dtype, direction, top, reduction):
    check(*inputs_for(dtype, top, N=pick(backend, N, 11)), backend, direction=direction, reduction=reduction)


@parametrize_backend
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("V", [7, ROUND, 2 * ROUND + 1])
def test_vocabularies_of_any_size(backend, direction, top, V):
    """Rows of one and several rounds, whole and not, of odd numbers of classes, whose gradient overwrites the logits."""
    tokens = 99 if V < ROUND else 9  # of few numbers plain torch's error is luck
    check(*inputs_for(torch.float32, top, 2.0, N=tokens, V=V), backend, each=True, direction=direction, reduction="sum")


@parametrize_backend
@parametrize_dtype
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("chunks", [4, 11, 40, 128])
def test_error_rule_over_many_chunks(backend, dtype, direction, top, chunks):
    """Sums over chunks do not add up their roundings."""
    if backend == "triton" and DEVICE == "cpu" and chunks != 11:
        pytest.skip("the interpreter is slow, and the chunks are summed by what all backends share")
    tokens = 440 // chunks if backend == "torch" else pick(backend, 440, 22) // chunks
    check(*inputs_for(dtype, top, N=tokens * chunks), backend, direction=direction, reduction="sum", chunk_tokens=tokens)


@parametrize_backend
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("scale, temperature", [(1.0, 0.1), (1.0, 5.0), (1e4, 0.1)])
def test_temperatures_and_huge_logits(backend, direction, top, scale, temperature):
    x, teacher = inputs_for(torch.float32, scale=scale, N=9)
    teacher = top_of(**teacher, temperature=temperature) if top else teacher
    check(x, teacher, backend, each=True, direction=direction, temperature=temperature, reduction="sum")


@parametrize_backend
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("sure", ["teacher", "student", "both", "of-others"])
@pytest.mark.parametrize("lead", [5.0, 20.0])
def test_sure_rows(backend, direction, top, sure, lead):
    """A token with nearly all the probability, as far as float64 sees its distance from 1."""
    N = pick(backend, 24, 6)
    x, teacher = inputs_for(torch.float32, N=N)
    rows = torch.arange(N, device=DEVICE) * 4
    for hidden, head, of in (("hidden", "head", x), ("teacher_hidden", "teacher_head", teacher)):
        if sure in ("both", "of-others") or sure == ("student" if of is x else "teacher"):
            chosen = of[head][rows + (1 if sure == "of-others" and of is x else 0)]
            of[hidden] = (chosen.float() * (lead / chosen.float().square().sum(-1, keepdim=True))).to(torch.float32)
    check(x, top_of(**teacher) if top else teacher, backend, each=True, direction=direction, reduction="sum")


@parametrize_direction
def test_float64_stays_float64_over_many_chunks(direction):
    x, teacher = inputs_for(torch.float64)
    grads = [selfcheck.outputs_and_grads(lambda **kw: linear_kl(**kw, **teacher, direction=direction, chunk_tokens=n), x)
             for n in (N, 2)]
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-15)


@parametrize_backend
@parametrize_dtype
@parametrize_direction
@pytest.mark.parametrize("right", [True, False], ids=["teachers-token", "another"])
def test_a_student_sure_of_one_token_and_a_teacher_of_some(backend, dtype, direction, right):
    """The others' probability is 0 in float32; their gradient is that of their share of the rest."""
    x, teacher = inputs_for(dtype, N=9)
    ids, logprobs = top_of(**teacher)["teacher_top"]
    token = ids[:, 0] if right else (ids.amax(-1) + 1) % V
    token = torch.where(right | (ids != token[:, None]).all(-1), token, (ids.amin(-1) - 1) % V)
    x["head"] = torch.nn.functional.normalize(x["head"].float(), dim=-1).to(dtype)
    x["hidden"] = x["head"][token] * 1000
    leaf = x["hidden"].clone().requires_grad_()
    with dispatch.use(backend, OP):
        loss = linear_kl(leaf, x["head"], teacher_top=(ids, logprobs), direction=direction)
    loss.backward()
    assert loss.isfinite() and loss > 0 and leaf.grad.isfinite().all()
    check(x, {"teacher_top": (ids, logprobs)}, backend, each=True, direction=direction, reduction="sum")


@parametrize_backend
@parametrize_direction
@parametrize_teacher
def test_temperature_mask_and_num_items(backend, direction, top):
    n = pick(backend, N, 11)
    mask = torch.rand(n, device=DEVICE)
    mask[::4] = 0
    check(*inputs_for(torch.float32, top, 3.0, N=n), backend, direction=direction, temperature=0.7, mask=mask, reduction="num_items",
          num_items=11.0)


@parametrize_backend
@parametrize_dtype
@parametrize_teacher
def test_no_tokens(backend, dtype, top):
    x, teacher = inputs_for(dtype, top, N=0)
    with dispatch.use(backend, OP):
        loss, dhidden, dhead = selfcheck.outputs_and_grads(lambda **kw: linear_kl(**kw, **teacher), x)
    assert loss == 0 and dhidden.shape == x["hidden"].shape and torch.equal(dhead, torch.zeros_like(dhead))


@parametrize_direction
@parametrize_teacher
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


@parametrize_backend
@parametrize_dtype
@parametrize_direction
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equal_distributions_have_none(backend, dtype, direction, temperature):
    x, _ = inputs_for(dtype, scale=3.0, N=9, V=ROUND + 90)
    hidden = x["hidden"].clone().requires_grad_()
    with dispatch.use(backend, OP):
        loss, tokens = linear_kl(hidden, x["head"], x["hidden"], x["head"], direction=direction, temperature=temperature,
                                 return_tokens=True)
    loss.backward()
    assert tokens.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6
    assert backend == "torch" or not tokens.any() and not hidden.grad.any()


@parametrize_backend
@parametrize_direction
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_nearly_equal_distributions(backend, direction, apart):
    """Float32 holds little of a divergence that is half the squared difference: no more below 0 than plain torch's."""
    x, _ = inputs_for(torch.float32, scale=3.0, N=9)
    teacher = {"teacher_hidden": x["hidden"], "teacher_head": x["head"] + apart * torch.randn_like(x["head"])}
    check(x, teacher, backend, each=True, direction=direction, reduction="sum")
    with dispatch.use(backend, OP):
        tokens = linear_kl(**x, **teacher, direction=direction, return_tokens=True)[1]
    assert tokens.min() >= min(tokens_of_ref(x, teacher, direction=direction).min(), -2.5e-7)


@parametrize_backend
@parametrize_teacher
def test_tokens_left_out(backend, top):
    """Their gradient is exactly 0, and they change nothing of the others'; their divergence is returned."""
    x, teacher = inputs_for(torch.bfloat16, top, N=4, V=ROUND + 5)
    mask = torch.tensor([1.0, 0.0, 2.0, 0.0], device=DEVICE)
    results = []
    for factor in (mask, mask + 1):
        hidden = x["hidden"].clone().requires_grad_()
        with dispatch.use(backend, OP):
            loss, tokens = linear_kl(hidden, x["head"], **teacher, mask=factor, reduction="sum", return_tokens=True)
        loss.backward()
        results.append((tokens, hidden.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].all()
    assert not results[0][1][1::2].any() and results[0][1][::2].any(-1).all() and results[1][1].any(-1).all()


@parametrize_backend
@parametrize_dtype
@parametrize_direction
@parametrize_teacher
def test_divergences_without_gradients_are_the_same(backend, dtype, direction, top):
    x, teacher = inputs_for(dtype, top, N=3, V=ROUND + 5)
    with dispatch.use(backend, OP):
        f = partial(linear_kl, **teacher, direction=direction, return_tokens=True)
        some, none = f(**{n: t.clone().requires_grad_() for n, t in x.items()}), f(**x)
    assert torch.equal(some[0], none[0]) and torch.equal(some[1], none[1])


@parametrize_backend
@parametrize_direction
@parametrize_teacher
def test_repeatable(backend, direction, top):
    x, teacher = inputs_for(torch.bfloat16, top, N=pick(backend, 70, 4), V=ROUND + 90)
    check_repeatable(partial(linear_kl, **teacher, direction=direction), backend, x, threads=(1,))


@pytest.mark.parametrize("backend", [b for b in backends(OP) if b == "triton"])
@parametrize_direction
@parametrize_teacher
@pytest.mark.parametrize("scale", [1.0, 8.0, 1e4], ids=["flat", "sure", "huge"])
def test_the_gradient_takes_the_place_of_the_logits(backend, direction, top, scale):
    """Without another tensor of their size, and in bf16 with one rounding of each number, with the fast exponential."""
    n, V = 5, 2081
    student, teacher = (randn(n, V, dtype=torch.float32, scale=scale) for _ in range(2))
    if top:
        teacher *= min(3 / scale, 1)  # what is left of a sure teacher cancels in float32, whoever computes it
    else:
        teacher[:2] = student[:2] + randn(2, V, dtype=torch.float32, scale=0.1)  # some that agree on the likeliest
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    weight = torch.rand(n, device=DEVICE) + 0.5
    leaf = student.cpu().double().requires_grad_()
    other = {"teacher_top": (ids.cpu(), logprobs.cpu().double())} if top else {
        "teacher_hidden": teacher.cpu().double(), "teacher_head": torch.eye(V, dtype=torch.float64)}
    loss = linear_kl_ref(leaf, torch.eye(V, dtype=torch.float64), **other, direction=direction, temperature=0.7,
                         mask=weight.cpu().double(), reduction="sum")
    want, = torch.autograd.grad(loss, leaf)
    found = []
    call = lambda: found.append(dispatch.backend(OP, backend).chunk(  # noqa: E731
        student, *((None, ids, logprobs) if top else (teacher, None, None)), weight, direction == "reverse", 0.7,
        torch.bfloat16, True))
    if DEVICE == "cpu":
        assert allocated(call)[1] < student.nbytes / 4
    else:
        call()
    kl, grad = found[0]
    torch.testing.assert_close((kl * weight).sum().item(), loss.item(), rtol=3e-6, atol=0)
    assert grad.data_ptr() == student.data_ptr() and grad.dtype == torch.bfloat16
    assert (grad.cpu().double() - want).norm() < 2**-8 * want.norm() + 1e-30


@parametrize_backend
def test_chunks_and_tokens(backend):
    x, teacher = inputs_for(torch.float32)
    with dispatch.use(backend, OP):
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


@parametrize_backend
@parametrize_direction
def test_a_teacher_whose_top_has_all_the_probability(backend, direction):
    x, _ = inputs_for(torch.float32)
    ids = torch.arange(N, device=DEVICE).unsqueeze(1)
    hidden = x["hidden"].clone().requires_grad_()
    with dispatch.use(backend, OP):
        loss = linear_kl(hidden, x["head"], teacher_top=(ids, torch.zeros(N, 1, device=DEVICE)), direction=direction)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and loss > 0


@parametrize_backend
def test_no_gradient_reaches_the_teacher(backend):
    x, teacher = inputs_for(torch.float32, N=3)
    for t in (*x.values(), *teacher.values()):
        t.requires_grad_()
    with dispatch.use(backend, OP):
        linear_kl(**x, **teacher).backward()
    assert all(t.grad is not None for t in x.values()) and all(t.grad is None for t in teacher.values())


@parametrize_backend
@parametrize_teacher
def test_registration_and_compile(backend, top):
    x, teacher = inputs_for(torch.float32, top)
    torch._dynamo.reset()
    f = lambda **kw: linear_kl(**kw, **teacher)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with dispatch.use(backend, OP):
        for a, b in zip(selfcheck.outputs_and_grads(f, x), selfcheck.outputs_and_grads(compiled, x), strict=True):
            torch.testing.assert_close(a, b)
    th, tw = (teacher.get(n) for n in ("teacher_hidden", "teacher_head"))
    ids, logprobs = teacher.get("teacher_top", (None, None))
    args = (x["hidden"].requires_grad_(), x["head"].requires_grad_(), torch.ones(N, device=DEVICE), th, tw, ids, logprobs, True,
            True, False, 1.0, 16, backend)
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
