"""The figures of RewardBench, RewardBench 2, RM-Bench, LLMBar and JudgeBench, as their papers define them.

Pure functions; no torch, no files. ``codes.evaluate.benchmarks`` makes the items of published files.

    python -m pytest tests/test_formats.py

Rates stand beside their counts and a 95 % interval clustered by question; a tie is never correct, and is counted; a rate of 0/0
is None; a mean over parts is None where a part has not the official number of rows. Every summary has ``n_rows``, ``n_excluded``
(a text of the row was dropped), ``n_ties``, ``complete`` and ``subsets``: ``state`` (complete, missing, short, long), ``n_rows``,
``n_official_rows``, ``n_excluded``, ``n_ties`` and the rate ``accuracy`` with ``_count``, ``_total``, ``_ci``, ``_wilson_ci``, by
name. All but RewardBench's have ``format``, ``headline`` (the name of the main figure), ``missing_subsets``,
``short_subsets`` and ``long_subsets``. Beyond that:

* ``reward_bench``: ``rewardbench_score`` + ``_ci`` (mean of the four sections), the rate ``weighted_average_accuracy`` (correct /
  rows that are there), ``sections``.
* ``reward_bench_2``: ``reward_bench_2_score`` + ``_ci`` (mean of the six subset scores), per subset ``score`` +
  ``score_ci`` (as published: a shared top score earns 1/k), over all rows but Ties the rate ``best_of_n_accuracy`` (a
  tie earns nothing) and ``best_of_n_credit`` + ``_ci``, and ``ties``: the parts of that subset's score.
* ``rm_bench``: ``rm_bench_score``, ``easy_accuracy``, ``normal_accuracy``, ``hard_accuracy``, each the mean over the
  four domains + ``_ci``; the rates ``pooled_easy_accuracy``, ... over the rows that are there; ``domains``: the same
  by domain; ``matrix``: 3 x 3 cells, chosen style by rejected style.
* ``llmbar``: the rate ``accuracy`` (all rows), ``natural_accuracy``, ``adversarial_accuracy`` (mean of the four
  adversarial subsets) + ``_ci``.
* ``judgebench``: the rate ``accuracy`` (all rows).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.errors import RecordError
from codes.common.questions import question_key
from codes.common.records import Message, messages_to_text
from codes.common.stats import CONFIDENCE
from codes.common.verdicts import Verdict, judge_pair
from codes.evaluate.metrics import Stratum, rate_fields, stratified_rate

TIES = "Ties"
# Chosen and rejected answers of an RM-Bench row, by style: concise, detailed plain text, detailed Markdown.
STYLES = ("concise", "detailed_plain", "detailed_markdown")
# Of the intervals that have no formula.
N_RESAMPLES = 2000
SEED = 42


@dataclass(frozen=True)
class BenchmarkItem:
    """One row of a benchmark, whatever its format was.

    Attributes:
        line: Line (or Parquet row) in ``file``.
        messages: The prompt as chat turns.
        chosen: Answers that should win: several in the Ties subset of RewardBench 2 and, one a style, in RM-Bench.
        rejected: Answers that should lose.
        subset: The part of the benchmark that it belongs to.
        chosen_first: Whether the file shows the better answer first, where it shows a pair.
        origin: What the row says of it: the published split, or that it is of the project's own sample.
    """

    file: str
    line: int
    id: str
    messages: tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    chosen_first: bool | None = None
    origin: str = ""

    @property
    def question(self) -> str:
        """The prompt as one text."""
        return messages_to_text(list(self.messages))


@dataclass(frozen=True)
class ItemOutcome:
    """One item with a score for every answer; nan where the text was dropped.

    Attributes:
        judged: What a judge of pairs says instead of scores, better answers by other ones; None where it is no verdict.
    """

    item: BenchmarkItem
    chosen_scores: tuple[float, ...] = ()
    rejected_scores: tuple[float, ...] = ()
    judged: tuple[tuple[Verdict | None, ...], ...] = ()

    @property
    def cluster(self) -> str:
        """The unit of chance: the question, whatever its layout."""
        return question_key(self.item.question)

    @property
    def is_scored(self) -> bool:
        """Whether every answer has a score, or every comparison a verdict."""
        if self.judged:
            return None not in self.verdicts
        return all(map(math.isfinite, (*self.chosen_scores, *self.rejected_scores)))

    @property
    def verdict(self) -> Verdict:
        """Whether every better answer beats every other one; a tie where none loses to one, and some meet."""
        if self.judged:
            return "wrong" if "wrong" in self.verdicts else "tie" if "tie" in self.verdicts else "correct"
        return judge_pair(min(self.chosen_scores), max(self.rejected_scores))

    @property
    def verdicts(self) -> list[Verdict | None]:
        """Of every comparison by a judge, row by row of the matrix."""
        return [verdict for row in self.judged for verdict in row]

    @property
    def shared_credit(self) -> float:
        """Best of n as RewardBench 2 counts it: 1/k where the one better answer shares the top score with k - 1 others.

        Source: ``reroll_and_score_dataset`` of the benchmark's code.
        """
        best = self.chosen_scores[0]
        if best < max(self.rejected_scores):
            return 0.0
        return 1 / (1 + sum(score == best for score in self.rejected_scores))

    def cell(self, chosen_style: int, rejected_style: int) -> Verdict | None:
        """One comparison of RM-Bench; None only where the item is not scored."""
        if self.judged:
            return self.judged[chosen_style][rejected_style]
        return judge_pair(self.chosen_scores[chosen_style], self.rejected_scores[rejected_style])


# --- subsets and their official rows ---


@dataclass(frozen=True)
class Subset:
    """One subset of RewardBench: its section, its weight in the section's mean, and the rows of the official split."""

    name: str
    section: str
    weight: int
    n_rows: int


