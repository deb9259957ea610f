"""Held-out evaluation during training: the split, the metrics, the best checkpoint, early stopping, ranks, resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError
from codes.common.questions import question_key
from codes.common.records import PreferenceRecord, read_preference_file, write_jsonl
from codes.common.scoring import Conversation, Scorer, plan_packs
from codes.train.evaluation import (
    BestFolder,
    Ranking,
    constrained_accuracy,
    held_out_metrics,
    metric_names,
    resolve_eval_steps,
    resolve_ranking,
)
from codes.train.held_out import (
    HeldOutRecords,
    HeldOutSet,
    aside_of,
    choose_questions,
    encode_held_out,
    gather_held_out,
    split_questions,
)
from codes.train.losses import group_losses
from codes.train.reward_model import load_reward_model
from codes.train.settings import EvaluationSettings, Objective
from codes.train.sources import parse_sources
from codes.train.train_reward_model import main
from tests.conftest import REPO_ROOT, finish, launch_training

BASE = ["--precision", "fp32", "--warmup_steps", "1", "--learning_rate", "3e-3", "--seed", "7", "--report_to", "none"]


def make_record(number: int, **changes: Any) -> PreferenceRecord:
    fields: dict[str, Any] = {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": f"why is cat {number} on the mat"}],
        "chosen": f"because it sat {number}",
        "rejected": ["it is red", "the mat is of France and it is red because it is", "= + ="],
        "bias_type": [None, "length", "beauty"],
    }
    return PreferenceRecord(**(fields | changes))


def rows_of(records: list[PreferenceRecord]) -> list[dict[str, Any]]:
    return [record.to_row() for record in records]


def many_rows(n: int) -> list[dict[str, Any]]:
    """Records of uneven size with answers that are their own."""
    rows = []
    for number in range(n):
        rejected = [f"red {number} and {k} is of the mat" * (1 + (k + number) % 3) for k in range(1 + number % 4)]
        row = make_record(number).to_row()
        row |= {"rejected": rejected, "bias_type": [None, "length", "beauty", "length"][: len(rejected)]}
        rows.append(row)
    return rows


def train_here(base: Path, data: Path, out: Path, *extra: str) -> list[dict[str, Any]]:
    arguments = ["--model_path", str(base), "--train_file", str(data), "--output_dir", str(out), *BASE, *extra]
    assert main(arguments) == 0
    return read_lines(out / "train_log.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def read_summary(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "train_summary.json").read_text())
    return summary


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def train_file(write_rows: Callable[..., Path]) -> Path:
    return write_rows("train.jsonl", many_rows(24))


# --- the split


@settings(max_examples=100, deadline=None)
@given(
    questions=st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=60),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 5),
)
def test_no_question_is_on_both_sides_and_none_is_lost(questions: list[str], share: float, seed: int) -> None:
    keys = {question_key(question) for question in questions}
    if len(keys) < 2:
        return
    split = choose_questions(questions, share, seed)
    out = {question_key(question) for question in questions if split.holds_out(question)}
    assert len(out) == split.n_held_out and split.n_questions == len(keys)
    assert split.n_held_out == (min(max(1, round(share * len(keys))), len(keys) - 1) if share else 0)
    # Neither order nor repetition matters.
    again = choose_questions([*reversed(questions), *questions], share, seed)
    assert again == split
    spelled = [f"  {question.upper()} " for question in questions if question.upper().lower() == question]
    assert all(split.holds_out(question) == (question_key(question) in out) for question in spelled)


def test_split_is_stable_seeded_and_counts() -> None:
    questions = [f"question {number}" for number in range(1000)]
    split = choose_questions(questions, 0.1, 1)
    out = {question for question in questions if split.holds_out(question)}
    more = choose_questions([*questions, *(f"new {number}" for number in range(100))], 0.1, 1)
    stayed = {question for question in questions if more.holds_out(question)}
    assert len(out) == 100
    assert len(out & stayed) >= 85  # a tenth more data moves only questions at the limit
    assert out != {question for question in questions if choose_questions(questions, 0.1, 2).holds_out(question)}


def hold_out(
    records: list[PreferenceRecord], *, share: float | str, eval_file: str, bias_eval_dir: str, seed: int
) -> tuple[list[PreferenceRecord], HeldOutRecords | None]:
    """As training does it, but for the token cache: what is trained on, and what is held out."""
    with tempfile.TemporaryDirectory() as folder:
        file, aside_file = Path(folder) / "train.jsonl", Path(folder) / "aside.jsonl"
        write_jsonl(file, rows_of(records))
        sources = parse_sources(str(file))
        split = split_questions(sources, share=share, eval_file=eval_file, bias_eval_dir=bias_eval_dir, seed=seed)
        aside = aside_of(split)
        kept_out = [] if aside is None else [record for record in records if aside.takes(record)]
        write_jsonl(aside_file, rows_of(kept_out))
        held_out = gather_held_out(
            sources, split, aside_file=aside_file, eval_file=eval_file, bias_eval_dir=bias_eval_dir
        )
    return [record for record in records if record not in kept_out], held_out


@pytest.mark.parametrize(("n", "expected"), [(10, 0), (199, 10), (180, 0), (400, 20), (60_000, 1000)])
def test_auto_share(n: int, expected: int) -> None:
    assert choose_questions((f"q{number}" for number in range(n)), "auto", 3).n_held_out == expected


def test_a_question_with_many_records_goes_to_one_side() -> None:
    records = [make_record(number % 5, id=f"r{number}", chosen=f"answer {number}") for number in range(20)]
    training, held_out = hold_out(records, share=0.4, eval_file="", bias_eval_dir="", seed=1)
    assert held_out is not None
    assert len(training) + len(held_out.records) == 20 and len(held_out.records) == 8
    assert not {record.question for record in training} & {record.question for record in held_out.records}
    assert held_out.report["n_held_out_questions"] == 2 and held_out.report["n_questions"] == 5


def test_given_files_lose_what_is_trained_on_or_final(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    training = [make_record(number) for number in range(4)]
    final = json.loads((REPO_ROOT / "data/eval/length_bias.jsonl").read_text().splitlines()[0])["question"]
    given_rows = rows_of([make_record(2, chosen="other"), make_record(7), make_record(8)])
    given_rows.append(given_rows[0] | {"id": "final", "question": final})
    eval_file = write_rows("eval.jsonl", given_rows)
    kept, held_out = hold_out(training, share="auto", eval_file=str(eval_file), bias_eval_dir="", seed=1)
    assert held_out is not None and [record.id for record in held_out.records] == ["r7", "r8"]
    report = held_out.report
    assert len(kept) == 4 and (report["n_rows"], report["n_trained_on"], report["n_final"]) == (4, 1, 1)
    only_known = write_rows("known.jsonl", rows_of(training[:2]))
    with pytest.raises(ContrastRMError, match="no row can be used: the questions of 2 are trained on"):
        hold_out(training, share="auto", eval_file=str(only_known), bias_eval_dir="", seed=1)
    with pytest.raises(ContrastRMError, match="give one of them"):
        hold_out(training, share=0.5, eval_file=str(eval_file), bias_eval_dir="", seed=1)


def test_final_files_are_refused_by_place_and_by_content(tmp_path: Path) -> None:
    training = [make_record(number) for number in range(4)]
    with pytest.raises(ContrastRMError, match="final results are reported"):
        hold_out(training, share=0, eval_file="", bias_eval_dir=str(REPO_ROOT / "data" / "eval"), seed=1)
    inside = REPO_ROOT / "tests" / ".." / "data" / "eval" / "reward_bench" / "own_sample.jsonl"
    with pytest.raises(ContrastRMError, match="final results are reported"):
        hold_out(training, share="auto", eval_file=str(inside), bias_eval_dir="", seed=1)
    shutil.copy(REPO_ROOT / "data/eval/length_bias.jsonl", tmp_path / "length_bias.jsonl")
    with pytest.raises(ContrastRMError, match="those of 42 stand in the files"):
        hold_out(training, share=0, eval_file="", bias_eval_dir=str(tmp_path), seed=1)
    with pytest.raises(ContrastRMError, match=r"holds no bias-evaluation file; expected length_bias.jsonl"):
        hold_out(training, share=0, eval_file="", bias_eval_dir=str(tmp_path / "nowhere"), seed=1)


def test_final_questions_are_those_of_every_format_under_data_eval(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Bias files ask a ``question``, RewardBench's a ``prompt``; both are final, however the held-out row spells them."""
    final = {
        file: json.loads((REPO_ROOT / "data/eval" / file).read_text().splitlines()[0])
        for file in ("length_bias.jsonl", "reward_bench/own_sample.jsonl")
    }
    prompt = final["reward_bench/own_sample.jsonl"]["prompt"]
    asked = [final["length_bias.jsonl"]["question"], prompt if isinstance(prompt, str) else prompt[-1]["content"]]
    given_rows = [make_record(7).to_row()]
    given_rows += [given_rows[0] | {"id": f"f{k}", "question": f"  {text.upper()}?"} for k, text in enumerate(asked)]
    eval_file = write_rows("eval.jsonl", given_rows)
    _, held_out = hold_out([make_record(1)], share="auto", eval_file=str(eval_file), bias_eval_dir="", seed=1)
    assert held_out is not None and [record.id for record in held_out.records] == ["r7"]
    assert held_out.report["n_final"] == 2


