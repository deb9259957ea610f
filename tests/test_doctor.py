"""Every check of the doctor passes on a healthy model and fails on a real one that is broken in just this way."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from codes.common.errors import ContrastRMError
from codes.evaluate import doctor, health
from codes.evaluate.health import FAIL, PASS, WARN, Finding, Patient
from codes.train.reward_model import load_reward_model, save_reward_model
from tests.conftest import CHATML, LLAMA3, llama_tokenizer, run_module, save_tiny, spread, tiny_config, train_tokenizer
from tests.test_scoring import bert

CHECKS = [
    "loads, with a head",
    "vocabulary",
    "head precision",
    "pad token",
    "eos token",
    "chat template",
    "BOS",
    "date in the template",
    "generation prompt",
    "pooled token",
    "padding side",
    "batch invariance",
    "packing invariance",
    "dropout off",
    "truncation",
    "save and load",
    "dtype",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def healthy(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as this project saves it."""
    return save_reward_model(*load_reward_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("healthy") / "model")


@pytest.fixture
def sick(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(healthy, tmp_path / "sick"))


def examine(folder: Path, **options: Any) -> dict[str, Finding]:
    findings = health.examine(str(folder), device="cpu", **options)
    assert all(bool(finding.cure) == (finding.status != PASS) for finding in findings)
    return {finding.check: finding for finding in findings}


def status_of(check: Callable[[Patient], Finding], folder: Path, **options: Any) -> tuple[str, str]:
    """Status of one check, and its words."""
    finding = check(health.admit(str(folder), device="cpu", **options))
    assert bool(finding.cure) == (finding.status != PASS)
    return finding.status, f"{finding.found} {finding.cure}"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_template(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def llama_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    config = tiny_config(len(tokenizer), num_labels=1, problem_type="regression", **options)
    return save_tiny(folder, spread(LlamaForSequenceClassification(config)), tokenizer)


# --- healthy models


def test_what_this_project_saves_is_healthy(healthy: Path) -> None:
    findings = examine(healthy)
    assert list(findings) == CHECKS
    assert {check: finding.status for check, finding in findings.items() if finding.status != PASS} == {}


def test_an_encoder_is_healthy(tmp_path: Path) -> None:
    model, tokenizer = bert()
    model.config.problem_type = "regression"
    findings = examine(save_reward_model(model, tokenizer, tmp_path / "encoder"))
    assert list(findings) == CHECKS
    # It takes no packs, and says so. (Its random scores lie close together: bfloat16 may turn a pair.)
    odd = {check: finding.status for check, finding in findings.items() if finding.status != PASS and check != "dtype"}
    assert odd == {"packing invariance": WARN}
    assert "not a decoder" in findings["packing invariance"].found


def test_without_room_for_a_copy_the_doctor_goes_on(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    status, words = status_of(health.check_save, healthy)
    assert status == WARN and "not examined" in words and "set TMPDIR" in words


# --- one broken thing each


def test_no_head(tiny_base_dir: Path) -> None:
    findings = examine(tiny_base_dir)
    assert list(findings) == ["loads, with a head"] and findings["loads, with a head"].status == FAIL
    assert "train it first" in findings["loads, with a head"].found


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "not finite"), (0.0, "same score")])
def test_a_head_that_is_no_head(value: float, found: str, sick: Path) -> None:
    edit_weights(sick, lambda weights: weights["score.weight"].fill_(value))
    findings = examine(sick)
    assert findings["loads, with a head"].status == FAIL and found in findings["loads, with a head"].found
    assert list(findings) == CHECKS[:2]  # nothing can be scored


def test_a_pipeline_would_apply_a_sigmoid(sick: Path) -> None:
    edit_json(sick / "config.json", problem_type=None)
    status, words = status_of(health.check_head, sick)
    assert status == WARN and "sigmoid" in words


def test_a_tokenizer_of_another_model(sick: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sick)
    tokenizer.add_tokens([f"word{number}" for number in range(50)])
    tokenizer.save_pretrained(sick)
    [finding] = examine(sick).values()
    assert finding.status == FAIL and "'word" in finding.found and "no embedding for" in finding.found


def test_a_pad_token_without_embedding(sick: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sick)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(sick)
    status, words = status_of(health.check_vocabulary, sick)
    assert status == FAIL and "plain transformers cannot load it" in words


