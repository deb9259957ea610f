"""Learning curves of a finished run.

Writes: ``training_curves.png`` and ``training_curves.svg`` in the run's folder.
Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codes.common.records import write_text
from codes.common.reporting import BLUE, GREY, VERMILION, plot_settings

CURVES = "training_curves"
# The rest of Okabe and Ito's palette, for single biases; line styles tell them apart without colour.
BIAS_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000")
BIAS_STYLES = ("-", "--", ":", "-.")
# A bias with fewer pairs than this has no curve of its own: it would be noise. The log has its figures.
FEWEST_PAIRS_FOR_A_CURVE = 5


def draw_training_curves(
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    output_dir: Path,
    *,
    best_step: int | None = None,
) -> None:
    """Draw loss, accuracy and bias sensitivity over the steps.

    Training losses and accuracies are thin, their running mean is thick; held-out figures are dots with 95 % intervals. The
    bias sensitivity rate stands in one panel with the accuracy before the bias, because alone it says nothing.

    Args:
        log: Entries of ``train_log.jsonl``.
        evaluations: Entries of ``eval_log.jsonl``.
        best_step: Marked by an upright line.
    """
    has_pairs = any("eval/bsr" in entry for entry in evaluations)
    with plot_settings():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        n_panels = 3 if has_pairs else 2
        figure = Figure(figsize=(4.6 * n_panels, 3.9))
        axes = figure.subplots(1, n_panels, squeeze=False)
        loss, accuracy = axes[0][:2]
        _draw_training(loss, log, "train/loss", 1)
        _draw_held_out(loss, evaluations, "eval/loss", "held out", VERMILION, 1)
        loss.set_title("Loss")
        _draw_training(accuracy, log, "train/accuracy", 100)
        _draw_held_out(accuracy, evaluations, "eval/accuracy_all", "held out, all negatives", VERMILION, 100)
        _draw_held_out(accuracy, evaluations, "eval/accuracy", "held out, without injected", GREY, 100, "s")
        accuracy.set_ylim(-2, 102)
        accuracy.set_title("Accuracy (%)")
        if has_pairs:
            _draw_bias(axes[0][2], evaluations)
        for axis in axes[0]:
            if best_step is not None:
                axis.axvline(best_step, color=GREY, linewidth=1, linestyle=":", label=f"best (step {best_step})")
            axis.set_xlabel("step")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(color="#dddddd")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7, framealpha=0.9)
        figure.tight_layout()
        text, unfinished = io.StringIO(), output_dir / f".{CURVES}.png"
        figure.savefig(text, format="svg", metadata={"Date": None})
        figure.savefig(unfinished, format="png", dpi=150)
    write_text(output_dir / f"{CURVES}.svg", text.getvalue())
    os.replace(unfinished, output_dir / f"{CURVES}.png")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each place; of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    begins = np.maximum(0, ends - window)
    return [float(value) for value in (sums[ends] - sums[begins]) / (ends - begins)]


def _draw_training(axis: Any, log: Sequence[Mapping[str, Any]], key: str, scale: float) -> None:
    points = [(entry["step"], scale * entry[key]) for entry in log if entry.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 20)
    if window > 1:
        axis.plot(steps, values, color=BLUE, linewidth=0.6, alpha=0.35)
    label = "training" if window == 1 else f"training (mean of {window} steps)"
    axis.plot(steps, running_mean(values, window), color=BLUE, linewidth=1.8, label=label)


def _draw_held_out(
    axis: Any,
    evaluations: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    colour: str,
    scale: float,
    marker: str = "o",
    style: str = "-",
) -> None:
    entries = [entry for entry in evaluations if entry.get(key) is not None]
    if not entries:
        return
    steps = [entry["step"] for entry in entries]
    values = [scale * entry[key] for entry in entries]
    axis.plot(steps, values, color=colour, marker=marker, markersize=5, linewidth=1.2, linestyle=style, label=label)
    for step, entry in zip(steps, entries, strict=True):
        if entry.get(f"{key}_ci"):
            axis.plot(
                [step, step], [scale * bound for bound in entry[f"{key}_ci"]], color=colour, linewidth=1, alpha=0.6
            )


def _draw_bias(axis: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    _draw_held_out(axis, evaluations, "eval/original_accuracy", "accuracy before the bias", BLUE, 100, "s")
    _draw_held_out(axis, evaluations, "eval/bsr", "BSR, all biases", VERMILION, 100)
    biases = sorted(
        {
            key.split("/", 2)[2].removesuffix("_total")
            for entry in evaluations
            for key, value in entry.items()
            if key.startswith("eval/original_accuracy/")
            and key.endswith("_total")
            and value >= FEWEST_PAIRS_FOR_A_CURVE
        }
    )
    for number, bias in enumerate(biases):
        points = [
            (entry["step"], 100 * entry[f"eval/bsr/{bias}"])
            for entry in evaluations
            if entry.get(f"eval/bsr/{bias}") is not None
        ]
        if points:
            colour = BIAS_COLOURS[number % len(BIAS_COLOURS)]
            style = BIAS_STYLES[number // len(BIAS_COLOURS) % len(BIAS_STYLES)]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1, label=f"BSR {bias}")
    axis.set_ylim(-2, 102)
    axis.set_title("Bias: BSR beside the accuracy (%)")
