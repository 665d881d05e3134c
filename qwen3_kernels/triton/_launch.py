"""What the Triton backends share: layout of the arguments, device facts, and the ordered sum of partial gradients."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_major(t: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def on_device(t: Tensor):
    """Context in which launches go to the GPU of ``t``; Triton itself launches on the current one."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU. Elsewhere 4, so that interpreted persistent programs loop, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def power_of_two_divisor(n: int, most: int) -> int:
    """Largest power of two that divides ``n`` and is at most ``most`` (itself a power of two)."""
    return min(n & -n, most)


@triton.jit
def load(pointers, mask):
    """Load with zeros outside the mask; ``mask`` may be None."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, rounded to nearest even. Triton's interpreter cuts bf16 off instead; there it is done in bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, rounded, bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def exp(x):
    """exp(x) as one multiply and the hardware's 2^x; ``tl.exp`` spends three more instructions on subnormal results."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit(do_not_specialize=["split", "P"])
def _sum_partials_kernel(partial, first, second, split, P, H, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    begin = 0
    end = split
    if tl.program_id(1) == 1:
        begin = split
        end = P
    cols = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([DEPTH, WIDTH], tl.float32)
    for start in range(begin, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)[:, None]
        total += tl.load(partial + rows * H + cols[None, :], mask=(rows < end) & (cols < H)[None, :], other=0.0)
    out = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(first + cols, cast(out, first.dtype.element_ty), mask=cols < H)
    else:
        tl.store(second + cols, cast(out, second.dtype.element_ty), mask=cols < H)


def sum_partials(partial: Tensor, first: Tensor, second: Tensor | None = None, split: int | None = None) -> None:
    """first = partial[:split].sum(0), second = partial[split:].sum(0), in an order fixed by the shape; one launch.

    Args: partial [P, H] float32, contiguous; first, second [H] of any floating dtype, written.
    """
    P, H = partial.shape
    # 32 columns are one 128-byte line a row; 128 rows at once leave about four rounds of L2 latency for 500 partials.
    grid = (triton.cdiv(H, 32), 1 if second is None else 2)
    _sum_partials_kernel[grid](
        partial, first, first if second is None else second, P if split is None else split, P, H,
        DEPTH=128, WIDTH=32, num_warps=8,
    )


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x + at, cast(v * f, x.dtype.element_ty), mask=at < n)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a scalar tensor; x is contiguous. Nothing is read or written when the factor is 1, without a sync."""
    with on_device(x):
        _scale_kernel[(triton.cdiv(x.numel(), 16384),)](x, factor, x.numel(), BLOCK=16384, num_warps=8)
