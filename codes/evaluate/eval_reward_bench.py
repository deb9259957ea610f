"""RewardBench accuracy of a reward model; RewardBench 2, RM-Bench, LLMBar and JudgeBench by the same command.

Reads a file in one of the published formats (``--data_file``; ``data/eval/reward_bench/load_reward_bench.py``
fetches the official ones) and a trained reward model. Writes, in ``results/<model>/``: ``<format>.jsonl`` (every
row with its scores and verdicts), ``<format>_summary.json``, ``report.md`` and ``report.html``.

The project's own sample is no RewardBench, and neither is a part of the official set: every output says which
it is.

    python -m codes.evaluate.eval_reward_bench --model_path output/contrastive --category all
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from codes.common.chat import Conversation
from codes.common.cli import run
from codes.common.records import ReadReport, ensure_writable_folder, write_json, write_jsonl
from codes.common.reporting import percent, percent_interval, rate_cell, text_table
from codes.common.scores import ScoreResult
from codes.common.settings import add_settings, settings_from
from codes.common.verdicts import judge_pair
from codes.evaluate.api import ScoredRow, TextScorer, score_rows
from codes.evaluate.benchmark_figures import SUBSET_BY_NAME, BenchmarkItem, ItemOutcome
from codes.evaluate.benchmarks import (
    BENCHMARKS,
    REWARD_BENCH,
    describe_source,
    detect_format,
    label_of,
    read_benchmark,
)
from codes.evaluate.report import write_report
from codes.evaluate.report_tables import SECTION_HEADER, SUBSET_HEADER, reward_bench_lines, section_rows, subset_rows
from codes.evaluate.results import json_score, model_results_folder, result_metadata, scoring_notes
from codes.evaluate.settings import BenchmarkSettings


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="RewardBench accuracy of a reward model.")
    add_settings(parser, BenchmarkSettings)
    return parser


def evaluate(
    scorer: TextScorer, items: Sequence[BenchmarkItem], reports: Sequence[ReadReport] = (), *, max_bad_rows: int = 0
) -> tuple[list[ItemOutcome], ScoreResult]:
    """Score every answer of every item in one call; the rest as for ``score_rows``."""
    scores, result = score_rows(scorer, [_row_of(item) for item in items], reports, max_bad_rows)
    outcomes = [
        ItemOutcome(item, tuple(of_item[: len(item.chosen)]), tuple(of_item[len(item.chosen) :]))
        for item, of_item in zip(items, scores, strict=True)
    ]
    return outcomes, result


def _row_of(item: BenchmarkItem) -> ScoredRow:
    answers = (*item.chosen, *item.rejected)
    compared = list(product(range(len(item.chosen)), range(len(item.chosen), len(answers))))
    return ScoredRow(item.file, item.line, [Conversation(item.messages, answer) for answer in answers], compared)


def outcome_row(name: str, outcome: ItemOutcome) -> dict[str, Any]:
    """One line of ``<format>.jsonl``; scores and verdicts of dropped texts are null.

    ``verdicts`` holds a row for each better answer and a column for each other one; RewardBench has one of each and no matrix.
    """
    item, verdict = outcome.item, outcome.verdict if outcome.is_scored else None
    row = {"line": item.line, "id": item.id, "subset": item.subset, "question": item.question, "verdict": verdict}
    chosen, rejected = (
        [json_score(score) for score in scores] for scores in (outcome.chosen_scores, outcome.rejected_scores)
    )
    if name == REWARD_BENCH:
        section = SUBSET_BY_NAME[item.subset].section
        return row | {"section": section, "score_chosen": chosen[0], "score_rejected": rejected[0]}
    matrix = [[judge_pair(c, r) for r in outcome.rejected_scores] for c in outcome.chosen_scores] if verdict else None
    scores = {"scores_chosen": chosen, "scores_rejected": rejected}
    return {"file": Path(item.file).name} | row | scores | {"verdicts": matrix}


# --- tables on the console ---

BENCHMARK_SUBSET_HEADER = ("subset", "rows", "official rows", "accuracy", "ties", "state")
BENCHMARK_FIGURE_HEADER = ("figure", "value")


def benchmark_subset_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows for ``BENCHMARK_SUBSET_HEADER``; the published score stands among the figures."""
    return [
        [
            name,
            str(fields["accuracy_total"]) + (f" (+{fields['n_excluded']} excluded)" if fields["n_excluded"] else ""),
            "–" if fields["n_official_rows"] is None else str(fields["n_official_rows"]),
            rate_cell(fields, "accuracy"),
            str(fields["n_ties"]),
            fields["state"],
        ]
        for name, fields in summary["subsets"].items()
    ]


