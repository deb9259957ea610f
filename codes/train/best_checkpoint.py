"""Which evaluation of a run is the best, when a run stops early, and the best weights on disk.

Writes: ``best-<step>/`` in the run's folder: a whole model that loads like the final one, and ``best.json`` with its figures.
Checkpoint rotation never touches it. Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codes.common.cli import natural
from codes.common.errors import ContrastRMError
from codes.common.records import write_json
from codes.train.held_out import HeldOutSet, metric_names
from codes.train.reward_model import record_reward_scale

BEST_FILE = "best.json"
DEFAULT_METRIC = "constrained_accuracy"


def add_best_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what the best checkpoint is and what becomes of it."""
    group = parser.add_argument_group("best checkpoint")
    group.add_argument(
        "--metric_for_best",
        default=DEFAULT_METRIC,
        help=f"{DEFAULT_METRIC} (accuracy x (1 - BSR)), accuracy, accuracy_all, loss, score_gap, original_accuracy, bsr, "
        "bsr/<bias>, ...; none: no best checkpoint is kept",
    )
    group.add_argument(
        "--load_best_at_end", type=int, choices=(0, 1), default=0, help="1: the final folder holds the best weights"
    )
    group.add_argument(
        "--early_stopping_patience", type=natural, default=0, help="evaluations without a better one; 0: never stop"
    )


@dataclass(frozen=True)
class Ranking:
    """How evaluations are ranked.

    The better value of ``metric`` wins (lower for the loss and for rates of bias, higher for everything else); between equal
    values the higher accuracy, then the lower BSR, then the later step, which has been trained longer. An evaluation whose
    value does not exist (0/0) counts for nothing.
    """

    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Whether the smaller value wins."""
        return self.metric == "loss" or self.metric.split("/")[0] == "bsr"

    def value(self, evaluation: Mapping[str, Any]) -> float | None:
        """The metric of an evaluation; None where it does not exist."""
        value: float | None = evaluation.get(f"eval/{self.metric}")
        return value if value is not None and math.isfinite(value) else None

    def key(self, evaluation: Mapping[str, Any]) -> tuple[float, float, float] | None:
        """Greater is better; None where there is no value."""
        value = self.value(evaluation)
        if value is None:
            return None
        accuracy, bsr = evaluation.get("eval/accuracy"), evaluation.get("eval/bsr")
        return (
            -value if self.lower_is_better else value,
            -math.inf if accuracy is None else accuracy,
            -math.inf if bsr is None else -bsr,
        )

    def best(self, evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The best evaluation, the latest of equals; None where none has a value."""
        ranked = self._ranked(evaluations)
        # max keeps the first of equals.
        return max(reversed(ranked), key=lambda pair: pair[0])[1] if ranked else None

    def n_without_gain(self, evaluations: Sequence[Mapping[str, Any]]) -> int:
        """Evaluations in a row, up to the last one, that were not better than all before them; those without a value aside."""
        keys = [key for key, _ in self._ranked(evaluations)]
        return len(keys) - 1 - keys.index(max(keys)) if keys else 0

    def _ranked(
        self, evaluations: Sequence[Mapping[str, Any]]
    ) -> list[tuple[tuple[float, float, float], Mapping[str, Any]]]:
        return [(key, evaluation) for evaluation in evaluations if (key := self.key(evaluation)) is not None]


def resolve_ranking(
    held_out: HeldOutSet | None, metric: str, *, patience: int, load_best_at_end: bool
) -> Ranking | None:
    """The ranking that the flags ask for; None where no best checkpoint is kept.

    Raises:
        ContrastRMError: The held-out data cannot give the metric, or there is none for what was asked.
    """
    wanted = [
        name
        for name, is_wanted in (
            (f"--early_stopping_patience {patience}", patience > 0),
            ("--load_best_at_end 1", load_best_at_end),
        )
        if is_wanted
    ]
    if wanted and (held_out is None or metric == "none"):
        raise ContrastRMError(
            f"{wanted[0]} needs "
            + (
                "held-out data, and there is none: set --held_out_share, e.g. 0.1, or give --eval_file or --bias_eval_dir"
                if held_out is None
                else "a metric: --metric_for_best is none"
            )
        )
    if held_out is None or metric == "none":
        return None
    names = metric_names(held_out)
    if metric not in names:
        raise ContrastRMError(
            f"--metric_for_best {metric!r} cannot be had from this held-out data; it gives: {', '.join(names)} (or none)"
        )
    return Ranking(metric)


class BestFolder:
    """The ``best-<step>`` folders of a run.

    There is one, or two while the newest checkpoint still speaks of an older best: a run that is killed and goes on from that
    checkpoint finds the weights that its state names.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def path(self, step: int) -> Path:
        """Folder of one step."""
        return self.output_dir / f"best-{step}"

    def has(self, step: int) -> bool:
        """Whether the weights of a step are there, whole."""
        return (self.path(step) / BEST_FILE).is_file()

    def write(self, step: int, save: Callable[[Path], None], evaluation: Mapping[str, Any], *, is_main: bool) -> None:
        """Write the model, whole or not at all. Every rank calls it, because every rank takes part in ``save``."""
        scratch = self.output_dir / f".best-{step}.saving"
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)
        save(scratch)
        if is_main:
            write_json(scratch / BEST_FILE, dict(evaluation))
            if "eval/score_mean" in evaluation:
                record_reward_scale(scratch, evaluation["eval/score_mean"], evaluation["eval/score_std"])
            shutil.rmtree(self.path(step), ignore_errors=True)
            os.replace(scratch, self.path(step))

    def keep_only(self, *steps: int | None) -> None:
        """Remove all others, and what a killed run left half written."""
        for unfinished in self.output_dir.glob(".best-*"):
            shutil.rmtree(unfinished)
        for folder in self.output_dir.glob("best-*"):
            if folder not in [self.path(step) for step in steps if step is not None]:
                # Out of sight first: half a model must not stay when the run is killed in the middle of this.
                doomed = folder.with_name(f".{folder.name}.removing")
                os.replace(folder, doomed)
                shutil.rmtree(doomed)
