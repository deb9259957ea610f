"""Make bias-evaluation files from preference pairs of your own, in the public format.

Reads preference records (JSONL); writes ``<output_dir>/<bias>_bias.jsonl`` for each bias, and ``<bias>_placebo.jsonl`` beside
the files of ``gender`` and ``race``. Leaves ``failed.jsonl``, ``construction_report.json`` and the ledger in the work folder;
run the same command again after a kill and it goes on where it stood.

Example:
``python -m codes.construct.build_eval_pairs --input_file my_pairs.jsonl --output_dir output/my_eval``

then ``DATA_DIR=output/my_eval bash run_evaluation_rm.sh``. What becomes of a pair (the chosen answer and an original rejected
one):

* the seven rewrite biases: a model takes the cue out of the chosen answer and puts it into the rejected one, content and
  errors kept (``--strategy template``: rules put it in, and the chosen answer stays as it is, only without Markdown for
  ``beauty``; no model, no key);
* ``gender`` and ``race``: a sentence of identity stands before the chosen answer. The placebo file has the same rows in the
  same order with a sentence that says nothing of identity;
* ``refinement-aware``: a model polishes one answer of each record, chosen or rejected by the toss of a seeded coin.

Rewrites pass the gates of ``codes.construct.gates``. ``--consistency``: a rewritten pair stays only if the judge still
prefers the labelled answer, in both orders (``refinement-aware`` has no label and is not judged). In each file the better
answer stands first in half of the rows, or in one row more or less. The format has one ``question`` text: a record of several
turns is left out and counted, or with ``--multi_turn render`` becomes one text with its roles.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from codes.common.biases import eval_file_name, get_bias
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.judging import UnreadVerdicts
from codes.common.llm import ApiError, Completion, Outcome
from codes.common.llm_limits import Price
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
from codes.common.stats import wilson
from codes.construct.api import Api, open_api
from codes.construct.build_prompt import (
    EVAL_PROMPT_VERSION,
    PROMPT_VERSION,
    build_judge,
    build_plain_rewrite,
    build_polish,
    build_rewrite,
    word_limit,
)
from codes.construct.gates import gain_defect, loss_defect, polish_defect
from codes.construct.pipeline import (
    FAILED_FILE,
    FailureLog,
    ask_each,
    hold_work_dir,
    open_failures,
    original_rejected,
    read_counts,
    warn_of_own_texts,
    write_report_section,
)
from codes.construct.settings import EvalPairSettings, step_parser
from codes.construct.template import (
    RULES_VERSION,
    TEMPLATE_VERSION,
    IdentitySentence,
    apply_template,
    draw_identity,
    put_before,
    without_markup,
)
from codes.construct.verify_correctness import (
    Candidates,
    Judgement,
    OrderCounts,
    filter_is_on,
    judge_each,
    shown_orders,
)

STEP = "build_eval_pairs"
# Both of them: a label that hangs on the order of the answers is none.
N_ORDERS = 2


@dataclass(frozen=True)
class Models:
    """Who writes and who judges.

    Attributes:
        writer: Writes the rewrites; None: none is needed.
        judge: Asks whether the label still holds; None: nobody is asked.
    """

    writer: Api | None
    judge: Api | None

    @property
    def any(self) -> Api | None:
        """One of them: their requests, counts and ledger are the same."""
        return self.writer or self.judge


# --- what is to be made ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One row to make.

    Attributes:
        rejected_index: The pair's rejected answer, by position in the record.
    """

    record: PreferenceRecord
    rejected_index: int
    bias: str

    @property
    def kind(self) -> str:
        """``rewrite``, ``identity`` or ``refinement``."""
        return get_bias(self.bias).kind

    @property
    def pair_id(self) -> str:
        """Names the pair over all biases."""
        return f"{self.record.id}/{self.rejected_index}"

    @property
    def chosen(self) -> str:
        """The pair's better answer."""
        return self.record.chosen

    @property
    def rejected(self) -> str:
        """The pair's worse answer."""
        return self.record.rejected[self.rejected_index]

    @property
    def question(self) -> str:
        """The prompt as one text."""
        return self.record.question


