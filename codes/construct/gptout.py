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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codes.common.biases import INJECTABLE
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.llm import ApiError, Completion, Outcome
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    ensure_writable_folder,
    open_atomic,
    write_row,
)
from codes.construct.api import Api, add_api_arguments, open_api_of
from codes.construct.build_prompt import (
    PROMPT_VERSION,
    STRATEGIES,
    Strategy,
    build_rewrite,
    build_wrong_answer,
    cue_instruction,
    word_limit,
)
from codes.construct.gates import answer_defect
from codes.construct.steps import (
    FailureLog,
    append_rejected,
    ask_groups,
    check_input,
    injections_of,
    print_summary,
    read_counts,
    require_some,
    usage_counts,
)
from codes.construct.template import TEMPLATE_VERSION, apply_template
from codes.construct.work_dir import failure, hold_work_dir, request_failure, write_report_section

STEP = "gptout"


@dataclass(frozen=True)
class Injection:
    """One biased answer to write.

    Attributes:
        source_index: Position in ``rejected`` of the answer to rewrite; None for an answer from the question
            alone.
    """

    bias: str
    strategy: Strategy
    source_index: int | None


@dataclass(frozen=True)
class Plan:
    """What is to be written for each record; decided before any request, and the same every time it is read."""

    source: CheckedPreferenceFile
    strategy: Strategy
    allowed: tuple[str, ...]
    per_record: int
    seed: int

    def __len__(self) -> int:
        """Answers to write."""
        return len(self.source) * self.per_record

    def __iter__(self) -> Iterator[tuple[PreferenceRecord, list[Injection]]]:
        for record, biases in zip(self.source, deal_biases(self.allowed, self.per_record, self.seed), strict=False):
            sources = original_rejected(record)
            draw = random.Random(f"source:{self.seed}:{record.id}")
            choose = self.strategy != "wrong_answer"
            yield (
                record,
                [Injection(bias, self.strategy, draw.choice(sources) if choose else None) for bias in biases],
            )


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

    def by_bias(self) -> dict[str, Any]:
        """For the report."""
        return {
            bias: {
                "n_planned": self.planned[bias],
                "n_kept": self.kept[bias],
                "n_refused": dict(self.refused.get(bias, Counter()).most_common()),
            }
            for bias in INJECTABLE
            if self.planned[bias]
        }


def parse_bias_types(value: str) -> tuple[str, ...]:
    """``all`` or a comma-separated list.

    Raises:
        ContrastRMError: A name is unknown or cannot be injected, or the list is empty.
    """
    if value.strip() == "all":
        return INJECTABLE
    names = {name.strip() for name in value.split(",") if name.strip()}
    if not names:
        raise ContrastRMError(f"--bias_types is empty; give all or some of {','.join(INJECTABLE)}")
    for name in sorted(names):
        cue_instruction(name)
    # In the order of the table: how they were typed makes no other data set.
    return tuple(name for name in INJECTABLE if name in names)


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


def original_rejected(record: PreferenceRecord) -> list[int]:
    """Positions in ``rejected`` of the answers that nobody injected."""
    made = {injection["index"] for injection in injections_of(record)}
    return [position for position, bias in enumerate(record.bias_type) if bias is None and position not in made]


def plan_injections(
    input_file: Path,
    *,
    strategy: Strategy,
    allowed: tuple[str, ...],
    per_record: int,
    seed: int,
    limit: int,
    max_bad_rows: int,
) -> Plan:
    """Check the input and decide what to write, before any request.

    Raises:
        ContrastRMError: Unusable input, or an answer is to be restyled in a record that has no original one.
    """

    def see(record: PreferenceRecord) -> None:
        if strategy != "wrong_answer" and not original_rejected(record):
            raise ContrastRMError(
                f"record {record.id!r} has no original rejected answer to restyle; use --strategy wrong_answer"
            )

    source = check_input(input_file, max_bad_rows=max_bad_rows, limit=limit, see=see)
    return Plan(source, strategy, allowed, per_record, seed)


def injection_prompt(record: PreferenceRecord, injection: Injection, max_words: int | None) -> list[Message]:
    """The messages that ask for one injection."""
    if injection.source_index is None:
        return build_wrong_answer(record.messages, injection.bias, max_words=max_words)
    source = record.rejected[injection.source_index]
    return build_rewrite(record.messages, source, injection.bias, max_words=max_words)


def write_by_template(record: PreferenceRecord, injection: Injection, seed: int) -> Completion:
    """The answer of the rules, in the shape of a model's answer."""
    assert injection.source_index is not None, "the template strategy restyles an answer"
    source = record.rejected[injection.source_index]
    return Completion(apply_template(source, injection.bias, record_id=record.id, seed=seed), "stop", 0, 0)


def take_outcome(
    record: PreferenceRecord,
    injection: Injection,
    outcome: Outcome,
    *,
    counts: InjectionCounts,
    failures: FailureLog,
    origin: dict[str, Any],
    check_cue: bool,
) -> None:
    """Append an answer that passes the gates to its record (in place); count and record the others."""
    counts.planned[injection.bias] += 1
    details: dict[str, Any] = {"bias": injection.bias, "strategy": injection.strategy}
    if isinstance(outcome, ApiError):
        counts.refuse(injection.bias, outcome.reason)
        failures.add(request_failure(record.id, STEP, outcome, **details))
        return
    text = outcome.text.strip()
    source = None if injection.source_index is None else record.rejected[injection.source_index]
    defect = answer_defect(
        text,
        chosen=record.chosen,
        others=record.rejected,
        rewritten_from=source,
        bias=injection.bias,
        question=record.question,
        # A rule that adds a cue has added it: one sentence, which in a long text weighs little.
        check_cue=check_cue and injection.strategy != "template",
    )
    if defect is not None:
        counts.refuse(injection.bias, defect)
        failures.add(failure(record.id, STEP, defect, **details))
        return
    if injection.source_index is not None:
        origin = origin | {"source_index": injection.source_index}
    append_rejected(record, text, bias=injection.bias, origin=details | origin)
    counts.kept[injection.bias] += 1


