"""Kill -9 a stage again and again, resume it, and compare what it ends with to a run that nobody disturbed.

Every run is a child of a server process that has imported the stage already, so that a start costs no import, and works on
small inputs made here. A kill comes at a random moment of a random kind: at the start, in the middle, while something is being
written. Training: log (without seconds) and final weights equal, bit for bit with one process, to 1e-6 with ``--ranks 2`` (there
one of the ranks or their launcher is killed). Evaluation: every results file equal but for the fields of the run. Construction:
files equal byte for byte, no recorded request sent again. Prints one JSON line; exit code 1 where something differs. Examples:

``python -m benchmarks.kills training --kills 20`` (``--ranks 2 --engine configs/ds_z2_config.json``: through the launcher)
``python -m benchmarks.kills evaluation --kills 30``
``python -m benchmarks.kills construction --kills 50``
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import add_output_argument, write_line
from tests.chat_server import english

REPO_ROOT = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 300.0
# So many runs may come to their end before a kill meets them.
MOST_RUNS = 10
START_SECONDS = 1.0


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL; the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_child(module: str, arguments: list[str], log_file: str) -> None:
    """What a forked process does: the module's ``main``, its output in a file."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    sys.exit(importlib.import_module(module).main(arguments))


class Stage:
    """One stage on its small inputs. Every run is forked from a server that has the stage's module in memory.

    A stage says how a run starts, until when to wait before it is killed, which phase a kill met (by what it left), and in what
    two finished runs differ (all zero or empty where they are equal). Runs are told apart by their names.
    """

    module = ""
    # What the module imports itself once its command line is read.
    imported_later: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([self.module, *self.imported_later, "benchmarks.kills"])

    def fork(self, name: str, arguments: list[str]) -> Any:
        """Begin a run; its output is appended to ``<name>.log``."""
        child = self.context.Process(target=run_child, args=(self.module, arguments, str(self.folder / f"{name}.log")))
        child.start()
        return child

    def start(self, name: str) -> Any:
        """Begin or resume a run."""
        raise NotImplementedError

    def wait_for_moment(self, child: Any, name: str, draw: random.Random, is_last: bool) -> None:
        """Wait for a random moment of a random kind."""
        raise NotImplementedError

    def kill(self, child: Any, name: str, draw: random.Random) -> bool:
        """Kill -9; False where the run had ended."""
        child.kill()
        child.join()
        return bool(child.exitcode == -signal.SIGKILL)

    def phase(self, name: str) -> str:
        """What a killed run was doing."""
        raise NotImplementedError

    def compare(self, left: str, right: str) -> dict[str, Any]:
        """Differences of two finished runs."""
        raise NotImplementedError

    def begin_anew(self, name: str) -> None:
        """After a run that ended before its kill: make the next one do its work again, where it would not."""


