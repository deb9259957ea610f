"""The trainer end to end on a two-layer model: equivalences, checkpoints, bad input, DeepSpeed with two CPU ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.packing import build_pack
from codes.common.records import read_preference_file
from codes.common.scoring import Scorer, resolve_packing
from codes.train.batches import collate_groups, count_micro_steps, shard_step
from codes.train.data_utils import Group, encode_groups
from codes.train.engine import MasterAdamW, Schedule, resolve_precision
from codes.train.reward_model import load_reward_model
from codes.train.sources import draw_epoch
from codes.train.token_budget import activation_bytes_per_token, choose_token_budget, state_bytes
from codes.train.train_reward_model import main
from tests.conftest import REPO_ROOT, finish, launch_training, run_module

BASE = ["--precision", "fp32", "--epochs", "2", "--warmup_steps", "1", "--learning_rate", "3e-3", "--seed", "7"]


def plan_epoch(n_groups: int, global_batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    order = draw_epoch([n_groups], None, seed=seed, epoch=epoch)[0].tolist()
    return [order[start : start + global_batch_size] for start in range(0, n_groups, global_batch_size)]


def text(*ids: int) -> EncodedText:
    return EncodedText(tuple(ids))


def train_here(base: Path, data: Path, out: Path, *extra: str) -> list[dict[str, Any]]:
    assert (
        main(
            [
                "--model_path",
                str(base),
                "--train_file",
                str(data),
                "--output_dir",
                str(out),
                "--cache_dir",
                str(out.parent / "cache"),
                *BASE,
                *extra,
            ]
        )
        == 0
    )
    return read_log(out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["train/loss"] for entry in log]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_weights(left: Path, right: Path, tolerance: float) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), atol=tolerance, rtol=0, msg=name)


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


def test_collator_lays_out_whole_groups() -> None:
    groups = [
        Group("a", (text(5, 6), text(7), text(8, 9)), (None, "length")),
        Group("b", (text(4), text(3)), (None,)),
    ]
    inputs, group_sizes, group_weights = collate_groups(groups, [1.0, 0.0], pad_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6], [7, 0], [8, 9], [4, 0], [3, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 1], [1, 0], [1, 0]]
    assert group_sizes.tolist() == [3, 2]
    assert group_weights.tolist() == [1.0, 0.0]


@settings(max_examples=80, deadline=None)
@given(
    n_groups=st.integers(1, 40),
    batch=st.integers(1, 16),
    micro=st.integers(1, 5),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    by_length=st.booleans(),
)
def test_every_group_counts_once_whatever_the_world(
    n_groups: int, batch: int, micro: int, world: int, seed: int, by_length: bool
) -> None:
    sizes = [(7 * index) % 11 + 1 for index in range(n_groups)]
    micro_steps = -(-batch // (micro * world))
    seen: list[int] = []
    for step in plan_epoch(n_groups, batch, seed=seed, epoch=1):
        counted: list[int] = []
        for rank in range(world):
            batches = shard_step(
                step,
                sizes,
                micro_batch_size=micro,
                micro_steps=micro_steps,
                rank=rank,
                world_size=world,
                by_length=by_length,
            )
            assert len(batches) == micro_steps  # ZeRO-3 needs the same number on every rank
            assert all(len(one.groups) <= micro for one in batches)
            counted += [g for one in batches for g, w in zip(one.groups, one.weights, strict=True) if w == 1.0]
        assert sorted(counted) == sorted(step)
        seen += step
    assert sorted(seen) == list(range(n_groups))


def test_schedule_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule(learning_rate=1.0, warmup_steps=2, total_steps=6)
    assert [schedule.rate(step) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_over_long_answers_leave_their_group_and_are_counted(tiny_base_dir: Path, train_file: Path) -> None:
    _, tokenizer = load_reward_model(str(tiny_base_dir), require_head=False)
    records, _ = read_preference_file(train_file)
    full, everything = encode_groups(records, ChatFormatter(tokenizer))
    limit = int(np.median([len(t.input_ids) for group in full for t in group.texts]))
    groups, report = encode_groups(records, ChatFormatter(tokenizer, max_length=limit, overlength="drop"))
    assert report.n_records == report.n_groups + report.n_dropped_groups + report.n_without_negatives == len(records)
    assert report.n_dropped_texts > 0
    assert all(len(t.input_ids) <= limit for group in groups for t in group.texts)
    assert everything.n_dropped_texts == 0 and everything.n_groups == len(records)
    original, counts = encode_groups(records, ChatFormatter(tokenizer), negatives="original")
    assert all(bias is None for group in original for bias in group.bias_types)
    assert counts.n_texts == 2 * len(records)


def test_batch_of_eight_equals_eight_accumulated(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    common = ("--global_batch_size", "8")
    at_once = train_here(tiny_base_dir, train_file, tmp_path / "b8", *common, "--micro_batch_size", "8")
    one_by_one = train_here(tiny_base_dir, train_file, tmp_path / "b1", *common, "--micro_batch_size", "1")
    three = train_here(tiny_base_dir, train_file, tmp_path / "b3", *common, "--micro_batch_size", "3")
    assert len(at_once) == 4  # 10 groups: 8 + 2, twice
    assert losses(one_by_one) == pytest.approx(losses(at_once), abs=1e-5)
    assert losses(three) == pytest.approx(losses(at_once), abs=1e-5)
    assert [e["train/grad_norm"] for e in one_by_one] == pytest.approx(
        [e["train/grad_norm"] for e in at_once], rel=1e-3
    )
    assert_same_weights(tmp_path / "b8", tmp_path / "b1", 1e-5)


def test_first_loss_is_near_ln_n_and_falls(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    log = train_here(
        tiny_base_dir,
        train_file,
        tmp_path / "out",
        "--global_batch_size",
        "10",
        "--epochs",
        "6",
        "--temperature",
        "1.0",
    )
    sizes = [1 + 1 + number % 4 for number in range(10)]
    assert losses(log)[0] == pytest.approx(np.mean(np.log(sizes)), abs=0.35)
    assert losses(log)[-1] < 0.5 * losses(log)[0]


@pytest.mark.parametrize("extra", [(), ("--gradient_checkpointing", "1")])
def test_pairwise_mode_learns(tiny_base_dir: Path, train_file: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    log = train_here(
        tiny_base_dir, train_file, tmp_path / "out", "--mode", "pairwise", "--negatives", "original",
        "--global_batch_size", "10", "--epochs", "6", *extra,
    )  # fmt: skip
    assert losses(log)[0] == pytest.approx(1.0, abs=0.5)  # the margin, at scores near 0
    assert losses(log)[-1] < losses(log)[0]
    assert log[-1]["train/accuracy"] > 0.9


def test_saved_model_reloads_to_the_trained_scores(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    train_here(tiny_base_dir, train_file, tmp_path / "out", "--global_batch_size", "5")
    model, tokenizer = load_reward_model(str(tmp_path / "out"))
    records, _ = read_preference_file(train_file)
    conversations = [Conversation(record.messages, record.chosen) for record in records]
    ours = Scorer(model, ChatFormatter(tokenizer), progress=False).score(conversations).scores
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    rendered = [ChatFormatter(tokenizer).render(conversation) for conversation in conversations]
    batch = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    assert ours == pytest.approx(theirs.numpy(), abs=1e-5)
    summary = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    assert summary["groups"] == 10 and summary["steps"] == 4
    assert "reward-model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_equals_uninterrupted(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, precision: str
) -> None:
    extra = ("--global_batch_size", "2", "--epochs", "12", "--save_steps", "5", "--precision", precision)
    whole = train_here(tiny_base_dir, train_file, tmp_path / "whole", *extra)
    out = tmp_path / "killed"
    command = [
        sys.executable, "-m", "codes.train.train_reward_model", "--model_path", str(tiny_base_dir),
        "--train_file", str(train_file), "--output_dir", str(out), *BASE, *extra, "--resume", "auto",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stderr=subprocess.DEVNULL
    ) as child:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-15" / "trainer_state.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not (out / "model.safetensors").exists()
    resumed = train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto")
    assert losses(resumed) == losses(whole)
    assert_same_weights(tmp_path / "whole", out, 0.0)
    assert len([path for path in out.iterdir() if path.name.startswith("checkpoint-")]) == 2


def test_what_a_kill_left_of_a_checkpoint_is_cleared(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extra = ("--global_batch_size", "5", "--save_steps", "1", "--keep_checkpoints", "1")
    for name in (".checkpoint-1.removing", ".checkpoint-2.saving"):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_bytes(b"half")
    train_here(tiny_base_dir, train_file, out, *extra)
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == ["checkpoint-3"]


@pytest.mark.parametrize("engine", ["none", "configs/ds_z2_config.json", "configs/ds_z3_config.json"])
def test_two_ranks_equal_one_process(tiny_base_dir: Path, train_file: Path, tmp_path: Path, engine: str) -> None:
    # DDP and DeepSpeed through the launcher. Three groups in a step over two ranks: uneven, and the last step of an epoch
    # has one group for two ranks.
    # The rate is so low that every step has something left to learn.
    extra = ("--global_batch_size", "3", "--micro_batch_size", "1", "--learning_rate", "1e-4")
    single = train_here(tiny_base_dir, train_file, tmp_path / "single", *extra)
    out = tmp_path / "two"
    files = {"MODEL_PATH": str(tiny_base_dir), "TRAIN_FILE": str(train_file), "OUTPUT_DIR": str(out)}
    finish(launch_training(*BASE, *extra, **files, NUM_PROCESSES="2", DEEPSPEED_CONFIG=engine))
    assert min(losses(single)) > 0.3, "the test needs steps with a gradient"
    assert losses(read_log(out)) == pytest.approx(losses(single), abs=1e-4)
    norms = [[entry["train/grad_norm"] for entry in log] for log in (read_log(out), single)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert_same_weights(tmp_path / "single", out, 1e-4)
    args = json.loads((out / "train_args.json").read_text())
    assert args["world_size"] == 2
    # The saved folder scores as the single process's model does.
    records, _ = read_preference_file(train_file)
    conversations = [Conversation(record.messages, record.chosen) for record in records]
    scores = []
    for folder in (tmp_path / "single", out):
        model, tokenizer = load_reward_model(str(folder), dtype="float32")
        scores.append(Scorer(model, ChatFormatter(tokenizer), progress=False).score(conversations).scores)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_the_log_says_what_a_step_computed(tiny_llama_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Each figure of each step, the short last one's gradient among them, from the scores of the same weights."""
    # A rate so small that the weights stay as they are.
    extra = (
        "--global_batch_size",
        "4",
        "--epochs",
        "1",
        "--learning_rate",
        "1e-12",
        "--weight_decay",
        "0",
        "--seed",
        "3",
    )
    extra += ("--max_grad_norm", "1e9", "--held_out_share", "0", "--micro_batch_size", "3")
    log = train_here(tiny_llama_dir, train_file, tmp_path / "out", *extra)
    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    groups, _ = encode_groups(read_preference_file(train_file)[0], ChatFormatter(tokenizer, max_length=512))
    steps = plan_epoch(len(groups), 4, seed=3, epoch=0)
    assert [len(step) for step in steps] == [4, 4, 2]
    for entry, step in zip(log, steps, strict=True):
        mine = [groups[index] for index in step]
        inputs, sizes, _ = collate_groups(mine, [1.0] * len(mine), tokenizer.pad_token_id)
        model.zero_grad()
        scores = model(**inputs)
        parts = scores.split(sizes.tolist())
        loss = torch.stack([-torch.log_softmax(part / 0.5, dim=0)[-1] for part in parts]).mean()
        loss.backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
        assert entry["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert entry["train/score_gap"] == pytest.approx(
            np.mean([(part[-1] - part[:-1].mean()).item() for part in parts]), abs=1e-4
        )
        assert entry["train/accuracy"] == np.mean([(part[-1] > part[:-1].max()).item() for part in parts])
        assert entry["train/score_mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert entry["tokens"] == sum(group.n_tokens for group in mine) and entry["n_groups"] == len(mine)


def test_a_tie_is_not_right(tiny_llama_dir: Path, train_file: Path, tmp_path: Path) -> None:
    level = tmp_path / "level"
    shutil.copytree(tiny_llama_dir, level)
    tensors = load_file(level / "model.safetensors")
    tensors["score.weight"][:] = 0
    save_file(tensors, level / "model.safetensors", metadata={"format": "pt"})
    [entry] = train_here(level, train_file, tmp_path / "out", "--max_steps", "1")
    assert entry["train/accuracy"] == entry["train/score_gap"] == entry["train/score_mean"] == 0


def test_bad_input_is_one_line_and_exit_two(
    tiny_base_dir: Path, write_rows: Callable[..., Path], train_file: Path, tmp_path: Path
) -> None:
    good = {"question": "q", "chosen": "a", "rejected": ["b"]}
    module = "codes.train.train_reward_model"
    cases = {
        "malformed": (["--train_file", write_rows("m.jsonl", [good, "{not json"])], ":2:"),
        "empty rejected": (["--train_file", write_rows("e.jsonl", [good | {"rejected": []}])], "rejected"),
        "missing file": (["--train_file", tmp_path / "none.jsonl"], "not found"),
        "missing model": (
            ["--train_file", train_file, "--model_path", tmp_path / "no" / "model"],
            "model folder not found",
        ),
        "missing checkpoint": (["--train_file", train_file, "--resume", tmp_path / "none"], "no checkpoint"),
        "unwritable": (["--train_file", train_file, "--output_dir", train_file / "below-a-file"], "cannot write"),
    }
    for name, (arguments, expected) in cases.items():
        base = ["--model_path", tiny_base_dir, "--output_dir", tmp_path / "out", *BASE]
        done = run_module(module, *base, *arguments) if name == "malformed" else None
        if done is not None:  # one real process shows the exit code and the form; the rest need no second start
            assert done.returncode == 2
            lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert len(lines) == 1 and expected in lines[0]
            assert "Traceback" not in done.stderr
            continue
        with pytest.raises(ContrastRMError, match=expected) as caught:
            main([str(argument) for argument in [*base, *arguments]])
        assert "\n" not in str(caught.value), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused only where there is no GPU")
def test_fp16_without_gpu_is_refused() -> None:
    with pytest.raises(ContrastRMError, match="fp16 needs a CUDA GPU"):
        resolve_precision("fp16")


def test_non_finite_loss_stops_with_the_records_named(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ContrastRMError, match="row-"):
        train_here(
            tiny_base_dir, train_file, tmp_path / "out", "--learning_rate", "1e30", "--max_grad_norm", "1e30",
            "--global_batch_size", "2",
        )  # fmt: skip
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_new_run_does_not_mix_with_an_old_runs_checkpoints(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extra = ("--global_batch_size", "2", "--save_steps", "3")
    train_here(tiny_base_dir, train_file, out, *extra)
    before = weights(out)
    with pytest.raises(ContrastRMError, match="checkpoints of an earlier run"):
        train_here(tiny_base_dir, train_file, out, *extra)
    with pytest.raises(ContrastRMError, match=r"belongs to another run \(margin 1.0 -> 2.0\)"):
        train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto", "--margin", "2")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_nothing_of_an_earlier_run_passes_for_the_new_ones(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    watched = (
        "--held_out_share",
        "0.3",
        "--load_best_at_end",
        "1",
        "--metric_for_best",
        "loss",
        "--learning_rate",
        "5e-2",
    )
    train_here(
        tiny_base_dir, train_file, out, "--lora_rank", "2", "--global_batch_size", "2", "--eval_steps", "1", *watched
    )
    earlier = {"adapter", "best.json", "held_out.jsonl", "eval_log.jsonl"}
    assert earlier <= {path.name for path in out.iterdir()}, (
        "the test needs a run whose last evaluation is not its best"
    )
    (out / "nan_report.json").write_text("{}")
    train_here(tiny_base_dir, train_file, out, "--max_steps", "1", "--held_out_share", "0")
    assert not (earlier | {"nan_report.json"}) & {path.name for path in out.iterdir()}
    # Nor does a run clear away what it starts from.
    before = weights(out)
    (out / "best-3").mkdir()
    for start in (out, out / "best-3", out / "adapter"):
        with pytest.raises(ContrastRMError, match=r"lies in --output_dir .* choose another --output_dir"):
            train_here(start, train_file, out)
    assert (out / "config.json").is_file() and weights(out).keys() == before.keys()


def test_resume_with_another_micro_batch_size_keeps_the_steps(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    # Slow enough that there is still something to learn after the checkpoint.
    extra = ("--global_batch_size", "5", "--epochs", "3", "--learning_rate", "1e-4")
    whole = train_here(tiny_base_dir, train_file, tmp_path / "whole", *extra, "--micro_batch_size", "5")
    assert min(losses(whole)[4:]) > 0.3
    out = tmp_path / "resumed"
    train_here(tiny_base_dir, train_file, out, *extra, "--micro_batch_size", "1", "--save_steps", "4")
    # Step 4 of 6 lies behind 20 micro-steps; three a step do not divide that: a count carried over would shift.
    shutil.copytree(out / "checkpoint-4", tmp_path / "other" / "checkpoint-4")
    resumed = train_here(
        tiny_base_dir, train_file, tmp_path / "other", *extra, "--micro_batch_size", "2", "--resume", "auto"
    )
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert_same_weights(tmp_path / "whole", tmp_path / "other", 1e-5)


def test_training_respects_the_models_own_limit_and_a_short_run_warms_up(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tiny_base_dir, train_file, tmp_path / "out", "--global_batch_size", "5", "--warmup_steps", "100")
    printed = capsys.readouterr().out
    assert "max_length is 512, the model's own limit, instead of 1024" in printed
    assert "warm-up takes 1 of the 4 steps instead of 100" in printed
    rates = [entry["train/learning_rate"] for entry in read_log(tmp_path / "out")]
    assert rates == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3])


