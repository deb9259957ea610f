"""A real HTTP server on localhost that speaks /v1/chat/completions and misbehaves on purpose.

``ChatServer(reply)`` asks ``reply(body, attempt)`` for every request: ``body`` is the request's JSON,
``attempt`` counts the equal bodies seen so far, from 1. The functions below build the replies, good and bad.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What goes over the wire.

    Attributes:
        sent: Share of the body after which the connection closes; 0: a reset.
        seconds: Before the first byte.
        length: The content-length, where it is not the body's.
        byte_seconds: Before each byte of the body.
        extra: Bytes that nobody asked for, behind the body; the connection stays open.
        extra_after: Waits for it before ``extra`` is sent.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: float = 1.0
    seconds: float = 0.0
    length: int | None = None
    byte_seconds: float = 0.0
    extra: bytes = b""
    extra_after: threading.Event | None = None


_WORDS = tuple(
    word
    for line in (
        "river stone window morning garden letter market bridge winter harbour lantern meadow copper village",
        "forest island kettle ladder mirror needle orchard pepper quarry ribbon saddle timber valley wagon yellow",
        "always often seldom perhaps nearby beyond under across between around carries holds follows leaves brings",
        "keeps turns opens closes reaches crosses covers builds mends finds loses counts weighs paints draws writes",
        "bright narrow heavy gentle quiet distant early plain broad simple proper steady honest modest slow warm",
        "the a every some this that each another our their with from into over before after because while and but",
    )
    for word in line.split()
)


def english(seed: str, n_words: int) -> str:
    """Sentences without much meaning that follow from the seed alone."""
    draw = random.Random(seed)
    words = [draw.choice(_WORDS) for _ in range(n_words)]
    starts = range(0, n_words, 11)
    return " ".join(" ".join(words[start : start + 11]).capitalize() + "." for start in starts)


ReplyFunction = Callable[[dict[str, Any], int], Reply]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def message(content: str | None, finish_reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """The JSON of a completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "test",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content} | more,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def answer(text: str | None, finish_reason: str | None = "stop", *, seconds: float = 0.0, **more: Any) -> Reply:
    """A completion; ``None``, an empty text and odd finish reasons are the caller's choice."""
    return Reply(_json(message(text, finish_reason, **more)), seconds=seconds)


def error(status: int, text: str = "no", *, code: str | None = None, **headers: str) -> Reply:
    """An HTTP error in OpenAI's shape; ``retry_after="1"`` becomes the header ``retry-after``."""
    body = {"error": {"message": text, "type": code, "param": None, "code": code}}
    return Reply(_json(body), status, {name.replace("_", "-"): value for name, value in headers.items()})


def error_in_200(code: Any = 502, text: str = "upstream failed") -> Reply:
    """HTTP 200 with an error body, as gateways send it."""
    return Reply(_json({"error": {"message": text, "code": code}}))


def invalid_json() -> Reply:
    """HTTP 200 with a body that is not JSON."""
    return Reply(b'{"id": "chatcmpl-1", "choices": [{"index": 0, "mess')


def half_body() -> Reply:
    """The connection closes in the middle of a good body."""
    return Reply(_json(message("half of this is lost")), sent=0.5)


def reset() -> Reply:
    """The connection is reset before a byte is sent."""
    return Reply(b"", sent=0.0)


def hang() -> Reply:
    """No answer within any time-out of a test."""
    return Reply(b"", seconds=600.0)


def whole_response(text: str) -> bytes:
    """The bytes of a complete HTTP response with an answer, for ``Reply.extra``."""
    body = _json(message(text))
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def redirect(location: str, status: int = 307) -> Reply:
    """Away to another address."""
    return Reply(b"", status, {"location": location})


