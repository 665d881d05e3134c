import itertools
import math
import sys

import pytest
import torch
from common import DEVICE, backends, check_error_rule, parametrize_dtype, randn

from qwen3_kernels import dispatch, paged_attention, paged_write, selfcheck
from qwen3_kernels.ops.attention import attention_ref
from qwen3_kernels.ops.paged_attention import FP8, paged_attention_ref, paged_write_ref

BACKENDS = ["torch", *backends("paged_attention")]
parametrize_backend = pytest.mark.parametrize("backend", BACKENDS)
parametrize_kernel = pytest.mark.parametrize("backend", BACKENDS[1:])
parametrize_cache = pytest.mark.parametrize("cache", ["same", "fp8"])
KINDS = {"fp32": (torch.float32, "same"), "bf16": (torch.bfloat16, "same"), "bf16-fp8": (torch.bfloat16, "fp8")}
parametrize_kind = pytest.mark.parametrize("dtype, cache", KINDS.values(), ids=KINDS.keys())
# Of torch.library.opcheck. To see what an op changes, and what it gives compiled, it compares inputs in ways that torch does
# not have for 8-bit floats.
EIGHT_BIT_CHECKS = ("test_autograd_registration", "test_faketensor")
CHECKS = {"same": (*EIGHT_BIT_CHECKS, "test_schema", "test_aot_dispatch_dynamic"), "fp8": EIGHT_BIT_CHECKS}
GARBAGE = (-1, 2**31 - 1, 12345678, -(2**31))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def quantised(x):
    """x [..., Hk, D] as e4m3 and its scale by head."""
    scale = x.float().abs().amax(-1).flatten(0, -2).amax(0).clamp(min=1e-6) / 448
    return (x.float() / scale.unsqueeze(-1)).to(FP8), scale


def paged(k, v, lengths, page_size, cache="same", max_pages=None, seed=0):
    """Keyword arguments for dense k, v [B, T, Hk, D]: pages in random order, NaN where nothing lies, garbage beyond the
    used part of the table."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    max_pages = max_pages or max(1, *counts)
    free = iter(torch.randperm(sum(counts) + 2, generator=g).tolist())
    table = torch.tensor(list(itertools.islice(itertools.cycle(GARBAGE), len(lengths) * max_pages)), dtype=torch.int32)
    table = table.view(len(lengths), max_pages)
    extra = {}
    if cache == "fp8":
        (k, extra["k_scale"]), (v, extra["v_scale"]) = quantised(k), quantised(v)
    shape = (sum(counts) + 2, page_size, *k.shape[2:])
    k_pages, v_pages = (torch.full(shape, torch.nan).to(DEVICE, t.dtype) for t in (k, v))
    for row, (n, count) in enumerate(zip(lengths, counts)):
        for i in range(count):
            table[row, i] = page = next(free)
            here = slice(i * page_size, min((i + 1) * page_size, n))
            for pages, dense in ((k_pages, k), (v_pages, v)):
                bits = (lambda t: t.view(torch.uint8)) if cache == "fp8" else (lambda t: t)
                bits(pages)[page, : here.stop - here.start] = bits(dense)[row, here]
    return {"k_pages": k_pages, "v_pages": v_pages, "page_table": table.to(DEVICE), "lengths": int32(*lengths)} | extra


def random(lengths, Tq, Hq, Hk, D, page_size, dtype=torch.float32, cache="same", scale=1.0, **options):
    B, T = len(lengths), max(*lengths, 1)
    k, v = (randn(B, T, Hk, D, dtype=dtype) for _ in range(2))
    return {"q": randn(B, Tq, Hq, D, dtype=dtype, scale=scale)} | paged(k, v, lengths, page_size, cache, **options)


def lse_as_zero(out, lse):
    return out, torch.where(lse == -torch.inf, 0.0, lse)


@torch.no_grad()
def attend(**inputs):
    return lse_as_zero(*paged_attention(**inputs, return_lse=True))


@torch.no_grad()
def attend_ref(**inputs):
    return lse_as_zero(*paged_attention_ref(**inputs, return_lse=True))


def check(backend, inputs, **options):
    """The error rule. The log-sum-exp of half-precision inputs is held to a few roundings of fp32 instead: plain torch has
    fp32's exponential there, which is more accurate than what half-precision outputs ask for."""
    if inputs["q"].dtype == torch.float32:
        check_error_rule(attend, attend_ref, backend, inputs, **options)
        return
    check_error_rule(
        lambda **kw: attend(**kw)[0], lambda **kw: attend_ref(**kw)[0], backend, inputs, **options
    )
    with dispatch.use(backend):
        lse = attend(**inputs, **options)[1].cpu()
    wide = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    torch.testing.assert_close(lse.double(), attend_ref(**wide, **options)[1], rtol=1e-6, atol=1e-5)


