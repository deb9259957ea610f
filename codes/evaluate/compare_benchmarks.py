"""Models side by side on the rows of benchmarks: RewardBench, RewardBench 2, RM-Bench, LLMBar, JudgeBench.

Reads ``<format>_summary.json`` and ``<format>.jsonl`` of results folders, whichever benchmarks all of them have; writes
nothing. What is compared of each: the whole and its official means in one family of tests, the subsets in another.

* RewardBench 2: rows where the better answer beats every other one. Of the Ties subset, that is the accuracy among its
  parts, not its published score, which is no rate of rows.
* RM-Bench: the comparisons of each level (easy, normal, hard), several of a row, held together by their question.

    python -m pytest tests/test_compare.py -k benchmark
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codes.common.reporting import percent, percent_interval, rate_cell
from codes.evaluate.benchmark_figures import LEVELS, LLMBAR_ADVERSARIAL, RM_BENCH_DOMAINS, SECTIONS, TIES, subsets_of
from codes.evaluate.benchmarks import BENCHMARKS, REWARD_BENCH
from codes.evaluate.compare_rows import (
    Draws,
    Shared,
    compared,
    every,
    family,
    is_correct,
    joined,
    part,
    rate_of,
    read_rows,
    share_rows,
)
from codes.evaluate.results import Summary, read_summary

# The parts of one rate of a comparison, each with its weight in the mean.
Parts = list[tuple[Shared, float]]
# What it is of, the name of the rate, and its parts.
Effect = tuple[str, str, Parts]
# What one hit of the leaderboard's rate is.
UNITS = {name: "comparisons" if name == "rm_bench" else "rows" for name in BENCHMARKS}


@dataclass(frozen=True)
class SharedBenchmark:
    """The rows of one benchmark that every model scored.

    Attributes:
        name: Of the format.
        label: What the figures may be called; the same for all models.
        summaries: By model.
    """

    name: str
    label: str
    summaries: Mapping[str, Summary]
    shared: Shared


def read_benchmarks(folders: Mapping[str, str]) -> tuple[dict[str, SharedBenchmark], list[str]]:
    """The benchmarks that all models have under one label, and why others that some model has are not compared.

    Raises:
        ContrastRMError: A summary or its rows cannot be read.
    """
    found: dict[str, SharedBenchmark] = {}
    notes: list[str] = []
    for name, title in ((name, one.title) for name, one in BENCHMARKS.items()):
        read = {model: read_summary(Path(folder) / f"{name}_summary.json") for model, folder in folders.items()}
        summaries = {model: summary for model, summary in read.items() if summary is not None}
        without = [model for model in read if model not in summaries]
        labels = sorted({str(summary.get("label")) for summary in summaries.values()})
        if not summaries:
            continue
        if without:
            notes.append(f"{title} is not compared: no {name}_summary.json of {', '.join(without)}.")
        elif len(labels) > 1:
            notes.append(f"{title} is not compared: the models have figures of different data ({'; '.join(labels)}).")
        else:
            shared = _read_shared(name, folders)
            if len(shared):
                found[name] = SharedBenchmark(name, labels[0], summaries, shared)
            else:
                notes.append(f"{title} is not compared: the models have no scored row in common.")
    return found, notes


def _read_shared(name: str, folders: Mapping[str, str]) -> Shared:
    needed = ("id", "subset", "question", "verdict", *(("verdicts",) if name == "rm_bench" else ()))
    by_model = {model: read_rows(Path(folder) / f"{name}.jsonl", needed) for model, folder in folders.items()}
    return share_rows(
        by_model, lambda row: (row["subset"], row["id"], row["question"]), lambda row: row["verdict"] is not None
    )


# --- what is compared ---


def _of_subsets(shared: Shared, names: Collection[str]) -> Shared:
    places = [place for place, row in enumerate(next(iter(shared.rows.values()))) if row["subset"] in names]
    rows = {name: [some[place] for place in places] for name, some in shared.rows.items()}
    return Shared(rows, [shared.clusters[place] for place in places], shared.n_left_out)


def _by_subset(name: str, shared: Shared) -> dict[str, Shared]:
    present = {subset: _of_subsets(shared, (subset,)) for subset in _subsets(name, shared)}
    return {subset: some for subset, some in present.items() if len(some)}


def _subsets(name: str, shared: Shared) -> list[str]:
    """The official ones in the published order, then any other."""
    rows = next(iter(shared.rows.values()))
    return list(dict.fromkeys((*BENCHMARKS[name].subsets, *(str(row["subset"]) for row in rows))))


def _cells(shared: Shared, places: Sequence[tuple[int, int]]) -> Shared:
    """The comparisons of RM-Bench at some places of the matrix, as rows of their own."""
    rows = {
        name: [{"verdict": row["verdicts"][i][j]} for row in some for i, j in places]
        for name, some in shared.rows.items()
    }
    return Shared(rows, [cluster for cluster in shared.clusters for _ in places], shared.n_left_out)


def _evenly(some: Sequence[Shared]) -> Parts:
    return [(shared, 1 / len(some)) for shared in some]


def _reward_bench(shared: Shared) -> tuple[list[Effect], list[Effect]]:
    by_subset = _by_subset(REWARD_BENCH, shared)
    effects: list[Effect] = [("all rows", "weighted_average_accuracy", [(shared, 1.0)])]
    for section in SECTIONS:
        present = [subset for subset in subsets_of(section) if subset.name in by_subset]
        total = sum(subset.weight for subset in present)
        if present:
            parts = [(by_subset[subset.name], subset.weight / total) for subset in present]
            effects.append((section, "section_accuracy", parts))
    return effects, _accuracies(by_subset)


def _reward_bench_2(shared: Shared) -> tuple[list[Effect], list[Effect]]:
    by_subset = _by_subset("reward_bench_2", shared)
    single = [some for name, some in by_subset.items() if name != TIES]
    effects: list[Effect] = []
    if single:
        effects.append(("all rows but Ties", "best_of_n_accuracy", [(joined(single), 1.0)]))
        effects.append(("mean of the subsets but Ties", "best_of_n_accuracy", _evenly(single)))
    return effects, _accuracies(by_subset)


def _rm_bench(shared: Shared) -> tuple[list[Effect], list[Effect]]:
    domains = {name: _of_subsets(shared, parts) for name, parts in RM_BENCH_DOMAINS.items()}
    levels = {
        level: {name: _cells(some, places) for name, some in domains.items() if len(some)}
        for level, places in LEVELS.items()
    }
    effects: list[Effect] = [
        ("mean of the domains", "accuracy", _evenly([some for level in levels.values() for some in level.values()]))
    ]
    for level, cells in levels.items():
        effects.append(("mean of the domains", f"{level}_accuracy", _evenly(list(cells.values()))))
    by_domain: list[Effect] = [
        (name, f"{level}_accuracy", [(cells[name], 1.0)]) for name in levels["easy"] for level, cells in levels.items()
    ]
    return effects, by_domain


def _llmbar(shared: Shared) -> tuple[list[Effect], list[Effect]]:
    by_subset = _by_subset("llmbar", shared)
    effects: list[Effect] = [("all rows", "accuracy", [(shared, 1.0)])]
    adversarial = [by_subset[name] for name in LLMBAR_ADVERSARIAL if name in by_subset]
    if adversarial:
        effects.append(("mean of the adversarial subsets", "accuracy", _evenly(adversarial)))
    return effects, _accuracies(by_subset)


def _judgebench(shared: Shared) -> tuple[list[Effect], list[Effect]]:
    return [("all rows", "accuracy", [(shared, 1.0)])], _accuracies(_by_subset("judgebench", shared))


def _accuracies(by_subset: Mapping[str, Shared]) -> list[Effect]:
    return [(name, "accuracy", [(some, 1.0)]) for name, some in by_subset.items()]


_EFFECTS: dict[str, Callable[[Shared], tuple[list[Effect], list[Effect]]]] = {
    REWARD_BENCH: _reward_bench,
    "reward_bench_2": _reward_bench_2,
    "rm_bench": _rm_bench,
    "llmbar": _llmbar,
    "judgebench": _judgebench,
}


def benchmark_differences(
    benchmark: SharedBenchmark, pairs: Sequence[tuple[str, str]], draws: Draws
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two families: the whole with its official means, and the subsets."""
    families = _EFFECTS[benchmark.name](benchmark.shared)

    def rows_of(effects: Sequence[Effect]) -> list[dict[str, Any]]:
        return [
            compared(pair, what, measure, [part(some, pair, is_correct, every, w) for some, w in parts], draws)
            for pair in pairs
            for what, measure, parts in effects
        ]

    overall, subsets = (family(rows_of(effects)) for effects in families)
    return overall, subsets


