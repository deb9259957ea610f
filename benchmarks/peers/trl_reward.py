"""TRL's RewardTrainer on pairs, in its own environment, with its own tokenisation, collator, loss and loop.

The same model, precision, pairs, order, batch, learning rate, weight decay and clipping as the other peers; nothing saved or
reported. Its loss is that of the other peers at temperature 1.
Run: ``bash benchmarks/setup_trl.sh`` once, then, from the repository's root,
``PYTHONPATH=. output/benchmarks/trl-venv/bin/python -m benchmarks.peers.trl_reward --train_file output/benchmarks/pairs.jsonl``
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback

from benchmarks.common import (
    PeakMemory,
    add_training_arguments,
    model_fields,
    now,
    resolve_device,
    training_fields,
    whole_steps,
    write_line,
)
from codes.common.cli import positive, run
from codes.common.errors import ContrastRMError
from codes.common.records import PreferenceRecord, read_preference_file

try:
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run this with the Python that benchmarks/setup_trl.sh installs") from error


class StepClock(TrainerCallback):
    """Takes the time from the begin of the first timed step to the end of the last one, and the loss of every step."""

    def __init__(self, device: torch.device, warmup_steps: int) -> None:
        self.device, self.warmup_steps = device, warmup_steps
        self.memory = PeakMemory(device)
        self.begin = self.end = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first timed step starts the clock."""
        if state.global_step == self.warmup_steps:
            self.memory.reset()
            self.begin = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step's end is kept."""
        if state.global_step == state.max_steps:
            self.end = now(self.device)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One log a step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class CountingCollator(DataCollatorForPreference):
    """TRL's collator; what it made is counted per batch (the loader reads ahead, so the batches are told apart later)."""

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id=pad_token_id)
        self.counts: list[tuple[int, int]] = []

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Count (real, padded) tokens."""
        batch = super().torch_call(examples)
        self.counts.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
        return batch


def pair_dataset(records: list[PreferenceRecord]) -> Dataset:
    """Pairs in TRL's conversational form with an explicit prompt.

    Raises:
        ContrastRMError: A record has more than one rejected answer; TRL trains on pairs.
    """
    for record in records:
        if len(record.rejected) != 1:
            raise ContrastRMError(f"record {record.id!r} has {len(record.rejected)} rejected answers; TRL takes pairs")
    return Dataset.from_list(
        [
            {
                "prompt": record.messages,
                "chosen": [{"role": "assistant", "content": record.chosen}],
                "rejected": [{"role": "assistant", "content": record.rejected[0]}],
            }
            for record in records
        ]
    )


def train_pairs(
    *,
    model_path: str,
    precision: str,
    device: str,
    train_file: str,
    groups_per_step: int,
    micro_batch_size: int,
    steps: int | None,
    warmup_steps: int,
    learning_rate: float,
    max_length: int,
    gradient_checkpointing: int,
) -> dict[str, Any]:
    """Train and return the fields of ``training_fields`` and the peak memory.

    Raises:
        ContrastRMError: The batch does not divide the step, TRL left a pair out, or the file has too few.
    """
    if groups_per_step % micro_batch_size:
        raise ContrastRMError(f"--micro_batch_size {micro_batch_size} must divide --groups_per_step {groups_per_step}")
    records, _ = read_preference_file(train_file)
    timed_steps = whole_steps(len(records), groups_per_step, warmup_steps, steps)
    total_steps = warmup_steps + timed_steps
    records = records[: total_steps * groups_per_step]
    place = resolve_device(device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(model_path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    clock = StepClock(place, warmup_steps)
    collator = CountingCollator(pad_token_id=tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory(prefix="trl-") as scratch:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=scratch,
                use_cpu=place.type == "cpu",
                bf16=precision == "autocast",
                per_device_train_batch_size=micro_batch_size,
                gradient_accumulation_steps=groups_per_step // micro_batch_size,
                max_steps=total_steps,
                max_length=max_length,
                train_sampling_strategy="sequential",
                gradient_checkpointing=bool(gradient_checkpointing),
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            train_dataset=pair_dataset(records),
            data_collator=collator,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)  # the result is the only line on stdout
        if len(trainer.train_dataset) != len(records):
            raise ContrastRMError(
                f"TRL kept {len(trainer.train_dataset)} of {len(records)} pairs: the others are longer than --max_length "
                f"{max_length}; choose rows with python -m benchmarks.rows --max_length {max_length}"
            )
        trainer.train()
    per_step = groups_per_step // micro_batch_size
    counts = collator.counts[warmup_steps * per_step : total_steps * per_step]
    n_pairs = timed_steps * groups_per_step
    fields = training_fields(
        seconds=clock.end - clock.begin,
        losses=clock.losses,
        n_groups=n_pairs,
        n_answers=2 * n_pairs,
        n_tokens=sum(real for real, _ in counts),
        n_computed_tokens=sum(padded for _, padded in counts),
    )
    return fields | clock.memory.fields()


def main(argv: list[str] | None = None) -> int:
    """Train and print the JSON line."""
    parser = argparse.ArgumentParser(description="TRL's RewardTrainer on pairs.")
    add_training_arguments(parser)
    parser.add_argument(
        "--micro_batch_size", type=positive, default=None, help="pairs computed at once; default: --groups_per_step"
    )
    options = vars(parser.parse_args(argv))
    output_file = options.pop("output_file")
    options["micro_batch_size"] = options["micro_batch_size"] or options["groups_per_step"]
    result = train_pairs(**options)
    fields = {
        "peer": "trl_reward",
        "task": "training",
        "trl_version": metadata.version("trl"),
        "train_file": Path(options["train_file"]).name,
        "precision": options["precision"],
        "device": str(resolve_device(options["device"])),
        "groups_per_step": options["groups_per_step"],
        "micro_batch_size": options["micro_batch_size"],
        "warmup_steps": options["warmup_steps"],
        "learning_rate": options["learning_rate"],
        "gradient_checkpointing": options["gradient_checkpointing"],
        "temperature": 1.0,
    }
    write_line(fields | result | model_fields(options["model_path"]), output_file)
    return 0


if __name__ == "__main__":
    run(main)
