import itertools

import pytest
from qwen_data import qwen3_tokenizer

from qwen3_model.chat import render
from qwen3_model.config import Qwen3Config
from qwen3_model.generate import generate, stream
from qwen3_model.model import Qwen3
from qwen3_model.sampling import NON_THINKING, THINKING, SamplingParams
from qwen3_model.thinking import EARLY_STOP, ThinkingBudget, chat, prepare, reply, thinks

# The ids of the text that Qwen's own code inserts.
OFFICIAL = [271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961,
            1431, 624, 151668, 271]  # fmt: skip
THINK, END_THINK, IM_END, NEWLINE = 151667, 151668, 151645, 198
USER = [{"role": "user", "content": "What is 2 + 2?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=64, stop_ids=())


@pytest.fixture(scope="module")
def tokenizer():
    return qwen3_tokenizer()


@pytest.fixture(scope="module")
def model():
    """Random, with the real vocabulary; `saying` scripts its choices."""
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, initializer_range=0.3,
        max_position_embeddings=2048,
    )
    return Qwen3(config).init_weights(0).eval()


def saying(monkeypatch, script: list[int]) -> None:
    """Makes the model's choice for its n-th token script[n], then the last one again and again. Positions taken by
    inserted tokens use up their part of the script."""
    steps = itertools.count()
    original = Qwen3.head

    def head(self, hidden):
        logits = original(self, hidden) * 0
        logits[..., script[min(next(steps), len(script) - 1)]] = 1.0
        return logits

    monkeypatch.setattr(Qwen3, "head", head)


def test_early_stop_is_the_official_text(tokenizer):
    assert tokenizer.encode(EARLY_STOP) == OFFICIAL
    assert list(ThinkingBudget(tokenizer, 5).early_stop) == OFFICIAL


def test_budget_inserts_the_official_ids_once(model, tokenizer, monkeypatch):
    """8 tokens of thinking, `<think>` included; then exactly the official ids; then the model again."""
    prompt = prepare(tokenizer, USER).prompt
    saying(monkeypatch, [THINK, NEWLINE] + [1000] * 200)
    turn = prepare(tokenizer, USER, params=GREEDY, thinking_budget=8)
    (c,) = generate(model, [turn.prompt], turn.params, tokenizer=tokenizer, guides=[turn.guide])
    assert c.ids == [THINK, NEWLINE] + [1000] * 6 + OFFICIAL + [1000] * (64 - 8 - 24)
    assert c.forced == list(range(8, 32)) and c.finish_reason == "length"
    done = reply(turn, c, tokenizer)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 64)
    assert done.usage.thinking_tokens == 8 + 23 and done.usage.total_tokens == len(prompt) + 64
    assert done.early_stopped and done.parsed.complete
    word = tokenizer.decode([1000])
    assert done.parsed.thinking == word * 6 + EARLY_STOP.removesuffix("\n</think>\n\n")
    assert done.parsed.content == word * 32


@pytest.mark.parametrize(
    "script, why",
    [
        ([THINK, NEWLINE, 1000, END_THINK, 271, 17, IM_END], "the thinking ended in time"),
        ([THINK, 1000, 1000, 1000, 1000, 1000, 1000, END_THINK, 17, IM_END], "it ended with the last token"),
        ([17, 18, 19, 20, 21, 22, 23, 24, 25, 26, IM_END], "it does not think"),
        ([THINK, NEWLINE, 1000, IM_END], "it stopped before"),
    ],
)
def test_budget_leaves_alone(model, tokenizer, monkeypatch, script, why):
    saying(monkeypatch, script)
    params = SamplingParams(temperature=0, max_tokens=64)
    done = chat(model, tokenizer, USER, params=params, thinking_budget=8)
    assert done.ids == script and not done.early_stopped and done.finish_reason == "stop", why


def test_budget_holds_per_row_of_a_batch(model, tokenizer, monkeypatch):
    """Three budgets; each row gets the text at its own place, and the others are as without it."""
    saying(monkeypatch, [THINK] + [1000] * 200)
    guides = [ThinkingBudget(tokenizer, 3), None, ThinkingBudget(tokenizer, 10)]
    a, b, c = generate(model, [[1], [2, 3], [4]], GREEDY, guides=guides)
    assert a.ids == [THINK, 1000, 1000] + OFFICIAL + [1000] * 37 and b.ids == [THINK] + [1000] * 63
    assert c.ids == [THINK] + [1000] * 9 + OFFICIAL + [1000] * 30


