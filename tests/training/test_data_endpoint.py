import base64
import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("datatrove")

from test_data_build import WORDS, pdf, prose, texts

from qwen3_model.tokenizer import train_bpe
from training import endpoint as endpoint_module
from training import strict
from training.data import build as builder
from training.data.blocks import Document
from training.data.build import Build
from training.data.labels import Judge, Label
from training.endpoint import Endpoint
from training.files import write_jsonl


class Stub:
    """A server of chat completions on this machine: ``answer(body)`` gives the text, or a number: an HTTP error, or
    ``...``: a reply that is cut short."""

    def __init__(self):
        self.bodies, self.headers, self.answer = [], [], lambda body: "text"
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append((self.path, body))
                stub.headers.append(dict(self.headers))
                answer = stub.answer(body)
                self.send_response(answer if isinstance(answer, int) else 200)
                if answer is ...:
                    answer = b'{"choices'
                    self.send_header("Content-Length", "100")
                self.end_headers()
                if not isinstance(answer, int):
                    raw = answer if isinstance(answer, bytes) else json.dumps(
                        {"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
                    self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(endpoint_module.time, "sleep", lambda s: None)
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def content(body):
    return body["messages"][0]["content"]


def test_asks_as_openai_does_and_keeps_answers(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "abc")
    model = Endpoint(stub.url, "m", key_env="THE_KEY", temperature=0.3, max_tokens=7)
    assert model.chat("Hello", tmp_path) == "text"
    path, body = stub.bodies[0]
    assert path == "/v1/chat/completions" and stub.headers[0]["Authorization"] == "Bearer abc"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.3, "max_tokens": 7}
    stub.answer = lambda body: "another"
    assert model.chat("Hello", tmp_path) == "text" and len(stub.bodies) == 1, "kept, so a second build gives the same"
    assert model.chat("Hello!", tmp_path) == "another" and model.chat("Hello") == "another"


def test_tries_again_and_gives_up_with_a_reason(stub, tmp_path):
    answers = iter([503, b"not json", b'{"choices": []}', ..., "at last"])
    stub.answer = lambda body: next(answers)
    assert Endpoint(stub.url, "m").chat("x") == "at last"
    answers = iter([429, None, "at last"])
    assert Endpoint(stub.url, "m").chat("x", tmp_path) == "at last", "null is no answer"
    stub.answer = lambda body: None
    with pytest.raises(RuntimeError, match="the last: .*content is None"):
        Endpoint(stub.url, "m").chat("y", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "and is not kept"
    stub.answer = lambda body: 500
    with pytest.raises(RuntimeError, match=rf"{stub.url} \(m\) gave no answer in 3 tries; the last: 500"):
        Endpoint(stub.url, "m", retries=2).chat("x")
    before = len(stub.bodies)
    stub.answer = lambda body: 401
    with pytest.raises(RuntimeError, match="in 1 tries; the last: 401"):
        Endpoint(stub.url, "m").chat("x")
    assert len(stub.bodies) == before + 1, "a refusal is final"
    with pytest.raises(RuntimeError, match="NO_SUCH_KEY"):
        Endpoint(stub.url, "m", key_env="NO_SUCH_KEY").chat("x")
    with pytest.raises(RuntimeError, match="gave no answer in 1 tries"):
        Endpoint("http://127.0.0.1:9", "m", retries=0).chat("x")


@pytest.fixture
def base(tmp_path):
    train_bpe([prose(0)], 300, tmp_path / "tokenizer.json")
    return {"out": str(tmp_path / "out"), "tokenizer": str(tmp_path / "tokenizer.json"), "tasks": 1, "workers": 1,
            "min_words": 20, "scorer": "none"}


def test_pages_without_text_are_read_by_a_vision_model(stub, tmp_path, base):
    (tmp_path / "pdf").mkdir()
    pdf(tmp_path / "pdf" / "a.pdf", [prose(1), "x"])

    def answer(body):
        if isinstance(content(body), str):
            assert "raw" in content(body)
            return prose(2)
        picture = content(body)[1]["image_url"]["url"]
        assert base64.b64decode(picture.split(",")[1]).startswith(b"\x89PNG")
        return "raw " + prose(2)

    stub.answer = answer
    model = {"url": stub.url, "model": "vl"}
    source = {"name": "p", "path": str(tmp_path / "pdf"), "format": "pdf", "endpoint": model, "refine": model | {"model": "lm"}}
    builder.run(strict.build(Build, base | {"sources": [source]}), quiet=True)
    (document,) = [t for docs in texts(tmp_path / "out", tmp_path / "tokenizer.json").values() for t in docs]
    flat = " ".join(document.split())
    assert prose(1)[:60] in flat and flat.endswith(prose(2)) and "raw" not in flat
    assert [b["model"] for _, b in stub.bodies] == ["vl", "lm"], "the page with text was not sent"
    assert json.loads((tmp_path / "out" / "card.json").read_text())["models"]["pages_read_by_model"] == 1


def test_synthetic_text_and_judged_labels(stub, tmp_path, base):
    write_jsonl(tmp_path / "seeds" / "s.jsonl", [{"text": w} for w in WORDS[8:11]])

    def answer(body):
        prompt = content(body)
        if prompt.startswith("Judge"):
            safety = "unsafe" if f"about {WORDS[8]}" in prompt else "safe"
            return 'Here: {"educational_value": 5, "field": "Earth Science", "domain": "textbook", "safety": "%s"}' % safety
        return f"{prose(zlib.crc32(prompt.encode()))} about {prompt.split()[-1]} " + ("code" if "program" in prompt else "text")

    stub.answer = answer
    model = {"url": stub.url, "model": "m"}
    source = {"name": "s", "path": str(tmp_path / "seeds"), "format": "synthetic", "endpoint": model, "kinds": ["textbook", "code"]}
    config = strict.build(Build, base | {"sources": [source], "scorer": "endpoint", "judge": model})
    builder.run(config, quiet=True)
    found = texts(tmp_path / "out", tmp_path / "tokenizer.json")
    assert set(found) == {"earth_science.textbook.en.5"}
    assert sorted(d.split()[-1] for docs in found.values() for d in docs) == ["code"] * 2 + ["text"] * 2, "two of six are unsafe"
    asked = len(stub.bodies)
    again = strict.build(Build, base | {"out": str(tmp_path / "again"), "sources": [source], "scorer": "endpoint", "judge": model})
    (tmp_path / "again" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "endpoint").rename(tmp_path / "again" / "work" / "endpoint")
    builder.run(again, quiet=True)
    assert len(stub.bodies) == asked, "answers that are on disk are not asked for again"


@pytest.mark.parametrize("text", ["no json", '{"educational_value": 9}', '{"field": "a/b"}', "{broken"])
def test_answers_that_are_no_labels_count_as_unknown(stub, tmp_path, text):
    stub.answer = lambda body: text
    assert Judge(Endpoint(stub.url, "m"), tmp_path).score(["document"]) == [{}]


def test_a_malformed_label_leaves_the_others(stub, tmp_path):
    stub.answer = lambda body: '{"educational_value": 9, "field": "Law & Order", "domain": "news", "safety": "unsafe"}'
    judge = Judge(Endpoint(stub.url, "m"), tmp_path)
    assert judge.score(["document"]) == [{"domain": "news", "safety": "unsafe"}]
    assert Label(judge).filter(Document("document", "1", metadata={})) == (False, "unsafe")
