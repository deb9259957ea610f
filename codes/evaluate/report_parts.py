"""The parts of the report: which figures, plots and sentences stand together, over one model or several.

Takes the results of models; returns ``Part``s. Reads and writes nothing.

    python -m pytest tests/test_report.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from codes.common.biases import PAIRWISE
from codes.common.reporting import Cell, Row, rate
from codes.evaluate.benchmarks import BENCHMARKS
from codes.evaluate.report_page import Figure, Part, Table
from codes.evaluate.report_pairs import gaps_of
from codes.evaluate.report_plots import (
    BASELINE_MARKERS,
    BLUE,
    GREEN,
    MUTED,
    PURPLE,
    VERMILION,
    Plot,
    Series,
    model_style,
    plot_before_after,
    plot_gaps,
    plot_rates,
    plot_shares,
)
from codes.evaluate.report_tables import (
    BENCHMARK_HEADER,
    BIAS_HEADER,
    CAUSE_HEADER,
    CAUSES,
    CLEAN_HEADER,
    FLIP_HEADER,
    GAP_HEADER,
    JUDGE_HEADER,
    LEADER_HEADER,
    LENGTH_HEADER,
    PLACEBO_HEADER,
    REFINEMENT_HEADER,
    SECTION_HEADER,
    SUBSET_HEADER,
    benchmark_row,
    bias_rows,
    cause_rows,
    clean_rows,
    consistency_row,
    flip_rows,
    gap_rows,
    leader_row,
    length_rows,
    metadata_rows,
    named_rows,
    pairwise_of,
    placebo_rows,
    refinement_rows,
    reward_bench_score,
    section_rows,
    subset_rows,
)
from codes.evaluate.results import ModelResults, Summary

# Words that wrap: the keys of the JSON would make a column as wide as they are long.
BENCH_FIGURES = ("weighted average accuracy", "RewardBench score")
BENCH_HEADER = ("model", *BENCH_FIGURES, "data")
CAUSE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)

Rows = Callable[[Summary], Sequence[Row]]


def parts_of(results: Sequence[ModelResults]) -> list[Part]:
    """Every part that the results have figures for, in the order of the page."""
    makers = (_overview, _sensitivity, _flips, _gaps, _placebo, _refinement, _clean, _reward_bench, _benchmarks, _judges,
              _baselines, _making)  # fmt: skip
    return [part for make in makers if (part := make(results)) is not None]


# --- tables over models ---


def joined_rows(results: Sequence[ModelResults], rows_of: Callable[[ModelResults], Sequence[Row]]) -> list[Row]:
    """The rows of all models, those with one name together; with several models the second cell names the model."""
    by_name: dict[str, list[Row]] = {}
    for model in results:
        for first, *rest in rows_of(model):
            joined = [first, *rest] if len(results) == 1 else [first, model.name, *rest]
            by_name.setdefault(str(first), []).append(joined)
    return [row for rows in by_name.values() for row in rows]


def _joined(results: Sequence[ModelResults], caption: str, header: Sequence[str], rows: list[Row]) -> list[Table]:
    """A table; none without rows."""
    if not rows:
        return []
    if len(results) == 1:
        return [Table(caption, header, rows)]
    return [Table(caption, [header[0], "model", *header[1:]], rows, n_names=2)]


def _bias_table(results: Sequence[ModelResults], caption: str, header: Sequence[str], rows: Rows) -> list[Table]:
    return _joined(results, caption, header, joined_rows(results, lambda m: rows(m.bias) if m.bias is not None else []))


def _reward_bench_table(
    results: Sequence[ModelResults], caption: str, header: Sequence[str], rows: Rows
) -> list[Table]:
    found = joined_rows(results, lambda m: rows(m.reward_bench) if m.reward_bench is not None else [])
    return _joined(results, caption, header, found)


# --- parts ---


def _figure(caption: str, draw: Callable[..., Plot], name: str, *values: Any) -> list[Figure]:
    """A plot with its caption; none, with a warning, where it cannot be drawn: its figures stand in the tables."""
    try:
        return [Figure(draw(name, *values), caption)]
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"warning: no picture {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return []


def baselines_of(results: Sequence[ModelResults]) -> Mapping[str, Summary]:
    """The baselines of the first model that has them: they are figures of the rows, not of a model."""
    return next((model.bias["baselines"] for model in results if model.bias and model.bias.get("baselines")), {})


def _overview(results: Sequence[ModelResults]) -> Part:
    with_bench = any(model.reward_bench is not None for model in results)
    header = [*LEADER_HEADER]
    if with_bench:
        header += BENCH_FIGURES
    rows: list[Row] = []
    for model in results:
        row = leader_row(model.name, model.bias)
        if with_bench:
            row += _bench_cells(model.reward_bench)
        rows.append(row)
    for name, fields in baselines_of(results).items():
        row = leader_row(f"baseline: {name}", {"biases": {}, **fields})
        rows.append(row + [Cell("–", "(not of a baseline)")] * (len(header) - len(row)))
    labels = {model.reward_bench["label"] for model in results if model.reward_bench is not None}
    paragraphs = [_OVERVIEW_TEXT]
    if labels:
        paragraphs.append(f"Preference rows: {'; '.join(sorted(labels))}.")
    return Part("overview", "Overview", paragraphs, tables=[Table("Models and baselines", header, rows, as_cards=True)])


def _bench_cells(summary: Summary | None) -> list[Cell]:
    if summary is None:
        return [Cell("–", "(not evaluated)")] * 2
    score = reward_bench_score(summary)
    return [rate(summary, "weighted_average_accuracy"), Cell("–", score.detail) if score.sort is None else score]


def _labels(results: Sequence[ModelResults]) -> list[str]:
    """The biases that any model was evaluated on, in the project's order."""
    return [name for name in PAIRWISE if any(model.bias and name in model.bias["biases"] for model in results)]


