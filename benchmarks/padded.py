"""Plain transformers on padded batches: what the padded peers run. They differ only in which rows share a batch.

Reads: a reward model's folder with ``AutoModelForSequenceClassification`` and ``AutoTokenizer``, nothing of ours in the hot
path; preference records or evaluation files. Used by ``python -m benchmarks.peers.original_loop`` and
``python -m benchmarks.peers.sorted_padded``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import (
    PeakMemory,
    add_run_arguments,
    add_training_arguments,
    model_fields,
    now,
    resolve_device,
    training_fields,
    whole_steps,
    write_line,
)
from benchmarks.rows import TextSet, public_bias_files, read_texts
from codes.common.chat import Conversation
from codes.common.errors import ContrastRMError
from codes.common.records import read_preference_file, write_json

TokenIds = list[int]
# A group's rows: the rejected answers, then the chosen one.
TokenGroup = list[TokenIds]
# The micro-batches of one step: positions in the list of groups.
Step = list[list[int]]


@dataclass(frozen=True)
class PlainModel:
    """A sequence-classification model as transformers gives it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the model's forward pass runs."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "autocast")

    def render(self, conversations: Iterable[Conversation]) -> list[str]:
        """Conversations as the chat template writes them, BOS included where it has one."""
        return [self.tokenizer.apply_chat_template(one.turns(), tokenize=False) for one in conversations]

    def tokenize(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of rendered conversations, without padding."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def pad(self, rows: Sequence[TokenIds]) -> dict[str, torch.Tensor]:
        """Right-padded to the longest row, on the device: ``input_ids`` and ``attention_mask``, ``(B, L)``."""
        batch = self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt")
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def scores(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Raw scores ``(B,)`` in the dtype of the head."""
        with self.autocast():
            return self.model(**batch).logits[:, 0]


def load_plain_model(model_path: str | Path, *, precision: str, device: str = "auto") -> PlainModel:
    """Load a reward model without any code of ours.

    Raises:
        ContrastRMError: No such folder, no score head in the weights, or no chat template.
    """
    if not (Path(model_path) / "config.json").is_file():
        raise ContrastRMError(f"no model in {model_path}; make it with: python -m benchmarks.common")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, info = AutoModelForSequenceClassification.from_pretrained(model_path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ContrastRMError(
            f"{model_path} lacks {', '.join(sorted(info['missing_keys']))}: every run would draw its own head; "
            "make a model with one: python -m benchmarks.common"
        )
    # Nothing is generated: without this every layer keeps its keys and values until the forward pass ends.
    model.config.use_cache = False
    place = resolve_device(device)
    return PlainModel(model.to(place).eval(), load_plain_tokenizer(model_path), place, precision)


def load_plain_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding right, with the two inputs that a decoder takes.

    Raises:
        ContrastRMError: It has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="right")
    if tokenizer.chat_template is None:
        raise ContrastRMError(f"{model_path} has no chat template; the benchmarks render conversations with one")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def token_budget_batches(n_rows: Sequence[int], longest: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items of similar length together, padded tokens of a batch at most ``max_tokens`` (a larger item stands alone).

    Args:
        n_rows: Rows of each item (1 for a text, the answers of a group).
        longest: Tokens of each item's longest row.

    Returns:
        Batches of item indices, the longest items first.

    Example: rows (1, 1, 1), longest (5, 9, 8), budget 18 -> [[1, 2], [0]].
    """
    batches: list[list[int]] = []
    rows = width = 0
    for index in sorted(range(len(n_rows)), key=lambda index: (-longest[index], index)):
        if batches and (rows + n_rows[index]) * width <= max_tokens:
            batches[-1].append(index)
            rows += n_rows[index]
        else:
            batches.append([index])
            rows, width = n_rows[index], longest[index]
    return batches


def group_losses(scores: torch.Tensor, sizes: Sequence[int], temperature: float) -> torch.Tensor:
    """Cross-entropy of each group's last row among the group's rows, ``(G,)``."""
    losses = []
    for rows in torch.split(scores.float() / temperature, list(sizes)):
        # The last row, without a target that every group would have to send to the device.
        losses.append(torch.logsumexp(rows, dim=0) - rows[-1])
    return torch.stack(losses)


@dataclass
class StepTimes:
    """Clock of a training run: the timed part goes from the begin of its first step to the end of its last one."""

    begin: float = math.nan
    end: float = math.nan

    @property
    def seconds(self) -> float:
        """Length of the timed part."""
        return self.end - self.begin


def train_steps(
    plain: PlainModel,
    groups: Sequence[TokenGroup],
    steps: Sequence[Step],
    *,
    temperature: float,
    learning_rate: float,
    warmup_steps: int,
) -> dict[str, Any]:
    """Run optimizer steps: forward and backward for each micro-batch, clip at 1, AdamW.

    Args:
        steps: The warm-up steps, which are not timed, then the timed ones.

    Returns:
        The fields of ``training_fields`` and the peak memory.
    """
    model = plain.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    memory, clock, losses = PeakMemory(plain.device), StepTimes(), []
    n_computed_tokens = 0
    for number, step in enumerate(tqdm(steps, desc="training", unit="step")):
        if number == warmup_steps:
            memory.reset()
            clock.begin = now(plain.device)
        loss_sum = torch.zeros((), device=plain.device)
        n_groups = sum(len(micro_batch) for micro_batch in step)
        for micro_batch in step:
            batch = plain.pad([row for index in micro_batch for row in groups[index]])
            scores = plain.scores(batch)
            loss = group_losses(scores, [len(groups[index]) for index in micro_batch], temperature).sum() / n_groups
            loss.backward()
            loss_sum += loss.detach()
            n_computed_tokens += batch["input_ids"].numel() if number >= warmup_steps else 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum.item())
    clock.end = now(plain.device)
    timed = [groups[index] for step in steps[warmup_steps:] for micro_batch in step for index in micro_batch]
    fields = training_fields(
        seconds=clock.seconds,
        losses=losses,
        n_groups=len(timed),
        n_answers=sum(map(len, timed)),
        n_tokens=sum(len(row) for group in timed for row in group),
        n_computed_tokens=n_computed_tokens,
    )
    return fields | memory.fields()


def read_token_groups(plain: PlainModel, train_file: str | Path, max_length: int) -> list[TokenGroup]:
    """Tokenise every record of a file, in its order.

    Raises:
        ContrastRMError: A text is too long: another trainer might leave it out, and the work would differ.
    """
    groups = []
    for record in read_preference_file(train_file)[0]:
        answers = [*record.rejected, record.chosen]
        rows = plain.tokenize(plain.render(Conversation(record.messages, answer) for answer in answers))
        if max(map(len, rows)) > max_length:
            raise ContrastRMError(
                f"{train_file}: record {record.id!r} has a text of {max(map(len, rows))} tokens, more than --max_length "
                f"{max_length}; choose rows with python -m benchmarks.rows --max_length {max_length}"
            )
        groups.append(rows)
    return groups


def score_texts(
    plain: PlainModel, conversations: Sequence[Conversation], batches: Callable[[list[str]], Iterator[tuple[Any, Any]]]
) -> dict[str, Any]:
    """Score every text; the time runs from the conversations to the scores.

    Args:
        batches: Makes (positions, padded batch on the device) of the rendered texts.

    Returns:
        ``scores`` in the order of the texts, seconds, computed tokens, and the peak memory.
    """
    memory = PeakMemory(plain.device)
    scores = np.full(len(conversations), np.nan)
    n_computed_tokens = 0
    with torch.inference_mode():
        plain.scores(plain.pad(plain.tokenize(plain.render(conversations[:1]))))  # the first call sets things up
        memory.reset()
        begin = now(plain.device)
        with tqdm(total=len(conversations), desc="scoring", unit="text") as bar:
            for positions, batch in batches(plain.render(conversations)):
                scores[positions] = plain.scores(batch).float().cpu().numpy()
                n_computed_tokens += batch["input_ids"].numel()
                bar.update(len(positions))
        seconds = now(plain.device) - begin
    return {
        "scores": scores.tolist(),
        "seconds": seconds,
        "n_computed_tokens": n_computed_tokens,
        **memory.fields(),
    }


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every peer that scores."""
    add_run_arguments(parser)
    parser.add_argument(
        "--files", nargs="+", default=None, help="evaluation files; default: the nine pairwise public ones"
    )
    parser.add_argument("--percent", type=float, default=100, help="so many of a hundred questions, by a seeded hash")
    parser.add_argument("--seed", type=int, default=42, help="of that choice")
    parser.add_argument(
        "--scores_file", default=None, help="write the scores here (a JSON list, in the order of the texts)"
    )


def read_asked_texts(files: Sequence[str] | None, percent: float, seed: int) -> TextSet:
    """The texts that the flags of ``add_scoring_arguments`` name."""
    return read_texts(files or public_bias_files(), percent=percent, seed=seed)


def in_order(items: Sequence[Any], batch_size: int) -> list[range]:
    """Positions, so many at a time."""
    return [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]


def scoring_fields(result: dict[str, Any], texts: TextSet, n_tokens: int, scores_file: str | None) -> dict[str, Any]:
    """The result of a scoring run, the same names for every peer; the scores go to their file.

    Raises:
        ContrastRMError: A score is not finite.
    """
    scores = np.array(result.pop("scores"))
    if not np.isfinite(scores).all():
        raise ContrastRMError(
            f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite: nothing to compare"
        )
    if scores_file is not None:
        write_json(scores_file, scores.tolist())
    return {
        "task": "scoring",
        **texts.fields,
        "n_tokens": n_tokens,
        **result,
        "texts_per_second": len(texts.conversations) / result["seconds"],
        "tokens_per_second": n_tokens / result["seconds"],
        "score_mean": float(scores.mean()),
        "score_sd": float(scores.std()),
    }


def build_padded_parser(description: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """A command line with the tasks ``train`` and ``score``, and the parser of each."""
    parser = argparse.ArgumentParser(description=description)
    tasks = parser.add_subparsers(dest="task", required=True)
    parsers = {name: tasks.add_parser(name) for name in ("train", "score")}
    add_training_arguments(parsers["train"])
    parsers["train"].add_argument(
        "--temperature", type=float, default=0.5, help="1 makes pairs comparable with TRL's loss"
    )
    add_scoring_arguments(parsers["score"])
    return parser, parsers


def run_training(
    peer: str,
    split: Callable[[Sequence[int], Sequence[TokenGroup]], Step],
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
    **settings: Any,
) -> None:
    """Train on the groups of a file in its order, and write the JSON line.

    Args:
        split: Makes the micro-batches of one step out of the positions of its groups.
        settings: Further settings, for the line.
    """
    plain = load_plain_model(model_path, precision=precision, device=device)
    if gradient_checkpointing:
        plain.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = read_token_groups(plain, train_file, max_length)
    n_steps = warmup_steps + whole_steps(len(groups), groups_per_step, warmup_steps, steps)
    starts = range(0, n_steps * groups_per_step, groups_per_step)
    plan = [split(range(start, start + groups_per_step), groups) for start in starts]
    result = train_steps(
        plain, groups, plan, temperature=temperature, learning_rate=learning_rate, warmup_steps=warmup_steps
    )
    fields = {
        "peer": peer,
        "task": "training",
        "train_file": Path(train_file).name,
        "precision": precision,
        "device": str(plain.device),
        "groups_per_step": groups_per_step,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "gradient_checkpointing": gradient_checkpointing,
        "temperature": temperature,
        **settings,
    }
    write_line(fields | result | model_fields(model_path), output_file)


def run_scoring(
    peer: str,
    batches: Callable[[PlainModel, list[str]], Iterator[tuple[Any, Any]]],
    *,
    model_path: str,
    precision: str,
    device: str,
    output_file: str | None,
    files: Sequence[str] | None,
    percent: float,
    seed: int,
    scores_file: str | None,
    **settings: Any,
) -> None:
    """Score the texts of files, and write the JSON line.

    Args:
        batches: Makes (positions, padded batch) of the rendered texts.
        settings: Further settings, for the line.
    """
    texts = read_asked_texts(files, percent, seed)
    plain = load_plain_model(model_path, precision=precision, device=device)
    lengths = [len(row) for row in plain.tokenize(plain.render(texts.conversations))]
    result = score_texts(plain, texts.conversations, lambda rendered: batches(plain, rendered))
    fields = {"peer": peer, "precision": precision, "device": str(plain.device), **settings}
    fields |= scoring_fields(result, texts, sum(lengths), scores_file)
    write_line(fields | model_fields(model_path), output_file)
