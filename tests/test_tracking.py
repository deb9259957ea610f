"""Trackers and curves: what they are told, what they never see, and what a resume leaves of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codes.common.errors import ContrastRMError
from codes.train.plots import draw_training_curves, running_mean
from codes.train.settings import tracker_names
from codes.train.tracking import Trackers, check_trackers, public_config
from codes.train.train_reward_model import build_parser, main

NEEDS_WANDB = "wandb is not installed here (pip install wandb): it is by flag only"


@pytest.fixture(autouse=True)
def accelerate_state() -> None:
    """As in a run: accelerate's trackers and logger want to know which process they are in."""
    PartialState()


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_names() -> None:
    assert tracker_names("tensorboard") == ["tensorboard"]
    assert tracker_names(" wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert tracker_names("none") == []
    for wrong in ("", "tensorbord", "none,wandb", ","):
        with pytest.raises(argparse.ArgumentTypeError, match="give any of tensorboard, wandb, swanlab"):
            tracker_names(wrong)
    assert build_parser().parse_args([]).report_to == ["tensorboard"]


def test_a_missing_package_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)  # as if it were not installed
    with pytest.raises(ContrastRMError, match=r"pip install swanlab, or leave it out \(--report_to tensorboard\)"):
        check_trackers(["tensorboard", "swanlab"])
    check_trackers(["tensorboard"])


def test_a_resume_leaves_every_point_once(tmp_path: Path) -> None:
    first = Trackers(["tensorboard"], tmp_path)
    first.start(0, {"learning_rate": 0.5})
    for step in range(1, 9):
        first.log({"train/loss": float(step)}, step)
    # Killed here: not finished, and a checkpoint of step 5 is what is left.
    second = Trackers(["tensorboard"], tmp_path)
    second.start(6, {"learning_rate": 0.5})
    for step in range(6, 11):
        second.log({"train/loss": float(10 * step)}, step)
    second.finish()
    expected = [(step, float(step)) for step in range(1, 6)] + [(step, 10.0 * step) for step in range(6, 11)]
    assert points(tmp_path, "train/loss") == expected
    # A new run in the same folder shows nothing of the old one.
    third = Trackers(["tensorboard"], tmp_path)
    third.start(0, {})
    third.log({"train/loss": 7.0}, 1)
    third.finish()
    assert points(tmp_path, "train/loss") == [(1, 7.0)]


def test_a_resume_within_the_same_second_is_read_after_it(tmp_path: Path) -> None:
    first = Trackers(["tensorboard"], tmp_path)
    first.start(0, {})
    for step in (1, 2, 3):
        first.log({"train/loss": float(step)}, step)
    first.finish()
    (file,) = (tmp_path / "tensorboard").iterdir()
    # A process whose number sorts behind this one's.
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time())}.vm.99999999.0"))
    second = Trackers(["tensorboard"], tmp_path)
    second.start(3, {})
    for step in (3, 4):
        second.log({"train/loss": 10.0 * step}, step)
    second.finish()
    assert points(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_only_numbers_are_shown_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path / "main")
    trackers.start(0, {"model_path": "m", "report_to": ["tensorboard"]})
    values = {"eval/bsr": 0.25, "eval/bsr_count": 1, "eval/bsr_total": 4, "eval/bsr_ci": [0.1, 0.4], "none": None}
    trackers.log(values | {"skipped": True, "epoch": 1}, 3)
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "main" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["epoch", "eval/bsr"]
    assert events.Tags()["tensors"] == ["arguments/text_summary"]
    silent = Trackers([], tmp_path / "other")
    silent.start(0, {})
    silent.log(values, 3)
    silent.finish()
    assert not (tmp_path / "other").exists()