def _fields(summary: Summary | None, label: str) -> Summary:
    """The figures of one bias, or of all pooled (any other label); empty where there are none."""
    if summary is None:
        return {}
    return summary["biases"].get(label, {}) if label in PAIRWISE else (summary.get("overall") or {})


def _series(name: str, summary: Summary | None, key: str, labels: Sequence[str], **style: Any) -> Series:
    fields = [_fields(summary, label) for label in labels]
    return Series(name, [some.get(key) for some in fields], [some.get(f"{key}_ci") for some in fields], **style)


def _model_series(results: Sequence[ModelResults], key: str, labels: Sequence[str], **style: Any) -> list[Series]:
    series = []
    for index, model in enumerate(results):
        colour, marker = model_style(index)
        series.append(_series(model.name, model.bias, key, labels, colour=colour, marker=marker, lane=index, **style))
    return series


def _sensitivity(results: Sequence[ModelResults]) -> Part | None:
    biases = _labels(results)
    if not biases:
        return None
    labels = [*biases, "pooled"] if len(biases) > 1 else biases
    rates = _model_series(results, "bias_sensitivity_rate", labels)
    rates += _placebo_series(results, labels)
    for index, (name, fields) in enumerate(baselines_of(results).items()):
        style = {"colour": MUTED, "marker": BASELINE_MARKERS[index % len(BASELINE_MARKERS)], "lane": len(results)}
        some = _series(f"baseline: {name}", {"biases": {}, **fields}, "bias_sensitivity_rate", labels, **style)
        if any(rate is not None for rate in some.rates):
            rates.append(Series(some.name, some.rates, [None] * len(labels), some.colour, some.marker, lane=some.lane))
    figures = [
        *_figure(_SENSITIVITY_CAPTION, plot_rates, "bias_sensitivity", "Bias sensitivity rate (lower is better)",
                 _plot_text("bias sensitivity rate", rates, labels), labels, rates),
        *_figure(_ACCURACY_CAPTION, plot_before_after, "pair_accuracy", "Accuracy before and after the rewrite",
                 "Pair accuracy of every bias before and after the rewrite, with 95 % intervals. "
                 "The figures stand in the table below.", labels,
                 _model_series(results, "original_pair_accuracy", labels, filled=False),
                 _model_series(results, "biased_pair_accuracy", labels)),
    ]  # fmt: skip
    tables = _bias_table(results, "Accuracy and bias sensitivity by bias", BIAS_HEADER, bias_rows)
    return Part("sensitivity", "Bias sensitivity", _SENSITIVITY_TEXT, figures, tables)


