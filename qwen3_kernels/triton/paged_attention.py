"""Split-KV attention over pages in Triton: one program for each row, key head and split of the keys, then one for each
query that puts the splits together in their order.

A split is SPLIT keys, whatever the batch, the longest row or the GPU: where a row's keys are cut, and in which order
what comes of them is summed, follows from their positions alone. That is what makes the bits of a row its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import INTERPRETED, cast, dependent, dot, exp, on_device, overlaps, row_major, widen

# Keys of a split. Few, so that a single row of a few thousand tokens still fills a GPU (8 key heads and 4096 keys are
# 128 programs); many, so that partial results stay small beside the keys and values: with 4 queries a key head in bf16,
# 2 KB written and read again for 128 KB.
SPLIT = 256
CHUNK = 64  # splits that are put together at once: one round of loads up to 16K keys


@triton.jit
def _even_and_odd(pairs):
    """Columns 0, 2, 4, ... and 1, 3, 5, ... in fp16 of e4m3 numbers that lie two to an int16.

    The tensor cores want two numbers of a column of the values side by side. What transposes on the way out of shared
    memory moves units of 16 bits; of single bytes, each would be a load by itself.
    """
    if INTERPRETED:
        even = widen((pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True), tl.float16)
        return even, widen(((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True), tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, $2, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )


@triton.jit
def _weighted(p, values, out, dtype: tl.constexpr):
    """out + p @ values"""
    rounded = cast(p, dtype)
    out = dot(rounded, values, out)
    if dtype != tl.float32:
        # What rounding took away, in a second product: the tensor cores wait for memory anyway.
        out = dot(cast(p - rounded.to(tl.float32), dtype), values, out)
    return out


@triton.jit(do_not_specialize=["table_stride", "room", "splits"])
def _split_kernel(
    q, k_pages, v_pages, table, lengths, k_scale, partial, peaks, sums, scale, q_row, q_token, q_head, k_page, k_slot,
    k_head, v_page, v_slot, v_head, table_stride, room, splits, PAGE: tl.constexpr, TQ: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISE: tl.constexpr, OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    # 8-bit keys and values are multiplied in fp16: the hardware turns e4m3 into that, and into bf16 by way of it only.
    # Two to an int16 they are multiplied as two products, of their even and of their odd columns.
    PAIRED: tl.constexpr = k_pages.dtype.element_ty == tl.int16
    EIGHT: tl.constexpr = PAIRED or k_pages.dtype.element_ty == tl.float8e4nv
    dtype: tl.constexpr = tl.float16 if EIGHT and q.dtype.element_ty == tl.bfloat16 else q.dtype.element_ty
    WIDTH: tl.constexpr = DP // 2 if PAIRED else DP  # columns of a product
    LIFT: tl.constexpr = 16384.0 if dtype == tl.float16 else 1.0  # small probabilities become normal numbers of fp16
    row = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (TQ * GROUP + ROWS - 1) // ROWS
    head = tl.program_id(1) // TILES
    length = tl.minimum(tl.load(lengths + row), room)
    begin = tl.program_id(2) * SPLIT
    if begin < length:
        cols = tl.arange(0, DP)
        inside = cols[None, :] < D
        # All queries of the key head, token by token: they share the loads of its keys and values.
        at = (tl.program_id(1) % TILES) * ROWS + tl.arange(0, ROWS)
        there = at < TQ * GROUP
        last = length - TQ + at // GROUP  # the position of each query
        rows = row * q_row + (at // GROUP) * q_token + (head * GROUP + at % GROUP) * q_head
        queries = tl.load(q + rows[:, None] + cols[None, :], mask=there[:, None] & inside, other=0.0)
        if k_scale is not None:
            scale *= tl.load(k_scale + head)
        factor = tl.full([ROWS], 1.0, tl.float32) * scale
        if dtype != q.dtype.element_ty:
            # A query in fp16 is scaled by a power of two, so that its largest number lies in [1, 2).
            queries = queries.to(tl.float32)
            power = tl.max(tl.abs(queries), 1).to(tl.uint32, bitcast=True) & 0x7F800000
            power = tl.minimum(power, 253 << 23)  # its inverse is a normal number
            queries *= ((254 << 23) - power).to(tl.float32, bitcast=True)[:, None]
            factor *= power.to(tl.float32, bitcast=True)
        queries = queries.to(dtype)
        if PAIRED:
            queries, odd_queries = tl.split(tl.reshape(queries, [ROWS, WIDTH, 2]))
            odd_out = tl.zeros([ROWS, WIDTH], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, WIDTH], tl.float32)
        units = tl.arange(0, WIDTH)
        end = tl.minimum(begin + SPLIT, length)
        for start in range(begin, end, KEYS):
            pos = start + tl.arange(0, KEYS)
            filled = pos < end
            page = tl.load(table + row * table_stride + pos // PAGE, mask=filled, other=0).to(tl.int64)
            wanted = filled[:, None] & (units < (D // 2 if PAIRED else D))[None, :]
            k_at = page * k_page + (pos % PAGE) * k_slot + head * k_head
            keys = tl.load(k_pages + k_at[:, None] + units[None, :], mask=wanted, other=0.0)
            scores = tl.zeros([ROWS, KEYS], tl.float32)
            if PAIRED:
                keys, odd_keys = _even_and_odd(keys)
                scores = dot(odd_queries, tl.trans(odd_keys), scores)
            scores = dot(queries, tl.trans(widen(keys, dtype)), scores) * factor[:, None]
            scores = tl.where(filled[None, :] & (pos[None, :] <= last[:, None]), scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: exp(-inf) below, not exp(NaN)
            p = exp(scores - base[:, None], PRECISE)
            shrink = exp(peak - base, PRECISE)
            total = total * shrink + tl.sum(p, 1)
            v_at = page * v_page + (pos % PAGE) * v_slot + head * v_head
            values = tl.load(v_pages + v_at[:, None] + units[None, :], mask=wanted, other=0.0)
            if PAIRED:
                values, odd_values = _even_and_odd(values)
                odd_out = _weighted(p * LIFT, odd_values, odd_out * shrink[:, None], dtype)
            out = _weighted(p * LIFT, widen(values, dtype), out * shrink[:, None], dtype)
            peak = higher
        if PAIRED:
            out = tl.interleave(out, odd_out)
        slot = ((row * (tl.num_programs(1) // TILES) + head) * (TQ * GROUP) + at) * splits + tl.program_id(2)
        # Peak and sum apart: their logarithm would round, and large scores lose what tells splits apart.
        tl.store(peaks + slot, peak, mask=there)
        tl.store(sums + slot, total, mask=there)
        tl.store(partial + slot[:, None] * D + cols[None, :], out / LIFT, mask=there[:, None] & inside)


@triton.jit(do_not_specialize=["room", "splits"])
def _combine_kernel(
    partial, peaks, sums, lengths, v_scale, out, lse, room, splits, TQ: tl.constexpr, GROUP: tl.constexpr,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    PRECISE: tl.constexpr, OVERLAP: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)  # (row, key head, token, query of the key head)
    row = query // (HK * TQ * GROUP)
    head = query // (TQ * GROUP) % HK
    used = tl.cdiv(tl.minimum(tl.load(lengths + row), room), SPLIT)
    if v_scale is not None:
        factor = tl.load(v_scale + head)
    if OVERLAP:
        # Launched as soon as all splits have begun. So far nothing of theirs was read; what they found, which waited for
        # all before them, is there. Every program waits, so that this launch does not end before theirs.
        gdc_wait()
    cols = tl.arange(0, DP)
    inside = cols[None, :] < D
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    value = tl.zeros([DP], tl.float32)
    for start in range(0, used, CHUNK):
        split = start + tl.arange(0, CHUNK)
        there = split < used
        slot = query * splits + split
        own = tl.load(peaks + slot, mask=there, other=float("-inf"))
        own_sum = tl.load(sums + slot, mask=there, other=0.0)
        part = tl.load(partial + slot[:, None] * D + cols[None, :], mask=there[:, None] & inside, other=0.0)
        higher = tl.maximum(peak, tl.max(own, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = exp(own - base, PRECISE)
        shrink = exp(peak - base, PRECISE)
        total = total * shrink + tl.sum(weight * own_sum, 0)
        value = value * shrink + tl.sum(weight[:, None] * part, 0)
        peak = higher
    total = tl.where(total == 0.0, 1.0, total)  # no key: 0, and -inf below
    value = tl.div_rn(value, tl.broadcast_to(total, [DP]))
    if v_scale is not None:
        value *= factor
    token = query // GROUP % TQ
    to = (row * TQ + token) * (HK * GROUP) + head * GROUP + query % GROUP
    tl.store(out + to * D + cols, cast(value, out.dtype.element_ty), mask=cols < D)
    tl.store(lse + to, (peak.to(tl.float64) + tl.log(total.to(tl.float64))).to(tl.float32))


@triton.jit
def _write_kernel(
    k, v, k_pages, v_pages, table, positions, k_scale, v_scale, k_row, k_token, k_head, v_row, v_token, v_head,
    kp_page, kp_slot, kp_head, vp_page, vp_slot, vp_head, table_stride, T, PAGE: tl.constexpr, HK: tl.constexpr,
    D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
):
    row = (tl.program_id(0) // T).to(tl.int64)
    token = tl.program_id(0) % T
    pos = tl.load(positions + row * T + token)
    if pos >= 0:
        page = tl.load(table + row * table_stride + pos // PAGE).to(tl.int64)
        heads, cols = tl.arange(0, HP), tl.arange(0, DP)
        mask = (heads < HK)[:, None] & (cols < D)[None, :]
        for what in tl.static_range(2):
            if what == 0:
                new = k + row * k_row + token * k_token + heads[:, None] * k_head
                into = k_pages + page * kp_page + (pos % PAGE) * kp_slot + heads[:, None] * kp_head
                scales = k_scale
            else:
                new = v + row * v_row + token * v_token + heads[:, None] * v_head
                into = v_pages + page * vp_page + (pos % PAGE) * vp_slot + heads[:, None] * vp_head
                scales = v_scale
            x = tl.load(new + cols[None, :], mask=mask, other=0.0)
            if scales is not None:
                by = tl.load(scales + heads, mask=heads < HK, other=1.0)
                x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(by[:, None], [HP, DP]))
                x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))  # NaN stays
                x = cast(x, into.dtype.element_ty)
            tl.store(into + cols[None, :], x, mask=mask)


def _in_pairs(pages: Tensor) -> Tensor:
    """int16 in place of every two e4m3 numbers, where each lies at an even address; else the pages themselves."""
    whole = all(n % 2 == 0 for n in (pages.shape[-1], pages.storage_offset(), *pages.stride()[:-1]))
    return pages.view(torch.int16) if whole and pages.shape[-1] > 16 else pages  # 16: the least a product takes


def _padded(D: int) -> int:
    return max(triton.next_power_of_2(D), 16)  # the least a matrix product takes


def forward(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:
    (B, TQ, HQ, D), (_, PAGE, HK, _) = q.shape, k_pages.shape
    GROUP, full = HQ // HK, q.dtype == torch.float32
    q, page_table, lengths = row_major(q), row_major(page_table), lengths.contiguous()
    room = page_table.shape[1] * PAGE
    splits = triton.cdiv(room, SPLIT)
    # float32 is multiplied without tensor cores, in registers: small tiles do not spill.
    most, keys, warps = (16, 16, 8) if full else (64, 64, 4)
    rows = min(max(triton.next_power_of_2(TQ * GROUP), 16), most)
    # Of 5 stages two load page numbers and two hold keys and values; three programs fit on a multiprocessor. The
    # products of 64 rows are asynchronous and hold one more: 4 stages let two programs fit.
    stages, options = 4 if rows == 64 and k_pages.itemsize > 1 else 5, {}
    floats = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(B * TQ * HQ, splits, D, **floats)
    peaks, sums = (torch.empty(B * TQ * HQ, splits, **floats) for _ in range(2))
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(B, TQ, HQ, **floats)
    sizes = {"TQ": TQ, "GROUP": GROUP, "D": D, "DP": _padded(D), "SPLIT": SPLIT, "PRECISE": full,
             "OVERLAP": overlaps(q.device)}
    k_scale, v_scale = (None if s is None else s.contiguous() for s in (k_scale, v_scale))
    if k_pages.itemsize == 1 and not full:
        pairs = [_in_pairs(pages) for pages in (k_pages, v_pages)]
        if all(p.dtype == torch.int16 for p in pairs):
            k_pages, v_pages = pairs
            if rows == 16 and D <= 128:
                # Half the bytes a block: a third block in flight, and so few registers that four programs fit.
                stages, options = 7, {"maxnreg": 128}
    with on_device(q):
        # Rows vary fastest: splits that no row reaches, in a table with room to spare, come last and do nothing.
        _split_kernel[(B, HK * triton.cdiv(TQ * GROUP, rows), splits)](
            q, k_pages, v_pages, page_table, lengths, k_scale, partial, peaks, sums, scale, *q.stride()[:3],
            *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0), room, splits, PAGE=PAGE, ROWS=rows,
            KEYS=keys, num_warps=warps, num_stages=stages, **options, **sizes,
        )
        _combine_kernel[(B * TQ * HQ,)](
            partial, peaks, sums, lengths, v_scale, out, lse, room, splits, HK=HK, CHUNK=CHUNK, num_warps=4,
            **dependent(q.device), **sizes,
        )
    return out, lse


def write(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, positions: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:
    (B, T, HK, D), k, v, page_table = k.shape, row_major(k), row_major(v), row_major(page_table)
    k_scale, v_scale = (None if s is None else s.contiguous() for s in (k_scale, v_scale))
    with on_device(k):
        _write_kernel[(B * T,)](
            k, v, k_pages, v_pages, page_table, positions.contiguous(), k_scale, v_scale, *k.stride()[:3],
            *v.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0), T,
            PAGE=k_pages.shape[1], HK=HK, D=D, HP=triton.next_power_of_2(HK), DP=_padded(D), num_warps=4,
        )
