import sys

import pytest
import torch
from common import DEVICE, backends, check_error_rule, check_registration, check_repeatable, parametrize_dtype, randn

from qwen3_kernels import dispatch, moe_router, routing_plan, selfcheck
from qwen3_kernels.ops.moe_router import MAX_EXPERTS, moe_router_ref

BACKENDS = ["torch", *backends("moe_router")]
parametrize_backend = pytest.mark.parametrize("backend", BACKENDS)
parametrize_norm = pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "probabilities"])
SHAPES = [(1, 1, 1), (16, 8, 8), (5, 128, 8), (37, 6, 2), (9, 100, 16), (4, 512, 10), (130, 3, 1), (3, 130, 1)]


def outputs(router, top_k, **options):
    """The router's outputs that have gradients."""
    def run(logits, **rest):
        weights, _, stats = router(logits, top_k, return_stats=True, **options, **rest)
        return weights, *stats

    return run


def rule(backend, inputs, top_k, **options):
    names = {n: t for n, t in options.items() if isinstance(t, torch.Tensor)}
    fixed = {n: t for n, t in options.items() if n not in names}
    ours, ref = (outputs(r, top_k, **fixed) for r in (moe_router, moe_router_ref))
    ours.__name__ = "moe_router"
    check_error_rule(ours, ref, backend, inputs, **names)


@parametrize_backend
@parametrize_dtype
@parametrize_norm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, renormalise, shape):
    N, E, K = shape
    rule(backend, {"logits": randn(N, E, dtype=dtype, scale=2)}, K, renormalise=renormalise)


@parametrize_backend
@parametrize_norm
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_flat_and_sure_routers(backend, renormalise, scale):
    """All alike, or one expert with all the probability."""
    rule(backend, {"logits": randn(11, 24, dtype=torch.float32, scale=scale)}, 4, renormalise=renormalise)


@parametrize_backend
@parametrize_dtype
@parametrize_norm
def test_mask(backend, dtype, renormalise):
    mask = (torch.arange(13, device=DEVICE) % 3 > 0).float()
    inputs = {"logits": randn(13, 20, dtype=dtype)}
    rule(backend, inputs, 3, renormalise=renormalise, mask=mask)
    with dispatch.use(backend):
        _, _, stats = moe_router(inputs["logits"], 3, mask=mask.bool(), return_stats=True)
        _, _, kept = moe_router(inputs["logits"][mask.bool()], 3, return_stats=True)
    torch.testing.assert_close(stats.prob_sum, kept.prob_sum)
    assert stats.lse.shape == (13,)


@parametrize_backend
@parametrize_dtype
@parametrize_norm
def test_replay(backend, dtype, renormalise):
    """Given experts keep their order; one that is there twice gets both gradients."""
    ids = torch.stack([torch.randperm(20)[:3] for _ in range(13)]).to(DEVICE)
    ids[4] = 7
    logits = randn(13, 20, dtype=dtype)
    rule(backend, {"logits": logits}, 3, renormalise=renormalise, expert_ids=ids)
    with dispatch.use(backend):
        weights, got = moe_router(logits, 3, renormalise=renormalise, expert_ids=ids)
    assert got is ids and weights.dtype == torch.float32


@parametrize_backend
def test_replayed_experts_without_probability(backend):
    """Their probabilities are 0 in float32, their weights are not."""
    logits = torch.tensor([[500.0, 1.0, 0.0, -1.0]], device=DEVICE)
    with dispatch.use(backend):
        weights, _ = moe_router(logits, 2, expert_ids=torch.tensor([[1, 3]], device=DEVICE))
    torch.testing.assert_close(weights, torch.tensor([[1.0, -1.0]], device=DEVICE).softmax(-1))


@parametrize_backend
@parametrize_dtype
def test_ties_go_to_the_lowest_index(backend, dtype):
    rows = torch.zeros(4, 8)
    rows[1, [1, 6]] = 1
    rows[2] = float("-inf")
    rows[2, 5] = 0
    rows[3] = torch.tensor([-1e4, 0, 1e4, 9e3, 0, 0, 0, 0])  # all but one have probability 0
    with dispatch.use(backend):
        weights, ids = moe_router(rows.to(DEVICE, dtype), 3)
    assert ids.tolist() == [[0, 1, 2], [1, 6, 0], [5, 0, 1], [2, 0, 1]]
    assert torch.equal(weights[0].cpu(), torch.full((3,), 1 / 3))
    assert weights[2:].tolist() == [[1, 0, 0]] * 2


