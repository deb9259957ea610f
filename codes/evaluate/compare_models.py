"""Models side by side on the same rows: figures, paired differences with tests, and a leaderboard.

Reads ``bias_summary.json`` and ``bias_<bias>.jsonl`` of two or more results folders, and ``reward_bench_summary.json`` with
``reward_bench.jsonl`` where every model has them. Prints tables; with ``--output_file comparison.md`` writes them as Markdown
there and everything, rounded nowhere, as JSON beside it (``comparison.json``).

    python -m codes.evaluate.compare_models results/pairwise results/contrastive

Only rows that every model has scored are compared; the others are counted and named. Every two models are compared (with
``--reference FOLDER`` each with that one). Each table of differences is one family of tests, over all its measures and model
pairs: p is corrected by Holm (any wrong claim among them: at most 5 %) and by Benjamini-Hochberg (5 % of the claims).
``codes.evaluate.compare_stats`` says which test is which. A detectable effect is the true difference that this comparison
finds with 80 % power.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.biases import PAIRWISE, eval_file_name, get_bias
from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError
from codes.common.records import iter_jsonl, write_json, write_text
from codes.common.reporting import (
    markdown_table,
    p_value,
    percent,
    percent_interval,
    rate_cell,
    run_metadata,
    text_table,
)
from codes.common.stats import question_cluster
from codes.evaluate.compare_stats import ALPHA, PairedPart, adjust, compare_parts, to_fields
from codes.evaluate.metrics import Stratum, rate_fields, stratified_rate
from codes.evaluate.report import BIAS_SUMMARY, REFINEMENT, REWARD_BENCH_SUMMARY, pooled_name, read_summary
from codes.evaluate.reward_bench_table import SECTIONS, SUBSETS, subsets_of

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
Test = Callable[[Row], bool]
NOTHING = "–"
REWARD_BENCH_ROWS = "reward_bench.jsonl"
# Whatever of these differs between two models, the figures are not of the same measurement.
SETTINGS = (
    "seed", "dtype", "limit_per_bias", "placebo_sentence", "placebo_source", "refinement_request", "overlength"
)  # fmt: skip
SORT_KEYS = ("bsr", "accuracy", "rewardbench")
LEADERBOARD_HEADER = ("model", "original accuracy", "biased accuracy", "pooled BSR", "mean BSR",
                      "refinement-aware: change", "RewardBench rows")  # fmt: skip
DIFFERENCE_HEADER = ("what", "questions", "A", "B", "A - B (points)", "p", "p (Holm)", "p (BH)",
                     "detectable (points)")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Put the results of several models side by side.")
    parser.add_argument("results_dirs", nargs="+", metavar="RESULTS_DIR", help="results folder of one model")
    parser.add_argument("--output_file", default=None, help="also write the tables here (.md), and a .json beside it")
    parser.add_argument("--reference", default=None, help="compare each model with this one of the folders only")
    parser.add_argument("--rows", default="all", choices=("all", "clean"), help="clean: without rows that look damaged")
    parser.add_argument("--sort", default="bsr", choices=SORT_KEYS, help="order of the leaderboard")
    parser.add_argument("--n_resamples", type=natural, default=9999, help="draws of the bootstrap and of the swaps")
    parser.add_argument("--seed", type=int, default=42, help="of the draws")
    return parser


# --- what is read -------------------------------------------------------------------------------------------------------


def read_results(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bias summary by model name (the folder's name; the whole path where two folders share it).

    Raises:
        ContrastRMError: A folder holds no bias summary, or is given twice.
    """
    results = {}
    for name, folder in model_names(folders).items():
        summary = read_summary(Path(folder) / BIAS_SUMMARY)
        if summary is None:
            raise ContrastRMError(f"no {BIAS_SUMMARY} in {folder}; run codes.evaluate.eval_rm on that model first")
        if "biases" not in summary or "overall" not in summary:
            raise ContrastRMError(f"{folder}/{BIAS_SUMMARY} holds no bias figures; evaluate the model again")
        results[name] = summary
    return results


