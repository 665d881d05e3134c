"""The steps of ``moe_experts`` on Hopper (csrc/cuda/moe.cu), bf16, with D and I multiples of 8. Nothing here waits for
the device or looks at the routing, so all of it can be captured in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import DTYPE_CODES, rows

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)  # wgmma


def up(x: Tensor, gate_up: Tensor, plan) -> tuple[Tensor, Tensor]:
    """x [N, D], gate_up [E, 2I, D] -> (h [R, 2I], a = silu(gate) · up [R, I])"""
    d, i = gate_up.shape[2], gate_up.shape[1] // 2
    h, a = _rows(x, plan, 2 * i), _rows(x, plan, i)
    _call(core.moe_up, plan, d, i, _aligned(x), _experts(gate_up), rows(h), rows(a))
    return h, a


def down(a: Tensor, down: Tensor, plan) -> Tensor:
    """a [R, I], down [E, D, I] -> y [R, D]"""
    d, i = down.shape[1:]
    y = _rows(a, plan, d)
    _call(core.moe_down, plan, d, i, _aligned(a), _experts(down), rows(y))
    return y


def combine(y: Tensor, weights: Tensor, plan) -> Tensor:
    """y [R, D], weights [N, K] -> out [N, D]: each token's rows, weighted and summed in the order of k, in float32."""
    return _combine(y, weights.shape[0], weights.float().contiguous(), plan)


def down_backward(dout: Tensor, down: Tensor, h: Tensor, weights: Tensor, plan) -> tuple[Tensor, Tensor, Tensor]:
    """dout [N, D] -> (dweights [N, K] float32, dh [R, 2I], weight · a [R, I])"""
    d, i = down.shape[1:]
    weights = weights.float().contiguous()
    dweights, dh, a = torch.empty_like(weights), _rows(h, plan, 2 * i), _rows(h, plan, i)
    partial = weights.new_empty(core.moe_partials(h.shape[0], i))
    _call(
        core.moe_down_backward, plan, d, i, _aligned(dout), _experts(down), _aligned(h), weights.data_ptr(),
        dweights.data_ptr(), rows(dh), rows(a), partial.data_ptr(),
    )
    return dweights, dh, a


def up_backward(dh: Tensor, gate_up: Tensor, plan) -> Tensor:
    """dh [R, 2I] -> dx of each row [R, D]"""
    d, i = gate_up.shape[2], gate_up.shape[1] // 2
    dx = _rows(dh, plan, d)
    _call(core.moe_up_backward, plan, d, i, _aligned(dh), _experts(gate_up), rows(dx))
    return dx


def combine_backward(dx_rows: Tensor, plan, N: int) -> Tensor:
    """[R, D] -> [N, D]: each token's rows summed in the order of k, in float32."""
    return _combine(dx_rows, N, None, plan)


def weight_grad(left: Tensor, right: Tensor, plan, out: Tensor, accumulate: bool, gathered: str) -> None:
    """out[e] (+)= left[rows of e].T @ right[rows of e]; out [E, P, Q], float32 or bfloat16. ``gathered`` ("left" or "right")
    names the operand with a row for each token; the other has one for each row of the plan."""
    _call(
        core.moe_weight_grad, plan, left.shape[1], _aligned(left), right.shape[1], _aligned(right), gathered == "left",
        _experts(out), accumulate,
    )


def _combine(y: Tensor, tokens: int, weights: Tensor | None, plan) -> Tensor:
    out = y.new_empty(tokens, y.shape[1])
    _call(
        core.moe_combine, plan, tokens, plan.inverse.shape[0] // max(tokens, 1), y.shape[1], _aligned(y),
        plan.inverse.data_ptr(), 0 if weights is None else weights.data_ptr(), rows(out),
    )
    return out


def _call(function, plan, *arguments) -> None:
    experts, r = plan.offsets.shape[0] - 1, plan.token.shape[0]
    with torch.cuda.device(plan.token.device):
        function(
            (experts, r, plan.offsets.data_ptr(), plan.token.data_ptr(), plan.slot.data_ptr()), *arguments,
            torch.cuda.current_stream().cuda_stream,
        )


def _rows(like: Tensor, plan, width: int) -> Tensor:
    return like.new_empty(plan.token.shape[0], width)


def _aligned(t: Tensor) -> tuple[int, int, int]:
    _check(t)
    return rows(t)


def _experts(t: Tensor) -> tuple[int, int, int, int]:
    _check(t)
    return t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1)


def _check(t: Tensor) -> None:
    if t.stride(-1) != 1 or t.data_ptr() % 16 or any(s * t.element_size() % 16 for s in t.stride()[:-1]):
        raise ValueError(
            f"moe_experts: the rows of a tensor {tuple(t.shape)} with strides {t.stride()} do not all start on 16-byte "
            "boundaries; expected contiguous rows of a multiple of 8 elements"
        )
