"""The one way in which a module's ``main`` becomes a process: exit codes and error lines."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from codes.common.errors import ContrastRMError

EXIT_USER_ERROR = 2
# Everything was written, but rows are missing because requests failed: the same command asks again.
EXIT_ROWS_MISSING = 3
# Asked to stop (SIGTERM, SIGUSR1) and stopped with everything saved: the same command goes on. EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What launchers of several processes set for each of them.
LAUNCH_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_PREFIXES = ("ACCELERATE_", "FSDP_", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")


def run(main: Callable[[list[str] | None], int]) -> NoReturn:
    """Run ``main`` on the command line and exit with its code.

    A ``ContrastRMError`` or a full disk becomes one line on stderr and exit code 2; Ctrl-C becomes 130.
    Any other exception is a bug in this project and keeps its traceback. Of several processes of one launch only the
    first prints results.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding cannot show is written as an escape: no result is worth less than a dash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_arguments(sys.argv[1:])
        forget_other_launches()
        if not is_first_process():
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
        code = main(None)
    except ContrastRMError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in DISK_FULL and "No usable temporary directory" not in str(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; free some space, or set TMPDIR to a folder with more", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _check_arguments(arguments: list[str]) -> None:
    """What is no text could be used, but not written down in results."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ContrastRMError(f"the argument {argument!a} is no UTF-8 text; rename the file or folder") from error


def launched_processes() -> int:
    """How many processes ``accelerate launch`` (or ``torchrun``) has started together with this one, itself included.

    Raises:
        ContrastRMError: The variables that a launcher sets are there in part, or contradict each other.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    world_size = int(text) if text.isascii() and text.isdigit() else 0
    if world_size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        rank = os.environ.get("RANK", "")
        if missing or not (rank.isascii() and rank.isdigit() and int(rank) < world_size):
            world_size = 0
    if world_size < 1:
        said = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCH_VARIABLES if name in os.environ)
        raise ContrastRMError(
            f"the environment says {said}, which no launcher of several processes sets like this: unset WORLD_SIZE, and "
            "start several processes with NUM_PROCESSES of the run_*.sh, accelerate launch or torchrun"
        )
    return world_size


def process_index() -> int:
    """The number of this process in its launch: 0, 1, ..."""
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0


def is_first_process() -> bool:
    """Whether this is the process that reports, of however many the launcher started."""
    return process_index() == 0


def forget_other_launches() -> None:
    """Take out of the environment what another launcher left there, where nothing launched this process.

    accelerate, torch and DeepSpeed read these variables wherever they come from: a job script's RANK or a shell that was
    opened inside a launch would change what a single process does.
    """
    if os.environ.get("WORLD_SIZE"):
        return
    for name in list(os.environ):
        if name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES):
            del os.environ[name]


def positive(text: str) -> int:
    """Argparse type: 1, 2, 3, ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive whole number")
    return value


def natural(text: str) -> int:
    """Argparse type: 0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    if not value > 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def non_negative_float(text: str) -> float:
    """Argparse type: a finite number of at least 0."""
    value = float(text)
    if not value >= 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 0")
    return value


def natural_or_auto(text: str) -> int | str:
    """Argparse type: 0, 1, 2, ... or ``auto``."""
    return text if text == "auto" else natural(text)


def share(text: str) -> float:
    """Argparse type: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a share of at least 0 and below 1")
    return value


def share_or_auto(text: str) -> float | str:
    """Argparse type: a share of at least 0 and below 1, or ``auto``."""
    return text if text == "auto" else share(text)
