"""Between the commands that ask a chat model and ``codes.common.llm``: the shared flags and the open client.

Reads the environment variables OPENAI_API_KEY (the key; there is no flag for it), API_MODEL, OPENAI_BASE_URL,
CONTRASTRM_LAUNCH and CONTRASTRM_EMBEDDED_SERVER. Reads and writes ``launch.json`` in the work folder. Used by the construct
steps and by the judge, for example ``OPENAI_API_KEY=… python -m codes.evaluate.judge --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from codes.common.cli import EXIT_ROWS_MISSING, non_negative_float, positive, positive_float
from codes.common.errors import ContrastRMError
from codes.common.llm import (
    DEFAULT_BASE_URL,
    Budget,
    Completion,
    CompletionRequest,
    Engine,
    Ledger,
    LlmClient,
    Outcome,
    Usage,
    request_key,
)
from codes.common.llm_limits import MAX_OUTAGE_SECONDS, Price, Spending
from codes.common.records import Message, ensure_writable_folder, write_json

LEDGER_FILE = "ledger.jsonl"
# What the commands of one launch have spent together.
LAUNCH_FILE = "launch.json"
EMBEDDED_SERVER_VARIABLE = "CONTRASTRM_EMBEDDED_SERVER"
# Measured on two cores: 14 tokens/s one at a time, 48 with 8 at a time; a queue behind them only makes
# time-outs.
EMBEDDED_CONCURRENCY = 8
EMBEDDED_REQUEST_TIMEOUT = 1800.0
# Of an estimate, where the ledger holds no answer yet: about 1,200 characters.
TYPICAL_ANSWER_TOKENS = 300


@dataclass
class StepCounts:
    """What the streams of one command brought, answers found in the ledger included."""

    n_requests: int = 0
    n_answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.n_requests += 1
        if isinstance(outcome, Completion):
            self.n_answers += 1
            self.prompt_tokens += outcome.prompt_tokens
            self.completion_tokens += outcome.completion_tokens
        else:
            self.failed[outcome.reason] += 1


@dataclass(frozen=True)
class Api:
    """An engine with what every request of a command shares.

    Attributes:
        ledger: Close it (``with api.ledger:``) and everything else ends too.
        prompt_version: Of the prompts; edited ones are asked anew.
        temperature: None leaves it to the server.
        sample: The run's seed; another one asks for new answers instead of finding the old ones in the
            ledger.
        is_estimate: Ask nothing: the first stream prints what it would ask, and the command ends.
    """

    engine: Engine
    ledger: Ledger
    model: str
    temperature: float | None
    max_new_tokens: int
    concurrency: int
    sample: int
    prompt_version: str
    is_estimate: bool = False
    counts: StepCounts = field(default_factory=StepCounts)

    def ask(self, prompts: Iterable[list[Message]], description: str, *, accept_cut_off: bool = False) -> list[Outcome]:
        """``ask_stream`` as a list."""
        total = len(prompts) if isinstance(prompts, Sequence) else None
        return list(self.ask_stream(prompts, description, total=total, accept_cut_off=accept_cut_off))

    def ask_stream(
        self,
        prompts: Iterable[list[Message]],
        description: str,
        *,
        total: int | None = None,
        accept_cut_off: bool = False,
        n_follow_ups: int = 0,
    ) -> Iterator[Outcome]:
        """One outcome a prompt, in order: the answer, or the error as an object.

        Prompts are read lazily, some hundred ahead of the outcomes (``Engine.stream`` says how many). One
        stream may take its prompts from the outcomes of another.

        Args:
            prompts: What to ask.
            description: Names the requests in the progress bar and in the estimate.
            total: How many prompts there are, for the progress bar.
            accept_cut_off: Whether an answer that ends at ``max_new_tokens`` is of use.
            n_follow_ups: Requests that the command sends later for each of these, for the estimate.

        Raises:
            FatalApiError: The run cannot go on.
            SystemExit: With code 0, after the estimate, where only that was asked for.
        """
        requests = (self._request(prompt, accept_cut_off) for prompt in prompts)
        if self.is_estimate:
            print(self._estimate(requests, description, n_follow_ups), flush=True)
            raise SystemExit(0)
        before = self.engine.budget.spent.to_dict() | {"n_from_ledger": self.engine.n_from_ledger}
        try:
            for outcome in self.engine.stream(requests, description=description, total=total):
                self.counts.add(outcome)
                yield outcome
        finally:
            print(f"{description}: {self._spent_since(before)}", file=sys.stderr, flush=True)

    def _request(self, prompt: list[Message], accept_cut_off: bool) -> CompletionRequest:
        return CompletionRequest(
            messages=tuple(prompt),
            model=self.model,
            max_tokens=self.max_new_tokens,
            prompt_version=self.prompt_version,
            temperature=self.temperature,
            sample=self.sample,
            accept_cut_off=accept_cut_off,
        )

    def _estimate(self, requests: Iterable[CompletionRequest], description: str, n_follow_ups: int) -> str:
        """What the requests would use; equal ones are counted once."""
        n_known = n_new = prompt_tokens = n_stored = stored_tokens = 0
        seen: set[bytes] = set()
        for request in requests:
            key = request_key(request, self.engine.client.endpoint)
            if bytes.fromhex(key) in seen:
                continue
            seen.add(bytes.fromhex(key))
            known = self.engine.known(request, key)
            if known is None:
                n_new += 1
                prompt_tokens += request.need().likely_prompt_tokens
                continue
            n_known += 1
            if isinstance(known, Completion):
                n_stored += 1
                stored_tokens += known.completion_tokens
        typical = stored_tokens // n_stored if stored_tokens else min(TYPICAL_ANSWER_TOKENS, self.max_new_tokens)
        source = "mean of those in the ledger" if stored_tokens else "assumed"
        n_calls, n_prompt = n_new * (1 + n_follow_ups), prompt_tokens * (1 + n_follow_ups)
        likely = Usage(n_prompt, n_calls * typical)
        most = Usage(n_prompt, n_calls * self.max_new_tokens)
        later = f", {n_new * n_follow_ups} of them for the answers to the first {n_new}" if n_follow_ups else ""
        return "\n".join(
            [
                f"estimate for {description} (model {self.model}; nothing was sent)",
                f"requests: {n_calls} to send{later}, {n_known} in the ledger already",
                f"prompt tokens: {n_prompt} (characters / 4, and 16 a message)",
                f"completion tokens: {likely.completion_tokens} likely ({typical} an answer, {source}), "
                f"{most.completion_tokens} at most (--max_new_tokens {self.max_new_tokens})",
                f"cost: {self._price(likely)} likely, {self._price(most)} at most, repeated attempts not included",
            ]
        )

    def _price(self, usage: Usage) -> str:
        cost = self.engine.budget.cost_of(usage, self.model)
        return "unknown (give --price_in and --price_out)" if cost is None else f"{cost:.4f}"

    def _spent_since(self, before: dict[str, Any]) -> str:
        spent = self.engine.budget.spent
        n_in, n_out = (
            spent.prompt_tokens - before["prompt_tokens"],
            spent.completion_tokens - before["completion_tokens"],
        )
        cost = "" if spent.cost is None else f", cost {spent.cost - before['cost']:.4f}"
        unknown = spent.n_unknown_usage - before["n_unknown_usage"]
        guessed = f" ({unknown} calls of unknown usage counted at their upper bound)" if unknown else ""
        n_known = self.engine.n_from_ledger - before["n_from_ledger"]
        return (
            f"{spent.n_calls - before['n_calls']} calls sent, {n_in} + {n_out} tokens{guessed}{cost}, "
            f"{n_known} answers from the ledger"
        )

    def summary(self) -> dict[str, Any]:
        """For a report: what the command got, ledger included, and what this run of the command spent."""
        counts = self.counts
        return {
            "n_requests": counts.n_requests,
            "n_answers": counts.n_answers,
            "n_from_ledger": self.engine.n_from_ledger,
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "n_failed_requests": dict(counts.failed.most_common()),
            # Refused by the server and left out: another temperature than the one asked for has written these answers.
            "refused_parameters": sorted(self.engine.client.refused_parameters),
            "spent_in_this_run": self.engine.budget.spent.to_dict(),
        }

    def exit_code(self, n_failed_requests: int, *, where: str = "failed.jsonl") -> int:
        """The command's exit code once everything is written.

        0, or ``EXIT_ROWS_MISSING`` (3) where requests brought no answer, with a line on stderr about what to
        do. Texts that the quality gates refuse are no failed requests.

        Args:
            n_failed_requests: Requests without an answer.
            where: The file that names them.
        """
        if n_failed_requests == 0:
            return 0
        print(
            f"rows are missing: {n_failed_requests} requests brought no answer ({where} says why). The same "
            "command asks those of class retriable again; --retry_failed those of class row too",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_ROWS_MISSING


def add_llm_arguments(parser: argparse.ArgumentParser, *, temperature: float | str, max_new_tokens: int | str) -> None:
    """Add the flags of every command that asks a chat model, with the command's own defaults (texts are parsed)."""
    group = parser.add_argument_group("model and server (the key comes from OPENAI_API_KEY alone)")
    group.add_argument("--api_model", default=os.environ.get("API_MODEL") or None, help="default: $API_MODEL")
    group.add_argument(
        "--api_base_url",
        default=os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL,
        help="default: $OPENAI_BASE_URL, else OpenAI",
    )
    group.add_argument(
        "--temperature", type=parse_temperature, default=temperature, help="a number, or none for the server's own"
    )
    group.add_argument("--max_new_tokens", type=positive, default=max_new_tokens)
    group.add_argument("--concurrency", type=positive, default=16, help="requests at a time")
    group.add_argument("--max_attempts", type=positive, default=6, help="attempts a request")
    group.add_argument("--request_timeout", type=float, default=120.0, help="seconds an attempt")
    group.add_argument("--requests_per_minute", type=positive_float, help="calls a minute, at most")
    group.add_argument("--tokens_per_minute", type=positive_float, help="tokens a minute, at most")
    group.add_argument(
        "--max_outage_seconds",
        type=positive_float,
        default=MAX_OUTAGE_SECONDS,
        help="stop when no call has succeeded for so long",
    )
    budget = parser.add_argument_group(
        "budget of this run of the command, or of its launch (answers in the ledger are free)"
    )
    budget.add_argument(
        "--launch",
        default=os.environ.get("CONTRASTRM_LAUNCH") or None,
        help="commands with the same word and --work_dir share one budget; default: $CONTRASTRM_LAUNCH (run_construction.sh)",
    )
    budget.add_argument("--max_requests", type=positive, help="calls, repeated attempts included")
    budget.add_argument("--max_tokens", type=positive, help="tokens in and out")
    budget.add_argument("--max_cost", type=positive_float, help="in the currency of the prices")
    budget.add_argument("--price_in", type=non_negative_float, help="of a million prompt tokens")
    budget.add_argument("--price_out", type=non_negative_float, help="of a million completion tokens")
    budget.add_argument("--estimate", action="store_true", help="print requests, tokens and cost; send nothing")
    group.add_argument("--retry_failed", action="store_true", help="ask again what an earlier run recorded as failed")


