"""Tables and plots of the comparisons, from their JSON lines alone.

Rates are medians over the rounds, with the smallest and the largest; ratios are medians of the ratios within each round.
Where every round measured another part of the work, the parts are added up instead: a batch of short texts and one of long
texts differ in rate, and the middle one of a few stands for neither.
Used by ``python -m benchmarks.speed``.
"""

from __future__ import annotations

import io
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.profiling import MATRIX_MULTIPLICATION
from benchmarks.suites import GEMM, PROFILED
from codes.common.records import write_jsonl, write_text
from codes.common.reporting import BLUE, GREY, VERMILION, Section, number, plot_settings, render_markdown

Line = dict[str, Any]
RATES = {"training": "groups_per_second", "scoring": "texts_per_second"}
UNITS = {"training": "groups/s", "scoring": "texts/s"}
DEFAULT = "ours.shared"
# Runs that are no peers.
NOT_COMPARED = (GEMM, PROFILED)
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
    svg, drawn = None, "medians, with the smallest and largest"
    if kind in RATES:
        for scenario in dict.fromkeys(line["scenario"] for line in lines if line["run"] not in NOT_COMPARED):
            sections.append(comparison_section(lines, scenario, peak_tflops))
            sections += profile_section(done, scenario, gemm_gflops(of_scenario(done, scenario), lines[0]["dtype"]))
        drawn = "all parts, with the slowest and the fastest" if any("part" in line for line in done) else drawn
        svg = plot_rates_of(done) if any(line["run"] not in NOT_COMPARED for line in done) else None
    elif kind == "gemm_rate" and done:
        sections.append(gemm_section(done))
    elif done:
        sections += [growth_section(done, way) for way in dict.fromkeys(line["scenario"] for line in done)]
        svg = plot_growth(done)
    if svg is not None:
        sections.append(Section("Plot", image=svg, image_file=f"{name}.svg", image_text=drawn))
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
    mine = [line for line in lines if line["scenario"] == scenario and line["run"] not in NOT_COMPARED]
    kind, dtype = mine[0]["kind"], mine[0]["dtype"]
    by_run = {line["run"]: line for line in mine}
    order = sorted(by_run.values(), key=lambda line: line["position"])
    rates = {run: rounds_of(mine, run) for run in by_run}
    known = baselines(mine)
    # The same texts need the same work, whoever does it.
    useful = next((line["useful_flops"] for line in mine if "useful_flops" in line), None)
    gemm = gemm_gflops(of_scenario(lines, scenario), dtype)
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
    seconds = typical_seconds(done)
    rate = useful / seconds / 1e9 if useful else None
    # Another part has other texts.
    check = done[-1]["losses"][0] if line["kind"] == "training" else mean_of_parts(done)
    return [
        line["label"],
        significant(typical_rate(done)),
        f"{significant(min(found))} to {significant(max(found))}",
        *(number(ratio, 2) for ratio in ratios),
        f"{done[-1]['n_computed_tokens']:,}",
        f"{max(one['peak_bytes'] for one in done) / 2**30:.2f}",
        "–" if rate is None else significant(rate),
        "–" if rate is None or not peak else f"{100 * rate / peak:.0f} %",
        "–" if check is None else number(check, 4),
    ]


def mean_of_parts(lines: Sequence[Line]) -> float | None:
    """Mean score of all texts; None where only some parts of them were scored."""
    parts = {line["part"]: line for line in lines if "part" in line}
    if not parts:
        found: float = lines[-1]["score_mean"]
        return found
    if len(parts) < lines[-1]["parts"]:
        return None
    n_texts = sum(line["part_n_texts"] for line in parts.values())
    return sum(line["score_mean"] * line["part_n_texts"] for line in parts.values()) / n_texts


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
    left_out = [
        name for name in lines[0].get("planned", ()) if name not in {*NOT_COMPARED, *(line["run"] for line in lines)}
    ]
    if left_out:
        notes.append(f"Not run: {', '.join(left_out)}.")
    if "part" in own:
        n_parts = len({line["part"] for line in done})
        notes.append(
            f"{n_parts} of {own['parts']} parts: every round computed other batches, dealt out by a seeded hash, of each "
            "run's own plan of all texts. The seconds of all parts measured, by their share of the floating-point operations, "
            "stand for the whole; from smallest to largest are single parts."
        )
        notes += [text for run in baselines(done) if (text := uncertainty(done, run)) is not None]
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


