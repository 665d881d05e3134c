import base64
import hashlib
import json
import unicodedata

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_data import RANKS, qwen3_tokenizer

from qwen3_model.tokenizer import ADDED_TOKENS, PATTERN, Tokenizer, from_ranks, train_bpe

SPECIAL = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
vision_end vision_pad image_pad video_pad""".split()
NOT_SPECIAL = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
<|file_sep|> <tool_response> </tool_response> <think> </think>""".split()
ADDED_IDS = {name: 151643 + i for i, name in enumerate([f"<|{name}|>" for name in SPECIAL] + NOT_SPECIAL)}
# Unassigned characters may be combining ones in the Unicode version of `tokenizers` and not yet in Python's.
characters = st.characters(exclude_categories=("Cs", "Cn"))
fragments = ["'s", "'LL", " ", "  ", "\t", "\r\n", "\n\n", "123", "e\u0301", "한국어", "深度学习", "🤷🏽‍♀️", "<|", "think>", "_x", "\u00a0"]
texts = st.lists(st.one_of(st.text(characters, max_size=12), st.sampled_from(fragments)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def qwen3():
    return qwen3_tokenizer()


@pytest.fixture(scope="module")
def reference():
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, RANKS.open("rb"))}
    return tiktoken.Encoding("qwen3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ADDED_IDS)


def test_ranks_file_is_the_published_one():
    digest = hashlib.sha256(RANKS.read_bytes()).hexdigest()
    assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def test_saved_file_is_byte_identical_to_qwen3s_tokenizer_json(qwen3, tmp_path):
    qwen3.save(tmp_path / "tokenizer.json")
    digest = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode("Hello, world!") == [9707, 11, 1879, 0]


def test_vocabulary_and_added_tokens(qwen3):
    assert len(ADDED_IDS) == 26 and qwen3.vocab_size == 151_669
    assert {name: qwen3.token_id(name) for name in ADDED_IDS} == ADDED_IDS
    assert {name: qwen3.encode(name) for name in ADDED_IDS} == {name: [i] for name, i in ADDED_IDS.items()}
    assert ADDED_TOKENS == {name: name not in NOT_SPECIAL for name in ADDED_IDS}
    flags = {token.content: token.special for token in qwen3.backend.get_added_tokens_decoder().values()}
    assert flags == ADDED_TOKENS
    assert (qwen3.eos_id, qwen3.pad_id, qwen3.stop_ids) == (151645, 151643, (151645, 151643))
    assert (qwen3.think_id, qwen3.end_think_id) == (151667, 151668)
    with pytest.raises(ValueError, match="'<|extra_0|>' is not in the vocabulary of 151669 tokens"):
        qwen3.token_id("<|extra_0|>")


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Hello, world!", [9707, 11, 1879, 0]),
        ("<think>\n\n</think>\n\n", [151667, 271, 151668, 271]),
        (" /no_think", [608, 2152, 5854, 766]),
        (" /think", [608, 26865]),
        ("\n", [198]),
        ("\n\n", [271]),
        ("user", [872]),
        ("assistant", [77091]),
        ("system", [8948]),
        ("e\u0301", [963]),
        ("", []),
        # Thinking-budget text of Qwen3's documentation.
        (
            "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
            "\n</think>\n\n",
            [271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961,
             1431, 624, 151668, 271],
        ),
    ],
)  # fmt: skip
def test_known_ids(qwen3, text, ids):
    assert qwen3.encode(text) == ids
    assert qwen3.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=400, deadline=None)
@given(text=texts, name=st.sampled_from(sorted(ADDED_IDS)), rest=texts)
def test_equals_tiktoken_on_random_unicode(qwen3, reference, text, name, rest):
    def expected(part):
        return reference.encode_ordinary(unicodedata.normalize("NFC", part))

    if any(added in text or added in rest for added in ADDED_IDS):
        return
    assert qwen3.encode(text) == expected(text)
    assert qwen3.encode(text + name + rest) == expected(text) + [ADDED_IDS[name]] + expected(rest)


@pytest.mark.slow
def test_equals_tiktoken_on_every_code_point(qwen3, reference):
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 512):
        text = "".join(f"a{c}{c}b {c}1\n" for c in points[start : start + 512])
        assert qwen3.encode(text) == reference.encode_ordinary(unicodedata.normalize("NFC", text)), f"from {start}"


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(texts, max_size=4))
def test_decode_inverts_encode_and_streams_whole_characters(qwen3, batch):
    ids = qwen3.encode_batch(batch)
    assert ids == [qwen3.encode(text) for text in batch]
    for text, row in zip(batch, ids, strict=True):
        normal = unicodedata.normalize("NFC", text)
        assert qwen3.decode(row) == normal
        stream, position = qwen3.stream(), 0
        for piece in [*map(stream.push, row), stream.finish()]:
            assert normal.startswith(piece, position)
            position += len(piece)
        assert position == len(normal)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 151_668), st.integers(151_643, 151_668)), max_size=20))
def test_decode_of_any_ids_equals_the_library_and_the_stream(qwen3, ids):
    for skip in (False, True):
        expected = qwen3.backend.decode(ids, skip_special_tokens=skip)
        stream = qwen3.stream(skip)
        assert qwen3.decode(ids, skip) == expected
        assert "".join(map(stream.push, ids)) + stream.finish() == expected


