"""AdamW's kernel against torch, and the optimizer around it as a stand-in for torch's."""

import io
import math

import pytest
import torch
from torch import nn

from qwen3_kernels.selfcheck import LIMIT, error_ratio
from training import adamw
from training.adamw import AdamW, adamw_fused_, adamw_torch_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
pytestmark = pytest.mark.usefixtures("adamw_kernel")
SIZES = (1, 0, 7, 128, 2048, 5001, 0, 6144)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}


def state(dtype, moment=None, sizes=SIZES, count=0.0):
    """Weights, moments, squares and counts of steps."""
    weights = [torch.randn(n).to(DEVICE, dtype) for n in sizes]
    moments, squares = ([torch.zeros_like(w, dtype=moment or dtype) for w in weights] for _ in range(2))
    return weights, moments, squares, [torch.full((), count, device=DEVICE) for _ in sizes]


def clone(lists, dtype=None):
    """Counts, which come last, stay float32."""
    *tensors, counts = lists
    return *([t.to(dtype or t.dtype, copy=True) for t in ts] for ts in tensors), [c.clone() for c in counts]


def step(update, lists, grads, **options):
    weights, moments, squares, counts = lists
    update(weights, [g.to(w.dtype) if w.dtype == torch.float64 else g for g, w in zip(grads, weights)],
           moments, squares, counts, **(OPTIONS | options))


def rounding_step(lists, grads, **options):
    """torch's step in float32, and one rounding at its end."""
    wide = clone(lists, FP32)
    step(adamw_torch_, wide, [g.float() for g in grads], **options)
    for kept, new in zip(lists, wide):
        for a, b in zip(kept, new):
            a.copy_(b)


def check(lists, draw, steps=4, **options):
    """The error rule, for weights and moments over all sizes."""
    plain, truth = clone(lists), clone(lists, torch.float64)
    for i in range(steps):
        grads = [draw(w.numel()).to(DEVICE, w.dtype) for w in lists[0]]
        step(adamw_fused_, lists, grads, **options)
        rounding_step(plain, [g.clone() for g in grads], **options)
        step(adamw_torch_, truth, [g.double() for g in grads], **options)
    for name, *found in zip(("weights", "moments", "squares"), lists, plain, truth):
        got, other, exact = (torch.cat(tensors) for tensors in found)
        ratio = error_ratio(got, other, exact)
        assert got.isfinite().all() and ratio <= LIMIT, f"{name}: {ratio:.3g} times torch's error"
    assert [float(c) for c in lists[3]] == [float(c) for c in truth[3]]


@pytest.mark.parametrize("weight, moment", [
    ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16"),
])
def test_the_error_rule_in_every_dtype(weight, moment):
    check(state(DTYPES[weight], DTYPES[moment]), torch.randn)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("draw, options", [
    (lambda n: 1e8 * torch.randn(n), {}),
    (lambda n: 1e-9 * torch.randn(n), {}),  # the square is less than eps
    (lambda n: 1e-30 * torch.randn(n), {}),
    (torch.zeros, {}),
    (lambda n: torch.randn(n) * (torch.rand(n) < 0.01), {"eps": 1e-3}),
    (lambda n: torch.full((n,), 0.3), {"weight_decay": 0.0, "betas": (0.0, 0.999)}),
    (torch.randn, {"weight_decay": 1e-4, "lr": 1e-3, "betas": (0.99, 0.9999)}),
], ids=["huge", "small", "tiny", "zero", "sparse", "constant", "slow"])
def test_the_error_rule_on_hard_gradients(dtype, draw, options):
    check(state(dtype, sizes=(5, 3000)), draw, **options)


@pytest.mark.parametrize("count", [0.0, 3.0, 1e6])
def test_bias_correction_after_any_number_of_steps(count):
    lists = state(FP32, sizes=(300,), count=count)
    lists[3].append(torch.full((), 7.0, device=DEVICE))  # another number beside it
    for tensors in lists[:3]:
        tensors.append(torch.zeros(40, device=DEVICE))
    check(lists, torch.randn, steps=2, betas=(0.9, 0.999))


