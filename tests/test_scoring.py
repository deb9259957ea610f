"""A text's score does not depend on its company: alone, batched, padded on either side, in any order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.rope import RopeLimit, rope_limit
from codes.common.scoring import Scorer, collate_texts, plan_batches
from codes.train.reward_model import RewardModel, load_reward_model
from tests.conftest import REPO_ROOT, chatml_tokenizer, llama_tokenizer, qwen_tokenizer, spread, tiny_config
from tests.test_chat import encoder_tokenizer

QUESTIONS = ["why is the cat on the mat", "is 2 + 2 = 4", "why"]
ANSWERS = ["because it sat " * 6, "Paris", "it is red and a cat " * 9, ""]
CONVERSATIONS = [
    Conversation([{"role": "user", "content": question}], answer) for question in QUESTIONS for answer in ANSWERS
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
Kind = Callable[[], tuple[RewardModel, PreTrainedTokenizerFast]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only lose by a second thread, and badly so on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reward_model(model_class: type, config: Any) -> RewardModel:
    return RewardModel(spread(model_class(config))).eval()


def llama_pad_absent() -> tuple[RewardModel, PreTrainedTokenizerFast]:
    tokenizer = llama_tokenizer(pad=None)
    config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=None)
    return reward_model(LlamaForSequenceClassification, config), tokenizer


def llama_pad_is_eos() -> tuple[RewardModel, PreTrainedTokenizerFast]:
    tokenizer = chatml_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    return reward_model(LlamaForSequenceClassification, config), tokenizer


def qwen_config_pads_otherwise() -> tuple[RewardModel, PreTrainedTokenizerFast]:
    tokenizer = qwen_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = tiny_config(len(tokenizer), Qwen2Config, num_labels=1, pad_token_id=tokenizer.eos_token_id)
    return reward_model(Qwen2ForSequenceClassification, config), tokenizer


def bert() -> tuple[RewardModel, PreTrainedTokenizerFast]:
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        num_labels=1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return reward_model(BertForSequenceClassification, config), tokenizer


DECODERS: list[Kind] = [llama_pad_absent, llama_pad_is_eos, qwen_config_pads_otherwise]


def scores_of(
    model: RewardModel, texts: Sequence[EncodedText], pad_id: int, extra: int = 0, side: str = "right"
) -> Any:
    """Scores of one batch, padded ``extra`` positions beyond its longest text."""
    batch = collate_texts(texts, pad_id)
    fill = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0}
    batch = {key: torch.nn.functional.pad(value, (0, extra), value=fill[key]) for key, value in batch.items()}
    if side == "left":
        width = batch["input_ids"].shape[1]
        shifts = [width - len(text.input_ids) for text in texts]
        batch = {
            key: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
            for key, value in batch.items()
        }
        assert batch["attention_mask"][:, -1].all()
    with torch.inference_mode():
        return model(**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", [*DECODERS, bert])
def test_a_score_is_the_same_alone_batched_and_under_any_padding(kind: Kind, dtype: torch.dtype) -> None:
    model, tokenizer = kind()
    model.to(dtype)
    texts = ChatFormatter(tokenizer).encode(CONVERSATIONS)
    assert len({len(text.input_ids) for text in texts}) > 5
    alone = torch.cat([scores_of(model, [text], 0) for text in texts])
    assert alone.dtype == dtype and alone.std() > 0.05
    sides = ["right"] if kind is bert else ["right", "left"]
    pad_ids = {0, len(tokenizer) - 1, tokenizer.eos_token_id or 0, tokenizer.pad_token_id or 0}
    for pad_id in pad_ids:  # the mask says what is padding, not the id
        for extra, side in [(extra, side) for extra in (0, 9) for side in sides]:
            together = scores_of(model, texts, pad_id, extra, side)
            limit = TOLERANCE[dtype] * max(1.0, float(alone.std()))
            assert (together - alone).abs().max() <= limit, (pad_id, extra, side)


def test_the_score_is_read_at_the_last_token_and_not_before() -> None:
    model, tokenizer = qwen_config_pads_otherwise()
    texts = ChatFormatter(tokenizer).encode(CONVERSATIONS)
    batch = collate_texts(texts, tokenizer.pad_token_id)
    with torch.inference_mode():
        hidden = model.classifier.model(**batch).last_hidden_state
        expected = [model.classifier.score(hidden[row, len(text.input_ids) - 1]) for row, text in enumerate(texts)]
        torch.testing.assert_close(model(**batch), torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [*DECODERS, bert])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_scorer_gives_the_lone_scores_in_the_callers_order(kind: Kind, mode: str) -> None:
    model, tokenizer = kind()
    formatter = ChatFormatter(tokenizer)
    alone = torch.cat([scores_of(model, formatter.encode([one]), 0) for one in CONVERSATIONS]).numpy()
    model.train(mode == "train")
    scorer = Scorer(model, formatter, max_tokens_per_batch=150, progress=False)
    shuffled = np.random.default_rng(1).permutation(len(CONVERSATIONS) * 2) % len(CONVERSATIONS)
    result = scorer.score([CONVERSATIONS[index] for index in shuffled])
    np.testing.assert_allclose(result.scores, alone[shuffled], atol=1e-5, rtol=0)
    assert (result.n_texts, result.n_distinct) == (2 * len(CONVERSATIONS), len(CONVERSATIONS))
    assert result.n_truncated == result.n_dropped == result.n_answer_cut == 0
    lengths = [len(text.input_ids) for text in formatter.encode(CONVERSATIONS)]
    assert result.n_tokens == sum(lengths)
    # Packs compute less than the texts hold, padded batches more; neither as much as one padded rectangle.
    assert (result.n_computed_tokens < result.n_tokens) == model.takes_packs
    assert result.n_computed_tokens < len(lengths) * max(lengths)
    assert result.scores.dtype == np.float32 and result.seconds > 0
    assert model.training == (mode == "train")  # left as it was found
    # The same text twice is a tie to the last bit, so no pair is decided by rounding.
    for index in range(len(CONVERSATIONS)):
        assert len(set(result.scores[shuffled == index].tolist())) == 1


@pytest.mark.parametrize("kind", [*DECODERS, bert])
def test_dropout_is_off_in_training_mode(kind: Kind, tmp_path: Path) -> None:
    model, tokenizer = kind()
    dropout = (
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
        if kind is bert
        else {"attention_dropout": 0.5}
    )
    for name, value in dropout.items():
        setattr(model.config, name, value)
    model.classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_reward_model(str(tmp_path))
    texts = ChatFormatter(loaded_tokenizer).encode(CONVERSATIONS[:4])
    expected = scores_of(loaded, texts, 0)
    loaded.train()
    batch = collate_texts(texts, 0)
    for _ in range(3):
        torch.testing.assert_close(loaded(**batch).detach(), expected, atol=1e-6, rtol=0)


def test_config_and_tokenizer_that_disagree_on_the_pad_id(tiny_qwen_dir: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = (
        AutoConfig.from_pretrained(tiny_qwen_dir),
        AutoTokenizer.from_pretrained(tiny_qwen_dir),
    )
    assert config.pad_token_id != tokenizer.pad_token_id
    model, tokenizer = load_reward_model(str(tiny_qwen_dir))
    formatter = ChatFormatter(tokenizer)
    batched = Scorer(model, formatter, max_tokens_per_batch=4000, progress=False).score(CONVERSATIONS).scores
    lone = Scorer(model, formatter, max_tokens_per_batch=1, progress=False).score(CONVERSATIONS).scores
    np.testing.assert_allclose(batched, lone, atol=1e-5, rtol=0)
    assert len(set(lone.tolist())) == len(CONVERSATIONS)


TWO_RANKS = """
import json, sys
import torch
from accelerate import Accelerator
from codes.common.chat import ChatFormatter, Conversation
from codes.common.scoring import Scorer
from codes.train.reward_model import load_reward_model
folder, meeting, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model, tokenizer = load_reward_model(folder)
conversations = [Conversation([{"role": "user", "content": q}], a) for q, a in json.load(sys.stdin)]
scorer = Scorer(accelerator.prepare(model), ChatFormatter(tokenizer), max_tokens_per_batch=1, packing="off",
                progress=False, accelerator=accelerator)
