from __future__ import annotations

import torch
from torch import Tensor

from ._core import core, heads, row_major, rows


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    return _forward(q, q_weight, cos, sin, eps), _forward(k, k_weight, cos, sin, eps)


def _forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x, weight = row_major(x), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    core.norm_rope(
        *x.shape, cos.shape[0], eps, heads(x), rows(weight), cos.data_ptr(), sin.data_ptr(), heads(out)
    )
    return out


def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    dq, dq_weight = _backward(dq_out, q, q_weight, cos, sin, eps)
    dk, dk_weight = _backward(dk_out, k, k_weight, cos, sin, eps)
    return dq, dk, dq_weight, dk_weight


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dout, x, weight = row_major(dout), row_major(x), weight.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight = torch.empty(weight.shape, dtype=torch.float32)
    core.norm_rope_backward(
        *x.shape, cos.shape[0], eps, heads(dout), heads(x), rows(weight), cos.data_ptr(), sin.data_ptr(), heads(dx),
        dweight.data_ptr(),
    )
    return dx, dweight.to(weight.dtype)
