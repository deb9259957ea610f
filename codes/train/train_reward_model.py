"""Train a reward model on groups of one chosen and many rejected answers.

Reads: preference records (JSONL). Writes: ``<output_dir>/`` (a plain Hugging Face folder with model card),
``train_log.jsonl``, ``train_args.json``, ``train_summary.json`` and ``checkpoint-<step>/`` folders.
Run: ``python -m codes.train.train_reward_model --train_file data/train/own_train.jsonl --output_dir output/contrastive``
(with DeepSpeed: ``bash run_training.sh``).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed

from codes.common.base_model import resolve_model_path
from codes.common.chat import OVERLENGTH_POLICIES, ChatFormatter
from codes.common.cli import natural, non_negative_float, positive, positive_float, run
from codes.common.errors import ContrastRMError
from codes.common.records import ensure_writable_folder, file_sha256, read_preference_file, write_json
from codes.common.scoring import PACKINGS, resolve_packing
from codes.train.checkpoints import choose_checkpoint, remove_unfinished
from codes.train.data_utils import NEGATIVES, EncodeReport, count_micro_steps, encode_groups, group_costs
from codes.train.engine import (
    PRECISIONS,
    check_same_micro_steps,
    compile_backbone,
    keeps_master_weights,
    make_accelerator,
    prepare,
    resolve_precision,
    training_device,
    under_deepspeed,
)
from codes.train.lora import add_lora_arguments, lora_settings, trained_share
from codes.train.memory import choose_token_budget
from codes.train.model_card import data_counts, model_card, training_summary
from codes.train.reward_model import load_reward_model, own_length_limit, save_reward_model
from codes.train.reward_stats import reward_statistics
from codes.train.trainer import LOG_FILE, MODES, Objective, Schedule, Trainer, plan_steps, warmup_in_force


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
    keep_checkpoints: int,
    resume: str,
    logging_steps: int,
    limit: int,
    max_bad_rows: int,
    attn_implementation: str | None,
    trust_remote_code: bool,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str = "all-linear",
    merge_lora: bool = True,
    torch_compile: bool = False,
    reward_stats_groups: int = 256,
) -> Path:
    """Train and save; the arguments are the command line's (``--help``).

    Returns:
        The folder of the finished model.

    Raises:
        ContrastRMError: Anything that the user can mend.
    """
    arguments = {key: value for key, value in locals().items() if key != "objective"} | asdict(objective)
    started = time.perf_counter()
    folder = ensure_writable_folder(output_dir)
    records, report = read_preference_file(train_file, max_bad_rows=max_bad_rows)
    records = records[:limit] if limit else records
    precision = resolve_precision(precision)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
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
    own_limit = own_length_limit(model, tokenizer)
    limit_in_force = min((length for length in (max_length, own_limit) if length), default=None)
    formatter = ChatFormatter(tokenizer, max_length=limit_in_force, overlength=overlength)
    groups, encode_report = encode_groups(records, formatter, negatives=negatives)
    total_steps = max_steps or epochs * math.ceil(len(groups) / global_batch_size)
    schedule = Schedule(learning_rate, warmup_in_force(warmup_steps, total_steps), total_steps)
    packing = resolve_packing(model, packing)
    if torch_compile:
        compile_backbone(model, packing=packing, device=training_device())
    plan, costs = plan_steps(len(groups), global_batch_size, total_steps, seed), group_costs(groups, packing)
    max_tokens_per_batch = max_tokens_per_batch or choose_token_budget(
        model,
        training_device(),
        precision=precision,
        world_size=world_size,
        gradient_checkpointing=gradient_checkpointing,
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    micro_steps = count_micro_steps(
        plan,
        costs,
        max_tokens=max_tokens_per_batch,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        by_length=packing == "off",
    )
    accelerator = make_accelerator(
        precision="fp32" if master_weights else precision, accumulation=micro_steps, max_grad_norm=max_grad_norm
    )
    if accelerator.num_processes != world_size:
        raise ContrastRMError(
            f"the launcher started {world_size} processes, accelerate sees {accelerator.num_processes}; "
            "start with bash run_training.sh"
        )
    check_same_micro_steps(accelerator, micro_steps)
    set_seed(seed)
    verdicts = dict(Counter(record.verify_correctness or "none" for record in records))
    if accelerator.is_main_process:
        _print_data(train_file, report.bad, encode_report, verdicts)
        print(
            f"packing {packing}: {sum(costs)} computed tokens an epoch for {encode_report.n_tokens} tokens of texts; "
            f"{micro_steps} micro-batches a step on each of {world_size} processes, up to {max_tokens_per_batch} tokens each",
            flush=True,
        )
        if lora is not None:
            n_trained, n_all = trained_share(model)
            print(f"LoRA of rank {lora.rank}: {n_trained} of {n_all} parameters are trained", flush=True)
        if limit_in_force != (max_length or None):
            print(f"max_length is {limit_in_force}, the model's own limit, instead of {max_length}", flush=True)
        if schedule.warmup_steps != warmup_steps:
            print(
                f"warm-up takes {schedule.warmup_steps} of the {total_steps} steps instead of {warmup_steps}, "
                "which would never reach the learning rate",
                flush=True,
            )
    prepared_model, prepared_optimizer = prepare(
        accelerator, model, learning_rate=learning_rate, weight_decay=weight_decay, master_weights=master_weights
    )
    trainer = Trainer(
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        groups=groups,
        plan=plan,
        costs=costs,
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
        fingerprint={
            "train_file_sha256": file_sha256(train_file),
            "model_path": model_path,
            "n_groups": len(groups),
            "n_tokens": encode_report.n_tokens,
            "negatives": negatives,
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
            "engine": str(accelerator.distributed_type),
        },
    )
    checkpoint = choose_checkpoint(resume, folder)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    elif accelerator.is_main_process:
        # A model or log of an earlier run must not pass for this one's.
        for name in (LOG_FILE, "train_summary.json", "config.json"):
            (folder / name).unlink(missing_ok=True)
    if accelerator.is_main_process:
        remove_unfinished(folder)
        write_json(folder / "train_args.json", arguments | {"resolved_precision": precision, "world_size": world_size})
    trainer.train()
    drawn = np.random.default_rng(seed).permutation(len(groups))[:reward_stats_groups]
    stats = reward_statistics(
        accelerator,
        prepared_model,
        groups,
        sorted(drawn.tolist()),
        costs,
        packing=packing,
        max_tokens_per_batch=max_tokens_per_batch,
        pad_id=tokenizer.pad_token_id,
    )
    state_dict = accelerator.get_state_dict(prepared_model)  # collective: every rank takes part
    if accelerator.is_main_process:
        summary = training_summary(trainer, encode_report, train_file, time.perf_counter() - started)
        summary |= {"verdicts": verdicts, "n_bad_rows": len(report.bad), "max_length": limit_in_force}
        summary |= data_counts(records, groups)
        if stats is not None:
            summary |= {"reward_mean": stats.mean, "reward_std": stats.std, "reward_n": stats.n}
        card = model_card(arguments, summary)
        plain: Any = accelerator.unwrap_model(prepared_model)
        save_reward_model(
            plain,
            tokenizer,
            folder,
            state_dict=state_dict,
            model_card=card,
            reward_mean=None if stats is None else stats.mean,
            reward_std=None if stats is None else stats.std,
        )
        write_json(folder / "train_summary.json", summary)
        print(f"saved the reward model in {folder} ({summary['wall_seconds']:.0f} s)", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _print_data(train_file: str, bad: list[str], report: EncodeReport, verdicts: Mapping[str, int]) -> None:
    for message in bad:
        print(f"bad row left out: {message}", flush=True)
    print(
        f"{train_file}: {report.n_records} records -> {report.n_groups} groups, {report.n_texts} texts, "
        f"{report.n_tokens} tokens; left out: {report.n_dropped_groups} groups and {report.n_dropped_texts} texts over "
        f"the length limit, {report.n_without_negatives} records without such negatives; cut: "
        f"{report.n_truncated_texts} texts ({report.n_answer_cut} in the answer); verdicts: "
        f"{', '.join(f'{name} {count}' for name, count in sorted(verdicts.items()))}",
        flush=True,
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
    parser.add_argument("--limit", type=natural, default=0, help="only the first N records; 0: all")
    parser.add_argument("--max_bad_rows", type=natural, default=0)
    parser.add_argument("--attn_implementation", default="auto", help="auto, sdpa, eager or flash_attention_2")
    parser.add_argument("--trust_remote_code", type=int, choices=(0, 1), default=0)
    add_lora_arguments(parser)
    add_product_arguments(parser)
    return parser


def add_product_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of what is saved, and of how the model is run."""
    group = parser.add_argument_group("model")
    group.add_argument("--torch_compile", type=int, choices=(0, 1), default=0, help="on a GPU, with --packing off")
    group.add_argument(
        "--reward_stats_groups", type=natural, default=256, help="groups that give reward_mean and reward_std; 0: none"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train."""
    args = build_parser().parse_args(argv)
    options = vars(args)
    if options["attn_implementation"] == "auto":
        options["attn_implementation"] = None
    objective = Objective(options.pop("mode"), options.pop("temperature"), options.pop("margin"))
    for name in ("gradient_checkpointing", "trust_remote_code", "merge_lora", "torch_compile"):
        options[name] = bool(options[name])
    train(objective=objective, **options)
    return 0


if __name__ == "__main__":
    run(main)
