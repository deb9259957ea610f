"""Several ranks and machines, DeepSpeed's configurations, compilation, and the documented commands."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError
from codes.common.scoring import Scorer
from codes.train.engine import offloaded, zero_stage
from codes.train.reward_model import load_reward_model
from codes.train.train_reward_model import build_parser, main
from tests.conftest import REPO_ROOT, finish, launch_training
from tests.test_reward_model import CONVERSATIONS
from tests.test_training import BASE, assert_same_weights, losses, read_log, train_here

CONFIGS = sorted((REPO_ROOT / "configs").glob("ds_*.json"))


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    """Groups of two to six answers."""
    for number, row in enumerate(preference_rows):
        row["rejected"] = [f"it is {number} because the mat {k}" * (1 + k % 3) for k in range(1 + number % 5)]
        row["bias_type"] = [None] * len(row["rejected"])
    return write_rows("train.jsonl", preference_rows)


def launch(model: Path, data: Path, out: Path, *flags: str, **knobs: str) -> subprocess.Popen[str]:
    """A run of ``run_training.sh`` on these files."""
    files = {"MODEL_PATH": str(model), "TRAIN_FILE": str(data), "OUTPUT_DIR": str(out)}
    return launch_training(*BASE, *flags, **files, **knobs)


# --- several ranks against one process


def test_zero_three_in_bfloat16_with_lora_equals_one_process(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Two ranks, four micro-batches a step, an adapter, parameters really split."""
    extra = (
        "--global_batch_size", "8", "--micro_batch_size", "1", "--precision", "bf16", "--lora_rank", "4",
        "--learning_rate", "1e-3", "--gradient_checkpointing", "1", "--epochs", "2",
    )  # fmt: skip
    single = train_here(tiny_base_dir, train_file, tmp_path / "single", *extra)
    out = tmp_path / "two"
    # In the shipped configuration parameters of this size stay whole.
    config = json.loads((REPO_ROOT / "configs" / "ds_z3_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "split.json").write_text(json.dumps(config))
    knobs = {"NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": str(tmp_path / "split.json")}
    [printed] = finish(launch(tiny_base_dir, train_file, out, *extra, **knobs))
    assert "LoRA of rank 4: 4128 of 33088 parameters are trained" in printed
    assert "4 micro-batches a step on each of 2 processes" in printed
    # bfloat16 keeps 8 bits: a step's gradients are added up in another order and another width.
    assert losses(read_log(out)) == pytest.approx(losses(single), abs=0.02)
    assert_same_weights(tmp_path / "single", out, 0.01)
    scores = []
    for folder in (tmp_path / "single", out, out / "adapter"):
        model, tokenizer = load_reward_model(str(folder), dtype="float32")
        scores.append(Scorer(model, ChatFormatter(tokenizer), progress=False).score(CONVERSATIONS).scores)
    assert scores[1] == pytest.approx(scores[0], abs=0.05) and scores[2] == pytest.approx(scores[1], abs=0.05)


TWO_RANKS = """
import os, sys
from codes.common.errors import ContrastRMError
from codes.train.engine import make_accelerator, set_accumulation, smallest_of_ranks
rank = int(os.environ["RANK"])
accelerator = make_accelerator(precision="fp32")
print("smallest", smallest_of_ranks(accelerator, 300 + rank))
set_accumulation(accelerator, 3, max_grad_norm=1.0)
print("steps", accelerator.gradient_accumulation_steps)
try:
    set_accumulation(accelerator, 3 + rank, max_grad_norm=1.0)
except ContrastRMError as error:
    print(error)
# As every run ends: a group that outlives the interpreter can abort the process.
accelerator.end_training()
"""


def test_ranks_agree_on_the_smallest_budget_and_on_the_micro_steps(meeting_point: dict[str, str]) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            cwd=REPO_ROOT,
            env=os.environ | meeting_point | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(REPO_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for printed in finish(*ranks):
        assert "smallest 300" in printed and "steps 3" in printed
        assert "would take [3, 4] micro-batches a step" in printed


def test_two_machines_equal_one_process(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Two launchers that find each other by address and port, as on two machines."""
    extra = ("--global_batch_size", "4", "--micro_batch_size", "1", "--epochs", "1")
    single = train_here(tiny_base_dir, train_file, tmp_path / "single", *extra)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = tmp_path / "two"
    machines = [
        launch(
            tiny_base_dir,
            train_file,
            out,
            *extra,
            NUM_PROCESSES="1",
            NUM_MACHINES="2",
            MACHINE_RANK=str(rank),
            MAIN_PROCESS_IP="127.0.0.1",
            MAIN_PROCESS_PORT=port,
            DEEPSPEED_CONFIG="configs/ds_z2_config.json",
        )
        for rank in (0, 1)
    ]
    printed = finish(*machines)
    assert "saved the reward model" in printed[0] and "saved the reward model" not in printed[1]
    assert losses(read_log(out)) == pytest.approx(losses(single), abs=1e-4)
    assert_same_weights(tmp_path / "single", out, 1e-4)
    assert json.loads((out / "train_args.json").read_text())["world_size"] == 2


# --- launcher and configurations


def dry_run(**knobs: str) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **knobs}
    command = ["bash", "run_training.sh"]
    return subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_each_machine_gets_its_rank_and_the_total() -> None:
    from accelerate.commands.launch import launch_command_parser

    knobs = {"NUM_MACHINES": "3", "MAIN_PROCESS_IP": "10.0.0.7", "MAIN_PROCESS_PORT": "29511"}
    for engine in ("configs/ds_z3_config.json", "none"):
        done = dry_run(NUM_PROCESSES="4", MACHINE_RANK="2", DEEPSPEED_CONFIG=engine, **knobs)
        words = shlex.split(done.stdout)
        args = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        found = (args.num_processes, args.num_machines, args.machine_rank, args.main_process_ip, args.main_process_port)
        assert found == (12, 3, 2, "10.0.0.7", 29511)
        # One process on each of several machines is no single-process run.
        assert "launch" in shlex.split(dry_run(DEEPSPEED_CONFIG=engine, **knobs).stdout)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"NUM_MACHINES": "0"}, "NUM_MACHINES=0 must be"),
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES=two must be"),
        ({"MACHINE_RANK": "1"}, "MACHINE_RANK=1 must be one of 0 to 0"),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "-1"}, "MACHINE_RANK=-1 must be one of 0 to 1"),
        ({"NUM_MACHINES": "2"}, "needs MAIN_PROCESS_IP and MAIN_PROCESS_PORT"),
        ({"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "10.0.0.7"}, "needs MAIN_PROCESS_IP and MAIN_PROCESS_PORT"),
    ],
)
def test_impossible_machines_stop_before_the_start(knobs: dict[str, str], words: str) -> None:
    done = dry_run(**knobs)
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_deepspeed_reads_every_configuration(file: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads(file.read_text())
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 1}
    settled = content | sizes | {"gradient_clipping": 1.0, "bf16": {"enabled": True}}
    settled["fp16"] = content["fp16"] | {"enabled": False}
    config = DeepSpeedConfig(settled)
    assert f"_z{config.zero_config.stage}_" in file.name
    offloads = {kind for kind in ("optimizer", "param") if getattr(config.zero_config, f"offload_{kind}") is not None}
    expected = {"optimizer", "param"} if config.zero_config.stage == 3 else {"optimizer"}
    assert offloads == (expected if "offload" in file.name else set())


def test_the_estimate_reads_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (zero_stage(), offloaded()) == (None, set())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    found = {}
    for file in CONFIGS:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        found[file.stem] = (zero_stage(), offloaded())
    assert found == {
        "ds_z2_config": (2, set()),
        "ds_z2_offload_config": (2, {"optimizer"}),
        "ds_z3_config": (3, set()),
        "ds_z3_offload_config": (3, {"optimizer", "param"}),
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"zero_optimization": {"stage": 2},}', "cannot read the DeepSpeed configuration"),
        ("[]", "is no DeepSpeed configuration"),
        (
            '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}',
            "sets optimizer, which the flags set here",
        ),
    ],
)
def test_an_unusable_configuration_is_named_before_the_work(
    content: str, words: str, tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(ContrastRMError, match=words):
        main(["--model_path", str(tiny_base_dir), "--output_dir", str(tmp_path / "out"), "--report_to", "none"])


def test_a_home_folder_does_not_configure_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``accelerate config`` leaves there after its questions on DeepSpeed."""
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    home = tmp_path / "default_config.yaml"
    home.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\ngpu_ids: '0'\n"
        "num_processes: 4\ndebug: false\nuse_cpu: false\ndeepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 4}\n"
    )
    for module in (launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(home))
    monkeypatch.chdir(REPO_ROOT)
    for engine in ("configs/ds_z3_config.json", "none"):
        words = shlex.split(dry_run(NUM_PROCESSES="2", DEEPSPEED_CONFIG=engine).stdout)
        parsed = launch.launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        args, defaults, _ = launch._validate_launch_command(parsed)
        assert (args.gpu_ids, args.num_processes, args.mixed_precision) == ("all", 2, "no")
        assert not args.gradient_accumulation_steps and not defaults.deepspeed_config


# --- the commands of the documentation


def documented_commands() -> list[str]:
    text = (REPO_ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```bash\n")[1:]]
    return [block.strip() for block in blocks if "run_training.sh" in block]


def test_every_documented_command_is_known(tmp_path: Path) -> None:
    commands = documented_commands()
    assert len(commands) >= 8
    modules = {"codes.train.train_reward_model"}
    for command in commands:
        # What a cluster sets; the rest comes from the page.
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= {"DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "PYTHON": sys.executable}
        environment |= {
            "SLURM_NODEID": "1",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "MAIN_PROCESS_IP": "10.0.0.7",
        }
        stand_ins = 'srun() { while [[ $1 == -* ]]; do shift; done; "$@"; }\nscontrol() { echo 10.0.0.7; }\n'
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{stand_ins}{command}"],
            cwd=REPO_ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        for line in done.stdout.splitlines():
            words = shlex.split(line)
            module = next(word for before, word in itertools.pairwise(words) if before == "-m")
            assert module in modules
            build_parser().parse_args(words[words.index(module) + 1 :])
