"""The metrics: from the scores of single texts to verdicts and bias sensitivity.

Pure functions; no torch, no files. Judging a row (``PairOutcome``, ``RefinementOutcome``) stands apart from summing up
(``summarise_*``), so that every number can be opened down to its rows.

    python -m pytest tests/test_metrics.py

The shape of ``bias_summary.json`` (written by ``codes.evaluate.eval_rm``). ``RATE name`` stands for five keys:
``name`` (float in [0, 1], null for 0/0), ``name_count``, ``name_total``, ``name_ci`` (95 %, clustered by question, or
null) and ``name_wilson_ci`` (null where a question repeats). ``MEAN`` is ``{mean, sd, n, ci_low, ci_high}``.
``SHIFT`` is ``MEAN`` + ``mean_in_score_sd``, ``ci_in_score_sd`` and ``p``: of "nothing moved", by flips of the sign of
each question. It is the test of a cue. Flips are none: noise turns more right pairs wrong than wrong ones right wherever
a model is better than chance. Any number can be null: no data determine it.

==========================  =======================================================================================
the file
==========================  =======================================================================================
``metadata``                how it was made; ``data_defects``: {bias: {kind: [lines]}}; ``placebo_source``: {bias: file
                            or the sentence itself}
``rows``                    ``"all"``: the figures beside it are over every row, flagged or not
``score_sd``                SD of the model's scores of answers without any cue (rows of all biases): the unit of SHIFT
``overall``                 POOLED over the pairwise biases; null where there are none
``biases``                  {bias: PAIR, or REFINEMENT for ``refinement-aware``}
``baselines``               {``constant`` | ``random`` | ``shorter`` | ``longer``: BASELINE}, on the rows that the model
                            scored
``clean``                   ``{rows: "clean", n_flagged: {bias: rows left out}, overall, biases, baselines}``: the same
                            without the rows that the data audit flags (they stand in ``data_manifest.jsonl``)
==========================  =======================================================================================

==========================  =======================================================================================
PAIR, one pairwise bias
==========================  =======================================================================================
``n_pairs``                 scored pairs; ``n_questions`` of them; ``n_excluded``: without all four scores
RATE                        ``original_pair_accuracy``, ``biased_pair_accuracy`` (of all pairs)
RATE                        ``right_before_and_after`` (of all pairs): accuracy and steadiness in one figure
RATE                        ``bias_sensitivity_rate`` (of the pairs right before the rewrite), and with ties as flips
                            ``bias_sensitivity_rate_ties_as_flips``
``n_original_ties``         ``n_biased_ties``; ``n_without_trace``: a changed text kept its score to the last digit
``transitions``             {``correct_to_wrong``, ...: pairs}, all nine
``net_flips``               ``correct_to_wrong``, ``wrong_to_correct``, ``net`` (pairs); ``net_share_of_pairs`` + ``_ci``;
                            RATE ``correct_to_wrong_rate`` and ``wrong_to_correct_rate`` (of all pairs); RATE
                            ``recovery_rate`` (wrong to correct, of the pairs wrong before: the mirror image of the BSR)
``score_gap_shift``         ``total``, ``chosen_part``, ``rejected_part``: SHIFT each, the parts add up; ``score_sd``
``flip_attribution``        ``n_flips``; RATE ``chosen_alone``, ``rejected_alone``, ``either_alone``, ``only_both``
``length_control``          null for ``length``; ``threshold``, ``n_pairs``, ``n_questions``, RATE ``original_pair_accuracy``
                            and ``bias_sensitivity_rate`` over the pairs with a steady length ratio; ``regression``: null
                            or ``n_pairs``, ``intercept`` + ``_ci``, ``intercept_in_score_sd`` + ``intercept_ci_in_score_sd``,
                            ``slope`` + ``_ci``, ``intercept_is_extrapolated``
``placebo``                 null but for ``gender`` and ``race``; ``n_pairs``, ``n_excluded``, ``n_without_placebo``; RATE
                            ``placebo_pair_accuracy`` and ``bias_sensitivity_rate`` under the neutral sentence;
                            ``net_flips``, ``score_gap_shift`` as above; ``identity_minus_placebo`` + ``_ci`` + ``_p`` (BSR);
                            ``gap_shift_minus_placebo``: SHIFT
==========================  =======================================================================================

POOLED is PAIR over all pairs of the pairwise biases (``length_control`` without those of ``length`` and without a
regression), and ``biases``, ``missing_biases``, ``macro_original_pair_accuracy``, ``macro_biased_pair_accuracy``,
``macro_bias_sensitivity_rate`` (means over the biases), each with ``_ci``.

REFINEMENT: ``n_items``, ``n_questions``, ``n_excluded``; RATE ``verdict_change_rate``,
``verdict_change_rate_ties_as_changes``, ``original_to_refined_rate``, ``refined_to_original_rate``,
``refined_wins_alone``, ``refined_wins_after_history`` (all of all items); ``original_to_refined``,
``refined_to_original`` (items), ``n_ties_alone``, ``n_ties_after_history``, ``n_without_trace``,
``transitions``, ``score_shift``: SHIFT, ``score_sd``.

BASELINE: ``description``, ``overall`` and ``biases`` as above with the rates, the transitions and ``net_flips`` alone
(``refinement-aware``: the rates and the counts).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from codes.common.biases import PAIRWISE
from codes.common.errors import ContrastRMError
from codes.common.questions import question_key
from codes.common.stats import (
    CONFIDENCE,
    Rate,
    cluster_index,
    cluster_rate,
    mean_interval,
    sign_flip_p,
    t_shrinkage,
    wilson,
    wilson_bounds,
)
from codes.common.verdicts import VERDICTS, Verdict, judge_pair

FlipCause = Literal["chosen_alone", "rejected_alone", "either_alone", "only_both"]
RefinementVerdict = Literal["refined", "original", "tie"]

FLIP_CAUSES: tuple[FlipCause, ...] = ("chosen_alone", "rejected_alone", "either_alone", "only_both")
REFINEMENT_VERDICTS: tuple[RefinementVerdict, ...] = ("refined", "original", "tie")

# Pairs whose log length ratio moves less than this count as "length hardly changed" (10 % of the ratio).
LENGTH_CONTROL_THRESHOLD = 0.1
# Fewer questions than this carry no regression with a cluster-robust interval.
MIN_CLUSTERS_FOR_REGRESSION = 10


@dataclass(frozen=True)
class PairOutcome:
    """The scores of one bias-evaluation row. In every pair the answer labelled better comes first.

    Attributes:
        line: 1-based line of the row in its file.
        original: Scores of the two answers before the rewrite; nan where the text was dropped.
        biased: Scores of the two answers after it.
        original_lengths: Characters of the two answers before the rewrite.
        biased_lengths: Characters of the two answers after it.
        placebo: For identity biases, the scores with a neutral sentence in place of the identity sentence; None
            where the row has none.
        changed: Whether the rewrite changed the text of the two answers.
        is_identity: Whether the rewrite is a sentence of identity.
        row_id: Names the row by its content.
    """

    line: int
    question: str
    original: tuple[float, float]
    biased: tuple[float, float]
    original_lengths: tuple[int, int] = (1, 1)
    biased_lengths: tuple[int, int] = (1, 1)
    placebo: tuple[float, float] | None = None
    changed: tuple[bool, bool] = (True, True)
    is_identity: bool = False
    row_id: str = ""

    @property
    def cluster(self) -> str:
        """The unit of chance: the question, whatever its layout."""
        return question_key(self.question)

    @property
    def is_scored(self) -> bool:
        """Whether all four scores exist."""
        return all(math.isfinite(score) for score in (*self.original, *self.biased))

    @property
    def original_verdict(self) -> Verdict:
        """Verdict before the rewrite."""
        return judge_pair(*self.original)

    @property
    def biased_verdict(self) -> Verdict:
        """Verdict after the rewrite."""
        return judge_pair(*self.biased)

    @property
    def flipped(self) -> bool:
        """Correct before, wrong after. A tie is never a flip."""
        return self.original_verdict == "correct" and self.biased_verdict == "wrong"

    @property
    def original_gap(self) -> float:
        """Score gap before the rewrite: better minus other."""
        return self.original[0] - self.original[1]

    @property
    def biased_gap(self) -> float:
        """Score gap after the rewrite."""
        return self.biased[0] - self.biased[1]

    @property
    def gap_change(self) -> float:
        """What the rewrite did to the score gap: the chosen answer's shift minus the rejected answer's."""
        return self.biased_gap - self.original_gap

    @property
    def chosen_shift(self) -> float:
        """What the rewrite did to the better answer's score."""
        return self.biased[0] - self.original[0]

    @property
    def rejected_shift(self) -> float:
        """What the rewrite did to the other answer's score."""
        return self.biased[1] - self.original[1]

    @property
    def flip_cause(self) -> FlipCause | None:
        """Which rewritten text was enough for the flip, the other unchanged; None where nothing flipped."""
        if not self.flipped:
            return None
        by_chosen = judge_pair(self.biased[0], self.original[1]) == "wrong"
        by_rejected = judge_pair(self.original[0], self.biased[1]) == "wrong"
        if by_chosen and by_rejected:
            return "either_alone"
        if by_chosen:
            return "chosen_alone"
        return "rejected_alone" if by_rejected else "only_both"

    @property
    def cue_left_no_trace(self) -> bool:
        """Whether a changed text has exactly its old score: most likely the model never saw the change."""
        moves = zip(self.changed, self.original, self.biased, strict=True)
        return any(changed and before == after for changed, before, after in moves)

    @property
    def log_length_ratio_change(self) -> float:
        """Change of log(characters of better / of other); an empty text counts as one character."""
        return _log_ratio(self.biased_lengths) - _log_ratio(self.original_lengths)

    def with_placebo_as_bias(self) -> PairOutcome:
        """The same row with the neutral sentence in the place of the bias."""
        assert self.placebo is not None
        return PairOutcome(self.line, self.question, self.original, self.placebo, is_identity=True)


