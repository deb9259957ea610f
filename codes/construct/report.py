"""The construction report: what came of every planned text, what the judge did, what it cost, and ten rows to read.

Reads ``construction_report.json`` (the steps' sections), ``failed.jsonl`` and the rows that the last step wrote; writes the
section ``summary`` into ``construction_report.json``, and ``construction_report.md`` with ``construction_report.svg``
beside it. Example:

``python -m codes.construct.report --work_dir output/construct``
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from typing import Any

from codes.common.biases import INJECTABLE
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.records import PreferenceRecord, iter_jsonl, iter_preference_file, write_text
from codes.common.reporting import (
    BLUE,
    VERMILION,
    Panel,
    Section,
    markdown_text,
    number,
    percent,
    plot_rates,
    printable,
    render_markdown,
)
from codes.common.stats import mean_interval, wilson
from codes.construct import gptinst, gptout, verify_correctness
from codes.construct.gates import REASONS
from codes.construct.pipeline import (
    FAILED_FILE,
    REPORT_FILE,
    injections_of,
    original_rejected,
    write_report_section,
)

SUMMARY = "summary"
MARKDOWN_FILE = "construction_report.md"
PLOT_FILE = "construction_report.svg"
STEPS = (gptout.STEP, gptinst.STEP, verify_correctness.STEP)
# What the summary takes over from the sections of gptinst and of verify_correctness.
FROM_SIMILAR = ("n_planned", "n_questions", "n_added", "n_failed")
FROM_VERDICTS = (
    "judge",
    "judge_wrote_answers",
    "verdicts",
    "order_flips",
    "position_a",
    "n_dropped_negatives",
    "n_train_rows",
)
N_SAMPLES = 10
# Characters of a text that a sample shows; the rows have the rest.
SHOWN_CHARACTERS = 700


@dataclass
class RowFigures:
    """What one pass over the rows gives.

    Attributes:
        shift_to_source: By bias, log of the length ratio of each injected answer to the answer that it was made from (or,
            written from the question alone, to the record's first original rejected answer), in characters.
        shift_to_chosen: The same, to the chosen answer.
        samples: The rows with the smallest hash of seed and id: the same rows every time, without a look at the content.
    """

    n_rows: int = 0
    n_answers: Counter[str] = field(default_factory=Counter)
    shift_to_source: dict[str, array[float]] = field(default_factory=dict)
    shift_to_chosen: dict[str, array[float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_sections(work_dir: Path) -> dict[str, dict[str, Any]]:
    """The sections of the steps that led to the last file, first step first.

    A work folder may hold the section of a step that took no part in the last run; it is left out, because its output file
    is nobody's input.

    Raises:
        ContrastRMError: No step has left a section.
    """
    path = work_dir / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    present = [step for step in STEPS if step in report]
    if not present:
        raise ContrastRMError(f"{path} holds no step's section; run run_construction.sh (or the steps) first")
    chain = [present.pop()]
    while present:
        step = present.pop()
        if report[step].get("output_file") == report[chain[0]].get("input_file"):
            chain.insert(0, step)
    return {step: report[step] for step in chain}


def read_rows(rows_file: Path, seed: int) -> RowFigures:
    """Read the rows once, one by one."""
    figures = RowFigures()

    def ranked() -> Iterator[tuple[bytes, int, PreferenceRecord]]:
        for index, record in enumerate(iter_preference_file(rows_file, require_rejected=False)):
            figures.n_rows += 1
            _add_shifts(record, figures)
            if any(record.bias_type):
                yield hashlib.blake2b(f"{seed}:{record.id}".encode(), digest_size=8).digest(), index, record

    chosen = heapq.nsmallest(N_SAMPLES, ranked())
    figures.samples = [record.to_row() for _, _, record in sorted(chosen, key=lambda entry: entry[1])]
    return figures


def _add_shifts(record: PreferenceRecord, figures: RowFigures) -> None:
    origins = {entry["index"]: entry for entry in injections_of(record)}
    originals = original_rejected(record)
    for position, (text, bias) in enumerate(zip(record.rejected, record.bias_type, strict=True)):
        if bias is None:
            continue
        figures.n_answers[bias] += 1
        figures.shift_to_chosen.setdefault(bias, array("d")).append(log(len(text) / len(record.chosen)))
        source = origins.get(position, {}).get("source_index")
        if source is None and originals:
            source = originals[0]
        if isinstance(source, int) and 0 <= source < len(record.rejected):
            ratio = len(text) / len(record.rejected[source])
            figures.shift_to_source.setdefault(bias, array("d")).append(log(ratio))


def read_failures(work_dir: Path, steps: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Failed rows by step, class and reason.

    Classes: ``retriable`` and ``row`` (requests without an answer), ``gate`` (texts that a gate refused), ``other`` (no
    usable verdict, records that are lost).
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    path = work_dir / FAILED_FILE
    for _, row in iter_jsonl(path) if path.is_file() else ():
        if row["step"] in steps:
            about = row.get("error_class") or ("gate" if row["reason"] in REASONS else "other")
            counts.setdefault(row["step"], {}).setdefault(about, Counter())[row["reason"]] += 1
    return {
        step: {about: dict(reasons.most_common()) for about, reasons in sorted(classes.items())}
        for step, classes in counts.items()
    }


def shift_summary(logs: array[float] | None) -> dict[str, Any] | None:
    """Mean log length ratio as a factor, with its 95 % interval; None where there is no answer to measure."""
    if not logs:
        return None
    interval = mean_interval(logs)
    bounds = (interval["ci_low"], interval["ci_high"])
    low, high = (None if bound is None else exp(bound) for bound in bounds)
    return {"n": len(logs), "mean_factor": exp(interval["mean"]), "ci_low": low, "ci_high": high}


def bias_figures(sections: Mapping[str, dict[str, Any]], figures: RowFigures) -> dict[str, dict[str, Any]]:
    """By bias: planned, kept, refused by reason, picked by the judge, length shift."""
    planned = sections.get(gptout.STEP, {}).get("by_bias", {})
    picked = sections.get(verify_correctness.STEP, {}).get("picked_over_chosen", {})
    by_bias = {}
    for bias in INJECTABLE:
        if bias not in planned and not figures.n_answers[bias]:
            continue
        counts = planned.get(bias, {"n_planned": 0, "n_kept": 0, "n_refused": {}})
        by_bias[bias] = {
            **counts,
            "kept": wilson(counts["n_kept"], counts["n_planned"]).to_dict(),
            "picked_over_chosen": picked.get(bias, wilson(0, 0).to_dict()),
            "n_in_rows": figures.n_answers[bias],
            "length_to_source": shift_summary(figures.shift_to_source.get(bias)),
            "length_to_chosen": shift_summary(figures.shift_to_chosen.get(bias)),
        }
    return by_bias


def gate_figures(by_bias: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By gate: how many of the texts that came it refused. A text is counted at the first gate that refuses it."""
    refused: Counter[str] = Counter()
    for counts in by_bias.values():
        refused.update({reason: n for reason, n in counts["n_refused"].items() if reason in REASONS})
    n_texts = refused.total() + sum(counts["n_kept"] for counts in by_bias.values())
    return {reason: wilson(refused[reason], n_texts).to_dict() for reason in REASONS if refused[reason]}


def usage_figures(sections: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Tokens and cost by step and in all, of every answer that the result rests on (repeated attempts not included).

    The cost of a step is None where its prices were not given, and so is the sum.
    """
    by_step = {}
    for step, section in sections.items():
        tokens = (section.get("prompt_tokens", 0), section.get("completion_tokens", 0))
        # A step that asked nobody is free, whatever the prices.
        cost = section.get("cost") if any(tokens) else 0.0
        by_step[step] = {
            "n_requests": section.get("n_requests", 0),
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": cost,
        }
    costs = [usage["cost"] for usage in by_step.values()]
    total = {
        name: sum(usage[name] for usage in by_step.values())
        for name in ("n_requests", "prompt_tokens", "completion_tokens")
    }
    return {"by_step": by_step, "total": total | {"cost": None if None in costs else sum(costs)}}


def build_summary(work_dir: Path, seed: int) -> dict[str, Any]:
    """The section ``summary`` of the report.

    Raises:
        ContrastRMError: No step has run here, or the rows that it wrote are gone.
    """
    sections = read_sections(work_dir)
    last = list(sections.values())[-1]
    rows_file = Path(last["output_file"])
    figures = read_rows(rows_file, seed)
    by_bias = bias_figures(sections, figures)
    verdicts = sections.get(verify_correctness.STEP, {})
    similar = sections.get(gptinst.STEP)
    return {
        "steps": list(sections),
        "rows_file": str(rows_file),
        "n_rows": figures.n_rows,
        "by_bias": by_bias,
        "by_gate": gate_figures(by_bias),
        "similar_questions": None if similar is None else {name: similar[name] for name in FROM_SIMILAR},
        **{name: verdicts.get(name) for name in FROM_VERDICTS},
        "usage": usage_figures(sections),
        "failed": read_failures(work_dir, sections),
        "plot": PLOT_FILE,
        "samples": figures.samples,
    }


# --- how it looks -------------------------------------------------------------------------------------------------------


def _share(rate: Mapping[str, Any]) -> str:
    return f"{percent(rate['rate'])} ({rate['count']}/{rate['total']})"


def _factor(shift: Mapping[str, Any] | None) -> str:
    return "–" if shift is None else f"{number(shift['mean_factor'], 2)} (n = {shift['n']})"


def draw_plot(by_bias: Mapping[str, dict[str, Any]]) -> str:
    """Kept texts and texts picked over the chosen, by bias, with 95 % intervals (SVG)."""
    panels = []
    for title, name, colour in (
        ("texts kept by the gates", "kept", BLUE),
        ("picked over the chosen", "picked_over_chosen", VERMILION),
    ):
        rates = [figures[name] for figures in by_bias.values()]
        intervals = [None if rate["rate"] is None else (rate["ci_low"], rate["ci_high"]) for rate in rates]
        panels.append(Panel(title, [rate["rate"] for rate in rates], intervals, colour))
    return plot_rates(list(by_bias), panels)


def report_sections(summary: Mapping[str, Any], plot: str | None) -> list[Section]:
    """The report's sections, as they stand in the Markdown file."""
    sections = [
        Section(
            "Texts by bias",
            [
                "Length: mean factor in characters, against the answer that a text was made from and against the chosen one."
            ],
            ["bias", "kept", "picked over the chosen, per order", "length / source", "length / chosen"],
            [
                [
                    bias,
                    _share(figures["kept"]),
                    _share(figures["picked_over_chosen"]),
                    _factor(figures["length_to_source"]),
                    _factor(figures["length_to_chosen"]),
                ]
                for bias, figures in summary["by_bias"].items()
            ],
            plot,
            PLOT_FILE,
            "Share of texts kept by the gates, and of texts picked over the chosen, by bias",
        ),
        Section(
            "Gates",
            ["Share of the texts that came; each is counted at the first gate that refused it."]
            if summary["by_gate"]
            else ["No gate refused a text."],
            ["gate", "refused", "what it refuses"] if summary["by_gate"] else [],
            [[reason, _share(rate), REASONS[reason]] for reason, rate in summary["by_gate"].items()],
        ),
        Section("Verdicts", list(_verdict_lines(summary))),
        Section(
            "Tokens and cost",
            [
                "Of every answer that the result rests on, those of earlier runs included. Cost: in the currency of the prices."
            ],
            ["step", "requests", "prompt tokens", "completion tokens", "cost"],
            [_usage_row(step, usage) for step, usage in summary["usage"]["by_step"].items()]
            + [_usage_row("all", summary["usage"]["total"])],
        ),
    ]
    failed = [
        [step, about, reason, str(count)]
        for step, classes in summary["failed"].items()
        for about, reasons in classes.items()
        for reason, count in reasons.items()
    ]
    text = (
        "Classes: retriable (the same command asks again), row (only with --retry_failed), gate (text refused), other."
    )
    header = ["step", "class", "reason", "rows"]
    sections.append(Section("Failed rows", [text if failed else "None."], header if failed else [], failed))
    sections += [_sample_section(position, row) for position, row in enumerate(summary["samples"], start=1)]
    return sections


def _verdict_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary["verdicts"]:
        yield "No record was verified."
        return
    yield "; ".join(f"{name}: {count}" for name, count in summary["verdicts"].items()) + "."
    if summary["judge"] is None:
        yield "No judge was asked."
        return
    yield f"Judge: {markdown_text(summary['judge'])}." + (
        " It wrote some of these answers itself, and models favour their own texts."
        * bool(summary["judge_wrote_answers"])
    )
    position = summary["position_a"]
    yield f"Verdicts that change with the order: {_share(summary['order_flips'])}."
    yield f"Position A picked: {_share(position)}; without a preference it would be {percent(position['expected_rate'])}."
    if dropped := summary["n_dropped_negatives"]:
        listed = ", ".join(f"{name} {count}" for name, count in dropped.items())
        yield f"Rejected answers dropped: {listed}."
    yield f"Rows for training: {summary['n_train_rows']} of {summary['n_rows']}."


def _usage_row(name: str, usage: Mapping[str, Any]) -> list[str]:
    cost = "unknown" if usage["cost"] is None else f"{usage['cost']:.4f}"
    return [name, *(f"{usage[key]:,}" for key in ("n_requests", "prompt_tokens", "completion_tokens")), cost]


def _sample_section(position: int, row: Mapping[str, Any]) -> Section:
    prompt = row.get("question") or "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"])
    texts = [("request", prompt), ("chosen", row["chosen"])]
    texts += [(bias or "rejected", text) for bias, text in zip(row["bias_type"], row["rejected"], strict=True)]
    lines = [f"Verdict: {row.get('verify_correctness', 'none')}."]
    lines += [f"**{name}**\n\n{_quoted(text)}" for name, text in texts]
    return Section(f"Sample {position}: {markdown_text(row['id'])}", lines)


def _quoted(text: str) -> str:
    """A text as it is, whatever Markdown it holds."""
    text = printable(text)
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} […]"
    fence = "`" * 3
    while fence in shown:
        fence += "`"
    return f"{fence}text\n{shown}\n{fence}"


def write_report(work_dir: Path, seed: int) -> dict[str, Any]:
    """Write the three files; returns the summary."""
    summary = build_summary(work_dir, seed)
    plot = draw_plot(summary["by_bias"]) if summary["by_bias"] else None
    if plot is not None:
        write_text(work_dir / PLOT_FILE, plot)
    write_text(work_dir / MARKDOWN_FILE, render_markdown("Construction report", report_sections(summary, plot)))
    write_report_section(work_dir, SUMMARY, summary)
    return summary


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work_dir", type=Path, default=Path("output/construct"), help="where the steps left theirs")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of sample rows")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the report from the command line."""
    args = build_parser().parse_args(argv)
    write_report(args.work_dir, args.seed)
    print(f"report: {args.work_dir / MARKDOWN_FILE}")
    return 0


if __name__ == "__main__":
    run(main)
