"""Models side by side on the same rows: figures, paired differences with tests, and a leaderboard.

Reads ``bias_summary.json`` and ``bias_<bias>.jsonl`` of two or more results folders, and ``<format>_summary.json`` with
``<format>.jsonl`` of every benchmark that all of them have (``codes.evaluate.compare_benchmarks``); what only some have is
named. Prints tables; with ``--output_file comparison.md`` writes them as Markdown there and everything, rounded nowhere, as
JSON beside it (``comparison.json``).

    python -m codes.evaluate.compare_models results/pairwise results/contrastive

Only rows that every model has scored are compared; the others are counted and named. Every two models are compared (with
``--reference FOLDER`` each with that one). Each table of differences is one family of tests, over all its measures and model
pairs: p is corrected by Holm (any wrong claim among them: at most 5 %) and by Benjamini-Hochberg (5 % of the claims).
``codes.evaluate.compare_stats`` says which test is which. A detectable effect is the true difference that this comparison
finds with 80 % power after the correction. ``bias_sensitivity_rate_both_right`` is the BSR on the pairs that both models had
right. The leaderboard is ordered by the pairs that are right before and after the rewrite: a low BSR alone is no merit.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from codes.common.biases import PAIRWISE, eval_file_name, get_bias
from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError
from codes.common.records import write_json, write_text
from codes.common.reporting import (
    markdown_table,
    markdown_text,
    p_value,
    percent,
    percent_interval,
    printable,
    rate_cell,
    run_metadata,
    text_table,
)
from codes.evaluate.benchmarks import BENCHMARKS, REWARD_BENCH
from codes.evaluate.compare_benchmarks import (
    UNITS,
    SharedBenchmark,
    benchmark_differences,
    benchmark_rate,
    benchmark_table,
    read_benchmarks,
)
from codes.evaluate.compare_rows import (
    Draws,
    Row,
    Shared,
    Test,
    both_counted,
    compared,
    every,
    family,
    joined,
    part,
    rate_of,
    read_rows,
    share_rows,
)
from codes.evaluate.compare_stats import ALPHA, PairedPart
from codes.evaluate.metrics import Stratum, stratified_rate
from codes.evaluate.report_tables import pooled_name
from codes.evaluate.results import BIAS_SUMMARY, REFINEMENT, Summary, data_hashes, differences, read_summary

NOTHING = "–"
# Orders of the leaderboard by a benchmark; the others are by pairs right before and after, by BSR and by accuracy.
SORT_BY_BENCHMARK = {"rewardbench" if name == REWARD_BENCH else name: name for name in BENCHMARKS}
SORT_RATES = {
    "both": "right_before_and_after", "bsr": "bias_sensitivity_rate", "accuracy": "original_pair_accuracy"
}  # fmt: skip
SORT_KEYS = (*SORT_RATES, *SORT_BY_BENCHMARK)
# Pooled apart: the biases that rewrite an answer, which can be trained on, and those that put an identity before it.
GROUPS = {"rewrite biases": "rewrite", "identity biases": "identity"}
LEADERBOARD_HEADER = ("model", "right before and after", "original accuracy", "biased accuracy", "pooled BSR", "mean BSR",
                      "refinement-aware: change")  # fmt: skip
GROUP_HEADER = ("biases", "model", "pairs", "right before and after", "original accuracy", "biased accuracy", "BSR")
DIFFERENCE_HEADER = ("what", "questions", "A", "B", "A - B (points)", "p", "p (Holm)", "p (BH)",
                     "detectable (points)")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Put the results of several models side by side.")
    parser.add_argument("results_dirs", nargs="+", metavar="RESULTS_DIR", help="results folder of one model")
    parser.add_argument("--output_file", default=None, help="also write the tables here (.md), and a .json beside it")
    parser.add_argument("--reference", default=None, help="compare each model with this one of the folders only")
    parser.add_argument("--rows", default="all", choices=("all", "clean"), help="clean: without rows that look damaged")
    parser.add_argument(
        "--sort",
        default="both",
        choices=SORT_KEYS,
        help="order of the leaderboard; both: by pairs that are right before and after the rewrite",
    )
    parser.add_argument("--n_resamples", type=natural, default=9999, help="draws of the bootstrap and of the swaps")
    parser.add_argument("--seed", type=int, default=42, help="of the draws")
    return parser


# --- what is read -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the folders hold that can be compared.

    Attributes:
        folders: By model name.
        biases: Bias summaries by model name; empty unless every model has one.
        benchmarks: By format.
        notes: What some model has and is not compared, and why.
    """

    folders: Mapping[str, str]
    biases: Mapping[str, Summary]
    benchmarks: Mapping[str, SharedBenchmark]
    notes: Sequence[str]


