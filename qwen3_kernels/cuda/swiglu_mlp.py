"""The two products of ``swiglu_mlp`` with an epilogue, by the experts' kernels: one expert that has all tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import moe_experts

DTYPES, CAPABILITY = moe_experts.DTYPES, moe_experts.CAPABILITY


class _Plan(NamedTuple):
    offsets: Tensor  # [0, N]
    token: Tensor  # 0 .. N - 1, row by row
    slot: Tensor


def up(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return moe_experts.up(_rows(x), gate_up.unsqueeze(0), _plan(x))


def down_backward(dy: Tensor, down: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    ones = h.new_ones(h.shape[0], 1, dtype=torch.float32)
    return moe_experts.down_backward(_rows(dy), _rows(down).unsqueeze(0), h, ones, _plan(h))[1:]


def _plan(x: Tensor) -> _Plan:
    N = x.shape[0]
    token = torch.arange(N, dtype=torch.int32, device=x.device)
    return _Plan(torch.arange(0, 2 * N, N, dtype=torch.int32, device=x.device), token, token)


def _rows(t: Tensor) -> Tensor:
    """The tensor itself when its rows start on 16-byte boundaries."""
    aligned = t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
    return t if aligned else t.contiguous()
