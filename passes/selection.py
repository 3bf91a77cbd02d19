"""Which layers are quantized, and how: patterns over module paths and types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from torch.fx import Graph, Node

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.infra import module_path
from cgmq_fx.passes.oplists import AVERAGES, BINARY
from cgmq_fx.passes.optable import compute_op, looked_up
from cgmq_fx.passes.scheme import Scheme

_LISTED = 20


def names_of(node: Node) -> Iterator[str]:
    """What a pattern can match: the node's name, the path and the type of every module around it.

    Types are given by the name of the class, with and without its module.
    """
    yield node.name
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        yield str(path)
        full = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        yield full
        yield full.rpartition(".")[2]


def matches(pattern: str, node: Node) -> bool:
    """Whether a glob pattern matches a node by path or type of its module, or one around it."""
    return any(fnmatchcase(name, pattern) for name in names_of(node))


class Selection:
    """What a scheme says of every node of a graph.

    Args:
        scheme: The scheme with its patterns.
        graph: The graph, quantizers in it or not.

    Raises:
        OptionError: If a pattern matches no layer, a pattern of `layers` none that is quantized, or
            nothing is left to be quantized.
    """

    def __init__(self, scheme: Scheme, graph: Graph) -> None:
        self._scheme = scheme
        layers = [n for n in graph.nodes if compute_op(n) is not None]
        others = [n for n in graph.nodes if _is_link(n)]
        for name, patterns in (("skip", scheme.skipped), ("only", scheme.chosen)):
            _check(name, patterns, layers, others)
        _check("layers", [pattern for pattern, _ in scheme.layer_widths], layers, others)
        if layers and all(map(self.skips, layers)):
            raise OptionError("skip and only leave nothing to quantize")
        for pattern, _ in scheme.layer_widths:
            if all(self.skips(node) for node in (*layers, *others) if matches(pattern, node)):
                raise OptionError(
                    f"{pattern!r} in layers gives bit-widths to layers that skip, or only, leaves "
                    "in float; take it out of one of them"
                )

    def skips(self, node: Node) -> bool:
        """Whether a node is to stay in float."""
        if any(matches(pattern, node) for pattern in self._scheme.skipped):
            return True
        only = self._scheme.chosen
        return bool(only) and not any(matches(pattern, node) for pattern in only)

    def scheme_of(self, nodes: Iterable[Node], role: Role) -> Scheme:
        """The scheme of a tensor that `nodes` read: the bit-widths that all of them allow.

        Args:
            nodes: The nodes.
            role: Whether the tensor is a weight.

        Raises:
            OptionError: If they have no bit-width in common.
        """
        own = {node: self._scheme_of_one(node) for node in nodes}
        first = next(iter(own.values()))
        widths = {node: scheme.widths_of(role) for node, scheme in own.items()}
        common = [b for b in first.widths_of(role) if all(b in w for w in widths.values())]
        if not common:
            asked = ", ".join(
                f"{module_path(n) or n.name} {w}" for n, w in list(widths.items())[:4]
            )
            raise OptionError(
                f"layers that read the same tensor have no bit-width in common: {asked}"
            )
        return replace(first, bit_widths=tuple(common), weight_widths=None)

    def _scheme_of_one(self, node: Node) -> Scheme:
        scheme = self._scheme
        for pattern, widths in scheme.layer_widths:
            if matches(pattern, node):
                scheme = replace(scheme, bit_widths=widths, weight_widths=None)
        return scheme


def _is_link(node: Node) -> bool:
    """Whether a node is no layer, but may have a quantizer of its own."""
    called = node.op == "call_function"
    return called and (node.target in BINARY | AVERAGES or looked_up(node) is not None)


def _check(name: str, patterns: Iterable[str], layers: list[Node], others: list[Node]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, node) for node in (*layers, *others)):
            known = list(dict.fromkeys(module_path(n) or n.name for n in layers))
            more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
            raise OptionError(
                f"{pattern!r} in {name} matches no layer, neither by path nor by type; layers are "
                f"{', '.join(known[:_LISTED])}{more}"
            )