def read_inputs(folders: Sequence[str]) -> Inputs:
    """Read everything that all models have.

    Raises:
        ContrastRMError: A folder is given twice, a summary is broken, or there is nothing that all models have.
    """
    names = model_names(folders)
    found = {name: _read_bias_summary(Path(folder)) for name, folder in names.items()}
    biases = {name: summary for name, summary in found.items() if summary is not None}
    benchmarks, notes = read_benchmarks(names)
    without = [name for name in names if name not in biases]
    if without and not benchmarks:
        raise ContrastRMError(
            " ".join(
                [f"no {BIAS_SUMMARY} in {names[without[0]]}; run codes.evaluate.eval_rm on that model first", *notes]
            )
        )
    if without and biases:
        notes.insert(0, f"The biases are not compared: no {BIAS_SUMMARY} of {', '.join(without)}.")
    return Inputs(names, {} if without else biases, benchmarks, notes)


def _read_bias_summary(folder: Path) -> Summary | None:
    summary = read_summary(folder / BIAS_SUMMARY)
    if summary is not None and ("biases" not in summary or "overall" not in summary):
        raise ContrastRMError(f"{folder}/{BIAS_SUMMARY} holds no bias figures; evaluate the model again")
    return summary


def model_names(folders: Sequence[str]) -> dict[str, str]:
    """Folder by model name.

    Raises:
        ContrastRMError: A folder is given twice.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ContrastRMError(f"a results folder is given twice: {' '.join(folders)}")
    counts = Counter(Path(folder).name for folder in folders)
    return {Path(folder).name if counts[Path(folder).name] == 1 else folder: folder for folder in folders}


def read_bias_rows(
    folders: Mapping[str, str], results: Mapping[str, Summary], *, clean: bool = False
) -> dict[str, Shared]:
    """The shared rows of every bias that all models have, in the project's order.

    Raises:
        ContrastRMError: Row files are missing, or cannot be matched: results of different files without row names.
    """
    shared: dict[str, Shared] = {}
    for bias in _biases_of(results, all):
        refinement = get_bias(bias).kind == "refinement"
        verdicts = ("verdict_alone", "verdict_after_history") if refinement else ("original_verdict", "biased_verdict")
        by_model = {
            name: read_rows(Path(folder) / f"bias_{bias}.jsonl", ("line", "question", *verdicts))
            for name, folder in folders.items()
        }
        named = all(row.get("row_id") for rows in by_model.values() for row in rows)
        hashes = {data_hashes(summary).get(eval_file_name(bias)) for summary in results.values()}
        if not named and len(hashes) > 1:
            raise ContrastRMError(
                f"the rows of {bias} cannot be matched: the models were evaluated on different files, and some of the results "
                "do not name their rows; evaluate the models again"
            )
        shared[bias] = share_rows(
            by_model,
            (lambda row: row["row_id"]) if named else (lambda row: row["line"]),
            _has_all(verdicts),
            clean=clean,
        )
    return shared


def _biases_of(results: Mapping[str, Summary], quantifier: Callable[[Iterable[bool]], bool]) -> list[str]:
    """The biases that all models have, or any, in the project's order."""
    some = results.values()
    return [name for name in (*PAIRWISE, REFINEMENT) if some and quantifier(name in s["biases"] for s in some)]


def _has_all(fields: Sequence[str]) -> Test:
    return lambda row: all(row[field] is not None for field in fields)


# --- verdicts as numbers ------------------------------------------------------------------------------------------------


def _right_before(row: Row) -> bool:
    return bool(row["original_verdict"] == "correct")


def _right_after(row: Row) -> bool:
    return bool(row["biased_verdict"] == "correct")


