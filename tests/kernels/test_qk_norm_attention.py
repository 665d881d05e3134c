from functools import partial

import pytest
import torch
from common import DEVICE, backends, check_repeatable, parametrize_dtype, pooled_ratios, randn
from test_qk_norm_rope import table

from qwen3_kernels import attention, dispatch, qk_norm_attention, qk_norm_rope, selfcheck
from qwen3_kernels.ops.qk_norm_attention import qk_norm_attention_ref
from qwen3_kernels.ops.qk_norm_rope import qk_norm_rope_ref

# Where both parts have kernels: on the CPU the compiled ones; on CUDA see test_attention_hopper for bfloat16.
parametrize_backend = pytest.mark.parametrize("backend", [b for b in backends("attention") if b == "cpu"])


def inputs_for(lead, Hq, Hk, D, dtype, scale=1.0, lengths=None, positions=None):
    """Flat keywords: rope as cos and sin, so that none of them is a tuple."""
    T = lead[-1]
    positions = torch.randint(0, 40960, (T,)) if positions is None else positions
    q, k, v = (randn(*lead, H, D, dtype=dtype, scale=s) for H, s in ((Hq, scale), (Hk, scale), (Hk, 1.0)))
    inputs = {"q": q, "k": k, "v": v, "q_weight": randn(D, dtype=dtype), "k_weight": randn(D, dtype=dtype)} | table(positions, D)
    if lengths is not None:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return inputs


def op(cos, sin, **kw):
    return qk_norm_attention(rope=(cos, sin), **kw)


def ref(cos, sin, recompute=False, **kw):
    return qk_norm_attention_ref(rope=(cos, sin), **kw)


def check(backend, inputs, **options):
    with dispatch.use(backend):
        ratios = selfcheck.ratios(op, ref, inputs, **options)
    assert max(ratios) <= selfcheck.LIMIT, ratios


def with_logits_of_1e4(inputs):
    """Heads are normed, so the logits' size is that of the weights, squared."""
    return inputs | {n: inputs[n] * 70 for n in ("q_weight", "k_weight")}


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("shape", [((1, 1), 1, 1, 2), ((2, 7), 3, 1, 6), ((1, 67), 4, 2, 64), ((1, 9), 16, 1, 128)], ids=str)
def test_error_rule(backend, dtype, recompute, shape):
    check(backend, inputs_for(*shape, dtype), recompute=recompute)


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("lengths", [(0, 1, 0, 70, 0), (64, 3)], ids=str)
def test_packed_documents(backend, dtype, lengths):
    check(backend, inputs_for((sum(lengths),), 4, 2, 32, dtype, lengths=lengths))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-6, 1e4], ids=["eps-dominated", "large"])
def test_adversarial_scales(backend, dtype, scale):
    check(backend, inputs_for((1, 20), 4, 2, 48, dtype, scale=scale))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("lengths", [None, (0, 30, 1, 9)], ids=["batched", "packed"])
def test_logits_of_1e4(backend, dtype, lengths):
    inputs = with_logits_of_1e4(inputs_for((1, 40) if lengths is None else (40,), 4, 2, 64, dtype, lengths=lengths))
    check(backend, inputs)
    with dispatch.use(backend):
        assert op(**inputs, return_lse=True)[1].abs().max() > 1e4


@parametrize_backend
@parametrize_dtype
def test_weights_with_zeros_and_negatives_at_position_a_million(backend, dtype):
    inputs = inputs_for((1, 20), 4, 2, 64, dtype, positions=torch.arange(1_000_000, 1_000_020))
    for name in ("q_weight", "k_weight"):
        inputs[name][::3], inputs[name][1::3] = 0, -inputs[name][1::3].abs()
    check(backend, inputs)


@parametrize_backend
@parametrize_dtype
def test_the_bits_of_its_parts(backend, dtype):
    inputs = inputs_for((2, 30), 4, 2, 32, dtype)
    cos, sin = inputs.pop("cos"), inputs.pop("sin")

    def parts(q, k, v, q_weight, k_weight):
        return attention(*qk_norm_rope(q, k, q_weight, k_weight, cos, sin), v)

    with dispatch.use(backend):
        for recompute in (False, True):
            whole = selfcheck.outputs_and_grads(lambda **kw: op(cos, sin, recompute=recompute, **kw), inputs)
            assert all(map(torch.equal, whole, selfcheck.outputs_and_grads(parts, inputs)))


@parametrize_backend
def test_recompute_keeps_less(backend):
    inputs = inputs_for((1, 64), 4, 2, 32, torch.float32)
    kept = []
    for recompute in (False, True):
        sizes = []
        with dispatch.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            op(**{n: t.clone().requires_grad_(n not in ("cos", "sin")) for n, t in inputs.items()}, recompute=recompute)
        kept.append(sum(sizes))
    assert kept[0] - kept[1] == 64 * 6 * 32


@parametrize_backend
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_registration_and_compile(backend, packed):
    inputs = inputs_for((12,) if packed else (2, 6), 4, 2, 16, torch.float32, lengths=(5, 0, 7) if packed else None)
    q, k, v, q_weight, k_weight = (inputs[n].clone().requires_grad_() for n in ("q", "k", "v", "q_weight", "k_weight"))
    args = (q, k, v, q_weight, k_weight, inputs["cos"], inputs["sin"], inputs.get("cu_seqlens"), True, 1e-6, 0.25, True, backend, backend)
    torch.library.opcheck(torch.ops.qwen3.qk_norm_attention.default, args)
    torch._dynamo.reset()
    with dispatch.use(backend):
        compiled = torch.compile(lambda **kw: op(**kw), fullgraph=True, backend="aot_eager")
        for a, b in zip(selfcheck.outputs_and_grads(op, inputs), selfcheck.outputs_and_grads(compiled, inputs), strict=True):
            assert torch.equal(a, b)


