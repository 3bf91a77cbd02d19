"""The structure of inputs and outputs as JSON and back: tuples, lists and mappings of tensors."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ArtifactError

MAX_DEPTH = 32


def spec_to_json(spec: pytree.TreeSpec) -> Any:
    """A structure of inputs or outputs; classes become what they hold.

    A named tuple (that of `topk`, say) becomes a tuple, and a mapping or dataclass (the outputs of
    Transformers, say) a dict: a loaded model has nothing of the user's code.
    """
    if spec.is_leaf():
        return "leaf"
    children = [spec_to_json(child) for child in spec.children()]
    if spec.type in (list, tuple):
        return {spec.type.__name__: children}
    if spec.type is namedtuple or (isinstance(spec.type, type) and issubclass(spec.type, tuple)):
        return {"tuple": children}
    keys = spec.context
    if isinstance(keys, list | tuple) and len(keys) == 2 and isinstance(keys[0], list):
        keys = keys[0]  # a registered dataclass: names of the fields that are set, and of the rest
    named = isinstance(keys, list | tuple) and all(isinstance(k, str) for k in keys)
    if named and len(keys) == len(children):
        return {"dict": [list(keys), children]}
    raise ArtifactError(
        f"the model takes or returns a {spec.type.__name__}, which an artifact cannot hold; "
        "tensors, tuples, lists, and mappings with string keys it can"
    )


def plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same structure without classes, where it has one that `spec_to_json` can write."""
    try:
        return spec_from_json(spec_to_json(spec))
    except ArtifactError:
        return spec


def spec_from_json(data: Any, depth: int = 0) -> pytree.TreeSpec:
    """The structure that `spec_to_json` wrote.

    Raises:
        ArtifactError: If the data describes none, or one that is nested too deeply.
    """
    return pytree.tree_structure(_skeleton(data, depth))


def _skeleton(data: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ArtifactError("the inputs or outputs are nested too deeply")
    if data == "leaf":
        return 0
    ((kind, content),) = data.items()
    if kind == "dict":
        keys, children = content
        pairs = zip(keys, children, strict=True)
        return {str(key): _skeleton(child, depth + 1) for key, child in pairs}
    children = [_skeleton(child, depth + 1) for child in content]
    if kind == "list":
        return children
    if kind == "tuple":
        return tuple(children)
    raise ArtifactError(f"the file describes inputs or outputs of the unknown kind {kind!r}")
