import sys

import pytest
import torch
from common import DEVICE, check_repeatable, parametrize_dtype, randn
from torch import nn

from qwen3_kernels import dispatch, selfcheck, swiglu_mlp
from qwen3_kernels.ops.swiglu_mlp import MIN_ROWS, fuses, swiglu_mlp_ref

module = sys.modules[swiglu_mlp.__module__]  # whose name in the package is the op's
FUSED = dispatch.unavailable("swiglu_mlp", "cuda", DEVICE, torch.bfloat16) is None
hopper = [pytest.mark.gpu, pytest.mark.skipif(not FUSED, reason="needs the compiled kernels on a Hopper GPU")]


def inputs_for(lead, D, I, dtype, scale=1.0):
    x, down = randn(*lead, D, dtype=dtype, scale=scale), randn(D, I, dtype=dtype, scale=I**-0.5)
    return {"x": x, "gate": randn(I, D, dtype=dtype, scale=D**-0.5), "up": randn(I, D, dtype=dtype, scale=D**-0.5), "down": down}


def check(inputs):
    ratios = selfcheck.ratios(swiglu_mlp, swiglu_mlp_ref, inputs)
    assert max(ratios) <= selfcheck.LIMIT, ratios


@parametrize_dtype
@pytest.mark.parametrize("lead", [(1,), (2, 7), (64,), ()], ids=str)
def test_error_rule(dtype, lead):
    check(inputs_for(lead, 24, 40, dtype))


@pytest.mark.parametrize("name, shape", [("gate", (40, 16)), ("up", (32, 24)), ("down", (40, 24))])
def test_wrong_shapes_are_named(name, shape):
    inputs = inputs_for((3,), 24, 40, torch.float32) | {name: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match=f"swiglu_mlp: {'gate|up' if name == 'gate' else name}"):
        swiglu_mlp(**inputs)


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match="down"):
        swiglu_mlp(**inputs_for((3,), 24, 40, torch.float32) | {"down": torch.zeros(24, 40, device=DEVICE).bfloat16()})


def fake_kernels(monkeypatch):
    """The fused path with its two products in plain torch, so that it runs anywhere."""

    class Kernels:
        @staticmethod
        def up(x, gate, up):
            h = torch.cat((x @ gate.mT, x @ up.mT), -1)
            return h, module.swiglu_ref(h)

        @staticmethod
        def down_backward(dy, down, h):
            gate, up = h.chunk(2, -1)
            s, da = gate.sigmoid(), dy @ down
            return torch.cat((da * up * s * (1 + gate * (1 - s)), da * gate * s), -1), module.swiglu_ref(h)

    monkeypatch.setattr(dispatch, "resolve", lambda *_: "cuda")
    monkeypatch.setattr(dispatch, "backend", lambda *_: Kernels)
    monkeypatch.setattr(module, "MIN_ROWS", 1)


@pytest.mark.parametrize("frozen", [(), ("x",), ("gate", "down"), ("gate", "up"), ("x", "gate", "up")], ids=str)
def test_the_fused_gradients(monkeypatch, frozen):
    fake_kernels(monkeypatch)
    inputs = {n: t.requires_grad_(n not in frozen) for n, t in inputs_for((2, 9), 24, 40, torch.float64).items()}
    live = [t for t in inputs.values() if t.requires_grad]
    got, want = swiglu_mlp(**inputs), swiglu_mlp_ref(**inputs)
    dy = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, live, dy), torch.autograd.grad(want, live, dy)):
        torch.testing.assert_close(g, w)


def test_fuses_only_plain_layers(monkeypatch):
    fake_kernels(monkeypatch)
    x = randn(4, 24, dtype=torch.float32)
    layers = [nn.Linear(a, b, bias=False, device=DEVICE) for a, b in ((24, 40), (24, 40), (40, 24))]
    assert fuses(x, *layers)
    assert not fuses(x, *layers[:2], nn.Linear(40, 24, device=DEVICE))
    assert not fuses(randn(4, 20, dtype=torch.float32), *layers)  # not a multiple of 8
    layers[0].register_forward_hook(lambda *_: None)
    assert not fuses(x, *layers)


@pytest.mark.parametrize(
    "lead, D, I",
    [pytest.param(*shape, marks=hopper, id=str(shape)) for shape in (
        ((MIN_ROWS,), 64, 72), ((3, 683), 1024, 3072), ((MIN_ROWS + 1,), 8, 8), ((MIN_ROWS + 77,), 264, 392))],
)
def test_error_rule_on_hopper(lead, D, I):
    inputs = inputs_for(lead, D, I, torch.bfloat16)
    assert module.has_kernel(inputs["x"], inputs["gate"])
    check(inputs)


@pytest.mark.parametrize("scale", [pytest.param(s, marks=hopper) for s in (1e-4, 1e3)])
def test_adversarial_scales_on_hopper(scale):
    check(inputs_for((MIN_ROWS,), 64, 72, torch.bfloat16, scale))


@pytest.mark.parametrize("view", [pytest.param(v, marks=hopper) for v in ("strided", "offset", "grad expanded")])
def test_views_on_hopper(view):
    inputs = inputs_for((MIN_ROWS,), 64, 72, torch.bfloat16)
    if view == "strided":
        inputs["x"] = torch.cat((inputs["x"], inputs["x"]), 1)[:, 32:96]
    elif view == "offset":
        inputs["down"] = torch.cat((inputs["down"], inputs["down"]), 1)[:, 3:75]
    whole = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    inputs = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    grads = [torch.autograd.grad(swiglu_mlp(**d).sum(), list(d.values())) for d in (inputs, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("times", [pytest.param(100, marks=hopper)])
def test_repeats_bitwise_on_hopper(times):
    check_repeatable(swiglu_mlp, "cuda", inputs_for((MIN_ROWS + 9,), 256, 392, torch.bfloat16), times)


@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=hopper)])
def test_compiles_on_hopper(backend):
    inputs = {n: t.requires_grad_() for n, t in inputs_for((MIN_ROWS,), 64, 72, torch.bfloat16).items()}
    torch._dynamo.reset()
    compiled = torch.compile(swiglu_mlp, fullgraph=True, backend=backend)
    grads = [torch.autograd.grad(op(**inputs).square().sum(), list(inputs.values())) for op in (swiglu_mlp, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("rows", [pytest.param(MIN_ROWS, marks=hopper)])
def test_cuda_graph_on_hopper(rows):
    """Of the kernels; autograd would bring the streams of its leaves into it."""
    inputs = inputs_for((rows,), 64, 72, torch.bfloat16)
    dy = randn(rows, 64, dtype=torch.bfloat16)

    def step():
        h, a = module._up(inputs["x"], inputs["gate"], inputs["up"])
        return h, a, *module._down_backward(dy, inputs["down"], h)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs["x"].mul_(2.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))
