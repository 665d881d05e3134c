"""SwiGLU in Triton: one tile of [ROWS, BLOCK] values a program, rows at any stride."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cast, exp, load, on_device, power_of_two_divisor, row_major


@triton.jit
def _tile(N, I: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(rows [ROWS, 1], cols [1, BLOCK]) of this program; columns run fastest."""
    blocks: tl.constexpr = (I + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, cols


@triton.jit
def _divide(a, b, dtype: tl.constexpr):
    """a / b, IEEE where the result stays fp32; the faster division of 2 ulp where it is rounded to 16 bits anyway."""
    if dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    gate, up, y, N, gate_stride, up_stride,
    I: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
):
    rows, cols = _tile(N, I, BLOCK, ROWS)
    mask = None if FULL else (rows < N) & (cols < I)
    g = load(gate + rows * gate_stride + cols, mask).to(tl.float32)
    u = load(up + rows * up_stride + cols, mask).to(tl.float32)
    silu = _divide(g, 1.0 + exp(-g, y.dtype.element_ty == tl.float32), y.dtype.element_ty)
    tl.store(y + rows * I + cols, cast(silu * u, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dy, gate, up, dgate, dup, N, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    I: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
):
    rows, cols = _tile(N, I, BLOCK, ROWS)
    mask = None if FULL else (rows < N) & (cols < I)
    d = load(dy + rows * dy_stride + cols, mask).to(tl.float32)
    g = load(gate + rows * gate_stride + cols, mask).to(tl.float32)
    u = load(up + rows * up_stride + cols, mask).to(tl.float32)
    s = _divide(1.0, 1.0 + exp(-g, dgate.dtype.element_ty == tl.float32), dgate.dtype.element_ty)
    tl.store(dup + rows * dup_stride + cols, cast(d * g * s, dup.dtype.element_ty), mask=mask)
    slope = s * (1.0 + g * (1.0 - s))
    tl.store(dgate + rows * dgate_stride + cols, cast(d * u * slope, dgate.dtype.element_ty), mask=mask)


def _launch_of(n: int, width: int) -> tuple[int, dict]:
    # 2048 values on 4 warps are two 16-byte loads of bf16 a thread and tensor. Every Qwen3 width (768 to 25600) is a
    # multiple of 256, so its tiles have no mask and no idle lane; an odd width pays for a mask.
    block = power_of_two_divisor(width, 2048)
    if block < 256:
        block = min(triton.next_power_of_2(width), 1024)
    rows = max(1, min(2048 // block, 32))
    sizes = {"I": width, "BLOCK": block, "ROWS": rows, "FULL": width % block == 0 and n % rows == 0}
    return triton.cdiv(width, block) * triton.cdiv(n, rows), sizes | {"num_warps": 4}


def forward(gate: Tensor, up: Tensor) -> Tensor:
    n, width = gate.shape
    gate, up = row_major(gate), row_major(up)
    y = torch.empty((n, width), dtype=gate.dtype, device=gate.device)
    programs, sizes = _launch_of(n, width)
    with on_device(gate):
        _forward_kernel[(programs,)](gate, up, y, n, gate.stride(0), up.stride(0), **sizes)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    n, width = gate.shape
    dy, gate, up = row_major(dy), row_major(gate), row_major(up)
    programs, sizes = _launch_of(n, width)
    with on_device(gate):
        _backward_kernel[(programs,)](
            dy, gate, up, dgate, dup, n, dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            **sizes,
        )
