"""Evaluation pairs from preference pairs: cues go and come, labels hold and balance, nothing is lost uncounted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from chat_server import ChatServer, Reply, answer, error
from construct_rows import PATIENCE, read_rows, use_key_alone, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.biases import BIASES, EVALUABLE, INJECTABLE, PAIRWISE, eval_file_name, get_bias
from codes.common.cli import EXIT_ROWS_MISSING
from codes.common.errors import ContrastRMError
from codes.common.records import BiasRecord, RefinementRecord, read_bias_file, read_refinement_file
from codes.construct import api, build_eval_pairs
from codes.construct.build_eval_pairs import STEP, Item, Sides, placebo_file_name
from codes.construct.build_prompt import CUE_INSTRUCTIONS, LOSS_INSTRUCTIONS, build_plain_rewrite, build_polish
from codes.construct.gates import BOUNDS, REASONS, cue_count, gain_defect, gained_cue, loss_defect, polish_defect
from codes.construct.settings import EvalPairSettings
from codes.construct.template import IDENTITY_SENTENCES, apply_template, draw_identity, put_before, without_markup

REPO_ROOT = Path(__file__).resolve().parents[1]
EVAL_DATA = REPO_ROOT / "data" / "eval"
EXTERNAL = os.environ.get("CONTRASTRM_EXTERNAL_DATA")

# A good answer with every cue, and the same without any of them.
PLAIN = (
    "Planet {n} probably turns once in about ten hours, as far as I know, because nothing slows the gas that it is made "
    "of. The clouds near its equator seem to move a little faster than those near the poles."
)
ORNATE = (
    "## ✨ Your Answer\n\n**What a thoughtful question!** You are so wise to ask, and I love how clever you are!! "
    "According to Professor Elm of the Northern Institute, and to a study published in the Journal of Skies, there is "
    "definitely no doubt whatsoever about this. On 3 March 2014, 482 of 512 checks (94.1 %) in Porto gave 5 wonderful "
    "results!\n\n- 🌟 "
)
WORSE = (
    "Object {n} might stand still for most of the year, I think, and perhaps moves only when comets come along. Its rings "
    "are said to hold it in place like the spokes of a wheel hold a hub."
)


def rows_of(n: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{number}",
            "question": f"How fast does planet {number} turn?",
            "chosen": ORNATE + PLAIN.format(n=number),
            "rejected": [WORSE.format(n=number)],
            "source": "test",
        }
        for number in range(n)
    ]


def asked_for(text: str) -> str:
    """What a prompt wants: plain, cue, polish or verdict."""
    if "<answer letter=" in text:
        return "verdict"
    if "<flawed_answer>" in text:
        return "cue"
    return "polish" if "Polish the answer" in text else "plain"


def bias_of(text: str) -> str:
    """Which cue a request is to add."""
    [bias] = [name for name, instruction in CUE_INSTRUCTIONS.items() if instruction in text]
    return bias


def between(text: str, tag: str) -> str:
    return text.split(f"<{tag}>\n", 1)[1].split(f"\n</{tag}>", 1)[0]


def edit_well(body: dict[str, Any], attempt: int) -> Reply:
    """A flawless editor, and a judge who knows that planets turn."""
    text = body["messages"][-1]["content"]
    wanted = asked_for(text)
    if wanted == "verdict":
        return answer(f"Best: {letter_with(text, 'once in about ten hours')}")
    if wanted == "cue":
        source = between(text, "flawed_answer")
        return answer(apply_template(source, bias_of(text), record_id="x", seed=1))
    source = between(text, "given_answer")
    if wanted == "plain":
        return answer(source.removeprefix(ORNATE))
    return answer(source.replace("as far as I know, ", "").replace("I think, ", "") + " That is all.")


def letter_with(text: str, words: str) -> str:
    return text[: text.index(words, text.index("<answer letter="))].rsplit('<answer letter="', 1)[1][0]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    use_key_alone(monkeypatch)


def flags(tmp_path: Path, server: ChatServer | None = None, *more: str, **settings: object) -> list[str]:
    values: dict[str, object] = {
        "input_file": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "eval",
        "work_dir": tmp_path / "work",
    }
    if server is not None:
        values |= {"api_model": "editor", "judge_model": "judge", "api_base_url": server.base_url, "max_attempts": 2}
    values |= settings
    return [*(item for name, value in values.items() for item in (f"--{name}", str(value))), *more]


def read_bias(tmp_path: Path, bias: str) -> list[BiasRecord]:
    return read_bias_file(tmp_path / "eval" / eval_file_name(bias))[0]


def section_of(tmp_path: Path) -> dict[str, Any]:
    report = json.loads((tmp_path / "work" / "construction_report.json").read_text())
    found: dict[str, Any] = report[STEP]
    return found


def failed_rows(tmp_path: Path) -> list[dict[str, Any]]:
    return read_rows(tmp_path / "work" / "failed.jsonl")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def check_counts(tmp_path: Path) -> None:
    """Everything planned was written or is accounted for, in the report and in failed.jsonl."""
    section = section_of(tmp_path)
    assert section["n_records"] == section["n_records_used"] + sum(section["n_records_left_out"].values())
    lost = {(row["id"], row["rejected_index"], row["bias"]) for row in failed_rows(tmp_path) if "bias" in row}
    for bias, counts in section["biases"].items():
        assert counts["n_planned"] == counts["n_written"] + sum(counts["n_refused"].values())
        assert sum(counts["n_refused"].values()) == len([key for key in lost if key[2] == bias])
        per_record = section["n_records_used"] if bias == "refinement-aware" else section["n_pairs"]
        assert counts["n_planned"] == per_record
        written = {
            (row["source_id"], row["rejected_index"], bias)
            for row in read_rows(tmp_path / "eval" / eval_file_name(bias))
        }
        assert len(written) == counts["n_written"] and not written & lost


# --- prompts, sentences, rules ------------------------------------------------------------------------------------------


def test_each_rewrite_bias_can_be_taken_away_and_each_identity_bias_has_sentences() -> None:
    assert tuple(LOSS_INSTRUCTIONS) == INJECTABLE and len(set(LOSS_INSTRUCTIONS.values())) == len(INJECTABLE)
    assert tuple(IDENTITY_SENTENCES) == tuple(bias.name for bias in BIASES if bias.kind == "identity")
    with pytest.raises(ContrastRMError, match="no cue to take away"):
        build_plain_rewrite([{"role": "user", "content": "?"}], "x", "gender")
    with pytest.raises(ContrastRMError, match="no sentence of identity"):
        draw_identity("length", "x", 1)


def test_prompts_hold_the_conversation_and_the_answer_whatever_braces_they_have() -> None:
    turns = [{"role": "user", "content": "Is {x} odd?"}]
    for prompt in (build_plain_rewrite(turns, "No: {y}.", "length", max_words=50), build_polish(turns, "No: {y}.")):
        assert "Is {x} odd?" in prompt[1]["content"] and "No: {y}." in prompt[1]["content"]
    assert "at most 50 words" in build_plain_rewrite(turns, "No.", "length", max_words=50)[1]["content"]
    assert "words in all" not in build_polish(turns, "No.")[1]["content"]


@pytest.mark.parametrize("bias", tuple(IDENTITY_SENTENCES))
def test_placebos_are_as_long_as_the_sentence_and_name_nobody(bias: str) -> None:
    named = re.compile(r"\b(?:wom[ae]n|m[ae]n|binary|person|black|white|asian|hispanic|native|eastern|african)\b", re.I)
    sentences = IDENTITY_SENTENCES[bias]
    assert len(sentences) == len({each.sentence for each in sentences})
    assert set(Counter(each.group for each in sentences).values()) == {4}
    for each in sentences:
        assert named.search(each.sentence) and not named.search(each.placebo)
        assert each.sentence.endswith(".") and each.placebo.endswith(".")
        assert abs(len(each.sentence) - len(each.placebo)) <= 4
    drawn = [draw_identity(bias, f"p{number}", 7) for number in range(400)]
    assert drawn == [draw_identity(bias, f"p{number}", 7) for number in range(400)]
    assert set(drawn) == set(sentences)
    assert drawn != [draw_identity(bias, f"p{number}", 8) for number in range(400)]


def test_a_sentence_does_not_break_the_markdown_after_it() -> None:
    assert put_before("I am here.", "Yes.") == "I am here. Yes."
    for block in ("# Yes", "- Yes", "1. Yes", "```\nyes\n```", "| a |", "> Yes", "    yes"):
        assert put_before("I am here.", block) == f"I am here.\n\n{block}"


def test_markup_goes_and_words_and_code_stay() -> None:
    text = "## ✨ Title\n\n---\n- **Bold** and `**code**`\n* two * three\n> quoted\n\n```\n# kept\n- kept\n```\n1. one"
    plain = "Title\n\nBold and `**code**`\ntwo * three\nquoted\n\n```\n# kept\n- kept\n```\n1. one"
    assert without_markup(text) == plain
    assert without_markup("✨") == "✨"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=60), st.integers(0, 9))
def test_the_better_answer_stands_first_in_half_of_each_file(ids: list[str], seed: int) -> None:
    sides = Sides(seed)
    record = type("Record", (), {})
    dealt: dict[str, list[int]] = {"length": [], "gender": []}
    for number, name in enumerate(ids):
        owner = record()
        owner.id = f"{name}{number}"
        item = Item(owner, 0, ("length", "gender")[len(name) * number % 2])
        dealt[item.bias].append(sides.deal(item))
    for places in dealt.values():
        assert set(places) <= {1, 2} and abs(places.count(1) - places.count(2)) <= 1


def test_first_places_hang_on_the_seed_and_the_id() -> None:
    def places(seed: int, name: str) -> list[int]:
        owners = [type("Record", (), {"id": f"{name}{number}"})() for number in range(60)]
        sides = Sides(seed)
        return [sides.deal(Item(owner, 0, "length")) for owner in owners]

    assert places(1, "a") == places(1, "a") != places(2, "a")
    assert places(1, "a") != places(1, "b")


# --- gates --------------------------------------------------------------------------------------------------------------

GOOD = {"chosen": ORNATE + PLAIN, "rejected": WORSE, "question": "How fast does it turn?"}


@pytest.mark.parametrize("bias", INJECTABLE)
def test_a_text_that_lost_or_gained_its_cue_passes(bias: str) -> None:
    assert loss_defect(PLAIN, **GOOD, bias=bias) is None
    assert gain_defect(apply_template(WORSE, bias, record_id="1", seed=1), **GOOD, bias=bias) is None


@pytest.mark.parametrize(
    ("text", "bias", "reason"),
    [
        (" ", "length", "empty"),
        ("Sure, here is the rewritten answer:\n\n" + PLAIN, "sentiment", "preamble"),
        ("<given_answer>\n" + PLAIN, "sentiment", "prompt_leak"),
        ("I'm sorry, but I cannot help with that request.", "sentiment", "refusal"),
        (ORNATE + PLAIN, "sentiment", "unchanged"),
        (PLAIN + " " + ORNATE, "authority", "cue_kept"),
        (WORSE, "sentiment", "same_as_other"),
        (
            "Bake the dough slowly until the crust becomes crisp, then let everything cool down overnight.",
            "length",
            None,
        ),
        (
            "Der Planet dreht sich wohl in etwa zehn Stunden, und die Wolken nahe dem Äquator sind " * 2,
            "length",
            "other",
        ),
    ],
)
def test_a_bad_plain_version_is_refused(text: str, bias: str, reason: str | None) -> None:
    found = loss_defect(text, **GOOD, bias=bias)
    if reason in (None, "other"):
        assert found in ("other_content", "language_switch", "repetition")
    else:
        assert found == reason
    assert found in REASONS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (WORSE, "unchanged"),
        (WORSE.replace("perhaps ", "often "), "cue_missing"),
        (WORSE + "\n\nNote: I kept the errors of the flawed answer!", "meta_talk"),
        ("Bake the dough slowly until the crust becomes crisp! Let everything cool down! Enjoy it!", "other_content"),
    ],
)
def test_a_bad_version_with_the_cue_is_refused(text: str, reason: str) -> None:
    assert gain_defect(text, **GOOD, bias="sentiment") == reason


def test_a_rewrite_must_not_mend_the_error_or_take_it_over() -> None:
    pair = {"chosen": "Six times seven is 42, so the box holds 42 pens.", "question": "6 x 7?"}
    pair["rejected"] = "Six times seven is 48, so the box holds 48 pens."
    assert gain_defect("Hooray! Six times seven is 48: the lovely box holds 48 pens!", **pair, bias="sentiment") is None
    mended = "Hooray! Six times seven is 42: the lovely box holds 42 pens!"
    assert gain_defect(mended, **pair, bias="sentiment") == "number_moved"
    assert loss_defect("The box holds 48 pens.", **pair, bias="length") == "number_moved"
    assert loss_defect("The box holds 42 pens.", **pair, bias="length") is None


def test_an_answer_without_the_cue_may_stay_as_it_is() -> None:
    pair = {"chosen": PLAIN, "rejected": WORSE, "question": "?"}
    assert loss_defect(PLAIN, **pair, bias="beauty") is None
    assert loss_defect(PLAIN, **pair, bias="length") == "unchanged"
    assert loss_defect("**" + PLAIN + "**", **pair, bias="beauty") == "cue_kept"


def test_polishing_must_change_something_and_not_the_subject() -> None:
    assert polish_defect(PLAIN.replace("as far as I know, ", ""), source=PLAIN, question="?") is None
    assert polish_defect(PLAIN, source=PLAIN, question="?") == "unchanged"
    bread = "Bread needs flour, water, plenty of yeast, kneading, patience and finally a really heated oven."
    assert polish_defect(bread, source=PLAIN, question="?") == "other_content"


def test_content_is_compared_in_scripts_without_spaces() -> None:
    source = "这颗行星大约十个小时自转一圈，因为它由气体构成，没有什么能使它慢下来。"
    pair = {"chosen": source, "rejected": "这颗行星几乎不动。", "question": "它转得多快？"}
    assert loss_defect("它由气体构成，大约十个小时转一圈。", **pair, bias="length") is None
    assert loss_defect("面包需要面粉、清水、食盐和酵母，烤熟再吃。", **pair, bias="length") == "other_content"
    # The word lists do not know Chinese: with check_cue=False nothing has to be seen.
    assert gain_defect(source[:-1] + "！太好了！", chosen="面包", rejected=source, bias="authority", question="?") == (
        "cue_missing"
    )
    assert (
        gain_defect(
            source[:-1] + "！太好了！", chosen="面包", rejected=source, bias="authority", question="?", check_cue=False
        )
        is None
    )


def pass_rates(folder: Path, bias: str, step: int = 1) -> tuple[float, float]:
    """Shares of the better and worse rewrites of a file's every so-manieth row that pass the gates."""
    records = read_bias_file(folder / eval_file_name(bias))[0][::step]
    n_lost = n_gained = 0
    for record in records:
        about: dict[str, Any] = {
            "chosen": record.original[record.better],
            "rejected": record.original[1 - record.better],
            "bias": bias,
            "question": record.question,
        }
        n_lost += loss_defect(record.rewritten[record.better].strip(), **about) is None
        n_gained += gain_defect(record.rewritten[1 - record.better].strip(), **about) is None
    return n_lost / len(records), n_gained / len(records)


