"""What `evidence` plays and measures: the families, the held-out problems, the thinking budget, the data of the stages."""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_model.chat import encode_chat, parse
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from ..filters import Candidate, Contents
from ..rewards import Family, Problem, Reply, find, mixed_seed
from ..rewards.families import GENERAL, NO_THINK, SCORERS, make
from ..rewards.workers import Pool
from ..rl import Episode, held_out, play, summary
from ..rollout import Request
from ..static_rollout import roller_for
from . import cold_start
from .evidence_data import LEFT_OUT
from .path import opened
from .worked import solution

FAMILIES = tuple(n for n in GENERAL if n not in LEFT_OUT)
MODED = tuple(n for n in FAMILIES if n != "python_tool" and not n.endswith(NO_THINK))  # those asked for in both modes


class Bench:
    """Families with one pool of scorers for the whole process, and the held-out problems."""

    def __init__(self, sizes: Any, workers: int):
        self.sizes, self.pool, self._kept = sizes, Pool(SCORERS, workers=workers, deadline=5.0), {}
        self.options = {"max_tokens": sizes.max_tokens, "max_prompt": sizes.max_prompt, "slots": sizes.slots}

    def close(self) -> None:
        self.pool.close()

    def roller(self, model: Qwen3, tokenizer: Tokenizer) -> Any:
        length = min(self.sizes.max_prompt + self.sizes.max_tokens, model.config.max_position_embeddings)
        return roller_for(model, slots=self.sizes.slots, max_len=length, temperature=1.0, stop_ids=tokenizer.stop_ids,
                          record_experts=False)

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


def budget_curve(bench: Bench, folder: Path, names: Sequence[str], device: str) -> dict[str, Any]:
    """Mean reward when the thinking is cut after B tokens and ``</think>`` is put in its place (figure 2 of the report);
    at each budget the same samples, cut."""
    (model, tok), families, sizes = opened(folder, device), bench.families(names), bench.sizes
    problems = bench.problems(names, sizes.eval_problems)
    whole = play(model, tok, families, problems, repeats=1, seed=mixed_seed("budget"), **bench.options)
    begins, ends = len(tok.encode("<think>\n")), tok.encode("\n</think>\n\n")
    curve, lengths = [], [e.thinking_tokens for e in whole]
    for budget in sizes.budgets:
        at, cut = begins + budget, []
        for e in whole:
            ids = e.turns[0]
            if tok.end_think_id not in ids[: at + 1] and len(ids) > at:
                cut.append((e, [*ids[:at], *ends]))
        roller = bench.roller(model, tok)
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
                reply = Reply((parsed.message(),), parsed.content, parsed.thinking)
                replies.setdefault(e.problem.family, []).append((e, reply))
        for name, part in replies.items():
            for (e, _), score in zip(part, families[name].scores([(e.problem, reply) for e, reply in part])):
                rewards[id(e)] = score
        curve.append({"budget": budget, "reward": statistics.fmean(rewards.values()), "cut": len(cut) / len(whole)})
    return {"curve": curve, "whole": statistics.fmean(e.reward for e in whole), "thinking_tokens": statistics.fmean(lengths),
            "families": list(names), "count": len(whole)}


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


FUNNEL = ("query: no worked thinking", "query: several parts", "query: not verifiable", "query: needs no thinking",
          "wrong answer", "repetition", "guesswork", "inconsistent", "language mixing", "near a validation item", "kept")


def cold_talks(bench: Bench, count: int, start: Path, device: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Conversations with worked thinking: of responses, some spoilt on purpose, what passes the filters; tool use and
    instructions as they are. And two counts: "funnel", by reason, and "conversations", by family."""
    rng, families = random.Random(1), bench.families(FAMILIES)
    problems = drawn(families, thinking(FAMILIES), count, "cold")
    candidates: dict[str, list[Candidate]] = defaultdict(list)
    talks, single, funnel = [], [], Counter(dict.fromkeys(FUNNEL, 0))
    conversations = Counter(dict.fromkeys(thinking(FAMILIES), 0))
    for p in problems:
        turns = solution(p)
        if turns is None:
            funnel["query: no worked thinking"] += 1
            continue
        if len(turns) > 1 or p.family == "instructions":
            talks.append({"messages": [*p.messages, *turns]} | ({"tools": list(p.tools)} if p.tools else {}))
            conversations[p.family] += 1
            continue
        single.append(p)
        query, thought, answer = p.messages[-1]["content"], turns[0]["reasoning_content"], turns[0]["content"]
        candidates[p.family].append(Candidate(query, thought, answer, True))
        if rng.random() < 0.3:
            candidates[p.family].append(spoilt(query, thought, answer, rng))
    quick = answered_directly(bench, start, single, device)
    for name, own in candidates.items():
        evaluated = bench.problems([name, *direct_modes([name])], bench.sizes.eval_problems)
        near = Contents(p.messages[-1]["content"].removesuffix(NO_THINK) for p in evaluated)
        kept, counts = cold_start.conversations(own, near, answers_directly=quick.__contains__, min_thinking=4)
        talks += [{"messages": c} for c in kept]
        conversations[name] = len(kept)
        funnel.update(counts)
    rng.shuffle(talks)
    return talks, {"funnel": dict(funnel), "conversations": dict(conversations)}


def answered_directly(bench: Bench, folder: Path, problems: Sequence[Problem], device: str, spare: int = 8) -> set[str]:
    """Queries to which a model gives the right answer, in full, without thinking: it has no room for more than the answer and
    ``spare`` tokens. Asked as in pre-training, which knows no think blocks, so for a base model."""
    (model, tok), families = opened(folder, device), bench.families(sorted({p.family for p in problems}))
    prompts = [encode_chat(tok, p.messages) for p in problems]
    room = [len(tok.encode(direct_answer(p) or "")) + spare for p in problems]
    asked = [Request(i, list(ids), mixed_seed("direct", i), n) for i, (ids, n) in enumerate(zip(prompts, room))]
    replies: dict[str, list[tuple[Problem, Reply]]] = defaultdict(list)
    for p, r in zip(problems, bench.roller(model, tok).run(asked)):
        if r.finish_reason == "stop":
            parsed = parse(r.ids, tok)
            replies[p.family].append((p, Reply((parsed.message(),), parsed.content, parsed.thinking)))
    return {p.messages[-1]["content"] for name, part in replies.items()
            for (p, _), score in zip(part, families[name].scores(part)) if score == 1.0}


def spoilt(query: str, thought: str, answer: str, rng: random.Random) -> Candidate:
    kind = rng.choice(("wrong", "repetitive", "guess", "mixed"))
    if kind == "wrong":
        return Candidate(query, thought, answer + "0", False)
    again = f" {thought}" * (2 + 400 // max(1, len(thought)))
    said = {"repetitive": thought + again, "guess": "?", "mixed": thought + "所以答案是这个"}
    return Candidate(query, said[kind], answer, True)
