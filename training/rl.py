"""Reinforcement learning by groups of rollouts: ``python -m training.rl --start MODEL --out DIR --families chain ...``.

The GRPO family (Qwen3 technical report, sections 4.2 and 4.4; the losses are in `losses`). One step: draw problems from
the families, sample a group of conversations for each with the model in training, score them, drop the groups whose
members all got the same reward, and take ``mini_batches`` updates, which from the second on are off-policy. Problems,
draws and updates are functions of (seed, step) and of the run's state, so that a run can be killed and resumed.

What keeps a run honest: it refuses to start when the model's sampled pass rate leaves nothing to learn; max |d log p|
between sampler and trainer is measured in every step; levels rise as they are mastered while easier ones stay in the mix;
and when entropy leaves its band, the advantages that push it further out are damped.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_kernels import linear_cross_entropy
from qwen3_model.chat import encode_chat, parse, render
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from . import stage_memory
from .config import require
from .core import Run, TrainConfig, command, train
from .losses import PRESETS, PolicyGradient, advantages, preset, token_weight
from .rewards import EMPTY_BLOCK, Family, Problem, Reply, find, format_gate, mixed_seed, rng_of
from .rewards.families import MAKERS, SCORERS, make, maker
from .rewards.workers import Pool
from .rollout import Request, Rollout
from .samples import Packed, Sample, packs
from .static_rollout import roller_for

MAX_TILT = 0.9
WINDOW = 4  # steps that a level's mean reward is taken over


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TrainConfig):
    """What every stage has that trains on its own samples: `draw` and `play`."""

    families: tuple[str, ...]  # names of rewards.families, or module:attribute of one's own
    shares: tuple[float, ...] = ()  # of each family in the mix; () for equal ones
    groups: int = 32  # problems per step
    group_size: int = 8  # conversations per problem
    mini_batches: int = 2  # updates per step
    temperature: float = 1.0
    max_tokens: int = 512  # of a conversation beyond its prompt
    max_prompt: int = 512
    slots: int = 64  # conversations decoded at once
    level: int = 0  # level that every family starts at
    easy_share: float = 0.3  # share of problems from the levels below
    workers: int = 2  # scorer processes
    deadline: float = 5.0  # seconds for one score

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "group_size", "mini_batches", "max_tokens", "max_prompt", "slots", "workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self.require_pack(self.max_prompt + self.max_tokens, "max_prompt + max_tokens")
        require(bool(self.families), "families", self.families, f"some of {tuple(MAKERS)}, or module:attribute")
        for name in self.families:
            maker(name)
        right = not self.shares or (len(self.shares) == len(self.families) and all(s > 0 for s in self.shares))
        require(right, "shares", self.shares, f"{len(self.families)} positive numbers, one per family, or none")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.level >= 0, "level", self.level, "at least 0")
        require(0 <= self.easy_share <= 1, "easy_share", self.easy_share, "a share in [0, 1]")
        require(self.deadline > 0, "deadline", self.deadline, "above 0")


@dataclass(frozen=True, kw_only=True)
class RLConfig(RolloutConfig):
    algorithm: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "reinforce"] = "dapo"
    clip_low: float | None = None  # in place of the algorithm's own
    clip_high: float | None = None
    correction: float = 0.0  # bound of the importance weight of trainer over sampler; 0 trusts them to be equal
    replay_routing: bool = True  # mixtures of experts: the trainer takes the experts that the sampler took
    skip_truncated: bool = False  # do not learn from conversations that ran out of tokens
    pass_band: tuple[float, float] = (0.05, 0.95)  # sampled pass rates to start from
    probe_groups: int = 32
    entropy_band: tuple[float, float] = (0.0, math.inf)  # nats per token
    raise_at: float = 0.6  # mean reward at the level above which the next one is tried
    eval_every: int = 0  # steps between evaluations on held-out problems of the first level; 0 for none
    eval_problems: int = 64  # per family

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("probe_groups", "eval_problems"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.group_size >= 2, "group_size", self.group_size, "at least 2, to compare within a group")
        require(self.algorithm in PRESETS, "algorithm", repr(self.algorithm), f"one of {tuple(PRESETS)}")
        for name in ("pass_band", "entropy_band"):
            low, high = getattr(self, name)
            require(0 <= low < high, name, (low, high), "two rising numbers, the first at least 0")
        require(0 <= self.raise_at <= 1, "raise_at", self.raise_at, "a share in [0, 1]")
        require(self.eval_every >= 0, "eval_every", self.eval_every, "at least 0")
        self.loss()

    def loss(self) -> PolicyGradient:
        own = {k: v for k in ("clip_low", "clip_high") if (v := getattr(self, k)) is not None}
        return preset(self.algorithm, correction=self.correction, temperature=self.temperature, **own)


# ---- conversations -----------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One conversation about a problem, with what the trainer needs of every token."""

    problem: Problem
    group: int
    tokens: list[int]
    prompt: int  # length of the problem's own tokens
    mask: list[float]
    logprobs: list[float]
    entropies: list[float] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    reply: Reply | None = None
    experts: Any = None  # of the input tokens, as routed when each was first read
    truncated: bool = False
    thinking_tokens: int = 0
    score: float = 0.0  # the family's, before the gate

    @property
    def reward(self) -> float:
        return self.reply.format * self.score

    def sample(self, advantage: float, weight: float) -> Sample:
        weights = [m * weight for m in self.mask]
        return Sample(self.tokens, weights, [advantage] * len(self.tokens), self.logprobs, self.experts)


