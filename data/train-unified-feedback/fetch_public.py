"""Make preference records of a public set, from the Hugging Face hub or from a local copy of its files.

Reads ``llm-blender/Unified-Feedback`` or ``NiuTrans/GRAM-fine-tuning-65k`` (from the hub: network needed; ``--local_files``:
JSONL or Parquet in the hub's schema). Writes JSONL to ``--output_file`` and beside it ``<output_file>.meta.json``: the revision
that was resolved, or the hashes of the local files, how many rows were read, and how many were skipped and why. Rows are read
one by one; both files appear when all went well. Examples:

``python data/train-unified-feedback/fetch_public.py --dataset gram --output_file output/gram.jsonl``

``python data/train-unified-feedback/fetch_public.py --dataset unified-feedback --local_files train-*.parquet --limit 65000
--seed 1 --output_file output/unified.jsonl``

``--limit`` alone takes the first records; with ``--seed`` those with the smallest hash of seed and id: a sample of the whole
set that does not hang on the order of its rows, and that only grows when the limit is raised.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import importlib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from codes.common.cli import run
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import Message, file_sha256, iter_jsonl, open_atomic, parse_preference_row, write_json

ROLES = ("system", "user", "assistant")
LOCAL_FORMATS = (".jsonl", ".json", ".parquet")
# Rows of a Parquet file that are in memory at a time: some megabytes.
PARQUET_BATCH = 512


class SkipRow(Exception):
    """A row that cannot become a record; the text is the reason class that is counted."""


@dataclass(frozen=True)
class Source:
    """A public set: where it is, the columns it must have, and how one row becomes a record."""

    repo_id: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where the rows come from.

    Attributes:
        rows: (where a row stands, for messages; the row).
        revision: Commit of the hub, or what the user says of local files.
        local_files: Name and hash of each local file; None for the hub.
    """

    rows: Iterable[tuple[str, dict[str, Any]]]
    revision: str | None
    local_files: list[dict[str, str]] | None = None


@dataclass
class Counts:
    """What became of the rows: ``n_rows`` = ``n_usable`` + all of ``skipped``."""

    n_rows: int = 0
    n_usable: int = 0
    n_written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


# --- one row ------------------------------------------------------------------------------------------------------------


def _turns(value: Any) -> list[Message]:
    if not isinstance(value, list) or len(value) < 2:
        raise SkipRow("no_conversation")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise SkipRow("malformed_turn")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if turns[-1]["role"] != "assistant" or turns[-2]["role"] != "user":
        raise SkipRow("does_not_end_with_an_answer")
    return turns


def parse_unified_feedback(row: dict[str, Any]) -> dict[str, Any]:
    """One row of ``llm-blender/Unified-Feedback``: two conversations; the higher rating is chosen.

    Raises:
        SkipRow: Ratings missing or equal, prompts that differ, or texts missing.
    """
    turns_a, turns_b = _turns(row["conv_A"]), _turns(row["conv_B"])
    if turns_a[:-1] != turns_b[:-1]:
        raise SkipRow("prompts_differ")
    ratings = row["conv_A_rating"], row["conv_B_rating"]
    if any(isinstance(rating, bool) or not isinstance(rating, int | float) or rating != rating for rating in ratings):
        raise SkipRow("no_rating")
    if ratings[0] == ratings[1]:
        raise SkipRow("equal_ratings")
    answers = turns_a[-1]["content"], turns_b[-1]["content"]
    better = 0 if ratings[0] > ratings[1] else 1
    source = row.get("source") if isinstance(row.get("source"), str) else None
    return _record(turns_a[:-1], answers, better, prefix="unified-feedback", source=source)


_GRAM_FIELDS = re.compile(
    r"\[User Question\]\s*(?P<question>.*?)\s*"
    r"\[The Start of Assistant A's Answer\]\s*(?P<a>.*?)\s*\[The End of Assistant A's Answer\]\s*"
    r"\[The Start of Assistant B's Answer\]\s*(?P<b>.*?)\s*\[The End of Assistant B's Answer\]",
    re.DOTALL,
)
_GRAM_MARKERS = (
    "[User Question]",
    "[The Start of Assistant A's Answer]",
    "[The End of Assistant A's Answer]",
    "[The Start of Assistant B's Answer]",
    "[The End of Assistant B's Answer]",
)


