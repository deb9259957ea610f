"""Sources of training records: notation, every kind of file, the mixing of an epoch, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.errors import ContrastRMError
from codes.common.records import PreferenceRecord
from codes.train.sources import Source, draw_epoch, epoch_quotas, identify, parse_sources, read_source

WriteRows = Callable[[str, Sequence[Any]], Path]
ROW = {"question": "why?", "chosen": "because", "rejected": ["no", "never"], "bias_type": [None, "length"]}


def rows(n: int, name: str = "q") -> list[dict[str, Any]]:
    return [ROW | {"id": f"{name}-{number}", "question": f"why {name} {number}?"} for number in range(n)]


def read(source: Source, **options: Any) -> list[PreferenceRecord]:
    found: list[PreferenceRecord] = []
    report = read_source(source, found.append, **options)
    assert report.n_rows == report.n_good + len(report.bad) and report.n_good == len(found)
    return found


# --- notation


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.jsonl", [("jsonl", "a.jsonl", None)]),
        ("a.jsonl:2", [("jsonl", "a.jsonl", 2.0)]),
        ("a.jsonl:0.5, b.parquet", [("jsonl", "a.jsonl", 0.5), ("parquet", "b.parquet", None)]),
        ("runs:3/a.jsonl:1e-1", [("jsonl", "runs:3/a.jsonl", 0.1)]),
        ("runs:x.jsonl", [("jsonl", "runs:x.jsonl", None)]),
        ("hub:org/name", [("hub", "org/name", None)]),
        ("hub:org/name/config@v1.2:test:3", [("hub", "org/name/config", 3.0)]),
    ],
)
def test_notation(text: str, expected: list[tuple[str, str, float | None]]) -> None:
    assert [(source.kind, source.name, source.weight) for source in parse_sources(text)] == expected


def test_a_hub_source_has_config_revision_and_split() -> None:
    [source] = parse_sources("hub:org/name/config@abc:train[:10%]:3")
    assert (source.name, source.revision, source.split, source.weight) == ("org/name/config", "abc", "train[:10%]", 3.0)
    [source] = parse_sources("hub:org/name")
    assert (source.revision, source.split) == (None, "train")


def test_an_existing_file_wins_over_the_notation(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows("a,b.jsonl", rows(1))
    write_rows("c:2", rows(1))
    monkeypatch.chdir(path.parent)
    assert [source.name for source in parse_sources("a,b.jsonl")] == ["a,b.jsonl"]
    assert [(source.name, source.weight) for source in parse_sources("c:2")] == [("c:2", None)]


def test_a_mix_file_lists_sources(tmp_path: Path) -> None:
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps([{"path": "a, b.jsonl", "weight": 2}, {"path": "c:3.parquet"}, {"path": "hub:o/n:test"}]))
    found = [(source.kind, source.name, source.weight) for source in parse_sources(str(mix))]
    assert found == [("jsonl", "a, b.jsonl", 2.0), ("parquet", "c:3.parquet", None), ("hub", "o/n", None)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "names no source"),
        (" , ", "names no source"),
        ("a.jsonl:-1", "weight '-1'"),
        ("a.jsonl:nan", "weight 'nan'"),
        ("a.jsonl:inf", "weight 'inf'"),
        (":2", "no name"),
        ("a.jsonl,a.jsonl:2", "a.jsonl stands twice in"),
        ("w/a.jsonl,w/../w/a.jsonl", r"w/a.jsonl stands twice \(as w/../w/a.jsonl\)"),
        ("hub:o/n,hub:o/n:train:2", "hub:o/n stands twice"),
        ("a.jsonl:0,b.jsonl:0", "weight 0"),
        ("hub:name-without-org", "neither a local folder nor a hub id"),
        ("hub:a/b/c/d", "neither a local folder nor a hub id"),
        ("absent.json", "not found"),
    ],
)
def test_bad_notation_is_named(text: str, expected: str) -> None:
    with pytest.raises(ContrastRMError, match=expected):
        parse_sources(text)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '[{"weight": 1}]',
        '["a.jsonl"]',
        '[{"path": "a", "weight": true}]',
        '[{"path": "a", "wieght": 1}]',
        '[{"path": "a", "path": "b"}]',
        "[]",
    ],
)
def test_a_bad_mix_file_is_named(content: str, tmp_path: Path) -> None:
    mix = tmp_path / "mix.json"
    mix.write_text(content)
    with pytest.raises(ContrastRMError):
        parse_sources(str(mix))


# --- kinds


def test_every_kind_reads_the_same_records(write_rows: WriteRows, tmp_path: Path) -> None:
    given_rows = rows(5)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    given_rows[3] = {"id": "turns", "messages": turns, "chosen": "x", "rejected": ["y"], "bias_type": [None]}
    given_rows[4] |= {"margin": [0.5, None], "source": "s", "verify_correctness": "CHOSEN_IS_BEST"}
    jsonl = write_rows("a.jsonl", given_rows)
    parquet = tmp_path / "a.parquet"
    columns = {key: None for row in given_rows for key in row}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in given_rows]), parquet)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl.read_bytes())
    expected = read(parse_sources(str(jsonl))[0])
    assert [len(record.messages) for record in expected] == [1, 1, 1, 4, 1]
    assert expected[4].margins == [0.5, None]
    for text in (str(parquet), str(folder), f"hub:{folder}", f"hub:{folder}:train"):
        assert read(parse_sources(text)[0]) == expected, text
    assert [record.id for record in read(parse_sources(str(parquet))[0], limit=2)] == ["q-0", "q-1"]


def test_a_hub_style_set_of_conversations(tmp_path: Path) -> None:
    user = {"role": "user", "content": "why?"}
    table = datasets.Dataset.from_list(
        [
            {
                "chosen": [user, {"role": "assistant", "content": "because"}],
                "rejected": [user, {"role": "assistant", "content": "no"}],
                "score_chosen": 9.0,
                "margin": 1.5,
            }
        ]
    )
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    for split in ("train", "test"):
        [record] = read(parse_sources(f"hub:{tmp_path}:{split}")[0])
        assert (record.question, record.chosen, record.rejected) == ("why?", "because", ["no"])
        assert record.margins == [1.5]
    with pytest.raises(ContrastRMError, match="cannot load .*dev"):
        read(parse_sources(f"hub:{tmp_path}:dev")[0])


def test_a_link_to_a_source_is_the_source(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows("a.jsonl", rows(1))
    (tmp_path / "b.jsonl").symlink_to(path)
    with pytest.raises(ContrastRMError, match="stands twice"):
        parse_sources(f"{path},{tmp_path / 'b.jsonl'}")


def test_a_folder_of_jsonl_is_read_line_by_line(write_rows: WriteRows, tmp_path: Path) -> None:
    """Whatever stands beside the rows: notes of a fetch, columns that only one file has, compressed files."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows("set/one.jsonl", rows(2, "a"))
    (folder / "one.jsonl.meta.json").write_text(json.dumps({"n_rows": 2, "skipped": {"equal": 1}}))
    with gzip.open(folder / "two.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row | {"margin": 1.0, "note": "x"}) + "\n" for row in rows(2, "b"))
    found = read(parse_sources(str(folder))[0])
    assert [record.id for record in found] == ["a-0", "a-1", "b-0", "b-1"] and found[3].margins == [1.0, 1.0]
    assert found[2:] == read(parse_sources(str(folder / "two.jsonl.gz"))[0])
    write_rows("set/three.jsonl", [*rows(1, "c"), '{"question": "q", "chosen": "a", "chosen": "b", "rejected": "c"}'])
    with pytest.raises(ContrastRMError, match=r"three\.jsonl:2: field '-'.*'chosen' stands twice"):
        read(parse_sources(str(folder))[0])


@pytest.mark.parametrize(
    "names, named",
    [
        (("train.jsonl", "train.parquet"), "several formats"),
        (("train.jsonl", "train.csv.gz"), "several formats"),
        (("train.jsonl", "more.csv"), "more.csv"),
        (("train.jsonl", "part/more.jsonl"), "part/more.jsonl"),
    ],
)
def test_files_of_a_folder_that_would_not_be_read_are_refused(tmp_path: Path, names: Sequence[str], named: str) -> None:
    table = datasets.Dataset.from_list(rows(2))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write = {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[name.split(".")[1]]
        write(tmp_path / name)
    [source] = parse_sources(str(tmp_path))
    for use in (identify, read):
        with pytest.raises(ContrastRMError, match=f"{named}.*name the files one by one"):
            use(source)


def test_parquet_files_with_different_columns_are_named_in_one_line(tmp_path: Path) -> None:
    for name, row in (("a", ROW), ("b", ROW | {"margin": 1.0})):
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ContrastRMError, match="different columns .name the files one by one") as caught:
        read(parse_sources(str(tmp_path))[0])
    assert "\n" not in str(caught.value)


def test_a_gzip_file_that_was_cut_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows(50)).encode())
    for broken in (content[:-20], b"no gzip"):
        path.write_bytes(broken)
        with pytest.raises(ContrastRMError, match=r"a\.jsonl\.gz is no whole gzip file"):
            read(parse_sources(str(path))[0])


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(rows(3))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "splits")
    for text, n_rows in (("one", 3), ("splits", 3), ("splits:test", 1)):
        [source] = parse_sources(f"hub:{tmp_path}/{text}")
        assert len(read(source)) == n_rows
    hashes = {identify(parse_sources(f"hub:{tmp_path}/{text}")[0]).sha256 for text in ("splits", "splits:test")}
    assert len(hashes) == 2
    for text in ("one:test", "splits:dev"):
        with pytest.raises(ContrastRMError, match="it was saved with the split"):
            read(parse_sources(f"hub:{tmp_path}/{text}")[0])


