"""Which families a mixture can name: those of the registry, and anyone's own by the path of what makes it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from . import Family, Problem
from .chains import Chain
from .grounding import Grounding
from .gym import NAMES, SCORER as GYM_SCORER, Gym
from .instructions import Instructions
from .maths import SCORER as MATH_SCORER, LinearEquation
from .tools import PythonTool
from .workers import Pool

SCORERS = (MATH_SCORER, GYM_SCORER)

MAKERS: dict[str, Callable[[Pool], Family]] = {
    "chain": lambda pool: Chain(),
    "chain/think": lambda pool: Chain("/think"),
    "chain/no_think": lambda pool: Chain("/no_think"),
    "linear_equation": LinearEquation,
    "instructions": lambda pool: Instructions(),
    "instructions/no_think": lambda pool: Instructions(thinking=False),
    "grounding": lambda pool: Grounding(),
    "python_tool": lambda pool: PythonTool(),
    **{f"gym/{name}": (lambda pool, name=name: Gym(name, pool)) for name in NAMES},
}
GENERAL = tuple(name for name in MAKERS if not name.startswith("chain"))
"""What general RL draws from without a choice: instruction and format following, tool use, grounding, reasoning. Families
that need data or a judge (`maths.Maths`, `judges`) are added by the caller."""


class NoThinking:
    """A family whose problems ask for no thinking; its other properties are those of the family given."""

    def __init__(self, family: Family):
        self._family, self.name = family, f"{family.name}{NO_THINK}"
        self.max_level, self.turns = family.max_level, family.turns
        self.scores, self.respond = family.scores, family.respond

    def problem(self, seed: int, level: int) -> Problem:
        p = self._family.problem(seed, level)
        *before, last = p.messages
        asked = {**last, "content": f"{last['content']} {NO_THINK}"}
        return dataclasses.replace(p, family=self.name, messages=(*before, asked), thinking=False)


NO_THINK = "/no_think"
MAKERS |= {
    f"{name}{NO_THINK}": (lambda pool, make=make: NoThinking(make(pool)))
    for name, make in [*MAKERS.items()] if "think" not in name and name != "chain"
}


METHODS, NUMBERS = ("problem", "scores", "respond"), ("max_level", "turns")


def maker(name: str) -> Callable[[Pool], Family]:
    """What makes the family ``name``: of the registry, or ``module:attribute``, a class or function that takes a
    `workers.Pool` and gives a `Family`. Raises ValueError where there is no such thing."""
    if name in MAKERS:
        return MAKERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"family is {name!r}; expected one of {tuple(MAKERS)} or module:attribute")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"family is {name!r}, which cannot be imported: {e}") from e
    if not callable(found):
        raise ValueError(f"family is {name!r}, a {type(found).__name__}; expected a class or function that takes a Pool")
    return lambda pool: Named(name, found(pool))


class Named:
    """A family under the name that a config gives it. Raises ValueError for what is not a `Family`."""

    def __init__(self, name: str, family: Any):
        lacking = [n for n in METHODS if not callable(getattr(family, n, None))]
        lacking += [n for n in NUMBERS if not isinstance(getattr(family, n, None), int)]
        if lacking:
            raise ValueError(f"family {name!r} gives a {type(family).__name__} without {', '.join(lacking)}; expected what "
                             "training.rewards.Family has")
        self.name, self.max_level, self.turns = name, family.max_level, family.turns
        self.scores, self.respond, self._problem = family.scores, family.respond, family.problem

    def problem(self, seed: int, level: int) -> Problem:
        return dataclasses.replace(self._problem(seed, level), family=self.name)


def make(names: Sequence[str], pool: Pool) -> dict[str, Family]:
    """Families by name. Raises ValueError for names that are unknown or given twice."""
    if len(set(names)) < len(names):
        raise ValueError(f"families are {tuple(names)}; expected each once")
    return {name: maker(name)(pool) for name in names}
