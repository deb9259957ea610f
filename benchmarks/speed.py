"""Compare peers: every suite interleaved, each run a process of its own, then a table and a plot.

Reads: preference records and evaluation files (the folder that ``CONTRASTRM_EXTERNAL_DATA`` names, or files by name). Writes:
``output/benchmarks/<suite>.jsonl`` (one line a run, only ever appended to: a run that was stopped goes on where it was) and
``benchmarks/results/<suite>.md``, ``.svg`` and ``.jsonl``, the newest measurement's lines.
Run: ``python -m benchmarks.speed training-groups4-bf16 scoring-bf16``; ``python -m benchmarks.speed report`` only writes the
tables and plots again.

A round runs every peer once, one after the other; the next round follows. What slows the machine down for a while thus meets
all peers alike, and the tables compare within rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import MODEL_DIR, OUTPUT_DIR, prepare_model
from benchmarks.speed_report import write_report
from benchmarks.suites import SUITES, TRL, Options, Run, Suite, build_suite, session_key
from benchmarks.synthetic import SHAPES
from codes.common.cli import natural, positive, run
from codes.common.errors import ContrastRMError
from codes.common.reporting import git_state

REPO_ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIR = REPO_ROOT / "benchmarks" / "results"
TRL_VENV = "output/benchmarks/trl-venv"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a suite; a last line that a killed run left torn is cut off."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    if torn:
        print(f"note: {file}: cut off a last line without an end ({len(torn)} bytes)", file=sys.stderr)
        os.truncate(file, len(whole) + len(newline))
    return [json.loads(line) for line in whole.splitlines()]


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Append one line, on the disk before the next run begins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def trl_python() -> Path:
    """The Python of TRL's environment."""
    return REPO_ROOT / os.environ.get("TRL_VENV", TRL_VENV) / "bin" / "python"


@contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM are raised at the end of the block: a child that is only half started would be nobody's.

    Raises:
        KeyboardInterrupt: One of them came.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def measure_once(peer: Run, *, threads: int, device: str, log: Path) -> dict[str, Any]:
    """Run a peer to its end: its JSON line, or why there is none.

    Args:
        log: What the peer says on stderr.
    """
    python = trl_python() if peer.environment == TRL else Path(sys.executable)
    if not python.is_file():
        return {"failed": "TRL's environment is not installed: bash benchmarks/setup_trl.sh"}
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    # accelerate takes a GPU where it sees one, and TRL's trainer all that it sees.
    environment["CUDA_VISIBLE_DEVICES"] = (
        "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", peer.module, *peer.arguments]
    with log.open("w", encoding="utf-8") as errors, ExitStack() as children:
        with stops_wait():
            child = subprocess.Popen(
                command, cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            children.enter_context(child)
            children.callback(child.kill)
        printed = child.communicate()[0].strip()
    if child.returncode == 0 and printed:
        line: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return line
    said = log.read_text(encoding="utf-8", errors="replace").replace(str(REPO_ROOT), ".").strip().splitlines()
    return {"failed": f"exit code {child.returncode}: {said[-1][:200] if said else 'no output'}"}


def run_suite(
    suite: Suite,
    options: Options,
    *,
    rounds: int,
    peers: Sequence[str],
    threads: int,
    lines_file: Path,
    restart: bool,
) -> int:
    """Run what is not there yet; the number of runs that failed.

    Args:
        peers: Names, or the parts before the dot, of the runs to make; empty: all.

    Raises:
        ContrastRMError: No run has such a name.
    """
    chosen = [one for one in suite.runs if not peers or {one.name, one.name.partition(".")[0]} & set(peers)]
    if not chosen:
        names = dict.fromkeys(one.name for one in suite.runs)
        raise ContrastRMError(f"{suite.name} has no run {', '.join(peers)}; it has {', '.join(names)}")
    lines = read_lines(lines_file)
    key = f"{session_key(suite, options, git_state(REPO_ROOT)[0])}-{threads}"
    again = [int(number) for start, _, number in (line["session"].partition(".") for line in lines) if start == key]
    session = f"{key}.{max(again, default=0) + restart}"
    done = {
        (line["run"], line["scenario"], line["round"])
        for line in lines
        if line["session"] == session and "failed" not in line
    }
    todo = [(number, one) for number in range(rounds) for one in chosen if (one.name, one.scenario, number) not in done]
    n_failed = 0
    with tqdm(todo, desc=suite.name, unit="run") as bar:
        for number, one in bar:
            bar.set_postfix_str(f"round {number + 1}, {one.name}")
            log = lines_file.parent / "logs" / f"{suite.name}-{suite.runs.index(one)}-{one.name}-{number}.log"
            found = measure_once(one, threads=threads, device=options.device, log=log)
            if "failed" in found:
                n_failed += 1
                bar.write(f"{suite.name}: {one.name} {one.scenario}: {found['failed']} (log: {log})", file=sys.stderr)
            about = {
                "suite": suite.name,
                "title": suite.title,
                "kind": suite.kind,
                "session": session,
                "round": number,
                "run": one.name,
                "label": one.label,
                "scenario": one.scenario,
                "position": suite.runs.index(one),
                "pairs_per_group": one.pairs_per_group,
                "planned": [other.name for other in suite.runs if other.scenario == one.scenario],
            }
            append_line(lines_file, about | found)
    return n_failed


def reported_suites(suites: Sequence[str], output_dir: Path, results_dir: Path) -> list[str]:
    """The suites asked for, or all that have lines.

    Raises:
        ContrastRMError: There is nothing to report on.
    """
    there = [
        name for name in SUITES if any((folder / f"{name}.jsonl").is_file() for folder in (output_dir, results_dir))
    ]
    missing = [name for name in suites if name not in there]
    if missing or not there:
        raise ContrastRMError(f"no lines of {', '.join(missing) or 'any suite'} in {output_dir}; run the suite first")
    return list(suites) or there


def report(name: str, output_dir: Path, results_dir: Path, peak_tflops: float | None) -> Path:
    """Write the table and plot of a suite's newest session; the path of the table."""
    lines = read_lines(output_dir / f"{name}.jsonl") or read_lines(results_dir / f"{name}.jsonl")
    newest = [line for line in lines if line["session"] == lines[-1]["session"]]
    return write_report(newest, results_dir, peak_tflops=peak_tflops)


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        description="Compare peers. 'report' before the names only writes their tables again."
    )
    parser.add_argument("suites", nargs="+", choices=(*SUITES, "report"), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--rounds", type=positive, default=3, help="times that every peer runs")
    parser.add_argument("--peers", nargs="+", default=[], help="only these runs, e.g. gemm original_loop ours.shared")
    parser.add_argument("--restart", action="store_true", help="measure again what is there already")
    parser.add_argument("--threads", type=positive, default=default_threads(), help="of every run")
    parser.add_argument("--peak_tflops", type=float, default=None, help="the device's; default: its measured rate")
    parser.add_argument("--model_path", type=Path, default=MODEL_DIR, help="a reward model's folder; made if missing")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (the first that is visible)")
    parser.add_argument("--output_dir", dest="work_dir", type=Path, default=OUTPUT_DIR, help="lines, rows, logs")
    parser.add_argument("--results_dir", type=Path, default=RESULTS_DIR, help="tables and plots")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--input_file", default=None, help="preference records of the training suites")
    rows.add_argument("--files", nargs="+", default=[], help="evaluation files of the scoring suites")
    rows.add_argument("--percent", type=float, default=None, help="so many of a hundred questions are scored")
    rows.add_argument("--seed", type=int, default=42, help="chooses the rows")
    rows.add_argument("--max_length", type=positive, default=1024, help="most tokens of a text to train on")
    training = parser.add_argument_group("training")
    training.add_argument("--groups_per_step", type=positive, default=None)
    training.add_argument("--steps", type=positive, default=None, help="timed steps")
    training.add_argument("--warmup_steps", type=positive, default=1)
    training.add_argument(
        "--rows_per_micro_batch", type=positive, default=8, help="answers at once, original loop and TRL"
    )
    training.add_argument("--gradient_checkpointing", type=int, choices=(0, 1), default=None)
    training.add_argument(
        "--max_tokens", type=natural, default=0, help="padded tokens at once, sorted baseline; 0: as ours"
    )
    training.add_argument("--max_tokens_per_batch", type=natural, default=0, help="computed tokens at once, ours")
    sizes = parser.add_argument_group("gpu and gemm")
    sizes.add_argument("--shape", dest="shapes", nargs="+", choices=tuple(SHAPES), default=[])
    sizes.add_argument("--prompts", type=positive, nargs="+", default=[], help="tokens of a prompt")
    sizes.add_argument("--groups", dest="group_sizes", type=positive, nargs="+", default=[], help="answers of a group")
    sizes.add_argument("--seconds", type=float, default=0.3, help="gemm: time spent on one shape")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run suites and write their tables; 1 where a run failed."""
    args = build_parser().parse_args(argv)
    names = [name for name in args.suites if name != "report"]
    if args.device not in ("auto", "cpu", "cuda"):
        raise ContrastRMError(
            f"--device {args.device}: every run sees one GPU only; choose it with CUDA_VISIBLE_DEVICES and --device cuda"
        )
    n_failed = 0
    if "report" in args.suites:
        names = reported_suites(names, args.work_dir, args.results_dir)
    else:
        if not (args.model_path / "config.json").is_file():
            prepare_model(folder=args.model_path)
        given = {field.name: getattr(args, field.name) for field in fields(Options)}
        options = Options(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
        for name in names:
            n_failed += run_suite(
                build_suite(name, options),
                options,
                rounds=args.rounds,
                peers=args.peers,
                threads=args.threads,
                lines_file=args.work_dir / f"{name}.jsonl",
                restart=args.restart,
            )
            print(report(name, args.work_dir, args.results_dir, args.peak_tflops))
        return 1 if n_failed else 0
    for name in names:
        print(report(name, args.work_dir, args.results_dir, args.peak_tflops))
    return 0


if __name__ == "__main__":
    # As Ctrl-C does: the peer at work must not outlive its runner.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(main)
