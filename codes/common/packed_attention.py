"""Attention over packs: one interface, three ways to compute it, any decoder of the transformers library.

* ``segments`` (CPU): one call of the flash kernel for every node on itself, and one for everything below a node on that node;
  partial results are merged by their log-sum-exp. No mask, no copy of shared keys, no work on pairs that do not see each other.
* ``flex`` (CUDA): PyTorch's flex attention with the layout as its block mask.
* ``dense``: a mask of all pairs. The reference of the tests, and the way out where neither of the others runs.

A model is switched by ``install_packed_attention``; from then on a forward pass with ``pack_layout=`` is a pack, and one without
is what it was before. Models that cannot be packed are found by ``why_not_packable`` and by ``probe``.

Source of merging by log-sum-exp: the online softmax of FlashAttention (arXiv 2205.14135, section 3.1). That the backward kernel
gives a part's gradient from the whole row's output and log-sum-exp: section 3.1 of FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.utils._triton import has_triton
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from codes.common.errors import ContrastRMError
from codes.common.packing import PackLayout
from codes.common.rope import LENGTH_DEPENDENT, rope_kinds

BACKENDS = ("segments", "flex", "dense")
# One attention name for each implementation that a padded batch of the same model goes on using.
_NAMES = {"sdpa": "contrastrm_sdpa", "eager": "contrastrm_eager"}
# Of one compiled function, in one process.
COMPILED_VARIANTS = 128
# Flex attention works in blocks of this many tokens; a row that ends inside one would be compiled anew.
FLEX_BLOCK = 128


def default_backend(device: torch.device) -> str:
    """The fastest backend of a device."""
    if device.type == "cuda":
        # Flex attention is compiled with Triton; uncompiled it would build the whole score matrix.
        return "flex" if has_triton() else "dense"
    return "segments" if device.type == "cpu" else "dense"


def why_not_packable(model: PreTrainedModel) -> str | None:
    """Why a backbone cannot be packed, from what it says of itself; None where nothing speaks against it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention looks both ways"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(kinds))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention works in chunks"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position ids"
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return "its forward pass takes no further arguments"
    if model.config._attn_implementation not in (*_NAMES, *_NAMES.values()):
        return f"the attention implementation {model.config._attn_implementation} was asked for"
    for kind, _ in rope_kinds(config):
        if kind in LENGTH_DEPENDENT:
            return f"its rotary embedding ({kind}) depends on the longest text of a batch"
    return None


