"""What is minimised: the losses as pure functions over flat scores, and the objective that a run's settings choose among them.

Rows of a group stand together as ``[rejected_1 ... rejected_n, chosen]``; ``group_sizes`` says how many rows each group
has. Every function returns one loss per group, so that the caller can normalise by the global number of groups in a step.

``weights`` and ``margins`` give every row a number of its own (``(N,)``); those of the chosen rows are not read. With
``z_j = s_c - s_j - m_j`` for the rejected answer j, the one-negative case at T = 1 is the same in ``contrastive_loss`` and
``bradley_terry_loss``, whatever the margins and the label smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from codes.common.errors import ContrastRMError
from codes.train.settings import ORIGINAL, Objective


class Answers(Protocol):
    """What the objective reads of a group beside its scores; parallel to its rejected answers."""

    @property
    def bias_types(self) -> Sequence[str | None]:
        """The bias injected into each; None: none."""

    @property
    def margins(self) -> Sequence[float | None]:
        """The record's own margins; empty: none."""


def _group_layout(scores: torch.Tensor, group_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row -> group index ``(N,)`` and position of each group's chosen row ``(G,)``.

    The layout is built on the device of ``group_sizes``: kept on the CPU (as the collator makes it) it is checked there and
    costs no wait for the accelerator.
    """
    if group_sizes.ndim != 1 or scores.ndim != 1:
        raise ValueError(
            f"scores and group_sizes must be flat, not {tuple(scores.shape)} and {tuple(group_sizes.shape)}"
        )
    n_rows, n_groups = scores.shape[0], group_sizes.shape[0]
    if group_sizes.device.type == "cpu":
        if int(group_sizes.sum()) != n_rows:
            raise ValueError(f"group_sizes add up to {int(group_sizes.sum())}, but there are {n_rows} scores")
        if n_groups and int(group_sizes.min()) < 2:
            raise ValueError("every group needs its chosen and at least one rejected answer")
    groups = torch.arange(n_groups, device=group_sizes.device)
    index = torch.repeat_interleave(groups, group_sizes, output_size=n_rows)
    chosen = torch.cumsum(group_sizes, dim=0) - 1
    return index.to(scores.device, non_blocking=True), chosen.to(scores.device, non_blocking=True)


def _check_rows(scores: torch.Tensor, label_smoothing: float, *rows: torch.Tensor | None) -> None:
    for row in rows:
        if row is not None and row.shape != scores.shape:
            raise ValueError(f"weights and margins need one number a score: {tuple(row.shape)}, {tuple(scores.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")


def _sum_rows(values: torch.Tensor, index: torch.Tensor, n_groups: int) -> torch.Tensor:
    return torch.zeros(n_groups, dtype=values.dtype, device=values.device).index_add(0, index, values)


def _is_rejected(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``(N,)`` bool."""
    return torch.ones_like(scores, dtype=torch.bool).index_fill(0, chosen, False)


def contrastive_loss(
    scores: torch.Tensor,
    group_sizes: torch.Tensor,
    temperature: float,
    *,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of the chosen answer among all answers of its group (InfoNCE).

    ``-log( exp(s_c / T) / (exp(s_c / T) + sum_j w_j exp((s_j + m_j) / T)) )`` over the rejected answers j. A weight
    multiplies the answer's exponential term (it adds ``log w`` to its logit): 2 counts it twice, 0 leaves it out. A margin,
    in units of the score, is the lead that the chosen answer must have before the answer counts as little as one without.
    With a single rejected answer, T = 1, no weight and no margin this is the Bradley-Terry loss ``-log sigmoid(s_c - s_r)``.

    Label smoothing e: with probability e the target is one of the rejected answers, drawn in proportion to their weights:
    adds ``e * (s_c / T - sum_j w_j (s_j + m_j) / T / sum_j w_j)``.

    Args:
        scores: ``(N,)``, groups one after another, the chosen row last in its group.
        group_sizes: ``(G,)`` int64, each >= 2, summing to N.
        temperature: T > 0.
        weights: ``(N,)``, >= 0; None: all 1.
        margins: ``(N,)``; None: all 0.
        label_smoothing: e, in [0, 1).

    Returns:
        ``(G,)`` in the dtype of ``scores``.

    Raises:
        ValueError: T <= 0, or sizes that do not fit (checked where ``group_sizes`` is on the CPU).
    Source: arXiv 2603.08091 (contrastive debiasing objective); van den Oord et al. 2018, equation 4.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    _check_rows(scores, label_smoothing, weights, margins)
    index, chosen = _group_layout(scores, group_sizes)
    n_groups = group_sizes.shape[0]
    plain = scores / temperature
    if margins is not None:
        plain = plain + (margins / temperature).index_fill(0, chosen, 0.0)
    logits = plain
    if weights is not None:
        weights = weights.index_fill(0, chosen, 1.0)
        logits = plain + torch.log(weights)  # log 0 leaves the answer out: its exponential is 0, and so is its gradient
    highest = torch.full((n_groups,), -torch.inf, dtype=logits.dtype, device=logits.device)
    # The maximum only shifts the exponent: its gradient cancels, so it is taken as a constant.
    highest = highest.scatter_reduce(0, index, logits.detach(), reduce="amax")
    sums = _sum_rows(torch.exp(logits - highest[index]), index, n_groups)
    losses = torch.log(sums) + highest - logits[chosen]
    if not label_smoothing:
        return losses
    shares = _is_rejected(scores, chosen).to(scores.dtype)
    if weights is not None:
        shares = shares * weights
    total = _sum_rows(shares, index, n_groups)
    # Where all weights are 0 no answer is left that the target could be.
    mean = _sum_rows(plain * shares, index, n_groups) / total.clamp(min=torch.finfo(scores.dtype).tiny)
    return losses + label_smoothing * torch.where(total > 0, plain[chosen] - mean, torch.zeros_like(losses))


def margin_loss(
    scores: torch.Tensor,
    group_sizes: torch.Tensor,
    margin: float,
    *,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Hinge on the score gap: mean over the group's rejected answers of ``w_j max(0, m_j - (s_c - s_j))``.

    The mean divides by the number of rejected answers, not by the sum of the weights: a weight of 2 doubles what an answer
    adds, 0 makes it count as one that is already far enough below. Label smoothing e is the expected loss when a share e of
    the pairs is labelled the wrong way round: ``(1 - e) max(0, m - gap) + e max(0, m + gap)``.

    Args:
        scores: ``(N,)``, groups one after another, the chosen row last in its group.
        group_sizes: ``(G,)`` int64, each >= 2, summing to N.
        margin: The hinge constant, >= 0.
        weights: ``(N,)``, >= 0; None: all 1.
        margins: ``(N,)``, in place of ``margin``.
        label_smoothing: e, in [0, 1).

    Returns:
        ``(G,)`` in the dtype of ``scores``.

    Raises:
        ValueError: margin < 0, or sizes that do not fit (checked where ``group_sizes`` is on the CPU).
    Source: arXiv 2603.08091 (pairwise ablation, margin 1).
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, not {margin}")
    _check_rows(scores, label_smoothing, weights, margins)
    index, chosen = _group_layout(scores, group_sizes)
    gap = scores[chosen][index] - scores
    wanted = margin if margins is None else margins
    hinge = torch.clamp(wanted - gap, min=0)
    if label_smoothing:
        hinge = (1 - label_smoothing) * hinge + label_smoothing * torch.clamp(wanted + gap, min=0)
    return _mean_of_rejected(hinge, index, chosen, group_sizes, weights)


def bradley_terry_loss(
    scores: torch.Tensor,
    group_sizes: torch.Tensor,
    margin: float,
    *,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Log-sigmoid of the score gap: mean over the group's rejected answers of ``-w_j log sigmoid(s_c - s_j - m_j)``.

    Label smoothing e: ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)`` with ``z = s_c - s_j - m_j``. Arguments, mean and
    errors as in ``margin_loss``.

    Source: Bradley & Terry 1952; the margin: Touvron et al. 2023 (Llama 2), equation 2.
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, not {margin}")
    _check_rows(scores, label_smoothing, weights, margins)
    index, chosen = _group_layout(scores, group_sizes)
    z = scores[chosen][index] - scores - (margin if margins is None else margins)
    losses = -logsigmoid(z)
    if label_smoothing:
        losses = losses + label_smoothing * z  # -log sigmoid(-z) = z - log sigmoid(z)
    return _mean_of_rejected(losses, index, chosen, group_sizes, weights)


def _mean_of_rejected(
    values: torch.Tensor,
    index: torch.Tensor,
    chosen: torch.Tensor,
    group_sizes: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    values = values if weights is None else values * weights
    # A chosen row compared with itself would add the bare margin.
    sums = _sum_rows(values.index_fill(0, chosen, 0.0), index, group_sizes.shape[0])
    return sums / (group_sizes.to(values.device, non_blocking=True) - 1)


def centering_loss(scores: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Pull towards scores around 0: mean over the group's rejected answers of ``(s_c + s_j)^2``.

    With one rejected answer this is what TRL's ``center_rewards_coefficient`` multiplies. Preferences do not say where 0
    lies; this does, without a word on the gaps.

    Returns:
        ``(G,)`` in the dtype of ``scores``.

    Raises:
        ValueError: Sizes that do not fit (checked where ``group_sizes`` is on the CPU).
    Source: Eisenstein et al. 2023 (arXiv 2312.09244).
    """
    index, chosen = _group_layout(scores, group_sizes)
    return _mean_of_rejected((scores[chosen][index] + scores).square(), index, chosen, group_sizes, None)


def objective_loss(
    objective: Objective,
    scores: torch.Tensor,
    group_sizes: torch.Tensor,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
) -> torch.Tensor:
    """One loss per group, ``(G,)``: the one that the settings name, and ``centering`` times ``centering_loss``.

    Args:
        scores: ``(N,)``, groups one after another, the chosen row last in its group.
        group_sizes: ``(G,)`` int64.
        weights, margins: ``(N,)`` as ``row_weights_and_margins`` makes them; None: all alike.
    """
    options: dict[str, Any] = {
        "weights": weights,
        "margins": margins,
        "label_smoothing": objective.label_smoothing,
    }
    if objective.mode == "contrastive":
        losses = contrastive_loss(scores, group_sizes, objective.temperature, **options)
    elif objective.pairwise_loss == "hinge":
        losses = margin_loss(scores, group_sizes, objective.margin, **options)
    else:
        losses = bradley_terry_loss(scores, group_sizes, objective.margin, **options)
    if objective.centering:
        losses = losses + objective.centering * centering_loss(scores, group_sizes)
    return losses


def group_losses(
    objective: Objective, scores: torch.Tensor, group_sizes: torch.Tensor, groups: Sequence[Answers]
) -> torch.Tensor:
    """``objective_loss`` with the weights and margins of these groups."""
    weights, margins = (
        None if row is None else row.to(scores.device, scores.dtype, non_blocking=True)
        for row in row_weights_and_margins(objective, groups)
    )
    return objective_loss(objective, scores, group_sizes, weights, margins)


def row_weights_and_margins(
    objective: Objective, groups: Sequence[Answers]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights and margins of all rows, ``(N,)`` float32 each; None where all rows are alike.

    A chosen row gets weight 1 and margin 0; neither is read.

    Example: two rejected answers, the second one with a length cue, under ``bias_weights={"length": 2.0}`` -> weights
    [1, 2, 1], margins None.
    """
    weights: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    if objective.bias_weights:
        weights = _row_tensor(
            [*(objective.bias_weights.get(bias or ORIGINAL, 1.0) for bias in group.bias_types), 1.0] for group in groups
        )
    has_row_margins = objective.row_margins == "use" and any(
        margin is not None for group in groups for margin in group.margins
    )
    if objective.bias_margins or has_row_margins:
        margins = _row_tensor([*_margins(objective, group), 0.0] for group in groups)
    return weights, margins


def _margins(objective: Objective, group: Answers) -> list[float]:
    base = objective.margin if objective.mode == "pairwise" else 0.0
    own = group.margins if objective.row_margins == "use" and group.margins else (None,) * len(group.bias_types)
    return [
        (base if margin is None else margin) + objective.bias_margins.get(bias or ORIGINAL, 0.0)
        for margin, bias in zip(own, group.bias_types, strict=True)
    ]


def _row_tensor(rows: Any) -> torch.Tensor:
    return torch.from_numpy(np.array([number for row in rows for number in row], dtype=np.float32))


def check_an_answer_counts(objective: Objective, biases: Mapping[str, int]) -> None:
    """Refuse weights under which no answer counts.

    Args:
        biases: How many rejected answers the groups have of each bias (``original``: of none).

    Raises:
        ContrastRMError: Every one of them has weight 0.
    """
    present = [name for name, count in biases.items() if count]
    if present and all(objective.bias_weights.get(name, 1.0) == 0 for name in present):
        raise ContrastRMError(
            f"--bias_weights gives weight 0 to every rejected answer of the data ({', '.join(sorted(present))}): "
            "nothing would be learned; give at least one of them a weight above 0"
        )


def without_effect(objective: Objective, biases: Mapping[str, int], *, n_margins: int) -> list[str]:
    """Settings that can change nothing on this data, each with the reason.

    Args:
        biases: As in ``check_an_answer_counts``.
        n_margins: Rejected answers that have a margin of their own.
    """
    idle = []
    for option, numbers, neutral in (
        ("bias_weights", objective.bias_weights, 1.0),
        ("bias_margins", objective.bias_margins, 0.0),
    ):
        absent = [name for name, number in numbers.items() if number != neutral and not biases.get(name)]
        if absent:
            has = ", ".join(sorted(name for name, count in biases.items() if count))
            idle.append(
                f"--{option} of {', '.join(absent)}: training sees no such answers (it sees {has}; --negatives original "
                "leaves the others out)"
            )
    if objective.row_margins == "ignore" and not n_margins:
        idle.append("--row_margins ignore: no record has a margin")
    return idle
