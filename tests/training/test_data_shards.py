import json

import numpy as np
import pytest
from conftest import END, VOCAB

from training.data import shards
from training.data.shards import HEADER, TokenShards


def test_documents_come_back_across_shards(make_data):
    path = make_data([5, 1, 7, 3, 9], shard_tokens=10)
    data = TokenShards(path)
    rng = np.random.default_rng(0)
    assert [s[2] for s in data.index.shards] == [3, 2] and data.index.dtype == "uint16"
    assert data.lengths.tolist() == [6, 2, 8, 4, 10] and data.index.n_tokens == 30 and data.index.n_bytes == 75
    for d, n in enumerate([5, 1, 7, 3, 9]):
        expected = rng.integers(0, END, n)
        assert data.read(d).tolist() == [*expected, END]
        assert data.read(d, 1, n).tolist() == expected[1:].tolist()


def test_large_vocabularies_take_four_bytes(tmp_path):
    index = shards.write(tmp_path / "d", [([70_000, 1], 2)], vocab_size=151_936, end_of_text=151_643)
    assert index.dtype == "uint32"
    assert TokenShards(tmp_path / "d").read(0).tolist() == [70_000, 1, 151_643]


def test_empty_documents_are_their_end(tmp_path):
    shards.write(tmp_path / "d", [([], 0), ([1], 1)], vocab_size=VOCAB, end_of_text=END)
    assert TokenShards(tmp_path / "d").read(0).tolist() == [END]


@pytest.mark.parametrize(
    "docs, options, error, words",
    [
        ([], {}, ValueError, "no documents"),
        ([([1], 1), ([VOCAB], 1)], {}, ValueError, r"document 1 has token id 64; expected ids in \[0, 64\)"),
        ([([-1], 1)], {}, ValueError, "token id -1"),
        ([([1], 1)], {"end_of_text": VOCAB}, ValueError, "end_of_text is 64"),
    ],
    ids=["empty", "large-id", "negative-id", "end-of-text"],
)
def test_bad_documents_leave_nothing(tmp_path, docs, options, error, words):
    with pytest.raises(error, match=words):
        shards.write(tmp_path / "d", docs, **({"vocab_size": VOCAB, "end_of_text": END} | options))
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_nothing(tmp_path):
    def documents():
        yield [1, 2], 2
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        shards.write(tmp_path / "d", documents(), vocab_size=VOCAB, end_of_text=END, shard_tokens=1)
    assert list(tmp_path.iterdir()) == []


def test_existing_data_is_not_overwritten(make_data):
    make_data([3])
    with pytest.raises(FileExistsError, match="exists"):
        make_data([3])


def edit_index(path, **changes):
    file = path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_shard(path, offset, data):
    with open(path / "00000.tok", "r+b") as f:
        f.seek(offset)
        f.write(data)


ENDS = HEADER.size
TOKENS = HEADER.size + 8 * 3
DAMAGE = {
    "truncated": (lambda p: (p / "00000.tok").write_bytes((p / "00000.tok").read_bytes()[:-2]), "truncated"),
    "longer": (lambda p: (p / "00000.tok").write_bytes((p / "00000.tok").read_bytes() + b"xx"), "truncated or overwritten"),
    "header-only-half": (lambda p: (p / "00000.tok").write_bytes(b"QW3TOK01"), "less than its header"),
    "magic": (lambda p: edit_shard(p, 0, b"NOTATOKN"), "magic is b'NOTATOKN'"),
    "token-size": (lambda p: edit_index(p, dtype="uint32"), "2 bytes per token; index.json says uint32"),
    "dtype": (lambda p: edit_index(p, dtype="int8"), "dtype is 'int8'"),
    "format": (lambda p: edit_index(p, format="other"), "format is 'other'"),
    "total": (lambda p: edit_index(p, n_tokens=99), "the shards sum to"),
    "bytes": (lambda p: edit_index(p, n_bytes=1), "bytes of text"),
    "end": (lambda p: edit_index(p, end_of_text=1000), "end_of_text is 1000"),
    "unknown-field": (lambda p: edit_index(p, compression="zstd"), "compression"),
    "shard-size": (lambda p: edit_index(p, shards=[["00000.tok", 20, 3]], n_tokens=20), "header says 15 tokens"),
    "not-json": (lambda p: (p / "index.json").write_text("{"), "not an index"),
    "ends-fall": (lambda p: edit_shard(p, ENDS, np.array([9, 7, 15], "<u8").tobytes()), "do not rise"),
    "ends-empty": (lambda p: edit_shard(p, ENDS, np.array([4, 4, 15], "<u8").tobytes()), "do not rise"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE.keys())
def test_lying_files_are_refused(make_data, damage, words):
    path = make_data([3, 4, 5])
    damage(path)
    with pytest.raises(ValueError, match=words):
        TokenShards(path)


def test_missing_files(make_data, tmp_path):
    with pytest.raises(FileNotFoundError, match="index.json"):
        TokenShards(tmp_path)
    path = make_data([3])
    (path / "00000.tok").unlink()
    with pytest.raises(FileNotFoundError, match="00000.tok is named by index.json"):
        TokenShards(path)


def test_ids_beyond_the_vocabulary_are_found_on_reading(make_data):
    path = make_data([3, 4, 5])
    edit_shard(path, TOKENS + 2 * 5, np.array([VOCAB + 7], "<u2").tobytes())
    data = TokenShards(path)
    assert data.read(0).tolist()[-1] == END
    with pytest.raises(ValueError, match="document 1 has token id 71"):
        data.read(1)


def test_ranges_outside_a_document(make_data):
    data = TokenShards(make_data([3]))
    with pytest.raises(ValueError, match=r"has 4 tokens; got the range \[2, 5\)"):
        data.read(0, 2, 5)


def test_merged_sets_hold_the_documents_of_all(make_data, tmp_path):
    parts = [make_data([5, 1, 7], "a", shard_tokens=8), make_data([3, 9], "b", seed=1)]
    index = shards.merge(tmp_path / "both", parts)
    both, alone = TokenShards(tmp_path / "both"), [TokenShards(p) for p in parts]
    wanted = [d.read(i).tolist() for d in alone for i in range(len(d))]
    assert [both.read(i).tolist() for i in range(len(both))] == wanted and index.n_documents == 5
    assert index.n_bytes == both.index.n_bytes == sum(d.index.n_bytes for d in alone)
    with pytest.raises(FileExistsError):
        shards.merge(tmp_path / "both", parts)
    shards.write(tmp_path / "other", [([1], 1)], vocab_size=VOCAB + 1, end_of_text=END)
    with pytest.raises(ValueError, match="different kinds"):
        shards.merge(tmp_path / "mixed", [*parts, tmp_path / "other"])
    with pytest.raises(ValueError, match="no data sets"):
        shards.merge(tmp_path / "none", [])
    assert not (tmp_path / "mixed").exists() and not list(tmp_path.glob(".*"))
