"""From a user's model to one graph in its canonical form, and to the same with quantizers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from cgmq_fx.cost_models import GraphFacts
from cgmq_fx.passes.annotate import annotate
from cgmq_fx.passes.attention import DecomposeAttention
from cgmq_fx.passes.batch import fixed_axes
from cgmq_fx.passes.bias import QuantizeBiases
from cgmq_fx.passes.capture import Captured, ExampleInputs, capture
from cgmq_fx.passes.complexes import DecomposeComplex
from cgmq_fx.passes.constants import FoldWeights
from cgmq_fx.passes.decompose import DecomposeComposite
from cgmq_fx.passes.functionalise import Functionalise
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.insert import InsertQuantizers
from cgmq_fx.passes.normalise import (
    FoldBatchNorm,
    LeaveTraining,
    MergeState,
    RelaxViews,
    RemoveNoOps,
    SwitchModes,
)
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.passes.shapes import CompareBatches, CompleteShapes, PropagateShapes
from cgmq_fx.passes.wrappers import InlineRegions
from cgmq_fx.turns import TURN


def float_graph(model: nn.Module | ExportedProgram, inputs: ExampleInputs) -> Captured:
    """Capture and normalise: the model as one graph of ATen ops, equal in float.

    Raises:
        CaptureError: If the model cannot be captured.
    """
    with TURN:
        captured = capture(model, inputs)
        if isinstance(model, ExportedProgram):
            run_passes(captured.module, [LeaveTraining()])
        found = normalised(captured)
    if isinstance(model, nn.Module):
        found.module.train(model.training)
    return found


def normalised(captured: Captured) -> Captured:
    """A captured model in its one canonical form, in place."""
    passes = [
        InlineRegions(),
        MergeState(),
        DecomposeComposite(),
        Functionalise(),
        DecomposeComposite(),  # of what was written in place
        RelaxViews(),
        RemoveNoOps(),
        PropagateShapes(captured.inputs),
        FoldWeights(),
        FoldBatchNorm(),
        DecomposeAttention(),
        DecomposeComplex(),
        SwitchModes(),
        CompleteShapes(captured.inputs),
    ]
    module = run_passes(captured.module, passes)
    inputs = captured.inputs
    if not captured.dynamic:
        inputs = replace(inputs, batched=fixed_axes(module, inputs), fixed=True)
    return replace(captured, module=module, inputs=inputs)


def quantized_graph(captured: Captured, scheme: Scheme) -> tuple[GraphModule, GraphFacts]:
    """Insert quantizers into a normalised graph, in place, and count its facts.

    Raises:
        UnsupportedModelError: If nothing in it can be quantized.
    """
    inputs = captured.inputs
    passes = [
        *([CompareBatches(inputs.twice)] if scheme.activations == "channel" else []),
        InsertQuantizers(scheme, batched=inputs.batch is not None),
        QuantizeBiases(),
        CompleteShapes(inputs),
    ]
    module = run_passes(captured.module, passes)
    return module, facts_of(module, inputs)


def facts_of(module: GraphModule, inputs: ExampleInputs) -> GraphFacts:
    """Count the facts of a graph that has the shapes of its example inputs."""
    run_passes(module, [CompareBatches(inputs.twice)])
    return annotate(module, inputs.batch or 1)
