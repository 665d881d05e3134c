import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen3_kernels.ops import linears as module
from qwen3_kernels.ops.linears import linears, project


def inputs(dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, *ws = (torch.randn(shape, generator=g).to(device, dtype) for shape in ((2, 5, 16), (24, 16), (8, 16), (8, 16)))
    return x.requires_grad_(), [w.requires_grad_() for w in ws]


@pytest.mark.parametrize("frozen", [(), (0,), (1, 3), (1, 2, 3)])  # 0 is x
def test_equals_separate_products(frozen):
    x, ws = inputs(torch.float64)
    for i in frozen:
        (x, *ws)[i].requires_grad_(False)
    live = [t for t in (x, *ws) if t.requires_grad]
    ys, expected = linears(x, *ws), [F.linear(x, w) for w in ws]
    dys = [torch.randn_like(y) for y in ys]
    for y, e in zip(ys, expected):
        assert torch.equal(y, e)
    for got, want in zip(torch.autograd.grad(ys, live, dys), torch.autograd.grad(expected, live, dys)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 0, 16)], ids=str)
def test_any_leading_shape(shape):
    x, ws = torch.randn(shape, dtype=torch.float64, requires_grad=True), inputs(torch.float64)[1]
    loss = sum(y.square().sum() for y in linears(x, *ws))
    want = torch.autograd.grad(sum(F.linear(x, w).square().sum() for w in ws), (x, *ws))
    for g, w in zip(torch.autograd.grad(loss, (x, *ws)), want):
        torch.testing.assert_close(g, w)


def test_gradcheck():
    x, ws = inputs(torch.float64)
    assert torch.autograd.gradcheck(linears, (x, *ws))


def test_one_output_unused():
    x, ws = inputs(torch.float64)
    a, _, c = linears(x, *ws)
    got = torch.autograd.grad(a.sum() + c.square().sum(), (x, *ws))
    want = torch.autograd.grad(F.linear(x, ws[0]).sum() + F.linear(x, ws[2]).square().sum(), (x, ws[0], ws[2]))
    for g, w in zip((got[0], got[1], got[3]), want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert not got[2].any()


PLACES = {  # where the gradients of 24, 8 and 8 columns lie in a tensor of 48
    "side by side": ((0, 24, 32), 40), "in a wider row": ((0, 24, 32), 48), "swapped": ((0, 32, 24), 40),
    "apart": ((0, 24, 40), 48), "overlapping": ((0, 16, 24), 40),
}


@pytest.mark.parametrize("place", PLACES)
def test_gradients_within_one_tensor(place, monkeypatch):
    """They are multiplied as one matrix where they are one, and never else."""
    starts, width = PLACES[place]
    found, look = [], module._side_by_side
    monkeypatch.setattr(module, "_side_by_side", lambda parts: found.append(look(parts)) or found[-1])
    x, ws = inputs(torch.float64)
    whole = torch.randn(2, 5, width, dtype=torch.float64)
    dys = [whole[..., start : start + len(w)] for start, w in zip(starts, ws)]
    got = torch.autograd.grad(linears(x, *ws), (x, *ws), dys)
    assert (found[0] is not None) == (place == "side by side")
    for g, want in zip(got, torch.autograd.grad([F.linear(x, w) for w in ws], (x, *ws), dys)):
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-12)


def test_batched_gradients():
    """As torch.autograd.functional.jacobian takes them with vectorize=True."""
    x, ws = inputs(torch.float64)
    dys = [torch.randn(3, 2, 5, len(w), dtype=torch.float64) for w in ws]
    got = torch.autograd.grad(linears(x, *ws), (x, *ws), dys, is_grads_batched=True)
    for g, want in zip(got, torch.autograd.grad([F.linear(x, w) for w in ws], (x, *ws), dys, is_grads_batched=True)):
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
    x, ws = inputs(torch.float64)
    joined = lambda x, *ws: torch.cat(linears(x, *ws), -1).square()  # noqa: E731  its gradients lie side by side
    assert torch.autograd.gradgradcheck(joined, (x, *ws))


def test_error_is_no_larger_than_separate_products():
    errors = []
    for seed in range(8):
        x, ws = inputs(torch.bfloat16, seed)
        dys = [torch.randn(2, 5, w.shape[0]).bfloat16() for w in ws]
        truth = sum(dy.double() @ w.detach().double() for dy, w in zip(dys, ws))
        got, plain = (torch.autograd.grad(f(x, *ws), x, dys)[0] for f in (linears, lambda x, *ws: [F.linear(x, w) for w in ws]))
        errors.append([(t.double() - truth).norm() for t in (got, plain)])
    ours, plain = torch.tensor(errors).square().sum(0).sqrt()
    assert ours <= 1.05 * plain


def test_under_autocast_the_products_are_autocast_ones():
    x, ws = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(y.dtype == torch.bfloat16 for y in linears(x, *ws))


def test_compiles_whole():
    x, ws = inputs()
    loss = lambda x, *ws: sum(y.square().sum() for y in linears(x, *ws))  # noqa: E731
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, *ws), (x, *ws))
    for g, w in zip(got, torch.autograd.grad(loss(x, *ws), (x, *ws))):
        torch.testing.assert_close(g, w)


def layers():
    torch.manual_seed(0)
    return [nn.Linear(16, n, bias=False) for n in (24, 8)]


def test_project_of_plain_layers(monkeypatch):
    used = []
    monkeypatch.setattr(module, "linears", lambda x, *ws: used.append(len(ws)) or tuple(F.linear(x, w) for w in ws))
    x, pair = torch.randn(3, 16), layers()
    for y, layer in zip(project(x, *pair), pair):
        assert torch.equal(y, layer(x))
    assert used == [2]


def test_project_calls_what_is_not_plain(monkeypatch):
    monkeypatch.setattr(module, "linears", None)
    x, seen = torch.randn(3, 16), []
    hooked, biased, wrapped, other = layers(), layers(), layers(), layers()
    hooked[1].register_forward_hook(lambda *_: seen.append("hook"))
    biased[0] = nn.Linear(16, 24)
    wrapped[0].forward = lambda x: seen.append("forward") or x
    other[1] = nn.Sequential(other[1])
    for pair in (hooked, biased, wrapped, other):
        for y, layer in zip(project(x, *pair), pair):
            assert torch.equal(y, layer(x))
    assert seen == ["hook", "hook", "forward", "forward"]
