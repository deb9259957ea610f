"""Published preference benchmarks: their rows, their subsets, and their figures as their papers define them.

Reads files in the published formats (JSONL, a ``.json`` array, ``.parquet``; for LLMBar also a folder of ``dataset.json`` files,
for RM-Bench one of its domains' files). Writes nothing. A benchmark is one entry of ``BENCHMARKS``: how a row becomes an item,
how many rows each subset has, and which figures are made of the outcomes. An item is a prompt with answers that should win and
answers that should lose.

    python -c "from codes.evaluate.benchmarks import BENCHMARKS; print(*BENCHMARKS)"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from codes.common.errors import ContrastRMError, RecordError
from codes.common.questions import choose_subset
from codes.common.records import (
    Message,
    ReadReport,
    file_sha256,
    id_field,
    iter_rows,
    prompt_field,
    question_field,
    read_rows,
    text_field,
)
from codes.evaluate.benchmark_figures import (
    JUDGEBENCH_CLAUDE_ROWS,
    JUDGEBENCH_SOURCES,
    JUDGEBENCH_SUBSETS,
    LLMBAR_SUBSETS,
    REWARD_BENCH_2_SUBSETS,
    REWARD_BENCH_SUBSETS,
    RM_BENCH_SUBSETS,
    SECTIONS,
    STYLES,
    SUBSET_BY_NAME,
    TIES,
    BenchmarkItem,
    ItemOutcome,
    summarise_judgebench,
    summarise_llmbar,
    summarise_reward_bench,
    summarise_reward_bench_2,
    summarise_rm_bench,
    tie_prompt,
)

REWARD_BENCH = "reward_bench"
# What the rows of the project's own sample name as the model that wrote them, and what their origin is called.
OWN_SAMPLE_MODEL, OWN_SAMPLE = "written-for-contrastrm", "own sample"
# Rows that are looked at to find out a file's format: bad ones may stand first.
N_SNIFFED = 100
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")


ParseItem = Callable[[Path, int, dict[str, Any]], BenchmarkItem]
Summarise = Callable[[Sequence[ItemOutcome]], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Attributes:
        title: What its figures are called where the data are the official ones.
        dataset_id: Where the data are published.
        splits: Of that dataset; the first one has the official rows.
        subsets: Official rows by subset, in the published order.
        parse: Makes an item of (file, line, row); raises ``RecordError``.
        matches: Whether a row with these keys and values is of this format.
        summarise: The figures of outcomes (the module's docstring names them).
        figures: The figures that are shown, in this order: rates with counts, and means over parts.
        totals: Official rows of further splits, of which only the total is published.
    """

    name: str
    title: str
    dataset_id: str
    splits: tuple[str, ...]
    subsets: Mapping[str, int]
    parse: ParseItem
    matches: Callable[[Path, dict[str, Any]], bool]
    summarise: Summarise
    figures: tuple[str, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)


# --- rows ---


def _prompt(path: Path, line: int, row: dict[str, Any]) -> tuple[Message, ...]:
    messages = prompt_field(path, line, row)
    if messages is None:
        raise RecordError(path, line, "prompt", "nothing", "a non-empty text or list of turns")
    return tuple(messages)


def _answers(path: Path, line: int, row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise RecordError(path, line, key, "nothing" if value is None else value, "a non-empty list of texts")
    return tuple(
        text_field(path, line, {f"{key}[{position}]": text}, f"{key}[{position}]", allow_empty=True)
        for position, text in enumerate(value)
    )


def _count_agrees(path: Path, line: int, row: dict[str, Any], key: str, n_found: int) -> None:
    """A count beside a list must be the list's length: where it is not, the row was cut or joined wrongly."""
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or value != n_found):
        raise RecordError(path, line, key, value, f"{n_found}, the number of answers in the row")


