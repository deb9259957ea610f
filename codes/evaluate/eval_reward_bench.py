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
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from codes.common.chat import Conversation
from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError
from codes.common.records import (
    ReadReport,
    RewardBenchRecord,
    ensure_writable_folder,
    file_sha256,
    messages_to_text,
    read_reward_bench_file,
    write_json,
    write_jsonl,
)
from codes.common.reporting import percent, percent_interval, rate_cell, text_table
from codes.common.scoring import ScoreResult
from codes.evaluate.api import TextScorer
from codes.evaluate.format_metrics import ItemOutcome, summarise_benchmark
from codes.evaluate.formats import (
    FORMAT_NAMES,
    FORMATS,
    REWARD_BENCH,
    BenchmarkItem,
    detect_format,
    items_by_subset,
    read_benchmark,
)
from codes.evaluate.metrics import RewardBenchOutcome, judge_pair, summarise_reward_bench
from codes.evaluate.report import (
    REWARD_BENCH_SUMMARY,
    SECTION_HEADER,
    SUBSET_HEADER,
    reward_bench_lines,
    section_rows,
    subset_rows,
    write_report,
)
from codes.evaluate.reward_bench_table import DATASET_ID, SECTIONS, SUBSET_BY_NAME
from codes.evaluate.scorer_setup import (
    ScoredRow,
    add_model_arguments,
    choose_subset,
    json_score,
    load_scorer,
    model_results_folder,
    result_metadata,
    score_rows,
    scorer_options,
    scoring_notes,
)

OFFICIAL_LABEL = "RewardBench"
OWN_SAMPLE_MODEL = "written-for-contrastrm"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="RewardBench accuracy of a reward model.")
    add_model_arguments(parser)
    parser.add_argument(
        "--data_file", default="data/eval/reward_bench/own_sample.jsonl", help="rows in a published format"
    )
    parser.add_argument(
        "--format", default="auto", choices=("auto", *FORMAT_NAMES), help="of the file; auto: by the keys of its rows"
    )
    parser.add_argument(
        "--category", default="all", help=f"all, or one of {', '.join(SECTIONS)}; in other formats a subset's name"
    )
    parser.add_argument("--limit_per_subset", type=natural, default=0, help="at most so many rows a subset; 0: all")
    return parser


def read_reward_bench(
    data_file: str | Path, *, category: str = "all", limit: int = 0, seed: int = 42, max_bad_rows: int = 0
) -> tuple[list[RewardBenchRecord], ReadReport]:
    """Read the rows of all sections or of one.

    Raises:
        ContrastRMError: Missing file, unknown category or subset, bad rows, or no row in the category.
    """
    if category != "all" and category not in SECTIONS:
        raise ContrastRMError(f"unknown category {category!r}; known: all, {', '.join(SECTIONS)}")
    records, report = read_reward_bench_file(data_file, subsets=SUBSET_BY_NAME, max_bad_rows=max_bad_rows)
    by_subset: dict[str, list[RewardBenchRecord]] = {}
    for record in records:
        if category in ("all", SUBSET_BY_NAME[record.subset].section):
            by_subset.setdefault(record.subset, []).append(record)
    if not by_subset:
        raise ContrastRMError(f"{data_file} has no row of category {category!r}")
    chosen = [row for rows in by_subset.values() for row in choose_subset(rows, limit, seed, _question)]
    return sorted(chosen, key=lambda record: record.line), report


def _question(record: RewardBenchRecord) -> str:
    return messages_to_text(record.messages)


def evaluate(
    scorer: TextScorer,
    records: Sequence[RewardBenchRecord],
    reports: Sequence[ReadReport] = (),
    *,
    max_bad_rows: int = 0,
) -> tuple[list[RewardBenchOutcome], ScoreResult]:
    """Score chosen and rejected of every row in one call; the rest as for ``score_rows``."""
    file = reports[0].path if reports else ""
    rows = [
        ScoredRow(file, r.line, [Conversation(r.messages, answer) for answer in (r.chosen, r.rejected)], [(0, 1)])
        for r in records
    ]
    scores, result = score_rows(scorer, rows, reports, max_bad_rows)
    outcomes = [
        RewardBenchOutcome(record.id, record.subset, _question(record), chosen, rejected, record.line)
        for record, (chosen, rejected) in zip(records, scores, strict=True)
    ]
    return outcomes, result


def describe_source(data_file: str | Path, records: Sequence[RewardBenchRecord]) -> dict[str, Any]:
    """Where the rows come from: what the loader noted beside the file, if it is about this very file.

    Returns:
        ``{"dataset": …, "revision": …}`` of the official set, ``{"dataset": "own sample"}`` or ``{"dataset":
        None}``.
    """
    if all(record.extra.get("chosen_model") == OWN_SAMPLE_MODEL for record in records):
        return {"dataset": "own sample", "revision": None}
    return noted_source(data_file)


