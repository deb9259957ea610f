"""The honest baseline: still padded, but rows of similar length together, in batches of a token budget.

Training: the groups of a step sorted by their longest row; the step keeps its groups. Scoring: all texts sorted by length,
repeated texts scored again each time.
Run: ``python -m benchmarks.peers.sorted_padded train --train_file output/benchmarks/groups_of_4.jsonl --precision autocast``
or ``python -m benchmarks.peers.sorted_padded score --percent 25 --precision bfloat16``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.padded import (
    PlainModel,
    Step,
    TokenGroup,
    build_padded_parser,
    run_scoring,
    run_training,
    token_budget_batches,
)
from codes.common.cli import positive, run


def sorted_step(positions: Sequence[int], groups: Sequence[TokenGroup], max_tokens: int) -> Step:
    """Micro-batches of whole groups of similar length under the budget."""
    n_rows = [len(groups[index]) for index in positions]
    longest = [max(map(len, groups[index])) for index in positions]
    batches = token_budget_batches(n_rows, longest, max_tokens)
    return [[positions[place] for place in batch] for batch in batches]


def sorted_batches(
    plain: PlainModel, rendered: Sequence[str], max_tokens: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """All texts tokenised, then batches of similar length under the budget."""
    rows = plain.tokenize(rendered)
    for batch in token_budget_batches([1] * len(rows), [len(row) for row in rows], max_tokens):
        yield batch, plain.pad([rows[index] for index in batch])


def main(argv: list[str] | None = None) -> int:
    """Run one task and print its JSON line."""
    parser, parsers = build_padded_parser("Length-sorted, padded training and scoring.")
    for task in parsers.values():
        task.add_argument("--max_tokens", type=positive, default=4096, help="padded tokens of a batch")
    options = vars(parser.parse_args(argv))
    max_tokens = options["max_tokens"]
    if options.pop("task") == "train":
        run_training("sorted_padded", partial(sorted_step, max_tokens=max_tokens), **options)
    else:
        run_scoring("sorted_padded", partial(sorted_batches, max_tokens=max_tokens), **options)
    return 0


if __name__ == "__main__":
    run(main)
