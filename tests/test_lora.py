"""LoRA: what is trained, packs, resume, and that the merged folder, peft and our loader give one score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, LlamaForCausalLM

from codes.common.chat import ChatFormatter
from codes.common.errors import ContrastRMError
from codes.common.packing import build_pack
from codes.common.scoring import Scorer
from codes.train.engine import make_optimizer
from codes.train.lora import LoraSettings
from codes.train.reward_model import RewardModel, load_reward_model, save_reward_model
from codes.train.settings import OptimizerSettings
from codes.train.token_budget import PLANNED_SHARE, activation_bytes_per_token, choose_token_budget, state_bytes
from tests.conftest import chatml_tokenizer, llama_tokenizer, save_tiny, tiny_config
from tests.test_reward_model import CONVERSATIONS, save_bert
from tests.test_training import assert_same_weights, losses, train_here, weights

LORA = ("--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


def settings(folder: Path, **changed: Any) -> LoraSettings:
    options = {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "merge": True,
        "base_model": str(folder),
        "seed": 1,
    } | changed
    return LoraSettings(**options)


def with_lora(folder: Path, *, dtype: str = "float32", **changed: Any) -> RewardModel:
    """A model whose adapter changes its scores: peft starts with one factor at zero."""
    model, _ = load_reward_model(str(folder), dtype=dtype, require_head=False)
    model.add_lora(settings(folder, **changed))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def scores_of(model: RewardModel, tokenizer: Any) -> torch.Tensor:
    return torch.from_numpy(Scorer(model, ChatFormatter(tokenizer), progress=False).score(CONVERSATIONS).scores)


def plain_scores(classifier: Any, tokenizer: Any) -> torch.Tensor:
    """As a stranger does it: one text at a time, no code of ours."""
    found = []
    for conversation in CONVERSATIONS:
        text = tokenizer.apply_chat_template(conversation.turns(), tokenize=False)
        with torch.inference_mode():
            batch = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
            found.append(classifier.eval()(**batch).logits[0, 0])
    return torch.stack(found)


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_only_the_adapter_and_the_head_are_trained_and_have_masters(tiny_base_dir: Path) -> None:
    model = with_lora(tiny_base_dir, dtype="bfloat16")
    names = trained_names(model)
    assert all("lora_" in name or ".score." in name for name in names)
    # Two layers of seven projections, two factors each, and the head.
    assert len(names) == 2 * 7 * 2 + 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-3), master_weights=True)
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(masters) == len(names) and {master.dtype for master in masters} == {torch.float32}
    # Seeded: every rank of a run starts with the same adapter.
    first, again = with_lora(tiny_base_dir), with_lora(tiny_base_dir)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    only = with_lora(tiny_base_dir, target_modules="q_proj, v_proj")
    assert len(trained_names(only)) == 2 * 2 * 2 + 1


def test_packs_under_lora_give_the_scores_and_gradients_of_single_texts(tiny_base_dir: Path) -> None:
    texts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, *tail] for tail in ([1, 2], [3], [4, 5, 6, 7], [1, 9])]
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for how in ("packed", "alone", "checkpointed"):
        model = with_lora(tiny_base_dir).double()
        assert model.enable_packing() is None
        model.train()
        if how == "checkpointed":
            model.gradient_checkpointing_enable()
        if how == "alone":
            scores = torch.cat([model(torch.tensor([ids]), torch.ones(1, len(ids))) for ids in texts])
        else:
            pack = build_pack(texts)
            scores = model(pack.input_ids, layout=pack.layout, ends=pack.ends)
        (scores * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        found[how] = scores.detach()
        gradients[how] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert sorted(gradients[how]) == sorted(trained_names(model))
    for how in ("packed", "checkpointed"):
        torch.testing.assert_close(found[how], found["alone"], atol=1e-9, rtol=0)
        for name, gradient in gradients[how].items():
            assert gradient.abs().max() > 0
            # The model's norms compute in float32 even here.
            size = float(gradients["alone"][name].abs().max())
            torch.testing.assert_close(gradient, gradients["alone"][name], atol=1e-5 * size, rtol=0)


def test_merged_folder_peft_and_our_loader_agree(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = train_here(tiny_base_dir, train_file, out, *LORA, "--global_batch_size", "5", "--epochs", "4")
    assert losses(log)[-1] < 0.8 * losses(log)[0]
    model, tokenizer = load_reward_model(str(out))
    expected = scores_of(model, tokenizer)
    assert expected.std() > 0.05
    from_adapter, own_tokenizer = load_reward_model(str(out / "adapter"))
    torch.testing.assert_close(scores_of(from_adapter, own_tokenizer), expected, atol=1e-5, rtol=0)
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(plain_scores(merged, tokenizer), expected.float(), atol=1e-5, rtol=0)
    automatic = AutoPeftModelForSequenceClassification.from_pretrained(out / "adapter", num_labels=1)
    theirs = AutoTokenizer.from_pretrained(out / "adapter")
    automatic.config.pad_token_id = theirs.pad_token_id
    torch.testing.assert_close(plain_scores(automatic, theirs), expected.float(), atol=1e-5, rtol=0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base_dir, num_labels=1)
    by_hand = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(plain_scores(by_hand, theirs), expected.float(), atol=1e-5, rtol=0)
    # What has no adapter is the base model's; what has one is not.
    before, after = load_file(tiny_base_dir / "model.safetensors"), weights(out)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert not any("lora" in name for name in after)
    # The adapter's own weights: two factors of 14 layers, and the head.
    assert len(load_file(out / "adapter" / "adapter_model.safetensors")) == 29


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_with_lora_equals_the_whole_one(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path, precision: str
) -> None:
    # Dropout draws at random: a resume that forgets where the generator was goes another way.
    extra = (*LORA, "--lora_dropout", "0.2", "--global_batch_size", "5", "--epochs", "3", "--precision", precision)
    whole = train_here(tiny_base_dir, train_file, tmp_path / "whole", *extra, "--save_steps", "4")
    out = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", out / "checkpoint-4")
    # Frozen weights are the base model's, at every resume.
    assert len(load_file(out / "checkpoint-4" / "model.safetensors")) == 29
    resumed = train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto")
    assert losses(resumed) == losses(whole)
    assert_same_weights(tmp_path / "whole", out, 0.0)
    with pytest.raises(ContrastRMError, match="belongs to another run .*lora"):
        train_here(tiny_base_dir, train_file, out, *extra, "--resume", "auto", "--lora_rank", "8")


def test_an_adapters_checkpoint_goes_on_with_its_own_base_model_only(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_dir, base)
    extra = (*LORA, "--global_batch_size", "5", "--save_steps", "1")
    train_here(base, train_file, tmp_path / "out", *extra)
    (tmp_path / "out" / "train_summary.json").unlink()
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContrastRMError, match=r"checkpoint-\d belongs to another run \(frozen "):
        train_here(base, train_file, tmp_path / "out", *extra, "--resume", "auto")


def test_bfloat16_merge_is_the_adapter_up_to_rounding(tiny_base_dir: Path, tmp_path: Path) -> None:
    model = with_lora(tiny_base_dir, dtype="bfloat16")
    _, tokenizer = load_reward_model(str(tiny_base_dir), require_head=False)
    before = scores_of(model, tokenizer)
    running = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_reward_model(model, tokenizer, tmp_path / "out")
    # Saving merges a copy: the run goes on with what it had.
    assert all(torch.equal(running[name], tensor) for name, tensor in model.state_dict().items())
    merged, _ = load_reward_model(str(tmp_path / "out"))
    assert next(merged.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(scores_of(merged, tokenizer), before, atol=0.05 * float(before.std()), rtol=0.05)


def test_the_adapter_alone_is_saved_on_request(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    extra = (*LORA, "--global_batch_size", "10", "--epochs", "1")
    train_here(tiny_base_dir, train_file, tmp_path / "both", *extra)
    train_here(tiny_base_dir, train_file, tmp_path / "alone", *extra, "--merge_lora", "0")
    names = {file.name for file in (tmp_path / "alone").iterdir()}
    assert "adapter" in names and not names & {"config.json", "model.safetensors"}
    assert 'load_reward_model("FOLDER/adapter")' in (tmp_path / "alone" / "README.md").read_text()
    model, tokenizer = load_reward_model(str(tmp_path / "alone" / "adapter"))
    merged, _ = load_reward_model(str(tmp_path / "both"))
    torch.testing.assert_close(scores_of(model, tokenizer), scores_of(merged, tokenizer), atol=1e-5, rtol=0)
    # A later full training can start from it; a second adapter cannot.
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapter = tmp_path / "alone" / "adapter"
    train_here(adapter, train_file, tmp_path / "again", "--global_batch_size", "10", "--epochs", "1")
    assert load_reward_model(str(tmp_path / "again"))[0].lora is None
    with pytest.raises(ContrastRMError, match="is an adapter, and an adapter on an adapter"):
        train_here(adapter, train_file, tmp_path / "third", *extra)


def test_a_tokenizer_without_a_pad_token_gets_one_with_lora(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    torch.manual_seed(1)
    base = save_tiny(tmp_path / "base", LlamaForCausalLM(tiny_config(len(tokenizer))), tokenizer)
    model = with_lora(base)
    _, loaded = load_reward_model(str(base), require_head=False)
    save_reward_model(model, loaded, tmp_path / "out")
    expected = scores_of(model, loaded)
    for folder in (tmp_path / "out", tmp_path / "out" / "adapter"):
        again, own = load_reward_model(str(folder))
        assert own.pad_token_id == len(tokenizer)
        torch.testing.assert_close(scores_of(again, own), expected, atol=1e-5, rtol=0)


def test_an_encoder_trains_its_whole_head_with_lora(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert", BertModel)
    model = with_lora(base)
    names = trained_names(model)
    assert any("pooler" in name and "lora" not in name for name in names)
    assert not any("pooler" in name and "lora" in name for name in names)
    _, tokenizer = load_reward_model(str(base), require_head=False)
    expected = scores_of(model, tokenizer)
    save_reward_model(model, tokenizer, tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / "adapter"):
        again, own = load_reward_model(str(folder))
        torch.testing.assert_close(scores_of(again, own), expected, atol=1e-5, rtol=0)


# --- what is refused


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_an_adapter_that_was_trained_with_more_tokens_brings_their_embeddings(
    targets: list[str], tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    # As peft and TRL do it: tokens added, the model resized, the adapter and its tokenizer saved.
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir)
    tokenizer.add_tokens(["wordy", "[PAD]"])
    tokenizer.pad_token = "[PAD]"
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base_dir, num_labels=1)
    classifier.resize_token_embeddings(len(tokenizer))
    classifier.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(classifier, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model, loaded = load_reward_model(str(tmp_path / "adapter"))
    texts = ["a wordy cat", "red"]
    batch = loaded(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert loaded.convert_tokens_to_ids("wordy") in batch["input_ids"]
    expected = adapted.eval()(**batch).logits.squeeze(-1)
    torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"]), expected, atol=1e-5, rtol=0)
    train_here(tmp_path / "adapter", train_file, tmp_path / "out", "--max_steps", "1")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_adapters_that_cannot_score_are_refused(tiny_base_dir: Path, tmp_path: Path) -> None:
    model = with_lora(tiny_base_dir)
    save_reward_model(model, chatml_tokenizer(), tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"

    def refused(words: str, change: Callable[[Path], None]) -> None:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(adapter, broken)
        change(broken)
        with pytest.raises(ContrastRMError, match=words) as caught:
            load_reward_model(str(broken))
        assert "\n" not in str(caught.value)

    def without_head(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: t for name, t in load_file(file).items() if "score" not in name}, file)

    def edited(**fields: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | fields))

        return change

    refused(r"saved without its score head \(score missing\)", without_head)
    refused("model folder not found", edited(base_model_name_or_path="/absent/base"))
    refused("names no base model", edited(base_model_name_or_path=None))
    refused("does not fit its base model", edited(r=8))
    refused("cannot read .*adapter_model", lambda folder: (folder / "adapter_model.safetensors").unlink())
    refused("cannot read .*adapter_config", lambda folder: (folder / "adapter_config.json").write_text("{"))


def test_unknown_target_modules_are_named(tiny_base_dir: Path) -> None:
    for wanted, words in (("q_proj,qkv", "no linear layer qkv; it has down_proj, gate_proj"), (",", "of no name")):
        with pytest.raises(ContrastRMError, match=words):
            with_lora(tiny_base_dir, target_modules=wanted)
    with pytest.raises(ContrastRMError, match="no linear layer score"):
        with_lora(tiny_base_dir, target_modules="score")


# --- memory


def test_the_memory_estimate_knows_what_is_frozen(tiny_base_dir: Path) -> None:
    seven, adapter = 7_600_000_000, 40_000_000
    options: dict[str, Any] = {"precision": "bf16", "n_trained": adapter}
    single = state_bytes(seven, zero_stage=None, world_size=1, **options)
    assert single == 18 * adapter + 2 * (seven - adapter)
    assert state_bytes(seven, zero_stage=2, world_size=8, **options) == 2 * seven + 14 * adapter / 8
    three = state_bytes(seven, zero_stage=3, world_size=8, **options)
    assert three == (2 * seven + 14 * adapter) / 8 + 2 * 10**9
    assert state_bytes(seven, zero_stage=3, world_size=8, offload={"optimizer", "param"}, **options) < three
    model = with_lora(tiny_base_dir)
    full, _ = load_reward_model(str(tiny_base_dir), dtype="float32", require_head=False)
    card = torch.device("cuda")
    needs = {}
    for name, one in (("lora", model), ("full", full)):
        assert one.enable_packing() is None
        trained = sum(parameter.numel() for parameter in one.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in one.parameters())
        needs[name] = state_bytes(total, zero_stage=None, precision="fp32", world_size=1, n_trained=trained)
        needs[name] += 300 * activation_bytes_per_token(one, gradient_checkpointing=True)
    options = {"precision": "fp32", "world_size": 1, "gradient_checkpointing": True}
    # A card that holds 300 tokens beside the adapter's state does not hold the state of all weights.
    assert needs["lora"] < needs["full"]
    options["memory"] = int(needs["lora"] / PLANNED_SHARE) + 1
    assert 256 <= choose_token_budget(model, card, **options) <= 310
    with pytest.raises(ContrastRMError, match="--lora_rank 16"):
        choose_token_budget(full, card, **options)