@dataclass(frozen=True)
class Plan:
    """The rows to make, decided before any request, and the same every time they are read.

    Attributes:
        n_records: Records that can be used.
        n_pairs: Their pairs.
        left_out: Records that cannot be used, by reason.
    """

    source: CheckedPreferenceFile
    settings: EvalPairSettings
    n_records: int
    n_pairs: int
    left_out: Counter[str]

    def __iter__(self) -> Iterator[Item]:
        for record in self.source:
            if _unusable(record, self.settings) is not None:
                continue
            for number, index in enumerate(_pair_positions(record, self.settings)):
                for bias in self.settings.biases:
                    # One answer of a record is polished, not one of each of its pairs.
                    if number == 0 or get_bias(bias).kind != "refinement":
                        yield Item(record, index, bias)

    def count(self, *kinds: str) -> int:
        """Rows to make of some kinds of biases."""
        planned = [get_bias(bias).kind for bias in self.settings.biases]
        return sum(self.n_records if kind == "refinement" else self.n_pairs for kind in planned if kind in kinds)


def _unusable(record: PreferenceRecord, settings: EvalPairSettings) -> str | None:
    if len(record.messages) > 1 and settings.multi_turn == "skip":
        return "multi_turn"
    return None if original_rejected(record) else "no_original_rejected"


def _pair_positions(record: PreferenceRecord, settings: EvalPairSettings) -> list[int]:
    positions = original_rejected(record)
    return positions[:1] if settings.rejected == "first" else positions


def plan_pairs(settings: EvalPairSettings, failures: FailureLog) -> Plan:
    """Check the input and decide what to make, before any request; records that cannot be used go to ``failures``.

    Raises:
        ContrastRMError: Unusable input, or not one record that can be used.
    """
    left_out: Counter[str] = Counter()
    n_pairs = 0

    def count(record: PreferenceRecord) -> None:
        nonlocal n_pairs
        reason = _unusable(record, settings)
        if reason is None:
            n_pairs += len(_pair_positions(record, settings))
        else:
            left_out[reason] += 1
            failures.add(record.id, reason)

    source = check_preference_file(
        settings.input_file, max_bad_rows=settings.max_bad_rows, limit=settings.limit, see=count
    )
    if not n_pairs:
        reasons = ", ".join(f"{reason} {number}" for reason, number in left_out.most_common())
        raise ContrastRMError(
            f"none of the {len(source)} records of {settings.input_file} can become an evaluation pair ({reasons}); give "
            "records of one turn with an original rejected answer, or use --multi_turn render"
        )
    return Plan(source, settings, len(source) - left_out.total(), n_pairs, left_out)


