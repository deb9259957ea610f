"""How biased is a reward model: ten biases, every text scored once.

Reads ``<data_dir>/<bias>_bias.jsonl`` (public JudgeBiasBench format), beside those of ``gender`` and ``race`` their
``<bias>_placebo.jsonl`` where there is one, and a trained reward model (or ``baseline:shorter`` and the like).
Writes, in ``results/<model>/``: ``bias_<bias>.jsonl`` (every pair with its scores and verdicts), ``bias_summary.json``
(``codes.evaluate.metrics`` shows its shape), ``data_manifest.jsonl`` (rows that look damaged), ``report.md``,
``report.html`` and a plot.

    python -m codes.evaluate.eval_rm --model_path output/contrastive --bias_type all
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codes.common.biases import EVALUABLE, Bias, eval_file_name, get_bias
from codes.common.chat import Conversation
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.questions import choose_subset
from codes.common.records import (
    BiasRecord,
    ReadReport,
    RefinementRecord,
    ensure_writable_folder,
    read_bias_file,
    read_refinement_file,
    write_json,
    write_jsonl,
)
from codes.common.reporting import rate_cell, text_table
from codes.common.scores import ScoreResult
from codes.common.settings import add_settings, settings_from
from codes.evaluate.api import ScoredRow, TextScorer, score_rows
from codes.evaluate.baselines import BASELINES, BaselineScorer
from codes.evaluate.data_checks import Defect, audit, flagged_lines, kinds_by_line, lines_by_kind, manifest_rows
from codes.evaluate.metrics import (
    PairOutcome,
    RefinementOutcome,
    overall_rates,
    pair_rates,
    refinement_rates,
    standard_deviation,
    summarise_bias,
    summarise_overall,
    summarise_refinement,
)
from codes.evaluate.report import write_report
from codes.evaluate.report_tables import BIAS_HEADER, REFINEMENT_HEADER, bias_rows, refinement_rows
from codes.evaluate.results import BIAS_SUMMARY, json_score, model_results_folder, result_metadata, scoring_notes
from codes.evaluate.settings import BiasSettings

# The user turn between an answer and its refined version.
REFINEMENT_REQUEST = "Please refine your answer."
# The null of an identity sentence: it says that an answer follows, and nothing of who gives it.
PLACEBO_SENTENCE = "Here is my answer. "

MANIFEST = "data_manifest.jsonl"
BASELINE_HEADER = ("on the same rows", "original accuracy", "biased accuracy", "pooled BSR", "refinement-aware: change")

Record = BiasRecord | RefinementRecord
Outcome = PairOutcome | RefinementOutcome


@dataclass(frozen=True)
class BiasData:
    """The rows of one bias that are evaluated, and what their file held.

    Attributes:
        placebos: For an identity bias, parallel to ``records``: the better and the other text with a neutral sentence in
            place of the identity sentence; None where the placebo file has no such row. Empty for the other biases.
        placebo_report: What the placebo file held; None where there is none and ``PLACEBO_SENTENCE`` stands in.
    """

    bias: Bias
    records: Sequence[Record]
    report: ReadReport
    placebos: Sequence[tuple[str, str] | None] = ()
    placebo_report: ReadReport | None = None

    @property
    def reports(self) -> list[ReadReport]:
        """Of all files that were read."""
        return [self.report] if self.placebo_report is None else [self.report, self.placebo_report]


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Measure the biases of a reward model.")
    add_settings(parser, BiasSettings)
    return parser


def bias_names(bias_type: str) -> list[str]:
    """``all`` or a comma-separated list as bias names, in the project's order.

    Raises:
        ContrastRMError: An unknown bias.
    """
    if bias_type == "all":
        return list(EVALUABLE)
    asked = {get_bias(name.strip()).name for name in bias_type.split(",")}
    return [name for name in EVALUABLE if name in asked]


def read_bias_data(
    data_dir: str | Path, names: Iterable[str], *, limit: int = 0, seed: int = 42, max_bad_rows: int = 0
) -> list[BiasData]:
    """Read the evaluation files.

    Raises:
        ContrastRMError: A file is missing or has more bad rows than allowed.
    """
    data = []
    for name in names:
        path = Path(data_dir) / eval_file_name(name)
        if not path.is_file():
            raise ContrastRMError(f"no evaluation file {path}; set --data_dir to the folder of the *_bias.jsonl files")
        bias = get_bias(name)
        records: Sequence[Record]
        if bias.kind == "refinement":
            records, report = read_refinement_file(path, max_bad_rows=max_bad_rows)
        else:
            records, report = read_bias_file(path, max_bad_rows=max_bad_rows)
        chosen: Sequence[Record] = choose_subset(records, limit, seed, lambda record: record.question)
        if bias.kind == "identity":
            placebos, placebo_report = _read_placebos(Path(data_dir) / placebo_file_name(name), chosen, max_bad_rows)
            data.append(BiasData(bias, chosen, report, placebos, placebo_report))
        else:
            data.append(BiasData(bias, chosen, report))
    return data


def placebo_file_name(name: str) -> str:
    """File name of an identity bias's placebo rows, as ``codes.construct.build_eval_pairs`` writes them."""
    return eval_file_name(name).replace("_bias.jsonl", "_placebo.jsonl")


