"""All of post-training on a model of a few hundred thousand parameters: the second half of `demo`.

base model -> long-CoT cold start -> reasoning RL -> thinking-mode fusion -> general RL, then a smaller student by
off-policy and on-policy distillation, beside the same student by RL. The task is `rewards.chains`; the stages are those of
`cold_start`, `reasoning_rl`, `fusion`, `general_rl` and `distill` with the sizes below. Everything measured is measured on
problems that no stage trains on, in any mode (`rewards.reserved`). A run that is stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from qwen3_model import load as model_io
from qwen3_model.chat import encode_chat, parse
from qwen3_model.generate import generate
from qwen3_model.model import Qwen3
from qwen3_model.sampling import SamplingParams
from qwen3_model.tokenizer import Tokenizer

from .. import report, sft
from ..config import to_json
from ..distill import distill, teacher_data
from ..filters import Validation
from ..log import read_metrics
from ..losses import cross_entropy
from ..rewards import Problem, find, mixed_seed, rng_of
from ..rewards.chains import Chain, worked
from ..rl import Episode, held_out, play, reinforce, summary
from ..rollout import invariant
from ..samples import packs
from . import cold_start, distill as distillation, fusion, general_rl, reasoning_rl
from .clock import Clock

FAMILIES = {name: Chain(flag) for name, flag in (("chain", ""), ("chain/think", "/think"), ("chain/no_think", "/no_think"))}
LEVELS = (0, 1, 2, 3, 4)  # chains of 2 to 6 numbers
PLAY = {"max_tokens": 64, "max_prompt": 48, "slots": 256}


@dataclass(frozen=True)
class Sizes:
    """Steps and rates, chosen by experiment (docs/LOG.md)."""

    cold_queries: int = 1200
    cold_steps: int = 40
    rl_steps: int = 80
    rl_lr: float = 2e-4
    fusion_rows: int = 1500  # of each kind
    fusion_steps: int = 200
    general_steps: int = 30
    off_policy_steps: int = 150
    student_steps: int = 40
    student_rl_steps: int = 80  # about as long as distillation's, which reads the teacher, too
    groups: int = 32
    group_size: int = 8
    eval_problems: int = 128  # per level and mode


# ---- the stages --------------------------------------------------------------------------------------------------------


def run(
    out: Path, base: Path, student_base: Path, sizes: Sizes, clock: Clock, *, seed: int = 0, quiet: bool = False,
) -> dict[str, Any]:
    """Runs or resumes the path in ``out`` from the folders of two base models of one vocabulary; returns what was measured.
    The model that comes out is ``out/general/model``."""
    console, found = clock.console, {}
    small = {"seed": seed, "dtype": "float32", "device": "cpu", "log_every": 20, "save_every": 20, "tokens_per_pack": 8192}
    rl_small = small | PLAY | {
        "groups": sizes.groups, "group_size": sizes.group_size, "workers": 1, "level": 1, "easy_share": 0.5,
    }
    tune = {"rows": 32, "schedule": "wsd", "decay": 0.5, "warmup": 5, "max_tokens": 128} | small
    tok = Tokenizer.from_file(base / "tokenizer.json")

    def stage(name: str, work: Callable[[], Path]) -> Path:
        with clock(name):
            return work()

    def measured(name: str, folder: Path, families: Sequence[str], several: bool = False) -> None:
        with clock("evaluation", heading=False):
            model, _ = opened(folder)
            found[name] = {f: measure(model, tok, f, sizes.eval_problems) for f in families}
            if several:
                found[name][families[0]]["pass_at_8"] = pass_at(model, tok, families[0], max(1, sizes.eval_problems // 4), 8)
        for family, result in found[name].items():
            console.print(f"  {name}, {family}: reward {result['reward']:.3f}, format {result['format']:.3f}, thinking tokens "
                          f"{result['thinking_tokens']:.1f}; by length " + " ".join(f"{v:.2f}" for v in result["by_level"]),
                          markup=False)

    measured("base", base, ["chain"])
    validation = Validation(p.messages[-1]["content"] for p in held_out(FAMILIES, 2, 64))
    queries = [draw("cold", seed, i, "chain", 2) for i in range(sizes.cold_queries)]
    candidates = cold_start.chain_candidates(queries, seed)
    talks, funnel = cold_start.conversations(candidates, validation, min_thinking=4)  # a sum of two is six characters
    sft.write(out / "cold.jsonl", talks)
    cold = stage("cold start", lambda: sft.fine_tune(
        cold_start.recipe(base, out / "cold.jsonl", out / "cold", **(tune | {"steps": sizes.cold_steps, "lr": 2e-3})),
        quiet=quiet))
    measured("cold start", cold, ["chain"], several=True)
    control = refused(base, out / "no_cold_start", rl_small)
    console.print(f"  without it: {control}", markup=False)

    rl = stage("reasoning RL", lambda: reinforce(reasoning_rl.recipe(cold, out / "rl", **(rl_small | {
        "families": ("chain",), "steps": sizes.rl_steps, "mini_batches": 2, "lr": sizes.rl_lr, "eval_every": 20,
        "entropy_band": (0.03, 0.5)})), quiet=quiet))
    measured("reasoning RL", rl, ["chain"], several=True)

    def fuse() -> Path:
        model, _ = opened(rl)
        problems = [draw("fusion", seed, i, "chain", 3) for i in range(sizes.fusion_rows)]
        thinking = teacher_data(model, tok, FAMILIES, problems, seed=mixed_seed("fusion", seed), **PLAY)
        direct = [
            [*p.messages, {"role": "assistant", "content": p.data["answer"]}]
            for p in (draw("direct", seed, i, "chain", 3) for i in range(sizes.fusion_rows))
        ]
        sft.write(out / "fusion.jsonl", fusion.conversations(thinking, direct, seed))
        return sft.fine_tune(fusion.recipe(rl, out / "fusion.jsonl", out / "fusion", **(
            tune | {"steps": sizes.fusion_steps, "lr": 1e-3, "max_tokens": 192})), quiet=quiet)

    modes = ["chain", "chain/think", "chain/no_think"]
    fused = stage("fusion", fuse)
    measured("fusion", fused, modes)

    general = stage("general RL", lambda: reinforce(general_rl.recipe(fused, out / "general", **(rl_small | {
        "families": tuple(modes), "steps": sizes.general_steps, "mini_batches": 2, "lr": sizes.rl_lr / 2,
        "entropy_band": (0.03, 0.9), "eval_every": 0})), quiet=quiet))
    measured("general RL", general, modes)

    def off_policy() -> Path:
        model, _ = opened(general)
        problems = [draw("off", seed, i, f, 3) for i in range(sizes.fusion_rows) for f in modes[1:]]
        replies = teacher_data(model, tok, FAMILIES, problems, seed=mixed_seed("off", seed), right_only=False, **PLAY)
        sft.write(out / "off.jsonl", replies)
        return sft.fine_tune(distillation.off_policy(student_base, out / "off.jsonl", out / "off_policy", **(
            tune | {"steps": sizes.off_policy_steps, "lr": 3e-3})), quiet=quiet)

    off = stage("off-policy distillation", off_policy)
    measured("off-policy distillation", off, modes[1:], several=True)
    both = rl_small | {"families": tuple(modes[1:]), "steps": sizes.student_steps, "level": 2}
    on = stage("on-policy distillation", lambda: distill(distillation.on_policy(
        general, off, out / "on_policy", **(both | {"lr": 5e-4, "mini_batches": 2})), quiet=quiet))
    measured("on-policy distillation", on, modes[1:], several=True)
    student_rl = stage("RL of the student", lambda: reinforce(reasoning_rl.recipe(off, out / "student_rl", **(
        both | {"steps": sizes.student_rl_steps, "lr": sizes.rl_lr, "mini_batches": 2, "pass_band": (0.0, 1.0), "raise_at": 1.0,
                "eval_every": 0})), quiet=quiet))
    measured("RL of the student", student_rl, modes[1:], several=True)

    with clock("thinking budget"):
        model, _ = opened(general)
        budgets = budget_curve(model, tok, sizes.eval_problems)
        losses = {
            "cold start": [nll(folder, ["chain"]) for folder in (base, cold)],
            "fusion": [nll(folder, modes) for folder in (rl, fused)],
        }
    return {
        "stages": found, "funnel": dict(funnel), "budgets": budgets, "nll": losses, "no_cold_start": control,
        "parameters": {"model": model_size(base), "student": model_size(student_base)}, "invariant": invariant(model),
        "sizes": to_json(sizes), "samples": samples(model, tok),
    }


def draw(purpose: str, seed: int, number: int, family: str, top: int) -> Problem:
    level = rng_of(purpose, seed, number).randint(0, top)
    return find(FAMILIES[family], mixed_seed(purpose, seed, number, family), level)


def opened(folder: Path, device: str = "cpu") -> tuple[Qwen3, Tokenizer]:
    return model_io.load(folder, device=device), Tokenizer.from_file(folder / "tokenizer.json")


def model_size(folder: Path) -> int:
    return model_io.load(folder).config.num_params()


# ---- what is measured --------------------------------------------------------------------------------------------------


def measure(model: Qwen3, tokenizer: Tokenizer, family: str, count: int, repeats: int = 1) -> dict[str, Any]:
    """On held-out problems of all LEVELS, sampled at temperature 1."""
    episodes: list[Episode] = []
    for level in LEVELS:
        problems = held_out({family: FAMILIES[family]}, level, count)
        episodes += play(model, tokenizer, FAMILIES, problems, repeats=repeats, seed=mixed_seed("measure", level), **PLAY)
    by_level = [statistics.fmean(e.reward for e in episodes if e.problem.level == level) for level in LEVELS]
    answers = statistics.fmean(e.reply.content.strip() == e.problem.data["answer"] for e in episodes)
    quiet = statistics.fmean(e.thinking_tokens == 0 for e in episodes)
    return summary(episodes) | {"by_level": by_level, "right_answer": answers, "no_thinking": quiet, "count": len(episodes)}


def budget_curve(model: Qwen3, tokenizer: Tokenizer, count: int, levels: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Accuracy under /think when the thinking is cut after B tokens and `</think>` is put in its place; by level."""
    ends = tokenizer.encode("\n</think>\n\n")
    opened_by = len(tokenizer.encode("<think>\n"))
    budgets = range(0, 6 * (max(levels) + 1) + 7, 3)
    curves: dict[str, list[float]] = {}
    for level in levels:
        problems = held_out({"chain/think": FAMILIES["chain/think"]}, level, count)
        prompts = [encode_chat(tokenizer, p.messages) for p in problems]
        curve = []
        for budget in budgets:
            def cut(ids: Sequence[int], at: int = opened_by + budget) -> Sequence[int]:
                return ends if len(ids) == at and tokenizer.end_think_id not in ids else ()

            params = [
                SamplingParams(max_tokens=80, seed=mixed_seed("budget", i), stop_ids=tokenizer.stop_ids) for i in range(count)
            ]
            done = generate(model, prompts, params, guides=[cut] * count)
            curve.append(statistics.fmean(
                parse(c.ids, tokenizer).content.strip() == p.data["answer"] for c, p in zip(done, problems)))
        curves[str(level)] = curve
    mean = [statistics.fmean(v) for v in zip(*curves.values())]
    return {"budgets": [*budgets], "by_level": curves, "mean": mean, "count": count * len(levels)}


