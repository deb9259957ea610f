"""The plots of the report: dots with intervals, dumbbells, distributions of score gaps, stacked shares.

Plain numbers in, a ``Plot`` out (SVG text and PNG bytes; the same numbers give the same bytes). Reads and
writes nothing. Every plot is one column wide, so that it can be read on a phone without zooming; series differ
in shape as well as in colour.

    python -m pytest tests/test_report.py -k plot
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from codes.common.reporting import plot_settings, printable

# Hues of Okabe and Ito, told apart with every common colour vision deficiency; darkened until white text on them and they
# on white have a contrast of at least 4.5. Each stands for itself and for its partner on a dark page (see ``themed_svg``).
BLUE, VERMILION, GREEN, PURPLE, BROWN, TEAL = "#0b62a0", "#b84a00", "#00755a", "#9c4278", "#7a5c00", "#1f6f80"
INK, MUTED, GRID, PAPER, ON_COLOUR = "#1b1c1e", "#5c6066", "#d5d8dc", "#fffffe", "#ffffff"
CSS_NAMES = {
    BLUE: "--blue",
    VERMILION: "--vermilion",
    GREEN: "--green",
    PURPLE: "--purple",
    BROWN: "--brown",
    TEAL: "--teal",
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    ON_COLOUR: "--on-colour",
}
MODEL_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, BROWN, TEAL)
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "8", "<", ">")
BASELINE_MARKERS = ("x", "+", "1", "2", "3", "4", "|", "_")

# Inches. 3.8 in = 365 px: a phone's width less its margins.
WIDTH = 3.8
LINE = 0.17
FONT_SIZE = 9.0
LONGEST_LABEL = 24
PNG_DPI = 200
# Bins of a distribution, and how many score SDs the axis reaches at most.
N_BINS = 48
WIDEST_GAP = 6.0


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        name: File name without its ending.
        text: What the picture shows, for those who do not see it.
        svg: The picture as SVG text, for light paper.
        png: The same as PNG bytes.
    """

    name: str
    title: str
    text: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Series:
    """The rates of one model, baseline or placebo, one a label: in [0, 1], None where there is none.

    Attributes:
        intervals: Lower and upper bound a label; None where there is none.
        lane: The lane of its marks in each row, 0 the uppermost; series may share one.
        thin: Drawn with a thinner interval, beside the main mark of its lane.
    """

    name: str
    rates: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None]
    colour: str = BLUE
    marker: str = "o"
    filled: bool = True
    lane: int = 0
    thin: bool = False


def model_style(index: int) -> tuple[str, str]:
    """Colour and marker of the model at a position; colours repeat after six models, shapes after twelve."""
    return MODEL_COLOURS[index % len(MODEL_COLOURS)], MODEL_MARKERS[index % len(MODEL_MARKERS)]


def shortened(name: str) -> str:
    """A name that fits into a plot."""
    line = printable(" ".join(name.split()))
    return line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 1]}…"


def plot_rates(name: str, title: str, text: str, labels: Sequence[str], series: Sequence[Series]) -> Plot:
    """Dots with intervals, one row of lanes a label; a label without any rate says so."""
    n_lanes = 1 + max((some.lane for some in series), default=0)
    with _canvas(name, labels, n_lanes, [_legend_entry(some) for some in series]) as (figure, axis):
        for row, label_rates in enumerate(zip(*(some.rates for some in series), strict=True)):
            if not any(rate is not None for rate in label_rates):
                axis.text(50, row, "no rate (0 of 0)", ha="center", va="center", color=MUTED)
        for some in series:
            offset = _lane_offset(some.lane, n_lanes) + (0.07 if some.thin else 0)
            _draw_series(axis, some, offset, interval_width=0.8 if some.thin else 1.6)
        _percent_axis(axis)
        return _drawn(figure, name, title, text)


