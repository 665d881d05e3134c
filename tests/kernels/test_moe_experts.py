import sys

import pytest
import torch
from common import DEVICE, DTYPES, backends, check_error_rule, parametrize_dtype, pick, pooled_ratios, randn

from qwen3_kernels import dispatch, moe_experts, routing_plan, selfcheck
from qwen3_kernels.ops.moe_experts import moe_experts_ref, steps

BACKENDS = ["torch", *backends("moe_experts", DTYPES["bf16"])]
parametrize_backend = pytest.mark.parametrize("backend", BACKENDS)
INTERPRETED = DEVICE == "cpu"  # Triton: every program takes milliseconds
SLOW = {b: pytest.mark.slow if INTERPRETED and b == "triton" else () for b in BACKENDS}
parametrize_rarely = pytest.mark.parametrize("backend", [pytest.param(b, marks=SLOW[b]) for b in BACKENDS])
parametrize_both = pytest.mark.parametrize("backend, dtype", [
    pytest.param(b, d, id=f"{b}-{n}", marks=SLOW[b] if n == "fp32" else ())
    for b in BACKENDS for n, d in DTYPES.items()
])
WEIGHTS = ("x", "gate_up", "down", "weights")


def inputs_for(N, D, I, E, K, dtype, ids=None):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(N)]) if ids is None else ids
    return {
        "x": randn(N, D, dtype=dtype), "gate_up": randn(E, 2 * I, D, dtype=dtype, scale=D**-0.5),
        "down": randn(E, D, I, dtype=dtype, scale=I**-0.5), "ids": ids.to(DEVICE),
        "weights": (torch.rand(N, K) + 0.1).to(DEVICE),
    }


def skip_unless_supported(backend, dtype):
    problem = backend != "torch" and dispatch.unavailable("moe_experts", backend, DEVICE, dtype)
    if problem:
        pytest.skip(f"{backend}: {problem}")


def check(backend, draws) -> None:
    with dispatch.use(backend, "moe_experts"):
        ratios = pooled_ratios(moe_experts, moe_experts_ref, draws)
    assert max(ratios) <= selfcheck.LIMIT, f"{backend}: errors {ratios} times those of plain torch"


