"""Attention on Hopper, forward and backward by themselves, beside FlashAttention 4 when it is installed.

    python benchmarks/probes/attention_probe.py

The two take turns in one process; medians of 5. Causal, head width 128, bf16, random data. TFLOP/s count 2 B H D T^2 forward
and 5 B H D T^2 backward, which includes its passes before and after. FlashAttention 4 adds to dq in the order in which its
parts come; ours has a fixed order.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.harness import Clock
from qwen3_kernels.cuda import attention

WIDTH, TURNS = 128, 5
SHAPES = ((4, 4096, 32, 8), (1, 16384, 32, 8), (1, 32768, 32, 8), (8, 4096, 16, 8), (16, 1024, 32, 8))  # B, T, H, Hk
DOCUMENTS, LENGTH = 16, 2048  # packed


def main() -> None:
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError as e:
        print(f"FlashAttention 4 is not here: {e}")
        flash_attn_func = None
    clock, scale = Clock("cuda"), WIDTH**-0.5

    def show(name: str, flops: float, functions: dict) -> None:
        for f in functions.values():
            f()
        times = {n: statistics.median(clock.time([f] * 3, i) for _ in range(TURNS)) for i, (n, f) in enumerate(functions.items())}
        print(f"{name:34s}" + "".join(f"  {n} {ms:7.3f} ms {flops * 1e-9 / ms:4.0f} TFLOP/s" for n, ms in times.items()), flush=True)

    def rows(*lead: int) -> list[torch.Tensor]:
        *lead, H, Hk = lead
        return [torch.randn(*lead, h, WIDTH, device="cuda", dtype=torch.bfloat16) for h in (H, Hk, Hk, H)]

    def case(name: str, flops: float, q, k, v, dout, cu, flash) -> None:
        out, lse = attention.forward(q, k, v, cu, None, True, scale)
        forward = {"ours": lambda: attention.forward(q, k, v, cu, None, True, scale)}
        backward = {"ours": lambda: attention.backward(dout, q, k, v, out, lse, cu, None, True, scale)}
        if flash is not None:
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            kept = flash(*inputs)
            forward["FA4"] = lambda: flash(q, k, v)
            backward["FA4"] = lambda: torch.autograd.grad(kept, inputs, dout, retain_graph=True)
        show(f"{name} forward", 2 * flops, forward)
        show(f"{name} backward", 5 * flops, backward)

    torch.manual_seed(0)
    for B, T, H, Hk in SHAPES:
        flash = None if flash_attn_func is None else lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0]
        case(f"B{B} T{T} heads {H}/{Hk}", B * H * WIDTH * T * T, *rows(B, T, H, Hk), None, flash)
    cu = torch.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=torch.int32, device="cuda")
    flash = None if flash_attn_func is None else lambda q, k, v: flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=LENGTH, max_seqlen_k=LENGTH, causal=True)[0]
    packed = rows(DOCUMENTS * LENGTH, 32, 8)
    case(f"{DOCUMENTS} documents of {LENGTH} heads 32/8", DOCUMENTS * 32 * WIDTH * LENGTH * LENGTH, *packed, cu, flash)


if __name__ == "__main__":
    main()
