"""Let a judge confirm that the chosen answer is the best of its record, and write the training set.

Reads preference records (JSONL); writes all of them with ``verify_correctness`` and ``verification`` (``--output_file``)
and those fit for training (``--train_file``), in the order of the input. Leaves ``failed.jsonl``, ``verdicts.jsonl`` (every
verdict of every round), ``construction_report.json`` and the ledger in the work folder. Example:

``python -m codes.construct.verify_correctness --input_file output/construct/gptout.jsonl
--output_file output/construct/verified.jsonl --train_file output/construct/train.jsonl``

A record's candidates are shuffled by its id and shown in ``--orders`` orders, in each of which every candidate stands at
another place. A record is

* ``CHOSEN_IS_BEST`` when the chosen answer was picked in all orders,
* ``FAILED`` when some order brought no usable verdict (``failed.jsonl`` says why),
* ``CHOSEN_NOT_BEST`` otherwise,
* ``SKIPPED`` when nobody was asked (``--judge none``).

``--drop_bad_negatives`` drops each rejected answer that was picked over the chosen in any order, and judges what remains
again, in all orders, until the chosen answer wins or no rejected answer is left. Only a record that ends as
``CHOSEN_IS_BEST`` loses answers that way; any other is written whole, with the verdict of the first round.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from codes.common.base_model import is_embedded
from codes.common.biases import INJECTABLE
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.judging import (
    MAX_UNREAD,
    UnreadVerdicts,
    add_unread_argument,
    judge_max_new_tokens,
    judge_temperature,
    read_verdict,
)
from codes.common.llm import ApiError, Outcome
from codes.common.records import (
    VERIFY_VALUES,
    CheckedPreferenceFile,
    Message,
    PreferenceRecord,
    ensure_writable_folder,
    iter_jsonl,
    open_atomic,
    write_row,
)
from codes.common.stats import wilson
from codes.construct.api import Api, add_api_arguments, is_embedded_server, open_api_of
from codes.construct.build_prompt import PROMPT_VERSION, build_judge, candidate_letters
from codes.construct.steps import FailureLog, ask_groups, check_input, injections_of, read_counts, usage_counts
from codes.construct.work_dir import failure, hold_work_dir, request_failure, write_report_section

STEP = "verify_correctness"
MAX_CANDIDATES = 26
NOT_INJECTED = "not injected"
VERDICTS_FILE = "verdicts.jsonl"

VerifyFilter = Literal["auto", "on", "off"]
Item = TypeVar("Item")


# --- one record ---------------------------------------------------------------------------------------------------------


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
        reason: Why there is no verdict.
        message: What the judge wrote instead of one.
        error: The request's error, if that is the reason.
    """

    shown: tuple[int, ...]
    picked: int | None
    reason: str | None = None
    message: str | None = None
    error: ApiError | None = None


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


def judge_stream(
    api: Api,
    read_items: Callable[[], Iterable[tuple[Item, Candidates | None]]],
    *,
    n_orders: int,
    seed: int,
    unread: UnreadVerdicts,
    description: str = "verdicts",
    total: int | None = None,
) -> Iterator[tuple[Item, Judgement]]:
    """Ask the judge about item after item, in order.

    Args:
        api: Asks the judge.
        read_items: Gives the items and what to compare for each; the same every time (see ``ask_groups``). None: the item
            is passed on without verdicts.
        n_orders: Orders to show each item's candidates in.
        seed: Of the orders.
        unread: Ends the run where no answer is a verdict.
        description: For the progress bar.
        total: Requests expected, for the progress bar.
    """

    def groups() -> Iterator[tuple[tuple[Item, list[tuple[int, ...]]], list[list[Message]]]]:
        for item, candidates in read_items():
            orders = [] if candidates is None else shown_orders(candidates.id, len(candidates.texts), seed, n_orders)
            if candidates is None or len(candidates.texts) > MAX_CANDIDATES:
                yield (item, orders), []
                continue
            prompts = [
                build_judge(candidates.messages, [candidates.texts[number] for number in order]) for order in orders
            ]
            yield (item, orders), prompts

    for (item, orders), outcomes in ask_groups(api, groups, description, total=total, accept_cut_off=True):
        if orders and not outcomes:
            yield item, Judgement(tuple(OrderVerdict(order, None, "too_many_candidates") for order in orders[:1]))
            continue
        verdicts = tuple(map(_read_outcome, orders, outcomes))
        for verdict, outcome in zip(verdicts, outcomes, strict=True):
            unread.see(outcome, verdict.picked is not None)
        yield item, Judgement(verdicts)


