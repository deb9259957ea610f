"""What a chat completion comes to: an answer, or a typed error. Reads HTTP bodies, trusts nothing in them.

Reads and writes no files. ``python -m pytest tests/test_llm.py`` shows every fault and what it becomes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, NoReturn, TypeAlias

from codes.common.errors import ContrastRMError
from codes.common.web import origin_of

# A server that asks for a longer pause than this has run out of a daily quota: stopping is more use than
# sleeping.
MAX_RETRY_AFTER_SECONDS = 600.0

_FATAL_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "account_deactivated",
        "invalid_api_key",
        "model_not_found",
        "unsupported_country_region_territory",
    }
)
_RETRIABLE_STATUSES = frozenset({408, 409, 425, 429})
_ROW_STATUSES = frozenset({400, 413, 422})
# The two names of the limit on an answer's length. Never none of them: an answer without a limit has no bound on its cost.
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")
# "max_tokens is too large", "reduce the length of the messages": the request is too long, whatever the limit is called.
_TOO_LONG = re.compile(r"(?i)too (?:large|long|big|many)|exceed|context|at most|must be (?:less|at least|greater|>|<)")
# How servers say that an answer is whole: OpenAI, Hugging Face, Anthropic, Cohere and gateways to them.
_COMPLETE_ENDINGS = frozenset({"stop", "stop_sequence", "eos", "eos_token", "end_turn", "complete"})
_CUT_OFF_ENDINGS = frozenset({"length", "max_tokens", "max_output_tokens", "max_length", "model_length"})
_FILTERED_ENDINGS = frozenset(
    {"content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal", "guardrail_intervened"}
)
_BROKEN_ENDINGS = frozenset({"none", "null", "error", "abort", "aborted", "cancelled", "canceled", "failed", "unknown"})
_TEXT_PARTS = frozenset({"text", "output_text"})
_REASONING_PARTS = frozenset({"thinking", "reasoning", "redacted_thinking"})
# A reasoning model's servers often leave its reasoning in the content, some without the opening tag, which stands in their
# prompt. Without that tag only a closing one on a line's end counts: an answer may speak of such tags.
_LEADING_REASONING = re.compile(
    r"(?is)\A\s*<(think|thinking|thought|reasoning)>(?:.*?</\1>|.*)\s*|\A(?:(?!<think>).)*?</think>[ \t]*(?:\n\s*|\Z)"
)
# More than any model takes; a larger count is no count, and a float could not hold some of them.
MOST_TOKENS = 10**9
# What came is no answer of a chat API at all: a web page, another JSON, an error without a code under HTTP 200, answers of
# another form.
NOT_AN_API_REASONS = frozenset({"invalid_body", "error_body", "wrong_shape", "unfinished", "unknown_ending"})
# The server has too much to do, or is gone: fewer requests at a time are the answer.
_OVERLOAD_REASONS = frozenset(
    {"rate_limit", "timeout", "no_connection", "http_408", "http_502", "http_503", "http_504", "http_529"}
)


@dataclass(frozen=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int
    completion_tokens: int


NOT_BILLED = Usage(0, 0)


class ApiError(ContrastRMError):
    """A request that brought no answer.

    Attributes:
        reason: A short class name for counting, such as ``rate_limit`` or ``content_filter``.
        error_class: ``retriable``, ``row`` or ``fatal``.
        attempts: How often the request was sent.
        usage: What the last attempt used; None where nobody knows (a time-out may have been billed).
    """

    error_class: ClassVar[str] = "retriable"

    def __init__(self, message: str, *, reason: str, usage: Usage | None = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.usage = usage
        self.attempts = attempts

    @property
    def is_overload(self) -> bool:
        """Whether fewer requests at a time may help."""
        return self.reason in _OVERLOAD_REASONS


class RetriableError(ApiError):
    """Another attempt may succeed. As an outcome: every attempt was used up, and a later run asks again.

    Attributes:
        retry_after: Seconds that the server asked to wait, if it did.
    """

    def __init__(
        self, message: str, *, reason: str, retry_after: float | None = None, usage: Usage | None = None
    ) -> None:
        super().__init__(message, reason=reason, usage=usage)
        self.retry_after = retry_after


class FatalApiError(ApiError):
    """No request of this run can succeed; the run stops at once. The message says what to do."""

    error_class = "fatal"


class RowError(ApiError):
    """This request cannot succeed, others can."""

    error_class = "row"


@dataclass(frozen=True)
class Completion:
    """An answer. ``text`` is never empty. ``attempts``: how often the request was sent until it came."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    attempts: int = field(default=1, compare=False)


Outcome: TypeAlias = Completion | ApiError


