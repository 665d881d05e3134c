"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
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


def kept(file: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` gives, from disk where it has been made before. Raises ValueError as ``check_settings`` does."""
    if file.exists():
        check_settings(file, settings)
    else:
        write_json(file, {"settings": settings, "value": make()})
    return json.loads(file.read_text())["value"]


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError naming the file and what differs when its "settings" are others, or it has none."""
    was, now = json.loads(file.read_text()).get("settings", {}), json.loads(json.dumps(settings, default=str))
    if changed := sorted(k for k in was.keys() | now.keys() if k not in was or k not in now or was[k] != now[k]):
        raise ValueError(f"{file} is of a run with other {', '.join(changed)}; remove it or choose another out folder")
