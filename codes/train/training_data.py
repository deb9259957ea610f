"""From ``--train_file`` to the groups of a run: sources, tokenizer, cache, draws and held-out questions put together.

Used by ``python -m codes.train.train_reward_model``, for training and for ``--estimate 1``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError
from codes.train.contamination import CONTAMINATION_FILE, check_contamination, describe, expand_files
from codes.train.data_cache import Aside, TokenCache, load_training_groups, tokenizer_sha256
from codes.train.data_utils import EncodeReport
from codes.train.draws import Draws
from codes.train.held_out import (
    HeldOutRecords,
    HeldOutSet,
    QuestionSplit,
    aside_of,
    encode_held_out,
    gather_held_out,
    split_questions,
)
from codes.train.losses import check_an_answer_counts, without_effect
from codes.train.reward_model import embedding_rows, load_without_weights, own_length_limit
from codes.train.settings import Objective, TrainSettings
from codes.train.sources import Source, SourceIdentity, combined_sha256, parse_sources


@dataclass(frozen=True)
class TrainingData:
    """The data of a run, the same on every rank.

    Attributes:
        without_effect: Settings that can change nothing, each with the reason.
        max_length: The limit in force: the smaller of the one asked for and the model's own; None without either.
        tokenizer_sha256: Of everything that turns a conversation into ids.
    """

    sources: Sequence[Source]
    cache: TokenCache
    draws: Draws
    max_length: int | None
    tokenizer_sha256: str
    without_effect: Sequence[str] = ()

    @property
    def report(self) -> EncodeReport:
        """The counts of all sources."""
        return self.cache.report

    @property
    def sha256(self) -> str:
        """Of the sources' content; of a single file its own."""
        return combined_sha256({counts.location: SourceIdentity(counts.sha256) for counts in self.cache.source_counts})

    @property
    def verdicts(self) -> dict[str, int]:
        """Records by ``verify_correctness``."""
        return self._added("verdicts")

    @property
    def origins(self) -> dict[str, int]:
        """Groups by the ``source`` that their records name."""
        return self._added("origins")

    @property
    def biases(self) -> dict[str, int]:
        """Rejected answers of the groups by injected bias; ``original``: none."""
        return self._added("biases")

    def _added(self, name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(counts, name)) for counts in self.cache.source_counts), Counter[str]()))

    @property
    def bad(self) -> list[str]:
        """One message a bad row."""
        return [message for counts in self.cache.source_counts for message in counts.bad]

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must have been trained on to be continued."""
        return {
            "train_file_sha256": self.sha256,
            "source_weights": [source.weight for source in self.sources],
            "tokenizer_sha256": self.tokenizer_sha256,
            "max_length": self.max_length,
            "n_groups": len(self.cache),
            "n_tokens": self.report.n_tokens,
        }

    def source_rows(self) -> list[dict[str, Any]]:
        """One JSON object a source: what was read of it, and what it gives to an epoch."""
        quotas = self.draws.quotas or self.cache.sizes
        rows = []
        for source, counts, quota in zip(self.sources, self.cache.source_counts, quotas, strict=True):
            row = asdict(counts) | {"location": source.location, "weight": source.weight, "groups_an_epoch": quota}
            encoded = row.pop("encoded")
            row["n_bad_rows"] = len(row.pop("bad"))
            rows.append(row | encoded)
        return rows


def open_training_data(settings: TrainSettings, *, aside: Aside | None = None) -> TrainingData:
    """Read and tokenise the sources (or find them tokenised), and draw the groups of the run.

    No model weights are needed, only configuration and tokenizer.

    Raises:
        ContrastRMError: Anything that is wrong with the data, named with its place.
    """
    options, optimizer = settings.data, settings.optimizer
    if settings.seed >= 2**32:
        raise ContrastRMError(f"--seed {settings.seed} is too large: numpy and torch take seeds below 2**32")
    if not options.cache_dir.strip():
        raise ContrastRMError("--cache_dir is empty: name a folder for the tokenised data")
    sources = parse_sources(options.train_file)
    shape, tokenizer = load_without_weights(
        settings.model.model_path,
        chat_template=settings.model.chat_template,
        trust_remote_code=settings.model.trust_remote_code,
    )
    own_limit = own_length_limit(shape, tokenizer)
    limit_in_force = min((length for length in (options.max_length, own_limit) if length), default=None)
    formatter = ChatFormatter(
        tokenizer,
        max_length=limit_in_force,
        overlength=options.overlength,
        n_embeddings=embedding_rows(shape, tokenizer),
    )
    cache = load_training_groups(
        sources,
        formatter,
        cache_dir=options.cache_dir,
        negatives=options.negatives,
        limit=options.limit,
        max_bad_rows=options.max_bad_rows,
        aside=aside,
    )
    draws = Draws(
        cache,
        [source.weight for source in sources],
        global_batch_size=optimizer.global_batch_size,
        epochs=optimizer.epochs,
        max_steps=optimizer.max_steps,
        seed=settings.seed,
        max_rejected=options.max_rejected,
    )
    data = TrainingData(sources, cache, draws, limit_in_force, tokenizer_sha256(formatter))
    return replace(data, without_effect=_without_effect(data, settings.objective, options.max_rejected))


def split_training_data(settings: TrainSettings) -> tuple[TrainingData, QuestionSplit | None]:
    """The data of a run without what it holds out, and which questions these are.

    Raises:
        ContrastRMError: As ``open_training_data``; or nothing can be held out as asked.
    """
    options, held_out = settings.data, settings.held_out
    split = split_questions(
        parse_sources(options.train_file),
        share=held_out.held_out_share,
        eval_file=held_out.eval_file,
        bias_eval_dir=held_out.bias_eval_dir,
        seed=settings.seed,
        max_bad_rows=options.max_bad_rows,
        limit=options.limit,
        cache_dir=options.cache_dir,
    )
    return open_training_data(settings, aside=aside_of(split)), split


def load_data(settings: TrainSettings) -> tuple[TrainingData, HeldOutRecords | None]:
    """The data of a run and what is held out of it, checked against the evaluation files where that is to stop a run.

    Raises:
        ContrastRMError: As ``split_training_data``; or contamination. On every rank: where one alone stops, the others wait.
    """
    options = settings.data
    data, split = split_training_data(settings)
    held_out = gather_held_out(
        data.sources,
        split,
        aside_file=data.cache.aside_file,
        eval_file=settings.held_out.eval_file,
        bias_eval_dir=settings.held_out.bias_eval_dir,
        max_bad_rows=options.max_bad_rows,
        limit=options.limit,
    )
    if options.fail_on_contamination:
        stop_on_contamination(find_contamination(settings, data), fail=True)
    return data, held_out


def encode_evaluation(
    settings: TrainSettings, held_out: HeldOutRecords | None, formatter: ChatFormatter
) -> HeldOutSet | None:
    """What is held out as the model sees it, with the negatives that training sees."""
    if held_out is None:
        return None
    options = settings.data
    return encode_held_out(
        held_out,
        formatter,
        negatives=options.negatives,
        max_rejected=options.max_rejected,
        max_bad_rows=options.max_bad_rows,
    )


def find_contamination(settings: TrainSettings, data: TrainingData) -> dict[str, Any]:
    """Training questions that stand in the evaluation files; each is a line of ``contamination.jsonl``."""
    return check_contamination(
        data.sources,
        expand_files(settings.data.contamination_files),
        Path(settings.output_dir) / CONTAMINATION_FILE,
        max_bad_rows=settings.data.max_bad_rows,
        limit=settings.data.limit,
    )


def stop_on_contamination(contamination: dict[str, Any], fail: bool) -> None:
    """Raise a ``ContrastRMError`` where evaluation questions were met and that is to stop the run."""
    if fail and contamination["n_contaminated_records"]:
        raise ContrastRMError(
            f"contaminated: {describe(contamination)}; take these records out of the training data, or set "
            "--fail_on_contamination 0"
        )


def _without_effect(data: TrainingData, objective: Objective, max_rejected: int) -> list[str]:
    """Settings that can change nothing, each with the reason.

    Raises:
        ContrastRMError: No answer counts.
    """
    check_an_answer_counts(objective, data.biases)
    n_margins = sum(counts.n_margins for counts in data.cache.source_counts)
    idle = without_effect(objective, data.biases, n_margins=n_margins)
    largest = int(np.diff(data.cache.group_offsets).max()) - 1
    if max_rejected and max_rejected >= largest:
        idle.append(f"--max_rejected {max_rejected}: no record has more than {largest} rejected answers")
    return idle


def describe_data(data: TrainingData) -> list[str]:
    """What a run prints of its data: every row that was left out, and the counts."""
    lines = [f"bad row left out: {message}" for message in data.bad]
    lines += [f"no effect: {setting}" for setting in data.without_effect]
    for row in data.source_rows():
        aside = f", {row['n_aside']} kept for evaluation" if row["n_aside"] else ""
        margins = f"; margins: {row['n_with_margin']} of {row['n_groups']} groups" if row["n_with_margin"] else ""
        verdicts = ", ".join(f"{name} {count}" for name, count in sorted(row["verdicts"].items()))
        lines.append(
            f"{row['location']}: {row['n_rows']} rows, {row['n_bad_rows']} bad{aside}; {row['n_records']} records -> "
            f"{row['n_groups']} groups, {row['n_texts']} texts, {row['n_tokens']} tokens; left out: "
            f"{row['n_dropped_groups']} groups and {row['n_dropped_texts']} texts over the length limit, "
            f"{row['n_equal_groups']} groups and {row['n_equal_texts']} rejected answers that are the chosen one once rendered "
            f"and cut, {row['n_without_negatives']} records without such negatives; cut: {row['n_truncated_texts']} texts "
            f"({row['n_answer_cut']} in the answer); verdicts: {verdicts}{margins}"
        )
        if row["weight"] is not None or data.draws.quotas is not None:
            lines.append(f"{row['location']}: {row['groups_an_epoch']} groups in an epoch")
    counts = data.draws.epoch_counts()
    if counts["n_not_drawn"] or data.draws.quotas is not None:
        lines.append(
            f"first epoch: {counts['n_groups']} groups ({counts['n_repeated_groups']} of them again, "
            f"{counts['n_groups_left_out']} groups not drawn), {counts['n_texts']} texts, {counts['n_tokens']} tokens; "
            f"{counts['n_not_drawn']} rejected answers not drawn"
        )
    return lines
