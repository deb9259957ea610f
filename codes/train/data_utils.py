"""Whole groups: encoding, the plan of an epoch, micro-batches under a token budget, and the collator.

A group is one prompt's rejected answers followed by its chosen one. Which groups make up which optimizer step is decided
once, from the seed, the same on every rank: so the global number of groups in a step is known everywhere, and neither
accumulation nor packing nor world size changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import Pack, balance, build_pack, shared_tokens
from codes.common.records import PreferenceRecord
from codes.common.scoring import collate_texts

NEGATIVES = ("all", "original")


@dataclass(frozen=True)
class Group:
    """One training group: ``texts`` are ``[rejected_1 ... rejected_n, chosen]``; ``bias_types`` is parallel to the rejected."""

    record_id: str
    texts: tuple[EncodedText, ...]
    bias_types: tuple[str | None, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(len(text.input_ids) for text in self.texts)


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records: ``n_records`` = ``n_groups`` + ``n_dropped_groups`` + ``n_without_negatives``."""

    n_records: int
    n_groups: int
    n_dropped_groups: int
    n_without_negatives: int
    n_texts: int
    n_dropped_texts: int
    n_truncated_texts: int
    n_answer_cut: int
    n_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the groups that one rank computes at once, and their weights: 0 marks a group that only fills a place."""

    groups: tuple[int, ...]
    weights: tuple[float, ...]


def select_negatives(record: PreferenceRecord, negatives: str) -> list[tuple[str, str | None]]:
    """(text, bias) of the rejected answers that training sees.

    Args:
        negatives: ``all``, or ``original``: only answers into which no bias was injected.
    """
    if negatives not in NEGATIVES:
        raise ContrastRMError(f"unknown choice of negatives {negatives!r}; known: {', '.join(NEGATIVES)}")
    pairs = list(zip(record.rejected, record.bias_type, strict=True))
    return pairs if negatives == "all" else [(text, bias) for text, bias in pairs if bias is None]


def encode_groups(
    records: Sequence[PreferenceRecord], formatter: ChatFormatter, *, negatives: str = "all"
) -> tuple[list[Group], EncodeReport]:
    """Tokenise records into groups.

    A rejected answer that the over-length policy drops leaves its group; a group without its chosen answer or without any
    rejected one is dropped. All of it is counted.

    Raises:
        ContrastRMError: No group is left.
    """
    chosen_negatives = [select_negatives(record, negatives) for record in records]
    conversations = [
        Conversation(record.messages, answer)
        for record, rejected in zip(records, chosen_negatives, strict=True)
        for answer in [*(text for text, _ in rejected), record.chosen]
    ]
    encoded = iter(formatter.encode(conversations))
    groups: list[Group] = []
    n_without = n_dropped_groups = n_dropped_texts = 0
    for record, rejected in zip(records, chosen_negatives, strict=True):
        texts = [next(encoded) for _ in range(len(rejected) + 1)]
        n_dropped_texts += sum(text.dropped for text in texts)
        kept = [(text, bias) for text, (_, bias) in zip(texts[:-1], rejected, strict=True) if not text.dropped]
        if not rejected:
            n_without += 1
        elif texts[-1].dropped or not kept:
            n_dropped_groups += 1
        else:
            group_texts = (*(text for text, _ in kept), texts[-1])
            groups.append(Group(record.id, group_texts, tuple(bias for _, bias in kept)))
    if not groups:
        raise ContrastRMError(
            f"no training group is left of {len(records)} records ({n_dropped_groups} too long, {n_without} without a "
            "rejected answer to train on); raise --max_length, change --overlength, or check --negatives"
        )
    return groups, EncodeReport(
        n_records=len(records),
        n_groups=len(groups),
        n_dropped_groups=n_dropped_groups,
        n_without_negatives=n_without,
        n_texts=sum(len(group.texts) for group in groups),
        n_dropped_texts=n_dropped_texts,
        n_truncated_texts=sum(text.n_cut > 0 for group in groups for text in group.texts),
        n_answer_cut=sum(text.answer_cut for group in groups for text in group.texts),
        n_tokens=sum(group.n_tokens for group in groups),
    )


def plan_epoch(n_groups: int, global_batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The groups of each optimizer step of one epoch, from the seed alone. The last step may be smaller; none is left out."""
    order = np.random.default_rng([seed, epoch]).permutation(n_groups).tolist()
    return [order[start : start + global_batch_size] for start in range(0, n_groups, global_batch_size)]


def group_costs(groups: Sequence[Group], packing: str) -> list[int]:
    """Tokens that the model computes for each group: its prefix tree, its plain sum, or its padded rows."""
    if packing == "shared":
        return [shared_tokens(text.input_ids for text in group.texts) for group in groups]
    if packing == "packed":
        return [group.n_tokens for group in groups]
    return [len(group.texts) * max(len(text.input_ids) for text in group.texts) for group in groups]


def count_micro_steps(
    steps: Sequence[Sequence[int]],
    costs: Sequence[int],
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
        costs: Computed tokens of every group.
        max_tokens: Computed tokens of a micro-batch. A heavier group is computed alone.
        micro_batch_size: Most groups of a micro-batch; 0: no such limit.
        by_length: As in ``shard_step``.
    """
    if by_length:
        # A padded micro-batch is as wide as its longest row: count with the heaviest group.
        fit = max(1, max_tokens // max(costs))
        micro_batch_size = min(micro_batch_size or fit, fit)
        return max(-(-len(step) // (micro_batch_size * world_size)) for step in steps)
    micro_steps = 1
    for step in steps:
        while not _fits(step, costs, micro_steps * world_size, max_tokens, micro_batch_size):
            micro_steps += 1
    return micro_steps


def _fits(step: Sequence[int], costs: Sequence[int], n_batches: int, max_tokens: int, micro_batch_size: int) -> bool:
    if n_batches >= len(step):
        return True
    if micro_batch_size and len(step) > n_batches * micro_batch_size:
        return False
    mine = [costs[index] for index in step]
    # The cheap test first: it decides nearly always.
    if sum(mine) > n_batches * max_tokens and max(mine) <= max_tokens:
        return False
    return all(
        (sum(mine[item] for item in items) <= max_tokens or len(items) == 1)
        and (not micro_batch_size or len(items) <= micro_batch_size)
        for items in balance(mine, n_batches, micro_batch_size)
    )


def shard_step(
    step: Sequence[int],
    costs: Sequence[int],
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
    if by_length:
        order = sorted(range(len(step)), key=lambda item: (-costs[step[item]], step[item]))
        size = -(-len(order) // n_batches)
        bins = [order[start : start + size] for start in range(0, n_batches * size, size)]
    else:
        bins = balance([costs[index] for index in step], n_batches, micro_batch_size)
    bins.sort(key=lambda items: (-sum(costs[step[item]] for item in items), items))
    filler = MicroBatch((min(step, key=lambda index: (costs[index], index)),), (0.0,))
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