# --- one row --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """The changed texts of a row.

    Attributes:
        chosen: The better answer after the change. For ``refinement-aware`` the polished answer, whichever it was.
        rejected: The worse answer after the change.
        polished: ``refinement-aware``: which answer was polished.
    """

    chosen: str
    rejected: str
    polished: str | None = None


def polished_side(item: Item, seed: int) -> str:
    """Which answer of a record is polished: good and bad ones alike, or "refined" would mean "good"."""
    return random.Random(f"polish:{seed}:{item.record.id}").choice(("chosen", "rejected"))


def polish_source(item: Item, seed: int) -> str:
    """The text that is polished."""
    return item.chosen if polished_side(item, seed) == "chosen" else item.rejected


def item_prompts(item: Item, seed: int, max_words: int | None) -> list[list[Message]]:
    """What a model is asked for a row: the chosen and the rejected answer, the polished one, or nothing."""
    messages = item.record.messages
    if item.kind == "rewrite":
        return [
            build_plain_rewrite(messages, item.chosen, item.bias, max_words=max_words),
            build_rewrite(messages, item.rejected, item.bias, max_words=max_words),
        ]
    if item.kind == "refinement":
        return [build_polish(messages, polish_source(item, seed), max_words=max_words)]
    return []


def draft_by_rule(item: Item, seed: int) -> Draft:
    """The texts that need no model: rules put the cue into the rejected answer, or a sentence stands before the chosen."""
    if item.kind == "identity":
        return Draft(put_before(draw_identity(item.bias, item.pair_id, seed).sentence, item.chosen), item.rejected)
    chosen = without_markup(item.chosen) if item.bias == "beauty" else item.chosen
    return Draft(chosen, apply_template(item.rejected, item.bias, record_id=item.pair_id, seed=seed))


def draft_of(item: Item, texts: Sequence[str], seed: int) -> Draft:
    """The texts that came for ``item_prompts``."""
    if item.kind == "refinement":
        return Draft(texts[0], item.rejected, polished_side(item, seed))
    return Draft(texts[0], texts[1])


def draft_defects(item: Item, draft: Draft, *, by_rule: bool, seed: int, check_cue: bool) -> list[tuple[str, str]]:
    """(part, reason) of each text of a row that must not become data."""
    if item.kind == "identity":
        return []
    if item.kind == "refinement":
        source = polish_source(item, seed)
        defect = polish_defect(draft.chosen, source=source, question=item.question)
        return [("polished", defect)] if defect is not None else []
    about: dict[str, Any] = {
        "chosen": item.chosen,
        "rejected": item.rejected,
        "bias": item.bias,
        "question": item.question,
        # A rule that adds a cue has added it: one sentence, which in a long text weighs little.
        "check_cue": check_cue and not by_rule,
    }
    # Rules leave the chosen answer as it is, so there is nothing to judge.
    loss = None if by_rule else loss_defect(draft.chosen, **about)
    gain = gain_defect(draft.rejected, **about)
    return [(part, defect) for part, defect in (("chosen", loss), ("rejected", gain)) if defect is not None]


class Sides:
    """Deals out the places of the better answers: 1 or 2, in every file as often the one as the other.

    Of each two rows of a file, the first one's place is drawn by its id, and the second one gets the other place.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._owed: dict[str, int] = {}

    def deal(self, item: Item) -> int:
        """The better answer's place in the next row of the item's file."""
        owed = self._owed.pop(item.bias, None)
        if owed is not None:
            return owed
        drawn = random.Random(f"side:{self._seed}:{item.bias}:{item.pair_id}").choice((1, 2))
        self._owed[item.bias] = 3 - drawn
        return drawn


def pair_row(item: Item, draft: Draft, better: int) -> dict[str, Any]:
    """The fields of the public format for a pairwise bias; ``better`` is the place (1 or 2) of the chosen answer."""
    worse = 3 - better
    texts = {
        f"original_response{better}": item.chosen,
        f"original_response{worse}": item.rejected,
        f"rewritten_response{better}": draft.chosen,
        f"rewritten_response{worse}": draft.rejected,
    }
    return {"question": item.question} | dict(sorted(texts.items())) | {"label": f"response{better}"}


def refinement_row(item: Item, draft: Draft) -> dict[str, Any]:
    """The fields of the public format for ``refinement-aware``."""
    original = item.chosen if draft.polished == "chosen" else item.rejected
    return {"question": item.question, "original_response": original, "rewritten_response": draft.chosen}


# --- the report -----------------------------------------------------------------------------------------------------------


