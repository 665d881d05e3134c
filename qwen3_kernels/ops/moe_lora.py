"""LoRA on the experts: frozen weights, and for every expert a low-rank addition to each of its two matrices.

    h = W1 x + scale · B1 (A1 x)        y = W2 a + scale · B2 (A2 a)        a = SwiGLU(h)

The additions are grouped products of rank r that share the plan of the frozen ones. Nothing is merged: no matrix of the
size of the experts is made, in the forward or the backward, and the frozen weights get no gradient.

Sources: Hu et al. 2021 (arXiv 2106.09685), section 4; the backward of `moe_experts`, with the additions' terms.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype
from .moe_experts import moe_experts_ref, steps
from .moe_router import Plan, routing_plan
from .swiglu import swiglu


class Adapters(NamedTuple):
    """Low-rank factors of all experts, rank r."""

    up_a: Tensor  # [E, r, D]
    up_b: Tensor  # [E, 2I, r], gate rows before up rows
    down_a: Tensor  # [E, r, I]
    down_b: Tensor  # [E, D, r]


def moe_lora_ref(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, up_a: Tensor, up_b: Tensor, down_a: Tensor,
    down_b: Tensor, *, scale: float = 1.0,
) -> Tensor:
    """Plain torch, with merged weights."""
    return moe_experts_ref(x, gate_up + scale * (up_b @ up_a), down + scale * (down_b @ down_a), ids, weights)


def moe_lora(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, adapters: Adapters, *, scale: float = 1.0,
    plan: Plan | None = None,
) -> Tensor:
    """As `moe_experts`, with low-rank additions; gate_up and down are frozen.

    Args:
        x, gate_up, down, ids, weights, plan: as in `moe_experts`; x is not float64.
        adapters: `Adapters` in x's dtype.
        scale: factor of the additions, in LoRA's terms alpha / r.

    Returns: [N, D] in x's dtype. Gradients go to x, weights and the adapters.

    FLOPs: 6·N·K·D·I + O(N·K·r·(D + I)) forward, as many backward. Kept for the backward: x, h [N·K, 2I] and A1 x [N·K, r].

    Raises ValueError, TypeError: shapes, dtypes or devices that do not fit; weights that ask for a gradient.
    """
    op = "moe_lora"
    floating(op, x=x, weights=weights)
    require(x.dim() == 2 and x.shape[0] > 0 and x.dtype != torch.float64, op, "x", f"{x.dtype} {tuple(x.shape)}",
            "[N, D], N > 0, not float64")
    E, D, width = down.shape if down.dim() == 3 else (0, 0, 0)
    require(E > 0 and D == x.shape[1], op, "down", tuple(down.shape), f"[E, {x.shape[1]}, I]")
    r = adapters.up_a.shape[1] if adapters.up_a.dim() == 3 else 0
    shapes = {"gate_up": (E, 2 * width, D), "up_a": (E, r, D), "up_b": (E, 2 * width, r), "down_a": (E, r, width),
              "down_b": (E, D, r)}
    given = {"gate_up": gate_up} | adapters._asdict()
    for name, shape in shapes.items():
        require(given[name].shape == shape, op, name, tuple(given[name].shape), str(shape))
    require(ids.dim() == 2 and ids.shape[0] == x.shape[0], op, "ids", tuple(ids.shape), f"[{x.shape[0]}, K]")
    require(weights.shape == ids.shape, op, "weights", tuple(weights.shape), f"ids' shape {tuple(ids.shape)}")
    same_device(op, x, down=down, ids=ids, weights=weights, **given)
    same_dtype(op, x, down=down, **given)
    for name, t in (("gate_up", gate_up), ("down", down)):
        require(not t.requires_grad, op, name, "a tensor that requires a gradient", "a frozen one, or use moe_experts")
    plan = routing_plan(ids, E) if plan is None else plan
    backend = dispatch.resolve("moe_experts", x.device.type, x.dtype)
    if backend == "cuda" and (D % 8 or width % 8):  # TMA reads rows of 16-byte units
        backend = "triton"
    return _forward(x, gate_up, down, weights, *adapters, *plan, float(scale), backend)[0]


def _steps(backend: str) -> tuple[ModuleType, ModuleType]:
    """(for the experts' own matrices, for those of rank r, which the compiled kernels' tiles are too large for)"""
    return steps(backend), steps("triton" if backend == "cuda" else backend)


def _added(base: Tensor, addition: Tensor, scale: float) -> Tensor:
    """base + scale · addition, rounded once; in place."""
    return base.add_(addition, alpha=scale)


@torch.library.custom_op("qwen3::moe_lora", mutates_args=())
def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, up_a: Tensor, up_b: Tensor, down_a: Tensor, down_b: Tensor,
    offsets: Tensor, token: Tensor, slot: Tensor, inverse: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [N, D], h [R, 2I], A1 x [R, r])"""
    (kernels, thin), plan = _steps(backend), Plan(offsets, token, slot, inverse)
    x, gate_up, down, weights, up_a, up_b, down_a, down_b = _contiguous(
        x, gate_up, down, weights, up_a, up_b, down_a, down_b
    )
    h, _ = kernels.up(x, gate_up, plan)
    low = thin.down(x[token], up_a, plan)
    _added(h, thin.down(low, up_b, plan), scale)
    a = swiglu(h)
    y = _added(kernels.down(a, down, plan), thin.down(thin.down(a, down_a, plan), down_b, plan), scale)
    return kernels.combine(y, weights, plan), h, low


