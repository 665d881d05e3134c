"""Rewards by a model: with a reference answer, or a reward model's scalar; through an `endpoint.Endpoint` (its ``chat``, best
at temperature 0, or ``scalar``) or a `LocalModel`, which is called or has ``scalar``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from . import Problem, Reply, SingleTurn

if TYPE_CHECKING:
    from qwen3_model.model import Qwen3
    from qwen3_model.tokenizer import Tokenizer

Ask = Callable[[str], str]
"""A prompt in, a model's reply out."""

REFERENCE = (
    "Compare a response with the reference answer to the same query. Do they agree in substance?\n\n"
    "Query:\n{query}\n\nReference:\n{reference}\n\nResponse:\n{response}\n\n"
    "Reply with a grade from 0 (wrong) to 10 (agrees in full), as: Grade: <number>"
)
GOOD = (
    "Below are a query and a response to it. Is the response good?\n\nQuery:\n{query}\n\nResponse:\n{response}\n\n"
    "Reply with yes or no alone."
)
AGAIN = "\n\nEnd your reply with a line of this form, with a number from 0 to 10 in it: Grade: <number>"
_GRADE = re.compile(r"grade(?:\s+is)?\W{0,4}(\d+(?:\.\d+)?)", re.IGNORECASE)


class LocalModel:
    """Asks a model in this process."""

    def __init__(self, model: Qwen3, tokenizer: Tokenizer, *, max_tokens: int = 512, thinking: bool = False):
        self._model, self._tokenizer, self._max_tokens, self._thinking = model, tokenizer, max_tokens, thinking

    def __call__(self, prompt: str) -> str:
        from qwen3_model.sampling import SamplingParams
        from qwen3_model.thinking import chat

        messages = [{"role": "user", "content": prompt}]
        reply = chat(self._model, self._tokenizer, messages, enable_thinking=None if self._thinking else False,
                     params=SamplingParams(temperature=0.0, max_tokens=self._max_tokens))
        return reply.parsed.content

    def scalar(self, messages: Sequence[Mapping[str, Any]]) -> float:
        """For `RewardModel`: the log-odds of yes over no as its first word when asked whether the last reply is good."""
        import torch

        from qwen3_model.chat import encode_chat

        *before, reply = messages
        prompt = GOOD.format(query=before[-1]["content"], response=reply["content"])
        tokens = encode_chat(self._tokenizer, [{"role": "user", "content": prompt}], enable_thinking=False)
        device = self._model.head_weight.device
        with torch.no_grad():
            logits = self._model(torch.tensor([tokens], device=device), return_hidden=True)[0, -1]
            logits = self._model.head(logits).float()
        yes, no = (self._tokenizer.encode(word)[0] for word in ("yes", "no"))
        return (logits[yes] - logits[no]).item()


def grade(reply: str) -> float | None:
    """The grade in a judge's reply as a share of 10, Markdown or not; None without one."""
    found = _GRADE.findall(re.sub(r"[*_`]", "", reply))
    return min(float(found[-1]) / 10, 1.0) if found else None


class _Queries(SingleTurn):
    def __init__(self, items: Sequence[tuple[str, str]], workers: int):
        if not items:
            raise ValueError("items is empty; expected pairs of query and reference")
        self._items, self._workers = list(items), workers

    def problem(self, seed: int, level: int) -> Problem:
        query, reference = self._items[seed % len(self._items)]
        return Problem(self.name, ({"role": "user", "content": query},), {"query": query, "reference": reference}, level)

    def scores(self, pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        if self._workers == 1:
            return super().scores(pairs)
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(lambda pair: self.score(*pair), pairs))


class WithReference(_Queries):
    """A judge compares the reply with a reference answer. One that gives no grade is asked once more; then RuntimeError,
    as for a server that fails."""

    name = "judge_with_reference"

    def __init__(self, items: Sequence[tuple[str, str]], ask: Ask, *, workers: int = 8):
        super().__init__(items, workers)
        self._ask = ask

    def score(self, problem: Problem, reply: Reply) -> float:
        prompt = REFERENCE.format(response=reply.content, **problem.data)
        for text in (prompt, prompt + AGAIN):
            answer = self._ask(text)
            if (found := grade(answer)) is not None:
                return found
        raise RuntimeError(f"the judge gave no grade in two replies; the last ends with {answer[-200:]!r}")


class RewardModel(_Queries):
    """A reward model's scalar, through a sigmoid of (scalar - centre) / width into [0, 1]."""

    name = "reward_model"

    def __init__(
        self, queries: Sequence[str], scalar: Callable[[Sequence[dict[str, Any]]], float], *, centre: float = 0.0,
        width: float = 1.0, workers: int = 8,
    ):
        super().__init__([(q, "") for q in queries], workers)
        self._scalar, self._centre, self._width = scalar, centre, width

    def score(self, problem: Problem, reply: Reply) -> float:
        import math

        x = (self._scalar([*problem.messages, {"role": "assistant", "content": reply.content}]) - self._centre) / self._width
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, x))))