result = scorer.score(conversations)
print(json.dumps([result.scores.tolist(), result.n_computed_tokens]))
torch.distributed.destroy_process_group()
"""


def test_ranks_of_a_training_share_an_odd_number_of_batches(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir))
    odd = CONVERSATIONS[: len(CONVERSATIONS) - 1 + len(CONVERSATIONS) % 2]
    scorer = Scorer(model, ChatFormatter(tokenizer), max_tokens_per_batch=1, packing="off", progress=False)
    alone = scorer.score(odd)
    # One text a batch.
    assert alone.n_distinct == len(odd) and alone.n_distinct % 2 == 1 and alone.n_computed_tokens == alone.n_tokens
    variables = {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    variables |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    texts = json.dumps([[one.messages[0]["content"], one.answer] for one in odd])
    ranks = []
    for rank in "01":
        command = [sys.executable, "-c", TWO_RANKS, str(tiny_llama_dir), str(tmp_path / "meeting"), rank]
        environment = {**os.environ, **variables, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True))
    # Both at once: they wait for each other.
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda rank: rank.communicate(texts, timeout=120)[0], ranks))
    for rank, output in zip(ranks, printed, strict=True):
        assert rank.returncode == 0
        scores, n_computed = json.loads(output.splitlines()[-1])
        assert n_computed == alone.n_computed_tokens
        np.testing.assert_allclose(scores, alone.scores, atol=1e-5, rtol=0)


# --- what does not fit, what is not finite


def test_dropped_texts_are_nan_and_counted() -> None:
    model, tokenizer = qwen_config_pads_otherwise()
    lengths = np.array([len(text.input_ids) for text in ChatFormatter(tokenizer).encode(CONVERSATIONS)])
    limit = int(np.median(lengths))
    scorer = Scorer(model, ChatFormatter(tokenizer, max_length=limit, overlength="drop"), progress=False)
    result = scorer.score(CONVERSATIONS)
    assert np.isnan(result.scores).tolist() == (lengths > limit).tolist()
    assert (result.n_dropped, result.n_truncated) == ((lengths > limit).sum(), 0)
    assert result.n_distinct == (lengths <= limit).sum()
    nothing = Scorer(model, ChatFormatter(tokenizer, max_length=4, overlength="drop"), progress=False).score(
        CONVERSATIONS
    )
    assert np.isnan(nothing.scores).all() and nothing.n_tokens == nothing.n_distinct == 0
    empty = scorer.score([])
    assert empty.scores.shape == (0,) and (empty.n_texts, empty.n_distinct) == (0, 0)


@pytest.mark.parametrize("policy", ["left", "keep_end"])
def test_cut_texts_are_counted_and_equal_ones_tie(policy: str) -> None:
    model, tokenizer = qwen_config_pads_otherwise()
    prompt = [{"role": "user", "content": "why is the cat red"}]
    # Each policy makes another pair equal: the one that differs at its start, the one that differs at its end.
    end = " the cat sat on the mat because the mat is red"
    answers = ["it" + end, "a dog" + end, "it" + end + " and so", "it" + end + " and why"]
    conversations = [Conversation(prompt, answer) for answer in answers]
    whole = ChatFormatter(tokenizer).encode(conversations)
    limit = 12 if policy == "left" else min(len(text.input_ids) for text in whole) - 1
    formatter = ChatFormatter(tokenizer, max_length=limit, overlength=policy)
    encoded = formatter.encode(conversations)
    result = Scorer(model, formatter, max_tokens_per_batch=40, progress=False).score(conversations)
    assert result.n_truncated == sum(len(text.input_ids) > limit for text in whole) > 0
    assert result.n_answer_cut == sum(text.answer_cut for text in encoded) > 0
    assert result.n_dropped == 0
    assert result.n_distinct == len({text.input_ids for text in encoded}) < len(conversations)
    by_ids: dict[tuple[int, ...], set[float]] = {}
    for text, score in zip(encoded, result.scores.tolist(), strict=True):
        by_ids.setdefault(text.input_ids, set()).add(score)
    assert all(len(scores) == 1 for scores in by_ids.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_run(value: float) -> None:
    model, tokenizer = llama_pad_is_eos()
    with torch.no_grad():
        model.classifier.score.weight.fill_(value)
    model.train()
    with pytest.raises(ContrastRMError, match="not finite; load it in float32 or bfloat16"):
        Scorer(model, ChatFormatter(tokenizer), progress=False).score(CONVERSATIONS[:2])
    assert model.training


# --- dtypes


def test_a_bf16_body_keeps_float32_scores(tiny_llama_dir: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="bfloat16")
    assert model.classifier.score.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model.classifier.score.weight.mul_(0.1)
    many = [Conversation([{"role": "user", "content": f"why {n}"}], f"because {n * n}") for n in range(100)]
    scores = Scorer(model, ChatFormatter(tokenizer), progress=False).score(many).scores
    # A bf16 head would give bf16 numbers, fewer of them, and so ties that are no ties.
    rounded = torch.from_numpy(scores).to(torch.bfloat16).float().numpy()
    assert len(set(scores.tolist())) == 100 > len(set(rounded.tolist()))
    assert (scores != rounded).mean() > 0.9
    # The head computes in float32 under autocast, too.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        batch = collate_texts(ChatFormatter(tokenizer).encode(many[:8]), 0)
        assert model(**batch).dtype == torch.float32


# --- planning and collating


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), max_size=60), max_tokens=st.integers(1, 1000))
def test_plan_batches_properties(lengths: list[int], max_tokens: int) -> None:
    batches = plan_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert longest * len(batch) <= max_tokens or len(batch) == 1
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)  # longest first
    # No batch could have taken the next one's first text: the budget is used.
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > max_tokens
    assert batches == plan_batches(lengths, max_tokens)


def test_collate_example_of_the_docstring() -> None:
    batch = collate_texts([EncodedText((5, 6, 7)), EncodedText((8,))], pad_id=0)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    segments = collate_texts([EncodedText((5, 6), (0, 1)), EncodedText((8,), (1,))], pad_id=9)
    assert segments["token_type_ids"].tolist() == [[0, 1], [1, 0]] and segments["input_ids"].tolist() == [
        [5, 6],
        [8, 9],
    ]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_length_do_not_see_the_neighbours(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both choose their frequencies by the longest text of a batch; dynamic ones also keep those of the batch before."""
    tokenizer = chatml_tokenizer()
    config = tiny_config(
        len(tokenizer),
        LlamaConfig if kind == "dynamic" else Phi3Config,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.max_position_embeddings, config.original_max_position_embeddings = (
        (24, 24) if kind == "dynamic" else (96, 24)
    )
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
        config.rope_parameters |= {**factors, "original_max_position_embeddings": 24}
    model_class = LlamaForSequenceClassification if kind == "dynamic" else Phi3ForSequenceClassification
    plain = spread(model_class(config)).double().eval()
    generator = np.random.default_rng(0)
    texts = [EncodedText(tuple(generator.integers(5, 100, size=n).tolist())) for n in (23, 40, 24, 6, 39, 25, 40)]
    alone = []
    for text in texts:
        fresh = model_class(config).double().eval()
        fresh.load_state_dict(plain.state_dict())
        with torch.inference_mode():
            alone.append(fresh(input_ids=torch.tensor([text.input_ids])).logits.item())
    together = Scorer(RewardModel(plain).eval(), ChatFormatter(tokenizer), progress=False).score_texts(texts)
    assert f"rotary embedding ({kind})" in capsys.readouterr().err
    np.testing.assert_allclose(together.scores, alone, rtol=0, atol=1e-5)
    assert plan_batches([40, 39, 24, 6], 1000, RopeLimit(24, one_by_one=False)) == [[0, 1], [2, 3]]
    assert plan_batches([40, 39, 24, 6], 1000, RopeLimit(24, one_by_one=True)) == [[0], [1], [2, 3]]


def test_of_several_rotary_limits_the_shortest_holds() -> None:
    # As Gemma 3 has it: kinds of layers with an embedding each.
    config = tiny_config(97, num_labels=1)
    parameters = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
    config.rope_parameters = {
        kind: parameters | {"original_max_position_embeddings": tokens}
        for kind, tokens in (("full_attention", 48), ("sliding_attention", 24))
    }
    limit = rope_limit(config)
    assert limit == RopeLimit(24, one_by_one=True)
    # Between the limits some layers have changed their frequencies and some have not.
    assert plan_batches([60, 40, 30, 24, 6], 1000, limit) == [[0], [1], [2], [3, 4]]
