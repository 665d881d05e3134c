import pytest
import torch
from common import (
    DEVICE, backends, check_error_rule, check_no_copy, check_registration, check_repeatable, parametrize_dtype, pick,
    randn,
)

from qwen3_kernels import dispatch, swiglu
from qwen3_kernels.ops.swiglu import swiglu_ref

parametrize_backend = pytest.mark.parametrize("backend", backends("swiglu"))
parametrize_packed = pytest.mark.parametrize("packed", [False, True], ids=["pair", "packed"])
SHAPES = [(1,), (1, 1), (1, 8), (3, 17), (33, 129), (2, 7, 256), (130, 40)]


def inputs_for(shape, dtype, packed=False, scale=1.0):
    if packed:
        return {"gate": randn(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=scale)}
    return {"gate": randn(*shape, dtype=dtype, scale=scale), "up": randn(*shape, dtype=dtype, scale=scale)}


@parametrize_backend
@parametrize_dtype
@parametrize_packed
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, packed, shape):
    check_error_rule(swiglu, swiglu_ref, backend, inputs_for(shape, dtype, packed))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 30, 1e4, 1e15], ids=["tiny", "small", "saturated", "large", "huge"])
def test_adversarial_scales(backend, dtype, scale):
    check_error_rule(swiglu, swiglu_ref, backend, inputs_for((9, 96), dtype, scale=scale))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("low, high", [(-20.0, -5.0), (5.0, 20.0), (-1.5, -1.0)], ids=["closed", "open", "turning"])
def test_gates_of_one_kind(backend, dtype, low, high):
    """Nothing large hides the error of closed gates, where e^-g is huge, or of those at the minimum of silu."""
    if backend == "triton" and dtype == torch.float32 and high < -1.5:
        pytest.xfail("exp2(g * log2(e)) rounds the exponent: 3 times torch's error in fp32")
    inputs = inputs_for((9, 96), dtype)
    inputs["gate"] = torch.empty(9, 96).uniform_(low, high).to(DEVICE, dtype)
    check_error_rule(swiglu, swiglu_ref, backend, inputs)


@parametrize_backend
def test_gates_beyond_the_range_of_exp(backend):
    gate = torch.tensor([-3e38, -1e4, -200.0, -104.0, -0.0, 0.0, 104.0, 200.0, 1e4, 3e38], device=DEVICE)
    with dispatch.use(backend):
        gate.requires_grad_()
        y = swiglu(gate, torch.ones_like(gate))
        y.sum().backward()
    assert torch.equal(y, gate.clamp(min=0))
    assert gate.grad.tolist() == [0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1]


@parametrize_backend
def test_nan_stays_nan(backend):
    nan = torch.full((20,), float("nan"), device=DEVICE)
    with dispatch.use(backend):
        assert swiglu(nan, torch.ones_like(nan)).isnan().all()
        assert swiglu(torch.ones_like(nan), nan).isnan().all()


@parametrize_backend
@parametrize_dtype
def test_packed_halves_give_the_same_bits(backend, dtype):
    packed = randn(7, 2 * 50, dtype=dtype).requires_grad_()
    gate, up = (t.contiguous().detach().requires_grad_() for t in packed.chunk(2, -1))
    dy = randn(7, 50, dtype=dtype)
    with dispatch.use(backend):
        y, y_packed = swiglu(gate, up), swiglu(packed)
        assert torch.equal(y, y_packed) and torch.equal(y, swiglu(*packed.chunk(2, -1)))
        y.backward(dy)
        y_packed.backward(dy)
    assert torch.equal(packed.grad, torch.cat((gate.grad, up.grad), -1))


@parametrize_backend
def test_strided_rows(backend):
    wide = randn(7, 200, dtype=torch.bfloat16)
    up = randn(7, 64, dtype=torch.bfloat16)
    with dispatch.use(backend):
        assert torch.equal(swiglu(wide[:, 40:104], up), swiglu(wide[:, 40:104].contiguous(), up))
        assert torch.equal(swiglu(wide.T[:64].T, up), swiglu(wide[:, :64].contiguous(), up))


