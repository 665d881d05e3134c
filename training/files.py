"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Creates the folder, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.rename(file)


def write_json(file: Path, value: Any) -> None:
    """Paths and the like as text."""
    write_text(file, json.dumps(value, indent=1, default=str))


def write_jsonl(file: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
