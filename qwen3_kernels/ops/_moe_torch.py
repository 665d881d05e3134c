"""The steps of `moe_experts` in plain torch: the functions that every backend has.

Products are torch's grouped ones where it has them (bfloat16 on Hopper and later), else one matmul an expert, whose sizes
a GPU must first tell the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .moe_router import Plan


def up(x: Tensor, gate_up: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """x [N, D], gate_up [E, 2I, D] -> (h [R, 2I], a = silu(gate) · up [R, I])"""
    h = _product(x[plan.token], gate_up.transpose(1, 2), plan)
    return h, activation(h)


def activation(h: Tensor) -> Tensor:
    gate, up_ = (t.float() for t in h.chunk(2, -1))
    return (F.silu(gate) * up_).to(h.dtype)


def down(a: Tensor, down: Tensor, plan: Plan) -> Tensor:
    """a [R, I], down [E, D, I] -> y [R, D]"""
    return _product(a, down.transpose(1, 2), plan)


def combine(y: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """y [R, D], weights [N, K] -> out [N, D]: each token's rows, weighted and summed in the order of k, in float32."""
    N, K = weights.shape
    row, weights = plan.inverse.view(N, K), weights.float()
    dropped = row >= plan.offsets[-1]
    total = torch.zeros(N, y.shape[1], dtype=torch.float32, device=y.device)
    for k in range(K):
        total.addcmul_(y[row[:, k]].float().masked_fill_(dropped[:, k, None], 0), weights[:, k, None])
    return total.to(y.dtype)


def down_backward(dout: Tensor, down: Tensor, h: Tensor, weights: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """dout [N, D] -> (dweights [N, K] float32, dh [R, 2I], weight · a [R, I])"""
    da = _product(dout[plan.token], down, plan).float()  # of the unweighted output
    gate, up_ = (t.float() for t in h.chunk(2, -1))
    sigmoid = gate.sigmoid()
    a = gate * sigmoid * up_
    dropped = plan.inverse >= plan.offsets[-1]
    dweights = (da * a).sum(1)[plan.inverse].masked_fill(dropped, 0).view(weights.shape)
    weight = weights.float().reshape(-1)[plan.slot].unsqueeze(1)
    da = da * weight
    dgate = da * up_ * sigmoid * (1 + gate * (1 - sigmoid))
    dh = torch.cat((dgate, da * gate * sigmoid), 1)
    return dweights, dh.to(h.dtype), (weight * a).to(h.dtype)


def up_backward(dh: Tensor, gate_up: Tensor, plan: Plan) -> Tensor:
    """dh [R, 2I] -> dx of each row [R, D]"""
    return _product(dh, gate_up, plan)


def combine_backward(dx_rows: Tensor, plan: Plan, N: int) -> Tensor:
    """[R, D] -> [N, D]: each token's rows summed in the order of k, in float32."""
    return combine(dx_rows, torch.ones(N, plan.inverse.numel() // N, device=dx_rows.device), plan)


def weight_grad(left: Tensor, right: Tensor, plan: Plan, out: Tensor, accumulate: bool, gathered: str) -> None:
    """out[e] (+)= left[rows of e].T @ right[rows of e]; out [E, P, Q], float32 or the operands' dtype.

    ``gathered`` ("left" or "right") names the operand with a row for each token, to be read through ``plan.token``; the
    other has one for each row of the plan.
    """
    left, right = (t[plan.token] if gathered == side else t for side, t in (("left", left), ("right", right)))
    if grouped(left) and not accumulate and out.dtype == left.dtype:
        out.copy_(torch._grouped_mm(left.T, right, plan.offsets[1:]))
        out.masked_fill_((plan.offsets.diff() == 0).view(-1, 1, 1), 0)
        return
    for e, rows in groups(plan, empty=True):
        product = (left[rows].T @ right[rows]).to(out.dtype)
        out[e] = out[e] + product if accumulate else product


def grouped(t: Tensor) -> bool:
    """Whether torch has a grouped product for it."""
    return (t.is_cuda and t.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")
            and torch.cuda.get_device_capability(t.device)[0] >= 9 and t.shape[1] % 8 == 0)


def _product(rows: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """rows [R, P] @ weight[e] [P, Q] by expert; what lies behind the last expert's rows is undefined."""
    if grouped(rows) and weight.shape[2] % 8 == 0:
        return torch._grouped_mm(rows, weight, plan.offsets[1:])
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for e, part in groups(plan):
        torch.mm(rows[part], weight[e], out=out[part])
    return out


def groups(plan: Plan, empty: bool = False):
    bounds = plan.offsets.tolist()
    for e, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if empty or begin < end:
            yield e, slice(begin, end)
