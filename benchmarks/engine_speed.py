"""How close the engine comes to the ideal, to the bare client, and to the method's original loop.

Starts ``engine_server.py`` in a process of its own. Cases:

* ``slow``: latency 1 to 3 s, 256 calls at a time; ``fast``: latency 0.2 s, 16 calls at a time. Ideal:
  concurrency / mean latency.
* ``original``: the same slow server, ten threads that wait for each other after every 100 records.
* ``stuck``: latency 0.1 s, one request in 200 takes 10 s, 16 at a time: what a window of 4 and of 64 requests
  a call, read ahead of the first unfinished one, makes of it.
* ``cpu``: CPU time of this process a request, engine against the bare client with the same settings, in turns.

Prints one JSON line a case. Example:

``python -m benchmarks.engine_speed --cases slow,fast,original,stuck,cpu``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from benchmarks.common import add_output_argument, write_line
from codes.common import llm
from codes.common.llm import Completion, CompletionRequest, Engine, Ledger, LlmClient
from tests.chat_server import english

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_WINDOW = llm.WINDOW
PROMPT_WORDS = 300
MAX_TOKENS = 512
STUCK_SHARE, STUCK_SECONDS = 1 / 200, 10.0


@contextlib.contextmanager
def running_server(min_seconds: float, max_seconds: float, stuck_share: float = 0.0) -> Iterator[str]:
    """A server of its own process; yields its base URL."""
    command = [sys.executable, str(REPO_ROOT / "benchmarks" / "engine_server.py")]
    command += ["--min_seconds", str(min_seconds), "--max_seconds", str(max_seconds)]
    command += ["--stuck_share", str(stuck_share), "--stuck_seconds", str(STUCK_SECONDS)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdin is not None and server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.stdin.close()
        server.wait()


def prompt(number: int) -> list[dict[str, str]]:
    """A prompt of some 1,800 characters, another one for each number."""
    return [{"role": "user", "content": f"{number}: {TEXT}"}]


TEXT = english("prompt", PROMPT_WORDS)


def run_engine(base_url: str, n: int, concurrency: int) -> tuple[float, float]:
    """Ask n requests through the engine; wall and CPU seconds."""
    requests = (
        CompletionRequest(tuple(prompt(number)), model="local", max_tokens=MAX_TOKENS, prompt_version="1")
        for number in range(n)
    )
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        with Ledger(Path(folder) / "ledger.jsonl") as ledger:
            engine = Engine(LlmClient(api_key="no-key-needed", base_url=base_url), ledger, concurrency=concurrency)
            n_answers = sum(isinstance(outcome, Completion) for outcome in engine.stream(requests, total=n))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert n_answers == n, f"{n - n_answers} of {n} requests failed"
    return wall, cpu


def run_bare(base_url: str, n: int, concurrency: int) -> tuple[float, float]:
    """Ask n requests through the client alone, as its documentation shows; wall and CPU seconds."""

    async def ask_all() -> int:
        numbers = iter(range(n))
        texts: list[str | None] = []
        async with openai.AsyncOpenAI(
            api_key="no-key-needed", base_url=base_url, timeout=120.0, max_retries=0
        ) as client:

            async def work() -> None:
                for number in numbers:
                    answer = await client.chat.completions.create(
                        model="local",
                        messages=prompt(number),  # type: ignore[arg-type]
                        max_tokens=MAX_TOKENS,
                        temperature=0.0,
                    )
                    texts.append(answer.choices[0].message.content)

            await asyncio.gather(*(work() for _ in range(concurrency)))
        return len(texts)

    wall, cpu = time.perf_counter(), time.process_time()
    assert asyncio.run(ask_all()) == n
    return time.perf_counter() - wall, time.process_time() - cpu


def run_original(base_url: str, n: int, *, n_threads: int = 10, barrier: int = 100) -> float:
    """The original loop: ten threads, and all wait after each hundred records; wall seconds."""
    client = openai.OpenAI(api_key="no-key-needed", base_url=base_url, timeout=120.0)

    def ask(number: int) -> str | None:
        answer = client.chat.completions.create(
            model="local",
            messages=prompt(number),  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=0.0,
        )
        return answer.choices[0].message.content

    wall = time.perf_counter()
    for start in range(0, n, barrier):
        with ThreadPoolExecutor(n_threads) as pool:
            assert all(pool.map(ask, range(start, min(start + barrier, n))))
    return time.perf_counter() - wall


def measure_against_ideal(
    name: str, *, n: int, concurrency: int, min_seconds: float, max_seconds: float
) -> dict[str, Any]:
    """Requests a second, and the share of the ideal."""
    with running_server(min_seconds, max_seconds) as base_url:
        wall, cpu = run_engine(base_url, n, concurrency)
    ideal = concurrency / ((min_seconds + max_seconds) / 2)
    return {
        "benchmark": f"engine_speed/{name}",
        "n_requests": n,
        "concurrency": concurrency,
        "latency_seconds": [min_seconds, max_seconds],
        "wall_seconds": round(wall, 2),
        "requests_per_second": round(n / wall, 2),
        "ideal_requests_per_second": round(ideal, 2),
        "share_of_ideal": round(n / wall / ideal, 4),
        "cpu_ms_per_request": round(1e3 * cpu / n, 3),
        "load_average": round(os.getloadavg()[0], 2),
    }


def measure_stuck(n: int, *, concurrency: int = 16, seconds: float = 0.1) -> list[dict[str, Any]]:
    """Requests a second with some that get stuck, for a narrow and for the default window."""
    ideal = concurrency / (seconds * (1 - STUCK_SHARE) + STUCK_SECONDS * STUCK_SHARE)
    results = []
    for window in (4, DEFAULT_WINDOW):
        with running_server(seconds, seconds, STUCK_SHARE) as base_url:
            llm.WINDOW = window
            wall, _ = run_engine(base_url, n, concurrency)
            llm.WINDOW = DEFAULT_WINDOW
        results.append(
            {
                "benchmark": "engine_speed/stuck",
                "window": window,
                "n_requests": n,
                "wall_seconds": round(wall, 2),
                "requests_per_second": round(n / wall, 2),
                "share_of_ideal": round(n / wall / ideal, 4),
            }
        )
    return results


def measure_original(n: int) -> dict[str, Any]:
    """Records a second of the original loop against the slow server."""
    with running_server(1.0, 3.0) as base_url:
        wall = run_original(base_url, n)
    return {
        "benchmark": "engine_speed/original",
        "n_requests": n,
        "wall_seconds": round(wall, 2),
        "requests_per_second": round(n / wall, 3),
    }


def measure_cpu(n: int, concurrency: int, rounds: int) -> dict[str, Any]:
    """CPU a request of engine and bare client, in turns against the same server."""
    bare, engine = [], []
    with running_server(0.05, 0.05) as base_url:
        run_bare(base_url, concurrency, concurrency)  # imports and caches
        run_engine(base_url, concurrency, concurrency)
        for _ in range(rounds):
            bare.append(1e3 * run_bare(base_url, n, concurrency)[1] / n)
            engine.append(1e3 * run_engine(base_url, n, concurrency)[1] / n)
    return {
        "benchmark": "engine_speed/cpu",
        "n_requests": n,
        "concurrency": concurrency,
        "bare_ms_per_request": [round(value, 3) for value in bare],
        "engine_ms_per_request": [round(value, 3) for value in engine],
        "median_difference_ms": round(statistics.median(engine) - statistics.median(bare), 3),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="slow,fast,original,stuck,cpu")
    parser.add_argument("--slow_requests", type=int, default=10000)
    parser.add_argument("--fast_requests", type=int, default=2000)
    parser.add_argument("--original_requests", type=int, default=300)
    parser.add_argument("--cpu_requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    add_output_argument(parser)
    return parser


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of the cases, in their order."""
    rates = {}
    for case in args.cases.split(","):
        if case == "slow":
            results = [
                measure_against_ideal(case, n=args.slow_requests, concurrency=256, min_seconds=1.0, max_seconds=3.0)
            ]
        elif case == "fast":
            results = [
                measure_against_ideal(case, n=args.fast_requests, concurrency=16, min_seconds=0.2, max_seconds=0.2)
            ]
        elif case == "original":
            results = [measure_original(args.original_requests)]
        elif case == "stuck":
            results = list(measure_stuck(args.fast_requests))
        elif case == "cpu":
            results = [measure_cpu(args.cpu_requests, concurrency, args.rounds) for concurrency in (16, 256)]
        else:
            raise SystemExit(f"unknown case {case!r}; allowed: slow, fast, original, stuck, cpu")
        rates[case] = results[0].get("requests_per_second")
        yield from results
    if {"slow", "original"} <= rates.keys():
        yield {"benchmark": "engine_speed/ratio", "slow_to_original": round(rates["slow"] / rates["original"], 2)}


def main() -> int:
    """Print one JSON line a case."""
    args = build_parser().parse_args()
    for result in measured(args):
        write_line(result, args.output_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
