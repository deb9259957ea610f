"""What a generated text must not look like, judged by form alone (no model). Reads and writes nothing.

Each gate names a reason class (``REASONS``); a text that trips one is counted and recorded, never repaired and never
kept. The bounds stand in one table (``BOUNDS``) with what they were chosen for: on the project's own injected answers and
on 1,208 public rewritten answers they refuse few texts (``tests/test_construct_gates.py`` states how many).

Words about the writing task are those of ``codes.common.leaks``, which the audit of evaluation files finds too.
Cues are seen by the word lists of ``codes.construct.cues``, which know English; for other languages there is
``check_cue=False``.
To try one: ``python -c "from codes.construct.gates import answer_defect as a; print(a('New answer: x'))"``
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from codes.common.leaks import find_leak
from codes.construct.cues import gained_cue, shows_cue

REASONS: dict[str, str] = {
    "empty": "no letter and no digit",
    "reasoning_leak": "a model's thoughts or control tokens",
    "prompt_leak": "words of the instruction that asked for the text",
    "preamble": "opens with words about the writing task (Sure, here is the rewritten answer)",
    "meta_talk": "speaks about the task, the user or its own errors in the place of answering",
    "refusal": "opens with a refusal",
    "same_as_chosen": "nearly the chosen answer, so not a worse one",
    "same_as_rejected": "nearly an answer that the record has already",
    "language_switch": "another script or language than the record's",
    "repetition": "the same words in a loop",
    "too_long": "far longer than any answer of the record",
    "too_short": "a fragment beside the answers of the record",
    "cue_missing": "the cue that was to be added is not there",
    "same_as_question": "the similar request is the original one",
    "contains_question": "the similar request holds the whole original one",
    "unrelated_question": "the similar request shares no word with the original conversation",
}


@dataclass(frozen=True)
class Bound:
    """A number that a gate compares with, and why it is that number."""

    value: float
    why: str


BOUNDS: dict[str, Bound] = {
    "nearly_equal": Bound(0.9, "Dice share of common word pairs: one word changed in every twenty"),
    "max_characters": Bound(20_000, "no trainer reads more; a text that long is a loop or a leak"),
    "max_times_longer": Bound(12.0, "the longest public length rewrite of an ordinary answer is 6 times as long"),
    "max_length_floor": Bound(2_000, "beside a one-word answer any sentence is 12 times longer"),
    "min_times_shorter": Bound(0.15, "a decorated or certain version drops words, but not six of seven characters"),
    "min_share_of_chosen": Bound(
        0.03, "an answer to the question alone may be short; a single word beside a page is not one"
    ),
    "max_repeated": Bound(0.55, "share of 5-word runs seen before; a text said twice has 0.5, a loop has 0.9"),
    "max_same_sentence": Bound(4, "the same sentence of 4 words or more; refrains and tables repeat less"),
    "min_script_share": Bound(0.05, "Greek letters in a formula are fewer"),
    "min_script_letters": Bound(10, "a name or a quoted word in its own script is no switch"),
    "min_language_words": Bound(25, "fewer words do not show a language"),
    "min_function_words": Bound(0.15, "about 35 % of English prose, and of its relatives, are such words"),
    "min_words_for_unrelated": Bound(3, "content words; shorter requests share none by chance"),
}

# --- refusals, leaks ---------------------------------------------------------------------------------------------------

_PROMPT_LEAK = re.compile(
    r"</?(?:flawed_answer|conversation|answer letter|question_asked)\b|\bprint only the\b|\bflawed_answer\b"
    r"|^\W{0,3}(?:substance|style):\s.{0,80}\b(?:errors?|defects?|answers?)\b",
    re.IGNORECASE | re.MULTILINE,
)
# A refusal is said by the one who answers: "dogs are unable to digest it" and "you cannot return it" are none, and neither
# is what somebody says in quotation marks.
_CANNOT = (
    r"(?:i|we)(?:'m| am|'re| are)? (?:\w+ )?"
    r"(?:can(?:no|')t|can not|won't|will not|unable to|not able to|(?:must )?(?:decline|refuse) to)"
)
_SORRY = (
    r"(?:(?:i(?:'m| am)\s+(?:\w+ )?)?(?:sorry|afraid)|(?:my )?apologies|i apologi[sz]e|unfortunately|regrettably)\b"
)
# With these, "I cannot" says what is not known, and an answer follows.
_NOT_KNOWN = (
    r"(?! (?:find|see|recall|remember|think|imagine|tell (?:whether|if|from|apart)|confirm|verify|be (?:sure|certain)|locate|"
    r"say (?:whether|if|for)|help (?:but|feeling|thinking|wondering|noticing|smiling|laughing)|"
    r"(?:give|provide|offer) (?:you )?(?:with )?(?:an?|the|any) (?:exact|precise|specific|definit\w+|complete|comprehensive|"
    r"exhaustive|full|single|simple) (?:\w+ )?"
    r"(?:number|figure|answer|date|time|list|account|overview|estimate|value|cost|price|count)))"
)
_OBLIGE = (
    r"(?:help|assist|provide|fulfil|comply|do (?:that|this|so)|answer|write|create|generate|offer|give|rewrite|support|"
    r"participate|engage|discuss|share|continue with)\w*"
)
_REFUSALS = (
    rf"{_SORRY}[^.\n]{{0,60}}\b{_CANNOT}\b{_NOT_KNOWN}",
    rf"{_SORRY}[^.\n]{{0,60}}\b(?:not something (?:that )?(?:i|we) can|not (?:allowed|permitted|comfortable|willing))\b",
    rf"(?:^|[.!?,;\n]\s*|\b(?:but|that|so|and)\s+){_CANNOT}{_NOT_KNOWN} {_OBLIGE}",
    r"\bas an ai\b[^.\n]{0,80}\b(?:can(?:no|')t|won't|will not|unable|not able|don't|do not)\b",
)
_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in _REFUSALS), re.IGNORECASE)
_QUOTED = re.compile(r'"[^"\n]*"|\u201c[^\u201d\n]*\u201d')
# Characters in which a refusal stands. Later in a text the same words may be part of a real answer.
_REFUSAL_CHARACTERS = 200
_REASONING = re.compile(r"</?think(?:ing)?>|<\|[a-z_]+\|>", re.IGNORECASE)


def _plain_quotes(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u2018", "'")


def is_refusal(text: str) -> bool:
    """Whether a text opens with a refusal."""
    opening = _plain_quotes(text).strip()[:_REFUSAL_CHARACTERS]
    spoken = _QUOTED.sub('""', opening)
    return _REFUSAL.search(opening if not re.search(r"\w", spoken) else spoken) is not None


# --- equality -----------------------------------------------------------------------------------------------------------


_BETWEEN_WORDS = re.compile(r"(?:[^\w\s]|_)+")
# Thai, Lao, Myanmar, Khmer, Kana and Han set no spaces: a character (with its marks) stands for a word there.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")


def _marks_of_word(match: re.Match[str]) -> str:
    """What follows a letter and is none itself: the vowel signs of many scripts belong to the word, all else ends it."""
    marks, signs = "", match.group(0)
    if match.start() and match.string[match.start() - 1].isalnum():
        while signs and (unicodedata.category(signs[0])[0] == "M" or signs[0] in "\u200c\u200d"):
            marks, signs = marks + signs[0].strip("\u200c\u200d"), signs[1:]
    return f"{marks} " if signs else marks


def normalised(text: str) -> str:
    """Letters with their marks, and digits, in lower case: layout and punctuation do not make another answer."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _BETWEEN_WORDS.sub(_marks_of_word, folded)
    return " ".join(_UNSPACED.sub(r" \1", words).split())


