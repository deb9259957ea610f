"""The groups of a run in the order in which it sees them: epochs, mixed sources, and the rejected answers drawn for each.

Group k of a run is its k-th draw; a step is a range of draws. Everything follows from the seed, the epoch and the record's
id: it is the same on every rank, after a resume, and under any packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from codes.common.errors import ContrastRMError
from codes.common.packing import MIN_SHARED_TOKENS
from codes.train.data_cache import TokenCache
from codes.train.data_utils import Group
from codes.train.sources import draw_epoch, epoch_quotas

# Draws whose rejected answers are chosen at once: bounds the memory of planning.
PLANNED_AT_ONCE = 1 << 16
# A run is planned before it starts, at about 40 bytes a draw.
MOST_DRAWS = 1 << 27
MOST_EPOCHS = 100_000


def choose_negatives(n_rejected: np.ndarray, keys: np.ndarray, most: int) -> np.ndarray:
    """A sample of each group's rejected answers, without repetition, every subset equally likely.

    Each answer gets a number that follows from its group's key and its position; the smallest ``most`` are kept.

    Args:
        n_rejected: ``(K,)`` int64: rejected answers of each group.
        keys: ``(K,)`` uint64: what the sample of a group follows from.
        most: How many are kept where there are more.

    Returns:
        ``(sum of n_rejected,)`` bool, the answers of all groups one after another.
    """
    owner = np.repeat(np.arange(len(n_rejected)), n_rejected)
    firsts = np.cumsum(n_rejected) - n_rejected
    position = np.arange(len(owner)) - firsts[owner]
    numbers = _mix(keys[owner] + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    order = np.lexsort((numbers, owner))
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - firsts[owner[order]]
    return rank < most


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: one bit changed anywhere changes half of all bits.

    Source: Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Draws(Sequence[Group]):
    """All groups that a run sees, in order.

    Args:
        cache: The groups.
        weights: Weight of each source; None where none was given (``codes.train.sources`` says what they do).
        global_batch_size: Groups of an optimizer step. The last step of an epoch may be smaller; no draw is left out.
        epochs: Epochs of the run.
        max_steps: Steps of the run instead; 0: what the epochs need.
        max_rejected: Most rejected answers of a draw, sampled anew each epoch; 0: all.

    Attributes:
        plan: The draws of every step.
        steps_per_epoch: Steps of a whole epoch.
        n_tokens: ``(K,)`` int64: tokens of each draw's texts.
        n_texts: ``(K,)`` int32: its texts.
        longest: ``(K,)`` int32: tokens of its longest text.
    """

    def __init__(
        self,
        cache: TokenCache,
        weights: Sequence[float | None],
        *,
        global_batch_size: int,
        epochs: int,
        max_steps: int,
        seed: int,
        max_rejected: int = 0,
    ) -> None:
        self.cache, self.seed = cache, seed
        self._most = max_rejected
        self.quotas = epoch_quotas(cache.sizes, list(weights))
        self.epoch_size = sum(cache.sizes if self.quotas is None else self.quotas)
        self.steps_per_epoch = -(-self.epoch_size // global_batch_size)
        self.total_steps = max_steps or epochs * self.steps_per_epoch
        n_epochs = -(-self.total_steps // self.steps_per_epoch)
        if n_epochs > MOST_EPOCHS or n_epochs * self.epoch_size > MOST_DRAWS:
            raise ContrastRMError(
                f"{self.total_steps} steps are {n_epochs} epochs of {self.epoch_size} groups: too many to plan; lower "
                "--epochs or --max_steps"
            )
        drawn = [draw_epoch(cache.sizes, self.quotas, seed=seed, epoch=epoch) for epoch in range(n_epochs)]
        self._groups = np.concatenate([groups.astype(np.int32) for groups, _ in drawn])
        self._copies = np.concatenate([copies for _, copies in drawn])
        self.plan = [
            range(first, min(first + global_batch_size, (epoch + 1) * self.epoch_size))
            for epoch in range(n_epochs)
            for first in range(epoch * self.epoch_size, (epoch + 1) * self.epoch_size, global_batch_size)
        ][: self.total_steps]
        self._measure()

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, number: int) -> Group: ...
    @overload
    def __getitem__(self, number: slice) -> list[Group]: ...
    def __getitem__(self, number: int | slice) -> Group | list[Group]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return self.cache.group(int(self._groups[number]), self._kept(number))

    def _kept(self, number: int) -> list[int] | None:
        if not self._most:
            return None
        _, _, kept = self._sample(np.array([number]))
        return np.flatnonzero(kept[:-1]).tolist()

    def _sample(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts of these draws: first text ``(k,)``, number of texts ``(k,)``, and which are kept ``(sum,)``."""
        groups = self._groups[numbers]
        first = self.cache.group_offsets[groups]
        n_texts = self.cache.group_offsets[groups + 1] - first
        owner = np.repeat(np.arange(len(groups)), n_texts)
        position = np.arange(len(owner)) - (np.cumsum(n_texts) - n_texts)[owner]
        kept = np.ones(len(owner), dtype=bool)
        is_rejected = position < n_texts[owner] - 1
        if self._most:
            epoch = (numbers // self.epoch_size).astype(np.uint64)
            copy = self._copies[numbers].astype(np.uint64)
            keys = _mix(
                _mix(self.cache.group_digests[groups] + np.uint64(self.seed % 2**64)) + (epoch << np.uint64(32)) + copy
            )
            kept[is_rejected] = choose_negatives(n_texts - 1, keys, self._most)
        return first, n_texts, kept

    def _measure(self) -> None:
        """Numbers of every draw, chunk by chunk."""
        size = len(self)
        self.n_texts = np.empty(size, dtype=np.int32)
        self.n_tokens = np.empty(size, dtype=np.int64)
        self.longest = np.empty(size, dtype=np.int32)
        self._shared = np.empty(size, dtype=np.int64)
        for start in range(0, size, PLANNED_AT_ONCE):
            part = slice(start, min(start + PLANNED_AT_ONCE, size))
            numbers = np.arange(part.start, part.stop)
            first, n_texts, kept = self._sample(numbers)
            owner = np.repeat(np.arange(len(numbers)), n_texts)
            firsts = np.cumsum(n_texts) - n_texts
            texts = first[owner] + np.arange(len(owner)) - firsts[owner]
            lengths = np.where(kept, self.cache.text_offsets[texts + 1] - self.cache.text_offsets[texts], 0)
            n_kept = np.add.reduceat(kept, firsts, dtype=np.int64)
            tokens = np.add.reduceat(lengths, firsts)
            prefix = self.cache.group_prefixes[self._groups[numbers]]
            # Of a sample the tree is not known without reading it: all its texts share at least what all of the group do.
            saved = np.where(prefix >= MIN_SHARED_TOKENS, prefix * (n_kept - 1), 0)
            whole = n_kept == n_texts
            self.n_texts[part], self.n_tokens[part] = n_kept, tokens
            self.longest[part] = np.maximum.reduceat(lengths, firsts)
            self._shared[part] = np.where(whole, self.cache.group_shared[self._groups[numbers]], tokens - saved)

    def costs(self, packing: str) -> np.ndarray:
        """``(K,)`` int64: tokens that the model computes for each draw: its prefix tree, its plain sum, or its padded rows.

        The tree of a sample of a group's answers is given as what the common prompt saves: never less than it is.
        """
        if packing == "shared":
            return self._shared
        return self.n_tokens if packing == "packed" else self.n_texts.astype(np.int64) * self.longest

    def epoch_counts(self) -> dict[str, int]:
        """What the first epoch holds: groups, texts, tokens, and the rejected answers that were not drawn for it."""
        part = slice(0, min(self.epoch_size, len(self)))
        groups = self._groups[part]
        full = self.cache.group_offsets[groups + 1] - self.cache.group_offsets[groups]
        return {
            "n_groups": len(groups),
            "n_texts": int(self.n_texts[part].sum()),
            "n_tokens": int(self.n_tokens[part].sum()),
            "n_not_drawn": int(full.sum() - self.n_texts[part].sum()),
            "n_repeated_groups": int((self._copies[part] > 0).sum()),
            "n_groups_left_out": len(self.cache) - len(np.unique(groups)),
        }