def raise_final(error: RetriableError, host: str) -> NoReturn:
    """Raise what an error that passes becomes once every attempt is used up."""
    if error.reason == "empty_answer":
        raise RowError(str(error), reason=error.reason, usage=error.usage) from None
    if error.reason == "no_connection":
        message = f"cannot reach {host}: {error}; check OPENAI_BASE_URL and the network, then run again"
        raise FatalApiError(message, reason=error.reason, usage=error.usage) from None
    raise error


def refused_parameter(error: RowError, sent: Mapping[str, Any]) -> str | None:
    """The parameter that a refusal names and that another attempt can do without; None where there is none.

    Newer models take ``max_completion_tokens`` in place of ``max_tokens`` and no temperature but their own.
    """
    if error.reason not in ("http_400", "http_422"):
        return None
    text = str(error)
    named = [name for name in (*LIMIT_NAMES, "temperature") if name in sent and re.search(rf"\b{name}\b", text)]
    # The name of the other limit, which was not sent, stands there as the cure.
    return next((name for name in named if name == "temperature" or not _TOO_LONG.search(text)), None)


def read_response(status: int, headers: Mapping[str, str], body: bytes, scrub: Callable[[str], str]) -> Completion:
    """Read a whole HTTP response. ``scrub`` takes keys out of a text.

    Raises:
        ApiError: There is no answer in it. No response makes this raise anything else: an odd one ends one request, not the run.
    """
    try:
        if 200 <= status < 300:
            return parse_body(body, scrub)
        if 300 <= status < 400:
            raise _redirect_error(status, headers.get("location", ""), scrub)
        raise _status_error(status, _error_fields(body), scrub, retry_after=_retry_after(headers))
    except ApiError:
        raise
    except Exception as error:  # noqa: BLE001  # servers are more inventive than any list
        message = f"the server's answer cannot be read ({type(error).__name__})"
        raise RetriableError(message, reason="invalid_body") from None


def parse_body(body: bytes | str, scrub: Callable[[str], str] = str) -> Completion:
    """Read the body of an HTTP 200 answer, trusting nothing in it. JSON is UTF-8, whatever charset the server declares.

    Raises:
        RetriableError: It is cut off, not JSON, lacks its parts, is empty, or the model did not come to an end.
        RowError: The model refused, the server stopped it, or the answer has no form that can be read.
        FatalApiError: It holds an error that no further request will overcome.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RetriableError("the server's answer is not valid JSON", reason="invalid_body") from None
    if not isinstance(value, dict):
        raise RetriableError("the server's answer is not a JSON object", reason="invalid_body")
    if value.get("error"):
        raise _status_error(None, value["error"], scrub)
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and choice.get("error"):
        raise _status_error(None, choice["error"], scrub)
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise RetriableError("the server's answer holds no choices[0].message", reason="invalid_body")
    return _completion_of(choice, message, _usage(value.get("usage")), scrub)


def _completion_of(
    choice: dict[str, Any], message: dict[str, Any], usage: Usage | None, scrub: Callable[[str], str]
) -> Completion:
    finish_reason = _finish_reason(choice.get("finish_reason"), usage, scrub)
    if message.get("refusal"):
        raise RowError("the model refused to answer", reason="model_refusal", usage=usage)
    text = _without_reasoning(_joined_text(message.get("content"), usage))
    if not text.strip():
        if finish_reason == "length":
            cure = "no answer within --max_new_tokens; raise it (reasoning models need more)"
            raise RowError(cure, reason="cut_off", usage=usage)
        raise RetriableError("the answer is empty", reason="empty_answer", usage=usage)
    # A lone surrogate (half an emoji, escaped) could be neither tokenised nor written as UTF-8 later.
    text = text.encode("utf-8", "replace").decode("utf-8")
    used = usage or Usage(0, 0)
    return Completion(text, finish_reason, used.prompt_tokens, used.completion_tokens)


def _finish_reason(value: Any, usage: Usage | None, scrub: Callable[[str], str]) -> str:
    """``stop`` or ``length``; every other way to end is no answer, however much text stands beside it."""
    name = str(value or "none").lower()
    shown = scrub(f"finish_reason {value!r}"[:80])
    if name in _COMPLETE_ENDINGS:
        return "stop"
    if name in _CUT_OFF_ENDINGS:
        return "length"
    if name in _FILTERED_ENDINGS:
        raise RowError(
            f"the server's content filter stopped the answer ({shown})", reason="content_filter", usage=usage
        )
    if name in _BROKEN_ENDINGS:
        raise RetriableError(f"the server did not finish the answer ({shown})", reason="unfinished", usage=usage)
    raise RowError(f"the answer ended in a way that is not known ({shown})", reason="unknown_ending", usage=usage)


def _joined_text(content: Any, usage: Usage | None) -> str:
    """The answer's text, whole or in parts; parts that hold the model's reasoning are left out."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _REASONING_PARTS:
            continue
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RowError(
                "the answer's content is neither text nor a list of texts", reason="wrong_shape", usage=usage
            )
        texts.append(text)
    return "".join(texts)