def wait_until(child: Any, is_there: Callable[[], object]) -> None:
    """Until something is there or the run has ended."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while is_running(child) and not is_there() and time.monotonic() < deadline:
        time.sleep(0.0005)


def is_running(child: Any) -> bool:
    """Whether a forked process or a launcher is still there."""
    return bool(child.is_alive() if hasattr(child, "is_alive") else child.poll() is None)


def finish(stage: Stage, name: str, log_file: Path) -> None:
    """Run to the end.

    Raises:
        SystemExit: It failed.
    """
    child = stage.start(name)
    if hasattr(child, "join"):
        child.join()
    code = child.exitcode if hasattr(child, "exitcode") else child.wait()
    if code != 0:
        raise SystemExit(f"run {name!r} ended with code {code}: {log_file.read_text()[-2000:]}")


def kill_again_and_again(stage: Stage, folder: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """Kill, finish, compare.

    Returns:
        The phases that the kills met, the number of starts and of finished runs, and the worst of what ``compare`` found.
    """
    draw = random.Random(seed)
    finish(stage, "whole", folder / "whole.log")
    phases: list[str] = []
    compared: list[dict[str, Any]] = []
    n_starts = 1
    while len(phases) < n_kills and len(compared) < MOST_RUNS:
        n_starts += 1
        child = stage.start("killed")
        stage.wait_for_moment(child, "killed", draw, len(phases) == n_kills - 1)
        if stage.kill(child, "killed", draw):
            phases.append(stage.phase("killed"))
        else:
            compared.append(stage.compare("killed", "whole"))
            stage.begin_anew("killed")
    finish(stage, "killed", folder / "killed.log")
    compared.append(stage.compare("killed", "whole"))
    return {
        "n_kills": len(phases),
        "kills_met": dict(Counter(phases)),
        "n_starts": n_starts,
        "n_runs": len(compared),
        "differences": {key: max(found[key] for found in compared) for key in compared[0]},
    }


class Training(Stage):
    """A two-layer model on 24 groups of two to five answers; checkpoints every five steps, evaluations every four."""

    module = "codes.train.train_reward_model"
    imported_later = ("codes.train.report", "codes.train.token_budget")
    EVAL_STEPS = 4

    def __init__(self, folder: Path, n_kills: int, engine: str | None, precision: str, epochs: int) -> None:
        super().__init__(folder)
        # None: one process; else two ranks through the launcher, under this DeepSpeed configuration or "none".
        self.engine = engine
        base, data = self.make_inputs(folder)
        # Six steps an epoch; a step takes some 20 ms with one process, more with two.
        epochs = epochs or 10 + (6 if engine is None else 15) * n_kills
        self.arguments = [
            "--model_path", str(base), "--train_file", str(data), "--precision", precision, "--seed", "7",
            "--global_batch_size", "4", "--epochs", str(epochs), "--warmup_steps", "1", "--learning_rate", "1e-5",
            "--save_steps", "5", "--keep_checkpoints", "2", "--held_out_share", "0.2", "--eval_steps", str(self.EVAL_STEPS),
            "--resume", "auto",
        ]  # fmt: skip

    @staticmethod
    def make_inputs(folder: Path) -> tuple[Path, Path]:
        """The base model and the file of groups."""
        import torch
        from transformers import LlamaForCausalLM

        from tests.conftest import chatml_tokenizer, save_tiny, tiny_config

        tokenizer = chatml_tokenizer()
        torch.manual_seed(1)
        model = LlamaForCausalLM(tiny_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id))
        rows = [
            {
                "id": f"row-{number}",
                "question": f"why is the cat number {number} on the mat",
                "chosen": f"because it sat {number}",
                "rejected": [f"the mat is red {k} " * (1 + (k + number) % 3) for k in range(1 + number % 4)],
            }
            for number in range(24)
        ]
        return save_tiny(folder / "base", model, tokenizer), write_rows(folder / "train.jsonl", rows)

    def start(self, name: str) -> Any:
        """A run; ``name`` is its output folder."""
        arguments = [*self.arguments, "--output_dir", str(self.folder / name)]
        if self.engine is None:
            return self.fork(name, arguments)
        knobs = {
            "NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": self.engine, "SKIP_SETUP": "1", "PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            command = ["bash", "run_training.sh", *arguments]
            return subprocess.Popen(command, cwd=REPO_ROOT, env=os.environ | knobs, stdout=log, stderr=log)

    def n_logged(self, name: str) -> int:
        """Lines of the training log."""
        file = self.folder / name / "train_log.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait_for_moment(self, child: Any, name: str, draw: random.Random, is_last: bool) -> None:
        """One kill in six at the start, one in three in a checkpoint, one in six in an evaluation, the last at the end."""
        folder, before = self.folder / name, self.n_logged(name)
        kinds = ("start", "checkpoint", "checkpoint", "evaluation", "any", "any")
        kind = "end" if is_last and self.engine is None else draw.choice(kinds[0 if self.engine is None else 1 :])
        if kind == "start":
            time.sleep(draw.uniform(0, START_SECONDS))
        elif kind == "end":
            wait_until(child, lambda: list(folder.glob(".model.saving-*")))
            time.sleep(draw.uniform(0, 0.02))
        else:
            wait_until(child, lambda: self.n_logged(name) > before)
            time.sleep(draw.uniform(0, 1.2))
        if kind == "evaluation":
            # It follows the log line of its step.
            wait_until(child, lambda: self.n_logged(name) > before and self.n_logged(name) % self.EVAL_STEPS == 0)
            time.sleep(draw.uniform(0, 0.02))
        elif kind == "checkpoint":
            wait_until(child, lambda: list(folder.glob(".checkpoint-*")))
            time.sleep(draw.uniform(0, 0.03))

    def kill(self, child: Any, name: str, draw: random.Random) -> bool:
        """Kill the process; of a launch, one of its ranks or the launcher."""
        if self.engine is None:
            return super().kill(child, name, draw)
        processes = processes_of(str(self.folder / name))
        if not processes or not is_running(child):
            return False
        os.kill(processes[draw.choice(sorted(processes))], signal.SIGKILL)
        code = child.wait(timeout=120)  # the others must not wait for the dead one for ever
        wait_deadline = time.monotonic() + 60
        while processes_of(str(self.folder / name)) and time.monotonic() < wait_deadline:
            time.sleep(0.1)
        return bool(code != 0)

    def phase(self, name: str) -> str:
        """What was being written."""
        folder = self.folder / name
        if list(folder.glob(".checkpoint-*")):
            return "checkpoint"
        if list(folder.glob(".model.saving-*")):
            return "final saving"
        return "step or evaluation" if self.n_logged(name) else "start"

    def begin_anew(self, name: str) -> None:
        """A finished training is not trained again."""
        shutil.rmtree(self.folder / name)

    def read_log(self, name: str) -> list[dict[str, Any]]:
        """Log entries without wall times."""
        lines = (self.folder / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    def compare(self, left: str, right: str) -> dict[str, Any]:
        """Largest difference of a logged number and of a weight (infinite where lines or names differ), files left over."""
        from safetensors.torch import load_file

        one, other = (load_file(self.folder / name / "model.safetensors") for name in (left, right))
        weights = float("inf")
        if one.keys() == other.keys():
            weights = max(float((one[key].float() - other[key].float()).abs().max()) for key in one)
        left_over = [path.name for path in (self.folder / left).iterdir() if path.name.startswith(".checkpoint")]
        logs = largest_log_difference(self.read_log(left), self.read_log(right))
        return {"largest_log_difference": logs, "largest_weight_difference": weights, "left_over": left_over}


def largest_log_difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """Over all numbers; infinite where lines or fields are missing or doubled."""
    if len(left) != len(right) or any(one.keys() != other.keys() for one, other in zip(left, right, strict=True)):
        return float("inf")
    pairs = [(one[key], other[key]) for one, other in zip(left, right, strict=True) for key in one]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max((abs(a - b) for a, b in pairs if a is not None), default=0.0)


def processes_of(output_dir: str) -> dict[str, int]:
    """The launcher and the ranks of a run, by the text of their command lines."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if output_dir in words and "bash" not in words[0]:
            rank = next((text.removeprefix("RANK=") for text in variables if text.startswith("RANK=")), None)
            found[f"rank {rank}" if rank is not None else "launcher"] = int(entry.name)
    return found


