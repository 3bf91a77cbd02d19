"""Agreement: how far what a runtime computes is from what the graph computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import is_dequantize, is_quantize
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.integer import Rounding, simulate_graph
from cgmq_fx.passes.state import sources, tensor_at, value_of

Batches: TypeAlias = Sequence[ExampleInputs]
Outputs: TypeAlias = list[list[Tensor]]

TOLERATED_STEPS = 1.0
TOLERATED_SHARE = 0.95
_ROUNDINGS = (Rounding.FLOAT, Rounding.HALF_UP)
_EXACT = 1e-2
"""Steps within which two float32 values are the same code."""

_LEVELS = 255
_SATURATION = 3.0
"""Standard deviations of generated inputs, in ranges of the input's quantizer."""


@dataclass(frozen=True)
class Agreement:
    """How the outputs of an artifact compare with those of the lowered graph.

    A sum of products that lies on the border between two codes is rounded to either by correct
    runtimes, and what follows in that sample differs. So the graph is run in several arithmetics
    that are all correct (see `compare`), and the artifact has to agree with one of them.
    A step is the distance of neighbouring values of the output's grid; of an output that no
    quantizer rounds it is 1/255 of its span on the data. An artifact is as it should be if at least
    95 % of all output values are at most one step off, or if `Reference.excuse` says why not.

    Attributes:
        exact: Share of output values that are equal to rounding.
        within: Share that is at most one step off.
        largest: Largest difference, in steps.
        argmax: Share of rows (along the last axis) whose largest value is at the same place.
        values: How many output values were compared.
    """

    exact: float
    within: float
    largest: float
    argmax: float
    values: int

    @property
    def holds(self) -> bool:
        """Whether the artifact is as it should be."""
        return self.values > 0 and self.within >= TOLERATED_SHARE

    @property
    def is_close(self) -> bool:
        """Whether no value is off by more than a step, so that there is nothing to look into."""
        return self.values > 0 and self.largest <= TOLERATED_STEPS + _EXACT

    def __str__(self) -> str:
        largest = f"{self.largest:.3g}" if self.largest > _EXACT else f"under {_EXACT:g}"
        return (
            f"{self.exact:.2%} of {self.values:,} outputs exact, {self.within:.2%} within a step "
            f"of their grid, largest difference {largest} steps, arg-max equal in {self.argmax:.2%}"
        )


