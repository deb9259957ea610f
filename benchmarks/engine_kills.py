"""Kill -9 a construct run again and again, and compare what is left with a run that nobody disturbed.

Starts a deterministic local server (``engine_server.py``) and ``codes.construct.gptout`` beside it, in a
temporary folder. Each kill comes after a random number of requests and some random milliseconds, so that it
meets start-up, calls in flight, ledger lines and the final writing. Prints one JSON line; exit code 1 where
the files differ or a recorded request was sent again. Example:

``python -m benchmarks.engine_kills --kills 50 --records 500``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_output_argument, write_line
from tests.chat_server import english

REPO_ROOT = Path(__file__).resolve().parents[1]
WORDS = 90
CONCURRENCY = 8
# So many kills come at any time within the first seconds, whatever has been sent by then.
START_SHARE = 0.2
START_SECONDS = 3.0


class Bench:
    """One server, one input, and the runs beside them."""

    def __init__(self, folder: Path, n_records: int) -> None:
        self.folder = folder
        self.log_file = folder / "server.log"
        self.environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OPENAI_API_KEY": "no-key-needed"}
        rows = [
            {
                "id": f"r{number}",
                "question": f"What about number {number}?",
                "chosen": english(f"c{number}", 20),
                "rejected": [english(f"r{number}", 20)],
            }
            for number in range(n_records)
        ]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, str(REPO_ROOT / "benchmarks" / "engine_server.py"), "--words", str(WORDS)]
        command += ["--min_seconds", "0.01", "--max_seconds", "0.06", "--log_file", str(self.log_file)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        assert self.server.stdout is not None
        self.base_url = self.server.stdout.readline().strip()

    def stop(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start gptout; its files carry the name."""
        command = [sys.executable, "-m", "codes.construct.gptout", "--input_file", str(self.folder / "in.jsonl")]
        command += ["--output_file", str(self.folder / f"{name}.jsonl"), "--work_dir", str(self.folder / name)]
        command += ["--api_base_url", self.base_url, "--api_model", "local", "--concurrency", str(CONCURRENCY)]
        command += ["--bias_types", "length", "--biases_per_record", "1"]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=REPO_ROOT, env=self.environment, stdout=log, stderr=log)

    def finish(self, name: str) -> None:
        """Run gptout to its end."""
        code = self.start(name).wait()
        if code != 0:
            raise SystemExit(f"gptout ended with code {code}: {(self.folder / f'{name}.log').read_text()[-2000:]}")

    def sent(self) -> list[str]:
        """The hashes of all requests so far, in the order of arrival."""
        return self.log_file.read_text().split() if self.log_file.exists() else []

    def recorded(self, name: str) -> set[str]:
        """The texts of all whole lines in a ledger."""
        path = self.folder / name / "ledger.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return {json.loads(line)["text"] for line in lines}

    def kill_once(self, name: str, draw: random.Random, requests_a_kill: float) -> bool:
        """Start, wait for a random moment, kill; whether there was anything left to kill."""
        is_at_start = draw.random() < START_SHARE
        target = len(self.sent()) + draw.randint(1, max(2, round(2 * requests_a_kill)))
        child = self.start(name)
        if is_at_start:
            time.sleep(draw.uniform(0, START_SECONDS))
        while not is_at_start and child.poll() is None and len(self.sent()) < target:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        was_running = child.poll() is None
        child.kill()
        child.wait()
        return was_running


def run(bench: Bench, n_kills: int, n_records: int, seed: int) -> dict[str, Any]:
    """Kill, finish, compare."""
    draw = random.Random(seed)
    snapshots: list[tuple[int, set[str]]] = []
    n_starts = 0
    while len(snapshots) < n_kills:
        n_starts += 1
        if bench.kill_once("killed", draw, n_records / n_kills):
            # Calls in flight at the kill may still arrive: none of them is recorded.
            snapshots.append((len(bench.sent()), bench.recorded("killed")))
    bench.finish("killed")
    sent = bench.sent()
    texts = [english(digest, WORDS) for digest in sent]
    sent_again = sum(text in recorded for n_sent, recorded in snapshots for text in texts[n_sent:])
    bench.finish("whole")
    files = {"output": (".jsonl",), "failed": ("/failed.jsonl",)}
    equal = {
        name: (bench.folder / f"killed{end}").read_bytes() == (bench.folder / f"whole{end}").read_bytes()
        for name, (end,) in files.items()
    }
    return {
        "benchmark": "engine_kills",
        "n_kills": n_kills,
        "n_starts": n_starts + 1,
        "n_records": n_records,
        "n_written": len((bench.folder / "killed.jsonl").read_text().splitlines()),
        "n_recorded_at_kills": [len(recorded) for _, recorded in snapshots],
        "n_requests_sent": len(sent),
        "n_distinct_requests": len(set(sent)),
        "n_recorded_requests_sent_again": sent_again,
        "files_equal": equal,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--seed", type=int, default=42)
    add_output_argument(parser)
    return parser


def main() -> int:
    """Print the result; returns the exit code."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.records)
        try:
            result = run(bench, args.kills, args.records, args.seed)
        finally:
            bench.stop()
    write_line(result, args.output_file)
    return int(not all(result["files_equal"].values()) or result["n_recorded_requests_sent_again"] > 0)


if __name__ == "__main__":
    sys.exit(main())
