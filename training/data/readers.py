"""Readers of text, HTML, PDF and of seeds for synthetic text; JSONL and Parquet are datatrove's own.

As in the Qwen3 report (section 3.1): one model recognises the text of PDF pages, another refines it; general, math and
code models write textbooks, questions with answers, instructions and code.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..endpoint import Endpoint
from .blocks import BaseDiskReader, DocumentsPipeline, JsonlReader, ParquetReader

GLOBS = {
    "jsonl": "**/*.jsonl*", "parquet": "**/*.parquet", "text": "**/*.txt", "html": "**/*.html", "pdf": "**/*.pdf",
    "synthetic": "**/*.jsonl*",
}
FORMATS = tuple(GLOBS)

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


class WholeFileReader(BaseDiskReader):
    """One document per file; ``extract`` turns its bytes into text."""

    name = "file"

    def extract(self, raw: bytes) -> str:
        return raw.decode("utf-8", errors="replace")

    def read_file(self, filepath: str) -> DocumentsPipeline:
        with self.data_folder.open(filepath, "rb") as f:
            raw = f.read()
        document = self.get_document_from_dict({"text": self.extract(raw), "id": filepath}, filepath, 0)
        if document is not None:
            yield document
        else:
            self.stat_update("without_text")


class HtmlReader(WholeFileReader):
    """Main content by resiliparse: without navigation, heads and feet."""

    name = "html"

    def extract(self, raw: bytes) -> str:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

        return extract_plain_text(
            bytes_to_str(raw, detect_encoding(raw)), main_content=True, alt_texts=False, preserve_formatting=True
        )


class PdfReader(WholeFileReader):
    """Text layer by pypdf. With ``pages`` (a vision model), pages whose text layer has fewer than ``min_chars``
    characters are drawn and read by it, and with ``refine`` mended by a language model."""

    name = "pdf"

    def __init__(self, *args: Any, pages: Endpoint | None, refine: Endpoint | None, cache: Path, min_chars: int = 50, **kw):
        super().__init__(*args, **kw)
        self.pages, self.refine, self.cache, self.min_chars = pages, refine, cache, min_chars

    def extract(self, raw: bytes) -> str:
        import pypdf
        from pypdf.errors import PyPdfError

        try:
            texts = [page.extract_text().strip() for page in pypdf.PdfReader(io.BytesIO(raw)).pages]
        except (PyPdfError, ValueError, KeyError) as e:  # a damaged file must not stop the others
            self.stat_update(f"unreadable_{type(e).__name__}")
            return ""
        if self.pages is not None:
            for number, text in enumerate(texts):
                if len(text) < self.min_chars:
                    text = read_page(self.pages, draw(raw, number), self.cache)
                    texts[number] = self.refine.chat(REFINE + text, self.cache) if self.refine else text
                    self.stat_update("pages_read_by_model")
        return "\n\n".join(texts)


def draw(pdf: bytes, page: int, dpi: int = 150) -> bytes:
    """One page as PNG."""
    import pypdfium2

    document = pypdfium2.PdfDocument(pdf)
    try:
        buffer = io.BytesIO()
        document[page].render(scale=dpi / 72).to_pil().save(buffer, "PNG")
        return buffer.getvalue()
    finally:
        document.close()


def read_page(model: Endpoint, png: bytes, cache: Path) -> str:
    """The text of a page's image."""
    picture = "data:image/png;base64," + base64.b64encode(png).decode()
    return model.chat([{"type": "text", "text": TRANSCRIBE}, {"type": "image_url", "image_url": {"url": picture}}], cache)


class SyntheticReader(BaseDiskReader):
    """Documents written by a model, one per seed and kind. A line of the input is {"text": subject or passage}."""

    name = "synthetic"

    def __init__(self, *args: Any, writer: Endpoint, kinds: tuple[str, ...], cache: Path, **kw: Any):
        super().__init__(*args, **kw)
        if unknown := [k for k in kinds if k not in WRITE] or not kinds:
            raise ValueError(f"kinds is {kinds}; expected some of {tuple(WRITE)}, not {unknown}")
        self.writer, self.kinds, self.cache = writer, kinds, cache

    def read_file(self, filepath: str) -> Iterator[Any]:
        with self.data_folder.open(filepath, "rt") as f:
            for number, line in enumerate(f):
                seed = json.loads(line)
                for kind in self.kinds:
                    text = self.writer.chat(WRITE[kind] + seed["text"], self.cache)
                    record = {"text": text, "id": f"{filepath}/{number}/{kind}", "metadata": {"synthetic": kind}}
                    if (document := self.get_document_from_dict(record, filepath, number)) is not None:
                        yield document


def reader(source: Any, cache: Path) -> Any:
    """The reader of a ``build.Source``."""
    options = {
        "glob_pattern": source.glob or GLOBS[source.format], "text_key": source.text_key,
        "default_metadata": {"source": source.name, "kind": source.kind, "labels": dict(source.labels)},
    }
    folder = str(source.path)
    match source.format:
        case "jsonl":
            return JsonlReader(folder, compression="infer", **options)
        case "parquet":
            return ParquetReader(folder, **options)
        case "text":
            return WholeFileReader(folder, **options)
        case "html":
            return HtmlReader(folder, **options)
        case "pdf":
            return PdfReader(folder, pages=source.endpoint, refine=source.refine, cache=cache, **options)
        case "synthetic":
            return SyntheticReader(folder, writer=source.endpoint, kinds=source.kinds, cache=cache, **options)
    raise ValueError(f"format is {source.format!r}; expected one of {FORMATS}")
