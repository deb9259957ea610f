"""Load RewardBench, RewardBench 2, RM-Bench or JudgeBench from the Hugging Face hub and keep it as JSONL.

Reads the dataset on the hub (network or a filled cache needed), or a copy of its files (``--local_files``: Parquet or
JSONL in the hub's schema). Writes ``--output_file`` and beside it ``<output_file>.source.json``: dataset, split, the
revision that was resolved, and the hash that ties the note to the file. ``codes.evaluate.eval_reward_bench`` calls its
figures by the benchmark's name only where that note is there.

    PYTHONPATH=. python data/eval/reward_bench/load_reward_bench.py
    DATA_FILE=data/eval/reward_bench/reward_bench.jsonl bash run_evaluation_rewardbench.sh
    PYTHONPATH=. python data/eval/reward_bench/load_reward_bench.py --dataset reward_bench_2
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codes.common.cli import run
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import (
    ensure_writable_folder,
    file_sha256,
    iter_rows,
    write_json,
    write_jsonl,
)
from codes.evaluate.benchmarks import BENCHMARKS, REWARD_BENCH, read_benchmark

# What is kept of a row. Whatever else the datasets hold is of no use here.
FIELDS: dict[str, tuple[str, ...]] = {
    REWARD_BENCH: ("id", "prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"),
    "reward_bench_2": (
        *("id", "prompt", "chosen", "rejected", "num_correct", "num_incorrect", "total_completions"),
        *("models", "subset"),
    ),
    "rm_bench": ("id", "prompt", "chosen", "rejected", "domain"),
    "judgebench": (
        *("pair_id", "original_id", "source", "question", "response_model"),
        *("response_A", "response_B", "label"),
    ),
}
HUB_SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    name: (BENCHMARKS[name].dataset_id, BENCHMARKS[name].splits) for name in FIELDS
}
SOURCE_NOT_CHECKED = "as given, not checked"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Load a preference benchmark and keep it as JSONL.")
    parser.add_argument("--dataset", default=REWARD_BENCH, choices=tuple(HUB_SOURCES))
    parser.add_argument("--split", default=None, help="default: the one with the official rows")
    parser.add_argument(
        "--output_file",
        default=None,
        help="default: data/eval/reward_bench/<dataset>.jsonl (JudgeBench: and the split)",
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit; of local files: what to note down")
    parser.add_argument("--local_files", type=Path, nargs="+", help="a copy of the hub's files: Parquet or JSONL")
    return parser


def load_from_hub(dataset_id: str, split: str, revision: str) -> tuple[list[dict[str, Any]], str]:
    """The rows and the commit that ``revision`` stands for.

    Raises:
        ContrastRMError: The hub cannot be reached, or has no such dataset, split or revision.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset_id, revision=revision).sha
        rows = list(load_dataset(dataset_id, split=split, revision=commit))
    # Every layer below has its own family of network errors; all of them mean the same to the user.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ContrastRMError(
            f"cannot load {dataset_id} ({split}, revision {revision}) from the hub: {reason}; check the network and "
            "HF_HUB_OFFLINE, give a copy of its files with --local_files, or evaluate a file of your own with --data_file"
        ) from error
    return rows, str(commit)


def load_local(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of local files, one file after the other.

    Raises:
        ContrastRMError: A file is missing, is no such file, or holds something else than objects.
    """
    rows = []
    for path in files:
        for _, row in iter_rows(path):
            if isinstance(row, RecordError):
                raise row
            rows.append(row)
    return rows


def to_rows(dataset: str, loaded: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the fields that are kept.

    Raises:
        ContrastRMError: A field is missing.
    """
    rows = []
    for number, row in enumerate(loaded, start=1):
        missing = [name for name in FIELDS[dataset] if row.get(name) is None]
        if missing:
            raise ContrastRMError(
                f"row {number} of {HUB_SOURCES[dataset][0]} lacks {', '.join(missing)}; the dataset has changed: "
                "choose an older --revision"
            )
        rows.append({name: row[name] for name in FIELDS[dataset]})
    return rows


def check_rows(dataset: str, split: str, path: Path) -> None:
    """Read the rows as the evaluation will, and count them.

    Raises:
        ContrastRMError: A row breaks its format, a subset is unknown, or one has not the official number of rows.
    """
    dataset_id, _ = HUB_SOURCES[dataset]
    items, _ = read_benchmark(path, dataset)
    counts, official = Counter(item.subset for item in items), dict(BENCHMARKS[dataset].subsets)
    if split in BENCHMARKS[dataset].totals:
        counts, official = Counter({split: len(items)}), {split: BENCHMARKS[dataset].totals[split]}
    wrong = [f"{name}: {counts[name]}, not {n_rows}" for name, n_rows in official.items() if counts[name] != n_rows]
    if wrong:
        raise ContrastRMError(f"{dataset_id} has other row counts than published: {'; '.join(wrong)}")


def main(argv: list[str] | None = None) -> int:
    """Load, check, write."""
    args = build_parser().parse_args(argv)
    dataset_id, splits = HUB_SOURCES[args.dataset]
    split = args.split or splits[0]
    name = args.dataset if split == splits[0] else f"{args.dataset}_{split}"
    output_file = Path(args.output_file or f"data/eval/reward_bench/{name}.jsonl")
    if args.local_files:
        loaded, commit = load_local(args.local_files), args.revision
    else:
        loaded, commit = load_from_hub(dataset_id, split, args.revision or "main")
    rows = to_rows(args.dataset, loaded)
    with tempfile.TemporaryDirectory(dir=ensure_writable_folder(output_file.parent), prefix=".fetch-") as folder:
        # Under the name that it will have: error messages name rows of it.
        unchecked = Path(folder) / output_file.name
        write_jsonl(unchecked, rows)
        check_rows(args.dataset, split, unchecked)
    write_jsonl(output_file, rows)
    note = {
        "dataset": dataset_id,
        "split": split,
        "revision": commit,
        "n_rows": len(rows),
        "sha256": file_sha256(output_file),
    }
    if args.local_files:
        files = [{"name": path.name, "sha256": file_sha256(path)} for path in args.local_files]
        note |= {"revision_is": SOURCE_NOT_CHECKED, "local_files": files}
    write_json(f"{output_file}.source.json", note)
    print(f"{output_file}: {len(rows)} rows of {dataset_id} at {commit}")
    return 0


if __name__ == "__main__":
    run(main)
