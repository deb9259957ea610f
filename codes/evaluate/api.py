"""What can be evaluated: anything that scores texts, and anything that judges pairs.

The bias evaluation and RewardBench need nothing but a ``TextScorer``; ``codes.common.scoring.Scorer`` is one
(a local reward model) and ``RemoteScorer`` is another (a reward server, over HTTP). An LLM judge, which sees
both answers at once and gives no scores, is a ``PairJudge``.

    python -m codes.evaluate.eval_rm --model_path my-server --reward_url http://localhost:8000/score
    vllm serve output/contrastive --runner pooling
    python -m codes.evaluate.eval_rm --model_path output/contrastive --reward_url http://localhost:8000/classify
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import aiohttp
import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

from codes.common.chat import Conversation, RefusedTexts
from codes.common.errors import ContrastRMError
from codes.common.records import Message, ReadReport, messages_to_text, too_many_bad
from codes.common.score_store import ScoreStore
from codes.common.scores import ScoreResult, count_tied
from codes.common.web import Connections, check_address, origin_of, proxy_of

RETRIABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
# vLLM's endpoints, and the field of an answer's entry that holds the numbers.
VLLM_ENDPOINTS = {"classify": "probs", "pooling": "data"}
# How servers say that a text is longer than their model takes: vLLM, SGLang, text-embeddings-inference.
TOO_LONG = re.compile(
    r"context length|max_model_len|(too|is) long|longer than|exceeds? .*(length|tokens)|must have less than", re.I
)
# Fewer raw scores than this may all lie in [0, 1] by chance.
MIN_SCORES_TO_SUSPECT = 20

Turns = list[Message]


class ServerBusyError(ContrastRMError):
    """The server did not answer this time; another try may help."""


class ServerRefusalError(ContrastRMError):
    """The server refused, and will refuse again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TextScorer(Protocol):
    """Gives every conversation a number; more is better."""

    def score(self, conversations: Sequence[Conversation], description: str = ...) -> ScoreResult:
        """Score every conversation, in the caller's order; NaN where a text was left out for its length."""
        ...


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer and what its results must say about it."""

    scorer: TextScorer
    model_path: str
    weight_hash: str
    description: dict[str, Any]


@dataclass(frozen=True)
class PairVerdict:
    """What a judge said of one pair.

    Attributes:
        winner: The better answer, by its position in the call. None where the judge's text could not be read
            as a verdict: that is no tie, and is counted apart.
        text: The judge's own words.
        reason: Why there is no winner: ``no_verdict``, or the reason of a request that failed.
    """

    winner: Literal["first", "second", "tie"] | None
    text: str
    reason: str | None = None


class PairJudge(Protocol):
    """Sees a prompt and two answers and names the better one.

    Callers ask in both orders: judges prefer positions.
    """

    def judge(self, pairs: Sequence[tuple[Conversation, Conversation]]) -> list[PairVerdict]:
        """Judge every pair (both conversations have the same prompt), in the caller's order."""
        ...


