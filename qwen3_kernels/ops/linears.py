"""Several projections of one input (queries, keys and values; gate and up), without a pass to add up the input's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``tuple(F.linear(x, w) for w in weights)``.

    Args:
        x: [..., D], any floating dtype. weights: [D_i, D] each, x's dtype.

    Returns: [..., D_i] each. The gradient of x is summed by the matrix products themselves (``addmm``), where autograd would
    write each product and add it in a pass of its own: 3·N·D elements of traffic for every projection but the first.
    """
    if len(weights) < 2 or torch.is_autocast_enabled(x.device.type) or not all(w.dtype == x.dtype for w in weights):
        return tuple(F.linear(x, w) for w in weights)
    return _Linears.apply(x, *weights)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``tuple(layer(x) for layer in layers)``, by `linears` when all are plain ``nn.Linear`` without bias or hooks."""
    if all(plain(layer) for layer in layers):
        return linears(x, *(layer.weight for layer in layers))
    return tuple(layer(x) for layer in layers)


def plain(layer: nn.Module) -> bool:
    """Nothing but a product with its weight happens when the layer is called."""
    return (
        type(layer) is nn.Linear and layer.bias is None and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w) for w in weights)

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        wants_dx, *wants = ctx.needs_input_grad
        rows, dx, dweights = x.reshape(-1, x.shape[-1]), None, []
        grads = [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        if wants_dx and all(wants) and (dy := _side_by_side(grads)) is not None:
            dx = dy @ torch.cat(weights)
            return dx.view(x.shape), *(dy.mT @ rows).split([len(w) for w in weights])
        for dy, w, wanted in zip(grads, weights, wants):
            if wants_dx:
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dweights.append(dy.mT @ rows if wanted else None)
        return None if dx is None else dx.view(x.shape), *dweights


def _side_by_side(parts: list[Tensor]) -> Tensor | None:
    """The matrix whose columns these are, one after another and in this order, if there is one in memory.

    Its two products in place of six take 379 and 366 us for 447 and 390 on an H100 (q, k and v of Qwen3-0.6B, 32,768
    tokens), with 9 us to put the weights together; forward there is nothing to gain (426 for 431).
    """
    # Traced and batched tensors have no addresses, and a view of all parts by the first alone has no gradient.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if not all(type(p) is Tensor and torch._C._has_storage(p) for p in parts):
        return None
    first, end = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for p in parts:
        if p.stride() != first.stride() or p.storage_offset() != end or p.untyped_storage().data_ptr() != storage:
            return None
        end += p.shape[1]
    width = end - first.storage_offset()
    return first.as_strided((len(first), width), (width, 1)) if first.stride() == (width, 1) else None
