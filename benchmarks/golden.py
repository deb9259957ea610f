"""Pin what every stage writes on small inputs, and compare two versions of the code by it.

``record`` builds a two-layer model on the embedded model's tokenizer, constructs by rule, trains 50 steps in both modes with
held-out evaluations, evaluates biases and RewardBench-style rows, and compares; what was written is kept without times, paths
and versions. ``--repo`` names the checkout whose code runs. ``compare`` names every number and text that differs. Two records
of one commit are equal.

Run: ``python -m benchmarks.golden record --repo ../old --output_dir output/golden/old``
     ``python -m benchmarks.golden compare output/golden/old output/golden/new``
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codes.common.base_model import ensure_embedded_model
from codes.common.cli import run
from codes.common.records import write_json, write_text

REPO_ROOT = Path(__file__).resolve().parents[1]
TRAINING = {
    "MAX_STEPS": "50", "EPOCHS": "50", "GLOBAL_BATCH_SIZE": "8", "LEARNING_RATE": "1e-3", "WARMUP_STEPS": "5",
    "MAX_LENGTH": "512", "PRECISION": "fp32", "EVAL_STEPS": "10", "HELD_OUT_SHARE": "0.2", "REPORT_TO": "none",
}  # fmt: skip
# Fields that differ from run to run, or name the machine, the code or a folder.
VOLATILE = (
    "seconds", "_utc", "version", "platform", "git_", "machine", "path", "_dir", "_file", "hash", "sha256", "tokens_per",
    "command", "hostname", "peak_", "code", "run_id", "fingerprint", "identity",
)  # fmt: skip


def make_model(folder: Path) -> Path:
    """Two layers of the embedded model's architecture on its tokenizer: a trained tokenizer would differ from run to run."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    base = ensure_embedded_model()
    config = AutoConfig.from_pretrained(base)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.update(small | {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "layer_types": None})
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def run_stages(scratch: Path, repo: Path) -> None:
    """Everything that a user runs, in small, one thread each: the bits of a sum depend on how many threads made it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "SKIP_SETUP": "1",
    }
    environment |= {"RESULTS_DIR": str(scratch / "results"), "CACHE_DIR": str(scratch / "cache"), "DTYPE": "float32"}
    environment |= {"PYTHONPATH": str(repo), "MPLCONFIGDIR": str(scratch / "mpl")}

    def launch(*command: str, **knobs: str) -> None:
        subprocess.run(command, cwd=repo, env=environment | knobs, check=True, stdin=subprocess.DEVNULL)

    model = make_model(scratch / "base")
    train_file = str(scratch / "construct" / "train.jsonl")
    launch(
        "bash", "run_construction.sh", STRATEGY="template", OUTPUT_FILE=train_file, WORK_DIR=str(scratch / "construct")
    )
    for mode, file in (
        ("contrastive", f"data/train/own_train.jsonl,{train_file}"),
        ("pairwise", "data/train/own_train.jsonl"),
    ):
        output = str(scratch / "models" / mode)
        launch(
            "bash", "run_training.sh", MODE=mode, MODEL_PATH=str(model), TRAIN_FILE=file, OUTPUT_DIR=output, **TRAINING
        )
        launch("bash", "run_evaluation_rm.sh", MODEL_PATH=output)
        launch("bash", "run_evaluation_rewardbench.sh", MODEL_PATH=output)
    results = [str(scratch / "results" / mode) for mode in ("contrastive", "pairwise")]
    compare = [sys.executable, "-m", "codes.evaluate.compare_models", *results]
    launch(*compare, "--output_file", str(scratch / "results" / "comparison.md"))


def settled(text: str, scratch: Path) -> Any:
    """A JSON text as a value without its volatile fields and without the folder in which it was written."""

    def without_volatile(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if not any(word in key for word in VOLATILE)}

    return json.loads(text.replace(str(scratch), "SCRATCH"), object_hook=without_volatile)


def record(output_dir: Path, repo: Path) -> None:
    """Run all stages and keep what they wrote."""
    shutil.rmtree(output_dir, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=ensured(output_dir.parent)) as name:
        scratch = Path(name)
        run_stages(scratch, repo)
        for path in sorted(scratch.rglob("*")):
            kept = output_dir / path.relative_to(scratch)
            if {"base", "cache", "mpl"} & set(path.relative_to(scratch).parts) or not path.is_file():
                continue
            if path.suffix == ".json" and "token" not in path.name:
                write_json(ensured(kept.parent) / kept.name, settled(path.read_text(encoding="utf-8"), scratch))
            elif path.suffix == ".jsonl":
                rows = [settled(line, scratch) for line in path.read_text(encoding="utf-8").splitlines()]
                write_json(ensured(kept.parent) / f"{kept.name}.json", rows)
            elif path.suffix == ".safetensors":
                write_json(ensured(kept.parent) / f"{kept.name}.json", weight_sums(path))
            elif path.suffix == ".md":
                lines = path.read_text(encoding="utf-8").replace(str(scratch), "SCRATCH").splitlines()
                stable = [line for line in lines if not any(word in line.split(" | ")[0] for word in VOLATILE)]
                write_text(ensured(kept.parent) / kept.name, "\n".join(stable) + "\n")


def ensured(folder: Path) -> Path:
    """The folder, made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weight_sums(path: Path) -> dict[str, list[float]]:
    """Sum and largest magnitude of every tensor: enough to see a difference."""
    from safetensors.torch import load_file

    return {name: [float(t.double().sum()), float(t.abs().max())] for name, t in sorted(load_file(path).items())}


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """One line for every place where two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            if key not in left or key not in right:
                yield f"{where}.{key}: only in the {'second' if key not in left else 'first'}"
            else:
                yield from differences(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif left != right:
        yield f"{where}: {str(left)[:80]} -> {str(right)[:80]}"


def compare(left: Path, right: Path) -> int:
    """Print every difference of two records; 1 where there is one."""
    n_differences = 0
    names = sorted(
        {
            path.relative_to(folder).as_posix()
            for folder in (left, right)
            for path in folder.rglob("*")
            if path.is_file()
        }
    )
    for name in names:
        one, other = left / name, right / name
        if not (one.is_file() and other.is_file()):
            lines = [f"only in the {'first' if one.is_file() else 'second'}"]
        elif name.endswith(".json"):
            lines = list(differences(json.loads(one.read_text()), json.loads(other.read_text())))
        else:
            lines = [] if one.read_text() == other.read_text() else ["the text differs"]
        n_differences += len(lines)
        for line in lines[:20]:
            print(f"{name}{line if line[0] in '.[' else ': ' + line}")
        if len(lines) > 20:
            print(f"{name}: {len(lines) - 20} more")
    print(f"{len(names)} files, {n_differences} differences")
    return int(n_differences > 0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--output_dir", type=Path, required=True)
    recording.add_argument("--repo", type=Path, default=REPO_ROOT)
    comparison = commands.add_parser("compare")
    comparison.add_argument("left", type=Path)
    comparison.add_argument("right", type=Path)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Record or compare."""
    args = build_parser().parse_args(argv)
    if args.command == "compare":
        return compare(args.left, args.right)
    record(args.output_dir.resolve(), args.repo.resolve())
    return 0


if __name__ == "__main__":
    run(main)
