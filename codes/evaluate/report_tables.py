"""The tables of the report: what summaries say, of one model or of several, row by row.

Takes summaries as they stand in ``bias_summary.json`` and ``reward_bench_summary.json``; returns rows of text.
Reads and writes nothing. A block that an older summary does not have gives a dash that says so, and is named by
``missing_blocks``.

    python -m pytest tests/test_report.py -k table
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codes.common.biases import PAIRWISE
from codes.common.reporting import Cell, Row, number, p_value, percent, percent_interval, rate
from codes.evaluate.results import REFINEMENT, Summary

CAUSES = ("chosen_alone", "rejected_alone", "either_alone", "only_both")


BIAS_HEADER = ("bias", "pairs", "original accuracy", "biased accuracy", "bias sensitivity rate (BSR)", "ties")
REFINEMENT_HEADER = (REFINEMENT, "items", "verdict change rate", "to refined", "to original", "shift (score SD)")
FLIP_HEADER = ("bias", "right to wrong", "wrong to right", "net", "net, % of pairs")
CAUSE_HEADER = ("bias", "flips", *(cause.replace("_", " ") for cause in CAUSES))
GAP_HEADER = ("bias", "gap shift (score SD)", "p of no shift", "chosen part", "rejected part")
LENGTH_HEADER = ("bias", "steady pairs", "original accuracy", "length-controlled BSR", "intercept (score SD)")
PLACEBO_HEADER = ("bias", "BSR", "placebo BSR", "difference", "p")
CLEAN_HEADER = ("bias", "flagged rows", "original accuracy, all", "clean", "BSR, all", "BSR, clean")
BASELINE_HEADER = ("baseline", "original accuracy", "biased accuracy", "BSR", "mean BSR of the biases", "net flips")
SECTION_HEADER = ("section", "rows", "accuracy", "state")
SUBSET_HEADER = ("subset", "rows", "official rows", "accuracy", "ties", "state")
BENCHMARK_HEADER = ("benchmark", "figure", "value", "rows", "ties", "data", "state")
JUDGE_HEADER = ("judge", "pairs", "without a verdict", "same verdict in both orders", "verdicts for the first answer")
LEADER_HEADER = (
    "model",
    "BSR, pooled",
    "original accuracy",
    "biased accuracy",
    "mean BSR of the biases",
    "net flips",
    "verdicts changed by refinement history",
)
REWARD_BENCH_LEADERS = ("rewardbench_score", "weighted_average_accuracy")

# What a whole summary holds, and what each block is called where it is missing.
BLOCKS = {
    "net_flips": "net flips",
    "flip_attribution": "attribution of the flips",
    "score_gap_shift": "shift of the score gap",
    "length_control": "length control",
}
# Items of a list in the metadata that are shown.
LONGEST_LIST = 8
MISSING = Cell("–", "(not in this summary)")


def pairwise_of(summary: Summary) -> dict[str, Summary]:
    """The pairwise biases of a summary, in the project's order."""
    return {name: summary["biases"][name] for name in PAIRWISE if name in summary["biases"]}


def overall_of(summary: Summary) -> Summary | None:
    """The pooled figures; None where there are none."""
    return summary.get("overall") or None


def refinement_of(summary: Summary) -> Summary | None:
    """The figures of refinement-aware; None where it was not evaluated."""
    return summary["biases"].get(REFINEMENT)


def pooled_name(overall: Summary) -> str:
    """What the pooled row is called: it says so when biases are missing from it."""
    n_biases = len(overall.get("biases", ()))
    return "all nine pooled" if n_biases == len(PAIRWISE) else f"{n_biases} of {len(PAIRWISE)} pooled"


def named_rows(summary: Summary) -> Iterator[tuple[str, Summary]]:
    """Each pairwise bias and, after more than one, all of them pooled."""
    pairwise = pairwise_of(summary)
    yield from pairwise.items()
    overall = overall_of(summary)
    if overall is not None and len(pairwise) > 1:
        yield pooled_name(overall), overall


def missing_blocks(summary: Summary) -> list[str]:
    """What this summary does not have and a summary of today has."""
    pairwise = pairwise_of(summary).values()
    missing = [text for block, text in BLOCKS.items() if pairwise and not any(block in fields for fields in pairwise)]
    if pairwise and overall_of(summary) is None:
        missing.append("pooled figures")
    if any("placebo" not in fields for name, fields in pairwise_of(summary).items() if name in ("gender", "race")):
        missing.append("placebo")
    return missing + [name for name in ("baselines", "clean") if not summary.get(name)]


