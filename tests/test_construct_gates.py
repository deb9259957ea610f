"""The gates: each catches what it is named after, and lets nearly every good text through."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from construct_rows import words
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.biases import INJECTABLE, eval_file_name
from codes.common.records import iter_preference_file, read_bias_file
from codes.construct.gate_rates import HELD_OUT, OWN_DATA, cue_rates, read_pairs
from codes.construct.gates import (
    BOUNDS,
    CUES,
    REASONS,
    answer_defect,
    cue_count,
    gained_cue,
    main_language,
    nearly_equal,
    normalised,
    question_defect,
    shows_cue,
    similarity,
)

FOLDER = os.environ.get("CONTRASTRM_EXTERNAL_DATA")
REPO_ROOT = Path(__file__).resolve().parents[1]
GOOD = "The capital of Australia is Sydney, which has been the seat of government since 1901."
LOOP = "The answer is simple and it goes on. " * 20


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        (GOOD, None),
        ("Sure, boil the egg for two minutes and it will be hard.", None),
        ("Here is how to boil an egg: drop it into cold water.", None),
        ("Of course! Sydney is the capital, and a lovely one.", None),
        ("I'm sorry to hear that your plant is dying. Water it twice a day.", None),
        ("The original version of the song was recorded in 1971.", None),
        ("Style: a short, dry one. The capital is Sydney.", None),
        ("", "empty"),
        ("***", "empty"),
        ("Sure, here is the rewritten answer:\n\nSydney.", "preamble"),
        ("Sure! Here\u2019s the revised response: Sydney.", "preamble"),
        ("Here is a rewritten version of the flawed answer.\n\nSydney.", "preamble"),
        ("Okay, I will rewrite the response in a warmer tone. Sydney.", "preamble"),
        ("**Rewritten answer:** Sydney is the capital.", "preamble"),
        ("Rewritten Answer\n\nSydney is the capital.", "preamble"),
        ("Sydney is the capital.\n\nNote: I kept the errors of the original answer.", "meta_talk"),
        ("Sydney is the capital.\n\n(This response is intentionally incorrect.)", "meta_talk"),
        ("The user's request is about the capital of Australia.", "meta_talk"),
        ("Sydney is the capital. To go on, you can simply paste the rewritten answer into the chat.", "meta_talk"),
        ("Sydney.\n\nSubstance: every error of the answer stays.", "prompt_leak"),
        ("<flawed_answer>\nSydney.\n</flawed_answer>", "prompt_leak"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I cannot assist with this request.", "refusal"),
        ("As an AI language model, I don't have opinions.", "refusal"),
        ("<think>The user wants a wrong answer.</think> Sydney.", "reasoning_leak"),
        ("Sydney is the capital.<|im_end|>", "reasoning_leak"),
        (LOOP, "repetition"),
        (words("long", 3500), "too_long"),
    ],
)
def test_a_text_is_judged_by_its_form(text: str, defect: str | None) -> None:
    assert answer_defect(text) == defect
    assert defect is None or defect in REASONS


def test_a_copy_is_caught_whatever_its_layout() -> None:
    chosen = words("chosen", 60)
    one_word_less = chosen.rsplit(" ", 1)[0]
    assert answer_defect(f"**{chosen.upper()}!**", chosen=chosen) == "same_as_chosen"
    assert answer_defect(one_word_less, chosen=chosen) == "same_as_chosen"
    assert answer_defect(chosen, chosen="else", others=["other", one_word_less]) == "same_as_rejected"
    assert answer_defect(words("another", 60), chosen=chosen, others=[words("third", 60)]) is None
    assert not nearly_equal("The capital is Canberra.", "The capital is Sydney.")
    # The same words in another order are another text.
    assert not nearly_equal(chosen, " ".join(reversed(chosen.split())))


@given(st.lists(st.sampled_from("abcdefg"), max_size=30), st.lists(st.sampled_from("abcdefg"), max_size=30))
@settings(max_examples=60, deadline=None)
def test_similarity_is_a_symmetric_share(first: list[str], second: list[str]) -> None:
    one, two = " ".join(first), " ".join(second)
    assert 0 <= similarity(one, two) == similarity(two, one) <= 1
    assert similarity(one, one.upper()) == 1
    if len(first) > 21 and first != second:
        changed = [*first[:10], "word", *first[11:]]
        assert similarity(one, " ".join(changed)) >= BOUNDS["nearly_equal"].value


def test_a_rewrite_is_measured_against_its_source() -> None:
    source = words("source", 60)
    cues = "There is no doubt. "
    refusal = "I'm sorry, but I can't help with that. " + words("why", 10)
    assert answer_defect("Sydney.", rewritten_from=source) == "too_short"
    assert answer_defect(words("new", 60), rewritten_from=source, bias="length") == "cue_missing"
    assert answer_defect(words("new", 120), rewritten_from=source, bias="length") is None
    assert answer_defect(refusal, rewritten_from="Unfortunately I cannot help you with that request, sorry.") is None
    # One sentence more than a long source is a rewrite; nothing more is none.
    assert answer_defect(cues + source, others=[source], rewritten_from=source, bias="assertiveness") is None
    assert answer_defect(f"*{source}*", others=[source], rewritten_from=source, bias="authority") == "same_as_rejected"
    # Ornament may leave every word as it is.
    decorated = f"## Answer\n**{source}** \U0001f31f"
    assert answer_defect(decorated, others=[source], rewritten_from=source, bias="beauty") is None
    assert answer_defect(source, others=[source], rewritten_from=source, bias="beauty") == "same_as_rejected"


def test_a_refusal_is_right_in_no_record_but_one_about_refusing() -> None:
    refusal, answer = "I'm sorry, but I can't help with that.", "Prune the rose in spring, above an outward bud."
    assert answer_defect(refusal, chosen=answer, others=["Cut it in summer, at random."]) == "refusal"
    assert answer_defect(refusal, chosen=answer, others=["I cannot help with cutting tools of that kind."]) is None
    # The chosen answer refuses, so another refusal would be as right as it.
    assert answer_defect(refusal, chosen="I won't help with that.", others=["I can't provide it, sorry."]) == "refusal"


ENGLISH = (
    "This is the kind of text that is written by most of us when we have to answer which of the two it was and why."
)
GERMAN = (
    "Das ist die Art von Text, die von den meisten geschrieben wird, wenn sie auf eine Frage nicht gleich mit der Tür "
    "ins Haus fallen und sich Zeit nehmen."
)
SPANISH = "El texto que se escribe en los casos en que una persona no sabe lo que es, pero con el tiempo se da cuenta del error."


def test_another_language_or_script_is_a_switch() -> None:
    assert [main_language(text) for text in (ENGLISH, GERMAN, SPANISH)] == ["English", "German", "Spanish"]
    assert main_language("The capital.") is None
    russian = "Столица Австралии — это Сидней, и это всем известно."
    assert answer_defect(GERMAN, chosen=ENGLISH) == "language_switch"
    assert answer_defect(russian, chosen=ENGLISH) == "language_switch"
    assert (
        answer_defect("Sydney is the seat of it all. 答案是悉尼,这是众所周知的事实。", chosen=ENGLISH)
        == "language_switch"
    )
    # A language that the question uses, a name in its own script and a formula are none.
    assert answer_defect(SPANISH, chosen=ENGLISH, question=f"Translate: {SPANISH}") is None
    assert answer_defect("In Moscow (Москва) they write that α + β = π, and so do we here.", chosen=ENGLISH) is None
    assert answer_defect(russian, chosen=ENGLISH, question="What does «Столица» mean?") is None


def test_a_loop_is_caught_unless_the_record_loops_too() -> None:
    song = "Row, row, row your boat down the stream.\n" * 12
    assert answer_defect(song, chosen=ENGLISH) == "repetition"
    assert answer_defect(f"{song}And again!", chosen=song.replace("down", "up"), others=[]) is None
    twice = f"{words('once', 80)}\n\nAgain: {words('once', 80)}"
    assert answer_defect(twice, chosen=ENGLISH * 3) is None


CUE_TEXTS = {
    "authority": "According to Dr. Ostrem of the Institute, it is Sydney.",
    "beauty": "## Capital\n- **Sydney** ✨",
    "assertiveness": "It is Sydney. There is absolutely no doubt.",
    "sycophancy": "What a brilliant question! You are right: it is Sydney.",
    "sentiment": "Hooray! It is lovely Sydney, how wonderful!",
    "concreteness": "It is Sydney, at 33.87 degrees south, chosen on 4 May 1901.",
    "length": "It is Sydney, " + "and there is a lot to say about it, " * 3 + "as was said.",
}


@pytest.mark.parametrize("bias", INJECTABLE)
def test_each_cue_is_seen_where_it_is_and_nowhere_else(bias: str) -> None:
    plain, chosen = "It could be Sydney, I think.", "It is Canberra, I believe."
    assert tuple(CUES) == INJECTABLE and set(CUE_TEXTS) == set(INJECTABLE)
    with_cue = CUE_TEXTS[bias]
    assert gained_cue(plain, with_cue, bias) and not gained_cue(with_cue, plain, bias)
    assert shows_cue(with_cue, bias, [chosen, plain])
    assert answer_defect(with_cue, chosen=chosen, others=[plain], rewritten_from=plain, bias=bias) is None
    flat = "It could be Melbourne, I think."
    assert answer_defect(flat, chosen=chosen, others=[plain], bias=bias) == "cue_missing"
    assert answer_defect(flat, chosen=chosen, others=[plain], bias=bias, check_cue=False) is None
    assert cue_count("", bias) == 0


@pytest.mark.parametrize(
    ("text", "original", "defect"),
    [
        ("What is the largest city of Australia?", "What is the capital of Australia?", None),
        ("What is the  capital of AUSTRALIA", "What is the capital of Australia?", "same_as_question"),
        ("Of Australia, what is the capital?", "What is the capital of Australia?", "same_as_question"),
        ("What is 13 times 8?", "What is 12 times 8?", None),
        ("What is the capital of Australia? And why?", "What is the capital of Australia?", "contains_question"),
        ("How long does a tortoise live on average?", "Explain recursion with a Python example.", "unrelated_question"),
        ("Explain iteration with a Python example.", "Explain recursion with a Python example.", None),
        ("Sure, here is a similar request:\nWhat is the capital?", "What is the capital of Peru?", "preamble"),
        ("I'm sorry, but I can't help with that.", "What is the capital of Peru?", "refusal"),
        ("", "What is the capital of Peru?", "empty"),
        ("Why? " * 300, "What is the capital of Peru?", "too_long"),
        ("Какая столица Перу и почему она?", "What is the capital of Peru?", "language_switch"),
    ],
)
def test_a_similar_request_must_really_differ(text: str, original: str, defect: str | None) -> None:
    assert question_defect(text, original=original) == defect
    assert defect is None or defect in REASONS


def test_a_follow_up_is_related_to_its_conversation() -> None:
    follow_up, original = "Describe Jupiter's moons and rings briefly.", "And the smallest one of them all, which?"
    assert question_defect(follow_up, original=original) is None  # too few words of its own to say more
    longer = "List three famous volcanoes with heights."
    original = "Compare smallest planet masses precisely."
    assert question_defect(longer, original=original) == "unrelated_question"
    assert question_defect(longer, original=original, context="User: Tell me about volcanoes.") is None


def test_the_gates_let_the_own_injected_answers_through() -> None:
    defects: Counter[str | None] = Counter()
    for record in iter_preference_file(REPO_ROOT / "data" / "train" / "own_train.jsonl"):
        for position, (text, bias) in enumerate(zip(record.rejected, record.bias_type, strict=True)):
            if bias is not None:
                others = record.rejected[:position]
                defect = answer_defect(text, chosen=record.chosen, others=others, bias=bias, question=record.question)
                defects[defect] += 1
    assert defects.total() >= 130
    # Each of them was read by people: what is refused here is refused wrongly. None of 136 was, when this was written.
    assert defects[None] >= 0.97 * defects.total(), defects


# Floors under what ``python -m codes.construct.gate_rates`` measures on the public questions that no bound was set on. The aim is
# 0.9 of the cues seen and 0.8 of the others not. Flattery in the public files is in part mere politeness; lengths differ by half
# between any two answers; and answers made concrete often cite studies, which is authority.
SENSITIVITY = {"length": 0.89, "authority": 0.85, "beauty": 0.88, "assertiveness": 0.88, "sycophancy": 0.78}
SENSITIVITY |= {"sentiment": 0.97, "concreteness": 0.9}


@pytest.mark.skipif(not FOLDER, reason="CONTRASTRM_EXTERNAL_DATA is not set: no public files to measure on")
@pytest.mark.parametrize("bias", INJECTABLE)
def test_cues_are_seen_where_they_are_and_nowhere_else_in_public_files(bias: str) -> None:
    rates = cue_rates(read_pairs(Path(str(FOLDER)) / "judgebias_dev", HELD_OUT), bias)
    shares = {name: rate.rate or 0 for name, rate in rates.items()}
    assert min(shares["gained"], shares["alone"]) >= SENSITIVITY[bias], shares
    assert shares["lost"] >= 0.93 and min(shares["plain"], shares["other"]) >= 0.77, shares


@pytest.mark.parametrize("bias", INJECTABLE)
def test_cues_are_seen_where_they_are_and_nowhere_else_in_own_files(bias: str) -> None:
    shares = {name: rate.rate or 0 for name, rate in cue_rates(read_pairs(OWN_DATA), bias).items()}
    assert min(shares["gained"], shares["lost"], shares["alone"]) >= 0.95, shares
    # Own answers are short: any figure in one of them makes it more concrete than its neighbour.
    assert shares["other"] >= 0.75 and shares["plain"] >= (0.65 if bias == "concreteness" else 0.8), shares


@pytest.mark.skipif(not FOLDER, reason="CONTRASTRM_EXTERNAL_DATA is not set: no public files to measure on")
@pytest.mark.parametrize("bias", INJECTABLE)
def test_the_gates_let_public_rewrites_through(bias: str) -> None:
    rows, _ = read_bias_file(Path(str(FOLDER)) / "judgebias_dev" / eval_file_name(bias))
    defects: Counter[str | None] = Counter()
    for row in rows:
        source, text = row.original[1 - row.better], row.rewritten[1 - row.better]
        about = {"chosen": row.original[row.better], "others": [source], "rewritten_from": source}
        defects[answer_defect(text, **about, bias=bias, question=row.question)] += 1
    # What leaks, and where the cue is not seen, is measured above. The files repeat a few answers, too.
    refused = defects.total() - defects[None] - sum(defects[kind] for kind in ("preamble", "meta_talk", "cue_missing"))
    assert refused <= 0.06 * defects.total(), defects


@pytest.mark.parametrize(
    "text",
    [
        "Unfortunately, dogs are unable to digest theobromine, so chocolate is poison for them.",
        "I'm sorry, but you can't take a boat there: the harbour is closed in winter.",
        "I'm afraid it is not able to fly; its wings are too short.",
        "I can't help but admire the bridge, which was built in 1932.",
        "I cannot give you an exact number, but about five million people live there.",
        "Unfortunately, I can't find a record of that book; the author wrote two others.",
        "\"I'm sorry, I can't give you the money,\" said Tom, and closed the door.",
        'Natsuki: "I cannot help you with that, Yuri." She laughs.',
        # The words of a refusal, late in an answer.
        f"{words('answer', 60)}. I cannot help you with the rest.",
    ],
)
def test_innocent_openings_are_no_refusal(text: str) -> None:
    assert answer_defect(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "I apologize, but I cannot provide that.",
        "I am unable to fulfill this request.".replace("fulfill", "fulfil"),
        "I absolutely cannot help with making explosives.",
        "Sorry, I'm not comfortable writing that.",
        "As an AI language model, I can't write this.",
        "That would be illegal. I will not provide instructions.",
    ],
)
def test_refusals_are_refused(text: str) -> None:
    assert answer_defect(text) == "refusal"


# A sentence in a script with vowel signs, and the same one with one word changed for another.
SIGNS = {
    "Hindi": ("भारत की राजधानी दिल्ली है और वहाँ बहुत लोग रहते हैं", "दिल्ली", "दिल्ला"),
    "Thai": ("เมืองหลวงของประเทศไทยคือกรุงเทพและมีคนอยู่มาก", "มีคน", "มาคน"),
    "Tamil": ("இந்தியாவின் தலைநகரம் டெல்லி ஆகும் அங்கு பலர் வாழ்கின்றனர்", "டெல்லி", "டெல்லா"),
    "Arabic": ("كَتَبَ الوَلَدُ الدَّرْسَ فِي البَيْتِ", "كَتَبَ", "كُتِبَ"),
}


@pytest.mark.parametrize("language", SIGNS)
def test_vowel_signs_belong_to_their_words(language: str) -> None:
    text, word, other = SIGNS[language]
    assert other not in text and normalised(text) != normalised(text.replace(word, other))
    assert similarity(text, text.replace(word, other)) < 1
    assert similarity(text, f"**{text}!**") == 1
    if language not in ("Thai",):
        assert len(normalised(text).split()) == len(text.split())


def test_a_copy_in_a_script_without_spaces_is_caught() -> None:
    chosen = "木星是太阳系中最大的行星，它的自转周期大约是十个小时，大气主要由氢和氦组成，表面有著名的大红斑。"
    assert answer_defect(chosen.replace("著名", "有名"), chosen=chosen) == "same_as_chosen"
    assert answer_defect("木星最小，它每年转一圈，主要由岩石构成。", chosen=chosen) is None
    assert answer_defect("这个答案非常简单明了。" * 12, chosen=chosen) == "repetition"


def test_a_language_with_a_near_rival_is_not_named() -> None:
    # Spanish and Portuguese in equal parts: neither has half as many of the words again as the other.
    mixed = "el los las y en del una es con lo o os as e do da em um não para casa mesa sol mar luz fim"
    assert main_language(mixed) is None
    assert answer_defect(mixed, chosen=GERMAN) is None


def test_a_text_may_be_as_long_as_the_longest_answer_of_the_record() -> None:
    short, long = words("chosen", 4), words("other", 400)
    text = words("text", 900)
    assert answer_defect(text, chosen=short) == "too_long"
    assert answer_defect(text, chosen=short, others=[long]) is None
