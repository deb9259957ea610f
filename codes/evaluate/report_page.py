"""The page of the report: parts made of text, plots and tables, as one HTML file and as Markdown.

Reads the templates beside this module (``templates/report.html.j2``, ``report.css``, ``report.js``). Writes
nothing: it returns text. Every value is escaped on its way into the page: model answers may hold markup, and the
page's own policy lets no other script run and nothing be fetched.

    python -m pytest tests/test_report.py -k page
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from codes.common.reporting import Cell, Row, markdown_table, markdown_text, printable
from codes.evaluate.report_pairs import TurnedPair
from codes.evaluate.report_plots import Plot, themed_svg

TEMPLATES = Path(__file__).resolve().parent / "templates"
# Characters of a question that a row of the table of pairs shows; the opened row has the rest.
SHOWN_QUESTION = 160
# Rows of a table that stands open on the page.
LONGEST_OPEN_TABLE = 24
NO_FIGURE = "–"
NO_FIGURE_NOTE = (
    "–: there is no such figure. (0/0): nothing to take a rate of, for BSR: no pair was right before the rewrite. "
    "[–]: no interval, there is no spread to take one from."
)


@dataclass(frozen=True)
class Table:
    """A table with its caption; sorted by any column in the page."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    # How many columns from the left name the row.
    n_names: int = 1
    # Whether a phone shows each row as a list of its cells instead of a table to be moved sideways.
    as_cards: bool = False

    @property
    def is_long(self) -> bool:
        """Whether the page shows its caption alone until the reader opens it (on paper it is open)."""
        return len(self.rows) > LONGEST_OPEN_TABLE

    @property
    def notes(self) -> list[str]:
        """What the reader must know to read the cells."""
        cells = [as_cell(cell) for row in self.rows for cell in row]
        return [NO_FIGURE_NOTE] if any(cell.value == NO_FIGURE or "[–]" in cell.detail for cell in cells) else []


@dataclass(frozen=True)
class Figure:
    """A plot and what stands under it."""

    plot: Plot
    caption: str


@dataclass
class Part:
    """One part of the page. ``folded``: closed until the reader opens it."""

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


@dataclass(frozen=True)
class PairView:
    """The pairs that a bias turned round: those on the page, and how many there are."""

    models: Sequence[str]
    pairs: Sequence[TurnedPair]
    n_turned: int
    notes: Sequence[str] = ()
    file_name: str = ""

    @property
    def biases(self) -> list[str]:
        """Biases of the pairs on the page."""
        return list(dict.fromkeys(pair.bias for pair in self.pairs))

    @property
    def summary(self) -> str:
        """How many are on the page."""
        return f"{len(self.pairs)} of {self.n_turned} shown"


@dataclass
class Page:
    """The whole report. ``notes``: what is missing or not comparable, and why."""

    title: str
    lead: str
    models: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    parts: list[Part] = field(default_factory=list)
    pairs: PairView | None = None


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_QUESTION else f"{line[: SHOWN_QUESTION - 1]}…"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals |= {"as_cell": as_cell, "excerpt": excerpt}
    # Text of this project's own making: the SVG escapes its labels itself.
    environment.filters["svg"] = lambda plot: Markup(printable(themed_svg(plot)))
    return environment


def as_cell(cell: str | Cell) -> Cell:
    """A cell as value and small print; plain text is all value."""
    return cell if isinstance(cell, Cell) else Cell(cell)


def render_html(page: Page) -> str:
    """The page as one file that fetches nothing."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values: dict[str, Any] = {"page": page, "style": Markup(style), "script": Markup(script), "script_digest": digest}
    return _environment().get_template("report.html.j2").render(values)


def render_markdown(page: Page) -> str:
    """The page as Markdown: every table and note; plots are linked by file name, texts of pairs left to the page."""
    text = markdown_text  # names of models, paths and labels of data stand in all of it
    blocks = [f"# {text(page.title)}", text(page.lead)]
    if len(page.models) > 1:
        blocks.append("\n".join(f"- {text(name)}: {text(what)}" for name, what in page.models))
    if page.notes:
        blocks.append("\n".join(f"- Note: {text(note)}" for note in page.notes))
    for part in page.parts:
        blocks += [f"## {part.title}", *map(text, part.paragraphs)]
        for figure in part.figures:
            blocks += [f"![{text(figure.plot.text)}]({figure.plot.name}.png)", f"*{text(figure.caption)}*"]
        for table in part.tables:
            blocks += [f"**{text(table.caption)}**", markdown_table(table.header, table.rows), *map(text, table.notes)]
    if page.pairs is not None:
        view = page.pairs
        found = f"{view.n_turned} pairs that at least one model was turned round on, listed in {view.file_name}."
        blocks += ["## Pairs that turned", f"{found} report.html shows {len(view.pairs)} of them with their texts."]
        blocks += map(text, view.notes)
    return "\n\n".join(blocks) + "\n"
