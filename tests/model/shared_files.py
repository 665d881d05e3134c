"""A `symmetric.Buffer` of shared CPU memory: the place of peers' GPU memory in tests."""

import time
from pathlib import Path

import torch
import torch.distributed as dist


class SharedFiles:
    """Files that all processes map. Those of odd rank are late after every barrier: a barrier that is missing shows."""

    def __init__(self, folder: str, size: int, group: dist.ProcessGroup | None = None):
        self.group, self.rank = group, dist.get_rank(group)
        files = [Path(folder) / f"{size}-{p}" for p in range(dist.get_world_size(group))]
        own = files[self.rank]
        assert not own.exists(), f"a buffer of {size} bytes is made twice"
        own.write_bytes(b"\xff" * size)  # NaN where nothing is written
        dist.barrier(group)
        self.parts = [torch.from_file(str(f), shared=True, size=size, dtype=torch.uint8) for f in files]

    def barrier(self) -> None:
        dist.barrier(self.group)
        time.sleep(0.01 * (self.rank % 2))