def test_a_split_beside_bias_files_trains_on_no_question_that_it_holds_out(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows whose question the split holds out are not trained on and stay; the others' go."""
    training = [make_record(number) for number in range(20)]
    fields = ("original_response1", "original_response2", "rewritten_response1", "rewritten_response2")
    rows = [
        {"question": record.question.upper(), "label": "response1"} | {name: f"{name} {n}" for name in fields}
        for n, record in enumerate(training)
    ]
    folder = write_rows("length_bias.jsonl", rows).parent
    kept, held_out = hold_out(training, share=0.3, eval_file="", bias_eval_dir=str(folder), seed=1)
    assert held_out is not None and held_out.bias_rows is not None
    left = {question_key(row.question) for row in held_out.bias_rows["length"]}
    assert left == {question_key(record.question) for record in held_out.records} and len(left) == 6
    assert held_out.report["bias_files"]["length"]["n_trained_on"] == len(kept) == 14


def test_a_share_of_one_question_is_refused() -> None:
    with pytest.raises(ContrastRMError, match="at least two different questions"):
        hold_out([make_record(1), make_record(1, id="r2")], share=0.5, eval_file="", bias_eval_dir="", seed=1)


# --- metrics


@pytest.fixture
def formatter(tiny_base_dir: Path) -> ChatFormatter:
    _, tokenizer = load_reward_model(str(tiny_base_dir), require_head=False)
    return ChatFormatter(tokenizer, max_length=512, overlength="drop")


def metrics_of(held_out: HeldOutSet, scores: list[float]) -> dict[str, Any]:
    loss = partial(group_losses, Objective("contrastive", 1.0, 1.0))
    return held_out_metrics(held_out, np.array(scores, dtype=np.float32), loss=loss)


def test_metrics_by_hand(formatter: ChatFormatter) -> None:
    # Places in texts: chosen, rejected..., record by record.
    records = [
        make_record(0),  # original right, length flips, beauty holds
        make_record(1),  # original right, length ties, beauty holds
        make_record(2),  # original wrong
        make_record(3, bias_type=["length", "length", "beauty"]),  # no original answer: no pair, all carry a bias
        make_record(4, rejected=["a", "b"], bias_type=[None, None]),  # two originals, one ties with the chosen
    ]
    data = hold_out(records, share=0, eval_file="", bias_eval_dir="", seed=1)
    assert data == (records, None)
    held_out = encode_held_out(HeldOutRecords(records, None, {}), formatter)
    assert held_out.counts["n_groups"] == 5 and held_out.counts["n_pairs"] == 6
    assert held_out.counts["n_pairs_without_original"] == 3 and held_out.counts["n_dropped_pairs"] == 0
    scores = [2, 1, 3, 0, 2, 1, 2, 0, 0, 1, -1, -1, 5, 1, 2, 3, 1, 1, 0]
    metrics = metrics_of(held_out, [float(score) for score in scores])
    assert (metrics["eval/accuracy_count"], metrics["eval/accuracy_total"], metrics["eval/accuracy_ties"]) == (3, 5, 1)
    assert (metrics["eval/accuracy_all_count"], metrics["eval/accuracy_all_ties"]) == (1, 2)
    assert metrics["eval/score_gap"] == pytest.approx(np.mean([2 - 4 / 3, 1, 1 / 3, 3, 0.5]))
    assert metrics["eval/score_mean"] == pytest.approx(np.mean(scores))
    assert metrics["eval/score_std"] == pytest.approx(np.std(scores, ddof=1))
    assert (metrics["eval/original_accuracy_count"], metrics["eval/original_accuracy_total"]) == (4, 6)
    assert (metrics["eval/bsr_count"], metrics["eval/bsr_total"], metrics["eval/bsr_ties"]) == (1, 4, 1)
    assert (metrics["eval/bsr/length_count"], metrics["eval/bsr/length_total"]) == (1, 2)
    assert (metrics["eval/bsr/beauty"], metrics["eval/bsr/beauty_total"]) == (0.0, 2)
    assert metrics["eval/constrained_accuracy"] == pytest.approx(0.6 * 0.75)
    chosen_last = [[1, 3, 0, 2], [1, 2, 0, 2], [1, -1, -1, 0], [1, 2, 3, 5], [1, 0, 1]]
    losses = [-row[-1] + math.log(sum(math.exp(score) for score in row)) for row in chosen_last]
    assert metrics["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    plain = encode_held_out(HeldOutRecords(records, None, {}), formatter, negatives="original")
    original = metrics_of(plain, [float(score) for score in scores])
    pairs = [[1, 2], [1, 2], [1, 0], [1, 0, 1]]
    expected = np.mean([-row[-1] + math.log(sum(math.exp(score) for score in row)) for row in pairs])
    assert original["eval/loss"] == pytest.approx(expected, rel=1e-5) and original["eval/loss_total"] == 4
    assert {name for name in metric_names(held_out) if f"eval/{name}" not in metrics} == set()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


EVAL_ON_START = ("--eval_on_start", "1", "--eval_steps", "0", "--max_steps", "1", "--global_batch_size", "11")


@pytest.mark.parametrize(
    "objective",
    [
        ("--bias_weights", "length=3,original=0.5", "--bias_margins", "beauty=0.7", "--label_smoothing", "0.1"),
        ("--mode", "pairwise", "--bias_weights", "length=3", "--centering", "0.1"),
        ("--mode", "pairwise", "--pairwise_loss", "bradley_terry"),
        ("--row_margins", "ignore", "--negatives", "original"),
        ("--negatives", "original", "--mode", "pairwise"),
    ],
)
def test_held_out_loss_is_what_is_trained(
    objective: tuple[str, ...], tiny_base_dir: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The untrained model's loss on held-out records is the first step's loss of a run that trains on them."""
    rows = many_rows(11)
    for number, row in enumerate(rows):
        row["margin"] = [0.5 * number, *[None] * (len(row["rejected"]) - 1)] if number % 2 else 0.25
    # An answer over the length limit moves its neighbours' biases and margins, and is no first negative.
    rows[3]["rejected"][0] = "the cat sat on a mat " * 200
    rows[6]["bias_type"] = ["length", None, "beauty"]
    held = write_rows("held.jsonl", rows)
    other = write_rows(
        "other.jsonl", [row | {"id": f"o{row['id']}", "question": f"is {row['id']} red"} for row in rows]
    )
    train_here(tiny_base_dir, other, tmp_path / "a", "--eval_file", str(held), *EVAL_ON_START, *objective)
    evaluation = read_lines(tmp_path / "a" / "eval_log.jsonl")[0]
    trained = train_here(tiny_base_dir, held, tmp_path / "b", "--held_out_share", "0", "--max_steps", "1",
                         "--global_batch_size", "11", *objective)  # fmt: skip
    assert evaluation["step"] == 0 and trained[0]["n_groups"] == evaluation["eval/loss_total"]
    assert evaluation["eval/loss"] == pytest.approx(trained[0]["train/loss"], rel=1e-4)


def test_held_out_loss_sees_as_many_negatives_as_training(formatter: ChatFormatter) -> None:
    records = [make_record(number) for number in range(40)]
    data = HeldOutRecords(records, None, {})
    scores = [0.0] * 4 * len(records)
    for most, loss in ((0, math.log(4)), (1, math.log(2)), (2, math.log(3)), (9, math.log(4))):
        held_out = encode_held_out(data, formatter, max_rejected=most)
        assert metrics_of(held_out, scores)["eval/loss"] == pytest.approx(loss)
        assert held_out == encode_held_out(data, formatter, max_rejected=most)
    # A sample of all positions, and of the answers that count alone.
    drawn = {group.rejected[0] % 4 for group in encode_held_out(data, formatter, max_rejected=1).as_trained}
    assert drawn == {1, 2, 3}
    plain = encode_held_out(data, formatter, negatives="original", max_rejected=1).as_trained
    assert {group.rejected[0] % 4 for group in plain} == {1}


def test_public_format_gives_the_public_rate(write_rows: Callable[..., Path], formatter: ChatFormatter) -> None:
    rows = [
        {
            "question": f"q {number}",
            "original_response1": f"a {number}",
            "original_response2": f"b {number}",
            "rewritten_response1": f"c {number}",
            "rewritten_response2": f"d {number}",
            "label": label,
        }
        for number, label in enumerate(["response1", "response2", "response1"])
    ]
    folder = write_rows("sycophancy_bias.jsonl", rows).parent
    training, data = hold_out([make_record(0)], share=0, eval_file="", bias_eval_dir=str(folder), seed=1)
    assert len(training) == 1 and data is not None
    held_out = encode_held_out(data, formatter)
    # better, other, biased better, biased other: flipped; right and stays; wrong.
    metrics = metrics_of(held_out, [1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0])
    assert metrics["eval/bsr"] == metrics["eval/bsr/sycophancy"] == 0.5 and metrics["eval/bsr_total"] == 2
    assert metrics["eval/original_accuracy"] == pytest.approx(2 / 3) and "eval/accuracy" not in metrics
    assert metrics["eval/constrained_accuracy"] == pytest.approx(1 / 3)


def test_dropped_texts_leave_their_comparison_and_are_counted(formatter: ChatFormatter) -> None:
    long = "the cat sat on a mat " * 200
    records = [
        make_record(0),
        make_record(1, chosen=long),
        make_record(2, rejected=[long, "b", "c"]),  # its original answer goes: both pairs go, the group stays
        make_record(3, rejected=["a", long, "c"]),
    ]
    held_out = encode_held_out(HeldOutRecords(records, None, {}), formatter)
    counts = held_out.counts
    assert (counts["n_groups"], counts["n_dropped_groups"], counts["n_dropped_texts"]) == (3, 1, 3)
    assert (counts["n_pairs"], counts["n_dropped_pairs"], counts["n_pairs_without_original"]) == (3, 5, 0)
    scores = [float("nan") if text.dropped else 1.0 for text in held_out.texts]
    metrics = metrics_of(held_out, scores)
    assert metrics["eval/accuracy_total"] == 3 and metrics["eval/accuracy_ties"] == 3
    with pytest.raises(ContrastRMError, match="nothing held out is left"):
        encode_held_out(HeldOutRecords([records[1]], None, {}), formatter)


def test_constrained_accuracy_and_its_nulls() -> None:
    assert constrained_accuracy(0.8, 0.25, True) == pytest.approx(0.6)
    assert constrained_accuracy(0.8, None, False) == 0.8
    assert constrained_accuracy(0.8, None, True) is None
    assert constrained_accuracy(None, 0.1, True) is None
    # Neither factor alone wins: the shorter-wins model and the one that style fools lose to a sound one.
    assert max((0.32, 0.058), (0.95, 0.5), (0.85, 0.12), key=lambda m: constrained_accuracy(*m, True)) == (0.85, 0.12)


# --- the best one


def entry(step: int, value: float | None, accuracy: float | None = None, bsr: float | None = None) -> dict[str, Any]:
    return {"step": step, "eval/m": value, "eval/loss": value, "eval/accuracy": accuracy, "eval/bsr": bsr}


def test_ranking_ties_and_nulls() -> None:
    ranking = Ranking("m")
    assert ranking.best([]) is None and ranking.best([entry(1, None)]) is None
    # Of equals the one that was trained longest, however they stand in the list.
    assert ranking.best([entry(1, None), entry(2, 0.1), entry(3, 0.1), entry(4, None)])["step"] == 3
    assert ranking.best([entry(1, math.nan), entry(2, 0.1)])["step"] == 2
    assert ranking.best([entry(1, 0.5, 0.6, 0.1), entry(2, 0.5, 0.7, 0.2), entry(3, 0.5, 0.7, 0.1)])["step"] == 3
    assert Ranking("loss").best([entry(1, 0.5), entry(2, 0.4), entry(3, 0.6)])["step"] == 2
    assert Ranking("bsr/length").lower_is_better and not Ranking("original_accuracy/length").lower_is_better
    # An equal value is no better one, and no value is no evaluation.
    assert ranking.n_without_gain([entry(1, 0.5), entry(2, 0.4), entry(3, 0.5)]) == 2
    assert ranking.n_without_gain([entry(1, None), entry(2, None)]) == 0 == ranking.n_without_gain([])
    assert ranking.n_without_gain([entry(1, None), entry(2, 0.5), entry(3, None), entry(4, 0.4), entry(5, None)]) == 1


def test_what_cannot_be_had_is_refused_with_the_cure(formatter: ChatFormatter) -> None:
    held_out = encode_held_out(HeldOutRecords([make_record(0)], None, {}), formatter)
    assert resolve_ranking(held_out, EvaluationSettings(metric_for_best="bsr/length")) == Ranking("bsr/length")
    assert resolve_ranking(held_out, EvaluationSettings(metric_for_best="none")) is None
    assert resolve_ranking(None, EvaluationSettings(metric_for_best="constrained_accuracy")) is None
    with pytest.raises(ContrastRMError, match="it gives: constrained_accuracy, accuracy"):
        resolve_ranking(held_out, EvaluationSettings(metric_for_best="bsr/sycophancy"))
    with pytest.raises(ContrastRMError, match="early_stopping_patience 2 needs held-out data.*--held_out_share"):
        resolve_ranking(None, EvaluationSettings(early_stopping_patience=2))
    with pytest.raises(ContrastRMError, match="--load_best_at_end 1 needs a metric"):
        resolve_ranking(held_out, EvaluationSettings(metric_for_best="none", load_best_at_end=True))


def test_best_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = BestFolder(tmp_path)

    def save(target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    folder.write(3, save, {"step": 3, "eval/score_mean": 0.5, "eval/score_std": 2.0}, is_main=True)
    assert folder.has(3) and not folder.has(4)
    assert json.loads((folder.path(3) / "config.json").read_text()) == {"reward_mean": 0.5, "reward_std": 2.0}

    def fail(target: Path) -> None:
        save(target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write(4, fail, {"step": 4}, is_main=True)
    assert not folder.has(4)
    folder.keep_only(3, None)
    assert [path.name for path in tmp_path.iterdir()] == ["best-3"]


@pytest.mark.parametrize(("steps", "total", "every"), [("auto", 3, 1), ("auto", 11, 3), (4, 100, 4), (0, 9, 9)])
def test_eval_steps(steps: int | str, total: int, every: int) -> None:
    assert resolve_eval_steps(steps, total) == every


# --- in a run


HELD = ("--held_out_share", "0.3", "--global_batch_size", "4", "--epochs", "3")


def test_training_with_evaluation_is_training_without(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Same records, with and without evaluation between the steps: the same curve and weights, bit for bit."""
    watched = train_here(tiny_base_dir, train_file, tmp_path / "a", *HELD, "--eval_steps", "1", "--eval_on_start", "1")
    held = {row["question"] for row in read_lines(tmp_path / "a" / "held_out.jsonl")}
    assert len(held) == 7
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(json.dumps(row) + "\n" for row in read_lines(train_file) if row["question"] not in held))
    plain = train_here(tiny_base_dir, rest, tmp_path / "b", *HELD[2:], "--held_out_share", "0")
    assert [e["train/loss"] for e in watched] == [e["train/loss"] for e in plain]
    assert same_weights(tmp_path / "a", tmp_path / "b")
    evaluations = read_lines(tmp_path / "a" / "eval_log.jsonl")
    assert [e["step"] for e in evaluations] == list(range(len(watched) + 1))
    assert not (tmp_path / "b" / "eval_log.jsonl").exists()
    # The log's figures are those of the saved model, scored from the files.
    records, _ = read_preference_file(tmp_path / "a" / "held_out.jsonl")
    model, tokenizer = load_reward_model(str(tmp_path / "a"), dtype="float32")
    scorer = Scorer(model, ChatFormatter(tokenizer), progress=False)
    right = 0
    for record in records:
        texts = [Conversation(record.messages, answer) for answer in (record.chosen, *record.rejected)]
        chosen, *others = scorer.score(texts).scores
        right += chosen > max(others)
    assert evaluations[-1]["eval/accuracy_all_count"] == right
    summary = read_summary(tmp_path / "a")
    assert summary["held_out"]["last"] == evaluations[-1]
    assert summary["groups"] == 17 and summary["held_out"]["counts"]["n_groups"] == 7
    assert (tmp_path / "a" / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "BSR, all biases" in (tmp_path / "a" / "training_curves.svg").read_text()


@pytest.mark.parametrize("packing", ["off", "packed", "shared"])
def test_live_scores_are_the_scorers_own(tiny_llama_dir: Path, packing: str) -> None:
    """Between steps: the same scores, dropout and train mode as before, no random number drawn, no gradient kept."""
    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    texts = [Conversation([{"role": "user", "content": f"q {n % 3}"}], f"the cat {n}" * (1 + n % 4)) for n in range(9)]
    alone = Scorer(model, formatter, packing="off", progress=False).score(texts).scores
    if packing != "off":
        assert model.enable_packing() is None
    accelerator = Accelerator()
    live = accelerator.prepare(model)
    live.train()
    before = torch.get_rng_state()
    scorer = Scorer(live, formatter, packing=packing, max_tokens_per_batch=40, progress=False, accelerator=accelerator)
    found = scorer.score(texts)
    assert found.scores == pytest.approx(alone, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert live.training and all(module.training for module in live.modules())
    assert all(parameter.grad is None for parameter in live.parameters())
    # Nothing is left behind that could not be trained with.
    text = formatter.encode(texts[:1])[0]
    ids = torch.tensor([text.input_ids])
    live(input_ids=ids, attention_mask=torch.ones_like(ids)).sum().backward()


def read_held_out_texts(out: Path) -> list[Conversation]:
    records, _ = read_preference_file(out / "held_out.jsonl")
    return [Conversation(r.messages, answer) for r in records for answer in (*r.rejected, r.chosen)]


def test_best_is_kept_beside_the_checkpoints(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extra = ("--eval_steps", "2", "--save_steps", "3", "--keep_checkpoints", "1", "--metric_for_best", "loss")
    # A rate that is too high: the held-out loss does not fall to the end.
    train_here(tiny_base_dir, train_file, out, *HELD, *extra, "--learning_rate", "2e-2")
    evaluations = read_lines(out / "eval_log.jsonl")
    best = min(evaluations, key=lambda e: (e["eval/loss"], -e["step"]))
    assert best["step"] < evaluations[-1]["step"], "the test needs a run whose last evaluation is not its best"
    summary = read_summary(out)["held_out"]
    assert summary["best"] == best and summary["step_of_saved_weights"] == evaluations[-1]["step"]
    assert [path.name for path in out.glob("best-*")] == [f"best-{best['step']}"]
    assert not same_weights(out, out / f"best-{best['step']}")
    assert len(list(out.glob("checkpoint-*"))) == 1
    # The same run with the best weights at the end, which load and score as the log says.
    other = tmp_path / "other"
    train_here(tiny_base_dir, train_file, other, *HELD, *extra, "--learning_rate", "2e-2", "--load_best_at_end", "1")
    assert same_weights(other, out / f"best-{best['step']}") and not list(other.glob("*best-*"))
    assert read_summary(other)["held_out"]["step_of_saved_weights"] == best["step"]
    card = (other / "README.md").read_text()
    assert f"The weights are those after step {best['step']}, the best by held-out loss." in card
    assert f"On {len(read_held_out_texts(other))} texts of its held-out data the raw score has mean" in card
    last = (out / "README.md").read_text()
    assert "texts of its training data the raw score has mean" in last and "The weights are those" not in last
    model, tokenizer = load_reward_model(str(other), dtype="float32")
    scores = Scorer(model, ChatFormatter(tokenizer), progress=False).score(read_held_out_texts(other)).scores
    assert float(scores.mean()) == pytest.approx(best["eval/score_mean"], abs=1e-4)
    assert json.loads((other / "config.json").read_text())["reward_mean"] == best["eval/score_mean"]


def test_early_stopping(tiny_base_dir: Path, train_file: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    extra = ("--eval_steps", "1", "--metric_for_best", "loss", "--early_stopping_patience", "2")
    log = train_here(tiny_base_dir, train_file, out, *HELD, *extra, "--learning_rate", "3e-2", "--epochs", "12")
    evaluations = read_lines(out / "eval_log.jsonl")
    best = min(evaluations, key=lambda e: (e["eval/loss"], e["step"]))
    assert len(log) == best["step"] + 2 < 12 * 5
    summary = read_summary(out)
    assert summary["held_out"]["stopped_early"] and summary["steps"] == len(log)
    assert "stopped early" in capsys.readouterr().out


def test_evaluations_without_a_value_are_none(
    tiny_base_dir: Path, train_file: Path, write_rows: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No pair is right before its bias, so that BSR and what is made of it are 0/0: nothing to stop or to choose by."""
    record = {"question": "is it", "chosen": "cat", "rejected": ["red mat", "so"], "bias_type": [None, "length"]}
    swapped = record | {"chosen": "red mat", "rejected": ["cat", "so"]}
    extra = ("--eval_on_start", "1", "--early_stopping_patience", "1", "--load_best_at_end", "1", "--eval_steps", "1",
             "--max_steps", "3", "--learning_rate", "1e-9", "--global_batch_size", "4")  # fmt: skip
    for number, row in enumerate((record, swapped)):
        held = write_rows(f"held{number}.jsonl", [row])
        out = tmp_path / f"out{number}"
        train_here(tiny_base_dir, train_file, out, "--eval_file", str(held), *extra)
        evaluations = read_lines(out / "eval_log.jsonl")
        if evaluations[0]["eval/original_accuracy"] == 0:
            break
        capsys.readouterr()
    assert [one["eval/constrained_accuracy"] for one in evaluations] == [None] * 4
    summary = read_summary(out)["held_out"]
    assert not summary["stopped_early"] and summary["best"] is None and summary["step_of_saved_weights"] == 3
    printed = capsys.readouterr().out
    assert printed.count("no value of constrained_accuracy") == 4
    assert (
        "no evaluation had a value of constrained_accuracy (--metric_for_best): there is no best checkpoint" in printed
    )


def test_of_equal_evaluations_the_last_is_kept(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A rate so small that nothing moves: every evaluation is as good as the first.
    extra = ("--eval_on_start", "1", "--eval_steps", "1", "--max_steps", "4", "--learning_rate", "1e-12")
    extra += ("--metric_for_best", "accuracy", "--load_best_at_end", "1")
    train_here(tiny_base_dir, train_file, out, *HELD, *extra)
    evaluations = read_lines(out / "eval_log.jsonl")
    assert len({one["eval/accuracy"] for one in evaluations}) == 1 and len(evaluations) == 5
    assert read_summary(out)["held_out"]["step_of_saved_weights"] == 4 == read_summary(out)["held_out"]["best"]["step"]
    # None of them is a better one either.
    other = tmp_path / "other"
    train_here(tiny_base_dir, train_file, other, *HELD, *extra, "--early_stopping_patience", "2")
    assert [one["step"] for one in read_lines(other / "eval_log.jsonl")] == [0, 1, 2]


def test_killed_and_resumed_evaluates_the_same(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    extra = (*HELD, "--epochs", "8", "--eval_steps", "3", "--save_steps", "4", "--learning_rate", "3e-2")
    extra += ("--metric_for_best", "loss", "--report_to", "tensorboard")
    train_here(tiny_base_dir, train_file, tmp_path / "whole", *extra)
    out = tmp_path / "killed"
    command = [
        sys.executable, "-m", "codes.train.train_reward_model", "--model_path", str(tiny_base_dir),
        "--train_file", str(train_file), "--output_dir", str(out), *BASE, *extra, "--resume", "auto",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stderr=subprocess.DEVNULL
    ) as child:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-12" / "trainer_state.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not (out / "train_summary.json").exists()
    train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto")
    for name in ("train_log.jsonl", "eval_log.jsonl"):
        assert without_times(read_lines(out / name)) == without_times(read_lines(tmp_path / "whole" / name))
    assert same_weights(out, tmp_path / "whole")
    found, expected = ([path.name for path in folder.glob("*best-*")] for folder in (out, tmp_path / "whole"))
    assert found == expected
    for name in found:
        assert same_weights(out / name, tmp_path / "whole" / name)
    # No point twice in TensorBoard.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = events.Scalars("train/loss")
    log = read_lines(out / "train_log.jsonl")
    assert [point.step for point in losses] == [line["step"] for line in log]
    assert [point.value for point in losses] == pytest.approx([line["train/loss"] for line in log])
    steps = [point.step for point in events.Scalars("eval/loss")]
    assert steps == [line["step"] for line in read_lines(out / "eval_log.jsonl")]


def test_a_lost_best_is_said_and_chosen_anew(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extra = (*HELD, "--eval_steps", "2", "--save_steps", "4", "--metric_for_best", "loss", "--learning_rate", "3e-2")
    train_here(tiny_base_dir, train_file, out, *extra)
    for path in (*out.glob("best-*"), out / "checkpoint-12"):
        shutil.rmtree(path)
    (out / "train_summary.json").unlink()
    evaluations = read_lines(out / "eval_log.jsonl")
    train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto")
    assert "is gone: the best checkpoint is chosen among the evaluations from here on" in capsys.readouterr().out
    assert without_times(read_lines(out / "eval_log.jsonl")) == without_times(evaluations)
    assert read_summary(out)["held_out"]["best"]["step"] > 8


ODD_BUDGET = 130


@pytest.mark.parametrize("engine", ["none", "configs/ds_z3_config.json"])
def test_two_ranks_evaluate_as_one_process(tiny_base_dir: Path, train_file: Path, tmp_path: Path, engine: str) -> None:
    """Uneven batches (an odd number of them over two ranks), and the best weights gathered in the middle of training."""
    extra = (*HELD, "--eval_steps", "2", "--max_tokens_per_batch", str(ODD_BUDGET), "--metric_for_best", "score_gap")
    extra += ("--load_best_at_end", "1", "--learning_rate", "1e-2")
    train_here(tiny_base_dir, train_file, tmp_path / "single", *extra)
    out = tmp_path / "two"
    files = {"MODEL_PATH": str(tiny_base_dir), "TRAIN_FILE": str(train_file), "OUTPUT_DIR": str(out)}
    finish(launch_training(*BASE, *extra, **files, NUM_PROCESSES="2", DEEPSPEED_CONFIG=engine))
    # The last turn has a batch for one rank alone.
    _, tokenizer = load_reward_model(str(tmp_path / "single"))
    encoded = ChatFormatter(tokenizer).encode(read_held_out_texts(out))
    distinct = list(dict.fromkeys(text.input_ids for text in encoded))
    assert len(plan_packs(distinct, ODD_BUDGET, share=True)) % 2 == 1
    single, two = (read_lines(folder / "eval_log.jsonl") for folder in (tmp_path / "single", out))
    assert [e["step"] for e in two] == [e["step"] for e in single]
    for mine, theirs in zip(two, single, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for key in ("eval/loss", "eval/score_gap", "eval/score_mean", "eval/score_std"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), key
        for key in (key for key in theirs if key.endswith("_total")):
            assert mine[key] == theirs[key] or key.startswith("eval/bsr"), key
    chosen = [read_summary(folder)["held_out"]["step_of_saved_weights"] for folder in (tmp_path / "single", out)]
    assert chosen[0] == chosen[1] < single[-1]["step"], "the test needs a run whose last evaluation is not its best"
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "single", out))
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), atol=1e-4, rtol=0, msg=name)


def test_records_come_through_whole(tmp_path: Path, tiny_base_dir: Path, train_file: Path) -> None:
    """What is held out and what is trained on are together what was given."""
    out = tmp_path / "out"
    train_here(
        tiny_base_dir, train_file, out, "--held_out_share", "0.25", "--max_steps", "1", "--global_batch_size", "4"
    )
    records, _ = read_preference_file(train_file)
    held, _ = read_preference_file(out / "held_out.jsonl")
    summary = read_summary(out)
    assert summary["data"]["n_records"] + len(held) == len(records)
    by_id = {record.id: record for record in records}
    assert all(record == by_id[record.id] for record in held)


def test_the_split_is_remembered_and_a_damaged_memory_is_not_trusted(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = parse_sources(str(write_rows("train.jsonl", many_rows(30))))
    options: dict[str, Any] = {"share": 0.2, "eval_file": "", "bias_eval_dir": "", "seed": 1}
    options |= {"cache_dir": str(tmp_path / "cache")}
    first = split_questions(sources, **options)
    assert first is not None and first.n_held_out == 6
    (file,) = (tmp_path / "cache").glob("split-*.json")
    assert split_questions(sources, **options) == first == split_questions(sources, **(options | {"cache_dir": ""}))
    assert split_questions(sources, **(options | {"seed": 2})) != first
    for damage in ("{", "[]", '{"seed": 1, "wrong": 2}', '{"seed": "1"}'):
        file.write_text(damage)
        assert split_questions(sources, **options) == first
        assert "is damaged" in capsys.readouterr().err
    # Other data, another split.
    more = parse_sources(str(write_rows("train.jsonl", many_rows(31))))
    found = split_questions(more, **options)
    assert found is not None and found.n_questions == 31
