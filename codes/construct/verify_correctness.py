"""Let a judge confirm that the chosen answer is the best of its record, and write the training set.

Reads preference records (JSONL); writes all of them with ``verify_correctness`` and ``verification`` (``--output_file``)
and those fit for training (``--train_file``), in the order of the input. Leaves ``failed.jsonl``,
``construction_report.json`` and the ledger in the work folder. Example:

``python -m codes.construct.verify_correctness --input_file output/construct/gptout.jsonl
--output_file output/construct/verified.jsonl --train_file output/construct/train.jsonl``

A record's candidates are shuffled by its id and shown in ``--orders`` orders, in each of which every candidate stands at
another place. A record is

* ``CHOSEN_IS_BEST`` when the chosen answer was picked in all orders,
* ``FAILED`` when some order brought no usable verdict (``failed.jsonl`` says why),
* ``CHOSEN_NOT_BEST`` otherwise,
* ``SKIPPED`` when nobody was asked (``--judge none``).

``--drop_bad_negatives`` judges a ``CHOSEN_NOT_BEST`` record once more, in all orders, without the rejected answers that were
picked over the chosen one. Where the chosen answer wins now, they are dropped and the record is ``CHOSEN_IS_BEST``; otherwise
the record is written whole, with its first verdict.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from codes.common.base_model import is_embedded
from codes.common.biases import INJECTABLE
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.judging import UnreadVerdicts, judge_max_new_tokens, judge_temperature, read_verdict
from codes.common.llm import ApiError, Outcome
from codes.common.records import (
    VERIFY_VALUES,
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
from codes.construct.api import Api, is_embedded_server
from codes.construct.build_prompt import PROMPT_VERSION, build_judge, candidate_letters
from codes.construct.pipeline import (
    FailureLog,
    ask_each,
    injections_of,
    open_failures,
    read_counts,
    run_with_client,
    usage_counts,
    warn_of_own_texts,
    write_report_section,
)
from codes.construct.settings import VerifyFilter, VerifySettings, step_parser

STEP = "verify_correctness"
MAX_CANDIDATES = 26
NOT_INJECTED = "not injected"

Item = TypeVar("Item")


# --- one record -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt, to be compared. ``texts[0]`` is the one that should win.

    Attributes:
        id: Decides on the orders.
    """

    id: str
    messages: list[Message]
    texts: Sequence[str]


@dataclass(frozen=True)
class OrderVerdict:
    """What the judge said about one order.

    Attributes:
        shown: Candidate numbers in the order shown; 0 is the one that should win.
        picked: The candidate that the judge picked; None where there is no verdict.
        problem: Why there is no verdict: a reason, or the request's error.
        message: What the judge wrote instead of one.
    """

    shown: tuple[int, ...]
    picked: int | None
    problem: str | ApiError | None = None
    message: str | None = None

    @property
    def reason(self) -> str | None:
        """Why there is no verdict, as a class for counting."""
        return self.problem.reason if isinstance(self.problem, ApiError) else self.problem

    def to_row(self) -> dict[str, Any]:
        """As it stands in ``verification``."""
        row: dict[str, Any] = {"shown": list(self.shown), "picked": self.picked}
        return row if self.problem is None else row | {"reason": self.reason}


