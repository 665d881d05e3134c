import functools
import importlib
import types

import pytest
import torch
from common import DEVICE, check_error_rule, check_repeatable, parametrize_dtype, randn

from qwen3_kernels import dispatch, linear_cross_entropy, selfcheck
from qwen3_kernels.ops._through_logits import ChunkGrads
from qwen3_kernels.ops.linear_cross_entropy import CHUNK_BYTES, default_chunk, linear_cross_entropy_ref

OP = "linear_cross_entropy"
# Not Triton on its interpreter: its part here is cross_entropy's, tested there, and this would take minutes.
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in ("cpu", "cuda", "torch", *(("triton",) if DEVICE == "cuda" else ()))
    for dtype in (torch.float32, torch.bfloat16)
    if dispatch.unavailable(OP, name, DEVICE, dtype) is None
]
parametrize = pytest.mark.parametrize("backend, dtype", CASES)
BACKENDS = sorted({c.values[0] for c in CASES})


def inputs_for(N, H, V, dtype, scale=1.0, ignored=True):
    labels = torch.randint(V, (N,), device=DEVICE)
    if ignored:
        labels[1::3] = -100
    return {"hidden": randn(N, H, dtype=dtype), "head": randn(V, H, dtype=dtype, scale=scale * H**-0.5), "labels": labels}


def test_every_backend_of_this_machine_is_tested():
    assert "torch" in BACKENDS and ("cpu" in BACKENDS if DEVICE == "cpu" else "triton" in BACKENDS)


@parametrize
@pytest.mark.parametrize("shape", [(1, 32, 264), (5, 24, 72), (300, 64, 264), (7, 40, 1024)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_error_rule(backend, dtype, shape, reduction):
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs_for(*shape, dtype), reduction=reduction)


@parametrize
@pytest.mark.parametrize("H", [64, 1088] if DEVICE == "cuda" else [64])
@pytest.mark.parametrize("stats", [False, True])
def test_error_rule_over_many_tiles(backend, dtype, H, stats):
    """More tiles of the Hopper kernel than an H100 works on at a time: those before a CTA's last are stored late."""
    def op(**inputs):
        loss = linear_cross_entropy(**inputs, reduction="sum", return_stats=stats)
        return loss[0] if stats else loss

    ref = functools.partial(linear_cross_entropy_ref, reduction="sum")
    check_error_rule(op, ref, backend, inputs_for(600 if DEVICE == "cuda" else 60, H, 9000, dtype))


@parametrize
def test_error_rule_on_two_threads(backend, dtype):
    torch.set_num_threads(2)
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs_for(300, 64, 264, dtype))


@parametrize
@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"z_loss": 1e-3}, {"z_loss": 0.01, "temperature": 1.7, "reduction": "none"}], ids=str
)
def test_temperature_and_z_loss(backend, dtype, options):
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs_for(40, 48, 96, dtype, 2.0), **options)


@parametrize
@pytest.mark.parametrize("reduction, num_items", [("mean", None), ("sum", None), ("num_items", 37.0), ("none", None)])
def test_weights(backend, dtype, reduction, num_items):
    """Loss masks, and for single losses (whose sum would cancel) signed advantages; some of them zero."""
    weights = torch.randn(40, device=DEVICE)
    weights = weights if reduction == "none" else weights.abs()
    weights[::5] = 0
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs_for(40, 48, 96, dtype),
                     reduction=reduction, num_items=num_items, weights=weights)


@parametrize
def test_signed_weights_of_a_sum(backend, dtype):
    """The gradients of the sum, computed in the forward, are those of the single losses, computed in the backward."""
    inputs, weights = inputs_for(40, 48, 96, dtype), torch.randn(40, device=DEVICE)
    hidden, head = (inputs[n].requires_grad_() for n in ("hidden", "head"))
    with dispatch.use(backend):
        grads = [
            torch.autograd.grad(linear_cross_entropy(**inputs, weights=weights, reduction=r).sum(), (hidden, head))
            for r in ("sum", "none")
        ]
    for a, b in zip(*grads):
        assert torch.equal(a, b) and a.abs().sum() > 0


