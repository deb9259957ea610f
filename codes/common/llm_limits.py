"""What holds requests back: concurrency that adapts, limits a minute, a budget, and a breaker.

Reads and writes no files. All of it belongs to the one event loop of ``codes.common.llm``; only ``Spending``
is read from outside. Example: ``Budget(max_cost=5.0, price_in=0.15, price_out=0.6)``.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from codes.common.errors import ContrastRMError
from codes.common.llm_outcomes import NOT_AN_API_REASONS, NOT_BILLED, ApiError, Completion, FatalApiError, Usage

# A burst of refusals lowers the limit once; 0.7 and not 0.5, because the server's own back-off is obeyed
# besides.
DECREASE_FACTOR = 0.7
# From a half to the whole of --concurrency in eight round trips: steps of one would take minutes at 256.
INCREASE_SHARE = 1 / 16
# A limit a minute may be run ahead of by this many seconds' worth, so that it is reached at all.
BURST_SECONDS = 1.0
# So many failures in a row slow everybody down to the pace of one request's back-off …
OUTAGE_FAILURES = 10
# … and so many, over --max_outage_seconds, stop the run.
BREAKER_CALLS = 50
MAX_OUTAGE_SECONDS = 600.0
# Refusals of the request itself (400, 413, 422) come back at once: so many, with no success, mean that the
# settings are wrong and not the rows.
BREAKER_REFUSALS = 100
# So many calls that brought no answer of a chat API, before any that did, mean that the address is another server's.
NOT_AN_API_CALLS = 5
# Per message: role and delimiters.
TOKENS_A_MESSAGE = 16
CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Need:
    """What a call may use.

    Attributes:
        prompt_tokens: Upper bound: one token a byte (no byte-level tokenizer makes more) and some a message.
        likely_prompt_tokens: One token in four characters.
        completion_tokens: Upper bound, the request's own.
        model: Whose prices it has.
    """

    prompt_tokens: int
    likely_prompt_tokens: int
    completion_tokens: int
    model: str = ""

    @classmethod
    def of(cls, contents: list[str], max_tokens: int, model: str = "") -> Need:
        """The need of a request with these message texts."""
        n_bytes = sum(len(content.encode("utf-8", "replace")) for content in contents)
        likely = sum(len(content) for content in contents) // CHARACTERS_A_TOKEN
        overhead = TOKENS_A_MESSAGE * len(contents)
        return cls(n_bytes + overhead, likely + overhead, max_tokens, model)

    def usage(self) -> Usage:
        """The upper bound as a usage."""
        return Usage(self.prompt_tokens, self.completion_tokens)


@dataclass
class Spending:
    """What this run has used so far; answers found in the ledger cost nothing.

    Attributes:
        n_calls: Calls sent, attempts included.
        prompt_tokens: As the server counted them; of ``n_unknown_usage`` calls the upper bound.
        n_unknown_usage: Calls that broke after they were sent, or whose answer told no usage.
        cost: In the currency of the prices; None where a call had no price.
    """

    n_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    n_unknown_usage: int = 0
    cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in any one currency."""

    prompt: float
    completion: float

    @classmethod
    def of(
        cls, price_in: float | None, price_out: float | None, flags: str = "--price_in and --price_out"
    ) -> Price | None:
        """None without prices.

        Raises:
            ContrastRMError: One of them alone.
        """
        if (price_in is None) != (price_out is None):
            raise ContrastRMError(f"a cost needs both prices: give {flags} (per million tokens)")
        return None if price_in is None or price_out is None else cls(price_in, price_out)

    def cost_of(self, usage: Usage) -> float:
        """What a usage costs."""
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


