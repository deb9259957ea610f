"""Tables and plots of the comparisons, from their JSON lines alone.

Rates are medians over the rounds, with the smallest and the largest; ratios are medians of the ratios within each round.
Used by ``python -m benchmarks.speed``.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites import DTYPE, GEMM
from codes.common.records import write_jsonl, write_text
from codes.common.reporting import BLUE, GREY, Section, number, plot_settings, render_markdown

Line = dict[str, Any]
RATES = {"training": "groups_per_second", "scoring": "texts_per_second"}
UNITS = {"training": "groups/s", "scoring": "texts/s"}
# How the names of the runs begin that the tables give ratios to.
BASELINES = ("original_loop", "pipeline", "sorted_padded", "trl")
# A busy machine slows all peers down, but not all alike.
QUIET_LOAD = 1.5


def write_report(lines: Sequence[Line], results_dir: str | Path, *, peak_tflops: float | None = None) -> Path:
    """Write the table, the plot and the lines of one session.

    Args:
        lines: Of one suite and session.
        peak_tflops: The device's peak, for the last column; None compares with the rate measured beside the peers.

    Returns:
        The table's path.
    """
    lines = latest_of_each(lines)
    name, kind = lines[0]["suite"], lines[0]["kind"]
    folder = Path(results_dir)
    done = [line for line in lines if "failed" not in line]
    sections = [Section("What was run", conditions(lines))]
    svg = None
    if kind in RATES:
        for scenario in dict.fromkeys(line["scenario"] for line in lines if line["run"] != GEMM):
            sections.append(comparison_section(lines, scenario, peak_tflops))
        svg = plot_rates_of(done) if any(line["run"] != GEMM for line in done) else None
    elif kind == "gemm_rate" and done:
        sections.append(gemm_section(done))
    if svg is not None:
        sections.append(
            Section("Plot", image=svg, image_file=f"{name}.svg", image_text="medians, with the smallest and largest")
        )
        write_text(folder / f"{name}.svg", svg)
    table = folder / f"{name}.md"
    write_text(table, render_markdown(lines[0]["title"], sections))
    write_jsonl(folder / f"{name}.jsonl", lines)
    return table


def latest_of_each(lines: Sequence[Line]) -> list[Line]:
    """One line for each run and round, in the order of the suite: a run that failed and was made again counts once."""
    latest = {(line["position"], line["round"]): line for line in lines}
    return [latest[key] for key in sorted(latest, key=lambda key: (key[1], key[0]))]


def conditions(lines: Sequence[Line]) -> list[str]:
    """What the reader must know to judge the numbers."""
    done = [line for line in lines if "failed" not in line]
    if not done:
        return ["Not measured: every run failed."]
    last = done[-1]
    machine, versions = last["machine"], last["versions"]
    where = ", ".join(machine["gpus"]) if last["device"].startswith("cuda") else machine["cpu"]
    loads = [line["machine"]["load_average"] for line in done]
    busy = " The machine was not quiet: read the spread first." if max(loads) > machine["threads"] + QUIET_LOAD else ""
    changed = " with uncommitted changes" if any(line["git_uncommitted_changes"] for line in done) else ""
    model = next((line for line in done if "weight_hash" in line), None)
    texts = [
        f"{where}, {machine['threads']} threads, {machine['memory_bytes'] / 2**30:.0f} GiB; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; commit {last['git_commit']}{changed}.",
        f"{len({line['round'] for line in done})} rounds from {min(line['created_utc'] for line in done)} to "
        f"{max(line['created_utc'] for line in done)}; load average after a run {min(loads):.1f} to {max(loads):.1f}.{busy}",
    ]
    if model is not None:
        texts.insert(0, f"Model: {model['n_parameters'] / 1e6:.0f} M parameters without embeddings.")
    trl = next((line["trl_version"] for line in done if "trl_version" in line), None)
    return texts + ([f"TRL {trl}."] if trl else [])


def comparison_section(lines: Sequence[Line], scenario: str, peak_tflops: float | None) -> Section:
    """One table: a row for each peer of a scenario."""
    mine = [line for line in lines if line["scenario"] == scenario and line["run"] != GEMM]
    kind = mine[0]["kind"]
    by_run = {line["run"]: line for line in mine}
    order = sorted(by_run.values(), key=lambda line: line["position"])
    rates = {run: rounds_of(mine, run) for run in by_run}
    known = baselines(mine)
    # The same texts need the same work, whoever does it.
    useful = next((line["useful_flops"] for line in mine if "useful_flops" in line), None)
    gemm = gemm_gflops(of_scenario(lines, scenario))
    peak = 1000 * peak_tflops if peak_tflops is not None else gemm
    check = "first loss" if kind == "training" else "mean score"
    header = ["run", UNITS[kind], "min to max", *(f"× {name}" for name in known), "computed tokens", "peak GiB"]
    header += ["useful GFLOP/s", "of the peak" if peak_tflops is not None else "of matrix multiplication", check]
    rows = [comparison_row(line, mine, rates, known, useful, peak) for line in order]
    return Section(scenario or "Result", comparison_notes(mine, useful, gemm, peak_tflops), header, rows)


def baselines(lines: Iterable[Line]) -> list[str]:
    """The runs that the others are compared with, as far as they came to an end."""
    done = sorted((line for line in lines if "failed" not in line), key=lambda line: line["position"])
    return list(dict.fromkeys(line["run"] for line in done if line["run"].startswith(BASELINES)))


def comparison_row(
    line: Line,
    lines: Sequence[Line],
    rates: dict[str, dict[int, float]],
    compared_with: Sequence[str],
    useful: int | None,
    peak: float | None,
) -> list[str]:
    """A run's cells."""
    run = line["run"]
    found = list(rates[run].values())
    if not found:
        return [line["label"], "not measured", line["failed"], *[""] * (len(compared_with) + 5)]
    done = [one for one in lines if one["run"] == run and "failed" not in one]
    ratios = [times_faster(lines, run, name) for name in compared_with]
    seconds = statistics.median(one["seconds"] for one in done)
    rate = useful / seconds / 1e9 if useful else None
    check = done[-1]["losses"][0] if line["kind"] == "training" else done[-1]["score_mean"]
    return [
        line["label"],
        significant(statistics.median(found)),
        f"{significant(min(found))} to {significant(max(found))}",
        *(number(ratio, 2) for ratio in ratios),
        f"{done[-1]['n_computed_tokens']:,}",
        f"{max(one['peak_bytes'] for one in done) / 2**30:.2f}",
        "–" if rate is None else significant(rate),
        "–" if rate is None or not peak else f"{100 * rate / peak:.0f} %",
        number(check, 4),
    ]


