from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import END
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_model.model import Qwen3
from training.data import shards
from training.data.packing import IGNORE, PackedLoader, evaluation_batches
from training.data.shards import TokenShards
from training.pretrain import next_token_loss

LENGTHS = [37, 5, 80, 1, 16, 22, 60, 9, 0, 3]  # with ends: 243 tokens


def documents_of(batch):
    """[(tokens, labels)] of a batch, one pair per packed document."""
    ends = batch.cu_seqlens.tolist()
    return [(batch.tokens[a:b].tolist(), batch.labels[a:b].tolist()) for a, b in zip(ends, ends[1:])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def test_a_batch_is_full_rows_of_shifted_documents(make_data):
    data = TokenShards(make_data(LENGTHS))
    loader = PackedLoader(data, seq_len=20, rows=3, seed=5)
    stored = [data.read(d).tolist() for d in range(len(data))]
    for step in range(20):
        batch = loader.batch(step)
        assert batch.tokens.shape == batch.labels.shape == (60,)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[-1] == 60
        assert {20, 40} <= set(batch.cu_seqlens.tolist()), "a document crosses from one row to the next"
        for tokens, labels in documents_of(batch):
            assert labels[:-1] == tokens[1:]
            assert END not in labels[:-1], "two documents share a mask"
            if tokens[0] == END:
                assert any(doc[: len(labels)] == labels for doc in stored)
            else:  # goes on from another row
                piece = [tokens[0], *labels]
                assert any(doc[i : i + len(piece)] == piece for doc in stored for i in range(len(doc)))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), seq_len=st.integers(1, 24), seed=st.integers(0, 9))
def test_every_token_is_a_label_once_per_epoch(tmp_path_factory, lengths, seq_len, seed):
    total = sum(lengths) + len(lengths)
    lengths = [*lengths, -total % seq_len + seq_len - 1]  # fills the last row
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("d") / "d"
    shards.write(path, [(rng.integers(0, END, n).tolist(), n) for n in lengths], vocab_size=64, end_of_text=END)
    data = TokenShards(path)
    loader = PackedLoader(data, seq_len=seq_len, rows=1, seed=seed)
    assert loader.rows_per_epoch * seq_len == data.index.n_tokens
    stored = Counter(t for d in range(len(data)) for t in data.read(d).tolist())
    for epoch in range(2):
        steps = range(epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch)
        assert Counter(t for s in steps for t in loader.batch(s).labels.tolist()) == stored


def test_epochs_differ_and_rows_are_shuffled(make_data):
    data = TokenShards(make_data([400]))
    loader = PackedLoader(data, seq_len=20, rows=20, seed=0)
    first, second = loader.batch(0), loader.batch(1)
    assert not torch.equal(first.labels, second.labels)
    in_order = torch.from_numpy(data.read(0)[:400])
    assert not torch.equal(first.labels, in_order) and torch.equal(first.labels.sort()[0], in_order.sort()[0])


def test_pure_in_seed_and_step(make_data):
    path = make_data(LENGTHS)
    first = PackedLoader(TokenShards(path), seq_len=20, rows=3, seed=5)
    expected = [first.batch(s) for s in range(12)]  # 12 rows per epoch: three epochs
    again = PackedLoader(TokenShards(path), seq_len=20, rows=3, seed=5)
    for step in (11, 0, 7, 3, 7, 10, 1):
        assert same(again.batch(step), expected[step])
    other = PackedLoader(TokenShards(path), seq_len=20, rows=3, seed=6)
    assert not same(other.batch(0), expected[0])


@pytest.mark.parametrize("world, micros", [(1, 6), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_the_same_rows_whatever_the_number_of_ranks(make_data, world, micros):
    loader = PackedLoader(TokenShards(make_data(LENGTHS)), seq_len=20, rows=6, seed=5)
    for step in range(5):
        whole = loader.batch(step)
        parts = [loader.batch(step, rank=r, world=world, micro=m, micros=micros)
                 for r in range(world) for m in range(micros)]
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert [d for p in parts for d in documents_of(p)] == documents_of(whole)


def test_packed_loss_is_the_sum_of_unpacked_losses(make_data, model_config):
    """Through the model in float32, each document alone as a batch of one: values and every gradient."""
    torch.manual_seed(0)
    model = Qwen3(model_config).init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.5 * torch.randn_like(p)).mul_(4 if p.dim() > 1 else 1)  # attention must matter
    batch = PackedLoader(TokenShards(make_data(LENGTHS)), seq_len=60, rows=3, seed=2).batch(0)

    packed = next_token_loss(model, batch)
    packed.backward()
    packed_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.zeros(())
    for tokens, labels in documents_of(batch):
        logits = model(torch.tensor([tokens]))[0]
        alone = alone + F.cross_entropy(logits.double(), torch.tensor(labels), reduction="sum").float()
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    for a, p in zip(packed_grads, model.parameters()):
        assert (a - p.grad).norm() <= 1e-5 * p.grad.norm()

    leaky = type(batch)(batch.tokens, batch.labels, torch.tensor([0, 60, 120, 180], dtype=torch.int32))
    assert abs(next_token_loss(model, leaky) / packed - 1) > 1e-3, "the model must notice a missing document mask"


@pytest.mark.parametrize("overlap", [0, 7, 19])
def test_evaluation_counts_every_token_once(make_data, overlap):
    data = TokenShards(make_data(LENGTHS))
    stream = [t for d in range(len(data)) for t in data.read(d).tolist()]
    batches = list(evaluation_batches(data, seq_len=20, rows=4, overlap=overlap))
    labels = [x for b in batches for x in b.labels.tolist() if x != IGNORE]
    assert labels == stream
    for batch in batches:
        for tokens, wanted in documents_of(batch):
            assert all(w in (IGNORE, t) for w, t in zip(wanted[:-1], tokens[1:]))


def test_evaluation_gives_the_overlap_as_context(make_data):
    data = TokenShards(make_data([100]))
    second = list(evaluation_batches(data, seq_len=20, rows=1, overlap=8))[1]
    stored = data.read(0).tolist()
    assert second.tokens.tolist() == stored[11:31] and second.labels.tolist() == [IGNORE] * 8 + stored[20:32]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"seq_len": 1000}, "seq_len is 1000, but .* has only 243 tokens"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"rows": 0}, "rows is 0"),
    ],
    ids=["too-long", "no-length", "no-rows"],
)
def test_bad_sizes(make_data, options, words):
    with pytest.raises(ValueError, match=words):
        PackedLoader(TokenShards(make_data(LENGTHS)), **({"seq_len": 20, "rows": 2, "seed": 0} | options))


@pytest.mark.parametrize("part", [{"world": 4}, {"rank": 2, "world": 2}, {"micros": 5}, {"micro": 1}], ids=str)
def test_bad_parts(make_data, part):
    loader = PackedLoader(TokenShards(make_data(LENGTHS)), seq_len=20, rows=6, seed=0)
    with pytest.raises(ValueError, match="expected step >= 0, parts within range and 6 rows"):
        loader.batch(0, **part)


def test_bad_overlap(make_data):
    with pytest.raises(ValueError, match="overlap is 20"):
        list(evaluation_batches(TokenShards(make_data(LENGTHS)), seq_len=20, rows=1, overlap=20))
