"""How many tokens fit into a device's memory while training.

What a forward pass keeps for its backward pass is measured on the model itself, before it is moved or split; what weights,
gradients and optimizer hold follows from the engine. On a GPU ``codes.train.trial`` tries what is estimated here before training
starts. The heaviest micro-batch of a step is computed first, so that a budget that was set too high shows at the first step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from codes.common.cli import launched_processes
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import build_pack
from codes.common.scoring import default_token_budget
from codes.train.reward_model import RewardModel

PROBE_TOKENS = 64
# The share of a device that is planned with; the rest is for temporaries of the backward pass and for fragmentation.
PLANNED_SHARE = 0.75
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


def zero_config() -> dict[str, Any] | None:
    """``zero_optimization`` of the launcher's DeepSpeed configuration; None without DeepSpeed.

    Raises:
        ContrastRMError: It cannot be read, or sets what the flags set.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if file and Path(file).is_file():
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ContrastRMError(f"cannot read the DeepSpeed configuration {file}: {error}") from error
        found = config.get("zero_optimization", {}) if isinstance(config, dict) else None
        if not isinstance(found, dict):
            raise ContrastRMError(f"{file} is no DeepSpeed configuration: start from configs/ds_z3_config.json")
        if doubled := [name for name in ("optimizer", "scheduler") if name in config]:
            raise ContrastRMError(
                f"{file} sets {' and '.join(doubled)}, which the flags set here (--learning_rate, --weight_decay, "
                "--warmup_steps): take these sections out"
            )
        return found
    return {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}


def zero_stage() -> int | None:
    """The stage of the launcher's DeepSpeed configuration; None without DeepSpeed."""
    config = zero_config()
    return None if config is None else int(config.get("stage", 0))


def offloaded() -> set[str]:
    """What the launcher's DeepSpeed configuration keeps in the host's memory: ``optimizer``, ``param``."""
    config = zero_config() or {}
    wanted = {kind: config.get(f"offload_{kind}") or {} for kind in ("optimizer", "param")}
    return {kind for kind, settings in wanted.items() if settings.get("device", "none") != "none"}


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