def comparison_notes(
    lines: Sequence[Line], useful: int | None, gemm: float | None, peak_tflops: float | None
) -> list[str]:
    """What was computed on, and what the last columns are measured against."""
    done = [line for line in lines if "failed" not in line]
    if not done:
        return []
    # TRL may see a group as several pairs: its own counts are not the suite's.
    own = next((line for line in done if line["pairs_per_group"] == 1), done[0])
    if own["kind"] == "training":
        what = (
            f"{own['n_groups']} groups with {own['n_answers']} answers, {own['n_tokens']:,} tokens in the timed steps of "
            f"{own['groups_per_step']} groups, learning rate {own['learning_rate']:g}, gradient checkpointing "
            f"{'on' if own['gradient_checkpointing'] else 'off'}."
        )
    else:
        files = ", ".join(f"{file} {n}" for file, n in own["rows"].items())
        what = (
            f"{own['n_texts']:,} texts ({own['n_distinct']:,} distinct) with {own['n_tokens']:,} tokens, "
            f"{own['n_questions']} questions; rows: {files}."
        )
    notes = [what]
    left_out = [name for name in lines[0].get("planned", ()) if name not in {GEMM, *(line["run"] for line in lines)}]
    if left_out:
        notes.append(f"Not run: {', '.join(left_out)}.")
    compiled = [line["label"] for line in done if line.get("n_compiled_while_timed")]
    if compiled:
        notes.append(
            f"Kernels were compiled in the timed part of {', '.join(dict.fromkeys(compiled))}: read the best round."
        )
    if useful is not None:
        notes.append(
            f"Useful work: {useful / 1e9:,.0f} GFLOP (every token of the prefix trees once), for all runs alike."
        )
    if peak_tflops is not None:
        notes.append(f"Peak as given: {peak_tflops:g} TFLOP/s.")
    if gemm is not None:
        notes.append(f"Matrix multiplication at the model's shapes, measured in the same rounds: {gemm:,.0f} GFLOP/s.")
    return notes