# What goes wrong with real servers -> the reply, and the reason that a request must end with where it never
# goes right. Every text says LEAK: it must not be found in an output.
FAULTS: dict[str, tuple[Callable[[], Reply], str]] = {
    "429": (lambda: error(429, "LEAK slow down", code="rate_limit_exceeded", retry_after_ms="40"), "rate_limit"),
    "500": (lambda: error(500, "LEAK internal error"), "http_500"),
    "503": (lambda: Reply(b"<html>LEAK busy</html>", 503, {"content-type": "text/html"}), "http_503"),
    "hang": (hang, "timeout"),
    "reset": (reset, "broken_connection"),
    "half body": (lambda: Reply(_json(message("LEAK half of this is lost")), sent=0.5), "broken_connection"),
    "invalid json": (lambda: Reply(b'{"id": "LEAK", "choices": [{"index": 0, "mess'), "invalid_body"),
    "error in 200": (lambda: error_in_200(502, "LEAK upstream failed"), "http_502"),
    "null content": (lambda: answer(None), "empty_answer"),
    "empty content": (lambda: answer(" \n"), "empty_answer"),
    "content filter": (lambda: answer("LEAK half a sentence", "content_filter"), "content_filter"),
    "length": (lambda: answer("LEAK cut off at the lim", "length"), "cut_off"),
    "abort": (lambda: answer("LEAK half an answer", "abort"), "unfinished"),
    "safety": (lambda: answer("LEAK half a sentence", "safety"), "content_filter"),
    "error in a choice": (lambda: Reply(_json(_choice_with_error())), "http_502"),
    "extra response": (lambda: Reply(b"busy", 503, extra=whole_response("LEAK of another prompt")), "http_503"),
    "length too large": (lambda: Reply(_json(message("LEAK waits")), length=9999), "timeout"),
    "charset": (lambda: _in_charset("utf-16"), "invalid_body"),
    "unknown charset": (lambda: _in_charset("klingon"), "invalid_body"),
    "odd code": (lambda: error_in_200("\u00b2", "LEAK"), "error_body"),
    "huge code": (lambda: error_in_200(10**400, "LEAK"), "error_body"),
    "wrong shape": (lambda: Reply(_json(message({"LEAK": 1e39}))), "wrong_shape"),  # type: ignore[arg-type]
    "drip": (lambda: Reply(_json(message("LEAK drop by drop")), byte_seconds=0.2), "timeout"),
}


def _in_charset(name: str) -> Reply:
    return Reply(b"\xfe\x81LEAK\xff", 200, {"content-type": f"application/json; charset={name}"})


def _choice_with_error() -> dict[str, Any]:
    body = message("LEAK half an answer", "error")
    body["choices"][0]["error"] = {"code": 502, "message": "upstream died"}
    return body


def choose_fault(body: dict[str, Any], attempt: int, *, share: float, cursed_share: float = 0.0) -> str | None:
    """A fault for this attempt or none, by the body's hash: ``cursed_share`` of the bodies get the same one always."""
    draw = random.Random(json.dumps(body, sort_keys=True))
    if draw.random() < cursed_share:
        return draw.choice(list(FAULTS))
    draw = random.Random(f"{attempt}{json.dumps(body, sort_keys=True)}")
    return draw.choice(list(FAULTS)) if draw.random() < share else None


class ChatServer:
    """The server, for a ``with`` block.

    Attributes:
        requests: JSON bodies in the order of arrival.
        arrivals: Seconds (monotonic) of each arrival.
        extra_is_sent: Set once a ``Reply.extra`` that waited is on its way.
        max_in_flight: The largest number of requests at one time.
        authorizations: The Authorization headers seen.
    """

    def __init__(self, reply: ReplyFunction, *, port: int = 0) -> None:
        """Take the port; 0: a free one. A second server on the port of an ended one is the same server to a ledger."""
        self._reply = reply
        self._lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._in_flight = 0
        self._closing = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.authorizations: set[str] = set()
        self.max_in_flight = 0
        self.extra_is_sent = threading.Event()
        self._server = _Server(("127.0.0.1", port), self._handler_class())
        self.port = self._server.server_port
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _arrive(self, body: dict[str, Any], authorization: str) -> int:
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            self.requests.append(body)
            self.arrivals.append(time.monotonic())
            self.authorizations.add(authorization)
            self._attempts[key] += 1
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
            return self._attempts[key]

    def _leave(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # 40 ms an answer otherwise

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if owner._closing.is_set():  # an ended server answers on no connection that is still open
                    self.close_connection = True
                    return
                attempt = owner._arrive(body, self.headers.get("authorization", ""))
                try:
                    reply = (
                        owner._reply(body, attempt) if self.path == "/v1/chat/completions" else error(404, "no path")
                    )
                    owner._closing.wait(reply.seconds)
                finally:
                    owner._leave()  # before the bytes: they may bring the next request at once
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                if reply.sent == 0:
                    # Linger 0 turns the close into a reset.
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(reply.body) if reply.length is None else reply.length))
                self.end_headers()
                if reply.byte_seconds:
                    for number in range(len(reply.body)):
                        owner._closing.wait(reply.byte_seconds)
                        self.wfile.write(reply.body[number : number + 1])
                    return
                body = reply.body[: int(len(reply.body) * reply.sent)]
                if reply.extra_after is None:
                    self.wfile.write(body + reply.extra)
                else:
                    self.wfile.write(body)
                    reply.extra_after.wait(60)
                    self.wfile.write(reply.extra)
                    owner.extra_is_sent.set()
                if reply.sent < 1:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # the default of 5 drops connections that come at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reset connection and a killed client are what these tests are about: no traceback for them."""
