"""Records and arguments that nobody would write: an error with a cure or a result whose counts add up, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError
from codes.common.settings import OVERLENGTH_POLICIES
from codes.train.train_reward_model import build_parser, main

FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**25), 10**25), st.floats(allow_nan=True), st.text(max_size=12)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.one_of(st.text(max_size=9), VALUES),
    }
)
TEXT = st.one_of(st.text(max_size=30), st.sampled_from(["<|im_end|>", "{{ 1 / 0 }}", "\ud800", "cat " * 200]))
# Rows that are nearly right: every field sound, odd, or absent.
ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.integers(0, 5), VALUES),
        "question": st.one_of(TEXT, VALUES),
        "prompt": st.one_of(TEXT, st.lists(TURN, max_size=3)),
        "messages": st.one_of(st.lists(TURN, max_size=4), VALUES),
        "chosen": st.one_of(TEXT, st.lists(TURN, max_size=3), VALUES),
        "rejected": st.one_of(
            TEXT, st.lists(TEXT, max_size=4), st.lists(st.lists(TURN, max_size=2), max_size=2), VALUES
        ),
        "bias_type": st.one_of(st.lists(st.sampled_from([None, *INJECTABLE]), max_size=4), VALUES),
        "margin": st.one_of(st.floats(-5, 5), st.lists(st.one_of(st.none(), st.floats(-5, 5)), max_size=4), VALUES),
        "verify_correctness": st.one_of(st.sampled_from(["CHOSEN_IS_BEST", "FAILED"]), VALUES),
        "source": VALUES,
    },
)
SOUND = st.fixed_dictionaries(
    {
        "question": st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip),
        "chosen": st.just("because"),
        "rejected": st.lists(st.text("abc <|>", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=4),
    },
    optional={"margin": st.floats(-5, 5), "bias_type": st.just(["length"])},
)
LINE = st.one_of(
    SOUND.map(json.dumps), SOUND.map(json.dumps), ROW.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=20)
)


@pytest.fixture(scope="module")
def bare_model(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "bare"
    shutil.copytree(tiny_base_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def run_estimate(model: Path, folder: Path, *arguments: str) -> dict[str, Any] | None:
    """The estimate's result; None where the run was refused in one line, or by argparse."""
    out, cache = folder / "out", folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    places = ["--model_path", str(model), "--output_dir", str(out), "--cache_dir", str(cache)]
    try:
        assert main(["--estimate", "1", *places, "--contamination_files", "", *arguments]) == 0
    except ContrastRMError as error:
        assert str(error).strip() and not (out / "data_estimate.json").exists()
        return None
    except SystemExit as error:
        assert error.code == 2
        return None
    found: dict[str, Any] = json.loads((out / "data_estimate.json").read_text())
    return found


def assert_adds_up(result: dict[str, Any], n_rows: int | None = None) -> None:
    for source in result["sources"]:
        assert source["n_rows"] == source["n_bad_rows"] + source["n_aside"] + source["n_records"]
        assert source["n_records"] == (source["n_groups"] + source["n_dropped_groups"] + source["n_without_negatives"])
        assert sum(source["biases"].values()) == source["n_texts"] - source["n_groups"]
        assert sum(source["verdicts"].values()) == source["n_records"]
        assert sum(source["origins"].values()) == source["n_groups"]
    if n_rows is not None:
        assert sum(source["n_rows"] for source in result["sources"]) == n_rows
    epoch, groups = result["epoch"], sum(source["n_groups"] for source in result["sources"])
    assert sum(source["groups_an_epoch"] for source in result["sources"]) == epoch["n_groups"] == groups
    assert epoch["n_groups"] - epoch["n_repeated_groups"] + epoch["n_groups_left_out"] == groups


