"""The reward model: a plain ``AutoModelForSequenceClassification`` with one label, scored the right way.

Reads and writes: Hugging Face model folders that plain transformers, TRL, RewardBench and vLLM load.
The score is read at the last real token by attention mask, the head runs in float32 inside its own forward (ZeRO-3 gathers
its weight only there), dropout is off. Encoders keep their own pooler and classifier.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from codes.common.base_model import resolve_model_path
from codes.common.chat import KNOWN_TEMPLATES, ChatFormatter, Conversation, last_token_ids, take_template
from codes.common.errors import ContrastRMError
from codes.common.files import permit, sync
from codes.common.packed_attention import install_packed_attention, why_not_packable
from codes.common.packing import PackLayout
from codes.common.records import ensure_writable_folder, write_json
from codes.common.rope import forget_long_texts, rope_limit
from codes.common.settings import DTYPES
from codes.train.lora import (
    ADAPTER_FOLDER,
    LoraSettings,
    add_adapter,
    base_of_adapter,
    fit_embedding,
    is_adapter,
    merge_adapter,
    merged_weights,
    save_adapter,
    twin_with_adapter,
)
from codes.train.pack_probe import probe, probe_on

PAD_TOKEN = "<|contrastrm_pad|>"
# The date that Llama 3.1's own template falls back to.
PINNED_DATE = '{%- set date_string = "26 Jul 2024" %}'
# Tokenizers without a limit of their own report a huge number.
NO_TOKENIZER_LIMIT = 10**6
# What makes a model of a folder, the configuration first: without it the rest does not look whole.
MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.jinja", "README.md",
)  # fmt: skip
# Attributes of modules (OPT, Bart, ...) that are probabilities of dropout in training.
DROPOUT_RATES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weight's dtype; its state dict is that of ``nn.Linear``.

    bf16 numbers near 8 lie 0.0625 apart: a head in bf16 makes ties that are no ties.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., hidden)`` in any float dtype -> ``(..., 1)`` float32 (float64 stays float64)."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(device_type=input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)


class RewardModel(nn.Module):
    """Scores texts with a sequence-classification model.

    Args:
        classifier: A model with ``num_labels == 1``. Decoders (with a ``score`` head over the last hidden state) are pooled
            here, at the last token that the attention mask marks as real; other models give their own logit.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        if classifier.config.num_labels != 1:
            raise ContrastRMError(
                f"a reward model has one label, this model has {classifier.config.num_labels}; was it saved with num_labels=1?"
            )
        self.pools_last_token = pools_last_token(classifier)
        _use_float32_head(classifier)
        for module in classifier.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            # Some models call the function with a number of their own instead.
            for name in DROPOUT_RATES:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.classifier = classifier
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.takes_packs = False
        # Padded batches must not mix texts on its two sides (``codes.common.scoring`` keeps them apart).
        self.rope_limit = rope_limit(self.backbone.config.get_text_config())
        self.lora: LoraSettings | None = None

    @property
    def backbone(self) -> PreTrainedModel:
        """The model without its head."""
        backbone: PreTrainedModel = getattr(self.classifier, self.classifier.base_model_prefix)
        return backbone

    @property
    def config(self) -> PretrainedConfig:
        """The classifier's configuration."""
        return self.classifier.config

    def gradient_checkpointing_enable(self) -> None:
        """Trade compute for memory; the non-reentrant form, which works with DDP, ZeRO and frozen weights."""
        kwargs = {"use_reentrant": False}
        if hasattr(self.classifier, "activation_checkpointing_enable"):
            self.classifier.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:  # its name until transformers 5.2x
            self.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def add_lora(self, settings: LoraSettings) -> None:
        """Train a low-rank adapter and the score head instead of all weights.

        Raises:
            ContrastRMError: The model has no such modules.
        """
        add_adapter(self.classifier, settings)
        self.lora = settings

    def enable_packing(self) -> str | None:
        """Let the model take packs (``forward(..., layout=...)``) if it can.

        Returns:
            None, or why it cannot: then only padded batches are right.
        """
        if self.takes_packs:
            return None
        reason = (
            "it is not a decoder with a score head" if not self.pools_last_token else why_not_packable(self.backbone)
        )
        if reason is None:
            install_packed_attention(self.backbone)
            self.takes_packs = True
            reason = probe(self.backbone, self._pooled)
            self.takes_packs = reason is None
        return reason

    def probe_packing_on(self, device: torch.device, *, cast: torch.dtype | None) -> str | None:
        """``pack_probe.probe_on``: None, or why packs must not be used on a device where the model will be trained."""
        return probe_on(self.backbone, self._pooled, device, cast=cast)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        layout: PackLayout | None = None,
        ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score each row, or each sequence of a pack.

        Args:
            input_ids: ``(B, L)``, padded left or right; of a pack ``(1, T)``.
            attention_mask: ``(B, L)``, 1 at real tokens. Every row has at least one. Not for packs.
            token_type_ids: ``(B, L)`` for encoders with segments.
            layout, ends: Of a pack (``codes.common.packing``), after ``enable_packing``.

        Returns:
            ``(B,)`` raw scores, or ``(n_sequences,)`` of a pack; float32 (float64 for a float64 model).
        """
        if self.pools_last_token:
            return self.classifier.score(self._pooled(input_ids, attention_mask, layout, ends)).squeeze(-1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits = self.classifier(**inputs).logits.squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: PackLayout | None = None,
        ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden state at each text's last token, ``(B, hidden)``."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if layout is not None:
            if not self.takes_packs:
                raise ContrastRMError("this model takes no packs: call enable_packing first, it names the reason")
            inputs["position_ids"] = layout.positions.long().unsqueeze(0)
            inputs["pack_layout"] = layout
            # Four-dimensional masks are handed through as they are: no mask of T x T is built, and no pack is guessed from
            # the jumps of the positions.
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
            hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
            pooled: torch.Tensor = hidden[0, ends]
            return pooled
        assert attention_mask is not None, "a padded batch needs its attention mask"
        if self.rope_limit is not None:
            forget_long_texts(self.backbone)
        inputs["attention_mask"] = attention_mask
        if self._takes_positions:
            # Positions count real tokens, so that left padding changes nothing, not even for learned positions.
            inputs["position_ids"] = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        steps = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        last = (attention_mask * steps).argmax(dim=-1)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return pooled


def _use_float32_head(classifier: PreTrainedModel) -> None:
    """Put ``Float32Linear`` in the place of the layer that makes the score (``score``, ``classifier``, ``out_proj``)."""
    backbone = f"{classifier.base_model_prefix}."
    for name, module in list(classifier.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features == 1 and not name.startswith(backbone):
            parent, _, child = name.rpartition(".")
            setattr(classifier.get_submodule(parent), child, _as_float32_head(module))


def _as_float32_head(head: nn.Linear) -> Float32Linear:
    float32_head = Float32Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    float32_head.weight, float32_head.bias = head.weight, head.bias
    return float32_head


def load_reward_model(
    model_path: str,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    require_head: bool = True,
    seed: int = 42,
    chat_template: str = "",
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """Load a reward model, or make one from a base model.

    Args:
        model_path: The alias ``embedded``, a folder, or a hub id; or the folder of a LoRA adapter, which is merged into the
            base model that it names.
        dtype: ``auto`` keeps the dtype that the weights were saved in.
        device: Where to put it; None leaves it on the CPU.
        require_head: Refuse a model whose score head is not in the weights. False gives such a model a new head with the
            small variance 1 / (hidden + 1) (first scores near 0, first loss near ln n), drawn from ``seed``.
        chat_template: As in ``take_template``.

    Raises:
        ContrastRMError: Missing folder, unreachable hub id, more than one label, no trained head, no chat template for a
            decoder, or a tokenizer of another model.
    """
    if dtype not in DTYPES:
        raise ContrastRMError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    adapter = Path(model_path).expanduser() if is_adapter(model_path) else None
    path = resolve_model_path(model_path if adapter is None else base_of_adapter(adapter))
    config, tokenizer = _load_config_and_tokenizer(path, model_path, trust_remote_code, adapter)
    if adapter is not None or not require_head:
        config.num_labels = 1
        config.problem_type = "regression"
    _turn_off_dropout(config)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    classifier, missing = _read_classifier(
        path,
        model_path,
        config=config,
        trust_remote_code=trust_remote_code,
        require_head=require_head and adapter is None,
        **options,
    )
    model = RewardModel(classifier)
    if missing:
        _init_head(classifier, missing, seed)
    if adapter is not None:
        merge_adapter(classifier, adapter)
    _settle_tokenizer(classifier, tokenizer, chat_template, model_path)
    _ensure_pad_embedding(classifier, tokenizer)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def _read_classifier(
    path: str, shown: str, *, config: PretrainedConfig, trust_remote_code: bool, require_head: bool, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The classifier with its weights, and the names of those that the folder does not hold (a new head's)."""
    try:
        with _quiet_loading():
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
    except (OSError, HfHubHTTPError, SafetensorError) as error:
        raise _unloadable(shown, error) from error
    except pickle.UnpicklingError as error:
        raise ContrastRMError(
            f"{shown!r} was not loaded: its .bin file is damaged or holds more than weights, and loading it could run code of "
            "whoever wrote it; take the model's safetensors"
        ) from error
    except ImportError as error:  # flash_attention_2, or what a model's own code imports
        raise _needs_package(shown, error) from error
    except ValueError as error:
        raise ContrastRMError(f"cannot load {shown!r} as a reward model: {error}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ContrastRMError(
            f"{shown!r} holds weights of another shape than a reward model with one label needs "
            "(a classifier of several labels?); give a base model or a reward model"
        ) from error
    # A base model may carry an unused language-model head; a missing weight outside the classification head is damage.
    missing = sorted(info["missing_keys"])
    backbone = f"{classifier.base_model_prefix}."
    damaged = [name for name in missing if name.startswith(backbone) and ".pooler." not in name]
    if damaged:
        raise ContrastRMError(f"{shown!r} lacks weights of its own architecture: {', '.join(damaged[:3])}")
    if missing and require_head:
        raise ContrastRMError(
            f"{shown!r} has no trained score head ({', '.join(missing)} missing): its scores would be random; "
            "train it first (bash run_training.sh) or give the folder of a trained reward model"
        )
    return classifier, missing


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """What transformers reports about missing weights is checked here and told in our own words."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_config_and_tokenizer(
    path: str, shown: str, trust_remote_code: bool, adapter: Path | None = None
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    # An adapter brings the tokenizer that it was trained with, where it has one.
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(str(adapter) if own else path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _unloadable(shown, error) from error
    except ImportError as error:
        raise _needs_package(shown, error) from error
    return config, tokenizer


def _needs_package(model_path: str, error: ImportError) -> ContrastRMError:
    reason = " ".join(str(error).split())
    return ContrastRMError(
        f"cannot load the model {model_path!r}: {reason} Install the package, or choose another attention "
        "(--attn_implementation auto) where that is what needs it"
    )


def _unloadable(model_path: str, error: Exception) -> ContrastRMError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ContrastRMError(
        f"cannot load the model {model_path!r}: {reason} (a hub id needs network or a filled cache and, for gated models, "
        "HF_TOKEN; a local model needs the path of its folder; 'embedded' needs neither)"
    )


def _turn_off_dropout(config: PretrainedConfig) -> None:
    """Zero every dropout rate: a reward model's score is a function of its text, in training too."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def load_without_weights(
    model_path: str, *, chat_template: str = "", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The classifier as a shape (on the meta device) and its tokenizer.

    The tokenizer makes the ids that the one of ``load_reward_model`` makes.

    Raises:
        ContrastRMError: Missing folder, unreachable hub id, no chat template for a decoder, or a tokenizer of another model.
    """
    adapter = Path(model_path).expanduser() if is_adapter(model_path) else None
    path = resolve_model_path(model_path if adapter is None else base_of_adapter(adapter))
    config, tokenizer = _load_config_and_tokenizer(path, model_path, trust_remote_code, adapter)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise _needs_package(model_path, error) from error
    except ValueError as error:
        raise ContrastRMError(f"cannot load {model_path!r} as a reward model: {error}") from error
    if adapter is not None:
        fit_embedding(classifier, adapter)
    _settle_tokenizer(classifier, tokenizer, chat_template, model_path)
    return classifier, tokenizer


def pools_last_token(classifier: PreTrainedModel) -> bool:
    """Whether it is a decoder with a ``score`` head over the last hidden state."""
    return isinstance(getattr(classifier, "score", None), nn.Linear)


def embedding_rows(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that a text may hold: those of the embedding, and the pad token's, which gets a row if it has none."""
    return max(int(classifier.get_input_embeddings().weight.shape[0]), tokenizer.pad_token_id + 1)


