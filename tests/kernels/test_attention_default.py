"""attention and qk_norm_attention with the kernels they choose by themselves, torch's among them: repeatable, in CUDA
graphs, lean, and at offsets beyond 2^31."""

import pytest
import torch
from common import DEVICE
from test_attention import batched, packed
from test_qk_norm_attention import inputs_for, op
from test_qk_norm_rope import table

from qwen3_kernels import (
    attention, cross_entropy, dispatch, qk_norm_attention, qk_norm_rope, rms_norm, selfcheck, swiglu,
)
from qwen3_kernels.ops._flash import aligned
from qwen3_kernels.ops.attention import attention_ref

# On Hopper the first has kernels of ours, the others torch's: flash, and plain steps for the last.
KINDS = [(128, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16), (64, torch.float32)]
parametrize_kind = pytest.mark.parametrize("width, dtype", KINDS, ids=["ours", "heads-of-64", "float16", "float32"])
parametrize_op = pytest.mark.parametrize("function", [attention, op], ids=["attention", "qk_norm_attention"])
parametrize_form = pytest.mark.parametrize("form", ["batched", "packed"])


def random(function, form, width, dtype, lengths):
    """Packed documents, or two rows of as many tokens as all of them."""
    T = sum(lengths)
    if function is op:
        lead = (T,) if form == "packed" else (2, T)
        return inputs_for(lead, 8, 2, width, dtype, lengths=lengths if form == "packed" else None)
    return packed(lengths, 8, 2, width, dtype) if form == "packed" else batched(2, T, T, 8, 2, width, dtype)


@parametrize_kind
@parametrize_form
@parametrize_op
def test_repeatable(function, form, width, dtype):
    """Long enough on a GPU for many programs to add to the same gradient."""
    lengths, times = ((0, 700, 1, 1347), 100) if DEVICE == "cuda" else ((0, 40, 1, 27), 3)
    inputs = random(function, form, width, dtype, lengths)
    first = selfcheck.outputs_and_grads(function, inputs)
    for _ in range(times):
        assert all(map(torch.equal, first, selfcheck.outputs_and_grads(function, inputs)))


@pytest.mark.gpu
@parametrize_kind
@parametrize_form
@parametrize_op
def test_forward_and_backward_in_a_cuda_graph(function, form, width, dtype):
    """Replayed with other inputs, among them other documents."""
    if form == "packed" and dtype == torch.float32:
        pytest.skip("documents one by one: their lengths go to the host")
    documents = (0, 200, 1, 99), (90, 10, 0, 200), (1, 1, 298, 0)
    held, *others = (random(function, form, width, dtype, lengths) for lengths in documents)
    leaves = [t for n, t in held.items() if t.is_floating_point() and n not in selfcheck.CONSTANTS]
    wanted = [t.requires_grad_() for t in leaves]
    dout = torch.randn_like(held["q"])

    def step():
        out = function(**held)
        return out.detach(), *torch.autograd.grad(out, wanted, dout)

    # Outside of the graph first, on another stream as torch asks: self-checks, and what is loaded at first use.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for inputs in others:
        with torch.no_grad():
            for name, t in inputs.items():
                held[name].copy_(t)
            dout.normal_()
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, got, step()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [30, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("form", ["batched", "longer-keys", "longer-queries", "packed", "one-token"])
def test_torchs_flash_kernels(dtype, width, causal, form):
    """Which queries see which keys, and what those that see none get, as everywhere else; lse is in float32."""
    inputs = {
        "batched": lambda: batched(2, 150, 150, 4, 2, width, dtype),
        "longer-keys": lambda: batched(2, 1, 300, 4, 2, width, dtype),
        "longer-queries": lambda: batched(1, 200, 70, 4, 4, width, dtype),
        "packed": lambda: packed((0, 1, 130, 0, 69), 4, 2, width, dtype),
        "one-token": lambda: packed((0, 1, 0), 4, 2, width, dtype),
    }[form]()
    truth = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    want = selfcheck.outputs_and_grads(lambda **kw: attention_ref(**kw, causal=causal), truth)
    want_lse = attention_ref(**truth, causal=causal, return_lse=True)[1]
    with dispatch.use("torch"):
        got = selfcheck.outputs_and_grads(lambda **kw: attention(**kw, causal=causal), inputs)
        lse = attention(**inputs, causal=causal, return_lse=True)[1]
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=4 * eps * b.abs().max().clamp(min=1).item())
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["batched", "packed"])
def test_torchs_flash_kernels_are_registered_and_compile(form):
    inputs = random(attention, form, 64, torch.float16, (5, 0, 60))
    q, k, v = (inputs[n].clone().requires_grad_() for n in "qkv")
    args = (q, k, v, inputs.get("cu_seqlens"), None, True, 0.125, "flash")
    torch.library.opcheck(torch.ops.qwen3.attention.default, args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: attention(**kw), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, *(selfcheck.outputs_and_grads(f, inputs) for f in (attention, compiled))))


