import pytest
import torch
from common import DEVICE, backends, check_error_rule, check_registration, check_repeatable, parametrize_dtype, randn

from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_kernels import dispatch, rms_norm
from qwen3_kernels.ops.rms_norm import rms_norm_ref

parametrize_backend = pytest.mark.parametrize("backend", backends("rms_norm"))
SHAPES = [(1, 8), (3, 17), (5, 64), (33, 129), (2, 7, 1024), (130, 40)]


def inputs_for(shape, dtype, residual, weight_dtype=None, scale=1.0):
    x = {"x": randn(*shape, dtype=dtype, scale=scale), "weight": randn(shape[-1], dtype=weight_dtype or dtype)}
    return x | ({"residual": randn(*shape, dtype=dtype, scale=scale)} if residual else {})


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, residual, shape):
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs_for(shape, dtype, residual))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule_of_a_fork(backend, dtype, shape):
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs_for(shape, dtype, False), fork=True)


@pytest.mark.parametrize("backend", [b for b in backends("rms_norm") if b != "triton" or DEVICE == "cuda"])
def test_weight_gradients_of_long_batches(backend):
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs_for((20000, 24), torch.float32, False))


@parametrize_backend
def test_rows_of_one_number(backend):
    """y is the number's sign and the weight's; the gradient nearly cancels, so only its absolute error means something."""
    x, weight = randn(9, 1, dtype=torch.float32).requires_grad_(), randn(1, dtype=torch.float32)
    with dispatch.use(backend):
        y = rms_norm(x, weight)
        (dx,) = torch.autograd.grad(y.sum(), x)
    wide, w = x.detach().double(), weight.double()
    rstd = (wide.square() + 1e-6).rsqrt()
    torch.testing.assert_close(y.double(), wide * rstd * w, rtol=1e-6, atol=0)
    assert ((dx - w * 1e-6 * rstd**3).abs() <= 5e-7 * (w * rstd).abs()).all()


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e15], ids=["eps-dominated", "small", "large", "huge"])
def test_adversarial_scales(backend, dtype, scale):
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs_for((9, 96), dtype, False, scale=scale))


@parametrize_backend
def test_zero_rows_and_signed_weights(backend):
    inputs = inputs_for((6, 96), torch.float32, False)
    inputs["x"][2] = 0
    inputs["weight"][::3] = 0
    inputs["weight"][1::3] *= -1
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs)


@parametrize_backend
def test_fp32_weight_with_bf16_input(backend):
    check_error_rule(rms_norm, rms_norm_ref, backend, inputs_for((9, 96), torch.bfloat16, True, torch.float32))


@parametrize_backend
def test_only_the_residual_stream_is_used(backend):
    inputs = {n: t.requires_grad_() for n, t in inputs_for((4, 32), torch.float32, True).items()}
    with dispatch.use(backend):
        _, h = rms_norm(**inputs)
        h.sum().backward()
    assert torch.equal(inputs["x"].grad, torch.ones(4, 32, device=DEVICE))
    assert torch.equal(inputs["residual"].grad, torch.ones(4, 32, device=DEVICE))
    assert inputs["weight"].grad is None


@parametrize_backend
@pytest.mark.parametrize("used", ["norm", "stream"])
def test_one_branch_of_a_fork_is_used(backend, used):
    inputs = {n: t.requires_grad_() for n, t in inputs_for((2, 3, 32), torch.float32, False).items()}
    with dispatch.use(backend):
        y, h = rms_norm(**inputs, fork=True)
        alone = torch.autograd.grad(rms_norm(**inputs).square().sum(), inputs.values())
        (y.square() if used == "norm" else h).sum().backward()
    if used == "norm":
        assert all(torch.equal(t.grad, g) for t, g in zip(inputs.values(), alone, strict=True))
    else:
        assert torch.equal(inputs["x"].grad, torch.ones(2, 3, 32, device=DEVICE)) and inputs["weight"].grad is None


