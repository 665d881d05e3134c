"""A model behind an OpenAI-compatible server: text from a vision or language model, or a reward model's scalar.

Answers can be kept on disk by the hash of the request, so that a data build that was killed asks for nothing twice and ends
in the same text.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_json


@dataclass(frozen=True)
class Endpoint:
    """``url`` is up to and with /v1; ``key_env`` names the environment variable that holds the key. A request that fails, or
    is answered by something else than was asked for, is repeated; after all tries RuntimeError names the server, as neither
    an empty text nor a reward of 0 would be right for a server's failure."""

    url: str
    model: str
    key_env: str = ""
    timeout_s: float = 120.0
    retries: int = 4  # after the first try; waits 1, 2, 4, ... seconds between them
    temperature: float = 0.7
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; expected http:// or https://, such as http://localhost:8000/v1")
        if self.timeout_s <= 0 or self.retries < 0 or self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(
                f"timeout_s {self.timeout_s}, retries {self.retries}, temperature {self.temperature}, max_tokens "
                f"{self.max_tokens}; expected timeout_s > 0, max_tokens >= 1 and none negative"
            )

    def chat(self, content: str | list[dict[str, Any]], cache: Path | None = None) -> str:
        """The answer to one user message."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        raw = json.dumps(body, sort_keys=True).encode()
        kept = cache / f"{hashlib.sha256(self.url.encode() + raw).hexdigest()}.json" if cache else None
        if kept and kept.exists():
            return json.loads(kept.read_text())
        answer = self._ask(f"{self.url.rstrip('/')}/chat/completions", raw, _text)
        if kept:
            write_json(kept, answer)
        return answer

    def scalar(self, messages: Sequence[Mapping[str, Any]]) -> float:
        """A reward model's score of a conversation, by the pooling route that vLLM and SGLang serve."""
        raw = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        return self._ask(f"{self.url.rstrip('/').removesuffix('/v1')}/pooling", raw, _number)

    def _ask(self, url: str, raw: bytes, read: Callable[[Any], Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key_env:
            if self.key_env not in os.environ:
                raise RuntimeError(f"{self.url}: the environment variable {self.key_env} (key_env) is not set")
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(url, raw, headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return read(json.loads(response.read()))
            except urllib.error.HTTPError as e:
                why = f"{e.code} {e.read()[:200]!r}"
                if e.code not in (408, 429) and e.code < 500:  # asking again would not help
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
                why = repr(e)
            if attempt < self.retries:
                time.sleep(2.0**attempt)
        raise RuntimeError(f"{self.url} ({self.model}) gave no answer in {attempt + 1} tries; the last: {why}")


def _text(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError(f"content is {content!r}; expected text")
    return content


def _number(answer: Any) -> float:
    value = answer["data"][0]["data"]
    while isinstance(value, list):
        value = value[-1]
    return float(value)
