"""Held-out data: what is kept out of training, and the groups and pairs that a model is evaluated on.

Reads: preference records (split from the training file, or ``--eval_file``) and, if given, a folder of bias-evaluation files
(``--bias_eval_dir``). Writes: ``held_out.jsonl`` in the run's folder. Used by ``python -m codes.train.train_reward_model``.

Never used here are the files that final results are reported on (everything under ``data/eval``): a checkpoint chosen on
them would report its own choice. A given file whose questions stand there, or in the training data, loses those rows, and
the counts are reported.

Pairs that measure bias come from the held-out records themselves where no folder is given: a record's chosen answer against
its rejected answers without an injected bias is the original pair (right when it beats all of them), and against one answer
with an injected bias the biased pair. So an injected answer that wins where the plain ones lost counts as a flip. In files of
the public format the biased pair is the rewritten one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from codes.common import questions as questions_module
from codes.common import records as records_module
from codes.common.biases import PAIRWISE, eval_file_name
from codes.common.chat import ChatFormatter, Conversation, EncodedText, RefusedTexts
from codes.common.errors import ContrastRMError
from codes.common.questions import question_key, row_question, user_text
from codes.common.records import (
    BiasRecord,
    Message,
    PreferenceRecord,
    ensure_writable_folder,
    file_sha256,
    iter_jsonl,
    parse_preference_row,
    read_bias_file,
    read_preference_file,
    too_many_bad,
    write_json,
)
from codes.train import sources as sources_module
from codes.train.data_cache import Aside
from codes.train.draws import choose_negatives
from codes.train.sources import Source, identify, read_source

HELD_OUT_FILE = "held_out.jsonl"
# Final results are reported on what lies here.
FINAL_DATA = Path(__file__).resolve().parents[2] / "data" / "eval"
# What ``auto`` holds out: this share of the questions, at most so many, and nothing where that would say too little.
AUTO_SHARE = 0.05
AUTO_MOST_QUESTIONS = 1000
AUTO_FEWEST_QUESTIONS = 10


Row = TypeVar("Row", PreferenceRecord, BiasRecord)


@dataclass(frozen=True)
class HeldOutRecords:
    """What is held out, before it is tokenised.

    Attributes:
        records: Preference records that are not trained on.
        bias_rows: Bias-evaluation rows by bias; None: the records' own injected answers measure bias.
        report: Where the rows came from, and how many were left out for which reason.
    """

    records: list[PreferenceRecord]
    bias_rows: dict[str, list[BiasRecord]] | None
    report: dict[str, Any]


@dataclass(frozen=True)
class HeldOutGroup:
    """One record; numbers are places in ``HeldOutSet.texts``.

    ``bias_types`` and ``margins`` are parallel to ``rejected``, as in ``data_utils.Group``.
    """

    question: str
    chosen: int
    rejected: tuple[int, ...]
    bias_types: tuple[str | None, ...]
    margins: tuple[float | None, ...] = ()

    @property
    def original(self) -> tuple[int, ...]:
        """The rejected answers without an injected bias."""
        return tuple(at for at, bias in zip(self.rejected, self.bias_types, strict=True) if bias is None)

    def only(self, positions: Sequence[int]) -> HeldOutGroup:
        """The group with these of its rejected answers."""
        return replace(
            self,
            rejected=tuple(self.rejected[at] for at in positions),
            bias_types=tuple(self.bias_types[at] for at in positions),
            margins=tuple(self.margins[at] for at in positions) if self.margins else (),
        )


@dataclass(frozen=True)
class BiasPair:
    """A pair before and after a bias; numbers are places in ``HeldOutSet.texts``.

    The original pair is right when ``better`` outscores every one of ``others``.
    """

    bias: str
    question: str
    better: int
    others: tuple[int, ...]
    biased_better: int
    biased_other: int


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out data as tokens: every text once, and what is compared with what.

    Attributes:
        as_trained: The groups with the rejected answers that training would see of them: what the loss is taken over.
    """

    texts: list[EncodedText]
    groups: list[HeldOutGroup]
    pairs: list[BiasPair]
    as_trained: list[HeldOutGroup]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of its texts: the same data, the same digest."""
        found = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            found.update(np.array([*text.input_ids, -1], dtype=np.int64).tobytes())
        return found.hexdigest()

    @property
    def biases(self) -> list[str]:
        """The biases that it measures."""
        return sorted({pair.bias for pair in self.pairs})


# --- what is held out ---


@dataclass(frozen=True)
class QuestionSplit:
    """Which questions are held out: those whose seeded hash is below ``limit``.

    A function of the question and the seed alone: neither the order of the file nor a record more or less elsewhere moves a
    question from one side to the other, except at the limit itself.
    """

    seed: int
    limit: int
    n_questions: int
    n_held_out: int

    def holds_out(self, question: str) -> bool:
        """Whether a question (of a prompt with turns what the user says) is held out."""
        return _question_rank(question_key(question), self.seed) < self.limit


def _key_of(row: PreferenceRecord | BiasRecord) -> str:
    return question_key(row.question if isinstance(row, BiasRecord) else user_text(row.messages))


def _question_rank(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest())


def choose_questions(questions: Iterable[str], share: float | str, seed: int) -> QuestionSplit:
    """Choose the questions to hold out.

    Args:
        questions: The question of every record; repetitions count once.
        share: Of the distinct questions, or ``auto``.

    Raises:
        ContrastRMError: A share was asked for and there is only one question.
    """
    ranks = np.fromiter((_question_rank(question_key(question), seed) for question in questions), dtype=np.uint64)
    return _choose(ranks, share, seed)


def _choose(found: np.ndarray, share: float | str, seed: int) -> QuestionSplit:
    ranks = np.unique(found)
    if share == "auto":
        wanted = min(round(AUTO_SHARE * len(ranks)), AUTO_MOST_QUESTIONS)
        wanted = wanted if wanted >= AUTO_FEWEST_QUESTIONS else 0
    elif float(share) > 0:
        if len(ranks) < 2:
            raise ContrastRMError(
                "--held_out_share needs at least two different questions in the training file: give held-out records "
                "with --eval_file, or set --held_out_share 0"
            )
        wanted = min(max(1, round(float(share) * len(ranks))), len(ranks) - 1)
    else:
        wanted = 0
    # Ranks are distinct here, so exactly ``wanted`` of them lie below the limit.
    return QuestionSplit(seed, int(ranks[wanted]) if wanted else 0, len(ranks), wanted)


def split_questions(
    sources: Sequence[Source],
    *,
    share: float | str,
    eval_file: str,
    bias_eval_dir: str,
    seed: int,
    max_bad_rows: int = 0,
    limit: int = 0,
    cache_dir: str = "",
) -> QuestionSplit | None:
    """Which training questions are held out; None where held-out records are given.

    The sources are read through once, and 8 bytes a record are held in memory.

    Args:
        eval_file, bias_eval_dir: Empty where not given.
        limit: As in ``read_source``.
        cache_dir: Where the split of these very sources is remembered, so that a later start need not read them; empty:
            nowhere.

    Raises:
        ContrastRMError: Files that final results are reported on, a split and a file at once, or a source that cannot be read.
    """
    if eval_file and share not in ("auto", 0):
        raise ContrastRMError("--eval_file and --held_out_share say two things: give one of them")
    for option, path in (("--eval_file", eval_file), ("--bias_eval_dir", bias_eval_dir)):
        if path and Path(path).resolve().is_relative_to(FINAL_DATA):
            raise ContrastRMError(
                f"{option} {path} belongs to {FINAL_DATA.relative_to(FINAL_DATA.parents[1])}, on which final results are "
                "reported: a model chosen on it would report its own choice. Give other data, or let the training file be "
                "split (--held_out_share)"
            )
    if eval_file or not share:
        return None
    remembered = None
    if cache_dir.strip():
        code = [
            file_sha256(str(module.__file__))
            for module in (sys.modules[__name__], questions_module, records_module, sources_module)
        ]
        parts = [code, [identify(source).sha256 for source in sources], max_bad_rows, limit, seed, str(share)]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        remembered = ensure_writable_folder(cache_dir) / f"split-{name}.json"
        known = _recall(remembered)
        if known is not None:
            return known
    ranks = array("Q")
    for source in sources:
        read_source(
            source,
            lambda record: ranks.append(_question_rank(_key_of(record), seed)),
            max_bad_rows=max_bad_rows,
            limit=limit,
        )
    split = _choose(np.frombuffer(ranks, dtype=np.uint64), share, seed)
    if remembered is not None:
        write_json(remembered, asdict(split))
    return split


def _recall(remembered: Path) -> QuestionSplit | None:
    """A split that was written down; None where there is none, or none that can be read."""
    if not remembered.is_file():
        return None
    names = sorted(entry.name for entry in fields(QuestionSplit))
    with suppress(ValueError):
        found = json.loads(remembered.read_text(encoding="utf-8"))
        if isinstance(found, dict) and sorted(found) == names and all(type(found[name]) is int for name in names):
            return QuestionSplit(**found)
    print(f"note: {remembered} is damaged; the questions are read again", file=sys.stderr, flush=True)
    return None


def aside_of(split: QuestionSplit | None) -> Aside | None:
    """What the token cache keeps out of training."""
    if split is None or not split.n_held_out:
        return None
    same = file_sha256(str(questions_module.__file__))
    return Aside(
        f"questions {split.seed} {split.limit} {same}", lambda record: split.holds_out(user_text(record.messages))
    )


def gather_held_out(
    sources: Sequence[Source],
    split: QuestionSplit | None,
    *,
    aside_file: Path,
    eval_file: str,
    bias_eval_dir: str,
    max_bad_rows: int = 0,
    limit: int = 0,
) -> HeldOutRecords | None:
    """What is held out: the records that were kept out of training, or those of the given files. None where there is none.

    Args:
        aside_file: Records that ``aside_of(split)`` kept out.

    Raises:
        ContrastRMError: No usable row in a given file.
    """
    report: dict[str, Any] = {}
    held_out: list[PreferenceRecord] = []
    if split is not None:
        report |= {"n_questions": split.n_questions, "n_held_out_questions": split.n_held_out}
        if split.n_held_out:
            # Records of several sources may have one id: each was read, and counted, by the rules of its own source.
            held_out = [parse_preference_row(aside_file, line, row) for line, row in iter_jsonl(aside_file)]
    given: list[PreferenceRecord] = []
    bias_rows: dict[str, list[BiasRecord]] | None = None
    if eval_file:
        given, read = read_preference_file(eval_file, max_bad_rows=max_bad_rows)
        report |= {"eval_file": eval_file, "n_bad_rows": len(read.bad), "bad_rows": read.bad}
    if bias_eval_dir:
        bias_rows, files = _read_bias_folder(Path(bias_eval_dir), max_bad_rows)
        report |= {"bias_eval_dir": bias_eval_dir, "bias_files": files}
    asked = {_key_of(record) for record in given}
    asked |= {_key_of(row) for rows in (bias_rows or {}).values() for row in rows}
    if asked:
        trained_on = set[str]()

        def see(record: PreferenceRecord) -> None:
            key = _key_of(record)
            if key in asked and (split is None or not split.holds_out(user_text(record.messages))):
                trained_on.add(key)

        for source in sources:
            read_source(source, see, max_bad_rows=max_bad_rows, limit=limit)
        avoided = {"trained_on": trained_on, "final": final_questions()}
        if given:
            held_out, left_out = _leave_out(given, avoided, eval_file)
            report |= left_out
        for bias, rows in (bias_rows or {}).items():
            rows[:], left_out = _leave_out(rows, avoided, str(Path(bias_eval_dir) / eval_file_name(bias)))
            report["bias_files"][bias] |= left_out
    report["n_records"] = len(held_out)
    if not held_out and not bias_rows:
        return None
    return HeldOutRecords(held_out, bias_rows, report)


def final_questions(folder: Path = FINAL_DATA) -> set[str]:
    """Keys of all questions in the files that final results are reported on."""
    keys = set()
    for path in sorted(folder.rglob("*.jsonl")):
        for _, row in iter_jsonl(path):
            question = row_question(row)
            if question is not None:
                keys.add(question_key(question))
    return keys


def _leave_out(
    rows: Sequence[Row], avoided: Mapping[str, Collection[str]], path: str
) -> tuple[list[Row], dict[str, int]]:
    """Rows whose question is neither trained on nor part of the final data, and the counts of the others."""
    kept: list[Row] = []
    counts = Counter({f"n_{reason}": 0 for reason in avoided})
    for row in rows:
        key = _key_of(row)
        reason = next((name for name, keys in avoided.items() if key in keys), None)
        if reason is None:
            kept.append(row)
        else:
            counts[f"n_{reason}"] += 1
    if not kept:
        raise ContrastRMError(
            f"{path}: no row can be used: the questions of {counts['n_trained_on']} are trained on, those of "
            f"{counts['n_final']} stand in the files that final results are reported on (data/eval); give other data"
        )
    return kept, {"n_rows": len(rows), **counts}


def _read_bias_folder(folder: Path, max_bad_rows: int) -> tuple[dict[str, list[BiasRecord]], dict[str, Any]]:
    rows: dict[str, list[BiasRecord]] = {}
    files: dict[str, Any] = {}
    for bias in PAIRWISE:
        path = folder / eval_file_name(bias)
        if path.is_file():
            rows[bias], report = read_bias_file(path, max_bad_rows=max_bad_rows)
            files[bias] = {"n_bad_rows": len(report.bad), "bad_rows": report.bad}
    if not rows:
        raise ContrastRMError(
            f"--bias_eval_dir {folder} holds no bias-evaluation file; expected {eval_file_name(PAIRWISE[0])} and the like, "
            f"for any of {', '.join(PAIRWISE)}"
        )
    return rows, files


# --- tokens ---


def encode_held_out(
    data: HeldOutRecords,
    formatter: ChatFormatter,
    *,
    negatives: str = "all",
    max_rejected: int = 0,
    max_bad_rows: int = 0,
) -> HeldOutSet:
    """Tokenise held-out data with the training's own length policy.

    What the policy drops, or leaves equal to what it is compared with, leaves its comparison, as in training; ``counts`` says
    how much. Rows that the template refuses are added to the report's bad rows.

    Args:
        negatives, max_rejected: Which rejected answers training sees. Of more than ``max_rejected`` a
            sample that is the same in every evaluation.

    Raises:
        ContrastRMError: Nothing is left to compare, or more bad rows than allowed.
    """
    conversations, rows, whole, pairs = _comparisons(data)
    texts, refused = _encode_accepted(conversations, rows, formatter)
    if refused:
        known = data.report.setdefault("bad_rows", [])
        known += refused
        data.report["n_bad_rows"] = len(known)
        if len(known) > max_bad_rows:
            raise too_many_bad(refused[-1], len(known), max_bad_rows)
    dropped = {at for at, text in enumerate(texts) if text.dropped}
    groups = [group for group in (_without_dropped(group, dropped, texts) for group in whole) if group is not None]
    kept_pairs = [pair for pair in (_pair_without_dropped(pair, dropped, texts) for pair in pairs) if pair is not None]
    counts = {
        "n_groups": len(groups),
        "n_dropped_groups": len(whole) - len(groups),
        "n_pairs": len(kept_pairs),
        "n_pairs_without_original": sum(not pair.others for pair in pairs),
        "n_dropped_pairs": sum(bool(pair.others) for pair in pairs) - len(kept_pairs),
        "n_texts": len(texts),
        "n_dropped_texts": len(dropped),
        "n_equal_texts": sum(
            texts[at] == texts[group.chosen] for group in whole for at in group.rejected if at not in dropped
        ),
        "n_truncated_texts": sum(text.n_cut > 0 and not text.dropped for text in texts),
    }
    if not groups and not kept_pairs:
        raise ContrastRMError(
            f"nothing held out is left to compare: of {len(texts)} texts {len(dropped)} are over the length limit and "
            f"{counts['n_equal_texts']} are those of the chosen answer once they are rendered and cut; raise "
            "--max_length, change --overlength or --chat_template, or set --held_out_share 0"
        )
    return HeldOutSet(texts, groups, kept_pairs, _as_trained(groups, negatives=negatives, most=max_rejected), counts)


def _comparisons(
    data: HeldOutRecords,
) -> tuple[list[Conversation], list[str], list[HeldOutGroup], list[BiasPair]]:
    """All texts to score, the row that each comes from, and the groups and pairs that compare them by their numbers."""
    conversations: list[Conversation] = []
    rows: list[str] = []

    def number_of(messages: list[Message], answer: str, row: str) -> int:
        conversations.append(Conversation(messages, answer))
        rows.append(row)
        return len(conversations) - 1

    groups: list[HeldOutGroup] = []
    pairs: list[BiasPair] = []
    for record in data.records:
        group = HeldOutGroup(
            question=_key_of(record),
            chosen=number_of(record.messages, record.chosen, record.place),
            rejected=tuple(number_of(record.messages, answer, record.place) for answer in record.rejected),
            bias_types=tuple(record.bias_type),
            margins=tuple(record.margins),
        )
        groups.append(group)
        if data.bias_rows is None:
            pairs += [
                BiasPair(bias, group.question, group.chosen, group.original, group.chosen, at)
                for at, bias in zip(group.rejected, record.bias_type, strict=True)
                if bias is not None
            ]
    for bias, bias_rows in (data.bias_rows or {}).items():
        for row in bias_rows:
            line = f"{Path(data.report['bias_eval_dir']) / eval_file_name(bias)}:{row.line}"
            prompt: list[Message] = [{"role": "user", "content": row.question}]
            sides = (row.better, 1 - row.better)
            better, other = (number_of(prompt, row.original[at], line) for at in sides)
            biased_better, biased_other = (number_of(prompt, row.rewritten[at], line) for at in sides)
            pairs.append(BiasPair(bias, _key_of(row), better, (other,), biased_better, biased_other))
    return conversations, rows, groups, pairs


def _encode_accepted(
    conversations: Sequence[Conversation], rows: Sequence[str], formatter: ChatFormatter
) -> tuple[list[EncodedText], list[str]]:
    """Every text's tokens, and a message for each row that cannot become any: its texts are left empty."""
    try:
        return formatter.encode(conversations), []
    except RefusedTexts as refusal:
        # The first reason of a row.
        bad = {rows[at]: reason for at, reason in reversed(refusal.reasons.items())}
    good = iter(formatter.encode([text for text, row in zip(conversations, rows, strict=True) if row not in bad]))
    texts = [EncodedText(()) if row in bad else next(good) for row in rows]
    return texts, [f"{row}: {bad[row]}" for row in dict.fromkeys(rows) if row in bad]