@dataclass(frozen=True)
class Judgement:
    """The verdicts of all orders of one record."""

    orders: tuple[OrderVerdict, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every order has a verdict."""
        return bool(self.orders) and all(order.picked is not None for order in self.orders)

    @property
    def verdict(self) -> str:
        """``CHOSEN_IS_BEST``, ``CHOSEN_NOT_BEST`` or ``FAILED``."""
        if not self.is_complete:
            return "FAILED"
        return "CHOSEN_IS_BEST" if all(order.picked == 0 for order in self.orders) else "CHOSEN_NOT_BEST"

    @property
    def is_flipped(self) -> bool:
        """Whether the pick changes with the order."""
        return self.is_complete and len({order.picked for order in self.orders}) > 1

    @property
    def preferred(self) -> set[int]:
        """Candidates that were picked over number 0 in some order."""
        return {order.picked for order in self.orders if order.picked}

    def add_failures(self, failures: FailureLog, record_id: str, **details: Any) -> None:
        """Record the orders without a verdict."""
        for number, order in enumerate(self.orders):
            if order.problem is not None:
                message = {} if order.message is None else {"message": order.message}
                failures.add(record_id, order.problem, shown_as=number, **details, **message)


def shown_orders(record_id: str, n_candidates: int, seed: int, n_orders: int) -> list[tuple[int, ...]]:
    """The orders in which candidates are shown; the same for the same seed and id.

    The first one is shuffled; the others turn it round, so that no candidate stands twice at the same place. There are no
    more such orders than candidates: a pair has two.
    """
    order = list(range(n_candidates))
    random.Random(f"order:{seed}:{record_id}").shuffle(order)
    n = min(n_orders, n_candidates)
    shifts = [turn * n_candidates // n for turn in range(n)]
    return [tuple(order[shift:] + order[:shift]) for shift in shifts]


def parse_verdict(text: str, n_candidates: int, *, cut_off: bool = False) -> int | None:
    """Read the judge's answer strictly (``codes.common.judging.read_verdict``).

    Args:
        text: The judge's answer.
        n_candidates: How many letters were shown.
        cut_off: The answer ended at its token limit: its last line may be half a line and does not count.

    Returns:
        The position of the letter (A = 0); None where there is none, more than one, or one that was not
        shown.
    """
    letter = read_verdict(text, cut_off=cut_off)
    letters = candidate_letters(n_candidates)
    return letters.index(letter) if letter in letters else None


def judge_prompts(candidates: Candidates, n_orders: int, seed: int) -> list[list[Message]]:
    """One prompt an order; none where there are more candidates than letters."""
    if len(candidates.texts) > MAX_CANDIDATES:
        return []
    orders = shown_orders(candidates.id, len(candidates.texts), seed, n_orders)
    return [build_judge(candidates.messages, [candidates.texts[number] for number in order]) for order in orders]


def judge_each(
    api: Api,
    items: Iterable[tuple[Item, Candidates | None]],
    *,
    n_orders: int,
    seed: int,
    unread: UnreadVerdicts,
    description: str = "verdicts",
    total: int | None = None,
) -> Iterator[tuple[Item, Judgement | None]]:
    """Ask the judge about item after item, in order.

    Args:
        api: Asks the judge.
        items: Each with what to compare; None: the item is passed on without a judgement.
        n_orders: Orders to show each item's candidates in.
        seed: Of the orders.
        unread: Ends the run where no answer is a verdict.
        description: For the progress bar.
        total: Requests expected, for the progress bar.
    """

    def prompts_of(asked: tuple[Item, Candidates | None]) -> list[list[Message]]:
        return [] if asked[1] is None else judge_prompts(asked[1], n_orders, seed)

    for (item, candidates), outcomes in ask_each(api, items, prompts_of, description, total=total, accept_cut_off=True):
        if candidates is None:
            yield item, None
            continue
        orders = shown_orders(candidates.id, len(candidates.texts), seed, n_orders)
        if not outcomes:
            yield item, Judgement((OrderVerdict(orders[0], None, "too_many_candidates"),))
            continue
        verdicts = tuple(map(_read_outcome, orders, outcomes))
        for verdict, outcome in zip(verdicts, outcomes, strict=True):
            unread.see(outcome, verdict.picked is not None)
        yield item, Judgement(verdicts)


def _read_outcome(order: tuple[int, ...], outcome: Outcome) -> OrderVerdict:
    if isinstance(outcome, ApiError):
        return OrderVerdict(order, None, outcome)
    position = parse_verdict(outcome.text, len(order), cut_off=outcome.finish_reason == "length")
    if position is None:
        return OrderVerdict(order, None, "no_verdict", f"the judge wrote: {outcome.text[:200]}")
    return OrderVerdict(order, order[position])


# --- all records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What the judge said about one record.

    Attributes:
        record: As it was read.
        first: About all its answers; None where nobody was asked.
        kept: Positions in ``rejected`` of the answers that nobody picked over the chosen one, where some were.
        second: About the chosen answer and the kept ones, where these were judged again.
    """

    record: PreferenceRecord
    first: Judgement | None
    kept: tuple[int, ...] = ()
    second: Judgement | None = None

    @property
    def n_rounds(self) -> int:
        """How often the judge was asked about the record."""
        return (self.first is not None) + (self.second is not None)

    @property
    def deciding(self) -> Judgement | None:
        """The judgement that holds: the second one only where the chosen answer won it."""
        return self.second if self.second is not None and self.second.verdict == "CHOSEN_IS_BEST" else self.first

    @property
    def verdict(self) -> str:
        """One of ``VERIFY_VALUES``."""
        return "SKIPPED" if self.deciding is None else self.deciding.verdict

    @property
    def dropped(self) -> list[int]:
        """Positions in ``rejected`` of the answers that are to go."""
        if self.second is None or self.deciding is not self.second:
            return []
        return [position for position in range(len(self.record.rejected)) if position not in self.kept]


def _candidates(record: PreferenceRecord, positions: Iterable[int]) -> Candidates:
    texts = [record.chosen, *(record.rejected[position] for position in positions)]
    return Candidates(record.id, record.messages, texts)


def judge_records(
    api: Api, source: CheckedPreferenceFile, settings: VerifySettings, failures: FailureLog
) -> Iterator[Judged]:
    """Every record with its judgement, and with the second one where bad negatives are to be dropped."""
    unread = UnreadVerdicts(settings.max_unread)

    def judge(
        items: Iterable[tuple[Judged, Candidates | None]], number: int
    ) -> Iterator[tuple[Judged, Judgement | None]]:
        description = "verdicts" if number == 1 else f"verdicts, round {number}"
        for item, judgement in judge_each(
            api, items, n_orders=settings.orders, seed=settings.seed, unread=unread, description=description
        ):
            if judgement is not None:
                judgement.add_failures(failures, item.record.id, round=number)
            yield item, judgement

    all_answers = ((Judged(record, None), _candidates(record, range(len(record.rejected)))) for record in source)
    first_round = (Judged(item.record, judgement) for item, judgement in judge(all_answers, 1))
    if not settings.drop_bad_negatives:
        yield from first_round
        return

    def without_preferred() -> Iterator[tuple[Judged, Candidates | None]]:
        for item in first_round:
            assert item.first is not None
            preferred = item.first.preferred if item.first.verdict == "CHOSEN_NOT_BEST" else set()
            kept = tuple(index for index in range(len(item.record.rejected)) if index + 1 not in preferred)
            candidates = _candidates(item.record, kept) if preferred and kept else None
            yield Judged(item.record, item.first, kept), candidates

    for item, judgement in judge(without_preferred(), 2):
        yield Judged(item.record, item.first, item.kept, judgement)


def finish_record(judged: Judged, origin: dict[str, Any]) -> PreferenceRecord:
    """Write verdict and ``verification`` into a record (in place); drop the answers that are to go.

    ``verification`` holds the orders that decided, in numbers of the row as it is written (0: the chosen, ``i + 1``:
    ``rejected[i]``), the answers that were dropped (their position in the input, bias and origin), and judge, prompt version
    and seed.
    """
    record, deciding = judged.record, judged.deciding
    record.verify_correctness = judged.verdict
    if deciding is None:
        record.extra.pop("verification", None)
        return record
    injections = {entry["index"]: entry for entry in injections_of(record)}
    record.extra["verification"] = origin | {
        "orders": [order.to_row() for order in deciding.orders],
        "n_rounds": judged.n_rounds,
        "dropped": [
            {"index": position, "bias": record.bias_type[position]}
            | ({"injection": injections[position]} if position in injections else {})
            for position in judged.dropped
        ],
    }
    if judged.dropped:
        _keep_rejected(record, judged.kept, injections)
    return record


def _keep_rejected(record: PreferenceRecord, kept: Sequence[int], injections: dict[int, dict[str, Any]]) -> None:
    """Keep some rejected answers; what points at them by position follows."""
    new_index = {position: number for number, position in enumerate(kept)}
    record.rejected = [record.rejected[position] for position in kept]
    record.bias_type = [record.bias_type[position] for position in kept]
    record.margins = [record.margins[position] for position in kept if position < len(record.margins)]
    if injections:
        # A source that was dropped is nowhere any more.
        record.extra["injections"] = [
            entry
            | {"index": new_index[position]}
            | ({"source_index": new_index.get(entry["source_index"])} if "source_index" in entry else {})
            for position, entry in injections.items()
            if position in new_index
        ]


def filter_is_on(verify_filter: VerifyFilter, api_model: str) -> bool:
    """Resolve ``auto``: the embedded model's verdicts are written but not believed."""
    if verify_filter == "auto":
        return not (is_embedded_server() or is_embedded(api_model))
    return verify_filter == "on"


# --- the report -----------------------------------------------------------------------------------------------------------


@dataclass
class OrderCounts:
    """How a judge's picks hang on the order in which it sees the answers."""

    n_orders: int = 0
    n_first_place: int = 0
    expected_first: float = 0.0
    n_complete: int = 0
    n_flipped: int = 0

    def add(self, judgement: Judgement) -> None:
        """Count a judgement; one of a single order says nothing about flips."""
        decided = [order for order in judgement.orders if order.picked is not None]
        self.n_orders += len(decided)
        self.n_first_place += sum(order.picked == order.shown[0] for order in decided)
        self.expected_first += sum(1 / len(order.shown) for order in decided)
        if len(judgement.orders) > 1 and judgement.is_complete:
            self.n_complete += 1
            self.n_flipped += judgement.is_flipped

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        expected = self.expected_first / self.n_orders if self.n_orders else None
        return {
            "order_flips": wilson(self.n_flipped, self.n_complete).to_dict(),
            "position_a": wilson(self.n_first_place, self.n_orders).to_dict() | {"expected_rate": expected},
        }


@dataclass
class VerdictCounts:
    """Counts over all records; rates are taken of the first round, in which every candidate was shown."""

    verdicts: Counter[str] = field(default_factory=Counter)
    first_verdicts: Counter[str] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)
    picked: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    orders: OrderCounts = field(default_factory=OrderCounts)
    n_rounds: int = 0
    n_records_with_drops: int = 0

    def add(self, judged: Judged) -> None:
        """Count a record, before its bad answers are dropped."""
        biases = [bias or NOT_INJECTED for bias in judged.record.bias_type]
        self.verdicts[judged.verdict] += 1
        self.n_rounds = max(self.n_rounds, judged.n_rounds)
        self.dropped.update(biases[position] for position in judged.dropped)
        self.n_records_with_drops += bool(judged.dropped)
        if judged.first is None:
            return
        self.first_verdicts[judged.first.verdict] += 1
        self.orders.add(judged.first)
        for order in judged.first.orders:
            if order.picked is not None:
                self.shown.update(biases)
            if order.picked:
                self.picked[biases[order.picked - 1]] += 1

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        names = (*INJECTABLE, NOT_INJECTED)
        return {
            "n_rounds": self.n_rounds,
            "verdicts": _in_table_order(self.verdicts),
            "first_round_verdicts": _in_table_order(self.first_verdicts),
            "picked_over_chosen": {
                name: wilson(self.picked[name], self.shown[name]).to_dict() for name in names if self.shown[name]
            },
            **self.orders.to_dict(),
            "n_dropped_negatives": {name: self.dropped[name] for name in names if self.dropped[name]},
            "n_records_with_drops": self.n_records_with_drops,
        }


