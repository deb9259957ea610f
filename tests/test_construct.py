"""Construction against a real, misbehaving server: nothing faulty becomes data, a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, answer, error, half_body
from construct_rows import (
    KEY,
    MULTI_TURN,
    PATIENCE,
    flags,
    read_rows,
    sample_rows,
    use_key_alone,
    words,
    write_rows,
    write_well,
)

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError
from codes.common.records import read_preference_file
from codes.construct import api, embedded_server, gptinst, gptout, verify_correctness
from codes.construct.build_prompt import (
    CUE_INSTRUCTIONS,
    PROMPT_VERSION,
    STRATEGIES,
    build_judge,
    build_rewrite,
    build_similar_answer,
    build_similar_question,
    build_wrong_answer,
    word_limit,
)
from codes.construct.settings import parse_bias_types
from codes.construct.template import TEMPLATE_VERSION

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    use_key_alone(monkeypatch)


Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python with arguments, from the repository; a failing test leaves nothing running."""
    started: list[subprocess.Popen[str]] = []

    def start_python(argv: list[str]) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *argv],
            cwd=REPO_ROOT,
            env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(child)
        return child

    yield start_python
    for child in started:
        if child.poll() is None:
            child.kill()
            child.communicate()


# --- prompts
# ---------------------------------------------------------------------------------------------------------


def test_every_injectable_bias_has_an_instruction_of_its_own() -> None:
    assert tuple(CUE_INSTRUCTIONS) == INJECTABLE
    assert len(set(CUE_INSTRUCTIONS.values())) == len(INJECTABLE)


@pytest.mark.parametrize("strategy", ["wrong_answer", "rewrite_rejected"])
@pytest.mark.parametrize("bias", INJECTABLE)
def test_a_writer_prompt_holds_conversation_cue_and_source(bias: str, strategy: str) -> None:
    flawed = "a {flawed} answer"
    plain, rewrite = build_wrong_answer(MULTI_TURN, bias), build_rewrite(MULTI_TURN, flawed, bias)
    prompt = plain if strategy == "wrong_answer" else rewrite
    assert [message["role"] for message in prompt] == ["system", "user"]
    text = prompt[1]["content"]
    assert CUE_INSTRUCTIONS[bias] in text and "And the smallest {one}?" in text and "Jupiter." in text
    assert (flawed in text) is (strategy == "rewrite_rejected")
    assert not any(other in text for name, other in CUE_INSTRUCTIONS.items() if name != bias)


def test_edited_prompts_get_a_new_version() -> None:
    texts = [
        *(build_wrong_answer(MULTI_TURN, bias) for bias in INJECTABLE),
        *(build_rewrite(MULTI_TURN, "flawed", bias) for bias in INJECTABLE),
        build_judge(MULTI_TURN, ["one", "two"]),
        build_similar_question(MULTI_TURN),
        build_wrong_answer(MULTI_TURN, "length", max_words=60),
    ]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    # Raise PROMPT_VERSION together with the digest: answers to the old texts are in ledgers and data sets.
    assert (PROMPT_VERSION, digest) == ("3", "c711a705f6afc3c7")


def test_writers_with_little_room_are_told_so() -> None:
    assert word_limit(96) == 57 and word_limit(512) == 307 and word_limit(513) is None
    for build in (
        build_wrong_answer(MULTI_TURN, "beauty", max_words=57),
        build_rewrite(MULTI_TURN, "x", "beauty", max_words=57),
    ):
        assert "at most 57 words" in build[1]["content"]
    assert "words in all" not in build_wrong_answer(MULTI_TURN, "beauty")[1]["content"]


@pytest.mark.parametrize("bias", ["gender", "race", "refinement-aware", "charm"])
def test_a_bias_that_cannot_be_injected_is_refused(bias: str) -> None:
    with pytest.raises(ContrastRMError):
        build_wrong_answer(MULTI_TURN, bias)


def test_the_judge_sees_letters_and_candidates_and_nothing_else() -> None:
    [turn] = build_judge(MULTI_TURN, ["one", "two", "three"])
    assert '<answer letter="B">\ntwo\n</answer>' in turn["content"] and "A, B or C" in turn["content"]
    assert turn["role"] == "user" and turn["content"].endswith("\nBest:")
    with pytest.raises(ContrastRMError, match="27"):
        build_judge(MULTI_TURN, ["x"] * 27)


def test_the_similar_request_takes_the_place_of_the_last_turn() -> None:
    assert "And the smallest {one}?" in build_similar_question(MULTI_TURN)[1]["content"]
    prompt = build_similar_answer(MULTI_TURN, "And the hottest?")
    assert prompt == [*MULTI_TURN[:-1], {"role": "user", "content": "And the hottest?"}]