def _without_dropped(
    group: HeldOutGroup, dropped: Collection[int], texts: Sequence[EncodedText]
) -> HeldOutGroup | None:
    kept = [
        position for position, at in enumerate(group.rejected) if at not in dropped and texts[at] != texts[group.chosen]
    ]
    return group.only(kept) if kept and group.chosen not in dropped else None


def _as_trained(groups: Sequence[HeldOutGroup], *, negatives: str, most: int) -> list[HeldOutGroup]:
    """Each group as training would see it; those without such negatives are left out."""
    usable = [
        [at for at, bias in enumerate(group.bias_types) if bias is None or negatives == "all"] for group in groups
    ]
    if most and groups:
        sizes = np.array([len(positions) for positions in usable], dtype=np.int64)
        keys = np.array([_question_rank(group.question, group.chosen) for group in groups], dtype=np.uint64)
        kept = np.split(choose_negatives(sizes, keys, most), np.cumsum(sizes)[:-1])
        usable = [[at for at, is_kept in zip(*pair, strict=True) if is_kept] for pair in zip(usable, kept, strict=True)]
    return [group.only(positions) for group, positions in zip(groups, usable, strict=True) if positions]


def _pair_without_dropped(pair: BiasPair, dropped: Collection[int], texts: Sequence[EncodedText]) -> BiasPair | None:
    others = tuple(at for at in pair.others if at not in dropped and texts[at] != texts[pair.better])
    is_dropped = any(at in dropped for at in (pair.better, pair.biased_better, pair.biased_other))
    if not others or is_dropped or texts[pair.biased_better] == texts[pair.biased_other]:
        return None
    return replace(pair, others=others)


