"""PyTorch's own `.pt2`: an exported program of ATen ops, which needs torch and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.exporters.program import constants_returned, exported_program, in_aten, quiet
from cgmq_fx.exporters.pt2_reader import MANIFEST, read_pt2
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.spec_json import plain_spec

_ORIGINS = ("stack_trace", "source_fn_stack", "torch_fn", "from_node")


@final
@register_exporter
class Program(Exporter):
    """An exported program, with integer weights and explicit rounding in plain ATen ops."""

    name: ClassVar[str] = "pt2"
    suffix: ClassVar[str] = ".pt2"
    readable: ClassVar[bool] = True

    def write(self, source: Source, path: Path) -> None:
        """Decompose to ATen and save."""
        text = [c for c in constants_returned(source.lowered) if not isinstance(c, int | float)]
        if text:
            raise ExportError(f"a .pt2 file returns tensors and numbers, not {text[0]!r}")
        program = in_aten(exported_program(source.lowered, source.inputs))
        program._example_inputs = None  # not needed to run it, and saved by pickle
        _return_plainly(program)
        for node in program.graph.nodes:  # paths of the user's files, and their lines
            for key in _ORIGINS:
                node.meta.pop(key, None)
        try:
            with quiet():
                torch.export.save(program, path, extra_files={MANIFEST: source.manifest})
        except Exception as error:
            raise ExportError(f"torch.export cannot save the model: {error}") from error

    def read(self, path: Path) -> FileCost:
        """Read its JSON and its tensors, without torch.export."""
        return read_pt2(path)

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Load it with torch.export."""
        with quiet(), torch.no_grad():
            module = torch.export.load(path).module()
            found = [pytree.tree_leaves(module(*b.args, **b.kwargs)) for b in batches]
        return [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in found]


def _return_plainly(program: ExportedProgram) -> None:
    """Let a program return tuples and dicts: whoever loads it has none of the user's classes."""
    for entry in program.module_call_graph:
        if not entry.fqn and entry.signature is not None:
            entry.signature.out_spec = plain_spec(entry.signature.out_spec)
