"""Generation: one packed prefill of all prompts, then batched decoding over a KV cache that finished rows leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Literal

import torch
from torch import Tensor

from .cache import KVCache
from .model import Qwen3
from .sampling import Sampler, SamplingParams
from .tokenizer import Tokenizer

Guide = Callable[[Sequence[int]], Sequence[int]]
"""Called with the ids generated so far before every token that is not yet forced; returns the ids that must come next,
usually none. It must be a pure function of the ids. `thinking.ThinkingBudget` is one."""

# Slots allocated beyond the longest prompt; doubled when they run out.
_SLACK = 256


@dataclass(frozen=True)
class Completion:
    """What one request generated.

    Attributes:
        ids: all generated ids, including the stop token.
        text: their text without special tokens, ending before the stop token or stop string; None without a tokenizer.
        finish_reason: "stop" (stop token or string) or "length" (max_tokens, or the model's context is full).
        logprobs: log-probability of every id in the model's own distribution (see SamplingParams); None if not asked.
        top_logprobs: per id the most likely (id, log-probability), best first; None if not asked.
        forced: positions in ids of the tokens that a guide inserted; the others were sampled.
    """

    ids: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    forced: list[int]


@dataclass(frozen=True)
class Event:
    """One generated token. `request` is the prompt's index; `text` is what is now certain to be part of the
    completion's text, whole characters only, often empty or of earlier tokens; `completion` is set on a request's last
    event."""

    request: int
    id: int
    text: str
    completion: Completion | None


def generate(
    model: Qwen3, prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(), *, tokenizer: Tokenizer | None = None,
    guides: Sequence[Guide | None] | None = None,
) -> list[Completion]:
    """Completions of the prompts, in their order. Arguments and errors as `stream`."""
    events = stream(model, prompts, params, tokenizer=tokenizer, guides=guides)
    done = {event.request: event.completion for event in events if event.completion}
    return [done[i] for i in range(len(prompts))]


def stream(
    model: Qwen3, prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(), *, tokenizer: Tokenizer | None = None,
    guides: Sequence[Guide | None] | None = None,
) -> Iterator[Event]:
    """Generates for all prompts at once and yields every token as it comes.

    Args:
        prompts: ids of each prompt, of any lengths. All are decoded together; the cache takes
            2 * layers * kv_heads * head_dim elements per token and row.
        params: for all prompts, or one per prompt.
        tokenizer: gives the text, stop strings, and the stop ids of params that name none.
        guides: per prompt, what forces tokens (see Guide), or None.

    A prompt and its completion together fill at most the model's context, config.max_position_embeddings.
    Raises ValueError or TypeError, before generating, for a prompt that is empty, has an id outside of the vocabulary
    or leaves no room in the context, and for arguments that do not fit together.
    """
    return _run(model, _requests(model, prompts, params, tokenizer, guides))


@torch.inference_mode()
def _run(model: Qwen3, rows: list[_Request]) -> Iterator[Event]:
    if not rows:
        return
    device, config = model.head_weight.device, model.config
    longest = max(len(r.prompt) + r.limit for r in rows)
    cache = model.new_cache(len(rows), min(longest, max(len(r.prompt) for r in rows) + _SLACK))
    sampler = Sampler([r.params for r in rows], [r.prompt for r in rows], config.vocab_size, device)
    logits_BV = _prefill(model, cache, [r.prompt for r in rows])
    while True:
        ids_B = sampler.sample(logits_BV)
        forced = [r.forced_token() for r in rows]
        if any(token is not None for token in forced):
            chosen = [drawn if token is None else token for drawn, token in zip(ids_B.tolist(), forced)]
            ids_B = torch.tensor(chosen, device=device)
        logprobs = sampler.logprobs(logits_BV, ids_B)
        sampler.accept(ids_B)
        events = [r.push(*token) for r, *token in zip(rows, ids_B.tolist(), forced, logprobs)]
        yield from events
        if any(event.completion for event in events):
            stay = _close_gaps([event.completion is not None for event in events])
            if not stay:
                return
            _keep_rows(cache, stay)
            sampler.keep(stay)
            rows, ids_B = [rows[i] for i in stay], ids_B[stay]
        if max(r.length for r in rows) > cache.max_len:
            cache = _grown(model, cache, min(longest, 2 * cache.max_len))
        logits_BV = model(ids_B[:, None], cache=cache)[:, 0]
        cache.advance(1)


def _prefill(model: Qwen3, cache: KVCache, prompts: list[list[int]]) -> Tensor:
    """Fills the cache and returns the logits [B, V] that follow each prompt."""
    device = cache.k.device
    tokens_N = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    ends_B = lengths_B.cumsum(0)
    cu_seqlens = torch.cat((ends_B.new_zeros(1), ends_B)).int()
    hidden_NH = model(tokens_N, cu_seqlens=cu_seqlens, cache=cache, return_hidden=True)
    cache.advance(lengths_B)
    return model.head(hidden_NH[ends_B - 1])


def _grown(model: Qwen3, cache: KVCache, max_len: int) -> KVCache:
    grown = model.new_cache(cache.batch, max_len)
    grown.k[:, :, : cache.max_len], grown.v[:, :, : cache.max_len] = cache.k, cache.v
    grown.advance(cache.lengths)
    return grown


def _close_gaps(finished: list[bool]) -> list[int]:
    """The rows that stay, the last ones in the places of those that leave: the least copying."""
    stay = list(range(len(finished)))
    for row in reversed(range(len(finished))):
        if finished[row]:
            stay[row] = stay[-1]
            stay.pop()
    return stay


def _keep_rows(cache: KVCache, stay: list[int]) -> None:
    """Moves row stay[i] to row i, which `_close_gaps` made free, and drops the rest."""
    for row, source in enumerate(stay):
        if row != source:
            for t in (cache.k, cache.v):
                t[:, row].copy_(t[:, source])
            cache.lengths[row] = cache.lengths[source]
    cache.batch = len(stay)
    cache.k, cache.v, cache.lengths = cache.k[:, : len(stay)], cache.v[:, : len(stay)], cache.lengths[: len(stay)]


class _Request:
    """One row's state on the host. `limit` is the most tokens it may generate."""

    def __init__(
        self, index: int, prompt: list[int], params: SamplingParams, limit: int, vocab_size: int, text: _Text | None,
        guide: Guide | None,
    ):
        self.index, self.prompt, self.params, self.limit = index, prompt, params, limit
        self._stop_ids, self._vocab_size, self._text, self._guide = frozenset(params.stop_ids), vocab_size, text, guide
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self._forced: list[int] = []
        self._queue: deque[int] = deque()

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self._ids)

    def forced_token(self) -> int | None:
        """The next token, unless it is to be sampled."""
        if self._guide is not None and not self._queue:
            for token in self._guide(self._ids):
                _check_id(f"guides[{self.index}]: gave", token, self._vocab_size)
                self._queue.append(token)
        return self._queue.popleft() if self._queue else None

    def push(self, token: int, forced: int | None, logprobs: tuple[float, list[tuple[int, float]]] | None) -> Event:
        if forced is not None:
            self._forced.append(len(self._ids))
        self._ids.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        piece, stopped = "", token in self._stop_ids
        if self._text is not None and not stopped:
            piece, stopped = self._text.push(token)
        done = stopped or len(self._ids) == self.limit
        if self._text is not None and done:
            piece += self._text.finish()
        self._pieces.append(piece)
        return Event(self.index, token, piece, self._completion("stop" if stopped else "length") if done else None)

    def _completion(self, reason: Literal["stop", "length"]) -> Completion:
        p = self.params
        return Completion(
            ids=self._ids,
            text=None if self._text is None else "".join(self._pieces),
            finish_reason=reason,
            logprobs=None if p.logprobs is False else [logprob for logprob, _ in self._logprobs],
            top_logprobs=[top for _, top in self._logprobs] if p.top_logprobs else None,
            forced=self._forced,
        )


