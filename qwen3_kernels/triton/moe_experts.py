"""The steps of `moe_experts` in Triton: grouped products over expert-sorted rows, each a grid of (row tile, column tile).

Row tiles never cross experts. Their number is known on the device alone, so the grid has as many as there can be, and a
program past the last one exits at once. An expert's last rows get a lower tile when they fit into it. Rows that a tile
has past its expert's end are computed from whatever lies there and not stored; in the gradients of weights, where rows are
summed over, they are masked. Gathered operands are read through pointers, the others and the weights by TMA where rows are
whole 16-byte units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.moe_router import Plan
from ._launch import cast, dependent, dot, exp, on_device, overlaps
from .swiglu import _divide


# --- Tiles.


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int  # of a step of the sum
    warps: int
    stages: int


# By step and rows per expert (the last bound that is at most R / E counts). For 16-bit tensors on sm_90, where two warp
# groups share a tile of 128 rows; small tiles use the older instructions, which a stream of weights does not notice.
TILES = {
    "up": {0: Tile(16, 32, 128, 4, 4), 4: Tile(16, 64, 128, 4, 3), 24: Tile(64, 64, 64, 4, 4),
           96: Tile(128, 128, 64, 8, 3)},
    "down": {0: Tile(16, 64, 128, 4, 4), 24: Tile(64, 128, 64, 4, 4), 96: Tile(128, 256, 64, 8, 3)},
    "down_backward": {0: Tile(16, 64, 128, 4, 3), 24: Tile(64, 128, 64, 4, 3), 96: Tile(128, 128, 64, 8, 3)},
    "up_backward": {0: Tile(16, 64, 128, 4, 4), 24: Tile(64, 128, 64, 4, 4), 96: Tile(128, 256, 64, 8, 3)},
    "weight_grad": {0: Tile(128, 128, 16, 4, 3), 24: Tile(128, 256, 64, 8, 3)},  # rows and cols of the weight
}
PLAIN = Tile(32, 64, 32, 4, 2)  # float32, which is multiplied as it is, without tensor cores; rows of odd sizes
SEARCHED = 32  # rows per expert below which each program finds its tile itself, which takes a microsecond but no launch


def tile_of(step: str, R: int, weight: Tensor) -> Tile:
    """Of a step with the weights (or gradients of weights) [E, P, Q]."""
    E, P, Q = weight.shape
    if weight.dtype == torch.float32 and step != "weight_grad" or P % 8 or Q % 8:
        return PLAIN
    table = TILES[step]
    return table[max(bound for bound in table if bound * E <= R)]


@triton.jit
def _find_tiles(offsets, index, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, end of the expert's rows) of tiles ``index`` [T]; row and end are 0 past the last tile."""
    experts = tl.arange(0, EP)
    begin = tl.load(offsets + experts, mask=experts < E, other=0)
    end = tl.load(offsets + 1 + experts, mask=experts < E, other=0)
    count = (end - begin + BM - 1) // BM
    last = tl.cumsum(count, 0)
    expert = tl.sum((last[None, :] <= index[:, None]).to(tl.int32), 1)
    own = experts[None, :] == expert[:, None]
    row = tl.sum(tl.where(own, begin[None, :] + (index[:, None] - (last - count)[None, :]) * BM, 0), 1)
    return expert, row, tl.sum(tl.where(own, end[None, :], 0), 1)


@triton.jit(do_not_specialize=["T"])
def _tiles_kernel(offsets, tiles, T, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, B: tl.constexpr):
    index = tl.program_id(0) * B + tl.arange(0, B)
    expert, row, end = _find_tiles(offsets, index, E, EP, BM)
    tl.store(tiles + index, expert, mask=index < T)
    tl.store(tiles + T + index, row, mask=index < T)
    tl.store(tiles + 2 * T + index, end, mask=index < T)