# --- cells ---


def quantity(value: float | None, shown: str, detail: str = "") -> Cell:
    """A number with its own format, sortable."""
    return Cell("–" if value is None else shown, detail, value)


def _counted(n: int, n_excluded: int) -> Cell:
    return Cell(str(n), f"(+{n_excluded} excluded)" if n_excluded else "", n)


def _decimal(value: float | None, bounds: Sequence[float] | None = None, *, interval: bool = True) -> Cell:
    return quantity(value, f"{value:+.2f}" if value is not None else "", _decimal_bounds(bounds) if interval else "")


def _decimal_bounds(interval: Sequence[float] | None) -> str:
    return "[–]" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _p(value: float | None) -> Cell:
    return Cell(p_value(value), "", value)


def _share(fields: Summary, name: str) -> Cell:
    """A rate that has no counts of its own, such as a mean over biases."""
    if name not in fields:
        return MISSING
    return Cell(percent(fields[name]), percent_interval(fields.get(f"{name}_ci")), fields[name])


def net_cell(fields: Summary) -> Cell:
    """Net flips and what they are the difference of."""
    net = fields.get("net_flips")
    if not net:
        return MISSING
    return Cell(f"{net['net']:+d}", f"({net['correct_to_wrong']} − {net['wrong_to_correct']})", net["net"])


# --- biases ---


def bias_rows(summary: Summary) -> list[Row]:
    """Rows for ``BIAS_HEADER``: each pairwise bias, then all pairs together, then the mean of the biases."""
    rows: list[Row] = [
        [
            name,
            _counted(fields["n_pairs"], fields["n_excluded"]),
            rate(fields, "original_pair_accuracy", counts=False),
            rate(fields, "biased_pair_accuracy", counts=False),
            rate(fields, "bias_sensitivity_rate"),
            f"{fields['n_original_ties']} / {fields['n_biased_ties']}",
        ]
        for name, fields in named_rows(summary)
    ]
    overall = overall_of(summary)
    if overall is not None and len(rows) > 1:
        accuracies = [
            _share(overall, name) if name in overall else ""
            for name in ("macro_original_pair_accuracy", "macro_biased_pair_accuracy")
        ]
        rows.append(["mean of the biases", "", *accuracies, _share(overall, "macro_bias_sensitivity_rate"), ""])
    return rows


def refinement_rows(summary: Summary) -> list[Row]:
    """Rows for ``REFINEMENT_HEADER``: one or none."""
    fields = refinement_of(summary)
    if fields is None:
        return []
    shift = fields["score_shift"]
    return [
        [
            "after its history",
            _counted(fields["n_items"], fields["n_excluded"]),
            rate(fields, "verdict_change_rate"),
            Cell(str(fields["original_to_refined"]), "", fields["original_to_refined"]),
            Cell(str(fields["refined_to_original"]), "", fields["refined_to_original"]),
            _decimal(shift.get("mean_in_score_sd"), shift.get("ci_in_score_sd")),
        ]
    ]


def flip_rows(summary: Summary) -> list[Row]:
    """Rows for ``FLIP_HEADER``; none where the summary does not have them."""
    rows: list[Row] = []
    for name, fields in named_rows(summary):
        net = fields.get("net_flips")
        if net:
            moves = [Cell(str(net[move]), "", net[move]) for move in ("correct_to_wrong", "wrong_to_correct")]
            share = _share(net, "net_share_of_pairs")
            rows.append([name, *moves, Cell(f"{net['net']:+d}", "", net["net"]), share])
    return rows


def cause_rows(summary: Summary) -> list[Row]:
    """Rows for ``CAUSE_HEADER``."""
    rows: list[Row] = []
    for name, fields in named_rows(summary):
        causes = fields.get("flip_attribution")
        if causes:
            shares = [rate(causes, cause) for cause in CAUSES]
            rows.append([name, Cell(str(causes["n_flips"]), "", causes["n_flips"]), *shares])
    return rows


