"""What the construct steps share: their requests, the answers that they append, their failures and their report.

A step reads preference records (JSONL) one by one and never holds a file in memory. Beside its output it leaves
``<work_dir>/failed.jsonl`` and its section of ``<work_dir>/construction_report.json``; it replaces its own part of both, so
that a repeated run counts nothing twice. Used by the steps, for example ``python -m codes.construct.gptout --help``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any, TypeVar

from codes.common.errors import ContrastRMError
from codes.common.files import hold
from codes.common.llm import ApiError, Outcome, Usage
from codes.common.llm_session import LEDGER_FILE
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    ensure_writable_folder,
    iter_jsonl,
    open_atomic,
    write_json,
    write_row,
)
from codes.construct.api import Api, open_api

FAILED_FILE = "failed.jsonl"
REPORT_FILE = "construction_report.json"
# Bad rows and messages that a report quotes; all are counted.
N_QUOTED = 20

Item = TypeVar("Item")


@contextmanager
def hold_work_dir(work_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a work folder while a step without a model runs. One with a model does so by its ledger.

    Raises:
        ContrastRMError: Another run is at work there, or the folder cannot be written.
    """
    folder = ensure_writable_folder(work_dir)
    in_use = f"another run is using {folder}; wait for it to end, or choose another --work_dir"
    with hold(folder / f"{LEDGER_FILE}.lock", in_use):
        yield


def run_with_client(args: argparse.Namespace, step: Callable[[Api | None], int], *, title: str, asks: bool) -> int:
    """Run a step with the client that its flags describe, or, where it asks no model, without one; returns its exit code."""
    if asks:
        api = open_api(args)
        with api.ledger:
            return step(api)
    if args.estimate:
        print(f"estimate for {title}: no model is asked; nothing to pay")
        return 0
    with hold_work_dir(args.work_dir):
        return step(None)


def warn_of_own_texts(judge: str, cure: str) -> None:
    """Say that a judge will read texts that it wrote itself."""
    print(
        f"warning: the judge {judge} wrote some of these answers itself, and models favour their own texts; {cure}",
        file=sys.stderr,
        flush=True,
    )


def ask_each(
    api: Api,
    items: Iterable[Item],
    prompts_of: Callable[[Item], Sequence[list[Message]]],
    description: str,
    *,
    total: int | None = None,
    accept_cut_off: bool = False,
    n_follow_ups: int = 0,
) -> Iterator[tuple[Item, list[Outcome]]]:
    """Each item with the outcomes of its prompts, in order; an item may have none.

    Items are taken as far ahead as the client asks ahead, and kept until their outcomes are there. So they may come from
    the outcomes of another call: its requests and those of this one are on their way at the same time.

    Args:
        api: Answers the prompts.
        items: What to ask about.
        prompts_of: The prompts of an item.
        description: Names the requests in the progress bar and in the estimate.
        total: Requests expected, for the progress bar.
        accept_cut_off: Whether an answer that ends at its token limit is of use.
        n_follow_ups: Requests sent later for each of these, for the estimate.
    """
    asked, answered = tee((item, prompts_of(item)) for item in items)
    prompts = (prompt for _, group in asked for prompt in group)
    outcomes = api.ask_stream(
        prompts, description, total=total, accept_cut_off=accept_cut_off, n_follow_ups=n_follow_ups
    )
    for item, group in answered:
        yield item, list(islice(outcomes, len(group)))
    # The stream says what it spent when it ends.
    assert next(outcomes, None) is None


# --- failures -------------------------------------------------------------------------------------------------------------


def failure(record_id: str, step: str, reason: str, **details: Any) -> dict[str, Any]:
    """One row of ``failed.jsonl``; ``reason`` is a class for counting."""
    return {"id": record_id, "step": step, "reason": reason, **details}


def request_failure(record_id: str, step: str, error: ApiError, **details: Any) -> dict[str, Any]:
    """One row of ``failed.jsonl`` for a request that brought no answer.

    ``error_class`` is ``retriable`` (the next run asks again) or ``row`` (only with ``--retry_failed``).
    """
    about = {"error_class": error.error_class, "attempts": error.attempts, "message": str(error)}
    return failure(record_id, step, error.reason, **details, **about)


