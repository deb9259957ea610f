"""Fused kernels: the same scores and gradients, or the model as it was.

The kernels of liger-kernel run on a GPU, or without one in Triton's interpreter, where both packages are installed
(``pip install --no-deps liger-kernel triton``); a small stand-in of the package shows the rest anywhere.
Run: ``TRITON_INTERPRET=1 python -m pytest tests/test_fused.py``
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

from codes.common import fused
from codes.common.errors import ContrastRMError
from codes.common.fused import ARCHITECTURES, remember_modules, resolve_fused_kernels
from codes.common.packing import build_pack
from codes.evaluate.scorer_setup import load_scorer, making_of_scores
from codes.train.lora import lora_settings
from codes.train.reward_model import RewardModel
from tests.conftest import REPO_ROOT, SMALL_DECODER

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 20, 21], [5, 6, 7, 8, 9, 30, 31, 32, 33], [40]]


def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> RewardModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SMALL_DECODER | {"num_hidden_layers": 3, "head_dim": 8} | options)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Ones and zeros would hide a wrong weight.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(DEVICE)


def padded(model: RewardModel, sequences: list[list[int]] = SEQUENCES) -> torch.Tensor:
    longest = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=DEVICE)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences], device=DEVICE)
    return model(ids, mask)


def packed(model: RewardModel) -> torch.Tensor:
    pack = build_pack(SEQUENCES, min_shared=2, multiple_of=128 if DEVICE.type == "cuda" else 1).to(DEVICE)
    return model(pack.input_ids, layout=pack.layout, ends=pack.ends)


def gradients(model: RewardModel, scores: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.arange(1, len(scores) + 1, device=DEVICE) / 3
    return list(torch.autograd.grad((scores * weights).sum(), list(model.parameters())))


def assert_close(found: torch.Tensor, expected: torch.Tensor, largest: float, limit: float = 1e-4) -> None:
    # A key's bias has no gradient but rounding.
    scale = max(float(expected.detach().norm()), 0.01 * largest)
    assert float((found - expected).detach().norm()) <= limit * scale


def contents(model: torch.nn.Module) -> list[tuple[type, dict[str, Any]]]:
    return [(type(module), {n: v for n, v in vars(module).items() if n[0] != "_"}) for module in model.modules()]


def modeling_code() -> dict[tuple[str, str], Any]:
    names = [name for name in sys.modules if ".modeling_" in name and name.startswith("transformers.models.")]
    return {(name, key): value for name in names for key, value in vars(sys.modules[name]).items()}


# --- the kernels themselves


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernels, on the GPU or interpreted."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        pytest.skip("liger-kernel and triton are not installed (pip install --no-deps liger-kernel triton)")
    if DEVICE.type == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU the kernels need Triton's interpreter (TRITON_INTERPRET=1)")
    triton = importlib.import_module("triton")
    tl, interpreter = triton.language, importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt

    # What the interpreter (3.9) does not do: numbers given to a kernel are float32, and libdevice has bodies.
    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        import numpy as np

        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    ops = {name: importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "geglu")}
    monkeypatch.setattr(ops["rms_norm"], "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(ops["geglu"], "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_and_gradients_are_those_without_kernels(kind: str, kernels: None) -> None:
    model = build(kind)
    assert model.enable_packing() is None
    code, names = modeling_code(), list(model.state_dict())
    plain = copy.deepcopy(model)
    expected = {compute: compute(plain) for compute in (padded, packed)}
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    parts = [model.backbone.norm, *(layer.mlp for layer in model.backbone.layers)]
    parts += [layer.post_attention_layernorm for layer in model.backbone.layers]
    assert all("forward" in vars(part) for part in parts)
    assert list(model.state_dict()) == names
    assert all(modeling_code()[key] is value for key, value in code.items())
    for compute, scores in expected.items():
        found = compute(model)
        assert_close(found, scores, 0.0)
        theirs = gradients(plain, scores)
        largest = max(float(gradient.norm()) for gradient in theirs)
        for one, other in zip(gradients(model, found), theirs, strict=True):
            assert_close(one, other, largest)
    # A score knows nothing of its company.
    alone = torch.cat([padded(model, [row]) for row in SEQUENCES])
    torch.testing.assert_close(alone, padded(model), atol=1e-5, rtol=1e-5)


def test_half_precision_and_checkpointing(kernels: None) -> None:
    # The interpreter computes in numpy, which has no bfloat16.
    model = build("llama", torch.bfloat16 if DEVICE.type == "cuda" else torch.float16)
    scores = padded(model)
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    assert_close(padded(model), scores, 0.0, 0.05)
    model = build("qwen3")
    expected = gradients(model, padded(model))
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    model.gradient_checkpointing_enable()
    model.train()
    largest = max(float(gradient.norm()) for gradient in expected)
    for one, other in zip(gradients(model, padded(model)), expected, strict=True):
        assert_close(one, other, largest)


def test_float32_weights_under_autocast(kernels: None) -> None:
    model = build("qwen3")
    plain = copy.deepcopy(model)
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        found, expected = padded(model), padded(plain)
        theirs = gradients(plain, expected)
        largest = max(float(gradient.norm()) for gradient in theirs)
        for one, other in zip([found, *gradients(model, found)], [expected, *theirs], strict=True):
            assert_close(one, other, largest, 0.02)


def test_an_adapter_trains_alike(kernels: None) -> None:
    model = build("qwen2")
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "merge": True}
    model.add_lora(lora_settings(**settings, base_model="base", seed=1))
    plain, names = copy.deepcopy(model), list(model.state_dict())
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    assert list(model.state_dict()) == names
    found, expected = (
        torch.autograd.grad(padded(one).sum(), [weight for weight in one.parameters() if weight.requires_grad])
        for one in (model, plain)
    )
    largest = max(float(gradient.norm()) for gradient in expected)
    assert largest > 0
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, largest)


def test_a_saved_model_is_a_plain_one(kernels: None, tmp_path: Path) -> None:
    model = build("llama")
    scores = padded(model)
    assert model.enable_fused_kernels(DEVICE, gradients=False) is None
    model.classifier.save_pretrained(tmp_path)
    again = RewardModel(AutoModelForSequenceClassification.from_pretrained(tmp_path)).eval().to(DEVICE)
    assert not any("forward" in vars(module) for module in again.modules())
    torch.testing.assert_close(padded(again), scores, atol=0, rtol=0)


def test_kernels_that_cannot_run_leave_no_trace() -> None:
    """The real kernels on the CPU without the interpreter."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        pytest.skip("liger-kernel and triton are not installed (pip install --no-deps liger-kernel triton)")
    code = (
        "from tests.test_fused import *\n"
        "model = build('qwen2').to('cpu'); before = contents(model)\n"
        "ids, mask = torch.tensor(SEQUENCES[:1]), torch.ones(1, 7)\n"
        "scores = model(ids, mask)\n"
        "print(model.enable_fused_kernels(CPU, gradients=True))\n"
        "assert contents(model) == before and torch.equal(model(ids, mask), scores)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("a probe fails in them: ")


# --- what is around them, with a stand-in of the package

STAND_IN = """
import torch
from transformers.models.llama import modeling_llama

def norm(self, x):
    return {norm}

def _apply_liger_kernel_to_instance(model, rope=True, cross_entropy=True, fused_linear_cross_entropy=True):
    assert not (rope or cross_entropy or fused_linear_cross_entropy)
    modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = None
    for module in [model.norm, *(layer.input_layernorm for layer in model.layers)]:
        module.offset, module.row_mode = 0.0, None
        module.forward = norm.__get__(module, type(module))
{last}
"""
RIGHT = "self.weight * torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)"
# The same values with gradients that are off.
WRONG_GRADIENT = f"(lambda y: y.detach() + 0.9 * (y - y.detach()))({RIGHT})"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def install(norm: str = RIGHT, last: str = "") -> None:
        package = tmp_path / "liger_kernel" / "transformers"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").write_text(STAND_IN.format(norm=norm, last=last))
        record = tmp_path / "liger_kernel-0.0.7.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.0.7\n")
        for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in ("liger_kernel.transformers", "liger_kernel"):
        sys.modules.pop(name, None)


