"""What a run does between its steps: evaluation on held-out data, the best checkpoint, early stopping.

Writes: ``eval_log.jsonl`` (one evaluation a line) and ``best-<step>/`` in the run's folder: a whole model that loads like the
final one, with ``best.json``, its figures. Checkpoint rotation never touches it.
Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError, optional
from codes.common.records import write_json, write_text
from codes.common.reporting import number, rate_cell
from codes.common.scoring import Scorer
from codes.common.stats import cluster_rate
from codes.common.verdicts import Verdict, judge_pair
from codes.train.batches import BatchPlan
from codes.train.checkpoints import CONTINUE, disk_errors
from codes.train.held_out import BiasPair, HeldOutGroup, HeldOutSet
from codes.train.losses import group_losses
from codes.train.reward_model import record_reward_scale
from codes.train.settings import EVALUATIONS_A_RUN, EvaluationSettings, TrainSettings
from codes.train.tracking import Trackers

# Flat scores (N,), group sizes (G,) and the groups -> losses (G,).
GroupLosses = Callable[[torch.Tensor, torch.Tensor, Sequence[HeldOutGroup]], torch.Tensor]

EVAL_LOG_FILE = "eval_log.jsonl"
BEST_FILE = "best.json"


def resolve_eval_steps(eval_steps: int | str, total_steps: int) -> int:
    """Steps between evaluations; the last step is always followed by one."""
    if eval_steps == "auto":
        return math.ceil(total_steps / EVALUATIONS_A_RUN)
    return int(eval_steps) or total_steps


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


def resolve_ranking(held_out: HeldOutSet | None, settings: EvaluationSettings) -> Ranking | None:
    """The ranking that the settings ask for; None where no best checkpoint is kept.

    Raises:
        ContrastRMError: The held-out data cannot give the metric, or there is none for what was asked.
    """
    metric = settings.metric_for_best
    if settings.early_stopping_patience:
        wish = f"--early_stopping_patience {settings.early_stopping_patience}"
    else:
        wish = "--load_best_at_end 1" if settings.load_best_at_end else ""
    if wish and held_out is None:
        raise ContrastRMError(
            f"{wish} needs held-out data, and there is none: set --held_out_share, e.g. 0.1, or give --eval_file or "
            "--bias_eval_dir"
        )
    if wish and metric == "none":
        raise ContrastRMError(f"{wish} needs a metric: --metric_for_best is none")
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
                hidden = folder.with_name(f".{folder.name}.removing")
                os.replace(folder, hidden)
                shutil.rmtree(hidden)


class HeldOutEvaluation:
    """Evaluates a model in training. Every rank has one and calls the same methods at the same steps.

    Args:
        model: In training, as the accelerator runs it: all ranks score together.
        ranking: How evaluations are ranked; None: no best checkpoint and no early stop.
        save: Writes the model in training into a folder; every rank calls it.
    """

    def __init__(
        self,
        settings: TrainSettings,
        held_out: HeldOutSet,
        accelerator: Accelerator,
        *,
        model: torch.nn.Module,
        formatter: ChatFormatter,
        plan: BatchPlan,
        ranking: Ranking | None,
        save: Callable[[Path], None],
        trackers: Trackers,
    ) -> None:
        self.settings, self.held_out = settings.evaluation, held_out
        self.accelerator, self.ranking, self.save, self.trackers = accelerator, ranking, save, trackers
        self.scorer = Scorer(
            model,
            formatter,
            max_tokens_per_batch=plan.max_tokens,
            packing=plan.packing,
            progress=accelerator.is_main_process,
            accelerator=accelerator,
        )
        self.loss = partial(group_losses, settings.objective)
        self.every = resolve_eval_steps(self.settings.eval_steps, len(plan.steps))
        self.patience = self.settings.early_stopping_patience
        self.output_dir = Path(settings.output_dir)
        self.folder = BestFolder(self.output_dir)
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
        if self.settings.eval_on_start and step == 0:
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
        is_there = [best is None or self.folder.has(best)] if self.accelerator.is_main_process else [None]
        if not broadcast_object_list(is_there)[0]:
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


# --- metrics ---


def metric_names(held_out: HeldOutSet) -> list[str]:
    """The metrics that ``held_out_metrics`` gives a value for, unless they are 0/0: what a checkpoint can be chosen by."""
    names = ["constrained_accuracy"]
    if held_out.groups:
        names += ["accuracy", "accuracy_all", "loss", "score_gap"]
    if held_out.pairs:
        names += ["original_accuracy", "bsr"]
        names += [f"{name}/{bias}" for bias in held_out.biases for name in ("original_accuracy", "bsr")]
    return names


def held_out_metrics(
    held_out: HeldOutSet,
    scores: np.ndarray,
    *,
    loss: GroupLosses,
) -> dict[str, Any]:
    """What the scores say, as it stands in the log; rates beside their counts and a 95 % interval clustered by question.

    On groups: ``eval/accuracy``: the chosen answer outscores every rejected one without an injected bias (every one, where
    all carry one). ``eval/accuracy_all``: it outscores every rejected answer. ``eval/score_gap``: mean of chosen minus mean
    rejected. ``eval/score_mean``, ``eval/score_std``: of all their texts. ``eval/loss``: what training
    minimises, over the rejected answers that it would see (``eval/loss_total`` groups have any).
    On pairs, pooled and by bias (``/<bias>``): ``eval/original_accuracy``: original pairs right / all;
    ``eval/bsr``: right before and wrong after the bias / right before. A tie is never right and never a flip; it is counted.
    On both: ``eval/constrained_accuracy`` = accuracy x (1 - BSR), see ``constrained_accuracy``. A rate of 0/0 is None.

    Args:
        scores: ``(n_texts,)``, in the order of ``held_out.texts``.
        loss: Flat scores, group sizes and the groups -> one loss per group (``losses.group_losses``).
    """
    metrics = _group_metrics(held_out, scores, loss) if held_out.groups else {}
    if held_out.pairs:
        metrics |= _pair_metrics(held_out.pairs, scores, "")
        for bias in held_out.biases:
            metrics |= _pair_metrics([pair for pair in held_out.pairs if pair.bias == bias], scores, f"/{bias}")
    metrics["eval/constrained_accuracy"] = constrained_accuracy(
        metrics.get("eval/accuracy", metrics.get("eval/original_accuracy")),
        metrics.get("eval/bsr"),
        bool(held_out.pairs),
    )
    return metrics


def constrained_accuracy(accuracy: float | None, bsr: float | None, has_pairs: bool) -> float | None:
    """Accuracy x (1 - pooled BSR): what is judged right and would stay right under a bias.

    Neither factor alone will do: "the shorter answer wins" has a low BSR and a low accuracy, and a model that style fools has
    a high accuracy and a high BSR. Without any pair that measures bias it is the accuracy. None where the accuracy does not
    exist, or where there are pairs but none is right before its bias (a BSR of 0/0).
    """
    if accuracy is None or not has_pairs:
        return accuracy
    return None if bsr is None else accuracy * (1 - bsr)


def _rate(name: str, events: Sequence[bool], among: Sequence[bool], questions: Sequence[str]) -> dict[str, Any]:
    rate = cluster_rate([int(event) for event in events], [int(inside) for inside in among], questions)
    interval = None if rate.ci_low is None else [rate.ci_low, rate.ci_high]
    return {name: rate.rate, f"{name}_count": rate.count, f"{name}_total": rate.total, f"{name}_ci": interval}


def _group_metrics(held_out: HeldOutSet, scores: np.ndarray, loss: GroupLosses) -> dict[str, Any]:
    groups, trained = held_out.groups, held_out.as_trained
    questions = [group.question for group in groups]
    everything = [True] * len(groups)
    metrics: dict[str, Any] = {}
    verdicts = {
        "eval/accuracy": [_verdict(scores, group.chosen, group.original or group.rejected) for group in groups],
        "eval/accuracy_all": [_verdict(scores, group.chosen, group.rejected) for group in groups],
    }
    for name, judged in verdicts.items():
        metrics |= _rate(name, [verdict == "correct" for verdict in judged], everything, questions)
        metrics[f"{name}_ties"] = judged.count("tie")
    gaps = [scores[group.chosen] - scores[list(group.rejected)].mean(dtype=np.float64) for group in groups]
    every = np.array([scores[at] for group in groups for at in (*group.rejected, group.chosen)], dtype=np.float64)
    metrics |= {
        "eval/score_gap": float(np.mean(gaps)),
        "eval/score_mean": float(every.mean()),
        "eval/score_std": float(every.std(ddof=1)),
    }
    metrics |= {"eval/loss": None, "eval/loss_total": len(trained)}
    if trained:
        rows = [[*group.rejected, group.chosen] for group in trained]
        flat = torch.tensor([float(scores[at]) for row in rows for at in row], dtype=torch.float32)
        metrics["eval/loss"] = float(loss(flat, torch.tensor([len(row) for row in rows]), trained).mean())
    return metrics


def _pair_metrics(pairs: Sequence[BiasPair], scores: np.ndarray, suffix: str) -> dict[str, Any]:
    questions = [pair.question for pair in pairs]
    before = [_verdict(scores, pair.better, pair.others) for pair in pairs]
    after = [_verdict(scores, pair.biased_better, (pair.biased_other,)) for pair in pairs]
    right = [verdict == "correct" for verdict in before]
    flipped = [was and verdict == "wrong" for was, verdict in zip(right, after, strict=True)]
    original, bsr = f"eval/original_accuracy{suffix}", f"eval/bsr{suffix}"
    return {
        **_rate(original, right, [True] * len(pairs), questions),
        f"{original}_ties": before.count("tie"),
        **_rate(bsr, flipped, right, questions),
        f"{bsr}_ties": sum(was and verdict == "tie" for was, verdict in zip(right, after, strict=True)),
    }


def _verdict(scores: np.ndarray, better: int, others: Sequence[int]) -> Verdict:
    """Of one answer against the best of others."""
    return judge_pair(float(scores[better]), max(float(scores[other]) for other in others))