@parametrize
@pytest.mark.parametrize("scale", [5.0, 30.0, 300.0], ids=["p-near-1", "p-is-1", "huge"])
@pytest.mark.parametrize("right", [True, False], ids=["label-is-likeliest", "label-is-unlikely"])
def test_rows_that_are_sure(backend, dtype, scale, right):
    """Every hidden state is one row of the head, scaled: its token has nearly all the probability."""
    inputs = inputs_for(33, 64, 264, dtype, ignored=False)
    tokens = torch.arange(33, device=DEVICE) * 8
    inputs["hidden"] = inputs["head"][tokens] * scale
    inputs["labels"] = tokens if right else (tokens + 9) % 264
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs, reduction="sum")


@parametrize
def test_chunks_do_not_change_the_result(backend, dtype):
    inputs = inputs_for(300, 32, 64, dtype)
    with dispatch.use(backend):
        whole, parts = (
            selfcheck.outputs_and_grads(lambda **kw: linear_cross_entropy(**kw, chunk_tokens=n), inputs) for n in (512, 70)
        )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4 if dtype == torch.bfloat16 else 1e-7)


@parametrize
@pytest.mark.parametrize("chunks", [4, 11, 40])
def test_error_rule_over_many_chunks(backend, dtype, chunks):
    """Sums over chunks do not add up their roundings; a sum, since 1 / N would be rounded by plain torch alone."""
    def chunked(**inputs):
        return linear_cross_entropy(**inputs, chunk_tokens=440 // chunks)

    inputs = inputs_for(440, 48, 96, dtype, 2.0)
    check_error_rule(chunked, linear_cross_entropy_ref, backend, inputs, reduction="sum",
                     weights=torch.rand(440, device=DEVICE) + 0.5)


@parametrize
def test_stats(backend, dtype):
    inputs = inputs_for(20, 32, 64, dtype, 2.0)
    with dispatch.use(backend):
        loss, stats = linear_cross_entropy(**inputs, return_stats=True, reduction="none", temperature=0.7)
    kept = inputs["labels"] != -100
    logits = inputs["hidden"].double() @ inputs["head"].double().T / 0.7
    logp = logits.log_softmax(-1)
    want = {
        "nll": -logp.gather(1, inputs["labels"].clamp(min=0).unsqueeze(1)).squeeze(1),
        "lse": logits.logsumexp(-1), "entropy": -(logp.exp() * logp).sum(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(getattr(stats, name).double(), value * kept, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5,
                                   atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
        assert not getattr(stats, name).requires_grad
    torch.testing.assert_close(loss, stats.nll)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_gradients_meet_fp32_logits(backend):
    """Plain torch rounds the logits to bf16; where a kernel keeps fp32 logits its gradients are clearly better."""
    if backend not in ("cuda", "triton") or DEVICE == "cpu":
        pytest.skip("the CPU's matrix product rounds to bf16")
    with dispatch.use(backend):
        ratio = selfcheck.compare(linear_cross_entropy, linear_cross_entropy_ref, inputs_for(300, 64, 264, torch.bfloat16, 8.0))
    assert ratio < 1


@parametrize
def test_only_one_gradient_is_wanted(backend, dtype):
    inputs = inputs_for(20, 32, 64, dtype)
    with dispatch.use(backend):
        both = selfcheck.outputs_and_grads(linear_cross_entropy, inputs)
        for reduction in ("mean", "none"):
            for name, want in (("hidden", both[1]), ("head", both[2])):
                leaf = inputs[name].clone().requires_grad_()
                loss = linear_cross_entropy(**(inputs | {name: leaf}), reduction=reduction)
                loss = loss.sum() / (inputs["labels"] != -100).sum() if reduction == "none" else loss
                loss.backward(selfcheck_cotangent())
                torch.testing.assert_close(leaf.grad, want, rtol=2e-2, atol=2e-3 * want.abs().max().item())
        with torch.no_grad():
            assert not linear_cross_entropy(**(inputs | {"hidden": inputs["hidden"].clone().requires_grad_()})).requires_grad


def selfcheck_cotangent():
    """What outputs_and_grads uses for a scalar."""
    return torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64).float().to(DEVICE)


@parametrize
@pytest.mark.parametrize("H, chunk_tokens", [(32, None), (32, 2), (2064, 2), (2064, 6)])
def test_head_gradient_is_added_in_place(backend, dtype, H, chunk_tokens):
    inputs = inputs_for(24, H, 64, dtype)
    for buffer_dtype in {dtype, torch.float32}:
        with dispatch.use(backend):
            whole = inputs["head"].clone().requires_grad_()
            linear_cross_entropy(**(inputs | {"head": whole}), reduction="num_items", num_items=16).backward()
            total = torch.zeros(64, H, dtype=buffer_dtype, device=DEVICE)
            leaf, grads = inputs["head"].clone().requires_grad_(), []
            for half in (slice(0, 12), slice(12, 24)):
                hidden = inputs["hidden"][half].clone().requires_grad_()
                linear_cross_entropy(hidden, leaf, inputs["labels"][half], reduction="num_items", num_items=16,
                                     head_grad=total, chunk_tokens=chunk_tokens).backward()
                grads.append(hidden.grad)
            assert leaf.grad is None and all(g.abs().sum() > 0 for g in grads)
        wide = inputs["head"].double().requires_grad_()
        linear_cross_entropy_ref(inputs["hidden"].double(), wide, inputs["labels"], reduction="num_items",
                                 num_items=16).backward()
        assert selfcheck.error_ratio(total, whole.grad, wide.grad) <= selfcheck.LIMIT


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is a device-side assertion, which would end the process's context")
def test_head_grad_wants_an_unscaled_loss():
    inputs = inputs_for(4, 8, 16, torch.float32)
    inputs["head"].requires_grad_()
    loss = linear_cross_entropy(**inputs, head_grad=torch.zeros(16, 8))
    with pytest.raises(RuntimeError, match="gradient of the loss must be 1"):
        (loss / 2).backward()


def test_a_second_backward_is_refused():
    inputs = inputs_for(4, 8, 16, torch.float32)
    inputs["head"].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_the_gradient_of_the_head_is_held_once():
    """In the whole step one tensor of the head's shape is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(str(function) for t in torch.utils._pytree.tree_leaves(out) if getattr(t, "shape", None) == (520, 32))
            return out

    inputs = inputs_for(24, 32, 520, torch.float32)
    hidden, head = (inputs[n].requires_grad_() for n in ("hidden", "head"))
    linear_cross_entropy(hidden, head, inputs["labels"])  # the self-check is over
    with Made():
        torch.autograd.grad(linear_cross_entropy(hidden, head, inputs["labels"]), (hidden, head))
    assert made == ["qwen3.linear_cross_entropy_reduced.default"]


@parametrize
def test_all_labels_ignored(backend, dtype):
    inputs = inputs_for(5, 16, 24, dtype)
    inputs["labels"][:] = -100
    with dispatch.use(backend):
        out = selfcheck.outputs_and_grads(linear_cross_entropy, inputs)
    assert all((t == 0).all() for t in out)


@parametrize
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registration_and_compile(backend, dtype, reduction):
    inputs = inputs_for(12, 16, 24, dtype)
    leaves = inputs["hidden"].clone().requires_grad_(), inputs["head"].clone().requires_grad_(), inputs["labels"]
    with dispatch.use(backend):
        if reduction == "none":
            args = (*leaves, -100, 1.0, 0.0, True, 256, backend)
            torch.library.opcheck(torch.ops.qwen3.linear_cross_entropy.default, args)
        else:
            args = (*leaves, torch.ones(12, device=DEVICE), True, True, -100, 1.0, 0.0, True, 256, backend)
            torch.library.opcheck(torch.ops.qwen3.linear_cross_entropy_reduced.default, args,
                                  test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
        torch._dynamo.reset()
        function = lambda **kw: linear_cross_entropy(**kw, reduction=reduction)  # noqa: E731
        eager = selfcheck.outputs_and_grads(function, inputs)
        compiled = selfcheck.outputs_and_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@parametrize
@pytest.mark.parametrize("H", [32, 2064])
def test_repeatable(backend, dtype, H):
    with dispatch.use(backend):
        check_repeatable(linear_cross_entropy, backend, inputs_for(70, H, 64, dtype), chunk_tokens=32, threads=(2,))


@pytest.mark.gpu
@pytest.mark.parametrize("V", [520, 9000])
@pytest.mark.parametrize("offset", [0, 44, 100, 1000])
def test_overflowing_sums_are_done_again(offset, V):
    """A label far below the maximum overflows the sum against its own logit; those rows run again (at 44 some
    of them). The logit comes from all of the hidden state, lest a number or two make up the gradient and their luck the error."""
    N, H = 600, 64
    head = torch.randn(V, H, device="cuda", dtype=torch.bfloat16) * 0.1
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
    direction = torch.randn(H, device="cuda").sign() * H**-0.5
    head[7], head[8] = direction, -direction
    hidden[300:320] += offset / 2 * direction  # of three blocks of rows only one runs again
    labels = torch.full((N,), 8, device="cuda")
    inputs = {"hidden": hidden, "head": head, "labels": labels}
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, "cuda", inputs, reduction="sum")


@pytest.mark.gpu
def test_error_rule_where_the_heads_gradient_is_wide():
    """From `MIN_WIDTH` on a kernel of ours makes it."""
    check_error_rule(lambda **kw: linear_cross_entropy(**kw, chunk_tokens=256), linear_cross_entropy_ref, "cuda",
                     inputs_for(1700, 2064, 1032, torch.bfloat16, 2.0), reduction="sum")


@pytest.mark.gpu
def test_a_label_out_of_range_gives_nan_on_cuda():
    inputs = inputs_for(8, 16, 24, torch.bfloat16, ignored=False)
    inputs["labels"][3] = 24
    for backend in BACKENDS:
        if backend != "torch":
            with dispatch.use(backend):
                loss = linear_cross_entropy(**inputs, reduction="none")
            assert loss.isnan().tolist() == [i == 3 for i in range(8)]


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 2064])
def test_in_a_cuda_graph(H):
    inputs = inputs_for(300, H, 264, torch.bfloat16)
    hidden, head = (inputs[n].requires_grad_() for n in ("hidden", "head"))
    run = lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, inputs["labels"]), (hidden, head))  # noqa: E731
    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


GOOD = {"hidden": torch.ones(3, 8), "head": torch.ones(16, 8), "labels": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"head": torch.ones(16, 7)}, ValueError, r"head is \(16, 7\); expected \[V, 8\]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels is \(2,\)"),
        ({"labels": torch.zeros(3)}, TypeError, "labels is torch.float32"),
        ({"head": torch.ones(16, 8, dtype=torch.bfloat16)}, TypeError, "head is torch.bfloat16"),
        ({"weights": torch.ones(4)}, ValueError, r"weights is \(4,\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected above 0"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"num_items": 3}, ValueError, "num_items is 3"),
        ({"reduction": "num_items"}, ValueError, "num_items is None"),
        ({"head_grad": torch.zeros(16, 8), "reduction": "none"}, ValueError, "head_grad is given"),
        ({"head_grad": torch.zeros(8, 16)}, ValueError, r"head_grad is \(8, 16\)"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input(change, error, words):
    args = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in (GOOD | change).items()}
    with pytest.raises(error, match=words):
        linear_cross_entropy(**args)


@pytest.fixture
def labels_last(monkeypatch):
    """On a CPU, too, under Triton's interpreter."""
    module = importlib.import_module("qwen3_kernels.ops.linear_cross_entropy")  # the package has the function
    monkeypatch.setattr(module, "_labels_last", lambda hidden: hidden.dtype.itemsize < 4)


HALF = [name for name in BACKENDS if dispatch.unavailable(OP, name, DEVICE, torch.bfloat16) is None]


@pytest.mark.parametrize("backend", HALF)
@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_error_rule_where_the_labels_part_comes_last(backend, chunks, labels_last):
    """The chunks are summed in bfloat16, which without their labels costs nothing."""
    inputs = inputs_for(200, 48, 96, torch.bfloat16, 2.0)
    inputs["labels"][3:40] = inputs["labels"][3]  # more than the kernel reads at a time
    check_error_rule(lambda **kw: linear_cross_entropy(**kw, chunk_tokens=200 // chunks), linear_cross_entropy_ref, backend,
                     inputs, reduction="sum")


@pytest.mark.parametrize("backend", HALF)
def test_sure_tokens_where_the_labels_part_comes_last(backend, labels_last):
    """Probabilities of 0.9999 and more: what is left of 1 is not lost with the label's own entry."""
    inputs = inputs_for(33, 16, 264, torch.bfloat16, ignored=False)
    tokens = torch.arange(33, device=DEVICE) * 8
    inputs |= {"hidden": inputs["head"][tokens] * 8, "labels": tokens}
    check_error_rule(linear_cross_entropy, linear_cross_entropy_ref, backend, inputs, reduction="sum")


def compiled_chunk(hidden, head, labels, weight, ignore_index, inverse_temperature, z_loss, nll, lse, entropy):
    """What the Hopper kernels leave, in plain torch."""
    logits, rows = (hidden @ head.T).float() * inverse_temperature, torch.arange(len(labels))
    kept, label = labels != ignore_index, labels.clamp(min=0)
    reference = logits[rows, label]
    e = (logits - reference[:, None]).exp() * kept[:, None]
    e[rows, label] = 0
    rest = e.sum(1)
    nll.copy_(rest.log1p() * kept)
    lse.copy_((reference + rest.log1p()) * kept)
    factor = weight * kept * inverse_temperature / (1 + rest)
    s = factor * (1 + 2 * z_loss * lse)
    own = factor * (2 * z_loss * lse - rest)
    return ChunkGrads(e.to(hidden.dtype), (s[:, None] * hidden).to(hidden.dtype), s, own)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernels themselves are tested")
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("into", [None, torch.bfloat16, torch.float32], ids=str)
def test_gradients_from_what_the_hopper_kernels_leave(options, chunks, into, labels_last, monkeypatch):
    """The parts around them: labels apart, sums of chunks, the head's gradient in a buffer that already has something."""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None, **kw: mm(a, b, **kw) if out_dtype is None else
                        mm(a.to(out_dtype), b.to(out_dtype), **kw))
    backend = dispatch.backend
    monkeypatch.setattr(dispatch, "backend", lambda op, name: types.SimpleNamespace(chunk=compiled_chunk)
                        if name == "cpu" else backend(op, name))
    inputs = inputs_for(200, 48, 96, torch.bfloat16, 2.0)
    options |= {"reduction": "sum"}

    def leaves(dtype):
        return (inputs[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "head"))

    def reference(dtype):
        hidden, head = leaves(dtype)
        return torch.autograd.grad(linear_cross_entropy_ref(hidden, head, inputs["labels"], **options), (hidden, head))

    hidden, head = leaves(torch.bfloat16)
    buffer = None if into is None else torch.zeros_like(head, dtype=into)
    halves = [slice(None)] if into is None else [slice(0, 100), slice(100, 200)]
    with dispatch.use("cpu"):
        for part in halves:
            linear_cross_entropy(hidden[part], head, inputs["labels"][part], head_grad=buffer,
                                 chunk_tokens=200 // len(halves) // chunks, **options).backward()
    got = hidden.grad, head.grad if into is None else buffer
    for g, p, t in zip(got, reference(torch.bfloat16), reference(torch.float64), strict=True):
        assert selfcheck.error_ratio(g, p, t) <= selfcheck.LIMIT


@pytest.mark.parametrize("H", [8, 40, 1032])
def test_label_rows(H):
    from qwen3_kernels.triton.linear_cross_entropy import add_label_rows

    N, V = 60, 12
    grad, hidden, factor = randn(V, H, dtype=torch.bfloat16), randn(N, H, dtype=torch.bfloat16), randn(N, dtype=torch.float32)
    labels = torch.randint(V, (N,), device=DEVICE)
    labels[10:40] = 5
    labels[::7], labels[8], labels[9] = -100, V, 1 << 40
    kept = ((labels >= 0) & (labels < V)).cpu()
    want = grad.cpu().double().index_add_(0, labels.cpu()[kept], (hidden.cpu().double() * factor.cpu().double()[:, None])[kept])
    add_label_rows(grad, hidden, labels, factor)
    torch.testing.assert_close(grad.cpu().double(), want, rtol=2**-8, atol=1e-5)  # rounded once


@pytest.mark.parametrize("H", [8, 40, 1032])
def test_finish_hidden(H):
    from qwen3_kernels.triton.linear_cross_entropy import finish_hidden

    n, V = 20, 12
    out, head = randn(n, 2 * H, dtype=torch.bfloat16)[:, :H], randn(V, H, dtype=torch.bfloat16)
    product, scale, own = (randn(*shape, dtype=torch.float32) for shape in ((n, H), (n,), (n,)))
    labels = torch.randint(V, (n,), device=DEVICE)
    labels[::7], labels[8], labels[9] = -100, V, 1 << 40
    known = ((labels >= 0) & (labels < V)).double()[:, None]
    want = product.double() * scale.double()[:, None] + known * own.double()[:, None] * head[labels.clamp(0, V - 1)].double()
    finish_hidden(out, product, scale, own, head, labels)
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-5)  # rounded once


@pytest.mark.gpu
@pytest.mark.parametrize("n, H, V", [(1, 2048, 8), (70, 2056, 264), (768, 2048, 1032), (129, 4096, 520), (2000, 3000, 3000)])
@pytest.mark.parametrize("add", [False, True])
def test_the_heads_gradient_of_a_chunk(n, H, V, add):
    from qwen3_kernels.cuda.linear_cross_entropy import MIN_WIDTH, add_product

    assert H >= MIN_WIDTH
    u, x, before = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, V), (n, H), (V, H)))
    got = before.clone() if add else torch.full_like(before, float("nan"))
    add_product(got, u, x, add)
    product = (u.double().T @ x.double()).bfloat16().double()
    want = before.double() + product if add else product
    # In float32 a product may round to the other side of a tie.
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-8 * product.abs().max().item())
    assert ((got - want).norm() / want.norm()) < 2**-8


V = 151_936


@pytest.mark.parametrize(
    "N, H, tokens",
    [
        (100, 1024, 256), (8192, 1024, 768),  # three quarters of the head's gradient
        (8192, 2048, 1024), (8192, 4096, 1024),  # half of CHUNK_BYTES
        (8193, 1024, 2304), (16384, 2048, 4096), (32768, 1024, 4096), (65536, 4096, 4096),  # a quarter, or twice CHUNK_BYTES
    ],
)
def test_default_chunk_on_a_gpu(N, H, tokens):
    assert default_chunk(N, V, H, 2, sums=True) == tokens


@pytest.mark.parametrize("logit_bytes", [2, 4])
def test_other_chunks_are_bounded_alone(logit_bytes):
    assert all(default_chunk(n, V, 64, logit_bytes, sums=False) * V * logit_bytes <= CHUNK_BYTES for n in (1, 5000, 100_000))
