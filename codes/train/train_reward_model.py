"""Train a reward model on groups of one chosen and many rejected answers.

Reads: preference records (``codes.train.sources`` says from where). Writes: ``<output_dir>/`` (a plain Hugging Face folder
with model card), ``train_log.jsonl``, ``eval_log.jsonl``, ``training_curves.*``, ``train_args.json``, ``train_summary.json``,
``checkpoint-<step>/`` and ``best-<step>/`` folders, ``held_out.jsonl`` and ``tensorboard/``.
Run: ``python -m codes.train.train_reward_model --train_file data/train/own_train.jsonl --output_dir output/contrastive``
(with DeepSpeed: ``bash run_training.sh``).

Functions import what is heavy themselves: the command line is checked, and ``--help`` answered, before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codes.common.cli import EXIT_STOPPED, is_first_process, run
from codes.common.errors import ContrastRMError
from codes.common.records import ensure_writable_folder, write_json, write_jsonl
from codes.common.settings import add_settings, flag_values, settings_from
from codes.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from codes.train.batches import BatchPlan
    from codes.train.engine import LoadedModel
    from codes.train.evaluation import Ranking
    from codes.train.held_out import HeldOutRecords, HeldOutSet
    from codes.train.signals import StopSignals
    from codes.train.trainer import Trainer

ARGUMENTS_FILE = "train_args.json"


def train(settings: TrainSettings, *, stop: StopSignals | None = None, try_budget: bool | None = None) -> Path:
    """Train and save: load data and model, plan the batches, fit, save, report.

    Args:
        stop: Where a request to stop is noted.
        try_budget: As in ``token_budget.plan_batches``.

    Returns:
        The folder of the finished model.

    Raises:
        ContrastRMError: Anything that the user can mend.
        RunStopped: As asked; a checkpoint holds everything.
    """
    from codes.train import checkpoints, engine, report
    from codes.train.evaluation import resolve_ranking
    from codes.train.token_budget import plan_batches
    from codes.train.training_data import encode_evaluation, load_data

    started, resume = time.perf_counter(), settings.checkpoints.resume
    folder = open_run(settings)
    # Before the weights are loaded: a bad row shows at once.
    data, held_out_records = load_data(settings)

    loaded = engine.load_model(settings, data.max_length)
    held_out = encode_evaluation(settings, held_out_records, loaded.formatter)
    ranking = resolve_ranking(held_out, settings.evaluation)
    accelerator = engine.make_accelerator(precision=loaded.precision)
    packing = engine.settle_packing(loaded, accelerator, settings.compute.packing)

    schedule = engine.Schedule.of(settings.optimizer, data.draws.total_steps)
    fingerprint = checkpoints.run_fingerprint(settings, accelerator, loaded, schedule, data.fingerprint(), held_out)
    if resume == "auto" and checkpoints.is_finished(folder, fingerprint):
        accelerator.print(
            f"{folder} holds the finished model of this run ({schedule.total_steps} steps): nothing left to train"
        )
        accelerator.end_training()
        return folder
    checkpoints.ensure_space(folder, loaded.model)
    checkpoint = checkpoints.choose_checkpoint(accelerator, resume, folder)

    plan, token_budget = plan_batches(
        settings, loaded, data.draws, accelerator, packing=packing, checkpoint=checkpoint, try_budget=try_budget
    )
    if accelerator.is_main_process:
        report.print_run(settings, loaded, data, plan, schedule, held_out_records, held_out)
    state: dict[str, Any] = {"fingerprint": fingerprint, "token_budget": token_budget, "stop": stop, "started": started}
    trainer = build_trainer(settings, loaded, accelerator, plan=plan, held_out=held_out, ranking=ranking, **state)
    begin(trainer, checkpoint, held_out_records, loaded.precision)
    try:
        trainer.train()
        # The model is saved. What follows can only add to it.
        report.report_run(trainer, data, held_out_records, text_pairs=not loaded.formatter.has_template)
    finally:
        trainer.trackers.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def open_run(settings: TrainSettings) -> Path:
    """The run's folder; what can be known to be wrong before anything is read.

    Raises:
        ContrastRMError: A run would replace the model that it starts from, a tracker is not installed, or the DeepSpeed
            configuration is unusable.
    """
    from codes.train.checkpoints import EARLIER_FOLDER
    from codes.train.engine import zero_config
    from codes.train.lora import ADAPTER_FOLDER
    from codes.train.tracking import check_trackers

    output_dir = ensure_writable_folder(settings.output_dir)
    # A run replaces the model of an earlier run in its folder.
    model, folder = Path(settings.model.model_path).expanduser().resolve(), output_dir.resolve()
    top = model.relative_to(folder).parts[:1] if model.is_relative_to(folder) else ("elsewhere",)
    if not top or top[0] in (ADAPTER_FOLDER, EARLIER_FOLDER) or top[0].startswith("best-"):
        raise ContrastRMError(
            f"--model_path {settings.model.model_path} lies in --output_dir {output_dir}, where the run would overwrite it: "
            "choose another --output_dir (to continue a run, keep its first --model_path and set --resume auto)"
        )
    check_trackers(settings.report.report_to)
    zero_config()
    return output_dir


def build_trainer(
    settings: TrainSettings,
    loaded: LoadedModel,
    accelerator: Accelerator,
    *,
    plan: BatchPlan,
    held_out: HeldOutSet | None,
    ranking: Ranking | None,
    **state: Any,
) -> Trainer:
    """The trainer of a run, with its evaluation, and model and optimizer as the accelerator runs them.

    Args:
        state: The other arguments of ``Trainer``.
    """
    from accelerate.utils import set_seed

    from codes.train import engine
    from codes.train.evaluation import HeldOutEvaluation
    from codes.train.tracking import Trackers
    from codes.train.trainer import Trainer

    engine.set_accumulation(accelerator, plan.micro_steps, max_grad_norm=settings.optimizer.max_grad_norm)
    set_seed(settings.seed)
    model, optimizer = engine.prepare(accelerator, loaded.model, settings.optimizer, precision=loaded.precision)
    save = partial(engine.save_weights, accelerator, model, loaded.tokenizer)
    trackers = Trackers(settings.report.report_to if accelerator.is_main_process else (), Path(settings.output_dir))
    evaluation = None
    if held_out is not None:
        evaluation = HeldOutEvaluation(
            settings,
            held_out,
            accelerator,
            model=model,
            formatter=loaded.formatter,
            plan=plan,
            ranking=ranking,
            save=save,
            trackers=trackers,
        )
    return Trainer(
        settings,
        plan,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        save=save,
        trackers=trackers,
        evaluation=evaluation,
        **state,
    )


def begin(trainer: Trainer, checkpoint: Path | None, held_out: HeldOutRecords | None, precision: str) -> None:
    """Go on from a checkpoint, or make way in the folder for a new run; write down what the run is. Every rank calls it."""
    from codes.train.checkpoints import make_way, remove_unfinished
    from codes.train.evaluation import BEST_FILE, EVAL_LOG_FILE, BestFolder
    from codes.train.held_out import HELD_OUT_FILE
    from codes.train.plots import CURVES
    from codes.train.report import run_arguments
    from codes.train.trainer import LOG_FILE, NAN_REPORT_FILE

    accelerator, folder = trainer.accelerator, trainer.output_dir
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    elif accelerator.is_main_process:
        # What a run writes beside its model and summary that could pass for another run's.
        logs = (LOG_FILE, EVAL_LOG_FILE, NAN_REPORT_FILE)
        make_way(folder, (*logs, HELD_OUT_FILE, BEST_FILE, ARGUMENTS_FILE, f"{CURVES}.*", "best-*"))
        BestFolder(folder).keep_only()
    if accelerator.is_main_process:
        remove_unfinished(folder)
        arguments = run_arguments(trainer.settings)
        resolved = {"resolved_precision": precision, "world_size": accelerator.num_processes}
        write_json(folder / ARGUMENTS_FILE, arguments | resolved)
        if held_out is not None:
            write_jsonl(folder / HELD_OUT_FILE, (record.to_row() for record in held_out.records))
        trainer.trackers.start(first_step=trainer.step + 1 if checkpoint is not None else 0, config=arguments)
    accelerator.wait_for_everyone()


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module: a flag for every setting."""
    parser = argparse.ArgumentParser(description="Train a reward model.")
    add_settings(parser, TrainSettings)
    return parser


