from __future__ import annotations

import torch
from torch import Tensor

from ..ops._check import require
from ._core import core, heads, row_major


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = map(row_major, (q, k, v))
    cu_seqlens, q_start = (None if t is None else t.contiguous() for t in (cu_seqlens, q_start))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    core.attention(
        _shape(q, k, cu_seqlens, q_start, causal, scale), *map(heads, (q, k, v, out)), lse.data_ptr()
    )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    q_start: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = map(row_major, (dout, q, k, v))
    cu_seqlens, q_start = (None if t is None else t.contiguous() for t in (cu_seqlens, q_start))
    grads = tuple(torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    core.attention_backward(
        _shape(q, k, cu_seqlens, q_start, causal, scale), *map(heads, (dout, q, k, v, *grads))
    )
    return grads


def _shape(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float) -> tuple:
    """The compiled AttentionShape. A wrong cu_seqlens would read outside of the tensors, so its values are checked."""
    sequences = q.shape[0]
    if cu_seqlens is not None:
        ends, tokens = cu_seqlens.tolist(), q.shape[0]
        rising = ends[0] == 0 and ends[-1] == tokens and all(a <= b for a, b in zip(ends, ends[1:]))
        require(rising, "attention", "cu_seqlens", ends, f"lengths summed up, rising from 0 to {tokens}")
        sequences = len(ends) - 1
    addresses = (0 if t is None else t.data_ptr() for t in (cu_seqlens, q_start))
    return (sequences, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], *addresses, causal, scale)