def _without_reasoning(text: str) -> str:
    """An answer without the reasoning in front of it; reasoning that never ends leaves nothing."""
    return _LEADING_REASONING.sub("", text, count=1)


def _usage(value: Any) -> Usage | None:
    fields = value if isinstance(value, dict) else {}
    usage = Usage(_count(fields, "prompt_tokens"), _count(fields, "completion_tokens"))
    return None if usage == Usage(0, 0) else usage


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_TOKENS else 0


def _error_fields(body: bytes) -> Any:
    """What the body of an error says: its ``error``, all of it, or the text that it is."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body[:2000].decode("utf-8", "replace")
    return value.get("error") or value if isinstance(value, dict) else value


def _status_error(
    status: int | None, error: Any, scrub: Callable[[str], str], *, retry_after: float | None = None
) -> ApiError:
    """Sort an HTTP error, or (without a status) an ``error`` object under HTTP 200, as gateways send it."""
    fields = error if isinstance(error, dict) else {"message": error}
    text = fields.get("message") or fields.get("detail") or (json.dumps(fields) if status else "no message")
    # Scrubbed before it is cut: half a key would not be known as one.
    message = " ".join(scrub(str(text)).split())[:300] or "no message"
    code = str(fields.get("code"))
    if status is None and re.fullmatch("[45][0-9]{2}", code):
        status = int(code)
    sorted_error = _typed_by_status(status, {code, str(fields.get("type"))}, message, retry_after=retry_after)
    sorted_error.usage = NOT_BILLED
    return sorted_error


def _redirect_error(status: int, location: str, scrub: Callable[[str], str]) -> FatalApiError:
    message = (
        f"the server sends requests on to {scrub(origin_of(location))!r} (HTTP {status}), and nothing was sent there: prompts "
        "and key would go to whoever answers at that address. If it is the right one, set OPENAI_BASE_URL / --api_base_url to it"
    )
    return FatalApiError(message, reason="redirect", usage=NOT_BILLED)


def _typed_by_status(status: int | None, codes: set[str], message: str, *, retry_after: float | None) -> ApiError:
    fatal_code = next(iter(sorted(codes & _FATAL_CODES)), None)
    if fatal_code is not None or status in (401, 402, 403, 404):
        return FatalApiError(_fatal_message(status, fatal_code, message), reason=fatal_code or f"http_{status}")
    if "content_filter" in codes or "content_policy_violation" in codes:
        return RowError(f"the server's content filter refused the request: {message}", reason="content_filter")
    if status in _ROW_STATUSES:
        return RowError(f"HTTP {status}: {message}", reason=f"http_{status}")
    if status is None or status in _RETRIABLE_STATUSES or status >= 500:
        if retry_after is not None and retry_after > MAX_RETRY_AFTER_SECONDS:
            message = f"the server asks to wait {retry_after:.0f} s ({message}); run the command again after that"
            return FatalApiError(message, reason="long_wait")
        reason = "rate_limit" if status == 429 else f"http_{status}" if status else "error_body"
        return RetriableError(
            f"HTTP {status}: {message}" if status else message, reason=reason, retry_after=retry_after
        )
    return FatalApiError(f"HTTP {status}: {message}; check --api_base_url", reason=f"http_{status}")


def _fatal_message(status: int | None, code: str | None, message: str) -> str:
    if code in ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active") or status == 402:
        cure = "the account has no quota left; add credit or use another key, then run the same command again"
    elif status == 401 or code == "invalid_api_key":
        cure = "the server does not accept the key; check OPENAI_API_KEY"
    elif status == 404 or code == "model_not_found":
        cure = "no such model or address; check API_MODEL / --api_model and OPENAI_BASE_URL / --api_base_url"
    else:
        cure = "this key may not use this model or server; check the account's rights"
    return f"{cure} (server: {message})"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``retry-after-ms`` or ``Retry-After`` (a number or a date); None where it is of no use."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            seconds = float(milliseconds) / 1000
        elif (value := headers.get("retry-after")) is None:
            return None
        elif re.fullmatch(r"\s*[\d.]+\s*", value):
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if seconds > 0 and seconds != float("inf") else None
