"""Qwen3's chat format: messages to prompt text, generated ids back to thinking, answer and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from .tokenizer import Tokenizer

# The values of enable_thinking that each released template can honour.
VARIANTS = {"hybrid": (None, True, False), "instruct-2507": (None, False), "thinking-2507": (None, True)}
_FIELDS = {role: {"role", "content", "name", "tool_call_id"} for role in ("system", "user", "assistant", "tool")}
_FIELDS["assistant"] |= {"reasoning_content", "tool_calls"}
_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_TOOL_RESULT = re.compile("<tool_response>.*</tool_response>", re.DOTALL)
# ASCII only: Chinese text puts no space before a switch, while "a/think" and "/thinking" are none.
_SWITCH = re.compile(r"(?<![\w/])/(no_)?think(?![\w/-])", re.ASCII)


@dataclass(frozen=True)
class Parsed:
    """One completion. `thinking` is None without a think block, "" for an empty one; `complete` is False if the block
    was cut off. `tool_calls` are {"name": str, "arguments": dict}, `invalid_tool_calls` are (text of the call, reason).
    """

    thinking: str | None
    content: str
    tool_calls: list[dict[str, Any]]
    invalid_tool_calls: list[tuple[str, str]]
    complete: bool

    def message(self) -> dict[str, Any]:
        """The assistant message that continues the conversation (without the invalid tool calls)."""
        optional = {"reasoning_content": self.thinking, "tool_calls": self.tool_calls}
        return {"role": "assistant", "content": self.content} | {name: v for name, v in optional.items() if v}


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
    variant: str = "hybrid",
) -> str:
    """The prompt text of a conversation, as the official template of the `variant` writes it.
    A message has `role` (system, user, assistant, tool) and `content` (a string; None only beside `tool_calls`); an
    assistant message may have `reasoning_content` and `tool_calls` ({"name", "arguments"}, plain or as "function";
    arguments a dict or its JSON text). Thinking before the last user query is dropped; instruct-2507 has none at all.
    `enable_thinking=False` (hybrid) starts the reply with an empty think block; thinking-2507 starts it with `<think>`.
    Raises ValueError naming the option, or the message's index and field.
    """
    _check_messages(messages)
    _check(variant in tuple(VARIANTS), "variant", f"one of {tuple(VARIANTS)}", variant)
    _check(isinstance(add_generation_prompt, bool), "add_generation_prompt", "a bool", add_generation_prompt)
    allowed = any(enable_thinking is value for value in VARIANTS[variant])
    _check(allowed, "enable_thinking", f"one of {VARIANTS[variant]} for {variant}", enable_thinking)
    _check(tools is None or isinstance(tools, (list, tuple)), "tools", "a list of dicts", tools)
    turns: list[list[str]] = []
    if tools:
        turns.append(["system", _TOOLS.format("\n".join(_json(t, f"tools[{i}]") for i, t in enumerate(tools)))])
    last_query = max((i for i, message in enumerate(messages) if _is_query(message)), default=len(messages))
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "system" and i == 0 and tools:
            turns[0][1] = f"{content}\n\n{turns[0][1]}"
        elif role == "tool" and i > 0 and messages[i - 1]["role"] == "tool":
            turns[-1][1] += f"\n<tool_response>\n{content}\n</tool_response>"
        elif role == "tool":
            turns.append(["user", f"<tool_response>\n{content}\n</tool_response>"])
        elif role == "assistant":
            recent, last = i > last_query, i == len(messages) - 1
            turns.append([role, _assistant_text(message, f"messages[{i}]", variant, recent, last)])
        else:
            turns.append([role, content])
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    no_thinking = "<think>\n\n</think>\n\n" if enable_thinking is False else ""
    reply = {"hybrid": no_thinking, "instruct-2507": "", "thinking-2507": "<think>\n"}[variant]
    return text + f"<|im_start|>assistant\n{reply}" if add_generation_prompt else text


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Ids of `render(messages, **options)`."""
    return tokenizer.encode(render(messages, **options))


def thinking_mode(messages: Sequence[Mapping[str, Any]], enable_thinking: bool | None = None) -> bool:
    """Whether a hybrid model is to think: `enable_thinking=False` forbids it, else the last `/think` or `/no_think` of
    the user and system turns decides, else yes (Qwen3 Technical Report, section 4.3). ValueError as in `render`."""
    _check_messages(messages)
    _check(enable_thinking is None or isinstance(enable_thinking, bool), "enable_thinking", "a bool", enable_thinking)
    asked = (message["content"] for message in messages if message["role"] == "system" or _is_query(message))
    switches = [switch[1] for content in asked for switch in _SWITCH.finditer(content)]
    return enable_thinking is not False and (not switches or switches[-1] is None)


