"""Whether a token budget fits: the heaviest micro-batch of the plan is computed forward and backward before training starts.

An estimate (``codes.train.memory``) does not know the temporaries of a backward pass, nor what a kernel asks for. Used by
``python -m codes.train.train_reward_model`` where ``--max_tokens_per_batch`` is 0, on a GPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from codes.common.borrow import borrowed
from codes.common.scoring import is_out_of_memory
from codes.train.batches import MicroBatch, count_micro_steps, shard_step
from codes.train.draws import Draws
from codes.train.engine import autocast_dtype, under_deepspeed
from codes.train.memory import LEAST_TOKENS, device_bytes, nothing_fits, training_state_bytes
from codes.train.objective import Objective
from codes.train.reward_model import RewardModel
from codes.train.trainer import forward_batch

# More than ``memory.PLANNED_SHARE``: what was measured has its temporaries in it; the rest is for fragmentation and for the
# buffers of the engine.
TRIED_SHARE = 0.9


def try_token_budget(
    model: RewardModel,
    draws: Draws,
    device: torch.device,
    *,
    budget: int,
    precision: str,
    world_size: int,
    packing: str,
    micro_batch_size: int,
    objective: Objective,
    pad_id: int,
    memory: int | None = None,
) -> int:
    """The budget, or a smaller one, under which the heaviest micro-batch of the plan fits beside the training state.

    Nothing here is collective: each rank tries for itself, all of them the same micro-batch. A model whose whole weights take
    more than the training state will (ZeRO-3 over many devices) is not tried: it would fail here and fit there. A budget is
    never raised. On a CPU no peak is known, so that only running out of memory lowers it there.

    Args:
        model: Not yet prepared, as it will be trained (with its checkpointing switched on). Left as it was.
        memory: Bytes of the device; None: what it says.

    Raises:
        ContrastRMError: Not even a few hundred tokens fit, or a group alone does not.
    """
    memory = device_bytes(device) if memory is None else memory
    states = training_state_bytes(model, precision=precision, world_size=world_size)
    # DeepSpeed casts the weights itself.
    dtype = torch.float16 if precision == "fp16" and under_deepspeed() else None
    weights = (one.numel() * (dtype.itemsize if dtype else one.element_size()) for one in model.parameters())
    if sum(weights) > states:
        return budget
    room = max(0.0, TRIED_SHARE * memory - states)
    if precision == "fp16" and dtype is None and world_size == 1:
        # Autocast's copies of the weights are in these states, and in what is measured too.
        room += 2 * sum(one.numel() for one in model.parameters() if one.requires_grad)
    while True:
        batch, n_tokens = heaviest_batch(
            draws, packing=packing, max_tokens=budget, micro_batch_size=micro_batch_size, world_size=world_size
        )
        peak = _peak_bytes(
            model,
            draws,
            batch,
            device,
            dtype,
            precision=precision,
            packing=packing,
            objective=objective,
            pad_id=pad_id,
        )
        if peak <= room:
            return budget
        # The heaviest micro-batch may be far below the budget: the next plan must be another one.
        budget = lower_budget(min(budget, n_tokens), peak, room)
        if budget < LEAST_TOKENS or len(batch.groups) == 1:
            what = f"{len(batch.groups)} group(s) of {n_tokens} tokens that were tried do not fit beside it"
            raise nothing_fits(states, memory, device, what)


def lower_budget(n_tokens: int, peak: float, room: float) -> int:
    """What to try after ``n_tokens`` took ``peak`` bytes instead of ``room``; infinite: they ran out of memory."""
    return n_tokens // 2 if math.isinf(peak) else int(n_tokens * room / peak)


def heaviest_batch(
    draws: Draws, *, packing: str, max_tokens: int, micro_batch_size: int, world_size: int
) -> tuple[MicroBatch, int]:
    """The micro-batch, of all ranks' and all steps', that computes most tokens (padded ones included), and their number."""
    costs, by_length = draws.costs(packing), packing == "off"
    n_batches = world_size * count_micro_steps(
        draws.plan,
        costs,
        max_tokens=max_tokens,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        by_length=by_length,
    )

    def computed(batch: MicroBatch) -> int:
        groups = np.array(batch.groups)
        if by_length:
            return int(draws.n_texts[groups].sum()) * int(draws.longest[groups].max())
        return int(costs[groups].sum())

    if by_length or micro_batch_size:
        bounds = np.full(len(draws.plan), np.inf)
    else:
        # Packs are filled lightest first: none exceeds the mean by as much as the heaviest group.
        drawn = (costs[step.start : step.stop] for step in draws.plan)
        bounds = np.array([mine.sum() / n_batches + mine.max() for mine in drawn])
    heaviest, most = MicroBatch((), ()), 0
    for place in np.argsort(-bounds, kind="stable"):
        if bounds[place] <= most:
            break
        # One rank with all the micro-batches of a step: the ranks share the same ones out.
        batches = shard_step(
            draws.plan[place],
            costs,
            micro_steps=n_batches,
            rank=0,
            world_size=1,
            micro_batch_size=micro_batch_size,
            by_length=by_length,
        )
        for batch in batches:
            if computed(batch) > most:
                heaviest, most = batch, computed(batch)
    return heaviest, most


def _peak_bytes(
    model: RewardModel,
    draws: Draws,
    batch: MicroBatch,
    device: torch.device,
    dtype: torch.dtype | None,
    **options: Any,
) -> float:
    """Bytes beside the training state that a forward and backward pass takes at its peak.

    Args:
        dtype: Of the weights while they are tried; None: their own.
        options: As of ``_compute``.

    Returns:
        Infinite where it ran out of memory; else 0 on a CPU, which does not tell.
    """
    try:
        with _in_training(model, device, dtype):
            peak = _compute(model, draws, batch, device, **options)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak = math.inf
    # Outside of the except clause: there the traceback still holds the failed pass's memory.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return peak


def _compute(
    model: RewardModel,
    draws: Draws,
    batch: MicroBatch,
    device: torch.device,
    *,
    precision: str,
    packing: str,
    objective: Objective,
    pad_id: int,
) -> float:
    """One micro-batch as ``Trainer.train_step`` computes it; the peak beside what was there before, 0 on a CPU."""
    on_gpu = device.type == "cuda"
    cast = autocast_dtype(model, precision)
    forward = torch.autocast(device.type, cast, enabled=cast is not None)(model.forward)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    _, losses, weights, _ = forward_batch(
        forward, draws, batch, objective=objective, packing=packing, pad_id=pad_id, device=device
    )
    (losses * weights).sum().backward()
    # An error of a kernel that is still running belongs to this trial.
    if on_gpu:
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before if on_gpu else 0.0


@contextmanager
def _in_training(model: RewardModel, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """The model on the device and in training mode; afterwards it is as it was, and so are the random numbers.

    Gradients are dropped as they are made: the training state that they belong to is counted without being here.
    """

    def drop(weight: torch.Tensor) -> None:
        weight.grad = None

    hooks: list[Any] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), borrowed(model, device, dtype):
        try:
            hooks += [one.register_post_accumulate_grad_hook(drop) for one in model.parameters() if one.requires_grad]
            model.train()
            yield
        finally:
            for hook in hooks:
                hook.remove()
            # A pass that failed may have left some.
            for weight in model.parameters():
                weight.grad = None