def test_the_whole_prompt_of_a_table_is_read_or_refused(tmp_path: Path) -> None:
    table = [ROW | {"system": "Be brief.", "tools": None}, ROW | {"system": None, "tools": ["search"]}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    for text in (str(path), str(tmp_path)):
        found: list[PreferenceRecord] = []
        report = read_source(parse_sources(text)[0], found.append, max_bad_rows=1)
        assert [message["role"] for message in found[0].messages] == ["system", "user"]
        assert len(report.bad) == 1 and ":2: field 'tools'" in report.bad[0]


def test_bad_rows_of_a_table_are_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = [{"id": "q-0"}, {"chosen": None}, {"rejected": []}, {"margin": [float("nan")]}, {"margin": [1.0, 2.0, 3.0]}]
    table = [ROW | {"id": f"q-{number}", "margin": None} for number in range(3)]
    table += [ROW | {"id": f"b-{number}", "margin": None} | change for number, change in enumerate(bad)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    [source] = parse_sources(str(path))
    with pytest.raises(ContrastRMError, match=r"a\.parquet:4: field 'id'.*--max_bad_rows allows 0"):
        read(source)
    found: list[PreferenceRecord] = []
    report = read_source(source, found.append, max_bad_rows=5)
    assert (report.n_rows, report.n_good, len(report.bad)) == (8, 3, 5)
    fields = ["id", "chosen", "rejected", "margin[0]", "margin"]
    assert [f"field '{field}'" in message for field, message in zip(fields, report.bad, strict=True)] == [True] * 5


def test_unreadable_sources_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(ContrastRMError, match="no readable Parquet"):
        read(parse_sources(str(broken))[0])
    with pytest.raises(ContrastRMError, match="not found"):
        read(parse_sources(str(tmp_path / "absent.parquet"))[0])
    with pytest.raises(ContrastRMError, match=r"is written hub:trl-lib/ultrafeedback_binarized$"):
        read(parse_sources("trl-lib/ultrafeedback_binarized")[0])
    with pytest.raises(ContrastRMError, match=r"check the path$"):
        read(parse_sources("data/absent.jsonl")[0])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ContrastRMError, match="cannot load"):
        read(parse_sources(str(empty))[0])
    pyarrow.parquet.write_table(pyarrow.table({"conv_A": ["x"], "conv_B": ["y"]}), empty / "train.parquet")
    with pytest.raises(ContrastRMError, match="no column of a preference record among conv_A, conv_B"):
        read(parse_sources(str(empty))[0])


def test_identity_is_the_content(write_rows: WriteRows, tmp_path: Path) -> None:
    one, other = write_rows("a.jsonl", rows(3)), write_rows("b.jsonl", rows(3))
    assert identify(parse_sources(str(one))[0]) == identify(parse_sources(str(other))[0])
    write_rows("b.jsonl", rows(4))
    assert identify(parse_sources(str(one))[0]) != identify(parse_sources(str(other))[0])
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(one.read_bytes())
    before = identify(parse_sources(str(folder))[0])
    assert before == identify(parse_sources(str(folder))[0])
    assert before != identify(parse_sources(f"hub:{folder}:train[:2]")[0])
    (folder / "train.jsonl").write_bytes(other.read_bytes())
    assert before != identify(parse_sources(str(folder))[0])


def test_identity_of_a_set_in_memory_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    hashes = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(rows(3, name)).to_parquet(tmp_path / name / "train.parquet")
        hashes.add(identify(parse_sources(str(tmp_path / name))[0]).sha256)
    assert len(hashes) == 2


# --- mixing


def test_without_weights_every_group_stands_once_in_an_epoch() -> None:
    assert epoch_quotas([3, 4], [None, None]) is None
    groups, copies = draw_epoch([3, 4], None, seed=1, epoch=0)
    assert sorted(groups.tolist()) == list(range(7)) and not copies.any()


def test_weights_are_shares_of_an_epoch_as_long_as_all_sources() -> None:
    quotas = epoch_quotas([100, 100], [3, None])
    assert quotas == [150, 50]
    groups, copies = draw_epoch([100, 100], quotas, seed=1, epoch=0)
    counts = Counter(groups.tolist())
    first = [counts[number] for number in range(100)]
    second = [counts[number] for number in range(100, 200)]
    assert sorted(set(first)) == [1, 2] and sum(first) == 150
    assert sorted(set(second)) == [0, 1] and sum(second) == 50
    assert sorted(copies.tolist()) == [0] * 150 + [1] * 50
    again, _ = draw_epoch([100, 100], quotas, seed=1, epoch=0)
    later, _ = draw_epoch([100, 100], quotas, seed=1, epoch=1)
    assert np.array_equal(groups, again) and set(later.tolist()) != set(groups.tolist())


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(0, 40), st.one_of(st.none(), st.floats(0, 1e9))), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_as_many_groups_as_the_sources(
    sources: list[tuple[int, float | None]], seed: int, epoch: int
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    try:
        quotas = epoch_quotas(sizes, weights)
    except ContrastRMError:
        assert all(not size or weight == 0 for size, weight in sources)
        return
    if not sum(sizes):
        return
    groups, copies = draw_epoch(sizes, quotas, seed=seed, epoch=epoch)
    assert len(groups) == len(copies) == sum(sizes)
    counts = Counter(groups.tolist())
    first = 0
    for number, size in enumerate(sizes):
        mine = [counts[group] for group in range(first, first + size)]
        quota = size if quotas is None else quotas[number]
        assert sum(mine) == quota
        # Equally often, but for the rest: at most once where no more is asked for than there is.
        assert not mine or max(mine) - min(mine) <= 1
        first += size
