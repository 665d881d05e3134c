"""Causal grouped-query attention: batched, packed documents (varlen), and over a KV cache.

Source: Dao et al. 2022 (arXiv 2205.14135) for the blocked, memory-linear form; Ainslie et al. 2023 (arXiv 2305.13245)
for grouped queries.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import dispatch
from . import _flash
from ._check import floating, require, same_device, same_dtype


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    cu_seqlens: Tensor | None = None, q_start: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch with the whole score matrix, softmax in fp32 (fp64 for fp64 inputs). Arguments as ``attention``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        docs = [slice(a, b) for a, b in _bounds(cu_seqlens)]
        parts = [
            attention_ref(q[None, s], k[None, s], v[None, s], causal=causal, scale=scale, return_lse=True) for s in docs
        ]
        if not parts:  # no document, no token
            out, lse = q.clone(), q.new_empty(q.shape[:-1], dtype=torch.float32)
        else:
            out, lse = (torch.cat(p, 1)[0] for p in zip(*parts))
        return (out, lse) if return_lse else out
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    qh, kh, vh = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    scores = qh @ kh.repeat_interleave(group, 1).mT * scale
    if causal:
        scores = scores.masked_fill(~_causal_mask(q, k, q_start), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    probs = (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    out = (probs @ vh.repeat_interleave(group, 1)).transpose(1, 2).to(q.dtype)
    return (out, lse.transpose(1, 2)) if return_lse else out


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:]))


def _causal_mask(q: Tensor, k: Tensor, q_start: Tensor | None) -> Tensor:
    """[B or 1, 1, Tq, Tk] bool, True where query i may see key j."""
    rows = torch.arange(q.shape[1], device=q.device)
    start = rows.new_full((1,), k.shape[1] - q.shape[1]) if q_start is None else q_start
    positions = start.view(-1, 1) + rows
    return (torch.arange(k.shape[1], device=q.device) <= positions.unsqueeze(-1)).unsqueeze(1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    cu_seqlens: Tensor | None = None, q_start: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped queries.

    Args:
        q: [B, Tq, Hq, D], k, v: [B, Tk, Hk, D], Hq a multiple of Hk; or, with ``cu_seqlens``, packed documents
            q [N, Hq, D], k, v [N, Hk, D]. float32, bfloat16 or float16; views with token and head strides are fine.
        causal: query i of row b sits at position q_start[b] + i and sees the keys j up to that position.
        scale: multiplies the scores; default D**-0.5.
        cu_seqlens: [documents + 1] int32, cumulative lengths from 0 to N; empty documents are allowed.
        q_start: [B] int32, position of each row's first query; default Tk - Tq. With a KV cache, pass the whole cache
            as k and v and the number of tokens cached before q: keys beyond the last position are never read.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out, q's shape and dtype; with ``return_lse`` the pair (out, lse float32 [B, Tq, Hq] or [N, Hq]). A query that
        sees no key gives 0 (lse -inf).

    Gradients are the same bits at every run. What the compiled kernels do not take runs on CUDA in torch's flash kernels
    (half precision, D up to 256, no q_start), else in its scaled_dot_product_attention, whose fused kernels have no fixed
    order of sums: gradients, and lse, then take the whole score matrix.

    FLOPs: forward 4·D·Hq per visible (query, key) pair, backward 2.5 times that.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    check("attention", q, k, v, cu_seqlens, q_start)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend, empty = backend_for(q, k, q_start, scale), q.numel() == 0 or k.numel() == 0
    if backend == "torch" and _flash.fits(q, q_start, scale):
        backend = "flash"
    if backend == "torch" or empty:
        if return_lse or empty:
            return attention_ref(
                q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, q_start=q_start, return_lse=return_lse
            )
        return _sdpa(q, k, v, causal, scale, cu_seqlens, q_start)
    out, lse = _forward(q, k, v, cu_seqlens, q_start, causal, scale, backend)
    return (out, lse) if return_lse else out


def check(op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None = None) -> None:
    packed = cu_seqlens is not None
    floating(op, q=q)
    dims = "[N, H, D] with cu_seqlens" if packed else "[B, T, H, D]"
    for name, t in (("q", q), ("k", k), ("v", v)):
        require(t.dim() == (3 if packed else 4), op, name, tuple(t.shape), dims)
    require(k.shape == v.shape, op, "v", tuple(v.shape), f"k's shape {tuple(k.shape)}")
    require(q.shape[-1] == k.shape[-1] and q.shape[-1] > 0, op, "k", tuple(k.shape), f"q's head dimension {q.shape[-1]}")
    require(k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0, op, "q", tuple(q.shape),
            f"a number of heads that is a multiple of k's {k.shape[-2]}")
    same_device(op, q, k=k, v=v, cu_seqlens=cu_seqlens, q_start=q_start)
    same_dtype(op, q, k=k, v=v)
    if packed:
        require(q.shape[0] == k.shape[0], op, "k", tuple(k.shape), f"as many tokens as q, {q.shape[0]}")
        require(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1, op, "cu_seqlens", tuple(cu_seqlens.shape), "[documents + 1]")
        require(q_start is None, op, "q_start", "given", "None together with cu_seqlens")
    else:
        require(q.shape[0] == k.shape[0], op, "k", tuple(k.shape), f"q's batch size {q.shape[0]}")
        require(q_start is None or q_start.shape == (q.shape[0],), op, "q_start",
                None if q_start is None else tuple(q_start.shape), f"shape ({q.shape[0]},)")
    for name, t in (("cu_seqlens", cu_seqlens), ("q_start", q_start)):
        if t is not None and t.dtype != torch.int32:
            raise TypeError(f"{op}: {name} is {t.dtype}; expected torch.int32")


def backend_for(q: Tensor, k: Tensor, q_start: Tensor | None, scale: float) -> str:
    backend = dispatch.resolve("attention", q.device.type, q.dtype)
    # The Hopper kernels take whole sequences, as many keys as queries, and one head width.
    fits = q.shape[-1] == 128 and q.shape[:-2] == k.shape[:-2] and q_start is None and scale > 0
    return backend if fits or backend != "cuda" else "torch"


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cu_seqlens: Tensor | None, q_start: Tensor | None
) -> Tensor:
    """torch's scaled_dot_product_attention."""
    if cu_seqlens is not None:
        # split, not slices: its backward is one cat, where each slice would write a whole zero-filled gradient
        # (113 against 69 ms for 16 documents of 128 tokens, 16+8 heads, on 2 cores).
        lengths = cu_seqlens.diff().tolist()
        docs = zip(*(t.split(lengths) for t in (q, k, v)))
        return torch.cat([_sdpa(*(t[None] for t in doc), causal, scale, None, None)[0] for doc in docs])
    mask = None
    if causal and (q_start is not None or q.shape[1] != k.shape[1]):
        causal, mask = False, _causal_mask(q, k, q_start)
    # On CUDA the fused kernels add to gradients with atomics, and some look for the largest score before a scale that
    # makes it the smallest: plain steps then.
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    plain = q.is_cuda and (needs_grad or scale <= 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)


def _kernels(backend: str) -> ModuleType:
    return _flash if backend == "flash" else dispatch.backend("attention", backend)


@torch.library.custom_op("qwen3::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse float32, q's shape without D)."""
    return _kernels(backend).forward(q, k, v, cu_seqlens, q_start, causal, scale)


@_forward.register_fake
def _(q, k, v, cu_seqlens, q_start, causal, scale, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("qwen3::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    q_start: Tensor | None, causal: bool, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(backend).backward(dout, q, k, v, out, lse, cu_seqlens, q_start, causal, scale)


@_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, q_start, causal, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, q_start, ctx.causal, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, q_start)
    ctx.mark_non_differentiable(lse)


def _autograd(ctx, dout, _dlse):
    grads = _backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.backend)
    return *grads, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
