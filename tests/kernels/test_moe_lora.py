import pytest
import torch
from common import DEVICE, DTYPES, backends, parametrize_dtype, pick, pooled_ratios, randn

from qwen3_kernels import dispatch, moe_experts, moe_lora, selfcheck
from qwen3_kernels.ops import Adapters, moe_lora_ref

BACKENDS = ["torch", *backends("moe_experts", DTYPES["bf16"])]
# The interpreter's are slow.
parametrize_backend = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=[pytest.mark.slow] * (b == "triton" and DEVICE == "cpu")) for b in BACKENDS]
)
FROZEN = ("gate_up", "down")


def inputs_for(N, D, I, E, K, r, dtype):
    ids = torch.stack([torch.randperm(E + 1)[:K] for _ in range(N)]).to(DEVICE)  # E is dropped
    return {
        "x": randn(N, D, dtype=dtype), "gate_up": randn(E, 2 * I, D, dtype=dtype, scale=D**-0.5),
        "down": randn(E, D, I, dtype=dtype, scale=I**-0.5), "ids": ids, "weights": (torch.rand(N, K) + 0.1).to(DEVICE),
        "up_a": randn(E, r, D, dtype=dtype, scale=D**-0.5), "up_b": randn(E, 2 * I, r, dtype=dtype, scale=r**-0.5),
        "down_a": randn(E, r, I, dtype=dtype, scale=I**-0.5), "down_b": randn(E, D, r, dtype=dtype, scale=r**-0.5),
    }


def ours(x, gate_up, down, ids, weights, scale=0.5, **factors):
    return moe_lora(x, gate_up.detach(), down.detach(), ids, weights, Adapters(**factors), scale=scale)


def ref(gate_up, down, **inputs):
    return moe_lora_ref(gate_up=gate_up.detach(), down=down.detach(), scale=0.5, **inputs)


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("shape", [(24, 32, 24, 4, 2, 8), (9, 19, 13, 3, 2, 3)], ids=str)
def test_error_rule(backend, dtype, shape):
    """Against merged weights."""
    if backend != "torch" and dispatch.unavailable("moe_experts", backend, DEVICE, dtype):
        pytest.skip(f"{backend}: no {dtype}")
    draws = [inputs_for(*shape, dtype) for _ in range(pick(backend, 24, 2))]
    with dispatch.use(backend, "moe_experts"):
        ratios = pooled_ratios(ours, ref, draws)
    assert len(ratios) == 1 + 6
    assert max(ratios) <= selfcheck.LIMIT, ratios


@pytest.mark.parametrize("backend", BACKENDS[:-1] if len(BACKENDS) > 2 else BACKENDS)
def test_fresh_adapters_change_nothing(backend):
    """B is zero at the start."""
    inputs = inputs_for(12, 32, 24, 4, 2, 8, torch.bfloat16 if backend == "cuda" else torch.float32)
    inputs["up_b"].zero_()
    inputs["down_b"].zero_()
    base = {n: inputs[n] for n in ("x", "gate_up", "down", "ids", "weights")}
    with dispatch.use(backend, "moe_experts"):
        fresh, expected = ours(**inputs), moe_experts(**base)
    rounding = 4 * torch.finfo(expected.dtype).eps  # h and the rows of a token are rounded in other places
    torch.testing.assert_close(fresh, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


@parametrize_backend
def test_registration_and_compile(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("the same ops; slow under the interpreter")
    inputs = inputs_for(6, 32, 24, 4, 2, 8, torch.float32)
    if backend == "cuda":
        inputs = inputs_for(6, 32, 24, 4, 2, 8, torch.bfloat16)
    with dispatch.use(backend, "moe_experts"):
        torch._dynamo.reset()
        eager = selfcheck.outputs_and_grads(ours, inputs)
        compiled = selfcheck.outputs_and_grads(torch.compile(ours, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"up_b": torch.ones(4, 47, 8)}, r"up_b is \(4, 47, 8\); expected \(4, 48, 8\)"),
        ({"down_a": torch.ones(4, 7, 24)}, r"down_a is \(4, 7, 24\); expected \(4, 8, 24\)"),
        ({"x": torch.ones(6, 32).double()}, r"x is torch.float64 \(6, 32\)"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input(change, words):
    inputs = inputs_for(6, 32, 24, 4, 2, 8, torch.float32) | {n: t.to(DEVICE) for n, t in change.items()}
    with pytest.raises(ValueError, match=words):
        ours(**inputs)


def test_weights_that_are_not_frozen_are_refused():
    inputs = inputs_for(6, 32, 24, 4, 2, 8, torch.float32)
    factors = Adapters(*(inputs[n] for n in Adapters._fields))
    args = {n: inputs[n] for n in ("x", "down", "ids", "weights")} | {"gate_up": inputs["gate_up"].requires_grad_()}
    with pytest.raises(ValueError, match="gate_up is a tensor that requires a gradient; expected a frozen one"):
        moe_lora(**args, adapters=factors)
