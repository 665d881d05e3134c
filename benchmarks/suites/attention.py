"""Causal attention at the models' shapes, batched and packed. FLOPs count the visible half; bwd is 2.5 fwd."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3_kernels import attention

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet


def cases(device: str, quick: bool) -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        yield case(device, [48, 48], 4, 2, 64, bf16, packed=False)
        yield case(device, [16, 48], 4, 2, 64, bf16, packed=True)
        return
    if device == "cuda":
        for lengths, Hq in (([4096] * 4, 32), ([16384], 32), ([32768], 32), ([4096] * 8, 16)):
            yield case(device, lengths, Hq, 8, 128, bf16, packed=False)
        yield case(device, [2048] * 16, 32, 8, 128, bf16, packed=True)
        return
    for dtype in (fp32, bf16):
        yield case(device, [1024], 16, 8, 128, dtype, packed=False)
    yield case(device, [256] * 8, 16, 8, 128, bf16, packed=True)


def case(device: str, lengths: list[int], Hq: int, Hk: int, D: int, dtype: torch.dtype, packed: bool) -> Case:
    """``lengths`` of the documents; when not packed they are equal and form a batch."""
    lead = (sum(lengths),) if packed else (len(lengths), lengths[0])

    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        q, dout = (torch.randn(*lead, Hq, D, generator=g, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(*lead, Hk, D, generator=g, device=device, dtype=dtype) for _ in range(2))
        inputs = {"q": q, "k": k, "v": v}
        if packed:
            ends = torch.tensor([0, *lengths]).cumsum(0)
            inputs["cu_seqlens"] = ends.to(device, torch.int32)
        return InputSet(inputs, (dout,))

    pairs = sum(n * n for n in lengths) / 2
    flops = 4 * D * Hq * pairs
    where = f"packed N{lead[0]} in {len(lengths)} docs " if packed else f"b{lead[0]}T{lead[1]}"
    return Case(
        "attention", f"attention {where}h{Hq}/{Hk} {short_name(dtype)}", make, attention,
        lambda data: reference(data, lengths), TOLERANCE[dtype], f"gemm_{short_name(dtype)}_tflops",
        flops={"fwd": flops, "bwd": 2.5 * flops, "fwdbwd": 3.5 * flops}, grads=("q", "k", "v"),
        context={"device": device, "dtype": dtype, "documents": lengths if packed else None},
    )


def reference(data: InputSet, lengths: list[int], block: int = 512) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients in float32, a block of queries at a time: at 32K tokens the score matrix fits nowhere."""
    q, k, v = (data.inputs[n] for n in "qkv")
    dout, = data.cotangents
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v, dout)]
    out, dq, dk, dv = (torch.zeros(t.shape, device=t.device) for t in (flat[0], flat[0], flat[1], flat[2]))
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        for a in range(0, n, block):
            _block(*(t[rows] for t in (*flat, out, dq, dk, dv)), a, min(a + block, n))
        start += n
    return [out.view(q.shape)], [dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)]


def _block(q, k, v, dout, out, dq, dk, dv, a: int, b: int) -> None:
    """Queries a..b of one document against the keys up to b; shapes [T, H, D]. Writes out and dq, adds to dk and dv."""
    Hk, D, group = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]

    def grouped(t: Tensor) -> Tensor:  # [b - a, Hq, D] -> [Hk, group * (b - a), D]
        return t[a:b].float().unflatten(1, (Hk, group)).permute(1, 2, 0, 3).reshape(Hk, -1, D)

    def store(t: Tensor, into: Tensor) -> None:
        into[a:b] = t.view(Hk, group, b - a, D).permute(2, 0, 1, 3).reshape(b - a, -1, D)

    qg, dog = grouped(q), grouped(dout)
    kh, vh = (t[:b].float().transpose(0, 1) for t in (k, v))
    hidden = torch.ones(b - a, b, dtype=torch.bool, device=q.device).triu(a + 1)
    p = (qg @ kh.mT * D**-0.5).masked_fill_(hidden.repeat(group, 1), float("-inf")).softmax(-1)
    o = p @ vh
    store(o, out)
    ds = dog @ vh.mT
    ds = ds.sub_((dog * o).sum(-1, keepdim=True)).mul_(p).mul_(D**-0.5)
    store(ds @ kh, dq)
    dk[:b] += (ds.mT @ qg).transpose(0, 1)
    dv[:b] += (p.mT @ dog).transpose(0, 1)
