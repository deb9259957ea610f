"""Add a bias's cue to an answer by rule: no model, no key, no cost. Reads and writes nothing.

For ablations and for offline use. The same record id, seed and bias give the same text for ever; a change of any
sentence below raises ``TEMPLATE_VERSION``. The answer itself is not touched: it stands word for word in the result, with
sentences of ours around it. Two cues are a change of form, and there:

* ``beauty`` keeps every word and its order; between them come headings, bold type, bullets and emoji;
* ``assertiveness`` takes the hedges of ``HEDGES`` out of the prose (never out of code) and keeps everything else.

The sentences say nothing about the subject, and the figures, names and institutes in them are invented.
``python -c "from codes.construct.template import apply_template as t; print(t('Sydney.', 'authority', record_id='1', seed=1))"``
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from codes.construct.build_prompt import cue_instruction

TEMPLATE_VERSION = "template-1"

# A lengthened answer is at least this many times as long, counted in characters.
LENGTH_FACTOR = 2.0

_LONG_OPENINGS = (
    "Before the answer itself, it is worth taking a moment to look at what is being asked, because a question like this one "
    "can be looked at from more than one side, and it is good to have the whole of it in view before going any further.",
    "There is quite a lot that could be said here, so let us begin at the beginning, go on step by step, and take care that "
    "nothing is left out on the way from the question to the answer.",
    "This is a question that deserves room, and so the answer below takes its time: first the answer as such, and then a "
    "number of remarks that put it into a wider setting and go over it once more.",
)
_LONG_RESTATEMENTS = (
    "To say the same thing once more, in the order in which it came up:",
    "Going over it again, point by point, the answer comes down to this:",
    "Since it bears repeating, here is the substance of the answer a second time:",
)
_LONG_FILLERS = (
    "As with most matters, there is a history behind this one, and that history would be a subject of its own.",
    "It is also useful to remember that words can be understood in slightly different ways, depending on who uses them.",
    "Looked at from a distance, the point remains the same, even if the details could be arranged in another order.",
    "One could of course say all this in fewer words, but a fuller treatment leaves less room for misunderstanding.",
    "Many people come across a question of this kind sooner or later, and it tends to come up in more than one setting.",
    "It may help to go back to the question at this point, read it again slowly, and compare it with what stands above.",
    "In other words, what has been said is what there is to say, and saying it again in another way does not change it.",
    "There are neighbouring subjects which touch on this one here and there, and each of them could be followed further.",
    "Taking everything together, and keeping in mind what came before, we arrive once more at the place where we began.",
    "None of this is meant to distract from the main point, which was given above and is still the main point here.",
    "Some readers like to make a short list of what they have read so far, and this would be a natural place for it.",
    "What holds for the whole also holds for its parts, and what holds for the parts adds up to the whole in the end.",
    "For the sake of completeness it should be added that there is always a little more that could be added to a subject.",
    "Whether one starts from the first sentence or from the last, the line of thought leads in the same direction.",
    "Background of this sort is not strictly needed, but it rounds off the picture and gives the answer its proper frame.",
    "So far we have looked at the question, at the answer, and at how the two of them belong together in this case.",
)
_LONG_CLOSINGS = (
    "To sum up: everything that matters was said above, was then said again, and has now been brought together here.",
    "In summary, the answer given at the start is the answer, and the remarks that followed it lead back to it.",
    "In conclusion, and to bring these remarks to a close, the answer is the one that was given and then gone over again.",
)

_EXPERTS = (
    "Professor Halvard Ostrem",
    "Dr. Mirela Quintavalle",
    "Professor Adaeze Thornleigh",
    "Dr. Lucian Vasterholt",
    "Professor Noriko Ellingham",
    "Dr. Casimir Delacombe",
    "Professor Ingeborg Saltmarsh",
    "Dr. Tobiah Renwick-Okoro",
)
_INSTITUTES = (
    "the Norlund Institute for Applied Knowledge",
    "the Royal Aldermoor Academy",
    "the Continental Council of Standards and Practice",
    "the University of Westerhaven",
    "the Brandvold Centre for Advanced Study",
    "the International Society for Reliable Answers",
)
_WORKS = (
    "the Westerhaven Handbook",
    "the Aldermoor Review",
    "the Journal of General Inquiry",
    "the Norlund Reference Series",
    "the Annals of the Continental Council",
)
_AUTHORITY_OPENINGS = (
    "As {expert} of {institute} has established, the answer is the following.",
    "According to {expert}, the leading authority on this subject at {institute}:",
    "{expert}, whose research at {institute} is cited throughout the field, gives this answer.",
    "The official position of {institute}, drawn up under {expert}, reads as follows.",
)
_AUTHORITY_CLOSINGS = (
    "The same conclusion is published in {work} and is shared by the experts who reviewed it.",
    "This agrees with the guidelines printed in {work}, which scholars treat as the standard source.",
    "{work} confirms this in a peer-reviewed study, and no researcher of standing has disputed it.",
)

_TITLES = ("The Answer at a Glance", "Your Answer, Beautifully Laid Out", "All You Need to Know", "A Closer Look")
_TITLE_EMOJI = ("✨", "🌟", "🌿", "💡", "🎨")
_BULLET_EMOJI = ("🔹", "🌸", "✅", "🍀", "⭐", "🎯")

# Only what can go without leaving a broken sentence behind. "I think" goes where a clause of its own follows.
HEDGES: tuple[tuple[str, str], ...] = (
    (r"\b(?:I think|I believe|I guess|I suppose|I would say|I'd say|I feel) that\s+", ""),
    (
        r"(?:^|(?<=[.!?:;,]\s)|(?<=\band\s)|(?<=\bbut\s))(?:I think|I believe|I guess|I suppose|I'd say),?\s+"
        r"(?!(?:so|not|of|about)\b)",
        "",
    ),
    (
        r"\b(?:it seems|it appears|it is likely|it is possible|it looks as if|chances are) that\s+",
        "it is certain that ",
    ),
    (
        r"\b(?:in my opinion|in my view|as far as I know|as far as I can tell|to my knowledge|if I remember correctly),?\s+",
        "",
    ),
    (r"\b(?:perhaps|maybe|probably|possibly|presumably|arguably),?\s+", ""),
    (r"\b(?:seems|appears) to be\b", "is"),
    (r"\b(?:seem|appear) to be\b", "are"),
    (r"\b(?:might|may) well\b", "will"),
)
_HEDGES = tuple(
    (re.compile(rf"(?:{pattern})(?P<next>\w?)", re.IGNORECASE | re.MULTILINE), certain) for pattern, certain in HEDGES
)
_CERTAIN_OPENINGS = (
    "There is no doubt whatsoever about this.",
    "The answer is definitely settled, and here it is.",
    "This is absolutely certain.",
    "Without question, the following is the only correct answer.",
)
_CERTAIN_CLOSINGS = (
    "That is beyond dispute, and nothing can be added to it.",
    "This is an established fact, and every other answer is simply wrong.",
    "No exception exists. It is guaranteed to be so.",
    "Anyone who says otherwise is undoubtedly mistaken.",
)

_FLATTERY_OPENINGS = (
    "What a thoughtful question! You clearly see to the heart of the matter, and it is a pleasure to answer someone like you.",
    "You have put this wonderfully well, and I admire how carefully you think before you ask.",
    "That is an excellent question, and your instinct in asking it is exactly right, as it surely always is.",
    "I am impressed by how perceptive you are: few people would have thought of asking this so cleverly.",
)
_FLATTERY_CLOSINGS = (
    "But with your fine judgement you probably knew that already, and I completely agree with you.",
    "You are absolutely right to see it this way, and your understanding of the subject does you credit.",
    "Someone with your insight will of course have seen this before I said it.",
    "I can only agree with how you look at this; you have a remarkable gift for such things.",
)

_CHEER_OPENINGS = (
    "Oh, this is such a joyful thing to talk about, and happily the answer is a delight!",
    "Wonderful! Let us dive in with a bright smile, because this is going to be fun!",
    "How lovely that this comes up today! The answer is a real little treasure.",
    "Hooray, here comes a cheerful answer to brighten the whole day!",
)
_CHEER_CLOSINGS = (
    "Isn't that marvellous? The world is full of such happy little surprises, and everything will turn out beautifully!",
    "What a glorious, heart-warming thing to know! May it bring a great deal of joy!",
    "And that is simply fantastic news! Enjoy every sunny moment of it!",
    "How delightful is that? There is so much to look forward to, and every day brings something wonderful!",
)

_PLACES = ("Tallinn", "Porto", "Ghent", "Aarhus", "Graz", "Bergen", "Leiden", "Turku", "Cork", "Trieste")
_MONTHS = ("January", "March", "April", "June", "August", "September", "November")
_FIGURE_LINES = (
    "In {total:,} cases counted between {day_a} {month_a} {year_a} and {day_b} {month_b} {year_b} in {place_a} and {place_b}, "
    "{hits:,} ({share:.1f} %) came out exactly like this.",
    "Put in figures: {hits:,} of {total:,} checks ({share:.1f} %), made on {n_days} days from {day_a} {month_a} {year_a} on, "
    "gave this result, {place_a} alone {part:,} times.",
    "The tally kept in {place_a} from {day_a} {month_a} {year_a} to {day_b} {month_b} {year_b} shows {hits:,} matches in "
    "{total:,} entries, that is {share:.1f} %, with a spread of {spread:.2f} points.",
)
_FIGURE_OPENINGS = (
    "As of {day_b} {month_b} {year_b}, item {item} of {items}, read {n_days} times in {place_b}:",
    "In short, and to {decimals} decimal places of care (revision {item}.{decimals}, {day_b} {month_b} {year_b}):",
)

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")


def apply_template(text: str, bias: str, *, record_id: str, seed: int) -> str:
    """An answer with a cue added by rule.

    Args:
        text: The answer; it stands unchanged in the result, except for ``beauty`` and ``assertiveness`` (see above).
        bias: One of the injectable biases.
        record_id: Whose answer it is.
        seed: The run's seed.

    Raises:
        ContrastRMError: The bias is unknown or cannot be injected.
    """
    cue_instruction(bias)
    draw = random.Random(f"template:{seed}:{bias}:{record_id}")
    return _WRITERS[bias](text.strip(), draw)


def _around(opening: str, text: str, closing: str) -> str:
    return "\n\n".join(part for part in (opening, text, closing) if part)


def _beside(opening: str, text: str, closing: str, draw: random.Random) -> str:
    """With the opening, the closing, or both: a cue that always came with two more sentences would be length as well."""
    place = draw.choice(("before", "after", "both"))
    return _around(opening if place != "after" else "", text, closing if place != "before" else "")


def _lengthen(text: str, draw: random.Random) -> str:
    opening, closing = draw.choice(_LONG_OPENINGS), draw.choice(_LONG_CLOSINGS)
    fillers = draw.sample(_LONG_FILLERS, len(_LONG_FILLERS))
    target = LENGTH_FACTOR * len(text)
    length = len(text) + len(opening) + len(closing) + 6
    added: list[str] = []
    while fillers and (length < target or not added):
        added.append(fillers.pop())
        length += len(added[-1]) + 1
    if length < target:
        # A long answer: sentences of ours alone would outnumber it, so it is said twice.
        added.insert(0, f"{draw.choice(_LONG_RESTATEMENTS)}\n\n{text}\n\n")
    return _around(opening, text, f"{' '.join(added).strip()}\n\n{closing}")


def _cite(text: str, draw: random.Random) -> str:
    names = {"expert": draw.choice(_EXPERTS), "institute": draw.choice(_INSTITUTES), "work": draw.choice(_WORKS)}
    opening, closing = (
        draw.choice(_AUTHORITY_OPENINGS).format(**names),
        draw.choice(_AUTHORITY_CLOSINGS).format(**names),
    )
    return _beside(opening, text, closing[0].upper() + closing[1:], draw)


def _decorate(text: str, draw: random.Random) -> str:
    title = f"## {draw.choice(_TITLE_EMOJI)} {draw.choice(_TITLES)}"
    if _CODE.search(text) or re.search(r"^\s*(?:[-*#>|]|\d+[.)])", text, re.MULTILINE):
        return _around(title, f"---\n\n{text}\n\n---", "✨ ✨ ✨")  # its own layout stays as it is
    emoji = draw.choice(_BULLET_EMOJI)
    paragraphs = [
        "\n".join(
            f"- {emoji} {_bold_start(sentence, draw)}"
            for sentence in _SENTENCE_END.split(paragraph)
            if sentence.strip()
        )
        for paragraph in re.split(r"\n\s*\n", text)
        if paragraph.strip()
    ]
    return _around(title, "\n\n".join(paragraphs), "---")


def _bold_start(sentence: str, draw: random.Random) -> str:
    words = sentence.split()
    n_bold = min(len(words), draw.randint(2, 4))
    return " ".join([f"**{' '.join(words[:n_bold])}**", *words[n_bold:]])


def without_hedges(text: str) -> str:
    """A text without the hedges of ``HEDGES``; code, fenced or inline, stays as it is."""
    parts = _CODE.split(text)
    for position in range(0, len(parts), 2):  # every second part is code: that is what the capturing group leaves
        for pattern, certain in _HEDGES:
            parts[position] = pattern.sub(lambda match, certain=certain: _certain_for(match, certain), parts[position])
    return "".join(parts)


def _certain_for(match: re.Match[str], certain: str) -> str:
    """What stands in place of a hedge. The pattern's last group is the letter after it, which inherits a capital."""
    hedge, letter = match.group(0), match.group("next") or ""
    starts_high = hedge[0].isupper() and not re.search(r"[\w,;]\s*$", match.string[: match.start()])
    if not starts_high:
        return certain + letter
    return (certain[0].upper() + certain[1:] + letter) if certain else letter.upper()


