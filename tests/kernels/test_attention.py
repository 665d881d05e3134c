import pytest
import torch
from common import DEVICE, DTYPES, backends, check_error_rule, check_registration, check_repeatable, parametrize_dtype, randn

from qwen3_kernels import attention, dispatch, selfcheck
from qwen3_kernels.ops.attention import attention_ref

parametrize_backend = pytest.mark.parametrize("backend", backends("attention"))


def batched(B, Tq, Tk, Hq, Hk, D, dtype=torch.float32, scale=1.0):
    return {"q": randn(B, Tq, Hq, D, dtype=dtype, scale=scale), "k": randn(B, Tk, Hk, D, dtype=dtype, scale=scale),
            "v": randn(B, Tk, Hk, D, dtype=dtype)}


def packed(lengths, Hq, Hk, D, dtype=torch.float32, scale=1.0):
    N = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    tensors = {n: t[0] for n, t in batched(1, N, N, Hq, Hk, D, dtype, scale).items()}
    return tensors | {"cu_seqlens": cu_seqlens}


# (B, Tq, Tk, Hq, Hk, D): one token; odd everything; blocks that do not divide; equal heads; a group of 16; long keys.
SHAPES = [(1, 1, 1, 1, 1, 2), (2, 7, 7, 3, 1, 5), (1, 67, 67, 4, 2, 64), (2, 33, 33, 2, 2, 17), (1, 9, 9, 16, 1, 128),
          (2, 5, 150, 4, 2, 40), (1, 130, 130, 2, 1, 128)]


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, causal, shape):
    check_error_rule(attention, attention_ref, backend, batched(*shape, dtype), causal=causal)


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("lengths", [(5,), (0, 1, 0, 1, 70, 0), (1,) * 9, (64, 3, 129)], ids=str)
def test_packed_documents(backend, dtype, lengths):
    check_error_rule(attention, attention_ref, backend, packed(lengths, 4, 2, 32, dtype))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-3, 30.0, 100.0], ids=["flat", "peaked", "logits-of-1e4"])
def test_adversarial_logits(backend, dtype, scale):
    check_error_rule(attention, attention_ref, backend, batched(1, 40, 40, 4, 2, 64, dtype, scale), scale=0.125)


@parametrize_backend
def test_negative_scale_and_lse(backend):
    inputs = batched(2, 20, 20, 4, 2, 16)
    with dispatch.use(backend):
        out, lse = attention(**inputs, scale=-0.7, return_lse=True)
    want, want_lse = attention_ref(**{n: t.double() for n, t in inputs.items()}, scale=-0.7, return_lse=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@parametrize_backend
@parametrize_dtype
def test_queries_that_see_nothing(backend, dtype):
    """More queries than keys: the first ones see no key and give 0, with zero gradients."""
    inputs = batched(1, 90, 20, 4, 2, 32, dtype)
    with dispatch.use(backend):
        out, lse = attention(**inputs, return_lse=True)
    assert (out[:, :70] == 0).all() and (lse[:, :70] == -torch.inf).all() and lse[:, 70:].isfinite().all()
    check_error_rule(attention, attention_ref, backend, inputs)


@parametrize_backend
@parametrize_dtype
def test_cached_rows_start_where_they_are(backend, dtype):
    inputs = batched(3, 4, 50, 4, 2, 32, dtype) | {"q_start": torch.tensor([0, 46, 13], dtype=torch.int32, device=DEVICE)}
    check_error_rule(attention, attention_ref, backend, inputs)


@parametrize_backend
def test_keys_beyond_the_last_position_are_never_read(backend):
    inputs = batched(2, 2, 50, 4, 2, 32)
    start = torch.tensor([3, 11], dtype=torch.int32, device=DEVICE)
    with dispatch.use(backend):
        clean = attention(**inputs, q_start=start)
        for row, first in ((0, 5), (1, 13)):
            inputs["k"][row, first:] = inputs["v"][row, first:] = torch.nan
        assert torch.equal(attention(**inputs, q_start=start), clean)


@parametrize_backend
@parametrize_dtype
def test_decoding_gives_the_bits_of_the_prefill(backend, dtype):
    """A query's result depends on its keys only: not on the batch, the block of queries or the length of the cache."""
    T = 75
    q, k, v = batched(2, T, T, 6, 2, 24, dtype).values()
    with dispatch.use(backend):
        whole = attention(q, k, v)
        for t in (0, 1, 31, 63, 64, 74):
            start = torch.full((2,), t, dtype=torch.int32)
            assert torch.equal(attention(q[:, t : t + 1], k, v, q_start=start), whole[:, t : t + 1])
        assert torch.equal(attention(q[1:], k[1:], v[1:]), whole[1:])
        documents = torch.tensor([0, T, 2 * T], dtype=torch.int32)
        assert torch.equal(attention(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens=documents), whole.flatten(0, 1))


@parametrize_backend
@parametrize_dtype
def test_views_of_a_packed_projection(backend, dtype):
    Hq, Hk, D = 4, 2, 16
    qkv = randn(2, 30, (Hq + 2 * Hk) * D, dtype=dtype)
    q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split([Hq * D, Hk * D, Hk * D], -1))
    assert not q.is_contiguous()
    with dispatch.use(backend):
        assert torch.equal(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))
        heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        assert torch.equal(attention(*heads_first), attention(q, k, v))
        columns_apart = [t.mT.contiguous().mT for t in (q, k, v)]
        assert torch.equal(attention(*columns_apart), attention(q, k, v))


