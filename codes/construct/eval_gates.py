"""What a rewritten answer of an evaluation pair must not look like, judged by form alone. Reads and writes nothing.

The gates of construction (``codes.construct.gates``) apply, and besides: the answer changed at all, it speaks about the
same things as its source, the cue went or came, and no number moved from one answer of the pair to the other. The bounds
were set on 1,208 public rewritten pairs (``BOUNDS`` says how many they refuse). To try one:
``python -c "from codes.construct.eval_gates import loss_defect as d; print(d('It is 5.', chosen='Great! It is 4!',
rejected='It is 5.', bias='sentiment', question='2 + 2?'))"``
"""

from __future__ import annotations

import re

from codes.construct.cues import cue_count, gained_cue, lost_cue
from codes.construct.eval_prompts import LEAKED_WORDS
from codes.construct.gates import Bound, answer_defect, nearly_equal, normalised

REASONS: dict[str, str] = {
    "unchanged": "the same text as before, although it had something to change",
    "other_content": "hardly a word of the source is left, or hardly a word comes from it",
    "number_moved": "lost a number that only its source had, and holds one that only the other answer had",
    "same_as_other": "nearly the other answer of the pair",
    "cue_kept": "the cue that was to go is still there",
}

BOUNDS: dict[str, Bound] = {
    "min_old_in_new": Bound(
        0.15, "share of a source's words left in the version with the cue; 1 in 50 public ones has less"
    ),
    "min_new_in_old": Bound(
        0.3, "share of a plain version's words that its source has too; 1 in 100 public ones has less"
    ),
    "min_words_to_compare": Bound(8, "different longer words; fewer can all be replaced without a change of content"),
    "harmless_marks": Bound(3, "marks that ordinary words make (a report, the year): with no more, nothing must go"),
}

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Thai to Khmer, Kana and Han, Hangul (which has spaces, and endings that change every word).
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def content_words(text: str) -> set[str]:
    """Beginnings of the longer words, and the numbers; of scripts that set no spaces, the characters."""
    text = normalised(text)
    words = _UNSPACED.sub(" ", text).split()
    return {word[:5] for word in words if len(word) >= 4 or word.isdigit()} | set(_UNSPACED.findall(text))


def share_left(words: set[str], other: set[str]) -> float:
    """Share of some words that are among others, in [0, 1]; 1 where there are none."""
    return len(words & other) / len(words) if words else 1.0


def number_moved(text: str, *, source: str, other: str) -> bool:
    """Whether a number that tells a source from the other answer of its pair went, and one of the other's came."""
    new, old, foreign = (set(_NUMBER.findall(each)) for each in (text, source, other))
    return bool((old - foreign) - new) and bool((foreign - old) & new)


def loss_defect(
    text: str, *, chosen: str, rejected: str, bias: str, question: str, check_cue: bool = True
) -> str | None:
    """Why a chosen answer that was to lose a cue must not become data.

    An answer that had hardly any of the cue may come back as it was, or as it was in other words.

    Returns:
        A key of ``REASONS`` or of ``gates.REASONS``; None where the text passes.
    """
    defect = _shared_defect(text, source=chosen, other=rejected, question=question)
    if defect is not None:
        return defect
    had_cue = bias == "length" or cue_count(chosen, bias) > BOUNDS["harmless_marks"].value
    if check_cue and had_cue and text.split() == chosen.split():
        return "unchanged"
    if _is_other_content(content_words(text), content_words(chosen), "min_new_in_old"):
        return "other_content"
    if not check_cue or lost_cue(chosen, text, bias):
        return None
    return "cue_kept" if had_cue or lost_cue(text, chosen, bias) else None


def gain_defect(
    text: str, *, chosen: str, rejected: str, bias: str, question: str, check_cue: bool = True
) -> str | None:
    """Why a rejected answer that was to gain a cue must not become data.

    Returns:
        A key of ``REASONS`` or of ``gates.REASONS``; None where the text passes.
    """
    if text.split() == rejected.split():
        return "unchanged"
    defect = _shared_defect(text, source=rejected, other=chosen, question=question)
    if defect is not None:
        return defect
    if _is_other_content(content_words(rejected), content_words(text), "min_old_in_new"):
        return "other_content"
    return None if not check_cue or gained_cue(rejected, text, bias) else "cue_missing"


def polish_defect(text: str, *, source: str, question: str) -> str | None:
    """Why a polished answer must not become data.

    Returns:
        A key of ``REASONS`` or of ``gates.REASONS``; None where the text passes.
    """
    if text.split() == source.split():
        return "unchanged"
    defect = _shared_defect(text, source=source, other="", question=question)
    if defect is not None:
        return defect
    # A polished answer may be fuller or shorter than it was.
    few, many = sorted((content_words(text), content_words(source)), key=len)
    return "other_content" if _is_other_content(few, many, "min_new_in_old") else None


def _shared_defect(text: str, *, source: str, other: str, question: str) -> str | None:
    if LEAKED_WORDS.search(text) and not LEAKED_WORDS.search(source):
        return "prompt_leak"
    # Two answers that differ by a word differ by it after a rewrite too: then nearness to the other one says nothing.
    rival = "" if not other or nearly_equal(source, other) else other
    defect = answer_defect(text, chosen=rival, rewritten_from=source, question=question)
    if defect is not None:
        return "same_as_other" if defect == "same_as_chosen" else defect
    return "number_moved" if other and number_moved(text, source=source, other=other) else None


def _is_other_content(words: set[str], reference: set[str], bound: str) -> bool:
    if min(len(words), len(reference)) < BOUNDS["min_words_to_compare"].value:
        return False
    return share_left(words, reference) < BOUNDS[bound].value
