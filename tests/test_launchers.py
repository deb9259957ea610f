"""The launchers: flags exist, knobs work, failures and signals arrive, the environment is made.

Runs the real shell scripts. Where a launcher would start a long Python step, PYTHON names a stand-in
interpreter that records its arguments and then exits, fails or waits as the test says; nothing of the
project itself is replaced.
Run: ``python -m pytest tests/test_launchers.py``
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from codes.common.settings import flag_values
from codes.train.settings import TrainSettings
from tests.conftest import launch_training

REPO = Path(__file__).resolve().parent.parent
LAUNCHERS = ("run_construction", "run_training", "run_evaluation_rm", "run_evaluation_rewardbench", "run_all")
# The stand-in interpreter. Real Python still answers env.sh: `python -c …` and the environment check.
STAND_IN = """#!/usr/bin/env bash
if [[ "${2:-}" == *model_results_folder* ]]; then echo "$3/folder-of-$(basename "$4")"; exit; fi
if [[ "${1:-}" == -c || "${1:-}" == */check_environment.py ]]; then exec "$REAL_PYTHON" "$@"; fi
exec "$REAL_PYTHON" "$STAND_IN_BODY" "$@"
"""
STAND_IN_BODY = """
import os, pathlib, signal, subprocess, sys, time
log = pathlib.Path(os.environ["STAND_IN_LOG"])

def note(line):
    with log.open("a") as file:
        file.write(line + "\\n")

def stop(number, frame):
    note("signal " + signal.Signals(number).name)
    sys.exit(128 + number)

arguments = sys.argv[1:]
note(" ".join(arguments))
if "codes.construct.embedded_server" in arguments:
    inside = dict(os.environ, CONTRASTRM_EMBEDDED_SERVER="1", OPENAI_API_KEY="none", API_MODEL="served",
                  OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    sys.exit(subprocess.run(arguments[arguments.index("--") + 1:], env=inside).returncode)
if os.environ.get("STAND_IN_WAITS", "nowhere") in " ".join(arguments):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    note("waiting")
    time.sleep(60)
failed = os.environ.get("STAND_IN_FAILS", "nowhere") in " ".join(arguments)
sys.exit(int(os.environ.get("STAND_IN_STATUS", "7")) if failed else 0)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A clean environment: no knob of the caller's, no GPU, the stand-in as PYTHON, no set-up."""
    (tmp_path / "body.py").write_text(STAND_IN_BODY)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PYTHON": str(stand_in),
        "REAL_PYTHON": sys.executable,
        "STAND_IN_BODY": str(tmp_path / "body.py"),
        "STAND_IN_LOG": str(tmp_path / "log.txt"),
        "SKIP_SETUP": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def launch(
    name: str, environment: dict[str, str], *flags: str, repo: Path = REPO, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(repo / f"{name}.sh"), *flags]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def printed(name: str, environment: dict[str, str], *flags: str, repo: Path = REPO) -> list[list[str]]:
    """Return the words of each command that DRY_RUN=1 prints."""
    done = launch(name, {**environment, "DRY_RUN": "1"}, *flags, repo=repo)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines()]