def test_budget_and_logprobs_and_stream_agree(model, tokenizer):
    """A random model that is made to think by a guide: what is streamed is what is returned."""
    budget = ThinkingBudget(tokenizer, 6)
    guide = lambda ids: [THINK] if not ids else budget(ids)  # noqa: E731
    params = SamplingParams(seed=1, max_tokens=50, stop_ids=(), logprobs=True)
    events = list(stream(model, [[9707]], params, tokenizer=tokenizer, guides=[guide]))
    done = events[-1].completion
    assert [e.id for e in events] == done.ids and "".join(e.text for e in events) == done.text
    assert done.ids[6:30] == OFFICIAL and done.forced == [0, *range(6, 30)] and len(done.logprobs) == 50


def test_budget_zero_of_a_hybrid_model_is_no_thinking(tokenizer):
    turn = prepare(tokenizer, USER, thinking_budget=0)
    assert turn.prompt == tokenizer.encode(render(USER, enable_thinking=False)) and turn.guide is None
    assert turn.params == NON_THINKING and not thinks(USER, thinking_budget=0)
    with pytest.raises(ValueError, match="thinking_budget: got 0; expected 1 or more"):
        ThinkingBudget(tokenizer, 0)


def test_budget_zero_of_a_thinking_model_ends_it_at_once(model, tokenizer, monkeypatch):
    saying(monkeypatch, [1000])
    done = chat(model, tokenizer, USER, params=GREEDY, thinking_budget=0, variant="thinking-2507")
    assert done.ids == OFFICIAL + [1000] * 40 and done.usage.thinking_tokens == 23 and done.early_stopped


def test_thinking_2507_counts_from_the_open_block(model, tokenizer, monkeypatch):
    saying(monkeypatch, [1000])
    done = chat(model, tokenizer, USER, params=GREEDY, thinking_budget=5, variant="thinking-2507")
    assert done.ids == [1000] * 5 + OFFICIAL + [1000] * 35
    assert done.usage.thinking_tokens == 5 + 23


def test_cut_off_thinking_counts_wholly(model, tokenizer, monkeypatch):
    saying(monkeypatch, [THINK] + [1000] * 100)
    done = chat(model, tokenizer, USER, params=GREEDY)
    assert done.usage.thinking_tokens == 64 and not done.parsed.complete and done.parsed.content == ""
    saying(monkeypatch, [1000])
    done = chat(model, tokenizer, USER, params=GREEDY, variant="thinking-2507")
    assert done.usage.thinking_tokens == 64 and not done.parsed.complete and done.parsed.content == ""


def test_empty_think_block_in_the_prompt_is_no_thinking(model, tokenizer, monkeypatch):
    saying(monkeypatch, [17, IM_END])
    done = chat(model, tokenizer, USER, params=SamplingParams(temperature=0), enable_thinking=False)
    assert done.parsed.content == "2" and done.usage.thinking_tokens == 0 and done.finish_reason == "stop"
    assert done.parsed.message() == {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    "content, options, thinking",
    [
        ("hi", {}, True),
        ("hi /no_think", {}, False),
        ("hi /no_think /think", {}, True),
        ("hi /think", {"enable_thinking": False}, False),
        ("hi /no_think", {"enable_thinking": True}, False),
        ("hi", {"variant": "instruct-2507"}, False),
        ("hi /no_think", {"variant": "thinking-2507"}, True),
    ],
)
def test_switches_choose_the_preset(tokenizer, content, options, thinking):
    messages = [{"role": "user", "content": content}]
    turn = prepare(tokenizer, messages, **options)
    assert thinks(messages, **options) is thinking
    assert turn.params == (THINKING if thinking else NON_THINKING)
    assert turn.prompt == tokenizer.encode(render(messages, **options))
    assert turn.thinking_open == (options.get("variant") == "thinking-2507")


def test_tools_reach_the_prompt(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert prepare(tokenizer, USER, tools=tools).prompt == tokenizer.encode(render(USER, tools=tools))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"thinking_budget": -1}, ValueError, "thinking_budget: got -1; expected 0 or more"),
        ({"thinking_budget": 5.0}, TypeError, "thinking_budget: got 5.0; expected an integer"),
        ({"thinking_budget": True}, TypeError, "thinking_budget: got True"),
        ({"thinking_budget": 5, "variant": "instruct-2507"}, ValueError, "instruct-2507 does not think"),
        ({"thinking_budget": 40, "params": GREEDY}, ValueError, "max_tokens: got 64; expected over 64, to leave room"),
        ({"enable_thinking": "no"}, ValueError, "enable_thinking: expected"),
        ({"variant": "qwq"}, ValueError, "variant: expected"),
        ({"messages": []}, ValueError, "messages: expected a non-empty list"),
        ({"temperature": 1}, TypeError, "temperature"),
    ],
)
def test_bad_options(model, tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        chat(model, tokenizer, **{"messages": USER, **options})


def test_room_for_an_answer_is_enough_by_one(tokenizer):
    assert prepare(tokenizer, USER, thinking_budget=39, params=GREEDY).guide.budget == 39
