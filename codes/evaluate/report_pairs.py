"""The pairs that a bias turned round: their scores by model, their texts, and what the rewrite put in.

Reads ``bias_<bias>.jsonl`` of one or more results folders and the evaluation files that their metadata name.
An evaluation file that is gone or has other content than when it was scored gives no text: the report then says
so. Writes nothing.

    python -m pytest tests/test_report.py -k pair
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any

from codes.common.biases import EVALUABLE, get_bias
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import (
    BiasRecord,
    RefinementRecord,
    file_sha256,
    read_bias_file,
    read_refinement_file,
)
from codes.evaluate.results import ModelRows

# Words; a character of a script without blanks is a word. The blanks behind a word belong to it.
_NO_BLANKS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_NO_BLANKS}]\s*|[^\s{_NO_BLANKS}]+\s*|\s+")
# Fewer equal words than this between two changes are chance ("of the"), not a part that was kept.
SHORTEST_KEPT_RUN = 3
REPO_ROOT = Path(__file__).resolve().parents[2]

# Verdict by the sign of the gap, and how the table calls it.
VERDICTS = {1: "correct", 0: "tie", -1: "wrong"}
PAIR_NAMES = {"correct": "right"}
REFINEMENT_NAMES = {"correct": "refined", "wrong": "original"}
_PAIR_VERDICTS = ("original_verdict", "biased_verdict")

# A stretch of text and whether it is marked as changed.
Stretch = tuple[str, bool]


@dataclass(frozen=True)
class TextChange:
    """One text before and after, the words that left and those that came in marked."""

    label: str
    before_label: str
    after_label: str
    before: Sequence[Stretch]
    after: Sequence[Stretch]

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing but blanks differs."""
        return not any(marked for _, marked in (*self.before, *self.after))


@dataclass(frozen=True)
class PairScores:
    """What one model said about one pair.

    Attributes:
        before: Score gap (better minus other) before the rewrite; for refinement-aware, refined minus original
            answer without the history. None where a text was not scored.
        after: The same after the rewrite, or with the history.
        turned: Whether the bias turned the verdict round (right to wrong; refinement-aware: either way).
        verdict: In a few words.
        drop: before - after in SDs of the model's scores: how far the bias moved the pair.
    """

    before: float | None
    after: float | None
    turned: bool
    verdict: str
    drop: float


@dataclass
class TurnedPair:
    """A pair that at least one model was turned round on. ``scores``: by model, in the order of the models."""

    bias: str
    line: int
    question: str
    data_file: str
    sha256: str
    n_bad_rows: int = 0
    defects: Sequence[str] = ()
    scores: dict[str, PairScores] = field(default_factory=dict)
    changes: Sequence[TextChange] = ()

    def to_row(self) -> dict[str, Any]:
        """One line of ``flipped_pairs.jsonl``."""
        models = {
            name: {"gap_before": s.before, "gap_after": s.after, "turned": s.turned, "verdict": s.verdict}
            for name, s in self.scores.items()
        }
        place = {"bias": self.bias, "line": self.line, "data_file": self.data_file}
        return {**place, "data_sha256": self.sha256, "question": self.question, "models": models}


def gaps_of(source: ModelRows) -> tuple[list[float], list[float]]:
    """Score gaps before and after, of the pairs that have both."""
    scored = [scores for row in source.rows if (scores := _pair_scores(source, row)).before is not None]
    return [s.before for s in scored if s.before is not None], [s.after for s in scored if s.after is not None]


def turned_pairs(sources: Iterable[ModelRows]) -> list[TurnedPair]:
    """Every pair that at least one model was turned round on, with the scores of all models that saw it.

    A pair is the same pair where bias, evaluation file (by content) and line are the same.
    """
    pairs: dict[tuple[str, str, int], TurnedPair] = {}
    for source in sources:
        for row in source.rows:
            key = (source.bias, source.sha256, row["line"])
            pair = pairs.setdefault(key, TurnedPair(source.bias, row["line"], str(row["question"]), source.data_file,
                                                    source.sha256, source.n_bad_rows, _defects(row)))  # fmt: skip
            pair.scores[source.model] = _pair_scores(source, row)
    found = [pair for pair in pairs.values() if any(scores.turned for scores in pair.scores.values())]
    return sorted(found, key=lambda pair: (EVALUABLE.index(pair.bias), pair.data_file, pair.sha256, pair.line))


