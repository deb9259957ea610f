"""Where training records come from: JSONL and Parquet files, local folders and hub data sets, and how they are mixed.

A source is ``location[:weight]``; several are separated by commas:

* ``path/to/file.jsonl`` (or ``.jsonl.gz``), ``path/to/file.parquet``: preference records, one a line or row;
* ``hub:org/name[/config][@revision][:split]``: a data set of the hub, read by the ``datasets`` library (split ``train`` unless
  named); ``hub:path/to/folder[:split]``, or the folder's path alone, reads a local folder in the hub's format, or one that
  ``save_to_disk`` has written. Files of the folder that would not be read are refused;
* ``mix.json``: ``[{"path": "a, b.jsonl", "weight": 2}, ...]``, for names that hold commas, or long lists. ``path`` is a location.

The last ``:number`` of a source is its weight, unless a file of the whole name exists.

**An epoch.** Without any weight every record stands in it exactly once. With weights (a source without one has 1) an epoch
still has as many groups as all sources hold together, N, but source i gives a share w_i / sum(w) of them, rounded to whole
groups (largest remainders first). A source that gives fewer than it has gives a sample without repetition, drawn anew every
epoch; one that gives more gives every group equally often, and some, drawn anew every epoch, once more. A weight of 0 leaves a
source out. Everything is drawn from the seed, the epoch and the position of the source.

Used by ``python -m codes.train.train_reward_model --train_file SOURCES``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import (
    PREFERENCE_KEYS,
    UNRENDERED_KEYS,
    PreferenceRecord,
    ReadReport,
    check_preference_file,
    file_sha256,
    iter_rows,
    parse_preference_row,
    repeated_record,
    strict_json,
)

HUB_PREFIX = "hub:"
PARQUET_SUFFIXES = (".parquet", ".pq")
# Of files in a folder that hold rows.
DATA_SUFFIXES = (".json", ".jsonl", *PARQUET_SUFFIXES, ".csv", ".tsv", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
# Rows of a Parquet file or hub set that are held at once.
ROWS_AT_ONCE = 1024
# Of a table: what a record says, and what it must not say.
_COLUMNS = PREFERENCE_KEYS | UNRENDERED_KEYS
COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True)
class Source:
    """One place that records come from.

    Attributes:
        location: As the user wrote it, without the weight.
        kind: ``jsonl``, ``parquet`` or ``hub``.
        name: Path, or hub id (with its config).
        revision: Of a hub set; None: its default branch.
        split: Of a hub set.
        weight: None where the user gave none.
    """

    location: str
    kind: str
    name: str
    revision: str | None = None
    split: str = "train"
    weight: float | None = None


def parse_sources(text: str) -> list[Source]:
    """Sources of a ``--train_file`` value; the notation is this module's.

    Raises:
        ContrastRMError: Something that is no source, a weight that is no number of at least 0, one source twice, or no
            weight above 0.
    """
    sources = _read_mix(Path(text)) if text.endswith(".json") else [_parse_source(part) for part in _split(text)]
    if not sources:
        raise ContrastRMError("--train_file names no source; give a JSONL or Parquet file, or hub:org/name")
    locations: dict[tuple[str | None, ...], str] = {}
    for source in sources:
        place, location = _place(source), source.location
        if place in locations:
            first = locations[place]
            again = "" if location == first else f" (as {location})"
            raise ContrastRMError(
                f"{first} stands twice{again} in --train_file; give it once, with a weight ({first}:2)"
            )
        locations[place] = location
    if all(source.weight == 0 for source in sources):
        raise ContrastRMError("every source of --train_file has weight 0: nothing is left to train on")
    return sources


def _place(source: Source) -> tuple[str | None, ...]:
    """What two ways to write one place have in common."""
    name = os.path.realpath(source.name) if _exists(source.name) else os.path.normpath(source.name)
    return source.kind, name, source.revision, source.split


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except OSError:  # longer than any name
        return False


def _require_file(name: str) -> Path:
    path = Path(name)
    if not _exists(name) or not path.is_file():
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".jsonl", ".json", *PARQUET_SUFFIXES)
        hint = f"a data set of the hub is written {HUB_PREFIX}{name}" if is_hub_id else "check the path"
        raise ContrastRMError(f"file not found: {name[:200]}; {hint}")
    return path


def _split(text: str) -> list[str]:
    if _exists(text):
        return [text]
    return [part for part in (piece.strip() for piece in text.split(",")) if part]


def _parse_source(text: str) -> Source:
    if _exists(text):
        return _locate(text, None)
    location, colon, number = text.rpartition(":")
    weight = _weight(number) if colon else None
    # Not a number: the last piece belongs to the location (a split, or a path with a colon).
    return _locate(text if weight is None else location, weight)


def _weight(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not (value >= 0 and math.isfinite(value)):
        raise ContrastRMError(f"weight {text!r} in --train_file: a source's weight is a number of at least 0")
    return value


def _locate(location: str, weight: float | None) -> Source:
    if not location:
        raise ContrastRMError("a source of --train_file has a weight but no name; write path:weight")
    if not location.startswith(HUB_PREFIX):
        path = Path(location)
        if _exists(location) and path.is_dir():
            return Source(location, "hub", location, weight=weight)
        kind = "parquet" if path.suffix.lower() in PARQUET_SUFFIXES else "jsonl"
        return Source(location, kind, location, weight=weight)
    rest = location.removeprefix(HUB_PREFIX)
    if _exists(rest) and Path(rest).is_dir():
        return Source(location, "hub", rest, weight=weight)
    name, _, split = rest.partition(":")
    name, _, revision = name.partition("@")
    is_folder = _exists(name) and Path(name).is_dir()
    if not is_folder and not 2 <= len([piece for piece in name.split("/") if piece]) <= 3:
        raise ContrastRMError(
            f"{location!r} is neither a local folder nor a hub id; write hub:org/name[/config][@revision][:split]"
        )
    return Source(location, "hub", name, revision or None, split or "train", weight)


def _read_mix(path: Path) -> list[Source]:
    """The sources that a JSON file lists."""
    _require_file(str(path))
    shape = f'{path}: a mix is [{{"path": "a.jsonl", "weight": 2}}, ...]'
    try:
        rows = strict_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContrastRMError(f"{shape}; this is no JSON ({error})") from error
    if not isinstance(rows, list):
        raise ContrastRMError(f"{shape}; found {type(rows).__name__}")
    sources = []
    for number, row in enumerate(rows, start=1):
        known = isinstance(row, dict) and set(row) <= {"path", "weight"} and isinstance(row.get("path"), str)
        weight = row.get("weight") if known else None
        if not known or isinstance(weight, bool) or not isinstance(weight, int | float | None):
            raise ContrastRMError(f"{shape}; entry {number} is {json.dumps(row)[:80]}")
        sources.append(_locate(row["path"], None if weight is None else _weight(str(weight))))
    return sources


def read_source(
    source: Source, see: Callable[[PreferenceRecord], None], *, max_bad_rows: int = 0, limit: int = 0
) -> ReadReport:
    """Read a source through, record by record: it is never held in memory.

    Args:
        see: Called with each good record, in order.
        max_bad_rows: Bad rows that are tolerated; they are counted and left out.
        limit: The first N good records only; 0 = all.

    Raises:
        ContrastRMError: Missing file, unreachable set, more bad rows than allowed, no good row, or an id that occurs twice.
    """
    if source.kind != "hub":
        _require_file(source.name)
    if source.kind == "jsonl":
        return check_preference_file(source.name, max_bad_rows=max_bad_rows, limit=limit, see=see).report
    rows = _numbered(source.location, _parquet_rows(Path(source.name)))
    if source.kind == "hub":
        files = _json_files(source)
        rows = _numbered(source.location, _hub_rows(source)) if files is None else _json_rows(files)
    return _read_rows(source.location, rows, see, max_bad_rows=max_bad_rows, limit=limit)


_Numbered = tuple[Path, int, dict[str, Any] | RecordError]


def _numbered(location: str, rows: Iterator[dict[str, Any]]) -> Iterator[_Numbered]:
    """Rows of a table; columns that mean nothing to training are left aside."""
    for number, row in enumerate(rows, start=1):
        yield Path(location), number, {key: value for key, value in row.items() if key in _COLUMNS}


def _json_rows(files: Iterable[Path]) -> Iterator[_Numbered]:
    for file in files:
        for line, row in iter_rows(file):
            yield file, line, row


def _read_rows(
    location: str,
    rows: Iterator[_Numbered],
    see: Callable[[PreferenceRecord], None],
    *,
    max_bad_rows: int,
    limit: int,
) -> ReadReport:
    """Rows of a table or folder under the same rules as the lines of a JSONL file."""
    seen: set[int] = set()
    bad: list[str] = []
    for path, number, row in rows:
        try:
            if isinstance(row, RecordError):
                raise row
            record = parse_preference_row(path, number, row)
            digest = id_digest(record.id)
            if digest in seen:
                raise repeated_record(path, number, row, record, "an earlier row")
        except RecordError as error:
            bad.append(str(error))
            if len(bad) > max_bad_rows:
                allowed = f"bad row number {len(bad)}; --max_bad_rows allows {max_bad_rows}"
                raise ContrastRMError(f"{error} ({allowed}; a set of another shape needs converting first)") from error
            continue
        seen.add(digest)
        see(record)
        if len(seen) == limit:
            break
    if not seen:
        raise ContrastRMError(f"{location}: no usable row ({len(bad)} bad); give a set with at least one good record")
    return ReadReport(location, len(seen) + len(bad), len(seen), bad)


def id_digest(record_id: str) -> int:
    """Eight bytes that stand for a record's id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest())


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ContrastRMError(f"{path} is no readable Parquet file ({reason}); write it again") from error


