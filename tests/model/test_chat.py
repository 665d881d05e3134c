import itertools
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_data import official_template, qwen3_tokenizer

from qwen3_model.chat import VARIANTS, Parsed, encode_chat, parse, render, thinking_mode

GOLDEN = json.loads((Path(__file__).parents[1] / "data/qwen3_chat_golden.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "q"}]
CALL = {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "ü<&'\""]}}


@pytest.fixture(scope="module")
def tokenizer():
    return qwen3_tokenizer()


# ---- rendering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_goldens(name, tokenizer):
    """Texts and ids of the published template and tokenizer."""
    case = GOLDEN[name]
    assert render(**case["input"]) == case["text"]
    assert encode_chat(tokenizer, **case["input"]) == case["ids"]


fragments = st.sampled_from([
    "<think>", "</think>", "\n", "\n\n", "<think>\n", "\n</think>\n\n", "<tool_response>", "</tool_response>",
    "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>", " /think", " /no_think", "{{ x }}", "{% if %}", "{}",
    "{name}", "\\n", "深度", "e\u0301", "🤷🏽", " ", "'", '"', "a", "1", "&lt;",
])  # fmt: skip
pieces = st.one_of(fragments, st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
texts = st.lists(pieces, max_size=6).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
arguments = st.one_of(objects, objects.map(json.dumps))
plain_calls = st.fixed_dictionaries({"name": texts.filter(bool), "arguments": arguments})
calls = st.one_of(plain_calls, plain_calls.map(lambda c: {"type": "function", "id": "call_0", "function": c}))
optional = st.one_of(st.none(), texts)
wrapped = texts.map(lambda t: f"<tool_response>{t}</tool_response>")


@st.composite
def messages(draw):
    role = draw(st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]))
    message = {"role": role, "content": draw(st.one_of(texts, wrapped) if role == "user" else texts)}
    if role == "assistant":
        if draw(st.booleans()):
            message["reasoning_content"] = draw(optional)
        if draw(st.booleans()):
            message["tool_calls"] = draw(st.lists(calls, max_size=3))
            if message["tool_calls"] and draw(st.booleans()):
                message["content"] = None
    if role == "tool" and draw(st.booleans()):
        message |= {"name": "add", "tool_call_id": "call_0"}
    return message


conversations = st.lists(messages(), min_size=1, max_size=7)
tool_lists = st.one_of(st.none(), st.lists(objects.map(lambda o: {"type": "function", "function": o}), max_size=2))


@settings(max_examples=400, deadline=None)
@given(variant=st.sampled_from(sorted(VARIANTS)), conversation=conversations, tools=tool_lists,
       add=st.booleans(), data=st.data())
def test_equals_the_official_template(variant, conversation, tools, add, data):
    thinking = data.draw(st.sampled_from(VARIANTS[variant]))
    options = {} if thinking is None else {"enable_thinking": thinking}
    expected = official_template(variant)(messages=conversation, tools=tools, add_generation_prompt=add, **options)
    before = json.dumps(conversation)
    got = render(conversation, tools=tools, add_generation_prompt=add, enable_thinking=thinking, variant=variant)
    assert got == expected and json.dumps(conversation) == before


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_equals_the_official_template_where_newlines_and_markers_meet(variant):
    """Every combination of a few reasonings, contents, calls and continuations of an assistant's turn."""
    reasonings = (None, "", "\n", "t", "\n\nt\n", " t ", "</think>")
    contents = ("", "a", "\n\na\n", "<think>\nx\n</think>\n\na", "</think>", "x</think>y</think>\nb",
                "<think><think>x\n\n</think>", "<think>")
    rests = ([], [{"role": "tool", "content": "r"}], [{"role": "user", "content": "<tool_response>r</tool_response>"}],
             [{"role": "user", "content": "\n<tool_response>r</tool_response>"}],
             [{"role": "assistant", "content": "c"}])  # fmt: skip
    for reasoning, content, calls, rest in itertools.product(reasonings, contents, ([], [CALL, CALL]), rests):
        turn = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
        conversation = [*USER, turn, *rest]
        expected = official_template(variant)(messages=conversation, add_generation_prompt=False)
        assert render(conversation, add_generation_prompt=False, variant=variant) == expected, conversation


