"""Bounds, constraints and budgets: fixed values, apart from the measurements made against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import inf, isfinite
from numbers import Real
from typing import TYPE_CHECKING, NoReturn

from cgmq_fx.cost_models.errors import BudgetError
from cgmq_fx.cost_models.facts import FLOAT_BITS
from cgmq_fx.cost_models.model import CostModel

if TYPE_CHECKING:
    from cgmq_fx.cost_models.parse import BudgetLike


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound.

    Attributes:
        value: In the unit of the cost model, or a fraction if `relative`.
        relative: Whether it is a share of the same graph at `base` bits (0.004 is 0.4 %).
        base: The uniform bit-width that a relative bound refers to, 32 or 8.
        reference: The cost of the model at `base` bits, once a model is known; it stays the same
            when a finished graph has lost the quantizers of what stays float.

    Raises:
        BudgetError: If the value is not a positive, finite number, the base is neither 32 nor 8, or
            the reference is negative or not finite.
    """

    value: float
    relative: bool = False
    base: int = FLOAT_BITS
    reference: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.reference is not None and not (isfinite(self.reference) and self.reference >= 0):
            raise BudgetError(f"a bound cannot refer to a cost of {self.reference:g}")
        if self.base not in (8, FLOAT_BITS):
            raise BudgetError(f"a bound is relative to 32 or 8 bits, not {self.base}")
        if not isinstance(self.value, Real) or isinstance(self.value, bool):
            raise BudgetError(f"a bound is a number, not {self.value!r}; text is read by a budget")
        object.__setattr__(self, "value", _as_float(self.value))
        if not isfinite(self.value) or self.value <= 0:
            raise BudgetError(
                f"a bound must be a positive, finite number, not {self.value:g}; no model has a "
                "cost of zero or less, and a bound that is not a number bounds nothing"
            )

    def limit(self, reference: float) -> float:
        """The bound in the unit of the cost model, given the cost at `base` bits."""
        return self.value * reference if self.relative else self.value


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # of a whole number
        return inf if number > 0 else -inf


@dataclass(frozen=True, slots=True)
class Constraint:
    """A cost model and an upper bound.

    Attributes:
        model: What is counted.
        bound: How much it may be at most.
        scope: Counts only layers whose module path or node name matches this glob pattern.
    """

    model: CostModel
    bound: Bound
    scope: str | None = None

    @property
    def name(self) -> str:
        """The cost's name, with its scope in brackets."""
        return self.model.name if self.scope is None else f"{self.model.name}[{self.scope}]"

    @property
    def base(self) -> str:
        """What a relative bound refers to: the cost's name, and the bits of everything."""
        return f"{self.name} of {self.bound.base} bits"

    def __str__(self) -> str:
        """The string form that a budget is read from, exact: it reads back as the same bound."""
        exact = Decimal(repr(float(self.bound.value)))
        if self.bound.relative:
            return f"{self.name} <= {_plain(exact.scaleb(2))}%{_base(self.bound)}"
        return f"{self.name} <= {_plain(exact)} {self.model.unit}".rstrip()

    def __and__(self, other: BudgetLike) -> Budget:
        return Budget((self,)) & other

    def __rand__(self, other: BudgetLike) -> Budget:
        return other & Budget((self,))

    def __bool__(self) -> NoReturn:
        raise _neither()


def _neither() -> BudgetError:
    """What is wrong with a bound where Python asks for true or false, as in `a and b`."""
    return BudgetError(
        'a bound is neither true nor false; join bounds with & or a comma: Python\'s "and" would '
        "keep only the last one"
    )


def _base(bound: Bound) -> str:
    """What follows the share of a bound: nothing where it is of 32 bits, as most are."""
    return "" if bound.base == FLOAT_BITS else f" of {bound.base} bits"


def _plain(number: Decimal) -> str:
    """The shortest way to write `number`, without an exponent where that is readable."""
    number = number.normalize()
    return f"{number:f}" if -12 < number.adjusted() < 12 else f"{number}"


@dataclass(frozen=True, slots=True)
class Budget:
    """A conjunction of constraints; satisfied when all are.

    Raises:
        BudgetError: If it is empty, or if two constraints bound the same cost in the same way.
    """

    constraints: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not self.constraints:
            raise BudgetError('the budget is empty; give at least one bound, such as "bops <= 1%"')
        seen: set[tuple[str, bool, int]] = set()
        for constraint in self.constraints:
            key = (constraint.name, constraint.bound.relative, constraint.bound.base)
            if key in seen:
                raise BudgetError(f"the budget bounds {key[0]!r} twice; keep the smaller bound")
            seen.add(key)

    def __iter__(self) -> Iterator[Constraint]:
        return iter(self.constraints)

    def __len__(self) -> int:
        return len(self.constraints)

    def __str__(self) -> str:
        return ", ".join(map(str, self.constraints))

    def referring_to(self, references: Sequence[float]) -> Budget:
        """The same budget for one model, whose costs at the bounds' bases are `references`."""
        pairs = zip(self.constraints, references, strict=True)
        return Budget(tuple(replace(c, bound=replace(c.bound, reference=r)) for c, r in pairs))

    @property
    def references(self) -> dict[str, float]:
        """What the relative bounds refer to, where that is known, by `Constraint.base`."""
        pairs = ((c.base, c.bound.reference) for c in self.constraints if c.bound.relative)
        return {base: reference for base, reference in pairs if reference is not None}

    def with_references(self, known: Mapping[str, float]) -> Budget:
        """The same budget with these references, by `Constraint.base`, and no others."""
        bounds = [replace(c.bound, reference=known.get(c.base)) for c in self.constraints]
        pairs = zip(self.constraints, bounds, strict=True)
        return Budget(tuple(replace(c, bound=bound) for c, bound in pairs))

    def __and__(self, other: BudgetLike) -> Budget:
        from cgmq_fx.cost_models.parse import parse_budget

        return Budget(self.constraints + parse_budget(other).constraints)

    def __rand__(self, other: BudgetLike) -> Budget:
        from cgmq_fx.cost_models.parse import parse_budget

        return parse_budget(other) & self

    def __bool__(self) -> NoReturn:
        raise _neither()


@dataclass(frozen=True, slots=True)
class ConstraintState:
    """One measurement of a constraint.

    Attributes:
        constraint: What was measured.
        value: The cost, in the unit of the cost model.
        limit: The bound, in the same unit.
        reference: The cost of the same graph at the bound's base, 32 bits unless it says so.
    """

    constraint: Constraint
    value: float
    limit: float
    reference: float

    @property
    def satisfied(self) -> bool:
        """Whether the cost is at most the bound, without any tolerance."""
        return self.value <= self.limit

    @property
    def relative(self) -> float:
        """The cost as a share of the reference (0 where that costs nothing)."""
        return self.value / self.reference if self.reference else 0.0

    @property
    def amounts(self) -> tuple[str, str, str]:
        """Name, cost and bound as text: shares of the reference, or amounts with a unit."""
        name, unit, bound = self.constraint.name, self.constraint.model.unit, self.constraint.bound
        if bound.relative:
            return name, f"{self.relative:.4%}", f"{bound.value:.4%}{_base(bound)}"
        return name, f"{self.value:.6g}", f"{self.limit:.6g} {unit}".rstrip()

    def __str__(self) -> str:
        name, value, bound = self.amounts
        return f"{name} {value} {'<=' if self.satisfied else '> (VIOLATED)'} {bound}"
