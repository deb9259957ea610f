"""The settings of the construct steps, one dataclass a step, and the command lines that derive from them.

Reads the environment variables JUDGE_MODEL, JUDGE_TEMPERATURE and JUDGE_MAX_NEW_TOKENS (defaults of flags) and
CONTRASTRM_LAUNCH (``run_construction.sh`` is at work, which gives every step all further flags). To see them:
``python -m codes.construct.gptout --help``.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from codes.common.biases import BIASES, EVALUABLE, INJECTABLE, get_bias
from codes.common.cli import natural, non_negative_float, positive
from codes.common.errors import ContrastRMError
from codes.common.judging import MAX_UNREAD, judge_max_new_tokens, judge_temperature
from codes.common.llm_session import add_llm_arguments, parse_temperature
from codes.common.settings import add_settings, setting
from codes.construct.build_prompt import Strategy

OnOff = Literal["on", "off"]
VerifyFilter = Literal["auto", "on", "off"]
EvalStrategy = Literal["rewrite", "template"]


def parse_bias_types(
    value: str, allowed: tuple[str, ...] = INJECTABLE, refusal: str = "cannot be injected"
) -> tuple[str, ...]:
    """``all`` or a comma-separated list, in the order of the table of biases: how it was typed makes no other data set.

    Raises:
        ContrastRMError: A name is unknown or not allowed (``refusal`` says why), or the list is empty.
    """
    if value.strip() == "all":
        return allowed
    names = {name.strip() for name in value.split(",") if name.strip()}
    if not names:
        raise ContrastRMError(f"--bias_types is empty; give all or some of {','.join(allowed)}")
    for name in sorted(names):
        if get_bias(name).name not in allowed:
            raise ContrastRMError(f"{name} {refusal}; allowed: {', '.join(allowed)}")
    return tuple(name for name in allowed if name in names)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What every step is told. A flag stands for each field, with the same name and default."""

    input_file: Path = setting(help="preference records (JSONL)")
    work_dir: Path = setting(Path("output/construct"), help="ledger, failures, report")
    max_bad_rows: int = setting(0, check=natural, help="input rows that may break the data contract")
    limit: int = setting(0, check=natural, help="first N records only; 0 = all")
    seed: int = setting(42, help="of every draw")


@dataclass(frozen=True, kw_only=True)
class InjectionSettings(StepSettings):
    """Of ``gptout``."""

    output_file: Path = setting(help="the records with what the step adds")
    strategy: Strategy = setting("wrong_answer", help="template needs no model")
    bias_types: tuple[str, ...] = setting(INJECTABLE, check=parse_bias_types, help="all, or some of them")
    biases_per_record: int = setting(2, check=positive, help="different ones")
    cue_gate: OnOff = setting(
        "on", help="on: a text must show its cue; off: for languages other than English, whose cues the word lists miss"
    )

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ContrastRMError: More biases a record than there are.
        """
        n_biases = len(self.bias_types)
        if self.biases_per_record > n_biases:
            raise ContrastRMError(f"--biases_per_record must be 1 to {n_biases} (the number of --bias_types)")


@dataclass(frozen=True, kw_only=True)
class SimilarSettings(StepSettings):
    """Of ``gptinst``."""

    output_file: Path = setting(help="the records with what the step adds")


@dataclass(frozen=True, kw_only=True)
class VerifySettings(StepSettings):
    """Of ``verify_correctness``."""

    output_file: Path = setting(help="all judged rows")
    train_file: Path = setting(help="the rows fit for training")
    judge: Literal["model", "none"] = setting("model", help="none: ask nobody, keep all rows")
    verify_filter: VerifyFilter = setting(
        "auto", help="on: keep CHOSEN_IS_BEST; off: keep all; auto: on unless the judge is the embedded model or none"
    )
    orders: int = setting(2, check=positive, help="orders in which a record's answers are shown")
    drop_bad_negatives: bool = setting(
        False, help="drop rejected answers that are picked over the chosen, where it beats all others when judged again"
    )
    expected_negatives: int = setting(
        0,
        check=natural,
        help="with --estimate: rejected answers that each record is still to get from the steps before",
    )
    max_unread: int = setting(
        MAX_UNREAD, check=natural, help="answers in a row that are no verdict stop the run; 0: never"
    )

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ContrastRMError: A filter without a judge.
        """
        if self.judge == "none" and self.verify_filter == "on":
            raise ContrastRMError("--judge none gives no verdict to filter by; use --verify_filter auto or off")


