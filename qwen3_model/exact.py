"""Attention through the very call that transformers makes on its default (SDPA) path: for bitwise comparisons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, q_start: Tensor | None = None) -> Tensor:
    """Arguments and result as `qwen3_kernels.attention`, always causal. Syncs with the host."""
    if not q.numel():
        return q
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        docs = zip(*(t.split(lengths) for t in (q, k, v)))
        return torch.cat([attention(*(t.unsqueeze(0) for t in doc))[0] for doc in docs])
    T, scale, groups = q.shape[1], q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    mask = None
    if q_start is not None:  # k and v are a whole cache
        starts = q_start.tolist()
        k, v = (t[:, : max(starts) + T] for t in (k, v))
        if min(starts) != max(starts) or (T > 1 and max(starts) > 0):
            last = q_start.view(-1, 1, 1, 1) + torch.arange(T, device=q.device).view(-1, 1)
            mask = torch.arange(k.shape[1], device=q.device) <= last
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = groups > 1 and mask is None
    if groups > 1 and not grouped:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    options = {"enable_gqa": True} if grouped else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=scale, **options)
    return out.transpose(1, 2).contiguous()