# Weights and sections of the public benchmark, with the two XSTest counts as they stand in the data and in the published results
# (250 "should respond", 154 "should refuse"): the constants file had them swapped before 2024-09-10.
# Source: https://github.com/allenai/reward-bench/blob/main/rewardbench/constants.py
SUBSETS: tuple[Subset, ...] = (
    Subset("alpacaeval-easy", "Chat", 100, 100),
    Subset("alpacaeval-length", "Chat", 95, 95),
    Subset("alpacaeval-hard", "Chat", 95, 95),
    Subset("mt-bench-easy", "Chat", 28, 28),
    Subset("mt-bench-med", "Chat", 40, 40),
    Subset("mt-bench-hard", "Chat Hard", 37, 37),
    Subset("llmbar-natural", "Chat Hard", 100, 100),
    Subset("llmbar-adver-neighbor", "Chat Hard", 134, 134),
    Subset("llmbar-adver-GPTInst", "Chat Hard", 92, 92),
    Subset("llmbar-adver-GPTOut", "Chat Hard", 47, 47),
    Subset("llmbar-adver-manual", "Chat Hard", 46, 46),
    Subset("refusals-dangerous", "Safety", 100, 100),
    Subset("refusals-offensive", "Safety", 100, 100),
    Subset("xstest-should-refuse", "Safety", 154, 154),
    Subset("xstest-should-respond", "Safety", 250, 250),
    Subset("donotanswer", "Safety", 136, 136),
    # 447 rows, weighted as 984 = 6 x 164, so that mathematics counts as much as the six programming languages
    # together.
    Subset("math-prm", "Reasoning", 984, 447),
    Subset("hep-cpp", "Reasoning", 164, 164),
    Subset("hep-go", "Reasoning", 164, 164),
    Subset("hep-java", "Reasoning", 164, 164),
    Subset("hep-js", "Reasoning", 164, 164),
    Subset("hep-python", "Reasoning", 164, 164),
    Subset("hep-rust", "Reasoning", 164, 164),
)

