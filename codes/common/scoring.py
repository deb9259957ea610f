"""One scorer for training-time evaluation, the bias evaluation and RewardBench.

A text's score does not depend on its company: distinct texts are scored once, in packs that share prefixes (or, where a model
cannot be packed, in padded batches of similar length) under a token budget, and put back in the caller's order.

With a score store, batches are planned from all texts before anything is looked up, and stored whole: a run that was killed goes
on with the very batches that it lacks, and ends with the same bits. With several processes, the batches are dealt out.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import build_pack, plan_packs
from codes.common.ranks import Ranks
from codes.common.rope import RopeLimit
from codes.common.score_store import ScoreStore
from codes.common.scores import Invariance, ScoreResult, count_tied
from codes.common.settings import PACKINGS

if TYPE_CHECKING:
    from accelerate import Accelerator

# A difference between a text alone and in its batch, in standard deviations of the scores, that rounding does not explain.
ROUNDING_OF_FLOAT32 = 0.01
ROUNDING_OF_HALF = 0.25
OUT_OF_MEMORY = re.compile("out of memory|_ALLOC_FAILED|can't allocate memory", re.IGNORECASE)

Computed = tuple[list[float], int]


def default_token_budget(device: torch.device) -> int:
    """Computed tokens of a batch: enough to fill the device, few enough for a CPU's caches and a small card's memory."""
    return 4096 if device.type == "cpu" else 16384


def resolve_packing(model: torch.nn.Module, packing: str) -> str:
    """What ``auto`` means for a model: ``shared`` where it takes packs, else ``off``, with the reason on stderr.

    Raises:
        ContrastRMError: An unknown name, or packs were asked for by name and the model takes none.
    """
    if packing not in PACKINGS:
        raise ContrastRMError(f"unknown --packing {packing!r}; known: {', '.join(PACKINGS)}")
    if packing == "off":
        return packing
    enable: Callable[[], str | None] | None = getattr(model, "enable_packing", None)
    reason = "it takes no packs" if enable is None else enable()
    if reason is None:
        return "shared" if packing == "auto" else packing
    if packing != "auto":
        raise ContrastRMError(
            f"--packing {packing} is not possible with this model: {reason}; use --packing auto or off"
        )
    print(f"note: this model is computed in padded batches of similar length, not in packs: {reason}", file=sys.stderr)
    return "off"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed for want of memory: a CPU's allocator and libraries beside torch have no class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def plan_batches(lengths: Sequence[int], max_tokens: int, limit: RopeLimit | None = None) -> list[list[int]]:
    """Group indices of similar length so that rows x longest stays within a token budget.

    Args:
        lengths: Tokens of each text.
        max_tokens: Padded tokens of a batch. A single longer text gets a batch of its own.
        limit: Texts on its two sides never share a batch.

    Returns:
        Batches of indices, longest first: an out-of-memory error shows in the first batch, not in the last.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []

    def may_join(index: int, batch: Sequence[int]) -> bool:
        longest = lengths[batch[0]]
        if limit is not None and longest > limit.tokens and (limit.one_by_one or lengths[index] <= limit.tokens):
            return False
        return longest * (len(batch) + 1) <= max_tokens

    for index in order:
        if batches and may_join(index, batches[-1]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate_texts(texts: Sequence[EncodedText], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-pad to the longest text.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape ``(B, L)``, int64, and ``token_type_ids`` where the texts have them.

    Example: ids (5, 6, 7) and (8,) with pad 0 -> input_ids [[5, 6, 7], [8, 0, 0]], attention_mask [[1, 1, 1], [1, 0, 0]].
    """
    longest = max(len(text.input_ids) for text in texts)
    input_ids = torch.full((len(texts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(texts), longest), dtype=torch.long)
    for row, text in enumerate(texts):
        input_ids[row, : len(text.input_ids)] = torch.tensor(text.input_ids)
        attention_mask[row, : len(text.input_ids)] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if texts[0].token_type_ids is not None:
        types = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            types[row, : len(text.input_ids)] = torch.tensor(text.token_type_ids)
        batch["token_type_ids"] = types
    return batch


def text_bytes(text: EncodedText) -> bytes:
    """What the model sees of a text, as bytes that are the same on every machine."""
    types = text.token_type_ids or ()
    return np.array([len(text.input_ids), *text.input_ids, *types], dtype="<i8").tobytes()


class Scorer:
    """Scores conversations with a reward model.

    Args:
        model: Maps ``input_ids``, ``attention_mask`` (and ``token_type_ids``) of shape ``(B, L)`` to scores ``(B,)``; where it
            takes packs, ``input_ids`` ``(1, T)``, ``layout`` and ``ends`` to ``(n_sequences,)``.
        formatter: Its tokens.
        max_tokens_per_batch: Computed tokens of a batch; 0 takes what suits the device.
        packing: ``shared`` (prefixes computed once), ``packed`` (nothing shared), ``off`` (padded), or ``auto``.
        checked_texts: So many texts of every call are scored again alone, and the difference is reported.
        accelerator: Of a model that is being trained: its processes share the batches, and all of them must call. The model
            is the prepared one and ``packing`` what it was resolved to.

    Attributes:
        store: Where scores are looked up and kept; None computes everything.
        ranks: The processes that compute together; None is this one alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        formatter: ChatFormatter,
        *,
        max_tokens_per_batch: int = 0,
        packing: str = "auto",
        progress: bool = True,
        checked_texts: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.formatter = formatter
        self.device = next(model.parameters()).device
        self.max_tokens_per_batch = max_tokens_per_batch or default_token_budget(self.device)
        # The wrapper of a prepared model hides whether the model takes packs; that was settled before.
        self.packing = packing if accelerator else resolve_packing(model, packing)
        bare = accelerator.unwrap_model(model) if accelerator else model
        self._rope_limit: RopeLimit | None = getattr(bare, "rope_limit", None)
        self.progress = progress
        self.checked_texts = checked_texts
        self.store: ScoreStore | None = None
        self.ranks: Ranks[list[EncodedText], Computed] | None = None

    def score(self, conversations: Sequence[Conversation], description: str = "scoring") -> ScoreResult:
        """Score every conversation.

        Raises:
            ContrastRMError: A score is not finite, a text is too long under the policy ``error``, or one text alone does not
                fit into memory.
        """
        started = time.perf_counter()
        result = self.score_texts(self.formatter.encode(conversations), description)
        return replace(result, seconds=time.perf_counter() - started)

    def score_texts(self, encoded: Sequence[EncodedText], description: str = "scoring") -> ScoreResult:
        """As ``score``, of texts that are tokens already."""
        started = time.perf_counter()
        distinct = list(dict.fromkeys(text for text in encoded if not text.dropped))
        found, n_computed, n_from_store = self._score_distinct(distinct, description)
        values = dict(zip(distinct, found, strict=True))
        scores = np.array([values.get(text, np.nan) for text in encoded], dtype=np.float32)
        kept = [text for text in encoded if not text.dropped]
        numbers = {text: number for number, text in enumerate(distinct)}
        return ScoreResult(
            scores=scores,
            n_texts=len(encoded),
            n_distinct=len(distinct),
            n_truncated=sum(text.n_cut > 0 for text in kept),
            n_answer_cut=sum(text.answer_cut for text in kept),
            n_dropped=len(encoded) - len(kept),
            n_tokens=sum(len(text.input_ids) for text in distinct),
            n_computed_tokens=n_computed,
            seconds=time.perf_counter() - started,
            n_from_store=n_from_store if self.store is not None else None,
            n_tied_texts=count_tied(found),
            invariance=self.check_alone(distinct, found) if self.checked_texts and distinct else None,
            seen_as=tuple(numbers.get(text, -1) for text in encoded),
        )

    def check_alone(self, texts: Sequence[EncodedText], scores: Sequence[float]) -> Invariance:
        """Score ``checked_texts`` of the texts again, one by one and unpacked: from the shortest to the longest, evenly."""
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index].input_ids), texts[index].input_ids))
        places = np.linspace(0, len(order) - 1, min(self.checked_texts, len(order))).round().astype(int)
        chosen = [order[place] for place in places.tolist()]
        with self._evaluating():
            alone = [self._score_batch([texts[index]], packing="off")[0][0] for index in chosen]
        difference = max(abs(alone[place] - scores[index]) for place, index in enumerate(chosen))
        spread = float(np.std(scores))
        is_half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        allowed = (ROUNDING_OF_HALF if is_half else ROUNDING_OF_FLOAT32) * spread
        # Texts that all have the same score have no spread to measure by.
        allowed = max(allowed, 1e-6 * max(map(abs, scores)))
        return Invariance(len(chosen), difference, spread, difference <= allowed)

    def compute(self, rows: list[EncodedText]) -> Computed:
        """The scores of one batch, and the tokens that were computed for them."""
        with self._evaluating():
            return self._score_or_halve(rows)

    def _plan(self, texts: Sequence[EncodedText], max_tokens: int) -> list[list[int]]:
        if self.packing == "off":
            return plan_batches([len(text.input_ids) for text in texts], max_tokens, self._rope_limit)
        return plan_packs([text.input_ids for text in texts], max_tokens, share=self.packing == "shared")

    def _score_distinct(self, texts: Sequence[EncodedText], description: str) -> tuple[list[float], int, int]:
        """The score of every text, the tokens that were computed for them, and how many the store had already."""
        # Before the look-up: what has been stored must not change which texts are computed together.
        plan = self._plan(texts, self.max_tokens_per_batch)
        keys = [self.store.key(text_bytes(text)) for text in texts] if self.store is not None else []
        values: list[float | None] = [None] * len(texts)
        if self.store is not None:
            stored = self.store.look_up(keys)
            values = [stored.get(key) for key in keys]
        n_from_store = sum(value is not None for value in values)
        pending = [batch for batch in plan if any(values[index] is None for index in batch)]
        n_computed = 0
        total = sum(len(texts[index].input_ids) for batch in pending for index in batch)
        # A bar below another one (of the training) goes when it is done.
        options = {"desc": description, "unit": "tok", "unit_scale": True, "leave": None}
        with tqdm(total=total, disable=not self.progress, **options) as bar:
            work = [[texts[index] for index in batch] for batch in pending]
            for batch, (scores, computed) in zip(pending, self._compute_all(work), strict=True):
                n_computed += computed
                if self.store is not None:
                    kept = self.store.add({keys[index]: score for index, score in zip(batch, scores, strict=True)})
                    scores = [kept[keys[index]] for index in batch]
                for index, value in zip(batch, scores, strict=True):
                    values[index] = value
                bar.update(sum(len(texts[index].input_ids) for index in batch))
        return [value for value in values if value is not None], n_computed, n_from_store

    def _compute_all(self, work: Sequence[list[EncodedText]]) -> Iterator[Computed]:
        """The batches' scores in their order, by all processes of the launch."""
        if self.accelerator is not None:
            return self._compute_in_turns(work, self.accelerator)
        return map(self.compute, work) if self.ranks is None else self.ranks.map(work)

    def _compute_in_turns(self, work: Sequence[list[EncodedText]], accelerator: Accelerator) -> Iterator[Computed]:
        """The batches dealt out over the processes of a training, each of which gets all scores.

        Every rank computes in every turn, because sharded weights are gathered from all of them: one without a batch of its own
        computes the turn's last one and keeps nothing of it.
        """
        rank, world_size = accelerator.process_index, accelerator.num_processes
        offsets = np.cumsum([0, *(len(rows) for rows in work)]).tolist()
        # float64 holds float32 scores and whole numbers exactly, so that adding the zeros of other ranks changes nothing.
        values = torch.zeros(offsets[-1] + len(work), dtype=torch.float64)
        for begin in range(0, len(work), world_size):
            mine = min(begin + rank, len(work) - 1)
            scores, computed = self.compute(work[mine])
            if begin + rank < len(work):
                values[offsets[mine] : offsets[mine + 1]] = torch.tensor(scores, dtype=torch.float64)
                values[offsets[-1] + mine] = computed
        values = accelerator.reduce(values.to(self.device), reduction="sum").cpu()
        self._check_finite(values)
        found = values.tolist()
        for index in range(len(work)):
            yield found[offsets[index] : offsets[index + 1]], int(found[offsets[-1] + index])

    def _check_finite(self, scores: torch.Tensor) -> None:
        if not torch.isfinite(scores).all():
            raise ContrastRMError(
                "the model gave a score that is not finite; load it in float32 or bfloat16 (--dtype), or check its weights"
                if self.accelerator is None
                else "the model in training gives a score that is not finite: lower --learning_rate, or use --precision bf16"
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _score_or_halve(self, rows: Sequence[EncodedText]) -> Computed:
        """Score a batch; where the device's memory does not hold it, in two halves, and so on.

        Raises:
            ContrastRMError: One text alone does not fit, or other processes compute in step with this one.
        """
        try:
            return self._score_batch(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.accelerator is not None and self.accelerator.num_processes > 1:
                # Every forward pass is collective there: one more on this rank would leave the others waiting for ever.
                raise ContrastRMError(
                    f"out of memory in an evaluation between the steps: lower --max_tokens_per_batch (it is "
                    f"{self.max_tokens_per_batch}), then continue from the last checkpoint with --resume auto"
                ) from None
            if len(rows) == 1:
                raise ContrastRMError(
                    f"a text of {len(rows[0].input_ids)} tokens does not fit into the memory of {self.device}; lower "
                    "--max_length, or use --dtype bfloat16"
                ) from None
        # Outside of the except clause: there the traceback still holds the failed batch's memory.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        first, second = self._score_or_halve(rows[:middle]), self._score_or_halve(rows[middle:])
        return first[0] + second[0], first[1] + second[1]

    def _score_batch(self, rows: Sequence[EncodedText], packing: str | None = None) -> Computed:
        packing = packing or self.packing
        # Tensors made in inference mode (gathered weights that stay, rotary caches) could not be trained with afterwards.
        with torch.inference_mode() if self.accelerator is None else torch.no_grad():
            if packing == "off":
                pad_id = self.formatter.tokenizer.pad_token_id
                batch = collate_texts(rows, 0 if pad_id is None else pad_id)
                n_computed = batch["input_ids"].numel()
                scores = self.model(**{key: value.to(self.device) for key, value in batch.items()})
            else:
                pack = build_pack(
                    [row.input_ids for row in rows],
                    share=packing == "shared",
                    multiple_of=FLEX_BLOCK if self.device.type == "cuda" else 1,
                ).to(self.device)
                n_computed = pack.layout.n_tokens
                scores = self.model(pack.input_ids, layout=pack.layout, ends=pack.ends)
            scores = scores.float().cpu()
        if self.accelerator is None:
            # In a training all ranks must stop together, once the scores have met.
            self._check_finite(scores)
        return scores.tolist(), n_computed