def similarity(first: str, second: str) -> float:
    """Dice share of common word pairs of two texts, in [0, 1]; 1 for the same words in the same order."""
    words_first, words_second = normalised(first).split(), normalised(second).split()
    if words_first == words_second:
        return 1.0
    pairs_first, pairs_second = Counter(_pairs(words_first)), Counter(_pairs(words_second))
    total = pairs_first.total() + pairs_second.total()
    return 2 * (pairs_first & pairs_second).total() / total if total else 0.0


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def nearly_equal(first: str, second: str) -> bool:
    """Whether two texts have the same words in the same order, or all but a few of them."""
    return similarity(first, second) >= BOUNDS["nearly_equal"].value


# --- language -----------------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Frequent words of each language, few of them shared with another one.
_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "English": _words("the of and to is that it for was with as be this are by from or have not you at which"),
    "German": _words("der die das und ist nicht ein eine zu den mit sich auf für dem im von auch wird sind"),
    "French": _words("le les des est et dans une du qui pour pas sur au avec ce vous il sont plus aux"),
    "Spanish": _words("el los las y en del por una es para con se su al lo como más pero sus está"),
    "Italian": _words("il di che è per un non della sono gli le con del nel alla dei anche più questo si"),
    "Portuguese": _words("o os as e do da em um uma não para com é que dos ao mais na no são"),
    "Dutch": _words("de het een en van is dat op te in voor niet met zijn aan er ook als bij wordt"),
}
# Scripts that are written together count as one.
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
# Letters looked at: enough for any verdict, and the cost of a long text stays small.
_LETTERS_READ = 4_000


