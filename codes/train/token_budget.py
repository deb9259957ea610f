"""How many tokens a micro-batch may compute on a device: estimated, and on a GPU tried before training starts.

What a forward pass keeps for its backward pass is measured on the model itself, before it is moved or split; what weights,
gradients and optimizer hold follows from the engine. An estimate does not know the temporaries of a backward pass, nor what a
kernel asks for: on a GPU the heaviest micro-batch of the plan is computed forward and backward, and the budget lowered until it
fits. Used by ``python -m codes.train.train_reward_model`` where ``--max_tokens_per_batch`` is 0.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from codes.common.cli import launched_processes
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import build_pack
from codes.common.scoring import default_token_budget, is_out_of_memory
from codes.train.batches import BatchPlan, MicroBatch
from codes.train.checkpoints import recorded_budget
from codes.train.draws import Draws
from codes.train.engine import LoadedModel, autocast_dtype, offloaded, smallest_of_ranks, under_deepspeed, zero_stage
from codes.train.losses import group_losses
from codes.train.pack_probe import borrowed
from codes.train.reward_model import RewardModel
from codes.train.settings import Objective, TrainSettings

PROBE_TOKENS = 64
# The share of a device that is planned with; the rest is for temporaries of the backward pass and for fragmentation.
PLANNED_SHARE = 0.75
# More than ``PLANNED_SHARE``: what was measured has its temporaries in it; the rest is for fragmentation and for the buffers of
# the engine.
TRIED_SHARE = 0.9
# A micro-batch of fewer tokens is not worth a device.
LEAST_TOKENS = 256
# Beyond this no device gets faster.
MOST_TOKENS = 65536
# ZeRO-3 holds so many gathered parameters at a time (stage3_max_live_parameters of the shipped configuration).
ZERO3_LIVE_PARAMETERS = 1_000_000_000


def activation_bytes_per_token(
    model: RewardModel, *, gradient_checkpointing: bool, n_tokens: int = PROBE_TOKENS
) -> float:
    """Bytes that a forward pass keeps for the backward pass, per token.

    Two passes are compared, so that what does not grow with the tokens drops out. With checkpointing the layers keep their
    inputs, and one layer at a time everything.
    """
    small, large = (_kept_bytes(model, tokens) for tokens in (n_tokens, 2 * n_tokens))
    per_token = (large - small) / n_tokens
    if not gradient_checkpointing:
        return per_token
    config = model.config.get_text_config()
    width = next(model.backbone.parameters()).element_size() * config.hidden_size
    layers: int = config.num_hidden_layers
    return per_token / layers + width * layers


def _kept_bytes(model: RewardModel, n_tokens: int) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    vocabulary = model.backbone.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(n_tokens) % vocabulary).tolist()
    device = next(model.parameters()).device
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _attention_of(device, model), torch.enable_grad(), hooks:
        if model.takes_packs:
            pack = build_pack([ids], multiple_of=FLEX_BLOCK if device.type == "cuda" else 1).to(device)
            scores = model(pack.input_ids, layout=pack.layout, ends=pack.ends)
        else:
            row = torch.tensor([ids], device=device)
            scores = model(row, torch.ones_like(row))
    # Read before the graph, and with it the storages, goes away.
    total = sum(kept.values())
    del scores
    return total


@contextmanager
def _attention_of(device: torch.device, model: RewardModel) -> Iterator[None]:
    """On a CPU an attention that runs there: flash attention and the like do not, and keep as much as SDPA does."""
    config = model.backbone.config
    wanted = config._attn_implementation
    if device.type != "cpu" or model.takes_packs or wanted in ("sdpa", "eager"):
        yield
        return
    try:
        config._attn_implementation = "sdpa" if model.backbone._supports_sdpa else "eager"
        yield
    finally:
        config._attn_implementation = wanted


def state_bytes(
    n_parameters: int,
    *,
    zero_stage: int | None,
    precision: str,
    world_size: int,
    n_trained: int | None = None,
    offload: Collection[str] = (),
) -> float:
    """Bytes of weights, gradients and AdamW on one device.

    Args:
        zero_stage: 2 or 3 under DeepSpeed, else None.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        n_trained: Parameters that have gradients (LoRA); None: all.
        offload: ``optimizer`` and ``param``: what DeepSpeed keeps in the host's memory instead.
    """
    low = 4 if precision == "fp32" else 2
    trained = n_parameters if n_trained is None else n_trained
    moments = 0 if "optimizer" in offload else 12 * trained
    if zero_stage == 3:
        weights = 0 if "param" in offload else low * n_parameters
        return (weights + low * trained + moments) / world_size + low * min(n_parameters, ZERO3_LIVE_PARAMETERS)
    if zero_stage is not None:
        return low * n_parameters + (low * trained + moments) / world_size
    # float32 weights (or masters), gradients and two moments, and the low-precision weights where they are separate.
    frozen = n_parameters - trained
    separate = low if low == 2 and world_size == 1 else 0
    return trained * (16 + separate) + frozen * (2 if precision == "bf16" and world_size == 1 else 4)


def device_bytes(device: torch.device) -> int:
    """Memory of this node's smallest device, or a rank's share of the host's.

    All of it, not what is free: a resumed run must plan as the first one did.
    """
    if device.type == "cuda":
        return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or launched_processes())
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemTotal:")), 16 * 2**20)
    return kilobytes * 1024 // processes


def training_state_bytes(model: RewardModel, *, precision: str, world_size: int) -> float:
    """``state_bytes`` of a model under the launcher's engine."""
    return state_bytes(
        sum(parameter.numel() for parameter in model.parameters()),
        zero_stage=zero_stage(),
        precision=precision,
        world_size=world_size,
        n_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        offload=offloaded(),
    )


