"""Two real processes score together: the same results as one, and no hanging when one of them fails or dies."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from codes.common.errors import ContrastRMError
from codes.evaluate.results import RUN_FIELDS
from codes.evaluate.scorer_setup import load_scorer
from codes.evaluate.settings import ScorerSettings
from tests.conftest import REPO_ROOT
from tests.eval_rows import evaluation_row

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """So many that nobody is done with them in a moment."""
    folder = tmp_path / "many"
    folder.mkdir()
    return write_evaluation(folder, 200)


def write_evaluation(folder: Path, n_rows: int) -> Path:
    draw = random.Random(5)
    for name in ("length", "gender"):
        made = [evaluation_row(draw, name, number) for number in range(n_rows)]
        (folder / f"{name}_bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def start(processes: int, rows: Path, model: Path, results: Path, **launch: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(LAUNCH if processes == 2 else ["-m"]), "codes.evaluate.eval_rm"]
    command += ["--model_path", str(model), "--data_dir", str(rows), "--bias_type", "length,gender"]
    command += ["--results_dir", str(results), "--device", "cpu", "--max_tokens_per_batch", "100"]
    # One thread each: the bits of a sum depend on how many threads have made it.
    variables = {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"ACCELERATE_USE_CPU": "true"} if processes == 2 else {}
    return subprocess.Popen(
        command,
        cwd=REPO_ROOT,
        env={**os.environ, **variables, **launch},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        printed, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                member.kill()
    return printed


def test_two_processes_give_the_files_of_one(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    folders = []
    for processes in (1, 2):
        process = start(processes, rows, tiny_llama_dir, tmp_path / str(processes))
        printed = finish(process)
        assert process.returncode == 0, printed
        # One of them prints.
        assert printed.count("results: ") == printed.count("length: 40 rows") == 1
        assert "score store: 0 of" in printed and "Traceback" not in printed
        folders.append(tmp_path / str(processes) / tiny_llama_dir.name)
    one, two = folders
    for name in ("bias_length.jsonl", "bias_gender.jsonl", "model.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    summaries = [json.loads((folder / "bias_summary.json").read_text()) for folder in folders]
    assert [summary["metadata"]["n_processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["metadata"]["n_computed_tokens"] == summaries[1]["metadata"]["n_computed_tokens"]
    for summary in summaries:
        for field in RUN_FIELDS:
            del summary["metadata"][field]
    assert summaries[0] == summaries[1]


def test_an_error_of_the_scoring_ends_all_processes(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    process = start(2, rows, broken, tmp_path / "results")
    printed = finish(process)
    assert process.returncode != 0
    assert len(re.findall("error: the model gave a score that is not finite", printed)) == 1
    assert not list((tmp_path / "results").rglob("bias_*"))


def test_a_process_that_dies_ends_the_others_and_the_next_launch_goes_on(
    many_rows: Path, tiny_llama_dir: Path, tmp_path: Path, meeting_point: dict[str, str]
) -> None:
    store = tmp_path / "results" / tiny_llama_dir.name / "scores.sqlite"
    # Without a launcher, which may see the death first and then ends the others before they can say anything.
    leader, worker = (
        start(
            1,
            many_rows,
            tiny_llama_dir,
            tmp_path / "results",
            RANK=rank,
            LOCAL_RANK=rank,
            **meeting_point,
        )
        for rank in ("0", "1")
    )
    # The store appears when the leader has found the other process and begins.
    while not store.exists() and leader.poll() is None:
        time.sleep(0.001)
    # Held still until the other one is gone, however slow the machine is.
    leader.send_signal(signal.SIGSTOP)
    worker.kill()
    finish(worker)
    leader.send_signal(signal.SIGCONT)
    printed = finish(leader)
    assert leader.returncode != 0, printed
    assert "another process of this launch has gone" in printed
    assert not list((tmp_path / "results").rglob("bias_*"))
    again = start(2, many_rows, tiny_llama_dir, tmp_path / "results")
    assert "results: " in finish(again)
    assert again.returncode == 0


def test_a_device_of_all_processes_is_refused(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codes.evaluate import scorer_setup

    with pytest.raises(ContrastRMError, match="would put every process of this launch on one device"):
        scorer_setup.choose_device("cuda:0", in_launch=True)
    # A reward server, which one process asks, leaves nothing for the others.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        load_scorer(ScorerSettings(model_path="my-server", reward_url="http://127.0.0.1:9"))
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["run_evaluation_rm", "run_evaluation_rewardbench"])
def test_launchers_start_one_process_for_each_gpu(name: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    def words(**knobs: str) -> list[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "DRY_RUN": "1",
            "SKIP_SETUP": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **knobs,
        }
        done = subprocess.run(
            ["bash", str(REPO_ROOT / f"{name}.sh")], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert "accelerate" not in words()
    assert "accelerate" not in words(CUDA_VISIBLE_DEVICES="0,1", DEVICE="cuda:1")
    assert words(NUM_PROCESSES="2")[:2] == ["env", "ACCELERATE_USE_CPU=true"]
    started = words(CUDA_VISIBLE_DEVICES="4,5,6")
    assert started[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(started[2:])
    assert (args.num_processes, args.multi_gpu, args.module) == (3, True, True)
    assert args.training_script.startswith("codes.evaluate.eval_r")