def gap_rows(summary: Summary) -> list[Row]:
    """Rows for ``GAP_HEADER``."""
    rows: list[Row] = []
    for name, fields in named_rows(summary):
        shift = fields.get("score_gap_shift")
        if shift:
            parts = [shift[part] for part in ("total", "chosen_part", "rejected_part")]
            cells = [
                _decimal(part["mean_in_score_sd"], part.get("ci_in_score_sd"), interval="ci_in_score_sd" in part)
                for part in parts
            ]
            rows.append([name, cells[0], _p(parts[0].get("p")), *cells[1:]])
    return rows


def length_rows(summary: Summary) -> list[Row]:
    """Rows for ``LENGTH_HEADER``; the bias ``length`` has none."""
    rows: list[Row] = []
    for name, fields in named_rows(summary):
        control = fields.get("length_control")
        if not control:
            continue
        regression = control.get("regression")
        intercept = Cell("–", "(too few questions, or lengths that do not vary)")
        if regression:
            bounds = regression.get("intercept_ci_in_score_sd")
            intercept = _decimal(regression["intercept_in_score_sd"], bounds, interval=bounds is not None)
            if regression["intercept_is_extrapolated"]:
                intercept = Cell(intercept.value, f"{intercept.detail} (extrapolated)".strip(), intercept.sort)
        elif "n_pairs" in control and name not in PAIRWISE:
            intercept = Cell("–", "(not pooled)")
        rates = [rate(control, key) for key in ("original_pair_accuracy", "bias_sensitivity_rate")]
        rows.append([name, Cell(str(control["n_pairs"]), "", control["n_pairs"]), *rates, intercept])
    return rows


def placebo_rows(summary: Summary) -> list[Row]:
    """Rows for ``PLACEBO_HEADER``: the identity biases."""
    rows: list[Row] = []
    for name, fields in pairwise_of(summary).items():
        placebo = fields.get("placebo")
        if placebo:
            difference = _share(placebo, "identity_minus_placebo")
            rates = [rate(fields, "bias_sensitivity_rate"), rate(placebo, "bias_sensitivity_rate")]
            rows.append([name, *rates, difference, _p(placebo["identity_minus_placebo_p"])])
    return rows


def clean_rows(summary: Summary) -> list[Row]:
    """Rows for ``CLEAN_HEADER``: each figure on all rows and without the rows that the data audit flagged."""
    clean = summary.get("clean")
    if not clean:
        return []
    flagged = clean.get("n_flagged", {})
    cleaned = dict(named_rows(clean))
    rows: list[Row] = []
    for name, fields in named_rows(summary):
        other = cleaned.get(name)
        if other is None:
            continue
        n_flagged = flagged.get(name, 0) if name in PAIRWISE else fields["n_pairs"] - other["n_pairs"]
        rates = [rate(some, key, counts=key == "bias_sensitivity_rate")
                 for key in ("original_pair_accuracy", "bias_sensitivity_rate") for some in (fields, other)]  # fmt: skip
        rows.append([name, Cell(str(n_flagged), "", n_flagged), *rates])
    return rows


def baseline_rows(baselines: Mapping[str, Summary]) -> list[Row]:
    """Rows for ``BASELINE_HEADER``."""
    return [[name, *leader_cells(fields["overall"])] for name, fields in baselines.items() if fields.get("overall")]


def leader_cells(overall: Summary) -> list[Cell]:
    """Original and biased accuracy, pooled BSR, macro mean and net flips of pooled figures."""
    return [
        rate(overall, "original_pair_accuracy"),
        rate(overall, "biased_pair_accuracy"),
        rate(overall, "bias_sensitivity_rate"),
        _share(overall, "macro_bias_sensitivity_rate"),
        net_cell(overall),
    ]


def leader_row(name: str, summary: Summary | None) -> list[str | Cell]:
    """A row for ``LEADER_HEADER``; BSR never stands there without the accuracy before the rewrite."""
    none = Cell("–", "(not evaluated)")
    overall = overall_of(summary) if summary else None
    refinement = refinement_of(summary) if summary else None
    cells = [none] * 5
    if overall:
        original, biased, pooled, macro, net = leader_cells(overall)
        cells = [pooled, original, biased, macro, net]
        if overall.get("missing_biases"):
            cells[0] = Cell(pooled.value, f"{pooled.detail} {pooled_name(overall)}", pooled.sort)
    return [name, *cells, rate(refinement, "verdict_change_rate") if refinement else none]