@settings(max_examples=120, **FUZZ)
@given(lines=st.lists(LINE, min_size=1, max_size=6), max_bad_rows=st.integers(0, 6), data=st.data())
def test_any_lines(lines: list[str], max_bad_rows: int, data: st.DataObject, bare_model: Path, tmp_path: Path) -> None:
    content = "".join(line.replace("\n", " ").replace("\r", " ") + "\n" for line in lines)
    file = tmp_path / "fuzz.jsonl"
    file.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    extra = data.draw(
        st.sampled_from(
            [(), ("--negatives", "original"), ("--max_length", "16"), ("--max_length", "24", "--overlength", "left")]
        )
    )
    result = run_estimate(bare_model, tmp_path, "--train_file", str(file), "--max_bad_rows", str(max_bad_rows), *extra)
    if result is not None:
        n_lines = sum(bool(line.strip()) for line in content.encode("utf-8", errors="surrogatepass").split(b"\n"))
        assert_adds_up(result, n_lines)


@settings(max_examples=40, **FUZZ)
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".jsonl", ".parquet", ".json"]))
def test_any_bytes(content: bytes, suffix: str, bare_model: Path, tmp_path: Path) -> None:
    file = tmp_path / f"fuzz{suffix}"
    file.write_bytes(content)
    result = run_estimate(bare_model, tmp_path, "--train_file", str(file), "--max_bad_rows", "1000")
    assert result is None or suffix == ".jsonl"


ODD = st.one_of(
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "-1",
            "2",
            "7",
            "0.5",
            "1e400",
            "nan",
            "inf",
            "-inf",
            "9" * 30,
            "9" * 400,
            "9" * 5000,
            "1_0",
            "٣",
            "x",
        ]
    ),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8),
)
FLAGS = [
    "--epochs", "--max_steps", "--max_length", "--overlength", "--global_batch_size", "--micro_batch_size",
    "--max_tokens_per_batch", "--seed", "--limit", "--max_bad_rows", "--max_rejected", "--negatives", "--mode", "--margin",
    "--temperature", "--pairwise_loss", "--bias_weights", "--bias_margins", "--row_margins",
    "--centering", "--label_smoothing", "--fail_on_contamination", "--contamination_files",
]  # fmt: skip
BIAS_NUMBERS = st.lists(st.tuples(st.sampled_from([*INJECTABLE, "original", "other"]), ODD), max_size=3).map(
    lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
)


@settings(max_examples=150, **FUZZ)
@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(FLAGS), st.one_of(ODD, BIAS_NUMBERS, st.sampled_from(OVERLENGTH_POLICIES))),
        max_size=4,
    )
)
def test_any_arguments(
    chosen: list[tuple[str, str]], bare_model: Path, tmp_path: Path, preference_rows: list[dict[str, Any]]
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in preference_rows))
    result = run_estimate(
        bare_model, tmp_path, "--train_file", str(file), *(f"{flag}={value}" for flag, value in chosen)
    )
    if result is not None:
        assert_adds_up(result)


@settings(max_examples=120, **FUZZ)
@given(
    text=st.one_of(
        # No folder of the machine: a name of one would be read as a data set.
        st.text(st.characters(exclude_characters="\0./~", codec="utf-8"), max_size=12),
        st.lists(
            st.sampled_from(["A", "B", "hub:", "x/y", ":", ",", "@", "0.5", "2", "1e9", "train", ".json"]), max_size=7
        ).map("".join),
        st.just("a" * 5000),
    )
)
def test_any_sources(text: str, bare_model: Path, tmp_path: Path, preference_rows: list[dict[str, Any]]) -> None:
    for name, rows in (("A", preference_rows[:4]), ("B", preference_rows[4:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Letters stand for the files, so that mixes of all kinds come up.
    text = text.replace("A", str(tmp_path / "A.jsonl")).replace("B", str(tmp_path / "B.jsonl"))
    result = run_estimate(bare_model, tmp_path, f"--train_file={text}")
    if result is not None:
        assert_adds_up(result)


def test_every_flag_that_is_fuzzed_exists() -> None:
    assert set(FLAGS) <= set(build_parser()._option_string_actions)
