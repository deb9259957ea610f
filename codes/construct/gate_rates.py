"""How often the gates see what is there, and how often what is not: words about the writing task, and cues.

Reads: the bias-evaluation files of ``data/eval`` and, where ``CONTRASTRM_EXTERNAL_DATA`` is set, those of its ``judgebias_dev``,
its ``train_pool.jsonl`` (answers that nobody rewrote), and ``benchmarks/leak_labels.json`` (which rewritten texts of the public
files hold words about the writing task: labelled by reading every opening and end that has a word of that kind, before the
patterns were written; doubtful ones stand apart and count nowhere). Writes: ``benchmarks/results/gate_rates.md``.
Run: ``python -m codes.construct.gate_rates`` (a minute).

Patterns and bounds were set on the public rows of one half of the questions, by a hash; the other half is the one to quote. It is
not wholly untouched: who labelled the leaks read both halves, one label was added where a pattern found what the reader left
out, and "summarise" no longer counts as a wish to edit since a first measurement, which found 33 of the 35 leaks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codes.common.biases import INJECTABLE, PAIRWISE, eval_file_name
from codes.common.cli import run
from codes.common.leaks import find_leak
from codes.common.records import (
    BiasRecord,
    RefinementRecord,
    iter_preference_file,
    read_bias_file,
    read_refinement_file,
    write_text,
)
from codes.common.reporting import Section, render_markdown
from codes.common.stats import Rate, wilson
from codes.construct.gates import gained_cue, shows_cue

EXTERNAL_DATA = "CONTRASTRM_EXTERNAL_DATA"
REPO_ROOT = Path(__file__).resolve().parents[2]
OWN_DATA = REPO_ROOT / "data" / "eval"
LABELS_FILE = REPO_ROOT / "benchmarks" / "leak_labels.json"
RESULT = REPO_ROOT / "benchmarks" / "results" / "gate_rates.md"
SET_ON, HELD_OUT = 0, 1
# What is seen where it is; what is not seen where it is not.
CUE_COLUMNS = {
    "gained": "rewritten to gain it: seen",
    "lost": "rewritten to lose it: not seen",
    "other": "rewritten for another bias: not seen",
    "alone": "beside the other answers: seen",
    "plain": "plain answers: not seen",
}


def half_of(question: str) -> int:
    """Which half of the questions one is in."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 2


@dataclass(frozen=True)
class Pair:
    """The better and the worse answer of a row, before and after the rewrite."""

    better: str
    worse: str
    better_without: str
    worse_with: str


def read_pairs(folder: Path, half: int | None = None) -> dict[str, list[Pair]]:
    """The rows of the files of all rewrite biases; of one half of the questions, or all."""
    pairs = {}
    for bias in INJECTABLE:
        records, _ = read_bias_file(folder / eval_file_name(bias))
        pairs[bias] = [
            Pair(record.original[i], record.original[1 - i], record.rewritten[i], record.rewritten[1 - i])
            for record in records
            for i in [record.better]
            if half is None or half_of(record.question) == half
        ]
    return pairs


def cue_rates(pairs: Mapping[str, Sequence[Pair]], bias: str) -> dict[str, Rate]:
    """How the cue gate does on one bias (``CUE_COLUMNS``): two kinds of sensitivity, three of specificity.

    Every answer counts once as a plain one, although it stands in several files.
    """
    own = pairs[bias]
    others = [pair for name, rows in pairs.items() if name != bias for pair in rows]
    plain = {sides for rows in pairs.values() for p in rows for sides in ((p.better, p.worse), (p.worse, p.better))}
    seen = {
        "gained": [gained_cue(p.worse, p.worse_with, bias) for p in own],
        "lost": [not gained_cue(p.better, p.better_without, bias) for p in own],
        "other": [not gained_cue(p.worse, p.worse_with, bias) for p in others],
        "alone": [shows_cue(p.worse_with, bias, [p.better, p.worse]) for p in own],
        "plain": [not shows_cue(answer, bias, [other]) for answer, other in plain],
    }
    return {name: wilson(sum(verdicts), len(verdicts)) for name, verdicts in seen.items()}