@parametrize_backend
def test_nan_is_not_hidden(backend):
    inputs = batched(1, 10, 10, 2, 1, 16)
    inputs["k"][0, 4, 0, 3] = torch.nan
    with dispatch.use(backend):
        out = attention(**inputs)
    assert out[:, :4].isfinite().all() and out[:, 4:].isnan().all()


@parametrize_backend
@pytest.mark.parametrize("form", ["batched", "packed", "cached"])
def test_registration_and_compile(backend, form):
    inputs = packed((3, 0, 9), 4, 2, 16) if form == "packed" else batched(2, 3, 12, 4, 2, 16)
    if form == "cached":
        inputs["q_start"] = torch.tensor([2, 9], dtype=torch.int32, device=DEVICE)
    q, k, v = (inputs[n].clone().requires_grad_() for n in "qkv")
    args = (q, k, v, inputs.get("cu_seqlens"), inputs.get("q_start"), True, 0.25, backend)
    check_registration(attention, backend, torch.ops.qwen3.attention.default, args, inputs)


@parametrize_backend
@parametrize_dtype
def test_repeatable(backend, dtype):
    check_repeatable(attention, backend, packed((70, 1, 33), 6, 2, 32, dtype))


@parametrize_backend
def test_does_not_touch_its_inputs(backend):
    inputs = batched(1, 20, 20, 4, 2, 16)
    before = {n: t.clone() for n, t in inputs.items()}
    with dispatch.use(backend):
        selfcheck.outputs_and_grads(attention, inputs)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's own kernels on CUDA do not meet the rule of fp32 softmax")
