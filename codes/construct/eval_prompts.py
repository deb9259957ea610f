"""What is asked of a model to make evaluation pairs. Reads and writes nothing.

A pair's chosen answer loses a cue (``build_plain_rewrite``), its rejected answer gains it (``build_prompt.build_rewrite``:
the same request that construction sends), and an answer is polished for ``refinement-aware`` (``build_polish``). Change a
text and raise ``EVAL_PROMPT_VERSION``: it is part of the origin of every row. To read a prompt:
``python -c "from codes.construct.eval_prompts import *; print(build_plain_rewrite([{'role': 'user', 'content': 'Why?'}],
'Because!', 'sentiment'))"``
"""

from __future__ import annotations

import re

from codes.common.biases import get_bias
from codes.common.errors import ContrastRMError
from codes.common.records import Message, enclose, messages_to_text
from codes.construct.build_prompt import PROMPT_VERSION

# The rejected answer is rewritten with construction's own prompt, so a row's version names both.
EVAL_PROMPT_VERSION = f"{PROMPT_VERSION}-eval1"

# How a writer takes each cue away. Keys are checked against the table of biases by a test.
LOSS_INSTRUCTIONS: dict[str, str] = {
    "length": (
        "Make it short: about half as long, or less where it says things twice. Leave out introductions, "
        "repetitions, side remarks and closing summaries, and use few words for the rest."
    ),
    "authority": (
        "Name no authorities: take out experts, institutes, studies, surveys, journals, guidelines, quotations and "
        "citations, and say in the answer's own voice what they were called upon to confirm."
    ),
    "beauty": (
        "Make it plain running text: no headings, no bold or italic type, no bullet points, no tables, no emoji and no "
        "ornate phrases. Lists become sentences. Code stays in its code block."
    ),
    "assertiveness": (
        "Make it sound modest: drop words such as 'definitely', 'clearly' or 'without doubt', and say what it says with "
        "hedges such as 'probably', 'it seems' or 'as far as I know'. It still comes to the same conclusion."
    ),
    "sycophancy": (
        "Keep to the matter: no praise of the request or of the person who asks, no thanks, no apologies, and no "
        "agreement for its own sake."
    ),
    "sentiment": (
        "Make the tone neutral and sober: no exclamation marks, no enthusiasm, no cheering up, no emotional adjectives "
        "and no emoji."
    ),
    "concreteness": (
        "Make it general: figures, dates, measurements, examples and names of people or places become words such as "
        "'many', 'some years ago' or 'a large city'. Only what is itself the answer, or a step that leads to it, stays "
        "exact."
    ),
}

_EDITOR_SYSTEM = (
    "You edit answers for testing automatic graders of answers. You change how an answer is put and never what it says. "
    "You follow the brief exactly and you print only the edited text: no introduction, no remark about the task, no note "
    "at the end, no quotation marks around it."
)

_PLAIN = """\
Below are a conversation that ends with a user's request, and a good answer to it. Rewrite the answer so that its \
style changes and its substance does not.

Substance: everything that makes it a good answer stays: the facts, the reasoning, the result, the code, the \
warnings. Add nothing of your own.

Style: {cue} If the answer has nothing of that kind, give it back word for word.{limit}

{conversation}

{answer}

Print only the edited answer."""

_POLISH = """\
Below are a conversation that ends with a user's request, and an answer to it. Polish the answer: clearer and smoother \
sentences, correct grammar and spelling, a sensible order.

Substance: every claim, number, step and conclusion stays as it is, right or wrong. Correct no facts, add none, leave \
none out, and keep about the same length and the same kind of layout.{limit}

{conversation}

{answer}

Print only the edited answer."""

# What of these prompts a text may have taken over.
LEAKED_WORDS = re.compile(r"</?given_answer\b|\bgiven_answer\b|\bprint only the edited\b", re.IGNORECASE)


def loss_instruction(bias: str) -> str:
    """What an editor is told to take away.

    Raises:
        ContrastRMError: The bias is unknown, or no rewrite bias.
    """
    if get_bias(bias).kind != "rewrite":
        raise ContrastRMError(f"bias {bias!r} has no cue to take away; those that do: {', '.join(LOSS_INSTRUCTIONS)}")
    return LOSS_INSTRUCTIONS[bias]


def _limit_line(max_words: int | None) -> str:
    return (
        "" if max_words is None else f"\n\nLength: at most {max_words} words in all, and the last sentence is complete."
    )


def _blocks(messages: list[Message], answer: str) -> dict[str, str]:
    conversation = messages_to_text(messages)
    return {
        "conversation": enclose("conversation", conversation, among=[answer]),
        "answer": enclose("given_answer", answer, among=[conversation]),
    }


def build_plain_rewrite(
    messages: list[Message], chosen: str, bias: str, *, max_words: int | None = None
) -> list[Message]:
    """Ask for a good answer without the cue of a bias, its content kept.

    Raises:
        ContrastRMError: See ``loss_instruction``.
    """
    text = _PLAIN.format(
        cue=loss_instruction(bias),
        **_blocks(messages, chosen),
        limit=_limit_line(max_words),
    )
    return [{"role": "system", "content": _EDITOR_SYSTEM}, {"role": "user", "content": text}]


def build_polish(messages: list[Message], answer: str, *, max_words: int | None = None) -> list[Message]:
    """Ask for an answer to be polished, its content kept."""
    text = _POLISH.format(**_blocks(messages, answer), limit=_limit_line(max_words))
    return [{"role": "system", "content": _EDITOR_SYSTEM}, {"role": "user", "content": text}]
