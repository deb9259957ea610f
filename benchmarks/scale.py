"""Do several ranks learn what one process learns? Every engine, precision, accumulation and LoRA, on two CPU ranks.

Trains a two-layer model with real launches of ``run_training.sh``, groups of two to six answers, and compares per-step losses
and final weights with one process of the same precision; then the score head of the file, and the scores of the reloaded folder.
Reads: the embedded model's tokenizer. Writes: ``benchmarks/results/scale.md``; the runs stay in ``output/benchmarks/scale``.
Run: ``python -m benchmarks.scale`` (about half a minute a line on two cores), or some lines of it:
``python -m benchmarks.scale --engines z3 --precisions bf16 --accumulation 2 --lora 0``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.synthetic import make_random_model
from codes.common.base_model import resolve_model_path
from codes.common.chat import ChatFormatter, Conversation
from codes.common.cli import natural, run
from codes.common.records import read_preference_file, write_jsonl, write_text
from codes.common.reporting import package_versions
from codes.common.scoring import Scorer
from codes.train.reward_model import load_reward_model

ENGINES = {
    "ddp": "none",
    "z2": "configs/ds_z2_config.json",
    "z3": "configs/ds_z3_config.json",
    "z2-offload": "configs/ds_z2_offload_config.json",
    "z3-offload": "configs/ds_z3_offload_config.json",
}
PRECISIONS = ("fp32", "bf16")
GROUPS_PER_STEP = 8
WORDS = ("the", "cat", "sat", "because", "it", "is", "red", "and", "people", "ask", "why", "light", "bends")
# The largest differences that count as the same. float32: another order of additions. bfloat16 keeps 8 bits, and ranks add
# gradients up in it.
LIMITS = {"fp32": 1e-4, "bf16": 0.02}


def write_groups(path: Path, n: int = 24) -> Path:
    """Groups of two to six answers."""
    generator = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(generator.choice(WORDS, size=int(generator.integers(4, most))))

    rows = []
    for number in range(n):
        rejected = [words(30) for _ in range(1 + number % 5)]
        rows.append({"id": f"g{number}", "question": words(20), "chosen": words(30), "rejected": rejected})
    write_jsonl(path, rows)
    return path


def train_once(
    folder: Path, model: Path, data: Path, *, processes: int, engine: str, precision: str, accumulation: int, lora: int
) -> subprocess.CompletedProcess[str]:
    """One launch; micro-batches of so many groups that a step takes ``accumulation`` of them."""
    shutil.rmtree(folder, ignore_errors=True)
    knobs = {
        "NUM_PROCESSES": processes,
        "DEEPSPEED_CONFIG": ENGINES[engine],
        "MODEL_PATH": model,
        "TRAIN_FILE": data,
        "OUTPUT_DIR": folder,
        "PRECISION": precision,
        "LORA_RANK": lora,
        "GLOBAL_BATCH_SIZE": GROUPS_PER_STEP,
        # AdamW moves a weight by the learning rate however small its gradient is: where that is nearly zero, the order of
        # additions decides the direction.
        "LEARNING_RATE": 3e-4,
        "WARMUP_STEPS": 1,
        "EPOCHS": 2,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": 1,
        "SKIP_SETUP": 1,
        "PYTHON": sys.executable,
    }
    environment = os.environ | {name: str(value) for name, value in knobs.items()}
    command = ["bash", "run_training.sh", "--micro_batch_size", str(GROUPS_PER_STEP // (processes * accumulation))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def losses_of(folder: Path) -> list[float]:
    """Of every step."""
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def scores_of(folder: Path, data: Path) -> np.ndarray:
    """Of every chosen answer, in float32, by the reloaded folder."""
    model, tokenizer = load_reward_model(str(folder), dtype="float32")
    records, _ = read_preference_file(data)
    texts = [Conversation(record.messages, record.chosen) for record in records]
    return np.asarray(Scorer(model, ChatFormatter(tokenizer), progress=False).score(texts).scores)


def compare(two: Path, single: Path, data: Path) -> dict[str, Any]:
    """Largest differences between two finished runs."""
    loss = float(np.abs(np.array(losses_of(two)) - np.array(losses_of(single))).max())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, single))
    assert ours.keys() == theirs.keys()
    weights = {name: float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours}
    summary = json.loads((two / "train_summary.json").read_text(encoding="utf-8"))
    scores = scores_of(two, data)
    return {
        "loss": loss,
        "weight": max(weights.values()),
        "head": weights["score.weight"],
        "score": float(np.abs(scores - scores_of(single, data)).max()),
        "score_sd": float(scores.std()),
        "steps": summary["steps"],
    }


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in package_versions().items())
    lines = [
        "# Two ranks against one process",
        "",
        f"`python -m benchmarks.scale`: two layers, hidden 32, groups of 2 to 6 answers, {GROUPS_PER_STEP} groups a step, 6",
        'steps, two CPU ranks (gloo). Largest absolute differences from one process of the same precision; "same": losses '
        f"and weights within {LIMITS['fp32']:g} (fp32) or {LIMITS['bf16']:g} (bf16).",
        "",
        "| engine | precision | micro-batches a step | LoRA rank | loss | weights | score head | scores (their SD) | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['engine']} | {row['precision']} | {row['accumulation']} | {row['lora'] or 'off'} |"
        if "error" in row:
            lines.append(f"{start} | | | | failed: {row['error']} |")
            continue
        same = max(row["loss"], row["weight"]) <= LIMITS[row["precision"]]
        lines.append(
            f"{start} {row['loss']:.1e} | {row['weight']:.1e} | {row['head']:.1e} | {row['score']:.1e} ({row['score_sd']:.2f}) | "
            f"{'same' if same else 'DIFFERENT'} |"
        )
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Compare runs of two ranks with runs of one process.")
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--accumulation", nargs="+", type=natural, choices=(1, 2, 4), default=(1, 2, 4))
    parser.add_argument("--lora", nargs="+", type=natural, default=(0, 4), help="ranks; 0: off")
    parser.add_argument("--output_file", default="benchmarks/results/scale.md")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the grid; exit code 1 where a line failed or differs."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    home = Path("output/benchmarks/scale").resolve()
    home.mkdir(parents=True, exist_ok=True)
    model = make_random_model("tiny", resolve_model_path("embedded"), home / "model", torch.device("cpu"))
    data = write_groups(home / "groups.jsonl")
    rows: list[dict[str, Any]] = []
    for precision, lora in itertools.product(args.precisions, args.lora):
        single = home / f"single-{precision}-{lora}"
        options = {"precision": precision, "lora": lora}
        done = train_once(single, model, data, processes=1, engine="ddp", accumulation=1, **options)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        for engine, accumulation in itertools.product(args.engines, args.accumulation):
            two = home / f"{engine}-{precision}-{lora}-{accumulation}"
            row: dict[str, Any] = {"engine": engine, "accumulation": accumulation, **options}
            done = train_once(two, model, data, processes=2, engine=engine, accumulation=accumulation, **options)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "rror" in line] or ["no message"]
                row["error"] = errors[0][-200:].replace("|", "/")
            else:
                row |= compare(two, single, data)
            rows.append(row)
            print(row, flush=True)
            write_text(Path(args.output_file), report(rows))
    failed = [row for row in rows if "error" in row or max(row["loss"], row["weight"]) > LIMITS[row["precision"]]]
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
