"""The budgets of a sweep: read, and told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cgmq_fx.cost_models import Budget, BudgetLike, CostModel, Target, parse_budget
from cgmq_fx.cost_models.errors import OptionError


def read_budgets(budgets: Iterable[BudgetLike], chip: Target | None) -> list[Budget]:
    """The budgets as they are read where the model is to run, each once.

    Raises:
        OptionError: If there is none, or they are no list, or two of them cannot be told apart.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise OptionError(f"a sweep takes a list of budgets, not {budgets!r}")
    parsed = [parse_budget(budget, chip) for budget in budgets]
    if not parsed:
        raise OptionError('a sweep needs budgets, such as ["bops <= 1%", "bops <= 0.5%"]')
    return _unique(parsed)


def _unique(budgets: Sequence[Budget]) -> list[Budget]:
    """Each budget once.

    Raises:
        OptionError: If two of them read the same, but count by cost models that differ: points, and
            the files that keep them, are told apart by what their budgets read.
    """
    found: dict[str, Budget] = {}
    for budget in budgets:
        pairs = zip(found.setdefault(str(budget), budget), budget, strict=True)
        if not all(_alike(first.model, second.model) for first, second in pairs):
            raise OptionError(
                f"two budgets read {str(budget)!r}, but their cost models differ; sweep them "
                "apart, each in a folder of its own, or give their cost models different names"
            )
    return list(found.values())


def _alike(one: CostModel, other: CostModel) -> bool:
    """Whether two cost models are of one class and hold the same, as far as can be told."""
    try:
        return one is other or bool(one.__reduce_ex__(2) == other.__reduce_ex__(2))
    except (TypeError, ValueError, RuntimeError):  # it cannot be copied, or arrays are compared
        return False