@parametrize_backend
@parametrize_dtype
def test_repeatable_and_views_of_a_packed_projection(backend, dtype):
    inputs = inputs_for((70,), 6, 2, 32, dtype, lengths=(30, 40))
    check_repeatable(op, backend, inputs)
    qkv = torch.cat([inputs[n].flatten(1) for n in "qkv"], 1)
    views = dict(zip("qkv", (t.unflatten(1, (-1, 32)) for t in qkv.split([6 * 32, 2 * 32, 2 * 32], 1))))
    assert not views["k"].is_contiguous()
    with dispatch.use(backend):
        assert torch.equal(op(**inputs), op(**(inputs | views)))


def test_the_fallback_on_torch_and_lse():
    inputs = inputs_for((2, 20), 4, 2, 32, torch.float32)
    with dispatch.use("torch"):
        out, lse = op(**inputs, return_lse=True)
    want, want_lse = ref(**{n: t.double() for n, t in inputs.items()}, return_lse=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradcheck(packed, causal):
    """Of the op and of its reference, which is the truth of all tests here."""
    lead, D = (4,) if packed else (2, 2), 4
    shapes = [(*lead, 2, D), (*lead, 1, D), (*lead, 1, D), (D,), (D,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    angle = torch.rand(lead[-1], D // 2, dtype=torch.float64) * 9
    ends = torch.tensor([0, 1, 1, 4], dtype=torch.int32) if packed else None
    for function in (qk_norm_attention, qk_norm_attention_ref):
        run = lambda *t: function(*t, (angle.cos(), angle.sin()), cu_seqlens=ends, causal=causal)  # noqa: E731
        assert torch.autograd.gradcheck(run, tensors)


def rounding(q, k, v, q_weight, k_weight, cos, sin, cu_seqlens=None, scale=None):
    """Plain torch that rounds what torch's flash kernels round, too: probabilities and the gradients of scores."""
    q, k = qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin)
    ends = [0, q.shape[-3]] if cu_seqlens is None else cu_seqlens.tolist()
    parts = []
    for a, b in zip(ends, ends[1:]):
        qh, kh, vh = (t[..., a:b, :, :].transpose(-3, -2) for t in (q, k, v))
        kh, vh = (t.repeat_interleave(qh.shape[-3] // kh.shape[-3], -3) for t in (kh, vh))
        scores = (qh * scale @ kh.mT).float()  # scaled first: 65,504 is the end of float16
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        parts.append((scores.softmax(-1).to(q.dtype) @ vh).transpose(-3, -2))
    return torch.cat(parts, -3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lengths", [None, (0, 100, 1, 29)], ids=["batched", "packed"])
@pytest.mark.parametrize("logits", ["usual", "1e4"])
def test_what_runs_by_default_in_half_precision(dtype, width, lengths, logits):
    """On CUDA, Hopper's kernels in bfloat16 at a width of 128, else torch's; on the CPU, the compiled ones in bfloat16.
    Of large logits the error is that of the rounded heads, which ``ref`` has, too, and it is that of few queries: by how
    much a rounded probability adds to it or not is luck."""
    large = logits == "1e4"
    draws = [inputs_for((1, 130) if lengths is None else (130,), 4, 2, width, dtype, lengths=lengths) for _ in range(3)]
    if large:
        draws = [with_logits_of_1e4(inputs) for inputs in draws]
        assert all(ref(**inputs, scale=0.125, return_lse=True)[1].abs().max() > 1e4 for inputs in draws)
    ours, truth, plain = (partial(function, scale=0.125) for function in (op, ref, ref if large else rounding))
    ratios = pooled_ratios(ours, truth, draws, plain)
    assert max(ratios) <= selfcheck.LIMIT, ratios


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q_weight": torch.ones(7)}, ValueError, r"qk_norm_attention: q_weight is \(7,\); expected shape \(8,\)"),
        ({"v": torch.ones(2, 6, 2, 7)}, ValueError, r"qk_norm_attention: v is \(2, 6, 2, 7\)"),
        ({"cos": torch.ones(5, 4), "sin": torch.ones(5, 4)}, ValueError, "a number of rows that divides N = 12"),
        ({"cu_seqlens": torch.tensor([0, 12])}, ValueError, r"q is \(2, 6, 4, 8\); expected \[N, H, D\]"),
    ],
    ids=["weight", "v", "table", "packed"],
)
def test_bad_input(change, error, words):
    inputs = inputs_for((2, 6), 4, 2, 8, torch.float32)
    with pytest.raises(error, match=words):
        op(**(inputs | {n: t.to(DEVICE) for n, t in change.items()}))


def test_rope_is_a_pair():
    inputs = inputs_for((2, 6), 4, 2, 8, torch.float32)
    del inputs["sin"]
    with pytest.raises(ValueError, match=r"rope is Tensor; expected a pair \(cos, sin\)"):
        qk_norm_attention(rope=inputs.pop("cos"), **inputs)