def parse(ids: Sequence[int], tokenizer: Tokenizer, *, thinking_open: bool = False) -> Parsed:
    """Splits the ids of one completion, up to its first stop token, by the ids of `</think>` and `<tool_call>`.
    Thinking is what precedes the last `</think>`. Without one it is all that follows a leading `<think>`, or all there
    is when the prompt ended in `<think>` (`thinking_open=True`, thinking-2507). Takes whatever a model may generate.
    """
    ids, think, end_think = list(ids), tokenizer.think_id, tokenizer.end_think_id
    ids = ids[: next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))]
    closed = end_think in ids
    split = len(ids) - ids[::-1].index(end_think) if closed else len(ids)
    head, tail = ids[: split - closed], ids[split:]
    lead = head.index(think) if think in head else None
    if lead is not None and not tokenizer.decode(head[:lead]).strip():
        head, thinking_open = head[lead + 1 :], True
    thinks = closed or thinking_open
    thinking = tokenizer.decode(head, skip_special=True).strip("\n") if thinks else None
    content, calls, invalid = [], [], []
    opens, closes = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    for is_call, segment in _segments(tail if thinks else head, opens, closes):
        text = tokenizer.decode(segment, skip_special=True).strip("\n")
        if is_call:
            try:
                calls.append(_read_call(text))
            except (ValueError, RecursionError) as error:
                invalid.append((text, str(error)))
        elif text:
            content.append(text)
    return Parsed(thinking, "\n".join(content), calls, invalid, closed or not thinks)


def _segments(ids: list[int], opens: int, closes: int) -> Iterator[tuple[bool, list[int]]]:
    start, is_call = 0, False
    for i, token in enumerate([*ids, opens]):
        if token == opens or (is_call and token == closes):
            yield is_call, ids[start:i]
            start, is_call = i + 1, token == opens


def _read_call(text: str) -> dict[str, Any]:
    call = json.loads(text)
    _check(isinstance(call, dict), "tool call", "a JSON object", call)
    _check(isinstance(call.get("name"), str) and call["name"], "name", "a non-empty string", call.get("name"))
    _check(isinstance(call.get("arguments"), dict), "arguments", "a JSON object", call.get("arguments"))
    return {"name": call["name"], "arguments": call["arguments"]}


def _is_query(message: Mapping[str, Any]) -> bool:
    return message["role"] == "user" and not _TOOL_RESULT.fullmatch(message["content"])


def _assistant_text(message: Mapping[str, Any], at: str, variant: str, recent: bool, last: bool) -> str:
    thinks, content = variant != "instruct-2507", message.get("content") or ""
    reasoning = message.get("reasoning_content")
    if thinks and reasoning is None and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    calls = [_call_text(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(message.get("tool_calls") or ())]
    calls_text = ("\n" if content and calls else "") + "\n".join(calls)
    if thinks and recent and (last or reasoning):
        content = "<think>\n" + (reasoning or "").strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    return content + calls_text


def _call_text(call: Any, at: str) -> str:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    _check(isinstance(function, Mapping), at, 'a dict with name and arguments, plain or as "function"', call)
    name, arguments = function.get("name"), function.get("arguments")
    _check(isinstance(name, str) and name, f"{at}.name", "a non-empty string", name)
    _check(isinstance(arguments, (str, dict)), f"{at}.arguments", "a dict or its JSON text", arguments)
    text = arguments if isinstance(arguments, str) else _json(arguments, f"{at}.arguments")
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


def _json(value: Any, at: str) -> str:
    _check(isinstance(value, dict), at, "a dict", value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{at}: not serialisable as JSON ({error})") from None


def _check_messages(messages: Any) -> None:
    _check(isinstance(messages, (list, tuple)) and messages, "messages", "a non-empty list", messages)
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        _check(isinstance(message, Mapping), at, "a dict with role and content", message)
        role, content = message.get("role"), message.get("content")
        calls, reasoning = message.get("tool_calls"), message.get("reasoning_content")
        _check(isinstance(role, str) and role in _FIELDS, f"{at}.role", f"one of {tuple(_FIELDS)}", role)
        for name, value in message.items():
            _check(name in _FIELDS[role] or not value, f"{at}.{name}", f"no such field in a {role} message", value)
        _check(isinstance(calls, (list, tuple, type(None))), f"{at}.tool_calls", "a list", calls)
        _check(isinstance(reasoning, (str, type(None))), f"{at}.reasoning_content", "a string", reasoning)
        _check(isinstance(content, str) or (content is None and calls), f"{at}.content", "a string", content)


def _check(right: Any, where: str, expected: str, got: Any) -> None:
    if not right:
        raise ValueError(f"{where}: expected {expected}, got {short(got)}")
