"""What a finished run says of itself: the scale of its scores, ``train_summary.json``, the model card and the curves.

The model is saved when this begins: each failure here is a warning.
Used by ``python -m codes.train.train_reward_model``; the card's text is ``model_card_template.md``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard, ModelCardData

from codes.common.base_model import EMBEDDED_NAME, is_embedded
from codes.common.errors import optional
from codes.common.records import write_json, write_text
from codes.common.reporting import run_metadata
from codes.common.settings import flag_values
from codes.train.batches import BatchPlan
from codes.train.checkpoints import EARLIER_FOLDER, SUMMARY_FILE
from codes.train.engine import LoadedModel, Schedule
from codes.train.evaluation import HeldOutEvaluation
from codes.train.held_out import HeldOutRecords, HeldOutSet, print_held_out
from codes.train.lora import trained_share
from codes.train.plots import draw_training_curves
from codes.train.reward_model import copy_reward_model, record_reward_scale
from codes.train.settings import TrainSettings
from codes.train.trainer import Trainer
from codes.train.training_data import TrainingData, describe_data

# "/home/me/data/" of "/home/me/data/train.jsonl"; not of an address, and not of a relative path.
ABSOLUTE_FOLDERS = re.compile(r"(?<![\w.:/~-])~?/(?:[^,/\n]+/)*")
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_NAME}"
CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Figures of the held-out data that the card shows.
CARD_METRICS = ("accuracy", "accuracy_all", "loss", "score_gap", "original_accuracy", "bsr", "constrained_accuracy")


def run_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Flag -> value of a run, as ``train_args.json``, the trackers and the card show it."""
    values = flag_values(settings)
    del values["estimate"]  # 0 in every run that trains
    return values


def print_run(
    settings: TrainSettings,
    loaded: LoadedModel,
    data: TrainingData,
    plan: BatchPlan,
    schedule: Schedule,
    held_out_records: HeldOutRecords | None,
    held_out: HeldOutSet | None,
) -> None:
    """What a run says before its first step: its data, its batches, and where a setting was not taken as it was given."""
    print("\n".join(describe_data(data)), flush=True)
    print_held_out(held_out_records, held_out)
    counts = data.draws.epoch_counts()
    computed = int(np.asarray(plan.costs)[: counts["n_groups"]].sum())
    lines = [
        f"packing {plan.packing}: {computed} computed tokens an epoch for {counts['n_tokens']} tokens of texts; "
        f"{plan.micro_steps} micro-batches a step on each of {plan.world_size} processes, up to {plan.max_tokens} tokens each"
    ]
    if loaded.lora is not None:
        n_trained, n_all = trained_share(loaded.model)
        lines.append(f"LoRA of rank {loaded.lora.rank}: {n_trained} of {n_all} parameters are trained")
    if data.max_length != (settings.data.max_length or None):
        lines.append(f"max_length is {data.max_length}, the model's own limit, instead of {settings.data.max_length}")
    if schedule.warmup_steps != settings.optimizer.warmup_steps:
        lines.append(
            f"warm-up takes {schedule.warmup_steps} of the {schedule.total_steps} steps instead of "
            f"{settings.optimizer.warmup_steps}, which would never reach the learning rate"
        )
    print("\n".join(lines), flush=True)


def report_run(trainer: Trainer, data: TrainingData, held_out: HeldOutRecords | None, *, text_pairs: bool) -> None:
    """Put the best weights in place if asked for, and write everything that is said of the model. Every rank calls it.

    Args:
        text_pairs: The model has no chat template.
    """
    evaluation, folder = trainer.evaluation, trainer.output_dir
    adopted = adopt_best(trainer) if trainer.settings.evaluation.load_best_at_end else None
    stats = None
    if adopted is None:
        # Of several ranks one that goes on alone would leave the others waiting for ever.
        is_alone = trainer.accelerator.num_processes == 1
        with optional("reward_mean and reward_std") if is_alone else nullcontext():
            n_groups, n_drawn = data.draws.epoch_counts()["n_groups"], trainer.settings.report.reward_stats_groups
            drawn = np.random.default_rng(trainer.settings.seed).permutation(n_groups)[:n_drawn]
            stats = reward_statistics(trainer.accelerator, trainer.model, trainer.plan, sorted(drawn.tolist()))
    if not trainer.accelerator.is_main_process:
        return
    with optional(SUMMARY_FILE):
        summary = training_summary(trainer, data, time.perf_counter() - trainer.started)
        summary |= {"text_pairs": text_pairs} | reward_scale(stats, evaluation, adopted)
        summary |= {"fingerprint": trainer.fingerprint} | held_out_summary(held_out, evaluation, adopted_step=adopted)
        describe_model(folder, run_arguments(trainer.settings), summary, trainer)
    if evaluation is not None:
        with optional("removing best-* folders"):
            # The folder of the run may hold these weights itself.
            is_there = evaluation.best_step in (adopted, trainer.step)
            evaluation.folder.keep_only(None if is_there else evaluation.best_step)


