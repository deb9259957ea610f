"""A chat model as a pairwise judge on the same files: the biases, RewardBench, RM-Bench, LLMBar and JudgeBench.

Reads ``<data_dir>/<bias>_bias.jsonl`` (``--bias_type none``: no biases) and, where ``--data_file`` names one, a
benchmark file. Every pair is asked in both orders, through the engine, the ledger and the budget that construction
uses (``codes.common.llm_session``): a run that was stopped goes on where it was. Writes, in ``results/<model>/``,
what the evaluation of a reward model writes (``bias_summary.json``, ``bias_<bias>.jsonl``,
``reward_bench_summary.json``, ...), each summary with a block ``judge``; and the ledger in ``--work_dir``.

    OPENAI_API_KEY=… python -m codes.evaluate.judge --api_model some-model --bias_type length,gender
    python -m codes.construct.embedded_server -- python -m codes.evaluate.judge --limit_per_bias 4

The verdict on a pair: *correct* where the better answer wins in both orders, *wrong* where the other one does, else
a *tie* (the orders disagree, or the judge calls it a tie). BSR is what it is for scores: of the pairs judged correct
before the rewrite, those judged wrong after it; a tie is no flip. An answer that cannot be read as a verdict is none:
its pair is left out and counted, and so is a pair whose request failed. RM-Bench has nine pairs a row; a row is left
out where one of them is. What needs scores (shifts of the gap,
attribution, the length regression) is null.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codes.common.biases import EVALUABLE
from codes.common.chat import Conversation
from codes.common.cli import natural, run
from codes.common.errors import ContrastRMError
from codes.common.judging import (
    MAX_UNREAD,
    UnreadVerdicts,
    add_unread_argument,
    judge_max_new_tokens,
    judge_temperature,
    read_verdict,
)
from codes.common.llm import ApiError, Completion, Outcome
from codes.common.llm_session import Api, add_llm_arguments, open_api
from codes.common.questions import question_key
from codes.common.records import (
    BiasRecord,
    Message,
    ReadReport,
    RefinementRecord,
    enclose,
    file_sha256,
    messages_to_text,
    write_json,
    write_jsonl,
)
from codes.common.reporting import percent, percent_interval, rate_cell, run_metadata, text_table
from codes.evaluate.api import PairVerdict
from codes.evaluate.benchmark_figures import (
    SECTIONS,
    SUBSETS,
    BenchmarkItem,
    ItemOutcome,
    mean_of_sections,
)
from codes.evaluate.benchmarks import (
    BENCHMARKS,
    REWARD_BENCH,
    describe_source,
    detect_format,
    label_of,
    read_benchmark,
)
from codes.evaluate.data_checks import audit, flagged_lines, kinds_by_line, lines_by_kind
from codes.evaluate.eval_reward_bench import print_summary
from codes.evaluate.eval_rm import (
    PLACEBO_SENTENCE,
    REFINEMENT_REQUEST,
    BiasData,
    bias_names,
    defect_notes,
    outcome_row,
    read_bias_data,
    row_id,
    summarise,
    write_results,
)
from codes.evaluate.metrics import (
    PairOutcome,
    RefinementOutcome,
    Stratum,
    Verdict,
    rate_fields,
    stratified_rate,
)
from codes.evaluate.report import write_report
from codes.evaluate.report_tables import BIAS_HEADER, REFINEMENT_HEADER, bias_rows, refinement_rows
from codes.evaluate.results import model_results_folder

PROMPT_VERSION = "1"
TIE = "tie"
# The reason of an answer that was read and is no verdict; every other reason is that of a request that failed.
NO_VERDICT = "no_verdict"
# Formats whose figures are made of pairs. RewardBench 2 gives shares of a tied top and margins: its figures need scores.
PAIR_FORMATS = (REWARD_BENCH, "rm_bench", "llmbar", "judgebench")
NO_MODEL = (
    "no model to judge with ({missing} not set): set OPENAI_API_KEY and API_MODEL (and OPENAI_BASE_URL for another server "
    "than OpenAI's; a local server without keys takes any word), or run the command beside the embedded model: "
    "python -m codes.construct.embedded_server -- python -m codes.evaluate.judge …"
)
# Neutral on purpose: a judge that is told to ignore style is another judge. It ends in the word to go on from, so that
# small models answer with a letter too.
_PROMPT = """\
{conversation}

