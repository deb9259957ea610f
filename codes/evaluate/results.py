"""The results folders of evaluated models: whose they are, what they hold, and what makes two of them not comparable.

Reads ``bias_summary.json``, ``bias_<bias>.jsonl``, ``reward_bench_summary.json`` and the summaries of other benchmarks; any
of them may be absent, and what a summary must have is checked. Writes ``model.json``, which says whose results lie in a folder.

    python -m pytest tests/test_report.py -k broken
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codes.common.biases import EVALUABLE, PAIRWISE, eval_file_name
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import ReadReport, ensure_writable_folder, file_sha256, iter_jsonl, write_json
from codes.common.reporting import run_metadata
from codes.common.scores import Invariance, ScoreResult
from codes.evaluate.api import LoadedScorer
from codes.evaluate.benchmarks import BENCHMARKS, REWARD_BENCH

MODEL_FILE = "model.json"
BIAS_SUMMARY = "bias_summary.json"
# Where two runs of the same evaluation may differ: times, and what a killed run had already done.
RUN_FIELDS = ("created_utc", "wall_seconds", "n_computed_tokens", "n_from_store", "score_store", "n_processes")
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


# --- whose they are, and how they came about ---


def model_results_folder(results_dir: str | Path, model_path: str, weight_hash: str) -> Path:
    """The results folder of one model: ``<results_dir>/<name of the model folder>``.

    Where that folder holds the results of other weights (its ``model.json`` says whose), the first eight
    digits of the weight hash are added. ``model.json`` is written.

    Raises:
        ContrastRMError: The folder cannot be made or written, or its ``model.json`` cannot be read.
    """
    name = Path(model_path).resolve().name if Path(model_path).exists() else Path(model_path).name
    folder, owner = Path(results_dir) / name, {"model_path": model_path, "weight_hash": weight_hash}
    if not folder.exists():
        _make_claimed(folder, owner)
    if not _is_free_for(folder, weight_hash):
        folder = Path(results_dir) / f"{name}-{weight_hash[:8]}"
    ensure_writable_folder(folder)
    write_json(folder / MODEL_FILE, owner)
    return folder


def _make_claimed(folder: Path, owner: Mapping[str, str]) -> None:
    """Make a folder that says whose it is from its first moment on: two evaluations of a model may begin at once.

    Where another process was faster, its folder stays.
    """
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        made.mkdir(parents=True)
        write_json(made / MODEL_FILE, owner)
        made.rename(folder)
    except (OSError, ContrastRMError):
        # What cannot be written is said where the folder is needed.
        shutil.rmtree(made, ignore_errors=True)


def _is_free_for(folder: Path, weight_hash: str) -> bool:
    owner = folder / MODEL_FILE
    if not owner.exists():
        # Results that do not say whose they are are somebody else's.
        return not folder.is_dir() or not any(folder.iterdir())
    try:
        return bool(json.loads(owner.read_text(encoding="utf-8"))["weight_hash"] == weight_hash)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContrastRMError(
            f"cannot read {owner}: {error}; move {folder} away or choose another --results_dir"
        ) from error


def result_metadata(
    loaded: LoadedScorer, result: ScoreResult, reports: Iterable[ReadReport], seed: int
) -> dict[str, Any]:
    """What a summary says of its making (DESIGN: model, data, versions, cost)."""
    return {
        **loaded.description,
        "data_files": [
            {
                "path": report.path,
                "sha256": file_sha256(report.path),
                "n_rows": report.n_rows,
                "n_bad_rows": len(report.bad),
                "bad_rows": report.bad,
            }
            for report in reports
        ],
        "seed": seed,
        "wall_seconds": result.seconds,
        "n_texts": result.n_texts,
        "n_distinct_texts": result.n_distinct,
        "n_truncated_texts": result.n_truncated,
        "n_answer_cut_texts": result.n_answer_cut,
        "n_dropped_texts": result.n_dropped,
        "n_tokens": result.n_tokens,
        "n_computed_tokens": result.n_computed_tokens,
        "n_from_store": result.n_from_store,
        "n_tied_texts": result.n_tied_texts,
        "refused_rows": list(result.refused),
        "equal_rows": list(result.equal_rows),
        "invariance": None if result.invariance is None else asdict(result.invariance),
        **run_metadata(),
    }


def scoring_notes(result: ScoreResult) -> list[str]:
    """Sentences for the console: what came from the store, ties, cut texts, and whether a text's company matters."""
    notes = []
    if result.n_from_store is not None:
        n_computed = result.n_distinct - result.n_from_store
        notes.append(
            f"score store: {result.n_from_store} of {result.n_distinct} distinct texts found, {n_computed} computed"
        )
    if result.n_tied_texts:
        notes.append(f"{result.n_tied_texts} of {result.n_distinct} distinct texts share their score with another one")
    if result.n_truncated:
        notes.append(f"{result.n_truncated} of {result.n_texts} texts were cut, {result.n_answer_cut} in the answer")
    notes += [f"bad row left out: {message}" for message in result.refused]
    if result.equal_rows:
        shown = ", ".join(result.equal_rows[:5]) + (", ..." if len(result.equal_rows) > 5 else "")
        notes.append(
            f"{len(result.equal_rows)} rows compare answers that are the same to the model once they are rendered and cut, and "
            f"count as ties: {shown}; look at the chat template and --max_length"
        )
    if result.n_dropped:
        notes.append(f"{result.n_dropped} of {result.n_texts} texts were dropped; their pairs are excluded")
    return notes + _invariance_notes(result.invariance)


def _invariance_notes(found: Invariance | None) -> list[str]:
    if found is None:
        return []
    spread = f" ({found.max_difference / found.score_sd:.1e} of the scores' SD)" if found.score_sd else ""
    note = f"{found.n_texts} texts scored again alone differ by at most {found.max_difference:.1e}{spread}"
    if found.is_rounding:
        return [note]
    cure = "look at python -m codes.evaluate.doctor, or use --packing off --score_store none"
    return [f"WARNING: {note}, more than rounding explains: scores depend on their batch; {cure}"]


def json_score(score: float) -> float | None:
    """A score as JSON has it: None where the text was dropped (JSON knows no NaN)."""
    return None if score != score else float(score)


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
