"""Copies of graphs."""

from __future__ import annotations

import copy
import warnings

from torch.fx import GraphModule


def copy_graph(module: GraphModule) -> GraphModule:
    """A deep copy of a graph with its state; torch's warnings about its own copying are dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        duplicate = copy.deepcopy(module)
    duplicate.train(module.training)
    return duplicate