def _parse_reward_bench(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
    """A row of RewardBench: ``id, prompt, chosen, rejected, subset``, with ``chosen_model`` where it is known.

    Source: https://huggingface.co/datasets/allenai/reward-bench (dataset card).
    """
    subset = text_field(path, line, row, "subset")
    return BenchmarkItem(
        file=str(path),
        line=line,
        subset=_known_subset(path, line, "subset", subset, REWARD_BENCH_SUBSETS),
        messages=_prompt(path, line, row),
        id=id_field(path, line, row, "id"),
        chosen=(text_field(path, line, row, "chosen", allow_empty=True),),
        rejected=(text_field(path, line, row, "rejected", allow_empty=True),),
        origin=OWN_SAMPLE if row.get("chosen_model") == OWN_SAMPLE_MODEL else "",
    )


def _parse_reward_bench_2(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
    """A row of RewardBench 2: ``id, prompt, chosen: [...], rejected: [...], num_correct, num_incorrect, subset``.

    Source: https://huggingface.co/datasets/allenai/reward-bench-2 (dataset card).
    """
    subset = _known_subset(path, line, "subset", text_field(path, line, row, "subset"), REWARD_BENCH_2_SUBSETS)
    chosen, rejected = _answers(path, line, row, "chosen"), _answers(path, line, row, "rejected")
    _count_agrees(path, line, row, "num_correct", len(chosen))
    _count_agrees(path, line, row, "num_incorrect", len(rejected))
    _count_agrees(path, line, row, "total_completions", len(chosen) + len(rejected))
    name = id_field(path, line, row, "id")
    if subset == TIES:
        tie_prompt(path, line, name, len(chosen))
    elif len(chosen) != 1:
        raise RecordError(path, line, "chosen", f"{len(chosen)} answers", f"one answer (more only in subset {TIES})")
    return BenchmarkItem(str(path), line, name, _prompt(path, line, row), chosen, rejected, subset)


def _parse_rm_bench(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
    """A row of RM-Bench: ``id, prompt, chosen: [3 styles], rejected: [3 styles], domain``.

    The files of single domains may lack ``domain``: then the file's name begins with it.

    Source: https://github.com/THU-KEG/RM-Bench (README, "Dataset Details").
    """
    chosen, rejected = _answers(path, line, row, "chosen"), _answers(path, line, row, "rejected")
    for key, answers in (("chosen", chosen), ("rejected", rejected)):
        if len(answers) != len(STYLES):
            raise RecordError(path, line, key, f"{len(answers)} answers", f"one a style: {', '.join(STYLES)}")
    domain = _rm_bench_domain_of(path) if row.get("domain") is None else text_field(path, line, row, "domain")
    if domain is None:
        raise RecordError(path, line, "domain", "nothing", f"one of {', '.join(RM_BENCH_SUBSETS)}")
    subset = _known_subset(path, line, "domain", domain, RM_BENCH_SUBSETS)
    return BenchmarkItem(
        str(path), line, id_field(path, line, row, "id"), _prompt(path, line, row), chosen, rejected, subset
    )


def _rm_bench_domain_of(path: Path) -> str | None:
    return next((domain for domain in RM_BENCH_SUBSETS if path.name.startswith(domain)), None)


def _parse_llmbar(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
    """A row of LLMBar: ``input, output_1, output_2, label`` (1 or 2). Its subset is the folder of the file.

    Source: https://github.com/princeton-nlp/LLMBar (README, "Data").
    """
    label = row.get("label")
    if isinstance(label, bool) or label not in (1, 2):
        raise RecordError(path, line, "label", "nothing" if label is None else label, "1 or 2")
    answers = [text_field(path, line, row, f"output_{number}", allow_empty=True) for number in (1, 2)]
    better = int(label) - 1
    return BenchmarkItem(
        file=str(path),
        line=line,
        id=f"{path.resolve().parent.name}/{line}",
        messages=({"role": "user", "content": question_field(path, line, row, "input")},),
        chosen=(answers[better],),
        rejected=(answers[1 - better],),
        subset=path.resolve().parent.name,
        chosen_first=better == 0,
    )


def _parse_judgebench(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
    """A row of JudgeBench: ``pair_id, source, question, response_A, response_B, label`` (``A>B`` or ``B>A``).

    Source: https://github.com/ScalerLab/JudgeBench (README, "Data"); its four categories are those of the paper
    (arXiv 2410.12784), read from ``source``.
    """
    label = row.get("label")
    if label not in ("A>B", "B>A"):
        raise RecordError(path, line, "label", "nothing" if label is None else label, "A>B or B>A")
    source = text_field(path, line, row, "source")
    category = next((name for start, name in JUDGEBENCH_SOURCES.items() if source.startswith(start)), None)
    if category is None:
        raise RecordError(path, line, "source", source, f"a source that begins with {', '.join(JUDGEBENCH_SOURCES)}")
    answers = [text_field(path, line, row, f"response_{letter}", allow_empty=True) for letter in "AB"]
    better = 0 if label == "A>B" else 1
    return BenchmarkItem(
        file=str(path),
        line=line,
        id=id_field(path, line, row, "pair_id"),
        messages=({"role": "user", "content": question_field(path, line, row)},),
        chosen=(answers[better],),
        rejected=(answers[1 - better],),
        subset=category,
        chosen_first=better == 0,
        origin="claude" if str(row.get("response_model", "")).startswith("claude") else "gpt",
    )


def _known_subset(path: Path, line: int, key: str, name: str, known: Mapping[str, int]) -> str:
    """A subset's official spelling. An unknown one is no bad row: it would be left out of every figure."""
    found = next((subset for subset in known if subset.lower() == name.lower()), None)
    if found is None:
        raise ContrastRMError(f"{path}:{line}: field {key!r}: unknown subset {name!r}; known: {', '.join(known)}")
    return found


def _is_list(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), list) and row[key] for key in keys)


def _is_reward_bench_2(path: Path, row: dict[str, Any]) -> bool:
    # RM-Bench's files of single domains have a ``subset`` too, of another kind (one of its own domains, or "safety").
    if "subset" not in row or not _is_list(row, "chosen", "rejected") or _is_rm_bench(path, row):
        return False
    return all(isinstance(text, str) for key in ("chosen", "rejected") for text in row[key])


def _is_rm_bench(path: Path, row: dict[str, Any]) -> bool:
    if not _is_list(row, "chosen", "rejected") or not len(row["chosen"]) == len(row["rejected"]) == len(STYLES):
        return False
    return "num_correct" not in row and ("domain" in row or _rm_bench_domain_of(path) is not None)


def _is_llmbar(path: Path, row: dict[str, Any]) -> bool:
    return {"input", "output_1", "output_2"} <= row.keys()


def _is_judgebench(path: Path, row: dict[str, Any]) -> bool:
    return {"response_A", "response_B"} <= row.keys()


def _is_reward_bench(path: Path, row: dict[str, Any]) -> bool:
    return "subset" in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)


# --- the benchmarks ---

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            name=REWARD_BENCH,
            title="RewardBench",
            dataset_id="allenai/reward-bench",
            splits=("filtered",),
            subsets=REWARD_BENCH_SUBSETS,
            parse=_parse_reward_bench,
            matches=_is_reward_bench,
            summarise=summarise_reward_bench,
        ),
        Benchmark(
            name="reward_bench_2",
            title="RewardBench 2",
            dataset_id="allenai/reward-bench-2",
            splits=("test",),
            subsets=REWARD_BENCH_2_SUBSETS,
            parse=_parse_reward_bench_2,
            matches=_is_reward_bench_2,
            summarise=summarise_reward_bench_2,
            figures=("reward_bench_2_score", "best_of_n_accuracy", "best_of_n_credit"),
        ),
        Benchmark(
            name="rm_bench",
            title="RM-Bench",
            dataset_id="THU-KEG/RM-Bench",
            splits=("train",),
            subsets=RM_BENCH_SUBSETS,
            parse=_parse_rm_bench,
            matches=_is_rm_bench,
            summarise=summarise_rm_bench,
            figures=(
                *("rm_bench_score", "easy_accuracy", "normal_accuracy", "hard_accuracy"),
                *("pooled_easy_accuracy", "pooled_normal_accuracy", "pooled_hard_accuracy"),
            ),
        ),
        Benchmark(
            name="llmbar",
            title="LLMBar",
            dataset_id="princeton-nlp/LLMBar",
            splits=(),
            subsets=LLMBAR_SUBSETS,
            parse=_parse_llmbar,
            matches=_is_llmbar,
            summarise=summarise_llmbar,
            figures=("accuracy", "natural_accuracy", "adversarial_accuracy"),
        ),
        Benchmark(
            name="judgebench",
            title="JudgeBench",
            dataset_id="ScalerLab/JudgeBench",
            splits=("gpt", "claude"),
            subsets=JUDGEBENCH_SUBSETS,
            parse=_parse_judgebench,
            matches=_is_judgebench,
            summarise=summarise_judgebench,
            figures=("accuracy",),
            totals={"claude": JUDGEBENCH_CLAUDE_ROWS},
        ),
    )
}