@parametrize_backend
@parametrize_dtype
def test_the_experts_are_those_of_the_reference(backend, dtype):
    logits = randn(300, 128, dtype=dtype, scale=2)
    with dispatch.use(backend):
        weights, ids = moe_router(logits, 8)
    want_weights, want = moe_router_ref(logits.cpu(), 8)
    assert torch.equal(ids.cpu(), want) and ids.dtype == torch.int64
    torch.testing.assert_close(weights.cpu(), want_weights)
    assert (weights.diff(dim=1) <= 0).all()


@parametrize_backend
def test_only_one_gradient(backend):
    """Those that the loss does not ask for are not made up."""
    logits = randn(7, 12, dtype=torch.float32)
    with dispatch.use(backend):
        for pick in (lambda w, s: w, lambda w, s: s.prob_sum, lambda w, s: s.lse):
            grads = []
            for router, dtype in ((moe_router, torch.float32), (moe_router_ref, torch.float64)):
                leaf = logits.to(dtype).requires_grad_()
                weights, _, stats = router(leaf, 3, return_stats=True)
                grads += torch.autograd.grad(pick(weights, stats).square().sum(), leaf)
            torch.testing.assert_close(*grads, check_dtype=False, rtol=1e-5, atol=1e-6)


@parametrize_backend
@parametrize_norm
def test_registration_and_compile(backend, renormalise):
    inputs = {"logits": randn(6, 12, dtype=torch.float32)}
    args = (inputs["logits"].clone().requires_grad_(), 3, renormalise, None, torch.ones(6, device=DEVICE), True, backend)
    check_registration(outputs(moe_router, 3, renormalise=renormalise), backend, torch.ops.qwen3.moe_router.default, args,
                       inputs)


@parametrize_backend
def test_repeatable(backend):
    run = outputs(moe_router, 4)
    run.__name__ = "moe_router"
    check_repeatable(run, backend, {"logits": randn(90, 24, dtype=torch.bfloat16)})


