"""Copies of graphs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of a model; tensors that are results of a computation are copied detached.

    Modules keep such tensors as attributes: what weight norm computed, a recurrent state. Python's
    own copy refuses them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, memo)


def copy_graph(module: GraphModule) -> GraphModule:
    """A deep copy of a graph with its state; torch's warnings about its own copying are dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        duplicate = copy.deepcopy(module)
    duplicate.train(module.training)
    return duplicate
