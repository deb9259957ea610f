"""Records on disk: tolerant readers with strict validation, and atomic writers.

Every reader names file, line, field, what was found and what is allowed. A bad row stops the run unless the caller allows
a number of them (``--max_bad_rows``); then the rows are counted and their messages returned. Nothing is dropped silently.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, TypeVar

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError, RecordError
from codes.common.files import open_temporary, permit, remove_abandoned

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
# Far more than any row of preference data has.
MAX_NESTING = 100
VERIFY_VALUES = ("CHOSEN_IS_BEST", "CHOSEN_NOT_BEST", "FAILED", "SKIPPED")

PREFERENCE_KEYS = {
    "id",
    "system",
    "question",
    "prompt",
    "messages",
    "chosen",
    "chosen_variants",
    "rejected",
    "bias_type",
    "similar_question",
    "verify_correctness",
    "source",
    "margin",
}
# What other tools put beside the question and their models read. Nothing here renders it: a row that has it is refused.
UNRENDERED_KEYS = {
    "audio",
    "audios",
    "chat_template_kwargs",
    "context",
    "documents",
    "functions",
    "history",
    "image",
    "images",
    "input",
    "instruction",
    "system_prompt",
    "tools",
    "video",
    "videos",
}
# The same inside a turn: some templates render these.
UNRENDERED_TURN_KEYS = (
    "audio",
    "documents",
    "function_call",
    "images",
    "name",
    "reasoning",
    "reasoning_content",
    "thinking",
    "tool_call_id",
    "tool_calls",
)
# A margin is a score gap: beyond this it is a mistake, and float32 losses would overflow.
LARGEST_MARGIN = 1e6


@dataclass(frozen=True)
class ChosenVariant:
    """The chosen answer with a bias cue added, its substance untouched."""

    text: str
    bias: str


@dataclass
class PreferenceRecord:
    """One prompt, one chosen and any number of rejected answers.

    Attributes:
        messages: The prompt as chat turns; the last one is a user turn.
        bias_type: Parallel to ``rejected``; None where nothing was injected.
        margins: Parallel to ``rejected``: the score gap that the chosen answer should have over each; None where the row says
            nothing. Empty where no answer of the row has one.
        extra: Every other key of the row; kept and written back.
        chosen_variants: The chosen answer with cues added.
        place: File and line that it was read from; empty where it was not.
    """

    id: str
    messages: list[Message]
    chosen: str
    rejected: list[str]
    bias_type: list[str | None]
    similar_question: str | None = None
    verify_correctness: str | None = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    margins: list[float | None] = field(default_factory=list)
    chosen_variants: list[ChosenVariant] = field(default_factory=list)
    place: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The prompt as one text: the user turn alone, or all turns with their roles."""
        return messages_to_text(self.messages)

    def to_row(self) -> dict[str, Any]:
        """The row as it is written: ``question`` for a single user turn, else ``messages``."""
        row: dict[str, Any] = {"id": self.id}
        if len(self.messages) == 1:
            row["question"] = self.messages[0]["content"]
        else:
            row["messages"] = self.messages
        row |= {"chosen": self.chosen, "rejected": self.rejected, "bias_type": self.bias_type}
        for key in ("similar_question", "verify_correctness", "source"):
            if getattr(self, key) is not None:
                row[key] = getattr(self, key)
        if self.margins:
            row["margin"] = self.margins
        if self.chosen_variants:
            row["chosen_variants"] = [asdict(variant) for variant in self.chosen_variants]
        return row | self.extra


@dataclass(frozen=True)
class BiasRecord:
    """One pairwise bias-evaluation row.

    Attributes:
        original: The two answers before the rewrite.
        rewritten: The two answers after it, in the same order.
        better: Index (0 or 1) of the answer that the label names as better.
    """

    line: int
    question: str
    original: tuple[str, str]
    rewritten: tuple[str, str]
    better: int


@dataclass(frozen=True)
class RefinementRecord:
    """One refinement-aware row: an answer and its refined version."""

    line: int
    question: str
    original_response: str
    rewritten_response: str


