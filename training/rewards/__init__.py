"""Rewards: problems with their scorers, as task families that a mixture draws from.

A family makes problems of a level from a seed and scores replies in [0, 1]. The format gate multiplies that score: a reply
in a wrong format gets 0 and a right format alone gets nothing, so there is no reward for form without substance.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """A prompt and what its scorer needs.

    family: its name. messages: the conversation so far. data: for the scorer, as JSON. level: difficulty it was made for.
    thinking: whether the reply is to think. tools: functions the reply may call, as in the chat format.
    """

    family: str
    messages: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    level: int
    thinking: bool = True
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Reply:
    """A finished conversation: ``messages`` are what came after the problem's (assistant and tool turns), ``content`` and
    ``thinking`` those of its last turn, ``format`` the gate's factor."""

    messages: tuple[Mapping[str, Any], ...]
    content: str
    thinking: str | None
    format: float = 1.0


class Family(Protocol):
    """``max_level``: the hardest; the easiest is 0. ``turns``: most assistant turns of a conversation."""

    name: str
    max_level: int
    turns: int

    def problem(self, seed: int, level: int) -> Problem:
        """A pure function of its arguments."""

    def scores(self, pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        """In [0, 1], before the format gate; many at once, so that workers and endpoints run side by side."""

    def respond(self, problem: Problem, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the environment answers to an assistant turn (tool results); empty when the conversation is over."""


class SingleTurn:
    """A family without an environment whose `score` takes one pair."""

    max_level, turns = 0, 1

    def respond(self, problem: Problem, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        return []

    def scores(self, pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        return [self.score(problem, reply) for problem, reply in pairs]

    def score(self, problem: Problem, reply: Reply) -> float:
        raise NotImplementedError


EMPTY_BLOCK = 2
"""Most tokens that the line breaks of an empty think block take, by tokenizer one or two."""


def mixed_seed(*parts: object) -> int:
    """63 well-mixed bits that are a function of ``parts``, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def rng_of(*parts: object) -> random.Random:
    return random.Random(mixed_seed(*parts))


RESERVED = 16  # one problem in so many is held out
TRIES = 400


def reserved(problem: Problem) -> bool:
    """Whether a problem is held out from all training: by the hash of what it asks, so that it is in every mode, whatever
    seed and level it comes from."""
    words = [w for m in problem.messages for w in (m.get("content") or "").split() if w not in ("/think", "/no_think")]
    return mixed_seed("reserved", *words) % RESERVED == 0


def find(family: Family, seed: int, level: int, *, held_out: bool = False) -> Problem:
    """The problem of ``seed``, or of the next one in a chain of seeds whose problem is on the wanted side: for training, or
    with ``held_out`` reserved. Raises ValueError after TRIES, as families of few problems may have none on a side."""
    for i in range(TRIES):
        problem = family.problem(mixed_seed(seed, i) if i else seed, level)
        if reserved(problem) == held_out:
            return problem
    side = "held out" if held_out else "for training"
    raise ValueError(f"{family.name}, level {level}: none of {TRIES} draws is a problem {side}; expected more problems, of "
                     f"which one in {RESERVED} is held out")


def format_gate(ids: Sequence[int], *, think: int, end_think: int, stop_ids: Sequence[int], thinking: bool) -> float:
    """1 if a turn's ids are one think block, then an answer that ends with a stop token; else 0. With ``thinking`` the block
    must hold something, without it nothing but line breaks."""
    ids = list(ids)
    well_formed = (
        len(ids) >= 3 and ids[-1] in stop_ids and ids[0] == think and ids.count(think) == 1 and ids.count(end_think) == 1
    )
    if not well_formed:
        return 0.0
    inside, answer = ids.index(end_think) - 1, len(ids) - 1 - ids.index(end_think) - 1
    return float((inside > EMPTY_BLOCK) == thinking and answer > 0)
