"""Keys and values of the tokens seen so far, in place and at fixed addresses, so that decoding fits in a CUDA graph."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from qwen3_kernels.ops import attention_ref

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

    def flash(self) -> bool:
        """Whether `attend` serves here: half precision on a GPU where torch's kernel is right."""
        return self.k.is_cuda and self.k.element_size() == 2 and _flash_is_right(self.k.device, self.k.dtype, self.k.shape[-1])

    def spans(self) -> tuple[Tensor, Tensor, Tensor]:
        """(where each row's query starts, where each row's slots start, slots in use with one new token), int32."""
        rows = torch.arange(self.batch + 1, device=self.k.device, dtype=torch.int32)
        return rows, rows * self.max_len, self.lengths + 1

    def attend(self, layer: int, q: Tensor, spans: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Attention of one new token per row, q [B, 1, H, D], whose key and value are in place: [B, 1, H, D]. Reads no
        slot that is not in use, and needs no copy of the keys for the queries that share them."""
        return _flash(q[:, 0], self.k[layer], self.v[layer], spans, self.max_len).unsqueeze(1)

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


def _flash(q: Tensor, k: Tensor, v: Tensor, spans: tuple[Tensor, Tensor, Tensor], max_len: int) -> Tensor:
    """q [B, H, D], k, v [B, max_len, Hk, D] -> [B, H, D] by torch's FlashAttention (Dao 2023, arXiv 2307.08691), which takes
    the rows as packed documents of which it reads the beginning."""
    queries, slots, used = spans
    return torch.ops.aten._flash_attention_forward(
        q.contiguous(), k.flatten(0, 1), v.flatten(0, 1), queries, slots, 1, max_len, 0.0, False, False, scale=q.shape[-1] ** -0.5,
        seqused_k=used,
    )[0]


@functools.cache
def _flash_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Its arguments are internal to torch, so it is tried before it is used."""
    B, T, H, Hk = 3, 40, 4, 2
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, n, h, width, device=device, generator=generator).to(dtype) for n, h in ((1, H), (T, Hk), (T, Hk)))
    used = torch.tensor([1, 17, T], dtype=torch.int32, device=device)
    rows = torch.arange(B + 1, dtype=torch.int32, device=device)
    try:
        out = _flash(q[:, 0], k, v, (rows, rows * T, used), T)
    except (RuntimeError, TypeError, AttributeError) as e:
        warnings.warn(f"torch's FlashAttention over a KV cache does not run here, so decoding is slower: {e}", stacklevel=2)
        return False
    wanted = attention_ref(q.double(), k.double(), v.double(), q_start=used - 1)[:, 0]
    plain = attention_ref(q, k, v, q_start=used - 1)[:, 0]
    error, bound = ((x.double() - wanted).abs().max().item() for x in (out, plain))
    if not error <= 2 * bound:
        warnings.warn(f"torch's FlashAttention over a KV cache is off by {error:.2g}, so it is not used", stacklevel=2)
        return False
    return True
