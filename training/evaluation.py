"""Held-out loss by label: what a model has learnt of each domain and language."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from qwen3_model.model import Qwen3

from .data import cells
from .data.packing import evaluation_batches
from .data.shards import TokenShards
from .pretrain import evaluate


class HeldOut:
    """The held-out cells of a build, cut into batches once.

    Args:
        shards: the shards' folder of a build. seq_len, rows: of the batches. max_tokens: per cell, 0: all.
        labels: which of ``data.cells.LABELS`` to tell apart.
    """

    def __init__(
        self, shards: Path, *, seq_len: int, rows: int, max_tokens: int = 0, labels: Iterable[str] = ("domain", "language")
    ):
        self.labels, self.cells = tuple(labels), []
        for cell in cells.read(shards, "held_out"):
            data, batches, taken = TokenShards(shards / "held_out" / cell.key), [], 0
            for batch in evaluation_batches(data, seq_len=seq_len, rows=rows):
                batches.append(batch)
                taken += len(batch.labels)
                if max_tokens and taken >= max_tokens:
                    break
            self.cells.append((cell, data, batches))
        if not self.cells:
            raise ValueError(f"{shards} holds no held-out documents; build it with held_out above 0")

    def __call__(self, model: Qwen3) -> dict[str, float]:
        """{"loss": nats per token over all; "domain=code": ..., "language=en": ...}, and "perplexity"."""
        nats, tokens = defaultdict(float), defaultdict(int)
        training = model.training
        for cell, data, batches in self.cells:
            found = evaluate(model.eval(), data, batches)
            for key in ("loss", *(f"{name}={getattr(cell, name)}" for name in self.labels)):
                nats[key] += found["loss"] * found["tokens"]
                tokens[key] += int(found["tokens"])
        model.train(training)
        result = {key: nats[key] / tokens[key] for key in sorted(nats, key=lambda k: (k != "loss", k))}
        return result | {"perplexity": math.exp(min(result["loss"], 50.0))}

