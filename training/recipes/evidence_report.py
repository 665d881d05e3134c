"""docs/RECIPE.md and its plots from the results of `evidence`: every number is read from a result, those in sentences too, and
what has not been run is left out."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..report import Point, smooth
from ..rewards.families import NO_THINK
from .evidence_bench import FUNNEL
from .path import png

Results = Mapping[str, Any]
MODELS = ("dense", "moe")
ORDER = ("s1", "s2", "s3", "cold", "rl", "fusion", "general", "distill", "control")
STAGES = ("s1", "s2", "s3")
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
    """The page, and its plots beside it. Raises FileNotFoundError when there is no result at all."""
    found = {model: read(out / model) for model in MODELS}
    if not any(found.values()):
        raise FileNotFoundError(f"{out} has no results; expected dense/NAME.json or moe/NAME.json, which the stages write")
    file.parent.mkdir(parents=True, exist_ok=True)
    drawings = plots(found["dense"])
    pictures = {name: f"{file.stem.lower()}-{name}.png" for name in drawings}
    for name, drawing in drawings.items():
        png(file.with_name(pictures[name]), *drawing)
    lines = page(found, {model: environment(out / model) for model in MODELS}, pictures)
    write_text(file, re.sub(r"\n{3,}", "\n\n", "\n".join(lines) + "\n"))


def read(folder: Path) -> dict[str, Results]:
    """In the order in which the stages are run."""
    files = (p for p in folder.glob("*.json") if p.stem not in ("environment", "funnel"))
    found = {p.stem: json.loads(p.read_text()) for p in files}
    return dict(sorted(found.items(), key=lambda kv: (ORDER.index(kv[0].split("-")[0]), kv[0])))


def environment(folder: Path) -> Results:
    file = folder / "environment.json"
    return json.loads(file.read_text()) if file.exists() else {}


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


def page(
    found: Mapping[str, Mapping[str, Results]], ran_on: Mapping[str, Results], pictures: Mapping[str, str],
) -> Iterator[str]:
    any_result = next(r for results in found.values() for r in results.values())
    about = [any_result["device"]]
    for k in ("torch", "commit", "date"):  # of the stages; early ones leave it to environment.json
        told = {r.get(k, ran_on[model].get(k)) for model, results in found.items() for r in results.values()} - {None}
        about += [f"{k} {', '.join(sorted(told))}"] if told else []
    minutes = sum(r["seconds"] for results in found.values() for r in results.values()) / 60
    yield "# The path on one GPU"
    yield ""
    yield ("What `python -m training.recipes.evidence` measured, beside the shape of the Qwen3 technical report's tables 21 "
           "and 22 and figure 2. The models are a thousand times smaller than the report's and the tasks are easy, so only "
           "the shapes can be compared. Rewards, in per cent, are on held-out problems (`training.rewards.reserved`), sampled "
           f"at temperature 1. {', '.join(about)}; {minutes:.0f} minutes in all, evaluation included. This page is written by "
           "the program; every number comes from its results.")
    yield ""
    yield from summary(found)
    yield "## Pre-training"
    yield from pretraining(found)
    for model, results in found.items():
        if "s3" in results:
            yield from long_context(model, results["s3"])
    dense = found["dense"]
    if "cold" in dense:
        yield "## Cold start"
        yield from cold(dense["cold"])
    if any(k.startswith("rl-") for k in dense):
        yield "## Reasoning RL"
        yield from rl(dense, pictures)
    if {"rl-0", "fusion", "general"} <= dense.keys():
        yield "## After each stage (shape of table 22)"
        yield from stages(dense)
    if "distill" in dense:
        yield "## Distillation or RL for the small model (shape of table 21)"
        yield from distillation(dense["distill"])
    if "general" in dense:
        yield "## Thinking budget (shape of figure 2)"
        yield from budget(dense["general"]["budget"], pictures)
    yield "## Speed"
    yield from speed(found, ran_on)
    yield "## Again"
    yield from commands(found)


# ---- what was shown, in sentences --------------------------------------------------------------------------------------


def summary(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    dense = found["dense"]
    for title, lines in (("Shown", shown(found, dense)), ("Not shown", not_shown(found, dense))):
        if lines := [f"- {line}" for line in lines]:
            yield from (f"## {title}", "", *lines, "")


def shown(found: Mapping[str, Mapping[str, Results]], dense: Mapping[str, Results]) -> Iterator[str]:
    for model, results in found.items():
        if falls := [f"{name.upper()} {r['held_out before']['loss']:.3f} to {r['held_out']['loss']:.3f}"
                     for name, r in pre(results).items() if fell(r)]:
            yield f"Pre-training, {model}: the held-out loss falls in {', '.join(falls)} (each in rows of its own length)."
    if seeds := seeds_of(dense):
        before = next(iter(seeds.values()))["before"]
        after = [r["after"] for r in seeds.values()]
        yield (f"Reasoning RL takes {len(next(iter(seeds.values()))['families'])} families from {percent(before)} to "
               f"{spread(after)}: {len(after)} seeds from one cold start.")
    if control := dense.get("control"):
        yield (f"Without the cold start it refuses to start ({control['refusal'].split(' over')[0]}); told to go on, it stays at "
               f"{percent(control['after'])} after {control['steps']} steps.")
    if {"rl-0", "fusion", "general"} <= dense.keys():
        names = dense["rl-0"]["families"]
        one, two, three, four = (mean(dense[n]["think"], names) for n in ("cold", "rl-0", "fusion", "general"))
        yield (f"On those families thinking has {percent(one)} after the cold start, {percent(two)} after reasoning RL, "
               f"{percent(three)} after fusion and {percent(four)} after general RL: fusion {change(three, two)}, general RL "
               f"{change(four, three)}. Replies are in the mode that was asked for in {follow(dense['fusion'])} % after fusion "
               f"and {follow(dense['general'])} % after general RL.")
        everywhere, then = (mean(dense[n]["think"], [*dense[n]["think"]]) for n in ("fusion", "general"))
        late = [n for n, r in dense["general"]["think"].items() if r["reward"] - dense["fusion"]["think"][n]["reward"] > 0.3]
        formats = ", ".join(f"{n} {percent(dense['fusion']['think'][n]['format'])}" for n in late)
        yield (f"Over all {len(dense['general']['think'])} families thinking goes from {percent(everywhere)} to {percent(then)} in "
               "general RL" + (f". Part of that is format: where it gains over 30 points, the share of well-formed replies was, in "
                               f"per cent, {formats}." if late else "."))
        b = dense["general"]["budget"]
        first, last = b["curve"][0], b["curve"][-1]
        yield (f"With the thinking budget the reward goes from {percent(first['reward'])} at {first['budget']} tokens to "
               f"{percent(last['reward'])} at {last['budget']}; its largest fall on the way is "
               f"{100 * largest_fall([p['reward'] for p in b['curve']]):.1f} points.")
    if d := dense.get("distill"):
        on, by_rl = both(d, "on_policy"), both(d, "student_rl")
        yield (f"On-policy distillation of a {d['base']['parameters'] / 1e6:.0f}M student {verdict(on, by_rl)} RL of the same student "
               f"in as many seconds: {percent(on)} against {percent(by_rl)} over both modes (" + ", ".join(
                   f"{mode} {percent(mode_mean(d, 'on_policy', flag))} against {percent(mode_mean(d, 'student_rl', flag))}"
                   for mode, flag in (("think", ""), ("no_think", NO_THINK))) + "; one seed).")


def not_shown(found: Mapping[str, Mapping[str, Results]], dense: Mapping[str, Results]) -> Iterator[str]:
    for model, results in found.items():
        if rises := [name.upper() for name, r in pre(results).items() if not fell(r)]:
            yield f"Pre-training, {model}: the held-out loss does not fall in {', '.join(rises)}."
        if {"s1", "s3"} <= results.keys():
            was, now = (results[n]["held_out"] for n in ("s1", "s3"))
            if worse := [d for d in domains(was) if now[d] > was[d]]:
                listed = ", ".join(f"{d.removeprefix('domain=')} ({was[d]:.3f} to {now[d]:.3f})" for d in worse)
                yield f"Held-out loss that S2 and S3 make worse, {model}: {listed}."
        if (s3 := results.get("s3")) and "before" in s3["probes"]:
            needles, shots, was = (s3["probes"][k][p] for k, p in (
                ("s3", "needle"), ("s3", "many-shot"), ("before", "many-shot")))
            right, gain = (max((n[k] for n in needles), default=0.0) for k in ("accuracy", "gain"))
            yield (f"Long context, {model}: the needle is said right in up to {percent(right)} % of the trials at any length and "
                   f"depth, and at most {gain:.2f} nats per token are saved of its number, after {s3['tokens'] / 1e6:.0f}M tokens of "
                   f"S3 for {s3['active'] / 1e6:.1f}M active parameters.")
            yield (f"Many shots, {model}, nats per token saved before S3 and after: " + ", ".join(
                f"{a['gain']:.2f} and {b['gain']:.2f} with {b['shots']} shots" for a, b in zip(was, shots) if b["shots"]) + ".")
    if (moe := found["moe"]) and not moe.keys() - set(STAGES):
        tokens = " and ".join(f"{r['s1']['tokens'] / 1e6:.0f}M ({model})" for model, r in found.items() if "s1" in r)
        yield f"The mixture of experts has {', '.join(moe).upper()} only; tokens of S1: {tokens}."
    if seeds := seeds_of(dense):
        yield (f"Sampler and trainer do not give the same bits here (bfloat16, other kernels): the worst token of a run is "
               f"{max(r['max_gap'] for r in seeds.values()):.2f} nats apart. Bit for bit holds on a CPU in float32.")
    if "general" in dense:
        r = dense["general"]
        never = [n for n, x in r["think"].items() if x["reward"] < 0.05]
        behind = [n for n, x in r["think"].items()
                  if (quick := r["no_think"].get(f"{n}{NO_THINK}")) and quick["reward"] > x["reward"]]
        if never:
            yield f"Never learnt under /think (below 5 %): {', '.join(never)}."
        if behind:
            yield f"Thinking is no better than answering at once: {', '.join(behind)}."
    yield "All but reasoning RL is one run of one seed; differences of a few points may be noise."


def pre(results: Mapping[str, Results]) -> dict[str, Results]:
    return {name: r for name, r in results.items() if name in STAGES}


def fell(r: Results) -> bool:
    return r["held_out"]["loss"] < r["held_out before"]["loss"]


def domains(held_out: Mapping[str, float]) -> list[str]:
    return [k for k in held_out if k.startswith("domain=")]


def seeds_of(dense: Mapping[str, Results]) -> dict[str, Results]:
    return {k: r for k, r in dense.items() if k.startswith("rl-")}


def spread(values: Sequence[float]) -> str:
    return percent(values[0]) if len(values) == 1 else \
        f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def change(now: float, was: float) -> str:
    return f"{'gains' if now > was else 'costs'} {100 * abs(now - was):.1f} points"


def verdict(a: float, b: float) -> str:
    return "is ahead of" if a > b else "is not ahead of"


def largest_fall(values: Sequence[float]) -> float:
    return max(max(values[: i + 1]) - v for i, v in enumerate(values))


def mode_mean(r: Results, part: str, flag: str) -> float:
    return mean(r[part]["measured"], [f"{n}{flag}" for n in r["families"]])


def both(r: Results, part: str) -> float:
    """Over both modes."""
    return statistics.fmean(mode_mean(r, part, flag) for flag in ("", NO_THINK))


def follow(r: Results) -> str:
    """The share of replies in the mode that was asked for, whatever they say."""
    return percent(statistics.fmean(x["format"] for part in ("think", "no_think") for x in r[part].values()))


def plots(dense: Mapping[str, Results]) -> dict[str, tuple[dict[str, Sequence[Point]], str, str]]:
    """{name: (series, x axis, y axis)}"""
    found = {}
    if seeds := seeds_of(dense):
        found["rl"] = ({f"seed {k[3:]}, held out": r["held_out_curve"] for k, r in seeds.items()} | {
            f"seed {k[3:]}, on the mix (mean of 10)": smooth(r["reward_curve"], 10) for k, r in seeds.items()}, "step", "reward")
    if "general" in dense:
        found["budget"] = ({"/think, cut": [(p["budget"], p["reward"]) for p in dense["general"]["budget"]["curve"]]},
                           "thinking tokens allowed", "reward")
    return found


def commands(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    """What was run, in its order."""
    yield "Data from what the machine has installed, then the stages, each on whatever machine (`--pack`, `--start`):"
    yield from ("", "```sh", "python -m training.recipes.evidence_data --out .evidence")
    for model, results in found.items():
        for name, r in results.items():
            stage = name.split("-")[0]
            stage = stage.upper() if stage in STAGES else stage
            seed = f" --seed {r['seed']}" if stage == "rl" else ""
            yield ("python -m training.recipes.evidence --out runs/evidence "
                   f"--model {model} --stage {stage} --minutes {r['minutes']:g}{seed}")
    yield from ("python -m training.recipes.evidence --out runs/evidence --report docs/RECIPE.md", "```", "")


# ---- tables ------------------------------------------------------------------------------------------------------------


def pretraining(found: Mapping[str, Mapping[str, Results]]) -> Iterator[str]:
    rows, names = [], []
    for model, results in found.items():
        for stage, r in pre(results).items():
            names = domains(r["held_out"])
            sizes = (f"{r['parameters'] / 1e6:.1f}M", f"{r['active'] / 1e6:.1f}M", f"{r['seq_len']:,}")
            losses = (r["held_out before"]["loss"], *(r["held_out"][k] for k in ("loss", *names)))
            rows.append((f"{model}, {stage.upper()}", *sizes, f"{r['tokens'] / 1e6:.0f}M", f"{r['mixture']['passes']:.1f}",
                         *(f"{v:.3f}" for v in losses), f"{r['skipped']} of {r['steps']}"))
    head = ("", "parameters", "active", "row", "tokens", "passes, at most", "loss before", "loss after",
            *(n.removeprefix("domain=") for n in names), "skipped steps")
    yield from table(head, rows)
    by_language = {f"{model}, {stage.upper()}": r["held_out"] for model, results in found.items() for stage, r in pre(results).items()}
    languages = sorted({k for held_out in by_language.values() for k in held_out if k.startswith("language=")})
    yield "By language (zxx: code, und: not sure which):"
    yield from table(("", *by_language), [
        (k.removeprefix("language="), *(f"{h[k]:.3f}" if k in h else None for h in by_language.values())) for k in languages])
    yield ("Losses are nats per token, of held-out documents in rows of the stage's length, after the stage where not said "
           "otherwise. Skipped steps are the spike guard's.")
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


def cold(r: Results) -> Iterator[str]:
    funnel = r["funnel"]
    yield from table(("what the filters say", "number"), [(k, f"{funnel[k]:,}") for k in FUNNEL if k in funnel])
    yield "Counts of queries where it says so, else of responses; for three queries in ten there is a second one, spoilt on purpose."
    if lacking := [n for n, count in r.get("conversations", {}).items() if not count]:
        yield ""
        yield f"Families without a conversation: {', '.join(lacking)}."
    yield ""


def rl(dense: Mapping[str, Results], pictures: Mapping[str, str]) -> Iterator[str]:
    seeds = seeds_of(dense)
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
        yield f"{len(after)} seeds: {spread(after)} (standard deviation)."
        yield ""
    if "rl" in pictures:
        yield f"![Reward by step]({pictures['rl']})"
        yield ""
        yield ("The mix grows harder as levels are mastered, and its reward falls then; held out are problems of the first level, "
               "in the curves a quarter of those in the table.")
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
    on, by_rl = both(r, "on_policy"), both(r, "student_rl")
    yield (f"Student of {r['base']['parameters'] / 1e6:.1f}M parameters, from the same off-policy checkpoint in as many seconds; "
           f"over both modes on-policy distillation ({percent(on)}) {verdict(on, by_rl)} RL ({percent(by_rl)}).")
    yield ""
    yield "The report's, for Qwen3-8B on AIME24 (table 21; pass@64, GPU hours):"
    yield from table(("", "pass@1", "pass@64", "GPU hours"), [
        (name, a, b, None if hours is None else f"{hours:,}") for name, a, b, hours in TABLE_21])


def budget(r: Results, pictures: Mapping[str, str]) -> Iterator[str]:
    yield ""
    yield (f"{r['count']} held-out problems; thinking is cut after so many tokens and closed. Uncut: {percent(r['whole'])}, "
           f"with {r['thinking_tokens']:.0f} tokens of thinking on average; under /no_think {percent(r['no_think'])}.")
    yield from table(("thinking tokens", "reward", "cut"), [
        (p["budget"], percent(p["reward"]), f"{100 * p['cut']:.0f} %") for p in r["curve"]])
    if "budget" in pictures:
        yield f"![Reward by thinking budget]({pictures['budget']})"
        yield ""
    yield "The report's, for Qwen3-235B-A22B on AIME24 (figure 2); without thinking 40.1:"
    yield from table(("thinking tokens", "AIME24"), [(f"{b:,}", v) for b, v in FIGURE_2])


def speed(found: Mapping[str, Mapping[str, Results]], ran_on: Mapping[str, Results]) -> Iterator[str]:
    rows = [(f"{model}, {name}", f"{r['tokens_per_s']:,.0f}", percent(r["mfu"]), None, None, f"{r['seconds']:.0f}")
            for model, results in found.items() for name, r in results.items() if "tokens_per_s" in r]
    rows += [(f"{model}, {name}", None, None, f"{r['rollouts_per_s']:,.0f}", f"{r['sampled_tokens_per_s']:,.0f}",
              f"{r['seconds']:.0f}") for model, results in found.items() for name, r in results.items() if "rollouts_per_s" in r]
    yield from table(("", "tokens/s", "MFU, %", "rollouts/s", "sampled tokens/s", "seconds in all"), rows)
    yield ("Tokens/s: median over the run, evaluation apart. MFU: 6 FLOP per active parameter and token, the tied head once, and "
           "attention over the documents as they lie in the rows, of 989 TFLOP/s. Rollouts/s: conversations sampled and scored "
           "per second, per GPU. Seconds in all: with the stage's evaluation, " + (
               "over all processes that worked on it." if all("date" in r for results in found.values() for r in results.values())
               else "of the process that finished it."))  # those without a date were measured so
    others = {f"{op} ({c['backend']}; {c['why']})": None for env in ran_on.values() for op, c in env.get("kernels", {}).items()
              if c["why"] != "first choice"}
    if others:
        yield ""
        yield f"Not by the first choice of kernel: {', '.join(others)}."
    yield ""
