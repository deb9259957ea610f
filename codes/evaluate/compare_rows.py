"""Rows that several models scored, side by side: read, matched, and compared.

Reads the ``.jsonl`` files of results folders; writes nothing. A row is matched by what it says, not by its place.

    python -m pytest tests/test_compare.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.errors import ContrastRMError
from codes.common.questions import question_key
from codes.common.records import iter_jsonl
from codes.evaluate.compare_stats import PairedPart, adjust, compare_parts, minimum_detectable_effect, to_fields
from codes.evaluate.metrics import rate_fields

Row = Mapping[str, Any]
Test = Callable[[Row], bool]


def read_rows(path: Path, needed: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        ContrastRMError: There is no such file, or a row lacks one of the fields that are needed.
    """
    if not path.is_file():
        raise ContrastRMError(f"no {path.name} in {path.parent}; evaluate the model again: its rows are compared")
    rows = []
    for line, row in iter_jsonl(path):
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise ContrastRMError(f"{path}:{line}: no field {missing[0]!r}; evaluate the model again")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Shared:
    """The rows of one file that every model scored, in one order.

    Attributes:
        rows: By model, parallel to each other.
        clusters: The question of each row.
        n_left_out: By model: its rows that another model lacks or has not scored, or that it has not scored itself.
        n_flagged: Rows that were left out since the audit flagged them.
    """

    rows: Mapping[str, Sequence[Row]]
    clusters: Sequence[str]
    n_left_out: Mapping[str, int]
    n_flagged: int = 0

    def __len__(self) -> int:
        return len(self.clusters)


def share_rows(
    by_model: Mapping[str, Sequence[Row]], key: Callable[[Row], Any], is_scored: Test, *, clean: bool = False
) -> Shared:
    """The rows that all models have scored; equal rows of one file are paired in their order."""
    keyed = {name: dict(zip(_numbered(map(key, rows)), rows, strict=True)) for name, rows in by_model.items()}
    first, *others = keyed.values()
    common = [k for k in first if all(k in rows for rows in others) and all(is_scored(r[k]) for r in keyed.values())]
    flagged = {k for k in common if clean and any(rows[k].get("defects") for rows in keyed.values())}
    kept = [k for k in common if k not in flagged]
    return Shared(
        rows={name: [rows[k] for k in kept] for name, rows in keyed.items()},
        clusters=[question_key(first[k]["question"]) for k in kept],
        n_left_out={name: len(rows) - len(common) for name, rows in keyed.items()},
        n_flagged=len(flagged),
    )


def _numbered(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    seen: Counter[Any] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def part(shared: Shared, pair: tuple[str, str], hit: Test, counted: Test, weight: float = 1.0) -> PairedPart:
    """One rate of two models on the shared rows."""
    rows = [shared.rows[name] for name in pair]
    return PairedPart(
        hits=np.array([[hit(row) for row in some] for some in rows], dtype=bool).reshape(2, -1),
        counted=np.array([[counted(row) for row in some] for some in rows], dtype=bool).reshape(2, -1),
        clusters=shared.clusters,
        weight=weight,
    )


def both_counted(some: PairedPart) -> PairedPart:
    """The same on the rows that are in the denominators of both models: one set of pairs for both."""
    inside = np.tile(some.counted.all(axis=0), (2, 1))
    return PairedPart(some.hits & inside, inside, some.clusters, some.weight)


def joined(some: Iterable[Shared]) -> Shared:
    """Several files as one."""
    files = list(some)
    return Shared(
        rows={name: [row for shared in files for row in shared.rows[name]] for name in files[0].rows},
        clusters=[cluster for shared in files for cluster in shared.clusters],
        n_left_out={name: sum(shared.n_left_out[name] for shared in files) for name in files[0].n_left_out},
        n_flagged=sum(shared.n_flagged for shared in files),
    )


def every(_: Row) -> bool:
    """Every row counts."""
    return True


def is_correct(row: Row) -> bool:
    """A tie is not correct."""
    return bool(row["verdict"] == "correct")


def rate_of(name: str, shared: Shared, model: str, hit: Test, counted: Test) -> dict[str, Any]:
    """One model's rate on the shared rows."""
    rows = shared.rows[model]
    return rate_fields(name, [hit(row) and counted(row) for row in rows], list(map(counted, rows)), shared.clusters)


@dataclass(frozen=True)
class Draws:
    """How the bootstrap and the swaps draw."""

    n_resamples: int
    seed: int


def compared(
    pair: tuple[str, str], what: str, measure: str, parts: Sequence[PairedPart], draws: Draws
) -> dict[str, Any]:
    """One line of a table of differences."""
    difference = compare_parts(parts, n_resamples=draws.n_resamples, seed=draws.seed)
    return {"model_a": pair[0], "model_b": pair[1], "what": what, "measure": measure, **to_fields(difference)}


def family(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with p, and the effect that they could detect, corrected for all of them."""
    corrected = adjust([row["p"] for row in rows])
    n_tests = max(1, sum(row["p"] is not None for row in rows))
    effects = [minimum_detectable_effect(r["standard_error"], r["n_questions"], n_tests=n_tests) for r in rows]
    return [
        row | more | {"minimum_detectable_effect": effect}
        for row, more, effect in zip(rows, corrected, effects, strict=True)
    ]