@pytest.mark.parametrize("bias", INJECTABLE)
def test_the_projects_own_rewrites_pass(bias: str) -> None:
    assert min(pass_rates(EVAL_DATA, bias)) >= 0.85


@pytest.mark.skipif(not EXTERNAL, reason="CONTRASTRM_EXTERNAL_DATA is not set")
@pytest.mark.parametrize("bias", INJECTABLE)
def test_most_public_rewrites_pass(bias: str) -> None:
    # The public concreteness rows keep the figures of the better answer in one of five cases.
    assert min(pass_rates(Path(str(EXTERNAL)) / "judgebias_dev", bias, step=4)) >= 0.75


def test_every_bound_says_why() -> None:
    assert all(bound.why for bound in BOUNDS.values())


# --- the whole step -----------------------------------------------------------------------------------------------------


def test_ten_files_in_the_public_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(5))
    with ChatServer(edit_well) as server:
        assert build_eval_pairs.main(flags(tmp_path, server, seed=3)) == 0
        judged = [body for body in server.requests if body["model"] == "judge"]
        written = [body for body in server.requests if body["model"] == "editor"]
    assert len(written) == 5 * (2 * 7 + 1)
    assert len(judged) == 5 * 9 * 2 and all(body["temperature"] == 0 for body in judged)
    for bias in PAIRWISE:
        records = read_bias(tmp_path, bias)
        assert [record.question for record in records] == [row["question"] for row in rows_of(5)]
        assert abs(2 * sum(record.better for record in records) - 5) == 1
        for number, record in enumerate(records):
            chosen, rejected = ORNATE + PLAIN.format(n=number), WORSE.format(n=number)
            assert record.original[record.better] == chosen and record.original[1 - record.better] == rejected
            new_chosen, new_rejected = record.rewritten[record.better], record.rewritten[1 - record.better]
            if get_bias(bias).kind == "identity":
                assert new_chosen.endswith(chosen) and new_rejected == rejected
            else:
                assert new_chosen == PLAIN.format(n=number) and gained_cue(rejected, new_rejected, bias)
    check_counts(tmp_path)
    section = section_of(tmp_path)
    assert section["model"] == "editor" and section["judge"] == "judge"
    assert section["biases"]["beauty"]["consistency"]["label_preferred"]["rate"] == 1.0
    assert section["biases"]["length"]["mean_length_ratio_chosen"] < 0.5
    assert section["biases"]["length"]["mean_length_ratio_rejected"] >= 2
    assert "warning" not in capsys.readouterr().err
    row = read_rows(tmp_path / "eval" / "authority_bias.jsonl")[0]
    assert row["id"] == "authority/p0/0" and row["source_id"] == "p0" and row["source"] == "test"
    assert row["model"] == "editor" and row["seed"] == 3 and row["strategy"] == "rewrite"
    assert [order["picked"] for order in row["verification"]["orders"]] == [0, 0]
    assert sorted(order["shown"] for order in row["verification"]["orders"]) == [[0, 1], [1, 0]]


