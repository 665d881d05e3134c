"""Experts spread over the GPUs of one node: every process writes its rows into the memory of the GPU that wants them.

`SymmetricMemory` is `expert_parallel.AllToAll` with another `exchange`. All processes know all counts, so each knows
where in its peers' buffers its rows belong. Between two barriers it writes them there; then each takes what has come
out of its own buffer. Only copies and barriers are queued on the GPU; the counts go through the host, as in `AllToAll`.

Tested bit for bit against `AllToAll`: offsets, gradients, growth and reuse on 2 to 4 gloo processes whose buffers are shared CPU
memory (tests/model/test_expert_parallel.py), and all of it on 2 and 4 H100 with torch 2.11 (tests/model/symmetric_gpu.py). NCCL
was faster there, by 2 to 9 % with dispatch, combination and backward. torch still counts symmetric memory as alpha.

Source of the buffers: PyTorch's manual, "PyTorch Symmetric Memory" (docs.pytorch.org/docs/2.11/symmetric_memory.html).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .expert_parallel import AllToAll

SMALLEST = 1 << 25  # bytes of the smallest buffer
ALIGNMENT = 16  # bytes: where the rows of a tensor may start
TIMEOUT_MS = 600_000  # NCCL's default too: a process that waits longer for its peers ends with an error


class Buffer(Protocol):
    """Memory of each process that all processes of the group can write. All make one together, of equal size."""

    parts: list[Tensor]  # uint8 [bytes] each: the memory of every process, as this one sees it

    def barrier(self) -> None:
        """What any process wrote before it can be read by any process after it."""


class SymmetricMemory(AllToAll):
    """Into the peers' memory: for GPUs of one node that reach each other (NVLink, or PCIe with peer access).

    All processes make it together, each with its GPU as the current device, and use it on one stream. Buffers are of
    2^n bytes, from 32 MiB on; each size is made once, when first needed, and kept: all of them together take less than
    four times the bytes of the largest exchange, if that fills the smallest.

    Args:
        num_experts, group: as for `AllToAll`.
        buffer: makes a `Buffer` of so many bytes for a group.

    Raises ValueError: experts that cannot be shared out evenly. RuntimeError: no CUDA, no symmetric memory in this
    torch, processes on several nodes or on the same GPU, GPUs without access to each other.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        buffer: Callable[[int, dist.ProcessGroup | None], Buffer] | None = None,
    ):
        super().__init__(num_experts, group)
        self.make, self.buffers = buffer or PeerBuffer, {}
        self._buffer(0)  # what is missing is said here rather than in the first step

    @torch.no_grad()  # buffers outlive a step: no graph may grow on them
    def exchange(self, counts: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        most = max(map(sum, zip(*counts)))  # rows any process receives; so a tensor starts at the same byte everywhere
        starts, size = [], 0
        for t in tensors:
            starts.append(size)
            size += -(-most * _row_bytes(t) // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(size)

        def rows(t: Tensor, start: int, source: int, target: int) -> Tensor:
            """Where the target's buffer holds what the source sends it of this tensor."""
            first, n = sum(c[target] for c in counts[:source]), counts[source][target]
            span = buffer.parts[target][start + first * _row_bytes(t) : start + (first + n) * _row_bytes(t)]
            return span.view(t.dtype).view(n, *t.shape[1:])

        me, own = self.rank, [t.split(counts[self.rank]) for t in tensors]
        buffer.barrier()  # all have taken what came before
        for p in [*range(me + 1, self.world), *range(me)]:  # not all to the same one at once
            for t, start, parts in zip(tensors, starts, own):
                rows(t, start, me, p).copy_(parts[p])
        buffer.barrier()  # all have written
        out = []
        for t, start, parts in zip(tensors, starts, own):
            out.append(torch.cat([parts[me] if q == me else rows(t, start, q, me) for q in range(self.world)]))
        return tuple(out)

    def _buffer(self, size: int) -> Buffer:
        """One of at least `size` bytes: the same number everywhere, so all processes make a new one together."""
        size = max(SMALLEST, 1 << (size - 1).bit_length())
        if size not in self.buffers:
            self.buffers[size] = self.make(size, self.group)
        return self.buffers[size]


class PeerBuffer:
    """A `Buffer` on the current CUDA device, by torch's symmetric memory. RuntimeError as for `SymmetricMemory`."""

    def __init__(self, size: int, group: dist.ProcessGroup | None = None):
        if not torch.cuda.is_available():
            raise RuntimeError("SymmetricMemory: CUDA is not available; expected a GPU for every process, or AllToAll")
        try:
            from torch.distributed import _symmetric_memory as symmetric
        except ImportError as e:
            lacks = f"SymmetricMemory: torch {torch.__version__} has no symmetric memory; expected 2.11 or later"
            raise RuntimeError(lacks) from e
        device = torch.cuda.current_device()
        places: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(places, (socket.gethostname(), device), group=group)
        check_places(places, torch.cuda.can_device_access_peer)
        self.memory = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
        self.handle = symmetric.rendezvous(self.memory, group or dist.group.WORLD)
        self.parts = [self.handle.get_buffer(p, (size,), torch.uint8) for p in range(len(places))]

    def barrier(self) -> None:
        self.handle.barrier(timeout_ms=TIMEOUT_MS)


def check_places(places: list[tuple[str, int]], access: Callable[[int, int], bool]) -> None:
    """The (host, CUDA device) of every process; RuntimeError if their GPUs cannot write into each other's memory."""
    hosts, devices = {host for host, _ in places}, [device for _, device in places]
    if len(hosts) > 1:
        raise RuntimeError(f"SymmetricMemory: processes on hosts {sorted(hosts)}; expected one host, or AllToAll")
    if len(set(devices)) < len(devices):
        raise RuntimeError(
            f"SymmetricMemory: CUDA devices by process are {devices}; expected a different one for each: call "
            "torch.cuda.set_device(LOCAL_RANK) first, with all GPUs in CUDA_VISIBLE_DEVICES"
        )
    for a in devices:
        if far := [b for b in devices if b != a and not access(a, b)]:
            raise RuntimeError(f"SymmetricMemory: device {a} has no peer access to {far}; expected NVLink or PCIe")


def _row_bytes(t: Tensor) -> int:
    return t.shape[1:].numel() * t.element_size()
