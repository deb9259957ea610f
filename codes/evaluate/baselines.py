"""Models that know nothing: what a reward model's figures must be held against.

``constant`` calls everything a tie, ``random`` draws a score from a hash of the text, ``shorter`` and ``longer`` count the
characters of the answer, as the published statistic does. The bias sensitivity of ``shorter`` is lower than that of
most reward models: no bias rate means anything without the accuracy beside it.

They are computed on the rows that a model scored and stand in its ``bias_summary.json``; each is also a model:

    python -m codes.evaluate.eval_rm --model_path baseline:shorter
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from codes.common.chat import Conversation
from codes.common.errors import ContrastRMError
from codes.common.scores import ScoreResult

BASELINE_PREFIX = "baseline:"
# In the order of the tables.
BASELINES: dict[str, str] = {
    "constant": "every text has the same score: all ties",
    "random": "a number drawn from a hash of the text and the seed",
    "shorter": "the fewer characters the answer has, the better",
    "longer": "the more characters the answer has, the better",
}


def baseline_of(model_path: str) -> str | None:
    """The baseline that a ``--model_path`` names (``baseline:shorter``), or None where it names a model.

    Raises:
        ContrastRMError: There is no such baseline.
    """
    if not model_path.startswith(BASELINE_PREFIX):
        return None
    name = model_path.removeprefix(BASELINE_PREFIX)
    if name not in BASELINES:
        raise ContrastRMError(f"unknown baseline {name!r}; known: {', '.join(BASELINE_PREFIX + n for n in BASELINES)}")
    return name


@dataclass(frozen=True)
class BaselineScorer:
    """Scores conversations without a model; a text has the same score wherever it stands.

    Attributes:
        name: A key of ``BASELINES``.
        seed: Chooses the draws of ``random``; the others do not depend on it.
    """

    name: str
    seed: int = 42

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ContrastRMError(f"unknown baseline {self.name!r}; known: {', '.join(BASELINES)}")

    @property
    def identity(self) -> str:
        """Names the scores as a weight hash names a model's."""
        seed = self.seed if self.name == "random" else None
        return hashlib.sha256(json.dumps([BASELINE_PREFIX, self.name, seed]).encode()).hexdigest()

    def score(self, conversations: Sequence[Conversation], description: str = "scoring") -> ScoreResult:
        """Score every conversation, in the caller's order."""
        started = time.perf_counter()
        rule = self._rule()
        scores = np.array([rule(conversation) for conversation in conversations], dtype=np.float32)
        n_distinct = len({json.dumps(conversation.turns()) for conversation in conversations})
        return ScoreResult(
            scores=scores,
            n_texts=len(scores),
            n_distinct=n_distinct,
            n_truncated=0,
            n_answer_cut=0,
            n_dropped=0,
            n_tokens=0,
            n_computed_tokens=0,
            seconds=time.perf_counter() - started,
        )

    def _rule(self) -> Callable[[Conversation], float]:
        rules: dict[str, Callable[[Conversation], float]] = {
            "constant": lambda conversation: 0.0,
            "random": self._draw,
            "shorter": lambda conversation: -float(len(conversation.answer)),
            "longer": lambda conversation: float(len(conversation.answer)),
        }
        return rules[self.name]

    def _draw(self, conversation: Conversation) -> float:
        text = json.dumps([self.seed, conversation.turns()], sort_keys=True)
        # 24 bits: what float32 holds exactly, so that two texts tie once in 16 million pairs.
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3]) / 2**24
