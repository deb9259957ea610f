"""Objectives in training: the same loss under accumulation, packing, ranks and resumption, for every choice of weights."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.cli import share
from codes.common.errors import ContrastRMError
from codes.common.scoring import Scorer
from codes.train.data_utils import Group
from codes.train.losses import contrastive_loss, group_losses, margin_loss, row_weights_and_margins
from codes.train.reward_model import load_reward_model
from codes.train.settings import Objective, bias_numbers
from codes.train.train_reward_model import main
from tests.conftest import finish, launch_training

BASE = ["--precision", "fp32", "--epochs", "2", "--warmup_steps", "1", "--learning_rate", "1e-3", "--seed", "7"]
TEXT = EncodedText((1, 2))


@pytest.fixture
def uneven_rows() -> list[dict[str, Any]]:
    """Groups of 2 to 6 texts; every third row has a margin, for all answers or for some."""
    rows: list[dict[str, Any]] = []
    for number in range(11):
        n = 1 + number % 5
        rejected = [f"it is {number} because {k} " * (1 + (k + number) % 4) for k in range(n)]
        row = {
            "id": f"row-{number}",
            "question": f"why is the cat number {number} on the mat, and why is it red",
            "chosen": f"because it sat {number}",
            "rejected": rejected,
            "bias_type": [None, "length", "beauty", "length", "authority"][:n],
        }
        if number % 3 == 0:
            row["margin"] = 0.5 if number % 2 else [0.25, *[None] * (n - 1)]
        rows.append(row)
    return rows


@pytest.fixture
def train_file(write_rows: Callable[..., Path], uneven_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", uneven_rows)


def train_here(base: Path, data: Path | str, out: Path, *extra: str) -> list[dict[str, Any]]:
    places = ["--train_file", str(data), "--output_dir", str(out), "--cache_dir", str(out.parent / "cache")]
    assert main(["--model_path", str(base), *places, *BASE, *extra]) == 0
    return read_log(out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["train/loss"] for entry in log]


def assert_same_weights(left: Path, right: Path, tolerance: float) -> None:
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


# --- numbers of rows


def test_weights_and_margins_of_rows() -> None:
    groups = [
        Group("a", (TEXT,) * 4, (None, "length", "beauty"), (0.5, None, None)),
        Group("b", (TEXT,) * 2, ("length",)),
    ]
    objective = Objective(
        "pairwise", 1.0, 1.0, bias_weights={"length": 2.0, "original": 0.5}, bias_margins={"length": 3.0}
    )
    weights, margins = row_weights_and_margins(objective, groups)
    assert weights.tolist() == [0.5, 2.0, 1.0, 1.0, 2.0, 1.0]
    assert margins.tolist() == [0.5, 4.0, 1.0, 0.0, 4.0, 0.0]
    # Contrastive mode has no margin of its own.
    _, margins = row_weights_and_margins(Objective("contrastive", 1.0, 1.0, bias_margins={"length": 3.0}), groups)
    assert margins.tolist() == [0.5, 3.0, 0.0, 0.0, 3.0, 0.0]
    _, margins = row_weights_and_margins(Objective("contrastive", 1.0, 1.0, row_margins="ignore"), groups)
    assert margins is None
    assert row_weights_and_margins(Objective("pairwise", 1.0, 1.0), groups[1:]) == (None, None)


def test_group_losses_are_the_losses_of_the_numbers() -> None:
    groups = [Group("a", (TEXT,) * 3, (None, "length"), (0.5, None)), Group("b", (TEXT,) * 2, (None,))]
    scores = torch.tensor([0.3, -0.2, 0.1, 1.0, 0.5], dtype=torch.float64)
    sizes = torch.tensor([3, 2])
    options: dict[str, Any] = {"bias_weights": {"length": 2.0}, "label_smoothing": 0.1}
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    hinge = group_losses(Objective("pairwise", 0.5, 1.0, **options), scores, sizes, groups)
    margins = torch.tensor([0.5, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    expected = margin_loss(scores, sizes, 1.0, weights=weights, margins=margins, label_smoothing=0.1)
    torch.testing.assert_close(hinge, expected)
    centred = group_losses(Objective("contrastive", 0.5, 1.0, centering=0.01, **options), scores, sizes, groups)
    margins = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    plain = contrastive_loss(scores, sizes, 0.5, weights=weights, margins=margins, label_smoothing=0.1)
    penalty = torch.tensor([(0.4**2 + 0.1**2) / 2, 1.5**2], dtype=torch.float64)
    torch.testing.assert_close(centred, plain + 0.01 * penalty)


def test_numbers_of_biases_are_parsed() -> None:
    assert bias_numbers("length=2, authority=0.5,original=0") == {"length": 2.0, "authority": 0.5, "original": 0.0}
    assert bias_numbers("") == {}
    for bad in ("lenght=2", "length", "length=-1", "length=nan", "length=inf", "length=1,length=2", "gender=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            bias_numbers(bad)
    with pytest.raises(ValueError):
        bias_numbers("length=x")
    for bad in ("1", "-0.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            share(bad)


# --- in training

WEIGHTED = ("--bias_weights", "length=2,original=0.5", "--bias_margins", "beauty=0.3", "--centering", "0.01")
CONTRASTIVE = (*WEIGHTED, "--label_smoothing", "0.1")
PAIRWISE = ("--mode", "pairwise", *WEIGHTED)


@pytest.mark.parametrize(
    "objective",
    [CONTRASTIVE, PAIRWISE, (*PAIRWISE, "--pairwise_loss", "bradley_terry", "--max_rejected", "2")],
    ids=["contrastive", "hinge", "bradley_terry"],
)
def test_accumulation_and_packing_do_not_matter(
    objective: tuple[str, ...], tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    common = ("--global_batch_size", "8", *objective)
    runs = {
        "1": ("--micro_batch_size", "8", "--packing", "off"),
        "2": ("--micro_batch_size", "4", "--packing", "packed"),
        "4": ("--micro_batch_size", "2", "--packing", "shared"),
        "8": ("--micro_batch_size", "1", "--packing", "shared"),
    }
    logs = {
        name: train_here(tiny_base_dir, train_file, tmp_path / name, *common, *extra) for name, extra in runs.items()
    }
    assert [entry["n_groups"] for entry in logs["1"]] == [8, 3, 8, 3]
    for name in ("2", "4", "8"):
        assert losses(logs[name]) == pytest.approx(losses(logs["1"]), abs=1e-5)
        norms = [[entry["train/grad_norm"] for entry in logs[run]] for run in (name, "1")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert_same_weights(tmp_path / "1", tmp_path / name, 1e-5)


def first_loss_by_hand(rows: list[dict[str, Any]], scores: list[list[float]], **choice: Any) -> float:
    """Mean over the groups of the loss as its formula is written, in plain numbers; the chosen score is the last."""
    told: dict[str, Any] = {"mode": "contrastive", "weights": {}, "margins": {}, "row_margins": True}
    told |= {"centering": 0.0, "smoothing": 0.0, **choice}
    total = 0.0
    for row, (*rejected, chosen) in zip(rows, scores, strict=True):
        own = row.get("margin")
        own = own if isinstance(own, list) else [own] * len(rejected)
        base = 0.0 if told["mode"] == "contrastive" else 1.0
        answers = [
            (score, told["weights"].get(bias or "original", 1.0),
             (base if margin is None or not told["row_margins"] else margin) + told["margins"].get(bias or "original", 0.0))
            for score, bias, margin in zip(rejected, row["bias_type"], own, strict=True)
        ]  # fmt: skip
        e, n = told["smoothing"], len(answers)
        if told["mode"] == "contrastive":
            logits = [(score + margin) / 0.5 for score, _, margin in answers]
            weights = [weight for _, weight, _ in answers]
            among = math.exp(chosen / 0.5) + sum(w * math.exp(z) for w, z in zip(weights, logits, strict=True))
            loss = math.log(among) - chosen / 0.5
            mean = sum(w * z for w, z in zip(weights, logits, strict=True)) / sum(weights)
            loss += e * (chosen / 0.5 - mean)
        elif told["mode"] == "hinge":
            loss = sum(w * max(0.0, margin - (chosen - score)) for score, w, margin in answers) / n
        else:
            loss = sum(w * math.log1p(math.exp(-(chosen - score - margin))) for score, w, margin in answers) / n
        total += loss + told["centering"] * sum((chosen + score) ** 2 for score, *_ in answers) / n
    return total / len(rows)


CHOICES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "weights": (("--bias_weights", "length=2"), {"weights": {"length": 2.0}}),
    "margins": (("--bias_margins", "length=1"), {"margins": {"length": 1.0}}),
    "no_row_margins": (("--row_margins", "ignore"), {"row_margins": False}),
    "centering": (("--centering", "1"), {"centering": 1.0}),
    "smoothing": (("--label_smoothing", "0.2"), {"smoothing": 0.2}),
    "hinge": (("--mode", "pairwise"), {"mode": "hinge"}),
    "bradley_terry": (("--mode", "pairwise", "--pairwise_loss", "bradley_terry"), {"mode": "bradley_terry"}),
}


def test_the_first_loss_is_that_of_the_formula(
    tiny_llama_dir: Path, train_file: Path, uneven_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A row's margin of 0 is a margin, not none."""
    uneven_rows[2]["margin"] = 0.0
    uneven_rows[4]["margin"] = [None, 0, *[None] * (len(uneven_rows[4]["rejected"]) - 2)]
    train_file.write_text("".join(json.dumps(row) + "\n" for row in uneven_rows))
    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    texts = [
        Conversation([{"role": "user", "content": row["question"]}], answer)
        for row in uneven_rows
        for answer in (*row["rejected"], row["chosen"])
    ]
    flat = iter(Scorer(model, ChatFormatter(tokenizer), packing="off", progress=False).score(texts).scores.tolist())
    scores = [[next(flat) for _ in (*row["rejected"], row["chosen"])] for row in uneven_rows]
    found = {}
    for name, (flags, choice) in CHOICES.items():
        extra = ("--max_steps", "1", "--global_batch_size", "11", *flags)
        found[name] = losses(train_here(tiny_llama_dir, train_file, tmp_path / name, *extra))[0]
        assert found[name] == pytest.approx(first_loss_by_hand(uneven_rows, scores, **choice), rel=1e-5), name
    assert len({round(loss, 4) for loss in found.values()}) == len(CHOICES), found