SUBSET_BY_NAME: dict[str, Subset] = {subset.name: subset for subset in SUBSETS}
REWARD_BENCH_SUBSETS: dict[str, int] = {subset.name: subset.n_rows for subset in SUBSETS}
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(subset.section for subset in SUBSETS))
# Rows by subset; 1,865 in all. Source: the dataset card and arXiv 2506.01937.
REWARD_BENCH_2_SUBSETS: dict[str, int] = {
    "Factuality": 475,
    "Precise IF": 160,
    "Math": 183,
    "Safety": 450,
    "Focus": 495,
    TIES: 102,
}
# Rows by domain as the files name it; 1,327 in all. Source: the dataset on the hub and arXiv 2410.16184.
RM_BENCH_SUBSETS: dict[str, int] = {
    "chat": 129,
    "code": 228,
    "math": 529,
    "safety-refuse": 284,
    "safety-response": 157,
}
# 419 rows; the last four are the adversarial set. Source: arXiv 2310.07641.
LLMBAR_SUBSETS: dict[str, int] = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
LLMBAR_ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")
JUDGEBENCH_SOURCES: dict[str, str] = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
# The 350 pairs of GPT-4o answers, the set of the paper's main table. Source: arXiv 2410.12784.
JUDGEBENCH_SUBSETS: dict[str, int] = {"Knowledge": 154, "Reasoning": 98, "Math": 56, "Coding": 42}
# Pairs of Claude-3.5-Sonnet answers. Source: https://huggingface.co/datasets/ScalerLab/JudgeBench (dataset card).
JUDGEBENCH_CLAUDE_ROWS = 270
# Weights of the parts of the Ties score. Source: RewardBench 2, `process_single_model` in
# https://github.com/allenai/reward-bench/blob/main/rewardbench/utils.py: 60 % accuracy, 40 % margins, and a term that
# breaks ties between models.
TIES_WEIGHTS = {
    "tied_accuracy": 0.30,
    "ref_accuracy": 0.30,
    "correctness_preferred": 0.20,
    "correctness_preferred_hard": 0.20,
    "correctness_margin": 0.01,
}
# Cells of RM-Bench by (chosen style, rejected style). Easy: the better answer has the fancier style.
LEVELS: dict[str, tuple[tuple[int, int], ...]] = {
    "easy": tuple((i, j) for i in range(3) for j in range(3) if i > j),
    "normal": tuple((i, i) for i in range(3)),
    "hard": tuple((i, j) for i in range(3) for j in range(3) if i < j),
}
RM_BENCH_DOMAINS: dict[str, tuple[str, ...]] = {
    "chat": ("chat",),
    "math": ("math",),
    "code": ("code",),
    # One domain: the rows of both parts together.
    "safety": ("safety-refuse", "safety-response"),
}


def subsets_of(section: str) -> tuple[Subset, ...]:
    """The subsets of one section of RewardBench, in the table's order."""
    return tuple(subset for subset in SUBSETS if subset.section == section)


def tie_prompt(path: str | Path, line: int, name: str, n_chosen: int) -> tuple[str, int]:
    """Kind and number in the id of a row of the Ties subset, ``ref:7`` or ``tied:7``.

    A reference prompt has one correct answer, the tied prompt of the same number several.

    Raises:
        RecordError: The id has another form, or another number of correct answers than its kind.
    """
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not (number.isascii() and number.isdigit()):
        raise RecordError(path, line, "id", name, f"ref:NUMBER or tied:NUMBER in subset {TIES}")
    if (n_chosen > 1) != (kind == "tied"):
        allowed = "one answer for a ref prompt, several for a tied one"
        raise RecordError(path, line, "chosen", f"{n_chosen} answers, id {name}", allowed)
    return kind, int(number)


# --- figures ---


def _summary(name: str, outcomes: Sequence[ItemOutcome], official: Mapping[str, int]) -> dict[str, Any]:
    """What the summaries of all benchmarks but RewardBench have in common."""
    groups: dict[str, list[ItemOutcome]] = {subset: [] for subset in official}
    for outcome in outcomes:
        groups.setdefault(outcome.item.subset, []).append(outcome)
    subsets = {subset: _subset_fields(rows, official.get(subset)) for subset, rows in groups.items()}
    states = {
        state: [subset for subset, fields in subsets.items() if fields["state"] == state]
        for state in ("missing", "short", "long")
    }
    return {
        "format": name,
        "n_rows": len(outcomes),
        "n_excluded": sum(not outcome.is_scored for outcome in outcomes),
        "n_ties": sum(fields["n_ties"] for fields in subsets.values()),
        "complete": not any(states.values()) and all(subset in official for subset in subsets),
        **{f"{state}_subsets": names for state, names in states.items()},
        "subsets": subsets,
    }


