"""The score store: the same bits after a kill, one score for a text, and never a wrong score from a wrong file."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codes.common import score_store
from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.score_store import ScoreStore
from codes.common.scoring import Scorer, count_tied, text_bytes
from codes.evaluate import eval_reward_bench, eval_rm
from codes.evaluate.api import RemoteScorer, StoredScorer
from codes.evaluate.results import RUN_FIELDS
from codes.evaluate.scorer_setup import load_scorer, loaded_weights_hash, making_of_scores
from codes.evaluate.settings import ScorerSettings
from codes.train.reward_model import load_reward_model, save_reward_model
from tests.conftest import REPO_ROOT
from tests.eval_rows import evaluation_row

QUESTIONS = [f"why is the cat {number} on the mat" for number in range(6)]
ANSWERS = ["because it sat " * 6, "Paris", "it is red and a cat " * 9, "", "the capital of France"]
TEXTS = [Conversation([{"role": "user", "content": question}], answer) for question in QUESTIONS for answer in ANSWERS]


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def keys_of(store: ScoreStore, n: int, first: int = 0) -> list[bytes]:
    return [store.key(f"text {number}".encode()) for number in range(first, first + n)]


def filled(path: Path, n: int = 1500) -> tuple[list[bytes], dict[bytes, float]]:
    draw = random.Random(0)
    store = ScoreStore(path, {"weights": "a"})
    scores = {key: float32(draw.gauss(0, 3)) for key in keys_of(store, n)}
    assert store.add(scores) == scores
    store.close()
    return list(scores), scores


# --- what is stored is found, as it was


def test_scores_come_back_to_the_last_bit_and_the_first_one_stays(tmp_path: Path) -> None:
    keys, scores = filled(tmp_path / "made" / "scores.sqlite")
    store = ScoreStore(tmp_path / "made" / "scores.sqlite", {"weights": "a"})
    assert store.look_up(keys) == scores and len(store) == len(keys)
    mixed = {keys[0]: 99.0, store.key(b"new"): 0.1}
    assert store.add(mixed) == {keys[0]: scores[keys[0]], store.key(b"new"): float32(0.1)}
    assert store.look_up([store.key(b"never scored")]) == {}
    assert store.look_up([]) == {} and store.add({}) == {}


def test_another_making_finds_nothing_in_the_same_file(tmp_path: Path) -> None:
    keys, scores = filled(tmp_path / "s.sqlite", 5)
    other = ScoreStore(tmp_path / "s.sqlite", {"weights": "b"})
    same_texts = keys_of(other, 5)
    assert not set(same_texts) & set(keys) and other.look_up(same_texts) == {}
    other.add({same_texts[0]: 7.0})
    assert ScoreStore(tmp_path / "s.sqlite", {"weights": "a"}).look_up(keys) == scores


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "s.sqlite", {})
    first, second = keys_of(store, 2)
    with pytest.raises(ContrastRMError, match="not finite"):
        store.add({first: 1.0, second: float("nan")})
    assert store.look_up([first, second]) == {}


def test_an_error_in_the_middle_of_a_batch_leaves_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = ScoreStore(path, {})
    first, second, third = keys_of(store, 3)
    refusing = "CREATE TRIGGER refuse BEFORE INSERT ON scores WHEN NEW.score > 100 BEGIN SELECT RAISE(ABORT, 'no'); END"
    with sqlite3.connect(path) as connection:
        connection.execute(refusing)
    with pytest.raises(ContrastRMError):
        store.add({first: 1.0, second: 200.0, third: 2.0})
    assert len(store) == 0 and store.add({first: 3.0}) == {first: 3.0}


# --- files that are no good store


def test_a_flipped_byte_never_gives_a_wrong_score(tmp_path: Path) -> None:
    keys, scores = filled(tmp_path / "whole.sqlite")
    whole = (tmp_path / "whole.sqlite").read_bytes()
    draw = random.Random(1)
    refused = lost = 0
    for number in range(250):
        broken = bytearray(whole)
        # Half of them in the header and the first page, where everything hangs together.
        place = draw.randrange(4096 if number % 2 else len(whole))
        broken[place] ^= 1 << draw.randrange(8)
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(broken)
        try:
            found = ScoreStore(path, {"weights": "a"}).look_up(keys)
        except ContrastRMError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(scores[key] == score for key, score in found.items())
            lost += len(found) < len(scores)
    assert refused > 20


def test_a_changed_digit_of_a_score_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    keys, _ = filled(path, 10)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE scores SET score = score + 1 WHERE key = ?", (keys[3],))
    connection.commit()
    connection.close()
    store = ScoreStore(path, {"weights": "a"})
    assert len(store.look_up(keys[:3])) == 3
    with pytest.raises(ContrastRMError, match=r"damaged \(a score does not agree.*delete it: it is filled again"):
        store.look_up(keys)


def test_a_damaged_page_is_noticed_before_anything_is_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    filled(path)
    content = bytearray(path.read_bytes())
    content[-8192:-4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(ContrastRMError, match=r"s\.sqlite is damaged .*; delete it"):
        ScoreStore(path, {"weights": "a"})


@pytest.mark.parametrize("size", [100, 5000, -1, -3000])
def test_a_truncated_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    keys, scores = filled(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ContrastRMError, match=r"s\.sqlite is damaged .*; delete it: it is filled again"):
        ScoreStore(path, {"weights": "a"}).look_up(keys)
    path.unlink()
    assert ScoreStore(path, {"weights": "a"}).add(scores) == scores


def test_foreign_and_older_files_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes and not a database, keep them " * 20)
    with pytest.raises(ContrastRMError, match="not a database"):
        ScoreStore(text, {})
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE scores (key BLOB, score REAL)")
    connection.commit()
    before = foreign.read_bytes()
    with pytest.raises(ContrastRMError, match="is a database, but no score store; choose another --score_store"):
        ScoreStore(foreign, {})
    assert foreign.read_bytes() == before
    filled(tmp_path / "old.sqlite", 3)
    connection = sqlite3.connect(tmp_path / "old.sqlite")
    connection.execute("PRAGMA user_version = 0")
    connection.close()
    with pytest.raises(ContrastRMError, match=r"of version 0, this program writes version 1; delete it"):
        ScoreStore(tmp_path / "old.sqlite", {})


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ContrastRMError, match="cannot write in"):
        ScoreStore(tmp_path / "file" / "s.sqlite", {})
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(ContrastRMError, match=r"unable to open.*--score_store to a file on a local disk, or to none"):
        ScoreStore(tmp_path / "folder.sqlite", {})


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


FULL_DISK = """
import resource, sys
from codes.common.errors import ContrastRMError
from codes.common.score_store import ScoreStore
store = ScoreStore(sys.argv[1], {})
store.add({store.key(b"kept"): 1.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    for start in range(0, 100_000, 1000):
        store.add({store.key(str(n).encode()): float(n) for n in range(start, start + 1000)})
except ContrastRMError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_leaves_whole_batches(tmp_path: Path) -> None:
    printed, _ = run_script(FULL_DISK, tmp_path / "s.sqlite").communicate(timeout=60)
    assert "cannot write the score store" in printed and "--score_store" in printed and "Traceback" not in printed
    store = ScoreStore(tmp_path / "s.sqlite", {})
    assert store.look_up([store.key(b"kept")]) == {store.key(b"kept"): 1.5}
    assert (len(store) - 1) % 1000 == 0


# --- several processes


WRITER = """
import hashlib, random, sys
from codes.common.score_store import ScoreStore
path, number = sys.argv[1], int(sys.argv[2])
store = ScoreStore(path, {"weights": "a"})
draw = random.Random(number)
texts = list(range(600))
draw.shuffle(texts)
seen = {}
for start in range(0, 600, 20):
    batch = {store.key(b"%d" % text): number + text / 1000 for text in texts[start : start + 20]}
    seen |= store.add(batch)
assert store.look_up(list(seen)) == seen
print(len(seen), hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest())
"""


def test_processes_that_make_and_fill_one_store_agree(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    writers = [run_script(WRITER, path, number) for number in range(4)]
    printed = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, printed
    # Everybody saw all texts, and the same score of each, whoever had stored it.
    assert len(set(printed)) == 1 and printed[0].startswith("600 ")
    store = ScoreStore(path, {"weights": "a"})
    assert len(store) == 600
    keys = [store.key(b"%d" % text) for text in range(600)]
    found = store.look_up(keys)
    for text, key in enumerate(keys):
        assert found[key] in {float32(number + text / 1000) for number in range(4)}


def test_a_file_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    maker = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None, check_same_thread=False)
    # SQLite refuses to change the kind of journal at once then, however long it was told to wait.
    maker.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, maker.execute, ["ROLLBACK"])
    release.start()
    store = ScoreStore(tmp_path / "s.sqlite", {})
    release.join()
    assert store.add({store.key(b"x"): 1.0})


def test_a_store_that_somebody_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "BUSY_SECONDS", 0.2)
    store = ScoreStore(tmp_path / "s.sqlite", {})
    holder = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(ContrastRMError, match="is locked: another process has held it"):
        store.add({store.key(b"x"): 1.0})
    holder.execute("ROLLBACK")
    assert store.add({store.key(b"x"): 1.0})