def benchmark_figure_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows for ``BENCHMARK_FIGURE_HEADER``: every figure with its counts, where it has some, and its interval."""
    rows = []
    for name in BENCHMARKS[summary["format"]].figures:
        if f"{name}_count" in summary:
            rows.append([name, rate_cell(dict(summary), name)])
        elif summary[name] is None:
            rows.append([name, "null (a subset has not the official rows)"])
        else:
            rows.append([name, f"{percent(summary[name], 2)} {percent_interval(summary[f'{name}_ci'])}"])
    for name, fields in summary["subsets"].items():
        if fields.get("score") is not None:
            rows.append([f"score of {name}", f"{percent(fields['score'], 2)} {percent_interval(fields['score_ci'])}"])
    for name, fields in summary.get("domains", {}).items():
        for level in ("easy", "normal", "hard"):
            rows.append([f"{name}, {level}", rate_cell(fields, f"{level}_accuracy")])
    return rows


def print_summary(name: str, summary: Mapping[str, Any]) -> None:
    """The tables on the console, under the label of the data."""
    print(summary["label"], end="\n\n")
    is_reward_bench = name == REWARD_BENCH
    present = [
        row for row in (subset_rows if is_reward_bench else benchmark_subset_rows)(summary) if row[-1] != "missing"
    ]
    print(text_table(SUBSET_HEADER if is_reward_bench else BENCHMARK_SUBSET_HEADER, present), end="\n\n")
    if is_reward_bench:
        print(text_table(SECTION_HEADER, section_rows(summary)), end="\n\n")
        print("\n".join(reward_bench_lines(summary)))
    else:
        print(text_table(BENCHMARK_FIGURE_HEADER, benchmark_figure_rows(summary)))


# --- the command ---


def main(argv: list[str] | None = None) -> int:
    """Evaluate, write, print."""
    settings = settings_from(build_parser().parse_args(argv), BenchmarkSettings)
    model = settings.scorer
    name = detect_format(settings.data_file) if settings.format == "auto" else settings.format
    # Everything that can be wrong for free is found before the model is loaded.
    items, reports = read_benchmark(
        settings.data_file,
        name,
        category=settings.category,
        limit=settings.limit_per_subset,
        seed=model.seed,
        max_bad_rows=model.max_bad_rows,
    )
    source = describe_source(settings.data_file, items)
    ensure_writable_folder(model.results_dir)
    from codes.evaluate.scorer_setup import load_scorer  # torch is loaded when everything else is known to be right

    loaded = load_scorer(model)
    folder = model_results_folder(model.results_dir, loaded.model_path, loaded.weight_hash)
    outcomes, result = evaluate(loaded.scorer, items, reports, max_bad_rows=model.max_bad_rows)
    figures = BENCHMARKS[name].summarise(outcomes)
    label = label_of(name, source, figures["complete"])
    metadata = result_metadata(loaded, result, reports, model.seed)
    limits = {"category": settings.category, "limit_per_subset": settings.limit_per_subset}
    summary = {"label": label, "metadata": metadata | {"format": name, **limits, "source": source}, **figures}
    write_jsonl(folder / f"{name}.jsonl", [{"label": label} | outcome_row(name, outcome) for outcome in outcomes])
    write_json(folder / f"{name}_summary.json", summary)
    write_report(folder)
    print_summary(name, summary)
    for note in scoring_notes(result):
        print(f"note: {note}")
    print(f"results: {folder}")
    return 0


if __name__ == "__main__":
    run(main)
