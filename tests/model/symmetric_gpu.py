"""Tokens through peers' memory against NCCL's all_to_all_single: forward and backward bitwise, and the times.

    torchrun --nproc-per-node 2 tests/model/symmetric_gpu.py    # from 3 on, rows of several peers share a buffer

The first process prints one line, "OK" or "FAIL" and why, with the times; it all ends within a minute, hanging or not.
Not a pytest file: it needs a GPU for every process. `compare` is also what the CPU tests call.
"""

import faulthandler
import os
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from qwen3_model.expert_parallel import AllToAll, Dispatcher  # noqa: E402
from qwen3_model.symmetric import SymmetricMemory  # noqa: E402

SECONDS = 40
REPEATS = 20
E, K, D = 128, 8, 2048
TOKENS = [(700, 700), (8192, 8192), (33, 9000), (0, 512), (1, 0), (0, 0), (12000, 5)]  # even, odd process
TO = [range(E), range(8), range(E - 8, E)]  # all experts; some of the first, of the last process


def inputs(n: int, width: int, to: range, k: int, dtype: torch.dtype, device: str, seed: int) -> list[torch.Tensor]:
    """x [n, width], ids [n, k] among `to`, weights [n, k] in float32, and a gradient for the output."""
    torch.manual_seed(seed * dist.get_world_size() + dist.get_rank())
    x, dout = (torch.randn(n, width, device=device).to(dtype) for _ in range(2))
    ids = torch.rand(n, len(to), device=device).argsort(1)[:, :k] + to[0]
    return [x, ids, torch.rand(n, k, device=device), dout]


def step(dispatcher: Dispatcher, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What arrives, and what comes back of a stand-in for experts in which every input counts."""
    x_MD, ids_MK, weights_MK, sent = dispatcher.dispatch(x, ids, weights)
    y_MD = x_MD * (weights_MK * (ids_MK + 1)).sum(1, keepdim=True).to(x.dtype)
    return {"x there": x_MD, "ids there": ids_MK, "weights there": weights_MK, "out": dispatcher.combine(y_MD, sent)}


def compare(
    wanted: Dispatcher, got: Dispatcher, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dout: torch.Tensor
) -> list[str]:
    """The tensors and gradients that are not the same to the bit."""
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
    jobs = {
        "exchange of rows alone": lambda d: d.exchange(sent.counts, rows),
        "dispatch + combine": lambda d: step(d, x.detach(), ids, weights.detach()),
        "with backward": lambda d: torch.autograd.grad(step(d, leaves[0], ids, leaves[1])["out"], leaves, dout),
    }
    told = []
    for name, job in jobs.items():
        theirs, mine = milliseconds(lambda: job(nccl), lambda: job(ours))
        told.append(f"{name} {theirs:.3f} / {mine:.3f}")
    away = sum(sent.sizes) - sent.sizes[dist.get_rank()]
    return f"ms, NCCL / ours, 8192 x {D} bf16 to {K} of {E} ({away} rows to peers): {', '.join(told)}"


def main() -> str:
    """What the line says."""
    world, gpus = int(os.environ.get("WORLD_SIZE", 0)), torch.cuda.device_count()
    if not 2 <= world <= gpus:
        return f"FAIL: {world} processes of torchrun, {gpus} GPUs; expected at least two processes and a GPU for each"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    nccl, ours, rank = AllToAll(E), SymmetricMemory(E), dist.get_rank()
    wrong = []
    for repeat in range(REPEATS):
        for case, tokens in enumerate(TOKENS):
            to, dtype = TO[(repeat + case) % 3], (torch.bfloat16, torch.float32)[(repeat + case) % 2]
            given = inputs(tokens[rank % 2], D, to, K, dtype, "cuda", 100 * repeat + case)
            different = compare(nccl, ours, *given)
            wrong += [f"repeat {repeat}, {tokens} tokens to {to}, {dtype}: {d} on {rank}" for d in different]
    gathered: list = [None] * world
    dist.all_gather_object(gathered, wrong)
    wrong = sum(gathered, [])
    verdict = f"OK: {REPEATS} x {len(TOKENS)} inputs, forward and backward bitwise"
    if wrong:
        verdict = f"FAIL: {len(wrong)} tensors differ, first: {wrong[0]}"
    buffers, gpu = [size >> 20 for size in sorted(ours.buffers)], torch.cuda.get_device_name()
    return f"{verdict}; {timed(nccl, ours)}; buffers of {buffers} MiB; torch {torch.__version__}, {gpu}"


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
