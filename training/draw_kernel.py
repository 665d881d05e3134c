"""The Triton kernel of `draw`: per row, splitmix64 of (seed, token), Gumbel noise in float64, and a running maximum.

On a GPU the two logarithms of a token cost most; the logits are read once: 2 or 4 bytes a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwen3_model import sampling

GOLDEN, MUL_1, MUL_2 = (tl.constexpr(x) for x in (sampling._GOLDEN, sampling._MUL_1, sampling._MUL_2))


@triton.jit
def splitmix64(key, counter):
    """`qwen3_model.sampling._hash`: output number ``counter`` of the generator with state ``key``, int64."""
    x = key + (counter + 1) * GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MUL_1  # the masks make the shifts logical
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MUL_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def kernel(logits, stride, seeds, ids, V, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(seeds + row)
    places = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float64)
    at = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        token = (start + places).to(tl.int64)
        bits = (splitmix64(key, token) >> 12) & 0xFFFFFFFFFFFFF
        # 1 - uniform is a multiple of 2^-53, hence exact, and its logarithm is the log1p of the reference.
        uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
        noise = -tl.log(-tl.log(1.0 - uniform))
        logit = tl.load(logits + row * stride + token, token < V, other=float("-inf")).to(tl.float32)
        score = tl.div_rn(logit, temperature).to(tl.float64) + noise
        better = score > best
        best, at = tl.where(better, score, best), tl.where(better, token, at)
    top = tl.max(best, 0)
    tl.store(ids + row, tl.min(tl.where(best == top, at, V), 0))  # the first of equals
