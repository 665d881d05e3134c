import contextlib

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES, randn

from qwen3_kernels import attention, dispatch, scaled_dot_product_attention, selfcheck

# Query heads, key heads, queries, keys.
SHAPES = [(2, 2, 30, 30), (4, 2, 30, 30), (4, 1, 9, 40), (2, 2, 40, 9), (4, 2, 1, 20), (4, 2, 20, 1)]


def random(Hq, Hk, Tq, Tk, D=64, dtype=torch.float32):
    return {n: randn(2, H, T, D, dtype=dtype) for n, H, T in (("query", Hq, Tq), ("key", Hk, Tk), ("value", Hk, Tk))}


@pytest.mark.parametrize("backend", [None, "torch"], ids=["default", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(
    DEVICE != "cpu", reason="some of torch's steps are in float32 on CUDA: see test_the_bits_of_attention"))])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_torch(shape, causal, dtype, backend):
    """At most twice the error of torch's own, whose meaning it is that is_causal starts at the first key."""
    inputs = random(*shape, dtype=DTYPES[dtype])
    options = {"is_causal": causal, "scale": 0.2, "enable_gqa": shape[0] != shape[1]}
    with dispatch.use(backend) if backend else contextlib.nullcontext():
        ratios = selfcheck.ratios(scaled_dot_product_attention, F.scaled_dot_product_attention, inputs, **options)
    assert max(ratios) <= selfcheck.LIMIT, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 150, 150), (4, 2, 150, 200)], ids=str)
def test_the_bits_of_attention(shape, dtype):
    """In kernels for whole sequences, too: keys that no query sees are left out."""
    inputs = random(*shape, D=128, dtype=dtype)

    def plain(query, key, value):
        q, k, v = (t[:, :, : query.shape[2]].transpose(1, 2) for t in (query, key, value))
        return attention(q, k, v).transpose(1, 2)

    def ours(**kw):
        return scaled_dot_product_attention(**kw, is_causal=True, enable_gqa=True)

    assert all(map(torch.equal, *(selfcheck.outputs_and_grads(f, inputs) for f in (ours, plain))))


def test_views_and_compile():
    qkv = randn(2, 30, 8, 64, dtype=torch.float32)  # heads first as a view of a packed projection
    views = [t.transpose(1, 2) for t in qkv.split([4, 2, 2], 2)]
    function = lambda *t: scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True)  # noqa: E731
    out = function(*views)
    assert out.shape == views[0].shape
    assert torch.equal(out, function(*(t.contiguous() for t in views)))
    torch._dynamo.reset()
    assert torch.equal(out, torch.compile(function, fullgraph=True, backend="aot_eager")(*views))


GOOD = random(4, 2, 6, 6, D=8) | {"enable_gqa": True}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, ValueError, "attn_mask is given; expected None"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1; expected 0"),
        ({"enable_gqa": False}, ValueError, r"query is \(2, 4, 6, 8\); expected key's 2 heads, or enable_gqa"),
        ({"query": torch.ones(2, 3, 6, 8)}, ValueError, r"query is .*; expected a multiple of key's 2 heads"),
        ({"query": torch.ones(4, 6, 8)}, ValueError, r"query is \(4, 6, 8\); expected \[B, H, T, D\]"),
        ({"key": torch.ones(2, 2, 6, 7)}, ValueError, r"key is \(2, 2, 6, 7\); expected B = 2 and D = 8"),
        ({"value": torch.ones(2, 2, 5, 8)}, ValueError, r"value is \(2, 2, 5, 8\); expected key's shape"),
        ({"key": torch.ones(2, 2, 6, 8, dtype=torch.float16)}, TypeError, "key is torch.float16"),
        ({"query": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, TypeError, "query is torch.int64"),
    ],
    ids=["mask", "dropout", "gqa", "heads", "rank", "width", "value", "dtype", "integer"],
)
def test_bad_input(change, error, words):
    change = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    with pytest.raises(error, match=f"scaled_dot_product_attention: {words}"):
        scaled_dot_product_attention(**(GOOD | change))
