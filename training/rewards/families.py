"""The registry: which families a mixture can name, and the 20 and more of general RL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

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
        return replace(p, family=self.name, messages=(*before, asked), thinking=False)


NO_THINK = "/no_think"
MAKERS |= {
    f"{name}{NO_THINK}": (lambda pool, make=make: NoThinking(make(pool)))
    for name, make in [*MAKERS.items()] if "think" not in name and name != "chain"
}


def make(names: Sequence[str], pool: Pool) -> dict[str, Family]:
    """Families by name. Raises ValueError for names that are unknown or given twice."""
    for name in names:
        if name not in MAKERS:
            raise ValueError(f"family is {name!r}; expected one of {tuple(MAKERS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"families are {tuple(names)}; expected each once")
    return {name: MAKERS[name](pool) for name in names}