def test_small_weight_decay_is_not_rounded():
    """In float32, 1 - 20.5 / 2^24 is 2.4 % of the decay off."""
    decay = 20.5 * 2.0**-24
    weights, *rest = state(FP32, sizes=(4096,))
    weights[0].copy_(1 + torch.rand(4096))
    before = weights[0].double()
    step(adamw_fused_, (weights, *rest), [torch.zeros(4096, device=DEVICE)], lr=1e-3, weight_decay=1e3 * decay)
    assert (1 - weights[0].double() / before).mean().item() == pytest.approx(decay, rel=3e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17])
def test_every_block_finds_its_tensor(count):
    torch.manual_seed(count)
    sizes = torch.randint(0, 3, (count,)).mul(1500).tolist()
    check(state(FP32, sizes=(*sizes, 10)), torch.randn, steps=1)


def test_tensors_are_grouped_by_dtype_and_alignment(monkeypatch):
    calls, real = [], adamw.launch
    monkeypatch.setattr(adamw, "launch", lambda rows, device, dtypes, **options: (
        calls.append((len(rows), dtypes[0], options["aligned"])), real(rows, device, dtypes, **options)))
    lists = [a + b for a, b in zip(state(FP32, sizes=(64, 128)), state(BF16, sizes=(32, 31)))]
    whole = torch.randn(97, device=DEVICE)
    lists[0][1] = whole[1:65]  # contiguous, at 4 bytes past 16
    for tensors in lists[1:3]:
        tensors[1] = torch.zeros(64, device=DEVICE)
    before = whole.clone()
    check(lists, torch.randn, steps=1)
    assert sorted(calls, key=str) == [(1, BF16, False), (1, BF16, True), (1, FP32, False), (1, FP32, True)]
    assert torch.equal(whole[:1], before[:1]) and torch.equal(whole[65:], before[65:])


def test_offsets_beyond_32_bits():
    """The tensor's last block alone, from a table whose addresses are so far before the memory that is touched. Offsets
    cut to 32 bits would reach the untouched start of the buffer."""
    from training.adamw_kernel import BLOCK

    first, numbers = (1 << 31) // BLOCK, (1e-2, 0.0, 0.9, 0.1, 0.95, 0.05, 1e-8)
    if DEVICE == "cpu":
        buffer = torch.empty((1 << 32) + 5 * BLOCK, dtype=BF16)  # of which the system gives only what is written
        near, far = buffer[: 4 * BLOCK], buffer[1 << 32 :][: 4 * BLOCK]
        near.fill_(7.0)
    else:
        far = torch.empty(4 * BLOCK, dtype=BF16, device=DEVICE)
    far.copy_(torch.cat((torch.full((2 * BLOCK,), 1.0), torch.zeros(2 * BLOCK))))  # weight, gradient, moments
    start = far.data_ptr() - 2 * first * BLOCK
    pointers = [start + 2 * i * BLOCK for i in range(4)]
    corrections = torch.tensor([[10.0, math.sqrt(20.0)]], device=DEVICE)
    # A launch begins at block 0; a tensor that begins ``first`` blocks before it has its block number ``first`` there.
    launch_at(first, [[*pointers, 0, 0, 0, first * BLOCK + 5]], corrections, numbers)
    w, g, m, v = far.view(4, BLOCK).float()
    assert torch.allclose(w[:5], torch.tensor(0.99, device=DEVICE), atol=4e-3) and (w[5:] == 1).all()
    assert (m[:5] > 0.09).all() and (v[:5] > 0.04).all() and (g == 1).all()
    assert (m[5:] == 0).all() and (v[5:] == 0).all()
    assert DEVICE != "cpu" or (near == 7).all()


