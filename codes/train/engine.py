"""How a run computes: precision, the accelerator (plain, DDP or DeepSpeed), the optimizer and its masters.

Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedTokenizerBase

from codes.common.base_model import resolve_model_path
from codes.common.chat import ChatFormatter
from codes.common.cli import is_first_process, launched_processes
from codes.common.errors import ContrastRMError
from codes.common.scoring import resolve_packing
from codes.train.lora import LoraSettings, lora_settings
from codes.train.reward_model import RewardModel, embedding_rows, load_reward_model, save_reward_model
from codes.train.settings import OptimizerSettings, TrainSettings

# While one rank checks a checkpoint of a hundred gigabytes, the others wait: longer than NCCL's ten minutes.
LONGEST_WAIT = timedelta(minutes=30)


def training_device() -> torch.device:
    """Where the accelerator will put the model (known before it exists)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def under_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed (known before the accelerator exists)."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_config() -> dict[str, Any] | None:
    """``zero_optimization`` of the launcher's DeepSpeed configuration; None without DeepSpeed.

    Raises:
        ContrastRMError: It cannot be read, or sets what the flags set.
    """
    if not under_deepspeed():
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if file and Path(file).is_file():
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ContrastRMError(f"cannot read the DeepSpeed configuration {file}: {error}") from error
        zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
        if not isinstance(zero, dict):
            raise ContrastRMError(f"{file} is no DeepSpeed configuration: start from configs/ds_z3_config.json")
        if doubled := [name for name in ("optimizer", "scheduler") if name in config]:
            raise ContrastRMError(
                f"{file} sets {' and '.join(doubled)}, which the flags set here (--learning_rate, --weight_decay, "
                "--warmup_steps): take these sections out"
            )
        return dict(zero)
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
    """The one distributed engine: plain, DDP, or DeepSpeed as the launcher said; ``set_accumulation`` it before ``prepare``.

    Raises:
        ContrastRMError: accelerate does not see the processes that the launcher started.
    """
    handlers = []
    if launched_processes() > 1:
        # Without a named backend accelerate does not see that DeepSpeed on a CPU has several processes.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=LONGEST_WAIT))
    # With masters the model itself is bfloat16: autocast would only cast it again.
    mixed = "no" if precision == "fp32" or keeps_master_weights(precision) else precision
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=handlers)
    if accelerator.num_processes != launched_processes():
        raise ContrastRMError(
            f"the launcher started {launched_processes()} processes, accelerate sees {accelerator.num_processes}; "
            "start with bash run_training.sh"
        )
    return accelerator