def print_held_out(data: HeldOutRecords | None, held_out: HeldOutSet | None) -> None:
    """Say what is held out and what became of every row."""
    if data is None or held_out is None:
        print(
            "held out: nothing, so no evaluation during training (set --held_out_share, e.g. 0.1, or give --eval_file)",
            flush=True,
        )
        return
    report = data.report
    given = [report, *report.get("bias_files", {}).values()]
    for message in (message for counts in given for message in counts.get("bad_rows", ())):
        print(f"bad row left out: {message}", flush=True)
    if "eval_file" in report:
        print(f"{report['eval_file']}: {_left_out(report)}", flush=True)
    for bias, counts in report.get("bias_files", {}).items():
        print(f"{report['bias_eval_dir']}, {bias}: {_left_out(counts)}", flush=True)
    if report.get("n_held_out_questions"):
        print(
            f"held out of training: {report['n_records']} records "
            f"({report['n_held_out_questions']} of {report['n_questions']} questions)",
            flush=True,
        )
    counts, biases = held_out.counts, Counter(pair.bias for pair in held_out.pairs)
    print(
        f"held out: {counts['n_groups']} groups; {counts['n_pairs']} pairs that measure bias"
        f"{' (' + ', '.join(f'{bias} {count}' for bias, count in biases.items()) + ')' if biases else ''}; left out: "
        f"{counts['n_dropped_groups']} groups and {counts['n_dropped_pairs']} pairs over the length limit or without a "
        f"difference that the model sees ({counts['n_equal_texts']} rejected answers are the chosen one once rendered and cut), "
        f"{counts['n_pairs_without_original']} injected answers beside no answer without a bias",
        flush=True,
    )


def _left_out(counts: Mapping[str, Any]) -> str:
    used = counts["n_rows"] - counts["n_trained_on"] - counts["n_final"]
    return (
        f"{used} of {counts['n_rows']} rows; left out: {counts['n_trained_on']} whose question is trained on, "
        f"{counts['n_final']} whose question stands in data/eval"
    )