def benchmark_rate(benchmark: SharedBenchmark, model: str) -> dict[str, Any]:
    """One model's share of right rows, of right comparisons in RM-Bench."""
    shared = benchmark.shared
    if benchmark.name == "rm_bench":
        shared = _cells(shared, [place for places in LEVELS.values() for place in places])
    return rate_of("accuracy", shared, model, is_correct, every)


# --- side by side ---


def benchmark_table(benchmark: SharedBenchmark) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each model's own figures, on all of its rows."""
    found = list(benchmark.summaries.values())
    if benchmark.name == REWARD_BENCH:
        return ["section", *benchmark.summaries], _sections(found)
    headline = str(found[0]["headline"])
    rows = [[headline, *[_headline_cell(summary, headline) for summary in found]]]
    for name in _subsets(benchmark.name, benchmark.shared):
        cells = [rate_cell(dict(fields), "accuracy") if (fields := s["subsets"].get(name)) else "–" for s in found]
        rows.append([f"{name}: accuracy", *cells])
    return ["figure", *benchmark.summaries], rows


def _headline_cell(summary: Summary, name: str) -> str:
    if f"{name}_count" in summary:
        return rate_cell(dict(summary), name)
    return f"{percent(summary[name])} {percent_interval(summary[f'{name}_ci'])}"


def _sections(found: Sequence[Summary]) -> list[list[str]]:
    rows = [
        [_section_name(section, found), *[_section_cell(summary["sections"][section]) for summary in found]]
        for section in SECTIONS
    ]
    rows.append(["rewardbench_score"] + [percent(summary["rewardbench_score"]) for summary in found])
    rows.append(["weighted_average_accuracy"] + [rate_cell(summary, "weighted_average_accuracy") for summary in found])
    return rows


def _section_name(section: str, found: Sequence[Summary]) -> str:
    partial = any(summary["sections"][section]["partial"] for summary in found)
    return f"{section} (partial)" if partial else section


def _section_cell(fields: Summary) -> str:
    return f"{percent(fields['accuracy'])} {percent_interval(fields['accuracy_ci'])}"
