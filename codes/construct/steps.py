"""What the construct steps have in common: they read, ask, count and account for records one by one.

Reads preference records (JSONL) as often as needed and never holds a file in memory; writes what ``FailureLog`` collects to
``<work_dir>/failed.jsonl``. Used by the steps, for example ``python -m codes.construct.gptout --help``.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from codes.common.errors import ContrastRMError
from codes.common.llm import Outcome, Usage
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    check_preference_file,
    ensure_writable_folder,
    write_row,
)
from codes.construct.api import Api
from codes.construct.work_dir import write_failures

Item = TypeVar("Item")
# Bad rows and messages that a report quotes; all are counted.
N_QUOTED = 20


def check_input(
    input_file: Path,
    *,
    max_bad_rows: int,
    limit: int,
    see: Callable[[PreferenceRecord], None] | None = None,
    require_rejected: bool = False,
) -> CheckedPreferenceFile:
    """Read a step's input through before anything is asked; a writing step welcomes records without a rejected answer.

    Raises:
        ContrastRMError: Unusable input, or what ``see`` raises.
    """
    return check_preference_file(
        input_file, max_bad_rows=max_bad_rows, require_rejected=require_rejected, limit=limit, see=see
    )


def ask_groups(
    api: Api,
    read_groups: Callable[[], Iterable[tuple[Item, Sequence[list[Message]]]]],
    description: str,
    *,
    total: int | None = None,
    accept_cut_off: bool = False,
    n_follow_ups: int = 0,
) -> Iterator[tuple[Item, list[Outcome]]]:
    """Each item with the outcomes of its prompts, in order; an item may have none.

    The groups are read twice at a time, once ahead to ask and once behind to pair, so that nothing has to be kept between:
    ``read_groups`` must give the same groups every time.
    """
    prompts = (prompt for _, group in read_groups() for prompt in group)
    outcomes = api.ask_stream(
        prompts, description, total=total, accept_cut_off=accept_cut_off, n_follow_ups=n_follow_ups
    )
    for item, group in read_groups():
        received = list(islice(outcomes, len(group)))
        assert len(received) == len(group), "read_groups gave other groups the second time"
        yield item, received
    # The stream says what it spent when it ends.
    assert next(outcomes, None) is None


class FailureLog:
    """A step's rows of ``failed.jsonl``, kept on disk until ``commit``.

    Attributes:
        reasons: How often each reason occurred.
        n_requests: Rows that come from a request without an answer (the others are texts that a gate refused).
        first_message: The first message of a row that has one.
    """

    def __init__(self, work_dir: str | Path, step: str) -> None:
        self._work_dir, self._step = Path(work_dir), step
        # On the disk where they end anyway: the usual place for temporary files may be small.
        folder = ensure_writable_folder(work_dir)
        self._rows = tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115  (closed by __exit__)
        self.reasons: Counter[str] = Counter()
        self.n_requests = 0
        self.first_message: str | None = None

    def __enter__(self) -> FailureLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()

    def __len__(self) -> int:
        return self.reasons.total()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row (``work_dir.failure`` or ``work_dir.request_failure`` makes it)."""
        self.reasons[row["reason"]] += 1
        self.n_requests += "error_class" in row
        if self.first_message is None:
            self.first_message = row.get("message")
        write_row(self._rows, row)

    def commit(self) -> Path:
        """Replace the step's rows of ``failed.jsonl``; returns its path."""
        self._rows.seek(0)
        return write_failures(self._work_dir, self._step, (json.loads(line) for line in self._rows))

    def counts(self) -> dict[str, int]:
        """How often each reason occurred, the most frequent first."""
        return dict(self.reasons.most_common())


def read_counts(source: CheckedPreferenceFile) -> dict[str, Any]:
    """What a report says about the input of a step."""
    return {
        "input_file": source.report.path,
        "n_rows": source.report.n_rows,
        "n_bad_rows": len(source.report.bad),
        "bad_rows": source.report.bad[:N_QUOTED],
        "n_records": source.report.n_good,
    }


def usage_counts(api: Api | None) -> dict[str, Any]:
    """What a report says about the requests of a step; nothing where nobody was asked.

    ``cost`` is that of all answers that the step used, those of earlier runs included; null without prices.
    """
    if api is None:
        return {}
    usage = Usage(api.counts.prompt_tokens, api.counts.completion_tokens)
    return api.summary() | {"cost": api.engine.budget.cost_of(usage, api.model)}


def injections_of(record: PreferenceRecord) -> list[dict[str, Any]]:
    """The origins of a record's injected answers; entries of another shape (of other tools) are left alone."""
    entries = record.extra.get("injections")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("index"), int)]


def append_rejected(record: PreferenceRecord, text: str, *, bias: str | None, origin: dict[str, Any]) -> None:
    """Append an answer with its bias and its origin (``injections``), in place."""
    record.rejected.append(text)
    record.bias_type.append(bias)
    entry = {"index": len(record.rejected) - 1, "bias": bias} | origin
    record.extra["injections"] = [*injections_of(record), entry]


def require_some(n_kept: int, n_planned: int, failures: FailureLog, failed_file: Path) -> None:
    """Stop where a step brought nothing at all.

    Raises:
        ContrastRMError: With the most frequent reasons and the first message.
    """
    if n_kept or not n_planned:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in list(failures.counts().items())[:4])
    message = f"; first message: {failures.first_message}" if failures.first_message else ""
    raise ContrastRMError(
        f"none of {n_planned} generated texts can be used ({reasons}){message}; see {failed_file}, then try another "
        "API_MODEL or mend the settings"
    )


def print_summary(title: str, n_kept: int, n_planned: int, failures: dict[str, int], work_dir: Path) -> None:
    """One line of result, and one of failures with what to do about them."""
    print(f"{title}: {n_kept} of {n_planned} generated texts kept")
    if failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failures.items())
        print(
            f"not kept: {reasons} (see {work_dir}/failed.jsonl; where no answer came, the same command asks again; "
            "against cut_off raise --max_new_tokens)"
        )
