"""Attention on Hopper: csrc/cuda/attention.cu and attention_backward.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import heads
from ..ops._flash import aligned

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)  # wgmma
TILE = 128  # queries of a head that the scratch of the backward is laid out by


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As the op ``qwen3::attention``, which calls this for what it can do: D = 128, as many keys as queries, no ``q_start``,
    scale above 0."""
    q, k, v = map(aligned, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    sequences, cu_seqlens = _sequences(q, cu_seqlens)
    with torch.cuda.device(q.device):
        core.attention(
            sequences, q.shape[-3], q.shape[-2], k.shape[-2], _address(cu_seqlens), causal, scale, heads(q), heads(k), heads(v),
            out.data_ptr(), lse.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    q_start: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _backward(grads, dout, q, k, v, out, lse, cu_seqlens, causal, scale)
    return grads


def backward_through_norm_rope(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    q_start: Tensor | None, causal: bool, scale: float, q_raw: Tensor, k_raw: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``backward`` where q and k are ``qk_norm_rope(q_raw, k_raw, q_weight, k_weight, cos, sin, eps)``: (dq_raw, dk_raw and
    dv by heads in one tensor, dq_weight, dk_weight)."""
    cos, sin = (aligned(t.float().contiguous()) for t in (cos, sin))
    pairs = ((q_raw, q_weight), (k_raw, k_weight))
    parts = [(aligned(raw), weight.float().contiguous(), cos, sin, eps) for raw, weight in pairs]
    counts = [t.shape[-2] for t in (q, k, v)]
    grads = torch.empty((*q.shape[:-2], sum(counts), q.shape[-1]), dtype=q.dtype, device=q.device)
    shares = _backward(grads.split(counts, -2), dout, q, k, v, out, lse, cu_seqlens, causal, scale, parts)
    return grads, *(s.sum(0).to(w.dtype) for s, w in zip(shares, (q_weight, k_weight)))


def _backward(grads, dout, q, k, v, out, lse, cu_seqlens, causal, scale, prologue=()) -> list[Tensor]:
    """Writes dq, dk and dv, the ``grads``; with a prologue returns the shares [blocks, D] of dq_weight and dk_weight."""
    dout, q, k, v = map(aligned, (dout, q, k, v))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    sequences, cu_seqlens = _sequences(q, cu_seqlens)
    tiles = core.attention_backward_tiles(cu_seqlens is not None, sequences, q.shape[-3])
    sums = [empty(tiles * t.shape[-2], TILE * q.shape[-1]) for t in ((q, k) if prologue else (q,))]
    rows, counters = empty(2, tiles * q.shape[-2], TILE), empty(2 * tiles * q.shape[-2] + 1, dtype=torch.int32)
    shares = [empty(core.attention_backward_shares(tiles, t.shape[-2]), q.shape[-1]) for t in ((q, k) if prologue else ())]
    before = [
        (heads(raw), weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0], eps, share.data_ptr())
        for (raw, weight, cos, sin, eps), share in zip(prologue, shares)
    ]
    with torch.cuda.device(q.device):
        core.attention_backward(
            sequences, q.shape[-3], q.shape[-2], k.shape[-2], _address(cu_seqlens), causal, scale,
            heads(q), heads(k), heads(v), heads(dout), out.data_ptr(), lse.data_ptr(), *map(heads, grads),
            rows.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr() if prologue else 0, counters.data_ptr(), before,
            torch.cuda.current_stream().cuda_stream,
        )
    return shares


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor | None]:
    if cu_seqlens is None:
        return q.shape[0], None
    return cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