def play(
    model: Qwen3, tokenizer: Tokenizer, families: Mapping[str, Family], problems: Sequence[Problem], *, repeats: int,
    seed: int, temperature: float = 1.0, max_tokens: int = 512, max_prompt: int = 512, slots: int = 64,
    record_experts: bool = False,
) -> list[Episode]:
    """``repeats`` conversations for each problem, scored; those of problem i have group i. The families' environments
    answer between turns. Raises ValueError for a prompt over max_prompt."""
    roller = roller_for(
        model, slots=slots, max_len=min(max_prompt + max_tokens, model.config.max_position_embeddings),
        temperature=temperature, stop_ids=tokenizer.stop_ids, record_experts=record_experts,
    )
    episodes = []
    for group, problem in enumerate(problems):
        prompt = encode_chat(tokenizer, problem.messages, tools=problem.tools or None)
        if len(prompt) > max_prompt:
            raise ValueError(
                f"a problem of {problem.family} has {len(prompt)} tokens; expected at most max_prompt {max_prompt}"
            )
        for _ in range(repeats):
            episodes.append(Episode(problem, group, list(prompt), len(prompt), [0.0] * len(prompt), [0.0] * len(prompt)))

    def submit(number: int) -> None:
        e = episodes[number]
        room = min(max_tokens - (len(e.tokens) - e.prompt), roller.max_len - len(e.tokens))
        draw = mixed_seed(seed, number, len(e.turns))
        roller.submit(Request(number, list(e.tokens), draw, room))

    for number in range(len(episodes)):
        submit(number)
    while roller.busy:
        for rollout in roller.step():
            e = episodes[rollout.request.key]
            if _continues(e, rollout, families[e.problem.family], tokenizer, min(e.prompt + max_tokens, roller.max_len)):
                submit(rollout.request.key)
    by_family: dict[str, list[Episode]] = defaultdict(list)
    for e in episodes:
        by_family[e.problem.family].append(e)
    for name, members in by_family.items():
        sensible = [e for e in members if e.reply.format > 0]  # the others get nothing, whatever they say
        for e, score in zip(sensible, families[name].scores([(e.problem, e.reply) for e in sensible])):
            e.score = score
    return episodes


