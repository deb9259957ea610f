"""The peers do what they are said to do: honest opponents on the same rows, and numbers that mean what they say.

Every peer runs on a two-layer model and the project's own data. TRL runs where its environment is installed
(``bash benchmarks/setup_trl.sh``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import common, exactness, gemm_rate, rows, speed, speed_report, suites
from benchmarks.padded import group_losses, load_plain_model, token_budget_batches
from benchmarks.peers import original_loop, ours, pipeline_scoring, sorted_padded
from codes.common.biases import EVALUABLE, eval_file_name
from codes.common.errors import ContrastRMError
from codes.common.packing import build_pack
from codes.common.records import PreferenceRecord, read_preference_file, write_jsonl
from codes.train.losses import contrastive_loss
from tests.conftest import REPO_ROOT, run_module

EVAL = REPO_ROOT / "data" / "eval"
SCORED = [
    EVAL / "length_bias.jsonl",
    EVAL / "gender_bias.jsonl",
    EVAL / "refinement-aware_bias.jsonl",
    EVAL / "reward_bench" / "own_sample.jsonl",
]
PERCENT = 30
TRL_PYTHON = REPO_ROOT / os.environ.get("TRL_VENV", "output/benchmarks/trl-venv") / "bin" / "python"
Line = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only lose by a second thread, and badly so on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return common.prepare_model(str(tiny_base_dir), tmp_path_factory.mktemp("benchmarks") / "model")


@pytest.fixture(scope="module")
def train_files(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``pairs``: 8 of them. ``groups``: 8 whole groups of uneven size."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = folder / "pairs.jsonl"
    options = ["--n", "8", "--model_path", str(model_dir), "--max_length", "1500", "--output_file", str(pairs)]
    rows.main(["--input_file", str(REPO_ROOT / "data/train-unified-feedback/own_sample.jsonl"), *options])
    groups = folder / "groups.jsonl"
    records, _ = read_preference_file(REPO_ROOT / "data/train/own_train.jsonl")
    short = sorted(records, key=lambda record: len(str(record.to_row())))[:8]
    uneven = [
        record.to_row() | {"rejected": record.rejected[: 1 + number % 3], "bias_type": None}
        for number, record in enumerate(short)
    ]
    write_jsonl(groups, uneven)
    assert {len(row["rejected"]) for row in uneven} == {1, 2, 3}
    return {"pairs": pairs, "groups": groups}


@pytest.fixture
def line_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Line]:
    """Run a peer's main and parse the one line that it prints."""

    def run_peer(main: Callable[[list[str]], int], *arguments: object) -> Line:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        return json.loads(lines[0])

    return run_peer


