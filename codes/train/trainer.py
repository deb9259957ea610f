"""The training loop: optimizer steps over planned groups, the learning rate, the log, and what is said of a failed step.

Writes: ``train_log.jsonl``, ``nan_report.json`` and checkpoints in the run's folder. Used by
``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from codes.common.errors import ContrastRMError, optional
from codes.common.records import write_json, write_text
from codes.common.scoring import is_out_of_memory
from codes.train.batches import BatchPlan
from codes.train.checkpoints import (
    CONTINUE,
    disk_errors,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    what_is_left,
)
from codes.train.data_utils import Group
from codes.train.engine import Schedule
from codes.train.evaluation import HeldOutEvaluation
from codes.train.losses import group_losses
from codes.train.settings import TrainSettings
from codes.train.signals import RunStopped, StopSignals, agree
from codes.train.tracking import Trackers

LOG_FILE = "train_log.jsonl"
NAN_REPORT_FILE = "nan_report.json"
# Steps before the failure that the report shows.
HISTORY_STEPS = 10


@dataclass(frozen=True)
class ComputedBatch:
    """What a rank computed of one micro-batch: what the log sums up and the report of a failed step shows.

    Attributes:
        scores: ``(N,)``, detached.
        losses: ``(G,)``, detached.
        weights: ``(G,)``; 0 marks a group that only fills a place.
        group_sizes: ``(G,)`` int64 on the CPU.
    """

    groups: Sequence[Group]
    scores: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor
    group_sizes: torch.Tensor


class Trainer:
    """One training run: its plan, its state and its log.

    Args:
        model, optimizer: Prepared by ``accelerator``.
        fingerprint: What must be the same when a checkpoint is continued.
        token_budget: What checkpoints record of a budget that was chosen by itself; JSON.
        save: Writes the model in training into a folder; every rank calls it. The finished model is saved after the last step,
            before anything else that follows it.
        stop: Where a request to stop is noted.
        trackers: Are told what the log is told.
        evaluation: Evaluates on held-out data between the steps.
        started: ``time.perf_counter()`` at the start of the run.
    """

    def __init__(
        self,
        settings: TrainSettings,
        plan: BatchPlan,
        *,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        fingerprint: Mapping[str, Any],
        save: Callable[[Path], object] = lambda folder: None,
        token_budget: Mapping[str, Any] | None = None,
        stop: StopSignals | None = None,
        trackers: Trackers | None = None,
        evaluation: HeldOutEvaluation | None = None,
        started: float | None = None,
    ) -> None:
        self.settings, self.plan = settings, plan
        self.schedule = Schedule.of(settings.optimizer, len(plan.steps))
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.fingerprint, self.token_budget, self.save = dict(fingerprint), token_budget, save
        self.output_dir = Path(settings.output_dir)
        self.stop, self.trackers = stop or StopSignals(), trackers or Trackers([], self.output_dir)
        self.evaluation = evaluation
        self.log: list[dict[str, Any]] = []
        self.step = 0
        self.started = time.perf_counter() if started is None else started
        self.saved_step, self._saved_at = 0, time.monotonic()

    def train(self) -> None:
        """Run all steps that are left.

        Raises:
            RunStopped: A signal asked for it; a checkpoint of the last step has been written.
            ContrastRMError: Anything that the user can mend.
        """
        steps = self.plan.steps
        self.model.train()
        with self._progress_bar() as bar:
            if self.evaluation is not None:
                self.evaluation.before_training(self.step)
            while self.step < len(steps) and not (self.evaluation is not None and self.evaluation.should_stop):
                self.stop_if_asked()
                started = time.perf_counter()
                with self._memory_errors():
                    entry = self.train_step(steps[self.step], bar.update)
                entry["tokens"] = self.plan.tokens_of(steps[self.step])
                entry["seconds"] = round(time.perf_counter() - started, 4)
                self.step += 1
                is_last = self.step == len(steps)
                if is_last:
                    # Before anything that can fail.
                    self._save_finished()
                self._write_log(entry, is_last=is_last)
                bar.set_postfix(step=f"{self.step}/{len(steps)}", loss=f"{entry['train/loss']:.4f}")
                self._evaluate(entry["epoch"], is_last=is_last)
                if not is_last and self._is_checkpoint_due():
                    self.save_checkpoint()
        if self.step < len(steps):
            self._save_finished()  # stopped early

    def _save_finished(self) -> None:
        try:
            self.save(self.output_dir)
        except ContrastRMError as error:
            raise ContrastRMError(f"{error}; {what_is_left(self.output_dir)}") from error
        if self.accelerator.is_main_process:
            print(
                f"saved the reward model in {self.output_dir} ({time.perf_counter() - self.started:.0f} s)", flush=True
            )

    def _progress_bar(self) -> tqdm[Any]:
        tokens = [self.plan.tokens_of(step) for step in self.plan.steps]
        return tqdm(
            total=sum(tokens),
            initial=sum(tokens[: self.step]),
            desc=f"training ({self.settings.objective.mode})",
            unit="tok",
            unit_scale=True,
            # In a log file every state of the bar is a line.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            disable=not self.accelerator.is_main_process,
        )

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Name the cure where a step runs out of memory. Trying again on this rank alone would leave the others waiting."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ContrastRMError(
                f"out of memory in step {self.step + 1} ({(str(error) or type(error).__name__).splitlines()[0]}): lower "
                f"--max_tokens_per_batch (it is {self.plan.max_tokens}) or set --gradient_checkpointing 1, "
                "then continue from the last checkpoint with --resume auto"
            ) from error

    def _evaluate(self, epoch: float, *, is_last: bool) -> None:
        if self.evaluation is None:
            return
        # Of several ranks one that goes on alone would leave the others waiting for ever.
        is_alone = self.accelerator.num_processes == 1
        with optional("the last evaluation") if is_last and is_alone else nullcontext():
            self.evaluation.after_step(self.step, epoch, is_last=is_last)

    def stop_if_asked(self) -> None:
        """Between two steps, on all ranks together: end the run where a signal has asked any of them to.

        Raises:
            RunStopped: After the checkpoint.
        """
        if not agree(self.accelerator, self.stop.is_wanted)[0]:
            return
        if self.step > self.saved_step:
            self.save_checkpoint()
        self.accelerator.end_training()
        where = f"after step {self.step} of {len(self.plan.steps)}"
        if self.step:
            raise RunStopped(
                f"stopped {where}: checkpoint-{self.step} holds it; --resume auto (RESUME=auto) goes on there"
            )
        raise RunStopped("stopped before the first step: nothing to save; the same command starts again")

    # --- one step ---

    def train_step(self, step: Sequence[int], advance: Callable[[int], object]) -> dict[str, Any]:
        """One optimizer step over the given groups; its log entry.

        Args:
            advance: Told the tokens of every micro-batch (of all ranks: they go in step).

        Raises:
            ContrastRMError: The loss is not finite (on every rank at once: the sums are global).
        """
        rate = self.schedule.rate(self.step)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        computed, norm = self._compute(step, advance)
        sums = torch.zeros(5, dtype=torch.float32, device=self.accelerator.device)
        for batch in computed:
            sums += _step_sums(batch)
        loss, correct, gap, score_sum, n_scores = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss of step {self.step + 1} is {loss}", step, computed, loss, norm)
        # A fused optimizer is told of an overflow in fp16 and skips by itself: accelerate sees a step like any other.
        overflowed = self.accelerator.scaler is not None and norm is not None and not math.isfinite(norm)
        skipped = overflowed or bool(self.accelerator.optimizer_step_was_skipped)
        if norm is not None and not math.isfinite(norm) and not skipped:
            raise self._not_finite(f"the gradient of step {self.step + 1} is {norm}", step, computed, loss, norm)
        n = len(step)
        return {
            "step": self.step + 1,
            "epoch": round((self.step + 1) / self.plan.steps_per_epoch, 4),
            "n_groups": n,
            "train/loss": loss / n,
            "train/accuracy": correct / n,
            "train/score_gap": gap / n,
            "train/score_mean": score_sum / max(1.0, n_scores),
            # An overflow in fp16 is a skipped step, not a number.
            "train/grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "skipped": skipped,
            "train/learning_rate": rate,
        }

    def _compute(
        self, step: Sequence[int], advance: Callable[[int], object]
    ) -> tuple[list[ComputedBatch], float | None]:
        """Compute this rank's micro-batches and move the weights; what was computed, and the norm of the gradient."""
        accelerator = self.accelerator
        micro_steps, step_tokens = accelerator.gradient_accumulation_steps, self.plan.tokens_of(step)
        # accelerate and DeepSpeed divide by the accumulation and average over ranks: undo both, then normalise by the
        # number of groups that the step has over all ranks.
        scale = micro_steps * accelerator.num_processes / len(step)
        computed: list[ComputedBatch] = []
        norm: Any = None
        for position, batch in enumerate(self.plan.micro_batches(step, accelerator.process_index, micro_steps)):
            with accelerator.accumulate(self.model):
                groups, scores, sizes, weights = self.plan.score(self.model, batch, accelerator.device)
                losses = group_losses(self.settings.objective, scores.float(), sizes, groups)
                accelerator.backward((losses * weights).sum() * scale)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self._trained(), self.settings.optimizer.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            computed.append(ComputedBatch(groups, scores.detach(), losses.detach(), weights, sizes))
            advance(step_tokens * (position + 1) // micro_steps - step_tokens * position // micro_steps)
        if norm is None and hasattr(self.model, "get_global_grad_norm"):
            norm = self.model.get_global_grad_norm()
        return computed, None if norm is None else float(norm)

    def _trained(self) -> list[torch.Tensor]:
        """What the optimizer moves: the model's parameters, or their masters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _not_finite(
        self, reason: str, step: Sequence[int], computed: Sequence[ComputedBatch], loss: float, norm: float | None
    ) -> ContrastRMError:
        """The error of a step that has no finite result, with its report written. Every rank calls it."""
        checkpoints = list_checkpoints(self.output_dir)
        last = checkpoints[-1].name if checkpoints else None
        lines: list[dict[str, Any]] = gather_object(report_lines(computed, self.accelerator.process_index))
        where = f"see {NAN_REPORT_FILE}"
        if self.accelerator.is_main_process:
            where = write_nan_report(
                self.output_dir / NAN_REPORT_FILE,
                {
                    "step": self.step + 1,
                    "reason": reason,
                    "loss": as_json(loss),
                    "grad_norm": as_json(norm),
                    "learning_rate": self.schedule.rate(self.step),
                    "last_checkpoint": last,
                },
                lines,
                self.log,
            )
        records = ", ".join(self.plan.groups[index].record_id for index in step[:8])
        return ContrastRMError(
            f"{reason}: stopped, nothing was saved after {last or 'the start'}. Records of the step: "
            f"{records}; {where}. Lower --learning_rate, look at these records, or use --precision bf16 instead of fp16"
        )

    # --- the log and the checkpoints ---

    def _is_logged(self, step: int) -> bool:
        return step % self.settings.report.logging_steps == 0 or step == 1

    def _write_log(self, entry: dict[str, Any], *, is_last: bool) -> None:
        self.log.append(entry)
        if not (self.accelerator.is_main_process and self._is_logged(self.step)):
            return
        with (
            optional(LOG_FILE) if is_last else disk_errors(LOG_FILE, CONTINUE),
            (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as handle,
        ):
            handle.write(json.dumps(entry) + "\n")
        speed = {"train/tokens_per_second": entry["tokens"] / max(entry["seconds"], 1e-9)}
        self.trackers.log({key: entry[key] for key in entry if "train/" in key or key == "epoch"} | speed, self.step)

    def _is_checkpoint_due(self) -> bool:
        settings = self.settings.checkpoints
        if settings.save_steps and self.step % settings.save_steps == 0:
            return True
        if not settings.save_minutes:
            return False
        # One clock decides for all ranks.
        is_late = self.accelerator.is_main_process and time.monotonic() - self._saved_at >= 60 * settings.save_minutes
        return agree(self.accelerator, is_late)[0]

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-<step>``: besides accelerate's own state the step, the log and the evaluations, as JSON.

        The order of the groups follows from the seed.
        """
        state = {"fingerprint": self.fingerprint, "token_budget": self.token_budget, "step": self.step, "log": self.log}
        if self.evaluation is not None:
            state["evaluation"] = self.evaluation.state_dict()
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            step=self.step,
            state=state,
            keep_checkpoints=self.settings.checkpoints.keep_checkpoints,
        )
        self.saved_step, self._saved_at = self.step, time.monotonic()
        if self.evaluation is not None:
            self.evaluation.checkpoint_written()

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, random state, step, log and evaluations.

        Raises:
            ContrastRMError: It belongs to a run with other data or settings.
        """
        state = load_checkpoint(self.accelerator, checkpoint, self.fingerprint)
        self.step, self.log = int(state["step"]), list(state["log"])
        self.saved_step, self._saved_at = self.step, time.monotonic()
        if self.evaluation is not None:
            self.evaluation.load_state_dict(state["evaluation"])
        if self.accelerator.is_main_process:
            lines = [json.dumps(entry) + "\n" for entry in self.log if self._is_logged(entry["step"])]
            write_text(self.output_dir / LOG_FILE, "".join(lines))


def _step_sums(batch: ComputedBatch) -> torch.Tensor:
    """Weighted sums ``(5,)``: loss, groups whose chosen beats every rejected, gap to the mean rejected, scores, their number."""
    scores = batch.scores
    # Without waiting: the next pack is built while the device computes.
    sizes = batch.group_sizes.to(scores.device, non_blocking=True)
    index = torch.repeat_interleave(sizes, output_size=scores.shape[0])
    chosen_rows = torch.cumsum(sizes, dim=0) - 1
    chosen = scores[chosen_rows]
    rejected_only = scores.scatter(0, chosen_rows, -torch.inf)
    best = torch.full_like(chosen, -torch.inf).scatter_reduce(0, index, rejected_only, reduce="amax")
    totals = torch.zeros_like(chosen).index_add(0, index, scores)
    gap = chosen - (totals - chosen) / (sizes - 1)
    parts = [batch.losses, (chosen > best).float(), gap, totals, sizes.float()]
    return torch.stack([(part * batch.weights).sum() for part in parts])


# --- a step that has no finite result ---


def as_json(value: float | None) -> float | str | None:
    """A number as JSON has it: ``"nan"``, ``"inf"`` and ``"-inf"`` are texts."""
    return value if value is None or math.isfinite(value) else str(float(value))


def report_lines(computed: Sequence[ComputedBatch], rank: int) -> list[dict[str, Any]]:
    """One line for each group that counted on this rank."""
    lines: list[dict[str, Any]] = []
    for number, batch in enumerate(computed):
        rows = torch.split(batch.scores.float().cpu(), batch.group_sizes.tolist())
        parts = zip(batch.groups, batch.weights.tolist(), rows, batch.losses.tolist(), strict=True)
        for group, weight, scores, loss in parts:
            if weight == 0.0:  # a filler, so that all ranks take equally many micro-steps
                continue
            lines.append(
                {
                    "id": group.record_id,
                    "rank": rank,
                    "micro_batch": number,
                    "n_tokens": group.n_tokens,
                    "loss": as_json(loss),
                    "scores_rejected": [as_json(score) for score in scores[:-1].tolist()],
                    "score_chosen": as_json(scores[-1].item()),
                }
            )
    return lines


def write_nan_report(
    path: Path, step: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]
) -> str:
    """Write ``nan_report.json``, which people open; the text that says where it is.

    Args:
        step: What is known of the step as a whole.
        lines: The ``report_lines`` of all ranks.
        log: Entries of the steps before.
    """
    # The step's own norm is of all micro-batches together, after the optimizer has moved: nothing finer is left of it.
    kept = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/score_mean", "skipped")
    broken = [line["id"] for line in lines if _is_broken(line)]
    history = [{key: entry.get(key) for key in kept} for entry in log[-HISTORY_STEPS:]]
    report = {"n_groups": len(lines), "groups_not_finite": broken, "groups": lines, "steps_before": history}
    try:
        write_json(path, {**step, **report})
    except ContrastRMError as error:
        return f"its report could not be written ({error})"
    return f"scores, losses and the steps before are in {path}"


def _is_broken(line: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) for value in (line["loss"], line["score_chosen"], *line["scores_rejected"]))
