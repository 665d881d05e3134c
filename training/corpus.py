"""Real text that every machine with this project's dependencies has: Python's standard library, its documentation
topics, and the sources and documentation that installed packages ship.

The order of the documents is fixed on one machine; another Python or other package versions give other text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Dependencies of this project, direct or through torch and matplotlib; none of them carries copies of another.
PACKAGES = ("numpy", "rich", "jinja2", "networkx", "matplotlib", "torch", "tokenizers", "safetensors", "mpmath", "sympy")
SUFFIXES = frozenset({".py", ".pyi", ".rst", ".md", ".txt"})
# Tests would be a third of the text; `encodings` is a hundred near-equal character tables.
SKIPPED = frozenset({"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "encodings", "include"})


@dataclass(frozen=True)
class Document:
    """``source`` is "stdlib", "topics" or a package; ``name`` a path or topic inside it; ``text`` is NFC."""

    source: str
    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def documents(
    packages: Iterable[str] = PACKAGES, *, min_chars: int = 200, max_chars: int = 200_000
) -> Iterator[Document]:
    """Documents without exact duplicates: standard library, then topics, then ``packages`` in the order given. Files that are
    not UTF-8 or outside [min_chars, max_chars] are left out."""
    seen: set[str] = set()
    for document in _all(tuple(packages)):
        if not min_chars <= len(document.text) <= max_chars or document.digest in seen:
            continue
        seen.add(document.digest)
        yield document


def _all(packages: tuple[str, ...]) -> Iterator[Document]:
    yield from _tree("stdlib", Path(sysconfig.get_paths()["stdlib"]), frozenset({".py"}))
    yield from _topics()
    for name in packages:
        spec = importlib.util.find_spec(name)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            yield from _tree(name, Path(root), SUFFIXES)


def _tree(source: str, root: Path, suffixes: frozenset[str]) -> Iterator[Document]:
    files = (p for p in root.rglob("*") if p.suffix in suffixes and p.is_file())
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts[:-1]) and relative.parts[0] != "pydoc_data":
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            yield Document(source, relative.as_posix(), unicodedata.normalize("NFC", text))


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name, text in sorted(topics.items()):
        yield Document("topics", name, unicodedata.normalize("NFC", text))
