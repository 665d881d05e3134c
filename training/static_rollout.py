"""Rollouts in a CUDA graph: what `rollout.Roller` does, with a decode step that the host has no part in.

Every tensor of a step has a fixed place: a row stays in its slot until it ends, and drawn tokens, hidden states and experts
are written behind each other on the device. So ``chunk`` steps make one graph, which is replayed; only then the host reads
the tokens of the chunk, once, takes out what has ended and fills the slots from the queue. A row that ends within a chunk
decodes on to the chunk's end, and what it draws is left out. Draws are functions of (seed, step), as in `Roller`: with
the same bits in the products (a CPU in float32 with one thread) both give the same rollouts, bit for bit.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3_kernels import linear_cross_entropy
from qwen3_model.model import Qwen3

from .draw import draw
from .rollout import MIN_ROWS, Request, Roller, Rollout, pad_rows

CHUNK = 8
REFILL = 8  # free slots are filled when they are a share of 1 / REFILL, or all that is needed


def roller_for(
    model: Qwen3, *, slots: int, max_len: int, temperature: float, stop_ids: Sequence[int], record_experts: bool,
) -> Roller | StaticRoller:
    """`Roller` on a CPU; on a GPU a `StaticRoller`, which is kept with the model, as capturing its graph takes a second."""
    options = {"slots": slots, "max_len": max_len, "temperature": temperature, "stop_ids": tuple(stop_ids)}
    if not model.head_weight.is_cuda:
        return Roller(model, record_experts=record_experts, **options)
    kept = vars(model).get("_roller")
    if kept is None or kept.options != options:
        vars(model).pop("_roller", None)  # frees its cache before the next one takes memory
        kept = vars(model)["_roller"] = StaticRoller(model, **options)
    kept.reset()
    return kept


class StaticRoller:
    """`Roller` with fixed buffers: `submit`, `step`, `run` and `busy` as there. Experts of mixtures are always recorded.

    chunk: decode steps between two looks of the host. capture: as a CUDA graph; default: on a GPU. Weights may change in
    place when nothing is in flight. Takes slots * max_len * (hidden size + 2 * layers * kv_heads * head_dim) elements.
    """

    def __init__(
        self, model: Qwen3, *, slots: int, max_len: int, temperature: float = 1.0, stop_ids: Sequence[int],
        chunk: int = CHUNK, capture: bool | None = None,
    ):
        Roller.check(model, slots, max_len, temperature)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected at least 1")
        self.options = {"slots": slots, "max_len": max_len, "temperature": temperature, "stop_ids": tuple(stop_ids)}
        self.model = weakref.proxy(model)  # the model holds its roller
        self.slots, self.max_len, self.temperature, self.chunk = slots, max_len, temperature, chunk
        self.stop_ids, self.queue = np.array(sorted(set(stop_ids)), np.int64), deque()
        config, device = model.config, model.head_weight.device
        rows = max(slots, MIN_ROWS)
        self.cache = model.new_cache(rows, max_len)
        self._layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._next, self._seeds, self._steps = integers(rows), integers(rows, 1), integers(rows, 1)
        self._rows, self._ids, self._seen = torch.arange(rows, device=device), integers(rows, max_len), integers(chunk + 1, rows)
        self._hidden = torch.zeros(rows, max_len, config.hidden_size, dtype=model.head_weight.dtype, device=device)
        self._experts = torch.zeros(
            rows, max_len, self._layers, config.num_experts_per_tok if self._layers else 0, dtype=torch.int16, device=device)
        self._graph = None
        self.reset()
        if capture if capture is not None else device.type == "cuda":
            self._capture()

    def reset(self) -> None:
        """Forgets what is queued and in flight."""
        self.queue.clear()
        self._requests: list[Request | None] = [None] * self.slots
        self._drawn, self._limit = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        self.cache.lengths.zero_()

    @property
    def busy(self) -> bool:
        return bool(self.queue) or any(r is not None for r in self._requests)

    submit, run = Roller.submit, Roller.run

    # ---- on the device -------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """``chunk`` tokens in every slot, in place; ``_seen`` holds them behind the token before them."""
        self._seen[0].copy_(self._next)
        for t in range(self.chunk):
            states, experts = self._forward(self._next[:, None], cache=self.cache)
            if self._layers:
                self._experts.index_put_((self._rows, self.cache.lengths.long()), experts)
            self.cache.lengths.add_(1).clamp_(max=self.max_len - 1)  # rows that have ended stay within the cache
            states_SD = states[:, 0]
            ids_S = draw(self.model.head(states_SD), self._seeds + self._steps, self.temperature)
            self._record(self._rows, states_SD, ids_S)
            self._seen[t + 1].copy_(ids_S)

    def _record(self, rows: Tensor, states: Tensor, ids: Tensor) -> None:
        at = (rows, self._steps[rows, 0].clamp(max=self.max_len - 1))
        self._ids.index_put_(at, ids)
        self._hidden.index_put_(at, states)
        self._steps.index_put_((rows,), self._steps[rows] + 1)
        self._next.index_put_((rows,), ids)

    def _forward(self, tokens: Tensor, **options) -> tuple[Tensor, Tensor]:
        if not self._layers:
            return self.model(tokens, return_hidden=True, **options), tokens[:0]
        states, routing = self.model(tokens, return_hidden=True, return_routing=True, **options)
        return states, torch.stack([r.expert_ids for r in routing], 1).short()

    @torch.no_grad()
    def _capture(self) -> None:
        """Runs a chunk, so that every kernel is compiled and tuned, then captures one."""
        training, self.model.training = self.model.training, False
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode()
        self._graph, self.model.training = graph, training
        self._steps.zero_()
        self.reset()

    # ---- on the host ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Rollout]:
        """Fills slots, decodes a chunk, and returns what has ended."""
        if not self.busy:
            return []
        training, self.model.training = self.model.training, False
        free = [s for s, r in enumerate(self._requests) if r is None]
        if self.queue and len(free) >= min(len(self.queue), max(1, self.slots // REFILL)):
            self._prefill(free[: len(self.queue)])
        self._decode() if self._graph is None else self._graph.replay()
        self.model.training = training
        return self._harvest()

    def _prefill(self, slots: list[int]) -> None:
        new = [self.queue.popleft() for _ in slots]
        device, rows = self._next.device, torch.tensor(slots)
        lengths = torch.zeros(len(self._next), dtype=torch.int32)
        lengths[rows] = torch.tensor([len(r.prompt) for r in new], dtype=torch.int32)
        ends = lengths.cumsum(0)
        cu_seqlens = torch.cat((lengths.new_zeros(1), ends.int()))
        tokens = [token for r in new for token in r.prompt]
        if len(tokens) < MIN_ROWS:  # behind the last document; what comes next overwrites it
            cu_seqlens[slots[-1] + 1 :] = MIN_ROWS
            tokens += [0] * (MIN_ROWS - len(tokens))
        rows, lengths, last = rows.to(device), lengths.to(device), (ends[rows] - 1).to(device)
        self.cache.lengths[rows] = 0
        states, experts = self._forward(torch.tensor(tokens, device=device), cache=self.cache, cu_seqlens=cu_seqlens.to(device))
        self.cache.lengths += lengths
        self._steps[rows] = 0
        self._seeds[rows, 0] = torch.tensor([r.seed for r in new], device=device)
        states_ND = states[last]
        logits_NV = self.model.head(pad_rows(states_ND))[: len(new)]
        self._record(rows, states_ND, draw(logits_NV, self._seeds[rows], self.temperature))
        if self._layers:
            where = torch.arange(len(self._next), device=device).repeat_interleave(lengths.long())
            within = torch.arange(int(ends[-1]), device=device) - (lengths.cumsum(0) - lengths)[where]
            self._experts[where, within] = experts[: len(where)]
        for slot, request in zip(slots, new):
            self._requests[slot], self._drawn[slot], self._limit[slot] = request, 1, request.max_tokens

    def _harvest(self) -> list[Rollout]:
        running = np.array([r is not None for r in self._requests])
        stops = np.isin(self._seen[:, : self.slots].cpu().numpy(), self.stop_ids)
        at = np.where(stops.any(0), stops.argmax(0), self.chunk)  # the first stop; in place 0 only of a row that is new
        length = np.minimum(self._drawn + at, self._limit)
        stopped = stops.any(0) & (self._drawn + at <= self._limit)
        done = np.flatnonzero(running & (stopped | (length == self._limit)))
        self._drawn += self.chunk
        if not len(done):
            return []
        rollouts = self._finished(done, length[done], stopped[done])
        for slot in done:
            self._requests[slot] = None
        idle = torch.tensor([s for s, r in enumerate(self._requests) if r is None], device=self._next.device)
        self.cache.lengths[idle] = 0
        return rollouts

    def _finished(self, slots: np.ndarray, lengths: np.ndarray, stopped: np.ndarray) -> list[Rollout]:
        device = self._next.device
        rows = torch.from_numpy(np.repeat(slots, lengths)).to(device)
        at = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        hidden, ids = self._hidden[rows, at], self._ids[rows, at]
        padded = pad_rows(hidden)
        labels = torch.nn.functional.pad(ids, (0, len(padded) - len(ids)))
        _, stats = linear_cross_entropy(
            padded, self.model.head_weight, labels, temperature=self.temperature, reduction="none", return_stats=True
        )
        ids, logprobs, entropies = ids.tolist(), (-stats.nll).tolist(), stats.entropy.tolist()
        done, start = [], 0
        for slot, n, stop in zip(slots.tolist(), lengths.tolist(), stopped.tolist()):
            request, end = self._requests[slot], start + n
            experts = self._experts[slot, : len(request.prompt) + n - 1].to("cpu", copy=True) if self._layers else None
            done.append(Rollout(
                request, ids[start:end], logprobs[start:end], entropies[start:end], "stop" if stop else "length", experts))
            start = end
        return done
