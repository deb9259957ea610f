"""Memory of a whole process at 1,000 and at 100,000 records: a run that asks, and a run that resumes.

Each size is a process of its own against ``engine_server.py`` without latency, then a second process over the
ledger of the first. The step streams records from a file, as the construct steps do, and writes a line for
each outcome. Prints one JSON line a size and one of the ratios. Example:

``PYTHONPATH=. python benchmarks/engine_memory.py --sizes 1000,100000``
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codes.common.errors import ContrastRMError
from codes.common.llm import Completion
from codes.construct.api import open_api
from tests.chat_server import english

REPO_ROOT = Path(__file__).resolve().parents[1]
CONCURRENCY = 32


def write_records(path: Path, n: int) -> None:
    """Records of some 600 characters."""
    text = english("record", 100)
    with path.open("w") as handle:
        for number in range(n):
            handle.write(json.dumps({"id": f"r{number}", "question": f"What about {number}? {text}"}) + "\n")


def step(base_url: str, folder: Path) -> dict[str, Any]:
    """One step in this process: stream, write, report the peak of its memory."""
    os.environ["OPENAI_API_KEY"] = "no-key-needed"
    api = open_api(
        api_model="local",
        api_base_url=base_url,
        temperature=0.0,
        max_new_tokens=256,
        concurrency=CONCURRENCY,
        max_attempts=6,
        request_timeout=120.0,
        work_dir=folder,
        seed=1,
    )
    n_answers = 0
    wall, cpu = time.perf_counter(), time.process_time()
    with api.ledger, (folder / "out.jsonl").open("w") as out:
        for outcome in api.ask_stream(prompts(folder / "in.jsonl"), "records"):
            if not isinstance(outcome, Completion):
                raise ContrastRMError(f"a request failed: {outcome}")
            out.write(json.dumps({"text": outcome.text}) + "\n")
            n_answers += 1
    return {
        "n_records": n_answers,
        "n_calls": api.summary()["spent_in_this_run"]["n_calls"],
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_ms_per_record": round(1e3 * (time.process_time() - cpu) / max(1, n_answers), 3),
        "ledger_mib": round((folder / "ledger.jsonl").stat().st_size / 2**20, 1),
    }


def prompts(path: Path) -> Iterator[list[dict[str, str]]]:
    """One prompt a record."""
    with path.open() as handle:
        for line in handle:
            yield [{"role": "user", "content": json.loads(line)["question"]}]


def run_step(base_url: str, folder: Path) -> dict[str, Any]:
    """``step`` in a process of its own."""
    command = [sys.executable, __file__, "--step", base_url, str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1000,100000")
    parser.add_argument("--step", nargs=2, metavar=("BASE_URL", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Print one JSON line a size and run."""
    args = build_parser().parse_args()
    if args.step:
        print(json.dumps(step(args.step[0], Path(args.step[1]))))
        return 0
    command = [sys.executable, str(REPO_ROOT / "benchmarks" / "engine_server.py")]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdin is not None and server.stdout is not None
    base_url = server.stdout.readline().strip()
    peaks: dict[str, list[float]] = {"asking": [], "resuming": []}
    try:
        for size in map(int, args.sizes.split(",")):
            with tempfile.TemporaryDirectory() as name:
                write_records(Path(name) / "in.jsonl", size)
                for kind, values in peaks.items():
                    result = run_step(base_url, Path(name))
                    values.append(result["peak_mib"])
                    print(json.dumps({"benchmark": f"engine_memory/{kind}", **result}), flush=True)
    finally:
        server.stdin.close()
        server.wait()
    ratios = {kind: round(values[-1] / values[0], 3) for kind, values in peaks.items()}
    print(json.dumps({"benchmark": "engine_memory/ratio_of_largest_to_smallest", **ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
