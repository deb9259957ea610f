"""The one client for OpenAI-compatible chat completions: one retry loop, typed errors, a resumable ledger.

Reads the ledger (JSONL) where it exists; appends every finished request to it. Nothing here prints a key, and
an error is never returned as text. Used by the construct steps, for example
``python -m codes.construct.gptout --input_file data/train/own_pairs.jsonl --output_file
output/construct/injected.jsonl``.

``LlmClient`` speaks HTTP. ``Engine`` runs it on an event loop in a thread of its own, so that slow work of the
caller holds up no call; its streams take requests lazily and give outcomes in the order of the requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from tqdm import tqdm

from codes.common.ledger import Ledger, Recorded
from codes.common.llm_limits import MAX_OUTAGE_SECONDS, Breaker, Budget, Gate, Need
from codes.common.llm_outcomes import (
    LIMIT_NAMES,
    NOT_BILLED,
    ApiError,
    Completion,
    FatalApiError,
    Outcome,
    RetriableError,
    RowError,
    Usage,
    parse_body,
    raise_final,
    read_response,
    refused_parameter,
)
from codes.common.web import Connections, check_address, proxy_of

__all__ = [
    "ApiError",
    "Budget",
    "Completion",
    "CompletionRequest",
    "Engine",
    "FatalApiError",
    "Ledger",
    "LlmClient",
    "Outcome",
    "RetriableError",
    "RowError",
    "Usage",
    "endpoint_of",
    "parse_body",
    "request_key",
]

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MAX_WAIT_SECONDS = 60.0
# An empty or unfinished answer costs a full generation each time, and the fourth is hardly ever better than the third.
PAID_TRIES = 3
REFUSED_PARAMETER = "refused_parameter"
# Requests read ahead of the finished ones, per concurrent call: those that wait for a next attempt must not
# leave places empty.
READ_AHEAD = 4
# Requests read ahead of the first unfinished one, per concurrent call. One call that hangs for two minutes
# holds up the output; up to so many others are finished and wait in the ledger meanwhile.
WINDOW = 64

# Keys as the large providers issue them: a gateway's message may hold the gateway's own.
_KEY_LIKE = re.compile(
    r"\b(?:(?i:sk|pk|rk|gsk|xai|nvapi|r8)[-_][\w*.\-]{6,}|hf_\w{20,}|AIza[\w\-]{20,})|(?i:bearer)\s+[^\s\"',}]+"
)


@dataclass(frozen=True)
class CompletionRequest:
    """One chat completion to ask for.

    Attributes:
        messages: Chat turns ``{"role", "content"}``.
        max_tokens: Upper bound on the answer's tokens.
        prompt_version: Version of the prompt texts; part of the ledger key, so that edited prompts are asked
            anew.
        temperature: None leaves it to the server (some models refuse any value but their own).
        sample: Tells apart requests that are meant to be answered independently (a run's seed); never sent.
        accept_cut_off: Whether an answer that ends at ``max_tokens`` is of use.
    """

    messages: tuple[dict[str, str], ...]
    model: str
    max_tokens: int
    prompt_version: str
    temperature: float | None = 0.0
    sample: int = 0
    accept_cut_off: bool = False

    def need(self) -> Need:
        """The tokens that it may use."""
        return Need.of([str(message["content"]) for message in self.messages], self.max_tokens, self.model)


def request_key(request: CompletionRequest, endpoint: str) -> str:
    """Hex SHA-256 of everything that shapes the answer. Of the URL, what ``endpoint_of`` leaves."""
    content = {
        "endpoint": endpoint,
        "model": request.model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "sample": request.sample,
        "prompt_version": request.prompt_version,
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def endpoint_of(base_url: str, *, keep_port: bool = True) -> str:
    """The address of the API as the ledger knows it: ``api.openai.com/v1``, ``http://127.0.0.1:8000/v1``.

    Args:
        base_url: Address with scheme; ``https`` and the usual ports are left out of what is returned.
        keep_port: False for a server that has a new port in every run, and always the same model.

    Raises:
        ContrastRMError: It is no address of an API.
    """
    parts = check_address(base_url, name="the API base URL (--api_base_url, OPENAI_BASE_URL)", key="OPENAI_API_KEY")
    scheme = "http://" if parts.scheme == "http" else ""
    port = f":{parts.port}" if keep_port and parts.port not in (None, 80 if scheme else 443) else ""
    return f"{scheme}{parts.hostname}{port}{parts.path.rstrip('/')}"


class LlmClient:
    """Asks one OpenAI-compatible server. All retrying happens here: the library's own is switched off."""

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        max_attempts: int = 6,
        request_timeout: float = 120.0,
        first_wait_seconds: float = 1.0,
        keep_port: bool = True,
    ) -> None:
        """Check the settings; no request is sent.

        Args:
            api_key: Sent with every request, shown nowhere.
            base_url: Address of the API, up to and including its version.
            max_attempts: Attempts a request, the first one included.
            request_timeout: Seconds for one attempt.
            first_wait_seconds: Upper bound of the first pause; it doubles from attempt to attempt.
            keep_port: See ``endpoint_of``.

        Raises:
            ContrastRMError: The key or the base URL cannot be used.
        """
        self._key = api_key.strip()
        if not self._key or not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            message = "OPENAI_API_KEY is empty or holds characters that no key has; set it to the key alone"
            raise FatalApiError(message, reason="bad_key")
        self.endpoint = endpoint_of(base_url, keep_port=keep_port)
        parts = urlsplit(base_url)
        self.host = parts.hostname or ""
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._proxy = proxy_of(parts)
        self._max_attempts = max(1, max_attempts)
        self._timeout = request_timeout
        # Parameters that a request was answered without, after the server had refused them by name.
        self.refused_parameters: set[str] = set()
        self._backoff = wait_random_exponential(multiplier=first_wait_seconds, max=MAX_WAIT_SECONDS)
        self._connections = Connections({"authorization": f"Bearer {self._key}"}, request_timeout)

    async def __aenter__(self) -> LlmClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connections.__aexit__(kind, error, trace)

    def scrub(self, text: str) -> str:
        """Take keys out of a text that people or files will see."""
        return _KEY_LIKE.sub("[key]", text.replace(self._key, "[key]"))

    async def complete(self, request: CompletionRequest, *, gate: Gate, breaker: Breaker, order: int) -> Completion:
        """Ask until there is an answer, an error that another attempt cannot mend, or no attempt left.

        An answer cut off at ``max_tokens`` is an answer here; ``usable`` sorts it out.

        Args:
            request: What to ask.
            gate: Holds each attempt back until it may be sent.
            breaker: Hears of each attempt's end.
            order: Place in the input: the gate lets the lowest in first.

        Raises:
            RetriableError: Every attempt was used up on errors that pass.
            RowError: This request cannot be answered.
            FatalApiError: No request can be answered.
        """
        need = request.need()
        n_attempts = 0
        refused: set[str] = set()

        async def attempt() -> Completion:
            nonlocal n_attempts
            n_attempts += 1
            return await self._pass_gate(request, refused, need, gate, breaker, order)

        def is_last(state: RetryCallState) -> bool:
            return self._is_last_attempt(state, breaker)

        def seconds_to_wait(state: RetryCallState) -> float:
            return self._seconds_to_wait(state, gate, breaker)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(RetriableError),
            stop=is_last,
            wait=seconds_to_wait,
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            completion: Completion = await retrying(attempt)
        except RetriableError as error:
            error.attempts = n_attempts
            try:
                raise_final(error, self.host)
            except RowError as row_error:
                row_error.attempts = n_attempts
                raise
        except RowError as error:
            error.attempts = n_attempts
            raise
        return replace(completion, attempts=n_attempts)

    async def _pass_gate(
        self, request: CompletionRequest, refused: set[str], need: Need, gate: Gate, breaker: Breaker, order: int
    ) -> Completion:
        """One attempt, with the gate and the breaker told how it went."""
        permit = await gate.enter(order, need)
        outcome: Completion | ApiError | None = None
        try:
            outcome = await self._attempt_without(refused, request)
            return outcome
        except ApiError as error:
            outcome = error
            raise
        finally:
            gate.leave(permit, outcome)
            if isinstance(outcome, Completion):
                breaker.succeed()
            elif outcome is not None and not isinstance(outcome, FatalApiError):
                breaker.fail(outcome)

    async def _attempt_without(self, refused: set[str], request: CompletionRequest) -> Completion:
        """One attempt; what the server refuses of its parameters is added to ``refused``, for the next one."""
        parameters = self._parameters(request, refused)
        try:
            completion = await self._attempt(parameters)
        except RowError as error:
            name = refused_parameter(error, parameters)
            if name is None or (refused | {name} | self.refused_parameters).issuperset(LIMIT_NAMES):
                raise
            refused.add(name)
            raise RetriableError(str(error), reason=REFUSED_PARAMETER, usage=error.usage) from None
        self._remember(refused)
        return completion

    async def _attempt(self, parameters: dict[str, Any]) -> Completion:
        async with self._connections.one() as session:
            try:
                # No redirects: prompts and key would go to whoever answers at the other address.
                async with session.post(
                    self._url, json=parameters, allow_redirects=False, proxy=self._proxy
                ) as response:
                    body = await response.read()
            except Exception as error:  # noqa: BLE001  # whatever the transport makes of what it receives
                # Without its chain: the library's error holds the request, and that holds the key.
                raise self._transport_error(error) from None
            completion = read_response(response.status, response.headers, body, self.scrub)
        if len(self._key) >= 16 and self._key in completion.text:
            usage = Usage(completion.prompt_tokens, completion.completion_tokens)
            raise RowError("the answer repeats the API key", reason="key_in_answer", usage=usage)
        return completion

    def _transport_error(self, error: Exception) -> RetriableError:
        cause = " ".join(self.scrub(str(error) or type(error).__name__).split())[:200]
        if isinstance(
            error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)
        ):
            return RetriableError(cause, reason="no_connection", usage=NOT_BILLED)
        if isinstance(error, TimeoutError):
            message = f"no answer within {self._timeout:g} s; --request_timeout sets the limit"
            return RetriableError(message, reason="timeout")
        return RetriableError(f"connection to {self.host} broke: {cause}", reason="broken_connection")

    def _parameters(self, request: CompletionRequest, refused: set[str]) -> dict[str, Any]:
        # OpenAI's newer models refuse `max_tokens`; most other servers know nothing else.
        names = LIMIT_NAMES if self.host != "api.openai.com" else LIMIT_NAMES[::-1]
        without = refused | self.refused_parameters
        parameters: dict[str, Any] = {
            "model": request.model,
            "messages": list(request.messages),
            next((name for name in names if name not in without), names[0]): request.max_tokens,
        }
        if request.temperature is not None and "temperature" not in without:
            parameters["temperature"] = request.temperature
        return parameters

    def _remember(self, refused: set[str]) -> None:
        """Keep to what brought an answer, and say so: another temperature is another answer."""
        if refused <= self.refused_parameters:
            return
        self.refused_parameters |= refused
        names = " and ".join(sorted(refused))
        message = f"note: {self.host} refuses {names} for this model"
        if "temperature" in refused:
            message += "; from here on the server's own temperature applies"
        print(message, file=sys.stderr, flush=True)

    def _is_last_attempt(self, state: RetryCallState, breaker: Breaker) -> bool:
        error = _error_of(state)
        if error is not None and error.reason == REFUSED_PARAMETER:
            return False  # each parameter is left out once, so this ends
        if error is not None and error.reason == "no_connection" and breaker.has_ever_succeeded:
            return False  # the network is down, and no request's fault: the breaker ends that
        limit = self._max_attempts
        if error is not None and error.reason in ("empty_answer", "unfinished"):
            limit = min(limit, PAID_TRIES)
        return state.attempt_number >= limit

    def _seconds_to_wait(self, state: RetryCallState, gate: Gate, breaker: Breaker) -> float:
        error = _error_of(state)
        if error is not None and error.reason == REFUSED_PARAMETER:
            return 0.0
        jitter: float = self._backoff(state)
        if error is not None and error.retry_after is not None:
            gate.pause(error.retry_after)
            # Not all waiting requests at the same instant: up to a tenth more, never less than asked for.
            return error.retry_after + min(jitter, 0.1 * error.retry_after)
        if breaker.is_outage:
            gate.pause(jitter)
        return jitter


