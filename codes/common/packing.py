"""Packs: many token sequences in one row, what they share computed once, nothing padded.

The sequences of a pack are laid out as a prefix tree in depth-first order. A token sees the tokens before it that belong to
its own path from the root, and nothing else; positions count along that path. So the prompt of a group of answers stands
there once, whatever the number of answers, and every score is the score of the sequence alone.

Two numbers a token describe everything: its position, and ``until``, the end of the sub-tree under its node. Token ``q``
sees token ``k`` exactly when ``k <= q < until[k]``.

Used by the trainer and the scorer; the attention that reads a layout is in ``codes.common.packed_attention``.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

# Sharing fewer tokens than this is not worth a node of its own: an attention call costs more than it saves.
MIN_SHARED_TOKENS = 8
_EQUAL = 1 << 60


@dataclass(frozen=True)
class Node:
    """A run of tokens that the same sequences share.

    Attributes:
        start, stop: Its tokens in the pack.
        until: End of its sub-tree: the tokens in ``[stop, until)`` see it.
        parent: Index of the node that it continues; None at a root.
        position: Position of its first token along the path from the root.
    """

    start: int
    stop: int
    until: int
    parent: int | None
    position: int

    @property
    def end_position(self) -> int:
        """Tokens of the path from the root to the end of this node."""
        return self.position + self.stop - self.start


@dataclass(frozen=True, eq=False)
class PackLayout:
    """Who sees whom in a pack.

    Attributes:
        nodes: In depth-first order; together they cover the tokens ``[0, n_tokens)`` without a gap.
        until: ``(T,)`` int32, on the device of the model.
        positions: ``(T,)`` int32, on the device of the model.
        longest_path: Tokens of the longest sequence.
        cache: What a backend has computed from the layout (a block mask), shared by all layers.
    """

    nodes: tuple[Node, ...]
    until: torch.Tensor
    positions: torch.Tensor
    longest_path: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens of the pack, filler included."""
        return int(self.until.shape[0])

    def mask(self, window: int | None = None) -> torch.Tensor:
        """The dense ``(T, T)`` mask, True where the row's token sees the column's. For tests and short packs.

        Args:
            window: Sliding window: only tokens that are fewer than this many positions back are seen.
        """
        key = ("mask", window)
        if key not in self.cache:
            index = torch.arange(self.n_tokens, device=self.until.device)
            mask = (index[:, None] >= index) & (index[:, None] < self.until)
            if window is not None:
                mask &= (self.positions[:, None] - self.positions) < window
            self.cache[key] = mask
        mask = self.cache[key]
        assert isinstance(mask, torch.Tensor)
        return mask

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For every node the nodes from its root down to itself."""
        found: list[tuple[int, ...]] = []
        for index, node in enumerate(self.nodes):
            found.append((index,) if node.parent is None else (*found[node.parent], index))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Pack:
    """Sequences ready for one forward pass.

    Attributes:
        input_ids: ``(1, T)`` int64.
        ends: ``(n_sequences,)`` int64: where each sequence's last token stands, in the order of the sequences.
        layout: Who sees whom.
        n_sequence_tokens: Tokens of all sequences, as if nothing were shared.
    """

    input_ids: torch.Tensor
    ends: torch.Tensor
    layout: PackLayout
    n_sequence_tokens: int

    @property
    def position_ids(self) -> torch.Tensor:
        """``(1, T)`` int64."""
        return self.layout.positions.long().unsqueeze(0)

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on a device."""
        layout = self.layout
        moved = PackLayout(
            layout.nodes,
            layout.until.to(device, non_blocking=True),
            layout.positions.to(device, non_blocking=True),
            layout.longest_path,
        )
        ids, ends = self.input_ids.to(device, non_blocking=True), self.ends.to(device, non_blocking=True)
        return Pack(ids, ends, moved, self.n_sequence_tokens)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading tokens that two sequences share.

    Example: [5, 6, 7] and [5, 6, 9, 1] -> 2.
    """
    n = min(first.shape[0], second.shape[0])
    differs = first[:n] != second[:n]
    return int(differs.argmax()) if differs.any() else n


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Token ids as the array that packing compares."""
    return np.asarray(ids, dtype=np.int64)


def _in_order(arrays: Sequence[np.ndarray]) -> list[int]:
    """Indices of sequences in the order of their tokens."""
    # Big-endian words of one width compare as the lists of their numbers do, in a tenth of the memory and faster.
    return sorted(range(len(arrays)), key=lambda index: (arrays[index].astype(">u4").tobytes(), index))