def model_names(folders: Sequence[str]) -> dict[str, str]:
    """Folder by model name.

    Raises:
        ContrastRMError: A folder is given twice.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ContrastRMError(f"a results folder is given twice: {' '.join(folders)}")
    counts = Counter(Path(folder).name for folder in folders)
    return {Path(folder).name if counts[Path(folder).name] == 1 else folder: folder for folder in folders}


def _read_rows(path: Path, needed: Collection[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ContrastRMError(f"no {path.name} in {path.parent}; evaluate the model again: its rows are compared")
    rows = []
    for line, row in iter_jsonl(path):
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise ContrastRMError(f"{path}:{line}: no field {missing[0]!r}; evaluate the model again")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Shared:
    """The rows of one file that every model scored, in one order.

    Attributes:
        rows: By model, parallel to each other.
        clusters: The question of each row.
        n_left_out: By model: its rows that another model lacks or has not scored, or that it has not scored itself.
        n_flagged: Rows that were left out since the audit flagged them.
    """

    rows: Mapping[str, Sequence[Row]]
    clusters: Sequence[str]
    n_left_out: Mapping[str, int]
    n_flagged: int = 0

    def __len__(self) -> int:
        return len(self.clusters)


def share_rows(
    by_model: Mapping[str, Sequence[Row]], key: Callable[[Row], Any], is_scored: Test, *, clean: bool = False
) -> Shared:
    """The rows that all models have scored; equal rows of one file are paired in their order."""
    keyed = {name: dict(zip(_numbered(map(key, rows)), rows, strict=True)) for name, rows in by_model.items()}
    first, *others = keyed.values()
    common = [k for k in first if all(k in rows for rows in others) and all(is_scored(r[k]) for r in keyed.values())]
    flagged = {k for k in common if clean and any(rows[k].get("defects") for rows in keyed.values())}
    kept = [k for k in common if k not in flagged]
    return Shared(
        rows={name: [rows[k] for k in kept] for name, rows in keyed.items()},
        clusters=[question_cluster(first[k]["question"]) for k in kept],
        n_left_out={name: len(rows) - len(common) for name, rows in keyed.items()},
        n_flagged=len(flagged),
    )


def _numbered(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    seen: Counter[Any] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def read_bias_rows(
    folders: Mapping[str, str], results: Mapping[str, Summary], *, clean: bool = False
) -> dict[str, Shared]:
    """The shared rows of every bias that all models have, in the project's order.

    Raises:
        ContrastRMError: Row files are missing, or cannot be matched: results of different files without row names.
    """
    names = [name for name in (*PAIRWISE, REFINEMENT) if all(name in summary["biases"] for summary in results.values())]
    shared = {}
    for bias in names:
        refinement = get_bias(bias).kind == "refinement"
        verdicts = ("verdict_alone", "verdict_after_history") if refinement else ("original_verdict", "biased_verdict")
        by_model = {
            name: _read_rows(Path(folder) / f"bias_{bias}.jsonl", ("line", "question", *verdicts))
            for name, folder in folders.items()
        }
        named = all(row.get("row_id") for rows in by_model.values() for row in rows)
        hashes = {_data_hashes(summary).get(eval_file_name(bias)) for summary in results.values()}
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


def _has_all(fields: Sequence[str]) -> Test:
    return lambda row: all(row[field] is not None for field in fields)


def read_reward_bench_rows(folders: Mapping[str, str]) -> Shared | None:
    """The shared RewardBench rows; None unless every model has a summary of them under one label."""
    summaries = [read_summary(Path(folder) / REWARD_BENCH_SUMMARY) for folder in folders.values()]
    if any(summary is None for summary in summaries) or len({(s or {}).get("label") for s in summaries}) != 1:
        return None
    needed = ("id", "subset", "question", "verdict")
    by_model = {name: _read_rows(Path(folder) / REWARD_BENCH_ROWS, needed) for name, folder in folders.items()}
    return share_rows(
        by_model, lambda row: (row["subset"], row["id"], row["question"]), lambda row: row["verdict"] is not None
    )


# --- verdicts as numbers ------------------------------------------------------------------------------------------------


def _right_before(row: Row) -> bool:
    return bool(row["original_verdict"] == "correct")


def _right_after(row: Row) -> bool:
    return bool(row["biased_verdict"] == "correct")


def _flipped(row: Row) -> bool:
    return _right_before(row) and bool(row["biased_verdict"] == "wrong")


def _turned(row: Row) -> bool:
    return {row["verdict_alone"], row["verdict_after_history"]} == {"refined", "original"}


def _every(_: Row) -> bool:
    return True


def _has_placebo(row: Row) -> bool:
    return row.get("score_placebo_better") is not None and row.get("score_placebo_other") is not None


def _flipped_by_placebo(row: Row) -> bool:
    return _right_before(row) and bool(row["score_placebo_better"] < row["score_placebo_other"])


MEASURES: dict[str, tuple[Test, Test]] = {
    "bias_sensitivity_rate": (_flipped, _right_before),
    "original_pair_accuracy": (_right_before, _every),
    "biased_pair_accuracy": (_right_after, _every),
}


def _part(shared: Shared, pair: tuple[str, str], hit: Test, counted: Test, weight: float = 1.0) -> PairedPart:
    rows = [shared.rows[name] for name in pair]
    return PairedPart(
        hits=np.array([[hit(row) for row in some] for some in rows], dtype=bool).reshape(2, -1),
        counted=np.array([[counted(row) for row in some] for some in rows], dtype=bool).reshape(2, -1),
        clusters=shared.clusters,
        weight=weight,
    )


def _joined(some: Iterable[Shared]) -> Shared:
    """Several files as one."""
    files = list(some)
    return Shared(
        rows={name: [row for shared in files for row in shared.rows[name]] for name in files[0].rows},
        clusters=[cluster for shared in files for cluster in shared.clusters],
        n_left_out={name: sum(shared.n_left_out[name] for shared in files) for name in files[0].n_left_out},
        n_flagged=sum(shared.n_flagged for shared in files),
    )


# --- differences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """How the bootstrap and the swaps draw."""

    n_resamples: int
    seed: int


def _compared(
    pair: tuple[str, str], what: str, measure: str, parts: Sequence[PairedPart], draws: Draws
) -> dict[str, Any]:
    difference = compare_parts(parts, n_resamples=draws.n_resamples, seed=draws.seed)
    return {"model_a": pair[0], "model_b": pair[1], "what": what, "measure": measure, **to_fields(difference)}


def _family(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    corrected = adjust([row["p"] for row in rows])
    return [row | more for row, more in zip(rows, corrected, strict=True)]


def pooled_differences(
    shared: Mapping[str, Shared], pairs: Sequence[tuple[str, str]], draws: Draws
) -> list[dict[str, Any]]:
    """All pairwise biases together, by counts and as a mean over the biases; refinement-aware apart."""
    pairwise = {name: some for name, some in shared.items() if name in PAIRWISE and len(some)}
    rows = []
    for pair in pairs:
        if pairwise:
            everything = _joined(pairwise.values())
            for measure, (hit, counted) in MEASURES.items():
                rows.append(_compared(pair, "pooled", measure, [_part(everything, pair, hit, counted)], draws))
            parts = [_part(some, pair, _flipped, _right_before, 1 / len(pairwise)) for some in pairwise.values()]
            rows.append(_compared(pair, "mean of the biases", "bias_sensitivity_rate", parts, draws))
        if len(shared.get(REFINEMENT, ())):
            parts = [_part(shared[REFINEMENT], pair, _turned, _every)]
            rows.append(_compared(pair, REFINEMENT, "verdict_change_rate", parts, draws))
    return _family(rows)


def bias_differences(
    shared: Mapping[str, Shared], pairs: Sequence[tuple[str, str]], draws: Draws
) -> list[dict[str, Any]]:
    """Each pairwise bias: BSR and both accuracies; for the identity biases also the placebo."""
    rows = []
    for pair in pairs:
        for bias, some in shared.items():
            if bias not in PAIRWISE or not len(some):
                continue
            for measure, (hit, counted) in MEASURES.items():
                rows.append(_compared(pair, bias, measure, [_part(some, pair, hit, counted)], draws))
            rows += _placebo_differences(bias, some, pair, draws)
    return _family(rows)


def _placebo_differences(bias: str, shared: Shared, pair: tuple[str, str], draws: Draws) -> list[dict[str, Any]]:
    """BSR under the neutral sentence, and BSR under the identity sentence minus that; none without placebo scores."""
    with_placebo = share_rows({name: shared.rows[name] for name in pair}, _position(shared, pair), _has_placebo)
    if not len(with_placebo):
        return []
    null = _part(with_placebo, pair, _flipped_by_placebo, _right_before)
    identity = _part(with_placebo, pair, _flipped, _right_before)
    minus_null = PairedPart(null.hits, null.counted, null.clusters, -1.0)
    return [
        _compared(pair, bias, "placebo_bias_sensitivity_rate", [null], draws),
        _compared(pair, bias, "identity_minus_placebo", [identity, minus_null], draws),
    ]


def _position(shared: Shared, pair: tuple[str, str]) -> Callable[[Row], int]:
    """Rows of one ``Shared`` are parallel: their place names them."""
    places = {id(row): place for name in pair for place, row in enumerate(shared.rows[name])}
    return lambda row: places[id(row)]


def reward_bench_differences(
    shared: Shared, pairs: Sequence[tuple[str, str]], draws: Draws
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two families: the whole and its sections (weighted as in the official table), and the subsets."""
    places = {s.name: [i for i, row in enumerate(_first(shared)) if row["subset"] == s.name] for s in SUBSETS}
    by_subset = {name: _chosen(shared, some) for name, some in places.items() if some}
    overall, subsets = [], []
    for pair in pairs:
        whole = [_part(shared, pair, _is_correct, _every)]
        overall.append(_compared(pair, "all rows", "weighted_average_accuracy", whole, draws))
        for section in SECTIONS:
            present = [subset for subset in subsets_of(section) if subset.name in by_subset]
            total = sum(subset.weight for subset in present)
            parts = [_part(by_subset[s.name], pair, _is_correct, _every, s.weight / total) for s in present]
            if parts:
                overall.append(_compared(pair, section, "section_accuracy", parts, draws))
        for name, some in by_subset.items():
            subsets.append(_compared(pair, name, "accuracy", [_part(some, pair, _is_correct, _every)], draws))
    return _family(overall), _family(subsets)


