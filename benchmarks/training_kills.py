"""Kill -9 a training run again and again, resume it, and compare what it ends with to a run that nobody disturbed.

One process (``--ranks 1``): a child of a server process that has imported everything already, so that a start costs no
import; its stack is dumped a moment before each kill, which tells the phase that was hit. Two ranks (``--ranks 2``): one of
them, or their launcher, is killed. Log (without seconds) and final weights must be equal bit for bit with one process, to 1e-6
with two. Prints one JSON line; exit code 1 where they differ. A two-layer model: minutes. Examples:

``python -m benchmarks.training_kills --kills 20``
``python -m benchmarks.training_kills --kills 3 --ranks 2 --engine configs/ds_z2_config.json``
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import add_output_argument, write_line

REPO_ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_KILL = 0.6
EVAL_STEPS = 4
DEADLINE_SECONDS = 300.0
# So many runs may come to their end before a kill meets them.
MOST_RUNS = 10
# Functions in a dumped stack, the first one found names the phase.
PHASES = {
    "save_checkpoint": "checkpoint",
    "_evaluate": "evaluation",
    "save_reward_model": "final saving",
    "load_checkpoint": "resuming",
    "choose_checkpoint": "resuming",
    "train_step": "step",
}


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A two-layer base model and a file of 24 groups of two to five answers."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.conftest import chatml_tokenizer, save_tiny, tiny_config

    tokenizer = chatml_tokenizer()
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    base = save_tiny(folder / "base", model, tokenizer)
    data = folder / "train.jsonl"
    rows = [
        {
            "id": f"row-{number}",
            "question": f"why is the cat number {number} on the mat",
            "chosen": f"because it sat {number}",
            "rejected": [f"the mat is red {k} " * (1 + (k + number) % 3) for k in range(1 + number % 4)],
        }
        for number in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return base, data


def evaluation_flags() -> list[str]:
    """Held-out evaluation every few steps, where this trainer has it."""
    from codes.train.train_reward_model import build_parser

    known = build_parser().format_help()
    return ["--held_out_share", "0.2", "--eval_steps", str(EVAL_STEPS)] if "--held_out_share" in known else []


def run_child(arguments: list[str], log_file: str, stack_file: str) -> None:
    """What a forked process does: train, its output in a file, ready to show its stack."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = os.open(stack_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=False)
    import torch

    torch.set_num_threads(1)
    from codes.train.train_reward_model import main

    sys.exit(main(arguments))


