"""Which backend runs which op.

Candidates are tried in order of preference for the device; the first one that is built, supports the dtype and passes
its self-check wins. ``QWEN3_BACKEND`` overrides: one name for all ops (``torch``) or a list (``rms_norm=triton,swiglu=torch``).
Backends: ``cpu`` (compiled C++), ``cuda`` (compiled CUDA), ``triton``, ``torch`` (plain torch or SDPA).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

OPS = (
    "rms_norm", "qk_norm_rope", "swiglu", "cross_entropy", "linear_cross_entropy", "linear_kl", "attention",
    "moe_router",  # and the routing plan
    "moe_experts", "swiglu_mlp",
    "paged_attention",  # and the write into the pages
)
BACKENDS = ("cpu", "cuda", "triton", "torch")

# Order of preference. On CUDA, Triton leads: it needs no build and runs everywhere. What the compiled attention does not
# take (see cuda/attention.py) goes to torch's.
PREFERENCE = {
    "cpu": {op: ("cpu", "torch") for op in OPS} | {
        "moe_router": ("torch",),  # a few sorts of a few hundred numbers
        "swiglu_mlp": ("torch",),  # torch: its products and the op swiglu
        "linear_kl": ("torch",),
        "paged_attention": ("torch",),
    },
    "cuda": {op: ("triton", "torch") for op in OPS} | {
        "attention": ("cuda", "torch"), "rms_norm": ("triton", "cuda", "torch"),
        "linear_cross_entropy": ("cuda", "triton", "torch"),  # the compiled one needs Hopper's wgmma
        "moe_experts": ("cuda", "triton", "torch"), "swiglu_mlp": ("cuda", "torch"),  # as here
    },
}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


@dataclass(frozen=True)
class Choice:
    """One line of the doctor's table."""

    op: str
    device: str
    dtype: torch.dtype
    backend: str
    why: str
    error: float | None = None  # self-check error relative to that of plain torch; None when nothing was checked


def backend(op: str, name: str) -> ModuleType:
    """The module with the ``forward`` and ``backward`` of an op on a backend."""
    return _module(op, name)


@functools.cache
def _module(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}.{op}")


_override: dict[str, str] = {}


@contextlib.contextmanager
def use(name: str, *ops: str) -> Iterator[None]:
    """Run the named ops (all, when none is named) on one backend, without self-check or fallback: for tests and
    benchmarks. A backend that cannot run here raises when the op is called."""
    if name not in BACKENDS or not set(ops) <= set(OPS):
        raise ValueError(f"use: got backend {name!r} and ops {ops}; expected one of {BACKENDS} and ops of {OPS}")
    saved = dict(_override)
    _override.update({op: name for op in ops or OPS})
    try:
        yield
    finally:
        _override.clear()
        _override.update(saved)


def resolve(op: str, device: str, dtype: torch.dtype) -> str:
    """Name of the backend that runs ``op``; constant for a process (but for ``use``), so torch.compile folds it."""
    return _override.get(op) or explain(op, device, dtype).backend


resolve._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which takes 2 s to import dynamo


@functools.cache
def explain(op: str, device: str, dtype: torch.dtype) -> Choice:
    """The choice of backend and the reason for it."""
    forced, explicit = _forced().get(op, ("", False))
    if forced == "torch" or DEVICES.get(forced) == device:
        problem = unavailable(op, forced, device, dtype)
        if problem is None:
            return Choice(op, device, dtype, forced, "QWEN3_BACKEND")
        if explicit:
            raise RuntimeError(f"QWEN3_BACKEND asks for {op}={forced}, but {forced}: {problem}")
    rejected = []
    for name in PREFERENCE.get(device, {}).get(op, ("torch",)):
        if name == "torch":
            break
        problem = unavailable(op, name, device, dtype)
        if problem is None:
            from . import selfcheck

            error = selfcheck.run(op, name, device, dtype)
            if error <= selfcheck.LIMIT:
                why = "first choice" if not rejected else "; ".join(rejected)
                return Choice(op, device, dtype, name, why, error)
            problem = f"self-check error {error:.3g} times plain torch's, over {selfcheck.LIMIT:g}"
            warnings.warn(f"qwen3_kernels: {op} on backend '{name}' is not used: {problem}", stacklevel=3)
        rejected.append(f"{name}: {problem}")
    return Choice(op, device, dtype, "torch", "; ".join(rejected) or "first choice")


def unavailable(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op here, or None when it can."""
    if name == "torch":
        return None
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device != DEVICES[name] and not (interpreted and device == "cpu"):
        return f"runs on {DEVICES[name]} tensors"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        module = _module(op, name)
    except ModuleNotFoundError as e:
        return "no kernel" if e.name == f"{__package__}.{name}.{op}" else f"not built ({e.name})"
    except ImportError as e:
        return f"not built ({e})"
    if dtype not in getattr(module, "DTYPES", DTYPES[name]):
        return f"no {str(dtype).removeprefix('torch.')}"
    needed = getattr(module, "CAPABILITY", None)
    if needed and torch.cuda.get_device_capability() != needed:
        return f"needs a GPU of capability {'.'.join(map(str, needed))}"
    return None


@functools.cache
def _forced() -> dict[str, tuple[str, bool]]:
    """Backend of each op that QWEN3_BACKEND names, and whether the op itself was named (then it must run)."""
    text = os.environ.get("QWEN3_BACKEND", "").strip()
    if not text:
        return {}
    pairs = [p.split("=", 1) if "=" in p else ("*", p) for p in text.split(",")]
    forced: dict[str, tuple[str, bool]] = {}
    for op, name in pairs:
        if op not in (*OPS, "*") or name not in BACKENDS:
            raise ValueError(
                f"QWEN3_BACKEND is {text!r}; expected a backend of {BACKENDS} or a list op=backend with ops of {OPS}"
            )
        forced.update({o: (name, False) for o in OPS} if op == "*" else {op: (name, True)})
    return forced


def reset() -> None:
    """Forget all choices, so that a changed ``QWEN3_BACKEND`` takes effect (for tests and benchmarks)."""
    explain.cache_clear()
    _forced.cache_clear()