def noted_source(data_file: str | Path) -> dict[str, Any]:
    """What the loader noted beside a file; ``{"dataset": None}`` where no note is about this very file.

    ``revision_is`` stands in it only where nobody checked that the rows are of that revision.

    Raises:
        ContrastRMError: The note cannot be read.
    """
    manifest = Path(f"{data_file}.source.json")
    if manifest.is_file():
        try:
            noted = json.loads(manifest.read_text(encoding="utf-8"))
            if noted["sha256"] == file_sha256(data_file):
                unchecked = {"revision_is": noted["revision_is"]} if "revision_is" in noted else {}
                return {"dataset": noted["dataset"], "revision": noted["revision"], **unchecked}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ContrastRMError(f"cannot read {manifest}: {error}; load the data again or delete it") from error
    return {"dataset": None, "revision": None}


def label_of(source: dict[str, Any], complete: bool, title: str = OFFICIAL_LABEL, dataset_id: str = DATASET_ID) -> str:
    """What the figures may be called. Only the complete official set carries the benchmark's name."""
    if source["dataset"] == "own sample":
        return f"not {title}: the project's own small sample"
    if source["dataset"] != dataset_id:
        counts = "with the official number of rows" if complete else "without the official number of rows"
        return f"not {title}: a file of unrecorded origin, {counts}"
    if not complete:
        return f"not {title}: a part of the official rows"
    return f"{title}, from local files whose revision nobody checked" if source.get("revision_is") else title


def outcome_row(outcome: RewardBenchOutcome) -> dict[str, Any]:
    """One line of ``reward_bench.jsonl``; scores and verdicts of dropped texts are null."""
    return {
        "line": outcome.line,
        "id": outcome.id,
        "subset": outcome.subset,
        "section": SUBSET_BY_NAME[outcome.subset].section,
        "question": outcome.question,
        "score_chosen": json_score(outcome.score_chosen),
        "score_rejected": json_score(outcome.score_rejected),
        "verdict": outcome.verdict if outcome.is_scored else None,
    }


def print_tables(summary: dict[str, Any]) -> None:
    """The tables on the console, under the label of the data."""
    print(summary["label"], end="\n\n")
    print(text_table(SUBSET_HEADER, [row for row in subset_rows(summary) if row[-1] != "missing"]), end="\n\n")
    print(text_table(SECTION_HEADER, section_rows(summary)), end="\n\n")
    print("\n".join(reward_bench_lines(summary)))


# --- the other formats ---


def read_items(
    data_file: str | Path,
    format_name: str,
    *,
    category: str = "all",
    limit: int = 0,
    seed: int = 42,
    max_bad_rows: int = 0,
) -> tuple[list[BenchmarkItem], list[ReadReport]]:
    """Read the rows of all subsets or of one, of one of ``FORMATS``.

    Raises:
        ContrastRMError: What ``read_benchmark`` raises, or no row of that subset.
    """
    items, reports = read_benchmark(data_file, format_name, max_bad_rows=max_bad_rows)
    groups = items_by_subset(items)
    if category != "all" and category not in groups:
        raise ContrastRMError(f"{data_file} has no row of category {category!r}; it has {', '.join(groups)}")
    chosen = [
        item
        for subset, rows in groups.items()
        if category in ("all", subset)
        for item in choose_subset(rows, limit, seed, lambda item: item.question)
    ]
    place = {id(item): position for position, item in enumerate(items)}
    return sorted(chosen, key=lambda item: place[id(item)]), reports


def evaluate_items(
    scorer: TextScorer, items: Sequence[BenchmarkItem], reports: Sequence[ReadReport] = (), *, max_bad_rows: int = 0
) -> tuple[list[ItemOutcome], ScoreResult]:
    """Score every answer of every item in one call; the rest as for ``score_rows``."""
    scores, result = score_rows(scorer, [_row_of(item) for item in items], reports, max_bad_rows)
    outcomes = [
        ItemOutcome(item, tuple(found[: len(item.chosen)]), tuple(found[len(item.chosen) :]))
        for item, found in zip(items, scores, strict=True)
    ]
    return outcomes, result


def _row_of(item: BenchmarkItem) -> ScoredRow:
    answers = (*item.chosen, *item.rejected)
    compared = list(product(range(len(item.chosen)), range(len(item.chosen), len(answers))))
    return ScoredRow(item.file, item.line, [Conversation(item.messages, answer) for answer in answers], compared)