def test_a_head_that_is_rounded_on_loading(sick: Path) -> None:
    edit_json(sick / "config.json", dtype="bfloat16")
    status, words = status_of(health.check_head_precision, sick)
    assert status == FAIL and "saved as float32" in words and 'set "dtype": "float32"' in words


def test_pad_tokens(tiny_qwen_dir: Path, tmp_path: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    no_newline = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    assert no_newline != CHATML
    tokenizer = train_tokenizer(special, no_newline, bos=None, eos="<|im_end|>", pad="<|im_end|>")
    closing = llama_folder(tmp_path / "closing", tokenizer, pad_token_id=tokenizer.pad_token_id)
    absent = llama_folder(tmp_path / "absent", llama_tokenizer(pad=None), pad_token_id=None)
    for folder, pad, pooled in [
        # Plain transformers reads another token, even of a lone text.
        (closing, "also ends a conversation", "of a lone text"),
        (absent, "the tokenizer has none", "plain transformers refuses"),
        (tiny_qwen_dir, "config.json says", "in a padded batch"),
    ]:
        for check, expected in ((health.check_pad, pad), (health.check_pooled_token, pooled)):
            status, words = status_of(check, folder)
            assert status == FAIL and expected in words


def test_eos_tokens(sick: Path) -> None:
    edit_json(sick / "config.json", eos_token_id=100_000)
    assert status_of(health.check_eos, sick)[0] == FAIL
    edit_json(sick / "config.json", eos_token_id=0)
    assert status_of(health.check_eos, sick)[0] == WARN
    edit_template(sick, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    edit_json(sick / "config.json", eos_token_id=AutoTokenizer.from_pretrained(sick).eos_token_id)
    status, words = status_of(health.check_eos, sick)
    assert status == WARN and "closes a turn with nothing" in words


def test_a_doubled_and_a_missing_bos(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer(pad="<|end_of_text|>")
    folder = llama_folder(tmp_path / "llama", tokenizer, pad_token_id=tokenizer.pad_token_id)
    status, words = status_of(health.check_bos, folder)
    assert status == PASS and "add_special_tokens=False" in words
    edit_template(folder, "{{ bos_token }}" + LLAMA3)
    assert status_of(health.check_bos, folder)[0] == FAIL
    edit_template(folder, LLAMA3.replace("{{ bos_token }}", ""))
    assert status_of(health.check_bos, folder)[0] == WARN


def test_a_template_with_a_date(sick: Path) -> None:
    assert status_of(health.check_date, sick)[0] == PASS
    pinnable = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    edit_template(sick, pinnable + "{{ 'Today is ' + date_string }}" + CHATML)
    status, words = status_of(health.check_date, sick)
    assert status == WARN and "this project pins it" in words
    edit_template(sick, "{{ 'Today is ' + strftime_now('%d %b %Y') }}" + CHATML)
    assert status_of(health.check_date, sick)[0] == FAIL


@pytest.mark.parametrize(
    ("template", "status"),
    [
        (CHATML, PASS),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), FAIL),
        ("{% for m in messages %}{{ m['content'] + ' <|im_end|> ' }}{% endfor %}", PASS),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant:' }}", FAIL),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
            PASS,
        ),
    ],
)
def test_a_generation_prompt_that_was_left_in(template: str, status: str, sick: Path) -> None:
    edit_template(sick, template)
    assert status_of(health.check_generation_prompt, sick)[0] == status


def test_padding_at_the_left_of_learned_positions(tmp_path: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    tokenizer = train_tokenizer(special, CHATML, bos=None, eos="<|im_end|>", pad="<|pad|>")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512, num_labels=1)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 3, None, 2
    folder = save_tiny(tmp_path / "gpt2", spread(GPT2ForSequenceClassification(config)), tokenizer)
    status, words = status_of(health.check_padding_side, folder)
    assert status == PASS and "scores differently when padded at the left" in words
    edit_json(folder / "tokenizer_config.json", padding_side="left")
    status, words = status_of(health.check_padding_side, folder)
    assert status == FAIL and '"padding_side": "right"' in words


