"""What a run watches between its steps: evaluation on held-out data, the best checkpoint, early stopping.

Writes: ``eval_log.jsonl`` (one evaluation a line) and ``best-<step>/`` in the run's folder.
Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from codes.common.cli import natural_or_auto
from codes.common.errors import optional
from codes.common.records import write_text
from codes.common.reporting import number, rate_cell
from codes.common.scoring import Scorer
from codes.train.best_checkpoint import BestFolder, Ranking
from codes.train.checkpoints import CONTINUE, disk_errors
from codes.train.held_out import GroupLosses, HeldOutRecords, HeldOutSet, held_out_metrics
from codes.train.tracking import Trackers

EVAL_LOG_FILE = "eval_log.jsonl"
# What ``--eval_steps auto`` means.
EVALUATIONS_A_RUN = 5


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say when a run is evaluated."""
    group = parser.add_argument_group("evaluation during training")
    group.add_argument(
        "--eval_steps",
        type=natural_or_auto,
        default="auto",
        help=f"steps between evaluations on held-out data; auto: {EVALUATIONS_A_RUN} a run; 0: only at the end",
    )
    group.add_argument(
        "--eval_on_start", type=int, choices=(0, 1), default=0, help="1: evaluate the untrained model too"
    )


def resolve_eval_steps(eval_steps: int | str, total_steps: int) -> int:
    """Steps between evaluations; the last step is always followed by one."""
    if eval_steps == "auto":
        return math.ceil(total_steps / EVALUATIONS_A_RUN)
    return int(eval_steps) or total_steps


