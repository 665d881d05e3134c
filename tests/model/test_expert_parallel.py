"""Experts over 2 and 4 gloo processes against all experts in one: forward, backward, and processes with nothing to do."""

import pytest
from processes import Python

WORKER = """
import sys, torch, torch.distributed as dist
from qwen3_kernels import moe_experts
from qwen3_model.expert_parallel import AllToAll, experts

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
E, K, D, I = 8, 3, 16, 12
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
    dispatcher = AllToAll(E)
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


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process(world, tmp_path):
    for code, out, error in run(world, WORKER, str(tmp_path / "store")):
        assert code == 0 and out == "fine\n", error[-3000:]


UNEVEN = """
import sys, torch.distributed as dist
from qwen3_model.expert_parallel import AllToAll
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=int(sys.argv[1]), world_size=int(sys.argv[2]))
try:
    AllToAll(7)
except ValueError as e:
    print(e)
dist.barrier()  # else one may be gone before the other has come
dist.destroy_process_group()
"""


def test_experts_that_cannot_be_shared_out(tmp_path):
    for code, out, error in run(2, UNEVEN, str(tmp_path / "store")):
        assert code == 0 and "num_experts is 7; expected a multiple of the 2 processes" in out, error[-3000:]
