"""The loader of the public preference sets: records, counts of what was skipped, origin; nothing held in memory.

The files of the tests have the hub's own schema, and the hub is a real HTTP server on localhost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from codes.common.errors import ContrastRMError
from codes.common.records import file_sha256, read_preference_file

REPO_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = REPO_ROOT / "data" / "train-unified-feedback" / "fetch_public.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_public", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(contents)]


def unified_row(number: int = 0, **change: Any) -> dict[str, Any]:
    row = {
        "id": f"row-{number}",
        "source": "openai/summarize",
        "conv_A": turns(f"Name prime number {number}.", f"Nine and {number}."),
        "conv_B": turns(f"Name prime number {number}.", f"Seven and {number}."),
        "conv_A_rating": 0.0,
        "conv_B_rating": 1.0,
    }
    return row | change


def gram_row(number: int = 0, **change: Any) -> dict[str, Any]:
    instruction = (
        "You judge two assistants. Answer with one letter.\n\n[User Question]\nName prime\nnumber "
        f"{number}.\n\n[The Start of Assistant A's Answer]\nSeven and {number}.\n[The End of Assistant A's Answer]\n\n"
        f"[The Start of Assistant B's Answer]\nNine and {number}.\n[The End of Assistant B's Answer]\n\n#Preferred: "
    )
    return {"instruction": instruction, "input": "", "output": "A"} | change


ROW = {"unified-feedback": unified_row, "gram": gram_row}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def load(fetch: ModuleType, name: str, files: list[Path], output: Path, *more: str) -> dict[str, Any]:
    """Run the loader on local files; returns its note of their origin."""
    argv = ["--dataset", name, "--output_file", str(output), "--local_files", *map(str, files), *more]
    assert fetch.main(argv) == 0
    note: dict[str, Any] = json.loads(output.with_name(output.name + ".meta.json").read_text())
    assert note["n_rows_read"] == note["n_usable"] + sum(note["n_skipped"].values())
    assert note["sha256"] == file_sha256(output)
    records, report = read_preference_file(output)
    assert report.n_good == note["n_records"] == len(records)
    return note


@pytest.mark.parametrize("name", sorted(ROW))
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_local_files_become_records_that_our_reader_takes(
    tmp_path: Path, fetch: ModuleType, name: str, write: Any
) -> None:
    kind = write.__name__.removeprefix("write_")
    files = [write(tmp_path / f"{part}.{kind}", [ROW[name](2 * part), ROW[name](2 * part + 1)]) for part in range(2)]
    output = tmp_path / "out.jsonl"
    note = load(fetch, name, files, output, "--revision", "v1.0")
    assert note["local_files"] == [{"file": path.name, "sha256": file_sha256(path)} for path in files]
    assert (note["revision"], note["revision_is"]) == ("v1.0", "as given, not checked")
    assert note["n_records"] == 4 and not note["n_skipped"]
    records = read_preference_file(output)[0]
    asked = [record.question.replace("\n", " ") for record in records]
    assert asked == [f"Name prime number {number}." for number in range(4)]
    for number, record in enumerate(records):
        assert (record.chosen, record.rejected) == (f"Seven and {number}.", [f"Nine and {number}."])
        assert record.bias_type == [None]
    assert load(fetch, name, files, output)["revision"] is None


def test_conversations_of_several_turns_stay_whole(tmp_path: Path, fetch: ModuleType) -> None:
    system = [{"content": "Be brief.", "role": "system"}]
    row = unified_row(
        conv_A=system + turns("Hi", "Hello", "A prime?", "4"), conv_B=system + turns("Hi", "Hello", "A prime?", "2")
    )
    load(fetch, "unified-feedback", [write_parquet(tmp_path / "a.parquet", [row])], tmp_path / "out.jsonl")
    [record] = read_preference_file(tmp_path / "out.jsonl")[0]
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant", "user"]
    assert record.messages[-1]["content"] == "A prime?"
    assert (record.chosen, record.rejected, record.source) == ("2", ["4"], "openai/summarize")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("unified-feedback", {"conv_A_rating": 1.0}, "equal_ratings"),
        ("unified-feedback", {"conv_A_rating": None}, "no_rating"),
        ("unified-feedback", {"conv_A_rating": True}, "no_rating"),
        ("unified-feedback", {"conv_A": turns("Name another.", "Nine.")}, "prompts_differ"),
        ("unified-feedback", {"conv_A": turns("Hi", "Hello", "Name prime number 1.", "Nine.")}, "prompts_differ"),
        ("unified-feedback", {"conv_A": turns("Name prime number 1.", "Seven and 1. ")}, "equal_answers"),
        ("unified-feedback", {"conv_A": turns("Name prime number 1.", " ")}, "empty_answer"),
        ("unified-feedback", {"conv_A": turns(" ", "x"), "conv_B": turns(" ", "y")}, "empty_prompt"),
        ("unified-feedback", {"conv_A": turns("Name prime number 1.")}, "no_conversation"),
        ("unified-feedback", {"conv_A": None}, "no_conversation"),
        ("unified-feedback", {"conv_A": [{"role": "tool", "content": "x"}] * 2}, "malformed_turn"),
        ("unified-feedback", {"conv_A": turns("a", "b", "c")}, "does_not_end_with_an_answer"),
        (
            "unified-feedback",
            {
                side: [*turns("a", "b"), {"role": "system", "content": "s"}, *turns("c", side)]
                for side in ("conv_A", "conv_B")
            },
            "breaks_the_contract_in_messages",
        ),
        ("unified-feedback", {"conv_A": turns("Name prime number 1.", "\ud800")}, "not_unicode"),
        ("gram", {"output": "C"}, "no_label"),
        ("gram", {"output": "A or B"}, "no_label"),
        ("gram", {"output": None}, "no_label"),
        ("gram", {"instruction": "Judge."}, "markers_missing"),
        ("gram", {"instruction": gram_row(1)["instruction"] + "[User Question]"}, "markers_repeated"),
        ("gram", {"instruction": gram_row(1)["instruction"].replace("Nine and 1.", "")}, "empty_answer"),
        ("gram", {"instruction": gram_row(1)["instruction"].replace("Nine and 1.", "Seven and 1.")}, "equal_answers"),
        ("gram", {"instruction": 7}, "no_instruction"),
    ],
)
def test_a_row_that_is_no_pair_is_counted(
    tmp_path: Path, fetch: ModuleType, name: str, change: dict[str, Any], reason: str
) -> None:
    rows = [ROW[name](0), ROW[name](1) | change, ROW[name](2), ROW[name](0)]
    note = load(fetch, name, [write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out.jsonl")
    assert note["n_skipped"] == {reason: 1, "duplicate": 1} and note["n_rows_read"] == 4


def test_labels_and_letters_with_blanks_are_read(tmp_path: Path, fetch: ModuleType) -> None:
    rows = [gram_row(0, output=" B\n"), unified_row(0, conv_A_rating=8, conv_B_rating=3)]
    load(fetch, "gram", [write_jsonl(tmp_path / "a.jsonl", rows[:1])], tmp_path / "gram.jsonl")
    load(fetch, "unified-feedback", [write_jsonl(tmp_path / "b.jsonl", rows[1:])], tmp_path / "unified.jsonl")
    for name in ("gram", "unified"):
        [record] = read_preference_file(tmp_path / f"{name}.jsonl")[0]
        assert record.chosen == "Nine and 0."


# --- sampling -----------------------------------------------------------------------------------------------------------


def ids_of(path: Path) -> list[str]:
    return [record.id for record in read_preference_file(path)[0]]


def test_a_sample_hangs_on_seed_and_content_and_grows(tmp_path: Path, fetch: ModuleType) -> None:
    rows = [unified_row(number) for number in range(200)]
    straight, turned = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    output = tmp_path / "out.jsonl"

    def sample(file: Path, limit: int, seed: int) -> list[str]:
        note = load(fetch, "unified-feedback", [file], output, "--limit", str(limit), "--seed", str(seed))
        assert (note["n_records"], note["n_usable"], note["seed"]) == (min(limit, 200), 200, seed)
        return ids_of(output)

    load(fetch, "unified-feedback", [straight], output)
    whole = ids_of(output)
    ten, fifty = sample(straight, 10, 1), sample(straight, 50, 1)
    assert set(ten) < set(fifty) and len(fifty) == 50
    assert ten == [each for each in whole if each in ten], "the order of the set"
    assert sample(turned, 10, 1) == ten[::-1]
    assert set(sample(straight, 10, 2)) != set(ten)
    assert sample(straight, 500, 1) == whole
    halves = sum(whole.index(each) < 100 for each in fifty)
    assert 10 <= halves <= 40, "not the first rows"
    note = load(fetch, "unified-feedback", [straight], output, "--limit", "7")
    assert ids_of(output) == whole[:7] and (note["n_rows_read"], note["seed"]) == (7, None)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path, fetch: ModuleType) -> None:
    def peak(n_rows: int) -> int:
        path, long = tmp_path / f"{n_rows}.parquet", "x" * 6_000
        schema = pyarrow.Table.from_pylist([unified_row(0)]).schema
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, n_rows, 100):
                rows = [unified_row(number) for number in range(start, start + 100)]
                rows = [row | {"conv_B": turns(row["conv_B"][0]["content"], long + str(row["id"]))} for row in rows]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        argv = ["--dataset", "unified-feedback", "--output_file", str(tmp_path / "out.jsonl"), "--local_files"]
        tracemalloc.start()
        assert fetch.main([*argv, str(path), "--limit", "50", "--seed", "1"]) == 0
        assert fetch.main([*argv, str(path)]) == 0
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # 1,400 rows more are 8 MB of text; a row leaves its digest behind, and no text.
    few = peak(600)
    assert peak(2_000) < few + 1_000_000


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_a_missing_field_names_row_and_field(tmp_path: Path, fetch: ModuleType) -> None:
    without = {key: value for key, value in unified_row(1).items() if key != "conv_B_rating"}
    path = write_jsonl(tmp_path / "a.jsonl", [unified_row(0), without])
    argv = ["--dataset", "unified-feedback", "--output_file", str(tmp_path / "out.jsonl"), "--local_files"]
    with pytest.raises(
        ContrastRMError, match=r"a\.jsonl:2: no field conv_B_rating; found conv_A, conv_A_rating, conv_B"
    ):
        fetch.main([*argv, str(path)])
    table = write_parquet(tmp_path / "a.parquet", [gram_row(0)])
    with pytest.raises(
        ContrastRMError, match=r"a\.parquet row 1: no field conv_A, conv_B, .* found input, instruction"
    ):
        fetch.main([*argv, str(table)])
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"instruction": "x", "output": ""}\n', r"none of 1 rows can be used \(markers_missing 1\)"),
        ("a.jsonl", "[1]\n", "JSON array is not read"),
        ("a.jsonl", "{\n", "one JSON object a line"),
        ("a.jsonl", "", "none of 0 rows can be used"),
        ("a.parquet", "no table", "not a readable Parquet file"),
        ("a.csv", "instruction,output", "unknown kind of file"),
    ],
)
def test_unusable_files_are_errors_and_leave_an_older_output_alone(
    tmp_path: Path, fetch: ModuleType, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")
    with pytest.raises(ContrastRMError, match=message):
        fetch.main(["--dataset", "gram", "--output_file", str(output), "--local_files", str(tmp_path / name)])
    assert output.read_text() == "older\n" and {path.name for path in tmp_path.iterdir()} == {name, "out.jsonl"}


def test_odd_command_lines_are_refused(tmp_path: Path, fetch: ModuleType) -> None:
    argv = ["--dataset", "gram", "--output_file", str(tmp_path / "x"), "--local_files", str(tmp_path / "nowhere.jsonl")]
    with pytest.raises(ContrastRMError, match="file not found"):
        fetch.main(argv)
    with pytest.raises(ContrastRMError, match="give --limit too"):
        fetch.main([*argv, "--seed", "1"])
    with pytest.raises(SystemExit):
        fetch.main([*argv, "--limit", "-1"])


# --- the hub ------------------------------------------------------------------------------------------------------------


GRAM, UNIFIED = "NiuTrans/GRAM-fine-tuning-65k", "llm-blender/Unified-Feedback"
CARD = b"---\nlicense: mit\n---\nA set.\n"
CARD_WITH_CONFIGS = b"""---
configs:
- config_name: all
  data_files:
  - split: train
    path: all/train-*
  - split: val
    path: all/val-*