def idle_flags(settings: TrainSettings) -> list[str]:
    """Flags that were changed and that another flag makes idle, each with the reason."""
    values, defaults = flag_values(settings), flag_values(TrainSettings())
    owners = (
        (values["mode"] == "contrastive", "--mode contrastive", ("margin", "pairwise_loss")),
        (values["mode"] == "pairwise", "--mode pairwise", ("temperature",)),
        (
            not values["lora_rank"],
            "--lora_rank 0",
            ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora"),
        ),
    )
    return [
        f"--{name} {values[name]}: {owner} does not use it"
        for is_idle, owner, names in owners
        for name in names
        if is_idle and values[name] != defaults[name]
    ]


def unread_variables(settings: TrainSettings, argv: Sequence[str]) -> list[str]:
    """Variables of the environment that are named like a flag which was not given: the launcher hands on its knobs alone."""
    return [
        f"{name.upper()} in the environment: it is the flag --{name}"
        for name in flag_values(settings)
        if os.environ.get(name.upper()) and f"--{name}" not in argv
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train, or report on the data; 75 where a signal stopped the run with a checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    settings = settings_from(build_parser().parse_args(argv), TrainSettings)
    if is_first_process():
        idle = [*idle_flags(settings), *unread_variables(settings, argv)]
        print("".join(f"no effect: {setting}\n" for setting in idle), end="", flush=True)
    if settings.data.estimate:
        from codes.train.estimate import estimate

        if is_first_process():
            estimate(settings)
        return 0
    from codes.train.checkpoints import hold_folder
    from codes.train.signals import RunStopped, StopSignals, failures_told, tell_launcher

    try:
        with StopSignals() as stop, failures_told(), hold_folder(settings.output_dir):
            train(settings, stop=stop)
    except RunStopped as stopped:
        if is_first_process():
            print(stopped, flush=True)
        # A launcher would make a failure of it, with a traceback; its shell is told instead.
        return 0 if tell_launcher(f"exit {EXIT_STOPPED}") else EXIT_STOPPED
    return 0


if __name__ == "__main__":
    run(main)