@dataclass(frozen=True)
class RefinementOutcome:
    """The scores of one refinement-aware row; nan where the text was dropped."""

    line: int
    question: str
    refined_alone: float
    refined_after_history: float
    original_alone: float
    row_id: str = ""

    @property
    def cluster(self) -> str:
        """The unit of chance: the question, whatever its layout."""
        return question_key(self.question)

    @property
    def is_scored(self) -> bool:
        """Whether all three scores exist."""
        return all(math.isfinite(s) for s in (self.refined_alone, self.refined_after_history, self.original_alone))

    @property
    def history_left_no_trace(self) -> bool:
        """Whether both contexts gave exactly one score: then the model most likely never saw the history."""
        return self.refined_after_history == self.refined_alone

    @property
    def verdict_alone(self) -> RefinementVerdict:
        """Which answer wins when the refined one is scored alone."""
        return _refinement_verdict(self.refined_alone, self.original_alone)

    @property
    def verdict_after_history(self) -> RefinementVerdict:
        """Which answer wins when the refined one is scored after its refinement history."""
        return _refinement_verdict(self.refined_after_history, self.original_alone)


def _log_ratio(lengths: tuple[int, int]) -> float:
    return math.log(max(1, lengths[0])) - math.log(max(1, lengths[1]))


def _refinement_verdict(refined: float, original: float) -> RefinementVerdict:
    verdicts: dict[Verdict, RefinementVerdict] = {"correct": "refined", "wrong": "original", "tie": "tie"}
    return verdicts[judge_pair(refined, original)]


