"""The whole pipeline through its launcher, and the report that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, answer, error
from construct_rows import KEY, RIGHT, read_rows, sample_rows, words, write_rows, write_well

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError
from codes.construct import gptout, report, verify_correctness
from codes.construct.gates import REASONS

REPO_ROOT = Path(__file__).resolve().parents[1]
PRICES = {"PRICE_IN": "2", "PRICE_OUT": "10"}


def launch(tmp_path: Path, *arguments: str, **knobs: str) -> subprocess.CompletedProcess[str]:
    """``run_construction.sh`` as a user runs it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "API_MODEL")}
    environment = kept | {
        "PYTHON": sys.executable,
        "SKIP_SETUP": "1",
        "INPUT_FILE": str(tmp_path / "in.jsonl"),
        "OUTPUT_FILE": str(tmp_path / "train.jsonl"),
        "WORK_DIR": str(tmp_path / "work"),
    }
    command = ["bash", str(REPO_ROOT / "run_construction.sh"), *arguments]
    return subprocess.run(command, env=environment | knobs, capture_output=True, text=True, timeout=280, check=False)


def report_of(tmp_path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tmp_path / "work" / "construction_report.json").read_text())
    return value


def half_broken(body: dict[str, Any], attempt: int) -> Reply:
    """Some records meet a fault at one of the steps."""
    text = body["messages"][-1]["content"]
    is_judged, is_similar = "<answer letter=" in text, "Write another request" in text
    if "What about 2 " in text and not is_judged:
        return error(400, "LEAK refused")
    if "What about 3 " in text and not is_judged and not is_similar:
        return answer("Sure, here is the rewritten answer: LEAK")
    if "What about 4 " in text and is_judged:
        return answer("LEAK Hard to say.")
    if is_similar:
        return answer(f"And which planet is the {words(text, 2)} one?")
    return write_well(body, attempt)


def test_a_run_with_faults_ends_complete_and_accounted_for(tmp_path: Path) -> None:
    rows = sample_rows(14)
    write_rows(tmp_path / "in.jsonl", rows)
    with ChatServer(half_broken) as server:
        knobs = {"OPENAI_API_KEY": KEY, "API_MODEL": "writer", "API_BASE_URL": server.base_url, "USE_GPTINST": "1"}
        knobs |= {"JUDGE_MODEL": "judge", "JUDGE_PRICE_IN": "1", "JUDGE_PRICE_OUT": "1"} | PRICES
        done = launch(tmp_path, "--max_attempts", "3", **knobs)
        asked = Counter(body["model"] for body in server.requests)
    # Rows are missing, all steps ran, and the exit code says so.
    assert done.returncode == 3, done.stderr
    assert "rows are missing" in done.stderr and "the training file is" in done.stdout
    assert asked == {"writer": 28 + 14 + 13, "judge": 28}
    train, full = read_rows(tmp_path / "train.jsonl"), report_of(tmp_path)
    assert [row["id"] for row in train] == [row["id"] for row in rows if row["id"] != "r4"]
    summary = full["summary"]
    assert summary["steps"] == ["gptout", "gptinst", "verify_correctness"]
    # Everything planned is kept, refused by a gate, or a request without an answer.
    for bias, figures in summary["by_bias"].items():
        assert figures["n_planned"] == figures["n_kept"] + sum(figures["n_refused"].values()), bias
        assert figures["n_kept"] == figures["n_in_rows"] == figures["length_to_source"]["n"]
    counts = [figures["n_planned"] for figures in summary["by_bias"].values()]
    assert counts == [4] * 7 and tuple(summary["by_bias"]) == INJECTABLE
    assert summary["by_gate"] == {"preamble": full["summary"]["by_gate"]["preamble"]}
    assert (summary["by_gate"]["preamble"]["count"], summary["by_gate"]["preamble"]["total"]) == (2, 26)
    assert summary["failed"] == {
        "gptout": {"gate": {"preamble": 2}, "row": {"http_400": 2}},
        "gptinst": {"row": {"http_400": 1}},
        "verify_correctness": {"other": {"no_verdict": 2}},
    }
    assert summary["similar_questions"]["n_added"] == 13
    assert summary["verdicts"] == {"CHOSEN_IS_BEST": 13, "FAILED": 1} and not summary["judge_wrote_answers"]
    assert summary["order_flips"]["total"] == 13 and summary["position_a"]["total"] == 26
    # The server says 7 + 3 tokens an answer.
    usage = summary["usage"]["by_step"]
    assert usage["gptout"]["cost"] == pytest.approx(26 * (7 * 2 + 3 * 10) / 1e6)
    assert usage["verify_correctness"]["cost"] == pytest.approx(28 * 10 / 1e6)
    assert summary["usage"]["total"]["prompt_tokens"] == 7 * (26 + 13 + 13 + 28)
    assert summary["usage"]["total"]["cost"] == pytest.approx(sum(step["cost"] for step in usage.values()))
    assert len(summary["samples"]) == 10 and all(any(row["bias_type"]) for row in summary["samples"])
    text = (tmp_path / "work" / "construction_report.md").read_text()
    assert all(f"| {bias} |" in text for bias in INJECTABLE) and "construction_report.svg" in text
    assert "Judge: judge." in text and REASONS["preamble"] in text and "Sample 10" in text
    assert (tmp_path / "work" / "construction_report.svg").read_text().startswith("<?xml")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY not in file.read_text()
        assert "LEAK" not in file.read_text() or file.name in ("failed.jsonl", "ledger.jsonl"), file
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and not path.name.endswith(".lock")]