def _read_outcome(order: tuple[int, ...], outcome: Outcome) -> OrderVerdict:
    if isinstance(outcome, ApiError):
        return OrderVerdict(order, None, outcome.reason, str(outcome), outcome)
    position = parse_verdict(outcome.text, len(order), cut_off=outcome.finish_reason == "length")
    if position is None:
        return OrderVerdict(order, None, "no_verdict", f"the judge wrote: {outcome.text[:200]}")
    return OrderVerdict(order, order[position])


def failure_of(record_id: str, step: str, order: OrderVerdict, **details: Any) -> dict[str, Any]:
    """The row of ``failed.jsonl`` for an order without a verdict."""
    assert order.reason is not None, "an order with a verdict did not fail"
    if order.error is not None:
        return request_failure(record_id, step, order.error, **details)
    message = {} if order.message is None else {"message": order.message}
    return failure(record_id, step, order.reason, **details, **message)


# --- rounds -------------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One round about one record, as it stands in ``verdicts.jsonl``.

    Attributes:
        alive: The record's rejected answers that were shown, by position.
        orders: Per order ``shown`` and ``picked`` as candidate numbers of the record (0: the chosen, ``i + 1``:
            ``rejected[i]``), and ``reason`` where there is no verdict.
        verdict: See ``Judgement.verdict``.
    """

    alive: list[int]
    orders: list[dict[str, Any]]
    verdict: str

    def still_alive(self) -> list[int]:
        """The rejected answers that were not picked over the chosen one."""
        picked = {order["picked"] for order in self.orders}
        return [position for position in self.alive if position + 1 not in picked]


def _round_of(judgement: Judgement, alive: list[int]) -> Round:
    numbers = [0, *(position + 1 for position in alive)]
    orders = []
    for order in judgement.orders:
        row: dict[str, Any] = {
            "shown": [numbers[candidate] for candidate in order.shown],
            "picked": None if order.picked is None else numbers[order.picked],
        }
        orders.append(row if order.reason is None else row | {"reason": order.reason})
    return Round(alive, orders, judgement.verdict)


def next_alive(rounds: Sequence[Round], n_rejected: int, drop_bad_negatives: bool) -> list[int] | None:
    """The rejected answers to show in the next round; None where no further round is due."""
    if not rounds:
        return list(range(n_rejected))
    last = rounds[-1]
    if not drop_bad_negatives or last.verdict != "CHOSEN_NOT_BEST":
        return None
    return last.still_alive() or None


def read_rounds(source: CheckedPreferenceFile, file: Path | None) -> Iterator[tuple[PreferenceRecord, list[Round]]]:
    """Each record with its rounds so far; ``None``: before the first one."""
    if file is None:
        yield from ((record, []) for record in source)
        return
    for record, (_, row) in zip(source, iter_jsonl(file), strict=True):
        yield record, [Round(**entry) for entry in row["rounds"]]


def judge_rounds(
    api: Api,
    source: CheckedPreferenceFile,
    verdicts_file: Path,
    *,
    n_orders: int,
    seed: int,
    drop_bad_negatives: bool,
    failures: FailureLog,
    unread: UnreadVerdicts,
) -> int:
    """Judge until no record needs another round; every round rewrites ``verdicts_file``, one row a record.

    Returns:
        The number of rounds.
    """
    n_rounds = 0
    before: Path | None = None
    while True:
        n_open = _judge_round(
            api,
            partial(read_rounds, source, before),
            verdicts_file,
            description="verdicts" if not n_rounds else f"verdicts, round {n_rounds + 1}",
            n_orders=n_orders,
            seed=seed,
            drop_bad_negatives=drop_bad_negatives,
            failures=failures,
            unread=unread,
        )
        n_rounds, before = n_rounds + 1, verdicts_file
        if not n_open:
            return n_rounds


def _judge_round(
    api: Api,
    read: Callable[[], Iterator[tuple[PreferenceRecord, list[Round]]]],
    verdicts_file: Path,
    *,
    description: str,
    n_orders: int,
    seed: int,
    drop_bad_negatives: bool,
    failures: FailureLog,
    unread: UnreadVerdicts,
) -> int:
    """One round; returns how many records need another one."""

    def items() -> Iterator[tuple[tuple[PreferenceRecord, list[Round], list[int] | None], Candidates | None]]:
        for record, rounds in read():
            alive = next_alive(rounds, len(record.rejected), drop_bad_negatives)
            texts = None if alive is None else [record.chosen, *(record.rejected[position] for position in alive)]
            candidates = None if texts is None else Candidates(record.id, record.messages, texts)
            yield (record, rounds, alive), candidates

    n_open = 0
    judged = judge_stream(api, items, n_orders=n_orders, seed=seed, unread=unread, description=description)
    with open_atomic(verdicts_file) as handle:
        for (record, rounds, alive), judgement in judged:
            if alive is not None:
                rounds.append(_round_of(judgement, alive))
                for number, order in enumerate(judgement.orders):
                    if order.reason is not None:
                        failures.add(failure_of(record.id, STEP, order, shown_as=number, round=len(rounds)))
                n_open += next_alive(rounds, len(record.rejected), drop_bad_negatives) is not None
            write_row(handle, {"id": record.id, "rounds": [asdict(entry) for entry in rounds]})
    return n_open


# --- the rows -----------------------------------------------------------------------------------------------------------


def finish_record(record: PreferenceRecord, rounds: Sequence[Round], origin: dict[str, Any]) -> list[str | None]:
    """Write verdict and ``verification`` into a record (in place); drop the answers that are to go.

    ``verification`` holds the orders of the round that decided, in numbers of the row as it is written, the answers that
    were dropped (their position in the input, bias and origin), and judge, prompt version and seed.

    Returns:
        The biases of the answers dropped.
    """
    if not rounds:
        record.verify_correctness = "SKIPPED"
        record.extra.pop("verification", None)
        return []
    deciding = rounds[-1] if rounds[-1].verdict == "CHOSEN_IS_BEST" else rounds[0]
    record.verify_correctness = deciding.verdict
    dropped = [position for position in range(len(record.rejected)) if position not in deciding.alive]
    names = {0: 0} | {position + 1: number for number, position in enumerate(deciding.alive, start=1)}
    orders = [
        order
        | {
            "shown": [names[number] for number in order["shown"]],
            "picked": None if order["picked"] is None else names[order["picked"]],
        }
        for order in deciding.orders
    ]
    injections = {entry["index"]: entry for entry in injections_of(record)}
    record.extra["verification"] = origin | {
        "orders": orders,
        "n_rounds": len(rounds),
        "dropped": [
            {"index": position, "bias": record.bias_type[position]}
            | ({"injection": injections[position]} if position in injections else {})
            for position in dropped
        ],
    }
    biases = [record.bias_type[position] for position in dropped]
    if dropped:
        _keep_rejected(record, deciding.alive, injections)
    return biases


def _keep_rejected(record: PreferenceRecord, alive: Sequence[int], injections: dict[int, dict[str, Any]]) -> None:
    """Keep some rejected answers; what points at them by position follows."""
    places = {position: number for number, position in enumerate(alive)}
    record.rejected = [record.rejected[position] for position in alive]
    record.bias_type = [record.bias_type[position] for position in alive]
    record.margins = [record.margins[position] for position in alive if position < len(record.margins)]
    if injections:
        # A source that was dropped is nowhere any more.
        record.extra["injections"] = [
            entry
            | {"index": places[position]}
            | ({"source_index": places.get(entry["source_index"])} if "source_index" in entry else {})
            for position, entry in injections.items()
            if position in places
        ]


def filter_is_on(verify_filter: VerifyFilter, api_model: str) -> bool:
    """Resolve ``auto``: the embedded model's verdicts are written but not believed."""
    if verify_filter == "auto":
        return not (is_embedded_server() or is_embedded(api_model))
    return verify_filter == "on"