# (lengths, Tq, Hq, Hk, D, page size): groups of 1, 2, 4, 8 and 16, every way to end in a page, pages of odd sizes and of
# one slot, padded heads, several queries with fewer keys than queries among them.
SHAPES = [
    ((0, 1, 15, 16, 17), 1, 1, 1, 64, 16), ((33,), 1, 4, 2, 128, 16), ((7, 20), 1, 4, 1, 64, 7), ((20,), 1, 8, 1, 128, 64),
    ((9,), 1, 16, 1, 64, 32), ((5,), 1, 3, 1, 40, 1), ((9, 0), 2, 4, 2, 64, 4), ((3, 30), 6, 1, 1, 64, 8),
]


@parametrize_kernel
@parametrize_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(backend, dtype, cache, shape):
    check(backend, random(*shape, dtype, cache))


@parametrize_kernel
@pytest.mark.parametrize("dtype, Tq, Hq", [(torch.bfloat16, 5, 16), (torch.float32, 3, 6)], ids=str)
def test_more_queries_than_fit_in_a_tile(backend, dtype, Tq, Hq):
    check(backend, random((40,), Tq, Hq, 1, 64, 16, dtype))


@parametrize_kernel
@pytest.mark.parametrize("dtype, cache", [(torch.float16, "same"), (torch.float16, "fp8"), (torch.float32, "fp8")], ids=str)
def test_rarer_dtypes(backend, dtype, cache):
    check(backend, random((0, 33, 70), 1, 2, 1, 64, 16, dtype, cache))


@parametrize_kernel
@pytest.mark.parametrize("D", [16, 41, 48], ids=str)
def test_8_bits_that_are_read_in_pairs_or_not(backend, D):
    """Two by two where every number lies at an even address and there are enough for a product."""
    inputs = random((33,), 2, 2, 1, D, 16, torch.bfloat16, "fp8")
    check(backend, inputs)
    pages = inputs["v_pages"]
    odd = torch.empty(pages.numel() + 1, dtype=FP8, device=DEVICE)[1:].view(pages.shape)
    check(backend, inputs | {"v_pages": odd.copy_(pages)})


@parametrize_kernel
@parametrize_kind
def test_lengths_around_the_ends_of_splits(backend, dtype, cache):
    check(backend, random((255, 256, 257), 2, 1, 1, 64, 16, dtype, cache))


@parametrize_kernel
@parametrize_cache
@pytest.mark.slow
def test_more_splits_than_are_combined_at_once(backend, cache, monkeypatch):
    monkeypatch.setattr(dispatch.backend("paged_attention", backend), "CHUNK", 4)
    check(backend, random((512, 1025, 2000), 1, 2, 1, 64, 16, torch.bfloat16, cache))
    check(backend, random((1024, 1500), 1, 2, 1, 64, 16, torch.float32, cache))


@parametrize_kernel
@parametrize_kind
@pytest.mark.parametrize("scale", [1e-3, 5000.0], ids=["flat", "logits-of-1e4"])
def test_adversarial_scores(backend, dtype, cache, scale):
    inputs = random((270,), 1, 2, 1, 64, 16, dtype, cache, scale)
    if scale > 1000:
        assert attend_ref(**inputs)[1].abs().max() > 1e4
    check(backend, inputs)