- config_name: nectar
  data_files:
  - split: train
    path: nectar/train-*
---
A set.
"""
RUN_BOTH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fetch_public", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
for name in ("gram", "unified-feedback"):
    module.main(["--dataset", name, "--output_file", f"{sys.argv[2]}/{name}.jsonl", "--revision", "v1"])
"""


class Hub:
    """What the hub's client asks for when it streams data sets: information, the list of files, their bytes."""

    def __init__(self, sets: dict[str, dict[str, bytes]]) -> None:
        self.sets = sets
        self.paths: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def entry(self, repo_id: str, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.sets[repo_id][name]), "oid": f"{len(name):040x}"}

    def children(self, repo_id: str, folder: str) -> list[dict[str, Any]] | None:
        prefix = f"{folder}/" if folder else ""
        inside = [name for name in self.sets[repo_id] if name.startswith(prefix)]
        folders = sorted({prefix + name.removeprefix(prefix).split("/")[0] for name in inside} - set(inside))
        found = [{"type": "directory", "path": name, "size": 0, "oid": f"{len(name):040x}"} for name in folders]
        found += [self.entry(repo_id, name) for name in inside if "/" not in name.removeprefix(prefix)]
        return found or None

    def reply_to(self, path: str, posted: str) -> bytes | dict[str, Any] | list[Any] | None:
        path = path.split("?")[0]
        for repo_id, files in self.sets.items():
            api, resolve = f"/api/datasets/{repo_id}", f"/datasets/{repo_id}/resolve/{COMMIT}/"
            if path in (api, f"{api}/revision/v1", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in files]
                about = {"tags": [], "private": False, "downloads": 0, "likes": 0}
                return {"id": repo_id, "sha": COMMIT, "siblings": names} | about
            if path.startswith(f"{api}/paths-info/{COMMIT}"):
                return [self.entry(repo_id, name) for name in files if name in posted]
            if path.startswith(f"{api}/tree/{COMMIT}"):
                return self.children(repo_id, path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))
            if path.startswith(resolve):
                return files.get(path.removeprefix(resolve))
        return None

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                posted = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
                owner.paths.append(f"{self.command} {self.path}")
                reply = owner.reply_to(self.path, posted)
                body = reply if isinstance(reply, bytes) else json.dumps({} if reply is None else reply).encode()
                status = 404 if reply is None else 200
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body):x}"', "Accept-Ranges": "bytes"}
                if reply is None:
                    headers["X-Error-Code"] = "EntryNotFound"
                elif (span := self.headers.get("range")) is not None:
                    first, last = span.removeprefix("bytes=").split("-")
                    size, status = len(body), 206
                    body = body[int(first) : int(last or size) + 1]
                    headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{size}"
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    gram = write_jsonl(tmp_path / "train.jsonl", [*map(gram_row, range(5)), gram_row(9, output="C")])
    unified = write_parquet(tmp_path / "train.parquet", [unified_row(number) for number in range(7)])
    other = write_parquet(tmp_path / "other.parquet", [unified_row(number) for number in range(50, 60)])
    files = {name: other.read_bytes() for name in ("all/val-0.parquet", "nectar/train-0.parquet")}
    server = Hub(
        {
            GRAM: {"README.md": CARD, "train.jsonl": gram.read_bytes()},
            UNIFIED: {"README.md": CARD_WITH_CONFIGS, "all/train-0.parquet": unified.read_bytes()} | files,
        }
    )
    yield server
    server.close()