# --- the report ---------------------------------------------------------------------------------------------------------


@dataclass
class VerdictCounts:
    """Counts over all records; rates are taken of the first round, in which every candidate was shown."""

    verdicts: Counter[str] = field(default_factory=Counter)
    first_verdicts: Counter[str] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)
    picked: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    n_orders: int = 0
    n_first_place: int = 0
    expected_first: float = 0.0
    n_complete: int = 0
    n_flipped: int = 0
    n_records_with_drops: int = 0

    def add_first_round(self, record: PreferenceRecord, first: Round) -> None:
        """Count the first round of a record."""
        self.first_verdicts[first.verdict] += 1
        decided = [order for order in first.orders if order["picked"] is not None]
        for order in decided:
            self.n_orders += 1
            self.n_first_place += order["picked"] == order["shown"][0]
            self.expected_first += 1 / len(order["shown"])
            self.shown.update(bias or NOT_INJECTED for bias in record.bias_type)
            if order["picked"]:
                self.picked[record.bias_type[order["picked"] - 1] or NOT_INJECTED] += 1
        if len(first.orders) > 1 and len(decided) == len(first.orders):
            self.n_complete += 1
            self.n_flipped += len({order["picked"] for order in decided}) > 1

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        first = wilson(self.n_first_place, self.n_orders).to_dict()
        expected = self.expected_first / self.n_orders if self.n_orders else None
        return {
            "verdicts": _in_table_order(self.verdicts),
            "first_round_verdicts": _in_table_order(self.first_verdicts),
            "picked_over_chosen": {
                name: wilson(self.picked[name], self.shown[name]).to_dict()
                for name in (*INJECTABLE, NOT_INJECTED)
                if self.shown[name]
            },
            "order_flips": wilson(self.n_flipped, self.n_complete).to_dict(),
            "position_a": first | {"expected_rate": expected},
            "n_dropped_negatives": {
                name: self.dropped[name] for name in (*INJECTABLE, NOT_INJECTED) if self.dropped[name]
            },
            "n_records_with_drops": self.n_records_with_drops,
        }


