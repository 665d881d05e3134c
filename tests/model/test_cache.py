from dataclasses import replace

import pytest
import torch
from hf import BASE, EXPERTS, YARN, ours, relative, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_model.cache import KVCache

both = pytest.mark.parametrize("numerics", ["fast", "exact"])


@torch.no_grad()
def full(model, tokens):
    """Logits [T, V] of one row, without a cache."""
    return model(torch.as_tensor(tokens)[None])[0]


@torch.no_grad()
def step(model, cache, tokens, counts=None, **arguments):
    logits = model(tokens, cache=cache, **arguments)
    cache.advance(tokens.shape[-1] if counts is None else torch.tensor(counts, dtype=torch.int32))
    return logits


def test_layout():
    cache = ours(BASE).new_cache(3, 10)
    assert cache.k.shape == cache.v.shape == (3, 3, 10, 2, 16)  # layers, rows, slots, heads, width
    assert cache.k.dtype == torch.float32 and cache.lengths.tolist() == [0, 0, 0] and cache.lengths.dtype == torch.int32
    assert ours(BASE, torch.bfloat16).new_cache(1, 1).v.dtype == torch.bfloat16
    assert KVCache(BASE, 1, 1).k.dtype == torch.bfloat16


@both
def test_rows_of_different_length(numerics):
    """Padded on the right: pads are not counted, and what comes next overwrites them."""
    model = ours(BASE, numerics=numerics)
    rows = [some_tokens(BASE, n + 6, seed=n) for n in (5, 1, 9)]
    cache, prompts = model.new_cache(3, 16), torch.zeros(3, 9, dtype=torch.int64)
    for row, n, out in zip(rows, (5, 1, 9), prompts):
        out[:n] = row[:n]
    logits = step(model, cache, prompts, [5, 1, 9])
    for row, n, got in zip(rows, (5, 1, 9), logits):
        assert relative(got[:n], full(model, row[:n])) <= 1e-5
    for t in range(6):
        got = step(model, cache, torch.stack([row[n + t] for row, n in zip(rows, (5, 1, 9))])[:, None])
        for row, n, g in zip(rows, (5, 1, 9), got):
            assert relative(g, full(model, row[: n + t + 1])[-1:]) <= 1e-5
    assert cache.lengths.tolist() == [11, 7, 15]


@both
@pytest.mark.parametrize("config", [BASE, EXPERTS, replace(BASE, rope_scaling=YARN)], ids=["dense", "experts", "yarn"])
def test_packed_prefill(config, numerics):
    """Documents into rows, an empty one among them, then a step of all rows that have tokens."""
    model = ours(config, numerics=numerics)
    rows = [some_tokens(config, n, seed=n) for n in (6, 4, 11)]
    cache = model.new_cache(4, 12)
    logits = step(model, cache, torch.cat([r[:-1] for r in rows]), [5, 3, 0, 10],
                  cu_seqlens=torch.tensor([0, 5, 8, 8, 18], dtype=torch.int32))
    want = [full(model, r) for r in rows]
    assert relative(logits, torch.cat([w[:-1] for w in want])) <= 1e-5
    last = step(model, cache, torch.stack([rows[0][-1], rows[1][-1], torch.tensor(0), rows[2][-1]])[:, None])
    for b, w in zip((0, 1, 3), want):
        assert relative(last[b], w[-1:]) <= 1e-5
    assert relative(last[2], full(model, [0])) <= 1e-5
    assert cache.lengths.tolist() == [6, 4, 1, 11]


def test_prefill_beside_running_rows():
    """A row whose document is empty is left alone, and goes on as before."""
    model, old, new = ours(BASE), some_tokens(BASE, 8), some_tokens(BASE, 5, seed=1)
    cache = model.new_cache(2, 10)
    step(model, cache, torch.stack((old[:7], old[:7])))
    kept = cache.k[:, 0].clone()
    cache.reset(torch.tensor([1]))
    step(model, cache, new[:4], [0, 4], cu_seqlens=torch.tensor([0, 0, 4], dtype=torch.int32))
    assert torch.equal(cache.k[:, 0], kept) and cache.lengths.tolist() == [7, 4]
    got = step(model, cache, torch.stack((old[7], new[4]))[:, None])
    assert relative(got[0], full(model, old)[-1:]) <= 1e-5 and relative(got[1], full(model, new)[-1:]) <= 1e-5


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2]), torch.tensor([True, False, True])])
def test_reset(rows):
    """A row that is reset starts over; what it held is never seen again, not even as NaN."""
    model, tokens = ours(BASE), some_tokens(BASE, 3, 6)
    cache = model.new_cache(3, 12)
    step(model, cache, tokens)
    cache.reset(rows)
    assert cache.lengths.tolist() == ([0, 0, 0] if rows is None else [0, 6, 0])
    again = some_tokens(BASE, 3, 4, seed=9)
    got = step(model, cache, again)
    for b in range(3):
        kept = tokens[b] if rows is not None and b == 1 else tokens[b, :0]
        assert relative(got[b], full(model, torch.cat((kept, again[b])))[-4:]) <= 1e-5


@both
def test_values_beyond_a_rows_length_are_not_seen(numerics):
    """However large: they carry no weight."""
    model, tokens = ours(BASE, numerics=numerics), some_tokens(BASE, 2, 6)
    cache = model.new_cache(2, 16)
    step(model, cache, tokens[:, :5], [5, 3])
    cache.k[:, 0, 5:], cache.k[:, 1, 3:] = 1e4, 1e4
    cache.v[:, 0, 5:], cache.v[:, 1, 3:] = 1e30, 1e30
    got = step(model, cache, tokens[:, 5:])
    assert relative(got[0], full(model, tokens[0])[-1:]) <= 1e-5
    assert relative(got[1], full(model, tokens[1, [0, 1, 2, 5]])[-1:]) <= 1e-5