class Evaluation(Stage):
    """A tiny reward model on three bias files, in small batches: many moments between two of them."""

    module = "codes.evaluate.eval_rm"
    BIASES = ("length", "gender", "refinement-aware")
    # Reports show times of the run in their own words; everything that they show comes from the files that are compared.
    NOT_COMPARED = ("report.md", "report.html", "scores.sqlite", ".")

    def __init__(self, folder: Path, n_kills: int, n_rows: int, seed: int) -> None:
        from transformers import LlamaForSequenceClassification

        from tests.conftest import chatml_tokenizer, save_tiny, spread, tiny_config
        from tests.eval_rows import evaluation_row

        super().__init__(folder)
        tokenizer = chatml_tokenizer()
        config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
        self.model = save_tiny(folder / "tiny", spread(LlamaForSequenceClassification(config)), tokenizer)
        draw = random.Random(seed)
        for name in self.BIASES:
            rows = [evaluation_row(draw, name, number) for number in range(n_rows)]
            write_rows(folder / f"{name}_bias.jsonl", rows)
        self.n_kills, self.before = n_kills, 0

    def results(self, name: str) -> Path:
        """The results folder of a run."""
        return self.folder / name / self.model.name

    def start(self, name: str) -> Any:
        """A run; ``name`` is the parent of its results folder."""
        self.before = self.n_stored(name)
        arguments = ["--model_path", str(self.model), "--data_dir", str(self.folder), "--device", "cpu"]
        arguments += ["--bias_type", ",".join(self.BIASES), "--results_dir", str(self.folder / name)]
        return self.fork(name, [*arguments, "--max_tokens_per_batch", "128"])

    def n_stored(self, name: str) -> int:
        """Scores in the store of a run."""
        try:
            connection = sqlite3.connect(f"file:{self.results(name) / 'scores.sqlite'}?mode=ro", uri=True, timeout=10)
            try:
                return int(connection.execute("SELECT count(*) FROM scores").fetchone()[0])
            finally:
                connection.close()
        except sqlite3.OperationalError:
            return 0  # the file or its tables are not there yet

    def wait_for_moment(self, child: Any, name: str, draw: random.Random, is_last: bool) -> None:
        """One kill in five at the start, one in five after the last score, the others while scores are stored."""
        n_texts = self.n_stored("whole")
        kind = draw.random()
        if kind < 0.2 and self.before < n_texts:
            time.sleep(draw.uniform(0, START_SECONDS))
            return
        target = self.before + draw.randint(1, max(2, round(2 * n_texts / self.n_kills)))
        target = n_texts if is_last or kind > 0.8 else min(target, n_texts)
        wait_until(child, lambda: self.n_stored(name) >= target)
        time.sleep(draw.uniform(0, START_SECONDS if target == n_texts else 0.05))

    def phase(self, name: str) -> str:
        """By how many scores were stored."""
        stored = self.n_stored(name)
        return "end" if stored == self.n_stored("whole") else "start" if stored == self.before else "scoring"

    def comparable(self, name: str) -> Mapping[str, bytes]:
        """The results files by name, without what may differ between two runs of the same evaluation."""
        from codes.evaluate.results import RUN_FIELDS

        files: dict[str, bytes] = {}
        for path in sorted(self.results(name).iterdir()):
            if path.name.startswith(self.NOT_COMPARED):
                continue
            files[path.name] = path.read_bytes()
            if path.name.endswith("_summary.json"):
                summary = json.loads(files[path.name])
                for field in RUN_FIELDS:
                    summary["metadata"].pop(field, None)
                files[path.name] = json.dumps(summary).encode()
        return files

    def compare(self, left: str, right: str) -> dict[str, Any]:
        """Names of the results files that differ."""
        one, other = self.comparable(left), self.comparable(right)
        return {"files_that_differ": sorted(key for key in {*one, *other} if one.get(key) != other.get(key))}