def _in_table_order(verdicts: Counter[str]) -> dict[str, int]:
    return {value: verdicts[value] for value in VERIFY_VALUES if verdicts[value]}


def format_table(summary: dict[str, Any]) -> str:
    """The summary as a short text table."""
    lines = ["verdict                n"]
    lines += [f"{name:<18} {count:>5}" for name, count in summary["verdicts"].items()]
    if summary["picked_over_chosen"]:
        lines += ["", "rejected answer    picked as best / shown"]
    for name, rate in summary["picked_over_chosen"].items():
        lines.append(f"{name:<18} {rate['count']:>6} / {rate['total']:<6} {rate['rate']:6.1%}")
    position, flips = summary["position_a"], summary["order_flips"]
    if position["total"]:
        lines += [
            "",
            f"position A picked  {position['count']:>6} / {position['total']:<6} {position['rate']:6.1%}",
        ]
        lines[-1] += f"  (without preference: {position['expected_rate']:.1%})"
    if flips["total"]:
        lines.append(f"changed with order {flips['count']:>6} / {flips['total']:<6} {flips['rate']:6.1%}")
    if dropped := sum(summary["n_dropped_negatives"].values()):
        lines.append(f"dropped negatives  {dropped:>6} in {summary['n_records_with_drops']} records")
    return "\n".join(lines)


