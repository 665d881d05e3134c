"""docs/RECIPE.md from the results of `evidence`: every number is read from a result; what has not been run is left out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..rewards.families import NO_THINK

Results = Mapping[str, Any]
GROUPS = {
    "arithmetic": ("linear_equation", *(f"gym/{n}" for n in (
        "basic_arithmetic", "chain_sum", "products", "decimal_arithmetic", "complex_arithmetic", "gcd", "lcm",
        "prime_factorization", "fraction_simplification", "base_conversion", "count_bits", "simple_equations",
        "simple_geometry"))),
    "words": ("gym/letter_counting", "gym/spell_backward", "gym/word_sorting"),
    "logic, counting, dates": tuple(f"gym/{n}" for n in (
        "aiw", "family_relationships", "knights_knaves", "syllogism", "leg_counting", "calendar_arithmetic",
        "time_intervals")),
    "instructions": ("instructions",), "grounding": ("grounding",), "tool use": ("python_tool",),
}
# Qwen3 technical report, tables 21 and 22 and figure 2.
TABLE_21 = (("off-policy distillation", 55.0, 90.0, None), ("+ RL", 67.6, 90.0, 17_920),
            ("+ on-policy distillation", 74.4, 93.3, 1_800))
TABLE_22 = (("AIME24", 83.8, 81.9, 28.5, 81.4, 31.0), ("LiveCodeBench v5", 68.4, 67.2, 31.1, 65.7, 31.3),
            ("IFEval", 73.0, 78.4, 78.4, 85.0, 83.2), ("ThinkFollow", None, 88.7, None, 98.9, None),
            ("ToolUse", 63.3, 70.4, 73.2, 85.5, 86.5), ("CounterFactQA", 50.4, 61.3, 64.3, 68.1, 66.4))
FIGURE_2 = ((1024, 42.1), (2048, 42.7), (4096, 56.3), (8192, 72.5), (16384, 84.0), (32768, 86.7))


def write(out: Path, file: Path) -> None:
    """Raises FileNotFoundError when there is no result at all."""
    found = {model: read(out / model) for model in ("dense", "moe")}
    if not any(found.values()):
        raise FileNotFoundError(f"{out} has no results; expected dense/NAME.json or moe/NAME.json, which the stages write")
    write_text(file, "\n".join(page(found)) + "\n")


def read(folder: Path) -> dict[str, Results]:
    files = sorted(p for p in folder.glob("*.json") if p.stem not in ("environment", "funnel"))
    return {p.stem: json.loads(p.read_text()) for p in files}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Markdown; None is left empty."""
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join("" if c is None else str(c) for c in cells) + " |"

    return ["", line(head), line([":--", *["--:"] * (len(head) - 1)]), *map(line, rows), ""]


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def mean(measured: Results, names: Sequence[str], key: str = "reward") -> float | None:
    values = [measured[n][key] for n in names if n in measured]
    return statistics.fmean(values) if values else None


