"""Rotary embeddings that depend on the longest text of a batch: what keeps a score from depending on its neighbours.

``longrope`` has one set of frequencies for batches within the original context and another beyond it; ``dynamic`` (NTK) has
one for every length beyond it and keeps what the longest batch so far needed. Both are chosen by the largest position of a
whole batch (``dynamic_rope_update`` of transformers), so texts on the two sides of the limit must never share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class RopeLimit:
    """Where the frequencies change with a text's length.

    Attributes:
        tokens: Texts of up to so many tokens are computed with the original frequencies.
        one_by_one: Every longer length has frequencies of its own.
    """

    tokens: int
    one_by_one: bool


def rope_kinds(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """Kind and parameters of every rotary embedding of a decoder's config: one for all layers, or one for each kind of layer."""

    def walk(rope: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(rope, dict):
            if "rope_type" in rope or "type" in rope:
                yield str(rope.get("rope_type", rope.get("type"))), rope
            for inner in rope.values():
                yield from walk(inner)

    return list(walk(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)))


def rope_limit(config: PreTrainedConfig) -> RopeLimit | None:
    """The limit of a decoder's config; None where no frequency depends on the length."""
    found = [(kind, rope) for kind, rope in rope_kinds(config) if kind in LENGTH_DEPENDENT]
    if not found:
        return None
    limits = [int(rope.get("original_max_position_embeddings") or config.max_position_embeddings) for _, rope in found]
    # Several limits cut the lengths into more than two classes: the shortest, and no company beyond it.
    return RopeLimit(min(limits), any(kind == "dynamic" for kind, _ in found) or len(set(limits)) > 1)


def forget_long_texts(model: torch.nn.Module) -> None:
    """Give dynamic embeddings back their original frequencies: a long text must not reach the one after it."""
    for module in model.modules():
        original = getattr(module, "original_max_seq_len", None)
        if original is None:
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            if getattr(module, name) != original:
                prefix = name.removesuffix("max_seq_len_cached")
                frequencies = getattr(module, f"{prefix}inv_freq")
                kept = getattr(module, f"{prefix}original_inv_freq").to(frequencies.device)
                module.register_buffer(f"{prefix}inv_freq", kept, persistent=False)
                setattr(module, name, original)
