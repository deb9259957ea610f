"""Add off-target rejected answers: right answers to a similar but different request.

Reads preference records (JSONL); writes them with ``similar_question`` and its answer appended to ``rejected``
(bias null, strategy ``similar_question`` in ``injections``), in the order of the input. The similar request must really
differ: one that is too equal to the original, holds it whole, or has nothing to do with it is refused with a reason of its
own. Leaves ``failed.jsonl``, ``construction_report.json`` and the ledger in the work folder. Example:

``python -m codes.construct.gptinst --input_file output/construct/gptout.jsonl --output_file
output/construct/gptinst.jsonl``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from codes.common.cli import run
from codes.common.llm import ApiError, Outcome
from codes.common.records import (
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    check_preference_file,
    ensure_writable_folder,
    messages_to_text,
    open_atomic,
    write_row,
)
from codes.common.settings import settings_from
from codes.construct.api import Api, open_api
from codes.construct.build_prompt import PROMPT_VERSION, build_similar_answer, build_similar_question
from codes.construct.gates import answer_defect, question_defect
from codes.construct.pipeline import (
    FailureLog,
    append_rejected,
    ask_each,
    open_failures,
    print_summary,
    read_counts,
    usage_counts,
    write_report_section,
)
from codes.construct.settings import SimilarSettings, step_parser

STEP = "gptinst"
STRATEGY = "similar_question"
# Of a refused request, so many characters are kept in failed.jsonl.
_SHOWN_CHARACTERS = 500


def write_questions(
    api: Api, source: CheckedPreferenceFile, failures: FailureLog
) -> Iterator[tuple[PreferenceRecord, str | None]]:
    """Each record with a request similar to its own; None where none came, or none that passes the gates."""

    def prompts_of(record: PreferenceRecord) -> list[list[Message]]:
        return [build_similar_question(record.messages)]

    for record, [outcome] in ask_each(api, source, prompts_of, "similar requests", total=len(source), n_follow_ups=1):
        yield record, _accept_question(record, outcome, failures)


def _accept_question(record: PreferenceRecord, outcome: Outcome, failures: FailureLog) -> str | None:
    if isinstance(outcome, ApiError):
        failures.add(record.id, outcome, part="question")
        return None
    text = outcome.text.strip()
    context = messages_to_text(record.messages[:-1]) if len(record.messages) > 1 else ""
    defect = question_defect(text, original=record.messages[-1]["content"], context=context)
    if defect is not None:
        failures.add(record.id, defect, part="question", text=text[:_SHOWN_CHARACTERS])
        return None
    return text


def append_answer(
    record: PreferenceRecord, question: str, outcome: Outcome, origin: dict[str, Any], failures: FailureLog
) -> bool:
    """Append an answer that passes the gates to its record (in place); whether it did.

    A record gets its ``similar_question`` only together with the answer: alone it would explain nothing.
    """
    defect: str | ApiError | None
    if isinstance(outcome, ApiError):
        defect = outcome
    else:
        text = outcome.text.strip()
        asked = f"{record.question}\n{question}"
        defect = answer_defect(text, chosen=record.chosen, others=record.rejected, question=asked)
        if defect is None:
            record.similar_question = question
            append_rejected(record, text, bias=None, origin={"strategy": STRATEGY} | origin)
            return True
    failures.add(record.id, defect, part="answer")
    return False


def add_similar(settings: SimilarSettings, api: Api) -> tuple[dict[str, Any], int]:
    """The whole step. A record stays as it was where its request or answer failed: a later step can still use it.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or not one answer that can be kept.
    """
    source = check_preference_file(
        settings.input_file, max_bad_rows=settings.max_bad_rows, require_rejected=False, limit=settings.limit
    )
    for folder in (settings.output_file.parent, settings.work_dir):
        ensure_writable_folder(folder)
    origin = {"model": api.model, "prompt_version": PROMPT_VERSION, "seed": settings.seed}

    def prompts_of(item: tuple[PreferenceRecord, str | None]) -> list[list[Message]]:
        record, question = item
        return [] if question is None else [build_similar_answer(record.messages, question)]

    n_questions = n_added = 0
    with open_atomic(settings.output_file) as handle:
        with open_failures(settings.work_dir, STEP) as failures:
            questions = write_questions(api, source, failures)
            for (record, question), outcomes in ask_each(api, questions, prompts_of, "their answers"):
                if question is not None:
                    n_questions += 1
                    n_added += append_answer(record, question, outcomes[0], origin, failures)
                write_row(handle, record.to_row())
        section = read_counts(source) | origin
        section |= {
            "output_file": str(settings.output_file),
            "n_planned": len(source),
            "n_questions": n_questions,
            "n_added": n_added,
            "n_failed": failures.counts(),
            "n_records_written": len(source),
        }
        write_report_section(settings.work_dir, STEP, section | usage_counts(api))
        failures.require_some(n_added, len(source))
    return section, failures.n_requests


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return step_parser(STEP, __doc__, SimilarSettings, temperature=0.7, max_tokens=1024)


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    settings = settings_from(args, SimilarSettings)
    api = open_api(args)
    with api.ledger:
        section, n_failed_requests = add_similar(settings, api)
        title = f"{settings.output_file}: {section['n_records_written']} records"
        print_summary(title, section["n_added"], section["n_planned"], section["n_failed"], settings.work_dir)
        return api.exit_code(n_failed_requests)


if __name__ == "__main__":
    run(main)
