"""Training groups tokenised once, on disk: written by one process while the others wait, read as memory maps.

A cache is a folder ``<cache_dir>/<key>``. The key names everything that decides its bytes: content of the sources, tokenizer,
template, length policy, choice of negatives, and the code that makes it. The folder appears whole or not at all; its
manifest holds the size and SHA-256 of every file, and whoever opens it checks them: a damaged cache is written anew.
Nothing here grows with the number of records but the files, and 8 bytes an id while they are written.

Writes: ``manifest.json`` and flat binary files (``FILES``) under ``<cache_dir>/<key>/``.
Used by ``python -m codes.train.train_reward_model`` (``--cache_dir``); remove the folder to free the space.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from tqdm import tqdm

from codes.common import chat, packing, records
from codes.common.biases import INJECTABLE
from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.files import hold, sync
from codes.common.packing import MIN_SHARED_TOKENS, common_prefix, shared_tokens
from codes.common.records import PreferenceRecord, ensure_writable_folder, write_json
from codes.train import data_utils, sources
from codes.train.data_utils import EncodedRecord, EncodeReport, Group, check_groups_left, encode_records
from codes.train.sources import Source, SourceIdentity, id_digest, identify, read_source

MANIFEST = "manifest.json"
ASIDE_FILE = "aside.jsonl"
# Bias names by number; 0 is "no bias injected" and stands for the chosen text too.
BIASES = (None, *INJECTABLE)
# Types of the flat files. Offsets begin with 0: item i lies in [offset[i], offset[i + 1]).
FILES: Mapping[str, str] = {
    "tokens": "<u4",  # or <u2, where every id fits
    "token_types": "u1",  # only of tokenizers that make them
    "text_offsets": "<i8",  # into tokens
    "text_biases": "u1",  # index into BIASES
    "text_margins": "<f4",  # NaN: none
    "group_offsets": "<i8",  # into texts
    "group_digests": "<u8",  # of the record's id
    "group_shared": "<i4",  # tokens of the group's prefix tree
    "group_prefixes": "<i4",  # tokens that all its texts begin with
    "id_offsets": "<i8",  # into ids
    "ids": "u1",  # UTF-8
    "raw_lengths": "<i4",  # tokens of every text before the over-length policy, source after source
}
# Records that are tokenised at once.
CHUNK = 256


@dataclass(frozen=True)
class Aside:
    """Records that are kept out of training and written to a file of their own instead (for held-out evaluation).

    Attributes:
        name: Whatever decides ``takes``: two that take other records have other names.
        takes: Whether a record is kept out.
    """

    name: str
    takes: Callable[[PreferenceRecord], bool]


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source: ``n_rows`` = ``len(bad)`` + ``n_aside`` + ``encoded.n_records``.

    Attributes:
        n_raw_texts: Texts that were tokenised, those of dropped records too.
        biases: Rejected answers of the groups by injected bias; ``original``: none.
        verdicts: Records by ``verify_correctness``.
        origins: Groups by the ``source`` that their records name.
        n_with_margin: Groups in which at least one rejected answer has a margin.
        n_margins: Rejected answers that have one.
        n_multi_turn: Records whose prompt has more than one user turn.
        n_system: Records whose prompt begins with a system turn.
    """

    location: str
    sha256: str
    revision: str | None
    n_rows: int
    bad: list[str]
    n_aside: int
    encoded: EncodeReport
    n_raw_texts: int
    biases: dict[str, int]
    verdicts: dict[str, int]
    origins: dict[str, int]
    n_with_margin: int
    n_margins: int
    n_multi_turn: int
    n_system: int


