"""Thousands of records through a whole step while three calls in ten go wrong in every way servers know.

Starts a misbehaving local server (``FAULTS`` of ``tests/chat_server.py``: 429 with Retry-After, 500, 503, hangs, drips, resets,
half bodies, wrong lengths, responses that nobody asked for, invalid JSON, odd charsets, error bodies in a 200, null and empty
content, content filter, cut-off and unfinished answers) and ``codes.construct.gptout`` beside it. A few requests meet the same
fault always; their reason is known. One good answer in ten is followed by a whole response to nobody. Then a server that sends
requests on to another one, and how soon a fatal error ends a run with many calls in flight. Prints one JSON line; exit code 1
where a record is missing from both files, a reason is wrong, an answer is another prompt's, a fault's text is in the output, or
anything reached the other server. Example:

``python -m benchmarks.engine_faults --records 2000``
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
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import add_output_argument, write_line
from codes.common.llm import CompletionRequest, Engine, FatalApiError, Ledger, LlmClient
from tests.chat_server import FAULTS, ChatServer, Reply, answer, choose_fault, english, error, redirect, whole_response

REPO_ROOT = Path(__file__).resolve().parents[1]
FAULT_SHARE = 0.3
CURSED_SHARE = 0.02
FOLLOWED_SHARE = 0.1


def write_records(path: Path, n: int) -> None:
    """Short records, so that a long answer shows the cue."""
    with path.open("w") as handle:
        for number in range(n):
            row: dict[str, Any] = {"id": f"r{number}", "question": f"What about number {number}?"}
            row |= {"chosen": english(f"c{number}", 20), "rejected": [english(f"r{number}", 20)]}
            handle.write(json.dumps(row) + "\n")


def record_of(body: dict[str, Any]) -> str:
    """The id of the record that a request belongs to."""
    text = body["messages"][-1]["content"]
    return "r" + text.split("What about number ")[1].split("?")[0]


def run_with_faults(n: int, concurrency: int, request_timeout: float) -> dict[str, Any]:
    """One gptout run; what became of each record against what the server sent last."""
    sent: dict[str, list[str | None]] = {}
    texts: dict[str, str] = {}

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        fault = choose_fault(body, attempt, share=FAULT_SHARE, cursed_share=CURSED_SHARE)
        record = record_of(body)
        sent.setdefault(record, []).append(fault)
        if fault is not None:
            return FAULTS[fault][0]()
        texts[record] = english(body["messages"][-1]["content"], 90)
        is_followed = random.Random(record).random() < FOLLOWED_SHARE
        return replace(answer(texts[record]), extra=whole_response("LEAK of another prompt") if is_followed else b"")

    with tempfile.TemporaryDirectory() as name, ChatServer(respond) as server:
        folder = Path(name)
        write_records(folder / "in.jsonl", n)
        command = [sys.executable, "-m", "codes.construct.gptout", "--input_file", str(folder / "in.jsonl")]
        command += ["--output_file", str(folder / "out.jsonl"), "--work_dir", str(folder / "work")]
        command += ["--api_base_url", server.base_url, "--api_model", "m", "--concurrency", str(concurrency)]
        command += ["--request_timeout", str(request_timeout), "--max_attempts", "4"]
        command += ["--bias_types", "length", "--biases_per_record", "1"]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OPENAI_API_KEY": "no-key-needed"}
        wall = time.perf_counter()
        done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
        wall = time.perf_counter() - wall
        if not (folder / "out.jsonl").exists():
            raise SystemExit(done.stderr[-2000:])
        written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        failed = [json.loads(line) for line in (folder / "work" / "failed.jsonl").read_text().splitlines()]
        outputs = (folder / "out.jsonl").read_text()
    complete = {row["id"] for row in written if len(row["rejected"]) == 2}
    n_shifted = sum(row["id"] in complete and texts.get(row["id"]) not in row["rejected"] for row in written)
    reasons = {row["id"]: row["reason"] for row in failed}
    wrong = {
        record: (reasons.get(record), faults)
        for record, faults in sent.items()
        if reasons.get(record) != (FAULTS[faults[-1]][1] if faults[-1] else None)
    }
    return {
        "exit_code": done.returncode,
        "wall_seconds": round(wall, 1),
        "n_records": n,
        "n_calls": sum(map(len, sent.values())),
        "share_of_faulty_calls": round(
            sum(f is not None for faults in sent.values() for f in faults) / sum(map(len, sent.values())), 3
        ),
        "n_complete": len(complete),
        "n_failed": len(failed),
        "n_in_both_or_in_none": sum((f"r{k}" in complete) == (f"r{k}" in reasons) for k in range(n)),
        "reasons": dict(Counter(reasons.values()).most_common()),
        "n_answers_of_another_prompt": n_shifted,
        "n_other_than_sent_last": len(wrong),
        "examples_other_than_sent_last": dict(list(wrong.items())[:3]),
        "fault_text_in_output": "LEAK" in outputs,
    }


def requests_after_redirect(concurrency: int = 16) -> dict[str, Any]:
    """A server that sends one request in twenty on: what reached it, what reached the other one, what was recorded."""

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        is_sent_on = len(server.requests) % 20 == 0
        return redirect(elsewhere.base_url + "/chat/completions", 307) if is_sent_on else answer("from here")

    with (
        tempfile.TemporaryDirectory() as folder,
        ChatServer(lambda body, attempt: answer("LEAK from elsewhere")) as elsewhere,
        ChatServer(respond) as server,
        Ledger(Path(folder) / "ledger.jsonl") as ledger,
    ):
        client = LlmClient(api_key="no-key-needed", base_url=server.base_url)
        reason = ""
        try:
            list(Engine(client, ledger, concurrency=concurrency).stream(numbered_requests(400)))
        except FatalApiError as fatal:
            reason = fatal.reason
        n_elsewhere = len(elsewhere.requests) + len(elsewhere.authorizations)
        return {
            "ended_by": reason,
            "n_requests": len(server.requests),
            "n_elsewhere": n_elsewhere,
            "n_recorded": len(ledger),
        }


def numbered_requests(n: int) -> Iterator[CompletionRequest]:
    """Requests that differ in a number."""
    for number in range(n):
        yield CompletionRequest(
            ({"role": "user", "content": str(number)},), model="m", max_tokens=9, prompt_version="1"
        )


def seconds_to_stop(concurrency: int = 64) -> float:
    """From a fatal answer on its way until the caller has its error, with all other calls hanging."""
    sent_at = 0.0

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        nonlocal sent_at
        if len(server.requests) < concurrency:  # this one included: the last to fit in brings the error
            return answer("late", seconds=300.0)
        sent_at = time.monotonic()
        return error(401, "who are you")

    with (
        tempfile.TemporaryDirectory() as folder,
        ChatServer(respond) as server,
        Ledger(Path(folder) / "ledger.jsonl") as ledger,
    ):
        client = LlmClient(api_key="no-key-needed", base_url=server.base_url, request_timeout=300.0)
        try:
            list(Engine(client, ledger, concurrency=concurrency).stream(numbered_requests(10_000)))
        except FatalApiError:
            return time.monotonic() - sent_at
    raise SystemExit("the fatal error did not stop the run")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--request_timeout", type=float, default=3.0)
    add_output_argument(parser)
    return parser


def main() -> int:
    """Print the result; returns the exit code."""
    args = build_parser().parse_args()
    result = {"benchmark": "engine_faults", **run_with_faults(args.records, args.concurrency, args.request_timeout)}
    result["redirect"] = requests_after_redirect()
    result["seconds_from_fatal_to_stop"] = round(seconds_to_stop(), 3)
    write_line(result, args.output_file)
    faults = ("n_in_both_or_in_none", "n_other_than_sent_last", "n_answers_of_another_prompt", "fault_text_in_output")
    is_redirected = result["redirect"]["n_elsewhere"] > 0 or result["redirect"]["ended_by"] != "redirect"
    return int(is_redirected or any(result[fault] for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