def test_variants_start_the_reply_differently():
    start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert render(USER) == render(USER, enable_thinking=True) == start
    assert render(USER, enable_thinking=False) == start + "<think>\n\n</think>\n\n"
    assert render(USER, variant="thinking-2507") == start + "<think>\n"
    assert render(USER, variant="instruct-2507") == start
    assert render(USER, add_generation_prompt=False) == "<|im_start|>user\nq<|im_end|>\n"


def test_instruct_2507_keeps_what_looks_like_thinking():
    said = {"role": "assistant", "content": "<think>\na\n</think>\n\nb", "reasoning_content": "c"}
    text = render([*USER, said], variant="instruct-2507", add_generation_prompt=False)
    assert text.endswith("assistant\n<think>\na\n</think>\n\nb<|im_end|>\n") and "c" not in text.split("assistant")[1]


@pytest.mark.parametrize(
    "content, enable, thinks",
    [
        ("q", None, True), ("q", False, False), ("q", True, True), ("q /no_think", True, False),
        ("/no_think q", None, False), ("q /think", False, False), ("/no_think q /think", None, True),
        ("你好/no_think", None, False), ("a/no_think", None, True), ("/no_thinking", None, True),
        ("//no_think", None, True), ("/no_think-ing", None, True), ("(/no_think)", None, False),
        ("/no_think.", None, False), ("/NO_THINK", None, True),
    ],
)  # fmt: skip
def test_switches(content, enable, thinks):
    assert thinking_mode([{"role": "user", "content": content}], enable) is thinks


def test_the_last_switch_of_user_and_system_counts():
    def mode(*contents):
        roles = ("system", "user", "assistant", "user", "tool")
        return thinking_mode([{"role": r, "content": c} for r, c in zip(roles, contents)])

    assert mode("/no_think", "q") is False and mode("/no_think", "q /think") is True
    assert mode("s", "q /no_think", "a /think", "b") is False, "what the model says is no switch"
    assert mode("s", "q /no_think", "a", "<tool_response>/think</tool_response>") is False, "nor a tool's result"
    assert mode("s", "q /no_think", "a", "q", "/think") is False


# ---- parsing ---------------------------------------------------------------------------------------------------------


def parsed(tokenizer, text: str, **options) -> tuple:
    p = parse(tokenizer.encode(text), tokenizer, **options)
    return p.thinking, p.content, p.complete


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>\nt\n</think>\n\na<|im_end|>", ("t", "a", True)),
        ("<think>\n\n</think>\n\na", ("", "a", True)),
        ("a<|im_end|>b", (None, "a", True)),
        ("a<|endoftext|>b", (None, "a", True)),
        ("", (None, "", True)),
        ("<think>\nt", ("t", "", False)),
        ("<think>", ("", "", False)),
        ("\n<think>\nt\n</think>a", ("t", "a", True)),
        ("t\n</think>\n\na", ("t", "a", True)),
        ("</think>a", ("", "a", True)),
        ("<think>t</think>u</think>a", ("t</think>u", "a", True)),
        ("a<think>t</think>b", ("a<think>t", "b", True)),
        ("a <think> b", (None, "a <think> b", True)),
        ("<think>t<|im_end|>u</think>a", ("t", "", False)),
        ("<think>\n\nline\n\nline\n\n</think>\n\n  a\n\nb  \n", ("line\n\nline", "  a\n\nb  ", True)),
    ],
)
def test_parse_thinking(tokenizer, text, expected):
    assert parsed(tokenizer, text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("t\n</think>\n\na", ("t", "a", True)), ("t", ("t", "", False)), ("", ("", "", False)),
        ("<think>\nt\n</think>\n\na", ("t", "a", True)),
    ],
)
def test_parse_when_the_prompt_opened_the_block(tokenizer, text, expected):
    assert parsed(tokenizer, text, thinking_open=True) == expected