# --- the steps
# -------------------------------------------------------------------------------------------------------


def test_a_step_keeps_its_own_files_beside_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A full or missing folder for temporary files.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    write_rows(tmp_path / "in.jsonl", sample_rows(2))
    with ChatServer(write_well) as server:
        assert gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl", strategy="template")) == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_injections_are_appended_with_their_origin(strategy: str, tmp_path: Path) -> None:
    is_template = strategy == "template"
    rows = sample_rows(6)
    write_rows(tmp_path / "in.jsonl", rows)
    with ChatServer(write_well) as server:
        assert gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl", strategy=strategy)) == 0
    assert len(server.requests) == (0 if is_template else 12)
    written = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert written[1]["messages"] == MULTI_TURN and "question" not in written[1]
    for before, after, dealt in zip(rows, written, gptout.deal_biases(INJECTABLE, 2, 42), strict=False):
        assert after["rejected"][0] == before["rejected"][0] and after["note"] == before["note"]
        assert after["bias_type"] == [None, *dealt]
        for injection in after["injections"]:
            assert injection["bias"] == after["bias_type"][injection["index"]]
            assert injection["strategy"] == strategy and injection["seed"] == 42
            assert injection["model"] == (None if is_template else "test-model")
            assert injection["prompt_version"] == (TEMPLATE_VERSION if is_template else PROMPT_VERSION)
            assert injection.get("source_index") == (None if strategy == "wrong_answer" else 0)
    read_preference_file(tmp_path / "out.jsonl")


def faulty(body: dict[str, Any], attempt: int) -> Reply:
    """Each record meets another fault; the texts say which, so that a leak shows."""
    text = body["messages"][-1]["content"]
    faults = {
        "What about 0 ": answer("LEAK cut off in the mid", "length"),
        "What about 2 ": answer("LEAK half a", "content_filter"),
        "What about 3 ": error(500, "LEAK internal error"),
        "What about 4 ": answer(None),
        "What about 5 ": error(400, "LEAK bad request"),
        "What about 6 ": answer("Sure, here is the rewritten answer: LEAK"),
        "What about 7 ": answer("I'm sorry, but I cannot help with that. LEAK"),
        "What about 8 ": half_body(),
        "What about 9 ": answer("LEAK", refusal="no"),
    }
    if "<answer letter=" not in text:
        for question, reply in faults.items():
            if question in text:
                return reply
    return write_well(body, attempt)


def test_nothing_faulty_becomes_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sample_rows(12)
    rows[3]["rejected"] = []  # nothing is left of this one: it is lost, and counted
    write_rows(tmp_path / "in.jsonl", rows)
    with ChatServer(faulty) as server:
        # 3: requests without an answer leave rows missing, and everything else is written.
        assert gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl", max_new_tokens=64)) == 3
        judged = flags(server, tmp_path, "out.jsonl", "judged.jsonl", train_file=tmp_path / "train.jsonl")
        assert verify_correctness.main(judged) == 0
    written = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in written] == [f"r{number}" for number in range(12) if number != 3]
    assert [len(row["rejected"]) for row in written] == [1, 3, 1, 1, 1, 1, 1, 1, 1, 3, 3]
    assert (tmp_path / "train.jsonl").read_bytes() == (tmp_path / "judged.jsonl").read_bytes()
    for name in ("out.jsonl", "judged.jsonl", "train.jsonl"):
        assert "LEAK" not in (tmp_path / name).read_text() and "error" not in (tmp_path / name).read_text()
    failed = Counter((row["id"], row["reason"]) for row in read_rows(tmp_path / "work" / "failed.jsonl"))
    assert failed == {
        ("r0", "cut_off"): 2,
        ("r2", "content_filter"): 2,
        ("r3", "http_500"): 2,
        ("r3", "no_rejected_left"): 1,
        ("r4", "empty_answer"): 2,
        ("r5", "http_400"): 2,
        ("r6", "preamble"): 2,
        ("r7", "refusal"): 2,
        ("r8", "broken_connection"): 2,
        ("r9", "model_refusal"): 2,
    }
    report = json.loads((tmp_path / "work" / "construction_report.json").read_text())
    assert sum(report["gptout"]["n_injected"].values()) == 6 and report["gptout"]["n_records_lost"] == 1
    assert report["verify_correctness"]["verdicts"] == {"CHOSEN_IS_BEST": 11}
    assert "6 of 24" in capsys.readouterr().out
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY not in file.read_text()