def profile_section(lines: Sequence[Line], scenario: str, gemm: float | None) -> list[Section]:
    """Where the time of our default goes, the median of the rounds; nothing where no round was profiled.

    Args:
        gemm: GFLOP/s of matrix multiplications alone.
    """
    mine = [line for line in lines if line["scenario"] == scenario and line["run"] == PROFILED]
    if not mine:
        return []
    seconds = {
        kind: statistics.median(line["seconds_by_kind"][kind] for line in mine) for kind in mine[0]["seconds_by_kind"]
    }
    total = sum(seconds.values())
    rows = [[kind, significant(spent), f"{100 * spent / total:.0f} %"] for kind, spent in seconds.items()]
    slowest = ", ".join(f"{one['name']} {significant(one['seconds'])} s" for one in mine[-1]["slowest_operators"])
    notes = [
        "Our default under the profiler, which slows it down a little: every operator's own time.",
        f"Slowest operators of the last round: {slowest}.",
    ]
    # Backward is twice forward; checkpointing computes forward again.
    passes = 3 + mine[0]["gradient_checkpointing"] if mine[0]["kind"] == "training" else 1
    per_token = 2 * mine[0]["n_parameters"] * passes
    reached = statistics.median(
        per_token
        * line.get("part_n_computed_tokens", line["n_computed_tokens"])
        / line["seconds_by_kind"][MATRIX_MULTIPLICATION]
        / 1e9
        for line in mine
    )
    share = f", {100 * reached / gemm:.0f} % of their rate alone" if gemm else ""
    notes.append(f"Matrix multiplications reach {significant(reached)} GFLOP/s{share}.")
    return [Section(f"Profile {scenario}".strip(), notes, ["kind", "seconds", "share"], rows)]


def rounds_of(lines: Iterable[Line], run: str) -> dict[int, float]:
    """Groups or texts a second in every round of a run that did not fail."""
    return {
        number: line[RATES[line["kind"]]] / line["pairs_per_group"] for number, line in by_round(lines, run).items()
    }


def typical_seconds(lines: Sequence[Line]) -> float:
    """Median over the rounds of one run; of parts, their seconds together by their share of all operations together."""
    if "part" not in lines[0]:
        return statistics.median(line["seconds"] for line in lines)
    seconds: float = sum(line["part_seconds"] for line in lines) / sum(line["part_share"] for line in lines)
    return seconds


def typical_rate(lines: Sequence[Line]) -> float:
    """Groups or texts a second of one run: the median over the rounds, or of all its parts together."""
    rates = [line[RATES[line["kind"]]] / line["pairs_per_group"] for line in lines]
    if "part" not in lines[0]:
        return statistics.median(rates)
    # What one part says of all texts, said by all parts.
    rate: float = rates[0] * lines[0]["seconds"] / typical_seconds(lines)
    return rate


def times_faster(lines: Sequence[Line], run: str, baseline: str) -> float | None:
    """How many times faster a run is than another, over the rounds that both have; None where there is no such round."""
    mine, theirs = by_round(lines, run), by_round(lines, baseline)
    shared = sorted(mine.keys() & theirs.keys())
    if not shared or "part" not in mine[shared[0]]:
        return ratio_within_rounds(rounds_of(lines, run), rounds_of(lines, baseline))
    return typical_seconds([theirs[one] for one in shared]) / typical_seconds([mine[one] for one in shared])


def uncertainty(lines: Sequence[Line], baseline: str) -> str | None:
    """How far chance moves the ratio of our default to a baseline, by drawing the measured rounds again; None for one round."""
    rounds = sorted(by_round(lines, DEFAULT).keys() & by_round(lines, baseline).keys())
    if len(rounds) < 2:
        return None
    chance = random.Random(0)
    mine, theirs = by_round(lines, DEFAULT), by_round(lines, baseline)
    found = []
    for _ in range(10_000):
        drawn = chance.choices(rounds, k=len(rounds))
        found.append(typical_seconds([theirs[one] for one in drawn]) / typical_seconds([mine[one] for one in drawn]))
    cuts = statistics.quantiles(found, n=40, method="inclusive")
    return (
        f"Our default against {baseline}: with the measured rounds drawn again with replacement, 95 % of the ratios lie "
        f"between {cuts[0]:.2f} and {cuts[-1]:.2f}."
    )


