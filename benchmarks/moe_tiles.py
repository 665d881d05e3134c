"""Times tiles for the Triton steps of moe_experts on this GPU, and prints the best of each step and number of rows.

    python -m benchmarks.moe_tiles [--tokens N ...] [--step STEP ...] [--json FILE]

A tile of `qwen3_kernels.triton.moe_experts.TILES` is chosen by rows per expert; this is how that table was made. Rates
are those of the step alone, on random data, balanced routing and the sizes of Qwen3-30B-A3B (or others by --sizes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from rich.console import Console
from rich.progress import track

from qwen3_kernels.ops.moe_router import routing_plan
from qwen3_kernels.triton import moe_experts as op
from qwen3_kernels.triton.moe_experts import TILES, Tile

from .suites.moe import routed


@dataclass(frozen=True)
class Result:
    step: str
    tokens: int
    rows_per_expert: float
    tile: Tile
    ms: float
    tflops: float


def candidates(step: str, rows: float) -> Iterator[Tile]:
    """Tiles worth a try: those whose steps fit into shared memory and whose sums fit into the registers."""
    products = 2 if step == "up" else 1
    many = rows > 64 or step == "weight_grad"  # then wide products pay, else what keeps many loads in flight
    heights, widths, depths = ((64, 128), (64, 128, 256), (64,)) if many else ((16, 32, 64), (32, 64, 128), (64, 128))
    for height, width, depth, warps, stages in itertools.product(heights, widths, depths, (4, 8), (3, 4)):
        sums = products * height * width // (32 * warps)  # a thread's
        operands = (height + products * width) * depth * 2 * stages
        if operands <= 220 << 10 and (64 <= sums <= 128 if many else sums <= 64 and warps == 4):
            yield Tile(height, width, depth, warps, stages)


def steps(tokens: int, D: int, I: int, E: int, K: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Step -> (call, FLOPs)."""
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, gate_up, down, weights = new(tokens, D), new(E, 2 * I, D) / 45, new(E, D, I) / 28, torch.rand(tokens, K, device="cuda")
    plan = routing_plan(routed(tokens, E, K, "balanced", "cuda"), E)
    h, a = op.up(x, gate_up, plan)
    out = torch.empty_like(down)
    product = 2.0 * tokens * K * D * I
    return {
        "up": (lambda: op.up(x, gate_up, plan), 2 * product), "down": (lambda: op.down(a, down, plan), product),
        "down_backward": (lambda: op.down_backward(x, down, h, weights, plan), product),
        "up_backward": (lambda: op.up_backward(h, gate_up, plan), 2 * product),
        "weight_grad": (lambda: op.weight_grad(x, a, plan, out, False, "left"), product),
    }


def tune(step: str, call: Callable[[], object], flops: float, tokens: int, rows: float) -> list[Result]:
    """Fastest first. A tile that does not compile or does not fit is left out."""
    found, before = [], dict(TILES[step])
    try:
        for tile in track(list(candidates(step, rows)), f"{step}, {tokens} tokens", console=Console(stderr=True)):
            TILES[step] = {0: tile}
            try:
                ms = triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")
            except Exception as e:  # out of shared memory or registers: not a candidate
                print(f"{step} {tuple(tile)}: {type(e).__name__}", file=sys.stderr)
                continue
            found.append(Result(step, tokens, rows, tile, ms, flops / ms * 1e-9))
    finally:
        TILES[step] = before
    return sorted(found, key=lambda r: r.ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 128, 1024, 8192], help="default: 8 128 1024 8192")
    parser.add_argument("--step", nargs="+", choices=TILES, default=list(TILES), help="only these steps")
    parser.add_argument("--sizes", nargs=4, type=int, metavar=("D", "I", "E", "K"), default=[2048, 768, 128, 8])
    parser.add_argument("--json", metavar="FILE", help="also write all results to FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("moe_tiles: torch finds no CUDA device; this times kernels on one")
    _, _, E, K = args.sizes
    results = []
    for tokens in args.tokens:
        for step, (call, flops) in steps(tokens, *args.sizes).items():
            if step in args.step:
                results += (found := tune(step, call, flops, tokens, tokens * K / E))
                for r in found[:5]:
                    print(f"{r.step:14} T{r.tokens:<6} {r.ms:8.4f} ms {r.tflops:7.1f} TFLOP/s  {tuple(r.tile)}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{**vars(r), "tile": list(r.tile)} for r in results], f, indent=1)


if __name__ == "__main__":
    main()
