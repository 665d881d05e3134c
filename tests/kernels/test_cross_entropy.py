import pytest
import torch
from common import (
    DEVICE, backends, check_error_rule, check_no_copy, check_registration, check_repeatable, parametrize_dtype, pick,
    randn,
)

from qwen3_kernels import cross_entropy, dispatch
from qwen3_kernels.ops.cross_entropy import REDUCTIONS, cross_entropy_ref

parametrize_backend = pytest.mark.parametrize("backend", backends("cross_entropy"))
SHAPES = [(1, 1), (50, 2), (4, 17), (2, 3, 519), (9, 2049), (1, 5000), (70, 33)]
INF = float("inf")


def inputs_for(shape, dtype, scale=1.0, ignored=0.0):
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels[torch.rand(shape[:-1]) < ignored] = -100
    return {"logits": randn(*shape, dtype=dtype, scale=scale), "labels": labels.to(DEVICE)}


def loss_and_grad(backend, logits, labels, dnll=None, **options):
    logits = logits.detach().clone().requires_grad_()
    with dispatch.use(backend):
        nll = cross_entropy(logits, labels, reduction="none", **options)
        nll.backward(torch.ones_like(nll) if dnll is None else dnll)
    return nll.detach(), logits.grad


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, shape):
    *rows, V = shape
    rows = rows if len(rows) > 1 else [pick(backend, rows[0], min(rows[0], 20))]  # in Triton each is a program of its own
    check_error_rule(cross_entropy, cross_entropy_ref, backend, inputs_for((*rows, V), dtype), reduction="none")


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_ignored_labels_and_z_loss(backend, dtype, z_loss):
    inputs = inputs_for((20, 300), dtype, ignored=0.4)
    assert 5 < (inputs["labels"] == -100).sum() < 15
    check_error_rule(cross_entropy, cross_entropy_ref, backend, inputs, reduction="none", z_loss=z_loss)


@parametrize_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(backend, reduction):
    """Against the sum of the rows: the error of a single number is luck, and not for the error rule."""
    inputs = inputs_for((20, 300), torch.float32, ignored=0.4)
    kept = (inputs["labels"] != -100).sum()
    weight = 1 / kept.float() if reduction == "mean" else torch.ones((), device=DEVICE)
    rows, row_grad = loss_and_grad(backend, **inputs, dnll=weight.expand(20), z_loss=1e-2)
    logits = inputs["logits"].requires_grad_()
    with dispatch.use(backend):
        loss = cross_entropy(logits, inputs["labels"], reduction=reduction, z_loss=1e-2)
        loss.sum().backward()
    torch.testing.assert_close(loss, {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept}[reduction])
    torch.testing.assert_close(logits.grad, row_grad, rtol=1e-6, atol=0)


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("scale", [1e-6, 30, 1e4, 1e30], ids=["flat", "peaked", "large", "huge"])
def test_adversarial_scales(backend, dtype, scale):
    inputs = inputs_for((9, 300), dtype, scale=scale)
    check_error_rule(cross_entropy, cross_entropy_ref, backend, inputs, reduction="none")


@parametrize_backend
@parametrize_dtype
@pytest.mark.parametrize("lead", [4.0, 12.0, 20.0, 60.0])
def test_a_true_class_near_probability_one_keeps_relative_accuracy(backend, dtype, lead):
    """Element by element, where the error rule would be content with the cancellation that plain torch suffers."""
    logits, labels = inputs_for((6, 2100), dtype).values()
    rows = torch.arange(6, device=DEVICE)
    logits[rows, labels] = logits.amax(-1) + lead
    wide = logits.double()
    weights = torch.exp(wide - wide.gather(1, labels[:, None]))  # relative to the true class
    weights[rows, labels] = 0
    others = weights.sum(-1)
    grad = weights / (1 + others)[:, None]
    grad[rows, labels] = -others / (1 + others)
    nll, got = loss_and_grad(backend, logits, labels)
    torch.testing.assert_close(nll.double(), others.log1p(), rtol=3e-5, atol=0)
    rtol = 3e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), grad, rtol=rtol, atol=0)


