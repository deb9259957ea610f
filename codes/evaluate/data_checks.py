"""The audit of bias-evaluation rows: which of them are damaged, and how one can see it.

Reads and writes nothing; ``python -m codes.evaluate.eval_rm`` writes what is found into ``data_manifest.jsonl`` and gives every
figure with and without the flagged rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codes.common.biases import get_bias
from codes.common.leaks import find_leak
from codes.common.questions import question_key
from codes.common.records import BiasRecord, ReadReport, RefinementRecord

Record = BiasRecord | RefinementRecord

KINDS: dict[str, str] = {
    "empty_text": "a text without a letter, digit or sign",
    "unchanged": "the rewrite changed neither text",
    "equal_answers": "both answers are the same text: no verdict but a tie is possible",
    "suspected_preamble": "a rewritten text seems to begin with the rewriter's own words, and its original does not",
    "suspected_meta_talk": "a rewritten text seems to speak about the rewriting, and its original does not",
    "other_answer_changed": "the sentence of identity is not the only change: the other answer changed too",
    "identity_missing": "the sentence of identity does not stand before the better answer",
    "repeated_row": "the same question and texts as in an earlier line of the file",
    "contradictory_label": "another row has the same question and answers and the other label",
}


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong with one row."""

    line: int
    kind: str
    why: str


def audit(records_by_bias: Mapping[str, Sequence[Record]]) -> dict[str, list[Defect]]:
    """The defects of each bias's rows, in the order of the lines; a row can have several.

    A text that stands in several files is no defect; a label that differs between them is one, in every row concerned.
    Of repeated rows in one file all but the first are flagged.
    """
    found = {name: _audit_file(name, records) for name, records in records_by_bias.items()}
    for name, defects in _contradictions(records_by_bias).items():
        found[name] += defects
    order = list(KINDS)
    return {
        name: sorted(defects, key=lambda defect: (defect.line, order.index(defect.kind)))
        for name, defects in found.items()
    }


def flagged_lines(defects: Sequence[Defect]) -> set[int]:
    """Lines that a clean set does without."""
    return {defect.line for defect in defects}


def lines_by_kind(defects: Sequence[Defect]) -> dict[str, list[int]]:
    """Line numbers by kind of defect; a kind without any is left out."""
    lines = {kind: [defect.line for defect in defects if defect.kind == kind] for kind in KINDS}
    return {kind: some for kind, some in lines.items() if some}


def kinds_by_line(defects: Sequence[Defect]) -> dict[int, list[str]]:
    """Kinds of the defects of each flagged line, each once."""
    kinds: dict[int, dict[str, None]] = {}
    for defect in defects:
        kinds.setdefault(defect.line, {})[defect.kind] = None
    return {line: list(named) for line, named in kinds.items()}


def manifest_rows(bias: str, report: ReadReport, defects: Sequence[Defect]) -> list[dict[str, object]]:
    """The rows of ``data_manifest.jsonl`` of one file: those that could not be read, then those that are flagged."""
    prefix = f"{report.path}:"
    unread = []
    for message in report.bad:
        line, _, why = message.removeprefix(prefix).partition(":")
        unread.append({"file": report.path, "bias": bias, "line": int(line), "kind": "unreadable", "why": why.strip()})
    flagged = [
        {"file": report.path, "bias": bias, "line": defect.line, "kind": defect.kind, "why": defect.why}
        for defect in defects
    ]
    return unread + flagged


def _audit_file(name: str, records: Sequence[Record]) -> list[Defect]:
    defects = []
    first_line: dict[tuple[str, ...], int] = {}
    for record in records:
        defects += _audit_texts(record)
        if isinstance(record, BiasRecord):
            defects += _audit_pair(record)
            if get_bias(name).kind == "identity":
                defects += _audit_identity(record)
        earlier = first_line.setdefault(_content(record), record.line)
        if earlier != record.line:
            defects.append(Defect(record.line, "repeated_row", f"the same texts as line {earlier}"))
    return defects


