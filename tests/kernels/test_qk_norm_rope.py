import pytest
import torch
from common import (
    DEVICE, backends, check_error_rule, check_no_copy, check_registration, check_repeatable, parametrize_dtype, pick,
    randn,
)

from qwen3_kernels import dispatch, qk_norm_rope
from qwen3_kernels.ops.qk_norm_rope import qk_norm_rope_ref

parametrize_backend = pytest.mark.parametrize("backend", backends("qk_norm_rope"))
SHAPES = [(1, 1, 1, 2), (1, 16, 8, 128), (3, 3, 1, 6), (5, 4, 2, 34), (33, 2, 1, 64), (130, 4, 2, 16)]  # N, Hq, Hk, D


def table(positions: torch.Tensor, D: int) -> dict[str, torch.Tensor]:
    """cos and sin [R, D/2] of Qwen3's angles, rounded once from fp64."""
    angle = positions.double().unsqueeze(-1) * 1e6 ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
    return {"cos": angle.cos().float().to(DEVICE), "sin": angle.sin().float().to(DEVICE)}


def inputs_for(shape, dtype, weight_dtype=None, scale=1.0, positions=None):
    *lead, Hq, Hk, D = shape
    positions = torch.randint(0, 40960, (lead[-1],)) if positions is None else positions
    weights = {n: randn(D, dtype=weight_dtype or dtype) for n in ("q_weight", "k_weight")}
    q, k = (randn(*lead, H, D, dtype=dtype, scale=scale) for H in (Hq, Hk))
    return {"q": q, "k": k} | weights | table(positions, D)


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, shape):
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs_for(shape, dtype))


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e15], ids=["eps-dominated", "small", "large", "huge"])
def test_adversarial_scales(backend, dtype, scale):
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs_for((9, 4, 2, 48), dtype, scale=scale))


@parametrize_backend
def test_zero_heads_and_signed_weights(backend):
    inputs = inputs_for((6, 4, 2, 48), torch.float32)
    inputs["q"][2, 1] = 0
    inputs["k"][3] = 0
    for name in ("q_weight", "k_weight"):
        inputs[name][::3] = 0
        inputs[name][1::3] *= -1
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs)


@parametrize_backend
def test_heads_of_every_size_in_one_token(backend):
    inputs = inputs_for((5, 6, 2, 48), torch.float32)
    inputs["q"] *= torch.tensor([1e-8, 1e-3, 1.0, 1e3, 1e8, 1e15], device=DEVICE).view(6, 1)
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs)


@parametrize_backend
@parametrize_dtype
def test_position_of_a_million(backend, dtype):
    inputs = inputs_for((5, 4, 2, 128), dtype, positions=torch.arange(999_998, 1_000_003))
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs)


@parametrize_backend
def test_fp32_weights_with_bf16_input(backend):
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs_for((9, 4, 2, 48), torch.bfloat16, torch.float32))


@parametrize_backend
def test_long_sums_in_the_gradients_of_the_weights(backend):
    inputs = inputs_for((pick(backend, 4000, 100), 2, 1, 8), torch.float32)
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs)


@parametrize_backend
def test_batches_share_a_table(backend):
    check_error_rule(qk_norm_rope, qk_norm_rope_ref, backend, inputs_for((3, 5, 4, 2, 16), torch.float32))


@parametrize_backend
def test_token_n_uses_row_n_mod_R(backend):
    shared = inputs_for((3, 5, 4, 2, 16), torch.float32)
    repeated = shared | {n: shared[n].repeat(3, 1) for n in ("cos", "sin")}
    with dispatch.use(backend):
        assert all(torch.equal(a, b) for a, b in zip(qk_norm_rope(**shared), qk_norm_rope(**repeated), strict=True))


