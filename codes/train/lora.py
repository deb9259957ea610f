"""Low-rank adapters through peft: what is trained, and the two forms in which it is saved.

Writes: ``adapter/`` (what peft loads on the base model) and the weights with the adapter merged into them, which plain
transformers loads. The score head is always trained and always saved. Used by ``codes.train.reward_model``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import set_zero3_state

from codes.common.errors import ContrastRMError

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter on some layers of a model.

    Attributes:
        rank: Of the two factors, at least 1.
        alpha: The adapter is scaled by ``alpha / rank``.
        dropout: Of the adapter's input while training. Above 0 a text's score while training depends on chance.
        target_modules: ``all-linear``, or ends of module names, separated by commas (``q_proj,v_proj``).
        merge: Save the merged weights beside the adapter.
        base_model: What the adapter names as its base: a folder or a hub id.
        seed: Of the adapter's first values.
    """

    rank: int
    alpha: int
    dropout: float
    target_modules: str
    merge: bool
    base_model: str
    seed: int


def lora_settings(
    *, rank: int, alpha: int, dropout: float, target_modules: str, merge: bool, base_model: str, seed: int
) -> LoraSettings | None:
    """The settings of a run's flags; None for rank 0.

    Raises:
        ContrastRMError: The base is an adapter itself.
    """
    if rank == 0:
        return None
    if is_adapter(base_model):
        raise ContrastRMError(
            f"{base_model} is an adapter, and an adapter on an adapter has no base model: give the folder of its merged model, "
            "or train all weights (--lora_rank 0)"
        )
    folder = Path(base_model).expanduser()
    # A folder is named in full: the adapter is looked at from elsewhere.
    base_model = str(folder.resolve()) if folder.is_dir() else base_model
    return LoraSettings(rank, alpha, dropout, target_modules, merge, base_model, seed)


def add_adapter(classifier: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Put a new adapter on a classifier, in place, and freeze everything else but the score head.

    The adapter has the dtype of the model; float32 masters of it, where there are any, are the optimizer's.

    Raises:
        ContrastRMError: The model has no such modules.
    """
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(classifier, settings.target_modules),
        modules_to_save=head_modules(classifier),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(settings.seed)
        # peft asks for gradient checkpointing by a name that transformers gives up.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(classifier, config, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    # peft would name what the model was loaded from, which may be a relative path.
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = settings.base_model
    return adapted


def _targets(classifier: PreTrainedModel, wanted: str) -> str | list[str]:
    """What peft takes for ``--lora_target_modules``; every name must be the end of a linear layer's name."""
    if wanted == ALL_LINEAR:
        return wanted
    heads = head_modules(classifier)
    linear = {
        name
        for name, module in classifier.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(f".{head}." in f".{name}." for head in heads)
    }
    targets = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        raise ContrastRMError(
            f"--lora_target_modules {wanted!r}: the model has no linear layer {', '.join(unknown) or 'of no name'}; it has "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))} (or all-linear)"
        )
    return targets


def head_modules(classifier: PreTrainedModel) -> list[str]:
    """Names of what lies between the last hidden state and the score: trained and saved whole.

    Example: ``["score"]`` of a decoder; ``["classifier", "pooler"]`` of BERT.
    """
    backbone = classifier.base_model_prefix
    heads = [
        name
        for name, module in classifier.named_children()
        if name != backbone and any(True for _ in module.parameters())
    ]
    # A language model without a classification head has no trained pooler either.
    if getattr(getattr(classifier, backbone), "pooler", None) is not None:
        heads.append("pooler")
    return heads


def twin_with_adapter(
    classifier: PreTrainedModel, settings: LoraSettings, state_dict: Mapping[str, torch.Tensor]
) -> PeftModel:
    """A second model of the same shape that holds gathered weights: the running one may be in pieces on several devices.

    Args:
        state_dict: Of the adapted classifier, whole; the tensors are taken over, not copied.
    """
    # Under ZeRO-3 transformers would take this model apart while it is made.
    with init_empty_weights(), set_zero3_state():
        twin = type(classifier)(copy.deepcopy(classifier.config))
        adapted = add_adapter(twin, settings)
    twin.load_state_dict({name: tensor.cpu() for name, tensor in state_dict.items()}, assign=True)
    return adapted


def save_adapter(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that peft loads on the base model, with the tokenizer and its template."""
    # A pad token that was added is never scored: its embedding need not travel.
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def merged_weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of a plain classifier: the adapter added to its layers, the trained head in place of the old one.

    The tensors that ``adapted`` was made from stay as they are.
    """
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    weights: dict[str, torch.Tensor] = merged.state_dict()
    return weights


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(folder).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of_adapter(folder: str | Path) -> str:
    """The folder or hub id of the model that an adapter was trained on.

    Raises:
        ContrastRMError: The adapter does not say, or its configuration cannot be read.
    """
    try:
        base = PeftConfig.from_pretrained(str(Path(folder).expanduser())).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ContrastRMError(f"cannot read {Path(folder) / ADAPTER_CONFIG}: {str(error).splitlines()[0]}") from error
    if not base:
        raise ContrastRMError(f"{Path(folder) / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    return str(base)


def fit_embedding(classifier: PreTrainedModel, folder: str | Path) -> None:
    """Give a base classifier as many embedding rows as an adapter was trained with, where the adapter brings them along.

    Raises:
        ContrastRMError: Its weights cannot be read.
    """
    embedding = classifier.get_input_embeddings()
    name = next(name for name, module in classifier.named_modules() if module is embedding)
    shapes = _saved_shapes(Path(folder).expanduser()).items()
    rows = [
        shape[0] for saved, shape in shapes if f".{saved}".endswith((f".{name}.weight", f".{name}.base_layer.weight"))
    ]
    if rows and rows[0] != embedding.weight.shape[0]:
        with embedding.weight.device:
            classifier.resize_token_embeddings(rows[0], mean_resizing=False)


def merge_adapter(classifier: PreTrainedModel, folder: str | Path) -> None:
    """Load an adapter and its score head into a base classifier, in place.

    Raises:
        ContrastRMError: The adapter does not fit the model, or was saved without a score head.
    """
    folder = Path(folder).expanduser()
    heads = head_modules(classifier)
    names = _saved_shapes(folder)
    absent = [head for head in heads if head != "pooler" and not any(f".{head}." in f".{name}" for name in names)]
    if absent:
        raise ContrastRMError(
            f"the adapter in {folder} was saved without its score head ({', '.join(absent)} missing): its scores would be "
            f"random; train it with modules_to_save={absent}, or give the folder of the merged model"
        )
    fit_embedding(classifier, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(classifier, str(folder), autocast_adapter_dtype=False)
        adapted.merge_and_unload(safe_merge=True)
        classifier.requires_grad_(True)  # peft froze it
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ContrastRMError(
            f"the adapter in {folder} does not fit its base model: {str(error).strip().splitlines()[0]}"
        ) from error


def _saved_shapes(folder: Path) -> dict[str, list[int]]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise ContrastRMError(f"cannot read {file}: {error}") from error


def trained_share(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)
