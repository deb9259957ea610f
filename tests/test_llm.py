"""The client against a real server that misbehaves: every fault ends as a typed error, never as text."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import (
    ChatServer,
    Reply,
    answer,
    error,
    error_in_200,
    half_body,
    invalid_json,
    message,
    redirect,
    reset,
    whole_response,
)

from codes.common.errors import ContrastRMError
from codes.common.llm import (
    READ_AHEAD,
    ApiError,
    Budget,
    Completion,
    CompletionRequest,
    Engine,
    FatalApiError,
    Ledger,
    LlmClient,
    Outcome,
    RetriableError,
    RowError,
    parse_body,
    request_key,
)

KEY = "sk-test-0123456789abcdef0123456789"


def key_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_request(text: str = "hello", **more: object) -> CompletionRequest:
    fields = {
        "messages": ({"role": "user", "content": text},),
        "model": "m",
        "max_tokens": 50,
        "prompt_version": "1",
    }
    return CompletionRequest(**(fields | more))  # type: ignore[arg-type]


def make_client(server: ChatServer, **more: object) -> LlmClient:
    settings = {
        "api_key": KEY,
        "base_url": server.base_url,
        "first_wait_seconds": 0.01,
        "request_timeout": 5.0,
    }
    return LlmClient(**(settings | more))  # type: ignore[arg-type]


def ask(
    server: ChatServer,
    tmp_path: Path,
    requests: list[CompletionRequest],
    concurrency: int = 4,
    **more: object,
) -> list[Outcome]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        return list(Engine(make_client(server, **more), ledger, concurrency=concurrency).stream(requests))


PASSING_FAULTS: dict[str, Callable[[], Reply]] = {
    "429": lambda: error(429, "slow down", code="rate_limit_exceeded"),
    "408": lambda: error(408),
    "409": lambda: error(409),
    "425": lambda: error(425),
    "500": lambda: error(500),
    "502": lambda: error(502),
    "504": lambda: error(504),
    "503": lambda: Reply(b"<html>busy</html>", 503, {"content-type": "text/html"}),
    "reset": reset,
    "half body": half_body,
    "invalid json": invalid_json,
    "not an object": lambda: Reply(b"[1, 2]"),
    "html with 200": lambda: Reply(b"<html>hello</html>", 200, {"content-type": "text/html"}),
    "no choices": lambda: Reply(b'{"choices": []}'),
    "error in 200": error_in_200,
    "null content": lambda: answer(None),
    "empty content": lambda: answer("  \n"),
    "no finish reason": lambda: answer("half", None),
    "error": lambda: answer("half", "error"),
    "abort": lambda: answer("half", "abort"),
    "error in a choice": lambda: Reply(
        b'{"choices": [{"message": {"content": "half"}, "finish_reason": "stop", "error": {"code": 503, "message": "no"}}]}'
    ),
    # JSON is UTF-8; what cannot be read as such is no answer, whatever charset is declared.
    "utf-16 without byte order mark": lambda: Reply(
        b"\x00\xd8half", 200, {"content-type": "application/json; charset=utf-16"}
    ),
    "unknown charset": lambda: Reply(b"\xffhalf", 200, {"content-type": "application/json; charset=klingon"}),
    "code that is a digit and no number": lambda: error_in_200("\u00b2"),
    "code of 400 digits": lambda: error_in_200(10**400),
    "error body in no charset": lambda: Reply(b"\xff\xfe", 500, {"content-type": "text/plain; charset=utf-16"}),
    "number of 5,000 digits": lambda: Reply(b'{"choices": ' + b"9" * 5000 + b"}"),
    "too short a length": lambda: Reply(json.dumps(message("half")).encode(), length=40),
}
# Each of these attempts has been paid for.
PAID = {"null content", "empty content", "no finish reason", "error", "abort"}


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_passing_fault_is_overcome(fault: str, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("fine") if attempt == 3 else PASSING_FAULTS[fault]()) as server:
        outcomes = ask(server, tmp_path, [make_request()])
    assert outcomes == [Completion("fine", "stop", 7, 3)]
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_fault_that_stays_becomes_an_error_object(fault: str, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: PASSING_FAULTS[fault]()) as server:
        outcomes = ask(server, tmp_path, [make_request()], max_attempts=4)
    assert isinstance(outcomes[0], ApiError)
    is_empty = fault in ("null content", "empty content")
    assert isinstance(outcomes[0], RowError if is_empty else RetriableError)
    assert len(server.requests) == (3 if fault in PAID else 4)
    recorded = (tmp_path / "ledger.jsonl").read_text()
    assert ('"failed": "empty_answer", "attempts": 3' in recorded) if is_empty else recorded == ""
    assert outcomes[0].attempts == len(server.requests)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (error(400, "bad parameter"), "http_400"),
        (error(422, "bad field"), "http_422"),
        (error(400, "blocked", code="content_filter"), "content_filter"),
        (answer(None, "content_filter"), "content_filter"),
        (answer("half a sentence that was stopp", "content_filter"), "content_filter"),
        (answer(None, refusal="I will not"), "model_refusal"),
        (answer("cut off at the lim", "length"), "cut_off"),
        (answer("", "length"), "cut_off"),
        (answer("cut off at the lim", "max_tokens"), "cut_off"),
        (answer("no room in the context", "model_length"), "cut_off"),
        (answer("<think>it never stops", "length"), "cut_off"),
        (answer("half a sentence", "safety"), "content_filter"),
        (answer("half a sentence", "SAFETY"), "content_filter"),
        (answer("I call a tool", "tool_calls"), "unknown_ending"),
        (answer({"text": "no list"}), "wrong_shape"),  # type: ignore[arg-type]
        (answer(["no part"]), "wrong_shape"),  # type: ignore[arg-type]
        (answer([{"type": "image_url", "image_url": "x"}]), "wrong_shape"),  # type: ignore[arg-type]
        (answer(1e39), "wrong_shape"),  # type: ignore[arg-type]
    ],
)
def test_a_row_error_costs_one_request_and_not_the_run(reply: Reply, reason: str, tmp_path: Path) -> None:
    def respond(body: dict, attempt: int) -> Reply:
        return reply if body["messages"][0]["content"] == "bad" else answer("fine")

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request("a"), make_request("bad"), make_request("b")])
    assert [type(outcome) for outcome in outcomes] == [Completion, RowError, Completion]
    assert isinstance(outcomes[1], RowError) and outcomes[1].reason == reason
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "cure"),
    [
        (error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"), "OPENAI_API_KEY"),
        (error(403, "forbidden"), "rights"),
        (error(404, "no model", code="model_not_found"), "API_MODEL"),
        (error(429, "You exceeded your current quota", code="insufficient_quota"), "credit"),
        (error_in_200("insufficient_quota", "You exceeded your current quota"), "credit"),
        (error_in_200(401, "who are you"), "OPENAI_API_KEY"),
        (error(429, "daily limit", retry_after="7200"), "wait 7200 s"),
    ],
)
def test_a_fatal_error_stops_the_run_at_once(reply: Reply, cure: str, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: reply) as server:
        with pytest.raises(FatalApiError, match=cure) as caught:
            ask(server, tmp_path, [make_request(str(number)) for number in range(50)], concurrency=2)
    assert len(server.requests) <= 4
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


GOOD_ANSWERS: dict[str, Reply] = {
    "eos": answer("fine", "eos_token"),
    "end of turn": answer("fine", "end_turn"),
    "upper case": answer("fine", "STOP"),
    "parts": answer(
        [  # type: ignore[arg-type]
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "fi"},
            {"type": "text", "text": "ne"},
        ]
    ),
    "reasoning apart": answer("fine", reasoning_content="hm", reasoning="hm"),
    "reasoning in front": answer("\n<think>\nis it </b> fine?\n</think>\n\nfine"),
    "reasoning without its opening tag": answer("is it fine?\n</think>\n\nfine"),
    "charset": Reply(answer("fine").body, 200, {"content-type": "application/json; charset=utf-16"}),
    "unknown charset": Reply(answer("fine").body, 200, {"content-type": "text/plain; charset=klingon"}),
}


@pytest.mark.parametrize("name", GOOD_ANSWERS)
def test_an_answer_is_known_in_each_of_its_forms(name: str, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: GOOD_ANSWERS[name]) as server:
        assert ask(server, tmp_path, [make_request()]) == [Completion("fine", "stop", 7, 3)]
    assert len(server.requests) == 1


def test_tags_inside_an_answer_stay(tmp_path: Path) -> None:
    text = "Write <think> in front and </think> behind.\nThat is all."
    with ChatServer(lambda body, attempt: answer(text)) as server:
        (outcome,) = ask(server, tmp_path, [make_request()])
    assert isinstance(outcome, Completion) and outcome.text == text


@pytest.mark.parametrize("count", [10**400, 1e39, -3, True, "many", None])
def test_a_senseless_count_of_tokens_is_an_unknown_one(count: object, tmp_path: Path) -> None:
    body = message("fine") | {"usage": {"prompt_tokens": count, "completion_tokens": 3}}
    budget = Budget(price_in=1.0, price_out=1.0)
    with (
        ChatServer(lambda _, attempt: Reply(json.dumps(body).encode())) as server,
        Ledger(tmp_path / "ledger.jsonl") as ledger,
    ):
        engine = Engine(make_client(server), ledger, concurrency=1, budget=budget)
        assert list(engine.stream([make_request()])) == [Completion("fine", "stop", 0, 3)]
    assert budget.spent.cost == pytest.approx(3e-6)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("from elsewhere")) as elsewhere:
        location = elsewhere.base_url.replace("http://", "http://me:secret@") + "/chat/completions?token=secret"
        with ChatServer(lambda body, attempt: redirect(location, status)) as server:
            with pytest.raises(FatalApiError, match=f"{elsewhere.port}.*--api_base_url") as caught:
                ask(server, tmp_path, [make_request(str(number)) for number in range(20)], concurrency=2)
    assert elsewhere.requests == [] and elsewhere.authorizations == set()
    assert caught.value.reason == "redirect" and "secret" not in str(caught.value)
    assert (tmp_path / "ledger.jsonl").read_text() == ""


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_response_that_nobody_asked_for_is_no_answer_to_the_next_request(status: int, tmp_path: Path) -> None:
    """Right behind the body of one response stands a whole other one, on a connection that stays open."""

    def respond(body: dict, attempt: int) -> Reply:
        text = body["messages"][0]["content"]
        if int(text) % 3 or (status == 503 and attempt > 1):
            return answer(f"to {text}")
        reply = answer(f"to {text}") if status == 200 else error(status, "busy")
        return replace(reply, extra=whole_response("to another prompt"))

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request(str(number)) for number in range(60)], concurrency=2)
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Completion):
            assert outcome.text == f"to {number}"
        else:
            assert status == 400 and number % 3 == 0


def test_a_response_that_comes_late_and_unasked_is_no_answer_either(tmp_path: Path) -> None:
    """It arrives while the connection waits for its next request."""
    first_is_read = threading.Event()

    def respond(body: dict, attempt: int) -> Reply:
        text = body["messages"][0]["content"]
        return replace(
            answer(f"to {text}"), extra=whole_response("late") if text == "0" else b"", extra_after=first_is_read
        )

    def source() -> Iterator[CompletionRequest]:
        yield make_request("0")

    with ChatServer(respond) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        engine = Engine(make_client(server), ledger, concurrency=1)
        outcomes = list(engine.stream(source()))
        first_is_read.set()
        assert server.extra_is_sent.wait(30)
        outcomes += engine.stream([make_request("1")])
    assert outcomes == [Completion(f"to {number}", "stop", 7, 3) for number in range(2)]


def test_a_server_that_drips_ends_at_the_deadline(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: Reply(answer("slow").body, byte_seconds=0.2)) as server:
        (outcome,) = ask(server, tmp_path, [make_request()], request_timeout=0.5, max_attempts=1)
    # The whole body would have taken a minute.
    assert isinstance(outcome, RetriableError) and outcome.reason == "timeout"


def test_an_unreachable_server_is_fatal(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("x")) as server:
        pass  # its port is closed from here on
    with pytest.raises(FatalApiError, match=r"cannot reach 127.0.0.1.*OPENAI_BASE_URL"):
        ask(server, tmp_path, [make_request()], max_attempts=2)


def test_a_slow_answer_is_a_timeout(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("late", seconds=1.0 if attempt == 1 else 0.0)) as server:
        outcomes = ask(server, tmp_path, [make_request()], request_timeout=0.3)
    assert isinstance(outcomes[0], Completion)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "headers",
    [
        lambda: {"retry_after": "0.6"},
        lambda: {"retry_after_ms": "600"},
        lambda: {"retry_after": formatdate(time.time() + 2, usegmt=True)},
    ],
)
def test_retry_after_is_honoured(headers: Callable[[], dict[str, str]], tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("x") if attempt > 1 else error(429, **headers())) as server:
        ask(server, tmp_path, [make_request()])
    assert server.arrivals[1] - server.arrivals[0] >= 0.55


@pytest.mark.parametrize("value", ["soon", "-3", "0", "inf", "nan", ""])
def test_a_senseless_retry_after_is_ignored(value: str, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("x") if attempt > 1 else error(429, retry_after=value)) as server:
        # A pause that followed from the value would outlast the test.
        assert isinstance(ask(server, tmp_path, [make_request()])[0], Completion)


def test_order_concurrency_and_equal_requests(tmp_path: Path) -> None:
    def respond(body: dict, attempt: int) -> Reply:
        number = int(body["messages"][0]["content"])
        return answer(f"answer {number}", seconds=0.002 * (17 - number % 17))

    numbers = [number % 30 for number in range(40)]
    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request(str(number)) for number in numbers], concurrency=6)
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Completion)] == [
        f"answer {number}" for number in numbers
    ]
    assert len(server.requests) == 30
    assert 2 <= server.max_in_flight <= 6


def test_an_answer_in_the_ledger_is_not_asked_again(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("cut", "length")) as server:
        first = ask(server, tmp_path, [make_request("a"), make_request("b")])
        again = ask(server, tmp_path, [make_request("b", accept_cut_off=True), make_request("c")])
    assert [type(outcome) for outcome in first] == [RowError, RowError]
    assert again[0] == Completion("cut", "length", 7, 3)
    assert len(server.requests) == 3


def test_the_key_of_a_request_follows_what_shapes_the_answer() -> None:
    base = request_key(make_request(), "host")
    assert base == request_key(make_request(accept_cut_off=True), "host")
    for changed in (
        make_request("other"),
        make_request(model="n"),
        make_request(temperature=0.5),
        make_request(max_tokens=51),
        make_request(prompt_version="2"),
        make_request(sample=1),
    ):
        assert request_key(changed, "host") != base
    assert request_key(make_request(), "elsewhere") != base


def test_two_servers_on_one_machine_are_two_in_the_ledger(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with ChatServer(lambda body, attempt, name=name: answer(name)) as server:  # type: ignore[misc]
            (outcome,) = ask(server, tmp_path, [make_request()])
        assert isinstance(outcome, Completion) and outcome.text == name and len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "endpoint", "without_port"),
    [
        ("https://api.openai.com/v1/", "api.openai.com/v1", "api.openai.com/v1"),
        ("https://api.openai.com:443/v1", "api.openai.com/v1", "api.openai.com/v1"),
        ("https://host:8000/v1", "host:8000/v1", "host/v1"),
        ("http://HOST/v1", "http://host/v1", "http://host/v1"),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8001/v1", "http://127.0.0.1/v1"),
    ],
)
def test_the_ledger_knows_servers_by_scheme_host_port_and_path(url: str, endpoint: str, without_port: str) -> None:
    assert LlmClient(api_key=KEY, base_url=url).endpoint == endpoint
    assert LlmClient(api_key=KEY, base_url=url, keep_port=False).endpoint == without_port


@pytest.mark.parametrize("torn", ['{"key": "x", "te', '{"key": "x"}\n', "\x00\x00\x00"])
def test_a_torn_last_line_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(key_of("k"), "m", Completion("text \u00e9 \u2028", "stop", 1, 2))
    good = path.read_bytes()
    path.write_bytes(good + torn.encode())
    with Ledger(path) as ledger:
        assert len(ledger) == 1 and ledger.get(key_of("k")) == Completion("text \u00e9 \u2028", "stop", 1, 2)
        ledger.add(key_of("l"), "m", Completion("second", "stop", 1, 2))
    assert path.read_bytes().startswith(good)
    with Ledger(path) as ledger:
        assert len(ledger) == 2


def test_a_whole_last_line_without_its_line_feed_is_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(key_of("k"), "m", Completion("one", "stop", 1, 2))
        ledger.add(key_of("l"), "m", Completion("two", "stop", 1, 2))
    path.write_bytes(path.read_bytes()[:-1])
    with Ledger(path) as ledger:
        ledger.add(key_of("n"), "m", Completion("three", "stop", 1, 2))
    with Ledger(path) as ledger:
        assert ledger.get(key_of("n")) is not None and ledger.get(key_of("k")) is not None


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("rubbish\n" + json.dumps({"key": "k"}) + "\n")
    with pytest.raises(ContrastRMError, match=r"ledger\.jsonl:1"):
        Ledger(path)
    path.write_text("")
    Ledger(path).close()  # the refused one left no lock behind


def _hold_ledger(path: str, ready: multiprocessing.synchronize.Event) -> None:
    with Ledger(path):
        ready.set()
        time.sleep(300)


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    path = tmp_path / "ledger.jsonl"
    holder = context.Process(target=_hold_ledger, args=(str(path), ready))
    holder.start()
    try:
        assert ready.wait(120)
        with pytest.raises(ContrastRMError, match="another run is using"):
            Ledger(path)
    finally:
        holder.kill()
        holder.join()
    Ledger(path).close()


@pytest.mark.parametrize("key", ["", "  ", "two words", "k\u00e9y", "line\nbreak"])
def test_an_unusable_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(FatalApiError, match="OPENAI_API_KEY") as caught:
        LlmClient(api_key=key)
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "api.openai.com/v1", "ftp://host/v1", "http://", "https://me:secret@host/v1", "http://[::1"]
)
def test_an_unusable_base_url_is_refused(url: str) -> None:
    with pytest.raises(ContrastRMError, match="base URL") as caught:
        LlmClient(api_key=KEY, base_url=url)
    assert "secret" not in str(caught.value)


def test_the_key_appears_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")

    def respond(body: dict, attempt: int) -> Reply:
        name = body["messages"][0]["content"]
        return {"400": error(400, f"bad: Bearer {KEY}"), "echo": answer(f"your key is {KEY}")}.get(
            name, error(500, KEY)
        )

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request(name) for name in ("400", "echo", "500")], max_attempts=2)
        assert server.authorizations == {f"Bearer {KEY}"}
    assert all(isinstance(outcome, ApiError) for outcome in outcomes)
    seen = [str(outcome) + repr(outcome) for outcome in outcomes] + list(capfd.readouterr()) + [caplog.text]
    seen += [file.read_text() for file in tmp_path.iterdir()]
    assert not any(KEY in text or KEY[8:] in text for text in seen)


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-abcDEF0123456789abcDEF",
        "gsk_abcDEF0123456789abcDEF",
        "hf_abcDEFghiJKLmnoPQRstuVWX",
        "AIzaSyA0123456789abcdefghijklmnop",
        "bearer 0123456789",
    ],
)
def test_keys_of_others_in_a_servers_messages_are_not_shown(key: str, tmp_path: Path) -> None:
    """A gateway tells with which key of its own it failed."""
    replies = [error(400, f"upstream: bad key {key}."), error_in_200(500, f"key {key}"), answer("x", f"{key}")]
    with ChatServer(lambda body, attempt: replies[int(body["messages"][0]["content"])]) as server:
        outcomes = ask(server, tmp_path, [make_request(str(number)) for number in range(3)], max_attempts=1)
    for outcome in outcomes:
        assert isinstance(outcome, ApiError) and "[key]" in str(outcome) and key.split()[-1] not in str(outcome)
    assert key.split()[-1] not in (tmp_path / "ledger.jsonl").read_text()


@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
def test_temperature_none_is_not_sent(temperature: float | None, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("x")) as server:
        ask(server, tmp_path, [make_request(temperature=temperature)])
    expected = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}
    assert server.requests == [expected if temperature is None else expected | {"temperature": temperature}]


NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_COMPLETION_TOKENS = "max_completion_tokens: Extra inputs are not permitted"
NO_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported."
)


@pytest.mark.parametrize("refused", [{"max_tokens"}, {"temperature"}, {"max_tokens", "temperature"}])
def test_a_parameter_that_the_server_refuses_is_left_out_for_the_rest_of_the_run(
    refused: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def respond(body: dict, attempt: int) -> Reply:
        for name, text in (("max_tokens", NO_MAX_TOKENS), ("temperature", NO_TEMPERATURE)):
            if name in refused and name in body:
                return error(400, text)
        return answer("fine")

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request(str(n)) for n in range(60)], concurrency=2, max_attempts=1)
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    # What was read ahead learns of it by itself, the rest by the first answer.
    assert len(server.requests) <= 60 + 2 * READ_AHEAD * len(refused)
    for body in server.requests[-1:]:
        assert ("temperature" in body) == ("temperature" not in refused)
        assert body.get("max_completion_tokens" if "max_tokens" in refused else "max_tokens") == 50
    said = capfd.readouterr().err
    assert said.count("note: 127.0.0.1 refuses") == 1 and all(name in said for name in refused)


@pytest.mark.parametrize(
    "text",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 50. The model's maximum context length is 40 tokens",
        "max_tokens is too large: 50. This model supports at most 40 completion tokens",
        "no such thing",
    ],
)
def test_a_refusal_of_one_long_request_changes_nothing_for_the_others(text: str, tmp_path: Path) -> None:
    def respond(body: dict, attempt: int) -> Reply:
        return error(400, text) if body["messages"][0]["content"] == "long" else answer("fine")

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request("long"), make_request("a"), make_request("b")], concurrency=1)
    assert [type(outcome) for outcome in outcomes] == [RowError, Completion, Completion]
    assert len(server.requests) == 3 and all(body["max_tokens"] == 50 for body in server.requests)


def test_an_answer_always_has_a_limit(tmp_path: Path) -> None:
    """A server that refuses both names of it gets neither request through, and the next one has a limit again."""

    def respond(body: dict, attempt: int) -> Reply:
        if body["messages"][0]["content"] == "a":
            return answer("fine")
        return error(422, NO_MAX_TOKENS if "max_tokens" in body else NO_COMPLETION_TOKENS)

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request("b"), make_request("a")], concurrency=1)
    assert [type(outcome) for outcome in outcomes] == [RowError, Completion]
    assert len(server.requests) == 3
    assert all({"max_tokens", "max_completion_tokens"} & body.keys() for body in server.requests)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"<html>Welcome</html>", 200, {"content-type": "text/html"}),
        Reply(b'{"error": "Unexpected endpoint or method. (POST /chat/completions)"}'),
        Reply(b'{"status": "ok"}'),
    ],
    ids=["a web page", "an error under 200", "another JSON"],
)
def test_an_address_that_is_no_chat_api_is_told_after_a_few_calls(reply: Reply, tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: reply) as server:
        with pytest.raises(FatalApiError, match=r"answer of a chat API.*--api_base_url.*/v1"):
            ask(server, tmp_path, [make_request(str(n)) for n in range(240)], max_attempts=6)
    assert len(server.requests) <= 5 + 4


def test_odd_bodies_after_an_answer_are_no_wrong_address(tmp_path: Path) -> None:
    def respond(body: dict, attempt: int) -> Reply:
        return answer("fine") if body["messages"][0]["content"] == "0" else invalid_json()

    with ChatServer(respond) as server:
        outcomes = ask(server, tmp_path, [make_request(str(n)) for n in range(9)], concurrency=1, max_attempts=1)
    assert [type(outcome) for outcome in outcomes] == [Completion] + [RetriableError] * 8


def test_a_lone_surrogate_in_an_answer_is_made_writable() -> None:
    body = '{"choices": [{"message": {"content": "half \\ud83d"}, "finish_reason": "stop"}]}'
    completion = parse_body(body)
    assert completion.text.encode() and completion.text.startswith("half ")