def build_pack(
    sequences: Sequence[Sequence[int]],
    *,
    share: bool = True,
    min_shared: int = MIN_SHARED_TOKENS,
    multiple_of: int = 1,
    filler_id: int = 0,
) -> Pack:
    """Lay sequences out as a prefix tree.

    Args:
        sequences: Token ids, each with at least one token. Equal ones take no room twice.
        share: False lays every sequence out whole (equal ones too).
        min_shared: Shared runs shorter than this are repeated instead.
        multiple_of: Fill the row up to a multiple of this many tokens; a filler sees only itself.
        filler_id: Token id of the filler.

    Raises:
        ValueError: No sequence, or an empty one.

    Example: ids (1, 2, 3, 4) and (1, 2, 5) with min_shared 1 -> input_ids [[1, 2, 3, 4, 5]], positions [0, 1, 2, 3, 2],
    until [5, 5, 4, 4, 5], ends [3, 4].
    """
    arrays = [as_array(ids) for ids in sequences]
    if not arrays or any(array.shape[0] == 0 for array in arrays):
        raise ValueError("a pack needs at least one sequence, each with at least one token")
    nodes, runs, ends = _build_tree(arrays, min_shared) if share else _build_row(arrays)
    n_tokens = nodes[-1].stop
    total = -(-n_tokens // multiple_of) * multiple_of
    input_ids = torch.full((1, total), filler_id, dtype=torch.long)
    input_ids[0, :n_tokens] = torch.from_numpy(np.concatenate(runs))
    until = np.arange(1, total + 1, dtype=np.int32)
    positions = np.zeros(total, dtype=np.int32)
    for node in nodes:
        until[node.start : node.stop] = node.until
        positions[node.start : node.stop] = np.arange(node.position, node.end_position)
    # Fillers are nodes too, so that every backend covers the whole row.
    nodes += [Node(at, at + 1, at + 1, None, 0) for at in range(n_tokens, total)]
    layout = PackLayout(
        nodes=tuple(nodes),
        until=torch.from_numpy(until),
        positions=torch.from_numpy(positions),
        longest_path=max(array.shape[0] for array in arrays),
    )
    return Pack(input_ids, torch.tensor(ends, dtype=torch.long), layout, sum(array.shape[0] for array in arrays))


def _build_row(arrays: Sequence[np.ndarray]) -> tuple[list[Node], list[np.ndarray], list[int]]:
    """Every sequence a root of its own."""
    stops = np.cumsum([array.shape[0] for array in arrays]).tolist()
    starts = [0, *stops[:-1]]
    nodes = [Node(start, stop, stop, None, 0) for start, stop in zip(starts, stops, strict=True)]
    return nodes, list(arrays), [stop - 1 for stop in stops]


def _build_tree(arrays: Sequence[np.ndarray], min_shared: int) -> tuple[list[Node], list[np.ndarray], list[int]]:
    """The prefix tree: nodes in depth-first order, their token runs, and each sequence's last token.

    Sorted, neighbours share the most; a run of neighbours that share more than their parent does becomes a node.
    """
    order = _in_order(arrays)
    shared = [0]
    for a, b in itertools.pairwise(order):
        common = common_prefix(arrays[a], arrays[b])
        # Equal sequences stay together, however short what they share.
        shared.append(_EQUAL if common == arrays[a].shape[0] == arrays[b].shape[0] else common)
    nodes: list[Node] = []
    runs: list[np.ndarray] = []
    ends = [0] * len(arrays)
    n_tokens = 0
    # Work in order: (first, last + 1) of the sorted sequences, tokens already laid out, parent. A stack, not recursion:
    # a thousand answers that each begin with the one before are a tree a thousand deep.
    stack: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)]
    while stack:
        first, stop, depth, parent = stack.pop()
        parts = _split(order, arrays, shared, first, stop, depth, max(1, min_shared))
        if len(parts) > 1:
            stack += [(a, b, depth, parent) for a, b in reversed(parts)]
            continue
        length = arrays[order[first]].shape[0]
        until_depth = min([length, *shared[first + 1 : stop]])
        index, start = len(nodes), n_tokens
        n_tokens += until_depth - depth
        nodes.append(Node(start, n_tokens, n_tokens, parent, depth))
        runs.append(arrays[order[first]][depth:until_depth])
        rest = first
        while rest < stop and arrays[order[rest]].shape[0] == until_depth:
            ends[order[rest]] = n_tokens - 1
            rest += 1
        if rest < stop:
            stack.append((rest, stop, until_depth, index))
    return _close(nodes), runs, ends


