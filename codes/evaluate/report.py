"""The report that people look at: one model, or several side by side.

Reads ``bias_summary.json``, ``bias_<bias>.jsonl`` and ``reward_bench_summary.json`` of one or more results folders
(any may be absent) and, for the texts of the pairs that turned, the evaluation files that the summaries name.
Writes ``report.html`` (one file that fetches nothing), ``report.md``, every plot as SVG and PNG, and
``flipped_pairs.jsonl``. Both evaluations write the report of their model when they end; of several models:

    python -m codes.evaluate.report results/base results/pairwise results/contrastive --output results/report
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError, optional
from codes.common.records import ensure_writable_folder, open_atomic, write_jsonl, write_text
from codes.evaluate.report_page import Page, PairView, render_html, render_markdown
from codes.evaluate.report_pairs import TextSource, choose_pairs, turned_pairs
from codes.evaluate.report_parts import parts_of
from codes.evaluate.report_plots import Plot
from codes.evaluate.report_tables import missing_blocks
from codes.evaluate.results import BIAS_SUMMARY, ModelResults, differences, read_results, rows_file_missing

PAIRS_FILE = "flipped_pairs.jsonl"
# A page that a phone opens at once: at most so many pairs, and so many bytes of their texts.
MAX_PAIRS = 300
MAX_TEXT_BYTES = 2_500_000
# By figure: those of an earlier report that this one does not have are removed.
PLOT_NAMES = (
    "bias_sensitivity",
    "pair_accuracy",
    "flip_attribution*",
    "score_gaps*",
    "reward_bench_sections",
    "reward_bench_subsets",
)
_LEAD = (
    "How far style moves the verdicts of a reward model. A pair of answers is scored before and after a rewrite that changes "
    "style and not substance. Every rate stands beside its counts and a 95 % interval that is clustered by question."
)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the report of one or more evaluated models.")
    parser.add_argument("results_dirs", nargs="+", metavar="RESULTS_DIR", help="results folder of one model")
    parser.add_argument("--output", default=None, help="folder of the report; of one model: its results folder")
    parser.add_argument(
        "--max_pairs", type=natural, default=MAX_PAIRS, help="most pairs that the page shows with their texts"
    )
    return parser


# --- writing ---


def write_report(folder: Path) -> None:
    """Write the report of one model into its results folder, from whatever summaries are there.

    The results lie there already: what keeps the report from being written is a warning.
    """
    with optional(f"the report in {folder}"):
        write_joint_report([folder], folder)


def write_joint_report(folders: Sequence[Path], output: Path, *, max_pairs: int = MAX_PAIRS) -> Page:
    """Write one report over all the folders.

    Raises:
        ContrastRMError: A folder holds no results, a file in it is broken, or a file cannot be written.
    """
    results = read_results(folders)
    page, pairs = build_page(results, max_pairs=max_pairs)
    plots = [figure.plot for part in page.parts for figure in part.figures]
    written = {name for plot in plots for name in _write_plot(output, plot)}
    for pattern in PLOT_NAMES:
        for path in [*output.glob(f"{pattern}.svg"), *output.glob(f"{pattern}.png")]:
            if path.name not in written and path.is_file():
                path.unlink()
    write_jsonl(output / PAIRS_FILE, pairs)
    write_text(output / "report.md", render_markdown(page))
    write_text(output / "report.html", render_html(page))
    return page


def _write_plot(folder: Path, plot: Plot) -> list[str]:
    """Names of the files; none, with a warning, where they cannot be written: the page has the picture too."""
    try:
        write_text(folder / f"{plot.name}.svg", plot.svg)
        with open_atomic(folder / f"{plot.name}.png") as handle:
            cast(io.TextIOWrapper, handle).buffer.write(plot.png)
    except (ContrastRMError, OSError) as error:
        print(f"warning: no picture {plot.name} in files of its own: {error}", file=sys.stderr)
        return []
    return [f"{plot.name}.svg", f"{plot.name}.png"]


# --- the page ---


def build_page(results: Sequence[ModelResults], *, max_pairs: int = MAX_PAIRS) -> tuple[Page, list[dict[str, Any]]]:
    """The page, and every pair that turned as a row."""
    names = [model.name for model in results]
    title = f"Evaluation of {names[0]}" if len(names) == 1 else f"{len(names)} reward models compared"
    page = Page(title, _LEAD, [(model.name, _described(model)) for model in results], notes_of(results))
    page.parts = parts_of(results)
    pairs = turned_pairs(rows for model in results for rows in model.rows)
    if any(model.rows for model in results):
        texts = TextSource()
        chosen = choose_pairs(pairs, texts, max_pairs=max_pairs, max_bytes=MAX_TEXT_BYTES)
        notes = [f"Texts are missing: {problem}." for problem in texts.problems]
        if len(chosen) < len(pairs):
            notes.append("Shown are, from every bias and model in turn, the pairs whose score gap moved furthest.")
        page.pairs = PairView([model.name for model in results if model.rows], chosen, len(pairs), notes, PAIRS_FILE)
    return page, [pair.to_row() for pair in pairs]


def notes_of(results: Sequence[ModelResults]) -> list[str]:
    """What is missing in the results, and what makes them not comparable; what holds for several models once."""
    of_models: dict[str, list[str]] = {}
    for model in results:
        for note in _notes_of_model(model):
            of_models.setdefault(note, []).append(model.name)
    notes = []
    for note, names in of_models.items():
        who = "" if len(results) == 1 else "every model: " if len(names) == len(results) else f"{', '.join(names)}: "
        notes.append(f"{who}{note}")
    return notes + not_comparable(results)


def _notes_of_model(model: ModelResults) -> list[str]:
    notes = []
    if model.bias is not None:
        missing = missing_blocks(model.bias)
        if missing:
            notes.append(f"left out, because {BIAS_SUMMARY} does not have it: {', '.join(missing)}. Evaluate again.")
        gone = rows_file_missing(model.folder, model.bias)
        if gone:
            notes.append(f"no distributions and no pairs of {', '.join(gone)}: the rows files have gone.")
    return notes + _scoring_notes(model)


def _scoring_notes(model: ModelResults) -> list[str]:
    notes, metadata = [], model.metadata
    traces = {name: fields.get("n_without_trace") for name, fields in (model.bias or {"biases": {}})["biases"].items()}
    if any(traces.values()):
        named = ", ".join(f"{name} {count}" for name, count in traces.items() if count)
        notes.append(f"changed texts with exactly their old score (cut away by the length limit?): {named}.")
    for key, what in (("n_truncated_texts", "were cut"), ("n_dropped_texts", "were dropped, their pairs excluded")):
        if metadata.get(key):
            notes.append(f"{metadata[key]} of {metadata.get('n_texts', '?')} texts {what}: see the length limit.")
    return notes


def not_comparable(results: Sequence[ModelResults]) -> list[str]:
    """What makes the figures of the models figures of different measurements."""
    with_bias = {model.name: model.bias for model in results if model.bias and "data_files" in model.bias["metadata"]}
    notes = [f"Not comparable: {text}." for text in differences(with_bias)] if len(with_bias) > 1 else []
    baselines = [(name, summary["baselines"]) for name, summary in with_bias.items() if summary.get("baselines")]
    if any(figures != baselines[0][1] for _, figures in baselines):
        notes.append(
            f"The models were scored on different rows: the baselines are those on the rows of {baselines[0][0]}."
        )
    labels = {model.reward_bench["label"] for model in results if model.reward_bench is not None}
    if len(labels) > 1:
        notes.append(f"Not comparable: the preference accuracies are of different data ({'; '.join(sorted(labels))}).")
    for what, has in (("bias", lambda model: model.bias), ("RewardBench", lambda model: model.reward_bench)):
        without = [model.name for model in results if has(model) is None]
        if without and len(without) < len(results):
            notes.append(f"Without a {what} evaluation: {', '.join(without)}.")
    return notes


def _described(model: ModelResults) -> str:
    metadata = model.metadata
    facts = [str(metadata.get("model_path", model.folder))]
    if metadata.get("weight_hash"):
        facts.append(f"weights {str(metadata['weight_hash'])[:12]}")
    facts += [str(metadata[key]) for key in ("dtype", "device") if metadata.get(key)]
    if model.bias is not None:
        overall = model.bias.get("overall")
        facts += [f"{overall['n_pairs']} pairs"] if overall else []
    if metadata.get("created_utc"):
        facts.append(str(metadata["created_utc"]))
    return " · ".join(facts)


def main(argv: list[str] | None = None) -> int:
    """Read, write, say where."""
    args = build_parser().parse_args(argv)
    folders = [Path(folder) for folder in args.results_dirs]
    if args.output is None and len(folders) > 1:
        raise ContrastRMError("a report of several models needs a folder of its own: give --output")
    output = Path(args.output) if args.output is not None else folders[0]
    if len(folders) > 1 and output.resolve() in [folder.resolve() for folder in folders]:
        raise ContrastRMError(f"--output {output} is the results folder of one model; choose another folder")
    for folder in folders:
        if not folder.is_dir():
            raise ContrastRMError(f"no results folder {folder}; evaluate a model first")
    ensure_writable_folder(output)
    page = write_joint_report(folders, output, max_pairs=args.max_pairs)
    for note in [*page.notes, *(page.pairs.notes if page.pairs else ())]:
        print(f"note: {note}")
    if page.pairs is not None:
        print(f"pairs that turned: {page.pairs.summary}")
    print(f"report: {output / 'report.html'}")
    return 0


if __name__ == "__main__":
    run(main)
