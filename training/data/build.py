"""From raw files to labelled token shards: the stages, and what runs them.

    clean      read, extract, normalise, identify the language, drop what is no good
    exact      find equal texts
    unique     drop them; MinHash signatures (Broder 1997)
    buckets    pairs that share a band of their signature
    clusters   their connected components
    kept       one document per component, without what overlaps the evaluations
    fit        a classifier of the labels that came with documents
    tokens     label, tokenise, set a share aside
    shards     one set of shards per label vector, and the data card

A stage is a number of tasks that share nothing; a finished task leaves a mark, an unfinished one is done again from its
start and overwrites what it left. So a build may be killed at any moment: the same command goes on, to the same shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwen3_model.tokenizer import Tokenizer

from ..endpoint import Endpoint
from ..environment import file_sha256
from ..files import write_json
from . import card, readers, shards
from .blocks import (
    WORDS, Document, DocumentsPipeline, ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups, HashConfig,
    JsonlReader, JsonlWriter, LocalPipelineExecutor, MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster,
    MinhashDedupFilter, MinhashDedupSignature, PipelineStep, RayPipelineExecutor, SlurmPipelineExecutor, multiprocess, words,
)
from .cells import FILE as CELLS
from .cells import Cell
from .filters import Contamination, Language, Normalise, Quality
from .labels import LABELS, Classifier, Judge, Label, clean, labelled


@dataclass(frozen=True)
class Source:
    """Files of one format. ``labels`` hold for all of its documents that bring none of their own under "labels"."""

    name: str
    path: Path  # folder
    format: Literal["jsonl", "parquet", "text", "html", "pdf", "synthetic"]
    kind: Literal["prose", "code", "curated"] = "prose"  # which rules of quality: sentences', code's, none
    glob: str = ""  # default: by format
    text_key: str = "text"  # jsonl and parquet
    labels: dict[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None  # pdf: reads pages without text; synthetic: the writer
    refine: Endpoint | None = None  # pdf: mends what was read
    kinds: tuple[str, ...] = ("textbook",)  # synthetic: what to write about each seed

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise ValueError(f"path of source {self.name!r} is {self.path}; expected a folder")
        if self.format == "synthetic" and self.endpoint is None:
            raise ValueError(f"source {self.name!r} is synthetic, but has no endpoint")
        if unknown := sorted(self.labels.keys() - set(LABELS)):
            raise ValueError(f"labels of source {self.name!r} are {unknown}; expected some of {LABELS}")
        for name, value in self.labels.items():
            clean(name, value)

    def files(self) -> list[Path]:
        return sorted(p for p in self.path.glob(self.glob or readers.GLOBS[self.format]) if p.is_file())


@dataclass(frozen=True)
class Build:
    """One build of a data set."""

    out: Path
    tokenizer: Path  # tokenizer.json
    sources: tuple[Source, ...]
    languages: tuple[str, ...] = ()  # kept; empty: all ("zxx" is code, "und" unsure)
    min_words: int = 50
    min_code_chars: int = 100
    minhash_words: int = 5  # words per shingle
    minhash_bands: int = 14
    minhash_rows: int = 8  # hashes per band: documents of similarity s meet with probability 1 - (1 - s^rows)^bands
    scorer: Literal["none", "classifier", "endpoint"] = "classifier"
    judge: Endpoint | None = None
    evals: tuple[Path, ...] = ()  # .jsonl or text files that the data must not overlap
    eval_words: int = 13
    drop_contaminated: bool = True
    held_out: float = 0.01  # share of the documents, by the hash of their text
    end_of_text: str = "<|endoftext|>"
    tasks: int = 4  # per stage; part of the result: it decides the order of the documents
    workers: int = 2  # tasks at a time
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm: dict[str, str] = field(default_factory=dict)  # time, partition, ... of datatrove's SlurmPipelineExecutor

    def __post_init__(self) -> None:
        for name in ("min_words", "minhash_words", "minhash_bands", "minhash_rows", "eval_words", "tasks", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; expected at least 0 and below 1")
        if len({s.name for s in self.sources}) < len(self.sources) or not self.sources:
            raise ValueError(f"sources are {[s.name for s in self.sources]}; expected at least one, each of its own name")
        if self.scorer == "endpoint" and self.judge is None:
            raise ValueError("scorer is 'endpoint', but judge is not given")
        for path in (self.tokenizer, *self.evals):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; expected a file (tokenizer or evals)")
        if self.slurm and self.executor != "slurm" or self.executor == "slurm" and "time" not in self.slurm:
            raise ValueError(f"slurm is {self.slurm} with executor {self.executor!r}; expected options, time among them, "
                             "for the executor 'slurm' alone")

    def work(self, *names: str) -> str:
        return str(self.out.joinpath("work", *names))


# ---- blocks of the last stages -----------------------------------------------------------------------------------------


class Store(JsonlWriter):
    """Documents of a task in one file, which is there even when it is empty: a later stage finds a task's documents by
    the number of the file."""

    def __init__(self, folder: str):
        super().__init__(folder, output_filename="${rank}.jsonl.gz")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.output_mg.get_file(f"{rank:05d}.jsonl.gz")
        yield from super().run(data, rank, world_size)


def content(doc: Document) -> str:
    return doc.text


class Signature(MinhashDedupSignature):
    """datatrove's signatures of shingles that are hashed many at a time, which takes a fifth of the time."""

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [n, 1]: runs of words, as a polynomial of the words' hashes modulo 2^64."""
        hashes = np.fromiter(map(word_hash, words(text)), np.uint64)
        if len(hashes) < self.config.n_grams:
            return np.empty((0, 1), np.uint64)
        powers = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(self.config.n_grams)], np.uint64)
        runs = np.lib.stride_tricks.sliding_window_view(hashes, self.config.n_grams)
        return np.unique((runs * powers).sum(1, dtype=np.uint64))[:, None]


