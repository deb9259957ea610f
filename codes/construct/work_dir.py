"""What the construct steps leave beside their output.

Reads and writes ``<work_dir>/failed.jsonl`` and ``<work_dir>/construction_report.json``. Each step replaces
its own part of both files, so that a repeated run counts nothing twice. Used by the steps, for example
``python -m codes.construct.gptout --work_dir output/construct …``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from codes.common.files import hold
from codes.common.llm_outcomes import ApiError
from codes.common.llm_session import LEDGER_FILE
from codes.common.records import ensure_writable_folder, iter_jsonl, write_json, write_jsonl

FAILED_FILE = "failed.jsonl"
REPORT_FILE = "construction_report.json"


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


def failure(record_id: str, step: str, reason: str, **details: Any) -> dict[str, Any]:
    """One row of ``failed.jsonl``; ``reason`` is a class for counting."""
    return {"id": record_id, "step": step, "reason": reason, **details}


def request_failure(record_id: str, step: str, error: ApiError, **details: Any) -> dict[str, Any]:
    """One row of ``failed.jsonl`` for a request that brought no answer.

    ``error_class`` is ``retriable`` (the next run asks again) or ``row`` (only with ``--retry_failed``).
    """
    about = {"error_class": error.error_class, "attempts": error.attempts, "message": str(error)}
    return failure(record_id, step, error.reason, **details, **about)


def write_failures(work_dir: str | Path, step: str, failures: Iterable[dict[str, Any]]) -> Path:
    """Replace a step's rows of ``failed.jsonl``, row by row; returns its path."""
    path = Path(work_dir) / FAILED_FILE
    kept = (row for _, row in iter_jsonl(path) if row.get("step") != step) if path.is_file() else ()
    write_jsonl(path, chain(kept, failures))
    return path


def write_report_section(work_dir: str | Path, step: str, section: dict[str, Any]) -> Path:
    """Replace a step's section of ``construction_report.json``; returns its path."""
    path = Path(work_dir) / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, report | {step: section})
    return path
