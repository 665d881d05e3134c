"""Qwen3's byte-level BPE tokenizer: load, build from tiktoken ranks, train on a corpus, decode as a stream."""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, trainers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenizer regex of Qwen3's tokenizer.json: words, single digits, punctuation, line breaks, spaces."""

_SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"""
_PLAIN = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>"""
ADDED_TOKENS = dict.fromkeys(_SPECIAL.split(), True) | dict.fromkeys(_PLAIN.split(), False)
"""The 26 added tokens in id order, right after the BPE vocabulary, with Qwen3's `special` flag."""

# GPT-2's printable stand-ins for bytes: vocabulary files hold strings, where a space reads "Ġ".
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTE_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(_OTHERS)}
_CHAR_BYTE = {char: byte for byte, char in _BYTE_CHAR.items()}
_REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """A `tokenizers.Tokenizer` (`.backend`) with Qwen3's added tokens. `vocab_size`, the largest id + 1, is 151,669 for
    Qwen3; its embedding has more rows, 151,936. Raises ValueError for a backend of another kind, naming `source`."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer"):
        self._added = backend.get_added_tokens_decoder()
        if missing := ADDED_TOKENS.keys() - {token.content for token in self._added.values()}:
            raise ValueError(f"{source}: not a Qwen3 tokenizer, it lacks the added tokens {' '.join(sorted(missing))}")
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"{source}: not a byte-level tokenizer, its decoder is {backend.decoder}")
        self.backend = backend
        self._ids = backend.get_vocab()
        self.vocab_size = max(self._ids.values()) + 1
        self.eos_id, self.pad_id = self.token_id("<|im_end|>"), self.token_id("<|endoftext|>")
        self.stop_ids = (self.eos_id, self.pad_id)  # the eos_token_id list of Qwen3's generation_config.json
        self.think_id, self.end_think_id = self.token_id("<think>"), self.token_id("</think>")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Loads a tokenizer.json. Raises FileNotFoundError, or ValueError when it is not one of Qwen3's kind."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file, expected the path of a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
        return cls(backend, str(path))

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `from_file`, transformers and vLLM load."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    def token_id(self, token: str) -> int:
        """Id of one token by its exact name, e.g. "<think>". Raises ValueError when there is none."""
        if token not in self._ids:
            raise ValueError(f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing prepended or appended; names of added tokens in it become those tokens.
        Raises TypeError for a non-string, ValueError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel unless TOKENIZERS_PARALLELISM=false."""
        if isinstance(texts, str):
            raise TypeError("texts: expected a sequence of strings, got one string")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {index}: expected str, got {type(text).__name__}")
            if found := re.search("[\ud800-\udfff]", text):
                raise ValueError(f"text {index}: lone surrogate at character {found.start()}, not valid Unicode")
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. Invalid UTF-8 and ids without a token (unused embedding rows) become U+FFFD; `skip_special`
        leaves out tokens flagged special, which `<think>` and `<tool_call>` are not. Raises ValueError for an id < 0.
        """
        return b"".join(self._token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> TextStream:
        """A decoder fed one id at a time whose pieces join to `decode` of all ids."""
        return TextStream(self, skip_special)

    def _token_bytes(self, token_id: int, skip_special: bool) -> bytes:
        if token_id < 0:
            raise ValueError(f"id {token_id}: token ids are >= 0")
        if skip_special and token_id in self._added and self._added[token_id].special:
            return b""
        return self._bytes[token_id] if token_id < self.vocab_size else _REPLACEMENT

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [_REPLACEMENT] * self.vocab_size
        for token, i in self._ids.items():
            table[i] = token.encode() if i in self._added else bytes(map(_CHAR_BYTE.__getitem__, token))
        return table


class TextStream:
    """Decodes a stream of ids, holding back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._token_bytes, self._skip_special = tokenizer._token_bytes, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly empty."""
        return self._decoder.decode(self._token_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """What is held back, as U+FFFD; the stream can then be used for another text."""
        return self._decoder.decode(b"", final=True)


def from_ranks(path: str | Path) -> Tokenizer:
    """Builds Qwen3's tokenizer from tiktoken ranks (`qwen.tiktoken`: lines of base64 token and rank).
    tiktoken merges any adjacent pair whose union has the lowest rank; a tokenizer.json names one pair per token. That
    pair is what the token's bytes become under the merges of lower rank. Raises ValueError for a malformed file and for
    ranks that no BPE training gives.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines()):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if int(rank) != number or token in ranks:
                raise ValueError(f"expected a new token with rank {number}")
        except ValueError as error:
            raise ValueError(f"{path}: line {number + 1}: not a tiktoken rank: {line[:60]!r} ({error})") from None
        ranks[token] = number
    if absent := {bytes([b]) for b in range(256)} - ranks.keys():
        raise ValueError(f"{path}: no rank for the single bytes {sorted(absent)}")
    merges = [_merged_pair(token, ranks) for token in ranks if len(token) > 1]
    name = {token: "".join(_BYTE_CHAR[b] for b in token) for token in ranks}
    vocab = {name[token]: rank for token, rank in ranks.items()}
    return Tokenizer(_add_tokens(_pipeline(vocab, [[name[a], name[b]] for a, b in merges])), str(path))


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Trains a byte-level BPE on `texts` with Qwen3's normaliser and regex, and saves it as a tokenizer.json.
    `vocab_size` counts everything: 256 bytes, merges, then the 26 added tokens. Raises ValueError when it is too small
    for bytes and added tokens or larger than the corpus can fill.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected an iterable of strings, got one string")
    base = vocab_size - len(ADDED_TOKENS)
    if base < 256:
        raise ValueError(f"vocab_size {vocab_size}: must be at least {256 + len(ADDED_TOKENS)} (bytes + added tokens)")
    backend = _pipeline({}, [])
    fixed = {"show_progress": False, "initial_alphabet": list(_CHAR_BYTE)}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=base, min_frequency=2, **fixed))
    if (learnt := backend.get_vocab_size()) < base:
        raise ValueError(f"vocab_size {vocab_size}: the corpus only fills {learnt + len(ADDED_TOKENS)}")
    tokenizer = Tokenizer(_add_tokens(backend), str(path))
    tokenizer.save(path)
    return tokenizer


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        if (best := min(pair_ranks)) >= limit:
            raise ValueError(f"ranks: token {token!r} (rank {limit}) is not a merge of two tokens of lower rank")
        i = pair_ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _pipeline(vocab: dict[str, int], merges: list[list[str]]) -> tokenizers.Tokenizer:
    """Built as the file Qwen3 ships: the constructors of `tokenizers` cannot set all of its fields."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "", "vocab": vocab, "merges": merges}
    spec = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "NFC"}, "model": model}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    spec["post_processor"] = spec["decoder"] = byte_level
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _add_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_tokens([tokenizers.AddedToken(name, special=s, normalized=False) for name, s in ADDED_TOKENS.items()])
    return backend
