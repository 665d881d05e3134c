"""Run by test_trl in two processes: one training step under FSDP2 on gloo against the same step in one process."""

import json
import sys

import torch
import torch.distributed as dist
from tiny_hf import batch, make, step
from torch.distributed.fsdp import fully_shard

from qwen3_kernels.integrations.transformers import apply, revert


def sharded(kind: str, patch_first: bool):
    model = make(kind, output_router_logits=False)
    if patch_first:
        apply(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)  # a group of its own: the weight is whole within its own call alone
    fully_shard(model)
    if not patch_first:
        layer = type(model).__name__.removeprefix("FSDP").replace("ForCausalLM", "DecoderLayer")
        assert apply(model).patched["rms_norm"][layer] == 2
    return model


def main(rank: int, store: str, kind: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    whole = batch(rows=2)
    single = step(make(kind, output_router_logits=False), whole)
    part = {k: v[rank : rank + 1] for k, v in whole.items()}
    errors = {}
    for patch_first in (True, False):
        model = sharded(kind, patch_first)
        model.zero_grad()
        out = model(**part)
        assert out.logits is None
        out.loss.backward()
        loss = out.loss.detach().clone()
        dist.all_reduce(loss, dist.ReduceOp.SUM)
        got = {"loss": loss / 2} | {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        assert got.keys() == single.keys()
        errors[f"patched {'before' if patch_first else 'after'} fully_shard"] = max(
            float((got[n] - single[n]).norm() / single[n].norm()) for n in single
        )
        revert()
    if rank == 0:
        with open(path, "w") as f:
            json.dump(errors, f)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
