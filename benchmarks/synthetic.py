"""Models and groups of chosen size, for measurements that need no real ones: random weights, random words.

Writes: a reward model's folder with random weights in the shape of a Qwen2.5 model, and preference records whose prompts and
answers have about so many tokens. A shape's numbers are those of the published model of that size, but for its vocabulary:
it is that of the tokenizer at hand (the embeddings are looked up, not multiplied).
Used by ``python -m benchmarks.speed gpu``.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config

from codes.common.records import PreferenceRecord, write_jsonl
from codes.train.reward_model import RewardModel, save_reward_model

# hidden, intermediate, layers, heads, key-value heads
SHAPES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4),
    # For a try of the whole suite in seconds.
    "tiny": (64, 128, 2, 4, 2),
}
# Tokens of an answer are drawn evenly from these: real answers to one prompt differ in length.
ANSWER_TOKENS = (128, 384)
WORDS = ["a", "the", "it", "light", "water", "because", "people", "question", "reason", "example", "system", "nothing"]


def make_random_model(shape: str, tokenizer_dir: str | Path, folder: str | Path, device: torch.device) -> Path:
    """A reward model of a shape with random bfloat16 weights, made on the device, unless the folder has one.

    Args:
        shape: One of ``SHAPES``.
        tokenizer_dir: A reward model's folder, whose tokenizer it takes over.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32768,
        num_labels=1,
        problem_type="regression",
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with device:
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_reward_model(RewardModel(classifier), tokenizer, folder)
    if device.type == "cuda":
        # The peers are processes of their own and need the whole card.
        del classifier
        gc.collect()
        torch.cuda.empty_cache()
    return folder


def write_random_groups(
    output_file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    answers: int,
    prompt_tokens: int,
    seed: int = 42,
) -> Path:
    """Write groups of random words: prompts of about ``prompt_tokens`` tokens, answers of ``ANSWER_TOKENS``."""
    generator = np.random.default_rng([seed, answers, prompt_tokens])
    rows = []
    for number in range(n):
        lengths = generator.integers(*ANSWER_TOKENS, size=answers, endpoint=True)
        question = random_text(tokenizer, generator, prompt_tokens)
        chosen, *rejected = (random_text(tokenizer, generator, int(length)) for length in lengths)
        record = PreferenceRecord(
            id=f"random-{number}",
            messages=[{"role": "user", "content": question}],
            chosen=chosen,
            rejected=rejected,
            bias_type=[None] * len(rejected),
            source="random words",
        )
        rows.append(record.to_row())
    write_jsonl(output_file, rows)
    return Path(output_file)


def random_text(tokenizer: PreTrainedTokenizerBase, generator: np.random.Generator, n_tokens: int) -> str:
    """A text of about ``n_tokens`` tokens."""
    text = " ".join(generator.choice(WORDS, size=n_tokens))
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens]))
