"""The engine against a real server: order, laziness, limits, budgets, and how a run ends early."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, answer, english, error, reset

from codes.common.cli import EXIT_ROWS_MISSING
from codes.common.errors import ContrastRMError
from codes.common.ledger import OffsetTable
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
    Usage,
)
from codes.common.llm_limits import (
    BREAKER_CALLS,
    BREAKER_REFUSALS,
    DECREASE_FACTOR,
    OUTAGE_FAILURES,
    Breaker,
    Gate,
    Need,
)
from codes.common.llm_session import add_llm_arguments
from codes.construct import api as construct_api
from codes.construct.pipeline import request_failure

KEY = "sk-test-0123456789abcdef0123456789"
REPO_ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0


def make_request(text: object, **more: object) -> CompletionRequest:
    fields = {
        "messages": ({"role": "user", "content": str(text)},),
        "model": "m",
        "max_tokens": 50,
        "prompt_version": "1",
    }
    return CompletionRequest(**(fields | more))  # type: ignore[arg-type]


def make_engine(server: ChatServer, ledger: Ledger, *, concurrency: int = 4, **more: Any) -> Engine:
    settings = {"request_timeout": 5.0, "max_attempts": 4, "first_wait_seconds": 0.01}
    for name in settings:
        settings[name] = more.pop(name, settings[name])
    client = LlmClient(api_key=KEY, base_url=server.base_url, **settings)  # type: ignore[arg-type]
    return Engine(client, ledger, concurrency=concurrency, **more)


def run(server: ChatServer, folder: Path, texts: list[Any], **more: Any) -> list[Outcome]:
    with Ledger(folder / "ledger.jsonl") as ledger:
        return list(make_engine(server, ledger, **more).stream(make_request(text) for text in texts))


def echo(body: dict[str, Any], attempt: int) -> Reply:
    return answer(f"to {body['messages'][0]['content']}")


def texts_of(outcomes: list[Outcome]) -> list[str]:
    return [outcome.text if isinstance(outcome, Completion) else outcome.reason for outcome in outcomes]


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llm-engine"]


# --- streams


def test_requests_are_read_when_they_are_needed(tmp_path: Path) -> None:
    n_read = 0

    def source() -> Iterator[CompletionRequest]:
        nonlocal n_read
        for number in range(1000):
            n_read += 1
            yield make_request(number)

    with ChatServer(echo) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for n_given, outcome in enumerate(make_engine(server, ledger, concurrency=2).stream(source())):
            assert isinstance(outcome, Completion) and outcome.text == f"to {n_given}"
            assert n_read <= n_given + 1 + 2 * READ_AHEAD * 2
            if n_given == 100:
                break
    assert len(server.requests) <= n_read < 140 and not engine_threads()


def test_one_slow_answer_does_not_stop_the_others(tmp_path: Path) -> None:
    released = threading.Event()
    others = threading.Event()

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        if body["messages"][0]["content"] == "0":
            others.wait(PATIENCE)
            released.set()
        elif len(server.requests) >= 60:
            others.set()
        return echo(body, attempt)

    with ChatServer(respond) as server:
        outcomes = run(server, tmp_path, list(range(100)), concurrency=2, request_timeout=PATIENCE)
    # Sixty arrived while the first was still unanswered: far more than two calls at a time would read ahead.
    assert released.is_set() and others.is_set()
    assert texts_of(outcomes) == [f"to {number}" for number in range(100)]


def test_what_the_ledger_holds_needs_no_call_and_no_thread(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        first = run(server, tmp_path, list(range(50)))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        stream = make_engine(server, ledger).stream(make_request(number) for number in range(50))
        assert [next(stream) for _ in range(50)] == first
        assert not engine_threads()


def test_a_raised_limit_asks_only_what_is_new(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        run(server, tmp_path, list(range(10)))
        outcomes = run(server, tmp_path, list(range(25)))
    assert texts_of(outcomes) == [f"to {number}" for number in range(25)]
    assert sorted(int(body["messages"][0]["content"]) for body in server.requests) == list(range(25))


def test_a_stream_may_feed_on_another(tmp_path: Path) -> None:
    with ChatServer(echo) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        engine = make_engine(server, ledger, concurrency=3)
        first = engine.stream(make_request(number) for number in range(40))
        second = engine.stream(make_request(f"after {outcome.text}") for outcome in first)  # type: ignore[union-attr]
        assert texts_of(list(second)) == [f"to after to {number}" for number in range(40)]
    assert server.max_in_flight <= 3 and len(server.requests) == 80


@pytest.mark.parametrize("how", ["break", "exception", "kept generator"])
def test_leaving_early_calls_off_and_closes(how: str, tmp_path: Path) -> None:
    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return answer("x", seconds=0.0 if int(body["messages"][0]["content"]) < 5 else PATIENCE)

    with ChatServer(respond) as server:
        with pytest.raises(ZeroDivisionError), Ledger(tmp_path / "ledger.jsonl") as ledger:
            engine = make_engine(server, ledger, request_timeout=PATIENCE)
            stream = engine.stream(make_request(number) for number in range(100))
            if how == "break":
                for _ in stream:
                    break
            elif how == "exception":
                for number, _ in enumerate(engine.stream(make_request(number) for number in range(100))):
                    assert 1 / (3 - number)
            else:
                next(stream)
            raise ZeroDivisionError
    assert not engine_threads()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert 1 <= len(ledger) <= 5


def test_a_source_that_fails_ends_the_stream_with_its_error(tmp_path: Path) -> None:
    def source() -> Iterator[CompletionRequest]:
        yield from (make_request(number) for number in range(20))
        raise ContrastRMError("line 21 is bad")

    with ChatServer(echo) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        with pytest.raises(ContrastRMError, match="line 21"):
            list(make_engine(server, ledger).stream(source()))


def test_a_full_disk_stops_the_run_with_a_cure(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with ChatServer(echo) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger._writer.close()
        ledger._writer = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
        with pytest.raises(ContrastRMError, match="No space left.*make room"):
            list(make_engine(server, ledger).stream(make_request(number) for number in range(20)))
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


# --- failures


def test_row_failures_are_recorded_and_asked_again_on_demand(tmp_path: Path) -> None:
    bad = {"400": error(400, "bad"), "filter": answer(None, "content_filter"), "empty": answer(""), "500": error(500)}
    bad["length"] = answer("cut", "length")

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return bad.get(body["messages"][0]["content"]) or echo(body, attempt)

    texts = ["fine", *bad]
    reasons = ["to fine", "http_400", "content_filter", "empty_answer", "http_500", "cut_off"]
    with ChatServer(respond) as server:
        first = run(server, tmp_path, texts)
        assert texts_of(first) == reasons and len(server.requests) == 1 + 1 + 1 + 3 + 4 + 1
        again = run(server, tmp_path, texts)
        assert texts_of(again) == reasons
        assert {body["messages"][0]["content"] for body in server.requests[11:]} == {"500"}
    for outcome, error_class, attempts in zip(
        again[1:], ["row", "row", "row", "retriable", "row"], [1, 1, 3, 4, 1], strict=True
    ):
        assert isinstance(outcome, ApiError)
        row = request_failure("id", "step", outcome, bias="length")
        assert (row["error_class"], row["attempts"], row["bias"]) == (error_class, attempts, "length")
        assert row["reason"] == outcome.reason and row["message"] == str(outcome)
    with ChatServer(echo, port=server.port) as server:
        mended = run(server, tmp_path, [*texts, *texts], retry_failed=True)
        assert len(server.requests) == 5
        assert texts_of(mended) == 2 * [f"to {text}" for text in texts]
        assert texts_of(run(server, tmp_path, texts)) == [f"to {text}" for text in texts]
        assert len(server.requests) == 5


def test_a_failure_that_is_asked_again_and_fails_again_is_asked_once(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: error(400, "bad")) as server:
        run(server, tmp_path, ["a"])
        assert len(server.requests) == 1
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            engine = make_engine(server, ledger, retry_failed=True)
            # The second stream begins when the first one's failure is in the ledger again.
            for texts in (["a", "b"], ["a", "b"]):
                assert texts_of(list(engine.stream(make_request(text) for text in texts))) == 2 * ["http_400"]
    assert sorted(body["messages"][0]["content"] for body in server.requests) == ["a", "a", "b"]


def test_a_fatal_error_stops_calls_in_flight_within_a_second(tmp_path: Path) -> None:
    sent_at = 0.0

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        nonlocal sent_at
        if body["messages"][0]["content"] == "7":
            sent_at = time.monotonic()
            return error(401, "who are you")
        return answer("late", seconds=PATIENCE)

    with ChatServer(respond) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        with pytest.raises(FatalApiError, match="OPENAI_API_KEY"):
            list(
                make_engine(server, ledger, concurrency=16, request_timeout=PATIENCE).stream(
                    make_request(number) for number in range(1000)
                )
            )
        stopped_at = time.monotonic()
    # The calls in flight would have taken a minute; benchmarks/engine_faults.py measures the time.
    assert stopped_at - sent_at < PATIENCE / 2 and len(server.requests) <= 16 and not engine_threads()


def test_the_breaker_stops_a_run_without_success(tmp_path: Path) -> None:
    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return echo(body, attempt) if int(body["messages"][0]["content"]) < 20 else error(503, "down")

    with ChatServer(respond) as server:
        with pytest.raises(FatalApiError, match=r"the last \d+ calls.*http_503.*down.*same command") as caught:
            run(server, tmp_path, list(range(1000)), max_outage_seconds=0.2, max_attempts=3)
    assert caught.value.reason == "breaker"
    assert BREAKER_CALLS <= len(server.requests) - 20 < 200
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert len(ledger) == 20


def test_wrong_settings_stop_the_run_and_not_every_row(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: error(400, "no such parameter")) as server:
        with pytest.raises(FatalApiError, match="http_400 100.*check the settings"):
            run(server, tmp_path, list(range(1000)))
    assert BREAKER_REFUSALS <= len(server.requests) <= BREAKER_REFUSALS + 4


def test_refusals_between_answers_stop_nothing(tmp_path: Path) -> None:
    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return error(400, "no") if int(body["messages"][0]["content"]) % 3 else echo(body, attempt)

    n = 3 * BREAKER_REFUSALS
    with ChatServer(respond) as server:
        outcomes = run(server, tmp_path, list(range(n)), concurrency=1)
    assert [isinstance(outcome, RowError) for outcome in outcomes] == [bool(number % 3) for number in range(n)]


def test_a_network_that_goes_and_comes_back_costs_no_row(tmp_path: Path) -> None:
    port = 0

    def source() -> Iterator[CompletionRequest]:
        yield from (make_request(number) for number in range(30))

    with ChatServer(echo) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        port = int(server.base_url.split(":")[2].split("/")[0])
        stream = make_engine(server, ledger, concurrency=1, max_attempts=2).stream(source())
        outcomes = [next(stream) for _ in range(3)]
        server.__exit__(None, None, None)
        threading.Timer(0.5, lambda: revived.append(ChatServer(echo, port=port).__enter__())).start()
        revived: list[ChatServer] = []
        outcomes += list(stream)
        revived[0].__exit__(None, None, None)
    # A connection that was open may break once more than once: the request that met it may be lost, no other.
    assert sum(isinstance(outcome, Completion) for outcome in outcomes) >= 28


# --- concurrency and rates


def test_concurrency_falls_under_overload_and_recovers(tmp_path: Path) -> None:
    overloaded = True

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        with lock:
            is_too_much = overloaded and server._in_flight > 4
        return error(429, "slow down") if is_too_much else answer("x", seconds=0.01)

    lock = threading.Lock()
    with ChatServer(respond) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        engine = make_engine(server, ledger, concurrency=32, max_attempts=50)
        outcomes = list(engine.stream(make_request(number) for number in range(150)))
        lowest = engine._gate.limit
        overloaded = False
        outcomes += list(engine.stream(make_request(number) for number in range(150, 600)))
        recovered = engine._gate.limit
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert lowest < 16 and recovered > lowest and recovered <= 32 and server.max_in_flight <= 32


def test_a_burst_of_refusals_lowers_concurrency_once(tmp_path: Path) -> None:
    all_have_come = threading.Barrier(8)

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        all_have_come.wait(PATIENCE)
        return error(429, "slow down")

    with ChatServer(respond) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        engine = make_engine(server, ledger, concurrency=8, max_attempts=1)
        outcomes = list(engine.stream(make_request(number) for number in range(8)))
        assert texts_of(outcomes) == 8 * ["rate_limit"]
        assert engine._gate.limit == pytest.approx(8 * DECREASE_FACTOR)


@pytest.mark.parametrize(
    ("reply", "n_failures_before"),
    [(error(429, "wait", retry_after="60"), 0), (error(503, "down"), OUTAGE_FAILURES - 1)],
    ids=["retry-after", "outage"],
)
def test_the_pause_of_one_request_is_everybodys(reply: Reply, n_failures_before: int) -> None:
    """After one request's failure the gate lets nobody in, not even requests that have not failed."""

    async def lets_in_at_once(gate: Gate) -> bool:
        task = asyncio.create_task(gate.enter(2, Need.of(["x"], 5)))
        for _ in range(3):
            await asyncio.sleep(0)
        is_in = task.done()
        task.cancel()
        return is_in

    async def scenario(server: ChatServer) -> None:
        gate, breaker = Gate(concurrency=4, budget=Budget()), Breaker()
        for _ in range(n_failures_before):
            breaker.fail(RetriableError("down", reason="http_503"))
        assert await lets_in_at_once(gate)
        client = LlmClient(api_key=KEY, base_url=server.base_url, first_wait_seconds=60.0)
        async with client:
            asking = asyncio.create_task(client.complete(make_request("a"), gate=gate, breaker=breaker, order=1))
            while not breaker._reasons.total() > n_failures_before:
                await asyncio.sleep(0.01)
            assert not await lets_in_at_once(gate) and not asking.done()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    with ChatServer(lambda body, attempt: reply) as server:
        asyncio.run(scenario(server))
    assert len(server.requests) == 1