def _in_table_order(verdicts: Counter[str]) -> dict[str, int]:
    return {value: verdicts[value] for value in VERIFY_VALUES if verdicts[value]}


def format_table(section: dict[str, Any]) -> str:
    """The section as a short text table."""
    position, flips = section["position_a"], section["order_flips"]
    lines = [f"{name:<32} {count:>6}" for name, count in section["verdicts"].items()]
    rates = {f"picked as best: {name}": rate for name, rate in section["picked_over_chosen"].items()}
    if position["total"]:
        rates[f"position A picked (by chance {position['expected_rate']:.1%})"] = position
    if flips["total"]:
        rates["changed with order"] = flips
    lines += [f"{name:<32} {rate['count']:>6} / {rate['total']:<6} {rate['rate']:6.1%}" for name, rate in rates.items()]
    if dropped := sum(section["n_dropped_negatives"].values()):
        lines.append(f"{'dropped negatives':<32} {dropped:>6} in {section['n_records_with_drops']} records")
    return "\n".join(lines)


# --- the step -------------------------------------------------------------------------------------------------------------


def verify(settings: VerifySettings, api: Api | None) -> tuple[dict[str, Any], int]:
    """The whole step; without ``api`` nobody judges, and every record is ``SKIPPED``.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or no row left for training.
    """
    writers: set[str] = set()
    source = check_preference_file(
        settings.input_file,
        max_bad_rows=settings.max_bad_rows,
        limit=settings.limit,
        see=lambda record: writers.update(models_of(record)),
    )
    if api is not None and api.is_estimate:
        _estimate(api, source, settings)
    for folder in (settings.output_file.parent, settings.train_file.parent, settings.work_dir):
        ensure_writable_folder(folder)
    judge = None if api is None else api.model
    if judge is not None and judge in writers:
        warn_of_own_texts(judge, "name another one with --api_model (JUDGE_MODEL in run_construction.sh)")
    is_on = judge is not None and filter_is_on(settings.verify_filter, judge)
    origin = {"model": judge, "prompt_version": PROMPT_VERSION, "seed": settings.seed}
    counts, n_train = VerdictCounts(), 0
    with open_atomic(settings.train_file) as train_rows:
        with open_atomic(settings.output_file) as all_rows, open_failures(settings.work_dir, STEP) as failures:
            unjudged = (Judged(record, None) for record in source)
            for judged in unjudged if api is None else judge_records(api, source, settings, failures):
                counts.add(judged)
                row = finish_record(judged, origin).to_row()
                write_row(all_rows, row)
                if not is_on or judged.verdict == "CHOSEN_IS_BEST":
                    write_row(train_rows, row)
                    n_train += 1
        section = read_counts(source) | counts.to_dict()
        section |= {
            "output_file": str(settings.output_file),
            "train_file": str(settings.train_file),
            "judge": judge,
            "judge_wrote_answers": judge in writers,
            "prompt_version": PROMPT_VERSION,
            "seed": settings.seed,
            "orders": settings.orders,
            "drop_bad_negatives": settings.drop_bad_negatives,
            "verify_filter": settings.verify_filter,
            "filter_is_on": is_on,
            "n_train_rows": n_train,
            "n_failed": failures.counts(),
        }
        write_report_section(settings.work_dir, STEP, section | usage_counts(api))
        print(format_table(section))
        if not n_train:
            raise ContrastRMError(
                f"no row of {settings.input_file} was judged CHOSEN_IS_BEST, so there is nothing to train on; see "
                f"{failures.path}, use another judge (API_MODEL) or --verify_filter off"
            )
    return section, failures.n_requests


