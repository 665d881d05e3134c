"""The forward on Hopper: at most twice the error of eager steps that round as it does."""

import pytest
import torch

pytestmark = pytest.mark.gpu

D = 128
SHAPES = [(1, 1, 1, 1), (1, 128, 1, 1), (2, 129, 2, 1), (1, 64, 4, 2), (3, 300, 8, 2), (1, 1000, 16, 1), (2, 512, 4, 4)]


def inputs_for(B, T, Hq, Hk, scale=1.0):
    return [torch.randn(B, T, h, D, device="cuda").mul(scale).bfloat16() for h in (Hq, Hk)] + [
        torch.randn(B, T, Hk, D, device="cuda").bfloat16()
    ]


def eager(q, k, v, causal, scale):
    """Fp32 softmax, probabilities rounded to bf16, as a flash kernel does."""
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    kh, vh = (t.repeat_interleave(qh.shape[1] // kh.shape[1], 1) for t in (kh, vh))
    scores = (qh @ kh.mT).float() * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return (scores.softmax(-1).to(q.dtype) @ vh).transpose(1, 2)


def check(got, lse, q, k, v, causal=True, scale=D**-0.5):
    from qwen3_kernels import selfcheck
    from qwen3_kernels.ops.attention import attention_ref

    truth, true_lse = attention_ref(*(t.double() for t in (q, k, v)), causal=causal, scale=scale, return_lse=True)
    ratio = selfcheck.error_ratio(got, eager(q, k, v, causal, scale), truth)
    assert ratio <= selfcheck.LIMIT, ratio
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-4)


def forward(q, k, v, cu_seqlens=None, causal=True, scale=D**-0.5):
    from qwen3_kernels.cuda import attention_inference

    return attention_inference.forward(q, k, v, cu_seqlens, None, causal, scale)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, causal):
    q, k, v = inputs_for(*shape)
    check(*forward(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("scale", [1e-3, 10.0, 100.0], ids=["flat", "peaked", "logits-of-1e4"])
def test_adversarial_logits(scale):
    q, k, v = inputs_for(1, 260, 4, 2, scale)
    check(*forward(q, k, v), q, k, v)


@pytest.mark.parametrize("lengths", [(5,), (0, 1, 0, 130, 0), (1,) * 9, (64, 3, 129, 500)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_documents(lengths, causal):
    q, k, v = (t[0] for t in inputs_for(1, sum(lengths), 4, 2))
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    out, lse = forward(q, k, v, torch.tensor(ends, dtype=torch.int32, device="cuda"), causal)
    for a, b in zip(ends, ends[1:]):
        if b > a:
            check(out[None, a:b], lse[None, a:b], *(t[None, a:b] for t in (q, k, v)), causal)


def test_views_of_a_packed_projection_are_read_in_place():
    qkv = torch.randn(2, 200, 8, D, device="cuda").bfloat16()
    q, k, v = qkv.split([4, 2, 2], 2)
    out, _ = forward(q, k, v)
    assert torch.equal(out, forward(q.contiguous(), k.contiguous(), v.contiguous())[0])


def test_repeatable():
    q, k, v = inputs_for(2, 1000, 8, 2)
    first, lse = forward(q, k, v)
    for _ in range(100):
        again, same = forward(q, k, v)
        assert torch.equal(first, again) and torch.equal(lse, same)


def test_the_op_uses_it_when_no_gradient_is_asked_for():
    from qwen3_kernels import attention, dispatch
    from qwen3_kernels.cuda import attention_inference

    assert dispatch.explain("attention_inference", "cuda", torch.bfloat16).backend == "cuda"
    q, k, v = inputs_for(2, 200, 4, 2)
    want, _ = attention_inference.forward(q, k, v, None, None, True, D**-0.5)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), want)
        start = torch.tensor([10, 20], dtype=torch.int32, device="cuda")
        assert attention(q[:, :1], k, v, q_start=start).isfinite().all()  # a cache: torch's
        assert attention(q[..., :64], k[..., :64], v[..., :64]).isfinite().all()
    q.requires_grad_()
    attention(q, k, v).sum().backward()
    assert q.grad.isfinite().all()


def test_in_a_cuda_graph_and_compiled():
    from qwen3_kernels import attention

    q, k, v = inputs_for(1, 300, 4, 2)
    with torch.no_grad():
        want = attention(q, k, v)
        assert torch.equal(torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = attention(q, k, v)
        graph.replay()
    assert torch.equal(got, want)
