"""What this machine can do: copy bandwidth and matrix-product rate, measured on random data.

Every percentage in a benchmark table is of these, never of a datasheet.
"""

from __future__ import annotations

import torch

from .harness import Clock


def measure(device: str, quick: bool = False) -> dict[str, float]:
    """``copy_gbps`` (bytes read + written) and ``gemm_<dtype>_tflops``, the best over sizes and repetitions: a ceiling
    that a busy moment lowered would be none."""
    clock = Clock(device)
    reps = 3 if quick else 15
    # A CPU's last-level cache can be larger than any sensible input, so there the better of a small and a large copy.
    copies = (2,) if quick else ((16, 512) if device == "cpu" else (2048,))
    ceilings = {"copy_gbps": max(_copy(clock, device, megabytes, reps) for megabytes in copies)}
    for dtype in ((torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,)):
        sizes = ((256,) if quick else (1024, 2048)) if device == "cpu" else ((2048,) if quick else (4096, 8192))
        rates = [_gemm(clock, device, dtype, n, reps) for n in sizes]
        ceilings[f"gemm_{short_name(dtype)}_tflops"] = max(rates)
    return ceilings


def short_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]


def _copy(clock: Clock, device: str, megabytes: int, reps: int) -> float:
    source = torch.randn(2**19, device=device, dtype=torch.bfloat16).repeat(megabytes)
    target = torch.empty_like(source)
    call = [lambda: target.copy_(source)]
    clock.time(call)
    ms = min(clock.time(call) for _ in range(reps))
    return 2 * source.nbytes / ms * 1e-6


def _gemm(clock: Clock, device: str, dtype: torch.dtype, n: int, reps: int) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    call = [lambda: a @ b] * 3
    clock.time(call)
    ms = min(clock.time(call) for _ in range(reps))
    return 2 * n**3 / ms * 1e-9