def test_parse_goes_by_ids_not_by_text(tokenizer):
    """The letters of `</think>` and `<tool_call>` in other tokens are text."""
    spelled = tokenizer.encode("</") + tokenizer.encode("think>")
    assert tokenizer.decode(spelled) == "</think>" and tokenizer.end_think_id not in spelled
    ids = [tokenizer.think_id, *tokenizer.encode("a"), *spelled, tokenizer.end_think_id, *spelled]
    p = parse(ids, tokenizer)
    assert (p.thinking, p.content, p.complete) == ("a</think>", "</think>", True)
    ids = tokenizer.encode("<tool") + tokenizer.encode("_call>") + tokenizer.encode("{}")
    p = parse(ids, tokenizer)
    assert p.content == "<tool_call>{}" and not p.tool_calls and not p.invalid_tool_calls


def test_parse_tool_calls(tokenizer):
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    p = parse(tokenizer.encode(f"<think>\nhm\n</think>\n\nI add.\n{one}\n{one.replace('1', '2')}<|im_end|>"), tokenizer)
    assert p == Parsed("hm", "I add.", [{"name": "add", "arguments": {"a": n}} for n in (1, 2)], [], True)
    p = parse(tokenizer.encode(f"before\n{one}\nafter"), tokenizer)
    assert p.content == "before\nafter" and len(p.tool_calls) == 1
    p = parse(tokenizer.encode(f"<think>\n{one}\n</think>\n\nno"), tokenizer)
    assert p.tool_calls == [] and p.content == "no" and one in p.thinking, "a call that is only thought of is none"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("not json", "Expecting value"), ("[]", "tool call: expected a JSON object, got []"), ("", "Expecting value"),
        ('{"arguments": {}}', "name: expected a non-empty string, got None"),
        ('{"name": "", "arguments": {}}', "name: expected a non-empty string, got ''"),
        ('{"name": 3, "arguments": {}}', "name: expected a non-empty string, got 3"),
        ('{"name": "f"}', "arguments: expected a JSON object, got None"),
        ('{"name": "f", "arguments": "{}"}', "arguments: expected a JSON object, got '{}'"),
        ('{"name": "f", "arguments": {"a": 1}', "Expecting"), ("[" * 100_000, "recursion"),
    ],
)  # fmt: skip
def test_invalid_calls_are_kept_with_their_reason(tokenizer, text, reason):
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    p = parse(tokenizer.encode(f"a<tool_call>\n{text}\n</tool_call>{good}"), tokenizer)
    assert p.content == "a" and p.tool_calls == [{"name": "g", "arguments": {}}] and p.complete
    ((kept, why),) = p.invalid_tool_calls
    assert kept == text and reason in why
    assert p.message() == {"role": "assistant", "content": "a", "tool_calls": p.tool_calls}


def test_calls_that_are_not_closed(tokenizer):
    """Cut off, or followed by another one."""
    p = parse(tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {}}<tool_call>\n{"name": "g", "arg'), tokenizer)
    assert p.tool_calls == [{"name": "f", "arguments": {}}] and p.invalid_tool_calls[0][0] == '{"name": "g", "arg'
    assert parse(tokenizer.encode("a</tool_call>b"), tokenizer).content == "a</tool_call>b"


clean = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="<>\n"), max_size=12)
# In JSON, NFC joins the last digit of an escaped control character with a combining mark behind it: no longer an escape.
in_json = st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"], exclude_characters="<>"), max_size=12)
clean_values = st.one_of(in_json, st.none(), st.integers(), st.lists(in_json, max_size=2))
clean_calls = st.fixed_dictionaries({
    "name": st.from_regex(r"[a-zA-Z_.-]{1,9}", fullmatch=True),
    "arguments": st.dictionaries(in_json, clean_values, max_size=3),
})  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(thinking=clean, content=clean, calls=st.lists(clean_calls, max_size=3),
       variant=st.sampled_from(["hybrid", "thinking-2507"]))
def test_parse_inverts_render(tokenizer, thinking, content, calls, variant):
    """The last turn as rendered for training, read back from its ids; in NFC, as the tokenizer makes it."""
    message = {"role": "assistant", "content": content, "reasoning_content": thinking, "tool_calls": calls}
    text = render([*USER, message], add_generation_prompt=False, variant=variant)
    opened = variant == "thinking-2507"
    reply = text.removeprefix(render(USER, variant=variant))
    assert len(reply) < len(text)
    p = parse(tokenizer.encode(reply), tokenizer, thinking_open=opened)
    nfc = lambda text: unicodedata.normalize("NFC", text)  # noqa: E731
    assert (p.thinking, p.content, p.complete) == (nfc(thinking), nfc(content), True)
    assert p.tool_calls == json.loads(nfc(json.dumps(calls, ensure_ascii=False))) and not p.invalid_tool_calls


