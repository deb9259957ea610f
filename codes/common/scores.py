"""What scoring texts gives, whoever scores them: a local model, a server, a rule. No torch here.

Used by ``codes.common.scoring`` and by everything that evaluates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Invariance:
    """How far the scores of some texts, computed again one by one and unpacked, are from those in the results.

    Attributes:
        max_difference: The largest absolute difference of a score.
        score_sd: Standard deviation of the scores of all distinct texts.
        is_rounding: Whether rounding explains the difference.
    """

    n_texts: int
    max_difference: float
    score_sd: float
    is_rounding: bool


@dataclass(frozen=True)
class ScoreResult:
    """Scores in the caller's order, and what it took.

    Attributes:
        scores: float32, shape ``(n_texts,)``; NaN where the over-length policy dropped the text.
        n_tokens: Tokens of the distinct texts.
        n_computed_tokens: Tokens that the model computed: fewer where prefixes are shared, more where rows are padded.
        n_from_store: Distinct texts whose score was in the score store already; None without a store.
        n_tied_texts: Distinct texts that have their score in common with another one, to the last bit.
        invariance: Some texts scored again alone, where the scorer was told to.
        seen_as: For every text the number of what the model saw of it: texts that it cannot tell apart share one. -1: dropped.
            None where the scorer does not know.
        refused: Rows without scores because a text of theirs cannot be rendered, each with its place and the cure.
        equal_rows: Places of rows that compare two texts which the model cannot tell apart: they are ties.
    """

    scores: np.ndarray
    n_texts: int
    n_distinct: int
    n_truncated: int
    n_answer_cut: int
    n_dropped: int
    n_tokens: int
    n_computed_tokens: int
    seconds: float
    n_from_store: int | None = None
    n_tied_texts: int = 0
    invariance: Invariance | None = None
    seen_as: tuple[int, ...] | None = None
    refused: tuple[str, ...] = ()
    equal_rows: tuple[str, ...] = ()


def count_tied(scores: Sequence[float]) -> int:
    """How many of the scores occur more than once, to the last bit.

    Example: [1.0, 2.0, 1.0, 1.0] -> 3.
    """
    return sum(count for count in Counter(scores).values() if count > 1)
