"""A `symmetric.Buffer` of shared CPU memory: the place of peers' GPU memory in tests."""

import time
from pathlib import Path

import torch
import torch.distributed as dist


class SharedFiles:
    """Files that all processes map. Those of odd rank are late after every barrier: a barrier that is missing shows."""

    def __init__(self, folder: str, size: int, group: dist.ProcessGroup | None = None):
        self.group, self.rank, made = group, dist.get_rank(group), []
        for _ in range(dist.get_world_size(group)):
            made.append(Path(folder) / f"{size}-{len(made)}")
        assert not made[self.rank].exists(), f"a buffer of {size} bytes is made twice"
        own = torch.from_file(str(made[self.rank]), shared=True, size=size, dtype=torch.uint8)
        own.fill_(255)  # rows of NaN where nothing is written
        dist.barrier(group)
        self.parts = [torch.from_file(str(f), shared=True, size=size, dtype=torch.uint8) for f in made]

    def barrier(self) -> None:
        dist.barrier(self.group)
        time.sleep(0.02 * (self.rank % 2))
