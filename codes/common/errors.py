"""Errors that a user can act on: one line, with the cure. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ContrastRMError(Exception):
    """A problem that the user can mend; the message says how."""


class RecordError(ContrastRMError):
    """A row that breaks the data contract.

    Args:
        path: The file.
        line: 1-based line number in the file.
        field: The offending field, or ``"-"`` where the whole line is meant.
        found: What stands there.
        allowed: What may stand there.
    """

    def __init__(self, path: str | Path, line: int, field: str, found: object, allowed: str) -> None:
        self.path, self.line, self.field, self.found, self.allowed = str(path), line, field, found, allowed
        shown = repr(found)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{path}:{line}: field {field!r}: found {shown}; allowed: {allowed}")


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block becomes a warning: for what comes after a result that must not be lost.

    Args:
        what: Subject of the warning: "the learning curves".
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever it is
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        print(f"warning: {what} failed: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