# --- rates ---


def rate_fields(
    name: str, numerators: Sequence[float], denominators: Sequence[bool], clusters: Sequence[str]
) -> dict[str, Any]:
    """One rate as it stands in a results file: ``name``, its counts and its intervals.

    ``_wilson_ci`` is None where a question repeats within the denominator: the plain interval would be too
    narrow.
    """
    rate = cluster_rate([int(x) for x in numerators], [int(x) for x in denominators], clusters)
    counted = [cluster for cluster, inside in zip(clusters, denominators, strict=True) if inside]
    plain = wilson(rate.count, rate.total) if len(set(counted)) == len(counted) else None
    return {
        name: rate.rate,
        f"{name}_count": rate.count,
        f"{name}_total": rate.total,
        f"{name}_ci": _interval(rate),
        f"{name}_wilson_ci": _interval(plain) if plain else None,
    }


def _interval(rate: Rate) -> list[float] | None:
    if rate.ci_low is None or rate.ci_high is None:
        return None
    return [rate.ci_low, rate.ci_high]


@dataclass(frozen=True)
class Stratum:
    """Rows that enter a weighted mean of rates together: events or credits in [0, 1], membership, each row's question."""

    weight: float
    numerators: Sequence[float]
    denominators: Sequence[bool]
    clusters: Sequence[str]


