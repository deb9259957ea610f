"""Train a reward model on groups of one chosen and many rejected answers.

Reads: preference records (``codes.train.sources`` says from where). Writes: ``<output_dir>/`` (a plain Hugging Face folder
with model card), ``train_log.jsonl``, ``eval_log.jsonl``, ``training_curves.*``, ``train_args.json``, ``train_summary.json``,
``checkpoint-<step>/`` and ``best-<step>/`` folders, ``held_out.jsonl`` and ``tensorboard/``.
Run: ``python -m codes.train.train_reward_model --train_file data/train/own_train.jsonl --output_dir output/contrastive``
(with DeepSpeed: ``bash run_training.sh``).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from codes.common.base_model import resolve_model_path
from codes.common.chat import OVERLENGTH_POLICIES, TEMPLATE_HELP, ChatFormatter
from codes.common.cli import (
    EXIT_STOPPED,
    is_first_process,
    launched_processes,
    natural,
    non_negative_float,
    positive,
    positive_float,
    run,
)
from codes.common.errors import ContrastRMError, optional
from codes.common.records import ensure_writable_folder, write_json, write_jsonl, write_text
from codes.common.scoring import PACKINGS, Scorer, resolve_packing
from codes.train.batches import count_micro_steps
from codes.train.best_checkpoint import BEST_FILE, BestFolder, add_best_checkpoint_arguments, resolve_ranking
from codes.train.checkpoints import (
    EARLIER_FOLDER,
    SUMMARY_FILE,
    add_checkpoint_arguments,
    choose_checkpoint,
    engine_fingerprint,
    ensure_space,
    frozen_digest,
    hold_folder,
    is_finished,
    make_way,
    recorded_budget,
    remove_unfinished,
    what_is_left,
)
from codes.train.contamination import CONTAMINATION_FILE, check_contamination, expand_files
from codes.train.data_utils import NEGATIVES
from codes.train.divergence import REPORT_FILE
from codes.train.engine import (
    PRECISIONS,
    confirm_packing,
    keeps_master_weights,
    make_accelerator,
    prepare,
    resolve_precision,
    set_accumulation,
    smallest_of_ranks,
    under_deepspeed,
)
from codes.train.estimate import estimate, stop_on_contamination
from codes.train.held_out import (
    HELD_OUT_FILE,
    add_held_out_arguments,
    aside_of,
    encode_held_out,
    gather_held_out,
    print_held_out,
    split_questions,
)
from codes.train.lora import ADAPTER_FOLDER, add_lora_arguments, lora_settings, trained_share
from codes.train.memory import choose_token_budget, device_bytes, training_state_bytes, zero_config
from codes.train.model_card import model_card, training_summary
from codes.train.objective import MODES, Objective, add_objective_arguments, take_objective
from codes.train.plots import CURVES, draw_training_curves
from codes.train.reward_model import (
    copy_reward_model,
    embedding_rows,
    load_reward_model,
    record_reward_scale,
    save_reward_model,
    saved_bytes,
)
from codes.train.reward_stats import RewardStats, reward_statistics
from codes.train.signals import RunStopped, StopSignals, failures_told, tell_launcher
from codes.train.sources import parse_sources
from codes.train.tracking import Trackers, add_tracking_arguments, check_trackers
from codes.train.trainer import LOG_FILE, Schedule, Trainer, warmup_in_force
from codes.train.training_data import add_data_arguments, describe_data, open_training_data
from codes.train.trial import try_token_budget
from codes.train.watch import EVAL_LOG_FILE, Watch, add_watch_arguments, held_out_summary, resolve_eval_steps

ARGUMENTS_FILE = "train_args.json"
# What the data and its computed tokens depend on.
ESTIMATED = (
    "model_path", "train_file", "output_dir", "negatives", "epochs", "max_steps", "max_length", "overlength",
    "global_batch_size", "micro_batch_size", "max_tokens_per_batch", "seed", "limit", "max_bad_rows", "max_rejected",
    "cache_dir", "contamination_files", "fail_on_contamination", "trust_remote_code", "held_out_share", "eval_file",
    "bias_eval_dir", "chat_template",
)  # fmt: skip
# What a run writes beside its model and summary that could pass for another run's.
OF_A_RUN = (
    LOG_FILE, EVAL_LOG_FILE, HELD_OUT_FILE, BEST_FILE, REPORT_FILE, ARGUMENTS_FILE, f"{CURVES}.*", "best-*",
)  # fmt: skip


def train(
    *,
    model_path: str,
    train_file: str,
    output_dir: str,
    objective: Objective,
    negatives: str,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    epochs: int,
    max_steps: int,
    max_length: int,
    overlength: str,
    global_batch_size: int,
    micro_batch_size: int,
    max_tokens_per_batch: int,
    packing: str,
    max_grad_norm: float,
    precision: str,
    gradient_checkpointing: bool,
    seed: int,
    save_steps: int,
    save_minutes: float,
    keep_checkpoints: int,
    resume: str,
    logging_steps: int,
    limit: int,
    max_bad_rows: int,
    max_rejected: int,
    cache_dir: str,
    contamination_files: str,
    fail_on_contamination: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
    chat_template: str = "",
    lora_rank: int = 0,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str = "all-linear",
    merge_lora: bool = True,
    reward_stats_groups: int = 256,
    held_out_share: float | str = 0,
    eval_file: str = "",
    bias_eval_dir: str = "",
    eval_steps: int | str = "auto",
    eval_on_start: bool = False,
    metric_for_best: str = "constrained_accuracy",
    load_best_at_end: bool = False,
    early_stopping_patience: int = 0,
    report_to: Sequence[str] = (),
    stop: StopSignals | None = None,
    try_budget: bool | None = None,
) -> Path:
    """Train and save; the arguments are the command line's (``--help``).

    Args:
        stop: Where a request to stop is noted.
        try_budget: Whether a token budget that is chosen here is tried first; None: on a GPU (on a CPU it is a cache's size, and
            a trial takes as long as a step).

    Returns:
        The folder of the finished model.

    Raises:
        ContrastRMError: Anything that the user can mend.
        RunStopped: As asked; a checkpoint holds everything.
    """
    not_flags = ("objective", "stop", "try_budget")
    arguments = {key: value for key, value in locals().items() if key not in not_flags} | asdict(objective)
    started = time.perf_counter()
    folder = ensure_writable_folder(output_dir)
    check_model_is_elsewhere(model_path, folder)
    check_trackers(report_to)
    zero_config()  # one that is unusable shows now, not when the weights are loaded
    # Before the weights are loaded: a bad row shows at once.
    split = split_questions(
        parse_sources(train_file),
        share=held_out_share,
        eval_file=eval_file,
        bias_eval_dir=bias_eval_dir,
        seed=seed,
        max_bad_rows=max_bad_rows,
        limit=limit,
        cache_dir=cache_dir,
    )
    data = open_training_data(
        train_file=train_file,
        model_path=model_path,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
        max_length=max_length,
        overlength=overlength,
        negatives=negatives,
        objective=objective,
        max_rejected=max_rejected,
        global_batch_size=global_batch_size,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        limit=limit,
        max_bad_rows=max_bad_rows,
        cache_dir=cache_dir,
        aside=aside_of(split),
    )
    held_out_records = gather_held_out(
        data.sources,
        split,
        aside_file=data.cache.aside_file,
        eval_file=eval_file,
        bias_eval_dir=bias_eval_dir,
        max_bad_rows=max_bad_rows,
        limit=limit,
    )
    # On every rank: where one alone stops, the others wait for it.
    if fail_on_contamination:
        found = check_contamination(
            data.sources,
            expand_files(contamination_files),
            folder / CONTAMINATION_FILE,
            max_bad_rows=max_bad_rows,
            limit=limit,
        )
        stop_on_contamination(found, fail=True)
    precision = resolve_precision(precision)
    world_size = launched_processes()
    # Loaded before the accelerator exists: under ZeRO-3 transformers would build the model in pieces already, and a new
    # score head needs its shape. DeepSpeed splits the weights when it takes the model over.
    master_weights = keeps_master_weights(precision)
    model, tokenizer = load_reward_model(
        model_path,
        # DeepSpeed keeps float32 masters of bf16 weights, and so do we in one process; elsewhere the weights are the masters.
        dtype="bfloat16" if precision == "bf16" and (master_weights or under_deepspeed()) else "float32",
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        require_head=False,
        seed=seed,
        chat_template=chat_template,
    )
    lora = lora_settings(
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        target_modules=lora_target_modules,
        merge=merge_lora,
        base_model=resolve_model_path(model_path),
        seed=seed,
    )
    if lora is not None:
        model.add_lora(lora)
    formatter = ChatFormatter(
        tokenizer,
        max_length=data.max_length,
        overlength=overlength,
        n_embeddings=embedding_rows(model.classifier, tokenizer),
    )
    held_out = (
        None
        if held_out_records is None
        else encode_held_out(
            held_out_records,
            formatter,
            negatives=negatives,
            max_rejected=max_rejected,
            max_bad_rows=max_bad_rows,
        )
    )
    ranking = resolve_ranking(
        held_out, metric_for_best, patience=early_stopping_patience, load_best_at_end=load_best_at_end
    )
    draws, total_steps = data.draws, data.draws.total_steps
    schedule = Schedule(learning_rate, warmup_in_force(warmup_steps, total_steps), total_steps)
    wanted_packing, packing = packing, resolve_packing(model, packing)
    rope = model.rope_limit
    if rope is not None and (data.max_length is None or data.max_length > rope.tokens) and is_first_process():
        print(
            f"note: the rotary embedding of this model changes with the longest text of a micro-batch beyond {rope.tokens} "
            f"tokens; --max_length {rope.tokens} keeps a group's loss independent of its neighbours",
            file=sys.stderr,
        )
    accelerator = make_accelerator(precision="fp32" if master_weights else precision)
    if accelerator.num_processes != world_size:
        raise ContrastRMError(
            f"the launcher started {world_size} processes, accelerate sees {accelerator.num_processes}; "
            "start with bash run_training.sh"
        )
    if packing != "off" and accelerator.device.type == "cuda":
        packing = confirm_packing(model, packing, accelerator, wanted=wanted_packing, precision=precision)
    costs = draws.costs(packing)
    fingerprint = {
        **data.fingerprint(),
        "model_path": model_path,
        "overlength": overlength,
        "negatives": negatives,
        "max_rejected": max_rejected,
        **asdict(objective),
        "global_batch_size": global_batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_steps": schedule.warmup_steps,
        "total_steps": total_steps,
        "max_grad_norm": max_grad_norm,
        "precision": precision,
        # Their checkpoints hold more than the others'.
        "master_weights": master_weights,
        "seed": seed,
        "lora": None if lora is None else [lora.rank, lora.alpha, lora.dropout, lora.target_modules],
        "frozen": frozen_digest(model),
        "held_out": None if held_out is None else held_out.digest,
        "metric_for_best": None if ranking is None else ranking.metric,
        **engine_fingerprint(accelerator),
    }
    if resume == "auto" and is_finished(folder, fingerprint):
        if accelerator.is_main_process:
            print(
                f"{folder} holds the finished model of this run ({total_steps} steps): nothing left to train",
                flush=True,
            )
        accelerator.end_training()
        return folder
    ensure_space(folder, saved_bytes(model))
    checkpoint = choose_checkpoint(accelerator, resume, folder)
    is_automatic, device = not max_tokens_per_batch, accelerator.device
    if is_automatic:
        max_tokens_per_batch = choose_token_budget(
            model,
            device,
            precision=precision,
            world_size=world_size,
            gradient_checkpointing=gradient_checkpointing,
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    made_for = {
        "packing": packing,
        "micro_batch_size": micro_batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "attn_implementation": attn_implementation,
        "world_size": world_size,
        "device_bytes": device_bytes(device),
        "state_bytes": training_state_bytes(model, precision=precision, world_size=world_size),
    }
    if is_automatic:
        if recorded := recorded_budget(checkpoint, made_for):
            max_tokens_per_batch = recorded
        elif device.type == "cuda" if try_budget is None else try_budget:
            max_tokens_per_batch = try_token_budget(
                model,
                draws,
                device,
                budget=max_tokens_per_batch,
                precision=precision,
                world_size=world_size,
                packing=packing,
                micro_batch_size=micro_batch_size,
                objective=objective,
                pad_id=tokenizer.pad_token_id,
            )
        max_tokens_per_batch = smallest_of_ranks(accelerator, max_tokens_per_batch)
    micro_steps = count_micro_steps(
        draws.plan,
        costs,
        max_tokens=max_tokens_per_batch,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        by_length=packing == "off",
    )
    set_accumulation(accelerator, micro_steps, max_grad_norm=max_grad_norm)
    set_seed(seed)
    if accelerator.is_main_process:
        print("\n".join(describe_data(data)), flush=True)
        print_held_out(held_out_records, held_out)
        counts = draws.epoch_counts()
        print(
            f"packing {packing}: {costs[: counts['n_groups']].sum()} computed tokens an epoch for {counts['n_tokens']} tokens "
            "of texts; "
            f"{micro_steps} micro-batches a step on each of {world_size} processes, up to {max_tokens_per_batch} tokens each",
            flush=True,
        )
        if lora is not None:
            n_trained, n_all = trained_share(model)
            print(f"LoRA of rank {lora.rank}: {n_trained} of {n_all} parameters are trained", flush=True)
        if data.max_length != (max_length or None):
            print(f"max_length is {data.max_length}, the model's own limit, instead of {max_length}", flush=True)
        if schedule.warmup_steps != warmup_steps:
            print(
                f"warm-up takes {schedule.warmup_steps} of the {total_steps} steps instead of {warmup_steps}, "
                "which would never reach the learning rate",
                flush=True,
            )
    prepared_model, prepared_optimizer = prepare(
        accelerator, model, learning_rate=learning_rate, weight_decay=weight_decay, master_weights=master_weights
    )
    trackers = Trackers(report_to if accelerator.is_main_process else (), folder)
    plain: Any = accelerator.unwrap_model(prepared_model)

    def save(target: Path) -> None:
        state_dict = accelerator.get_state_dict(prepared_model)  # collective: every rank takes part
        if accelerator.is_main_process:
            save_reward_model(plain, tokenizer, target, state_dict=state_dict)

    def save_finished() -> None:
        try:
            save(folder)
        except ContrastRMError as error:
            raise ContrastRMError(f"{error}; {what_is_left(folder)}") from error
        if accelerator.is_main_process:
            print(f"saved the reward model in {folder} ({time.perf_counter() - started:.0f} s)", flush=True)

    trainer = Trainer(
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        groups=draws,
        plan=draws.plan,
        costs=costs,
        n_tokens=draws.n_tokens,
        steps_per_epoch=draws.steps_per_epoch,
        packing=packing,
        objective=objective,
        schedule=schedule,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_tokens_per_batch=max_tokens_per_batch,
        max_grad_norm=max_grad_norm,
        seed=seed,
        pad_id=tokenizer.pad_token_id,
        output_dir=folder,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        logging_steps=logging_steps,
        fingerprint=fingerprint,
        save_minutes=save_minutes,
        stop=stop,
        trackers=trackers,
        token_budget={"tokens": max_tokens_per_batch, "made_for": made_for} if is_automatic else None,
        save_model=save_finished,
    )
    watch = None
    if held_out is not None:
        watch = Watch(
            accelerator=accelerator,
            scorer=Scorer(
                prepared_model,
                formatter,
                max_tokens_per_batch=max_tokens_per_batch,
                packing=packing,
                progress=accelerator.is_main_process,
                accelerator=accelerator,
            ),
            held_out=held_out,
            loss=objective.group_losses,
            output_dir=folder,
            every=resolve_eval_steps(eval_steps, total_steps),
            on_start=eval_on_start,
            ranking=ranking,
            patience=early_stopping_patience,
            save=save,
            trackers=trackers,
        )
        trainer.watch_with(watch)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    elif accelerator.is_main_process:
        make_way(folder, OF_A_RUN)
        BestFolder(folder).keep_only()
    if accelerator.is_main_process:
        remove_unfinished(folder)
        resolved = {"resolved_precision": precision, "world_size": world_size}
        write_json(folder / ARGUMENTS_FILE, arguments | resolved)
        if held_out_records is not None:
            write_jsonl(folder / HELD_OUT_FILE, (record.to_row() for record in held_out_records.records))
        trackers.start(first_step=trainer.step + 1 if checkpoint is not None else 0, config=arguments)
    accelerator.wait_for_everyone()
    try:
        trainer.train()
        # The model is saved. What follows can only add to it.
        adopted = adopt_best(accelerator, watch, folder, trainer.step) if load_best_at_end else None
        drawn = np.random.default_rng(seed).permutation(draws.epoch_counts()["n_groups"])[:reward_stats_groups]
        stats = None
        if adopted is None:
            # Of several ranks one that goes on alone would leave the others waiting for ever.
            with optional("reward_mean and reward_std") if accelerator.num_processes == 1 else nullcontext():
                stats = reward_statistics(
                    accelerator,
                    prepared_model,
                    draws,
                    sorted(drawn.tolist()),
                    costs,
                    packing=packing,
                    max_tokens_per_batch=max_tokens_per_batch,
                    pad_id=tokenizer.pad_token_id,
                )
        if accelerator.is_main_process:
            with optional(SUMMARY_FILE):
                summary = training_summary(trainer, data.report, data.sha256, time.perf_counter() - started)
                summary |= {"verdicts": data.verdicts, "n_bad_rows": len(data.bad), "max_length": data.max_length}
                summary |= {"text_pairs": not formatter.has_template}
                summary |= {"sources": data.source_rows(), "epoch": draws.epoch_counts()}
                summary |= {"groups_per_source": data.origins, "rejected_per_bias": data.biases}
                summary |= reward_scale(stats, watch, adopted) | {"fingerprint": trainer.fingerprint}
                summary |= held_out_summary(held_out_records, held_out, watch, adopted_step=adopted)
                describe_model(folder, arguments, summary, trainer, watch)
            if watch is not None:
                with optional("removing best-* folders"):
                    # The folder of the run may hold these weights itself.
                    is_there = watch.best_step in (adopted, trainer.step)
                    watch.folder.keep_only(None if is_there else watch.best_step)
    finally:
        trackers.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def adopt_best(accelerator: Accelerator, watch: Watch | None, folder: Path, last_step: int) -> int | None:
    """Put the best weights in the place of the last step's. Every rank calls it.

    Returns:
        Their step; None where the last step's weights stay: they are the best ones, or the others could not be copied.
    """
    best = None if watch is None else watch.best_step
    if watch is None or best is None or best == last_step:
        return None
    adopted: list[int | None] = [None]
    if accelerator.is_main_process:
        with optional(f"putting the weights of best-{best} in the place of the last step's"):
            copy_reward_model(watch.folder.path(best), folder)
            adopted = [best]
    return broadcast_object_list(adopted)[0]


def reward_scale(stats: RewardStats | None, watch: Watch | None, adopted: int | None) -> dict[str, Any]:
    """``reward_mean``, ``reward_std`` and ``reward_n`` of the weights that were saved."""
    if stats is not None:
        return {"reward_mean": stats.mean, "reward_std": stats.std, "reward_n": stats.n}
    if watch is None or adopted is None:
        return {}
    # The weights in memory are not those that were saved: theirs were measured on held-out data.
    at_best = next(entry for entry in watch.evaluations if entry["step"] == adopted)
    n_texts = sum(1 + len(group.rejected) for group in watch.held_out.groups)
    scale = {"reward_mean": at_best.get("eval/score_mean"), "reward_std": at_best.get("eval/score_std")}
    return scale | {"reward_n": n_texts}


def describe_model(
    folder: Path, arguments: dict[str, Any], summary: dict[str, Any], trainer: Trainer, watch: Watch | None
) -> None:
    """What is said of a saved model; each failure is a warning. The summary last: with it a run counts as finished."""
    if summary.get("reward_mean") is not None and summary.get("reward_std") is not None:
        with optional("reward_mean and reward_std in config.json"):
            record_reward_scale(folder, summary["reward_mean"], summary["reward_std"])
    with optional("the model card"):
        write_text(folder / "README.md", model_card(arguments, summary))
    with optional("the learning curves"):
        draw_training_curves(
            trainer.log,
            [] if watch is None else watch.evaluations,
            folder,
            best_step=None if watch is None else watch.best_step,
        )
    write_json(folder / SUMMARY_FILE, summary)
    shutil.rmtree(folder / EARLIER_FOLDER, ignore_errors=True)


def check_model_is_elsewhere(model_path: str, output_dir: Path) -> None:
    """A run replaces the model of an earlier run in its folder.

    Raises:
        ContrastRMError: That is the model that it would start from.
    """
    model, folder = Path(model_path).expanduser().resolve(), output_dir.resolve()
    top = model.relative_to(folder).parts[:1] if model.is_relative_to(folder) else ("elsewhere",)
    if not top or top[0] in (ADAPTER_FOLDER, EARLIER_FOLDER) or top[0].startswith("best-"):
        raise ContrastRMError(
            f"--model_path {model_path} lies in --output_dir {output_dir}, where the run would overwrite it: choose another "
            "--output_dir (to continue a run, keep its first --model_path and set --resume auto)"
        )


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module; each flag is the lower-cased shell variable of ``run_training.sh``."""
    parser = argparse.ArgumentParser(description="Train a reward model.")
    parser.add_argument("--model_path", default="embedded", help="alias 'embedded', model folder or hub id")
    parser.add_argument("--train_file", default="data/train/own_train.jsonl")
    parser.add_argument("--output_dir", default="output/contrastive")
    parser.add_argument("--mode", choices=MODES, default="contrastive")
    parser.add_argument("--negatives", choices=NEGATIVES, default="all", help="original: without injected answers")
    parser.add_argument("--temperature", type=positive_float, default=0.5, help="contrastive mode")
    parser.add_argument("--margin", type=non_negative_float, default=1.0, help="pairwise mode")
    parser.add_argument("--learning_rate", type=positive_float, default=5e-6)
    parser.add_argument("--weight_decay", type=non_negative_float, default=0.01)
    parser.add_argument("--warmup_steps", type=natural, default=100)
    parser.add_argument("--epochs", type=positive, default=2)
    parser.add_argument("--max_steps", type=natural, default=0, help="0: as many as the epochs need")
    parser.add_argument("--max_length", type=natural, default=1024, help="tokens of a conversation; 0: no limit")
    parser.add_argument("--overlength", choices=OVERLENGTH_POLICIES, default="drop")
    parser.add_argument("--global_batch_size", type=positive, default=64, help="groups of an optimizer step")
    parser.add_argument(
        "--micro_batch_size", type=natural, default=0, help="most groups at once; 0: the token budget alone"
    )
    parser.add_argument("--max_tokens_per_batch", type=natural, default=0, help="computed tokens at once; 0: automatic")
    parser.add_argument(
        "--packing", choices=PACKINGS, default="auto", help="auto: packs with shared prefixes if possible"
    )
    parser.add_argument("--max_grad_norm", type=positive_float, default=1.0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--gradient_checkpointing", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seed", type=natural, default=42)
    parser.add_argument("--save_steps", type=natural, default=0, help="0: no checkpoints on the way")
    parser.add_argument("--keep_checkpoints", type=positive, default=2)
    parser.add_argument("--resume", default="none", help="none, auto (the newest checkpoint), or a checkpoint folder")
    parser.add_argument("--logging_steps", type=positive, default=1)
    parser.add_argument("--limit", type=natural, default=0, help="only the first N records of each source; 0: all")
    parser.add_argument("--max_bad_rows", type=natural, default=0, help="bad rows that each source may have")
    parser.add_argument("--attn_implementation", default="auto", help="auto, sdpa, eager or flash_attention_2")
    parser.add_argument("--trust_remote_code", type=int, choices=(0, 1), default=0)
    add_data_arguments(parser)
    add_objective_arguments(parser)
    add_lora_arguments(parser)
    add_product_arguments(parser)
    add_checkpoint_arguments(parser)
    add_held_out_arguments(parser)
    add_watch_arguments(parser)
    add_best_checkpoint_arguments(parser)
    add_tracking_arguments(parser)
    return parser


