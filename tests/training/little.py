"""A machine with a little of everything that raw files are made of, in place of this one."""

import random
import struct

import pytest

from training import corpus
from training.recipes import raw

GERMAN = (
    "der die das und nicht mit eine einer wurde konnte werden Datei Verzeichnis gelesen geschrieben Fehler Wert Zeile Befehl weil "
    "ungültig angegeben Anzahl Schlüssel Benutzer Kennwort falsch bereits vorhanden geöffnet Ausgabe während über"
).split()


@pytest.fixture
def little(monkeypatch, tmp_path):
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