@dataclass(frozen=True)
class ReadReport:
    """What a reader saw. ``n_rows`` = ``n_good`` + ``len(bad)``; ``bad`` holds one message a bad row."""

    path: str
    n_rows: int
    n_good: int
    bad: list[str]


def messages_to_text(messages: list[Message]) -> str:
    """Chat turns as one text, for models and prompts that know no turns."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def enclose(name: str, text: str, *, among: Sequence[str] = (), attributes: str = "") -> str:
    """A text as a block ``<name>`` of a prompt.

    Args:
        name: The tag; numbered where a text holds it, so that nothing in a text opens or ends a block.
        text: What stands in the block.
        among: The other texts of the prompt.
        attributes: Of the opening tag.
    """
    texts = "\n".join([text, *among]).lower()
    tags = chain([name], (f"{name}-{number}" for number in count(2)))
    tag = next(tag for tag in tags if f"<{tag}" not in texts and f"</{tag}" not in texts)
    return f"<{tag}{attributes}>\n{text}\n</{tag}>"


def iter_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (1-based line number, parsed value) of every non-empty line.

    Raises:
        ContrastRMError: The file is missing or is not UTF-8.
        RecordError: A line is not JSON.
    """
    for line_number, raw in _iter_lines(path):
        yield line_number, _parse_line(path, line_number, raw)


def _iter_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    path = Path(path)
    if not path.is_file():
        raise ContrastRMError(f"file not found: {path}; check the path")
    with _open_bytes(path) as handle:
        for line_number, raw in enumerate(handle, start=1):
            if line_number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield line_number, raw