{first}

{second}

Which answer to the last request is better? Reply with one letter only: A or B.
Best:"""

Winner = Literal["better", "other", "tie"]
Answers = tuple[Conversation, Conversation]
# Verdicts as scores of (better, other), so that judges and reward models are summed up by the same functions.
SCORES: dict[Verdict | None, tuple[float, float]] = {
    "correct": (1.0, 0.0),
    "wrong": (0.0, 1.0),
    "tie": (0.5, 0.5),
    None: (math.nan, math.nan),
}
# Figures that verdicts do not have. Their keys stay, for readers of the summary; every value in them is null.
SCORE_FIGURES = frozenset(
    {
        *("score_gap_shift", "gap_shift_minus_placebo", "score_shift", "score_sd", "flip_attribution"),
        *("n_without_trace", "regression", "baselines"),
    }
)


# --- the judge ---


def build_prompt(messages: Sequence[Message], first: str, second: str) -> list[Message]:
    """Ask which of two answers is better. The order given is the order shown."""
    conversation = messages_to_text(list(messages))
    text = _PROMPT.format(
        conversation=enclose("conversation", conversation, among=[first, second]),
        first=enclose("answer", first, among=[conversation, second], attributes=' letter="A"'),
        second=enclose("answer", second, among=[conversation, first], attributes=' letter="B"'),
    )
    return [{"role": "user", "content": text}]


class ChatJudge:
    """A chat model behind ``codes.common.llm_session``.

    Attributes:
        n_failed_requests: Verdicts that are missing because the request brought no answer.
    """

    def __init__(self, api: Api, max_unread: int = MAX_UNREAD) -> None:
        self._api = api
        self._unread = UnreadVerdicts(max_unread)
        self.n_failed_requests = 0

    def judge(self, pairs: Sequence[Answers]) -> list[PairVerdict]:
        """Judge every pair, in the caller's order.

        Raises:
            ContrastRMError: The run cannot go on; what was answered is in the ledger.
        """
        prompts = (build_prompt(first.messages, first.answer, second.answer) for first, second in pairs)
        outcomes = self._api.ask_stream(prompts, "verdicts", total=len(pairs), accept_cut_off=True)
        return [self._read(outcome) for outcome in outcomes]

    def _read(self, outcome: Outcome) -> PairVerdict:
        if isinstance(outcome, ApiError):
            self.n_failed_requests += 1
            verdict = PairVerdict(None, str(outcome), outcome.reason)
        else:
            verdict = read_answer(outcome)
        self._unread.see(outcome, verdict.winner is not None)
        return verdict


def read_answer(completion: Completion) -> PairVerdict:
    """A verdict, where the answer is one."""
    word = read_verdict(completion.text, words=(TIE,), cut_off=completion.finish_reason == "length")
    winners: dict[str | None, Literal["first", "second", "tie"]] = {"A": "first", "B": "second", TIE: "tie"}
    if word not in winners:
        return PairVerdict(None, completion.text, NO_VERDICT)
    return PairVerdict(winners[word], completion.text)


@dataclass(frozen=True)
class OrderVerdict:
    """What was said where the better answer stood first, or second."""

    winner: Winner | None
    picked_first: bool | None
    reason: str | None = None
    text: str = ""

    def to_row(self) -> dict[str, Any]:
        """As it stands in the results: the judge's words only where they are no verdict."""
        row: dict[str, Any] = {"winner": self.winner}
        return row if self.winner is not None else row | {"reason": self.reason, "text": self.text[:200]}


