"""Qwen3's attention from the raw projections: norm of each head of q and k, RoPE, softmax attention with grouped queries.

Sources: those of `qk_norm_rope` and `attention`, which it is made of. Where the compiled kernels for Hopper run, the backward
of norm and RoPE is part of the last pass over attention's dq and dk, which are never written as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import require
from .attention import attention, attention_ref, backend_for
from .attention import check as check_attention
from .qk_norm_rope import check as check_norm_rope
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref


def qk_norm_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], *,
    cu_seqlens: Tensor | None = None, causal: bool = True, eps: float = 1e-6, scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch."""
    q, k = qk_norm_rope_ref(q, k, q_weight, k_weight, *rope, eps)
    return attention_ref(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)


def qk_norm_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], *,
    cu_seqlens: Tensor | None = None, causal: bool = True, eps: float = 1e-6, scale: float | None = None,
    recompute: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention(*qk_norm_rope(q, k, q_weight, k_weight, *rope, eps), v)``.

    Args:
        q: [B, T, Hq, D], k, v: [B, T, Hk, D], Hq a multiple of Hk, D even; or, with ``cu_seqlens``, packed documents
            [N, H, D]: the projections as they are, views of one packed projection too. float32, bfloat16 or float16.
        q_weight, k_weight: [D], of the norms, float32 or q's dtype.
        rope: (cos, sin), [R, D/2] each, any attention factor (YaRN) multiplied in; R divides the number of tokens, and token
            n uses row n % R.
        cu_seqlens, causal, scale, return_lse: as in ``attention``. eps: as in ``qk_norm_rope``.
        recompute: keep q and k for the backward, but not what norm and RoPE made of them: (Hq+Hk)·D elements a token less,
            and one more pass over q and k. Of no effect where torch's attention runs.

    Returns: as ``attention``. Gradients go to q, k, v and both weights, the same bits at every run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    op = "qk_norm_attention"
    require(isinstance(rope, (tuple, list)) and len(rope) == 2, op, "rope", type(rope).__name__, "a pair (cos, sin)")
    cos, sin = rope
    check_attention(op, q, k, v, cu_seqlens)
    check_norm_rope(op, q, k, q_weight, k_weight, cos, sin)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backends = _backends(q, k, scale)
    if "torch" in backends or q.numel() == 0 or k.numel() == 0:
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
        return attention(q, k, v, cu_seqlens=cu_seqlens, causal=causal, scale=scale, return_lse=return_lse)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, q_weight, k_weight)) and not recompute
    out, lse, _, _ = _forward(
        q, k, v, q_weight, k_weight, cos.float(), sin.float(), cu_seqlens, causal, eps, scale, keep, *backends
    )
    return (out, lse) if return_lse else out


def has_kernels(q: Tensor, k: Tensor, scale: float = 1.0) -> bool:
    """Whether ``recompute`` has an effect on such tensors."""
    return "torch" not in _backends(q, k, scale)


def _backends(q: Tensor, k: Tensor, scale: float) -> tuple[str, str]:
    return dispatch.resolve("qk_norm_rope", q.device.type, q.dtype), backend_for(q, k, None, scale)


def _rotated(q: Tensor, k: Tensor, *args) -> tuple[Tensor, Tensor]:
    """(q', k') by a backend of qk_norm_rope, which sees tokens in one dimension. args: weights, cos, sin, eps, backend"""
    *args, backend = args
    rows = dispatch.backend("qk_norm_rope", backend).forward(*(t.reshape(-1, *t.shape[-2:]) for t in (q, k)), *args)
    return tuple(t.view(like.shape) for t, like in zip(rows, (q, k)))


@torch.library.custom_op("qwen3::qk_norm_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos_RC: Tensor, sin_RC: Tensor,
    cu_seqlens: Tensor | None, causal: bool, eps: float, scale: float, keep: bool, rope_backend: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, q' and k' after norm and RoPE, or [0] each unless ``keep``)"""
    rotated = _rotated(q, k, q_weight, k_weight, cos_RC, sin_RC, eps, rope_backend)
    out, lse = dispatch.backend("attention", backend).forward(*rotated, v, cu_seqlens, None, causal, scale)
    return out, lse, *(t if keep else t.new_empty(0) for t in rotated)


@_forward.register_fake
def _(q, k, v, q_weight, k_weight, cos_RC, sin_RC, cu_seqlens, causal, eps, scale, keep, rope_backend, backend):
    kept = (t.new_empty(t.shape if keep else 0) for t in (q, k))
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32), *kept


@torch.library.custom_op("qwen3::qk_norm_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos_RC: Tensor, sin_RC: Tensor,
    cu_seqlens: Tensor | None, out: Tensor, lse: Tensor, q_rotated: Tensor, k_rotated: Tensor, causal: bool, eps: float,
    scale: float, rope_backend: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk and dv by heads in one tensor, which `linears` takes as one, dq_weight, dk_weight)"""
    if q_rotated.numel() == 0:
        q_rotated, k_rotated = _rotated(q, k, q_weight, k_weight, cos_RC, sin_RC, eps, rope_backend)
    kernels, prologue = dispatch.backend("attention", backend), (q, k, q_weight, k_weight, cos_RC, sin_RC, eps)
    args = (dout, q_rotated, k_rotated, v, out, lse, cu_seqlens, None, causal, scale)
    if hasattr(kernels, "backward_through_norm_rope"):
        return kernels.backward_through_norm_rope(*args, *prologue)
    dq, dk, dv = kernels.backward(*args)
    flat = (t.reshape(-1, *t.shape[-2:]) for t in (dq, dk, q, k))
    dq, dk, dq_weight, dk_weight = dispatch.backend("qk_norm_rope", rope_backend).backward(*flat, *prologue[2:])
    return torch.cat((dq.view(q.shape), dk.view(k.shape), dv), -2), dq_weight, dk_weight


@_backward.register_fake
def _(dout, q, k, v, q_weight, k_weight, cos_RC, sin_RC, cu_seqlens, out, lse, q_rotated, k_rotated, causal, eps, scale,
      rope_backend, backend):
    heads = sum(t.shape[-2] for t in (q, k, v))
    return q.new_empty(*q.shape[:-2], heads, q.shape[-1]), *(w.new_empty(w.shape) for w in (q_weight, k_weight))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.eps, ctx.scale, _, ctx.rope_backend, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, *_):
    if dout is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    grads, *dweights = _backward(dout, *saved, ctx.causal, ctx.eps, ctx.scale, ctx.rope_backend, ctx.backend)
    return *grads.split([t.shape[-2] for t in saved[:3]], -2), *dweights, *[None] * 9


_forward.register_autograd(_autograd, setup_context=_setup_context)