# --- the step -----------------------------------------------------------------------------------------------------------


def verify(
    *,
    api: Api | None,
    input_file: Path,
    output_file: Path,
    train_file: Path,
    work_dir: Path,
    verify_filter: VerifyFilter,
    limit: int,
    seed: int,
    max_bad_rows: int,
    n_orders: int = 2,
    drop_bad_negatives: bool = False,
    expected_negatives: int = 0,
    max_unread: int = MAX_UNREAD,
) -> tuple[dict[str, Any], int]:
    """The whole step.

    Args:
        api: Asks the judge; None: nobody judges, and every record is ``SKIPPED``.
        expected_negatives: For an estimate alone: rejected answers that each record is still to get.
        max_unread: See ``UnreadVerdicts``.

    Returns:
        The step's section of the report, and the number of requests that brought no answer.

    Raises:
        ContrastRMError: Unusable input, a fatal error of the server, or no row left for training.
    """
    writers: set[str] = set()
    source = check_input(
        input_file,
        max_bad_rows=max_bad_rows,
        limit=limit,
        require_rejected=True,
        see=lambda record: writers.update(models_of(record)),
    )
    if api is not None and api.is_estimate:
        _estimate(api, source, n_orders=n_orders, seed=seed, expected_negatives=expected_negatives)
    for folder in (output_file.parent, train_file.parent, work_dir):
        ensure_writable_folder(folder)
    is_same = api is not None and api.model in writers
    if is_same and api is not None:
        print(
            f"warning: the judge {api.model} wrote some of these answers itself, and models favour their own texts; "
            "name another one with --api_model (JUDGE_MODEL in run_construction.sh)",
            file=sys.stderr,
            flush=True,
        )
    is_on = api is not None and filter_is_on(verify_filter, api.model)
    origin = {"model": api.model if api is not None else None, "prompt_version": PROMPT_VERSION, "seed": seed}
    counts, n_rounds, n_train = VerdictCounts(), 0, 0
    verdicts_file = None if api is None else work_dir / VERDICTS_FILE
    with FailureLog(work_dir, STEP) as failures:
        if api is not None and verdicts_file is not None:
            n_rounds = judge_rounds(
                api,
                source,
                verdicts_file,
                n_orders=n_orders,
                seed=seed,
                drop_bad_negatives=drop_bad_negatives,
                failures=failures,
                unread=UnreadVerdicts(max_unread),
            )
        failed_file = failures.commit()
        with open_atomic(output_file) as all_rows:
            for record in _finished(source, verdicts_file, origin, counts):
                write_row(all_rows, record.to_row())
        section = read_counts(source) | {
            "output_file": str(output_file),
            "train_file": str(train_file),
            "judge": origin["model"],
            "judge_wrote_answers": is_same,
            "prompt_version": PROMPT_VERSION,
            "seed": seed,
            "orders": n_orders,
            "n_rounds": n_rounds,
            "drop_bad_negatives": drop_bad_negatives,
            "verify_filter": verify_filter,
            "filter_is_on": is_on,
            **counts.to_dict(),
        }
        n_train = section["verdicts"].get("CHOSEN_IS_BEST", 0) if is_on else len(source)
        section |= {"n_train_rows": n_train, "n_failed": failures.counts()}
        write_report_section(work_dir, STEP, section | usage_counts(api))
        print(format_table(section))
        if not n_train:
            raise ContrastRMError(
                f"no row of {input_file} was judged CHOSEN_IS_BEST, so there is nothing to train on; see "
                f"{failed_file}, use another judge (API_MODEL) or --verify_filter off"
            )
        with open_atomic(train_file) as train_rows:
            for _, row in iter_jsonl(output_file):
                if not is_on or row["verify_correctness"] == "CHOSEN_IS_BEST":
                    write_row(train_rows, row)
        return section, failures.n_requests


