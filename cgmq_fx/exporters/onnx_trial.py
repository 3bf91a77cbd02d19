"""Whether ONNX can hold a float graph, and be counted, tried before the model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cgmq_fx.cost_models.errors import ArtifactError, ExportError
from cgmq_fx.exporters.cost_graph import Manifest
from cgmq_fx.exporters.onnx_file import OPSET, Portable, run_onnx, translated, without_notes
from cgmq_fx.exporters.onnx_reader import read_onnx
from cgmq_fx.exporters.program import draws, exported_program
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.pools import PoolsAsMeans


def onnx_refusal(captured: Captured) -> str | None:
    """What speaks against a graph in ONNX: that it is written, run and read back is tried.

    Args:
        captured: The captured and normalised float graph, with its example inputs.

    Returns:
        The reason, or None if it is taken. Without the packages that are needed, how to install
        them.
    """
    random = [n for n in captured.module.graph.nodes if draws(n)]
    if random:
        return f"{random[0].name} draws random numbers, which no runtime draws as PyTorch does"
    module = run_passes(copy_graph(captured.module).cpu().eval(), [PoolsAsMeans()])
    inputs = captured.inputs.to(torch.device("cpu"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        try:
            Portable().check_installed()
            import onnx_ir as ir

            exported = translated(exported_program(module, inputs), {}, OPSET)
            manifest = json.dumps(Manifest(inputs.batch or 1).to_json())
            ir.save(without_notes(exported.model, manifest), path)
            run_onnx(path, [inputs])
            read_onnx(path)
        except ExportError as error:
            return str(error)
        except ArtifactError as error:
            return f"what its file would cost cannot be counted: {_told(error)}"
        except Exception as error:  # noqa: BLE001 - the runtime's errors have no class in common
            return f"onnxruntime does not run it: {error}"
    return None


def _told(error: ArtifactError) -> str:
    """What a reader says of a file that was just written, which is not damaged."""
    cause = error.__cause__
    return str(error) if cause is None else f"its reader fails: {type(cause).__name__}: {cause}"