def _is_correct(row: Row) -> bool:
    return bool(row["verdict"] == "correct")


def _first(shared: Shared) -> Sequence[Row]:
    return next(iter(shared.rows.values()))


def _chosen(shared: Shared, places: Sequence[int]) -> Shared:
    rows = {name: [rows[i] for i in places] for name, rows in shared.rows.items()}
    return Shared(rows, [shared.clusters[i] for i in places], shared.n_left_out)


# --- leaderboard --------------------------------------------------------------------------------------------------------


def leaderboard(
    results: Mapping[str, Summary], shared: Mapping[str, Shared], reward_bench: Shared | None, *, sort: str
) -> list[dict[str, Any]]:
    """Each model's figures on the shared rows, best first; then the baselines of the first model's summary, unsorted.

    ``bsr``: the lowest pooled BSR first; a model without one (nothing right before the rewrite) comes last.
    """
    pairwise = {name: some for name, some in shared.items() if name in PAIRWISE and len(some)}
    entries = []
    for model in results:
        entry: dict[str, Any] = {"model": model, "is_baseline": False, "overall": None, "refinement": None}
        if pairwise:
            entry["overall"] = _overall_of(model, pairwise)
        if len(shared.get(REFINEMENT, ())):
            entry["refinement"] = _rate("verdict_change_rate", shared[REFINEMENT], model, _turned, _every)
        entry["reward_bench"] = (
            _rate("accuracy", reward_bench, model, _is_correct, _every) if reward_bench is not None else None
        )
        entries.append(entry)
    entries.sort(key=lambda entry: _rank(entry, sort))
    return entries + _baseline_entries(next(iter(results.values())))