def test_right_kernels_stay(stand_in: Callable[..., None]) -> None:
    stand_in()
    model, code = build("llama"), modeling_code()
    scores = padded(model)
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    assert "forward" in vars(model.backbone.layers[2].input_layernorm)
    assert len(model.backbone.layers) == 3
    torch.testing.assert_close(padded(model), scores)
    assert all(modeling_code()[key] is value for key, value in code.items())
    # What was probed is what large batches get.
    assert model.backbone.norm.row_mode is True
    assert fused.kernels_version().startswith("liger-kernel 0.0.7, triton")


def test_the_dropout_of_an_adapter_is_no_difference(stand_in: Callable[..., None]) -> None:
    stand_in()
    model = build("llama")
    settings = {"rank": 4, "alpha": 8, "dropout": 0.5, "target_modules": "all-linear", "merge": True}
    model.add_lora(lora_settings(**settings, base_model="base", seed=1))
    model.train()
    modes = [module.training for module in model.modules()]
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in model.modules())
    assert model.enable_fused_kernels(DEVICE, gradients=True) is None
    assert [module.training for module in model.modules()] == modes


def test_a_package_without_kernels_for_a_model_is_not_in_use(stand_in: Callable[..., None]) -> None:
    stand_in(last="    for module in model.modules(): vars(module).pop('forward', None)")
    assert build("llama").enable_fused_kernels(DEVICE, gradients=True) == (
        "a probe fails in them: the installed liger-kernel has none for it"
    )