@dataclass(frozen=True, kw_only=True)
class EvalPairSettings(StepSettings):
    """Of ``build_eval_pairs``."""

    output_dir: Path = setting(help="gets <bias>_bias.jsonl for each bias")
    work_dir: Path = setting(Path("output/eval_pairs"), help="ledger, failures, report")
    bias_types: str = setting(
        "all", help=f"all that the strategy can make (template: not refinement-aware), or some of {','.join(EVALUABLE)}"
    )
    strategy: EvalStrategy = setting("rewrite", help="template: by rule")
    rejected: Literal["first", "all"] = setting("first", help="which original rejected answers make pairs")
    multi_turn: Literal["skip", "render"] = setting("skip", help="prompts of several turns: left out, or as one text")
    consistency: VerifyFilter = setting(
        "auto",
        help="on: the judge must still prefer the labelled answer in both orders; auto: on where a model writes, "
        "unless the judge is the embedded model",
    )
    judge_model: str | None = setting(
        lambda: os.environ.get("JUDGE_MODEL") or None, check=str, help="default: $JUDGE_MODEL, else --api_model"
    )
    judge_temperature: float | None = setting(
        judge_temperature,
        check=parse_temperature,
        help="a number, or none for the server's own; default: $JUDGE_TEMPERATURE, else 0",
    )
    judge_max_new_tokens: int = setting(
        judge_max_new_tokens,
        check=positive,
        help="of a verdict, reasoning included; default: $JUDGE_MAX_NEW_TOKENS, else 4096 (16 for the embedded model)",
    )
    judge_price_in: float | None = setting(
        None,
        check=non_negative_float,
        help="of a million prompt tokens; default: --price_in, where one model does both",
    )
    judge_price_out: float | None = setting(
        None, check=non_negative_float, help="of a million completion tokens, likewise"
    )
    max_unread: int = setting(
        MAX_UNREAD, check=natural, help="answers in a row that are no verdict stop the run; 0: never"
    )
    cue_gate: OnOff = setting(
        "on", help="on: the cue must be seen to go and to come; off: for languages other than English"
    )

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of ``bias_types``; no rule can polish an answer."""
        possible = tuple(bias.name for bias in BIASES if self.strategy == "rewrite" or bias.kind != "refinement")
        return parse_bias_types(self.bias_types, possible, "needs --strategy rewrite")


def step_parser(
    module: str,
    description: str | None,
    settings: type[StepSettings],
    *,
    temperature: float | str,
    max_tokens: int | str,
) -> argparse.ArgumentParser:
    """A step's command line: a flag for each of its settings, and those of the client.

    Args:
        module: The step's, by name.
        description: The module's docstring, of which the first line is shown.
        settings: The step's settings.
        temperature: The step's default.
        max_tokens: Of an answer, the step's default.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m codes.construct.{module}", description=(description or "").split("\n")[0]
    )
    add_settings(parser, settings)
    add_llm_arguments(parser, temperature=temperature, max_new_tokens=max_tokens)
    if os.environ.get("CONTRASTRM_LAUNCH"):
        # The launcher hands its further flags to every step, and each reads its own.
        own = {each.name for each in fields(settings)}
        others = {each.name for step in LAUNCHED for each in fields(step)}
        for name in sorted(others - own):
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


# The steps of run_construction.sh.
LAUNCHED: tuple[type[StepSettings], ...] = (InjectionSettings, SimilarSettings, VerifySettings)