def inject(
    *,
    api: Api | None,
    input_file: Path,
    output_file: Path,
    work_dir: Path,
    strategy: Strategy,
    bias_types: tuple[str, ...],
    biases_per_record: int,
    limit: int,
    seed: int,
    max_bad_rows: int,
    check_cue: bool = True,
) -> tuple[dict[str, Any], int]:
    """The whole step.

    Args:
        api: None for the ``template`` strategy.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or not one injection that can be kept.
    """
    plan = plan_injections(
        input_file,
        strategy=strategy,
        allowed=bias_types,
        per_record=biases_per_record,
        seed=seed,
        limit=limit,
        max_bad_rows=max_bad_rows,
    )
    for folder in (output_file.parent, work_dir):
        ensure_writable_folder(folder)
    model = api.model if api is not None else None
    version = PROMPT_VERSION if api is not None else TEMPLATE_VERSION
    origin = {"model": model, "prompt_version": version, "seed": seed}
    counts = InjectionCounts()
    with FailureLog(work_dir, STEP) as failures, open_atomic(output_file) as handle:
        for (record, injections), outcomes in _outcomes(plan, api):
            for injection, outcome in zip(injections, outcomes, strict=True):
                take_outcome(
                    record,
                    injection,
                    outcome,
                    counts=counts,
                    failures=failures,
                    origin=origin,
                    check_cue=check_cue,
                )
            if record.rejected:
                write_row(handle, record.to_row())
                counts.n_records_written += 1
            else:
                counts.n_records_lost += 1
                failures.add(failure(record.id, STEP, "no_rejected_left"))
        failed_file = failures.commit()
        section = _report_section(plan, counts, failures) | origin | {"output_file": str(output_file)}
        write_report_section(work_dir, STEP, section | usage_counts(api))
        require_some(counts.kept.total(), counts.planned.total(), failures, failed_file)
        return section, failures.n_requests


def _outcomes(
    plan: Plan, api: Api | None
) -> Iterator[tuple[tuple[PreferenceRecord, list[Injection]], Sequence[Outcome]]]:
    if api is None:
        for record, injections in plan:
            yield (
                (record, injections),
                [write_by_template(record, injection, plan.seed) for injection in injections],
            )
        return
    max_words = word_limit(api.max_new_tokens)

    def groups() -> Iterator[tuple[tuple[PreferenceRecord, list[Injection]], list[list[Message]]]]:
        for record, injections in plan:
            prompts = [injection_prompt(record, injection, max_words) for injection in injections]
            yield (record, injections), prompts

    yield from ask_groups(api, groups, "biased answers", total=len(plan))


def _report_section(plan: Plan, counts: InjectionCounts, failures: FailureLog) -> dict[str, Any]:
    return read_counts(plan.source) | {
        "strategy": plan.strategy,
        "bias_types": list(plan.allowed),
        "biases_per_record": plan.per_record,
        "n_planned": dict(sorted(counts.planned.items())),
        "n_injected": dict(sorted(counts.kept.items())),
        "by_bias": counts.by_bias(),
        "n_failed": failures.counts(),
        "n_records_written": counts.n_records_written,
        "n_records_lost": counts.n_records_lost,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.gptout", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--input_file", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--strategy", choices=STRATEGIES, default="wrong_answer", help="template needs no model")
    parser.add_argument("--bias_types", default="all", help=f"all, or some of {','.join(INJECTABLE)}")
    parser.add_argument("--biases_per_record", type=int, default=2)
    parser.add_argument(
        "--cue_gate",
        choices=("on", "off"),
        default="on",
        help="on: a text must show its cue; off: for languages other than English, whose cues the word lists miss",
    )
    add_api_arguments(parser, temperature=0.7, max_new_tokens=1024)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    bias_types = parse_bias_types(args.bias_types)
    if not 1 <= args.biases_per_record <= len(bias_types):
        raise ContrastRMError(f"--biases_per_record must be 1 to {len(bias_types)} (the number of --bias_types)")

    def run_step(api: Api | None) -> int:
        section, n_failed_requests = inject(
            api=api,
            input_file=args.input_file,
            output_file=args.output_file,
            work_dir=args.work_dir,
            strategy=args.strategy,
            bias_types=bias_types,
            biases_per_record=args.biases_per_record,
            limit=args.limit,
            seed=args.seed,
            max_bad_rows=args.max_bad_rows,
            check_cue=args.cue_gate == "on",
        )
        n_kept, n_planned = sum(section["n_injected"].values()), sum(section["n_planned"].values())
        title = f"{args.output_file}: {section['n_records_written']} records"
        print_summary(title, n_kept, n_planned, section["n_failed"], args.work_dir)
        return 0 if api is None else api.exit_code(n_failed_requests)

    if args.strategy == "template":
        if args.estimate:
            print("estimate for biased answers: the template strategy asks no model; nothing to pay")
            return 0
        with hold_work_dir(args.work_dir):
            return run_step(None)
    api = open_api_of(args)
    with api.ledger:
        return run_step(api)


if __name__ == "__main__":
    run(main)
