"""Whether packs are right with a model: a small pack is compared with its texts one by one, on the device that will compute.

Used by ``codes.train.reward_model`` before a model takes packs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK, narrowed_windows
from codes.common.packing import build_pack

# Of a padded batch or a pack -> the last hidden state of each text, ``(n_texts, hidden)`` (``RewardModel._pooled``).
PooledStates = Callable[..., torch.Tensor]
# Relative error of the pooled hidden states. A pack whose texts see each other is off by far more than rounding: by 0.38 and more
# in small random decoders, where rounding in bfloat16 is up to 0.11 (measured on a CPU with AMX).
PROBE_TOLERANCE = 1e-3
PROBE_TOLERANCE_HALF = 0.2
# Of gradients. In bfloat16 those of small random decoders differ by up to 0.17 (measured); a lost term or a wrong mask is off by
# as much as the gradient itself.
PROBE_GRADIENT_TOLERANCE = 1e-2
PROBE_GRADIENT_TOLERANCE_HALF = 0.35
# The probe's texts are longer than this, whatever window a model has.
PROBE_WINDOW = 5


def probe(
    backbone: Any, pooled: PooledStates, trained: Sequence[torch.Tensor] = (), *, is_cast: bool = False
) -> str | None:
    """Compare a small pack with its sequences one by one: what a model does not say of itself shows here.

    Args:
        trained: Weights whose gradients are compared too.
        is_cast: It runs under autocast.

    Returns:
        None where they agree, or in what they do not.
    """
    weight = backbone.get_input_embeddings().weight
    vocabulary = int(weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (5, 6), generator=generator).tolist()
    sequences = [drawn[0] + drawn[1], drawn[0] + drawn[2], drawn[0] + drawn[3] + drawn[1], drawn[4]]
    # More than one block: the compiler takes a size of one for a constant, and other packs would need another kernel.
    multiple_of = 2 * FLEX_BLOCK if weight.device.type == "cuda" else 1
    pack = build_pack(sequences, min_shared=1, multiple_of=multiple_of).to(weight.device)
    with torch.inference_mode(not trained), narrowed_windows(backbone, PROBE_WINDOW):
        alone = torch.cat(
            [
                pooled(torch.tensor([ids], device=weight.device), torch.ones((1, len(ids)), device=weight.device))
                for ids in sequences
            ]
        )
        # Short: in fp16, without the scale that a loss has in training, gradients overflow easily.
        direction = torch.randn(alone.shape, generator=generator).to(alone) / alone.numel() ** 0.5
        expected = _gradients(alone, direction, trained)
        try:
            together = pooled(pack.input_ids, None, pack.layout, pack.ends)
            of_pack = _gradients(together, direction, trained)
        except torch.OutOfMemoryError:
            raise
        except kernel_failures() as failure:
            return f"a probe pack fails in it: {str(failure).strip().partition(chr(10))[0] or type(failure).__name__}"
    difference = (together.detach().double() - alone.detach().double()).norm(dim=-1).max()
    error = float(difference / alone.detach().double().norm(dim=-1).max().clamp(min=1e-12))
    is_full = weight.dtype in (torch.float32, torch.float64) and not is_cast
    if not error <= (PROBE_TOLERANCE if is_full else PROBE_TOLERANCE_HALF):
        return f"a probe pack differs from its texts alone (relative error {error:.1e})"
    if not all(bool(gradient.isfinite().all()) for gradient in expected):
        # They overflow without packs too, and so say nothing of them.
        return None
    error = _relative_error(of_pack, expected)
    allowed = PROBE_GRADIENT_TOLERANCE if is_full else PROBE_GRADIENT_TOLERANCE_HALF
    return None if error <= allowed else f"the gradients of a probe pack differ from its texts' (by {error:.1e})"


def probe_on(backbone: Any, pooled: PooledStates, device: torch.device, *, cast: torch.dtype | None) -> str | None:
    """Whether packs are right on a device where the model will be trained, gradients included.

    A device has an attention of its own, and what ``probe`` found on another one says nothing of it.

    Args:
        cast: What autocast computes in there; None: no autocast.

    Returns:
        None, or why packs must not be used there; also None where a model does not fit there whole. The model is as it was.
    """
    # Older decoders keep their layers elsewhere, and are small enough to be tried whole.
    has_layers = isinstance(getattr(backbone, "layers", None), nn.ModuleList)
    there = few_layers_on(backbone, device) if has_layers else borrowed(backbone, device)
    try:
        with there, torch.autocast(device.type, cast, enabled=cast is not None), torch.enable_grad():
            backbone.eval()
            part = backbone.layers if has_layers else backbone
            trained = [weight for weight in part.parameters() if weight.requires_grad]
            return probe(backbone, pooled, trained, is_cast=cast is not None)
    except torch.OutOfMemoryError:
        # A model that is split over devices may still be trained.
        return None


def _gradients(pooled: torch.Tensor, direction: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of hidden states along a direction, of the weights that have any."""
    if not weights:
        return []
    gradients = torch.autograd.grad((pooled * direction).sum(), weights, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def _relative_error(gradients: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest error of a gradient; infinite where one is not finite, or where they are not the same ones."""
    if len(gradients) != len(expected):
        return math.inf
    norms = [float(tensor.double().norm()) for tensor in expected]
    error = 0.0
    for one, other, norm in zip(gradients, expected, norms, strict=True):
        # A gradient that is next to nothing (a key's bias) is rounding alone.
        difference = float((one.double() - other.double()).norm()) / max(norm, 0.1 * max(norms), 1e-12)
        error = max(error, difference if math.isfinite(difference) else math.inf)
    return error


def kernel_failures() -> tuple[type[Exception], ...]:
    """What kernels raise that cannot be imported, compiled or run."""
    failures: tuple[type[Exception], ...] = (ContrastRMError, ImportError, OSError, RuntimeError, ValueError, TypeError)
    failures += (ArithmeticError, AttributeError, LookupError, AssertionError)
    if "triton.errors" in sys.modules:
        # Its own errors derive from Exception alone.
        failures += (sys.modules["triton.errors"].TritonError,)
    return failures


# --- a model on another device for a while ---


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