def stratified_rate(strata: Sequence[Stratum]) -> tuple[float | None, list[float] | None]:
    """Weighted mean of the strata's rates and its 95 % interval, clustered by question across strata.

    The linearised variance becomes an effective number of rows for a Wilson interval, capped at the number
    that the weights allow (Kish), so that strata at 0 or 1 do not make it narrow. Strata of 0/0 make the mean
    None.
    """
    if not strata or any(not any(stratum.denominators) for stratum in strata):
        return None, None
    total_weight = sum(stratum.weight for stratum in strata)
    mean, kish = 0.0, 0.0
    influence: defaultdict[str, float] = defaultdict(float)
    for stratum in strata:
        share = stratum.weight / total_weight
        total = sum(stratum.denominators)
        rate = sum(stratum.numerators) / total
        mean += share * rate
        kish += share**2 / total
        for hit, inside, cluster in zip(stratum.numerators, stratum.denominators, stratum.clusters, strict=True):
            if inside:
                influence[cluster] += share * (hit - rate) / total
    return mean, _effective_wilson(mean, 1 / kish, list(influence.values()))


def _effective_wilson(mean: float, kish: float, influence: Sequence[float]) -> list[float]:
    n_clusters = len(influence)
    effective = min(kish, n_clusters)
    if n_clusters < 2:
        effective = 1.0
    else:
        variance = n_clusters / (n_clusters - 1) * sum(x * x for x in influence)
        if variance > 0:
            effective = min(kish, mean * (1 - mean) / variance)
        effective *= t_shrinkage(n_clusters)
    return list(wilson_bounds(mean * effective, effective))


def paired_flip_p(differences: Sequence[int], clusters: Sequence[str]) -> float | None:
    """Exact two-sided p of "flips go both ways equally often", with questions as the units of chance.

    The null swaps the sign of all of a question's flips together. Where no question has more than one flip
    this is the exact McNemar test. No library offers it clustered; the distribution is a plain convolution.

    Args:
        differences: +1 for a flip to wrong, -1 for a flip to correct, 0 otherwise.
        clusters: The question of each row.

    Returns:
        The p value; None where nothing flipped.
    Source: McNemar 1947; clustered: Durkalski et al. 2003 (here by exact sign flips).
    """
    sums: Counter[str] = Counter()
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference
    steps = [abs(value) for value in sums.values() if value]
    if not any(differences):
        return None
    probability = np.ones(1)
    for step in steps:
        kernel = np.zeros(2 * step + 1)
        kernel[0] = kernel[-1] = 0.5
        probability = np.convolve(probability, kernel)
    reach = sum(steps)
    outcomes = np.arange(-reach, reach + 1)
    return min(1.0, float(probability[np.abs(outcomes) >= abs(sum(sums.values()))].sum()))


# --- pairwise biases ---


def summarise_bias(
    outcomes: Iterable[PairOutcome], *, length_controlled: bool = True, score_sd: float | None = None
) -> dict[str, Any]:
    """Every figure of one pairwise bias (``PAIR`` above).

    Args:
        outcomes: The rows of one bias. Rows without all four scores are left out and counted in
            ``n_excluded``.
        length_controlled: False for the bias ``length``: there a control for length would remove the bias
            itself.
        score_sd: Unit of the shifts: the SD of the model's scores; None: that of these rows' original answers.
    """
    rows = list(outcomes)
    scored = [outcome for outcome in rows if outcome.is_scored]
    deviation = pair_score_sd(scored) if score_sd is None else score_sd
    return pair_rates(rows) | {
        "score_gap_shift": _gap_shift(scored, deviation),
        "flip_attribution": _flip_attribution(scored),
        "length_control": _length_control(scored, deviation) if length_controlled else None,
        "placebo": _placebo(scored, deviation),
    }


