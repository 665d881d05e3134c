"""The whole Qwen3 path in small, on two CPU cores: ``python -m training.recipes.demo``.

Raw files -> data -> pre-training S1, S2, S3 (`base`) -> long-CoT cold start -> reasoning RL -> thinking-mode fusion -> general
RL, and a smaller student by off- and on-policy distillation (`path`). Writes ``report.html``, whose claims are checked, and
``model/``, which transformers is shown to compute alike. A run that is stopped goes on where it was.

With several seeds there is one folder for each, and with ``--check`` a claim that does not hold in one of them is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen3_model import generate, load
from qwen3_model.model import Qwen3
from qwen3_model.sampling import SamplingParams
from qwen3_model.tokenizer import Tokenizer

from .. import environment, report
from ..config import require, to_json
from ..data import cells
from ..data.shards import TokenShards
from ..files import kept, write_json
from . import base, path
from .clock import Clock
from .export import compare_with_transformers, export
from .stages import SCALES, Scale

PROMPTS = ("def ", "import ", "The ", "Question: Ada has 12 apples.")
MODEL = SCALES["tiny"]
STUDENT = dataclasses.replace(MODEL, tokens=(0, 1_500_000, 0), hidden_size=64, heads=2, intermediate_size=170)


@dataclass(frozen=True)
class Options:
    """Options of the command line. The same ones give the same result, bit for bit, on the same machine."""

    out: Path = Path("runs/demo")
    seeds: tuple[int, ...] = (0,)
    check: bool = False  # exit with an error when a claim of the report does not hold
    threads: int = 1  # torch's; with 1 sampler and trainer give the same bits, and small models are fastest
    raw: base.Raw = field(default_factory=base.Raw)
    model: Scale = MODEL
    student: Scale = STUDENT
    sizes: path.Sizes = field(default_factory=path.Sizes)

    def __post_init__(self) -> None:
        require(bool(self.seeds) and min(self.seeds) >= 0, "seeds", self.seeds, "one and more, from 0 on")
        require(self.threads >= 1, "threads", self.threads, "at least 1")


def run(options: Options, *, quiet: bool = False) -> list[dict[str, Any]]:
    """All seeds; what each ``results.json`` holds. Raises RuntimeError with ``check`` when a claim does not hold in one of
    them, or when the model gives other logits in transformers."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = [
            run_seed(options, options.out if len(options.seeds) == 1 else options.out / f"seed-{seed}", seed, quiet=quiet)
            for seed in options.seeds
        ]
    finally:
        torch.set_num_threads(before)
    broken = [
        f"seed {r['seed']}: {c['claim']} ({c['measured']}; bound {c['bound']})"
        for r in found for c in r["checks"] if not c["holds"]
    ]
    if options.check and broken:
        raise RuntimeError("; ".join(broken))
    return found


def run_seed(options: Options, out: Path, seed: int, *, quiet: bool = False) -> dict[str, Any]:
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    groups = {"raw": options.raw, "model": options.model, "student": options.student, "sizes": options.sizes}
    settings = {f"{group}.{k}": v for group, x in groups.items() for k, v in to_json(x).items()}
    kept(out / "options.json", settings | {"seed": seed, "threads": options.threads}, lambda: None)
    clock = Clock(out / "seconds.json", console)
    print_kernels(console)

    pre = base.run(out, options.raw, options.model, clock, seed=seed, quiet=quiet)
    with clock("the student's base model"):
        student = base.student(out, options.student, seed=seed, quiet=quiet)
    start = out / "s3" / "model"
    post = path.run(out, start, student, options.sizes, clock, seed=seed, quiet=quiet)
    with clock("export"):
        tokenizer = Tokenizer.from_file(start / "tokenizer.json")
        export(load.load(out / "general" / "model"), start / "tokenizer.json", out / "model", end="<|im_end|>")
        shards = out / "data" / "shards"
        held_out = [TokenShards(shards / "held_out" / c.key) for c in cells.read(shards, "held_out")]
        equality = compare_with_transformers(out / "model", held_out)
        texts = sample(load.load(start), tokenizer, seed)

    # The same text in rows of the stage's length, by the model that the stage began with and by the one that it made.
    losses = {name.upper(): [r["held_out before"]["loss"], r["held_out"]["loss"]] for name, r in pre["stages"].items()}
    results = post | {"nll": losses | post["nll"]}
    results |= {
        "seed": seed, "pre-training": pre, "continued": texts, "transformers": equality, "seconds": clock.seconds,
        "checks": path.checks(results, out), "environment": environment.describe("cpu", torch.float32),
    }
    write_json(out / "results.json", results)
    report.write(out / "report.html", render(out, results, clock))
    console.print(table(("claim", "measured", "bound", "holds"), [
        (c["claim"], c["measured"], c["bound"], "yes" if c["holds"] else "[bold red]no[/]") for c in results["checks"]]))
    minutes = sum(wall for wall, _ in clock.seconds.values()) / 60
    console.print(f"report: {out / 'report.html'}   model: {out / 'model'}   {minutes:.1f} minutes", markup=False)
    return results


