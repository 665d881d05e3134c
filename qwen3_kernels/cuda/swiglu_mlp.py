"""The two products of ``swiglu_mlp`` with an epilogue, by the experts' kernels: one expert that has all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.moe_router import Plan
from . import moe_experts
from .attention import aligned

DTYPES, CAPABILITY = moe_experts.DTYPES, moe_experts.CAPABILITY


def up(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return moe_experts.up(aligned(x), gate_up.unsqueeze(0), _plan(x))


def down_backward(dy: Tensor, down: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    ones = h.new_ones(h.shape[0], 1, dtype=torch.float32)
    return moe_experts.down_backward(aligned(dy), aligned(down).unsqueeze(0), h, ones, _plan(h))[1:]


def _plan(x: Tensor) -> Plan:
    N = x.shape[0]
    token = torch.arange(N, dtype=torch.int32, device=x.device)
    return Plan(torch.arange(0, 2 * N, N, dtype=torch.int32, device=x.device), token, token, token)