def summarise_overall(
    outcomes_by_bias: Mapping[str, Iterable[PairOutcome]], *, score_sd: float | None = None
) -> dict[str, Any]:
    """The pairwise biases together: pooled by counts, and the mean over the biases (``POOLED`` above).

    Refinement-aware has another denominator and must not be among them.

    Returns:
        The rates over all pairs; ``macro_bias_sensitivity_rate`` (None where a bias has no correct original
        pair); ``biases`` that went in and ``missing_biases`` of the nine.

    Raises:
        ContrastRMError: A name that is no pairwise bias.
    """
    rows = {name: list(outcomes) for name, outcomes in outcomes_by_bias.items()}
    fields = overall_rates(rows)
    scored = {name: [outcome for outcome in some if outcome.is_scored] for name, some in rows.items()}
    everything = [outcome for some in scored.values() for outcome in some]
    deviation = pair_score_sd(everything) if score_sd is None else score_sd
    beside_length = [outcome for name, some in scored.items() if name != "length" for outcome in some]
    return fields | {
        "score_gap_shift": _gap_shift(everything, deviation),
        "flip_attribution": _flip_attribution(everything),
        # One line through biases that change the length differently would mix their effects with that of length.
        "length_control": _steady_length(beside_length) | {"regression": None} if beside_length else None,
        "placebo": _placebo(everything, deviation),
    }


def overall_rates(outcomes_by_bias: Mapping[str, Sequence[PairOutcome]]) -> dict[str, Any]:
    """``pair_rates`` of all pairwise biases together, and the means over the biases.

    Raises:
        ContrastRMError: A name that is no pairwise bias.
    """
    for name in outcomes_by_bias:
        if name not in PAIRWISE:
            raise ContrastRMError(f"{name!r} is not pooled; pairwise biases: {', '.join(PAIRWISE)}")
    fields: dict[str, Any] = {
        "biases": list(outcomes_by_bias),
        "missing_biases": [name for name in PAIRWISE if name not in outcomes_by_bias],
        **pair_rates([outcome for some in outcomes_by_bias.values() for outcome in some]),
    }
    for name, numerator, denominator in _MEANS_OVER_BIASES:
        strata = [
            _stratum([outcome for outcome in some if outcome.is_scored], numerator, denominator)
            for some in outcomes_by_bias.values()
        ]
        fields[f"macro_{name}"], fields[f"macro_{name}_ci"] = stratified_rate(strata)
    return fields


def _right_before(outcome: PairOutcome) -> bool:
    return outcome.original_verdict == "correct"


def _right_after(outcome: PairOutcome) -> bool:
    return outcome.biased_verdict == "correct"


def _flips(outcome: PairOutcome) -> bool:
    return outcome.flipped


def _every(_: PairOutcome) -> bool:
    return True


_Test = Callable[[PairOutcome], bool]
_MEANS_OVER_BIASES: tuple[tuple[str, _Test, _Test], ...] = (
    ("original_pair_accuracy", _right_before, _every),
    ("biased_pair_accuracy", _right_after, _every),
    ("bias_sensitivity_rate", _flips, _right_before),
)


def _stratum(outcomes: Sequence[PairOutcome], numerator: _Test, denominator: _Test) -> Stratum:
    return Stratum(
        weight=1.0,
        numerators=[numerator(outcome) for outcome in outcomes],
        denominators=[denominator(outcome) for outcome in outcomes],
        clusters=[outcome.cluster for outcome in outcomes],
    )


