import sys

import pytest

from training import corpus


@pytest.fixture(scope="module")
def documents():
    return list(corpus.documents(2_000_000))


def test_deterministic_and_without_duplicates(documents):
    assert documents == list(corpus.documents(2_000_000))
    assert len({d.text for d in documents}) == len(documents)
    assert 1_500_000 < sum(len(d.text.encode()) for d in documents) <= 2_000_000


def test_real_text_of_every_source():
    found = corpus.sizes(corpus.documents(packages=("numpy", "rich")))
    assert list(found) == ["stdlib", "topics", "numpy", "rich"]
    assert found["stdlib"]["bytes"] > 5_000_000 and found["topics"]["documents"] > 50
    names = {d.name for d in corpus.documents(packages=()) if d.source == "stdlib"}
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/")[:-1])


def test_held_out_is_a_share_decided_by_the_text(documents):
    chosen = [corpus.is_held_out(d, 0.1) for d in documents]
    assert 0.03 < sum(chosen) / len(chosen) < 0.2
    renamed = [corpus.Document("x", "y", d.text) for d in documents]
    assert [corpus.is_held_out(d, 0.1) for d in renamed] == chosen
    assert not any(corpus.is_held_out(d, 0.0) for d in documents)
    with pytest.raises(ValueError, match="share is 1.0"):
        corpus.is_held_out(documents[0], 1.0)


def test_what_is_left_out(tmp_path, monkeypatch):
    package = tmp_path / "somepackage_for_corpus"
    for name, content in {
        "__init__.py": b"", "good.py": b"x = 1\n" * 50, "copy.py": b"x = 1\n" * 50, "short.txt": b"hi",
        "long.md": b"word " * 100_000, "latin.rst": "caf\xe9 ".encode("latin-1") * 90, "data.bin": b"x" * 500,
        "tests/test_good.py": b"assert 1\n" * 50, "doc/guide.rst": "e\u0301lan ".encode() * 60,
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    docs = [d for d in corpus.documents(packages=("somepackage_for_corpus", "no_such_package")) if d.source.startswith("some")]
    assert [d.name for d in docs] == ["copy.py", "doc/guide.rst"]
    assert docs[1].text.startswith("\u00e9lan"), "text is NFC, as the tokenizer makes it"
    assert "somepackage_for_corpus" not in sys.modules, "a package is read, never imported"
