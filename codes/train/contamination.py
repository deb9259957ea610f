"""Do training questions stand in the evaluation files? Exact matches after normalisation, and shared runs of 13 words.

Reads: the training sources, and evaluation files (JSONL with ``question``, ``prompt`` or ``messages``).
Writes: ``contamination.jsonl``, one line for each training record that meets an evaluation question.

``codes.common.questions`` says when two questions are the same. Of a prompt with turns the user's count. A question of fewer
than 13 words can only match exactly.
Run: ``python -m codes.train.train_reward_model --estimate 1``
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.cli import is_first_process
from codes.common.errors import ContrastRMError, RecordError
from codes.common.questions import question_key, question_words, row_question, user_text
from codes.common.records import PreferenceRecord, iter_jsonl, write_jsonl
from codes.train.sources import Source, read_source

# Source of the length: Brown et al. 2020 (arXiv 2005.14165), appendix C.
NGRAM = 13
CONTAMINATION_FILE = "contamination.jsonl"
_POWERS = np.array([pow(0x100000001B3, power, 2**64) for power in range(NGRAM)], dtype=np.uint64)


@dataclass(frozen=True)
class Hit:
    """A training record that meets an evaluation question.

    Attributes:
        kind: ``exact``, or ``ngram``: at least one run of 13 words is the same.
        overlap: Share of the evaluation question's runs of 13 words that stand in the training question (1 when exact).
        places: ``file:line`` of the evaluation question, everywhere it stands.
    """

    source: str
    record_id: str
    kind: str
    overlap: float
    question: str
    places: tuple[str, ...]

    def to_row(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "source": self.source,
            "id": self.record_id,
            "kind": self.kind,
            "overlap": round(self.overlap, 4),
            "eval_question": self.question,
            "eval": list(self.places),
        }


@dataclass
class _Question:
    text: str
    words: list[int]
    places: list[str] = field(default_factory=list)

    @property
    def n_ngrams(self) -> int:
        return max(0, len(self.words) - NGRAM + 1)


def expand_files(patterns: str) -> list[Path]:
    """Files of comma-separated paths and patterns; a pattern may match nothing, a path must exist.

    Raises:
        ContrastRMError: A path that does not exist.
    """
    found: list[Path] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        if Path(pattern).is_file():
            found.append(Path(pattern))
        elif glob.has_magic(pattern):
            matches = map(Path, glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            found += sorted(path for path in matches if path.is_file())
        else:
            raise ContrastRMError(f"file not found: {pattern}; check --contamination_files")
    return list(dict.fromkeys(found))


class ContaminationIndex:
    """The questions of evaluation files, ready to be met.

    Args:
        files: JSONL files whose rows have ``question``, ``prompt`` or ``messages`` (a text or turns).

    Raises:
        ContrastRMError: A row without a question.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.n_rows = 0
        self._questions: list[_Question] = []
        self._vocabulary: dict[str, int] = {}
        self._exact: dict[str, int] = {}
        for file in files:
            for line, row in iter_jsonl(file):
                self._add(_question_of(file, line, row), f"{file}:{line}")
        hashes = [_ngram_hashes(question.words) for question in self._questions]
        owners = np.repeat(np.arange(len(hashes)), [len(one) for one in hashes])
        flat = np.concatenate([*hashes, np.zeros(0, dtype=np.uint64)])
        order = np.argsort(flat, kind="stable")
        self._hashes, self._owners = flat[order], owners[order]

    @property
    def n_questions(self) -> int:
        """Distinct questions."""
        return len(self._questions)

    def _add(self, text: str, place: str) -> None:
        self.n_rows += 1
        words, key = question_words(text), question_key(text)
        if key not in self._exact:
            self._exact[key] = len(self._questions)
            ids = [self._vocabulary.setdefault(word, len(self._vocabulary) + 1) for word in words]
            self._questions.append(_Question(text, ids))
        self._questions[self._exact[key]].places.append(place)

    def meet(self, text: str) -> Iterator[tuple[str, float, str, tuple[str, ...]]]:
        """(kind, overlap, question, places) of every evaluation question that a training question meets."""
        words = question_words(text)
        exact = self._exact.get(question_key(text))
        if exact is not None:
            question = self._questions[exact]
            yield "exact", 1.0, question.text, tuple(question.places)
        # 0: a word of no evaluation question; no run with it is looked for.
        ids = [self._vocabulary.get(word, 0) for word in words]
        mine = np.unique(_ngram_hashes(ids))
        first = np.searchsorted(self._hashes, mine, side="left")
        stop = np.searchsorted(self._hashes, mine, side="right")
        owners = sorted({int(owner) for a, b in zip(first, stop, strict=True) if a < b for owner in self._owners[a:b]})
        runs = {tuple(ids[at : at + NGRAM]) for at in range(len(ids) - NGRAM + 1)} if owners else set()
        for owner in owners:
            question = self._questions[owner]
            shared = sum(tuple(question.words[at : at + NGRAM]) in runs for at in range(question.n_ngrams))
            if owner != exact and shared:
                yield "ngram", shared / question.n_ngrams, question.text, tuple(question.places)


