"""The built-in baselines: known answers, computed here a second time from the files alone, and their use as models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codes.common.biases import PAIRWISE, eval_file_name
from codes.common.chat import Conversation
from codes.common.errors import ContrastRMError
from codes.evaluate import eval_reward_bench, eval_rm
from codes.evaluate.baselines import BASELINES, BaselineScorer, baseline_of

REPO = Path(__file__).resolve().parents[1]
FOLDER = os.environ.get("CONTRASTRM_EXTERNAL_DATA", "")
QUESTION = [{"role": "user", "content": "why?"}]


def scores_of(name: str, *answers: str, seed: int = 42) -> list[float]:
    return BaselineScorer(name, seed).score([Conversation(QUESTION, answer) for answer in answers]).scores.tolist()


def test_scores_by_hand() -> None:
    answers = ("four", "ünïcödé", "", "four")
    assert scores_of("constant", *answers) == [0, 0, 0, 0]
    assert scores_of("longer", *answers) == [4, 7, 0, 4]
    assert scores_of("shorter", *answers) == [-4, -7, 0, -4]
    drawn = scores_of("random", *answers)
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    assert drawn == scores_of("random", *answers) != scores_of("random", *answers, seed=1)
    assert BaselineScorer("longer").score([]).scores.shape == (0,)


def test_random_scores_are_uniform_and_depend_on_the_prompt() -> None:
    drawn = np.array(scores_of("random", *(f"answer {number}" for number in range(4000))))
    assert abs(drawn.mean() - 0.5) < 0.02 and abs(drawn.std() - 12**-0.5) < 0.01
    assert drawn.min() >= 0 and drawn.max() < 1
    other = Conversation([{"role": "user", "content": "how?"}], "four")
    assert BaselineScorer("random").score([other]).scores[0] != scores_of("random", "four")[0]


def test_names() -> None:
    assert baseline_of("baseline:shorter") == "shorter"
    assert baseline_of("output/baseline") is None
    for name in BASELINES:
        assert baseline_of(f"baseline:{name}") == name
    with pytest.raises(ContrastRMError, match=r"unknown baseline 'shortest'; known: baseline:constant"):
        baseline_of("baseline:shortest")
    with pytest.raises(ContrastRMError, match="unknown baseline 'none'"):
        BaselineScorer("none")
    identities = [BaselineScorer(name).identity for name in BASELINES]
    assert len(set(identities)) == len(BASELINES)
    assert BaselineScorer("random", 1).identity != BaselineScorer("random", 2).identity
    assert BaselineScorer("shorter", 1).identity == BaselineScorer("shorter", 2).identity


def count_from_files(folder: Path, sign: int) -> dict[str, Any]:
    """What "the shorter wins" (-1) or "the longer wins" (+1) makes of the files, from the public format alone."""
    counts = {"n": 0, "right_before": 0, "right_after": 0, "flipped": 0}
    for name in PAIRWISE:
        for line in (folder / eval_file_name(name)).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            better, other = ("1", "2") if row["label"] == "response1" else ("2", "1")
            before = sign * (len(row[f"original_response{better}"]) - len(row[f"original_response{other}"]))
            after = sign * (len(row[f"rewritten_response{better}"]) - len(row[f"rewritten_response{other}"]))
            counts["n"] += 1
            counts["right_before"] += before > 0
            counts["right_after"] += after > 0
            counts["flipped"] += before > 0 and after < 0
    return counts


def run_all_biases(model: str, data_dir: Path, results: Path) -> dict[str, Any]:
    arguments = ["--model_path", model, "--data_dir", str(data_dir), "--results_dir", str(results)]
    assert eval_rm.main(arguments) == 0
    folder = results / model.replace("baseline:", "baseline-")
    summary: dict[str, Any] = json.loads((folder / "bias_summary.json").read_text(encoding="utf-8"))
    return summary


def check_against_files(summary: dict[str, Any], folder: Path) -> None:
    for name, sign in (("shorter", -1), ("longer", 1)):
        expected = count_from_files(folder, sign)
        pooled = summary["baselines"][name]["overall"]
        assert pooled["n_pairs"] == expected["n"]
        assert pooled["original_pair_accuracy_count"] == expected["right_before"]
        assert pooled["biased_pair_accuracy_count"] == expected["right_after"]
        assert pooled["bias_sensitivity_rate_count"] == expected["flipped"]
        assert pooled["bias_sensitivity_rate_total"] == expected["right_before"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_all_biases("baseline:shorter", REPO / "data/eval", tmp_path_factory.mktemp("own"))


def test_shorter_and_longer_equal_a_count_of_the_own_files(own: dict[str, Any]) -> None:
    check_against_files(own, REPO / "data/eval")


def test_as_a_model_and_beside_a_model_a_baseline_has_the_same_figures(own: dict[str, Any]) -> None:
    beside = own["baselines"]["shorter"]
    for name, fields in own["biases"].items():
        assert beside["biases"][name] == {key: fields[key] for key in beside["biases"][name]}
    assert beside["overall"] == {key: own["overall"][key] for key in beside["overall"]}
    assert own["clean"]["n_flagged"] == dict.fromkeys(own["biases"], 0)
    assert own["metadata"]["model_path"].startswith("baseline-shorter")


def test_constant_gives_null(own: dict[str, Any]) -> None:
    constant = own["baselines"]["constant"]
    for fields in (constant["overall"], *(constant["biases"][name] for name in PAIRWISE)):
        assert fields["bias_sensitivity_rate"] is None
        assert fields["bias_sensitivity_rate_ci"] is None
        assert fields["original_pair_accuracy"] == 0
        assert fields["n_original_ties"] == fields["n_biased_ties"] == fields["n_pairs"]
    assert constant["overall"]["macro_bias_sensitivity_rate"] is None
    assert constant["biases"]["refinement-aware"]["verdict_change_rate"] == 0


def test_random_is_about_chance(own: dict[str, Any]) -> None:
    pooled = own["baselines"]["random"]["overall"]
    low, high = pooled["original_pair_accuracy_ci"]
    assert low < 0.5 < high and pooled["n_original_ties"] == 0


@pytest.mark.skipif(not FOLDER, reason="CONTRASTRM_EXTERNAL_DATA is not set: no public files to count")
def test_the_shorter_wins_on_the_public_files(tmp_path: Path) -> None:
    """The published trap: a low bias rate without any sense. On all public files 5.8 % at 32 % accuracy."""
    folder = Path(FOLDER) / "judgebias_dev"
    summary = run_all_biases("baseline:shorter", folder, tmp_path)
    check_against_files(summary, folder)
    assert round(summary["overall"]["bias_sensitivity_rate"], 3) == 0.058
    assert round(summary["overall"]["original_pair_accuracy"], 2) == 0.32
    # Counted once and for all: real files, real defects.
    found = {kind for kinds in summary["metadata"]["data_defects"].values() for kind in kinds}
    assert found == {"suspected_preamble", "suspected_meta_talk", "repeated_row", "unchanged"}
    assert summary["clean"]["n_flagged"]["refinement-aware"] == 31
    assert summary["clean"]["overall"]["n_pairs"] == summary["overall"]["n_pairs"] - 48


def test_reward_bench_takes_a_baseline(tmp_path: Path) -> None:
    data = REPO / "data/eval/reward_bench/own_sample.jsonl"
    arguments = ["--model_path", "baseline:longer", "--data_file", str(data), "--results_dir", str(tmp_path)]
    assert eval_reward_bench.main(arguments) == 0
    summary = json.loads((tmp_path / "baseline-longer" / "reward_bench_summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    right = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert (summary["weighted_average_accuracy_count"], summary["weighted_average_accuracy_total"]) == (
        right,
        len(rows),
    )