def nothing_fits(states: float, memory: float, device: torch.device, what: str) -> ContrastRMError:
    """The error of a device that has no room beside the training state; ``what`` does not fit."""
    return ContrastRMError(
        f"the training state takes {states / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB of {device}, "
        f"and {what}. Use ZeRO-3 over more devices, "
        "--lora_rank 16, --gradient_checkpointing 1, or set --max_tokens_per_batch to try all the same"
    )


def choose_token_budget(
    model: RewardModel,
    device: torch.device,
    *,
    precision: str,
    world_size: int,
    gradient_checkpointing: bool,
    memory: int | None = None,
) -> int:
    """Computed tokens of a micro-batch that fit beside the training state.

    Args:
        memory: Bytes of the device; None: what it says.

    Raises:
        ContrastRMError: Not even a few hundred fit.
    """
    states = training_state_bytes(model, precision=precision, world_size=world_size)
    per_token = activation_bytes_per_token(model, gradient_checkpointing=gradient_checkpointing)
    memory = device_bytes(device) if memory is None else memory
    room = PLANNED_SHARE * memory - states
    fits = int(room / per_token)
    if fits < LEAST_TOKENS:
        raise nothing_fits(states, memory, device, f"a token {per_token / 2**20:.1f} MiB: nothing fits beside it")
    # A CPU is not faster with more than its default.
    most = default_token_budget(device) if device.type == "cpu" else MOST_TOKENS
    return min(most, fits)


def plan_batches(
    settings: TrainSettings,
    loaded: LoadedModel,
    draws: Draws,
    accelerator: Accelerator,
    *,
    packing: str,
    checkpoint: Path | None,
    try_budget: bool | None,
) -> tuple[BatchPlan, dict[str, Any] | None]:
    """The plan of a run under the token budget that is set, recorded in the checkpoint, or chosen here. All ranks call it.

    Args:
        checkpoint: Where the run goes on.
        try_budget: Whether a budget that is chosen here is tried first; None: on a GPU (on a CPU it is a cache's size, and a
            trial takes as long as a step).

    Returns:
        The plan, and what checkpoints record of a budget that was chosen here (else None).
    """
    compute, model, precision, device = settings.compute, loaded.model, loaded.precision, accelerator.device
    budget = compute.max_tokens_per_batch or choose_token_budget(
        model,
        device,
        precision=precision,
        world_size=accelerator.num_processes,
        gradient_checkpointing=compute.gradient_checkpointing,
    )
    if compute.gradient_checkpointing:  # after the estimate, which works out what it saves
        model.gradient_checkpointing_enable()
    plan = BatchPlan(
        groups=draws,
        steps=draws.plan,
        costs=draws.costs(packing),
        n_tokens=draws.n_tokens,
        packing=packing,
        pad_id=loaded.tokenizer.pad_token_id,
        max_tokens=budget,
        micro_batch_size=compute.micro_batch_size,
        world_size=accelerator.num_processes,
        steps_per_epoch=draws.steps_per_epoch,
    )
    if compute.max_tokens_per_batch:
        return plan, None
    made_for = {
        "packing": packing,
        "micro_batch_size": compute.micro_batch_size,
        "gradient_checkpointing": compute.gradient_checkpointing,
        "attn_implementation": settings.model.attn_implementation,
        "world_size": plan.world_size,
        "device_bytes": device_bytes(device),
        "state_bytes": training_state_bytes(model, precision=precision, world_size=plan.world_size),
    }
    if recorded := recorded_budget(checkpoint, made_for):
        budget = recorded
    elif device.type == "cuda" if try_budget is None else try_budget:
        budget = try_token_budget(model, plan, draws, device, objective=settings.objective, precision=precision)
    budget = smallest_of_ranks(accelerator, budget)
    return replace(plan, max_tokens=budget), {"tokens": budget, "made_for": made_for}


