"""Per-head RMSNorm of q and k, then rotary position embedding: the prologue of Qwen3's attention, in one pass.

Sources: Qwen3 technical report, section 2 (QK-Norm); Su et al. 2021 (arXiv 2104.09864) for RoPE, in the half-rotate
layout ``rotate(x) = cat(-x[D/2:], x[:D/2])``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype
from .rms_norm import rms_norm_ref


def qk_norm_rope_ref(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain torch. ``exact`` rounds after the norm and rotates in the activation dtype, as transformers does."""
    return tuple(_norm_rope_ref(x, w, cos, sin, eps, exact) for x, w in ((q, q_weight), (k, k_weight)))


def _norm_rope_ref(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, exact: bool) -> Tensor:
    half = x.shape[-1] // 2
    wide = x if exact or x.dtype == torch.float64 else x.float()
    normed = rms_norm_ref(wide, weight if exact else weight.to(wide.dtype), eps, exact=exact)
    rows = normed.reshape(-1, cos.shape[0], *normed.shape[-2:])
    cos, sin = (torch.cat((t, t), -1).to(wide.dtype).unsqueeze(1) for t in (cos, sin))
    rotated = torch.cat((-rows[..., half:], rows[..., :half]), -1)
    return (rows * cos + rotated * sin).view(x.shape).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head of q and k, then half-rotate RoPE.

    Args:
        q: [..., Hq, D], k: [..., Hk, D]: float32, bfloat16 or float16, D even. Views of a packed projection are read
            without a copy. The leading dimensions flatten to N tokens.
        q_weight, k_weight: [D], float32 or q's dtype.
        cos, sin: [R, D/2] float32, any attention factor multiplied in; N must be a multiple of R and token n uses row
            n % R. So R = T serves a batch with equal positions, R = N packed documents.
        eps: added to the mean square before the root.
        exact: transformers' rounding order, in plain torch.

    Returns:
        (q', k'), contiguous, shapes and dtypes as given. cos and sin get no gradient.

    Bytes moved (b per element): forward 2·N·(Hq+Hk)·D·b, backward 3·N·(Hq+Hk)·D·b; cos and sin add 4·N·D to each.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    check("qk_norm_rope", q, k, q_weight, k_weight, cos, sin)
    if q.numel() == 0 or k.numel() == 0:
        return torch.empty_like(q), torch.empty_like(k)
    N, D = q.numel() // (q.shape[-2] * q.shape[-1]), q.shape[-1]
    backend = "torch" if exact else dispatch.resolve("qk_norm_rope", q.device.type, q.dtype)
    if backend == "torch":
        return qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, eps, exact=exact)
    q_out, k_out = _forward(
        q.reshape(N, -1, D), k.reshape(N, -1, D), q_weight, k_weight, cos.float(), sin.float(), eps, backend
    )
    return q_out.view(q.shape), k_out.view(k.shape)


def check(op: str, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    floating(op, q=q)
    require(q.dim() >= 3, op, "q", tuple(q.shape), "[..., Hq, D] with at least one leading dimension")
    D = q.shape[-1]
    require(D > 0 and D % 2 == 0, op, "q", tuple(q.shape), "an even head dimension, D > 0")
    require(k.dim() == q.dim() and k.shape[:-2] == q.shape[:-2] and k.shape[-1] == D, op, "k", tuple(k.shape),
            f"[..., Hk, {D}] with q's leading dimensions {tuple(q.shape[:-2])}")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        require(w.shape == (D,), op, name, tuple(w.shape), f"shape ({D},)")
    require(cos.dim() == 2 and cos.shape[1] == D // 2, op, "cos", tuple(cos.shape), f"[R, {D // 2}]")
    require(sin.shape == cos.shape, op, "sin", tuple(sin.shape), f"cos's shape {tuple(cos.shape)}")
    same_device(op, q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    same_dtype(op, q, k=k)
    if q.numel() and k.numel():
        N = q.numel() // (q.shape[-2] * D)
        require(cos.shape[0] > 0 and N % cos.shape[0] == 0, op, "cos", tuple(cos.shape), f"a number of rows that divides N = {N}")


@torch.library.custom_op("qwen3::qk_norm_rope", mutates_args=())
def _forward(
    q_NHD: Tensor, k_NHD: Tensor, q_weight: Tensor, k_weight: Tensor, cos_RC: Tensor, sin_RC: Tensor, eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.backend("qk_norm_rope", backend).forward(q_NHD, k_NHD, q_weight, k_weight, cos_RC, sin_RC, eps)


@_forward.register_fake
def _(q_NHD, k_NHD, q_weight, k_weight, cos_RC, sin_RC, eps, backend):
    return q_NHD.new_empty(q_NHD.shape), k_NHD.new_empty(k_NHD.shape)


@torch.library.custom_op("qwen3::qk_norm_rope_backward", mutates_args=())
def _backward(
    dq_NHD: Tensor, dk_NHD: Tensor, q_NHD: Tensor, k_NHD: Tensor, q_weight: Tensor, k_weight: Tensor, cos_RC: Tensor,
    sin_RC: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dq_weight, dk_weight); dq_NHD and dk_NHD are the gradients of the outputs."""
    return dispatch.backend("qk_norm_rope", backend).backward(
        dq_NHD, dk_NHD, q_NHD, k_NHD, q_weight, k_weight, cos_RC, sin_RC, eps
    )


@_backward.register_fake
def _(dq_NHD, dk_NHD, q_NHD, k_NHD, q_weight, k_weight, cos_RC, sin_RC, eps, backend):
    return (q_NHD.new_empty(q_NHD.shape), k_NHD.new_empty(k_NHD.shape),
            torch.empty_like(q_weight), torch.empty_like(k_weight))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dq_out, dk_out):
    return *_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
