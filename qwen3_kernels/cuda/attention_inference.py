"""The forward of attention on Hopper (csrc/cuda/attention.cu). It has no backward yet, so it runs where none is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import heads

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)  # wgmma


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As the op ``qwen3::attention``, which calls this for what it can do: D = 128, as many keys as queries, no ``q_start``,
    scale above 0."""
    q, k, v = map(_aligned, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.cuda.device(q.device):
        core.attention(
            sequences, q.shape[-3], q.shape[-2], k.shape[-2], 0 if cu_seqlens is None else cu_seqlens.data_ptr(), causal, scale,
            heads(q), heads(k), heads(v), out.data_ptr(), lse.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )
    return out, lse


def _aligned(t: Tensor) -> Tensor:
    """The tensor itself when TMA can read it: D contiguous, everything else in steps of 16 bytes."""
    fits = t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:-1])
    return t if fits else t.contiguous()
