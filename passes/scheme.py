"""How a model is to be quantized: bit-widths and granularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.passes.grid import DEFAULT_BIT_WIDTHS, allowed_bit_width

Granularity: TypeAlias = Literal["tensor", "channel", "element"]
"""How many gates or ranges a quantizer has: one, one per channel, or one per element."""

LINK_BITS = 8
"""Most bits of a tensor that only element-wise ops read: what integer runtimes add and join."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What quantizers are inserted.

    Attributes:
        bit_widths: The bit-widths that a gate may take, ascending; 32 is float.
        weights: Gates of weights: per tensor, per output channel or per element.
        activations: Gates of activations: per tensor or per channel.
        weight_ranges: Ranges of weights: per tensor or per output channel.
        input_bits: Fixes the network's inputs at this bit-width; None lets the search decide.
        output_bits: Quantizes the network's outputs too, at this bit-width; None leaves them.
        power_of_two: Whether the steps of all grids are powers of two, so that scaling is a shift.

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

    def __post_init__(self) -> None:
        if not isinstance(self.bit_widths, tuple):
            raise OptionError(f"bit_widths must be a tuple, not {self.bit_widths!r}")
        ends = [bits for bits in (self.input_bits, self.output_bits) if bits is not None]
        for bits in (*self.bit_widths, *ends):
            if type(bits) is not int or not allowed_bit_width(bits):
                raise OptionError(
                    f"{bits!r} is no bit-width; use 0 (prune), 2 to 16, or 32 (float)"
                )
        if not self.bit_widths or tuple(sorted(set(self.bit_widths))) != self.bit_widths:
            raise OptionError(
                f"bit_widths must be ascending without repeats, not {self.bit_widths}"
            )
        for name, most in (("weights", 3), ("activations", 2), ("weight_ranges", 2)):
            choices = get_args(Granularity)[:most]
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")

    @property
    def link_widths(self) -> tuple[int, ...]:
        """The bit-widths of tensors that only element-wise ops read."""
        few = tuple(b for b in self.bit_widths if 0 < b <= LINK_BITS)
        return few or (LINK_BITS,)