def _placebo_series(results: Sequence[ModelResults], labels: Sequence[str]) -> list[Series]:
    series = []
    for index, model in enumerate(results):
        # Of the identity biases alone: pooled with pairs that have no placebo it would be compared with another rate.
        fields = [_fields(model.bias, label) if label in PAIRWISE else {} for label in labels]
        placebo = [some.get("placebo") or {} for some in fields]
        if any(placebo):
            colour, marker = model_style(index)
            name = "placebo" if len(results) == 1 else f"placebo: {model.name}"
            rates = [some.get("bias_sensitivity_rate") for some in placebo]
            intervals = [some.get("bias_sensitivity_rate_ci") for some in placebo]
            series.append(Series(name, rates, intervals, colour, marker, filled=False, lane=index, thin=True))
    return series


def _plot_text(what: str, series: Sequence[Series], labels: Sequence[str]) -> str:
    """The picture in words: the last label's rates, for those who cannot see it; the table has the others."""
    rates = [
        f"{some.name} {100 * some.rates[-1]:.1f} %" for some in series if some.rates and some.rates[-1] is not None
    ]
    return (
        f"{what} of every bias, with 95 % intervals. {labels[-1]}: {', '.join(rates) or 'no rate'}. "
        "The figures stand in the table below."
    )


def _flips(results: Sequence[ModelResults]) -> Part | None:
    tables = _bias_table(results, "Flips both ways", FLIP_HEADER, flip_rows)
    tables += _bias_table(results, "What was enough for a flip", CAUSE_HEADER, cause_rows)
    if not tables:
        return None
    figures: list[Figure] = []
    for index, model in enumerate(results):
        named = [(name, fields["flip_attribution"]) for name, fields in (named_rows(model.bias) if model.bias else ())
                 if fields.get("flip_attribution")]  # fmt: skip
        # A judge's flips have no cause: that needs scores.
        named = [(name, causes) for name, causes in named if causes[f"{CAUSES[0]}_count"] is not None]
        if named:
            counts = [[causes[f"{cause}_count"] for cause in CAUSES] for _, causes in named]
            parts = [(cause.replace("_", " "), colour) for cause, colour in zip(CAUSES, CAUSE_COLOURS, strict=True)]
            text = "Share of the flips by the rewritten text that was enough for them; the counts stand in the table."
            figures += _figure(
                "Which rewritten text, the other left as it was, is enough for the flip.", plot_shares,
                _plot_name("flip_attribution", index, results), _titled("What flipped it", model, results), text,
                [name for name, _ in named], parts, counts)  # fmt: skip
    return Part("flips", "Flips, and what caused them", _FLIP_TEXT, figures, tables)


def _gaps(results: Sequence[ModelResults]) -> Part | None:
    tables = _bias_table(results, "What the rewrite does to the score gap", GAP_HEADER, gap_rows)
    tables += _bias_table(results, "With length held still", LENGTH_HEADER, length_rows)
    figures: list[Figure] = []
    for index, model in enumerate(results):
        labels, gaps = _gap_values(model)
        if labels:
            figures += _figure(
                _GAP_CAPTION, plot_gaps, _plot_name("score_gaps", index, results),
                _titled("Score gaps", model, results), "Histograms of the score gap of every bias, before and after the "
                "rewrite. The mean shifts stand in the table below.", labels, gaps)  # fmt: skip
    if not tables and not figures:
        return None
    return Part("gaps", "Score gaps and length", _GAP_TEXT, figures, tables)


def _gap_values(model: ModelResults) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """By bias, the gaps before and after, in score SDs; a bias without scores or without spread is left out."""
    labels, gaps = [], []
    for bias in pairwise_of(model.bias) if model.bias else ():
        rows = model.rows_of(bias)
        if rows is None or not rows.score_sd:
            continue
        before, after = (np.asarray(values) / rows.score_sd for values in gaps_of(rows))
        if len(before):
            labels.append(bias)
            gaps.append((before, after))
    return labels, gaps


def _plot_name(name: str, index: int, results: Sequence[ModelResults]) -> str:
    return name if len(results) == 1 else f"{name}_{index + 1}"


def _titled(title: str, model: ModelResults, results: Sequence[ModelResults]) -> str:
    return title if len(results) == 1 else f"{title}: {model.name}"


