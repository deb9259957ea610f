"""Whole groups: encoding, the plan of an epoch, micro-batches under a token budget, and the collator.

A group is one prompt's rejected answers followed by its chosen one. Which groups make up which optimizer step is decided
once, from the seed, the same on every rank: so the global number of groups in a step is known everywhere, and neither
accumulation nor packing nor world size changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from codes.common.chat import ChatFormatter, Conversation, EncodedText, RefusedTexts
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import Pack, balance, build_pack, shared_tokens
from codes.common.records import PreferenceRecord
from codes.common.scoring import collate_texts

NEGATIVES = ("all", "original")


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


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the groups that one rank computes at once, and their weights: 0 marks a group that only fills a place."""

    groups: tuple[int, ...]
    weights: tuple[float, ...]


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


def group_costs(groups: Sequence[Group], packing: str) -> list[int]:
    """Tokens that the model computes for each group: its prefix tree, its plain sum, or its padded rows."""
    if packing == "shared":
        return [shared_tokens(text.input_ids for text in group.texts) for group in groups]
    if packing == "packed":
        return [group.n_tokens for group in groups]
    return [len(group.texts) * max(len(text.input_ids) for text in group.texts) for group in groups]


def count_micro_steps(
    steps: Sequence[Sequence[int]],
    costs: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    world_size: int,
    micro_batch_size: int = 0,
    by_length: bool = False,
) -> int:
    """Micro-steps that every optimizer step of a run takes: the fewest with which no micro-batch breaks its limits.

    The number is the same for all steps: accumulation is fixed once (DeepSpeed needs that), and ``shard_step`` then makes
    the micro-batches of a step equally heavy instead of full.

    Args:
        steps: Groups of every step.
        costs: Computed tokens of every group; an array where there are many.
        max_tokens: Computed tokens of a micro-batch. A heavier group is computed alone.
        micro_batch_size: Most groups of a micro-batch; 0: no such limit.
        by_length: As in ``shard_step``.
    """
    costs = np.asarray(costs, dtype=np.int64)
    sizes = np.array([len(step) for step in steps])
    if by_length:
        # A padded micro-batch is as wide as its longest row: count with the heaviest group.
        fit = max(1, max_tokens // int(costs.max()))
        micro_batch_size = min(micro_batch_size or fit, fit)
        return -(-int(sizes.max()) // (micro_batch_size * world_size))
    sums, heaviest = np.array([(mine.sum(), mine.max()) for mine in (costs[_places(step)] for step in steps)]).T
    micro_steps = 1
    left = np.arange(len(steps))
    while left.size:
        n_batches = micro_steps * world_size
        if not micro_batch_size:
            # Always into the lightest bin: no bin exceeds the mean by as much as the heaviest item. Decides nearly always.
            left = left[sums[left] + (n_batches - 1) * heaviest[left] > n_batches * max_tokens]
        # A step that does not fit needs more micro-steps, and then the ones before it still fit.
        while left.size and _fits(costs[_places(steps[left[0]])].tolist(), n_batches, max_tokens, micro_batch_size):
            left = left[1:]
        micro_steps += bool(left.size)
    return micro_steps


def _places(step: Sequence[int]) -> Any:
    return slice(step.start, step.stop) if isinstance(step, range) else list(step)


def _fits(mine: Sequence[int], n_batches: int, max_tokens: int, micro_batch_size: int) -> bool:
    """Whether groups of these costs go into so many micro-batches."""
    if n_batches >= len(mine):
        return True
    if micro_batch_size and len(mine) > n_batches * micro_batch_size:
        return False
    # The cheap test first: it decides nearly always.
    if sum(mine) > n_batches * max_tokens and max(mine) <= max_tokens:
        return False
    return all(
        sum(mine[item] for item in items) <= max_tokens or len(items) == 1
        for items in balance(mine, n_batches, micro_batch_size)
    )


def shard_step(
    step: Sequence[int],
    costs: Sequence[int] | np.ndarray,
    *,
    micro_steps: int,
    rank: int,
    world_size: int,
    micro_batch_size: int = 0,
    by_length: bool = False,
) -> list[MicroBatch]:
    """This rank's micro-batches of one step.

    The step's groups are spread so that all micro-batches are about equally heavy, those of one micro-step most alike: no rank
    waits for another. Sums do not care about order. Every rank gets exactly ``micro_steps`` micro-batches (ZeRO-3 gathers
    weights in each of them, on all ranks): one without groups computes the lightest group of the step at weight 0.

    Args:
        step: Indices of the step's groups.
        costs: Computed tokens of every group of the data set.
        micro_batch_size: Most groups of a micro-batch; 0: no such limit.
        by_length: Put groups of similar cost together instead, for padded rows.

    Raises:
        ValueError: The step does not fit into the micro-batches.
    """
    n_batches = micro_steps * world_size
    if micro_batch_size and len(step) > micro_batch_size * n_batches:
        raise ValueError("a step holds more groups than its micro-batches")
    mine = [int(costs[index]) for index in step]
    if by_length:
        order = sorted(range(len(step)), key=lambda item: (-mine[item], step[item]))
        size = -(-len(order) // n_batches)
        bins = [order[start : start + size] for start in range(0, n_batches * size, size)]
    else:
        bins = balance(mine, n_batches, micro_batch_size)
    bins.sort(key=lambda items: (-sum(mine[item] for item in items), items))
    filler = MicroBatch((step[min(range(len(step)), key=lambda item: (mine[item], step[item]))],), (0.0,))
    return [
        MicroBatch(tuple(step[item] for item in items), (1.0,) * len(items)) if items else filler
        for items in bins[rank::world_size]
    ]


def pack_groups(groups: Sequence[Group], *, share: bool, on_gpu: bool) -> Pack:
    """Whole groups as one pack; its scores come in the order of ``collate_groups``."""
    texts = [text.input_ids for group in groups for text in group.texts]
    return build_pack(texts, share=share, multiple_of=FLEX_BLOCK if on_gpu else 1)


def group_tensors(groups: Sequence[Group], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """``group_sizes`` ``(G,)`` int64 and ``weights`` ``(G,)`` float32 of groups that are computed together."""
    group_sizes = torch.tensor([len(group.texts) for group in groups], dtype=torch.long)
    return group_sizes, torch.tensor(weights, dtype=torch.float32)


def collate_groups(
    groups: Sequence[Group], weights: Sequence[float], pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Flat rows of whole groups, padded right.

    Returns:
        The model's inputs (``input_ids``, ``attention_mask``: ``(N, L)``), ``group_sizes`` ``(G,)`` int64 and ``weights``
        ``(G,)`` float32. Within a group the rejected rows come first and the chosen one last.

    Example: a group with rejected (5, 6) and (7,) and chosen (8, 9), and a group with rejected (4,) and chosen (3,), pad 0 ->
    input_ids [[5, 6], [7, 0], [8, 9], [4, 0], [3, 0]], group_sizes [3, 2].
    """
    rows = [text for group in groups for text in group.texts]
    return collate_texts(rows, pad_id), *group_tensors(groups, weights)
