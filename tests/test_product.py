"""The folder that training writes: card, reward statistics, and one score for every way to load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from codes.common.chat import ChatFormatter, Conversation
from codes.common.records import read_preference_file
from codes.common.scoring import Scorer
from codes.train.batches import BatchPlan
from codes.train.data_utils import encode_groups
from codes.train.report import base_of, model_card
from codes.train.reward_model import PAD_TOKEN, load_reward_model, save_reward_model
from codes.train.settings import Objective, OptimizerSettings, TrainSettings
from codes.train.trainer import Trainer
from tests.conftest import chatml_tokenizer, llama_tokenizer, qwen_tokenizer, save_tiny, tiny_config
from tests.test_reward_model import save_bert
from tests.test_training import train_here


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    for number, row in enumerate(preference_rows):
        row["source"] = "forum | old" if number < 4 else "books"
    return write_rows("train.jsonl", preference_rows)


def texts_of(train_file: Path) -> list[Conversation]:
    records, _ = read_preference_file(train_file)
    return [Conversation(one.messages, answer) for one in records for answer in (*one.rejected, one.chosen)]


def our_scores(folder: Path, texts: list[Conversation]) -> np.ndarray:
    model, tokenizer = load_reward_model(str(folder))
    return np.asarray(Scorer(model, ChatFormatter(tokenizer), progress=False).score(texts).scores)


def rendered(tokenizer: Any, texts: list[Conversation]) -> list[str]:
    return [tokenizer.apply_chat_template(one.turns(), tokenize=False) for one in texts]


def plain_scores(folder: Path, texts: list[Conversation], *, batch: int, side: str) -> np.ndarray:
    """As a stranger does it: transformers alone, in padded batches."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    strings = rendered(tokenizer, texts)
    found = []
    for start in range(0, len(strings), batch):
        rows = tokenizer(
            strings[start : start + batch],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            found += model(**rows).logits.squeeze(-1).tolist()
    return np.array(found)


def dated_tokenizer() -> PreTrainedTokenizerFast:
    """A template that writes today's date, as Llama 3.2's does."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today: ' + date_string + '\n' }}" + tokenizer.chat_template
    )
    return tokenizer


# How the tokenizer is made, what the base model's config says of padding, and the pad token of the result.
TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str, str]] = {
    "pad-is-eos": (chatml_tokenizer, "pad", "<|im_end|>"),
    "config-pads-with-eos": (qwen_tokenizer, "eos", "<|endoftext|>"),
    "pad-is-the-last-token": (lambda: llama_tokenizer(pad="<|eot_id|>"), "pad", PAD_TOKEN),
    "no-pad": (llama_tokenizer, "none", PAD_TOKEN),
    "dated-template": (dated_tokenizer, "pad", "<|im_end|>"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_every_way_to_load_a_trained_folder_gives_one_score(case: str, train_file: Path, tmp_path: Path) -> None:
    make, padding, pad_token = TOKENIZERS[case]
    tokenizer = make()
    torch.manual_seed(1)
    pads = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "none": None}
    base = save_tiny(
        tmp_path / "base", LlamaForCausalLM(tiny_config(len(tokenizer), pad_token_id=pads[padding])), tokenizer
    )
    out = tmp_path / "out"
    train_here(base, train_file, out, "--global_batch_size", "5", "--epochs", "1")
    texts = texts_of(train_file)
    expected = our_scores(out, texts)
    assert expected.std() > 0.05
    for batch, side in ((1, "right"), (7, "right"), (7, "left")):
        assert plain_scores(out, texts, batch=batch, side=side) == pytest.approx(expected, abs=1e-5), (batch, side)
    theirs = AutoTokenizer.from_pretrained(out)
    classify = pipeline("text-classification", model=str(out))
    found = [one["score"] for one in classify(rendered(theirs, texts), add_special_tokens=False, batch_size=5)]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert theirs.pad_token == pad_token
    # Nobody needs to know where things lay on the machine that trained it.
    assert str(tmp_path) not in (out / "README.md").read_text() and "train.jsonl" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == theirs.pad_token_id
    assert (config["num_labels"] if "num_labels" in config else len(config["id2label"])) == 1
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    # The statistics are those of the raw scores, and no way of loading applies them.
    assert config["reward_mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert config["reward_std"] == pytest.approx(expected.std(ddof=1), abs=1e-5)
    if case == "dated-template":
        assert rendered(theirs, texts[:1])[0].startswith("Today: 26 Jul 2024\n")


def test_an_encoder_trains_without_dropout_and_loads_anywhere(train_file: Path, tmp_path: Path) -> None:
    base = save_bert(
        tmp_path / "bert", BertModel, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, classifier_dropout=0.5
    )
    logs = [
        train_here(base, train_file, tmp_path / name, "--global_batch_size", "5", "--epochs", "1", "--seed", "3")
        for name in ("one", "two")
    ]
    assert [entry["train/loss"] for entry in logs[0]] == [entry["train/loss"] for entry in logs[1]]
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (
        config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == config["classifier_dropout"] == 0.0
    )
    texts = texts_of(train_file)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    rows = tokenizer(
        [one.messages[0]["content"] for one in texts],
        [one.answer for one in texts],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        # Even in training mode.
        found = model(**rows).logits.squeeze(-1).numpy()
    assert found == pytest.approx(our_scores(tmp_path / "one", texts), abs=1e-5)


def test_the_statistics_of_a_sample_are_seeded_and_can_be_left_out(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    common = ("--global_batch_size", "5", "--epochs", "1", "--packing", "off", "--max_tokens_per_batch", "300")
    found = []
    for name, n in (("a", "4"), ("b", "4"), ("c", "0"), ("d", "1000")):
        train_here(tiny_base_dir, train_file, tmp_path / name, *common, "--reward_stats_groups", n)
        summary = json.loads((tmp_path / name / "train_summary.json").read_text())
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("reward_mean") == summary.get("reward_mean")
        found.append((summary.get("reward_mean"), summary.get("reward_std"), summary.get("reward_n")))
    assert found[0] == found[1] and found[2] == (None, None, None)
    assert found[3][2] == len(texts_of(train_file)) > found[0][2]
    expected = our_scores(tmp_path / "d", texts_of(train_file))
    assert found[3][:2] == pytest.approx((expected.mean(), expected.std(ddof=1)), abs=1e-5)


def test_the_card_tells_what_the_model_was_made_of(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_here(tiny_base_dir, train_file, out, "--global_batch_size", "5", "--epochs", "1", "--lora_rank", "2")
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-classification" and "reward-model" in card.data.tags
    summary = json.loads((out / "train_summary.json").read_text())
    assert summary["groups_per_source"] == {"books": 6, "forum | old": 4}
    records, _ = read_preference_file(train_file)
    assert sum(summary["rejected_per_bias"].values()) == sum(len(one.rejected) for one in records)
    assert summary["metadata"]["versions"].keys() >= {"torch", "transformers", "peft", "deepspeed", "accelerate"}
    for words in (
        summary["train_file_sha256"],
        "| forum \\| old | 4 |",
        "| length |",
        f"| loss of the last step | {summary['last_loss']:.4f} |",
        "| learning_rate | 0.003 |",
        f"| torch | {torch.__version__} |",
        "LoRA adapter of rank 2",
        "rewardbench --model=FOLDER --not_quantized",
        "RewardTrainer(model=",
        "vllm serve FOLDER",
    ):
        assert words in card.text, words
    args = json.loads((out / "train_args.json").read_text())
    assert args["lora_rank"] == 2 and args["resolved_precision"] == "fp32" and args["world_size"] == 1
    # The call that the card shows, run as it stands.
    [code] = [block.split("```")[0] for block in card.text.split("```python\n")[1:2]]
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(out))), names)
    turns = [Conversation([{"role": "user", "content": "..."}], "...")]
    assert names["score"] == pytest.approx(our_scores(out, turns)[0], abs=1e-5)


def test_base_model_and_licence(tmp_path: Path) -> None:
    assert base_of("embedded") == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert base_of("Qwen/Qwen2.5-7B-Instruct") == ("Qwen/Qwen2.5-7B-Instruct", None)
    (tmp_path / "own").mkdir()
    assert base_of(str(tmp_path / "own")) == ("own", None)
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\nlicense: other\n")
    assert base_of(str(tmp_path / "own")) == ("own", "mit")
    (tmp_path / "own" / "README.md").write_text("no header\nlicense: mit\n")
    assert base_of(str(tmp_path / "own")) == ("own", None)
    arguments = {"model_path": "Qwen/Qwen2.5-7B-Instruct", "mode": "contrastive", "train_file": "a|b\nc.jsonl"}
    summary = {"steps": 1, "groups": 2, "train_file_sha256": "0" * 64}
    card = ModelCard(model_card(arguments, summary))
    assert card.data.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert "licence: see its own card" in card.text and "| train_file | a\\|b c.jsonl |" in card.text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 123456.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 128},
    ],
)  # fmt: skip
def test_older_readers_find_the_rotary_base_the_dtype_and_the_tokenizer(rope: dict[str, Any], tmp_path: Path) -> None:
    """transformers 4 reads these names; without ``rope_theta`` it takes 10000 and says nothing."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(1)
    config = tiny_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id, rope_parameters=rope)
    base = save_tiny(tmp_path / "base", LlamaForCausalLM(config), tokenizer)
    model, loaded = load_reward_model(str(base), require_head=False)
    folder = save_reward_model(model, loaded, tmp_path / "saved")
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"] and written["torch_dtype"] == written["dtype"] == "float32"
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written.get("rope_scaling") == (scaling if rope["rope_type"] == "llama3" else None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert set(AutoTokenizer.from_pretrained(folder)("why")) == {"input_ids", "attention_mask"}
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    # Both spellings side by side mean the same to a new reader.
    again, _ = load_reward_model(str(folder))
    assert again.config.rope_parameters == model.config.rope_parameters
    texts = [Conversation([{"role": "user", "content": "why " * 60}], "so")]
    expected = Scorer(model, ChatFormatter(loaded), progress=False).score(texts).scores
    assert our_scores(folder, texts) == pytest.approx(np.asarray(expected), abs=1e-6)
    assert plain_scores(folder, texts, batch=1, side="right") == pytest.approx(np.asarray(expected), abs=1e-5)


# --- fp16: what can be seen without a GPU


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_in_fp16_skips_the_step_and_the_run_goes_on(
    fused: bool, tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """fp16 autocast and loss scaling on the CPU, with real objects: a first scale far too high makes infinite gradients.

    A fused optimizer (as ``make_optimizer`` takes it) skips by itself, without a word to accelerate.
    """
    model, tokenizer = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
    assert model.enable_packing() is None
    records, _ = read_preference_file(train_file)
    groups, _ = encode_groups(records, ChatFormatter(tokenizer))
    accelerator = Accelerator(cpu=True)
    # What Accelerator(mixed_precision="fp16") sets up on a GPU, and refuses to set up without one.
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        plan = [list(range(10))] * 40
        settings = TrainSettings(
            output_dir=str(tmp_path),
            seed=1,
            objective=Objective("contrastive", 0.5, 1.0),
            optimizer=OptimizerSettings(1e-3, warmup_steps=1),
        )
        n_tokens = np.array([group.n_tokens for group in groups])
        trainer = Trainer(
            settings,
            BatchPlan(groups, plan, n_tokens, n_tokens, "shared", tokenizer.pad_token_id, max_tokens=10**6),
            accelerator=accelerator,
            model=prepared,
            optimizer=optimizer,
            fingerprint={},
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        first = trainer.train_step(plan[0], lambda tokens: None)
        assert first["skipped"] and first["train/grad_norm"] is None
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        trainer.train()
    finally:
        accelerator.free_memory()
        accelerator.state._reset_state(reset_partial_state=True)
    skipped = [entry["skipped"] for entry in trainer.log]
    n = skipped.index(False)
    assert 0 < n < 30 and not any(skipped[n:]), "the scale is halved until the gradients are finite"
    losses = [entry["train/loss"] for entry in trainer.log]
    assert losses[:n] == [losses[0]] * n and losses[-1] < 0.9 * losses[0]
