"""Packs documents into rows without padding. A batch is a pure function of (data, seed, step).

The documents of an epoch are laid end to end in an order drawn from (seed, epoch) and cut into rows of ``seq_len``
tokens, which are drawn in random order too; what is left at the end of the epoch (less than a row) is dropped. Every
token of a row is a label exactly once: the input of a document is its tokens shifted right behind an end-of-text token,
    input  <|endoftext|> t1 t2 ... tn
    label   t1           t2 t3 ... <|endoftext|>
so end-of-text both starts and ends a document. A document that is cut by the end of a row goes on in another row as a
document of its own, whose first input is the token before the cut. Attention and positions restart at each document.

A mixture takes its rows from several data sets. Which set a row comes from is a function of (seed, row) alone, too, so a
run goes on exactly where it stopped, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Loader:
    """Random access to training batches of ``rows`` rows of ``seq_len`` tokens; a subclass says what a row is. Raises
    ValueError for sizes below 1."""

    def __init__(self, *, seq_len: int, rows: int, seed: int):
        for name, value in (("seq_len", seq_len), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.seq_len, self.rows, self.seed = seq_len, rows, seed

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
        return _join([self.row(i) for i in range(first, first + share)])

    def row(self, number: int) -> list[np.ndarray]:
        """The pieces of documents in a row, counted from the start of the run."""
        raise NotImplementedError


class PackedLoader(Loader):
    """Batches from one data set.

    Args:
        data: the token shards. seq_len: tokens per row. rows: rows per step, over all ranks and micro-steps.
        seed: of the order of documents and rows.
        min_tokens, max_tokens: documents of other lengths (end-of-text included) are left out; 0: no bound.

    Raises:
        ValueError: fewer tokens than one row, or sizes below 1.
    """

    def __init__(
        self, data: TokenShards, *, seq_len: int, rows: int, seed: int, min_tokens: int = 0, max_tokens: int = 0
    ):
        super().__init__(seq_len=seq_len, rows=rows, seed=seed)
        fits = (data.lengths >= min_tokens) & (data.lengths <= (max_tokens or np.inf))
        self.data, self.documents = data, np.flatnonzero(fits)
        self.n_tokens = int(data.lengths[self.documents].sum())
        if self.n_tokens < seq_len:
            bounds = f" in documents of {min_tokens} to {max_tokens or 'any number of'} tokens"
            bounds = bounds if min_tokens or max_tokens else ""
            raise ValueError(f"seq_len is {seq_len}, but {data.path} has only {self.n_tokens} tokens{bounds}")
        self.rows_per_epoch = self.n_tokens // seq_len
        self._epoch = lru_cache(maxsize=2)(self._order)  # a step may straddle two epochs

    def epoch(self, step: int) -> float:
        """Passes over the data that are done before ``step``."""
        return step * self.rows / self.rows_per_epoch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, where each ends in the epoch's stream, and the rows, all in the epoch's order."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = self.documents[rng.permutation(len(self.documents))]
        return order, np.cumsum(self.data.lengths[order]), rng.permutation(self.rows_per_epoch)

    def row(self, number: int) -> list[np.ndarray]:
        epoch, place = divmod(number, self.rows_per_epoch)
        order, ends, rows = self._epoch(epoch)
        start = int(rows[place]) * self.seq_len
        return _pieces(self.data, order, ends, start, start + self.seq_len)


class MixtureLoader(Loader):
    """Rows from several data sets, each with its share of them.

    In a cycle of ``cycle`` rows every set gets its exact number, spread evenly: the first n rows of a cycle hold a set's
    share of n to within a row or so, and so does a step of many rows.

    Args:
        parts: loaders of the same row length. weights: shares of the rows (which are shares of the tokens); scaled to
            sum to 1. A set of weight 0 is left out.

    Raises:
        ValueError: no positive weight, one that is negative, or one too small to get a row of a cycle; unequal lengths.
    """

    def __init__(self, parts: Sequence[PackedLoader], weights: Sequence[float], *, rows: int, seed: int, cycle: int = 1 << 14):
        if len(parts) != len(weights) or not parts:
            raise ValueError(f"{len(parts)} data sets and {len(weights)} weights; expected as many, at least one")
        super().__init__(seq_len=parts[0].seq_len, rows=rows, seed=seed)
        share = np.asarray(weights, np.float64)
        if not (np.isfinite(share).all() and share.min() >= 0 and share.sum() > 0):
            raise ValueError(f"weights are {list(weights)}; expected none negative and a positive sum")
        if len({p.seq_len for p in parts}) > 1:
            raise ValueError(f"row lengths are {[p.seq_len for p in parts]}; expected one")
        self.parts, self.share, self.cycle = list(parts), share / share.sum(), cycle
        exact = self.share * cycle
        self.quota = np.floor(exact).astype(np.int64)
        short = cycle - int(self.quota.sum())  # rows left over go to the largest remainders
        self.quota[np.argsort(self.quota - exact, kind="stable")[:short]] += 1
        if lost := [p.data.path.name for p, s, q in zip(parts, share, self.quota) if s > 0 and q == 0]:
            raise ValueError(f"weights of {lost[:5]} are below a row in {cycle}; expected larger ones, or 0")
        self._cycle = lru_cache(maxsize=2)(self._plan)

    def _plan(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a cycle: its data set, and how many rows of that set come before it in the cycle."""
        rng = np.random.Generator(np.random.PCG64([self.seed, number, len(self.parts)]))
        part = np.repeat(np.arange(len(self.parts)), self.quota)
        nth = np.concatenate([np.arange(q) for q in self.quota])
        # The k-th of q rows lies somewhere in the k-th of q equal stretches of the cycle.
        place = (nth + rng.random(self.cycle)) / self.quota[part]
        order = np.argsort(place, kind="stable")
        return part[order], nth[order]

    def source(self, number: int) -> tuple[int, int]:
        """(data set, its row) of a row of the run."""
        cycle, place = divmod(number, self.cycle)
        part, nth = self._cycle(cycle)
        chosen = int(part[place])
        return chosen, cycle * int(self.quota[chosen]) + int(nth[place])

    def row(self, number: int) -> list[np.ndarray]:
        part, own = self.source(number)
        return self.parts[part].row(own)


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