def lone_scores(model_dir: Path, texts: rows.TextSet) -> list[float]:
    """Plain transformers, one text at a time, tokenised by the template itself."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    scores = []
    with torch.inference_mode():
        for conversation in texts.conversations:
            ids = tokenizer.apply_chat_template(conversation.turns(), tokenize=True, return_dict=True)["input_ids"]
            scores.append(model(input_ids=torch.tensor([ids])).logits.item())
    return scores


def test_every_scoring_peer_gives_the_lone_scores_on_the_same_texts(
    model_dir: Path, line_of: Callable[..., Line], tmp_path: Path
) -> None:
    texts = rows.read_texts(SCORED, percent=PERCENT)
    expected = lone_scores(model_dir, texts)
    assert len(expected) > 64 and torch.tensor(expected).std() > 0.02  # several batches, and scores that differ
    peers = {
        "original_loop": (original_loop.main, ["score"]),
        "sorted_padded": (sorted_padded.main, ["score"]),
        "pipeline_scoring": (pipeline_scoring.main, []),
        "ours.off": (ours.main, ["score", "--packing", "off"]),
        "ours.packed": (ours.main, ["score", "--packing", "packed"]),
        "ours.shared": (ours.main, ["score"]),
    }
    lines = {}
    for name, (main, task) in peers.items():
        scores_file = tmp_path / f"{name}.json"
        options = ["--model_path", model_dir, "--percent", PERCENT, "--scores_file", scores_file, "--device", "cpu"]
        lines[name] = line_of(main, *task, *options, "--files", *SCORED)
        scores = json.loads(scores_file.read_text())
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), atol=1e-4, rtol=0)
        assert lines[name]["peer"] == name.partition(".")[0] and lines[name]["seconds"] > 0
        assert lines[name]["texts_per_second"] == pytest.approx(len(expected) / lines[name]["seconds"])
    same = ("n_texts", "n_distinct", "n_tokens", "rows", "weight_hash")
    assert len({json.dumps([line[key] for key in same]) for line in lines.values()}) == 1
    original, sorted_, piped, padded, packed, shared = (lines[name]["n_computed_tokens"] for name in peers)
    assert original == piped > sorted_ >= lines["original_loop"]["n_tokens"]
    assert sorted_ > padded >= packed == lines["ours.packed"]["n_distinct_tokens"] > shared
    # What is useful is a property of the texts, not of the way they are computed.
    assert len({lines[name]["useful_flops"] for name in peers if name.startswith("ours")}) == 1


def test_reduced_precision_scores_are_near(model_dir: Path, line_of: Callable[..., Line], tmp_path: Path) -> None:
    texts = rows.read_texts(SCORED[:1], percent=PERCENT)
    expected = torch.tensor(lone_scores(model_dir, texts))
    for precision in ("bfloat16", "autocast"):
        scores_file = tmp_path / "scores.json"
        options = ["--model_path", model_dir, "--percent", PERCENT, "--scores_file", scores_file, "--files", SCORED[0]]
        line = line_of(original_loop.main, "score", "--precision", precision, *options)
        difference = (torch.tensor(json.loads(scores_file.read_text())) - expected).abs().max()
        assert 0 < difference < 0.1 and line["precision"] == precision


def test_sorting_a_step_changes_the_padding_and_not_the_losses(
    model_dir: Path, train_files: dict[str, Path], line_of: Callable[..., Line]
) -> None:
    options = ["--model_path", model_dir, "--train_file", train_files["groups"], "--max_length", 4000]
    options += ["--groups_per_step", 4, "--learning_rate", 1e-3, "--device", "cpu"]
    one = line_of(original_loop.main, "train", *options)
    split = line_of(original_loop.main, "train", *options, "--micro_batch_size", 1)
    sorted_ = line_of(sorted_padded.main, "train", *options, "--max_tokens", 3000)
    own = {
        packing: line_of(ours.main, "train", *options, "--packing", packing, "--max_tokens_per_batch", 2000)
        for packing in ours.PACKINGS
    }
    for line in (one, split, sorted_, *own.values()):
        assert len(line["losses"]) == 2 and line["n_groups"] == 4  # one step warms up, one is timed
        assert line["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert line["n_tokens"] == one["n_tokens"] and line["n_answers"] == one["n_answers"]
        assert line["groups_per_second"] == pytest.approx(4 / line["seconds"])
        assert line["peak_bytes"] > 10**7
    assert one["n_computed_tokens"] > sorted_["n_computed_tokens"] >= split["n_computed_tokens"] > one["n_tokens"]
    assert own["packed"]["n_computed_tokens"] == one["n_tokens"] > own["shared"]["n_computed_tokens"]
    assert own["off"]["micro_steps"] > 1  # the budget was in force
    assert len({line["useful_flops"] for line in own.values()}) == 1


def test_our_trainer_in_bfloat16_keeps_masters_and_checkpoints_change_no_loss(
    model_dir: Path, train_files: dict[str, Path], line_of: Callable[..., Line]
) -> None:
    options = ["--model_path", model_dir, "--train_file", train_files["pairs"], "--max_length", 1500]
    options += ["--groups_per_step", 2, "--steps", 1, "--device", "cpu", "--temperature", 1]
    exact = line_of(ours.main, "train", *options)
    recomputed = line_of(ours.main, "train", *options, "--gradient_checkpointing", 1)
    assert recomputed["losses"] == pytest.approx(exact["losses"], abs=1e-6)
    assert line_of(original_loop.main, "train", *options, "--gradient_checkpointing", 1)["losses"] == pytest.approx(
        exact["losses"], abs=1e-5
    )
    rounded = line_of(ours.main, "train", *options, "--precision", "bfloat16")
    assert (exact["weights"], rounded["weights"]) == ("float32", "bfloat16 with float32 masters")
    assert rounded["losses"] != exact["losses"] and rounded["losses"] == pytest.approx(exact["losses"], abs=0.05)


def test_the_first_loss_is_that_of_the_lone_scores(
    model_dir: Path, train_files: dict[str, Path], line_of: Callable[..., Line]
) -> None:
    records, _ = read_preference_file(train_files["groups"])
    conversations = [
        rows.Conversation(record.messages, answer)
        for record in records[:4]
        for answer in [*record.rejected, record.chosen]
    ]
    scores = torch.tensor(lone_scores(model_dir, rows.TextSet(conversations, {})))
    sizes = [len(record.rejected) + 1 for record in records[:4]]
    expected = contrastive_loss(scores, torch.tensor(sizes), 0.5)
    torch.testing.assert_close(group_losses(scores, sizes, 0.5), expected)
    options = ["--model_path", model_dir, "--train_file", train_files["groups"], "--max_length", 4000]
    line = line_of(original_loop.main, "train", *options, "--steps", 1)
    assert line["losses"][0] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_trl_sees_the_same_pairs_and_has_the_same_losses(
    model_dir: Path, train_files: dict[str, Path], line_of: Callable[..., Line]
) -> None:
    if not TRL_PYTHON.exists():
        pytest.skip("TRL's environment is not installed: bash benchmarks/setup_trl.sh")
    options = ["--model_path", model_dir, "--train_file", train_files["pairs"], "--max_length", 1500]
    options += ["--groups_per_step", 2, "--steps", 2, "--learning_rate", 1e-4, "--device", "cpu"]
    done = subprocess.run(
        [TRL_PYTHON, "-m", "benchmarks.peers.trl_reward", *map(str, options)],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trl = json.loads(done.stdout)  # one line and nothing else
    ours = line_of(original_loop.main, "train", *options, "--temperature", 1)
    same = ("n_groups", "n_answers", "n_tokens", "n_computed_tokens", "weight_hash", "precision", "groups_per_step")
    assert [trl[key] for key in same] == [ours[key] for key in same]
    # The third step's loss has felt two updates: the optimizers agree too.
    assert len(trl["losses"]) == 3 and trl["losses"] == pytest.approx(ours["losses"], abs=1e-4)
    assert trl["seconds"] > 0 and trl["peak_bytes"] > 10**7


def test_a_peer_is_a_process_of_its_own_that_prints_one_line(model_dir: Path, tmp_path: Path) -> None:
    output_file = tmp_path / "lines.jsonl"
    options = ["--model_path", model_dir, "--files", SCORED[0], "--percent", PERCENT, "--output_file", output_file]
    done = run_module("benchmarks.peers.original_loop", "score", *options, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert output_file.read_text() == done.stdout
    line = json.loads(done.stdout)
    assert line["machine"]["threads"] == 1 and line["versions"]["torch"] == torch.__version__
    assert {"git_commit", "n_parameters", "weight_hash", "peak_of"} <= set(line)


def test_without_public_data_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(rows.EXTERNAL_DATA, raising=False)
    with pytest.raises(ContrastRMError, match=f"set {rows.EXTERNAL_DATA} to the folder with train_pool.jsonl"):
        rows.main(["--n", "2", "--output_file", str(tmp_path / "rows.jsonl")])
    with pytest.raises(ContrastRMError, match=rows.EXTERNAL_DATA):
        original_loop.main(["score"])


def record(identity: str, question: str, chosen: str, *rejected: str) -> PreferenceRecord:
    return PreferenceRecord(
        identity, [{"role": "user", "content": question}], chosen, list(rejected), [None] * len(rejected)
    )


POOL = [
    record("a1", "why is the sky blue", "A1", "A2"),
    record("a2", "why is the sky blue", "A1", "A3"),
    record("a3", "why is the sky blue", "A4", "A2"),
    record("b1", "why is the sky red", "B1", "B2"),
    record("b2", "why is the sky red", "B1", "B3"),
    record("c1", "how do bees fly", "C1", "C2"),
]


def test_groups_take_their_own_answers_first_and_then_the_nearest_questions() -> None:
    (group,), report = rows.choose_groups(POOL, 4, 1)
    assert group.question == "why is the sky blue"  # the only one with four answers
    assert sorted([group.chosen, *group.rejected]) == ["A1", "A2", "A3", "A4"]
    assert (report.n_own_rejected + report.n_own_chosen, report.n_borrowed) == (3, 0)
    (group,), report = rows.choose_groups(POOL, 6, 1)
    assert sorted([group.chosen, *group.rejected]) == ["A1", "A2", "A3", "A4", "B2", "B3"]
    assert (report.n_groups, report.n_answers, report.n_borrowed) == (1, 6, 2)
    (group,), _ = rows.choose_groups(POOL, 7, 1)
    assert group.rejected[-1] == "C2"  # the farther question comes last
    with pytest.raises(ContrastRMError, match="only 0 groups of 8 answers"):
        rows.choose_groups(POOL, 8, 1)  # seven texts, and none is made up


def test_groups_do_not_depend_on_the_order_of_the_file_and_are_short_enough() -> None:
    records, _ = read_preference_file(REPO_ROOT / "data/train/own_train.jsonl")

    middle = sorted(len(one.chosen) for one in records)[len(records) // 2]

    def short(messages: list[dict[str, str]], texts: Any) -> bool:
        return len(texts[-1]) < middle  # the chosen answer comes last

    for answers in (2, 5):
        groups, report = rows.choose_groups(records, answers, 8)
        again, _ = rows.choose_groups(records[::-1], answers, 8)
        assert groups == again and all(len(group.rejected) == answers - 1 for group in groups)
        assert report.n_answers == 8 * answers == 8 + report.n_own_rejected + report.n_own_chosen + report.n_borrowed
        known = {text for one in records for text in [one.chosen, *one.rejected]}
        for group in groups:
            texts = [group.chosen, *group.rejected]
            assert len(set(texts)) == answers and set(texts) <= known
    fitting, report = rows.choose_groups(records, 2, 8, fits=short)
    assert report.n_too_long > 0 and all(short(group.messages, [*group.rejected, group.chosen]) for group in fitting)
    other, _ = rows.choose_groups(records, 2, 8, seed=7)
    assert {group.id for group in other} != {group.id for group in rows.choose_groups(records, 2, 8)[0]}


def test_a_question_is_in_or_out_of_all_files_alike() -> None:
    files = [EVAL / eval_file_name(name) for name in EVALUABLE]
    whole, half = rows.read_texts(files), rows.read_texts(files, percent=50)
    n_rows = [len(file.read_text().splitlines()) for file in files]
    assert list(whole.fields["rows"].values()) == n_rows
    # Four texts a pairwise row, three a refinement row.
    assert len(whole.conversations) == sum(4 * n for n in n_rows[:-1]) + 3 * n_rows[-1]
    questions = {one.messages[0]["content"] for one in half.conversations}
    assert half.conversations == [one for one in whole.conversations if one.messages[0]["content"] in questions]
    assert len(questions) == half.fields["n_questions"] < half.fields["n_questions_in_files"]
    assert 0.3 < len(questions) / whole.fields["n_questions"] < 0.7
    alone = rows.read_texts(files[:1], percent=50)  # the same questions, whichever other files are read
    assert alone.conversations == half.conversations[: len(alone.conversations)]


def test_a_file_that_is_no_evaluation_file_is_refused() -> None:
    with pytest.raises(
        ContrastRMError, match=r"own_train.jsonl is no evaluation file: its first row has the fields id"
    ):
        rows.read_texts([REPO_ROOT / "data/train/own_train.jsonl"])


@settings(deadline=None, max_examples=50)
@given(
    items=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 300)), min_size=1, max_size=30),
    max_tokens=st.integers(1, 3000),
)
def test_token_budget_batches(items: list[tuple[int, int]], max_tokens: int) -> None:
    n_rows, longest = [item[0] for item in items], [item[1] for item in items]
    batches = token_budget_batches(n_rows, longest, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(items)))
    for batch in batches:
        size = sum(n_rows[index] for index in batch) * max(longest[index] for index in batch)
        assert size <= max_tokens or len(batch) == 1
    assert token_budget_batches([1, 1, 1], [5, 9, 8], 18) == [[1, 2], [0]]


def test_flops_are_those_that_torch_counts(model_dir: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    length = 64
    ids = torch.randint(5, 200, (1, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    shape = common.model_shape(model_dir)
    # Eager attention computes the square; norms are parameters without a product, a percent of so small a model.
    assert common.forward_flops(shape, length, length**2) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("lengths", "prefix"), [((2, 1), 0), ((2, 1), 2), ((5,), 0), ((0, 4, 4), 3)])
def test_attended_pairs_are_those_of_the_mask(lengths: tuple[int, ...], prefix: int) -> None:
    owner = [-1] * prefix + [text for text, length in enumerate(lengths) for _ in range(length)]
    pairs = [(q, k) for q in range(len(owner)) for k in range(q + 1) if owner[k] in (-1, owner[q])]
    assert common.attended_pairs(lengths, prefix) == len(pairs)


@pytest.mark.parametrize(("lengths", "prefix"), [((2, 1), 2), ((5,), 0), ((1, 4, 4), 3)])
def test_visible_pairs_of_a_pack_are_those_of_its_groups(lengths: tuple[int, ...], prefix: int) -> None:
    shared = list(range(100, 100 + prefix))
    sequences = [[*shared, *range(10 * number, 10 * number + length)] for number, length in enumerate(lengths, 1)]
    layout = build_pack(sequences, min_shared=1).layout
    assert common.visible_pairs(layout) == common.attended_pairs(lengths, prefix) == int(layout.mask().sum())


def test_gemm_rate_measures_the_shapes_of_a_block(model_dir: Path, line_of: Callable[..., Line]) -> None:
    line = line_of(gemm_rate.main, "--model_path", model_dir, "--tokens", 16, 32, "--seconds", 0.002, "--device", "cpu")
    assert [(entry["dtype"], entry["tokens"]) for entry in line["rates"]] == [
        (dtype, tokens) for dtype in ("float32", "bfloat16") for tokens in (16, 32)
    ]
    for entry in line["rates"]:
        shapes = {(shape["inputs"], shape["outputs"]): shape["per_block"] for shape in entry["shapes"]}
        assert shapes == {(32, 32): 2, (32, 16): 2, (32, 64): 2, (64, 32): 1}
        rates = [shape["gflops"] for shape in entry["shapes"]]
        assert 0 < min(rates) <= entry["layer_gflops"] <= max(rates)


def test_the_model_is_made_once_and_never_mixed_up(model_dir: Path, tiny_base_dir: Path, tiny_llama_dir: Path) -> None:
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert common.prepare_model(str(tiny_base_dir), model_dir) == model_dir
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ContrastRMError, match="was made of"):
        common.prepare_model(str(tiny_llama_dir), model_dir)
    with pytest.raises(ContrastRMError, match="was made of"):
        common.prepare_model(str(tiny_base_dir), model_dir, seed=1)


def test_unequal_work_is_refused(model_dir: Path, tiny_base_dir: Path, train_files: dict[str, Path]) -> None:
    options = ["train", "--train_file", str(train_files["pairs"]), "--model_path"]
    with pytest.raises(ContrastRMError, match=r"lacks score.weight: every run would draw its own head"):
        original_loop.main([*options, str(tiny_base_dir)])
    with pytest.raises(ContrastRMError, match="more than --max_length 20"):
        original_loop.main([*options, str(model_dir), "--max_length", "20"])
    for main in (original_loop.main, ours.main):
        with pytest.raises(ContrastRMError, match="has 8 groups, the run needs 12"):
            main([*options, str(model_dir), "--max_length", "1500", "--steps", "2"])
    with pytest.raises(ContrastRMError, match="longer than max_length 20"):
        ours.main([*options, str(model_dir), "--max_length", "20"])
    with pytest.raises(ContrastRMError, match="the scorer does not autocast"):
        ours.main(["score", "--model_path", str(model_dir), "--precision", "autocast"])
    with pytest.raises(ContrastRMError, match=r"make it with: python -m benchmarks.common"):
        load_plain_model("output/no-such-model", precision="float32")


@pytest.mark.parametrize("peer", ["trl", "loaders"])
def test_a_setup_names_the_way_out_without_a_python(tmp_path: Path, peer: str) -> None:
    done = subprocess.run(
        ["bash", f"benchmarks/setup_{peer}.sh"],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHON": str(tmp_path / "python9"), f"{peer.upper()}_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Name another one: PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.fixture(scope="module")
def compared(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A scoring suite of three peers, one round, each a process of its own; its folder and its command line."""
    folder = tmp_path_factory.mktemp("speed")
    options = ["--model_path", model_dir, "--device", "cpu", "--threads", 1, "--rounds", 1, "--seconds", 0.002]
    options += ["--files", EVAL / "length_bias.jsonl", "--percent", 20, "--output_dir", folder]
    options += ["--results_dir", folder / "results", "--peers"]
    options += ["gemm", "original_loop", "ours.shared"]
    arguments = ["scoring-bf16", *map(str, options)]
    assert speed.main(arguments) == 0
    return folder, arguments


