"""Blocks that clean documents and drop bad ones. A document's ``kind`` is "prose", "code" or "curated": rules made for
sentences would drop all code, and worked problems.

Sources of the rules: Rae et al. 2021 (arXiv 2112.11446, appendix A1) for prose, as datatrove has them; Li et al. 2023 (arXiv
2305.06161, section 3.3) for code.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path

from .blocks import (
    WORDS, BaseFilter, Document, DocumentsPipeline, GopherQualityFilter, GopherRepetitionFilter, PipelineStep, words,
)

NO_LANGUAGE = "zxx"  # ISO 639: no linguistic content; here the language of code
UNSPACED = frozenset({"zh", "yue", "wuu", "ja", "th", "lo", "km", "my", "dz"})  # words are single characters there

_CONTROL = dict.fromkeys(c for c in range(0xA0) if unicodedata.category(chr(c)) == "Cc" and chr(c) not in "\t\n\x0c")
_TRAILING, _BLANK = re.compile(r"[ \t]+$", re.MULTILINE), re.compile(r"\n{4,}")


class Normalise(PipelineStep):
    """NFC, one kind of line end, no control characters, no trailing blanks, at most two empty lines."""

    type, name = "FORMAT", "normalise"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            with self.track_time():
                doc.text = normalise(doc.text)
            yield doc


def normalise(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").translate(_CONTROL)
    text = unicodedata.normalize("NFC", text)
    return _BLANK.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")


class Language(BaseFilter):
    """Writes ``language`` (ISO 639, 140 of them) and drops what is not in ``keep`` (empty: nothing). py3langid's model
    is in its wheel. A document whose language is less sure than ``min_confidence`` counts as "und"."""

    name = "language"

    def __init__(self, keep: tuple[str, ...] = (), min_confidence: float = 0.5, chars: int = 2000):
        super().__init__()
        self.keep, self.min_confidence, self.chars = frozenset(keep), min_confidence, chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        doc.metadata["language"] = language = identify(doc, self.chars, self.min_confidence)
        return not self.keep or language in self.keep or (False, f"language_{language}")


def identify(doc: Document, chars: int, min_confidence: float) -> str:
    if doc.metadata.get("kind") == "code":
        return NO_LANGUAGE
    language, confidence = _identifier().classify(doc.text[:chars])
    return language if confidence >= min_confidence else "und"


def _identifier():
    if not hasattr(_identifier, "loaded"):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        _identifier.loaded = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return _identifier.loaded


class Quality(BaseFilter):
    """Gopher's rules for prose, with its stop words for English only; length and letters for code; none for curated
    text."""

    name = "quality"

    def __init__(self, min_words: int = 50, max_words: int = 100_000, min_code_chars: int = 100):
        super().__init__()
        self.min_words, self.max_words, self.min_code_chars = min_words, max_words, min_code_chars
        self.repetition = GopherRepetitionFilter(language=WORDS)
        common = {"min_doc_words": min_words, "max_doc_words": max_words, "language": WORDS}
        self.english = GopherQualityFilter(**common)
        self.other = GopherQualityFilter(min_stop_words=None, **common)
        self.unspaced = GopherQualityFilter(
            min_stop_words=None, min_avg_word_length=None, max_non_alpha_words_ratio=0.5, **common
        )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        kind = doc.metadata.get("kind")
        if kind == "curated":
            return True
        if kind == "code":
            return self.code(doc.text)
        language = doc.metadata["language"]
        rules = self.english if language == "en" else self.unspaced if language in UNSPACED else self.other
        kept = rules.filter(doc)
        return kept if kept is not True else self.repetition.filter(doc)

    def code(self, text: str) -> bool | tuple[bool, str]:
        if len(text) < self.min_code_chars:
            return False, "code_short"
        lines = text.splitlines()
        if max(map(len, lines)) > 1000 or len(text) / len(lines) > 100:
            return False, "code_long_lines"
        if sum(c.isalnum() for c in text) / len(text) < 0.25:
            return False, "code_few_letters"
        return True


class Contamination(BaseFilter):
    """Drops documents that share a run of ``n`` words with an evaluation, and counts them by evaluation. Items shorter
    than ``n`` words cannot be checked so; ``ngrams`` tells how many there are."""

    name = "contamination"

    def __init__(self, evals: Iterable[Path], n: int = 13, drop: bool = True):
        super().__init__()
        self.evals, self.n, self.drop, self._known = tuple(evals), n, drop, None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._known is None:  # not in __init__: it would be sent to every worker
            self._known = {path.stem: ngrams(path, self.n)[0] for path in self.evals}
        found = run_hashes(doc.text, self.n) if self.evals else set()
        hits = sorted(name for name, known in self._known.items() if not known.isdisjoint(found))
        if hits:
            doc.metadata["contaminated_by"] = hits
            self.stat_update(*(f"contaminated_{name}" for name in hits))
        return not (hits and self.drop) or (False, f"contaminated_{hits[0]}")


def run_hashes(text: str, n: int) -> set[int]:
    """Hashes of all runs of ``n`` words, 64 bits from two checksums."""
    found = words(text)
    runs = (" ".join(found[i : i + n]).encode() for i in range(len(found) - n + 1))
    return {zlib.crc32(r) << 32 | zlib.adler32(r) for r in runs}


def eval_texts(path: Path) -> list[str]:
    """The items of an evaluation: the strings of each JSONL object joined, or a text file's paragraphs."""
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [p for p in raw.split("\n\n") if p.strip()]
    items = (json.loads(line) for line in raw.splitlines() if line.strip())
    return [" ".join(str(v) for v in item.values()) if isinstance(item, dict) else str(item) for item in items]


def ngrams(path: Path, n: int) -> tuple[set[int], int, int]:
    """(hashes of an evaluation's runs of n words, its items, those too short to have one)"""
    per_item = [run_hashes(text, n) for text in eval_texts(path)]
    return set().union(*per_item), len(per_item), sum(not found for found in per_item)
