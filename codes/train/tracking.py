"""Where a run's figures are shown while it goes on: TensorBoard, Weights & Biases, SwanLab, through accelerate's trackers.

Writes: ``tensorboard/`` and ``tracking.json`` in the run's folder, ``wandb/`` or ``swanlog/`` where asked for. The JSONL logs
are written in any case and are the record; these are views of them.
Used by ``python -m codes.train.train_reward_model`` (``--report_to``).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from codes.common.errors import ContrastRMError, optional
from codes.common.records import write_json
from codes.common.reporting import markdown_table
from codes.train.settings import TRACKERS

TENSORBOARD_FOLDER = "tensorboard"
RUN_FILE = "tracking.json"
PROJECT = "contrastrm"

_SECRET_NAME = re.compile(r"(^|[_-])(token|secret|password|passwd|credentials?|(api_?)?key)$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def check_trackers(names: Sequence[str]) -> None:
    """Find out before hours of work whether the trackers are installed.

    Raises:
        ContrastRMError: One is not; the message says how to get it.
    """
    for name in names:
        if not any(importlib.util.find_spec(module) for module in TRACKERS[name]):
            left = ",".join(other for other in names if other != name) or "none"
            raise ContrastRMError(
                f"--report_to {name} needs the package {name}: pip install {name}, or leave it out (--report_to {left})"
            )


class Trackers:
    """The trackers of one run; only the main process has any.

    A run that goes on from a checkpoint goes on in the same place without doubled points: TensorBoard is told to forget what
    it had from later steps, wandb and SwanLab continue the same run and ignore steps that they have.

    Args:
        names: Keys of ``TRACKERS``; empty on all processes but the main one.
        output_dir: The run's folder.
    """

    def __init__(self, names: Sequence[str], output_dir: Path) -> None:
        self.names, self.output_dir = list(names), output_dir
        self.trackers: dict[str, GeneralTracker] = {}

    def start(self, first_step: int, config: Mapping[str, Any]) -> None:
        """Open the trackers.

        Args:
            first_step: The first step that will be logged; 0 begins a new run and forgets an earlier one's TensorBoard files.
            config: The run's arguments. Values under names of secrets, and logins in addresses, are not passed on.

        Raises:
            ContrastRMError: A tracker does not start (no login, no network).
        """
        if not self.names:
            return
        is_new = first_step == 0
        run_id = _run_id(self.output_dir / RUN_FILE, is_new)
        if is_new:
            shutil.rmtree(self.output_dir / TENSORBOARD_FOLDER, ignore_errors=True)
        elif "tensorboard" in self.names:
            _wait_for_a_later_second(self.output_dir / TENSORBOARD_FOLDER)
        for name in self.names:
            self.trackers[name] = _start(name, self._options(name, first_step, run_id))
        if is_new:
            self._store(public_config(config))

    def _options(self, name: str, first_step: int, run_id: str) -> dict[str, Any]:
        if name == "tensorboard":
            place = {"run_name": TENSORBOARD_FOLDER, "logging_dir": self.output_dir}
            return place | ({"purge_step": first_step} if first_step else {})
        run_name = self.output_dir.resolve().name
        if name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            return {
                "run_name": project,
                "name": run_name,
                "id": run_id,
                "dir": str(self.output_dir),
                "resume": "allow",
            }
        return {
            "run_name": os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            "experiment_name": run_name,
            "id": run_id,
            "resume": "allow",
            "logdir": str(self.output_dir / "swanlog"),
        }

    def _store(self, config: Mapping[str, Any]) -> None:
        for name, tracker in self.trackers.items():
            if name == "tensorboard":
                # accelerate would store the arguments as a second run, one more at every start.
                table = markdown_table(["argument", "value"], [[key, str(value)] for key, value in config.items()])
                tracker.log({"arguments": table}, step=0)
            else:
                tracker.store_init_configuration(dict(config))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Show the numbers among ``values``; counts, intervals and what does not exist stay in the JSONL logs."""
        shown = {
            key: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith(("_count", "_total"))
        }
        for name in list(self.trackers):
            # Taken out until it has worked: what is only a view of the logs ends no run, and is told of once.
            tracker = self.trackers.pop(name)
            with optional(f"--report_to {name}"):
                tracker.log(shown, step=step)
                self.trackers[name] = tracker

    def finish(self) -> None:
        """Write out what is left."""
        for name, tracker in self.trackers.items():
            with optional(f"--report_to {name}"):
                tracker.finish()


def _wait_for_a_later_second(folder: Path) -> None:
    """TensorBoard reads its files in the order of their names, which begin with the second in which they were made.

    A file of the same second as the run's last one might be read before it, and then make the earlier steps disappear.
    """
    deadline = time.monotonic() + 1.5
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(one) for one in seconds if one.isdecimal()), default=0)
    while int(time.time()) <= newest and time.monotonic() < deadline:
        time.sleep(0.05)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that may leave the machine: no secrets, plain values."""
    public: dict[str, Any] = {}
    for key, value in config.items():
        if _SECRET_NAME.search(key):
            continue
        plain = value if isinstance(value, int | float | bool) else "" if value is None else str(value)
        public[key] = _URL_LOGIN.sub("", plain) if isinstance(plain, str) else plain
    return public


def _run_id(path: Path, is_new: bool) -> str:
    """The same for all parts of a run that was interrupted."""
    if not is_new and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    run_id = uuid.uuid4().hex[:12]
    write_json(path, {"run_id": run_id})
    return run_id


def _start(name: str, options: Mapping[str, Any]) -> GeneralTracker:
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)
    if name == "wandb":
        # Its own errors derive from Exception alone.
        failures += (importlib.import_module("wandb").errors.Error,)
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](**options)
    try:
        tracker.start()
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ContrastRMError(
            f"--report_to {name} does not start: {reason}; log in ({name} login), work offline "
            f"({'WANDB_MODE=offline' if name == 'wandb' else 'SWANLAB_MODE=local'}), or leave it out"
        ) from error
    return tracker