@parametrize_kernel
@parametrize_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_keys_share_a_probability_that_rounds(backend, dtype, cache):
    """289 probabilities are equal, so that all of their rounding goes one way, and what they sum to nearly cancels."""
    k, v = torch.zeros(1, 290, 1, 64), torch.ones(1, 290, 1, 64)
    k[0, 0], v[0, 0] = 1.0, -0.9 * 289 * math.exp(-8 * 0.53125)
    inputs = {"q": torch.full((1, 1, 2, 64), 0.53125).to(DEVICE, dtype)}
    check(backend, inputs | paged(k.to(DEVICE, dtype), v.to(DEVICE, dtype), (290,), 16, cache))


@parametrize_kernel
@parametrize_cache
def test_small_probabilities_are_not_lost(backend, cache):
    """290 keys of probability e^-18 beside one of value 0."""
    k, v = torch.zeros(1, 290, 1, 64), torch.ones(1, 290, 1, 64)
    k[0, 0], v[0, 0] = 1.0, 0.0
    for dtype in (torch.bfloat16, torch.float16):
        inputs = {"q": torch.full((1, 1, 1, 64), 18 / 8).to(DEVICE, dtype)}
        check(backend, inputs | paged(k.to(DEVICE, dtype), v.to(DEVICE, dtype), (290,), 16, cache))


@parametrize_kernel
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_queries_of_any_size_over_8_bits(backend, size):
    """They are multiplied in fp16, where such numbers do not exist."""
    inputs = random((40,), 1, 2, 1, 64, 16, torch.bfloat16, "fp8", size)
    check(backend, inputs, scale=0.125 / max(size, 1e-30))


@parametrize_backend
@parametrize_dtype
def test_same_as_attention_over_the_dense_cache(backend, dtype):
    """Against the reference of another op, which knows no pages: of every row by itself."""
    lengths, (Tq, Hq, Hk, D) = (3, 50), (3, 2, 1, 64)
    q, k, v = (randn(2, t, h, D, dtype=dtype) for t, h in ((Tq, Hq), (50, Hk), (50, Hk)))
    with dispatch.use(backend):
        out, lse = paged_attention(q, **paged(k, v, lengths, 16), return_lse=True)
    for b, n in enumerate(lengths):
        want, want_lse = attention_ref(*(t[b : b + 1].double() for t in (q, k[:, :n], v[:, :n])), return_lse=True)
        limit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[b : b + 1].double(), want, rtol=limit, atol=limit)
        torch.testing.assert_close(lse[b : b + 1].double(), want_lse, rtol=1e-5, atol=1e-5)


@parametrize_backend
@parametrize_cache
def test_queries_that_see_nothing(backend, cache):
    inputs = random((0, 1, 2), 3, 2, 1, 64, 16, torch.bfloat16, cache)
    with dispatch.use(backend):
        out, lse = paged_attention(**inputs, return_lse=True)
    blind = torch.tensor([[True] * 3, [True, True, False], [True, False, False]], device=DEVICE)
    assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
    assert (out[~blind] != 0).any(-1).all() and lse[~blind].isfinite().all()


@parametrize_kernel  # plain torch makes no such promise
@pytest.mark.parametrize("dtype, cache", [KINDS["fp32"], KINDS["bf16-fp8"]], ids=["fp32", "bf16-fp8"])
def test_a_row_does_not_depend_on_its_batch(backend, dtype, cache):
    """Alone, among seven of other lengths, in a longer table and in other pages: the same bits."""
    lengths = (300, 0, 5, 270, 64, 257, 1)
    q, k, v = (randn(7, t, h, 64, dtype=dtype) for t, h in ((1, 2), (max(lengths), 1), (max(lengths), 1)))
    scales = {}
    if cache == "fp8":  # of the whole cache, not of a row
        (k, scales["k_scale"]), (v, scales["v_scale"]) = quantised(k), quantised(v)

    def run(rows, **options):
        inputs = paged(*(t.float()[rows].to(t.dtype) for t in (k, v)), [lengths[r] for r in rows], 16, **options)
        with dispatch.use(backend):
            return paged_attention(q[rows], **inputs, **scales, return_lse=True)

    together = run(list(range(7)))
    for rows, options in (([0], {}), ([3], {"max_pages": 80, "seed": 5}), ([6, 3, 1, 5], {"seed": 9})):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows, **options), together, strict=True))


