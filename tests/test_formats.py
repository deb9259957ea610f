"""RewardBench 2, RM-Bench, LLMBar and JudgeBench: small hand-written files in each format, figures worked out by hand."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from codes.common.errors import ContrastRMError
from codes.common.records import file_sha256, iter_rows, write_jsonl
from codes.evaluate import eval_reward_bench
from codes.evaluate.benchmark_figures import (
    JUDGEBENCH_SUBSETS,
    LEVELS,
    LLMBAR_SUBSETS,
    REWARD_BENCH_2_SUBSETS,
    RM_BENCH_SUBSETS,
    SUBSETS,
    TIES_WEIGHTS,
    ItemOutcome,
    ties_parts,
)
from codes.evaluate.benchmarks import (
    BENCHMARKS,
    BenchmarkItem,
    describe_source,
    detect_format,
    label_of,
    read_benchmark,
)
from tests.conftest import REPO_ROOT

NAN = math.nan


def rb2_row(name: str, subset: str, n_chosen: int = 1, n_rejected: int = 3, **more: Any) -> dict[str, Any]:
    """As the dataset card shows it."""
    return {
        "id": name,
        "prompt": f"question {name}",
        "chosen": [f"good {name} {k}" for k in range(n_chosen)],
        "rejected": [f"bad {name} {k}" for k in range(n_rejected)],
        "num_correct": n_chosen,
        "num_incorrect": n_rejected,
        "total_completions": n_chosen + n_rejected,
        "models": ["m"],
        "subset": subset,
        "additional_metadata": {"category": None},
    } | more


RB2_ROWS = [
    rb2_row("f1", "Factuality"),
    rb2_row("p1", "Precise IF"),
    rb2_row("ref:0", "Ties", 1, 2),
    rb2_row("tied:0", "Ties", 3, 2),
]
RM_ROWS = [
    {
        "id": number,
        "prompt": f"prompt {domain}",
        "chosen": [f"right {style} {domain}" for style in "abc"],
        "rejected": [f"wrong {style} {domain} at length" for style in "abc"],
        "domain": domain,
    }
    for number, domain in enumerate(RM_BENCH_SUBSETS)
]
LLMBAR_ROWS = [
    {"input": "Name a colour.", "output_1": "Red.", "output_2": "A dog.", "label": 1},
    {"input": "Name an animal.", "output_1": "Blue.", "output_2": "A fox.", "label": 2},
]
JUDGEBENCH_ROWS = [
    {
        "pair_id": f"pair-{number}",
        "original_id": str(number),
        "source": source,
        "question": f"What is {number} + {number}?",
        "response_model": "m",
        "response_A": f"It is {2 * number}.",
        "response_B": "It is unknown to me, sorry.",
        "label": "A>B" if number % 2 else "B>A",
    }
    for number, source in enumerate(
        ["mmlu-pro-computer science", "livebench-reasoning", "livebench-math", "livecodebench"]
    )
]
ROWS = {"reward_bench_2": RB2_ROWS, "rm_bench": RM_ROWS, "llmbar": LLMBAR_ROWS, "judgebench": JUDGEBENCH_ROWS}


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def array(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


# --- reading ---


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("write", [jsonl, array, parquet])
def test_each_format_is_known_by_its_keys_and_read_whole(
    name: str, write: Callable[[Path, Sequence[Any]], Path], tmp_path: Path
) -> None:
    suffix = {jsonl: "jsonl", array: "json", parquet: "parquet"}[write]
    path = write(tmp_path / f"rows.{suffix}", ROWS[name])
    assert detect_format(path) == name
    items, [report] = read_benchmark(path, name)
    assert (report.n_rows, report.n_good, report.bad) == (len(ROWS[name]), len(ROWS[name]), [])
    assert len(items) == len(ROWS[name])


def test_reward_bench_rows_are_known_too(tmp_path: Path) -> None:
    assert detect_format(REPO_ROOT / "data/eval/reward_bench/own_sample.jsonl") == "reward_bench"
    path = jsonl(tmp_path / "f.jsonl", [{"anything": 1}, ["no", "object"]])
    with pytest.raises(ContrastRMError, match=r"cannot tell the format .* the first row has anything.*--format"):
        detect_format(path)
    path.write_text("nothing\n")
    with pytest.raises(ContrastRMError, match="no row is a JSON object"):
        detect_format(path)


def test_what_an_item_holds(tmp_path: Path) -> None:
    items, _ = read_benchmark(jsonl(tmp_path / "Manual" / "dataset.json", LLMBAR_ROWS), "llmbar")
    assert [(item.chosen, item.rejected, item.chosen_first) for item in items] == [
        (("Red.",), ("A dog.",), True),
        (("A fox.",), ("Blue.",), False),
    ]
    assert {item.subset for item in items} == {"Manual"}
    items, _ = read_benchmark(jsonl(tmp_path / "jb.jsonl", JUDGEBENCH_ROWS), "judgebench")
    assert [item.subset for item in items] == ["Knowledge", "Reasoning", "Math", "Coding"]
    assert items[0].chosen == ("It is unknown to me, sorry.",)
    assert items[1].chosen == ("It is 2.",) and items[1].chosen_first
    items, _ = read_benchmark(jsonl(tmp_path / "rb2.jsonl", RB2_ROWS), "reward_bench_2")
    assert [(len(item.chosen), len(item.rejected)) for item in items] == [(1, 3), (1, 3), (1, 2), (3, 2)]


def test_llmbar_is_read_folder_by_folder(tmp_path: Path) -> None:
    for name in LLMBAR_SUBSETS:
        array(tmp_path / ("Natural" if name == "Natural" else f"Adversarial/{name}") / "dataset.json", LLMBAR_ROWS)
    (tmp_path / "Adversarial" / "Empty").mkdir()
    assert detect_format(tmp_path) == "llmbar"
    items, reports = read_benchmark(tmp_path, "llmbar")
    assert len(items) == 10 and len(reports) == 5
    assert {item.subset for item in items} == set(LLMBAR_SUBSETS)
    with pytest.raises(ContrastRMError, match=r"no dataset\.json below"):
        detect_format(tmp_path / "Adversarial" / "Empty")


def test_the_domain_may_stand_in_the_file_name(tmp_path: Path) -> None:
    rows = [{key: value for key, value in RM_ROWS[0].items() if key != "domain"}]
    path = array(tmp_path / "safety-refuse_filtered.json", rows)
    assert detect_format(path) == "rm_bench"
    assert read_benchmark(path, "rm_bench")[0][0].subset == "safety-refuse"
    with pytest.raises(ContrastRMError, match=r"rows\.json:2: field 'domain': found 'nothing'"):
        read_benchmark(array(tmp_path / "rows.json", rows), "rm_bench")


def test_the_files_of_single_rm_bench_domains_are_read_together(tmp_path: Path) -> None:
    """As they are published: a file a domain, whose rows have a ``subset`` of their own."""
    for row in RM_ROWS:
        own = {key: value for key, value in row.items() if key != "domain"} | {"subset": "hep-python"}
        array(tmp_path / f"{row['domain']}_filtered.json", [own])
    array(tmp_path / "total_dataset.json", RM_ROWS)  # the same rows once more
    assert detect_format(tmp_path / "code_filtered.json") == detect_format(tmp_path) == "rm_bench"
    items, reports = read_benchmark(tmp_path, "rm_bench")
    assert sorted(item.subset for item in items) == sorted(RM_BENCH_SUBSETS) and len(reports) == 5
    arguments = [
        "--model_path",
        "baseline:shorter",
        "--data_file",
        str(tmp_path),
        "--results_dir",
        str(tmp_path / "out"),
    ]
    assert eval_reward_bench.main(arguments) == 0
    summary = json.loads((tmp_path / "out/baseline-shorter/rm_bench_summary.json").read_text(encoding="utf-8"))
    assert summary["n_rows"] == 5


@pytest.mark.parametrize("value", [5, None, "text", {"a": 1}, [], [5]])
def test_any_value_can_stand_where_the_answers_should(value: Any, tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "p", "subset": "Math", "chosen": value, "rejected": value}, RB2_ROWS[0]]
    )
    assert detect_format(path) in ("reward_bench_2", "reward_bench")


BAD_ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("reward_bench_2", rb2_row("a", "Math", num_correct=2), "num_correct", "1, the number of answers"),
    ("reward_bench_2", rb2_row("a", "Math", total_completions=5), "total_completions", "4, the number"),
    ("reward_bench_2", rb2_row("a", "Math", 2), "chosen", "one answer"),
    ("reward_bench_2", rb2_row("a", "Math", rejected=[]), "rejected", "a non-empty list"),
    ("reward_bench_2", rb2_row("a", "Math", rejected=["b", 3]), "rejected[1]", "a text"),
    ("reward_bench_2", rb2_row("a", "Ties"), "id", "ref:NUMBER or tied:NUMBER"),
    ("reward_bench_2", rb2_row("tied:1", "Ties"), "chosen", "several for a tied one"),
    ("reward_bench_2", rb2_row("ref:1", "Ties", 2), "chosen", "one answer for a ref prompt"),
    ("reward_bench_2", rb2_row("ref:²", "Ties"), "id", "ref:NUMBER"),
    ("rm_bench", RM_ROWS[0] | {"chosen": ["a", "b"]}, "chosen", "one a style: concise"),
    ("rm_bench", RM_ROWS[0] | {"prompt": ""}, "prompt", "a non-empty text"),
    ("llmbar", LLMBAR_ROWS[0] | {"label": 0}, "label", "1 or 2"),
    ("llmbar", LLMBAR_ROWS[0] | {"label": True}, "label", "1 or 2"),
    ("llmbar", LLMBAR_ROWS[0] | {"output_2": None}, "output_2", "a text"),
    ("judgebench", JUDGEBENCH_ROWS[0] | {"label": "A=B"}, "label", "A>B or B>A"),
    ("judgebench", JUDGEBENCH_ROWS[0] | {"source": "elsewhere"}, "source", "begins with mmlu-pro"),
    ("judgebench", JUDGEBENCH_ROWS[0] | {"response_A": "\ud800"}, "response_A", "without lone surrogates"),
    ("judgebench", JUDGEBENCH_ROWS[1], "id", "an id of its own"),
]


@pytest.mark.parametrize(("name", "row", "field", "allowed"), BAD_ROWS)
def test_a_bad_row_is_named_and_counted(
    name: str, row: dict[str, Any], field: str, allowed: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*ROWS[name], row])
    place = f"{path}:{len(ROWS[name]) + 1}: field {field!r}"
    with pytest.raises(ContrastRMError) as caught:
        read_benchmark(path, name)
    assert str(caught.value).startswith(place) and allowed in str(caught.value)
    items, [report] = read_benchmark(path, name, max_bad_rows=1)
    assert (len(items), report.n_rows, len(report.bad)) == (len(ROWS[name]), len(ROWS[name]) + 1, 1)


def test_an_unknown_subset_is_no_bad_row_but_an_error(tmp_path: Path) -> None:
    for name, row in (
        ("reward_bench_2", rb2_row("a", "Cooking")),
        ("rm_bench", RM_ROWS[0] | {"domain": "cooking"}),
    ):
        with pytest.raises(
            ContrastRMError, match=r":1: field '(subset|domain)': unknown subset '(C|c)ooking'; known: "
        ):
            read_benchmark(jsonl(tmp_path / "rows.jsonl", [row]), name, max_bad_rows=9)


def test_rows_of_an_array_have_the_lines_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\ufeff[\n  {"a": 1},\n\n {"b":\n "x\\ny"}, 7\n,{"c": NaN}]\n', encoding="utf-8")
    found = list(iter_rows(path))
    assert [line for line, _ in found] == [2, 4, 5, 6]
    assert found[0][1] == {"a": 1} and found[1][1] == {"b": "x\ny"}
    assert "a JSON object" in str(found[2][1]) and "NaN is not JSON" in str(found[3][1])


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n{"b": ', 2, ""),
        ('[{"a": 1}\n{"b": 2}]', 1, "a comma or the closing bracket"),
        ('[{"a": 1},\n]', 2, ""),
        ('[{"a": 1}] more', 1, "text after the array"),
        ("[", 1, ""),
    ],
)
def test_a_broken_array_is_refused_as_a_whole(text: str, line: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ContrastRMError) as caught:
        list(iter_rows(path))
    assert str(caught.value).startswith(f"{path}:{line}: the JSON array cannot be read from") and reason in str(
        caught.value
    )


def test_a_file_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ContrastRMError, match=r"cannot read .*rows\.parquet as Parquet"):
        list(iter_rows(path))


# --- figures ---


def outcome(
    subset: str, chosen: Sequence[float], rejected: Sequence[float], name: str = "", question: str | None = None
) -> ItemOutcome:
    name = name or f"{subset}-{chosen}-{rejected}"
    item = BenchmarkItem(
        file="f",
        line=1,
        id=name,
        messages=({"role": "user", "content": name if question is None else question},),
        chosen=("a",) * len(chosen),
        rejected=("b",) * len(rejected),
        subset=subset,
    )
    return ItemOutcome(item, tuple(chosen), tuple(rejected))


def test_best_of_four_by_hand() -> None:
    rows = [
        outcome("Math", [3], [0, 1, 2]),  # right
        outcome("Math", [3], [3, 1, 3]),  # shares the top with two: a tie, a third of the credit
        outcome("Math", [3], [0, 4, 2]),  # wrong
        outcome("Math", [NAN], [0, 4, 2]),  # dropped
        outcome("Focus", [1], [0, 0, 0]),
    ]
    summary = BENCHMARKS["reward_bench_2"].summarise(rows)
    math_fields = summary["subsets"]["Math"]
    assert (math_fields["accuracy_count"], math_fields["accuracy_total"], math_fields["n_ties"]) == (1, 3, 1)
    assert math_fields["score"] == pytest.approx((1 + 1 / 3) / 3)
    assert math_fields["n_excluded"] == summary["n_excluded"] == 1
    assert (summary["best_of_n_accuracy_count"], summary["best_of_n_accuracy_total"]) == (2, 4)
    assert summary["best_of_n_credit"] == pytest.approx((2 + 1 / 3) / 4)
    assert summary["reward_bench_2_score"] is None and not summary["complete"]
    assert summary["missing_subsets"] == ["Factuality", "Precise IF", "Safety", "Ties"]
    assert summary["short_subsets"] == ["Math", "Focus"]
    low, high = math_fields["score_ci"]
    assert 0 <= low < math_fields["score"] < high <= 1
    assert summary["subsets"]["Focus"]["score_ci"] is None  # one question says nothing about chance
    assert summary["ties"] is None


def test_a_question_in_another_layout_is_the_same_question() -> None:
    """As in the bias figures: layout, case and punctuation make no independent question."""
    once = BENCHMARKS["judgebench"].summarise([outcome("Math", [k % 2], [0.5], "n", f"Add {k}") for k in range(6)])
    rows = [outcome("Math", [k % 2], [0.5], "n", text) for k in range(6) for text in (f"Add {k}", f" add  {k}.")]
    copied = BENCHMARKS["judgebench"].summarise(rows)
    assert copied["accuracy_ci"] == pytest.approx(once["accuracy_ci"])
    assert copied["accuracy_wilson_ci"] is None and once["accuracy_wilson_ci"] is not None


def test_ties_score_by_hand() -> None:
    # Spread of the correct answers 2; gap of the tied prompt 3, of its reference 1.
    rows = [outcome("Ties", [5, 7], [2, 0], "tied:0"), outcome("Ties", [3], [2, 1], "ref:0")]
    fields = BENCHMARKS["reward_bench_2"].summarise(rows)["ties"]
    assert (fields["tied_accuracy"], fields["ref_accuracy"]) == (1, 1)
    assert (fields["correctness_preferred"], fields["correctness_preferred_hard"]) == (1, 0)
    assert fields["correctness_margin"] == pytest.approx(math.tanh(1 / 2 - 1))
    assert fields["score"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * math.tanh(-0.5))
    # A gap equal to the spread is no preference: 5 - 3 = 7 - 5.
    equal = [outcome("Ties", [5, 7], [3, 0], "tied:0"), outcome("Ties", [4], [2, 1], "ref:0")]
    fields = BENCHMARKS["reward_bench_2"].summarise(equal)["ties"]
    assert (fields["correctness_preferred"], fields["correctness_preferred_hard"]) == (0, 0)
    # A tied prompt without its reference counts for accuracy alone.
    rows.append(outcome("Ties", [1, 3], [2], "tied:1"))
    fields = BENCHMARKS["reward_bench_2"].summarise(rows)["ties"]
    assert (fields["tied_accuracy"], fields["tied_accuracy_total"]) == (0.5, 2)
    assert fields["correctness_preferred_total"] == 1
    assert fields["score"] == pytest.approx(0.15 + 0.3 + 0.2 + 0.01 * math.tanh(-0.5))
    # Without any pair of prompts there is no score.
    fields = BENCHMARKS["reward_bench_2"].summarise(rows[:1])["ties"]
    assert fields["score"] is None and fields["ref_accuracy"] is None and fields["tied_accuracy"] == 1


@pytest.mark.parametrize(("gap", "margin"), [(1.0, 1.0), (0.0, 0.0), (-1.0, -1.0)])
def test_correct_answers_that_tie_exactly(gap: float, margin: float) -> None:
    rows = [outcome("Ties", [2, 2], [2 - gap], "tied:0"), outcome("Ties", [5], [1], "ref:0")]
    fields = BENCHMARKS["reward_bench_2"].summarise(rows)["ties"]
    assert fields["correctness_margin"] == margin
    assert fields["correctness_preferred"] == float(gap > 0)


def published_ties_score(rows: Sequence[ItemOutcome]) -> float:
    """The published formula in numpy, over whole arrays."""
    prompts = {row.item.id: row for row in rows}
    numbers = sorted({name.partition(":")[2] for name in prompts})
    ref = [prompts[f"ref:{number}"] for number in numbers]
    tied = [prompts[f"tied:{number}"] for number in numbers]

    def gaps(some: Sequence[ItemOutcome]) -> np.ndarray:
        return np.array([np.min(row.chosen_scores) - np.max(row.rejected_scores) for row in some])

    spread = np.array([np.ptp(row.chosen_scores) for row in tied])
    smaller = np.minimum(gaps(ref), gaps(tied))
    return float(
        0.3 * (gaps(tied) > 0).mean()
        + 0.3 * (gaps(ref) > 0).mean()
        + 0.2 * (gaps(tied) > spread).mean()
        + 0.2 * (smaller > spread).mean()
        + 0.01 * np.tanh(smaller / spread - 1).mean()
    )


def random_ties(n: int, seed: int) -> list[ItemOutcome]:
    draw = random.Random(seed)

    def scores(k: int, mean: float) -> list[float]:
        return [draw.gauss(mean, 1) for _ in range(k)]

    return [
        row
        for number in range(n)
        for row in (
            outcome("Ties", scores(1, 1.5), scores(4, 0), f"ref:{number}"),
            outcome("Ties", scores(draw.randint(2, 6), 2), scores(5, 0), f"tied:{number}"),
        )
    ]


def test_ties_score_is_the_published_formula() -> None:
    for seed in range(20):
        rows = random_ties(30, seed)
        assert ties_parts(rows).score() == pytest.approx(published_ties_score(rows))
    assert sum(TIES_WEIGHTS.values()) == pytest.approx(1.01)


def test_bootstrap_interval_of_a_mean_is_the_textbook_one() -> None:
    draw = random.Random(3)
    rows = [outcome("Focus", [draw.random() > 0.4], [0.5, 0, 0], f"row {number}") for number in range(400)]
    fields = BENCHMARKS["reward_bench_2"].summarise(rows)["subsets"]["Focus"]
    low, high = fields["score_ci"]
    half = 1.96 * math.sqrt(fields["score"] * (1 - fields["score"]) / 400)
    assert low == pytest.approx(fields["score"] - half, abs=0.01)
    assert high == pytest.approx(fields["score"] + half, abs=0.01)
    # The same question in every row: four hundred rows are one draw.
    same = [outcome("Focus", row.chosen_scores, row.rejected_scores, "x", question="q") for row in rows]
    assert BENCHMARKS["reward_bench_2"].summarise(same)["subsets"]["Focus"]["score_ci"] is None


def complete_rb2(draw: random.Random) -> list[ItemOutcome]:
    rows = random_ties(51, 1)
    for subset, n_rows in REWARD_BENCH_2_SUBSETS.items():
        if subset != "Ties":
            rows += [
                outcome(subset, [draw.gauss(1, 1)], [draw.gauss(0, 1) for _ in range(3)], f"{subset} {number}")
                for number in range(n_rows)
            ]
    return rows


def test_complete_reward_bench_2_is_the_mean_of_six() -> None:
    summary = BENCHMARKS["reward_bench_2"].summarise(complete_rb2(random.Random(0)))
    assert summary["complete"] and summary["n_rows"] == sum(REWARD_BENCH_2_SUBSETS.values()) == 1865
    scores = [fields["score"] for fields in summary["subsets"].values()]
    assert summary["reward_bench_2_score"] == pytest.approx(sum(scores) / 6)
    low, high = summary["reward_bench_2_score_ci"]
    assert low < summary["reward_bench_2_score"] < high and high - low < 0.08


def published_rm_bench(results: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """The published matrix arithmetic in numpy."""
    wins = np.mean([np.greater.outer(np.array(chosen), np.array(rejected)) for chosen, rejected in results], axis=0)
    return {
        "hard": float(np.triu(wins, 1).sum() / 3),
        "normal": float(np.diag(wins).mean()),
        "easy": float(np.tril(wins, -1).sum() / 3),
    }


def test_rm_bench_is_the_published_arithmetic() -> None:
    draw = random.Random(5)
    rows = [
        outcome(subset, [draw.gauss(0.5, 1) for _ in "abc"], [draw.gauss(0, 1) for _ in "abc"], f"{subset} {number}")
        for subset, n_rows in RM_BENCH_SUBSETS.items()
        for number in range(n_rows)
    ]
    summary = BENCHMARKS["rm_bench"].summarise(rows)
    assert summary["complete"] and summary["n_rows"] == 1327
    expected = {
        domain: published_rm_bench(
            [(row.chosen_scores, row.rejected_scores) for row in rows if row.item.subset.startswith(domain)]
        )
        for domain in ("chat", "math", "code", "safety")
    }
    for level in LEVELS:
        means = [expected[domain][level] for domain in expected]
        assert summary[f"{level}_accuracy"] == pytest.approx(np.mean(means))
        low, high = summary[f"{level}_accuracy_ci"]
        assert low < summary[f"{level}_accuracy"] < high
        for domain, values in expected.items():
            assert summary["domains"][domain][f"{level}_accuracy"] == pytest.approx(values[level])
    total = np.mean([list(values.values()) for values in expected.values()])
    assert summary["rm_bench_score"] == pytest.approx(total)
    assert sum(cell["accuracy_count"] for cell in summary["matrix"]) == sum(
        summary[f"pooled_{level}_accuracy_count"] for level in LEVELS
    )


def test_rm_bench_by_hand() -> None:
    # The fancier style gains 10: easy all right, hard all wrong; within a style the right answer wins, but one ties.
    row = outcome("chat", [1, 11, 20], [0, 10, 20])
    summary = BENCHMARKS["rm_bench"].summarise([row])
    counts = {level: summary[f"pooled_{level}_accuracy_count"] for level in LEVELS}
    assert counts == {"easy": 3, "normal": 2, "hard": 0}
    assert summary["matrix"][8]["n_ties"] == 1 and summary["matrix"][8]["chosen_style"] == "detailed_markdown"
    assert summary["rm_bench_score"] is None and summary["domains"]["chat"]["accuracy"] == pytest.approx(5 / 9)
    assert summary["domains"]["math"]["easy_accuracy"] is None
    assert summary["subsets"]["chat"]["accuracy"] == 0  # not all nine comparisons are right


def test_llmbar_and_judgebench_by_hand() -> None:
    rows = [
        outcome(subset, [1 if number % 2 else 0], [0.5], f"{subset} {number}")
        for subset, n_rows in LLMBAR_SUBSETS.items()
        for number in range(n_rows)
    ]
    summary = BENCHMARKS["llmbar"].summarise(rows)
    assert summary["complete"] and summary["accuracy_total"] == 419
    assert summary["natural_accuracy"] == 0.5
    parts = [summary["subsets"][name]["accuracy"] for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")]
    assert summary["adversarial_accuracy"] == pytest.approx(np.mean(parts))
    assert BENCHMARKS["llmbar"].summarise(rows[:100])["adversarial_accuracy"] is None
    # A set of another name is shown, and keeps the whole from being complete.
    extra = BENCHMARKS["llmbar"].summarise([*rows, outcome("Base-9", [1], [0])])
    assert not extra["complete"] and extra["subsets"]["Base-9"]["state"] == "unofficial"
    rows = [outcome(name, [1], [1], f"{name} {k}") for name, n in JUDGEBENCH_SUBSETS.items() for k in range(n)]
    summary = BENCHMARKS["judgebench"].summarise(rows)
    assert summary["complete"] and (summary["accuracy_count"], summary["accuracy_total"]) == (0, 350)
    assert summary["n_ties"] == 350
    # The other published split: only its total is known, and a part of the first one with as many rows is not it.
    claude = [replace(row, item=replace(row.item, origin="claude")) for row in rows[:270]]
    whole, short = BENCHMARKS["judgebench"].summarise(claude), BENCHMARKS["judgebench"].summarise(claude[:269])
    assert whole["complete"] and whole["subsets"]["Knowledge"]["state"] == "complete"
    assert not short["complete"] and not BENCHMARKS["judgebench"].summarise(rows[:270])["complete"]


# --- the command ---


@pytest.mark.parametrize("name", ROWS)
def test_a_model_is_evaluated_on_every_format(
    name: str, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*ROWS[name], {"broken": True}])
    arguments = ["--model_path", str(tiny_llama_dir), "--data_file", str(path), "--results_dir", str(tmp_path / "r")]
    assert eval_reward_bench.main([*arguments, "--max_bad_rows", "1"]) == 0
    folder = tmp_path / "r" / tiny_llama_dir.name
    summary = json.loads((folder / f"{name}_summary.json").read_text())
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert summary["format"] == summary["metadata"]["format"] == name
    assert summary["label"] == (
        f"not {BENCHMARKS[name].title}: a file of unrecorded origin, without the official number of rows"
    )
    [file] = summary["metadata"]["data_files"]
    assert (file["n_rows"], file["n_bad_rows"]) == (len(ROWS[name]) + 1, 1)
    assert len(rows) == summary["n_rows"] == len(ROWS[name])
    # Every count can be made again from the rows.
    for row in rows:
        lowest, highest = min(row["scores_chosen"]), max(row["scores_rejected"])
        assert row["verdict"] == ("correct" if lowest > highest else "wrong" if lowest < highest else "tie")
        assert row["label"] == summary["label"]
    for subset, fields in summary["subsets"].items():
        verdicts = [row["verdict"] for row in rows if row["subset"] == subset]
        assert (fields["accuracy_count"], fields["accuracy_total"]) == (verdicts.count("correct"), len(verdicts))
    printed = capsys.readouterr().out
    assert summary["label"] in printed and summary["headline"] in printed


def test_category_and_limit_choose_items(tmp_path: Path) -> None:
    rows = [rb2_row(f"f{number}", "Factuality") for number in range(9)] + [rb2_row("m", "Math")]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    read = read_benchmark
    assert len(read(path, "reward_bench_2", limit=4)[0]) == 5
    assert {item.subset for item in read(path, "reward_bench_2", category="Math")[0]} == {"Math"}
    limited = read(path, "reward_bench_2", limit=4)[0]
    assert [item.line for item in limited] == sorted(item.line for item in limited)
    with pytest.raises(ContrastRMError, match=r"no row of category 'Chat'; it has Factuality, Math"):
        read(path, "reward_bench_2", category="Chat")


def test_only_the_complete_published_set_bears_the_name() -> None:
    for name, some in BENCHMARKS.items():
        source = {"dataset": some.dataset_id, "revision": "abc"}
        label = label_of(name, source, True)
        assert label == some.title
        assert label_of(name, source, False).startswith(f"not {some.title}: ")
        unchecked = source | {"revision_is": "as given, not checked"}
        assert "nobody checked" in label_of(name, unchecked, True)
        elsewhere = {"dataset": "another/set", "revision": None}
        assert "unrecorded" in label_of(name, elsewhere, True)


# --- the loader, on local files in the hub's schema ---


def load(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "data/eval/reward_bench/load_reward_bench.py", *map(str, arguments)],
        cwd=REPO_ROOT,
        env={"PATH": "", "PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_hub_file_becomes_jsonl_with_its_origin(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"p {subset.name} {number}",
            "chosen": "good",
            "chosen_model": "m",
            "rejected": "bad",
            "rejected_model": "n",
            "subset": subset.name,
            "id": number,
        }
        for subset in SUBSETS
        for number in range(subset.n_rows)
    ]
    files = [parquet(tmp_path / "filtered-00000-of-00002.parquet", rows[:2000])]
    files.append(parquet(tmp_path / "filtered-00001-of-00002.parquet", rows[2000:]))
    output = tmp_path / "out" / "reward_bench.jsonl"
    done = load("--local_files", *files, "--output_file", output, "--revision", "abc123")
    assert done.returncode == 0, done.stderr
    note = json.loads(Path(f"{output}.source.json").read_text())
    assert note["n_rows"] == 2985 and note["sha256"] == file_sha256(output)
    assert (note["dataset"], note["revision"]) == ("allenai/reward-bench", "abc123")
    assert [file["sha256"] for file in note["local_files"]] == [file_sha256(file) for file in files]
    items, _ = read_benchmark(output, "reward_bench")
    source = describe_source(output, items)
    label = label_of("reward_bench", source, True)
    assert label == "RewardBench, from local files whose revision nobody checked"
    # One row less is another set, and nothing is written.
    parquet(files[1], rows[2001:])
    output.unlink()
    done = load("--local_files", *files, "--output_file", output)
    assert done.returncode == 2 and "other row counts than published: " in done.stderr
    assert not output.exists() and "Traceback" not in done.stderr


def test_the_loader_checks_what_the_evaluation_will_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "claude.jsonl", JUDGEBENCH_ROWS)
    output = tmp_path / "judgebench.jsonl"
    arguments = ["--dataset", "judgebench", "--local_files", path, "--output_file", output]
    claude = [{**JUDGEBENCH_ROWS[k % 4], "pair_id": f"p{k}", "response_model": "claude-3-5"} for k in range(270)]
    done = load(*arguments[:3], jsonl(tmp_path / "whole.jsonl", claude), *arguments[4:], "--split", "claude")
    assert done.returncode == 0, done.stderr
    assert [row for _, row in iter_rows(output)] == claude
    assert detect_format(output) == "judgebench"
    output.unlink()
    for rows, message in (
        (JUDGEBENCH_ROWS, "Knowledge: 1, not 154"),
        ([JUDGEBENCH_ROWS[0] | {"label": None}], "row 1 of ScalerLab/JudgeBench lacks label"),
        ([JUDGEBENCH_ROWS[0] | {"label": "C"}], "field 'label': found 'C'"),
        (["text"], "a JSON object"),
        (claude[:269], "claude: 269, not 270"),
    ):
        jsonl(path, rows)
        done = load(*arguments, *(["--split", "claude"] if len(rows) == 269 else []))
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not output.exists() and "Traceback" not in done.stderr


def test_a_damaged_note_is_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", RB2_ROWS)
    assert describe_source(path, read_benchmark(path, "reward_bench_2")[0]) == {"dataset": None, "revision": None}
    note = {"dataset": "allenai/reward-bench-2", "revision": "r", "sha256": file_sha256(path)}
    Path(f"{path}.source.json").write_text(json.dumps(note))
    assert describe_source(path, read_benchmark(path, "reward_bench_2")[0]) == {
        "dataset": "allenai/reward-bench-2",
        "revision": "r",
    }
    write_jsonl(path, RB2_ROWS[:1])  # another file under the same name: the note is not about it
    assert describe_source(path, read_benchmark(path, "reward_bench_2")[0])["dataset"] is None
    Path(f"{path}.source.json").write_text("{")
    with pytest.raises(ContrastRMError, match="load the data again or delete it"):
        describe_source(path, read_benchmark(path, "reward_bench_2")[0])
