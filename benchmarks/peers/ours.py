"""This project's trainer and scorer, as their users run them, measured as every peer is.

Training: the real ``Trainer`` on the groups of a file in its order; ``--precision bfloat16`` and ``autocast`` both mean what
``bf16`` means to it in one process: bfloat16 weights with float32 masters. Scoring: the real ``Scorer``.
Also reports ``useful_flops``: what the same texts need when every token of their prefix trees is computed once, as laid out
in packs of the same budget, each token attending to what it sees and to nothing else. It does not depend on ``--packing``.
Run: ``python -m benchmarks.peers.ours train --train_file output/benchmarks/groups_of_4.jsonl --precision bfloat16``
or ``python -m benchmarks.peers.ours score --percent 25 --precision bfloat16``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    PeakMemory,
    add_training_arguments,
    forward_flops,
    model_fields,
    model_shape,
    n_compiled,
    now,
    resolve_device,
    training_fields,
    visible_pairs,
    whole_steps,
    write_line,
)
from benchmarks.padded import add_scoring_arguments, read_asked_texts, scoring_fields
from codes.common.chat import ChatFormatter
from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError
from codes.common.packing import Pack, build_pack, plan_packs
from codes.common.records import read_preference_file
from codes.common.scoring import Scorer, collate_texts, default_token_budget, resolve_packing
from codes.train.batches import BatchPlan, group_costs, pack_groups
from codes.train.data_utils import Group, encode_groups
from codes.train.engine import (
    Schedule,
    keeps_master_weights,
    make_accelerator,
    prepare,
    set_accumulation,
    training_device,
)
from codes.train.reward_model import load_reward_model
from codes.train.settings import Objective, OptimizerSettings, TrainSettings
from codes.train.trainer import Trainer

PACKINGS = ("shared", "packed", "off")
# What the trainer calls the precisions of the peers.
TRAINER_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "autocast": "bf16"}


@dataclass(frozen=True)
class ConstantRate(Schedule):
    """The same learning rate in every step, as the other peers have it."""

    def rate(self, step: int) -> float:
        """Learning rate of any step."""
        return self.learning_rate


def packs_flops(model_path: str, packs: Iterable[Pack]) -> list[int]:
    """Floating-point operations of a forward pass over each pack without filler."""
    shape = model_shape(model_path)
    return [forward_flops(shape, pack.layout.n_tokens, visible_pairs(pack.layout)) for pack in packs]


def build_trainer(
    *,
    model_path: str,
    precision: str,
    records_file: str,
    groups_per_step: int,
    steps: int | None,
    warmup_steps: int,
    learning_rate: float,
    max_length: int,
    gradient_checkpointing: bool,
    temperature: float,
    packing: str,
    max_tokens_per_batch: int,
    output_dir: Path,
) -> Trainer:
    """The trainer as ``train`` builds it, with a plan in the order of the file and a constant learning rate.

    Raises:
        ContrastRMError: A text is longer than ``max_length``, or the file has too few groups.
    """
    masters = keeps_master_weights(precision)
    model, tokenizer = load_reward_model(model_path, dtype="bfloat16" if masters else "float32")
    packing = resolve_packing(model, packing)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    formatter = ChatFormatter(tokenizer, max_length=max_length, overlength="error")
    groups, report = encode_groups(read_preference_file(records_file)[0], formatter)
    if report.n_groups < report.n_records:
        raise ContrastRMError(f"{records_file}: {report.n_without_negatives} records have no rejected answer")
    n_steps = warmup_steps + whole_steps(len(groups), groups_per_step, warmup_steps, steps)
    plan = [list(range(step * groups_per_step, (step + 1) * groups_per_step)) for step in range(n_steps)]
    optimizer_settings = OptimizerSettings(learning_rate=learning_rate, weight_decay=0.01, max_grad_norm=1.0)
    settings = TrainSettings(
        output_dir=str(output_dir),
        seed=0,
        objective=Objective("contrastive", temperature, 0.0),
        optimizer=optimizer_settings,
    )
    batches = batch_plan(groups, plan, packing, max_tokens_per_batch, tokenizer.pad_token_id)
    accelerator = make_accelerator(precision=precision)
    set_accumulation(accelerator, batches.micro_steps, max_grad_norm=1.0)
    prepared_model, optimizer = prepare(accelerator, model, optimizer_settings, precision=precision)
    trainer = Trainer(
        settings,
        batches,
        accelerator=accelerator,
        model=prepared_model,
        optimizer=optimizer,
        fingerprint={},
    )
    trainer.schedule = ConstantRate(learning_rate, 0, n_steps)
    return trainer


def batch_plan(
    groups: Sequence[Group], plan: Sequence[Sequence[int]], packing: str, max_tokens: int, pad_id: int
) -> BatchPlan:
    """The plan of one process, as the trainer takes it."""
    n_tokens = np.array([group.n_tokens for group in groups])
    return BatchPlan(groups, plan, group_costs(groups, packing), n_tokens, packing, pad_id, max_tokens)


def micro_batches(
    groups: Sequence[Group], plan: Sequence[Sequence[int]], packing: str, max_tokens: int
) -> list[list[list[Group]]]:
    """The groups of every micro-batch of every step, as the trainer makes them."""
    batches = batch_plan(groups, plan, packing, max_tokens, pad_id=0)
    return [
        [[groups[index] for index in batch.groups] for batch in batches.micro_batches(step, rank=0)] for step in plan
    ]


def computed_tokens(batches: Sequence[Sequence[Group]], packing: str, *, on_gpu: bool, pad_id: int) -> int:
    """Tokens that the model computes for micro-batches, padding and filler included."""
    if packing != "off":
        return sum(pack_groups(batch, share=packing == "shared", on_gpu=on_gpu).layout.n_tokens for batch in batches)
    rows = [[text for group in batch for text in group.texts] for batch in batches]
    return sum(collate_texts(texts, pad_id)["input_ids"].numel() for texts in rows)


def run_training(
    *,
    model_path: str,
    precision: str,
    device: str,
    output_file: str | None,
    train_file: str,
    groups_per_step: int,
    steps: int | None,
    warmup_steps: int,
    learning_rate: float,
    max_length: int,
    gradient_checkpointing: int,
    temperature: float,
    packing: str,
    max_tokens_per_batch: int,
) -> None:
    """Train on the groups of a file in its order, and write the JSON line.

    Raises:
        ContrastRMError: As ``build_trainer``; or the trainer would take another device than the one asked for.
    """
    place = resolve_device(device)
    if place.type != training_device().type:
        raise ContrastRMError(
            f"the trainer runs on {training_device()} here, not on {place}; hide the GPU with CUDA_VISIBLE_DEVICES= "
            "or drop --device"
        )
    trainer_precision = TRAINER_PRECISIONS[precision]
    budget = max_tokens_per_batch or default_token_budget(place)
    memory = PeakMemory(place)
    with tempfile.TemporaryDirectory(prefix="ours-") as scratch:
        trainer = build_trainer(
            model_path=model_path,
            precision=trainer_precision,
            records_file=train_file,
            groups_per_step=groups_per_step,
            steps=steps,
            warmup_steps=warmup_steps,
            learning_rate=learning_rate,
            max_length=max_length,
            gradient_checkpointing=bool(gradient_checkpointing),
            temperature=temperature,
            packing=packing,
            max_tokens_per_batch=budget,
            output_dir=Path(scratch),
        )
        plan = trainer.plan
        trainer.plan = replace(plan, steps=plan.steps[:warmup_steps])
        # What the trainer says is no result: standard output holds the one line.
        with redirect_stdout(sys.stderr):
            trainer.train()
            # It goes on where it stopped.
            trainer.plan = plan
            memory.reset()
            compiled_before, begin = n_compiled(), now(place)
            trainer.train()
            seconds = now(place) - begin
        peak = memory.fields()
        compiled = n_compiled() - compiled_before
    timed = [plan.groups[index] for step in plan.steps[warmup_steps:] for index in step]
    batches, shared_batches = (
        [batch for step in micro_batches(plan.groups, plan.steps, way, budget)[warmup_steps:] for batch in step]
        for way in (plan.packing, "shared")
    )
    useful = sum(packs_flops(model_path, (pack_groups(batch, share=True, on_gpu=False) for batch in shared_batches)))
    fields = {
        "peer": "ours",
        "task": "training",
        "train_file": Path(train_file).name,
        "precision": precision,
        "weights": "bfloat16 with float32 masters" if trainer_precision == "bf16" else "float32",
        "device": str(place),
        "groups_per_step": groups_per_step,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "gradient_checkpointing": gradient_checkpointing,
        "temperature": temperature,
        "packing": plan.packing,
        "max_tokens_per_batch": budget,
        "micro_steps": trainer.accelerator.gradient_accumulation_steps,
        "n_compiled_while_timed": compiled,
    }
    result = training_fields(
        seconds=seconds,
        losses=[entry["train/loss"] for entry in trainer.log],
        n_groups=len(timed),
        n_answers=sum(len(group.texts) for group in timed),
        n_tokens=sum(group.n_tokens for group in timed),
        n_computed_tokens=computed_tokens(
            batches, trainer.plan.packing, on_gpu=place.type == "cuda", pad_id=trainer.plan.pad_id
        ),
    )
    # Forward, and twice as much backward.
    write_line(fields | result | peak | flops_fields(3 * useful, seconds) | model_fields(model_path), output_file)


def flops_fields(useful_flops: int, seconds: float) -> dict[str, Any]:
    """``useful_flops``, and ``useful_gflops`` a second."""
    return {"useful_flops": useful_flops, "useful_gflops": useful_flops / seconds / 1e9}


def run_scoring(
    *,
    model_path: str,
    precision: str,
    device: str,
    output_file: str | None,
    files: Sequence[str] | None,
    percent: float,
    seed: int,
    scores_file: str | None,
    packing: str,
    max_tokens_per_batch: int,
) -> None:
    """Score the texts of files, and write the JSON line; the time runs from the conversations to the scores.

    Raises:
        ContrastRMError: Autocast, which the scorer does not know.
    """
    if precision == "autocast":
        raise ContrastRMError("the scorer does not autocast; use --precision bfloat16 or float32")
    texts = read_asked_texts(files, percent, seed)
    place = resolve_device(device)
    model, tokenizer = load_reward_model(model_path, dtype=precision, device=place)
    formatter = ChatFormatter(tokenizer)
    scorer = Scorer(model, formatter, packing=packing, max_tokens_per_batch=max_tokens_per_batch)
    encoded = formatter.encode(texts.conversations)
    distinct = list(dict.fromkeys(encoded))
    plan = plan_packs([text.input_ids for text in distinct], scorer.max_tokens_per_batch)
    packs = [build_pack([distinct[index].input_ids for index in batch]) for batch in plan]
    flops = packs_flops(model_path, packs)
    scorer.score(texts.conversations[:1])  # the first call sets things up
    memory = PeakMemory(place)
    memory.reset()
    begin = now(place)
    found = scorer.score(texts.conversations)
    seconds = now(place) - begin
    peak = memory.fields()
    result = {
        "scores": found.scores.tolist(),
        "seconds": seconds,
        "n_computed_tokens": found.n_computed_tokens,
        "n_distinct_tokens": found.n_tokens,
        **peak,
        **flops_fields(sum(flops), seconds),
    }
    fields = {
        "peer": "ours",
        "precision": precision,
        "device": str(place),
        "packing": scorer.packing,
        "max_tokens_per_batch": scorer.max_tokens_per_batch,
        **scoring_fields(result, texts, sum(len(text.input_ids) for text in encoded), scores_file),
    }
    write_line(fields | model_fields(model_path), output_file)


def build_parser() -> argparse.ArgumentParser:
    """Command line with the tasks ``train`` and ``score``."""
    parser = argparse.ArgumentParser(description="The trainer and the scorer of this project.")
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, add_arguments in (("train", add_training_arguments), ("score", add_scoring_arguments)):
        task = tasks.add_parser(name)
        add_arguments(task)
        task.add_argument("--packing", choices=PACKINGS, default="shared")
        task.add_argument(
            "--max_tokens_per_batch", type=natural, default=0, help="computed tokens at once; 0: what suits the device"
        )
        if name == "train":
            task.add_argument("--temperature", type=float, default=0.5, help="1 makes pairs comparable with TRL's loss")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one task and print its JSON line."""
    options = vars(build_parser().parse_args(argv))
    run_task = run_training if options.pop("task") == "train" else run_scoring
    run_task(**options)
    return 0


if __name__ == "__main__":
    run(main)
