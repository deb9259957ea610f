"""What every benchmark shares: the model, its floating-point operations, time, peak memory, and one JSON line a run.

Reads a base model (the embedded one by default). Writes ``output/benchmarks/model``, a reward model with a new head, made
once, so that every run of every peer starts from the same weights. Runs in the environment of TRL too: it imports nothing
that TRL does not need.
Run: ``python -m benchmarks.common`` makes the model and prints its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from codes.common.base_model import EMBEDDED_ALIAS, model_hash
from codes.common.cli import positive, run
from codes.common.errors import ContrastRMError
from codes.common.packing import PackLayout
from codes.common.records import write_json
from codes.common.reporting import run_metadata

OUTPUT_DIR = Path(__file__).resolve().parents[1] / "output" / "benchmarks"
MODEL_DIR = OUTPUT_DIR / "model"
# float32: weights and arithmetic. bfloat16: weights and arithmetic. autocast: float32 weights, bfloat16 arithmetic.
PRECISIONS = ("float32", "bfloat16", "autocast")


def prepare_model(model_path: str = EMBEDDED_ALIAS, folder: str | Path = MODEL_DIR, *, seed: int = 42) -> Path:
    """Make a reward model with a new head, unless the folder has one.

    Args:
        model_path: A base model: the alias ``embedded``, a folder, or a hub id.
        folder: Where it is saved, in the dtype of the base model's weights (the head too).
        seed: Draws the head.

    Raises:
        ContrastRMError: The base model cannot be had, or the folder was made from another model or seed.
    """
    # Here, because the environment of TRL need not be able to make a model.
    from codes.train.reward_model import load_reward_model, save_reward_model

    folder = Path(folder)
    made_of = {"model_path": str(model_path), "seed": seed}
    note = folder / "benchmark_model.json"
    if (folder / "config.json").is_file():
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if found != made_of:
            raise ContrastRMError(f"{folder} was made of {found}, not of {made_of}; remove it or choose another folder")
        return folder
    model, tokenizer = load_reward_model(str(model_path), require_head=False, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, made_of)
    return save_reward_model(model, tokenizer, folder)


@dataclass(frozen=True)
class ModelShape:
    """What a model costs: ``n_parameters`` without its input embeddings, and the width of all query heads together."""

    n_parameters: int
    n_layers: int
    attention_width: int
    hidden_size: int


def classifier_on_meta(model_path: str | Path) -> Any:
    """The model's modules without its weights."""
    config = AutoConfig.from_pretrained(model_path)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def model_shape(model_path: str | Path) -> ModelShape:
    """Count a model's parameters from its config alone."""
    model = classifier_on_meta(model_path)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embeddings = model.get_input_embeddings().weight.numel()
    return ModelShape(
        n_parameters=sum(parameter.numel() for parameter in model.parameters()) - embeddings,
        n_layers=config.num_hidden_layers,
        attention_width=head_dim * config.num_attention_heads,
        hidden_size=config.hidden_size,
    )


def attended_pairs(lengths: Iterable[int], prefix: int = 0) -> int:
    """(query, key) pairs of causal attention: every token sees the prefix, itself, and what stands before it.

    Args:
        lengths: Tokens of each text, without the shared prefix.
        prefix: Tokens of the prefix that they share, computed once.

    Example: lengths (2, 1) -> 3 + 1; with a prefix of 2 -> 3 + (2·2 + 3) + (2·1 + 1) = 13.
    """
    return prefix * (prefix + 1) // 2 + sum(prefix * length + length * (length + 1) // 2 for length in lengths)


def forward_flops(shape: ModelShape, n_tokens: int, n_attended_pairs: int) -> int:
    """Floating-point operations of a forward pass; forward and backward together are three times as many.

    Two per parameter and token; per pair of tokens that attend, two for the score and two for the value, times width.
    """
    return 2 * shape.n_parameters * n_tokens + 4 * shape.n_layers * shape.attention_width * n_attended_pairs


def visible_pairs(layout: PackLayout) -> int:
    """(query, key) pairs of a pack without filler: its token ``k`` is seen by ``[k, until[k])``."""
    return int(layout.until.long().sum()) - layout.n_tokens * (layout.n_tokens - 1) // 2


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def n_compiled() -> int:
    """How many graphs ``torch.compile`` has made in this process so far."""
    module: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if module is None else int(module.counters["stats"]["unique_graphs"])


