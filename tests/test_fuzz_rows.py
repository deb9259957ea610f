"""Ten thousand damaged rows through every reader: each bad one is named, nothing crashes, the counts add up.

A seeded generator damages good rows in ways that real files are damaged; where the damage leaves no doubt, the
verdict on the row is known beforehand and checked.
Run: ``python -m pytest tests/test_fuzz_rows.py``
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from codes.common.errors import ContrastRMError
from codes.common.records import (
    MAX_NESTING,
    ReadReport,
    check_preference_file,
    iter_rows,
    read_bias_file,
    read_preference_file,
    read_refinement_file,
    write_jsonl,
)
from codes.evaluate import eval_reward_bench, eval_rm
from codes.evaluate.benchmark_figures import RM_BENCH_SUBSETS
from codes.evaluate.benchmarks import detect_format, read_benchmark

N_ROWS = 1250  # a reader; eight of them make ten thousand
MANY = 10**9


@dataclass(frozen=True)
class Case:
    """A reader, a good row for it (by number), and the fields without which a row is bad."""

    good: Callable[[int], dict[str, Any]]
    read: Callable[[Path], tuple[Sequence[Any], ReadReport]]
    required: tuple[str, ...]
    # Another text here names an unknown subset: that is an error of the file, not of the row.
    fixed: str = ""


def read_reward_bench(path: Path) -> tuple[list[Any], ReadReport]:
    items, (report,) = read_benchmark(path, "reward_bench", max_bad_rows=MANY)
    return items, report


def bias_row(number: int) -> dict[str, Any]:
    return {
        "question": f"question {number}",
        "original_response1": "the first",
        "original_response2": "the second",
        "rewritten_response1": "the first, rewritten",
        "rewritten_response2": "the second, rewritten",
        "label": f"response{number % 2 + 1}",
    }


def of_format(name: str) -> Callable[[Path], tuple[Sequence[Any], ReadReport]]:
    def read(path: Path) -> tuple[Sequence[Any], ReadReport]:
        items, [report] = read_benchmark(path, name, max_bad_rows=MANY)
        return items, report

    return read


CASES: dict[str, Case] = {
    "preference": Case(
        lambda n: {
            "id": f"row {n}",
            "question": f"question {n}",
            "chosen": "good",
            "rejected": ["bad", "long and bad"],
            "bias_type": [None, "length"],
            "source": "here",
            "similar_question": "another",
            "verify_correctness": "SKIPPED",
            "extra": {"a": [1, 2.5]},
        },
        partial(read_preference_file, max_bad_rows=MANY),
        ("question", "chosen", "rejected"),
    ),
    "bias": Case(bias_row, partial(read_bias_file, max_bad_rows=MANY), tuple(bias_row(0))),
    "refinement": Case(
        lambda n: {"question": f"q {n}", "original_response": "a", "rewritten_response": "b"},
        partial(read_refinement_file, max_bad_rows=MANY),
        ("question", "original_response", "rewritten_response"),
    ),
    "reward_bench": Case(
        lambda n: {
            "id": n,
            "prompt": f"prompt {n}",
            "chosen": "good",
            "chosen_model": "m",
            "rejected": "bad",
            "rejected_model": "n",
            "subset": ("hep-go", "math-prm")[n % 2],
        },
        read_reward_bench,
        ("prompt", "chosen", "rejected", "subset"),
        fixed="subset",
    ),
    "reward_bench_2": Case(
        lambda n: (
            {
                "id": f"tied:{n}",
                "prompt": f"prompt {n}",
                "chosen": ["a", "b"],
                "rejected": ["c", "d"],
                "num_correct": 2,
                "num_incorrect": 2,
                "total_completions": 4,
                "subset": "Ties",
            }
            if n % 2
            else {"id": f"row {n}", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}
        ),
        of_format("reward_bench_2"),
        ("prompt", "chosen", "rejected", "subset"),
        fixed="subset",
    ),
    "rm_bench": Case(
        lambda n: {
            "id": n,
            "prompt": f"prompt {n}",
            "chosen": ["a", "bb", "ccc"],
            "rejected": ["d", "ee", "fff"],
            "domain": list(RM_BENCH_SUBSETS)[n % 5],
        },
        of_format("rm_bench"),
        ("prompt", "chosen", "rejected", "domain"),
        fixed="domain",
    ),
    "llmbar": Case(
        lambda n: {"input": f"input {n}", "output_1": "one", "output_2": "two", "label": n % 2 + 1},
        of_format("llmbar"),
        ("input", "output_1", "output_2", "label"),
    ),
    "judgebench": Case(
        lambda n: {
            "pair_id": f"pair {n}",
            "original_id": str(n),
            "source": ("mmlu-pro-law", "livebench-math", "livebench-reasoning", "livecodebench")[n % 4],
            "question": f"question {n}",
            "response_model": "m",
            "response_A": "first",
            "response_B": "second",
            "label": ("A>B", "B>A")[n % 2],
        },
        of_format("judgebench"),
        ("source", "question", "response_A", "response_B", "label"),
    ),
}

# --- damage ---

NO_TEXT = [None, True, False, 0, -1, 3, 2.5, 1e308, 10**60, [], {}, [None], [[]], [{}], {"role": "user"}, ["a", 1]]
TEXTS = ["", " ", "\n", "\ud800", "a\udfff", "x" * 20_000, "\x00", "NaN", "é\u2028\u0085", "{", "response1", "1"]
DEEP = json.loads("[" * (MAX_NESTING + 5) + "]" * (MAX_NESTING + 5))
# Raw lines that are no JSON object in UTF-8, whatever the reader.
BAD_LINES = [
    b"{",
    b"}",
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b"nothing at all",
    b"{'single': 1}",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "\xff\xfe"}',
    b'\xef\xbb\xbf{"a": 1}',
    b'{"a": 1} {"b": 2}',
    b'{"a": 1,}',
    b'{"a" 1}',
    b'{"a": "\x01"}',
    b"[" * 100_000,
    b'{"a": ' * 3000 + b"1" + b"}" * 3000,
    b"\x00",
    "\u00a0\u2003".encode(),
]
BLANK_LINES = [b"", b"   ", b"\t", b"\r"]


@dataclass(frozen=True)
class Line:
    """A line of a file: ``good`` says what must come of it, None that either may; blank lines are no rows."""

    raw: bytes
    good: bool | None


def damaged(case: Case, number: int, draw: random.Random) -> Line:
    row = case.good(number)
    kind = draw.choice(["none", "none", "drop", "junk", "junk", "text", "raw", "cut", "noise", "extra", "deep", "line"])
    if kind == "line":
        return Line(draw.choice(BAD_LINES), False)
    key = draw.choice(list(row))
    is_needed = key in case.required
    if kind == "drop":
        del row[key]
        return Line(_encode(row), False if is_needed else None)
    if kind == "junk":
        row[key] = copy.deepcopy(draw.choice(NO_TEXT))
        return Line(_encode(row), None)
    if kind == "text" and key != case.fixed:
        row[key] = draw.choice(TEXTS)
        return Line(_encode(row), None)
    if kind == "extra":
        row[draw.choice(["messages", "more", "\ud800", ""])] = draw.choice([*NO_TEXT, *TEXTS])
        return Line(_encode(row), None)
    if kind == "deep":
        row["more"] = DEEP
        return Line(_encode(row), False)
    raw = _encode(row)
    if kind == "cut":
        return Line(raw[: draw.randrange(1, len(raw))], False)
    if kind == "noise" and not case.fixed:
        place = draw.randrange(len(raw))
        return Line(raw[:place] + draw.randbytes(draw.randrange(1, 4)).replace(b"\n", b"?") + raw[place + 1 :], None)
    if kind == "raw":
        return Line(b"\t " + raw + b" \r", True)
    return Line(raw, True)


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


def damaged_lines(case: Case, n_rows: int, seed: int) -> list[Line]:
    draw = random.Random(seed)
    lines = [Line(_encode(case.good(-1)) if "id" not in case.good(0) else _encode(case.good(MANY)), True)]
    lines += [damaged(case, number, draw) for number in range(n_rows)]
    for _ in range(n_rows // 20):
        lines.insert(draw.randrange(1, len(lines)), Line(draw.choice(BLANK_LINES), None))
    return lines


def is_row(line: Line) -> bool:
    return bool(line.raw.strip())


def write(path: Path, lines: Sequence[Line]) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line.raw for line in lines))
    return path


def bad_lines_of(report: ReadReport, path: Path) -> set[int]:
    """The line numbers that the messages name; every message names one, and a field."""
    found = [re.match(re.escape(str(path)) + r":(\d+): field '[^\n]*': found [^\n]*; allowed: [^\n]+\Z", message) for
             message in report.bad]  # fmt: skip
    assert all(found), [message for message, match in zip(report.bad, found, strict=True) if not match][:3]
    numbers = {int(match.group(1)) for match in found if match}
    assert len(numbers) == len(report.bad)
    return numbers


# --- the tests ---


@pytest.mark.parametrize("name", CASES)
def test_every_bad_row_is_named_and_the_counts_add_up(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    lines = damaged_lines(case, N_ROWS, seed=sum(map(ord, name)))
    path = write(tmp_path / "rows.jsonl", lines)
    records, report = case.read(path)
    bad = bad_lines_of(report, path)
    assert report.n_rows == sum(map(is_row, lines)) == len(records) + len(bad)
    assert report.n_good == len(records)
    for number, line in enumerate(lines, start=1):
        if is_row(line) and line.good is not None:
            assert (number not in bad) == line.good, (number, line.raw[:300], line.good)
        assert is_row(line) or number not in bad
    # Both kinds of row were there in numbers.
    assert len(records) > N_ROWS // 5 and len(bad) > N_ROWS // 5
    # One bad row too many stops the run at the first of them.
    with pytest.raises(ContrastRMError, match=re.escape(f"{path}:{min(bad)}: field ")):
        _read_strictly(name, path)


def _read_strictly(name: str, path: Path) -> None:
    readers: dict[str, Callable[[Path], Any]] = {
        "preference": read_preference_file,
        "bias": read_bias_file,
        "refinement": read_refinement_file,
        "reward_bench": partial(read_benchmark, name="reward_bench"),
    }
    readers.get(name, lambda file: read_benchmark(file, name))(path)


def test_the_streaming_reader_sees_the_same(tmp_path: Path) -> None:
    case = CASES["preference"]
    path = write(tmp_path / "rows.jsonl", damaged_lines(case, N_ROWS, seed=7))
    records, report = case.read(path)
    checked = check_preference_file(path, max_bad_rows=MANY)
    assert checked.bad_lines == bad_lines_of(report, path)
    assert [record.id for record in checked] == [record.id for record in records]
    # What was accepted can be written, and reads back as itself.
    again = tmp_path / "again.jsonl"
    write_jsonl(again, [record.to_row() for record in records])
    assert read_preference_file(again)[0] == records


@pytest.mark.parametrize("name", ["reward_bench_2", "rm_bench", "llmbar", "judgebench"])
def test_rows_of_a_json_array_fare_alike(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    lines = [line for line in damaged_lines(case, 300, seed=3) if is_row(line) and _is_json(line.raw)]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + b",\n".join(line.raw.strip() for line in lines) + b"\n]\n")
    records, report = case.read(path)
    bad = bad_lines_of(report, path)
    assert report.n_rows == len(lines) == len(records) + len(bad)
    for number, line in enumerate(lines, start=2):
        assert line.good is None or (number not in bad) == line.good


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode())
    except (ValueError, RecursionError):
        return False
    return True


def test_a_file_of_noise_is_refused_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(11)
    for number in range(200):
        path = tmp_path / f"noise.{('json', 'jsonl', 'parquet')[number % 3]}"
        start = draw.choice([b"", b"[", b"{", b"PAR1", b'[{"a": 1},', b"\xef\xbb\xbf[", b"[" * 5000])
        path.write_bytes(start + draw.randbytes(draw.randrange(400)))
        try:
            list(iter_rows(path))
        except ContrastRMError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        for read in (detect_format, *(case.read for case in CASES.values())):
            with pytest.raises(ContrastRMError) as caught:
                read(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["reward_bench", "reward_bench_2", "rm_bench", "llmbar", "judgebench"])
def test_a_damaged_benchmark_file_is_evaluated_all_the_same(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    lines = damaged_lines(CASES[name], 60, seed=5)
    path = write(tmp_path / "rows.jsonl", lines)
    assert detect_format(path) == name
    arguments = ["--model_path", str(tiny_llama_dir), "--data_file", str(path), "--results_dir", str(tmp_path / "r")]
    assert eval_reward_bench.main([*arguments, "--max_bad_rows", "99"]) == 0
    folder = tmp_path / "r" / tiny_llama_dir.name
    summary = json.loads((folder / f"{name}_summary.json").read_text())
    [file] = summary["metadata"]["data_files"]
    assert file["n_rows"] == sum(map(is_row, lines)) == summary["n_rows"] + file["n_bad_rows"]
    assert len(list(iter_rows(folder / f"{name}.jsonl"))) == summary["n_rows"]


def test_a_damaged_bias_file_is_evaluated_all_the_same(tiny_llama_dir: Path, tmp_path: Path) -> None:
    lines = damaged_lines(CASES["bias"], 60, seed=5)
    write(tmp_path / "beauty_bias.jsonl", lines)
    arguments = ["--model_path", str(tiny_llama_dir), "--data_dir", str(tmp_path), "--results_dir", str(tmp_path / "r")]
    assert eval_rm.main([*arguments, "--bias_type", "beauty", "--max_bad_rows", "99"]) == 0
    folder = tmp_path / "r" / tiny_llama_dir.name
    summary = json.loads((folder / "bias_summary.json").read_text())
    [file] = summary["metadata"]["data_files"]
    fields = summary["biases"]["beauty"]
    assert file["n_rows"] == sum(map(is_row, lines))
    assert fields["n_pairs"] + fields["n_excluded"] + file["n_bad_rows"] == file["n_rows"]