@_forward.register_fake
def _(x, gate_up, down, weights, up_a, up_b, down_a, down_b, offsets, token, slot, inverse, scale, backend):
    R = token.shape[0]
    return x.new_empty(x.shape), x.new_empty(R, gate_up.shape[1]), x.new_empty(R, up_a.shape[1])


@torch.library.custom_op("qwen3::moe_lora_backward", mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, up_a: Tensor, up_b: Tensor, down_a: Tensor,
    down_b: Tensor, h: Tensor, low: Tensor, offsets: Tensor, token: Tensor, slot: Tensor, inverse: Tensor, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and the four factors. Those of SwiGLU are in plain torch, as its input is a sum."""
    (kernels, thin), plan = _steps(backend), Plan(offsets, token, slot, inverse)
    dout, x, gate_up, down, weights, up_a, up_b, down_a, down_b = _contiguous(
        dout, x, gate_up, down, weights, up_a, up_b, down_a, down_b
    )
    dy = dout[token]
    dlow = thin.up_backward(dy, down_b, plan)  # of A2 a, without scale and weight
    da = _added(kernels.up_backward(dy, down, plan).float(), thin.up_backward(dlow, down_a, plan), scale)
    del dy
    gate, up = (t.float() for t in h.chunk(2, -1))
    sigmoid = gate.sigmoid()
    a = gate * sigmoid * up
    kept = inverse < offsets[-1]
    dweights = (da * a).sum(1)[inverse].where(kept, 0).view(weights.shape).to(weights.dtype)
    weight = weights.float().reshape(-1)[slot].unsqueeze(1)
    da *= weight
    dh = torch.cat((da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid), 1).to(h.dtype)
    a = a.to(h.dtype)
    new = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (up_a, up_b, down_a, down_b)]
    scaled = lambda t, by: (t.float() * by).to(t.dtype)  # noqa: E731
    thin.weight_grad(scaled(dlow, scale * weight), a, plan, new[2], False, "neither")
    thin.weight_grad(dout, scaled(thin.down(a, down_a, plan), scale * weight), plan, new[3], False, "left")
    dlow = thin.up_backward(dh, up_b, plan)
    thin.weight_grad(scaled(dlow, scale), x, plan, new[0], False, "right")
    thin.weight_grad(dh, scaled(low, scale), plan, new[1], False, "neither")
    rows = _added(kernels.up_backward(dh, gate_up, plan), thin.up_backward(dlow, up_a, plan), scale)
    return kernels.combine_backward(rows, plan, x.shape[0]), dweights, *new


@_backward.register_fake
def _(dout, x, gate_up, down, weights, up_a, up_b, down_a, down_b, h, low, offsets, token, slot, inverse, scale, backend):
    return tuple(t.new_empty(t.shape) for t in (x, weights, up_a, up_b, down_a, down_b))


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, *_):
    if dout is None:
        return (None,) * 14
    *leaves, offsets, token, slot, inverse, h, low = ctx.saved_tensors
    dx, dweights, *factors = _backward(dout, *leaves, h, low, offsets, token, slot, inverse, ctx.scale, ctx.backend)
    return dx, None, None, dweights, *factors, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
