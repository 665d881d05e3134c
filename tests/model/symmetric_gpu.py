"""Tokens through peers' memory against NCCL's all_to_all_single on 2 GPUs: forward and backward bitwise, and the times.

    torchrun --nproc-per-node 2 tests/model/symmetric_gpu.py

The first process prints one line, "OK" or "FAIL" and why, with the times; it all ends within a minute, hanging or not.
Not a pytest file: it needs two GPUs. `compare` is also what the CPU tests call.
"""

import faulthandler
import os
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from qwen3_model.expert_parallel import AllToAll, Dispatcher  # noqa: E402
from qwen3_model.symmetric import SymmetricMemory  # noqa: E402

SECONDS = 50
REPEATS = 20
E, K, D = 128, 8, 2048
TOKENS = [(700, 700), (8192, 8192), (33, 9000), (0, 512), (1, 0), (0, 0), (12000, 5)]  # by process: growing and shrinking
TO = [range(E), range(E // 2), range(E // 2, E)]  # all experts; those of the first, of the second process


def inputs(n: int, width: int, to: Sequence[int], k: int, dtype: torch.dtype, device: str, seed: int) -> list[torch.Tensor]:
    """x [n, width], ids [n, k] among `to`, weights [n, k] in float32, and a gradient for the output."""
    g = torch.Generator(device).manual_seed(seed * dist.get_world_size() + dist.get_rank())
    x = torch.randn(n, width, device=device, generator=g).to(dtype)
    ids = torch.rand(n, len(to), device=device, generator=g).argsort(1)[:, :k] + to[0]
    weights = torch.rand(n, k, device=device, generator=g)
    return [x, ids, weights, torch.randn(n, width, device=device, generator=g).to(dtype)]


def step(dispatcher: Dispatcher, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What arrives, and what comes back of a stand-in for experts in which every input counts."""
    x_MD, ids_MK, weights_MK, sent = dispatcher.dispatch(x, ids, weights)
    y_MD = x_MD * (weights_MK * (ids_MK + 1)).sum(1, keepdim=True).to(x.dtype)
    return {"x there": x_MD, "ids there": ids_MK, "weights there": weights_MK, "out": dispatcher.combine(y_MD, sent)}


def compare(
    wanted: Dispatcher, got: Dispatcher, n: int, width: int, to: Sequence[int], k: int, dtype: torch.dtype, device: str, seed: int
) -> list[str]:
    """The tensors and gradients that are not the same to the bit."""
    x, ids, weights, dout = inputs(n, width, to, k, dtype, device, seed)
    both = []
    for dispatcher in (wanted, got):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        tensors = step(dispatcher, leaves[0], ids, leaves[1])
        gradients = torch.autograd.grad(tensors["out"], leaves, dout)
        both.append(tensors | dict(zip(("x gradient", "weights gradient"), gradients)))
    return [name for name in both[0] if not torch.equal(both[0][name], both[1][name])]


def milliseconds(*calls: Callable[[], object]) -> list[float]:
    """Medians over REPEATS of each, in turns, on the GPU's clock; the slowest process counts."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 3):  # the first three warm up
        for call, ms in zip(calls, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.barrier()
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            ms.append(start.elapsed_time(end))
    medians = torch.tensor([statistics.median(ms[3:]) for ms in times], device="cuda")
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return medians.tolist()


def timed(nccl: AllToAll, ours: SymmetricMemory) -> str:
    x, ids, weights, dout = inputs(8192, D, range(E), K, torch.bfloat16, "cuda", 7)
    leaves = x.requires_grad_(), weights.requires_grad_()
    _, _, _, sent = nccl.dispatch(x.detach(), ids, weights.detach())
    rows = x.detach()[sent.token]
    forward = [lambda d=d: step(d, x.detach(), ids, weights.detach()) for d in (nccl, ours)]
    train = [lambda d=d: torch.autograd.grad(step(d, leaves[0], ids, leaves[1])["out"], leaves, dout) for d in (nccl, ours)]
    alone = [lambda d=d: d.exchange(sent.counts, rows) for d in (nccl, ours)]
    names = "exchange of rows alone", "dispatch + combine", "the same with backward"
    told = [f"{name} {a:.3f} / {b:.3f}" for name, (a, b) in zip(names, (milliseconds(*c) for c in (alone, forward, train)))]
    sizes = [8192, sent.sizes[1 - dist.get_rank()]]
    return f"ms, NCCL / ours, {sizes[0]} x {D} bf16 to {K} of {E} ({sizes[1]} rows to the peer): {', '.join(told)}"


def main() -> str:
    """What the line says."""
    if torch.cuda.device_count() < 2 or os.environ.get("WORLD_SIZE") != "2":
        return "FAIL: expected 2 GPUs and: torchrun --nproc-per-node 2 tests/model/symmetric_gpu.py"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    nccl, ours = AllToAll(E), SymmetricMemory(E)
    wrong = []
    for repeat in range(REPEATS):
        for case, tokens in enumerate(TOKENS):
            to, dtype = TO[(repeat + case) % 3], (torch.bfloat16, torch.float32)[(repeat + case) % 2]
            different = compare(nccl, ours, tokens[dist.get_rank()], D, to, K, dtype, "cuda", 100 * repeat + case)
            wrong += [f"repeat {repeat}, {tokens} tokens to {to}, {dtype}: {d} on {dist.get_rank()}" for d in different]
    gathered: list = [None, None]
    dist.all_gather_object(gathered, wrong)
    wrong, n = gathered[0] + gathered[1], REPEATS * len(TOKENS)
    verdict = f"FAIL: {len(wrong)} tensors differ, first: {wrong[0]}" if wrong else f"OK: {n} exchanges and gradients bitwise"
    buffers = [size >> 20 for size in sorted(ours.buffers)]
    return f"{verdict}; {timed(nccl, ours)}; buffers {buffers} MiB, torch {torch.__version__}, {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    first = os.environ.get("RANK", "0") == "0"

    def late() -> None:
        print(f"FAIL: not done within {SECONDS} s on {os.environ.get('RANK')}", flush=True)
        os._exit(1)

    timer = threading.Timer(SECONDS, late)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(SECONDS + 4, exit=True)  # where the timer cannot run
    try:
        line = main()
    except Exception as e:
        print(f"FAIL on {os.environ.get('RANK')}: {type(e).__name__}: {e}", flush=True)
        os._exit(1)  # a peer may wait for this process forever
    if first:
        print(line, flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(line.startswith("FAIL"))
