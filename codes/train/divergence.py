"""What led to a loss or gradient that is not a finite number: ``nan_report.json``.

Used by ``python -m codes.train.train_reward_model``; opened by people.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from codes.common.errors import ContrastRMError
from codes.common.records import write_json
from codes.train.batches import MicroBatch
from codes.train.data_utils import Group

REPORT_FILE = "nan_report.json"
# Steps before the failure that the report shows.
HISTORY_STEPS = 10


def as_json(value: float | None) -> float | str | None:
    """A number as JSON has it: ``"nan"``, ``"inf"`` and ``"-inf"`` are texts."""
    return value if value is None or math.isfinite(value) else str(float(value))


def group_lines(
    groups: Sequence[Group],
    computed: Sequence[tuple[MicroBatch, torch.Tensor, torch.Tensor]],
    rank: int,
) -> list[dict[str, Any]]:
    """One line for each group that counted on this rank.

    Args:
        computed: Micro-batches with their scores (one for each text, in the order of the groups) and losses ``(G,)``.
    """
    lines: list[dict[str, Any]] = []
    for number, (batch, scores, losses) in enumerate(computed):
        sizes = [len(groups[index].texts) for index in batch.groups]
        rows = torch.split(scores.detach().float().cpu(), sizes)
        for index, weight, row, loss in zip(batch.groups, batch.weights, rows, losses.tolist(), strict=True):
            if weight == 0.0:  # a filler, so that all ranks take equally many micro-steps
                continue
            lines.append(
                {
                    "id": groups[index].record_id,
                    "rank": rank,
                    "micro_batch": number,
                    "n_tokens": groups[index].n_tokens,
                    "loss": as_json(loss),
                    "scores_rejected": [as_json(score) for score in row[:-1].tolist()],
                    "score_chosen": as_json(row[-1].item()),
                }
            )
    return lines


def write_nan_report(
    accelerator: Accelerator,
    output_dir: Path,
    *,
    reason: str,
    step: int,
    learning_rate: float,
    loss: float,
    grad_norm: float | None,
    lines: list[dict[str, Any]],
    log: Sequence[Mapping[str, Any]],
    last_checkpoint: str | None,
) -> str:
    """Write ``nan_report.json``; the text that says where it is. Every rank calls it.

    Args:
        lines: This rank's ``group_lines``.
        log: Entries of the steps before.
    """
    gathered: list[dict[str, Any]] = gather_object(lines)
    if not accelerator.is_main_process:
        return f"see {REPORT_FILE}"
    # The step's own norm is of all micro-batches together, after the optimizer has moved: nothing finer is left of it.
    kept = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/score_mean", "skipped")
    report = {
        "step": step,
        "reason": reason,
        "loss": as_json(loss),
        "grad_norm": as_json(grad_norm),
        "learning_rate": learning_rate,
        "last_checkpoint": last_checkpoint,
        "n_groups": len(gathered),
        "groups_not_finite": [line["id"] for line in gathered if _is_broken(line)],
        "groups": gathered,
        "steps_before": [{key: entry.get(key) for key in kept} for entry in log[-HISTORY_STEPS:]],
    }
    try:
        write_json(output_dir / REPORT_FILE, report)
    except ContrastRMError as error:
        return f"its report could not be written ({error})"
    return f"scores, losses and the steps before are in {output_dir / REPORT_FILE}"


def _is_broken(line: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) for value in (line["loss"], line["score_chosen"], *line["scores_rejected"]))
