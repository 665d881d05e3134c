"""Drawing tokens from softmax(logits / temperature), each a function of its row's seed alone (Gumbel's trick).

In plain torch that is some twenty passes over [rows, V] in float64; on a GPU one Triton kernel reads the logits once.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from qwen3_model.sampling import gumbel

BLOCK = 2048


def draw(logits_NV: Tensor, seeds_N1: Tensor, temperature: float) -> Tensor:
    """int64 [N], from logits of any floating dtype and int64 seeds [N, 1]."""
    if logits_NV.is_cuda and _is_right(logits_NV.device, logits_NV.dtype):
        return draw_fused(logits_NV, seeds_N1, temperature)
    return draw_ref(logits_NV, seeds_N1, temperature)


def draw_ref(logits_NV: Tensor, seeds_N1: Tensor, temperature: float) -> Tensor:
    tokens = torch.arange(logits_NV.shape[1], device=logits_NV.device)[None]
    return (logits_NV.float() / temperature + gumbel(seeds_N1, tokens)).argmax(-1)


def draw_fused(logits_NV: Tensor, seeds_N1: Tensor, temperature: float) -> Tensor:
    """The same draws but where two scores lie within an ulp of each other."""
    from .draw_kernel import kernel  # Triton is not everywhere

    N, V = logits_NV.shape
    ids = torch.empty(N, dtype=torch.int64, device=logits_NV.device)
    if N:
        logits = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
        kernel[(N,)](logits, logits.stride(0), seeds_N1.contiguous(), ids, V, float(temperature), BLOCK=BLOCK, num_warps=8)
    return ids


@functools.cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernel is held against plain torch before it is used."""
    generator = torch.Generator(device).manual_seed(0)
    logits = (4 * torch.randn(512, 5000, device=device, generator=generator)).to(dtype)
    seeds = torch.randint(1 << 62, (512, 1), device=device, generator=generator)
    try:
        apart = int((draw_fused(logits, seeds, 0.7) != draw_ref(logits, seeds, 0.7)).sum())
    except Exception as e:  # whatever Triton lacks here; sampling goes on without it
        warnings.warn(f"the sampling kernel does not run here, so sampling is slower ({type(e).__name__}: {e})", stacklevel=2)
        return False
    if apart:
        warnings.warn(f"the sampling kernel draws {apart} of 512 tokens otherwise, so it is not used", stacklevel=2)
    return not apart
