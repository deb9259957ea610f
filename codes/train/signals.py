"""A run that is asked to stop: SIGTERM and SIGUSR1 become a checkpoint at the next step boundary and exit code 75.

Used by ``python -m codes.train.train_reward_model``. ``scripts/env.sh`` (``run_ranks``) is the other half where a launcher starts
several processes: that launcher turns every failure into exit code 1 and kills its processes 30 s after a SIGTERM, so the
processes name themselves and their exit code in the file ``CONTRASTRM_RANKS_FILE``, and the shell signals them one by one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from codes.common.cli import EXIT_USER_ERROR, is_first_process, launched_processes
from codes.common.errors import ContrastRMError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RANKS_FILE = "CONTRASTRM_RANKS_FILE"
# Schedulers signal a whole job: the same request reaches a process by several ways within a moment.
SECOND_SIGNAL_SECONDS = 2.0
# What a process gets to end by itself after another one has failed.
GRACE_SECONDS = 3.0
# What gloo and NCCL say on the ranks that are left when another one has died.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|NCCL.*(remote process exited|system error|aborted)|Timed out waiting",
    re.I,
)


class RunStopped(Exception):
    """The run was asked to stop and has done so between two steps; the message says how to go on."""


class StopSignals:
    """While it is open, SIGTERM and SIGUSR1 are noted instead of ending the process.

    A second SIGTERM, at least ``SECOND_SIGNAL_SECONDS`` later, ends it at once. SIGUSR1 may come any number of times.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._parent = os.getppid()

    @property
    def is_wanted(self) -> bool:
        """Whether the run should stop: a signal came, or the launcher of the ranks is gone and they are left alone."""
        return self.requested is not None or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent)

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers, and only it would run them.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            tell_launcher(f"rank {os.getpid()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), now
            if is_first_process():
                # Not print: the signal may have come in the middle of one.
                text = f"\n{self.requested.name}: stopping after this step, with a checkpoint; SIGTERM again stops at once\n"
                os.write(2, text.encode())
        elif number == signal.SIGTERM and now - self._since >= SECOND_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def agree(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """Which wishes any rank has; the same answer on all ranks, which must call it together."""
    if accelerator.num_processes == 1:
        return list(wishes)
    votes = torch.tensor([float(wish) for wish in wishes], device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(votes, reduction="sum").tolist()]


def tell_launcher(line: str) -> bool:
    """Add a line to the file that ``run_ranks`` reads; False where nobody reads."""
    file = os.environ.get(RANKS_FILE)
    if not file or not Path(file).is_file():
        return False
    # One write: the ranks share the file.
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
    return True


@contextmanager
def failures_told() -> Iterator[None]:
    """Tell the launcher's shell of an error that the user can mend, and say plainly when another rank has died.

    An error of another rank that is told there ends this one too, whatever it waits for: in a collective that the other will
    never join it hears no signal, and its launcher would kill it after half a minute.
    """
    over = threading.Event()
    if os.environ.get(RANKS_FILE):
        threading.Thread(target=_leave_with_others, args=(over,), daemon=True).start()
    try:
        yield
    except ContrastRMError:
        over.set()
        tell_launcher(f"exit {EXIT_USER_ERROR}")
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(
            "error: another process of this run has died (the launcher says which, below): this one cannot go on "
            f"({str(error).splitlines()[0][:200]}). The checkpoints are whole: continue with --resume auto (RESUME=auto)",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from error
    finally:
        over.set()


def _leave_with_others(over: threading.Event) -> None:
    """End this process once another one has told of an error, unless it ends by itself within ``GRACE_SECONDS``."""
    file, failure = Path(os.environ[RANKS_FILE]), f"exit {EXIT_USER_ERROR}"
    while not over.wait(0.5):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError:  # the shell that reads it has gone
            return
        if failure in lines:
            # Most errors are every rank's, and each says so itself.
            if not over.wait(GRACE_SECONDS):
                os._exit(EXIT_USER_ERROR)
            return


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return launched_processes() > 1 and LOST_PEER.search(str(error)) is not None
