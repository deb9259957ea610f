"""The settings and the client that all construct steps share, on top of ``codes.common.llm_session``.

Reads the environment variables that ``codes.common.llm_session`` names. Used by the steps, for example
``OPENAI_API_KEY=… python -m codes.construct.gptinst --help``.
"""

from __future__ import annotations

from functools import partial

from codes.common import llm_session
from codes.common.llm_session import EMBEDDED_SERVER_VARIABLE, Api, is_embedded_server
from codes.construct.build_prompt import PROMPT_VERSION

__all__ = ["EMBEDDED_SERVER_VARIABLE", "Api", "is_embedded_server", "open_api"]

_TWO_WAYS_OUT = (
    "no model to write with ({missing} not set): "
    "either set OPENAI_API_KEY and API_MODEL (and OPENAI_BASE_URL for another server than OpenAI's; a local "
    "server without keys takes any word), or set GENERATOR=embedded to write with the small embedded model "
    "(a trial of the pipeline: its texts are poor)"
)

# Every step opens the client the same way.
open_api = partial(llm_session.open_api, prompt_version=PROMPT_VERSION, no_model=_TWO_WAYS_OUT)