markers = st.sampled_from([151643, 151644, 151645, 151657, 151658, 151667, 151668, 198, 271, 90, 92])


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(markers, st.integers(0, 151_935)), max_size=30), opened=st.booleans())
def test_parse_takes_whatever_a_model_says(tokenizer, ids, opened):
    p = parse(ids, tokenizer, thinking_open=opened)
    assert (p.thinking is None) <= p.complete
    assert render([*USER, p.message()], add_generation_prompt=False).startswith("<|im_start|>user\nq")


# ---- malformed messages ----------------------------------------------------------------------------------------------


def assistant(**fields) -> list:
    return [*USER, {"role": "assistant", "content": "a", **fields}]


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "messages: expected a non-empty list, got []"),
        ("hi", "messages: expected a non-empty list, got 'hi'"),
        (None, "messages: expected a non-empty list, got None"),
        (["hi"], "messages[0]: expected a dict with role and content, got 'hi'"),
        ([{"content": "a"}], "messages[0].role: expected one of ('system', 'user', 'assistant', 'tool'), got None"),
        ([*USER, {"role": "bot", "content": "a"}], "messages[1].role: expected one of"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role: expected one of"),
        ([{"role": "user"}], "messages[0].content: expected a string, got None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content: expected a string, got ["),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0].tool_calls: expected no such field"),
        (assistant(content=None), "messages[1].content: expected a string, got None"),
        (assistant(reasoning_content=3), "messages[1].reasoning_content: expected a string, got 3"),
        (assistant(tool_calls=CALL), "messages[1].tool_calls: expected a list"),
        (assistant(tool_calls=["add"]), "messages[1].tool_calls[0]: expected a dict with name and arguments"),
        (assistant(tool_calls=[CALL, {"function": 3}]), "messages[1].tool_calls[1]: expected a dict with name"),
        (assistant(tool_calls=[{"name": "f"}]), "messages[1].tool_calls[0].arguments: expected a dict or its JSON"),
        (assistant(tool_calls=[{"arguments": {}}]), "messages[1].tool_calls[0].name: expected a non-empty string"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"a": {1}}}]), "tool_calls[0].arguments: not serialisable"),
        (assistant(refusal="no"), "messages[1].refusal: expected no such field in a assistant message, got 'no'"),
    ],
)
def test_malformed_messages(bad, message):
    with pytest.raises(ValueError) as e:
        render(bad)
    assert message in str(e.value)


def test_thinking_mode_checks_its_arguments():
    with pytest.raises(ValueError, match="messages: expected a non-empty list"):
        thinking_mode([])
    with pytest.raises(ValueError, match="enable_thinking: expected a bool, got 'no'"):
        thinking_mode(USER, "no")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "hybrids"}, "expected one of ('hybrid', 'instruct-2507', 'thinking-2507'), got 'hybrids'"),
        ({"enable_thinking": 0}, "enable_thinking: expected one of (None, True, False) for hybrid, got 0"),
        ({"enable_thinking": True, "variant": "instruct-2507"}, "expected one of (None, False) for instruct-2507"),
        ({"enable_thinking": False, "variant": "thinking-2507"}, "expected one of (None, True) for thinking-2507"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: expected a bool, got 1"),
        ({"tools": {"type": "function"}}, "tools: expected a list of dicts"),
        ({"tools": [{}, "add"]}, "tools[1]: expected a dict, got 'add'"),
        ({"tools": [{"f": print}]}, "tools[0]: not serialisable as JSON"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as e:
        render(USER, **options)
    assert message in str(e.value)


def test_empty_fields_of_other_clients_are_accepted():
    """OpenAI's own message objects write out what they do not have."""
    theirs = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
    assert render([*USER, theirs]) == render(assistant())
