"""Locks and flushing on file systems that know neither, which a call that fails as theirs does stands for.

Run: ``python -m pytest tests/test_files.py``
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from codes.common.errors import ContrastRMError
from codes.common.files import hold, sync
from codes.common.ledger import Ledger
from codes.train.checkpoints import hold_folder

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@pytest.fixture(params=NO_LOCKS, ids=[errno.errorcode[number] for number in NO_LOCKS])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(_file: int, _operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_file_locks_runs_still_keep_each_other_out(tmp_path: Path) -> None:
    for _ in range(2):  # the second run starts after the first has ended
        with hold_folder(str(tmp_path)), pytest.raises(ContrastRMError, match="another run is writing"):
            with hold_folder(str(tmp_path)):
                pass
    for _ in range(2):
        with Ledger(tmp_path / "ledger.jsonl"), pytest.raises(ContrastRMError, match="another run is using"):
            Ledger(tmp_path / "ledger.jsonl")


@pytest.mark.usefixtures("no_locks")
def test_a_marker_that_another_machine_left_is_named_with_its_cure(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", "busy"):
        (marker,) = tmp_path.glob("*.held")
        left_over = marker.read_text(encoding="utf-8").replace(socket.gethostname(), "node-17")
    marker.write_text(left_over, encoding="utf-8")
    with pytest.raises(ContrastRMError, match=f"busy .*{marker}.*delete the file"), hold(tmp_path / "lock", "busy"):
        pass
    marker.unlink()
    with hold(tmp_path / "lock", "busy"):
        pass


def test_a_folder_that_cannot_be_flushed_is_no_error_and_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(stat.S_ISDIR(os.fstat(file).st_mode)))
    sync(tmp_path)
    assert flushed == [True]
    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(file)