def parse_gram(row: dict[str, Any]) -> dict[str, Any]:
    """One row of ``NiuTrans/GRAM-fine-tuning-65k``: a judge prompt and the better letter.

    Raises:
        SkipRow: The markers are missing or occur inside a text, or the label is neither A nor B.
    """
    instruction, output = row["instruction"], row["output"]
    if not isinstance(instruction, str):
        raise SkipRow("no_instruction")
    # Twice the same marker means that a text quotes the format: where it ends would be a guess.
    if any(instruction.count(marker) > 1 for marker in _GRAM_MARKERS):
        raise SkipRow("markers_repeated")
    found = _GRAM_FIELDS.search(instruction)
    if found is None:
        raise SkipRow("markers_missing")
    label = output.strip() if isinstance(output, str) else ""
    if label not in ("A", "B"):
        raise SkipRow("no_label")
    messages = [{"role": "user", "content": found["question"]}]
    return _record(messages, (found["a"], found["b"]), "AB".index(label), prefix="gram", source="GRAM-fine-tuning-65k")


def _record(
    messages: list[Message], answers: tuple[str, str], better: int, *, prefix: str, source: str | None
) -> dict[str, Any]:
    chosen, rejected = answers[better].strip(), answers[1 - better].strip()
    if not all(message["content"].strip() for message in messages):
        raise SkipRow("empty_prompt")
    if not chosen or not rejected:
        raise SkipRow("empty_answer")
    if chosen == rejected:
        raise SkipRow("equal_answers")
    # The sets' own ids are not unique over their parts; the content is.
    content = json.dumps([messages, chosen, rejected], ensure_ascii=False)
    try:
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise SkipRow("not_unicode") from None
    prompt: dict[str, Any] = {"question": messages[0]["content"]} if len(messages) == 1 else {"messages": messages}
    record = {"id": f"{prefix}-{digest}"} | prompt
    record |= {"chosen": chosen, "rejected": [rejected], "bias_type": [None]} | ({"source": source} if source else {})
    try:
        # What the training and construction would refuse is no record.
        parse_preference_row(Path(prefix), 0, record)
    except RecordError as error:
        raise SkipRow(f"breaks_the_contract_in_{error.field.split('[')[0]}") from None
    return record


SOURCES = {
    "unified-feedback": Source(
        "llm-blender/Unified-Feedback",
        "all",
        "train",
        ("conv_A", "conv_B", "conv_A_rating", "conv_B_rating"),
        parse_unified_feedback,
    ),
    "gram": Source("NiuTrans/GRAM-fine-tuning-65k", None, "train", ("instruction", "output"), parse_gram),
}


def parse_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], source: Source, counts: Counts, *, n_wanted: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield a record for each row that can become one; equal records once.

    Args:
        rows: Where a row stands, and the row.
        source: The set.
        counts: Gets what was read and skipped.
        n_wanted: Stop after so many records; 0: never.

    Raises:
        ContrastRMError: A column is missing: the set has changed, or it is another one.
    """
    # Digests of eight bytes: a million of them take some 60 MB, the records would take gigabytes.
    seen: set[int] = set()
    for place, row in rows:
        missing = [column for column in source.columns if column not in row]
        if missing:
            found = ", ".join(sorted(row)) or "nothing"
            raise ContrastRMError(
                f"{place}: no field {', '.join(missing)}; found {found}: these are not rows of {source.repo_id}, or the set "
                "has changed; choose an older --revision, or other --local_files"
            )
        counts.n_rows += 1
        try:
            record = source.parse(row)
            key = int(record["id"].rsplit("-", 1)[1], 16)
            if key in seen:
                raise SkipRow("duplicate")
        except SkipRow as reason:
            counts.skipped[str(reason)] += 1
            continue
        seen.add(key)
        counts.n_usable += 1
        yield record
        if counts.n_usable == n_wanted:
            return


# --- where rows come from -----------------------------------------------------------------------------------------------


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises without a network: it lets its HTTP library's own errors through."""
    found = [name for name in ("httpx", "httpx2", "aiohttp") if importlib.util.find_spec(name)]
    return tuple(
        getattr(importlib.import_module(name), "HTTPError" if name != "aiohttp" else "ClientError") for name in found
    )