@parametrize_backend
@parametrize_cache
def test_rows_share_pages(backend, cache):
    """A common prefix lies in the pages of one row; from there on each has its own."""
    own = random((40, 48), 1, 2, 1, 64, 16, torch.bfloat16, cache)
    shared = dict(own, page_table=own["page_table"].clone())
    shared["page_table"][1, :2] = own["page_table"][0, :2]
    for pages in ("k_pages", "v_pages"):  # the same keys and values, in pages of their own
        t = own[pages].view(torch.uint8) if cache == "fp8" else own[pages]
        t[own["page_table"][1, :2].long()] = t[own["page_table"][0, :2].long()]
    with dispatch.use(backend):
        assert all(torch.equal(a, b) for a, b in zip(attend(**shared), attend(**own), strict=True))
    check(backend, shared)


@parametrize_backend
@parametrize_cache
def test_what_is_not_used_is_not_read(backend, cache):
    """NaN in free slots and pages, and garbage in the table, are there in every test; here they change nothing."""
    inputs = random((0, 5, 40), 2, 2, 1, 64, 16, torch.bfloat16, cache, max_pages=6)
    clean = dict(inputs)
    for pages in ("k_pages", "v_pages"):
        assert inputs[pages].float().isnan().any()
        clean[pages] = inputs[pages].float().nan_to_num(0.0).to(inputs[pages].dtype)
    used = torch.arange(6, device=DEVICE) * 16 < inputs["lengths"].unsqueeze(1)
    assert not used.all()
    clean["page_table"] = inputs["page_table"].where(used, 0)
    with dispatch.use(backend):
        got, want = attend(**inputs), attend(**clean)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))


@parametrize_backend
@parametrize_cache
@pytest.mark.parametrize("pages", ["k_pages", "v_pages"])
def test_nan_is_not_hidden(backend, cache, pages):
    inputs = random((20, 20), 1, 2, 2, 64, 16, torch.bfloat16, cache)
    inputs[pages][inputs["page_table"][1, 1], 3, 0, 7] = torch.nan
    with dispatch.use(backend):
        out, _ = attend(**inputs)
    assert out[0].isfinite().all() and out[1, 0, 1].isfinite().all()
    assert out[1, 0, 0].isnan().any()
    assert out[1, 0, 0].isnan().all() if pages == "k_pages" else out[1, 0, 0].isnan().sum() == 1


@parametrize_backend
@parametrize_cache
def test_strided_pages_and_queries(backend, cache):
    """A layer of a pool that keeps keys and values of a page together; queries out of a packed projection."""
    inputs = random((5, 40), 2, 2, 2, 64, 16, torch.bfloat16, cache)
    with dispatch.use(backend):
        want = attend(**inputs)
        P, page_size, Hk, D = inputs["k_pages"].shape
        pool = torch.full((3, P, 2, Hk, page_size, D), 1.0, device=DEVICE).to(inputs["k_pages"].dtype)
        for i, name in enumerate(("k_pages", "v_pages")):
            view = pool[1, :, i].transpose(1, 2)
            view.copy_(inputs[name])
            inputs[name] = view
        packed = torch.cat((torch.ones_like(inputs["q"]), inputs["q"]), 2)
        inputs["q"] = packed[:, :, 2:]
        inputs["page_table"] = inputs["page_table"].repeat_interleave(2, 1)[:, ::2]
        assert not any(inputs[n].is_contiguous() for n in ("q", "k_pages", "page_table"))
        assert all(torch.equal(a, b) for a, b in zip(attend(**inputs), want, strict=True))


