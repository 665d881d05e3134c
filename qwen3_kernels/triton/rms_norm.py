"""RMSNorm in Triton. The forward gives a program one tile of whole rows; the backward keeps a few programs per
multiprocessor, each walks its rows and sums dweight in registers, and a second launch adds those partials in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cast, load, multiprocessors, on_device, row_major, sum_partials


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x, residual, weight, y, h, rstd, N, x_stride, residual_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = None
    if BLOCK != H:
        mask = (rows < N) & (cols < H)
    elif not FULL:
        mask = rows < N
    v = load(x + rows * x_stride + cols, mask).to(tl.float32)
    w = load(weight + cols, None if BLOCK == H else cols < H)  # asked for here, it arrives while the row is summed
    if residual is not None:
        total = cast(v + load(residual + rows * residual_stride + cols, mask).to(tl.float32), h.dtype.element_ty)
        tl.store(h + rows * H + cols, total, mask=mask)
        v = total.to(tl.float32)  # what is normalised is the rounded sum, as it is what the next layer sees
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, 1, keep_dims=True) / H + eps))
    if FULL:
        tl.store(rstd + rows, scale)
    else:
        tl.store(rstd + rows, scale, mask=rows < N)
    tl.store(y + rows * H + cols, cast(v * scale * w.to(tl.float32), y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dy, dh, h, weight, rstd, dx, partial, N, dy_stride, dh_stride, h_stride,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    step = tl.num_programs(0) * ROWS
    first = tl.program_id(0) * ROWS
    lane = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = None if BLOCK == H else cols < H
    w = load(weight + cols, inside).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)

    # The next tile is loaded before this one is worked on: with few programs, nothing else would hide the latency.
    rows = (first + lane).to(tl.int64)
    mask = rows < N if BLOCK == H else (rows < N) & (cols < H)
    next_h = tl.load(h + rows * h_stride + cols, mask=mask, other=0.0)
    next_dy = tl.load(dy + rows * dy_stride + cols, mask=mask, other=0.0)
    for start in range(first, N, step):
        rows = (start + lane).to(tl.int64)
        mask = rows < N if BLOCK == H else (rows < N) & (cols < H)
        this_h, this_dy = next_h, next_dy
        scale = tl.load(rstd + rows, mask=rows < N, other=0.0)
        if dh is not None:
            this_dh = tl.load(dh + rows * dh_stride + cols, mask=mask, other=0.0)
        ahead = rows + step
        ahead_mask = ahead < N if BLOCK == H else (ahead < N) & (cols < H)
        next_h = tl.load(h + ahead * h_stride + cols, mask=ahead_mask, other=0.0)
        next_dy = tl.load(dy + ahead * dy_stride + cols, mask=ahead_mask, other=0.0)

        normed = this_h.to(tl.float32) * scale
        g = this_dy.to(tl.float32)
        dweight += g * normed
        g *= w
        mean = tl.sum(g * normed, 1, keep_dims=True) / H
        d = (g - normed * mean) * scale
        if dh is not None:
            d += this_dh.to(tl.float32)
        tl.store(dx + rows * H + cols, cast(d, dx.dtype.element_ty), mask=mask)
    out = partial + tl.program_id(0).to(tl.int64) * H + tl.arange(0, BLOCK)
    tl.store(out, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK) < H)


def _tile(H: int, elements: int) -> tuple[int, int]:
    """(row width as a power of two, rows per tile). It depends on H alone: a row's bits must not depend on the batch."""
    block = triton.next_power_of_2(H)
    return block, min(max(1, elements // block), 32)


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    n, width = x.shape
    x, weight = row_major(x), weight.contiguous()
    if residual is not None:
        residual = row_major(residual)
    y = torch.empty((n, width), dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    # 32 values a thread are four 16-byte loads of bf16 in flight, enough to fill the memory pipe without spilling.
    block, rows = _tile(width, 4096)
    with on_device(x):
        _forward_kernel[(triton.cdiv(n, rows),)](
            x, residual, weight, y, h, rstd, n, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            H=width, BLOCK=block, ROWS=rows, FULL=n % rows == 0, num_warps=_warps(block * rows, 1024),
        )
    return y, h, rstd


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    n, width = h.shape
    dy, h, weight = row_major(dy), row_major(h), weight.contiguous()
    if dh is not None:
        dh = row_major(dh)
    dx = torch.empty((n, width), dtype=h.dtype, device=h.device)
    dweight = torch.empty_like(weight)
    # 16 values a thread: two tiles of h and dy, the weight and the sum of dweight live in registers at once.
    block, rows = _tile(width, 2048)
    warps = _warps(block * rows, 512)
    # As many programs as fit: 16 warps of about 128 registers on each multiprocessor.
    programs = min(triton.cdiv(n, rows), multiprocessors(h.device) * max(1, 16 // warps))
    partial = torch.empty((programs, width), dtype=torch.float32, device=h.device)
    with on_device(h):
        _backward_kernel[(programs,)](
            dy, dh, h, weight, rstd, dx, partial, n, dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
            H=width, BLOCK=block, ROWS=rows, num_warps=warps,
        )
        sum_partials(partial, dweight)
    return dx, dweight


def _warps(elements: int, per_warp: int) -> int:
    return min(max(1, elements // per_warp), 32)
