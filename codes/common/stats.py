"""Rates and means with 95 % intervals, from scipy and statsmodels. No torch here.

Those two take seconds to load, so they are imported where something is computed: ``--help`` need not wait for them.

The unit of chance is the question, not the row: the same question stands in several evaluation files, so intervals are
clustered by it (``questions.question_key``, ``cluster_rate``). ``wilson`` is the plain interval for independent rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
# Sign flips that are computed together: bounds the memory, not the result.
_BATCH = 500


def cluster_index(clusters: Sequence[str]) -> np.ndarray:
    """Number of each row's cluster, int, shape ``(n_rows,)``; clusters are numbered as they come."""
    numbers: dict[str, int] = {}
    # Not numpy.unique: an array of texts takes the width of the longest question for every row.
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


@dataclass(frozen=True)
class Rate:
    """A rate in [0, 1] beside the counts that it comes from. All None where ``total`` is 0: 0/0 is no rate."""

    count: int
    total: int
    rate: float | None
    ci_low: float | None
    ci_high: float | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a results file."""
        return asdict(self)


def wilson(count: int, total: int) -> Rate:
    """Wilson score interval of a binomial rate.

    Raises:
        ValueError: ``count`` is not within [0, total].
    Source: Wilson 1927; ``statsmodels.stats.proportion.proportion_confint``.
    """
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is not within 0 and {total}")
    if total == 0:
        return Rate(0, 0, None, None, None)
    low, high = wilson_bounds(count, total)
    return Rate(count, total, count / total, low, high)


def wilson_bounds(count: float, total: float) -> tuple[float, float]:
    """The Wilson interval of a rate; counts need not be whole (effective numbers of rows).

    Source: ``statsmodels.stats.proportion.proportion_confint``.
    """
    # Imported here: it takes a second, and --help needs none of it.
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, total, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def t_quantile(degrees_of_freedom: int) -> float:
    """Half-width of a 95 % interval in standard errors, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees_of_freedom))


def t_shrinkage(n_clusters: int) -> float:
    """What an effective number of rows is multiplied by so that a normal interval becomes one of t: (z / t)^2."""
    from scipy.stats import norm

    return float((norm.ppf(0.5 + CONFIDENCE / 2) / t_quantile(n_clusters - 1)) ** 2)


def cluster_rate(numerators: Sequence[int], denominators: Sequence[int], clusters: Sequence[str]) -> Rate:
    """A ratio of sums with an interval that allows for clusters of dependent rows.

    The linearised (Taylor) variance of the ratio estimator with clusters as primary sampling units turns into an effective
    number of independent rows; the Wilson interval is taken at that number. So the interval stays within [0, 1] and has
    width at rates of 0 and 1. Clusters of one row each give about the plain Wilson interval.

    Args:
        numerators: 0/1 per row: the event.
        denominators: 0/1 per row: whether the row counts. A row outside the denominator adds nothing.
        clusters: The question of each row.
    Source: Cochran, Sampling Techniques, 3rd ed., section 6; Kish's design effect; Korn and Graubard 1998 for the
        effective-sample-size interval of a proportion.
    """
    if not len(numerators) == len(denominators) == len(clusters):
        raise ValueError("numerators, denominators and clusters differ in length")
    x = np.asarray(numerators, dtype=float)
    y = np.asarray(denominators, dtype=float)
    if np.any((x > 0) & (y == 0)):
        raise ValueError("a numerator outside its denominator")
    count, total = int(x.sum()), int(y.sum())
    if total == 0:
        return Rate(0, 0, None, None, None)
    rate = count / total
    index = cluster_index(clusters)
    counted = np.unique(index[y > 0])
    n_clusters = len(counted)
    plain = wilson(count, total)
    if n_clusters < 2:
        # One cluster says nothing about its own spread: the honest interval is that of a single draw.
        return Rate(count, total, rate, *wilson_bounds(rate, 1))
    if 0 < count < total:
        residual = np.bincount(index, weights=x - rate * y)[counted]
        variance = n_clusters / (n_clusters - 1) * float((residual**2).sum()) / total**2
        design_effect = variance / (rate * (1 - rate) / total)
    else:
        # No spread to see: take the most dependent case, one independent answer a cluster.
        design_effect = total / n_clusters
    # A design effect below 1 (clusters more alike than chance) is noise here: never narrower than independent rows.
    effective = total / max(1.0, design_effect)
    # Student's t instead of the normal for few clusters: scale the effective number accordingly.
    effective *= t_shrinkage(n_clusters)
    return Rate(count, total, plain.rate, *wilson_bounds(rate * effective, effective))


def mean_interval(values: Sequence[float], clusters: Sequence[str] | None = None) -> dict[str, Any]:
    """Mean, SD and t interval; clustered by question where ``clusters`` is given.

    Returns:
        ``{"mean", "sd", "n", "ci_low", "ci_high"}``; None where the values do not determine it.
    """
    data = np.asarray(values, dtype=float)
    n = len(data)
    empty: dict[str, Any] = {"mean": None, "sd": None, "n": n, "ci_low": None, "ci_high": None}
    if n == 0:
        return empty
    mean = float(data.mean())
    if n == 1:
        return empty | {"mean": mean}
    sd = float(data.std(ddof=1))
    index = np.arange(n) if clusters is None else cluster_index(clusters)
    sums = np.bincount(index, weights=data - mean)
    n_clusters = len(sums)
    if n_clusters < 2:
        return empty | {"mean": mean, "sd": sd}
    error = math.sqrt(n_clusters / (n_clusters - 1) * float((sums**2).sum())) / n
    half = t_quantile(n_clusters - 1) * error
    return {"mean": mean, "sd": sd, "n": n, "ci_low": mean - half, "ci_high": mean + half}


def sign_flip_p(
    values: Sequence[float], clusters: Sequence[str], *, n_resamples: int = 1999, seed: int = 42
) -> float | None:
    """Two-sided p of "nothing moved": a question's values together are as likely as their negatives.

    Exact where the questions' signs can be gone through within ``n_resamples``, else from that many random ones.

    Returns:
        The p; None without a value that differs from zero.
    Source: Fisher's randomisation test; ``scipy.stats.permutation_test``.
    """
    sums = np.bincount(cluster_index(clusters), weights=np.asarray(values, dtype=float)) if len(values) else np.zeros(0)
    if not np.any(sums):
        return None if not np.any(values) else 1.0
    if len(sums) == 1:
        return 1.0  # one question: its two signs are all that there is
    from scipy.stats import permutation_test

    result = permutation_test(
        (sums,),
        lambda signed, axis: signed.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