def _split(
    order: Sequence[int],
    arrays: Sequence[np.ndarray],
    shared: Sequence[int],
    first: int,
    stop: int,
    depth: int,
    min_shared: int,
) -> list[tuple[int, int]]:
    """Cut sorted sequences, all equal up to ``depth``, into runs that go on together for ``min_shared`` tokens or more."""
    parts = []
    begin = first
    for at in range(first + 1, stop + 1):
        if at == stop or shared[at] < depth + min_shared:
            parts.append((begin, at))
            begin = at
    return parts


def _close(nodes: Sequence[Node]) -> list[Node]:
    """Fill in where every node's sub-tree ends."""
    until = [node.stop for node in nodes]
    for index in range(len(nodes) - 1, -1, -1):
        parent = nodes[index].parent
        if parent is not None:
            until[parent] = max(until[parent], until[index])
    return [Node(n.start, n.stop, end, n.parent, n.position) for n, end in zip(nodes, until, strict=True)]


def shared_tokens(sequences: Iterable[Sequence[int]], min_shared: int = MIN_SHARED_TOKENS) -> int:
    """Tokens of the prefix tree of sequences: what a pack of them computes."""
    arrays = [as_array(ids) for ids in sequences]
    return _build_tree(arrays, min_shared)[0][-1].stop


def plan_packs(sequences: Sequence[Sequence[int]], max_tokens: int, *, share: bool = True) -> list[list[int]]:
    """Cut sequences into packs of at most ``max_tokens`` tokens, what shares most together.

    Sorted, neighbours share the most. A pack that is full is cut where, in its last quarter, its sequences share the least:
    the answers of one question stay together where they fit.

    Args:
        sequences: Token ids; indices refer to them.
        max_tokens: Budget of tokens really computed. A longer sequence gets a pack of its own.

    Returns:
        Packs of indices, the largest first: an out-of-memory error shows at once, not at the end.
    """
    arrays = [as_array(ids) for ids in sequences]
    order = _in_order(arrays)
    # What each sequence need not compute again after its predecessor. A node's sequences may each repeat up to
    # MIN_SHARED_TOKENS - 1 tokens, so a pack never holds more than its budget.
    shared = [0] + [
        max(0, common_prefix(arrays[a], arrays[b]) - MIN_SHARED_TOKENS + 1) if share else 0
        for a, b in itertools.pairwise(order)
    ]
    packs: list[tuple[int, list[int]]] = []
    begin, cost = 0, 0
    costs: list[int] = []
    for at, index in enumerate(order):
        added = arrays[index].shape[0] - (shared[at] if at > begin else 0)
        if at > begin and cost + added > max_tokens:
            cut = _best_cut(shared, costs, begin, at, cost)
            packs.append((costs[cut - 1 - begin], order[begin:cut]))
            begin, cost, costs = cut, 0, []
            for again in range(cut, at):
                cost += arrays[order[again]].shape[0] - (shared[again] if again > begin else 0)
                costs.append(cost)
            added = arrays[index].shape[0] - (shared[at] if at > begin else 0)
        cost += added
        costs.append(cost)
    if order:
        packs.append((cost, order[begin:]))
    return [indices for _, indices in sorted(packs, key=lambda pack: (-pack[0], pack[1]))]


def _best_cut(shared: Sequence[int], costs: Sequence[int], begin: int, at: int, cost: int) -> int:
    """Where a full pack ``[begin, at)`` ends: before the sequence that shares least with its predecessor, not too early."""
    allowed = [cut for cut in range(begin + 1, at + 1) if costs[cut - 1 - begin] >= 0.75 * cost]
    return min(allowed, key=lambda cut: (shared[cut], -cut))


def balance(costs: Sequence[int], n_bins: int, max_items: int = 0) -> list[list[int]]:
    """Share items out over bins so that the heaviest bin is light: the heaviest item first, always into the lightest bin.

    Args:
        max_items: Most items of a bin; 0: no such limit.

    Returns:
        ``n_bins`` lists of indices, some empty where there are fewer items.

    Raises:
        ValueError: More items than the bins take.

    Example: costs [5, 4, 3, 2] in 2 bins -> [[0, 3], [1, 2]].
    """
    if max_items and len(costs) > n_bins * max_items:
        raise ValueError(f"{len(costs)} items do not fit into {n_bins} bins of {max_items}")
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    loads = [(0, number) for number in range(n_bins)]
    for index in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, number = heapq.heappop(loads)
        bins[number].append(index)
        # A full bin leaves the heap.
        if not max_items or len(bins[number]) < max_items:
            heapq.heappush(loads, (load + costs[index], number))
    return bins