class OneProcess:
    """Runs in one process each, forked from a server that has torch and the trainer in memory."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder, self.arguments = folder, arguments
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["codes.train.train_reward_model", "benchmarks.training_kills"])

    def start(self, name: str, *extra: str) -> Any:
        """A run; ``name`` is its output folder."""
        (self.folder / f"{name}.stack").unlink(missing_ok=True)
        child = self.context.Process(
            target=run_child,
            args=(
                [*self.arguments, "--output_dir", str(self.folder / name), *extra],
                str(self.folder / f"{name}.log"),
                str(self.folder / f"{name}.stack"),
            ),
        )
        child.start()
        return child

    def finish(self, name: str, *extra: str) -> int:
        """Run to the end; its exit code."""
        child = self.start(name, *extra)
        child.join()
        code: int = child.exitcode
        return code

    def kill(self, child: Any, name: str, _draw: random.Random) -> str | None:
        """Kill -9; the phase that was hit, None where the run had ended."""
        stack = self.folder / f"{name}.stack"
        if not child.is_alive():
            return None
        os.kill(child.pid, signal.SIGUSR2)  # before the handler is there this ends the process as well as a kill does
        deadline = time.monotonic() + 1
        while (
            child.is_alive()
            and time.monotonic() < deadline
            and not (stack.exists() and " in run_child" in stack.read_text())
        ):
            time.sleep(0.0005)
        child.kill()
        child.join()
        if child.exitcode not in (-signal.SIGKILL, -signal.SIGUSR2):
            return None
        text = stack.read_text(encoding="utf-8") if stack.exists() else ""
        lines = text.splitlines()
        return next(
            (phase for function, phase in PHASES.items() if any(f" in {function}" in x for x in lines)), "start"
        )


class TwoRanks:
    """Runs of two processes each through ``run_training.sh``."""

    def __init__(self, folder: Path, arguments: list[str], engine: str) -> None:
        self.folder, self.arguments, self.engine = folder, arguments, engine

    def start(self, name: str, *extra: str) -> subprocess.Popen[bytes]:
        """A run; ``name`` is its output folder."""
        knobs = {
            "NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": self.engine, "SKIP_SETUP": "1", "PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = ["bash", "run_training.sh", *self.arguments, "--output_dir", str(self.folder / name), *extra]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=REPO_ROOT, env=os.environ | knobs, stdout=log, stderr=log)

    def finish(self, name: str, *extra: str) -> int:
        """Run to the end; its exit code."""
        return self.start(name, *extra).wait()

    def kill(self, child: subprocess.Popen[bytes], name: str, draw: random.Random) -> str | None:
        """Kill -9 one rank or the launcher; the phase and the victim, None where the run had ended."""
        phase = "checkpoint" if list((self.folder / name).glob(".checkpoint-*.saving")) else "step"
        if not (self.folder / name / "train_log.jsonl").exists():
            phase = "start"
        found = processes_of(str(self.folder / name))
        victim = draw.choice(sorted(found)) if found else None
        if victim is None or child.poll() is not None:
            return None
        os.kill(found[victim], signal.SIGKILL)
        code = child.wait(timeout=120)  # the others must not wait for the dead one for ever
        deadline = time.monotonic() + 60
        while processes_of(str(self.folder / name)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return f"{phase}, {victim} killed" if code != 0 else None


def processes_of(output_dir: str) -> dict[str, int]:
    """The launcher and the ranks of a run, by the text of their command lines."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (
                (entry / "cmdline").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else []
            )
            if output_dir not in words or "bash" in words[0]:
                continue
            variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        rank = next((text.removeprefix("RANK=") for text in variables if text.startswith("RANK=")), None)
        found[f"rank {rank}" if rank is not None else "launcher"] = int(entry.name)
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Log entries without wall times."""
    file = folder / "train_log.jsonl"
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def largest_log_difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """Over all numbers; infinite where lines or fields are missing or doubled."""
    if len(left) != len(right) or any(one.keys() != other.keys() for one, other in zip(left, right, strict=True)):
        return float("inf")
    pairs = [(one[key], other[key]) for one, other in zip(left, right, strict=True) for key in one]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max((abs(a - b) for a, b in pairs if a is not None), default=0.0)


def largest_weight_difference(left: Path, right: Path) -> float:
    """Over all weights; infinite where they have other names."""
    from safetensors.torch import load_file

    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    if a.keys() != b.keys():
        return float("inf")
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def wait_until(child: Any, is_there: Callable[[], object]) -> None:
    """Until something is there or the run has ended."""
    is_alive = child.is_alive if hasattr(child, "is_alive") else lambda: child.poll() is None
    deadline = time.monotonic() + DEADLINE_SECONDS
    while is_alive() and not is_there() and time.monotonic() < deadline:
        time.sleep(0.0005)


def wait_for_moment(child: Any, folder: Path, kind: str, draw: random.Random, start_seconds: float) -> None:
    """Wait for a random moment of a kind: at the start, in an evaluation or a checkpoint, at the end, or at any time."""

    def n_lines() -> int:
        file = folder / "train_log.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    if kind == "start":
        time.sleep(draw.uniform(0, start_seconds))
        return
    if kind == "end":
        wait_until(child, lambda: list(folder.glob(".model.saving-*")))
        time.sleep(draw.uniform(0, 0.02))
        return
    before = n_lines()
    wait_until(child, lambda: n_lines() > before)
    time.sleep(draw.uniform(0, 2 * SECONDS_A_KILL))
    if kind == "evaluation":
        # It follows the log line of its step.
        wait_until(child, lambda: n_lines() > before and n_lines() % EVAL_STEPS == 0)
        time.sleep(draw.uniform(0, 0.02))
    elif kind == "checkpoint":
        wait_until(child, lambda: list(folder.glob(".checkpoint-*")))
        time.sleep(draw.uniform(0, 0.03))


def run(runs: OneProcess | TwoRanks, n_kills: int, seed: int) -> dict[str, Any]:
    """Kill, finish, compare."""
    draw = random.Random(seed)
    started = time.monotonic()
    if runs.finish("whole") != 0:
        raise SystemExit(f"the undisturbed run failed: {(runs.folder / 'whole.log').read_text()[-2000:]}")
    whole_seconds = time.monotonic() - started
    # About one kill in six at the start, one in three in a checkpoint, the last one while the model is saved.
    kinds = [draw.choice(("start", "checkpoint", "checkpoint", "any", "any", "any")) for _ in range(n_kills - 1)] + [
        "end"
    ]
    if isinstance(runs, TwoRanks):
        kinds = [draw.choice(("checkpoint", "any")) for _ in range(n_kills)]
    killed, whole = runs.folder / "killed", runs.folder / "whole"
    hit: list[str] = []
    compared: list[tuple[float, float, list[str]]] = []

    def compare() -> None:
        left_over = sorted(path.name for path in killed.iterdir() if path.name.startswith(".checkpoint"))
        logs = largest_log_difference(read_log(killed), read_log(whole))
        compared.append((logs, largest_weight_difference(killed, whole), left_over))

    n_starts = 0
    while len(hit) < n_kills and len(compared) < MOST_RUNS:
        n_starts += 1
        child = runs.start("killed", "--resume", "auto")
        wait_for_moment(child, runs.folder / "killed", kinds[len(hit)], draw, start_seconds=1.0)
        phase = runs.kill(child, "killed", draw)
        if phase is not None:
            hit.append(phase)
        elif (killed / "train_summary.json").exists():
            # It came to its end before the kill: the kills that are left meet another run.
            compare()
            shutil.rmtree(killed)
    code = runs.finish("killed", "--resume", "auto")
    if code != 0:
        raise SystemExit(f"the last resume ended with {code}: {(runs.folder / 'killed.log').read_text()[-2000:]}")
    compare()
    return {
        "benchmark": "training_kills",
        "engine": runs.engine if isinstance(runs, TwoRanks) else "one process",
        "n_kills": len(hit),
        "phases_hit": dict(Counter(hit)),
        "n_starts": n_starts + 1,
        "n_runs": len(compared),
        "n_steps": len(read_log(whole)),
        "whole_seconds": round(whole_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "largest_log_difference": max(logs for logs, _, _ in compared),
        "largest_weight_difference": max(weights for _, weights, _ in compared),
        "left_over": [name for _, _, left_over in compared for name in left_over],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--engine", default="none", help="with two ranks: none (DDP) or a DeepSpeed configuration")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--epochs", type=int, default=0, help="0: long enough for the kills")
    parser.add_argument("--seed", type=int, default=42)
    add_output_argument(parser)
    return parser


def main() -> int:
    """Print the result; returns the exit code."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = make_inputs(folder)
        # Six steps an epoch; a step takes some 20 ms with one process, more with two.
        epochs = args.epochs or (10 + 6 * args.kills if args.ranks == 1 else 10 + 15 * args.kills)
        arguments = [
            "--model_path", str(base), "--train_file", str(data), "--precision", args.precision, "--seed", "7",
            "--global_batch_size", "4", "--epochs", str(epochs), "--warmup_steps", "1", "--learning_rate", "1e-5",
            "--save_steps", "5", "--keep_checkpoints", "2", *evaluation_flags(),
        ]  # fmt: skip
        runs = OneProcess(folder, arguments) if args.ranks == 1 else TwoRanks(folder, arguments, args.engine)
        result = run(runs, args.kills, args.seed)
    write_line(result, args.output_file)
    tolerance = 0.0 if args.ranks == 1 else 1e-6
    worst = max(result["largest_log_difference"], result["largest_weight_difference"])
    return int(worst > tolerance or bool(result["left_over"]))


if __name__ == "__main__":
    sys.exit(main())