def adopt_best(trainer: Trainer) -> int | None:
    """Put the best weights in the place of the last step's. Every rank calls it.

    Returns:
        Their step; None where the last step's weights stay: they are the best ones, or the others could not be copied.
    """
    evaluation = trainer.evaluation
    best = None if evaluation is None else evaluation.best_step
    if evaluation is None or best is None or best == trainer.step:
        return None
    adopted: list[int | None] = [None]
    if trainer.accelerator.is_main_process:
        with optional(f"putting the weights of best-{best} in the place of the last step's"):
            copy_reward_model(evaluation.folder.path(best), trainer.output_dir)
            adopted = [best]
    return broadcast_object_list(adopted)[0]


# --- the scale of the scores ---


@dataclass(frozen=True)
class RewardStats:
    """Of the raw scores of ``n`` texts; ``std`` with n - 1."""

    mean: float
    std: float
    n: int


def reward_statistics(
    accelerator: Accelerator, model: torch.nn.Module, plan: BatchPlan, chosen: Sequence[int]
) -> RewardStats | None:
    """Score all texts of some groups with the model as it stands. Collective: every rank takes part.

    Args:
        chosen: Indices of the groups.

    Returns:
        None where no group was chosen.
    """
    if not chosen:
        return None
    plan = replace(plan, steps=[list(chosen)], micro_batch_size=0)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in plan.micro_batches(plan.steps[0], accelerator.process_index):
            _, scores, sizes, weights = plan.score(model, batch, accelerator.device)
            # A group that only fills a place counts nothing.
            counts = torch.repeat_interleave(weights, sizes.to(weights.device)).double()
            values = scores.double()
            sums += torch.stack([counts.sum(), (counts * values).sum(), (counts * values.square()).sum()])
    model.train(was_training)
    n, total, squares = accelerator.reduce(sums, reduction="sum").tolist()
    mean = total / n
    variance = max(0.0, squares - n * mean * mean) / max(1.0, n - 1)
    return RewardStats(mean=mean, std=math.sqrt(variance), n=round(n))


def reward_scale(
    stats: RewardStats | None, evaluation: HeldOutEvaluation | None, adopted: int | None
) -> dict[str, Any]:
    """``reward_mean``, ``reward_std`` and ``reward_n`` of the weights that were saved."""
    if stats is not None:
        return {"reward_mean": stats.mean, "reward_std": stats.std, "reward_n": stats.n}
    if evaluation is None or adopted is None:
        return {}
    # The weights in memory are not those that were saved: theirs were measured on held-out data.
    at_best = next(entry for entry in evaluation.evaluations if entry["step"] == adopted)
    n_texts = sum(1 + len(group.rejected) for group in evaluation.held_out.groups)
    scale = {"reward_mean": at_best.get("eval/score_mean"), "reward_std": at_best.get("eval/score_std")}
    return scale | {"reward_n": n_texts}


# --- the summary ---


def training_summary(trainer: Trainer, data: TrainingData, seconds: float) -> dict[str, Any]:
    """``train_summary.json``: steps, data, losses, rates and versions."""
    log = trainer.log
    tokens = sum(entry["tokens"] for entry in log)
    step_seconds = sum(entry["seconds"] for entry in log)
    metadata = run_metadata()
    for name in ("deepspeed", "peft"):
        with suppress(PackageNotFoundError):  # one process needs no DeepSpeed
            metadata["versions"][name] = version(name)
    return {
        "steps": trainer.step,
        "groups": data.report.n_groups,
        "data": asdict(data.report),
        "train_file_sha256": data.sha256,
        "first_loss": log[0]["train/loss"] if log else None,
        "last_loss": log[-1]["train/loss"] if log else None,
        "last_accuracy": log[-1]["train/accuracy"] if log else None,
        "tokens": tokens,
        "tokens_per_second": tokens / step_seconds if step_seconds else None,
        "wall_seconds": seconds,
        "metadata": metadata | {"seed": trainer.settings.seed},
        "verdicts": data.verdicts,
        "n_bad_rows": len(data.bad),
        "max_length": data.max_length,
        "sources": data.source_rows(),
        "epoch": data.draws.epoch_counts(),
        "groups_per_source": data.origins,
        "rejected_per_bias": data.biases,
    }


