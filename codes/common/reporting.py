"""How results look: number formats, tables, one kind of plot, and run metadata.

Reads nothing but the installed versions and the git commit; what it returns is text, written by the caller.

    python -c "from codes.common.reporting import run_metadata; print(run_metadata())"
"""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import re
import runpy
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPORTED_PACKAGES = ("transformers", "tokenizers", "accelerate", "numpy", "scipy", "statsmodels")

# Okabe and Ito's palette: told apart with every common colour vision deficiency.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"

# Control characters and lone surrogates, which no document may hold, and those that turn the reading direction of what stands
# around them: embeddings, overrides and isolates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# What Markdown reads as more than text. An interval such as [21.4, 24.8] is none of it, nor is the mark in "< 0.001".
_MARKUP = re.compile(
    r"(?P<interval>\[[-+–\d., ]*\](?![(\[:]))"
    r"|[\\`*|~$\[\]]"  # code, emphasis, columns, mathematics, links
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis: an underscore at the edge of a word
    r"|<(?=[A-Za-z/!?])|&(?=\#?\w+;)"  # HTML
    r"|^[#>]|^[-+=](?=[-+=\s]|$)"  # headings, quotations, lists
)
_LIST_NUMBER = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is read first, the small print beside it, and the number that it is sorted by.

    As text it is both: ``23.0 % (552/2397) [21.4, 24.8]``.
    """

    value: str
    detail: str = ""
    sort: float | None = None

    def __str__(self) -> str:
        return f"{self.value} {self.detail}".strip()


Row = Sequence[str | Cell]


@dataclass(frozen=True)
class Section:
    """One section of a report: paragraphs, then a table, then a picture (SVG text and its file name)."""

    title: str
    paragraphs: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Row] = field(default_factory=list)
    image: str | None = None
    image_file: str = ""
    image_text: str = ""


def percent(value: float | None, digits: int = 1) -> str:
    """A rate as a percentage; a rate that does not exist as a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def percent_interval(bounds: Sequence[float] | None) -> str:
    """An interval in percent."""
    return "[–]" if bounds is None else f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def rate_cell(fields: Mapping[str, Any], name: str, *, counts: bool = True) -> str:
    """One rate of a summary with what it comes from: ``23.0 % (552/2397) [21.4, 24.8]``."""
    return str(rate(fields, name, counts=counts))


def rate(fields: Mapping[str, Any], name: str, *, counts: bool = True) -> Cell:
    """``rate_cell`` in its parts, sortable by the rate. A rate that the summary does not have is a dash that says so."""
    if name not in fields:
        return Cell("–", "(not in this summary)")
    if fields[f"{name}_count"] is None:
        return Cell("–", "(needs scores)")  # a judge gives verdicts only
    shown = f"({fields[f'{name}_count']}/{fields[f'{name}_total']})" if counts else ""
    bounds = percent_interval(fields.get(f"{name}_ci"))
    return Cell(percent(fields[name]), f"{shown} {bounds}".strip(), fields[name])


def number(value: float | None, digits: int = 3) -> str:
    """A plain number; one that does not exist as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """A p value, never shown as zero."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def printable(text: str) -> str:
    """Text without the characters that no document may hold or that turn the reading direction: each becomes U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def markdown_text(text: str) -> str:
    """Text that others chose (a model's name, a path, an id) as one line of Markdown that shows it and does nothing else."""
    line = _MARKUP.sub(_escaped, printable(" ".join(text.split())))
    return _LIST_NUMBER.sub(r"\1\\\2", line)


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found["interval"] else f"\\{found[0]}"


def text_table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns padded with blanks: the first to the left, the others to the right."""
    table = [[printable(" ".join(str(cell).splitlines())) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A GitHub table; a cell is text (``markdown_text``) and no markup."""
    lines = [_markdown_row(header), "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |"]
    return "\n".join(lines + [_markdown_row(row) for row in rows])


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(markdown_text(str(cell)) for cell in cells) + " |"


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; pictures are linked by file name."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        if section.header:
            parts.append(markdown_table(section.header, section.rows))
        if section.image:
            parts.append(f"![{section.image_text}]({section.image_file})")
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Panel:
    """One panel of ``plot_rates``: per label a rate in [0, 1] and its interval; None where there is none."""

    title: str
    rates: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None]
    colour: str = BLUE


@contextmanager
def plot_settings(**settings: Any) -> Iterator[None]:
    """Settings of every plot: a name is text and never mathematics, the same input gives the same bytes.

    Draw on a ``matplotlib.figure.Figure``, which has a canvas of its own: no backend is asked for, whatever the environment
    names. matplotlib itself refuses to be imported where ``MPLBACKEND`` is a name that it does not know.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    usual = {"svg.hashsalt": "contrastrm", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context({**usual, "text.parse_math": False, "text.usetex": False, **settings}):
        yield


def plot_rates(labels: Sequence[str], panels: Sequence[Panel]) -> str:
    """Dots with intervals, one row a label, panels side by side on the same rows.

    Returns:
        SVG text; the same input gives the same text.
    """
    with plot_settings():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2 * len(panels) + 1.2, 0.36 * len(labels) + 1.3))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            _draw_panel(axis, panel)
        axes[0][0].set_yticks(range(len(labels)), [printable(label) for label in labels])
        axes[0][0].invert_yaxis()
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_panel(axis: Any, panel: Panel) -> None:
    for row, (rate, interval) in enumerate(zip(panel.rates, panel.intervals, strict=True)):
        if interval is not None:
            axis.plot([100 * bound for bound in interval], [row, row], color=panel.colour, linewidth=2)
        if rate is not None:
            axis.plot(100 * rate, row, marker="o", color=panel.colour, markersize=6)
        else:
            axis.text(50, row, "no rate (0/0)", ha="center", va="center", color=GREY)
    axis.set_title(panel.title)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("%")
    axis.grid(axis="x", color="#dddddd")


def run_metadata() -> dict[str, Any]:
    """When and with what a result was made: time, platform, versions, git commit."""
    commit, changed = git_state(Path(__file__).resolve().parents[2])
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_uncommitted_changes": changed,
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a score or a statistic, where installed."""
    versions = {"python": platform.python_version()}
    if torch_version := _torch_version():
        versions["torch"] = torch_version
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _torch_version() -> str | None:
    """``torch.__version__`` without the seconds of its import. The package's metadata may leave the build (``+cu130``) out."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"])


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit and whether tracked files differ from it; (None, None) outside a git checkout."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the commit is then unknown, which is what None says
    return done.stdout.strip() if done.returncode == 0 else None
