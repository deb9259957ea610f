"""What the construct steps share with each other on top of ``codes.common.llm_session``.

Reads the environment variables that ``codes.common.llm_session`` names. Used by the steps, for example
``OPENAI_API_KEY=… python -m codes.construct.gptinst --help``.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from codes.common import llm_session
from codes.common.llm_session import EMBEDDED_SERVER_VARIABLE, Api, StepCounts, is_embedded_server
from codes.construct.build_prompt import PROMPT_VERSION

__all__ = [
    "EMBEDDED_SERVER_VARIABLE",
    "Api",
    "StepCounts",
    "add_api_arguments",
    "is_embedded_server",
    "open_api",
    "open_api_of",
]

_TWO_WAYS_OUT = (
    "no model to write with ({missing} not set): "
    "either set OPENAI_API_KEY and API_MODEL (and OPENAI_BASE_URL for another server than OpenAI's; a local "
    "server without keys takes any word), or set GENERATOR=embedded to write with the small embedded model "
    "(a trial of the pipeline: its texts are poor)"
)


def add_api_arguments(parser: argparse.ArgumentParser, *, temperature: float | str, max_new_tokens: int | str) -> None:
    """Add the flags that all construct steps share, with a step's own defaults."""
    llm_session.add_llm_arguments(parser, temperature=temperature, max_new_tokens=max_new_tokens)
    parser.add_argument("--work_dir", type=Path, default=Path("output/construct"), help="ledger, failures, report")
    parser.add_argument("--max_bad_rows", type=int, default=0, help="input rows that may break the data contract")
    parser.add_argument("--limit", type=int, default=0, help="first N records only; 0 = all")
    parser.add_argument("--seed", type=int, default=42)


# Every step opens the client the same way.
open_api = partial(llm_session.open_api, prompt_version=PROMPT_VERSION, no_model=_TWO_WAYS_OUT)
open_api_of = partial(llm_session.open_api_of, prompt_version=PROMPT_VERSION, no_model=_TWO_WAYS_OUT)
