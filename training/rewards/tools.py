"""Tool use over several turns: the model may call Python, which really runs, and answers when it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import Problem, Reply, SingleTurn, rng_of
from .sandbox import run

FAILED = "failed:"
PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code and returns what it prints. No network, five seconds.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


class PythonTool(SingleTurn):
    """Sums that are long to do by hand. Right answer 1; half of that when no call of the tool succeeded, so that a
    guess without the tool is worth less. ``turns``: the last one must answer."""

    name, max_level, turns = "python_tool", 2, 4

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds

    def problem(self, seed: int, level: int) -> Problem:
        rng = rng_of(self.name, seed, level)
        a, b, m = (rng.randint(10 ** (level + 1), 10 ** (level + 2)) for _ in range(3))
        kind = rng.randrange(3)
        if kind == 0:
            text, answer = f"What is {a} times {b}, modulo {m}?", a * b % m
        elif kind == 1:
            n = 20 * (level + 1)
            text, answer = f"What is the sum of the squares of the integers from 1 to {n}, modulo {m}?", sum(
                i * i for i in range(1, n + 1)) % m
        else:
            text, answer = f"How many times does the digit 7 occur in {a ** 6}?", str(a**6).count("7")
        message = {"role": "user", "content": f"{text} Answer with the number alone."}
        return Problem(self.name, (message,), {"answer": answer}, level, tools=(PYTHON,))

    def respond(self, problem: Problem, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        results = []
        for call in message.get("tool_calls") or ():
            code = call["arguments"].get("code") if call["name"] == "python" else None
            if isinstance(code, str):
                output = run(code, seconds=self._seconds)
                text = output.text if output.status == "ok" else f"{FAILED} {output.text}"
            else:
                text = f'{FAILED} unknown call {call["name"]!r}; expected python with "code"'
            results.append({"role": "tool", "content": text})
        return results

    def score(self, problem: Problem, reply: Reply) -> float:
        right = reply.content.strip().rstrip(".") == str(problem.data["answer"])
        used = any(m["role"] == "tool" and not m["content"].startswith(FAILED) for m in reply.messages)
        return right * (1.0 if used else 0.5)