# --- packs


@pytest.mark.parametrize(
    "steps, extra", [(200, ()), (40, ("--gradient_checkpointing", "1")), (40, ("--max_tokens_per_batch", "1"))]
)
def test_packing_does_not_change_the_learning(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, steps: int, extra: tuple[str, ...]
) -> None:
    # Slow enough that the losses stay away from 0, where Adam would blow rounding up.
    common = ("--global_batch_size", "4", "--max_steps", str(steps), "--learning_rate", "3e-5", *extra)
    logs = {
        packing: train_here(tiny_base_dir, train_file, tmp_path / packing, *common, "--packing", packing)
        for packing in ("off", "packed", "shared")
    }
    assert len(logs["off"]) == steps and losses(logs["off"])[-1] < 0.98 * losses(logs["off"])[0]
    for packing in ("packed", "shared"):
        assert losses(logs[packing]) == pytest.approx(losses(logs["off"]), abs=1e-4)
        assert_same_weights(tmp_path / "off", tmp_path / packing, 1e-4)
        assert [entry["n_groups"] for entry in logs[packing]] == [entry["n_groups"] for entry in logs["off"]]


@settings(max_examples=300, deadline=None)
@given(
    costs=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    max_tokens=st.integers(1, 150),
    world=st.integers(1, 3),
    most=st.sampled_from([0, 0, 0, 1, 2, 4]),
    batch=st.integers(1, 12),
)
# Two micro-batches would hold these by their sum, but not one by one.
@example(costs=[48, 41], max_tokens=45, world=1, most=0, batch=10)
@example(costs=[38, 30, 21], max_tokens=45, world=2, most=0, batch=4)
@example(costs=[45, 51, 47, 47, 2, 10, 2], max_tokens=88, world=1, most=0, batch=7)
def test_micro_batches_keep_the_token_budget(
    costs: list[int], max_tokens: int, world: int, most: int, batch: int
) -> None:
    steps = plan_epoch(len(costs), batch, seed=1, epoch=0)
    micro_steps = count_micro_steps(steps, costs, max_tokens=max_tokens, micro_batch_size=most, world_size=world)
    for step in steps:
        for rank in range(world):
            for one in shard_step(
                step, costs, micro_steps=micro_steps, rank=rank, world_size=world, micro_batch_size=most
            ):
                load = sum(costs[index] for index in one.groups)
                assert load <= max_tokens or len(one.groups) == 1
                assert not most or len(one.groups) <= most
    assert micro_steps <= max(-(-len(step) // world) for step in steps)

    # One micro-step less would break a limit in some step.
    def breaks(groups: tuple[int, ...]) -> bool:
        too_many = bool(most) and len(groups) > most
        return too_many or (len(groups) > 1 and sum(costs[index] for index in groups) > max_tokens)

    if micro_steps == 1:
        return
    if most and any(len(step) > most * world * (micro_steps - 1) for step in steps):
        return
    options = {"micro_steps": micro_steps - 1, "world_size": world, "micro_batch_size": most}
    fewer = [one for step in steps for rank in range(world) for one in shard_step(step, costs, rank=rank, **options)]
    assert any(breaks(one.groups) for one in fewer)


def test_masters_move_as_float32_weights_do() -> None:
    """The same gradients move float32 masters as they move float32 weights, and the model holds them rounded."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(5, 3)
    rounded = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), rounded.parameters(), strict=True):
            mine.copy_(theirs)
    groups = [{"params": list(rounded.parameters()), "weight_decay": 0.1}]
    masters = MasterAdamW(groups, lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for _ in range(3):  # micro-batches
            inputs = torch.randn(4, 5).bfloat16()
            rounded(inputs).float().square().sum().backward()
            assert all(weight.grad is None for weight in rounded.parameters())
        for mine, master in zip(plain.parameters(), masters.param_groups[0]["params"], strict=True):
            mine.grad = master.grad.clone()
        masters.step()
        reference.step()
        masters.zero_grad()
        for mine, master, weight in zip(
            plain.parameters(), masters.param_groups[0]["params"], rounded.parameters(), strict=True
        ):
            torch.testing.assert_close(master, mine, atol=1e-6, rtol=0)
            assert torch.equal(weight, master.bfloat16())
    # Small steps are not lost to rounding: they add up in the masters.
    stored = masters.state_dict()
    again = MasterAdamW([{"params": list(rounded.parameters()), "weight_decay": 0.1}], lr=1e-2)
    again.load_state_dict(stored)
    for one, other in zip(again.param_groups[0]["params"], masters.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


def test_bfloat16_training_follows_float32(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    common = ("--global_batch_size", "4", "--epochs", "20", "--learning_rate", "1e-4")
    exact = train_here(tiny_base_dir, train_file, tmp_path / "fp32", *common)
    rounded = train_here(tiny_base_dir, train_file, tmp_path / "bf16", *common, "--precision", "bf16")
    assert losses(rounded) != losses(exact) and losses(exact)[-1] < 0.8 * losses(exact)[0]
    assert losses(rounded) == pytest.approx(losses(exact), abs=0.03)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.bfloat16}


# --- memory


@pytest.mark.parametrize("kind", ["tiny_base_dir", "tiny_qwen_dir"])
def test_measured_activations_predict_a_larger_pass(kind: str, request: pytest.FixtureRequest) -> None:
    model, _ = load_reward_model(str(request.getfixturevalue(kind)), dtype="float32", require_head=False)
    assert model.enable_packing() is None
    per_token = activation_bytes_per_token(model, gradient_checkpointing=False)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pack = build_pack([list(range(400))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(pack.input_ids % 40, layout=pack.layout, ends=pack.ends)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.untyped_storage().data_ptr() in kept)
    assert sum(kept.values()) - weights == pytest.approx(400 * per_token, rel=0.1)
    assert activation_bytes_per_token(model, gradient_checkpointing=True) < per_token
    del scores


def test_token_budget_follows_the_memory(tiny_base_dir: Path) -> None:
    model, _ = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
    options = {"precision": "fp32", "world_size": 1}
    cpu, card = torch.device("cpu"), torch.device("cuda")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(n_parameters, zero_stage=None, **options) == 16 * n_parameters
    sizes = [2**28, 2**29, 2**30]
    budgets = [choose_token_budget(model, card, gradient_checkpointing=False, memory=size, **options) for size in sizes]
    assert budgets == sorted(budgets) and budgets[0] < budgets[-1] <= 65536
    more = choose_token_budget(model, card, gradient_checkpointing=True, memory=sizes[0], **options)
    assert more > budgets[0]
    assert choose_token_budget(model, cpu, gradient_checkpointing=False, memory=2**34, **options) == 4096
    with pytest.raises(ContrastRMError, match="nothing fits beside it. Use ZeRO-3"):
        choose_token_budget(model, card, gradient_checkpointing=False, memory=2**20, **options)


def test_a_kernel_of_gpus_is_not_measured_on_the_cpu(tiny_base_dir: Path) -> None:
    """The budget of --attn_implementation flash_attention_2 is found before the model is on the device where that runs."""
    budgets = {}
    for name in ("sdpa", "flash_attention_2"):
        model, _ = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
        # As it is loaded where the package is installed.
        model.backbone.config._attn_implementation = name
        assert resolve_packing(model, "off") == "off"
        budgets[name] = choose_token_budget(
            model, torch.device("cuda"), precision="fp32", world_size=1, gradient_checkpointing=False, memory=2**28
        )
        assert model.backbone.config._attn_implementation == name
    assert budgets["flash_attention_2"] == budgets["sdpa"] < 65536


def test_sharding_shares_the_state() -> None:
    seven = 7_600_000_000
    plain = state_bytes(seven, zero_stage=None, precision="bf16", world_size=1)
    assert plain == 18 * seven
    two, three = (state_bytes(seven, zero_stage=stage, precision="bf16", world_size=8) for stage in (2, 3))
    assert three < two < plain and three < 20 * 2**30