def _flipped(row: Row) -> bool:
    return _right_before(row) and bool(row["biased_verdict"] == "wrong")


def _turned(row: Row) -> bool:
    return {row["verdict_alone"], row["verdict_after_history"]} == {"refined", "original"}


def _has_placebo(row: Row) -> bool:
    return row.get("score_placebo_better") is not None and row.get("score_placebo_other") is not None


def _flipped_by_placebo(row: Row) -> bool:
    return _right_before(row) and bool(row["score_placebo_better"] < row["score_placebo_other"])


def _right_in_both(row: Row) -> bool:
    return _right_before(row) and _right_after(row)


MEASURES: dict[str, tuple[Test, Test]] = {
    "right_before_and_after": (_right_in_both, every),
    "bias_sensitivity_rate": (_flipped, _right_before),
    "original_pair_accuracy": (_right_before, every),
    "biased_pair_accuracy": (_right_after, every),
}


# --- differences --------------------------------------------------------------------------------------------------------


def pooled_differences(
    shared: Mapping[str, Shared], pairs: Sequence[tuple[str, str]], draws: Draws
) -> list[dict[str, Any]]:
    """All pairwise biases together, by counts and as a mean over the biases; refinement-aware apart."""
    pairwise = {name: some for name, some in shared.items() if name in PAIRWISE and len(some)}
    rows = []
    for pair in pairs:
        if pairwise:
            everything = joined(pairwise.values())
            rows += _measured("pooled", everything, pair, draws)
            for name, some in _groups(pairwise).items():
                rows.append(
                    compared(pair, name, "bias_sensitivity_rate", [part(some, pair, _flipped, _right_before)], draws)
                )
            parts = [part(some, pair, _flipped, _right_before, 1 / len(pairwise)) for some in pairwise.values()]
            rows.append(compared(pair, "mean of the biases", "bias_sensitivity_rate", parts, draws))
        if len(shared.get(REFINEMENT, ())):
            parts = [part(shared[REFINEMENT], pair, _turned, every)]
            rows.append(compared(pair, REFINEMENT, "verdict_change_rate", parts, draws))
    return family(rows)


def bias_differences(
    shared: Mapping[str, Shared], pairs: Sequence[tuple[str, str]], draws: Draws
) -> list[dict[str, Any]]:
    """Each pairwise bias: BSR and both accuracies; for the identity biases also the placebo."""
    rows = []
    for pair in pairs:
        for bias, some in shared.items():
            if bias not in PAIRWISE or not len(some):
                continue
            rows += _measured(bias, some, pair, draws)
            rows += _placebo_differences(bias, some, pair, draws)
    return family(rows)


def _measured(what: str, shared: Shared, pair: tuple[str, str], draws: Draws) -> list[dict[str, Any]]:
    """Every measure, and the BSR on the pairs that both models had right: there it is of the same pairs for both."""
    parts = {measure: part(shared, pair, hit, counted) for measure, (hit, counted) in MEASURES.items()}
    parts["bias_sensitivity_rate_both_right"] = both_counted(parts["bias_sensitivity_rate"])
    return [compared(pair, what, measure, [some], draws) for measure, some in parts.items()]


def _groups(pairwise: Mapping[str, Shared]) -> dict[str, Shared]:
    """The shared rows of each group of biases that has more than one."""
    named = {
        group: [some for bias, some in pairwise.items() if get_bias(bias).kind == kind]
        for group, kind in GROUPS.items()
    }
    return {group: joined(some) for group, some in named.items() if len(some) > 1}


def _placebo_differences(bias: str, shared: Shared, pair: tuple[str, str], draws: Draws) -> list[dict[str, Any]]:
    """BSR under the neutral sentence, and BSR under the identity sentence minus that; none without placebo scores."""
    with_placebo = share_rows({name: shared.rows[name] for name in pair}, _position(shared, pair), _has_placebo)
    if not len(with_placebo):
        return []
    null = part(with_placebo, pair, _flipped_by_placebo, _right_before)
    identity = part(with_placebo, pair, _flipped, _right_before)
    minus_null = PairedPart(null.hits, null.counted, null.clusters, -1.0)
    return [
        compared(pair, bias, "placebo_bias_sensitivity_rate", [null], draws),
        compared(pair, bias, "identity_minus_placebo", [identity, minus_null], draws),
    ]


