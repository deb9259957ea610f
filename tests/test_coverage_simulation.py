"""1,000 synthetic data sets with duplicated questions: clustered intervals hold the truth as often as they claim.

A question stands in several files, and its rows tend to come out alike. The intervals that the reports show must cover the
true value in 93 to 97 % of the data sets; intervals that take rows for independent do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from codes.common.stats import Rate, cluster_rate, mean_interval, sign_flip_p, wilson
from codes.evaluate.compare_stats import PairedPart, compare_parts
from codes.evaluate.metrics import Stratum, paired_flip_p, stratified_rate

N_SETS = 1000
NAMES = [f"q{number}" for number in range(600)]


def alike(
    draw: np.random.Generator, rate: float, question: np.ndarray, n_questions: int, correlation: float
) -> np.ndarray:
    """Events of the given rate, shape ``(n_rows,)``: a row takes its question's outcome with ``correlation``."""
    shared = (draw.random(n_questions) < rate)[question]
    own = draw.random(len(question)) < rate
    return np.where(draw.random(len(question)) < correlation, shared, own)


def covers(rate: Rate, truth: float) -> bool:
    assert rate.ci_low is not None and rate.ci_high is not None
    return rate.ci_low <= truth <= rate.ci_high


@pytest.mark.parametrize(
    ("rate", "n_questions", "most_copies", "correlation", "counted"),
    [
        (0.3, 120, 4, 1.0, 1.0),  # an accuracy; every row of a question comes out alike
        (0.1, 120, 4, 1.0, 1.0),
        (0.2, 40, 4, 1.0, 1.0),
        (0.3, 500, 3, 0.8, 1.0),
        (0.2, 150, 5, 0.9, 0.6),  # a BSR: its denominator is random too
    ],
)
def test_rate(rate: float, n_questions: int, most_copies: int, correlation: float, counted: float) -> None:
    draw = np.random.default_rng(7)
    held = np.zeros((N_SETS, 2), dtype=bool)
    for number in range(N_SETS):
        question = np.repeat(np.arange(n_questions), draw.integers(1, most_copies + 1, n_questions))
        inside = alike(draw, counted, question, n_questions, correlation)
        hit = alike(draw, rate, question, n_questions, correlation) & inside
        clusters = [NAMES[index] for index in question]
        clustered = cluster_rate(hit.astype(int).tolist(), inside.astype(int).tolist(), clusters)
        held[number] = covers(clustered, rate), covers(wilson(int(hit.sum()), int(inside.sum())), rate)
    clustered_share, plain_share = held.mean(axis=0)
    assert 0.93 <= clustered_share <= 0.97
    assert plain_share < 0.9


def test_mean_of_biases() -> None:
    """Nine files that share 300 questions; a question that flips under one bias tends to flip under the others."""
    draw = np.random.default_rng(8)
    rates = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.2, 0.1])
    held = np.zeros((400, 2), dtype=bool)
    for number in range(len(held)):
        propensity = draw.random(300)
        clustered, independent = [], []
        for bias, rate in enumerate(rates):
            rows = np.flatnonzero(draw.random(300) < 0.35)
            level = np.where(draw.random(len(rows)) < 0.9, propensity[rows], draw.random(len(rows)))
            hits, inside = (level < rate).tolist(), [True] * len(rows)
            clustered.append(Stratum(1.0, hits, inside, [NAMES[row] for row in rows]))
            independent.append(Stratum(1.0, hits, inside, [f"{bias}-{row}" for row in rows]))
        for column, strata in enumerate((clustered, independent)):
            _, bounds = stratified_rate(strata)
            assert bounds is not None
            held[number, column] = bounds[0] <= rates.mean() <= bounds[1]
    assert 0.92 <= held[:, 0].mean() <= 0.98  # of 400 sets: two standard errors wider
    assert held[:, 1].mean() < 0.9


