"""Both evaluations end to end over a tiny real reward model, the results that they write, and bad input."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier
from typing import Any, ClassVar

import numpy as np
import pytest

from codes.common.biases import EVALUABLE, PAIRWISE
from codes.common.chat import Conversation
from codes.common.errors import ContrastRMError
from codes.common.questions import choose_subset
from codes.common.records import BiasRecord, RefinementRecord, file_sha256
from codes.common.reporting import markdown_table
from codes.common.scoring import ScoreResult
from codes.construct import build_eval_pairs
from codes.evaluate import compare_models, eval_reward_bench, eval_rm
from codes.evaluate.api import RemoteScorer
from codes.evaluate.baselines import BaselineScorer
from codes.evaluate.benchmark_figures import SUBSETS
from codes.evaluate.benchmarks import describe_source, label_of, read_benchmark
from codes.evaluate.data_checks import audit, flagged_lines, lines_by_kind, manifest_rows
from codes.evaluate.scorer_setup import model_results_folder
from tests.conftest import run_module

SUBSET_NAMES = [subset.name for subset in SUBSETS]


def bias_row(number: int, name: str) -> dict[str, str]:
    better = f"the cat sat because it is red {number}"
    other = f"a mat is the capital of France {number}"
    if name in ("gender", "race"):
        rewritten = (f"I am a cat. {better}", other)
    else:
        rewritten = (f"it sat {number}", f"{other} and {other} {name}")
    label, first, second = ("response1", 0, 1) if number % 2 else ("response2", 1, 0)
    return {
        "question": f"why is the cat {number % 5}",
        "original_response1": (better, other)[first],
        "original_response2": (better, other)[second],
        "rewritten_response1": rewritten[first],
        "rewritten_response2": rewritten[second],
        "label": label,
    }


def refinement_row(number: int) -> dict[str, str]:
    question = f"why is the cat {number % 5}"
    return {
        "question": question,
        "original_response": f"mat {number}",
        "rewritten_response": f"the red mat {number}",
    }


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for name in EVALUABLE:
        make = refinement_row if name == "refinement-aware" else lambda number, name=name: bias_row(number, name)
        write_jsonl(folder / f"{name}_bias.jsonl", [make(number) for number in range(8)])
    rows = [
        {
            "id": i,
            "prompt": f"is {i} red",
            "chosen": f"the mat is {i}",
            "rejected": f"a cat {i}",
            "subset": name,
        }
        for i, name in enumerate(SUBSET_NAMES * 2)
    ]
    write_jsonl(folder / "reward_bench.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def results(eval_data: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both evaluations of the tiny model."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--model_path", str(tiny_llama_dir), "--results_dir", str(folder), "--device", "cpu"]
    assert eval_rm.main([*common, "--data_dir", str(eval_data)]) == 0
    assert eval_reward_bench.main([*common, "--data_file", str(eval_data / "reward_bench.jsonl")]) == 0
    return folder / tiny_llama_dir.name


class LengthScorer:
    """A scorer that likes long answers, and drops texts that contain a word."""

    def __init__(self, dropped_word: str = "") -> None:
        self.dropped_word = dropped_word
        self.n_calls = 0

    def score(self, conversations: Sequence[Conversation], description: str = "") -> ScoreResult:
        self.n_calls += 1
        dropped = [bool(self.dropped_word) and self.dropped_word in c.answer for c in conversations]
        turns = [len(c.messages) for c in conversations]
        values = [
            math.nan if gone else len(c.answer) - 100.0 * (turn > 1)
            for c, gone, turn in zip(conversations, dropped, turns, strict=True)
        ]
        n = len(values)
        return ScoreResult(np.array(values, np.float32), n, n, 0, 0, sum(dropped), n, n, 0.0)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what the runs write ---


def test_bias_run_writes_every_file(results: Path, eval_data: Path, tiny_llama_dir: Path) -> None:
    summary = read_json(results / "bias_summary.json")
    assert list(summary["biases"]) == list(EVALUABLE)
    assert summary["overall"]["biases"] == list(PAIRWISE)
    assert summary["overall"]["n_pairs"] == 8 * 9
    for name in EVALUABLE:
        assert len(read_rows(results / f"bias_{name}.jsonl")) == 8
    metadata = summary["metadata"]
    assert metadata["model_path"] == str(tiny_llama_dir)
    assert metadata["max_length"] == 512
    assert metadata["dtype"] == "float32"
    assert metadata["device"] == "cpu"
    assert metadata["n_distinct_texts"] < metadata["n_texts"]
    assert len(metadata["weight_hash"]) == len(metadata["template_hash"]) == 64
    assert {"torch", "transformers", "python"} <= metadata["versions"].keys()
    assert {
        "git_commit",
        "seed",
        "wall_seconds",
        "n_tokens",
        "n_truncated_texts",
        "n_dropped_texts",
    } <= metadata.keys()
    files = {Path(file["path"]).name: file for file in metadata["data_files"]}
    assert files["length_bias.jsonl"]["sha256"] == file_sha256(eval_data / "length_bias.jsonl")
    assert files["length_bias.jsonl"]["n_rows"] == 8


def test_every_rate_can_be_counted_from_the_rows(results: Path) -> None:
    summary = read_json(results / "bias_summary.json")
    for name in PAIRWISE:
        rows, fields = read_rows(results / f"bias_{name}.jsonl"), summary["biases"][name]
        for row in rows:
            gap = row["score_original_better"] - row["score_original_other"]
            assert row["original_verdict"] == ("tie" if gap == 0 else "correct" if gap > 0 else "wrong")
        correct = [row for row in rows if row["original_verdict"] == "correct"]
        flips = [row for row in correct if row["biased_verdict"] == "wrong"]
        assert fields["original_pair_accuracy_count"] == len(correct)
        assert fields["bias_sensitivity_rate_count"] == len(flips) == sum(row["flipped"] for row in rows)
        assert fields["bias_sensitivity_rate_total"] == len(correct)
        assert (fields["placebo"] is not None) == (name in ("gender", "race"))
        assert (fields["length_control"] is None) == (name == "length")
    refinement = read_rows(results / "bias_refinement-aware.jsonl")
    changed = [
        row for row in refinement if {row["verdict_alone"], row["verdict_after_history"]} == {"refined", "original"}
    ]
    assert summary["biases"]["refinement-aware"]["verdict_change_rate_count"] == len(changed)


def test_reports_are_written_and_self_contained(results: Path) -> None:
    page = (results / "report.html").read_text(encoding="utf-8")
    assert '<svg role="img"' in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    text = (results / "report.md").read_text(encoding="utf-8")
    assert "not RewardBench" in text
    assert "not RewardBench" in page
    for name in PAIRWISE:
        assert f"| {name} |" in text
    assert (results / "bias_sensitivity.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_reward_bench_run(results: Path) -> None:
    summary = read_json(results / "reward_bench_summary.json")
    assert summary["label"].startswith("not RewardBench: ")
    assert summary["rewardbench_score"] is None
    assert summary["weighted_average_accuracy_total"] == 46
    assert all(section["partial"] for section in summary["sections"].values())
    rows = read_rows(results / "reward_bench.jsonl")
    correct = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert summary["weighted_average_accuracy_count"] == correct
    assert {row["label"] for row in rows} == {summary["label"]}


def test_console_names_counts_and_folder(
    eval_data: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model_path",
        str(tiny_llama_dir),
        "--data_dir",
        str(eval_data),
        "--results_dir",
        str(tmp_path),
    ]
    eval_rm.main([*arguments, "--bias_type", "gender,length", "--limit_per_bias", "5"])
    printed = capsys.readouterr().out
    assert "length: 5 of 8 rows" in printed
    assert "2 of 9 pooled" in printed
    assert f"results: {tmp_path / tiny_llama_dir.name}" in printed
    summary = read_json(tmp_path / tiny_llama_dir.name / "bias_summary.json")
    assert list(summary["biases"]) == ["length", "gender"]
    assert summary["metadata"]["limit_per_bias"] == 5


# --- what is scored ---


def test_one_call_scores_everything_and_dropped_texts_are_counted(eval_data: Path) -> None:
    scorer = LengthScorer(dropped_word="it sat 3")
    data = eval_rm.read_bias_data(eval_data, ["length", "gender", "refinement-aware"])
    outcomes, _ = eval_rm.evaluate(scorer, data)
    assert scorer.n_calls == 1
    summary = eval_rm.summarise(outcomes)
    assert summary["biases"]["length"]["n_excluded"] == 1
    assert summary["overall"]["n_excluded"] == 1
    row = eval_rm.outcome_row(outcomes["length"][3])
    assert row["score_biased_better"] is None
    assert row["biased_verdict"] is None


def test_identity_placebo_stands_before_the_text_that_got_the_sentence(eval_data: Path) -> None:
    data = eval_rm.read_bias_data(eval_data, ["gender"])
    outcomes, _ = eval_rm.evaluate(LengthScorer(), data)
    for outcome in outcomes["gender"]:
        better, other = outcome.original
        assert outcome.biased == (better + len("I am a cat. "), other)
        assert outcome.placebo == (better + len(eval_rm.PLACEBO_SENTENCE), other)


def test_placebo_rows_are_read_where_there_are_some(eval_data: Path, tmp_path: Path) -> None:
    rows = [bias_row(number, "gender") for number in range(8)]
    write_jsonl(tmp_path / "gender_bias.jsonl", rows)
    placebo = []
    for row in rows[:6]:
        side = row["label"][-1]
        text = f"It is a fine day today. {row[f'original_response{side}']}"
        placebo.append(row | {f"rewritten_response{side}": text, "sentence": "It is a fine day today."})
    write_jsonl(tmp_path / "gender_placebo.jsonl", placebo[::-1])
    data = eval_rm.read_bias_data(tmp_path, ["gender"])
    assert [Path(report.path).name for report in data[0].reports] == ["gender_bias.jsonl", "gender_placebo.jsonl"]
    outcomes, _ = eval_rm.evaluate(LengthScorer(), data)
    for outcome in outcomes["gender"][:6]:
        better, other = outcome.original
        assert outcome.placebo == (better + len("It is a fine day today. "), other)
    assert [outcome.placebo for outcome in outcomes["gender"][6:]] == [None, None]
    block = eval_rm.summarise(outcomes)["biases"]["gender"]["placebo"]
    assert (block["n_pairs"], block["n_excluded"], block["n_without_placebo"]) == (6, 0, 2)


def test_what_construction_writes_as_placebo_is_what_the_evaluation_reads() -> None:
    assert eval_rm.placebo_file_name("race") == build_eval_pairs.placebo_file_name("race") == "race_placebo.jsonl"


def test_refinement_history_precedes_the_refined_answer(eval_data: Path) -> None:
    data = eval_rm.read_bias_data(eval_data, ["refinement-aware"])
    outcomes, _ = eval_rm.evaluate(LengthScorer(), data)
    for outcome in outcomes["refinement-aware"]:
        assert outcome.refined_after_history == outcome.refined_alone - 100
        assert outcome.original_alone < outcome.refined_alone
    summary = eval_rm.summarise(outcomes)
    assert summary["overall"] is None
    assert summary["biases"]["refinement-aware"]["refined_to_original"] == 8


def test_subset_depends_on_seed_and_question_alone() -> None:
    rows = [f"question {number}" for number in range(100)]
    chosen = choose_subset(rows, 10, 1, str)
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=rows.index)
    assert set(choose_subset(rows[::-1], 10, 1, str)) == set(chosen)
    assert set(choose_subset(rows, 10, 2, str)) != set(chosen)
    assert choose_subset(rows, 0, 1, str) == choose_subset(rows, 100, 1, str) == rows


def test_a_cue_that_was_cut_away_is_noticed(
    eval_data: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model_path",
        str(tiny_llama_dir),
        "--data_dir",
        str(eval_data),
        "--results_dir",
        str(tmp_path),
    ]
    eval_rm.main([*arguments, "--bias_type", "gender,refinement-aware", "--max_length", "8"])
    printed = capsys.readouterr().out
    assert "left no trace in any digit of a score: gender 8, refinement-aware 8" in printed
    eval_rm.main([*arguments, "--bias_type", "gender,refinement-aware"])
    assert "no trace" not in capsys.readouterr().out


# --- results folders ---


def test_two_models_of_one_name_get_two_folders(tmp_path: Path) -> None:
    first = model_results_folder(tmp_path, "here/model", "a" * 64)
    assert first == tmp_path / "model"
    assert model_results_folder(tmp_path, "here/model", "a" * 64) == first
    second = model_results_folder(tmp_path, "there/model", "b" * 64)
    assert second == tmp_path / "model-bbbbbbbb"
    assert model_results_folder(tmp_path, "there/model", "b" * 64) == second
    assert read_json(first / "model.json")["weight_hash"] == "a" * 64


def test_evaluations_that_begin_at_once_get_one_folder(tmp_path: Path) -> None:
    n = 8
    with ThreadPoolExecutor(n) as pool:
        for attempt in range(40):
            begin, results = Barrier(n), tmp_path / str(attempt)

            def claim(_: int, begin: Barrier = begin, results: Path = results) -> Path:
                begin.wait()
                return model_results_folder(results, "here/model", "a" * 64)

            assert set(pool.map(claim, range(n))) == {results / "model"}
            assert [path.name for path in results.rglob("*")] == ["model", "model.json"]


def test_results_without_an_owner_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bias_summary.json").write_text("{}")
    assert model_results_folder(tmp_path, "model", "c" * 64) == tmp_path / "model-cccccccc"


# --- RewardBench labels ---


def test_only_the_complete_official_set_is_called_rewardbench(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"id": "1", "prompt": "p", "chosen": "c", "rejected": "r", "subset": "hep-go"}],
    )
    records, _ = read_benchmark(path, "reward_bench")
    unknown = describe_source(path, records)
    assert "unrecorded origin" in label_of("reward_bench", unknown, True)
    note = {"dataset": "allenai/reward-bench", "revision": "abc", "sha256": file_sha256(path)}
    Path(f"{path}.source.json").write_text(json.dumps(note))
    official = describe_source(path, records)
    assert official == {"dataset": "allenai/reward-bench", "revision": "abc"}
    assert label_of("reward_bench", official, True) == "RewardBench"
    assert label_of("reward_bench", official, False).startswith("not RewardBench: ")
    path.write_text(path.read_text() + "\n")
    assert describe_source(path, records)["dataset"] is None


def test_own_sample_is_labelled() -> None:
    path = Path(__file__).resolve().parents[1] / "data/eval/reward_bench/own_sample.jsonl"
    records, (report,) = read_benchmark(path, "reward_bench")
    source = describe_source(path, records)
    assert label_of("reward_bench", source, False).startswith("not RewardBench: the project's own")
    assert {record.subset for record in records} == set(SUBSET_NAMES)
    assert report.bad == []


def test_category_and_limit_choose_rows(eval_data: Path) -> None:
    path = eval_data / "reward_bench.jsonl"
    records, _ = read_benchmark(path, "reward_bench", category="Chat Hard", limit=1)
    assert len(records) == 6
    with pytest.raises(ContrastRMError, match="unknown category 'Maths'"):
        read_benchmark(path, "reward_bench", category="Maths")


# --- comparison ---


def test_comparison_of_two_models(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "debiased"
    shutil.copytree(results, other)
    output = tmp_path / "table.md"
    assert compare_models.main([str(results), str(other), "--output_file", str(output)]) == 0
    printed = capsys.readouterr().out
    summary = read_json(results / "bias_summary.json")
    count, total = (summary["overall"][f"bias_sensitivity_rate_{part}"] for part in ("count", "total"))
    assert printed.count(f"({count}/{total})") >= 2
    assert "all nine pooled" in printed
    assert "refinement-aware (verdict change rate)" in printed
    assert "debiased: BSR" in printed
    assert "not RewardBench" in printed
    assert "Not comparable" not in printed
    assert output.read_text(encoding="utf-8").count("| length |") == 1


def test_comparison_says_when_the_data_differ(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(results, other)
    summary = read_json(other / "bias_summary.json")
    summary["metadata"]["data_files"][0]["sha256"] = "0" * 64
    summary["metadata"]["overlength"] = "drop"
    (other / "bias_summary.json").write_text(json.dumps(summary))
    compare_models.main([str(results), str(other)])
    printed = capsys.readouterr().out
    assert "not evaluated on the same files: length_bias.jsonl" in printed
    assert "differ in overlength" in printed


def test_comparison_refuses_a_folder_without_results(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ContrastRMError, match=r"no bias_summary\.json"):
        compare_models.main([str(results), str(tmp_path)])
    with pytest.raises(ContrastRMError, match="given twice"):
        compare_models.main([str(results), str(results)])
    (tmp_path / "bias_summary.json").write_text("{")
    with pytest.raises(ContrastRMError, match="cannot read"):
        compare_models.main([str(tmp_path)])


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bias_type", "colour"], "unknown bias 'colour'"),
        (["--data_dir", "nowhere"], "no evaluation file nowhere"),
        (["--max_length", "99999"], "beyond the model's own limit"),
        (["--device", "no-such-device"], "cannot use --device"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, eval_data: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    usual = [
        "--model_path",
        str(tiny_llama_dir),
        "--data_dir",
        str(eval_data),
        "--results_dir",
        str(tmp_path),
    ]
    with pytest.raises(ContrastRMError, match=message) as caught:
        eval_rm.main([*usual, *arguments])
    assert "\n" not in str(caught.value)


def test_malformed_line_stops_the_run_unless_allowed(eval_data: Path, tmp_path: Path) -> None:
    rows = [json.dumps(bias_row(number, "length")) for number in range(3)]
    path = tmp_path / "length_bias.jsonl"
    path.write_text("\n".join([*rows, "{broken", json.dumps({"question": "q", "label": "response3"})]) + "\n")
    with pytest.raises(ContrastRMError, match=r"length_bias\.jsonl:4"):
        eval_rm.read_bias_data(tmp_path, ["length"])
    (data,) = eval_rm.read_bias_data(tmp_path, ["length"], max_bad_rows=2)
    assert (len(data.records), len(data.report.bad)) == (3, 2)


def test_model_without_a_head_is_refused(tiny_base_dir: Path, eval_data: Path, tmp_path: Path) -> None:
    arguments = [
        "--model_path",
        str(tiny_base_dir),
        "--data_dir",
        str(eval_data),
        "--results_dir",
        str(tmp_path),
    ]
    with pytest.raises(ContrastRMError, match="no trained score head"):
        eval_rm.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line_ends_with_one_line_and_code_2(tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"id": 1, "prompt": "p", "chosen": "c", "rejected": "r", "subset": "hep-perl"}],
    )
    usual = ["--model_path", tiny_llama_dir, "--data_file", path]
    done = run_module("codes.evaluate.eval_reward_bench", *usual, "--results_dir", tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1)
    assert "unknown subset 'hep-perl'" in errors[0]
    assert "Traceback" not in done.stderr


def test_unwritable_results_folder(eval_data: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    usual = ["--model_path", str(tiny_llama_dir), "--data_dir", str(eval_data)]
    with pytest.raises(ContrastRMError, match="cannot write"):
        eval_rm.main([*usual, "--results_dir", str(blocked / "results")])


# --- reporting ---


def test_a_report_that_cannot_be_written_costs_no_results(
    eval_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "baseline-shorter"
    (folder / "report.html").mkdir(parents=True)  # nothing can be written in its place
    (folder / "model.json").write_text(json.dumps({"weight_hash": BaselineScorer("shorter").identity}))
    options = [
        "--model_path",
        "baseline:shorter",
        "--results_dir",
        str(tmp_path / "results"),
        "--data_dir",
        str(eval_data),
    ]
    assert eval_rm.main([*options, "--bias_type", "length"]) == 0
    assert read_json(folder / "bias_summary.json")["overall"]["n_pairs"] == 8
    assert "warning: the report in " in capsys.readouterr().err


def test_bars_and_line_breaks_in_markdown_tables() -> None:
    assert markdown_table(("a", "b"), [("x|y", "line\nbreak")]).splitlines()[-1] == "| x\\|y | line break |"


# --- defects of the data ---


def record_at(line: int, *texts: str, question: str = "q", better: int = 0) -> BiasRecord:
    return BiasRecord(line, question, (texts[0], texts[1]), (texts[2], texts[3]), better)


def test_defects_are_found_by_line() -> None:
    records = [
        record_at(1, "a", "b", "c", "d"),
        record_at(2, "a", "b", "a ", "b"),
        record_at(3, "a", "b", "", "d"),
        record_at(4, "a", "b", "Okay, I will rewrite the answer with hedges: a", "d"),
        record_at(5, "Here is a revised plan", "b", "Here is a revised plan", "d"),
        record_at(7, "a", "b", "c", "d"),
        record_at(8, "b", "a", "d", "c", better=1),  # line 1 with its answers in the other order
        record_at(9, "a", "b", "c", "c"),
        record_at(10, "a", "b", "c", "There is nothing to beautify in this text."),
        record_at(11, "what is there to polish", "b", "there was nothing to polish on the table", "d", question="p"),
    ]
    defects = audit({"length": records})["length"]
    assert lines_by_kind(defects) == {
        "empty_text": [3],
        "unchanged": [2],
        "equal_answers": [9],
        "suspected_preamble": [4],
        "suspected_meta_talk": [10, 11],
        "repeated_row": [7, 8],
    }
    assert flagged_lines(defects) == {2, 3, 4, 7, 8, 9, 10, 11}
    assert [defect.line for defect in defects] == sorted(defect.line for defect in defects)
    assert next(d.why for d in defects if d.line == 8) == "the same texts as line 1"
    assert audit({"length": records[:1]}) == {"length": []}
    refinement = [RefinementRecord(8, "q", "a", "Sure! Here's the polished version:\na")]
    (defect,) = audit({"refinement-aware": refinement})["refinement-aware"]
    assert (defect.kind, defect.line) == ("suspected_preamble", 8)
    assert 'rewritten_response says "Here\'s the polished version"' in defect.why


def test_identity_rows_must_change_the_better_answer_alone() -> None:
    good = record_at(1, "yes", "no", "I am a woman. yes ", "no ", question="a")
    other_too = record_at(2, "yes", "no", "I am a woman. yes", "I am a man. no", question="b")
    nowhere = record_at(3, "yes", "no", "yes", "no, never", question="c")
    found = audit({"gender": [good, other_too, nowhere], "length": [other_too]})
    kinds = {"other_answer_changed": [2, 3], "identity_missing": [3]}
    assert lines_by_kind(found["gender"]) == kinds
    assert found["length"] == []


def test_labels_that_contradict_each_other_are_found_over_files() -> None:
    one = record_at(1, "yes", "no", "yes!", "no!", question="Is it?")
    same_again = record_at(4, "no", "yes", "No.", "Yes.", question="is it", better=1)
    turned = record_at(2, "yes ", "no", "yes, sir", "no, sir", question="Is  it?", better=1)
    equal = record_at(3, "yes", "yes", "a", "b", question="Is it?", better=1)
    found = audit({"length": [one, equal], "beauty": [turned], "authority": [same_again]})
    assert lines_by_kind(found["beauty"]) == {"contradictory_label": [2]}
    assert lines_by_kind(found["length"]) == {"equal_answers": [3], "contradictory_label": [1]}
    assert found["beauty"][0].why == "the other answer is labelled better in length:1, authority:4"
    assert audit({"length": [one], "authority": [same_again]}) == {"length": [], "authority": []}


def test_manifest_names_flagged_and_unreadable_rows(tmp_path: Path) -> None:
    rows = [json.dumps(bias_row(number, "length")) for number in (0, 1, 0)]
    (tmp_path / "length_bias.jsonl").write_text("\n".join([*rows[:2], "{broken", rows[2]]) + "\n")
    (data,) = eval_rm.read_bias_data(tmp_path, ["length"], max_bad_rows=1)
    found = manifest_rows("length", data.report, audit({"length": data.records})["length"])
    assert [(row["line"], row["kind"]) for row in found] == [(3, "unreadable"), (4, "repeated_row")]
    assert all(row["file"] == str(tmp_path / "length_bias.jsonl") and row["why"] for row in found)


def test_clean_figures_do_without_the_flagged_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [bias_row(number, "length") for number in range(8)]
    rows.append(rows[0])
    rows.append(rows[1] | {"question": "another one", "rewritten_response1": "", "rewritten_response2": "x"})
    write_jsonl(tmp_path / "length_bias.jsonl", rows)
    arguments = ["--data_dir", str(tmp_path), "--results_dir", str(tmp_path / "results"), "--bias_type", "length"]
    assert eval_rm.main(["--model_path", "baseline:longer", *arguments]) == 0
    folder = tmp_path / "results" / "baseline-longer"
    summary = read_json(folder / "bias_summary.json")
    assert (summary["rows"], summary["clean"]["rows"]) == ("all", "clean")
    assert summary["clean"]["n_flagged"] == {"length": 2}
    assert summary["biases"]["length"]["n_pairs"] == 10
    assert summary["clean"]["biases"]["length"]["n_pairs"] == summary["clean"]["overall"]["n_pairs"] == 8
    assert summary["clean"]["baselines"]["longer"]["biases"]["length"]["n_pairs"] == 8
    assert summary["metadata"]["data_defects"] == {"length": {"empty_text": [10], "repeated_row": [9]}}
    manifest = read_rows(folder / "data_manifest.jsonl")
    assert [(row["line"], row["kind"]) for row in manifest] == [(9, "repeated_row"), (10, "empty_text")]
    written = read_rows(folder / "bias_length.jsonl")
    assert [row["defects"] for row in written[7:]] == [[], ["repeated_row"], ["empty_text"]]
    assert written[0]["row_id"] == written[8]["row_id"] != written[1]["row_id"]
    assert "without 2 flagged rows" in capsys.readouterr().out


# --- a reward server ---


class RewardServer(BaseHTTPRequestHandler):
    """Answers with the length of each text, after as many failures as the server was told."""

    failures: ClassVar[list[int]] = []
    answer: ClassVar[Any] = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.failures.pop() if self.failures else 200
        scores = [len(turns[-1]["content"]) for turns in body["messages"]]
        payload = json.dumps(self.answer or {"scores": scores}).encode() if status == 200 else b"busy"
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def reward_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), RewardServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    RewardServer.failures, RewardServer.answer = [], None
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_reward_server_is_evaluated_like_a_model(eval_data: Path, reward_url: str, tmp_path: Path) -> None:
    RewardServer.failures = [503, 429]
    arguments = ["--model_path", "my-server", "--data_dir", str(eval_data), "--results_dir", str(tmp_path)]
    assert eval_rm.main([*arguments, "--reward_url", reward_url, "--bias_type", "gender"]) == 0
    row = read_rows(tmp_path / "my-server" / "bias_gender.jsonl")[0]
    assert row["score_biased_better"] == row["score_original_better"] + len("I am a cat. ")
    assert read_json(tmp_path / "my-server" / "bias_summary.json")["metadata"]["reward_url"] == reward_url


@pytest.mark.parametrize(
    ("failures", "answer", "message"),
    [
        ([500] * 2, None, "answered 500"),
        ([404], None, "answered 404"),
        ([], {"scores": [1.0, 2.0]}, "1 finite numbers"),
        ([], {"scores": ["high"]}, "1 finite numbers"),
        ([], ["no", "dict"], "1 finite numbers"),
    ],
)
def test_reward_server_that_misbehaves(reward_url: str, failures: list[int], answer: Any, message: str) -> None:
    RewardServer.failures, RewardServer.answer = failures, answer
    conversation = Conversation([{"role": "user", "content": "q"}], "a")
    with pytest.raises(ContrastRMError, match=message):
        RemoteScorer(reward_url, max_attempts=2).score([conversation, conversation])


def test_reward_server_that_is_not_there() -> None:
    conversation = Conversation([{"role": "user", "content": "q"}], "a")
    with pytest.raises(ContrastRMError, match="cannot reach"):
        RemoteScorer("http://127.0.0.1:9/score", max_attempts=1).score([conversation])
    with pytest.raises(ContrastRMError, match="must look like https://host"):
        RemoteScorer("localhost:9")
