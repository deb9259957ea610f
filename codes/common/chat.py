"""Text becomes tokens here and nowhere else.

A conversation (prompt turns + one answer) is rendered with the tokenizer's chat template and tokenised exactly as
``apply_chat_template(tokenize=True)`` does it: no second BOS. A tokenizer without a template (an encoder) gets the pair
(prompt text, answer). What is longer than the limit meets an explicit policy, and is counted. What the template refuses, or
what holds an id without an embedding, is refused by its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from codes.common.errors import ContrastRMError
from codes.common.records import Message, messages_to_text
from codes.common.settings import OVERLENGTH_POLICIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODE_CHUNK = 1024
# Templates that can be given by name to a tokenizer that has none.
KNOWN_TEMPLATES: Mapping[str, str] = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
}
OTHER_TEMPLATE = "give another template (--chat_template)"


class RefusedTexts(ContrastRMError):
    """Conversations that cannot become what the model takes.

    Args:
        reasons: By their place among those that were to be encoded; each says the cure.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__(next(iter(self.reasons.values())))


@dataclass(frozen=True)
class Conversation:
    """What is scored: the prompt's turns and one answer."""

    messages: Sequence[Message]
    answer: str

    def turns(self) -> list[Message]:
        """All turns, the answer as the last one."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one conversation. Two of them are equal when the model sees the same, however that came about.

    Attributes:
        input_ids: As the model sees them; empty where the policy dropped the text.
        token_type_ids: Segment ids of a text pair, where the tokenizer makes them.
        n_cut: Tokens that the over-length policy removed.
        answer_cut: Whether any of them belonged to the answer.
    """

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None = None
    n_cut: int = field(default=0, compare=False)
    answer_cut: bool = field(default=False, compare=False)

    @property
    def dropped(self) -> bool:
        """Whether nothing is left to score."""
        return not self.input_ids


@dataclass(frozen=True)
class Refusal:
    """Why a conversation cannot become what the model takes, and the cure."""

    reason: str