def _estimate(api: Api, source: CheckedPreferenceFile, settings: VerifySettings) -> None:
    """Print what the first round would ask (a second one depends on the verdicts) and leave the command."""

    def prompts() -> Iterator[list[Message]]:
        for record in source:
            # Stand-ins as long as the longest answer that is there.
            stand_ins = [max([record.chosen, *record.rejected], key=len)] * settings.expected_negatives
            texts = [record.chosen, *record.rejected, *stand_ins][:MAX_CANDIDATES]
            yield from judge_prompts(Candidates(record.id, record.messages, texts), settings.orders, settings.seed)

    api.ask(prompts(), "verdicts, first round", accept_cut_off=True)


def models_of(record: PreferenceRecord) -> set[str]:
    """The models that wrote a record's injected answers, as ``injections`` names them."""
    return {entry["model"] for entry in injections_of(record) if entry.get("model")}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return step_parser(
        STEP, __doc__, VerifySettings, temperature=judge_temperature(), max_tokens=judge_max_new_tokens()
    )


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    settings = settings_from(args, VerifySettings)

    def run_step(api: Api | None) -> int:
        section, n_failed_requests = verify(settings, api)
        state = "on" if section["filter_is_on"] else "off"
        print(f"{settings.train_file}: {section['n_train_rows']} of {section['n_records']} records (filter {state})")
        return 0 if api is None else api.exit_code(n_failed_requests)

    return run_with_client(args, run_step, title="verdicts", asks=settings.judge != "none")


if __name__ == "__main__":
    run(main)
