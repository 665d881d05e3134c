"""The steps of `moe_experts` on a CPU: few rows of an expert by the C++ kernel, which reads its weights once as they are
stored; many by torch's matrix product, which packs them. Measured in docs/LOG.md."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops import _moe_torch
from ..ops.moe_router import Plan
from . import swiglu
from ._core import core, rows

FEW = 16  # rows of an expert

combine, combine_backward = _moe_torch.combine, _moe_torch.combine_backward


def up(x: Tensor, gate_up: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    h = _times_transposed(x, plan.token, gate_up, plan)
    return h, swiglu.forward(*h.chunk(2, -1))


def down(a: Tensor, down: Tensor, plan: Plan) -> Tensor:
    return _times_transposed(a, None, down, plan)


def down_backward(dout: Tensor, down: Tensor, h: Tensor, weights: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    da = torch.zeros(h.shape[0], down.shape[2], dtype=torch.float32)
    for e, part in _moe_torch.groups(plan):
        da[part] = _mm(dout[plan.token[part]], down[e])
    gate, up_ = (t.float() for t in h.chunk(2, -1))
    a = swiglu.forward(gate, up_)
    dropped = plan.inverse >= plan.offsets[-1]
    dweights = (da * a).sum(1)[plan.inverse].masked_fill(dropped, 0).view(weights.shape)
    weight = weights.float().reshape(-1)[plan.slot].unsqueeze(1)
    dh = torch.empty(h.shape, dtype=torch.float32)
    swiglu.backward(da.mul_(weight), gate, up_, *dh.chunk(2, -1))
    return dweights, dh.to(h.dtype), a.mul_(weight).to(h.dtype)


def up_backward(dh: Tensor, gate_up: Tensor, plan: Plan) -> Tensor:
    out = torch.zeros(dh.shape[0], gate_up.shape[2], dtype=dh.dtype)
    for e, part in _moe_torch.groups(plan):
        out[part] = _mm(dh[part], gate_up[e])
    return out


def weight_grad(left: Tensor, right: Tensor, plan: Plan, out: Tensor, accumulate: bool, gathered: str) -> None:
    for e, part in _moe_torch.groups(plan, empty=True):
        token = plan.token[part]
        product = _mm((left[token] if gathered == "left" else left[part]).T, right[token] if gathered == "right" else right[part])
        out[e] = out[e] + product if accumulate else product


def _times_transposed(a: Tensor, source: Tensor | None, weight: Tensor, plan: Plan) -> Tensor:
    """out[r] = weight[e] a[source[r]] for the rows of each expert."""
    E, n, k = weight.shape
    out = torch.zeros(plan.token.shape[0], n, dtype=a.dtype)
    core.moe_rows(
        E, n, k, FEW, plan.offsets.data_ptr(), 0 if source is None else source.data_ptr(), rows(a), rows(weight.view(E * n, k)),
        rows(out),
    )
    for e, part in _moe_torch.groups(plan):
        if part.stop - part.start > FEW:
            out[part] = _mm(a[part] if source is None else a[source[part]], weight[e].T)
    return out


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """In float32 unless the processor multiplies bfloat16: torch takes many times as long there without."""
    return a @ b if a.dtype == torch.float32 or _multiplies_bfloat16() else a.float() @ b.float()


@functools.cache
def _multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and "avx512_bf16" in _flags()


@functools.cache
def _flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as f:
            return frozenset(next((line.split(":", 1)[1].split() for line in f if line.startswith("flags")), ()))
    except OSError:
        return frozenset()