def run_python(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH": str(REPO_ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | ours | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_rows_stream_from_the_hub_and_its_commit_is_noted(tmp_path: Path, hub: Hub) -> None:
    output = tmp_path / "out"
    done = run_python(tmp_path, "-c", RUN_BOTH, str(SCRIPT), str(output), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr[-2000:] + "\n".join(hub.paths)
    expected = {"gram": (6, 5, {"no_label": 1}), "unified-feedback": (7, 7, {})}
    for name, counts in expected.items():
        note = json.loads((output / f"{name}.jsonl.meta.json").read_text())
        assert (note["revision"], note["revision_is"], note["local_files"]) == (COMMIT, "resolved", None)
        assert (note["n_rows_read"], note["n_records"], note["n_skipped"]) == counts
        records = read_preference_file(output / f"{name}.jsonl")[0]
        assert [record.chosen for record in records] == [f"Seven and {number}." for number in range(counts[1])]
    assert any("/revision/v1" in path for path in hub.paths)
    assert not any("nectar/train" in path and "resolve" in path for path in hub.paths)
    assert not list((tmp_path / "hf").rglob("*.arrow")), "the set was read as a stream, not copied"


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    output = tmp_path / "gram.jsonl"
    done = run_python(tmp_path, str(SCRIPT), "--dataset", "gram", "--output_file", str(output), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "cannot load NiuTrans/GRAM-fine-tuning-65k" in done.stderr, done.stderr
    assert "--local_files" in done.stderr and "Traceback" not in done.stderr and not output.exists()
