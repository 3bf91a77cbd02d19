"""Facts of a graph that every cost is computed from: shapes, counts and who quantizes what.

Facts never change during training; only the bits of the quantizers do. Everything is counted per
sample: a tensor of shape (batch, 32, 12, 12) has 4608 elements.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.int64]

FLOAT_BITS = 32
"""Bits of a tensor that no quantizer touches."""

CONVENTION = (
    "1 multiply-accumulate = 1 MAC, per sample, biases not counted as MACs; "
    "BOPs = MACs x weight bits x activation bits; relative = share of the same graph at 32 x 32 "
    "bits, or at 8 x 8 where it says so; the network input counts at the bits of its own "
    "quantizer, the last layer like any other"
)
"""The counting convention, printed with every number: tools that differ cannot be compared."""


class Role(Enum):
    """What an operand or a quantizer stands on."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Pruning:
    """Which channels of an activation are removed: those whose weights all have 0 bits.

    Attributes:
        quantizer: Name of the quantizer on the weight that makes the channels.
        gates: Its gates as (before, channels, after), channels in the middle.
    """

    quantizer: str
    gates: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Operand:
    """One of the two factors that a compute node multiplies.

    Attributes:
        role: Weight (does not depend on the model's input) or activation.
        elements: Elements of the tensor, per sample for an activation.
        quantizer: Name of the quantizer that the operand passes through, or None for float.
        meets: Shape to which the quantizer's gates are reshaped so that they broadcast against the
            gates of the other operand, element meeting element. Empty for a single gate, and where
            it cannot be told which gate meets what: then the most bits that any gate has count.
            Where channels can be removed, the shape for one gate per channel.
        pruning: Which channels have 0 bits because the layer that makes them is pruned, or None.
        order: The number of the gate at each place of `meets`, as int32; empty for all in order.
    """

    role: Role
    elements: int
    quantizer: str | None
    meets: tuple[int, ...] = ()
    pruning: Pruning | None = None
    order: bytes = b""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that the model keeps: a weight, a bias, a table, a buffer.

    Attributes:
        name: Its name in the model's state.
        elements: Number of elements.
        quantizer: Name of the quantizer that sets its bits, or None.
        bits: Bits per element where there is no quantizer.
        pruning: The channels along which the tensor gets shorter, one slice per channel, or None.
        copy: Whether it is kept besides another form of the same tensor: what relative bounds refer
            to has one form.
    """

    name: str
    elements: int
    quantizer: str | None = None
    bits: int = FLOAT_BITS
    pruning: Pruning | None = None
    copy: bool = False


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node of the graph costs, apart from its bits.

    Attributes:
        name: The node's name in the graph.
        op: The op, for example `aten.conv2d.default`.
        macs: Multiply-accumulates per sample; 0 for a node that only stores something.
        operands: The two factors of a compute node, weight first if there is one; else empty.
        output_elements: Elements of the output, per sample.
        output_shape: Shape of the output with the example batch.
        groups: Groups of a convolution, otherwise 1.
        stored: What the node reads from the model's state, each tensor at its first reader only.
        module: Path of the user's module that the node came from, empty if unknown.
    """

    name: str
    op: str
    macs: int = 0
    operands: tuple[Operand, ...] = ()
    output_elements: int = 0
    output_shape: tuple[int, ...] = ()
    groups: int = 1
    stored: tuple[Stored, ...] = ()
    module: str = ""

    @property
    def title(self) -> str:
        """The user's module, or the node where it came from none."""
        return self.module or self.name

    @property
    def op_text(self) -> str:
        """The op without what is the same for most, for example `conv2d`."""
        return self.op.removeprefix("aten.").removesuffix(".default")

    @property
    def output_text(self) -> str:
        """The shape of the output without the batch, for example `8x26x26`."""
        return "x".join(map(str, self.output_shape[1:] or self.output_shape))

    @property
    def quantizers(self) -> Iterator[str]:
        """Names of the quantizers that this node's cost can depend on."""
        names = [o.quantizer for o in self.operands] + [s.quantizer for s in self.stored]
        prunings = [o.pruning for o in self.operands] + [s.pruning for s in self.stored]
        names += [p.quantizer for p in prunings if p is not None]
        yield from (name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor that a runtime keeps while the graph is executed.

    Attributes:
        name: The node that writes it.
        elements: Elements, per sample.
        first: The step that writes it; network inputs are there from step 0.
        last: The last step that reads it; network outputs are kept to the last step.
        quantizer: Name of the quantizer whose grid it is on, or None for float.
        bits: Bits per element where there is no quantizer.
        copy: Whether it is kept besides the same tensor in float.
        shares: How many of its elements each gate of the quantizer stands for, in any unit; empty
            for equally many; None where it cannot be told: then the most bits of all gates count.
    """

    name: str
    elements: int
    first: int
    last: int
    quantizer: str | None = None
    bits: int = FLOAT_BITS
    copy: bool = False
    shares: tuple[int, ...] | None = ()


@dataclass(frozen=True, slots=True)
class QuantizerFacts:
    """What is fixed about a quantizer.

    Attributes:
        name: Its name, unique in the graph.
        role: Whether it stands on a weight or on an activation.
        gates: Number of gates that it owns.
        bit_widths: The bit-widths that each gate may take, ascending.
        elements: Elements of the tensor, per sample for an activation.
    """

    name: str
    role: Role
    gates: int
    bit_widths: tuple[int, ...]
    elements: int


@dataclass(frozen=True)
class GraphFacts:
    """The facts of a whole graph, in execution order.

    Attributes:
        nodes: Every node that multiplies or stores something.
        quantizers: The quantizers by name.
        unknown: Nodes whose op no table knows, as "name (op, place)": never counted as 0 silently.
        batch: The batch size of the example inputs that shapes were taken from.
        tensors: The tensors that a runtime keeps, with their lifetimes.
        opaque: Modules that could not be captured and run as they are, in float, as "path (class)".
        assumptions: What the graph takes for granted of the values of its inputs, and asserts.
        readers: For every quantizer, the indices of the nodes whose cost can depend on it.
        holders: For every quantizer, the indices of the tensors that are on its grid.
    """

    nodes: tuple[NodeFacts, ...]
    quantizers: Mapping[str, QuantizerFacts]
    unknown: tuple[str, ...] = ()
    batch: int = 1
    tensors: tuple[TensorFacts, ...] = ()
    opaque: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    readers: Mapping[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    holders: Mapping[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        readers: dict[str, list[int]] = {name: [] for name in self.quantizers}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.quantizers):
                readers[name].append(index)
        holders: dict[str, list[int]] = {name: [] for name in self.quantizers}
        for index, tensor in enumerate(self.tensors):
            if tensor.quantizer is not None:
                holders[tensor.quantizer].append(index)
        object.__setattr__(self, "readers", {n: tuple(i) for n, i in readers.items()})
        object.__setattr__(self, "holders", {n: tuple(i) for n, i in holders.items()})

    @cached_property
    def lifetimes(self) -> tuple[Steps, Steps]:
        """For every tensor, the step that writes it and the one after the last that reads it."""
        first = np.array([t.first for t in self.tensors], dtype=np.int64)
        return first, np.array([t.last + 1 for t in self.tensors], dtype=np.int64)

    @cached_property
    def memo(self) -> dict[Hashable, Any]:
        """What follows from these facts alone, kept by what computes it."""
        return {}

    @property
    def has_copies(self) -> bool:
        """Whether a tensor is kept in two forms, rounded and in float."""
        stored = (s.copy for node in self.nodes for s in node.stored)
        return any(stored) or any(t.copy for t in self.tensors)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of any cost must know: what is not counted, not quantized, or assumed."""
        rows = (
            ("not counted (unknown ops)", self.unknown),
            ("not quantized (could not be captured, run as they are in float)", self.opaque),
            ("assumed of the values of inputs, and checked whenever it runs", self.assumptions),
        )
        return tuple(f"{text}: {', '.join(found)}" for text, found in rows if found)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates per sample of the whole graph."""
        return sum(node.macs for node in self.nodes)