def plot_before_after(
    name: str, title: str, text: str, labels: Sequence[str], before: Sequence[Series], after: Sequence[Series]
) -> Plot:
    """Two rates a label and model with a line between them: hollow before the rewrite, filled after it."""
    n_lanes = len(before)
    entries = [_legend_entry(some) for some in after]
    entries += [_entry("before (hollow)", MUTED, "o", False), _entry("after (filled)", MUTED, "o", True)]
    with _canvas(name, labels, n_lanes, entries) as (figure, axis):
        for lane, (first, second) in enumerate(zip(before, after, strict=True)):
            offset = _lane_offset(lane, n_lanes)
            for row, (low, high) in enumerate(zip(first.rates, second.rates, strict=True)):
                if low is not None and high is not None:
                    ends = [row + offset - 0.05, row + offset + 0.05]
                    axis.plot([100 * low, 100 * high], ends, color=second.colour, linewidth=1, zorder=1)
            _draw_series(axis, first, offset - 0.05, interval_width=0.8)
            _draw_series(axis, second, offset + 0.05, interval_width=0.8)
        # Above the grid, which has a line there too; below the points.
        axis.axvline(50, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        _percent_axis(axis)
        return _drawn(figure, name, title, text)


def plot_gaps(
    name: str, title: str, text: str, labels: Sequence[str], gaps: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Plot:
    """Histograms of the score gap a label: before the rewrite above the line, after it below; ticks are medians.

    Args:
        gaps: The gaps before and after, in score SDs. What lies beyond the axis is counted in its last bin.
    """
    everything = np.concatenate([values for pair in gaps for values in pair] or [np.zeros(1)])
    reach = float(np.clip(np.quantile(np.abs(everything), 0.99) if len(everything) else 1.0, 0.5, WIDEST_GAP))
    bins = np.linspace(-reach, reach, N_BINS + 1)
    entries = [_entry("before (above the line)", BLUE, "s", True), _entry("after (below)", VERMILION, "s", True)]
    with _canvas(name, labels, 2, entries, axis_label_lines=2) as (figure, axis):
        for row, pair in enumerate(gaps):
            counts = [np.histogram(np.clip(values, -reach, reach), bins)[0].astype(float) for values in pair]
            peak = max((float(some.max()) for some in counts), default=0.0)
            axis.plot([-reach, reach], [row, row], color=MUTED, linewidth=0.5, zorder=3)
            for values, some, colour, direction in zip(pair, counts, (BLUE, VERMILION), (-1, 1), strict=True):
                if peak == 0 or not len(values):
                    continue
                axis.stairs(row + direction * 0.45 * some / peak, bins, baseline=row, fill=True, color=colour)
                median = float(np.clip(np.median(values), -reach, reach))
                axis.plot([median] * 2, [row, row + direction * 0.45], color=INK, linewidth=1.6, zorder=4)
        axis.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=5)
        axis.set_xlim(-reach, reach)
        axis.set_xlabel("score gap, better − other (score SD);\nleft of zero: wrong", color=INK)
        return _drawn(figure, name, title, text)


def plot_shares(
    name: str,
    title: str,
    text: str,
    labels: Sequence[str],
    parts: Sequence[tuple[str, str]],
    counts: Sequence[Sequence[int]],
) -> Plot:
    """Stacked bars to 100 %, one a label, with the counts inside; a label without any count says so.

    Args:
        parts: Name and colour of each part.
        counts: By label, the count of each part.
    """
    with _canvas(name, labels, 1.4, [_entry(part, colour, "s", True) for part, colour in parts]) as (figure, axis):
        for row, values in enumerate(counts):
            total = sum(values)
            if not total:
                axis.text(50, row, "nothing flipped", ha="center", va="center", color=MUTED)
            left = 0.0
            for value, (_, colour) in zip(values, parts, strict=True):
                if not value:
                    continue
                width = 100 * value / total
                axis.barh(row, width, left=left, height=0.72, color=colour, edgecolor=PAPER, linewidth=1)
                if width >= 7:
                    middle = left + width / 2
                    axis.text(middle, row, str(value), ha="center", va="center", color=ON_COLOUR, fontsize=8)
                left += width
        _percent_axis(axis)
        axis.set_xlabel("% of the flips (numbers: pairs)", color=INK)
        return _drawn(figure, name, title, text)


def themed_svg(plot: Plot) -> str:
    """The SVG as it stands inside the page: colours by CSS variable, ids of its own, no prologue.

    The page's style sheet gives every variable a value for light and one for dark; the picture's own colour stays as the
    fallback.
    """
    svg = plot.svg[plot.svg.index("<svg") :]
    # The picture's own style element would apply to the whole page; the page has the rule for pictures alone.
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match.group(1)}{plot.name}-", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _variable(match.group(0)), svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(plot.text)}" ', 1).strip()