@dataclass(frozen=True)
class PairJudgement:
    """Both orders of one pair."""

    question: str
    orders: tuple[OrderVerdict, OrderVerdict]

    @property
    def cluster(self) -> str:
        """The unit of chance: the question, whatever its layout."""
        return question_key(self.question)

    @property
    def is_read(self) -> bool:
        """Whether both orders have a verdict."""
        return all(order.winner is not None for order in self.orders)

    @property
    def verdict(self) -> Verdict | None:
        """What both orders agree on; a tie where they do not, None where one of them has no verdict."""
        if not self.is_read:
            return None
        winners = {order.winner for order in self.orders}
        if winners == {"better"}:
            return "correct"
        return "wrong" if winners == {"other"} else "tie"

    def published_credit(self, format_name: str) -> float | None:
        """What the pair adds to the figure that a benchmark publishes of judges; None where a request failed.

        JudgeBench: 1 where more orders are right than wrong; a tie or no verdict is neither.
        LLMBar: the share of orders that are right, so that a judge that always says A has one half.
        RewardBench (generative models): the mean over the orders of 1, 0, or one half for a tie or no verdict.

        Source: ``compute_final_metrics`` of https://github.com/ScalerLab/JudgeBench; ``correct_average`` of
            https://github.com/princeton-nlp/LLMBar; ``scripts/run_generative.py`` of
            https://github.com/allenai/reward-bench, which asks in one order drawn by chance.
        """
        if any(order.reason not in (None, NO_VERDICT) for order in self.orders):
            return None
        winners = [order.winner for order in self.orders]
        if format_name == "judgebench":
            return float(winners.count("better") > winners.count("other"))
        undecided = 0.5 if format_name == REWARD_BENCH else 0.0
        credits = {"better": 1.0, "other": 0.0}
        return sum(credits.get(str(winner), undecided) for winner in winners) / len(winners)

    def to_rows(self) -> list[dict[str, Any]]:
        """The two orders, the one with the better answer first at the start."""
        return [order.to_row() for order in self.orders]


def judge_pairs(
    judge: Callable[[Sequence[Answers]], list[PairVerdict]], pairs: Sequence[Answers]
) -> list[PairJudgement]:
    """Have every pair judged in both orders.

    Args:
        judge: ``PairJudge.judge``.
        pairs: (better, other).
    """
    verdicts = judge([order for better, other in pairs for order in ((better, other), (other, better))])
    assert len(verdicts) == 2 * len(pairs), "a judge gives one verdict a pair"
    return [
        PairJudgement(
            messages_to_text(list(better.messages)),
            (_order(verdicts[2 * place], 0), _order(verdicts[2 * place + 1], 1)),
        )
        for place, (better, _) in enumerate(pairs)
    ]


def _order(verdict: PairVerdict, place_of_better: int) -> OrderVerdict:
    if verdict.winner is None:
        return OrderVerdict(None, None, verdict.reason or NO_VERDICT, verdict.text)
    if verdict.winner == "tie":
        return OrderVerdict("tie", None)
    first = verdict.winner == "first"
    return OrderVerdict("better" if first == (place_of_better == 0) else "other", first)


def consistency(judgements: Sequence[PairJudgement]) -> dict[str, Any]:
    """How far the verdicts depend on the order, and what became of those that are none.

    ``position_consistency``: pairs with the same verdict in both orders / pairs with two verdicts.
    ``first_answer_rate``: verdicts for the answer shown first / verdicts for one of the two.
    """
    read = [judgement for judgement in judgements if judgement.is_read]
    same = [len({order.winner for order in judgement.orders}) == 1 for judgement in read]
    orders = [(judgement.cluster, order) for judgement in judgements for order in judgement.orders]
    picks = [(question, order.picked_first) for question, order in orders if order.picked_first is not None]
    reasons = Counter(order.reason for _, order in orders if order.reason is not None)
    return {
        "n_pairs": len(judgements),
        "n_pairs_without_verdict": len(judgements) - len(read),
        "n_verdicts": sum(order.winner is not None for _, order in orders),
        "n_without_verdict": dict(reasons.most_common()),
        "n_declared_ties": sum(order.winner == "tie" for _, order in orders),
        "n_disagreements": same.count(False),
        **rate_fields("position_consistency", same, [True] * len(same), [judgement.cluster for judgement in read]),
        **rate_fields(
            "first_answer_rate", [bool(pick) for _, pick in picks], [True] * len(picks), [q for q, _ in picks]
        ),
    }


