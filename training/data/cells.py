"""Cells: the sets of documents that share one label vector, which is what mixture weights are given to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "cells.json"
LABELS = ("field", "domain", "language", "educational_value")


@dataclass(frozen=True, order=True)
class Cell:
    """A label vector. ``key`` names it on disk."""

    field: str
    domain: str
    language: str
    educational_value: str

    @property
    def key(self) -> str:
        return ".".join((self.field, self.domain, self.language, self.educational_value))

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Cell:
        """Of a labelled document."""
        labels = metadata["labels"]
        return cls(labels["field"], labels["domain"], metadata["language"], str(labels["educational_value"]))

    @classmethod
    def parse(cls, key: str) -> Cell:
        return cls(*key.split("."))


def read(folder: Path, part: str = "train") -> dict[Cell, int]:
    """{cell: tokens} of "train" or "held_out" in the shards' folder of a build. Raises FileNotFoundError."""
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected the shards' folder of python -m training.data build")
    return {Cell.parse(k): c[part]["tokens"] for k, c in json.loads(file.read_text()).items() if part in c}