def launch_at(first, rows, corrections, numbers):
    import triton.language as tl

    from training.adamw_kernel import BLOCK, adamw_kernel

    table = torch.tensor([[*row, -first] for row in rows], dtype=torch.int64, device=DEVICE)
    adamw_kernel[(1,)](
        table, corrections, None, None, len(rows), *numbers, **dict.fromkeys("WGMV", tl.bfloat16), C=None,
        STOCHASTIC=False, ALIGNED=False, PRECISE=False, HALVINGS=0, BLOCK=BLOCK,
    )


# ---- scale, skip, copies, stochastic rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_scale_divides_and_leaves_the_gradients(dtype):
    lists = state(dtype, sizes=(3000,))
    grads, scale = [torch.randn(3000).to(DEVICE, dtype)], torch.tensor(2.5, device=DEVICE)
    truth, before = clone(lists, torch.float64), grads[0].clone()
    plain = clone(lists)
    step(adamw_fused_, lists, grads, scale=scale)
    rounding_step(plain, [grads[0].float() / 2.5])
    step(adamw_torch_, truth, [grads[0].double() / 2.5])
    for got, other, exact in zip(lists[:3], plain, truth):
        assert error_ratio(got[0], other[0], exact[0]) <= LIMIT
    assert torch.equal(grads[0], before)


@pytest.mark.parametrize("keys", [None, [1, 2]], ids=["nearest", "stochastic"])
def test_a_skipped_step_changes_nothing(keys):
    lists, skip = state(BF16, sizes=(100, 3000), count=4.0), torch.ones((), device=DEVICE)
    copies = [torch.full((w.numel(),), 5.0, device=DEVICE) for w in lists[0]]
    before = clone(lists)
    grads = [torch.full_like(w, math.nan) for w in lists[0]]
    step(adamw_fused_, lists, grads, skip=skip, copies=copies, keys=keys)
    assert all(torch.equal(a, b) for new, old in zip(lists, before) for a, b in zip(new, old))
    assert all((c == 5).all() for c in copies)
    step(adamw_fused_, lists, [torch.ones_like(g) for g in grads], skip=0 * skip, copies=copies, keys=keys)
    assert not torch.equal(lists[0][1], before[0][1]) and [float(c) for c in lists[3]] == [5.0, 5.0]


def test_copies_are_the_weights_rounded_to_the_nearest():
    lists = state(FP32)
    copies = [torch.empty_like(w, dtype=BF16) for w in lists[0]]
    step(adamw_fused_, lists, [torch.randn_like(w) for w in lists[0]], copies=copies, keys=range(len(copies)))
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(copies, lists[0]))


def test_stochastic_rounding_has_the_right_mean():
    """Of each of the three; a rounding goes to one of the two neighbours."""
    n, lists = 8192, state(BF16, sizes=(8192,))
    lists[0][0].fill_(0.7)
    exact = clone(lists, torch.float64)
    step(adamw_fused_, lists, [torch.full_like(lists[0][0], 0.37)], keys=[123])
    step(adamw_torch_, exact, [torch.full((n,), float(torch.tensor(0.37).bfloat16()), device=DEVICE)])
    choices = []
    for got, want in zip(lists[:3], exact):
        down, up = got[0].unique().double().tolist()
        share = (want[0][0].item() - down) / (up - down)
        assert 0.02 < share < 0.98 and up - down <= 2**-7 * up
        assert abs((got[0] == up).double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)
        choices.append(((got[0] == up).double() - share) / math.sqrt(share * (1 - share)))
    rolled = [choices[0].roll(1), choices[1], choices[2]]
    for a, b in ((choices[0], choices[1]), (choices[1], choices[2]), (choices[0], rolled[0])):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(n), "one choice tells nothing of another"


def test_noise_is_a_function_of_the_key_and_the_place():
    grads = [torch.full((5000,), 0.37).to(DEVICE, BF16)] * 2

    def rounded(keys):
        lists = state(BF16, sizes=(5000, 5000))
        for w in lists[0]:
            w.fill_(0.7)
        step(adamw_fused_, lists, grads, keys=keys)
        return lists[0]

    a, b = rounded([1, 2]), rounded([2, 1])
    assert torch.equal(a[0], b[1]) and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert not torch.equal(a[0][:2048], a[0][2048:4096]), "nor is it that of the block"


