"""What is used of datatrove (pipelines of blocks over files, on one machine, Slurm or Ray), in one place, and the word
splitter that its blocks are given here: theirs need a model or a library per language."""

from __future__ import annotations

import regex

try:
    import multiprocess
    import orjson  # noqa: F401  (datatrove reads and writes JSONL with it)
    import py3langid  # noqa: F401
    import pypdf  # noqa: F401
    import resiliparse  # noqa: F401
    from datatrove.data import Document, DocumentsPipeline
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import (
        ExactDedupFilter, ExactDedupSignature, ExactFindDedups, MinhashDedupBuckets, MinhashDedupCluster,
        MinhashDedupFilter, MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.readers.base import BaseDiskReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
except ImportError as e:
    raise ImportError(f"building data needs more packages ({e}): pip install 'qwen3-kernels[data]'") from e

__all__ = [
    "BaseDiskReader", "BaseFilter", "Document", "DocumentsPipeline", "ExactDedupConfig", "ExactDedupFilter",
    "ExactDedupSignature", "ExactFindDedups", "GopherQualityFilter", "GopherRepetitionFilter", "HashConfig",
    "JsonlReader", "JsonlWriter", "LocalPipelineExecutor", "MinhashConfig", "MinhashDedupBuckets", "MinhashDedupCluster",
    "MinhashDedupFilter",
    "MinhashDedupSignature", "ParquetReader", "PipelineStep", "RayPipelineExecutor", "SlurmPipelineExecutor", "WORDS",
    "Words", "multiprocess", "words",
]

# Scripts that put no spaces between words: there a character counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}_'\u2019])+|[^\s\p{{L}}\p{{M}}\p{{N}}_]+")
_LETTERS = regex.compile(r"[\p{L}\p{N}]")


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation, in any script."""
    return [w for w in _WORD.findall(text.lower()) if _LETTERS.search(w)]


class Words(WordTokenizer):
    """datatrove's interface to this splitter; punctuation counts as words, as its blocks expect."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("no block in use asks for sentences")

    span_tokenize = sent_tokenize


WORDS = Words()