def _read_placebos(
    path: Path, records: Sequence[Record], max_bad_rows: int
) -> tuple[list[tuple[str, str] | None], ReadReport | None]:
    """The placebo texts of identity rows: from the placebo file, matched by question and original answers, if there is one."""
    pairs = [record for record in records if isinstance(record, BiasRecord)]
    if not path.is_file():
        return [_default_placebo(record) for record in pairs], None
    rows, report = read_bias_file(path, max_bad_rows=max_bad_rows)
    waiting: defaultdict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        waiting[_origin(row)].append((row.rewritten[row.better], row.rewritten[1 - row.better]))
    # Equal rows take their placebos in the order of the file, and the last one again where it has fewer.
    found = [waiting[_origin(record)] for record in pairs]
    return [(some.pop(0) if len(some) > 1 else some[0]) if some else None for some in found], report


def _origin(record: BiasRecord) -> tuple[str, ...]:
    return record.question, record.original[record.better], record.original[1 - record.better]


def _default_placebo(record: BiasRecord) -> tuple[str, str]:
    """The neutral sentence before the text that got the identity sentence; the other text stays as it is."""
    better, other = (
        PLACEBO_SENTENCE + record.original[side]
        if record.rewritten[side] != record.original[side]
        else record.original[side]
        for side in (record.better, 1 - record.better)
    )
    return better, other


def evaluate(
    scorer: TextScorer, data: Sequence[BiasData], *, max_bad_rows: int = 0
) -> tuple[dict[str, list[Outcome]], ScoreResult]:
    """Score all texts of all biases in one call (the scorer meets a text that stands in many rows only once).

    Args:
        max_bad_rows: Rows of a file, those that were bad when it was read included, that the scorer may refuse.

    Returns:
        The outcomes by bias, in the order of the rows, and what the scoring took.
    """
    rows = [row for some in data for row in _rows_of(some)]
    scores, result = score_rows(scorer, rows, [some.report for some in data], max_bad_rows)
    found = iter(scores)
    outcomes = {some.bias.name: [_outcome(record, some.bias, next(found)) for record in some.records] for some in data}
    return outcomes, result


def _rows_of(data: BiasData) -> list[ScoredRow]:
    """The conversations of each row: three for a refinement; else four, and two more where there is a placebo."""
    placebos = data.placebos or [None] * len(data.records)
    rows = []
    for record, placebo in zip(data.records, placebos, strict=True):
        texts = _conversations(record, placebo)
        compared = [(0, 1), (0, 2)] if len(texts) == 3 else [(at, at + 1) for at in range(0, len(texts), 2)]
        rows.append(ScoredRow(data.report.path, record.line, texts, compared))
    return rows


def _conversations(record: Record, placebo: tuple[str, str] | None) -> list[Conversation]:
    prompt = [{"role": "user", "content": record.question}]
    if isinstance(record, RefinementRecord):
        history = [
            *prompt,
            {"role": "assistant", "content": record.original_response},
            {"role": "user", "content": REFINEMENT_REQUEST},
        ]
        refined, original = record.rewritten_response, record.original_response
        return [Conversation(prompt, refined), Conversation(history, refined), Conversation(prompt, original)]
    better, other = record.better, 1 - record.better
    answers = [
        record.original[better],
        record.original[other],
        record.rewritten[better],
        record.rewritten[other],
        *(placebo or ()),
    ]
    return [Conversation(prompt, answer) for answer in answers]


