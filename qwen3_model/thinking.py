"""Thinking: the budget that ends it, and a chat turn with its token counts.

Source: Qwen3 Technical Report, sections 4.3 (thinking mode fusion, thinking budget), and Qwen's example code for the
exact inserted text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .chat import Parsed, encode_chat, parse, thinking_mode
from .generate import Completion, Guide, generate
from .model import Qwen3
from .sampling import NON_THINKING, THINKING, SamplingParams
from .tokenizer import Tokenizer

EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
"""What ends the thinking when the budget is spent, as Qwen's code inserts it."""


class ThinkingBudget:
    """A guide for `generate` that lets a completion think for `budget` tokens.

    When the first `budget` generated ids hold no `</think>`, the ids of EARLY_STOP come next (24 with Qwen3's
    vocabulary), then the model goes on with its answer. The ids before the end of the thinking all count, `<think>`
    too; the inserted ones count towards max_tokens. A completion that has not begun to think is left alone.

    Args:
        budget: tokens. Without an open think block at least 1, as the model itself must write `<think>`; to forbid
            thinking there, render the prompt with enable_thinking=False.
        thinking_open: the prompt ends in `<think>` (thinking-2507), so that all is thinking from the start; then a
            budget of 0 inserts the text at once.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int, *, thinking_open: bool = False):
        low = 0 if thinking_open else 1
        if type(budget) is not int:
            raise TypeError(f"thinking_budget: got {budget!r}; expected an integer, {low} or more")
        if budget < low:
            raise ValueError(f"thinking_budget: got {budget}; expected {low} or more")
        self.budget, self.thinking_open = budget, thinking_open
        self.early_stop = tuple(tokenizer.encode(EARLY_STOP))
        self._think, self._end_think = tokenizer.think_id, tokenizer.end_think_id

    def __call__(self, ids: Sequence[int]) -> Sequence[int]:
        if len(ids) != self.budget or self._end_think in ids:
            return ()
        return self.early_stop if self.thinking_open or self._think in ids else ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a turn. `thinking_tokens`, part of `completion_tokens`, are those up to `</think>`, inserted ones
    included; an empty think block in the prompt counts there."""

    prompt_tokens: int
    completion_tokens: int
    thinking_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reply:
    """One assistant turn: what was said (`parsed.message()` continues the conversation), the generated ids, and counts.
    `early_stopped`: the thinking budget ran out."""

    parsed: Parsed
    ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    early_stopped: bool


@dataclass(frozen=True)
class Turn:
    """What `generate` or `stream` need for an assistant turn, and `reply` to read its result."""

    prompt: list[int]
    params: SamplingParams
    guide: Guide | None
    thinking_open: bool
    """The prompt ends inside a think block."""


def thinks(
    messages: Sequence[Mapping[str, Any]], *, enable_thinking: bool | None = None, thinking_budget: int | None = None,
    variant: str = "hybrid",
) -> bool:
    """Whether the next assistant turn is asked to think. Arguments and errors as `chat`."""
    _check_budget(thinking_budget, variant)
    if variant == "hybrid":
        return thinking_mode(messages, enable_thinking) and thinking_budget != 0
    return variant == "thinking-2507"


def prepare(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, params: SamplingParams | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None, enable_thinking: bool | None = None,
    thinking_budget: int | None = None, variant: str = "hybrid",
) -> Turn:
    """The prompt, parameters and guide of the next assistant turn. Arguments and errors as `chat`."""
    _check_budget(thinking_budget, variant)
    if thinking_budget == 0 and variant == "hybrid":
        enable_thinking = False
    prompt = encode_chat(tokenizer, messages, tools=tools, enable_thinking=enable_thinking, variant=variant)
    opened, guide = variant == "thinking-2507", None
    thinking = thinks(messages, enable_thinking=enable_thinking, thinking_budget=thinking_budget, variant=variant)
    params = params or (THINKING if thinking else NON_THINKING)
    if thinking and thinking_budget is not None:
        guide = ThinkingBudget(tokenizer, thinking_budget, thinking_open=opened)
        needed = thinking_budget + len(guide.early_stop)
        if params.max_tokens <= needed:
            raise ValueError(
                f"max_tokens: got {params.max_tokens}; expected over {needed}, to leave room for an answer after a "
                f"thinking_budget of {thinking_budget} and the {len(guide.early_stop)} tokens that end the thinking"
            )
    return Turn(prompt, params, guide, opened)


def chat(
    model: Qwen3, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, params: SamplingParams | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None, enable_thinking: bool | None = None,
    thinking_budget: int | None = None, variant: str = "hybrid",
) -> Reply:
    """Generates the next assistant turn of a conversation.

    Args:
        messages, tools, enable_thinking, variant: as `chat.render`. In a hybrid model the last `/think` or `/no_think`
            in the conversation asks for thinking or not, unless enable_thinking=False forbids it.
        params: default THINKING or NON_THINKING, as the turn is to think or not.
        thinking_budget: most tokens to think (see ThinkingBudget); no effect on a turn that does not think. 0 is the
            same as enable_thinking=False for a hybrid model, and ends the thinking at once for thinking-2507. What is
            left for the answer is max_tokens minus the thinking, the inserted text included.

    Raises ValueError or TypeError for malformed messages and options, for a max_tokens that the thinking alone could
    use up, and as `generate`.
    """
    turn = prepare(
        tokenizer, messages, params=params, tools=tools, enable_thinking=enable_thinking,
        thinking_budget=thinking_budget, variant=variant,
    )
    completion = generate(model, [turn.prompt], turn.params, tokenizer=tokenizer, guides=[turn.guide])[0]
    return reply(turn, completion, tokenizer)


def reply(turn: Turn, completion: Completion, tokenizer: Tokenizer) -> Reply:
    """Reads the completion of a turn."""
    ids = completion.ids
    parsed = parse(ids, tokenizer, thinking_open=turn.thinking_open)
    usage = Usage(len(turn.prompt), len(ids), _thinking_tokens(ids, parsed, tokenizer))
    return Reply(parsed, ids, completion.finish_reason, usage, bool(completion.forced))


def _thinking_tokens(ids: Sequence[int], parsed: Parsed, tokenizer: Tokenizer) -> int:
    if parsed.thinking is None:
        return 0
    if not parsed.complete:
        return len(ids)
    return len(ids) - list(reversed(ids)).index(tokenizer.end_think_id)


def _check_budget(budget: int | None, variant: str) -> None:
    if budget is None:
        return
    if type(budget) is not int:
        raise TypeError(f"thinking_budget: got {budget!r}; expected an integer, 0 or more")
    if budget < 0:
        raise ValueError(f"thinking_budget: got {budget}; expected 0 or more")
    if variant == "instruct-2507":
        raise ValueError(f"thinking_budget: got {budget}; instruct-2507 does not think, expected None")