@dataclass
class BiasCounts:
    """What came of one bias; ``n_planned`` = ``n_written`` + all of ``n_refused``."""

    n_planned: int = 0
    n_refused: Counter[str] = field(default_factory=Counter)
    n_written: int = 0
    n_better_first: int = 0
    n_judged: int = 0
    n_agreed: int = 0
    orders: OrderCounts = field(default_factory=OrderCounts)
    chosen_ratio: float = 0.0
    rejected_ratio: float = 0.0

    def add_judgement(self, judgement: Judgement) -> None:
        """Count what the judge said about one rewritten pair."""
        self.n_judged += 1
        self.n_agreed += judgement.verdict == "CHOSEN_IS_BEST"
        self.orders.add(judgement)

    def add_written(self, before: tuple[str, str], after: tuple[str, str], *, better_first: bool = False) -> None:
        """Count a row that was written."""
        self.n_written += 1
        self.n_better_first += better_first
        self.chosen_ratio += len(after[0]) / len(before[0])
        self.rejected_ratio += len(after[1]) / len(before[1])

    def to_dict(self, kind: str) -> dict[str, Any]:
        """For the report; only what applies to the kind of bias."""
        assert self.n_planned == self.n_written + self.n_refused.total(), "a row got lost uncounted"
        fields: dict[str, Any] = {
            "n_planned": self.n_planned,
            "n_written": self.n_written,
            "n_refused": dict(self.n_refused.most_common()),
        }
        if kind == "refinement":
            return fields | {"mean_length_ratio": _mean(self.chosen_ratio, self.n_written)}
        fields |= {
            "n_label_response1": self.n_better_first,
            "mean_length_ratio_chosen": _mean(self.chosen_ratio, self.n_written),
            "mean_length_ratio_rejected": _mean(self.rejected_ratio, self.n_written),
        }
        if self.n_judged:
            fields["consistency"] = {
                "n_judged": self.n_judged,
                "n_without_verdict": self.n_judged - self.orders.n_complete,
                "label_preferred": wilson(self.n_agreed, self.orders.n_complete).to_dict(),
                **self.orders.to_dict(),
            }
        return fields


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def format_table(biases: dict[str, Any]) -> str:
    """The report's counts as a short text table."""
    lines = [f"{'bias':<18} {'planned':>7} {'written':>7}  refused"]
    for name, counts in biases.items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["n_refused"].items()) or "-"
        lines.append(f"{name:<18} {counts['n_planned']:>7} {counts['n_written']:>7}  {reasons}")
    return "\n".join(lines)


# --- the rows -------------------------------------------------------------------------------------------------------------


def _failure_details(item: Item) -> dict[str, Any]:
    return {"bias": item.bias, "rejected_index": item.rejected_index}


def write_drafts(
    plan: Plan, writer: Api | None, counts: Mapping[str, BiasCounts], failures: FailureLog
) -> Iterator[tuple[Item, Draft | None]]:
    """Each row to make with its changed texts; None where some cannot be used."""
    seed = plan.settings.seed
    max_words = None if writer is None else word_limit(writer.max_new_tokens)

    def prompts_of(item: Item) -> list[list[Message]]:
        return item_prompts(item, seed, max_words)

    asked: Iterable[tuple[Item, list[Outcome]]] = ((item, []) for item in plan)
    if writer is not None:
        total = 2 * plan.count("rewrite") + plan.count("refinement")
        asked = ask_each(writer, plan, prompts_of, "rewrites", total=total)
    for item, outcomes in asked:
        counts[item.bias].n_planned += 1
        draft, reason = _take_outcomes(item, outcomes, plan.settings, failures)
        if reason is not None:
            counts[item.bias].n_refused[reason] += 1
        yield item, draft


def _take_outcomes(
    item: Item, outcomes: Sequence[Outcome], settings: EvalPairSettings, failures: FailureLog
) -> tuple[Draft | None, str | None]:
    """The draft, or the first reason why there is none; every reason goes to ``failures``."""
    details, seed = _failure_details(item), settings.seed
    parts = ("polished",) if item.kind == "refinement" else ("chosen", "rejected")
    errors = [(part, outcome) for part, outcome in zip(parts, outcomes, strict=False) if isinstance(outcome, ApiError)]
    for part, error in errors:
        failures.add(item.record.id, error, **details, part=part)
    if errors:
        return None, errors[0][1].reason
    texts = [outcome.text.strip() for outcome in outcomes if isinstance(outcome, Completion)]
    draft = draft_of(item, texts, seed) if texts else draft_by_rule(item, seed)
    defects = draft_defects(item, draft, by_rule=not texts, seed=seed, check_cue=settings.cue_gate == "on")
    for part, defect in defects:
        failures.add(item.record.id, defect, **details, part=part)
    return (None, defects[0][1]) if defects else (draft, None)