def test_a_run_that_brings_nothing_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(2))
    with ChatServer(lambda body, attempt: error(400, "temperature is not supported")) as server:
        with pytest.raises(ContrastRMError, match="http_400 4.*temperature is not supported"):
            gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_repeated_run_asks_only_what_failed_and_counts_nothing_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(12))
    with ChatServer(faulty) as server:
        gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl", max_new_tokens=64))
    first = (tmp_path / "work" / "failed.jsonl").read_text()
    with ChatServer(write_well, port=server.port) as server:
        gptout.main(flags(server, tmp_path, "in.jsonl", "out.jsonl", max_new_tokens=64))
    # 500 and half a body may pass; what no attempt can mend is asked again on demand alone.
    assert len(server.requests) == 4
    assert len(read_rows(tmp_path / "work" / "failed.jsonl")) == 14 < len(first.splitlines())
    with ChatServer(write_well, port=server.port) as server:
        gptout.main([*flags(server, tmp_path, "in.jsonl", "out.jsonl", max_new_tokens=64), "--retry_failed"])
    # Null content, 400, content filter, refusal by field, and what the token limit cut.
    assert len(server.requests) == 10
    assert len(read_rows(tmp_path / "work" / "failed.jsonl")) == 4


def test_gptinst_adds_the_answer_to_another_question(tmp_path: Path) -> None:
    rows = sample_rows(4)
    write_rows(tmp_path / "in.jsonl", rows)

    def respond(body: dict[str, Any], attempt: int) -> Reply:
        text = body["messages"][-1]["content"]
        if "What about 2 " in text:
            return answer("What about 2 {x}?")  # the same request again
        if "What about 3 " in text:
            return answer("Sure, here is a new request: why?")
        if "<conversation>" in text:
            return answer(f"And which planet is the {words(text, 2)} one?")
        return answer(words(text, 40))

    with ChatServer(respond) as server:
        assert gptinst.main(flags(server, tmp_path, "in.jsonl", "out.jsonl")) == 0
    written = read_rows(tmp_path / "out.jsonl")
    assert [len(row["rejected"]) for row in written] == [2, 2, 1, 1]
    assert written[0]["bias_type"] == [None, None] and "similar_question" not in written[2]
    assert written[0]["injections"][0] | {"model": ""} == {
        "index": 1,
        "bias": None,
        "strategy": "similar_question",
        "model": "",
        "prompt_version": gptinst.PROMPT_VERSION,
        "seed": 42,
    }
    asked = [body["messages"] for body in server.requests if len(body["messages"]) == 4]
    assert asked == [[*MULTI_TURN[:-1], {"role": "user", "content": written[1]["similar_question"]}]]
    failed = read_rows(tmp_path / "work" / "failed.jsonl")
    assert [(row["id"], row["reason"]) for row in failed] == [("r2", "same_as_question"), ("r3", "preamble")]
    section = json.loads((tmp_path / "work" / "construction_report.json").read_text())["gptinst"]
    assert (section["n_planned"], section["n_questions"], section["n_added"]) == (4, 2, 2)
    assert section["n_requests"] == 4 + 2


@pytest.mark.parametrize("missing", ["OPENAI_API_KEY", "API_MODEL"])
def test_without_a_model_both_ways_out_are_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_MODEL", "m")
    monkeypatch.delenv(missing)
    write_rows(tmp_path / "in.jsonl", sample_rows(1))
    argv = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    for main in (gptout.main, gptinst.main):
        with pytest.raises(
            ContrastRMError, match=f"{missing} not set.*OPENAI_API_KEY and API_MODEL.*GENERATOR=embedded"
        ):
            main([*argv, "--work_dir", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("value", ["gender", "length,charm", " , "])
def test_unknown_bias_types_are_refused(value: str) -> None:
    with pytest.raises(ContrastRMError, match="injected|known|empty"):
        parse_bias_types(value)


# --- kill and resume
# -------------------------------------------------------------------------------------------------


GPTOUT = ["-m", "codes.construct.gptout"]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, start: Start) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(30))

    def slowly(body: dict[str, Any], attempt: int) -> Reply:
        time.sleep(0.05)
        return write_well(body, attempt)

    output = ""
    with ChatServer(slowly) as server:
        killed = start([*GPTOUT, *flags(server, tmp_path, "in.jsonl", "out.jsonl", concurrency=3)])
        deadline = time.monotonic() + PATIENCE
        while len(server.requests) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        output += killed.communicate(timeout=PATIENCE)[0]
        assert not (tmp_path / "out.jsonl").exists()
        n_before = len(server.requests)
        assert 20 <= n_before < 60
        resumed = start([*GPTOUT, *flags(server, tmp_path, "in.jsonl", "out.jsonl", concurrency=3)])
        output += resumed.communicate(timeout=PATIENCE)[0]
        assert resumed.returncode == 0, output
        # Only what was in flight at the kill was asked twice.
        assert len(server.requests) <= 60 + 3
        settings = {"work_dir": tmp_path / "w2", "concurrency": 9}
        whole = start([*GPTOUT, *flags(server, tmp_path, "in.jsonl", "whole.jsonl", **settings)])
        output += whole.communicate(timeout=PATIENCE)[0]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert KEY not in output
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_ctrl_c_and_a_fatal_error_end_with_a_line_and_a_code(tmp_path: Path, start: Start) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(30))
    with ChatServer(lambda body, attempt: answer(words(str(body), 80), seconds=0.1)) as server:
        run = start([*GPTOUT, *flags(server, tmp_path, "in.jsonl", "out.jsonl", concurrency=2)])
        deadline = time.monotonic() + PATIENCE
        while len(server.requests) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        output = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 130 and "interrupted" in output and "Traceback" not in output
    assert 3 <= len(read_rows(tmp_path / "work" / "ledger.jsonl")) < 60
    with ChatServer(lambda body, attempt: error(401, f"Incorrect API key provided: {KEY}")) as server:
        run = start([*GPTOUT, *flags(server, tmp_path, "in.jsonl", "out.jsonl")])
        output = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 2 and "check OPENAI_API_KEY" in output and "Traceback" not in output
    assert KEY not in output and not (tmp_path / "out.jsonl").exists()


