"""The whole path on one GPU, in pieces that can be carried between machines: ``python -m training.recipes.evidence``.

S1 -> S2 -> S3 on real text, cold start, reasoning RL (several seeds), fusion, general RL over more than 20 families, and a
10M student by distillation beside the same student by RL; without a cold start as a control; dense or a mixture of 16
experts of the same active size. Each stage starts from the model of the one before, goes on where it was stopped, and leaves
``NAME.json``; one that is there is not done again. The data are those of `evidence_data`.

    python -m training.recipes.evidence --out runs/evidence --stage all --pack runs/evidence.tar
    python -m training.recipes.evidence --out runs/again --start runs/evidence.tar --stage rl --seed 1
    python -m training.recipes.evidence --out runs/evidence --report docs/RECIPE.md       # tables of what is there

``--tiny`` is the same on a CPU in minutes, with a model too small to learn much.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from qwen3_model import load as model_io
from qwen3_model.chat import parse
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from .. import environment, sft
from ..config import DTYPES, Config, to_json
from ..data.mixture import open_loader
from ..distill import distill, teacher_data
from ..files import write_json, write_jsonl
from ..filters import Candidate, Validation
from ..log import read_metrics
from ..pretrain import next_token_loss, set_up, train_step
from ..rewards import Family, Problem, Reply, find, mixed_seed
from ..rewards.families import GENERAL, NO_THINK, SCORERS, make
from ..rewards.workers import Pool
from ..rl import Episode, held_out, play, reinforce, summary
from ..rollout import Request
from ..static_rollout import roller_for
from . import cold_start, distill as distillation, fusion, general_rl, reasoning_rl, stage1, stage2, stage3, stages
from .evidence_data import LEFT_OUT
from .stages import Paths, Scale
from .worked import solution

NAMES = ("S1", "S2", "S3", "cold", "rl", "fusion", "general", "distill", "control")
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, dense (NVIDIA's data sheet)
FAMILIES = tuple(n for n in GENERAL if n not in LEFT_OUT)
MODED = tuple(n for n in FAMILIES if n != "python_tool" and not n.endswith(NO_THINK))  # those asked for in both modes
PARTS = 15 << 20  # bytes of a part of a pack


@dataclass(frozen=True)
class Sizes:
    """All that differs between a GPU and ``--tiny``."""

    dense: Scale
    moe: Scale
    student: Scale
    minutes: Mapping[str, float]  # of training, by stage; distill: of its four parts together
    cold_rows: int = 10_000
    cold_steps: int = 150
    rows: int = 64  # conversations per step of fine-tuning
    fusion_rows: int = 4000  # of each kind
    fusion_steps: int = 150
    off_rows: int = 12_000  # of the teacher's replies
    off_steps: int = 250
    groups: int = 64
    group_size: int = 16
    slots: int = 1024
    max_prompt: int = 512
    max_tokens: int = 256
    eval_problems: int = 64  # per family and mode
    pass_k: int = 16
    sft_lr: float = 1e-3
    rl_lr: float = 1e-4
    rl_steps: int = 1000  # at most: minutes end a run
    tokens_per_pack: int = 65_536
    budgets: tuple[int, ...] = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192)


WIDTHS = {"seq_len": 4096, "batch_tokens": 1 << 17, "lr": 5e-3, "warmup": 60, "initializer_range": 0.04, "optimizer": "muon",
          "max_epochs": 12.0, "eval_tokens": 4096, "tokens": (0.0, 0.0, 0.0), "head_dim": 128}
H100 = Sizes(
    dense=Scale(hidden_size=512, layers=9, heads=4, kv_heads=2, intermediate_size=1536, **WIDTHS),
    moe=Scale(hidden_size=512, layers=9, heads=4, kv_heads=2, intermediate_size=1536, experts=16, experts_per_token=2,
              expert_width=768, **WIDTHS),
    student=Scale(hidden_size=256, layers=10, heads=2, kv_heads=1, intermediate_size=768, **(WIDTHS | {"batch_tokens": 1 << 18})),
    minutes={"S1": 2.0, "S2": 1.0, "S3": 1.0, "cold": 0.5, "rl": 3.0, "fusion": 0.5, "general": 2.0, "distill": 3.2, "control": 0.3},
)
SMALL = {"seq_len": 256, "batch_tokens": 2048, "lr": 1.5e-2, "warmup": 5, "initializer_range": 0.08, "optimizer": "muon",
         "max_epochs": 12.0, "eval_tokens": 256, "tokens": (0.0, 0.0, 0.0), "head_dim": 32}
TINY = Sizes(
    dense=Scale(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=192, **SMALL),
    moe=Scale(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=192, experts=8, experts_per_token=2,
              expert_width=96, **SMALL),
    student=Scale(hidden_size=32, layers=2, heads=1, kv_heads=1, intermediate_size=96, **SMALL),
    minutes={"S1": 0.4, "S2": 0.1, "S3": 0.1, "cold": 0.2, "rl": 0.2, "fusion": 0.1, "general": 0.2, "distill": 0.4, "control": 0.1},
    cold_rows=300, cold_steps=20, rows=8, fusion_rows=20, fusion_steps=3, off_rows=60, off_steps=4, groups=4, group_size=4,
    slots=64, max_tokens=96, eval_problems=1, pass_k=2, sft_lr=2e-3, rl_lr=2e-4, rl_steps=3, tokens_per_pack=8192,
    budgets=(0, 16),
)


@dataclass(frozen=True)
class Evidence:
    """Options of the command line."""

    out: Path
    stage: Literal["S1", "S2", "S3", "cold", "rl", "fusion", "general", "distill", "control", "all"] = "all"
    model: Literal["dense", "moe"] = "dense"
    seed: int = 0  # of rl; what follows rl is of seed 0
    minutes: float = 0.0  # of training in the stage, or in all of them; 0: as in Sizes
    data: Path = Path(".evidence/data.tar.xz")
    start: Path | None = None  # a pack to go on from
    pack: Path | None = None  # writes NAME.00, NAME.01, ...: results, metrics, and the models of ``keep``
    keep: tuple[str, ...] = ()  # stages whose models go into the pack
    report: Path | None = None  # only writes the tables of what is in ``out``
    tiny: bool = False
    workers: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.seed < 0 or self.minutes < 0 or self.workers < 1:
            raise ValueError(f"seed {self.seed}, minutes {self.minutes}, workers {self.workers}: expected none negative, and a worker")


# ---- what is played ----------------------------------------------------------------------------------------------------


class Bench:
    """Families with one pool of scorers for the whole process, and the held-out problems."""

    def __init__(self, sizes: Sizes, workers: int):
        self.sizes, self.pool, self._kept = sizes, Pool(SCORERS, workers=workers, deadline=5.0), {}
        self.options = {"max_tokens": sizes.max_tokens, "max_prompt": sizes.max_prompt, "slots": sizes.slots}

    def families(self, names: Sequence[str]) -> dict[str, Family]:
        return make(names, self.pool)

    def problems(self, names: Sequence[str], count: int) -> list[Problem]:
        """Held out, of the first level."""
        found = []
        for name in names:
            if (name, count) not in self._kept:
                self._kept[name, count] = held_out(self.families([name]), 0, count)
            found += self._kept[name, count]
        return found

    def measure(self, folder: Path, names: Sequence[str], device: str, *, repeats: int = 1, count: int = 0) -> dict[str, Any]:
        """By family: means over one sample of each held-out problem, or over ``repeats``, with pass@repeats."""
        model, tok = opened(folder, device)
        families = self.families(names)
        episodes = play(model, tok, families, self.problems(names, count or self.sizes.eval_problems), repeats=repeats,
                        seed=mixed_seed("measure"), **self.options)
        own: dict[str, list[Episode]] = {name: [] for name in names}
        for e in episodes:
            own[e.problem.family].append(e)
        return {name: summary(part) | {"count": len(part)} | (at_k(part) if repeats > 1 else {}) for name, part in own.items()}


def at_k(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of problems that one of the samples got right."""
    groups: dict[int, bool] = {}
    for e in episodes:
        groups[e.group] = groups.get(e.group, False) or e.reward >= 0.5
    return {"pass_at_k": statistics.fmean(groups.values())}