def _variable(colour: str) -> str:
    return f"var({CSS_NAMES[colour]}, {colour})" if colour in CSS_NAMES else colour


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _lane_offset(lane: int, n_lanes: int) -> float:
    """Where a lane lies around its label's row, whose lanes fill 0.8 of the row's height."""
    return 0.0 if n_lanes < 2 else 0.72 * (lane / (n_lanes - 1) - 0.5)


def _draw_series(axis: Any, series: Series, offset: float, *, interval_width: float = 1.6) -> None:
    for row, (rate, interval) in enumerate(zip(series.rates, series.intervals, strict=True)):
        if rate is None:
            continue
        if interval is not None:
            bounds = [100 * bound for bound in interval]
            axis.plot(bounds, [row + offset] * 2, color=series.colour, linewidth=interval_width, zorder=2)
        axis.plot(100 * rate, row + offset, **_mark(series.colour, series.marker, series.filled))


def _mark(colour: str, marker: str, filled: bool) -> dict[str, Any]:
    face = colour if filled else PAPER
    return {
        "marker": marker,
        "markersize": 5.5,
        "markerfacecolor": face,
        "markeredgecolor": colour,
        "markeredgewidth": 1.3,
        "linestyle": "none",
        "zorder": 3,
    }


def _entry(name: str, colour: str, marker: str, filled: bool) -> tuple[str, dict[str, Any]]:
    return shortened(name), _mark(colour, marker, filled)


def _legend_entry(series: Series) -> tuple[str, dict[str, Any]]:
    return _entry(series.name, series.colour, series.marker, series.filled)


def _percent_axis(axis: Any) -> None:
    axis.set_xlim(-3, 103)
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.set_xlabel("%", color=INK)


@contextmanager
def _canvas(
    name: str,
    labels: Sequence[str],
    n_lanes: float,
    entries: Sequence[tuple[str, dict[str, Any]]],
    *,
    axis_label_lines: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """A figure with one axis, its margins computed from the labels (a layout engine takes longer than the drawing)."""
    shown = [shortened(label) for label in labels]
    # Two columns where the longest name leaves room for a second one.
    columns = 2 if max((len(text) for text, _ in entries), default=0) <= LONGEST_LABEL and len(entries) > 1 else 1
    legend = 0.1 + LINE * -(-len(entries) // columns)
    rows = max(1, len(labels)) * (0.13 + 0.13 * n_lanes)
    bottom = 0.42 + LINE * (axis_label_lines - 1)
    height = legend + rows + bottom
    left = 0.12 + 0.068 * max((len(label) for label in shown), default=1)
    settings = {
        "svg.hashsalt": name,
        "font.size": FONT_SIZE,
        "font.family": "sans-serif",
        "axes.edgecolor": GRID,
        "xtick.color": MUTED,
        "ytick.color": INK,
        "text.color": INK,
    }
    with plot_settings(**settings):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(figsize=(WIDTH, height))
        axis = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + 0.12) / WIDTH, rows / height))
        axis.set_facecolor("none")
        axis.set_ylim(max(1, len(labels)) - 0.5, -0.5)
        axis.set_yticks(range(len(labels)), shown)
        axis.tick_params(length=0)
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        for row in range(1, len(labels)):
            axis.axhline(row - 0.5, color=GRID, linewidth=0.5, zorder=0)
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
        if entries:
            handles = [Line2D([], [], label=text, **mark) for text, mark in entries]
            figure.legend(
                handles=handles,
                loc="upper left",
                bbox_to_anchor=(0.01, 1 - 0.04 / height),
                ncols=columns,
                frameon=False,
                borderpad=0.1,
                borderaxespad=0,
                labelspacing=0.25,
                handletextpad=0.2,
                columnspacing=1.0,
                fontsize=8.5,
            )
        yield figure, axis


def _drawn(figure: Any, name: str, title: str, text: str) -> Plot:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, facecolor=PAPER)
    figure.savefig(png, format="png", dpi=PNG_DPI, facecolor=PAPER)
    return Plot(name, title, text, svg.getvalue(), png.getvalue())