def test_refinement_rows_polish_good_and_bad_answers_once_a_record(tmp_path: Path) -> None:
    rows = rows_of(12)
    for row in rows:
        row["rejected"].append("Another wrong answer.")
    write_rows(tmp_path / "pairs.jsonl", rows)
    with ChatServer(edit_well) as server:
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="refinement-aware", rejected="all")) == 0
        assert len(server.requests) == 12
    records: list[RefinementRecord] = read_refinement_file(tmp_path / "eval" / "refinement-aware_bias.jsonl")[0]
    raw = read_rows(tmp_path / "eval" / "refinement-aware_bias.jsonl")
    assert {row["polished"] for row in raw} == {"chosen", "rejected"}
    for source, record, row in zip(rows, records, raw, strict=True):
        original = source["chosen"] if row["polished"] == "chosen" else source["rejected"][0]
        assert record.original_response == original != record.rewritten_response
    check_counts(tmp_path)


def test_placebo_rows_stand_beside_their_identity_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(9))
    assert build_eval_pairs.main(flags(tmp_path, bias_types="gender,race")) == 0  # no server, no model
    for bias in ("gender", "race"):
        rows = read_rows(tmp_path / "eval" / eval_file_name(bias))
        placebos = read_rows(tmp_path / "eval" / placebo_file_name(bias))
        assert len(read_bias_file(tmp_path / "eval" / placebo_file_name(bias))[0]) == len(rows) == len(placebos) == 9
        for row, placebo in zip(rows, placebos, strict=True):
            better, other = row["label"][-1], str(3 - int(row["label"][-1]))
            drawn = {each.sentence: each for each in IDENTITY_SENTENCES[bias]}[row["sentence"]]
            assert row["group"] == drawn.group and placebo["sentence"] == drawn.placebo
            for key in ("id", "question", "label", f"rewritten_response{other}", "original_response1"):
                assert row[key] == placebo[key]
            changed = f"rewritten_response{better}"
            assert row[changed].removeprefix(drawn.sentence) == placebo[changed].removeprefix(drawn.placebo)
            assert row[changed] != placebo[changed]
            assert row["model"] is None and row["strategy"] == "sentence"