def recorded(environment: dict[str, str]) -> list[str]:
    log = Path(environment["STAND_IN_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def module_and_flags(words: list[str]) -> tuple[str, list[str]]:
    module = next(i for i, word in enumerate(words) if word.startswith("codes.") and words[i - 1] == "-m")
    return words[module], words[module + 1 :]


def copy_of_launchers(folder: Path) -> Path:
    """A second checkout with the launchers and what they read, to edit."""
    for path in [*REPO.glob("run_*.sh"), *REPO.glob("*.txt")]:
        shutil.copy(path, folder / path.name)
    shutil.copytree(REPO / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "configs", folder / "configs")
    shutil.copytree(REPO / ".ci", folder / ".ci")
    return folder


# ---------------------------------------------------------------------------------------- the commands

VARIANTS = [
    ("run_construction", {}),
    ("run_construction", {"GENERATOR": "embedded", "USE_GPTINST": "1"}),
    ("run_construction", {"USE_GPTINST": "1", "API_MODEL": "m", "API_BASE_URL": "http://localhost:1/v1"}),
    (
        "run_construction",
        {"STRATEGY": "rewrite_rejected", "BIAS_TYPES": "length,beauty", "VERIFY_FILTER": "off"},
    ),
    ("run_construction", {"STRATEGY": "template"}),
    ("run_construction", {"STRATEGY": "template", "JUDGE_MODEL": "m", "MAX_BAD_ROWS": "3"}),
    (
        "run_construction",
        {"MAX_COST": "3", "PRICE_IN": "1", "PRICE_OUT": "2", "MAX_REQUESTS": "9", "MAX_TOKENS_BUDGET": "99"},
    ),
    ("run_construction", {"API_MODEL": "m", "JUDGE_TEMPERATURE": "none"}),
    ("run_construction", {"ESTIMATE": "1", "USE_GPTINST": "1", "API_MODEL": "m"}),
    ("run_construction", {"ESTIMATE": "1", "GENERATOR": "embedded"}),
    ("run_training", {}),
    ("run_training", {"MODE": "pairwise", "NEGATIVES": "original"}),
    ("run_training", {"NUM_PROCESSES": "2"}),
    ("run_training", {"NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": "none"}),
    ("run_training", {"CUDA_VISIBLE_DEVICES": "4,5"}),
    ("run_training", {"LORA_RANK": "8", "METRIC_FOR_BEST": "none"}),
    ("run_training", {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "10.0.0.7", "MAIN_PROCESS_PORT": "29500"}),
    ("run_evaluation_rm", {}),
    ("run_evaluation_rm", {"BIAS_TYPE": "length", "DTYPE": "bfloat16"}),
    ("run_evaluation_rewardbench", {}),
    ("run_evaluation_rewardbench", {"CATEGORY": "Chat Hard"}),
    ("run_all", {}),
]


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
def test_every_printed_flag_is_known_to_its_module(
    name: str, knobs: dict[str, str], environment: dict[str, str]
) -> None:
    commands = printed(name, {**environment, **knobs})
    assert commands
    for words in commands:
        module, flags = module_and_flags(words)
        parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
        parser.parse_args(flags)


@pytest.mark.parametrize("knobs", [{}, {"DEEPSPEED_CONFIG": "none"}])
def test_accelerate_knows_its_flags(knobs: dict[str, str], environment: dict[str, str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    [words] = printed("run_training", {**environment, "NUM_PROCESSES": "2", **knobs})
    # Without a GPU each way needs a variable of its own, or the ranks do not find each other.
    variable = "ACCELERATE_USE_CPU=true" if knobs else "DS_ACCELERATOR=cpu"
    assert words[:4] == ["env", variable, "accelerate", "launch"]
    args = launch_command_parser().parse_args(words[4:])
    assert args.num_processes == 2
    assert args.num_machines == 1
    assert args.use_deepspeed == (not knobs)
    assert args.module
    assert args.training_script == "codes.train.train_reward_model"


@pytest.mark.parametrize(
    "name", ["run_construction", "run_training", "run_evaluation_rm", "run_evaluation_rewardbench"]
)
def test_defaults_of_launcher_and_module_agree(name: str, environment: dict[str, str]) -> None:
    for words in printed(name, environment):
        module, flags = module_and_flags(words)
        parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
        given = vars(parser.parse_args(flags))
        # A path has a default in the launcher only where the module requires it.
        defaults = {
            action.dest: action.type(action.default) if _is_text_of_a_type(action) else action.default
            for action in parser._actions
            if action.dest in given and not action.required and action.default is not None
        }
        assert {dest: given[dest] for dest in defaults} == defaults, module


def _is_text_of_a_type(action: argparse.Action) -> bool:
    return callable(action.type) and isinstance(action.default, str)


def knobs_of(name: str) -> dict[str, str]:
    """Return the knobs of a launcher's block with their defaults."""
    text = (REPO / f"{name}.sh").read_text()
    [block] = re.findall(r"^# --- knobs -+$(.*?)^# -+$", text, re.S | re.M)
    return dict(re.findall(r'^(?:export )?([A-Z_]+)="\$\{\1:-([^"]*)\}"', block, re.M))


# Knobs that choose between commands, and values that they allow.
CHOICES = {
    "GENERATOR": "embedded",
    "USE_GPTINST": "1",
    "NUM_PROCESSES": "3",
    "NUM_MACHINES": "3",
    "MACHINE_RANK": "1",
    "DEEPSPEED_CONFIG": "none",
    "ESTIMATE": "1",
}


# Knobs that reach the steps through the environment, never on a command line: the tests of whole constructions use it.
IN_THE_ENVIRONMENT = ("API_BASE_URL",)


def other_values(name: str, environment: dict[str, str]) -> dict[str, str]:
    choices = {**CHOICES, "GENERATOR": "api"} if name == "run_all" else CHOICES
    knobs = [knob for knob in knobs_of(name) if knob not in IN_THE_ENVIRONMENT]
    return {knob: choices.get(knob, f"sentinel/{knob.lower()}") for knob in knobs}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_knob_changes_the_command(name: str, environment: dict[str, str]) -> None:
    if name == "run_training":
        machines = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "10.0.0.7", "MAIN_PROCESS_PORT": "29500"}
        environment = {**environment, "NUM_PROCESSES": "2", **machines}
    before = printed(name, environment)
    values = other_values(name, environment)
    assert len(values) > 5
    for knob, value in values.items():
        after = printed(name, {**environment, knob: value})
        assert after != before, f"{name}: {knob} has no effect"
        assert knob in CHOICES or any(value in word for words in after for word in words)


def test_every_setting_of_training_is_a_knob_or_a_documented_flag() -> None:
    settings = flag_values(TrainSettings())
    knobs = {knob.lower() for knob in knobs_of("run_training")}
    documented = set(re.findall(r"--(\w+)", (REPO / "docs" / "training.md").read_text()))
    assert set(settings) - knobs - documented == set()
    assert len(knobs) <= 40


@pytest.mark.parametrize("name", LAUNCHERS)
def test_editing_the_line_works_like_prefixing(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    checkout = copy_of_launchers(tmp_path)
    script = checkout / f"{name}.sh"
    original = script.read_text()
    for knob, value in list(other_values(name, environment).items())[:4]:
        script.write_text(re.sub(rf"\$\{{{knob}:-[^}}]*\}}+", f"${{{knob}:-{value}}}", original))
        edited = printed(name, environment, repo=checkout)
        script.write_text(original)
        assert edited == printed(name, {**environment, knob: value}, repo=checkout)


@pytest.mark.parametrize(
    "name", ["run_construction", "run_training", "run_evaluation_rm", "run_evaluation_rewardbench"]
)
def test_extra_flags_pass_through_last(name: str, environment: dict[str, str]) -> None:
    extra = ["--seed", "9", "--note", "two words; $HOME"]
    commands = printed(name, environment, *extra)
    assert commands[0][-4:] == extra
    if name == "run_construction":
        # Each step reads its own; what the launcher chooses for a later one stands behind them.
        assert module_and_flags(commands[1])[1][:4] == extra


def test_a_further_flag_reaches_the_step_that_knows_it(environment: dict[str, str]) -> None:
    flags = ["--orders", "3", "--cue_gate", "off", "--seed", "9", "--retry_failed"]
    commands = printed("run_construction", {**environment, "USE_GPTINST": "1"}, *flags)
    read = {}
    for words in commands[:3]:
        module, given = module_and_flags(words)
        launched = {**environment, "CONTRASTRM_LAUNCH": "1", "PYTHONPATH": str(REPO)}
        code = f"import sys, json, {module} as step; print(json.dumps(vars(step.build_parser().parse_args()), default=str))"
        done = subprocess.run(
            [sys.executable, "-c", code, *given], env=launched, capture_output=True, text=True, check=True
        )
        read[module.rsplit(".")[-1]] = json.loads(done.stdout)
        alone = subprocess.run(
            [sys.executable, "-c", code, *given],
            env=launched | {"CONTRASTRM_LAUNCH": ""},
            capture_output=True,
            check=False,
        )
        assert alone.returncode == 2, "a flag of another step is a mistake outside a launch"
    assert all(args["seed"] == 9 and args["retry_failed"] for args in read.values())
    assert read["verify_correctness"]["orders"] == 3 and read["gptout"]["cue_gate"] == "off"


def test_run_all_refuses_flags(environment: dict[str, str]) -> None:
    done = launch("run_all", environment, "--limit", "3")
    assert done.returncode == 2
    assert "takes no flags" in done.stderr


@pytest.mark.parametrize("name", [*LAUNCHERS, "run_tests"])
def test_a_dry_run_works_from_anywhere_and_starts_nothing(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    environment = {**environment, "DRY_RUN": "1", "SKIP_SETUP": "0", "PYTHON": "/nowhere/python"}
    here, there = launch(name, environment, cwd=REPO), launch(name, environment, cwd=tmp_path)
    assert (here.returncode, here.stderr) == (0, "")
    assert here.stdout == there.stdout != ""
    assert recorded(environment) == []


# ------------------------------------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    ("visible", "processes"), [("", None), ("-1", None), ("0", 1), ("3,5", 2), ("GPU-abc,GPU-def,GPU-ghi", 3)]
)
def test_one_process_for_each_visible_gpu(visible: str, processes: int | None, environment: dict[str, str]) -> None:
    [words] = printed("run_training", {**environment, "CUDA_VISIBLE_DEVICES": visible})
    assert (words[0] == "accelerate") == (processes is not None)
    if processes is not None:
        assert words[words.index("--num_processes") + 1] == str(processes)
        assert "--use_deepspeed" in words


def test_gpus_are_counted_with_nvidia_smi(environment: dict[str, str], tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: GPU-1)\\n  MIG 1g\\nGPU 1: A (UUID: GPU-2)\\n'\n")
    smi.chmod(0o755)
    del environment["CUDA_VISIBLE_DEVICES"]
    environment["PATH"] = f"{smi.parent}:{environment['PATH']}"
    [words] = printed("run_training", environment)
    assert words[words.index("--num_processes") + 1] == "2"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    [words] = printed("run_training", environment)
    assert words[0] == environment["PYTHON"]


@pytest.mark.parametrize(
    "knobs",
    [
        {"NUM_PROCESSES": "two"},
        {"NUM_PROCESSES": "0"},
        {"NUM_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "0"},
        {"NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": "configs/absent.json"},
    ],
)
def test_impossible_training_knobs_stop_before_the_start(knobs: dict[str, str], environment: dict[str, str]) -> None:
    done = launch("run_training", {**environment, **knobs})
    assert done.returncode == 2
    assert any(f"{knob}={value}" in done.stderr for knob, value in knobs.items())
    assert recorded(environment) == []


# -------------------------------------------------------------------------------------------- failures

# What a launcher prints after success, and never otherwise.
SUCCESS = {
    "run_construction": "the training file is",
    "run_training": r"\S",
    "run_evaluation_rm": r"\S",
    "run_evaluation_rewardbench": r"\S",
    "run_all": "run_all.sh: finished",
}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run_construction", "gptout"),
        ("run_construction", "verify_correctness"),
        ("run_training", "train_reward_model"),
        ("run_evaluation_rm", "eval_rm"),
        ("run_evaluation_rewardbench", "eval_reward_bench"),
        ("run_all", "gptout"),
        ("run_all", "--mode contrastive"),
        ("run_all", "--mode pairwise"),
        ("run_all", "eval_rm --model_path output/pairwise"),
        ("run_all", "eval_reward_bench"),
        ("run_all", "compare_models"),
    ],
)
def test_a_failed_step_is_a_failed_launcher(name: str, step: str, environment: dict[str, str]) -> None:
    environment = {**environment, "OPENAI_API_KEY": "none", "STAND_IN_FAILS": step}
    done = launch(name, environment)
    assert done.returncode == 7, done.stderr
    assert not re.search(SUCCESS[name], done.stdout)
    assert step in recorded(environment)[-1], "a later step was run"


def test_run_all_runs_every_stage_in_order(environment: dict[str, str]) -> None:
    done = launch("run_all", environment)
    assert done.returncode == 0, done.stderr
    stages = [re.search(r"codes\.\w+\.(\w+)", line).group(1) for line in recorded(environment)]  # type: ignore[union-attr]
    evaluations = ["eval_rm", "eval_reward_bench"] * 2
    training = ["train_reward_model"] * 2
    construction = ["embedded_server", "gptout", "verify_correctness", "report"]
    assert stages == [*construction, *training, *evaluations, "compare_models"]
    assert "finished" in done.stdout.splitlines()[-1]
    assert "compare_models results/folder-of-contrastive results/folder-of-pairwise" in recorded(environment)[-1]
    assert len(re.findall(r"^=== .*: \d+ s$", done.stdout, re.M)) == 8, "a stage prints its seconds"


@pytest.mark.parametrize("step, goes_on", [("gptout", True), ("train_reward_model", False)])
def test_rows_missing_in_construction_do_not_stop_run_all(
    environment: dict[str, str], step: str, goes_on: bool
) -> None:
    environment = {**environment, "STAND_IN_FAILS": step, "STAND_IN_STATUS": "3"}
    done = launch("run_all", environment)
    assert done.returncode == (0 if goes_on else 3), done.stderr
    assert ("compare_models" in recorded(environment)[-1]) == goes_on
    if goes_on:
        assert "some rows are missing (above), the other stages go on" in done.stderr
        alone = launch("run_construction", {**environment, "GENERATOR": "embedded"})
        assert alone.returncode == 3


def test_the_embedded_server_decides_on_model_and_address(environment: dict[str, str]) -> None:
    knobs = {
        "GENERATOR": "embedded",
        "API_MODEL": "another",
        "API_BASE_URL": "http://elsewhere/v1",
        "LIMIT": "3",
    }
    done = launch("run_construction", {**environment, **knobs}, "--seed", "9")
    assert done.returncode == 0, done.stderr
    server, written, verified, _report = recorded(environment)
    assert "codes.construct.embedded_server --model_path embedded --work_dir output/construct" in server
    assert server.endswith("-- bash run_construction.sh --seed 9")
    assert "--limit 3" in written
    assert written.endswith("--seed 9")
    assert "another" not in written + verified
    assert "elsewhere" not in written + verified


def test_secrets_of_addresses_reach_no_command_line(environment: dict[str, str]) -> None:
    """Other users of a machine see command lines; a dry run is pasted elsewhere."""
    done = launch(
        "run_construction",
        {**environment, "OPENAI_API_KEY": "k", "API_MODEL": "m", "API_BASE_URL": "http://h/v1?key=hunter2"},
    )
    assert done.returncode == 0, done.stderr
    assert not any("hunter2" in line for line in recorded(environment))
    address = "http://me:hunter2@host/score?v=1&api_token=hunter2&x=2"
    done = launch("run_evaluation_rm", {**environment, "DRY_RUN": "1", "MODEL_PATH": "m"}, "--reward_url", address)
    assert done.returncode == 0 and "hunter2" not in done.stdout and "//...@host/score" in done.stdout


def test_construction_without_a_key_names_both_ways_out(environment: dict[str, str]) -> None:
    for key in ({}, {"OPENAI_API_KEY": ""}):
        done = launch("run_construction", {**environment, **key})
        assert done.returncode != 0
        assert "OPENAI_API_KEY=" in done.stderr
        assert "GENERATOR=embedded" in done.stderr
        assert done.stdout == ""
    assert recorded(environment) == []


def test_an_unknown_generator_is_refused(environment: dict[str, str]) -> None:
    done = launch("run_construction", {**environment, "GENERATOR": "embeded"})
    assert done.returncode == 2
    assert "api, embedded" in done.stderr


# --------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run_training", "train_reward_model"),
        ("run_construction", "verify_correctness"),
        ("run_evaluation_rm", "eval_rm"),
        ("run_all", "--mode pairwise"),
    ],
)
def test_a_signal_reaches_the_python_process_once(
    name: str, step: str, number: signal.Signals, environment: dict[str, str]
) -> None:
    environment = {**environment, "OPENAI_API_KEY": "none", "STAND_IN_WAITS": step}
    script = REPO / f"{name}.sh"
    process = subprocess.Popen(
        ["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for_line(environment, "waiting")
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert recorded(environment)[-1] == f"signal {number.name}"
    assert sum(line.startswith("signal") for line in recorded(environment)) == 1
    assert not re.search(SUCCESS[name], output)


def wait_for_line(environment: dict[str, str], line: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while line not in recorded(environment):
        assert time.monotonic() < end, f"{line!r} did not appear: {recorded(environment)}"
        time.sleep(0.05)


# ---------------------------------------------------------------------------- the tests' own launchers


def test_run_tests_runs_every_part_and_fails_when_one_does(environment: dict[str, str], tmp_path: Path) -> None:
    checkout = copy_of_launchers(tmp_path / "checkout" if (tmp_path / "checkout").mkdir() is None else tmp_path)
    done = launch("run_tests", {**environment, "STAND_IN_FAILS": "ruff check"}, "-k", "x", repo=checkout)
    assert done.returncode == 1
    assert [line.split()[1] for line in recorded(environment)] == ["ruff", "ruff", "mypy", "pytest"]
    assert recorded(environment)[-1].startswith("-m pytest ") and recorded(environment)[-1].endswith(" -k x")
    assert "ruff check: FAILED" in done.stderr
    passed = launch("run_tests", environment, repo=checkout)
    assert passed.returncode == 0, passed.stderr + passed.stdout


def test_ci_names_the_external_data_where_it_exists(environment: dict[str, str], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    copy_of_launchers(checkout)
    (checkout / "run_tests.sh").write_text('echo "<${CONTRASTRM_EXTERNAL_DATA:-unset}> $*"; exit 3\n')
    command = ["bash", str(checkout / ".ci" / "run"), "-x"]

    def ci() -> tuple[int, str]:
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert ci() == (3, "<unset> -x\n")
    external = tmp_path.joinpath("shared", "data")
    external.mkdir(parents=True)
    assert ci() == (3, f"<{external}> -x\n")


# -------------------------------------------------------------------------------------- what is absent


def shell_files() -> list[Path]:
    folders = (REPO / "scripts", REPO / "benchmarks")
    return [*REPO.glob("run_*.sh"), *(path for folder in folders for path in folder.glob("*.sh")), REPO / ".ci" / "run"]


def test_launchers_are_strict_and_hold_no_gpu_id_and_no_key() -> None:
    for path in shell_files():
        text = path.read_text()
        if path.name not in ("env.sh", "venv.sh"):  # sourced by those that are
            assert "\nset -euo pipefail\n" in text, path
        assert not re.search(r"^[^#]*CUDA_VISIBLE_DEVICES=", text, re.M), path
        assert not re.search(r"^\s*(export )?[A-Z_]*(KEY|TOKEN)=", text, re.M), path
        assert not re.search(r"\bsk-\w{8}|\bhf_\w{8}", text), path


def test_only_ci_knows_where_the_external_data_lies() -> None:
    place = "shared" + "/data"
    files = [
        *REPO.glob("*.*"),
        *(p for d in ("codes", "scripts", "tests", "data") for p in (REPO / d).rglob("*.*")),
    ]
    files = [path for path in files if path.suffix in {".py", ".sh", ".md", ".toml", ".txt", ".json"}]
    assert [path for path in files if place in path.read_text(encoding="utf-8")] == []


# ------------------------------------------------------------------------------------- the environment


def check_environment(*files: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts" / "check_environment.py"), *flags, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pytest>=1", None),
        ("# only a comment", None),
        ('not-a-package>=1; sys_platform == "no-such-platform"', None),
        ("pytest>=9999  # too new", "needed: >=9999"),
        ("not-a-package-of-anyone", "not-a-package-of-anyone is not installed, needed: any version"),
        ("transformers[serving]>=5", None),
    ],
)
def test_check_environment_tells_what_is_missing(line: str, problem: str | None, tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(line + "\n")
    done = check_environment(file)
    assert done.returncode == (0 if problem is None else 1), done.stderr
    assert (problem or "") in done.stderr
    assert check_environment(file, flags=("--quiet",)).stderr == ""


def test_check_environment_names_an_absent_file(tmp_path: Path) -> None:
    done = check_environment(tmp_path / "absent.txt")
    assert done.returncode == 2
    assert "absent.txt" in done.stderr


def test_the_exact_versions_lie_in_the_tested_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPO / "constraints.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    exact = {canonicalize_name(name): version for name, version in exact.items()}
    assert not any("+" in version for version in exact.values()), "a local version cannot be had elsewhere"
    for name in ("requirements.txt", "requirements-test.txt"):
        for line in (REPO / name).read_text().splitlines():
            if line and not line.startswith("#"):
                wanted = Requirement(line)
                assert wanted.specifier.contains(exact[canonicalize_name(wanted.name)]), line


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1", "2.13.0"])
def test_a_gpu_node_keeps_its_torch(version: str) -> None:
    from packaging.requirements import Requirement

    [torch] = [line for line in (REPO / "requirements.txt").read_text().splitlines() if line.startswith("torch")]
    assert Requirement(torch).specifier.contains(version)


def write_wheel(folder: Path, name: str, version: str) -> None:
    """Write an installable package that holds nothing but its metadata."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def fresh_checkout(tmp_path: Path, environment: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """A checkout that needs three tiny packages from a local folder; no .venv, no network."""
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    checkout.mkdir()
    wheels.mkdir()
    copy_of_launchers(checkout)
    packages = {"torch": "2.13.0", "deepspeed": "0.19.8", "packaging": "26.3"}
    for name, version in packages.items():
        write_wheel(wheels, name, version)
    # packaging must be real: check_environment.py reads requirements with it.
    shutil.copy(real_packaging_wheel(tmp_path), wheels / "packaging-26.3-py3-none-any.whl")
    (checkout / "requirements.txt").write_text("torch>=2.11,<2.14\ndeepspeed>=0.19\npackaging\nunheard-of-package\n")
    write_wheel(wheels, "unheard_of_package", "1.0")
    (checkout / "requirements-test.txt").write_text("")
    exact = [f"{name}=={version}" for name, version in packages.items()]
    (checkout / "constraints.txt").write_text("\n".join([*exact, "unheard-of-package==1.0", ""]))
    environment = {
        **environment,
        "PYTHON": sys.executable,
        "SKIP_SETUP": "0",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }
    return checkout, environment


def real_packaging_wheel(folder: Path) -> Path:
    """Pack the installed `packaging` into a wheel named 26.3, whatever its version is."""
    import packaging

    path = folder / "packaging-26.3-py3-none-any.whl"
    source = Path(packaging.__file__).parent
    write_wheel(folder, "packaging", "26.3")
    with zipfile.ZipFile(path, "a") as wheel:
        for file in source.rglob("*.py"):
            wheel.write(file, f"packaging/{file.relative_to(source)}")
    return path


def test_a_fresh_checkout_makes_its_environment_once(fresh_checkout: tuple[Path, dict[str, str]]) -> None:
    checkout, environment = fresh_checkout
    command = ["bash", "-c", 'set -euo pipefail; source scripts/env.sh; echo "$PYTHON"; command -v python']

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, cwd=checkout, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    pair = [start(), start()]  # two launchers at the same time
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    python = str(checkout / ".venv" / "bin" / "python")
    assert [out.split() for out, _ in outputs] == [[python, python]] * 2
    errors = "".join(error for _, error in outputs)
    assert errors.count("[setup] 1/3 torch") == 1, "installed twice"
    assert errors.index("1/3 torch") < errors.index("3/3 deepspeed")
    assert "unheard-of-package is not installed" in errors

    again = start().communicate(timeout=60)
    assert again == (f"{python}\n{python}\n", ""), "a current environment is used silently"

    constraints = checkout / "constraints.txt"
    constraints.write_text(constraints.read_text().replace("deepspeed==0.19.8", "deepspeed==0.19.9"))
    failed = start()
    _, error = failed.communicate(timeout=60)
    assert failed.returncode != 0, "the hash changed and the package cannot be had"
    assert "3/3 deepspeed" in error
    assert "run the same command again" in error
    write_wheel(Path(environment["PIP_FIND_LINKS"]), "deepspeed", "0.19.9")
    mended = start()
    _, error = mended.communicate(timeout=60)
    assert mended.returncode == 0, error
    assert start().communicate(timeout=60)[1] == ""


def test_a_satisfied_environment_is_used_as_it_is(fresh_checkout: tuple[Path, dict[str, str]]) -> None:
    checkout, environment = fresh_checkout
    (checkout / "requirements.txt").write_text("packaging>=20\n")
    (checkout / "configs" / "unused").touch()
    done = launch("run_training", {**environment, "TRAIN_FILE": "absent"}, repo=checkout)
    assert done.returncode != 0, "there is no such module in this checkout"
    assert "[setup]" not in done.stderr
    assert "train_reward_model" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_absent_python_is_named(environment: dict[str, str]) -> None:
    done = launch("run_evaluation_rm", {**environment, "PYTHON": "python9.9"})
    assert done.returncode != 0
    assert "python9.9 was not found" in done.stderr


def test_a_launcher_without_room_for_its_own_file_says_so() -> None:
    launched = launch_training(TMPDIR="/no/such/folder", NUM_PROCESSES="2")
    _, error = launched.communicate(timeout=60)
    assert launched.returncode == 2 and "set TMPDIR to a folder with more" in error
