"""QK-norm and RoPE in Triton, one launch for q and k.

A tile is T tokens x HEADS heads of q or of k, held as two halves [T, HEADS, D/2]: rotating by halves is then arithmetic
between two tensors of one layout, with no exchange between threads. The programs of q come first, then those of k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cast, load, multiprocessors, on_device, power_of_two_divisor, row_major, sum_partials

WARPS = 4
THREADS = tl.constexpr(32 * WARPS)


@triton.jit
def _indices(tile, H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr):
    """(tokens [T, 1, 1] int32, heads [1, HEADS, 1]) of a tile; head groups run fastest."""
    groups: tl.constexpr = H // HEADS
    tokens = (tile // groups) * T + tl.arange(0, T)[:, None, None]
    heads = (tile % groups) * HEADS + tl.arange(0, HEADS)[None, :, None]
    return tokens, heads


@triton.jit
def _rope_rows(cos, sin, tokens, R, T: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of a tile's tokens, [1, 1, BLOCK] or [T, HEADS, BLOCK].

    A table row shorter than the program is loaded in whatever layout its user has. A longer one would get a layout of
    its own and drag the whole tile through shared memory; loaded once a head instead, from L1, it has the tile's layout.
    """
    cols = tl.arange(0, BLOCK)[None, None, :]
    at = (tokens % R) * C + cols
    inside = None if BLOCK == C else cols < C
    if T * BLOCK >= THREADS:
        at = tl.broadcast_to(at, [T, HEADS, BLOCK])
    return load(cos + at, inside), load(sin + at, inside)


@triton.jit
def _forward_tile(
    x, weight, cos, sin, out, tile, N, R, token_stride, head_stride, eps,
    H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):
    tokens, heads = _indices(tile, H, T, HEADS)
    cols = tl.arange(0, BLOCK)[None, None, :]
    inside = None if BLOCK == C else cols < C
    mask = None if FULL and BLOCK == C else (tokens < N) & (cols < C)
    at = x + tokens.to(tl.int64) * token_stride + heads * head_stride + cols
    a = load(at, mask).to(tl.float32)
    b = load(at + C, mask).to(tl.float32)
    cos_T, sin_T = _rope_rows(cos, sin, tokens, R, T, HEADS, C, BLOCK)
    w_a = load(weight + cols, inside)
    w_b = load(weight + C + cols, inside)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * C) + eps))
    a *= scale * w_a.to(tl.float32)
    b *= scale * w_b.to(tl.float32)
    to = out + (tokens.to(tl.int64) * H + heads) * (2 * C) + cols
    tl.store(to, cast(a * cos_T - b * sin_T, out.dtype.element_ty), mask=mask)
    tl.store(to + C, cast(b * cos_T + a * sin_T, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "R", "q_programs"])
def _forward_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, N, R, q_programs,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, eps,
    HQ: tl.constexpr, HK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, Q_FULL: tl.constexpr, K_FULL: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < q_programs:
        _forward_tile(q, q_weight, cos, sin, q_out, pid, N, R, q_token_stride, q_head_stride, eps,
                      HQ, TQ, Q_HEADS, C, BLOCK, Q_FULL)
    else:
        _forward_tile(k, k_weight, cos, sin, k_out, pid - q_programs, N, R, k_token_stride, k_head_stride, eps,
                      HK, TK, K_HEADS, C, BLOCK, K_FULL)


@triton.jit
def _halves(
    x, tile, N, token_stride, head_stride,
    H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):
    """Both halves of a tile in their own dtype; zeros past the last token, so a tile past the end reads nothing."""
    tokens, heads = _indices(tile, H, T, HEADS)
    cols = tl.arange(0, BLOCK)[None, None, :]
    mask = (tokens < N) & (cols < C) if BLOCK != C else tokens < N
    at = x + tokens.to(tl.int64) * token_stride + heads * head_stride + cols
    return tl.load(at, mask=mask, other=0.0), tl.load(at + C, mask=mask, other=0.0)


@triton.jit
def _backward_tiles(
    dout, x, weight, cos, sin, dx, partial, first, step, tiles, N, R, d_token_stride, d_head_stride, token_stride,
    head_stride, eps, H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, None, :]
    inside = None if BLOCK == C else cols < C
    w_a = load(weight + cols, inside).to(tl.float32)
    w_b = load(weight + C + cols, inside).to(tl.float32)
    dw_a = tl.zeros([T, HEADS, BLOCK], tl.float32)
    dw_b = tl.zeros([T, HEADS, BLOCK], tl.float32)
    # The next tile is loaded before this one is worked on: with few programs, nothing else would hide the latency.
    next_a, next_b = _halves(x, first, N, token_stride, head_stride, H, T, HEADS, C, BLOCK)
    next_da, next_db = _halves(dout, first, N, d_token_stride, d_head_stride, H, T, HEADS, C, BLOCK)
    for tile in range(first, tiles, step):
        a = next_a.to(tl.float32)
        b = next_b.to(tl.float32)
        da = next_da.to(tl.float32)
        db = next_db.to(tl.float32)
        tokens, heads = _indices(tile, H, T, HEADS)
        cos_T, sin_T = _rope_rows(cos, sin, tokens, R, T, HEADS, C, BLOCK)
        next_a, next_b = _halves(x, tile + step, N, token_stride, head_stride, H, T, HEADS, C, BLOCK)
        next_da, next_db = _halves(dout, tile + step, N, d_token_stride, d_head_stride, H, T, HEADS, C, BLOCK)

        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * C) + eps))
        a *= scale
        b *= scale
        # The gradient of the normed row, turned back by the transposed rotation.
        g_a = da * cos_T + db * sin_T
        g_b = db * cos_T - da * sin_T
        dw_a += g_a * a
        dw_b += g_b * b
        g_a *= w_a
        g_b *= w_b
        mean = tl.sum(g_a * a + g_b * b, 2, keep_dims=True) / (2 * C)
        mask = (tokens < N) & (cols < C) if BLOCK != C else tokens < N
        to = dx + (tokens.to(tl.int64) * H + heads) * (2 * C) + cols
        tl.store(to, cast((g_a - a * mean) * scale, dx.dtype.element_ty), mask=mask)
        tl.store(to + C, cast((g_b - b * mean) * scale, dx.dtype.element_ty), mask=mask)
    flat = tl.arange(0, BLOCK)
    tl.store(partial + flat, tl.sum(tl.sum(dw_a, 1), 0), mask=flat < C)
    tl.store(partial + C + flat, tl.sum(tl.sum(dw_b, 1), 0), mask=flat < C)