def try_token_budget(
    model: RewardModel,
    plan: BatchPlan,
    draws: Draws,
    device: torch.device,
    *,
    objective: Objective,
    precision: str,
    memory: int | None = None,
) -> int:
    """The plan's budget, or a smaller one, under which its heaviest micro-batch fits beside the training state.

    Nothing here is collective: each rank tries for itself, all of them the same micro-batch. A model whose whole weights take
    more than the training state will (ZeRO-3 over many devices) is not tried: in training each device holds a part of them, so
    that running out of memory here would say nothing. A budget is never raised. On a CPU no peak is known, so that only running
    out of memory lowers it there.

    Args:
        model: Not yet prepared, as it will be trained (with its checkpointing switched on). Left as it was.
        memory: Bytes of the device; None: what it says.

    Raises:
        ContrastRMError: Not even a few hundred tokens fit, or a group alone does not.
    """
    memory = device_bytes(device) if memory is None else memory
    states = training_state_bytes(model, precision=precision, world_size=plan.world_size)
    # DeepSpeed casts the weights itself.
    dtype = torch.float16 if precision == "fp16" and under_deepspeed() else None
    weights = (one.numel() * (dtype.itemsize if dtype else one.element_size()) for one in model.parameters())
    if sum(weights) > states:
        return plan.max_tokens
    room = max(0.0, TRIED_SHARE * memory - states)
    if precision == "fp16" and dtype is None and plan.world_size == 1:
        # Autocast's copies of the weights are in these states, and in what is measured too.
        room += 2 * sum(one.numel() for one in model.parameters() if one.requires_grad)
    while True:
        batch, n_tokens = heaviest_batch(plan, draws)
        peak = _peak_bytes(model, plan, batch, device, dtype, objective=objective, precision=precision)
        if peak <= room:
            return plan.max_tokens
        # The heaviest micro-batch may be far below the budget: the next plan must be another one.
        budget = lower_budget(min(plan.max_tokens, n_tokens), peak, room)
        if budget < LEAST_TOKENS or len(batch.groups) == 1:
            what = f"{len(batch.groups)} group(s) of {n_tokens} tokens that were tried do not fit beside it"
            raise nothing_fits(states, memory, device, what)
        plan = replace(plan, max_tokens=budget)


def lower_budget(n_tokens: int, peak: float, room: float) -> int:
    """What to try after ``n_tokens`` took ``peak`` bytes instead of ``room``; infinite: they ran out of memory."""
    return n_tokens // 2 if math.isinf(peak) else int(n_tokens * room / peak)


def heaviest_batch(plan: BatchPlan, draws: Draws) -> tuple[MicroBatch, int]:
    """The micro-batch, of all ranks' and all steps', that computes most tokens (padded ones included), and their number."""
    costs, by_length = np.asarray(plan.costs), plan.packing == "off"
    # One rank with all the micro-batches of a step: the ranks share the same ones out.
    n_batches = plan.world_size * plan.micro_steps
    alone = replace(plan, world_size=1)

    def computed(batch: MicroBatch) -> int:
        groups = np.array(batch.groups)
        if by_length:
            return int(draws.n_texts[groups].sum()) * int(draws.longest[groups].max())
        return int(costs[groups].sum())

    if by_length or plan.micro_batch_size:
        bounds = np.full(len(plan.steps), np.inf)
    else:
        # Packs are filled lightest first: none exceeds the mean by as much as the heaviest group.
        drawn = (costs[np.asarray(step)] for step in plan.steps)
        bounds = np.array([mine.sum() / n_batches + mine.max() for mine in drawn])
    heaviest, most = MicroBatch((), ()), 0
    for position in np.argsort(-bounds, kind="stable"):
        if bounds[position] <= most:
            break
        for batch in alone.micro_batches(plan.steps[position], rank=0, micro_steps=n_batches):
            if computed(batch) > most:
                heaviest, most = batch, computed(batch)
    return heaviest, most


def _peak_bytes(
    model: RewardModel,
    plan: BatchPlan,
    batch: MicroBatch,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    objective: Objective,
    precision: str,
) -> float:
    """Bytes beside the training state that a forward and backward pass takes at its peak.

    Args:
        dtype: Of the weights while they are tried; None: their own.

    Returns:
        Infinite where it ran out of memory; else 0 on a CPU, which does not tell.
    """
    try:
        with _in_training(model, device, dtype):
            peak = _compute(model, plan, batch, device, objective=objective, cast=autocast_dtype(model, precision))
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
    plan: BatchPlan,
    batch: MicroBatch,
    device: torch.device,
    *,
    objective: Objective,
    cast: torch.dtype | None,
) -> float:
    """One micro-batch as ``Trainer.train_step`` computes it; the peak beside what was there before, 0 on a CPU.

    Args:
        cast: What autocast computes in; None: no autocast.
    """
    on_gpu = device.type == "cuda"
    forward = torch.autocast(device.type, cast, enabled=cast is not None)(model.forward)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    groups, scores, sizes, weights = plan.score(forward, batch, device)
    (group_losses(objective, scores.float(), sizes, groups) * weights).sum().backward()
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
