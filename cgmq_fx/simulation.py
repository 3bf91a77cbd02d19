"""`simulate`: a quantized model in the arithmetic of a chip."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from cgmq_fx.cost_models.errors import DataError, OptionError
from cgmq_fx.data import Signature, split_batch
from cgmq_fx.judging import shapes_of
from cgmq_fx.passes.integer import Rounding, Simulation, simulate_graph
from cgmq_fx.passes.lower import lower
from cgmq_fx.result import Result

RoundingName: TypeAlias = Literal["float", "half-up", "half-away", "truncate"]


def simulate(result: Result, inputs: Any, rounding: RoundingName = "float") -> Simulation:
    """Run a quantized model in integers, as a chip does.

    Args:
        result: The quantized model.
        inputs: A batch in any of the forms that `quantize` takes, without a target.
        rounding: How a sum of products is brought to the next grid: times a float32 factor with
            ties to even ("float", onnxruntime), or times a 31-bit multiplier and shifted, with
            ties going up ("half-up"), away from zero ("half-away"), or cut off ("truncate").

    Returns:
        The outputs, what had to be computed in float, and the bits that accumulators need.

    Raises:
        OptionError: If there is no such rounding.
        DataError: If the inputs do not fit the model.
        UnsupportedModelError: If the graph cannot be lowered.
    """
    known = [kind.value for kind in Rounding]
    if rounding not in known:
        raise OptionError(f"there is no rounding {rounding!r}; there are {', '.join(known)}")
    names = tuple(str(n.target) for n in result.model.graph.find_nodes(op="placeholder"))
    batch = split_batch(inputs, Signature.like(result.inputs, names), supervised=False)
    module = lower(result.model, result.inputs).cpu()
    own = batch.inputs.map(lambda t: t.detach().cpu())
    try:
        return simulate_graph(module, own, Rounding(rounding))
    except (RuntimeError, TypeError, ValueError) as error:
        given = shapes_of(own.tensors)
        raise DataError(f"the model fails on inputs of {given}: {error}") from error