# --- the biases ---


def bias_pairs(record: BiasRecord | RefinementRecord, placebo: tuple[str, str] | None = None) -> dict[str, Answers]:
    """The pairs of one row by name, each as (better, other): ``original``, ``biased`` and, where there is one, ``placebo``.

    Refinement-aware: ``alone`` and ``after_history``, each as (refined, original); the history stands inside the
    refined answer's text, since both answers are shown under one request.
    """
    prompt = [{"role": "user", "content": record.question}]

    def answers(better: str, other: str) -> Answers:
        return Conversation(prompt, better), Conversation(prompt, other)

    if isinstance(record, RefinementRecord):
        refined, original = record.rewritten_response, record.original_response
        history = messages_to_text(
            [
                {"role": "assistant", "content": original},
                {"role": "user", "content": REFINEMENT_REQUEST},
                {"role": "assistant", "content": refined},
            ]
        )
        return {"alone": answers(refined, original), "after_history": answers(history, original)}
    better, other = record.better, 1 - record.better
    pairs = {
        "original": answers(record.original[better], record.original[other]),
        "biased": answers(record.rewritten[better], record.rewritten[other]),
    }
    return pairs if placebo is None else pairs | {"placebo": answers(*placebo)}


def bias_outcome(
    record: BiasRecord | RefinementRecord, judged: Mapping[str, PairJudgement], *, is_identity: bool = False
) -> PairOutcome | RefinementOutcome:
    """A row's verdicts in the shape of a reward model's scores."""
    scores = {name: SCORES[judgement.verdict] for name, judgement in judged.items()}
    if isinstance(record, RefinementRecord):
        # Against an original answer at one half, the refined one at 1, 0 or one half says the verdict.
        alone, after_history = scores["alone"][0], scores["after_history"][0]
        return RefinementOutcome(record.line, record.question, alone, after_history, 0.5, row_id(record))
    better, other = record.better, 1 - record.better
    return PairOutcome(
        line=record.line,
        question=record.question,
        original=scores["original"],
        biased=scores["biased"],
        original_lengths=(len(record.original[better]), len(record.original[other])),
        biased_lengths=(len(record.rewritten[better]), len(record.rewritten[other])),
        placebo=scores.get("placebo"),
        is_identity=is_identity,
        row_id=row_id(record),
    )


def summarise_biases(
    outcomes: Mapping[str, Sequence[PairOutcome | RefinementOutcome]],
    flagged: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Any]:
    """``bias_summary.json`` of a reward model, without what only scores have.

    Args:
        flagged: Lines of each bias that the figures under ``clean`` do without.
    """
    return without_scores(summarise(outcomes, flagged=flagged))


def without_scores(fields: dict[str, Any]) -> dict[str, Any]:
    """The same keys; null under those of ``SCORE_FIGURES``."""
    return {key: _blank(value) if key in SCORE_FIGURES else _without_scores(value) for key, value in fields.items()}


def _without_scores(value: Any) -> Any:
    return without_scores(value) if isinstance(value, dict) else value