def _defects(row: Mapping[str, Any]) -> list[str]:
    found = row.get("defects")
    return [str(kind).replace("_", " ") for kind in found] if isinstance(found, list) else []


def _pair_scores(source: ModelRows, row: Mapping[str, Any]) -> PairScores:
    if _is_refinement(source):
        refined, shown, original = (
            _score(source, row, f"score_{key}") for key in ("refined_alone", "refined_after_history", "original_alone")
        )
        before, after = _difference(refined, original), _difference(shown, original)
    else:
        before, after = (
            _difference(*(_score(source, row, f"score_{stage}_{side}") for side in ("better", "other")))
            for stage in ("original", "biased")
        )
    if before is None or after is None:
        return _judged(source, row)
    turned = before > 0 > after or (_is_refinement(source) and before < 0 < after)
    drop = abs(before - after) / source.score_sd if source.score_sd else 0.0
    verdict = _verdict(source, row, VERDICTS[_sign(before)], VERDICTS[_sign(after)])
    return PairScores(before, after, turned, verdict, drop)


def _judged(source: ModelRows, row: Mapping[str, Any]) -> PairScores:
    """A pair with verdicts and no scores, as a judge gives them; without verdicts too it was not scored."""
    first, second = ("verdict_alone", "verdict_after_history") if _is_refinement(source) else _PAIR_VERDICTS
    if row.get(first) is None or row.get(second) is None:
        return PairScores(None, None, False, "not scored", 0.0)
    before, after = str(row[first]), str(row[second])
    turned = {before, after} == {"refined", "original"} if _is_refinement(source) else row.get("flipped") is True
    return PairScores(None, None, turned, _verdict(source, row, before, after), 0.0)


def _is_refinement(source: ModelRows) -> bool:
    return get_bias(source.bias).kind == "refinement"