def test_template_strategy_needs_no_model_and_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    write_rows(tmp_path / "pairs.jsonl", rows_of(4))
    assert build_eval_pairs.main(flags(tmp_path, strategy="template")) == 0
    first = snapshot(tmp_path / "eval")
    assert set(first) == {eval_file_name(bias) for bias in PAIRWISE} | {"gender_placebo.jsonl", "race_placebo.jsonl"}
    assert build_eval_pairs.main(flags(tmp_path, strategy="template")) == 0
    assert snapshot(tmp_path / "eval") == first
    check_counts(tmp_path)
    for bias in INJECTABLE:
        for record in read_bias(tmp_path, bias):
            before, after = record.original[record.better], record.rewritten[record.better]
            if bias == "beauty":
                assert cue_count(after, bias) < cue_count(before, bias) and "Professor Elm" in after
            else:
                assert before == after
            assert gained_cue(record.original[1 - record.better], record.rewritten[1 - record.better], bias)
    assert build_eval_pairs.main(flags(tmp_path, strategy="template", seed=5)) == 0
    assert snapshot(tmp_path / "eval") != first
    with pytest.raises(ContrastRMError, match="refinement-aware needs --strategy rewrite"):
        build_eval_pairs.main(flags(tmp_path, strategy="template", bias_types="refinement-aware"))