@dataclass
class FailureLog:
    """A step's rows of ``failed.jsonl`` (``open_failures`` makes it).

    Attributes:
        reasons: How often each reason occurred.
        n_requests: Rows that come from a request without an answer (the others are texts that a gate refused).
        first_message: The first message of a row that has one.
    """

    path: Path
    step: str
    _handle: IO[str]
    reasons: Counter[str] = field(default_factory=Counter)
    n_requests: int = 0
    first_message: str | None = None

    def add(self, record_id: str, reason: str | ApiError, **details: Any) -> None:
        """Write a row; an error of a request brings its reason with it."""
        if isinstance(reason, ApiError):
            row = request_failure(record_id, self.step, reason, **details)
            self.n_requests += 1
        else:
            row = failure(record_id, self.step, reason, **details)
        self.reasons[row["reason"]] += 1
        if self.first_message is None:
            self.first_message = row.get("message")
        write_row(self._handle, row)

    def counts(self) -> dict[str, int]:
        """How often each reason occurred, the most frequent first."""
        return dict(self.reasons.most_common())

    def require_some(self, n_kept: int, n_planned: int) -> None:
        """Stop where a step brought nothing at all.

        Raises:
            ContrastRMError: With the most frequent reasons and the first message.
        """
        if n_kept or not n_planned:
            return
        raise ContrastRMError(
            f"none of {n_planned} generated texts can be used {self.explain(self.reasons)}; see {self.path}, then try "
            "another API_MODEL or mend the settings"
        )

    def explain(self, reasons: Counter[str]) -> str:
        """The most frequent reasons, and the first message."""
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(4))
        return f"({listed})" + (f"; first message: {self.first_message}" if self.first_message else "")


@contextmanager
def open_failures(work_dir: str | Path, step: str) -> Iterator[FailureLog]:
    """Replace a step's rows of ``failed.jsonl`` when the block ends well; those of other steps stay."""
    path = Path(work_dir) / FAILED_FILE
    with open_atomic(path) as handle:
        for _, row in iter_jsonl(path) if path.is_file() else ():
            if row.get("step") != step:
                write_row(handle, row)
        yield FailureLog(path, step, handle)


# --- the report -----------------------------------------------------------------------------------------------------------


def write_report_section(work_dir: str | Path, step: str, section: dict[str, Any]) -> None:
    """Replace a step's section of ``construction_report.json``."""
    path = Path(work_dir) / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, report | {step: section})


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


def print_summary(title: str, n_kept: int, n_planned: int, failures: dict[str, int], work_dir: Path) -> None:
    """One line of result, and one of failures with what to do about them."""
    print(f"{title}: {n_kept} of {n_planned} generated texts kept")
    if failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failures.items())
        print(
            f"not kept: {reasons} (see {work_dir}/{FAILED_FILE}; where no answer came, the same command asks again; "
            "against cut_off raise --max_new_tokens)"
        )


# --- injected answers -----------------------------------------------------------------------------------------------------


def injections_of(record: PreferenceRecord) -> list[dict[str, Any]]:
    """The origins of a record's injected answers; entries of another shape (of other tools) are left alone."""
    entries = record.extra.get("injections")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("index"), int)]


def original_rejected(record: PreferenceRecord) -> list[int]:
    """Positions in ``rejected`` of the answers that nobody injected."""
    injected = {entry["index"] for entry in injections_of(record)}
    return [position for position, bias in enumerate(record.bias_type) if bias is None and position not in injected]


def append_rejected(record: PreferenceRecord, text: str, *, bias: str | None, origin: dict[str, Any]) -> None:
    """Append an answer with its bias and its origin (``injections``), in place."""
    record.rejected.append(text)
    record.bias_type.append(bias)
    entry = {"index": len(record.rejected) - 1, "bias": bias} | origin
    record.extra["injections"] = [*injections_of(record), entry]