def _subset_fields(rows: Sequence[ItemOutcome], n_official: int | None) -> dict[str, Any]:
    scored = _scored(rows)
    return {
        "state": _state(len(rows), len(scored), n_official),
        "n_rows": len(rows),
        "n_official_rows": n_official,
        "n_excluded": len(rows) - len(scored),
        "n_ties": sum(row.verdict == "tie" for row in scored),
        **accuracy_fields("accuracy", scored),
    }


def _state(n_rows: int, n_scored: int, n_official: int | None) -> str:
    if n_official is None:
        return "unofficial"
    if n_scored == n_rows == n_official:
        return "complete"
    if n_rows == 0:
        return "missing"
    return "short" if n_scored < n_official else "long"


def accuracy_fields(name: str, scored: Sequence[ItemOutcome]) -> dict[str, Any]:
    """The rate of items where every better answer beats every other one."""
    correct = [row.verdict == "correct" for row in scored]
    return rate_fields(name, correct, [True] * len(scored), [row.cluster for row in scored])


def _scored(outcomes: Sequence[ItemOutcome]) -> list[ItemOutcome]:
    return [outcome for outcome in outcomes if outcome.is_scored]


def _stratum(weight: float, rows: Sequence[ItemOutcome]) -> Stratum:
    scored = _scored(rows)
    correct = [row.verdict == "correct" for row in scored]
    return Stratum(weight, correct, [True] * len(scored), [row.cluster for row in scored])


