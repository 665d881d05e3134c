"""Rollouts by the model that is being trained, in place: no copy of the weights, no second implementation.

Rows are decoded together over one KV cache; a row that ends is refilled from the queue at once. Tokens are drawn from
softmax(logits / temperature), the whole of it, so that what is recorded is the probability they were drawn with.

The recorded log-probabilities come from `linear_cross_entropy` over the hidden states that decoding left, the op and the
temperature of the trainer's loss. The gap to the trainer's, max |d log p|, is then that of decoding against a packed
forward, and it is zero, bit for bit, where both are batch-invariant: on a CPU in float32 with one thread, where this
project's kernels treat every row alike and MKL's products do so from `MIN_ROWS` rows on (fewer take another kernel). Dense
models only: an expert may get one or two tokens. `invariant` says whether it holds for a model here.

Mixtures of experts: a token's experts are recorded as they were routed, for the trainer to replay (routing replay, arXiv
2510.11370): near a tie, the last bits of a hidden state decide otherwise, and the probabilities are of other experts then.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import linear_cross_entropy
from qwen3_model.model import Qwen3
from qwen3_model.sampling import gumbel

MIN_ROWS = 4


@dataclass(frozen=True)
class Request:
    """``key`` comes back with the result; ``seed`` (63 bits, well mixed) fixes the draws, whoever shares the batch."""

    key: object
    prompt: Sequence[int]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Rollout:
    """``ids`` with the stop token; ``logprobs`` and ``entropies`` per id, of the distribution it was drawn from; ``experts``
    int16 [inputs, MoE layers, K] on the CPU: those of the prompt and of all ids but the last, or None."""

    request: Request
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finish_reason: Literal["stop", "length"]
    experts: Tensor | None = None


class _Row:
    def __init__(self, request: Request, slot: int):
        self.request, self.slot = request, slot
        self.ids: list[int] = []
        self.hidden: list[Tensor] = []
        self.experts: list[Tensor] = []  # [tokens, layers, K] each


class Roller:
    """Decodes requests in up to ``slots`` rows of up to ``max_len`` tokens (prompt and completion).

    `submit` queues, `step` draws one token in every row and returns the rollouts that ended; `run` does all of a list.
    Weights may change between steps only when nothing is in flight. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self, model: Qwen3, *, slots: int, max_len: int, temperature: float = 1.0, stop_ids: Sequence[int],
        record_experts: bool = True,
    ):
        self.check(model, slots, max_len, temperature)
        self.model, self.slots, self.max_len, self.temperature = model, slots, max_len, temperature
        self.stop_ids = frozenset(stop_ids)
        self._recording = record_experts and model.config.num_experts > 0
        self.cache = model.new_cache(max(slots, MIN_ROWS), max_len)
        self.queue: deque[Request] = deque()
        self.rows: list[_Row] = []
        device = model.head_weight.device
        self._seeds = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._steps = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._next = torch.zeros(max(slots, MIN_ROWS), dtype=torch.int64, device=device)

    @staticmethod
    def check(model: Qwen3, slots: int, max_len: int, temperature: float) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; expected at least 1")
        if max_len > model.config.max_position_embeddings:
            raise ValueError(f"max_len is {max_len}; expected at most the model's {model.config.max_position_embeddings}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected above 0")

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.queue)

    def submit(self, request: Request) -> None:
        need = len(request.prompt) + request.max_tokens
        if not request.prompt or request.max_tokens < 1 or need > self.max_len:
            raise ValueError(
                f"request {request.key!r}: {len(request.prompt)} tokens of prompt and max_tokens {request.max_tokens}; "
                f"expected at least one of each and together at most {self.max_len}"
            )
        self.queue.append(request)

    def run(self, requests: Sequence[Request]) -> list[Rollout]:
        """In the order of the requests."""
        for request in requests:
            self.submit(request)
        done: dict[int, Rollout] = {}
        while self.busy:
            done |= {id(rollout.request): rollout for rollout in self.step()}
        return [done[id(request)] for request in requests]

    @torch.no_grad()
    def step(self) -> list[Rollout]:
        if not self.busy:
            return []
        training, self.model.training = self.model.training, False
        running = len(self.rows)
        hidden = [self._decode(running)] if running else []
        if self.queue and running < self.slots:
            hidden.append(self._prefill(running))
        self.model.training = training
        return self._draw(torch.cat(hidden))

    def _view(self, rows: int):
        """The cache's first rows."""
        view = copy.copy(self.cache)
        view.batch, view.lengths = rows, self.cache.lengths[:rows]
        view.k, view.v = self.cache.k[:, :rows], self.cache.v[:, :rows]
        return view

    def _decode(self, running: int) -> Tensor:
        """Hidden states [running, D] behind each row's last token."""
        rows = max(running, MIN_ROWS)  # the rest compute on whatever is there
        cache = self._view(rows)
        states, experts = self._forward(self._next[:rows, None], cache)
        cache.lengths[:running] += 1
        for row, ids in zip(self.rows, experts):
            row.experts.append(ids[None])
        return states[:running, 0]

    def _prefill(self, running: int) -> Tensor:
        """Starts requests in the free rows; hidden states [new, D] at the ends of their prompts."""
        new = [self.queue.popleft() for _ in range(min(self.slots - running, len(self.queue)))]
        lengths = torch.tensor([0] * running + [len(r.prompt) for r in new], dtype=torch.int32)
        device = self._next.device
        ends = lengths.cumsum(0)
        cu_seqlens = torch.cat((lengths.new_zeros(1), ends.int()))
        tokens = [token for r in new for token in r.prompt]
        if len(tokens) < MIN_ROWS:  # the last row is padded on the right; what comes next overwrites it
            tokens += [0] * (MIN_ROWS - len(tokens))
            cu_seqlens[-1] = MIN_ROWS
        cache = self._view(running + len(new))
        cache.lengths[running:] = 0
        states, experts = self._forward(torch.tensor(tokens, device=device), cache, cu_seqlens=cu_seqlens.to(device))
        cache.lengths += lengths.to(device)
        self.rows += [_Row(r, running + i) for i, r in enumerate(new)]
        if self._recording:
            for row, ids in zip(self.rows[running:], experts[: ends[-1]].split(lengths[running:].tolist())):
                row.experts.append(ids)
        self._seeds[running : running + len(new), 0] = torch.tensor([r.seed for r in new]).to(device)
        self._steps[running : running + len(new)] = 0
        return states[(ends[running:] - 1).to(device)]

    def _forward(self, tokens: Tensor, cache, **options: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, experts int16 [tokens, layers, K], empty when they are not recorded)"""
        if not self._recording:
            return self.model(tokens, cache=cache, return_hidden=True, **options), tokens[:0]
        states, routing = self.model(tokens, cache=cache, return_hidden=True, return_routing=True, **options)
        return states, torch.stack([r.expert_ids for r in routing], 1).short()

    def _draw(self, hidden_BD: Tensor) -> list[Rollout]:
        n = len(self.rows)
        logits_BV = self.model.head(pad_rows(hidden_BD))[:n].float() / self.temperature
        tokens = torch.arange(logits_BV.shape[1], device=logits_BV.device)[None]
        ids_B = (logits_BV + gumbel(self._seeds[:n] + self._steps[:n], tokens)).argmax(-1)
        self._steps[:n] += 1
        self._next[:n] = ids_B
        ended = []
        for row, token, state in zip(self.rows, ids_B.tolist(), hidden_BD):
            row.ids.append(token)
            row.hidden.append(state)
            if token in self.stop_ids or len(row.ids) == row.request.max_tokens:
                ended.append(row)
        if not ended:
            return []
        done = self._finished(ended)
        for row in sorted(ended, key=lambda r: -r.slot):  # the last row moves into the gap
            last = self.rows.pop()
            if last is not row:
                for t in (self.cache.k, self.cache.v):
                    t[:, row.slot].copy_(t[:, last.slot])
                for t in (self.cache.lengths, self._seeds, self._steps, self._next):
                    t[row.slot] = t[last.slot]
                last.slot = row.slot
                self.rows[row.slot] = last
        self.cache.lengths[len(self.rows) :] = 0
        return done

    def _finished(self, rows: list[_Row]) -> list[Rollout]:
        hidden = torch.stack([state for row in rows for state in row.hidden])
        ids = torch.tensor([token for row in rows for token in row.ids], device=hidden.device)
        padded = pad_rows(hidden)
        labels = F.pad(ids, (0, len(padded) - len(ids)))
        _, stats = linear_cross_entropy(
            padded, self.model.head_weight, labels, temperature=self.temperature, reduction="none", return_stats=True
        )
        logprobs, entropies = (-stats.nll).tolist(), stats.entropy.tolist()
        done, start = [], 0
        for row in rows:
            end = start + len(row.ids)
            reason = "stop" if row.ids[-1] in self.stop_ids else "length"
            experts = torch.cat(row.experts).cpu() if self._recording else None
            done.append(Rollout(row.request, row.ids, logprobs[start:end], entropies[start:end], reason, experts))
            start = end
        return done


def pad_rows(x_ND: Tensor) -> Tensor:
    """With zeros behind, at least MIN_ROWS rows."""
    return x_ND if len(x_ND) >= MIN_ROWS else F.pad(x_ND, (0, 0, 0, MIN_ROWS - len(x_ND)))


@torch.no_grad()
def invariant(model: Qwen3, rows: int = 64) -> bool:
    """Whether every linear layer's result for a row is the same bits whatever rows are beside it, from MIN_ROWS on. The
    answer holds for this machine, dtype and number of threads."""
    if model.config.num_experts:
        return False
    matrices = {tuple(p.shape): p for p in model.parameters() if p.dim() == 2}
    for w in matrices.values():
        x = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(0)).to(w.device, w.dtype)
        whole = F.linear(x, w)
        if any(not torch.equal(F.linear(x[:n], w), whole[:n]) for n in range(MIN_ROWS, rows)):
            return False
    return True
