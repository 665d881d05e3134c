"""The two products of ``swiglu_mlp`` with an epilogue, by the experts' kernels in their dense form (csrc/cuda/moe.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import DTYPE_CODES, rows
from . import moe_experts
from .attention import aligned

DTYPES, CAPABILITY = moe_experts.DTYPES, moe_experts.CAPABILITY


def up(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D], gate_up [2I, D] -> (h [N, 2I], silu(gate) · up [N, I])"""
    N, I = x.shape[0], gate_up.shape[0] // 2
    x, h, a = aligned(x), x.new_empty(N, 2 * I), x.new_empty(N, I)
    _call(core.moe_up, x, I, rows(x), _weight(gate_up), rows(h), rows(a))
    return h, a


def down_backward(dy: Tensor, down: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dy [N, D], down [D, I], h [N, 2I] -> (dh [N, 2I], silu(gate) · up [N, I])"""
    dy, down = aligned(dy), aligned(down)
    dh, a = torch.empty_like(h), h.new_empty(h.shape[0], h.shape[1] // 2)
    _call(core.moe_down_backward, dy, a.shape[1], rows(dy), _weight(down), rows(h), 0, 0, rows(dh), rows(a), 0)
    return dh, a


def _call(function, x: Tensor, width: int, *arguments) -> None:
    N, D = x.shape
    offsets = torch.arange(0, 2 * N, N, dtype=torch.int32, device=x.device)  # of one expert
    with torch.cuda.device(x.device):
        function((1, N, offsets.data_ptr(), 0, 0), D, width, *arguments, torch.cuda.current_stream().cuda_stream)


def _weight(w: Tensor) -> tuple[int, int, int, int]:
    return w.data_ptr(), DTYPE_CODES[w.dtype], w.numel(), w.stride(0)
