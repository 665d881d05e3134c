"""Text from any OpenAI-compatible server: pages read by a vision model, text refined or written by a language model.

As in the Qwen3 report (section 3.1): one model recognises the text of PDF pages, another refines it; general, math and
code models write textbooks, questions with answers, instructions and code. Answers are kept on disk by the hash of the
request, so a build that was killed asks for nothing twice and ends in the same text.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json

TRANSCRIBE = (
    "Write down all text of this page in reading order as Markdown, formulas in LaTeX. Leave out page numbers and running "
    "heads. Answer with the text only."
)
REFINE = (
    "The text below was read from a scanned page. Mend broken words, hyphenation and line breaks; change nothing else. "
    "Answer with the text only.\n\n"
)
WRITE = {
    "textbook": "Write a section of a textbook for students about the subject below: definitions, an explanation, one "
                "worked example.\n\n",
    "qa": "Write five questions of rising difficulty about the text below, each with a complete answer.\n\n",
    "instruction": "Write an instruction that a person might give about the subject below, then a careful answer to it.\n\n",
    "code": "Write a short, complete program about the subject below, with comments and a test.\n\n",
}


@dataclass(frozen=True)
class Endpoint:
    """A server of ``POST {url}/chat/completions``. ``key_env`` names the environment variable that holds the key."""

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
        """The answer to one user message. Raises RuntimeError naming the server when it gives none after all tries."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        raw = json.dumps(body, sort_keys=True).encode()
        kept = cache / f"{hashlib.sha256(self.url.encode() + raw).hexdigest()}.json" if cache else None
        if kept and kept.exists():
            return json.loads(kept.read_text())
        answer = self._ask(raw)
        if kept:
            write_json(kept, answer)
        return answer

    def read_page(self, png: bytes, cache: Path | None = None) -> str:
        """The text of a page's image."""
        picture = "data:image/png;base64," + base64.b64encode(png).decode()
        return self.chat(
            [{"type": "text", "text": TRANSCRIBE}, {"type": "image_url", "image_url": {"url": picture}}], cache
        )

    def _ask(self, raw: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key_env:
            if self.key_env not in os.environ:
                raise RuntimeError(f"{self.url}: the environment variable {self.key_env} (key_env) is not set")
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", raw, headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    content = json.loads(response.read())["choices"][0]["message"]["content"]
                if not isinstance(content, str):
                    raise TypeError(f"content is {content!r}; expected text")
                return content
            except urllib.error.HTTPError as e:
                why = f"{e.code} {e.read()[:200]!r}"
                if e.code not in (408, 429) and e.code < 500:  # asking again would not help
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
                why = repr(e)
            if attempt < self.retries:
                time.sleep(2.0**attempt)
        raise RuntimeError(f"{self.url} ({self.model}) gave no answer in {attempt + 1} tries; the last: {why}")
