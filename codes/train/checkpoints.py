"""Checkpoints of a run: ``checkpoint-<step>`` folders that are there whole or not at all.

A checkpoint is written beside its place, flushed to disk, listed in ``manifest.json`` (sizes and SHA-256) and renamed; a resume
reads the manifest and passes over a checkpoint that was damaged since. All ranks need to see the folder: on several nodes it lies
on a shared file system.
Used by ``python -m codes.train.train_reward_model`` (``--save_steps``, ``--save_minutes``, ``--resume``).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, load
from safetensors import SafetensorError

from codes.common.cli import is_first_process
from codes.common.errors import ContrastRMError
from codes.common.files import hold, permit, sync
from codes.common.records import ensure_writable_folder, file_sha256, write_json
from codes.train.engine import LoadedModel, Schedule, keeps_master_weights
from codes.train.held_out import HeldOutSet
from codes.train.reward_model import RewardModel, saved_bytes
from codes.train.settings import TrainSettings
from codes.train.signals import is_lost_peer

STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "train_summary.json"
LOCK_FILE = ".training.lock"
# A finished run's logs and best weights, while another run is at work in its folder.
EARLIER_FOLDER = "earlier_run"
CONTINUE = "free some space, then continue with --resume auto (RESUME=auto)"
# Hashing leaves the interpreter's lock: a few threads read as fast as a disk gives.
HASH_THREADS = 4
# torch's own switches over what its callers ask for.
ONLY_DATA, NOT_ONLY_DATA = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# What torch's writer says, without an errno, when the disk refuses a part of a file.
WRITE_FAILURE = re.compile(r"PytorchStreamWriter|PytorchFileWriter|inline_container|iostream|file write failed", re.I)


@contextmanager
def disk_errors(what: str, cure: str) -> Iterator[None]:
    """Turn what a full or failing disk raises into an error with its cure.

    Raises:
        ContrastRMError: The disk refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ContrastRMError) as error:
        # A writer of JSON has named its own file already; what matters here is the whole.
        cause = error.__cause__ if isinstance(error, ContrastRMError) else error
        is_refusal = isinstance(cause, OSError | SafetensorError) or (
            isinstance(cause, RuntimeError) and WRITE_FAILURE.search(str(cause)) is not None
        )
        if is_lost_peer(error) or not is_refusal:
            raise
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise ContrastRMError(f"cannot write {what}: {reason}; {cure}") from error


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, *, step: int, state: Mapping[str, Any], keep_checkpoints: int
) -> None:
    """Write ``checkpoint-<step>`` whole or not at all, then forget the oldest ones. Every rank calls it.

    Args:
        state: What the loop needs beside accelerate's own state; JSON.

    Raises:
        ContrastRMError: The disk refuses it. What was there before is untouched.
    """
    target = output_dir / f"checkpoint-{step}"
    scratch = output_dir / f".checkpoint-{step}.saving"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with disk_errors(
            f"the checkpoint of step {step}",
            f"the run stops here, and the checkpoints before it are whole. Free some space in {output_dir}, then continue "
            "with --resume auto (RESUME=auto)",
        ):
            _write_parts(accelerator, scratch, state)
            if accelerator.is_main_process:
                if target.exists():
                    # Only a run that went back behind this step finds one: out of sight, then away.
                    _remove(target)
                os.replace(scratch, target)
                sync(output_dir)
    except BaseException:
        # Half a checkpoint would keep a full disk full.
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        # After going back to an earlier checkpoint the later ones stay until they are written again.
        for old in [path for path in list_checkpoints(output_dir) if step_of(path) <= step][:-keep_checkpoints]:
            _remove(old)
    accelerator.wait_for_everyone()