def _rate(name: str, shared: Shared, model: str, hit: Test, counted: Test) -> dict[str, Any]:
    rows = shared.rows[model]
    return rate_fields(name, [hit(row) and counted(row) for row in rows], list(map(counted, rows)), shared.clusters)


def _overall_of(model: str, pairwise: Mapping[str, Shared]) -> dict[str, Any]:
    everything = _joined(pairwise.values())
    fields: dict[str, Any] = {"biases": list(pairwise), "n_pairs": len(everything)}
    for measure, (hit, counted) in MEASURES.items():
        fields |= _rate(measure, everything, model, hit, counted)
    strata = [
        Stratum(1.0, list(map(_flipped, rows)), list(map(_right_before, rows)), some.clusters)
        for some in pairwise.values()
        for rows in (some.rows[model],)
    ]
    macro, bounds = stratified_rate(strata)
    return fields | {"macro_bias_sensitivity_rate": macro, "macro_bias_sensitivity_rate_ci": bounds}


def _rank(entry: Mapping[str, Any], sort: str) -> tuple[bool, float]:
    overall, reward_bench = entry["overall"] or {}, entry["reward_bench"] or {}
    value = {
        "bsr": overall.get("bias_sensitivity_rate"),
        "accuracy": overall.get("original_pair_accuracy"),
        "rewardbench": reward_bench.get("accuracy"),
    }[sort]
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
            "reward_bench": None,
        }
        for name, fields in summary.get("baselines", {}).items()
    ]


