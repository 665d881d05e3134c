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


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one it depends on has ended: programmatic dependent launch, from Hopper on.
    Kernels compiled without a GPU (on meta tensors) are for Hopper."""
    return device.type == "meta" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict:
    """Options of a launch whose kernel waits for the one before it by itself (``gdc_wait``), where that is possible."""
    return {"launch_pdl": True} if overlaps(device) else {}


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
    """fp32 to ``dtype``, rounded to nearest even; to e4m3, x is at most 448 in size. Triton's interpreter cuts bf16 and
    e4m3 off instead; there it is done in bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, rounded, bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.uint32, bitcast=True)
        size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        normal = (((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponent's bias 127 to 7
        small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF  # the addition rounds to a multiple of 2^-9
        coded = tl.where(x == x, tl.where(size < 0.015625, small, normal), 0x7F) | ((bits >> 24) & 0x80)
        return coded.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x itself in ``dtype``, or e4m3 to it, which is exact. Triton's interpreter knows no NaN of e4m3."""
    if INTERPRETED and x.dtype == tl.float8e4nv:
        isnan = (x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
        return tl.where(isnan, float("nan"), x.to(tl.float32)).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, total):
    """total + a @ b in fp32, float32 operands as they are. Triton's interpreter multiplies the bits of bf16; there it is
    widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def exp(x, PRECISE: tl.constexpr = False):
    """exp(x). By default one multiply and the hardware's 2^x, whose relative error grows with |x|: 3e-7 at 1, 2e-6 at 20, far
    under bf16's rounding. ``PRECISE`` (for float32 tensors) reduces the argument first: 6e-8 everywhere, 11 more operations.
    """
    if PRECISE:
        clamped = tl.minimum(tl.maximum(x, -87.0), 88.0)
        n = tl.floor(clamped * 1.4426950408889634 + 0.5)
        r = tl.fma(n, -0.693359375, clamped)
        r = tl.fma(n, 2.12194440e-4, r)
        p = tl.fma(r, 1.9841270e-4, 1.3888889e-3)  # without r^7 / 5040 the series is off by up to 1.3e-7
        p = tl.fma(p, r, 8.3333333e-3)
        p = tl.fma(p, r, 4.1666667e-2)
        p = tl.fma(p, r, 0.16666667)
        p = tl.fma(p, r, 0.5)
        p = tl.fma(p, r, 1.0)
        p = tl.fma(p, r, 1.0)
        p = p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        # What the clamp changed: 0 below the normal numbers, infinity above, NaN.
        p = tl.where(x < -87.0, 0.0, tl.where(x > 88.0, float("inf"), p))
        return tl.where(x == x, p, x)
    else:
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
