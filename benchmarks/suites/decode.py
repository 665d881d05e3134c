"""Attention of one new token a row over a paged KV cache, which is bounded by reading the keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3_kernels import paged_attention
from qwen3_kernels.ops.paged_attention import FP8, paged_attention_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet

BF16, FP32 = torch.bfloat16, torch.float32


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        yield case(device, [40, 7], 4, 2, 64, 16, BF16, BF16)
        yield case(device, [40, 7], 4, 2, 64, 16, BF16, FP8)
        return
    if device == "cuda":
        for cache in (BF16, FP8):
            for batch in (1, 8, 64):
                for length in (1024, 8192, 32768):
                    yield case(device, [length] * batch, 32, 8, 128, 64, BF16, cache)
            # Rows of all lengths, as a server has them; 16 queries a key head, as Qwen3-235B-A22B.
            yield case(device, [512 * (1 + i) for i in range(64)], 32, 8, 128, 64, BF16, cache)
            yield case(device, [8192] * 8, 64, 4, 128, 64, BF16, cache)
        return
    for dtype, cache in ((FP32, FP32), (BF16, BF16), (BF16, FP8)):
        yield case(device, [1024] * 2, 16, 8, 128, 64, dtype, cache)


def case(
    device: str, lengths: list[int], Hq: int, Hk: int, D: int, page_size: int, dtype: torch.dtype, cache: torch.dtype
) -> Case:
    """Pages in random order, as many as the lengths need."""
    B, max_pages = len(lengths), -(-max(lengths) // page_size)
    counts = [-(-n // page_size) for n in lengths]
    P = sum(counts)

    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        q = torch.randn(B, 1, Hq, D, generator=g, device=device, dtype=dtype)
        k, v = (pages(P, page_size, Hk, D, g, device, dtype, cache) for _ in range(2))
        table = torch.full((B, max_pages), -1, dtype=torch.int32)
        order = iter(torch.randperm(P, generator=torch.Generator().manual_seed(seed)).split(counts))
        for row, count in zip(table, counts):
            row[:count] = next(order)
        inputs = {"q": q, "k_pages": k, "v_pages": v, "page_table": table.to(device),
                  "lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
        if cache == FP8:
            inputs |= {n: torch.full((Hk,), 1 / 64, device=device) for n in ("k_scale", "v_scale")}
        return InputSet(inputs)

    def reference(data: InputSet) -> tuple[list[Tensor], None]:
        return [torch.cat([one(data.inputs, b, n, page_size) for b, n in enumerate(lengths)])], None

    name = "fp8" if cache == FP8 else short_name(cache)
    spread = f"T{lengths[0]}" if len(set(lengths)) == 1 else f"T{min(lengths)}-{max(lengths)}"
    return Case(
        "paged_attention", f"decode b{B}{spread}h{Hq}/{Hk} {short_name(dtype)}, cache {name}", make, paged_attention,
        reference, TOLERANCE[dtype], "copy_gbps", bytes={"step": 2 * sum(lengths) * Hk * D * cache.itemsize},
        modes=("step",), context={"device": device, "dtype": dtype, "lengths": lengths}, tokens=B,
        sets=None if device == "cpu" or P * page_size < 2**19 else 2,  # two large caches do not fit in any other
    )


def pages(
    P: int, page_size: int, Hk: int, D: int, g: torch.Generator, device: str, dtype: torch.dtype, cache: torch.dtype
) -> Tensor:
    """Random numbers of a standard deviation of 1, in 8 bits of 64 before their scale. Some pages at a time: a large cache
    would not fit beside itself in a wider dtype."""
    out = torch.empty(P, page_size, Hk, D, device=device, dtype=cache)
    for part in out.split(1024):
        x = torch.randn(part.shape, generator=g, device=device, dtype=dtype)
        part.copy_(x * 64 if cache == FP8 else x)
    return out


def one(inputs: dict, row: int, length: int, page_size: int) -> Tensor:
    """A row of the reference, in float32."""
    alone = {n: t[row : row + 1] for n, t in inputs.items() if n in ("q", "page_table", "lengths")}
    alone["page_table"] = alone["page_table"][:, : -(-length // page_size)]
    return paged_attention_ref(**(inputs | alone | {"q": alone["q"].float()}))