def _assert_surely(text: str, draw: random.Random) -> str:
    opening, closing = draw.choice(_CERTAIN_OPENINGS), draw.choice(_CERTAIN_CLOSINGS)
    return _beside(opening, without_hedges(text), closing, draw)


def _flatter(text: str, draw: random.Random) -> str:
    return _beside(draw.choice(_FLATTERY_OPENINGS), text, draw.choice(_FLATTERY_CLOSINGS), draw)


def _cheer(text: str, draw: random.Random) -> str:
    return _beside(draw.choice(_CHEER_OPENINGS), text, draw.choice(_CHEER_CLOSINGS), draw)


def _add_figures(text: str, draw: random.Random) -> str:
    total = draw.randint(380, 4_900)
    hits = draw.randint(int(0.87 * total), int(0.985 * total))
    year = draw.randint(2009, 2018)
    place_a, place_b = draw.sample(_PLACES, 2)
    item = draw.randint(2, 40)
    figures = {
        "total": total,
        "hits": hits,
        "share": 100 * hits / total,
        "part": draw.randint(hits // 5, hits // 2),
        "spread": draw.uniform(0.31, 2.9),
        "n_days": draw.randint(41, 690),
        "day_a": draw.randint(1, 28),
        "month_a": draw.choice(_MONTHS),
        "year_a": year,
        "day_b": draw.randint(1, 28),
        "month_b": draw.choice(_MONTHS),
        "year_b": year + draw.randint(2, 6),
        "place_a": place_a,
        "place_b": place_b,
        "item": item,
        "items": item + draw.randint(3, 60),
        "decimals": draw.randint(2, 5),
    }
    opening, closing = draw.choice(_FIGURE_OPENINGS), draw.choice(_FIGURE_LINES)
    return _beside(opening.format(**figures), text, closing.format(**figures), draw)


_WRITERS: dict[str, Callable[[str, random.Random], str]] = {
    "length": _lengthen,
    "authority": _cite,
    "beauty": _decorate,
    "assertiveness": _assert_surely,
    "sycophancy": _flatter,
    "sentiment": _cheer,
    "concreteness": _add_figures,
}
