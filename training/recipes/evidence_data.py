"""Corpus for `evidence` from what a Unix machine has: ``python -m training.recipes.evidence_data --out .evidence``.

Sources of installed packages, file by file and as whole packages (long texts), manual pages in many languages, the books
and the library reference of the Rust toolchain, translated messages, and problems of reasoning-gym with worked answers in
the chat format, without think blocks. None of these is a problem that evaluation may draw (`rewards.reserved`). Leaves
``shards``, ``tokenizer.json`` and ``data.tar.xz`` of both, which is what a GPU machine without a network is given.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qwen3_model.chat import render
from qwen3_model.tokenizer import train_bpe

from .. import corpus, strict
from ..files import write_json
from ..rewards import find, mixed_seed
from ..rewards.families import GENERAL, SCORERS, make
from ..rewards.workers import Pool
from . import raw
from .worked import solution

PACKAGES = (
    "numpy", "rich", "jinja2", "networkx", "matplotlib", "torch", "tokenizers", "safetensors", "mpmath", "sympy", "pandas",
    "transformers", "datasets", "peft", "accelerate", "trl", "huggingface_hub", "hypothesis", "pygments", "fontTools", "pypdf",
    "setuptools", "pip", "triton", "pyarrow", "datatrove", "PIL", "tensorboard", "pydantic", "fsspec", "dill",
)
MANUALS, RUST = Path("/usr/share/man"), Path.home() / ".rustup" / "toolchains"
LEFT_OUT = frozenset(f"gym/{n}" for n in ("dice", "bitwise_arithmetic", "count_primes", "polynomial_equations"))  # too hard
LONG_CHARS = (60_000, 400_000)  # of a whole package's sources; more are cut


@dataclass(frozen=True)
class Data:
    """Options of the command line. Sizes in megabytes of text."""

    out: Path = Path(".evidence")
    code_mb: float = 55.0
    long_mb: float = 30.0
    manuals_mb: float = 30.0  # half of it English
    reference_mb: float = 12.0
    language_kb: float = 60.0  # translated messages, per language
    problems: int = 150_000
    vocabulary: int = 8192
    workers: int = 2
    seed: int = 0


def gather(d: Data, folder: Path) -> list[dict[str, Any]]:
    """Writes the raw files; returns the sources of a ``data.build.Build``."""
    shutil.rmtree(folder, ignore_errors=True)
    docs = list(corpus.documents(packages=PACKAGES))
    code = [x for x in docs if x.name.endswith((".py", ".pyi"))]
    whole = list(packages(code, int(d.long_mb * 1e6)))
    taken = {name for _, names in whole for name in names}
    short = raw.capped((x for x in code if (x.source, x.name) not in taken), int(d.code_mb * 1e6))
    write(folder / "code", [{"text": x.text, **labels("code", 2 + (raw.explained(x.text) > 0.2), x.source)} for x in short])
    write(folder / "packages", [{"text": text, **labels("repository", 3)} for text, _ in whole])
    prose = [x for x in docs if not x.name.endswith((".py", ".pyi"))]
    write(folder / "docs", [{"text": x.text, **labels("documentation", 3)} for x in prose])
    write(folder / "manuals", [{"text": t, **labels("documentation", 3)} for t in manuals(int(d.manuals_mb * 1e6))])
    write(folder / "messages", [x | labels("interface", 1) for x in raw.translations(int(d.language_kb * 1e3))])
    books(folder / "books", int(d.reference_mb * 1e6))
    problems = documents(problem_texts(d.problems, d.seed), random.Random(d.seed))
    write(folder / "problems", [{"text": text, **labels("reasoning", 4, "mathematics")} for text in problems])
    kinds = {"code": "code", "packages": "curated", "docs": "curated", "manuals": "curated", "messages": "prose",
             "problems": "curated"}
    sources = [{"name": k, "path": str(folder / k), "format": "jsonl", "kind": v} for k, v in kinds.items()]
    for name, domain in (("library", "documentation"), ("books", "textbook")):
        sources.append({"name": name, "path": str(folder / "books" / name), "format": "html", "kind": "curated",
                        **labels(domain, 3)})
    return [s for s in sources if any(p.is_file() for p in Path(s["path"]).rglob("*"))]


def labels(domain: str, value: int, source: str = "") -> dict[str, Any]:
    field = "mathematics" if source in raw.MATHEMATICS or source == "mathematics" else "computing"
    return {"labels": {"field": field, "domain": domain, "educational_value": str(value), "safety": "safe"}}


def write(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    raw.in_parts(folder, list(records))


def packages(code: Sequence[corpus.Document], max_bytes: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(all files of a package's folder, one behind another with their paths; their names), until so many bytes."""
    folders: dict[tuple[str, str], list[corpus.Document]] = defaultdict(list)
    for x in code:
        folders[x.source, "/".join(x.name.split("/")[:2] if x.source != "stdlib" else x.name.split("/")[:1])].append(x)
    size = 0
    for key in sorted(folders, key=lambda k: mixed_seed("package", k)):
        files = folders[key]
        text = "\n".join(f"# ---- {x.source}/{x.name} ----\n{x.text}" for x in files)[: LONG_CHARS[1]]
        if len(files) > 1 and len(text) >= LONG_CHARS[0] and size < max_bytes:
            size += len(text)
            yield text, [(x.source, x.name) for x in files]


