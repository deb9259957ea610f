"""Locks and flushing that also work on network file systems.

NFS, Lustre, CIFS and FUSE mounts often know no file locks (ENOLCK, EOPNOTSUPP, ENOSYS) or cannot flush a folder (EINVAL).
Neither is a reason to stop a run: a lock becomes a marker file there, and the flush of a folder's names is left out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from codes.common.errors import ContrastRMError

NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def sync(path: str | Path) -> None:
    """Flush a file, or a folder's list of names, to disk.

    Raises:
        OSError: The disk refuses it. A file system that cannot flush folders at all is no error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED or not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def permit(path: str | Path) -> None:
    """Give a file or folder the permissions that new ones get here: some writers make theirs private to the user."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if Path(path).is_dir() else 0o666) & ~mask)


def open_temporary(path: str | Path) -> tuple[int, str]:
    """Open a file beside another one, to be written and then renamed to it; the lock on it says that its writer lives.

    Returns:
        Descriptor and name.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                os.close(descriptor)
                Path(name).unlink()
                raise
        # Somebody who clears up may have come between the two calls.
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)


def remove_abandoned(path: str | Path) -> None:
    """Remove what killed processes left of ``open_temporary`` for a file.

    What living ones write stays, and so does everything where the file system knows no locks.
    """
    path = Path(path)
    temporary = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    for entry in list(os.scandir(path.parent)):
        if not temporary.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        with suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(entry.path).unlink()
            finally:
                os.close(descriptor)


@contextmanager
def hold(path: str | Path, in_use: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out while the block runs. The system gives the lock back when the process ends, however it ends.

    Args:
        path: The lock file; its folder exists.
        in_use: What to tell the user where another process holds it.
        wait: Wait for that process, and tell it after a few seconds, instead of failing at once.

    Raises:
        ContrastRMError: Another process holds it, or the lock file cannot be written.
    """
    lock = acquire(path, in_use, wait=wait)
    try:
        yield
    finally:
        lock.release()


def acquire(path: str | Path, in_use: str, *, wait: bool = False) -> BaseFileLock:
    """``hold`` for an object that releases the lock itself when it is closed."""
    # Where locks are missing, filelock's own fallback would mistake the empty file of a native lock for a marker.
    native = FileLock(path, fallback_to_soft=False)
    try:
        try:
            return _acquired(native, in_use, wait)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
        return _acquired(SoftFileLock(f"{path}.held"), in_use, wait)
    except OSError as error:
        reason = error.strerror or error
        raise ContrastRMError(f"cannot lock {path}: {reason}; choose a folder that you can write") from error


def _acquired(lock: BaseFileLock, in_use: str, wait: bool) -> BaseFileLock:
    try:
        lock.acquire(timeout=5 if wait else 0)
    except Timeout as error:
        if not wait:
            raise ContrastRMError(f"{in_use}{_marker_note(lock)}") from error
        print(f"{in_use}{_marker_note(lock)}", file=sys.stderr, flush=True)
        lock.acquire()
    return lock


def _marker_note(lock: BaseFileLock) -> str:
    """A marker outlives a process that was killed on another machine: nobody here can see that it has gone."""
    if not isinstance(lock, SoftFileLock):
        return ""
    return (
        f" (this file system knows no locks: {lock.lock_file} stands for one, and names the process and machine that hold it. "
        f"If that process has ended on a machine other than {socket.gethostname()}, delete the file)"
    )
