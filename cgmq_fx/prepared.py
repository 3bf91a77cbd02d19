"""`prepare`: a model with quantizers and a controller, for a training loop of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.export import ExportedProgram

from cgmq_fx.bias_room import with_room_for_biases
from cgmq_fx.calibrate import RangeTable, calibrate, unchanged_buffers
from cgmq_fx.controller import Controller
from cgmq_fx.cost_models import (
    Assignment,
    Budget,
    BudgetLike,
    ConstraintState,
    GraphFacts,
    Ledger,
    check_cost_models,
    check_feasible,
    lowest_bits,
    parse_budget,
)
from cgmq_fx.cost_models.errors import CheckpointError, OptionError
from cgmq_fx.data import Signature, calibration_batches, example_inputs_of
from cgmq_fx.directions import Direction, direction_of
from cgmq_fx.distortion import with_distortion
from cgmq_fx.given import whole_number
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.history import GateRecord, Phase
from cgmq_fx.identity import ADDED, check_start, own_shapes
from cgmq_fx.passes.bias import align_signs
from cgmq_fx.passes.capture import Captured, ExampleInputs, device_of
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.freeze import Freeze
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.norms import (
    FoldNormalisers,
    NormaliseBatches,
    forget_norms,
    measured_norms,
    own_norms,
)
from cgmq_fx.passes.processes import process_count, refuse_sharded
from cgmq_fx.passes.prune import RemovePrunedChannels
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.recompute import recompute_rounded
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.passes.shapes import PropagateShapes
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.recount import verify
from cgmq_fx.result import Result

_LOG = logging.getLogger(__name__)

DEFAULT_SEARCH_STEPS = 1000
_CALIBRATION_BATCHES = 8
_KNOWN_SHARE = 0.125
"""Share of the search that gates take where calibration has told what they are worth."""


class Prepared:
    """A model being quantized in a loop of one's own.

    Call `step()` after every `optimizer.step()`. For the first `search_steps` steps the gates move
    (for an eighth of them where calibration has told what all bit-widths are worth, which takes one
    gate per tensor);
    then the bit-widths are frozen at the best assignment that satisfies the budget, and further
    training tunes weights and ranges. `finalize()` works at any time, and always satisfies.

    Attributes:
        model: The graph with quantizers; train its parameters with any optimizer.
        budget: What must hold.
        facts: What the model costs, apart from its bits.
    """

    def __init__(
        self,
        captured: Captured,
        budget: Budget,
        scheme: Scheme,
        direction: Direction,
        search_steps: int,
    ) -> None:
        self.dynamic = captured.dynamic
        self._inputs = captured.inputs
        self._direction = direction
        self._search_steps = search_steps
        self._start: Assignment | None = None
        self.model, self.facts = quantized_graph(captured, scheme)
        check_cost_models(self.facts, budget)
        check_feasible(self.facts, budget)
        run_passes(self.model, [NormaliseBatches()])
        if process_count() > 1 and (left := own_norms(self.model)):
            _LOG.warning(
                "SyncBatchNorm that is not behind the layer that it is folded into normalises by "
                "each process's own part of the batch: %s",
                ", ".join(left),
            )
        recompute_rounded(self.model)
        references = Ledger(self.facts, budget, lowest_bits(self.facts)).references
        self.budget = budget.referring_to(references)
        self._controller = self._controlled(self._ranges([captured.inputs]))
        self.model.train()

    @property
    def satisfied(self) -> bool:
        """Whether the budget holds for the current bit-widths."""
        return self._controller.satisfied

    @property
    def cost(self) -> tuple[ConstraintState, ...]:
        """The current measurement of every constraint."""
        return self._controller.states

    @property
    def phase(self) -> Phase:
        """Whether gates still move ("search") or not ("tune")."""
        return "tune" if self._controller.frozen else "search"

    @property
    def controller(self) -> Controller:
        """The gates and what moves them."""
        return self._controller

    @property
    def tables(self) -> Mapping[str, RangeTable]:
        """The calibrated ranges of every quantizer, by bit-width."""
        return self._tables

    @property
    def example_inputs(self) -> ExampleInputs:
        """The inputs that the model was captured with."""
        return self._inputs

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return tuple(str(n.target) for n in self.model.graph.nodes if n.op == "placeholder")

    def start_from(self, result: Result) -> None:
        """Take over weights and bit-widths of a result of the same model; then `calibrate`.

        Raises:
            OptionError: If it is of another model or lost channels, or training has begun.
        """
        if self._controller.taken:
            raise OptionError("a start must be given before the first step")
        check_start(result, own_shapes(self.model))
        own, given = self.model.state_dict(), result.model.state_dict()
        found = {
            name: tensor
            for name, tensor in given.items()
            if not name.startswith(ADDED) and name in own and own[name].shape == tensor.shape
        }
        self.model.load_state_dict(found, strict=False)
        forget_norms(self.model)
        self._start = result.cost.assignment
        self._controller.start(self._start)

    def calibrate(self, data: Iterable[Any], batches: int = _CALIBRATION_BATCHES) -> None:
        """Set the ranges from the first batches of real data; call it before the first step.

        If the direction wants it, as the default does, what low bit-widths do to the output is
        measured on the first batch, too.

        Args:
            data: Batches in any of the forms that `quantize` takes.
            batches: How many to use.

        Raises:
            DataError: If the data is empty or does not fit the model.
            OptionError: If training has begun.
        """
        whole_number("batches", batches, 1)
        if self._controller.taken:
            raise OptionError("calibrate before the first step: ranges have been trained since")
        signature = Signature.like(self._inputs, self.input_names)
        device = device_of(self.model)
        seen = calibration_batches(data, signature, supervised=False, count=batches, device=device)
        with measured_norms(self.model):
            tables = self._ranges(seen)
        if self._direction.measured:
            align_signs(self.model)
            own = self._quantizers
            with unchanged_buffers(self.model):
                tables = with_distortion(self.model, own, tables, seen[0], self.dynamic)
        self._controller = self._controlled(tables)

    def step(self) -> None:
        """Move the gates; call it after `optimizer.step()`.

        Raises:
            OptionError: If parameters have been sharded.
        """
        if self._controller.taken == 0:
            refuse_sharded(self.model.parameters())
        self._controller.step()

    def freeze(self, bits: Mapping[str, npt.ArrayLike] | None = None) -> None:
        """End the search now: freeze the best bit-widths that satisfy the budget, or given ones.

        Args:
            bits: The bit-widths of quantizers by name, one entry per gate or one for all of them;
                those that are left out keep the bits that they have now.

        Raises:
            OptionError: If the given bit-widths do not satisfy the budget or are none that the
                quantizers may have, or the bit-widths have been frozen before.
        """
        if bits is None:
            self._controller.freeze()
        else:
            self._controller.fix(bits)

    def gate_record(self, step: int) -> GateRecord:
        """Where the gates stand: the mean gate and bit-width of every quantizer."""
        controller = self._controller
        bits = tuple(float(own.mean()) for own in controller.assignment.values())
        sums = torch.bincount(controller.layout.owner, controller.gates)
        means = sums / torch.bincount(controller.layout.owner)
        return GateRecord(step, tuple(means.tolist()), bits)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes here: weights, ranges, gates; tensors by name.

        The optimizer's state and the random state are not in it.
        """
        tables = {
            name: {field.name: getattr(table, field.name) for field in fields(table)}
            for name, table in self._tables.items()
        }
        return {
            "model": {n: t.detach().clone() for n, t in self.model.state_dict().items()},
            "signed": {name: q.signed for name, q in self._quantizers.items()},
            "tables": tables,
            "controller": self._controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of the same model prepared in the same way.

        Raises:
            CheckpointError: If the state is that of another model, or damaged, or if its
                bit-widths are frozen and do not satisfy this budget.
        """
        try:
            for name, quantizer in self._quantizers.items():
                quantizer.signed = state["signed"][name] is True
            device = device_of(self.model)
            tables = {
                name: RangeTable(
                    t["log_ranges"].to(device),
                    t["noise"].to(device),
                    t["power"],
                    t["rows"],
                    t["distortion"],
                )
                for name, t in state["tables"].items()
            }
            self._controller = self._controlled(tables)
            self._controller.load_state_dict(state["controller"])
            self.model.load_state_dict(state["model"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state does not fit the model: {error}") from error

    def finalize(self) -> Result:
        """Freeze, copy, and verify.

        Returns:
            The result; its model is a copy in evaluation mode, this object can train on.

        Raises:
            BoundError: If the frozen copy, counted on its own, broke the budget: a defect of this
                library or a cost model with hidden state.
        """
        self._controller.freeze()
        passes = [
            FoldNormalisers(),
            Freeze(self._controller.assignment),
            PropagateShapes(self._inputs),
            RemovePrunedChannels(),
        ]
        frozen = run_passes(copy_graph(self.model), passes)
        frozen.eval()
        return Result(frozen, verify(frozen, self._inputs, self.budget), self.budget, self._inputs)

    def _ranges(self, batches: list[ExampleInputs]) -> dict[str, RangeTable]:
        own = self._quantizers
        placeholders = self.model.graph.find_nodes(op="placeholder")
        inputs = frozenset(node.name for node in placeholders) & frozenset(own)
        with unchanged_buffers(self.model):
            tables = calibrate(self.model, own, batches, inputs)
        return with_room_for_biases(self.model, own, tables)

    def _controlled(self, tables: Mapping[str, RangeTable]) -> Controller:
        self._tables = tables
        align_signs(self.model)
        steps = self._search_steps
        if _worth_is_known(self.facts, tables):
            steps = max(1, round(_KNOWN_SHARE * steps))
        controller = Controller(
            self._quantizers, self.facts, self.budget, tables, self._direction, steps
        )
        if self._start is not None:
            controller.start(self._start)
        return controller

    @property
    def _quantizers(self) -> dict[str, Quantizer]:
        container = self.model.get_submodule(QUANTIZERS)
        return {n: q for n, q in container.named_children() if isinstance(q, Quantizer)}


def _worth_is_known(facts: GraphFacts, tables: Mapping[str, RangeTable]) -> bool:
    """Whether gradients have nothing to tell: one gate per quantizer, and all were measured."""
    return all(
        quantizer.gates == 1 and tables[name].distortion is not None
        for name, quantizer in facts.quantizers.items()
    )


def prepare(
    model: nn.Module | ExportedProgram,
    budget: BudgetLike,
    example_inputs: Any = None,
    *,
    scheme: Scheme | None = None,
    search_steps: int = DEFAULT_SEARCH_STEPS,
    direction: str | Direction = "marginal",
    target: TargetLike | None = None,
) -> Prepared:
    """Prepare a model for a training loop of one's own.

    Args:
        model: The trained float model; it is not modified.
        budget: What the result may cost at most, for example `"bops <= 0.4%, weights <= 64 KiB"`.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments; may be left
            out for models that know their own.
        scheme: Bit-widths and granularity; the default is one gate per tensor.
        search_steps: Steps for which gates move, at most; the bound is reached within half of them.
        direction: Which way gates move, by name or a `Direction`.
        target: Where it is to run: a preset (`"onnxruntime"`, `"fpga"`, `"xnnpack"`, `"litert"`),
            a chip for latency and energy (a name, a file or a `Target`), or a sequence of both.

    Returns:
        The prepared model.

    Raises:
        BudgetError: If the budget cannot be read.
        InfeasibleBudgetError: If no bit-widths satisfy it.
        CostModelError: If a cost model breaks its contract on this model.
        CaptureError: If the model cannot be captured.
        UnsupportedModelError: If nothing in it can be quantized, or the target cannot execute it.
        DataError: If the input shapes cannot be known, or the inputs are not finite.
        TargetError: If the target cannot be read, or has no figure for what the model does.
        OptionError: If an option makes no sense, or the scheme does not fit the model or asks for
            what the target cannot execute.
    """
    where = deployment(target)
    chosen, steps = where.scheme(scheme), whole_number("search_steps", search_steps, 1)
    parsed = parse_budget(budget, where.chip)
    inputs = example_inputs_of(model, example_inputs, None, supervised=False)
    captured = float_graph(model, inputs)
    where.preset.check_ops(captured)
    return Prepared(captured, parsed, chosen, direction_of(direction), steps)
