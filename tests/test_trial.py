"""The token budget that is tried: real memory that runs out, no trace of a trial, the same budget after a resume."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codes.common.scoring import resolve_packing
from codes.common.settings import settings_from
from codes.train import token_budget
from codes.train.batches import BatchPlan, collate_groups, pack_groups
from codes.train.checkpoints import STATE_FILE, recorded_budget
from codes.train.draws import Draws
from codes.train.lora import lora_settings
from codes.train.reward_model import RewardModel, load_reward_model
from codes.train.settings import Objective, TrainSettings
from codes.train.token_budget import LEAST_TOKENS, heaviest_batch, lower_budget, try_token_budget
from codes.train.train_reward_model import build_parser, main, train
from codes.train.training_data import open_training_data
from tests.conftest import REPO_ROOT, WORDS, chatml_tokenizer, finish, save_tiny, tiny_config

CPU = torch.device("cpu")
OBJECTIVE = Objective("contrastive", 0.5, 1.0)
# A run whose address space may grow by so many MiB once everything is imported.
LIMITED = """
import resource, sys
from pathlib import Path
import peft, torch, transformers
from codes.common.cli import run
from codes.train.train_reward_model import main
from tests.test_trial import train_trying

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run(lambda _=None: main(sys.argv[3:]) if sys.argv[2] == "flag" else train_trying(*sys.argv[3:]))
"""


def train_trying(*flags: str) -> int:
    """Train as ``main`` does, with the budget tried on a CPU too."""
    train(settings_from(build_parser().parse_args([*flags]), TrainSettings), try_budget=True)
    return 0


@pytest.fixture
def train_file(write_rows: Callable[..., Path]) -> Path:
    """Sixteen groups of 400 to 700 tokens: more than a CPU's budget in one step."""
    draw = random.Random(0)

    def answer(n_words: int) -> str:
        return " ".join(draw.choice(WORDS.split()) for _ in range(n_words))

    return write_rows(
        "train.jsonl",
        [
            {
                "id": f"row-{number}",
                "question": f"why is the cat number {number} on the mat",
                "chosen": answer(60 + 5 * number),
                "rejected": [answer(150), answer(60 + 10 * (number % 5))],
                "bias_type": [None, "length"],
            }
            for number in range(16)
        ],
    )


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with few weights (13 MB) that keeps a quarter of a megabyte a token."""
    tokenizer = chatml_tokenizer()
    config = tiny_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.intermediate_size = 8192
    torch.manual_seed(1)
    return save_tiny(tmp_path_factory.mktemp("wide") / "wide-llama-base", LlamaForCausalLM(config), tokenizer)


def flags(base: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [
        "--model_path", str(base), "--train_file", str(data), "--output_dir", str(out), "--precision", "fp32",
        "--cache_dir", str(out.parent / "cache"), "--global_batch_size", "16", "--warmup_steps", "1", "--epochs", "3",
        "--learning_rate", "1e-3", "--held_out_share", "0", "--reward_stats_groups", "0", *extra,
    ]  # fmt: skip


def log_of(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def draws_of(base: Path, data: Path, cache: Path, *extra: str) -> Draws:
    args = ["--model_path", str(base), "--train_file", str(data), "--cache_dir", str(cache), "--max_length", "0"]
    args += ["--global_batch_size", "16", "--epochs", "1", "--seed", "1", *extra]
    return open_training_data(settings_from(build_parser().parse_args(args), TrainSettings)).draws


def plan_of(draws: Draws, packing: str, *, max_tokens: int, world_size: int = 1, most: int = 0) -> BatchPlan:
    return BatchPlan(draws, draws.plan, draws.costs(packing), draws.n_tokens, packing, 0, max_tokens, most, world_size)


def try_here(
    model: RewardModel, draws: Draws, packing: str, *, world_size: int = 1, precision: str = "fp32",
    objective: Objective = OBJECTIVE,
) -> int:  # fmt: skip
    plan = plan_of(draws, packing, max_tokens=4096, world_size=world_size)
    return try_token_budget(model, plan, draws, CPU, objective=objective, precision=precision)


@pytest.mark.parametrize("packing", ["shared", "packed", "off"])
@pytest.mark.parametrize("world_size, most", [(1, 0), (2, 0), (2, 3)])
def test_no_rank_computes_more_than_what_is_tried(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, packing: str, world_size: int, most: int
) -> None:
    draws = draws_of(tiny_base_dir, train_file, tmp_path / "cache", "--global_batch_size", "7", "--epochs", "3")
    plan = plan_of(draws, packing, max_tokens=2500, world_size=world_size, most=most)
    heaviest, n_tokens = heaviest_batch(plan, draws)

    def computed(indices: tuple[int, ...]) -> int:
        groups = [draws[index] for index in indices]
        if packing == "off":
            return collate_groups(groups, [1.0] * len(groups), 0)[0]["input_ids"].numel()
        return pack_groups(groups, share=packing == "shared", on_gpu=False).layout.n_tokens

    found = [
        computed(batch.groups)
        for step in draws.plan
        for rank in range(world_size)
        for batch in plan.micro_batches(step, rank)
    ]
    # Prompts of different groups share a beginning too, which a pack of them does not compute twice.
    slack = 40 * len(heaviest.groups) if packing == "shared" else 0
    assert n_tokens - slack <= computed(heaviest.groups) <= n_tokens and max(found) <= n_tokens
    assert len(heaviest.groups) > 1


@pytest.mark.parametrize("packing, checkpointing", [("shared", False), ("shared", True), ("off", False)])
def test_a_trial_leaves_no_trace(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, packing: str, checkpointing: bool
) -> None:
    draws = draws_of(tiny_base_dir, train_file, tmp_path / "cache")
    model, _ = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
    # Its dropout draws random numbers.
    lora = lora_settings(
        rank=4, alpha=8, dropout=0.5, target_modules="all-linear", merge=True, base_model=str(tiny_base_dir), seed=1
    )
    assert lora is not None
    model.add_lora(lora)
    assert resolve_packing(model, packing) == packing
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.eval()
    model.classifier.score.train()

    def state() -> dict[str, Any]:
        gc.collect()
        return {
            "weights": [(id(one), one.data_ptr(), one.sum().item()) for one in model.state_dict(keep_vars=True).values()],
            "grads": [one.grad for one in model.parameters()],
            "hooks": [dict(one._post_accumulate_grad_hooks or {}) for one in model.parameters()],
            "modes": [part.training for part in model.modules()],
            "random": torch.get_rng_state().tolist(),
            "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        }  # fmt: skip

    before = state()
    assert try_here(model, draws, packing) == 4096
    assert state() == before
    assert set(before["grads"]) == {None} and not any(before["hooks"])


@pytest.mark.parametrize("extra", [("--packing", "shared"), ("--packing", "off", "--gradient_checkpointing", "1")])
def test_a_trial_does_not_change_the_run(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    extra = (*extra, "--lora_rank", "4", "--lora_dropout", "0.3")
    assert train_trying(*flags(tiny_base_dir, train_file, tmp_path / "tried", *extra)) == 0
    given = (*extra, "--max_tokens_per_batch", "4096", "--save_steps", "2")
    assert main(flags(tiny_base_dir, train_file, tmp_path / "given", *given)) == 0
    assert len(log_of(tmp_path / "given")) == 3
    assert log_of(tmp_path / "tried") == log_of(tmp_path / "given")
    # What was given is no choice of the run's own, which a resume without the flag would go on with.
    state = json.loads((tmp_path / "given" / "checkpoint-2" / STATE_FILE).read_text())
    assert state["token_budget"] is None


def test_what_is_tried_next() -> None:
    assert lower_budget(4001, float("inf"), 10.0) == 2000
    assert lower_budget(4000, 20e9, 15e9) == 3000


def test_weights_that_do_not_fit_whole_are_not_tried(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = draws_of(tiny_base_dir, train_file, tmp_path / "cache")
    model, _ = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
    nonsense: Any = "not an objective"  # nobody notices who does not compute
    with pytest.raises(AttributeError):
        try_here(model, draws, "off", precision="fp16", world_size=8, objective=nonsense)
    # There the host holds most of the state, and a device few of the weights at a time.
    monkeypatch.setattr(token_budget, "ZERO3_LIVE_PARAMETERS", 1000)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(REPO_ROOT / "configs" / "ds_z3_offload_config.json"))
    assert try_here(model, draws, "off", precision="fp16", world_size=8, objective=nonsense) == 4096


def limited(mebibytes: int, how: str, *command: str, **environment: str) -> subprocess.Popen[str]:
    shared = {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(mebibytes), how, *command],
        cwd=REPO_ROOT, env=os.environ | shared | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def planned(printed: str) -> int:
    (tokens,) = re.findall(r"up to (\d+) tokens each", printed)
    return int(tokens)


@pytest.mark.slow
def test_a_budget_that_does_not_fit_is_lowered_and_a_resume_keeps_it(
    wide_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = flags(wide_dir, train_file, out, "--packing", "shared", "--save_steps", "2")
    by_flag = limited(750, "flag", *command, "--max_tokens_per_batch", "4096")
    _, errors = by_flag.communicate(timeout=280)
    assert by_flag.returncode == 2 and "can't allocate memory" in errors
    assert "lower --max_tokens_per_batch (it is 4096)" in errors and "--resume auto" in errors
    [printed] = finish(limited(750, "try", *command))
    tokens = planned(printed)
    assert LEAST_TOKENS <= tokens < 4096 // 2
    recorded = json.loads((out / "checkpoint-2" / STATE_FILE).read_text())["token_budget"]
    assert recorded["tokens"] == tokens
    assert recorded_budget(out / "checkpoint-2", recorded["made_for"]) == tokens
    assert recorded_budget(out / "checkpoint-2", recorded["made_for"] | {"gradient_checkpointing": True}) == 0
    before = [entry["train/loss"] for entry in log_of(out)]
    (out / "train_summary.json").unlink()
    # Here there is memory enough: the budget would be 4096.
    assert main([*command, "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from" in printed and planned(printed) == tokens
    assert [entry["train/loss"] for entry in log_of(out)] == pytest.approx(before, abs=1e-5)
    (out / "train_summary.json").unlink()
    assert main([*command, "--resume", "auto", "--gradient_checkpointing", "1"]) == 0
    assert planned(capsys.readouterr().out) == 4096


@pytest.mark.slow
def test_ranks_take_what_fits_into_the_smallest(
    wide_dir: Path, train_file: Path, tmp_path: Path, meeting_point: dict[str, str]
) -> None:
    command = flags(wide_dir, train_file, tmp_path / "out", "--packing", "shared", "--max_steps", "1")
    ranks = [
        limited(mebibytes, "try", *command, RANK=rank, LOCAL_RANK=rank, **meeting_point)
        for rank, mebibytes in (("0", 100_000), ("1", 650))
    ]
    assert LEAST_TOKENS <= planned(finish(*ranks)[0]) < 4096 // 2


def test_where_no_group_fits_the_error_says_what_to_do(wide_dir: Path, train_file: Path, tmp_path: Path) -> None:
    done = limited(180, "try", *flags(wide_dir, train_file, tmp_path / "out", "--packing", "shared"))
    _, errors = done.communicate(timeout=280)
    assert done.returncode == 2, errors[-3000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert re.search(r"\d+ group\(s\) of \d+ tokens that were tried do not fit beside it\. Use ZeRO-3", line)
    assert "--lora_rank 16" in line and "--max_tokens_per_batch" in line