class RemoteScorer:
    """Scores by a reward server over HTTP. What it speaks follows from the end of its address.

    * ``…/classify`` and ``…/pooling``: vLLM (and SGLang's ``/v1/classify``). One conversation a request, as
      ``messages``, so that the server's own chat template renders it (lists of ``input`` texts would get BOS twice);
      many requests at a time. ``use_activation: false`` asks for the raw score: a sigmoid makes large scores tie. The
      model's name is looked up at ``/v1/models``.
    * any other address: ``{"texts": [...], "messages": [[...]]}`` brings ``{"scores": [...]}``. ``texts`` holds every
      conversation as plain text, ``messages`` the same as chat turns, for a server with a chat template of its own.
      One number a text comes back, in the same order.

    A text that the server says is too long has no score, as under ``--overlength drop``; it is counted. The environment variable
    REWARD_API_KEY, where it is set, is sent as a bearer token, and to no other address: redirects are refused.

    Args:
        url: Where to post.
        batch_size: Texts of one request to a server of the second kind.
        concurrency: Requests at a time to a server of the first kind.
        timeout_seconds: Longest wait for one whole answer.
        max_attempts: Tries for one request, with growing pauses, while the server is busy or unreachable.
        model: The model's name at a server that has several; None: its only one.

    Raises:
        ContrastRMError: The address is none, holds a secret, or lies behind a proxy of a kind that is not spoken.

    Source: https://docs.vllm.ai/en/stable/models/pooling_models/ and ``vllm/entrypoints/pooling`` (request and answer
        types).
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        concurrency: int = 16,
        timeout_seconds: float = 120.0,
        max_attempts: int = 5,
        model: str | None = None,
    ) -> None:
        self._parts = check_address(url, name="--reward_url", key="REWARD_API_KEY")
        self._proxy = proxy_of(self._parts)
        self.url = url
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self.max_attempts = max_attempts
        self.endpoint = self._parts.path.rstrip("/").rpartition("/")[2]
        self._model = model
        key = os.environ.get("REWARD_API_KEY", "").strip()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @property
    def is_vllm(self) -> bool:
        """Whether the address is one of vLLM's."""
        return self.endpoint in VLLM_ENDPOINTS

    def score(self, conversations: Sequence[Conversation], description: str = "scoring") -> ScoreResult:
        """Score every distinct conversation once; NaN where the server says that it is too long.

        Raises:
            ContrastRMError: The server cannot be reached, refuses, answers something else than one finite number a text, or
                finds every text too long.
        """
        started = time.perf_counter()
        keys = [json.dumps(conversation.turns(), sort_keys=True) for conversation in conversations]
        distinct = [json.loads(key) for key in dict.fromkeys(keys)]
        scores = asyncio.run(self._score_all(distinct, description)) if distinct else []
        values = dict(zip(dict.fromkeys(keys), scores, strict=True))
        n_dropped = sum(math.isnan(values[key]) for key in keys)
        if keys and n_dropped == len(keys):
            raise ContrastRMError(f"{self.url} finds every text too long: serve the model with a longer context")
        return ScoreResult(
            scores=np.array([values[key] for key in keys], dtype=np.float32),
            n_texts=len(keys),
            n_distinct=sum(not math.isnan(score) for score in scores),
            n_truncated=0,
            n_answer_cut=0,
            n_dropped=n_dropped,
            n_tokens=0,
            n_computed_tokens=0,
            seconds=time.perf_counter() - started,
        )

    async def _score_all(self, conversations: Sequence[Turns], description: str) -> list[float]:
        size = 1 if self.is_vllm else self.batch_size
        batches = [conversations[start : start + size] for start in range(0, len(conversations), size)]
        async with Connections(self._headers, self.timeout_seconds) as connections:
            name = await self._model_name(connections) if self.is_vllm else None
            found: list[list[float]] = [[] for _ in batches]
            with tqdm(total=len(conversations), desc=description, unit="text") as bar:

                async def work(places: Iterator[int]) -> None:
                    for place in places:  # the workers share one iterator: each batch is taken once
                        found[place] = await self._score_batch(connections, batches[place], name)
                        bar.update(len(batches[place]))

                await run_together(work, iter(range(len(batches))), self.concurrency if self.is_vllm else 1)
        scores = [score for batch in found for score in batch]
        known = [score for score in scores if not math.isnan(score)]
        if self.is_vllm and len(known) >= MIN_SCORES_TO_SUSPECT and all(0 <= score <= 1 for score in known):
            print(
                f"note: all {len(known)} scores of {self.url} lie in [0, 1]: the server seems to apply a sigmoid, which "
                'makes large scores tie; serve the model with problem_type "regression" in its config.json, or a vLLM '
                "that knows use_activation",
                file=sys.stderr,
            )
        return scores

    async def _score_batch(self, connections: Connections, batch: Sequence[Turns], model: str | None) -> list[float]:
        """The scores of one request; where one of its texts is too long, of a request a text."""
        try:
            if self.is_vllm:
                return [self._one_score(await self._ask(connections, self._vllm_body(batch[0], model)))]
            body = {"texts": [messages_to_text(turns) for turns in batch], "messages": batch}
            return self._scores_of(await self._ask(connections, body), len(batch))
        except ServerRefusalError as error:
            if error.status not in (400, 413, 422) or not (error.status == 413 or TOO_LONG.search(str(error))):
                raise
        if len(batch) == 1:
            return [math.nan]
        return [(await self._score_batch(connections, [turns], model))[0] for turns in batch]

    def _scores_of(self, answer: Any, n_texts: int) -> list[float]:
        """The scores of a plain JSON server."""
        scores = answer.get("scores") if isinstance(answer, dict) else None
        numbers = [_finite(score) for score in scores] if isinstance(scores, list) else []
        known = [number for number in numbers if number is not None]
        if len(known) != n_texts or len(numbers) != n_texts:
            raise ContrastRMError(
                f'{self.url} must answer {{"scores": [...]}}, {n_texts} finite numbers; got {_short(answer)}'
            )
        return known

    # --- vLLM ---

    def _vllm_body(self, turns: Turns, model: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": turns, "use_activation": False}
        if self.endpoint == "pooling":
            body |= {"task": "classify", "encoding_format": "float"}
        return body if model is None else body | {"model": model}

    def _one_score(self, answer: Any) -> float:
        data = answer.get("data") if isinstance(answer, dict) else None
        entry = data[0] if isinstance(data, list) and len(data) == 1 else None
        if not isinstance(entry, dict) or entry.get("index", 0) != 0:
            raise ContrastRMError(f"{self.url} must answer one entry of data a request; got {_short(answer)}")
        values = entry.get(VLLM_ENDPOINTS[self.endpoint])
        if isinstance(values, list) and values and all(isinstance(value, list) for value in values):
            values = values[-1]  # a value a token: the score is read at the last one
        number = _finite(values[0]) if isinstance(values, list) and len(values) == 1 else None
        if number is None:
            raise ContrastRMError(
                f"{self.url} must answer one finite number a text in {VLLM_ENDPOINTS[self.endpoint]!r}; got "
                f"{_short(values)}; is it a reward model with one label, served with --runner pooling?"
            )
        return number

    async def _model_name(self, connections: Connections) -> str | None:
        """The model to ask for; None where the server has no list of models."""
        base = self._parts.path.rstrip("/").removesuffix(f"/{self.endpoint}").removesuffix("/v1")
        address = self._parts._replace(path=f"{base}/v1/models").geturl()
        try:
            answer: Any = await self._retrying()(self._send, connections, address, None)
        except ServerRefusalError as error:
            if error.status in (404, 405):
                return self._model
            raise
        entries = answer.get("data") if isinstance(answer, dict) else None
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        if self._model in names:
            return self._model
        if len(names) == 1 and isinstance(names[0], str):
            return names[0]
        raise ContrastRMError(f"{address} lists {_short(names)}; give the name of one of these models as --model_path")

    # --- HTTP ---

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(ServerBusyError),
            stop=stop_after_attempt(self.max_attempts),
            wait=wait_random_exponential(multiplier=0.1, max=30),
            reraise=True,
        )

    async def _ask(self, connections: Connections, body: dict[str, Any]) -> Any:
        return await self._retrying()(self._send, connections, self.url, body)

    async def _send(self, connections: Connections, url: str, body: dict[str, Any] | None) -> Any:
        method = "GET" if body is None else "POST"
        async with connections.one() as session:
            try:
                # No redirects: texts and key would go to whoever answers at the other address.
                async with session.request(
                    method, url, json=body, allow_redirects=False, proxy=self._proxy
                ) as response:
                    content = await response.read()
            except TimeoutError:
                raise ServerBusyError(f"{url} gave no whole answer within {self.timeout_seconds:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # Without its chain: the library's error holds the request, and that holds the key.
                through = "" if self._proxy is None else f" through the proxy {origin_of(self._proxy)}"
                cure = "is the server up?" if self._proxy is None else "NO_PROXY names hosts that are asked directly"
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ServerBusyError(f"cannot reach {url}{through}: {reason}; {cure}") from None
            return self._read(url, response, content)

    def _read(self, url: str, response: aiohttp.ClientResponse, content: bytes) -> Any:
        """The JSON of a whole answer.

        Raises:
            ContrastRMError: It is a redirect, a refusal or no JSON.
        """
        if 300 <= response.status < 400:
            target = origin_of(response.headers.get("location", ""))
            raise ContrastRMError(
                f"{url} sends requests on to {target!r} (HTTP {response.status}), and nothing was sent there; if that is the "
                "right address, give it as --reward_url"
            )
        if response.status != 200:
            said = f"{url} answered {response.status} {response.reason}{_server_message(content)}; look at the server's log"
            if response.status in RETRIABLE_STATUSES:
                raise ServerBusyError(said)
            raise ServerRefusalError(said, response.status)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ContrastRMError(f"{url} answered no JSON: {content[:80]!r}") from error


async def run_together(work: Callable[[Iterator[int]], Awaitable[None]], places: Iterator[int], n_workers: int) -> None:
    """Run so many workers on one iterator; the first error ends them all."""
    tasks = [asyncio.ensure_future(work(places)) for _ in range(n_workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _server_message(content: bytes) -> str:
    """What the server itself says is wrong, shortened; nothing where it says nothing."""
    try:
        value = json.loads(content[:10_000])
    except (ValueError, RecursionError):
        return ""
    inner = value.get("error", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict):
        return ""
    said = next((inner[key] for key in ("message", "detail") if isinstance(inner.get(key), str)), "")
    return f" ({' '.join(said.split())[:200]})" if said else ""


def _short(value: Any) -> str:
    return json.dumps(value)[:120]


def _finite(value: Any) -> float | None:
    """The number as float32 holds it; None for what is no number, or none there (1e39, or 400 digits)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


# --- a score store before a server ---


class StoredScorer:
    """A scorer of another kind (a reward server) before a score store.

    Texts are handed on in the caller's order, ``TEXTS_AT_ONCE`` at a time, and stored together.
    """

    TEXTS_AT_ONCE = 256

    def __init__(self, inner: TextScorer, store: ScoreStore) -> None:
        self.inner = inner
        self.store = store

    def score(self, conversations: Sequence[Conversation], description: str = "scoring") -> ScoreResult:
        """Score what the store does not hold.

        Raises:
            ContrastRMError: That of the inner scorer or of the store.
        """
        started = time.perf_counter()
        keys = [self.store.key(json.dumps(text.turns(), sort_keys=True).encode()) for text in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        order = list(distinct)
        values = self.store.look_up(order)
        n_from_store = len(values)
        results = []
        for start in range(0, len(order), self.TEXTS_AT_ONCE):
            part = order[start : start + self.TEXTS_AT_ONCE]
            if any(key not in values for key in part):
                results.append(self.inner.score([distinct[key] for key in part], description))
                scores = results[-1].scores.tolist()
                # A text that was left out for its length has no score.
                found = {key: score for key, score in zip(part, scores, strict=True) if score == score}
                values |= self.store.add(found)
        missing = [key for key in keys if key not in values]
        return ScoreResult(
            scores=np.array([values.get(key, np.nan) for key in keys], dtype=np.float32),
            n_texts=len(keys),
            n_distinct=len(order) - len(set(missing)),
            n_truncated=sum(result.n_truncated for result in results),
            n_answer_cut=sum(result.n_answer_cut for result in results),
            n_dropped=len(missing),
            n_tokens=sum(result.n_tokens for result in results),
            n_computed_tokens=sum(result.n_computed_tokens for result in results),
            seconds=time.perf_counter() - started,
            n_from_store=n_from_store,
            n_tied_texts=count_tied(list(values.values())),
        )


# --- the rows of files ---


@dataclass(frozen=True)
class ScoredRow:
    """The texts of one row of a file, and which of them are compared with each other (by their places)."""

    file: str
    line: int
    texts: Sequence[Conversation]
    compared: Sequence[tuple[int, int]]

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


def score_rows(
    scorer: TextScorer, rows: Sequence[ScoredRow], reports: Iterable[ReadReport] = (), max_bad_rows: int = 0
) -> tuple[list[list[float]], ScoreResult]:
    """Score the texts of all rows in one call.

    A row with a text that the model's template refuses is a bad row of its file: it has no scores.

    Args:
        reports: Of the files, with the bad rows that they have already.

    Returns:
        The scores of each row, and what the scoring took.

    Raises:
        ContrastRMError: A file has more bad rows than allowed, or what the scorer raises.
    """
    texts = [text for row in rows for text in row.texts]
    owners = [number for number, row in enumerate(rows) for _ in row.texts]
    refused: dict[int, str] = {}
    try:
        result = scorer.score(texts, "scoring")
    except RefusedTexts as refusal:
        for place, reason in refusal.reasons.items():
            refused.setdefault(owners[place], f"{rows[owners[place]].place}: {reason}")
        _check_bad_rows(rows, refused, reports, max_bad_rows)
        accepted = [place for place, owner in enumerate(owners) if owner not in refused]
        part = scorer.score([texts[place] for place in accepted], "scoring")
        scores, seen_as = np.full(len(texts), np.nan, dtype=np.float32), np.full(len(texts), -1)
        scores[accepted] = part.scores
        seen_as[accepted] = part.seen_as
        result = replace(
            part, scores=scores, seen_as=tuple(seen_as.tolist()), n_texts=len(texts), refused=tuple(refused.values())
        )
    every = iter(result.scores.tolist())
    found = [[next(every) for _ in row.texts] for row in rows]
    return found, replace(result, equal_rows=tuple(_equal_rows(rows, result.seen_as)))


def _check_bad_rows(
    rows: Sequence[ScoredRow], refused: Mapping[int, str], reports: Iterable[ReadReport], max_bad_rows: int
) -> None:
    n_bad = Counter({report.path: len(report.bad) for report in reports})
    for number, message in refused.items():
        file = rows[number].file
        n_bad[file] += 1
        if n_bad[file] > max_bad_rows:
            raise too_many_bad(message, n_bad[file], max_bad_rows)


def _equal_rows(rows: Sequence[ScoredRow], seen_as: Sequence[int] | None) -> Iterator[str]:
    """Places of rows that compare two different texts which have become one to the model."""
    if seen_as is None:
        return
    start = 0
    for row in rows:
        numbers = seen_as[start : start + len(row.texts)]
        start += len(row.texts)
        if any(numbers[a] == numbers[b] != -1 and row.texts[a] != row.texts[b] for a, b in row.compared):
            yield row.place
