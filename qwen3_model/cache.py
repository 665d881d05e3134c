"""Keys and values of the tokens seen so far, in place and at fixed addresses, so that decoding fits in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Qwen3Config


class KVCache:
    """Room for `max_len` tokens in each of `batch` rows.

    `k[l]`, `v[l]`: [batch, max_len, Hk, D] of layer l; `lengths`: [batch] int32, tokens valid per row.

    How `model(tokens, cache=cache)` uses it, always under `torch.no_grad()` or `inference_mode()`:
      - tokens [B, T]: the T new tokens of row b go to the slots lengths[b] .. lengths[b] + T - 1, and attend to
        everything before them in their row.
      - packed tokens [N] with cu_seqlens [B + 1]: document i goes to row i from slot 0; a row whose document is empty
        is left alone, so that new prompts can be filled in beside rows that are already running.
    The model writes keys and values but moves no length: the caller says how many of the new tokens count with
    `advance`. So rows may be padded on the right (pads are overwritten by what comes next), and speculative tokens are
    dropped by not counting them.

    A row that overflows raises on the CPU; on CUDA that would need a sync, so the caller keeps lengths + T <= max_len.
    """

    def __init__(
        self, config: Qwen3Config, batch: int, max_len: int, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        for name, value in (("batch", batch), ("max_len", max_len)):
            if type(value) is not int or value < 1:
                raise ValueError(f"KVCache: {name} is {value!r}; expected a positive int")
        shape = (config.num_hidden_layers, batch, max_len, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty: attention through a mask multiplies unused values by 0, and 0 * NaN is NaN.
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.batch, self.max_len = batch, max_len

    def update(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Write k, v [..., Hk, D] at (rows, slots), int64 tensors that broadcast to the leading shape of k."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("KVCache: no gradient flows through a cache; run the model under torch.no_grad()")
        if k.dtype != self.k.dtype:
            raise TypeError(f"KVCache: keys are {k.dtype}; expected {self.k.dtype}, the dtype the cache was made with")
        self.k[layer].index_put_((rows, slots), k)
        self.v[layer].index_put_((rows, slots), v)

    def advance(self, counts: int | Tensor) -> None:
        """Count `counts` more tokens as valid: the same in every row, or [batch] per row."""
        if isinstance(counts, Tensor) and counts.shape != self.lengths.shape:
            raise ValueError(f"KVCache: counts has shape {tuple(counts.shape)}; expected ({self.batch},)")
        self.lengths.add_(counts)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget all rows, or those of an int64 index or bool mask [batch]."""
        if rows is None:
            self.lengths.zero_()
        else:
            self.lengths[rows] = 0
