"""What users of an ONNX file call: its outputs, and the size of its batch."""

from __future__ import annotations

import re
from typing import Any

_BATCH, _OUTPUT = "batch", "output"


def name_for_users(model: Any) -> None:
    """Call outputs `output`, or `output_0` and so on, and a free batch `batch`, in place.

    Inputs are called as the arguments of the model already.

    Args:
        model: A model of onnx_ir.
    """
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    _name_batch(model, values)
    taken = {value.name for value in values} | set(model.graph.initializers)
    outputs = list(dict.fromkeys(model.graph.outputs))
    for number, value in enumerate(outputs):
        name = _OUTPUT if len(outputs) == 1 else f"{_OUTPUT}_{number}"
        if value.producer() is not None and name not in taken:
            value.name = name


def _name_batch(model: Any, values: list[Any]) -> None:
    import onnx_ir as ir

    first = [v.shape[0] for v in model.graph.inputs if v.shape is not None and v.shape.rank()]
    symbols = {size.value for size in first if not isinstance(size, int)}
    if len(symbols) != 1 or None in symbols:
        return
    symbol = re.compile(rf"\b{re.escape(symbols.pop())}\b")
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                size
                if isinstance(size, int) or size.value is None
                else symbol.sub(_BATCH, size.value)
                for size in value.shape
            )