def pass_at(model: Qwen3, tokenizer: Tokenizer, family: str, count: int, k: int) -> float:
    """Share of held-out problems that one of k samples gets right, over all LEVELS."""
    groups: dict[tuple[int, int], bool] = {}
    for level in LEVELS:
        problems = held_out({family: FAMILIES[family]}, level, count)
        for e in play(model, tokenizer, FAMILIES, problems, repeats=k, seed=mixed_seed("pass", level), **PLAY):
            groups[level, e.group] = groups.get((level, e.group), False) or e.reward >= 0.5
    return statistics.fmean(groups.values())


def refused(start: Path, out: Path, options: Mapping[str, Any]) -> str:
    """What reinforcement learning says to a model without a cold start."""
    config = reasoning_rl.recipe(start, out, **(options | {"families": ("chain",), "steps": 1, "tensorboard": False}))
    try:
        reinforce(config, quiet=True)
    except RuntimeError as e:
        return str(e)
    return "it started"


@torch.no_grad()
def nll(folder: Path, families: Sequence[str], count: int = 100) -> float:
    """Mean negative log-likelihood per token of the right replies to held-out problems, in the prompts' modes."""
    model, tok = opened(folder)
    found = []
    for p in held_out({f: FAMILIES[f] for f in families}, 2, count):
        reply = {"role": "assistant", "content": p.data["answer"]}
        reply |= {"reasoning_content": worked(p.data["chain"])} if p.thinking else {}
        found += sft.encode(tok, [*p.messages, reply])
    total = sum(cross_entropy(model, p)[1]["nll"].item() for p in packs(found, 8192))
    return total / sum(s.trained for s in found)


