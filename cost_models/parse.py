"""Reading budgets: strings, mappings and constraint objects become one `Budget`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from cgmq_fx.cost_models.constraint import Bound, Budget, Constraint
from cgmq_fx.cost_models.errors import BudgetError
from cgmq_fx.cost_models.model import CostModel, cost_model

if TYPE_CHECKING:
    import pint

BoundLike: TypeAlias = "float | str | Bound"
BudgetLike: TypeAlias = "str | Mapping[str, BoundLike] | Constraint | Budget | Iterable[Constraint]"

_MAX_LENGTH = 10_000
_CLAUSE = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|<|≤)\s*([^<>=≤]+)")
_QUANTITY = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)\s*([%A-Za-zµ/]*)\s*"
)
_PREFIX = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_budget(budget: BudgetLike) -> Budget:
    """Read a budget.

    Args:
        budget: A string (`"bops <= 0.4%, weights <= 64 KiB"`), a mapping (`{"bops": "0.4%"}`), a
            constraint (`BOPs() <= 2e6`), several of them, or a `Budget`.

    Returns:
        The budget.

    Raises:
        BudgetError: If it cannot be read; the message says which part and what is expected.
        UnknownCostError: If it names a cost that is not registered.
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, Constraint):
        return Budget((budget,))
    if isinstance(budget, str):
        return _parse_string(budget)
    if isinstance(budget, Mapping):
        return Budget(tuple(cost_model(str(k)) <= v for k, v in budget.items()))
    if isinstance(budget, Iterable):
        constraints = tuple(budget)
        if all(isinstance(c, Constraint) for c in constraints):
            return Budget(constraints)
    raise BudgetError(
        f"cannot read a budget from {type(budget).__name__}; give a string such as "
        '"bops <= 0.4%, weights <= 64 KiB", a mapping such as {"bops": "0.4%"}, or constraints '
        "such as BOPs() <= 2e6"
    )


def parse_bound(bound: BoundLike, model: CostModel) -> Bound:
    """Read a bound for `model`: a number in its unit, "0.4%", "64 KiB", "2.5M".

    Raises:
        BudgetError: If it is not a quantity, or its unit does not fit the model.
    """
    if isinstance(bound, Bound):
        return bound
    if isinstance(bound, bool) or not isinstance(bound, str | float | int):
        raise BudgetError(
            f"the bound of {model.name!r} must be a number or a string, not {bound!r}"
        )
    if not isinstance(bound, str):
        return Bound(float(bound))
    match = _QUANTITY.fullmatch(bound) if len(bound) <= _MAX_LENGTH else None
    if match is None:
        raise BudgetError(
            f"cannot read {bound[:80].strip()!r} as the bound of {model.name!r}; "
            'expected a quantity such as "0.4%", "64 KiB", "2.5M" or "2e6"'
        )
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return Bound(number / 100, relative=True)
    return Bound(number * _factor(unit, model))


def _parse_string(text: str) -> Budget:
    if len(text) > _MAX_LENGTH:
        raise BudgetError(f"a budget string has at most {_MAX_LENGTH} characters, not {len(text)}")
    constraints = []
    for clause in re.split(r",|;|\band\b|&", text):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise BudgetError(
                f"cannot read {clause.strip()[:80]!r} in the budget {text[:200]!r}; each part is a "
                'cost, "<=" and a bound, for example "bops <= 0.4%, weights <= 64 KiB"'
            )
        if match[2] == "<":
            raise BudgetError(f'write "<=" instead of "<" in {clause.strip()!r}: bounds can be met')
        constraints.append(cost_model(match[1]) <= match[3].strip())
    return Budget(tuple(constraints))


def _factor(unit: str, model: CostModel) -> float:
    """How many of the model's units one `unit` is."""
    if unit in ("", model.unit):
        return 1.0
    if unit in _PREFIX:
        return _PREFIX[unit]
    import pint

    try:
        registry = _registry(model.unit)
        return float(registry.Quantity(1.0, unit).to(model.unit).magnitude)
    except (pint.errors.PintError, AttributeError, ValueError, TypeError) as error:
        raise BudgetError(
            f"the unit {unit!r} does not fit {model.name!r}, which is measured in {model.unit}"
        ) from error


@lru_cache(maxsize=64)
def _registry(unit: str) -> pint.UnitRegistry[float]:
    """Pint's registry, with `unit` added (singular, plural, upper case) if pint lacks it."""
    import pint

    registry: pint.UnitRegistry[float] = pint.UnitRegistry()
    if unit not in registry:
        upper = unit.upper()
        registry.define(f"{unit} = [{unit}] = _ = {unit}s = {upper} = {upper}s")
    return registry
