"""What a generated text must not look like, judged by form alone (no model). Reads and writes nothing.

Each gate names a reason (``REASONS``); a text that trips one is counted and recorded, never repaired and never kept. The
bounds stand in one table (``BOUNDS``) with what they were chosen for: the project's own injected answers and 1,208 public
rewritten pairs, of which they refuse few (the tests say how many). ``answer_defect`` judges an answer for training,
``question_defect`` a similar request, and ``loss_defect``, ``gain_defect`` and ``polish_defect`` the rewrites of an evaluation
pair.

Words about the writing task are those of ``codes.common.leaks``, which the audit of evaluation files finds too. Cues are seen
as weighted marks per 100 words. Most marks are harmless by themselves: only how many more of them a text has than what it is
compared with says something. The word lists know English; for other languages there is ``check_cue=False``. How often a cue
that is there is seen, and how often one that is not: ``python -m codes.construct.gate_rates``. To try one:
``python -c "from codes.construct.gates import answer_defect as a; print(a('New answer: x'))"``
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from codes.common.leaks import find_leak, plain_quotes
from codes.common.questions import ONE_CHARACTER_WORD, question_words

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
    "unchanged": "the same text as before, although it had something to change",
    "other_content": "hardly a word of the source is left, or hardly a word comes from it",
    "number_moved": "lost a number that only its source had, and holds one that only the other answer had",
    "same_as_other": "nearly the other answer of the pair",
    "cue_kept": "the cue that was to go is still there",
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
    "min_old_in_new": Bound(
        0.15, "share of a source's words left in the version with the cue; 1 in 50 public ones has less"
    ),
    "min_new_in_old": Bound(
        0.3, "share of a plain version's words that its source has too; 1 in 100 public ones has less"
    ),
    "min_words_to_compare": Bound(8, "different longer words; fewer can all be replaced without a change of content"),
    "harmless_marks": Bound(3, "marks that ordinary words make (a report, the year): with no more, nothing must go"),
    "min_length_ratio": Bound(
        1.7, "a longer version beside its source; 95 of 100 public length rewrites are longer by this"
    ),
    "min_length_to_others": Bound(1.5, "beside other answers, whose lengths differ without a bias too"),
    "min_shortening": Bound(1.3, "a source beside its shorter version"),
}

# --- refusals, leaks ---------------------------------------------------------------------------------------------------

_PROMPT_LEAK = re.compile(
    r"</?(?:conversation|answer letter|question_asked)\b|\b(?:flawed_answer|given_answer|print only the)\b"
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


def is_refusal(text: str) -> bool:
    """Whether a text opens with a refusal."""
    opening = plain_quotes(text).strip()[:_REFUSAL_CHARACTERS]
    spoken = _QUOTED.sub('""', opening)
    return _REFUSAL.search(opening if not re.search(r"\w", spoken) else spoken) is not None


# --- words and equality ---------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Letters with their marks, and digits, in lower case: layout and punctuation do not make another answer."""
    return " ".join(question_words(text))


def similarity(first: str, second: str) -> float:
    """Dice share of common word pairs of two texts, in [0, 1]; 1 for the same words in the same order."""
    words_first, words_second = question_words(first), question_words(second)
    if words_first == words_second:
        return 1.0
    pairs_first, pairs_second = Counter(pairwise(words_first)), Counter(pairwise(words_second))
    total = pairs_first.total() + pairs_second.total()
    return 2 * (pairs_first & pairs_second).total() / total if total else 0.0


def nearly_equal(first: str, second: str) -> bool:
    """Whether two texts have the same words in the same order, or all but a few of them."""
    return similarity(first, second) >= BOUNDS["nearly_equal"].value


def content_words(text: str) -> set[str]:
    """Beginnings of the longer words, and the numbers; of scripts that set no spaces, the characters."""
    return {
        word[:5] for word in question_words(text) if len(word) >= 4 or word.isdigit() or ONE_CHARACTER_WORD.match(word)
    }


def share_left(words: set[str], other: set[str]) -> float:
    """Share of some words that are among others, in [0, 1]; 1 where there are none."""
    return len(words & other) / len(words) if words else 1.0


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
    words = question_words(text[:_LETTERS_READ])
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
    words = question_words(text)
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


# --- cues ----------------------------------------------------------------------------------------------------------------