def test_empty():
    logits = torch.zeros(0, 6, device=DEVICE, requires_grad=True)
    weights, ids, stats = moe_router(logits, 2, return_stats=True)
    assert weights.shape == ids.shape == (0, 2) and stats.prob_sum.tolist() == [0] * 6
    weights.sum().backward()
    assert logits.grad.shape == (0, 6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.ones(3)}, ValueError, r"logits is \(3,\); expected \[N, E\]"),
        ({"logits": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "logits is torch.int64"),
        ({"top_k": 5}, ValueError, "top_k is 5; expected 1 to 4"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"mask": torch.ones(4)}, ValueError, r"mask is \(4,\); expected \(3,\)"),
        ({"expert_ids": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"expert_ids is \(3, 1\); expected \(3, 2\)"),
        ({"expert_ids": torch.zeros(3, 2)}, TypeError, "expert_ids is torch.float32"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input(change, error, words):
    good = {"logits": torch.ones(3, 4), "top_k": 2}
    with pytest.raises(error, match=words):
        moe_router(**{n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in (good | change).items()})


def test_ids_out_of_range():
    for wrong in (-1, 4):
        ids = torch.tensor([[0, 1], [wrong, 2], [3, 3]])
        with pytest.raises(IndexError, match=f"expert_ids holds {wrong}; expected 0 to 3"):
            moe_router(torch.ones(3, 4), 2, expert_ids=ids)
    if DEVICE == "cuda":
        for backend in BACKENDS[1:]:
            with dispatch.use(backend):
                weights, _ = moe_router(torch.ones(3, 4, device=DEVICE), 2, expert_ids=ids.to(DEVICE))
            assert weights.isnan().any(1).tolist() == [False, True, False]


# ---- the plan


def by_hand(ids, E):
    """(offsets, slot by row) in plain Python."""
    flat = ids.flatten().tolist()
    rows = sorted(range(len(flat)), key=lambda a: flat[a] if 0 <= flat[a] < E else E)
    counts = [sum(i == e for i in flat) for e in range(E)]
    return [sum(counts[:e]) for e in range(E + 1)], rows


@parametrize_backend
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 128), (33, 2, 6), (700, 3, 130), (5, 4, 512), (17, 5, 3)], ids=str)
@pytest.mark.parametrize("kind, dtype", [
    ("random", torch.int64), ("one expert", torch.int64), ("dropped", torch.int64), ("dropped", torch.int32),
    ("all dropped", torch.int64), ("sorted", torch.int64),
], ids=lambda v: str(v).removeprefix("torch."))
def test_plan(backend, dtype, shape, kind):
    N, K, E = shape
    ids = torch.randint(E, (N, K))
    if kind == "one expert":
        ids.fill_(E - 1)
    elif kind == "dropped":
        ids[torch.rand(N, K) < 0.3] = E
        ids[torch.rand(N, K) < 0.1] = E + 1000
        ids[torch.rand(N, K) < 0.1] = -1
    elif kind == "all dropped":
        ids.fill_(E)
    elif kind == "sorted":
        ids = ids.flatten().sort().values.view(N, K)
    with dispatch.use(backend):
        plan = routing_plan(ids.to(DEVICE, dtype), E)
    offsets, slot = by_hand(ids, E)
    assert all(t.dtype == torch.int32 for t in plan)
    assert plan.offsets.tolist() == offsets and plan.slot.tolist() == slot
    assert plan.token.tolist() == [s // K for s in slot]
    assert plan.inverse[plan.slot.long()].tolist() == list(range(N * K))


@parametrize_backend
def test_plan_registration(backend):
    ids = torch.randint(9, (7, 3), device=DEVICE)
    torch.library.opcheck(torch.ops.qwen3.routing_plan.default, (ids, 8, backend))
    with dispatch.use(backend):
        torch._dynamo.reset()
        compiled = torch.compile(lambda i: routing_plan(i, 8), fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(ids), routing_plan(ids, 8)))


def test_plan_of_nothing_and_of_very_many_experts():
    plan = routing_plan(torch.zeros(0, 4, dtype=torch.int64, device=DEVICE), 3)
    assert plan.offsets.tolist() == [0] * 4 and plan.token.shape == (0,)
    many = MAX_EXPERTS + 5
    plan = routing_plan(torch.tensor([[many - 1], [3]], device=DEVICE), many)
    assert plan.token.tolist() == [1, 0] and plan.offsets[-2:].tolist() == [1, 2]


@pytest.mark.gpu
@parametrize_backend
def test_plan_in_a_graph(backend):
    """The graph is replayed with other ids."""
    ids = torch.randint(128, (513, 8), device="cuda")
    with dispatch.use(backend):
        routing_plan(ids, 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = routing_plan(ids, 128)
        for _ in range(3):
            ids.copy_(torch.randint(140, (513, 8)))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(got, routing_plan(ids, 128)))


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((torch.zeros(3, dtype=torch.int64), 4), ValueError, r"ids is \(3,\)"),
        ((torch.zeros(3, 2), 4), TypeError, "ids is torch.float32"),
        ((torch.zeros(3, 2, dtype=torch.int64), 0), ValueError, "num_experts is 0"),
        ((torch.zeros(1, dtype=torch.int64).expand(2**16, 2**15), 4), ValueError, "fewer than 2"),
    ],
)
def test_bad_plans(args, error, words):
    with pytest.raises(error, match=words):
        routing_plan(*args)


def test_selfcheck_sees_a_wrong_backward(monkeypatch):
    """The error rule covers the gradient of each output."""
    op = sys.modules[moe_router.__module__]
    right = op._torch_backward
    monkeypatch.setattr(op, "_torch_backward", lambda *args: right(*args) * 1.01)
    ratio = selfcheck.run("moe_router", "torch", DEVICE, torch.float32)
    assert ratio > selfcheck.LIMIT
