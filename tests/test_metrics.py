"""Metrics: published results as known answers, and a case made by hand for every figure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.proportion import proportion_confint

from codes.common.errors import ContrastRMError
from codes.evaluate.benchmark_figures import (
    SECTIONS,
    SUBSETS,
    BenchmarkItem,
    ItemOutcome,
    subsets_of,
    summarise_reward_bench,
)
from codes.evaluate.metrics import (
    FLIP_CAUSES,
    PairOutcome,
    RefinementOutcome,
    Stratum,
    judge_pair,
    overall_rates,
    pair_rates,
    paired_flip_p,
    stratified_rate,
    summarise_bias,
    summarise_overall,
    summarise_refinement,
)
from tests.known_bsr import PUBLISHED as PUBLISHED_BSR
from tests.known_bsr import PUBLISHED_RATE_BIASES, PUBLISHED_RATES, BiasCounts
from tests.known_rewardbench import PUBLISHED as PUBLISHED_REWARDBENCH

NAN = math.nan
GRM = "grm-llama3-8b-instruct-rewardmodel-ft"


def pair(better: float, other: float, better_biased: float, other_biased: float, question: str = "q") -> PairOutcome:
    return PairOutcome(1, question, (better, other), (better_biased, other_biased))


def outcomes_with(counts: BiasCounts, prefix: str) -> list[PairOutcome]:
    """Outcomes with published counts, a question of its own for each."""
    kept = counts.original_correct - counts.correct_to_wrong
    stuck = counts.n - counts.original_correct - counts.wrong_to_correct
    scores = (
        [(1.0, 0.0, 0.0, 1.0)] * counts.correct_to_wrong
        + [(1.0, 0.0, 1.0, 0.0)] * kept
        + [(0.0, 1.0, 1.0, 0.0)] * counts.wrong_to_correct
        + [(0.0, 1.0, 0.0, 1.0)] * stuck
    )
    return [pair(*row, question=f"{prefix}-{number}") for number, row in enumerate(scores)]


def row(name: str, subset: str, question: str, chosen: float, rejected: float) -> ItemOutcome:
    item = BenchmarkItem("f", 1, name, ({"role": "user", "content": question},), ("c",), ("r",), subset)
    return ItemOutcome(item, (chosen,), (rejected,))


def reward_bench_rows(correct: dict[str, int]) -> list[ItemOutcome]:
    rows = []
    for subset in SUBSETS:
        for number in range(subset.n_rows):
            name = f"{subset.name}-{number}"
            rows.append(row(name, subset.name, name, float(number < correct[subset.name]), 0.5))
    return rows


# --- verdicts ---


def test_judge_pair() -> None:
    assert judge_pair(1.0, 0.0) == "correct"
    assert judge_pair(0.0, 1.0) == "wrong"
    assert judge_pair(0.5, 0.5) == "tie"
    for scores in ((NAN, 0.0), (0.0, NAN), (math.inf, 0.0)):
        with pytest.raises(ValueError, match="cannot judge"):
            judge_pair(*scores)


@pytest.mark.parametrize(
    ("scores", "cause"),
    [
        ((2, 1, 0, 1), "chosen_alone"),  # the chosen falls below the unchanged rejected
        ((2, 1, 2, 3), "rejected_alone"),  # the rejected rises above the unchanged chosen
        ((2, 1, 0, 3), "either_alone"),
        ((3, 0, 1, 2), "only_both"),  # 1 > 0 and 3 > 2: neither alone is enough
        ((2, 1, 1, 2), "only_both"),  # alone they only tie, and a tie is no flip
        ((2, 1, 2, 1), None),
        ((1, 2, 2, 1), None),
        ((2, 1, 1, 1), None),
    ],
)
def test_flip_cause(scores: tuple[float, float, float, float], cause: str | None) -> None:
    assert pair(*scores).flip_cause == cause


# --- known answers: bias sensitivity ---


@pytest.mark.parametrize(
    ("model", "bias"), [(model, bias) for model, biases in PUBLISHED_BSR.items() for bias in biases]
)
def test_published_bias_sensitivity(model: str, bias: str) -> None:
    counts = PUBLISHED_BSR[model][bias]
    summary = summarise_bias(outcomes_with(counts, bias))
    assert summary["n_pairs"] == counts.n
    assert summary["original_pair_accuracy_count"] == counts.original_correct
    assert summary["biased_pair_accuracy_count"] == counts.biased_correct
    assert summary["bias_sensitivity_rate_count"] == counts.correct_to_wrong
    assert summary["bias_sensitivity_rate_total"] == counts.original_correct
    assert round(100 * summary["bias_sensitivity_rate"], 2) == pytest.approx(counts.bsr_percent, abs=0.006)
    if counts.published is not None:
        assert round(100 * summary["bias_sensitivity_rate"], 1) == pytest.approx(counts.published)
    net = summary["net_flips"]
    assert (net["correct_to_wrong"], net["wrong_to_correct"]) == (
        counts.correct_to_wrong,
        counts.wrong_to_correct,
    )


def test_published_pooled_rate() -> None:
    summary = summarise_overall({bias: outcomes_with(c, bias) for bias, c in PUBLISHED_BSR[GRM].items()})
    assert (summary["bias_sensitivity_rate_count"], summary["bias_sensitivity_rate_total"]) == (552, 2397)
    assert round(100 * summary["bias_sensitivity_rate"], 2) == 23.03
    macro = sum(c.correct_to_wrong / c.original_correct for c in PUBLISHED_BSR[GRM].values()) / 9
    assert summary["macro_bias_sensitivity_rate"] == pytest.approx(macro)
    low, high = summary["macro_bias_sensitivity_rate_ci"]
    assert low < macro < high
    assert high - low < 0.06
    assert summary["missing_biases"] == []


@pytest.mark.parametrize("judge", PUBLISHED_RATES)
def test_published_rates_of_every_judge(judge: str) -> None:
    """Rates with one decimal are flips of 1,000 pairs that were judged right; 200 pairs more were not."""
    rates = dict(zip(PUBLISHED_RATE_BIASES, PUBLISHED_RATES[judge], strict=True))
    outcomes = {}
    for bias, percent in rates.items():
        flips = round(10 * percent)
        outcomes[bias] = outcomes_with(BiasCounts(1200, 1000, 0, flips, 50, percent, percent), bias)
    fields = overall_rates(outcomes)
    for bias, percent in rates.items():
        rate = pair_rates(outcomes[bias])["bias_sensitivity_rate"]
        assert round(100 * rate, 1) == percent
    assert fields["missing_biases"] == []
    assert 100 * fields["macro_bias_sensitivity_rate"] == pytest.approx(sum(rates.values()) / 9)
    assert 100 * fields["bias_sensitivity_rate"] == pytest.approx(sum(rates.values()) / 9)


def test_published_tables_agree_with_each_other() -> None:
    for model, biases in PUBLISHED_BSR.items():
        rates = dict(zip(PUBLISHED_RATE_BIASES, PUBLISHED_RATES[model], strict=True))
        for bias, counts in biases.items():
            assert counts.published in (None, rates[bias])
            assert counts.n >= counts.original_correct >= counts.correct_to_wrong


# --- bias figures by hand ---


def test_summary_by_hand() -> None:
    rows = [
        pair(2, 1, 0, 1, "a"),  # flip
        pair(2, 1, 3, 1, "b"),  # stays correct
        pair(2, 1, 1, 1, "c"),  # correct -> tie: a flip only where ties count as flips
        pair(1, 2, 2, 1, "d"),  # wrong -> correct
        pair(1, 1, 0, 1, "e"),  # tie -> wrong: not in the denominator of BSR
        pair(NAN, 1, 0, 1, "f"),
    ]
    summary = summarise_bias(rows)
    assert (summary["n_pairs"], summary["n_excluded"], summary["n_questions"]) == (5, 1, 5)
    assert (summary["original_pair_accuracy_count"], summary["original_pair_accuracy_total"]) == (3, 5)
    assert summary["biased_pair_accuracy"] == pytest.approx(2 / 5)
    assert (summary["bias_sensitivity_rate_count"], summary["bias_sensitivity_rate_total"]) == (1, 3)
    assert summary["bias_sensitivity_rate_ties_as_flips"] == pytest.approx(2 / 3)
    assert (summary["n_original_ties"], summary["n_biased_ties"]) == (1, 1)
    assert summary["transitions"]["correct_to_tie"] == 1
    assert summary["transitions"]["tie_to_wrong"] == 1
    assert sum(summary["transitions"].values()) == 5
    assert summary["net_flips"]["net"] == 0
    assert summary["placebo"] is None
    low, high = summary["bias_sensitivity_rate_ci"]
    assert 0 <= low < 1 / 3 < high <= 1


def test_gap_shift_parts_add_up() -> None:
    draw = random.Random(3)
    rows = [pair(*(draw.gauss(0, 1) for _ in range(4)), question=str(i)) for i in range(50)]
    shift = summarise_bias(rows)["score_gap_shift"]
    for unit in ("mean", "mean_in_score_sd"):
        parts = shift["chosen_part"][unit] + shift["rejected_part"][unit]
        assert shift["total"][unit] == pytest.approx(parts, abs=1e-12)
    assert shift["total"]["ci_low"] < shift["total"]["mean"] < shift["total"]["ci_high"]


def test_gap_shift_direction() -> None:
    shift = summarise_bias([pair(2, 1, 1.5, 2, "a"), pair(2, 1, 1.5, 2, "b")])["score_gap_shift"]
    assert shift["total"]["mean"] == pytest.approx(-1.5)
    assert shift["chosen_part"]["mean"] == pytest.approx(-0.5)
    assert shift["rejected_part"]["mean"] == pytest.approx(-1.0)


def test_attribution_counts_add_up_to_the_flips() -> None:
    draw = random.Random(4)
    rows = [pair(*(draw.gauss(0, 1) for _ in range(4)), question=str(i)) for i in range(300)]
    causes = summarise_bias(rows)["flip_attribution"]
    assert causes["n_flips"] > 50
    assert sum(causes[f"{cause}_count"] for cause in FLIP_CAUSES) == causes["n_flips"]
    assert all(causes[f"{cause}_total"] == causes["n_flips"] for cause in FLIP_CAUSES)


def test_flips_both_ways_have_rates() -> None:
    rows = [pair(2, 1, 0, 1, "a"), pair(2, 1, 0, 1, "b"), pair(2, 1, 3, 1, "c"), pair(1, 2, 2, 1, "d")]
    rows += [pair(1, 2, 1, 2, "e"), pair(1, 2, 1, 1, "f"), pair(1, 1, 2, 1, "g"), pair(2, 1, 2, 2, "h")]
    net = summarise_bias(rows)["net_flips"]
    for name, count, total in (
        ("correct_to_wrong_rate", 2, 8),
        ("wrong_to_correct_rate", 1, 8),
        ("recovery_rate", 1, 3),
    ):
        assert (net[f"{name}_count"], net[f"{name}_total"], net[name]) == (count, total, count / total)
        low, high = net[f"{name}_ci"]
        assert 0 <= low < count / total < high <= 1
    assert net["net_share_of_pairs"] == pytest.approx(1 / 8)
    none_wrong = summarise_bias([pair(2, 1, 2, 1, "a")])["net_flips"]
    assert (none_wrong["recovery_rate"], none_wrong["recovery_rate_total"]) == (None, 0)


def test_shift_has_its_interval_in_both_units() -> None:
    draw = random.Random(6)
    rows = [pair(*(draw.gauss(0, 1) for _ in range(4)), question=str(i // 2)) for i in range(60)]
    shift = summarise_bias(rows, score_sd=2.5)["score_gap_shift"]
    for part in ("total", "chosen_part", "rejected_part"):
        fields = shift[part]
        assert fields["mean_in_score_sd"] == pytest.approx(fields["mean"] / 2.5)
        assert fields["ci_in_score_sd"] == pytest.approx([fields["ci_low"] / 2.5, fields["ci_high"] / 2.5])
    assert shift["score_sd"] == 2.5
    # The same by statsmodels: the mean as a regression on a constant, errors clustered by question.
    change = [(row.biased[0] - row.biased[1]) - (row.original[0] - row.original[1]) for row in rows]
    groups = np.repeat(np.arange(30), 2)
    fit = OLS(change, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    # Its small-sample factor is g/(g-1) * (n-1)/(n-k): with the one parameter g/(g-1), which is ours.
    assert [shift["total"]["ci_low"], shift["total"]["ci_high"]] == pytest.approx(list(fit.conf_int()[0]))


def test_pooled_figures_have_shift_placebo_and_length_control() -> None:
    rows = {
        "length": [pair(2, 1, 0, 1, "a"), pair(2, 1, 1.5, 1, "b")],
        "gender": [PairOutcome(1, "c", (1, 0), (0, 0.5), placebo=(1, 0), is_identity=True)],
    }
    summary = summarise_overall(rows, score_sd=1.0)
    assert summary["score_gap_shift"]["total"]["n"] == 3
    assert summary["score_gap_shift"]["total"]["mean"] == pytest.approx((-2 - 0.5 - 1.5) / 3)
    assert summary["placebo"]["n_pairs"] == 1
    assert summary["length_control"]["n_pairs"] == 1  # those of length are not among them
    assert summary["length_control"]["regression"] is None
    assert summary["macro_original_pair_accuracy"] == 1.0
    assert summary["macro_biased_pair_accuracy"] == pytest.approx((0.5 + 0) / 2)


def test_questions_that_differ_by_layout_are_one_cluster() -> None:
    rows = [pair(2, 1, 0, 1, "What is it?"), pair(2, 1, 0, 1, " what  IS it"), pair(2, 1, 0, 1, "Why?")]
    summary = summarise_bias(rows)
    assert summary["n_questions"] == 2
    assert summary["bias_sensitivity_rate_wilson_ci"] is None
    # Two units, both down: two of the four draws of signs are as far from zero.
    assert summary["score_gap_shift"]["total"]["p"] == pytest.approx(0.5)


def test_zero_of_zero_is_null() -> None:
    summary = summarise_bias([pair(0, 1, 0, 1)])
    assert summary["bias_sensitivity_rate"] is None
    assert summary["bias_sensitivity_rate_ci"] is None
    assert summary["bias_sensitivity_rate_total"] == 0
    assert summary["flip_attribution"]["only_both"] is None
    assert summary["score_gap_shift"]["total"]["p"] is None
    empty = summarise_bias([pair(NAN, 0, 0, 0)])
    assert (empty["n_pairs"], empty["n_excluded"], empty["original_pair_accuracy"]) == (0, 1, None)
    assert summarise_overall({"length": [pair(0, 1, 0, 1)]})["macro_bias_sensitivity_rate"] is None


def test_wilson_interval_beside_independent_rows_only() -> None:
    rows = [pair(1, 0, 1, 0, str(i)) for i in range(8)] + [pair(1, 0, 0, 1, "x"), pair(1, 0, 0, 1, "y")]
    summary = summarise_bias(rows)
    expected = proportion_confint(2, 10, method="wilson")
    assert summary["bias_sensitivity_rate_wilson_ci"] == pytest.approx(list(expected))
    repeated = summarise_bias([*rows, pair(1, 0, 1, 0, "x")])
    assert repeated["bias_sensitivity_rate_wilson_ci"] is None
    assert repeated["bias_sensitivity_rate_ci"] is not None


def test_repeated_questions_widen_the_interval() -> None:
    def width(rows: list[PairOutcome]) -> float:
        low, high = summarise_bias(rows)["bias_sensitivity_rate_ci"]
        return high - low

    flips, keeps = (1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 1.0, 0.0)
    apart = [pair(*(flips if i % 4 == 0 else keeps), question=str(i)) for i in range(80)]
    together = [pair(*(flips if i // 4 % 4 == 0 else keeps), question=str(i // 4)) for i in range(80)]
    assert width(together) > 1.5 * width(apart)


# --- length control ---


def lengthened(change: float, shift: float, question: str) -> PairOutcome:
    """A pair whose log length ratio changes by about ``change`` and whose gap changes by ``shift``."""
    return PairOutcome(
        1,
        question,
        (1.0, 0.0),
        (1.0 + shift, 0.0),
        (10_000, 10_000),
        (round(10_000 * math.exp(change)), 10_000),
    )


def test_length_controlled_rate_uses_the_steady_pairs_only() -> None:
    steady = [lengthened(0.05, -2.0, "a"), lengthened(-0.09, 0.0, "b")]
    moved = [lengthened(-1.0, -2.0, f"m{i}") for i in range(5)]
    control = summarise_bias(steady + moved)["length_control"]
    assert control["n_pairs"] == 2
    assert (control["bias_sensitivity_rate_count"], control["bias_sensitivity_rate_total"]) == (1, 2)
    assert control["regression"] is None  # seven questions carry no regression


def test_length_regression_finds_intercept_and_slope() -> None:
    draw = random.Random(5)
    rows = []
    for number in range(200):
        change = draw.uniform(-1.5, 0.5)
        rows.append(lengthened(change, -0.3 + 0.8 * change + draw.gauss(0, 0.1), str(number)))
    regression = summarise_bias(rows)["length_control"]["regression"]
    assert regression["intercept"] == pytest.approx(-0.3, abs=0.05)
    assert regression["slope"] == pytest.approx(0.8, abs=0.05)
    assert regression["intercept_ci"][0] < -0.3 < regression["intercept_ci"][1]


def test_length_regression_is_least_squares_with_the_clustered_sandwich() -> None:
    draw = random.Random(15)
    rows = [lengthened(draw.uniform(-1, 1), draw.gauss(0, 1), str(number // 3)) for number in range(90)]
    found = summarise_bias(rows, score_sd=2.0)["length_control"]["regression"]
    change = np.array([math.log(row.biased_lengths[0] / row.biased_lengths[1]) for row in rows])
    gap = np.array([row.biased[0] - row.biased[1] - 1.0 for row in rows])
    x = np.column_stack([np.ones(90), change])
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ gap
    scores = (x * (gap - x @ beta)[:, None]).reshape(30, 3, 2).sum(axis=1)
    # 30 questions, 90 rows, two parameters; the quantile of Student's t with 29 degrees of freedom is 2.04523.
    variance = 30 / 29 * 89 / 88 * bread @ scores.T @ scores @ bread
    half = 2.04523 * np.sqrt(np.diag(variance))
    assert [found["intercept"], found["slope"]] == pytest.approx(list(beta))
    for position, name in enumerate(("intercept_ci", "slope_ci")):
        assert found[name] == pytest.approx(
            [beta[position] - half[position], beta[position] + half[position]], rel=1e-4
        )
    assert found["intercept_in_score_sd"] == pytest.approx(beta[0] / 2)
    assert found["intercept_ci_in_score_sd"] == pytest.approx([bound / 2 for bound in found["intercept_ci"]])


def test_no_length_control_for_length_nor_without_variation() -> None:
    rows = [pair(1, 0, 1, 0, str(i)) for i in range(20)]
    assert summarise_bias(rows, length_controlled=False)["length_control"] is None
    assert summarise_bias(rows)["length_control"]["regression"] is None


def test_empty_text_has_a_length_ratio() -> None:
    outcome = PairOutcome(1, "q", (1, 0), (1, 0), (0, 10), (10, 10))
    assert outcome.log_length_ratio_change == pytest.approx(math.log(10))


def test_intercept_far_from_the_data_is_marked() -> None:
    far = [lengthened(-1.0 - 0.01 * number, -1.0, str(number)) for number in range(30)]
    assert summarise_bias(far)["length_control"]["regression"]["intercept_is_extrapolated"]
    # One pair on the other side of zero does not carry the line there.
    stray = [*far, lengthened(0.5, -1.0, "stray")]
    assert summarise_bias(stray)["length_control"]["regression"]["intercept_is_extrapolated"]
    near = [lengthened(0.02 - 0.002 * number, -1.0, str(number)) for number in range(30)]
    assert not summarise_bias(near)["length_control"]["regression"]["intercept_is_extrapolated"]


# --- a cue that the model did not see ---


def test_unchanged_scores_of_changed_texts_are_counted() -> None:
    rows = [
        PairOutcome(1, "a", (1, 0), (1, 2)),  # the chosen text changed and its score did not
        PairOutcome(2, "b", (1, 0), (1, 2), changed=(False, True)),
        PairOutcome(3, "c", (1, 0), (2, 1)),
    ]
    assert summarise_bias(rows)["n_without_trace"] == 1
    refinement = [RefinementOutcome(1, "a", 1, 1, 0), RefinementOutcome(2, "b", 1, 2, 0)]
    assert summarise_refinement(refinement)["n_without_trace"] == 1


# --- placebo ---


def test_placebo_is_reported_beside_the_identity_sentence() -> None:
    def row(biased: float, placebo: float, question: str) -> PairOutcome:
        return PairOutcome(1, question, (1.0, 0.5), (biased, 0.5), placebo=(placebo, 0.5))

    rows = [row(0, 0, "a"), row(0, 1, "b"), row(0, 1, "c"), row(1, 1, "d"), row(1, NAN, "e")]
    # Wrong before the rewrite: outside the rates of flips, inside the accuracy and the shift.
    rows.append(PairOutcome(1, "f", (0.2, 0.5), (0.0, 0.5), placebo=(1.0, 0.5)))
    summary = summarise_bias(rows)
    placebo = summary["placebo"]
    assert (summary["bias_sensitivity_rate_count"], summary["bias_sensitivity_rate_total"]) == (3, 5)
    assert (placebo["bias_sensitivity_rate_count"], placebo["bias_sensitivity_rate_total"]) == (1, 4)
    assert (placebo["n_pairs"], placebo["n_excluded"]) == (5, 1)
    assert placebo["identity_minus_placebo"] == pytest.approx(2 / 4)
    assert placebo["identity_minus_placebo_p"] == pytest.approx(0.5)
    assert (placebo["placebo_pair_accuracy_count"], placebo["placebo_pair_accuracy_total"]) == (4, 5)
    assert placebo["gap_shift_minus_placebo"]["mean"] == pytest.approx((0 - 1 - 1 + 0 - 1) / 5)
    assert placebo["n_without_placebo"] == 0
    without = PairOutcome(9, "z", (1.0, 0.5), (0, 0.5), is_identity=True)
    assert summarise_bias([*rows, without])["placebo"]["n_without_placebo"] == 1
    assert summarise_bias([without])["placebo"] is None


# --- overall ---


def test_overall_pools_counts_and_names_what_is_missing() -> None:
    flip, keep = pair(1, 0, 0, 1, "a"), pair(1, 0, 1, 0, "b")
    summary = summarise_overall({"length": [flip, keep], "beauty": [keep] * 6})
    assert summary["bias_sensitivity_rate"] == pytest.approx(1 / 8)
    assert summary["macro_bias_sensitivity_rate"] == pytest.approx(1 / 4)
    assert summary["n_questions"] == 2
    assert "gender" in summary["missing_biases"]
    with pytest.raises(ContrastRMError, match="not pooled"):
        summarise_overall({"refinement-aware": []})


def test_stratified_rate_of_one_stratum_is_close_to_wilson() -> None:
    hits = [i % 5 == 0 for i in range(200)]
    mean, interval = stratified_rate([Stratum(3.0, hits, [True] * 200, [str(i) for i in range(200)])])
    assert mean == pytest.approx(0.2)
    assert interval == pytest.approx(list(proportion_confint(40, 200, method="wilson")), abs=0.002)
    assert stratified_rate([]) == (None, None)


def test_strata_without_spread_do_not_make_the_interval_narrow() -> None:
    """Four rows all right and 400 half right, of one weight: by the weights as good as 1 / (1/16 + 1/1600) = 15.8 rows."""
    certain = Stratum(1.0, [True] * 4, [True] * 4, [f"a{i}" for i in range(4)])
    even = Stratum(1.0, [i % 2 == 0 for i in range(400)], [True] * 400, [f"b{i}" for i in range(400)])
    mean, interval = stratified_rate([certain, even])
    assert mean == pytest.approx(0.75)
    assert interval == pytest.approx(list(proportion_confint(0.75 * 15.84, 15.84, method="wilson")), abs=0.002)


# --- exact test of the flips ---


def test_flip_test_without_repeats_is_exact_mcnemar() -> None:
    for to_wrong, to_correct in ((5, 0), (7, 3), (40, 25), (1, 1)):
        differences = [1] * to_wrong + [-1] * to_correct + [0] * 10
        p = paired_flip_p(differences, [str(i) for i in range(len(differences))])
        assert p == pytest.approx(binomtest(to_wrong, to_wrong + to_correct).pvalue)


def test_flip_test_takes_a_question_as_one_unit() -> None:
    differences = [1] * 12
    assert paired_flip_p(differences, ["a"] * 6 + ["b"] * 6) == pytest.approx(0.5)
    assert paired_flip_p(differences, [str(i) for i in range(12)]) == pytest.approx(2 * 0.5**12)
    assert paired_flip_p([1, -1], ["a", "a"]) == 1.0
    assert paired_flip_p([0, 0], ["a", "b"]) is None


# --- refinement-aware ---


def test_refinement_by_hand() -> None:
    rows = [
        RefinementOutcome(1, "a", 0.0, 2.0, 1.0),  # original -> refined
        RefinementOutcome(2, "b", 2.0, 0.0, 1.0),  # refined -> original
        RefinementOutcome(3, "c", 2.0, 3.0, 1.0),  # unchanged
        RefinementOutcome(4, "d", 1.0, 2.0, 1.0),  # tie -> refined: no change of verdict
        RefinementOutcome(5, "e", NAN, 2.0, 1.0),
    ]
    summary = summarise_refinement(rows)
    assert (summary["n_items"], summary["n_excluded"]) == (4, 1)
    assert (summary["verdict_change_rate_count"], summary["verdict_change_rate_total"]) == (2, 4)
    assert summary["verdict_change_rate_ties_as_changes"] == pytest.approx(3 / 4)
    assert (summary["original_to_refined"], summary["refined_to_original"]) == (1, 1)
    assert summary["original_to_refined_rate"] == summary["refined_to_original_rate"] == pytest.approx(1 / 4)
    assert summary["refined_to_original_rate_ci"][0] < 1 / 4 < summary["refined_to_original_rate_ci"][1]
    assert summarise_refinement(rows, score_sd=4.0)["score_shift"]["mean_in_score_sd"] == pytest.approx(0.5 / 4)
    assert (summary["n_ties_alone"], summary["n_ties_after_history"]) == (1, 0)
    assert summary["transitions"]["tie_to_refined"] == 1
    assert summary["score_shift"]["mean"] == pytest.approx((2 - 2 + 1 + 1) / 4)
    assert summary["score_shift"]["mean_in_score_sd"] == pytest.approx(0.5 / summary["score_sd"])
    assert summarise_refinement([])["verdict_change_rate"] is None


# --- RewardBench ---


@pytest.mark.parametrize("model", PUBLISHED_REWARDBENCH)
def test_published_rewardbench_scores(model: str) -> None:
    published = PUBLISHED_REWARDBENCH[model]
    summary = summarise_reward_bench(reward_bench_rows(published["correct"]))
    assert summary["complete"]
    assert summary["rewardbench_score"] == pytest.approx(published["score"], abs=1e-6)
    for section, accuracy in published["sections"].items():
        assert summary["sections"][section]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert summary["weighted_average_accuracy_total"] == 2985
    assert summary["weighted_average_accuracy_count"] == sum(published["correct"].values())
    if published["micro"] is not None:
        assert summary["weighted_average_accuracy"] == pytest.approx(published["micro"], abs=1e-6)
    low, high = summary["rewardbench_score_ci"]
    assert low < summary["rewardbench_score"] < high


def test_table_is_the_official_one() -> None:
    assert len(SUBSETS) == 23
    assert SECTIONS == ("Chat", "Chat Hard", "Safety", "Reasoning")
    assert sum(subset.n_rows for subset in SUBSETS) == 2985
    weights = {section: sum(subset.weight for subset in subsets_of(section)) for section in SECTIONS}
    assert weights == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def full_rows(*, drop: Iterable[str] = ()) -> list[ItemOutcome]:
    rows = reward_bench_rows({subset.name: subset.n_rows for subset in SUBSETS})
    return [row for row in rows if row.item.id not in set(drop)]


def test_missing_and_short_subsets_make_their_section_partial() -> None:
    rows = [row for row in full_rows(drop=["hep-go-0"]) if row.item.subset != "donotanswer"]
    summary = summarise_reward_bench(rows)
    assert summary["rewardbench_score"] is None
    assert summary["rewardbench_score_ci"] is None
    assert not summary["complete"]
    assert summary["sections"]["Safety"]["missing_subsets"] == ["donotanswer"]
    assert summary["sections"]["Reasoning"]["short_subsets"] == ["hep-go"]
    assert summary["sections"]["Reasoning"]["partial"]
    assert not summary["sections"]["Chat"]["partial"]
    assert summary["sections"]["Safety"]["accuracy"] == 1.0  # over the subsets that are there
    assert summary["subsets"]["donotanswer"]["accuracy"] is None
    assert summary["weighted_average_accuracy_total"] == 2985 - 136 - 1


def test_partial_section_weighs_the_subsets_that_are_there() -> None:
    rows = [row("a", "math-prm", "a", 1, 0), row("b", "hep-go", "b", 0, 1)]
    summary = summarise_reward_bench(rows)
    assert summary["sections"]["Reasoning"]["accuracy"] == pytest.approx(984 / (984 + 164))
    assert summary["sections"]["Chat"]["accuracy"] is None
    assert summary["weighted_average_accuracy"] == 0.5


def test_more_rows_than_official_are_no_official_set() -> None:
    extra = row("more", "hep-go", "more", 1, 0)
    summary = summarise_reward_bench([*full_rows(), extra])
    assert summary["rewardbench_score"] is None
    assert summary["sections"]["Reasoning"]["long_subsets"] == ["hep-go"]


def test_a_tie_is_not_correct_and_a_dropped_text_is_excluded() -> None:
    rows = full_rows(drop=["hep-go-0", "hep-go-1"])
    rows += [row("t", "hep-go", "t", 1, 1), row("n", "hep-go", "n", NAN, 1)]
    subset = summarise_reward_bench(rows)["subsets"]["hep-go"]
    assert (subset["accuracy_count"], subset["accuracy_total"]) == (162, 163)
    assert (subset["n_ties"], subset["n_excluded"], subset["state"]) == (1, 1, "short")


def test_nothing_scored_is_null_everywhere() -> None:
    summary = summarise_reward_bench([])
    assert summary["weighted_average_accuracy"] is None
    assert all(section["accuracy"] is None for section in summary["sections"].values())
