"""Token shards: memory-mapped files of documents, and the index that names them.

A shard ``NNNNN.tok`` is a 40-byte header (magic, bytes per token, documents, tokens, UTF-8 bytes of the text), the
document ends as uint64 [documents] and the tokens as uint16 or uint32 [tokens], all little-endian. Each document ends
with the end-of-text token, which counts as one of its tokens. ``index.json`` is written last: a folder without it is
not a data set.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

MAGIC = b"QW3TOK01"
HEADER = struct.Struct("<8sIIQQQ")  # magic, bytes per token, zero, documents, tokens, text bytes
FORMAT = "qwen3-token-shards-1"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class Index:
    """What ``index.json`` holds. ``shards`` are (file, tokens, documents)."""

    dtype: str
    vocab_size: int
    end_of_text: int
    tokenizer_sha256: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    shards: tuple[tuple[str, int, int], ...]
    format: str = FORMAT


def write(
    path: str | Path, documents: Iterable[tuple[Sequence[int], int]], *, vocab_size: int, end_of_text: int,
    tokenizer_sha256: str = "", shard_tokens: int = 1 << 27,
) -> Index:
    """Writes a data set and returns its index.

    Args:
        path: folder, which must not exist; it appears whole or not at all.
        documents: pairs (token ids without end-of-text, size of the text in UTF-8 bytes).
        shard_tokens: a shard is closed once it has this many tokens.

    Raises:
        FileExistsError: ``path`` exists. ValueError: no documents, or an id outside [0, vocab_size).
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or write the shards elsewhere")
    if not 0 <= end_of_text < vocab_size:
        raise ValueError(f"end_of_text is {end_of_text}; expected an id in [0, {vocab_size})")
    name = "uint16" if vocab_size <= 1 << 16 else "uint32"
    with _new_folder(path) as tmp:
        shards, n_bytes, parts, size, held = [], 0, [], 0, 0

        def close() -> None:
            nonlocal parts, size, held
            file = f"{len(shards):05d}.tok"
            _write_shard(tmp / file, parts, DTYPES[name], held)
            shards.append((file, size, len(parts)))
            parts, size, held = [], 0, 0

        for number, (ids, text_bytes) in enumerate(documents):
            tokens = np.empty(len(ids) + 1, np.int64)
            tokens[:-1], tokens[-1] = ids, end_of_text
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
                raise ValueError(f"document {number} has token id {bad}; expected ids in [0, {vocab_size})")
            parts.append(tokens.astype(DTYPES[name]))
            size, held, n_bytes = size + len(tokens), held + text_bytes, n_bytes + text_bytes
            if size >= shard_tokens:
                close()
        if parts:
            close()
        if not shards:
            raise ValueError(f"{path}: no documents to write")
        index = Index(
            name, vocab_size, end_of_text, tokenizer_sha256, sum(s[1] for s in shards), sum(s[2] for s in shards),
            n_bytes, tuple(shards),
        )
        _write_index(tmp, index)
    return index


