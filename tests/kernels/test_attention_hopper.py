"""Attention on Hopper, forward and backward: at most twice the error of eager steps that round as it does."""

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


def gradients(function, q, k, v, dout):
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    return torch.autograd.grad(function(q, k, v), (q, k, v), dout)


def check(q, k, v, dout, causal=True, scale=D**-0.5, ends=None):
    """Outputs, log-sum-exp and gradients; ``ends`` of packed documents, whose errors are taken together."""
    from qwen3_kernels import selfcheck
    from qwen3_kernels.ops.attention import attention_ref

    parts = [(0, q.shape[1])] if ends is None else [(a, b) for a, b in zip(ends, ends[1:]) if b > a]
    packed = (lambda t: t) if ends is None else (lambda t: t[0])
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    out, lse = forward(*map(packed, (q, k, v)), cu_seqlens, causal, scale)
    got = [out, *backward(*map(packed, (dout, q, k, v)), out, lse, cu_seqlens, causal, scale)]
    truth, plain, true_lse = [], [], []
    for a, b in parts:
        one = [t[:, a:b] for t in (q, k, v)]
        wide = [t.double() for t in one]
        o, l = attention_ref(*wide, causal=causal, scale=scale, return_lse=True)
        true_lse.append(l)
        truth.append([o, *gradients(lambda *x: attention_ref(*x, causal=causal, scale=scale), *wide, dout[:, a:b].double())])
        rounded = [eager(*one, causal, scale), *gradients(lambda *x: eager(*x, causal, scale), *one, dout[:, a:b])]
        plain.append(rounded)
    for x, p, t in zip(got, zip(*plain), zip(*truth)):
        ratio = selfcheck.error_ratio(x, packed(torch.cat(p, 1)), packed(torch.cat(t, 1)))
        assert ratio <= selfcheck.LIMIT, ratio
    torch.testing.assert_close(lse.double(), packed(torch.cat(true_lse, 1)), rtol=1e-5, atol=1e-4)


def forward(q, k, v, cu_seqlens=None, causal=True, scale=D**-0.5):
    from qwen3_kernels.cuda import attention

    return attention.forward(q, k, v, cu_seqlens, None, causal, scale)


def backward(dout, q, k, v, out, lse, cu_seqlens=None, causal=True, scale=D**-0.5):
    from qwen3_kernels.cuda import attention

    return attention.backward(dout, q, k, v, out, lse, cu_seqlens, None, causal, scale)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, causal):
    q, k, v = inputs_for(*shape)
    check(q, k, v, torch.randn_like(q), causal)


@pytest.mark.parametrize("scale", [1e-3, 10.0, 100.0], ids=["flat", "peaked", "logits-of-1e4"])
def test_adversarial_logits(scale):
    q, k, v = inputs_for(1, 260, 4, 2, scale)
    check(q, k, v, torch.randn_like(q))


@pytest.mark.parametrize("lengths", [(5,), (0, 1, 0, 130, 0), (1,) * 9, (64, 3, 129, 500)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_documents(lengths, causal):
    q, k, v = inputs_for(1, sum(lengths), 4, 2)
    check(q, k, v, torch.randn_like(q), causal, ends=[sum(lengths[:i]) for i in range(len(lengths) + 1)])


def test_a_query_that_sees_one_key_gives_no_gradient_to_it():
    q, k, v = inputs_for(2, 200, 4, 2)
    out, lse = forward(q, k, v)
    dq, _, _ = backward(torch.randn_like(q), q, k, v, out, lse)
    assert (dq[:, 0] == 0).all() and (dq[:, 1] != 0).any()


def test_more_blocks_of_keys_than_can_run_at_once():
    """Beyond 33K tokens a CTA has one block of keys instead of two."""
    q, k, v = inputs_for(1, 36000, 2, 1)
    out, lse = forward(q, k, v)
    dout = torch.randn_like(q)
    dq, dk, dv = backward(dout, q, k, v, out, lse)
    # The last queries see all keys, the last keys few queries: both can be had without the whole score matrix.
    tail = slice(-256, None)
    qt, dt, kf, vf = q[0, tail].float().transpose(0, 1), dout[0, tail].float().transpose(0, 1), k[0, :, 0].float(), v[0, :, 0].float()
    scores = qt @ kf.T * D**-0.5
    scores[:, :, tail] = scores[:, :, tail].masked_fill(torch.ones(256, 256, device="cuda").triu(1).bool(), -torch.inf)
    p = scores.softmax(-1)
    ds = p * (dt @ vf.T - (dt * (p @ vf)).sum(-1, keepdim=True)) * D**-0.5
    for got, want in ((dq[0, tail].transpose(0, 1), ds @ kf), (dk[0, tail, 0], (ds.mT @ qt)[:, tail].sum(0)), (dv[0, tail, 0], (p.mT @ dt)[:, tail].sum(0))):
        assert (got.float() - want).norm() <= 0.01 * want.norm()


def test_views_of_a_packed_projection_are_read_in_place():
    qkv = torch.randn(2, 200, 8, D, device="cuda").bfloat16()
    q, k, v = qkv.split([4, 2, 2], 2)
    out, lse = forward(q, k, v)
    whole = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(out, forward(*whole)[0])
    dout = torch.randn(2, 4, 200, D, device="cuda").bfloat16().transpose(1, 2)
    for a, b in zip(backward(dout, q, k, v, out, lse), backward(dout.contiguous(), *whole, out, lse)):
        assert torch.equal(a, b)


def test_repeatable():
    q, k, v = inputs_for(2, 1000, 8, 2)
    dout = torch.randn_like(q)
    first, lse = forward(q, k, v)
    grads = backward(dout, q, k, v, first, lse)
    for _ in range(100):
        again, same = forward(q, k, v)
        assert torch.equal(first, again) and torch.equal(lse, same)
        assert all(map(torch.equal, grads, backward(dout, q, k, v, first, lse)))


def test_a_row_does_not_depend_on_the_batch():
    q, k, v = inputs_for(3, 700, 6, 3)
    dout = torch.randn_like(q)
    together = backward(dout, q, k, v, *forward(q, k, v))
    one = [t[1:2] for t in (q, k, v)]
    alone = backward(dout[1:2], *one, *forward(*one))
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))


def test_the_op_uses_it():
    from qwen3_kernels import attention, dispatch

    assert dispatch.explain("attention", "cuda", torch.bfloat16).backend == "cuda"
    q, k, v = inputs_for(2, 200, 4, 2)
    want, lse = forward(q, k, v)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), want)
        start = torch.tensor([10, 20], dtype=torch.int32, device="cuda")
        assert attention(q[:, :1], k, v, q_start=start).isfinite().all()  # a cache: torch's
        assert attention(q[..., :64], k[..., :64], v[..., :64]).isfinite().all()
    dout = torch.randn_like(q)
    assert all(map(torch.equal, gradients(attention, q, k, v, dout), backward(dout, q, k, v, want, lse)))


def test_in_a_cuda_graph_and_compiled():
    from qwen3_kernels import attention

    q, k, v = inputs_for(1, 300, 4, 2)
    with torch.no_grad():
        want = attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = attention(q, k, v)
        graph.replay()
    assert torch.equal(got, want)
    dout = torch.randn_like(q)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, q, k, v, dout), gradients(attention, q, k, v, dout)))
    torch.library.opcheck(torch.ops.qwen3.attention.default, (*(t.requires_grad_() for t in (q, k, v)), None, None, True, 0.1, "cuda"))