@parametrize_backend
@parametrize_dtype
def test_masked_classes(backend, dtype):
    """-inf in whole stretches, as a grammar would mask them; among them whole blocks of the kernels."""
    logits, labels = inputs_for((6, 5000), dtype).values()
    logits[:, 1:4500] = -INF
    logits[:, 4700:] = -INF
    labels[:3], labels[3:] = 0, 4600
    check_error_rule(cross_entropy, cross_entropy_ref, backend, {"logits": logits, "labels": labels}, reduction="none")


@parametrize_backend
@parametrize_dtype
def test_a_single_possible_class(backend, dtype):
    logits = torch.full((2, 300), -INF, device=DEVICE, dtype=dtype)
    logits[0, 299], logits[1, 7] = 3, -1e4
    nll, grad = loss_and_grad(backend, logits, torch.tensor([299, 7], device=DEVICE))
    assert nll.tolist() == [0, 0] and not grad.any()


@parametrize_backend
def test_an_impossible_true_class(backend):
    logits, labels = inputs_for((3, 300), torch.float32).values()
    logits[torch.arange(3), labels] = -INF
    nll, grad = loss_and_grad(backend, logits, labels)
    assert torch.equal(nll, torch.full_like(nll, INF))
    want = torch.softmax(logits.double(), -1)
    want[torch.arange(3), labels] = -1
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=0)


@parametrize_backend
def test_all_classes_alike(backend):
    for value in (0.0, 1e4, -1e30):
        logits = torch.full((2, 256), value, device=DEVICE)
        nll, grad = loss_and_grad(backend, logits, torch.tensor([0, 255], device=DEVICE))
        torch.testing.assert_close(nll, torch.full_like(nll, 256.0).log())
        torch.testing.assert_close(grad[0, 0].item(), -255 / 256)


@parametrize_backend
@parametrize_dtype
def test_ignored_rows_give_nothing(backend, dtype):
    logits, labels = inputs_for((4, 300), dtype).values()
    labels[1], labels[2] = -100, -100
    logits[2] = float("nan")
    nll, grad = loss_and_grad(backend, logits, labels)
    assert nll[1] == 0 and nll[2] == 0 and not grad[1:3].any()
    alone = loss_and_grad(backend, logits[[0, 3]], labels[[0, 3]])
    assert torch.equal(nll[[0, 3]], alone[0]) and torch.equal(grad[[0, 3]], alone[1])


@parametrize_backend
def test_a_class_may_be_the_ignored_one(backend):
    inputs = inputs_for((20, 5), torch.float32)
    check_error_rule(
        cross_entropy, cross_entropy_ref, backend, inputs, reduction="none", ignore_index=3, z_loss=1e-2
    )
    nll, grad = loss_and_grad(backend, **inputs, ignore_index=3)
    ignored = inputs["labels"] == 3
    assert ignored.any() and not nll[ignored].any() and not grad[ignored].any() and nll[~ignored].all()


@parametrize_backend
def test_all_ignored(backend):
    logits = randn(3, 50, dtype=torch.float32).requires_grad_()
    with dispatch.use(backend):
        loss = cross_entropy(logits, torch.full((3,), -100, device=DEVICE), z_loss=1e-2)
        loss.backward()
    assert loss == 0 and not logits.grad.any()


@parametrize_backend
def test_rows_of_zero_weight_have_exactly_no_gradient(backend):
    dnll = torch.tensor([1.0, 0.0, -2.0], device=DEVICE)
    _, grad = loss_and_grad(backend, **inputs_for((3, 300), torch.float32), dnll=dnll)
    assert not grad[1].any() and grad[0].all() and grad[2].all()


@parametrize_backend
def test_gradient_rows_sum_to_zero(backend):
    _, grad = loss_and_grad(backend, **inputs_for((5, 3000), torch.float32, scale=3))
    assert grad.double().sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("label", [50, -1, -101, 2**40])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_cpu_refuses_labels_out_of_range(label, place):
    logits, labels = inputs_for((2, 3, 50), torch.float32).values()
    labels[place] = label
    words = f"labels has {label} at {place[0] * 3 + place[1]}; expected a class from 0 to 49, or ignore_index, -100"
    with dispatch.use("cpu"), pytest.raises(IndexError, match=words):
        cross_entropy(logits.cpu(), labels.cpu())


