"""Raw files for a small pre-training, from what a machine has: Python's standard library and documentation topics, the
sources and documentation of installed packages, the translations of its programs (gettext, over a hundred languages where
they are installed), manuals in HTML and PDF, and worked problems of arithmetic and worked chains of sums
(`rewards.chains`), which are made up here.

In every format that ``training.data`` reads. Half of the documents come with labels, by rules that are simple on purpose;
the classifier labels the rest. On a machine without translations or manuals there is less; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import corpus
from ..files import write_jsonl
from ..rewards import find
from ..rewards.chains import Chain, worked

PACKAGES = ("numpy", "rich", "jinja2", "networkx", "mpmath", "sympy")
MATHEMATICS = frozenset({"sympy", "mpmath", "networkx"})
PARTS = 4  # files per source, so that as many tasks have something to do
LOCALES, MANUALS = Path("/usr/share/locale"), Path("/usr/share/doc")


def gather(
    folder: Path, *, code_bytes: int, language_bytes: int, problems: int, chains: int = 0, seed: int = 0,
) -> list[dict[str, Any]]:
    """Writes the raw files and returns the sources of a ``data.build.Build`` as JSON would give them.

    Args:
        code_bytes: of Python sources, a third of them of mathematics. language_bytes: of translations, per language.
        problems: documents of worked problems. chains: of worked chains.
    """
    shutil.rmtree(folder, ignore_errors=True)
    docs = list(corpus.documents(packages=PACKAGES))
    code = [d for d in docs if d.name.endswith((".py", ".pyi"))]
    maths = capped((d for d in code if d.source in MATHEMATICS), code_bytes // 3)
    code = maths + capped((d for d in code if d.source not in MATHEMATICS), code_bytes - code_bytes // 3)
    prose = [d for d in docs if not d.name.endswith((".py", ".pyi"))]
    in_parts(folder / "code", [{"text": d.text, "id": f"{d.source}/{d.name}", **labels(d, "code")} for d in code])
    for d in prose:
        file = folder / "docs" / d.source / (re.sub(r"\W", "_", d.name) + ".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(d.text, encoding="utf-8")
    parquet(folder / "translations", list(translations(language_bytes)))
    in_parts(folder / "problems", [{"text": problem(random.Random(f"{seed} {i}"))} for i in range(problems)])
    in_parts(folder / CHAINS, [{"text": chain(random.Random(f"{seed} chain {i}"))} for i in range(chains)])
    manuals = copy_manuals(folder / "manuals")
    arithmetic = {"field": "mathematics", "domain": "reasoning", "educational_value": "4", "safety": "safe"}
    sources = [
        {"name": "code", "path": str(folder / "code"), "format": "jsonl", "kind": "code"},
        {"name": "docs", "path": str(folder / "docs"), "format": "text", "kind": "curated",
         "labels": {"field": "computing", "domain": "documentation", "educational_value": "3", "safety": "safe"}},
        {"name": "translations", "path": str(folder / "translations"), "format": "parquet",
         "labels": {"field": "computing", "domain": "interface", "educational_value": "1", "safety": "safe"}},
        {"name": "problems", "path": str(folder / "problems"), "format": "jsonl", "kind": "curated", "labels": arithmetic},
        {"name": CHAINS, "path": str(folder / CHAINS), "format": "jsonl", "kind": "code",
         "labels": arithmetic | {"educational_value": "3"}},
        *({"name": kind, "path": str(folder / "manuals" / kind), "format": kind} for kind in manuals),
    ]
    return [s for s in sources if any(p.is_file() for p in Path(s["path"]).rglob("*"))]


def capped(docs: Iterable[corpus.Document], max_bytes: int) -> list[corpus.Document]:
    """Documents in the order of their texts' hashes, which mixes packages, until they hold so many bytes."""
    found, size = [], 0
    for d in sorted(docs, key=lambda d: d.digest):
        if size < max_bytes:
            found.append(d)
            size += len(d.text.encode())
    return found


def labels(d: corpus.Document, domain: str) -> dict[str, Any]:
    """For every second document, by the hash of its text. Educational value: the share of comments and docstrings."""
    if int(d.digest[:2], 16) % 2:
        return {}
    share = explained(d.text)
    value = sum(share > bound for bound in (0.05, 0.15, 0.3, 0.45))
    field = "mathematics" if d.source in MATHEMATICS else "computing"
    return {"labels": {"field": field, "domain": domain, "educational_value": str(value), "safety": "safe"}}


def explained(source: str) -> float:
    """Share of a Python file's characters that are comments or strings over several lines."""
    chars = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT or token.type == tokenize.STRING and token.string.count("\n"):
                chars += len(token.string)
    except (tokenize.TokenError, SyntaxError):
        pass
    return chars / max(len(source), 1)