def own_length_limit(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that a model and its tokenizer were made for; None where neither says."""
    positions = getattr(classifier.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and 0 < limit < NO_TOKENIZER_LIMIT]
    for name, module in classifier.named_modules():
        # RoBERTa and its kin count positions from behind the padding's own: the rows up to it are no text's.
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if padding is not None:
            limits.append(int(module.weight.shape[0]) - padding - 1)
    return min(limits) if limits else None


def _settle_tokenizer(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str, shown: str
) -> None:
    """Template, date and pad token as this project uses and saves them.

    Raises:
        ContrastRMError: A decoder without chat template, or ids that have no embedding.
    """
    take_template(tokenizer, chat_template)
    if pools_last_token(classifier) and not tokenizer.chat_template:
        raise ContrastRMError(
            f"the tokenizer of {shown!r} has no chat template, and without one a question runs into its answer: name one with "
            f"--chat_template (CHAT_TEMPLATE): a Jinja file, or {', '.join(KNOWN_TEMPLATES)}"
        )
    _fix_date(tokenizer)
    n_rows = int(classifier.get_input_embeddings().weight.shape[0])
    _choose_pad_token(tokenizer, n_rows)
    _check_vocabulary(tokenizer, n_rows, shown)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, n_rows: int, shown: str) -> None:
    """Refuse a tokenizer of another model.

    The pad token gets an embedding if it has none. Some published models (Gemma 3 of 1B) have special tokens for images beyond
    their embeddings, which no text holds: a text that does is refused when it is met.
    """
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= n_rows}
    if not beyond:
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    probe = Conversation([{"role": "user", "content": "Q"}], "A")
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, *ChatFormatter(tokenizer).encode([probe])[0].input_ids}
    foreign = [
        token
        for token, place in beyond.items()
        if place != tokenizer.pad_token_id and (token not in special or place in used)
    ]
    if foreign:
        raise ContrastRMError(
            f"the tokenizer of {shown!r} makes ids that its model has no embedding for ({foreign[0]!r} is "
            f"{beyond[foreign[0]]}, the embedding has {n_rows} rows): save the tokenizer that belongs to the model beside it, or "
            "resize the model (resize_token_embeddings) and save both"
        )


def _fix_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pin the date that some templates write (Llama 3.1, 3.2): a score must not change from day to day.

    The pinned template is saved with the model, so that plain transformers renders the same.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template or template.startswith(PINNED_DATE):
        return
    tokenizer.chat_template = PINNED_DATE + template
    if "date_string" not in template:
        print("warning: the chat template writes today's date; scores will change from day to day", file=sys.stderr)


def _init_head(classifier: PreTrainedModel, missing: list[str], seed: int) -> None:
    """Small-variance head: std 1 / sqrt(hidden + 1), zero bias, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(classifier.named_parameters())
    for name in missing:
        parameter = parameters[name]
        with torch.no_grad():
            if parameter.ndim < 2:
                parameter.zero_()
            else:
                std = 1 / math.sqrt(parameter.shape[-1] + 1)
                drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> None:
    """A pad token that never ends a conversation, among those with an embedding if there is one.

    Plain transformers reads the score at the rightmost token that is not ``config.pad_token_id``: a pad id that closes the
    template would make it read the wrong token, and an absent one makes it refuse batches.
    """
    closing = last_token_ids(tokenizer)
    # With no fixed closing token any ordinary token can stand last, but a special pad token cannot.
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in closing:
        return
    candidates = [
        token_id
        for token_id in (tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder))
        if token_id is not None
        and token_id not in closing
        and token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        and "pad" in str(tokenizer.convert_ids_to_tokens(token_id)).lower()
    ]
    if candidates:
        chosen = next((token_id for token_id in candidates if token_id < n_rows), candidates[0])
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    else:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def _ensure_pad_embedding(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the tokenizer's pad id, and an embedding for it: without one the saved folder would load nowhere."""
    n_rows = embedding_rows(classifier, tokenizer)
    if n_rows > classifier.get_input_embeddings().weight.shape[0]:
        classifier.resize_token_embeddings(n_rows, mean_resizing=False)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def save_reward_model(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Save a folder that plain transformers loads, appearing whole or not at all.

    A model with a LoRA adapter is saved merged, with the adapter in ``adapter/`` (or the adapter alone, as its settings say).

    Args:
        output_dir: The model that it holds is replaced, at the moment when the new one is whole; other files stay.
        state_dict: The gathered weights of a ``RewardModel`` (from ``accelerator.get_state_dict``, which every rank must
            call); None takes the model's own.

    Raises:
        ContrastRMError: The folder cannot be written. Weights that were written whole are kept in it, and named.
    """
    output_dir = ensure_writable_folder(output_dir)
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    prefix = "classifier."
    plain = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items()}
    with _put_in_place(output_dir) as scratch:
        if model.lora is not None:
            adapted = twin_with_adapter(model.classifier, model.lora, plain)
            save_adapter(adapted, tokenizer, scratch / ADAPTER_FOLDER)
            plain = merged_weights(adapted) if model.lora.merge else {}
        if plain:
            model.classifier.save_pretrained(scratch, state_dict=plain)
            tokenizer.save_pretrained(scratch)
            _name_for_older_readers(scratch, tokenizer, takes_segments=not model.pools_last_token)
    return output_dir


def saved_bytes(model: RewardModel) -> int:
    """What the weights take on the disk when the model is saved."""
    weights = [p for p in model.parameters() if p.requires_grad or model.lora is None or model.lora.merge]
    return sum(weight.numel() * weight.element_size() for weight in weights)


@contextmanager
def _put_in_place(output_dir: Path) -> Iterator[Path]:
    """A folder for a model's files that take the place of those in ``output_dir`` when the block ends well.

    It lies in ``output_dir``, which was checked to be writable: the folder beside it may not be, or lie on another disk.

    Raises:
        ContrastRMError: The disk refuses it. What has whole weights is kept as ``unsaved_model-*``.
    """
    scratch = output_dir / f".model.saving-{os.getpid()}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            permit(path)
            sync(path)
        _replace_files(scratch, output_dir)
    except BaseException as error:
        kept = _keep_weights(scratch)
        # The tokenizer's writer knows no exception of its own.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            if kept is not None:
                print(
                    f"the model was not saved in {output_dir}; its weights are in {kept}", file=sys.stderr, flush=True
                )
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        where = "none of its weights could be kept" if kept is None else f"its weights are whole in {kept}"
        raise ContrastRMError(f"cannot save the model in {output_dir}: {reason}; {where}") from error


def _keep_weights(scratch: Path) -> Path | None:
    """Save what can be saved of a failed save: a folder with whole weights gets a name that nobody clears away."""
    files = list(scratch.rglob("*.safetensors"))
    shards = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)\.", file.name))}
    if not files or not all(_is_whole(file) for file in files) or any(n > len(files) for n in shards):
        # Half of the weights would keep a full disk full.
        shutil.rmtree(scratch, ignore_errors=True)
        return None
    kept = scratch.with_name(f"unsaved_model-{os.getpid()}")
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(scratch, kept)
    return kept


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _name_for_older_readers(folder: Path, tokenizer: PreTrainedTokenizerBase, *, takes_segments: bool) -> None:
    """Say again, in the words of transformers 4, what transformers 5 writes in words of its own.

    An older reader (the rewardbench package pins one) would not fail on a missing ``rope_theta``: it would take 10000 and score
    something else. Newer ones read both.

    Args:
        takes_segments: The model takes ``token_type_ids``. An older tokenizer of no class of its own makes them for every model,
            and a decoder refuses them.
    """
    config_file = folder / "config.json"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    # Layers of several kinds have a dictionary each; transformers 4 has no words for these.
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer_file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not takes_segments:
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    for local in ("is_local", "local_files_only"):
        settings.pop(local, None)
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    tokenizer_file.write_text(text + "\n", encoding="utf-8")


def copy_reward_model(source: Path, output_dir: Path) -> None:
    """Put a saved model in the place of another one, as ``save_reward_model`` does: whole or not at all.

    Args:
        source: A folder that ``save_reward_model`` wrote. Its weights are linked where the disk can, so that they do not need
            their space twice.

    Raises:
        ContrastRMError: The folder cannot be written.
    """

    def link_or_copy(original: str, copy: str) -> None:
        try:
            os.link(original, copy)
        except OSError:
            shutil.copy2(original, copy)

    with _put_in_place(output_dir) as scratch:
        shutil.copytree(source, scratch, copy_function=link_or_copy, dirs_exist_ok=True)


def record_reward_scale(folder: Path, mean: float, std: float) -> None:
    """Write mean and standard deviation of the raw scores into the configuration, for whoever wants to scale them.

    No score is ever scaled by them here. A folder of an adapter alone has no configuration to hold them.

    Raises:
        ContrastRMError: The disk refuses it.
    """
    file = folder / "config.json"
    if file.is_file():
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"reward_mean": mean, "reward_std": std})


def _replace_files(scratch: Path, output_dir: Path) -> None:
    """Move a finished model into the run's folder, the config last: a folder with a config is whole.

    What it replaces, an earlier model's card included, goes first, and comes back if anything refuses to move.
    """
    replaced = output_dir / f".model.replaced-{os.getpid()}"
    replaced.mkdir()
    new = sorted(scratch.iterdir(), key=lambda file: file.name == "config.json")
    old = [file for pattern in MODEL_FILES for file in output_dir.glob(pattern) if file.is_file()]
    old += [file for file in (output_dir / one.name for one in new) if file.is_file() and file not in old]
    old += [output_dir / ADAPTER_FOLDER] if (output_dir / ADAPTER_FOLDER).is_dir() else []
    moves = [(file, replaced / file.name) for file in old] + [(file, output_dir / file.name) for file in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        replaced.rmdir()
        raise
    sync(output_dir)
    for folder in (scratch, replaced):
        shutil.rmtree(folder, ignore_errors=True)