# --- the scorer on a store


def make_scorer(folder: Path, store: Path | None, **options: Any) -> Scorer:
    model, tokenizer = load_reward_model(str(folder))
    scorer = Scorer(model, ChatFormatter(tokenizer), max_tokens_per_batch=150, progress=False, **options)
    scorer.store = None if store is None else ScoreStore(store, {"weights": loaded_weights_hash(model)})
    return scorer


@pytest.mark.parametrize("packing", ["shared", "packed", "off"])
def test_a_run_that_goes_on_ends_with_the_same_bits(packing: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    expected = make_scorer(tiny_llama_dir, None, packing=packing).score(TEXTS)
    scorer = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite", packing=packing)
    whole = scorer.score(TEXTS)
    assert whole.scores.tobytes() == expected.scores.tobytes()
    assert (expected.n_from_store, whole.n_from_store, whole.n_computed_tokens) == (None, 0, expected.n_computed_tokens)
    assert scorer.store is not None
    texts = list(dict.fromkeys(scorer.formatter.encode(TEXTS)))
    keys = [scorer.store.key(text_bytes(text)) for text in texts]
    batches = scorer._plan(texts, scorer.max_tokens_per_batch)
    assert len(batches) > 5
    draw = random.Random(0)
    connection = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    for kept in (len(batches), len(batches) - 1, 3, 0):
        # What a kill leaves: some whole batches.
        lost = [index for batch in batches[kept:] for index in batch]
        connection.executemany("DELETE FROM scores WHERE key = ?", [(keys[index],) for index in lost])
        again = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite", packing=packing).score(TEXTS)
        assert again.scores.tobytes() == expected.scores.tobytes()
        assert again.n_from_store == len(texts) - len(lost)
        assert (again.n_computed_tokens == 0) == (not lost)
    # And what another evaluation leaves that shares a text here and there.
    lost = [index for index in range(len(texts)) if draw.random() < 0.3]
    connection.executemany("DELETE FROM scores WHERE key = ?", [(keys[index],) for index in lost])
    again = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite", packing=packing).score(TEXTS)
    assert again.scores.tobytes() == expected.scores.tobytes()


def test_a_text_has_one_score_in_all_evaluations(tiny_llama_dir: Path, tmp_path: Path) -> None:
    first = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite").score(TEXTS[:12])
    other_company = [TEXTS[3], *TEXTS[20:], *TEXTS[5:9]]
    second = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite").score(other_company)
    assert second.n_from_store == 5
    assert second.scores[[0, -4, -3, -2, -1]].tobytes() == first.scores[[3, 5, 6, 7, 8]].tobytes()


def test_a_score_that_another_process_stored_meanwhile_is_the_score(tiny_llama_dir: Path, tmp_path: Path) -> None:
    scorer = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite")
    assert scorer.store is not None
    keys = [scorer.store.key(text_bytes(text)) for text in scorer.formatter.encode(TEXTS)]
    other = ScoreStore(tmp_path / "s.sqlite", {"weights": loaded_weights_hash(scorer.model)})

    def store_first(*_: object) -> None:
        if len(other) == 0:
            # Another machine, another rounding.
            other.add({key: 1.0 + number * 1e-3 for number, key in enumerate(keys)})

    scorer.model.register_forward_pre_hook(store_first)
    first = scorer.score(TEXTS)
    assert first.n_from_store == 0
    assert first.scores.tobytes() == np.array([1.0 + number * 1e-3 for number in range(len(TEXTS))], "f4").tobytes()
    assert make_scorer(tiny_llama_dir, tmp_path / "s.sqlite").score(TEXTS).scores.tobytes() == first.scores.tobytes()


def test_the_same_ids_in_other_segments_are_another_text() -> None:
    ids = (5, 6, 7)
    texts = [EncodedText(ids), EncodedText(ids, (0, 0, 0)), EncodedText(ids, (0, 0, 1)), EncodedText((*ids, 0, 0, 0))]
    assert len({text_bytes(text) for text in texts}) == 4
    # What was cut away is not seen by the model.
    assert text_bytes(EncodedText(ids, n_cut=3)) == text_bytes(EncodedText(ids))


@pytest.mark.parametrize(("dtype", "is_rounding"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("place", ["shortest", "longest"])
def test_the_check_of_some_texts_alone_knows_the_dtype_and_looks_at_all_lengths(
    place: str, dtype: str, is_rounding: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype=dtype)
    scorer = Scorer(model, ChatFormatter(tokenizer), progress=False, checked_texts=3)
    texts = list(dict.fromkeys(scorer.formatter.encode(TEXTS)))
    scores = scorer.score_texts(texts).scores.tolist()
    lengths = [len(text.input_ids) for text in texts]
    longest = max(lengths) if place == "longest" else min(lengths)
    assert scorer.check_alone(texts, scores).is_rounding
    # A tenth of a standard deviation off: bfloat16 can do that, float32 cannot.
    off = [score + 0.1 * np.std(scores) * (length == longest) for score, length in zip(scores, lengths, strict=True)]
    assert scorer.check_alone(texts, off).is_rounding == is_rounding


def test_dropped_and_repeated_texts(tiny_llama_dir: Path, tmp_path: Path) -> None:
    scorer = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite")
    scorer.formatter = ChatFormatter(scorer.formatter.tokenizer, max_length=40, overlength="drop")
    once, again = scorer.score([*TEXTS, *TEXTS]), scorer.score(TEXTS)
    assert once.n_dropped > 0 and again.n_from_store == again.n_distinct == once.n_distinct
    np.testing.assert_array_equal(once.scores, np.concatenate([again.scores, again.scores]))


def test_ties_and_the_check_of_some_texts_alone(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert count_tied([1.0, 2.0, 1.0, 1.0]) == 3 and count_tied([]) == 0
    scorer = make_scorer(tiny_llama_dir, tmp_path / "s.sqlite", checked_texts=5)
    result = scorer.score(TEXTS)
    assert result.invariance is not None and result.invariance.is_rounding
    assert result.invariance.n_texts == 5 and result.invariance.max_difference < 1e-4
    assert result.invariance.score_sd == pytest.approx(np.std(result.scores.astype(float)), rel=1e-6)
    # A store whose scores are not this model's would be seen at once.
    assert scorer.store is not None
    other = make_scorer(tiny_llama_dir, tmp_path / "other.sqlite", checked_texts=5)
    assert other.store is not None
    texts = list(dict.fromkeys(other.formatter.encode(TEXTS)))
    other.store.add({other.store.key(text_bytes(text)): float(number) for number, text in enumerate(texts)})
    wrong = other.score(TEXTS).invariance
    assert wrong is not None and not wrong.is_rounding
    with torch.no_grad():
        scorer.model.classifier.score.weight.zero_()
    scorer.store = None
    flat = scorer.score(TEXTS)
    assert flat.n_tied_texts == flat.n_distinct and flat.invariance is not None and flat.invariance.is_rounding
    assert scorer.score([]).invariance is None


def test_a_scorer_of_another_kind_has_a_store_only_when_it_is_asked_for(tiny_llama_dir: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/score"  # nobody is asked
    server = {"model_path": "my-server", "reward_url": url, "results_dir": str(tmp_path)}
    for choice in ("auto", "none"):
        assert isinstance(load_scorer(ScorerSettings(**server, score_store=choice)).scorer, RemoteScorer)
    assert list(tmp_path.iterdir()) == []
    stores = [load_scorer(ScorerSettings(**server, score_store=str(tmp_path / "s.sqlite"))).scorer]
    stores.append(
        load_scorer(ScorerSettings(**{**server, "model_path": "other"}, score_store=str(tmp_path / "s.sqlite"))).scorer
    )
    stores.append(
        load_scorer(
            ScorerSettings(**{**server, "reward_url": url + "2"}, score_store=str(tmp_path / "s.sqlite"))
        ).scorer
    )
    assert all(isinstance(scorer, StoredScorer) for scorer in stores)
    assert len({scorer.store.key(b"text") for scorer in stores}) == 3  # each its own scores


def test_a_store_before_a_scorer_of_another_kind(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredScorer, "TEXTS_AT_ONCE", 4)
    inner = make_scorer(tiny_llama_dir, None)
    inner.formatter = ChatFormatter(inner.formatter.tokenizer, max_length=60, overlength="drop")
    expected = inner.score(TEXTS)
    scorer = StoredScorer(inner, ScoreStore(tmp_path / "s.sqlite", {"reward_url": "here"}))
    first, again = scorer.score([*TEXTS, TEXTS[0]]), scorer.score(TEXTS)
    np.testing.assert_allclose(first.scores[:-1], expected.scores, atol=1e-5)
    assert first.scores[-1] == first.scores[0] and (first.n_dropped, first.n_from_store) == (expected.n_dropped, 0)
    np.testing.assert_array_equal(again.scores, first.scores[:-1])
    # Dropped texts have no score to keep; all others come from the store.
    assert again.n_distinct == again.n_from_store == expected.n_distinct and again.n_dropped == expected.n_dropped


# --- a changed model


def variant(folder: Path, tmp_path: Path, name: str, change: str) -> Path:
    """The model with one thing changed."""
    model, tokenizer = load_reward_model(str(folder))
    if change == "one weight":
        with torch.no_grad():
            model.classifier.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    target = save_reward_model(model, tokenizer, tmp_path / name)
    if change.startswith("config"):
        config = json.loads((target / "config.json").read_text())
        config["rope_parameters"] = {**(config.get("rope_parameters") or {"rope_type": "default"}), "rope_theta": 77.0}
        (target / "config.json").write_text(json.dumps(config))
    return target


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("one weight", {}),
    ("template", {}),
    ("config", {}),
    ("none", {"dtype": "bfloat16"}),
    ("none", {"max_length": 50}),
    ("none", {"overlength": "drop"}),
    ("none", {"packing": "off"}),
    ("none", {"attn_implementation": "eager"}),
]


@pytest.mark.parametrize(("change", "options"), CHANGES)
def test_a_changed_model_finds_no_old_score(
    change: str, options: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "shared.sqlite")
    usual = {
        "model_path": str(variant(tiny_llama_dir, tmp_path, "usual", "none")),
        "device": "cpu",
        "score_store": store,
    }
    assert load_scorer(ScorerSettings(**usual)).scorer.score(TEXTS).n_from_store == 0
    # The same weights in another folder are the same model.
    moved = {**usual, "model_path": str(variant(tiny_llama_dir, tmp_path, "moved", "none"))}
    found = load_scorer(ScorerSettings(**moved)).scorer.score(TEXTS)
    assert found.n_from_store == found.n_distinct
    changed = {**usual, "model_path": str(variant(tiny_llama_dir, tmp_path, "changed", change)), **options}
    fresh = load_scorer(ScorerSettings(**{**changed, "score_store": "none"})).scorer.score(TEXTS)
    kept = load_scorer(ScorerSettings(**changed)).scorer.score(TEXTS)
    assert kept.n_from_store == 0
    np.testing.assert_array_equal(kept.scores, fresh.scores)


def test_adapters_on_the_same_base_are_other_models(tiny_llama_dir: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = load_reward_model(str(tiny_llama_dir))
    hashes = {loaded_weights_hash(model)}
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    hashes.add(loaded_weights_hash(adapted))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    hashes.add(loaded_weights_hash(adapted))
    assert len(hashes) == 3


def test_changed_code_and_versions_are_another_making(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_scorer(ScorerSettings(model_path=str(tiny_llama_dir), device="cpu"))
    assert isinstance(loaded.scorer, Scorer)
    before = making_of_scores(loaded.scorer.model, loaded.description)
    assert before == making_of_scores(loaded.scorer.model, loaded.description)
    monkeypatch.setattr("transformers.__version__", "0.0.1")
    assert making_of_scores(loaded.scorer.model, loaded.description)["versions"] != before["versions"]
    changed = tmp_path / "packing.py"
    changed.write_text(Path(sys.modules["codes.common.packing"].__file__ or "").read_text() + "# changed\n")
    monkeypatch.setattr("codes.common.packing.__file__", str(changed))
    assert making_of_scores(loaded.scorer.model, loaded.description)["code"] != before["code"]


# --- evaluations


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    draw = random.Random(0)
    made = [evaluation_row(draw, "length", number) for number in range(12)]
    (folder / "length_bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    bench = [
        {
            "id": number,
            "prompt": row["question"],
            "chosen": row["original_response1"],
            "rejected": row["original_response2"],
            "subset": "hep-go",
        }
        for number, row in enumerate(made)
    ]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench))
    return folder


def flags(model: Path, folder: Path) -> list[str]:
    return ["--model_path", str(model), "--results_dir", str(folder), "--device", "cpu"]


def test_evaluations_share_the_store_of_their_model(
    rows: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = flags(tiny_llama_dir, tmp_path)
    bias = [*usual, "--data_dir", str(rows), "--bias_type", "length"]
    results = tmp_path / tiny_llama_dir.name
    assert eval_rm.main(bias) == 0
    assert "score store: 0 of 48 distinct texts found, 48 computed" in capsys.readouterr().out
    first = json.loads((results / "bias_summary.json").read_text())
    pairs = (results / "bias_length.jsonl").read_bytes()
    assert eval_rm.main(bias) == 0
    printed = capsys.readouterr().out
    assert "score store: 48 of 48 distinct texts found, 0 computed" in printed
    assert "8 texts scored again alone differ by at most" in printed and "WARNING" not in printed
    again = json.loads((results / "bias_summary.json").read_text())
    assert (results / "bias_length.jsonl").read_bytes() == pairs
    assert again["metadata"]["n_computed_tokens"] == 0 < first["metadata"]["n_computed_tokens"]
    assert again["metadata"]["invariance"]["is_rounding"] and again["metadata"]["n_tied_texts"] == 0
    assert again["metadata"]["score_store"] == str(results / "scores.sqlite")
    for summary in (first, again):
        for field in RUN_FIELDS:
            del summary["metadata"][field]
    assert first == again
    # A second benchmark on the same texts costs nothing.
    assert eval_reward_bench.main([*usual, "--data_file", str(rows / "bench.jsonl")]) == 0
    assert "score store: 24 of 24 distinct texts found, 0 computed" in capsys.readouterr().out
    assert eval_rm.main([*bias, "--score_store", "none"]) == 0
    assert "score store" not in capsys.readouterr().out


def test_a_damaged_store_stops_the_run_with_its_cure(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    usual = [*flags(tiny_llama_dir, tmp_path), "--data_dir", str(rows), "--bias_type", "length"]
    store = tmp_path / "broken.sqlite"
    store.write_bytes(b"x" * 5000)
    with pytest.raises(ContrastRMError, match="delete it: it is filled again"):
        eval_rm.main([*usual, "--score_store", str(store)])


def test_two_evaluations_at_once_on_one_store(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    common = [*flags(tiny_llama_dir, tmp_path), "--max_tokens_per_batch", "64"]
    commands = {
        "codes.evaluate.eval_rm": [*common, "--data_dir", str(rows), "--bias_type", "length"],
        "codes.evaluate.eval_reward_bench": [*common, "--data_file", str(rows / "bench.jsonl")],
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPO_ROOT,
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for module, arguments in commands.items()
    ]
    printed = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    results = tmp_path / tiny_llama_dir.name
    pairs = [json.loads(line) for line in (results / "bias_length.jsonl").read_text().splitlines()]
    bench = [json.loads(line) for line in (results / "reward_bench.jsonl").read_text().splitlines()]
    # The same texts, whoever scored them: one score.
    assert [(row["score_original_better"], row["score_original_other"]) for row in pairs] == [
        (row["score_chosen"], row["score_rejected"]) for row in bench
    ]
    assert sqlite3.connect(results / "scores.sqlite").execute("SELECT count(*) FROM scores").fetchone() == (48,)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_results() -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "evaluation", "--kills", "3", "--rows", "60", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n_kills"] == 3 and result["differences"] == {"files_that_differ": []}