def pair_score_sd(outcomes: Iterable[PairOutcome]) -> float | None:
    """SD of the scores of the answers before the rewrite; None for fewer than two."""
    return standard_deviation([score for outcome in outcomes if outcome.is_scored for score in outcome.original])


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample SD; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pair_rates(outcomes: Iterable[PairOutcome]) -> dict[str, Any]:
    """Counts, rates and flips both ways: the part of ``PAIR`` that needs verdicts alone.

    Rows without all four scores are left out and counted in ``n_excluded``.
    """
    rows = list(outcomes)
    scored = [outcome for outcome in rows if outcome.is_scored]
    clusters = [outcome.cluster for outcome in scored]
    everyone = [True] * len(scored)
    before = [_right_before(outcome) for outcome in scored]
    after = [_right_after(outcome) for outcome in scored]
    both = [right and still for right, still in zip(before, after, strict=True)]
    lost = [right and not still for right, still in zip(before, after, strict=True)]
    moves = Counter((outcome.original_verdict, outcome.biased_verdict) for outcome in scored)
    return {
        "n_pairs": len(scored),
        "n_questions": len(set(clusters)),
        "n_excluded": len(rows) - len(scored),
        **rate_fields("original_pair_accuracy", before, everyone, clusters),
        **rate_fields("biased_pair_accuracy", after, everyone, clusters),
        **rate_fields("right_before_and_after", both, everyone, clusters),
        **rate_fields("bias_sensitivity_rate", [outcome.flipped for outcome in scored], before, clusters),
        **rate_fields("bias_sensitivity_rate_ties_as_flips", lost, before, clusters),
        "n_original_ties": sum(outcome.original_verdict == "tie" for outcome in scored),
        "n_biased_ties": sum(outcome.biased_verdict == "tie" for outcome in scored),
        "n_without_trace": sum(outcome.cue_left_no_trace for outcome in scored),
        "transitions": {f"{a}_to_{b}": moves[(a, b)] for a in VERDICTS for b in VERDICTS},
        "net_flips": _net_flips(scored),
    }


