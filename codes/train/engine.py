"""How a run computes: precision, the accelerator (plain, DDP or DeepSpeed), the optimizer and its masters.

Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object

from codes.common.cli import launched_processes
from codes.common.errors import ContrastRMError
from codes.train.master_weights import MasterAdamW
from codes.train.memory import zero_stage
from codes.train.reward_model import RewardModel

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
# While one rank checks a checkpoint of a hundred gigabytes, the others wait: longer than NCCL's ten minutes.
LONGEST_WAIT = timedelta(minutes=30)


def resolve_precision(precision: str) -> str:
    """``auto`` is bf16 where the hardware multiplies it natively, else fp32.

    Raises:
        ContrastRMError: fp16 without a GPU (accelerate would ignore it without a word).
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise ContrastRMError("fp16 needs a CUDA GPU; use --precision bf16 or fp32 on a CPU")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def make_accelerator(*, precision: str) -> Accelerator:
    """The one distributed engine: plain, DDP, or DeepSpeed as the launcher said; ``set_accumulation`` it before ``prepare``."""
    handlers = []
    if launched_processes() > 1:
        # Without a named backend accelerate does not see that DeepSpeed on a CPU has several processes.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=LONGEST_WAIT))
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers)


def set_accumulation(accelerator: Accelerator, accumulation: int, *, max_grad_norm: float) -> None:
    """Say how many micro-batches make a step; all processes must say the same.

    Raises:
        ContrastRMError: They do not, and would wait for each other for ever.
    """
    mine = torch.tensor([accumulation], device=accelerator.device)
    found = accelerator.gather(mine).tolist()
    if len(set(found)) > 1:
        raise ContrastRMError(
            f"the processes would take {found} micro-batches a step: start them with the same settings on every machine"
        )
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # There is no torch DataLoader to read these from: groups are planned per step.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # A micro-batch is a pack, whatever the number of its groups.
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = accumulation
        config["gradient_clipping"] = max_grad_norm
        config["train_batch_size"] = accumulation * accelerator.num_processes


def make_optimizer(
    model: torch.nn.Module, *, learning_rate: float, weight_decay: float, master_weights: bool = False
) -> torch.optim.Optimizer:
    """AdamW; norms and biases are not decayed.

    Args:
        master_weights: Keep float32 masters of a bfloat16 model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A parameter that ZeRO-3 has split remembers its shape.
    decayed = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2]
    others = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (others, 0.0))
        if parameters
    ]
    if master_weights:
        return MasterAdamW(groups, lr=learning_rate)
    # DeepSpeed hands the optimizer pieces of its own making.
    return torch.optim.AdamW(groups, lr=learning_rate, fused=not under_deepspeed())


def keeps_master_weights(precision: str) -> bool:
    """Whether this process keeps float32 masters of bf16 weights itself (several processes go through DeepSpeed)."""
    return precision == "bf16" and launched_processes() == 1 and not under_deepspeed()


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    master_weights: bool,
) -> tuple[torch.nn.Module, Any]:
    """The model and its optimizer, as the accelerator runs them."""
    if master_weights:
        # The masters are copies: made where the model has been put.
        model = accelerator.prepare(model)
    if accelerator.num_processes > 1 and zero_stage() == 3:
        split_weights(accelerator, model)
    optimizer = make_optimizer(
        model, learning_rate=learning_rate, weight_decay=weight_decay, master_weights=master_weights
    )
    if master_weights:
        return model, accelerator.prepare(optimizer)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    return prepared_model, prepared_optimizer


def split_weights(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Give every rank its part of each parameter under ZeRO-3, layer by layer. Collective.

    DeepSpeed does the same when it takes over a whole model, but only after it has put all of it on every device. The host
    holds the weights once, whatever the number of ranks: files in the dtype of the run are mapped, not copied.
    """
    # Imported where it is used: runs without DeepSpeed start faster.
    import deepspeed

    config = accelerator.state.deepspeed_plugin.deepspeed_config
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    for part in (*layers, model):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(
            module=part,
            dtype=dtype,
            config_dict_or_path={
                "zero_optimization": config["zero_optimization"],
                "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
            },
        )
    # DeepSpeed takes a split model to be on its device already; it moves the parameters alone.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def smallest_of_ranks(accelerator: Accelerator, value: int) -> int:
    """The smallest value that a process has; all of them must ask."""
    found: list[int] = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    return min(found)


def autocast_dtype(model: RewardModel, precision: str) -> torch.dtype | None:
    """What accelerate's autocast computes in; None for weights that are trained in their own dtype, without autocast."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return low if next(model.backbone.parameters()).dtype == torch.float32 else None


def confirm_packing(model: RewardModel, packing: str, accelerator: Accelerator, *, wanted: str, precision: str) -> str:
    """Try packs on the device where the model will be trained; all processes ask together.

    Args:
        packing: As ``resolve_packing`` gave it, before the model was on the device.
        wanted: What the user asked for.

    Returns:
        ``packing``, or ``off`` where packs are not right on the device of any process, and ``wanted`` is ``auto``.

    Raises:
        ContrastRMError: Packs were asked for by name.
    """
    mine = model.probe_packing_on(accelerator.device, cast=autocast_dtype(model, precision))
    reasons = [reason for reason in gather_object([mine]) if reason is not None]
    if not reasons:
        return packing
    why = f"packs cannot be trained on {accelerator.device.type} with this model: {reasons[0]}"
    if wanted != "auto":
        raise ContrastRMError(f"{why}; use --packing auto or off")
    if accelerator.is_main_process:
        print(f"note: {why}; it is trained on padded batches", file=sys.stderr)
    return "off"


def training_device() -> torch.device:
    """Where the accelerator will put the model (known before it exists)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def under_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed (known before the accelerator exists)."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
