"""``transformers.pipeline("text-classification")`` over the rendered conversations, raw scores, 32 at a time.

Run: ``python -m benchmarks.peers.pipeline_scoring --percent 25 --precision bfloat16``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import pipeline

from benchmarks.common import PeakMemory, model_fields, now, write_line
from benchmarks.padded import (
    PlainModel,
    add_scoring_arguments,
    in_order,
    load_plain_model,
    read_asked_texts,
    scoring_fields,
)
from codes.common.chat import Conversation
from codes.common.cli import positive, run


def score_with_pipeline(plain: PlainModel, conversations: Sequence[Conversation], batch_size: int) -> dict[str, Any]:
    """Scores, seconds, computed tokens and peak memory as the padded peers give them."""
    classifier = pipeline("text-classification", model=plain.model, tokenizer=plain.tokenizer, device=plain.device)
    # The template has written BOS already.
    settings = {"function_to_apply": "none", "add_special_tokens": False}
    memory = PeakMemory(plain.device)
    with plain.autocast():
        classifier(plain.render(conversations[:1]), **settings)  # the first call sets things up
        memory.reset()
        begin = now(plain.device)
        found = classifier(plain.render(conversations), batch_size=batch_size, **settings)
        seconds = now(plain.device) - begin
    peak = memory.fields()
    lengths = [len(row) for row in plain.tokenize(plain.render(conversations))]
    batches = [[lengths[index] for index in batch] for batch in in_order(lengths, batch_size)]
    result = {
        "scores": [one["score"] for one in found],
        "seconds": seconds,
        "n_computed_tokens": sum(len(batch) * max(batch) for batch in batches),
    }
    return result | peak


def main(argv: list[str] | None = None) -> int:
    """Score and print the JSON line."""
    parser = argparse.ArgumentParser(description="Scoring with transformers.pipeline.")
    add_scoring_arguments(parser)
    parser.add_argument("--batch_size", type=positive, default=32, help="texts of a batch")
    args = parser.parse_args(argv)
    texts = read_asked_texts(args.files, args.percent, args.seed)
    plain = load_plain_model(args.model_path, precision=args.precision, device=args.device)
    lengths = [len(row) for row in plain.tokenize(plain.render(texts.conversations))]
    result = score_with_pipeline(plain, texts.conversations, args.batch_size)
    fields = {
        "peer": "pipeline_scoring",
        "precision": args.precision,
        "device": str(plain.device),
        "batch_size": args.batch_size,
        **scoring_fields(result, texts, sum(lengths), args.scores_file),
    }
    write_line(fields | model_fields(args.model_path), args.output_file)
    return 0


if __name__ == "__main__":
    run(main)
