"""Chains of sums modulo 10, for models of a few hundred thousand parameters: each step is easy, the whole is not."""

from __future__ import annotations

from . import Problem, Reply, SingleTurn, rng_of


class Chain(SingleTurn):
    """Numbers of one digit with + and - between them; level l has l + 2 of them. The thinking that solves it writes every
    sum down before the next one, `3+5=8-2=6`: four characters per step."""

    max_level = 10

    def __init__(self, flag: str = ""):
        """flag: "", "/think" or "/no_think", written behind the chain."""
        self.name, self._flag = f"chain{flag}", flag

    def problem(self, seed: int, level: int) -> Problem:
        rng = rng_of("chain", seed, level)
        value = rng.randrange(10)
        text = str(value)
        for _ in range(level + 1):
            sign, digit = rng.choice("+-"), rng.randrange(10)
            value = (value + digit if sign == "+" else value - digit) % 10
            text += f"{sign}{digit}"
        message = {"role": "user", "content": f"{text} {self._flag}".strip()}
        data = {"chain": text, "answer": str(value)}
        return Problem(self.name, (message,), data, level, thinking=self._flag != "/no_think")

    def score(self, problem: Problem, reply: Reply) -> float:
        return float(reply.content.strip() == problem.data["answer"])


def worked(chain: str) -> str:
    """The thinking that solves a chain."""
    value, out = int(chain[0]), chain[0]
    for sign, digit in zip(chain[1::2], chain[2::2]):
        value = (value + int(digit) if sign == "+" else value - int(digit)) % 10
        out += f"{sign}{digit}={value}"
    return out