@lru_cache(maxsize=1 << 18)
def word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class Fit(PipelineStep):
    """Fits the classifier on the documents that came with labels."""

    type, name = "LABEL", "fit"

    def __init__(self, kept: str, out: Path):
        super().__init__()
        self.kept, self.out = kept, out

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        documents = labelled(JsonlReader(self.kept).run())
        if not documents:
            raise ValueError("scorer is 'classifier', but no document came with labels to fit it on; give some, or "
                             "scorer 'none' or 'endpoint'")
        classifier, report = Classifier.fit(documents)
        classifier.save(self.out / "classifier.safetensors")
        write_json(self.out / "classifier.json", report)


class Tokenise(PipelineStep):
    """Shards of one task's documents: ``out/RANK/{train,held_out}/CELL``."""

    type, name = "TOKENS", "tokenise"

    def __init__(self, out: str, tokenizer: Path, end_of_text: str, held_out: float):
        super().__init__()
        self.out, self.tokenizer, self.end_of_text, self.held_out = Path(out), tokenizer, end_of_text, held_out

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = Tokenizer.from_file(self.tokenizer)
        folder = self.out / f"{rank:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        cells: dict[tuple[str, str], list[tuple[list[int], int]]] = {}
        for doc in data:
            with self.track_time():
                part = "held_out" if is_held_out(doc.text, self.held_out) else "train"
                ids = tokenizer.encode(doc.text)
            cells.setdefault((part, Cell.of(doc.metadata).key), []).append((ids, len(doc.text.encode())))
            self.stat_update(f"source_{doc.metadata['source']}", value=len(ids) + 1)
        for (part, key), documents in sorted(cells.items()):
            shards.write(
                folder / part / key, documents, vocab_size=tokenizer.vocab_size, tokenizer_sha256=file_sha256(self.tokenizer),
                end_of_text=tokenizer.token_id(self.end_of_text),
            )


