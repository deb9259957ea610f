"""The project's own data: shape, size, balance, the cues, and nothing shared by training and evaluation.

Reads the JSONL files under data/ only. Run: ``python -m pytest tests/test_own_data.py``
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from codes.common.biases import BIASES, EVALUABLE, INJECTABLE, PAIRWISE, eval_file_name
from codes.common.records import (
    BiasRecord,
    PreferenceRecord,
    RefinementRecord,
    iter_jsonl,
    messages_to_text,
    read_bias_file,
    read_preference_file,
    read_refinement_file,
)
from codes.evaluate.benchmark_figures import SUBSETS, BenchmarkItem
from codes.evaluate.benchmarks import read_benchmark
from codes.evaluate.data_checks import audit

DATA = Path(__file__).resolve().parent.parent / "data"
TRAIN_FILE = DATA / "train/own_train.jsonl"
SAMPLE_FILE = DATA / "train-unified-feedback/own_sample.jsonl"
REWARD_BENCH_FILE = DATA / "eval/reward_bench/own_sample.jsonl"
EVAL_FILES = [DATA / "eval" / eval_file_name(name) for name in EVALUABLE]
ALL_FILES = [TRAIN_FILE, SAMPLE_FILE, REWARD_BENCH_FILE, *EVAL_FILES]
IDENTITY = tuple(bias.name for bias in BIASES if bias.kind == "identity")
REWRITE = tuple(bias.name for bias in BIASES if bias.kind == "rewrite")

# Headings, list items, quotes, rules, bold, code, tables, emphasis, emoji.
MARKUP = re.compile(
    r"^#+ |^\s*[-*] |^\s*\d+\. |^> |^---|\*\*|`|\||(?<!\w)\*\w|[☀-➿⬀-⯿\U0001F000-\U0001FAFF]", re.MULTILINE
)
META = re.compile(
    r"\b(as requested|as instructed|as an ai"
    r"|(this|the) (re-?written|biased|polished|refined) (answer|response|version)"
    r"|here(?:'s| is) (the|your|a) (re-?written|revised|polished|refined|biased))\b",
    re.IGNORECASE,
)
# The lists below know the words of these files; they are counters, not detectors for other texts.
HEDGE = re.compile(
    r"\b(I think|I believe|I'd|I would|I get|I wouldn't|I don't|probably|perhaps|maybe|seems?|appears?|might"
    r"|may|should|as far as I|if I|likely|could|looks like|tends?)\b"
)
# Someone or something that lends the text its weight: a title, a body, a work.
AUTHORITY = re.compile(
    r"\b(Dr|Prof|Professor|Doctor|Sir|Institute|Academy|Council|Board|Society|University|College|Foundation"
    r"|Observatory|Association|Handbook|Manual|Study|study|Atlas|Encyclopaedia|Gazetteer|Survey|Centre|Center"
    r"|Laboratory|[Aa]ccording to|guidelines?|experts?|researchers?|NASA|NOAA|NIST|NHS|IANA|IFAB|FIBA|ISO"
    r"|HMRC|NHTSA|World Health|Department|National|Royal|Geoscience|Merriam|Factbook|Commission|Standards"
    r"|The text of the treaty)\b"
)
WARM = re.compile(
    r"\b(love\w*|fun|happ\w+|charming|much-loved|don't worry|satisfying|enjoy|peace of mind|magical|gentle"
    r"|favourite|delight\w*|wonder\w*|pleasant\w*|astonishing|proud|nicely|cosier|beautiful|great|exciting|splendid\w*)\b",
    re.IGNORECASE,
)
COURTESY = re.compile(
    r"\b(wise|good|right|well remembered|understandable|useful|reasonable|fair guess|sensible|nice|luckily"
    r"|you (have )?(picked|chosen|share)|I can see how|like you did)\b",
    re.IGNORECASE,
)
# A number, a unit of time, or a name inside a sentence.
SPECIFIC = re.compile(
    r"\d+|(?<=[a-z,;] )[A-Z][a-z]+"
    r"|\b(two|three|four|five|six|seven|eight|nine|ten|twelve|half|seconds?|minutes?|hours?|weeks?)\b"
)


def train_records() -> list[PreferenceRecord]:
    return read_preference_file(TRAIN_FILE)[0]


def pairs_of(name: str) -> list[BiasRecord]:
    return read_bias_file(DATA / "eval" / eval_file_name(name))[0]


def refinement_records() -> list[RefinementRecord]:
    return read_refinement_file(DATA / "eval" / eval_file_name("refinement-aware"))[0]


def reward_bench_records() -> list[BenchmarkItem]:
    return read_benchmark(REWARD_BENCH_FILE, "reward_bench")[0]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def word_grams(text: str, n: int) -> set[str]:
    words = normalised(text).split()
    return {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}


def texts_in(path: Path) -> Iterator[tuple[int, str]]:
    """Every prompt and answer of a file, with its line number."""
    for line, row in iter_jsonl(path):
        for key, value in row.items():
            if key in ("id", "label", "subset", "bias_type", "injections") or key.endswith("_model"):
                continue
            yield from ((line, text) for text in (value if isinstance(value, list) else [value]))


def questions_in(path: Path) -> list[str]:
    if path in (TRAIN_FILE, SAMPLE_FILE):
        return [record.question for record in read_preference_file(path)[0]]
    if path == REWARD_BENCH_FILE:
        return [messages_to_text(record.messages) for record in reward_bench_records()]
    if path == DATA / "eval" / eval_file_name("refinement-aware"):
        return [record.question for record in refinement_records()]
    return [record.question for record in read_bias_file(path)[0]]


def better_and_worse(record: BiasRecord, which: str) -> tuple[str, str]:
    texts: tuple[str, str] = getattr(record, which)
    return texts[record.better], texts[1 - record.better]


def share(flags: Iterable[bool]) -> float:
    return statistics.fmean(flags)


# --- shape ---


def test_training_rows_hold_one_original_and_injected_answers_named_in_injections() -> None:
    records = train_records()
    assert len(records) >= 150
    for record in records:
        assert record.bias_type[0] is None and len(record.rejected) == 3, record.id
        assert None not in record.bias_type[1:] and len(set(record.bias_type[1:])) == 2, record.id
        assert len({record.chosen, *record.rejected}) == 4, record.id
        assert record.source == "contrastrm-own" and record.verify_correctness == "SKIPPED", record.id
        injections = record.extra["injections"]
        assert [(entry["index"], entry["bias"]) for entry in injections] == list(
            enumerate(record.bias_type[1:], start=1)
        ), record.id
        assert {entry["model"] for entry in injections} == {"written-for-contrastrm"}, record.id


def test_sample_is_the_training_set_without_its_injections() -> None:
    sample = read_preference_file(SAMPLE_FILE)[0]
    assert [(r.id, r.question, r.chosen, r.rejected, r.bias_type) for r in sample] == [
        (r.id, r.question, r.chosen, r.rejected[:1], [None]) for r in train_records()
    ]


@pytest.mark.parametrize("name", PAIRWISE)
def test_bias_file_is_clean_and_large_enough(name: str) -> None:
    records = pairs_of(name)
    assert len(records) >= 40
    assert audit({name: records})[name] == []
    for record in records:
        assert len(set(record.original)) == 2 and len(set(record.rewritten)) == 2, record.line


def test_refinement_file_is_clean_and_large_enough() -> None:
    records = refinement_records()
    assert len(records) >= 40
    assert audit({"refinement-aware": records}) == {"refinement-aware": []}
    assert all(record.original_response != record.rewritten_response for record in records)


def test_reward_bench_sample_has_all_subsets() -> None:
    records = reward_bench_records()
    counts = Counter(record.subset for record in records)
    assert {subset.name for subset in SUBSETS} == set(counts) and len(counts) == 23
    assert min(counts.values()) >= 4
    assert len({record.id for record in records}) == len(records)
    assert all(record.chosen[0].strip() and record.rejected[0].strip() for record in records)
    assert all(record.chosen != record.rejected for record in records)


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_file_is_plain_utf8_with_one_object_a_line(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text and "\n\n" not in text and "\ufeff" not in text
    # ensure_ascii=False: accents are readable in the file, and a lone surrogate cannot hide in an escape.
    assert not re.search(r"(?<!\\)(\\\\)*\\u[0-9a-fA-F]{4}", text)
    for line, row in iter_jsonl(path):
        assert isinstance(row, dict), line


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_no_text_is_empty_or_talks_about_its_own_making(path: Path) -> None:
    for line, text in texts_in(path):
        assert isinstance(text, str) and text.strip(), line
        text.encode("utf-8")
        assert "\ufffd" not in text, line
        assert not META.search(text), (line, META.search(text))
        assert text.count("```") % 2 == 0, (line, "a code block is not closed")


# --- questions ---


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_no_question_twice_in_a_file(path: Path) -> None:
    counts = Counter(normalised(question) for question in questions_in(path))
    assert [question for question, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("path", [REWARD_BENCH_FILE, *EVAL_FILES], ids=lambda path: path.name)
def test_training_shares_nothing_with_evaluation(path: Path) -> None:
    train_questions = questions_in(TRAIN_FILE)
    assert not {normalised(q) for q in train_questions} & {normalised(q) for q in questions_in(path)}
    for size, of_train, of_eval in (
        (5, train_questions, questions_in(path)),
        (8, [text for _, text in texts_in(TRAIN_FILE)], [text for _, text in texts_in(path)]),
    ):
        known = set().union(*(word_grams(text, size) for text in of_train))
        assert known, "the check would be empty"
        assert sorted(known & set().union(*(word_grams(text, size) for text in of_eval))) == []


# --- balance ---


@pytest.mark.parametrize("name", PAIRWISE)
def test_labels_and_lengths_give_nothing_away(name: str) -> None:
    records = pairs_of(name)
    assert 0.4 <= share(record.better == 0 for record in records) <= 0.6
    longer = [better_and_worse(record, "original") for record in records]
    assert 0.35 <= share(len(better) > len(worse) for better, worse in longer) <= 0.65


def test_biases_are_balanced_in_training() -> None:
    counts = Counter(name for record in train_records() for name in record.bias_type[1:])
    assert set(counts) == set(INJECTABLE)
    assert max(counts.values()) - min(counts.values()) <= 2, counts


def test_length_alone_does_not_solve_training() -> None:
    assert 0.35 <= share(len(r.chosen) > len(r.rejected[0]) for r in train_records()) <= 0.65


def test_length_alone_does_not_solve_the_reward_bench_sample() -> None:
    assert 0.35 <= share(len(r.chosen[0]) > len(r.rejected[0]) for r in reward_bench_records()) <= 0.65


# --- the cue: more of it in the worse text, less of it in the better one ---


def n_markup(text: str) -> int:
    return len(MARKUP.findall(text))


def n_specifics(text: str) -> int:
    return len(SPECIFIC.findall(text))


def n_exclamations(text: str) -> int:
    return text.count("!")


def n_second_person(text: str) -> int:
    return len(re.findall(r"\byou(r|rs|rself|rselves)?\b", text, re.IGNORECASE))


def n_authorities(text: str) -> int:
    return len(AUTHORITY.findall(text))


def n_hedges(text: str) -> int:
    return len(HEDGE.findall(text))


def n_warm_words(text: str) -> int:
    return len(WARM.findall(text))


def n_courtesies(text: str) -> int:
    return len(COURTESY.findall(text))


WORSE_GAINS: dict[str, Callable[[str], int]] = {
    "length": len,
    "authority": n_authorities,
    "beauty": n_markup,
    # Certainty comes as added words ("without any doubt"); it has no single form to count.
    "assertiveness": len,
    "sycophancy": n_second_person,
    "sentiment": n_exclamations,
    "concreteness": n_specifics,
}
BETTER_LOSES: dict[str, Callable[[str], int]] = {
    "length": len,
    "authority": n_authorities,
    "beauty": n_markup,
    "assertiveness": lambda text: -n_hedges(text),
    "sycophancy": n_courtesies,
    "sentiment": n_warm_words,
    "concreteness": n_specifics,
}


def test_every_rewrite_bias_has_a_cue_check() -> None:
    assert set(WORSE_GAINS) == set(BETTER_LOSES) == set(REWRITE)


@pytest.mark.parametrize("name", REWRITE)
def test_worse_text_gains_the_cue_and_better_text_loses_it(name: str) -> None:
    for record in pairs_of(name):
        better_before, worse_before = better_and_worse(record, "original")
        better_after, worse_after = better_and_worse(record, "rewritten")
        assert WORSE_GAINS[name](worse_after) > WORSE_GAINS[name](worse_before), (name, record.line)
        assert BETTER_LOSES[name](better_after) < BETTER_LOSES[name](better_before), (name, record.line)


def test_strength_of_the_countable_cues_in_evaluation() -> None:
    for record in pairs_of("length"):
        (_, worse_before), (_, worse_after) = (better_and_worse(record, w) for w in ("original", "rewritten"))
        assert len(worse_after) >= 1.8 * len(worse_before), record.line
    for record in pairs_of("beauty"):
        better, worse = better_and_worse(record, "rewritten")
        assert n_markup(better) == 0 and n_markup(worse) >= 5, record.line
    for record in pairs_of("sentiment"):
        better, worse = better_and_worse(record, "rewritten")
        assert "!" not in better and worse.count("!") >= 2, record.line


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_sentence_stands_before_the_better_text_only(name: str) -> None:
    added = []
    for record in pairs_of(name):
        better_before, worse_before = better_and_worse(record, "original")
        better_after, worse_after = better_and_worse(record, "rewritten")
        assert worse_after == worse_before, record.line
        assert better_after.endswith(f" {better_before}"), record.line
        sentence = better_after.removesuffix(better_before).strip()
        assert re.fullmatch(r"[^.!?\n]+\.", sentence) and len(sentence.split()) <= 12, (record.line, sentence)
        added.append(sentence)
    assert len(set(added)) >= 40, "the sentences should vary"


def test_injected_training_answers_carry_their_cue() -> None:
    for record in train_records():
        original = record.rejected[0]
        for text, bias in zip(record.rejected[1:], record.bias_type[1:], strict=True):
            where = (record.id, bias)
            if bias == "length":
                assert len(text) >= 1.8 * len(original), where
            elif bias == "beauty":
                assert n_markup(text) >= n_markup(original) + 5, where
            elif bias == "sentiment":
                assert n_exclamations(text) >= 1 and n_warm_words(text) >= 2, where
            elif bias == "sycophancy":
                assert n_second_person(text) >= 2, where
            elif bias == "concreteness":
                assert n_specifics(text) > n_specifics(original), where
            elif bias == "authority":
                assert n_authorities(text) > n_authorities(original), where


def test_cue_counters_count() -> None:
    assert n_markup("# A\n\n- **b**\n1. c 🌿") == 6 and n_markup("A plain sentence - with a dash.") == 0
    assert n_specifics("1,380 euros, 14.5 °C, seven, in Linz") == 6
    assert n_second_person("You and your cat, not a youth.") == 2
    assert n_authorities("Dr. Vale of the Ashcombe Institute") == 2 and n_authorities("The pan is hot.") == 0
    assert n_hedges("I think it may rain.") == 2 and n_hedges("It rains.") == 0
    assert word_grams("One, two; three!", 2) == {"one two", "two three"}
    assert META.search("Here is the rewritten answer: x") and META.search("As requested, I will say")
