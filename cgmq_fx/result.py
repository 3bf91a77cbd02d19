"""What quantizing a model gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from cgmq_fx.cost_models import Budget
from cgmq_fx.data import keep_constants
from cgmq_fx.given import path_of
from cgmq_fx.history import History
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.plain import finite
from cgmq_fx.recount import CostReport

if TYPE_CHECKING:
    from pandas import DataFrame

    from cgmq_fx.exporters import Exported
    from cgmq_fx.exporters.certificate import Certificate

_MOST_TEXT = 300


@dataclass
class Result:
    """A quantized model whose cost has been verified.

    Attributes:
        model: A torch.fx GraphModule with frozen bit-widths, in evaluation mode.
        cost: Every constraint (bound, value, satisfied) and the cost of every node.
        budget: The budget that it was made for.
        inputs: Example inputs, from which shapes are taken.
        history: What was recorded on the way.
        metrics: Measurements of `model` on the validation data, by name.
        warnings: What went wrong in training, though it came to an end: a loss that never fell, a
            layer that is silent. And what bounds on memory do not say of the target.
    """

    model: GraphModule
    cost: CostReport
    budget: Budget
    inputs: ExampleInputs
    history: History = field(default_factory=History)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep_constants(self.model, self.inputs)

    def save(self, path: str | Path) -> Path:
        """Write the model, its budget and its history to one safetensors file.

        Args:
            path: The file, usually `*.safetensors`; replaced if it exists.

        Returns:
            The path.

        Raises:
            ArtifactError: If the graph holds something that the format cannot express, or the file
                cannot be written.
        """
        from cgmq_fx.artifact import save

        return save(self, path_of("save", path))

    def export(
        self,
        path: str | Path,
        format: str | None = None,
        *,
        verify: bool = True,
        samples: Iterable[Any] | None = None,
    ) -> Exported:
        """Write a file that a runtime executes, and check it there; see `cgmq_fx.export`."""
        from cgmq_fx.exporters import export

        return export(self, path, format, verify=verify, samples=samples)

    def plot(self, folder: str | Path) -> list[Path]:
        """Write plots as PNG files.

        Bits and cost by layer (`bits.png`) and along the network (`profile.png`), weights within
        their ranges (`ranges.png`), and if a training was recorded, cost and metrics over time
        against the bounds (`history.png`) and the gates (`gates.png`).

        Args:
            folder: Where to; made if it does not exist.

        Returns:
            The files.

        Raises:
            OptionError: If matplotlib is not installed, or the folder cannot be written to.
        """
        from cgmq_fx.plots import save_plots

        return save_plots(self, path_of("plot", folder))

    def to_html(self, path: str | Path, certificates: Sequence[Certificate] = ()) -> Path:
        """Write everything about the result as one page that needs no network.

        The graph, coloured by bits and zoomable; a table to sort; plots, if matplotlib is
        installed; and what was counted.

        Args:
            path: The file, usually `*.html`; replaced if it exists.
            certificates: Those of exported files (`export(...).certificate`), to be shown too.

        Returns:
            The path.

        Raises:
            OptionError: If the file cannot be written.
        """
        from cgmq_fx.html import save_html

        return save_html(self, path_of("to_html", path), certificates)

    def to_dataframe(self) -> DataFrame:
        """A row per layer: bits, MACs, and every cost.

        Raises:
            OptionError: If pandas is not installed.
        """
        from cgmq_fx.report import rows
        from cgmq_fx.tabular import frame

        return frame(rows(self))

    def report(self) -> dict[str, Any]:
        """The result as plain values: constraints, nodes, quantizers, metrics, history.

        Numbers that are not finite are None, as JSON has none.
        """
        from cgmq_fx.report import as_dict

        found: dict[str, Any] = finite(as_dict(self))
        return found

    def _repr_html_(self) -> str:
        from cgmq_fx.html import fragment

        return fragment(self)

    def __repr__(self) -> str:
        from cgmq_fx.report import factors

        layers = sum(found is not None for found in factors(self))
        return f"<Result of {layers} layers: {shorten(str(self.cost), _MOST_TEXT)}>"

    def __str__(self) -> str:
        from cgmq_fx.report import render

        return render(self)
