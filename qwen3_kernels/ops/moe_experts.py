"""The experts of a mixture: for every token Σ_k weight_k · down_k(silu(gate_k x) · up_k x), forward and backward.

Rows are sorted by expert (`routing_plan`) and never copied that way: the products gather their tokens as they read them.
For the backward only x and h = [gate, up] are kept (or x alone). With A = silu(gate) · up and dA' = dout @ down[e], the
gradient of the output of the unweighted expert,

    dweight = Σ dA' · A        dh = dSwiGLU(weight · dA')        ddown = (weight · A)ᵀ dout        dgate_up = dhᵀ x

so that the experts' outputs [R, D] are not needed again.

Sources: Shazeer et al. 2017 (arXiv 1701.06538); the order of the backward is that of SonicMoE (Guo et al. 2025, arXiv
2512.14080, section 3).
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from . import _moe_torch
from ._check import floating, require, same_device, same_dtype
from .moe_router import Plan, routing_plan
from .swiglu import swiglu_ref


# So few assignments, without gradients, go one by one in two launches: no expert has enough rows to share its weights.
FEW_ROWS = 16
# Up to so many assignments an expert, without gradients, Hopper's kernels leave to Triton's, whose low tiles are streams of
# weights: of the time that reading these takes at 3.0 TB/s on an H100 (D 2048, I 768, 128 experts, 8 a token), 8 tokens reach
# 87 % there and 80 % here, 32 tokens 93 and 89 %, 128 tokens 92 and 91 %.
LOW_ROWS = 8


def moe_experts_ref(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Plain torch, expert by expert."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (N, K), E = ids.shape, gate_up.shape[0]
    flat = ids.flatten()
    y = torch.zeros(N * K, x.shape[1], dtype=x.dtype, device=x.device)
    for e in range(E):
        slot = (flat == e).nonzero().squeeze(1)
        rows = F.linear(swiglu_ref(F.linear(x[slot // K], gate_up[e])), down[e])
        y = y.index_copy(0, slot, rows)
    return (y.view(N, K, x.shape[1]).to(wide) * weights.to(wide).unsqueeze(2)).sum(1).to(x.dtype)


def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, recompute: bool = False,
    gate_up_grad: Tensor | None = None, down_grad: Tensor | None = None, plan: Plan | None = None,
) -> Tensor:
    """Every token through its K experts, summed by weight.

    Args:
        x: [N, D].
        gate_up: [E, 2I, D] in x's dtype, gate rows before up rows.
        down: [E, D, I] in x's dtype.
        ids: [N, K], int64 or int32. Ids outside [0, E) add nothing, and their weights get the gradient 0.
        weights: [N, K] float32 or x's dtype.
        recompute: keep x alone for the backward, which computes h again: N·K·2I elements less, a third more FLOPs in the
            backward.
        gate_up_grad, down_grad: buffers in the shape of the weights, in their dtype or float32, contiguous: the gradients
            are added to them in the backward in place of being handed to autograd, so micro-steps share them. Both or
            neither.
        plan: ``routing_plan(ids, E)``, when it is at hand already.

    Returns: [N, D] in x's dtype, summed in float32 in the order of k.

    FLOPs: 6·N·K·D·I forward, twice as many backward. Kept for the backward: x, h [N·K, 2I] and the plan. No host sync,
    CUDA-graph safe but with the "torch" backend; sums have a fixed order.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    op = "moe_experts"
    floating(op, x=x, weights=weights)
    require(x.dim() == 2, op, "x", tuple(x.shape), "[N, D]")
    N, D = x.shape
    packed = gate_up.dim() == 3 and gate_up.shape[0] > 0 and gate_up.shape[1] % 2 == 0 and gate_up.shape[2] == D
    require(packed, op, "gate_up", tuple(gate_up.shape), f"[E, 2I, {D}]")
    E, width = gate_up.shape[0], gate_up.shape[1] // 2
    require(down.shape == (E, D, width), op, "down", tuple(down.shape), f"({E}, {D}, {width})")
    require(ids.dim() == 2 and ids.shape[0] == N and ids.shape[1] > 0, op, "ids", tuple(ids.shape), f"[{N}, K]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids is {ids.dtype}; expected torch.int64 or torch.int32")
    require(weights.shape == ids.shape, op, "weights", tuple(weights.shape), f"ids' shape {tuple(ids.shape)}")
    same_device(op, x, gate_up=gate_up, down=down, ids=ids, weights=weights, gate_up_grad=gate_up_grad,
                down_grad=down_grad)
    same_dtype(op, x, gate_up=gate_up, down=down)
    if weights.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: weights is {weights.dtype}; expected torch.float32 or {x.dtype}, x's dtype")
    require((gate_up_grad is None) == (down_grad is None), op, "gate_up_grad and down_grad", "only one given",
            "both or neither")
    for name, buffer, like in (("gate_up_grad", gate_up_grad, gate_up), ("down_grad", down_grad, down)):
        if buffer is not None:
            require(buffer.shape == like.shape and buffer.is_contiguous(), op, name, tuple(buffer.shape),
                    f"the weight's shape {tuple(like.shape)}, contiguous")
            require(buffer.dtype in (like.dtype, torch.float32), op, name, buffer.dtype, f"{like.dtype} or torch.float32")
    if x.dtype == torch.float64 or N == 0:
        require(gate_up_grad is None, op, "x", f"{x.dtype} {tuple(x.shape)}",
                "not float64 and not empty with gate_up_grad and down_grad")
        return moe_experts_ref(x, gate_up, down, ids, weights)
    backend = dispatch.resolve(op, x.device.type, x.dtype)
    if backend == "cuda" and (D % 8 or width % 8):  # TMA reads rows of 16-byte units
        backend = "triton"
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights))
    if not needs_grad and ids.numel() <= FEW_ROWS and backend in ("cuda", "triton"):
        return _decode(x, gate_up, down, ids, weights)
    if not needs_grad and ids.numel() <= LOW_ROWS * E and backend == "cuda":
        backend = "triton"
    plan = routing_plan(ids, E) if plan is None else plan
    args = (x, gate_up, down, weights, *plan)
    keep = needs_grad and not recompute
    if needs_grad and gate_up_grad is not None and (gate_up.requires_grad or down.requires_grad):
        return _Into.apply(*args, keep, backend, gate_up_grad, down_grad)
    return _forward(*args, keep, backend)[0]


