import itertools

import pytest
import torch
from qwen_data import qwen3_tokenizer
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers import Qwen3MoeConfig as HFMoeConfig

from qwen3_model.config import Qwen3Config
from qwen3_model.generate import _close_gaps, _Text, generate, stream
from qwen3_model.load import load, save
from qwen3_model.model import Qwen3
from qwen3_model.sampling import THINKING, SamplingParams

TINY = dict(
    vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, initializer_range=0.3, max_position_embeddings=1024,
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, stop_ids=())
LENGTHS = (5, 1, 40, 17, 290)


def tiny(seed: int = 0, **overrides) -> Qwen3:
    model = Qwen3(Qwen3Config(**{**TINY, **overrides}))
    return model.init_weights(seed).eval()


@pytest.fixture(scope="module")
def model():
    """Dense, in fp32, with a vocabulary small enough that repeated tokens and stop ids are met."""
    return tiny(vocab_size=512)


@pytest.fixture(scope="module")
def text_model():
    """With the vocabulary of the real tokenizer."""
    return tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return qwen3_tokenizer()


def some_prompts(vocab_size: int = 512, lengths=LENGTHS) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=g).tolist() for n in lengths]


# ---- against transformers --------------------------------------------------------------------------------------------


def transformers_model(model: Qwen3, path):
    save(model, path)
    kind = Qwen3MoeForCausalLM if model.config.num_experts else Qwen3ForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def transformers_greedy(hf, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """One batch, padded on the left; returns the new ids of each row up to its stop id."""
    longest, pad = max(map(len, prompts)), 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=params.max_tokens, pad_token_id=pad,
        eos_token_id=list(params.stop_ids) or None, repetition_penalty=params.repetition_penalty, top_k=None,
        top_p=None, temperature=None,
    )[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in params.stop_ids), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ends)]


def test_greedy_equals_transformers(model, tmp_path):
    """A batch of different lengths, ids exact in fp32; with stop ids, rows leave at different times."""
    hf, prompts = transformers_model(model, tmp_path / "m"), some_prompts()
    expected = transformers_greedy(hf, prompts, GREEDY)
    assert [c.ids for c in generate(model, prompts, GREEDY)] == expected
    stops = SamplingParams(temperature=0, max_tokens=24, stop_ids=(expected[0][3], expected[2][9], expected[4][0]))
    got = generate(model, prompts, stops)
    assert [c.ids for c in got] == transformers_greedy(hf, prompts, stops)
    ended = [c.finish_reason for c in got]
    assert ended == ["stop" if c.ids[-1] in stops.stop_ids else "length" for c in got] and len(set(ended)) == 2


def test_greedy_with_repetition_penalty_equals_transformers(model, tmp_path):
    """One prompt, since transformers also counts the padding of a batch as seen."""
    params = SamplingParams(temperature=0, max_tokens=24, stop_ids=(), repetition_penalty=1.4)
    hf, prompts = transformers_model(model, tmp_path / "m"), some_prompts(lengths=(30,))
    assert [c.ids for c in generate(model, prompts, params)] == transformers_greedy(hf, prompts, params)
    assert generate(model, prompts, params)[0].ids != generate(model, prompts, GREEDY)[0].ids


def test_greedy_equals_transformers_for_experts(tmp_path):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    moe = tiny(vocab_size=512, tie_word_embeddings=False, **experts)
    hf, prompts = transformers_model(moe, tmp_path / "m"), some_prompts()
    assert isinstance(hf.config, HFMoeConfig) and not isinstance(hf.config, HFConfig)
    assert [c.ids for c in generate(moe, prompts, GREEDY)] == transformers_greedy(hf, prompts, GREEDY)


def test_reloaded_model_generates_the_same(model, tmp_path):
    save(model, tmp_path / "m")
    prompts = some_prompts()
    assert generate(load(tmp_path / "m"), prompts, GREEDY) == generate(model, prompts, GREEDY)


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_equals_the_full_forward(model, monkeypatch):
    """Reported logprobs of all tokens, through cache, packed prefill, moved rows and cache growth, against one forward
    without a cache."""
    monkeypatch.setattr("qwen3_model.generate._SLACK", 4)
    params = [SamplingParams(seed=i, max_tokens=n, stop_ids=(), logprobs=3) for i, n in enumerate((40, 3, 700, 9, 8))]
    prompts = some_prompts()
    for prompt, c in zip(prompts, generate(model, prompts, params)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c.ids]))[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs).double(), chosen, rtol=0, atol=2e-5)
        top = expected.topk(3)
        assert [[token for token, _ in at] for at in c.top_logprobs] == top.indices.tolist()
        got = torch.tensor([[logprob for _, logprob in at] for at in c.top_logprobs]).double()
        torch.testing.assert_close(got, top.values, rtol=0, atol=2e-5)