@pytest.mark.gpu
def test_torchs_flash_kernels_leave_the_flag_of_determinism_as_it_was():
    inputs = batched(1, 64, 64, 2, 1, 64, torch.float16)
    before = torch.get_deterministic_debug_mode()
    try:
        for mode in (0, 1, 2):
            torch.set_deterministic_debug_mode(mode)
            selfcheck.outputs_and_grads(attention, inputs)
            assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["batched", "packed"])
def test_lse_of_torchs_flash_kernels_needs_no_score_matrix(form):
    T = 8192
    inputs = packed((T,), 8, 2, 64, torch.float16) if form == "packed" else batched(1, T, T, 8, 2, 64, torch.float16)
    attention(**inputs, return_lse=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(**inputs, return_lse=True)
    assert torch.cuda.max_memory_allocated() - before < 8 * T * T / 10  # bytes; the matrix has 8·T² numbers


ROWS, STRIDE = 264, 2**23 + 128  # of the big buffer: the last 8 rows begin beyond 2^31


def columns(big, first, *shape):
    """A view [ROWS, *shape] of the buffer from column ``first`` on, filled with random numbers."""
    width = torch.Size(shape).numel()
    view = big[:, first : first + width]
    view.copy_(torch.randn(ROWS, width))
    return view.view(ROWS, *shape)


@pytest.mark.parametrize("start", [0, 1, 8])
def test_aligned(start):
    """Contiguous, but not from a 16-byte boundary on, is not enough."""
    t = torch.arange(64, dtype=torch.bfloat16)[start:][:48].view(2, 3, 8)
    found = aligned(t)
    assert found.data_ptr() % 16 == 0 and torch.equal(found, t) and (found is t) == (start % 8 == 0)


def test_aligned_copies_repeated_rows():
    found = aligned(torch.arange(8, dtype=torch.bfloat16).expand(3, 8))
    assert found.stride() == (8, 1) and torch.equal(found[2], torch.arange(8).bfloat16())


def large_offsets(name, big):
    """(function of the differentiable inputs, those inputs) of an op; the inputs lie in ``big``."""
    def small(*shape):
        return torch.randn(shape).to(DEVICE, torch.bfloat16)

    D = 64 if name.endswith("heads of 64") else 128
    q, k, v = (columns(big, first * D, H, D) for first, H in ((0, 4), (4, 2), (6, 2)))
    rope = tuple(table(torch.arange(ROWS), D).values())
    ends = torch.tensor([0, 100, ROWS], dtype=torch.int32, device=DEVICE)
    # A multiple of 16, as the big buffer's stride is: Triton would read others by other widths, and so sum in another order.
    width = 1008
    gate, up = (columns(big, first, width) for first in (2000, 4000))
    labels = torch.randint(width, (ROWS,), device=DEVICE)
    if name.startswith("attention packed"):
        return lambda q, k, v: attention(q, k, v, cu_seqlens=ends), (q, k, v)
    if name.startswith("attention"):
        return attention, (q[None], k[None], v[None])
    if name.startswith("qk_norm_attention"):
        return lambda *t: qk_norm_attention(*t, rope, cu_seqlens=ends), (q, k, v, small(D), small(D))
    return {
        "qk_norm_rope": (lambda q, k, *w: torch.cat(qk_norm_rope(q, k, *w, *rope), 1), (q, k, small(D), small(D))),
        "rms_norm": (rms_norm, (gate, small(width))),
        "rms_norm and residual": (lambda x, w, r: torch.cat(rms_norm(x, w, 1e-6, r), 1), (gate, small(width), up)),
        "swiglu": (swiglu, (gate, up)),
        "cross_entropy": (lambda x: cross_entropy(x, labels, reduction="none"), (gate,)),
    }[name]


@pytest.mark.parametrize("name", [
    "attention", "attention packed", "attention, heads of 64", "qk_norm_attention", "qk_norm_rope", "rms_norm",
    "rms_norm and residual", "swiglu", "cross_entropy",
])
def test_offsets_beyond_2_31(name):
    """Rows of one big buffer, the last ones beyond 2^31 elements, give the bits of the same rows side by side; so do
    the gradients of outputs that lie like that."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("less than 12 GB of memory are free")
    big = torch.empty(ROWS, STRIDE, dtype=torch.bfloat16, device=DEVICE)  # on a CPU, only touched pages are taken
    if DEVICE == "cuda":
        big.fill_(torch.nan)
    function, inputs = large_offsets(name, big)
    assert sum((n - 1) * step for n, step in zip(inputs[0].shape, inputs[0].stride())) > 2**31
    shape = function(*inputs).shape
    dout = columns(big, 8000, *shape[shape.index(ROWS) + 1 :]).view(shape)
    found = []
    for tensors, cotangent in ((inputs, dout), ([t.contiguous() for t in inputs], dout.contiguous())):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(*tensors)
        found.append([out, *torch.autograd.grad(out, tensors, cotangent.to(out.dtype))])
    assert all(t.isfinite().all() for t in found[1])
    assert all(map(torch.equal, *found))
