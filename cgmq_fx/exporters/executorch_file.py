"""ExecuTorch's `.pte`, on XNNPACK's 8-bit kernels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.executorch_reader import MANIFEST, read_pte
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.exporters.program import quiet
from cgmq_fx.exporters.samples import first_sample, run_each
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.contain import contained


@final
@register_exporter
class ExecuTorch(Exporter):
    """An ExecuTorch program for one sample at a time, delegated to XNNPACK."""

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"
    readable: ClassVar[bool] = True

    def write(self, source: Source, path: Path) -> None:
        """Lower to XNNPACK and serialise."""
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            importlib.import_module("executorch.kernels.quantized")  # out variants of its ops

        sample = first_sample(source.inputs)
        module = contained(source.lowered)
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(
                    module, sample.args, dict(sample.kwargs), strict=False
                )
                edge = to_edge_transform_and_lower(
                    program,
                    partitioner=[XnnpackPartitioner()],
                    constant_methods={MANIFEST: source.manifest},
                )
                path.write_bytes(edge.to_executorch().buffer)
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot translate the model: {error}") from error

    def read(self, path: Path) -> FileCost:
        """Read its FlatBuffers, without ExecuTorch."""
        return read_pte(path)

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Run it in ExecuTorch's runtime."""
        with quiet():
            from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        if method is None:
            raise ExportError(f"{path} has no method forward")

        def run(tensors: list[Tensor]) -> list[Tensor]:
            return [output.clone() for output in method.execute(tensors)]

        return run_each(run, batches)
