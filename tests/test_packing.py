"""Packs: the layout, the plans, and that a score or a gradient does not know whether it was packed.

Small random models of the real classes. Run: ``python -m pytest tests/test_packing.py``
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from codes.common import packed_attention as attention
from codes.common.chat import ChatFormatter, Conversation
from codes.common.errors import ContrastRMError
from codes.common.packing import balance, build_pack, plan_packs, shared_tokens
from codes.common.scoring import Scorer, resolve_packing
from codes.train.engine import confirm_packing
from codes.train.reward_model import RewardModel
from tests.conftest import SMALL_DECODER

VOCABULARY = SMALL_DECODER["vocab_size"]
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL_DECODER),
    "qwen2": lambda: Qwen2Config(**SMALL_DECODER),
    "qwen3": lambda: Qwen3Config(**SMALL_DECODER, head_dim=8),
    "mistral": lambda: MistralConfig(**SMALL_DECODER, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SMALL_DECODER, sliding_window=7),
    "gemma": lambda: GemmaConfig(**SMALL_DECODER, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SMALL_DECODER, head_dim=8, sliding_window=9),
    "phi": lambda: PhiConfig(**SMALL_DECODER),
    "phi3": lambda: Phi3Config(**SMALL_DECODER),
    "olmo": lambda: OlmoConfig(**SMALL_DECODER),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in SMALL_DECODER.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        num_labels=1,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        num_labels=1,
    ),
}
BACKENDS = ("segments", "dense", "flex")
Sequences = list[list[int]]


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> RewardModel:
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_config(CONFIGS[kind](), dtype=dtype)
    return RewardModel(classifier).eval()


def draw(generator: np.random.Generator, *lengths: int) -> Sequences:
    return [generator.integers(1, VOCABULARY, length).tolist() for length in lengths]


def group(seed: int, prompt: int, answers: Sequence[int]) -> Sequences:
    generator = np.random.default_rng(seed)
    (shared,) = draw(generator, prompt)
    return [shared + answer for answer in draw(generator, *answers)]


def awkward_sequences() -> Sequences:
    """Groups of several sizes, an empty prefix, one-token answers, equal texts, texts that begin with another."""
    sequences = group(1, 20, (5, 9, 1, 14)) + group(2, 0, (6, 4)) + group(3, 12, (1, 1))
    sequences += [sequences[1], sequences[0][:20], sequences[3] + [5, 6, 7], [8]]
    return sequences


def one_by_one(model: RewardModel, sequences: Sequences) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids]), torch.ones((1, len(ids)))) for ids in sequences])


def packed(
    model: RewardModel, sequences: Sequences, *, share: bool = True, min_shared: int = 2, to: int = 1
) -> torch.Tensor:
    pack = build_pack(sequences, share=share, min_shared=min_shared, multiple_of=to)
    return model(pack.input_ids, layout=pack.layout, ends=pack.ends)


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(attention, "default_backend", lambda device: backend)


# --- the layout


def visible(pack_layout: Any) -> list[set[int]]:
    mask = pack_layout.mask()
    return [set(torch.nonzero(row).flatten().tolist()) for row in mask]


token_lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(sequences=token_lists, share=st.booleans(), min_shared=st.integers(1, 5), multiple_of=st.integers(1, 9))
def test_every_token_sees_exactly_its_own_path(
    sequences: Sequences, share: bool, min_shared: int, multiple_of: int
) -> None:
    pack = build_pack(sequences, share=share, min_shared=min_shared, multiple_of=multiple_of)
    ids, positions = pack.input_ids[0].tolist(), pack.layout.positions.tolist()
    seen = visible(pack.layout)
    for sequence, end in zip(sequences, pack.ends.tolist(), strict=True):
        path = sorted(seen[end])
        # What the last token sees is the sequence, in order, at the positions it has alone.
        assert [ids[token] for token in path] == sequence
        assert [positions[token] for token in path] == list(range(len(sequence)))
        for place, token in enumerate(path):
            assert sorted(seen[token]) == path[: place + 1]
    assert pack.layout.n_tokens % multiple_of == 0
    assert pack.n_sequence_tokens == sum(map(len, sequences))
    nodes = pack.layout.nodes
    assert [node.start for node in nodes] == [0, *(node.stop for node in nodes[:-1])]
    assert nodes[-1].stop == pack.layout.n_tokens


@settings(max_examples=200, deadline=None)
@given(sequences=token_lists)
def test_a_full_tree_holds_every_distinct_prefix_once(sequences: Sequences) -> None:
    prefixes = {tuple(ids[:length]) for ids in sequences for length in range(1, len(ids) + 1)}
    assert build_pack(sequences, min_shared=1).layout.n_tokens == len(prefixes) == shared_tokens(sequences, 1)
    assert build_pack(sequences, share=False).layout.n_tokens == sum(map(len, sequences))
    for min_shared in (2, 4):
        assert len(prefixes) <= shared_tokens(sequences, min_shared) <= sum(map(len, sequences))


def test_layout_example_of_the_docstring() -> None:
    pack = build_pack([(1, 2, 3, 4), (1, 2, 5)], min_shared=1)
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert pack.layout.positions.tolist() == [0, 1, 2, 3, 2]
    assert pack.layout.until.tolist() == [5, 5, 4, 4, 5]
    assert pack.ends.tolist() == [3, 4]


def test_a_tree_a_thousand_deep_is_laid_out() -> None:
    sequences = [list(range(length)) for length in range(1, 2001)]
    pack = build_pack(sequences, min_shared=1)
    assert pack.layout.n_tokens == 2000 and pack.ends.tolist() == list(range(2000))


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_an_empty_sequence_is_refused(sequences: Sequences) -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_pack(sequences)


# --- the plan


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=8
    ),
    budget=st.integers(1, 200),
    share=st.booleans(),
)
def test_a_plan_takes_every_text_once_and_keeps_the_budget(
    shapes: list[tuple[int, list[int]]], budget: int, share: bool
) -> None:
    sequences = [ids for seed, (prompt, answers) in enumerate(shapes) for ids in group(seed, prompt, answers)]
    packs = plan_packs(sequences, budget, share=share)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sequences)))
    sizes = [build_pack([sequences[i] for i in pack], share=share).layout.n_tokens for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert packs == plan_packs(sequences, budget, share=share)
    # A larger budget never costs more packs than one text each.
    assert len(packs) <= len(sequences)


def test_the_largest_pack_comes_first() -> None:
    # Sorted by their tokens they lie from the smallest pack to the largest.
    sequences = [[first] * length for first, length in ((1, 10), (2, 20), (3, 40), (4, 60))]
    assert plan_packs(sequences, 60, share=False) == [[3], [2], [0, 1]]


def test_bins_are_balanced_by_what_they_cost() -> None:
    assert balance([5, 4, 3, 2], 2) == [[0, 3], [1, 2]]
    # One heavy item outweighs all others.
    assert balance([9, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4]]
    assert balance([9, 1, 1, 1, 1], 2, max_items=3) == [[0, 4], [1, 2, 3]]


def test_the_answers_of_a_question_stay_together_where_they_fit() -> None:
    groups = [group(seed, 60, (20, 20, 20, 20)) for seed in range(12)]
    order = np.random.default_rng(0).permutation(48).tolist()
    sequences = [groups[index // 4][index % 4] for index in order]
    packs = plan_packs(sequences, 450)
    for pack in packs:
        questions = [order[index] // 4 for index in pack]
        assert all(questions.count(question) == 4 for question in questions)
    computed = sum(shared_tokens([sequences[i] for i in pack]) for pack in packs)
    assert computed == 12 * (60 + 4 * 20)


# --- scores


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_score_is_the_score_alone(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind)
    sequences = awkward_sequences()
    with torch.no_grad():
        alone = one_by_one(model, sequences)
        assert model.enable_packing() is None
        use_backend(monkeypatch, backend)
        assert alone.std() > 1e-3
        for options in ({}, {"share": False}, {"min_shared": 9}, {"to": 16}):
            torch.testing.assert_close(packed(model, sequences, **options), alone, atol=1e-9, rtol=0)
        # Padded batches of the same model are what they were.
        torch.testing.assert_close(one_by_one(model, sequences), alone, atol=0, rtol=0)


def test_the_check_would_notice_a_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    sequences = awkward_sequences()
    pack = build_pack(sequences, min_shared=2)
    assert model.enable_packing() is None
    use_backend(monkeypatch, "dense")
    with torch.no_grad():
        right = model(pack.input_ids, layout=pack.layout, ends=pack.ends)
        pack.layout.cache[("mask", None)] = torch.ones_like(pack.layout.mask()).tril()
        wrong = model(pack.input_ids, layout=pack.layout, ends=pack.ends)
    assert (right - wrong).abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 25), st.lists(st.integers(1, 12), min_size=2, max_size=6)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 9),
    min_shared=st.integers(1, 10),
    repeat=st.booleans(),
)
def test_random_groups_score_alike(
    shapes: list[tuple[int, list[int]]], seed: int, min_shared: int, repeat: bool
) -> None:
    model = make_model("qwen2")
    model.enable_packing()
    sequences = [ids for at, (prompt, answers) in enumerate(shapes) for ids in group(seed + at, prompt, answers)]
    if repeat:
        sequences += [sequences[0], sequences[0] + sequences[-1]]
    with torch.no_grad():
        expected = one_by_one(model, sequences)
        torch.testing.assert_close(packed(model, sequences, min_shared=min_shared), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral-window"])
def test_float32_keeps_to_its_rounding(kind: str) -> None:
    model = make_model(kind, torch.float32)
    sequences = awkward_sequences()
    model.enable_packing()
    with torch.no_grad():
        alone = one_by_one(model, sequences)
        limit = 1e-5 * max(1.0, float(alone.std()))
        torch.testing.assert_close(packed(model, sequences), alone, atol=limit, rtol=0)


def test_merging_shared_parts_adds_no_error_to_that_of_float32() -> None:
    # Sixty texts, each of which goes on where the one before it ends: the last one's attention is merged from sixty parts.
    base = draw(np.random.default_rng(0), 240)[0]
    layout = build_pack([base[: 4 * count] for count in range(1, 61)], min_shared=1).layout
    errors = {"segments": 0.0, "dense": 0.0}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn((1, 4, layout.n_tokens, 16), generator=generator) for _ in range(3)]
        exact = attention.packed_attention(*(part.double() for part in parts), layout, backend="dense", scale=0.5)
        for backend in errors:
            found = attention.packed_attention(*parts, layout, backend=backend, scale=0.5)
            errors[backend] += float((found.double() - exact).norm() / exact.norm())
    assert errors["segments"] < errors["dense"]


def test_attention_in_chunks_is_refused_by_name() -> None:
    model = make_model("llama")
    model.backbone.config.attention_chunk_size = 16
    assert model.enable_packing() == "its attention works in chunks"
    with pytest.raises(ContrastRMError, match="not possible with this model: its attention works in chunks"):
        resolve_packing(model, "shared")


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_capped_attention(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    # Small caps, so that they bite. The library's own softmax is in float32 here, whatever the model's dtype.
    config = Gemma2Config(**SMALL_DECODER, head_dim=8, sliding_window=9, attn_logit_softcapping=1.0)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)).eval()
    sequences = awkward_sequences()
    with torch.no_grad():
        alone = one_by_one(model, sequences)
        assert model.enable_packing() is None
        use_backend(monkeypatch, backend)
        torch.testing.assert_close(packed(model, sequences), alone, atol=2e-6 * float(alone.std()), rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_whose_values_are_narrower_than_its_keys(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    config = DeepseekV3Config(
        **SMALL_DECODER | {"num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )
    config._experts_implementation = "eager"
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)).eval()
    sequences = awkward_sequences()
    with torch.no_grad():
        alone = one_by_one(model, sequences)
        assert model.enable_packing() is None
        use_backend(monkeypatch, backend)
        # The router computes in float32.
        torch.testing.assert_close(packed(model, sequences), alone, atol=2e-6 * float(alone.std()), rtol=0)


# --- gradients


def gradients(model: RewardModel, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, scores.shape[0], dtype=scores.dtype)
    torch.tanh(scores * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral-window", "gemma3", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_agree_tensor_by_tensor(kind: str, checkpointing: bool) -> None:
    model = make_model(kind)
    sequences = awkward_sequences()
    expected = gradients(model, one_by_one(model, sequences))
    assert model.enable_packing() is None
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    for share in (True, False):
        found = gradients(model, packed(model, sequences, share=share))
        assert found.keys() == expected.keys() and len(found) > 5
        for name, gradient in expected.items():
            # The library's norms compute in float32 even here.
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


def test_gradients_of_the_two_cpu_backends_agree_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    model.enable_packing()
    expected = gradients(model, one_by_one(model, awkward_sequences()))
    for backend in ("segments", "dense"):
        use_backend(monkeypatch, backend)
        found = gradients(model, packed(model, awkward_sequences()))
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), (backend, name)


def test_bfloat16_is_off_by_no_more_than_padded_bfloat16() -> None:
    exact = make_model("llama")
    rounded = make_model("llama")
    rounded.to(torch.bfloat16)
    sequences = [ids for seed in range(20) for ids in group(seed, 30, (10, 20, 15))]
    with torch.no_grad():
        truth = one_by_one(exact, sequences)
        padded = one_by_one(rounded, sequences).double()
        assert rounded.enable_packing() is None
        error = (packed(rounded, sequences).double() - truth).abs().mean()
    assert error <= 1.25 * (padded - truth).abs().mean()


# --- models that cannot be packed


def classifier(config: PretrainedConfig) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(AutoModelForSequenceClassification.from_config(config)).eval()


def test_models_that_cannot_be_packed_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = ("intermediate_size", "num_key_value_heads", "max_position_embeddings")
    small = {key: value for key, value in SMALL_DECODER.items() if key not in unknown}
    bert = classifier(BertConfig(**small, intermediate_size=48))
    assert "not a decoder" in str(bert.enable_packing())
    assert resolve_packing(bert, "auto") == "off"
    assert "padded batches of similar length, not in packs: it is not a decoder" in capsys.readouterr().err
    with pytest.raises(ContrastRMError, match="--packing shared is not possible with this model"):
        resolve_packing(bert, "shared")
    falcon = classifier(FalconConfig(**small))
    assert "attention cannot be replaced" in str(falcon.enable_packing())
    dynamic = LlamaConfig(**SMALL_DECODER)
    dynamic.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "rotary embedding (dynamic)" in str(classifier(dynamic).enable_packing())
    both_ways = make_model("llama")
    both_ways.backbone.config.is_causal = False
    assert "looks both ways" in str(both_ways.enable_packing())
    assert resolve_packing(make_model("llama"), "auto") == "shared"
    assert resolve_packing(make_model("llama"), "packed") == "packed"
    with pytest.raises(ContrastRMError, match="unknown --packing"):
        resolve_packing(make_model("llama"), "yes")


# Few experts, one at a time; the attention is what matters.
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
UNPACKABLE: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    # Windows that their masks have and their attention is not told of: only texts longer than the window would show it.
    "qwen2-moe-window": (
        lambda: Qwen2MoeConfig(
            **SMALL_DECODER,
            **EXPERTS,
            num_experts=2,
            shared_expert_intermediate_size=16,
            sliding_window=4096,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "probe pack differs",
    ),
    "phimoe-window": (
        lambda: PhimoeConfig(**SMALL_DECODER, num_experts_per_tok=1, num_local_experts=2, sliding_window=4096),
        "probe pack differs",
    ),
    "doge": (lambda: DogeConfig(**SMALL_DECODER), "makes masks of its own"),
    "gpt-oss": (
        lambda: GptOssConfig(**SMALL_DECODER, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "attention sinks",
    ),
    "nemotron": (lambda: NemotronConfig(**SMALL_DECODER), "does not hand packs on"),
    "gemma3-dynamic": (
        lambda: Gemma3TextConfig(
            **SMALL_DECODER,
            head_dim=8,
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        "rotary embedding (dynamic)",
    ),
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_that_packs_would_score_wrongly_fall_back_by_themselves(kind: str) -> None:
    config, reason = UNPACKABLE[kind]
    torch.manual_seed(0)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config(), dtype=torch.float32)).eval()
    sequences = awkward_sequences()
    window = getattr(model.config, "sliding_window", None)
    with torch.no_grad():
        before = one_by_one(model, sequences)
        assert reason in str(model.enable_packing())
        assert resolve_packing(model, "auto") == "off"
        torch.testing.assert_close(one_by_one(model, sequences), before, atol=0, rtol=0)
    assert getattr(model.config, "sliding_window", None) == window


def test_a_model_that_ignores_the_layout_is_found_by_the_probe() -> None:
    model = make_model("llama")
    backbone = model.backbone
    original = backbone.forward

    def forward(**inputs: Any) -> Any:
        # A model that builds its own positions, as some do.
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)
        return original(**inputs)

    forward.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    backbone.forward = forward  # type: ignore[method-assign]
    assert "probe pack differs" in str(model.enable_packing())
    assert not model.takes_packs
    with pytest.raises(ContrastRMError, match="takes no packs"):
        packed(model, awkward_sequences())


# --- the device that a model is trained on


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_probe_on_the_device_leaves_the_model_as_it_was(kind: str, cast: torch.dtype | None) -> None:
    model = make_model(kind, torch.float32).train()
    assert model.enable_packing() is None
    before = [(weight, weight.data_ptr(), weight.detach().clone()) for weight in model.parameters()]
    assert model.probe_packing_on(torch.device("cpu"), cast=cast) is None
    after = list(model.parameters())
    assert len(after) == len(before) and model.training
    for found, (weight, place, values) in zip(after, before, strict=True):
        assert found is weight and found.data_ptr() == place and torch.equal(found, values) and found.grad is None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "qwen2"])
def test_a_probe_on_the_device_knows_windows_that_alternate(kind: str, precision: torch.dtype) -> None:
    """The probe takes three layers of many, and the last one is of another kind than the third."""
    size = SMALL_DECODER | {"num_hidden_layers": 6, "sliding_window": 9, "layer_types": ["sliding_attention"] * 6}
    size["layer_types"][5 if kind != "qwen2" else 0] = "full_attention"
    configs: dict[str, Any] = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "qwen2": Qwen2Config}
    head = {} if kind == "qwen2" else {"head_dim": 8}
    config = configs[kind](**size, **head, **({"use_sliding_window": True} if kind == "qwen2" else {}))
    torch.manual_seed(0)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=precision)).eval()
    assert model.enable_packing() is None
    assert model.probe_packing_on(torch.device("cpu"), cast=None) is None
    assert model.backbone.config.layer_types == size["layer_types"] and len(model.backbone.layers) == 6


def doubles_gradients_of_packs(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """The values are right; the probe's single texts are shorter than 20 tokens, its pack is longer."""
    return output + (output - output.detach()) if output.shape[1] > 20 else output