class Construction(Stage):
    """``gptout`` beside a deterministic local server, which logs the requests that reach it."""

    module = "codes.construct.gptout"
    WORDS = 90
    CONCURRENCY = 8

    def __init__(self, folder: Path, n_kills: int, n_records: int) -> None:
        super().__init__(folder)
        self.n_kills, self.n_records = n_kills, n_records
        rows = [
            {
                "id": f"r{number}",
                "question": f"What about number {number}?",
                "chosen": english(f"c{number}", 20),
                "rejected": [english(f"r{number}", 20)],
            }
            for number in range(n_records)
        ]
        self.input_file = write_rows(folder / "in.jsonl", rows)
        self.log_file = folder / "server.log"
        command = [sys.executable, str(REPO_ROOT / "benchmarks" / "engine_server.py"), "--words", str(self.WORDS)]
        command += ["--min_seconds", "0.01", "--max_seconds", "0.06", "--log_file", str(self.log_file)]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.server.stdout is not None
        self.base_url = self.server.stdout.readline().strip()
        os.environ["OPENAI_API_KEY"] = "no-key-needed"
        # At every kill: how many requests had arrived, and the answers that were recorded by then.
        self.snapshots: list[tuple[int, set[str]]] = []

    def stop(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def start(self, name: str) -> Any:
        """A run; its files carry the name."""
        arguments = ["--input_file", str(self.input_file), "--output_file", str(self.folder / f"{name}.jsonl")]
        arguments += ["--work_dir", str(self.folder / name), "--api_base_url", self.base_url, "--api_model", "local"]
        arguments += ["--concurrency", str(self.CONCURRENCY), "--bias_types", "length", "--biases_per_record", "1"]
        return self.fork(name, arguments)

    def sent(self) -> list[str]:
        """The hashes of all requests so far, in the order of arrival."""
        return self.log_file.read_text().split() if self.log_file.exists() else []

    def recorded(self, name: str) -> set[str]:
        """The texts of all whole lines in a ledger."""
        file = self.folder / name / "ledger.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return {json.loads(line)["text"] for line in lines}

    def wait_for_moment(self, child: Any, name: str, draw: random.Random, is_last: bool) -> None:
        """One kill in five at the start, the others after a random number of requests."""
        target = len(self.sent()) + draw.randint(1, max(2, self.n_records // self.n_kills))
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, START_SECONDS))
        else:
            wait_until(child, lambda: len(self.sent()) >= target)
            time.sleep(draw.uniform(0, 0.05))

    def kill(self, child: Any, name: str, draw: random.Random) -> bool:
        """Kill; calls in flight may still arrive: none of them is recorded."""
        was_running = super().kill(child, name, draw)
        if was_running:
            self.snapshots.append((len(self.sent()), self.recorded(name)))
        return was_running

    def begin_anew(self, name: str) -> None:
        """A finished run has every answer in its ledger, and would send nothing more."""
        shutil.rmtree(self.folder / name)
        (self.folder / f"{name}.jsonl").unlink()
        self.snapshots.clear()

    def phase(self, name: str) -> str:
        """By what was recorded."""
        return "calls" if self.snapshots[-1][1] else "start"

    def compare(self, left: str, right: str) -> dict[str, Any]:
        """Files that differ, and recorded requests of the killed runs that were sent again."""
        ends = (".jsonl", "/failed.jsonl")
        pairs = [[(self.folder / f"{name}{end}").read_bytes() for name in (left, right)] for end in ends]
        texts = [english(digest, self.WORDS) for digest in self.sent()]
        again = sum(text in recorded for n_sent, recorded in self.snapshots for text in texts[n_sent:])
        return {
            "files_that_differ": [end for end, (one, other) in zip(ends, pairs, strict=True) if one != other],
            "n_recorded_requests_sent_again": again,
        }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("training", "evaluation", "construction"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rows", type=int, default=300, help="evaluation: rows of each file; construction: records")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="training")
    parser.add_argument("--engine", default="none", help="training, two ranks: none (DDP) or a DeepSpeed configuration")
    parser.add_argument("--precision", default="fp32", help="training")
    parser.add_argument("--epochs", type=int, default=0, help="training; 0: long enough for the kills")
    add_output_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the result; returns the exit code."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage: Training | Evaluation | Construction
        if args.stage == "training":
            engine = args.engine if args.ranks == 2 else None
            stage = Training(folder, args.kills, engine, args.precision, args.epochs)
        elif args.stage == "evaluation":
            stage = Evaluation(folder, args.kills, args.rows, args.seed)
        else:
            stage = Construction(folder, args.kills, args.rows)
        try:
            result = kill_again_and_again(stage, folder, args.kills, args.seed)
            if isinstance(stage, Construction):
                result |= {"n_requests_sent": len(stage.sent()), "n_distinct_requests": len(set(stage.sent()))}
        finally:
            if isinstance(stage, Construction):
                stage.stop()
    settings = {"benchmark": f"kills of {args.stage}", "ranks": args.ranks, "engine": args.engine}
    write_line(settings | result, args.output_file)
    tolerance = 1e-6 if args.ranks == 2 else 0.0
    found = result["differences"]
    return int(any(value if isinstance(value, list) else value > tolerance for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
