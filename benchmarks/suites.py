"""Which peers a comparison runs, with which settings, on which rows.

A suite is a list of runs, each a process of its own: peers that do the same work, in the same order of rows, at the same
precision. Where there is more than one honest precision ("bf16" is bfloat16 arithmetic on float32 weights to one trainer and
bfloat16 weights to another), the suite holds a run of each. Groups of different scenarios are never compared.
Reads: preference records and evaluation files. Writes: the rows that the training peers read, ``output/benchmarks/rows/``.
Used by ``python -m benchmarks.speed``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.common import MODEL_DIR, OUTPUT_DIR, resolve_device
from benchmarks.rows import choose_groups, external_data, fits_in, public_bias_files
from benchmarks.synthetic import ANSWER_TOKENS, SHAPES, make_random_model, write_random_groups
from codes.common.base_model import model_hash
from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError
from codes.common.records import PreferenceRecord, file_sha256, read_preference_file, write_jsonl
from codes.common.scoring import default_token_budget

OWN, TRL = "this project's", "TRL's"
GEMM = "gemm"
# Precision of every suite's arithmetic, and of the matrix multiplications that the rates are compared with.
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Options:
    """What the command line of ``benchmarks.speed`` says; None and empty mean the suite's own default.

    Attributes:
        work_dir: Where rows and random models are written.
        groups_per_step: Groups of an optimizer step.
        steps: Timed steps.
        rows_per_micro_batch: Answers that the original loop and TRL compute at once.
        max_tokens: Padded tokens of a batch of the sorted baseline; 0: as many as ours computes.
        max_tokens_per_batch: Computed tokens of a batch of ours; 0: what suits the device.
        percent: So many of a hundred questions are scored.
    """

    model_path: Path = MODEL_DIR
    work_dir: Path = OUTPUT_DIR
    device: str = "auto"
    seed: int = 42
    input_file: str | None = None
    files: tuple[str, ...] = ()
    groups_per_step: int | None = None
    steps: int | None = None
    warmup_steps: int = 1
    rows_per_micro_batch: int = 8
    max_tokens: int = 0
    max_tokens_per_batch: int = 0
    max_length: int = 1024
    gradient_checkpointing: int | None = None
    percent: float | None = None
    shapes: tuple[str, ...] = ()
    prompts: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    seconds: float = 0.3


@dataclass(frozen=True)
class Run:
    """One peer in one mode: what a row of the table stands for.

    Attributes:
        name: The peer's name, a dot, its mode.
        label: The same for readers.
        scenario: Runs of one scenario do the same work.
        environment: Whose Python runs it.
        pairs_per_group: How many of the peer's groups make one of ours (TRL gets a group of four as three pairs).
    """

    name: str
    label: str
    module: str
    arguments: tuple[str, ...]
    scenario: str = ""
    environment: str = OWN
    pairs_per_group: int = 1


@dataclass(frozen=True)
class Suite:
    """Runs that are compared.

    Attributes:
        kind: ``training``, ``scoring`` or ``gemm_rate``.
        inputs: What the results depend on beside the code: hashes of files and weights.
    """

    name: str
    title: str
    kind: str
    runs: tuple[Run, ...]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingDefaults:
    """Size of a training suite: small enough for three rounds on two CPU cores."""

    answers: int
    groups_per_step: int
    steps: int


TRAINING = {
    "training-pairs-bf16": TrainingDefaults(answers=2, groups_per_step=4, steps=1),
    "training-groups4-bf16": TrainingDefaults(answers=4, groups_per_step=2, steps=1),
    "training-groups8-bf16": TrainingDefaults(answers=8, groups_per_step=1, steps=2),
}
SCORING_PERCENT = {"scoring-bf16": 0.5, "scoring-rewardbench": 2.0}
GPU_DEFAULTS = TrainingDefaults(answers=4, groups_per_step=4, steps=2)
# The shapes of the GPU suite; "tiny" tries the suite out.
GPU_SHAPES = tuple(name for name in SHAPES if name != "tiny")
SUITES = (
    "gemm",
    "training-pairs-bf16",
    "training-groups4-bf16",
    "training-groups8-bf16",
    "scoring-bf16",
    "scoring-rewardbench",
    "gpu",
)


def build_suite(name: str, options: Options) -> Suite:
    """A suite, with the rows that it needs written.

    Raises:
        ContrastRMError: No such suite, no data to measure on, or too few rows.
    """
    if name == "gemm":
        return gemm_suite(options)
    if name == "gpu":
        return gpu_suite(options)
    if name in SCORING_PERCENT:
        return scoring_suite(name, options)
    if name not in TRAINING:
        raise ContrastRMError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    return training_suite(name, TRAINING[name], options)


def gemm_run(options: Options, model_path: Path, tokens: Sequence[int] = (2048,), scenario: str = "") -> Run:
    """The rate of matrix multiplications, measured in every round beside the peers."""
    arguments = ("--model_path", str(model_path), "--device", options.device, "--seconds", str(options.seconds))
    arguments += ("--tokens", *map(str, tokens))
    return Run(GEMM, "matrix multiplication", "benchmarks.gemm_rate", arguments, scenario)


def gemm_suite(options: Options) -> Suite:
    """The rate of matrix multiplications at several numbers of tokens."""
    run = gemm_run(options, options.model_path, (512, 1024, 2048, 4096))
    title = "Rate of the matrix multiplications of one block"
    return Suite("gemm", title, "gemm_rate", (run,), inputs=(_weights(options.model_path),))


def scoring_suite(name: str, options: Options) -> Suite:
    """All scoring peers over the same share of the same files."""
    if options.files:
        files = options.files
    elif name == "scoring-rewardbench":
        files = (str(external_data() / "rewardbench_style.jsonl"),)
    else:
        files = tuple(map(str, public_bias_files()))
    percent = options.percent if options.percent is not None else SCORING_PERCENT[name]
    common = ("--model_path", str(options.model_path), "--precision", DTYPE, "--device", options.device)
    common += ("--percent", str(percent), "--seed", str(options.seed), "--files", *files)
    budget = ("--max_tokens_per_batch", str(options.max_tokens_per_batch))
    sorted_budget = ("--max_tokens", str(sorted_tokens(options)))
    module = "benchmarks.peers"
    runs = [
        gemm_run(options, options.model_path),
        Run("original_loop", "original loop", f"{module}.original_loop", ("score", *common)),
        Run("pipeline", "transformers.pipeline", f"{module}.pipeline_scoring", common),
        Run("sorted_padded", "sorted, padded", f"{module}.sorted_padded", ("score", *common, *sorted_budget)),
        *(
            Run(f"ours.{packing}", label, f"{module}.ours", ("score", *common, *budget, "--packing", packing))
            for packing, label in OUR_LABELS.items()
        ),
    ]
    data = "RewardBench-style rows" if name == "scoring-rewardbench" else "the bias files"
    inputs = (_weights(options.model_path), *(f"{Path(file).name} {file_sha256(file)}" for file in files))
    title = f"Scoring {percent:g} % of the questions of {data}, {DTYPE}"
    return Suite(name, title, "scoring", tuple(runs), inputs)


OUR_LABELS = {
    "off": "ours, padded",
    "packed": "ours, packed",
    "shared": "ours, packed with shared prefixes (default)",
}
PRECISION_LABELS = {
    "autocast": "autocast over float32 weights",
    "bfloat16": "bfloat16 weights",
}


def training_suite(name: str, defaults: TrainingDefaults, options: Options) -> Suite:
    """All training peers on the same groups of real rows; TRL too where they are pairs."""
    sizes = replace(
        defaults,
        groups_per_step=options.groups_per_step or defaults.groups_per_step,
        steps=options.steps or defaults.steps,
    )
    n = (sizes.steps + options.warmup_steps) * sizes.groups_per_step
    train_file = write_rows(options, answers=defaults.answers, n=n)
    runs = (
        gemm_run(options, options.model_path),
        *training_runs(options, sizes, model_path=options.model_path, train_file=train_file),
    )
    what = "pairs" if defaults.answers == 2 else f"groups of {defaults.answers}"
    title = f"Training on {what}, {DTYPE}"
    inputs = (_weights(options.model_path), f"{train_file.name} {file_sha256(train_file)}")
    return Suite(name, title, "training", runs, inputs)


def training_runs(
    options: Options,
    sizes: TrainingDefaults,
    *,
    model_path: Path,
    train_file: Path,
    pairs_file: Path | None = None,
    scenario: str = "",
) -> list[Run]:
    """The training peers on one file.

    Args:
        pairs_file: The same groups as pairs, for TRL; None where they are pairs already or TRL is left out.
    """
    checkpointing = options.gradient_checkpointing or 0
    common = ("--model_path", str(model_path), "--device", options.device, "--max_length", str(options.max_length))
    common += ("--steps", str(sizes.steps), "--warmup_steps", str(options.warmup_steps))
    common += ("--gradient_checkpointing", str(checkpointing))
    groups = ("--train_file", str(train_file), "--groups_per_step", str(sizes.groups_per_step))
    # TRL's loss knows no temperature.
    temperature = ("--temperature", "1" if sizes.answers == 2 else "0.5")
    micro_batch = max(1, options.rows_per_micro_batch // sizes.answers)
    max_tokens = str(sorted_tokens(options))
    runs = []
    for mode in PRECISION_LABELS:
        runs.append(
            Run(
                f"original_loop.{mode}",
                f"original loop, {PRECISION_LABELS[mode]}",
                "benchmarks.peers.original_loop",
                ("train", *common, *groups, *temperature, "--precision", mode, "--micro_batch_size", str(micro_batch)),
                scenario,
            )
        )
    for mode in PRECISION_LABELS:
        runs.append(
            Run(
                f"sorted_padded.{mode}",
                f"sorted, padded, {PRECISION_LABELS[mode]}",
                "benchmarks.peers.sorted_padded",
                ("train", *common, *groups, *temperature, "--precision", mode, "--max_tokens", max_tokens),
                scenario,
            )
        )
    if sizes.answers == 2 or pairs_file is not None:
        per_group = sizes.answers - 1
        per_step = sizes.groups_per_step * per_group
        at_once = max(size for size in range(1, max(1, options.rows_per_micro_batch // 2) + 1) if per_step % size == 0)
        pairs = ("--train_file", str(pairs_file or train_file), "--groups_per_step", str(per_step))
        for mode in PRECISION_LABELS:
            runs.append(
                Run(
                    f"trl.{mode}",
                    f"TRL, {PRECISION_LABELS[mode]}" + (", as pairs" if per_group > 1 else ""),
                    "benchmarks.peers.trl_reward",
                    (*common, *pairs, "--precision", mode, "--micro_batch_size", str(at_once)),
                    scenario,
                    TRL,
                    per_group,
                )
            )
    ours = ("train", *common, *groups, *temperature, "--precision", DTYPE)
    ours += ("--max_tokens_per_batch", str(options.max_tokens_per_batch))
    for packing, label in OUR_LABELS.items():
        arguments = (*ours, "--packing", packing)
        runs.append(Run(f"ours.{packing}", f"{label}, float32 masters", "benchmarks.peers.ours", arguments, scenario))
    return runs


def sorted_tokens(options: Options) -> int:
    """Padded tokens of a batch of the sorted baseline: unless it is told, it fills the device as ours does."""
    return options.max_tokens or options.max_tokens_per_batch or default_token_budget(resolve_device(options.device))


def gpu_suite(options: Options) -> Suite:
    """Random models of known shapes on groups of random words: every size of group behind every length of prompt."""
    tokenizer = AutoTokenizer.from_pretrained(options.model_path)
    device = resolve_device(options.device)
    prompts, group_sizes = options.prompts or (256, 1024, 4096), options.group_sizes or (2, 4, 8)
    folder = options.work_dir
    runs: list[Run] = []
    inputs = []
    for shape in options.shapes or GPU_SHAPES:
        model = make_random_model(shape, options.model_path, folder / "models" / shape, device)
        inputs.append(_weights(model))
        runs.append(gemm_run(options, model, (4096, 16384), scenario=shape))
        for prompt in prompts:
            for answers in group_sizes:
                sizes = TrainingDefaults(
                    answers,
                    options.groups_per_step or GPU_DEFAULTS.groups_per_step,
                    options.steps or GPU_DEFAULTS.steps,
                )
                n = sizes.groups_per_step * (sizes.steps + options.warmup_steps)
                rows = folder / "rows" / f"random-{answers}-answers-{prompt}-tokens-{n}-{options.seed}.jsonl"
                write_random_groups(rows, tokenizer, n=n, answers=answers, prompt_tokens=prompt, seed=options.seed)
                inputs.append(f"{rows.name} {file_sha256(rows)}")
                runs += training_runs(
                    replace(
                        options,
                        # A template and a system turn come on top.
                        max_length=max(options.max_length, prompt + ANSWER_TOKENS[1] + 256),
                        gradient_checkpointing=(
                            1 if options.gradient_checkpointing is None else options.gradient_checkpointing
                        ),
                    ),
                    sizes,
                    model_path=model,
                    train_file=rows,
                    pairs_file=write_pairs(rows) if answers > 2 else None,
                    scenario=f"{shape}, prompts of {prompt} tokens, groups of {answers}",
                )
    title = "Training randomly initialised Qwen2.5 shapes on groups of random words, bfloat16"
    return Suite("gpu", title, "training", tuple(runs), tuple(inputs))


def write_rows(options: Options, *, answers: int, n: int) -> Path:
    """Groups of real rows that fit ``--max_length``, chosen once."""
    source = Path(options.input_file) if options.input_file else external_data() / "train_pool.jsonl"
    made_of = [_source_hash(source), _weights(options.model_path), options.max_length, options.seed]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    target = options.work_dir / "rows" / f"{answers}-answers-{n}-{name}.jsonl"
    if not target.is_file():
        formatter = ChatFormatter(AutoTokenizer.from_pretrained(options.model_path))
        records, _ = read_preference_file(source)
        fits = fits_in(formatter, options.max_length)
        groups, _ = choose_groups(records, answers, n, seed=options.seed, fits=fits)
        write_jsonl(target, [group.to_row() for group in groups])
    return target


def write_pairs(groups_file: Path) -> Path:
    """Every rejected answer of a group as a pair of its own with the chosen one, beside the file of the groups."""
    target = groups_file.with_name(f"{groups_file.stem}-as-pairs.jsonl")
    pairs = [
        PreferenceRecord(f"{record.id}/{number}", record.messages, record.chosen, [rejected], [None])
        for record in read_preference_file(groups_file)[0]
        for number, rejected in enumerate(record.rejected)
    ]
    write_jsonl(target, [pair.to_row() for pair in pairs])
    return target


def session_key(suite: Suite, options: Options, commit: str | None) -> str:
    """Name of one measurement: the same suite, settings, inputs and commit. Runs of other sessions are never mixed in."""
    # Paths say nothing about the content, which the inputs name.
    settings = asdict(options) | dict.fromkeys(("model_path", "work_dir", "input_file", "files"))
    made_of = [suite.name, settings, suite.inputs, commit]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _weights(model_path: Path) -> str:
    return f"{model_path.name} {model_hash(model_path)}"


@cache
def _source_hash(source: Path) -> str:
    return file_sha256(source)