def _write_parts(accelerator: Accelerator, scratch: Path, state: Mapping[str, Any]) -> None:
    """Everything of a checkpoint, on disk, with its manifest."""

    def without_wrappers(models: list[torch.nn.Module], weights: list[Any], _folder: str) -> None:
        # Under DeepSpeed there are none: it writes its own pieces.
        if weights:
            weights[:] = [_changing_weights(accelerator.unwrap_model(model)) for model in models]

    # DeepSpeed is told the same in its own words.
    own = {"exclude_frozen_parameters": True} if _is_deepspeed(accelerator) else {}
    with accelerator.register_save_state_pre_hook(without_wrappers):
        accelerator.save_state(str(scratch), **own)
    if accelerator.is_main_process:
        write_json(scratch / STATE_FILE, dict(state))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in (*scratch.rglob("*"), scratch):
            permit(path)
    files = _files(scratch)[accelerator.process_index :: accelerator.num_processes]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries: list[dict[str, Any]] = list(pool.map(lambda path: _sealed(scratch, path), files))
    # Also the barrier behind which every file is on disk.
    gathered: list[dict[str, Any]] = gather_object(entries)
    if accelerator.is_main_process:
        write_json(scratch / MANIFEST_FILE, {"files": sorted(gathered, key=lambda entry: str(entry["path"]))})
        for folder in (*(path for path in scratch.rglob("*") if path.is_dir()), scratch):
            sync(folder)


