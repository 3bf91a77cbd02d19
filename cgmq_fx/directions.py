"""Directions: how fast each gate moves, and which way.

A direction is exchangeable: subclass `Direction`. It says how eagerly each gate should fall while a
constraint is violated, and how eagerly it should rise while all hold; the controller makes speeds
of that, free of any scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.passes.kernel import Statistic

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class GateView:
    """What a direction may look at, one entry per gate, all gates in one row.

    Attributes:
        rows: Shape (rows of the statistic, gates): the newest statistic, as `Statistic` says; on a
            device other than the CPU that of the step before.
        sensitivity: Smoothed loss per squared step, see `Direction.sensitivity`; where
            distortions are measured, per unit of these.
        loss_down: Estimated loss that one level less would add.
        loss_up: Estimated loss that one level more would save.
        cost_down: Cost that one level less would free, as a share of the violated bounds.
        cost_up: Cost that one level more would take, as a share of all bounds.
        change: Difference of the squared steps of the adjacent level and the current one.
        elements: Elements of the tensor per gate.
    """

    rows: Tensor
    sensitivity: Tensor
    loss_down: Tensor
    loss_up: Tensor
    cost_down: Tensor
    cost_up: Tensor
    change: Tensor
    elements: Tensor


class Direction(ABC):
    """Which way gates move.

    Attributes:
        name: What options call it.
        statistic: What it needs from the backward pass.
        measured: Whether the distortion of the output that each quantizer's bit-widths cause is
            measured at calibration. It then tells what a quantizer as a whole is worth, and
            `sensitivity` how that is shared by its gates.
    """

    name: ClassVar[str]
    statistic: ClassVar[Statistic]
    measured: ClassVar[bool] = False

    @abstractmethod
    def fall(self, view: GateView) -> Tensor:
        """How eagerly each gate falls while a constraint is violated: positive, any scale."""

    @abstractmethod
    def rise(self, view: GateView) -> Tensor:
        """How eagerly each gate rises while all constraints hold: not negative, any scale."""

    @abstractmethod
    def sensitivity(self, view: GateView) -> Tensor:
        """This step's estimate of the loss that a unit of squared step costs, not negative.

        The controller smooths it over steps; the loss of an assignment is then taken as the sum of
        sensitivity times squared step (where distortions are measured, of these as shared by the
        gates of a quantizer), which is what the projection keeps low.
        """


@final
class Marginal(Direction):
    """The default: the loss that a level adds against the cost that it frees.

    What a quantizer as a whole is worth is measured at calibration (`distortion.py`). How that is
    shared by its gates, the empirical Fisher information along the very move to the adjacent
    bit-width tells, `sum (gradient * change)^2`, which grows with the squared step.
    A gate falls the faster the less loss it adds per cost freed in the violated constraints, and
    rises the faster the more loss it saves per cost taken.
    """

    name = "marginal"
    statistic = Statistic.CHANGE
    measured = True

    def fall(self, view: GateView) -> Tensor:
        """Cost freed per loss added."""
        return view.cost_down / view.loss_down.clamp(min=_TINY)

    def rise(self, view: GateView) -> Tensor:
        """Loss saved per cost taken."""
        return view.loss_up / view.cost_up.clamp(min=_TINY)

    def sensitivity(self, view: GateView) -> Tensor:
        """The estimated loss of the move, per difference of squared steps."""
        return view.rows[0] / view.change.clamp(min=_TINY)


class _Paper(Direction):
    """The rules of the paper: reciprocal saliency down, saliency up (arXiv 2409.20138)."""

    statistic = Statistic.MAGNITUDES

    @abstractmethod
    def saliency(self, view: GateView) -> Tensor:
        """The saliency of each gate."""

    def fall(self, view: GateView) -> Tensor:
        """The reciprocal of the saliency."""
        return 1 / self.saliency(view).clamp(min=_TINY)

    def rise(self, view: GateView) -> Tensor:
        """The saliency."""
        return self.saliency(view)

    def sensitivity(self, view: GateView) -> Tensor:
        """Squared mean gradient times elements: the loss of independent errors of unit size."""
        return view.rows[0].square() * view.elements


@final
class Gradient(_Paper):
    """Saliency: magnitude of the gradient."""

    name = "gradient"

    def saliency(self, view: GateView) -> Tensor:
        """`|gradient|`."""
        return view.rows[0]


@final
class GradientPlusMagnitude(_Paper):
    """Saliency: magnitude of the gradient plus magnitude of the value."""

    name = "gradient+magnitude"

    def saliency(self, view: GateView) -> Tensor:
        """`|gradient| + |value|`."""
        return view.rows[0] + view.rows[1]


@final
class GradientTimesMagnitude(_Paper):
    """Saliency: magnitude of the gradient times magnitude of the value."""

    name = "gradient*magnitude"

    def saliency(self, view: GateView) -> Tensor:
        """`|gradient| * |value|`."""
        return view.rows[2]


DIRECTIONS: dict[str, type[Direction]] = {
    d.name: d for d in (Marginal, Gradient, GradientPlusMagnitude, GradientTimesMagnitude)
}


def direction_of(direction: str | Direction) -> Direction:
    """A direction by name, or the object itself.

    Raises:
        OptionError: If no direction has that name.
    """
    if isinstance(direction, Direction):
        return direction
    if not isinstance(direction, str) or direction not in DIRECTIONS:
        raise OptionError(
            f"there is no direction {direction!r}; known are {', '.join(DIRECTIONS)}, and you can "
            "give a Direction of your own"
        )
    return DIRECTIONS[direction]()


def speeds(eagerness: Tensor, slowest: float) -> Tensor:
    """Eagerness on any scale to speeds in (slowest, 1): the median gate gets the middle.

    Args:
        eagerness: Shape (gates,), not negative.
        slowest: Least speed.
    """
    finite = torch.nan_to_num(eagerness, nan=0.0, posinf=1e30).clamp(min=0.0)
    middle = finite.median() if finite.numel() else finite.sum()
    share = (finite / (finite + middle)).nan_to_num_(nan=0.0)  # 0 / 0 where nothing is eager
    return slowest + (1 - slowest) * share