# (N, D, I, E, K): one token, fewer than a tile, odd sizes, a prime number of experts, K = 1, K = E
SHAPES = [(1, 16, 8, 4, 2), (5, 64, 48, 8, 3), (33, 40, 24, 7, 2), (150, 72, 40, 1, 1), (70, 40, 24, 2, 1),
          (20, 48, 32, 3, 3), (9, 19, 13, 4, 2)]


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, shape):
    skip_unless_supported(backend, dtype)
    check(backend, [inputs_for(*shape, dtype) for _ in range(max(1, pick(backend, 16, 6) // shape[0]))])


# All but "one token each" have four rows an expert or more, for the second line of the table of tiles, and those that keep
# their tokens an expert whose rows take more than one tile.
ROUTINGS = {
    "all to one": torch.full((40, 1), 2), "empty experts": torch.tensor([[1, 3]]).expand(18, 2),
    "one token each": torch.arange(8).view(8, 1), "twice the same": torch.tensor([[4, 4]]).expand(18, 2),
    "dropped": torch.tensor([[0, 8], [8, 100], [3, 0], [-1, 3], [8, 8]]).repeat(6, 1),
    "all dropped": torch.full((18, 2), 8),
    "one hot expert": torch.cat((torch.zeros(18, 1), torch.arange(18).view(18, 1) % 3 + 1), 1).long(),
}


@parametrize_both
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(backend, dtype, routing):
    skip_unless_supported(backend, dtype)
    ids = ROUTINGS[routing].contiguous()
    times = max(1, pick(backend, 24, 8) // len(ids))
    draws = [inputs_for(len(ids), 32, 24, 8, ids.shape[1], dtype, ids) for _ in range(times)]
    check(backend, draws)
    inputs = draws[0]
    with dispatch.use(backend):
        out, dx, dgate_up, ddown, dweights = selfcheck.outputs_and_grads(moe_experts, inputs)
    dropped = (ids < 0) | (ids >= 8)
    assert (dweights.cpu()[dropped] == 0).all() and (out.cpu()[dropped.all(1)] == 0).all()
    for e in set(range(8)) - set(ids.flatten().tolist()):
        assert (dgate_up[e] == 0).all() and (ddown[e] == 0).all()


@parametrize_backend
def test_unused_rows_may_hold_anything(backend):
    """What lies in memory behind the last expert's rows reaches no result."""
    skip_unless_supported(backend, torch.bfloat16)
    ids = torch.randint(6, (23, 2))
    ids[::3] = 6
    inputs = inputs_for(23, 32, 24, 6, 2, torch.bfloat16, ids)
    empty = torch.empty
    with dispatch.use(backend), pytest.MonkeyPatch.context() as patch:
        want = selfcheck.outputs_and_grads(moe_experts, inputs)

        def poisoned(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        patch.setattr(torch, "empty", poisoned)
        got = selfcheck.outputs_and_grads(moe_experts, inputs)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want))


@parametrize_backend
@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=["small", "saturated"])
def test_adversarial_scales(backend, scale):
    skip_unless_supported(backend, torch.float32)
    draws = [inputs_for(12, 32, 16, 4, 2, torch.float32) for _ in range(pick(backend, 8, 2))]
    check(backend, [inputs | {"x": inputs["x"] * scale} for inputs in draws])


@parametrize_rarely
def test_weights_in_the_dtype_of_the_activations(backend):
    skip_unless_supported(backend, torch.bfloat16)
    inputs = inputs_for(12, 32, 16, 4, 2, torch.bfloat16)
    inputs["weights"] = inputs["weights"].bfloat16()
    check_error_rule(moe_experts, moe_experts_ref, backend, inputs)


@parametrize_both
def test_recompute_gives_the_same_bits_and_keeps_less(backend, dtype):
    skip_unless_supported(backend, dtype)
    inputs, saved = inputs_for(20, 32, 24, 4, 2, dtype), {}
    with dispatch.use(backend):
        for recompute in (False, True):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
                grads = selfcheck.outputs_and_grads(lambda **kw: moe_experts(**kw, recompute=recompute), inputs)
            saved[recompute] = grads, kept
    assert all(torch.equal(a, b) for a, b in zip(saved[False][0], saved[True][0], strict=True))
    assert (40, 48) in saved[False][1] and (40, 48) not in saved[True][1]
    assert (40, 24) not in saved[False][1] and (40, 32) not in saved[False][1]


@parametrize_both
def test_weight_gradients_are_added_in_place(backend, dtype):
    skip_unless_supported(backend, dtype)
    inputs = inputs_for(20, 32, 24, 4, 2, dtype)
    inputs["ids"][inputs["ids"] == 3] = 1  # expert 3 gets nothing
    with dispatch.use(backend):
        want = dict(zip(("out", *WEIGHTS), selfcheck.outputs_and_grads(moe_experts, inputs)))
        for buffer_dtype in {dtype, torch.float32}:
            buffers = [torch.ones(inputs[n].shape, dtype=buffer_dtype, device=DEVICE) for n in ("gate_up", "down")]

            def run(**kw):
                return moe_experts(**kw, gate_up_grad=buffers[0], down_grad=buffers[1])

            leaves = {n: inputs[n].clone().requires_grad_() for n in WEIGHTS}
            out = run(**(inputs | leaves))
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
            out.backward(cotangent)
            assert leaves["gate_up"].grad is None and leaves["down"].grad is None
            assert torch.equal(leaves["x"].grad, want["x"]) and torch.equal(leaves["weights"].grad, want["weights"])
            for buffer, name in zip(buffers, ("gate_up", "down")):
                rounding = torch.finfo(dtype).eps * 4
                largest = want[name].abs().max().item()
                torch.testing.assert_close(buffer, 1 + want[name].to(buffer_dtype), rtol=rounding, atol=rounding * (1 + largest))
                assert (buffer[3] == 1).all() and (buffer[1] != 1).any()


@parametrize_rarely
def test_only_what_is_wanted(backend):
    """Frozen experts (LoRA, a router alone): their gradients are not computed, the others stay as they are."""
    skip_unless_supported(backend, torch.bfloat16)
    inputs = inputs_for(20, 32, 24, 4, 2, torch.bfloat16)
    with dispatch.use(backend):
        want = dict(zip(WEIGHTS, selfcheck.outputs_and_grads(moe_experts, inputs)[1:]))
        for name in WEIGHTS:
            leaf = inputs[name].clone().requires_grad_()
            out = moe_experts(**(inputs | {name: leaf}))
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
            assert torch.equal(torch.autograd.grad(out, leaf, cotangent)[0], want[name]), name
        with torch.no_grad():
            assert not moe_experts(**(inputs | {"x": inputs["x"].clone().requires_grad_()})).requires_grad


@parametrize_rarely
def test_strided_inputs(backend):
    """Halves of wider tensors, and a transposed one."""
    skip_unless_supported(backend, torch.bfloat16)
    inputs = inputs_for(12, 32, 16, 4, 2, torch.bfloat16)
    wide = {n: torch.cat((t, t), -1)[..., : t.shape[-1]] for n, t in inputs.items()}
    turned = wide | {"x": inputs["x"].T.contiguous().T, "down": inputs["down"].mT.contiguous().mT}
    with dispatch.use(backend):
        want = selfcheck.outputs_and_grads(moe_experts, inputs)
        for other in (wide, turned):
            args = {n: t.detach().requires_grad_(n in WEIGHTS) for n, t in other.items()}
            assert torch.equal(moe_experts(**args), want[0])


@parametrize_backend
def test_fp32_sums_of_weighted_rows(backend):
    """1 + 2^-8 + 2^-8 in bfloat16 would lose both small ones; (1 + 2^-7)^2 - (1 + 2^-6) the square's last digit."""
    skip_unless_supported(backend, torch.bfloat16)
    combine = steps(backend).combine
    for y, weights, want in (
        ([1.0, 2**-8, 2**-8], [1.0, 1.0, 1.0], 1 + 2**-7), ([1 + 2**-7, -1.0], [1 + 2**-7, 1 + 2**-6], 2**-14),
    ):
        plan = routing_plan(torch.arange(len(y), device=DEVICE)[None], 4)
        rows = torch.tensor(y, device=DEVICE, dtype=torch.bfloat16)[:, None].expand(-1, 8).contiguous()
        out = combine(rows, torch.tensor([weights], device=DEVICE), plan)
        assert out.float().tolist() == [[want] * 8]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("torch", "cpu")])
@parametrize_dtype
def test_error_rule_on_two_threads(backend, dtype):
    torch.set_num_threads(2)
    check(backend, [inputs_for(33, 40, 24, 7, 2, dtype)])


@parametrize_both
def test_repeatable(backend, dtype):
    skip_unless_supported(backend, dtype)
    inputs = inputs_for(pick(backend, 90, 20), 32, 24, 5, 2, dtype)
    torch.set_num_threads(2)
    with dispatch.use(backend):
        first = selfcheck.outputs_and_grads(moe_experts, inputs)
        for _ in range(100 if DEVICE == "cuda" else pick(backend, 3, 1)):
            again = selfcheck.outputs_and_grads(moe_experts, inputs)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend, recompute", [
    pytest.param(b, r, marks=SLOW[b] if r else ()) for b in BACKENDS for r in (False, True)
])
def test_registration_and_compile(backend, recompute):
    skip_unless_supported(backend, torch.bfloat16)
    inputs = inputs_for(6, 32, 16, 4, 2, torch.bfloat16)
    leaves = [inputs[n].clone().requires_grad_() for n in WEIGHTS]
    run = lambda **kw: moe_experts(**kw, recompute=recompute)  # noqa: E731
    with dispatch.use(backend):
        plan = routing_plan(inputs["ids"], 4)
        torch.library.opcheck(torch.ops.qwen3.moe_experts.default, (*leaves, *plan, not recompute, backend))
        torch._dynamo.reset()
        eager = selfcheck.outputs_and_grads(run, inputs)
        compiled = selfcheck.outputs_and_grads(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cuda", "triton")])
@pytest.mark.parametrize("dtype", [DTYPES["bf16"]] if INTERPRETED else DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [
    (2, 40, 24, 7, 3), (1, 16, 515, 4, 1),
    *(pytest.param(s, marks=SLOW.get("triton", ())) for s in ((1, 2050, 3, 3, 2), (1, 5, 300, 9, 9))),
], ids=str)
def test_a_token_or_two_without_gradients(backend, dtype, shape):
    """The path of two launches, with a dropped expert; weights beyond what the second one holds while it waits."""
    skip_unless_supported(backend, dtype)
    found = {"truth": [], "plain": [], "got": []}
    for _ in range(pick(backend, 8, 1)):
        inputs = inputs_for(*shape, dtype)
        inputs["ids"][-1, -1] = shape[3] if shape[4] > 1 else 0
        wide = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
        found["truth"].append(moe_experts_ref(**wide).flatten())
        found["plain"].append(moe_experts_ref(**inputs).flatten())
        with dispatch.use(backend), torch.no_grad():
            found["got"].append(moe_experts(**inputs).flatten())
    truth, plain, got = (torch.cat(t) for t in found.values())
    assert selfcheck.error_ratio(got, plain, truth) <= selfcheck.LIMIT


def test_few_rows_an_expert_are_left_to_triton(monkeypatch):
    op = sys.modules[moe_experts.__module__]
    monkeypatch.setattr(op.dispatch, "resolve", lambda *_: "cuda")
    monkeypatch.setattr(op, "_forward", lambda *args: args[-1:])
    for rows, grad, want in ((32, False, "triton"), (33, False, "cuda"), (32, True, "cuda")):
        inputs = inputs_for(rows, 8, 8, 4, 1, torch.bfloat16)
        inputs["x"].requires_grad_(grad)
        assert moe_experts(**inputs, plan=()) == want


@parametrize_backend
@parametrize_dtype
def test_without_gradients_the_bits_are_the_same(backend, dtype):
    """Where they come from the same kernels: Hopper's leave few rows to Triton's."""
    skip_unless_supported(backend, dtype)
    inputs = inputs_for(60 if backend == "cuda" else 20, 40, 24, 5, 2, dtype)
    with dispatch.use(backend):
        want = moe_experts(**(inputs | {"x": inputs["x"].clone().requires_grad_()}))
        with torch.no_grad():
            assert torch.equal(moe_experts(**inputs), want)


@parametrize_rarely
def test_does_not_touch_its_inputs(backend):
    skip_unless_supported(backend, torch.bfloat16)
    inputs = inputs_for(9, 32, 16, 4, 2, torch.bfloat16)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = {n: t.requires_grad_(n in WEIGHTS) for n, t in inputs.items()}
    dout = randn(9, 32, dtype=torch.bfloat16)
    copy = dout.clone()
    with dispatch.use(backend):
        out = moe_experts(**leaves)
        for _ in range(2):  # the second finds what the first left
            grads = torch.autograd.grad(out, [leaves[n] for n in WEIGHTS], dout, retain_graph=True)
            assert all(g.isfinite().all() for g in grads)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs) and torch.equal(dout, copy)