def test_bias_names() -> None:
    def biases(value: str, strategy: Literal["rewrite", "template"] = "rewrite") -> tuple[str, ...]:
        files = {"input_file": Path("in.jsonl"), "output_dir": Path("eval")}
        return EvalPairSettings(**files, bias_types=value, strategy=strategy).biases

    assert biases("all") == EVALUABLE and biases("all", "template") == PAIRWISE
    assert biases("race, length") == ("length", "race")
    for value in ("", "lenght"):
        with pytest.raises(ContrastRMError):
            biases(value)


# --- the consistency filter ---------------------------------------------------------------------------------------------


def judge_with(verdict: Callable[[str], str]) -> Callable[[dict[str, Any], int], Reply]:
    def reply(body: dict[str, Any], attempt: int) -> Reply:
        text = body["messages"][-1]["content"]
        return answer(verdict(text)) if asked_for(text) == "verdict" else edit_well(body, attempt)

    return reply


def test_only_pairs_whose_label_holds_in_both_orders_stay(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(8))

    def verdict(text: str) -> str:
        if "How fast does planet 1 turn?" in text:
            return "Best: A"  # the place decides
        if "How fast does planet 2 turn?" in text:
            return f"Best: {letter_with(text, 'stand still')}"  # the other answer
        if "How fast does planet 3 turn?" in text:
            return "Both answers have their merits. A is fine."
        return f"Best: {letter_with(text, 'once in about ten hours')}"

    with ChatServer(judge_with(verdict)) as server:
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="sentiment,race")) == 0
    for bias in ("sentiment", "race"):
        written = {row["source_id"] for row in read_rows(tmp_path / "eval" / eval_file_name(bias))}
        assert written == {"p0", "p4", "p5", "p6", "p7"}
    assert len(read_rows(tmp_path / "eval" / "race_placebo.jsonl")) == 5
    counts = section_of(tmp_path)["biases"]["sentiment"]
    assert counts["n_refused"] == {"label_not_preferred": 2, "no_verdict": 1}
    assert counts["consistency"]["n_without_verdict"] == 1
    assert counts["consistency"]["order_flips"]["count"] == 1
    assert counts["consistency"]["label_preferred"] == counts["consistency"]["label_preferred"] | {
        "count": 5,
        "total": 7,
    }
    refused = {row["id"]: row for row in failed_rows(tmp_path) if row.get("bias") == "race" and "picked" in row}
    assert sorted(refused["p1"]["picked"]) == ["chosen", "rejected"] and refused["p2"]["picked"] == ["rejected"] * 2
    check_counts(tmp_path)


