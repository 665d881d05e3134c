"""torch's scaled_dot_product_attention, as far as `attention` does it, on the same kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import floating, require, same_device, same_dtype
from .attention import attention


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """In place of ``torch.nn.functional.scaled_dot_product_attention``: ``attention`` with heads before tokens.

    Args:
        query: [B, Hq, Tq, D], key, value: [B, Hk, Tk, D], Hq equal to Hk, or a multiple of it with ``enable_gqa``.
            float32, bfloat16 or float16; views, of a packed projection too, are not copied.
        attn_mask, dropout_p: None and 0: there are no kernels for others.
        is_causal: query i sees keys 0 to i. Where Tq and Tk differ this is torch's meaning, not ``attention``'s, whose
            last query sees the last key.
        scale: multiplies the scores; default D**-0.5.

    Returns: [B, Hq, Tq, D], in query's dtype.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names them.
    """
    op = "scaled_dot_product_attention"
    require(attn_mask is None, op, "attn_mask", "given", "None; for documents or a cache see qwen3_kernels.attention")
    require(dropout_p == 0, op, "dropout_p", dropout_p, "0")
    floating(op, query=query)
    same_device(op, query, key=key, value=value)
    same_dtype(op, query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        require(t.dim() == 4, op, name, tuple(t.shape), "[B, H, T, D]")
    (B, Hq, Tq, D), Hk = query.shape, key.shape[1]
    require(key.shape[0] == B and key.shape[3] == D, op, "key", tuple(key.shape), f"B = {B} and D = {D}, as query has")
    require(value.shape == key.shape, op, "value", tuple(value.shape), f"key's shape {tuple(key.shape)}")
    wanted = f"a multiple of key's {Hk} heads" if enable_gqa else f"key's {Hk} heads, or enable_gqa"
    require(Hk > 0 and (Hq % Hk == 0 if enable_gqa else Hq == Hk), op, "query", tuple(query.shape), wanted)
    start = None
    if is_causal and key.shape[2] > Tq:
        key, value = key[:, :, :Tq], value[:, :, :Tq]  # no query sees the rest
    elif is_causal and key.shape[2] < Tq:
        start = torch.zeros(B, dtype=torch.int32, device=query.device)
    out = attention(*(t.transpose(1, 2) for t in (query, key, value)), causal=is_causal, scale=scale, q_start=start)
    return out.transpose(1, 2)