def merge(path: str | Path, parts: Sequence[str | Path]) -> Index:
    """A data set of the shards of others, in the order given; they are linked, not copied, where the file system can.

    Raises:
        FileExistsError: ``path`` exists. ValueError: no parts, or they differ in dtype, vocabulary, end-of-text or
        tokenizer.
    """
    path, parts = Path(path), [Path(p) for p in parts]
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or write the shards elsewhere")
    if not parts:
        raise ValueError(f"{path}: no data sets to merge")
    indices = [read_index(p) for p in parts]
    kinds = {(i.dtype, i.vocab_size, i.end_of_text, i.tokenizer_sha256) for i in indices}
    if len(kinds) > 1:
        raise ValueError(f"{path}: data sets of different kinds cannot be merged (dtype, vocabulary, ...): {sorted(kinds)}")
    with _new_folder(path) as tmp:
        found = []
        for part, index in zip(parts, indices):
            for file, tokens, documents in index.shards:
                name = f"{len(found):05d}.tok"
                try:
                    os.link(part / file, tmp / name)
                except OSError:
                    shutil.copyfile(part / file, tmp / name)
                found.append((name, tokens, documents))
        index = Index(
            *kinds.pop(), *(sum(getattr(i, n) for i in indices) for n in ("n_tokens", "n_documents", "n_bytes")), tuple(found)
        )
        _write_index(tmp, index)
    return index


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` at the end, or goes when something is raised."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        tmp.rename(path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _write_index(folder: Path, index: Index) -> None:
    with open(folder / "index.json", "w") as f:
        json.dump(asdict(index), f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _write_shard(file: Path, parts: list[np.ndarray], dtype: np.dtype, text_bytes: int) -> None:
    ends = np.cumsum([len(p) for p in parts], dtype="<u8")
    with open(file, "wb") as f:
        f.write(HEADER.pack(MAGIC, dtype.itemsize, 0, len(parts), int(ends[-1]), text_bytes))
        f.write(ends.tobytes())
        for part in parts:
            f.write(part.tobytes())
        f.flush()
        os.fsync(f.fileno())


class TokenShards:
    """A data set, memory-mapped. ``starts`` int64 [documents], ``lengths`` int64 [documents] address the documents in
    the order written; ``read`` copies a range of one document.

    Raises:
        FileNotFoundError: no index or a shard is missing.
        ValueError: a file contradicts the index or itself (magic, sizes, dtype, offsets); the message names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = read_index(self.path)
        dtype = DTYPES[self.index.dtype]
        opened = [_open_shard(self.path / file, dtype, n, docs) for file, n, docs in self.index.shards]
        if (held := sum(o[2] for o in opened)) != self.index.n_bytes:
            raise ValueError(f"{self.path}: the shards hold {held} bytes of text, index.json says {self.index.n_bytes}")
        self._tokens = [o[0] for o in opened]
        self.lengths = np.concatenate([np.diff(o[1], prepend=0) for o in opened])
        self._shard = np.repeat(np.arange(len(opened)), [len(o[1]) for o in opened])
        self._start = np.concatenate([o[1] for o in opened]) - self.lengths

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 tokens [start, stop) of one document, its end-of-text included. Raises ValueError for an id that is
        not below the vocabulary size: the file was damaged after it was written."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"document {document} has {length} tokens; got the range [{start}, {stop})")
        base = int(self._start[document])
        tokens = self._tokens[self._shard[document]][base + start : base + stop].astype(np.int64)
        if len(tokens) and tokens.max() >= self.index.vocab_size:
            raise ValueError(
                f"{self.path}: document {document} has token id {tokens.max()}; the vocabulary has {self.index.vocab_size}"
            )
        return tokens


def read_index(path: Path) -> Index:
    """Reads and checks ``index.json``."""
    file = path / "index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a folder written by training.data.shards.write")
    try:
        raw = json.loads(file.read_text())
        index = Index(**(raw | {"shards": tuple((str(f), int(n), int(d)) for f, n, d in raw["shards"])}))
        sums = sum(s[1] for s in index.shards), sum(s[2] for s in index.shards)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file} is not an index of token shards: {e!r}") from e
    if index.format != FORMAT:
        raise ValueError(f"{file}: format is {index.format!r}; expected {FORMAT!r}")
    if index.dtype not in DTYPES:
        raise ValueError(f"{file}: dtype is {index.dtype!r}; expected one of {list(DTYPES)}")
    if sums != (index.n_tokens, index.n_documents):
        raise ValueError(f"{file}: the shards sum to {sums} tokens and documents, not {index.n_tokens, index.n_documents}")
    if not 0 <= index.end_of_text < index.vocab_size:
        raise ValueError(f"{file}: end_of_text is {index.end_of_text}; expected an id in [0, {index.vocab_size})")
    return index


def _open_shard(file: Path, dtype: np.dtype, n_tokens: int, n_documents: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, document ends int64, bytes of text) after checking header, size and offsets."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is named by index.json but does not exist")
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(HEADER.size)
    if len(head) < HEADER.size:
        raise ValueError(f"{file} has {size} bytes, less than its header of {HEADER.size}")
    magic, itemsize, _, documents, tokens, text_bytes = HEADER.unpack(head)
    if magic != MAGIC:
        raise ValueError(f"{file}: magic is {magic!r}; expected {MAGIC!r}")
    if itemsize != dtype.itemsize:
        raise ValueError(f"{file}: {itemsize} bytes per token; index.json says {dtype.name}")
    if (tokens, documents) != (n_tokens, n_documents):
        raise ValueError(
            f"{file}: header says {tokens} tokens in {documents} documents; index.json says {n_tokens} in {n_documents}"
        )
    expected = HEADER.size + 8 * documents + itemsize * tokens
    if size != expected:
        raise ValueError(f"{file} has {size} bytes; its header asks for {expected}: truncated or overwritten")
    ends = np.fromfile(file, "<u8", documents, offset=HEADER.size).astype(np.int64)
    if documents == 0 or ends[-1] != tokens or np.diff(ends, prepend=0).min() < 1:
        raise ValueError(f"{file}: document ends do not rise from 0 to {tokens}")
    return np.memmap(file, dtype, "r", HEADER.size + 8 * documents, (tokens,)), ends, text_bytes
