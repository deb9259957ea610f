"""The token counts of the sharing benchmark, on texts small enough to count by hand.

Run: ``python -m pytest tests/test_benchmark_sharing.py``
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sharing
from tests.conftest import REPO_ROOT


def test_counts_are_those_of_the_layouts() -> None:
    prompt, other = tuple(range(20)), tuple(range(40, 60))
    texts = [
        ("a", (*prompt, 100, 101)),
        ("a", (*prompt, 102)),
        ("b", (*other, 100)),
        ("a", (*prompt, 102)),  # once more
    ]
    counts = sharing.count_tokens(texts, batch_size=2)
    assert counts == {
        "n_texts": 4,
        "n_distinct": 3,
        "n_questions": 2,
        "padded": 2 * 22 + 2 * 21,
        "plain": 22 + 21 + 21 + 21,
        "distinct": 22 + 21 + 21,
        "two_levels": 20 + 2 + 1 + 21,
        "tree": 20 + 2 + 1 + 21,
        "packs_2048": 44,
        "packs_16384": 44,
    }


def test_the_command_prints_one_line(tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(REPO_ROOT / "data/eval/length_bias.jsonl")]
    assert sharing.main(["--model_path", str(tiny_base_dir), "--files", *files]) == 0
    assert '"task": "sharing"' in capsys.readouterr().out
    train_file = str(REPO_ROOT / "data/train/own_train.jsonl")
    assert sharing.main(["--model_path", str(tiny_base_dir), "--train_file", train_file]) == 0