class Watch:
    """Evaluates a model in training. Every rank has one and calls the same methods at the same steps.

    Args:
        scorer: Of the model in training, shared by all ranks.
        loss: As ``held_out_metrics`` takes it.
        every: Steps between evaluations.
        ranking: How evaluations are ranked; None: no best checkpoint and no early stop.
        patience: Evaluations in a row without a better one after which the run stops; 0: never.
        save: Writes the model in training into a folder; every rank calls it.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        scorer: Scorer,
        held_out: HeldOutSet,
        loss: GroupLosses,
        output_dir: Path,
        every: int,
        on_start: bool,
        ranking: Ranking | None,
        patience: int,
        save: Callable[[Path], None],
        trackers: Trackers,
    ) -> None:
        self.accelerator, self.scorer, self.held_out = accelerator, scorer, held_out
        self.loss, self.output_dir = loss, output_dir
        self.every, self.on_start, self.ranking, self.patience = every, on_start, ranking, patience
        self.save, self.trackers = save, trackers
        self.folder = BestFolder(output_dir)
        self.evaluations: list[dict[str, Any]] = []
        # Evaluations before this place have no weights any more and cannot be the best.
        self.first_candidate = 0
        # The best step that the newest checkpoint names.
        self.step_in_checkpoint: int | None = None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best evaluation so far."""
        return self.ranking.best(self.evaluations[self.first_candidate :]) if self.ranking else None

    @property
    def best_step(self) -> int | None:
        """Its step."""
        best = self.best
        return None if best is None else int(best["step"])

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` evaluations in a row brought nothing better."""
        if not self.patience or self.ranking is None:
            return False
        return self.ranking.n_without_gain(self.evaluations[self.first_candidate :]) >= self.patience

    def before_training(self, step: int) -> None:
        """Evaluate the untrained model, if asked for."""
        if self.on_start and step == 0:
            self._evaluate(0, 0.0)

    def after_step(self, step: int, epoch: float, *, is_last: bool) -> None:
        """Evaluate if it is time."""
        if step % self.every == 0 or is_last:
            self._evaluate(step, epoch, is_last=is_last)
            if is_last and self.ranking is not None and self.best is None and self.accelerator.is_main_process:
                tqdm.write(
                    f"warning: no evaluation had a value of {self.ranking.metric} (--metric_for_best): there is no best "
                    "checkpoint, the model is that of the last step"
                )
            if self.should_stop and not is_last and self.accelerator.is_main_process:
                tqdm.write(
                    f"stopped early: none of the last {self.patience} evaluations was better than those before them; the "
                    f"best is that of step {self.best_step}"
                )

    def _evaluate(self, step: int, epoch: float, *, is_last: bool = False) -> None:
        if self.evaluations and self.evaluations[-1]["step"] == step:
            return
        scored = self.scorer.score_texts(self.held_out.texts, f"evaluating (step {step})")
        metrics = held_out_metrics(self.held_out, scored.scores, loss=self.loss)
        seconds = {"tokens": scored.n_tokens, "seconds": round(scored.seconds, 4)}
        entry = {"step": step, "epoch": epoch, **metrics, **seconds}
        before = self.best_step
        self.evaluations.append(entry)
        is_best = self.best_step == step and before != step
        # After the last step the run's folder holds these weights already.
        if is_best and not is_last:
            self.folder.write(step, self.save, entry, is_main=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            with optional(EVAL_LOG_FILE) if is_last else disk_errors(EVAL_LOG_FILE, CONTINUE):
                if is_best and not is_last:
                    self.folder.keep_only(step, self.step_in_checkpoint)
                with (self.output_dir / EVAL_LOG_FILE).open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(entry) + "\n")
            self.trackers.log(metrics | {"epoch": epoch}, step)
            tqdm.write(f"step {step}: {describe(entry)}{self._verdict(entry, is_best)}")
        self.accelerator.wait_for_everyone()

    def _verdict(self, entry: Mapping[str, Any], is_best: bool) -> str:
        if self.ranking is not None and self.ranking.value(entry) is None:
            return (
                f"; no value of {self.ranking.metric}: it counts neither for the best checkpoint nor for early stopping"
            )
        return "; the best so far" if is_best else ""

    # --- through checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; JSON."""
        return {"evaluations": self.evaluations, "first_candidate": self.first_candidate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state. Every rank calls it."""
        self.evaluations = [dict(entry) for entry in state["evaluations"]]
        self.first_candidate = int(state["first_candidate"])
        best = self.best_step
        there = [best is None or self.folder.has(best)] if self.accelerator.is_main_process else [None]
        if not broadcast_object_list(there)[0]:
            self.first_candidate = len(self.evaluations)
            if self.accelerator.is_main_process:
                print(
                    f"best-{best} is gone: the best checkpoint is chosen among the evaluations from here on", flush=True
                )
        self.checkpoint_written()
        if self.accelerator.is_main_process:
            write_text(self.output_dir / EVAL_LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in self.evaluations))

    def checkpoint_written(self) -> None:
        """The newest checkpoint names the best evaluation so far: weights of older ones are not needed any more."""
        self.step_in_checkpoint = self.best_step
        if self.accelerator.is_main_process:
            self.folder.keep_only(self.step_in_checkpoint)


def describe(evaluation: Mapping[str, Any]) -> str:
    """One line of an evaluation; a bias sensitivity rate never stands alone."""
    entry = dict(evaluation)
    parts = []
    if "eval/accuracy" in entry:
        parts += [f"accuracy {rate_cell(entry, 'eval/accuracy')}", f"gap {number(entry['eval/score_gap'])}"]
        parts.append(f"loss {number(entry['eval/loss'], 4)}")
    if "eval/bsr" in entry:
        parts.append(
            f"BSR {rate_cell(entry, 'eval/bsr')} at original accuracy {rate_cell(entry, 'eval/original_accuracy')}"
        )
    return "held out: " + ", ".join(parts)


def held_out_summary(
    data: HeldOutRecords | None, held_out: HeldOutSet | None, watch: Watch | None, *, adopted_step: int | None
) -> dict[str, Any]:
    """What ``train_summary.json`` says of it; empty without held-out data.

    Args:
        adopted_step: The step whose weights the final folder holds; None: the last one's.
    """
    if data is None or held_out is None or watch is None or not watch.evaluations:
        return {}
    last, best = watch.evaluations[-1], watch.best
    saved = next((entry for entry in watch.evaluations if entry["step"] == adopted_step), last)
    named = ("accuracy", "accuracy_all", "loss", "score_gap", "original_accuracy", "bsr", "constrained_accuracy")
    return {
        "held_out": {
            "data": data.report,
            "counts": held_out.counts,
            "metric_for_best": None if watch.ranking is None else watch.ranking.metric,
            "best": None if best is None else dict(best),
            "last": last,
            "step_of_saved_weights": saved["step"],
            "stopped_early": watch.should_stop,
        },
        "metrics": {
            f"held out: {name}": saved[f"eval/{name}"] for name in named if saved.get(f"eval/{name}") is not None
        },
    }
