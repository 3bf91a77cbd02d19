"""Whether ONNX can hold a float graph, tried before the model is trained."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.onnx_file import OPSET, Portable, run_onnx, translated
from cgmq_fx.exporters.program import exported_program
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.pools import PoolsAsMeans


def onnx_refusal(captured: Captured) -> str | None:
    """What torch.onnx or onnxruntime says against a graph: that it is written and run is tried.

    Args:
        captured: The captured and normalised float graph, with its example inputs.

    Returns:
        The reason, or None if it is taken. Without the packages that are needed, how to install
        them.
    """
    module = run_passes(copy_graph(captured.module).cpu().eval(), [PoolsAsMeans()])
    inputs = captured.inputs.to(torch.device("cpu")).at_least_two()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        try:
            Portable().check_installed()
            translated(exported_program(module, inputs), {}, OPSET).save(path)
            run_onnx(path, [inputs])
        except ExportError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the runtime's errors have no class in common
            return f"onnxruntime does not run it: {error}"
    return None
