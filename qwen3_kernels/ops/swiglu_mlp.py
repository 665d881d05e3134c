"""Qwen3's dense feed-forward block, ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202, section 2), as one op.

On Hopper SwiGLU and its backward are epilogues of the matrix products before them, and nothing of the block is kept for
the backward but its input and the gate and up projections. Elsewhere it is the products and the op ``swiglu``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from ._check import floating, require, same_device, same_dtype
from .linears import linears, plain
from .swiglu import swiglu, swiglu_ref

MIN_ROWS = 1024  # tokens; with fewer, tiles of 128 rows leave multiprocessors idle


def swiglu_mlp_ref(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Plain torch."""
    return F.linear(swiglu_ref(F.linear(x, gate), F.linear(x, up)), down)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``silu(x gate^T) * (x up^T)`` times ``down^T``.

    Args:
        x: [..., D], float32, bfloat16 or float16. gate, up: [I, D], down: [D, I], x's dtype.

    Returns: [..., D]. Gradients go to all four, the same bits at every run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    op = "swiglu_mlp"
    floating(op, x=x)
    require(x.dim() >= 1, op, "x", tuple(x.shape), "[..., D]")
    D, I = x.shape[-1], gate.shape[0]
    for name, w, shape in (("gate", gate, (I, D)), ("up", up, (I, D)), ("down", down, (D, I))):
        require(tuple(w.shape) == shape, op, name, tuple(w.shape), f"{shape}, as x and gate have it")
    same_device(op, x, gate=gate, up=up, down=down)
    same_dtype(op, x, gate=gate, up=up, down=down)
    if has_kernel(x, gate):
        return _Fused.apply(x, gate, up, down)
    return F.linear(swiglu(*linears(x, gate, up)), down)


def has_kernel(x: Tensor, gate: Tensor) -> bool:
    """Whether these run as one, without keeping SwiGLU's output."""
    D, I = x.shape[-1], gate.shape[0]
    return (
        D > 0 and I > 0 and D % 8 == 0 and I % 8 == 0 and x.numel() >= MIN_ROWS * D
        and not torch.is_autocast_enabled(x.device.type) and x.dtype == gate.dtype and dispatch.resolve("swiglu_mlp", x.device.type, x.dtype) == "cuda"
    )


def fuses(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    """Whether three layers are plain ones, whose weights the op takes, and the kernel runs."""
    return all(plain(layer) for layer in (gate, up, down)) and has_kernel(x, gate.weight)


@torch.library.custom_op("qwen3::swiglu_mlp_up", mutates_args=())
def _up(x_ND: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(x gate^T beside x up^T [N, 2I], SwiGLU of it [N, I])"""
    return dispatch.backend("swiglu_mlp", "cuda").up(x_ND, gate, up)


@_up.register_fake
def _(x_ND, gate, up):
    N, I = x_ND.shape[0], gate.shape[0]
    return x_ND.new_empty(N, 2 * I), x_ND.new_empty(N, I)


@torch.library.custom_op("qwen3::swiglu_mlp_down_backward", mutates_args=())
def _down_backward(dy_ND: Tensor, down: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of h [N, 2I], SwiGLU of h [N, I])"""
    return dispatch.backend("swiglu_mlp", "cuda").down_backward(dy_ND, down, h)


@_down_backward.register_fake
def _(dy_ND, down, h):
    return h.new_empty(h.shape), h.new_empty(h.shape[0], h.shape[1] // 2)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down):
        h, a = _up(x.reshape(-1, x.shape[-1]), gate, up)
        ctx.save_for_backward(x, gate, up, down, h)
        return (a @ down.mT).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, down, h = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        wants_x, *wants_in, wants_down = ctx.needs_input_grad
        dh, a = _down_backward(dy, down, h)
        ddown = dy.mT @ a if wants_down else None
        del a
        dx = (dh @ torch.cat((gate, up))).view(x.shape) if wants_x else None
        dgate, dup = (dh.mT @ rows).chunk(2) if any(wants_in) else (None, None)
        return dx, dgate if wants_in[0] else None, dup if wants_in[1] else None, ddown