@parametrize_backend
def test_strided_rows(backend):
    wide = randn(7, 700, dtype=torch.bfloat16)
    labels = torch.randint(0, 300, (7, 2), device=DEVICE)[:, 1]
    for view in (wide[:, 40:340], wide.T[:300].T, wide.T.contiguous().T[:, :300]):
        results = []
        for leaf in (view.detach().requires_grad_(), view.contiguous().requires_grad_()):
            with dispatch.use(backend):
                nll = cross_entropy(leaf, labels, reduction="none")
                results.append((nll, *torch.autograd.grad(nll.sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cpu_reads_strided_rows_in_place():
    kernel = dispatch.backend("cross_entropy", "cpu")
    logits, labels = randn(7, 700, dtype=torch.bfloat16)[:, 40:340], torch.randint(0, 300, (7,))
    check_no_copy(kernel.forward, logits, labels, -100)
    check_no_copy(kernel.backward, torch.ones(7), torch.ones(7), logits, labels, torch.ones(7), -100)


@parametrize_backend
def test_a_row_does_not_depend_on_the_batch(backend):
    rows = pick(backend, 70, 7)
    logits, labels = inputs_for((rows, 90), torch.float32).values()
    some = slice(rows - 2, rows - 1)
    batch, one = (loss_and_grad(backend, logits[s], labels[s]) for s in (slice(None), some))
    assert all(torch.equal(a[some], b) for a, b in zip(batch, one, strict=True))


@parametrize_backend
def test_does_not_touch_its_inputs(backend):
    logits, labels = inputs_for((5, 300), torch.bfloat16, ignored=0.3).values()
    before, labels_before = logits.clone(), labels.clone()
    logits.requires_grad_()
    with dispatch.use(backend):
        cross_entropy(logits, labels, z_loss=1e-2).backward()
    assert torch.equal(logits, before) and torch.equal(labels, labels_before)


@parametrize_backend
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_registration_and_compile(backend, z_loss):
    inputs = inputs_for((6, 40), torch.float32, ignored=0.3)
    args = (inputs["logits"].clone().requires_grad_(), inputs["labels"], -100, backend)
    check_registration(
        cross_entropy, backend, torch.ops.qwen3.cross_entropy.default, args, inputs, z_loss=z_loss
    )


@parametrize_backend
def test_repeatable(backend):
    inputs = inputs_for((pick(backend, 70, 10), 300), torch.bfloat16, ignored=0.3)
    check_repeatable(cross_entropy, backend, inputs, z_loss=1e-2)


@parametrize_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_agrees_with_torch(backend, reduction, ignore_index):
    options = {"reduction": reduction, "ignore_index": ignore_index}
    logits, labels = inputs_for((20, 6), torch.float32).values()
    labels[::4] = ignore_index
    with dispatch.use(backend):
        got = cross_entropy(logits, labels, **options)
    want = torch.nn.functional.cross_entropy(logits, labels, **options)
    torch.testing.assert_close(got, want)


def test_empty():
    logits, labels = torch.empty(0, 8, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert cross_entropy(logits, labels) == 0
    assert cross_entropy(logits, labels, reduction="none").shape == (0,)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"labels": torch.zeros(3, dtype=torch.int64, device=DEVICE)}, ValueError, r"labels is \(3,\); expected shape"),
        ({"labels": torch.zeros(2, dtype=torch.int32, device=DEVICE)}, TypeError, "labels is torch.int32; expected"),
        ({"labels": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "labels is on meta"),
        ({"logits": torch.ones(2, 0, device=DEVICE)}, ValueError, r"logits is \(2, 0\)"),
        ({"logits": torch.ones(2, 8, device=DEVICE, dtype=torch.int64)}, TypeError, "logits is torch.int64"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; expected one of"),
    ],
    ids=["labels-shape", "labels-dtype", "device", "no-classes", "integer", "reduction"],
)
def test_bad_input(change, error, words):
    good = {"logits": torch.ones(2, 8, device=DEVICE), "labels": torch.zeros(2, dtype=torch.int64, device=DEVICE)}
    with pytest.raises(error, match=words):
        cross_entropy(**(good | change))