@dataclass
class _Tally:
    """The counts of a source while it is read."""

    encoded: EncodeReport = field(default_factory=EncodeReport)
    n_aside: int = 0
    n_raw_texts: int = 0
    biases: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    n_with_margin: int = 0
    n_margins: int = 0
    n_multi_turn: int = 0
    n_system: int = 0

    def add(self, record: PreferenceRecord, encoded: EncodedRecord) -> None:
        self.encoded += encoded.report()
        self.n_raw_texts += len(encoded.texts)
        self.verdicts[record.verify_correctness or "none"] += 1
        self.n_multi_turn += sum(message["role"] == "user" for message in record.messages) > 1
        self.n_system += record.messages[0]["role"] == "system"
        if encoded.group is not None:
            self.origins[record.source or "not named"] += 1
            self.biases.update(bias or "original" for bias in encoded.group.bias_types)
            n_margins = sum(margin is not None for margin in encoded.group.margins)
            self.n_margins += n_margins
            self.n_with_margin += n_margins > 0

    def counts(self, source: Source, identity: SourceIdentity, *, n_rows: int, bad: Sequence[str]) -> SourceCounts:
        """What is remembered of a source."""
        return SourceCounts(
            location=source.location,
            sha256=identity.sha256,
            revision=identity.revision,
            n_rows=n_rows,
            bad=list(bad),
            n_aside=self.n_aside,
            encoded=self.encoded,
            n_raw_texts=self.n_raw_texts,
            biases=dict(sorted(self.biases.items())),
            verdicts=dict(sorted(self.verdicts.items())),
            origins=dict(self.origins.most_common()),
            n_with_margin=self.n_with_margin,
            n_margins=self.n_margins,
            n_multi_turn=self.n_multi_turn,
            n_system=self.n_system,
        )


class TokenCache(Sequence[Group]):
    """The groups of a finished cache, read from its files when they are asked for.

    Attributes:
        folder: Where it lies.
        key: What it was made of, as one hash.
        source_counts: One entry a source, in their order.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = str(manifest["key"])
        self.source_counts = [
            SourceCounts(**{**row, "encoded": EncodeReport(**row["encoded"])}) for row in manifest["sources"]
        ]
        self._types = dict(manifest["types"])

    def array(self, name: str) -> np.ndarray:
        """One of ``FILES`` as a memory map."""
        path = self.folder / f"{name}.bin"
        if not path.is_file() or not path.stat().st_size:
            return np.zeros(0, dtype=self._types.get(name, "u1"))
        # A plain array over the map: slices of a memmap object cost ten times as much.
        return np.memmap(path, dtype=self._types[name], mode="r").view(np.ndarray)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self.array("tokens")

    @cached_property
    def _token_types(self) -> np.ndarray:
        return self.array("token_types")

    @cached_property
    def text_offsets(self) -> np.ndarray:
        """``(n_texts + 1,)`` int64: where each text's tokens begin."""
        return self.array("text_offsets")

    @cached_property
    def group_offsets(self) -> np.ndarray:
        """``(n_groups + 1,)`` int64: where each group's texts begin."""
        return self.array("group_offsets")

    @cached_property
    def group_digests(self) -> np.ndarray:
        """``(n_groups,)`` uint64: stand for the record ids."""
        return self.array("group_digests")

    @cached_property
    def group_shared(self) -> np.ndarray:
        """``(n_groups,)`` int32: tokens of each group's prefix tree."""
        return self.array("group_shared")

    @cached_property
    def group_prefixes(self) -> np.ndarray:
        """``(n_groups,)`` int32: tokens that all texts of a group begin with."""
        return self.array("group_prefixes")

    @cached_property
    def _text_biases(self) -> np.ndarray:
        return self.array("text_biases")

    @cached_property
    def _text_margins(self) -> np.ndarray:
        return self.array("text_margins")

    @cached_property
    def _id_offsets(self) -> np.ndarray:
        return self.array("id_offsets")

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.array("ids")

    def __len__(self) -> int:
        return len(self.group_offsets) - 1

    def record_id(self, number: int) -> str:
        """The id of a group's record."""
        first, stop = self._id_offsets[number : number + 2]
        return bytes(self._ids[first:stop]).decode("utf-8")

    @overload
    def __getitem__(self, number: int) -> Group: ...
    @overload
    def __getitem__(self, number: slice) -> list[Group]: ...
    def __getitem__(self, number: int | slice) -> Group | list[Group]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return self.group(range(len(self))[number])

    def group(self, number: int, kept: Sequence[int] | None = None) -> Group:
        """One group.

        Args:
            kept: Positions of the rejected answers to keep; None: all.
        """
        first, stop = (int(at) for at in self.group_offsets[number : number + 2])
        rejected = range(first, stop - 1) if kept is None else [first + place for place in kept]
        margins = tuple(None if np.isnan(value) else float(value) for value in self._text_margins[list(rejected)])
        return Group(
            self.record_id(number),
            tuple(self._text(at) for at in [*rejected, stop - 1]),
            tuple(BIASES[int(self._text_biases[at])] for at in rejected),
            margins if any(margin is not None for margin in margins) else (),
        )

    def _text(self, at: int) -> EncodedText:
        start, stop = self.text_offsets[at : at + 2]
        types = tuple(self._token_types[start:stop].tolist()) if len(self._token_types) else None
        return EncodedText(tuple(self._tokens[start:stop].tolist()), types)

    @cached_property
    def report(self) -> EncodeReport:
        """The counts of all sources."""
        return sum((counts.encoded for counts in self.source_counts), EncodeReport())

    @property
    def sizes(self) -> list[int]:
        """Groups of each source; the groups of a source stand together, in the order of its records."""
        return [counts.encoded.n_groups for counts in self.source_counts]

    @property
    def aside_file(self) -> Path:
        """Records that were kept out of training (empty without an ``Aside``)."""
        return self.folder / ASIDE_FILE