def item_row(outcome: ItemOutcome) -> dict[str, Any]:
    """One line of ``<format>.jsonl``; ``verdicts`` holds a row for each better answer, a column for each other one."""
    item = outcome.item
    return {
        "file": Path(item.file).name,
        "line": item.line,
        "id": item.id,
        "subset": item.subset,
        "question": item.question,
        "scores_chosen": [json_score(score) for score in outcome.chosen_scores],
        "scores_rejected": [json_score(score) for score in outcome.rejected_scores],
        "verdict": outcome.verdict if outcome.is_scored else None,
        "verdicts": [[judge_pair(c, r) for r in outcome.rejected_scores] for c in outcome.chosen_scores]
        if outcome.is_scored
        else None,
    }


BENCHMARK_SUBSET_HEADER = ("subset", "rows", "official rows", "accuracy", "ties", "state")
BENCHMARK_FIGURE_HEADER = ("figure", "value")
# Figures of each format that are shown, in this order: rates with counts, and means over parts.
SHOWN_FIGURES: dict[str, tuple[str, ...]] = {
    "reward_bench_2": ("reward_bench_2_score", "best_of_n_accuracy", "best_of_n_credit"),
    "rm_bench": (
        *("rm_bench_score", "easy_accuracy", "normal_accuracy", "hard_accuracy"),
        *("pooled_easy_accuracy", "pooled_normal_accuracy", "pooled_hard_accuracy"),
    ),
    "llmbar": ("accuracy", "natural_accuracy", "adversarial_accuracy"),
    "judgebench": ("accuracy",),
}


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
    for name in SHOWN_FIGURES[summary["format"]]:
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


def print_benchmark(summary: Mapping[str, Any]) -> None:
    """The tables on the console, under the label of the data."""
    print(summary["label"], end="\n\n")
    present = [row for row in benchmark_subset_rows(summary) if row[-1] != "missing"]
    print(text_table(BENCHMARK_SUBSET_HEADER, present), end="\n\n")
    print(text_table(BENCHMARK_FIGURE_HEADER, benchmark_figure_rows(summary)))


def benchmark_source(data_file: str | Path) -> dict[str, Any]:
    """Where the rows of a file come from; a folder has no note."""
    return noted_source(data_file) if Path(data_file).is_file() else {"dataset": None, "revision": None}


# --- the command ---


def main(argv: list[str] | None = None) -> int:
    """Evaluate, write, print."""
    args = build_parser().parse_args(argv)
    format_name = detect_format(args.data_file) if args.format == "auto" else args.format
    choice = {
        "category": args.category,
        "limit": args.limit_per_subset,
        "seed": args.seed,
        "max_bad_rows": args.max_bad_rows,
    }
    # Everything that can be wrong for free is found before the model is loaded.
    if format_name == REWARD_BENCH:
        records, report = read_reward_bench(args.data_file, **choice)
        reports, source = [report], describe_source(args.data_file, records)
    else:
        items, reports = read_items(args.data_file, format_name, **choice)
        source = benchmark_source(args.data_file)
    ensure_writable_folder(args.results_dir)
    loaded = load_scorer(**scorer_options(args))
    folder = model_results_folder(args.results_dir, loaded.model_path, loaded.weight_hash)
    if format_name == REWARD_BENCH:
        outcomes, result = evaluate(loaded.scorer, records, reports, max_bad_rows=args.max_bad_rows)
        figures, rows = summarise_reward_bench(outcomes), [outcome_row(outcome) for outcome in outcomes]
        label = label_of(source, figures["complete"])
    else:
        some = FORMATS[format_name]
        item_outcomes, result = evaluate_items(loaded.scorer, items, reports, max_bad_rows=args.max_bad_rows)
        figures = summarise_benchmark(format_name, item_outcomes)
        rows = [item_row(outcome) for outcome in item_outcomes]
        label = label_of(source, figures["complete"], some.title, some.dataset_id)
    metadata = result_metadata(loaded, result, reports, args.seed)
    metadata |= {
        "format": format_name,
        "category": args.category,
        "limit_per_subset": args.limit_per_subset,
        "source": source,
    }
    summary = {"label": label, "metadata": metadata, **figures}
    write_jsonl(folder / f"{format_name}.jsonl", [{"label": label, **row} for row in rows])
    write_json(folder / summary_file(format_name), summary)
    write_report(folder)
    if format_name == REWARD_BENCH:
        print_tables(summary)
    else:
        print_benchmark(summary)
    for note in scoring_notes(result):
        print(f"note: {note}")
    print(f"results: {folder}")
    return 0


def summary_file(format_name: str) -> str:
    """Name of a format's summary in the results folder."""
    return REWARD_BENCH_SUMMARY if format_name == REWARD_BENCH else f"{format_name}_summary.json"


if __name__ == "__main__":
    run(main)
