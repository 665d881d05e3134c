"""Packs documents into rows without padding. A batch is a pure function of (data, seed, step).

The documents of an epoch are laid end to end in an order drawn from (seed, epoch) and cut into rows of ``seq_len``
tokens, which are drawn in random order too; what is left at the end of the epoch (less than a row) is dropped. Every
token of a row is a label exactly once: the input of a document is its tokens shifted right behind an end-of-text token,
    input  <|endoftext|> t1 t2 ... tn
    label   t1           t2 t3 ... <|endoftext|>
so end-of-text both starts and ends a document. A document that is cut by the end of a row goes on in another row as a
document of its own, whose first input is the token before the cut. Attention and positions restart at each document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .shards import TokenShards

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows. ``tokens`` and ``labels`` int64 [N]; ``cu_seqlens`` int32 [documents + 1]."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


class PackedLoader:
    """Random access to training batches.

    Args:
        data: the token shards. seq_len: tokens per row. rows: rows per step, over all ranks and micro-steps.
        seed: of the order of documents and rows.

    Raises:
        ValueError: fewer tokens than one row, or sizes below 1.
    """

    def __init__(self, data: TokenShards, *, seq_len: int, rows: int, seed: int):
        for name, value in (("seq_len", seq_len), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if data.index.n_tokens < seq_len:
            raise ValueError(f"seq_len is {seq_len}, but {data.path} has only {data.index.n_tokens} tokens")
        self.data, self.seq_len, self.rows, self.seed = data, seq_len, rows, seed
        self.rows_per_epoch = data.index.n_tokens // seq_len
        self._epoch = lru_cache(maxsize=2)(self._order)  # a step may straddle two epochs

    def epoch(self, step: int) -> float:
        """Passes over the data that are done before ``step``."""
        return step * self.rows / self.rows_per_epoch

    def batch(self, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, micros: int = 1) -> Batch:
        """Rows of one rank's micro-step. Together, the parts of a step hold the same rows in the same order whatever
        ``world`` and ``micros``. Raises ValueError when the rows cannot be divided so."""
        parts, part = world * micros, rank * micros + micro
        if step < 0 or not (0 <= rank < world and 0 <= micro < micros) or self.rows % parts:
            raise ValueError(
                f"step {step}, rank {rank} of {world}, micro-step {micro} of {micros}: expected step >= 0, parts within "
                f"range and {self.rows} rows to be divisible by {parts}"
            )
        share = self.rows // parts
        first = step * self.rows + part * share
        return _join([self._row(i) for i in range(first, first + share)])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, where each ends in the epoch's stream, and the rows, all in the epoch's order."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = rng.permutation(len(self.data))
        return order, np.cumsum(self.data.lengths[order]), rng.permutation(self.rows_per_epoch)

    def _row(self, number: int) -> list[np.ndarray]:
        epoch, place = divmod(number, self.rows_per_epoch)
        order, ends, rows = self._epoch(epoch)
        start = int(rows[place]) * self.seq_len
        return _pieces(self.data, order, ends, start, start + self.seq_len)


def evaluation_batches(data: TokenShards, *, seq_len: int, rows: int, overlap: int = 0) -> Iterator[Batch]:
    """All of ``data`` in order, each token a label exactly once; the last batch may be smaller.

    ``overlap`` > 0 gives a label at least that much of its document before it, where the document has so much: rows
    advance by seq_len - overlap and the repeated labels are ignored. Without it a label just behind a cut sees nothing.
    """
    if not 0 <= overlap < seq_len:
        raise ValueError(f"overlap is {overlap}; expected at least 0 and below seq_len {seq_len}")
    order, ends = np.arange(len(data)), np.cumsum(data.lengths)
    total, done = int(ends[-1]), 0
    while done < total:
        pieces, skips = [], []
        while done < total and len(pieces) < rows:
            start = max(0, done - overlap)
            stop = min(start + seq_len, total)
            pieces.append(_pieces(data, order, ends, start, stop))
            skips.append(done - start)
            done = stop
        yield _join(pieces, skips)


def _pieces(data: TokenShards, order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[np.ndarray]:
    """The pieces of documents in [start, stop) of a stream, each with the input token before its first label."""
    pieces = []
    d = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        document, end = int(order[d]), min(int(ends[d]), stop)
        first = start - (int(ends[d]) - int(data.lengths[document]))
        tokens = data.read(document, max(first - 1, 0), first + end - start)
        pieces.append(tokens if first else np.concatenate([[data.index.end_of_text], tokens]))
        start, d = end, d + 1
    return pieces


def _join(rows: list[list[np.ndarray]], skips: list[int] | None = None) -> Batch:
    pieces = [p for row in rows for p in row]
    lengths = np.array([len(p) - 1 for p in pieces])
    labels = np.concatenate([p[1:] for p in pieces])
    if skips is not None:
        start = 0
        for row, skip in zip(rows, skips):
            labels[start : start + skip] = IGNORE
            start += sum(len(p) - 1 for p in row)
    return Batch(
        torch.from_numpy(np.concatenate([p[:-1] for p in pieces])),
        torch.from_numpy(labels),
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
    )
