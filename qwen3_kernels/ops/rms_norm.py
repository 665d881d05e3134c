"""RMSNorm, optionally of a residual sum: ``h = x + residual; y = h / sqrt(mean(h^2) + eps) * weight``.

Source: Zhang & Sennrich 2019 (arXiv 1910.07467); Qwen3 technical report, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, exact: bool = False,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch. ``exact`` casts down before the weight multiply, as transformers does; else one cast at the end."""
    h = x if residual is None else x + residual
    h32 = h if h.dtype == torch.float64 else h.float()
    normed = h32 * torch.rsqrt(h32.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normed.to(h.dtype) if exact else (normed * weight.to(h32.dtype)).to(h.dtype)
    return (y, h) if fork or residual is not None else y


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, exact: bool = False,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, with an optional fused residual add.

    Args:
        x: [..., H], float32, bfloat16 or float16.
        weight: [H], float32 or x's dtype.
        eps: added to the mean square before the root.
        residual: [..., H] like x. The sum ``h = x + residual`` is rounded to x's dtype, normalised and returned.
        exact: transformers' rounding order (cast to x's dtype before the weight multiply), in plain torch.
        fork: return the pair (y, h) without a residual too. h is x then, to be used in its place: the backward kernel
            adds the gradients of both, where autograd would add them in a pass of its own (3·N·H·b more bytes).

    Returns:
        y [..., H] in x's dtype; with a residual or ``fork``, the pair (y, h).

    Bytes moved (b per element): forward 2·N·H·b (4· with residual), backward 3·N·H·b (4· with residual or fork).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    floating("rms_norm", x=x)
    H = x.shape[-1] if x.dim() else 0
    require(x.dim() >= 1 and H > 0, "rms_norm", "x", tuple(x.shape), "at least one dimension, the last one not empty")
    require(weight.shape == (H,), "rms_norm", "weight", tuple(weight.shape), f"shape ({H},), the last dimension of x")
    same_device("rms_norm", x, weight=weight, residual=residual)
    if residual is not None:
        require(residual.shape == x.shape, "rms_norm", "residual", tuple(residual.shape), f"x's shape {tuple(x.shape)}")
        same_dtype("rms_norm", x, residual=residual)
    backend = "torch" if exact else dispatch.resolve("rms_norm", x.device.type, x.dtype)
    if backend == "torch" or x.numel() == 0:
        return rms_norm_ref(x, weight, eps, residual, exact=exact, fork=fork)
    if fork and residual is None and x.requires_grad:
        return _Fork.apply(x, weight, eps, backend)
    shape = x.shape
    y, h, _ = _forward(x.reshape(-1, H), weight, None if residual is None else residual.reshape(-1, H), eps, backend)
    if residual is not None:
        return y.view(shape), h.view(shape)
    return (y.view(shape), x) if fork else y.view(shape)


@torch.library.custom_op("qwen3::rms_norm", mutates_args=())
def _forward(
    x_NH: Tensor, weight_H: Tensor, residual_NH: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, H], h [N, H] or empty without a residual, rstd [N] float32)."""
    y, h, rstd = dispatch.backend("rms_norm", backend).forward(x_NH, weight_H, residual_NH, eps)
    return y, x_NH.new_empty(0) if h is None else h, rstd


@_forward.register_fake
def _(x_NH, weight_H, residual_NH, eps, backend):
    h = x_NH.new_empty(0) if residual_NH is None else x_NH.new_empty(x_NH.shape)
    return x_NH.new_empty(x_NH.shape), h, x_NH.new_empty(x_NH.shape[0], dtype=torch.float32)


@torch.library.custom_op("qwen3::rms_norm_backward", mutates_args=())
def _backward(
    dy_NH: Tensor, dh_NH: Tensor | None, h_NH: Tensor, weight_H: Tensor, rstd_N: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(dx [N, H] with dh added, dweight [H])."""
    return dispatch.backend("rms_norm", backend).backward(dy_NH, dh_NH, h_NH, weight_H, rstd_N)


@_backward.register_fake
def _(dy_NH, dh_NH, h_NH, weight_H, rstd_N, backend):
    return h_NH.new_empty(h_NH.shape), torch.empty_like(weight_H)


def _setup_context(ctx, inputs, output):
    x, weight, residual, _, ctx.backend = inputs
    _, h, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dh, _drstd):
    h, weight, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        dh = None
    if dy is None:  # only the residual stream was used downstream
        return dh, None, dh, None, None
    dx, dweight = _backward(dy, dh, h, weight, rstd, ctx.backend)
    return dx, dweight, dx if ctx.has_residual else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Fork(torch.autograd.Function):
    """(y, x). Not in the op above, since an op of torch.library may not return its input."""

    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        y, _, rstd = _forward(x.reshape(-1, x.shape[-1]), weight, None, eps, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return y.view(x.shape), x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dh):
        if dy is None:  # only the stream was used downstream
            return dh, None, None, None
        x, weight, rstd = ctx.saved_tensors
        dy, dh, x_NH = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (dy, dh, x))
        dx, dweight = _backward(dy, dh, x_NH, weight, rstd, ctx.backend)
        return dx.view(x.shape), dweight, None, None