@parametrize_backend
def test_a_fork_adds_in_the_kernel_and_keeps_its_input_once(backend):
    class Adds(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
            return func(*args, **(kwargs or {}))

    def kept_and_added(function):
        kept = {}
        with dispatch.use(backend), saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            y, h = function(x, weight)
        assert h.data_ptr() == x.data_ptr()
        with Adds() as adds:
            torch.autograd.backward((y, h), (y.detach(), y.detach()))
        return {t.shape for pointer, t in kept.items() if pointer not in (x.data_ptr(), weight.data_ptr())}, adds.count

    x, weight = (t.requires_grad_() for t in inputs_for((5, 48), torch.float32, False).values())
    assert kept_and_added(lambda x, weight: (rms_norm(x, weight), x)) == ({(5,)}, 1)
    x.grad = weight.grad = None
    assert kept_and_added(lambda x, weight: rms_norm(x, weight, fork=True)) == ({(5,)}, 0)


@parametrize_backend
def test_a_fork_of_a_constant(backend):
    """The stream that goes on asks for no gradient that its source did not ask for."""
    x, weight = randn(4, 32, dtype=torch.float32), randn(32, dtype=torch.float32).requires_grad_()
    with dispatch.use(backend):
        y, h = rms_norm(x, weight, fork=True)
    assert y.requires_grad and not h.requires_grad and torch.equal(h, x)


@parametrize_backend
def test_strided_rows_are_read_in_place(backend):
    wide = randn(7, 200, dtype=torch.bfloat16)
    weight = randn(64, dtype=torch.bfloat16)
    with dispatch.use(backend):
        assert torch.equal(rms_norm(wide[:, 40:104], weight), rms_norm(wide[:, 40:104].contiguous(), weight))
        assert torch.equal(rms_norm(wide.T[:64].T, weight), rms_norm(wide[:, :64].contiguous(), weight))


@parametrize_backend
def test_does_not_touch_its_inputs(backend):
    inputs = inputs_for((5, 48), torch.bfloat16, True)
    before = {n: t.clone() for n, t in inputs.items()}
    with dispatch.use(backend):
        rms_norm(**inputs)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


@parametrize_backend
@pytest.mark.parametrize("form", ["plain", "residual", "fork"])
def test_registration_and_compile(backend, form):
    inputs = inputs_for((6, 40), torch.float32, form == "residual")
    args = (inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs.get("residual"), 1e-6, backend)
    check_registration(rms_norm, backend, torch.ops.qwen3.rms_norm.default, args, inputs, fork=form == "fork")


@parametrize_backend
def test_repeatable(backend):
    check_repeatable(rms_norm, backend, inputs_for((300, 96), torch.bfloat16, True, torch.float32))


def test_exact_mode_has_transformers_rounding():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, norm = randn(64, 96, dtype=torch.bfloat16, scale=3), Qwen3RMSNorm(96).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(96))
    assert torch.equal(rms_norm(x, norm.weight, 1e-6, exact=True), norm(x))


def test_empty_rows():
    assert rms_norm(torch.empty(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)).shape == (0, 8)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"weight": torch.ones(7, device=DEVICE)}, ValueError, r"weight is \(7,\); expected shape \(8,\)"),
        ({"residual": torch.ones(3, 8, device=DEVICE)}, ValueError, r"residual is \(3, 8\)"),
        ({"residual": torch.ones(2, 8, device=DEVICE, dtype=torch.bfloat16)}, TypeError, "residual is torch.bfloat16"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
        ({"x": torch.ones(2, 0, device=DEVICE)}, ValueError, r"x is \(2, 0\)"),
        ({"x": torch.ones(2, 8, device=DEVICE, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    ],
    ids=["weight-shape", "residual-shape", "residual-dtype", "device", "empty-width", "integer"],
)
def test_bad_input(change, error, words):
    good = {"x": torch.ones(2, 8, device=DEVICE), "weight": torch.ones(8, device=DEVICE)}
    with pytest.raises(error, match=words):
        rms_norm(**(good | change))