def _audit_texts(record: Record) -> list[Defect]:
    found = []
    originals, rewritten = named_texts(record)
    for field, text in (originals | rewritten).items():
        if not text.strip():
            found.append(Defect(record.line, "empty_text", f"{field} is empty"))
    if [text.strip() for text in originals.values()] == [text.strip() for text in rewritten.values()]:
        found.append(Defect(record.line, "unchanged", KINDS["unchanged"]))
    for (field, new), old in zip(rewritten.items(), originals.values(), strict=True):
        if leak := find_leak(new, question=record.question, source=old):
            found.append(Defect(record.line, f"suspected_{leak.kind}", f"{field} says {_shortened(leak.said)}"))
    return found


def _shortened(words: str) -> str:
    said = " ".join(words.split())
    return repr(said if len(said) <= 80 else said[:77] + "...")


def _audit_pair(record: BiasRecord) -> list[Defect]:
    return [
        Defect(record.line, "equal_answers", f"{stage}_response1 and {stage}_response2 are the same text")
        for stage, (first, second) in (("original", record.original), ("rewritten", record.rewritten))
        if first.strip() == second.strip()
    ]


def _audit_identity(record: BiasRecord) -> list[Defect]:
    """White space aside, the better answer gained something before it and the other one is as it was."""
    better, other = record.better, 1 - record.better
    found = []
    if record.rewritten[other].strip() != record.original[other].strip():
        found.append(Defect(record.line, "other_answer_changed", f"rewritten_response{other + 1} is not its original"))
    original, new = record.original[better].strip(), record.rewritten[better].strip()
    if not new.endswith(original) or new == original:
        why = f"rewritten_response{better + 1} is not a sentence and original_response{better + 1} after it"
        found.append(Defect(record.line, "identity_missing", why))
    return found


def named_texts(record: Record) -> tuple[dict[str, str], dict[str, str]]:
    """A record's texts by the names of their fields: before the rewrite, after it."""
    if isinstance(record, RefinementRecord):
        return {"original_response": record.original_response}, {"rewritten_response": record.rewritten_response}
    return (
        {"original_response1": record.original[0], "original_response2": record.original[1]},
        {"rewritten_response1": record.rewritten[0], "rewritten_response2": record.rewritten[1]},
    )


def _content(record: Record) -> tuple[str, ...]:
    """What makes a row, whichever answer stands first."""
    question = question_key(record.question)
    if isinstance(record, RefinementRecord):
        return question, record.original_response.strip(), record.rewritten_response.strip()
    pairs = sorted(
        (original.strip(), new.strip()) for original, new in zip(record.original, record.rewritten, strict=True)
    )
    return question, *pairs[0], *pairs[1]


def _contradictions(records_by_bias: Mapping[str, Sequence[Record]]) -> dict[str, list[Defect]]:
    """Rows that share question and original answers, over all files, and do not agree which answer is better."""
    seen: dict[tuple[str, ...], list[tuple[str, BiasRecord]]] = {}
    for name, records in records_by_bias.items():
        for record in records:
            texts = [text.strip() for text in record.original] if isinstance(record, BiasRecord) else []
            if isinstance(record, BiasRecord) and texts[0] != texts[1]:
                seen.setdefault((question_key(record.question), *sorted(texts)), []).append((name, record))
    found: dict[str, list[Defect]] = {}
    for rows in seen.values():
        if len({record.original[record.better].strip() for _, record in rows}) < 2:
            continue
        for name, record in rows:
            preferred = record.original[record.better].strip()
            others = [f"{n}:{r.line}" for n, r in rows if r.original[r.better].strip() != preferred]
            why = f"the other answer is labelled better in {', '.join(others)}"
            found.setdefault(name, []).append(Defect(record.line, "contradictory_label", why))
    return found