class Budget:
    """What one launch may spend: reserved at its upper bound before a call, settled after it.

    Attributes:
        spent: By this command.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        model_prices: Mapping[str, Price | None] | None = None,
        earlier: Spending | None = None,
    ) -> None:
        """Check the limits.

        Args:
            max_requests: Calls, attempts included.
            max_tokens: Tokens in and out.
            max_cost: In the currency of the prices.
            price_in: Per million prompt tokens.
            price_out: Per million completion tokens.
            model_prices: Of models that have others; None: unknown.
            earlier: What earlier commands of the launch have spent of the same limits.

        Raises:
            ContrastRMError: A limit on the cost without prices, or one price alone.
        """
        self._price = Price.of(price_in, price_out)
        self._model_prices = dict(model_prices or {})
        self._earlier = earlier or Spending(cost=0.0)
        if max_cost is not None and self._price is None:
            raise ContrastRMError("--max_cost needs prices: give --price_in and --price_out (per million tokens)")
        unknown = [model for model, price in self._model_prices.items() if price is None]
        if max_cost is not None and (unknown or self._earlier.cost is None):
            what = f"of {', '.join(unknown)}" if unknown else "in the earlier commands of the launch"
            raise ContrastRMError(f"--max_cost needs the prices {what} too: give them, or leave --max_cost out")
        self._max_requests, self._max_tokens, self._max_cost = max_requests, max_tokens, max_cost
        self._used: dict[str, Usage] = {}
        self._reserved: dict[str, Usage] = {}
        self.spent = Spending(cost=None if self._price is None and not any(self._model_prices.values()) else 0.0)

    def cost_of(self, usage: Usage, model: str = "") -> float | None:
        """The price of a model's usage; None where its prices are unknown."""
        price = self._model_prices.get(model, self._price)
        return None if price is None else price.cost_of(usage)

    def _cost_of_all(self, *usages: Mapping[str, Usage]) -> float | None:
        costs = [self.cost_of(usage, model) for some in usages for model, usage in some.items()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def limit_in_the_way(self, need: Need) -> str | None:
        """The limit that a further call could break, as text that names its flag; None where there is none."""
        total = self.total()
        before = f", {self._earlier.n_calls} calls of it earlier in this launch" if self._earlier.n_calls else ""
        if self._max_requests is not None and total.n_calls + 1 > self._max_requests:
            return f"--max_requests {self._max_requests} (sent: {total.n_calls}{before})"
        held = [*self._reserved.values(), need.usage()]
        n_spent = total.prompt_tokens + total.completion_tokens
        n_most = n_spent + sum(usage.prompt_tokens + usage.completion_tokens for usage in held)
        if self._max_tokens is not None and n_most > self._max_tokens:
            return (
                f"--max_tokens {self._max_tokens} (used: {n_spent}{before}; the next call may need more than is left)"
            )
        held_cost = self._cost_of_all(self._reserved, {need.model: need.usage()})
        if (
            self._max_cost is None
            or held_cost is None
            or total.cost is None
            or total.cost + held_cost <= self._max_cost
        ):
            return None
        return (
            f"--max_cost {self._max_cost:g} (spent: {total.cost:.4f}{before}; the next call may cost more than is left)"
        )

    def total(self) -> Spending:
        """What the launch has spent so far."""
        earlier, spent = self._earlier, self.spent
        unknown = earlier.cost is None or spent.cost is None
        return Spending(
            earlier.n_calls + spent.n_calls,
            earlier.prompt_tokens + spent.prompt_tokens,
            earlier.completion_tokens + spent.completion_tokens,
            earlier.n_unknown_usage + spent.n_unknown_usage,
            None if unknown else (earlier.cost or 0.0) + (spent.cost or 0.0),
        )

    def reserve(self, need: Need) -> None:
        """Count a call as sent and set its upper bound aside."""
        self.spent.n_calls += 1
        self._reserved[need.model] = _sum(self._reserved.get(need.model, NOT_BILLED), need.usage())

    def settle(self, need: Need, usage: Usage | None) -> None:
        """Replace a call's upper bound by what it used; unknown: by the upper bound itself."""
        upper = need.usage()
        held = self._reserved[need.model]
        self._reserved[need.model] = _sum(held, Usage(-upper.prompt_tokens, -upper.completion_tokens))
        used = upper if usage is None else usage
        self.spent.n_unknown_usage += usage is None
        self.spent.prompt_tokens += used.prompt_tokens
        self.spent.completion_tokens += used.completion_tokens
        self._used[need.model] = _sum(self._used.get(need.model, NOT_BILLED), used)
        self.spent.cost = self._cost_of_all(self._used)


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(a.prompt_tokens + b.prompt_tokens, a.completion_tokens + b.completion_tokens)


class _Bucket:
    """A rate a minute with a burst of one second's worth. What needs more than a burst runs it into debt."""

    def __init__(self, per_minute: float) -> None:
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate * BURST_SECONDS)
        self._level = self._capacity
        self._filled_at: float | None = None

    def seconds_until(self, amount: float, now: float) -> float:
        if self._filled_at is not None:
            self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return max(0.0, (min(amount, self._capacity) - self._level) / self._rate)

    def take(self, amount: float) -> None:
        self._level -= amount

    def give_back(self, amount: float) -> None:
        self._level = min(self._capacity, self._level + amount)


