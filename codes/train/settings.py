"""Every setting of a training run, once: flags, ``--help``, the launcher's check and ``train_args.json`` derive from it.

Imports nothing heavy, so that ``--help`` answers at once. A new setting is one line here (and one in ``run_training.sh`` if
many will change it); functions take ``TrainSettings`` or the part that they need.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from codes.common.biases import INJECTABLE
from codes.common.cli import (
    natural,
    natural_or_auto,
    non_negative_float,
    positive,
    positive_float,
    share,
    share_or_auto,
)
from codes.common.records import LARGEST_MARGIN
from codes.common.settings import OVERLENGTH_POLICIES, PACKINGS, TEMPLATE_HELP, part, setting

MODES = ("contrastive", "pairwise")
NEGATIVES = ("all", "original")
PAIRWISE_LOSSES = ("hinge", "bradley_terry")
ROW_MARGINS = ("use", "ignore")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
# How a rejected answer without an injected bias is called where biases get numbers.
ORIGINAL = "original"
# Name of a tracker -> the modules of which it needs one.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "swanlab": ("swanlab",)}
EVALUATION_FILES = "data/eval/*.jsonl,data/eval/public/*.jsonl,data/eval/reward_bench/*.jsonl"
DEFAULT_METRIC = "constrained_accuracy"
# What ``--eval_steps auto`` means.
EVALUATIONS_A_RUN = 5


def bias_numbers(text: str) -> dict[str, float]:
    """Argparse type: ``length=2,authority=0.5`` -> numbers of at least 0; an empty text gives none."""
    numbers: dict[str, float] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (word.strip() for word in piece.partition("="))
        if name not in (*INJECTABLE, ORIGINAL):
            raise argparse.ArgumentTypeError(f"unknown bias {name!r}; known: {', '.join((*INJECTABLE, ORIGINAL))}")
        if not equals:
            raise argparse.ArgumentTypeError(f"{piece!r} has no number; write {name}=2")
        if name in numbers:
            raise argparse.ArgumentTypeError(f"{name} stands there twice")
        numbers[name] = non_negative_float(value)
        if numbers[name] > LARGEST_MARGIN:
            raise argparse.ArgumentTypeError(f"{value} is more than {LARGEST_MARGIN:.0f}")
    return numbers


def tracker_names(text: str) -> list[str]:
    """Argparse type: comma-separated names of trackers, or ``none``."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in (*TRACKERS, "none")]
    if unknown or not names or ("none" in names and len(names) > 1):
        raise argparse.ArgumentTypeError(f"{text!r}: give any of {', '.join(TRACKERS)}, separated by commas, or none")
    return [name for name in names if name != "none"]


def attention_name(text: str) -> str | None:
    """Argparse type: an attention implementation of transformers; ``auto`` leaves the choice to it."""
    return None if text == "auto" else text


@dataclass(frozen=True)
class DataSettings:
    """What is trained on."""

    train_file: str = setting("data/train/own_train.jsonl", help="preference records: files, folders, hub sets, a mix")
    negatives: str = setting("all", choices=NEGATIVES, help="original: without the bias-injected answers")
    max_rejected: int = setting(0, check=natural, help="rejected answers of a group that an epoch sees; 0: all")
    max_length: int = setting(1024, check=natural, help="tokens of a conversation; 0: no limit")
    overlength: str = setting("drop", choices=OVERLENGTH_POLICIES, help="what becomes of longer conversations")
    limit: int = setting(0, check=natural, help="only the first N records of each source; 0: all")
    max_bad_rows: int = setting(0, check=natural, help="bad rows that each source may have")
    cache_dir: str = setting("output/cache", help="where tokenised data is kept")
    estimate: bool = setting(False, help="1: report on the data, train nothing")
    contamination_files: str = setting(
        EVALUATION_FILES, help="evaluation files that training questions are compared with, separated by commas"
    )
    fail_on_contamination: bool = setting(
        False, help="1: stop (before training too) where a training question meets one of them"
    )


@dataclass(frozen=True)
class HeldOutSettings:
    """What is not trained on, to measure by."""

    held_out_share: float | str = setting(
        "auto",
        check=share_or_auto,
        help="share of the training questions that is held out; auto: 5 %, at most 1000, none below 10; 0: none",
    )
    eval_file: str = setting("", help="held-out preference records instead of a split")
    bias_eval_dir: str = setting("", help="<bias>_bias.jsonl files that measure bias instead of injected answers")


@dataclass(frozen=True)
class Objective:
    """What is minimised, per group of one chosen answer c and rejected answers j (``codes.train.losses``).

    The weight of an answer is ``w_j = bias_weights[its bias]``, 1 where none is given. Its margin is
    ``m_j = base_j + bias_margins[its bias]`` (0 where none is given) in units of the score; ``base_j`` is the record's own
    ``margin`` where it has one, else ``margin`` in pairwise mode and 0 in contrastive mode. ``original`` names the answers
    into which no bias was injected.
    """

    mode: str = setting("contrastive", choices=MODES, help="the loss: one softmax a group, or its pairs one by one")
    temperature: float = setting(0.5, check=positive_float, help="contrastive mode")
    margin: float = setting(
        1.0, check=non_negative_float, help="pairwise mode, of answers without a margin of their own"
    )
    pairwise_loss: str = setting("hinge", choices=PAIRWISE_LOSSES, help="pairwise mode")
    bias_weights: Mapping[str, float] = setting(
        {}, check=bias_numbers, help="weights of rejected answers by injected bias: length=2,original=0.5"
    )
    bias_margins: Mapping[str, float] = setting(
        {}, check=bias_numbers, help="added to the margin of rejected answers: length=0.5"
    )
    row_margins: str = setting("use", choices=ROW_MARGINS, help="a record's own 'margin'")
    centering: float = setting(0.0, check=non_negative_float, help="coefficient that pulls scores towards 0; 0: off")
    label_smoothing: float = setting(0.0, check=share, help="share of labels that are taken to be wrong")