# --- the embedded server's supervisor
# ----------------------------------------------------------------------------------

STAND_IN = """\
import http.server, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SUPERVISOR = """\
import sys
from codes.construct import embedded_server
from codes.common.cli import run
script, pid_file, model, *argv = sys.argv[1:]
embedded_server.server_command = lambda model_path, port: [sys.executable, script, str(port), pid_file]
run(lambda _: embedded_server.main(["--model_path", model, *argv]))
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_supervisor(start: Start, tmp_path: Path, script: str, *command: str) -> subprocess.Popen[str]:
    stand_in, pid_file, work_dir = tmp_path / "stand_in.py", tmp_path / "pid", tmp_path / "work"
    stand_in.write_text(script)
    (tmp_path / "config.json").write_text("{}")
    argv = [stand_in, pid_file, tmp_path, "--work_dir", work_dir, "--", *command]
    return start(["-c", SUPERVISOR, *map(str, argv)])


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_the_command_finds_the_server_and_its_exit_code_comes_back(tmp_path: Path, start: Start) -> None:
    names = ("OPENAI_BASE_URL", "API_MODEL", api.EMBEDDED_SERVER_VARIABLE)
    show = f"import os; print(*(os.environ[name] for name in {names}))"
    supervisor = start_supervisor(start, tmp_path, STAND_IN, sys.executable, "-c", f"{show}; raise SystemExit(7)")
    output, _ = supervisor.communicate(timeout=PATIENCE)
    assert supervisor.returncode == 7, output
    assert "http://127.0.0.1:" in output and f"/v1 {tmp_path} 1" in output
    assert not is_running(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_is_gone_however_the_run_ends(stop: signal.Signals, tmp_path: Path, start: Start) -> None:
    started = tmp_path / "started"
    write = f"import pathlib, os, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid()))"
    write += "; time.sleep(60)"
    supervisor = start_supervisor(start, tmp_path, STAND_IN, sys.executable, "-c", write)
    deadline = time.monotonic() + PATIENCE
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    server_pid, command_pid = int((tmp_path / "pid").read_text()), int(started.read_text())
    assert is_running(server_pid) and is_running(command_pid)
    supervisor.send_signal(stop)
    supervisor.communicate(timeout=PATIENCE)
    assert supervisor.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    assert wait_until_gone(server_pid) and wait_until_gone(command_pid)


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path, start: Start) -> None:
    supervisor = start_supervisor(start, tmp_path, "raise SystemExit('no such model')", "true")
    output, _ = supervisor.communicate(timeout=PATIENCE)
    assert supervisor.returncode == 2 and "no such model" in output and "embedded_server.log" in output
    assert output.startswith("error: ") and "Traceback" not in output


def test_a_server_that_dies_under_the_run_stops_it(tmp_path: Path, start: Start) -> None:
    script = STAND_IN.replace(
        "http.server.HTTPServer(", "import threading\nthreading.Timer(3.0, die).start()\nhttp.server.HTTPServer("
    )
    script = "def die():\n    print('out of memory', flush=True)\n    os._exit(9)\n" + script
    command = [sys.executable, "-c", f"import time; time.sleep({PATIENCE})"]
    supervisor = start_supervisor(start, tmp_path, script, *command)
    output, _ = supervisor.communicate(timeout=PATIENCE / 2)
    assert supervisor.returncode == 2 and "ended with code 9" in output and "out of memory" in output
    assert "Traceback" not in output


def test_the_embedded_server_needs_a_command() -> None:
    with pytest.raises(ContrastRMError, match="after --"):
        embedded_server.main(["--model_path", "embedded"])