def page(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    any_result = next(r for results in found.values() for r in results.values())
    yield "# The path on one GPU"
    yield ""
    yield ("What `python -m training.recipes.evidence` measured, beside the shape of the Qwen3 technical report's tables 21 "
           "and 22 and figure 2. The models are a thousand times smaller than the report's and the tasks are easy, so only "
           "the shapes can be compared. Rewards, in per cent, are on held-out problems (`training.rewards.reserved`), sampled "
           f"at temperature 1. Device: {any_result['device']}.")
    yield ""
    yield "## Pre-training"
    yield from pretraining(found)
    for model, results in found.items():
        if "s3" in results:
            yield from long_context(model, results["s3"])
    dense = found["dense"]
    if any(k.startswith("rl-") for k in dense):
        yield "## Reasoning RL"
        yield from rl(dense)
    if {"rl-0", "fusion", "general"} <= dense.keys():
        yield "## After each stage (shape of table 22)"
        yield from stages(dense)
    if "distill" in dense:
        yield "## Distillation or RL for the small model (shape of table 21)"
        yield from distillation(dense["distill"])
    if "general" in dense:
        yield "## Thinking budget (shape of figure 2)"
        yield from budget(dense["general"]["budget"])
    yield "## Speed"
    yield from speed(found)


def pretraining(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    rows, domains = [], []
    for model, results in found.items():
        for stage in ("s1", "s2", "s3"):
            if r := results.get(stage):
                domains = [k for k in r["held_out"] if k.startswith("domain=")]
                sizes = (f"{r['parameters'] / 1e6:.1f}M", f"{r['active'] / 1e6:.1f}M", f"{r['seq_len']:,}")
                rows.append((f"{model}, {stage.upper()}", *sizes, f"{r['tokens'] / 1e6:.0f}M", f"{r['mixture']['passes']:.1f}",
                             *(f"{r['held_out'][k]:.3f}" for k in ("loss", *domains)), r["skipped"]))
    names = [d.removeprefix("domain=") for d in domains]
    head = ("", "parameters", "active", "row", "tokens", "passes, at most", "held-out loss", *names, "skipped steps")
    yield from table(head, rows)
    yield "Losses are nats per token, of held-out documents in rows of the stage's length."
    yield ""


def long_context(model: str, r: Results) -> Iterator[str]:
    if "before" not in r["probes"]:
        return
    was, now = r["probes"]["before"], r["probes"]["s3"]
    yield f"Long context, {model}: nats per token that a needle saves of its number, and how often it is said right, in per cent."
    yield from table(("tokens", "depth", "saved before", "saved after", "right before", "right after"), [
        (f"{b['length']:,}", b["depth"], f"{a['gain']:.2f}", f"{b['gain']:.2f}", percent(a["accuracy"]), percent(b["accuracy"]))
        for a, b in zip(was["needle"], now["needle"])])
    yield from table(("shots", "saved before", "saved after", "right before", "right after"), [
        (b["shots"], f"{a['gain']:.2f}", f"{b['gain']:.2f}", percent(a["accuracy"]), percent(b["accuracy"]))
        for a, b in zip(was["many-shot"], now["many-shot"])])


def rl(dense: Mapping[str, Results]) -> Iterator[str]:
    seeds = {k: r for k, r in dense.items() if k.startswith("rl-")}
    families = next(iter(seeds.values()))["families"]
    yield ""
    yield f"Families, chosen as those that the cold start left learnable: {', '.join(families)}."
    rows = []
    for name, r in seeds.items():
        entropies = [v for _, v in r["sampled_entropy_curve"]]
        rows.append((name, r["steps"], percent(r["before"]), percent(r["after"]), f"{entropies[0]:.3f}, {entropies[-1]:.3f}",
                     f"{r['max_gap']:.3f}", f"{r['rollouts_per_s']:,.0f}"))
    yield from table(("", "steps", "before", "after", "entropy, first and last", "max abs d log p", "rollouts/s"), rows)
    after = [r["after"] for r in seeds.values()]
    if len(after) > 1:
        yield f"{len(after)} seeds: {100 * statistics.fmean(after):.1f} ± {100 * statistics.stdev(after):.1f} (standard deviation)."
        yield ""
    if control := dense.get("control"):
        yield f"Without a cold start: {control['refusal']}"
        yield ""
        yield f"Told to go on nevertheless, {control['steps']} steps: {percent(control['after'])} on the same families."
        yield ""


def stages(dense: Mapping[str, Results]) -> Iterator[str]:
    two, three, four = dense["rl-0"], dense["fusion"], dense["general"]
    rows = []
    for group, names in GROUPS.items():
        quick = [f"{n}{NO_THINK}" for n in names]
        rows.append((group, *(percent(mean(r, n)) for r, n in (
            (two["think"], names), (three["think"], names), (three["no_think"], quick), (four["think"], names),
            (four["no_think"], quick)))))

    def follow(r: Results) -> str:
        """The share of replies in the mode that was asked for, whatever they say."""
        parts = [x["format"] for part in ("think", "no_think") for x in r[part].values()]
        return percent(statistics.fmean(parts))

    rows.append(("mode as asked (ThinkFollow)", None, follow(three), None, follow(four), None))
    head = ("", "2 think", "3 think", "3 no_think", "4 think", "4 no_think")
    yield from table(head, rows)
    yield "The report's, for Qwen3-32B (table 22, a selection):"
    yield from table(head, [(name, *values) for name, *values in TABLE_22])
    yield "By family:"
    yield from table(head, [
        (n, *(percent(mean(r, [m])) for r, m in (
            (two["think"], n), (three["think"], n), (three["no_think"], f"{n}{NO_THINK}"), (four["think"], n),
            (four["no_think"], f"{n}{NO_THINK}")))) for n in two["think"]])


def distillation(r: Results) -> Iterator[str]:
    names = r["families"]
    quick = [f"{n}{NO_THINK}" for n in names]

    def row(name: str, measured: Results, seconds: float | None) -> tuple[object, ...]:
        return (name, percent(mean(measured, names)), percent(mean(measured, names, "pass_at_k")),
                percent(mean(measured, quick)), None if seconds is None else f"{seconds:.0f}")

    k = r["pass_k"]
    yield from table(("", "think", f"pass@{k}", "no_think", "seconds"), [
        row("teacher", r["teacher"], None), row("off-policy distillation", r["off_policy"]["measured"], None),
        row("+ RL", r["student_rl"]["measured"], r["student_rl"]["training_seconds"]),
        row("+ on-policy distillation", r["on_policy"]["measured"], r["on_policy"]["training_seconds"])])
    on, rl_ = (mean(r[n]["measured"], [*names, *quick]) for n in ("on_policy", "student_rl"))
    verdict = "is ahead of" if on > rl_ else "is not ahead of"
    yield (f"Student of {r['base']['parameters'] / 1e6:.1f}M parameters, from the same off-policy checkpoint in as many seconds; "
           f"over both modes on-policy distillation ({percent(on)}) {verdict} RL ({percent(rl_)}).")
    yield ""
    yield "The report's, for Qwen3-8B on AIME24 (table 21; pass@64, GPU hours):"
    yield from table(("", "pass@1", "pass@64", "GPU hours"), [
        (name, a, b, None if hours is None else f"{hours:,}") for name, a, b, hours in TABLE_21])


def budget(r: Results) -> Iterator[str]:
    yield ""
    yield (f"{r['count']} held-out problems; thinking is cut after so many tokens and closed. Uncut: {percent(r['whole'])}, "
           f"with {r['thinking_tokens']:.0f} tokens of thinking on average; under /no_think {percent(r['no_think'])}.")
    yield from table(("thinking tokens", "reward", "cut"), [
        (p["budget"], percent(p["reward"]), f"{100 * p['cut']:.0f} %") for p in r["curve"]])
    yield "The report's, for Qwen3-235B-A22B on AIME24 (figure 2); without thinking 40.1:"
    yield from table(("thinking tokens", "AIME24"), [(f"{b:,}", v) for b, v in FIGURE_2])


def speed(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    rows = [(f"{model}, {name}", f"{r['tokens_per_s']:,.0f}", percent(r["mfu"]), None, None, f"{r['seconds']:.0f}")
            for model, results in found.items() for name, r in results.items() if "tokens_per_s" in r]
    rows += [(f"{model}, {name}", None, None, f"{r['rollouts_per_s']:,.0f}", f"{r['sampled_tokens_per_s']:,.0f}",
              f"{r['seconds']:.0f}") for model, results in found.items() for name, r in results.items() if "rollouts_per_s" in r]
    yield from table(("", "tokens/s", "MFU, %", "rollouts/s", "sampled tokens/s", "seconds in all"), rows)
    yield ("Tokens/s: median over the run, evaluation apart. MFU: 6 FLOP per active parameter and token, the tied head once, and "
           "attention over the documents as they lie in the rows, of 989 TFLOP/s. Rollouts/s: conversations sampled and scored "
           "per second, per GPU.")