def test_a_suite_runs_every_peer_once_a_round_and_writes_its_table(compared: tuple[Path, list[str]]) -> None:
    folder, _ = compared
    lines = speed.read_lines(folder / "scoring-bf16.jsonl")
    assert [(line["run"], line["round"]) for line in lines] == [
        (name, 0) for name in ("gemm", "original_loop", "ours.shared")
    ]
    assert all(line["machine"]["threads"] == 1 for line in lines)
    gemm, original, shared = lines
    assert (folder / "results" / "scoring-bf16.jsonl").read_bytes() == (folder / "scoring-bf16.jsonl").read_bytes()
    table = (folder / "results" / "scoring-bf16.md").read_text()
    assert "Not run: pipeline, sorted_padded, ours.off, ours.packed." in table
    row = next(line for line in table.splitlines() if line.startswith("| ours, packed with shared prefixes"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert float(cells[2]) == pytest.approx(original["seconds"] / shared["seconds"], abs=0.006)
    assert cells[3] == f"{shared['n_computed_tokens']:,}"
    rate = shared["useful_flops"] / shared["seconds"] / 1e9
    fastest = max(entry["layer_gflops"] for entry in gemm["rates"] if entry["dtype"] == "bfloat16")
    assert cells[6] == f"{100 * rate / fastest:.0f} %"
    assert 0 < (folder / "results" / "scoring-bf16.svg").stat().st_size < 200_000
    # The committed files name no place of this machine.
    assert not any(
        str(place) in path.read_text() for path in (folder / "results").iterdir() for place in (REPO_ROOT, folder)
    )


def test_a_stopped_suite_goes_on_where_it_was(compared: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, arguments = compared
    file = tmp_path / "scoring-bf16.jsonl"
    whole = (folder / "scoring-bf16.jsonl").read_bytes()
    file.write_bytes(whole + b'{"suite": "scoring-bf16", "run": "ours.sha')  # killed while it wrote
    again = [str(tmp_path) if argument == str(folder) else argument for argument in arguments]
    assert speed.main(again) == 0  # nothing is left to run
    assert file.read_bytes() == whole
    (folder / "results" / "scoring-bf16.md").unlink()
    report = ["report", "scoring-bf16", "--output_dir", str(folder), "--results_dir", str(folder / "results")]
    assert speed.main(report) == 0 and (folder / "results" / "scoring-bf16.md").is_file()
    with pytest.raises(ContrastRMError, match="no lines of gpu in"):
        speed.main(["report", "gpu", "--output_dir", str(folder), "--results_dir", str(folder / "results")])
    with pytest.raises(ContrastRMError, match="scoring-bf16 has no run nobody; it has gemm, original_loop"):
        speed.main([*again, "--peers", "nobody"])


def test_another_commit_or_setting_is_another_measurement(model_dir: Path) -> None:
    suite = suites.build_suite("gemm", suites.Options(model_path=model_dir))
    keys = {
        suites.session_key(suite, options, commit)
        for options in (suites.Options(), suites.Options(percent=3))
        for commit in ("a", "b")
    }
    assert len(keys) == 4
    # Where the rows lie says nothing about them.
    elsewhere = suites.session_key(suite, suites.Options(input_file="x", work_dir=Path("y")), "a")
    assert elsewhere in keys


def test_a_peer_that_cannot_run_is_named_and_tried_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRL_VENV", str(tmp_path / "none"))
    options = ["--model_path", model_dir, "--device", "cpu", "--threads", 1, "--rounds", 1, "--steps", 1]
    options += ["--input_file", REPO_ROOT / "data/train-unified-feedback/own_sample.jsonl", "--groups_per_step", 2]
    options += ["--max_length", 1500, "--output_dir", tmp_path, "--results_dir", tmp_path / "results", "--peers", "trl"]
    for _ in range(2):
        assert speed.main(["training-pairs-bf16", *map(str, options)]) == 1
        assert "TRL's environment is not installed: bash benchmarks/setup_trl.sh" in capsys.readouterr().err
    table = (tmp_path / "results" / "training-pairs-bf16.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| TRL, autocast"))
    assert "not measured" in row and "setup_trl.sh" in row
    lines = speed.read_lines(tmp_path / "training-pairs-bf16.jsonl")
    assert all("failed" in line for line in lines) and len(lines) == 2 * 2
    assert len(speed_report.latest_of_each(lines)) == 2


@pytest.mark.parametrize("when", ["its peer is being started", "its peer computes"])
def test_a_stopped_runner_takes_its_peer_along(model_dir: Path, tmp_path: Path, when: str) -> None:
    options = ["--model_path", model_dir, "--device", "cpu", "--threads", 1, "--seconds", 1000]
    options += ["--output_dir", tmp_path, "--results_dir", tmp_path / "results"]
    runner = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed", "gemm", *map(str, options)],
        cwd=REPO_ROOT,
        # Its children inherit the mark: they are found when their parent has gone, too.
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "MARK_OF_TEST": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )

    def peers() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != runner.pid and process.environ().get("MARK_OF_TEST") == str(tmp_path):
                    found.append(process)
        return found

    try:
        # Its log is opened right before the peer is started.
        while runner.poll() is None and not list(tmp_path.glob("logs/gemm-*.log")):
            time.sleep(0.0002)
        while runner.poll() is None and when == "its peer computes":
            if any("gemm_rate" in " ".join(peer.cmdline()) and peer.cpu_times().user > 0.5 for peer in peers()):
                break
            time.sleep(0.1)
        runner.send_signal(signal.SIGTERM)
        _, errors = runner.communicate(timeout=120)
        assert runner.returncode == 130 and "interrupted" in errors
        assert peers() == []
    finally:
        for process in [runner, *peers()]:
            process.kill()
    assert not (tmp_path / "gemm.jsonl").exists()  # a run that was stopped is no result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_until_a_child_is_known(number: int) -> None:
    before = signal.getsignal(number)
    done = []
    with pytest.raises(KeyboardInterrupt), speed.stops_wait():
        signal.raise_signal(number)
        done.append("the rest of the block")
    assert done and signal.getsignal(number) == before


def test_every_baseline_that_came_to_an_end_is_compared_with() -> None:
    runs = [
        "gemm",
        "original_loop.autocast",
        "sorted_padded.bfloat16",
        "trl.autocast",
        "pipeline",
        "ours.off",
        "ours.shared",
    ]
    lines: list[Line] = [{"run": run, "position": position} for position, run in enumerate(runs)]
    lines[3]["failed"] = "no environment"
    assert speed_report.baselines([*lines[::-1], *lines]) == [
        "original_loop.autocast",
        "sorted_padded.bfloat16",
        "pipeline",
    ]


def test_ratios_are_taken_within_rounds() -> None:
    def measured(run: str, rates: dict[int, float], pairs_per_group: int = 1) -> list[Line]:
        return [
            {
                "kind": "training",
                "run": run,
                "round": number,
                "groups_per_second": rate,
                "pairs_per_group": pairs_per_group,
            }
            for number, rate in rates.items()
        ]

    # Three pairs of TRL's make one group of four.
    lines = measured("ours.shared", {0: 2.0, 1: 9.0}) + measured("trl.autocast", {0: 3.0, 1: 9.0, 2: 150.0}, 3)
    assert speed_report.times_faster(lines, "ours.shared", "trl.autocast") == 2.5
    assert speed_report.times_faster(lines, "ours.shared", "pipeline") is None


def test_every_training_suite_gives_all_peers_the_same_work(model_dir: Path, tmp_path: Path) -> None:
    records = str(REPO_ROOT / "data/train/own_train.jsonl")
    options = suites.Options(
        model_path=model_dir, work_dir=tmp_path, input_file=records, max_length=4000, groups_per_step=2, steps=1
    )
    parsers = {"original_loop": "train", "sorted_padded": "train", "ours": "train"}
    modes = 2
    for name, answers in (("training-pairs-bf16", 2), ("training-groups4-bf16", 4)):
        suite = suites.build_suite(name, options)
        names = [run.name for run in suite.runs]
        # Ours: padded, packed, shared.
        assert len(set(names)) == len(names) == 1 + 2 * modes + (modes if answers == 2 else 0) + 3
        assert sum(one.startswith("trl") for one in names) == (modes if answers == 2 else 0)
        files = {run.arguments[run.arguments.index("--train_file") + 1] for run in suite.runs if run.name != "gemm"}
        (file,) = files
        assert all(len(record.rejected) == answers - 1 for record in read_preference_file(file)[0])
        assert all(run.arguments[0] == parsers.get(run.name.partition(".")[0], run.arguments[0]) for run in suite.runs)
    with pytest.raises(ContrastRMError, match="unknown suite 'training-pairs-int8'"):
        suites.build_suite("training-pairs-int8", options)


def test_the_gpu_suite_is_ready(model_dir: Path, tmp_path: Path, line_of: Callable[..., Line]) -> None:
    options = suites.Options(
        model_path=model_dir,
        work_dir=tmp_path,
        device="cpu",
        shapes=("tiny",),
        prompts=(30,),
        group_sizes=(2, 3),
        groups_per_step=2,
        steps=1,
    )
    suite = suites.build_suite("gpu", options)
    assert {run.scenario for run in suite.runs} == {
        "tiny",
        "tiny, prompts of 30 tokens, groups of 2",
        "tiny, prompts of 30 tokens, groups of 3",
    }
    mine = {run.name: run for run in suite.runs if run.scenario.endswith("groups of 3")}
    line = line_of(ours.main, *mine["ours.shared"].arguments)
    assert (line["n_groups"], line["n_answers"], line["gradient_checkpointing"]) == (2, 6, 1)
    assert line["n_tokens"] > line["n_computed_tokens"] > 2 * 30
    # TRL trains a group of three as two pairs.
    trl = mine["trl.bfloat16"]
    pairs, _ = read_preference_file(trl.arguments[trl.arguments.index("--train_file") + 1])
    groups, _ = read_preference_file(tmp_path / "rows" / "random-3-answers-30-tokens-4-42.jsonl")
    assert trl.pairs_per_group == 2 and len(pairs) == 2 * len(groups) == 8
    assert [pair.rejected for pair in pairs[:2]] == [[text] for text in groups[0].rejected]
    arguments = list(trl.arguments)
    assert arguments[arguments.index("--groups_per_step") + 1] == "4"


def test_exactness_holds_on_a_small_model_and_goes_on_where_it_stopped(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model_path",
        model_dir,
        "--device",
        "cpu",
        "--max_length",
        4000,
        "--chunk",
        3,
        "--max_tokens_per_batch",
        3000,
    ]
    options += ["--input_file", REPO_ROOT / "data/train/own_train.jsonl", "--output_dir", tmp_path]
    options += ["--results_dir", tmp_path / "results", "--bfloat16_groups", 3, "--gradient_groups", 1]
    assert exactness.main([str(option) for option in [*options, "--groups", 3]]) == 0
    first = (tmp_path / "exactness.jsonl").read_text()
    capsys.readouterr()
    assert exactness.main([str(option) for option in [*options, "--groups", 6]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "exactness.jsonl").read_text().startswith(first)  # the first chunk was not scored again
    lines = speed.read_lines(tmp_path / "exactness.jsonl")
    assert [(line["first"], line["stop"]) for line in lines] == [(0, 3), (3, 6)]
    assert [len(scores) for scores in lines[0]["scores"]["float32/packed"]] == [2, 3, 4]
    assert found["n_texts"] == 2 + 3 + 4 + 5 + 6 + 2 and found["n_bfloat16_pairs"] == 1 + 2 + 3
    assert 0 < found["max_difference"] <= found["limit"] and 0 < found["max_gradient_error"] <= 1e-4
    assert f"{found['n_texts']} texts of 6 groups" in (tmp_path / "results" / "exactness.md").read_text()

    # What is wrong is seen: a score, a gradient, a verdict.
    lines[1]["scores"]["float32/packed"][0][0] += 2e-5
    lines[0]["scores"]["bfloat16/packed"][0] = lines[0]["scores"]["bfloat16/packed"][0][::-1]
    wrong = exactness.summarise(lines, [2e-4])
    assert wrong["max_difference"] == pytest.approx(2e-5, rel=0.1)
    assert (wrong["scores_pass"], wrong["gradients_pass"], wrong["bfloat16_pass"]) == (False, False, False)
    assert wrong["packed_differs_from_alone"] == 1 and wrong["padded_differs_from_alone"] == 0
    assert "NO" in exactness.render(found | wrong)
