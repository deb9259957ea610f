"""Three in ten calls go wrong in every way that servers know; and the key is looked for everywhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import FAULTS, ChatServer, Reply, answer, choose_fault, english

from codes.common.llm import ApiError, Completion, CompletionRequest, Engine, Ledger, LlmClient, RetriableError

REPO_ROOT = Path(__file__).resolve().parents[1]
# Nothing that the key's common patterns would find by themselves.
KEY = "Zq7-recognisable-8f3a51c0d9e24b76"
N = 300


def text_for(body: dict[str, Any]) -> str:
    return english(body["messages"][-1]["content"], 12)


def test_every_request_ends_with_its_answer_or_its_true_reason(tmp_path: Path) -> None:
    sent: dict[str, list[str | None]] = {}

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        fault = choose_fault(body, attempt, share=0.3, cursed_share=0.18)
        sent.setdefault(body["messages"][-1]["content"], []).append(fault)
        return answer(text_for(body)) if fault is None else FAULTS[fault][0]()

    requests = [
        CompletionRequest(({"role": "user", "content": f"number {n}"},), model="m", max_tokens=50, prompt_version="1")
        for n in range(N)
    ]
    with ChatServer(respond) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        client = LlmClient(
            api_key=KEY, base_url=server.base_url, max_attempts=3, request_timeout=1.0, first_wait_seconds=0.02
        )
        outcomes = list(Engine(client, ledger, concurrency=32).stream(requests, total=N))
        n_calls = len(server.requests)
    assert len(outcomes) == N and set(sent) == {request.messages[0]["content"] for request in requests}
    reasons: Counter[str] = Counter()
    for request, outcome in zip(requests, outcomes, strict=True):
        faults = sent[request.messages[0]["content"]]
        # The reply sent last decides. (A good one that the machine delivered too late is a time-out.)
        if isinstance(outcome, Completion):
            assert faults[-1] is None and outcome.text == text_for({"messages": request.messages})
            continue
        expected = "timeout" if faults[-1] is None else FAULTS[faults[-1]][1]
        assert outcome.reason == expected, (faults, outcome)
        assert outcome.attempts == len(faults)
        assert outcome.attempts == 3 or not isinstance(outcome, RetriableError)
        reasons[outcome.reason] += 1
    assert set(reasons) == {reason for _, reason in FAULTS.values()}
    assert sum(isinstance(outcome, Completion) for outcome in outcomes) > 0.6 * N
    recorded = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    answers = [row for row in recorded if row.get("finish_reason") == "stop"]
    assert len(answers) == N - reasons.total() and not any("LEAK" in row["text"] for row in answers)
    # What was recorded is not sent again; what was only unlucky is.
    with (
        ChatServer(lambda body, attempt: answer(text_for(body)), port=server.port) as server,
        Ledger(tmp_path / "ledger.jsonl") as ledger,
    ):
        client = LlmClient(api_key=KEY, base_url=server.base_url)
        again = list(Engine(client, ledger, concurrency=32).stream(requests))
        n_retriable = sum(isinstance(outcome, RetriableError) for outcome in outcomes)
        assert len(server.requests) == n_retriable > 0 and n_calls > N
    for before, after in zip(outcomes, again, strict=True):
        if isinstance(before, RetriableError):
            assert isinstance(after, Completion)
        elif isinstance(before, ApiError):
            assert isinstance(after, ApiError)
            assert (after.reason, after.attempts, str(after)) == (before.reason, before.attempts, str(before))
        else:
            assert after == before


def echo_headers(server: ChatServer, seen: list[str]) -> Any:
    """Servers that print what they got: in error bodies, in error fields of good bodies, in answers."""

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        # The command line of the process that asks, as any user of the machine can read it.
        seen.extend(
            path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
        )
        shown = json.dumps({"authorization": f"Bearer {KEY}", "error": f"key {KEY} of {body['model']}"})
        number = len(server.requests) % 6
        if number == 0:
            return Reply(json.dumps({"error": {"message": shown, "code": "x"}}).encode(), 400)
        if number == 1:
            return Reply(shown.encode(), 500, {"content-type": "text/plain"})
        if number == 2:
            return Reply(json.dumps({"error": {"message": shown, "code": 422}}).encode())
        if number == 3:
            return answer(f"{english('a', 40)} {KEY} {english('b', 40)}")
        if number == 4:
            return Reply(b"", 503, {"x-echo": f"Bearer {KEY}", "retry-after-ms": "5"})
        return answer(english(str(len(server.requests)), 80))

    return respond


@pytest.mark.parametrize("last_status", [200, 401])
def test_the_key_of_a_whole_run_is_found_nowhere(last_status: int, tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{n}",
            "question": f"What about {n}?",
            "chosen": english(f"c{n}", 30),
            "rejected": [english(f"r{n}", 30)],
        }
        for n in range(12)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[str] = []

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        if last_status == 401 and len(server.requests) > 15:
            return Reply(json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}).encode(), 401)
        return echo_headers(server, seen)(body, attempt)

    with ChatServer(respond) as server:
        command = [sys.executable, "-m", "codes.construct.gptout", "--input_file", str(tmp_path / "in.jsonl")]
        command += ["--output_file", str(tmp_path / "out.jsonl"), "--work_dir", str(tmp_path / "work")]
        command += ["--api_base_url", server.base_url, "--api_model", "m", "--max_attempts", "2", "--concurrency", "4"]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
        done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, timeout=120)
        assert server.authorizations == {f"Bearer {KEY}"}
    assert len(server.requests) > 12 and done.returncode == (2 if last_status == 401 else done.returncode)
    assert any("codes.construct.gptout" in line for line in seen)
    places = {f"command line {number}": line for number, line in enumerate(seen)}
    places |= {"stdout": done.stdout.decode(), "stderr": done.stderr.decode()}
    places |= {str(path): path.read_bytes().decode() for path in tmp_path.rglob("*") if path.is_file()}
    assert str(tmp_path / "work" / "ledger.jsonl") in places
    for needle in (KEY, KEY[6:], base64.b64encode(KEY.encode()).decode()):
        assert not [place for place, text in places.items() if needle in text]
