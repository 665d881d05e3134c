"""The router and the routing plan in Triton. A program holds whole rows of the logits; the plan takes two launches, one
that counts each expert's assignments in chunks of them, and one that places every assignment behind its predecessors; a
single one for a few tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.moe_router import Plan
from ._launch import cast, exp, multiprocessors, on_device, row_major, sum_partials


@triton.jit
def _kept(x, at, cols, inside):
    """x [ROWS, E] at column ``at`` of each row; NaN where ``inside`` is false."""
    value = tl.sum(tl.where(cols == at[:, None], x, 0.0), 1)
    return tl.where(inside, value, float("nan"))


@triton.jit
def _normalised(e):
    """(e over its row's sum, that sum in float64). All probabilities of a token would share the sum's rounding, which shows
    in a few tokens' sums of them; so its reciprocal is two numbers."""
    total = tl.sum(e.to(tl.float64), 1)
    inverse = 1.0 / total
    high = inverse.to(tl.float32)
    low = (inverse - high.to(tl.float64)).to(tl.float32)
    return tl.fma(e, tl.broadcast_to(high[:, None], e.shape), e * low[:, None]), total


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    logits, given, mask, weights, ids, lse, partial, N, stride, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, RENORMALISE: tl.constexpr,
):
    cols = tl.arange(0, EP)[None, :]
    ks = tl.arange(0, KP)[None, :]
    prob_sum = tl.zeros([EP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < N
        row = row.to(tl.int64)
        full = there[:, None] & (cols < E)
        x = tl.load(logits + row[:, None] * stride + cols, mask=full, other=float("-inf")).to(tl.float32)
        x = tl.where(there[:, None] | (cols > 0), x, 0.0)  # rows past the end: finite
        peak = tl.max(x, 1)
        e = exp(x - peak[:, None], True)
        p, total = _normalised(e)
        defined = total == total
        tl.store(lse + row, (peak.to(tl.float64) + tl.log(total)).to(tl.float32), mask=there)
        if partial is not None:
            share = p
            if mask is not None:
                share = p * tl.load(mask + row, mask=there, other=0.0)[:, None]
            prob_sum += tl.sum(tl.where(there[:, None] & (cols < E), share, 0.0), 0)
        left = tl.where(cols < E, p, -1.0)
        value = tl.full([ROWS, KP], float("-inf"), tl.float32)  # logits of the chosen, or their probabilities
        for k in range(K):
            if given is None:
                best = tl.max(left, 1)
                at = tl.min(tl.where(left == best[:, None], cols, E - 1), 1)
                left = tl.where(cols == at[:, None], -1.0, left)
                inside = defined
            else:
                at = tl.load(given + row * K + k, mask=there, other=0)
                inside = defined & (at >= 0) & (at < E)
            tl.store(ids + row * K + k, at.to(tl.int64), mask=there)
            value = tl.where(ks == k, _kept(x if RENORMALISE else p, at, cols, inside)[:, None], value)
        if RENORMALISE:
            value = exp(value - tl.max(value, 1)[:, None], True)
            value = tl.div_rn(value, tl.broadcast_to(tl.sum(value, 1)[:, None], [ROWS, KP]))
        tl.store(weights + row[:, None] * K + ks, value, mask=there[:, None] & (ks < K))
    if partial is not None:
        tl.store(partial + tl.program_id(0) * E + tl.arange(0, EP), prob_sum, mask=tl.arange(0, EP) < E)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dweights, dprob_sum, dlse, logits, ids, mask, dlogits, N, stride, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, RENORMALISE: tl.constexpr,
):
    cols = tl.arange(0, EP)[None, :]
    ks = tl.arange(0, KP)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    row = row.to(tl.int64)
    full = there[:, None] & (cols < E)
    x = tl.load(logits + row[:, None] * stride + cols, mask=full, other=float("-inf")).to(tl.float32)
    x = tl.where(there[:, None] | (cols > 0), x, 0.0)
    e = exp(x - tl.max(x, 1)[:, None], True)
    p, _ = _normalised(e)
    dx = tl.zeros([ROWS, EP], tl.float32)
    dp = tl.zeros([ROWS, EP], tl.float32)
    if dprob_sum is not None:
        dp += tl.load(dprob_sum + cols, mask=cols < E, other=0.0)
        if mask is not None:
            dp *= tl.load(mask + row, mask=there, other=0.0)[:, None]
    if dweights is not None:
        if RENORMALISE:
            value = tl.full([ROWS, KP], float("-inf"), tl.float32)
            for k in range(K):
                at = tl.load(ids + row * K + k, mask=there, other=0)
                value = tl.where(ks == k, tl.sum(tl.where(cols == at[:, None], x, 0.0), 1)[:, None], value)
            w = exp(value - tl.max(value, 1)[:, None], True)
            w = tl.div_rn(w, tl.broadcast_to(tl.sum(w, 1)[:, None], [ROWS, KP]))
            dw = tl.load(dweights + row[:, None] * K + ks, mask=there[:, None] & (ks < K), other=0.0)
            d = w * (dw - tl.sum(w * dw, 1)[:, None])
            for k in range(K):
                at = tl.load(ids + row * K + k, mask=there, other=0)
                dx += tl.where(cols == at[:, None], tl.sum(tl.where(ks == k, d, 0.0), 1)[:, None], 0.0)
        else:
            for k in range(K):
                at = tl.load(ids + row * K + k, mask=there, other=0)
                dw = tl.load(dweights + row * K + k, mask=there, other=0.0)
                dp += tl.where(cols == at[:, None], dw[:, None], 0.0)
    dx += p * (dp - tl.sum(p * dp, 1)[:, None])
    if dlse is not None:
        dx += p * tl.load(dlse + row, mask=there, other=0.0)[:, None]
    tl.store(dlogits + row[:, None] * E + cols, cast(dx, dlogits.dtype.element_ty), mask=full)


def _sizes(E: int, K: int, renormalise: bool) -> dict:
    EP = max(triton.next_power_of_2(E), 2)
    return {"E": E, "K": K, "ROWS": min(max(2048 // EP, 1), 32), "EP": EP, "KP": max(triton.next_power_of_2(K), 2),
            "RENORMALISE": renormalise, "num_warps": 4}


def forward(
    logits: Tensor, top_k: int, renormalise: bool, expert_ids: Tensor | None, mask: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, E), device = logits.shape, logits.device
    logits, sizes = row_major(logits), _sizes(E, top_k, renormalise)
    expert_ids = None if expert_ids is None else expert_ids.contiguous()
    floats = {"dtype": torch.float32, "device": device}
    weights, lse = torch.empty(N, top_k, **floats), torch.empty(N, **floats)
    prob_sum = torch.empty(E if stats else 0, **floats)
    ids = torch.empty(N, top_k, dtype=torch.int64, device=device)
    programs = min(triton.cdiv(N, sizes["ROWS"]), 4 * multiprocessors(device))
    partial = torch.empty(programs, E, **floats) if stats else None
    with on_device(logits):
        _forward_kernel[(programs,)](
            logits, expert_ids, mask, weights, ids, lse, partial, N, logits.stride(0), **sizes,
        )
        if stats:
            sum_partials(partial, prob_sum)
    return weights, ids, prob_sum, lse


def backward(
    dweights: Tensor | None, dprob_sum: Tensor | None, dlse: Tensor | None, logits: Tensor, ids: Tensor,
    mask: Tensor | None, renormalise: bool,
) -> Tensor:
    (N, E), sizes = logits.shape, _sizes(logits.shape[1], ids.shape[1], renormalise)
    logits, dlogits = row_major(logits), torch.empty(N, E, dtype=logits.dtype, device=logits.device)
    given = (None if t is None else t.contiguous() for t in (dweights, dprob_sum, dlse))
    with on_device(logits):
        _backward_kernel[(triton.cdiv(N, sizes["ROWS"]),)](
            *given, logits, ids.contiguous(), mask, dlogits, N, logits.stride(0), **sizes,
        )
    return dlogits


# --- The plan.


@triton.jit
def _count(ids, begin, end, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr):
    """[EP]: how many of the assignments ``begin`` to ``end`` each expert has."""
    cols = tl.arange(0, EP)
    count = tl.zeros([EP], tl.int32)
    for start in range(begin, end, B):
        a = start + tl.arange(0, B)
        expert = tl.load(ids + a, mask=a < end, other=-1).to(tl.int32)
        count += tl.sum((expert[:, None] == cols[None, :]).to(tl.int32), 0)
    return tl.where(cols < E, count, 0)


@triton.jit(do_not_specialize=["R", "chunk"])
def _count_kernel(ids, counts, R, chunk, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr):
    begin = tl.program_id(0) * chunk
    count = _count(ids, begin, tl.minimum(begin + chunk, R), E, EP, B)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), count)


@triton.jit(do_not_specialize=["R", "chunk", "chunks"])
def _place_kernel(
    ids, counts, offsets, token, slot, inverse, R, chunk, chunks, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    B: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    before = tl.zeros([EP], tl.int32)
    if counts is None:
        total = _count(ids, 0, R, E, EP, B)
    else:
        for start in range(0, chunks, B):
            c = start + tl.arange(0, B)[:, None]
            count = tl.load(counts + c * EP + cols[None, :], mask=c < chunks, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(c < pid, count, 0), 0)
    ends = tl.cumsum(total, 0)
    kept = tl.sum(total, 0)
    kept_before = tl.sum(before, 0)
    base = ends - total + before  # the next row of each expert
    if pid == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + cols, ends, mask=cols < E)
    begin = pid * chunk
    for start in range(begin, tl.minimum(begin + chunk, R), B):
        a = start + tl.arange(0, B)
        expert = tl.load(ids + a, mask=a < R, other=-1).to(tl.int32)
        own = (expert[:, None] == cols[None, :]) & (cols < E)[None, :]
        hit = own.to(tl.int32)
        row = tl.sum(tl.where(own, tl.cumsum(hit, 0) - 1 + base[None, :], 0), 1)
        valid = ((expert >= 0) & (expert < E)).to(tl.int32)
        row = tl.where(valid == 1, row, kept + a - (kept_before + tl.cumsum(valid, 0)))
        tl.store(token + row, a // K, mask=a < R)
        tl.store(slot + row, a, mask=a < R)
        tl.store(inverse + a, row, mask=a < R)
        base += tl.sum(hit, 0)
        kept_before += tl.sum(valid, 0)


def plan(ids: Tensor, num_experts: int) -> Plan:
    (N, K), R, device = ids.shape, ids.numel(), ids.device
    ids = ids.contiguous()
    EP = max(triton.next_power_of_2(num_experts), 16)
    B = 8192 // EP  # at once; 64 assignments for 128 experts
    # At most 256 chunks, since each program reads all counts; a few assignments are counted where they are placed.
    chunk = R if R <= 4 * B else triton.cdiv(triton.cdiv(R, B), 256) * B
    chunks = triton.cdiv(R, chunk)
    counts = None if chunks == 1 else torch.empty(chunks, EP, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    token, slot, inverse = (torch.empty(R, dtype=torch.int32, device=device) for _ in range(3))
    sizes = {"E": num_experts, "EP": EP, "B": B, "num_warps": 4}
    with on_device(ids):
        if counts is not None:
            _count_kernel[(chunks,)](ids, counts, R, chunk, **sizes)
        _place_kernel[(chunks,)](ids, counts, offsets, token, slot, inverse, R, chunk, chunks, K=K, **sizes)
    return Plan(offsets, token, slot, inverse)