BROKEN_CODE = """
import torch
from transformers import LlamaForSequenceClassification, LlamaModel


class BrokenModel(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        hidden = output.last_hidden_state
        if self.config.fault == "dropout":
            hidden = torch.nn.functional.dropout(hidden, 0.3, training=self.training)
        if self.config.fault == "batch":
            hidden = hidden - hidden.mean(dim=(0, 1), keepdim=True)
        if self.config.fault == "left" and attention_mask is not None and attention_mask.ndim == 2:
            hidden = hidden + attention_mask[:, :1, None]
        if self.config.fault == "long row" and hidden.shape[0] == 1 and hidden.shape[1] > 600:
            hidden = hidden + 1.0
        output.last_hidden_state = hidden
        return output


class Broken(LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.model = BrokenModel(config)
        if config.fault == "unsaved head":
            self._keys_to_ignore_on_save = ["score.weight"]
        self.post_init()
"""


@pytest.mark.parametrize(
    ("fault", "check", "found"),
    [
        ("none", None, ""),
        ("dropout", "dropout off", "change from pass to pass"),
        ("batch", "batch invariance", "depend on the batch"),
        ("left", "padding side", "padded at the left scores differently"),
        ("long row", "packing invariance", "--packing shared"),
        ("unsaved head", "save and load", "a saved copy does not load"),
    ],
)
def test_faults_in_a_models_own_code(fault: str, check: str | None, found: str, sick: Path) -> None:
    (sick / "broken_code.py").write_text(BROKEN_CODE)
    edit_json(sick / "config.json", fault=fault, auto_map={"AutoModelForSequenceClassification": "broken_code.Broken"})
    findings = examine(sick, trust_remote_code=True)
    failed = {name: finding.found for name, finding in findings.items() if finding.status == FAIL}
    if check is None:
        assert failed == {}
    else:
        assert found in failed[check]


def test_a_model_that_bfloat16_ruins(sick: Path) -> None:
    def hide_what_tells_texts_apart(weights: dict[str, torch.Tensor]) -> None:
        # All texts end with the same token: what earlier ones add to it is below the last digit of bfloat16.
        for name in weights:
            if "o_proj" in name:
                weights[name] *= 1e-4

    edit_weights(sick, hide_what_tells_texts_apart)
    status, words = status_of(health.check_dtype, sick)
    assert status == FAIL and "--dtype float32" in words


def test_a_limit_that_cuts_answers(sick: Path, write_rows: Callable[..., Path]) -> None:
    def check(patient: Patient) -> Finding:
        return health.check_length(patient, str(data))

    data = Path("nowhere")
    for policy, expected in (("left", "lose a part"), ("drop", "are dropped"), ("error", "is longer than max_length")):
        status, words = status_of(check, sick, max_length=60, overlength=policy)
        assert status == FAIL and expected in words
    row = {
        "question": "why is the cat on the mat and why is it red because it sat on a mat " * 3,
        "original_response1": "a cat",
        "original_response2": "the mat",
        "rewritten_response1": "a red cat",
        "rewritten_response2": "the red mat",
        "label": "response1",
    }
    data = write_rows("length_bias.jsonl", [row]).parent
    assert status_of(check, sick)[0] == PASS
    n_tokens = len(health.admit(str(sick), device="cpu").formatter.tokenizer(row["question"])["input_ids"])
    status, words = status_of(check, sick, max_length=n_tokens)
    assert status == WARN and "4 of 4 texts of" in words and "0 lose" in words
    # With so little room not even the examination itself has texts.
    with pytest.raises(ContrastRMError, match="cuts nearly every short text"):
        _ = health.admit(str(sick), device="cpu", max_length=20).texts


# --- the command


def test_the_command(healthy: Path, sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--device", "cpu", "--data_dir", "nowhere"]
    assert doctor.main([str(healthy), *usual]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"{len(CHECKS)} pass, 0 warn, 0 fail\n") and "cure" not in printed
    edit_json(sick / "config.json", pad_token_id=5)
    assert doctor.main([str(sick), *usual]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  pad token" in printed and 'cure: set "pad_token_id"' in printed
    assert doctor.main([str(sick), *usual, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [check["check"] for check in found["checks"]] == CHECKS
    assert {check["status"] for check in found["checks"]} == {PASS, FAIL}


def test_an_adapter_alone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    [finding] = examine(tmp_path).values()
    assert finding.status == FAIL and "examine the merged model" in finding.found


def test_a_model_that_is_not_there_is_one_line() -> None:
    done = run_module("codes.evaluate.doctor", "output/nowhere", "--device", "cpu")
    assert done.returncode == 1 and "FAIL  loads, with a head" in done.stdout and "not found" in done.stdout
    assert "Traceback" not in done.stderr