@settings(max_examples=60, deadline=None)
@given(
    secret=st.text(alphabet="abcdef0123456789", min_size=8, max_size=12),
    key=st.sampled_from(["hf_token", "API_KEY", "apikey", "client_secret", "password", "aws_credentials"]),
)
def test_no_secret_leaves(secret: str, key: str) -> None:
    given_config = {
        key: secret,
        "train_file": f"https://user:{secret}@host/file",
        "max_tokens_per_batch": 5,
        "none": None,
    }
    public = public_config(given_config)
    assert secret not in json.dumps(public)
    assert public["train_file"] == "https://host/file"
    # Names that only look alike stay.
    assert public["max_tokens_per_batch"] == 5 and public["none"] == ""


def test_run_reports_by_default(
    tiny_base_dir: Path, write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    data, out = write_rows("train.jsonl", preference_rows), tmp_path / "out"
    arguments = ["--model_path", str(tiny_base_dir), "--train_file", str(data), "--output_dir", str(out)]
    arguments += ["--precision", "fp32", "--global_batch_size", "4", "--max_steps", "4", "--held_out_share", "0.3"]
    assert main([*arguments, "--logging_steps", "2"]) == 0
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    shown = points(out, "train/loss")
    assert [step for step, _ in shown] == [entry["step"] for entry in log] == [1, 2, 4]
    assert [value for _, value in shown] == pytest.approx([entry["train/loss"] for entry in log])
    assert len(points(out, "train/tokens_per_second")) == 3
    assert len(points(out, "eval/accuracy")) == 4
    none = tmp_path / "none"
    assert main([*arguments, "--output_dir", str(none), "--report_to", "none"]) == 0
    assert not (none / "tensorboard").exists() and (none / "eval_log.jsonl").exists()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason=NEEDS_WANDB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 3):
        trackers = Trackers(["wandb"], tmp_path)
        trackers.start(first_step, {"learning_rate": 0.5, "hf_token": "hf_shown_nowhere"})
        for step in range(first_step or 1, first_step + 3):
            trackers.log({"train/loss": float(step)}, step)
        trackers.finish()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = json.loads((tmp_path / "tracking.json").read_text())["run_id"]
    assert len(runs) == 2 and all(run.name.endswith(run_id) for run in runs)
    assert not any(b"hf_shown_nowhere" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


# --- curves


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([5.0], 3) == [5.0]


def evaluation(step: int, **changes: Any) -> dict[str, Any]:
    rates = {"eval/accuracy": 0.5, "eval/accuracy_all": 0.4, "eval/original_accuracy": 0.6, "eval/bsr": 0.2}
    entry: dict[str, Any] = {"step": step, "eval/loss": 1.0, **rates}
    entry |= {f"{name}_ci": [max(0.0, value - 0.1), value + 0.1] for name, value in rates.items()}
    entry |= {"eval/bsr/length": 0.1, "eval/original_accuracy/length_total": 9}
    entry |= {"eval/bsr/beauty": None, "eval/original_accuracy/beauty_total": 2}
    return entry | changes


def test_curves_are_drawn_and_the_same_twice(tmp_path: Path) -> None:
    log = [{"step": step, "train/loss": 1 / step, "train/accuracy": 0.5} for step in range(1, 101)]
    evaluations = [evaluation(50), evaluation(100, **{"eval/bsr": None, "eval/bsr_ci": None})]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw_training_curves(log, evaluations, tmp_path / name, best_step=50)
    svg = (tmp_path / "a" / "training_curves.svg").read_text()
    assert svg == (tmp_path / "b" / "training_curves.svg").read_text()
    for text in ("best (step 50)", "BSR length", "accuracy before the bias", "training (mean of 5 steps)"):
        assert text in svg
    assert "BSR beauty" not in svg  # two pairs are no curve
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("evaluations", [[], [evaluation(1)], [{"step": 1, "eval/loss": None, "eval/accuracy": None}]])
def test_curves_of_what_there_is(tmp_path: Path, evaluations: list[dict[str, Any]]) -> None:
    draw_training_curves([{"step": 1, "train/loss": 0.5, "train/accuracy": 1.0}], evaluations, tmp_path)
    draw_training_curves([], evaluations, tmp_path)
    assert (tmp_path / "training_curves.png").stat().st_size > 1000
