"""How fast this machine multiplies matrices of a model's own shapes: the measure of what its layers could reach.

For every linear layer of one transformer block, T tokens at once: the best of several timed runs, float32 and bfloat16.
``layer_gflops`` is the rate of all linear layers of a block together (each shape as often as it occurs), which is what a
forward pass of useful tokens is compared with.
Run: ``python -m benchmarks.gemm_rate --model_path output/benchmarks/model``
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MODEL_DIR, classifier_on_meta, now, resolve_device, write_line
from codes.common.cli import positive, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS = 5


def block_shapes(model_path: str) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one block, and how often each occurs."""
    model = classifier_on_meta(model_path)
    # All blocks are counted and divided by their number: the block's place differs from model to model.
    n_layers = model.config.get_text_config().num_hidden_layers
    linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    counts = Counter((module.in_features, module.out_features) for module in linear)
    return Counter({shape: count // n_layers for shape, count in counts.items() if count >= n_layers})


def best_seconds(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, budget: float
) -> float:
    """Seconds of one multiplication: the best of ``REPEATS`` runs that last about ``budget`` seconds together."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=dtype, device=device, generator=generator)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device, generator=generator)
    with torch.inference_mode():
        for _ in range(3):
            begin = now(device)
            torch.nn.functional.linear(x, weight)
            once = now(device) - begin
        calls = max(1, round(budget / REPEATS / max(once, 1e-6)))
        best = float("inf")
        for _ in range(REPEATS):
            begin = now(device)
            for _ in range(calls):
                torch.nn.functional.linear(x, weight)
            best = min(best, (now(device) - begin) / calls)
    return best


def measure(model_path: str, tokens: list[int], device: torch.device, budget: float) -> list[dict[str, Any]]:
    """One entry a number of tokens and dtype: rates in GFLOP/s of each shape and of the block."""
    shapes = block_shapes(model_path)
    entries = []
    for name, dtype in DTYPES.items():
        for n in tokens:
            seconds = {shape: best_seconds(n, *shape, dtype, device, budget) for shape in shapes}
            flops = {shape: 2 * n * shape[0] * shape[1] for shape in shapes}
            block_flops = sum(flops[shape] * count for shape, count in shapes.items())
            block_seconds = sum(seconds[shape] * count for shape, count in shapes.items())
            entries.append(
                {
                    "dtype": name,
                    "tokens": n,
                    "layer_gflops": block_flops / block_seconds / 1e9,
                    "shapes": [
                        {
                            "inputs": shape[0],
                            "outputs": shape[1],
                            "per_block": count,
                            "gflops": flops[shape] / seconds[shape] / 1e9,
                        }
                        for shape, count in shapes.items()
                    ],
                }
            )
    return entries


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Measured rate of matrix multiplication at a model's shapes.")
    parser.add_argument("--model_path", default=str(MODEL_DIR), help="a folder with a config.json")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on one shape")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output_file", default=None, help="append the JSON line here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure and print the JSON line."""
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    begin = time.perf_counter()
    entries = measure(args.model_path, args.tokens, device, args.seconds)
    fields = {
        "task": "gemm_rate",
        "model": Path(args.model_path).name,
        "device": str(device),
        "rates": entries,
        "seconds": time.perf_counter() - begin,
    }
    write_line(fields, args.output_file)
    return 0


if __name__ == "__main__":
    run(main)
