"""How the cue of a bias shows in a text: weighted marks per 100 words, without a model. Reads and writes nothing.

Most marks are harmless by themselves: only how many more of them a text has than what it is compared with says something.
A rewritten text is compared with its source, a text written from the question alone with the record's other answers. The
word lists know English. ``python -m codes.construct.gate_rates`` prints how often a cue that is there is seen, and how often one
that is not; the bounds were set on one half of the questions of public files, and its figures are of the other half.
``python -c "from codes.construct.cues import cue_rate; print(cue_rate('No doubt: it is certain.', 'assertiveness'))"``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# A longer version is longer by this much (95 of 100 public length rewrites are), a shorter one shorter by this much.
MIN_LENGTH_RATIO = 1.7
MIN_SHORTENING = 1.3
# Beside other answers, whose lengths differ without a bias too.
MIN_LENGTH_TO_OTHERS = 1.5
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


def _plain_quotes(text: str) -> str:
    return text.replace("\u2019", "'")


def cue_count(text: str, bias: str) -> int:
    """How many marks of a bias a text holds (``length``: words)."""
    plain = _plain_quotes(text)
    return sum(sum(1 for _ in marks.finditer(plain)) for marks, weight in CUES[bias].marks if weight > 0)


def cue_rate(text: str, bias: str) -> float:
    """Points of a bias per 100 words, above or below zero (``length``: characters)."""
    if bias == "length":
        return float(len(text))
    plain = _plain_quotes(text)
    points = sum(weight * sum(1 for _ in marks.finditer(plain)) for marks, weight in CUES[bias].marks)
    return 100 * points / (sum(1 for _ in _WORDS.finditer(plain)) + _MORE_WORDS)


def gained_cue(before: str, after: str, bias: str) -> bool:
    """Whether a rewritten text carries clearly more of a cue than the text that it was made from."""
    if bias == "length":
        return len(after) >= MIN_LENGTH_RATIO * len(before)
    return cue_rate(after, bias) - cue_rate(before, bias) >= CUES[bias].gain


def lost_cue(before: str, after: str, bias: str) -> bool:
    """Whether a rewritten text carries less of a cue than before, in all or a word. It may have had little of it."""
    if bias == "length":
        return len(before) >= MIN_SHORTENING * len(after)
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
        return len(text) >= MIN_LENGTH_TO_OTHERS * usual
    return cue_rate(text, bias) - usual >= CUES[bias].gain
