"""How many tokens are computed for the same texts: padded in file order, plain, distinct, with shared prefixes.

Reads: evaluation files or preference records, and the tokenizer of the benchmark model; computes nothing else. ``two_levels`` is
one shared prompt for each question, ``tree`` shares what the answers of a question begin with too, ``packs`` is what the packs of
a token budget really hold (the beginning that all prompts share counts once in each pack).
Run: ``python -m benchmarks.sharing`` (the nine pairwise public files), ``--files F …`` or ``--train_file F``
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.common import MODEL_DIR, write_line
from benchmarks.padded import load_plain_tokenizer
from benchmarks.rows import public_bias_files, read_texts
from codes.common.chat import ChatFormatter, Conversation
from codes.common.cli import positive, run
from codes.common.packing import as_array, build_pack, common_prefix, plan_packs, shared_tokens
from codes.common.records import messages_to_text, read_preference_file

BUDGETS = (2048, 16384)


def count_tokens(texts: Sequence[tuple[str, tuple[int, ...]]], batch_size: int) -> dict[str, Any]:
    """Computed tokens of (question, ids) in the order of the file.

    Args:
        batch_size: Texts of a batch of the padded count.
    """
    ids = [tokens for _, tokens in texts]
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    questions: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for question, tokens in dict.fromkeys(texts):
        questions[question].append(tokens)
    distinct = list(dict.fromkeys(ids))
    counts: dict[str, Any] = {
        "n_texts": len(ids),
        "n_distinct": len(distinct),
        "n_questions": len(questions),
        "padded": sum(len(batch) * max(map(len, batch)) for batch in batches),
        "plain": sum(map(len, ids)),
        "distinct": sum(map(len, distinct)),
        "two_levels": sum(_two_levels(answers) for answers in questions.values()),
        "tree": sum(shared_tokens(answers) for answers in questions.values()),
    }
    for budget in BUDGETS:
        packs = plan_packs(distinct, budget)
        counts[f"packs_{budget}"] = sum(
            build_pack([distinct[index] for index in pack]).layout.n_tokens for pack in packs
        )
    return counts


def _two_levels(answers: Sequence[tuple[int, ...]]) -> int:
    arrays = [as_array(ids) for ids in answers]
    prompt = min(common_prefix(arrays[0], array) for array in arrays)
    return prompt + sum(len(array) - prompt for array in arrays)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Count the tokens that each way of batching computes.")
    parser.add_argument("--model_path", default=str(MODEL_DIR), help="whose tokenizer")
    parser.add_argument("--files", nargs="+", default=None, help="evaluation files; default: the nine pairwise ones")
    parser.add_argument("--train_file", default=None, help="preference records instead")
    parser.add_argument("--batch_size", type=positive, default=32, help="of the padded count")
    parser.add_argument("--output_file", default=None)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Count, and print one JSON line."""
    args = build_parser().parse_args(argv)
    if args.train_file:
        records = read_preference_file(args.train_file)[0]
        conversations = [
            Conversation(record.messages, answer) for record in records for answer in (*record.rejected, record.chosen)
        ]
    else:
        conversations = list(read_texts(args.files or public_bias_files(), percent=100, seed=0).conversations)
    encoded = ChatFormatter(load_plain_tokenizer(args.model_path)).encode(conversations)
    texts = [
        (messages_to_text(conversation.messages), text.input_ids)
        for conversation, text in zip(conversations, encoded, strict=True)
    ]
    counts = count_tokens(texts, args.batch_size)
    counts["padded_over_packs"] = counts["padded"] / counts[f"packs_{BUDGETS[0]}"]
    source = args.train_file or ", ".join(args.files or ["the nine pairwise public files"])
    write_line({"task": "sharing", "source": source, "batch_size": args.batch_size} | counts, args.output_file)
    return 0


if __name__ == "__main__":
    run(main)
