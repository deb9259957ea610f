"""What the results folders of evaluated models hold, and what makes two of them not comparable.

Reads ``bias_summary.json``, ``bias_<bias>.jsonl``, ``reward_bench_summary.json`` and the summaries of other benchmarks; any
of them may be absent, and what a summary must have is checked. Writes nothing.

    python -m pytest tests/test_report.py -k broken
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codes.common.biases import EVALUABLE, PAIRWISE, eval_file_name
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import iter_jsonl
from codes.evaluate.benchmarks import BENCHMARKS, REWARD_BENCH

BIAS_SUMMARY = "bias_summary.json"
REFINEMENT = "refinement-aware"
# What every summary has had from the first version on; anything else may be missing and is then named.
PAIR_FIELDS = ("n_pairs", "n_excluded", "n_original_ties", "n_biased_ties", "original_pair_accuracy",
               "biased_pair_accuracy", "bias_sensitivity_rate")  # fmt: skip
REFINEMENT_FIELDS = (
    "n_items",
    "n_excluded",
    "verdict_change_rate",
    "original_to_refined",
    "refined_to_original",
    "score_shift",
)
REWARD_BENCH_FIELDS = ("label", "sections", "subsets", "rewardbench_score", "weighted_average_accuracy")
BENCHMARK_FIELDS = ("label", "headline", "n_rows", "n_excluded", "n_ties", "complete", "subsets")

# Whatever of these differs between two models, the figures are not of the same measurement.
SETTINGS = (
    "seed", "dtype", "limit_per_bias", "placebo_sentence", "placebo_source", "refinement_request", "overlength", "max_length",
    "prompt_version", "temperature", "max_new_tokens"
)  # fmt: skip

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class ModelRows:
    """The rows of one bias of one model, and the evaluation file that they were made from."""

    model: str
    bias: str
    rows: Sequence[Mapping[str, Any]]
    path: Path
    data_file: str
    sha256: str
    n_bad_rows: int
    score_sd: float | None


def read_model_rows(model: str, folder: Path, summary: Mapping[str, Any]) -> list[ModelRows]:
    """The rows of every bias of a summary whose rows file is there.

    Raises:
        ContrastRMError: A rows file is broken.
    """
    files = {Path(str(file["path"])).name: file for file in summary["metadata"].get("data_files", [])}
    found = []
    for bias in (name for name in EVALUABLE if name in summary["biases"]):
        path = folder / f"bias_{bias}.jsonl"
        if not path.is_file():
            continue
        rows = []
        for line, row in iter_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("line"), int) or "question" not in row:
                raise RecordError(path, line, "line", row, "a row of results; evaluate the model again")
            rows.append(row)
        file = files.get(eval_file_name(bias), {})
        fields = summary["biases"][bias]
        deviation = (
            summary.get("score_sd") or fields.get("score_sd") or (fields.get("score_gap_shift") or {}).get("score_sd")
        )
        place = str(file.get("path", "")), str(file.get("sha256", ""))
        found.append(ModelRows(model, bias, rows, path, *place, int(file.get("n_bad_rows", 0)), deviation))
    return found


def rows_file_missing(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """The biases of a summary whose rows file has gone."""
    return [name for name in EVALUABLE if name in summary["biases"] and not (folder / f"bias_{name}.jsonl").is_file()]


@dataclass(frozen=True)
class ModelResults:
    """What the results folder of one model holds. ``rows``: by bias; ``benchmarks``: by format."""

    name: str
    folder: Path
    bias: Summary | None
    reward_bench: Summary | None
    rows: Sequence[ModelRows]
    benchmarks: Mapping[str, Summary]

    @property
    def metadata(self) -> Summary:
        """How the figures were made: those of the bias evaluation where there is one."""
        return self.summaries[0][1]["metadata"]

    @property
    def summaries(self) -> list[tuple[str, Summary]]:
        """Every summary, and what it is of."""
        named = [("biases", self.bias), ("RewardBench rows", self.reward_bench)]
        named += [(BENCHMARKS[name].title, summary) for name, summary in self.benchmarks.items()]
        return [(name, summary) for name, summary in named if summary is not None]

    def rows_of(self, bias: str) -> ModelRows | None:
        """The rows of one bias."""
        return next((some for some in self.rows if some.bias == bias), None)


def read_summary(path: Path) -> dict[str, Any] | None:
    """A summary as it was written; None where it is not there.

    Raises:
        ContrastRMError: The file is not a summary.
    """
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContrastRMError(f"cannot read {path}: {error}; evaluate the model again") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("metadata"), dict):
        raise ContrastRMError(f"{path} is not a results summary; evaluate the model again")
    return summary


def _read_bias_summary(path: Path) -> dict[str, Any] | None:
    summary = read_summary(path)
    if summary is None:
        return None
    if not isinstance(summary.get("biases"), dict):
        raise ContrastRMError(f"{path}: field 'biases': found no object; evaluate the model again")
    for name, fields in summary["biases"].items():
        needed = REFINEMENT_FIELDS if name == REFINEMENT else PAIR_FIELDS if name in PAIRWISE else ()
        _require(path, f"biases.{name}", fields, needed)
    return summary


def _read_benchmark_summary(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}_summary.json"
    summary = read_summary(path)
    if summary is not None and name == REWARD_BENCH:
        _require(path, "the summary", summary, REWARD_BENCH_FIELDS)
    elif summary is not None:
        _require(path, "the summary", summary, BENCHMARK_FIELDS)
        _require(path, "the summary", summary, [summary["headline"]])
    return summary


def _require(path: Path, place: str, fields: Any, needed: Sequence[str]) -> None:
    missing = [name for name in needed if not isinstance(fields, dict) or name not in fields]
    if missing:
        raise ContrastRMError(f"{path}: {place} has no {', '.join(missing)}; evaluate the model again")


def read_results(folders: Sequence[Path]) -> list[ModelResults]:
    """The results of every folder, in the order given; a model is called after its folder.

    Raises:
        ContrastRMError: A folder is given twice, or holds no summary, or a file in it is broken.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ContrastRMError(f"a results folder is given twice: {' '.join(map(str, folders))}")
    names = [folder.resolve().name for folder in folders]
    results = []
    for folder, name in zip(folders, names, strict=True):
        bias = _read_bias_summary(folder / BIAS_SUMMARY)
        reward_bench = _read_benchmark_summary(folder, REWARD_BENCH)
        benchmarks = {
            key: summary
            for key in BENCHMARKS
            if key != REWARD_BENCH and (summary := _read_benchmark_summary(folder, key))
        }
        if bias is None and reward_bench is None and not benchmarks:
            raise ContrastRMError(
                f"no {BIAS_SUMMARY} and no {REWARD_BENCH}_summary.json in {folder}; "
                "run codes.evaluate.eval_rm or codes.evaluate.eval_reward_bench on that model first"
            )
        unique = name if names.count(name) == 1 else str(folder)
        rows = read_model_rows(unique, folder, bias) if bias is not None else []
        results.append(ModelResults(unique, folder, bias, reward_bench, rows, benchmarks))
    return results


