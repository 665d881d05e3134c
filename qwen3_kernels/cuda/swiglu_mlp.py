"""The two products of ``swiglu_mlp`` with an epilogue, by the experts' kernels in their dense form (csrc/cuda/moe.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import rows
from ..ops._flash import aligned
from . import moe_experts

DTYPES, CAPABILITY = moe_experts.DTYPES, moe_experts.CAPABILITY


def up(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D], gate, up [I, D] -> (h [N, 2I], silu(x gate^T) · (x up^T) [N, I])"""
    N, I = x.shape[0], gate.shape[0]
    x, gate, up = map(aligned, (x, gate, up))
    h, a = x.new_empty(N, 2 * I), x.new_empty(N, I)
    _call(core.swiglu_up, x, I, x, gate, up, h, a)
    return h, a


def down_backward(dy: Tensor, down: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dy [N, D], down [D, I], h [N, 2I] -> (dh [N, 2I], silu(gate) · up [N, I])"""
    dy, down = aligned(dy), aligned(down)
    dh, a = torch.empty_like(h), h.new_empty(h.shape[0], h.shape[1] // 2)
    _call(core.swiglu_down_backward, dy, a.shape[1], dy, down, h, dh, a)
    return dh, a


def _call(function, x: Tensor, width: int, *tensors: Tensor) -> None:
    with torch.cuda.device(x.device):
        function(*x.shape, width, *map(rows, tensors), torch.cuda.current_stream().cuda_stream)