def _candidates(item: Item, draft: Draft | None) -> Candidates | None:
    """What the judge compares; None where there is nothing to ask."""
    if draft is None or item.kind == "refinement":
        return None
    return Candidates(f"{item.bias}/{item.pair_id}", item.record.messages, [draft.chosen, draft.rejected])


def judge_drafts(
    plan: Plan, drafts: Iterable[tuple[Item, Draft | None]], judge: Api | None
) -> Iterator[tuple[Item, Draft | None, Judgement | None]]:
    """Each draft with what the judge says about it; None where it is not asked."""
    if judge is None:
        yield from ((item, draft, None) for item, draft in drafts)
        return
    for (item, draft), judgement in judge_each(
        judge,
        (((item, draft), _candidates(item, draft)) for item, draft in drafts),
        n_orders=N_ORDERS,
        seed=plan.settings.seed,
        unread=UnreadVerdicts(plan.settings.max_unread),
        total=N_ORDERS * plan.count("rewrite", "identity"),
    ):
        yield item, draft, judgement


def _inconsistency(item: Item, judgement: Judgement, failures: FailureLog) -> str | None:
    """Why a judged pair is left out; the reasons go to ``failures``."""
    details = _failure_details(item) | {"part": "verdict"}
    if not judgement.is_complete:
        judgement.add_failures(failures, item.record.id, **details)
        return next(order.reason for order in judgement.orders if order.reason is not None)
    if judgement.verdict == "CHOSEN_IS_BEST":
        return None
    picked = [("chosen", "rejected")[order.picked or 0] for order in judgement.orders]
    failures.add(item.record.id, "label_not_preferred", **details, picked=picked)
    return "label_not_preferred"


def placebo_file_name(bias: str) -> str:
    """File name of an identity bias's placebo rows."""
    return eval_file_name(bias).replace("_bias.jsonl", "_placebo.jsonl")


def open_row_files(output_dir: Path, biases: Sequence[str], stack: ExitStack) -> dict[str, IO[str]]:
    """The files of all biases and placebos, by name; they take their names together when the stack ends well."""
    names = [eval_file_name(bias) for bias in biases]
    names += [placebo_file_name(bias) for bias in biases if get_bias(bias).kind == "identity"]
    return {name: stack.enter_context(open_atomic(output_dir / name)) for name in names}


class RowWriter:
    """Writes the rows of all biases: places the better answer, adds where the row comes from, counts."""

    def __init__(
        self, settings: EvalPairSettings, models: Models, files: Mapping[str, IO[str]], counts: Mapping[str, BiasCounts]
    ) -> None:
        self._settings, self._models, self._files, self._counts = settings, models, files, counts
        self._sides = Sides(settings.seed)

    def write(self, item: Item, draft: Draft, judgement: Judgement | None) -> None:
        """Write one row, and its placebo."""
        counts, rows = self._counts[item.bias], self._files[eval_file_name(item.bias)]
        about = self._provenance(item, judgement)
        if item.kind == "refinement":
            row = refinement_row(item, draft)
            write_row(rows, row | about | {"polished": draft.polished})
            counts.add_written((row["original_response"], item.rejected), (draft.chosen, item.rejected))
            return
        better = self._sides.deal(item)
        if item.kind == "identity":
            drawn = draw_identity(item.bias, item.pair_id, self._settings.seed)
            placebo = _placebo_row(item, drawn, better) | about | {"sentence": drawn.placebo}
            write_row(self._files[placebo_file_name(item.bias)], placebo)
            about |= {"sentence": drawn.sentence, "group": drawn.group}
        write_row(rows, pair_row(item, draft, better) | about)
        before, after = (item.chosen, item.rejected), (draft.chosen, draft.rejected)
        counts.add_written(before, after, better_first=better == 1)

    def _provenance(self, item: Item, judgement: Judgement | None) -> dict[str, Any]:
        """The fields of a row beside those of the public format."""
        row: dict[str, Any] = {
            "id": f"{item.bias}/{item.pair_id}",
            "bias": item.bias,
            "source_id": item.record.id,
            "rejected_index": item.rejected_index,
        } | self._origin(item.kind)
        if item.record.source is not None:
            row["source"] = item.record.source
        if judgement is not None and self._models.judge is not None:
            orders = [{"shown": list(order.shown), "picked": order.picked} for order in judgement.orders]
            judge = self._models.judge.model
            row["verification"] = {"model": judge, "prompt_version": PROMPT_VERSION, "orders": orders}
        return row

    def _origin(self, kind: str) -> dict[str, Any]:
        """Where the texts of a kind of bias come from."""
        model = None
        if kind == "identity":
            strategy, version = "sentence", RULES_VERSION
        elif self._settings.strategy == "template":
            strategy, version = "template", f"{TEMPLATE_VERSION}+{RULES_VERSION}"
        else:
            strategy, version = "rewrite", EVAL_PROMPT_VERSION
            model = None if self._models.writer is None else self._models.writer.model
        return {"strategy": strategy, "model": model, "prompt_version": version, "seed": self._settings.seed}


