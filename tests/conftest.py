"""Small real things that the tests share: tokenizers trained here, two-layer models of the real classes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed import TCPStore
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

# A test run in the background of a script inherits an ignored Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO_ROOT = Path(__file__).resolve().parents[1]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
WORDS = "the cat sat on a mat and why is it red because 2 + 2 = 4 user assistant system Paris capital of France"

# The configuration of a decoder of any architecture, small enough to be built in a test.
SMALL_DECODER: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
    # Wide enough for attention to matter to the score.
    "initializer_range": 0.3,
}


def train_tokenizer(
    special: Sequence[str], template: str | None, *, bos: str | None, eos: str, pad: str | None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, with real special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 10, trainer)
    if bos is not None:
        from tokenizers.processors import TemplateProcessing

        # As Llama does it: plain calls add BOS, so that tokenising a rendered template would double it.
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


def chatml_tokenizer(pad: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """SmolLM2's shape: BOS exists but is no prefix, pad = eos = end of turn, a newline closes the template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return train_tokenizer(special, CHATML, bos=None, eos="<|im_end|>", pad=pad)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's shape: no BOS, eos is the end of turn, pad is another token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return train_tokenizer(special, CHATML, bos=None, eos="<|im_end|>", pad="<|endoftext|>")


def llama_tokenizer(pad: str | None = None) -> PreTrainedTokenizerFast:
    """Llama 3's shape: BOS by the template and by plain calls, no pad token, the end of turn closes the template."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return train_tokenizer(special, LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", pad=pad)


def tiny_config(vocab_size: int, kind: type = LlamaConfig, **options: Any) -> Any:
    """Two layers, hidden 32, grouped-query attention."""
    return kind(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **options,
    )


def save_tiny(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a tiny model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spread(model: Any) -> Any:
    """Random weights of a size that makes scores differ clearly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 1.0 if name.startswith("score") else 0.15
                parameter.copy_(torch.empty_like(parameter).normal_(0, std, generator=generator))
    return model


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model (with a head) of two Llama layers and a ChatML tokenizer with pad = eos."""
    tokenizer = chatml_tokenizer()
    config = tiny_config(len(tokenizer), num_labels=1, problem_type="regression", pad_token_id=tokenizer.pad_token_id)
    model = spread(LlamaForSequenceClassification(config))
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama-rm", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base language model (no head) of two Llama layers and a ChatML tokenizer."""
    tokenizer = chatml_tokenizer()
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama-base", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of two Qwen2 layers whose config, as published ones do, names eos as pad while the tokenizer pads
    with another id."""
    tokenizer = qwen_tokenizer()
    config = tiny_config(
        len(tokenizer), Qwen2Config, num_labels=1, problem_type="regression", pad_token_id=tokenizer.eos_token_id
    )
    model = spread(Qwen2ForSequenceClassification(config))
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-qwen-rm", model, tokenizer)


@pytest.fixture
def preference_rows() -> list[dict[str, Any]]:
    """Groups of uneven size."""
    rows = []
    for number in range(10):
        rejected = [
            f"it is {number} because the mat is red {k}" * (1 + (k + number) % 3) for k in range(1 + number % 4)
        ]
        rows.append(
            {
                "id": f"row-{number}",
                "question": f"why is the cat number {number} on the mat",
                "chosen": f"because it sat {number}",
                "rejected": rejected,
                "bias_type": [None, *(["length", "beauty", "authority"][: len(rejected) - 1])],
            }
        )
    return rows


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Sequence[Any]], Path]:
    """Write rows as JSONL; a text is written as it stands."""

    def write(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
        )
        return path

    return write


@pytest.fixture
def meeting_point() -> Iterator[dict[str, str]]:
    """Variables of two processes that a test starts itself: they meet at a port that this process holds, as under torchrun.

    A port that is looked up, closed and named to them could be another process's by then.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "ACCELERATE_USE_CPU": "true",
    }
    del store


def launch_training(*flags: str, **knobs: str) -> subprocess.Popen[str]:
    """``bash run_training.sh`` with these flags and knobs, on CPU ranks of one thread."""
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SKIP_SETUP": "1",
        "PYTHON": sys.executable,
        **knobs,
    }
    return subprocess.Popen(
        ["bash", "run_training.sh", *flags],
        cwd=REPO_ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What each of them printed; fails where one of them failed."""
    outputs = [process.communicate(timeout=400) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [out for out, _ in outputs]


def run_module(module: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