def translations(max_bytes: int, per_document: int = 40) -> Iterator[dict[str, Any]]:
    """Documents of sentences, per language, from the translated messages of installed programs."""
    for folder in sorted(LOCALES.glob("*/LC_MESSAGES")):
        language, size, lines = folder.parent.name, 0, []
        for file in sorted(folder.glob("*.mo")):
            for key, message in messages(file):
                if key and message != key and len(message) > 30 and "%" not in message and "\0" not in message:
                    lines.append(" ".join(message.split()))
                if len(lines) == per_document:
                    text = "\n".join(lines)
                    yield {"text": text, "id": f"{language}/{file.stem}/{size}"}
                    size, lines = size + len(text.encode()), []
                if size >= max_bytes:
                    break
            if size >= max_bytes:
                break


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """(message, translation) of a gettext catalogue in UTF-8; nothing from other files. Format: the gettext manual,
    section "The Format of GNU MO Files"."""
    raw = file.read_bytes()
    if len(raw) < 28 or struct.unpack_from("<I", raw)[0] != 0x950412DE:
        return
    count, keys, values = struct.unpack_from("<3I", raw, 8)
    for i in range(count):
        pair = [struct.unpack_from("<2I", raw, table + 8 * i) for table in (keys, values)]
        try:
            key, value = (raw[start : start + size].decode() for size, start in pair)
        except UnicodeDecodeError:
            return
        yield key, value


def in_parts(folder: Path, records: list[dict[str, Any]], parts: int = PARTS) -> None:
    for i in range(min(parts, len(records))):
        write_jsonl(folder / f"{i:02d}.jsonl", records[i::parts])


def parquet(folder: Path, rows: list[dict[str, Any]], parts: int = PARTS) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(min(parts, len(rows))):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[i::parts]), folder / f"{i:02d}.parquet")


def copy_manuals(folder: Path, max_files: int = 40, max_bytes: int = 2_000_000) -> list[str]:
    """The formats of which there are any."""
    found = []
    for kind in ("html", "pdf"):
        files = sorted(p for p in MANUALS.glob(f"*/*.{kind}") if p.is_file() and p.stat().st_size <= max_bytes)
        for i, file in enumerate(files[:max_files]):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / kind / f"{i:03d}-{file.stem}.{kind}")
        found += [kind] if files else []
    return found


NAMES = "Ada Ben Chloe Dina Emil Fatima Goro Hana Ivan Jun Kofi Lena Mara Nils Olga Pia Quinn Rosa Sami Tara".split()
THINGS = "apples books coins cards shells stamps pens stones tickets cups keys lamps".split()


def problem(rng: random.Random, parts: int = 6) -> str:
    """Some worked problems: chains of sums and differences, told as stories or as plain arithmetic."""
    out = []
    for _ in range(parts):
        name, thing, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 60)
        steps, told = [], [f"{name} has {total} {thing}."]
        for _ in range(rng.randint(2, 4)):
            n = rng.randint(1, 40)
            if rng.random() < 0.5 and n <= total:
                steps.append(f"{total} - {n} = {total - n}")
                told.append(rng.choice((f"{name} gives away {n}.", f"Then {n} get lost.", f"{rng.choice(NAMES)} takes {n}.")))
                total -= n
            else:
                steps.append(f"{total} + {n} = {total + n}")
                told.append(rng.choice((f"{name} finds {n} more.", f"{rng.choice(NAMES)} brings {n}.", f"{n} more arrive.")))
                total += n
        out.append(f"Question: {' '.join(told)} How many {thing} does {name} have now?\n"
                   f"Reasoning: {'; '.join(steps)}.\nAnswer: {total}")
    return "\n\n".join(out)


CHAINS = "chains"
LENGTHS = {2: 30, 3: 30, 4: 30, 5: 5, 6: 5}  # of chains, and how often: long ones are rare


def chain(rng: random.Random) -> str:
    """A dozen sums, or a question with a worked answer, as a corpus with synthetic instructions has them, without think blocks
    and none of them a held-out one (`rewards.reserved`). Some documents have several of them, for rows that are longer; most
    have one, as a tiny model takes three times as long to learn to look terms up where other chains stand before."""
    family = Chain()
    count = rng.choices((1, 4, 16), (97, 2, 1))[0]
    if rng.random() < 0.4:
        sums = (family.problem(rng.getrandbits(60), 0).data["chain"] for _ in range(12 * count))
        return "\n".join(worked(s)[1:] for s in sums)
    out = []
    for _ in range(count):
        (length,) = rng.choices([*LENGTHS], [*LENGTHS.values()])
        data = find(family, rng.getrandbits(60), length - 2).data
        out.append(f"<|im_start|>user\n{data['chain']}<|im_end|>\n<|im_start|>assistant\n"
                   f"{worked(data['chain'])}\n\n{data['answer']}<|im_end|>\n")
    return "".join(out)


def evaluation(file: Path, *, items: int = 60, seed: int = 0) -> None:
    """Problems of the same kind that the data must not hold."""
    made = [problem(random.Random(f"{seed} held out {i}"), parts=1).split("\nReasoning: ") for i in range(items)]
    write_jsonl(file, [{"question": q, "answer": a} for q, a in made])


def sample(folder: Path, every: int = 4) -> Iterator[str]:
    """Texts for a tokenizer: one file in so many of each source that is made of records, and every text file. Chains are
    single characters in any vocabulary, so of them it gets the chat format's words alone, as single tokens."""
    yield from ("user assistant system /think /no_think\n\n",) * 2000
    for file in sorted(f for f in folder.rglob("*.jsonl") if f.parent.name != CHAINS)[::every]:
        yield from (json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines())
    for file in sorted(folder.rglob("*.parquet"))[::every]:
        import pyarrow.parquet as pq

        yield from pq.read_table(file)["text"].to_pylist()
    for file in sorted(folder.rglob("*.txt"))[::every]:
        yield file.read_text(encoding="utf-8")
