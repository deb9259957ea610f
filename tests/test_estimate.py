"""The estimate and the contamination check: counts that add up, numbers worked out by hand, no weights needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError, RecordError
from codes.common.packing import shared_tokens
from codes.common.questions import question_words
from codes.common.records import read_preference_file
from codes.train.contamination import NGRAM, ContaminationIndex, expand_files
from codes.train.data_utils import encode_groups
from codes.train.draws import Draws
from codes.train.train_reward_model import main
from tests.conftest import chatml_tokenizer

WriteRows = Callable[[str, Sequence[Any]], Path]


@pytest.fixture
def bare_model(tiny_base_dir: Path, tmp_path: Path) -> Path:
    """Configuration and tokenizer alone."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_base_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def estimated(model: Path, train_file: object, out: Path, *extra: object) -> dict[str, Any]:
    places = ["--train_file", train_file, "--output_dir", out, "--cache_dir", out.parent / "cache"]
    given_files = [] if "--contamination_files" in extra else ["--contamination_files", ""]
    split = [] if "--held_out_share" in extra else ["--held_out_share", "0"]
    arguments = ["--estimate", "1", "--model_path", model, *places, *given_files, *split, *extra]
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads((out / "data_estimate.json").read_text())


def test_everything_is_counted_and_nothing_is_trained(
    bare_model: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [*preference_rows, {"question": "q"}, {"question": "long", "chosen": "cat " * 700, "rejected": ["no"]}]
    rows += [{"question": "all injected", "chosen": "a", "rejected": ["b"], "bias_type": ["length"]}]
    a = write_rows("a.jsonl", [row | {"verify_correctness": "CHOSEN_IS_BEST"} for row in rows[:4]] + rows[4:])
    b = write_rows("b.jsonl", [{"question": "q", "chosen": "a", "rejected": ["b", "c"], "margin": 1}])
    result = estimated(
        bare_model, f"{a}:3,{b}", tmp_path / "out", "--max_bad_rows", "1", "--global_batch_size", "4", "--max_rejected", "2",
        "--max_tokens_per_batch", "200",
    )  # fmt: skip
    one, two = result["sources"]
    assert (one["n_rows"], one["n_bad_rows"], one["n_records"], one["n_groups"], one["n_dropped_groups"]) == (
        13, 1, 12, 11, 1,
    )  # fmt: skip
    assert one["verdicts"] == {"CHOSEN_IS_BEST": 4, "none": 8}
    assert sum(one["biases"].values()) == one["n_texts"] - one["n_groups"]
    assert (two["n_with_margin"], two["n_margins"], two["weight"]) == (1, 2, None)
    assert (one["groups_an_epoch"], two["groups_an_epoch"]) == (9, 3)
    epoch, steps = result["epoch"], result["steps"]
    assert epoch["n_groups"] == 12 and epoch["n_repeated_groups"] == 2 and epoch["n_groups_left_out"] == 2
    assert steps["steps_per_epoch"] == 3 and steps["total_steps"] == 6
    assert set(steps["micro_steps"]) == {"shared", "packed", "off"}
    lengths = result["lengths"]
    assert lengths["n_texts_over_the_limit"] == 1 and lengths["texts_before_the_limit"]["p100"] > 512
    assert lengths["n_texts_before_the_limit"] == one["n_raw_texts"] + two["n_raw_texts"]
    printed = capsys.readouterr().out
    for expected in ("a.jsonl:11: field 'chosen'", "rejected answers by injected bias", "with shared prefixes"):
        assert expected in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data_estimate.json"]


def test_tokens_by_way_of_batching_are_those_of_the_groups(
    bare_model: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_rows("a.jsonl", preference_rows)
    tokens = estimated(bare_model, path, tmp_path / "out", "--seed", "5")["computed_tokens"]
    groups, report = encode_groups(read_preference_file(path)[0], ChatFormatter(chatml_tokenizer()))
    from codes.train.sources import draw_epoch

    order = [groups[number] for number in draw_epoch([10], None, seed=5, epoch=0)[0]]
    padded = 0
    for batch in (order[:8], order[8:]):
        lengths = [len(text.input_ids) for group in batch for text in group.texts]
        padded += len(lengths) * max(lengths)
    assert tokens["padded_in_batches_of_8_groups"] == padded
    assert tokens["texts"] == tokens["packed"] == report.n_tokens
    shared = sum(shared_tokens(text.input_ids for text in group.texts) for group in groups)
    assert tokens["shared"] == shared
    assert tokens["padding_waste"] == pytest.approx(1 - report.n_tokens / padded, abs=1e-4)
    assert tokens["sharing_gain"] == pytest.approx(report.n_tokens / shared, abs=1e-4)


def test_what_training_holds_out_is_no_part_of_an_epoch(
    bare_model: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_rows("a.jsonl", preference_rows)
    result = estimated(bare_model, path, tmp_path / "out", "--held_out_share", "0.3")
    [source] = result["sources"]
    assert (source["n_rows"], source["n_aside"], source["n_groups"]) == (10, 3, 7) and result["epoch"]["n_groups"] == 7


def test_a_run_too_long_to_plan_is_refused(
    bare_model: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_rows("a.jsonl", preference_rows)
    with pytest.raises(ContrastRMError, match="too many to plan"):
        estimated(bare_model, path, tmp_path / "out", "--epochs", "1000000000000")


# --- contamination

LONG = "Please explain to me, in simple words, how the tides of the sea follow the moon every day of the year"


@pytest.fixture
def eval_file(write_rows: WriteRows) -> Path:
    return write_rows(
        "eval.jsonl",
        [
            {"question": "What is 2 + 2?", "label": "response1"},
            {"prompt": LONG},
            {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Is 家猫 a cat?"}]},
            {"question": "What is 2 + 2?"},
        ],
    )


def test_questions_that_meet_are_listed(
    bare_model: Path, write_rows: WriteRows, eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"chosen": "a", "rejected": ["b"]}
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "is 家猫 a CAT"}]
    path = write_rows(
        "a.jsonl",
        [
            {"id": "exact", "question": "what is   2+2"} | answers,
            {"id": "run", "question": "Once more. " + LONG.replace("Please", "").upper() + ", or not?"} | answers,
            {"id": "turns", "messages": turns} | answers,
            {"id": "clean", "question": " ".join(LONG.split()[:12])} | answers,
            {"id": "other", "question": "What is 2 + 3?"} | answers,
        ],
    )
    out = tmp_path / "out"
    found = estimated(bare_model, path, out, "--contamination_files", eval_file)["contamination"]
    assert (found["n_records"], found["n_contaminated_records"], found["n_exact"], found["n_ngram"]) == (5, 3, 2, 1)
    assert found["n_eval_questions"] == 3 == found["n_eval_questions_met"]
    rows = [json.loads(line) for line in (out / "contamination.jsonl").read_text().splitlines()]
    assert {row["id"]: row["kind"] for row in rows} == {"exact": "exact", "run": "ngram", "turns": "exact"}
    assert rows[0]["eval"] == [f"{eval_file}:1", f"{eval_file}:4"]
    n_runs = len(question_words(LONG)) - NGRAM + 1
    assert rows[1]["overlap"] == pytest.approx((n_runs - 1) / n_runs, abs=1e-4)
    assert "WARNING: contamination: 3 of 5 training records" in capsys.readouterr().out
    with pytest.raises(ContrastRMError, match="contaminated: 3 of 5"):
        estimated(bare_model, path, out, "--contamination_files", eval_file, "--fail_on_contamination", "1")
    # Training with that flag stops before a weight is read (this folder has none).
    with pytest.raises(ContrastRMError, match="contaminated: 3 of 5"):
        main(
            ["--model_path", str(bare_model), "--train_file", str(path), "--output_dir", str(out), "--cache_dir",
             str(tmp_path / "cache"), "--contamination_files", str(eval_file), "--fail_on_contamination", "1"]
        )  # fmt: skip
    clean = write_rows("clean.jsonl", [{"question": "Why is the sky blue?"} | answers])
    found = estimated(bare_model, clean, out, "--contamination_files", eval_file, "--fail_on_contamination", "1")
    assert found["contamination"]["n_contaminated_records"] == 0 and not (out / "contamination.jsonl").exists()


def test_every_process_stops_on_contamination_and_the_first_one_writes(
    bare_model: Path, write_rows: WriteRows, eval_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first one alone stopped, the others would wait for it until the launcher kills them."""
    path = write_rows("a.jsonl", [{"question": "what is 2+2", "chosen": "a", "rejected": ["b"]}])
    out = tmp_path / "out"
    flags = ["--model_path", bare_model, "--train_file", path, "--output_dir", out, "--cache_dir", tmp_path / "cache"]
    flags += ["--contamination_files", eval_file, "--fail_on_contamination", "1"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank, writes in (("1", False), ("0", True)):
        for name, value in (variables | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ContrastRMError, match="contaminated: 1 of 1"):
            main([str(flag) for flag in flags])
        assert (out / "contamination.jsonl").exists() == writes


def test_files_to_compare_with(write_rows: WriteRows, tmp_path: Path) -> None:
    a, b = write_rows("a.jsonl", [{"question": "q"}]), write_rows("b.jsonl", [{"answer": "q"}])
    assert expand_files(f"{tmp_path}/*.jsonl, {a},{tmp_path}/none*") == [a, b]
    with pytest.raises(ContrastRMError, match="not found"):
        expand_files(f"{tmp_path}/absent.jsonl")
    with pytest.raises(RecordError, match=r"b\.jsonl:1: field 'question'"):
        ContaminationIndex([b])


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(questions=st.lists(WORDS.map(" ".join), min_size=1, max_size=4), training=WORDS.map(" ".join))
def test_what_is_met_is_what_a_search_finds(questions: list[str], training: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "e.jsonl").write_text("".join(json.dumps({"question": text or "?"}) + "\n" for text in questions))
    found = {
        (kind, text): overlap for kind, overlap, text, _ in ContaminationIndex([folder / "e.jsonl"]).meet(training)
    }

    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]

    expected = {}
    for text in set(questions):
        mine = set(runs(training))
        shared = sum(run in mine for run in runs(text))
        if text and text == training:
            expected["exact", text] = 1.0
        elif shared:
            expected["ngram", text] = shared / len(runs(text))
    assert found == pytest.approx(expected)


def test_the_own_training_data_is_clean(bare_model: Path, tmp_path: Path) -> None:
    from codes.train.settings import EVALUATION_FILES

    found = estimated(
        bare_model, "data/train/own_train.jsonl", tmp_path / "out", "--contamination_files", EVALUATION_FILES
    )
    assert found["contamination"]["n_files"] >= 11 and found["contamination"]["n_contaminated_records"] == 0


def test_draws_are_the_same_numbers_the_estimate_gives(
    bare_model: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    from codes.train.data_cache import load_training_groups
    from codes.train.sources import parse_sources

    path = write_rows("a.jsonl", preference_rows)
    result = estimated(bare_model, path, tmp_path / "out", "--max_steps", "5", "--global_batch_size", "4")
    formatter = ChatFormatter(chatml_tokenizer(), max_length=512, overlength="drop")
    cache = load_training_groups(parse_sources(str(path)), formatter, cache_dir=tmp_path / "other")
    draws = Draws(cache, [None], global_batch_size=4, epochs=2, max_steps=5, seed=42)
    assert result["steps"]["n_tokens"] == sum(draws[k].n_tokens for step in draws.plan for k in step)
    assert result["steps"]["total_steps"] == 5