def test_tokens_that_are_not_counted_are_dropped():
    """Speculation: three tokens are tried, one is kept."""
    model, tokens = ours(BASE), some_tokens(BASE, 1, 8)
    cache = model.new_cache(1, 10)
    step(model, cache, tokens[:, :4])
    step(model, cache, torch.cat((tokens[:, 4:5], 95 - tokens[:, 5:7]), 1), [1])
    got = step(model, cache, tokens[:, 5:])
    assert relative(got[0], full(model, tokens[0])[-3:]) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_split_and_counts(data):
    """Random pieces, of which each row counts a random part, against the full forward of what was counted."""
    model, B = ours(BASE), data.draw(st.integers(1, 3))
    cache, rows = model.new_cache(B, 24), [[] for _ in range(B)]
    for seed in range(data.draw(st.integers(1, 4))):
        tokens = some_tokens(BASE, B, data.draw(st.integers(1, 6)), seed=seed)
        counts = [data.draw(st.integers(0, tokens.shape[1])) for _ in range(B)]
        got = step(model, cache, tokens, counts)
        for b in range(B):
            want = full(model, rows[b] + tokens[b].tolist())[-tokens.shape[1] :]
            assert relative(got[b], want) <= 1e-5
            rows[b] += tokens[b, : counts[b]].tolist()
    assert cache.lengths.tolist() == [len(row) for row in rows]


def test_addresses_never_change():
    """As a CUDA graph needs."""
    model = ours(BASE)
    cache = model.new_cache(2, 8)
    before = [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]
    step(model, cache, some_tokens(BASE, 2, 3))
    cache.reset()
    cache.reset(torch.tensor([1]))
    step(model, cache, some_tokens(BASE, 2, 3), [1, 2])
    assert [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)] == before


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_overflow_is_refused_before_anything_is_written():
    model = ours(BASE)
    cache = model.new_cache(2, 8)
    step(model, cache, some_tokens(BASE, 2, 5), [5, 2])
    before = cache.k.clone()
    with pytest.raises(ValueError, match=r"cache.lengths is \[5, 2\]; expected room for 4 more tokens within"):
        step(model, cache, some_tokens(BASE, 2, 4))
    with pytest.raises(ValueError, match=r"tokens is \(2, 9\); expected at most max_len 8 new tokens"):
        step(model, cache, some_tokens(BASE, 2, 9))
    assert torch.equal(cache.k, before) and cache.lengths.tolist() == [5, 2]
    step(model, cache, some_tokens(BASE, 2, 3))
    assert cache.lengths.tolist() == [8, 5]
    packed = {"cu_seqlens": torch.tensor([0, 0, 9], dtype=torch.int32)}
    cache.reset()
    with pytest.raises(ValueError, match="expected room for 9 more tokens within max_len 8"):
        step(model, cache, some_tokens(BASE, 9), [0, 9], **packed)


def test_packed_prefill_of_a_running_row_is_refused():
    model = ours(BASE)
    cache = model.new_cache(2, 8)
    step(model, cache, some_tokens(BASE, 2, 2))
    with pytest.raises(ValueError, match=r"cache.lengths is \[2, 2\]; expected 0 in the rows that a packed prefill"):
        step(model, cache, some_tokens(BASE, 3), [0, 3], cu_seqlens=torch.tensor([0, 0, 3], dtype=torch.int32))


def test_dtype_and_gradient():
    model, tokens = ours(BASE), some_tokens(BASE, 2, 3)
    with pytest.raises(RuntimeError, match="no gradient flows through a cache; run the model under torch.no_grad"):
        model(tokens, cache=model.new_cache(2, 4))
    with torch.no_grad(), pytest.raises(TypeError, match="keys are torch.float32; expected torch.bfloat16"):
        model(tokens, cache=KVCache(BASE, 2, 4))
    frozen = ours(BASE).requires_grad_(False)
    cache = frozen.new_cache(2, 4)
    assert frozen(tokens, cache=cache).shape == (2, 3, 96) and not cache.k.requires_grad


def test_number_of_rows():
    model = ours(BASE)
    with pytest.raises(ValueError, match="tokens is 2 rows; expected the cache's 3"):
        step(model, model.new_cache(3, 4), some_tokens(BASE, 2, 3))
    with pytest.raises(ValueError, match="cu_seqlens is 1 rows; expected the cache's 3"):
        step(model, model.new_cache(3, 4), some_tokens(BASE, 3), cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))


@pytest.mark.parametrize("name, value", [("batch", 0), ("max_len", -1), ("max_len", 2.0), ("batch", True)])
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"KVCache: {name} is {value!r}; expected a positive int"):
        KVCache(BASE, **{"batch": 1, "max_len": 1, name: value})


def test_bad_counts():
    cache = KVCache(BASE, 2, 4)
    with pytest.raises(ValueError, match=r"counts has shape \(3,\); expected \(2,\)"):
        cache.advance(torch.ones(3, dtype=torch.int32))


def test_spans_of_the_rows_in_use():
    cache = KVCache(BASE, 3, 10)
    cache.advance(torch.tensor([0, 4, 9], dtype=torch.int32))
    queries, slots, used = cache.spans()
    assert queries.tolist() == [0, 1, 2, 3] and slots.tolist() == [0, 10, 20, 30] and used.tolist() == [1, 5, 10]
    assert not cache.flash(), "no such kernel on a CPU"