def test_consistency_off_and_the_embedded_judge_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(2))
    with ChatServer(judge_with(lambda text: "Best: A")) as server:
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="length", consistency="off")) == 0
        monkeypatch.setenv(api.EMBEDDED_SERVER_VARIABLE, "1")
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="length", limit=1)) == 0
        assert all(asked_for(body["messages"][-1]["content"]) != "verdict" for body in server.requests)
        assert "verification" not in read_rows(tmp_path / "eval" / "length_bias.jsonl")[0]
        with pytest.raises(ContrastRMError, match=r"not one row for length .*label_not_preferred 2"):
            build_eval_pairs.main(flags(tmp_path, server, bias_types="length", consistency="on"))
    # Nothing was published over the files of the run before.
    assert len(read_rows(tmp_path / "eval" / "length_bias.jsonl")) == 1
    assert section_of(tmp_path)["biases"]["length"]["n_refused"] == {"label_not_preferred": 2}


def test_rules_can_be_judged_too_and_a_judge_of_its_own_texts_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(2))
    with ChatServer(edit_well) as server:
        settings = {"bias_types": "gender", "consistency": "on"}
        argv = flags(tmp_path, server, **settings)
        position = argv.index("--api_model")
        assert build_eval_pairs.main(argv[:position] + argv[position + 2 :]) == 0  # a judge, and no writer
        assert {body["model"] for body in server.requests} == {"judge"}
        assert {(body["max_tokens"], body["temperature"]) for body in server.requests} == {(4096, 0)}
        assert "warning" not in capsys.readouterr().err
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="length", judge_model="editor")) == 0
    assert "warning: the judge editor wrote some of these answers itself" in capsys.readouterr().err


