"""Mean and standard deviation of a trained model's raw scores, for whoever wants to scale them.

Used by ``python -m codes.train.train_reward_model`` (``--reward_stats_groups``); written into ``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from codes.train.batches import count_micro_steps, score_batch, shard_step
from codes.train.data_utils import Group


@dataclass(frozen=True)
class RewardStats:
    """Of the raw scores of ``n`` texts; ``std`` with n - 1."""

    mean: float
    std: float
    n: int


def reward_statistics(
    accelerator: Accelerator,
    model: torch.nn.Module,
    groups: Sequence[Group],
    chosen: Sequence[int],
    costs: Sequence[int] | np.ndarray,
    *,
    packing: str,
    max_tokens_per_batch: int,
    pad_id: int,
) -> RewardStats | None:
    """Score all texts of some groups with the model as it stands. Collective: every rank takes part.

    Args:
        chosen: Indices of the groups.
        costs: Computed tokens of every group.

    Returns:
        None where no group was chosen.
    """
    if not chosen:
        return None
    world_size = accelerator.num_processes
    micro_steps = count_micro_steps(
        [list(chosen)],
        costs,
        max_tokens=max_tokens_per_batch,
        micro_batch_size=0,
        world_size=world_size,
        by_length=packing == "off",
    )
    batches = shard_step(
        list(chosen),
        costs,
        micro_batch_size=0,
        micro_steps=micro_steps,
        rank=accelerator.process_index,
        world_size=world_size,
        by_length=packing == "off",
    )
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            mine = [groups[index] for index in batch.groups]
            scores, sizes, weights = score_batch(
                model, mine, batch.weights, packing=packing, pad_id=pad_id, device=accelerator.device
            )
            # A group that only fills a place counts nothing.
            counts = torch.repeat_interleave(weights, sizes.to(weights.device)).double()
            values = scores.double()
            sums += torch.stack([counts.sum(), (counts * values).sum(), (counts * values.square()).sum()])
    model.train(was_training)
    n, total, squares = accelerator.reduce(sums, reduction="sum").tolist()
    mean = total / n
    variance = max(0.0, squares - n * mean * mean) / max(1.0, n - 1)
    return RewardStats(mean=mean, std=math.sqrt(variance), n=round(n))