def opened(folder: Path, device: str) -> tuple[Qwen3, Tokenizer]:
    return model_io.load(folder, device=device), Tokenizer.from_file(folder / "tokenizer.json")


def budget_curve(bench: Bench, folder: Path, names: Sequence[str], device: str) -> dict[str, Any]:
    """Mean reward when the thinking is cut after B tokens and ``</think>`` is put in its place (figure 2 of the report);
    at each budget the same samples, cut."""
    (model, tok), families, sizes = opened(folder, device), bench.families(names), bench.sizes
    whole = play(model, tok, families, bench.problems(names, sizes.eval_problems), repeats=1, seed=mixed_seed("budget"), **bench.options)
    begins, ends = len(tok.encode("<think>\n")), tok.encode("\n</think>\n\n")
    curve, lengths = [], [e.thinking_tokens for e in whole]
    for budget in sizes.budgets:
        at, cut = begins + budget, []
        for e in whole:
            ids = e.turns[0]
            if tok.end_think_id not in ids[: at + 1] and len(ids) > at:
                cut.append((e, [*ids[:at], *ends]))
        roller = roller_for(
            model, slots=sizes.slots, max_len=min(sizes.max_prompt + sizes.max_tokens, model.config.max_position_embeddings),
            temperature=1.0, stop_ids=tok.stop_ids, record_experts=False)
        asked = [
            Request(i, [*e.tokens[: e.prompt], *ids], mixed_seed("budget", budget, i),
                    max(1, min(48, roller.max_len - e.prompt - len(ids)))) for i, (e, ids) in enumerate(cut)
        ]
        rewards = {id(e): e.reward for e in whole}
        replies: dict[str, list[tuple[Episode, Reply]]] = {}
        for (e, ids), r in zip(cut, roller.run(asked)):
            rewards[id(e)] = 0.0
            if r.finish_reason == "stop":
                parsed = parse([*ids, *r.ids], tok)
                replies.setdefault(e.problem.family, []).append((e, Reply((parsed.message(),), parsed.content, parsed.thinking)))
        for name, part in replies.items():
            for (e, _), score in zip(part, families[name].scores([(e.problem, reply) for e, reply in part])):
                rewards[id(e)] = score
        curve.append({"budget": budget, "reward": statistics.fmean(rewards.values()), "cut": len(cut) / len(whole)})
    return {"curve": curve, "whole": statistics.fmean(e.reward for e in whole), "thinking_tokens": statistics.fmean(lengths),
            "families": list(names), "count": len(whole)}