def _placebo_row(item: Item, drawn: IdentitySentence, better: int) -> dict[str, Any]:
    return pair_row(item, Draft(put_before(drawn.placebo, item.chosen), item.rejected), better)


# --- the step -------------------------------------------------------------------------------------------------------------


def build(settings: EvalPairSettings, models: Models) -> tuple[dict[str, Any], int]:
    """The whole step.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or a bias without a row.
    """
    for folder in (settings.output_dir, settings.work_dir):
        ensure_writable_folder(folder)
    counts = {bias: BiasCounts() for bias in settings.biases}
    api = models.any
    with ExitStack() as stack:
        with open_failures(settings.work_dir, STEP) as failures:
            plan = plan_pairs(settings, failures)
            if api is not None and api.is_estimate:
                _estimate(plan, models)
            rows = RowWriter(settings, models, open_row_files(settings.output_dir, settings.biases, stack), counts)
            drafts = write_drafts(plan, models.writer, counts, failures)
            for item, draft, judgement in judge_drafts(plan, drafts, models.judge):
                if judgement is not None:
                    counts[item.bias].add_judgement(judgement)
                    reason = _inconsistency(item, judgement, failures)
                    if reason is not None:
                        counts[item.bias].n_refused[reason] += 1
                        continue
                if draft is not None:
                    rows.write(item, draft, judgement)
        section = read_counts(plan.source) | {
            "strategy": settings.strategy,
            "model": None if models.writer is None else models.writer.model,
            "judge": None if models.judge is None else models.judge.model,
            "seed": settings.seed,
            "n_records_used": plan.n_records,
            "n_records_left_out": dict(plan.left_out.most_common()),
            "n_pairs": plan.n_pairs,
            "biases": {bias: counted.to_dict(get_bias(bias).kind) for bias, counted in counts.items()},
            "n_failed": failures.counts(),
            "output_dir": str(settings.output_dir),
        }
        write_report_section(settings.work_dir, STEP, section | (api.summary() if api is not None else {}))
        _require_rows(counts, failures)
    return section, failures.n_requests


def _require_rows(counts: Mapping[str, BiasCounts], failures: FailureLog) -> None:
    empty = [bias for bias, counted in counts.items() if not counted.n_written]
    if empty:
        raise ContrastRMError(
            f"not one row for {', '.join(empty)} {failures.explain(counts[empty[0]].n_refused)}; no file was "
            f"written. See {failures.path}, then try another API_MODEL, or leave the bias out with --bias_types (what was "
            "answered is not asked again)"
        )