# --- are they comparable? ---


def differences(results: Mapping[str, Summary]) -> list[str]:
    """What makes the figures of the models not comparable: other data, other settings."""
    found: list[str] = []
    for name, summary in results.items():
        first_name, first = next(iter(results.items()))
        hashes, others = data_hashes(summary), data_hashes(first)
        other_files = [file for file in sorted(hashes.keys() | others.keys()) if hashes.get(file) != others.get(file)]
        if other_files:
            found.append(f"{name} and {first_name} were not evaluated on the same files: {', '.join(other_files)}")
        if _is_judge(summary) != _is_judge(first):
            kinds = [f"{which} is a {'judge of pairs' if _is_judge(some) else 'model that scores texts'}"
                     for which, some in ((name, summary), (first_name, first))]  # fmt: skip
            found.append(f"{' and '.join(kinds)}: ties and lengths come about in other ways")
            continue
        for key in SETTINGS:
            if summary["metadata"].get(key) != first["metadata"].get(key):
                values = f"{summary['metadata'].get(key)!r} and {first['metadata'].get(key)!r}"
                found.append(f"{name} and {first_name} differ in {key}: {values}")
    return found


def _is_judge(summary: Summary) -> bool:
    return "prompt_version" in summary["metadata"]


def data_hashes(summary: Summary) -> dict[str, str]:
    """By the file's name; LLMBar's files all have the same one, and are told apart by their folders."""
    files = [(Path(file["path"]), file["sha256"]) for file in summary["metadata"].get("data_files", ())]
    counts = Counter(path.name for path, _ in files)
    return {path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}": sha for path, sha in files}