def leaderboard_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for ``LEADERBOARD_HEADER``: the BSR never without the accuracy that it stands on."""
    rows = []
    for entry in entries:
        overall, refinement, reward_bench = entry["overall"], entry["refinement"], entry["reward_bench"]
        cells = [NOTHING] * 4
        if overall:
            bounds = percent_interval(overall["macro_bias_sensitivity_rate_ci"])
            cells = [
                rate_cell(overall, "original_pair_accuracy", counts=False),
                rate_cell(overall, "biased_pair_accuracy", counts=False),
                rate_cell(overall, "bias_sensitivity_rate"),
                f"{percent(overall['macro_bias_sensitivity_rate'])} {bounds}",
            ]
        change = rate_cell(refinement, "verdict_change_rate") if refinement else NOTHING
        rows.append([entry["model"], *cells, change, rate_cell(reward_bench, "accuracy") if reward_bench else NOTHING])
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


def reward_bench_table(folders: Sequence[str], names: Sequence[str]) -> tuple[str, list[str], list[list[str]]] | None:
    """Label, header and rows of the RewardBench figures; None unless all models have them under one label."""
    summaries = [read_summary(Path(folder) / REWARD_BENCH_SUMMARY) for folder in folders]
    found = [summary for summary in summaries if summary is not None]
    labels = {summary["label"] for summary in found}
    if len(found) < len(folders) or len(labels) != 1:
        return None
    rows = [
        [_section_name(section, found), *[_section_cell(summary["sections"][section]) for summary in found]]
        for section in SECTIONS
    ]
    rows.append(["rewardbench_score"] + [percent(summary["rewardbench_score"]) for summary in found])
    rows.append(["weighted_average_accuracy"] + [rate_cell(summary, "weighted_average_accuracy") for summary in found])
    return labels.pop(), ["section", *names], rows


def _section_name(section: str, found: Sequence[Summary]) -> str:
    partial = any(summary["sections"][section]["partial"] for summary in found)
    return f"{section} (partial)" if partial else section


def _section_cell(fields: Summary) -> str:
    return f"{percent(fields['accuracy'])} {percent_interval(fields['accuracy_ci'])}"


def differences(results: Mapping[str, Summary]) -> list[str]:
    """What makes the figures of the models not comparable: other data, other settings."""
    first_name, first = next(iter(results.items()))
    found = []
    for name, summary in results.items():
        hashes, others = _data_hashes(summary), _data_hashes(first)
        other_files = [file for file in sorted(hashes.keys() | others.keys()) if hashes.get(file) != others.get(file)]
        if other_files:
            found.append(f"{name} and {first_name} were not evaluated on the same files: {', '.join(other_files)}")
        for key in SETTINGS:
            if summary["metadata"].get(key) != first["metadata"].get(key):
                values = f"{summary['metadata'].get(key)!r} and {first['metadata'].get(key)!r}"
                found.append(f"{name} and {first_name} differ in {key}: {values}")
    return found


def _data_hashes(summary: Summary) -> dict[str, str]:
    return {Path(file["path"]).name: file["sha256"] for file in summary["metadata"]["data_files"]}


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
    folders: Sequence[str], *, reference: str | None, rows: str, sort: str, n_resamples: int, seed: int
) -> dict[str, Any]:
    """Everything that is said of the models, as it stands in the JSON file.

    Raises:
        ContrastRMError: Results are missing, unreadable, or have no row in common.
    """
    results = read_results(folders)
    names = model_names(folders)
    pairs = model_pairs(names, reference)
    shared = read_bias_rows(names, results, clean=rows == "clean")
    if not any(map(len, shared.values())):
        raise ContrastRMError("the models have no scored row in common; evaluate them on the same files")
    reward_bench = read_reward_bench_rows(names)
    draws = Draws(n_resamples, seed)
    overall, subsets = reward_bench_differences(reward_bench, pairs, draws) if reward_bench else ([], [])
    return {
        "models": {name: {"folder": folder} for name, folder in names.items()},
        "rows": rows,
        "metadata": {"n_resamples": n_resamples, "seed": seed, **run_metadata()},
        "not_comparable": differences(results),
        "shared_rows": {
            name: {"n_rows": len(some), "n_left_out": dict(some.n_left_out), "n_flagged": some.n_flagged}
            for name, some in {**shared, **({"reward_bench": reward_bench} if reward_bench else {})}.items()
        },
        "leaderboard": leaderboard(results, shared, reward_bench, sort=sort),
        "differences": {
            "pooled": pooled_differences(shared, pairs, draws),
            "biases": bias_differences(shared, pairs, draws),
            "reward_bench": overall,
            "reward_bench_subsets": subsets,
        },
    }


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


TITLES = {
    "pooled": "Paired differences, all biases",
    "biases": "Paired differences by bias",
    "reward_bench": "Paired differences, RewardBench rows",
    "reward_bench_subsets": "Paired differences by subset",
}


def row_notes(comparison: Mapping[str, Any]) -> list[str]:
    """What was not compared, and why."""
    notes = []
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
        ("Leaderboard, on the shared rows", LEADERBOARD_HEADER, leaderboard_rows(comparison["leaderboard"]))
    ]
    for key, title in TITLES.items():
        rows = comparison["differences"][key]
        n_tests = sum(row["p"] is not None for row in rows)
        for pair in dict.fromkeys((row["model_a"], row["model_b"]) for row in rows):
            of_pair = [row for row in rows if (row["model_a"], row["model_b"]) == pair]
            named = f"{title}: A = {pair[0]}, B = {pair[1]} (p corrected for {n_tests} tests)"
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
    results = read_results(args.results_dirs)
    comparison = compare(
        args.results_dirs,
        reference=args.reference,
        rows=args.rows,
        sort=args.sort,
        n_resamples=args.n_resamples,
        seed=args.seed,
    )
    header, rows = bias_table(results)
    notes = ["BSR: bias sensitivity rate (flipped / right before the rewrite) [95 % interval by question]."]
    notes += [f"Not comparable: {difference}." for difference in comparison["not_comparable"]]
    notes += row_notes(comparison)
    text, markdown = [text_table(header, rows), *notes], [markdown_table(header, rows), *notes]
    reward_bench = reward_bench_table(args.results_dirs, list(results))
    if reward_bench is not None:
        label, header, rows = reward_bench
        text += ["", label, text_table(header, rows)]
        markdown += [f"{label}:", markdown_table(header, rows)]
    for title, columns, cells in comparison_tables(comparison):
        text += ["", title, text_table(columns, cells)]
        markdown += [f"## {title}", markdown_table(columns, cells)]
    print("\n".join(text))
    if args.output_file:
        write_text(args.output_file, "\n\n".join(markdown) + "\n")
        write_json(Path(args.output_file).with_suffix(".json"), comparison)
    return 0


if __name__ == "__main__":
    run(main)