@torch.library.custom_op("qwen3::moe_experts_decode", mutates_args=())
def _decode(x_ND: Tensor, gate_up: Tensor, down: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    args = (t.contiguous() for t in (x_ND, gate_up, down, ids_NK, weights_NK))
    return dispatch.backend("moe_experts", "triton").decode(*args)


@_decode.register_fake
def _(x_ND, gate_up, down, ids_NK, weights_NK):
    return x_ND.new_empty(x_ND.shape)


# --- The steps. A backend has up, down, combine, down_backward, up_backward, combine_backward and weight_grad, as in
# `_moe_torch`, where their arguments are described.


def steps(backend: str) -> ModuleType:
    return _moe_torch if backend == "torch" else dispatch.backend("moe_experts", backend)


def _gradients(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, h: Tensor, plan: Plan, want_x: bool,
    gate_up_grad: Tensor | None, down_grad: Tensor | None, accumulate: bool, backend: str,
) -> tuple[Tensor | None, Tensor]:
    """(dx or None, dweights [N, K] float32). Writes, or adds to, the weights' gradients that are given."""
    kernels = steps(backend)
    if h.numel() == 0:
        h, _ = kernels.up(x, gate_up, plan)
    dweights, dh, a = kernels.down_backward(dout, down, h, weights, plan)
    del h
    if down_grad is not None:
        kernels.weight_grad(dout, a, plan, down_grad, accumulate, "left")
    del a
    if gate_up_grad is not None:
        kernels.weight_grad(dh, x, plan, gate_up_grad, accumulate, "right")
    if not want_x:
        return None, dweights
    return kernels.combine_backward(kernels.up_backward(dh, gate_up, plan), plan, x.shape[0]), dweights


@torch.library.custom_op("qwen3::moe_experts", mutates_args=())
def _forward(
    x_ND: Tensor, gate_up: Tensor, down: Tensor, weights_NK: Tensor, offsets: Tensor, token: Tensor, slot: Tensor,
    inverse: Tensor, keep: bool, backend: str,
) -> tuple[Tensor, Tensor]:
    """(out [N, D], h [R, 2I], or [0] unless ``keep``)"""
    kernels, plan = steps(backend), Plan(offsets, token, slot, inverse)
    # A backend that can do without h in inference has an `activate`, which gives a alone.
    if keep or not hasattr(kernels, "activate"):
        h, a = kernels.up(x_ND.contiguous(), gate_up.contiguous(), plan)
    else:
        h, a = None, kernels.activate(x_ND.contiguous(), gate_up.contiguous(), plan)
    h = h if keep else x_ND.new_empty(0)
    y = kernels.down(a, down.contiguous(), plan)
    del a
    return kernels.combine(y, weights_NK.contiguous(), plan), h


@_forward.register_fake
def _(x_ND, gate_up, down, weights_NK, offsets, token, slot, inverse, keep, backend):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty((token.shape[0], gate_up.shape[1]) if keep else 0)


@torch.library.custom_op("qwen3::moe_experts_backward", mutates_args=())
def _backward(
    dout_ND: Tensor, x_ND: Tensor, gate_up: Tensor, down: Tensor, weights_NK: Tensor, h: Tensor, offsets: Tensor,
    token: Tensor, slot: Tensor, inverse: Tensor, want_x: bool, want_gate_up: bool, want_down: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_up, ddown, dweights), empty where not wanted."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else None
             for t, want in ((gate_up, want_gate_up), (down, want_down))]
    dx, dweights = _gradients(
        dout_ND.contiguous(), x_ND.contiguous(), gate_up.contiguous(), down.contiguous(), weights_NK.contiguous(), h,
        Plan(offsets, token, slot, inverse), want_x, *grads, False, backend,
    )
    return *(x_ND.new_empty(0) if t is None else t for t in (dx, *grads)), dweights.to(weights_NK.dtype)


