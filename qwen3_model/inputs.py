"""What a forward does before its first layer: check the arguments and work out where the tokens are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import rope
from .cache import KVCache
from .config import Qwen3Config


class Step(NamedTuple):
    """What all layers of one forward share."""

    cos: Tensor  # [R, D/2] float32, see qk_norm_rope
    sin: Tensor
    cu_seqlens: Tensor | None
    cache: KVCache | None
    where: tuple[Tensor, Tensor] | None  # (rows, slots) of the new tokens in the cache
    q_start: Tensor | None
    spans: tuple[Tensor, Tensor, Tensor] | None  # of the rows in the cache, see `cache.attend`


def prepare(
    config: Qwen3Config, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, cache: KVCache | None,
    inv_freq: Tensor, rope_factor: float,
) -> Step:
    """Arguments and errors as `Qwen3.forward`."""
    _check(config, tokens, positions, cu_seqlens, cache)
    device, where, q_start, spans = tokens.device, None, None, None
    index = torch.arange(tokens.shape[-1], device=device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
        index = index - cu_seqlens.long()[document]
        where = (document, index)
    elif cache is not None:
        q_start = cache.lengths
        index = q_start.unsqueeze(1).long() + index
        where = (torch.arange(cache.batch, device=device).unsqueeze(1), index)
        if tokens.shape[1] == 1 and cache.flash():
            spans = cache.spans()
    cos, sin = rope.rope_tables(index if positions is None else positions, inv_freq, rope_factor)
    return Step(cos, sin, cu_seqlens, cache, where, q_start, spans)


def _check(
    config: Qwen3Config, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, cache: KVCache | None
) -> None:
    def require(ok: bool, name: str, value: object, wanted: str, error: type[Exception] = ValueError) -> None:
        if not ok:
            raise error(f"Qwen3: {name} is {value}; expected {wanted}")

    packed, shape = cu_seqlens is not None, tuple(tokens.shape)
    require(tokens.dtype == torch.int64, "tokens", tokens.dtype, "torch.int64", TypeError)
    require(tokens.dim() == (1 if packed else 2), "tokens", shape, "[N] with cu_seqlens" if packed else "[B, T]")
    if positions is not None:
        require(not positions.is_floating_point(), "positions", positions.dtype, "integers", TypeError)
        fits = positions.shape == tokens.shape or (not packed and positions.shape == tokens.shape[1:])
        require(fits, "positions", tuple(positions.shape), f"shape {shape}" + ("" if packed else f" or {shape[1:]}"))
    if packed:
        require(cu_seqlens.dtype == torch.int32, "cu_seqlens", cu_seqlens.dtype, "torch.int32", TypeError)
        require(cu_seqlens.dim() == 1 and len(cu_seqlens) > 0, "cu_seqlens", tuple(cu_seqlens.shape), "[documents + 1]")
    if cache is not None:
        rows = len(cu_seqlens) - 1 if packed else shape[0]
        require(rows == cache.batch, "cu_seqlens" if packed else "tokens", f"{rows} rows", f"the cache's {cache.batch}")
        require(packed or shape[1] <= cache.max_len, "tokens", shape, f"at most max_len {cache.max_len} new tokens")
    for name, t in (("positions", positions), ("cu_seqlens", cu_seqlens), ("cache", getattr(cache, "lengths", None))):
        require(t is None or t.device == tokens.device, name, f"on {getattr(t, 'device', None)}", f"on {tokens.device}")
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # what follows reads values
    if tokens.numel():
        low, high = tokens.min().item(), tokens.max().item()
        require(low >= 0 and high < config.vocab_size, "tokens", f"in [{low}, {high}]", f"ids in [0, {config.vocab_size})")
    new = torch.tensor(shape[-1])
    if packed:
        new = cu_seqlens.diff()
        ends = (cu_seqlens[0].item(), cu_seqlens[-1].item())
        require(ends == (0, shape[0]) and bool((new >= 0).all()), "cu_seqlens", cu_seqlens.tolist(),
                f"cumulative lengths rising from 0 to {shape[0]}")
    if cache is not None and cache.batch:
        used = cache.lengths
        require(not packed or not bool((used[new > 0] > 0).any()), "cache.lengths", used.tolist(),
                "0 in the rows that a packed prefill fills")
        require((used + new).max().item() <= cache.max_len, "cache.lengths", used.tolist(),
                f"room for {new.max().item()} more tokens within max_len {cache.max_len}")
