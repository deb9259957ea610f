"""Work that is too long for one run, measured part by part.

A peer's batches are dealt out over the parts in a seeded order, whole batches as the peer makes them of all texts. Each part is
a random sample of the peer's own work, so the seconds of a part, divided by its share of the peer's floating-point operations,
estimate the seconds of the whole; after the last part every batch has been computed once. Operations, not tokens: attention over
a padded batch grows with the square of its longest text, and on a CPU it soon takes most of the time.
Used by the peers that score (``--parts``, ``--part``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import hash_order
from codes.common.cli import natural, positive
from codes.common.errors import ContrastRMError


@dataclass(frozen=True)
class Part:
    """Texts of a part of a peer's batches.

    Attributes:
        number, of: Which part, of how many.
        positions: Of its texts among all, ascending.
        share: Its floating-point operations, divided by those of all batches.
        n_computed_tokens: Of all batches.
    """

    number: int
    of: int
    positions: list[int]
    share: float
    n_computed_tokens: int

    def fields(self, seconds: float, n_computed_tokens: int) -> dict[str, Any]:
        """For the result: what was measured, and what it says of all texts."""
        return {
            "part": self.number,
            "parts": self.of,
            "part_share": self.share,
            "part_seconds": seconds,
            "part_n_texts": len(self.positions),
            "part_n_computed_tokens": n_computed_tokens,
            "seconds": seconds / self.share,
            "n_computed_tokens": self.n_computed_tokens,
        }


def choose_part(
    batches: Sequence[Sequence[int]],
    n_tokens: Sequence[int],
    flops: Sequence[int],
    *,
    part: int,
    parts: int,
    seed: int,
) -> Part:
    """Every ``parts``-th batch of a seeded order, from the ``part``-th on.

    Args:
        batches: Positions of the texts of each batch.
        n_tokens: Computed tokens of each batch.
        flops: Operations of its forward pass.
        part: From 0.

    Raises:
        ContrastRMError: There is no such part, or there are fewer batches than parts.
    """
    if part >= parts or parts > len(batches):
        raise ContrastRMError(f"there is no part {part} of {parts}: {len(batches)} batches, parts count from 0")
    order = sorted(range(len(batches)), key=lambda index: hash_order(seed, str(index)))[part::parts]
    positions = sorted(position for index in order for position in batches[index])
    return Part(part, parts, positions, sum(flops[index] for index in order) / sum(flops), sum(n_tokens))


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    """``--parts`` and ``--part`` of a peer that scores."""
    parser.add_argument("--parts", type=positive, default=1, help="deal the batches out over so many parts")
    parser.add_argument("--part", type=natural, default=0, help="which of them to run, from 0")
