"""Inputs for runtimes whose files take one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cgmq_fx.passes.capture import ExampleInputs


def first_sample(inputs: ExampleInputs) -> ExampleInputs:
    """The first sample of a batch, as a batch of 1; all of it where there is no batch."""
    return next(single_samples(inputs))


def single_samples(inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Every sample of a batch, as a batch of 1."""
    for index in range(inputs.batch or 0):
        yield inputs.rows(index, index + 1).map(torch.clone)
    if inputs.batch is None:
        yield inputs


def run_each(
    run: Callable[[list[Tensor]], list[Tensor]], batches: Sequence[ExampleInputs]
) -> list[list[Tensor]]:
    """Run batches sample by sample, and put the outputs of each batch together again.

    Args:
        run: Maps the tensors of one sample to its outputs.
        batches: Inputs.
    """
    found = []
    for batch in batches:
        rows = [run(sample.tensors) for sample in single_samples(batch)]
        found.append([torch.cat(column) for column in zip(*rows, strict=True)])
    return found
