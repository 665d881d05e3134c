"""From raw files to a base model, in small."""

import dataclasses
import json
import random
import re
import struct

import pytest

pytest.importorskip("datatrove")

from qwen3_model import load
from training import corpus
from training.recipes import base, raw
from training.recipes.base import Base
from training.recipes.stages import SCALES

TINY = dataclasses.replace(
    SCALES["tiny"], seq_len=32, batch_tokens=256, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=64,
    eval_tokens=64,
)

GERMAN = (
    "der die das und nicht mit eine einer wurde konnte werden Datei Verzeichnis gelesen geschrieben Fehler Wert Zeile Befehl weil "
    "ungültig angegeben Anzahl Schlüssel Benutzer Kennwort falsch bereits vorhanden geöffnet Ausgabe während über"
).split()


@pytest.fixture
def little(monkeypatch, tmp_path):
    """A machine with a little of everything, in place of this one."""
    rng = random.Random(0)
    words = "value list file name error open read write number text string path line index table state".split()
    docs = []
    for i in range(60):
        body = "".join(f"def {a}_{b}({c}):\n    # {d} the {a} of the {b}\n    return {c} + {rng.randrange(99)}\n\n\n"
                       for a, b, c, d in (rng.choices(words, k=4) for _ in range(rng.choice((8, 20, 60)))))
        docs.append(corpus.Document("sympy" if i % 3 else "stdlib", f"m{i}.py", body))
        docs.append(corpus.Document("topics", f"t{i}", " ".join(rng.choices(words + ["the", "of", "and"], k=120)) + "."))
    monkeypatch.setattr(corpus, "documents", lambda packages: iter(docs))
    (tmp_path / "locale" / "xx" / "LC_MESSAGES").mkdir(parents=True)
    catalogue(tmp_path / "locale" / "xx" / "LC_MESSAGES" / "a.mo", {
        f"key {i}": " ".join(rng.choices(GERMAN, k=12)).capitalize() + "." for i in range(240)})
    (tmp_path / "locale" / "xx" / "LC_MESSAGES" / "b.mo").write_bytes(b"not a catalogue, but long enough to look like one")
    monkeypatch.setattr(raw, "LOCALES", tmp_path / "locale")
    monkeypatch.setattr(raw, "MANUALS", tmp_path / "nothing")
    monkeypatch.setattr(base, "VOCABULARY", 450)


def catalogue(file, messages):
    """A gettext .mo file."""
    keys, values = [k.encode() for k in messages], [v.encode() for v in messages.values()]
    start = 28 + 16 * len(keys)
    table, blob = b"", b""
    for part in (keys, values):
        for s in part:
            table += struct.pack("<2I", len(s), start + len(blob))
            blob += s + b"\0"
    file.write_bytes(struct.pack("<7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0) + table + blob)


def test_from_raw_files_to_a_base_model(little, tmp_path):
    options = Base(out=tmp_path / "base", tokens=4000, problems=40, workers=1)
    results = base.run(options, TINY, quiet=True)
    assert list(results["stages"]) == ["s1", "s2", "s3"]
    assert results["stages"]["s1"]["held_out"]["loss"] < 4 and "domain=code" in results["stages"]["s1"]["held_out"]
    assert set(results["card"]["tokens by"]["domain"]) == {"code", "documentation", "interface", "reasoning"}
    assert set(results["card"]["tokens by"]["language"]) == {"de", "en", "zxx"}
    assert set(results["card"]["evals"]) == {"eval"} and results["card"]["classifier"]["domain"]["accuracy"] > 0.9
    assert load.load(tmp_path / "base" / "s3" / "model").config.max_position_embeddings == 256
    page = (options.out / "report.html").read_text()
    assert "Needle" in page and "<svg" in page and not re.search(r"<script|(src|href)\s*=|url\(|@import", page)
    assert (options.out / "report.png").read_bytes().startswith(b"\x89PNG")

    for name in ("report.html", "results.json"):  # stopped at the end: what is done is not done again
        (options.out / name).unlink()
    again = base.run(options, TINY, quiet=True)
    assert again["stages"] == results["stages"] and again["seconds"].keys() == results["seconds"].keys()
    with pytest.raises(ValueError, match="options.json is of a run with other seed;"):
        base.run(dataclasses.replace(options, seed=1), TINY, quiet=True)


def test_options_are_compared_from_the_start(little, tmp_path, monkeypatch):
    def stopped(*_):
        raise InterruptedError

    options = Base(out=tmp_path / "base", problems=40, workers=1)
    monkeypatch.setattr(base, "build", stopped)
    for _ in range(2):  # the same options go on
        with pytest.raises(InterruptedError):
            base.run(options, TINY, quiet=True)
    with pytest.raises(ValueError, match="options.json is of a run with other problems;"):
        base.run(dataclasses.replace(options, problems=50), TINY, quiet=True)
    with pytest.raises(ValueError, match="options.json is of a run with other scale.lr;"):
        base.run(options, dataclasses.replace(TINY, lr=1e-3), quiet=True)


def test_tokens_follow_from_the_minutes(little, tmp_path):
    class Silent:
        def print(self, *_, **__):
            pass

    options = Base(out=tmp_path / "base", problems=40, workers=1, minutes=0.05)
    base.prepare(options, options.out)
    base.build(options, options.out, True)
    short = base.plan(options, TINY, options.out, "cpu", Silent())
    assert all(n % 256 == 0 and n >= 20 * 256 for n in short) and not (options.out / "speed").exists()
    long = base.plan(dataclasses.replace(options, minutes=5.0), TINY, options.out, "cpu", Silent())
    assert all(b > 3 * a for a, b in zip(short, long))


def test_worked_problems_are_right():
    for seed in range(200):
        for part in raw.problem(random.Random(seed)).split("\n\n"):
            question, reasoning, answer = part.split("\n")
            steps = reasoning.removeprefix("Reasoning: ").rstrip(".").split("; ")
            start = int(re.search(r"has (\d+) ", question)[1])
            for step in steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right) >= 0 and int(left.split()[0]) == start
                start = int(right)
            assert int(answer.removeprefix("Answer: ")) == start and f"{len(steps)}" and "How many" in question


def test_explained_share():
    assert raw.explained("x = 1\n") == 0 and raw.explained("# all\n") > 0.8
    assert 0.4 < raw.explained('"""One\ntwo."""\ny = "short"\n') < 0.6 and raw.explained("def (:\n  '") >= 0


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        base.main(["--epochs", "3"])
    assert stop.value.code == 2 and "--epochs" in "".join(capsys.readouterr())
    for changes in ({"minutes": 0}, {"scale": "huge"}, {"workers": 0}, {"tokens": -1}):
        with pytest.raises(ValueError, match="expected"):
            Base(**changes)


def test_raw_files_of_this_machine(tmp_path):
    sources = raw.gather(tmp_path / "raw", code_bytes=200_000, language_bytes=2_000, problems=10)
    assert {s["name"] for s in sources} >= {"code", "docs", "problems"}
    code = [json.loads(line) for f in sorted((tmp_path / "raw" / "code").glob("*.jsonl")) for line in f.read_text().splitlines()]
    assert 0.2 < sum("labels" in c for c in code) / len(code) < 0.8 and len({c["id"].split("/")[0] for c in code}) > 2
    assert list(raw.sample(tmp_path / "raw"))