@dataclass(frozen=True)
class OptimizerSettings:
    """Steps, learning rate and AdamW."""

    learning_rate: float = setting(5e-6, check=positive_float, help="after the warm-up; it falls to 0 linearly")
    weight_decay: float = setting(0.01, check=non_negative_float, help="of AdamW, not for norms and biases")
    warmup_steps: int = setting(100, check=natural, help="steps of linear warm-up; a tenth of a run that is too short")
    epochs: int = setting(2, check=positive, help="passes over the data")
    max_steps: int = setting(0, check=natural, help="steps instead; 0: as many as the epochs need")
    global_batch_size: int = setting(64, check=positive, help="groups of an optimizer step, over all processes")
    max_grad_norm: float = setting(1.0, check=positive_float, help="longer gradients are shortened to it")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

    model_path: str = setting("embedded", help="alias 'embedded', model folder or hub id")
    chat_template: str = setting("", help=TEMPLATE_HELP)
    attn_implementation: str | None = setting(
        None, check=attention_name, help="sdpa, eager or flash_attention_2; auto: what transformers chooses"
    )
    trust_remote_code: bool = setting(False, help="1: run code that the model's folder brings")
    lora_rank: int = setting(0, check=natural, help="of an adapter; 0: train all weights")
    lora_alpha: int = setting(32, check=positive, help="the adapter counts alpha / rank")
    lora_dropout: float = setting(0.0, check=share, help="of the adapter")
    lora_target_modules: str = setting("all-linear", help="all-linear, or names: q_proj,v_proj")
    merge_lora: bool = setting(True, help="0: save the adapter alone")


@dataclass(frozen=True)
class ComputeSettings:
    """How it is computed; none of it changes what is learned."""

    max_tokens_per_batch: int = setting(0, check=natural, help="computed tokens of a forward pass; 0: automatic")
    micro_batch_size: int = setting(0, check=natural, help="most groups of a forward pass; 0: the token budget alone")
    packing: str = setting(
        "auto", choices=PACKINGS, help="auto: packs with shared prefixes if possible; off: padded rows"
    )
    precision: str = setting("auto", choices=PRECISIONS, help="auto: bf16 where the hardware multiplies it")
    gradient_checkpointing: bool = setting(False, help="1: less memory, about a third slower")


@dataclass(frozen=True)
class CheckpointSettings:
    """When a run is saved on the way, and from where it goes on."""

    save_steps: int = setting(0, check=natural, help="steps between checkpoints; 0: not by steps")
    save_minutes: float = setting(
        0.0, check=non_negative_float, help="a checkpoint at least this often; 0: not by time"
    )
    keep_checkpoints: int = setting(2, check=positive, help="the newest ones")
    resume: str = setting("none", help="none, auto (the newest checkpoint), or a checkpoint folder")


@dataclass(frozen=True)
class EvaluationSettings:
    """When a run is evaluated on held-out data, and which weights are the best."""

    eval_steps: int | str = setting(
        "auto",
        check=natural_or_auto,
        help=f"steps between evaluations on held-out data; auto: {EVALUATIONS_A_RUN} a run; 0: only at the end",
    )
    eval_on_start: bool = setting(False, help="1: evaluate the untrained model too")
    metric_for_best: str = setting(
        DEFAULT_METRIC,
        help=f"{DEFAULT_METRIC} (accuracy x (1 - BSR)), accuracy, accuracy_all, loss, score_gap, original_accuracy, bsr, "
        "bsr/<bias>, ...; none: no best checkpoint is kept",
    )
    load_best_at_end: bool = setting(False, help="1: the final folder holds the best weights")
    early_stopping_patience: int = setting(0, check=natural, help="evaluations without a better one; 0: never stop")


@dataclass(frozen=True)
class ReportSettings:
    """What is said of a run."""

    logging_steps: int = setting(1, check=positive, help="steps between lines of train_log.jsonl")
    report_to: list[str] = setting(
        ["tensorboard"],
        check=tracker_names,
        help=f"comma-separated: {', '.join(TRACKERS)}; none: the JSONL logs alone",
    )
    reward_stats_groups: int = setting(256, check=natural, help="groups that give reward_mean and reward_std; 0: none")


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run."""

    output_dir: str = setting("output/contrastive", help="where the model goes")
    seed: int = setting(42, check=natural, help="of the order, the draws, a new score head and dropout")
    data: DataSettings = part(DataSettings)
    held_out: HeldOutSettings = part(HeldOutSettings)
    objective: Objective = part(Objective)
    optimizer: OptimizerSettings = part(OptimizerSettings)
    model: ModelSettings = part(ModelSettings)
    compute: ComputeSettings = part(ComputeSettings)
    checkpoints: CheckpointSettings = part(CheckpointSettings)
    evaluation: EvaluationSettings = part(EvaluationSettings)
    report: ReportSettings = part(ReportSettings)
