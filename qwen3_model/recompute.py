"""What a layer keeps for its backward, as a dial.

none           every tensor that autograd saves
norm+swiglu    the outputs of matrix products and of attention. What the norms (of q and k: norm and RoPE) and SwiGLU
               made of them is computed again, which moves bytes but multiplies no matrices.
full           the layer's inputs; the whole layer is computed again

All give the same gradients, bit for bit. Under torch.compile, which weighs this itself, "norm+swiglu" is "none".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import qwen3_kernels as kernels
from qwen3_kernels.ops.qk_norm_attention import has_kernels

POLICIES = ("none", "norm+swiglu", "full")


def run(policy: str, layer: nn.Module, x: Tensor, *args: Any) -> Any:
    """``layer(x, *args)``, keeping for the backward what ``policy`` says. Raises ValueError for an unknown policy."""
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}; expected one of {POLICIES}")
    if policy == "none" or not torch.is_grad_enabled():
        return layer(x, *args)
    if policy == "full":  # no layer draws random numbers
        return checkpoint(layer, x, *args, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():
        return layer(x, *args)
    with _Recipes():
        return layer(x, *args)


# ---- the cheap ops, as the model calls them: each leaves the recipe of its output ------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, exact: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    out = kernels.rms_norm(x, weight, eps, residual, exact=exact)
    y, h = (out, x) if residual is None else out  # h is kept in any case: norm's backward reads it
    _leave(partial(kernels.rms_norm, h, weight, eps, exact=exact), y)
    return out


def swiglu(gate: Tensor, up: Tensor | None = None, *, exact: bool = False) -> Tensor:
    out = kernels.swiglu(gate, up, exact=exact)
    _leave(partial(kernels.swiglu, gate, up, exact=exact), out)
    return out


def qk_norm_rope(*args: Any, exact: bool = False) -> tuple[Tensor, Tensor]:
    out = kernels.qk_norm_rope(*args, exact=exact)
    _leave(partial(kernels.qk_norm_rope, *args, exact=exact), *out)
    return out


def qk_norm_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    if torch.compiler.is_compiling() or getattr(_local, "recipes", None) is None:
        return kernels.qk_norm_attention(q, k, v, *args, **options)
    if has_kernels(q, k):
        return kernels.qk_norm_attention(q, k, v, *args, recompute=True, **options)
    q_weight, k_weight, rope = args
    q, k = qk_norm_rope(q, k, q_weight, k_weight, *rope, options["eps"])
    return kernels.attention(q, k, v, cu_seqlens=options["cu_seqlens"])


# ---- recipes in place of tensors -------------------------------------------------------------------------------------

_local = threading.local()


def _leave(make: Callable[[], Any], *outputs: Tensor) -> None:
    if not torch.compiler.is_compiling() and (recipes := getattr(_local, "recipes", None)) is not None:
        recipes.add(make, outputs)


class _Recipe:
    """Makes dropped tensors again: once per backward, however many nodes ask for them."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.made, self.uses, self.asked = make, None, 0, 0

    def output(self, index: int) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                made = self.make()
            self.made = made if isinstance(made, tuple) else (made,)
        out, self.asked = self.made[index], self.asked + 1
        if self.asked == self.uses:
            self.made, self.asked = None, 0
        return out


class _Recipes:
    """While it is entered, autograd saves the recipe of an output instead of the output, through any view of it."""

    def __init__(self):
        self.of: dict[int, tuple[_Recipe, int]] = {}
        self.outputs: list[Tensor] = []  # alive until the layer is done, so that no other tensor gets their storage
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def add(self, make: Callable[[], Any], outputs: tuple[Tensor, ...]) -> None:
        recipe = _Recipe(make)
        self.of.update({_storage(t): (recipe, i) for i, t in enumerate(outputs)})
        self.outputs += outputs

    def pack(self, t: Tensor) -> Any:
        found = self.of.get(_storage(t))
        if found is None:
            return t
        found[0].uses += 1
        return *found, t.shape, t.stride(), t.storage_offset()

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        recipe, index, *view = kept
        return recipe.output(index).as_strided(*view)

    def __enter__(self):
        self.outer, _local.recipes = getattr(_local, "recipes", None), self
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        _local.recipes = self.outer
        self.of.clear()
        self.outputs.clear()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
