"""ONNX with weights packed to 2 and 4 bits: small files, for storage and for runtimes to come.

Activations keep their 8-bit containers. onnxruntime refuses to fuse such weights with them, so a
session must have `session.disable_quant_qdq` set to 1; it then computes in float what the graph
says, to the last code.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np

from cgmq_fx.exporters.exporter import register_exporter
from cgmq_fx.exporters.onnx_file import OPSET, QdqFile
from cgmq_fx.exporters.onnx_saturation import avoid_saturation

OPSET_OF_INT2 = 25
IR_VERSION_OF_INT2 = 13
_LARGEST = {"INT2": 1, "INT4": 7}
"""The largest code on either side of zero that a packed type is used for."""


def pack(model: Any) -> None:
    """Give every integer weight of an ONNX model the smallest type that holds its codes, in place.

    Zero points of weights are dropped: they are zero, which is what their absence says.
    """
    import onnx_ir as ir

    smallest = OPSET
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        node.resize_inputs(2)
        values = codes.const_value.numpy()
        most = int(np.abs(values.astype(np.int16)).max(initial=0))
        for name, largest in _LARGEST.items():
            if most <= largest:
                kind = ir.DataType[name]
                packed = values.astype(kind.numpy())
                codes.const_value = ir.Tensor(packed, dtype=kind, name=codes.name)
                codes.dtype = kind
                smallest = OPSET_OF_INT2 if name == "INT2" else smallest
                break
    if smallest == OPSET_OF_INT2:
        model.graph.opset_imports[""] = OPSET_OF_INT2
        model.ir_version = IR_VERSION_OF_INT2


def without_fusion(options: Any) -> None:
    """Tell a session to compute between dequantized values as the graph says."""
    options.add_session_config_entry("session.disable_quant_qdq", "1")


@final
@register_exporter
class Compact(QdqFile):
    """ONNX with packed INT2 and INT4 weights."""

    name: ClassVar[str] = "onnx-compact"

    def store(self, model: Any) -> None:
        """Pack what fits into fewer than 8 bits; the others are as in portable files."""
        pack(model)
        avoid_saturation(model)

    def configure(self, options: Any) -> None:
        """See `without_fusion`."""
        without_fusion(options)
