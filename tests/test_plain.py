"""Plain values: what JSON can hold."""

import json
import math

import numpy as np

from cgmq_fx.plain import json_text


def test_numbers_of_any_kind_are_written() -> None:
    values = {"a": np.float32(1.5), "b": np.int64(2), "c": (math.inf, np.float32("nan")), "d": True}
    assert json.loads(json_text(values)) == {"a": 1.5, "b": 2, "c": [None, None], "d": True}
