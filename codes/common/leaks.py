"""Words about the writing task that a model left in a text: one list for the gates of construction and the audit of files.

Reads and writes nothing. A leak speaks to whoever asked for the text to be written or rewritten ("Here's the beautified
version of the assistant's response"), and not to the person whose question the text answers. So the question counts: what
it asks for, or says itself, is no leak. "Here is the revised version of your email:" answers "improve this email".
To try one: ``python -c "from codes.common.leaks import find_leak as f; print(f('Sure, here is the rewritten answer: x'))"``
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

LeakKind = Literal["preamble", "meta_talk"]

# Characters in which an opening, and a closing remark, are looked for.
_OPENING_CHARACTERS = 300
_CLOSING_CHARACTERS = 300


@dataclass(frozen=True)
class Leak:
    """A leak in a text.

    Attributes:
        kind: ``preamble``: words before the text; ``meta_talk``: words in the place of it, or about it, elsewhere.
        said: The words.
    """

    kind: LeakKind
    said: str


# --- words of the writing task --------------------------------------------------------------------------------------------

_EDIT = (
    r"(?:rewrit\w+|rewrote|revis(?:e|es|ed|ing)|rephras\w+|reword\w+|restyl\w+|reformat\w*|beautif\w+|polish(?:ed|ing)?|"
    r"refin(?:e|ed|ing))"
)
_EDITED = (
    r"(?:rewritten|revised|rephrased|reworded|restyled|reformatted|(?:\w+-)?formatted|beautified|polished|refined|expanded|"
    r"extended|elaborated?|enhanced|modified|improved|verbose|comprehensive-sounding)"
)
_ALTERED = r"(?:modified|polished|enhanced|flawed|original|requested|similar|new|updated|wrong|incorrect)"
_TEXT = r"(?:answer|response|reply|version|rewrite|revision|rendition|text|request|instruction)s?"
_ANSWER = r"(?:answer|response|reply)"
_OPENER = (
    r"(?:sure|certainly|of course|okay|ok|absolutely|understood|alright|got it|no problem)\b[\s,.!:\-–—]*"
    r"(?:i[^\n.!?]{0,60}[.!]\s+)?"
)
_HERE = r"\b(?:here(?:'s| is| are)|below is|this is|the following is)\b"
_LET = r"\b(?:i(?:'ll| will| have|'ve| can)|let me|let's|allow me to)\b"
_SOME = r"[^\n.!?:]{0,60}"
_LINE = r"[^\n]{0,200}"


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


# Nobody asks for these: they name the earlier text as a writer's brief does. Only a question that speaks of an assistant
# or of an answer itself may be answered so.
_OF_THE_ANSWER = _any_of(
    rf"(?:{_HERE}|{_LET}|^(?!there (?:is|was) no)){_LINE}\bassistant#?(?:'s)? (?:original |provided )?{_ANSWER}\b",
    rf"\b(?:version|rewrite|rewriting|rendition|revision|elaboration) of (?:the|this) (?:\w+ )?{_ANSWER}\b",
)
# The terms of the brief. A question that asks for them has words of its own for it.
_OF_THE_BRIEF = _any_of(
    rf"(?:{_HERE}|{_LET})[^\n.!?]{{0,140}}"
    r"\b(?:more|very|exceptionally) (?:[\w-]+,? (?:and )?){0,2}(?:verbose|comprehensive-sounding)\b",
    rf"(?:{_HERE}|{_LET}){_LINE}\bwithout (?:introducing|adding) (?:any )?(?:new|further) (?:\w+ )?(?:information|facts|content)",
    rf"(?:{_HERE}|{_LET}){_LINE}\b(?:designed|crafted|meant|intended|formatted|enhanced|expanded)\b[^\n]{{0,80}}"
    r"\b(?:verbose|exceptionally polite|credibility|authoritative tone|visual appeal)",
    rf"(?:{_HERE}|{_LET}){_LINE}\b(?:removing|reducing|adding) (?:all |any )?(?:elements|words|phrases|language) that\b",
)
# Words of an editor. They are an answer where the question asks for editing.
_AS_EDITOR = _any_of(
    rf"{_HERE}[^\n.!?:]{{0,80}}\b{_EDITED}(?:,? (?:and |but )?(?:more )?[\w-]+){{0,4}}? {_TEXT}\b",
    rf"{_HERE}{_SOME}\b(?:polished|refined) and (?:more )?[\w-]+",
    rf"{_HERE}{_SOME}\bmore [\w-]+ and polished\b",
    rf"{_HERE}[^\n.!?]{{0,80}}\bmore (?:[\w-]+,? (?:and )?)?elaborated?\b",
    rf"^{_SOME}{_LET}{_SOME}\b{_EDIT} (?:the|this|that|it|your)\b",
    # A heading: "**Rewritten answer:**".
    rf"^(?:{_EDITED}) {_TEXT}\W{{0,4}}(?:[:\n]|$)",
    rf"^as (?:you )?(?:requested|instructed|asked),? {_SOME}\b{_EDIT}",
)
# An ordinary opening with a name of the text that only a writing task gives it.
_AS_WRITER = _any_of(
    rf"^(?:{_OPENER})?{_HERE}{_SOME}\b(?P<altered>{_ALTERED})\s+(?:\w+\s+)?(?P<altered_text>{_TEXT})\b{_SOME}[:\n]",
    rf"^{_OPENER}{_HERE} the (?P<text>response|reply|version|rewrite|revision|rendition|request|instruction)\s*[:\n]",
    rf"^(?P<heading>{_ALTERED})\s+(?P<heading_text>{_TEXT})\W{{0,4}}(?:[:\n]|$)",
)
_REQUEST = r"(?:request|question|query|message|prompt|input|instruction)s?"
# The one who asks, in the third person, in the place of an answer to him.
_ABOUT_THE_USER = _any_of(
    rf"^(?:[^\n.!?]{{0,60}}[.!?]\s+)?(?:it (?:looks|seems|appears) (?:like|that) )?the user(?:'s (?:last )?{_REQUEST} (?:is|was) "
    r"(?:about|for|to|not|unclear|asking)|"
    r",? (?:likely |probably |also |only |just )?(?:(?:is|was) (?:asking|requesting|looking for|seeking)|"
    r"(?:has |have )?(?:asked|requested)(?! that)|asks|(?:has |have )?(?:provided|given|shared|sent|posted)|"
    r"(?:did not|didn't|has not|hasn't) (?:provide|give|ask|supply|specify|include)\w*|"
    r"wants (?:me|us|to know|an? (?:answer|explanation)))\b)",
)
_TO_ME = re.compile(r"\b(?:asks|asked|wants|requested) (?:me|us|an assistant)\b", re.IGNORECASE)
_NOTHING_TO_EDIT = _any_of(
    rf"\b(?:nothing|no (?:[\w#]+ )?(?:{_ANSWER}|text|content)) (?:(?:was|is|has been) )?(?:given |provided |here )?"
    rf"to (?:be )?{_EDIT}",
)
_ASKS_FOR_TEXT = _any_of(
    rf"\bprovide (?:me with )?(?:the|an?|your) (?:\w+ )?(?:{_ANSWER}|text|content)\b[^\n]{{0,60}}\b{_EDIT}\b",
    r"\b(?:can(?:no|')t|can not|unable to|not able to) (?:provide|produce|create|generate|offer|give|write) (?:you )?(?:with )?"
    rf"(?:an?|the|any) {_EDIT} (?:{_ANSWER}|version|text)\b",
)
_OF_ITSELF = _any_of(
    rf"\bthe rewritten {_ANSWER}\b",
    rf"\bthis (?:revised|rewritten|polished|expanded|refined|reworded|beautified) (?:{_ANSWER}|version|rendition|interaction)\b",
    rf"\b(?:than|in|from|of) the (?:original|previous) {_ANSWER}\b",
    rf"\bthe original (?:{_ANSWER}|text) (?:states?|says?|mentions?|gave|did)\b",
    r"(?:^|\n)\W{0,4}key improvements\b[^\n]{0,60}:",
    r"(?:^|\n)\W{0,4}(?:improvements|changes) (?:made|in this version)\W{0,4}:",
)
_LAST_REMARK = _any_of(
    r"(?:^|\n|[.!?]\s)\W{0,4}note\b[^\n]{0,160}\b(?:flawed answer|original (?:answer|response)|kept (?:all )?the errors?|"
    rf"i (?:have |'ve )?(?:kept|{_EDIT})|{_EDIT} (?:{_ANSWER}|version|text))\b",
    rf"(?:^|\n|[.!?]\s)\W{{0,4}}(?:this|the) (?:{_ANSWER}|version)\b[^\n]{{0,60}}"
    rf"\b(?:{_EDIT}|flawed answer|original {_ANSWER})\b",
    rf"(?:^|\n|[.!?]\s)\W{{0,4}}(?:note|this|the)\b[^\n]{{0,100}}\b(?:{_ANSWER}|version|text)\b[^\n]{{0,60}}\b"
    r"(?:intentionally|deliberately) (?:wrong|incorrect|flawed|false|misleading)\b",
)

# --- what the question asks for -------------------------------------------------------------------------------------------

_ASKS_FOR_EDITING = _any_of(
    r"\b(?:rewrit\w+|revis(?:e|ed|ing|ion)|rephras\w+|reword\w*|restyle|reformat|redraft\w*|tweak\w*|beautify|polish|refine|paraphras\w+|proof-?read\w*|"
    r"copy-?edit\w*|refactor\w*|translat\w+|simplify|reorgani[sz]e)\b",
    r"\b(?:improved?|improving|correct(?:ed|ing)?|fix|check|edit|expand|elaborate|modify|modifications?|enhance|shorten|lengthen|extend|"
    r"format|adjust|adapt|change|clean up|touch up|update)\b[^.!?\n]{0,40}"
    r"\b(?:this|the (?:following|above|text|sentence|paragraph|essay|email|letter|code|grammar)|following|below|each|texts?|"
    r"sentences?|paragraphs?|essay|e-?mail|letter|errors?|mistakes?|grammar\w*|grammatical\w*|profile|bio|resume|cv)\b",
    r"\bmake\b[^!?\n]{0,60}\b(?:better|nicer|clearer|shorter|longer|fluent\w*|concise|professional|more formal)\b",
    # The same in the languages that are asked in most.
    "润色|改写|修改|重写|翻译|校对|провер|исправ|перефраз|перепиш|улучш|перевед|korrigier|verbesser|umformulier|umschreib|übersetz|"
    "corrig|réécri|améliorer|reformul|synthétis|résume|traduis|reescrib|mejora|traduc|riscriv|migliora|correggi|reescrev|melhor",
)
# A question may hold pages of text to work on: what it asks for stands at one end.
_QUESTION_END = 400


def plain_quotes(text: str) -> str:
    """A text with straight apostrophes, as the patterns have them."""
    return text.replace("\u2019", "'").replace("\u2018", "'")


def asks_for_editing(question: str) -> bool:
    """Whether a question asks for a text to be changed, so that an answer may speak as an editor does."""
    question = plain_quotes(question).strip()
    ends = f"{question[:_QUESTION_END]}\n{question[-_QUESTION_END:]}"
    return _ASKS_FOR_EDITING.search(ends) is not None


def find_leak(text: str, *, question: str = "", source: str = "") -> Leak | None:
    """The words about the writing task in a text; None where there are none.

    Args:
        text: The text, whole.
        question: What the text answers. Words that it asks for are no leak.
        source: The text that it was made from. What that one had already is no leak of the rewriting.
    """
    leak = _preamble(text, question)
    if leak is not None and not (source and _preamble(source, question)):
        return Leak("preamble", leak)
    leak = _meta_talk(text, question)
    if leak is not None and not (source and _meta_talk(source, question)):
        return Leak("meta_talk", leak)
    return None


def _preamble(text: str, question: str) -> str | None:
    opening = plain_quotes(text).strip().lstrip("*_#\"' ")[:_OPENING_CHARACTERS].split("\n\n")[0]
    asked = plain_quotes(question).lower()
    match = _OF_THE_ANSWER.search(opening)
    if match and not re.search(rf"\bassistant|\b{_ANSWER}\b", asked):
        return match.group(0)
    match = _OF_THE_BRIEF.search(opening)
    if match and not re.search(r"verbose|polite|credib|authorit|visual|\bremove", asked):
        return match.group(0)
    if asks_for_editing(question):
        return None
    if match := _AS_EDITOR.search(opening):
        return match.group(0)
    match = _AS_WRITER.search(f"{opening}\n")
    if match and not any(word.lower().rstrip("s") in asked for word in match.groupdict().values() if word):
        return match.group(0)
    return None


def _meta_talk(text: str, question: str) -> str | None:
    text = plain_quotes(text).strip()
    opening, asked = text.lstrip("*_#\"' ")[:_OPENING_CHARACTERS], question.lower()
    match = _ABOUT_THE_USER.search(opening)
    if match and (not re.search(r"\busers?\b", asked) or _TO_ME.search(opening)):
        return match.group(0)
    if match := _NOTHING_TO_EDIT.search(opening):
        return match.group(0)
    if asks_for_editing(question):
        return None
    match = _ASKS_FOR_TEXT.search(opening) or _LAST_REMARK.search(text[-_CLOSING_CHARACTERS:])
    if match is None and not re.search(r"\boriginal\b|\bimprove|\bprevious\b", asked):
        match = _OF_ITSELF.search(text)
    return match.group(0) if match else None
