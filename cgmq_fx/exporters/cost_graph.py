"""A graph that costs what a file costs: shapes, codes and clamps, no data and nothing to run.

A reader of a format builds one from nothing but the file; it is then counted by the code that
counts every other graph (`passes/annotate.py`). What is read is never executed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from cgmq_fx.cost_models import Budget, ConstraintState, GraphFacts, Ledger
from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.exporters.code_bits import Array, Layout, Shape, activation_bits, weight_bits
from cgmq_fx.exporters.exporter import FileCost
from cgmq_fx.exporters.layer_names import LayerName, named
from cgmq_fx.passes.annotate import annotate
from cgmq_fx.passes.freeze import read_bits
from cgmq_fx.passes.grid import MAX_GRID_BITS, PASS_THROUGH
from cgmq_fx.passes.insert import QUANTIZERS, operands
from cgmq_fx.passes.optable import compute_op, set_argument
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.passes.shapes import DOUBLED
from cgmq_fx.passes.state import quantizer_of, reachable_from_inputs, sources

_MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an exported file says about itself; nothing of it is believed without a check.

    Attributes:
        batch: The batch size that shapes are taken for.
        budget: The budget that it was made for, as text.
        layouts: For every quantizer, how its bits are meant to be read.
        layers: The layers by name, where the budget bounds some of them.
        references: What relative bounds refer to, by `Constraint.base`, where that is not what the
            network in the file costs: channels of it were removed, a tensor is in it twice, or once
            where the model has two that are equal.
    """

    batch: int = 2
    budget: str = ""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    layers: tuple[LayerName, ...] = ()
    references: Mapping[str, float] = field(default_factory=dict)

    def layout(self, tensor: str) -> Layout:
        """The layout of the quantizer that a tensor of codes or steps belongs to."""
        for suffix in ("_codes", "_channel_step", "_step"):
            name = tensor.removesuffix(suffix)
            if name != tensor:
                return self.layouts.get(name, Layout())
        return Layout()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = {
            name: [list(layout.widths), list(layout.gates), int(layout.power_of_two)]
            for name, layout in self.layouts.items()
        }
        return {
            "format": _MANIFEST_FORMAT,
            "batch": self.batch,
            "budget": self.budget,
            "bits": rows,
            **({"layers": [layer.to_json() for layer in self.layers]} if self.layers else {}),
            **({"references": dict(self.references)} if self.references else {}),
        }

    @staticmethod
    def from_text(text: str | bytes, name: str) -> Manifest:
        """Read it from JSON.

        Raises:
            ArtifactError: If it is not a manifest, or one of a newer format.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the manifest of {name} is no JSON: {error}") from error
        return Manifest.from_json(data, name)

    @staticmethod
    def from_json(data: Any, name: str) -> Manifest:
        """Read it.

        Raises:
            ArtifactError: If it is not a manifest, or one of a newer format.
        """
        if not isinstance(data, dict) or "format" not in data:
            raise ArtifactError(f"{name} is not a file that cgmq_fx exported")
        if data["format"] != _MANIFEST_FORMAT:
            raise ArtifactError(
                f"{name} has format {str(data['format'])[:20]!r}, this version reads "
                f"{_MANIFEST_FORMAT}; upgrade cgmq_fx"
            )
        try:
            layouts = {str(k): _layout(*row) for k, row in data["bits"].items()}
            layers = tuple(map(LayerName.from_json, data.get("layers", ())))
            references = {str(k): float(v) for k, v in data.get("references", {}).items()}
            batch = int(data["batch"])
            budget = str(data["budget"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the manifest of {name} is damaged: {error}") from error
        if not 1 <= batch <= 1 << 20:
            raise ArtifactError(f"the manifest of {name} states a batch of {batch}")
        if not all(isfinite(v) and v >= 0 for v in references.values()):
            raise ArtifactError(f"the manifest of {name} states a cost that is none")
        return Manifest(batch, budget, layouts, layers, references)


def _layout(widths: Sequence[int], gates: Sequence[int], power_of_two: int) -> Layout:
    found = tuple(sorted({int(b) for b in widths}))
    if not found or not all(b in (0, PASS_THROUGH) or 2 <= b <= MAX_GRID_BITS for b in found):
        raise ValueError(f"{found} are no bit-widths")
    return Layout(found, tuple(int(size) for size in gates), bool(power_of_two))


class CostGraph:
    """Builds a graph without data.

    Attributes:
        unknown: What no table knows, for the report.
    """

    def __init__(self) -> None:
        self.unknown: list[str] = []
        self._root = nn.Module()
        self._root.add_module(QUANTIZERS, nn.Module())
        self._graph = Graph()
        self._inputs = 0
        self._names = itertools.count()
        self._steps: dict[Node, Array] = {}

    @property
    def mixed(self) -> int:
        """How many tensors have gates with different bits."""
        owners = self._root.get_submodule(QUANTIZERS).modules()
        return sum(q.bits.unique().numel() > 1 for q in owners if isinstance(q, Quantizer))

    def input(self, shape: Shape, dtype: torch.dtype) -> Node:
        """An input of the network."""
        self._inputs += 1
        return self._noted(self._graph.placeholder(f"input_{self._inputs}"), shape, dtype)

    def state(self, shape: Shape, dtype: torch.dtype) -> Node:
        """A tensor that the file keeps."""
        name = f"tensor_{len(self._root._buffers)}"
        self._root.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        return self._noted(self._graph.get_attr(name), shape, dtype)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Node:
        """An op."""
        return self._noted(self._graph.call_function(target, args, options), shape, dtype)

    def weight(self, codes: Array, ranges: Shape, layout: Layout) -> Node:
        """A weight kept as codes; its bits are read from them."""
        bits = weight_bits(codes, ranges, layout)
        source = self.state(codes.shape, torch.float32)
        return self._quantized(source, bits, layout, Role.WEIGHT, signed=True)

    def activation(
        self, source: Node, low: Array, high: Array, step: Array, layout: Layout
    ) -> Node:
        """An activation that is rounded to codes; its bits are read from their limits.

        Args:
            source: What is rounded.
            low: Lowest code; broadcastable against the tensor where channels differ.
            high: Highest code.
            step: Distance of neighbouring codes.
            layout: The bit-widths.
        """
        before = next((self._steps[n] for n in sources(source) if n in self._steps), None)
        if before is not None and _refines(before, step):
            return source  # the same values, as whole steps of a finer grid
        node = self._quantized(
            source, activation_bits(low, high, layout), layout, Role.ACTIVATION, bool(low.min() < 0)
        )
        self._steps[node] = step
        return node

    def doubled(self, node: Node, shape: Shape) -> None:
        """Note the shape that a tensor has for twice the batch."""
        rank = node.meta["val"].dim()
        node.meta[DOUBLED] = shape[len(shape) - rank :]

    def count(
        self, outputs: Sequence[Node], budget: Budget, manifest: Manifest
    ) -> tuple[tuple[ConstraintState, ...], GraphFacts]:
        """Count every constraint of a budget.

        Args:
            outputs: What the network returns.
            budget: The constraints; a bound's own reference is not used.
            manifest: The batch size of the shapes, the names of layers, and references.

        Raises:
            ArtifactError: If a layer is bound by its name, and the names do not fit.
        """
        self._graph.output(tuple(outputs))
        module = GraphModule(self._root, self._graph)
        self._graph = module.graph
        self._graph.eliminate_dead_code()
        self._root = module
        if not hasattr(module, QUANTIZERS):
            module.add_module(QUANTIZERS, nn.Module())
        self._mark_float(module)
        module.graph.lint()
        facts = annotate(module, manifest.batch)
        if any(constraint.scope is not None for constraint in budget):
            facts = named(facts, manifest.layers)
        ledger = Ledger(facts, budget.with_references(manifest.references), read_bits(module))
        return ledger.states(), facts

    def _mark_float(self, module: GraphModule) -> None:
        """Put a quantizer at 32 bits on every float operand: relative bounds count those too."""
        for node in list(self._graph.nodes):
            op = compute_op(node)
            for name in (op.activation, op.weight) if op else ():
                index = 0 if op is not None and name == op.activation else 1
                factor = operands(node, op)[index] if op else None
                if factor is not None and quantizer_of(module, factor) is None:
                    live = factor in reachable_from_inputs(self._graph)
                    role = Role.ACTIVATION if live else Role.WEIGHT
                    with self._graph.inserting_after(factor):
                        marked = self._quantized(
                            factor, np.array(PASS_THROUGH), Layout(()), role, signed=True
                        )
                    set_argument(node, name, marked)

    def _quantized(
        self, source: Node, bits: Array, layout: Layout, role: Role, signed: bool
    ) -> Node:
        container = self._root.get_submodule(QUANTIZERS)
        name = f"q{next(self._names)}"  # one that was dropped may still be named in the graph
        gates = bits.shape if bits.size > 1 else ()
        widths = tuple(sorted({*layout.widths, *bits.ravel().tolist()}))
        quantizer = Quantizer(QuantizerSpec(role, signed, widths, gates, (), batched=True))
        quantizer.bits.copy_(torch.from_numpy(bits.reshape(gates)))
        container.add_module(name, quantizer)
        node = self._graph.call_module(f"{QUANTIZERS}.{name}", (source,))
        node.meta = {key: source.meta[key] for key in ("val", DOUBLED) if key in source.meta}
        return node

    def _noted(self, node: Node, shape: Shape, dtype: torch.dtype) -> Node:
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node


@dataclass(frozen=True)
class Counted(FileCost):
    """A file whose format a reader turns into a `CostGraph`.

    Attributes:
        graph: What was read.
        outputs: What the network returns.
        manifest: What the file says about itself.
    """

    graph: CostGraph
    outputs: tuple[Node, ...]
    manifest: Manifest

    @property
    def budget(self) -> str:
        """The budget that the file states."""
        return self.manifest.budget

    def count(self, budget: Budget) -> tuple[tuple[ConstraintState, ...], tuple[str, ...]]:
        """Count on the graph that was read."""
        states, facts = self.graph.count(self.outputs, budget, self.manifest)
        return states, (*facts.unknown, *self.graph.unknown)


def _refines(before: Array, after: Array) -> bool:
    """Whether channels of several steps go onto one grid that holds them all."""
    if after.size != 1 or before.size == 1:
        return False
    ratio = before / after
    return bool((np.abs(ratio - ratio.round()) < 1e-3 * np.maximum(ratio, 1)).all())