@dataclass(frozen=True)
class LeakFigures:
    """Texts that hold words about the writing task, and texts in which they were found."""

    recall: Rate
    precision: Rate
    missed: tuple[str, ...]
    wrongly_found: tuple[str, ...]


def leak_figures(folder: Path, half: int) -> LeakFigures:
    """Precision and recall of ``find_leak`` on the rewritten texts of one half of the questions."""
    labels = json.loads(LABELS_FILE.read_text(encoding="utf-8"))
    leaks, flagged = set(), set()
    for bias in (*INJECTABLE, "refinement-aware"):
        read: Callable[..., tuple[Sequence[BiasRecord | RefinementRecord], object]]
        read = read_bias_file if bias in PAIRWISE else read_refinement_file
        for record in read(folder / eval_file_name(bias))[0]:
            if half_of(record.question) != half:
                continue
            for field, text, source in _rewritten_texts(record):
                name = f"{record.line} {field}"
                if name in labels.get(bias, {}).get("unsure", ()):
                    continue
                if name in labels.get(bias, {}).get("leak", ()):
                    leaks.add(f"{bias} {name}")
                if find_leak(text, question=record.question, source=source) is not None:
                    flagged.add(f"{bias} {name}")
    n_right = len(leaks & flagged)
    return LeakFigures(
        wilson(n_right, len(leaks)),
        wilson(n_right, len(flagged)),
        tuple(sorted(leaks - flagged)),
        tuple(sorted(flagged - leaks)),
    )


def _rewritten_texts(record: BiasRecord | RefinementRecord) -> list[tuple[str, str, str]]:
    """(field, text, its source) of the rewritten texts of a row."""
    if isinstance(record, RefinementRecord):
        return [("rewritten_response", record.rewritten_response, record.original_response)]
    return [(f"rewritten_response{i + 1}", record.rewritten[i], record.original[i]) for i in (0, 1)]


def innocent_rate(file: Path) -> Rate:
    """Share of answers that nobody rewrote in which ``find_leak`` finds something."""
    answers = {
        (record.question, text) for record in iter_preference_file(file) for text in (record.chosen, *record.rejected)
    }
    return wilson(sum(find_leak(text, question=question) is not None for question, text in answers), len(answers))


def _share(rate: Rate) -> str:
    return "–" if rate.rate is None else f"{100 * rate.rate:.1f} % ({rate.count}/{rate.total})"


def _cue_section(title: str, pairs: Mapping[str, Sequence[Pair]]) -> Section:
    rows = [[bias, *map(_share, cue_rates(pairs, bias).values())] for bias in INJECTABLE]
    return Section(title, (), ["bias", *CUE_COLUMNS.values()], rows)


def _leak_section(folder: Path) -> Section:
    halves = {"held out": leak_figures(folder, HELD_OUT), "set on": leak_figures(folder, SET_ON)}
    innocent = innocent_rate(folder.parent / "train_pool.jsonl")
    texts = [f"Answers of train_pool.jsonl, which nobody rewrote, in which something is found: {_share(innocent)}."]
    texts += [f"Missed ({name}): {', '.join(figures.missed) or 'none'}." for name, figures in halves.items()]
    rows = [[name, _share(figures.recall), _share(figures.precision)] for name, figures in halves.items()]
    return Section("Words about the writing task", texts, ["half of the questions", "recall", "precision"], rows)


def report_sections() -> list[Section]:
    """All tables; those of public files only where they are."""
    sections = [_cue_section("Cues, the project's own files", read_pairs(OWN_DATA))]
    if os.environ.get(EXTERNAL_DATA):
        folder = Path(os.environ[EXTERNAL_DATA]) / "judgebias_dev"
        sections = [
            _leak_section(folder),
            _cue_section("Cues, public files, the half that was held out", read_pairs(folder, HELD_OUT)),
            _cue_section("Cues, public files, the half that the bounds were set on", read_pairs(folder, SET_ON)),
            *sections,
        ]
    return sections


def main(argv: list[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.gate_rates", description=(__doc__ or "").split("\n")[0]
    )
    parser.parse_args(argv)
    text = render_markdown("What the gates see", report_sections())
    write_text(RESULT, text)
    print(text)
    return 0


if __name__ == "__main__":
    run(main)
