"""What backward passes report for every gate, in one flat tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, distributed

from cgmq_fx.cost_models import Role
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.processes import process_count, refuse_sharded
from cgmq_fx.passes.quantizer import Quantizer

_LARGE = 3e38
_grad = attrgetter("grad")


class Readout:
    """The statistic of all gates; the probes' gradients are views of one buffer.

    Backward passes add to the buffer in place, so a step reads it as a whole, however many
    quantizers there are. On a device other than the CPU it is copied without waiting: what a step
    sees is then that of the step before.

    Args:
        quantizers: The quantizers that are observed.
        statistic: What they report.
    """

    def __init__(self, quantizers: Sequence[Quantizer], statistic: Statistic) -> None:
        self._quantizers = quantizers
        self._rows = statistic.rows
        self._sizes = [q.bits.numel() for q in quantizers]
        self._power = _powers(quantizers, self._sizes, statistic)
        self._owners = [vars(q) for q in quantizers]  # reading attributes of modules is slow
        self._probes: list[Tensor | None] = []
        self._known: list[Tensor] = []
        self._views: list[Tensor] = []
        self._flat = self._order = torch.zeros(0, dtype=torch.float32)
        self._version = 0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._bind()

    def take(self) -> Tensor:
        """The statistic since the last call, finite, shape (rows, gates), on the CPU.

        Raises:
            OptionError: If parameters have been sharded.
        """
        if not self._bound():
            found = self._gather()
            self._bind()
            found = found.to(self._flat)
        else:
            found = self._flat.take(self._order)
        rows = _across_processes(found, self._power)
        rows = torch.nan_to_num(rows.float(), posinf=_LARGE)
        self._flat.zero_()
        self._version = self._flat._version
        return rows if rows.device.type == "cpu" else self._late(rows)

    def state_dict(self) -> dict[str, Any]:
        """What has been read and not been seen yet: the statistic of the step before, or None."""
        if self._copy is None:
            return {"late": None}
        self._copy[1].synchronize()
        return {"late": self._copy[0].clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        late = state["late"]
        self._copy = None if late is None else (late, torch.cuda.Event())

    def _bound(self) -> bool:
        """Whether every probe and its gradient still are those that were bound.

        Every backward pass adds to every gradient once, in place, and the buffer counts that. Only
        where the count is another one, probes are looked at, one by one.
        """
        additions = self._flat._version - self._version
        if additions and self._known and additions % len(self._known) == 0:
            return True
        probes, grads = map(itemgetter("probe"), self._owners), map(_grad, self._known)
        return all(map(is_, probes, self._probes)) and all(map(is_, grads, self._views))

    def _gather(self) -> Tensor:
        """What stands in gradients that are no views of the buffer: after a move, say."""
        parts = []
        for quantizer, size in zip(self._quantizers, self._sizes, strict=True):
            grad = None if quantizer.probe is None else quantizer.probe.grad
            empty = torch.zeros(self._rows, size, dtype=torch.float32)
            parts.append(empty if grad is None else grad.reshape(self._rows, -1).cpu().float())
        return torch.cat(parts, 1)

    def _bind(self) -> None:
        refuse_sharded(q.log_range for q in self._quantizers)
        self._probes = [own["probe"] for own in self._owners]
        self._known = [p for p in self._probes if p is not None]
        like = self._known[0] if self._known else torch.zeros((), dtype=torch.float32)
        count = self._power.numel()
        self._flat = torch.zeros(count, dtype=like.dtype, device=like.device)
        self._power = self._power.to(self._flat)
        sizes = [self._rows * size for size in self._sizes]
        places = torch.arange(count, device=like.device).split(sizes)
        self._order = torch.cat([p.view(self._rows, -1) for p in places], 1)
        self._views = []
        for probe, part in zip(self._probes, self._flat.split(sizes), strict=True):
            if probe is not None:
                probe.grad = part.view(probe.shape)
                self._views.append(probe.grad)

    def _late(self, rows: Tensor) -> Tensor:
        """Copy to the CPU without waiting; the copy of the step before, which has arrived."""
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        ready, self._copy = self._copy or (host, event), (host, event)
        ready[1].synchronize()
        return ready[0]


def _powers(quantizers: Sequence[Quantizer], sizes: Sequence[int], statistic: Statistic) -> Tensor:
    """By which power of the number of processes the sum over them has to be divided.

    Every process divides its loss by its own part of the batch, so `n` processes have `n` times the
    gradients of one at their activations. Gradients of weights have been averaged before they are
    measured, so that all processes report the same.

    Returns:
        Shape (rows, gates).
    """
    power = [2.0 if q.spec.role is Role.ACTIVATION else 1.0 for q in quantizers]
    per_gate = torch.repeat_interleave(
        torch.tensor(power, dtype=torch.float32), torch.tensor(sizes)
    )
    powers = per_gate.repeat(statistic.rows, 1)
    if statistic is Statistic.MAGNITUDES:
        powers[1] = 1.0  # of the values themselves
    return powers


def _across_processes(rows: Tensor, power: Tensor) -> Tensor:
    """The statistic of the whole batch, the same in every process."""
    count = process_count()
    if count == 1:
        return rows
    distributed.all_reduce(rows)
    return rows / count**power
