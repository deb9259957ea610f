"""Comparisons: every statistic against a direct call of scipy or statsmodels on a case made by hand, then whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from codes.common.errors import ContrastRMError
from codes.evaluate import compare_models, eval_reward_bench, eval_rm
from codes.evaluate.benchmark_figures import LEVELS
from codes.evaluate.compare_stats import PairedPart, adjust, compare_parts, minimum_detectable_effect

REPO = Path(__file__).resolve().parents[1]


def part(
    hits: Sequence[Sequence[int]],
    counted: Sequence[Sequence[int]] | None = None,
    clusters: Sequence[str] | None = None,
    weight: float = 1.0,
) -> PairedPart:
    n = len(hits[0])
    inside = np.ones((2, n), dtype=bool) if counted is None else np.array(counted, dtype=bool)
    names = [f"q{row}" for row in range(n)] if clusters is None else list(clusters)
    return PairedPart(np.array(hits, dtype=bool), inside, names, weight)


def two_models(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    counted = draw.random((2, n)) < 0.7
    return (draw.random((2, n)) < np.array([[0.4], [0.2]])) & counted, counted


# --- one comparison ---


def test_mcnemar_equals_statsmodels() -> None:
    a = [1] * 20 + [1] * 14 + [0] * 5 + [0] * 11
    b = [1] * 20 + [0] * 14 + [1] * 5 + [0] * 11
    found = compare_parts([part([a, b])], n_resamples=500, seed=1)
    assert found.p == pytest.approx(mcnemar([[20, 14], [5, 11]], exact=True).pvalue)
    assert (found.test, found.only_a, found.only_b) == ("McNemar, exact", 14, 5)
    assert (found.a, found.b, found.difference) == pytest.approx((34 / 50, 25 / 50, 9 / 50))
    assert (found.n_rows, found.n_questions) == (50, 50)


def test_mcnemar_by_question_takes_copies_as_one() -> None:
    a, b = [1] * 6 + [0] * 2, [0] * 6 + [1] * 2
    names = [f"q{row}" for row in range(8)]
    once = compare_parts([part([a, b], clusters=names)], n_resamples=500, seed=1)
    copied = compare_parts([part([a * 3, b * 3], clusters=names * 3)], n_resamples=500, seed=1)
    assert copied.p == pytest.approx(once.p) == pytest.approx(mcnemar([[0, 6], [2, 0]], exact=True).pvalue)
    assert (copied.test, copied.n_questions, copied.n_rows) == ("McNemar, exact by question", 8, 24)
    assert copied.ci == pytest.approx(once.ci)
    assert copied.minimum_detectable_effect == pytest.approx(once.minimum_detectable_effect)


def test_bootstrap_agrees_with_the_linearised_error_of_the_ratios() -> None:
    hits, counted = two_models(400)
    found = compare_parts([part(hits, counted)], n_resamples=1999, seed=5)
    rates = hits.sum(axis=1) / counted.sum(axis=1)
    shares = (hits - rates[:, None] * counted) / counted.sum(axis=1)[:, None]
    error = float(((shares[0] - shares[1]) ** 2).sum() ** 0.5)
    assert found.difference == pytest.approx(rates[0] - rates[1])
    assert found.standard_error == pytest.approx(error, rel=0.06)
    assert found.ci == pytest.approx(
        [found.difference - 1.96 * error, found.difference + 1.96 * error], abs=0.25 * error
    )
    effect = TTestPower().solve_power(nobs=found.n_questions, alpha=0.05, power=0.8)
    assert found.minimum_detectable_effect == pytest.approx(
        effect * found.standard_error * found.n_questions**0.5, rel=0.01
    )


def test_swap_test_is_the_enumeration_of_all_swaps() -> None:
    """Eight questions: all 256 swaps are gone through, so the p is exact."""
    hits = np.array([[1, 1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 0, 0]], dtype=bool)
    counted = np.array([[1, 1, 1, 1, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1]], dtype=bool)
    found = compare_parts([part(hits, counted)], n_resamples=2000, seed=0)
    values = []
    for number in range(2**8):
        swap = np.array([number >> bit & 1 for bit in range(8)], dtype=bool)
        first = np.where(swap, hits[::-1], hits), np.where(swap, counted[::-1], counted)
        rates = first[0].sum(axis=1) / first[1].sum(axis=1)
        # Each question's share in the difference, from which its linearised variance comes.
        shares = [(first[0][i] - rates[i] * first[1][i]) / first[1][i].sum() for i in (0, 1)]
        values.append((rates[0] - rates[1]) / max(((shares[0] - shares[1]) ** 2).sum(), 1e-12) ** 0.5)
    observed = values[0]
    above = np.mean(np.array(values) >= observed - 1e-9)
    below = np.mean(np.array(values) <= observed + 1e-9)
    assert found.test == "swaps by question, studentised"
    assert found.p == pytest.approx(min(1.0, 2 * min(above, below)))


def test_swaps_keep_a_question_together() -> None:
    hits, counted = two_models(40, seed=3)
    once = compare_parts([part(hits, counted)], n_resamples=999, seed=0)
    names = [f"q{row}" for row in range(40)]
    copied = compare_parts([part(np.tile(hits, 3), np.tile(counted, 3), names * 3)], n_resamples=999, seed=0)
    believed = compare_parts([part(np.tile(hits, 3), np.tile(counted, 3))], n_resamples=999, seed=0)
    assert copied.p == once.p
    assert copied.ci == pytest.approx(once.ci)
    assert believed.p is not None and once.p is not None and believed.p < once.p


def test_weighted_parts_and_a_subtracted_one() -> None:
    hits, counted = two_models(80, seed=4)
    halves = [part(hits[:, k::2], counted[:, k::2], [f"q{i}" for i in range(40)], w) for k, w in ((0, 0.25), (1, 0.75))]
    found = compare_parts(halves, n_resamples=500, seed=0)
    rates = [half.hits.sum(axis=1) / half.counted.sum(axis=1) for half in halves]
    assert (found.a, found.b) == pytest.approx(tuple(0.25 * rates[0] + 0.75 * rates[1]))
    assert found.n_questions == 40
    negative = part(hits[:, ::2], counted[:, ::2], [f"q{i}" for i in range(40)], -0.25)
    minus = compare_parts([halves[0], negative], n_resamples=500, seed=0)
    assert (minus.a, minus.b, minus.difference) == pytest.approx((0, 0, 0))


def test_what_the_data_do_not_determine_is_null() -> None:
    nothing = compare_parts([part([[0, 0], [1, 0]], [[0, 0], [1, 1]])], n_resamples=500, seed=0)
    assert (nothing.a, nothing.b, nothing.difference, nothing.p, nothing.ci) == (None, 0.5, None, None, None)
    same = compare_parts([part([[1, 0, 1], [1, 0, 1]])], n_resamples=500, seed=0)
    assert (same.difference, same.p, same.ci, same.minimum_detectable_effect) == (0, None, None, None)
    one = compare_parts([part([[1], [0]])], n_resamples=500, seed=0)
    assert (one.difference, one.ci, one.minimum_detectable_effect) == (1, None, None)
    assert minimum_detectable_effect(None, 10) is minimum_detectable_effect(0.0, 10) is None


def test_detectable_effect_is_found_with_the_claimed_power() -> None:
    """Of 400 data sets with a true difference of one detectable effect, about 80 % bring p < 0.05."""
    n, share = 400, 0.2
    draw = np.random.default_rng(2)
    error = (share / n) ** 0.5  # of a mean of -1, 0, +1 with that share of discordant rows
    effect = minimum_detectable_effect(error, n)
    assert effect is not None and effect == pytest.approx(2.8 * error, rel=0.01)
    found = 0
    for _ in range(400):
        moves = draw.choice([1, -1, 0], size=n, p=[(share + effect) / 2, (share - effect) / 2, 1 - share])
        found += bool(scipy_stats.ttest_1samp(moves, 0).pvalue < 0.05)
    assert 0.75 <= found / 400 <= 0.86


def test_corrections_equal_statsmodels_and_skip_what_is_no_test() -> None:
    p_values = [0.001, None, 0.04, 0.03, 0.2, None]
    found = adjust(p_values)
    known = [p for p in p_values if p is not None]
    assert [f["p_holm"] for f in found if f["p_holm"] is not None] == pytest.approx(
        multipletests(known, method="holm")[1]
    )
    assert [f["p_bh"] for f in found if f["p_bh"] is not None] == pytest.approx(
        multipletests(known, method="fdr_bh")[1]
    )
    assert found[1] == found[5] == {"p_holm": None, "p_bh": None}
    assert adjust([None]) == [{"p_holm": None, "p_bh": None}] and adjust([]) == []


# --- whole comparisons ---


MODELS = ("shorter", "longer", "random")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Results of three baselines on a part of the project's own data."""
    results = tmp_path_factory.mktemp("results")
    for name in MODELS:
        common = ["--model_path", f"baseline:{name}", "--results_dir", str(results)]
        biases = "length,beauty,gender,refinement-aware"
        assert eval_rm.main([*common, "--data_dir", str(REPO / "data/eval"), "--bias_type", biases]) == 0
        data = REPO / "data/eval/reward_bench/own_sample.jsonl"
        assert eval_reward_bench.main([*common, "--data_file", str(data)]) == 0
    return [str(results / f"baseline-{name}") for name in MODELS]