def load_training_groups(
    chosen: Sequence[Source],
    formatter: ChatFormatter,
    *,
    cache_dir: str | Path,
    negatives: str = "all",
    limit: int = 0,
    max_bad_rows: int = 0,
    aside: Aside | None = None,
) -> TokenCache:
    """The groups of the sources: from the cache, or tokenised into it now.

    Every process of a run calls it. The first one to get the lock writes; the others wait, then read. A writer that is killed
    frees the lock and leaves nothing that could be taken for a cache.

    Args:
        chosen: The sources, in order.
        negatives: As in ``select_negatives``.
        limit: The first N records of each source; 0 = all.
        max_bad_rows: Bad rows that each source may have.
        aside: Records that are to be kept out.

    Raises:
        ContrastRMError: A source is missing or has too many bad rows, no group is left, or the folder cannot be written.
    """
    identities = {source.location: identify(source) for source in chosen}
    _check_different(identities)
    key = _cache_key(chosen, identities, formatter, negatives, limit, aside)
    folder = ensure_writable_folder(cache_dir) / key[:32]

    def opened() -> TokenCache | None:
        cache = _open(folder, key)
        too_many = cache is not None and any(len(counts.bad) > max_bad_rows for counts in cache.source_counts)
        return None if too_many else cache  # read again, to stop at the row that is one too many

    cache = opened()
    if cache is None:
        in_use = f"waiting for the process that writes the token cache {folder}"
        with hold(folder.with_name(f".{folder.name}.lock"), in_use, wait=True):
            cache = opened()
            if cache is None:
                _write(folder, key, chosen, identities, formatter, negatives, limit, max_bad_rows, aside)
                cache = opened()
    if cache is None:
        raise ContrastRMError(f"{folder} changed right after it was written; does another program clean {cache_dir}?")
    return cache


def _check_different(identities: Mapping[str, SourceIdentity]) -> None:
    """Two names of one content are no mix: every record would count twice."""
    locations: dict[str, str] = {}
    for location, identity in identities.items():
        first = locations.setdefault(identity.sha256, location)
        if first != location:
            raise ContrastRMError(
                f"{first} and {location} hold the same data; give one of them, with a weight ({first}:2)"
            )