@parametrize_backend
def test_rotation_keeps_the_norm_and_turns_by_the_relative_position(backend):
    """Equal q and k give a product that depends on the distance of their positions alone."""
    D = 32
    x, ones = randn(1, 1, D, dtype=torch.float32).expand(8, 1, D), torch.ones(D, device=DEVICE)
    with dispatch.use(backend):
        q, k = qk_norm_rope(x, x, ones, ones, **table(torch.arange(8) * 3, D))
    product = (q[:, 0] @ k[:, 0].T).cpu()
    torch.testing.assert_close(product[1:, 1:], product[:-1, :-1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(product.diagonal(), torch.full((8,), float(D)), rtol=1e-5, atol=0)
    assert (product[0, 1:] - D).abs().min() > 0.1


@parametrize_backend
@parametrize_dtype
def test_views_of_a_packed_projection(backend, dtype):
    packed = randn(9, (4 + 2 + 2) * 16, dtype=dtype)
    inputs = inputs_for((9, 4, 2, 16), dtype)
    q, k = packed[:, : 4 * 16].view(9, 4, 16), packed[:, 4 * 16 : 6 * 16].view(9, 2, 16)
    by_head = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in (("q", q), ("k", k))}
    by_column = {n: t.mT.contiguous().mT for n, t in (("q", q), ("k", k))}
    with dispatch.use(backend):
        want = qk_norm_rope(**(inputs | {"q": q.contiguous(), "k": k.contiguous()}))
        for views in ({"q": q, "k": k}, by_head, by_column):
            got = qk_norm_rope(**(inputs | views))
            assert all(t.is_contiguous() for t in got)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@parametrize_backend
def test_gradients_may_come_by_head(backend):
    inputs = inputs_for((9, 4, 2, 16), torch.float32)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "q_weight", "k_weight")]
    d = randn(4, 9, 16, dtype=torch.float32), randn(2, 9, 16, dtype=torch.float32)
    with dispatch.use(backend):
        out = qk_norm_rope(**inputs)
        strided = torch.autograd.grad(out, leaves, [t.transpose(0, 1) for t in d], retain_graph=True)
        plain = torch.autograd.grad(out, leaves, [t.transpose(0, 1).contiguous() for t in d])
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_cpu_reads_views_in_place():
    kernel = dispatch.backend("qk_norm_rope", "cpu")
    packed, d_packed = randn(2, 9, (4 + 2 + 2) * 16, dtype=torch.float32)
    views = [t[:, a * 16 : b * 16].view(9, b - a, 16) for t in (d_packed, packed) for a, b in ((0, 4), (4, 6))]
    rest = list(inputs_for((9, 4, 2, 16), torch.float32).values())[2:]
    check_no_copy(kernel.forward, *views[2:], *rest, 1e-6)
    check_no_copy(kernel.backward, *views, *rest, 1e-6)


@parametrize_backend
def test_only_q_is_used(backend):
    inputs = inputs_for((5, 4, 2, 16), torch.float32)
    leaves = {n: inputs[n].requires_grad_() for n in ("q", "k", "q_weight", "k_weight")}
    with dispatch.use(backend):
        qk_norm_rope(**inputs)[0].square().sum().backward()
    assert leaves["q"].grad.abs().sum() > 0 and leaves["q_weight"].grad.abs().sum() > 0
    assert not leaves["k"].grad.any() and not leaves["k_weight"].grad.any()


@parametrize_backend
def test_a_token_does_not_depend_on_the_batch(backend):
    inputs = inputs_for((70, 4, 2, 16), torch.float32)
    one = {n: t if n.endswith("weight") else t[50:51] for n, t in inputs.items()}
    with dispatch.use(backend):
        assert all(torch.equal(a[50:51], b) for a, b in zip(qk_norm_rope(**inputs), qk_norm_rope(**one), strict=True))


@parametrize_backend
def test_does_not_touch_its_inputs(backend):
    inputs = inputs_for((5, 4, 2, 16), torch.bfloat16)
    before = {n: t.clone() for n, t in inputs.items()}
    for name in ("q", "k", "q_weight", "k_weight"):
        inputs[name].requires_grad_()
    d = randn(5, 4, 16, dtype=torch.bfloat16), randn(5, 2, 16, dtype=torch.bfloat16)
    d_before = [t.clone() for t in d]
    with dispatch.use(backend):
        torch.autograd.backward(qk_norm_rope(**inputs), d)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
    assert all(torch.equal(a, b) for a, b in zip(d, d_before, strict=True))


