"""The record of every finished request: append-only, resumable, small in memory.

Reads and appends to one JSONL file: a line a request, either its answer or the failure that another attempt
cannot mend. A later line of the same key replaces the earlier one. Used by ``codes.common.llm``; look at one
with ``python -m json.tool --json-lines output/construct/ledger.jsonl``.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

from codes.common import files
from codes.common.errors import ContrastRMError
from codes.common.llm_outcomes import Completion, RowError

Recorded: TypeAlias = Completion | RowError

DIGEST_BYTES = 16
_FIRST_SLOTS = 1024
_EMPTY = -1


class OffsetTable:
    """Digest (16 bytes) -> position in a file, at 36 to 72 bytes an entry where a dict needs some 150.

    Open addressing with linear probing; nothing is ever taken out. The digests are parts of a SHA-256, so
    their first bytes are as good as a hash.
    """

    def __init__(self) -> None:
        self._n = 0
        self._allocate(_FIRST_SLOTS)

    def _allocate(self, slots: int) -> None:
        self._slots = slots
        self._digests = bytearray(slots * DIGEST_BYTES)
        self._offsets = array("q", [_EMPTY]) * slots

    def __len__(self) -> int:
        return self._n

    def _slot(self, digest: bytes) -> int:
        """The slot that holds a digest, or the empty one where it belongs."""
        slot = int.from_bytes(digest[:8], "little") % self._slots
        while self._offsets[slot] != _EMPTY:
            start = slot * DIGEST_BYTES
            if self._digests[start : start + DIGEST_BYTES] == digest:
                break
            slot = slot + 1 if slot + 1 < self._slots else 0
        return slot

    def get(self, digest: bytes) -> int | None:
        """The position stored for a digest."""
        offset = self._offsets[self._slot(digest)]
        return None if offset == _EMPTY else offset

    def put(self, digest: bytes, offset: int) -> None:
        """Store a position; an earlier one of the same digest is replaced."""
        if 3 * (self._n + 1) > 2 * self._slots:
            self._grow()
        slot = self._slot(digest)
        self._n += self._offsets[slot] == _EMPTY
        self._digests[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES] = digest
        self._offsets[slot] = offset

    def _grow(self) -> None:
        digests, offsets = self._digests, self._offsets
        self._allocate(2 * self._slots)
        for slot, offset in enumerate(offsets):
            if offset != _EMPTY:
                digest = bytes(digests[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES])
                new = self._slot(digest)
                self._digests[new * DIGEST_BYTES : (new + 1) * DIGEST_BYTES] = digest
                self._offsets[new] = offset


class Ledger:
    """Append-only JSONL of finished requests, one line each, written at once. Threads may share it.

    A run that was killed may leave half a line at the end; opening cuts it off, and that one request is asked
    again. Opening it twice at a time is refused. Memory holds positions alone; texts are read back on demand.
    """

    def __init__(self, path: str | Path) -> None:
        """Lock, repair and index.

        Raises:
            ContrastRMError: Another run holds it, the folder cannot be written, or a line in the middle is
                not valid.
        """
        self.path = Path(path)
        self._mutex = threading.Lock()
        self._closers: list[Callable[[], None]] = []
        self._broken: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ContrastRMError(f"cannot write {self.path}: {reason}; choose another --work_dir") from error
        in_use = f"another run is using {self.path}; wait for it to end, or choose another --work_dir"
        self._lock = files.acquire(f"{self.path}.lock", in_use)
        try:
            self._offsets, self._end = _index(self.path)
            self._end_at_opening = self._end
            # Unbuffered: what a full disk refuses must not lie in a buffer and come back at the end.
            self._writer = self.path.open("ab", buffering=0)
            self._reader: BinaryIO = self.path.open("rb")
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Recorded | None:
        """What is recorded under a key (hex SHA-256): the answer, or the failure as an error object."""
        with self._mutex:
            offset = self._offsets.get(_digest(key))
            if offset is None:
                return None
            self._reader.seek(offset)
            line = self._reader.readline()
        return _read_row(json.loads(line))

    def is_earlier(self, key: str) -> bool:
        """Whether an earlier run recorded what stands under a key."""
        with self._mutex:
            offset = self._offsets.get(_digest(key))
        return offset is not None and offset < self._end_at_opening

    def add(self, key: str, model: str, outcome: Recorded) -> None:
        """Record an outcome. It survives a kill of this process from here on.

        Raises:
            ContrastRMError: The disk does not take it.
        """
        row = {"key": key, "model": model, **_to_row(outcome)}
        line = (json.dumps(row, ensure_ascii=True) + "\n").encode("ascii")
        with self._mutex:
            self._append(line)
            self._offsets.put(_digest(key), self._end)
            self._end += len(line)

    def _append(self, line: bytes) -> None:
        if self._broken is not None:
            raise ContrastRMError(self._broken)  # another line would be glued to the torn one
        try:
            n_written = self._writer.write(line)
            if n_written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            reason = error.strerror or error
            self._broken = f"cannot write {self.path}: {reason}; make room, then run the same command again"
            raise ContrastRMError(self._broken) from error

    def call_before_close(self, closer: Callable[[], None]) -> None:
        """Have something that writes here stopped before the file is closed under it."""
        self._closers.append(closer)

    def close(self) -> None:
        """Stop who writes, close the file, let the next run in."""
        try:
            while self._closers:
                self._closers.pop()()
        finally:
            try:
                self._reader.close()
                self._writer.close()
            finally:
                self._lock.release()


def _digest(key: str) -> bytes:
    return bytes.fromhex(key)[:DIGEST_BYTES]


def _to_row(outcome: Recorded) -> dict[str, Any]:
    if isinstance(outcome, Completion):
        return asdict(outcome)
    return {"failed": outcome.reason, "attempts": outcome.attempts, "message": str(outcome)}


def _read_row(row: dict[str, Any]) -> Recorded:
    if "failed" in row:
        return RowError(row["message"], reason=row["failed"], attempts=row["attempts"])
    attempts = row.get("attempts", 1)
    return Completion(row["text"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"], attempts)


def _index(path: Path) -> tuple[OffsetTable, int]:
    """The positions of all keys and the length of the file, after a torn end was cut off."""
    offsets = OffsetTable()
    good_bytes = 0
    if not path.exists():
        return offsets, good_bytes
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                row = json.loads(line)
                _read_row(row)
                digest = _digest(row["key"])
                if len(digest) < DIGEST_BYTES:
                    raise ValueError("a short key")
            except (ValueError, KeyError, TypeError):
                if handle.read(1):
                    message = f"{path}:{number}: not a ledger line; delete it (its request is then asked again)"
                    raise ContrastRMError(message) from None
                break
            # A whole object without its line feed is as torn as half a one: the next line would be glued to
            # it.
            if not line.endswith(b"\n"):
                break
            offsets.put(digest, good_bytes)
            good_bytes += len(line)
    if good_bytes < path.stat().st_size:
        os.truncate(path, good_bytes)
    return offsets, good_bytes
