"""Mixtures: weights per label vector, the file that holds them, and the loader that follows them.

A cell's weight is its number of tokens, to a power that favours rare cells, times a factor per label ("domain=code": 2).
So a few factors weigh every instance by its whole label vector; ``training.data.search`` finds them by proxy models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import strict
from ..files import write_json
from . import cells as cells_module
from .cells import Cell
from .packing import Loader, MixtureLoader, PackedLoader
from .shards import TokenShards

LEAST = 1e-4  # share of the tokens below which a cell is left out: a loader's cycle has 16,384 rows


@dataclass(frozen=True)
class Part:
    """Documents of ``min_tokens`` to ``max_tokens`` (0: no bound) of a data set, and their share of the tokens."""

    path: Path  # from the folder of the mixture's file
    weight: float
    min_tokens: int = 0
    max_tokens: int = 0

    def tokens(self) -> int:
        """Of these documents."""
        lengths = TokenShards(self.path).lengths
        return int(lengths[(lengths >= self.min_tokens) & (lengths <= (self.max_tokens or lengths.max()))].sum())


@dataclass(frozen=True)
class Mixture:
    """What a mixture's file holds."""

    parts: tuple[Part, ...]

    def write(self, file: Path) -> None:
        write_json(file, asdict(self))


def open_loader(data: Path, *, seq_len: int, rows: int, seed: int) -> Loader:
    """The loader of a data set (a folder) or of a mixture (a JSON file)."""
    if not data.is_file():
        return PackedLoader(TokenShards(data), seq_len=seq_len, rows=rows, seed=seed)
    parts = strict.read(Mixture, data).parts
    opened = {path: TokenShards(data.parent / path) for path in {p.path for p in parts}}  # a set may be in several parts
    loaders = [
        PackedLoader(opened[p.path], seq_len=seq_len, rows=rows, seed=seed, min_tokens=p.min_tokens, max_tokens=p.max_tokens)
        for p in parts
    ]
    return MixtureLoader(loaders, [p.weight for p in parts], rows=rows, seed=seed)


def data_sets(loader: Loader) -> list[TokenShards]:
    return [p.data for p in loader.parts] if isinstance(loader, MixtureLoader) else [loader.data]


def weights(
    cells: Mapping[Cell, int], factors: Mapping[str, float] = {}, *, power: float = 1.0, total_tokens: float = 0,
    max_epochs: float = 4.0,
) -> dict[Cell, float]:
    """Shares of the training tokens, which sum to 1.

    Args:
        cells: tokens per cell. factors: {"label=value": factor}, for labels of ``cells.LABELS``.
        power: 1: in proportion to the tokens there are; below 1: more of what is rare.
        total_tokens: of the run; a cell gets no more than ``max_epochs`` passes in it, and what that frees goes to the
            others in proportion. 0: no such bound.

    Raises:
        ValueError: a factor that is negative or for a label or value that no cell has; more tokens than all cells'
        passes.
    """
    known = {f"{name}={getattr(c, name)}" for c in cells for name in cells_module.LABELS}
    for key, factor in factors.items():
        if key not in known or not factor >= 0:
            raise ValueError(f"factor {key!r} is {factor}; expected at least 0 and one of {sorted(known)}")
    weight = {c: n**power for c, n in cells.items()}
    for c in weight:
        for name in cells_module.LABELS:
            weight[c] *= factors.get(f"{name}={getattr(c, name)}", 1.0)
    total = sum(weight.values())
    if not total > 0:
        raise ValueError(f"the factors {dict(factors)} leave no cell with a weight")
    weight = {c: w / total for c, w in weight.items()}
    bound = {c: max_epochs * n / total_tokens for c, n in cells.items()} if total_tokens else dict.fromkeys(cells, 1.0)
    if sum(b for c, b in bound.items() if weight[c] > 0) < 1 - 1e-9:
        raise ValueError(f"{total_tokens:.3g} tokens are over {max_epochs} passes of what the cells hold")
    full: set[Cell] = set()
    while over := [c for c in weight if c not in full and weight[c] > bound[c] * (1 + 1e-12)]:
        full |= set(over)
        rest = sum(w for c, w in weight.items() if c not in full)
        left = 1 - sum(bound[c] for c in full)
        weight = {c: bound[c] if c in full else w * left / rest if rest else 0.0 for c, w in weight.items()}
    return weight


def of_cells(
    shards: Path, share: Mapping[Cell, float], *, seq_len: int, min_tokens: int = 0, max_tokens: int = 0,
    least: float = LEAST,
) -> tuple[Part, ...]:
    """Parts of the cells' training sets that hold a row of documents of these lengths and have at least the share
    ``least``; the others' shares go to these in proportion. Paths are absolute.

    Raises ValueError when no cell does.
    """
    parts = []
    for cell, weight in sorted(share.items()):
        if weight >= least:
            part = Part((shards / "train" / cell.key).resolve(), weight, min_tokens, max_tokens)
            if part.tokens() >= seq_len:
                parts.append(part)
    if not parts:
        raise ValueError(
            f"{shards}: no cell with a weight holds {seq_len} tokens in documents of {min_tokens} to {max_tokens or 'any'} "
            "tokens"
        )
    total = sum(p.weight for p in parts)
    return tuple(replace(p, weight=p.weight / total) for p in parts)


def describe(loader: Loader) -> dict[str, Any]:
    """For a run's record: the index of a data set, or those of a mixture's with their shares."""
    if isinstance(loader, MixtureLoader):
        return {"mixture": [
            {"name": p.data.path.name, "share": float(s), "n_tokens": p.n_tokens,
             "tokenizer_sha256": p.data.index.tokenizer_sha256}
            for p, s in zip(loader.parts, loader.share)
        ]}
    return json.loads(json.dumps(asdict(loader.data.index)))
