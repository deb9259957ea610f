"""The method's original loops: rows in the order of the file, every batch padded to its longest row, nothing shared.

Training: the groups of a micro-batch flattened, one forward pass, contrastive loss, AdamW. Scoring: 32 texts at a time as they
stand in the files, repeated texts again and again.
Run: ``python -m benchmarks.peers.original_loop train --train_file output/benchmarks/groups_of_4.jsonl --precision autocast``
or ``python -m benchmarks.peers.original_loop score --percent 25 --precision bfloat16``
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
    in_order,
    run_scoring,
    run_training,
)
from codes.common.cli import positive, run


def in_file_order(positions: Sequence[int], micro_batch_size: int) -> Step:
    """Micro-batches of so many groups, in the order of the file."""
    starts = range(0, len(positions), micro_batch_size)
    return [list(positions[start : start + micro_batch_size]) for start in starts]


def batches_in_file_order(
    plain: PlainModel, rendered: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """So many texts at a time, tokenised and padded as one batch."""
    for positions in in_order(rendered, batch_size):
        texts = [rendered[index] for index in positions]
        batch = plain.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(plain.device)
        yield list(positions), batch


def main(argv: list[str] | None = None) -> int:
    """Run one task and print its JSON line."""
    parser, parsers = build_padded_parser("The original training and scoring loops.")
    parsers["train"].add_argument(
        "--micro_batch_size", type=positive, default=None, help="groups computed at once; default: --groups_per_step"
    )
    parsers["score"].add_argument("--batch_size", type=positive, default=32, help="texts of a batch")
    options = vars(parser.parse_args(argv))
    if options.pop("task") == "train":
        size = options.pop("micro_batch_size") or options["groups_per_step"]

        def split(positions: Sequence[int], groups: Sequence[TokenGroup]) -> Step:
            return in_file_order(positions, size)

        run_training("original_loop", split, **options, micro_batch_size=size)
    else:
        batches = partial(batches_in_file_order, batch_size=options["batch_size"])
        run_scoring("original_loop", batches, **options)
    return 0


if __name__ == "__main__":
    run(main)