def _continues(e: Episode, rollout: Rollout, family: Family, tokenizer: Tokenizer, limit: int) -> bool:
    """Adds a turn to its conversation; whether another one follows."""
    e.tokens += rollout.ids
    e.mask += [1.0] * len(rollout.ids)
    e.logprobs += rollout.logprobs
    e.entropies += rollout.entropies
    e.turns.append(rollout.ids)
    if rollout.experts is not None:  # what was read again in a later turn keeps its first routing
        e.experts = rollout.experts if e.experts is None else torch.cat((e.experts, rollout.experts[len(e.experts) :]))
    parsed = parse(rollout.ids, tokenizer)
    e.messages.append(parsed.message())
    if tokenizer.end_think_id in rollout.ids:
        inside = rollout.ids.index(tokenizer.end_think_id) - 1
        e.thinking_tokens += inside if inside > EMPTY_BLOCK else 0
    answers = []
    if rollout.finish_reason == "stop" and len(e.turns) < family.turns:
        answers = family.respond(e.problem, e.messages[-1])
    if answers:
        for answer in answers:  # a tool's output must not speak the chat format
            answer["content"] = answer["content"].replace("<|", "< |")
        given = tokenizer.encode("\n" + render(answers))
        if len(e.tokens) + len(given) < limit:
            e.tokens += given
            e.mask += [0.0] * len(given)
            e.logprobs += [0.0] * len(given)
            e.messages += answers
            return True
    e.truncated = rollout.finish_reason == "length" or bool(answers)
    gate = math.prod(
        format_gate(ids, think=tokenizer.think_id, end_think=tokenizer.end_think_id, stop_ids=tokenizer.stop_ids,
                    thinking=e.problem.thinking) for ids in e.turns
    )
    e.reply = Reply(tuple(e.messages), parsed.content, parsed.thinking, gate * (not e.truncated))
    return False


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over conversations; a pass is a reward of 0.5 and more."""
    mean = lambda values: statistics.fmean(values)  # noqa: E731
    return {
        "reward": mean(e.reward for e in episodes), "pass_rate": mean(e.reward >= 0.5 for e in episodes),
        "format": mean(e.reply.format for e in episodes), "truncated": mean(e.truncated for e in episodes),
        "length": mean(len(e.tokens) - e.prompt for e in episodes),
        "thinking_tokens": mean(e.thinking_tokens for e in episodes),
        "sampled_entropy": mean([h for e in episodes for h in e.entropies]),
    }


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def draw(config: RolloutConfig, families: Mapping[str, Family], levels: Mapping[str, int], step: int) -> list[Problem]:
    """The problems of a step: families by their shares, levels at the frontier or, for ``easy_share``, below it.
    None is a held-out one (`rewards.reserved`)."""
    problems = []
    for group in range(config.groups):
        rng = rng_of(config.seed, "draw", step, group)
        name = rng.choices(config.families, config.shares or None)[0]
        level = levels[name]
        if level and rng.random() < config.easy_share:
            level = rng.randrange(level)
        problems.append(find(families[name], mixed_seed(config.seed, "problem", step, group), level))
    return problems


def held_out(families: Mapping[str, Family], levels: Mapping[str, int] | int, count: int, seed: int = 0) -> list[Problem]:
    """Problems that no training step draws (`rewards.reserved`); where a level has few, some of them more than once.
    ValueError where it has none."""
    return [
        find(family, mixed_seed("held out", seed, name, i), levels if isinstance(levels, int) else levels[name], held_out=True)
        for name, family in families.items() for i in range(count)
    ]


def raised(
    levels: Mapping[str, int], recent: Mapping[str, Sequence[float]], episodes: Iterable[Episode],
    families: Mapping[str, Family], raise_at: float,
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """(levels, recent) after a step. ``recent`` are the mean rewards at each family's frontier in up to WINDOW steps; when
    they are that many and their mean has passed ``raise_at``, the level goes up by one and the count starts again."""
    frontier: dict[str, list[float]] = defaultdict(list)
    for e in episodes:
        if e.problem.level == levels[e.problem.family]:
            frontier[e.problem.family].append(e.reward)
    new_levels, new_recent = dict(levels), {}
    for name, level in levels.items():
        seen = [*recent.get(name, ()), *([statistics.fmean(frontier[name])] if frontier[name] else [])][-WINDOW:]
        if len(seen) == WINDOW and statistics.fmean(seen) > raise_at and level < families[name].max_level:
            new_levels[name], seen = level + 1, []
        new_recent[name] = seen
    return new_levels, new_recent


def tilted(tilt: float, entropy: float, band: tuple[float, float]) -> float:
    """The next tilt in [-MAX_TILT, MAX_TILT]. Below the band it rises, and damps positive advantages, which sharpen the
    distribution; above it falls, and damps negative ones, which flatten it; inside it goes back to 0."""
    low, high = band
    if entropy < low:
        return min(MAX_TILT, tilt + 0.1)
    if entropy > high:
        return max(-MAX_TILT, tilt - 0.1)
    return math.copysign(max(0.0, abs(tilt) - 0.1), tilt)


def tilt_advantage(value: float, tilt: float) -> float:
    return value * (1 - abs(tilt)) if value * tilt > 0 else value


# ---- a step ------------------------------------------------------------------------------------------------------------


def learn(
    run: Run, episodes: Sequence[Episode], config: RLConfig, step: int, *, tilt: float = 0.0,
) -> dict[str, float]:
    """The updates of a step. Statistics are those of the mini-batches' mean, but ``max_gap`` is taken with the weights that
    sampled: that of the first, or with ``correction`` that of all, as `corrected` finds it."""
    loss = config.loss()
    groups: dict[int, list[Episode]] = defaultdict(list)
    for e in episodes:
        groups[e.group].append(e)
    kept = [g for g in groups.values() if len({e.reward for e in g}) > 1]  # else all advantages are 0
    found: dict[str, float] = {"kept_groups": len(kept) / len(groups), "max_gap": 0.0}
    chosen = [
        (e, tilt_advantage(a, tilt)) for g in kept for e, a in zip(g, advantages([e.reward for e in g], loss.scale))
        if not (config.skip_truncated and e.truncated)
    ]
    if not chosen:
        return found
    parts = [p for p in (chosen[i :: config.mini_batches] for i in range(config.mini_batches)) if p]
    batches = []
    for part in parts:
        lengths = [int(sum(e.mask)) for e, _ in part]
        weights = [token_weight(loss.average, length=n, lengths=lengths, max_length=config.max_tokens) for n in lengths]
        samples = [e.sample(a, w) for (e, a), w in zip(part, weights)]
        batches.append(packs(samples, config.tokens_per_pack))
    gaps = []
    if loss.correction:
        for batch in batches:
            for i, packed in enumerate(batch):
                batch[i], gap = corrected(run.model, packed, loss)
                gaps.append(gap)
    stats = [run.update(batch, loss, config.lr_at(step)) for batch in batches]
    found |= {name: statistics.fmean(s[name] for s in stats) for name in stats[0] if name != "max_gap"}
    return found | {"max_gap": max(gaps) if gaps else stats[0]["max_gap"]}


@torch.no_grad()
def corrected(model: Qwen3, packed: Packed, loss: PolicyGradient) -> tuple[Packed, float]:
    """With the trainer's own log-probabilities in place of the sampler's, and their bounded ratio in the weights; and the
    max |d log p| of the two."""
    device = model.head_weight.device
    packed = packed.to(device)
    logp = -linear_cross_entropy(
        packed.hidden(model), model.head_weight, packed.targets, temperature=loss.temperature, reduction="none"
    )
    apart = logp - packed.logprobs
    ratio = apart.exp().clamp(max=loss.correction)
    return dataclasses.replace(packed, logprobs=logp, weights=packed.weights * ratio), apart.abs().max().item()


def reinforce(config: RLConfig, *, families: Mapping[str, Family] | None = None, quiet: bool = False) -> Path:
    """Runs or resumes; returns the folder of the finished model.

    ``families``: objects for the names in the config, by default those of the registry.
    Raises RuntimeError when the pass rate is outside ``pass_band``; other errors as `core.train` and `stage_memory.check`.
    """
    stage_memory.check(stage_memory.Reinforcement, config.resolved())
    with Pool(SCORERS, workers=config.workers, deadline=config.deadline) as pool:
        families = families or make(config.families, pool)
        options = {"temperature": config.temperature, "max_tokens": config.max_tokens, "max_prompt": config.max_prompt,
                   "slots": config.slots}
        first = {n: min(config.level, f.max_level) for n, f in families.items()}
        kept = held_out(families, first, config.eval_problems) if config.eval_every else []

        def begin(run: Run) -> None:
            run.state = {"levels": first, "recent": {}, "tilt": 0.0}
            probe = dataclasses.replace(config, groups=config.probe_groups)
            episodes = play(run.model, run.tokenizer, families, draw(probe, families, run.state["levels"], -1),
                            repeats=config.group_size, seed=mixed_seed(config.seed, "probe"), **options)
            run.log.say(refusal(episodes, config.pass_band))

        def step(run: Run, n: int) -> dict[str, float]:
            levels, tilt = run.state["levels"], run.state["tilt"]
            problems, clock = draw(config, families, levels, n), time.perf_counter()
            episodes = play(run.model, run.tokenizer, families, problems, repeats=config.group_size,
                            seed=mixed_seed(config.seed, "sample", n), record_experts=config.replay_routing, **options)
            found, seconds = summary(episodes), time.perf_counter() - clock
            run.log.write("speed", n + 1, {
                "rollouts_per_s": len(episodes) / seconds,
                "sampled_tokens_per_s": sum(len(t) for e in episodes for t in e.turns) / seconds,
            })
            metrics = found | learn(run, episodes, config, n, tilt=tilt)
            metrics |= {f"level/{k}": v for k, v in levels.items()} | {"tilt": tilt}
            metrics |= {"timeouts": pool.timeouts, "crashes": pool.crashes, "scorer_errors": pool.errors}
            levels, recent = raised(levels, run.state["recent"], episodes, families, config.raise_at)
            run.state = {
                "levels": levels, "recent": recent,
                "tilt": tilted(tilt, found["sampled_entropy"], config.entropy_band),
            }
            if config.eval_every and ((n + 1) % config.eval_every == 0 or n + 1 == config.steps):
                run.log.write("eval", n + 1, evaluate(run.model, run.tokenizer, families, kept, config))
            return metrics

        return train(config, step, begin=begin, quiet=quiet)


def evaluate(
    model: Qwen3, tokenizer: Tokenizer, families: Mapping[str, Family], problems: Sequence[Problem], config: RLConfig,
) -> dict[str, float]:
    """One sample of each problem: {"family/reward", "/format", "/length"}."""
    episodes = play(model, tokenizer, families, problems, repeats=1, seed=mixed_seed("evaluate"),
                    temperature=config.temperature, max_tokens=config.max_tokens, max_prompt=config.max_prompt,
                    slots=config.slots)
    found = {}
    for name in families:
        own = summary([e for e in episodes if e.problem.family == name])
        found |= {f"{name}/{k}": own[k] for k in ("reward", "format", "length")}
    return found


def refusal(episodes: Sequence[Episode], band: tuple[float, float]) -> str:
    """What the probe measured; raises RuntimeError with it when the pass rate is outside the band."""
    groups: dict[int, list[Episode]] = defaultdict(list)
    by_family: dict[str, list[Episode]] = defaultdict(list)
    for e in episodes:
        groups[e.group].append(e)
        by_family[e.problem.family].append(e)
    found = summary(episodes)
    mixed = statistics.fmean(len({e.reward for e in g}) > 1 for g in groups.values())
    parts = ", ".join(f"{name} {summary(members)['pass_rate']:.2f}" for name, members in by_family.items())
    measured = (
        f"sampled pass rate {found['pass_rate']:.3f} over {len(episodes)} conversations ({parts}); right format "
        f"{found['format']:.2f}; groups with different rewards {mixed:.2f}"
    )
    low, high = band
    if not low <= found["pass_rate"] <= high:
        what = "too hard: start from easier levels or a longer cold start" if found["pass_rate"] < low else \
            "too easy: start from harder levels"
        raise RuntimeError(f"{measured}. Expected a pass rate in [{low:g}, {high:g}]; the problems are {what}")
    return measured


if __name__ == "__main__":
    command(RLConfig, reinforce, "training.rl", __doc__)