@triton.jit(do_not_specialize=["N", "R", "q_programs", "q_tiles", "k_tiles"])
def _backward_kernel(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, dq, dk, partial, N, R, q_programs, q_tiles, k_tiles,
    dq_token_stride, dq_head_stride, dk_token_stride, dk_head_stride,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, eps,
    HQ: tl.constexpr, HK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    partial += pid * (2 * C)
    if pid < q_programs:
        _backward_tiles(dq_out, q, q_weight, cos, sin, dq, partial, pid, q_programs, q_tiles, N, R, dq_token_stride,
                        dq_head_stride, q_token_stride, q_head_stride, eps, HQ, TQ, Q_HEADS, C, BLOCK)
    else:
        _backward_tiles(dk_out, k, k_weight, cos, sin, dk, partial, pid - q_programs, tl.num_programs(0) - q_programs,
                        k_tiles, N, R, dk_token_stride, dk_head_stride, k_token_stride, k_head_stride, eps,
                        HK, TK, K_HEADS, C, BLOCK)


def _tile(heads: int, block: int, elements: int) -> tuple[int, int]:
    """(tokens, heads) of a tile of about ``elements`` values. The number of heads divides, so no head is masked, and
    tokens fill up what few or odd heads leave; it depends on the model alone, so a token's bits do not on the batch."""
    rows = min(max(1, elements // (2 * block)), 32)
    per_tile = power_of_two_divisor(heads, rows)
    return rows // per_tile, per_tile


def _sizes(q: Tensor, k: Tensor, elements: int) -> tuple[dict, int, int]:
    """(constants of the kernels, tiles of q, tiles of k)."""
    n, hq, d = q.shape
    hk = k.shape[1]
    block = triton.next_power_of_2(d // 2)
    (tq, q_heads), (tk, k_heads) = _tile(hq, block, elements), _tile(hk, block, elements)
    sizes = {"HQ": hq, "HK": hk, "TQ": tq, "TK": tk, "Q_HEADS": q_heads, "K_HEADS": k_heads, "C": d // 2, "BLOCK": block}
    return sizes, triton.cdiv(n, tq) * (hq // q_heads), triton.cdiv(n, tk) * (hk // k_heads)


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    n = q.shape[0]
    q, k = row_major(q), row_major(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    # 32 heads of 128 on 4 warps are four 16-byte loads of bf16 a thread; the two halves of a head stay within a warp.
    sizes, q_tiles, k_tiles = _sizes(q, k, 4096)
    with on_device(q):
        _forward_kernel[(q_tiles + k_tiles,)](
            q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), q_out, k_out,
            n, cos.shape[0], q_tiles, *q.stride()[:2], *k.stride()[:2], eps,
            **sizes, Q_FULL=n % sizes["TQ"] == 0, K_FULL=n % sizes["TK"] == 0, num_warps=WARPS,
        )
    return q_out, k_out


def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, hq, d = q.shape
    hk = k.shape[1]
    dq_out, dk_out, q, k = (row_major(t) for t in (dq_out, dk_out, q, k))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
    # Half the forward's tile: two tiles of x and its gradient and the sum of dweight live in registers at once.
    sizes, q_tiles, k_tiles = _sizes(q, k, 2048)
    programs = multiprocessors(q.device) * 4
    q_programs = min(q_tiles, max(1, round(programs * hq / (hq + hk))))
    k_programs = min(k_tiles, max(1, programs - q_programs))
    partial = torch.empty((q_programs + k_programs, d), dtype=torch.float32, device=q.device)
    with on_device(q):
        _backward_kernel[(q_programs + k_programs,)](
            dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
            dq, dk, partial, n, cos.shape[0], q_programs, q_tiles, k_tiles, *dq_out.stride()[:2], *dk_out.stride()[:2],
            *q.stride()[:2], *k.stride()[:2], eps, **sizes, num_warps=WARPS,
        )
        sum_partials(partial, dq_weight, dk_weight, q_programs)
    return dq, dk, dq_weight, dk_weight