@parametrize_dtype
@pytest.mark.parametrize("form", ["batched", "longer-keys", "packed", "cached"])
def test_the_fallback_on_torch(dtype, form):
    inputs = {
        "batched": lambda: batched(2, 20, 20, 4, 2, 32, dtype), "longer-keys": lambda: batched(2, 5, 20, 4, 2, 32, dtype),
        "packed": lambda: packed((3, 0, 20), 4, 2, 32, dtype),
        "cached": lambda: batched(2, 2, 20, 4, 2, 32, dtype) | {"q_start": torch.tensor([0, 13], dtype=torch.int32)},
    }[form]()
    with dispatch.use("torch"):
        got = selfcheck.outputs_and_grads(attention, inputs)
    want = selfcheck.outputs_and_grads(attention_ref, {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=(1e-5 if dtype == torch.float32 else 0.03) * b.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["batched", "packed"])
def test_on_cuda(dtype, form):
    """At most twice the error of the same arithmetic in eager steps that round the probabilities, as flash kernels do."""
    inputs = packed((100, 0, 1, 333), 8, 2, 128, dtype) if form == "packed" else batched(2, 200, 200, 8, 2, 128, dtype)

    def eager(q, k, v, cu_seqlens=None):
        ends = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
        parts = []
        for a, b in zip(ends, ends[1:]):
            if cu_seqlens is None:
                qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
            else:
                qh, kh, vh = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            kh, vh = (t.repeat_interleave(qh.shape[1] // kh.shape[1], 1) for t in (kh, vh))
            T = qh.shape[2]
            scores = (qh @ kh.mT).float() * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=q.device).tril(), -torch.inf)
            out = (scores.softmax(-1).to(q.dtype) @ vh).transpose(1, 2)
            parts.append(out if cu_seqlens is None else out[0])
        return parts[0] if cu_seqlens is None else torch.cat(parts)

    wide = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    truth = selfcheck.outputs_and_grads(attention_ref, wide)
    plain, got = (selfcheck.outputs_and_grads(f, inputs) for f in (eager, attention))
    assert max(map(selfcheck.error_ratio, got, plain, truth)) <= selfcheck.LIMIT


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("form", ["batched", "longer-keys", "packed", "cached"])
def test_gradcheck(form, causal):
    """Of the op and of its reference, which is the truth of all tests here."""
    options, lead, keys = {"causal": causal}, (2, 3), (2, 3)
    if form == "packed":
        lead = keys = (5,)
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    elif form != "batched":
        keys = (2, 5)
        if form == "cached":
            options["q_start"] = torch.tensor([0, 2], dtype=torch.int32)
    shapes = (*lead, 4, 4), (*keys, 2, 4), (*keys, 2, 4)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    for function in (attention, attention_ref):
        assert torch.autograd.gradcheck(lambda q, k, v: function(q, k, v, **options), (q, k, v))


GOOD = {n: t for n, t in batched(2, 6, 6, 4, 2, 8).items()}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.ones(6, 4, 8)}, ValueError, r"q is \(6, 4, 8\); expected \[B, T, H, D\]"),
        ({"v": torch.ones(2, 6, 2, 7)}, ValueError, r"v is \(2, 6, 2, 7\); expected k's shape"),
        ({"q": torch.ones(2, 6, 3, 8)}, ValueError, "multiple of k's 2"),
        ({"q": torch.ones(2, 6, 4, 6)}, ValueError, "q's head dimension 6"),
        ({"q": torch.ones(3, 6, 4, 8)}, ValueError, "q's batch size 3"),
        ({"k": torch.ones(2, 6, 2, 8, dtype=torch.bfloat16)}, TypeError, "k is torch.bfloat16"),
        ({"q_start": torch.zeros(2)}, TypeError, "q_start is torch.float32; expected torch.int32"),
        ({"q_start": torch.zeros(3, dtype=torch.int32)}, ValueError, r"q_start is \(3,\)"),
        ({"q": torch.ones(2, 6, 4, 8, dtype=torch.int32)}, TypeError, "q is torch.int32"),
    ],
    ids=["rank", "v", "heads", "width", "batch", "dtype", "start-dtype", "start-shape", "integer"],
)
def test_bad_input(change, error, words):
    change = {n: t.to(DEVICE) for n, t in change.items()}
    with pytest.raises(error, match=words):
        attention(**(GOOD | change))


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA a check of the values would need a host sync")
@pytest.mark.parametrize("ends", [[0, 5], [1, 6], [0, 4, 3, 6], [0, 9]], ids=str)
def test_cu_seqlens_must_rise_to_the_number_of_tokens(ends):
    q, k, v = (t[0] for t in GOOD.values())
    with dispatch.use("cpu"), pytest.raises(ValueError, match=r"cu_seqlens is \[.*rising from 0 to 6"):
        attention(q, k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_empty_tensors():
    q, kv = torch.empty(0, 4, 8, device=DEVICE), torch.empty(0, 2, 8, device=DEVICE)
    ends = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert attention(q, kv, kv, cu_seqlens=ends).shape == (0, 4, 8)
    q, kv = torch.ones(2, 3, 4, 8, device=DEVICE), torch.empty(2, 0, 2, 8, device=DEVICE)
    assert (attention(q, kv, kv) == 0).all()