def _error_of(state: RetryCallState) -> RetriableError | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, RetriableError) else None


def usable(recorded: Recorded, *, max_tokens: int, accept_cut_off: bool) -> Outcome:
    """What a recorded outcome is worth to a request: a cut-off answer only where it is accepted."""
    if isinstance(recorded, Completion) and recorded.finish_reason == "length" and not accept_cut_off:
        message = f"the answer was cut off at {max_tokens} tokens; raise --max_new_tokens"
        return RowError(message, reason="cut_off", attempts=recorded.attempts)
    return recorded


@dataclass(eq=False)
class _Stream:
    """One caller's view of the engine.

    Attributes:
        finished: Keys of finished requests, or the error that stops everything.
        tasks: The loop's tasks for it; touched on the loop alone.
    """

    finished: SimpleQueue[str | BaseException] = field(default_factory=SimpleQueue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(frozen=True)
class _Place:
    """A request's place in the output; its text is not kept."""

    key: str
    max_tokens: int
    accept_cut_off: bool


class Engine:
    """Sends the requests of one run: one ledger, one budget, one limit on concurrency, however many streams.

    The event loop starts with the first stream that has something to ask and ends with ``close``, which the
    ledger calls before it closes. Only what the ledger has recorded is given out, so that a resumed run gives
    out the same.
    """

    def __init__(
        self,
        client: LlmClient,
        ledger: Ledger,
        *,
        concurrency: int,
        budget: Budget | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_outage_seconds: float = MAX_OUTAGE_SECONDS,
        retry_failed: bool = False,
    ) -> None:
        """Send nothing yet.

        Args:
            client: Whom to ask.
            ledger: Where finished requests are found and recorded.
            concurrency: Calls at a time, at most.
            budget: What the run may spend; None: no limit.
            requests_per_minute: Calls a minute, at most (one second's worth may come at once).
            tokens_per_minute: Tokens a minute, by the estimate of ``Need`` before and the usage after a call.
            max_outage_seconds: Without one success for so long, a run stops.
            retry_failed: Ask again, once, what an earlier run recorded as failed.
        """
        self.client = client
        self.budget = budget or Budget()
        self.retry_failed = retry_failed
        self._ledger = ledger
        self._gate = Gate(
            concurrency=concurrency,
            budget=self.budget,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        self._breaker = Breaker(max_outage_seconds, count_refusals=not retry_failed)
        # Outcomes that an earlier command has recorded.
        self.n_from_ledger = 0
        self._n_submitted = 0
        # What this run could not get; the ledger does not hold it, so that the next run asks again.
        self._failed: dict[str, ApiError] = {}
        self._streams: set[_Stream] = set()
        self._fatal: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        ledger.call_before_close(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def known(self, request: CompletionRequest, key: str) -> Outcome | None:
        """The outcome that needs no call; None where there is none."""
        if (error := self._failed.get(key)) is not None:
            return error
        recorded = self._ledger.get(key)
        if recorded is None:
            return None
        outcome = usable(recorded, max_tokens=request.max_tokens, accept_cut_off=request.accept_cut_off)
        if self.retry_failed and isinstance(outcome, ApiError) and self._ledger.is_earlier(key):
            return None
        return outcome

    def stream(
        self, requests: Iterable[CompletionRequest], *, description: str = "requests", total: int | None = None
    ) -> Iterator[Outcome]:
        """One outcome a request, in the order of the requests: the answer, or the error as an object.

        Requests are read when they are needed: at most ``READ_AHEAD`` x concurrency beyond those finished, and
        ``WINDOW`` x concurrency beyond the first unfinished one. Equal requests are asked once. What the ledger
        holds is given out at once, and is not asked for again. Leaving the loop early calls off what is in
        flight.

        Raises:
            FatalApiError: The run cannot go on, or its budget is used up. What was answered so far is in the
                ledger.
        """
        stream = _Stream()
        read_ahead = READ_AHEAD * self._gate.concurrency
        window = WINDOW * self._gate.concurrency
        places: deque[_Place] = deque()
        unfinished: set[str] = set()
        source = iter(requests)
        has_more = True
        self._streams.add(stream)
        try:
            with tqdm(total=total, desc=description, unit="req") as bar:
                while True:
                    _take_finished(stream, unfinished)
                    is_ready = bool(places) and places[0].key not in unfinished
                    room = read_ahead if is_ready else window
                    while has_more and len(unfinished) < read_ahead and len(places) < room:
                        request = next(source, None)
                        if request is None:
                            has_more = False
                            break
                        key = request_key(request, self.client.endpoint)
                        places.append(_Place(key, request.max_tokens, request.accept_cut_off))
                        if key not in unfinished and self.known(request, key) is None:
                            unfinished.add(key)
                            self._submit(stream, key, request)
                        self.n_from_ledger += key not in unfinished and self._ledger.is_earlier(key)
                        _take_finished(stream, unfinished)
                    if not places:
                        return
                    if places[0].key in unfinished:
                        _take(stream.finished.get(), unfinished)
                        continue
                    outcome = self._outcome(places.popleft())
                    bar.update()
                    yield outcome
        finally:
            self._streams.discard(stream)
            self._call_off(stream)

    def _outcome(self, place: _Place) -> Outcome:
        error = self._failed.get(place.key)
        if error is not None:
            return error
        recorded = self._ledger.get(place.key)
        assert recorded is not None, "every finished request is recorded or failed"
        return usable(recorded, max_tokens=place.max_tokens, accept_cut_off=place.accept_cut_off)

    def _submit(self, stream: _Stream, key: str, request: CompletionRequest) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._thread is None:
            self._start()
        assert self._loop is not None
        self._n_submitted += 1
        self._loop.call_soon_threadsafe(self._begin, stream, key, request, self._n_submitted)

    def _start(self) -> None:
        ready: SimpleQueue[BaseException | None] = SimpleQueue()

        async def serve() -> None:
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            async with self.client:
                ready.put(None)
                await self._stopping.wait()
                tasks = [task for stream in list(self._streams) for task in stream.tasks]
                await _cancel(tasks)

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:
                ready.put(error)
                raise

        # A daemon: a caller that dies without closing anything must not hang in a thread.
        self._thread = threading.Thread(target=run, name="llm-engine", daemon=True)
        self._thread.start()
        error = ready.get()
        if error is not None:
            self._thread = None
            raise error

    def close(self) -> None:
        """Call off what is in flight and end the loop. A closed engine starts again with the next stream."""
        if self._thread is None:
            return
        assert self._loop is not None and self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = self._loop = self._stopping = None

    def _call_off(self, stream: _Stream) -> None:
        if self._thread is None or self._loop is None or not self._thread.is_alive():
            return
        # After every submission that is still on its way to the loop: both go through the same queue.
        asyncio.run_coroutine_threadsafe(_cancel(stream.tasks), self._loop).result()

    def _begin(self, stream: _Stream, key: str, request: CompletionRequest, order: int) -> None:
        if self._fatal is not None:
            return
        assert self._loop is not None
        task = self._loop.create_task(self._ask(key, request, order))
        stream.tasks.add(task)

        def finish(task: asyncio.Task[None]) -> None:
            stream.tasks.discard(task)
            if task.cancelled():
                return
            error = task.exception()
            if error is None:
                stream.finished.put(key)
            else:
                self._stop_all(error)

        task.add_done_callback(finish)

    async def _ask(self, key: str, request: CompletionRequest, order: int) -> None:
        outcome: Recorded
        try:
            outcome = await self.client.complete(request, gate=self._gate, breaker=self._breaker, order=order)
        except RowError as error:
            outcome = error
        except RetriableError as error:
            # Without its history: that holds the request with all its text, and the key.
            error.__context__ = None
            self._failed[key] = error.with_traceback(None)
            return
        self._ledger.add(key, request.model, outcome)

    def _stop_all(self, error: BaseException) -> None:
        """The first error that is nobody's own stops every stream."""
        if self._fatal is not None:
            return
        self._fatal = error
        for stream in list(self._streams):  # the callers' threads add to it
            stream.finished.put(error)
            for task in stream.tasks:
                task.cancel()


def _take(item: str | BaseException, unfinished: set[str]) -> None:
    if isinstance(item, BaseException):
        _raise(item)
    unfinished.discard(item)


def _raise(error: BaseException) -> NoReturn:
    # Without its chain: it names calls of the HTTP library, and those hold the key.
    raise error from None


def _take_finished(stream: _Stream, unfinished: set[str]) -> None:
    while True:
        try:
            item = stream.finished.get_nowait()
        except Empty:
            return
        _take(item, unfinished)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