def open_hub(source: Source, revision: str | None) -> Origin:
    """Rows of a set at one resolved commit, read from the hub as they are needed.

    Raises:
        ContrastRMError: The hub cannot be reached, or the set, configuration, split or revision is not there.
    """
    # Here and not above: parsing and local files need neither.
    import datasets
    import huggingface_hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    errors = (OSError, ValueError, HfHubHTTPError, DatasetsError, *_transport_errors())

    def unreachable(error: Exception) -> ContrastRMError:
        reason = " ".join(str(error).split())[:200]
        return ContrastRMError(
            f"cannot load {source.repo_id} from the hub: {reason}; check the network (and HF_HUB_OFFLINE), --revision and, "
            "for a set behind a licence, HF_TOKEN; or give a copy of its files with --local_files"
        )

    try:
        resolved = huggingface_hub.HfApi().dataset_info(source.repo_id, revision=revision).sha
        if resolved is None:
            raise ContrastRMError(f"the hub names no commit for {source.repo_id}; give one with --revision")
        rows = datasets.load_dataset(
            source.repo_id, source.config, split=source.split, revision=resolved, streaming=True
        )
    except errors as error:
        raise unreachable(error) from error

    def numbered() -> Iterator[tuple[str, dict[str, Any]]]:
        remaining = iter(rows)
        number = 0
        while True:
            number += 1
            try:
                row = next(remaining)
            except StopIteration:
                return
            except errors as error:
                raise unreachable(error) from error
            yield f"{source.repo_id} row {number}", row

    return Origin(numbered(), resolved)


def open_local(files: Sequence[Path], revision: str | None) -> Origin:
    """Rows of local files in the hub's schema, one file after the other.

    Args:
        files: JSONL (``.json`` too, one object a line) or Parquet.
        revision: What the user knows about them; it is noted down and not checked.

    Raises:
        ContrastRMError: A file is missing, or is of another kind.
    """
    for path in files:
        if not path.is_file():
            raise ContrastRMError(f"file not found: {path}; check --local_files")
        if path.suffix not in LOCAL_FORMATS:
            raise ContrastRMError(f"{path}: unknown kind of file; --local_files takes {', '.join(LOCAL_FORMATS)}")
    names = [{"file": path.name, "sha256": file_sha256(path)} for path in files]
    return Origin((row for path in files for row in _local_rows(path)), revision, names)


def _local_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for line, row in iter_jsonl(path):
        if not isinstance(row, dict):
            raise RecordError(path, line, "-", row, "one JSON object a line (a JSON array is not read)")
        yield f"{path}:{line}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Comes with datasets.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ContrastRMError(f"{path}: not a readable Parquet file ({reason}); fetch it again") from error


# --- writing ------------------------------------------------------------------------------------------------------------


