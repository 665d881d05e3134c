"""What runs in the workers: scorers of other libraries, imported only there and only when needed."""

from __future__ import annotations

from typing import Any

from .workers import EXTRA

NEEDS = f"{{}} is not installed: {EXTRA}[rl]'"


def warm_up() -> None:
    """The first calls of math-verify take a second; that is not the model's fault."""
    try:
        math("$1$", "1")
    except ImportError:
        pass  # said by the call that needs it


def math(text: str, reference: str) -> float:
    """Whether the last formula or number of ``text`` equals ``reference`` (LaTeX or a plain expression), by math-verify.
    Its own time-outs are signals and are off: the worker has a deadline."""
    try:
        from math_verify import parse, verify
    except ImportError as e:
        raise ImportError(NEEDS.format("math-verify")) from e
    gold = parse(reference if "$" in reference or "\\" in reference else f"${reference}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"reference {reference!r} is no formula")
    found = parse(text, parsing_timeout=None)
    return float(bool(found) and verify(gold, found, timeout_seconds=None))


def gym(name: str, answer: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's own score of an answer, in [0, 1]."""
    try:
        import reasoning_gym
    except ImportError as e:
        raise ImportError(NEEDS.format("reasoning-gym")) from e
    return float(reasoning_gym.get_score_answer_fn(name)(answer, entry))