def add_product_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of what is saved, and of how the model is run."""
    group = parser.add_argument_group("model")
    group.add_argument("--chat_template", default="", help=TEMPLATE_HELP)
    group.add_argument(
        "--reward_stats_groups", type=natural, default=256, help="groups that give reward_mean and reward_std; 0: none"
    )


def idle_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Flags that were changed and that another flag makes idle, each with the reason."""
    owners = (
        (args.mode == "contrastive", "--mode contrastive", ("margin", "pairwise_loss")),
        (args.mode == "pairwise", "--mode pairwise", ("temperature",)),
        (
            not args.lora_rank,
            "--lora_rank 0",
            ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora"),
        ),
    )
    return [
        f"--{name} {getattr(args, name)}: {owner} does not use it"
        for is_idle, owner, names in owners
        for name in names
        if is_idle and getattr(args, name) != parser.get_default(name)
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train, or report on the data; 75 where a signal stopped the run with a checkpoint."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if is_first_process():
        print("".join(f"no effect: {setting}\n" for setting in idle_flags(args, parser)), end="", flush=True)
    options = vars(args)
    if options["attn_implementation"] == "auto":
        options["attn_implementation"] = None
    objective = take_objective(options)
    switches = ("gradient_checkpointing", "trust_remote_code", "merge_lora", "eval_on_start")
    for name in (*switches, "load_best_at_end", "estimate", "fail_on_contamination"):
        options[name] = bool(options[name])
    if options.pop("estimate"):
        if is_first_process():
            estimate(objective=objective, **{name: options[name] for name in ESTIMATED})
        return 0
    try:
        with StopSignals() as stop, failures_told(), hold_folder(options["output_dir"]):
            train(objective=objective, stop=stop, **options)
    except RunStopped as stopped:
        if is_first_process():
            print(stopped, flush=True)
        # A launcher would make a failure of it, with a traceback; its shell is told instead.
        return 0 if tell_launcher(f"exit {EXIT_STOPPED}") else EXIT_STOPPED
    return 0


if __name__ == "__main__":
    run(main)