@dataclass(frozen=True)
class Permit:
    """Leave to send one call, from ``Gate.enter``; it goes back through ``Gate.leave``."""

    need: Need
    entered_at: float


class Gate:
    """Lets calls in, the first in the order of the input first.

    Concurrency starts at its upper bound, falls by ``DECREASE_FACTOR`` on an overload (once a burst), and
    rises by ``INCREASE_SHARE`` of the upper bound a round trip while calls succeed.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        budget: Budget,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        self.concurrency = max(1, concurrency)
        self.limit = float(self.concurrency)
        self.budget = budget
        self._requests = _Bucket(requests_per_minute) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute) if tokens_per_minute else None
        self._in_flight = 0
        self._waiting: list[tuple[int, int, Need, asyncio.Future[Permit]]] = []
        self._n_entered = 0
        self._paused_until = 0.0
        self._decreased_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, order: int, need: Need) -> Permit:
        """Wait for leave to send a call; ``order`` is its place in the input.

        Raises:
            FatalApiError: The budget allows no further call (``reason`` is ``budget``).
        """
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self._n_entered += 1
        heapq.heappush(self._waiting, (order, self._n_entered, need, future))
        self._let_in()
        try:
            return await future
        except asyncio.CancelledError:
            # Let in and called off in the same turn of the loop: nothing was sent.
            if future.done() and not future.cancelled() and future.exception() is None:
                self.budget.spent.n_calls -= 1
                self.leave(future.result(), NOT_BILLED)
            raise

    def leave(self, permit: Permit, outcome: Completion | ApiError | Usage | None) -> None:
        """Give the place back and learn from what came: an answer, an error, or (None) a call that was cut short."""
        self._in_flight -= 1
        usage = _usage_of(outcome)
        self.budget.settle(permit.need, usage)
        if self._tokens is not None and usage is not None:
            used = usage.prompt_tokens + usage.completion_tokens
            self._tokens.give_back(_paced_tokens(permit.need) - used)
        if isinstance(outcome, Completion):
            self.limit = min(self.concurrency, self.limit + self.concurrency * INCREASE_SHARE / self.limit)
        elif isinstance(outcome, ApiError) and outcome.is_overload and permit.entered_at >= self._decreased_at:
            self.limit = max(1.0, self.limit * DECREASE_FACTOR)
            self._decreased_at = time.monotonic()
        self._let_in()

    def pause(self, seconds: float) -> None:
        """Let nobody in for some seconds from now."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _let_in(self) -> None:
        while self._waiting:
            need, future = self._waiting[0][2:]
            if future.done():  # called off
                heapq.heappop(self._waiting)
                continue
            if self._in_flight >= int(self.limit):
                return  # the next one to leave lets in
            now = time.monotonic()
            seconds = self._seconds_to_wait(need, now)
            if seconds > 0:
                self._call_again_in(seconds)
                return
            limit = self.budget.limit_in_the_way(need)
            if limit is not None:
                if self._in_flight:
                    return  # what is in flight may use less than was set aside for it
                heapq.heappop(self._waiting)
                future.set_exception(FatalApiError(_budget_message(limit), reason="budget"))
                continue
            heapq.heappop(self._waiting)
            self._take(need)
            future.set_result(Permit(need, now))

    def _take(self, need: Need) -> None:
        self._in_flight += 1
        self.budget.reserve(need)
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(_paced_tokens(need))

    def _seconds_to_wait(self, need: Need, now: float) -> float:
        seconds = self._paused_until - now
        if self._requests is not None:
            seconds = max(seconds, self._requests.seconds_until(1, now))
        if self._tokens is not None:
            seconds = max(seconds, self._tokens.seconds_until(_paced_tokens(need), now))
        return seconds

    def _call_again_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # A hair late rather than early: early means once more around.
        self._timer = asyncio.get_running_loop().call_later(seconds + 1e-3, self._let_in)