class Reference:
    """What a lowered graph gives, which others are compared with.

    The graph is run in float64, where sums of products are exact; where that leaves a difference
    of more than a step, in float32, and in integers with a float32 factor or with a multiplier and
    a shift. What counts is the arithmetic that is nearest. Each is run once.

    Args:
        module: The lowered graph.
        batches: The inputs.
    """

    def __init__(self, module: GraphModule, batches: Sequence[ExampleInputs]) -> None:
        self.module, self.batches = module, batches
        self._outputs: list[Outputs] = []

    def compare(self, found: Sequence[Sequence[Tensor]]) -> Agreement:
        """Compare what a runtime gave for the same inputs, flat for every batch."""
        best: Agreement | None = None
        for expected in self._in_turn():
            agreement = compared(self.module, expected, found)
            if best is None or _nearness(agreement) > _nearness(best):
                best = agreement
            if best.is_close:
                break
        assert best is not None
        return best

    def excuse(self, found: Sequence[Sequence[Tensor]]) -> str | None:
        """Why outputs that disagree are right all the same, as a sentence; None if they are not.

        Only for files whose codes cannot be looked at (see `inside.py`). In a deep network of few
        bits, one code on a border changes all that follows in its sample: correct arithmetics
        disagree in whole samples. A file that is wrong is off in about every
        sample. So a file is right if the samples in which some output is off from every arithmetic
        are at most half as many as those in which float64 and float32 are off from one another.

        Args:
            found: What a runtime gave, flat for every batch.
        """
        every = list(self._in_turn())
        steps = output_steps(self.module, every[0])
        pairs = [(expected, found) for expected in every]
        near = torch.stack([self._near(steps, *pair) for pair in pairs]).any(0)
        alike = self._near(steps, every[0], every[1])
        off, apart = (int((~same).sum()) for same in (near, alike))
        if 2 * off > apart:
            return None
        return (
            f"{off} of {near.numel()} samples differ from every correct arithmetic; float64 and "
            f"float32 differ from one another in {apart}, as single codes on a border change all "
            "that follows: measure the accuracy of the file itself, or allow more bits"
        )

    def _near(
        self, steps: Sequence[float], expected: Outputs, found: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """For every sample of all batches, whether all its outputs are at most one step off."""
        sizes = [batch.batch or 1 for batch in self.batches]
        rows = [torch.ones(0, dtype=torch.bool)]
        for count, ours, theirs in zip(sizes, expected, found, strict=True):
            same = torch.ones(count, dtype=torch.bool)
            tensors = _without_sizes(self.module, theirs, len(ours))
            for step, wanted, given in zip(steps, ours, tensors, strict=True):
                if wanted.shape != given.shape:
                    return torch.zeros(sum(sizes), dtype=torch.bool)
                off = ((given.double() - wanted.double()) / step).abs()
                near = off <= TOLERATED_STEPS + _EXACT
                own = near.dim() > 0 and near.shape[0] == count
                same &= near.reshape(count, near[0].numel()).all(1) if own else near.all()
            rows.append(same)
        return torch.cat(rows)

    def _in_turn(self) -> Iterator[Outputs]:
        for index, arithmetic in enumerate(_ARITHMETICS):
            if index == len(self._outputs):
                self._outputs.append(arithmetic(self.module, self.batches))
            yield self._outputs[index]


def compare(
    module: GraphModule, found: Sequence[Sequence[Tensor]], batches: Sequence[ExampleInputs]
) -> Agreement:
    """Compare what a runtime gave with what a lowered graph gives, see `Reference`."""
    return Reference(module, batches).compare(found)


def _nearness(agreement: Agreement) -> tuple[float, float]:
    return agreement.within, -agreement.largest


def _integers(rounding: Rounding) -> Callable[[GraphModule, Batches], Outputs]:
    """The outputs of the integer simulator with one way of rounding."""

    def outputs(module: GraphModule, batches: Batches) -> Outputs:
        return [simulate_graph(module, batch, rounding).outputs for batch in batches]

    return outputs


def _returned(module: GraphModule) -> list[Node]:
    """The nodes that a graph returns, flat."""
    leaves = pytree.tree_leaves(module.graph.output_node().args)
    return [leaf for leaf in leaves if isinstance(leaf, Node)]


def _is_tensor(node: Node) -> bool:
    return isinstance(value_of(node), Tensor)


def _without_sizes(module: GraphModule, outputs: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Outputs without the sizes that a model returned beside them, which runtimes give as tensors.

    Args:
        module: The graph.
        outputs: What a runtime gave.
        count: How many tensors the model returns.
    """
    if len(outputs) == count:
        return outputs
    kept = [_is_tensor(node) for node in _returned(module)]
    if len(kept) == len(outputs) and sum(kept) == count:
        return [o for o, keep in zip(outputs, kept, strict=True) if keep]
    return [o for o in outputs if o.dim() or o.is_floating_point()]


def compared(
    module: GraphModule,
    expected: Sequence[Sequence[Tensor]],
    found: Sequence[Sequence[Tensor]],
) -> Agreement:
    """Compare two sets of outputs of a graph, flat for every batch."""
    steps = output_steps(module, expected)
    exact = within = rows = hits = total = 0
    largest = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        tensors = _without_sizes(module, theirs, len(ours))
        for step, wanted, given in zip(steps, ours, tensors, strict=True):
            if wanted.shape != given.shape:
                return Agreement(0.0, 0.0, float("inf"), 0.0, wanted.numel())
            off = ((given.double() - wanted.double()) / step).abs().nan_to_num(float("inf"))
            exact += int((off <= _EXACT).sum())
            within += int((off <= TOLERATED_STEPS + _EXACT).sum())
            largest = max(largest, float(off.max()) if off.numel() else 0.0)
            total += off.numel()
            if wanted.dim() and wanted.numel():
                same = wanted.double().argmax(-1) == given.double().argmax(-1)
                hits, rows = hits + int(same.sum()), rows + same.numel()
    return Agreement(
        exact / max(total, 1), within / max(total, 1), largest, hits / max(rows, 1), total
    )


def exact_outputs(module: GraphModule, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
    """The outputs in float64, or in float32 where the graph insists on that."""
    try:
        return outputs_of(copy_graph(module).double(), [in_float64(b) for b in batches])
    except RuntimeError:  # an op has a dtype of its own
        return outputs_of(module, batches)


def in_float64(inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs with floating-point tensors in float64."""
    return inputs.map(lambda t: t.double() if t.is_floating_point() else t)


def outputs_of(module: GraphModule, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
    """The flat tensor outputs of a graph for every batch."""
    with torch.no_grad():
        found = [pytree.tree_leaves(module(*b.args, **b.kwargs)) for b in batches]
    return [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in found]


_ARITHMETICS = (exact_outputs, outputs_of, *map(_integers, _ROUNDINGS))


def output_steps(module: GraphModule, outputs: Sequence[Sequence[Tensor]]) -> list[float]:
    """The step of every output: of its grid if it has one, else of its span on the data."""
    nodes = [node for node in _returned(module) if _is_tensor(node)]
    steps = []
    for index, columns in enumerate(zip(*outputs, strict=True)):
        own = _grid_step(module, nodes[index]) if index < len(nodes) else None
        whole = torch.cat([c.detach().double().flatten() for c in columns])
        span = float(whole.max() - whole.min()) if whole.numel() else 0.0
        steps.append(own or span / _LEVELS or 1.0)
    return steps


def _grid_step(module: GraphModule, node: Node) -> float | None:
    """The step of the grid that a node's values are on."""
    for source in sources(node):
        if is_dequantize(source):
            return _step(module, source)
    return None


def trial_batches(module: GraphModule, inputs: ExampleInputs, size: int) -> list[ExampleInputs]:
    """Inputs that drive the quantizers into saturation, as repeatable random numbers.

    Floating-point inputs get three times the range of their quantizer as standard deviation, or of
    the example's largest value; others repeat what the example holds.

    Args:
        module: The lowered graph.
        inputs: Example inputs.
        size: Samples, where the batch is free.
    """
    generator = torch.Generator().manual_seed(0)
    limits = [_reach(module, node) for node in module.graph.find_nodes(op="placeholder")]
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    batches = []
    for _ in range(max(size // (inputs.batch or 1), 1)):
        pairs = zip(leaves, limits, strict=True)
        drawn = [_saturating(leaf, limit, generator) for leaf, limit in pairs]
        args, kwargs = pytree.tree_unflatten(drawn, spec)
        batches.append(replace(inputs, args=args, kwargs=kwargs))
    return batches


def _saturating(leaf: Any, limit: float | None, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    scale = limit or float(leaf.abs().max() if leaf.numel() else 0.0) or 1.0
    noise = torch.randn(leaf.shape, generator=generator) * (_SATURATION * scale)
    return noise.to(leaf.dtype)


def _reach(module: GraphModule, node: Node) -> float | None:
    """The largest value of the grid that an input is rounded to first."""
    for user in node.users:
        if is_quantize(user):
            step, highest = _step(module, user), user.args[4]
            return None if step is None else step * max(highest)  # type: ignore[arg-type]
        if len(node.users) == 1:
            return _reach(module, user)
    return None


def _step(module: GraphModule, node: Node) -> float | None:
    """The step of a quantize or dequantize node; the largest one of several."""
    read = node.args[1]
    step = tensor_at(module, read.target) if isinstance(read, Node) else None
    return None if step is None else float(step.max())