class _Text:
    """The text of ids that come one by one, held back while it may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream, self._stop, self._held = tokenizer.stream(skip_special=True), stop, ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string has come; the text ends before it."""
        text = self._held + self._stream.push(token)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self._stream.finish()
            self._held = ""
            return text[: min(found)], True
        held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """The rest of the text, when no more ids come."""
        rest, self._held = self._held + self._stream.finish(), ""
        return rest


def _requests(
    model: Qwen3, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams],
    tokenizer: Tokenizer | None, guides: Sequence[Guide | None] | None,
) -> list[_Request]:
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: got {short(prompts)}; expected a list with one list of ids per prompt")
    n = len(prompts)
    params = [params] * n if isinstance(params, SamplingParams) else list(params)
    guides = [None] * n if guides is None else list(guides)
    for name, values in (("params", params), ("guides", guides)):
        if len(values) != n:
            raise ValueError(f"{name}: got {len(values)} for {n} prompts; expected one per prompt")
    stop_ids = tokenizer.stop_ids if tokenizer else _ids_of(model.config.eos_token_id)
    requests = []
    for i, (prompt, p, guide) in enumerate(zip(prompts, params, guides)):
        if not isinstance(p, SamplingParams):
            raise TypeError(f"params[{i}]: got {short(p)}; expected SamplingParams")
        if p.stop and tokenizer is None:
            raise ValueError(f"params[{i}].stop: got {p.stop!r} without a tokenizer; stop strings need one")
        if guide is not None and not callable(guide):
            raise TypeError(f"guides[{i}]: got {short(guide)}; expected a callable or None")
        prompt = _checked_prompt(f"prompts[{i}]", prompt, model.config.vocab_size)
        room = model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise ValueError(
                f"prompts[{i}]: has {len(prompt)} tokens; expected fewer than the model's context, "
                f"{model.config.max_position_embeddings}"
            )
        p = replace(p, stop_ids=stop_ids if p.stop_ids is None else p.stop_ids)
        text = _Text(tokenizer, p.stop) if tokenizer else None
        requests.append(_Request(i, prompt, p, min(p.max_tokens, room), model.config.vocab_size, text, guide))
    return requests


def _checked_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> list[int]:
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(f"{name}: got {short(prompt)}; expected a list of ids, tokenizer.encode(text) for a text")
    if not prompt:
        raise ValueError(f"{name}: is empty; expected at least one id")
    for at, token in enumerate(prompt):
        _check_id(f"{name}[{at}]: got", token, vocab_size)
    return list(prompt)


def _check_id(got: str, token: int, vocab_size: int) -> None:
    if type(token) is not int:
        raise TypeError(f"{got} {token!r}; expected an int")
    if not 0 <= token < vocab_size:
        raise ValueError(f"{got} id {token}; expected 0 to {vocab_size - 1}")


def _ids_of(eos_token_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id or ()
