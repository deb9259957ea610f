"""A run that is asked to stop, or loses a process: through the launcher's shell, with real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codes.common.cli import EXIT_STOPPED
from codes.train.checkpoints import damage, list_checkpoints
from codes.train.train_reward_model import main
from tests.conftest import REPO_ROOT

LONG = 400  # epochs, of five steps: nobody sees the end of this run


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


def flags(base: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [
        "--model_path", str(base), "--train_file", str(data), "--output_dir", str(out), "--precision", "fp32",
        "--warmup_steps", "1", "--learning_rate", "1e-4", "--seed", "7", "--global_batch_size", "2", *extra,
    ]  # fmt: skip


@contextmanager
def launched(arguments: list[str], log: Path, **knobs: str) -> Iterator[subprocess.Popen[bytes]]:
    """``bash run_training.sh`` in the background; whatever it left is killed at the end."""
    environment = {
        **os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "DEEPSPEED_CONFIG": "none", **knobs,
    }  # fmt: skip
    with log.open("ab") as sink:
        process = subprocess.Popen(
            ["bash", "run_training.sh", *arguments], cwd=REPO_ROOT, env=environment, stdout=sink, stderr=sink
        )
    try:
        yield process
    finally:
        for pid in pids_of(arguments):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def pids_of(arguments: list[str], *, ranks_only: bool = False) -> dict[int, str]:
    """Processes whose command line holds the run's folder, with their rank (empty: the launcher or its shell)."""
    found: dict[int, str] = {}
    out = arguments[arguments.index("--output_dir") + 1].encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        rank = next((text[5:].decode() for text in variables if text.startswith(b"RANK=")), "")
        if out in words and (rank or not ranks_only):
            found[int(entry.name)] = rank
    return found


def wait_for_steps(out: Path, n: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not (out / "train_log.jsonl").exists() or len((out / "train_log.jsonl").read_bytes().splitlines()) < n:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()]


