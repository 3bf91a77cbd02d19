"""What a run is: everything that a checkpoint must have in common with the run that resumes it.

And what a result must have in common with a model that starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule
from torch.optim import Optimizer

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.cost_models.target import target_to_json
from cgmq_fx.directions import Direction
from cgmq_fx.fingerprint import fingerprint, short, tensor_digest
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.capture import Captured, device_of
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.norms import NORMS
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.presets import Deployment
from cgmq_fx.requirements import own_version
from cgmq_fx.result import Result
from cgmq_fx.training import Loss, Metric

ADDED = (f"{QUANTIZERS}.", f"{BIASES}.", f"{NORMS}.")
"""How names of state begin that is not the model's own."""


def run_identity(
    captured: Captured,
    where: Deployment,
    scheme: Scheme,
    direction: Direction,
    start: Result | None,
    loss: Loss | None,
    metric: Metric | None,
    *,
    judged: bool,
    epochs: int,
    batches: int,
    seed: int,
    backend: str | None = None,
) -> dict[str, Any]:
    """What a run is, apart from its budget and its optimizer, by name.

    A sweep has many budgets, and an optimizer is known once there are parameters to give it.

    Args:
        captured: The float graph, before quantizers are inserted. Whether it takes batches of any
            size is no part of what it is, nor are the sizes then.
        where: Where the result is to run.
        scheme: What is trained, as `where` has it.
        direction: Which way gates move.
        start: A result to start from, if there is one.
        loss: The loss.
        metric: The metric.
        judged: Whether there is validation data, which tells which epoch was best.
        epochs: Epochs.
        batches: Batches per epoch.
        seed: The seed.
        backend: What compiles the model, if anything does.
    """
    module, inputs = captured.module, captured.inputs
    return {
        "versions": {"cgmq_fx": own_version(), "torch": torch.__version__},
        "device": device_of(module).type,
        "inputs": [f"{tuple(t.shape[captured.dynamic :])} {t.dtype}" for t in inputs.tensors],
        "graph": short(module.code),
        "model": _digests(module),
        "start": start_identity(start),
        "target": {
            "preset": where.preset.name,
            "chip": None if where.chip is None else target_to_json(where.chip),
        },
        "scheme": repr(scheme),
        "val_data": "given" if judged else None,
        "epochs": epochs,
        "batches": batches,
        "seed": seed,
        "compile": backend,
        **fingerprint(direction=direction, loss=loss, metric=metric),
    }


def start_identity(start: Result | None) -> dict[str, Any]:
    """What a run takes over from a result, by name; nothing if it starts from the float model."""
    return {} if start is None else _digests(start.model)


def own_shapes(module: GraphModule) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's own parameters by name: not those of quantizers and normalisers."""
    named = module.named_parameters()
    return {name: tuple(p.shape) for name, p in named if not name.startswith(ADDED)}


def pruned(result: Result, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of a model's parameters that is shorter in a result, whose channels were pruned.

    Args:
        result: A result of the model.
        shapes: The shapes of the model's own parameters by name.
    """
    given = result.model.state_dict()
    found = {name: tuple(given[name].shape) for name in shapes if name in given}
    return next((name for name, shape in found.items() if _shorter(shape, shapes[name])), None)


def _shorter(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    same = len(shape) == len(other)
    return same and shape != other and all(a <= b for a, b in zip(shape, other, strict=True))


def check_start(result: Result, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a result has all parameters of a model; arguments as of `pruned`.

    Raises:
        OptionError: If it is of another model, or channels were pruned.
    """
    given = result.model.state_dict()
    short = pruned(result, shapes)
    if short is not None and all(name in given for name in shapes):
        raise OptionError(
            "start= has lost channels, which were pruned, or is a result of a smaller model: its "
            f"{short} has shape {tuple(given[short].shape)}, not {shapes[short]}; give a result "
            "without pruned channels, or leave out start="
        )
    for name, shape in shapes.items():
        if name not in given or tuple(given[name].shape) != shape:
            raise OptionError(
                f"start= is a result of another model: it has no {name} of shape {shape}"
            )


def optimizer_identity(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimizer and the options of its groups, by name."""
    options = {
        f"{name} of group {i}": repr(value)
        for i, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params"
    }
    return {"class": type(optimizer).__qualname__} | options


def digest_of(identity: dict[str, Any]) -> str:
    """A short digest of an identity or of parts of one."""
    return short(repr(sorted(identity.items())))


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first thing in which two calls differ, in words, or None."""
    for name in dict.fromkeys([*mine, *theirs]):
        ours, other = mine.get(name), theirs.get(name)
        if isinstance(ours, dict) and isinstance(other, dict):
            inner = difference(ours, other)
            if inner is not None:
                return f"of the {name}, {inner}"
        elif ours != other:
            return f"{name} is {_shown(ours)}, there it is {_shown(other)}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _digests(module: GraphModule) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in module.state_dict().items()}
