"""The settings and the client that all construct steps share, on top of ``codes.common.llm_session``.

Reads the environment variables that ``codes.common.llm_session`` names. Used by the steps, for example
``OPENAI_API_KEY=… python -m codes.construct.gptinst --help``.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from codes.common import llm_session
from codes.common.cli import natural
from codes.common.llm_session import EMBEDDED_SERVER_VARIABLE, Api, is_embedded_server
from codes.construct.build_prompt import PROMPT_VERSION

__all__ = ["EMBEDDED_SERVER_VARIABLE", "Api", "is_embedded_server", "open_api", "open_api_of"]

_TWO_WAYS_OUT = (
    "no model to write with ({missing} not set): "
    "either set OPENAI_API_KEY and API_MODEL (and OPENAI_BASE_URL for another server than OpenAI's; a local "
    "server without keys takes any word), or set GENERATOR=embedded to write with the small embedded model "
    "(a trial of the pipeline: its texts are poor)"
)

OnOff = Literal["on", "off"]
S = TypeVar("S", bound="StepSettings")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What every step is told. A flag stands for each field, with the same name and default."""

    input_file: Path
    work_dir: Path = field(default=Path("output/construct"), metadata={"help": "ledger, failures, report"})
    max_bad_rows: int = field(
        default=0, metadata={"help": "input rows that may break the data contract", "type": natural}
    )
    limit: int = field(default=0, metadata={"help": "first N records only; 0 = all", "type": natural})
    seed: int = 42


def step_parser(
    module: str,
    description: str | None,
    settings: type[StepSettings],
    *,
    temperature: float | str,
    max_tokens: int | str,
) -> argparse.ArgumentParser:
    """A step's command line: a flag for each field of its settings, and those of the client.

    A field's metadata may hold its line of ``help``, the ``type`` that reads its text, and a function
    (``from_environment``) that gives its default.

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
    hints = get_type_hints(settings)
    for each in fields(settings):
        hint, flag = hints[each.name], f"--{each.name}"
        default = each.metadata.get("from_environment", lambda default=each.default: default)()
        options: dict[str, Any] = {"help": each.metadata.get("help")}
        options |= {"required": True} if default is MISSING else {"default": default}
        if hint is bool:
            options["action"] = "store_true"
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        else:
            options["type"] = each.metadata.get("type", hint)
        parser.add_argument(flag, **options)
    llm_session.add_llm_arguments(parser, temperature=temperature, max_new_tokens=max_tokens)
    return parser


def settings_of(args: argparse.Namespace, settings: type[S]) -> S:
    """The settings that a command line of ``step_parser`` gave."""
    return settings(**{each.name: getattr(args, each.name) for each in fields(settings)})


# Every step opens the client the same way.
open_api = partial(llm_session.open_api, prompt_version=PROMPT_VERSION, no_model=_TWO_WAYS_OUT)
open_api_of = partial(llm_session.open_api_of, prompt_version=PROMPT_VERSION, no_model=_TWO_WAYS_OUT)
