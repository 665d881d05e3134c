"""moe_experts at the sizes of Qwen3-30B-A3B and 235B-A22B, balanced and skewed, in training and in decoding; moe_router.

Given are the experts of each token and their weights: sorting tokens by expert is part of what is timed. FLOPs are
6·N·K·D·I forward, without any padding of tiles. In decoding what counts are the bytes of the experts that are used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import moe_experts, moe_router
from qwen3_kernels.ops.moe_router import moe_router_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet, autograd_reference

BF16, FP32 = torch.bfloat16, torch.float32
GRADS = ("x", "gate_up", "down", "weights")
ROUTINGS = {
    "balanced": "K distinct experts, each as likely",
    "zipf": "expert e with a likelihood of 1 / (e + 1)",
    "one hot": "expert 0 for every token, the others at random",
}


def cases(device: str, quick: bool) -> Iterator[Case]:
    small, large = (2048, 768, 128, 8), (4096, 1536, 128, 8)  # D, I, E, K
    if quick:
        yield experts_case(device, 32, 64, 48, 8, 2, BF16, "balanced")
        yield experts_case(device, 32, 64, 48, 8, 2, BF16, "one hot")
        yield decode_case(device, 2, 64, 48, 8, 2, BF16)
        yield router_case(device, 64, 16, 2, BF16)
    elif device == "cuda":
        for n in (8192, 32768):
            yield experts_case(device, n, *small, BF16, "balanced")
        yield experts_case(device, 8192, *large, BF16, "balanced")
        for routing in ("zipf", "one hot"):
            yield experts_case(device, 8192, *small, BF16, routing)
        for n in (1, 8, 32, 128):
            yield decode_case(device, n, *small, BF16)
        yield router_case(device, 8192, 128, 8, BF16)
    else:
        for dtype in (FP32, BF16):
            yield experts_case(device, 256, 512, 256, 16, 4, dtype, "balanced")
            yield decode_case(device, 1, 2048, 768, 16, 8, dtype)


def routed(n: int, E: int, K: int, routing: str, device: str) -> Tensor:
    """Experts of each token [n, K], the same in every input set."""
    g = torch.Generator().manual_seed(7)
    odds = torch.zeros(E)
    if routing == "zipf":
        odds -= torch.arange(1.0, E + 1).log()
    elif routing == "one hot":
        odds[0] = 100.0
    # The K largest of log-odds with Gumbel noise are a draw without replacement.
    gumbel = -torch.empty(n, E).exponential_(generator=g).log_()
    return (odds + gumbel).topk(K, dim=-1).indices.to(device)


def make_set(device: str, n: int, D: int, I: int, E: int, K: int, dtype: torch.dtype, routing: str, seed: int) -> InputSet:
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype).mul_(scale)

    weights = torch.randn(n, K, generator=g, device=device).softmax(-1)
    inputs = {"x": randn(n, D), "gate_up": randn(E, 2 * I, D, scale=D**-0.5), "down": randn(E, D, I, scale=I**-0.5),
              "ids": routed(n, E, K, routing, device), "weights": weights}
    return InputSet(inputs, (randn(n, D),))


def reference(data: InputSet) -> tuple[list, list]:
    """In float32, one expert after another, its gradients at once: nothing of the size [N·K, D] is held."""
    return _reference(data, grads=True)


def forward_reference(data: InputSet) -> tuple[list, None]:
    return _reference(data, grads=False)[0], None


def _reference(data: InputSet, grads: bool) -> tuple[list, list]:
    x, gate_up, down, ids, weights = (data.inputs[n] for n in ("x", "gate_up", "down", "ids", "weights"))
    x, dout = x.float(), data.cotangents[0].float()
    out = torch.zeros_like(x)
    dx, dweights = torch.zeros_like(x), torch.zeros_like(weights)
    dgate_up, ddown = (torch.zeros(t.shape if grads else 0, device=x.device) for t in (gate_up, down))
    for e in range(gate_up.shape[0]):
        token, k = (ids == e).nonzero(as_tuple=True)
        leaves = [x[token], gate_up[e].float(), down[e].float(), weights[token, k].float()]
        leaves = [t.detach().requires_grad_(grads) for t in leaves]
        gate, up = F.linear(leaves[0], leaves[1]).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, leaves[2]) * leaves[3].unsqueeze(1)
        out.index_add_(0, token, rows.detach())
        if grads:
            drows, dgate_up[e], ddown[e], dweights[token, k] = torch.autograd.grad(rows, leaves, dout[token])
            dx.index_add_(0, token, drows)
    return [out], [dx, dgate_up, ddown, dweights]


def experts_case(device: str, n: int, D: int, I: int, E: int, K: int, dtype: torch.dtype, routing: str) -> Case:
    flops = 6.0 * n * K * D * I
    name = f"moe_experts T{n} d{D} n{I} E{E} K{K} {short_name(dtype)}" + ("" if routing == "balanced" else f" {routing}")
    return Case(
        "moe_experts", name, lambda seed: make_set(device, n, D, I, E, K, dtype, routing, seed), moe_experts, reference,
        2 * TOLERANCE[dtype], f"gemm_{short_name(dtype)}_tflops", flops={"fwd": flops, "bwd": 2 * flops, "fwdbwd": 3 * flops},
        grads=GRADS, context={"device": device, "dtype": dtype}, sets=2,
    )


def decode_case(device: str, n: int, D: int, I: int, E: int, K: int, dtype: torch.dtype) -> Case:
    used = routed(n, E, K, "balanced", device).unique().numel()
    traffic = (3 * used * D * I + 2 * n * D) * dtype.itemsize
    return Case(
        "moe_experts", f"moe_experts decode {n} d{D} n{I} E{E} K{K} {short_name(dtype)}",
        lambda seed: make_set(device, n, D, I, E, K, dtype, "balanced", seed), moe_experts, forward_reference,
        2 * TOLERANCE[dtype], "copy_gbps", bytes={"fwd": traffic}, modes=("fwd",),
        context={"device": device, "dtype": dtype}, sets=3,
    )


def router_case(device: str, n: int, E: int, K: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(n, E, generator=g, device=device, dtype=dtype)
        return InputSet({"logits": logits}, (torch.randn(n, K, generator=g, device=device),))

    b = dtype.itemsize
    return Case(
        "moe_router", f"moe_router {n}x{E} top {K} {short_name(dtype)}", make, lambda logits: moe_router(logits, K)[0],
        autograd_reference(lambda logits: moe_router_ref(logits, K)[0], ("logits",)), TOLERANCE[dtype], "copy_gbps",
        bytes={"fwd": n * (E * b + 12 * K), "bwd": n * (2 * E * b + 12 * K), "fwdbwd": n * (3 * E * b + 24 * K)},
        grads=("logits",), context={"device": device, "dtype": dtype, "top_k": K},
    )