@triton.jit
def _tile(tiles, offsets, index, T, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    if tiles is None:
        expert, row, end = _find_tiles(offsets, index + tl.arange(0, 1), E, EP, BM)
        return tl.sum(expert, 0), tl.sum(row, 0), tl.sum(end, 0)
    else:
        return tl.load(tiles + index), tl.load(tiles + T + index), tl.load(tiles + 2 * T + index)


@triton.jit
def _weight_tile(
    weight, expert, row, col, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLS] of weight[expert], a [HEIGHT, WIDTH] matrix; zeros outside of it."""
    if TMA:
        return tl.reshape(weight.load([expert, row, col]), [ROWS, COLS])
    else:
        r = row + tl.arange(0, ROWS)[:, None]
        c = col + tl.arange(0, COLS)[None, :]
        at = weight + (expert.to(tl.int64) * HEIGHT + r) * WIDTH + c
        return tl.load(at, mask=(r < HEIGHT) & (c < WIDTH), other=0.0)


@triton.jit
def _gathered_tile(base, k, K: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] from column k of the rows that ``base`` [BM, 1] points to; zeros from column K on."""
    cols = k + tl.arange(0, BK)[None, :]
    if K % BK == 0:
        return tl.load(base + cols)
    else:
        return tl.load(base + cols, mask=cols < K, other=0.0)


@triton.jit
def _row_tile(rows, row, k, R, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[BM, BK] of a matrix of R rows; zeros outside of it."""
    if TMA:
        return rows.load([row, k])
    else:
        r = row + tl.arange(0, BM)[:, None]
        cols = k + tl.arange(0, BK)[None, :]
        return tl.load(rows + r.to(tl.int64) * K + cols, mask=(r < R) & (cols < K), other=0.0)


# --- The kernels.


@triton.jit(do_not_specialize=["T"])
def _up_kernel(
    x, gate_up, h, a, tiles, offsets, token, x_stride, T, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr, TMA: tl.constexpr,
):
    blocks: tl.constexpr = (I + BN - 1) // BN
    expert, row, end = _tile(tiles, offsets, tl.program_id(0) // blocks, T, E, EP, BM)
    n = (tl.program_id(0) % blocks) * BN
    if row < end:
        if True if LOW == BM else row + LOW < end:
            _up_tile(x, gate_up, h, a, token, x_stride, expert, row, end, n, D, I, BM, BN, BK, TMA)
        else:
            _up_tile(x, gate_up, h, a, token, x_stride, expert, row, end, n, D, I, LOW, BN, BK, TMA)


@triton.jit
def _up_tile(
    x, gate_up, h, a, token, x_stride, expert, row, end, n, D: tl.constexpr, I: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):
    rows = row + tl.arange(0, BM)
    base = x + tl.load(token + tl.minimum(rows, end - 1)).to(tl.int64)[:, None] * x_stride
    gate = tl.zeros([BM, BN], tl.float32)
    up_ = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        x_tile = _gathered_tile(base, k, D, BK)
        gate_tile = _weight_tile(gate_up, expert, n, k, 2 * I, D, BN, BK, TMA)
        up_tile = _weight_tile(gate_up, expert, I + n, k, 2 * I, D, BN, BK, TMA)
        gate = dot(x_tile, gate_tile.T, gate)
        up_ = dot(x_tile, up_tile.T, up_)
    dtype: tl.constexpr = a.dtype.element_ty
    cols = n + tl.arange(0, BN)[None, :]
    mask = (rows < end)[:, None] & (cols < I)
    at = rows.to(tl.int64)[:, None]
    if h is not None:
        tl.store(h + at * (2 * I) + cols, cast(gate, dtype), mask=mask)
        tl.store(h + at * (2 * I) + I + cols, cast(up_, dtype), mask=mask)
    silu = _divide(gate, 1.0 + exp(-gate, dtype == tl.float32), dtype)
    tl.store(a + at * I + cols, cast(silu * up_, dtype), mask=mask)


@triton.jit(do_not_specialize=["R", "T"])
def _rows_kernel(
    rows_in, low_rows, weight, out, tiles, offsets, R, T, K: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS_TMA: tl.constexpr, TMA: tl.constexpr,
):
    """out [R, N] = rows_in [R, K] @ weight[expert], which is [K, N], or [N, K] to be transposed. ``low_rows`` is rows_in
    for tiles of LOW rows."""
    blocks: tl.constexpr = (N + BN - 1) // BN
    expert, row, end = _tile(tiles, offsets, tl.program_id(0) // blocks, T, E, EP, BM)
    n = (tl.program_id(0) % blocks) * BN
    if row < end:
        if True if LOW == BM else row + LOW < end:
            _product_tile(rows_in, weight, out, R, expert, row, end, n, K, N, BM, BN, BK, TRANSPOSED, ROWS_TMA, TMA)
        else:
            _product_tile(low_rows, weight, out, R, expert, row, end, n, K, N, LOW, BN, BK, TRANSPOSED, ROWS_TMA, TMA)


@triton.jit
def _product_tile(
    rows_in, weight, out, R, expert, row, end, n, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS_TMA: tl.constexpr, TMA: tl.constexpr,
):
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        left = _row_tile(rows_in, row, k, R, K, BM, BK, ROWS_TMA)
        if TRANSPOSED:
            right = _weight_tile(weight, expert, n, k, N, K, BN, BK, TMA).T
        else:
            right = _weight_tile(weight, expert, k, n, K, N, BK, BN, TMA)
        total = dot(left, right, total)
    rows = row + tl.arange(0, BM)[:, None]
    cols = n + tl.arange(0, BN)[None, :]
    mask = (rows < end) & (cols < N)
    tl.store(out + rows.to(tl.int64) * N + cols, cast(total, out.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of x [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, [BM, 2, BN // 2]), (0, 2, 1)))


@triton.jit
def _swiglu_backward(da, weight, h, dh, a, rows, end, n, I: tl.constexpr, BN: tl.constexpr):
    """Stores columns n to n + BN of the gradient of h and of the weighted activation; returns the rows' sums of da · a."""
    dtype: tl.constexpr = dh.dtype.element_ty
    cols = n + tl.arange(0, BN)[None, :]
    mask = (rows < end)[:, None] & (cols < I)
    at = rows.to(tl.int64)[:, None]
    g = tl.load(h + at * (2 * I) + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h + at * (2 * I) + I + cols, mask=mask, other=0.0).to(tl.float32)
    s = _divide(1.0, 1.0 + exp(-g, dtype == tl.float32), dtype)
    silu = g * s
    act = silu * u
    tl.store(a + at * I + cols, cast(weight[:, None] * act, dtype), mask=mask)
    weighted = da * weight[:, None]
    tl.store(dh + at * (2 * I) + I + cols, cast(weighted * silu, dtype), mask=mask)
    tl.store(dh + at * (2 * I) + cols, cast(weighted * u * (s * (1.0 + g * (1.0 - s))), dtype), mask=mask)
    return tl.sum(tl.where(mask, da * act, 0.0), 1)


@triton.jit(do_not_specialize=["R", "T"])
def _down_backward_kernel(
    dout, down, h, weights, dh, a, partial, tiles, offsets, token, slot, dout_stride, R, T, D: tl.constexpr,
    I: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr,
    TMA: tl.constexpr,
):
    blocks: tl.constexpr = (I + BN - 1) // BN
    expert, row, end = _tile(tiles, offsets, tl.program_id(0) // blocks, T, E, EP, BM)
    block = tl.program_id(0) % blocks
    partial += block.to(tl.int64) * R
    n = block * BN
    if row < end:
        if True if LOW == BM else row + LOW < end:
            _down_backward_tile(dout, down, h, weights, dh, a, partial, token, slot, dout_stride, expert, row, end, n,
                                D, I, BM, BN, BK, TMA)
        else:
            _down_backward_tile(dout, down, h, weights, dh, a, partial, token, slot, dout_stride, expert, row, end, n,
                                D, I, LOW, BN, BK, TMA)


@triton.jit
def _down_backward_tile(
    dout, down, h, weights, dh, a, partial, token, slot, dout_stride, expert, row, end, n, D: tl.constexpr,
    I: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):
    rows = row + tl.arange(0, BM)
    inside = tl.minimum(rows, end - 1)
    base = dout + tl.load(token + inside).to(tl.int64)[:, None] * dout_stride
    da = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        left = _gathered_tile(base, k, D, BK)
        right = _weight_tile(down, expert, k, n, D, I, BK, BN, TMA)
        da = dot(left, right, da)
    weight = tl.load(weights + tl.load(slot + inside)).to(tl.float32)
    # In quarters: at once, the operands of SwiGLU's gradient would not fit into the registers.
    first, second = _halves(da, BM, BN)
    first, third = _halves(first, BM, BN // 2)
    second, fourth = _halves(second, BM, BN // 2)
    Q: tl.constexpr = BN // 4
    dot_ = _swiglu_backward(first, weight, h, dh, a, rows, end, n, I, Q)
    dot_ += _swiglu_backward(third, weight, h, dh, a, rows, end, n + Q, I, Q)
    dot_ += _swiglu_backward(second, weight, h, dh, a, rows, end, n + 2 * Q, I, Q)
    dot_ += _swiglu_backward(fourth, weight, h, dh, a, rows, end, n + 3 * Q, I, Q)
    tl.store(partial + rows, dot_, mask=rows < end)


@triton.jit(do_not_specialize=["R"])
def _dweights_kernel(partial, offsets, inverse, dweights, R, E: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr):
    """The sums of the column blocks' partial sums, in their order, at the places of the assignments."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    row = tl.load(inverse + at, mask=at < R, other=0)
    kept = (at < R) & (row < tl.load(offsets + E))
    total = tl.zeros([B], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + tl.cast(part, tl.int64) * R + row, mask=kept, other=0.0)
    tl.store(dweights + at, total, mask=at < R)


@triton.jit
def _combine_kernel(
    y, weights, out, offsets, inverse, D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's block of columns: its K rows, weighted, in the order of k."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(offsets + E)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + n * K + k)
        value = tl.load(y + row.to(tl.int64) * D + cols, mask=(cols < D) & (row < kept), other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + n * K + k).to(tl.float32)
        total += value
    tl.store(out + n * D + cols, cast(total, out.dtype.element_ty), mask=cols < D)


@triton.jit
def _weight_grad_kernel(
    left, right, out, offsets, token, left_stride, right_stride, P: tl.constexpr, Q: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GATHERED: tl.constexpr, ACCUMULATE: tl.constexpr,
):
    p_blocks: tl.constexpr = (P + BM - 1) // BM
    q_blocks: tl.constexpr = (Q + BN - 1) // BN
    pid = tl.program_id(0)
    expert = pid // (p_blocks * q_blocks)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if ACCUMULATE and begin >= end:
        return
    ps = (pid % p_blocks) * BM + tl.arange(0, BM)[None, :]
    qs = (pid // p_blocks % q_blocks) * BN + tl.arange(0, BN)[None, :]
    at = (expert.to(tl.int64) * P + ps.T) * Q + qs
    mask = (ps.T < P) & (qs < Q)
    if ACCUMULATE:
        total = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BM, BN], tl.float32)
    for start in range(begin, end, BK):
        row = start + tl.arange(0, BK)
        inside = (row < end)[:, None]
        left_row = row.to(tl.int64)[:, None]
        right_row = left_row
        if GATHERED == "left":
            left_row = tl.load(token + row, mask=row < end, other=0).to(tl.int64)[:, None]
        elif GATHERED == "right":
            right_row = tl.load(token + row, mask=row < end, other=0).to(tl.int64)[:, None]
        left_tile = tl.load(left + left_row * left_stride + ps, mask=inside & (ps < P), other=0.0)
        right_tile = tl.load(right + right_row * right_stride + qs, mask=inside & (qs < Q), other=0.0)
        total = dot(left_tile.T, right_tile, total)
    tl.store(out + at, cast(total, out.dtype.element_ty), mask=mask)


# --- A token or two, whose K rows are all there is: every matrix is multiplied with one row, without tensor cores, and
# many small programs keep the memory busy. Two launches, without a plan. The second one starts as soon as all programs
# of the first have (programmatic dependent launch) and reads its weights beside them; only then does it wait for the
# first to end, which every program has to do, so that it cannot end before the first. Ids and weights may be read before
# that: what the first launch found, which waited for all before it, is there for the second, too.


@triton.jit
def _decode_up_kernel(
    x, gate_up, ids, a, x_stride, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    blocks: tl.constexpr = (I + BN - 1) // BN
    r = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    expert = tl.load(ids + r).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    inside = (cols < I)[:, None]
    at = gate_up + (expert * 2 * I + cols)[:, None] * D
    gate = tl.zeros([BN, BK], tl.float32)
    up_ = tl.zeros([BN, BK], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        x_k = tl.load(x + r // K * x_stride + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
        mask = inside & (k < D)[None, :]
        gate += tl.load(at + k[None, :], mask=mask, other=0.0).to(tl.float32) * x_k
        up_ += tl.load(at + I * D + k[None, :], mask=mask, other=0.0).to(tl.float32) * x_k
    g = tl.sum(gate, 1)
    dtype: tl.constexpr = a.dtype.element_ty
    silu = _divide(g, 1.0 + exp(-g, dtype == tl.float32), dtype)
    tl.store(a + r * I + cols, cast(silu * tl.sum(up_, 1), dtype), mask=cols < I)


@triton.jit
def _decode_down_row(down, expert, kept, row, start, D: tl.constexpr, I: tl.constexpr, BK: tl.constexpr):
    """[KP, BK] of one row of the experts of a token."""
    i = start + tl.arange(0, BK)[None, :]
    return tl.load(down + (expert * D + row)[:, None] * I + i, mask=(kept & (row < D))[:, None] & (i < I), other=0.0)


@triton.jit
def _decode_weighted(a, r, kept, weight, start, I: tl.constexpr, BK: tl.constexpr):
    """[KP, BK] of weight · a"""
    i = start + tl.arange(0, BK)[None, :]
    return tl.load(a + r[:, None] * I + i, mask=kept[:, None] & (i < I), other=0.0).to(tl.float32) * weight[:, None]


@triton.jit
def _decode_down_kernel(
    a, down, ids, weights, out, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, HELD: tl.constexpr, OVERLAP: tl.constexpr,
):
    blocks: tl.constexpr = (D + BN - 1) // BN
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BN
    k = tl.arange(0, KP)
    r = n * K + k
    expert = tl.load(ids + r, mask=k < K, other=-1).to(tl.int64)
    kept = (expert >= 0) & (expert < E)
    weight = tl.load(weights + r, mask=kept, other=0.0).to(tl.float32)
    held = ()
    for step in tl.static_range(HELD):
        for row in tl.static_range(BN):
            held = held + (_decode_down_row(down, expert, kept, first + row, step * BK, D, I, BK),)
    if OVERLAP:
        gdc_wait()
    activations = ()
    for step in tl.static_range(HELD):
        activations = activations + (_decode_weighted(a, r, kept, weight, step * BK, I, BK),)
    rows = tl.arange(0, BN)
    sums = tl.zeros([KP, BN], tl.float32)
    for row in tl.static_range(BN):
        total = tl.zeros([KP, BK], tl.float32)
        for step in tl.static_range(HELD):
            total += held[step * BN + row].to(tl.float32) * activations[step]
        for start in range(HELD * BK, I, BK):
            tile = _decode_down_row(down, expert, kept, first + row, start, D, I, BK)
            total += tile.to(tl.float32) * _decode_weighted(a, r, kept, weight, start, I, BK)
        sums = tl.where(rows[None, :] == row, tl.sum(total, 1)[:, None], sums)
    at = first + rows
    tl.store(out + n * D + at, cast(tl.sum(sums, 0), out.dtype.element_ty), mask=at < D)


# --- The launches.


def decode(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    (N, D), (E, _, width), K = x.shape, down.shape, ids.shape[1]
    a = torch.empty(N * K, width, dtype=x.dtype, device=x.device)
    out = torch.empty(N, D, dtype=x.dtype, device=x.device)
    sizes = {"D": D, "I": width, "E": E, "K": K, "OVERLAP": overlaps(x.device)}
    KP, rows, depth = triton.next_power_of_2(K), 4, 256
    # What 8 warps hold in registers before they wait: 48 KB, and three programs a multiprocessor.
    held = min(triton.cdiv(width, depth), 49152 // (rows * KP * depth * x.element_size()))
    with on_device(x):
        _decode_up_kernel[(N * K * triton.cdiv(width, 4),)](
            x, gate_up, ids, a, x.stride(0), BN=4, BK=min(triton.next_power_of_2(D), 2048), num_warps=8, **sizes,
        )
        _decode_down_kernel[(N * triton.cdiv(D, rows),)](
            a, down, ids, weights, out, KP=KP, BN=rows, BK=depth, HELD=held, num_warps=8, **dependent(x.device),
            **sizes,
        )
    return out


def _descriptor(t: Tensor, block: list[int]) -> Tensor | TensorDescriptor:
    """For TMA when it can read the tensor, else the tensor itself."""
    whole_units = all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block) if whole_units and t.numel() else t


def _is_tma(t: object) -> bool:
    return isinstance(t, TensorDescriptor)


def _row_tiles(plan: Plan, BM: int, columns: int) -> tuple[tuple[int], dict]:
    """(grid, the arguments that tell a program its tile)."""
    R, E = plan.token.numel(), plan.offsets.numel() - 1
    T, EP = R // BM + min(E, R), max(triton.next_power_of_2(E), 2)
    tiles = None
    if R >= SEARCHED * E:
        tiles = torch.empty(3, T, dtype=torch.int32, device=plan.token.device)
        _tiles_kernel[(triton.cdiv(T, 64),)](plan.offsets, tiles, T, E=E, EP=EP, BM=BM, B=64, num_warps=4)
    return (T * columns,), {"tiles": tiles, "offsets": plan.offsets, "T": T, "E": E, "EP": EP}


def low(tile: Tile) -> int:
    """Rows of the tile that takes an expert's last rows when there are no more than that: with 512 rows an expert, whole
    tiles of 128 would compute an eighth too much. 64 is the least that a warp group multiplies."""
    return 64 if tile.rows == 128 else tile.rows


def _sizes(tile: Tile) -> dict:
    return {"BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}


def _row_sizes(tile: Tile) -> dict:
    return _sizes(tile) | {"LOW": low(tile)}


def up(x: Tensor, gate_up: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return _up(x, gate_up, plan, keep=True)


def activate(x: Tensor, gate_up: Tensor, plan: Plan) -> Tensor:
    return _up(x, gate_up, plan, keep=False)[1]


def _up(x: Tensor, gate_up: Tensor, plan: Plan, keep: bool) -> tuple[Tensor | None, Tensor]:
    (E, double, D), R = gate_up.shape, plan.token.numel()
    width, tile = double // 2, tile_of("up", R, gate_up)
    h = torch.empty(R, double, dtype=x.dtype, device=x.device) if keep else None
    a = torch.empty(R, width, dtype=x.dtype, device=x.device)
    weight = _descriptor(gate_up, [1, tile.cols, tile.depth])
    with on_device(x):
        grid, where = _row_tiles(plan, tile.rows, triton.cdiv(width, tile.cols))
        _up_kernel[grid](x, weight, h, a, token=plan.token, x_stride=x.stride(0), D=D, I=width, TMA=_is_tma(weight),
                         **where, **_row_sizes(tile))
    return h, a


def _rows_times_weight(step: str, rows: Tensor, weight: Tensor, plan: Plan, transposed: bool) -> Tensor:
    (R, K), E = rows.shape, weight.shape[0]
    N, tile = weight.shape[1 if transposed else 2], tile_of(step, R, weight)
    out = torch.empty(R, N, dtype=rows.dtype, device=rows.device)
    block = [1, tile.cols, tile.depth] if transposed else [1, tile.depth, tile.cols]
    left, low_left = (_descriptor(rows, [height, tile.depth]) for height in (tile.rows, low(tile)))
    right = _descriptor(weight, block)
    with on_device(rows):
        grid, where = _row_tiles(plan, tile.rows, triton.cdiv(N, tile.cols))
        _rows_kernel[grid](left, low_left, right, out, R=R, K=K, N=N, TRANSPOSED=transposed, ROWS_TMA=_is_tma(left),
                           TMA=_is_tma(right), **where, **_row_sizes(tile))
    return out


def down(a: Tensor, down: Tensor, plan: Plan) -> Tensor:
    return _rows_times_weight("down", a, down, plan, transposed=True)


def up_backward(dh: Tensor, gate_up: Tensor, plan: Plan) -> Tensor:
    return _rows_times_weight("up_backward", dh, gate_up, plan, transposed=False)


def down_backward(dout: Tensor, down: Tensor, h: Tensor, weights: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    (E, D, width), R, device = down.shape, plan.token.numel(), dout.device
    tile = tile_of("down_backward", R, down)
    blocks = triton.cdiv(width, tile.cols)
    dh, a = torch.empty_like(h), torch.empty(R, width, dtype=h.dtype, device=device)
    partial = torch.empty(blocks, R, dtype=torch.float32, device=device)
    dweights = torch.empty(weights.shape, dtype=torch.float32, device=device)
    weight = _descriptor(down, [1, tile.depth, tile.cols])
    with on_device(dout):
        grid, where = _row_tiles(plan, tile.rows, blocks)
        _down_backward_kernel[grid](
            dout, weight, h, weights, dh, a, partial, token=plan.token, slot=plan.slot, dout_stride=dout.stride(0), R=R,
            D=D, I=width, TMA=_is_tma(weight), **where, **_row_sizes(tile),
        )
        _dweights_kernel[(triton.cdiv(R, 512),)](
            partial, plan.offsets, plan.inverse, dweights, R, E=E, PARTS=blocks, B=512, num_warps=4,
        )
    return dweights, dh, a


def combine(y: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    return _combine(y, weights, plan, weights.shape[0])


def combine_backward(dx_rows: Tensor, plan: Plan, N: int) -> Tensor:
    return _combine(dx_rows, None, plan, N)


def _combine(y: Tensor, weights: Tensor | None, plan: Plan, N: int) -> Tensor:
    (R, D), block = y.shape, min(triton.next_power_of_2(y.shape[1]), 1024)
    out = torch.empty(N, D, dtype=y.dtype, device=y.device)
    with on_device(y):
        _combine_kernel[(N * triton.cdiv(D, block),)](
            y, weights, out, plan.offsets, plan.inverse, D=D, K=R // N, E=plan.offsets.numel() - 1, BLOCK=block,
            num_warps=4,
        )
    return out


def weight_grad(left: Tensor, right: Tensor, plan: Plan, out: Tensor, accumulate: bool, gathered: str) -> None:
    E, P, Q = out.shape
    tile = PLAIN if left.dtype == torch.float32 else tile_of("weight_grad", plan.token.numel(), out)
    grid = (E * triton.cdiv(P, tile.rows) * triton.cdiv(Q, tile.cols),)
    with on_device(left):
        _weight_grad_kernel[grid](
            left, right, out, plan.offsets, plan.token, left.stride(0), right.stride(0), P=P, Q=Q,
            GATHERED=gathered, ACCUMULATE=accumulate, **_sizes(tile),
        )
