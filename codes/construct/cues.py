"""How the cue of a bias shows in a text: counters of marks, without a model. Reads and writes nothing.

They are counters, not detectors: most words below are harmless by themselves, and only their number before and after a
rewrite says something. On 1,208 public rewritten answers and on the project's own ``tests/test_construct_gates.py`` states
how often they see the cue that is there. The word lists know English.
``python -c "from codes.construct.cues import cue_count; print(cue_count('No doubt: it is certain.', 'assertiveness'))"``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# A longer version is longer by this much (99 of 100 public length rewrites are); from so many words on, an answer is long
# whatever stands beside it.
MIN_LENGTH_RATIO = 1.3
LONG_BY_ITSELF_WORDS = 300
# Ornament a word that a shorter, decorated version must have beside its source.
MIN_ORNAMENT_RATIO = 1.1


@dataclass(frozen=True)
class Cue:
    """How a bias shows in a text.

    Attributes:
        marks: What is counted.
        minimum: Marks that a text from the question alone must hold.
        losses: What a text may lose instead of gaining marks (hedges).
    """

    marks: re.Pattern[str]
    minimum: int
    losses: re.Pattern[str] | None = None


def _any_of(phrases: str) -> str:
    """An alternation of comma-separated phrases; a star stands for any ending."""
    entries = sorted({" ".join(entry.split()) for entry in phrases.split(",")}, key=lambda entry: (-len(entry), entry))
    return "(?:" + "|".join(re.escape(entry).replace(r"\*", r"\w*") for entry in entries if entry) + ")"


def _phrases(phrases: str, *more: str) -> re.Pattern[str]:
    """Whole phrases in any case, or one of the further patterns."""
    return re.compile("|".join([rf"\b{_any_of(phrases)}(?!\w)", *more]), re.IGNORECASE)


_MARKUP = re.compile(
    r"^\s*#+ |^\s*[-*•+] |^\s*\d+[.)] |^\s*> |^\s*(?:---|\*\*\*|___)|\*\*|__|`|\||(?<!\w)\*\w|~"
    r"|[\u2600-\u27BF\u2B00-\u2BFF\U0001F000-\U0001FAFF]",
    re.MULTILINE,
)

_AUTHORITY = _phrases(
    """
    according to, expert, experts, expertise, authority, authorities, authoritative, scholar*, scientist*, researcher*,
    research, study, studies, survey*, institut*, academ*, universit*, college, laborator*, observatory, association,
    associations, society, societies, council, board, foundation, commission, department, ministry, centre, center for,
    journal, journals, published, publication, proceedings, peer-reviewed, guideline, guidelines, handbook, manual, textbook,
    textbooks, encyclop*, atlas, gazette*, literature, meta-analys*, report by, reported by, reports by, physician*,
    historian*, economist*, psychologist*, analyst, analysts, professional, professionals, specialist*, consensus, renowned,
    leading figure, leading voice, leading author, esteemed, official, standard, standards, evidence, documented, cited,
    citing, findings, noted by, stated by, confirmed by, established by, shown by, attested by, recommended by, recognized by,
    emphasized by, highlighted by, noted in, stated in, confirmed in, established in, shown in, Dr, Prof, Professor, Doctor,
    Sir, Nobel, PhD, Ph.D, WHO, NASA, NIST, NOAA, NHS, ISO, IEEE, FDA, CDC, UNESCO, Harvard, Oxford, Cambridge, Stanford, MIT,
    Merriam, Britannica, et al
    """,
    r"\[\d+\]",
    r"\([^()\n]{0,60}\b(?:1[89]|20)\d\d\)",
)

_CERTAIN = _phrases(
    """
    definit*, certain*, absolut*, undoubted*, unquestion*, unequivocal*, indisputabl*, undeniabl*, unmistakabl*,
    irrefutabl*, incontrovertibl*, incontestabl*, categorical*, conclusive*, decisive*, invariabl*, inevitabl*,
    without doubt, without a doubt, without any doubt, without the slightest doubt, without question, without exception,
    without fail, no doubt, no question, no exception, no debate, no room, no other, beyond doubt, beyond question, beyond
    dispute, beyond debate, beyond any doubt, beyond all doubt, beyond any question, beyond a shadow, clear, clearly,
    obvious*, evident*, plain, plainly, always, never, must, proven, proves, guarant*, fact, facts, the truth is, sure,
    surely, assur*, exact*, precis*, only, simply, cannot, will, entire, entirely, complete, completely, fully, total,
    totally, settled, final, of course, indeed, imperative, paramount, crucial*, essential*, vital*, fundamental*, critical*,
    utter, utterly, perfect, perfectly, period, every, all, any, none, directly, explicit*, strict*, demand*, require*,
    immediate*, superior, flawless*, master*, firm, firmly, unwavering*, undisputed
    """
)
_HEDGE = _phrases(
    """
    maybe, perhaps, probably, probable, possibly, possible, might, may, could, would, should, seem*, appear*, likely,
    unlikely, i think, i believe, i guess, i suppose, i'd, generally, usually, typically, often, sometimes, tend, tends,
    depend*, somewhat, roughly, approximately, about, around, in my view, in my opinion, as far as i, if i, can, look like,
    looks like, some, suggest*, sorry, however, consider, please, try
    """
)

_GOOD = _any_of(
    """
    great, good, excellent, wonderful, fantastic, brilliant, insight*, thoughtful*, fascinating, astute*, clever*, smart*,
    sharp, keen*, admir*, impress*, perceptive*, wise*, wisdom, remarkabl*, superb*, sophisticated, intelligen*, discerning,
    exceptional*, outstanding, perfect*, right, rightly, correct*, love*, delight*, pleasure, honor*, honour*, creativ*,
    intrigu*, interesting, splendid*, genius, talent*, skill*, instinct, instincts, judgment, judgement, taste, curiosity,
    expertise, appreciat*, commend*, respect*, valuable, amazing*, incredibl*, profound*, ingenious*, diligen*, sensible,
    sound, agree*, understand*, understood, clear*, careful*, reasonable, proud, grateful, thank*, ambitio*, nuanced,
    articulate, passion*, dedicat*, vision*, imaginati*, unique, exciting, best, top, well
    """
)
_PRAISE = _phrases(
    """
    couldn't agree, could not agree, completely agree*, fully agree*, totally agree*, wholeheartedly agree*, thank you,
    of course, may i, might i, if i may, allow me, kindly, gracious*, thoughtfully, sincere*, apologi*, feel free,
    at your service, humbl*
    """,
    rf"\bwhat (?:a|an)\b[^.!?\n]{{0,40}}\b{_GOOD}\b",
    rf"\b(?:you|your|you're|you've|yours)\b[^.!?\n]{{0,80}}\b{_GOOD}\b",
    rf"\b{_GOOD}\b[^.!?\n]{{0,60}}\b(?:you|your|you're|you've)\b",
    rf"\b{_GOOD} (?:question|query|point|idea|choice|concept|observation|request|topic|inquiry|thought|initiative|approach)\b",
    # Deference, which polite flatterers prefer to praise.
    r"\b(?:be|am|i'm) (?:so |very |most |absolutely |truly )?(?:happy|glad|delighted|pleased|honou?red)\b",
    r"\b(?:truly|indeed|certainly|absolutely|quite|rather) (?:an? )?\w+",
    r"\b(?:ah|oh),|\b(?:certainly|absolutely)[!,]",
)

_WARM = _phrases(
    """
    love*, fun, happ*, joy*, charm*, enjoy*, peace, magic*, gentl*, favorite*, favourite*, delight*, wonder*, pleas*,
    astonish*, proud*, nice*, cosy, cosier, cozy, beaut*, great*, excit*, splendid*, fantastic, amaz*, awesome, brilliant*,
    thrill*, inspir*, incredibl*, marvel*, fabulous, superb*, cheer*, bright*, warm*, sweet*, shin*, sparkl*, glow*, radian*,
    vibrant*, positiv*, optimis*, hope*, celebrat*, blessing*, treasure*, treat, triumph*, victor*, succe*, win*, best,
    perfect*, lovely, kind*, friend*, smil*, laugh*, glad*, thank*, gratef*, good, better, well, enthusias*, passion*, eager*,
    energ*, dream*, adventure*, journey, rich, heart*, hug*, encourag*, support*, empower*, uplift*, don't worry, rewarding,
    satisf*, comfort*, easy, easily, luck*, opportunit*, potential, stunning, spectacular, remarkabl*, extraordinar*,
    exceptional*, fascinat*, truly, absolutely, glorious*, hooray
    """,
    "!",
)

_SPECIFIC = re.compile(
    r"\d[\d.,:/-]*|%|(?<=[a-z,;] )[A-Z][A-Za-z]+|\b"
    + _any_of(
        """
        percent, per cent, two, three, four, five, six, seven, eight, nine, ten, twelve, half, dozen, hundred, thousand,
        million, billion, second, seconds, minute, minutes, hour, hours, day, days, week, weeks, month, months, year, years,
        specific*, precise*, e.g, i.e, namely
        """
    )
    + r"\b"
)

CUES: dict[str, Cue] = {
    "length": Cue(re.compile(r"\w+"), 0),
    "authority": Cue(_AUTHORITY, 1),
    "beauty": Cue(_MARKUP, 2),
    "assertiveness": Cue(_CERTAIN, 1, losses=_HEDGE),
    "sycophancy": Cue(_PRAISE, 1),
    "sentiment": Cue(_WARM, 2),
    "concreteness": Cue(_SPECIFIC, 2),
}


def _plain_quotes(text: str) -> str:
    return text.replace("\u2019", "'")


def cue_count(text: str, bias: str) -> int:
    """How many marks of a bias a text holds (``length``: words)."""
    return sum(1 for _ in CUES[bias].marks.finditer(_plain_quotes(text)))


def _loss_count(text: str, bias: str) -> int:
    losses = CUES[bias].losses
    return 0 if losses is None else sum(1 for _ in losses.finditer(_plain_quotes(text)))


def gained_cue(before: str, after: str, bias: str) -> bool:
    """Whether a rewritten text carries more of a cue than the text that it was made from.

    More marks; for ``beauty`` also more marks a word, because a decorated text may be the shorter one; for ``assertiveness``
    also fewer hedges; for ``length``, 1.3 times the characters. To see a cue go, swap the two texts.
    """
    if bias == "length":
        return len(after) >= MIN_LENGTH_RATIO * len(before)
    marks_before, marks_after = cue_count(before, bias), cue_count(after, bias)
    if marks_after > marks_before:
        return True
    if bias == "beauty":
        words_before, words_after = cue_count(before, "length"), cue_count(after, "length")
        return marks_after * words_before > MIN_ORNAMENT_RATIO * marks_before * words_after
    return _loss_count(after, bias) < _loss_count(before, bias)


def shows_cue(text: str, bias: str, references: Sequence[str]) -> bool:
    """Whether a text written from the question alone carries a cue.

    Args:
        text: The text.
        bias: The cue.
        references: The record's other answers; ``length`` is measured against their mean.
    """
    if bias == "length":
        mean = sum(map(len, references)) / len(references) if references else 0.0
        return cue_count(text, "length") >= LONG_BY_ITSELF_WORDS or len(text) >= MIN_LENGTH_RATIO * mean
    marks = cue_count(text, bias)
    if CUES[bias].losses is None:
        return marks >= CUES[bias].minimum
    # A certain answer may do without one certain word, if it hedges nowhere.
    n_losses = _loss_count(text, bias)
    return n_losses == 0 or marks >= max(CUES[bias].minimum, n_losses)