def parse_temperature(value: str) -> float | None:
    """A number; ``none``: the server's own."""
    return None if value.lower() == "none" else float(value)


def is_embedded_server() -> bool:
    """Whether the requests go to the embedded model (``codes.construct.embedded_server`` says so)."""
    return os.environ.get(EMBEDDED_SERVER_VARIABLE) == "1"


def _read_launch(work_dir: Path, launch: str | None) -> Spending | None:
    """What earlier commands of a launch have spent; None where this is the first one."""
    path = work_dir / LAUNCH_FILE
    if launch is None or not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return Spending(**row["spent"]) if row["launch"] == launch else None
    except (ValueError, KeyError, TypeError) as error:
        raise ContrastRMError(f"cannot read {path}: {error}; delete it") from error


def _write_launch(work_dir: Path, launch: str, budget: Budget) -> None:
    write_json(work_dir / LAUNCH_FILE, {"launch": launch, "spent": budget.total().to_dict()})


def _budget_of(args: argparse.Namespace, model_prices: Mapping[str, Price | None] | None) -> Budget:
    return Budget(
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        max_cost=args.max_cost,
        price_in=args.price_in,
        price_out=args.price_out,
        model_prices=model_prices,
        earlier=_read_launch(args.work_dir, args.launch),
    )