def fails_with_gradients(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and output.shape[1] > 20:
        raise NotImplementedError("no backward kernel for heads of 8")
    return output


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (doubles_gradients_of_packs, "the gradients of a probe pack differ from its texts'"),
        (fails_with_gradients, "a probe pack fails in it: no backward kernel for heads of 8"),
    ],
)
def test_packs_that_only_score_on_a_device_are_not_trained_on_it(
    hook: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama", torch.float32)
    assert model.enable_packing() is None
    accelerator = Accelerator(cpu=True)
    assert confirm_packing(model, "packed", accelerator, wanted="packed", precision="fp32") == "packed"
    model.backbone.layers[0].mlp.register_forward_hook(hook)
    assert resolve_packing(model, "auto") == "shared", "scores alone show nothing"
    assert confirm_packing(model, "shared", accelerator, wanted="auto", precision="fp32") == "off"
    assert f"packs cannot be trained on cpu with this model: {reason}" in capsys.readouterr().err
    with pytest.raises(ContrastRMError, match=r"use --packing auto or off"):
        confirm_packing(model, "shared", accelerator, wanted="shared", precision="fp32")


# --- flex attention as it is compiled on a GPU, up to the point where kernels are made


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 5.0), (40, 5.0)])
def test_flex_attention_is_compiled_once_for_all_lengths(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import flex_attention as module

    # Its CPU kernels have no gradients; the graphs of both passes, made before any kernel, are those of a GPU.
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    heads, key_heads, width = 6, 2, 16
    torch._dynamo.reset()
    graphs = []
    # Some packs have as many blocks as there are heads, key heads, numbers in a head: sizes that are equal by chance.
    for n_blocks in (heads, key_heads, width, 5, 9, 3):
        length = n_blocks * attention.FLEX_BLOCK
        sequences = [list(range(length - 100)), [*range(50), *range(5000, 5050)]]
        layout = build_pack(sequences, multiple_of=attention.FLEX_BLOCK).layout
        assert layout.n_tokens == length
        shapes = ((heads, width), (key_heads, width), (key_heads, width))
        query, key, value = (torch.randn(1, n, length, size, requires_grad=True) for n, size in shapes)
        options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap}
        output = attention._flex(query, key, value, layout, compiler="aot_eager", **options)
        expected = attention.packed_attention(query, key, value, layout, backend="dense", **options)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        weights = torch.randn_like(output)
        found = torch.autograd.grad((output * weights).sum(), (query, key, value))
        wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(graphs), "another length was compiled again"


