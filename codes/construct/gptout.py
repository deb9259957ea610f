"""Inject biased rejected answers into preference records.

Reads preference records (JSONL); writes them with injected answers appended to ``rejected`` and ``bias_type``
and their origin in ``injections``, in the order of the input. Leaves ``failed.jsonl``,
``construction_report.json`` and the ledger in the work folder; run the same command again after a kill and it
goes on where it stood. Three strategies:

* ``wrong_answer``: a model writes a wrong answer in the style of the bias, from the question alone;
* ``rewrite_rejected``: a model restyles an original rejected answer and keeps its substance;
* ``template``: rules add the cue to an original rejected answer; no model, no key, no server.

The biases are dealt out in seeded rounds, so that over the file, whatever its length, no bias is planned more than once
more often than another. A record's biases depend on the seed and its position; everything else on the seed and its id.
Raising ``--limit`` changes nothing in the records before it. Example:

``python -m codes.construct.gptout --input_file data/train-unified-feedback/own_sample.jsonl
--output_file output/construct/gptout.jsonl --strategy template``
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from codes.common.biases import INJECTABLE
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.llm import ApiError
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    check_preference_file,
    ensure_writable_folder,
    open_atomic,
    write_row,
)
from codes.common.settings import settings_from
from codes.construct.api import Api
from codes.construct.build_prompt import (
    PROMPT_VERSION,
    build_rewrite,
    build_wrong_answer,
    word_limit,
)
from codes.construct.gates import answer_defect
from codes.construct.pipeline import (
    FailureLog,
    append_rejected,
    ask_each,
    open_failures,
    original_rejected,
    print_summary,
    read_counts,
    run_with_client,
    usage_counts,
    write_report_section,
)
from codes.construct.settings import InjectionSettings, step_parser
from codes.construct.template import TEMPLATE_VERSION, apply_template

STEP = "gptout"


@dataclass(frozen=True)
class Injection:
    """One biased answer to write.

    Attributes:
        source_index: Position in ``rejected`` of the answer to rewrite; None for an answer from the question
            alone.
    """

    bias: str
    source_index: int | None


# A record with the answers to write for it.
Planned = tuple[PreferenceRecord, list[Injection]]


@dataclass
class InjectionCounts:
    """What came of the planned injections; ``planned`` = ``kept`` + all of ``refused``, by bias."""

    planned: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    n_records_written: int = 0
    n_records_lost: int = 0

    def refuse(self, bias: str, reason: str) -> None:
        """Count a text that did not become data."""
        self.refused.setdefault(bias, Counter())[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        by_bias = {
            bias: {
                "n_planned": self.planned[bias],
                "n_kept": self.kept[bias],
                "n_refused": dict(self.refused.get(bias, Counter()).most_common()),
            }
            for bias in INJECTABLE
            if self.planned[bias]
        }
        return {
            "n_planned": dict(sorted(self.planned.items())),
            "n_injected": dict(sorted(self.kept.items())),
            "by_bias": by_bias,
            "n_records_written": self.n_records_written,
            "n_records_lost": self.n_records_lost,
        }


def deal_biases(allowed: Sequence[str], per_record: int, seed: int) -> Iterator[list[str]]:
    """The biases of record after record, without end.

    Like cards: every round holds each allowed bias once, in an order of its own, and is dealt out before the next one
    begins. So after any number of records two counts differ by at most one. Where a record begins in one round and ends in
    the next, it takes biases that it does not have yet first.
    """
    hand: list[str] = []
    n_rounds = 0
    while True:
        dealt, hand = hand[:per_record], hand[per_record:]
        if len(dealt) < per_record:
            deck = list(allowed)
            random.Random(f"round:{seed}:{n_rounds}").shuffle(deck)
            n_rounds += 1
            first = [bias for bias in deck if bias not in dealt][: per_record - len(dealt)]
            dealt += first
            hand = [bias for bias in deck if bias not in first]
        yield dealt


def check_input(settings: InjectionSettings) -> CheckedPreferenceFile:
    """Read the input through before anything is asked.

    Raises:
        ContrastRMError: Unusable input, or an answer is to be restyled in a record that has no original one.
    """

    def require_source(record: PreferenceRecord) -> None:
        if settings.strategy != "wrong_answer" and not original_rejected(record):
            raise ContrastRMError(
                f"record {record.id!r} has no original rejected answer to restyle; use --strategy wrong_answer"
            )

    return check_preference_file(
        settings.input_file,
        max_bad_rows=settings.max_bad_rows,
        require_rejected=False,
        limit=settings.limit,
        see=require_source,
    )


def plan_injections(records: Iterable[PreferenceRecord], settings: InjectionSettings) -> Iterator[Planned]:
    """Each record with the answers to write for it, before any request."""
    dealt = deal_biases(settings.bias_types, settings.biases_per_record, settings.seed)
    for record, biases in zip(records, dealt, strict=False):
        sources = original_rejected(record)
        draw = random.Random(f"source:{settings.seed}:{record.id}")
        choose = settings.strategy != "wrong_answer"
        yield record, [Injection(bias, draw.choice(sources) if choose else None) for bias in biases]


def injection_prompt(record: PreferenceRecord, injection: Injection, max_words: int | None) -> list[Message]:
    """The messages that ask for one injection."""
    if injection.source_index is None:
        return build_wrong_answer(record.messages, injection.bias, max_words=max_words)
    source = record.rejected[injection.source_index]
    return build_rewrite(record.messages, source, injection.bias, max_words=max_words)


def write_answers(
    planned: Iterable[Planned], api: Api | None, *, seed: int, total: int
) -> Iterator[tuple[Planned, list[str | ApiError]]]:
    """Each record's answers as they come from the model (or the error that came), or from the rules where there is none."""
    if api is None:
        for record, injections in planned:
            sources = [record.rejected[injection.source_index or 0] for injection in injections]
            yield (
                (record, injections),
                [
                    apply_template(source, injection.bias, record_id=record.id, seed=seed)
                    for injection, source in zip(injections, sources, strict=True)
                ],
            )
        return
    max_words = word_limit(api.max_new_tokens)

    def prompts_of(item: Planned) -> list[list[Message]]:
        record, injections = item
        return [injection_prompt(record, injection, max_words) for injection in injections]

    for item, outcomes in ask_each(api, planned, prompts_of, "biased answers", total=total):
        yield item, [outcome if isinstance(outcome, ApiError) else outcome.text.strip() for outcome in outcomes]