def rounds_of(lines: Iterable[Line], run: str) -> dict[int, float]:
    """Groups or texts a second in every round of a run that did not fail."""
    return {
        number: line[RATES[line["kind"]]] / line["pairs_per_group"] for number, line in by_round(lines, run).items()
    }


def times_faster(lines: Sequence[Line], run: str, baseline: str) -> float | None:
    """How many times faster a run is than another: the median over the rounds that both have; None where there is none."""
    rates, baseline_rates = rounds_of(lines, run), rounds_of(lines, baseline)
    shared = rates.keys() & baseline_rates.keys()
    return statistics.median(rates[one] / baseline_rates[one] for one in shared) if shared else None


def by_round(lines: Iterable[Line], run: str) -> dict[int, Line]:
    """The lines of a run that did not fail."""
    return {line["round"]: line for line in lines if line["run"] == run and "failed" not in line}


def of_scenario(lines: Iterable[Line], scenario: str) -> list[Line]:
    """The lines of a scenario, and those that were measured once for several."""
    return [line for line in lines if scenario.startswith(line["scenario"])]


def gemm_gflops(lines: Iterable[Line]) -> float | None:
    """Median over the rounds of the best measured rate."""
    best = [
        max(entry["layer_gflops"] for entry in line["rates"] if entry["dtype"] == DTYPE)
        for line in lines
        if line["run"] == GEMM and "failed" not in line
    ]
    return statistics.median(best) if best else None


def gemm_section(lines: Sequence[Line]) -> Section:
    """Rates of the matrix multiplications of a block."""
    cells: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        for entry in line["rates"]:
            cells.setdefault((entry["dtype"], entry["tokens"]), []).append(entry["layer_gflops"])
    rows = [
        [f"{dtype}, {tokens} tokens", significant(statistics.median(found)), f"{min(found):,.0f} to {max(found):,.0f}"]
        for (dtype, tokens), found in cells.items()
    ]
    return Section("Result", ["All linear layers of a block together."], ["", "GFLOP/s", "min to max"], rows)


def significant(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_rates_of(lines: Sequence[Line]) -> str:
    """Bars of the medians with the smallest and largest rate; one panel a scenario. SVG text."""
    lines = [line for line in lines if line["run"] != GEMM]
    scenarios = list(dict.fromkeys(line["scenario"] for line in lines))

    def draw(axes: Sequence[Any]) -> None:
        for axis, scenario in zip(axes, scenarios, strict=False):
            mine = [line for line in lines if line["scenario"] == scenario]
            labels = {
                line["run"]: line["label"] for line in sorted(mine, key=lambda line: line["position"], reverse=True)
            }
            for row, run in enumerate(labels):
                found = list(rounds_of(mine, run).values())
                middle = statistics.median(found)
                colour = BLUE if run.startswith("ours") else GREY
                axis.barh(row, middle, color=colour, height=0.7)
                spread = [[middle - min(found)], [max(found) - middle]]
                axis.errorbar(middle, row, xerr=spread, color="black", capsize=3, linewidth=1)
            axis.set_yticks(range(len(labels)), list(labels.values()))
            axis.set_title(scenario)
            axis.set_xlabel(UNITS[mine[0]["kind"]])

    heights = [len({line["run"] for line in lines if line["scenario"] == scenario}) for scenario in scenarios]
    return plot_panels(
        draw, len(scenarios), columns=min(2, len(scenarios)), width=8.5, height=0.36 * max(heights) + 1.2
    )


def plot_panels(draw: Callable[[Sequence[Any]], None], n: int, *, columns: int, width: float, height: float) -> str:
    """Panels side by side, drawn by ``draw``; the same input gives the same SVG text."""
    with plot_settings():
        from matplotlib.figure import Figure

        n_rows = -(-n // columns)
        figure = Figure(figsize=(width * columns, height * n_rows))
        axes = figure.subplots(n_rows, columns, squeeze=False)
        for unused in axes.flat[n:]:
            unused.set_visible(False)
        draw(axes.flat[:n])
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
