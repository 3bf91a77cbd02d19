"""How a model is to be quantized: bit-widths and granularity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.cost_models.facts import FLOAT_BITS, Role
from cgmq_fx.passes.grid import DEFAULT_BIT_WIDTHS, allowed_bit_width

Granularity: TypeAlias = Literal["tensor", "channel", "element"]
"""How many gates or ranges a quantizer has: one, one per channel, or one per element."""

Patterns: TypeAlias = "str | Iterable[str]"
"""One glob pattern, or several; kept as a tuple."""

LayerWidths: TypeAlias = (
    "Mapping[str, int | tuple[int, ...]] | Iterable[tuple[str, int | tuple[int, ...]]]"
)
"""Bit-widths by glob pattern; kept as pairs of a pattern and a tuple."""

LINK_BITS = 8
"""Most bits of a tensor that only element-wise ops read: what integer runtimes add and join."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What quantizers are inserted.

    `skip`, `only` and `layers` hold glob patterns. A pattern selects the layers whose module, or a
    module around it, it matches by path ("encoder.*", "classifier") or by type ("Linear"); it can
    also be the name of a node in the graph. What is said of a layer holds for its weight and for
    the tensor that it reads. A pattern that matches nothing is an error.

    Attributes:
        bit_widths: The bit-widths that a gate may take, a tuple of 0 (prunes), 2 to 16 and 32
            (float), ascending. Tensors that only sums, element-wise products and pools read take
            those of 2 to 8 bits, 8 if there is none: integer runtimes have no wider sums.
        weights: Gates of weights: per tensor, per output channel or per element. Tables that are
            only looked up (embeddings, bags, parameters read by indices) have one.
        activations: Gates of activations: per tensor or per channel.
        weight_ranges: Ranges of weights: per tensor or per output channel (of tables, per row).
        input_bits: Fixes the network's inputs at this bit-width, or what becomes of them by moving
            values and by sums and products with constants, where that is quantized; None lets the
            search decide. An error if neither is.
        output_bits: Rounds the network's outputs too, at this bit-width, where integer kernels make
            them: a layer, or sums, pools and moves of what layers give; each part of a join on its
            own. What is computed in float (a sigmoid, a product with a constant) is returned in
            float. None leaves all of them, unless a preset rounds them; 32 leaves them anyway.
        power_of_two: Whether the steps of all grids are powers of two, so that scaling is a shift.
        skip: Layers that stay in float; one pattern or several.
        only: If any, the only layers that are quantized; one pattern or several.
        layers: Bit-widths of their own for some layers, as `{"head": 8, "encoder.*": (4, 8)}`;
            where several patterns match, the last counts.
        weight_widths: The bit-widths of weights, where they differ from those of other tensors;
            `layers` takes precedence.

    Raises:
        OptionError: If a bit-width cannot be used, or a granularity makes no sense.
    """

    bit_widths: tuple[int, ...] = DEFAULT_BIT_WIDTHS
    weights: Granularity = "tensor"
    activations: Granularity = "tensor"
    weight_ranges: Granularity = "channel"
    input_bits: int | None = None
    output_bits: int | None = None
    power_of_two: bool = False
    skip: Patterns = ()
    only: Patterns = ()
    layers: LayerWidths = ()
    weight_widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ends = [bits for bits in (self.input_bits, self.output_bits) if bits is not None]
        _check_widths("bit_widths", self.bit_widths)
        if self.weight_widths is not None:
            _check_widths("weight_widths", self.weight_widths)
        for bits in ends:
            _check_widths("input_bits and output_bits", (bits,))
            if bits == 0:
                raise OptionError("input_bits and output_bits cannot be 0: nothing would be left")
        object.__setattr__(self, "skip", self.skipped)
        object.__setattr__(self, "only", self.chosen)
        object.__setattr__(self, "layers", self.layer_widths)
        for name, most in (("weights", 3), ("activations", 2), ("weight_ranges", 2)):
            choices = get_args(Granularity)[:most]
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")

    @property
    def skipped(self) -> tuple[str, ...]:
        """The patterns of `skip`."""
        return _patterns("skip", self.skip)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The patterns of `only`."""
        return _patterns("only", self.only)

    @property
    def layer_widths(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The patterns of `layers` with their bit-widths."""
        return _layers(self.layers)

    def widths_of(self, role: Role) -> tuple[int, ...]:
        """The bit-widths of weights, or of other tensors."""
        own = self.weight_widths if role is Role.WEIGHT else None
        return self.bit_widths if own is None else own

    @property
    def rounded_output(self) -> int | None:
        """The bit-width that outputs are rounded to, or None if they are not."""
        return None if self.output_bits == FLOAT_BITS else self.output_bits

    @property
    def link_widths(self) -> tuple[int, ...]:
        """The bit-widths of tensors that only element-wise ops read."""
        few = tuple(b for b in self.bit_widths if 0 < b <= LINK_BITS)
        return few or (LINK_BITS,)


def _check_widths(name: str, widths: Any) -> None:
    if not isinstance(widths, tuple):
        raise OptionError(f"{name} must be a tuple, not {widths!r}")
    for bits in widths:
        if type(bits) is not int or not allowed_bit_width(bits):
            raise OptionError(f"{bits!r} is no bit-width; use 0 (prune), 2 to 16, or 32 (float)")
    if not widths or tuple(sorted(set(widths))) != widths:
        raise OptionError(f"{name} must be ascending without repeats, not {widths}")


def _patterns(name: str, given: Any) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    found = (given,) if isinstance(given, str) else given
    patterns = tuple(found) if isinstance(found, Iterable) else (None,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"{name} takes a pattern such as 'encoder.*', or several, not {given!r}")
    return patterns


def _layers(given: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Patterns with their bit-widths, from a mapping or from pairs."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        rows = tuple((p, (w,) if isinstance(w, int) else tuple(w)) for p, w in pairs)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"layers takes bit-widths by pattern, as {{'encoder.*': (4, 8)}}, not {given!r}"
        ) from error
    for pattern, widths in rows:
        _patterns("layers", pattern)
        _check_widths(f"layers[{pattern!r}]", widths)
    return rows