def test_empty():
    inputs = inputs_for(0, 16, 8, 4, 2, torch.float32, torch.zeros(0, 2, dtype=torch.int64))
    leaves = {n: t.requires_grad_(n in WEIGHTS) for n, t in inputs.items()}
    out = moe_experts(**leaves)
    out.sum().backward()
    assert out.shape == (0, 16) and all(leaves[n].grad.shape == leaves[n].shape for n in ("x", "weights"))


@pytest.mark.gpu
@parametrize_backend
def test_in_a_graph_with_other_routing(backend):
    if backend == "torch":
        pytest.skip("outside of grouped products it asks for the sizes")
    inputs = inputs_for(300, 64, 32, 16, 4, torch.bfloat16)
    leaves = {n: t.requires_grad_(n in WEIGHTS) for n, t in inputs.items()}
    dout = randn(300, 64, dtype=torch.bfloat16)

    def run():
        out = moe_experts(**leaves)
        return [out, *torch.autograd.grad(out, [leaves[n] for n in WEIGHTS], dout)]

    with dispatch.use(backend, "moe_experts"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for ids in (torch.randint(16, (300, 4)), torch.full((300, 4), 3), torch.randint(20, (300, 4))):
            inputs["ids"].copy_(ids)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(got, run()))


@parametrize_backend
def test_tokens_that_lie_over_2_to_the_31_elements_apart(backend):
    """Each stride fits into 32 bits, the last offset does not. What lies between tokens is never touched, hence not there."""
    skip_unless_supported(backend, torch.bfloat16)
    kernels, inputs = steps(backend), inputs_for(3, 16, 8, 2, 1, torch.bfloat16, torch.tensor([[1], [0], [1]]))
    far = torch.empty_strided((3, 16), (2**30 + 64, 1), dtype=torch.bfloat16, device=DEVICE).copy_(inputs["x"])
    plan = routing_plan(inputs["ids"], 2)
    for got, want in zip(kernels.up(far, inputs["gate_up"], plan), kernels.up(inputs["x"], inputs["gate_up"], plan)):
        assert torch.equal(got, want)
    rows = torch.randn(3, 8, device=DEVICE).bfloat16()
    got, want = (torch.empty(2, 16, 8, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    kernels.weight_grad(far, rows, plan, got, False, "left")
    kernels.weight_grad(inputs["x"], rows, plan, want, False, "left")
    assert torch.equal(got, want) and got.abs().sum() > 0


@pytest.mark.gpu
@parametrize_backend
def test_rows_beyond_two_to_the_31_elements(backend):
    """R·2I and R·D are over 2^31: the last rows must equal those of a small batch."""
    if backend == "torch":
        pytest.skip("of our kernels")
    N, D, I, E, K = 135_000, 2048, 1024, 8, 8
    ids = torch.arange(8).expand(N, 8)
    inputs = inputs_for(4, D, I, E, K, torch.bfloat16, ids[:4])
    x = randn(1, D, dtype=torch.bfloat16).expand(N, D).contiguous()
    x[-4:] = inputs["x"]
    weights = torch.full((N, K), 0.125, device=DEVICE)
    weights[-4:] = inputs["weights"]
    x.requires_grad_()
    with dispatch.use(backend, "moe_experts"):
        want = moe_experts_ref(**inputs)
        out = moe_experts(x, inputs["gate_up"], inputs["down"], ids.to(DEVICE), weights)
        torch.testing.assert_close(out[-4:], want, rtol=2e-2, atol=2e-2)
        small = inputs["x"].clone().requires_grad_()
        dx, = torch.autograd.grad(out, x, torch.ones_like(out))
        want, = torch.autograd.grad(moe_experts_ref(**(inputs | {"x": small})), small, torch.ones_like(small))
        torch.testing.assert_close(dx[-4:], want, rtol=3e-2, atol=3e-2)


GOOD = {"x": torch.ones(3, 8), "gate_up": torch.ones(4, 12, 8), "down": torch.ones(4, 8, 6),
        "ids": torch.zeros(3, 2, dtype=torch.int64), "weights": torch.ones(3, 2)}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.ones(3)}, ValueError, r"x is \(3,\); expected \[N, D\]"),
        ({"gate_up": torch.ones(4, 11, 8)}, ValueError, r"gate_up is \(4, 11, 8\); expected \[E, 2I, 8\]"),
        ({"gate_up": torch.ones(4, 12, 7)}, ValueError, r"gate_up is \(4, 12, 7\)"),
        ({"down": torch.ones(4, 6, 8)}, ValueError, r"down is \(4, 6, 8\); expected \(4, 8, 6\)"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"ids is \(2, 2\); expected \[3, K\]"),
        ({"ids": torch.zeros(3, 2)}, TypeError, "ids is torch.float32"),
        ({"weights": torch.ones(3, 1)}, ValueError, r"weights is \(3, 1\); expected ids' shape \(3, 2\)"),
        ({"weights": torch.ones(3, 2, dtype=torch.bfloat16)}, TypeError, "weights is torch.bfloat16"),
        ({"down": torch.ones(4, 8, 6, dtype=torch.bfloat16)}, TypeError, "down is torch.bfloat16"),
        ({"gate_up_grad": torch.ones(4, 12, 8)}, ValueError, "only one given; expected both or neither"),
        ({"gate_up_grad": torch.ones(4, 8, 12), "down_grad": torch.ones(4, 8, 6)}, ValueError,
         r"gate_up_grad is \(4, 8, 12\)"),
        ({"gate_up_grad": torch.ones(4, 12, 8), "down_grad": torch.ones(4, 8, 6).bfloat16()}, ValueError,
         "down_grad is torch.bfloat16"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        moe_experts(**{n: t.to(DEVICE) for n, t in (GOOD | change).items()})