def test_cpu_reads_and_writes_halves_in_place():
    kernel = dispatch.backend("swiglu", "cpu")
    packed, gradient = randn(2, 7, 2 * 50, dtype=torch.bfloat16)
    gradient.fill_(float("nan"))
    check_no_copy(kernel.forward, *packed.chunk(2, -1))
    check_no_copy(kernel.backward, randn(7, 50, dtype=torch.bfloat16), *packed.chunk(2, -1), *gradient.chunk(2, -1))
    assert gradient.isfinite().all()


@parametrize_backend
def test_a_row_does_not_depend_on_the_batch(backend):
    inputs = inputs_for((70, 96), torch.float32)
    with dispatch.use(backend):
        assert torch.equal(swiglu(**inputs)[50:51], swiglu(**{n: t[50:51] for n, t in inputs.items()}))


@parametrize_backend
@parametrize_packed
def test_does_not_touch_its_inputs(backend, packed):
    inputs = {n: t.requires_grad_() for n, t in inputs_for((5, 48), torch.bfloat16, packed).items()}
    before = {n: t.detach().clone() for n, t in inputs.items()}
    dy = randn(5, 48, dtype=torch.bfloat16)
    dy_before = dy.clone()
    with dispatch.use(backend):
        swiglu(**inputs).backward(dy)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs) and torch.equal(dy, dy_before)


@parametrize_backend
@parametrize_packed
def test_registration_and_compile(backend, packed):
    inputs = inputs_for((6, 40), torch.float32, packed)
    args = (*(t.clone().requires_grad_() for t in inputs.values()), backend)
    custom_op = torch.ops.qwen3.swiglu_packed.default if packed else torch.ops.qwen3.swiglu.default
    check_registration(swiglu, backend, custom_op, args, inputs)


@parametrize_backend
def test_repeatable(backend):
    check_repeatable(swiglu, backend, inputs_for((pick(backend, 300, 40), 256), torch.bfloat16))


@parametrize_dtype
def test_exact_mode_has_transformers_rounding(dtype):
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    mlp = Qwen3MLP(Qwen3Config(hidden_size=32, intermediate_size=96)).to(DEVICE, dtype)
    x, hidden = randn(8, 32, dtype=dtype, scale=20), []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        mlp(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        assert torch.equal(swiglu(gate, up, exact=True), hidden[0])
        assert torch.equal(swiglu(torch.cat((gate, up), -1), exact=True), hidden[0])


@parametrize_packed
def test_empty(packed):
    for shape in ((0, 8), (3, 0)):
        inputs = {n: t.requires_grad_() for n, t in inputs_for(shape, torch.float32, packed).items()}
        y = swiglu(**inputs)
        assert y.shape == shape
        y.sum().backward()
        assert all(t.grad.shape == t.shape for t in inputs.values())


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"up": torch.ones(2, 7, device=DEVICE)}, ValueError, r"up is \(2, 7\); expected gate's shape \(2, 8\)"),
        ({"up": torch.ones(2, 8, device=DEVICE, dtype=torch.bfloat16)}, TypeError, "up is torch.bfloat16"),
        ({"up": torch.ones(2, 8, device="meta")}, ValueError, "up is on meta"),
        ({"gate": torch.ones(2, 7, device=DEVICE), "up": None}, ValueError, r"gate is \(2, 7\); expected an even"),
        ({"gate": torch.ones((), device=DEVICE), "up": None}, ValueError, r"gate is \(\)"),
        ({"gate": torch.ones(2, 8, device=DEVICE, dtype=torch.int64)}, TypeError, "gate is torch.int64"),
    ],
    ids=["up-shape", "up-dtype", "device", "odd-packed", "scalar", "integer"],
)
def test_bad_input(change, error, words):
    good = {"gate": torch.ones(2, 8, device=DEVICE), "up": torch.ones(2, 8, device=DEVICE)}
    with pytest.raises(error, match=words):
        swiglu(**(good | change))
