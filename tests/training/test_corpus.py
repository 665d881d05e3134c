import sys
from collections import Counter

from training import corpus


def test_real_text_of_every_source():
    packages = ("numpy", "rich")
    found = list(corpus.documents(packages=packages))
    assert found == list(corpus.documents(packages=packages)) and len({d.text for d in found}) == len(found)
    sizes = Counter()
    for d in found:
        sizes[d.source] += len(d.text)
    assert list(sizes) == ["stdlib", "topics", *packages] and sizes["stdlib"] > 5_000_000 and sizes["topics"] > 100_000
    names = {d.name for d in found if d.source == "stdlib"}
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/")[:-1])


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
