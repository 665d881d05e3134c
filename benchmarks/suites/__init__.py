"""The suites. A suite is a module with ``cases(device, quick)`` that yields `Case`s to be timed by the harness, or one with
``rows(device, quick, peers, ceilings, say)`` that measures by itself and yields `Row`s."""

from __future__ import annotations

import importlib
from types import ModuleType

SUITES = {
    "pointwise": "rms_norm with and without residual, swiglu, cross_entropy",
    "qk_norm_rope": "per-head RMSNorm of q and k, then RoPE",
    "qk_norm_attention": "norm, RoPE and attention in one op",
    "loss": "the head and cross-entropy in one, and two heads and their KL divergence, at Qwen3's vocabulary",
    "attention": "causal grouped-query attention, batched and packed",
    "decode": "attention of one new token a row over a paged KV cache, in bf16 and fp8",
    "moe": "experts and router of a mixture, in training and decoding, balanced and skewed",
    "optimizer": "a step of AdamW for all parameters of a model, by what is kept per parameter",
    "train_step": "a whole training step with optimizer, a process per implementation (CUDA)",
    "generate": "a whole model: prefill, and greedy generation with a KV cache",
}


def check(names: list[str]) -> list[str]:
    """The names, once each; refuses unknown ones."""
    unknown = [n for n in names if n not in SUITES]
    if unknown or not names:
        given = ", ".join(map(repr, unknown)) or "missing"
        raise ValueError(f"suite is {given}; expected one or more of {', '.join(SUITES)}")
    return list(dict.fromkeys(names))


def module(name: str) -> ModuleType:
    """The suite's module."""
    return importlib.import_module(f"{__name__}.{name}")