@pytest.mark.parametrize("n_questions", [30, 120])
def test_mean_shift(n_questions: int) -> None:
    draw = np.random.default_rng(9)
    held = np.zeros((N_SETS, 2), dtype=bool)
    for number in range(N_SETS):
        question = np.repeat(np.arange(n_questions), draw.integers(1, 5, n_questions))
        values = (draw.normal(size=n_questions)[question] + 0.5 * draw.normal(size=len(question)) + 0.3).tolist()
        for column, clusters in enumerate((None, [NAMES[index] for index in question])):
            interval = mean_interval(values, clusters)
            held[number, column] = interval["ci_low"] <= 0.3 <= interval["ci_high"]
    plain_share, clustered_share = held.mean(axis=0)
    assert 0.93 <= clustered_share <= 0.97
    assert plain_share < 0.85


def two_models(draw: np.random.Generator, question: np.ndarray, n_questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Denominators and hits of two models on the same rows, shape ``(2, n_rows)`` each; true BSR 0.3 and 0.2."""
    counted = np.stack([alike(draw, 0.7, question, n_questions, 0.9) for _ in range(2)])
    hits = np.stack([alike(draw, rate, question, n_questions, 0.9) for rate in (0.3, 0.2)])
    return counted, hits & counted


def test_difference_of_two_models() -> None:
    """The bootstrap over questions; 300 data sets, since each takes hundreds of resamples."""
    draw = np.random.default_rng(10)
    held = np.zeros((300, 2), dtype=bool)
    for number in range(len(held)):
        question = np.repeat(np.arange(100), draw.integers(1, 5, 100))
        counted, hits = two_models(draw, question, 100)
        columns: tuple[Sequence[str], ...] = (
            [NAMES[index] for index in question],
            [str(row) for row in range(len(question))],
        )
        for column, clusters in enumerate(columns):
            bounds = compare_parts([PairedPart(hits, counted, clusters)], n_resamples=199, seed=number, test=False).ci
            assert bounds is not None
            held[number, column] = bounds[0] <= 0.1 <= bounds[1]
    assert 0.915 <= held[:, 0].mean() <= 0.985  # of 300 sets, and BCa from 199 draws: wider again
    assert held[:, 1].mean() < 0.87


def test_the_test_of_a_cue_holds_its_level_and_has_power() -> None:
    """800 pairs of a model that is right on 80 %, each text's score redrawn with noise; then the same with a small cue.

    Flips cannot be that test: with nothing but noise, McNemar's on right-to-wrong against wrong-to-right is significant nearly
    always, since more pairs can be lost than won.
    """
    draw = np.random.default_rng(11)
    n_sets, n_pairs = 150, 800
    questions = [NAMES[row % 400] for row in range(n_pairs)]
    found = np.zeros((n_sets, 3), dtype=bool)
    for number in range(n_sets):
        before = draw.normal(0.84 * 2**0.5, 2**0.5, n_pairs)  # the gap of two texts of SD 1: above zero in 80 %
        noise = draw.normal(0, 0.7 * 2**0.5, n_pairs)
        for column, cue in ((0, 0.0), (1, 0.15)):
            p = sign_flip_p((noise - cue).tolist(), questions, n_resamples=299, seed=number)
            found[number, column] = p is not None and p < 0.05
        flips = ((before > 0).astype(int) - (before + noise > 0)).tolist()
        p = paired_flip_p(flips, questions)
        found[number, 2] = p is not None and p < 0.05
    level, power, of_flips = found.mean(axis=0)
    assert level <= 0.09  # of 150 sets: two standard errors above 0.05
    assert power > 0.9
    assert of_flips > 0.6


def test_swaps_hold_their_level_for_models_of_unlike_accuracy() -> None:
    """Two models of one BSR, 0.3, right on 95 % and on 20 % of 400 pairs."""
    draw = np.random.default_rng(12)
    n_sets, n_pairs = 300, 400
    found = []
    for number in range(n_sets):
        counted = draw.random((2, n_pairs)) < np.array([[0.95], [0.2]])
        hits = counted & (draw.random((2, n_pairs)) < 0.3)
        p = compare_parts([PairedPart(hits, counted, NAMES[:n_pairs])], n_resamples=199, seed=number).p
        found.append(p is not None and p < 0.05)
    assert (
        np.mean(found) <= 0.075
    )  # two standard errors above 0.05; without its standard error the difference rejects 10 %