def _placebo(results: Sequence[ModelResults]) -> Part | None:
    tables = _bias_table(results, "Identity sentence against neutral sentence", PLACEBO_HEADER, placebo_rows)
    return Part("placebo", "Placebo of the identity biases", _PLACEBO_TEXT, tables=tables) if tables else None


def _refinement(results: Sequence[ModelResults]) -> Part | None:
    tables = _bias_table(results, "Verdicts that change when the history is shown", REFINEMENT_HEADER, refinement_rows)
    return Part("refinement", "Refinement-aware", _REFINEMENT_TEXT, tables=tables) if tables else None


def _clean(results: Sequence[ModelResults]) -> Part | None:
    tables = _bias_table(results, "All rows and clean rows", CLEAN_HEADER, clean_rows)
    return Part("clean", "Without the flagged rows", _CLEAN_TEXT, tables=tables) if tables else None


def _baselines(results: Sequence[ModelResults]) -> Part | None:
    header = ("bias", "baseline", "pairs", "original accuracy", "biased accuracy", "BSR")
    rows: list[Row] = []
    for label in _labels(results):
        for name, summary in baselines_of(results).items():
            fields = summary["biases"].get(label)
            if fields:
                rates = [rate(fields, key) for key in ("original_pair_accuracy", "biased_pair_accuracy",
                                                       "bias_sensitivity_rate")]  # fmt: skip
                rows.append([label, name, Cell(str(fields["n_pairs"]), "", fields["n_pairs"]), *rates])
    if not rows:
        return None
    described = [f"{name}: {fields['description']}" for name, fields in baselines_of(results).items()
                 if fields.get("description")]  # fmt: skip
    table = Table("Baselines by bias", header, rows, n_names=2)
    return Part("baselines", "Baselines by bias", described, tables=[table], folded=True)


def _reward_bench(results: Sequence[ModelResults]) -> Part | None:
    found = [model for model in results if model.reward_bench is not None]
    if not found:
        return None
    figures = [
        *_bench_figure(_SECTION_CAPTION, results, "sections", "Accuracy by section"),
        *_bench_figure("Dots: accuracy, a tie is not correct.", results, "subsets", "Accuracy by subset"),
    ]
    overall: list[Row] = [[model.name, *_bench_cells(model.reward_bench), str(cast(Summary, model.reward_bench)["label"])]
                          for model in found]  # fmt: skip
    tables = [Table("Both overall figures", BENCH_HEADER, overall)]
    tables += _reward_bench_table(results, "Sections", SECTION_HEADER, section_rows)
    tables += _reward_bench_table(results, "Subsets", SUBSET_HEADER, subset_rows)
    return Part("reward-bench", "RewardBench sections and subsets", _BENCH_TEXT, figures, tables)


def _benchmarks(results: Sequence[ModelResults]) -> Part | None:
    tables = []
    overall: list[Row] = []
    for name, title in ((name, one.title) for name, one in BENCHMARKS.items()):
        found = [(model.name, model.benchmarks[name]) for model in results if name in model.benchmarks]
        overall += [[title, model, *benchmark_row(summary)] for model, summary in found]
        rows: list[Row] = [[subset, model, rate(fields, "accuracy"), fields["state"]] for model, summary in found
                           for subset, fields in summary["subsets"].items()]  # fmt: skip
        if rows:
            tables.append(Table(f"{title}: subsets", ("subset", "model", "accuracy", "state"), rows, n_names=2))
    if not overall:
        return None
    header = (BENCHMARK_HEADER[0], "model", *BENCHMARK_HEADER[1:])
    return Part(
        "benchmarks",
        "Other benchmarks",
        _BENCHMARKS_TEXT,
        (),
        [Table("Main figures", header, overall, n_names=2), *tables],
    )


def _judges(results: Sequence[ModelResults]) -> Part | None:
    rows: list[Row] = []
    for model in results:
        for what, summary in model.summaries:
            judge = (summary.get("judge") or {}).get("overall")
            if judge:
                rows.append([f"{model.name}, {what}", *consistency_row(judge)])
    if not rows:
        return None
    return Part("judges", "Judges", _JUDGE_TEXT, tables=[Table("Answers of the judges", JUDGE_HEADER, rows)])


