"""What a chat model's answer says as a verdict, read strictly, and how a judge is asked. No file is read or written.

Reads the environment variables JUDGE_TEMPERATURE and JUDGE_MAX_NEW_TOKENS (defaults of flags). Used where construction asks
for the best answer of a record and where the evaluation has a model judge pairs: ``python -m codes.evaluate.judge --help``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from codes.common.cli import natural
from codes.common.errors import ContrastRMError
from codes.common.llm import ApiError, Outcome
from codes.common.llm_session import is_embedded_server

# A reasoning model thinks within the same limit; others stop after their letter.
MAX_NEW_TOKENS = 4096
# The embedded model goes on after its letter for as long as it may.
EMBEDDED_MAX_NEW_TOKENS = 16
# So many answers in a row that are no verdict are no accident: the rest of the run would be paid for nothing.
MAX_UNREAD = 30

_DECORATION = r"[*_`#>$\s]*"
_LABELS = "best|better|answer|verdict|winner|choice|decision|preference|judge?ment"
_NOUNS = "answer|response|option|choice|verdict|candidate|assistant"
# An answer that thinks aloud first; some servers leave out the opening tag, which stands in their prompt.
_REASONING = re.compile(r"(?is)^.*</(think|thinking|thought|reasoning)>")
_OPEN_REASONING = re.compile(r"(?i)^\s*<(think|thinking|thought|reasoning)>")


@dataclass(frozen=True)
class _Patterns:
    """What a verdict looks like; the letter or the word is in one of the groups.

    Attributes:
        marked: Within a text: ``[[B]]``, a LaTeX box, ``<answer>B</answer>``.
        labelled: A line ``Best: B``.
        bare: A line that is the verdict alone.
    """

    marked: re.Pattern[str]
    labelled: re.Pattern[str]
    bare: re.Pattern[str]


@cache
def _patterns(words: tuple[str, ...]) -> _Patterns:
    named = "".join(f"|(?i:{re.escape(word)})" for word in words)
    # Without a label and its colon a small letter is a word ("a"), a capital one hardly ever.
    capital, letter = rf"((?-i:[A-Z]){named})", rf"([A-Za-z]{named})"
    noun = rf"{_DECORATION}(?:(?i:{_NOUNS})\s+)?(?:\\text\{{)?[<(\[{{]*"
    end = rf"[>)\]}}]*{_DECORATION}\.?{_DECORATION}$"
    label = rf"(?:(?:the|my|so|final|overall)\s+)*(?:{_LABELS}){_DECORATION}(?:{_NOUNS})?{_DECORATION}"
    return _Patterns(
        re.compile(
            rf"\[\[\s*{capital}\s*\]\]|\\boxed\{{\s*(?:\\\w+\{{)?\s*{capital}\s*\}}"
            rf"|<(?:answer|verdict|best)>\s*{capital}\s*</"
        ),
        re.compile(rf"(?i)^{_DECORATION}{label}(?:[:=]{noun}{letter}|\bis\b:?{noun}{capital}){end}"),
        re.compile(rf"^{noun}{capital}{end}"),
    )


def read_verdict(text: str, *, words: Sequence[str] = (), cut_off: bool = False) -> str | None:
    """Read an answer strictly: a line ``Best: B``, a marked ``[[B]]``, or a first or last line that is the letter alone.

    What stands in a reasoning block before the answer does not count, nor does a letter within a sentence.

    Args:
        text: The judge's answer.
        words: Small words that may stand in place of a letter, such as ``tie``.
        cut_off: The answer ended at its token limit: its last line may be half a line and does not count.

    Returns:
        The capital letter or the word; None where there is none, or more than one.
    """
    patterns = _patterns(tuple(words))
    text = _REASONING.sub("", text)
    if _OPEN_REASONING.match(text):
        return None  # it never came to an answer
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if cut_off:
        lines = lines[:-1]
    matches = [*patterns.marked.finditer("\n".join(lines)), *map(patterns.labelled.match, lines)]
    found = {match[match.lastindex or 0] for match in matches if match}
    if not found:
        bare = [patterns.bare.match(line) for line in lines]
        # Letters on lines of their own in between are headings: with them there is more than one.
        if bare and (bare[0] or bare[-1]):
            found = {match[1] for match in bare if match}
    verdicts = {word.lower() if word.lower() in words else word.upper() for word in found}
    return verdicts.pop() if len(verdicts) == 1 else None


class UnreadVerdicts:
    """Stops a run whose judge gives no verdict any more."""

    def __init__(self, most: int) -> None:
        """``most`` in a row stop the run; 0: none do, and none of the embedded model's, which nobody believes."""
        self._most = 0 if is_embedded_server() else most
        self._n = 0

    def see(self, outcome: Outcome, is_read: bool) -> None:
        """Count one outcome of the judge, in order.

        Raises:
            ContrastRMError: It is one too many in a row.
        """
        if isinstance(outcome, ApiError) and outcome.reason not in ("cut_off", "empty_answer"):
            return  # the request failed, which says nothing of the judge's words
        self._n = 0 if is_read else self._n + 1
        if not self._most or self._n < self._most:
            return
        said = str(outcome) if isinstance(outcome, ApiError) else f"{outcome.text[:120]!r} ({outcome.finish_reason})"
        raise ContrastRMError(
            f"stopped: the last {self._n} answers of the judge are no verdict; the last one: {said}. A model that reasons "
            "needs more tokens (JUDGE_MAX_NEW_TOKENS); else take another judge, or go on all the same with --max_unread 0. "
            "All answers are kept"
        )


def add_unread_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag of ``UnreadVerdicts``."""
    parser.add_argument(
        "--max_unread",
        type=natural,
        default=MAX_UNREAD,
        help="answers in a row that are no verdict stop the run; 0: never",
    )


def judge_temperature() -> str:
    """The default of a judge's temperature, as on a command line."""
    return os.environ.get("JUDGE_TEMPERATURE") or "0"


def judge_max_new_tokens() -> str:
    """The default of the tokens that a judge may use for an answer, reasoning included, as on a command line."""
    default = EMBEDDED_MAX_NEW_TOKENS if is_embedded_server() else MAX_NEW_TOKENS
    return os.environ.get("JUDGE_MAX_NEW_TOKENS") or str(default)