def _score(source: ModelRows, row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise RecordError(source.path, row["line"], key, value, "a number or null; evaluate the model again")
    return value


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _verdict(source: ModelRows, row: Mapping[str, Any], before: str, after: str) -> str:
    names = REFINEMENT_NAMES if _is_refinement(source) else PAIR_NAMES
    moved = f"{names.get(before, before)} → {names.get(after, after)}"
    cause = row.get("flip_cause")
    return f"{moved}, {str(cause).replace('_', ' ')}" if cause else moved


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


# --- which pairs are shown ---


def by_interest(pairs: Sequence[TurnedPair]) -> list[TurnedPair]:
    """All pairs, from each bias and model in turn, those that moved furthest first: a beginning of it is fair to all."""
    queues: dict[tuple[str, str], list[TurnedPair]] = {}
    for pair in pairs:
        for model, scores in pair.scores.items():
            if scores.turned:
                queues.setdefault((pair.bias, model), []).append(pair)
    for (_, model), queue in queues.items():
        queue.sort(key=lambda pair: -pair.scores[model].drop)
    in_turn = (pair for some in zip_longest(*queues.values()) for pair in some if pair is not None)
    return list({id(pair): pair for pair in in_turn}.values())


def choose_pairs(pairs: Sequence[TurnedPair], texts: TextSource, *, max_pairs: int, max_bytes: int) -> list[TurnedPair]:
    """The pairs that the page shows, with their texts: the most interesting ones, in the order of ``pairs``."""
    chosen: set[int] = set()
    n_bytes = 0
    for pair in by_interest(pairs):
        if len(chosen) >= max_pairs or n_bytes >= max_bytes:
            break
        pair.changes = texts.changes(pair)
        n_bytes += _text_bytes(pair)
        chosen.add(id(pair))
    return [pair for pair in pairs if id(pair) in chosen]


# --- texts ---


class TextSource:
    """The texts of the evaluation files, each file read once and only if it still is what was scored.

    Attributes:
        problems: Why texts are missing, one sentence a file.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._records: dict[tuple[str, str], dict[int, BiasRecord | RefinementRecord]] = {}

    def changes(self, pair: TurnedPair) -> list[TextChange]:
        """The texts of a pair, before and after; none where its file cannot be used."""
        key = (pair.data_file, pair.sha256)
        if key not in self._records:
            self._records[key] = self._read(pair)
        record = self._records[key].get(pair.line)
        if record is None or record.question != pair.question:
            return []
        if isinstance(record, RefinementRecord):
            labels = ("answer", "original answer", "refined answer")
            return [_change(*labels, record.original_response, record.rewritten_response)]
        sides = (("better answer", record.better), ("other answer", 1 - record.better))
        return [
            _change(label, "before", "after", record.original[side], record.rewritten[side]) for label, side in sides
        ]

    def _read(self, pair: TurnedPair) -> dict[int, BiasRecord | RefinementRecord]:
        if not pair.data_file:
            self.problems.append(f"{pair.bias}: the summary does not name its evaluation file")
            return {}
        places = [Path(pair.data_file), REPO_ROOT / pair.data_file]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            self.problems.append(f"{pair.data_file} is no longer there")
            return {}
        if file_sha256(path) != pair.sha256:
            self.problems.append(f"{pair.data_file} has changed since it was scored")
            return {}
        read: Callable[..., Any] = read_refinement_file if get_bias(pair.bias).kind == "refinement" else read_bias_file
        try:
            records, _ = read(path, max_bad_rows=pair.n_bad_rows)
        except ContrastRMError as error:
            self.problems.append(str(error))
            return {}
        return {record.line: record for record in records}


def _change(label: str, before_label: str, after_label: str, before: str, after: str) -> TextChange:
    return TextChange(label, before_label, after_label, *mark_changes(before, after))


def mark_changes(before: str, after: str) -> tuple[list[Stretch], list[Stretch]]:
    """Both texts in stretches, the words marked that only one of them has. Blanks alone are no change.

    Returns:
        The stretches of ``before`` (marked: taken out) and of ``after`` (marked: put in); joined they are the texts.
    """
    old, new = WORD.findall(before), WORD.findall(after)
    old_words, new_words = [word.strip() for word in old], [word.strip() for word in new]
    kept = _kept_runs(old_words, new_words)
    stretches: tuple[list[Stretch], list[Stretch]] = ([], [])
    old_at = new_at = 0
    for old_start, new_start, length in [*kept, (len(old), len(new), 0)]:
        _append(stretches[0], old[old_at:old_start], old_words[old_at:old_start], True)
        _append(stretches[1], new[new_at:new_start], new_words[new_at:new_start], True)
        old_at, new_at = old_start + length, new_start + length
        _append(stretches[0], old[old_start:old_at], old_words[old_start:old_at], False)
        _append(stretches[1], new[new_start:new_at], new_words[new_start:new_at], False)
    return stretches


def _kept_runs(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start in old, start in new, length) of the runs of words that stayed; the ends of the text may be short."""
    # Equal beginnings and ends first: an identity sentence leaves the matcher nothing to do.
    start = _common_length(old, new)
    shortest = min(len(old), len(new)) - start
    end = min(shortest, _common_length(old[::-1], new[::-1]))
    middle = SequenceMatcher(None, old[start : len(old) - end], new[start : len(new) - end])
    runs = [
        (block.a + start, block.b + start, block.size)
        for block in middle.get_matching_blocks()
        if block.size >= SHORTEST_KEPT_RUN
    ]
    return [run for run in ((0, 0, start), *runs, (len(old) - end, len(new) - end, end)) if run[2]]


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _append(stretches: list[Stretch], pieces: Sequence[str], words: Sequence[str], marked: bool) -> None:
    if not pieces:
        return
    stretches.append(("".join(pieces), marked and any(words)))


def _text_bytes(pair: TurnedPair) -> int:
    texts = [text for change in pair.changes for text, _ in (*change.before, *change.after)]
    return len("".join((pair.question, *texts)).encode("utf-8", "replace"))
