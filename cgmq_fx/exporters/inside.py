"""Whether a file computes what its graph computes, told rounding by rounding.

In a deep network of few bits one code on the border between two changes all that follows in its
sample, so that correct arithmetics give other outputs. Whether a file is right can still be told
where its runtime shows the codes in it: each is compared with what the graph makes of the codes
before it, as the file has them. Nothing adds up then, and a code on a border is off by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.agreement import compared, in_float64
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import is_quantize
from cgmq_fx.passes.copying import copy_graph

_ON_A_BORDER = 0.02
"""Share of codes of one tensor that may be off by one."""

_ROUNDED = 8
"""By how much codes of 16 bits may be off, whose last bits are beyond what float32 sums hold."""


@dataclass(frozen=True)
class Inside:
    """What a runtime computes inside of a file.

    Attributes:
        module: The graph that was written.
        codes: For every batch the codes, zero points included, by the names of the quantize nodes
            that make them in the graph. Not all nodes need be there.
        outputs: For every batch the outputs that come of them, flat.
    """

    module: GraphModule
    codes: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Finding:
    """What was found inside of a file.

    Attributes:
        tensors: How many tensors of codes were compared.
        wrong: The first codes, or the outputs, that are something else, in words; None if there are
            none.
    """

    tensors: int
    wrong: str | None

    @property
    def excuse(self) -> str | None:
        """Why outputs that disagree are right all the same, as a sentence; None if they are not."""
        if self.wrong is not None:
            return None
        return (
            f"all {self.tensors} tensors of codes in the file are what the model makes of those "
            "before them, but single codes on a border change all that follows: measure the "
            "accuracy of the file itself, or allow more bits"
        )


def look_inside(inside: Inside, batches: Sequence[ExampleInputs]) -> Finding:
    """Compare the codes in a file with what its graph makes of those before them.

    A tensor is right if its codes are at most one off, and at most 2 % of them are (of 16 bits, at
    most 8); outputs are, if they are what `Agreement` asks for.

    Args:
        inside: What the runtime computed.
        batches: The inputs of that.
    """
    try:
        module = copy_graph(inside.module).double()
        steps = _steps(module, inside, [in_float64(batch) for batch in batches])
    except RuntimeError:  # an op has a dtype of its own
        steps = _steps(inside.module, inside, batches)
    wrong = next((f"{name}: {off}" for name, off in steps.off.items() if not off.on_borders), None)
    agreement = compared(inside.module, steps.outputs, inside.outputs)
    if wrong is None and not agreement.holds:
        wrong = f"the outputs: {agreement}"
    return Finding(len(steps.off), wrong)


@dataclass
class _Off:
    """How many codes of a tensor are off, by how much at most, and whether they take 16 bits."""

    count: int = 0
    total: int = 0
    most: int = 0
    wide: bool = False

    def add(self, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            raise ExportError(
                f"a tensor of the file has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        self.wide = expected.element_size() > 1
        away = (found.long() - expected.long()).abs()
        self.count += int((away > 0).sum())
        self.total += away.numel()
        self.most = max(self.most, int(away.max()) if away.numel() else 0)

    @property
    def on_borders(self) -> bool:
        if self.wide:
            return self.most <= _ROUNDED
        return self.most <= 1 and self.count <= _ON_A_BORDER * self.total

    def __str__(self) -> str:
        return f"{self.count:,} of {self.total:,} codes are off, by up to {self.most}"


@dataclass
class _Steps:
    """By name of its node how far every tensor of codes is off, and the outputs of every batch."""

    off: dict[str, _Off]
    outputs: list[list[Tensor]]


def _steps(module: GraphModule, inside: Inside, batches: Sequence[ExampleInputs]) -> _Steps:
    steps = _Steps({}, [])
    for batch, codes in zip(batches, inside.codes, strict=True):
        leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
        walk = _Walk(module, codes, steps.off)
        with torch.no_grad():
            made = walk.run(*leaves, enable_io_processing=False)
        steps.outputs.append([o for o in pytree.tree_leaves(made) if isinstance(o, Tensor)])
    return steps


class _Walk(Interpreter):
    """Runs a graph with the codes that are given, and notes how far its own would be off."""

    def __init__(
        self, module: GraphModule, codes: Mapping[str, Tensor], off: dict[str, _Off]
    ) -> None:
        super().__init__(module)
        self._codes, self._off = codes, off

    def run_node(self, n: Node) -> Any:
        """The codes of the file where there are any, what the node makes elsewhere."""
        made = super().run_node(n)
        given = self._codes.get(n.name) if is_quantize(n) else None
        if given is None:
            return made
        self._off.setdefault(n.name, _Off()).add(given, made)
        return given.to(made.dtype)