# Added to the words of a text, so that one mark in a short answer is not a text full of them.
_MORE_WORDS = 20
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Cue:
    """How a bias shows in a text.

    Attributes:
        marks: What is counted, with its weight; what speaks against the cue has a negative one.
        gain: Points per 100 words that a text with the cue has more than one without it.
    """

    marks: tuple[tuple[re.Pattern[str], float], ...]
    gain: float


def _any_of(phrases: str) -> str:
    """An alternation of comma-separated phrases; a star stands for any ending."""
    entries = sorted({" ".join(entry.split()) for entry in phrases.split(",")}, key=lambda entry: (-len(entry), entry))
    return "(?:" + "|".join(re.escape(entry).replace(r"\*", r"\w*") for entry in entries if entry) + ")"


def _phrases(phrases: str, *more: str) -> re.Pattern[str]:
    """Whole phrases in any case, or one of the further patterns."""
    return re.compile("|".join([rf"\b{_any_of(phrases)}(?!\w)", *more]), re.IGNORECASE)


_EMOJI = re.compile(r"[\u2600-\u27BF\u2B00-\u2BFF\U0001F000-\U0001FAFF]")
_HEADING = re.compile(r"^\s*#+ |^\s*(?:---|\*\*\*|___)\s*$", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
# Ordinary answers have lists, too.
_BULLET = re.compile(r"^\s*[-*•+] |^\s*> ", re.MULTILINE)

_AUTHORITY = _phrases(
    """
    according to, expert, experts, authorit*, scholar*, scientist*, researcher*, professor*, prof, dr, phd, physician*,
    historian*, economist*, psychologist*, sociologist*, ethnographer*, musicologist*, linguist*, analyst*, specialist*,
    renowned, esteemed, distinguished, acclaimed, seminal, landmark, pioneering, leading figure, leading voice, institute*,
    academy, universit*, association, society, council, commission, foundation, journal, review, handbook, guideline*,
    study, studies, research, published, peer-reviewed, widely cited, consensus, official, proven, noted by, noted in, notes,
    as noted, stated by, argues, argued, posits, emphasizes, emphasized by, highlighted by, confirmed by, established by,
    recommended by, nobel, harvard, oxford, cambridge, stanford, mit, nasa, cdc, fda, unesco
    """
)

_CERTAIN = _phrases(
    """
    definit*, absolut*, undoubt*, unquestion*, unequivocal*, indisput*, undeniab*, unmistakab*, irrefut*, incontrovert*,
    incontest*, categorical*, conclusive*, decisive*, invariabl*, inevitabl*, certainty, is certain, are certain, certain
    beyond, without doubt, without a doubt, without any doubt, without question, without exception, without fail, without
    hesitation, no doubt, no question, no exception*, no debate, no room for, no uncertain terms, no other, nothing else,
    nobody can, beyond doubt, beyond question, beyond dispute, beyond any *, beyond all *, beyond a shadow, beyond the
    slightest, once and for all, full stop, in all cases, in every case, established fact*, the fact is, a fact, the truth
    is, simply wrong, completely wrong, the only possible, the only correct, the only valid, one and only, can never, never
    fails, make no mistake, be clear, rest assured, non-negotiable, not negotiable, undisput*, unwavering*, unshak*,
    unyielding, unmatched, unparalleled, quintessential*, paramount, imperative, mandatory, inviolable, supreme*, masterful*,
    flawless*, relentless*, dictat*, conviction, cemented, solidif*, singular*, guarant*, proven, proves, obvious*, of
    course, surely, settled, settles, entirely sure, be sure, infallibl*, unfailing*, hard fact, end of story, none at all,
    under any circumstances, nothing to argue, exactly, always
    """
)
_HEDGE = _phrases(
    """
    maybe, perhaps, probably, possibly, might, may, could, would, seem*, appear*, likely, unlikely, i think, i believe, i
    guess, i suppose, generally, usually, typically, often, sometimes, tend, tends, depend*, somewhat, roughly, in my view,
    in my opinion, as far as i, potentially, unclear, not sure
    """
)
# Enthusiasm, which is neither certainty nor politeness.
_EXCLAMATION = re.compile("!")

_GOOD = _any_of(
    """
    great, good, excellent, wonderful, fantastic, brilliant, insight*, thoughtful*, fascinating, astute*, clever*, smart*,
    sharp, keen*, admir*, impress*, perceptive*, wise*, wisdom, remarkabl*, superb*, intelligen*, discerning, exceptional*,
    outstanding, lovely, delight*, genius, appreciat*, commend*, valuable, amazing*, incredibl*, profound*, ingenious*, kind,
    creative, creativity, evocative, interesting, intriguing, right, rightly, valid, spot on, star, gift, talent*, lucky,
    inventive, considerate, careful*, well, credit, seriously, best, funny, funnier
    """
)
# Flattery, and the deference that polite flatterers prefer to it.
_PRAISE = _phrases(
    """
    couldn't agree, completely agree*, fully agree*, totally agree*, wholeheartedly agree*, only agree, agree with you,
    agree with how, agree with your, absolutely right, quite right, so right, thank you, grateful, may i, might i, if i may,
    if you wish, if you please, if you would like, if you'd like, allow me, permit me, with your permission, kindly,
    gracious*, thoughtful, thoughtfully, sincere*, apologi*, at your service, at your convenience, humbl*, rest assured, my
    pleasure, a pleasure, we might, perhaps we, one might, i do hope, i hope, we hope, hope this, hope you, of course, feel
    free, please don't hesitate, please do, please let me know, please know, i understand, i appreciate, i admire,
    impressed, congratulations, well done, understandably, my understanding, gently, warmly, respectfully, delighted,
    honored, honoured, helpful, beneficial, happy to, glad to, be happy, be glad, pleased to, be pleased, certainly,
    indeed, quite, truly, wonderfully, perhaps, like you, like yours, wholeheartedly, agree completely
    """,
    rf"\b(?:what|such|that's|that is|this is) (?:a|an)\b[^.!?\n]{{0,25}}"
    rf"\b(?:{_GOOD}|question|idea|mind|person|observation|choice|plan)\b",
    rf"\b(?:you|your|you're|you've)\b[^.!?\n]{{0,40}}\b{_GOOD}\b",
    rf"\b{_GOOD}\b[^.!?\n]{{0,25}}\b(?:like you|of you|your|you are|you have)\b",
    r"\byour (?:\w+ )?(?:instinct|insight|judge?ment|intuition|curiosity|wisdom|taste|mind|eye|observation|understanding|"
    r"sense of|idea|question|view|talent|gift|skill)s?\b",
    r"\b(?:as|what) you (?:know|knew|say|see|sensed|found|have|rightly|surely|clearly|must|will have)\b|\bas your \w+",
    r"\byou (?:clearly|surely|obviously|evidently|could teach|could give)\b|\bwith your (?:experience|skill|knowledge)\b",
    r"\b(?:ah|oh),",
)

_WARM = _phrases(
    """
    love, loved, loves, lovely, loving, fun, happ*, joy*, charm*, enjoy*, magic*, delight*, wonder*, astonish*, proud*, cosy,
    cozy, beaut*, great, excit*, splendid*, fantastic*, amaz*, awesome, brilliant*, thrill*, inspir*, incredibl*, marvel*,
    fabulous*, superb*, super, cheer*, bright*, warm*, sweet*, shin*, sparkl*, glow*, radian*, vibran*, optimis*, celebrat*,
    blessing*, treasur*, triumph*, perfect*, smil*, laugh*, glad, enthusias*, passion*, eager*, dream*, adventure*, empower*,
    uplift*, heartwarming, stunning, spectacular*, remarkabl*, extraordinar*, exceptional*, fascinat*, truly, absolutely,
    glorious*, hooray, dazzl*, captivat*, exhilarat*, opportunit*, possibilit*, gorgeous, buzzing, bursting, best, dive
    """,
    "!",
)

# The number of a list entry is none.
_FIGURE = re.compile(r"(?<![\w#])(?<!^)(?<!^ )(?<!^  )(?<!^   )\d[\d.,:/-]*", re.MULTILINE)
# Ordinary answers are full of names, too.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][A-Za-z]+")
_MEASURED = _phrases(
    """
    approximately, precise, precisely, exact, exactly, specific, specifically, documented, measur*, estimated, statistical*,
    per the, as per, percent, per cent, index, baseline, coefficient, quantif*, calibrat*, registered, registering,
    conducted, indicat*, preliminary, longitudinal, analysis, analyses, parameter*, metric*, empirical*, efficacy, correlat*,
    data, dataset, survey*, score, scores, scored, scale, ratio, average, mean, median, percentile, range*, rate, rates,
    phase, unit, units, kg, km, cm, mm, ml, hz, kilomet*, meter, meters, metre, metres, gram, grams, kilogram*, liter, liters,
    litre, litres, degree, degrees, hour, hours, minute, minutes, second, seconds, week, weeks, month, months, year, years,
    cohort, sample, participants, respondents, circa, figure, figures, total, tally, counted, recorded, dated, et al, january,
    february, march, april, june, july, august, september, october, november, december
    """,
    "%",
)

CUES: dict[str, Cue] = {
    "length": Cue(((_WORDS, 1.0),), 0.0),
    "authority": Cue(((_AUTHORITY, 1.0),), 0.45),
    "beauty": Cue(((_EMOJI, 2.0), (_HEADING, 2.0), (_BOLD, 0.5), (_BULLET, 0.2)), 1.6),
    "assertiveness": Cue(((_CERTAIN, 2.0), (_HEDGE, -1.0), (_EXCLAMATION, -1.0)), 1.0),
    "sycophancy": Cue(((_PRAISE, 1.0), (_EXCLAMATION, -0.4)), 0.29),
    "sentiment": Cue(((_WARM, 1.0),), 1.5),
    "concreteness": Cue(((_FIGURE, 1.0), (_MEASURED, 1.0), (_NAME, 0.1)), 1.0),
}


def cue_count(text: str, bias: str) -> int:
    """How many marks of a bias a text holds (``length``: words)."""
    plain = plain_quotes(text)
    return sum(sum(1 for _ in marks.finditer(plain)) for marks, weight in CUES[bias].marks if weight > 0)


def cue_rate(text: str, bias: str) -> float:
    """Points of a bias per 100 words, above or below zero (``length``: characters)."""
    if bias == "length":
        return float(len(text))
    plain = plain_quotes(text)
    points = sum(weight * sum(1 for _ in marks.finditer(plain)) for marks, weight in CUES[bias].marks)
    return 100 * points / (sum(1 for _ in _WORDS.finditer(plain)) + _MORE_WORDS)


def gained_cue(before: str, after: str, bias: str) -> bool:
    """Whether a rewritten text carries clearly more of a cue than the text that it was made from."""
    if bias == "length":
        return len(after) >= BOUNDS["min_length_ratio"].value * len(before)
    return cue_rate(after, bias) - cue_rate(before, bias) >= CUES[bias].gain


def lost_cue(before: str, after: str, bias: str) -> bool:
    """Whether a rewritten text carries less of a cue than before, in all or a word. It may have had little of it."""
    if bias == "length":
        return len(before) >= BOUNDS["min_shortening"].value * len(after)
    return cue_count(after, bias) < cue_count(before, bias) or cue_rate(after, bias) < cue_rate(before, bias)


def shows_cue(text: str, bias: str, references: Sequence[str]) -> bool:
    """Whether a text written from the question alone carries clearly more of a cue than the record's other answers do.

    Args:
        text: The text.
        bias: The cue.
        references: The other answers; their mean counts. Without any, the text is compared with one that has no mark.
    """
    usual = sum(cue_rate(reference, bias) for reference in references) / len(references) if references else 0.0
    if bias == "length":
        return len(text) >= BOUNDS["min_length_to_others"].value * usual
    return cue_rate(text, bias) - usual >= CUES[bias].gain


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


# --- similar requests ---------------------------------------------------------------------------------------------------

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
    new, old = Counter(question_words(text)), Counter(question_words(original))
    if sorted(_NUMBER.findall(text)) == sorted(_NUMBER.findall(original)):
        common = (new & old).total()
        bound = BOUNDS["nearly_equal"].value
        if common >= bound * max(new.total(), old.total()):
            return "same_as_question"
        if old.total() >= 4 and normalised(original) in normalised(text):
            return "contains_question"
    stems_new = {word[:5] for word in new if word not in _STOP_WORDS}
    stems_old = {word[:5] for word in question_words(f"{context} {original}") if word not in _STOP_WORDS}
    enough = BOUNDS["min_words_for_unrelated"].value
    if len(stems_new) >= enough and len(stems_old) >= enough and not stems_new & stems_old:
        return "unrelated_question"
    return None


# --- evaluation pairs -----------------------------------------------------------------------------------------------------


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
        A key of ``REASONS``; None where the text passes.
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
        A key of ``REASONS``; None where the text passes.
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
        A key of ``REASONS``; None where the text passes.
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