@contextmanager
def narrowed_windows(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Sliding windows of so many tokens, where the model has any.

    A model may mask its windows without a word to its attention: that shows in texts that are longer than the window only.
    """
    owners = [model.config.get_text_config(), *model.modules()]
    kept = [
        (owner, owner.sliding_window) for owner in owners if isinstance(getattr(owner, "sliding_window", None), int)
    ]
    try:
        for owner, _ in kept:
            owner.sliding_window = window
        yield
    finally:
        for owner, own in kept:
            owner.sliding_window = own


def install_packed_attention(model: PreTrainedModel) -> None:
    """Let a model take packs; padded batches go on as before."""
    current = model.config._attn_implementation
    if current not in _NAMES.values():
        _register()
        model.set_attn_implementation(_NAMES[current])


@cache
def _register() -> None:
    for base, name in _NAMES.items():
        AttentionInterface.register(name, _packed_or(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _packed_or(base: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        pack_layout: PackLayout | None = None,
        pack_backend: str = "",
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pack_layout is None:
            if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
                raise ContrastRMError("this model does not hand packs on to its attention; use --packing off")
            forward = sdpa_attention_forward
            if base == "eager":
                forward = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
            result: tuple[torch.Tensor, torch.Tensor | None] = forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return result
        if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
            raise ContrastRMError("attention sinks and position biases cannot be packed; use --packing off")
        if attention_mask is not None and attention_mask.numel() != 1:
            raise ContrastRMError("this model makes masks of its own, which packs do not know; use --packing off")
        output = packed_attention(
            query,
            key,
            value,
            pack_layout,
            backend=pack_backend or default_backend(query.device),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    backend: str,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Every token attends to the tokens of its own path.

    Args:
        query: ``(1, H, T, D)``.
        key, value: ``(1, H_kv, T, D)``, ``H`` a multiple of ``H_kv``.
        window: Only tokens fewer than this many positions back are seen.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)`` first (Gemma 2).

    Returns:
        ``(1, H, T, D)`` in the dtype of ``value``.

    Raises:
        ContrastRMError: An unknown backend.
    """
    if window is not None and window >= layout.longest_path:
        window = None
    if backend == "flex":
        return _flex(query, key, value, layout, scale=scale, window=window, softcap=softcap)
    if backend == "segments" and window is None and softcap is None and query.device.type == "cpu":
        # The kernel takes one width for all three (latent attention has two): what is filled up adds nothing.
        width, out_width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        query, key, value = (functional.pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
        output: torch.Tensor = _Segments.apply(query, key, value, layout, scale, _cpu_dtype(query, value))
        return output[..., :out_width]
    if backend == "segments":
        return _paths(query, key, value, layout, scale=scale, window=window, softcap=softcap)
    if backend == "dense":
        return _masked(query, key, value, layout.mask(window), scale=scale, softcap=softcap)
    raise ContrastRMError(f"unknown packing backend {backend!r}; known: {', '.join(BACKENDS)}")


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention under a dense mask ``(Q, K)``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query, key = query.to(value.dtype), key.to(value.dtype)
    if softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(
        dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    return weights.to(value.dtype) @ value


def _paths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Node by node, each on the keys of its path: for windows and soft caps, which a sum of parts cannot express."""
    outputs = []
    for node, path in zip(layout.nodes, layout.paths, strict=True):
        seen = torch.cat([torch.arange(layout.nodes[i].start, layout.nodes[i].stop, device=key.device) for i in path])
        mine = torch.arange(node.position, node.end_position, device=key.device)
        steps = mine[:, None] - torch.arange(node.end_position, device=key.device)
        mask = steps >= 0
        if window is not None:
            mask &= steps < window
        rows = query[:, :, node.start : node.stop]
        outputs.append(_masked(rows, key[:, :, seen], value[:, :, seen], mask, scale=scale, softcap=softcap))
    return torch.cat(outputs, dim=2)


@cache
def _has_fast_bfloat16() -> bool:
    """Whether the CPU's flash kernel is faster in bfloat16 than in float32: with tile instructions only (measured)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def _cpu_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    """What the CPU kernel computes in."""
    dtype = torch.promote_types(query.dtype, value.dtype)
    if dtype in (torch.bfloat16, torch.float16) and not _has_fast_bfloat16():
        return torch.float32
    return dtype


class _Segments(torch.autograd.Function):
    """The ``segments`` backend: parts by the flash kernel, merged by log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PackLayout,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        heads, length, width = q.shape[1], q.shape[2], v.shape[3]
        # Parts are merged more precisely than the model computes, so that sharing adds no error to speak of: in float32 merging
        # doubles the difference between a text in a pack and the text alone (measured on the embedded model).
        wide = torch.float64 if value.dtype in (torch.float32, torch.float64) else torch.float32
        # Token-major, as the kernel writes it and as the projection that follows reads it.
        output = q.new_empty((1, length, heads, width), dtype=wide).transpose(1, 2)
        logsumexp = torch.empty((1, heads, length), dtype=wide)
        for node in layout.nodes:
            own = slice(node.start, node.stop)
            output[:, :, own], logsumexp[:, :, own] = flash(
                q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale
            )
        for node in layout.nodes:
            if node.until == node.stop:
                continue
            own, below = slice(node.start, node.stop), slice(node.stop, node.until)
            part, part_sum = flash(q[:, :, below], k[:, :, own], v[:, :, own], 0.0, False, scale=scale)
            share = torch.sigmoid(part_sum.to(wide) - logsumexp[:, :, below]).unsqueeze(-1)
            logsumexp[:, :, below] = torch.logaddexp(logsumexp[:, :, below], part_sum.to(wide))
            output[:, :, below] = torch.lerp(output[:, :, below], part.to(wide), share)
        ctx.layout, ctx.scale, ctx.dtype = layout, scale, dtype
        result = output.to(value.dtype)
        # In the dtype that the backward kernel takes.
        ctx.save_for_backward(query, key, value, result, logsumexp.to(torch.promote_types(dtype, torch.float32)))
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, result, logsumexp = ctx.saved_tensors
        q, k, v, out, grad = (t.to(ctx.dtype) for t in (query, key, value, result, grad_outputs[0]))
        groups = q.shape[1] // k.shape[1]
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)

        def part(rows: slice, columns: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Gradients of one block of pairs, summed over the query heads that share a key head."""
            keys, values = (t[:, :, columns].repeat_interleave(groups, dim=1) for t in (k, v))
            dq, dk, dv = flash_backward(
                grad[:, :, rows],
                q[:, :, rows],
                keys,
                values,
                out[:, :, rows],
                logsumexp[:, :, rows],
                0.0,
                causal,
                scale=ctx.scale,
            )
            return dq, _sum_heads(dk, groups), _sum_heads(dv, groups)

        for node in ctx.layout.nodes:
            own = slice(node.start, node.stop)
            grad_q[:, :, own], grad_k[:, :, own], grad_v[:, :, own] = part(own, own, True)
        for node in ctx.layout.nodes:
            if node.until == node.stop:
                continue
            own, below = slice(node.start, node.stop), slice(node.stop, node.until)
            dq, dk, dv = part(below, own, False)
            grad_q[:, :, below] += dq
            grad_k[:, :, own] += dk
            grad_v[:, :, own] += dv
        return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), None, None, None


def _sum_heads(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """``(1, H, T, D)`` -> ``(1, H / groups, T, D)``."""
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(dim=2)


@cache
def _compiled(name: str, compiler: str) -> Callable[..., Any]:
    """A function of the flex attention module, compiled once for all lengths.

    Beyond so many variants (dtypes, windows, soft caps, models of one process) the compiler gives up without a word: the
    function then runs uncompiled and builds the matrix of all pairs. So there is room for many, and the attention fails rather
    than give up. A soft cap and a scale are constants: as inputs, which all numbers are otherwise, they cannot be compiled.
    """
    from torch import _dynamo
    from torch.nn.attention import flex_attention as module

    compiled = torch.compile(getattr(module, name), dynamic=True, fullgraph=name == "flex_attention", backend=compiler)
    call = _dynamo.config.patch(specialize_float=True, recompile_limit=COMPILED_VARIANTS)(compiled)
    return call  # type: ignore[no-any-return]


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    compiler: str | None = None,
) -> torch.Tensor:
    """Flex attention; compiled on a GPU, as plain tensor operations elsewhere (slow, for tests).

    Args:
        compiler: A backend of ``torch.compile``; None: the default one on a GPU, none elsewhere.
    """
    # Imported where it is used: it pulls in the compiler.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if compiler is None and query.device.type == "cuda":
        compiler = "inductor"
    cache_key = ("flex", window)
    if cache_key not in layout.cache:
        until, positions = layout.until, layout.positions

        def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = (k <= q) & (q < until[k])
            return seen if window is None else seen & (positions[q] - positions[k] < window)

        n = layout.n_tokens
        # Compiled, the mask of all pairs is never written.
        make_mask = _compiled("create_block_mask", compiler) if compiler else create_block_mask
        layout.cache[cache_key] = make_mask(sees, None, None, n, n, device=query.device, BLOCK_SIZE=FLEX_BLOCK)

    def squeeze(score: torch.Tensor, batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    attend = _compiled("flex_attention", compiler) if compiler else flex_attention
    query, key = query.to(value.dtype), key.to(value.dtype)
    output: torch.Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else squeeze,
        block_mask=layout.cache[cache_key],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output