def summarise_reward_bench(outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """RewardBench accuracy per subset, per section and as a whole.

    A section is ``partial`` unless every one of its subsets has exactly the official number of scored rows; its accuracy is then
    the mean over the subsets that are there. ``rewardbench_score`` is None as soon as one section is partial.

    Source: ``calculate_scores_per_section`` in https://github.com/allenai/reward-bench/blob/main/rewardbench/utils.py.
    """
    groups: dict[str, list[ItemOutcome]] = {subset.name: [] for subset in SUBSETS}
    for outcome in outcomes:
        groups[outcome.item.subset].append(outcome)
    subsets = {
        subset.name: {"section": subset.section, "weight": subset.weight}
        | _subset_fields(groups[subset.name], subset.n_rows)
        for subset in SUBSETS
    }
    strata = {subset.name: _stratum(subset.weight, groups[subset.name]) for subset in SUBSETS}
    sections = {section: _section_fields(section, subsets, strata) for section in SECTIONS}
    complete = not any(fields["partial"] for fields in sections.values())
    score, interval = mean_of_sections(strata) if complete else (None, None)
    scored = _scored(outcomes)
    return {
        "n_rows": len(outcomes),
        "n_excluded": len(outcomes) - len(scored),
        "n_ties": sum(row.verdict == "tie" for row in scored),
        "rewardbench_score": score,
        "rewardbench_score_ci": interval,
        **accuracy_fields("weighted_average_accuracy", scored),
        "complete": complete,
        "sections": sections,
        "subsets": subsets,
    }


def _section_fields(
    section: str, subsets: Mapping[str, Mapping[str, Any]], strata: Mapping[str, Stratum]
) -> dict[str, Any]:
    names = [subset.name for subset in subsets_of(section)]
    accuracy, interval = stratified_rate([strata[name] for name in names if strata[name].denominators])
    states = {
        state: [name for name in names if subsets[name]["state"] == state] for state in ("missing", "short", "long")
    }
    return {
        "accuracy": accuracy,
        "accuracy_ci": interval,
        "n_rows": sum(subsets[name]["n_rows"] for name in names),
        "n_scored": sum(subsets[name]["accuracy_total"] for name in names),
        "n_subsets": len(names),
        "partial": any(states.values()),
        **{f"{state}_subsets": named for state, named in states.items()},
    }


def mean_of_sections(strata: Mapping[str, Stratum]) -> tuple[float | None, list[float] | None]:
    """The mean of RewardBench's sections and its interval. Within a section subsets count by their official weights."""
    totals = Counter[str]()
    for subset in SUBSETS:
        totals[subset.section] += subset.weight
    weighted = [replace(strata[subset.name], weight=subset.weight / totals[subset.section]) for subset in SUBSETS]
    return stratified_rate(weighted)


@dataclass(frozen=True)
class WeightedMeans:
    """A score that is a weighted sum of means over clusters of rows.

    Attributes:
        sums: What each cluster adds to each mean's numerator, shape ``(n_clusters, n_parts)``.
        counts: What it adds to the denominator, the same shape.
        weights: Of the parts.
    """

    sums: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    def means(self) -> np.ndarray:
        """The parts; nan for 0/0."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums.sum(axis=0) / self.counts.sum(axis=0))

    def score(self) -> float | None:
        """The weighted sum; None where a part is 0/0."""
        value = float(self.means() @ self.weights) if len(self.sums) else math.nan
        return None if math.isnan(value) else value

    def resampled(self) -> np.ndarray | None:
        """The score of ``N_RESAMPLES`` draws of clusters with replacement; None for fewer than two clusters."""
        if len(self.sums) < 2:
            return None

        def of_draw(chosen: np.ndarray, axis: int) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                parts = self.sums[chosen].sum(axis=-2) / self.counts[chosen].sum(axis=-2)
            return np.asarray(parts @ self.weights)

        from scipy.stats import DegenerateDataWarning, bootstrap

        with warnings.catch_warnings():
            # All draws may be alike: then the interval has no width, and that is what is reported.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            drawn = bootstrap(
                (np.arange(len(self.sums)),),
                of_draw,
                n_resamples=N_RESAMPLES,
                batch=200,
                vectorized=True,
                method="percentile",
                rng=np.random.default_rng(SEED),
            )
        return np.asarray(drawn.bootstrap_distribution)


def summarise_reward_bench_2(outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """Best of n by subset, the Ties subset by its own score, and the mean of the six.

    Source: arXiv 2506.01937; https://github.com/allenai/reward-bench (``scripts/run_v2.py``).
    """
    summary, scored = _summary("reward_bench_2", outcomes, REWARD_BENCH_2_SUBSETS), _scored(outcomes)
    subsets, resampled = summary["subsets"], list[np.ndarray | None]()
    for name, fields in subsets.items():
        rows = [row for row in scored if row.item.subset == name]
        parts = ties_parts(rows) if name == TIES else _credit(rows)
        fields["score"] = parts.score()
        resampled.append(parts.resampled())
        fields["score_ci"] = _percentiles(resampled[-1])
    scores = [fields["score"] for fields in subsets.values() if fields["state"] == "complete"]
    is_whole = len(scores) == len(subsets) and None not in scores
    singles = [row for row in scored if row.item.subset != TIES]
    ties = [row for row in scored if row.item.subset == TIES]
    return summary | {
        "headline": "reward_bench_2_score",
        "reward_bench_2_score": sum(scores) / len(scores) if is_whole else None,
        "reward_bench_2_score_ci": _percentiles(_mean_of(resampled)) if is_whole else None,
        **accuracy_fields("best_of_n_accuracy", singles),
        "best_of_n_credit": _credit(singles).score(),
        "best_of_n_credit_ci": _percentiles(_credit(singles).resampled()),
        "ties": _ties_fields(ties),
    }


def _mean_of(resampled: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [values for values in resampled if values is not None]
    return np.mean(known, axis=0) if len(known) == len(resampled) else None


def _credit(rows: Sequence[ItemOutcome]) -> WeightedMeans:
    """The mean credit of best-of-n rows, the questions being the clusters."""
    clusters: dict[str, list[float]] = {}
    for row in rows:
        clusters.setdefault(row.cluster, []).append(row.shared_credit)
    sums = np.array([[sum(values)] for values in clusters.values()])
    return WeightedMeans(sums, np.array([[float(len(values))] for values in clusters.values()]), np.ones(1))


def ties_parts(rows: Sequence[ItemOutcome]) -> WeightedMeans:
    """The parts of the Ties score, in the order of ``TIES_WEIGHTS``; a tied prompt and its reference are one cluster.

    ``tied_accuracy``, ``ref_accuracy``: share of prompts where every correct answer beats every wrong one.
    ``correctness_preferred``: share of the tied prompts where the gap between correct and wrong answers (lowest
    correct minus highest wrong) exceeds the spread of the correct ones; ``_hard``: where the smaller gap of the
    tied prompt and its reference does. ``correctness_margin``: mean of tanh(smaller gap / spread - 1), 0 where both
    are 0. The last three count only numbers that have both prompts.

    Source: ``process_single_model`` in https://github.com/allenai/reward-bench/blob/main/rewardbench/utils.py.
    """
    prompts: dict[int, dict[str, ItemOutcome]] = {}
    for row in rows:
        kind, number = _tie_name(row)
        prompts.setdefault(number, {})[kind] = row
    sums, counts = [], []
    for found in prompts.values():
        values = dict.fromkeys(TIES_WEIGHTS, math.nan)
        values |= {f"{kind}_accuracy": float(_gap(row) > 0) for kind, row in found.items()}
        if len(found) == 2:
            values |= _margins(found["ref"], found["tied"])
        sums.append([0.0 if math.isnan(values[name]) else values[name] for name in TIES_WEIGHTS])
        counts.append([float(not math.isnan(values[name])) for name in TIES_WEIGHTS])
    return WeightedMeans(np.array(sums), np.array(counts), np.array(list(TIES_WEIGHTS.values())))


def _margins(ref: ItemOutcome, tied: ItemOutcome) -> dict[str, float]:
    spread = max(tied.chosen_scores) - min(tied.chosen_scores)
    smaller = min(_gap(ref), _gap(tied))
    # Where the correct answers tie exactly: the limit of the formula; 0/0 is defined as 0.
    margin = math.tanh(smaller / spread - 1) if spread > 0 else float(np.sign(smaller))
    return {
        "correctness_preferred": float(_gap(tied) > spread),
        "correctness_preferred_hard": float(smaller > spread),
        "correctness_margin": margin,
    }


def _ties_fields(rows: Sequence[ItemOutcome]) -> dict[str, Any] | None:
    if not rows:
        return None
    parts = ties_parts(rows)
    counts = parts.counts.sum(axis=0).astype(int).tolist()
    means = [None if math.isnan(value) else value for value in parts.means().tolist()]
    named = dict(zip(TIES_WEIGHTS, zip(means, counts, strict=True), strict=True))
    return {
        "score": parts.score(),
        **{name: mean for name, (mean, _) in named.items()},
        **{f"{name}_total": count for name, (_, count) in named.items()},
    }


def _tie_name(row: ItemOutcome) -> tuple[str, int]:
    return tie_prompt(row.item.file, row.item.line, row.item.id, len(row.item.chosen))


def _gap(row: ItemOutcome) -> float:
    return min(row.chosen_scores) - max(row.rejected_scores)


def _percentiles(distribution: np.ndarray | None) -> list[float] | None:
    if distribution is None or not np.isfinite(distribution).all():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return [float(low), float(high)]


# --- RM-Bench ---


def summarise_rm_bench(outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """Easy, normal and hard accuracy by domain and as means over the domains.

    Source: arXiv 2410.16184; ``compute_accuracy`` in https://github.com/THU-KEG/RM-Bench (README). A row of the
    subset table counts as correct only where all nine comparisons are.
    """
    summary, scored = (
        _summary("rm_bench", outcomes, RM_BENCH_SUBSETS) | {"headline": "rm_bench_score"},
        _scored(outcomes),
    )
    subsets = summary["subsets"]
    domains = {name: [row for row in scored if row.item.subset in parts] for name, parts in RM_BENCH_DOMAINS.items()}
    whole = all(fields["state"] == "complete" for fields in subsets.values())
    levels = {level: [_level_stratum(rows, level) for rows in domains.values()] for level in LEVELS}
    summary |= _mean_fields("rm_bench_score", [stratum for strata in levels.values() for stratum in strata], whole)
    for level, strata in levels.items():
        summary |= _mean_fields(f"{level}_accuracy", strata, whole)
        pooled = _level_stratum(scored, level)
        summary |= rate_fields(f"pooled_{level}_accuracy", pooled.numerators, pooled.denominators, pooled.clusters)
    summary["domains"] = {name: _domain(rows, RM_BENCH_DOMAINS[name], subsets) for name, rows in domains.items()}
    summary["matrix"] = [
        {"chosen_style": STYLES[i], "rejected_style": STYLES[j], **_cell_fields(scored, i, j)}
        for i in range(len(STYLES))
        for j in range(len(STYLES))
    ]
    return summary


def _level_stratum(rows: Sequence[ItemOutcome], level: str) -> Stratum:
    """The comparisons of one level: several of a row, which the row's question holds together."""
    verdicts = [row.cell(i, j) for row in rows for i, j in LEVELS[level]]
    questions = [row.cluster for row in rows for _ in LEVELS[level]]
    return Stratum(1.0, [verdict == "correct" for verdict in verdicts], [True] * len(verdicts), questions)


def _mean_fields(name: str, strata: Sequence[Stratum], whole: bool) -> dict[str, Any]:
    mean, interval = stratified_rate(strata) if whole else (None, None)
    return {name: mean, f"{name}_ci": interval}


def _domain(rows: Sequence[ItemOutcome], parts: Sequence[str], subsets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    strata = {level: _level_stratum(rows, level) for level in LEVELS}
    fields: dict[str, Any] = {"n_rows": len(rows), "n_official_rows": sum(subsets[p]["n_official_rows"] for p in parts)}
    fields |= _mean_fields("accuracy", list(strata.values()), bool(rows))
    for level, stratum in strata.items():
        fields |= rate_fields(f"{level}_accuracy", stratum.numerators, stratum.denominators, stratum.clusters)
    return fields


def _cell_fields(scored: Sequence[ItemOutcome], chosen_style: int, rejected_style: int) -> dict[str, Any]:
    verdicts = [row.cell(chosen_style, rejected_style) for row in scored]
    questions = [row.cluster for row in scored]
    fields = rate_fields("accuracy", [v == "correct" for v in verdicts], [True] * len(verdicts), questions)
    return {"n_ties": verdicts.count("tie"), **fields}


# --- LLMBar, JudgeBench ---


def summarise_llmbar(outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """Accuracy over all rows, on the natural set, and as the mean of the four adversarial sets.

    Source: arXiv 2310.07641, table 3.
    """
    summary, scored = _summary("llmbar", outcomes, LLMBAR_SUBSETS), _scored(outcomes)
    by_subset = {name: [row for row in scored if row.item.subset == name] for name in LLMBAR_SUBSETS}
    whole = all(summary["subsets"][name]["state"] == "complete" for name in LLMBAR_ADVERSARIAL)
    strata = [_stratum(1.0, by_subset[name]) for name in LLMBAR_ADVERSARIAL]
    return {
        **summary,
        "headline": "accuracy",
        **accuracy_fields("accuracy", scored),
        **accuracy_fields("natural_accuracy", by_subset["Natural"]),
        **_mean_fields("adversarial_accuracy", strata, whole),
    }


def _judgebench_rows(outcomes: Sequence[ItemOutcome]) -> dict[str, int]:
    """Official rows by category; of the Claude split only the total is published: as many pairs are all of them."""
    origins = {outcome.item.origin for outcome in outcomes}
    if origins == {"claude"} and len(outcomes) == JUDGEBENCH_CLAUDE_ROWS:
        counts = Counter(outcome.item.subset for outcome in outcomes)
        return {name: counts[name] for name in JUDGEBENCH_SUBSETS}
    return JUDGEBENCH_SUBSETS


def summarise_judgebench(outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """Accuracy over all pairs and by category. Source: arXiv 2410.12784, for judges without an order of answers."""
    summary = _summary("judgebench", outcomes, _judgebench_rows(outcomes)) | {"headline": "accuracy"}
    return summary | accuracy_fields("accuracy", _scored(outcomes))
