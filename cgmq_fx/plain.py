"""Plain values for programs: JSON, which has no numbers that are not finite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from numbers import Integral, Real
from typing import Any


def finite(value: Any) -> Any:
    """The same values with None for numbers that are not finite; tuples become lists.

    Numbers of any kind, such as NumPy's, become Python's.
    """
    if isinstance(value, Integral):
        return value if isinstance(value, int) else int(value)
    if isinstance(value, Real):
        return float(value) if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(own) for key, own in value.items()}
    return [finite(own) for own in value] if isinstance(value, list | tuple) else value


def json_text(value: Any) -> str:
    """Values as JSON that every program reads."""
    return json.dumps(finite(value), indent=1, allow_nan=False)
