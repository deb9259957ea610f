"""The data contract: every accepted shape, every refusal with its place and cure, counts, atomic writers."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codes.common import cli
from codes.common.biases import BIASES, EVALUABLE, INJECTABLE, PAIRWISE, eval_file_name, get_bias
from codes.common.errors import ContrastRMError, RecordError
from codes.common.records import (
    ChosenVariant,
    PreferenceRecord,
    check_preference_file,
    ensure_writable_folder,
    file_sha256,
    iter_jsonl,
    iter_preference_file,
    open_atomic,
    parse_preference_row,
    prompt_field,
    read_bias_file,
    read_preference_file,
    read_refinement_file,
    write_json,
    write_jsonl,
    write_row,
    write_text,
)
from codes.evaluate.benchmarks import read_benchmark

REPO = Path(__file__).resolve().parents[1]
WriteRows = Callable[[str, Sequence[Any]], Path]
USER = {"role": "user", "content": "why?"}
GOOD = {"question": "why?", "chosen": "because", "rejected": ["no"]}
BIAS_ROW = {
    "question": "why?",
    "original_response1": "a",
    "original_response2": "b",
    "rewritten_response1": "c",
    "rewritten_response2": "d",
    "label": "response2",
}
REFINEMENT_ROW = {"question": "why?", "original_response": "a", "rewritten_response": "b"}
BENCH_ROW = {
    "id": 7,
    "prompt": "why?",
    "chosen": "a",
    "rejected": "b",
    "subset": "donotanswer",
    "chosen_model": "m",
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def parse(row: dict[str, Any], **options: Any) -> PreferenceRecord:
    return parse_preference_row(Path("f.jsonl"), 3, row, **options)


# --- accepted shapes


@pytest.mark.parametrize(
    "prompt",
    [
        {"question": "why?"},
        {"prompt": "why?"},
        {"prompt": [USER]},
        {"question": [USER]},
        {"messages": [USER]},
    ],
    ids=["question", "prompt", "prompt-turns", "question-turns", "messages"],
)
@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "because", "rejected": ["no"]},
        {"chosen": "because", "rejected": "no"},
        {"chosen": [turn("assistant", "because")], "rejected": [turn("assistant", "no")]},
        {"chosen": [USER, turn("assistant", "because")], "rejected": [USER, turn("assistant", "no")]},
        {"chosen": "because", "rejected": [[USER, turn("assistant", "no")]]},
    ],
    ids=["texts", "text-rejected", "trl-explicit", "trl-with-prompt", "list-of-conversations"],
)
def test_every_shape_gives_the_same_record(prompt: dict[str, Any], answers: dict[str, Any]) -> None:
    record = parse(prompt | answers)
    assert (record.messages, record.chosen, record.rejected, record.bias_type) == (
        [USER],
        "because",
        ["no"],
        [None],
    )
    # The id is a function of the content, not of the shape.
    assert record.id == parse(GOOD).id and re.fullmatch("[0-9a-f]{16}", record.id)


def test_prompt_comes_from_the_turns_of_chosen_when_no_key_gives_it() -> None:
    turns = [turn("system", "Be brief."), USER, turn("assistant", "hm"), turn("user", "so?")]
    record = parse({"chosen": [*turns, turn("assistant", "yes")], "rejected": [*turns, turn("assistant", "no")]})
    assert record.messages == turns
    assert record.question == "System: Be brief.\nUser: why?\nAssistant: hm\nUser: so?"


def test_a_short_bias_type_aligns_with_the_end() -> None:
    rejected = ["r0", "r1", "r2"]
    assert parse(GOOD | {"rejected": rejected, "bias_type": ["length"]}).bias_type == [None, None, "length"]
    assert parse(GOOD | {"rejected": rejected, "bias_type": "beauty"}).bias_type == [None, None, "beauty"]
    assert parse(GOOD | {"rejected": rejected, "bias_type": []}).bias_type == [None] * 3
    assert parse(GOOD | {"rejected": rejected, "bias_type": ["length", None, "beauty"]}).bias_type == [
        "length",
        None,
        "beauty",
    ]


def test_the_content_id_is_of_all_that_a_record_says() -> None:
    several = GOOD | {"rejected": ["no", "later"]}
    others = [
        GOOD | {"chosen": "other"},
        GOOD | {"question": "other"},
        GOOD | {"system": "Be brief."},
        GOOD | {"rejected": ["other"]},
        several,
        GOOD | {"rejected": ["no", "sooner"]},
        several | {"bias_type": ["length"]},
        several | {"margin": [None, 2]},
        GOOD | {"chosen_variants": [{"text": "because!", "bias": "length"}]},
        GOOD | {"similar_question": "how?"},
        GOOD | {"source": "own"},
    ]
    assert len({parse(row).id for row in [GOOD, *others]}) == 1 + len(others)
    # Neither keys that nobody reads nor other ways to say the same.
    for same in ({"note": 3}, {"bias_type": [None]}, {"system": " "}, {"tools": []}, {"margin": None}):
        assert parse(GOOD | same).id == parse(GOOD).id
    assert parse(GOOD | {"id": 7}).id == "7"


def test_a_repeat_without_an_id_is_named_as_one(write_rows: WriteRows) -> None:
    different = [GOOD | {"rejected": ["no", text]} for text in ("later", "sooner")]
    assert len(read_preference_file(write_rows("good.jsonl", different))[0]) == 2
    path = write_rows("f.jsonl", [GOOD, different[0], GOOD])
    for read, earlier in ((read_preference_file, "line 1"), (check_preference_file, "an earlier line")):
        with pytest.raises(ContrastRMError, match=f":3: field '-': found 'why.'; allowed: .*{earlier} says the same"):
            read(path)
    assert len(read_preference_file(write_rows("ids.jsonl", [GOOD | {"id": 1}, GOOD | {"id": 2}]))[0]) == 2


# --- the whole prompt


@pytest.mark.parametrize(
    "prompt",
    [
        {"question": "why?"},
        {"messages": [USER]},
        {"prompt": [turn("system", "Be brief."), USER]},
        {"chosen": [USER, turn("assistant", "because")]},
        {"question": "why?", "chosen": [turn("system", "Be brief."), USER, turn("assistant", "because")]},
    ],
    ids=["question", "turns", "the-same-turn", "turns-of-chosen", "both"],
)
def test_a_system_text_becomes_the_system_turn(prompt: dict[str, Any]) -> None:
    record = parse({"chosen": "because", "rejected": "no", "system": "Be brief."} | prompt)
    assert record.messages == [turn("system", "Be brief."), USER]
    assert "system" not in record.to_row() and parse(record.to_row()) == record
    benchmark = {"id": "1", "chosen": "a", "rejected": "b", "subset": "s", "system": "Be brief."}
    assert prompt_field(Path("f"), 1, benchmark | {"prompt": "why?"}) == record.messages


def test_a_blank_system_text_is_none() -> None:
    for blank in ("", " \n", None):
        assert parse(GOOD | {"system": blank}).messages == [USER]


NOT_RENDERED: list[tuple[str, Any]] = [
    ("tools", [{"name": "search"}]),
    ("images", ["cat.png"]),
    ("history", [["q", "a"]]),
    ("input", "Bonjour"),
    ("documents", [{"text": "t"}]),
    ("context", "It rained."),
    ("system_prompt", "Be brief."),
]


@pytest.mark.parametrize(("key", "value"), NOT_RENDERED, ids=[key for key, _ in NOT_RENDERED])
def test_what_no_turn_holds_is_refused_by_every_reader(write_rows: WriteRows, key: str, value: Any) -> None:
    readers: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (read_preference_file, GOOD),
        (check_preference_file, GOOD),
        (lambda path: list(iter_preference_file(path)), GOOD),
        (read_bias_file, BIAS_ROW),
        (read_refinement_file, REFINEMENT_ROW),
        (lambda path: read_benchmark(path, "reward_bench"), BENCH_ROW),
    ]
    for read, row in readers:
        with pytest.raises(ContrastRMError, match=rf":1: field '{key}': found .*nothing renders it"):
            read(write_rows("f.jsonl", [row | {key: value}]))
        # Without a content, or with one that the prompt holds too, nothing is lost.
        for harmless in (None, "", [], "why?"):
            read(write_rows("f.jsonl", [row | {key: harmless}]))


@pytest.mark.parametrize("read, row", [(read_bias_file, BIAS_ROW), (read_refinement_file, REFINEMENT_ROW)])
def test_formats_of_one_question_take_no_other_turns(
    write_rows: WriteRows, read: Callable[[Path], Any], row: dict[str, Any]
) -> None:
    for key, value in (
        ("system", "Be brief."),
        ("messages", [USER, turn("assistant", "hm"), USER]),
        ("prompt", "who?"),
    ):
        with pytest.raises(ContrastRMError, match=f":1: field .*'{key}'"):
            read(write_rows("f.jsonl", [row | {key: value}]))


# --- variants of the chosen answer


def test_variants_of_the_chosen_answer_are_checked_and_written_back() -> None:
    record = parse(GOOD | {"chosen_variants": [{"text": "because!", "bias": "length"}]})
    assert record.chosen_variants == [ChosenVariant("because!", "length")]
    assert parse(record.to_row()) == record


def test_rejected_may_be_absent_only_where_the_reader_says_so() -> None:
    row = {"question": "why?", "chosen": "because"}
    for absent in (row, row | {"rejected": None}, row | {"rejected": []}):
        assert parse(absent, require_rejected=False).rejected == []
        with pytest.raises(RecordError, match="rejected"):
            parse(absent)


def test_extra_keys_and_optional_fields_survive_a_round_trip(write_rows: WriteRows, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        GOOD | {"id": "a", "margin": 0.5, "nested": {"k": [1, None]}, "source": "own"},
        GOOD
        | {
            "id": "b",
            "messages": [turn("system", "s"), USER],
            "bias_type": ["length"],
            "similar_question": "how?",
        }
        | {"verify_correctness": "CHOSEN_IS_BEST"},
        GOOD | {"question": "déjà vu \u2028 🙂 \u0000"},
    ]
    del rows[1]["question"]
    records, report = read_preference_file(write_rows("in.jsonl", rows))
    assert (report.n_rows, report.n_good, report.bad) == (3, 3, [])
    out = tmp_path / "out.jsonl"
    write_jsonl(out, [record.to_row() for record in records])
    again, _ = read_preference_file(out)
    assert again == records
    assert again[0].extra == {"nested": {"k": [1, None]}} and again[0].margins == [0.5]
    assert "question" in again[0].to_row() and "messages" in again[1].to_row()


def test_blank_lines_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\r\n" + json.dumps(GOOD).encode() + b"\r\n \n" + json.dumps(GOOD | {"id": "x"}).encode())
    records, report = read_preference_file(path)
    assert (len(records), report.n_rows) == (2, 2)
    assert [line for line, _ in iter_jsonl(path)] == [2, 4]


# --- refusals

REFUSALS: list[tuple[str, Any, str, str, str]] = [
    ("malformed", '{"question": ', "-", '{"question":', "one JSON object a line"),
    ("not-an-object", "[1, 2]", "-", "[1, 2]", "a JSON object"),
    ("a-number", "3", "-", "3", "a JSON object"),
    ("too-deep", "[" * 100_000, "-", "[[[[", "one JSON object a line"),
    ("huge-number", '{"x": ' + "9" * 5000 + "}", "-", '{"x": 9', "one JSON object a line"),
    (
        "nan",
        '{"question": "q", "chosen": "c", "rejected": ["r"], "x": NaN}',
        "-",
        "NaN",
        "one JSON object a line",
    ),
    ("no-prompt", {"chosen": "c", "rejected": ["r"]}, "question", "nothing", "question, prompt, messages"),
    ("no-chosen", {"question": "q", "rejected": ["r"]}, "chosen", "nothing", "a non-empty text"),
    ("null-chosen", GOOD | {"chosen": None}, "chosen", "nothing", "a non-empty text"),
    ("no-rejected", {"question": "q", "chosen": "c"}, "rejected", "nothing", "non-empty list"),
    ("empty-rejected", GOOD | {"rejected": []}, "rejected", "[]", "non-empty list"),
    ("object-rejected", GOOD | {"rejected": {"a": 1}}, "rejected", "{'a': 1}", "non-empty list"),
    ("blank-question", GOOD | {"question": " \n"}, "question", r"' \n'", "a non-empty text"),
    ("number-question", GOOD | {"question": 3}, "question", "3", "a non-empty text"),
    ("empty-chosen", GOOD | {"chosen": ""}, "chosen", "''", "a non-empty text"),
    ("empty-rejected-text", GOOD | {"rejected": ["r", "\t"]}, "rejected[1]", r"'\t'", "a non-empty text"),
    ("null-rejected-text", GOOD | {"rejected": [None]}, "rejected[0]", "nothing", "a non-empty text"),
    ("unknown-bias", GOOD | {"bias_type": ["lenght"]}, "bias_type[0]", "'lenght'", "length"),
    ("not-injectable", GOOD | {"bias_type": ["gender"]}, "bias_type[0]", "'gender'", "length"),
    ("unhashable-bias", GOOD | {"bias_type": [["length"]]}, "bias_type[0]", "['length']", "null or one of"),
    ("too-many-biases", GOOD | {"bias_type": [None, "length"]}, "bias_type", "[None, 'length']", "at most 1"),
    ("echo", GOOD | {"rejected": ["r", "because"]}, "rejected[1]", "'because'", "differs from chosen"),
    ("surrogate-chosen", GOOD | {"chosen": "\ud800"}, "chosen", "ud800", "without lone surrogates"),
    ("surrogate-question", GOOD | {"question": "\udfff"}, "question", "udfff", "without lone surrogates"),
    ("surrogate-id", GOOD | {"id": "\ud800"}, "id", "ud800", "without lone surrogates"),
    ("surrogate-extra", GOOD | {"note": {"k": ["\ud800"]}}, "note", "ud800", "without lone surrogates"),
    ("empty-messages", GOOD | {"messages": []}, "messages", "[]", "a non-empty list"),
    ("messages-text", GOOD | {"messages": "q"}, "messages", "'q'", "a non-empty list"),
    (
        "bad-role",
        GOOD | {"messages": [turn("human", "q")]},
        "messages[0]",
        "human",
        "system, user, assistant",
    ),
    (
        "role-list",
        GOOD | {"messages": [{"role": ["user"], "content": "q"}]},
        "messages[0]",
        "user",
        "role one of",
    ),
    ("not-a-turn", GOOD | {"messages": ["q"]}, "messages[0]", "'q'", "an object with role"),
    (
        "late-system",
        GOOD | {"messages": [USER, turn("system", "s"), USER]},
        "messages[1]",
        "system",
        "at the start",
    ),
    ("no-content", GOOD | {"messages": [{"role": "user"}]}, "content", "nothing", "a non-empty text"),
    (
        "ends-with-assistant",
        GOOD | {"messages": [USER, turn("assistant", "a")]},
        "messages",
        "'assistant'",
        "user turn",
    ),
    (
        "answer-ends-with-user",
        GOOD | {"chosen": [USER]},
        "chosen",
        "'user'",
        "end with the assistant's answer",
    ),
    (
        "two-prompts",
        {
            "chosen": [USER, turn("assistant", "a")],
            "rejected": [turn("user", "other"), turn("assistant", "b")],
        },
        "chosen/rejected",
        "other",
        "the same prompt",
    ),
    (
        "two-systems",
        GOOD | {"question": [turn("system", "s"), USER], "system": "t"},
        "system",
        "'t'",
        "system turn of the",
    ),
    ("system-number", GOOD | {"system": 3}, "system", "3", "a non-empty text"),
    (
        "tool-call",
        GOOD | {"chosen": [turn("assistant", "a") | {"tool_calls": [1]}]},
        "chosen[0].tool_calls",
        "[1]",
        "role and content alone",
    ),
    ("variants-text", GOOD | {"chosen_variants": "v"}, "chosen_variants", "'v'", "a list of {text, bias}"),
    ("variant-text", GOOD | {"chosen_variants": ["v"]}, "chosen_variants[0]", "'v'", "text and bias"),
    ("variant-key", GOOD | {"chosen_variants": [{"txt": "v"}]}, "chosen_variants[0]", "txt", "text and bias"),
    (
        "variant-empty",
        GOOD | {"chosen_variants": [{"text": "", "bias": "length"}]},
        "chosen_variants[0].text",
        "''",
        "non-empty text",
    ),
    (
        "variant-echo",
        GOOD | {"chosen_variants": [{"text": "no", "bias": "length"}]},
        "chosen_variants[0].text",
        "'no'",
        "differs from chosen and from every",
    ),
    (
        "variant-bias",
        GOOD | {"chosen_variants": [{"text": "v", "bias": "gender"}]},
        "chosen_variants[0].bias",
        "'gender'",
        "length",
    ),
    ("key-twice", '{"question": "q", "chosen": "a", "chosen": "b", "rejected": "r"}', "-", "chosen", "stands twice"),
    ("nested-key-twice", '{"question": "q", "x": {"k": 1, "k": 2}}', "-", "question", "'k' stands twice"),
    ("verdict", GOOD | {"verify_correctness": "YES"}, "verify_correctness", "'YES'", "CHOSEN_IS_BEST"),
    ("verdict-list", GOOD | {"verify_correctness": [1]}, "verify_correctness", "[1]", "CHOSEN_IS_BEST"),
    ("source-number", GOOD | {"source": 3}, "source", "3", "a text"),
    ("id-bool", GOOD | {"id": True}, "id", "True", "a text or a whole number"),
    ("id-float", GOOD | {"id": 1.5}, "id", "1.5", "a text or a whole number"),
    ("id-empty", GOOD | {"id": ""}, "id", "''", "a text or a whole number"),
    ("duplicate-id", GOOD | {"id": "first"}, "id", "'first'", "an id of its own (line 1"),
]


@pytest.mark.parametrize(
    ("row", "field", "found", "allowed"), [case[1:] for case in REFUSALS], ids=[c[0] for c in REFUSALS]
)
def test_refusals_name_place_finding_and_cure(
    write_rows: WriteRows, row: Any, field: str, found: str, allowed: str
) -> None:
    path = write_rows("f.jsonl", [GOOD | {"id": "first"}, row])
    with pytest.raises(ContrastRMError) as caught:
        read_preference_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: field {field!r}: found ")
    found_part, allowed_part = message.split("; allowed: ", 1)
    assert found in found_part and allowed in allowed_part
    assert "--max_bad_rows" in message and "\n" not in message and len(message) < 600 + len(str(path))
    # The same row, allowed by number, is counted with the same words.
    records, report = read_preference_file(path, max_bad_rows=1)
    assert [record.id for record in records] == ["first"]
    assert (report.n_rows, report.n_good, len(report.bad)) == (2, 1, 1)
    assert report.bad[0] in message and report.path == str(path)


def test_a_line_that_is_not_utf8_is_a_bad_row_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    bad = json.dumps(GOOD | {"chosen": "é"}, ensure_ascii=False).encode("latin-1")
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + bad + b"\n" + json.dumps(GOOD | {"id": "z"}).encode() + b"\n")
    with pytest.raises(ContrastRMError, match=r"latin1\.jsonl:2: field '-': found .*allowed: UTF-8 text.*max_bad_rows"):
        read_preference_file(path)
    records, report = read_preference_file(path, max_bad_rows=1)
    assert (len(records), report.n_rows, report.n_good, len(report.bad)) == (2, 3, 2, 1)
    with pytest.raises(RecordError, match=":2: "):
        list(iter_jsonl(path))


def test_bad_rows_are_counted_and_bounded(write_rows: WriteRows) -> None:
    rows = ["{", GOOD | {"id": "a"}, "[]", GOOD | {"id": "b"}, GOOD | {"id": "c", "rejected": []}]
    path = write_rows("f.jsonl", rows)
    records, report = read_preference_file(path, max_bad_rows=3)
    assert [record.id for record in records] == ["a", "b"]
    assert report.n_rows == report.n_good + len(report.bad) == 5
    assert [message.split(": ")[0] for message in report.bad] == [f"{path}:{line}" for line in (1, 3, 5)]
    with pytest.raises(ContrastRMError, match=r":5: .*bad row number 3; --max_bad_rows allows 2"):
        read_preference_file(path, max_bad_rows=2)


def test_a_file_without_one_good_row_is_refused(write_rows: WriteRows, tmp_path: Path) -> None:
    with pytest.raises(ContrastRMError, match=r"no usable row \(2 bad\)"):
        read_preference_file(write_rows("bad.jsonl", ["{", "3"]), max_bad_rows=9)
    with pytest.raises(ContrastRMError, match=r"no usable row \(0 bad\)"):
        read_preference_file(write_rows("empty.jsonl", []))
    for missing in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ContrastRMError, match="file not found"):
            read_preference_file(missing)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.sampled_from(["user", "q"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ROW_KEYS = ["id", "question", "prompt", "messages", "chosen", "rejected", "bias_type", "similar_question"]
ROW_KEYS += ["verify_correctness", "source", "anything"]
maybe_rows = st.fixed_dictionaries({}, optional=dict.fromkeys(ROW_KEYS, json_values))
near_rows = st.builds(
    lambda row, key, value: row | {key: value},
    st.just(GOOD),
    st.sampled_from([*GOOD, "id", "x"]),
    json_values,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(row=maybe_rows | near_rows)
def test_any_json_value_gives_a_record_or_a_record_error(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "hypothesis_row.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    try:
        records, _ = read_preference_file(path)
    except ContrastRMError as error:
        assert f"{path}:1: field " in str(error) and "\n" not in str(error)
        return
    # What was accepted can be written, and reads back as itself.
    write_jsonl(path, [record.to_row() for record in records])
    assert read_preference_file(path)[0] == records


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    row=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys({*BIAS_ROW, *REFINEMENT_ROW, *BENCH_ROW}, json_values)
        | {"subset": st.just("s") | json_values},
    )
)
def test_evaluation_readers_never_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "hypothesis_eval_row.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    for read in (
        read_bias_file,
        read_refinement_file,
        lambda file: read_benchmark(file, "reward_bench"),
    ):
        try:
            read(path)
        except ContrastRMError as error:
            assert f"{path}:1: field " in str(error) and "\n" not in str(error)


# --- evaluation files


def test_bias_rows(write_rows: WriteRows) -> None:
    # An empty answer can be scored, so it is data, not a defect.
    path = write_rows("f.jsonl", [BIAS_ROW, BIAS_ROW | {"label": "response1", "original_response2": ""}])
    (first, second), report = read_bias_file(path)
    assert (first.line, first.original, first.rewritten, first.better) == (1, ("a", "b"), ("c", "d"), 1)
    assert (second.better, second.original[1], report.n_rows) == (0, "", 2)
    for key, value, words in [
        ("label", "response3", "response1 or response2"),
        ("label", None, "'nothing'; allowed: response1"),
        ("original_response1", 3, "a text"),
        ("rewritten_response2", None, "a text"),
        ("question", "", "a non-empty text"),
        ("original_response2", "\ud800", "surrogates"),
    ]:
        with pytest.raises(ContrastRMError, match=rf":1: field '{key}': .*{words}"):
            read_bias_file(write_rows("bad.jsonl", [BIAS_ROW | {key: value}]))


def test_refinement_rows(write_rows: WriteRows) -> None:
    (record,), _ = read_refinement_file(write_rows("f.jsonl", [REFINEMENT_ROW]))
    assert (record.line, record.question, record.original_response, record.rewritten_response) == (
        1,
        "why?",
        "a",
        "b",
    )
    for key in REFINEMENT_ROW:
        with pytest.raises(ContrastRMError, match=rf":1: field '{key}': found 'nothing'"):
            read_refinement_file(write_rows("bad.jsonl", [{k: v for k, v in REFINEMENT_ROW.items() if k != key}]))


def test_reward_bench_rows(write_rows: WriteRows) -> None:
    turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    own = BENCH_ROW | {"prompt": turns, "chosen_model": "written-for-contrastrm"}
    path = write_rows("f.jsonl", [BENCH_ROW, own])
    items, _ = read_benchmark(path, "reward_bench")
    assert (items[0].id, items[0].messages, items[0].origin) == ("7", (USER,), "")
    assert (items[1].messages, items[1].origin) == (tuple(turns), "own sample")
    with pytest.raises(ContrastRMError, match=":1: field 'prompt': found 'nothing'"):
        rows = [{k: v for k, v in BENCH_ROW.items() if k != "prompt"}]
        read_benchmark(write_rows("bad.jsonl", rows), "reward_bench")
    # An unknown subset would be missing from every figure: it stops the run whatever --max_bad_rows allows.
    path = write_rows("odd.jsonl", [BENCH_ROW | {"subset": "hep-perl"}])
    with pytest.raises(
        ContrastRMError, match=r":1: field 'subset': unknown subset 'hep-perl'; known: alpacaeval-easy, "
    ):
        read_benchmark(path, "reward_bench", max_bad_rows=99)


# --- writers


def test_writers_replace_whole_files_and_make_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "f.jsonl"
    write_jsonl(path, ({"n": n, "text": "é\u2028"} for n in range(2)))
    assert [value["n"] for _, value in iter_jsonl(path)] == [0, 1]
    assert "é" in path.read_text(encoding="utf-8")
    write_json(path, {"k": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"k": "ü"}
    write_text(path, "")
    assert path.read_text(encoding="utf-8") == "" and [file.name for file in path.parent.iterdir()] == ["f.jsonl"]
    plain = tmp_path / "plain"
    plain.write_text("x", encoding="utf-8")
    assert path.stat().st_mode == plain.stat().st_mode  # as any other program would have made it
    assert file_sha256(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def broken_rows() -> Any:
    yield {"n": 1}
    raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda path: write_json(path, {"k": float("nan")}), ValueError),
        (lambda path: write_json(path, [float("-inf")]), ValueError),
        (lambda path: write_jsonl(path, [{"n": 1}, {"k": float("inf")}]), ValueError),
        (lambda path: write_jsonl(path, [{"k": object()}]), TypeError),
        (lambda path: write_jsonl(path, broken_rows()), RuntimeError),
        (lambda path: write_json(path, {"k": "\ud800"}), UnicodeEncodeError),
    ],
    ids=["nan", "infinity", "second-row", "not-json", "broken-source", "surrogate"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, write: Callable[[Path], None], error: type[Exception]
) -> None:
    path = tmp_path / "f.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(error):
        write(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["f.json"]


def test_unwritable_places_are_one_line_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for write in (
        lambda: write_text(tmp_path / "file" / "f.txt", "x"),  # its folder is a file
        lambda: write_json(tmp_path / "folder", {}),  # the name is taken by a folder
        lambda: write_jsonl("/proc/nowhere/f.jsonl", []),
        lambda: ensure_writable_folder(tmp_path / "file"),
        lambda: ensure_writable_folder("/proc/nowhere"),
    ):
        with pytest.raises(ContrastRMError, match=r"^cannot write .*; choose a folder that you can write$"):
            write()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]
    assert ensure_writable_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


# --- the table of biases, and the way into a process


def test_the_bias_table() -> None:
    assert (len(INJECTABLE), len(EVALUABLE), len(PAIRWISE)) == (7, 10, 9)
    assert set(EVALUABLE) - set(PAIRWISE) == {"refinement-aware"}
    assert set(PAIRWISE) - set(INJECTABLE) == {"gender", "race"}
    assert eval_file_name("length") == "length_bias.jsonl"
    assert all(get_bias(bias.name) is bias for bias in BIASES)
    with pytest.raises(ContrastRMError, match=r"unknown bias 'lenght'; known: length, .*refinement-aware"):
        get_bias("lenght")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def user_error(argv: list[str] | None) -> int:
        raise ContrastRMError("no such thing; use another")

    def interrupted(argv: list[str] | None) -> int:
        raise KeyboardInterrupt

    def bug(argv: list[str] | None) -> int:
        raise ZeroDivisionError

    for main, code in ((lambda argv: 0, 0), (lambda argv: 3, 3), (user_error, 2), (interrupted, 130)):
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main)
        assert exit_info.value.code == code
    assert capsys.readouterr().err == "error: no such thing; use another\ninterrupted\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(bug)


def run_as_a_process(code: str, *arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", f"from codes.common.cli import run\n{code}", *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPO), **environment}, capture_output=True, timeout=60
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_cannot_show_is_escaped(encoding: str) -> None:
    done = run_as_a_process("run(lambda argv: print('é [–] 🙂') or 0)", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    first = "é".encode(encoding, "backslashreplace")
    assert done.stdout == first + b" [\\u2013] \\U0001f642\n"


def test_an_argument_that_is_no_text_is_refused_before_any_work() -> None:
    done = run_as_a_process("run(lambda argv: print('worked') or 0)", "--output_dir", b"/tmp/caf\xe9")
    assert (done.returncode, done.stdout) == (2, b"")
    assert (
        done.stderr.startswith(b"error: the argument '/tmp/caf\\udce9' is no UTF-8 text")
        and done.stderr.count(b"\n") == 1
    )


@pytest.mark.parametrize(
    "code",
    [
        "def main(argv): raise OSError(28, 'No space left on device', '/tmp/x')",
        "import tempfile\ndef main(argv):\n  tempfile._candidate_tempdir_list = lambda: ['/no/such']\n  tempfile.mkstemp()",
    ],
    ids=["full", "no-folder"],
)
def test_no_room_for_temporary_files_is_one_line(code: str) -> None:
    done = run_as_a_process(f"{code}\nrun(main)")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"error: No ") and b"set TMPDIR" in done.stderr


def test_every_entry_point_is_run_the_same_way() -> None:
    files = [file for folder in ("codes", "data", "scripts") for file in (REPO / folder).rglob("*.py")]
    scripts = [file for file in files if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    others = {file.name for file in scripts if not file.read_text(encoding="utf-8").endswith("    run(main)\n")}
    # It looks at a Python that may lack everything that the others import.
    assert len(scripts) > 15 and others == {"check_environment.py"}


def test_a_long_finding_is_shortened() -> None:
    error = RecordError("f", 1, "chosen", "x" * 5000, "a text")
    assert len(str(error)) < 150 and (error.line, error.field, error.path) == (1, "chosen", "f")


def test_whole_conversation_in_messages_is_not_a_second_prompt(write_rows: Callable[..., Path]) -> None:
    # The shape of binarised preference sets on the hub: `messages` repeats `chosen`.
    prompt = [{"role": "user", "content": "why?"}]
    chosen = [*prompt, {"role": "assistant", "content": "so"}]
    rejected = [*prompt, {"role": "assistant", "content": "no"}]
    path = write_rows("hub.jsonl", [{"prompt": "why?", "messages": chosen, "chosen": chosen, "rejected": rejected}])
    records, _ = read_preference_file(path)
    assert (records[0].messages, records[0].chosen, records[0].rejected) == (prompt, "so", ["no"])


def test_two_prompts_that_differ_are_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows("two.jsonl", [{"question": "why?", "prompt": "how?", "chosen": "so", "rejected": "no"}])
    with pytest.raises(ContrastRMError, match="same prompt as in 'question'"):
        read_preference_file(path)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"question": "why?", "chosen": "so", "rejected": "no"}\n')
    assert read_preference_file(path)[0][0].question == "why?"


def test_columns_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    import pyarrow.parquet

    for value in (b"\x00", datetime.date(2026, 1, 1), float("nan")):
        table = pyarrow.Table.from_pylist([GOOD | {"when": value}])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ContrastRMError, match=r"a\.parquet:1: field 'when'.*what JSON can hold"):
            read_preference_file(tmp_path / "a.parquet")


# --- one by one ---------------------------------------------------------------------------------------------------------


def streamed_rows() -> list[str]:
    rows = [{"id": str(number), "question": "q", "chosen": "c", "rejected": ["r"]} for number in range(6)]
    lines = [json.dumps(row) for row in rows]
    lines[2] = "{"
    lines[4] = lines[1]  # an id that occurs twice
    return lines


def test_a_checked_file_streams_its_good_rows_again_and_again(write_rows: WriteRows) -> None:
    path = write_rows("rows.jsonl", streamed_rows())
    seen: list[str] = []
    checked = check_preference_file(path, max_bad_rows=2, see=lambda record: seen.append(record.id))
    assert seen == ["0", "1", "3", "5"] == [record.id for record in checked] == [record.id for record in checked]
    assert (len(checked), checked.report.n_rows, checked.report.n_good) == (4, 6, 4)
    assert checked.bad_lines == {3, 5} and len(checked.report.bad) == 2
    whole, report = read_preference_file(path, max_bad_rows=2)
    assert list(checked) == whole and report.n_good == 4
    # Nothing after the last record inside the limit is looked at.
    assert [record.id for record in check_preference_file(path, limit=2)] == ["0", "1"]
    for allowed, where in ((0, "3"), (1, "5")):
        with pytest.raises(ContrastRMError, match=rf"rows\.jsonl:{where}:"):
            check_preference_file(path, max_bad_rows=allowed)
    with pytest.raises(ContrastRMError, match="no usable row"):
        check_preference_file(write_rows("none.jsonl", ["{"]), max_bad_rows=1)
    with pytest.raises(RecordError, match=":3:"):
        list(iter_preference_file(path))


def test_a_file_written_bit_by_bit_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with open_atomic(path) as handle:
        write_row(handle, {"a": "é"})
        assert not path.exists()
        write_row(handle, [1])
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n[1]\n'
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as handle:
        write_row(handle, "half")
        raise KeyboardInterrupt
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"] and path.read_text().endswith("[1]\n")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the file size stands for the full disk: both come as an OSError of a write.
    code = """
import resource, sys
from codes.common.records import write_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from codes.common.cli import run
run(lambda argv: write_jsonl(sys.argv[1], ({"text": "x" * 999} for _ in range(50))) or 0)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_margins_are_parallel_to_the_rejected() -> None:
    two = GOOD | {"rejected": ["no", "never"]}
    assert parse(two).margins == [] == parse(two | {"margin": [None]}).margins
    assert parse(two | {"margin": 1}).margins == [1.0, 1.0]
    # Answers that were appended later have none.
    record = parse(two | {"margin": [0.5]})
    assert record.margins == [0.5, None] == parse(record.to_row()).margins
    for bad in ([1, 2, 3], "1", True, [float("nan")], [1e7], {}):
        with pytest.raises(RecordError, match="margin"):
            parse(two | {"margin": bad})