def test_a_request_does_not_depend_on_its_batch(model):
    """Alone or with others that leave before it: the same ids; logprobs within the rounding of other GEMM shapes."""
    prompts = some_prompts()
    params = [
        SamplingParams(seed=3, max_tokens=30, stop_ids=(), logprobs=2),
        SamplingParams(temperature=0, max_tokens=7, stop_ids=(), logprobs=True),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=3, max_tokens=30, stop_ids=(), logprobs=True),
        SamplingParams(top_p=0.7, seed=4, presence_penalty=1.5, max_tokens=15, stop_ids=(), logprobs=True),
        SamplingParams(min_p=0.05, seed=5, repetition_penalty=1.2, max_tokens=30, stop_ids=(), logprobs=True),
    ]
    together = generate(model, prompts, params)
    for i, c in enumerate(together):
        (alone,) = generate(model, [prompts[i]], params[i])
        assert alone.ids == c.ids and alone.finish_reason == c.finish_reason
        assert alone.logprobs == pytest.approx(c.logprobs, abs=2e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = generate(model, [prompts[i] for i in order], [params[i] for i in order])
    assert [c.ids for c in shuffled] == [together[i].ids for i in order]


def test_seeds(model):
    prompt = some_prompts(lengths=(6,))

    def ids(seed):
        return generate(model, prompt, SamplingParams(seed=seed, max_tokens=12, stop_ids=()))[0].ids

    assert ids(1) == ids(1) != ids(2)
    assert ids(None) != ids(None)
    same = generate(model, prompt * 2, SamplingParams(seed=1, max_tokens=12, stop_ids=()))
    assert same[0].ids == same[1].ids == ids(1)
    fresh = generate(model, prompt * 2, SamplingParams(max_tokens=12, stop_ids=()))
    assert fresh[0].ids != fresh[1].ids


def test_bf16():
    model = tiny(vocab_size=512).to(torch.bfloat16)
    (c,) = generate(model, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=10, stop_ids=(), logprobs=True))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, *c.ids]]))[0, 2:-1]
    expected = logits.float().log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
    assert torch.tensor(c.logprobs).sub(expected).abs().max() < 0.2


@pytest.mark.parametrize(
    "finished, stay",
    [([0, 0], [0, 1]), ([1, 0, 0], [2, 1]), ([0, 1, 1], [0]), ([1, 1], []), ([1, 0, 1, 0, 0], [3, 1, 4])],
)
def test_close_gaps(finished, stay):
    """Row stay[i] moves to i; one that moves comes from beyond the new end, so none is overwritten before its turn."""
    assert _close_gaps([bool(f) for f in finished]) == stay
    assert all(source == row or source >= len(stay) for row, source in enumerate(stay))


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_stop_ids_come_from_params_else_tokenizer_else_config(text_model, tokenizer):
    prompt = [[9707, 11]]
    first = generate(text_model, prompt, GREEDY)[0].ids[:3]
    (c,) = generate(text_model, prompt, SamplingParams(temperature=0, stop_ids=[first[2]]), tokenizer=tokenizer)
    assert (c.ids, c.finish_reason, c.text) == (first, "stop", tokenizer.decode(first[:2], skip_special=True))
    stopping = tiny(eos_token_id=(7, first[1]))
    (c,) = generate(stopping, prompt, SamplingParams(temperature=0))
    assert (c.ids, c.finish_reason, c.text) == (first[:2], "stop", None)
    (c,) = generate(stopping, prompt, SamplingParams(temperature=0, max_tokens=5), tokenizer=tokenizer)
    assert c.ids[:2] == first[:2] and len(c.ids) == 5
    script = [tokenizer.encode("a")[0], tokenizer.pad_id, 5]
    (c,) = generate(text_model, prompt, GREEDY_TEXT, tokenizer=tokenizer, guides=[scripted(script)])
    assert (c.ids, c.finish_reason, c.text) == (script[:2], "stop", "a")


def test_the_context_is_the_limit(model):
    short = tiny(vocab_size=512, max_position_embeddings=16)
    a, b = generate(short, [[1] * 10, [1] * 15], SamplingParams(temperature=0, max_tokens=50, stop_ids=()))
    assert (len(a.ids), a.finish_reason) == (6, "length") and (len(b.ids), b.finish_reason) == (1, "length")
    with pytest.raises(ValueError, match=r"prompts\[1\]: has 16 tokens; expected fewer than the model's context, 16"):
        generate(short, [[1], [1] * 16], GREEDY)


