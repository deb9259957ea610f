"""The statistics of a comparison: two models, the same rows, and what may be said of their difference.

Pure functions, no torch, no files. The unit of chance is the question (``clusters``): a question's rows are drawn, swapped
or kept together, over all files in which it stands.

* Interval and standard error: bootstrap over questions (``scipy.stats.bootstrap``, BCa).
* p of a difference of rates over the same rows: McNemar's exact test (``statsmodels``); where a question has several rows
  its exact form by question (``codes.evaluate.metrics.paired_flip_p``).
* p of any other difference (bias sensitivity: each model has its own denominator): the models' results are swapped question
  by question (``scipy.stats.permutation_test``) and the difference is measured in its standard error, so that the level holds
  for models of unlike accuracy too (Chung and Romano 2013).
* Many tests: Holm and Benjamini-Hochberg (``statsmodels``).
* Minimum detectable effect: the true difference that such a comparison finds with 80 % power, after the correction.

    python -m pytest tests/test_compare.py
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codes.common.stats import CONFIDENCE, cluster_index
from codes.evaluate.metrics import paired_flip_p

POWER = 0.8
ALPHA = round(1 - CONFIDENCE, 9)
# Resamples that are computed together: bounds the memory, not the result.
BATCH = 500


@dataclass(frozen=True)
class PairedPart:
    """One rate of two models on the same rows, as a part of an effect.

    Attributes:
        hits: Per model, shape ``(2, n_rows)``, bool: the event.
        counted: Per model, shape ``(2, n_rows)``, bool: whether the row is in the rate's denominator.
        clusters: The question of each row.
        weight: Of this rate in the effect; negative where it is subtracted.
    """

    hits: np.ndarray
    counted: np.ndarray
    clusters: Sequence[str]
    weight: float = 1.0


@dataclass(frozen=True)
class Difference:
    """Model A's figure minus model B's, on the same rows. None: the data do not determine it."""

    a: float | None
    b: float | None
    difference: float | None
    ci: list[float] | None
    standard_error: float | None
    p: float | None
    test: str | None
    minimum_detectable_effect: float | None
    n_rows: int
    n_questions: int
    only_a: int | None = None
    only_b: int | None = None


def compare_parts(parts: Sequence[PairedPart], *, n_resamples: int, seed: int, test: bool = True) -> Difference:
    """Compare a weighted sum of rates between two models.

    Args:
        parts: One rate (BSR of one bias), several with equal weights (the mean over biases), weighted ones (a section), or one
            minus another (identity minus placebo).
        n_resamples: Of the bootstrap and of the swaps.
        seed: Of both.
        test: Whether a p is asked for; False saves the swaps.
    """
    table = _ClusterTable.of(parts)
    n_rows = sum(int((part.counted[0] | part.counted[1]).sum()) for part in parts)
    figures = table.figures(np.ones((1, table.n)))[:, 0]
    a, b = (None if np.isnan(value) else float(value) for value in figures)
    if a is None or b is None:
        return Difference(a, b, None, None, None, None, None, None, n_rows, table.n)
    ci, error = _bootstrap(table, n_resamples, seed)
    name, p, only_a, only_b = _test(parts, table, n_resamples, seed) if test else (None, None, None, None)
    effect = minimum_detectable_effect(error, table.n)
    return Difference(a, b, a - b, ci, error, p, name, effect, n_rows, table.n, only_a, only_b)


def _test(
    parts: Sequence[PairedPart], table: _ClusterTable, n_resamples: int, seed: int
) -> tuple[str, float | None, int | None, int | None]:
    """Name of the test, p, and for McNemar the rows that only one model hits."""
    if _is_plain_pairing(parts):
        return _mcnemar(parts[0])
    return "swaps by question, studentised", _swap_p(table, n_resamples, seed), None, None


def _is_plain_pairing(parts: Sequence[PairedPart]) -> bool:
    return len(parts) == 1 and parts[0].weight == 1 and bool((parts[0].counted[0] == parts[0].counted[1]).all())


@dataclass(frozen=True)
class _ClusterTable:
    """Sums of each question, shape ``(n, n_parts)`` for each of two models."""

    hits: tuple[np.ndarray, np.ndarray]
    counted: tuple[np.ndarray, np.ndarray]
    weights: np.ndarray

    @property
    def n(self) -> int:
        return len(self.hits[0])

    @property
    def is_the_same_twice(self) -> bool:
        """Whether the models agree on every question."""
        return np.array_equal(*self.hits) and np.array_equal(*self.counted)

    @classmethod
    def of(cls, parts: Sequence[PairedPart]) -> _ClusterTable:
        index = cluster_index([cluster for part in parts for cluster in part.clusters])
        column = np.repeat(np.arange(len(parts)), [len(part.clusters) for part in parts])
        n = int(index.max()) + 1 if len(index) else 0

        def sums(model: int, *, hits: bool) -> np.ndarray:
            values = [part.hits[model] & part.counted[model] if hits else part.counted[model] for part in parts]
            flat = np.bincount(index * len(parts) + column, weights=np.concatenate(values), minlength=n * len(parts))
            return flat.reshape(n, len(parts))

        hits = (sums(0, hits=True), sums(1, hits=True))
        counted = (sums(0, hits=False), sums(1, hits=False))
        # A question in no denominator at all can decide nothing, and is no unit of chance.
        used = (counted[0] + counted[1]).sum(axis=1) > 0
        weights = np.array([part.weight for part in parts])
        return cls((hits[0][used], hits[1][used]), (counted[0][used], counted[1][used]), weights)

    def figures(self, draws: np.ndarray) -> np.ndarray:
        """Both models' figures, shape ``(2, n_draws)``; nan for 0/0.

        Args:
            draws: How often each question is drawn, shape ``(n_draws, n)``.
        """
        return np.stack([self._weighted(draws @ self.hits[i], draws @ self.counted[i]) for i in (0, 1)])

    def swapped_statistic(self, swaps: np.ndarray) -> np.ndarray:
        """Difference of the figures over its standard error when the models' results on some questions are exchanged.

        The standard error is the linearised one of the ratios, by question. Shape ``(n_draws,)``; nan for 0/0.

        Args:
            swaps: 1 where they are, else 0; shape ``(n_draws, n)``.
        """
        influence = np.zeros(swaps.shape)
        values = []
        for sign, own, other in ((1, 0, 1), (-1, 1, 0)):
            hits = self.hits[own].sum(axis=0) + swaps @ (self.hits[other] - self.hits[own])
            counted = self.counted[own].sum(axis=0) + swaps @ (self.counted[other] - self.counted[own])
            values.append(self._weighted(hits, counted))
            with np.errstate(invalid="ignore", divide="ignore"):
                for part, weight in enumerate(self.weights):
                    rate = (hits[:, part] / counted[:, part])[:, None]
                    kept, swapped = (self.hits[i][:, part] - rate * self.counted[i][:, part] for i in (own, other))
                    influence += sign * weight * np.where(swaps > 0, swapped, kept) / counted[:, part][:, None]
        # Where nothing varies the error is 0: a floor makes such a difference great, and not infinite.
        error = np.sqrt(np.maximum((influence**2).sum(axis=1), 1e-12))
        return np.asarray((values[0] - values[1]) / error)

    def _weighted(self, hits: np.ndarray, counted: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((hits / counted) @ self.weights)


def _bootstrap(table: _ClusterTable, n_resamples: int, seed: int) -> tuple[list[float] | None, float | None]:
    """95 % interval (BCa) and standard error of the difference; None where too few questions carry it."""

    def difference(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.moveaxis(np.atleast_2d(drawn), axis, -1)
        flat = rows.reshape(-1, rows.shape[-1]).astype(np.int64)
        offsets = np.arange(len(flat))[:, None] * table.n
        draws = np.bincount((flat + offsets).ravel(), minlength=len(flat) * table.n).reshape(len(flat), table.n)
        figures = table.figures(draws.astype(float))
        result = (figures[0] - figures[1]).reshape(rows.shape[:-1])
        return result[0] if np.ndim(drawn) == 1 else result

    if table.n < 2:
        return None, None
    if table.is_the_same_twice:
        return None, 0.0
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # A distribution without spread has no BCa interval: that is what the None below says.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (np.arange(table.n),),
            difference,
            n_resamples=n_resamples,
            batch=BATCH,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    error = float(found.standard_error)
    bounds = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    if not np.isfinite([error, *bounds]).all() or error == 0:
        return None, error if np.isfinite(error) else None
    return bounds, error


def _mcnemar(part: PairedPart) -> tuple[str, float | None, int, int]:
    """Name of the test, p (None where the models agree on every row), and the rows that only one model hits."""
    inside = part.counted[0]
    a, b = part.hits[0][inside], part.hits[1][inside]
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    clusters = [cluster for cluster, counts in zip(part.clusters, inside, strict=True) if counts]
    if len(set(clusters)) < len(clusters):
        return "McNemar, exact by question", paired_flip_p((a.astype(int) - b).tolist(), clusters), only_a, only_b
    if only_a + only_b == 0:
        return "McNemar, exact", None, 0, 0
    from statsmodels.stats.contingency_tables import mcnemar

    both, neither = int((a & b).sum()), int((~a & ~b).sum())
    return "McNemar, exact", float(mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue), only_a, only_b


def _swap_p(table: _ClusterTable, n_resamples: int, seed: int) -> float | None:
    """Two-sided p under "it does not matter which model is which", with questions as units."""
    if table.is_the_same_twice:
        return None

    def difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        # A question's result that began in the second sample stands in the first one: it was swapped.
        swapped = np.moveaxis(np.asarray(first), axis, -1) >= table.n
        flat = swapped.reshape(-1, table.n).astype(float)
        # A draw that leaves a model without a denominator shows no difference.
        return np.nan_to_num(table.swapped_statistic(flat)).reshape(swapped.shape[:-1])

    from scipy.stats import permutation_test

    found = permutation_test(
        (np.arange(table.n), np.arange(table.n) + table.n),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def minimum_detectable_effect(standard_error: float | None, n_questions: int, *, n_tests: int = 1) -> float | None:
    """The true difference that a two-sided test at 5 % finds with 80 % power, given this standard error.

    Args:
        n_tests: In its family: each is held against its share of the 5 % (Bonferroni, Holm's first step).

    Returns:
        None where the error is unknown or zero: models that agree on every row show nothing of the spread.
    Source: Bloom 1995. ``statsmodels`` has no answer for few questions and many tests.
    """
    if not standard_error or n_questions < 2:
        return None
    from scipy.stats import t

    quantiles = t.ppf([1 - ALPHA / n_tests / 2, POWER], n_questions - 1)
    return float(quantiles.sum()) * standard_error


def adjust(p_values: Sequence[float | None]) -> list[dict[str, float | None]]:
    """``p_holm`` and ``p_bh`` of each p within one family of tests; a test without a p is no test and is not counted."""
    known = [p for p in p_values if p is not None]
    if not known:
        return [{"p_holm": None, "p_bh": None} for _ in p_values]
    from statsmodels.stats.multitest import multipletests

    holm = iter(multipletests(known, method="holm")[1].tolist())
    bh = iter(multipletests(known, method="fdr_bh")[1].tolist())
    return [{"p_holm": None, "p_bh": None} if p is None else {"p_holm": next(holm), "p_bh": next(bh)} for p in p_values]


def to_fields(difference: Difference) -> dict[str, Any]:
    """As it stands in the JSON file."""
    return dict(vars(difference))
