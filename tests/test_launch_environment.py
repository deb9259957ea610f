"""What other launchers leave in the environment changes nothing, or is named.

Run: ``python -m pytest tests/test_launch_environment.py``
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT

# A module of the project in small: says which process it is, and what is left of the environment.
PROCESS = """
import os
from codes.common.cli import launched_processes, process_index, run

def main(argv):
    print(process_index(), "of", launched_processes(), sorted(name for name in os.environ if name in os.environ["LOOK_FOR"]))
    return 0

run(main)
"""
STRAYS = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500", "PMI_SIZE": "4"}
STRAYS |= {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "MPLBACKEND": "module://no_such_backend",
}


def run_process(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO_ROOT), "LOOK_FOR": " ".join(STRAYS)}
    return subprocess.run(
        command or [sys.executable, "-c", PROCESS],
        env={**environment, **variables},
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("world_size", [{}, {"WORLD_SIZE": ""}], ids=["unset", "empty"])
def test_a_single_process_takes_nothing_from_another_launch(world_size: dict[str, str]) -> None:
    done = run_process(**STRAYS, **world_size)
    assert (done.returncode, done.stdout) == (0, "0 of 1 ['MPLBACKEND']\n"), done.stderr


@pytest.mark.parametrize(
    "launch", [{}, {"RANK": "0"}, {"RANK": "2"}, {"RANK": "first"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "-1"}]
)
def test_half_a_launch_is_named_with_its_cure(launch: dict[str, str]) -> None:
    done = run_process(**{"WORLD_SIZE": "2", **launch})
    assert done.returncode == 2
    assert "unset WORLD_SIZE" in done.stderr and "Traceback" not in done.stderr


def test_a_whole_launch_is_taken() -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert run_process(**whole).stdout == "0 of 2 ['MASTER_ADDR', 'MASTER_PORT', 'RANK']\n"
    # Of several processes the first one prints.
    assert run_process(**whole | {"RANK": "1"}).stdout == ""


def test_launchers_start_without_what_another_launch_left(tmp_path: Path) -> None:
    script = tmp_path / "probe.sh"
    script.write_text(f"set -euo pipefail\nsource '{REPO_ROOT}/scripts/env.sh'\nenv\n", encoding="utf-8")
    done = run_process("bash", str(script), SKIP_SETUP="1", **STRAYS, WORLD_SIZE="2")
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stderr
    assert "PYTHONPATH" in names
    assert not [name for name in names if name.startswith("ACCELERATE_")]
    assert names.isdisjoint({"WORLD_SIZE", "RANK", "LOCAL_RANK", "MPLBACKEND"})
