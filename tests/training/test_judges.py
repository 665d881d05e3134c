"""Rewards by a model, against a local server and a local model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_chat import model, small, tokenizer, vocabulary  # noqa: F401

from qwen3_model.model import Qwen3
from training import endpoint as endpoint_module
from training.endpoint import Endpoint
from training.rewards import Reply
from training.rewards.judges import LocalModel, RewardModel, WithReference, grade


class Server:
    """Answers POSTs with what `answer(path, body)` returns: (status, JSON)."""

    def __init__(self, answer):
        seen = self.seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, body, self.headers.get("Authorization")))
                status, content = answer(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint_module.time, "sleep", lambda s: None)
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def reply(text):
    return Reply((), text, None)


def test_with_reference(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def answer(path, body):
        prompt = body["messages"][0]["content"]
        return says("Grade: 9" if "Response:\nParis" in prompt and "Reference:\nParis" in prompt else "They differ. Grade: 1")

    server = serve(answer)
    family = WithReference([("Capital of France?", "Paris")], Endpoint(server.url, "judge", key_env="JUDGE_KEY", temperature=0).chat)
    problem = family.problem(0, 0)
    assert family.scores([(problem, reply("Paris")), (problem, reply("Rome"))]) == [0.9, 0.1]
    path, body, authorization = server.seen[0]
    assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("judge", 0) and authorization == "Bearer secret"


def test_reward_model(serve):
    def answer(path, body):
        good = body["messages"][-1]["content"] == "kind"
        return 200, {"data": [{"data": [2.0 if good else -2.0]}]}

    server = serve(answer)
    family = RewardModel(["Hello?"], Endpoint(server.url, "rm").scalar, workers=1)
    problem = family.problem(3, 0)
    high, low = family.scores([(problem, reply("kind")), (problem, reply("rude"))])
    assert high == pytest.approx(0.8808, abs=1e-3) and low == pytest.approx(1 - high)
    path, body, _ = server.seen[0]
    assert path == "/pooling" and [m["role"] for m in body["messages"]] == ["user", "assistant"]


def test_a_failing_server_is_asked_again_and_then_it_is_an_error(serve):
    calls = [0]

    def answer(path, body):
        calls[0] += 1
        return (503, {}) if calls[0] < 3 else says("Grade: 5")

    endpoint = Endpoint(serve(answer).url, "judge", retries=3)
    assert endpoint.chat("x") == "Grade: 5" and calls[0] == 3
    calls[0] = -100
    with pytest.raises(RuntimeError, match="no answer in 4 tries; the last: 503"):
        endpoint.chat("x")
    with pytest.raises(RuntimeError, match="no answer in 1 tries; the last: 401"):
        Endpoint(serve(lambda path, body: (401, {"error": "key"})).url, "judge").chat("x")
    with pytest.raises(RuntimeError, match="no answer in 3 tries; the last: .*'data'"):
        Endpoint(serve(lambda path, body: (200, {"choices": []})).url, "rm", retries=2).scalar([])


@pytest.mark.parametrize("text, value", [
    ("Grade: 7", 0.7), ("grade is **10**", 1.0), ("Grade: **10**", 1.0), ("Grade: 3 ... Grade: 8.5", 0.85), ("Grade: 400", 1.0),
    ("**Grade**: **7**", 0.7), ("Final grade is 9", 0.9), ("__Grade__ is: `0`", 0.0), ("fine", None), ("", None),
    ("Grade: <number>", None),
])
def test_grades(text, value):
    assert grade(text) == (None if value is None else pytest.approx(value))


def test_a_judge_without_a_grade_is_asked_once_more_and_then_it_is_an_error():
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return "Grade: 6" if "End your reply" in prompt and "Rome" in prompt else "They differ."

    family = WithReference([("Capital of France?", "Paris")], ask, workers=1)
    problem = family.problem(0, 0)
    assert family.scores([(problem, reply("Rome"))]) == [0.6] and len(asked) == 2
    with pytest.raises(RuntimeError, match="no grade in two replies; the last ends with 'They differ.'"):
        family.scores([(problem, reply("Berlin"))])
    assert len(asked) == 4


def test_a_local_model_is_asked_the_same_way(model, tokenizer):
    ask = LocalModel(model, tokenizer, max_tokens=5)
    assert ask("3+5") == ask("3+5") and isinstance(ask("3+5"), str)
    family = WithReference([("q", "a")], lambda prompt: f"{ask(prompt)} Grade: 4", workers=1)
    assert family.scores([(family.problem(0, 0), reply("a"))]) == [0.4]
    with pytest.raises(ValueError, match="items is empty"):
        WithReference([], ask)


def test_a_local_reward_model(tokenizer):
    """Yes and no change places in the head, so the reward turns round; the reply is part of what is asked."""
    judge = Qwen3(small(tie_word_embeddings=False, max_position_embeddings=512)).init_weights(0)
    family = RewardModel(["Hello?"], LocalModel(judge, tokenizer).scalar, workers=1)
    problem = family.problem(0, 0)
    first, other = family.scores([(problem, reply("kind")), (problem, reply("rude"))])
    yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
    with torch.no_grad():
        judge.lm_head.weight[[yes, no]] = judge.lm_head.weight[[no, yes]]
    assert 0 < first < 1 and first != other and abs(first - 0.5) > 1e-3
    assert family.scores([(problem, reply("kind"))])[0] == pytest.approx(1 - first, abs=1e-6)
    judge.head = lambda hidden: torch.eye(len(judge.head_weight))[yes]
    assert LocalModel(judge, tokenizer).scalar([*problem.messages, {"role": "assistant", "content": "kind"}]) == 1.0
