"""Intervals: statsmodels' own for independent rows, wider for dependent ones, with the claimed coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from codes.common.stats import Rate, cluster_index, cluster_rate, mean_interval, sign_flip_p, wilson


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_equals_statsmodels(total: int, share: float) -> None:
    count = round(share * total)
    low, high = proportion_confint(count, total, alpha=0.05, method="wilson")
    rate = wilson(count, total)
    assert (rate.count, rate.total, rate.rate) == (count, total, count / total)
    assert (rate.ci_low, rate.ci_high) == pytest.approx((low, high), abs=1e-12)


def test_wilson_by_hand_and_at_its_ends() -> None:
    # z = 1.96, n = 10, p = 1/2: centre 1/2, half width z sqrt(10/4 + z^2/4) / (10 + z^2) = 0.2634.
    rate = wilson(5, 10)
    assert (rate.ci_low, rate.ci_high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == Rate(0, 0, None, None, None)
    assert wilson(0, 0).to_dict() == {"count": 0, "total": 0, "rate": None, "ci_low": None, "ci_high": None}
    assert wilson(0, 20).ci_low == pytest.approx(0.0, abs=1e-12) and wilson(20, 20).ci_high == pytest.approx(1.0)
    for count, total in ((3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="not within"):
            wilson(count, total)


@pytest.mark.parametrize(("count", "total"), [(30, 200), (100, 200), (450, 500), (3, 400)])
def test_clusters_of_one_row_give_about_the_wilson_interval(count: int, total: int) -> None:
    numerators = [1] * count + [0] * (total - count)
    ours = cluster_rate(numerators, [1] * total, [f"q{row}" for row in range(total)])
    plain = wilson(count, total)
    assert (ours.count, ours.total, ours.rate) == (plain.count, plain.total, plain.rate)
    assert ours.ci_low == pytest.approx(plain.ci_low, abs=0.002)
    assert ours.ci_high == pytest.approx(plain.ci_high, abs=0.002)


def width(rate: Rate) -> float:
    assert rate.ci_low is not None and rate.ci_high is not None
    return rate.ci_high - rate.ci_low


def test_duplicated_clusters_widen_to_what_the_questions_alone_give() -> None:
    outcome = [1] * 30 + [0] * 70
    names = [f"q{row}" for row in range(100)]
    once = cluster_rate(outcome, [1] * 100, names)
    copied = cluster_rate(outcome * 4, [1] * 400, names * 4)
    believed = cluster_rate(outcome * 4, [1] * 400, [f"q{row}" for row in range(400)])
    # Four copies of every row are four times the rows and no more knowledge.
    assert (copied.ci_low, copied.ci_high) == pytest.approx((once.ci_low, once.ci_high), abs=1e-9)
    assert width(copied) > 1.9 * width(believed)


def test_rows_outside_the_denominator_change_nothing() -> None:
    base = cluster_rate([1, 0, 1, 0, 0], [1, 1, 1, 1, 1], list("aabbc"))
    more = cluster_rate([1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], list("aabbcad"))
    assert base == more


def test_no_denominator_is_no_rate() -> None:
    for arguments in (([], [], []), ([0, 0], [0, 0], ["a", "b"])):
        assert cluster_rate(*arguments) == Rate(0, 0, None, None, None)


def test_extreme_rates_keep_a_width_that_counts_questions() -> None:
    names = [f"q{row % 10}" for row in range(40)]
    for outcome in (0, 1):
        rate = cluster_rate([outcome] * 40, [1] * 40, names)
        assert rate.rate == outcome and width(rate) > width(wilson(10 * outcome, 10)) > width(wilson(40 * outcome, 40))
    one = cluster_rate([1, 0, 1, 1], [1] * 4, ["same"] * 4)
    assert one.rate == 0.75 and width(one) > 0.75  # a single question says almost nothing


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcdefgh")), max_size=40))
def test_the_interval_holds_the_rate_and_stays_within_one(rows: list[tuple[bool, bool, str]]) -> None:
    denominators = [int(counts) for counts, _, _ in rows]
    numerators = [int(counts and event) for counts, event, _ in rows]
    rate = cluster_rate(numerators, denominators, [name for _, _, name in rows])
    assert (rate.count, rate.total) == (sum(numerators), sum(denominators))
    if rate.total == 0:
        assert rate.rate is rate.ci_low is rate.ci_high is None
        return
    assert rate.rate == rate.count / rate.total
    assert 0 <= rate.ci_low <= rate.rate + 1e-12 and rate.rate - 1e-12 <= rate.ci_high <= 1
    assert width(rate) >= width(wilson(rate.count, rate.total)) - 1e-12


def test_clusters_are_numbered_as_they_come() -> None:
    assert cluster_index(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert cluster_index([]).shape == (0,)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        cluster_rate([1], [1, 1], ["a", "b"])
    with pytest.raises(ValueError, match="numerator outside its denominator"):
        cluster_rate([1, 0], [0, 1], ["a", "b"])


def test_coverage_on_duplicated_questions() -> None:
    """1,000 data sets of 120 questions, each question's outcome copied one to four times (rate 0.3)."""
    generator = np.random.default_rng(20)
    true_rate, n_questions, n_sets = 0.3, 120, 1000
    names = [f"q{question:03}" for question in range(n_questions)]
    covered = np.zeros((n_sets, 2), dtype=bool)
    for number in range(n_sets):
        copies = generator.integers(1, 5, n_questions)
        outcome = np.repeat(generator.random(n_questions) < true_rate, copies).astype(int)
        rows = np.repeat(names, copies).tolist()
        ours = cluster_rate(outcome.tolist(), [1] * len(rows), rows)
        plain = wilson(int(outcome.sum()), len(outcome))
        covered[number] = [rate.ci_low <= true_rate <= rate.ci_high for rate in (ours, plain)]
    clustered, independent = covered.mean(axis=0)
    assert 0.93 <= clustered <= 0.975
    assert independent < 0.85


