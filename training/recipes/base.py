"""From raw files to a base model: text that this machine has, labelled shards of it, and the three pre-training stages of the
Qwen3 report in small (general; STEM, code and reasoning; long context). The first half of `demo`."""

from __future__ import annotations

import json
import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_model import load
from qwen3_model.tokenizer import Tokenizer, train_bpe

from .. import report, strict
from ..config import require
from ..data import cells
from ..data.packing import evaluation_batches
from ..data.shards import TokenShards
from ..files import write_json
from ..log import read_metrics
from ..pretrain import evaluate
from . import raw, stage1, stage2, stage3, stages
from .clock import Clock
from .stages import Paths, Scale

STAGES = (stage1.stage, stage2.stage, stage3.stage)


@dataclass(frozen=True)
class Raw:
    """How much of what there is to train on."""

    code_mb: float = 1.0  # Python sources
    language_kb: float = 3.0  # translations, per language
    problems: int = 100  # documents of worked problems
    chains: int = 20_000  # documents of worked chains of sums
    vocabulary: int = 1024
    held_out: float = 0.04
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("code_mb", "language_kb", "problems", "chains"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.workers >= 1, "workers", self.workers, "at least 1")


def run(out: Path, sizes: Raw, scale: Scale, clock: Clock, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Runs or resumes all of it, on the CPU; the model is ``out/s3/model``. Returns the stages' results and the data card."""
    with clock("raw files and tokenizer"):
        prepare(out, sizes, seed)
    with clock("data: extract, filter, deduplicate, label, tokenise"):
        build(out, sizes, quiet)
    found: dict[str, Any] = {}
    previous = None
    for stage in STAGES:
        s = stage(scale)
        with clock(f"{s.name.upper()}: {s.title}"):
            paths = Paths(out / "data" / "shards", out / "tokenizer.json", out / s.name, previous)
            found[s.name] = stages.run(s, scale, paths, seed=seed, device="cpu", quiet=quiet)
        clock.console.print(f"held-out loss {found[s.name]['held_out before']['loss']:.3f} to "
                            f"{found[s.name]['held_out']['loss']:.3f} nats per token", markup=False)
        previous = out / s.name / "model"
    with clock("bits per byte", heading=False):
        bits = bits_per_byte(previous, out / "data" / "shards")
    return {"stages": found, "bits_per_byte": bits, "card": json.loads((out / "data" / "card.json").read_text())}


def student(out: Path, scale: Scale, *, seed: int = 0, quiet: bool = False) -> Path:
    """A smaller base model, by S2 from random weights on the same data; returns its folder."""
    paths = Paths(out / "data" / "shards", out / "tokenizer.json", out / "student")
    stages.run(stage2.stage(scale), scale, paths, seed=seed + 1000, device="cpu", quiet=quiet)
    return out / "student" / "model"


def prepare(out: Path, sizes: Raw, seed: int) -> None:
    """Raw files and tokenizer, once: ``sources.json`` is written last."""
    if (out / "sources.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    sources = raw.gather(
        out / "raw", code_bytes=int(sizes.code_mb * 1e6), language_bytes=int(sizes.language_kb * 1e3), problems=sizes.problems,
        chains=sizes.chains, seed=seed,
    )
    raw.evaluation(out / "eval.jsonl", seed=seed)
    train_bpe(raw.sample(out / "raw"), sizes.vocabulary, out / "tokenizer.json")
    write_json(out / "sources.json", sources)


def build(out: Path, sizes: Raw, quiet: bool) -> None:
    from ..data.build import Build
    from ..data.build import run as run_build

    config = {
        "out": str(out / "data"), "tokenizer": str(out / "tokenizer.json"), "evals": [str(out / "eval.jsonl")],
        "sources": json.loads((out / "sources.json").read_text()), "min_words": 30, "min_code_chars": 60,
        "held_out": sizes.held_out, "tasks": 4, "workers": sizes.workers,
    }
    run_build(strict.build(Build, config), quiet=quiet)


# ---- bits per byte -----------------------------------------------------------------------------------------------------


def bits_per_byte(folder: Path, shards: Path) -> dict[str, float]:
    """{coder: bits per byte} of all held-out text as one: the model's, half of whose rows are context, a unigram model's and
    compressors'. The model and the last compressor know the training text, the others do not."""
    model, tokenizer = load.load(folder), Tokenizer.from_file(folder / "tokenizer.json")
    parts = {part: [TokenShards(shards / part / c.key) for c in cells.read(shards, part)] for part in ("train", "held_out")}
    held, length = parts["held_out"], model.config.max_position_embeddings
    size = sum(data.index.n_bytes for data in held)
    nats = 0.0
    for data in held:
        rows = evaluation_batches(data, seq_len=length, rows=max(1, 4096 // length), overlap=length // 2)
        found = evaluate(model, data, rows)
        nats += found["loss"] * found["tokens"]
    seen, text = (b"".join(tokenizer.decode(d.read(i)[:-1].tolist()).encode() for d in p for i in range(len(d)))
                  for p in parts.values())
    own = {"this model, after S3": nats / math.log(2) / size, "unigram: entropy of these tokens": unigram(held)}
    return own | compressed(seen, text)


def unigram(parts: Sequence[TokenShards]) -> float:
    """Bits per byte of the best possible model without context: no other unigram model does better on these tokens."""
    counts = np.bincount(np.concatenate([data.read(d) for data in parts for d in range(len(data))]))
    counts = counts[counts > 0]
    bits = -(counts * np.log2(counts / counts.sum())).sum()
    return float(bits / sum(data.index.n_bytes for data in parts))


def compressed(seen: bytes, text: bytes) -> dict[str, float]:
    """Bits per byte of ``text``. What it adds behind ``seen`` is taken in a window that holds both."""
    def xz(data: bytes) -> int:
        window = max(1 << 20, 1 << (len(seen) + len(text)).bit_length())
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": min(window, 1 << 27)}]
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    sizes = {"gzip -9 (zlib)": len(zlib.compress(text, 9)), "xz": xz(text)}
    sizes["xz behind the training text"] = xz(seen + text) - xz(seen)
    return {name: 8 * n / len(text) for name, n in sizes.items()}


# ---- the report --------------------------------------------------------------------------------------------------------


def curves(out: Path, found: dict[str, Any]) -> dict[str, list[report.Point]]:
    """Training loss per stage, and the held-out loss, over all tokens so far in millions."""
    losses, held, before = {}, [], 0.0
    for name, r in found.items():
        per_step = r["stage"]["batch_tokens"] / 1e6
        records = read_metrics(out / name / "train")
        losses[name.upper()] = report.smooth(
            [(before + x["step"] * per_step, x["loss"]) for x in records if x["kind"] == "train"], max(1, r["steps"] // 40))
        end = before + r["steps"] * per_step
        held += [(before, r["held_out before"]["loss"]), (end, r["held_out"]["loss"])]
        before = end
    return losses | {"held out": held}


def sections(out: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Of the report page."""
    found, card = results["stages"], results["card"]
    keys = [k for k in found["s1"]["held_out"] if k != "perplexity"]
    groups = {kind: [k for k in keys if k.startswith(f"{kind}=")] for kind in ("domain", "language")}

    def by_stage(names: list[str]) -> str:
        return report.table(("", "before S1", *(f"after {n.upper()}" for n in found)), [
            (k.split("=")[-1], f"{found['s1']['held_out before'][k]:.3f}", *(f"{r['held_out'][k]:.3f}" for r in found.values()))
            for k in names])

    probes = found["s3"]["probes"]
    pairs = list(zip(probes["before"]["needle"], probes["s3"]["needle"]))
    shots = list(zip(probes["before"]["many-shot"], probes["s3"]["many-shot"]))
    skipped = [sum(x["kind"] == "skipped" for x in read_metrics(out / n / "train")) for n in found]
    domains = sorted({d for r in found.values() for d in r["mixture"]["domains"]})
    rates = [sorted(x["tokens_per_s"] for x in read_metrics(out / n / "train") if x["kind"] == "speed") for n in found]
    return [
        ("Pre-training: loss, nats per token", report.chart(curves(out, found), x="million tokens", y="nats per token")
         + "<p>Each stage has its own mixture, so the training loss jumps between stages. The held-out text is the same, in "
         "rows of the stage's length, before and after each stage.</p>"),
        ("Pre-training: stages", report.table(("", *(n.upper() for n in found)), [
            ("tokens", *(f"{r['steps'] * r['stage']['batch_tokens']:,}" for r in found.values())),
            ("tokens per row", *(f"{r['stage']['seq_len']:,}" for r in found.values())),
            ("RoPE base", *(f"{r['stage']['rope_theta']:,.0f}" for r in found.values())),
            ("learning rate, peak", *(f"{r['stage']['lr']:.2e}" for r in found.values())),
            ("at the end, share of the peak", *(f"{r['stage']['lr_end']:.2f}" for r in found.values())),
            *((f"share of {d}", *(f"{100 * r['mixture']['domains'].get(d, 0):.1f} %" for r in found.values()))
              for d in domains),
            ("steps skipped by the guard", *map(str, skipped)),
            ("tokens per second, median", *(f"{r[len(r) // 2]:,.0f}" for r in rates)),
        ])),
        ("Held-out loss by domain", by_stage(["loss", *groups["domain"]])),
        ("Held-out loss by language",
         f"<details><summary>{len(groups['language'])} languages; zxx: code and chains, und: not sure which</summary>"
         f"{by_stage(groups['language'])}</details>"),
        ("Held-out text, bits per byte (less is better)", report.table(
            ("coded by", "bits/byte"), [(k, f"{v:.3f}") for k, v in results["bits_per_byte"].items()])),
        ("Needle in a haystack", report.table(
            ("tokens", "depth", "saved after S2, nats per token", "saved after S3", "right after S2", "right after S3"),
            [(f"{b['length']:,}", f"{b['depth']:.1f}", f"{a['gain']:+.3f}", f"{b['gain']:+.3f}", f"{100 * a['accuracy']:.0f} %",
              f"{100 * b['accuracy']:.0f} %") for a, b in pairs])
         + "<p>A number of five digits is said once and asked at the end. Saved: how much less its digits cost than with "
         "another number in that place. 0 is a model that does not look.</p>"),
        ("Many shots", report.table(
            ("shots", "saved after S2, nats per token", "saved after S3", "right after S2", "right after S3"), [(
             b["shots"], f"{a['gain']:+.3f}", f"{b['gain']:+.3f}", f"{100 * a['accuracy']:.0f} %", f"{100 * b['accuracy']:.0f} %")
             for a, b in shots])),
        ("Data", report.table(("step", "documents in", "dropped"), [
            (s["step"], f"{s['in']:,}", f"{s['dropped']:,}") for s in card["steps"]])
         + report.table(("source", "tokens"), [(k, f"{v:,}") for k, v in card["sources"].items()])
         + f"<p>{card['cells']} label vectors; languages: {len(card['tokens by']['language'])}. More is in the data card "
         f"({report.escape(str(out / 'data' / 'card.html'))}).</p>"),
    ]
