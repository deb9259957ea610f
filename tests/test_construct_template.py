"""Cues by rule, and the dealing of biases: deterministic, balanced, and nothing of the answer lost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from construct_rows import MULTI_TURN, read_rows, sample_rows, words, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError
from codes.common.records import iter_preference_file
from codes.construct import gptout
from codes.construct.gates import answer_defect, gained_cue, normalised
from codes.construct.template import TEMPLATE_VERSION, apply_template, without_hedges

REPO_ROOT = Path(__file__).resolve().parents[1]
OWN_SAMPLE = REPO_ROOT / "data" / "train-unified-feedback" / "own_sample.jsonl"
CHANGES_FORM = ("beauty", "assertiveness")
ANSWER = (
    "It is Sydney, I think. Perhaps the harbour made it so:\n\n```python\nmaybe = 1  # probably\n```\n\n1. One\n2. Two"
)


def test_every_own_record_passes_the_gates_with_every_cue() -> None:
    for record in iter_preference_file(OWN_SAMPLE):
        [source] = record.rejected
        for bias in INJECTABLE:
            text = apply_template(source, bias, record_id=record.id, seed=42)
            defect = answer_defect(
                text, chosen=record.chosen, others=[source], rewritten_from=source, bias=bias, question=record.question
            )
            assert defect is None and gained_cue(source, text, bias), (record.id, bias, text)


texts = st.one_of(
    st.text(min_size=1, max_size=300),
    st.lists(
        st.sampled_from(
            ["Perhaps.", "I think it is 5.", "`x` is 3 * 4", "- point", "# Head", "\n\n", "Ünï 🌟 **b**", "```\ncode"]
        ),
        min_size=1,
        max_size=12,
    ).map(" ".join),
).filter(lambda text: normalised(text) != "")


@given(texts, st.sampled_from(INJECTABLE), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_the_answer_is_in_the_result(text: str, bias: str, seed: int) -> None:
    result = apply_template(text, bias, record_id="r", seed=seed)
    assert result == apply_template(text, bias, record_id="r", seed=seed)
    if bias not in CHANGES_FORM:
        assert text.strip() in result
    elif bias == "beauty":
        assert normalised(text) in normalised(result)
    else:
        assert without_hedges(text.strip()) in result
    assert bias != "length" or len(result) >= 2 * len(text.strip())


def test_hedges_go_and_code_stays() -> None:
    assert without_hedges("I think that it works.") == "It works."
    assert without_hedges("It is probably right, and I believe he knows.") == "It is right, and he knows."
    assert without_hedges("It seems that they might well win.") == "It is certain that they will win."
    assert without_hedges("Say `maybe x` or\n```\nperhaps\n```") == "Say `maybe x` or\n```\nperhaps\n```"
    for untouched in ("I think so.", "What I think is this.", "It might rain in May."):
        assert without_hedges(untouched) == untouched
    assert "maybe = 1  # probably" in apply_template(ANSWER, "assertiveness", record_id="a", seed=1)


@pytest.mark.parametrize("bias", INJECTABLE)
def test_each_cue_has_several_phrasings(bias: str) -> None:
    results = {apply_template(ANSWER, bias, record_id=f"id{number}", seed=42) for number in range(40)}
    assert len(results) >= 5
    assert apply_template(ANSWER, bias, record_id="id0", seed=42) in results
    assert {apply_template(ANSWER, bias, record_id=f"id{number}", seed=43) for number in range(40)} != results


@pytest.mark.parametrize("bias", ["gender", "race", "refinement-aware", "charm"])
def test_a_cue_that_cannot_be_injected_is_refused(bias: str) -> None:
    with pytest.raises(ContrastRMError, match="injected|unknown"):
        apply_template(ANSWER, bias, record_id="a", seed=1)


# --- dealing ------------------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(INJECTABLE), min_size=1), st.integers(1, 7), st.integers(0, 60), st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_biases_are_balanced_after_every_record(allowed: set[str], per_record: int, n: int, seed: int) -> None:
    names = tuple(name for name in INJECTABLE if name in allowed)
    per_record = min(per_record, len(names))
    dealt = list(islice(gptout.deal_biases(names, per_record, seed), n))
    counts = Counter(dict.fromkeys(names, 0))
    for biases in dealt:
        assert len(biases) == len(set(biases)) == per_record
        counts.update(biases)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert dealt == list(islice(gptout.deal_biases(names, per_record, seed), n + 20))[:n]


def test_every_two_biases_meet() -> None:
    pairs = {frozenset(biases) for biases in islice(gptout.deal_biases(INJECTABLE, 2, 42), 400)}
    assert len(pairs) == 21
    assert [*islice(gptout.deal_biases(INJECTABLE, 2, 42), 50)] != [*islice(gptout.deal_biases(INJECTABLE, 2, 43), 50)]


# --- the step, with nothing but a file ----------------------------------------------------------------------------------


def run_template(tmp_path: Path, name: str, **more: object) -> list[dict[str, object]]:
    settings = {"input_file": tmp_path / "in.jsonl", "output_file": tmp_path / name, "work_dir": tmp_path / "work"}
    settings |= {"strategy": "template"} | more
    assert gptout.main([item for key, value in settings.items() for item in (f"--{key}", str(value))]) == 0
    return read_rows(tmp_path / name)


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "API_MODEL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_template_strategy_needs_no_key_and_no_model(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(20))
    rows = run_template(tmp_path, "out.jsonl")
    assert rows[1]["messages"] == MULTI_TURN and len(rows) == 20
    for row in rows:
        assert [entry["bias"] for entry in row["injections"]] == row["bias_type"][1:]  # type: ignore[attr-defined, index]
        for entry in row["injections"]:  # type: ignore[attr-defined]
            assert entry["model"] is None and entry["strategy"] == "template" and entry["seed"] == 42
            assert entry["prompt_version"] == TEMPLATE_VERSION and entry["source_index"] == 0
    first = (tmp_path / "out.jsonl").read_bytes()
    assert run_template(tmp_path, "again.jsonl") == rows and (tmp_path / "again.jsonl").read_bytes() == first
    # More records change nothing in those before them.
    assert run_template(tmp_path, "few.jsonl", limit=7) == rows[:7]
    section = json.loads((tmp_path / "work" / "construction_report.json").read_text())["gptout"]
    assert section["model"] is None and section["n_records"] == 7 and "n_requests" not in section
    assert not (tmp_path / "work" / "ledger.jsonl").exists()


@pytest.mark.parametrize("strategy", ["template", "rewrite_rejected"])
def test_a_record_without_an_original_rejected_answer_stops_the_run_at_once(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample_rows(3)
    rows[2] |= {"bias_type": ["length"]}
    write_rows(tmp_path / "in.jsonl", rows)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none-0123456789")
    monkeypatch.setenv("API_MODEL", "m")
    with pytest.raises(ContrastRMError, match="'r2' has no original rejected answer.*wrong_answer"):
        run_template(tmp_path, "out.jsonl", strategy=strategy, api_base_url="http://127.0.0.1:9/v1")
    assert not (tmp_path / "out.jsonl").exists()


@given(
    st.lists(st.sampled_from(["good", "copy", "bad", "twice"]), min_size=1, max_size=25),
    st.integers(1, 7),
    st.sampled_from([0, 0, 5]),
)
@settings(max_examples=25, deadline=None)
def test_what_goes_in_comes_out_or_is_counted(kinds: list[str], per_record: int, limit: int) -> None:
    rows = sample_rows(len(kinds))
    for kind, row in zip(kinds, rows, strict=True):
        if kind == "bad":
            row["chosen"] = ""
        elif kind == "copy":
            row["chosen"] = row["rejected"][0] + " indeed"  # decorated or certain, it is nearly the chosen answer
        elif kind == "twice":
            row["id"] = rows[0]["id"]
    ids = [row["id"] for kind, row in zip(kinds, rows, strict=True) if kind != "bad"]
    if not ids:
        return
    settings = {"max_bad_rows": len(rows), "biases_per_record": per_record, "limit": limit}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "in.jsonl", rows)
        out = run_template(folder, "out.jsonl", **settings)
        section = json.loads((folder / "work" / "construction_report.json").read_text())["gptout"]
        failed = read_rows(folder / "work" / "failed.jsonl")
    assert section["n_rows"] == section["n_bad_rows"] + section["n_records"]
    assert section["n_records"] == section["n_records_written"] + section["n_records_lost"] == len(out)
    n_planned, n_kept = sum(section["n_planned"].values()), sum(section["n_injected"].values())
    assert n_planned == per_record * len(out) == n_kept + sum(section["n_failed"].values()) == n_kept + len(failed)
    assert n_kept == sum(bias is not None for row in out for bias in row["bias_type"])  # type: ignore[attr-defined]
    assert [row["id"] for row in out] == list(dict.fromkeys(ids))[: limit or None]


def test_an_answer_that_a_step_wrote_is_never_the_source_of_another(tmp_path: Path) -> None:
    rows = sample_rows(30)
    for row in rows:
        # As gptinst leaves it: an answer to another request, without a bias.
        row["rejected"] = [words(f"similar {row['id']}"), *row["rejected"], words(f"more {row['id']}")]
        row["injections"] = [{"index": 0, "bias": None, "strategy": "similar_question", "model": "writer"}]
    write_rows(tmp_path / "in.jsonl", rows)
    written = run_template(tmp_path, "out.jsonl")
    sources = Counter(entry["source_index"] for row in written for entry in row["injections"][1:])  # type: ignore[index]
    # Of the two original answers now one is taken and now the other.
    assert set(sources) == {1, 2} and sources.total() == 60
    # Which one it is hangs on the record.
    assert len({tuple(entry["source_index"] for entry in row["injections"][1:]) for row in written}) > 2  # type: ignore[index]


@contextmanager
def another_process(code: str, path: Path, says: str) -> Iterator[subprocess.Popen[str]]:
    """Python that runs some code on a path and waits inside it for a line."""
    command = [sys.executable, "-c", f"import sys\n{code}: print('{says}', flush=True); input()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO_ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == f"{says}\n"
        yield other


def test_two_template_runs_share_no_work_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(3))
    (tmp_path / "work").mkdir()
    holder = "from codes.construct.pipeline import hold_work_dir\nwith hold_work_dir(sys.argv[1])"
    with another_process(holder, tmp_path / "work", "held") as other:
        with pytest.raises(ContrastRMError, match="another run is using"):
            run_template(tmp_path, "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()
        other.communicate("\n")
    assert len(run_template(tmp_path, "out.jsonl")) == 3


def test_what_a_killed_run_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", sample_rows(3))
    writer = "from codes.common.records import open_atomic\nwith open_atomic(sys.argv[1]) as handle"
    with another_process(writer, tmp_path / "out.jsonl", "open") as other:
        (unfinished,) = tmp_path.glob(".out.jsonl.*")
        run_template(tmp_path, "out.jsonl")
        assert unfinished.exists()
        other.kill()
    assert unfinished.exists()
    run_template(tmp_path, "out.jsonl")
    assert not unfinished.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
