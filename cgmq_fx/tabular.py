"""Tables for pandas, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cgmq_fx.cost_models.errors import OptionError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: list[dict[str, Any]]) -> DataFrame:
    """Rows of plain values as a DataFrame.

    Raises:
        OptionError: If pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise OptionError(
            'to_dataframe needs pandas, which is not installed: pip install "cgmq-fx[pandas]"'
        ) from error
    return DataFrame(rows)
