"""SwiGLU activation ``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype


def swiglu_ref(gate: Tensor, up: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """Plain torch. ``exact`` rounds silu(gate) to the input dtype before the product, as transformers does."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if exact or gate.dtype in (torch.float32, torch.float64):
        return F.silu(gate) * up
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """``silu(gate) * up`` elementwise.

    Args:
        gate: [..., I]; or, with ``up=None``, the packed projection [..., 2I], gate first.
        up: [..., I] in gate's dtype, or None.
        exact: transformers' rounding order, in plain torch.

    Returns:
        [..., I] in gate's dtype. Views with a row stride (halves of one packed projection) are read without a copy;
        the packed form also writes its gradient as one packed tensor.

    Bytes moved (b per element): forward 3·N·I·b, backward 5·N·I·b.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    floating("swiglu", gate=gate)
    if up is None:
        require(gate.dim() >= 1 and gate.shape[-1] % 2 == 0, "swiglu", "gate", tuple(gate.shape),
                "an even last dimension 2I when up is None")
    else:
        require(up.shape == gate.shape, "swiglu", "up", tuple(up.shape), f"gate's shape {tuple(gate.shape)}")
        same_device("swiglu", gate, up=up)
        same_dtype("swiglu", gate, up=up)
    backend = "torch" if exact else dispatch.resolve("swiglu", gate.device.type, gate.dtype)
    if backend == "torch" or gate.numel() == 0:
        return swiglu_ref(gate, up, exact=exact)
    shape, width = gate.shape[:-1], gate.shape[-1]
    if up is None:
        return _packed_forward(gate.reshape(-1, width), backend).view(*shape, width // 2)
    return _forward(gate.reshape(-1, width), up.reshape(-1, width), backend).view(*shape, width)


@torch.library.custom_op("qwen3::swiglu", mutates_args=())
def _forward(gate_NI: Tensor, up_NI: Tensor, backend: str) -> Tensor:
    return dispatch.backend("swiglu", backend).forward(gate_NI, up_NI)


@_forward.register_fake
def _(gate_NI, up_NI, backend):
    return gate_NI.new_empty(gate_NI.shape)


@torch.library.custom_op("qwen3::swiglu_backward", mutates_args=())
def _backward(dy_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dgate, dup = gate_NI.new_empty(gate_NI.shape), up_NI.new_empty(up_NI.shape)
    dispatch.backend("swiglu", backend).backward(dy_NI, gate_NI, up_NI, dgate, dup)
    return dgate, dup


@_backward.register_fake
def _(dy_NI, gate_NI, up_NI, backend):
    return gate_NI.new_empty(gate_NI.shape), up_NI.new_empty(up_NI.shape)


@torch.library.custom_op("qwen3::swiglu_packed", mutates_args=())
def _packed_forward(gate_up: Tensor, backend: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return dispatch.backend("swiglu", backend).forward(gate, up)


@_packed_forward.register_fake
def _(gate_up, backend):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("qwen3::swiglu_packed_backward", mutates_args=())
def _packed_backward(dy_NI: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    d_gate_up = gate_up.new_empty(gate_up.shape)
    dispatch.backend("swiglu", backend).backward(dy_NI, *gate_up.chunk(2, dim=-1), *d_gate_up.chunk(2, dim=-1))
    return d_gate_up


@_packed_backward.register_fake
def _(dy_NI, gate_up, backend):
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1])
    ctx.backend = inputs[-1]


_forward.register_autograd(
    lambda ctx, dy: (*_backward(dy, *ctx.saved_tensors, ctx.backend), None), setup_context=_setup_context
)
_packed_forward.register_autograd(
    lambda ctx, dy: (_packed_backward(dy, *ctx.saved_tensors, ctx.backend), None), setup_context=_setup_context
)
