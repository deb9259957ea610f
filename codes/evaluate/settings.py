"""The settings of the evaluations, once: flags, ``--help`` and checks derive from them.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from codes.common.biases import EVALUABLE
from codes.common.cli import natural
from codes.common.settings import DTYPES, OVERLENGTH_POLICIES, PACKINGS, TEMPLATE_HELP, part, setting
from codes.evaluate.benchmark_figures import SECTIONS
from codes.evaluate.benchmarks import BENCHMARKS


@dataclass(frozen=True)
class ScorerSettings:
    """What gives a text its score, and in whose results folder it is kept."""

    model_path: str = setting(help="folder or hub id of a trained reward model, or a baseline: baseline:shorter")
    results_dir: str = setting("results", help="parent of the model's results folder")
    chat_template: str = setting("", help=TEMPLATE_HELP)
    max_length: int = setting(0, check=natural, help="most tokens of a text; 0: the model's own limit")
    overlength: str = setting("left", choices=OVERLENGTH_POLICIES, help="what happens beyond it")
    max_tokens_per_batch: int = setting(0, check=natural, help="computed tokens of a batch; 0: what suits the device")
    packing: str = setting("auto", choices=PACKINGS, help="auto: shared prefixes if the model can")
    dtype: str = setting("auto", choices=DTYPES, help="auto: as the weights were saved")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, ...")
    seed: int = setting(42, help="chooses the rows of a limited run")
    max_bad_rows: int = setting(0, check=natural, help="broken rows to leave out before stopping")
    attn_implementation: str | None = setting(None, check=str, help="as transformers names it, e.g. sdpa or eager")
    score_store: str = setting(
        "auto",
        help="file of scores that are computed once; auto: scores.sqlite in the model's results folder, and none for a server",
    )
    reward_url: str | None = setting(
        None, check=str, help="a reward server; --model_path is then its name, REWARD_API_KEY its key"
    )
    trust_remote_code: bool = setting(False, help="run model code from the model's own folder")


@dataclass(frozen=True)
class BiasSettings:
    """The bias evaluation of a model."""

    scorer: ScorerSettings = part(ScorerSettings)
    data_dir: str = setting("data/eval", help="folder of the <bias>_bias.jsonl files")
    bias_type: str = setting("all", help=f"all, or one or more of {', '.join(EVALUABLE)} (with commas)")
    limit_per_bias: int = setting(0, check=natural, help="at most so many rows a bias; 0: all")


@dataclass(frozen=True)
class BenchmarkSettings:
    """The evaluation of a model on a published benchmark."""

    scorer: ScorerSettings = part(ScorerSettings)
    data_file: str = setting("data/eval/reward_bench/own_sample.jsonl", help="rows in a published format")
    format: str = setting("auto", choices=("auto", *BENCHMARKS), help="of the file; auto: by the keys of its rows")
    category: str = setting("all", help=f"all, or one of {', '.join(SECTIONS)}; in other formats a subset's name")
    limit_per_subset: int = setting(0, check=natural, help="at most so many rows a subset; 0: all")
