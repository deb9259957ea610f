"""Reward servers over HTTP: vLLM's documented shapes and a plain JSON scorer, good ones and bad ones."""

from __future__ import annotations

import itertools
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from codes.common.chat import Conversation
from codes.common.errors import ContrastRMError
from codes.common.llm import LlmClient
from codes.evaluate.api import RemoteScorer

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers ``answer(path, body)``; keeps the bodies, and how many were under way at one time."""

    def __init__(self) -> None:
        self.answer: Answer = lambda path, body: (404, {})
        self.models: Any = {"object": "list", "data": [{"id": "served", "object": "model"}]}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.location = ""
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                known = self.path.endswith("/v1/models") and owner.models is not None
                self.send(200 if known else 404, owner.models if known else {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.bodies.append(body)
                    owner.keys.add(self.headers.get("Authorization"))
                    owner.under_way += 1
                    owner.most_under_way = max(owner.most_under_way, owner.under_way)
                threading.Event().wait(0.01)
                with owner.lock:
                    owner.under_way -= 1
                self.send(*owner.answer(self.path, body))

            def send(self, status: int, value: Any) -> None:
                payload = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", owner.location)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        class Quick(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.http = Quick(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    some = Server()
    threading.Thread(target=some.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield some
    some.http.shutdown()
    some.http.server_close()


def conversations(n: int) -> list[Conversation]:
    return [Conversation([{"role": "user", "content": f"question {k}"}], "a" * (k + 1)) for k in range(n)]


def value_of(turns: list[dict[str, str]]) -> float:
    return len(turns[-1]["content"]) - 7.5


def classify(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """As vLLM answers a model with one label, raw or through a sigmoid."""
    score = value_of(body["messages"])
    if body.get("use_activation", True):
        score = 1 / (1 + math.exp(-score))
    entry = {"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}
    return 200, {"id": "classify-1", "object": "list", "created": 1, "model": "served", "data": [entry], "usage": {}}


def pooling(data: Callable[[float], Any]) -> Answer:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        entry = {"index": 0, "object": "pooling", "data": data(value_of(body["messages"]))}
        return 200, {"id": "pool-1", "object": "list", "created": 1, "model": "served", "data": [entry], "usage": {}}

    return answer


def scores(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"scores": [value_of(turns) for turns in body["messages"]]}


EXPECTED = [k + 1 - 7.5 for k in range(30)]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/classify", classify),
        ("/v1/classify", classify),
        ("/behind/a/proxy/classify/", classify),
        ("/pooling", pooling(lambda score: [score])),
        ("/pooling", pooling(lambda score: [[9.0], [8.0], [score]])),  # a score a token: the last one counts
        ("/score", scores),
    ],
)
def test_every_kind_of_server_gives_the_scores_in_order(path: str, answer: Answer, server: Server) -> None:
    server.answer = answer
    texts = conversations(30)
    result = RemoteScorer(server.url + path, batch_size=7).score([*texts, *texts[::-1]])
    assert result.scores.tolist() == EXPECTED + EXPECTED[::-1]
    assert (result.n_texts, result.n_distinct) == (60, 30)


def test_what_vllm_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_API_KEY", "a-key")
    server.answer = classify
    RemoteScorer(f"{server.url}/classify", concurrency=4).score(conversations(20))
    assert len(server.bodies) == 20 and 1 < server.most_under_way <= 4
    assert server.keys == {"Bearer a-key"}
    body = min(server.bodies, key=lambda body: len(body["messages"][-1]["content"]))
    assert body == {
        "model": "served",
        "messages": [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "a"}],
        "use_activation": False,
    }
    server.answer = pooling(lambda score: [score])
    RemoteScorer(f"{server.url}/pooling").score(conversations(1))
    assert server.bodies[-1]["task"] == "classify" and server.bodies[-1]["encoding_format"] == "float"


def test_the_model_is_the_servers_own_unless_it_has_several(server: Server) -> None:
    server.answer = classify
    url = f"{server.url}/classify"
    RemoteScorer(url, model="my name for it").score(conversations(1))
    assert server.bodies[-1]["model"] == "served"
    server.models = {"data": [{"id": "base"}, {"id": "adapter"}]}
    RemoteScorer(url, model="adapter").score(conversations(1))
    assert server.bodies[-1]["model"] == "adapter"
    with pytest.raises(ContrastRMError, match=r'lists \["base", "adapter"\]; give the name'):
        RemoteScorer(url, model="another").score(conversations(1))
    server.models = None  # a server without a list
    RemoteScorer(url).score(conversations(1))
    assert "model" not in server.bodies[-1]


def test_a_sigmoid_is_noticed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda path, body: classify(
        path, {"messages": body["messages"]}
    )  # a server that knows no use_activation
    RemoteScorer(f"{server.url}/classify").score(conversations(30))
    assert "seems to apply a sigmoid" in capsys.readouterr().err
    server.answer = classify
    RemoteScorer(f"{server.url}/classify").score(conversations(30))
    assert "sigmoid" not in capsys.readouterr().err


def entry(**fields: Any) -> dict[str, Any]:
    return {"data": [{"index": 0, **fields}]}


@pytest.mark.parametrize(
    ("path", "payload", "message"),
    [
        ("/classify", entry(probs=[0.1, 0.9]), "one finite number a text in 'probs'"),
        ("/classify", entry(probs=[]), "one finite number"),
        ("/classify", entry(probs=["high"]), "one finite number"),
        ("/classify", entry(probs=[True]), "one finite number"),
        ("/classify", b'{"data": [{"index": 0, "probs": [NaN]}]}', "one finite number"),
        ("/classify", b'{"data": [{"index": 0, "probs": [1e999]}]}', "one finite number"),
        ("/classify", entry(label="LABEL_0"), "one finite number"),
        ("/classify", {"data": []}, "one entry of data"),
        ("/classify", {"data": [{"probs": [1.0]}, {"probs": [2.0]}]}, "one entry of data"),
        ("/classify", {"data": [{"index": 3, "probs": [1.0]}]}, "one entry of data"),
        ("/classify", {"error": {"message": "no"}}, "one entry of data"),
        ("/classify", [1.0], "one entry of data"),
        ("/classify", b"<html>", "answered no JSON"),
        ("/classify", b"[" * 100_000, "answered no JSON"),
        ("/pooling", entry(data=[0.1] * 768), "is it a reward model with one label"),  # an embedding
        ("/pooling", entry(data="AAAA"), "one finite number a text in 'data'"),  # base64
        ("/pooling", entry(data=[[0.1, 0.2], [0.3, 0.4]]), "one finite number"),
        ("/score", {"scores": [1.0]}, "2 finite numbers"),
        ("/score", {"scores": [1.0, 2.0, 3.0]}, "2 finite numbers"),
        ("/score", b'{"scores": [1.0, NaN]}', "2 finite numbers"),
        ("/score", {"scores": [1.0, None]}, "2 finite numbers"),
        ("/score", {"scores": {"0": 1.0}}, "2 finite numbers"),
        ("/score", b'{"scores": [1.0, 1e39]}', "2 finite numbers"),  # infinite in float32
        ("/score", b'{"scores": [1.0, ' + b"7" * 400 + b"]}", "2 finite numbers"),
        ("/classify", b'{"data": [{"index": 0, "probs": [1e39]}]}', "one finite number"),
        ("/score", b"\xff\xfe\x00", "answered no JSON"),
    ],
)
def test_an_answer_of_another_shape_is_refused(path: str, payload: Any, message: str, server: Server) -> None:
    server.answer = lambda _, body: (200, payload)
    with pytest.raises(ContrastRMError, match=message) as caught:
        RemoteScorer(server.url + path).score(conversations(2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/classify", "/score"])
def test_a_busy_server_is_asked_again_and_a_refusal_is_not(path: str, server: Server) -> None:
    good = classify if path == "/classify" else scores
    faults = iter([(503, {}), (429, b"slow down"), (500, {}), (502, b"<html>")])
    server.answer = lambda p, body: next(faults, None) or good(p, body)
    assert RemoteScorer(server.url + path, concurrency=1).score(conversations(3)).scores.tolist() == EXPECTED[:3]
    n_before = len(server.bodies)
    server.answer = lambda p, body: (400, {"error": {"message": "No such\nadapter", "code": 400}})
    with pytest.raises(ContrastRMError, match=r"answered 400 .*No such adapter"):
        RemoteScorer(server.url + path, concurrency=1).score(conversations(50))
    assert len(server.bodies) < n_before + 50  # the rest is called off
    server.answer = lambda p, body: (500, {})
    with pytest.raises(ContrastRMError, match="answered 500"):
        RemoteScorer(server.url + path, max_attempts=2).score(conversations(1))


def test_nothing_to_score_asks_nothing(server: Server) -> None:
    for path in ("/classify", "/score"):
        assert RemoteScorer(server.url + path).score([]).scores.shape == (0,)
    assert server.bodies == []


@pytest.mark.parametrize("path", ["/classify", "/score"])
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, {"error": {"message": "This model's maximum context length is 9 tokens.\nPlease reduce", "code": 400}}),
        (422, {"detail": "Input validation error: `inputs` must have less than 512 tokens. Given: 600"}),
        (413, {}),
    ],
)
def test_a_text_that_is_too_long_for_the_server_has_no_score(path: str, status: int, said: Any, server: Server) -> None:
    good = classify if path == "/classify" else scores

    def answer(at: str, body: dict[str, Any]) -> tuple[int, Any]:
        turns = [body["messages"]] if path == "/classify" else body["messages"]
        return (status, said) if any(len(one[-1]["content"]) > 8 for one in turns) else good(at, body)

    server.answer = answer
    result = RemoteScorer(server.url + path, batch_size=4).score(conversations(10))
    assert result.scores[:8].tolist() == EXPECTED[:8] and all(math.isnan(score) for score in result.scores[8:])
    assert (result.n_texts, result.n_distinct, result.n_dropped) == (10, 8, 2)
    with pytest.raises(ContrastRMError, match="finds every text too long"):
        RemoteScorer(server.url + path).score(conversations(10)[8:])


@pytest.mark.parametrize("path", ["/classify", "/score"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_texts_and_key_are_not_sent_on_to_another_address(
    path: str, status: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_API_KEY", "a-key")
    other = Server()
    threading.Thread(target=other.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    other.answer = classify if path == "/classify" else scores
    server.location = f"{other.url.replace('http://', 'http://someone:secret@')}{path}?token=secret"
    server.answer = lambda at, body: (status, {})
    with pytest.raises(ContrastRMError, match="sends requests on to .*nothing was sent there") as caught:
        RemoteScorer(server.url + path).score(conversations(2))
    other.http.shutdown()
    other.http.server_close()
    assert other.bodies == [] and other.url in str(caught.value) and "secret" not in str(caught.value)


@contextmanager
def raw_server(answer: Callable[[socket.socket, int], None]) -> Iterator[str]:
    """Reads requests whole and lets ``answer`` write bytes for the n-th request of all; a thread a connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    counter = itertools.count()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while True:
                received = b""
                while b"\r\n\r\n" not in received:
                    part = connection.recv(65536)
                    if not part:
                        return
                    received += part
                head, _, body = received.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                assert length is not None
                while len(body) < int(length[1]):
                    body += connection.recv(65536)
                answer(connection, next(counter))

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def whole(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_response_that_nobody_asked_for_is_no_answer() -> None:
    """A 503 with one complete response behind it: read from the same connection, it would be the next text's score."""

    def answer(connection: socket.socket, n: int) -> None:
        if n == 0:
            connection.sendall(whole(503, b"{}") + whole(200, b'{"scores": [666.0]}'))
        else:
            connection.sendall(whole(200, json.dumps({"scores": [float(n)]}).encode()))

    with raw_server(answer) as url:
        assert RemoteScorer(f"{url}/score", batch_size=1).score(conversations(3)).scores.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips_ends_at_the_deadline(part: str) -> None:
    def answer(connection: socket.socket, n: int) -> None:
        text = whole(200, b'{"scores": [1.0, 2.0]}')
        if part == "body":
            head, _, text = text.partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)

    with raw_server(answer) as url, pytest.raises(ContrastRMError, match=r"no whole answer within 0\.5 s"):
        RemoteScorer(f"{url}/score", timeout_seconds=0.5, max_attempts=1).score(conversations(2))