def _cache_key(
    chosen: Sequence[Source],
    identities: Mapping[str, SourceIdentity],
    formatter: ChatFormatter,
    negatives: str,
    limit: int,
    aside: Aside | None,
) -> str:
    code = hashlib.sha256()
    for module in (records, chat, packing, data_utils, sources, sys.modules[__name__]):
        code.update(Path(str(module.__file__)).read_bytes())
    parts = {
        "code": code.hexdigest(),
        "sources": [identities[source.location].sha256 for source in chosen],
        "tokenizer": tokenizer_sha256(formatter),
        "max_length": formatter.max_length,
        "overlength": formatter.overlength,
        "negatives": negatives,
        "limit": limit,
        "aside": None if aside is None else aside.name,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenizer_sha256(formatter: ChatFormatter) -> str:
    """Hash of everything that turns a conversation into ids.

    A probe conversation is part of it: a template that writes today's date makes another cache tomorrow.
    """
    tokenizer: Any = formatter.tokenizer
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call happened to set.
    definition |= {"truncation": None, "padding": None}
    unlimited = ChatFormatter(tokenizer)
    probe = unlimited.encode([Conversation([{"role": "user", "content": "Why is the sky blue?"}], "It scatters.")])[0]
    text = json.dumps([definition, formatter.template_hash, tokenizer.bos_token_id, probe.input_ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _open(folder: Path, key: str) -> TokenCache | None:
    """The cache in a folder; None where there is none, or a damaged one (which is said)."""
    if not folder.is_dir():
        return None
    damage = _damage(folder, key)
    if damage is not None:
        print(f"note: the token cache {folder} is damaged ({damage}); it is written anew", file=sys.stderr, flush=True)
        return None
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return TokenCache(folder, manifest)


def _damage(folder: Path, key: str) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != key:
            return "it belongs to other data"
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
            if records.file_sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class _Writer:
    """Appends to the flat files of a cache, hashing what it writes."""

    def __init__(self, folder: Path, types: Mapping[str, str], stack: ExitStack) -> None:
        self.folder, self.types = folder, types
        self._stack = stack
        self._files: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}
        self.n_bytes: Counter[str] = Counter()
        self.ends = {"text_offsets": 0, "group_offsets": 0, "id_offsets": 0}
        for name in types:
            if name != "token_types":
                self._add(name, b"")
        for name in self.ends:
            self.append(name, [0])

    def append(self, name: str, values: Any) -> None:
        """Append numbers to a flat file."""
        self._add(f"{name}", np.asarray(values, dtype=self.types[name]).tobytes())

    def append_lengths(self, name: str, lengths: Sequence[int]) -> None:
        """Append the offsets that follow from lengths."""
        offsets = self.ends[name] + np.cumsum(lengths)
        self.ends[name] = int(offsets[-1])
        self.append(name, offsets)

    def add_bytes(self, name: str, content: bytes) -> None:
        """Append to a file that is no array."""
        self._add(name, content)

    def _add(self, name: str, content: bytes) -> None:
        file = name if "." in name else f"{name}.bin"
        if file not in self._files:
            self._files[file] = self._stack.enter_context((self.folder / file).open("wb"))
            self._hashes[file] = hashlib.sha256()
        self._files[file].write(content)
        self._hashes[file].update(content)
        self.n_bytes[file] += len(content)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Flush everything to disk; size and hash of every file."""
        for handle in self._files.values():
            handle.flush()
            os.fsync(handle.fileno())
        return {
            file: {"bytes": self.n_bytes[file], "sha256": digest.hexdigest()} for file, digest in self._hashes.items()
        }

    def add_groups(self, groups: Sequence[Group]) -> None:
        """Append groups."""
        if not groups:
            return
        texts = [text for group in groups for text in group.texts]
        rows = [np.asarray(text.input_ids, dtype=np.int64) for text in texts]
        self.append("tokens", np.concatenate(rows))
        if texts[0].token_type_ids is not None:
            self.append("token_types", [kind for text in texts for kind in text.token_type_ids or ()])
        self.append_lengths("text_offsets", [len(row) for row in rows])
        self.append_lengths("group_offsets", [len(group.texts) for group in groups])
        biases, margins, shared, prefixes = [], [], [], []
        stop = 0
        for group in groups:
            biases += [*(BIASES.index(bias) for bias in group.bias_types), 0]
            own = group.margins or (None,) * len(group.bias_types)
            margins += [*(np.nan if margin is None else margin for margin in own), np.nan]
            start, stop = stop, stop + len(group.texts)
            prefix, tree = _tree_tokens(rows[start:stop])
            prefixes.append(prefix)
            shared.append(tree)
        self.append("text_biases", biases)
        self.append("text_margins", margins)
        self.append("group_shared", shared)
        self.append("group_prefixes", prefixes)
        self.append("group_digests", np.array([id_digest(group.record_id) for group in groups], dtype=np.uint64))
        names = [group.record_id.encode("utf-8") for group in groups]
        self.append_lengths("id_offsets", [len(name) for name in names])
        self.append("ids", np.frombuffer(b"".join(names), dtype=np.uint8))


def _tree_tokens(rows: Sequence[Any]) -> tuple[int, int]:
    """Tokens that all texts of a group begin with, and tokens of its prefix tree."""
    prefix = min(common_prefix(rows[-1], row) for row in rows[:-1])
    if len(rows) > 2:
        return prefix, shared_tokens(rows)
    # Two texts: the tree is the prefix and what is left of them.
    is_shared = prefix >= MIN_SHARED_TOKENS or len(rows[0]) == prefix == len(rows[1])
    return prefix, len(rows[0]) + len(rows[1]) - (prefix if is_shared else 0)


def _write(
    folder: Path,
    key: str,
    chosen: Sequence[Source],
    identities: Mapping[str, SourceIdentity],
    formatter: ChatFormatter,
    negatives: str,
    limit: int,
    max_bad_rows: int,
    aside: Aside | None,
) -> None:
    """Tokenise everything into a scratch folder, then give it its name. The caller holds the lock."""
    for left_over in folder.parent.glob(f".{folder.name}.*-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    types = dict(FILES)
    if max(formatter.tokenizer.get_vocab().values()) < 2**16:
        types["tokens"] = "<u2"
    try:
        scratch.mkdir()
        with ExitStack() as stack:
            writer = _Writer(scratch, types, stack)
            writer.add_bytes(ASIDE_FILE, b"")
            bar = stack.enter_context(tqdm(desc="tokenising", unit=" records", disable=None))
            rows = [
                _write_source(
                    writer, source, identities[source.location], formatter, negatives, limit, max_bad_rows, aside, bar
                )
                for source in chosen
            ]  # fmt: skip
            check_groups_left(sum((counts.encoded for counts in rows), EncodeReport()))
            files = writer.finish()
        manifest = {"key": key, "types": types, "files": files, "sources": [asdict(counts) for counts in rows]}
        write_json(scratch / MANIFEST, manifest)
        _put_in_place(scratch, folder)
    except OSError as error:
        raise ContrastRMError(
            f"cannot write the token cache in {folder.parent}: {error.strerror or error}; free some space or choose another "
            "--cache_dir"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, folder: Path) -> None:
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.damaged-{os.getpid()}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    os.replace(scratch, folder)
    sync(folder.parent)


def _write_source(
    writer: _Writer,
    source: Source,
    identity: SourceIdentity,
    formatter: ChatFormatter,
    negatives: str,
    limit: int,
    max_bad_rows: int,
    aside: Aside | None,
    bar: Any,
) -> SourceCounts:
    tally = _Tally()
    waiting: list[PreferenceRecord] = []
    refused: list[str] = []

    def accepted(some: Sequence[PreferenceRecord], which: str) -> list[tuple[PreferenceRecord, EncodedRecord]]:
        """Records as tokens; those that cannot become tokens are bad rows."""
        pairs = list(zip(some, encode_records(some, formatter, negatives=which), strict=True))
        for record, encoded in pairs:
            if encoded.refusal is not None:
                refused.append(f"{record.place}: {encoded.refusal}")
                if len(refused) > max_bad_rows:
                    raise records.too_many_bad(refused[-1], len(refused), max_bad_rows)
        return [(record, encoded) for record, encoded in pairs if encoded.refusal is None]

    def encode() -> None:
        held_out = [aside is not None and aside.takes(record) for record in waiting]
        # What is held out is tokenised later: here it is only seen that it can be, while its line is known.
        for record, _ in accepted(list(compress(waiting, held_out)), "all"):
            tally.n_aside += 1
            writer.add_bytes(ASIDE_FILE, json.dumps(record.to_row(), ensure_ascii=False).encode() + b"\n")
        found = accepted([record for record, is_out in zip(waiting, held_out, strict=True) if not is_out], negatives)
        for record, encoded in found:
            tally.add(record, encoded)
        writer.append("raw_lengths", [_raw_length(text) for _, encoded in found for text in encoded.texts])
        writer.add_groups([encoded.group for _, encoded in found if encoded.group is not None])
        bar.update(len(waiting))
        waiting.clear()

    def see(record: PreferenceRecord) -> None:
        waiting.append(record)
        if len(waiting) == CHUNK:
            encode()

    report = read_source(source, see, max_bad_rows=max_bad_rows, limit=limit)
    encode()
    bad = [*report.bad, *refused]
    if len(bad) > max_bad_rows:
        raise records.too_many_bad(bad[-1], len(bad), max_bad_rows)
    return tally.counts(source, identity, n_rows=report.n_rows, bad=bad)


def _raw_length(text: EncodedText) -> int:
    """Tokens of a text before the over-length policy; a dropped one has only lost some."""
    return len(text.input_ids) + text.n_cut
