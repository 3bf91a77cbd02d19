"""Reading budgets: strings, mappings and constraint objects become one `Budget`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Context
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, TypeAlias

from cgmq_fx.cost_models.constraint import Bound, Budget, Constraint
from cgmq_fx.cost_models.errors import BudgetError
from cgmq_fx.cost_models.facts import FLOAT_BITS
from cgmq_fx.cost_models.model import CostModel, cost_model

if TYPE_CHECKING:
    import pint

    from cgmq_fx.cost_models.target import Target

BoundLike: TypeAlias = "float | str | Bound"
BudgetLike: TypeAlias = "str | Mapping[str, BoundLike] | Constraint | Budget | Iterable[Constraint]"

_MAX_LENGTH = 10_000
_SPACE = re.compile(r"\s+")
_CLAUSE = re.compile(r"\s*([A-Za-z_]\w*)\s*(\[[^\[\],;&]+\])?\s*(<=|<|≤)\s*([^<>=≤]+)")
_QUANTITY = re.compile(
    r"\s*([+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf))"
    r"\s*(%(?:\s*of\s*(?:8|32)\s*bits?)?|[A-Za-zµ]{1,40}(?:/[A-Za-zµ]{1,40}){0,2}|)\s*"
)
_EXACT = Context(traps=[])  # 0.7% is the float nearest to 0.007, which 0.7 / 100 is not
_PREFIX = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_budget(budget: BudgetLike, target: Target | None = None) -> Budget:
    """Read a budget.

    Args:
        budget: A string (`"bops <= 0.4%, weights <= 64 KiB"`), a mapping (`{"bops": "0.4%"}`), a
            constraint (`BOPs() <= 2e6`), several of them, or a `Budget`.
        target: The chip that costs like latency and energy are looked up for.

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
        return _parse_string(budget, target)
    if isinstance(budget, Mapping):
        return Budget(tuple(_constraint(str(k), v, target) for k, v in budget.items()))
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
    if isinstance(bound, bool) or not isinstance(bound, str | Real):
        raise BudgetError(
            f"the bound of {model.name!r} must be a number or a string, not {bound!r}"
        )
    if not isinstance(bound, str):
        return Bound(bound)
    short = len(bound) <= _MAX_LENGTH
    match = _QUANTITY.fullmatch(_SPACE.sub(" ", bound)) if short else None
    if match is None:
        raise BudgetError(
            f"cannot read {bound[:80].strip()!r} as the bound of {model.name!r}; "
            'expected a quantity such as "0.4%", "64 KiB", "2.5M" or "2e6"'
        )
    number, unit = match.groups()
    if unit.startswith("%"):
        share = float(_EXACT.create_decimal(number).scaleb(-2, _EXACT))
        return Bound(share, relative=True, base=8 if "8" in unit else FLOAT_BITS)
    factor = _factor(unit, model)
    if factor == 1.0:
        return Bound(float(number))
    product = float(number) * factor
    return Bound(float(f"{product:.15g}"))  # 20 uJ is 2e-05 J, not 1.9999999999999998e-05


def _parse_string(text: str, target: Target | None) -> Budget:
    if len(text) > _MAX_LENGTH:
        raise BudgetError(f"a budget string has at most {_MAX_LENGTH} characters, not {len(text)}")
    constraints = []
    for clause in re.split(r",|;|\band\b|&", _SPACE.sub(" ", text)):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise BudgetError(
                f"cannot read {clause.strip()[:80]!r} in the budget {text[:200]!r}; each part is a "
                'cost, "<=" and a bound, for example "bops <= 0.4%, weights <= 64 KiB"'
            )
        if match[3] == "<":
            raise BudgetError(f'write "<=" instead of "<" in {clause.strip()!r}: bounds can be met')
        constraints.append(_constraint(match[1] + (match[2] or ""), match[4].strip(), target))
    return Budget(tuple(constraints))


def _constraint(name: str, bound: BoundLike, target: Target | None) -> Constraint:
    """The constraint on a cost by its name, with a scope in brackets if there is one."""
    plain, bracket, scope = name.partition("[")
    model = cost_model(plain, target)
    return Constraint(
        model, parse_bound(bound, model), scope.rstrip("]").strip() if bracket else None
    )


def _factor(unit: str, model: CostModel) -> float:
    """How many of the model's units one `unit` is."""
    if unit in ("", model.unit):
        return 1.0
    if unit in _PREFIX:
        return _PREFIX[unit]
    import pint

    try:
        registry = _registry(model.unit)
        given, own = registry.Quantity(1.0, unit), registry.Quantity(1.0, model.unit)
        if given.to_root_units().units != own.to_root_units().units:  # to pint a bit is a radian
            raise pint.DimensionalityError(given.units, own.units)
        return float(given.to(own.units).magnitude)
    except (pint.errors.PintError, AttributeError, ValueError, TypeError) as error:
        raise BudgetError(
            f"the unit {unit!r} does not fit {model.name!r}, which is measured in {model.unit}; "
            f"{_meant(unit, model)}give the bound in {model.unit}, or as a share such as 1%"
        ) from error


def _meant(unit: str, model: CostModel) -> str:
    """What a unit of bytes in other letters may stand for."""
    match = model.unit == "byte" and re.fullmatch(r"([kmg])(i?)b(?:ytes?)?", unit, re.IGNORECASE)
    if not match:
        return ""
    letter = match[1].upper()
    decimal = "kB" if letter == "K" else f"{letter}B"
    return f"write {letter}iB for powers of 1024 or {decimal} for powers of 1000, or "


@lru_cache(maxsize=64)
def _registry(unit: str) -> pint.UnitRegistry[float]:
    """Pint's registry, with `unit` added (singular, plural, upper case) if pint lacks it."""
    import pint

    registry: pint.UnitRegistry[float] = pint.UnitRegistry()
    if unit not in registry:
        upper = unit.upper()
        registry.define(f"{unit} = [{unit}] = _ = {unit}s = {upper} = {upper}s")
    return registry