def test_a_signal_becomes_a_checkpoint_and_code_75(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    long = flags(tiny_base_dir, train_file, out, "--epochs", str(LONG))
    with launched(long, log) as process:
        wait_for_steps(out, 3, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED == 75
    text = log.read_text()
    assert "SIGTERM: stopping after this step" in text and "--resume auto (RESUME=auto) goes on there" in text
    last = steps(out)[-1]
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{last}"]
    assert damage(out / f"checkpoint-{last}") is None and not (out / "model.safetensors").exists()
    # It goes on behind that step, and every step is in the log once.
    with launched([*long, "--resume", "auto"], log) as process:
        wait_for_steps(out, last + 3, process, log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == EXIT_STOPPED
    assert steps(out) == list(range(1, len(steps(out)) + 1))


def test_two_ranks_stop_together_and_one_process_goes_on(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """The signal comes as a scheduler sends it: to the shell, the launcher and every rank at once."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(tiny_base_dir, train_file, out, "--epochs", "60")
    with launched(arguments, log, NUM_PROCESSES="2") as process:
        wait_for_steps(out, 3, process, log)
        assert sorted(pids_of(arguments, ranks_only=True).values()) == ["0", "1"]
        for pid in pids_of(arguments):
            os.kill(pid, signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED, log.read_text()[-3000:]
        assert pids_of(arguments) == {}
    assert "Traceback" not in log.read_text()
    last = steps(out)[-1]
    assert last < 300 and [path.name for path in list_checkpoints(out)] == [f"checkpoint-{last}"]
    # Plain checkpoints do not know how many processes wrote them.
    assert main([*arguments, "--resume", "auto"]) == 0
    whole = tmp_path / "whole"
    assert main(flags(tiny_base_dir, train_file, whole, "--epochs", "60")) == 0
    assert steps(out) == steps(whole) == list(range(1, 301))
    mine, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=0, msg=name)


def test_a_request_to_one_rank_stops_both_at_one_step(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(tiny_base_dir, train_file, out, "--epochs", str(LONG))
    with launched(arguments, log, NUM_PROCESSES="2") as process:
        wait_for_steps(out, 3, process, log)
        (second,) = (pid for pid, rank in pids_of(arguments, ranks_only=True).items() if rank == "1")
        os.kill(second, signal.SIGUSR1)
        assert process.wait(timeout=60) == EXIT_STOPPED, log.read_text()[-3000:]
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{steps(out)[-1]}"]


def test_a_killed_rank_ends_the_run_and_leaves_the_last_checkpoint(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(tiny_base_dir, train_file, out, "--epochs", str(LONG), "--save_steps", "2")
    with launched(arguments, log, NUM_PROCESSES="2") as process:
        wait_for_steps(out, 5, process, log)
        (victim,) = (pid for pid, rank in pids_of(arguments, ranks_only=True).items() if rank == "1")
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=90) == 1, log.read_text()[-3000:]
        assert pids_of(arguments) == {}
    text = log.read_text()
    assert "another process of this run has died" in text and "RESUME=auto continues from the newest" in text
    assert list_checkpoints(out) and damage(list_checkpoints(out)[-1]) is None


def test_two_ranks_report_a_loss_that_is_not_finite(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(tiny_base_dir, train_file, out, "--epochs", str(LONG), "--max_grad_norm", "1e30")
    arguments[arguments.index("--learning_rate") + 1] = "1e30"
    with launched(arguments, log, NUM_PROCESSES="2") as process:
        assert process.wait(timeout=120) == 2, log.read_text()[-3000:]
    report = json.loads((out / "nan_report.json").read_text())
    assert {line["rank"] for line in report["groups"]} == {0, 1} and report["n_groups"] == 2
    assert report["step"] == 2 and "nan" in (report["loss"], report["grad_norm"]) and report["last_checkpoint"] is None


BODY = """
import sys, time
from codes.train.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        print("asked" if stop.is_wanted else "going", flush=True)
"""


WAITS_FOR_ANOTHER = """
import sys
from datetime import timedelta
from codes.train.signals import StopSignals, failures_told
from torch.distributed import TCPStore

with StopSignals(), failures_told():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("waiting", flush=True)
    store.wait(["never"], timedelta(seconds=200))  # no signal is heard in here
"""


def test_a_rank_that_waits_leaves_when_another_has_failed(tmp_path: Path) -> None:
    told = tmp_path / "ranks"
    told.touch()
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "CONTRASTRM_RANKS_FILE": str(told)}
    with subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_ANOTHER], cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"waiting\n"
            with told.open("a") as ranks:
                # A stop that was asked for ends no other: each writes its checkpoint.
                ranks.write("exit 75\n")
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=1.5)
            with told.open("a") as ranks:
                ranks.write("exit 2\n")
            assert child.wait(timeout=60) == 2
        finally:
            child.kill()


def test_a_second_sigterm_stops_at_once_but_an_echo_does_not() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", BODY], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            child.send_signal(number)
        while child.stdout.readline() != "asked\n":
            pass
        time.sleep(2.2)
        child.send_signal(signal.SIGUSR1)  # never the end: schedulers and shells repeat it
        time.sleep(0.2)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == -signal.SIGTERM


def test_handlers_are_given_back() -> None:
    from codes.train.signals import StopSignals

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


# --- the shell's half, with stand-ins for the launcher and its ranks

RANK = """
import os, signal, sys, time
def stop(number, frame):
    open(os.environ["CONTRASTRM_RANKS_FILE"], "a").write("exit 75\\n")
    sys.exit(0)
time.sleep(float(sys.argv[1]))  # not ready for signals yet
signal.signal(signal.SIGUSR1, stop if sys.argv[2] == "stops" else lambda number, frame: None)
open(os.environ["CONTRASTRM_RANKS_FILE"], "a").write(f"rank {os.getpid()}\\n")
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen(sys.argv[1:], start_new_session=True)
print("started", flush=True)
sys.exit(rank.wait())
"""


def run_ranks(*rank: str) -> subprocess.Popen[str]:
    script = 'set -euo pipefail; source scripts/env.sh; run_ranks "$@"'
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-c", RANK, *rank]
    environment = {**os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", "-c", script, "run_training.sh", *command],
        cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_line(shell: subprocess.Popen[str], expected: str) -> None:
    assert shell.stdout is not None
    while line := shell.stdout.readline():
        if line == f"{expected}\n":
            return
    pytest.fail(f"{expected!r} never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_that_comes_too_early_is_repeated(number: signal.Signals) -> None:
    with run_ranks("2", "stops") as shell:
        wait_for_line(shell, "started")
        shell.send_signal(number)
        assert shell.wait(timeout=30) == EXIT_STOPPED


def test_a_second_request_ends_ranks_that_do_not_listen() -> None:
    with run_ranks("0", "goes-on") as shell:
        wait_for_line(shell, "ready")
        shell.send_signal(signal.SIGTERM)
        time.sleep(3.1)
        assert shell.poll() is None
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_step_that_stopped_keeps_its_code() -> None:
    """``run_all.sh`` passes signals on to its stage and 75 back."""
    stage = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    stage += "print('ready', flush=True); time.sleep(60)"
    script = 'set -euo pipefail; source scripts/env.sh; run_step "$@"; echo went on'
    environment = {**os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable}
    with subprocess.Popen(
        ["bash", "-c", script, "run_all.sh", sys.executable, "-c", stage],
        cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as shell:  # fmt: skip
        assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
        shell.send_signal(signal.SIGUSR1)
        output, errors = shell.communicate(timeout=30)
    assert shell.returncode == EXIT_STOPPED
    assert "went on" not in output and "stopped as asked, with a checkpoint" in errors
