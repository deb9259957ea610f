"""Whole groups: one prompt's rejected answers followed by its chosen one, tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codes.common.chat import ChatFormatter, Conversation, EncodedText, RefusedTexts
from codes.common.errors import ContrastRMError
from codes.common.records import PreferenceRecord
from codes.train.settings import NEGATIVES


@dataclass(frozen=True)
class Group:
    """One training group: ``texts`` are ``[rejected_1 ... rejected_n, chosen]``.

    Attributes:
        bias_types: Parallel to the rejected.
        margins: Parallel to the rejected; None where the record says nothing. Empty where it says nothing at all.
    """

    record_id: str
    texts: tuple[EncodedText, ...]
    bias_types: tuple[str | None, ...]
    margins: tuple[float | None, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(len(text.input_ids) for text in self.texts)


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records.

    ``n_records`` = ``n_groups`` + ``n_dropped_groups`` + ``n_equal_groups`` + ``n_without_negatives``.

    Attributes:
        n_equal_groups: Records of which no rejected answer is left that the model can tell from the chosen one.
        n_equal_texts: Rejected answers that are the chosen one's tokens once they are rendered and cut, of whatever record.
        n_texts: Texts of the groups.
        n_dropped_texts: Over-long texts that the policy dropped, of whatever record.
        n_truncated_texts, n_answer_cut: Texts of the groups that were cut, and those whose answer was.
        n_tokens: Tokens of the groups' texts.
    """

    n_records: int = 0
    n_groups: int = 0
    n_dropped_groups: int = 0
    n_equal_groups: int = 0
    n_without_negatives: int = 0
    n_texts: int = 0
    n_dropped_texts: int = 0
    n_equal_texts: int = 0
    n_truncated_texts: int = 0
    n_answer_cut: int = 0
    n_tokens: int = 0

    def __add__(self, other: EncodeReport) -> EncodeReport:
        return EncodeReport(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class EncodedRecord:
    """A record after tokenisation.

    Attributes:
        texts: All its texts, dropped ones too.
        group: None where the record trains nothing: without a rejected answer, too long, or refused.
        refusal: Why it cannot become what the model takes: a bad row, which the report does not count.
    """

    texts: tuple[EncodedText, ...]
    group: Group | None
    refusal: str | None = None

    @property
    def equal(self) -> list[int]:
        """Places of the rejected answers that are the chosen one to the model."""
        chosen = self.texts[-1]
        return [place for place, text in enumerate(self.texts[:-1]) if text == chosen and not text.dropped]

    def report(self) -> EncodeReport:
        """The counts of this one record."""
        group = self.group
        kept = () if group is None else group.texts
        without = len(self.texts) < 2
        return EncodeReport(
            n_records=1,
            n_groups=int(group is not None),
            n_dropped_groups=int(group is None and not without and not self.equal),
            n_equal_groups=int(group is None and bool(self.equal)),
            n_without_negatives=int(without),
            n_texts=len(kept),
            n_dropped_texts=sum(text.dropped for text in self.texts),
            n_equal_texts=len(self.equal),
            n_truncated_texts=sum(text.n_cut > 0 for text in kept),
            n_answer_cut=sum(text.answer_cut for text in kept),
            n_tokens=sum(len(text.input_ids) for text in kept),
        )


def select_negatives(record: PreferenceRecord, negatives: str) -> list[int]:
    """Positions of the rejected answers that training sees.

    Args:
        negatives: ``all``, or ``original``: only answers into which no bias was injected.
    """
    if negatives not in NEGATIVES:
        raise ContrastRMError(f"unknown choice of negatives {negatives!r}; known: {', '.join(NEGATIVES)}")
    return [position for position, bias in enumerate(record.bias_type) if negatives == "all" or bias is None]


def encode_records(
    records: Sequence[PreferenceRecord], formatter: ChatFormatter, *, negatives: str = "all"
) -> list[EncodedRecord]:
    """Tokenise records, one result each.

    A rejected answer that the over-length policy drops, or that has become the chosen one (a template that trims, a cut that
    takes what told them apart), leaves its group; a record whose chosen answer or whose every rejected one is gone has none.
    One without a rejected answer to train on is not tokenised but for its chosen text.
    """
    for record in records:
        if record.chosen_variants:
            raise ContrastRMError(
                f"record {record.id!r} has chosen_variants: training sets one chosen answer against the rejected ones and would "
                "leave them out; remove the key, or make each variant a record of its own"
            )
    positions = [select_negatives(record, negatives) for record in records]
    conversations = [
        Conversation(record.messages, answer)
        for record, chosen_positions in zip(records, positions, strict=True)
        for answer in [*(record.rejected[position] for position in chosen_positions), record.chosen]
    ]
    owners = [number for number, some in enumerate(positions) for _ in range(len(some) + 1)]
    refused: dict[int, str] = {}
    try:
        encoded = iter(formatter.encode(conversations))
    except RefusedTexts as refusal:
        for place, reason in refusal.reasons.items():
            refused.setdefault(owners[place], reason)
        good = [text for text, owner in zip(conversations, owners, strict=True) if owner not in refused]
        encoded = iter(formatter.encode(good))
    found = []
    for number, (record, chosen_positions) in enumerate(zip(records, positions, strict=True)):
        if number in refused:
            found.append(EncodedRecord((), None, refused[number]))
            continue
        texts = tuple(next(encoded) for _ in range(len(chosen_positions) + 1))
        kept = [place for place, text in enumerate(texts[:-1]) if not text.dropped and text != texts[-1]]
        group = None
        if kept and not texts[-1].dropped:
            left = [chosen_positions[place] for place in kept]
            margins = tuple(record.margins[position] for position in left) if record.margins else ()
            group = Group(
                record.id,
                (*(texts[place] for place in kept), texts[-1]),
                tuple(record.bias_type[position] for position in left),
                margins if any(margin is not None for margin in margins) else (),
            )
        found.append(EncodedRecord(texts, group))
    return found


def encode_groups(
    records: Sequence[PreferenceRecord], formatter: ChatFormatter, *, negatives: str = "all"
) -> tuple[list[Group], EncodeReport]:
    """Tokenise records into groups that are held in memory; what is left out is counted.

    Raises:
        ContrastRMError: No group is left, or a record is refused.
    """
    encoded = encode_records(records, formatter, negatives=negatives)
    for record, one in zip(records, encoded, strict=True):
        if one.refusal is not None:
            raise ContrastRMError(f"{record.place or record.id}: {one.refusal}")
    report = sum((one.report() for one in encoded), EncodeReport())
    check_groups_left(report)
    return [one.group for one in encoded if one.group is not None], report


def check_groups_left(report: EncodeReport) -> None:
    """Raise a ``ContrastRMError`` where nothing is left to train on."""
    if not report.n_groups:
        raise ContrastRMError(
            f"no training group is left of {report.n_records} records ({report.n_dropped_groups} too long, "
            f"{report.n_equal_groups} whose rejected answers are the chosen one once they are rendered and cut, "
            f"{report.n_without_negatives} without a rejected answer to train on); raise --max_length, change "
            "--overlength or --chat_template, or check --negatives"
        )