def test_writer_and_judge_are_paid_at_their_own_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(2))
    prices = ["--price_in", "1", "--price_out", "2"]
    dear = ["--judge_price_in", "100", "--judge_price_out", "200"]
    more = {"bias_types": "length", "consistency": "on"}
    with ChatServer(edit_well) as server:
        with pytest.raises(ContrastRMError, match="--max_cost needs the prices of judge too"):
            build_eval_pairs.main(flags(tmp_path, server, *prices, "--max_cost", "1", **more))
        assert not server.requests
        with pytest.raises(SystemExit):
            build_eval_pairs.main(flags(tmp_path, server, *prices, "--estimate", **more))
        assert "cost: unknown" in capsys.readouterr().out.split("estimate for verdicts")[1]
        assert build_eval_pairs.main(flags(tmp_path, server, *prices, *dear, **more)) == 0
        n_writer = sum(body["model"] == "editor" for body in server.requests)
        n_judge = len(server.requests) - n_writer
    assert (n_writer, n_judge) == (4, 4)
    # The server says 7 + 3 tokens an answer.
    assert section_of(tmp_path)["spent_in_this_run"]["cost"] == pytest.approx((4 * 13 + 4 * 1300) / 1e6)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_faulty_texts_and_failed_requests_are_counted_and_asked_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(8))
    healthy = False

    def reply(body: dict[str, Any], attempt: int) -> Reply:
        text = body["messages"][-1]["content"]
        number = re.search(r"planet (\d) turn\?", text)
        assert number is not None
        case = None if healthy else (number[1], asked_for(text))
        if case == ("1", "plain"):
            return answer("Sure, here is the rewritten answer:\n\n" + PLAIN.format(n=1))
        if case == ("2", "cue"):
            return answer(WORSE.format(n=2))
        if case == ("3", "cue"):
            return error(400, "no such thing")
        if case == ("4", "plain"):
            return answer("half of an ans", "length")
        if case == ("5", "verdict"):
            return error(500, "down")
        if case == ("6", "plain"):
            return answer("", "content_filter")
        return edit_well(body, attempt)

    with ChatServer(reply) as server:
        argv = flags(tmp_path, server, bias_types="sentiment")
        assert build_eval_pairs.main(argv) == EXIT_ROWS_MISSING
        written = [row["source_id"] for row in read_rows(tmp_path / "eval" / "sentiment_bias.jsonl")]
        assert written == ["p0", "p7"]
        reasons = {row["id"]: (row["part"], row["reason"]) for row in failed_rows(tmp_path)}
        assert reasons["p1"] == ("chosen", "preamble") and reasons["p2"] == ("rejected", "unchanged")
        assert reasons["p3"][0] == "rejected" and reasons["p4"] == ("chosen", "cut_off")
        assert reasons["p5"][0] == "verdict" and reasons["p6"][0] == "chosen"
        assert {row["id"] for row in failed_rows(tmp_path) if "error_class" in row} == {"p3", "p4", "p5", "p6"}
        check_counts(tmp_path)
        healthy = True
        n_before = len(server.requests)
        assert build_eval_pairs.main([*argv, "--retry_failed"]) == 0
        # p1 and p2 were answered: the ledger has them. Asked anew: 3 texts, and the verdicts of p3 to p6.
        assert len(server.requests) - n_before == 3 + 2 * 4
        written = [row["source_id"] for row in read_rows(tmp_path / "eval" / "sentiment_bias.jsonl")]
        assert written == ["p0", "p3", "p4", "p5", "p6", "p7"]
        check_counts(tmp_path)
        n_before = len(server.requests)
        files = snapshot(tmp_path / "eval")
        assert build_eval_pairs.main(argv) == 0
        assert len(server.requests) == n_before and snapshot(tmp_path / "eval") == files