def sample_key(record_id: str, seed: int) -> int:
    """A number that stands for a record in a seeded order of all records."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{record_id}".encode()).digest()[:8])


def _write(handle: IO[str], record: dict[str, Any], counts: Counts) -> None:
    handle.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    counts.n_written += 1


def _write_sample(
    records: Iterable[dict[str, Any]], handle: IO[str], counts: Counts, folder: Path, *, limit: int, seed: int
) -> None:
    """Write the ``limit`` records with the smallest ``sample_key``, in the order of the set.

    The records wait in a file: only the keys of the sample are in memory.
    """
    largest: list[int] = []  # a heap of negated keys, so that the largest one is on top
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as waiting:
        for record in records:
            key = sample_key(record["id"], seed)
            if len(largest) < limit:
                heapq.heappush(largest, -key)
            elif key < -largest[0]:
                heapq.heapreplace(largest, -key)
            else:
                continue
            waiting.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        wanted = {-key for key in largest}
        waiting.seek(0)
        for line in waiting:
            record = json.loads(line)
            if sample_key(record["id"], seed) in wanted:
                _write(handle, record, counts)


def write_records(
    origin: Origin, source: Source, output_file: Path, *, limit: int = 0, seed: int | None = None
) -> tuple[Counts, Path]:
    """Write the records, and beside them where they come from.

    Args:
        origin: The rows.
        source: The set that they belong to.
        output_file: For the records.
        limit: Records to write, at most; 0: all.
        seed: Sample by hash; None: the first ones.

    Returns:
        The counts, and the path of the file of their origin.

    Raises:
        ContrastRMError: A row without the set's fields, an unreadable file, or not one row that can be used.
    """
    counts = Counts()
    is_sample = seed is not None and limit > 0
    with open_atomic(output_file) as handle:
        records = parse_rows(origin.rows, source, counts, n_wanted=0 if is_sample else limit)
        if seed is not None and is_sample:
            _write_sample(records, handle, counts, output_file.parent, limit=limit, seed=seed)
        else:
            for record in records:
                _write(handle, record, counts)
        assert counts.n_rows == counts.n_usable + counts.skipped.total(), "a row got lost uncounted"
        if not counts.n_written:
            reasons = ", ".join(f"{name} {count}" for name, count in counts.skipped.most_common(5)) or "no rows"
            raise ContrastRMError(f"{source.repo_id}: none of {counts.n_rows} rows can be used ({reasons})")
    meta_file = output_file.with_name(output_file.name + ".meta.json")
    is_local = origin.local_files is not None
    meta = {
        "repo_id": source.repo_id,
        # What a local file is a part of, nobody can tell.
        "config": None if is_local else source.config,
        "split": None if is_local else source.split,
        "revision": origin.revision,
        "revision_is": None if origin.revision is None else "as given, not checked" if is_local else "resolved",
        "local_files": origin.local_files,
        "limit": limit,
        "seed": seed if is_sample else None,
        "n_rows_read": counts.n_rows,
        "n_usable": counts.n_usable,
        "n_records": counts.n_written,
        "n_skipped": dict(counts.skipped.most_common()),
        "sha256": file_sha256(output_file),
        "datasets_version": None if is_local else importlib.metadata.version("datasets"),
    }
    write_json(meta_file, meta)
    return counts, meta_file


# --- the command line ---------------------------------------------------------------------------------------------------


def _whole_number(value: str) -> int:
    number = int(value)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", choices=sorted(SOURCES), required=True, help="which set, and so which schema")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--local_files", type=Path, nargs="+", help="a copy of the hub's files: JSONL or Parquet")
    parser.add_argument(
        "--revision",
        default=None,
        help="commit, tag or branch; default: the newest commit. With --local_files: what to note down as theirs",
    )
    parser.add_argument("--limit", type=_whole_number, default=0, help="N records at most; 0 = all")
    parser.add_argument("--seed", type=int, default=None, help="with --limit: a sample by hash in place of the first N")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read, parse, write."""
    args = build_parser().parse_args(argv)
    if args.seed is not None and not args.limit:
        raise ContrastRMError("--seed samples --limit records of the set; give --limit too")
    source = SOURCES[args.dataset]
    origin = open_local(args.local_files, args.revision) if args.local_files else open_hub(source, args.revision)
    counts, _ = write_records(origin, source, args.output_file, limit=args.limit, seed=args.seed)
    skipped = ", ".join(f"{name} {count}" for name, count in counts.skipped.most_common()) or "none"
    where = f"at {origin.revision}" if origin.local_files is None else f"of {len(origin.local_files)} local files"
    print(f"{args.output_file}: {counts.n_written} records of {counts.n_rows} rows {where}; skipped: {skipped}")
    return 0


if __name__ == "__main__":
    run(main)