@lru_cache(maxsize=8192)
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split(" ")[0]
    return _SAME_SCRIPT.get(name, name) or None


def script_counts(text: str) -> Counter[str]:
    """Letters by script (``LATIN``, ``CYRILLIC``, ``CJK``, …)."""
    letters = unicodedata.normalize("NFKC", text[:_LETTERS_READ])
    return Counter(script for character in letters if (script := _script(character)) is not None)


def main_language(text: str) -> str | None:
    """The language of a text among seven in Latin script; None where it does not show clearly."""
    words = normalised(text[:_LETTERS_READ]).split()
    if len(words) < BOUNDS["min_language_words"].value:
        return None
    shares = sorted(
        ((sum(word in known for word in words) / len(words), name) for name, known in _FUNCTION_WORDS.items()),
        reverse=True,
    )
    (best, name), (second, _) = shares[:2]
    return name if best >= BOUNDS["min_function_words"].value and best >= 1.5 * second else None


def switches_language(text: str, references: Sequence[str]) -> bool:
    """Whether a text uses a script or a language that none of the reference texts does."""
    counts = script_counts(text)
    known = {script for reference in references for script in script_counts(reference)}
    total = counts.total()
    for script, n_letters in counts.items():
        is_much = n_letters >= max(BOUNDS["min_script_letters"].value, BOUNDS["min_script_share"].value * total)
        if known and is_much and script not in known:
            return True
    language = main_language(text)
    others = {main_language(reference) for reference in references} - {None}
    return language is not None and bool(others) and language not in others


# --- repetition ---------------------------------------------------------------------------------------------------------


def repeated_share(text: str) -> float:
    """Share of a text's 5-word runs that occurred before in it, in [0, 1]; 0 below 40 words."""
    words = normalised(text).split()
    if len(words) < 40:
        return 0.0
    runs = list(zip(*(words[start:] for start in range(5)), strict=False))
    return 1 - len(set(runs)) / len(runs)


def most_repeated_sentence(text: str) -> int:
    """How often the most frequent sentence or line of at least four words occurs."""
    sentences = [normalised(part) for part in re.split(r"[.!?\u0964]\s+|[\u3002\uff01\uff1f\n]", text)]
    counts = Counter(sentence for sentence in sentences if sentence.count(" ") >= 3)
    return max(counts.values(), default=0)


def is_repetitive(text: str, references: Sequence[str]) -> bool:
    """Whether a text runs in circles, and no reference text (which may be a song, a table) does so too."""
    share, times = repeated_share(text), most_repeated_sentence(text)
    share_allowed = max([BOUNDS["max_repeated"].value, *(repeated_share(other) + 0.2 for other in references)])
    times_allowed = max(
        [int(BOUNDS["max_same_sentence"].value), *(2 * most_repeated_sentence(other) for other in references)]
    )
    return share > share_allowed or times > times_allowed


# --- the gates ----------------------------------------------------------------------------------------------------------


def answer_defect(
    text: str,
    *,
    chosen: str = "",
    others: Sequence[str] = (),
    rewritten_from: str | None = None,
    bias: str | None = None,
    question: str = "",
    check_cue: bool = True,
) -> str | None:
    """Why a generated answer must not become data.

    Args:
        text: The generated answer.
        chosen: The better answer; a copy of it would be a rejected answer that is right.
        others: The rejected answers that the record has already.
        rewritten_from: The text that was to be rewritten, if any (one of ``others``).
        bias: The bias that was to be added.
        question: The prompt as text; a language that it uses is no switch.
        check_cue: Whether the cue must be seen. A writer can be asked in a language whose cues the word lists miss.

    Returns:
        The first reason that applies (a key of ``REASONS``), or None where the text passes.
    """
    form = _form_defect(text, rewritten_from or "", question)
    if form == "refusal" and any(map(is_refusal, others)) and not is_refusal(chosen):
        form = None  # the record is about refusing too much: another refusal is as wrong as the one that it has
    if form is not None:
        return form
    if chosen and nearly_equal(text, chosen):
        return "same_as_chosen"
    if _repeats_one(text, others, rewritten_from, bias):
        return "same_as_rejected"
    references = [reference for reference in dict.fromkeys((chosen, *others, rewritten_from)) if reference]
    if switches_language(text, [*references, question] if question else references):
        return "language_switch"
    if is_repetitive(text, references):
        return "repetition"
    length = _length_defect(text, chosen, others, rewritten_from)
    if length is not None or bias is None or not check_cue:
        return length
    has_cue = shows_cue(text, bias, references) if rewritten_from is None else gained_cue(rewritten_from, text, bias)
    return None if has_cue else "cue_missing"


