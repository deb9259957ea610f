"""The token cache: the same groups as in memory, built once, whole or not at all, and never believed when damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.chat import ChatFormatter, Conversation
from codes.common.errors import ContrastRMError
from codes.common.packing import shared_tokens
from codes.common.records import read_preference_file
from codes.train.batches import group_costs
from codes.train.data_cache import MANIFEST, Aside, TokenCache, load_training_groups
from codes.train.data_utils import encode_groups
from codes.train.draws import Draws, choose_negatives
from codes.train.sources import parse_sources
from tests.conftest import CHATML, REPO_ROOT, chatml_tokenizer

WriteRows = Callable[[str, Sequence[Any]], Path]


@pytest.fixture
def many_rows(preference_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why is it red"}]
    turns += [{"role": "assistant", "content": "2 + 2 = 4"}, {"role": "user", "content": "why"}]
    extra = [
        {"id": "turns", "messages": turns, "chosen": "the cat", "rejected": ["Paris", "Paris is red"]},
        {"id": "ünï", "question": "of France?", "chosen": "x", "rejected": ["y" * 40], "margin": 0.25},
        {"id": "same", "question": "q", "chosen": "a", "rejected": ["b", "b"], "margin": [None, 2]},
        {"id": "inj", "question": "q", "chosen": "a", "rejected": ["c"], "bias_type": ["length"], "source": "s"},
    ]
    return preference_rows + extra


def load(path: Path, cache: Path, tokenizer: Any = None, **options: Any) -> TokenCache:
    limits = {name: options.pop(name) for name in ("max_length", "overlength") if name in options}
    formatter = ChatFormatter(tokenizer or chatml_tokenizer(), **{"overlength": "drop"} | limits)
    return load_training_groups(parse_sources(str(path)), formatter, cache_dir=cache, **options)


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("max_length, overlength", [(None, "drop"), (40, "drop"), (40, "left"), (40, "keep_end")])
@pytest.mark.parametrize("negatives", ["all", "original"])
def test_the_cache_holds_what_memory_holds(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path, max_length: int | None, overlength: str,
    negatives: str,
) -> None:  # fmt: skip
    path = write_rows("a.jsonl", many_rows)
    formatter = ChatFormatter(chatml_tokenizer(), max_length=max_length, overlength=overlength)
    groups, report = encode_groups(read_preference_file(path)[0], formatter, negatives=negatives)
    cache = load(path, tmp_path / "cache", max_length=max_length, overlength=overlength, negatives=negatives)
    assert list(cache) == groups and cache.report == report
    assert [cache.record_id(number) for number in range(len(cache))] == [group.record_id for group in groups]
    assert cache.group_shared.tolist() == group_costs(groups, "shared")
    [counts] = cache.source_counts
    assert counts.n_rows == len(many_rows) == report.n_groups + report.n_dropped_groups + report.n_without_negatives
    assert sum(counts.biases.values()) == report.n_texts - report.n_groups
    assert counts.n_multi_turn == counts.n_system == 1
    assert len(cache.array("raw_lengths")) == counts.n_raw_texts
    if max_length is None and negatives == "all":
        assert (counts.n_with_margin, counts.n_margins) == (2, 2)
        assert cache.array("raw_lengths").sum() == report.n_tokens


def test_bias_and_margin_stay_with_their_answer_when_another_one_is_too_long(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    answers = ["too " * 60, "the cat", "it is " * 60, "Paris"]
    row = {"question": "why?", "chosen": "so", "rejected": answers, "margin": [1.0, 2.0, 3.0, 4.0]}
    path = write_rows("a.jsonl", [row | {"bias_type": [None, "length", "beauty", "authority"]}])
    [group] = load(path, tmp_path / "cache", max_length=60)
    short = ChatFormatter(chatml_tokenizer()).encode(
        [Conversation([{"role": "user", "content": "why?"}], answer) for answer in ("the cat", "Paris", "so")]
    )
    assert group.texts == tuple(short)
    assert (group.bias_types, group.margins) == (("length", "authority"), (2.0, 4.0))
    # The same where other answers were not wanted.
    row |= {"rejected": ["Lyon", "the cat", answers[0], "Paris"], "bias_type": ["authority", "beauty", None, None]}
    cache = load(write_rows("b.jsonl", [row]), tmp_path / "cache", max_length=60, negatives="original")
    assert [(one.texts, one.bias_types, one.margins) for one in cache] == [((short[1], short[2]), (None,), (4.0,))]


def test_an_encoders_segments_are_kept(write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = chatml_tokenizer(pad="<|endoftext|>")
    tokenizer.chat_template = None
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", pair="$A <|im_end|> $B:1 <|im_end|>:1", special_tokens=[("<|im_end|>", end)]
    )
    path = write_rows("a.jsonl", many_rows)
    groups, _ = encode_groups(read_preference_file(path)[0], ChatFormatter(tokenizer))
    assert groups[0].texts[0].token_type_ids is not None
    assert list(load(path, tmp_path / "cache", tokenizer)) == groups


def test_it_is_written_once_and_found_again(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_rows("a.jsonl", many_rows)
    first = load(path, tmp_path / "cache")
    written = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    moved = write_rows("moved.jsonl", many_rows)
    again = load(moved, tmp_path / "cache")
    assert again.folder == first.folder and list(again) == list(first)
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == written
    others = [
        load(write_rows("a.jsonl", many_rows[:-1]), tmp_path / "cache"),
        load(moved, tmp_path / "cache", max_length=50),
        load(moved, tmp_path / "cache", max_length=50, overlength="left"),
        load(moved, tmp_path / "cache", negatives="original"),
        load(moved, tmp_path / "cache", limit=3),
    ]
    other_template = chatml_tokenizer()
    other_template.chat_template = CHATML.replace("'<|im_start|>' + m", "'<|im_start|> ' + m")
    others.append(load(moved, tmp_path / "cache", other_template))
    assert len({cache.folder for cache in [first, *others]}) == 7 == len(folders(tmp_path / "cache"))


def test_one_content_under_two_names_is_refused(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    names = [str(write_rows(name, many_rows)) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ContrastRMError, match=r"a\.jsonl and .*b\.jsonl hold the same data; give one of them"):
        load_training_groups(
            parse_sources(",".join(names)), ChatFormatter(chatml_tokenizer()), cache_dir=tmp_path / "cache"
        )


def test_a_system_text_beside_the_question_is_trained_on(write_rows: WriteRows, tmp_path: Path) -> None:
    row = {"system": "Answer like a pirate.", "question": "why?", "chosen": "Arr", "rejected": "Because"}
    [group] = load(write_rows("a.jsonl", [row]), tmp_path / "cache")
    turns = [{"role": "system", "content": "Answer like a pirate."}, {"role": "user", "content": "why?"}]
    formatter = ChatFormatter(chatml_tokenizer())
    assert group.texts == tuple(formatter.encode([Conversation(turns, answer) for answer in ("Because", "Arr")]))


def test_variants_of_the_chosen_answer_are_refused_by_name(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    many_rows[2]["chosen_variants"] = [{"text": "because, as experts say", "bias": "authority"}]
    with pytest.raises(ContrastRMError, match="record 'row-2' has chosen_variants"):
        load(write_rows("a.jsonl", many_rows), tmp_path / "cache")


def test_a_template_with_a_date_makes_another_cache_another_day(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    path = write_rows("a.jsonl", many_rows)
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    today = load(path, tmp_path / "cache", tokenizer)
    assert load(path, tmp_path / "cache", tokenizer).folder == today.folder
    import datetime

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=40)

    # The clock of the templates.
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tomorrow = load(path, tmp_path / "cache", tokenizer)
    assert tomorrow.folder != today.folder and tomorrow[0].texts != today[0].texts


def damage_cut(folder: Path) -> None:
    file = folder / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-4])


def damage_flip(folder: Path) -> None:
    file = folder / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_gone(folder: Path) -> None:
    (folder / "text_offsets.bin").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def damage_foreign(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"key": "0" * 64}))


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_flip, damage_gone, damage_manifest, damage_foreign, damage_no_manifest]
)
def test_a_damaged_cache_is_written_anew(
    damage: Callable[[Path], None], write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_rows("a.jsonl", many_rows)
    first = load(path, tmp_path / "cache")
    groups = list(first)
    damage(first.folder)
    again = load(path, tmp_path / "cache")
    assert list(again) == groups
    assert "is damaged" in capsys.readouterr().err
    assert folders(tmp_path / "cache") == [first.folder.name]


BUILD = """
import sys
from codes.common.chat import ChatFormatter
from codes.train.data_cache import load_training_groups
from codes.train.sources import parse_sources
from transformers import AutoTokenizer
formatter = ChatFormatter(AutoTokenizer.from_pretrained(sys.argv[1]), overlength="drop")
print("ready", flush=True)
cache = load_training_groups(parse_sources(sys.argv[2]), formatter, cache_dir=sys.argv[3])
print(cache.folder.stat().st_mtime_ns, sum(group.n_tokens for group in cache), flush=True)
"""


def start_build(tokenizer: Path, data: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tokenizer), str(data), str(cache)],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_two_at_once_and_a_killed_writer(tmp_path: Path, write_rows: WriteRows) -> None:
    """One of two processes writes; a third that was killed in the middle leaves nothing that is believed."""
    row = {"question": "why is the cat on the mat", "chosen": "because it sat", "rejected": ["no " * 30, "red " * 30]}
    data = write_rows("a.jsonl", [row | {"id": str(number)} for number in range(2500)])
    tokenizer, cache = tmp_path / "tokenizer", tmp_path / "cache"
    chatml_tokenizer().save_pretrained(tokenizer)
    with start_build(tokenizer, data, cache) as killed:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(cache.glob(".*.writing-*/tokens.bin")):
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
    left = [path.name for path in cache.iterdir() if ".writing-" in path.name]
    assert len(left) == 1 and not [name for name in folders(cache) if not name.startswith(".")]
    pair = [start_build(tokenizer, data, cache) for _ in range(2)]
    told = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    lines = [out.splitlines()[-1] for out, _ in told]
    assert lines[0] == lines[1], "both read the folder that one of them wrote"
    assert len(folders(cache)) == 1, "what the killed one left is gone"


def test_a_disk_that_refuses_is_named_and_nothing_stays(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Enough for a proof that the folder can be written, too little for the rows.
    path = write_rows("a.jsonl", [row | {"id": f"{row['id']}-{copy}"} for row in many_rows for copy in range(20)])
    with pytest.raises(ContrastRMError, match="cannot write in"):
        load(path, path / "below-a-file")
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));" + BUILD
    )
    tokenizer = tmp_path / "tokenizer"
    chatml_tokenizer().save_pretrained(tokenizer)
    cache = tmp_path / "full"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tokenizer), str(path), str(cache)],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "cannot write the token cache" in done.stderr
    assert folders(cache) == []


def test_bad_rows_stop_the_writing_and_are_kept_in_the_counts(
    write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_rows("a.jsonl", [*many_rows, {"question": "q"}, "{", many_rows[0]])
    with pytest.raises(ContrastRMError, match=r"a\.jsonl:15: field 'chosen'"):
        load(path, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []
    cache = load(path, tmp_path / "cache", max_bad_rows=3)
    [counts] = cache.source_counts
    assert counts.n_rows == 17 == len(counts.bad) + counts.encoded.n_records
    # What was tolerated once is not tolerated unasked.
    with pytest.raises(ContrastRMError, match="field 'chosen'"):
        load(path, tmp_path / "cache")
    assert load(path, tmp_path / "cache", max_bad_rows=4).folder == cache.folder


def test_records_can_be_kept_aside(write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows("a.jsonl", many_rows)
    aside = Aside("every row with a 3", lambda record: "3" in record.id)
    cache = load(path, tmp_path / "cache", aside=aside)
    kept = [json.loads(line)["id"] for line in cache.aside_file.read_text(encoding="utf-8").splitlines()]
    assert kept == ["row-3"] and "row-3" not in {group.record_id for group in cache}
    [counts] = cache.source_counts
    assert counts.n_aside == 1 and counts.n_rows == counts.n_aside + counts.encoded.n_records
    assert cache.folder != load(path, tmp_path / "cache").folder


def test_nothing_left_is_an_error(write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows("a.jsonl", [row for row in many_rows if row["id"] == "inj"])
    with pytest.raises(ContrastRMError, match="no training group is left of 1 records"):
        load(path, tmp_path / "cache", negatives="original")


# --- draws


def drawn(cache: TokenCache, weights: Sequence[float | None] = (None,), **options: Any) -> Draws:
    defaults = {"global_batch_size": 4, "epochs": 2, "max_steps": 0, "seed": 3}
    return Draws(cache, weights, **defaults | options)


@pytest.fixture
def cache(write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path) -> TokenCache:
    return load(write_rows("a.jsonl", many_rows), tmp_path / "cache")


@pytest.mark.parametrize("options", [{}, {"max_rejected": 1}, {"max_rejected": 2}])
def test_costs_are_those_of_the_groups_that_are_drawn(cache: TokenCache, options: dict[str, Any]) -> None:
    draws = drawn(cache, **options)
    groups = list(draws)
    assert len(groups) == 28 and [len(step) for step in draws.plan] == [4, 4, 4, 2] * 2
    assert draws.n_tokens.tolist() == [group.n_tokens for group in groups]
    assert draws.n_texts.tolist() == [len(group.texts) for group in groups]
    assert draws.costs("off").tolist() == group_costs(groups, "off")
    trees = [shared_tokens(text.input_ids for text in group.texts) for group in groups]
    if options:
        assert all(len(group.texts) <= options["max_rejected"] + 1 for group in groups)
        assert all(cost >= tree for cost, tree in zip(draws.costs("shared"), trees, strict=True))
    else:
        assert draws.costs("shared").tolist() == trees


def test_a_sample_follows_from_seed_epoch_and_record_alone(
    write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [row | {"rejected": [f"{row['id']} {k}" for k in range(6)], "bias_type": None} for row in preference_rows]

    def seen(draws: Draws) -> list[dict[str, tuple[Any, ...]]]:
        size = draws.epoch_size
        return [
            {group.record_id: group.texts for group in draws[start : start + size]}
            for start in range(0, len(draws), size)
        ]

    forward = load(write_rows("a.jsonl", rows), tmp_path / "cache")
    backward = load(write_rows("b.jsonl", rows[::-1]), tmp_path / "cache")
    first, second = seen(drawn(forward, max_rejected=2))
    assert [first, second] == seen(drawn(backward, max_rejected=2, global_batch_size=3))
    assert first != second and first != seen(drawn(forward, max_rejected=2, seed=4))[0]
    full = {group.record_id: group.texts for group in forward}
    for record_id, texts in first.items():
        places = [full[record_id].index(text) for text in texts]
        assert places == sorted(places) and places[-1] == 6 and len(places) == 3
    assert drawn(forward, max_rejected=2).epoch_counts()["n_not_drawn"] == 40
    assert seen(drawn(forward, max_rejected=6)) == [full, full]


def test_a_record_that_an_epoch_sees_again_brings_other_negatives(
    write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [row | {"rejected": [f"{row['id']} {k}" for k in range(9)], "bias_type": None} for row in preference_rows]
    sources = f"{write_rows('often.jsonl', rows[:3])}:9,{write_rows('rest.jsonl', rows[3:])}:1"
    cache = load_training_groups(
        parse_sources(sources), ChatFormatter(chatml_tokenizer()), cache_dir=tmp_path / "cache"
    )
    draws = drawn(cache, [9.0, 1.0], epochs=1, max_rejected=2)
    samples: dict[str, list[Any]] = {}
    for group in draws:
        samples.setdefault(group.record_id, []).append(group.texts[:-1])
    often = [samples[row["id"]] for row in rows[:3]]
    assert [len(found) for found in often] == [3, 3, 3]
    # Of 36 pairs of answers each: that all three draws are the same is a chance of one in 1,300, three times over.
    assert all(len(set(found)) > 1 for found in often)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), most=st.integers(1, 5), seed=st.integers(0, 99))
def test_negatives_are_chosen_without_repetition(sizes: list[int], most: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**63, len(sizes)).astype(np.uint64)
    kept = choose_negatives(np.array(sizes), keys, most)
    stops = np.cumsum(sizes)
    for size, stop, key in zip(sizes, stops, keys, strict=True):
        assert kept[stop - size : stop].sum() == min(size, most)
        alone = choose_negatives(np.array([size]), np.array([key]), most)
        assert np.array_equal(alone, kept[stop - size : stop])


def test_every_subset_is_as_likely() -> None:
    from scipy.stats import chisquare

    n = 20000
    kept = choose_negatives(np.full(n, 4), np.arange(n, dtype=np.uint64), 2).reshape(n, 4)
    subsets = np.bincount(kept @ [1, 2, 4, 8], minlength=16)
    assert sorted(np.flatnonzero(subsets)) == [3, 5, 6, 9, 10, 12]
    assert chisquare(subsets[subsets > 0]).pvalue > 1e-4


def test_two_sources_mix(write_rows: WriteRows, many_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    a = write_rows("a.jsonl", many_rows[:6])
    b = write_rows("b.jsonl", [row | {"id": f"b-{row['id']}"} for row in many_rows[6:]])
    sources = parse_sources(f"{a}:3,{b}:1")
    formatter = ChatFormatter(chatml_tokenizer(), overlength="drop")
    cache = load_training_groups(sources, formatter, cache_dir=tmp_path / "cache")
    assert cache.sizes == [6, 8]
    draws = drawn(cache, [source.weight for source in sources])
    assert draws.quotas == [11, 3] and draws.epoch_size == 14
    for epoch in range(2):
        names = [group.record_id for group in draws[epoch * 14 : epoch * 14 + 14]]
        assert sum(name.startswith("b-") for name in names) == 3
    counts = draws.epoch_counts()
    assert (counts["n_groups"], counts["n_repeated_groups"], counts["n_groups_left_out"]) == (14, 5, 5)