@parametrize_kernel
def test_offsets_beyond_2_to_the_31(backend):
    """Two pages of a cache of 2 GiB, of which the rest is never touched."""
    small = random((16, 30), 1, 2, 1, 64, 16, torch.bfloat16, "fp8")
    P = 2**31 // (16 * 64) + 8
    far = dict(small, page_table=small["page_table"] + (P - 8))
    far["page_table"][small["page_table"] < 0] = -1
    for name in ("k_pages", "v_pages"):
        far[name] = torch.empty(P, 16, 1, 64, dtype=torch.uint8, device=DEVICE).view(FP8)
        far[name].view(torch.uint8)[P - 8 : P - 8 + len(small[name])] = small[name].view(torch.uint8)
    new = randn(2, 1, 1, 64, dtype=torch.bfloat16)
    with dispatch.use(backend):
        for inputs in (small, far):
            paged_write(new, new, inputs["k_pages"], inputs["v_pages"], inputs["page_table"], int32([3], [29]),
                        inputs["k_scale"], inputs["v_scale"])
        assert all(torch.equal(a, b) for a, b in zip(attend(**far), attend(**small), strict=True))


@parametrize_backend
@parametrize_cache
def test_repeatable_and_does_not_touch_its_inputs(backend, cache):
    inputs = random((70, 1), 1, 2, 1, 64, 16, torch.bfloat16, cache)
    before = {n: t.clone() for n, t in inputs.items()}
    with dispatch.use(backend):
        first = attend(**inputs)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(attend(**inputs), first, strict=True))
    for name, t in inputs.items():
        torch.testing.assert_close(t.float(), before[name].float(), rtol=0, atol=0, equal_nan=True)


@parametrize_backend
@parametrize_cache
def test_registration_and_compile(backend, cache):
    inputs = random((5, 1), 1, 2, 2, 64, 16, torch.bfloat16, cache)
    scales = [inputs.get(n) for n in ("k_scale", "v_scale")]
    args = [inputs[n] for n in ("q", "k_pages", "v_pages", "page_table", "lengths")]
    with dispatch.use(backend):
        args = (*args, *scales, 0.125, backend)
        torch.library.opcheck(torch.ops.qwen3.paged_attention.default, args, test_utils=CHECKS[cache])
        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(**inputs), attend(**inputs), strict=True))


def test_what_is_not_differentiable_says_so():
    inputs = random((5,), 1, 2, 1, 64, 16)
    inputs["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="q requires grad; no gradient flows through a cache"):
        paged_attention(**inputs)
    with torch.no_grad():
        assert not paged_attention(**inputs).requires_grad


@parametrize_backend
def test_empty_batch(backend):
    inputs = random((5,), 1, 2, 1, 64, 16)
    inputs |= {n: inputs[n][:0] for n in ("q", "page_table", "lengths")}
    with dispatch.use(backend):
        assert all(len(t) == 0 for t in paged_attention(**inputs, return_lse=True))
        new = torch.zeros(0, 1, 1, 64, device=DEVICE)
        paged_write(new, new, inputs["k_pages"], inputs["v_pages"], inputs["page_table"], inputs["lengths"].view(0, 1))


@pytest.mark.gpu
@parametrize_cache
def test_in_a_graph(cache):
    """The graph is replayed with other lengths and pages; a table with room to spare changes no bit."""
    cases = [random(lengths, 1, 8, 2, 128, 16, torch.bfloat16, cache, max_pages=300, seed=i)
             for i, lengths in enumerate([(1, 40, 4800, 0), (700, 0, 3, 2049)])]
    held = random((4800,) * 4, 1, 8, 2, 128, 16, torch.bfloat16, cache, max_pages=300)
    attend(**held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(**held)
    for inputs in cases:
        for name, t in inputs.items():
            to = held[name][: len(t)] if name.endswith("pages") else held[name]
            to.copy_(t)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, attend(**inputs), strict=True))