@pytest.mark.parametrize(
    "url", ["http://user:secret@127.0.0.1:1/score", "https://host/score?token=secret", "host/score", "http://[/score"]
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    for make in (lambda: RemoteScorer(url), lambda: LlmClient(api_key="key", base_url=url)):
        with pytest.raises(ContrastRMError, match=r"_API_KEY|must look like") as caught:
            make()
        assert "secret" not in str(caught.value) and "host/score" not in str(caught.value)


def test_proxies(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on this machine is asked directly; elsewhere an unspoken proxy is an error with its cure, a dead one is named."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    server.answer = scores
    assert RemoteScorer(f"{server.url}/score").score(conversations(2)).scores.tolist() == EXPECTED[:2]
    for make in (
        lambda: RemoteScorer("http://reward.example/score"),
        lambda: LlmClient(api_key="key", base_url="http://api.example/v1"),
    ):
        with pytest.raises(ContrastRMError, match="proxy for .*example is neither http nor https: set HTTP_PROXY"):
            make()
    monkeypatch.setenv("HTTP_PROXY", f"http://someone:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ContrastRMError, match=r"through the proxy http://127\.0\.0\.1:.*NO_PROXY") as caught:
        RemoteScorer("http://reward.example/score", max_attempts=1).score(conversations(1))
    assert "secret" not in str(caught.value)


def free_port() -> int:
    """A port where nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