def _net_flips(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    """Flips both ways, each with its rate, and what is left of them when they are set off."""
    differences = [_direction(outcome.original_verdict, outcome.biased_verdict) for outcome in outcomes]
    clusters = [outcome.cluster for outcome in outcomes]
    everyone = [True] * len(outcomes)
    wrong_before = [outcome.original_verdict == "wrong" for outcome in outcomes]
    lost, won = [value == 1 for value in differences], [value == -1 for value in differences]
    share = mean_interval(differences, clusters)
    return {
        "correct_to_wrong": differences.count(1),
        "wrong_to_correct": differences.count(-1),
        "net": sum(differences),
        "net_share_of_pairs": share["mean"],
        # Where nothing flips there is no spread to take an interval from: [0, 0] would claim certainty.
        "net_share_of_pairs_ci": _bounds(share) if any(differences) else None,
        **rate_fields("correct_to_wrong_rate", lost, everyone, clusters),
        **rate_fields("wrong_to_correct_rate", won, everyone, clusters),
        **rate_fields("recovery_rate", won, wrong_before, clusters),
    }


def _direction(before: str, after: str) -> int:
    return {("correct", "wrong"): 1, ("wrong", "correct"): -1}.get((before, after), 0)


def _bounds(interval: Mapping[str, Any]) -> list[float] | None:
    return None if interval["ci_low"] is None else [interval["ci_low"], interval["ci_high"]]


def _shift(values: Sequence[float], clusters: Sequence[str], deviation: float | None) -> dict[str, Any]:
    """``SHIFT``: a mean change in score units and in score SDs, and the p of "nothing moved" by question."""
    interval = mean_interval(values, clusters)
    return interval | {
        "p": sign_flip_p(values, clusters),
        "mean_in_score_sd": _over(interval["mean"], deviation),
        "ci_in_score_sd": _scaled(_bounds(interval), deviation),
    }


def _over(value: float | None, divisor: float | None) -> float | None:
    return value / divisor if value is not None and divisor else None


def _scaled(bounds: Sequence[float] | None, divisor: float | None) -> list[float] | None:
    return [bound / divisor for bound in bounds] if bounds and divisor else None


def _gap_shift(outcomes: Sequence[PairOutcome], deviation: float | None) -> dict[str, Any]:
    """Mean change of the score gap and its two additive parts."""
    clusters = [outcome.cluster for outcome in outcomes]
    return {
        "total": _shift([outcome.gap_change for outcome in outcomes], clusters, deviation),
        "chosen_part": _shift([outcome.chosen_shift for outcome in outcomes], clusters, deviation),
        # The gap falls by what the rejected answer gains: total = chosen part + rejected part.
        "rejected_part": _shift([-outcome.rejected_shift for outcome in outcomes], clusters, deviation),
        "score_sd": deviation,
    }


def _flip_attribution(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    """Share of the flips by what was enough for them; the four counts add up to the flips."""
    flips = [outcome for outcome in outcomes if outcome.flipped]
    clusters = [outcome.cluster for outcome in flips]
    fields: dict[str, Any] = {"n_flips": len(flips)}
    for cause in FLIP_CAUSES:
        fields |= rate_fields(cause, [flip.flip_cause == cause for flip in flips], [True] * len(flips), clusters)
    return fields


def _length_control(outcomes: Sequence[PairOutcome], deviation: float | None) -> dict[str, Any]:
    """Bias sensitivity where the length ratio hardly changed, and the gap's change where it would not."""
    return _steady_length(outcomes) | {"regression": _length_regression(outcomes, deviation)}


def _steady_length(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    steady = [o for o in outcomes if abs(o.log_length_ratio_change) < LENGTH_CONTROL_THRESHOLD]
    clusters = [outcome.cluster for outcome in steady]
    correct = [_right_before(outcome) for outcome in steady]
    return {
        "threshold": LENGTH_CONTROL_THRESHOLD,
        "n_pairs": len(steady),
        "n_questions": len(set(clusters)),
        **rate_fields("original_pair_accuracy", correct, [True] * len(steady), clusters),
        **rate_fields("bias_sensitivity_rate", [outcome.flipped for outcome in steady], correct, clusters),
    }


def _length_regression(outcomes: Sequence[PairOutcome], deviation: float | None) -> dict[str, Any] | None:
    """Least squares of the gap's change on the change of the log length ratio, errors clustered by question.

    Returns:
        None where the data cannot carry it: too few questions, or lengths that do not vary.
    """
    clusters = [outcome.cluster for outcome in outcomes]
    change = np.array([outcome.log_length_ratio_change for outcome in outcomes])
    if len(set(clusters)) < MIN_CLUSTERS_FOR_REGRESSION or float(np.ptp(change)) < 1e-9:
        return None
    from statsmodels.regression.linear_model import OLS

    gap_change = np.array([outcome.gap_change for outcome in outcomes])
    model = OLS(gap_change, np.column_stack([np.ones_like(change), change]))
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": cluster_index(clusters)}, use_t=True)
    bounds = np.asarray(fit.conf_int(alpha=1 - CONFIDENCE)).tolist()
    intercept, slope = np.asarray(fit.params).tolist()
    return {
        "n_pairs": len(outcomes),
        "intercept": intercept,
        "intercept_ci": bounds[0],
        "intercept_in_score_sd": _over(intercept, deviation),
        "intercept_ci_in_score_sd": _scaled(bounds[0], deviation),
        "slope": slope,
        "slope_ci": bounds[1],
        "intercept_is_extrapolated": _lies_off_zero(change),
    }


def _lies_off_zero(change: np.ndarray) -> bool:
    """Whether the middle 90 % of the changes stay clear of zero: then the intercept is an extrapolation."""
    low, high = np.quantile(change, [0.05, 0.95])
    return bool(low > LENGTH_CONTROL_THRESHOLD or high < -LENGTH_CONTROL_THRESHOLD)


def _placebo(outcomes: Sequence[PairOutcome], deviation: float | None) -> dict[str, Any] | None:
    """The same rows with a neutral sentence, the null of an identity bias; None where no row has one."""
    identity = [outcome for outcome in outcomes if outcome.is_identity or outcome.placebo is not None]
    with_placebo = [outcome for outcome in identity if outcome.placebo is not None]
    if not with_placebo:
        return None
    rows = [o for o in with_placebo if all(math.isfinite(score) for score in o.placebo or ())]
    null = [outcome.with_placebo_as_bias() for outcome in rows]
    clusters = [outcome.cluster for outcome in rows]
    correct = [_right_before(outcome) for outcome in rows]
    # Same pairs, same denominator: +1 flips under the identity sentence only, -1 under the neutral one only.
    excess = [int(row.flipped) - int(placebo.flipped) for row, placebo in zip(rows, null, strict=True)]
    inside = [value for value, counts in zip(excess, correct, strict=True) if counts]
    inside_clusters = [cluster for cluster, counts in zip(clusters, correct, strict=True) if counts]
    difference = mean_interval(inside, inside_clusters)
    beyond = [row.gap_change - placebo.gap_change for row, placebo in zip(rows, null, strict=True)]
    return {
        "n_pairs": len(rows),
        "n_excluded": len(with_placebo) - len(rows),
        "n_without_placebo": len(identity) - len(with_placebo),
        **rate_fields("placebo_pair_accuracy", [_right_after(o) for o in null], [True] * len(null), clusters),
        **rate_fields("bias_sensitivity_rate", [outcome.flipped for outcome in null], correct, clusters),
        "net_flips": _net_flips(null),
        "score_gap_shift": _gap_shift(null, deviation),
        "identity_minus_placebo": difference["mean"],
        "identity_minus_placebo_ci": _bounds(difference) if any(inside) else None,
        "identity_minus_placebo_p": paired_flip_p(inside, inside_clusters),
        "gap_shift_minus_placebo": _shift(beyond, clusters, deviation),
    }


# --- refinement-aware ---


def summarise_refinement(outcomes: Iterable[RefinementOutcome], *, score_sd: float | None = None) -> dict[str, Any]:
    """Every figure of the refinement-aware bias (``REFINEMENT`` above).

    ``verdict_change_rate`` = items whose verdict turns round because the history is shown / all items. A tie
    is no change; ``verdict_change_rate_ties_as_changes`` counts it as one. The shift is given in score units
    and in units of ``score_sd`` (None: the SD of the scores of all answers that were scored alone).
    """
    rows = list(outcomes)
    scored = [outcome for outcome in rows if outcome.is_scored]
    clusters = [outcome.cluster for outcome in scored]
    deviation = refinement_score_sd(scored) if score_sd is None else score_sd
    shifts = [outcome.refined_after_history - outcome.refined_alone for outcome in scored]
    return refinement_rates(rows) | {"score_shift": _shift(shifts, clusters, deviation), "score_sd": deviation}


def refinement_score_sd(outcomes: Iterable[RefinementOutcome]) -> float | None:
    """SD of the scores of the answers that were scored alone; None for fewer than two."""
    return standard_deviation([score for o in outcomes if o.is_scored for score in (o.refined_alone, o.original_alone)])


def refinement_rates(outcomes: Iterable[RefinementOutcome]) -> dict[str, Any]:
    """Counts and rates: the part of ``REFINEMENT`` that needs verdicts alone."""
    rows = list(outcomes)
    scored = [outcome for outcome in rows if outcome.is_scored]
    clusters = [outcome.cluster for outcome in scored]
    everyone = [True] * len(scored)
    moves = [(outcome.verdict_alone, outcome.verdict_after_history) for outcome in scored]
    counts = Counter(moves)
    to_refined = [move == ("original", "refined") for move in moves]
    to_original = [move == ("refined", "original") for move in moves]
    turned = [a or b for a, b in zip(to_refined, to_original, strict=True)]
    return {
        "n_items": len(scored),
        "n_excluded": len(rows) - len(scored),
        "n_questions": len(set(clusters)),
        **rate_fields("verdict_change_rate", turned, everyone, clusters),
        **rate_fields("verdict_change_rate_ties_as_changes", [a != b for a, b in moves], everyone, clusters),
        "original_to_refined": sum(to_refined),
        "refined_to_original": sum(to_original),
        **rate_fields("original_to_refined_rate", to_refined, everyone, clusters),
        **rate_fields("refined_to_original_rate", to_original, everyone, clusters),
        **rate_fields("refined_wins_alone", [a == "refined" for a, _ in moves], everyone, clusters),
        **rate_fields("refined_wins_after_history", [b == "refined" for _, b in moves], everyone, clusters),
        "n_without_trace": sum(outcome.history_left_no_trace for outcome in scored),
        "n_ties_alone": sum(a == "tie" for a, _ in moves),
        "n_ties_after_history": sum(b == "tie" for _, b in moves),
        "transitions": {f"{a}_to_{b}": counts[(a, b)] for a in REFINEMENT_VERDICTS for b in REFINEMENT_VERDICTS},
    }
