"""Which rows a benchmark runs on: pairs, groups of several answers, texts to score. All by a hash of seed and question or id.

Reads: preference records (``train_pool.jsonl`` of the folder that ``CONTRASTRM_EXTERNAL_DATA`` names, or any file), and
evaluation files in the three formats of the project. Writes: preference records.
Run: ``python -m benchmarks.rows --answers 4 --n 64 --output_file output/benchmarks/groups_of_4.jsonl``

A group of two is a pair as it stands. A larger group joins the rows of one question: the chosen answer of one of its rows,
then, until the group is full and no text stands in it twice, the rejected answers of that row, the rejected ones of the
question's other rows, their chosen ones, and last the rejected answers of the question with the most words in common
(Jaccard), then of the next one. Only questions with at least four answers of their own are taken. No text is made up. Whether
such an answer is really worse does not matter here: these groups measure speed, they teach nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import MODEL_DIR
from codes.common.biases import PAIRWISE, eval_file_name
from codes.common.chat import ChatFormatter, Conversation
from codes.common.cli import positive, run
from codes.common.errors import ContrastRMError
from codes.common.records import (
    Message,
    PreferenceRecord,
    iter_jsonl,
    read_bias_file,
    read_preference_file,
    read_refinement_file,
    write_jsonl,
)
from codes.evaluate.benchmarks import REWARD_BENCH, read_benchmark
from codes.evaluate.eval_rm import REFINEMENT_REQUEST

EXTERNAL_DATA = "CONTRASTRM_EXTERNAL_DATA"
# A larger group takes only questions with so many answers of their own, so that its texts are of one kind.
OWN_ANSWERS = 4


def external_data() -> Path:
    """The folder of public data, which is no part of this repository.

    Raises:
        ContrastRMError: The environment does not name one.
    """
    folder = os.environ.get(EXTERNAL_DATA)
    if not folder or not Path(folder).is_dir():
        raise ContrastRMError(
            f"no public data to measure on: set {EXTERNAL_DATA} to the folder with train_pool.jsonl and judgebias_dev/, "
            "or name files"
        )
    return Path(folder)


def hash_order(seed: int, key: str) -> str:
    """Position of a key in the seeded order; the same whatever stands beside it."""
    return hashlib.sha256(f"{seed}\n{key}".encode()).hexdigest()


@dataclass(frozen=True)
class GroupReport:
    """What the chosen groups are made of: rejected answers by where they come from, and candidates that were too long."""

    n_groups: int
    n_answers: int
    n_own_rejected: int
    n_own_chosen: int
    n_borrowed: int
    n_too_long: int


def choose_groups(
    records: Sequence[PreferenceRecord],
    answers: int,
    n: int,
    *,
    seed: int = 42,
    fits: Callable[[list[Message], Sequence[str]], bool] = lambda messages, texts: True,
) -> tuple[list[PreferenceRecord], GroupReport]:
    """The first ``n`` groups of ``answers`` answers in the seeded order.

    Args:
        answers: Answers of a group, the chosen one among them; 2 takes pairs as they stand.
        fits: Whether a group (its prompt and its answers) is short enough; a group that is not is passed over and counted.

    Raises:
        ContrastRMError: There are not so many.
    """
    if answers < 2:
        raise ContrastRMError("a group has a chosen and at least one rejected answer: --answers 2 or more")
    groups: list[PreferenceRecord] = []
    counts = {"n_own_rejected": 0, "n_own_chosen": 0, "n_borrowed": 0}
    n_too_long = 0
    for group, sources in _candidates(records, answers, seed):
        if len(groups) == n:
            break
        if fits(group.messages, [*group.rejected, group.chosen]):
            groups.append(group)
            counts = {name: count + sources[name] for name, count in counts.items()}
        else:
            n_too_long += 1
    if len(groups) < n:
        raise ContrastRMError(
            f"only {len(groups)} groups of {answers} answers are there ({n_too_long} more are too long), not {n}; lower --n"
        )
    return groups, GroupReport(n_groups=n, n_answers=n * answers, n_too_long=n_too_long, **counts)


def _candidates(
    records: Sequence[PreferenceRecord], answers: int, seed: int
) -> Iterator[tuple[PreferenceRecord, dict[str, int]]]:
    """Groups in the seeded order, each with where its rejected answers come from."""
    if answers == 2:
        for record in sorted(records, key=lambda record: hash_order(seed, record.id)):
            yield _group(record, record.rejected[:1]), {"n_own_rejected": 1, "n_own_chosen": 0, "n_borrowed": 0}
        return
    by_question: dict[str, list[PreferenceRecord]] = {}
    for record in sorted(records, key=lambda record: hash_order(seed, record.id)):
        by_question.setdefault(record.question, []).append(record)
    words = {question: _words(question) for question in by_question}
    for question in sorted(by_question, key=lambda question: hash_order(seed, question)):
        rows = by_question[question]
        chosen = rows[0].chosen
        rejected = list(dict.fromkeys(text for row in rows for text in row.rejected if text != chosen))
        others = list(dict.fromkeys(row.chosen for row in rows if row.chosen not in (chosen, *rejected)))
        if 1 + len(rejected) + len(others) < min(answers, OWN_ANSWERS):
            continue
        own = [*rejected, *others][: answers - 1]
        borrowed: list[str] = []
        if len(own) < answers - 1:
            near = _rejected_of_near_questions(question, by_question, words, seed)
            new = (text for text in near if text not in (chosen, *own))
            borrowed = [text for text, _ in zip(dict.fromkeys(new), range(answers - 1 - len(own)), strict=False)]
        if len(own) + len(borrowed) == answers - 1:
            n_own_rejected = min(len(rejected), len(own))
            sources = {
                "n_own_rejected": n_own_rejected,
                "n_own_chosen": len(own) - n_own_rejected,
                "n_borrowed": len(borrowed),
            }
            yield _group(rows[0], [*own, *borrowed]), sources


def _group(record: PreferenceRecord, rejected: list[str]) -> PreferenceRecord:
    return PreferenceRecord(
        id=record.id,
        messages=record.messages,
        chosen=record.chosen,
        rejected=rejected,
        bias_type=[None] * len(rejected),
        source=record.source,
    )


def _words(question: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", question.lower()))


def _rejected_of_near_questions(
    question: str, by_question: dict[str, list[PreferenceRecord]], words: dict[str, frozenset[str]], seed: int
) -> Iterator[str]:
    """Rejected answers of the other questions, the nearest question first; equally near ones in the seeded order."""
    own = words[question]

    def distance(other: str) -> tuple[float, str]:
        return -len(own & words[other]) / max(1, len(own | words[other])), hash_order(seed, other)

    for other in sorted((other for other in by_question if other != question), key=distance):
        for row in by_question[other]:
            yield from row.rejected


def fits_in(formatter: ChatFormatter, max_length: int) -> Callable[[list[Message], Sequence[str]], bool]:
    """Whether every answer of a group, rendered with its prompt, has at most ``max_length`` tokens."""

    def fits(messages: list[Message], texts: Sequence[str]) -> bool:
        encoded = formatter.encode([Conversation(messages, text) for text in texts])
        return all(len(text.input_ids) <= max_length for text in encoded)

    return fits


@dataclass(frozen=True)
class TextSet:
    """Texts to score, repeated as they stand in the files and in their order.

    Attributes:
        conversations: What is scored.
        fields: Files, rows and questions, for the result.
    """

    conversations: list[Conversation]
    fields: dict[str, Any]


def public_bias_files() -> list[Path]:
    """The nine pairwise files."""
    return [external_data() / "judgebias_dev" / eval_file_name(name) for name in PAIRWISE]


def read_texts(files: Sequence[str | Path], *, percent: float = 100, seed: int = 42) -> TextSet:
    """Read the texts of evaluation files: 4 a pairwise row, 3 a refinement row, 2 a RewardBench row.

    Args:
        percent: So many of a hundred questions, by a hash of seed and question: a question is in or out of all files
            alike, whichever files are read.

    Raises:
        ContrastRMError: A file is missing or of no known format, or no row is left.
    """
    conversations: list[Conversation] = []
    all_questions: set[str] = set()
    questions: set[str] = set()
    n_rows: dict[str, int] = {}
    for file in files:
        n_rows[Path(file).name] = 0
        for question, texts in _rows(Path(file)):
            all_questions.add(question)
            if _is_chosen(question, percent, seed):
                questions.add(question)
                n_rows[Path(file).name] += 1
                conversations += texts
    if not conversations:
        raise ContrastRMError(f"no row is left of {len(all_questions)} questions; raise --percent")
    fields = {
        "rows": n_rows,
        "percent": percent,
        "seed": seed,
        "n_questions": len(questions),
        "n_questions_in_files": len(all_questions),
        "n_texts": len(conversations),
        "n_distinct": len({json.dumps(conversation.turns()) for conversation in conversations}),
    }
    return TextSet(conversations, fields)


def _is_chosen(question: str, percent: float, seed: int) -> bool:
    return int(hash_order(seed, question), 16) < percent / 100 * 2**256


def _rows(file: Path) -> Iterator[tuple[str, list[Conversation]]]:
    """(question, texts) of every row."""
    first: dict[str, Any] = next((row for _, row in iter_jsonl(file)), {})
    if "rewritten_response1" in first:
        for record in read_bias_file(file)[0]:
            prompt = [{"role": "user", "content": record.question}]
            yield record.question, [Conversation(prompt, text) for text in (*record.original, *record.rewritten)]
    elif "rewritten_response" in first:
        for refinement in read_refinement_file(file)[0]:
            prompt = [{"role": "user", "content": refinement.question}]
            history = [
                *prompt,
                {"role": "assistant", "content": refinement.original_response},
                {"role": "user", "content": REFINEMENT_REQUEST},
            ]
            refined, original = refinement.rewritten_response, refinement.original_response
            yield (
                refinement.question,
                [Conversation(prompt, refined), Conversation(history, refined), Conversation(prompt, original)],
            )
    elif "subset" in first:
        for item in read_benchmark(file, REWARD_BENCH)[0]:
            texts = [Conversation(item.messages, answer) for answer in (*item.chosen, *item.rejected)]
            yield json.dumps(item.messages), texts
    else:
        raise ContrastRMError(f"{file} is no evaluation file: its first row has the fields {', '.join(first)}")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Choose the groups that a training benchmark runs on.")
    parser.add_argument(
        "--input_file", default=None, help=f"preference records; default: train_pool.jsonl of {EXTERNAL_DATA}"
    )
    parser.add_argument("--output_file", required=True)
    parser.add_argument("--answers", type=positive, default=2, help="answers of a group; 2: pairs as they stand")
    parser.add_argument("--n", type=positive, required=True, help="groups")
    parser.add_argument("--model_path", default=str(MODEL_DIR), help="whose tokens are counted")
    parser.add_argument("--max_length", type=positive, default=1024, help="most tokens of a text of a chosen group")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the groups and print what they are made of."""
    args = build_parser().parse_args(argv)
    records, _ = read_preference_file(args.input_file or external_data() / "train_pool.jsonl")
    formatter = ChatFormatter(AutoTokenizer.from_pretrained(args.model_path))
    fits = fits_in(formatter, args.max_length)
    groups, report = choose_groups(records, args.answers, args.n, seed=args.seed, fits=fits)
    write_jsonl(args.output_file, [group.to_row() for group in groups])
    print(f"{args.output_file}: {report}")
    return 0


if __name__ == "__main__":
    run(main)