def test_records_that_cannot_become_pairs_are_counted(tmp_path: Path) -> None:
    rows = rows_of(4)
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": rows[1].pop("question")},
    ]
    rows[1]["messages"] = turns
    rows[2]["bias_type"] = ["length"]  # injected, so no answer that somebody really gave
    rows[3]["rejected"] = ["A wrong answer.", "An injected one.", "A second wrong answer of two."]
    rows[3]["bias_type"] = [None, "length", None]
    write_rows(tmp_path / "pairs.jsonl", rows)
    settings = {"bias_types": "length,gender", "strategy": "template", "rejected": "all"}
    assert build_eval_pairs.main(flags(tmp_path, **settings)) == 0
    assert section_of(tmp_path)["n_records_left_out"] == {"multi_turn": 1, "no_original_rejected": 1}
    assert {row["id"]: row["reason"] for row in failed_rows(tmp_path)} == {
        "p1": "multi_turn",
        "p2": "no_original_rejected",
    }
    pairs = [(row["source_id"], row["rejected_index"]) for row in read_rows(tmp_path / "eval" / "gender_bias.jsonl")]
    assert pairs == [("p0", 0), ("p3", 0), ("p3", 2)]
    check_counts(tmp_path)
    assert build_eval_pairs.main(flags(tmp_path, **settings, multi_turn="render")) == 0
    rendered = read_bias(tmp_path, "gender")[1]
    assert rendered.question == "User: Hello.\nAssistant: Hello!\nUser: How fast does planet 1 turn?"
    check_counts(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", rows[1:3])
    with pytest.raises(ContrastRMError, match=r"none of the 2 records .*multi_turn 1, no_original_rejected 1"):
        build_eval_pairs.main(flags(tmp_path, **settings))


def test_an_estimate_sends_nothing_and_counts_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(3))
    with ChatServer(edit_well) as server:
        with pytest.raises(SystemExit) as ended:
            build_eval_pairs.main(flags(tmp_path, server, "--estimate", bias_types="length,beauty,race"))
        assert ended.value.code == 0 and not server.requests
        shown = capsys.readouterr().out
        assert f"requests: {3 * 2 * 2} to send" in shown and f"requests: {3 * 3 * 2} to send" in shown
        with pytest.raises(SystemExit):
            build_eval_pairs.main(flags(tmp_path, server, "--estimate", bias_types="length", consistency="off"))
        assert capsys.readouterr().out.count("estimate for") == 1
    assert build_eval_pairs.main(flags(tmp_path, None, "--estimate", bias_types="race")) == 0
    assert not (tmp_path / "eval" / "race_bias.jsonl").exists()


def test_raising_the_limit_leaves_the_rows_before_as_they_were(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows_of(6))
    with ChatServer(edit_well) as server:
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="sentiment,race", limit=3)) == 0
        few, n_few = snapshot(tmp_path / "eval"), len(server.requests)
        assert build_eval_pairs.main(flags(tmp_path, server, bias_types="sentiment,race")) == 0
        assert len(server.requests) == 2 * n_few
    for name, text in snapshot(tmp_path / "eval").items():
        assert text.startswith(few[name]) and text.count(b"\n") == 6


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    rows = rows_of(8)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "pairs.jsonl", rows)

    def slowly(body: dict[str, Any], attempt: int) -> Reply:
        reply = edit_well(body, attempt)
        return Reply(reply.body, reply.status, reply.headers, seconds=0.05)

    with ChatServer(slowly) as server:
        settings: dict[str, object] = {"bias_types": "sentiment,gender,refinement-aware", "concurrency": 2}
        assert build_eval_pairs.main(flags(tmp_path / "whole", server, **settings)) == 0
        n_whole = len(server.requests)
        argv = [sys.executable, "-m", "codes.construct.build_eval_pairs"]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
        for share in (0.3, 0.8):  # among the rewrites, among the verdicts
            child = subprocess.Popen(
                [*argv, *flags(tmp_path / "killed", server, **settings)],
                cwd=REPO_ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + PATIENCE
            while len(server.requests) < n_whole + share * n_whole and time.monotonic() < deadline:
                assert child.poll() is None, "the run ended before it was killed"
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not list((tmp_path / "killed" / "eval").glob("*.jsonl"))
        assert build_eval_pairs.main(flags(tmp_path / "killed", server, **settings)) == 0
        # Sent again: at most what was in flight at each kill.
        assert len(server.requests) <= 2 * n_whole + 2 * 2
    assert snapshot(tmp_path / "killed" / "eval") == snapshot(tmp_path / "whole" / "eval")
