"""When two questions are the same: for what is held out, for contamination, and for the clusters of intervals. No torch here."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

Row = TypeVar("Row")

# Thai, Lao, Myanmar, Khmer, Kana and Han are written without blanks, and endings change every word of Korean: a character
# (and a vowel sign) is a word.
ONE_CHARACTER_WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# Say how the sign before them is drawn.
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)


class _Spelling(dict[int, str]):
    """What becomes of each character, found out when it is first met: for ``str.translate``."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or code in _VARIATION_SELECTORS:
            found = ""  # soft hyphens, zero-width joiners, marks of direction: nobody sees them
        elif category[0] in "LN" or category in ("Mn", "Mc"):  # vowel signs of Hindi or Thai are marks
            found = f" {character} " if ONE_CHARACTER_WORD.match(character) else character
        else:
            found = " "
        self[code] = found
        return found


_SPELLING = _Spelling()


def _fold(text: str) -> str:
    """One Unicode form (NFKC) and no case."""
    # Folding can undo the form: "\u0345" becomes a letter.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def question_words(text: str) -> list[str]:
    """Words of a question: letters, digits and their marks, in one Unicode form and without case."""
    return _fold(text).translate(_SPELLING).split()


@lru_cache(maxsize=16384)
def question_key(text: str) -> str:
    """What questions that are the same have in common: case, layout, punctuation and Unicode form make no other question.

    Two questions that differ by signs alone ("1+1", "1-1") fall together: that holds out one more, or widens an interval. A
    question of signs alone keeps them.
    """
    return " ".join(question_words(text)) or " ".join(_fold(text).split())


def user_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What the user says in a prompt: a question is the same under any system prompt, whatever was answered before."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def row_question(row: Any) -> str | None:
    """What the user says in a row of any evaluation file; None where it has no ``question``, ``prompt`` or ``messages``."""
    if not isinstance(row, dict):
        return None
    found = next((row[name] for name in ("question", "prompt", "messages") if row.get(name)), None)
    if isinstance(found, list):
        whole = all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in found
        )
        return user_text(found) if whole else None
    return found if isinstance(found, str) else None


def choose_subset(rows: Sequence[Row], limit: int, seed: int, key: Callable[[Row], str]) -> list[Row]:
    """At most ``limit`` rows (0: all), in file order, chosen by a hash of the seed and the key.

    A question that stands in several files falls in or out of all of them alike, as far as the limits allow.
    """
    if limit <= 0 or len(rows) <= limit:
        return list(rows)
    rank = [(hashlib.sha256(f"{seed}\n{key(row)}".encode()).hexdigest(), index) for index, row in enumerate(rows)]
    return [rows[index] for index in sorted(index for _, index in sorted(rank)[:limit])]