def _question_of(file: Path, line: int, row: Any) -> str:
    question = row_question(row)
    if question is None:
        raise RecordError(file, line, "question", row, "a text or turns in question, prompt or messages")
    return question


def _ngram_hashes(ids: Sequence[int]) -> np.ndarray:
    """Hashes of all runs of 13 words that have no unknown word (0)."""
    if len(ids) < NGRAM:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.uint64), NGRAM)
    known: np.ndarray = windows[(windows != 0).all(axis=1)]
    return (known * _POWERS).sum(axis=1, dtype=np.uint64)


def check_contamination(
    chosen: Sequence[Source], files: Sequence[Path], output_file: Path, *, max_bad_rows: int, limit: int
) -> dict[str, Any]:
    """Compare every training question with every evaluation question; list the hits.

    Of several processes each may ask, so that all of them know, and the first one writes.

    Returns:
        Counts: ``n_files``, ``n_eval_questions`` (distinct), ``n_records``, ``n_contaminated_records``, ``n_exact`` and
        ``n_ngram`` (hits), ``n_eval_questions_met``, ``hits_file`` (None without hits).

    Raises:
        ContrastRMError: A file that cannot be read.
    """
    index = ContaminationIndex(files)
    hits: list[Hit] = []
    n_records = 0
    for source in chosen:

        def see(record: PreferenceRecord, location: str = source.location) -> None:
            nonlocal n_records
            n_records += 1
            hits.extend(Hit(location, record.id, *met) for met in index.meet(user_text(record.messages)))

        read_source(source, see, max_bad_rows=max_bad_rows, limit=limit)
    if is_first_process() and hits:
        write_jsonl(output_file, (hit.to_row() for hit in hits))
    elif is_first_process():
        # Hits of an earlier run must not pass for this one's.
        output_file.unlink(missing_ok=True)
    return {
        "n_files": len(files),
        "n_eval_questions": index.n_questions,
        "n_records": n_records,
        "n_contaminated_records": len({(hit.source, hit.record_id) for hit in hits}),
        "n_exact": sum(hit.kind == "exact" for hit in hits),
        "n_ngram": sum(hit.kind == "ngram" for hit in hits),
        "n_eval_questions_met": len({hit.question for hit in hits}),
        "hits_file": str(output_file) if hits else None,
    }


def describe(found: dict[str, Any]) -> str:
    """One line on what the check found."""
    if not found["n_contaminated_records"]:
        return f"none of {found['n_records']} questions meets one of {found['n_eval_questions']} evaluation questions"
    return (
        f"{found['n_contaminated_records']} of {found['n_records']} training records meet "
        f"{found['n_eval_questions_met']} of {found['n_eval_questions']} evaluation questions ({found['n_exact']} exact, "
        f"{found['n_ngram']} share a run of {NGRAM} words): see {found['hits_file']}"
    )