def _usage_of(outcome: Completion | ApiError | Usage | None) -> Usage | None:
    if isinstance(outcome, Completion):
        usage = Usage(outcome.prompt_tokens, outcome.completion_tokens)
        return None if usage == Usage(0, 0) else usage
    return outcome.usage if isinstance(outcome, ApiError) else outcome


def _paced_tokens(need: Need) -> int:
    # Servers estimate before they answer, much like this; the upper bound would halve the pace and more.
    return need.likely_prompt_tokens + need.completion_tokens


def _budget_message(limit: str) -> str:
    return (
        f"the budget is used up: {limit}. All answers so far are kept; raise the limit and run the same command "
        "again, and it goes on from there"
    )


class Breaker:
    """Stops a run that has no success any more.

    It stops after ``BREAKER_CALLS`` failures in a row over at least ``max_outage_seconds``, or after
    ``BREAKER_REFUSALS`` refusals of the request itself in a row. Any answer, a filtered one too, is a success:
    the server works.
    """

    def __init__(self, max_outage_seconds: float = MAX_OUTAGE_SECONDS, *, count_refusals: bool = True) -> None:
        self._max_outage_seconds = max_outage_seconds
        self._count_refusals = count_refusals
        self._reasons: Counter[str] = Counter()
        self._n_refusals = 0
        self._first_failure_at = 0.0
        self.has_ever_succeeded = False

    @property
    def is_outage(self) -> bool:
        """Whether so many calls in a row have failed that it is no accident."""
        return self._reasons.total() - self._n_refusals >= OUTAGE_FAILURES

    def succeed(self) -> None:
        """Count an answer."""
        self.has_ever_succeeded = True
        self._reasons.clear()
        self._n_refusals = 0

    def fail(self, error: ApiError) -> None:
        """Count a failure.

        Raises:
            FatalApiError: It is one too many (``reason`` is ``breaker``).
        """
        is_refusal = error.error_class == "row" and error.reason.startswith("http_")
        is_answer = error.error_class == "row" and not is_refusal and error.reason not in NOT_AN_API_REASONS
        if is_answer or error.reason == "empty_answer":
            return self.succeed()
        if is_refusal and not self._count_refusals:
            return self.succeed()
        if not self._reasons:
            self._first_failure_at = time.monotonic()
        self._reasons[error.reason] += 1
        self._n_refusals += is_refusal
        seconds = time.monotonic() - self._first_failure_at
        n_failed = self._reasons.total()
        if not self.has_ever_succeeded and n_failed >= NOT_AN_API_CALLS and set(self._reasons) <= NOT_AN_API_REASONS:
            message = (
                f"stopped: none of the first {n_failed} calls brought an answer of a chat API (last: {error}); check "
                "OPENAI_BASE_URL / --api_base_url, which usually ends in /v1"
            )
            raise FatalApiError(message, reason="not_an_api")
        if self._n_refusals >= BREAKER_REFUSALS or (n_failed >= BREAKER_CALLS and seconds >= self._max_outage_seconds):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common(4))
            cure = "check the settings" if self._n_refusals else "wait until the server answers again"
            message = (
                f"stopped: the last {n_failed} calls, over {seconds:.0f} s, all failed ({reasons}); last message: "
                f"{error}. All answers so far are kept; {cure}, then run the same command again"
            )
            raise FatalApiError(message, reason="breaker")
        return None
