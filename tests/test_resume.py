"""Checkpoints and resume: whole or not at all, damage recognised, every step once, the same weights."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codes.common.errors import ContrastRMError
from codes.common.records import file_sha256
from codes.train.checkpoints import MANIFEST_FILE, check_same_run, damage, hold_folder, list_checkpoints
from codes.train.train_reward_model import main
from tests.conftest import REPO_ROOT, finish, launch_training

MODULE = "codes.train.train_reward_model"
BASE = ["--precision", "fp32", "--epochs", "4", "--warmup_steps", "1", "--learning_rate", "1e-3", "--seed", "7"]
STEPS = 20  # four epochs of five


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


@pytest.fixture
def flags(tiny_base_dir: Path, train_file: Path) -> Callable[..., list[str]]:
    """The command line of a run of twenty steps."""

    def make(out: Path, *extra: str) -> list[str]:
        return [
            "--model_path", str(tiny_base_dir), "--train_file", str(train_file), "--output_dir", str(out),
            "--global_batch_size", "2", *BASE, *extra,
        ]  # fmt: skip

    return make


def log_of(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def assert_same_run(left: Path, right: Path, tolerance: float = 0.0) -> None:
    if tolerance == 0.0:
        assert log_of(left) == log_of(right)
    else:
        assert [entry["step"] for entry in log_of(left)] == [entry["step"] for entry in log_of(right)]
        assert [entry["train/loss"] for entry in log_of(left)] == pytest.approx(
            [entry["train/loss"] for entry in log_of(right)], abs=tolerance
        )
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), atol=tolerance, rtol=0, msg=name)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)


def forget_the_end(out: Path) -> None:
    """As if the run had been killed while the final model was saved."""
    for name in ("train_summary.json", "model.safetensors", "config.json"):
        (out / name).unlink()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin is missing"),
    "cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        "model.safetensors has 1000 bytes instead",
    ),
    "changed": (lambda folder: flip_a_bit(folder / "optimizer.bin"), "optimizer.bin has changed since it was written"),
    "manifest": (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "manifest.json cannot be read"),
}


def test_a_damaged_checkpoint_is_passed_over(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert main(flags(whole, "--save_steps", "6", "--keep_checkpoints", "3")) == 0
    assert names(whole) == ["checkpoint-12", "checkpoint-18", "checkpoint-6"]
    assert all(damage(path) is None for path in list_checkpoints(whole))
    for name, (harm, message) in HARMS.items():
        out = tmp_path / name.replace(" ", "-")
        shutil.copytree(whole, out)
        forget_the_end(out)
        harm(out / "checkpoint-18")
        found = damage(out / "checkpoint-18")
        assert found is not None and message in found
        with pytest.raises(ContrastRMError, match="checkpoint-18 is damaged: .*use --resume auto"):
            main(flags(out, "--save_steps", "6", "--resume", str(out / "checkpoint-18")))
        capsys.readouterr()
        assert main(flags(out, "--save_steps", "6", "--resume", "auto")) == 0
        printed = capsys.readouterr().out
        assert message in printed and "resuming from" in printed and f"{out / 'checkpoint-12'}" in printed
        assert_same_run(out, whole)
        # Set aside for the user to look at; written anew when the step was reached.
        assert names(out) == ["checkpoint-12", "checkpoint-18", "checkpoint-18.damaged"]


def test_with_no_whole_checkpoint_the_run_starts_anew(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(flags(out, "--save_steps", "15")) == 0
    before = log_of(out)
    forget_the_end(out)
    (out / "checkpoint-15" / "trainer_state.json").unlink()
    assert main(flags(out, "--save_steps", "15", "--resume", "auto")) == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert log_of(out) == before


def test_going_back_keeps_what_is_written_from_there(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(flags(out, "--save_steps", "5", "--keep_checkpoints", "3")) == 0
    before = log_of(out)
    start = str(out / "checkpoint-5")
    assert main(flags(out, "--save_steps", "3", "--keep_checkpoints", "2", "--resume", start)) == 0
    assert log_of(out) == before
    assert names(out) == ["checkpoint-15", "checkpoint-18"]


def test_a_finished_run_says_so(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(flags(out)) == 0
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(flags(out, "--resume", "auto")) == 0
    assert "holds the finished model of this run (20 steps): nothing left to train" in capsys.readouterr().out
    assert {name: at for name, at in written.items() if name != ".training.lock"} == {
        path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".training.lock"
    }
    with pytest.raises(ContrastRMError, match=r"belongs to another run \(temperature 0.5 -> 0.7\)"):
        main(flags(out, "--resume", "auto", "--temperature", "0.7"))


def test_checkpoints_by_the_clock(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(flags(out, "--save_minutes", "1e-9", "--keep_checkpoints", "100")) == 0
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{step}" for step in range(1, STEPS)]
    assert main(flags(tmp_path / "late", "--save_minutes", "1000")) == 0
    assert list_checkpoints(tmp_path / "late") == []


def test_two_runs_do_not_share_a_folder(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold_folder(str(out)):
        with pytest.raises(ContrastRMError, match="another run is writing in"):
            main(flags(out, "--resume", "auto"))
    assert main(flags(out)) == 0


def test_a_loss_that_is_not_finite_leaves_a_report(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The rate is absurd: the first step throws the weights out of the numbers, the second one shows it.
    wild = flags(out, "--learning_rate", "1e30", "--max_grad_norm", "1e30", "--save_steps", "1")
    with pytest.raises(ContrastRMError, match=r"of step 2 is nan: .*nothing was saved after checkpoint-1.*row-"):
        main(wild)
    report = json.loads((out / "nan_report.json").read_text())
    assert report["step"] == 2 and report["learning_rate"] == 1e30 and report["last_checkpoint"] == "checkpoint-1"
    assert "nan" in (report["loss"], report["grad_norm"])
    assert [entry["step"] for entry in report["steps_before"]] == [1]
    assert report["steps_before"][0]["train/loss"] == log_of(out)[0]["train/loss"]
    assert report["n_groups"] == 2 == len(report["groups"])
    rows = {f"row-{number}": 1 + number % 4 for number in range(10)}
    for line in report["groups"]:
        assert len(line["scores_rejected"]) == rows[line["id"]] and "score_chosen" in line and line["n_tokens"] > 0
    assert damage(out / "checkpoint-1") is None and not (out / "model.safetensors").exists()


def test_the_report_names_the_groups_without_a_finite_loss(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Scores divided by this are infinite.
    with pytest.raises(ContrastRMError, match=r"the loss of step 1 is (nan|inf): .*nothing was saved after the start"):
        main(flags(out, "--temperature", "1e-42"))
    report = json.loads((out / "nan_report.json").read_text())
    assert report["loss"] in ("nan", "inf") and report["steps_before"] == []
    broken = [line["id"] for line in report["groups"] if isinstance(line["loss"], str)]
    assert broken and report["groups_not_finite"] == broken


def test_what_is_written_is_flushed_before_it_gets_its_name(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power must not leave a name without the bytes."""
    flushed: set[int] = set()
    plainly = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        plainly(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    assert main(flags(out, "--max_steps", "2", "--save_steps", "1", "--report_to", "none")) == 0
    parts = list((out / "checkpoint-1").rglob("*"))
    model = [out / name for name in ("config.json", "model.safetensors", "tokenizer.json", "train_summary.json")]
    assert len(parts) >= 5
    assert not [path for path in (*parts, *model, out / "checkpoint-1", out) if path.stat().st_ino not in flushed]


def test_going_back_deletes_nothing_that_was_just_written(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """With one checkpoint to keep, a later one of before must not push out the one of the step that was just done."""
    out, seen = tmp_path / "out", []
    assert main(flags(out, "--save_steps", "9", "--keep_checkpoints", "2")) == 0
    assert names(out) == ["checkpoint-18", "checkpoint-9"]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        # After each checkpoint the oldest go: what is there when the next one is begun?
        if event == "os.mkdir" and str(arguments[0]) == str(out / ".checkpoint-17.saving"):
            seen.append(names(out))

    sys.addaudithook(look)
    start = str(out / "checkpoint-9")
    assert main(flags(out, "--save_minutes", "1e-9", "--keep_checkpoints", "1", "--resume", start)) == 0
    assert "checkpoint-16" in seen[0], seen


# --- disks that are full


def start_long_run(command: list[str], out: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", MODULE, *command],
        cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list_checkpoints(out) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return child


def test_a_disk_that_refuses_leaves_the_last_checkpoint(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = flags(out, "--save_steps", "2", "--epochs", "200")
    with start_long_run(command, out) as child:
        # The weights still fit, the optimizer's state does not.
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 2, errors[-3000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "cannot write the checkpoint of step" in line and "--resume auto" in line and "Traceback" not in errors
    assert not list(out.glob(".checkpoint-*"))
    last = list_checkpoints(out)[-1]
    assert damage(last) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no small disk could be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_full_disk_leaves_the_last_checkpoint(
    flags: Callable[..., list[str]], tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    command = flags(out, "--save_steps", "1", "--keep_checkpoints", "100")
    with pytest.raises(ContrastRMError, match=r"cannot write the checkpoint of step \d+: .*Free some space"):
        main(command)
    assert len(list_checkpoints(out)) >= 2 and not list(out.glob(".checkpoint-*"))
    assert damage(list_checkpoints(out)[-1]) is None
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main([*command, "--resume", "auto"]) == 0
    assert main(flags(tmp_path / "whole")) == 0
    assert_same_run(out, tmp_path / "whole")


# --- kills, and several processes


def test_kills_in_every_phase(tmp_path: Path) -> None:
    """``python -m benchmarks.kills training --kills 20`` is the long form."""
    command = [sys.executable, "-m", "benchmarks.kills", "training", "--kills", "3", "--seed", "5", "--epochs", "15"]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n_kills"] == 3 == sum(result["kills_met"].values())
    assert result["differences"] == {"largest_log_difference": 0, "largest_weight_difference": 0, "left_over": []}


@pytest.mark.parametrize("kind", ["ds_z3 in full", "ds_z2 with LoRA"])
def test_deepspeed_resumes_where_it_was(kind: str, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """In bf16; ``benchmarks/kills.py training --ranks 2 --engine ... --precision ...`` has the others, with kills."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    extra = ("--precision", "bf16", "--save_steps", "7", "--learning_rate", "1e-4")
    if kind.endswith("LoRA"):
        extra += ("--lora_rank", "2", "--lora_dropout", "0.1")
    knobs = {"NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": f"configs/{kind.split()[0]}_config.json"}
    finish(launch_training(*flags(whole, *extra), **knobs))
    state = json.loads((whole / "checkpoint-7" / "trainer_state.json").read_text())["fingerprint"]
    assert state["shards"] == 2 and state["engine"] == f"deepspeed stage {kind[4]}"
    shutil.copytree(whole / "checkpoint-7", out / "checkpoint-7")
    [printed] = finish(launch_training(*flags(out, *extra, "--resume", "auto"), **knobs))
    assert "resuming from" in printed
    assert_same_run(out, whole, 1e-6)
    if kind.endswith("LoRA"):
        [file] = (out / "checkpoint-7").rglob("mp_rank_00_model_states.pt")
        held = torch.load(file, weights_only=True)["module"]
        assert held and all("lora_" in name or ".score." in name for name in held)
        return
    alone = tmp_path / "alone"
    shutil.copytree(whole / "checkpoint-7", alone / "checkpoint-7")
    with pytest.raises(ContrastRMError, match=r"belongs to another run \(.*engine 'deepspeed stage \d' -> 'plain'"):
        main(flags(alone, *extra, "--resume", "auto"))
    [file, _] = (alone / "checkpoint-7").rglob("*_optim_states.pt")
    plant(file, tmp_path / "planted")
    started = launch_training(*flags(alone, *extra, "--resume", "auto"), **knobs)
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 2 and "holds more than numbers" in errors, errors[-3000:]
    assert not (tmp_path / "planted").exists()


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def plant(file: Path, folder: Path) -> None:
    """Put code into a checkpoint's file, and its hash into the manifest, as whoever can write it can."""
    torch.save({"state": Planted(folder)}, file)
    [checkpoint] = [path for path in file.parents if path.name.startswith("checkpoint-")]
    entries = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for entry in entries["files"]:
        if checkpoint / entry["path"] == file:
            entry |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(entries))
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_code_in_a_checkpoint_does_not_run(name: str, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(flags(out, "--save_steps", "15")) == 0
    forget_the_end(out)
    plant(out / "checkpoint-15" / name, tmp_path / "planted")
    with pytest.raises(ContrastRMError, match="checkpoint-15 was not loaded: it holds more than numbers"):
        main(flags(out, "--resume", "auto"))
    assert not (tmp_path / "planted").exists()


def test_shards_name_their_number_of_processes(tmp_path: Path) -> None:
    theirs = {"engine": "deepspeed stage 2", "shards": 2, "seed": 7}
    check_same_run(tmp_path, theirs, dict(theirs))
    with pytest.raises(ContrastRMError, match="split over the 2 processes .* continue with NUM_PROCESSES=2"):
        check_same_run(tmp_path, theirs, theirs | {"shards": 4})