def samples(model: Qwen3, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    out = []
    for family in ("chain/think", "chain/no_think"):
        problems = held_out({family: FAMILIES[family]}, 2, 3, seed=7)
        for e in play(model, tokenizer, FAMILIES, problems, repeats=1, seed=1, **PLAY):
            out.append((tokenizer.decode(e.tokens[: e.prompt]), tokenizer.decode(e.tokens[e.prompt :])))
    return out


def checks(results: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """The claims of the report, each with what was measured and the bound."""
    stages, found = results["stages"], []

    def claim(text: str, measured: str, bound: str, holds: bool) -> None:
        found.append({"claim": text, "measured": measured, "bound": bound, "holds": bool(holds)})

    said = results["no_cold_start"]
    claim("reasoning RL refuses a model without cold start", said.split(" over")[0], "below 0.05", "too hard" in said)
    before, after = (stages[s]["chain"]["reward"] for s in ("cold start", "reasoning RL"))
    claim("reasoning RL raises the held-out reward", f"{before:.3f} to {after:.3f}", "by 0.10", after - before >= 0.10)
    records = [r for r in read_metrics(out / "rl") if r["kind"] == "train"]
    gap = max(r["max_gap"] for part in ("rl", "general", "student_rl") for r in read_metrics(out / part) if "max_gap" in r)
    claim("max |d log p| of sampler and trainer", f"{gap:.2g}", "0" if results["invariant"] else "1e-4",
          gap == 0 if results["invariant"] else gap < 1e-4)
    first, last = (statistics.fmean(r["sampled_entropy"] for r in part) for part in (records[:10], records[-10:]))
    claim("entropy does not collapse in reasoning RL", f"{first:.3f} to {last:.3f}", "half of the start", last > 0.5 * first)
    for name in ("fusion", "general RL"):
        think, direct = stages[name]["chain/think"], stages[name]["chain/no_think"]
        claim(f"/no_think has 0 thinking tokens after {name}", f"{direct['no_thinking']:.4f}", "0.99",
              direct["no_thinking"] >= 0.99)
        claim(f"/think beats /no_think after {name}", f"{think['reward']:.3f}, {direct['reward']:.3f}", "above",
              think["reward"] > direct["reward"])
    curve, n = results["budgets"]["mean"], results["budgets"]["count"]
    noise = 2 * math.sqrt(0.5 / n)
    falls = max(max(curve[:i], default=0) - v for i, v in enumerate(curve))
    claim("accuracy rises with the thinking budget", f"{curve[0]:.3f} to {curve[-1]:.3f}, largest fall {falls:.3f}",
          f"0.20, no fall over {noise:.3f}", curve[-1] - curve[0] >= 0.2 and falls <= noise)
    for name, (was, now) in results["nll"].items():
        claim(f"held-out loss falls in {name}", f"{was:.3f} to {now:.3f}", "below", now < was)
    return found


# ---- the report --------------------------------------------------------------------------------------------------------


def sections(out: Path, results: Mapping[str, Any], seconds: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """Of the report page. Also writes plots/*.png. ``seconds``: of a `Clock`."""
    charts = plots(out, results)
    (out / "plots").mkdir(exist_ok=True)
    for name, (series, x, y) in charts.items():
        png(out / "plots" / f"{name}.png", series, x, y)
    stages = results["stages"]
    rows = [
        (name, family, *(f"{v:.2f}" for v in r["by_level"]), f"{r['reward']:.3f}", f"{r['format']:.3f}",
         f"{r['thinking_tokens']:.1f}", f"{r['sampled_entropy']:.3f}", f"{r['pass_at_8']:.3f}" if "pass_at_8" in r else "")
        for name, part in stages.items() for family, r in part.items()
    ]
    off, on, control = (stages[n] for n in ("off-policy distillation", "on-policy distillation", "RL of the student"))
    parts = {"off": off, "on": on, "rl": control}
    mean = {name: statistics.fmean(r["reward"] for r in part.values()) for name, part in parts.items()}
    verdict = "did better than" if mean["on"] > mean["rl"] else "did not do better than"
    spent = {name: seconds[name][1] for name in ("on-policy distillation", "RL of the student")}
    n = results["sizes"]["eval_problems"]
    return [
        ("Post-training: before and after each stage",
         report.table(("stage", "prompt", *(f"{level + 2} numbers" for level in LEVELS), "reward", "format", "thinking tokens",
                       "entropy", "pass@8"), rows)
         + f"<p>Held-out reward: the right answer in the right format, sampled at temperature 1, {n} problems per cell "
           f"(standard error up to {0.5 / math.sqrt(n):.3f}). After fusion the prompt says which mode.</p>"),
        ("Distillation",
         f"<p>Student of {results['parameters']['student']:,} parameters, steps of as many conversations each: from "
         f"{mean['off']:.3f} after off-policy distillation to {mean['on']:.3f} in {results['sizes']['student_steps']} steps on-policy "
         f"({spent['on-policy distillation']:.0f} s of CPU time) and {mean['rl']:.3f} in {results['sizes']['student_rl_steps']} of RL "
         f"({spent['RL of the student']:.0f} s); pass@8 under /think {off['chain/think']['pass_at_8']:.3f}, "
         f"{on['chain/think']['pass_at_8']:.3f} and {control['chain/think']['pass_at_8']:.3f}. On-policy distillation {verdict} "
         "RL here.</p>"),
        *((title, report.chart(series, x=x, y=y)) for title, (series, x, y) in charts.items()),
        ("Without a cold start", f"<p>Reasoning RL from the base model: {escape(results['no_cold_start'])}.</p>"),
        ("Cold start: what the filters kept", report.table(("reason", "responses"), sorted(results["funnel"].items()))),
        ("Samples in both modes", "".join(
            f"<pre>{escape(prompt)}<b>{escape(text)}</b></pre>" for prompt, text in results["samples"])),
    ]


def plots(out: Path, results: Mapping[str, Any]) -> dict[str, tuple[dict[str, list[report.Point]], str, str]]:
    """{name: (series, x axis, y axis)}"""
    def series(part: str, key: str, window: int = 5, kind: str = "train") -> list[report.Point]:
        points = [(r["step"], r[key]) for r in read_metrics(out / part) if r["kind"] == kind and key in r]
        return report.smooth(points, window)

    stages, budgets = results["stages"], results["budgets"]
    lengths = [level + 2 for level in LEVELS]
    by_length = {
        f"{stage}, {family}": list(zip(lengths, stages[stage][family]["by_level"]))
        for stage, family in (("cold start", "chain"), ("reasoning RL", "chain"), ("general RL", "chain/think"),
                              ("general RL", "chain/no_think"))
    }
    return {
        "reward": ({"on the mix": series("rl", "reward"), "held out": series("rl", "chain/reward", 1, "eval"),
                    "general RL": series("general", "reward")}, "step", "reward"),
        "budget": ({f"{int(level) + 2} numbers": list(zip(budgets["budgets"], curve))
                    for level, curve in budgets["by_level"].items()}, "thinking tokens allowed", "accuracy under /think"),
        "modes": (by_length, "numbers in the chain", "held-out reward"),
        "entropy": ({"reasoning RL": series("rl", "sampled_entropy"), "general RL": series("general", "sampled_entropy")},
                    "step", "entropy, nats per token"),
        "gap": ({"reasoning RL": series("rl", "max_gap", 1), "general RL": series("general", "max_gap", 1)},
                "step", "max |d log p|"),
        "level": ({"frontier": series("rl", "level/chain", 1), "groups kept": series("rl", "kept_groups")},
                  "step", "level; share"),
        "student": ({"on-policy distillation": series("on_policy", "reward"), "RL": series("student_rl", "reward")}, "step",
                    "student's reward"),
    }


def png(path: Path, series: Mapping[str, Sequence[report.Point]], x: str, y: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("matplotlib is not installed: pip install 'qwen3-kernels[train]'") from e
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.plot(*zip(*points), label=name, marker="o" if len(points) <= 40 else None, markersize=3) if points else None
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    tmp = path.with_name(f".{path.name}.tmp")
    figure.savefig(tmp, format="png", dpi=110)
    tmp.rename(path)
