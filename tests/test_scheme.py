"""Options of a scheme."""

from typing import Any

import pytest

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.passes.scheme import Scheme

ACCEPTED: list[dict[str, Any]] = [
    {},
    {"bit_widths": (8,)},
    {"bit_widths": (0, 2, 3, 16, 32)},
    {"weights": "element", "activations": "channel", "weight_ranges": "tensor"},
    {"input_bits": 8},
    {"input_bits": 32},
    {"output_bits": 8, "power_of_two": True},
    {"weight_widths": (4,)},
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_options_are_kept(options: dict[str, Any]) -> None:
    scheme = Scheme(**options)
    assert {name: getattr(scheme, name) for name in options} == options


def test_the_defaults() -> None:
    expected = Scheme((2, 4, 8, 16, 32), "tensor", "tensor", "channel", None, None, False)
    assert Scheme() == expected


ASCENDING = "bit_widths must be ascending without repeats, not "
NO_WIDTH = r" is no bit-width; use 0 \(prune\), 2 to 16, or 32 \(float\)"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bit_widths": ()}, ASCENDING),
    ({"bit_widths": (4, 2)}, ASCENDING + r"\(4, 2\)"),
    ({"bit_widths": (2, 2)}, ASCENDING + r"\(2, 2\)"),
    ({"bit_widths": [2, 4]}, r"bit_widths must be a tuple, not \[2, 4\]"),
    ({"bit_widths": 8}, "bit_widths must be a tuple, not 8"),
    ({"bit_widths": "8"}, "bit_widths must be a tuple, not '8'"),
    ({"bit_widths": (1, 2)}, "1" + NO_WIDTH),
    ({"bit_widths": (2, 17)}, "17" + NO_WIDTH),
    ({"bit_widths": (-2, 2)}, "-2" + NO_WIDTH),
    ({"bit_widths": (2, 64)}, "64" + NO_WIDTH),
    ({"bit_widths": (2.0, 4.0)}, "2.0" + NO_WIDTH),
    ({"bit_widths": (2, "4")}, "'4'" + NO_WIDTH),
    ({"bit_widths": (2, None)}, "None" + NO_WIDTH),
    ({"bit_widths": (False, 2)}, "False" + NO_WIDTH),
    ({"weight_widths": 8}, "weight_widths must be a tuple, not 8"),
    ({"weight_widths": ()}, "weight_widths must be ascending without repeats"),
    ({"weight_widths": (1, 4)}, "1" + NO_WIDTH),
    ({"input_bits": 1}, "1" + NO_WIDTH),
    ({"input_bits": 0}, "input_bits and output_bits cannot be 0"),
    ({"output_bits": 0}, "input_bits and output_bits cannot be 0"),
    ({"output_bits": 1}, "1" + NO_WIDTH),
    ({"input_bits": "8"}, "'8'" + NO_WIDTH),
    ({"input_bits": 8.0}, "8.0" + NO_WIDTH),
    (
        {"weights": "layer"},
        r"weights must be one of \('tensor', 'channel', 'element'\), not 'layer'",
    ),
    ({"weights": None}, "weights must be one of .*, not None"),
    (
        {"activations": "element"},
        r"activations must be one of \('tensor', 'channel'\), not 'element'",
    ),
    ({"weight_ranges": "element"}, r"weight_ranges must be one of \('tensor', 'channel'\), not"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_an_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        Scheme(**options)


# Tensors that only element-wise ops read have at most 8 bits, and are never pruned.
LINKS = [
    ((2, 4, 8, 16, 32), (2, 4, 8)),
    ((0, 3, 32), (3,)),
    ((16, 32), (8,)),
    ((0,), (8,)),
    ((8,), (8,)),
]


@pytest.mark.parametrize(("widths", "expected"), LINKS)
def test_the_bit_widths_of_links(widths: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert Scheme(bit_widths=widths).link_widths == expected
