"""Add off-target rejected answers: right answers to a similar but different request.

Reads preference records (JSONL); writes them with ``similar_question`` and its answer appended to ``rejected``
(bias null, strategy ``similar_question`` in ``injections``), in the order of the input. The similar request must really
differ: one that is too equal to the original, holds it whole, or has nothing to do with it is refused with a reason of its
own. Leaves ``failed.jsonl``, ``construction_report.json``, ``similar_questions.jsonl`` (the accepted requests) and the
ledger in the work folder. Example:

``python -m codes.construct.gptinst --input_file output/construct/gptout.jsonl --output_file
output/construct/gptinst.jsonl``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codes.common.cli import run
from codes.common.llm import ApiError, Outcome
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    ensure_writable_folder,
    iter_jsonl,
    messages_to_text,
    open_atomic,
    write_row,
)
from codes.construct.api import Api, add_api_arguments, open_api_of
from codes.construct.build_prompt import PROMPT_VERSION, build_similar_answer, build_similar_question
from codes.construct.gates import answer_defect, question_defect
from codes.construct.steps import (
    FailureLog,
    append_rejected,
    ask_groups,
    check_input,
    print_summary,
    read_counts,
    require_some,
    usage_counts,
)
from codes.construct.work_dir import failure, request_failure, write_report_section

STEP = "gptinst"
STRATEGY = "similar_question"
QUESTIONS_FILE = "similar_questions.jsonl"


def write_questions(api: Api, source: CheckedPreferenceFile, questions_file: Path, failures: FailureLog) -> int:
    """Ask for a similar request to each record; write one row a record, with null where there is none.

    Returns:
        How many requests were accepted.
    """
    n_accepted = 0

    def groups() -> Iterator[tuple[PreferenceRecord, list[list[Message]]]]:
        for record in source:
            yield record, [build_similar_question(record.messages)]

    asked = ask_groups(api, groups, "similar requests", total=len(source), n_follow_ups=1)
    with open_atomic(questions_file) as handle:
        for record, [outcome] in asked:
            question = _accept_question(record, outcome, failures)
            n_accepted += question is not None
            write_row(handle, {"id": record.id, "similar_question": question})
    return n_accepted


def _accept_question(record: PreferenceRecord, outcome: Outcome, failures: FailureLog) -> str | None:
    if isinstance(outcome, ApiError):
        failures.add(request_failure(record.id, STEP, outcome, part="question"))
        return None
    text = outcome.text.strip()
    context = messages_to_text(record.messages[:-1]) if len(record.messages) > 1 else ""
    defect = question_defect(text, original=record.messages[-1]["content"], context=context)
    if defect is not None:
        failures.add(failure(record.id, STEP, defect, part="question", text=text[:500]))
        return None
    return text


def append_answer(
    record: PreferenceRecord, question: str, outcome: Outcome, origin: dict[str, Any], failures: FailureLog
) -> bool:
    """Append an answer that passes the gates to its record (in place); whether it did.

    A record gets its ``similar_question`` only together with the answer: alone it would explain nothing.
    """
    if isinstance(outcome, ApiError):
        failures.add(request_failure(record.id, STEP, outcome, part="answer"))
        return False
    text = outcome.text.strip()
    defect = answer_defect(
        text, chosen=record.chosen, others=record.rejected, question=f"{record.question}\n{question}"
    )
    if defect is not None:
        failures.add(failure(record.id, STEP, defect, part="answer"))
        return False
    record.similar_question = question
    append_rejected(record, text, bias=None, origin=origin)
    return True


def add_similar(
    *, api: Api, input_file: Path, output_file: Path, work_dir: Path, limit: int, seed: int, max_bad_rows: int
) -> tuple[dict[str, Any], int]:
    """The whole step. A record stays as it was where its request or answer failed: a later step can still use it.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or not one answer that can be kept.
    """
    source = check_input(input_file, max_bad_rows=max_bad_rows, limit=limit)
    for folder in (output_file.parent, work_dir):
        ensure_writable_folder(folder)
    questions_file = work_dir / QUESTIONS_FILE
    origin = {"model": api.model, "prompt_version": PROMPT_VERSION, "seed": seed}

    def groups() -> Iterator[tuple[tuple[PreferenceRecord, str | None], list[list[Message]]]]:
        for record, (_, row) in zip(source, iter_jsonl(questions_file), strict=True):
            question = row["similar_question"]
            prompts = [] if question is None else [build_similar_answer(record.messages, question)]
            yield (record, question), prompts

    with FailureLog(work_dir, STEP) as failures, open_atomic(output_file) as handle:
        n_questions = write_questions(api, source, questions_file, failures)
        n_added = 0
        for (record, question), outcomes in ask_groups(api, groups, "their answers", total=n_questions):
            if question is not None:
                n_added += append_answer(record, question, outcomes[0], {"strategy": STRATEGY} | origin, failures)
            write_row(handle, record.to_row())
        failed_file = failures.commit()
        section = read_counts(source) | origin
        section |= {
            "output_file": str(output_file),
            "n_planned": len(source),
            "n_questions": n_questions,
            "n_added": n_added,
            "n_failed": failures.counts(),
            "n_records_written": len(source),
        }
        write_report_section(work_dir, STEP, section | usage_counts(api))
        require_some(n_added, len(source), failures, failed_file)
        return section, failures.n_requests


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.gptinst", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--input_file", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    add_api_arguments(parser, temperature=0.7, max_new_tokens=1024)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    api = open_api_of(args)
    with api.ledger:
        section, n_failed_requests = add_similar(
            api=api,
            input_file=args.input_file,
            output_file=args.output_file,
            work_dir=args.work_dir,
            limit=args.limit,
            seed=args.seed,
            max_bad_rows=args.max_bad_rows,
        )
        title = f"{args.output_file}: {section['n_records_written']} records"
        print_summary(title, section["n_added"], section["n_planned"], section["n_failed"], args.work_dir)
        return api.exit_code(n_failed_requests)


if __name__ == "__main__":
    run(main)