def test_a_sampled_group_has_the_loss_of_one_of_its_answers(
    tiny_llama_dir: Path, write_rows: Callable[..., Path], uneven_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    row = uneven_rows[4]
    expected = []
    for place, answer in enumerate(row["rejected"]):
        alone = write_rows("alone.jsonl", [row | {"rejected": [answer], "bias_type": [None]}])
        [entry] = train_here(tiny_llama_dir, alone, tmp_path / str(place), "--max_steps", "1")
        expected.append(entry["train/loss"])
    log = train_here(
        tiny_llama_dir, write_rows("all.jsonl", [row]), tmp_path / "out", "--max_rejected", "1", "--max_steps", "12",
        "--learning_rate", "1e-12",
    )  # fmt: skip
    nearest = [min(range(len(expected)), key=lambda k: abs(expected[k] - loss)) for loss in losses(log)]
    assert losses(log) == pytest.approx([expected[place] for place in nearest], rel=1e-5)
    assert len(set(nearest)) > 2  # drawn anew in every epoch


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--bias_weights", "sycophancy=5,length=2"), "--bias_weights of sycophancy: training sees no such answers"),
        (("--bias_weights", "length=2", "--negatives", "original"), "--bias_weights of length: training sees no such"),
        (("--pairwise_loss", "bradley_terry"), "--pairwise_loss bradley_terry: --mode contrastive does not use it"),
        (("--temperature", "0.1", "--mode", "pairwise"), "--temperature 0.1: --mode pairwise does not use it"),
        (("--lora_alpha", "8"), "--lora_alpha 8: --lora_rank 0 does not use it"),
        (("--max_rejected", "5"), "--max_rejected 5: no record has more than 5 rejected answers"),
    ],
)
@pytest.mark.parametrize("estimate", ["0", "1"])
def test_a_setting_without_effect_says_so(
    settings: tuple[str, ...], said: str, estimate: str, tiny_base_dir: Path, train_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = [
        "--model_path",
        str(tiny_base_dir),
        "--train_file",
        str(train_file),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags = [*BASE, "--cache_dir", str(tmp_path / "cache"), "--max_steps", "1", "--estimate", estimate]
    assert main([*places, *flags, "--contamination_files", "", *settings]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no effect: ")]
    assert len(lines) == 1 and said in lines[0]


def test_a_variable_that_the_launcher_does_not_hand_on_is_named(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("BIAS_WEIGHTS", "length=2")
    monkeypatch.setenv("MAX_STEPS", "7")  # given as a flag, as the launcher does with its knobs
    places = [
        "--model_path",
        str(tiny_base_dir),
        "--train_file",
        str(train_file),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags = [*BASE, "--cache_dir", str(tmp_path / "cache"), "--max_steps", "1", "--estimate", "1"]
    assert main([*places, *flags, "--contamination_files", ""]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no effect: ")]
    assert lines == ["no effect: BIAS_WEIGHTS in the environment: it is the flag --bias_weights"]


def test_settings_with_an_effect_are_not_named(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = (*CONTRASTIVE, "--max_rejected", "2", "--row_margins", "ignore", "--bias_margins", "sycophancy=0")
    train_here(tiny_base_dir, train_file, tmp_path / "out", "--max_steps", "1", *extra)
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        ("--bias_weights", "original=0,length=0,beauty=0,authority=0"),
        ("--bias_weights", "original=0", "--negatives", "original"),
    ],
)
def test_weights_that_leave_nothing_to_learn_are_refused(
    settings: tuple[str, ...], tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    for estimate in ("0", "1"):
        with pytest.raises(ContrastRMError, match="gives weight 0 to every rejected answer of the data.*above 0"):
            train_here(tiny_base_dir, train_file, tmp_path / "out", *settings, "--estimate", estimate)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_two_ranks_equal_one(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    # Three groups in a step over two ranks, and two at the end of an epoch; samples must be the same on both.
    extra = ("--global_batch_size", "3", "--micro_batch_size", "1", "--max_rejected", "2", *CONTRASTIVE)
    single = train_here(tiny_base_dir, train_file, tmp_path / "single", *extra)
    out = tmp_path / "two"
    files = {"MODEL_PATH": str(tiny_base_dir), "TRAIN_FILE": str(train_file), "OUTPUT_DIR": str(out)}
    knobs = {"NUM_PROCESSES": "2", "DEEPSPEED_CONFIG": "none", "CACHE_DIR": str(tmp_path / "cache-of-two")}
    finish(launch_training(*BASE, *extra, **files, **knobs))
    assert losses(read_log(out)) == pytest.approx(losses(single), abs=1e-5)
    assert_same_weights(tmp_path / "single", out, 1e-4)
    # One wrote the cache, both read it.
    assert len([path for path in (tmp_path / "cache-of-two").iterdir() if path.is_dir()]) == 1


def test_a_sampled_and_mixed_run_continues_where_it_was(
    tiny_base_dir: Path, write_rows: Callable[..., Path], uneven_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    a = write_rows("a.jsonl", uneven_rows[:5])
    b = write_rows("b.jsonl", [row | {"id": f"b-{row['id']}"} for row in uneven_rows[5:]])
    extra = ("--global_batch_size", "3", "--epochs", "3", "--max_rejected", "1", *CONTRASTIVE)
    sources = f"{a}:2,{b}"
    whole = train_here(tiny_base_dir, sources, tmp_path / "whole", *extra)
    assert len(whole) == 12 and whole[3]["n_groups"] == 2
    train_here(tiny_base_dir, sources, tmp_path / "saved", *extra, "--save_steps", "5", "--keep_checkpoints", "1")
    out = tmp_path / "resumed"
    [checkpoint] = (tmp_path / "saved").glob("checkpoint-*")
    shutil.copytree(checkpoint, out / checkpoint.name)
    resumed = train_here(
        tiny_base_dir, sources, out, *extra, "--resume", "auto", "--packing", "off", "--micro_batch_size", "2"
    )
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert_same_weights(tmp_path / "whole", out, 1e-5)
    for changed in (
        ("--max_rejected", "2"),
        ("--centering", "0.02"),
        ("--bias_weights", "length=3"),
        ("--max_length", "400"),
    ):
        with pytest.raises(ContrastRMError, match="belongs to another run"):
            train_here(tiny_base_dir, sources, out, *extra, "--resume", "auto", *changed)
    with pytest.raises(ContrastRMError, match="source_weights"):
        train_here(tiny_base_dir, f"{a}:3,{b}", out, *extra, "--resume", "auto")
    summary = json.loads((out / "train_summary.json").read_text())
    assert [source["groups_an_epoch"] for source in summary["sources"]] == [7, 4]
    assert summary["epoch"]["n_repeated_groups"] == 2 and summary["epoch"]["n_not_drawn"] > 0


# --- data that broke other trainers


def test_a_group_bigger_than_the_budget_and_a_step_smaller_than_the_world(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    extra = ("--global_batch_size", "4", "--max_length", "0")
    whole = train_here(tiny_base_dir, train_file, tmp_path / "whole", *extra)
    alone = train_here(tiny_base_dir, train_file, tmp_path / "alone", *extra, "--max_tokens_per_batch", "1")
    assert losses(alone) == pytest.approx(losses(whole), abs=1e-5)


def test_a_record_longer_than_the_limit_is_counted_not_cut(
    tiny_base_dir: Path, uneven_rows: list[dict[str, Any]], write_rows: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [*uneven_rows, {"id": "long", "question": "why", "chosen": "cat " * 700, "rejected": ["no"]}]
    train_here(tiny_base_dir, write_rows("a.jsonl", rows), tmp_path / "out", "--global_batch_size", "4")
    assert "12 records -> 11 groups" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "train_summary.json").read_text())["data"]
    assert data["n_records"] == data["n_groups"] + data["n_dropped_groups"] + data["n_without_negatives"] == 12
    assert data["n_dropped_texts"] == 1
