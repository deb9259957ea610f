"""Run a command beside a local OpenAI-compatible server that answers with the embedded model.

Reads the model folder (fetched and converted on first use); writes the server's output to
``<work_dir>/embedded_server.log``. The server is gone when the command ends, after Ctrl-C and SIGTERM, and
when this process dies in any other way; where the server dies first, the command is stopped. Example:

``python -m codes.construct.embedded_server --model_path embedded -- bash run_construction.sh``
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from codes.common.base_model import EMBEDDED_ALIAS, resolve_model_path
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.records import ensure_writable_folder
from codes.construct.api import EMBEDDED_SERVER_VARIABLE

LOG_FILE = "embedded_server.log"
HOST = "127.0.0.1"
# The server asks for no key; the client insists on one.
DUMMY_KEY = "no-key-needed"
START_SECONDS = 300.0
STOP_SECONDS = 5.0
# How often to look whether the server still runs: its clients would take its end for an outage, and wait.
LOOK_AFTER_SECONDS = 1.0
# All prompts of a batch share one masked attention without a flash kernel: at the server's own 8,192 tokens
# that takes minutes on a CPU, and its cache takes what memory there is. 512 blocks of 32 tokens hold eight
# requests of 2,048.
MAX_BATCH_TOKENS = 512
CACHE_BLOCKS = 512
_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A TCP port on localhost that is free at this moment."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def server_command(model_path: str, port: int) -> list[str]:
    """The server's command line.

    Continuous batching: without it, requests are answered one at a time (on two cores 14 tokens/s instead of
    48).
    """
    program = Path(sys.executable).with_name("transformers")
    return [
        str(program),
        "serve",
        model_path,
        *("--host", HOST, "--port", str(port)),
        *("--device", "auto", "--dtype", "bfloat16"),
        "--continuous-batching",
        *("--cb-max-batch-tokens", str(MAX_BATCH_TOKENS), "--cb-num-blocks", str(CACHE_BLOCKS)),
    ]


def command_environment(model_path: str, port: int) -> dict[str, str]:
    """This process's environment, pointed at the server."""
    environment = dict(os.environ)
    environment |= {
        "OPENAI_BASE_URL": f"http://{HOST}:{port}/v1",
        "OPENAI_API_KEY": DUMMY_KEY,
        "API_MODEL": model_path,
        EMBEDDED_SERVER_VARIABLE: "1",
    }
    # A proxy that is set for the world outside would swallow requests to this machine.
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, (environment.get(name), HOST, "localhost")))
    return environment


def _die_with_parent(death_signal: int) -> Callable[[], None] | None:
    """What a child runs before its program: ask Linux for a signal when this process is gone."""
    if not sys.platform.startswith("linux"):
        return None
    # Loaded here: between fork and exec as little as possible should happen.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:
            os._exit(1)

    return set_death_signal


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        port: On localhost.
        log_path: What it prints.
    """

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path

    def check(self) -> None:
        """Raise where it has ended.

        Raises:
            ContrastRMError: With its exit code and the last lines of its log.
        """
        code = self.process.poll()
        if code is not None:
            raise ContrastRMError(f"the embedded server ended with code {code}; {_last_lines(self.log_path)}")


@contextmanager
def running_server(model_path: str, work_dir: Path, *, start_seconds: float = START_SECONDS) -> Iterator[Server]:
    """A server that answers, and is stopped afterwards whatever happens.

    Raises:
        ContrastRMError: It did not start; the message holds the last lines of its log.
    """
    log_path = ensure_writable_folder(work_dir) / LOG_FILE
    port = free_port()
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            server_command(model_path, port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            # Its own group: Ctrl-C in the terminal reaches the command, not the server that the command still
            # needs.
            start_new_session=True,
            preexec_fn=_die_with_parent(signal.SIGKILL),
        )
    try:
        started = Server(server, port, log_path)
        _wait_until_healthy(started, start_seconds)
        yield started
    finally:
        _stop_group(server)


def _wait_until_healthy(server: Server, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    # Without proxies: the address is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        server.check()
        try:
            with opener.open(f"http://{HOST}:{server.port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)  # not listening yet
    message = f"the embedded server did not answer within {start_seconds:.0f} s; {_last_lines(server.log_path)}"
    raise ContrastRMError(message)


def _last_lines(log_path: Path) -> str:
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"its log {log_path} ends: {' | '.join(lines[-3:])[-400:] or 'empty'}"


def _stop_group(server: subprocess.Popen[bytes]) -> None:
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, stop_signal)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def run_command(command: Sequence[str], environment: dict[str, str], server: Server) -> int:
    """Run a command to its end, the server's or ours; returns its exit code (128 + n after signal n).

    Raises:
        ContrastRMError: The command cannot be run, or the server ended before it.
    """
    try:
        child = subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent(signal.SIGTERM))
    except OSError as error:
        raise ContrastRMError(f"cannot run {command[0]}: {error.strerror}; check the command after --") from error
    try:
        while (code := _wait_a_little(child)) is None:
            server.check()
    except BaseException:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    return 128 - code if code < 0 else code


def _wait_a_little(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(LOOK_AFTER_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # An exception and not the default death: the server is stopped on the way out.
    raise SystemExit(128 + number)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.embedded_server", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model_path", default=EMBEDDED_ALIAS, help="'embedded', a model folder, or a hub id")
    parser.add_argument("--work_dir", type=Path, default=Path("output/construct"), help="where the log goes")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Start the server, run the command, stop the server; returns the command's exit code."""
    args = build_parser().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ContrastRMError("no command given; write it after --, for example: -- bash run_construction.sh")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that must stay so
            signal.signal(number, _exit_on_signal)
    model_path = resolve_model_path(args.model_path)
    with running_server(model_path, args.work_dir) as server:
        return run_command(command, command_environment(model_path, server.port), server)


if __name__ == "__main__":
    run(main)