# ---- the stages ----------------------------------------------------------------------------------------------------------


class Path_:
    """One model's way through the stages: folders, what is done, and how each stage is run."""

    def __init__(self, e: Evidence, bench: Bench, console: Console):
        self.e, self.bench, self.console, self.sizes = e, bench, console, bench.sizes
        self.root = e.out / e.model
        found = Config(Path(), Path(), device=e.device, dtype="float32" if e.tiny else "auto").resolved()
        self.device, self.dtype = found.device, found.dtype
        self.scale: Scale = getattr(self.sizes, e.model)
        self.shards, self.tokenizer = unpacked(e.data, e.out)

    def run(self, name: str, minutes: float) -> None:
        """A stage, unless its result is there."""
        done = self.root / f"{self.key(name)}.json"
        if done.exists():
            self.console.print(f"{name}: done before")
            return
        self.console.rule(f"{self.e.model} {name}", align="left")
        start = time.perf_counter()
        result = getattr(self, f"do_{name.lower()}")(minutes)
        gc.collect()  # graphs and their memory
        result |= {"seconds": time.perf_counter() - start, "minutes": minutes, "seed": self.e.seed, "device": environment.device_name(self.device)}
        write_json(done, result)
        self.console.print(f"{name}: {result['seconds']:.0f} s; {shown(result)}", markup=False)

    def key(self, name: str) -> str:
        return f"rl-{self.e.seed}" if name == "rl" else name.lower()

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / f"{name}.json").read_text())

    def model(self, name: str) -> Path:
        folder = self.root / name / "model"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; run stage {name.split('-')[0]} first, or --start from a pack that keeps it")
        return folder

    # -- pre-training --

    def pretrain(self, name: str, stage: Callable[[Scale], Any], scale: Scale, init: Path | None, minutes: float) -> dict[str, Any]:
        s = replace(stage(scale), name=name)
        paths = Paths(self.shards, self.tokenizer, self.root / name, init)
        plan = paths.out / "plan.json"
        if not plan.exists():
            write_json(plan, self.planned(s, scale, paths, minutes))
        planned = json.loads(plan.read_text())
        s = replace(s, tokens=planned["tokens"])
        found = stages.run(s, scale, paths, seed=0, device=self.device, quiet=True)
        speeds = [r["tokens_per_s"] for r in read_metrics(paths.out / "train") if r["kind"] == "speed"]
        rate = statistics.median(speeds[1:] or speeds)
        losses = [(r["step"], r["loss"]) for r in read_metrics(paths.out / "train") if r["kind"] == "train"]
        return {
            **{k: found[k] for k in ("held_out", "parameters", "active", "steps", "mixture")},
            **{k: found[k] for k in ("probes", "held_out before") if k in found},
            "tokens": s.tokens, "seq_len": s.seq_len, "tokens_per_s": rate, "mfu": rate * planned["flops"] / PEAK,
            "flops_per_token": planned["flops"], "losses": thinned(losses),
            "skipped": sum(r["kind"] == "skipped" for r in read_metrics(paths.out / "train")),
        }

    def planned(self, s: Any, scale: Scale, paths: Paths, minutes: float, steps: int = 12) -> dict[str, float]:
        """Tokens that fit into the minutes, from the speed of a few steps, and the work of a token."""
        s = replace(s, tokens=1e9)
        speed = replace(paths, out=paths.out / "speed")
        stages.mixture(s, speed, scale.max_epochs)[0].write(speed.out / "mixture.json")
        config = stages.config_of(s, scale, speed, seed=0, device=self.device).resolved()
        config = replace(config, dtype=self.dtype)
        tok = Tokenizer.from_file(self.tokenizer)
        model_config = Qwen3Config.from_file(paths.init) if paths.init else scale.model(tok.vocab_size, tok.token_id("<|endoftext|>"))
        model_config = replace(model_config, max_position_embeddings=max(model_config.max_position_embeddings, s.seq_len), rope_theta=s.rope_theta)
        model, optimizer = set_up(config, model_config, None)
        loader = open_loader(config.data, seq_len=config.seq_len, rows=config.rows, seed=0)
        loss_fn = stages.moe_loss if model_config.num_experts else next_token_loss
        batches = [loader.batch(i) for i in range(steps)]
        times = []
        for batch in batches:
            start = time.perf_counter()
            loss, _, _ = train_step(model, optimizer, [batch], loss_fn, lr=1e-5, max_grad_norm=1.0)
            loss.item()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[steps // 2 :])
        lengths = torch.cat([b.cu_seqlens.diff() for b in batches]).double()
        per_token = flops(model_config, (lengths**2).sum().item() / lengths.sum().item())
        tokens = max(20, int(0.95 * 60 * minutes / seconds)) * s.batch_tokens
        self.console.print(f"{s.name}: {s.batch_tokens / seconds:,.0f} tokens/s at first; {tokens:,} tokens planned")
        return {"tokens": float(tokens), "flops": per_token}

    def do_s1(self, minutes: float) -> dict[str, Any]:
        return self.pretrain("s1", stage1.stage, self.scale, None, minutes)

    def do_s2(self, minutes: float) -> dict[str, Any]:
        return self.pretrain("s2", stage2.stage, self.scale, self.model("s1"), minutes)

    def do_s3(self, minutes: float) -> dict[str, Any]:
        found = self.pretrain("s3", stage3.stage, self.scale, self.model("s2"), minutes)
        return found | {"without_think": self.base_skill(self.model("s3"))}

    def base_skill(self, folder: Path) -> float:
        """Share of right formats of the base model, which has seen no think block: what a cold start is for."""
        found = self.bench.measure(folder, MODED, self.device, count=max(1, self.sizes.eval_problems // 4))
        return statistics.fmean(r["format"] for r in found.values())

    # -- post-training --

    @cached_property
    def common(self) -> dict[str, Any]:
        z = self.sizes
        return {"device": self.device, "dtype": self.dtype, "log_every": 10, "save_every": 100, "keep": 1, "tensorboard": False,
                "tokens_per_pack": z.tokens_per_pack}

    def tune(self, start: Path, data: Path, out: str, steps: int, make_recipe: Callable[..., Any], minutes: float, lr: float) -> dict[str, Any]:
        config = make_recipe(start, data, self.root / out, **(self.common | {
            "steps": steps, "rows": self.sizes.rows, "lr": lr, "schedule": "cosine", "warmup": max(1, steps // 10), "seed": 0,
            "max_tokens": self.sizes.max_prompt + self.sizes.max_tokens, "max_minutes": minutes}))
        sft.fine_tune(config, quiet=True)
        records = [r for r in read_metrics(self.root / out) if r["kind"] == "train"]
        return {"steps": len(records), "losses": thinned([(r["step"], r["loss"]) for r in records])}

    def do_cold(self, minutes: float) -> dict[str, Any]:
        data, funnel = self.root / "cold.jsonl", {}
        if not data.exists():
            talks, funnel = cold_talks(self.bench, self.sizes.cold_rows)
            write_jsonl(data, talks)
            write_json(self.root / "funnel.json", funnel)
        found = self.tune(self.model("s3"), data, "cold", self.sizes.cold_steps, cold_start.recipe, minutes, self.sizes.sft_lr)
        measured = self.bench.measure(self.model("cold"), thinking(FAMILIES), self.device, repeats=4)
        return found | {"funnel": json.loads((self.root / "funnel.json").read_text()), "think": measured}

    def learnable(self, low: float = 0.1, high: float = 0.9, most: int = 10) -> list[str]:
        """Families with a rule whose pass rate after the cold start leaves something to learn: those nearest to a half."""
        rates = {n: r["pass_rate"] for n, r in self.result("cold")["think"].items() if n.startswith("gym/") or n in ("linear_equation", "grounding")}
        inside = sorted((n for n, p in rates.items() if low <= p <= high), key=lambda n: abs(rates[n] - 0.5))
        return inside[:most] or sorted(rates, key=lambda n: abs(rates[n] - 0.5))[:3]

    def reinforced(self, make_recipe: Callable[..., Any], start: Path, out: str, names: Sequence[str], minutes: float, **changes: Any) -> dict[str, Any]:
        z = self.sizes
        config = make_recipe(start, self.root / out, **(self.common | {
            "families": tuple(names), "steps": z.rl_steps, "groups": z.groups, "group_size": z.group_size, "mini_batches": 2,
            "lr": z.rl_lr, "max_tokens": z.max_tokens, "max_prompt": z.max_prompt, "slots": z.slots, "entropy_band": (0.02, 1.0),
            "raise_at": 0.8, "eval_every": 10, "eval_problems": max(1, z.eval_problems // 4), "seed": self.e.seed, "workers": 1,
            "pass_band": (0.0, 1.0) if self.e.tiny else (0.03, 0.97), "probe_groups": z.groups, "max_minutes": minutes,
        } | changes))
        reinforce(config, families=self.bench.families(names), quiet=True)
        return self.curves(out) | {"families": list(names)}

    def curves(self, out: str) -> dict[str, Any]:
        records = read_metrics(self.root / out)
        steps = [r for r in records if r["kind"] == "train"]
        speed = [r for r in records if r["kind"] == "speed"]
        held = [(r["step"], statistics.fmean(v for k, v in r.items() if k.endswith("/reward"))) for r in records if r["kind"] == "eval"]

        def median(name: str) -> float:
            values = [r[name] for r in speed if name in r]
            return statistics.median(values[1:] or values)  # the first one compiles

        return {
            "steps": len(steps), "held_out_curve": held,
            **{f"{k}_curve": thinned([(r["step"], r[k]) for r in steps if k in r]) for k in ("reward", "sampled_entropy", "length", "kept_groups")},
            "max_gap": max((r["max_gap"] for r in steps if "max_gap" in r), default=0.0),
            **{name: median(name) for name in ("rollouts_per_s", "sampled_tokens_per_s") if any(name in r for r in speed)},
            "seconds_per_step": median("seconds"), "training_seconds": sum(r.get("seconds", 0.0) for r in speed),
        }

    def do_rl(self, minutes: float) -> dict[str, Any]:
        names, out = self.learnable(), f"rl-{self.e.seed}"
        found = self.reinforced(reasoning_rl.recipe, self.model("cold"), out, names, minutes)
        cold = self.result("cold")["think"]
        after = self.bench.measure(self.model(out), thinking(FAMILIES), self.device, repeats=4)
        return found | {"think": after, "before": mean(cold, names), "after": mean(after, names)}

    def do_fusion(self, minutes: float) -> dict[str, Any]:
        data, start, z = self.root / "fusion.jsonl", self.model("rl-0"), self.sizes
        if not data.exists():
            model, tok = opened(start, self.device)
            plain, families = [n for n in MODED if not n.startswith("instructions")], self.bench.families(FAMILIES)
            problems = drawn(families, [*plain, "instructions"], z.fusion_rows, "fusion")
            talks = teacher_data(model, tok, families, problems, seed=mixed_seed("fusion"), **self.bench.options)
            direct = [[*p.messages, {"role": "assistant", "content": answer}] for p in drawn(families, MODED, z.fusion_rows, "direct")
                      if (answer := direct_answer(p))]
            tools = [{"messages": [*p.messages, *solution(p)], "tools": list(p.tools)}
                     for p in drawn(families, ["python_tool"], z.fusion_rows // 20 + 1, "tools")]
            records = [{"messages": c} for c in fusion.conversations(talks, direct, 0)] + tools
            random.Random(0).shuffle(records)
            write_jsonl(data, records)
        found = self.tune(start, data, "fusion", z.fusion_steps, fusion.recipe, minutes, z.sft_lr / 2)
        return found | self.both_modes("fusion")

    def both_modes(self, name: str) -> dict[str, Any]:
        folder = self.model(name)
        return {"think": self.bench.measure(folder, thinking(FAMILIES), self.device, repeats=2),
                "no_think": self.bench.measure(folder, direct_modes(FAMILIES), self.device, repeats=2)}

    def do_general(self, minutes: float) -> dict[str, Any]:
        names = [*FAMILIES, *(f"{n}{NO_THINK}" for n in self.learnable(most=6))]
        shares = tuple(0.3 if n == "python_tool" else 1.0 for n in names)  # the tool really runs, which takes its time
        found = self.reinforced(general_rl.recipe, self.model("fusion"), "general", names, minutes, shares=shares,
                                lr=self.sizes.rl_lr / 2, entropy_band=(0.02, 1.5), eval_every=0)
        found |= self.both_modes("general")
        names = [n for n in self.learnable()]
        found["budget"] = budget_curve(self.bench, self.model("general"), names, self.device)
        found["budget"]["no_think"] = mean(found["no_think"], [f"{n}{NO_THINK}" for n in names])
        return found

    def do_distill(self, minutes: float) -> dict[str, Any]:
        """A quarter of the minutes each: the student's base, on-policy distillation, RL; off-policy in its steps."""
        z, teacher, quarter = self.sizes, self.model("general"), minutes / 4
        base = self.pretrain("student", lambda s: replace(stage2.stage(s), lr_end=0.05, warmup=s.warmup), z.student, None, 1.5 * quarter)
        names = self.learnable()
        both = [*names, *(f"{n}{NO_THINK}" for n in names)]
        data = self.root / "off.jsonl"
        families = self.bench.families(both)
        if not data.exists():
            model, tok = opened(teacher, self.device)
            problems = drawn(families, both, z.off_rows, "off")
            talks = teacher_data(model, tok, families, problems, seed=mixed_seed("off"), right_only=False, **self.bench.options)
            sft.write(data, talks or [[*p.messages, {"role": "assistant", "content": direct_answer(p)}] for p in problems if not p.thinking])
            del model
        results: dict[str, Any] = {"base": base, "families": names, "pass_k": z.pass_k}
        results["off_policy"] = self.tune(self.root / "student" / "model", data, "off_policy", z.off_steps, distillation.off_policy,
                                          0.5 * quarter, z.sft_lr)
        off = self.model("off_policy")
        config = distillation.on_policy(teacher, off, self.root / "on_policy", **(self.common | {
            "families": tuple(both), "steps": z.rl_steps, "groups": z.groups * z.group_size // 4, "group_size": 1, "lr": 3 * z.rl_lr,
            "max_tokens": z.max_tokens, "max_prompt": z.max_prompt, "slots": z.slots, "seed": 0, "workers": 1, "mini_batches": 1,
            "max_minutes": quarter}))
        distill(config, families=families, quiet=True)
        results["on_policy"] = self.curves("on_policy")
        results["student_rl"] = self.reinforced(reasoning_rl.recipe, off, "student_rl", both, quarter, pass_band=(0.0, 1.0), eval_every=0)
        for name in ("off_policy", "on_policy", "student_rl"):
            results[name] |= {"measured": self.bench.measure(self.model(name), both, self.device, repeats=z.pass_k,
                                                             count=max(1, z.eval_problems // 2))}
        results["teacher"] = self.bench.measure(teacher, both, self.device, repeats=z.pass_k, count=max(1, z.eval_problems // 2))
        return results

    def do_control(self, minutes: float) -> dict[str, Any]:
        """RL without a cold start: what the guard says, and what happens when it is told to go on."""
        names = self.learnable()
        try:
            self.reinforced(reasoning_rl.recipe, self.model("s3"), "refused", names, 0.01, pass_band=(0.03, 0.97), eval_every=0, steps=1)
            said = "it started"
        except RuntimeError as error:
            said = str(error)
        found = self.reinforced(reasoning_rl.recipe, self.model("s3"), "control", names, minutes, pass_band=(0.0, 1.0), eval_every=0)
        after = self.bench.measure(self.model("control"), names, self.device)
        return found | {"refusal": said, "think": after, "after": mean(after, names)}


# ---- data of the stages ------------------------------------------------------------------------------------------------


def thinking(names: Sequence[str]) -> list[str]:
    return [n for n in names if not n.endswith(NO_THINK)]


def direct_modes(names: Sequence[str]) -> list[str]:
    return [f"{n}{NO_THINK}" for n in names if n in MODED]


def mean(measured: Mapping[str, Mapping[str, float]], names: Sequence[str], key: str = "reward") -> float:
    return statistics.fmean(measured[n][key] for n in names)


def drawn(families: Mapping[str, Family], names: Sequence[str], count: int, purpose: str) -> list[Problem]:
    """For training, three quarters of them of the first level."""
    rng = random.Random(purpose)
    found = []
    for i in range(count):
        family = families[names[i % len(names)]]
        level = rng.choice((0, 0, 0, min(1, family.max_level)))
        found.append(find(family, mixed_seed(purpose, i), level))
    return found


def direct_answer(problem: Problem) -> str | None:
    """The answer alone."""
    turns = solution(problem)
    if turns is None:
        return str(problem.data["answer"]) if "answer" in problem.data else None
    return turns[-1]["content"]


def cold_talks(bench: Bench, count: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Conversations with worked thinking: of responses, some spoilt on purpose, what passes the filters; tool use and
    instructions as they are."""
    rng, families = random.Random(1), bench.families(FAMILIES)
    problems = drawn(families, thinking(FAMILIES), count, "cold")
    candidates, talks = [], []
    for p in problems:
        turns = solution(p)
        if turns is None:
            continue
        if len(turns) > 1 or p.family == "instructions":
            talks.append({"messages": [*p.messages, *turns]} | ({"tools": list(p.tools)} if p.tools else {}))
            continue
        query, thought, answer = p.messages[-1]["content"], turns[0]["reasoning_content"], turns[0]["content"]
        candidates.append(Candidate(query, thought, answer, True))
        if rng.random() < 0.3:
            candidates.append(spoilt(query, thought, answer, rng))
    kept, funnel = cold_start.conversations(candidates, Validation(()), min_thinking=4)
    talks += [{"messages": c} for c in kept]
    rng.shuffle(talks)
    return talks, dict(funnel)


def spoilt(query: str, thought: str, answer: str, rng: random.Random) -> Candidate:
    kind = rng.choice(("wrong", "repetitive", "guess", "mixed"))
    if kind == "wrong":
        return Candidate(query, thought, answer + "0", False)
    said = {"repetitive": thought + f" {thought}" * (2 + 400 // max(1, len(thought))), "guess": "?", "mixed": thought + "所以答案是这个"}
    return Candidate(query, said[kind], answer, True)


# ---- numbers -----------------------------------------------------------------------------------------------------------


def flops(c: Qwen3Config, visible: float) -> float:
    """Of a training step per token: 6 per active parameter (the tied head's once, the embedding's look-up none), and
    attention over documents whose mean squared length over their mean length is ``visible``, causal."""
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * visible
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return 6 * (c.num_params(active=True) - embedding) + attention


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    return [tuple(p) for p in points[:: max(1, len(points) // most)]]


def shown(result: Mapping[str, Any]) -> str:
    """A line about a result."""
    parts = []
    if "tokens_per_s" in result:
        parts.append(f"{result['tokens']:,.0f} tokens, {result['tokens_per_s']:,.0f}/s, MFU {100 * result['mfu']:.1f} %, "
                     f"held-out loss {result['held_out']['loss']:.3f}")
    if "rollouts_per_s" in result:
        parts.append(f"{result['steps']} steps, {result['rollouts_per_s']:,.0f} rollouts/s, {result['sampled_tokens_per_s']:,.0f} tokens/s sampled")
    for name in ("think", "no_think"):
        if name in result:
            parts.append(f"{name} {mean(result[name], list(result[name])):.3f}")
    if "before" in result:
        parts.append(f"its families {result['before']:.3f} to {result['after']:.3f}")
    if "refusal" in result:
        parts.append(result["refusal"])
    if "off_policy" in result:
        parts.append(", ".join(f"{n} {mean(result[n]['measured'], list(result[n]['measured'])):.3f}" for n in ("off_policy", "on_policy", "student_rl")))
    return "; ".join(parts)


# ---- packs -------------------------------------------------------------------------------------------------------------


def unpacked(data: Path, out: Path) -> tuple[Path, Path]:
    """(shards, tokenizer.json) of the archive, once."""
    folder = out / "data"
    if not (folder / "tokenizer.json").exists():
        tmp = out / f".data.{os.getpid()}.tmp"
        with tarfile.open(data, "r:*") as tar:
            tar.extractall(tmp, filter="data")
        tmp.rename(folder)
    return folder / "shards", folder / "tokenizer.json"


def pack(out: Path, file: Path, keep: Sequence[str], part: int = PARTS) -> list[Path]:
    """Results, metrics and configs, and the models of the stages in ``keep``, as one xz archive in parts."""
    wanted = [p for p in sorted(out.rglob("*")) if p.is_file() and "checkpoints" not in p.parts and ".tmp" not in str(p)
              and p.relative_to(out).parts[0] != "data" and "speed" not in p.parts]
    wanted = [p for p in wanted if p.name in ("metrics.jsonl", "run.json", "plan.json", "result.json") or p.suffix == ".json" and len(p.relative_to(out).parts) == 2
              or ("model" in p.parts and p.relative_to(out).parts[1] in keep)]
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.tmp")
    with tarfile.open(whole, "w:xz", preset=1) as tar:
        for p in wanted:
            tar.add(p, p.relative_to(out))
    for old in parts_of(file):
        old.unlink()
    found = []
    with open(whole, "rb") as f:
        while chunk := f.read(part):
            found.append(file.with_name(f"{file.name}.{len(found):02d}"))
            found[-1].write_bytes(chunk)
    whole.unlink()
    return found


def parts_of(file: Path) -> list[Path]:
    return sorted(p for p in file.parent.glob(f"{file.name}.*") if p.suffix[1:].isdigit())


def unpack(file: Path, out: Path) -> None:
    """The opposite of `pack`. What is in ``out`` already stays."""
    parts = [file] if file.exists() else parts_of(file)
    if not parts:
        raise FileNotFoundError(f"{file} does not exist, nor {file}.00; expected what --pack wrote")
    whole = out / f".start.{os.getpid()}.tmp"
    out.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(b"".join(p.read_bytes() for p in parts))
    with tarfile.open(whole, "r:xz") as tar:
        for member in tar:
            if not (out / member.name).exists():
                tar.extract(member, out, filter="data")
    whole.unlink()


# ---- the command line --------------------------------------------------------------------------------------------------


def order(e: Evidence) -> list[str]:
    return [*NAMES] if e.stage == "all" else [e.stage]


def run(e: Evidence, *, quiet: bool = False) -> None:
    """What the options say. Raises ValueError, FileNotFoundError (a stage before is missing) and what the stages raise."""
    if e.report is not None:
        from .evidence_report import write

        write(e.out, e.report)
        return
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if e.start is not None:
        unpack(e.start, e.out)
    e.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if e.tiny else H100
    if e.tiny:
        torch.set_num_threads(1)
    with playing(Bench(sizes, e.workers)) as bench:
        path, names = Path_(e, bench, console), order(e)
        whole = sum(sizes.minutes[n] for n in names)
        for name in names:
            path.run(name, e.minutes * sizes.minutes[name] / whole if e.minutes else sizes.minutes[name])
        write_json(path.root / "environment.json", environment.describe(path.device, DTYPES[path.dtype]) | {"options": to_json(e)})
    if e.pack is not None:
        for part in pack(e.out, e.pack, e.keep):
            console.print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB", markup=False)


@contextmanager
def playing(bench: Bench) -> Iterator[Bench]:
    try:
        yield bench
    finally:
        bench.pool.close()


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as error:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from error
    try:
        run(tyro.cli(Evidence, args=args, prog="python -m training.recipes.evidence", description=__doc__))
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