class PeakMemory:
    """The most memory that was held since ``reset``.

    On CUDA what torch allocated on the device; else the resident set of this process. Where the kernel does not let its
    high-water mark be reset, the peak is that of the whole process, and ``fields`` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.since_reset = False

    def reset(self) -> None:
        """Forget earlier peaks (loading a model holds its weights twice for a moment)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.since_reset = True
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.since_reset = True
        except OSError:
            self.since_reset = False  # not Linux, or a kernel that refuses: said in the result

    def fields(self) -> dict[str, Any]:
        """``peak_bytes``, and what it is the peak of."""
        since = "timed part" if self.since_reset else "process"
        if self.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(self.device), "peak_of": f"device memory, {since}"}
        return {"peak_bytes": self._peak_rss(), "peak_of": f"resident set, {since}"}

    def _peak_rss(self) -> int:
        if self.since_reset:
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, Any]:
    """What the run ran on, and how busy that was before it."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "gpus": gpus,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def model_fields(model_path: str | Path) -> dict[str, Any]:
    """Which model was measured: its folder's name, its weights' hash, its size."""
    return {
        "model": Path(model_path).name,
        "weight_hash": model_hash(model_path),
        **asdict(model_shape(model_path)),
    }


def write_line(fields: dict[str, Any], output_file: str | Path | None = None) -> None:
    """Print one JSON line (the fields, then machine, versions and git commit), and append it to a file if one is given."""
    line = json.dumps({**fields, "machine": machine(), **run_metadata()}, ensure_ascii=False, allow_nan=False)
    print(line, flush=True)
    if output_file is not None:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        with Path(output_file).open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Where the result goes besides standard output."""
    parser.add_argument("--output_file", default=None, help="append the JSON line here too")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every peer."""
    parser.add_argument("--model_path", default=str(MODEL_DIR), help="a reward model's folder")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_output_argument(parser)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every peer that trains; the same numbers mean the same work."""
    add_run_arguments(parser)
    parser.add_argument("--train_file", required=True, help="preference records, used in the order of the file")
    parser.add_argument("--groups_per_step", type=positive, default=4, help="groups of an optimizer step")
    parser.add_argument("--steps", type=positive, default=None, help="timed steps; default: as the file allows")
    parser.add_argument("--warmup_steps", type=positive, default=1, help="steps before the timed ones")
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--max_length", type=positive, default=1024, help="a longer text stops the run")
    parser.add_argument("--gradient_checkpointing", type=int, choices=(0, 1), default=0)


def whole_steps(n_groups: int, groups_per_step: int, warmup_steps: int, steps: int | None) -> int:
    """How many timed steps a file of ``n_groups`` gives; all steps are whole, so that all peers do the same work.

    Raises:
        ContrastRMError: Fewer than asked for, or none.
    """
    available = n_groups // groups_per_step - warmup_steps
    wanted = available if steps is None else steps
    if wanted < 1 or available < wanted:
        needed = ((1 if steps is None else steps) + warmup_steps) * groups_per_step
        raise ContrastRMError(
            f"the training file has {n_groups} groups, the run needs {needed}; choose more rows (python -m benchmarks.rows) "
            "or lower --steps, --warmup_steps or --groups_per_step"
        )
    return wanted


def training_fields(
    *, seconds: float, losses: Sequence[float], n_groups: int, n_answers: int, n_tokens: int, n_computed_tokens: int
) -> dict[str, Any]:
    """The result of a training run, the same names for every peer.

    Args:
        seconds: From the begin of the first timed step to the end of the last one.
        losses: Of every step, the warm-up steps first.
        n_tokens: Real tokens of the timed steps.
        n_computed_tokens: Tokens that the timed steps computed, padding included.
    """
    return {
        "n_groups": n_groups,
        "n_answers": n_answers,
        "n_tokens": n_tokens,
        "n_computed_tokens": n_computed_tokens,
        "seconds": seconds,
        "groups_per_second": n_groups / seconds,
        "tokens_per_second": n_tokens / seconds,
        "losses": list(losses),
    }


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Make the reward model that every benchmark starts from.")
    parser.add_argument("--model_path", default=EMBEDDED_ALIAS, help="alias 'embedded', model folder or hub id")
    parser.add_argument("--output_dir", default=str(MODEL_DIR))
    parser.add_argument("--seed", type=int, default=42, help="draws the head")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make the model and print its folder."""
    args = build_parser().parse_args(argv)
    print(prepare_model(args.model_path, args.output_dir, seed=args.seed))
    return 0


if __name__ == "__main__":
    run(main)
