"""What is minimised: the loss of a run, with its per-bias weights and margins, as one value that a checkpoint can name.

Used by ``python -m codes.train.train_reward_model`` (``--mode contrastive|pairwise`` and the flags of ``Objective``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from codes.common.biases import INJECTABLE
from codes.common.cli import non_negative_float
from codes.common.errors import ContrastRMError
from codes.common.records import LARGEST_MARGIN
from codes.train.losses import bradley_terry_loss, centering_loss, contrastive_loss, margin_loss

MODES = ("contrastive", "pairwise")
PAIRWISE_LOSSES = ("hinge", "bradley_terry")
ROW_MARGINS = ("use", "ignore")
# How a rejected answer without an injected bias is called where biases get numbers.
ORIGINAL = "original"


class Answers(Protocol):
    """What the objective reads of a group beside its scores; parallel to its rejected answers."""

    @property
    def bias_types(self) -> Sequence[str | None]:
        """The bias injected into each; None: none."""

    @property
    def margins(self) -> Sequence[float | None]:
        """The record's own margins; empty: none."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, per group of one chosen answer c and rejected answers j.

    ``contrastive``: ``losses.contrastive_loss`` with w_j and m_j. ``pairwise``: ``losses.margin_loss`` (``hinge``) or
    ``losses.bradley_terry_loss`` with w_j and m_j. ``centering * losses.centering_loss`` is added to each.

    The weight of an answer is ``w_j = bias_weights[its bias]``, 1 where none is given. Its margin is
    ``m_j = base_j + bias_margins[its bias]`` (0 where none is given) in units of the score; ``base_j`` is the record's own
    ``margin`` where it has one, else ``margin`` in pairwise mode and 0 in contrastive mode. ``original`` names the answers
    into which no bias was injected.

    Attributes:
        temperature: Of the contrastive loss.
        margin: Of the pairwise losses, for answers without a margin in their record.
        row_margins: ``use`` or ``ignore`` the ``margin`` of records.
        centering: Coefficient of the mean squared sum of the two scores of a pair.
        label_smoothing: In [0, 1).
    """

    mode: str
    temperature: float
    margin: float
    pairwise_loss: str = "hinge"
    bias_weights: Mapping[str, float] = field(default_factory=dict)
    bias_margins: Mapping[str, float] = field(default_factory=dict)
    row_margins: str = "use"
    centering: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for value, known in (
            (self.mode, MODES),
            (self.pairwise_loss, PAIRWISE_LOSSES),
            (self.row_margins, ROW_MARGINS),
        ):
            if value not in known:
                raise ContrastRMError(f"unknown choice {value!r} in the objective; known: {', '.join(known)}")

    def check_against(self, biases: Mapping[str, int]) -> None:
        """Refuse weights under which no answer counts.

        Args:
            biases: How many rejected answers the groups have of each bias (``original``: of none).

        Raises:
            ContrastRMError: Every one of them has weight 0.
        """
        present = [name for name, count in biases.items() if count]
        if present and all(self.bias_weights.get(name, 1.0) == 0 for name in present):
            raise ContrastRMError(
                f"--bias_weights gives weight 0 to every rejected answer of the data ({', '.join(sorted(present))}): "
                "nothing would be learned; give at least one of them a weight above 0"
            )

    def without_effect(self, biases: Mapping[str, int], *, n_margins: int) -> list[str]:
        """Settings that can change nothing on this data, each with the reason.

        Args:
            biases: As in ``check_against``.
            n_margins: Rejected answers that have a margin of their own.
        """
        found = []
        for option, numbers, neutral in (
            ("bias_weights", self.bias_weights, 1.0),
            ("bias_margins", self.bias_margins, 0.0),
        ):
            absent = [name for name, number in numbers.items() if number != neutral and not biases.get(name)]
            if absent:
                has = ", ".join(sorted(name for name, count in biases.items() if count))
                found.append(
                    f"--{option} of {', '.join(absent)}: training sees no such answers (it sees {has}; --negatives original "
                    "leaves the others out)"
                )
        if self.row_margins == "ignore" and not n_margins:
            found.append("--row_margins ignore: no record has a margin")
        return found

    def loss(
        self,
        scores: torch.Tensor,
        group_sizes: torch.Tensor,
        weights: torch.Tensor | None = None,
        margins: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One loss per group, ``(G,)``.

        Args:
            scores: ``(N,)``, groups one after another, the chosen row last in its group.
            group_sizes: ``(G,)`` int64.
            weights, margins: ``(N,)`` as ``row_numbers`` makes them; None: all alike.
        """
        options: dict[str, Any] = {
            "weights": weights,
            "margins": margins,
            "label_smoothing": self.label_smoothing,
        }
        if self.mode == "contrastive":
            losses = contrastive_loss(scores, group_sizes, self.temperature, **options)
        elif self.pairwise_loss == "hinge":
            losses = margin_loss(scores, group_sizes, self.margin, **options)
        else:
            losses = bradley_terry_loss(scores, group_sizes, self.margin, **options)
        if self.centering:
            losses = losses + self.centering * centering_loss(scores, group_sizes)
        return losses

    def group_losses(self, scores: torch.Tensor, group_sizes: torch.Tensor, groups: Sequence[Answers]) -> torch.Tensor:
        """``loss`` with the weights and margins of these groups."""
        weights, margins = (
            None if row is None else row.to(scores.device, scores.dtype, non_blocking=True)
            for row in self.row_numbers(groups)
        )
        return self.loss(scores, group_sizes, weights, margins)

    def row_numbers(self, groups: Sequence[Answers]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights and margins of all rows, ``(N,)`` float32 each; None where all rows are alike.

        A chosen row gets weight 1 and margin 0; neither is read.
        """
        weights: torch.Tensor | None = None
        margins: torch.Tensor | None = None
        if self.bias_weights:
            weights = _row_tensor(
                [*(self.bias_weights.get(bias or ORIGINAL, 1.0) for bias in group.bias_types), 1.0] for group in groups
            )
        has_row_margins = self.row_margins == "use" and any(
            margin is not None for group in groups for margin in group.margins
        )
        if self.bias_margins or has_row_margins:
            margins = _row_tensor([*self._margins(group), 0.0] for group in groups)
        return weights, margins

    def _margins(self, group: Answers) -> list[float]:
        base = self.margin if self.mode == "pairwise" else 0.0
        own = group.margins if self.row_margins == "use" and group.margins else (None,) * len(group.bias_types)
        return [
            (base if margin is None else margin) + self.bias_margins.get(bias or ORIGINAL, 0.0)
            for margin, bias in zip(own, group.bias_types, strict=True)
        ]


def _row_tensor(rows: Any) -> torch.Tensor:
    return torch.from_numpy(np.array([number for row in rows for number in row], dtype=np.float32))


def bias_numbers(text: str) -> dict[str, float]:
    """Argparse type: ``length=2,authority=0.5`` -> numbers of at least 0; an empty text gives none."""
    numbers: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in (*INJECTABLE, ORIGINAL):
            raise argparse.ArgumentTypeError(f"unknown bias {name!r}; known: {', '.join((*INJECTABLE, ORIGINAL))}")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} has no number; write {name}=2")
        if name in numbers:
            raise argparse.ArgumentTypeError(f"{name} stands there twice")
        numbers[name] = non_negative_float(value)
        if numbers[name] > LARGEST_MARGIN:
            raise argparse.ArgumentTypeError(f"{value} is more than {LARGEST_MARGIN:.0f}")
    return numbers


def share_below_one(text: str) -> float:
    """Argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1 or math.isnan(value):
        raise argparse.ArgumentTypeError(f"{value} does not lie in [0, 1)")
    return value


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that refine the two objectives."""
    group = parser.add_argument_group("objective")
    group.add_argument("--pairwise_loss", choices=PAIRWISE_LOSSES, default="hinge", help="pairwise mode")
    group.add_argument(
        "--bias_weights", type=bias_numbers, default={}, help="weights of rejected answers: length=2,original=0.5"
    )
    group.add_argument(
        "--bias_margins", type=bias_numbers, default={}, help="added to the margin of rejected answers: length=0.5"
    )
    group.add_argument("--row_margins", choices=ROW_MARGINS, default="use", help="a record's own 'margin'")
    group.add_argument("--centering", type=non_negative_float, default=0.0, help="pulls scores towards 0; 0: off")
    group.add_argument("--label_smoothing", type=share_below_one, default=0.0)


def take_objective(options: dict[str, Any]) -> Objective:
    """Take the objective's options out of the parsed command line."""
    names = Objective.__dataclass_fields__
    return Objective(**{name: options.pop(name) for name in tuple(options) if name in names})
