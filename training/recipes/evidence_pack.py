"""Packs: what a run leaves, in parts small enough to be carried between machines."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

PARTS = 15 << 20  # bytes of a part
METRICS = frozenset({"metrics.jsonl", "run.json", "plan.json", "result.json"})


def unpacked(data: Path, out: Path) -> tuple[Path, Path]:
    """(shards, tokenizer.json) of the archive, once."""
    folder = out / "data"
    if not (folder / "tokenizer.json").exists():
        tmp = out / f".data.{os.getpid()}.tmp"
        with tarfile.open(data, "r:*") as tar:
            tar.extractall(tmp, filter="data")
        tmp.rename(folder)
    return folder / "shards", folder / "tokenizer.json"


def pack(out: Path, file: Path, keep: Sequence[str], part: int = PARTS) -> list[Path]:
    """Results, metrics and configs, and the models of the stages in ``keep``, as one xz archive in parts."""
    wanted = []
    for p in sorted(out.rglob("*")):
        place = p.relative_to(out).parts  # model, stage, ...
        result = p.suffix == ".json" and len(place) == 2 and place[0] != "data"
        model = len(place) > 3 and place[2] == "model" and place[1] in keep
        if p.is_file() and not {"checkpoints", "speed"} & {*place} and (result or model or p.name in METRICS):
            wanted.append(p)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.tmp")
    with tarfile.open(whole, "w:xz", preset=1) as tar:
        for p in wanted:
            tar.add(p, p.relative_to(out))
    for old in parts_of(file):
        old.unlink()
    found = []
    with open(whole, "rb") as f:
        while chunk := f.read(part):
            found.append(file.with_name(f"{file.name}.{len(found):02d}"))
            found[-1].write_bytes(chunk)
    whole.unlink()
    return found


def parts_of(file: Path) -> list[Path]:
    return sorted(p for p in file.parent.glob(f"{file.name}.*") if p.suffix[1:].isdigit())


def unpack(file: Path, out: Path) -> None:
    """The opposite of `pack`. What is in ``out`` already stays."""
    parts = [file] if file.exists() else parts_of(file)
    if not parts:
        raise FileNotFoundError(f"{file} does not exist, nor {file}.00; expected what --pack wrote")
    whole = out / f".start.{os.getpid()}.tmp"
    out.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(b"".join(p.read_bytes() for p in parts))
    with tarfile.open(whole, "r:xz") as tar:
        for member in tar:
            if not (out / member.name).exists():
                tar.extract(member, out, filter="data")
    whole.unlink()
