"""Published preference benchmarks besides RewardBench: their files become one kind of item.

Reads files in the published formats (JSONL, a ``.json`` array, ``.parquet``; for LLMBar also a folder of
``dataset.json`` files). Writes nothing. An item is a prompt with answers that should win and answers that
should lose; what the figures of a benchmark are, ``codes.evaluate.format_metrics`` says.

    python -c "from codes.evaluate.formats import FORMATS; print(*FORMATS)"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import (
    Message,
    ReadReport,
    id_field,
    iter_rows,
    messages_to_text,
    prompt_field,
    question_field,
    read_rows,
    text_field,
)

REWARD_BENCH = "reward_bench"
TIES = "Ties"
# Rows that are looked at to find out a file's format: bad ones may stand first.
N_SNIFFED = 100
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
# Chosen and rejected answers of an RM-Bench row, by style: concise, detailed plain text, detailed Markdown.
STYLES = ("concise", "detailed_plain", "detailed_markdown")


@dataclass(frozen=True)
class BenchmarkItem:
    """One row of a benchmark, whatever its format was.

    Attributes:
        line: Line (or Parquet row) in ``file``.
        messages: The prompt as chat turns.
        chosen: Answers that should win: several in the Ties subset of RewardBench 2 and, one a style, in RM-Bench.
        rejected: Answers that should lose.
        subset: The part of the benchmark that it belongs to.
        chosen_first: Whether the file shows the better answer first, where it shows a pair.
        split: The published split, where the row says which.
    """

    file: str
    line: int
    id: str
    messages: tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    chosen_first: bool | None = None
    split: str = ""

    @property
    def question(self) -> str:
        """The prompt as one text."""
        return messages_to_text(list(self.messages))


ParseItem = Callable[[Path, int, dict[str, Any]], BenchmarkItem]


@dataclass(frozen=True)
class BenchmarkFormat:
    """A published format.

    Attributes:
        title: What its figures are called where the data are the official ones.
        dataset_id: Where the data are published.
        splits: Of that dataset; the first one has the official rows.
        subsets: Official rows by subset, in the published order.
        totals: Official rows of further splits, of which only the total is published.
        parse: Makes an item of (file, line, row); raises ``RecordError``.
        matches: Whether a row with these keys and values is of this format.
    """

    name: str
    title: str
    dataset_id: str
    splits: tuple[str, ...]
    subsets: Mapping[str, int]
    parse: ParseItem
    matches: Callable[[Path, dict[str, Any]], bool]
    totals: Mapping[str, int] = field(default_factory=dict)

    def official_rows(self, items: Sequence[BenchmarkItem]) -> dict[str, int]:
        """Official rows by subset of the split that the items are of.

        Where only the total of the split is published, and the items are as many, each subset has as many as it should.
        """
        splits = {item.split for item in items}
        if len(splits) == 1 and len(items) == self.totals.get(next(iter(splits))):
            counts = Counter(item.subset for item in items)
            return {name: counts[name] for name in self.subsets}
        return dict(self.subsets)


# --- single rows ---


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


def tie_prompt(path: str | Path, line: int, name: str, n_chosen: int) -> tuple[str, int]:
    """Kind and number in the id of a row of the Ties subset, ``ref:7`` or ``tied:7``.

    A reference prompt has one correct answer, the tied prompt of the same number several.

    Raises:
        RecordError: The id has another form, or another number of correct answers than its kind.
    """
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not (number.isascii() and number.isdigit()):
        raise RecordError(path, line, "id", name, f"ref:NUMBER or tied:NUMBER in subset {TIES}")
    if (n_chosen > 1) != (kind == "tied"):
        allowed = "one answer for a ref prompt, several for a tied one"
        raise RecordError(path, line, "chosen", f"{n_chosen} answers, id {name}", allowed)
    return kind, int(number)


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
        split="claude" if str(row.get("response_model", "")).startswith("claude") else "gpt",
    )


def _known_subset(path: Path, line: int, key: str, name: str, known: Mapping[str, int]) -> str:
    """A subset's official spelling. An unknown one is no bad row: it would be left out of every figure."""
    found = next((subset for subset in known if subset.lower() == name.lower()), None)
    if found is None:
        raise ContrastRMError(f"{path}:{line}: field {key!r}: unknown subset {name!r}; known: {', '.join(known)}")
    return found


# --- the formats ---