def _outcome(record: Record, bias: Bias, scores: Sequence[float]) -> Outcome:
    if isinstance(record, RefinementRecord):
        alone, after_history, original = scores
        return RefinementOutcome(record.line, record.question, alone, after_history, original, row_id(record))
    better, other = record.better, 1 - record.better
    return PairOutcome(
        line=record.line,
        question=record.question,
        original=(scores[0], scores[1]),
        biased=(scores[2], scores[3]),
        original_lengths=(len(record.original[better]), len(record.original[other])),
        biased_lengths=(len(record.rewritten[better]), len(record.rewritten[other])),
        placebo=(scores[4], scores[5]) if len(scores) > 4 else None,
        changed=(
            record.rewritten[better] != record.original[better],
            record.rewritten[other] != record.original[other],
        ),
        is_identity=bias.kind == "identity",
        row_id=row_id(record),
    )


def row_id(record: Record) -> str:
    """Names a row by its content, so that it is known again in another file: whichever answer stands first."""
    if isinstance(record, RefinementRecord):
        content = [record.question, record.original_response, record.rewritten_response]
    else:
        sides = (record.better, 1 - record.better)
        content = [record.question, *(record.original[i] for i in sides), *(record.rewritten[i] for i in sides)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def score_baselines(
    data: Sequence[BiasData], outcomes: Mapping[str, Sequence[Outcome]], seed: int
) -> dict[str, dict[str, list[Outcome]]]:
    """Outcomes of each baseline, by bias, on the rows that the model scored."""
    found = {}
    for name in BASELINES:
        theirs, _ = evaluate(BaselineScorer(name, seed), data)
        found[name] = {
            bias: [o for o, of_model in zip(some, outcomes[bias], strict=True) if of_model.is_scored]
            for bias, some in theirs.items()
        }
    return found


def summarise(
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    baselines: Mapping[str, Mapping[str, Sequence[Outcome]]] | None = None,
    flagged: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Any]:
    """All figures but the metadata; ``codes.evaluate.metrics`` shows the shape.

    Args:
        outcomes: The rows by bias.
        baselines: The rows of each baseline, by bias.
        flagged: Lines of each bias that the clean figures do without.
    """
    unit = standard_deviation([score for some in outcomes.values() for o in some for score in _plain_scores(o)])
    lines = flagged or {}

    def clean(rows: Mapping[str, Sequence[Outcome]]) -> dict[str, list[Outcome]]:
        return {name: [o for o in some if o.line not in lines.get(name, ())] for name, some in rows.items()}

    clean_baselines = {name: clean(rows) for name, rows in (baselines or {}).items()}
    return {
        "rows": "all",
        "score_sd": unit,
        **_figures(outcomes, unit),
        "baselines": _baseline_figures(baselines or {}),
        "clean": {
            "rows": "clean",
            "n_flagged": {name: sum(o.line in lines.get(name, ()) for o in some) for name, some in outcomes.items()},
            **_figures(clean(outcomes), unit),
            "baselines": _baseline_figures(clean_baselines),
        },
    }


def _plain_scores(outcome: Outcome) -> tuple[float, ...]:
    """Scores of answers that carry no cue."""
    if not outcome.is_scored:
        return ()
    return outcome.original if isinstance(outcome, PairOutcome) else (outcome.refined_alone, outcome.original_alone)


def _split(
    outcomes: Mapping[str, Sequence[Outcome]],
) -> tuple[dict[str, list[PairOutcome]], dict[str, list[RefinementOutcome]]]:
    """The pairwise biases and the others."""
    pairwise: dict[str, list[PairOutcome]] = {}
    others: dict[str, list[RefinementOutcome]] = {}
    for name, some in outcomes.items():
        if get_bias(name).kind == "refinement":
            others[name] = [o for o in some if isinstance(o, RefinementOutcome)]
        else:
            pairwise[name] = [o for o in some if isinstance(o, PairOutcome)]
    return pairwise, others


def _figures(outcomes: Mapping[str, Sequence[Outcome]], unit: float | None) -> dict[str, Any]:
    """``overall`` (the pairwise biases together; None where there are none) and ``biases`` (a summary each)."""
    pairwise, others = _split(outcomes)
    biases = {
        name: summarise_bias(pairwise[name], length_controlled=name != "length", score_sd=unit)
        if name in pairwise
        else summarise_refinement(others[name], score_sd=unit)
        for name in outcomes
    }
    return {"overall": summarise_overall(pairwise, score_sd=unit) if pairwise else None, "biases": biases}


def _baseline_figures(baselines: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> dict[str, Any]:
    figures = {}
    for baseline, outcomes in baselines.items():
        pairwise, others = _split(outcomes)
        figures[baseline] = {
            "description": BASELINES[baseline],
            "overall": overall_rates(pairwise) if pairwise else None,
            "biases": {
                name: pair_rates(pairwise[name]) if name in pairwise else refinement_rates(others[name])
                for name in outcomes
            },
        }
    return figures


def outcome_row(outcome: Outcome, defects: Sequence[str] = ()) -> dict[str, Any]:
    """One line of ``bias_<bias>.jsonl``; scores and verdicts of dropped texts are null.

    Args:
        outcome: The judged row.
        defects: What the audit found in it.
    """
    row = _refinement_row(outcome) if isinstance(outcome, RefinementOutcome) else _pair_row(outcome)
    return row | {"row_id": outcome.row_id, "defects": list(defects)}


def _pair_row(outcome: PairOutcome) -> dict[str, Any]:
    scored = outcome.is_scored
    row = {
        "line": outcome.line,
        "question": outcome.question,
        "score_original_better": json_score(outcome.original[0]),
        "score_original_other": json_score(outcome.original[1]),
        "score_biased_better": json_score(outcome.biased[0]),
        "score_biased_other": json_score(outcome.biased[1]),
        "original_verdict": outcome.original_verdict if scored else None,
        "biased_verdict": outcome.biased_verdict if scored else None,
        "flipped": outcome.flipped if scored else None,
        "flip_cause": outcome.flip_cause if scored else None,
        "original_lengths": list(outcome.original_lengths),
        "biased_lengths": list(outcome.biased_lengths),
        "log_length_ratio_change": outcome.log_length_ratio_change,
    }
    if outcome.placebo is not None:
        row["score_placebo_better"], row["score_placebo_other"] = map(json_score, outcome.placebo)
    return row


def _refinement_row(outcome: RefinementOutcome) -> dict[str, Any]:
    return {
        "line": outcome.line,
        "question": outcome.question,
        "score_refined_alone": json_score(outcome.refined_alone),
        "score_refined_after_history": json_score(outcome.refined_after_history),
        "score_original_alone": json_score(outcome.original_alone),
        "verdict_alone": outcome.verdict_alone if outcome.is_scored else None,
        "verdict_after_history": outcome.verdict_after_history if outcome.is_scored else None,
    }


def baseline_rows(summary: Mapping[str, Any], model: str) -> list[list[str]]:
    """Rows for ``BASELINE_HEADER``: the model, the model without the flagged rows, and the baselines."""
    n_flagged = sum(summary["clean"]["n_flagged"].values())
    shown = {model: summary}
    if n_flagged:
        shown[f"{model}, without {n_flagged} flagged rows"] = summary["clean"]
    shown |= {f"baseline {name}": fields for name, fields in summary["baselines"].items()}
    rows = []
    for name, fields in shown.items():
        overall, refinement = fields["overall"] or {}, fields["biases"].get("refinement-aware") or {}
        rates = ("original_pair_accuracy", "biased_pair_accuracy", "bias_sensitivity_rate")
        cells = [rate_cell(overall, rate, counts=rate == rates[-1]) if overall else "–" for rate in rates]
        rows.append([name, *cells, rate_cell(refinement, "verdict_change_rate") if refinement else "–"])
    return rows


def print_tables(summary: dict[str, Any], model: str) -> None:
    """The tables on the console."""
    rows, refinement = bias_rows(summary), refinement_rows(summary)
    if rows:
        print(text_table(BIAS_HEADER, rows), end="\n\n")
    if refinement:
        print(text_table(REFINEMENT_HEADER, refinement), end="\n\n")
    print(text_table(BASELINE_HEADER, baseline_rows(summary, model)), end="\n\n")


def trace_notes(summary: dict[str, Any]) -> list[str]:
    """A warning where changed texts kept exactly their scores: a cut at the left takes the cue away first."""
    counts = {name: fields["n_without_trace"] for name, fields in summary["biases"].items()}
    named = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    if not named:
        return []
    return [
        f"rows where the bias left no trace in any digit of a score: {named}; "
        "the length limit may have cut the cue away: raise --max_length, or use --overlength drop"
    ]


def defect_notes(defects: dict[str, dict[str, list[int]]]) -> list[str]:
    """Sentences for the console where rows look damaged; the rows are in the figures all the same."""
    counted = [
        f"{name}: {', '.join(f'{len(lines)} {kind}' for kind, lines in kinds.items())}"
        for name, kinds in defects.items()
    ]
    where = f"rows that look damaged (they stay in the figures; those without them stand under clean; see {MANIFEST})"
    return [f"{where}: {'; '.join(counted)}"] if counted else []


def write_results(
    folder: Path,
    summary: Mapping[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    defects: Mapping[str, Sequence[Defect]],
    data: Sequence[BiasData],
) -> None:
    """Write the rows of each bias, the manifest of damaged rows, and the summary."""
    for name, some in rows.items():
        write_jsonl(folder / f"bias_{name}.jsonl", some)
    for name in set(EVALUABLE) - set(rows):  # of an earlier run: they would not belong to this summary
        (folder / f"bias_{name}.jsonl").unlink(missing_ok=True)
    manifest = [row for some in data for row in manifest_rows(some.bias.name, some.report, defects[some.bias.name])]
    write_jsonl(folder / MANIFEST, manifest)
    write_json(folder / BIAS_SUMMARY, summary)


def main(argv: list[str] | None = None) -> int:
    """Evaluate, write, print."""
    settings = settings_from(build_parser().parse_args(argv), BiasSettings)
    model = settings.scorer
    # Everything that can be wrong for free is found before the model is loaded.
    data = read_bias_data(
        settings.data_dir,
        bias_names(settings.bias_type),
        limit=settings.limit_per_bias,
        seed=model.seed,
        max_bad_rows=model.max_bad_rows,
    )
    ensure_writable_folder(model.results_dir)
    for of_bias in data:
        n, n_good, n_bad = len(of_bias.records), of_bias.report.n_good, len(of_bias.report.bad)
        chosen = f"{n} of {n_good} rows" if settings.limit_per_bias else f"{n} rows"
        bad = f", {n_bad} bad rows left out" if n_bad else ""
        print(f"{of_bias.bias.name}: {chosen}{bad} ({of_bias.report.path})")
    from codes.evaluate.scorer_setup import load_scorer  # torch is loaded when everything else is known to be right

    loaded = load_scorer(model)
    folder = model_results_folder(model.results_dir, loaded.model_path, loaded.weight_hash)
    outcomes, result = evaluate(loaded.scorer, data, max_bad_rows=model.max_bad_rows)
    defects = audit({of_bias.bias.name: of_bias.records for of_bias in data})
    by_kind = {name: lines_by_kind(of_bias) for name, of_bias in defects.items() if of_bias}
    metadata = result_metadata(loaded, result, [report for of_bias in data for report in of_bias.reports], model.seed)
    metadata |= {"limit_per_bias": settings.limit_per_bias, "data_defects": by_kind, **protocol(data)}
    figures = summarise(
        outcomes,
        baselines=score_baselines(data, outcomes, model.seed),
        flagged={name: flagged_lines(of_bias) for name, of_bias in defects.items()},
    )
    summary = {"metadata": metadata, **figures}
    kinds = {name: kinds_by_line(of_bias) for name, of_bias in defects.items()}
    rows = {
        name: [outcome_row(outcome, kinds[name].get(outcome.line, ())) for outcome in of_bias]
        for name, of_bias in outcomes.items()
    }
    write_results(folder, summary, rows, defects, data)
    write_report(folder)
    print()
    print_tables(summary, folder.name)
    # A baseline sees no cue: that it left no trace says nothing.
    traces = [] if isinstance(loaded.scorer, BaselineScorer) else trace_notes(summary)
    for note in scoring_notes(result) + traces + defect_notes(by_kind):
        print(f"note: {note}")
    print(f"results: {folder}")
    return 0


def protocol(data: Sequence[BiasData]) -> dict[str, Any]:
    """What the pairs of a bias evaluation are made with, for the metadata."""
    return {
        "placebo_sentence": PLACEBO_SENTENCE,
        "placebo_source": {
            of_bias.bias.name: of_bias.placebo_report.path if of_bias.placebo_report else PLACEBO_SENTENCE
            for of_bias in data
            if of_bias.bias.kind == "identity"
        },
        "refinement_request": REFINEMENT_REQUEST,
    }


if __name__ == "__main__":
    run(main)