@parametrize_backend
def test_registration_and_compile(backend):
    inputs = inputs_for((6, 4, 2, 16), torch.float32)
    args = [t.clone().requires_grad_(n not in ("cos", "sin")) for n, t in inputs.items()]
    check_registration(
        qk_norm_rope, backend, torch.ops.qwen3.qk_norm_rope.default, (*args, 1e-6, backend), inputs
    )


@parametrize_backend
def test_repeatable(backend):
    """With fp32 weights: in bf16 the gradients of the weights would hide a changed order of their sums."""
    shape = (pick(backend, 300, 40), 4, 2, 32)
    check_repeatable(qk_norm_rope, backend, inputs_for(shape, torch.bfloat16, torch.float32))


@parametrize_dtype
def test_exact_mode_has_transformers_rounding(dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    inputs = inputs_for((2, 7, 4, 2, 32), dtype, scale=3)
    norms = [Qwen3RMSNorm(32).to(DEVICE, dtype) for _ in range(2)]
    with torch.no_grad():
        for norm, name in zip(norms, ("q", "k")):
            norm.weight.copy_(inputs[f"{name}_weight"])
        normed = [norm(inputs[n]).transpose(1, 2) for norm, n in zip(norms, ("q", "k"))]
    cos, sin = (torch.cat((inputs[n], inputs[n]), -1)[None].to(dtype) for n in ("cos", "sin"))
    want = [t.transpose(1, 2) for t in apply_rotary_pos_emb(*normed, cos, sin)]
    assert all(torch.equal(a, b) for a, b in zip(qk_norm_rope(**inputs, exact=True), want, strict=True))


def test_empty():
    inputs = inputs_for((0, 4, 2, 16), torch.float32)
    q, k = qk_norm_rope(**inputs)
    assert q.shape == (0, 4, 16) and k.shape == (0, 2, 16)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.ones(6, 8, device=DEVICE)}, ValueError, r"q is \(6, 8\); expected \[..., Hq, D\]"),
        ({"q": torch.ones(6, 4, 7, device=DEVICE)}, ValueError, r"q is \(6, 4, 7\); expected an even head dimension"),
        ({"k": torch.ones(5, 2, 8, device=DEVICE)}, ValueError, r"k is \(5, 2, 8\)"),
        ({"k": torch.ones(6, 2, 8, device=DEVICE, dtype=torch.bfloat16)}, TypeError, "k is torch.bfloat16"),
        ({"k_weight": torch.ones(7, device=DEVICE)}, ValueError, r"k_weight is \(7,\); expected shape \(8,\)"),
        ({"q_weight": torch.ones(8, device="meta")}, ValueError, "q_weight is on meta"),
        ({"cos": torch.ones(3, 8, device=DEVICE)}, ValueError, r"cos is \(3, 8\); expected \[R, 4\]"),
        ({"sin": torch.ones(2, 4, device=DEVICE)}, ValueError, r"sin is \(2, 4\); expected cos's shape \(3, 4\)"),
        ({n: torch.ones(4, 4, device=DEVICE) for n in ("cos", "sin")}, ValueError, r"cos is \(4, 4\).*divides N = 6"),
        ({"q": torch.ones(6, 4, 8, device=DEVICE, dtype=torch.int64)}, TypeError, "q is torch.int64"),
    ],
    ids=["q-dims", "odd-D", "k-tokens", "k-dtype", "weight-shape", "device", "cos-width", "sin-shape", "R", "integer"],
)
def test_bad_input(change, error, words):
    good = {"q": torch.ones(6, 4, 8), "k": torch.ones(6, 2, 8), "q_weight": torch.ones(8), "k_weight": torch.ones(8),
            "cos": torch.ones(3, 4), "sin": torch.ones(3, 4)}
    with pytest.raises(error, match=words):
        qk_norm_rope(**({n: t.to(DEVICE) for n, t in good.items()} | change))