def test_what_is_not_finite_stays():
    n, lists = 600, state(FP32, BF16, sizes=(600,))
    lists[1][0].copy_(torch.tensor([math.inf, -math.inf, 0.0] * (n // 3)))
    lists[2][0].fill_(math.inf)
    nan = torch.tensor([0, 0, 0x7FFFFFFF] * (n // 3), dtype=torch.int32).view(FP32)  # CUDA's, which noise would make -0
    step(adamw_fused_, lists, [nan.to(DEVICE)], keys=[5])
    moments = lists[1][0].view(-1, 3)
    assert (moments[:, 0] == math.inf).all() and (moments[:, 1] == -math.inf).all() and moments[:, 2].isnan().all()
    assert lists[2][0].view(-1, 3)[:, :2].isposinf().all()


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def model(dtype=FP32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 7)).to(DEVICE, dtype)


def fill_grads(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def run(net, optimizer, seeds):
    for seed in seeds:
        fill_grads(net, seed)
        optimizer.step()


def groups(net):
    by_dim = {d: [p for p in net.parameters() if p.dim() == d] for d in (2, 1)}
    return [{"params": by_dim[2], "weight_decay": 0.1}, {"params": by_dim[1], "weight_decay": 0.0}]


def same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "plain"])
@pytest.mark.parametrize("towards", ["from torch", "to torch"])
def test_checkpoints_go_both_ways(fused, towards):
    """Three steps in one, the state through a file, three in the other, as six in torch."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.95)}
    make = [lambda n: torch.optim.AdamW(groups(n), fused=fused, **settings), lambda n: AdamW(groups(n), **settings)]
    before, after = make if towards == "from torch" else make[::-1]
    whole, first, second = model(), model(), model()
    run(whole, make[0](whole), range(6))
    old = before(first)
    run(first, old, range(3))
    file = io.BytesIO()
    torch.save((first.state_dict(), old.state_dict()), file)
    file.seek(0)
    weights, kept = torch.load(file)
    second.load_state_dict(weights)
    new = after(second)
    new.load_state_dict(kept)
    run(second, new, range(3, 6))
    same(second, whole)
    for p in second.parameters():
        assert new.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} and new.state[p]["step"] == 6
    assert towards == "to torch" or all(group["fused"] for group in new.param_groups)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_clipping_by_grad_scale_and_skipping_by_found_inf(dtype):
    ours, theirs = model(dtype), model(dtype)
    a = AdamW(ours.parameters(), lr=1e-2)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for found in (0.0, 1.0, 0.0):
        for net, optimizer in ((ours, a), (theirs, b)):
            optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(found, device=DEVICE)
            run(net, optimizer, [int(found)])
    tolerance = 1e-6 if dtype == FP32 else 2**-8
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert a.state[p]["step"] == b.state[q]["step"] == 2


@pytest.fixture
def seen(monkeypatch):
    """The weights that the kernel gets."""
    weights_seen = []

    def seeing(weights, *args, **options):
        weights_seen.extend(weights)
        adamw_fused_(weights, *args, **options)

    monkeypatch.setattr(adamw, "adamw_fused_", seeing)
    return weights_seen


def test_the_kernel_takes_what_it_can(seen):
    """The rest is torch's, bit for bit."""
    torch.manual_seed(1)
    kinds = {"plain": torch.randn(4, 6), "double": torch.randn(4, 6).double(), "transposed": torch.randn(6, 4).T}
    ours, theirs = ({n: nn.Parameter(t.clone().to(DEVICE)) for n, t in kinds.items()} for _ in range(2))
    assert not ours["transposed"].is_contiguous()
    made = AdamW(ours.values(), lr=1e-2), torch.optim.AdamW(theirs.values(), lr=1e-2, fused=True)
    for seed in range(3):
        for params, optimizer in zip((ours, theirs), made):
            torch.manual_seed(seed)
            for p in params.values():
                p.grad = torch.randn_like(p)  # of p's strides
            optimizer.step()
    assert {id(p) for p in seen} == {id(ours["plain"])}
    assert all(torch.equal(ours[n], theirs[n]) for n in ("double", "transposed"))
    torch.testing.assert_close(ours["plain"], theirs["plain"], rtol=1e-6, atol=1e-7)


def test_a_cpu_takes_torchs_step(monkeypatch):
    monkeypatch.undo()  # of the fixture
    assert not adamw.runs(torch.device("cpu"))
    ours, theirs = (nn.Linear(5, 3, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    run(ours, AdamW(ours.parameters(), lr=1e-2), range(3))
    run(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True), range(3))
    assert torch.equal(ours.weight, theirs.weight)


def test_parameters_without_gradient_are_left_alone():
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    fill_grads(net, 0)
    net[0].weight.grad, before = None, net[0].weight.detach().clone()
    assert optimizer.step(lambda: 5.0) == 5.0
    assert torch.equal(net[0].weight, before) and net[0].weight not in optimizer.state
    assert optimizer.state[net[1].weight]["step"] == 1


@pytest.mark.parametrize("placed, fused", [("alike", 2), ("apart", 0)])
def test_dtensors(placed, fused, seen):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, start = init_device_mesh(DEVICE, (1,)), torch.randn(6, 4)
        p = nn.Parameter(DTensor.from_local(start.clone().to(DEVICE), mesh, [Shard(0)]))
        optimizer, plain = AdamW([p], lr=1e-2), nn.Parameter(start.clone().to(DEVICE))
        other = torch.optim.AdamW([plain], lr=1e-2, fused=True)
        for _ in range(2):
            grad = torch.randn(6, 4).to(DEVICE)
            p.grad = DTensor.from_local(grad.clone(), mesh, [Shard(0) if placed == "alike" else Replicate()])
            plain.grad = grad
            optimizer.step()
            other.step()
        torch.testing.assert_close(p.to_local(), plain, rtol=1e-6, atol=1e-7)
    finally:
        dist.destroy_process_group()
    assert len(seen) == fused and not any(hasattr(t, "to_local") for t in seen)


@pytest.mark.parametrize("option, words", [
    ({"amsgrad": True}, "amsgrad is True; expected False"), ({"maximize": True}, "maximize is True"),
    ({"differentiable": True}, "differentiable is True"),
    ({"lr": torch.tensor(0.1)}, "lr is a tensor; expected a number"),
])
def test_refused_options(option, words):
    net = model()
    with pytest.raises(ValueError, match=words):
        AdamW([{"params": list(net.parameters()), **option}], lr=1e-3)
    optimizer = AdamW(net.parameters())
    kept = optimizer.state_dict()
    kept["param_groups"][0] |= option
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(kept)
    with pytest.raises(TypeError, match="amsgrad"):
        AdamW(net.parameters(), amsgrad=True)


def test_a_kernel_that_is_wrong_or_does_not_run_is_not_used(monkeypatch):
    monkeypatch.undo()
    device = torch.device(DEVICE)
    assert all(adamw._is_right(device, dtype) for dtype in (FP32, BF16))
    broken = lambda *args, eps, **kw: adamw_fused_(*args, eps=0.1, **kw)  # noqa: E731
    monkeypatch.setattr(adamw, "adamw_fused_", broken)
    assert not any(adamw._is_right(device, dtype) for dtype in (FP32, BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_gpu(dtype):
    net = model(dtype)
    optimizer = AdamW(net.parameters())
    for seed in range(3):
        fill_grads(net, seed)
        optimizer.grad_scale = optimizer.found_inf = torch.zeros((), device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_kernel_is_used_on_this_gpu(monkeypatch):
    monkeypatch.undo()
    adamw.runs.cache_clear()
    assert adamw.runs(torch.device("cuda", 0))