def _hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    table = _open_hub(source)
    columns = [name for name in table.column_names if name in _COLUMNS]
    if not PREFERENCE_KEYS.intersection(columns):
        raise ContrastRMError(
            f"{source.location}: no column of a preference record among {', '.join(table.column_names[:10])}; "
            "convert the set to prompt, chosen and rejected first"
        )
    narrow = table.select_columns(columns)
    for start in range(0, len(narrow), ROWS_AT_ONCE):
        batch = narrow[start : start + ROWS_AT_ONCE]
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _open_hub(source: Source) -> Any:
    """The split of a hub set or local folder, memory-mapped."""
    import datasets  # it takes seconds, and most runs read files

    config = None
    name = source.name
    datasets.disable_progress_bars()
    with _named_loading(source):
        if Path(name).is_dir():
            if _is_saved(Path(name)):
                return _saved_split(source, datasets.load_from_disk(name))
        else:
            pieces = name.split("/")
            name, config = "/".join(pieces[:2]), (pieces[2] if len(pieces) == 3 else None)
        return datasets.load_dataset(name, config, split=source.split, revision=source.revision)


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_split(source: Source, saved: Any) -> Any:
    """The split asked for, of what ``save_to_disk`` wrote: a set of splits, or a single one."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if source.split not in splits:
        raise ValueError(f"it was saved with the split(s) {', '.join(splits)} and knows no {source.split!r}")
    return splits[source.split]


@contextmanager
def _named_loading(source: Source) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from datasets.table import CastError

    cure = "a hub set needs network or a filled cache and, where it is gated, HF_TOKEN; check name, config, @revision, :split"
    try:
        yield
    # The library raises whatever its parts raise: network, hub, file formats, unknown splits and configs.
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, CastError):
            reason, cure = "its files have different columns", "name the files one by one, separated by commas"
        raise ContrastRMError(f"cannot load {source.location!r}: {reason} ({cure})") from error


def _json_files(source: Source) -> list[Path] | None:
    """The JSON files of a local folder's split, which are read here, line by line; None: ``datasets`` reads the source.

    Raises:
        ContrastRMError: Files of the folder would not be read, or there is no such split.
    """
    folder = Path(source.name)
    card = folder / "README.md"
    # A card may say which files a split has; sums and slices of splits are the library's own notation.
    names_files = card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE)
    if not folder.is_dir() or _is_saved(folder) or names_files or not re.fullmatch(r"(?!all$)[\w.-]+", source.split):
        return None
    from datasets.data_files import DataFilesDict, get_data_patterns

    with _named_loading(source):
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
        splits = {
            str(split): [file for name in names if _format_of(file := Path(name))] for split, names in found.items()
        }
        if source.split not in splits:
            raise ValueError(f"it has the split(s) {', '.join(splits)} and knows no {source.split!r}")
    wanted = splits[source.split]
    taken = {file.resolve() for files in splits.values() for file in files}
    outside = [
        file
        for file in sorted(folder.rglob("[!.]*"))
        # A lone .json is as likely a note as data.
        if _format_of(file) and file.suffix != ".json" and file.resolve() not in taken
    ]
    formats = {_format_of(file) for file in wanted}
    if outside or len(formats) > 1:
        files = ", ".join(os.path.relpath(file, folder) for file in (outside or wanted)[:5])
        why = "no split of it holds" if outside else "one split holds files of several formats:"
        raise ContrastRMError(f"{source.location}: {why} {files}; name the files one by one, separated by commas")
    return wanted if formats == {"json"} else None


def _format_of(file: Path) -> str | None:
    """``json`` of what is read here, another name of other data, None of a file without rows."""
    name = file.name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    # Of a set: what fetching it has written about it.
    if suffix not in DATA_SUFFIXES or name.endswith((".meta.json", ".source.json")):
        return None
    return "json" if suffix + packed in (".json", ".jsonl", ".jsonl.gz") else suffix + packed


@dataclass(frozen=True)
class SourceIdentity:
    """What a source holds, whatever it is called.

    Attributes:
        sha256: Of the file's bytes, or of the tables that ``datasets`` made of a set and their split.
        revision: The commit of a hub set, where ``datasets`` says it.
    """

    sha256: str
    revision: str | None = None


def identify(source: Source) -> SourceIdentity:
    """Hash a source's content.

    Raises:
        ContrastRMError: It cannot be read.
    """
    files = _json_files(source) if source.kind == "hub" else [_require_file(source.name)]
    if files is not None:
        try:
            hashes = [file_sha256(file) for file in files]
        except OSError as error:
            raise ContrastRMError(
                f"cannot read {error.filename}: {error.strerror or error}; check its permissions"
            ) from error
        return SourceIdentity(_hash_of_hashes(hashes))
    table = _open_hub(source)
    digest = hashlib.sha256(f"{source.split}:{len(table)}".encode())
    for file in table.cache_files:
        digest.update(file_sha256(file["filename"]).encode())
    if not table.cache_files:  # held in memory
        for row in _hub_rows(source):
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    downloaded = " ".join(table.info.download_checksums or {})
    commit = COMMIT.search(downloaded)
    return SourceIdentity(digest.hexdigest(), commit.group(1) if commit else source.revision)


def combined_sha256(identities: Mapping[str, SourceIdentity]) -> str:
    """One hash for all sources: of a single one its own."""
    return _hash_of_hashes([identity.sha256 for identity in identities.values()])


def _hash_of_hashes(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def epoch_quotas(sizes: list[int], weights: list[float | None]) -> list[int] | None:
    """Groups that each source gives to an epoch; None where every group stands in it once.

    Args:
        sizes: Groups of each source.
        weights: Weight of each source; None where none was given.

    Example: sizes [100, 100], weights [3, None] -> [150, 50].
    """
    if all(weight is None for weight in weights):
        return None
    # A source of which no group is left (all too long) has nothing to give: the others share its part.
    parts = [(1.0 if weight is None else weight) if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    if not any(parts):
        raise ContrastRMError("no group is left of the sources with a weight above 0: nothing to train on")
    # Fractions: no rounding decides between two groups.
    shares = [Fraction(part) for part in parts]
    total, whole = sum(sizes), sum(shares)
    exact = [total * share / whole for share in shares]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: (quotas[number] - exact[number], number))
    for number in by_remainder[: total - sum(quotas)]:
        quotas[number] += 1
    return quotas


def draw_epoch(sizes: list[int], quotas: list[int] | None, *, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups of one epoch in the order of training.

    Args:
        sizes: Groups of each source; the groups of all sources are numbered through.
        quotas: From ``epoch_quotas``.

    Returns:
        ``(n,)`` int64 numbers of groups, and ``(n,)`` int32: how often the group stood in the epoch before (0 but for
        sources that give more than they have).
    """
    total = sum(sizes)
    order = np.random.default_rng([seed, epoch]).permutation(total if quotas is None else sum(quotas))
    if quotas is None:
        return order, np.zeros(total, dtype=np.int32)
    groups: list[np.ndarray] = []
    copies: list[np.ndarray] = []
    first = 0
    for number, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        if quota:
            whole, rest = divmod(quota, size)
            sample = np.random.default_rng([seed, epoch, number]).permutation(size)[:rest]
            groups.append(first + np.concatenate([np.tile(np.arange(size), whole), sample]).astype(np.int64))
            copies.append(np.repeat(np.arange(whole + 1, dtype=np.int32), [size] * whole + [rest]))
        first += size
    return np.concatenate(groups)[order], np.concatenate(copies)[order]