def set_accumulation(accelerator: Accelerator, accumulation: int, *, max_grad_norm: float) -> None:
    """Say how many micro-batches make a step; all processes must say the same.

    Raises:
        ContrastRMError: They do not, and would wait for each other for ever.
    """
    mine = torch.tensor([accumulation], device=accelerator.device)
    counts = accelerator.gather(mine).tolist()
    if len(set(counts)) > 1:
        raise ContrastRMError(
            f"the processes would take {counts} micro-batches a step: start them with the same settings on every machine"
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


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: linear warm-up, then linear decay to 0."""

    learning_rate: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, settings: OptimizerSettings, total_steps: int) -> Schedule:
        """With the warm-up asked for, or a tenth of the steps where a run is too short to finish it."""
        warmup = settings.warmup_steps
        if warmup >= total_steps:
            warmup = max(1, total_steps // 10) if warmup else 0
        return cls(settings.learning_rate, warmup, total_steps)

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based ``step``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)


def make_optimizer(
    model: torch.nn.Module, settings: OptimizerSettings, *, master_weights: bool = False
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
        for parameters, decay in ((decayed, settings.weight_decay), (others, 0.0))
        if parameters
    ]
    if master_weights:
        return MasterAdamW(groups, lr=settings.learning_rate)
    # DeepSpeed hands the optimizer pieces of its own making.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=not under_deepspeed())


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose parameters are float32 masters of a bfloat16 model's weights.

    Autocast would cast every weight, and the input of every projection, again in each micro-batch. Here the model itself is
    bfloat16, as DeepSpeed keeps it; the optimizer adds every micro-batch's gradients up in float32, and writes the rounded
    weights back after each step. For one process; several go through DeepSpeed, which does the same with sharding.

    Gradients leave the model as soon as they are made: ``.grad`` of the model's own parameters is None after a backward pass.

    Args:
        groups: As for ``torch.optim.AdamW``, with the model's parameters. They must be on their device already.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._master_of: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        master_groups = [group | {"params": [self._master(p) for p in group["params"]]} for group in groups]
        super().__init__(master_groups, lr=lr, fused=self._pairs[0][0].device.type in ("cpu", "cuda"))

    def _master(self, weight: torch.nn.Parameter) -> torch.nn.Parameter:
        master = torch.nn.Parameter(weight.detach().float().clone())
        self._pairs.append((weight, master))
        self._master_of[weight] = master
        weight.register_post_accumulate_grad_hook(self._collect)
        return master

    def _collect(self, weight: torch.Tensor) -> None:
        """Move a fresh gradient to the master, in float32."""
        master = self._master_of[weight]  # type: ignore[index]
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One AdamW step on the masters, then the rounded weights."""
        result = super().step(closure)
        torch._foreach_copy_([weight for weight, _ in self._pairs], [master for _, master in self._pairs])
        return result

    def state_dict(self) -> dict[str, Any]:
        """With the masters: the rounded weights alone could not continue a run."""
        return super().state_dict() | {"masters": [master.detach() for _, master in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the optimizer's state and the masters; the model's weights follow from them."""
        rest = {key: value for key, value in state_dict.items() if key != "masters"}
        super().load_state_dict(rest)
        for (weight, master), stored in zip(self._pairs, state_dict["masters"], strict=True):
            master.copy_(stored)
            weight.copy_(master)


def keeps_master_weights(precision: str) -> bool:
    """Whether this process keeps float32 masters of bf16 weights itself (several processes go through DeepSpeed)."""
    return precision == "bf16" and launched_processes() == 1 and not under_deepspeed()


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, settings: OptimizerSettings, *, precision: str
) -> tuple[torch.nn.Module, Any]:
    """The model and its optimizer, as the accelerator runs them."""
    master_weights = keeps_master_weights(precision)
    if master_weights:
        # The masters are copies: made where the model has been put.
        model = accelerator.prepare(model)
    if accelerator.num_processes > 1 and zero_stage() == 3:
        split_weights(accelerator, model)
    optimizer = make_optimizer(model, settings, master_weights=master_weights)
    if master_weights:
        return model, accelerator.prepare(optimizer)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    return prepared_model, prepared_optimizer


def save_weights(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a prepared model as a whole reward model. Collective: under ZeRO-3 every rank has a part of the weights."""
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        plain: Any = accelerator.unwrap_model(model)
        save_reward_model(plain, tokenizer, folder, state_dict=state_dict)


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
    values: list[int] = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    return min(values)


def autocast_dtype(model: RewardModel, precision: str) -> torch.dtype | None:
    """What accelerate's autocast computes in; None for weights that are trained in their own dtype, without autocast."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return low if next(model.backbone.parameters()).dtype == torch.float32 else None


@dataclass(frozen=True)
class LoadedModel:
    """A model that will be trained, on the CPU, and how texts become its tokens.

    Attributes:
        lora: Of its adapter; None: all weights are trained.
        precision: ``bf16``, ``fp16`` or ``fp32``.
    """

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    formatter: ChatFormatter
    lora: LoraSettings | None
    precision: str


def load_model(settings: TrainSettings, max_length: int | None) -> LoadedModel:
    """Load the model and put its adapter on.

    Called before the accelerator exists: under ZeRO-3 transformers would build the model in pieces already, and a new score head
    needs its shape. DeepSpeed splits the weights when it takes the model over.

    Args:
        max_length: The limit of texts that is in force; None: none.
    """
    options = settings.model
    precision = resolve_precision(settings.compute.precision)
    # DeepSpeed keeps float32 masters of bf16 weights, and so do we in one process; elsewhere the weights are the masters.
    is_low = precision == "bf16" and (keeps_master_weights(precision) or under_deepspeed())
    model, tokenizer = load_reward_model(
        options.model_path,
        dtype="bfloat16" if is_low else "float32",
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        require_head=False,
        seed=settings.seed,
        chat_template=options.chat_template,
    )
    lora = lora_settings(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        target_modules=options.lora_target_modules,
        merge=options.merge_lora,
        base_model=resolve_model_path(options.model_path),
        seed=settings.seed,
    )
    if lora is not None:
        model.add_lora(lora)
    formatter = ChatFormatter(
        tokenizer,
        max_length=max_length,
        overlength=settings.data.overlength,
        n_embeddings=embedding_rows(model.classifier, tokenizer),
    )
    rope = model.rope_limit
    if rope is not None and (max_length is None or max_length > rope.tokens) and is_first_process():
        print(
            f"note: the rotary embedding of this model changes with the longest text of a micro-batch beyond {rope.tokens} "
            f"tokens; --max_length {rope.tokens} keeps a group's loss independent of its neighbours",
            file=sys.stderr,
        )
    return LoadedModel(model, tokenizer, formatter, lora, precision)


def settle_packing(loaded: LoadedModel, accelerator: Accelerator, wanted: str) -> str:
    """``shared``, ``packed`` or ``off``: what was asked for, tried on the device where the model will be trained.

    Raises:
        ContrastRMError: Packs were asked for by name, and are not right with this model.
    """
    packing = resolve_packing(loaded.model, wanted)
    if packing == "off" or accelerator.device.type != "cuda":
        return packing
    return confirm_packing(loaded.model, packing, accelerator, wanted=wanted, precision=loaded.precision)


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
