"""Whether training does any good: channels that fall silent, a loss that never falls."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.facts import Role
from cgmq_fx.history import EpochRecord, History
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import place
from cgmq_fx.passes.meeting import channel_axis, weight_axis
from cgmq_fx.passes.optable import compute_op
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import computed_from_inputs

_PARTS = 10
"""The loss is smoothed over the so-manieth part of the steps."""

_SURE = 2.0
"""Standard errors by which a difference has to exceed chance."""


def silent_channels(module: GraphModule, inputs: ExampleInputs) -> dict[str, tuple[int, int]]:
    """Where values are rounded: channels in which every value is 0, though they have bits.

    Zeros that a model starts from, such as the state of a recurrent layer, are none of them.

    Args:
        module: A graph with quantizers; it is run once, in evaluation mode.
        inputs: A batch.

    Returns:
        By the name of the quantizer, how many channels are silent, and of how many; those without
        any are left out. A tensor whose channels are not known has one.
    """
    training = module.training
    module.eval()
    try:
        return _Listening(module).silent(inputs)
    finally:
        module.train(training)


class _Listening(Interpreter):
    """Looks at what quantizers let through."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._silent: dict[str, tuple[int, int]] = {}
        quantizers = [m for m in module.modules() if isinstance(m, Quantizer)]
        self._pruned = any(bool((q.bits == 0).any()) for q in quantizers)
        self._computed = computed_from_inputs(module.graph)

    def silent(self, inputs: ExampleInputs) -> dict[str, tuple[int, int]]:
        leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
        with torch.no_grad():
            self.run(*leaves, enable_io_processing=False)
        return self._silent

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module" and isinstance(value, Tensor):
            quantizer = self.module.get_submodule(str(n.target))
            if isinstance(quantizer, Quantizer) and self._counts(n, quantizer):
                self._listen(n, quantizer, value)
        return value

    def _counts(self, node: Node, quantizer: Quantizer) -> bool:
        """Whether silence means anything: not in data, nor behind what was pruned on purpose."""
        weight = quantizer.spec.role is Role.WEIGHT
        return weight or not (self._pruned or node.all_input_nodes[0].op == "placeholder")

    def _listen(self, node: Node, quantizer: Quantizer, value: Tensor) -> None:
        heard = (value != 0) | (quantizer.bits == 0)
        source = node.all_input_nodes[0]
        if quantizer.spec.role is not Role.WEIGHT and source not in self._computed:
            heard |= self.env[source] == 0
        axis = _axis(node, quantizer)
        rows = heard.reshape(1, -1) if axis is None else heard.movedim(axis, 0).flatten(1)
        if count := int((~rows.any(1)).sum()):
            self._silent[str(node.target).rpartition(".")[2]] = count, len(rows)


def _axis(node: Node, quantizer: Quantizer) -> int | None:
    """The axis of channels: those that the reader of a weight makes, or of an activation sums."""
    reader = next(iter(node.users), None)
    op = None if reader is None else compute_op(reader)
    if reader is None or op is None:
        return None
    if quantizer.spec.role is Role.WEIGHT:
        return weight_axis(reader, op)
    return channel_axis(reader, op, node)


def dead_layers(module: GraphModule, epochs: Sequence[EpochRecord]) -> list[str]:
    """What has been silent as a whole since some epoch, to its end, in words."""
    found = []
    nodes = {str(n.target).rpartition(".")[2]: n for n in module.graph.nodes}
    for name, (count, of) in (epochs[-1].silent if epochs else {}).items():
        if count < of or name not in nodes:  # gone: it passes everything through in the end
            continue
        since = epochs[-1].epoch
        for record in reversed(epochs):
            if record.silent.get(name) != (count, of):
                break
            since = record.epoch
        node = nodes[name]
        where = place(node.all_input_nodes[0]) or place(next(iter(node.users), node))
        found.append(
            f"every value of {name}{f' ({where})' if where else ''} has rounded to zero since "
            f"epoch {since}"
        )
    return found


def lowest_step(history: History) -> int | None:
    """After how many steps the smoothed training loss was lowest; None if it is at the end.

    A loss that is lowest at the end, and was read more than once, has fallen.
    """
    read = [(record.step + 1, record.loss) for record in history.steps if record.loss is not None]
    part = max(1, len(read) // _PARTS)
    means = [fmean(loss for _, loss in read[i : i + part]) for i in range(len(read) - part + 1)]
    if len(means) < 2 or means[-1] < min(means[:-1]):
        return None
    lowest = min(range(len(means)), key=lambda i: means[i] if isfinite(means[i]) else inf)
    return read[lowest + part - 1][0]


def surely_lower(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `losses` are lower than `others` by more than chance, batch by batch."""
    gaps = [b - a for a, b in zip(losses, others, strict=True)]
    if not gaps or not all(map(isfinite, losses)):
        return False
    if not all(map(isfinite, gaps)):
        return True
    error = stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return fmean(gaps) > _SURE * error