def _bench_figure(caption: str, results: Sequence[ModelResults], level: str, title: str) -> list[Figure]:
    summaries = [model.reward_bench for model in results]
    labels = list(dict.fromkeys(name for some in summaries if some for name, fields in some[level].items()
                                if fields["accuracy"] is not None))  # fmt: skip
    series = []
    for index, (model, summary) in enumerate(zip(results, summaries, strict=True)):
        if summary is None:
            continue
        colour, marker = model_style(index)
        fields = [summary[level].get(label, {}) for label in labels]
        rates, intervals = [some.get("accuracy") for some in fields], [some.get("accuracy_ci") for some in fields]
        series.append(Series(model.name, rates, intervals, colour, marker, lane=index))
    shown = [f"{label} *" if any(some and some[level].get(label, {}).get("partial") for some in summaries) else label
             for label in labels]  # fmt: skip
    text = f"{title}, with 95 % intervals. The figures stand in the table below."
    return _figure(caption, plot_rates, f"reward_bench_{level}", title, text, shown, series)


def _making(results: Sequence[ModelResults]) -> Part:
    tables = []
    for model in results:
        for what, summary in model.summaries:
            caption = f"{model.name}: {what}"
            tables.append(Table(caption, ("field", "value"), metadata_rows(summary["metadata"]), n_names=2))
    return Part("making", "How the figures were made", (), tables=tables, folded=True)


_OVERVIEW_TEXT = (
    "BSR (bias sensitivity rate) = pairs judged right before the rewrite and wrong after it / pairs judged right before it. "
    "It says little without the original accuracy beside it: a model that is seldom right has little to lose, as the "
    "baselines show. Net flips: right to wrong minus wrong to right."
)
_SENSITIVITY_TEXT = (
    "Ties (before / after) are never flips and stay in the denominators. Pooled: all pairs of the biases together.",
)
_SENSITIVITY_CAPTION = (
    "Filled: the model. Hollow: the placebo, a neutral sentence in place of the identity sentence. Grey: baselines on the "
    "same pairs; one that is never right has no rate."
)
_ACCURACY_CAPTION = "Hollow: before the rewrite. Filled: after it. Broken line: guessing."
_FLIP_TEXT = (
    "A surplus of right-to-wrong flips alone is no evidence of a cue: a model that is better than chance has more right pairs to "
    "lose, and score changes without any direction lose them. The test of the cue is that of the gap shift, below. The "
    "attribution splits the flips by the rewritten text that is enough for the flip on its own.",
)
_GAP_TEXT = (
    "Score gap: score of the better answer − score of the other, in units of the SD of the model's scores. Its change is the "
    "sum of the two parts; p: how often it is as far from zero when the sign of each question's change is drawn by chance. "
    "Length-controlled: only pairs whose log length ratio moves by less than 0.1; the intercept is the "
    "gap's change at an unchanged length ratio.",
)
_GAP_CAPTION = "Upright strokes: medians. Gaps beyond the axis are counted in its last bars."
_PLACEBO_TEXT = (
    "The same answers with a neutral sentence where the sentence of identity stands: what any sentence does there.",
)
_REFINEMENT_TEXT = (
    "The refined answer is scored alone and after its refinement history, both against the unrefined one. Another "
    "denominator than the biases above: it is in no pooled figure.",
)
_CLEAN_TEXT = (
    "The data audit flags rows with, for example, a leaked preamble, an empty text or a text that the rewrite left unchanged; "
    "data_manifest.jsonl lists them. They are in every figure above; here are the main figures without them.",
)
_BENCH_TEXT = (
    "Weighted average accuracy = correct / rows that are there; a tie is not correct. RewardBench score = mean of the four "
    "sections, each the mean of its subsets weighted by the official counts; null as soon as one section is partial.",
)
_BENCHMARKS_TEXT = (
    "Each figure as its paper defines it; a tie is not correct. Partial: not the official number of rows.",
)
_JUDGE_TEXT = (
    "A judge sees each pair in both orders. Its verdict is what both agree on; disagreement is a tie; an answer that cannot be "
    "read is no verdict, and its pair is excluded and counted.",
)
_SECTION_CAPTION = "* a section with missing or extra rows: its accuracy is the mean over what is there."
