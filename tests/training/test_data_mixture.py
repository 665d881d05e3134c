from collections import Counter

import numpy as np
import pytest
import torch
from conftest import END
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import shards
from training.data.cells import Cell
from training.data.mixture import Mixture, Part, data_sets, describe, of_cells, open_loader, weights
from training.data.packing import MixtureLoader, PackedLoader
from training.data.shards import TokenShards


@pytest.fixture
def three(tmp_path):
    """Data sets whose tokens tell which set they are of."""
    for name, (low, high), docs in (("a", (0, 20), 40), ("b", (20, 40), 9), ("c", (40, 60), 15)):
        rng = np.random.default_rng(low)
        shards.write(tmp_path / name, [(rng.integers(low, high, n), n) for n in rng.integers(5, 60, docs).tolist()], vocab_size=64, end_of_text=END)
    return tmp_path


def loader(folder, share=(0.6, 0.1, 0.3), rows=12, **options):
    parts = [PackedLoader(TokenShards(folder / n), seq_len=16, rows=rows, seed=1) for n in "abc"]
    return MixtureLoader(parts, share, rows=rows, seed=1, **options)


def sets_of(batch, seq_len=16):
    """Counter of the data set of each row; a row is of one set."""
    found = []
    for row in batch.labels.view(-1, seq_len):
        (part,) = {"abc"[int(t) // 20] for t in row.tolist() if t != END} or {"?"}
        found.append(part)
    return Counter(found)


def test_rows_follow_the_weights_evenly(three):
    mixture = loader(three, cycle=120)
    total = Counter()
    for step in range(10):
        total += sets_of(mixture.batch(step))
        done = 12 * (step + 1)
        for name, share in zip("abc", (0.6, 0.1, 0.3)):
            assert abs(total[name] - share * done) <= 2, "at any point of the run, not only at its end"
    assert total == {"a": 72, "b": 12, "c": 36}, "a cycle holds the exact shares"
    assert sets_of(mixture.batch(0)) != {"a": 12}


def test_each_set_is_read_as_if_it_were_alone(three):
    """Also over several cycles and passes: no row of a set is skipped or read twice."""
    mixture = loader(three, cycle=20)
    seen = [[], [], []]
    for number in range(400):
        part, own = mixture.source(number)
        seen[part].append(own)
    assert all(sorted(rows) == list(range(len(rows))) for rows in seen)
    part, own = mixture.source(7)
    assert all(np.array_equal(x, y) for x, y in zip(mixture.row(7), mixture.parts[part].row(own), strict=True))


@pytest.mark.parametrize("world, micros", [(2, 1), (4, 1), (4, 3), (1, 6)])
def test_one_rank_or_four(three, world, micros):
    for step in range(6):
        whole = loader(three).batch(step)
        parts = [loader(three).batch(step, rank=r, world=world, micro=m, micros=micros)
                 for r in range(world) for m in range(micros)]  # a new loader each: nothing is handed on from step to step
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)


def test_seeds_differ(three):
    parts = [PackedLoader(TokenShards(three / n), seq_len=16, rows=4, seed=1) for n in "abc"]
    a, b = ([MixtureLoader(parts, (1, 1, 1), rows=4, seed=s).source(i) for i in range(60)] for s in (1, 2))
    assert a != b


@settings(max_examples=30, deadline=None)
@given(share=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), cycle=st.integers(200, 400), seed=st.integers(0, 5))
def test_quotas_are_exact(tmp_path_factory, share, cycle, seed):
    path = tmp_path_factory.mktemp("d") / "d"
    shards.write(path, [([1] * 30, 30)], vocab_size=64, end_of_text=END)
    parts = [PackedLoader(TokenShards(path), seq_len=8, rows=1, seed=0) for _ in share]
    mixture = MixtureLoader(parts, share, rows=1, seed=seed, cycle=cycle)
    assert mixture.quota.sum() == cycle and np.abs(mixture.quota - np.array(share) / sum(share) * cycle).max() < 1
    part, _ = mixture._plan(seed)
    assert np.bincount(part, minlength=len(share)).tolist() == mixture.quota.tolist()


@pytest.mark.parametrize(
    "share, words",
    [((1, 1), "3 data sets and 2 weights"), ((1, -1, 1), "none negative"), ((0, 0, 0), "a positive sum"),
     ((1, 1, float("nan")), "none negative"), ((1, 1, 1e-6), r"weights of \['c'\] are below a row in 16384")],
)
def test_bad_weights(three, share, words):
    with pytest.raises(ValueError, match=words):
        loader(three, share)