def _blank(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    return {key: item if key == "n_flips" else _blank(item) for key, item in value.items()}


def bias_row(
    outcome: PairOutcome | RefinementOutcome, judged: Mapping[str, PairJudgement], defects: Sequence[str] = ()
) -> dict[str, Any]:
    """One line of ``bias_<bias>.jsonl``: the verdicts, what was said in each order, and what the audit found."""
    row = {
        key: None if key.startswith("score_") or key == "flip_cause" else value
        for key, value in outcome_row(outcome, defects).items()
    }
    if isinstance(outcome, PairOutcome):
        row |= {"original_verdict": judged["original"].verdict, "biased_verdict": judged["biased"].verdict}
    return row | {"orders": {name: judgement.to_rows() for name, judgement in judged.items()}}


# --- one run ---


@dataclass(frozen=True)
class BiasTask:
    """The pairs of one bias, by row."""

    data: BiasData
    pairs: Sequence[Mapping[str, Answers]]

    @classmethod
    def of(cls, data: BiasData) -> BiasTask:
        """All pairs of all rows."""
        placebos = data.placebos or [None] * len(data.records)
        return cls(data, [bias_pairs(*row) for row in zip(data.records, placebos, strict=True)])


@dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark file: its items, and what may be said of their origin."""

    format_name: str
    items: Sequence[BenchmarkItem]
    reports: Sequence[ReadReport]
    source: dict[str, Any]
    data_file: str

    @property
    def pairs(self) -> list[Answers]:
        """Every better answer of an item beside every other one: one pair, in RM-Bench nine."""
        return [
            (Conversation(item.messages, better), Conversation(item.messages, other))
            for item in self.items
            for better in item.chosen
            for other in item.rejected
        ]

    def by_item(self, judgements: Sequence[PairJudgement]) -> list[list[PairJudgement]]:
        """The judgements on ``pairs``, item by item."""
        given = iter(judgements)
        return [[next(given) for _ in range(len(item.chosen) * len(item.rejected))] for item in self.items]


def read_benchmark_task(
    data_file: str, format_name: str, *, category: str, limit: int, seed: int, max_bad_rows: int
) -> BenchmarkTask:
    """Read a benchmark file whose figures are made of pairs.

    Raises:
        ContrastRMError: What reading raises, or a format whose figures need scores.
    """
    name = detect_format(data_file) if format_name == "auto" else format_name
    if name not in PAIR_FORMATS:
        raise ContrastRMError(
            f"{data_file} is of format {name}, whose figures need a score of every answer; a judge takes "
            f"{', '.join(PAIR_FORMATS)}"
        )
    choice: dict[str, Any] = {"category": category, "limit": limit, "seed": seed, "max_bad_rows": max_bad_rows}
    items, reports = read_benchmark(data_file, name, **choice)
    return BenchmarkTask(name, items, reports, describe_source(data_file, items), data_file)


def summarise_benchmark_task(task: BenchmarkTask, judgements: Sequence[PairJudgement]) -> dict[str, Any]:
    """The summary of the format, under the label of the data."""
    groups = zip(task.items, task.by_item(judgements), strict=True)
    figures = BENCHMARKS[task.format_name].summarise([item_outcome(item, group) for item, group in groups])
    if task.format_name == REWARD_BENCH:
        figures |= published_rewardbench_score(task.items, judgements)
    elif task.format_name in ("judgebench", "llmbar"):
        figures |= published_accuracy(task.format_name, judgements)
    return {"label": label_of(task.format_name, task.source, figures["complete"]), **figures}


def published_accuracy(format_name: str, judgements: Sequence[PairJudgement]) -> dict[str, Any]:
    """``published_accuracy`` (the mean credit of the pairs), its count and total, and its interval."""
    stratum = _credit_stratum(1.0, format_name, judgements)
    mean, interval = stratified_rate([stratum])
    return {
        "published_accuracy": mean,
        "published_accuracy_count": sum(stratum.numerators),
        "published_accuracy_total": len(stratum.numerators),
        "published_accuracy_ci": interval,
    }


def published_rewardbench_score(items: Sequence[BenchmarkItem], judgements: Sequence[PairJudgement]) -> dict[str, Any]:
    """RewardBench's mean of sections over the credits of pairs; None unless every subset has its official rows."""
    by_subset: dict[str, list[PairJudgement]] = {subset.name: [] for subset in SUBSETS}
    for item, judgement in zip(items, judgements, strict=True):
        by_subset[item.subset].append(judgement)
    strata = {name: _credit_stratum(1.0, REWARD_BENCH, of_subset) for name, of_subset in by_subset.items()}
    whole = all(len(strata[subset.name].numerators) == subset.n_rows for subset in SUBSETS)
    score, interval = mean_of_sections(strata) if whole else (None, None)
    return {"published_rewardbench_score": score, "published_rewardbench_score_ci": interval}


def _credit_stratum(weight: float, format_name: str, judgements: Sequence[PairJudgement]) -> Stratum:
    credits = [(judgement.published_credit(format_name), judgement.cluster) for judgement in judgements]
    known = [(credit, cluster) for credit, cluster in credits if credit is not None]
    return Stratum(weight, [credit for credit, _ in known], [True] * len(known), [cluster for _, cluster in known])


def published_line(summary: Mapping[str, Any]) -> str | None:
    """A line for the console: the figure as the benchmark publishes it of judges, where it differs from ours by definition."""
    name = next((key for key in ("published_rewardbench_score", "published_accuracy") if key in summary), None)
    if name is None:
        return None
    value = summary[name]
    shown = "null" if value is None else f"{percent(value, 2)} {percent_interval(summary[f'{name}_ci'])}"
    return f"{name} (two orders, a tie and no verdict credited as the benchmark does): {shown}"


def item_outcome(item: BenchmarkItem, judgements: Sequence[PairJudgement]) -> ItemOutcome:
    """The verdicts on an item, as the figures of the benchmarks take them."""
    given = iter(judgements)
    return ItemOutcome(item, judged=tuple(tuple(next(given).verdict for _ in item.rejected) for _ in item.chosen))


def benchmark_row(item: BenchmarkItem, judgements: Sequence[PairJudgement]) -> dict[str, Any]:
    """One line of ``<format>.jsonl``; in RM-Bench ``orders`` are those of each comparison, row by row of the matrix."""
    outcome = item_outcome(item, judgements)
    orders = [judgement.to_rows() for judgement in judgements]
    return {
        "file": Path(item.file).name,
        "line": item.line,
        "id": item.id,
        "subset": item.subset,
        "question": item.question,
        "verdict": outcome.verdict if outcome.is_scored else None,
        "verdicts": [list(row) for row in outcome.judged],
        "orders": orders[0] if len(orders) == 1 else orders,
    }


def judge_identity(api: Api) -> str:
    """Hex SHA-256 of what makes the judge: another one gets another results folder."""
    parts = (api.engine.client.endpoint, api.model, api.temperature, api.max_new_tokens, api.sample, PROMPT_VERSION)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def judge_metadata(api: Api, reports: Iterable[ReadReport], seconds: float) -> dict[str, Any]:
    """What a summary says of its making."""
    return {
        "model_path": api.model,
        "weight_hash": judge_identity(api),
        "architecture": "chat model as a pairwise judge",
        "endpoint": api.engine.client.endpoint,
        "prompt_version": PROMPT_VERSION,
        "temperature": api.temperature,
        "max_new_tokens": api.max_new_tokens,
        "data_files": [
            {
                "path": report.path,
                "sha256": file_sha256(report.path),
                "n_rows": report.n_rows,
                "n_bad_rows": len(report.bad),
                "bad_rows": report.bad,
            }
            for report in reports
        ],
        "seed": api.sample,
        "wall_seconds": seconds,
        "requests": api.summary(),
        **run_metadata(),
    }


def run_judge(
    api: Api,
    biases: Sequence[BiasTask],
    benchmark: BenchmarkTask | None,
    *,
    results_dir: str,
    limits: Mapping[str, Any],
    max_unread: int = MAX_UNREAD,
) -> int:
    """Judge everything in one stream, write the results, print the tables.

    Returns:
        Requests that brought no answer.
    """
    started = time.perf_counter()
    judge = ChatJudge(api, max_unread)
    asked = [pair for task in biases for pairs in task.pairs for pair in pairs.values()]
    asked += benchmark.pairs if benchmark is not None else []
    judged = iter(judge_pairs(judge.judge, asked))
    by_bias = {task.data.bias.name: _take(task, judged) for task in biases}
    of_benchmark = list(judged)
    seconds = time.perf_counter() - started
    folder = model_results_folder(results_dir, api.model, judge_identity(api))
    if biases:
        reports = [report for task in biases for report in task.data.reports]
        _write_biases(folder, biases, by_bias, judge_metadata(api, reports, seconds) | dict(limits))
    if benchmark is not None:
        metadata = judge_metadata(api, benchmark.reports, seconds) | dict(limits)
        _write_benchmark(folder, benchmark, of_benchmark, metadata)
    write_report(folder)
    print(f"results: {folder}")
    return judge.n_failed_requests


def _take(task: BiasTask, judged: Iterator[PairJudgement]) -> list[dict[str, PairJudgement]]:
    return [{name: next(judged) for name in pairs} for pairs in task.pairs]


def _write_biases(
    folder: Path,
    tasks: Sequence[BiasTask],
    judged: Mapping[str, Sequence[Mapping[str, PairJudgement]]],
    metadata: dict[str, Any],
) -> None:
    data = [task.data for task in tasks]
    defects = audit({some.bias.name: some.records for some in data})
    outcomes: dict[str, list[PairOutcome | RefinementOutcome]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    shares: dict[str, dict[str, Any]] = {}
    for some in data:
        name, is_identity, kinds = some.bias.name, some.bias.kind == "identity", kinds_by_line(defects[some.bias.name])
        outcomes[name] = [
            bias_outcome(record, row, is_identity=is_identity)
            for record, row in zip(some.records, judged[name], strict=True)
        ]
        rows[name] = [
            bias_row(outcome, row, kinds.get(outcome.line, ()))
            for outcome, row in zip(outcomes[name], judged[name], strict=True)
        ]
        shares[name] = consistency([judgement for row in judged[name] for judgement in row.values()])
    everything = [judgement for by_row in judged.values() for row in by_row for judgement in row.values()]
    block = {"overall": consistency(everything), "biases": shares}
    by_kind = {name: lines_by_kind(found) for name, found in defects.items() if found}
    figures = summarise_biases(outcomes, {name: flagged_lines(found) for name, found in defects.items()})
    summary = {"metadata": metadata | {"data_defects": by_kind}, **figures, "judge": block}
    write_results(folder, summary, rows, defects, data)
    for header, table in ((BIAS_HEADER, bias_rows(summary)), (REFINEMENT_HEADER, refinement_rows(summary))):
        if table:
            print(text_table(header, table), end="\n\n")
    named = {**shares, **({"all": block["overall"]} if len(shares) > 1 else {})}
    print(text_table(JUDGE_HEADER, [judge_row(name, fields) for name, fields in named.items()]), end="\n\n")
    for note in defect_notes(by_kind):
        print(f"note: {note}")


def _write_benchmark(
    folder: Path, task: BenchmarkTask, judgements: Sequence[PairJudgement], metadata: dict[str, Any]
) -> None:
    figures = summarise_benchmark_task(task, judgements)
    metadata |= {"format": task.format_name, "source": task.source}
    share = consistency(judgements)
    summary = {"metadata": metadata, **figures, "judge": {"overall": share}}
    groups = zip(task.items, task.by_item(judgements), strict=True)
    rows = [benchmark_row(item, group) for item, group in groups]
    write_jsonl(folder / f"{task.format_name}.jsonl", [{"label": figures["label"], **row} for row in rows])
    write_json(folder / f"{task.format_name}_summary.json", summary)
    print_summary(task.format_name, summary)
    if (line := published_line(summary)) is not None:
        print(line)
    print()
    print(text_table(JUDGE_HEADER, [judge_row(task.format_name, share)]), end="\n\n")


JUDGE_HEADER = ("judged", "pairs", "without verdict", "same in both orders", "first answer preferred", "declared ties")


def judge_row(name: str, fields: Mapping[str, Any]) -> list[str]:
    """A row for ``JUDGE_HEADER``; why verdicts are missing stands beside their number."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in fields["n_without_verdict"].items())
    return [
        name,
        str(fields["n_pairs"]),
        str(fields["n_pairs_without_verdict"]) + (f" ({reasons})" if reasons else ""),
        rate_cell(dict(fields), "position_consistency"),
        rate_cell(dict(fields), "first_answer_rate"),
        str(fields["n_declared_ties"]),
    ]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m codes.evaluate.judge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", default="data/eval", help="folder of the <bias>_bias.jsonl files")
    parser.add_argument(
        "--bias_type", default="all", help=f"all, none, or one or more of {', '.join(EVALUABLE)} (with commas)"
    )
    parser.add_argument("--limit_per_bias", type=natural, default=0, help="at most so many rows a bias; 0: all")
    parser.add_argument("--data_file", default=None, help="also judge this benchmark file")
    parser.add_argument("--format", default="auto", choices=("auto", *BENCHMARKS), help="of --data_file")
    parser.add_argument("--category", default="all", help=f"of --data_file: all, {', '.join(SECTIONS)}, or a subset")
    parser.add_argument("--limit_per_subset", type=natural, default=0, help="at most so many rows a subset; 0: all")
    parser.add_argument("--results_dir", default="results", help="parent of the judge's results folder")
    parser.add_argument("--work_dir", type=Path, default=Path("output/judge"), help="where the ledger lies")
    parser.add_argument("--seed", type=int, default=42, help="chooses the rows of a limited run")
    parser.add_argument("--max_bad_rows", type=natural, default=0, help="broken rows to leave out before stopping")
    add_unread_argument(parser)
    add_llm_arguments(parser, temperature=judge_temperature(), max_new_tokens=judge_max_new_tokens())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Judge, write, print; 3 where verdicts are missing because requests failed."""
    args = build_parser().parse_args(argv)
    if args.bias_type == "none" and args.data_file is None:
        raise ContrastRMError("nothing to judge: give --data_file, or another --bias_type than none")
    # Everything that can be wrong for free is found before anything is asked.
    biases = [
        BiasTask.of(data)
        for data in read_bias_data(
            args.data_dir,
            [] if args.bias_type == "none" else bias_names(args.bias_type),
            limit=args.limit_per_bias,
            seed=args.seed,
            max_bad_rows=args.max_bad_rows,
        )
    ]
    benchmark = None
    if args.data_file is not None:
        benchmark = read_benchmark_task(
            args.data_file,
            args.format,
            category=args.category,
            limit=args.limit_per_subset,
            seed=args.seed,
            max_bad_rows=args.max_bad_rows,
        )
    limits = {
        "limit_per_bias": args.limit_per_bias,
        "limit_per_subset": args.limit_per_subset,
        "category": args.category,
        "placebo_sentence": PLACEBO_SENTENCE,
        "refinement_request": REFINEMENT_REQUEST,
    }
    api = open_api(args, prompt_version=f"judge {PROMPT_VERSION}", no_model=NO_MODEL)
    with api.ledger:
        n_failed = run_judge(
            api, biases, benchmark, results_dir=args.results_dir, limits=limits, max_unread=args.max_unread
        )
    return api.exit_code(n_failed, where="the orders without a winner in the .jsonl files")


if __name__ == "__main__":
    run(main)