# --- RewardBench ---


def reward_bench_lines(summary: Summary) -> list[str]:
    """The two overall figures, each with its name and its denominator."""
    return [
        f"rewardbench_score (mean of the four sections): {reward_bench_score(summary)}",
        f"weighted_average_accuracy (correct / rows that are there): {rate(summary, 'weighted_average_accuracy')}",
    ]


def reward_bench_score(summary: Summary) -> Cell:
    """The mean of the sections, or why there is none."""
    if summary["rewardbench_score"] is None:
        return Cell("null", "(a section is partial)")
    bounds = percent_interval(summary["rewardbench_score_ci"])
    return Cell(percent(summary["rewardbench_score"], 2), bounds, summary["rewardbench_score"])


def section_rows(summary: Summary) -> list[Row]:
    """Rows for ``SECTION_HEADER``."""
    return [
        [
            name,
            Cell(str(fields["n_scored"]), "", fields["n_scored"]),
            Cell(percent(fields["accuracy"], 2), percent_interval(fields["accuracy_ci"]), fields["accuracy"]),
            section_state(fields),
        ]
        for name, fields in summary["sections"].items()
    ]


def section_state(fields: Summary) -> str:
    """``complete``, or ``partial`` with the subsets that make it so."""
    if not fields["partial"]:
        return "complete"
    states = {state: fields[f"{state}_subsets"] for state in ("missing", "short", "long")}
    named = [f"{state}: {_named(subsets, fields['n_subsets'])}" for state, subsets in states.items() if subsets]
    return f"partial ({'; '.join(named)})"


def _named(subsets: list[str], n_subsets: int) -> str:
    return "every subset" if len(subsets) == n_subsets else ", ".join(subsets)


def subset_rows(summary: Summary) -> list[Row]:
    """Rows for ``SUBSET_HEADER``."""
    return [
        [
            name,
            _counted(fields["accuracy_total"], fields["n_excluded"]),
            Cell(str(fields["n_official_rows"]), "", fields["n_official_rows"]),
            rate(fields, "accuracy"),
            Cell(str(fields["n_ties"]), "", fields["n_ties"]),
            fields["state"],
        ]
        for name, fields in summary["subsets"].items()
    ]


# --- other benchmarks, and judges ---


def benchmark_row(summary: Summary) -> list[str | Cell]:
    """Cells for ``BENCHMARK_HEADER``: the main figure of a benchmark, what it is of, and whether it is whole."""
    headline = str(summary["headline"])
    figure = rate(summary, headline) if f"{headline}_count" in summary else _share(summary, headline)
    incomplete = [f"{state}: {', '.join(names)}" for state in ("missing", "short", "long")
                  if (names := summary.get(f"{state}_subsets"))]  # fmt: skip
    rows = _counted(summary["n_rows"] - summary["n_excluded"], summary["n_excluded"])
    state = "complete" if summary["complete"] else f"partial ({'; '.join(incomplete)})"
    return [headline, figure, rows, Cell(str(summary["n_ties"]), "", summary["n_ties"]), str(summary["label"]), state]


def consistency_row(judge: Summary) -> list[str | Cell]:
    """Cells for ``JUDGE_HEADER``: what became of a judge's answers, and how far they depend on the order."""
    counts = [judge["n_pairs"], judge["n_pairs_without_verdict"]]
    rates = [rate(judge, name) for name in ("position_consistency", "first_answer_rate")]
    return [*(Cell(str(n), "", n) for n in counts), *rates]


# --- how it was made ---


def metadata_rows(metadata: Summary) -> list[Row]:
    """Field and value, the data files last."""
    rows: list[Row] = [[key, shown(value)] for key, value in metadata.items() if key != "data_files"]
    for file in metadata.get("data_files", []):
        what = f"sha256 {str(file.get('sha256'))[:16]}…, {file.get('n_rows')} rows, {file.get('n_bad_rows')} bad"
        rows.append([str(file.get("path")), what])
    return rows


def shown(value: Any) -> str:
    """A value of the metadata in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items()) if value else "none"
    if isinstance(value, float):
        return number(value, 1)
    if isinstance(value, list):
        rest = f", … ({len(value)} in all)" if len(value) > LONGEST_LIST else ""
        return ", ".join(map(shown, value[:LONGEST_LIST])) + rest
    return str(value)