def test_a_probe_gives_back_the_very_weights() -> None:
    backbone = build("llama").backbone.to(CPU)
    before = {name: tensor.data_ptr() for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]}
    with pytest.raises(KeyboardInterrupt), fused.few_layers_on(backbone, torch.device("meta")) as few:
        assert len(few.layers) == 3 and all(weight.is_meta for weight in few.parameters())
        raise KeyboardInterrupt
    after = {name: tensor.data_ptr() for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]}
    assert after == before and 0 not in before.values()


@pytest.mark.parametrize(
    ("norm", "last", "with_gradients", "reason"),
    [
        (f"1.01 * {RIGHT}", "", False, r"a probe differs .*relative error \d"),
        (f"x * float('nan') + {RIGHT}", "", False, "relative error inf"),
        (WRONG_GRADIENT, "", True, r"a probe differs .*relative error \d"),
        (WRONG_GRADIENT, "", False, None),
        ("x * (1 / 0)", "", False, "a probe fails in them: "),
        ("torch.ones(2) @ torch.ones(3)", "", False, "a probe fails in them: "),
        (RIGHT, "    model.layers[1].mlp.down_proj.extra = 1\n    raise ImportError('no triton')", True, "no triton"),
        (RIGHT, "    model.layers[2].mlp = torch.nn.Identity()", False, "a probe"),
        (RIGHT, "    model.layers[0].mlp.__class__ = torch.nn.Identity", False, "a probe"),
    ],
)
def test_wrong_kernels_are_taken_out(
    norm: str, last: str, with_gradients: bool, reason: str | None, stand_in: Callable[..., None]
) -> None:
    stand_in(norm, last)
    model, code = build("llama"), modeling_code()
    before, scores = contents(model), padded(model)
    found = model.enable_fused_kernels(DEVICE, gradients=with_gradients)
    assert all(modeling_code()[key] is value for key, value in code.items())
    if reason is None:
        assert found is None
        return
    assert found is not None
    assert re.search(reason, found)
    assert contents(model) == before
    assert torch.equal(padded(model), scores)


def test_an_interruption_takes_them_out_too(stand_in: Callable[..., None]) -> None:
    stand_in(RIGHT, "    raise KeyboardInterrupt")
    model = build("llama")
    before = contents(model)
    with pytest.raises(KeyboardInterrupt):
        model.enable_fused_kernels(DEVICE, gradients=True)
    assert contents(model) == before


def test_only_known_decoders_get_them(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in()
    cuda = torch.device("cuda")
    encoder = RewardModel(
        AutoModelForSequenceClassification.from_config(
            BertConfig(num_labels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        )
    )
    for model, reason in (
        (encoder, "it is not a decoder with a score head"),
        (build("qwen2_moe"), "they are not tested with Qwen2MoeModel"),
        (build("llama", hidden_act="relu"), "they do not compute its activation relu"),
    ):
        assert resolve_fused_kernels(model, "auto", cuda, gradients=True) == "off"
        note = "note: the fused kernels of liger-kernel are not used with this model: "
        assert capsys.readouterr().err == note + reason + "\n"
    assert "liger_kernel" not in sys.modules
    with pytest.raises(ContrastRMError, match="unknown --fused_kernels 'on'"):
        resolve_fused_kernels(encoder, "on", cuda, gradients=True)


def test_nothing_is_said_or_imported_where_they_are_not_meant(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(last="    raise ValueError('must not be called')")
    model = build("llama")
    before = contents(model)
    assert resolve_fused_kernels(model, "auto", CPU, gradients=True) == "off"
    assert resolve_fused_kernels(model, "off", torch.device("cuda"), gradients=True) == "off"
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert fused.kernels_version() is None
    assert resolve_fused_kernels(model, "auto", torch.device("cuda"), gradients=True) == "off"
    assert contents(model) == before
    assert capsys.readouterr() == ("", "")
    assert "liger_kernel" not in sys.modules


def test_results_and_stored_scores_name_them(tiny_llama_dir: Path) -> None:
    loaded = load_scorer(model_path=str(tiny_llama_dir), device="cpu")
    assert loaded.description["fused_kernels"] == "off"
    model = loaded.scorer.model  # type: ignore[attr-defined]
    plain = making_of_scores(model, loaded.description)
    others = {
        version: making_of_scores(model, loaded.description | {"fused_kernels": f"liger-kernel {version}"})
        for version in ("0.8.4", "0.8.5")
    }
    assert plain != others["0.8.4"] != others["0.8.5"] != plain


def test_restoring_gives_back_the_very_tensors() -> None:
    model = build("llama").backbone
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    restore = remember_modules(model)
    model.register_buffer("another", torch.zeros(1))
    model.rotary_emb.inv_freq = torch.zeros(4)
    del model.layers[1].mlp.gate_proj.weight
    model.layers[0].register_forward_hook(lambda *_: None)
    restore()
    found = dict(model.named_buffers()) | dict(model.named_parameters())
    assert found.keys() == tensors.keys()
    assert all(found[name] is tensor for name, tensor in tensors.items())
    assert not model.layers[0]._forward_hooks