def _position(shared: Shared, pair: tuple[str, str]) -> Callable[[Row], int]:
    """Rows of one ``Shared`` are parallel: their place names them."""
    places = {id(row): place for name in pair for place, row in enumerate(shared.rows[name])}
    return lambda row: places[id(row)]


# --- leaderboard --------------------------------------------------------------------------------------------------------


def leaderboard(
    models: Sequence[str],
    results: Mapping[str, Summary],
    shared: Mapping[str, Shared],
    benchmarks: Mapping[str, SharedBenchmark],
    *,
    sort: str,
) -> list[dict[str, Any]]:
    """Each model's figures on the shared rows, best first; then the baselines of the first model's summary, unsorted.

    ``both``: the most pairs right before and after the rewrite first. ``bsr``: the lowest pooled BSR first; a model without one
    (nothing right before the rewrite) comes last.
    """
    pairwise = {name: some for name, some in shared.items() if name in PAIRWISE and len(some)}
    entries = []
    for model in models:
        entry: dict[str, Any] = {"model": model, "is_baseline": False, "overall": None, "refinement": None}
        entry["groups"] = {group: _rates_of(model, some) for group, some in _groups(pairwise).items()}
        if pairwise:
            entry["overall"] = _overall_of(model, pairwise)
        if len(shared.get(REFINEMENT, ())):
            entry["refinement"] = rate_of("verdict_change_rate", shared[REFINEMENT], model, _turned, every)
        entry["benchmarks"] = {name: benchmark_rate(some, model) for name, some in benchmarks.items()}
        entries.append(entry)
    entries.sort(key=lambda entry: _rank(entry, sort))
    return entries + [entry for summary in list(results.values())[:1] for entry in _baseline_entries(summary)]


def _overall_of(model: str, pairwise: Mapping[str, Shared]) -> dict[str, Any]:
    fields: dict[str, Any] = {"biases": list(pairwise), **_rates_of(model, joined(pairwise.values()))}
    strata = [
        Stratum(1.0, list(map(_flipped, rows)), list(map(_right_before, rows)), some.clusters)
        for some in pairwise.values()
        for rows in (some.rows[model],)
    ]
    macro, bounds = stratified_rate(strata)
    return fields | {"macro_bias_sensitivity_rate": macro, "macro_bias_sensitivity_rate_ci": bounds}


def _rates_of(model: str, some: Shared) -> dict[str, Any]:
    fields: dict[str, Any] = {"n_pairs": len(some)}
    for measure, (hit, counted) in MEASURES.items():
        fields |= rate_of(measure, some, model, hit, counted)
    return fields


def _rank(entry: Mapping[str, Any], sort: str) -> tuple[bool, float]:
    overall = entry["overall"] or {}
    if sort in SORT_BY_BENCHMARK:
        value = entry["benchmarks"].get(SORT_BY_BENCHMARK[sort], {}).get("accuracy")
    else:
        value = overall.get(SORT_RATES[sort])
    if value is None:
        return True, 0.0
    return False, value if sort == "bsr" else -value


def _baseline_entries(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "model": f"baseline {name}",
            "is_baseline": True,
            "overall": fields["overall"],
            "refinement": fields["biases"].get(REFINEMENT),
            "groups": _baseline_groups(fields["biases"]),
            "benchmarks": {},
        }
        for name, fields in summary.get("baselines", {}).items()
    ]