def by_round(lines: Iterable[Line], run: str) -> dict[int, Line]:
    """The lines of a run that did not fail."""
    return {line["round"]: line for line in lines if line["run"] == run and "failed" not in line}


def ratio_within_rounds(rates: dict[int, float], baseline: dict[int, float]) -> float | None:
    """Median over the rounds that both have of how many times faster it was."""
    shared = rates.keys() & baseline.keys()
    return statistics.median(rates[one] / baseline[one] for one in shared) if shared else None


def of_scenario(lines: Iterable[Line], scenario: str) -> list[Line]:
    """The lines of a scenario, and those that were measured once for several."""
    return [line for line in lines if scenario.startswith(line["scenario"])]


def gemm_gflops(lines: Iterable[Line], dtype: str) -> float | None:
    """Median over the rounds of the best measured rate."""
    best = [
        max(entry["layer_gflops"] for entry in line["rates"] if entry["dtype"] == dtype)
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


def growth_section(lines: Sequence[Line], way: str) -> Section:
    """Seconds of a group, packed and padded, for every point."""
    rows = []
    for point, packed, padded in growth_points([line for line in lines if line["scenario"] == way]):
        rows.append(
            [
                f"{point['series']}: {grown(point)}",
                f"{1000 * packed:,.1f}",
                f"{1000 * padded:,.1f}",
                f"{padded / packed:.2f}",
                f"{point['ceiling']:.2f}",
            ]
        )
    notes = [
        "Milliseconds of a group, medians over the rounds. All answers of a series have the same length: next to nothing is "
        "padding. The last column is the ratio of the tokens."
    ]
    header = ["what grows", "packed, shared", "padded", "times faster", "fewer tokens"]
    return Section(way, notes, header, rows)


def growth_points(lines: Sequence[Line]) -> list[tuple[Line, float, float]]:
    """Every point with its median seconds of a group, packed and padded."""
    found = []
    for position, point in enumerate(lines[0]["points"]):
        packed, padded = (
            statistics.median(line["points"][position][f"{name}_seconds_per_group"] for line in lines)
            for name in ("packed", "padded")
        )
        found.append((point, packed, padded))
    return found


def grown(point: Line) -> int:
    """What a point's series lets grow."""
    key = {"answers of a group": "answers", "tokens of the prompt": "prompt_tokens", "groups of four": "n_groups"}
    return int(point[key[point["series"]]])


def significant(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_rates_of(lines: Sequence[Line]) -> str:
    """Bars of the medians with the smallest and largest rate; one panel a scenario. SVG text."""
    lines = [line for line in lines if line["run"] not in NOT_COMPARED]
    scenarios = list(dict.fromkeys(line["scenario"] for line in lines))

    def draw(axes: Sequence[Any]) -> None:
        for axis, scenario in zip(axes, scenarios, strict=False):
            mine = [line for line in lines if line["scenario"] == scenario]
            labels = {
                line["run"]: line["label"] for line in sorted(mine, key=lambda line: line["position"], reverse=True)
            }
            for row, run in enumerate(labels):
                found = list(rounds_of(mine, run).values())
                middle = typical_rate(list(by_round(mine, run).values()))
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


def plot_growth(lines: Sequence[Line]) -> str:
    """Milliseconds of a group along each series, packed and padded. SVG text."""
    ways = list(dict.fromkeys(line["scenario"] for line in lines))
    curves = {way: growth_points([line for line in lines if line["scenario"] == way]) for way in ways}
    panels = [(way, series) for way in ways for series in dict.fromkeys(point["series"] for point, _, _ in curves[way])]

    def draw(axes: Sequence[Any]) -> None:
        for axis, (way, series) in zip(axes, panels, strict=False):
            mine = [entry for entry in curves[way] if entry[0]["series"] == series]
            places = [grown(point) for point, _, _ in mine]
            axis.plot(places, [1000 * padded for _, _, padded in mine], color=GREY, marker="o", label="padded")
            axis.plot(places, [1000 * packed for _, packed, _ in mine], color=BLUE, marker="o", label="packed, shared")
            fair = [1000 * padded / point["ceiling"] for point, _, padded in mine]
            axis.plot(places, fair, color=VERMILION, linestyle=":", label="padded, by the tokens saved")
            axis.set_xlabel(series)
            axis.set_ylabel("ms a group")
            axis.set_ylim(bottom=0)
            axis.set_title(way)
            axis.legend()

    return plot_panels(draw, len(panels), columns=3, width=4.4, height=3.4)


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
