"""The Triton kernel of `adamw`: a block of one of many tensors a program, found in a table of pointers.

Each value is read and written once: 14 bytes a parameter where all are bfloat16, so the ceiling is the copy bandwidth.
A thread holds 8 values, 16 bytes of each bfloat16 tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwen3_kernels.triton._launch import cast

from .draw_kernel import splitmix64

BLOCK, WARPS = 2048, 8
# Columns of the table, int64: six addresses, the key of the noise, elements, and the number of the first block.
WEIGHT, GRAD, MOMENT, SQUARE, COPY, COUNT, KEY, SIZE, BEGIN, COLUMNS = (tl.constexpr(i) for i in range(10))


@triton.jit(do_not_specialize=["n"])
def count_kernel(table, corrections, skip, n, LOG_1: tl.constexpr, LOG_2: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the step, and writes [n, 2] what moments, and roots of squares, are multiplied by: in float64, as
    1 - beta^t cancels. The logarithms are constants because numbers would arrive in float32."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < n
    at = tl.load(table + tensor * COLUMNS + COUNT, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(at, mask=mask, other=0.0)
    t = (count + 1.0).to(tl.float64)
    tl.store(corrections + 2 * tensor, (1.0 / (1.0 - tl.exp(t * LOG_1))).to(tl.float32), mask=mask)
    tl.store(corrections + 2 * tensor + 1, (1.0 / tl.sqrt(1.0 - tl.exp(t * LOG_2))).to(tl.float32), mask=mask)
    taken = 1.0
    if skip is not None:
        taken = 1.0 - tl.load(skip)
    tl.store(at, count + taken, mask=mask)


@triton.jit
def _pointers(row, column: tl.constexpr, dtype: tl.constexpr, begin, places, ALIGNED: tl.constexpr):
    base = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + begin + places


@triton.jit
def _store(pointers, x, noise, mask, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Rounds to the nearest, or (only to bfloat16) up as often as the 16 bits of ``noise`` say."""
    if STOCHASTIC and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, (bits + (noise & 0xFFFF).to(tl.uint32)) & 0xFFFF0000, bits)
        x = bits.to(tl.float32, bitcast=True)
    tl.store(pointers, cast(x, dtype), mask=mask)


@triton.jit(do_not_specialize=["n"])
def adamw_kernel(
    table, corrections, scale, skip, n, lr, decay, beta1, rest1, beta2, rest2, eps,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISE: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):
    go = True
    if skip is not None:
        go = tl.load(skip) == 0
    if go:
        block = tl.program_id(0).to(tl.int64)
        tensor = 0  # the last that begins at this block or before; those without elements begin where the next one does
        for i in tl.static_range(HALVINGS):
            probe = tensor + (1 << (HALVINGS - 1 - i))
            begins = tl.load(table + probe * COLUMNS + BEGIN, mask=probe < n, other=1 << 62)
            tensor = tl.where(begins <= block, probe, tensor)
        row = table + tensor * COLUMNS
        begin = (block - tl.load(row + BEGIN)) * BLOCK
        left = tl.minimum(tl.load(row + SIZE) - begin, BLOCK).to(tl.int32)
        if ALIGNED:
            left = tl.multiple_of(left, 16)
        places = tl.arange(0, BLOCK)
        mask = places < left

        at_w = _pointers(row, WEIGHT, W, begin, places, ALIGNED)
        at_m = _pointers(row, MOMENT, M, begin, places, ALIGNED)
        at_v = _pointers(row, SQUARE, V, begin, places, ALIGNED)
        w = tl.load(at_w, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(_pointers(row, GRAD, G, begin, places, ALIGNED), mask=mask, other=0.0).to(tl.float32)
        m = tl.load(at_m, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(at_v, mask=mask, other=0.0).to(tl.float32)

        if scale is not None:
            g *= tl.div_rn(1.0, tl.load(scale).to(tl.float32))
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        rate = lr * tl.load(corrections + 2 * tensor)
        unbias = tl.load(corrections + 2 * tensor + 1)
        w -= decay * w
        if PRECISE:
            w -= tl.div_rn(rate * m, tl.sqrt_rn(v) * unbias + eps)
        else:
            w -= rate * m / (tl.sqrt(v) * unbias + eps)

        noise = tl.zeros((BLOCK,), tl.int64)
        if STOCHASTIC:
            noise = splitmix64(tl.load(row + KEY), begin + places)
        _store(at_w, w, noise, mask, W, STOCHASTIC)
        _store(at_m, m, noise >> 16, mask, M, STOCHASTIC)
        _store(at_v, v, noise >> 32, mask, V, STOCHASTIC)
        if C is not None:
            _store(_pointers(row, COPY, C, begin, places, ALIGNED), w, noise, mask, C, False)