def compared(folders: Sequence[str], output: Path, *more: str) -> dict[str, Any]:
    arguments = [*folders, "--output_file", str(output / "c.md"), "--n_resamples", "100", *more]
    assert compare_models.main(arguments) == 0
    found: dict[str, Any] = json.loads((output / "c.json").read_text(encoding="utf-8"))
    return found


def summary_of(folder: str, name: str = "bias_summary.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    return found


def rows_of(folder: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def comparison(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compared(folders, tmp_path_factory.mktemp("compared"))


def test_figures_are_those_of_the_summaries(comparison: dict[str, Any], folders: list[str]) -> None:
    by_name = {f"baseline-{name}": summary_of(folder) for name, folder in zip(MODELS, folders, strict=True)}
    checked = 0
    for row in comparison["differences"]["biases"]:
        if row["measure"] in compare_models.MEASURES:
            for side in ("a", "b"):
                fields = by_name[row[f"model_{side}"]]["biases"][row["what"]]
                assert row[side] == pytest.approx(fields[row["measure"]]), row["what"]
                checked += 1
        elif row["measure"] == "placebo_bias_sensitivity_rate":
            for side in ("a", "b"):
                placebo = by_name[row[f"model_{side}"]]["biases"][row["what"]]["placebo"]
                assert row[side] == pytest.approx(placebo["bias_sensitivity_rate"])
    assert checked == 3 * 3 * 4 * 2
    pooled = [
        row
        for row in comparison["differences"]["pooled"]
        if row["what"] == "pooled" and row["measure"] in compare_models.MEASURES
    ]
    for row in pooled:
        assert row["a"] == pytest.approx(by_name[row["model_a"]]["overall"][row["measure"]])
    for entry in comparison["leaderboard"][:3]:
        overall = by_name[entry["model"]]["overall"]
        for key in (
            "bias_sensitivity_rate",
            "bias_sensitivity_rate_ci",
            "original_pair_accuracy",
            "macro_bias_sensitivity_rate",
        ):
            assert entry["overall"][key] == pytest.approx(overall[key])


def test_p_of_an_accuracy_is_mcnemar_on_the_written_rows(comparison: dict[str, Any], folders: list[str]) -> None:
    first, second = (rows_of(folder, "bias_length.jsonl") for folder in folders[:2])
    a, b = ([row["original_verdict"] == "correct" for row in rows] for rows in (first, second))
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    (row,) = [
        row
        for row in comparison["differences"]["biases"]
        if (row["model_a"], row["model_b"], row["what"], row["measure"])
        == ("baseline-shorter", "baseline-longer", "length", "original_pair_accuracy")
    ]
    assert (row["only_a"], row["only_b"]) == (only_a, only_b)
    assert row["p"] == pytest.approx(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def test_each_table_is_one_family(comparison: dict[str, Any]) -> None:
    for name, rows in comparison["differences"].items():
        known = [row["p"] for row in rows if row["p"] is not None]
        holm = [row["p_holm"] for row in rows if row["p"] is not None]
        assert holm == pytest.approx(multipletests(known, method="holm")[1]), name
        assert len({(row["model_a"], row["model_b"]) for row in rows}) == 3


def test_sections_have_the_official_weights(comparison: dict[str, Any], folders: list[str]) -> None:
    summary = summary_of(folders[0], "reward_bench_summary.json")
    rows = [row for row in comparison["differences"]["reward_bench"] if row["model_a"] == "baseline-shorter"]
    sections = {row["what"]: row["a"] for row in rows if row["measure"] == "section_accuracy"}
    assert sections == pytest.approx({name: fields["accuracy"] for name, fields in summary["sections"].items()})
    subsets = comparison["differences"]["reward_bench_subsets"]
    assert len(subsets) == 3 * 23
    for row in subsets:
        if row["model_a"] == "baseline-shorter":
            assert row["a"] == pytest.approx(summary["subsets"][row["what"]]["accuracy"])


def test_leaderboard_is_sorted_and_never_without_accuracy(
    comparison: dict[str, Any], folders: list[str], tmp_path: Path
) -> None:
    # A low BSR alone is no merit: "the shorter answer wins" has one and is right less often.
    both = [entry["overall"]["right_before_and_after"] for entry in comparison["leaderboard"][:3]]
    assert both == sorted(both, reverse=True)
    by_bsr = compared(folders, tmp_path, "--sort", "bsr")["leaderboard"]
    assert [entry["is_baseline"] for entry in by_bsr] == [False] * 3 + [True] * 4
    values = [entry["overall"]["bias_sensitivity_rate"] for entry in by_bsr[:3]]
    assert values == sorted(values)
    by_accuracy = compared(folders, tmp_path, "--sort", "accuracy")["leaderboard"][:3]
    accuracies = [entry["overall"]["original_pair_accuracy"] for entry in by_accuracy]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(entry["overall"]["original_pair_accuracy"] is not None for entry in by_bsr)
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    header = next(line for line in text.splitlines() if line.startswith("| model |"))
    assert header.index("original accuracy") < header.index("pooled BSR")


def test_bsr_on_the_pairs_that_both_models_had_right(comparison: dict[str, Any], folders: list[str]) -> None:
    rows = [rows_of(folder, "bias_beauty.jsonl") for folder in folders[:2]]
    pairs = [p for p in zip(*rows, strict=True) if all(row["original_verdict"] == "correct" for row in p)]
    expected = [sum(p[side]["biased_verdict"] == "wrong" for p in pairs) for side in (0, 1)]
    (row,) = [
        row
        for row in comparison["differences"]["biases"]
        if (row["model_a"], row["model_b"], row["what"], row["measure"])
        == ("baseline-shorter", "baseline-longer", "beauty", "bias_sensitivity_rate_both_right")
    ]
    assert row["n_rows"] == len(pairs)
    assert [row["a"], row["b"]] == ([e / len(pairs) for e in expected] if pairs else [None, None])


def test_groups_of_biases_are_pooled(folders: list[str], comparison: dict[str, Any], tmp_path: Path) -> None:
    found = compared(folders[:2], tmp_path)
    for entry in found["leaderboard"]:
        name = entry["model"].removeprefix("baseline-").removeprefix("baseline ")
        biases = summary_of(folders[0])["baselines"][name]["biases"]
        (group,) = entry["groups"]  # of gender alone there is nothing to pool
        assert group == "rewrite biases"
        for end in ("count", "total"):
            key = f"bias_sensitivity_rate_{end}"
            assert entry["groups"][group][key] == biases["length"][key] + biases["beauty"][key]
        assert entry["is_baseline"] or entry["groups"][group]["bias_sensitivity_rate_ci"] is not None
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "## Pooled by kind of bias" in text and "| rewrite biases | baseline-shorter |" in text
    rows = [row for row in comparison["differences"]["pooled"] if row["what"] == "rewrite biases"]
    assert len(rows) == 3


def test_detectable_effects_allow_for_the_correction(comparison: dict[str, Any]) -> None:
    for rows in comparison["differences"].values():
        n_tests = sum(row["p"] is not None for row in rows)
        for row in rows:
            if row["minimum_detectable_effect"] is not None and row["n_questions"] >= 20:
                power = TTestPower().solve_power(
                    effect_size=row["minimum_detectable_effect"] / (row["standard_error"] * row["n_questions"] ** 0.5),
                    nobs=row["n_questions"],
                    alpha=0.05 / n_tests,
                )
                assert power == pytest.approx(0.8, abs=0.04)


def test_settings_that_differ_are_named(folders: list[str], tmp_path: Path) -> None:
    other = copy_with(folders[1], tmp_path / "other", "bias_length.jsonl", lambda rows: rows)
    summary = summary_of(other)
    summary["metadata"]["max_length"] = 17
    (Path(other) / "bias_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    named = compared([folders[0], other], tmp_path)["not_comparable"]
    assert any("differ in max_length" in text and "17" in text for text in named)
    summary["metadata"] |= {"prompt_version": "1", "temperature": 0.5}
    (Path(other) / "bias_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (named,) = compared([folders[0], other], tmp_path)["not_comparable"]
    assert "other is a judge of pairs and baseline-shorter is a model that scores texts" in named
    third = copy_with(other, tmp_path / "third", "bias_length.jsonl", lambda rows: rows)
    summary["metadata"] |= {"prompt_version": "2", "temperature": 1.0}
    (Path(third) / "bias_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    named = compared([other, third], tmp_path)["not_comparable"]
    assert [key for key in ("prompt_version", "temperature") if any(f"differ in {key}" in text for text in named)]
    assert len(named) == 2


def test_reference_takes_one_model_as_the_other_side(folders: list[str], tmp_path: Path) -> None:
    found = compared(folders, tmp_path, "--reference", folders[1])
    pairs = {(row["model_a"], row["model_b"]) for row in found["differences"]["pooled"]}
    assert pairs == {("baseline-shorter", "baseline-longer"), ("baseline-random", "baseline-longer")}
    with pytest.raises(ContrastRMError, match="none of the results folders"):
        compared(folders, tmp_path, "--reference", "elsewhere")


def test_same_run_same_numbers(folders: list[str], tmp_path: Path, comparison: dict[str, Any]) -> None:
    again = compared(folders, tmp_path)
    for key in ("leaderboard", "differences", "shared_rows"):
        assert again[key] == comparison[key]


# --- rows that are not in both ---


def copy_with(folder: str, target: Path, name: str, change: Any) -> str:
    target.mkdir()
    for file in Path(folder).glob("bias_*"):
        (target / file.name).write_bytes(file.read_bytes())
    rows = change(rows_of(folder, name))
    (target / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(target)


def test_rows_of_one_model_only_are_left_out_and_named(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0] |= {"original_verdict": None, "biased_verdict": None}  # a text was dropped
        return rows[-3:][::-1] + rows[:-5]  # in another order, two rows gone

    other = copy_with(folders[1], tmp_path / "other", "bias_length.jsonl", change)
    found = compared([folders[0], other], tmp_path)
    n = len(rows_of(folders[0], "bias_length.jsonl"))
    assert found["shared_rows"]["length"] == {
        "n_rows": n - 3,
        "n_left_out": {"baseline-shorter": 3, "other": 1},
        "n_flagged": 0,
    }
    assert "length: rows that not every model has scored are left out" in capsys.readouterr().out
    direct = {row["row_id"]: row for row in rows_of(folders[1], "bias_length.jsonl")}
    kept = [row["row_id"] for row in rows_of(other, "bias_length.jsonl") if row["original_verdict"]]
    expected = sum(direct[key]["biased_verdict"] == "correct" for key in kept) / len(kept)
    (row,) = [
        row
        for row in found["differences"]["biases"]
        if (row["what"], row["measure"]) == ("length", "biased_pair_accuracy")
    ]
    assert row["b"] == pytest.approx(expected)


def test_clean_rows_only(folders: list[str], tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"defects": ["empty_text"]} if row["line"] <= 4 else row for row in rows]

    other = copy_with(folders[1], tmp_path / "other", "bias_beauty.jsonl", change)
    assert compared([folders[0], other], tmp_path)["shared_rows"]["beauty"]["n_flagged"] == 0
    found = compared([folders[0], other], tmp_path, "--rows", "clean")
    assert found["shared_rows"]["beauty"]["n_flagged"] == 4
    assert found["shared_rows"]["beauty"]["n_rows"] == len(rows_of(other, "bias_beauty.jsonl")) - 4


def test_nothing_in_common_is_refused(folders: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    summary = summary_of(folders[1])
    summary["biases"] = {"length": summary["biases"]["length"]}
    (other / "bias_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    rows = [row | {"row_id": f"x{number}"} for number, row in enumerate(rows_of(folders[1], "bias_length.jsonl"))]
    (other / "bias_length.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ContrastRMError, match="no scored row in common"):
        compared([folders[0], str(other)], tmp_path)
    (other / "bias_length.jsonl").unlink()
    with pytest.raises(ContrastRMError, match=r"no bias_length\.jsonl in .*evaluate the model again"):
        compared([folders[0], str(other)], tmp_path)
    (other / "bias_length.jsonl").write_text('{"line": 1}\n', encoding="utf-8")
    with pytest.raises(ContrastRMError, match=r"bias_length\.jsonl:1: no field 'question'"):
        compared([folders[0], str(other)], tmp_path)


def test_results_of_older_versions_match_by_line_of_the_same_file(folders: list[str], tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in ("row_id", "defects")} for row in rows]

    other = copy_with(folders[1], tmp_path / "other", "bias_length.jsonl", change)
    shared = compared([folders[0], other], tmp_path)["shared_rows"]["length"]
    assert shared["n_left_out"] == {"baseline-shorter": 0, "other": 0}
    summary = summary_of(other)
    for file in summary["metadata"]["data_files"]:
        file["sha256"] = "0" * 64
    (Path(other) / "bias_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(ContrastRMError, match="rows of length cannot be matched"):
        compared([folders[0], other], tmp_path)


def test_many_tests_need_many_draws(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared(folders, tmp_path)
    assert "no p by swaps can stay below 0.05" in capsys.readouterr().out
    compared(folders[:2], tmp_path, "--n_resamples", "3000")
    assert "no p by swaps" not in capsys.readouterr().out


# --- benchmarks ---


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def benchmark_files(folder: Path) -> list[Path]:
    """A small file in each format; answers of random lengths, so that the baselines differ from row to row."""
    draw = np.random.default_rng(0)

    def words(n: int) -> list[str]:
        return ["w " * int(length) for length in draw.integers(1, 9, n)]

    rm = [
        {"id": n, "prompt": f"p{n}", "chosen": words(3), "rejected": words(3), "domain": domain}
        for n, domain in enumerate(["chat", "code", "math", "safety-refuse", "safety-response"] * 4)
    ]
    rb2 = [
        {"id": f"r{n}", "prompt": f"p{n}", "chosen": words(1), "rejected": words(3), "subset": subset}
        for n, subset in enumerate(["Factuality"] * 4 + ["Math"] * 8)
    ]
    for n in range(3):
        rb2.append({"id": f"ref:{n}", "prompt": f"r{n}", "chosen": words(1), "rejected": words(2), "subset": "Ties"})
        rb2.append({"id": f"tied:{n}", "prompt": f"t{n}", "chosen": words(2), "rejected": words(2), "subset": "Ties"})
    judged = [
        {"pair_id": f"j{n}", "source": source, "question": f"p{n}", "label": "A>B", "response_A": a, "response_B": b}
        for n, (source, a, b) in enumerate(
            zip(["mmlu-pro-law", "livecodebench"] * 5, words(10), words(10), strict=True)
        )
    ]
    for name in ("Natural", "Neighbor", "Manual"):
        pairs = zip(words(5), words(5), strict=True)
        rows = [{"input": f"{name} {n}", "output_1": a, "output_2": b, "label": 1} for n, (a, b) in enumerate(pairs)]
        write_lines(folder / "llmbar" / name / "dataset.json", rows)
    return [
        write_lines(folder / "rm.jsonl", rm),
        write_lines(folder / "rb2.jsonl", rb2),
        write_lines(folder / "judged.jsonl", judged),
        folder / "llmbar",
    ]


@pytest.fixture(scope="module")
def benchmark_results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Results of two baselines on every other benchmark, without any bias evaluation."""
    results = tmp_path_factory.mktemp("benchmarks")
    for name in MODELS[:2]:
        for path in benchmark_files(results / "data"):
            common = ["--model_path", f"baseline:{name}", "--results_dir", str(results)]
            assert eval_reward_bench.main([*common, "--data_file", str(path)]) == 0
    return [str(results / f"baseline-{name}") for name in MODELS[:2]]


def found_of(comparison: dict[str, Any], family: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["what"], row["measure"]): row for row in comparison["differences"][family]}


def test_every_benchmark_is_compared_without_any_bias_figures(
    benchmark_results: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(benchmark_results, tmp_path)
    printed = capsys.readouterr().out
    assert found["not_compared"] == [] and found["not_comparable"] == []
    assert set(found["differences"]) == {
        *("pooled", "biases"),
        *(
            name + suffix
            for name in ("rm_bench", "reward_bench_2", "llmbar", "judgebench")
            for suffix in ("", "_subsets")
        ),
    }
    for side, folder in zip("ab", benchmark_results, strict=True):
        rm = summary_of(folder, "rm_bench_summary.json")
        by_level = {level: found_of(found, "rm_bench")["mean of the domains", f"{level}_accuracy"] for level in LEVELS}
        for level, row in by_level.items():
            rates = [domain[f"{level}_accuracy"] for domain in rm["domains"].values()]
            assert row[side] == pytest.approx(np.mean(rates))
            for domain, fields in rm["domains"].items():
                cell = found_of(found, "rm_bench_subsets")[domain, f"{level}_accuracy"]
                assert cell[side] == pytest.approx(fields[f"{level}_accuracy"])
        whole = found_of(found, "rm_bench")["mean of the domains", "accuracy"]
        assert whole[side] == pytest.approx(np.mean([row[side] for row in by_level.values()]))
        rb2 = summary_of(folder, "reward_bench_2_summary.json")
        overall = found_of(found, "reward_bench_2")
        assert overall["all rows but Ties", "best_of_n_accuracy"][side] == pytest.approx(rb2["best_of_n_accuracy"])
        halves = [rb2["subsets"][name]["accuracy"] for name in ("Factuality", "Math")]
        assert overall["mean of the subsets but Ties", "best_of_n_accuracy"][side] == pytest.approx(np.mean(halves))
        llmbar = summary_of(folder, "llmbar_summary.json")
        adversarial = [llmbar["subsets"][name]["accuracy"] for name in ("Neighbor", "Manual")]
        assert found_of(found, "llmbar")["mean of the adversarial subsets", "accuracy"][side] == pytest.approx(
            np.mean(adversarial)
        )
        for name in ("reward_bench_2", "llmbar", "judgebench"):
            for (subset, _), row in found_of(found, f"{name}_subsets").items():
                fields = summary_of(folder, f"{name}_summary.json")["subsets"][subset]
                assert row[side] == pytest.approx(fields["accuracy"])
    assert "RM-Bench comparisons" in printed and "Paired differences, LLMBar, by subset" in printed
    first, second = (rows_of(folder, "judgebench.jsonl") for folder in benchmark_results)
    only_a, only_b = (
        sum(x["verdict"] == "correct" != y["verdict"] for x, y in zip(*rows, strict=True))
        for rows in ((first, second), (second, first))
    )
    row = found_of(found, "judgebench")["all rows", "accuracy"]
    assert (row["only_a"], row["only_b"]) == (only_a, only_b) and row["test"] == "McNemar, exact"
    assert row["p"] == pytest.approx(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def test_comparisons_of_one_rm_bench_row_are_one_question(benchmark_results: list[str], tmp_path: Path) -> None:
    found = found_of(compared(benchmark_results, tmp_path), "rm_bench_subsets")
    row = found["chat", "easy_accuracy"]
    assert (row["n_rows"], row["n_questions"], row["test"]) == (12, 4, "McNemar, exact by question")


def test_what_only_one_model_has_is_named(
    folders: list[str], benchmark_results: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joint = tmp_path / "joint"
    shutil.copytree(folders[0], joint)
    for file in Path(benchmark_results[0]).glob("*bench*"):
        shutil.copy(file, joint)
    found = compared([str(joint), benchmark_results[1]], tmp_path)
    assert found["not_compared"] == [
        "The biases are not compared: no bias_summary.json of baseline-longer.",
        "RewardBench is not compared: no reward_bench_summary.json of baseline-longer.",
        "LLMBar is not compared: no llmbar_summary.json of joint.",
    ]
    assert found["not_compared"][1] in capsys.readouterr().out
    assert found["differences"]["biases"] == []
    summary = summary_of(str(joint), "rm_bench_summary.json")
    (joint / "rm_bench_summary.json").write_text(json.dumps(summary | {"label": "RM-Bench"}))
    summary = summary_of(str(joint), "judgebench_summary.json")
    summary["metadata"]["data_files"][0]["sha256"] = "0"
    (joint / "judgebench_summary.json").write_text(json.dumps(summary))
    found = compared([str(joint), benchmark_results[1]], tmp_path)
    assert any(
        "RM-Bench is not compared: the models have figures of different data" in note for note in found["not_compared"]
    )
    assert found["not_comparable"] == ["baseline-longer and joint were not evaluated on the same files: judged.jsonl"]
    with pytest.raises(ContrastRMError, match="--sort rm_bench: not every model has rows of RM-Bench"):
        compared([str(joint), benchmark_results[1]], tmp_path, "--sort", "rm_bench")


def test_leaderboard_by_a_benchmark(benchmark_results: list[str], tmp_path: Path) -> None:
    found = compared(benchmark_results, tmp_path, "--sort", "rm_bench")["leaderboard"]
    rates = [entry["benchmarks"]["rm_bench"]["accuracy"] for entry in found]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[1]
    assert found[0]["benchmarks"]["rm_bench"]["accuracy_total"] == 20 * 9


def test_bad_arguments(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ContrastRMError, match=r"use a name with \.md"):
        compare_models.main([*folders, "--output_file", str(tmp_path / "c.json")])
    with pytest.raises(ContrastRMError, match="give no interval"):
        compare_models.main([*folders, "--n_resamples", "10"])
