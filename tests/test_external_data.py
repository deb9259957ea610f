"""Real public data through the readers. Needs the folder that ``CONTRASTRM_EXTERNAL_DATA`` names; skips without it.

The data has licences of its own and is no part of this repository.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from codes.common.biases import EVALUABLE, PAIRWISE, eval_file_name
from codes.common.records import (
    read_bias_file,
    read_preference_file,
    read_refinement_file,
)
from codes.evaluate.benchmarks import read_benchmark

FOLDER = os.environ.get("CONTRASTRM_EXTERNAL_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CONTRASTRM_EXTERNAL_DATA is not set: no real data to read")


def lines_of(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def test_every_public_bias_row_is_read() -> None:
    for name in EVALUABLE:
        path = Path(FOLDER) / "judgebias_dev" / eval_file_name(name)
        records, report = (read_bias_file if name in PAIRWISE else read_refinement_file)(path)
        assert (len(records), report.bad) == (lines_of(path), []), name


def test_every_row_of_the_training_pool_is_read() -> None:
    path = Path(FOLDER) / "train_pool.jsonl"
    records, report = read_preference_file(path)
    assert (len(records), report.bad) == (lines_of(path), [])


def test_the_reward_bench_style_file_is_read() -> None:
    path = Path(FOLDER) / "rewardbench_style.jsonl"
    records, (report,) = read_benchmark(path, "reward_bench")
    assert (len(records), report.bad) == (lines_of(path), [])
    manifest = json.loads((Path(FOLDER) / "rewardbench_style.manifest.json").read_text(encoding="utf-8"))
    absent = {name for name, note in manifest["fidelity"].items() if note.startswith("ABSENT")}
    assert set(Counter(record.subset for record in records)) == set(manifest["official_counts"]) - absent
