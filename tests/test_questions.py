"""The same question: one answer for what is held out, for contamination and for the clusters of intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from codes.common.questions import question_key, question_words, row_question
from codes.evaluate.metrics import PairOutcome
from codes.train.contamination import ContaminationIndex
from codes.train.held_out import choose_questions

SAME = {
    "layout": "What  is\tit",
    "case": "WHAT IS IT",
    "punctuation": "\u00bfWhat - is it?!",
    "quotes": "\u201cWhat is it\u201d",
    "width": "\uff37hat is it",
    "blank": "What\u00a0is it",
    "hidden": "Wh\u00adat is\u200b it\u202e",
    "picture": "What is it \U0001f937\u200d\u2640\ufe0f",
}


@pytest.mark.parametrize("spelled", SAME.values(), ids=SAME)
def test_one_question_for_every_user(spelled: str, tmp_path: Path) -> None:
    plain = "What is it"
    assert question_key(spelled) == question_key(plain) == "what is it"
    others = [f"another question {number}" for number in range(40)]
    for seed in range(3):
        split = choose_questions([plain, *others], 0.5, seed)
        assert split.holds_out(spelled) == split.holds_out(plain)
        assert choose_questions([plain, spelled, *others], 0.5, seed) == split
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": plain}) + "\n")
    ((kind, _, _, places),) = ContaminationIndex([tmp_path / "eval.jsonl"]).meet(spelled)
    assert kind == "exact" and places == (f"{tmp_path}/eval.jsonl:1",)
    assert (
        PairOutcome(1, spelled, (1.0, 0.0), (1.0, 0.0)).cluster == PairOutcome(2, plain, (1.0, 0.0), (1.0, 0.0)).cluster
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f \u0939\u0948", "\u0915\u093e \u0939\u0948"),  # Hindi: only the vowel sign differs
        ("\u0e1b\u0e49\u0e32", "\u0e1b\u0e32"),  # Thai: only the tone mark differs
        ("\u70ba\u4ec0\u9ebc\uff1f", "\u4ec0\u9ebc\uff1f"),
        ("Stra\u00dfe 5", "Stra\u00dfe 6"),
        ("na\u00efve", "naive"),
        ("???", "!!!"),
    ],
)
def test_other_questions_stay_others(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)


def test_spelling_of_a_word() -> None:
    assert question_key("STRASSE") == question_key("Stra\u00dfe") and question_key("na\u00efve") == question_key(
        "nai\u0308ve"
    )
    assert question_words("Is \u5bb6\u732b a_cat?") == ["is", "\u5bb6", "\u732b", "a", "cat"]
    # Folded twice is folded once.
    assert all(
        question_key(question_key(text)) == question_key(text) for text in (*SAME.values(), "\u1fb3\u0345 \u0130")
    )
    assert question_key(" ??? ") == "???"


def test_the_users_words_are_the_question() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    assert row_question({"question": "Why?"}) == row_question({"prompt": [user]}) == "Why?"
    assert row_question({"messages": [system, user]}) == "Why?"
    assert row_question({"question": "", "prompt": "Why?"}) == "Why?"
    for row in ({}, {"question": 5}, {"prompt": [{"role": "user"}]}, [], {"answer": "Why?"}):
        assert row_question(row) is None


def test_a_question_with_a_system_text_is_no_other_question(
    write_rows: Callable[[str, Sequence[Any]], Path], tiny_base_dir: Path, tmp_path: Path
) -> None:
    """Held-out questions do not stand in training, up to a question mark or under a system prompt."""
    from codes.train.train_reward_model import main

    rows = []
    for number in range(20):
        answers = {"chosen": f"because it sat {number}", "rejected": ["it is red"]}
        rows.append({"id": f"a{number}", "question": f"why is cat {number} on the mat?"} | answers)
        rows.append({"id": f"b{number}", "system": "be brief", "question": f"Why is cat {number} on the mat"} | answers)
    out = tmp_path / "out"
    places = ["--model_path", tiny_base_dir, "--train_file", write_rows("a.jsonl", rows), "--output_dir", out]
    flags = ["--cache_dir", tmp_path / "cache", "--held_out_share", "0.3", "--max_steps", "1", "--precision", "fp32"]
    assert main([str(word) for word in (*places, *flags, "--report_to", "none")]) == 0
    held = {json.loads(line)["id"] for line in (out / "held_out.jsonl").read_text().splitlines()}
    assert len(held) == 12 and {name[1:] for name in held if name[0] == "a"} == {
        name[1:] for name in held if name[0] == "b"
    }
