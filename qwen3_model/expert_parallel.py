"""Experts spread over the processes of a group: tokens travel to their experts and back.

A token is sent once to every process that holds any of its experts, with all of its expert numbers and weights; there the
experts of other processes are numbers past the end, which `moe_experts` leaves out, and what comes back is one row, the
weighted sum over the experts there. `Dispatcher` is what a transport has to offer; `AllToAll` is the one on torch's
collectives, for correctness everywhere rather than for speed: the sizes go through the host, and nothing overlaps.
`symmetric.SymmetricMemory` is the one for the GPUs of a single node, which write into each other's memory.

Source: Lepikhin et al. 2020, GShard (arXiv 2006.16668), section 3, for experts on several devices.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3_kernels import moe_experts

# Shape suffixes: N tokens here, M rows received, D model width, K experts per token.


class Sent(NamedTuple):
    """What `combine` needs to know of a dispatch."""

    token: Tensor  # int64 [rows sent]: ordered by process, then token
    sizes: list[int]  # rows sent to each process
    counts: list[list[int]]  # counts[q][p]: rows that process q sends to process p
    N: int


class Dispatcher(Protocol):
    """A transport. Both directions are differentiable, and must be called by all processes of the group."""

    def dispatch(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, Sent]:
        """(x [M, D], ids [M, K], weights [M, K], sent): what this process's experts have to do. Ids count from 0 here;
        those of other processes are the number of experts here."""

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        """[N, D]: the sums over processes of what became of this process's tokens."""


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, dispatcher: Dispatcher
) -> Tensor:
    """`moe_experts` with this process's tokens and its share of the experts: gate_up [E / processes, 2I, D], down alike;
    ids count over all experts.

    Args:
        dispatcher: how tokens travel: `AllToAll`, or `symmetric.SymmetricMemory` on the GPUs of one node; what
            arrives is the same to the bit. One object serves all layers.
    """
    x_MD, ids_MK, weights_MK, sent = dispatcher.dispatch(x, ids, weights)
    return dispatcher.combine(moe_experts(x_MD, gate_up, down, ids_MK, weights_MK), sent)


class AllToAll:
    """On ``torch.distributed.all_to_all_single``: NCCL, or gloo on CPUs.

    Args:
        num_experts: E over all processes; process p of the group holds those from p · E / processes on.
        group: default: all processes.

    Raises ValueError: experts that cannot be shared out evenly.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None):
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if num_experts % self.world:
            raise ValueError(f"AllToAll: num_experts is {num_experts}; expected a multiple of the {self.world} processes")
        self.local = num_experts // self.world

    def dispatch(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, Sent]:
        owner_NK = ids_NK // self.local
        process = torch.arange(self.world, device=ids_NK.device)
        wanted_PN = (owner_NK == process.view(-1, 1, 1)).any(-1)
        sizes = wanted_PN.sum(1)
        counts = sizes.new_empty(self.world, self.world)
        dist.all_gather(list(counts), sizes, group=self.group)
        counts = counts.tolist()
        to, token = wanted_PN.nonzero(as_tuple=True)
        sent = Sent(token, counts[self.rank], counts, x_ND.shape[0])
        here = owner_NK[token] == to.unsqueeze(1)
        ids_SK = torch.where(here, ids_NK[token] - to.unsqueeze(1) * self.local, self.local)
        (ids_MK,) = self.exchange(counts, ids_SK)
        rows = _Gather.apply(x_ND, sent), _Gather.apply(weights_NK, sent)
        x_MD, weights_MK = _Exchange.apply(self.exchange, counts, *rows)
        return x_MD, ids_MK, weights_MK, sent

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        (y_SD,) = _Exchange.apply(self.exchange, _transposed(sent.counts), y_MD)
        return _Scatter.apply(y_SD, sent)

    def exchange(self, counts: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of each tensor, counts[q][p] rows from process q to process p; what comes is ordered by process."""
        sizes, received = counts[self.rank], _transposed(counts)[self.rank]
        out = tuple(t.new_empty(sum(received), *t.shape[1:]) for t in tensors)
        for o, t in zip(out, tensors):
            dist.all_to_all_single(o, t.contiguous(), received, sizes, group=self.group)
        return out


def _transposed(counts: list[list[int]]) -> list[list[int]]:
    return [list(c) for c in zip(*counts)]


def _summed(rows: Tensor, sent: Sent) -> Tensor:
    """[N, ...]: the rows of each token, added in float32 in the order of the processes: no atomics, as a token has at most
    one row from each."""
    out = torch.zeros(sent.N, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for part, token in zip(rows.split(sent.sizes), sent.token.split(sent.sizes)):
        out[token] = out[token] + part
    return out.to(rows.dtype)


class _Gather(torch.autograd.Function):
    """Each token's row, once for every process it is sent to."""

    @staticmethod
    def forward(ctx, rows, sent):
        ctx.sent = sent
        return rows[sent.token]

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.sent), None


class _Scatter(torch.autograd.Function):
    """The sum of what came back for each token."""

    @staticmethod
    def forward(ctx, rows, sent):
        ctx.token = sent.token
        return _summed(rows, sent)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.token], None


class _Exchange(torch.autograd.Function):
    """Rows to the processes; their gradients the way back. Several tensors go in one node, so that all processes exchange
    their gradients in the same order."""

    @staticmethod
    def forward(ctx, exchange, counts, *tensors):
        ctx.exchange, ctx.counts = exchange, counts
        return exchange(counts, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.exchange(_transposed(ctx.counts), *grads)