def _repeats_one(text: str, others: Sequence[str], rewritten_from: str | None, bias: str | None) -> bool:
    if bias == "beauty":
        return any(text.split() == other.split() for other in others)  # ornament may leave every word as it is
    if rewritten_from is not None:
        # A cue may be one sentence in a long text: a rewrite may stay near its source, and near other rewrites of it.
        return any(normalised(text) == normalised(other) for other in others)
    return any(nearly_equal(text, other) for other in others)


def _form_defect(text: str, source: str, question: str) -> str | None:
    """What the text alone shows. What the source already was (a refusal, for example) it may stay."""
    if not normalised(text):
        return "empty"
    if _REASONING.search(text) and not _REASONING.search(source):
        return "reasoning_leak"
    if _PROMPT_LEAK.search(text) and not _PROMPT_LEAK.search(source):
        return "prompt_leak"
    if leak := find_leak(text, question=question, source=source):
        return leak.kind
    return "refusal" if is_refusal(text) and not is_refusal(source) else None


def _length_defect(text: str, chosen: str, others: Sequence[str], rewritten_from: str | None) -> str | None:
    reference = rewritten_from if rewritten_from is not None else max((chosen, *others), key=len)
    longest = max(BOUNDS["max_length_floor"].value, BOUNDS["max_times_longer"].value * len(reference))
    if len(text) > BOUNDS["max_characters"].value or (reference and len(text) > longest):
        return "too_long"
    if rewritten_from is not None:
        shortest = BOUNDS["min_times_shorter"].value * len(rewritten_from)
    else:
        shortest = BOUNDS["min_share_of_chosen"].value * len(chosen)
    return "too_short" if len(text) < shortest else None


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_STOP_WORDS = frozenset().union(*_FUNCTION_WORDS.values()) | _words(
    "a an i me my we us he she they them his her its their what who whom whose when where why how do does did can could would "
    "should will may might must in on if so than then there here just please some any all about into out up"
)


def question_defect(text: str, *, original: str, context: str = "") -> str | None:
    """Why a generated request must not stand in for the original.

    The words are compared both ways. The share of the original's words that the new request has, and the share of the new
    request's words that the original has: both near 1 is the same request (unless its numbers differ), the first alone is
    the original with something added, and a request that shares no content word with the conversation is another subject.

    Args:
        text: The generated request.
        original: The request that it resembles.
        context: The conversation around it, for what counts as related.

    Returns:
        A key of ``REASONS``, or None where the text passes.
    """
    defect = _form_defect(text, original, original)
    if defect is not None:
        return defect
    if len(text) > max(1_000, 4 * len(original)):
        return "too_long"
    if switches_language(text, [original, context] if context else [original]):
        return "language_switch"
    new, old = Counter(normalised(text).split()), Counter(normalised(original).split())
    if sorted(_NUMBER.findall(text)) == sorted(_NUMBER.findall(original)):
        common = (new & old).total()
        bound = BOUNDS["nearly_equal"].value
        if common >= bound * max(new.total(), old.total()):
            return "same_as_question"
        if old.total() >= 4 and normalised(original) in normalised(text):
            return "contains_question"
    stems_new = {word[:5] for word in new if word not in _STOP_WORDS}
    stems_old = {word[:5] for word in normalised(f"{context} {original}").split() if word not in _STOP_WORDS}
    enough = BOUNDS["min_words_for_unrelated"].value
    if len(stems_new) >= enough and len(stems_old) >= enough and not stems_new & stems_old:
        return "unrelated_question"
    return None