def _changing_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: frozen weights are the base model's, and a run with an adapter begins with loading that."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def frozen_digest(model: torch.nn.Module) -> str | None:
    """A fingerprint of the frozen weights, which no checkpoint holds; None where there are none.

    The first numbers of each: another base model differs in all of them, and nothing of its size needs to be read.
    """
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return None
    digest = hashlib.sha256()
    for name, parameter in frozen:
        numbers = parameter.detach().flatten()[:1024].double().cpu().numpy()
        digest.update(f"{name}:{tuple(parameter.shape)}:".encode() + numbers.tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def _sealed(folder: Path, path: Path) -> dict[str, Any]:
    """Flush a file to disk; its line of the manifest."""
    sync(path)
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _remove(checkpoint: Path) -> None:
    # Out of sight first: half a checkpoint must not stay when the run is killed in the middle of this.
    hidden = checkpoint.with_name(f".{checkpoint.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Restore weights, optimizer and random state; the state that ``save_checkpoint`` was given.

    Args:
        fingerprint: What must be the same as in the run that wrote it.

    Raises:
        ContrastRMError: It belongs to a run with other data or settings.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    check_same_run(checkpoint, state["fingerprint"], fingerprint)

    def without_wrappers(models: list[torch.nn.Module], _folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    # Where weights are frozen, a checkpoint holds the others alone.
    is_whole = state["fingerprint"].get("frozen") is None
    strictness = {"load_module_strict" if _is_deepspeed(accelerator) else "strict": is_whole}
    try:
        with accelerator.register_load_state_pre_hook(without_wrappers), _only_data(accelerator):
            for random_state in checkpoint.glob(f"random_states_{accelerator.process_index}.pkl"):
                load(random_state)  # accelerate would go on without a word where it cannot be read
            accelerator.load_state(str(checkpoint), **strictness)
    except pickle.UnpicklingError as error:
        raise ContrastRMError(
            f"{checkpoint} was not loaded: it holds more than numbers, and loading it could run code of whoever wrote it "
            f"({str(error).strip().splitlines()[0]}). Take another checkpoint, or one that this version has written"
        ) from error
    # accelerate also restores its count of micro-steps, which another micro-batch size or world size would shift against
    # our steps. A checkpoint always lies between two steps.
    accelerator.step = 0
    return state


@contextmanager
def _only_data(accelerator: Accelerator) -> Iterator[None]:
    """Within it ``torch.load`` builds tensors and plain values, whatever its caller asks for: DeepSpeed asks for everything."""
    allowed: list[Any] = []
    if _is_deepspeed(accelerator):
        # Imported where it is used: one process needs no DeepSpeed.
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (ONLY_DATA, NOT_ONLY_DATA)}
    os.environ[ONLY_DATA] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        del os.environ[ONLY_DATA]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def recorded_budget(checkpoint: Path | None, made_for: Mapping[str, Any]) -> int:
    """The token budget that the run which wrote a checkpoint chose by itself, under the same circumstances.

    Args:
        made_for: What the budget depends on and a resume may change; JSON.

    Returns:
        0: none is recorded (one was set, say), or it was chosen for something else.
    """
    if checkpoint is None:
        return 0
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("token_budget") or {}
    return int(record["tokens"]) if record.get("made_for") == made_for else 0


def check_same_run(what: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to continue what belongs to another run.

    Raises:
        ContrastRMError: Data, settings or engine differ.
    """
    changed = [f"{name} {theirs.get(name)!r} -> {value!r}" for name, value in ours.items() if theirs.get(name) != value]
    if not changed:
        return
    if theirs.get("engine") == ours.get("engine") and theirs.get("shards") != ours.get("shards"):
        raise ContrastRMError(
            f"{what} is split over the {theirs.get('shards')} processes that wrote it, as DeepSpeed does, and cannot be read "
            f"by {ours.get('shards')}: continue with NUM_PROCESSES={theirs.get('shards')}"
        )
    raise ContrastRMError(
        f"{what} belongs to another run ({'; '.join(changed)}): use the same data and settings, or another --output_dir"
    )


def run_fingerprint(
    settings: TrainSettings,
    accelerator: Accelerator,
    loaded: LoadedModel,
    schedule: Schedule,
    data: Mapping[str, Any],
    held_out: HeldOutSet | None,
) -> dict[str, Any]:
    """What must be the same where a checkpoint is continued; JSON. What changes nothing of what is learned is left out.

    Args:
        data: Of the training data.
    """
    optimizer, options, metric = settings.optimizer, settings.model, settings.evaluation.metric_for_best
    lora = [options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_target_modules]
    return {
        **data,
        "model_path": options.model_path,
        "overlength": settings.data.overlength,
        "negatives": settings.data.negatives,
        "max_rejected": settings.data.max_rejected,
        **asdict(settings.objective),
        "global_batch_size": optimizer.global_batch_size,
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "warmup_steps": schedule.warmup_steps,
        "total_steps": schedule.total_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "precision": loaded.precision,
        # Their checkpoints hold more than the others'.
        "master_weights": keeps_master_weights(loaded.precision),
        "seed": settings.seed,
        "lora": lora if options.lora_rank else None,
        "frozen": frozen_digest(loaded.model),
        "held_out": None if held_out is None else held_out.digest,
        "metric_for_best": None if held_out is None or metric == "none" else metric,
        **engine_fingerprint(accelerator),
    }


def engine_fingerprint(accelerator: Accelerator) -> dict[str, Any]:
    """Who can read a checkpoint: plain ones every number of processes, DeepSpeed's the same stage and number only."""
    if not _is_deepspeed(accelerator):
        return {"engine": "plain", "shards": None}
    stage = accelerator.state.deepspeed_plugin.zero_stage
    return {"engine": f"deepspeed stage {stage}", "shards": accelerator.num_processes}


def is_finished(output_dir: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether the folder holds the finished model of this very run.

    Raises:
        ContrastRMError: It holds another run's.
    """
    file = output_dir / SUMMARY_FILE
    if not file.is_file():
        return False
    theirs = json.loads(file.read_text(encoding="utf-8")).get("fingerprint")
    if theirs is None:
        return False
    check_same_run(output_dir, theirs, fingerprint)
    return True


def make_way(output_dir: Path, names: Sequence[str]) -> None:
    """Nothing of an earlier run may pass for the new one's, and a new run costs a finished one nothing before it has a model.

    What a finished run wrote waits in ``earlier_run/`` until its model is replaced; of an unfinished one it goes.

    Args:
        names: Of the files, as patterns.
    """
    files = [path for name in names for path in output_dir.glob(name)]
    if not (output_dir / SUMMARY_FILE).is_file():
        for file in files:
            if file.is_file():
                file.unlink()
        return
    earlier = output_dir / EARLIER_FOLDER
    earlier.mkdir(exist_ok=True)
    # The summary last: if the run is killed before the summary has moved, the next start moves what is left.
    for path in (*files, output_dir / SUMMARY_FILE):
        if path.is_dir():
            shutil.rmtree(earlier / path.name, ignore_errors=True)
        os.replace(path, earlier / path.name)


def ensure_space(output_dir: Path, model: RewardModel) -> None:
    """Before hours of work: does the finished model fit on the disk?

    Raises:
        ContrastRMError: It does not.
    """
    disk, n_bytes = shutil.disk_usage(output_dir), saved_bytes(model)
    # Some network file systems do not know their size.
    if disk.total and disk.free < n_bytes:
        raise ContrastRMError(
            f"the finished model takes {n_bytes / 1e6:,.1f} MB, and {output_dir} has {disk.free / 1e6:,.1f} MB free: free some "
            "space, or choose another --output_dir"
        )


def what_is_left(output_dir: Path) -> str:
    """For the error of a run whose model could not be saved: the weights that are on disk, and how to go on."""
    folders = [path.name for path in (*list_checkpoints(output_dir)[-1:], *output_dir.glob("best-*"))]
    if not folders:
        return f"free some space in {output_dir} or choose another --output_dir"
    return (
        f"{', '.join(folders)} in {output_dir} hold earlier weights: free some space, then --resume auto (RESUME=auto)"
    )


def remove_unfinished(output_dir: Path) -> None:
    """Forget what a killed run left half written or half removed."""
    for pattern in (".checkpoint-*.saving", ".checkpoint-*.removing", ".model.saving-*", ".model.replaced-*"):
        for unfinished in output_dir.glob(pattern):
            shutil.rmtree(unfinished)


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints by their names, oldest first. They were whole when they were written."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None: it is as it was written."""
    manifest = checkpoint / MANIFEST_FILE
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        listed = [(checkpoint / entry["path"], entry["bytes"], entry["sha256"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if checkpoint / STATE_FILE not in [path for path, _, _ in listed]:
        return f"{MANIFEST_FILE} does not list {STATE_FILE}"
    for path, size, _ in listed:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    try:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = list(pool.map(lambda entry: file_sha256(entry[0]), listed))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    changed = [path.name for (path, _, expected), digest in zip(listed, digests, strict=True) if digest != expected]
    return f"{changed[0]} has changed since it was written" if changed else None


def choose_checkpoint(accelerator: Accelerator, resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume`` means, read through and found whole; the same on every rank, which all call it.

    With ``auto``, a damaged checkpoint is renamed to ``checkpoint-<step>.damaged`` and the one before it is taken.

    Raises:
        ContrastRMError: A named checkpoint is not there or damaged, or a new run would mix its checkpoints with an old
            run's.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [_choose_here(resume, output_dir)]
        except ContrastRMError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], ContrastRMError):
        raise answer[0]
    chosen: Path | None = answer[0]
    return chosen


def _choose_here(resume: str, output_dir: Path) -> Path | None:
    if resume == "none":
        if list_checkpoints(output_dir):
            raise ContrastRMError(
                f"{output_dir} holds checkpoints of an earlier run: continue it with --resume auto (RESUME=auto), "
                "remove its checkpoint-* folders, or choose another --output_dir"
            )
        return None
    if resume != "auto":
        if not (Path(resume) / STATE_FILE).is_file():
            raise ContrastRMError(f"no checkpoint in {resume}: give a checkpoint-<step> folder, 'auto' or 'none'")
        if problem := damage(Path(resume)):
            raise ContrastRMError(
                f"{resume} is damaged: {problem}; use --resume auto, which takes the newest whole one"
            )
        return Path(resume)
    for checkpoint in reversed(list_checkpoints(output_dir)):
        problem = damage(checkpoint)
        if problem is None:
            print(f"resuming from {checkpoint}", flush=True)
            return checkpoint
        damaged = checkpoint.with_name(f"{checkpoint.name}.damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(checkpoint, damaged)
        print(f"{checkpoint} is damaged: {problem}; renamed to {damaged.name}, trying the one before it", flush=True)
    print(f"no whole checkpoint in {output_dir}: starting at step 0", flush=True)
    return None


@contextmanager
def hold_folder(output_dir: str) -> Iterator[None]:
    """Keep other runs out of a folder: two runs that write the same checkpoints destroy both.

    The system gives the lock back when the process ends, however it ends. Of several ranks the first one holds it.

    Raises:
        ContrastRMError: Another run is at work there.
    """
    if not is_first_process():
        yield
        return
    in_use = f"another run is writing in {output_dir} (left over, perhaps): stop it, or choose another --output_dir"
    with hold(ensure_writable_folder(output_dir) / LOCK_FILE, in_use):
        yield