def _estimate(plan: Plan, models: Models) -> None:
    """Print what the rewrites and, with the texts as they are, the verdicts would ask, and leave the command."""
    writer, judge, seed = models.writer, models.judge, plan.settings.seed

    def rewrites(max_words: int | None) -> Iterator[list[Message]]:
        for item in plan:
            yield from item_prompts(item, seed, max_words)

    def verdicts() -> Iterator[list[Message]]:
        for item in plan:
            candidates = _candidates(item, Draft(item.chosen, item.rejected))
            if candidates is None:
                continue
            for order in shown_orders(candidates.id, 2, seed, N_ORDERS):
                # An estimate counts equal requests once, but every bias will have texts of its own here.
                texts = [f"{candidates.texts[number]} {item.bias}" for number in order]
                yield build_judge(candidates.messages, texts)

    # An estimate ends the command: the first of the two is held up.
    with suppress(SystemExit) if judge is not None else ExitStack():
        if writer is not None:
            writer.ask(rewrites(word_limit(writer.max_new_tokens)), "rewrites")
    if judge is not None:
        judge.ask(verdicts(), "verdicts", accept_cut_off=True)


# --- the command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return step_parser(STEP, __doc__, EvalPairSettings, temperature=0.7, max_tokens=1024)


def needs_writer(settings: EvalPairSettings) -> bool:
    """Whether a model has to write."""
    return settings.strategy == "rewrite" and any(get_bias(bias).kind != "identity" for bias in settings.biases)


def needs_judge(settings: EvalPairSettings, judge_model: str | None) -> bool:
    """Whether the judge is asked. ``auto``: where a model writes anyway, unless the judge is the embedded model."""
    if all(get_bias(bias).kind == "refinement" for bias in settings.biases):
        return False
    if settings.consistency == "auto":
        return needs_writer(settings) and filter_is_on("auto", judge_model or "")
    return settings.consistency == "on"


def choose_models(settings: EvalPairSettings, api: Api, judge_model: str | None) -> Models:
    """Writer and judge of a run: one client, each with the model, temperature and length of its own."""
    judge, writer = None, api if needs_writer(settings) else None
    if needs_judge(settings, judge_model):
        judge = replace(
            api,
            model=judge_model or api.model,
            temperature=settings.judge_temperature,
            max_new_tokens=settings.judge_max_new_tokens,
        )
        if writer is not None and judge.model == writer.model and not api.is_estimate:
            warn_of_own_texts(judge.model, "name another one with --judge_model")
    return Models(writer, judge)


def run_step(settings: EvalPairSettings, models: Models) -> int:
    """The step, what it prints, and its exit code."""
    section, n_failed_requests = build(settings, models)
    print(format_table(section["biases"]))
    left_out = ", ".join(f"{reason} {count}" for reason, count in section["n_records_left_out"].items())
    print(
        f"{settings.output_dir}: {section['n_pairs']} pairs of {section['n_records_used']} records"
        + (f"; records left out: {left_out}" if left_out else "")
        + f"; consistency {'on' if models.judge is not None else 'off'}; refused texts are in "
        f"{settings.work_dir}/{FAILED_FILE}"
    )
    return 0 if models.any is None else models.any.exit_code(n_failed_requests)


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    settings = settings_from(args, EvalPairSettings)
    judge_model = settings.judge_model or args.api_model
    has_writer, has_judge = needs_writer(settings), needs_judge(settings, judge_model)
    if not has_writer and not has_judge:
        if args.estimate:
            print("estimate for evaluation pairs: no model is asked; nothing to pay")
            return 0
        with hold_work_dir(settings.work_dir):
            return run_step(settings, Models(None, None))
    price = Price.of(settings.judge_price_in, settings.judge_price_out, "--judge_price_in and --judge_price_out")
    is_other = has_writer and has_judge and judge_model != args.api_model
    if not has_writer:
        args.api_model = judge_model
    api = open_api(args, model_prices={judge_model: price} if is_other or price is not None else None)
    with api.ledger:
        return run_step(settings, choose_models(settings, api, judge_model))


if __name__ == "__main__":
    run(main)
