"""A model on another device for a while, and back without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Put a model on a device; afterwards it has its own tensors and modes again.

    Its own tensors, not copies of them: files may be mapped into them, and a copy would be private to every process.

    Args:
        dtype: Of the weights meanwhile; None: their own.
    """
    weights = [
        (part, name, weight, weight.data)
        for part in model.modules()
        for name, weight in part._parameters.items()
        if weight is not None
    ]
    buffers = [(part, name, buffer) for part in model.modules() for name, buffer in part._buffers.items()]
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.to(device=device, dtype=dtype)
        yield
    finally:
        for part, name, weight, data in weights:
            weight.data = data
            part._parameters[name] = weight
        for part, name, buffer in buffers:
            part._buffers[name] = buffer
        for part, mode in modes:
            part.training = mode


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