@pytest.mark.gpu
@parametrize_cache
@pytest.mark.parametrize("D", [64, 128])
def test_long_caches_on_cuda(cache, D):
    check("triton", random((1, 8000, 33000), 1, 8, 2, D, 64, torch.bfloat16, cache))


# ---- the write


def empty_pages(P, page_size, Hk, D, dtype):
    return tuple(torch.full((P, page_size, Hk, D), 7.0).to(DEVICE, dtype) for _ in range(2))


@parametrize_kernel
@parametrize_dtype
@parametrize_cache
def test_write_gives_the_bits_of_the_reference(backend, dtype, cache):
    """Tokens that are left out, views of a packed projection, heads and widths that are no powers of two."""
    Hk, D = 3, 40
    packed = randn(3, 4, 2 * Hk, D, dtype=dtype, scale=20.0)
    k, v = packed.split(Hk, 2)
    k[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    table = int32([5, 2, -1], [0, 99999, 4], [-1, -1, -1])
    positions = int32([0, 1, 7, 4], [8, 11, -1, 3], [-1, -5, -1, -1])
    scales = (torch.tensor([0.01, 1.0, 3.0], device=DEVICE), torch.tensor([2.0, 0.1, 0.7], device=DEVICE))
    scales = scales if cache == "fp8" else (None, None)
    got, want = (empty_pages(6, 4, Hk, D, FP8 if cache == "fp8" else dtype) for _ in range(2))
    with dispatch.use(backend):
        paged_write(k, v, *got, table, positions, *scales)
    paged_write_ref(k, v, *want, table, positions, *scales)
    for a, b, dense, scale in zip(got, want, (k, v), scales):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
        sent, stored = dense[0, 1].float(), a.float()[5, 1]
        if scale is not None:  # three bits after the leading one, and multiples of 2^-9
            by = scale.unsqueeze(-1)
            sent, stored = sent.clamp(-448 * by, 448 * by), stored * by
            assert ((stored - sent).abs() <= torch.maximum(sent.abs() / 16, by * 2**-10) * (1 + 1e-6)).all()
        else:
            assert torch.equal(stored, sent)
    written = {(5, 0), (5, 1), (2, 3), (2, 0), (4, 0), (4, 3), (0, 3)}
    untouched = [place for place in itertools.product(range(6), range(4)) if place not in written]
    assert all((t.float()[place] == 7).all() for t in got for place in untouched)


@parametrize_kernel
def test_every_code_and_every_middle_between_two(backend):
    """e4m3's numbers stay, halves go to even, what is larger than 448 saturates."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].sort().values
    middle = (codes[1:] + codes[:-1]) / 2
    above, below = (middle.nextafter(torch.tensor(end)) for end in (1e9, -1e9))
    large = torch.tensor([448.1, 463.9, 464.0, 465.0, 1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    values = torch.cat((codes, middle, above, below, codes * 1e-5, large))
    k = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(1, -1, 1, 64).to(DEVICE)
    T, one = k.shape[1], torch.ones(1, device=DEVICE)
    pages = empty_pages(1, T, 1, 64, FP8)
    with dispatch.use(backend):
        paged_write(k, -k, *pages, int32([0]), torch.arange(T, dtype=torch.int32, device=DEVICE)[None], one, one)
    for got, dense in zip(pages, (k, -k)):
        want = dense.clamp(-448, 448).to(FP8)
        torch.testing.assert_close(got.float(), want.float()[0].unsqueeze(0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(pages[0].float().flatten()[: len(codes)].cpu(), codes)


@parametrize_backend
@parametrize_cache
def test_written_token_by_token(backend, cache):
    """What a decoding loop does gives the bits of the cache that is written at once."""
    T = 18
    q, k, v = (randn(2, T, h, 64, dtype=torch.bfloat16) for h in (2, 1, 1))
    extra = {n: quantised(t)[1] for n, t in (("k_scale", k), ("v_scale", v))} if cache == "fp8" else {}
    table = int32([3, 0, -1], [1, 4, -1])
    positions = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(2, T)
    whole, grown = (empty_pages(5, 16, 1, 64, FP8 if cache == "fp8" else torch.bfloat16) for _ in range(2))
    with dispatch.use(backend):
        paged_write(k, v, *whole, table, positions, **extra)
        for t in range(T):
            paged_write(k[:, t : t + 1], v[:, t : t + 1], *grown, table, positions[:, t : t + 1], **extra)
            if t in (0, 15, 16):
                lengths = int32(t + 1, t + 1)
                a, b = (paged_attention(q[:, t : t + 1], *p, table, lengths, **extra) for p in (whole, grown))
                assert torch.equal(a, b)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, grown, strict=True))


@parametrize_backend
@parametrize_cache
def test_write_registration_and_compile(backend, cache):
    k = randn(2, 3, 2, 64, dtype=torch.bfloat16)
    scales = (torch.ones(2, device=DEVICE),) * 2 if cache == "fp8" else (None, None)
    dtype = FP8 if cache == "fp8" else torch.bfloat16
    table, positions = int32([1], [0]), int32([0, 5, -1], [2, 3, 4])
    with dispatch.use(backend):
        args = (k, k, *empty_pages(2, 8, 2, 64, dtype), table, positions, *scales, backend)
        torch.library.opcheck(torch.ops.qwen3.paged_write.default, args, test_utils=CHECKS[cache])
        torch._dynamo.reset()
        pages, other = (empty_pages(2, 8, 2, 64, dtype) for _ in range(2))
        torch.compile(paged_write, fullgraph=True, backend="aot_eager")(k, k, *pages, table, positions, *scales)
        paged_write(k, k, *other, table, positions, *scales)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(pages, other, strict=True))
    assert not torch.equal(pages[0].float(), empty_pages(2, 8, 2, 64, dtype)[0].float())


# ---- what is refused


def good(cache="same"):
    return random((5, 20), 1, 4, 2, 64, 16, torch.bfloat16, cache)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.ones(2, 4, 64)}, ValueError, r"q is \(2, 4, 64\); expected \[B, Tq, Hq, D\]"),
        ({"q": torch.ones(2, 9, 4, 64)}, ValueError, "expected 1 to 8 queries a row"),
        ({"q": torch.ones(2, 0, 4, 64)}, ValueError, "expected 1 to 8 queries a row"),
        ({"q": torch.ones(2, 1, 4, 64, dtype=torch.int32)}, TypeError, "q is torch.int32"),
        ({"q": torch.ones(2, 1, 4, 64)}, TypeError, "k_pages is torch.bfloat16; expected q's torch.float32, or torch.fl"),
        ({"q": torch.ones(2, 1, 3, 64, dtype=torch.bfloat16)}, ValueError, "multiple of k_pages' 2"),
        ({"q": torch.ones(2, 1, 4, 32, dtype=torch.bfloat16)}, ValueError, "q's head dimension 32"),
        ({"q": torch.ones(3, 1, 4, 64, dtype=torch.bfloat16)}, ValueError, r"page_table is \(2, 2\); expected \(3, 2\)"),
        ({"v_pages": torch.ones(3, 16, 2, 64)}, ValueError, r"v_pages is \(3, 16, 2, 64\); expected k_pages' shape"),
        ({"v_pages": torch.ones(5, 16, 2, 64)}, TypeError, "v_pages is torch.float32; expected k_pages'"),
        ({"k_pages": torch.ones(0, 16, 2, 64, dtype=torch.bfloat16)}, ValueError, "at least one page and slot"),
        ({"k_pages": torch.ones(5, 16, 64, 2, dtype=torch.bfloat16).mT}, ValueError, "expected a last stride of 1"),
        ({"page_table": torch.zeros(2, 0, dtype=torch.int32)}, ValueError, "at least one entry a row"),
        ({"page_table": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "page_table is torch.int64; expected torch.int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, r"lengths is \(3,\); expected \(2,\)"),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths is torch.float32; expected torch.int32"),
        ({"k_scale": torch.ones(2)}, ValueError, "k_scale is given; expected None with pages of torch.bfloat16"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        paged_attention(**(good() | {n: t.to(DEVICE) for n, t in change.items()}))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"k_scale": None}, ValueError, "k_scale is None; expected a scale for each key head"),
        ({"v_scale": torch.ones(3)}, ValueError, r"v_scale is \(3,\); expected \(2,\)"),
        ({"v_scale": torch.ones(2, dtype=torch.float64)}, TypeError, "v_scale is torch.float64; expected torch.float32"),
    ],
    ids=["none", "shape", "dtype"],
)
def test_bad_scales(change, error, words):
    with pytest.raises(error, match=words):
        paged_attention(**(good("fp8") | {n: t if t is None else t.to(DEVICE) for n, t in change.items()}))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"v": torch.ones(2, 1, 1, 64)}, ValueError, r"paged_write: v is \(2, 1, 1, 64\); expected k's shape"),
        ({"k": torch.ones(2, 1, 3, 64), "v": torch.ones(2, 1, 3, 64)}, ValueError, "expected k_pages' 2 heads"),
        ({"v": torch.ones(2, 1, 2, 64, dtype=torch.bfloat16)}, TypeError, "v is torch.bfloat16"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"positions is \(2, 2\); expected \(2, 1\)"),
        ({"positions": torch.zeros(2, 1)}, TypeError, "positions is torch.float32"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_writes(change, error, words):
    pages = empty_pages(3, 16, 2, 64, torch.float32)
    inputs = {"k": torch.ones(2, 1, 2, 64), "v": torch.ones(2, 1, 2, 64)}
    inputs |= {n: torch.zeros(2, 1, dtype=torch.int32) for n in ("page_table", "positions")}
    inputs = {n: t.to(DEVICE) for n, t in (inputs | change).items()}
    with pytest.raises(error, match=words):
        paged_write(k_pages=pages[0], v_pages=pages[1], **inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA a check of the values would need a host sync")
@parametrize_backend
def test_places_that_do_not_exist(backend):
    inputs, new = good(), torch.ones(2, 1, 2, 64, dtype=torch.bfloat16)
    pages = (inputs["k_pages"], inputs["v_pages"])
    with dispatch.use(backend):
        with pytest.raises(IndexError, match="lengths asks for 33 slots; the page table has 32 a row"):
            paged_attention(**(inputs | {"lengths": int32(5, 33)}))
        for wrong in (-1, 5):
            table = inputs["page_table"].clone()
            table[1, 1] = wrong
            words = f"page_table holds {wrong} where it is used; expected 0 to 4"
            with pytest.raises(IndexError, match=f"paged_attention: {words}"):
                paged_attention(**(inputs | {"page_table": table}))
            with pytest.raises(IndexError, match=f"paged_write: {words}"):
                paged_write(new, new, *pages, table, int32([0], [16]))
            paged_write(new, new, *pages, table, int32([0], [15]))
        with pytest.raises(IndexError, match="positions holds 32; the page table has 32 slots a row"):
            paged_write(new, new, *pages, inputs["page_table"], int32([0], [32]))


def test_wide_heads_fall_back_on_torch():
    inputs = random((5,), 1, 2, 1, 300, 16)
    with dispatch.use(BACKENDS[-1]):
        assert all(torch.equal(a, b) for a, b in zip(attend(**inputs), attend_ref(**inputs), strict=True))


def test_selfcheck_sees_a_wrong_kernel(monkeypatch):
    """Of the pages in 8 bits alone."""
    op = sys.modules[paged_attention.__module__]
    right = op.paged_attention_ref

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return (out * 1.01 if options["k_scale"] is not None else out), lse

    assert selfcheck.run("paged_attention", "torch", DEVICE, torch.float32) <= selfcheck.LIMIT
    monkeypatch.setattr(op, "paged_attention_ref", wrong)
    assert selfcheck.run("paged_attention", "torch", DEVICE, torch.float32) > selfcheck.LIMIT