def open_api(
    args: argparse.Namespace,
    *,
    prompt_version: str,
    no_model: str,
    model_prices: Mapping[str, Price | None] | None = None,
) -> Api:
    """Check key, model and work folder before anything is asked, and take the ledger.

    Args:
        args: The flags of ``add_llm_arguments``, ``--work_dir`` and ``--seed``.
        no_model: What to say where key or model are missing; ``{missing}`` names the variables.
        model_prices: Of the models that the launch asks beside this one.

    Raises:
        ContrastRMError: No key or no model, or the folder is in use or not writable.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if args.estimate and not key:
        key = "nothing-is-sent"
    missing = [name for name, value in (("OPENAI_API_KEY", key), ("API_MODEL", args.api_model)) if not value]
    if missing:
        raise ContrastRMError(no_model.format(missing=" and ".join(missing)))
    budget = _budget_of(args, model_prices)
    embedded = is_embedded_server()
    concurrency = min(args.concurrency, EMBEDDED_CONCURRENCY) if embedded else args.concurrency
    # The embedded model may take minutes for an answer.
    patience = EMBEDDED_REQUEST_TIMEOUT if embedded else 0.0
    client = LlmClient(
        api_key=key,
        base_url=args.api_base_url,
        max_attempts=args.max_attempts,
        request_timeout=max(args.request_timeout, patience),
        # The embedded server has a new port in every launch, and is always the same model.
        keep_port=not embedded,
    )
    ledger = Ledger(ensure_writable_folder(args.work_dir) / LEDGER_FILE)
    if args.launch is not None and not args.estimate:
        # Called after the engine has ended, whatever ended it.
        ledger.call_before_close(partial(_write_launch, Path(args.work_dir), args.launch, budget))
    engine = Engine(
        client,
        ledger,
        concurrency=concurrency,
        budget=budget,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        max_outage_seconds=max(args.max_outage_seconds, patience),
        retry_failed=args.retry_failed,
    )
    settings = (
        args.api_model,
        args.temperature,
        args.max_new_tokens,
        concurrency,
        args.seed,
        prompt_version,
        args.estimate,
    )
    return Api(engine, ledger, *settings)