def sample(model: Qwen3, tokenizer: Tokenizer, seed: int, max_tokens: int = 60) -> list[tuple[str, str]]:
    """[(prompt, what the base model wrote behind it)]"""
    end = tokenizer.token_id("<|endoftext|>")
    prompts = [[end, *tokenizer.encode(text)] for text in PROMPTS]
    params = [  # one seed would give all prompts the same noise
        SamplingParams(temperature=0.7, top_p=0.95, seed=seed + i, stop_ids=[end], max_tokens=max_tokens)
        for i in range(len(prompts))
    ]
    return [(p, c.text) for p, c in zip(PROMPTS, generate.generate(model, prompts, params, tokenizer=tokenizer))]


# ---- what is shown -----------------------------------------------------------------------------------------------------


def print_kernels(console: Console) -> None:
    choices = environment.kernels("cpu", torch.float32)
    console.print(table(("op", "kernel", "why", "error / plain torch's"), kernel_rows(choices)))


def kernel_rows(choices: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(op, c["backend"], c["why"], "" if c["error"] is None else f"{c['error']:.2f}") for op, c in choices.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    found = Table(*head, box=None, pad_edge=False)
    for row in rows:
        found.add_row(*row)
    return found


def render(out: Path, results: dict[str, Any], clock: Clock) -> str:
    """The report's HTML."""
    env, stages = results["environment"], results["stages"]
    rewards = [stages[s]["chain"]["reward"] for s in ("cold start", "reasoning RL")]
    sections = [
        ("What holds", report.table(("claim", "measured", "bound", "holds"), [
            (c["claim"], c["measured"], c["bound"], "yes" if c["holds"] else "NO") for c in results["checks"]])),
        *base.sections(out, results["pre-training"]),
        ("The base model goes on", "".join(f"<pre>{escape(p)}<b>{escape(t)}</b></pre>" for p, t in results["continued"])),
        *path.sections(out, results, clock.seconds),
        ("The same weights in transformers", f"<p>{escape(results['transformers']['text'])}.</p>"),
        ("Kernels", report.table(("op", "kernel", "why", "self-check error / plain torch's"), kernel_rows(env["kernels"]))),
        ("Time", report.table(("part", "seconds", "CPU seconds"), clock.rows())
         + "<p>Over all the processes that worked on this run.</p>"
         + report.table(("", ""), [
             (k, env[k]) for k in ("device", "platform", "python", "torch", "numpy", "qwen3_kernels", "threads")])),
    ]
    wall = sum(wall for wall, _ in clock.seconds.values())
    lead = (f"{results['parameters']['model']:,} parameters, seed {results['seed']}, {wall / 60:.1f} minutes; held-out reward "
            f"{rewards[0]:.3f} after the cold start, {rewards[1]:.3f} after reasoning RL")
    return report.page("The Qwen3 path, in small", lead, sections)


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    options = tyro.cli(Options, args=args, prog="python -m training.recipes.demo", description=__doc__)
    try:
        run(options)
    except (RuntimeError, ValueError, OSError, FloatingPointError, ImportError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