def test_the_template_strategy_runs_without_key_and_model(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(7))
    done = launch(tmp_path, STRATEGY="template", BIASES_PER_RECORD="3")
    assert done.returncode == 0, done.stderr
    train = read_rows(tmp_path / "train.jsonl")
    assert [len(row["rejected"]) for row in train] == [4] * 7
    assert {row["verify_correctness"] for row in train} == {"SKIPPED"}
    summary = report_of(tmp_path)["summary"]
    assert {figures["n_kept"] for figures in summary["by_bias"].values()} == {3}
    assert summary["usage"]["total"] == {"n_requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    assert summary["judge"] is None and summary["position_a"]["rate"] is None


def test_an_estimate_of_the_whole_run_sends_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(5))
    with ChatServer(write_well) as server:
        knobs = {"API_MODEL": "m", "API_BASE_URL": server.base_url, "ESTIMATE": "1", "USE_GPTINST": "1", "LIMIT": "3"}
        done = launch(tmp_path, **knobs, **PRICES)
    assert done.returncode == 0 and not server.requests, done.stderr
    # 3 records: 2 texts, a question and its answer, 2 orders.
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("requests:")] == ["6", "6", "6"]
    assert done.stdout.count("cost: 0.") == 3 and not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("limit", "flag"), [({"MAX_REQUESTS": "12"}, "--max_requests 12"), ({"MAX_COST": "0.032"}, "--max_cost 0.032")]
)
def test_all_steps_of_a_launch_share_one_budget(limit: dict[str, str], flag: str, tmp_path: Path) -> None:
    """Writing 5 records takes 10 calls at 44 millionths, judging them 10 at 10,000 millionths each."""
    write_rows(tmp_path / "in.jsonl", sample_rows(5))
    # The judge is dear and its answers are short; a fresh budget for each step would let four of them through.
    judge = {"JUDGE_MODEL": "judge", "JUDGE_PRICE_IN": "0", "JUDGE_PRICE_OUT": "3333.34", "JUDGE_MAX_NEW_TOKENS": "3"}
    with ChatServer(write_well) as server:
        knobs = {"OPENAI_API_KEY": KEY, "API_MODEL": "writer", "API_BASE_URL": server.base_url} | judge | PRICES
        done = launch(tmp_path, CONCURRENCY="1", **knobs, **limit)
        asked = Counter(body["model"] for body in server.requests)
        assert done.returncode == 2 and f"{flag} (" in done.stderr and "10 calls of it earlier" in done.stderr
        assert asked == {"writer": 10, "judge": 2 if "MAX_REQUESTS" in limit else 3}
        # The same command has a new budget, and the answers of the first one are free.
        again = launch(tmp_path, CONCURRENCY="1", **knobs, MAX_REQUESTS="8")
        assert again.returncode == 0, again.stderr
        assert len(server.requests) == 20
    spent = json.loads((tmp_path / "work" / "launch.json").read_text())["spent"]
    assert spent["n_calls"] == 20 - asked.total()


def test_a_judge_has_its_own_prices_or_none(tmp_path: Path) -> None:
    """The writer's would be a wrong figure, told after the money is spent."""
    write_rows(tmp_path / "in.jsonl", sample_rows(2))
    with ChatServer(write_well) as server:
        knobs = {"OPENAI_API_KEY": KEY, "API_MODEL": "writer", "API_BASE_URL": server.base_url, "JUDGE_MODEL": "judge"}
        done = launch(tmp_path, **knobs, **PRICES, MAX_COST="1")
        assert done.returncode == 2 and "JUDGE_PRICE_IN" in done.stderr and not server.requests
        assert launch(tmp_path, **knobs, **PRICES).returncode == 0
    usage = report_of(tmp_path)["summary"]["usage"]
    assert usage["by_step"]["verify_correctness"]["cost"] is None and usage["total"]["cost"] is None
    assert usage["by_step"]["gptout"]["cost"] == pytest.approx(4 * 44e-6)