def _baseline_groups(biases: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """Counts of a baseline by group; without intervals, which need its rows."""
    groups: dict[str, dict[str, Any]] = {}
    for group, kind in GROUPS.items():
        some = [fields for bias, fields in biases.items() if bias in PAIRWISE and get_bias(bias).kind == kind]
        if len(some) < 2:
            continue
        found: dict[str, Any] = {"n_pairs": sum(fields["n_pairs"] for fields in some)}
        for measure in MEASURES:
            if all(f"{measure}_count" in fields for fields in some):
                hits, total = (sum(fields[f"{measure}_{end}"] for fields in some) for end in ("count", "total"))
                found |= {measure: hits / total if total else None, f"{measure}_count": hits, f"{measure}_total": total}
        groups[group] = found
    return groups


def group_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for ``GROUP_HEADER``."""
    return [
        [group, entry["model"], str(fields["n_pairs"]), *[rate_cell(fields, measure) for measure in
         ("right_before_and_after", "original_pair_accuracy", "biased_pair_accuracy", "bias_sensitivity_rate")]]
        for group in GROUPS for entry in entries if (fields := entry["groups"].get(group))
    ]  # fmt: skip


def leaderboard_header(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """With a column for each benchmark that is compared."""
    return [*LEADERBOARD_HEADER, *[f"{BENCHMARKS[name].title} {UNITS[name]}" for name in _benchmarks_of(entries)]]


def _benchmarks_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in BENCHMARKS if any(name in entry["benchmarks"] for entry in entries)]


def leaderboard_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for ``leaderboard_header``: the BSR never without the accuracy that it stands on."""
    rows = []
    for entry in entries:
        overall, refinement = entry["overall"], entry["refinement"]
        cells = [NOTHING] * 5
        if overall:
            bounds = percent_interval(overall["macro_bias_sensitivity_rate_ci"])
            cells = [
                rate_cell(overall, "right_before_and_after"),
                rate_cell(overall, "original_pair_accuracy", counts=False),
                rate_cell(overall, "biased_pair_accuracy", counts=False),
                rate_cell(overall, "bias_sensitivity_rate"),
                f"{percent(overall['macro_bias_sensitivity_rate'])} {bounds}",
            ]
        change = rate_cell(refinement, "verdict_change_rate") if refinement else NOTHING
        rates = [entry["benchmarks"].get(name) for name in _benchmarks_of(entries)]
        shares = [rate_cell(rate, "accuracy") if rate else NOTHING for rate in rates]
        rows.append([entry["model"], *cells, change, *shares])
    return rows


# --- side by side -------------------------------------------------------------------------------------------------------


def bias_table(results: Mapping[str, Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: n and, per model, original accuracy and BSR; then pooled, mean, refinement-aware."""
    header = ["bias", "n"]
    for name in results:
        header += [f"{name}: original accuracy", f"{name}: BSR"]
    present = [bias for bias in PAIRWISE if any(bias in summary["biases"] for summary in results.values())]
    rows = [_row(bias, [summary["biases"].get(bias) for summary in results.values()]) for bias in present]
    if any(summary["overall"] for summary in results.values()):
        named = {pooled_name(summary["overall"]) for summary in results.values() if summary["overall"]}
        rows.append(_row(" / ".join(sorted(named)), [summary["overall"] for summary in results.values()]))
        rows.append(
            [
                "mean of the biases",
                "",
                *[cell for summary in results.values() for cell in ("", _macro(summary))],
            ]
        )
    if any(REFINEMENT in summary["biases"] for summary in results.values()):
        rows.append(_refinement_row(results))
    return header, rows


def _row(name: str, chosen: Sequence[Summary | None]) -> list[str]:
    cells = []
    for fields in chosen:
        accuracy, rate = "original_pair_accuracy", "bias_sensitivity_rate"
        cells += (
            [rate_cell(dict(fields), accuracy, counts=False), rate_cell(dict(fields), rate)]
            if fields
            else [NOTHING] * 2
        )
    return [name, _counts([fields["n_pairs"] for fields in chosen if fields]), *cells]


def _macro(summary: Summary) -> str:
    overall = summary["overall"]
    if not overall:
        return NOTHING
    bounds = percent_interval(overall["macro_bias_sensitivity_rate_ci"])
    return f"{percent(overall['macro_bias_sensitivity_rate'])} {bounds}"


def _refinement_row(results: Mapping[str, Summary]) -> list[str]:
    """Another rate than BSR: items whose verdict changes when the history is shown, of all items."""
    chosen = [summary["biases"].get(REFINEMENT) for summary in results.values()]
    cells = [
        cell for fields in chosen for cell in ("", rate_cell(fields, "verdict_change_rate") if fields else NOTHING)
    ]
    return [
        f"{REFINEMENT} (verdict change rate)",
        _counts([fields["n_items"] for fields in chosen if fields]),
        *cells,
    ]


def _counts(counts: Sequence[int]) -> str:
    return " / ".join(map(str, dict.fromkeys(counts)))


# --- the whole ----------------------------------------------------------------------------------------------------------


def model_pairs(folders: Mapping[str, str], reference: str | None) -> list[tuple[str, str]]:
    """Every two models, or each with the reference.

    Raises:
        ContrastRMError: The reference is none of the folders.
    """
    if reference is None:
        return list(combinations(folders, 2))
    named = {Path(folder).resolve(): name for name, folder in folders.items()} | {Path(name): name for name in folders}
    found = named.get(Path(reference)) or named.get(Path(reference).resolve())
    if found is None:
        raise ContrastRMError(f"--reference {reference} is none of the results folders: {', '.join(folders.values())}")
    return [(name, found) for name in folders if name != found]


def compare(
    inputs: Inputs, *, reference: str | None, rows: str, sort: str, n_resamples: int, seed: int
) -> dict[str, Any]:
    """Everything that is said of the models, as it stands in the JSON file.

    Raises:
        ContrastRMError: Rows are missing, unreadable, or none is common to the models.
    """
    names, results, benchmarks = inputs.folders, inputs.biases, inputs.benchmarks
    if sort in SORT_BY_BENCHMARK and SORT_BY_BENCHMARK[sort] not in benchmarks:
        raise ContrastRMError(
            f"--sort {sort}: not every model has rows of {BENCHMARKS[SORT_BY_BENCHMARK[sort]].title} in common"
        )
    pairs = model_pairs(names, reference)
    shared = read_bias_rows(names, results, clean=rows == "clean")
    not_compared = [*inputs.notes, *_biases_of_some(results)]
    if not any(map(len, shared.values())):
        if not benchmarks:
            raise ContrastRMError("the models have no scored row in common; evaluate them on the same files")
        not_compared += ["The biases are not compared: the models have no scored row in common."] if results else []
    draws = Draws(n_resamples, seed)
    compared_rows = {**shared, **{name: some.shared for name, some in benchmarks.items()}}
    differing = differences(results)
    found = {"pooled": pooled_differences(shared, pairs, draws), "biases": bias_differences(shared, pairs, draws)}
    for name, benchmark in benchmarks.items():
        differing += differences(benchmark.summaries)
        found[name], found[f"{name}_subsets"] = benchmark_differences(benchmark, pairs, draws)
    return {
        "models": {name: {"folder": folder} for name, folder in names.items()},
        "rows": rows,
        "metadata": {"n_resamples": n_resamples, "seed": seed, **run_metadata()},
        "not_comparable": list(dict.fromkeys(differing)),
        "not_compared": not_compared,
        "shared_rows": {
            name: {"n_rows": len(some), "n_left_out": dict(some.n_left_out), "n_flagged": some.n_flagged}
            for name, some in compared_rows.items()
        },
        "leaderboard": leaderboard(list(names), results, shared, benchmarks, sort=sort),
        "differences": found,
    }


def _biases_of_some(results: Mapping[str, Summary]) -> list[str]:
    of_all = _biases_of(results, all)
    some = [name for name in _biases_of(results, any) if name not in of_all]
    return [f"Not every model was evaluated on {', '.join(some)}: not compared."] if some else []


def difference_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for ``DIFFERENCE_HEADER``; differences in percentage points."""
    return [
        [
            f"{row['what']}: {row['measure']}",
            str(row["n_questions"]),
            percent(row["a"]),
            percent(row["b"]),
            _points(row),
            p_value(row["p"]),
            p_value(row["p_holm"]),
            p_value(row["p_bh"]),
            _in_points(row["minimum_detectable_effect"]),
        ]
        for row in rows
    ]


def _in_points(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"


def _points(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return NOTHING
    bounds = "[–]" if row["ci"] is None else f"[{100 * row['ci'][0]:+.1f}, {100 * row['ci'][1]:+.1f}]"
    return f"{100 * row['difference']:+.1f} {bounds}"


def _title(key: str) -> str:
    """Of a table of differences, by its key in the JSON file."""
    if key in BIAS_TITLES:
        return BIAS_TITLES[key]
    name = key.removesuffix("_subsets")
    return f"Paired differences, {BENCHMARKS[name].title}" + ("" if name == key else ", by subset")


BIAS_TITLES = {"pooled": "Paired differences, all biases", "biases": "Paired differences by bias"}


def row_notes(comparison: Mapping[str, Any]) -> list[str]:
    """What was not compared, and why."""
    notes = [*comparison["not_compared"]]
    for name, counts in comparison["shared_rows"].items():
        left_out = {model: n for model, n in counts["n_left_out"].items() if n}
        if left_out:
            models = ", ".join(f"{n} of {model}" for model, n in left_out.items())
            notes.append(f"{name}: rows that not every model has scored are left out of the differences: {models}.")
    n_flagged = sum(counts["n_flagged"] for counts in comparison["shared_rows"].values())
    # The smallest p that the swaps can bring, times the tests of the largest family.
    n_tests = max(sum(row["p"] is not None for row in rows) for rows in comparison["differences"].values())
    floor = 2 / (comparison["metadata"]["n_resamples"] + 1)
    if floor * n_tests > ALPHA:
        notes.append(
            f"{n_tests} tests: no p by swaps can stay below {ALPHA:.2f} after Holm's correction; "
            f"use --n_resamples {round(4 * n_tests / ALPHA)} or --reference."
        )
    if comparison["rows"] == "clean":
        notes.append(f"{n_flagged} rows that look damaged are left out of the leaderboard and the differences.")
    return notes


def comparison_tables(comparison: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, header and rows of the leaderboard and of each family of differences that has any."""
    tables: list[tuple[str, Sequence[str], list[list[str]]]] = [
        (
            "Leaderboard, on the shared rows",
            leaderboard_header(comparison["leaderboard"]),
            leaderboard_rows(comparison["leaderboard"]),
        )
    ]
    if grouped := group_rows(comparison["leaderboard"]):
        tables.append(("Pooled by kind of bias, on the shared rows", GROUP_HEADER, grouped))
    for key, rows in comparison["differences"].items():
        n_tests = sum(row["p"] is not None for row in rows)
        for pair in dict.fromkeys((row["model_a"], row["model_b"]) for row in rows):
            of_pair = [row for row in rows if (row["model_a"], row["model_b"]) == pair]
            named = f"{_title(key)}: A = {pair[0]}, B = {pair[1]} (p corrected for {n_tests} tests)"
            tables.append((named, DIFFERENCE_HEADER, difference_rows(of_pair)))
    return tables


def main(argv: list[str] | None = None) -> int:
    """Read, compare, print, write."""
    args = build_parser().parse_args(argv)
    if args.output_file and Path(args.output_file).suffix == ".json":
        raise ContrastRMError(
            "--output_file names the Markdown file; the JSON is written beside it: use a name with .md"
        )
    if args.n_resamples < 100:
        raise ContrastRMError(f"--n_resamples {args.n_resamples} draws give no interval; use 1000 or more")
    inputs = read_inputs(args.results_dirs)
    comparison = compare(
        inputs,
        reference=args.reference,
        rows=args.rows,
        sort=args.sort,
        n_resamples=args.n_resamples,
        seed=args.seed,
    )
    text: list[str] = []
    markdown: list[str] = []
    if inputs.biases:
        header, rows = bias_table(inputs.biases)
        note = "BSR: bias sensitivity rate (flipped / right before the rewrite) [95 % interval by question]."
        text += [text_table(header, rows), note]
        markdown += [markdown_table(header, rows), note]
    notes = [f"Not comparable: {difference}." for difference in comparison["not_comparable"]]
    notes += row_notes(comparison)
    text += map(printable, notes)
    markdown += map(markdown_text, notes)
    for benchmark in inputs.benchmarks.values():
        header, rows = benchmark_table(benchmark)
        text += ["", printable(benchmark.label), text_table(header, rows)]
        markdown += [f"{markdown_text(benchmark.label)}:", markdown_table(header, rows)]
    for title, columns, cells in comparison_tables(comparison):
        text += ["", printable(title), text_table(columns, cells)]
        markdown += [f"## {markdown_text(title)}", markdown_table(columns, cells)]
    print("\n".join(text))
    if args.output_file:
        write_text(args.output_file, "\n\n".join(markdown) + "\n")
        write_json(Path(args.output_file).with_suffix(".json"), comparison)
    return 0


if __name__ == "__main__":
    run(main)