# --- files ---


def detect_format(data_file: str | Path) -> str:
    """The benchmark that a file's rows belong to, by the keys of the first ones.

    Raises:
        ContrastRMError: Missing file, or none of the benchmarks fits.
    """
    first_keys: list[str] = []
    for path in benchmark_files(data_file):
        for _, row in islice(iter_rows(path), N_SNIFFED):
            if isinstance(row, RecordError):
                continue
            matching = [name for name, one in BENCHMARKS.items() if one.matches(path, row)]
            if matching:
                return matching[-1]  # RewardBench's keys, the plainest, come first
            first_keys = first_keys or [str(key)[:30] for key in islice(row, 12)]
    keys = f"the first row has {', '.join(first_keys)}" if first_keys else "no row is a JSON object"
    raise ContrastRMError(
        f"cannot tell the format of {data_file}: {keys}; name it with --format ({', '.join(BENCHMARKS)})"
    )


def benchmark_files(data_file: str | Path) -> list[Path]:
    """The file itself; of a folder, the files of a benchmark in it, in the order of their names.

    Those are every ``dataset.json`` below it (LLMBar's layout), or else the files whose names begin with a domain of RM-Bench
    (``chat_filtered.json``, ...).

    Raises:
        ContrastRMError: There is no such file, or none in the folder.
    """
    path = Path(data_file)
    if path.is_dir():
        files = sorted(path.rglob("dataset.json"))
        files = files or sorted(
            file for file in path.iterdir() if file.suffix in DATA_SUFFIXES and _rm_bench_domain_of(file)
        )
        if not files:
            raise ContrastRMError(
                f"no dataset.json below {path} and no file of an RM-Bench domain in it; give a file with --data_file"
            )
        return files
    if not path.is_file():
        raise ContrastRMError(f"file not found: {path}; check --data_file")
    return [path]