def test_an_embedded_generator_has_no_second_judge(tmp_path: Path) -> None:
    done = launch(tmp_path, GENERATOR="embedded", JUDGE_MODEL="gpt")
    assert done.returncode == 2 and "JUDGE_MODEL=gpt" in done.stderr


# --- the report by itself -----------------------------------------------------------------------------------------------


def test_a_folder_without_steps_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContrastRMError, match="no step's section"):
        report.main(["--work_dir", str(tmp_path)])


def run_template_steps(tmp_path: Path, n: int) -> Path:
    write_rows(tmp_path / "in.jsonl", sample_rows(n))
    work = tmp_path / "work"
    common = ["--work_dir", str(work)]
    written = str(work / "gptout.jsonl")
    assert (
        gptout.main(
            [*common, "--input_file", str(tmp_path / "in.jsonl"), "--output_file", written, "--strategy=template"]
        )
        == 0
    )
    files = ["--output_file", str(work / "verified.jsonl"), "--train_file", str(tmp_path / "train.jsonl")]
    assert verify_correctness.main([*common, "--input_file", written, *files, "--judge=none"]) == 0
    return work


def test_a_step_of_an_earlier_run_is_left_out_and_a_repeated_report_is_the_same(tmp_path: Path) -> None:
    work = run_template_steps(tmp_path, 15)
    stale = report_of(tmp_path) | {"gptinst": {"input_file": "elsewhere", "output_file": "nowhere.jsonl"}}
    (work / "construction_report.json").write_text(json.dumps(stale))
    assert report.main(["--work_dir", str(work)]) == 0
    first = [
        (work / name).read_bytes() for name in ("construction_report.json", report.MARKDOWN_FILE, report.PLOT_FILE)
    ]
    summary = report_of(tmp_path)["summary"]
    assert summary["steps"] == ["gptout", "verify_correctness"]
    samples = [row["id"] for row in summary["samples"]]
    assert len(samples) == 10 and samples == sorted(samples, key=lambda name: int(name[1:]))
    assert report.main(["--work_dir", str(work)]) == 0
    names = ("construction_report.json", report.MARKDOWN_FILE, report.PLOT_FILE)
    assert [(work / name).read_bytes() for name in names] == first
    assert report.main(["--work_dir", str(work), "--seed", "7"]) == 0
    assert [row["id"] for row in report_of(tmp_path)["summary"]["samples"]] != samples


def test_length_is_measured_against_source_and_chosen(tmp_path: Path) -> None:
    rows = sample_rows(3)
    for row in rows:
        row |= {"chosen": "c" * 100, "rejected": ["r" * 50, "x" * 20, "y" * 200], "bias_type": [None, None, "length"]}
        row["injections"] = [{"index": 2, "bias": "length", "source_index": 1}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    figures = report.read_rows(file, seed=1)
    assert report.shift_summary(figures.shift_to_source["length"])["mean_factor"] == pytest.approx(10)  # type: ignore[index]
    assert report.shift_summary(figures.shift_to_chosen["length"])["mean_factor"] == pytest.approx(2)  # type: ignore[index]
    for row in rows:
        row["injections"] = []  # written from the question alone: against the first original answer
    figures = report.read_rows(write_rows(file, rows), seed=1)
    assert report.shift_summary(figures.shift_to_source["length"])["mean_factor"] == pytest.approx(4)  # type: ignore[index]
    assert report.shift_summary(None) is None


def test_samples_show_texts_as_they_are(tmp_path: Path) -> None:
    rows = sample_rows(1)
    rows[0] |= {"rejected": ["plain", "## Big\n```\ncode\n```\n" + "long " * 300], "bias_type": [None, "beauty"]}
    summary = {"samples": [report.read_rows(write_rows(tmp_path / "rows.jsonl", rows), seed=1).samples[0]]}
    [section] = [report._sample_section(1, row) for row in summary["samples"]]
    text = "\n\n".join(section.paragraphs)
    assert "````text\n## Big" in text and "[…]" in text and RIGHT in text


def test_an_id_is_text_in_the_report(tmp_path: Path) -> None:
    rows = sample_rows(3)
    rows[0]["id"] = "r0\n\n# All is well\n\n<img src=x> [here](http://elsewhere) \u202egnp"
    rows[1]["chosen"] += " \u202etxet"
    write_rows(tmp_path / "in.jsonl", rows)
    folders = ["--work_dir", str(tmp_path / "work"), "--input_file", str(tmp_path / "in.jsonl")]
    assert gptout.main([*folders, "--output_file", str(tmp_path / "out.jsonl"), "--strategy", "template"]) == 0
    assert report.main(["--work_dir", str(tmp_path / "work")]) == 0
    text = (tmp_path / "work" / report.MARKDOWN_FILE).read_text()
    assert "All is well" in text and "\u202e" not in text
    assert not any(line.startswith("# All") for line in text.splitlines())
    assert "<img" not in text.replace("\\<img", "") and "[here](" not in text