@_backward.register_fake
def _(dout_ND, x_ND, gate_up, down, weights_NK, h, offsets, token, slot, inverse, want_x, want_gate_up, want_down,
      backend):
    wanted = ((x_ND, want_x), (gate_up, want_gate_up), (down, want_down), (weights_NK, True))
    return tuple(t.new_empty(t.shape if want else 0) for t, want in wanted)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 10
    x, gate_up, down, weights, *plan, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = _backward(dout, x, gate_up, down, weights, h, *plan, *wanted, ctx.backend)
    wanted = ctx.needs_input_grad[:4]
    return *(g if want else None for g, want in zip(grads, wanted)), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("qwen3::moe_experts_backward_into", mutates_args=("gate_up_grad", "down_grad"))
def _backward_into(
    dout_ND: Tensor, x_ND: Tensor, gate_up: Tensor, down: Tensor, weights_NK: Tensor, h: Tensor, offsets: Tensor,
    token: Tensor, slot: Tensor, inverse: Tensor, gate_up_grad: Tensor, down_grad: Tensor, want_x: bool,
    want_gate_up: bool, want_down: bool, backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, or [0] when not wanted, dweights); adds to the weights' gradients."""
    dx, dweights = _gradients(
        dout_ND.contiguous(), x_ND.contiguous(), gate_up.contiguous(), down.contiguous(), weights_NK.contiguous(), h,
        Plan(offsets, token, slot, inverse), want_x, gate_up_grad if want_gate_up else None,
        down_grad if want_down else None, True, backend,
    )
    return x_ND.new_empty(0) if dx is None else dx, dweights.to(weights_NK.dtype)


@_backward_into.register_fake
def _(dout_ND, x_ND, gate_up, down, weights_NK, h, offsets, token, slot, inverse, gate_up_grad, down_grad, want_x,
      want_gate_up, want_down, backend):
    return x_ND.new_empty(x_ND.shape if want_x else 0), weights_NK.new_empty(weights_NK.shape)


class _Into(torch.autograd.Function):
    """The backward that mutates, under autograd (torch.library registers no formula for an op that does)."""

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, offsets, token, slot, inverse, keep, backend, gate_up_grad, down_grad):
        tensors = (x, gate_up, down, weights, offsets, token, slot, inverse)
        out, h = _forward(*(t.detach() for t in tensors), keep, backend)
        ctx.save_for_backward(*tensors, h)
        ctx.buffers, ctx.backend = (gate_up_grad, down_grad), backend
        return out

    @staticmethod
    def backward(ctx, dout):
        x, gate_up, down, weights, *plan, h = ctx.saved_tensors
        want_x, want_gate_up, want_down, want_weights = ctx.needs_input_grad[:4]
        dx, dweights = _backward_into(
            dout, x, gate_up, down, weights, h, *plan, *ctx.buffers, want_x, want_gate_up, want_down, ctx.backend
        )
        return dx if want_x else None, None, None, dweights if want_weights else None, *[None] * 8