def test_mean_interval() -> None:
    # Values 1, 2, 3, 4: mean 2.5, sd 1.29099, t(3) = 3.18245, half width 3.18245 x 1.29099 / 2 = 2.05426.
    result = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert result == pytest.approx({"mean": 2.5, "sd": 1.2909944, "n": 4, "ci_low": 0.4457397, "ci_high": 4.5542603})
    values = np.random.default_rng(0).normal(1, 2, 50).tolist()
    names = [f"q{row}" for row in range(50)]
    once = mean_interval(values)
    assert mean_interval(values, names) == pytest.approx(once)
    copied = mean_interval(values * 3, names * 3)
    assert (copied["ci_low"], copied["ci_high"]) == pytest.approx((once["ci_low"], once["ci_high"]))
    believed = mean_interval(values * 3)
    assert believed["ci_high"] - believed["ci_low"] < 0.7 * (copied["ci_high"] - copied["ci_low"])


def test_mean_interval_says_null_where_the_values_do_not_determine_it() -> None:
    nothing = {"mean": None, "sd": None, "n": 0, "ci_low": None, "ci_high": None}
    assert mean_interval([]) == nothing
    assert mean_interval([2.0]) == nothing | {"mean": 2.0, "n": 1}
    assert mean_interval([1.0, 3.0], ["a", "a"]) == nothing | {
        "mean": 2.0,
        "sd": pytest.approx(2**0.5),
        "n": 2,
    }
    assert mean_interval([2.0, 2.0])["ci_low"] == pytest.approx(2.0)


def test_sign_flips_by_hand() -> None:
    names = ["a", "b", "c"]
    assert sign_flip_p([1, 2, 3], names) == pytest.approx(2 / 8)  # of the eight sums only +6 and -6 reach 6
    assert sign_flip_p([1, 2, -3], names) == 1.0
    assert sign_flip_p([1, 2, 3, 0], [*names, "a"]) == pytest.approx(2 / 8)  # a question's rows keep together
    assert sign_flip_p([3, 3], ["a", "a"]) == 1.0
    assert sign_flip_p([], []) is sign_flip_p([0.0, 0.0], ["a", "b"]) is None


def test_clustered_rate_by_hand() -> None:
    """Four questions of two equal rows, two of them right.

    Variance 4/3 x 4 / 8^2 = 1/12, so 3 rows count as independent; times (1.95996 / 3.18245)^2 for four questions: 1.13788.
    Half the width: 1.95996 x sqrt(0.25 / 1.13788 + 3.84146 / (4 x 1.13788^2)) / (1 + 3.84146 / 1.13788) = 0.43917.
    """
    names = [name for name in "abcd" for _ in range(2)]
    found = cluster_rate([1, 1, 1, 1, 0, 0, 0, 0], [1] * 8, names)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.5 - 0.43917, 0.5 + 0.43917), abs=1e-4)