def test_stream_holds_back_incomplete_characters(qwen3):
    ids = qwen3.encode("𓀀")
    assert len(ids) > 1
    stream = qwen3.stream()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["𓀀"]
    assert stream.finish() == ""
    assert stream.push(ids[0]) == "" and stream.finish() == "\ufffd"
    assert stream.push(9707) == "Hello"


def test_skip_special_and_ids_without_token(qwen3):
    ids = qwen3.encode("<|im_start|>a<think>b</think><|im_end|>")
    assert qwen3.decode(ids) == "<|im_start|>a<think>b</think><|im_end|>"
    assert qwen3.decode(ids, skip_special=True) == "a<think>b</think>"
    assert qwen3.decode([9707, 151_669, 151_935]) == "Hello\ufffd\ufffd"
    with pytest.raises(ValueError, match="id -100: token ids are >= 0"):
        qwen3.decode([9707, -100])


def test_bad_texts(qwen3):
    with pytest.raises(TypeError, match="text 0: expected str, got bytes"):
        qwen3.encode(b"bytes")
    with pytest.raises(TypeError, match="text 1: expected str, got NoneType"):
        qwen3.encode_batch(["a", None])
    with pytest.raises(TypeError, match="expected a sequence of strings, got one string"):
        qwen3.encode_batch("abc")
    with pytest.raises(ValueError, match="text 0: lone surrogate at character 2"):
        qwen3.encode("ab\ud800")


def test_bad_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        Tokenizer.from_file(path)
    for content in ("", "{}", '{"model_type": "qwen3"}', "\x00\x01", "[1, 2"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a tokenizer.json"):
            Tokenizer.from_file(path)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_tokens([name for name in ADDED_IDS if "think" not in name])
    backend.save(str(path))
    with pytest.raises(ValueError, match="lacks the added tokens </think> <think>"):
        Tokenizer.from_file(path)
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(path))
    with pytest.raises(ValueError, match="not a byte-level tokenizer"):
        Tokenizer.from_file(path)


def ranks_file(path, tokens):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


BYTES = [bytes([b]) for b in range(256)]


def test_from_ranks_bad_files(tmp_path):
    path = tmp_path / "ranks"
    for line in ("not base64!! 0", "YQ==", "YQ== x", "YQ== 1", "YQ== 0\nYQ== 1"):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="line [12]: not a tiktoken rank"):
            from_ranks(path)
    with pytest.raises(ValueError, match=r"no rank for the single bytes \[b'\\xff'\]"):
        from_ranks(ranks_file(path, BYTES[:-1]))
    with pytest.raises(ValueError, match="b'abc' .rank 256. is not a merge of two tokens of lower rank"):
        from_ranks(ranks_file(path, [*BYTES, b"abc", b"ab"]))
    with pytest.raises(FileNotFoundError):
        from_ranks(tmp_path / "absent")


def test_from_ranks_takes_the_pair_that_lower_ranks_leave(tmp_path):
    built = from_ranks(ranks_file(tmp_path / "ranks", [*BYTES, b"bc", b"ab", b"abc", b"abcab"]))
    merges = json.loads(built.backend.to_str())["model"]["merges"]
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["abc", "ab"]]
    assert built.encode("abcab") == [259] and built.token_id("<|endoftext|>") == 260


CORPUS = [f"The {word}s weren't 1234 {word} in 2024.\n\n\tdef {word}(x): return x{i}\n" for i, word in enumerate(
    "apple river cafe\u0301 深度学习 tensor über kernel matrix".split() * 6)]  # fmt: skip


def test_train_bpe(tmp_path):
    trained = train_bpe(iter(CORPUS), 350, tmp_path / "a.json")
    assert trained.vocab_size == 350
    assert [trained.token_id(name) for name in ADDED_IDS] == list(range(324, 350))
    for text in [*CORPUS, "never seen: 🤷 \r\n", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert trained.decode(trained.encode(text)) == unicodedata.normalize("NFC", text)
    assert len(trained.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    learnt = [trained.decode([i]) for i in range(256, 324)]
    assert " apple" in learnt and "café" in " ".join(learnt) and "1" not in "".join(learnt)
    assert not [token for token in learnt if " " in token.strip()]  # no token spans two words
    again = train_bpe(CORPUS, 350, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert again.encode(CORPUS[3]) == Tokenizer.from_file(tmp_path / "a.json").encode(CORPUS[3])
    flags = {token.content: token.special for token in again.backend.get_added_tokens_decoder().values()}
    assert flags == ADDED_TOKENS


def test_trained_file_loads_in_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained = train_bpe(CORPUS, 350, tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>user\n" + CORPUS[1] + "<|im_end|>"
    assert theirs(text)["input_ids"] == trained.encode(text)
    assert theirs.decode(trained.encode(text)) == text


def test_train_bpe_bad_input(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 281: must be at least 282"):
        train_bpe(CORPUS, 281, tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"vocab_size 5000: the corpus only fills \d+"):
        train_bpe(CORPUS, 5000, tmp_path / "t.json")
    with pytest.raises(TypeError, match="got one string"):
        train_bpe("a text", 400, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
