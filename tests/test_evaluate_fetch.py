"""The fetchers of the public evaluation data, against a local server and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from codes.common.biases import EVALUABLE
from codes.common.records import file_sha256

REPO_ROOT = Path(__file__).resolve().parents[1]
OWN_DATA = REPO_ROOT / "data" / "eval"


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fill(folder: Path) -> None:
    for name in EVALUABLE:
        (folder / f"{name}_bias.jsonl").write_bytes((OWN_DATA / f"{name}_bias.jsonl").read_bytes())


def test_fetched_files_are_unchanged_and_recorded(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    fill(folder)
    output = tmp_path / "public"
    done = run_script("data/eval/fetch_public.py", "--base_url", f"{url}/", "--output_dir", output)
    assert done.returncode == 0, done.stderr
    source = json.loads((output / "source.json").read_text())
    assert source["base_url"] == url
    assert len(source["files"]) == len(EVALUABLE)
    for entry in source["files"]:
        assert (output / entry["file"]).read_bytes() == (folder / entry["file"]).read_bytes()
        assert entry["sha256"] == file_sha256(output / entry["file"])


def test_fetching_needs_room_in_its_own_folder_alone(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    fill(folder)
    # A full or missing folder for temporary files.
    code = (
        "import runpy, sys, tempfile; tempfile.tempdir = '/no/such'; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    script = ["data/eval/fetch_public.py", "--base_url", url, "--output_dir", tmp_path / "public"]
    done = run_script("-c", code.replace("sys.argv[1]", "sys.argv.pop(1)"), *script)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "public").iterdir())) == len(EVALUABLE) + 1


@pytest.mark.parametrize("damage", ["missing", "malformed"])
def test_nothing_is_written_unless_all_ten_are_good(damage: str, served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    fill(folder)
    last = folder / "refinement-aware_bias.jsonl"
    if damage == "missing":
        last.unlink()
    else:
        last.write_text('{"question": "q"}\n')
    output = tmp_path / "public"
    done = run_script("data/eval/fetch_public.py", "--base_url", url, "--output_dir", output)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(output.iterdir()) == []


def test_reward_bench_without_a_hub_says_what_to_do(tmp_path: Path) -> None:
    output = tmp_path / "reward_bench.jsonl"
    done = run_script("data/eval/reward_bench/load_reward_bench.py", "--output_file", output)
    assert done.returncode == 2
    assert "error: cannot load allenai/reward-bench" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