def manuals(max_bytes: int) -> Iterator[str]:
    """Text of manual pages, English and others in equal shares, in the order of their hashes."""
    files = sorted(MANUALS.rglob("*.gz"), key=lambda p: mixed_seed("manual", str(p)))
    size, seen = {True: 0, False: 0}, set()
    for file in files:
        english = file.relative_to(MANUALS).parts[0].startswith("man")
        if size[english] >= max_bytes // 2 or not file.is_file() or file.resolve() in seen:
            continue
        if file.name.startswith("gcloud") and mixed_seed(file.name) % 8:  # thousands of them, all much alike
            continue
        seen.add(file.resolve())
        text = roff(gzip.decompress(file.read_bytes()).decode("utf-8", "replace"))
        if len(text) > 400:
            size[english] += len(text.encode())
            yield text


def roff(source: str) -> str:
    """Plain text of a page in the man macros; "" for other macros."""
    if re.search(r"^\.(Dd|so)\b", source, re.MULTILINE):
        return ""
    out: list[str] = []
    for line in source.splitlines():
        if not line.startswith((".", "'")):
            out.append(line)
        elif found := re.match(r"\.(SH|SS)\s+(.*)", line):
            out += ["", found[2].strip('"')]
        elif re.match(r"\.(PP|P|LP|TP|IP|HP|sp|br)\b", line):
            out.append("")
        elif found := re.match(r"\.(B|I|BR|BI|IR|RB|IB|RI|SM)\s+(.*)", line):
            join = " " if found[1] in ("B", "I", "SM") else ""
            out.append(join.join(re.findall(r'"[^"]*"|\S+', found[2])).replace('"', ""))
    text = re.sub(r"\\f(\(..|\[[^\]]*\]|.)|\\s[-+]?\d|\\[&|^%:]|\\\((?!aq|cq|oq|em|en|lq|rq|bu).?.?", "", "\n".join(out))
    for escape, plain in (("\\-", "-"), ("\\(aq", "'"), ("\\(cq", "'"), ("\\(oq", "'"), ("\\(em", "-"), ("\\(en", "-"),
                          ("\\(lq", '"'), ("\\(rq", '"'), ("\\(bu", "*"), ("\\e", "\\"), ("\\ ", " ")):
        text = text.replace(escape, plain)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def books(folder: Path, reference_bytes: int) -> None:
    """Whole books (one page each, hence long) and pages of the library's reference."""
    for html in sorted(RUST.glob("stable*/share/doc/rust/html"))[:1]:
        for page in sorted(html.glob("*/print.html")):
            copy(page, folder / "books" / f"{page.parent.name}.html")
        pages = sorted((p for part in ("std", "alloc", "error_codes") for p in (html / part).rglob("*.html")
                        if p.name != "print.html"), key=lambda p: mixed_seed("page", str(p.relative_to(html))))
        size = 0
        for page in pages:
            if size < 20 * reference_bytes and page.stat().st_size < 400_000:  # a twentieth of the HTML is text
                size += page.stat().st_size
                copy(page, folder / "library" / f"{mixed_seed(str(page.relative_to(html))):x}.html")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


# ---- problems ----------------------------------------------------------------------------------------------------------


def documents(texts: Iterator[str], rng: random.Random, sizes: Sequence[int] = (8, 8, 8, 8, 8, 8, 8, 50, 200)) -> Iterator[str]:
    """Problems behind each other: most documents are short, but half of the text is in some that fill a long context."""
    while members := list(islice(texts, rng.choice(sizes))):
        yield "\n".join(members)


def problem_texts(count: int, seed: int) -> Iterator[str]:
    """Conversations with worked answers: easy levels more often. Families without a rule have the answer alone."""
    rng = random.Random(seed)
    with Pool(SCORERS, workers=1) as pool:
        families = make([*GENERAL, "chain"], pool)
    names = [n for n in families if n not in LEFT_OUT]
    for _ in range(count):
        family = families[rng.choice(names)]
        problem = find(family, rng.getrandbits(60), rng.choice((0, 0, 0, 1)) if family.max_level else 0)
        if turns := solution(problem):
            flat = [dict(t) for t in turns]
            for t in flat:
                if thinking := t.pop("reasoning_content", None):
                    t["content"] = f"{thinking}\n\n{t['content']}".strip()
        elif "answer" in problem.data:
            flat = [{"role": "assistant", "content": str(problem.data["answer"])}]
        else:
            continue
        yield render([*problem.messages, *flat], tools=problem.tools or None, add_generation_prompt=False,
                     variant="instruct-2507").rstrip("\n")


# ---- the whole ---------------------------------------------------------------------------------------------------------


def run(d: Data) -> Path:
    """Runs or resumes; returns the archive."""
    from ..data.build import Build
    from ..data.build import run as build

    out, work = d.out, d.out / "work"
    if not (work / "sources.json").exists():
        sources = gather(d, work / "raw")
        train_bpe(raw.sample(work / "raw", every=2), d.vocabulary, out / "tokenizer.json")
        write_json(work / "sources.json", sources)
    config = {
        "out": str(work / "data"), "tokenizer": str(out / "tokenizer.json"), "scorer": "none", "min_words": 30, "tasks": 4,
        "sources": json.loads((work / "sources.json").read_text()), "held_out": 0.015, "workers": d.workers,
    }
    shards = build(strict.build(Build, config))
    card = json.loads((work / "data" / "card.json").read_text())
    write_json(out / "card.json", card)
    tmp = out / ".data.tmp.xz"
    with tarfile.open(tmp, "w:xz", preset=6) as tar:
        for path, name in ((shards, "shards"), (out / "tokenizer.json", "tokenizer.json"), (out / "card.json", "card.json")):
            tar.add(path, name)
    tmp.rename(out / "data.tar.xz")
    return out / "data.tar.xz"


if __name__ == "__main__":
    import tyro

    print(run(tyro.cli(Data, prog="python -m training.recipes.evidence_data", description=__doc__)))
