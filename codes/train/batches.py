"""Micro-batches: the groups of an optimizer step, shared out over ranks under a token budget, and made tensors of.

Which groups make up which step is decided once, from the seed, the same on every rank: so the global number of groups in a step
is known everywhere, and neither accumulation nor packing nor world size changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import Pack, balance, build_pack, shared_tokens
from codes.common.scoring import collate_texts
from codes.train.data_utils import Group


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the groups that one rank computes at once, and their weights: 0 marks a group that only fills a place."""

    groups: tuple[int, ...]
    weights: tuple[float, ...]


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


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """What every optimizer step computes, and how it is cut into micro-batches: the same on every rank.

    Attributes:
        groups: All groups that the steps name.
        steps: Indices of the groups of every step.
        costs: ``(K,)`` computed tokens of every group, by ``packing``.
        n_tokens: ``(K,)`` tokens of every group's texts.
        packing: ``shared``, ``packed`` or ``off``.
        pad_id: Fills padded rows.
        max_tokens: Computed tokens of a micro-batch. A heavier group is computed alone.
        micro_batch_size: Most groups of a micro-batch; 0: no such limit.
        steps_per_epoch: Steps of a whole epoch.
    """

    groups: Sequence[Group]
    steps: Sequence[Sequence[int]]
    costs: Sequence[int] | np.ndarray
    n_tokens: np.ndarray
    packing: str
    pad_id: int
    max_tokens: int
    micro_batch_size: int = 0
    world_size: int = 1
    steps_per_epoch: int = 1

    @cached_property
    def micro_steps(self) -> int:
        """Micro-batches of every step on each rank."""
        return count_micro_steps(
            self.steps,
            self.costs,
            max_tokens=self.max_tokens,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            by_length=self.packing == "off",
        )

    def micro_batches(self, step: Sequence[int], rank: int, micro_steps: int | None = None) -> list[MicroBatch]:
        """A rank's micro-batches of one step.

        Args:
            micro_steps: Other than the plan's.
        """
        return shard_step(
            step,
            self.costs,
            micro_steps=micro_steps or self.micro_steps,
            rank=rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            by_length=self.packing == "off",
        )

    def tokens_of(self, step: Sequence[int]) -> int:
        """Tokens of the texts of a step's groups."""
        return int(self.n_tokens[np.asarray(step)].sum())

    def score(
        self, model: Callable[..., torch.Tensor], batch: MicroBatch, device: torch.device
    ) -> tuple[list[Group], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute a micro-batch.

        Returns:
            Its groups; their scores ``(N,)`` in the order of ``collate_groups``, on the device; group sizes ``(G,)`` int64 on
            the CPU; weights ``(G,)`` float32 on the device.
        """
        groups = [self.groups[index] for index in batch.groups]
        if self.packing == "off":
            inputs, group_sizes, weights = collate_groups(groups, batch.weights, self.pad_id)
            scores = model(**{key: value.to(device, non_blocking=True) for key, value in inputs.items()})
        else:
            pack = pack_groups(groups, share=self.packing == "shared", on_gpu=device.type == "cuda").to(device)
            group_sizes, weights = group_tensors(groups, batch.weights)
            scores = model(pack.input_ids, layout=pack.layout, ends=pack.ends)
        return groups, scores, group_sizes, weights.to(device, non_blocking=True)
