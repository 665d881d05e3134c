"""The whole path on one GPU, in pieces that can be carried between machines: ``python -m training.recipes.evidence``.

S1 -> S2 -> S3 on real text, cold start, reasoning RL (several seeds), fusion, general RL over more than 20 families, and a
10M student by distillation beside the same student by RL; without a cold start as a control; dense or a mixture of 16
experts of the same active size. Each stage starts from the model of the one before, goes on where it was stopped, and leaves
``NAME.json``; one that is there is not done again. The data are those of `evidence_data`.

    python -m training.recipes.evidence --out runs/evidence --stage all --pack runs/evidence.tar
    python -m training.recipes.evidence --out runs/again --start runs/evidence.tar --stage rl --seed 1
    python -m training.recipes.evidence --out runs/evidence --report docs/RECIPE.md       # tables of what is there

One GPU's 25 minutes are these, in seconds with evaluation, by what each stage took beside its training on an H100:

    dense: S1 147, S2 80, S3 78, cold 54, rl 132 + 128 + 126 (--seed 0, 1, 2), fusion 40, general 125, distill 182, control 18
    mixture (--model moe): S1 159, S2 87, S3 92

which is 24.1 minutes; starting a process comes on top, so stages run in one where they can: ``--stage all`` is the dense
column with seed 0, and seeds 1 and 2 and the mixture's three stages are commands of their own.

``--tiny`` is the same in minutes, on a CPU, too, with a model too small to learn much.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from qwen3_model.config import Qwen3Config
from qwen3_model.tokenizer import Tokenizer

from .. import environment, sft
from ..config import DTYPES, Config, to_json
from ..data.mixture import open_loader
from ..distill import distill, teacher_data
from ..files import write_json, write_jsonl
from ..log import read_metrics
from ..moe import MoELoss
from ..pretrain import next_token_loss, set_up, train_step
from ..rewards import mixed_seed
from ..rewards.families import NO_THINK
from ..rl import reinforce
from . import cold_start, distill as distillation, fusion, general_rl, reasoning_rl, stage1, stage2, stage3, stages
from .clock import Clock
from .evidence_bench import (
    FAMILIES, MODED, Bench, budget_curve, cold_talks, direct_answer, direct_modes, drawn, mean, thinking,
)
from .evidence_pack import pack, unpack, unpacked
from .path import opened
from .stages import Paths, Scale
from .worked import solution

NAMES = ("S1", "S2", "S3", "cold", "rl", "fusion", "general", "distill", "control")
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, dense (NVIDIA's data sheet)


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
    student=Scale(hidden_size=256, layers=10, heads=2, kv_heads=1, intermediate_size=768,
                  **(WIDTHS | {"batch_tokens": 1 << 18})),
    minutes={"S1": 2.0, "S2": 1.0, "S3": 1.0, "cold": 0.5, "rl": 1.5, "fusion": 0.5, "general": 1.55, "distill": 2.8,
             "control": 0.3},
)
SMALL = {"seq_len": 256, "batch_tokens": 2048, "lr": 1.5e-2, "warmup": 5, "initializer_range": 0.08, "optimizer": "muon",
         "max_epochs": 12.0, "eval_tokens": 256, "tokens": (0.0, 0.0, 0.0), "head_dim": 32}
TINY = Sizes(
    dense=Scale(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=192, **SMALL),
    moe=Scale(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=192, experts=8, experts_per_token=2,
              expert_width=96, **SMALL),
    student=Scale(hidden_size=32, layers=2, heads=1, kv_heads=1, intermediate_size=96, **SMALL),
    minutes={"S1": 0.4, "S2": 0.1, "S3": 0.1, "cold": 0.2, "rl": 0.2, "fusion": 0.1, "general": 0.2, "distill": 0.4,
             "control": 0.1},
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
            raise ValueError(
                f"seed is {self.seed}, minutes {self.minutes}, workers {self.workers}; expected none negative, and a worker")


# ---- the stages ----------------------------------------------------------------------------------------------------------


class Course:
    """One model's way through the stages: folders, what is done, and how each stage is run."""

    def __init__(self, e: Evidence, bench: Bench, console: Console):
        self.e, self.bench, self.console, self.quiet, self.sizes = e, bench, console, console.quiet, bench.sizes
        self.root = e.out / e.model
        found = Config(Path(), Path(), device=e.device).resolved()
        self.device, self.dtype = found.device, "float32" if found.device == "cpu" else found.dtype
        self.scale: Scale = getattr(self.sizes, e.model)
        self.shards, self.tokenizer = unpacked(e.data, e.out)

    def run(self, name: str, minutes: float) -> None:
        """A stage, unless its result is there."""
        done = self.root / f"{self.key(name)}.json"
        if done.exists():
            self.console.print(f"{name}: done before")
            return
        self.console.rule(f"{self.e.model} {name}", align="left")
        key = self.key(name)
        clock = Clock(self.root / "seconds" / f"{key}.json", self.console)  # goes on in a process that resumes
        with clock(key, heading=False):
            result = getattr(self, f"do_{name.lower()}")(minutes)
        gc.collect()  # graphs and their memory
        result |= {"seconds": clock.seconds[key][0], "minutes": minutes, "seed": self.e.seed,
                   "device": environment.device_name(self.device), "torch": torch.__version__,
                   "commit": environment.commit(), "date": date.today().isoformat()}
        write_json(done, result)
        self.console.print(f"{name}: {result['seconds']:.0f} s; {shown(result)}", markup=False)

    def key(self, name: str) -> str:
        return f"rl-{self.e.seed}" if name == "rl" else name.lower()

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / f"{name}.json").read_text())

    def model(self, name: str) -> Path:
        folder = self.root / name / "model"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist; run stage {name.split('-')[0]} first, or --start from a pack that keeps it")
        return folder

    # -- pre-training --

    def pretrain(
        self, name: str, stage: Callable[[Scale], Any], scale: Scale, init: Path | None, minutes: float,
    ) -> dict[str, Any]:
        s = replace(stage(scale), name=name)
        paths = Paths(self.shards, self.tokenizer, self.root / name, init)
        plan = paths.out / "plan.json"
        if not plan.exists():
            write_json(plan, self.planned(s, scale, paths, minutes))
        planned = json.loads(plan.read_text())
        s = replace(s, tokens=planned["tokens"])
        found = stages.run(s, scale, paths, seed=0, device=self.device, quiet=self.quiet)
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
        base = Qwen3Config.from_file(paths.init) if paths.init else scale.model(tok.vocab_size, tok.token_id("<|endoftext|>"))
        positions = max(base.max_position_embeddings, s.seq_len)
        model_config = replace(base, max_position_embeddings=positions, rope_theta=s.rope_theta)
        model, optimizer = set_up(config, model_config, None)
        loader = open_loader(config.data, seq_len=config.seq_len, rows=config.rows, seed=0)
        loss_fn = MoELoss(router_z_loss=config.router_z_loss) if model_config.num_experts else next_token_loss
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

    def tune(
        self, make_recipe: Callable[..., Any], start: Path, data: Path, out: str, *, steps: int, minutes: float, lr: float,
    ) -> dict[str, Any]:
        config = make_recipe(start, data, self.root / out, **(self.common | {
            "steps": steps, "rows": self.sizes.rows, "lr": lr, "schedule": "cosine", "warmup": max(1, steps // 10), "seed": 0,
            "max_tokens": self.sizes.max_prompt + self.sizes.max_tokens, "max_minutes": minutes}))
        sft.fine_tune(config, quiet=self.quiet)
        records = [r for r in read_metrics(self.root / out) if r["kind"] == "train"]
        return {"steps": len(records), "losses": thinned([(r["step"], r["loss"]) for r in records])}

    def do_cold(self, minutes: float) -> dict[str, Any]:
        data = self.root / "cold.jsonl"
        if not data.exists():
            talks, counts = cold_talks(self.bench, self.sizes.cold_rows, self.model("s3"), self.device)
            write_json(self.root / "funnel.json", counts)
            write_jsonl(data, talks)
        found = self.tune(cold_start.recipe, self.model("s3"), data, "cold", steps=self.sizes.cold_steps, minutes=minutes,
                          lr=self.sizes.sft_lr)
        measured = self.bench.measure(self.model("cold"), thinking(FAMILIES), self.device, repeats=4)
        return found | json.loads((self.root / "funnel.json").read_text()) | {"think": measured}

    def learnable(self, low: float = 0.1, high: float = 0.9, most: int = 10) -> list[str]:
        """Families with a rule whose pass rate after the cold start leaves something to learn: those nearest to a half."""
        cold = self.result("cold")["think"]
        rates = {n: r["pass_rate"] for n, r in cold.items() if n not in ("instructions", "python_tool")}
        inside = sorted((n for n, p in rates.items() if low <= p <= high), key=lambda n: abs(rates[n] - 0.5))
        return inside[:most] or sorted(rates, key=lambda n: abs(rates[n] - 0.5))[:3]

    def reinforced(
        self, make_recipe: Callable[..., Any], start: Path, out: str, names: Sequence[str], minutes: float, **changes: Any,
    ) -> dict[str, Any]:
        z = self.sizes
        config = make_recipe(start, self.root / out, **(self.common | {
            "families": tuple(names), "steps": z.rl_steps, "groups": z.groups, "group_size": z.group_size, "mini_batches": 2,
            "lr": z.rl_lr, "max_tokens": z.max_tokens, "max_prompt": z.max_prompt, "slots": z.slots, "entropy_band": (0.02, 1.0),
            "raise_at": 0.8, "eval_every": 10, "eval_problems": max(1, z.eval_problems // 4), "seed": self.e.seed, "workers": 1,
            "pass_band": (0.0, 1.0) if self.e.tiny else (0.03, 0.97), "probe_groups": z.groups, "max_minutes": minutes,
        } | changes))
        reinforce(config, families=self.bench.families(names), quiet=self.quiet)
        return self.curves(out) | {"families": list(names)}

    def curves(self, out: str) -> dict[str, Any]:
        records = read_metrics(self.root / out)
        steps = [r for r in records if r["kind"] == "train"]
        speed = [r for r in records if r["kind"] == "speed"]
        held = [(r["step"], statistics.fmean(v for k, v in r.items() if k.endswith("/reward")))
                for r in records if r["kind"] == "eval"]
        medians = [name for name in ("rollouts_per_s", "sampled_tokens_per_s") if any(name in r for r in speed)]

        def median(name: str) -> float:
            values = [r[name] for r in speed if name in r]
            return statistics.median(values[1:] or values)  # the first one compiles

        return {
            "steps": len(steps), "held_out_curve": held,
            **{f"{k}_curve": thinned([(r["step"], r[k]) for r in steps if k in r])
               for k in ("reward", "sampled_entropy", "length", "kept_groups")},
            "max_gap": max((r["max_gap"] for r in steps if "max_gap" in r), default=0.0),
            **{name: median(name) for name in medians},
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
            direct = [[*p.messages, {"role": "assistant", "content": answer}]
                      for p in drawn(families, MODED, z.fusion_rows, "direct") if (answer := direct_answer(p))]
            tools = [{"messages": [*p.messages, *solution(p)], "tools": list(p.tools)}
                     for p in drawn(families, ["python_tool"], z.fusion_rows // 20 + 1, "tools")]
            records = [{"messages": c} for c in fusion.conversations(talks, direct, 0)] + tools
            random.Random(0).shuffle(records)
            write_jsonl(data, records)
        found = self.tune(fusion.recipe, start, data, "fusion", steps=z.fusion_steps, minutes=minutes, lr=z.sft_lr / 2)
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
        base = self.pretrain("student", lambda s: replace(stage2.stage(s), lr_end=0.05, warmup=s.warmup), z.student, None,
                             1.5 * quarter)
        names = self.learnable()
        both = [*names, *(f"{n}{NO_THINK}" for n in names)]
        data = self.root / "off.jsonl"
        families = self.bench.families(both)
        if not data.exists():
            model, tok = opened(teacher, self.device)
            problems = drawn(families, both, z.off_rows, "off")
            talks = teacher_data(model, tok, families, problems, seed=mixed_seed("off"), right_only=False, **self.bench.options)
            if not talks:  # of a tiny teacher, which is not the point
                talks = [[*p.messages, {"role": "assistant", "content": direct_answer(p)}] for p in problems if not p.thinking]
            sft.write(data, talks)
            del model
        results: dict[str, Any] = {"base": base, "families": names, "pass_k": z.pass_k}
        results["off_policy"] = self.tune(distillation.off_policy, self.model("student"), data, "off_policy", steps=z.off_steps,
                                          minutes=0.5 * quarter, lr=z.sft_lr)
        off = self.model("off_policy")
        config = distillation.on_policy(teacher, off, self.root / "on_policy", **(self.common | {
            "families": tuple(both), "steps": z.rl_steps, "groups": z.groups * z.group_size // 2, "group_size": 1, "lr": 3 * z.rl_lr,
            "max_tokens": z.max_tokens, "max_prompt": z.max_prompt, "slots": z.slots, "seed": 0, "workers": 1, "mini_batches": 1,
            "max_minutes": quarter}))
        distill(config, families=families, quiet=self.quiet)
        results["on_policy"] = self.curves("on_policy")
        results["student_rl"] = self.reinforced(reasoning_rl.recipe, off, "student_rl", both, quarter, pass_band=(0.0, 1.0),
                                                eval_every=0)
        several = {"repeats": z.pass_k, "count": max(1, z.eval_problems // 2)}
        for name in ("off_policy", "on_policy", "student_rl"):
            results[name]["measured"] = self.bench.measure(self.model(name), both, self.device, **several)
        results["teacher"] = self.bench.measure(teacher, both, self.device, **several)
        return results

    def do_control(self, minutes: float) -> dict[str, Any]:
        """RL without a cold start: what the guard says, and what happens when it is told to go on."""
        names = self.learnable()
        try:
            self.reinforced(reasoning_rl.recipe, self.model("s3"), "refused", names, 0.01, pass_band=(0.03, 0.97), eval_every=0,
                            steps=1)
            said = "it started"
        except RuntimeError as error:
            said = str(error)
        found = self.reinforced(reasoning_rl.recipe, self.model("s3"), "control", names, minutes, pass_band=(0.0, 1.0),
                                eval_every=0)
        after = self.bench.measure(self.model("control"), names, self.device)
        return found | {"refusal": said, "think": after, "after": mean(after, names)}


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
        parts.append(f"{result['steps']} steps, {result['rollouts_per_s']:,.0f} rollouts/s, "
                     f"{result['sampled_tokens_per_s']:,.0f} tokens/s sampled")
    if "funnel" in result:
        parts.append(", ".join(f"{reason} {count}" for reason, count in result["funnel"].items()))
    for name in ("think", "no_think"):
        if name in result:
            parts.append(f"{name} {mean(result[name], list(result[name])):.3f}")
    if "before" in result:
        parts.append(f"its families {result['before']:.3f} to {result['after']:.3f}")
    if "refusal" in result:
        parts.append(result["refusal"])
    if "off_policy" in result:
        parts += [f"{n} {mean(result[n]['measured'], list(result[n]['measured'])):.3f}"
                  for n in ("off_policy", "on_policy", "student_rl")]
    return "; ".join(parts)


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
    with closing(Bench(sizes, e.workers)) as bench:
        course, names = Course(e, bench, console), order(e)
        whole = sum(sizes.minutes[n] for n in names)
        for name in names:
            course.run(name, e.minutes * sizes.minutes[name] / whole if e.minutes else sizes.minutes[name])
        ran_on = environment.describe(course.device, DTYPES[course.dtype])
        write_json(course.root / "environment.json", ran_on | {"options": to_json(e)})
    if e.pack is not None:
        for part in pack(e.out, e.pack, e.keep):
            console.print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB", markup=False)


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