def test_a_process_with_many_kinds_of_attention_keeps_it_compiled() -> None:
    """The compiler's own limit is eight: beyond it, it runs uncompiled without a word and builds the matrix of all pairs."""
    torch._dynamo.reset()
    layout = build_pack([list(range(256))]).layout
    graphs = []
    for heads in range(1, 13):
        query = torch.randn(1, heads, 256, 16)
        attention._flex(query, query, query, layout, scale=0.25, window=None, softcap=None, compiler="aot_eager")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert np.diff(graphs).tolist() == [1] * 11


# --- the scorer


class Narrow(torch.nn.Module):
    """A device that holds no more than some tokens: what a full card does."""

    def __init__(self, model: RewardModel, limit: int, error: Exception | None = None) -> None:
        super().__init__()
        self.model, self.limit = model, limit
        self.error = torch.OutOfMemoryError("out of memory") if error is None else error
        self.seen: list[int] = []

    def enable_packing(self) -> str | None:
        return self.model.enable_packing()

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.numel())
        if input_ids.numel() > self.limit:
            raise self.error
        scores: torch.Tensor = self.model(input_ids, *args, **kwargs)
        return scores


def conversations(n_questions: int, n_answers: int) -> list[Conversation]:
    words = ["red", "mat", "cat", "sat", "why", "dog", "because"]
    return [
        Conversation(
            [{"role": "user", "content": f"why is the {words[q % 7]} {words[q % 5]} on the mat {q}"}],
            " ".join(words[(q + a + step) % 7] for step in range(3 + 4 * a)),
        )
        for q, a in itertools.product(range(n_questions), range(n_answers))
    ]