def test_a_call_that_was_called_off_before_it_was_sent_costs_nothing() -> None:
    async def scenario() -> Budget:
        budget = Budget(max_requests=2)
        gate = Gate(concurrency=1, budget=budget)
        permit = await gate.enter(1, Need.of(["x"], 5))
        waiting = asyncio.create_task(gate.enter(2, Need.of(["x"], 5)))
        await asyncio.sleep(0)
        gate.leave(permit, Usage(3, 2))  # lets the other one in, which does not know it yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled() and budget.spent.n_calls == 1
        assert (budget.spent.prompt_tokens, budget.spent.completion_tokens) == (3, 2)
        await gate.enter(3, Need.of(["x"], 5))  # its place and its share of the budget are free again
        return budget

    assert asyncio.run(scenario()).spent.n_calls == 2


def test_requests_a_minute(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        run(server, tmp_path, list(range(25)), concurrency=8, requests_per_minute=600)
    # Ten may come at once, the other fifteen at ten a second.
    assert server.arrivals[-1] - server.arrivals[0] >= 1.3


def test_tokens_a_minute(tmp_path: Path) -> None:
    # Each call is announced with 16 + 50 tokens and uses 10: 6,000 a minute let 100 a second through.
    with ChatServer(echo) as server:
        run(server, tmp_path, list(range(20)), concurrency=1, tokens_per_minute=6000)
    assert server.arrivals[-1] - server.arrivals[0] >= 0.9


# --- budgets


@pytest.mark.parametrize(
    ("limit", "flag", "n_most"),
    [
        ({"max_requests": 10}, "--max_requests 10", 10),
        ({"max_tokens": 300}, "--max_tokens 300", 30),
        ({"max_cost": 0.001, "price_in": 10.0, "price_out": 10.0}, "--max_cost 0.001", 10),
    ],
)
def test_a_budget_is_never_exceeded_and_a_run_goes_on_from_there(
    limit: dict[str, Any], flag: str, n_most: int, tmp_path: Path
) -> None:
    with ChatServer(echo) as server:
        for _ in range(2):
            before = len(server.requests)
            budget = Budget(**limit)
            with pytest.raises(FatalApiError, match=f"{flag}.*same command"):
                run(server, tmp_path, list(range(1000)), budget=budget)
            # Each answer uses 10 tokens, and none may be sent that could use more than is left.
            assert 3 <= len(server.requests) - before == budget.spent.n_calls <= n_most
            assert budget.spent.prompt_tokens + budget.spent.completion_tokens == 10 * budget.spent.n_calls
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert len(ledger) == len(server.requests)


def test_repeated_attempts_count_and_the_ledger_is_free(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: echo(body, attempt) if attempt > 2 else error(500)) as server:
        assert len(run(server, tmp_path, list(range(3)), budget=Budget(max_requests=9))) == 3
        assert len(run(server, tmp_path, list(range(3)), budget=Budget(max_requests=1))) == 3
        with pytest.raises(FatalApiError, match="--max_requests 2 "):
            run(server, tmp_path, ["another"], budget=Budget(max_requests=2))


def test_a_call_that_broke_counts_at_its_upper_bound(tmp_path: Path) -> None:
    budget = Budget(price_in=1.0, price_out=2.0)
    with ChatServer(lambda body, attempt: echo(body, attempt) if attempt > 1 else reset()) as server:
        run(server, tmp_path, ["four"], budget=budget)
    need = Need.of(["four"], 50)
    assert need == Need(4 + 16, 1 + 16, 50)
    assert budget.spent.to_dict() == {
        "n_calls": 2,
        "prompt_tokens": 20 + 7,
        "completion_tokens": 50 + 3,
        "n_unknown_usage": 1,
        "cost": pytest.approx((27 + 2 * 53) / 1e6),
    }


@pytest.mark.parametrize("prices", [{"max_cost": 1.0}, {"price_in": 1.0}, {"max_cost": 1.0, "price_out": 1.0}])
def test_a_cost_needs_both_prices(prices: dict[str, float]) -> None:
    with pytest.raises(ContrastRMError, match="--price_in and --price_out"):
        Budget(**prices)  # type: ignore[arg-type]


def test_the_gate_never_lets_in_more_than_the_upper_bound(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: answer("x", seconds=0.005)) as server:
        run(server, tmp_path, list(range(200)), concurrency=7)
    assert 2 <= server.max_in_flight <= 7
    assert Gate(concurrency=0, budget=Budget()).concurrency == 1


# --- the ledger's index


def test_the_offset_table_is_a_dict() -> None:
    table, expected = OffsetTable(), {}
    # Three digests each share their first eight bytes: collisions of the table.
    starts = [hashlib.sha256(bytes([number % 256, number // 256])).digest()[:8] for number in range(1000)]
    digests = [start + bytes([last] * 8) for start in starts for last in range(3)]
    for number, digest in enumerate(digests):
        expected[digest] = number
        table.put(digest, number)
    for number, digest in enumerate(digests[::7]):
        expected[digest] = 10**12 + number
        table.put(digest, 10**12 + number)
    assert len(table) == len(expected)
    assert all(table.get(digest) == offset for digest, offset in expected.items())
    assert table.get(b"\xff" * 16) is None


SHORT_WRITE = """\
import hashlib, resource, sys
from codes.common.errors import ContrastRMError
from codes.common.llm import Completion, Ledger
keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
with Ledger(sys.argv[1]) as ledger:
    ledger.add(keys[0], "m", Completion("first", "stop", 1, 1))
    full = max(path.stat().st_size for path in ledger.path.parent.iterdir()) + 500
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))
    for key in keys[1:]:
        try:
            ledger.add(key, "m", Completion("x" * 100_000, "stop", 1, 1))
            print("recorded")
        except ContrastRMError as error:
            print(error)
"""


def test_a_line_that_fits_in_part_is_no_line(tmp_path: Path) -> None:
    """The disk takes the first half of an answer: that is an error, and the next run finds what was whole."""
    command = [sys.executable, "-c", SHORT_WRITE, str(tmp_path / "ledger.jsonl")]
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 2 and all("make room" in line for line in done.stdout.splitlines())
    keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.get(keys[0]) == Completion("first", "stop", 1, 1)
        assert ledger.get(keys[1]) is None and ledger.get(keys[2]) is None and len(ledger) == 1


def test_threads_that_share_a_ledger_get_what_they_recorded(tmp_path: Path) -> None:
    wrong: list[int] = []

    def use(number: int) -> None:
        for turn in range(200):
            key = hashlib.sha256(f"{number} {turn}".encode()).hexdigest()
            ledger.add(key, "m", Completion(f"{number} {turn}", "stop", 1, 1))
            wrong.extend([number] * (ledger.get(key) != Completion(f"{number} {turn}", "stop", 1, 1)))

    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(ledger) == 1600


# --- the command line


def test_a_step_says_what_came_from_the_ledger(
    parse: Callable[..., construct_api.Api], capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(echo) as server:
        for n, n_known in ((3, 0), (5, 3), (5, 5)):
            api = parse("--api_base_url", server.base_url)
            with api.ledger:
                # What this run has asked itself is no answer of an earlier one.
                assert len(api.ask([*prompts(n), *prompts(n)], "texts")) == 2 * n
            assert api.summary()["n_from_ledger"] == 2 * n_known
            assert f"{n - n_known} calls sent" in (said := capsys.readouterr().err)
            assert f"{2 * n_known} answers from the ledger" in said
    assert len(server.requests) == 5


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., construct_api.Api]:
    """Open the API as every construct step does."""

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv(construct_api.EMBEDDED_SERVER_VARIABLE, raising=False)

    def open_with(*flags: object) -> construct_api.Api:
        parser = argparse.ArgumentParser()
        add_llm_arguments(parser, temperature=0.0, max_new_tokens=64)
        parser.add_argument("--work_dir", type=Path)
        parser.add_argument("--seed", type=int, default=42)
        known = ["--work_dir", tmp_path / "work", "--api_model", "m", "--max_attempts", 1]
        return construct_api.open_api(parser.parse_args([str(flag) for flag in (*known, *flags)]))

    return open_with


def prompts(n: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"{number}" * 40}] for number in range(n)]


def test_an_estimate_sends_nothing_and_counts_what_is_new(
    parse: Callable[..., construct_api.Api],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ChatServer(echo) as server:
        with parse("--api_base_url", server.base_url).ledger as ledger:
            pass
        api = parse("--api_base_url", server.base_url)
        with api.ledger:
            assert len(api.ask(prompts(4), "texts")) == 4
        assert len(server.requests) == 4
        capsys.readouterr()
        monkeypatch.delenv("OPENAI_API_KEY")
        prices = ("--price_in", 1000, "--price_out", 2000)
        api = parse("--api_base_url", server.base_url, "--estimate", *prices)
        with pytest.raises(SystemExit) as stopped, api.ledger:
            list(api.ask_stream([*prompts(10), *prompts(10)], "texts", n_follow_ups=1))
        assert stopped.value.code == 0 and len(server.requests) == 4
    shown = capsys.readouterr().out
    # Six new ones of 10 + 16 prompt tokens, each with a follow-up; the four known answers have 3 tokens each.
    assert "requests: 12 to send, 6 of them for the answers to the first 6, 4 in the ledger already" in shown
    assert (
        "prompt tokens: 312 " in shown and "36 likely (3 an answer, mean of those in the ledger), 768 at most" in shown
    )
    assert "cost: 0.3840 likely, 1.8480 at most" in shown
    assert ledger.path.is_file()


def test_exit_code_and_summary_of_a_step(
    parse: Callable[..., construct_api.Api], capsys: pytest.CaptureFixture[str]
) -> None:
    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return error(400, "bad") if body["messages"][0]["content"].startswith("2") else echo(body, attempt)

    with ChatServer(respond) as server:
        api = parse("--api_base_url", server.base_url, "--price_in", 1, "--price_out", 1)
        with api.ledger:
            outcomes = api.ask(prompts(5), "texts")
    assert [isinstance(outcome, RowError) for outcome in outcomes] == [False, False, True, False, False]
    assert api.summary() == {
        "n_requests": 5,
        "n_answers": 4,
        "n_from_ledger": 0,
        "prompt_tokens": 28,
        "completion_tokens": 12,
        "n_failed_requests": {"http_400": 1},
        "refused_parameters": [],
        "spent_in_this_run": {
            "n_calls": 5,
            "prompt_tokens": 28,
            "completion_tokens": 12,
            "n_unknown_usage": 0,
            "cost": pytest.approx(40e-6),
        },
    }
    assert "texts: 5 calls sent, 28 + 12 tokens, cost 0.0000" in capsys.readouterr().err
    assert api.exit_code(0) == 0 and api.exit_code(1) == EXIT_ROWS_MISSING == 3
    assert "1 requests brought no answer" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max_cost", "--price_in", "--requests_per_minute", "--max_outage_seconds"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "many"])
def test_senseless_limits_are_refused(flag: str, value: str, parse: Callable[..., construct_api.Api]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(flag, value)
    assert stopped.value.code == 2


STEP = """\
import argparse
import sys
from pathlib import Path
from codes.common.cli import run
from codes.common.llm_session import add_llm_arguments
from codes.construct.api import open_api
def main(argv):
    parser = argparse.ArgumentParser()
    add_llm_arguments(parser, temperature=0.0, max_new_tokens=50)
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    flags = ["--api_model", "m", "--api_base_url", sys.argv[1], "--concurrency", "4", "--max_attempts", "2",
             "--request_timeout", "60", "--work_dir", sys.argv[2]]
    api = open_api(parser.parse_args(flags))
    with api.ledger:
        for outcome in api.ask_stream(([{"role": "user", "content": str(n)}] for n in range(100)), "texts"):
            print(outcome, flush=True)
    return 0
run(main)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_run_that_waits_for_hanging_calls(stop: signal.Signals, tmp_path: Path) -> None:
    def respond(body: dict[str, Any], attempt: int) -> Reply:
        return answer("x", seconds=0.0 if int(body["messages"][0]["content"]) < 10 else PATIENCE)

    with ChatServer(respond) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", STEP, server.base_url, str(tmp_path / "work")],
            cwd=REPO_ROOT,
            env=os.environ | {"PYTHONPATH": str(REPO_ROOT), "OPENAI_API_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        while len(server.requests) < 14 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(stop)
        output, errors = child.communicate(timeout=PATIENCE / 2)
    assert child.returncode == (130 if stop == signal.SIGINT else -signal.SIGTERM), errors
    assert len(output.splitlines()) >= 5 and "Traceback" not in errors
    assert (tmp_path / "work" / "ledger.jsonl").read_text().count("\n") == 10
    with Ledger(tmp_path / "work" / "ledger.jsonl") as ledger:
        assert len(ledger) == 10


def test_a_second_attempt_at_the_same_error_keeps_its_class(tmp_path: Path) -> None:
    with ChatServer(lambda body, attempt: error(500, english("seed", 5))) as server:
        (outcome,) = run(server, tmp_path, ["a"], max_attempts=2)
    assert isinstance(outcome, RetriableError) and outcome.attempts == 2
    assert json.dumps(request_failure("id", "step", outcome))