# Rows by subset; 1,865 in all. Source: the dataset card and arXiv 2506.01937.
REWARD_BENCH_2_SUBSETS: dict[str, int] = {
    "Factuality": 475,
    "Precise IF": 160,
    "Math": 183,
    "Safety": 450,
    "Focus": 495,
    TIES: 102,
}
# Rows by domain as the files name it; 1,327 in all. Source: the dataset on the hub and arXiv 2410.16184.
RM_BENCH_SUBSETS: dict[str, int] = {
    "chat": 129,
    "code": 228,
    "math": 529,
    "safety-refuse": 284,
    "safety-response": 157,
}
# 419 rows; the last four are the adversarial set. Source: arXiv 2310.07641.
LLMBAR_SUBSETS: dict[str, int] = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
LLMBAR_ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")
JUDGEBENCH_SOURCES: dict[str, str] = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
# The 350 pairs of GPT-4o answers, the set of the paper's main table. Source: arXiv 2410.12784.
JUDGEBENCH_SUBSETS: dict[str, int] = {"Knowledge": 154, "Reasoning": 98, "Math": 56, "Coding": 42}
# Pairs of Claude-3.5-Sonnet answers. Source: https://huggingface.co/datasets/ScalerLab/JudgeBench (dataset card).
JUDGEBENCH_TOTALS: dict[str, int] = {"claude": 270}


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


FORMATS: dict[str, BenchmarkFormat] = {
    some.name: some
    for some in (
        BenchmarkFormat(
            "reward_bench_2",
            "RewardBench 2",
            "allenai/reward-bench-2",
            ("test",),
            REWARD_BENCH_2_SUBSETS,
            _parse_reward_bench_2,
            _is_reward_bench_2,
        ),
        BenchmarkFormat(
            "rm_bench", "RM-Bench", "THU-KEG/RM-Bench", ("train",), RM_BENCH_SUBSETS, _parse_rm_bench, _is_rm_bench
        ),
        BenchmarkFormat("llmbar", "LLMBar", "princeton-nlp/LLMBar", (), LLMBAR_SUBSETS, _parse_llmbar, _is_llmbar),
        BenchmarkFormat(
            "judgebench",
            "JudgeBench",
            "ScalerLab/JudgeBench",
            ("gpt", "claude"),
            JUDGEBENCH_SUBSETS,
            _parse_judgebench,
            _is_judgebench,
            JUDGEBENCH_TOTALS,
        ),
    )
}
FORMAT_NAMES: tuple[str, ...] = (REWARD_BENCH, *FORMATS)


def detect_format(data_file: str | Path) -> str:
    """The format of a file, by the keys of its first rows.

    Raises:
        ContrastRMError: Missing file, or none of the formats fits.
    """
    first_keys: list[str] = []
    for path in benchmark_files(data_file):
        for _, row in islice(iter_rows(path), N_SNIFFED):
            if isinstance(row, RecordError):
                continue
            matching = [name for name, some in FORMATS.items() if some.matches(path, row)]
            if matching:
                return matching[0]
            if _is_reward_bench(path, row):
                return REWARD_BENCH
            first_keys = first_keys or [str(key)[:30] for key in islice(row, 12)]
    found = f"the first row has {', '.join(first_keys)}" if first_keys else "no row is a JSON object"
    raise ContrastRMError(
        f"cannot tell the format of {data_file}: {found}; name it with --format ({', '.join(FORMAT_NAMES)})"
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
    data_file: str | Path, format_name: str, *, max_bad_rows: int = 0
) -> tuple[list[BenchmarkItem], list[ReadReport]]:
    """Read a benchmark of one of ``FORMATS``.

    Returns:
        The items in the order of files and rows, and what was read of each file.

    Raises:
        ContrastRMError: Missing file, unknown subset, more bad rows than allowed in a file, or no good row.
    """
    some = FORMATS[format_name]
    seen: dict[tuple[str, str], str] = {}

    def parse(path: Path, line: int, row: dict[str, Any]) -> BenchmarkItem:
        item = some.parse(path, line, row)
        # Only where the name carries meaning: it ties a prompt to its reference, or a pair to its published verdicts.
        if (item.subset == TIES or format_name == "judgebench") and "line-" not in item.id:
            key = (item.subset if item.subset == TIES else "", item.id)
            if key in seen:
                raise RecordError(path, line, "id", item.id, f"an id of its own ({seen[key]} has the same)")
            seen[key] = f"{path}:{line}"
        return item

    items: list[BenchmarkItem] = []
    reports: list[ReadReport] = []
    for path in benchmark_files(data_file):
        found, report = read_rows(path, parse, max_bad_rows)
        items += found
        reports.append(report)
    return items, reports


def items_by_subset(items: Sequence[BenchmarkItem]) -> dict[str, list[BenchmarkItem]]:
    """Items by subset, subsets in the order of their first item."""
    groups: dict[str, list[BenchmarkItem]] = {}
    for item in items:
        groups.setdefault(item.subset, []).append(item)
    return groups
