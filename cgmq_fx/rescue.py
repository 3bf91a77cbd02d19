"""When training goes wrong: what is to blame, and what can still be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import CgmqError
from cgmq_fx.history import EpochRecord, History
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import place
from cgmq_fx.passes.norms import unshared
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.prepared import Prepared
from cgmq_fx.result import Result

_SMALLEST = -80.0
"""Natural logarithm of the smallest range whose finest step float32 can still hold."""


def blame(module: GraphModule, inputs: ExampleInputs) -> str:
    """What is the first thing in a forward pass that is not finite, in words."""
    if not _finite(inputs.tensors):
        return "the inputs of this batch have values that are not finite"
    with unshared(module):
        for found in (broken_state(module), _First(module).node(inputs)):
            if found is not None:
                return found
    return "every value in the graph is finite, so the loss itself or its target is to blame"


def broken_state(module: GraphModule) -> str | None:
    """The first range or weight that is not usable any more, in words, or None."""
    for name, quantizer in module.named_modules():
        if isinstance(quantizer, Quantizer):
            low, high = quantizer.log_range.detach().aminmax()
            if not float(low) >= _SMALLEST or not float(high) <= -_SMALLEST:
                what = "collapsed to zero" if float(high) < 0 else "is not finite or far too large"
                return f"the range of the quantizer {name.rpartition('.')[2]} {what}"
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not _finite([tensor]):
            return f"{name} has values that are not finite"
    return None


def broken_gradient(module: GraphModule) -> str | None:
    """The first parameter whose gradient is not finite, by name, or None."""
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if not grads or bool(torch.stack([g.sum().float() for g in grads.values()]).isfinite().all()):
        return None
    return next((name for name, grad in grads.items() if not _finite([grad])), None)


@dataclass(frozen=True, slots=True)
class Kept:
    """A state that satisfies the budget.

    Attributes:
        state: What `Prepared.state_dict` gave.
        epoch: The epoch that it is the end of.
        score: What it is judged by: the loss on the validation data, else `loss`.
        loss: The mean training loss of the epoch.
    """

    state: dict[str, Any]
    epoch: int
    score: float
    loss: float


class Rescue:
    """Keeps the best state of a run, on the CPU, and makes a result of it.

    Args:
        prepared: The model that is trained; as it is now, it is the start.

    Attributes:
        start: The state before the first step.
        best: The best state at the end of an epoch that satisfied the budget, if there is one.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.start = self._now()
        self._good = self.start
        self.best: Kept | None = None

    def keep(self, record: EpochRecord, satisfied: bool) -> None:
        """Remember the current state, unless it is broken or a better one is known.

        Args:
            record: The epoch that has just ended.
            satisfied: Whether the budget held in all of it, so that its training loss tells.
        """
        if broken_state(self._prepared.model) is not None:
            return
        judged = record.metrics.get("loss", record.loss if satisfied else nan)
        if record.satisfied and isfinite(judged):
            if self.best is None or judged <= self.best.score:
                self.best = Kept(self._now(), record.epoch, judged, record.loss)
                self._good = self.best.state
        elif self.best is None:
            self._good = self._now()

    def result(
        self, optimizer: Optimizer, history: History, recent: float | None = None
    ) -> Result | None:
        """The current state, or the best one, as a result; None if nothing can be made of it.

        Args:
            optimizer: Its gradients are dropped first: memory may be what is missing.
            history: What was recorded so far.
            recent: The mean training loss since the last epoch ended, if a step was taken since.
        """
        optimizer.zero_grad(set_to_none=True)
        own, best = self._prepared, self.best
        try:
            worse = best is not None and not (
                own.satisfied and recent is not None and recent <= best.loss
            )
            if worse or broken_state(own.model) is not None:
                own.load_state_dict(self._good)
            result = own.finalize()
        except (CgmqError, RuntimeError, MemoryError):
            return None
        result.history = history
        return result

    def others(self, epochs: int) -> Iterator[tuple[str, Result]]:
        """What there is besides the state after `epochs` epochs, which is put back in the end.

        First the best epoch, if it is not the last one, then the start, without any training.
        """
        now, best = self._now(), self.best
        kept = []
        if best is not None and best.epoch < epochs:
            kept.append((f"epoch {best.epoch}", best.state))
        try:
            for name, state in [*kept, ("the calibrated start, without training", self.start)]:
                self._prepared.load_state_dict(state)
                yield name, self._prepared.finalize()
        finally:
            self._prepared.load_state_dict(now)

    def other(self, wanted: str, epochs: int) -> Result:
        """One of the `others`, by its name."""
        return next(result for name, result in self.others(epochs) if name == wanted)

    def state_dict(self) -> dict[str, Any]:
        """The best state; the start is known to whoever makes the same call again."""
        kept = self.best
        return {} if kept is None else {f.name: getattr(kept, f.name) for f in fields(kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.best = Kept(**state) if state else None
        self._good = self._now() if self.best is None else self.best.state

    def _now(self) -> dict[str, Any]:
        state: dict[str, Any] = pytree.tree_map_only(
            Tensor, lambda t: t.cpu(), self._prepared.state_dict()
        )
        return state


class _First(Interpreter):
    """Finds the first node whose output is not finite."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._found: Node | None = None

    def node(self, inputs: ExampleInputs) -> str | None:
        leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
        with torch.no_grad():
            self.run(*leaves, enable_io_processing=False)
        if self._found is None:
            return None
        where = place(self._found)
        return f"the output of {self._found.name} is not finite" + (f" ({where})" if where else "")

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self._found is None and not _finite(pytree.tree_leaves(value)):
            self._found = n
        return value


def _finite(values: Iterable[Any]) -> bool:
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return all(bool(t.detach().isfinite().all()) for t in tensors)