def scripted(ids: list[int]):
    """A guide that forces these ids, one at a time."""
    return lambda generated: ids[len(generated) : len(generated) + 1]


GREEDY_TEXT = SamplingParams(temperature=0, max_tokens=40)


def run_text(text_model, tokenizer, ids: list[int], stop=(), max_tokens: int | None = None):
    """Streams these ids; returns the completion, the pieces, and the ids that were needed."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens or len(ids), stop=stop, stop_ids=())
    events = list(stream(text_model, [[9707]], params, tokenizer=tokenizer, guides=[scripted(ids)]))
    assert [e.completion is not None for e in events] == [False] * (len(events) - 1) + [True]
    done = events[-1].completion
    assert [e.id for e in events] == done.ids and "".join(e.text for e in events) == done.text
    return done, [e.text for e in events]


def test_a_stop_string_across_tokens_never_leaks(text_model, tokenizer):
    ids = [tokenizer.encode(piece)[0] for piece in "one | - END | two | - E N DX more".split()]
    done, pieces = run_text(text_model, tokenizer, ids, stop=["|-END"])
    assert (done.text, done.finish_reason, done.ids) == ("one", "stop", ids[:4])
    assert pieces == ["one", "", "", ""]
    done, pieces = run_text(text_model, tokenizer, ids, stop=["|-ENDX", "nope"])
    assert (done.text, done.finish_reason) == ("one|-END|two", "stop") and len(done.ids) == 11
    assert pieces == ["one", "", "", "", "|-END", "|two", "", "", "", "", ""]
    done, _ = run_text(text_model, tokenizer, ids, stop=["more!"])
    assert (done.text, done.finish_reason) == ("one|-END|two|-ENDXmore", "length"), "held text comes at the end"


def test_the_first_of_several_stop_strings_counts(text_model, tokenizer):
    ids = tokenizer.encode("alpha beta gamma")
    done, _ = run_text(text_model, tokenizer, ids, stop=["gamma", "eta", " beta"])
    assert (done.text, done.finish_reason) == ("alpha", "stop")


@pytest.mark.parametrize("text", ["héllo 世界 🤷🏽‍♀️ naïve", "<think>\nа\n</think>\n\nб <tool_call>", "\ufffd x"])
def test_streamed_text_never_splits_a_character(text_model, tokenizer, text):
    """Fed byte by byte: no piece holds a replacement character that the text has not."""
    ids = [i for char in text for i in ([tokenizer.encode(char)[0]] if char.isascii() else byte_ids(tokenizer, char))]
    done, pieces = run_text(text_model, tokenizer, ids)
    assert done.text == text
    assert sum(p.count("\ufffd") for p in pieces) == text.count("\ufffd")


def byte_ids(tokenizer, char: str) -> list[int]:
    return [tokenizer._bytes.index(bytes([b])) for b in char.encode()]


def test_text_cut_in_a_character_ends_in_a_replacement(text_model, tokenizer):
    done, pieces = run_text(text_model, tokenizer, byte_ids(tokenizer, "世")[:2])
    assert done.text == "\ufffd" and pieces == ["", "\ufffd"]


def test_special_tokens_are_no_text_but_think_tags_are(text_model, tokenizer):
    ids = tokenizer.encode("<think>a</think><|im_start|>b")
    assert run_text(text_model, tokenizer, ids)[0].text == "<think>a</think>b"


@pytest.mark.parametrize("stop", [("ab",), ("aab", "ba"), ("abab",), ("b", "ab"), ("aaa", "aab", "c")])
def test_stop_strings_against_a_plain_search(stop, tokenizer):
    """All texts over {a, b, c} of 6 letters, a token each: cut where a stop string is first complete."""
    letter = {c: tokenizer.encode(c)[0] for c in "abc"}
    for word in map("".join, itertools.product("abc", repeat=6)):
        text, out, stopped = _Text(tokenizer, stop), "", False
        for n, c in enumerate(word, 1):
            piece, stopped = text.push(letter[c])
            out += piece
            complete = [word[:n].find(s) for s in stop if s in word[:n]]
            assert stopped == bool(complete)
            assert not any(s in out for s in stop)
            if stopped:
                assert out == word[: min(complete)]
                break
        assert stopped or out + text.finish() == word


def test_streaming_interleaves_requests_and_equals_generate(text_model, tokenizer):
    prompts = [tokenizer.encode(t) for t in ("Hello, world!", "深度学习", "def f(x):\n    return")]
    params = [SamplingParams(seed=i, max_tokens=n, stop_ids=(), stop=s)
              for i, (n, s) in enumerate([(20, ("a", "e")), (9, ("\n",)), (14, ())])]
    events = list(stream(text_model, prompts, params, tokenizer=tokenizer))
    done = generate(text_model, prompts, params, tokenizer=tokenizer)
    for i, c in enumerate(done):
        own = [e for e in events if e.request == i]
        assert [e.id for e in own] == c.ids and "".join(e.text for e in own) == c.text
        assert own[-1].completion == c
    assert [e.request for e in events[:6]] == [0, 1, 2, 0, 1, 2]
    if done[2].finish_reason == "length":
        assert done[2].text == tokenizer.decode(done[2].ids, skip_special=True)


def test_a_stream_can_be_left(model):
    events = stream(model, some_prompts(), GREEDY)
    next(events)
    events.close()
    assert not torch.is_inference_mode_enabled()
    events = stream(model, some_prompts(), GREEDY)
    next(events)
    assert not torch.is_inference_mode_enabled(), "the consumer's mode is its own"


# ---- guides ----------------------------------------------------------------------------------------------------------


def test_forced_tokens_are_marked_and_scored_by_the_model(model):
    """Two rows, only one is guided: 3 ids come after the second token; they count towards max_tokens. The guide is not
    asked again before they are out."""
    prompts, params = some_prompts(lengths=(4, 6)), SamplingParams(seed=0, max_tokens=8, stop_ids=(), logprobs=True)
    guided, free = generate(model, prompts, params, guides=[lambda ids: (7, 8, 9) if len(ids) in (2, 3) else (), None])
    plain = generate(model, prompts, params)
    assert guided.ids[:2] == plain[0].ids[:2] and guided.ids[2:5] == [7, 8, 9] and len(guided.ids) == 8
    assert guided.forced == [2, 3, 4] and free.forced == [] and free.ids == plain[1].ids
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + guided.ids]))[0, 3:-1].double().log_softmax(-1)
    expected = logits.gather(1, torch.tensor(guided.ids)[:, None])[:, 0].tolist()
    assert guided.logprobs == pytest.approx(expected, abs=2e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, more, error, message",
    [
        ("text", {}, TypeError, "prompts: got 'text'; expected a list with one list of ids per prompt"),
        (["text"], {}, TypeError, r"prompts\[0\]: got 'text'; expected a list of ids, tokenizer.encode"),
        ([[1], []], {}, ValueError, r"prompts\[1\]: is empty; expected at least one id"),
        ([[1, 512]], {}, ValueError, r"prompts\[0\]\[1\]: got id 512; expected 0 to 511"),
        ([[-1]], {}, ValueError, r"prompts\[0\]\[0\]: got id -1"),
        ([[1.0]], {}, TypeError, r"prompts\[0\]\[0\]: got 1.0; expected an int"),
        ([[True]], {}, TypeError, r"prompts\[0\]\[0\]: got True; expected an int"),
        ([1, 2], {}, TypeError, r"prompts\[0\]: got 1; expected a list of ids"),
        ([[1] * 1024], {}, ValueError, r"prompts\[0\]: has 1024 tokens; expected fewer than the model's context, 1024"),
        ([[1]], {"params": [GREEDY, GREEDY]}, ValueError, "params: got 2 for 1 prompts"),
        ([[1]], {"params": [{"temperature": 0}]}, TypeError, r"params\[0\]: got .*; expected SamplingParams"),
        ([[1]], {"guides": []}, ValueError, "guides: got 0 for 1 prompts"),
        ([[1]], {"guides": [5]}, TypeError, r"guides\[0\]: got 5; expected a callable or None"),
        ([[1]], {"params": SamplingParams(stop="x")}, ValueError, r"params\[0\].stop: got .* without a tokenizer"),
        ([[1]], {"params": SamplingParams(logprobs=600)}, ValueError, "logprobs: got 600"),
        ([[1]], {"guides": [lambda ids: [512]]}, ValueError, r"guides\[0\]: gave id 512; expected 0 to 511"),
    ],
)
def test_bad_input(model, prompts, more, error, message):
    with pytest.raises(error, match=message):
        generate(model, prompts, **more)


def test_bad_input_raises_before_the_first_token_is_asked_for(model):
    with pytest.raises(ValueError, match="is empty"):
        stream(model, [[]], GREEDY)


def test_unknown_options_are_refused(model):
    with pytest.raises(TypeError):
        generate(model, [[1]], THINKING, top_k=5)
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)


def test_no_prompts(model):
    assert generate(model, [], GREEDY) == [] and generate(model, [], []) == []