@pytest.mark.parametrize("packing", ["shared", "packed", "off"])
def test_the_scorer_gives_the_same_scores_in_every_packing(packing: str, tiny_llama_dir: Any) -> None:
    from codes.train.reward_model import load_reward_model

    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    texts = conversations(7, 4)
    alone = [Scorer(model, formatter, packing="off", progress=False).score([text]).scores[0] for text in texts]
    budget = 120
    result = Scorer(model, formatter, packing=packing, max_tokens_per_batch=budget, progress=False).score(texts)
    np.testing.assert_allclose(result.scores, alone, atol=1e-5 * max(1.0, float(np.std(alone))), rtol=0)
    if packing == "shared":
        assert result.n_computed_tokens < 0.8 * result.n_tokens
    elif packing == "packed":
        assert result.n_computed_tokens == result.n_tokens
    else:
        assert result.n_computed_tokens > result.n_tokens


@pytest.mark.parametrize("packing", ["shared", "off"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(packing: str, tiny_llama_dir: Any) -> None:
    from codes.train.reward_model import load_reward_model

    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    texts = conversations(6, 3)
    expected = Scorer(model, formatter, packing="off", progress=False).score(texts).scores
    longest = max(len(text.input_ids) for text in formatter.encode(texts))
    narrow = Narrow(copy.deepcopy(model), limit=2 * longest)
    result = Scorer(narrow, formatter, packing=packing, max_tokens_per_batch=10_000, progress=False).score(texts)
    np.testing.assert_allclose(result.scores, expected, atol=1e-5, rtol=0)
    assert max(narrow.seen) > narrow.limit, "the test did not run out of memory"
    tiny = Narrow(copy.deepcopy(model), limit=longest - 1)
    with pytest.raises(ContrastRMError, match=f"a text of {longest} tokens does not fit into the memory"):
        Scorer(tiny, formatter, packing=packing, progress=False).score(texts)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_has_many_names(error: Exception, tiny_llama_dir: Any) -> None:
    from codes.train.reward_model import load_reward_model

    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    texts = conversations(6, 3)
    expected = Scorer(model, formatter, packing="off", progress=False).score(texts).scores
    narrow = Narrow(model, 2 * max(len(text.input_ids) for text in formatter.encode(texts)), error)
    result = Scorer(narrow, formatter, max_tokens_per_batch=10_000, progress=False).score(texts)
    np.testing.assert_allclose(result.scores, expected, atol=1e-5, rtol=0)
    assert max(narrow.seen) > narrow.limit
    # Any other failure is none of its business.
    broken = Narrow(model, 1, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        Scorer(broken, formatter, packing="off", progress=False).score(texts)


def test_out_of_memory_in_step_with_other_processes_stops_instead_of_halving(tiny_llama_dir: Any) -> None:
    from codes.train.reward_model import load_reward_model

    model, tokenizer = load_reward_model(str(tiny_llama_dir), dtype="float32")
    formatter = ChatFormatter(tokenizer)
    narrow = Narrow(model, limit=10)
    accelerator: Any = SimpleNamespace(num_processes=2, unwrap_model=lambda model: model)
    scorer = Scorer(narrow, formatter, packing="off", progress=False, accelerator=accelerator)
    with pytest.raises(ContrastRMError, match="between the steps: lower --max_tokens_per_batch"):
        scorer.compute(formatter.encode(conversations(6, 3)))
    assert len(narrow.seen) == 1