def is_held_out(text: str, share: float) -> bool:
    """Decided by the text alone, whatever the order or number of documents."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32


class Merge(PipelineStep):
    """One set of shards per cell from those of the tasks; appears as a whole."""

    type, name = "TOKENS", "merge"

    def __init__(self, parts: str, out: Path):
        super().__init__()
        self.parts, self.out = Path(parts), out

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        tmp = self.out / ".shards.tmp"
        for old in (tmp, self.out / "shards"):
            shutil.rmtree(old, ignore_errors=True)
        cells = {}
        for part in ("train", "held_out"):
            for key in sorted({p.name for p in self.parts.glob(f"*/{part}/*")}):
                index = shards.merge(tmp / part / key, sorted(self.parts.glob(f"*/{part}/{key}")))
                sizes = {"tokens": index.n_tokens, "documents": index.n_documents, "bytes": index.n_bytes}
                cells.setdefault(key, asdict(Cell.parse(key)))[part] = sizes
        if not any("train" in c for c in cells.values()):
            raise ValueError("nothing is left to train on: every document was dropped; see work/dropped and the stages' stats")
        write_json(tmp / CELLS, dict(sorted(cells.items())))
        tmp.rename(self.out / "shards")


class Card(PipelineStep):
    type, name = "CARD", "card"

    def __init__(self, build: Build):
        super().__init__()
        self.build = build

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        card.write(self.build.out, asdict(self.build))


# ---- stages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    name: str
    pipeline: list[Any]
    tasks: int


def stages(build: Build) -> list[Stage]:
    work = build.work
    sha1 = HashConfig(hash_fc="sha1")  # datatrove's default, xxhash, fails with xxhash 4
    exact = ExactDedupConfig(content_getter=content, hash_config=sha1)
    minhash = MinhashConfig(
        n_grams=build.minhash_words, num_buckets=build.minhash_bands, hashes_per_bucket=build.minhash_rows, hash_config=sha1
    )
    cache = build.out / "work" / "endpoint"
    quality = Quality(min_words=build.min_words, min_code_chars=build.min_code_chars)
    language = Language(build.languages)
    contamination = Contamination(build.evals, build.eval_words, build.drop_contaminated)
    for block in (language, quality, contamination):
        block.exclusion_writer = JsonlWriter(work("dropped", block.name))
    scorer = {
        "none": None, "classifier": build.out / "classifier.safetensors",
        "endpoint": build.judge and Judge(build.judge, cache),
    }[build.scorer]
    label = Label(scorer)
    label.exclusion_writer = JsonlWriter(work("dropped", label.name))
    found = [
        Stage("clean", [*(readers.reader(s, cache) for s in build.sources), Normalise(), language, quality,
                        Store(work("clean")), ExactDedupSignature(work("exact", "signatures"), exact)], build.tasks),
        Stage("exact", [ExactFindDedups(work("exact", "signatures"), work("exact", "found"), exact)], 1),
        Stage("unique", [JsonlReader(work("clean")), ExactDedupFilter(work("exact", "found"), exact), Store(work("unique")),
                         Signature(work("minhash", "signatures"), minhash, language=WORDS)], build.tasks),
        Stage("buckets", [MinhashDedupBuckets(work("minhash", "signatures"), work("minhash", "pairs"), config=minhash)],
              build.minhash_bands),
        Stage("clusters", [MinhashDedupCluster(work("minhash", "pairs"), work("minhash", "remove"), minhash)], 1),
        Stage("kept", [JsonlReader(work("unique")), MinhashDedupFilter(work("minhash", "remove")), contamination,
                       Store(work("kept"))], build.tasks),
    ]
    if build.scorer == "classifier":
        found.append(Stage("fit", [Fit(work("kept"), build.out)], 1))
    found += [
        Stage("tokens", [JsonlReader(work("kept")), label,
                         Tokenise(work("tokens"), build.tokenizer, build.end_of_text, build.held_out)], build.tasks),
        Stage("shards", [Merge(work("tokens"), build.out), Card(build)], 1),
    ]
    return found


def run(build: Build, *, quiet: bool = False) -> Path:
    """Runs or resumes a build and returns the folder of its shards (with Slurm: submits its jobs).

    Raises ValueError: ``out`` holds another build, or the sources' files have changed since it was begun.
    """
    check_same_build(build)
    logs = [build.out / "work" / "logs" / f"{i}-{s.name}" for i, s in enumerate(stages(build))]
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if build.executor == "slurm":
        previous = None
        for stage, log in zip(stages(build), logs):
            previous = SlurmPipelineExecutor(
                stage.pipeline, tasks=stage.tasks, workers=build.workers, job_name=f"data-{stage.name}", depends=previous,
                logging_dir=str(log), **{k: v for k, v in build.slurm.items()},
            )
        previous.run()  # submits what it depends on first
        console.print(f"submitted {len(logs)} jobs; the card will be {build.out / 'card.html'}", markup=False)
        return build.out / "shards"
    multiprocess.set_forkserver_preload([__name__])  # else every worker of every stage would import all of this
    executor: Callable[..., Any] = LocalPipelineExecutor if build.executor == "local" else RayPipelineExecutor
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        for stage, log in zip(stages(build), logs):
            bar = progress.add_task(stage.name, total=stage.tasks)
            with watched(lambda: progress.update(bar, completed=count(log))), quieted(build.out / "work" / "log.txt"):
                workers = min(build.workers, stage.tasks)
                executor(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=str(log)).run()
            if not console.is_terminal:
                console.print(f"{stage.name}: {stage.tasks} tasks done", markup=False)
    console.print(f"card: {build.out / 'card.html'}", markup=False)
    return build.out / "shards"


def check_same_build(build: Build) -> None:
    """Records the build, or compares it with the one recorded."""
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for s in build.sources for p in s.files()]
    if not files:
        raise ValueError(f"no files: {[f'{s.path}/{s.glob or readers.GLOBS[s.format]}' for s in build.sources]}")
    free = {"workers", "executor", "slurm", "out"}
    config = {k: v for k, v in json.loads(json.dumps(asdict(build), default=str)).items() if k not in free}
    record = {"config": config, "files": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
              "tokenizer": file_sha256(build.tokenizer)}
    file = build.out / "build.json"
    if file.exists():
        was = json.loads(file.read_text())
        changed = [k for k in config if was["config"].get(k) != config[k]]
        changed += [f"the content of {k}" for k in ("files", "sha256", "tokenizer") if was[k] != record[k]]
        if changed:
            raise ValueError(f"{build.out} holds a build that differs in {', '.join(changed)}; choose another out folder")
    else:
        build.out.mkdir(parents=True, exist_ok=True)
        write_json(file, record)


def count(log: Path) -> int:
    return sum(1 for _ in (log / "completions").glob("*"))


@contextmanager
def watched(look: Callable[[], None], every_s: float = 0.3) -> Iterator[None]:
    """Calls ``look`` now and then from a thread, and once at the end."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


@contextmanager
def quieted(file: Path) -> Iterator[None]:
    """Standard error, also that of processes started inside, goes to a file: datatrove logs there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(2)
    with open(file, "a") as f:
        os.dup2(f.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)