def read_benchmark(
    data_file: str | Path,
    name: str,
    *,
    category: str = "all",
    limit: int = 0,
    seed: int = 42,
    max_bad_rows: int = 0,
) -> tuple[list[BenchmarkItem], list[ReadReport]]:
    """Read a benchmark's rows.

    Args:
        name: One of ``BENCHMARKS``.
        category: A subset, a section of RewardBench, or ``all``.
        limit: At most so many rows of a subset, by a hash of seed and question; 0: all.

    Returns:
        The items in the order of files and rows, and what was read of each file.

    Raises:
        ContrastRMError: Missing file, unknown subset or category, more bad rows than allowed in a file, or no row left.
    """
    if name == REWARD_BENCH and category not in ("all", *SECTIONS):
        raise ContrastRMError(f"unknown category {category!r}; known: all, {', '.join(SECTIONS)}")
    items: list[BenchmarkItem] = []
    reports: list[ReadReport] = []
    first_place: dict[tuple[str, str], str] = {}

    def parse(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
        item = BENCHMARKS[name].parse(path, line, row)
        # Only where the id carries meaning: it ties a prompt to its reference, or a pair to its published verdicts.
        if (item.subset == TIES or name == "judgebench") and "line-" not in item.id:
            place = first_place.setdefault((item.subset if item.subset == TIES else "", item.id), f"{path}:{line}")
            if place != f"{path}:{line}":
                raise RecordError(path, line, "id", item.id, f"an id of its own ({place} has the same)")
        return item

    for path in benchmark_files(data_file):
        rows, report = read_rows(path, parse, max_bad_rows)
        items += rows
        reports.append(report)
    by_subset: dict[str, list[BenchmarkItem]] = {}
    for item in items:
        section = SUBSET_BY_NAME[item.subset].section if name == REWARD_BENCH else item.subset
        if category in ("all", section):
            by_subset.setdefault(item.subset, []).append(item)
    if not by_subset:
        present = ", ".join(dict.fromkeys(item.subset for item in items))
        raise ContrastRMError(f"{data_file} has no row of category {category!r}; it has {present}")
    kept = {
        id(item) for rows in by_subset.values() for item in choose_subset(rows, limit, seed, lambda item: item.question)
    }
    return [item for item in items if id(item) in kept], reports


def describe_source(data_file: str | Path, items: Sequence[BenchmarkItem]) -> dict[str, Any]:
    """Where the rows come from: what the loader noted beside the file, if it is about this very file.

    ``revision_is`` stands in it only where nobody checked that the rows are of that revision; a folder has no note.

    Returns:
        ``{"dataset": …, "revision": …}`` of the official set, ``{"dataset": "own sample"}`` or ``{"dataset":
        None}``.

    Raises:
        ContrastRMError: The note cannot be read.
    """
    if all(item.origin == OWN_SAMPLE for item in items):
        return {"dataset": OWN_SAMPLE, "revision": None}
    note = Path(f"{data_file}.source.json")
    if Path(data_file).is_file() and note.is_file():
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))
            if noted["sha256"] == file_sha256(data_file):
                unchecked = {"revision_is": noted["revision_is"]} if "revision_is" in noted else {}
                return {"dataset": noted["dataset"], "revision": noted["revision"], **unchecked}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ContrastRMError(f"cannot read {note}: {error}; load the data again or delete it") from error
    return {"dataset": None, "revision": None}


def label_of(name: str, source: Mapping[str, Any], complete: bool) -> str:
    """What the figures may be called. Only the complete official set carries the benchmark's name."""
    title = BENCHMARKS[name].title
    if source["dataset"] == OWN_SAMPLE:
        return f"not {title}: the project's own small sample"
    if source["dataset"] != BENCHMARKS[name].dataset_id:
        counts = "with the official number of rows" if complete else "without the official number of rows"
        return f"not {title}: a file of unrecorded origin, {counts}"
    if not complete:
        return f"not {title}: a part of the official rows"
    return f"{title}, from local files whose revision nobody checked" if source.get("revision_is") else title
