"""The training loop: objective, schedule, optimizer steps over planned groups, and the log.

Writes: ``train_log.jsonl`` and checkpoints in the run's folder. Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from codes.common.errors import ContrastRMError, optional
from codes.common.records import write_text
from codes.common.scoring import is_out_of_memory
from codes.train.batches import MicroBatch, score_batch, shard_step
from codes.train.checkpoints import CONTINUE, disk_errors, list_checkpoints, load_checkpoint, save_checkpoint
from codes.train.data_utils import Group
from codes.train.divergence import group_lines, write_nan_report
from codes.train.objective import Objective
from codes.train.signals import RunStopped, StopSignals, agree
from codes.train.tracking import Trackers
from codes.train.watch import Watch

LOG_FILE = "train_log.jsonl"


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: linear warm-up, then linear decay to 0."""

    learning_rate: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based ``step``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)


def warmup_in_force(warmup_steps: int, total_steps: int) -> int:
    """The warm-up asked for, or a tenth of the steps where a run is too short to finish it."""
    return warmup_steps if warmup_steps < total_steps else max(1, total_steps // 10) if warmup_steps else 0


class Stateful(Protocol):
    """A part of the run that checkpoints remember beside weights and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume; JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""


class Trainer:
    """One training run: its plan, its state and its log.

    ``parts`` are the objects whose state goes into every checkpoint (``extra`` of ``trainer_state.json``), by name.

    Args:
        groups: All groups that the plan names, the same on every rank.
        plan: The groups of every optimizer step.
        costs: Computed tokens of every group.
        n_tokens: Tokens of every group's texts; None: they are counted.
        steps_per_epoch: None: what one pass over ``groups`` takes.
        packing: ``shared``, ``packed`` or ``off``.
        model, optimizer: Prepared by ``accelerator``.
        fingerprint: What must be the same when a checkpoint is continued.
        save_minutes: A checkpoint at least this often; 0: not by time.
        stop: Where a request to stop is noted.
        trackers: Are told what the log is told.
        token_budget: What checkpoints record of a budget that was chosen by itself; JSON.
        save_model: Saves the finished model; called after the last step, before anything else that follows it. Every rank
            calls it.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        groups: Sequence[Group],
        plan: Sequence[Sequence[int]],
        costs: Sequence[int] | np.ndarray,
        packing: str,
        objective: Objective,
        schedule: Schedule,
        global_batch_size: int,
        micro_batch_size: int,
        max_tokens_per_batch: int,
        max_grad_norm: float,
        seed: int,
        pad_id: int,
        output_dir: Path,
        save_steps: int,
        keep_checkpoints: int,
        logging_steps: int,
        fingerprint: Mapping[str, Any],
        n_tokens: Sequence[int] | np.ndarray | None = None,
        steps_per_epoch: int | None = None,
        save_minutes: float = 0.0,
        stop: StopSignals | None = None,
        trackers: Trackers | None = None,
        token_budget: Mapping[str, Any] | None = None,
        save_model: Callable[[], object] = lambda: None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.groups, self.objective, self.schedule = groups, objective, schedule
        self.plan, self.costs, self.packing = plan, costs, packing
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.max_grad_norm, self.seed, self.pad_id = max_grad_norm, seed, pad_id
        self.output_dir, self.save_steps, self.keep_checkpoints = output_dir, save_steps, keep_checkpoints
        self.logging_steps, self.max_tokens_per_batch = logging_steps, max_tokens_per_batch
        self.n_tokens = np.array([group.n_tokens for group in groups] if n_tokens is None else n_tokens)
        self.steps_per_epoch = steps_per_epoch or math.ceil(len(groups) / global_batch_size)
        self.fingerprint, self.token_budget = dict(fingerprint), token_budget
        self.log: list[dict[str, Any]] = []
        self.step = 0
        self.parts: dict[str, Stateful] = {}
        self.save_minutes, self.stop = save_minutes, stop or StopSignals()
        self.saved_step, self._saved_at = 0, time.monotonic()
        self.trackers = trackers or Trackers([], output_dir)
        self.watch: Watch | None = None
        self.save_model = save_model

    def watch_with(self, watch: Watch) -> None:
        """Evaluate on held-out data between the steps."""
        self.watch = self.parts["watch"] = watch

    def train(self) -> None:
        """Run all steps that are left.

        Raises:
            RunStopped: A signal asked for it; a checkpoint of the last step has been written.
            ContrastRMError: Anything that the user can mend.
        """
        plan = self.plan
        total = sum(self._tokens_of(step) for step in plan)
        done = sum(self._tokens_of(step) for step in plan[: self.step])
        self.model.train()
        with tqdm(
            total=total,
            initial=done,
            desc=f"training ({self.objective.mode})",
            unit="tok",
            unit_scale=True,
            # In a log file every state of the bar is a line.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            disable=not self.accelerator.is_main_process,
        ) as bar:
            if self.watch is not None:
                self.watch.before_training(self.step)
            while self.step < len(plan) and not (self.watch is not None and self.watch.should_stop):
                self.stop_if_asked()
                started = time.perf_counter()
                try:
                    entry = self.train_step(plan[self.step], bar.update)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    # Trying again on this rank alone would leave the others waiting for ever.
                    raise ContrastRMError(
                        f"out of memory in step {self.step + 1} ({(str(error) or type(error).__name__).splitlines()[0]}): lower "
                        f"--max_tokens_per_batch (it is {self.max_tokens_per_batch}) or set --gradient_checkpointing 1, "
                        "then continue from the last checkpoint with --resume auto"
                    ) from error
                self.step += 1
                tokens = self._tokens_of(plan[self.step - 1])
                seconds = time.perf_counter() - started
                is_last = self.step == len(plan)
                if is_last:
                    # Before anything that can fail.
                    self.save_model()
                self._write_log(entry | {"tokens": tokens, "seconds": round(seconds, 4)}, is_last=is_last)
                bar.set_postfix(step=f"{self.step}/{len(plan)}", loss=f"{entry['train/loss']:.4f}")
                if self.watch is not None:
                    # Of several ranks one that goes on alone would leave the others waiting for ever.
                    is_alone = self.accelerator.num_processes == 1
                    with optional("the last evaluation") if is_last and is_alone else nullcontext():
                        self.watch.after_step(self.step, entry["epoch"], is_last=is_last)
                if not is_last and self._is_checkpoint_due():
                    self.save_checkpoint()
        if self.step < len(plan):
            self.save_model()  # stopped early

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
        where = f"after step {self.step} of {len(self.plan)}"
        if self.step:
            raise RunStopped(
                f"stopped {where}: checkpoint-{self.step} holds it; --resume auto (RESUME=auto) goes on there"
            )
        raise RunStopped("stopped before the first step: nothing to save; the same command starts again")

    def _is_checkpoint_due(self) -> bool:
        if self.save_steps and self.step % self.save_steps == 0:
            return True
        if not self.save_minutes:
            return False
        # One clock decides for all ranks.
        is_late = self.accelerator.is_main_process and time.monotonic() - self._saved_at >= 60 * self.save_minutes
        return agree(self.accelerator, is_late)[0]

    def train_step(self, step_groups: Sequence[int], advance: Callable[[int], object]) -> dict[str, Any]:
        """One optimizer step over the given groups; its log entry.

        Args:
            advance: Told the tokens of every micro-batch (of all ranks: they go in step).

        Raises:
            ContrastRMError: The loss is not finite (on every rank at once: the sums are global).
        """
        accelerator = self.accelerator
        micro_steps = accelerator.gradient_accumulation_steps
        rate = self.schedule.rate(self.step)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        batches = shard_step(
            step_groups,
            self.costs,
            micro_batch_size=self.micro_batch_size,
            micro_steps=micro_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            by_length=self.packing == "off",
        )
        # accelerate and DeepSpeed divide by the accumulation and average over ranks: undo both, then normalise by the
        # number of groups that the step has over all ranks.
        scale = micro_steps * accelerator.num_processes / len(step_groups)
        sums = torch.zeros(5, dtype=torch.float32, device=accelerator.device)
        norm: Any = None
        computed: list[tuple[MicroBatch, torch.Tensor, torch.Tensor]] = []
        step_tokens = self._tokens_of(step_groups)
        for position, batch in enumerate(batches):
            with accelerator.accumulate(self.model):
                scores, losses, weights, group_sizes = forward_batch(
                    self.model,
                    self.groups,
                    batch,
                    objective=self.objective,
                    packing=self.packing,
                    pad_id=self.pad_id,
                    device=accelerator.device,
                )
                accelerator.backward((losses * weights).sum() * scale)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self._trained(), self.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += _step_sums(scores.detach(), losses.detach(), weights, group_sizes)
            computed.append((batch, scores.detach(), losses.detach()))
            advance(step_tokens * (position + 1) // micro_steps - step_tokens * position // micro_steps)
        loss, correct, gap, score_sum, n_scores = accelerator.reduce(sums, reduction="sum").tolist()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss of step {self.step + 1} is {loss}", step_groups, computed, loss, norm)
        n = len(step_groups)
        if norm is None and hasattr(self.model, "get_global_grad_norm"):
            norm = self.model.get_global_grad_norm()
        grad_norm = None if norm is None else float(norm)
        # A fused optimizer is told of an overflow in fp16 and skips by itself: accelerate sees a step like any other.
        overflowed = accelerator.scaler is not None and grad_norm is not None and not math.isfinite(grad_norm)
        skipped = overflowed or bool(accelerator.optimizer_step_was_skipped)
        if grad_norm is not None and not math.isfinite(grad_norm) and not skipped:
            raise self._diverged(
                f"the gradient of step {self.step + 1} is {grad_norm}", step_groups, computed, loss, norm
            )
        return {
            "step": self.step + 1,
            "epoch": round((self.step + 1) / self.steps_per_epoch, 4),
            "n_groups": n,
            "train/loss": loss / n,
            "train/accuracy": correct / n,
            "train/score_gap": gap / n,
            "train/score_mean": score_sum / max(1.0, n_scores),
            # An overflow in fp16 is a skipped step, not a number.
            "train/grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            "skipped": skipped,
            "train/learning_rate": rate,
        }

    def _diverged(
        self,
        reason: str,
        step_groups: Sequence[int],
        computed: Sequence[tuple[MicroBatch, torch.Tensor, torch.Tensor]],
        loss: float,
        norm: Any,
    ) -> ContrastRMError:
        """The error of a step that has no finite result, with its report written. Every rank calls it."""
        checkpoints = list_checkpoints(self.output_dir)
        last = checkpoints[-1].name if checkpoints else None
        where = write_nan_report(
            self.accelerator,
            self.output_dir,
            reason=reason,
            step=self.step + 1,
            learning_rate=self.schedule.rate(self.step),
            loss=loss,
            grad_norm=None if norm is None else float(norm),
            lines=group_lines(self.groups, computed, self.accelerator.process_index),
            log=self.log,
            last_checkpoint=last,
        )
        return ContrastRMError(
            f"{reason}: stopped, nothing was saved after {last or 'the start'}. Records of the step: "
            f"{self._names(step_groups)}; {where}. Lower --learning_rate, look at these records, or use --precision bf16 "
            "instead of fp16"
        )

    def _trained(self) -> list[torch.Tensor]:
        """What the optimizer moves: the model's parameters, or their masters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _tokens_of(self, step_groups: Sequence[int]) -> int:
        return int(self.n_tokens[np.asarray(step_groups)].sum())

    def _names(self, step_groups: Sequence[int]) -> str:
        return ", ".join(self.groups[index].record_id for index in step_groups[:8])

    def _write_log(self, entry: dict[str, Any], *, is_last: bool) -> None:
        self.log.append(entry)
        if self.accelerator.is_main_process and (self.step % self.logging_steps == 0 or self.step == 1):
            with (
                optional(LOG_FILE) if is_last else disk_errors(LOG_FILE, CONTINUE),
                (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as handle,
            ):
                handle.write(json.dumps(entry) + "\n")
            speed = {"train/tokens_per_second": entry["tokens"] / max(entry["seconds"], 1e-9)}
            self.trackers.log(
                {key: entry[key] for key in entry if "train/" in key or key == "epoch"} | speed, self.step
            )

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-<step>``."""
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            step=self.step,
            state={"fingerprint": self.fingerprint, "token_budget": self.token_budget} | self.state_dict(),
            keep_checkpoints=self.keep_checkpoints,
        )
        self.saved_step, self._saved_at = self.step, time.monotonic()
        if self.watch is not None:
            self.watch.checkpoint_written()

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: step, log and the states of its parts; JSON. The plan follows from the seed."""
        extra = {name: part.state_dict() for name, part in self.parts.items()}
        return {"step": self.step, "log": self.log, "extra": extra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. A part that the checkpoint does not know starts anew."""
        self.step, self.log = int(state["step"]), list(state["log"])
        self.saved_step, self._saved_at = self.step, time.monotonic()
        for name, part in self.parts.items():
            if name in state.get("extra", {}):
                part.load_state_dict(state["extra"][name])

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, random state, step and log.

        Raises:
            ContrastRMError: It belongs to a run with other data or settings.
        """
        self.load_state_dict(load_checkpoint(self.accelerator, checkpoint, self.fingerprint))
        if self.accelerator.is_main_process:
            lines = [
                json.dumps(entry) + "\n"
                for entry in self.log
                if entry["step"] % self.logging_steps == 0 or entry["step"] == 1
            ]
            write_text(self.output_dir / LOG_FILE, "".join(lines))


def forward_batch(
    model: Callable[..., torch.Tensor],
    all_groups: Sequence[Group],
    batch: MicroBatch,
    *,
    objective: Objective,
    packing: str,
    pad_id: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores ``(N,)``, losses ``(G,)``, weights ``(G,)`` and group sizes ``(G,)`` of a micro-batch."""
    groups = [all_groups[index] for index in batch.groups]
    scores, group_sizes, weights = score_batch(
        model, groups, batch.weights, packing=packing, pad_id=pad_id, device=device
    )
    losses = objective.group_losses(scores.float(), group_sizes, groups)
    return scores, losses, weights, group_sizes


def _step_sums(
    scores: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """Weighted sums ``(5,)``: loss, groups whose chosen beats every rejected, gap to the mean rejected, scores, their number."""
    # Without waiting: the next pack is built while the device computes.
    sizes = group_sizes.to(scores.device, non_blocking=True)
    index = torch.repeat_interleave(sizes, output_size=scores.shape[0])
    chosen_rows = torch.cumsum(sizes, dim=0) - 1
    chosen = scores[chosen_rows]
    rejected_only = scores.scatter(0, chosen_rows, -torch.inf)
    best = torch.full_like(chosen, -torch.inf).scatter_reduce(0, index, rejected_only, reduce="amax")
    totals = torch.zeros_like(chosen).index_add(0, index, scores)
    gap = chosen - (totals - chosen) / (sizes - 1)
    parts = [losses, (chosen > best).float(), gap, totals, sizes.float()]
    return torch.stack([(part * weights).sum() for part in parts])