class ChatFormatter:
    """Renders and tokenises conversations for one tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        max_length: Most tokens of a conversation; None for no limit.
        overlength: What happens beyond it. ``drop``: the text is left out. ``left``: the oldest tokens go (a leading BOS
            stays). ``keep_end``: the end of the answer is cut, but the tokens that close a turn stay, so that the score is
            still read at an end of turn (a text whose prompt alone fills the limit is dropped). ``error``: the run stops.
        n_embeddings: Rows of the model's embedding; None: every id of the tokenizer has one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        overlength: str = "error",
        n_embeddings: int | None = None,
    ) -> None:
        if overlength not in OVERLENGTH_POLICIES:
            raise ContrastRMError(f"unknown over-length policy {overlength!r}; known: {', '.join(OVERLENGTH_POLICIES)}")
        if not tokenizer.is_fast:
            raise ContrastRMError(
                "a fast tokenizer is needed (tokenizer.json); convert this one with transformers first"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlength = overlength
        self.n_embeddings = n_embeddings
        self.has_template = bool(tokenizer.chat_template)
        self.closing_ids = self._closing_ids() if self.has_template else ()
        if max_length is not None and max_length <= len(self.closing_ids) + 1:
            raise ContrastRMError(f"max_length {max_length} leaves no room for a single token of an answer")

    @property
    def template_hash(self) -> str:
        """Hex SHA-256 of the chat template, or of the empty text where there is none."""
        return hashlib.sha256(str(self.tokenizer.chat_template or "").encode()).hexdigest()

    def render(self, conversation: Conversation) -> str:
        """The conversation as the template writes it.

        Raises:
            RefusedTexts: The template refuses the turns (some know no system role), or fails on them.
        """
        turns = conversation.turns()
        try:
            return self._apply(turns)
        except TemplateFailure as failure:
            roles = [turn["role"] for turn in turns]
            raise RefusedTexts(
                {0: f"the chat template refuses turns {roles}: {failure}; {self._cure(turns)}"}
            ) from failure

    def _apply(self, turns: Sequence[Message]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(turns), tokenize=False))
        except TemplateError as error:
            raise TemplateFailure(_in_one_line(error)) from error
        except Exception as error:  # a template is a program of somebody else's: it fails in any way that one can
            raise TemplateFailure(f"{type(error).__name__}: {_in_one_line(error)}") from error

    def _cure(self, turns: Sequence[Message]) -> str:
        """What to do about turns that the template refuses, by what is special about them."""
        if turns[0]["role"] == "system" and self._accepts(turns[1:]):
            return f"drop the system turn, put its text into the first user turn, or {OTHER_TEMPLATE}"
        spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
        if spoken[0] != "user" or any(first == second for first, second in pairwise(spoken)):
            return (
                f"let user and assistant take turns, the user first (join neighbours of one role), or {OTHER_TEMPLATE}"
            )
        return f"mend the template, or {OTHER_TEMPLATE}"

    def _accepts(self, turns: Sequence[Message]) -> bool:
        try:
            self._apply(turns)
        except TemplateFailure:
            return False
        return True

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedText]:
        """Tokenise; order is kept.

        Raises:
            RefusedTexts: The template refuses some of them, or they hold ids that have no embedding.
            ContrastRMError: A text is longer than the limit and the policy is ``error``.
        """
        encoded: list[EncodedText] = []
        refused: dict[int, str] = {}
        for start in range(0, len(conversations), ENCODE_CHUNK):
            chunk = conversations[start : start + ENCODE_CHUNK]
            found = self._encode_chats(chunk) if self.has_template else self._encode_pairs(chunk)
            for place, text in enumerate(found, start=start):
                if isinstance(text, Refusal):
                    refused[place] = text.reason
                else:
                    encoded.append(text)
        if refused:
            raise RefusedTexts(refused)
        return encoded

    def _encode_chats(self, conversations: Sequence[Conversation]) -> list[EncodedText | Refusal]:
        rendered = [self._render_or_refuse(conversation) for conversation in conversations]
        texts = [text for text in rendered if isinstance(text, str)]
        if not texts:
            return [text for text in rendered if isinstance(text, Refusal)]
        # The template has written BOS already: special tokens must not be added a second time.
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows = iter(batch["input_ids"])
        return [
            text if isinstance(text, Refusal) else self._checked(ids := next(rows)) or self._fit_chat(ids, conversation)
            for text, conversation in zip(rendered, conversations, strict=True)
        ]

    def _render_or_refuse(self, conversation: Conversation) -> str | Refusal:
        try:
            return self.render(conversation)
        except RefusedTexts as refused:
            return Refusal(str(refused))

    def _checked(self, ids: Sequence[int]) -> Refusal | None:
        """Why the model cannot take these ids; None where it can."""
        if self.n_embeddings is None or not ids or (highest := max(ids)) < self.n_embeddings:
            return None
        token = self.tokenizer.convert_ids_to_tokens(highest)
        return Refusal(
            f"the text holds the token {token!r}, whose id {highest} is beyond the model's {self.n_embeddings} embeddings; "
            "take it out of the text"
        )

    def _fit_chat(self, ids: list[int], conversation: Conversation) -> EncodedText:
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return EncodedText(tuple(ids))
        n_cut = len(ids) - limit
        if self.overlength == "left":
            bos = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
            first = len(bos) + n_cut
            answer_cut = first > self._answer_start(ids, conversation)
            return EncodedText(tuple(bos + ids[first:]), n_cut=n_cut, answer_cut=answer_cut)
        if self.overlength == "keep_end":
            closing = list(self.closing_ids)
            kept = ids[: limit - len(closing)]
            if len(kept) <= self._answer_start(ids, conversation):
                return EncodedText((), n_cut=len(ids), answer_cut=True)  # not a token of the answer is left to score
            return EncodedText(tuple(kept + closing), n_cut=n_cut, answer_cut=True)
        return self._refuse(len(ids))

    def _answer_start(self, ids: list[int], conversation: Conversation) -> int:
        """Where the answer's tokens begin: as far as the same prompt with another answer agrees."""
        other = self.render(Conversation(conversation.messages, "."))
        other_ids = self.tokenizer(other, add_special_tokens=False, verbose=False)["input_ids"]
        pairs = enumerate(zip(ids, other_ids, strict=False))
        return next((position for position, (left, right) in pairs if left != right), len(ids))

    def _encode_pairs(self, conversations: Sequence[Conversation]) -> list[EncodedText | Refusal]:
        prompts = [messages_to_text(list(conversation.messages)) for conversation in conversations]
        answers = [conversation.answer for conversation in conversations]
        batch = self.tokenizer(prompts, answers, return_attention_mask=False, verbose=False)
        types: Any = batch.get("token_type_ids")
        return [
            self._checked(ids) or self._fit_pair(ids, types[row] if types else None, batch.sequence_ids(row))
            for row, ids in enumerate(batch["input_ids"])
        ]

    def _fit_pair(self, ids: list[int], types: list[int] | None, parts: list[int | None]) -> EncodedText:
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return EncodedText(tuple(ids), tuple(types) if types else None)
        if self.overlength not in ("left", "keep_end"):
            return self._refuse(len(ids))
        n_cut = len(ids) - limit
        prompt = [position for position, part in enumerate(parts) if part == 0]
        answer = [position for position, part in enumerate(parts) if part == 1]
        # left: the oldest tokens go, the prompt's first; keep_end: the answer's last ones (the separator stays).
        candidates = prompt + answer if self.overlength == "left" else answer[::-1] + prompt[::-1]
        if n_cut >= len(candidates):
            raise ContrastRMError(f"max_length {limit} leaves no room for a single token of an answer")
        gone = set(candidates[:n_cut])
        kept = [position for position in range(len(ids)) if position not in gone]
        return EncodedText(
            tuple(ids[position] for position in kept),
            tuple(types[position] for position in kept) if types else None,
            n_cut=n_cut,
            answer_cut=any(position in gone for position in answer),
        )

    def _refuse(self, length: int) -> EncodedText:
        if self.overlength == "drop":
            return EncodedText((), n_cut=length, answer_cut=True)
        raise ContrastRMError(
            f"a text of {length} tokens is longer than max_length {self.max_length}; "
            f"raise --max_length or choose --overlength {'|'.join(OVERLENGTH_POLICIES[:-1])}"
        )

    def _closing_ids(self) -> tuple[int, ...]:
        """The tokens that close an assistant turn: what two different answers have in common at their end."""
        pair = [
            self.tokenizer(
                self.render(Conversation([{"role": "user", "content": "Q"}], answer)), add_special_tokens=False
            )["input_ids"]
            for answer in ("one 7", "A dog!")
        ]
        common: list[int] = []
        for left, right in zip(reversed(pair[0]), reversed(pair[1]), strict=False):
            if left != right:
                break
            common.insert(0, left)
        return tuple(common)


