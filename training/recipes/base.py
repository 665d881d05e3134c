"""From raw files to a base model in one command: ``python -m training.recipes.base``.

Gathers text that this machine has, builds labelled shards from it, and runs the three pre-training stages of the Qwen3
report in small: general, then STEM, code and reasoning, then long context. Writes ``report.html`` and ``report.png``. A run
that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qwen3_model.tokenizer import Tokenizer, train_bpe

from .. import environment, report, strict
from ..config import DTYPES, Config, to_json
from ..data.mixture import open_loader
from ..files import kept, write_json
from ..log import read_metrics
from ..pretrain import next_token_loss, set_up, train_step
from . import raw, stage1, stage2, stage3, stages
from .demo import Stages
from .stages import SCALES, Paths, Scale

STAGES = (stage1.stage, stage2.stage, stage3.stage)
SHARES = (0.5, 0.25, 0.25)  # of the training time
VOCABULARY = 4096


@dataclass(frozen=True)
class Base:
    """Options of the command line."""

    out: Path = Path("runs/base")
    minutes: float = 3.0  # training time of the three stages; their tokens are worked out from the speed of first steps
    tokens: float = 0.0  # fixes the tokens of S1 instead; S2 and S3 get half of it each
    scale: str = "tiny"
    factors: Path | None = None  # search.json of training.recipes.proxies; default: every label as there is of it
    code_mb: float = 5.0  # Python sources
    language_kb: float = 25.0  # translations, per language
    problems: int = 1500  # documents of worked problems
    workers: int = 2
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        amounts = self.tokens, self.seed, self.code_mb, self.language_kb, self.problems
        if not self.minutes > 0 or min(amounts) < 0 or self.workers < 1:
            raise ValueError(f"{self}: expected minutes above 0, at least one worker and no negative numbers")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}; expected one of {tuple(SCALES)}")


def run(base: Base, scale: Scale | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """The whole job; returns what ``results.json`` holds."""
    console, out = Console(quiet=quiet, highlight=False, soft_wrap=True), base.out
    scale = scale or SCALES[base.scale]
    device = Config(Path(), Path(), device=base.device).resolved().device
    if device == "cpu":
        torch.set_num_threads(1)  # this model's products are so small that two threads mostly wait for each other
    options = to_json(base) | {f"scale.{k}": v for k, v in to_json(scale).items()}
    kept(out / "options.json", options, lambda: None)  # before anything is made of them
    clock = Stages(console)

    clock("Raw files and tokenizer")
    prepare(base, out)
    clock("Data: extract, filter, deduplicate, label, tokenise")
    build(base, out, quiet)
    clock("Speed of the first steps")
    if not (out / "plan.json").exists():
        tokens = (base.tokens, base.tokens / 2, base.tokens / 2) if base.tokens else plan(base, scale, out, device, console)
        write_json(out / "plan.json", {"tokens": tokens})
    scale = dataclasses.replace(scale, tokens=tuple(json.loads((out / "plan.json").read_text())["tokens"]))
    results: dict[str, Any] = {"stages": {}}
    previous = None
    for stage in STAGES:
        s = stage(scale)
        clock(f"{s.name.upper()}: {s.title}")
        paths = Paths(out / "data" / "shards", out / "tokenizer.json", out / s.name, previous, base.factors)
        results["stages"][s.name] = stages.run(s, scale, paths, seed=base.seed, device=device, quiet=quiet)
        console.print(f"held-out loss {results['stages'][s.name]['held_out']['loss']:.4f} nats per token", markup=False)
        previous = out / s.name / "model"
    clock.stop()
    results |= {
        "card": json.loads((out / "data" / "card.json").read_text()), "seconds": clock.seconds, "options": to_json(base),
        "environment": environment.describe(device, DTYPES[Config(Path(), Path(), device=device).resolved().dtype]),
    }
    write_json(out / "results.json", results)
    draw(out, results)
    report.write(out / "report.html", render(out, results))
    console.print(f"report: {out / 'report.html'}   data card: {out / 'data' / 'card.html'}   model: {previous}", markup=False)
    return results


def prepare(base: Base, out: Path) -> None:
    """Raw files and tokenizer, once: ``sources.json`` is written last."""
    if (out / "sources.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    sources = raw.gather(
        out / "raw", code_bytes=int(base.code_mb * 1e6), language_bytes=int(base.language_kb * 1e3), problems=base.problems,
        seed=base.seed,
    )
    raw.evaluation(out / "eval.jsonl", seed=base.seed)
    train_bpe(raw.sample(out / "raw"), VOCABULARY, out / "tokenizer.json")
    write_json(out / "sources.json", sources)


def build(base: Base, out: Path, quiet: bool) -> None:
    from ..data.build import Build
    from ..data.build import run as run_build

    config = {
        "out": str(out / "data"), "tokenizer": str(out / "tokenizer.json"), "evals": [str(out / "eval.jsonl")],
        "sources": json.loads((out / "sources.json").read_text()), "min_words": 30, "held_out": 0.04, "tasks": 4,
        "workers": base.workers,
    }
    run_build(strict.build(Build, config), quiet=quiet)


def plan(base: Base, scale: Scale, out: Path, device: str, console: Console) -> tuple[float, ...]:
    """Tokens per stage that fit into the minutes, from the speed of a few steps."""
    tokenizer = Tokenizer.from_file(out / "tokenizer.json")
    found = []
    for stage, share in zip(STAGES, SHARES):
        s = dataclasses.replace(stage(scale), tokens=1e9)
        paths = Paths(out / "data" / "shards", out / "tokenizer.json", out / "speed", None, base.factors)
        stages.mixture(s, paths, scale.max_epochs)[0].write(out / "speed" / "mixture.json")
        config = stages.config_of(s, scale, paths, seed=base.seed, device=device).resolved()
        model_config = scale.model(tokenizer.vocab_size, tokenizer.token_id("<|endoftext|>"))
        model_config = dataclasses.replace(model_config, max_position_embeddings=s.seq_len)
        model, optimizer = set_up(config, model_config, None)
        loader = open_loader(config.data, seq_len=config.seq_len, rows=config.rows, seed=base.seed)
        loss_fn = stages.moe_loss if model_config.num_experts else next_token_loss
        times = []
        for step in range(6):
            start = time.perf_counter()
            loss, _, _ = train_step(model, optimizer, [loader.batch(step)], loss_fn, lr=1e-4, max_grad_norm=1.0)
            loss.item()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[2:])
        found.append(max(20 * s.batch_tokens, round(0.75 * share * base.minutes * 60 / seconds) * s.batch_tokens))
        console.print(f"{s.name}: {s.batch_tokens / seconds:,.0f} tokens/s in rows of {s.seq_len:,}; {found[-1]:,} tokens")
    shutil.rmtree(out / "speed")
    return tuple(float(n) for n in found)


# ---- what is shown -----------------------------------------------------------------------------------------------------


def curves(out: Path, results: dict[str, Any]) -> tuple[dict[str, list[report.Point]], list[report.Point]]:
    """Training loss per stage, and the held-out loss, over all tokens so far in millions."""
    losses, held, before = {}, [], 0.0
    for name, r in results["stages"].items():
        per_step = r["stage"]["batch_tokens"] / 1e6
        records = read_metrics(out / name / "train")
        losses[name.upper()] = report.smooth(
            [(before + x["step"] * per_step, x["loss"]) for x in records if x["kind"] == "train"], max(1, r["steps"] // 40))
        held += [(before + x["step"] * per_step, x["loss"]) for x in records if x["kind"] == "groups"]
        before += r["steps"] * per_step
    return losses, held


def draw(out: Path, results: dict[str, Any]) -> None:
    """``report.png``: loss, held-out loss by domain, needles and many shots."""
    from matplotlib.figure import Figure

    losses, held = curves(out, results)
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, points in losses.items():
        left.plot(*zip(*points), label=name)
    left.plot(*zip(*held), "k.--", label="held out")
    left.set(xlabel="million tokens", ylabel="nats per token", title="loss")
    left.legend()
    names = [k for k in results["stages"]["s1"]["held_out"] if k.startswith("domain=")]
    for i, (stage, r) in enumerate(results["stages"].items()):
        middle.bar([x + 0.27 * i for x in range(len(names))], [r["held_out"][n] for n in names], 0.25, label=stage.upper())
    middle.set_xticks([x + 0.27 for x in range(len(names))], [n.removeprefix("domain=") for n in names])
    middle.set(ylabel="nats per token", title="held-out loss by domain")
    middle.legend()
    for name, label in (("before", "after S2"), ("s3", "after S3")):
        shots = results["stages"]["s3"]["probes"][name]["many-shot"]
        right.plot([x["shots"] for x in shots], [x["gain"] for x in shots], "o-", label=label)
    right.set(xlabel="shots", ylabel="nats per token saved by the context", title="many shots")
    right.legend()
    tmp = out / ".report.tmp.png"
    figure.savefig(tmp, dpi=110)
    tmp.rename(out / "report.png")


def render(out: Path, results: dict[str, Any]) -> str:
    losses, held = curves(out, results)
    found, card = results["stages"], results["card"]
    keys = [k for k in found["s1"]["held_out"] if k not in ("perplexity",)]
    groups = {kind: [k for k in keys if k.startswith(f"{kind}=")] for kind in ("domain", "language")}

    def by_stage(names: list[str]) -> str:
        return report.table(("", *(n.upper() for n in found)), [
            (k.split("=")[-1], *(f"{r['held_out'][k]:.3f}" for r in found.values())) for k in names])

    probes = found["s3"]["probes"]
    pairs = list(zip(probes["before"]["needle"], probes["s3"]["needle"]))
    shots = list(zip(probes["before"]["many-shot"], probes["s3"]["many-shot"]))
    skipped = [sum(x["kind"] == "skipped" for x in read_metrics(out / n / "train")) for n in found]
    domains = sorted({d for r in found.values() for d in r["mixture"]["domains"]})
    sections = [
        ("Loss, nats per token", report.chart(losses | {"held out": held}, x="million tokens", y="nats per token")
         + "<p>Each stage has its own mixture, so the training loss jumps between stages. The held-out text is the same, in "
         "rows of the stage's length; S3 sees more context.</p>"),
        ("Stages", report.table(("", *(n.upper() for n in found)), [
            ("tokens", *(f"{r['steps'] * r['stage']['batch_tokens']:,}" for r in found.values())),
            ("tokens per row", *(f"{r['stage']['seq_len']:,}" for r in found.values())),
            ("RoPE base", *(f"{r['stage']['rope_theta']:,.0f}" for r in found.values())),
            ("learning rate, peak", *(f"{r['stage']['lr']:.2e}" for r in found.values())),
            ("at the end, share of the peak", *(f"{r['stage']['lr_end']:.2f}" for r in found.values())),
            *((f"share of {d}", *(f"{100 * r['mixture']['domains'].get(d, 0):.1f} %" for r in found.values()))
              for d in domains),
            ("steps skipped by the guard", *map(str, skipped)),
        ])),
        ("Held-out loss by domain", by_stage(["loss", *groups["domain"]])),
        ("Held-out loss by language", by_stage(groups["language"]) + "<p>zxx: code; und: not sure which.</p>"),
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
        ("Time", report.table(("part", "seconds"), [(k, f"{v:.1f}") for k, v in results["seconds"].items()])
         + report.table(("", ""), [(k, results["environment"][k]) for k in ("device", "platform", "python", "torch", "threads")])),
    ]
    total = sum(r["steps"] * r["stage"]["batch_tokens"] for r in found.values())
    lead = (f"{found['s1']['parameters']:,} parameters, {total:,} tokens in three stages; held-out loss "
            + ", ".join(f"{r['held_out']['loss']:.3f} after {n.upper()}" for n, r in found.items()))
    return report.page("A small Qwen3 base model, from raw files", lead, sections)


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    try:
        run(tyro.cli(Base, args=args, prog="python -m training.recipes.base", description=__doc__))
    except (ValueError, OSError, FloatingPointError, ImportError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
