"""Fused elementwise kernels (RMSNorm, SwiGLU, GeGLU) of the package liger-kernel, for a decoder on CUDA.

The package is optional, and imported only where its kernels are put in. It patches a model's own modules; what it replaces in
the modules of transformers is taken back at once, so that other models of the process stay as they are. Rotary embeddings are
left out for that reason: their function belongs to a whole module of transformers, not to a model.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from codes.common.borrow import borrowed
from codes.common.cli import is_first_process
from codes.common.errors import ContrastRMError

FUSED_KERNELS = ("auto", "off")
OFF = "off"
# Those of the package's architectures that tests/test_fused.py compares with the plain ones. Its mixtures of experts are left
# out: their kernels do more than elementwise work.
ARCHITECTURES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# The kernels compute these, whatever else a model's configuration names.
ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
# The losses need a language-model head, which is not there.
_NO_KERNELS = ("rope", "cross_entropy", "fused_linear_cross_entropy")


def kernels_version() -> str | None:
    """Name and versions of the installed kernels; None without them. Nothing is imported.

    Example: ``liger-kernel 0.8.5, triton 3.7.0``.
    """
    if find_spec("liger_kernel") is None:
        return None
    found = []
    for package in ("liger-kernel", "triton"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(package)
    return ", ".join(found)


def why_not_fusable(backbone: PreTrainedModel) -> str | None:
    """None where the kernels compute what a decoder does, or why not."""
    config = backbone.config
    if config.model_type not in ARCHITECTURES or not _is_of_transformers(type(backbone)):
        return f"they are not tested with {type(backbone).__name__}"
    named = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation"))
    others = [name for name in named if name is not None and name not in ACTIVATIONS]
    return f"they do not compute its activation {others[0]}" if others else None


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def kernel_failures() -> tuple[type[Exception], ...]:
    """What kernels raise that cannot be imported, compiled or run."""
    failures: tuple[type[Exception], ...] = (ContrastRMError, ImportError, OSError, RuntimeError, ValueError, TypeError)
    failures += (ArithmeticError, AttributeError, LookupError, AssertionError)
    if "triton.errors" in sys.modules:
        # Its own errors derive from Exception alone.
        failures += (sys.modules["triton.errors"].TritonError,)
    return failures


def remember_modules(model: nn.Module) -> Callable[[], None]:
    """Note what a model's modules are made of.

    Returns:
        What puts it back: classes, methods, attributes, and the very tensors.
    """
    kept = []
    for module in model.modules():
        attributes = dict(vars(module))
        registries = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]
        kept.append((module, type(module), attributes, registries))

    def restore() -> None:
        for module, kind, attributes, registries in kept:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)

    return restore


@contextmanager
def _modeling_code_kept(model: nn.Module) -> Iterator[None]:
    """Take back what is replaced in the modules that hold a model's classes, and in these classes."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__ if _is_of_transformers(kind)}
    owners: list[Any] = [*classes, *(sys.modules[name] for name in {kind.__module__ for kind in classes})]
    kept = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, before in kept:
            for name, value in list(vars(owner).items()):
                if name not in before:
                    delattr(owner, name)
                elif value is not before[name]:
                    setattr(owner, name, before[name])


def install_fused_kernels(backbone: nn.Module) -> None:
    """Bind the kernels to a decoder's norms and MLPs; names in its state dict stay as they are.

    Raises:
        ContrastRMError: The installed version has none for the decoder.
    """
    patch = importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance
    with _modeling_code_kept(backbone):
        patch(model=backbone, **dict.fromkeys(_NO_KERNELS, False))
    changed = [module for module in backbone.modules() if "forward" in vars(module)]
    if not changed:
        raise ContrastRMError("the installed liger-kernel has none for it")
    for module in changed:
        if "row_mode" in vars(module):
            # The kernel that the probe runs; by the number of rows it would be another one in large batches.
            module.row_mode = True


@contextmanager
def few_layers_on(backbone: Any, device: torch.device) -> Iterator[None]:
    """Cut a decoder to its first two layers and its last, on a device: a model that is split later may not fit there whole.

    Without the dropout of an adapter, which would make every pass another one.
    """
    layers, config = backbone.layers, backbone.config.get_text_config()
    chosen = sorted({0, min(1, len(layers) - 1), len(layers) - 1})
    # Models choose the mask of a layer by its place, and its window by what it was made for.
    kinds = vars(config).get("layer_types")
    backbone.layers = nn.ModuleList(layers[index] for index in chosen)
    if kinds:
        config.layer_types = [kinds[index] for index in chosen]
    try:
        with borrowed(backbone, device):
            yield backbone.eval()
    finally:
        backbone.layers = layers
        if kinds:
            config.layer_types = kinds


def resolve_fused_kernels(model: Any, fused_kernels: str, device: torch.device, *, gradients: bool) -> str:
    """Put the kernels into a reward model where ``auto`` means them.

    Args:
        device: Where the model will compute. Elsewhere than on CUDA nothing is done, and nothing said.
        gradients: The model will be trained: gradients are compared too.

    Returns:
        The kernels in use with their versions, or ``off``: they round differently, so results name them.

    Raises:
        ContrastRMError: An unknown name.
    """
    if fused_kernels not in FUSED_KERNELS:
        raise ContrastRMError(f"unknown --fused_kernels {fused_kernels!r}; known: {', '.join(FUSED_KERNELS)}")
    version = kernels_version()
    if fused_kernels == OFF or device.type != "cuda" or version is None:
        return OFF
    reason = model.enable_fused_kernels(device, gradients=gradients)
    if reason is None:
        return version
    if is_first_process():
        print(f"note: the fused kernels of liger-kernel are not used with this model: {reason}", file=sys.stderr)
    return OFF
