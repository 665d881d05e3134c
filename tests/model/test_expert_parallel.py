"""Experts over 2 and 4 gloo processes against all experts in one: forward, backward, and processes with nothing to do.

Tokens travel by collectives, and through buffers in shared CPU memory in the place of peers' GPU memory."""

import json

import pytest
import torch
from processes import Python

from qwen3_model.symmetric import check_places

WORKER = """
import functools, sys, torch, torch.distributed as dist
from qwen3_kernels import moe_experts
from qwen3_model.expert_parallel import AllToAll, experts
from qwen3_model.symmetric import SymmetricMemory
sys.path.insert(0, "tests/model")
from shared_files import SharedFiles

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
E, K, D, I = 8, 3, 16, 12
dispatcher = AllToAll(E)
if sys.argv[4] == "symmetric":
    dispatcher = SymmetricMemory(E, buffer=functools.partial(SharedFiles, sys.argv[5]))
SIZES = {"even": [6] * 4, "ragged": [1, 9, 4, 2], "no tokens": [7, 0, 3, 0], "one expert": [5, 3, 8, 1]}

def step(function, *leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    return function(*leaves), leaves

for case, sizes in SIZES.items():
    torch.manual_seed(0)
    sizes = sizes[:world]
    gate_up, down = torch.randn(E, 2 * I, D) / 4, torch.randn(E, D, I) / 4
    x = torch.randn(sum(sizes), D)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(len(x))])
    if case == "one expert":
        ids.fill_(E - 1)  # all processes but the last have nothing to do
    weights, dout = torch.rand(len(x), K), torch.randn(len(x), D)
    out, leaves = step(lambda x, g, d, w: moe_experts(x, g, d, ids, w), x, gate_up, down, weights)
    want = [out, *torch.autograd.grad(out, leaves, dout)]
    tokens = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
    own = slice(rank * E // world, (rank + 1) * E // world)
    out, leaves = step(lambda x, g, d, w: experts(x, g, d, ids[tokens], w, dispatcher), x[tokens], gate_up[own], down[own],
                       weights[tokens])
    got = [out, *torch.autograd.grad(out, leaves, dout[tokens])]
    for name, g, w, part in zip(("out", "x", "gate_up", "down", "weights"), got, want, (tokens, tokens, own, own, tokens)):
        torch.testing.assert_close(g, w[part], rtol=1e-4, atol=1e-5, msg=lambda m: f"{case}: {name} on {rank}: {m}")
    assert out.abs().sum() > 0 or sizes[rank] == 0
dist.barrier()
dist.destroy_process_group()
print("fine")
"""


def run(world: int, script: str, *args: str) -> list[tuple[int, str, str]]:
    workers = [Python("-c", script, str(rank), str(world), *args) for rank in range(world)]
    texts = [w.communicate(timeout=200) for w in workers]
    return [(w.returncode, *t) for w, t in zip(workers, texts)]


@pytest.mark.parametrize("transport", ["all_to_all", "symmetric"])
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world, transport, tmp_path):
    for code, out, error in run(world, WORKER, str(tmp_path / "store"), transport, str(tmp_path)):
        assert code == 0 and out == "fine\n", error[-3000:]


BITWISE = """
import functools, sys, torch, torch.distributed as dist
from qwen3_model import symmetric
from qwen3_model.expert_parallel import AllToAll
sys.path.insert(0, "tests/model")
from shared_files import SharedFiles
from symmetric_gpu import compare, inputs

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
symmetric.SMALLEST, E = 1 << 12, 4 * world
ours = symmetric.SymmetricMemory(E, buffer=functools.partial(SharedFiles, sys.argv[4]))
sizes = [[5, 9], [130, 3], [0, 40], [2, 0], [0, 0], [70, 64], [200, 210]]  # growing and shrinking
for repeat in range(2):
    for case, n in enumerate(sizes):
        for to in (range(E), range(4), range(E - 4, E)):  # the second and third send everything to one process
            dtype = (torch.float32, torch.bfloat16)[(repeat + case) % 2]
            given = inputs(n[rank % 2], 21, to, 2, dtype, "cpu", 1000 * repeat + 10 * case + to.start)
            wrong = compare(AllToAll(E), ours, *given)
            assert not wrong, f"{n} tokens to {to}, {dtype}: {wrong} on {rank}"
print(sorted(ours.buffers))
"""


def test_symmetric_equals_all_to_all_bitwise(tmp_path):
    """With rows of odd sizes, several sizes of buffers and each made only once (`SharedFiles` refuses a second). Of two
    processes each would hear from one other, whose rows are the first in its buffer: hence three."""
    ended = run(3, BITWISE, str(tmp_path / "store"), str(tmp_path))
    for code, out, error in ended:
        assert code == 0 and out == ended[0][1], error[-3000:]
        sizes = json.loads(out)
        assert len(sizes) >= 3 and all(s == 2 ** (s.bit_length() - 1) for s in sizes)


ALONE = """
import sys, torch.distributed as dist
from qwen3_model.symmetric import SymmetricMemory
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
try:
    SymmetricMemory(8)
except RuntimeError as e:
    print(e)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_symmetric_without_cuda(tmp_path):
    ((code, out, error),) = run(1, ALONE, str(tmp_path / "store"))
    assert code == 0 and "CUDA is not available; expected a GPU for every process" in out, error[-3000:]


@pytest.mark.parametrize(
    "places, message",
    [
        ([("a", 0), ("b", 1)], r"hosts \['a', 'b'\]; expected one host"),
        ([("a", 0), ("a", 0)], r"\[0, 0\]; expected a different one for each"),
        ([("a", 0), ("a", 1), ("a", 2)], r"device 1 has no peer access to \[2\]"),
    ],
)
def test_gpus_that_cannot_reach_each_other(places, message):
    with pytest.raises(RuntimeError, match=message):
        check_places(places, lambda a, b: (a, b) != (1, 2))
    check_places([("a", 3), ("a", 1)], lambda a, b: (a, b) != (1, 2))


UNEVEN = """
import sys, torch.distributed as dist
from qwen3_model.expert_parallel import AllToAll
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=int(sys.argv[1]), world_size=int(sys.argv[2]))
try:
    AllToAll(7)
except ValueError as e:
    print(e)
"""


def test_experts_that_cannot_be_shared_out(tmp_path):
    for code, out, error in run(2, UNEVEN, str(tmp_path / "store")):
        assert code == 0 and "num_experts is 7; expected a multiple of the 2 processes" in out, error[-3000:]
