"""What bounds the experts of Qwen3-30B-A3B on this GPU: ``python benchmarks/probes/moe_limits.py``.

The dense products of the same sizes (torch, random data), what a forward keeps for the backward, and what row tiles waste:
routing drawn at random, about 512 or 2,048 rows an expert, beside the same number of rows for every expert.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.harness import Clock, median
from benchmarks.suites.moe import routed
from qwen3_kernels import moe_experts

D, I, E, K = 2048, 768, 128, 8
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def dense(clock: Clock, rows: int) -> None:
    for name, (depth, width) in {"up": (D, 2 * I), "down": (I, D)}.items():
        x, w = torch.randn(rows, depth, **BF16), torch.randn(width, depth, **BF16)
        ms = median([clock.time([lambda: x @ w.T] * 4) for _ in range(11)])
        print(f"dense {name}, {rows} x {width}, {depth} deep: {2 * rows * depth * width / ms * 1e-9:.0f} TFLOP/s", flush=True)


def kept(inputs: dict) -> int:
    """Bytes of the tensors that a forward saves beyond its inputs, each storage once."""
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_experts(**inputs)
    for t in inputs.values():
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def main() -> None:
    clock = Clock("cuda")
    for tokens in (8192, 32768):
        dense(clock, tokens * K)
        inputs = {
            "x": torch.randn(tokens, D, **BF16), "gate_up": torch.randn(E, 2 * I, D, **BF16) * D**-0.5,
            "down": torch.randn(E, D, I, **BF16) * I**-0.5, "ids": routed(tokens, E, K, "balanced", "cuda"),
            "weights": torch.rand(tokens, K, device="cuda"),
        }
        grads = [inputs[n].requires_grad_() for n in ("x", "gate_up", "down", "weights")]
        dout = torch.randn_like(inputs["x"])
        print(f"T {tokens}: kept for the backward {kept(inputs) / 1e6:.0f} MB", flush=True)
        even = (torch.arange(tokens, device="cuda")[:, None] * K + torch.arange(K, device="cuda")) % E
        routings = {"drawn": inputs["ids"], "even": even}
        calls = [lambda ids=ids: torch.autograd.grad(moe_experts(**inputs | {"ids": ids}), grads, dout)
                 for ids in routings.values()]
        times = [[] for _ in calls]
        for turn in range(11):
            for i, call in enumerate(calls):
                times[i].append(clock.time([call] * 2))
        drawn, same = (median(t) for t in times)
        print(f"T {tokens}: forward and backward {drawn:.3f} ms, {same:.3f} with {tokens * K // E} rows for every expert: "
              f"tiles waste {100 * (drawn / same - 1):.1f} %", flush=True)


if __name__ == "__main__":
    main()