def test_documents_by_length(three):
    data = TokenShards(three / "a")
    chosen = PackedLoader(data, seq_len=16, rows=1, seed=0, min_tokens=30, max_tokens=50)
    assert chosen.n_tokens == sum(n for n in data.lengths if 30 <= n <= 50)
    kept = Counter(t for d in range(len(data)) if 30 <= data.lengths[d] <= 50 for t in data.read(d).tolist())
    seen = Counter(t for r in range(chosen.rows_per_epoch) for p in chosen.row(r) for t in p[1:].tolist())
    assert not seen - kept, "only these documents"
    with pytest.raises(ValueError, match="has only 0 tokens in documents of 900 to any number of tokens"):
        PackedLoader(data, seq_len=16, rows=1, seed=0, min_tokens=900)


def test_a_mixture_from_its_file(three):
    Mixture((Part("a", 3.0), Part("b", 1.0), Part("a", 4.0, min_tokens=30))).write(three / "m.json")
    mixture = open_loader(three / "m.json", seq_len=16, rows=8, seed=1)
    assert mixture.share.tolist() == [3 / 8, 1 / 8, 4 / 8] and [d.path.name for d in data_sets(mixture)] == ["a", "b", "a"]
    assert [p["share"] for p in describe(mixture)["mixture"]] == [3 / 8, 1 / 8, 4 / 8]
    plain = open_loader(three / "a", seq_len=16, rows=8, seed=1)
    assert isinstance(plain, PackedLoader) and describe(plain)["n_tokens"] == plain.n_tokens
    (three / "bad.json").write_text('{"parts": [{"path": "a", "wieght": 1}]}')
    with pytest.raises(ValueError, match=r"bad.json: parts\[0\].wieght is not known; expected weight\?"):
        open_loader(three / "bad.json", seq_len=16, rows=8, seed=1)


CODE, NEWS, RARE = Cell("computing", "code", "zxx", "3"), Cell("politics", "news", "en", "1"), Cell("law", "news", "sw", "4")


def test_weights_are_products_over_the_label_vector():
    cells = {CODE: 600, NEWS: 300, RARE: 100}
    assert weights(cells) == pytest.approx({CODE: 0.6, NEWS: 0.3, RARE: 0.1})
    got = weights(cells, {"domain=news": 2.0, "educational_value=4": 3.0})
    assert got == pytest.approx({CODE: 600 / 1800, NEWS: 600 / 1800, RARE: 600 / 1800})
    assert weights(cells, power=0.0) == pytest.approx(dict.fromkeys(cells, 1 / 3))
    with pytest.raises(ValueError, match="factor 'domain=poetry' is 2"):
        weights(cells, {"domain=poetry": 2})
    with pytest.raises(ValueError, match="factor 'domain=code' is -1"):
        weights(cells, {"domain=code": -1})
    with pytest.raises(ValueError, match="leave no cell"):
        weights(cells, {"domain=code": 0, "domain=news": 0})


def test_no_cell_is_read_too_often():
    cells = {CODE: 600, NEWS: 300, RARE: 100}
    got = weights(cells, {"language=sw": 100}, total_tokens=1000, max_epochs=2)
    assert got == pytest.approx({RARE: 0.2, CODE: 0.8 * 2 / 3, NEWS: 0.8 / 3})
    tight = weights(cells, {"language=sw": 100, "domain=news": 100}, total_tokens=1000, max_epochs=1.2)
    assert sum(tight.values()) == pytest.approx(1) and all(tight[c] <= 1.2 * n / 1000 + 1e-9 for c, n in cells.items())
    with pytest.raises(ValueError, match="are over 2 passes"):
        weights(cells, total_tokens=3000, max_epochs=2)


def test_cells_without_a_row_give_their_share_away(tmp_path):
    for cell, lengths in ((CODE, [40, 50]), (NEWS, [5]), (RARE, [20, 25])):
        shards.write(tmp_path / "train" / cell.key, [([1] * n, n) for n in lengths], vocab_size=64, end_of_text=END)
    share = {CODE: 0.5, NEWS: 0.3, RARE: 0.2}
    parts = of_cells(tmp_path, share, seq_len=16)
    assert {p.path.name: pytest.approx(p.weight) for p in parts} == {CODE.key: 5 / 7, RARE.key: 2 / 7}
    long = of_cells(tmp_path, share, seq_len=16, min_tokens=30)
    assert [(p.path.name, p.weight, p.min_tokens) for p in long] == [(CODE.key, 1.0, 30)]
    with pytest.raises(ValueError, match="no cell with a weight holds 16 tokens in documents of 300"):
        of_cells(tmp_path, share, seq_len=16, min_tokens=300)