@contextmanager
def _open_bytes(path: Path) -> Iterator[Iterable[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            yield handle
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ContrastRMError(f"{path} is no whole gzip file ({error}); copy or fetch it again") from error


def _parse_line(path: str | Path, line_number: int, raw: bytes) -> Any:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(path, line_number, "-", str(error), "UTF-8 text") from error
    try:
        value = strict_json(line)
    # ValueError: malformed, NaN, or a number that Python does not convert.
    except (ValueError, RecursionError) as error:
        raise RecordError(path, line_number, "-", line.strip(), f"one JSON object a line ({error})") from error
    # What is read can be shown, copied and written again: Python does that by recursion, too.
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        raise RecordError(path, line_number, "-", line.strip(), f"at most {MAX_NESTING} levels of lists and objects")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two values and lose the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return found


_STRICT_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys)


def strict_json(text: str) -> Any:
    """Parse JSON that a person may have written.

    Raises:
        ValueError: It is malformed, holds NaN or a number too large, or one object has a key twice.
        RecursionError: It is nested too deeply.
    """
    return _STRICT_JSON.decode(text)


def _nesting(value: Any) -> int:
    """Levels of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    return depth


Row = TypeVar("Row")


def iter_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """Yield every row of a data file, good or bad: JSONL, ``.json`` (an array of objects, or JSONL) or ``.parquet``.

    Returns:
        Pairs of the 1-based line where the row begins (in Parquet: the row's number) and the row, or, where the row is
        no object, the error that says so. Blank lines are no rows.

    Raises:
        ContrastRMError: The file is missing, or is so broken that nobody can tell where its rows begin and end.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    lines = _iter_lines(path)
    if path.suffix == ".json" and (text := _array_text(path)) is not None:
        lines = _array_elements(path, text)
    for line_number, raw in lines:
        try:
            value = _parse_line(path, line_number, raw)
            if not isinstance(value, dict):
                raise RecordError(path, line_number, "-", value, "a JSON object")
        except RecordError as error:
            yield line_number, error
        else:
            yield line_number, value


def _array_text(path: Path) -> str | None:
    """The whole file where it holds one JSON array; None where it is JSONL under another name."""
    if not path.is_file():
        raise ContrastRMError(f"file not found: {path}; check the path")
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not raw.lstrip().startswith(b"["):
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ContrastRMError(f"{path}:{line}: {error}; the file must be UTF-8 text") from error


def _array_elements(path: Path, text: str) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array as raw text, each with the line where it begins."""
    decoder = json.JSONDecoder()  # NaN passes here; the caller reads the element again, strictly
    position, line, counted = text.index("[") + 1, 1, 0
    separator = "]"  # an empty array ends at once
    while True:
        position = _skip_blanks(text, position)
        line += text.count("\n", counted, position)
        counted = position
        if text.startswith("]", position) and separator == "]":
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken_array(path, line, text, position, str(error)) from error
        yield line, text[position:end].encode("utf-8", "surrogatepass")
        position = _skip_blanks(text, end)
        separator = text[position : position + 1]
        if separator == "]":
            continue
        if separator != ",":
            raise _broken_array(path, line, text, position, "a comma or the closing bracket is missing")
        position += 1
    if text[position + 1 :].strip():
        raise _broken_array(path, line, text, position + 1, "there is text after the array")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken_array(path: Path, line: int, text: str, position: int, reason: str) -> ContrastRMError:
    return ContrastRMError(
        f"{path}:{line}: the JSON array cannot be read from {text[position : position + 30]!r} on ({reason}); where its "
        "rows end is unknown, so none is used; mend the file or write one object a line (.jsonl)"
    )


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    if not path.is_file():
        raise ContrastRMError(f"file not found: {path}; check the path")
    # Here and not above: few runs need it.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ContrastRMError(f"cannot read {path} as Parquet: {reason}; fetch the file again") from error
    yield from enumerate(table.to_pylist(), start=1)


def read_rows(
    path: str | Path, parse: Callable[[Path, int, dict[str, Any]], Row], max_bad_rows: int
) -> tuple[list[Row], ReadReport]:
    """Read a data file (see ``iter_rows``) through a parser of single rows.

    Args:
        path: The file.
        parse: Makes a record of (file, line, row); raises ``RecordError`` where the row breaks the contract.
        max_bad_rows: Bad rows that are tolerated; they are counted and left out.

    Raises:
        ContrastRMError: Missing or broken file, more bad rows than allowed, or no good row.
    """
    path = Path(path)
    rows: list[Row] = []
    bad: list[str] = []
    for line_number, value in iter_rows(path):
        try:
            if isinstance(value, RecordError):
                raise value
            rows.append(parse(path, line_number, value))
        except RecordError as error:
            bad.append(str(error))
            if len(bad) > max_bad_rows:
                raise too_many_bad(error, len(bad), max_bad_rows) from error
    if not rows:
        raise ContrastRMError(f"{path}: no usable row ({len(bad)} bad); give a file with at least one good record")
    return rows, ReadReport(str(path), len(rows) + len(bad), len(rows), bad)


def too_many_bad(error: RecordError | str, n_bad: int, max_bad_rows: int) -> ContrastRMError:
    """What stops a run at the row that is one too many."""
    if max_bad_rows == 0:
        return ContrastRMError(f"{error} (mend the row, or allow bad rows with --max_bad_rows N)")
    return ContrastRMError(f"{error} (bad row number {n_bad}; --max_bad_rows allows {max_bad_rows})")


def text_field(path: Path, line: int, row: dict[str, Any], key: str, *, allow_empty: bool = False) -> str:
    """The text under a key.

    Raises:
        RecordError: It is absent, no text, empty (unless allowed), or no Unicode that can be written.
    """
    value = row.get(key)
    if not isinstance(value, str) or (not allow_empty and not value.strip()):
        found = "nothing" if key not in row else value
        raise RecordError(path, line, key, found, "a text" if allow_empty else "a non-empty text")
    _check_encodable(path, line, key, value)
    return value


def _check_encodable(path: Path, line: int, key: str, value: str) -> None:
    """A lone surrogate (JSON allows it) cannot be tokenised or written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(path, line, key, ascii(value), "text without lone surrogates") from error


def _optional_text(path: Path, line: int, row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None else text_field(path, line, row, key, allow_empty=True)


def _message_list(path: Path, line: int, key: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RecordError(path, line, key, value, "a non-empty list of {role, content}")
    messages = []
    for position, message in enumerate(value):
        where = f"{key}[{position}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RecordError(path, line, where, message, f"an object with role one of {', '.join(ROLES)}")
        if message["role"] == "system" and position:
            raise RecordError(path, line, where, message, "a system turn only at the start")
        for name in UNRENDERED_TURN_KEYS:
            if message.get(name):
                raise RecordError(path, line, f"{where}.{name}", message[name], "turns of role and content alone")
        messages.append({"role": message["role"], "content": text_field(path, line, message, "content")})
    return messages


def prompt_field(path: Path, line: int, row: dict[str, Any]) -> list[Message] | None:
    """The prompt, from ``messages``, ``question`` or ``prompt`` (text or turns); None where no such key stands."""
    found: dict[str, list[Message]] = {}
    for key in ("messages", "question", "prompt"):
        if row.get(key) is None or (key == "messages" and _repeats_an_answer(row)):
            continue
        if key == "messages" or isinstance(row[key], list):
            found[key] = _prompt_turns(path, line, key, row[key])
        else:
            found[key] = [{"role": "user", "content": text_field(path, line, row, key)}]
    first = next(iter(found.values()), None)
    for key, messages in found.items():
        if messages != first:
            raise RecordError(path, line, key, row[key], f"the same prompt as in {next(iter(found))!r}, or no such key")
    return None if first is None else _whole_prompt(path, line, row, first)


def question_field(path: Path, line: int, row: dict[str, Any], key: str = "question") -> str:
    """The prompt of a row whose format knows one question and nothing beside it.

    Raises:
        RecordError: It is absent or no text, or something stands beside it that would belong to the prompt.
    """
    user = [{"role": "user", "content": text_field(path, line, row, key)}]
    messages = prompt_field(path, line, row) or _whole_prompt(path, line, row, user)
    if messages != user:
        name = "system" if row.get("system") else key
        raise RecordError(path, line, name, row[name], "one question, without a system text or other turns")
    return user[0]["content"]


def _whole_prompt(path: Path, line: int, row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns with the row's ``system`` text before them, where it has one.

    Raises:
        RecordError: The turns have another system text, or the row has something else that would belong to the prompt.
    """
    for key in sorted(UNRENDERED_KEYS & row.keys()):
        value = row[key]
        is_rendered = isinstance(value, str) and (not value.strip() or value in messages_to_text(messages))
        if value and not is_rendered:
            cure = f"no {key!r} beside the prompt: nothing renders it (write it into the turns, or rename the key)"
            raise RecordError(path, line, key, value, cure)
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    turn = {"role": "system", "content": text_field(path, line, row, "system")}
    if messages[0]["role"] != "system":
        return [turn, *messages]
    if messages[0] != turn:
        raise RecordError(path, line, "system", system, "the system turn of the messages, or no such key")
    return messages


def _repeats_an_answer(row: dict[str, Any]) -> bool:
    """Some hub sets keep the whole chosen conversation in ``messages``, beside ``prompt``, ``chosen`` and ``rejected``."""
    return isinstance(row.get("chosen"), list) and row.get("messages") == row["chosen"]


def _prompt_turns(path: Path, line: int, key: str, value: Any) -> list[Message]:
    messages = _message_list(path, line, key, value)
    if messages[-1]["role"] != "user":
        raise RecordError(path, line, key, messages[-1]["role"], "a prompt whose last turn is a user turn")
    return messages


def _answer(path: Path, line: int, key: str, value: Any) -> tuple[list[Message] | None, str]:
    """An answer given as text, or as a list of turns whose last one is the answer (with the prompt before it)."""
    if isinstance(value, list):
        turns = _message_list(path, line, key, value)
        if turns[-1]["role"] != "assistant":
            raise RecordError(path, line, key, turns[-1]["role"], "turns that end with the assistant's answer")
        return turns[:-1] or None, turns[-1]["content"]
    if not isinstance(value, str) or not value.strip():
        raise RecordError(path, line, key, "nothing" if value is None else value, "a non-empty text or list of turns")
    _check_encodable(path, line, key, value)
    return None, value


def parse_preference_row(
    path: Path, line: int, row: dict[str, Any], *, require_rejected: bool = True
) -> PreferenceRecord:
    """Validate one preference row in any of the accepted shapes.

    Raises:
        RecordError: The row breaks the contract.
    """
    messages = prompt_field(path, line, row)
    prompt_of_chosen, chosen = _answer(path, line, "chosen", row.get("chosen"))
    prompts = [prompt_of_chosen] if prompt_of_chosen else []
    rejected: list[str] = []
    for position, value in enumerate(_rejected_list(path, line, row, require_rejected)):
        prompt, text = _answer(path, line, f"rejected[{position}]", value)
        prompts += [prompt] if prompt else []
        rejected.append(text)
    prompts = [_whole_prompt(path, line, row, prompt) for prompt in prompts]
    messages = _one_prompt(path, line, messages, prompts)
    _check_no_echo(path, line, chosen, rejected)
    extra = {key: value for key, value in row.items() if key not in PREFERENCE_KEYS}
    for key, value in extra.items():
        try:
            text = json.dumps({key: value}, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:  # of a Parquet file: bytes, dates, NaN
            raise RecordError(path, line, key, value, f"what JSON can hold ({error}); leave the column out") from error
        _check_encodable(path, line, key, text)
    record = PreferenceRecord(
        id="",
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        bias_type=_bias_types(path, line, row, len(rejected)),
        similar_question=_optional_text(path, line, row, "similar_question"),
        verify_correctness=_verdict(path, line, row),
        source=_optional_text(path, line, row, "source"),
        extra=extra,
        margins=_margins(path, line, row, len(rejected)),
        chosen_variants=_chosen_variants(path, line, row, chosen, rejected),
        place=f"{path}:{line}",
    )
    record.id = _content_id(record) if row.get("id") is None else id_field(path, line, row, "id")
    return record


def _rejected_list(path: Path, line: int, row: dict[str, Any], required: bool) -> list[Any]:
    value = row.get("rejected")
    if isinstance(value, str):
        return [value]
    if value is None and not required:
        return []
    if not isinstance(value, list) or (required and not value):
        found = "nothing" if "rejected" not in row else value
        raise RecordError(path, line, "rejected", found, "a text or a non-empty list of texts")
    if value and all(isinstance(item, dict) for item in value):
        return [value]  # hub style: one rejected conversation as a list of turns
    return value


def _one_prompt(path: Path, line: int, messages: list[Message] | None, prompts: list[list[Message]]) -> list[Message]:
    for prompt in prompts:
        if messages is None:
            messages = prompt
        elif prompt != messages:
            raise RecordError(path, line, "chosen/rejected", prompt, "the same prompt in all conversations of a row")
    if messages is None:
        raise RecordError(path, line, "question", "nothing", "question, prompt, messages, or turns inside chosen")
    if messages[-1]["role"] != "user":
        raise RecordError(path, line, "messages", messages[-1]["role"], "a prompt whose last turn is a user turn")
    return messages


def _check_no_echo(path: Path, line: int, chosen: str, rejected: list[str]) -> None:
    if chosen in rejected:
        position = rejected.index(chosen)
        raise RecordError(path, line, f"rejected[{position}]", chosen, "a text that differs from chosen")


def _bias_types(path: Path, line: int, row: dict[str, Any], n_rejected: int) -> list[str | None]:
    value = row.get("bias_type")
    if value is None:
        return [None] * n_rejected
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or len(value) > n_rejected:
        raise RecordError(path, line, "bias_type", value, f"a list of at most {n_rejected} entries (one per rejected)")
    for position, name in enumerate(value):
        if name is not None and name not in INJECTABLE:
            allowed = f"null or one of {', '.join(INJECTABLE)}"
            raise RecordError(path, line, f"bias_type[{position}]", name, allowed)
    # Older files list the injected answers only, and those stand at the end.
    return [None] * (n_rejected - len(value)) + value


def _margins(path: Path, line: int, row: dict[str, Any], n_rejected: int) -> list[float | None]:
    """One number for all rejected answers, or a list that is parallel to them (those appended later have none)."""
    value = row.get("margin")
    if not isinstance(value, list):
        value = [] if value is None else [value] * n_rejected
    if len(value) > n_rejected:
        raise RecordError(path, line, "margin", value, f"a number or a list of at most {n_rejected} (one per rejected)")
    for position, margin in enumerate(value):
        is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if margin is not None and not (is_number and abs(margin) <= LARGEST_MARGIN):
            allowed = f"null or a number of at most {LARGEST_MARGIN:.0f} in size"
            raise RecordError(path, line, f"margin[{position}]", margin, allowed)
    found = [None if margin is None else float(margin) for margin in value] + [None] * (n_rejected - len(value))
    return found if any(margin is not None for margin in found) else []


def _verdict(path: Path, line: int, row: dict[str, Any]) -> str | None:
    value = row.get("verify_correctness")
    if value is not None and value not in VERIFY_VALUES:
        raise RecordError(path, line, "verify_correctness", value, f"one of {', '.join(VERIFY_VALUES)}")
    return value


def _chosen_variants(
    path: Path, line: int, row: dict[str, Any], chosen: str, rejected: list[str]
) -> list[ChosenVariant]:
    value = row.get("chosen_variants")
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(path, line, "chosen_variants", value, "a list of {text, bias}")
    variants = []
    for position, variant in enumerate(value):
        where = f"chosen_variants[{position}]"
        if not isinstance(variant, dict) or not variant.keys() <= {"text", "bias"}:
            raise RecordError(path, line, where, variant, "an object with text and bias alone")
        text = text_field(path, line, {f"{where}.text": variant.get("text")}, f"{where}.text")
        if text == chosen or text in rejected:
            raise RecordError(
                path, line, f"{where}.text", text, "a text that differs from chosen and from every rejected"
            )
        if variant.get("bias") not in INJECTABLE:
            raise RecordError(path, line, f"{where}.bias", variant.get("bias"), f"one of {', '.join(INJECTABLE)}")
        variants.append(ChosenVariant(text, variant["bias"]))
    return variants


def _content_id(record: PreferenceRecord) -> str:
    """An id that two records share only where they say the same; keys that nothing here reads do not count."""
    row = record.to_row()
    content = {key: row[key] for key in sorted(row.keys() & PREFERENCE_KEYS - {"id"})}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def repeated_record(path: Path, line: int, row: dict[str, Any], record: PreferenceRecord, earlier: str) -> RecordError:
    """The error of a record whose id an earlier one has: without an id of its own it says the same word for word."""
    if row.get("id") is not None:
        return RecordError(path, line, "id", record.id, f"an id of its own ({earlier} has the same)")
    allowed = f"a record of its own: {earlier} says the same (delete one, or give each an id if both are meant)"
    return RecordError(path, line, "-", record.question, allowed)


def id_field(path: Path, line: int, row: dict[str, Any], key: str) -> str:
    """The name of a row, a text or a whole number; ``line-N`` where it has none.

    Raises:
        RecordError: It is something else.
    """
    value = row.get(key)
    if value is None:
        return f"line-{line}"
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RecordError(path, line, key, value, "a text or a whole number")
    _check_encodable(path, line, key, str(value))
    return str(value)


def read_preference_file(
    path: str | Path, *, max_bad_rows: int = 0, require_rejected: bool = True
) -> tuple[list[PreferenceRecord], ReadReport]:
    """Read preference records (shapes accepted: see ``parse_preference_row``).

    Raises:
        ContrastRMError: Missing file, more bad rows than allowed, no good row, or an id that occurs twice.
    """

    def parse(file: Path, line: int, row: dict[str, Any]) -> PreferenceRecord:
        record = parse_preference_row(file, line, row, require_rejected=require_rejected)
        if record.id in seen:
            raise repeated_record(file, line, row, record, f"line {seen[record.id]}")
        seen[record.id] = line
        return record

    seen: dict[str, int] = {}
    return read_rows(path, parse, max_bad_rows)


def iter_preference_file(
    path: str | Path, *, require_rejected: bool = True, skip_lines: Collection[int] = (), limit: int = 0
) -> Iterator[PreferenceRecord]:
    """Yield preference records one by one: the file is never held in memory.

    Args:
        path: The file.
        require_rejected: Whether a record without a rejected answer breaks the contract.
        skip_lines: 1-based numbers of lines to leave out (``CheckedPreferenceFile`` knows the bad ones).
        limit: The first N records only; 0 = all.

    Raises:
        ContrastRMError: Missing file, or a bad row. That two records have one id is not seen here: check the file first
            (``check_preference_file``).
    """
    path = Path(path)
    n_records = 0
    for line_number, raw in _iter_lines(path):
        if line_number in skip_lines:
            continue
        value = _parse_line(path, line_number, raw)
        if not isinstance(value, dict):
            raise RecordError(path, line_number, "-", value, "a JSON object")
        yield parse_preference_row(path, line_number, value, require_rejected=require_rejected)
        n_records += 1
        if n_records == limit:
            return


@dataclass(frozen=True)
class CheckedPreferenceFile:
    """A file of preference records that was read through once, and can be streamed any number of times.

    Attributes:
        report: What the check saw, up to the last record inside its limit.
        bad_lines: 1-based line numbers of the bad rows; they are left out.
    """

    path: Path
    report: ReadReport
    bad_lines: frozenset[int]
    require_rejected: bool

    def __len__(self) -> int:
        return self.report.n_good

    def __iter__(self) -> Iterator[PreferenceRecord]:
        """The records, one by one, in the order of the file."""
        return iter_preference_file(
            self.path, require_rejected=self.require_rejected, skip_lines=self.bad_lines, limit=self.report.n_good
        )


def check_preference_file(
    path: str | Path,
    *,
    max_bad_rows: int = 0,
    require_rejected: bool = True,
    limit: int = 0,
    see: Callable[[PreferenceRecord], None] | None = None,
) -> CheckedPreferenceFile:
    """Read a preference file through without keeping it, so that a bad row shows before hours of work.

    Args:
        path: The file.
        max_bad_rows: Bad rows that are tolerated; they are counted and left out.
        require_rejected: Whether a record without a rejected answer is a bad row.
        limit: The first N good records only; 0 = all.
        see: Called with each good record, for what a caller wants to know before it starts.

    Raises:
        ContrastRMError: Missing file, more bad rows than allowed, no good row, or an id that occurs twice.
    """
    path = Path(path)
    # Eight bytes an id: a hundred thousand of them cost a few megabytes.
    seen: set[int] = set()
    bad: list[str] = []
    bad_lines: set[int] = set()
    for line_number, raw in _iter_lines(path):
        try:
            value = _parse_line(path, line_number, raw)
            if not isinstance(value, dict):
                raise RecordError(path, line_number, "-", value, "a JSON object")
            record = parse_preference_row(path, line_number, value, require_rejected=require_rejected)
            digest = int.from_bytes(hashlib.blake2b(record.id.encode(), digest_size=8).digest())
            if digest in seen:
                raise repeated_record(path, line_number, value, record, "an earlier line")
        except RecordError as error:
            bad.append(str(error))
            bad_lines.add(line_number)
            if len(bad) > max_bad_rows:
                raise too_many_bad(error, len(bad), max_bad_rows) from error
            continue
        seen.add(digest)
        if see is not None:
            see(record)
        if len(seen) == limit:
            break
    if not seen:
        raise ContrastRMError(f"{path}: no usable row ({len(bad)} bad); give a file with at least one good record")
    report = ReadReport(str(path), len(seen) + len(bad), len(seen), bad)
    return CheckedPreferenceFile(path, report, frozenset(bad_lines), require_rejected)


def read_bias_file(path: str | Path, *, max_bad_rows: int = 0) -> tuple[list[BiasRecord], ReadReport]:
    """Read pairwise bias-evaluation rows in the public format.

    Raises:
        ContrastRMError: Missing file, more bad rows than allowed, or no good row.
    """
    return read_rows(path, _parse_bias_row, max_bad_rows)


def _parse_bias_row(path: Path, line: int, row: dict[str, Any]) -> BiasRecord:
    label = row.get("label")
    if label not in ("response1", "response2"):
        raise RecordError(path, line, "label", "nothing" if label is None else label, "response1 or response2")
    # An empty answer is a real defect of the public files: it is an answer that can be scored, so it is kept.
    texts = {
        key: text_field(path, line, row, key, allow_empty=True)
        for key in ("original_response1", "original_response2", "rewritten_response1", "rewritten_response2")
    }
    return BiasRecord(
        line=line,
        question=question_field(path, line, row),
        original=(texts["original_response1"], texts["original_response2"]),
        rewritten=(texts["rewritten_response1"], texts["rewritten_response2"]),
        better=0 if label == "response1" else 1,
    )


def read_refinement_file(path: str | Path, *, max_bad_rows: int = 0) -> tuple[list[RefinementRecord], ReadReport]:
    """Read refinement-aware rows.

    Raises:
        ContrastRMError: Missing file, more bad rows than allowed, or no good row.
    """

    def parse(file: Path, line: int, row: dict[str, Any]) -> RefinementRecord:
        return RefinementRecord(
            line=line,
            question=question_field(file, line, row),
            original_response=text_field(file, line, row, "original_response", allow_empty=True),
            rewritten_response=text_field(file, line, row, "rewritten_response", allow_empty=True),
        )

    return read_rows(path, parse, max_bad_rows)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically: a temporary file beside it, flushed to disk, then renamed.

    Raises:
        ContrastRMError: The folder cannot be made or written.
    """
    with open_atomic(path) as handle, _cannot_write(Path(path)):
        handle.write(text)


@contextmanager
def open_atomic(path: str | Path) -> Iterator[IO[str]]:
    """A file to write bit by bit that takes its name only when the block ends well: flushed to disk, then renamed.

    Raises:
        ContrastRMError: The folder cannot be made or written.
    """
    path = Path(path)
    temporary: str | None = None
    held: int | None = None
    try:
        with _cannot_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path)
            descriptor, temporary = open_temporary(path)
            held = os.dup(descriptor)  # the lock on the file outlasts its closing, until it has its name
            handle = os.fdopen(descriptor, "w", encoding="utf-8")
        try:
            yield handle
            with _cannot_write(path):
                handle.flush()
                os.fsync(handle.fileno())
        finally:
            # After a write that the disk refused, closing tries once more and would hide the first error.
            with suppress(OSError):
                handle.close()
        with _cannot_write(path):
            permit(temporary)
            os.replace(temporary, path)
        temporary = None
    finally:
        # Whatever went wrong (a full disk, text that is no UTF-8, Ctrl-C): nothing half-written stays.
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if held is not None:
            os.close(held)


@contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ContrastRMError(f"cannot write {path}: {reason}; choose a folder that you can write") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically, without holding the rows in memory."""
    with open_atomic(path) as handle:
        for row in rows:
            write_row(handle, row)


def write_row(handle: IO[str], row: Any) -> None:
    """Write one JSON value as a line.

    Raises:
        ContrastRMError: The disk refuses it.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        handle.write(line)
    except OSError as error:
        reason = error.strerror or error
        raise ContrastRMError(f"cannot write a row: {reason}; free some space or choose another folder") from error


def ensure_writable_folder(path: str | Path) -> Path:
    """Make a folder and prove that it can be written, before hours of work depend on it.

    Raises:
        ContrastRMError: It cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            # A full disk or an exhausted quota still makes empty files.
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise ContrastRMError(f"cannot write in {path}: {reason}; choose a folder that you can write") from error
    return path


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
