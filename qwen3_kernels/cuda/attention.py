"""Attention on Hopper: csrc/cuda/attention.cu and attention_backward.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import heads

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)  # wgmma
TILE = 128  # queries of a head that the scratch of the backward is laid out by


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As the op ``qwen3::attention``, which calls this for what it can do: D = 128, as many keys as queries, no ``q_start``,
    scale above 0."""
    q, k, v = map(_aligned, (q, k, v))
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
    dout, q, k, v = map(_aligned, (dout, q, k, v))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    sequences, cu_seqlens = _sequences(q, cu_seqlens)
    tiles = core.attention_backward_tiles(cu_seqlens is not None, sequences, q.shape[-3]) * q.shape[-2]
    sums = torch.empty(tiles, TILE, q.shape[-1], dtype=torch.float32, device=q.device)
    rows = torch.empty(2, tiles, TILE, dtype=torch.float32, device=q.device)
    counters = torch.empty(2 * tiles + 1, dtype=torch.int32, device=q.device)
    with torch.cuda.device(q.device):
        core.attention_backward(
            sequences, q.shape[-3], q.shape[-2], k.shape[-2], _address(cu_seqlens), causal, scale,
            heads(q), heads(k), heads(v), heads(dout), out.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
            rows.data_ptr(), sums.data_ptr(), counters.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )
    return dq, dk, dv


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor | None]:
    if cu_seqlens is None:
        return q.shape[0], None
    return cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(t: Tensor) -> Tensor:
    """The tensor itself when TMA can read it: D contiguous, everything else in steps of 16 bytes."""
    aligned = t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:-1])
    return t if aligned else t.contiguous()