class TemplateFailure(Exception):
    """What a chat template raised; never leaves this module."""


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def take_template(tokenizer: PreTrainedTokenizerBase, wanted: str = "") -> None:
    """Leave a tokenizer with the one template that conversations are rendered with, so that it is saved with the model.

    Args:
        wanted: One of the tokenizer's own templates by name, a name of ``KNOWN_TEMPLATES``, or a Jinja file; empty: its own.

    Raises:
        ContrastRMError: No such template, or several of its own without a ``default``.
    """
    own: Any = tokenizer.chat_template
    named: Mapping[str, str] = own if isinstance(own, dict) else {}
    if wanted in named:
        tokenizer.chat_template = named[wanted]
    elif wanted in KNOWN_TEMPLATES:
        bos = tokenizer.bos_token_id
        begins_with_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos else "") + KNOWN_TEMPLATES[wanted]
    elif wanted:
        tokenizer.chat_template = _read_template(wanted, [*named, *KNOWN_TEMPLATES])
    elif named:
        if "default" not in named:
            raise ContrastRMError(
                "the tokenizer has several chat templates and no default: choose one with --chat_template "
                f"({', '.join(sorted(named))})"
            )
        tokenizer.chat_template = named["default"]


def _read_template(file: str, names: Sequence[str]) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ContrastRMError(f"--chat_template {file}: no such file; known names: {', '.join(names)}")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContrastRMError(f"cannot read --chat_template {file}: {error}; give a Jinja file in UTF-8") from error
    if not template.strip():
        raise ContrastRMError(f"--chat_template {file} is empty; give a Jinja file, or one of {', '.join(names)}")
    return template


def last_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that can stand last in a conversation by construction of the template (or of the text pair).

    Empty where the template closes a turn with nothing: then any token can.
    """
    formatter = ChatFormatter(tokenizer)
    if formatter.has_template:
        return set(formatter.closing_ids[-1:])
    probe = formatter.encode([Conversation([{"role": "user", "content": "Q"}], "A")])[0]
    return {probe.input_ids[-1]}