def _estimate(api: Api, source: CheckedPreferenceFile, *, n_orders: int, seed: int, expected_negatives: int) -> None:
    """Print what the first round would ask (further rounds depend on the verdicts) and leave the command."""

    def prompts() -> Iterator[list[Message]]:
        for record in source:
            # Stand-ins as long as the longest answer that is there.
            stand_ins = [max([record.chosen, *record.rejected], key=len)] * expected_negatives
            texts = [record.chosen, *record.rejected, *stand_ins][:MAX_CANDIDATES]
            for order in shown_orders(record.id, len(texts), seed, n_orders):
                yield build_judge(record.messages, [texts[number] for number in order])

    api.ask(prompts(), "verdicts, first round", accept_cut_off=True)


def _finished(
    source: CheckedPreferenceFile, verdicts_file: Path | None, origin: dict[str, Any], counts: VerdictCounts
) -> Iterator[PreferenceRecord]:
    for record, rounds in read_rounds(source, verdicts_file):
        if rounds:
            counts.add_first_round(record, rounds[0])
        dropped = finish_record(record, rounds, origin)
        counts.dropped.update(bias or NOT_INJECTED for bias in dropped)
        counts.n_records_with_drops += bool(dropped)
        counts.verdicts[str(record.verify_correctness)] += 1
        yield record


def models_of(record: PreferenceRecord) -> set[str]:
    """The models that wrote a record's injected answers, as ``injections`` names them."""
    return {entry["model"] for entry in injections_of(record) if entry.get("model")}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m codes.construct.verify_correctness", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--input_file", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True, help="all judged rows")
    parser.add_argument("--train_file", type=Path, required=True, help="the rows fit for training")
    parser.add_argument("--judge", choices=("model", "none"), default="model", help="none: ask nobody, keep all rows")
    parser.add_argument(
        "--verify_filter",
        choices=("auto", "on", "off"),
        default="auto",
        help="on: keep CHOSEN_IS_BEST; off: keep all; auto: on unless the judge is the embedded model or none",
    )
    parser.add_argument("--orders", type=int, default=2, help="orders in which a record's answers are shown")
    parser.add_argument(
        "--drop_bad_negatives",
        action="store_true",
        help="drop a rejected answer that is picked over the chosen, and judge the rest again",
    )
    parser.add_argument(
        "--expected_negatives",
        type=int,
        default=0,
        help="with --estimate: rejected answers that each record is still to get from the steps before",
    )
    add_unread_argument(parser)
    add_api_arguments(parser, temperature=judge_temperature(), max_new_tokens=judge_max_new_tokens())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the step from the command line."""
    args = build_parser().parse_args(argv)
    if args.orders < 1:
        raise ContrastRMError(f"--orders must be at least 1, not {args.orders}")
    if args.judge == "none" and args.verify_filter == "on":
        raise ContrastRMError("--judge none gives no verdict to filter by; use --verify_filter auto or off")

    def run_step(api: Api | None) -> int:
        section, n_failed_requests = verify(
            api=api,
            input_file=args.input_file,
            output_file=args.output_file,
            train_file=args.train_file,
            work_dir=args.work_dir,
            verify_filter=args.verify_filter,
            limit=args.limit,
            seed=args.seed,
            max_bad_rows=args.max_bad_rows,
            n_orders=args.orders,
            drop_bad_negatives=args.drop_bad_negatives,
            expected_negatives=args.expected_negatives,
            max_unread=args.max_unread,
        )
        state = "on" if section["filter_is_on"] else "off"
        print(f"{args.train_file}: {section['n_train_rows']} of {section['n_records']} records (filter {state})")
        return 0 if api is None else api.exit_code(n_failed_requests)

    if args.judge == "none":
        if args.estimate:
            print("estimate for verdicts: no judge is asked; nothing to pay")
            return 0
        with hold_work_dir(args.work_dir):
            return run_step(None)
    api = open_api_of(args)
    with api.ledger:
        return run_step(api)


if __name__ == "__main__":
    run(main)
