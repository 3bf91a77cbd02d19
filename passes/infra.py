"""What a pass is, and the one place that runs passes and checks the graph after each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.errors import CgmqError, PassError


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass did.

    Attributes:
        module: The graph, usually the same object, edited.
        modified: Whether anything may have changed: the graph is then checked and recompiled.
    """

    module: GraphModule
    modified: bool


class Pass(ABC):
    """A transformation of a graph. Subclasses are frozen dataclasses: their fields are options."""

    @abstractmethod
    def run(self, module: GraphModule) -> PassResult:
        """Transform `module`; neither lint nor recompile, the runner does."""

    def check(self, module: GraphModule) -> None:  # noqa: B027 - most passes have no contract
        """Check the contract that holds after this pass; raise `PassError` if it does not."""


def run_passes(module: GraphModule, passes: Iterable[Pass]) -> GraphModule:
    """Run passes in order; lint, recompile and check the contract after each.

    Raises:
        PassError: Naming the pass that failed and those that ran before it.
        CgmqError: What a pass raises about the user's model goes through unchanged.
    """
    done: list[str] = []
    for step in passes:
        name = type(step).__name__
        try:
            result = step.run(module)
            module = result.module
            if result.modified:
                module.graph.lint()
                module.recompile()
            step.check(module)
        except CgmqError:
            raise
        except Exception as error:
            before = ", ".join(done) or "none"
            raise PassError(
                f"the pass {name} failed: {error} (passes before it: {before})"
            ) from error
        done.append(name)
    return module


def place(node: Node) -> str:
    """Where a node came from in the user's model: module path and source line, as far as known."""
    parts = [path for path in [module_path(node)] if path]
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if lines:
        parts.append(lines[-1].split(", in ")[0])
    return ", ".join(parts)


def module_path(node: Node) -> str:
    """Path of the user's module that a node came from, empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""