def take_answer(
    record: PreferenceRecord,
    injection: Injection,
    answer: str | ApiError,
    settings: InjectionSettings,
    *,
    counts: InjectionCounts,
    failures: FailureLog,
    origin: dict[str, Any],
) -> None:
    """Append an answer that passes the gates to its record (in place); count and record the others."""
    counts.planned[injection.bias] += 1
    details: dict[str, Any] = {"bias": injection.bias, "strategy": settings.strategy}
    source = None if injection.source_index is None else record.rejected[injection.source_index]
    defect: str | ApiError | None
    if isinstance(answer, ApiError):
        defect = answer
        counts.refuse(injection.bias, answer.reason)
    else:
        defect = answer_defect(
            answer,
            chosen=record.chosen,
            others=record.rejected,
            rewritten_from=source,
            bias=injection.bias,
            question=record.question,
            # A rule that adds a cue has added it: one sentence, which in a long text weighs little.
            check_cue=settings.cue_gate == "on" and settings.strategy != "template",
        )
        if defect is None:
            place = {} if injection.source_index is None else {"source_index": injection.source_index}
            append_rejected(record, answer, bias=injection.bias, origin=details | origin | place)
            counts.kept[injection.bias] += 1
            return
        counts.refuse(injection.bias, defect)
    failures.add(record.id, defect, **details)


def inject(settings: InjectionSettings, api: Api | None) -> tuple[dict[str, Any], int]:
    """The whole step; ``api`` is None for the ``template`` strategy.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or not one injection that can be kept.
    """
    source = check_input(settings)
    for folder in (settings.output_file.parent, settings.work_dir):
        ensure_writable_folder(folder)
    version = PROMPT_VERSION if api is not None else TEMPLATE_VERSION
    origin = {"model": None if api is None else api.model, "prompt_version": version, "seed": settings.seed}
    counts = InjectionCounts()
    answers = write_answers(
        plan_injections(source, settings), api, seed=settings.seed, total=len(source) * settings.biases_per_record
    )
    with open_atomic(settings.output_file) as handle:
        with open_failures(settings.work_dir, STEP) as failures:
            for (record, injections), texts in answers:
                for injection, text in zip(injections, texts, strict=True):
                    take_answer(record, injection, text, settings, counts=counts, failures=failures, origin=origin)
                if record.rejected:
                    write_row(handle, record.to_row())
                    counts.n_records_written += 1
                else:
                    counts.n_records_lost += 1
                    failures.add(record.id, "no_rejected_left")
        section = read_counts(source) | origin | counts.to_dict()
        section |= {
            "strategy": settings.strategy,
            "bias_types": list(settings.bias_types),
            "biases_per_record": settings.biases_per_record,
            "n_failed": failures.counts(),
            "output_file": str(settings.output_file),
        }
        write_report_section(settings.work_dir, STEP, section | usage_counts(api))
        failures.require_some(counts.kept.total(), counts.planned.total())
    return section, failures.n_requests


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return step_parser(STEP, __doc__, InjectionSettings, temperature=0.7, max_tokens=1024)


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    settings = settings_from(args, InjectionSettings)

    def run_step(api: Api | None) -> int:
        section, n_failed_requests = inject(settings, api)
        n_kept, n_planned = sum(section["n_injected"].values()), sum(section["n_planned"].values())
        title = f"{settings.output_file}: {section['n_records_written']} records"
        print_summary(title, n_kept, n_planned, section["n_failed"], settings.work_dir)
        return 0 if api is None else api.exit_code(n_failed_requests)

    return run_with_client(args, run_step, title="biased answers", asks=settings.strategy != "template")


if __name__ == "__main__":
    run(main)
