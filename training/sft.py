"""Supervised fine-tuning on conversations: ``python -m training.sft --start MODEL --data FILE --out DIR``.

Long-CoT cold start and thinking-mode fusion (Qwen3 technical report, sections 4.1 and 4.3) are this trainer with other
data: a JSONL file of {"messages": [...]}, with "tools" where there are some, thinking in ``reasoning_content``.

Loss is on the assistant's turns behind the last user query only, where thinking is part of the prompt format; a
conversation of several queries gives one sample for each, its history without thinking, as at inference. Prompt and reply
are encoded apart, so the ids are those the model reads and writes then. A reply without thinking has the empty think
block, which is trained, too.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_model.chat import render, thinking_mode
from qwen3_model.tokenizer import Tokenizer

from . import stage_memory
from .config import require
from .core import Run, TrainConfig, command, train
from .files import write_jsonl
from .environment import file_sha256
from .losses import LossFn, cross_entropy
from .samples import Sample

HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    data: Path  # JSONL, see the module
    rows: int = 32  # conversations per step
    max_tokens: int = 4096  # longer samples are left out, and counted

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "max_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self.require_pack(self.max_tokens, "max_tokens")


def encode(tokenizer: Tokenizer, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None) -> Iterator[Sample]:
    """One sample per user query that has a reply, with weight 1 on every token the assistant wrote, its end included.

    Raises ValueError for messages that `chat.render` refuses, without a reply, with the chat format's own tokens in
    their text, or where the last flag says otherwise than the reply does: thinking under /no_think, or none under /think
    or without a flag.
    """
    for i, message in enumerate(messages):
        for name in ("content", "reasoning_content"):
            text = message.get(name) or ""
            if "<|im_start|>" in text or END in text:
                raise ValueError(f"messages[{i}].{name}: has <|im_start|> or <|im_end|> in its text")
    queries = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    found = False
    for query, after in zip(queries, [*queries[1:], len(messages)]):
        turn = [m for m in messages[query + 1 : after] if m.get("role") == "assistant"]
        if not turn:
            continue
        found = True
        thinks, asked = any(m.get("reasoning_content") for m in turn), thinking_mode(messages[: query + 1])
        if thinks != asked:
            raise ValueError(f"messages[{query}]: asks {'for' if asked else 'for no'} thinking, and the reply has "
                             f"{'some' if thinks else 'none'}; set the flag that fits")
        text = render(messages[:after], tools=tools, add_generation_prompt=False)
        parts = text.split(HEADER)
        before = len(parts) - len(turn)
        tokens = tokenizer.encode(HEADER.join(parts[:before]) + HEADER)
        weights = [0.0] * len(tokens)
        for i, part in enumerate(parts[before:]):
            reply, _, rest = part.partition(END)
            written = tokenizer.encode(reply + END)
            tokens += written
            weights += [1.0] * len(written)
            if i + 1 < len(turn):  # a tool's result, and the next header
                given = tokenizer.encode(rest + HEADER)
                tokens += given
                weights += [0.0] * len(given)
        yield Sample(tokens, weights)
    if not found:
        raise ValueError("messages: no user query with a reply of the assistant")


def flagged(messages: Messages, rng: random.Random, *, bare: float = 0.3, decoys: float = 0.15) -> list[dict[str, Any]]:
    """The conversation with /think and /no_think flags, so that at every query the last flag fits its reply.

    Flags go behind queries, the first one sometimes into the system turn. Where thinking is what the flags so far (or none)
    say, a share ``bare`` of queries gets no flag. A share ``decoys`` of those with one has the opposite one before it.
    """
    out: list[dict[str, Any]] = []
    queries = [i for i, m in enumerate(messages) if m["role"] == "user"]
    ends = dict(zip(queries, [*queries[1:], len(messages)]))
    for i, message in enumerate(map(dict, messages)):
        if i in ends:
            thinks = any(m.get("reasoning_content") for m in messages[i + 1 : ends[i]])
            as_asked = thinking_mode([*out, message]) == thinks
            flag, other = ("/think", "/no_think") if thinks else ("/no_think", "/think")
            if as_asked and (out or thinks) and rng.random() < bare:
                pass
            elif i == queries[0] and rng.random() < 0.25:
                if out:
                    out[0]["content"] += f" {flag}"
                else:
                    out.append({"role": "system", "content": flag})
            else:
                decoy = f" {other}" if rng.random() < decoys else ""
                message["content"] += f"{decoy} {flag}"
        out.append(message)
    return out


def read(path: Path, tokenizer: Tokenizer) -> list[Sample]:
    """Samples of a JSONL file. Raises ValueError naming the line that is wrong, or for a file without any."""
    samples = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                if unknown := record.keys() - {"messages", "tools"}:
                    raise ValueError(f"unknown keys {sorted(unknown)}; expected messages and tools")
                samples += encode(tokenizer, record["messages"], tools=record.get("tools"))
            except (ValueError, KeyError, AttributeError) as e:
                raise ValueError(f"{path}: line {number}: {e}") from e
    if not samples:
        raise ValueError(f"{path}: no conversations")
    return samples


def write(path: Path, conversations: Iterable[Messages]) -> None:
    """What `read` reads, whole or not at all."""
    write_jsonl(path, ({"messages": list(c)} for c in conversations))


def batch(samples: Sequence[Sample], rows: int, seed: int, step: int) -> list[Sample]:
    """Rows of a step, a pure function of (seed, step): epochs in random order, end to end. The weights of a step sum to
    one."""
    chosen, n = [], len(samples)
    orders: dict[int, list[int]] = {}
    for place in range(step * rows, (step + 1) * rows):
        epoch, i = divmod(place, n)
        if epoch not in orders:
            generator = torch.Generator().manual_seed((seed << 32) + epoch)
            orders[epoch] = torch.randperm(n, generator=generator).tolist()
        chosen.append(samples[orders[epoch][i]])
    return normalised(chosen)


def normalised(samples: Sequence[Sample]) -> list[Sample]:
    """With weights that sum to one over all samples."""
    total = sum(sum(s.weights) for s in samples)
    return [dataclasses.replace(s, weights=[w / total for w in s.weights]) for s in samples]


def fine_tune(config: SFTConfig, *, loss_fn: LossFn = cross_entropy, quiet: bool = False) -> Path:
    """Runs or resumes; returns the folder of the finished model. Errors as `core.train`, `read` and `stage_memory.check`."""
    if loss_fn is cross_entropy:  # what another loss takes is not known
        stage_memory.check(stage_memory.FineTuning, config.resolved())
    tokenizer = Tokenizer.from_file(config.start / "tokenizer.json")
    found = read(config.data, tokenizer)
    samples = [s for s in found if len(s.tokens) <= config.max_tokens]
    if not samples:
        raise ValueError(f"max_tokens is {config.max_tokens}; all {len(found)} samples of {config.data} are longer")
    data = {"sha256": file_sha256(config.data), "samples": len(samples), "too_long": len(found) - len(samples)}

    def step(run: Run, n: int) -> dict[str, float]:
        return run.update(batch(samples, config.rows, config.seed, n), loss_fn, config.lr_at(n))

    return train(config, step, data=data, quiet=quiet)


if __name__ == "__main__":
    command(SFTConfig, fine_tune, "training.sft", __doc__)
