"""Kill -9 a bias evaluation again and again, and compare what is left with a run that nobody disturbed.

Makes a tiny reward model and evaluation files in a temporary folder and starts ``codes.evaluate.eval_rm`` on them. Each kill
comes at a random number of stored scores and some random milliseconds later, or at a random moment of the start, so that it
meets loading, scoring, transactions and the final writing. Prints one JSON line; exit code 1 where the results differ. Example:

``python -m benchmarks.eval_kills --kills 30``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import LlamaForSequenceClassification

from benchmarks.common import add_output_argument, write_line
from codes.common.score_store import STORE_FILE
from codes.evaluate.scorer_setup import RUN_FIELDS
from tests.conftest import chatml_tokenizer, save_tiny, spread, tiny_config
from tests.eval_rows import evaluation_row

REPO_ROOT = Path(__file__).resolve().parents[1]
BIASES = ("length", "gender", "refinement-aware")
# So many kills come at any time of the start, and so many after the last score.
START_SHARE, END_SHARE = 0.2, 0.2
START_SECONDS, END_SECONDS = 6.0, 1.0
# Reports show times of the run in their own words; everything that they show comes from the files that are compared.
NOT_COMPARED = ("report.md", "report.html", STORE_FILE)


class Bench:
    """One model, its evaluation files, and the runs on them."""

    def __init__(self, folder: Path, n_rows: int, seed: int) -> None:
        self.folder = folder
        self.model = folder / "tiny"
        tokenizer = chatml_tokenizer()
        config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
        save_tiny(self.model, spread(LlamaForSequenceClassification(config)), tokenizer)
        draw = random.Random(seed)
        for name in BIASES:
            rows = [evaluation_row(draw, name, number) for number in range(n_rows)]
            (folder / f"{name}_bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def results(self, name: str) -> Path:
        """The results folder of a run."""
        return self.folder / name / self.model.name

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start an evaluation; small batches, so that there are many moments between two of them."""
        command = [sys.executable, "-m", "codes.evaluate.eval_rm", "--model_path", str(self.model)]
        command += ["--data_dir", str(self.folder), "--bias_type", ",".join(BIASES), "--device", "cpu"]
        command += ["--results_dir", str(self.folder / name), "--max_tokens_per_batch", "128"]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=REPO_ROOT, env=environment, stdout=log, stderr=log)

    def finish(self, name: str) -> None:
        """Evaluate to the end."""
        code = self.start(name).wait()
        if code != 0:
            raise SystemExit(f"eval_rm ended with code {code}: {(self.folder / f'{name}.log').read_text()[-2000:]}")

    def n_stored(self, name: str) -> int:
        """Scores in the store of a run."""
        path = self.results(name) / STORE_FILE
        if not path.exists():
            return 0
        try:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
            try:
                return int(connection.execute("SELECT count(*) FROM scores").fetchone()[0])
            finally:
                connection.close()
        except sqlite3.OperationalError:
            return 0  # the file is there, its tables are not yet

    def kill_once(self, name: str, draw: random.Random, n_texts: int, n_kills: int) -> str | None:
        """Start, wait for a random moment, kill.

        Returns:
            Where it met the run (``start``, ``scoring``, ``end``); None where there was nothing left to kill.
        """
        before = self.n_stored(name)
        kind = draw.random()
        left = n_texts - before
        target = before + draw.randint(1, max(2, round(2 * n_texts / n_kills)))
        child = self.start(name)
        if kind < START_SHARE and left > 0:
            time.sleep(draw.uniform(0, START_SECONDS))
        else:
            target = n_texts if kind > 1 - END_SHARE or left == 0 else min(target, n_texts)
            while child.poll() is None and self.n_stored(name) < target:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, START_SECONDS if left == 0 else END_SECONDS if target == n_texts else 0.05))
        was_running = child.poll() is None
        child.kill()
        child.wait()
        after = self.n_stored(name)
        if not was_running:
            return None
        return "end" if after == n_texts else "start" if after == before else "scoring"


def comparable(folder: Path) -> dict[str, bytes]:
    """The results files of a folder by name, without what may differ between two runs of the same evaluation."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((*NOT_COMPARED, ".")):
            continue
        files[path.name] = path.read_bytes()
        if path.name.endswith("_summary.json"):
            summary = json.loads(files[path.name])
            for field in RUN_FIELDS:
                summary["metadata"].pop(field, None)
            files[path.name] = json.dumps(summary).encode()
    return files


def run(bench: Bench, n_kills: int, seed: int) -> dict[str, Any]:
    """Evaluate undisturbed, kill, finish, compare."""
    draw = random.Random(seed)
    bench.finish("whole")
    n_texts = bench.n_stored("whole")
    met: list[str] = []
    stored: list[int] = []
    n_starts = 0
    while len(met) < n_kills:
        n_starts += 1
        where = bench.kill_once("killed", draw, n_texts, n_kills)
        if where is not None:
            met.append(where)
            stored.append(bench.n_stored("killed"))
    bench.finish("killed")
    whole, killed = comparable(bench.results("whole")), comparable(bench.results("killed"))
    metadata = json.loads((bench.results("killed") / "bias_summary.json").read_bytes())["metadata"]
    return {
        "benchmark": "eval_kills",
        "n_kills": n_kills,
        "n_starts": n_starts + 1,
        "n_texts": n_texts,
        "kills_met": {kind: met.count(kind) for kind in ("start", "scoring", "end")},
        "n_stored_at_kills": stored,
        "n_from_store_at_the_end": metadata["n_from_store"],
        "files_compared": list(whole),
        "files_that_differ": sorted(name for name in {*whole, *killed} if whole.get(name) != killed.get(name)),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rows", type=int, default=300, help="rows of each of the three evaluation files")
    parser.add_argument("--seed", type=int, default=42)
    add_output_argument(parser)
    return parser


def main() -> int:
    """Print the result; returns the exit code."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Bench(Path(folder), args.rows, args.seed), args.kills, args.seed)
    write_line(result, args.output_file)
    return int(bool(result["files_that_differ"]))


if __name__ == "__main__":
    sys.exit(main())