def held_out_summary(
    data: HeldOutRecords | None, evaluation: HeldOutEvaluation | None, *, adopted_step: int | None
) -> dict[str, Any]:
    """What ``train_summary.json`` says of held-out data; empty without any.

    Args:
        adopted_step: The step whose weights the final folder holds; None: the last one's.
    """
    if data is None or evaluation is None or not evaluation.evaluations:
        return {}
    last, best = evaluation.evaluations[-1], evaluation.best
    saved = next((entry for entry in evaluation.evaluations if entry["step"] == adopted_step), last)
    return {
        "held_out": {
            "data": data.report,
            "counts": evaluation.held_out.counts,
            "metric_for_best": None if evaluation.ranking is None else evaluation.ranking.metric,
            "best": None if best is None else dict(best),
            "last": last,
            "step_of_saved_weights": saved["step"],
            "stopped_early": evaluation.should_stop,
        },
        "metrics": {
            f"held out: {name}": saved[f"eval/{name}"] for name in CARD_METRICS if saved.get(f"eval/{name}") is not None
        },
    }


def describe_model(folder: Path, arguments: dict[str, Any], summary: dict[str, Any], trainer: Trainer) -> None:
    """What is said of a saved model; each failure is a warning. The summary last: with it a run counts as finished."""
    if summary.get("reward_mean") is not None and summary.get("reward_std") is not None:
        with optional("reward_mean and reward_std in config.json"):
            record_reward_scale(folder, summary["reward_mean"], summary["reward_std"])
    with optional("the model card"):
        write_text(folder / "README.md", model_card(arguments, summary))
    evaluation = trainer.evaluation
    with optional("the learning curves"):
        draw_training_curves(
            trainer.log,
            [] if evaluation is None else evaluation.evaluations,
            folder,
            best_step=None if evaluation is None else evaluation.best_step,
        )
    write_json(folder / SUMMARY_FILE, summary)
    shutil.rmtree(folder / EARLIER_FOLDER, ignore_errors=True)


# --- the model card ---


def base_of(model_path: str) -> tuple[str, str | None]:
    """Name and licence of the base model; the licence is what its own card says, None where it says nothing."""
    if is_embedded(model_path):
        return EMBEDDED_HUB_ID, "apache-2.0"
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return model_path, None
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2] if card.is_file() else []
    licence = re.search(r"^license:\s*(\S+)\s*$", head[0], re.M) if head else None
    return folder.resolve().name, licence.group(1) if licence else None


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be looked up on the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def model_card(arguments: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """``README.md`` of the model's folder: data, arguments, metrics, versions, and how to load it.

    Args:
        arguments: Of the run, as in ``train_args.json``.
        summary: Of the run, as in ``train_summary.json``; what it lacks is left out of the card.
    """
    base, licence = base_of(str(arguments["model_path"]))
    arguments = {name: _without_folders(value) for name, value in arguments.items()}
    lora = int(arguments.get("lora_rank") or 0)
    adapter_only = bool(lora) and not arguments.get("merge_lora", True)
    saved_step = summary.get("held_out", {}).get("step_of_saved_weights", summary["steps"])
    header = ModelCardData(
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "contrastrm"],
        base_model=base if is_hub_id(base) else None,
        license=licence,
    )
    counts = (("source", "groups", "groups_per_source"), ("bias", "rejected answers", "rejected_per_bias"))
    card = ModelCard.from_template(
        header,
        template_path=str(CARD_TEMPLATE),
        arguments=arguments,
        summary=summary,
        base=base,
        licence=licence,
        lora=lora,
        adapter_only=adapter_only,
        has_scale=summary.get("reward_mean") is not None and summary.get("reward_std") is not None,
        saved_step=saved_step,
        is_last=saved_step == summary["steps"],
        counts=[(name, what, _rows((summary.get(key) or {}).items())) for name, what, key in counts],
        metrics=_rows(_metrics(summary)),
        argument_rows=_rows(sorted(arguments.items())),
        versions=_rows(_versions(summary)),
    )
    return f"{card}".rstrip("\n") + "\n"


def _metrics(summary: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    named = {
        "loss of the first step": summary.get("first_loss"),
        "loss of the last step": summary.get("last_loss"),
        "accuracy of the last step (training data)": summary.get("last_accuracy"),
        **(summary.get("metrics") or {}),
    }
    return (
        (name, f"{value:.4f}" if isinstance(value, float) else value)
        for name, value in named.items()
        if value is not None
    )


def _versions(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    metadata = summary.get("metadata") or {}
    commit = metadata.get("git_commit")
    changed = " with uncommitted changes" if metadata.get("git_uncommitted_changes") else ""
    rows = [("ContrastRM commit", f"{commit}{changed}")] if commit else []
    return [*rows, *sorted((metadata.get("versions") or {}).items())]


def _rows(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Cells that cannot break a table, without folders: cards are published, and where things lay is nobody's business."""
    return [(_cell(_without_folders(name)), _cell(value)) for name, value in rows]


def _without_folders(value: Any) -> Any:
    """Absolute paths by their last part."""
    return ABSOLUTE_FOLDERS.sub("", value) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
