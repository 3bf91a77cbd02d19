"""Target files: what is read, and what is refused with which words."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.cost_models import load_target, target_names
from cgmq_fx.cost_models.errors import TargetError, UnknownTargetError
from cgmq_fx.cost_models.target import Row, Target, parse_target, target_to_json


def valid(**changes: Any) -> dict[str, Any]:
    row = {"weight": 8, "activation": 8, "cycles": 1.5}
    return {
        "name": "toy",
        "description": "A toy.",
        "source": "Made up.",
        "tables": {"*": [row]},
    } | changes


def with_row(**changes: Any) -> dict[str, Any]:
    return valid(tables={"*": [{"weight": 8, "activation": 8, "cycles": 1.5} | changes]})


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in valid().items() if k != key}


REFUSED: list[tuple[Any, str]] = [
    (b"", "toy.json is no target file: Expecting value"),
    (b"\xff", "is no target file: .*can't decode byte 0xff"),
    (b"[" * 100_000, "is no target file: maximum recursion depth"),
    (b'{"clock_hz": 1, "clock_hz": 2}', "is no target file: it has the key 'clock_hz' twice"),
    (b'{"tables": {"*": [], "*": []}}', "it has the key '.' twice"),
    ([], r"expected an object, not \[\]"),
    (3, "expected an object, not 3"),
    (without("name"), "it has no 'name'"),
    (without("source"), "it has no 'source'"),
    (without("tables"), "it has no 'tables'"),
    (valid(name=3), "name must be a text that is not empty, not 3"),
    (valid(source="  "), "source must be a text that is not empty, not '  '"),
    (valid(clock=1e9), "it has an unknown key 'clock'; known are .*'clock_hz'"),
    (valid(clock_hz=0), "clock_hz must be a positive, finite number, not 0"),
    (valid(clock_hz="1e9"), "clock_hz must be a positive, finite number, not '1e9'"),
    (valid(clock_hz=True), "clock_hz must be a positive, finite number, not True"),
    (valid(clock_hz=float("nan")), "must be a positive, finite number, not nan"),
    (valid(bytes_per_cycle=float("inf")), "bytes_per_cycle must be a positive, finite .* not inf"),
    (valid(picojoules_per_byte=10**400), "picojoules_per_byte must be .* not 1000"),
    (valid(memories=[1]), r"`memories` must map names to bytes, not \[1\]"),
    (valid(memories={"ram": 0}), "ram must be a positive whole number, not 0"),
    (valid(memories={"ram": 1.5}), "ram must be a positive whole number, not 1.5"),
    (valid(memories={"ram": float("inf")}), "ram must be a positive whole number, not inf"),
    (valid(tables={}), "`tables` must map 1 to 256 op patterns, such as '.', to their rows"),
    (valid(tables=[]), "`tables` must map 1 to 256 op patterns"),
    (valid(tables={"*": []}), "a table is a list of 1 to 1024 rows"),
    (valid(tables={"*": {}}), "a table is a list of 1 to 1024 rows"),
    (valid(tables={"*": [{}] * 1025}), "a table is a list of 1 to 1024 rows"),
    (valid(tables={"*": [3]}), "expected an object, not 3"),
    (valid(tables={"*": [{}]}), "it has no 'weight'"),
    (with_row(weight=0), "weight must be a positive whole number, not 0"),
    (with_row(weight="8"), "weight must be a positive whole number, not '8'"),
    (with_row(weight=True), "weight must be a positive whole number, not True"),
    (with_row(activation=4.5), "activation must be a positive whole number, not 4.5"),
    (with_row(activation=64), "bit-widths are 1 to 32, not 8 and 64"),
    (with_row(cycles=-1), "cycles must be a positive, finite number, not -1"),
    (with_row(cycles=None), "the row of 8 x 8 bits has neither cycles nor pJ"),
    (with_row(pj=1), "unknown key 'pj'; known are .*'pJ'"),
    (with_row(weight=33), "bit-widths are 1 to 32, not 33 and 8"),
    (with_row(weight=-8), "weight must be a positive whole number, not -8"),
    (with_row(cycles=0), "cycles must be a positive, finite number, not 0"),
    (valid(source=""), "source must be a text that is not empty, not ''"),
    (valid(description="x" * 10_001), "description must be a text that is not empty, not 'xxx"),
    (valid(name="a\tb"), r"name has a character that cannot be printed: 'a\\tb'"),
    (valid(memories={"": 1}), "'' is no name: 1 to 200 printable characters"),
    (valid(memories={"x" * 201: 1}), "'xxx.*' is no name|'xxx.* is no name"),
    (valid(memories={"a\n": 1}), "is no name"),
    (valid(tables={"a\n": [{"weight": 8, "activation": 8, "cycles": 1}]}), "is no name"),
    (valid(tables={key: [] for key in map(str, range(257))}), "must map 1 to 256 op patterns"),
    (valid(z=1, y=2), r"unknown key 'y'; known are \['bytes_per_cycle', 'clock_hz', "),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_a_malformed_target_is_refused(data: Any, message: str) -> None:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(TargetError, match=message):
        parse_target(text, "toy.json")


ROW = {"weight": 32, "activation": 1, "cycles": 1.5, "pJ": 1e300}
LARGEST = [
    valid(name="x" * 10_000, description="two\nlines", source="\n x"),
    valid(memories={"x" * 200: 1}),
    valid(tables={"*": [ROW] * 1024}),
    valid(tables={"*": [ROW], **{key: [ROW] for key in map(str, range(255))}}),
]


@pytest.mark.parametrize(
    "data",
    [valid(), valid(memories={"ram": 64}), with_row(pJ=0.5), *LARGEST],
    ids=lambda v: str(v)[:40],
)
def test_what_is_not_malformed_is_read(data: dict[str, Any]) -> None:
    target = parse_target(json.dumps(data).encode(), "toy.json")
    assert target.memories == data.get("memories", {})
    assert target.tables["*"][0].cycles == 1.5


def test_a_target_is_read_as_it_stands() -> None:
    rows = [{"weight": 8, "activation": 4, "cycles": 2}, {"weight": 4, "activation": 4, "pJ": 3}]
    data = valid(
        tables={"*conv*": rows[:1], "*": rows[1:]},
        clock_hz=2e6,
        bytes_per_cycle=4,
        picojoules_per_byte=0.5,
        memories={"ram": 10, "flash": 20},
    )
    found = parse_target(json.dumps(data).encode(), "toy.json")
    assert found == Target(
        name="toy",
        description="A toy.",
        source="Made up.",
        tables={"*conv*": (Row(8, 4, 2.0, None),), "*": (Row(4, 4, None, 3.0),)},
        clock=2e6,
        bytes_per_cycle=4.0,
        picojoules_per_byte=0.5,
        memories={"ram": 10, "flash": 20},
    )
    assert parse_target(json.dumps(target_to_json(found)).encode(), "toy.json") == found
    plain = parse_target(json.dumps(valid()).encode(), "toy.json")
    assert (plain.clock, plain.bytes_per_cycle, plain.picojoules_per_byte) == (None, None, None)


def test_what_is_shown_of_a_value_is_cut() -> None:
    with pytest.raises(TargetError) as error:
        parse_target(json.dumps(valid(name=["x" * 200])).encode(), "toy.json")
    assert str(error.value).endswith(f"not ['{'x' * 78}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
BROKEN = st.fixed_dictionaries(
    {},
    optional={
        key: JSON | st.just(value)
        for key, value in valid(clock_hz=1, bytes_per_cycle=1, memories={}).items()
    },
)
BROKEN_ROWS = st.builds(
    with_row, weight=JSON, activation=JSON | st.just(8), cycles=JSON, pJ=st.none() | JSON
)


@given(st.binary(max_size=50) | (JSON | BROKEN | BROKEN_ROWS).map(lambda d: json.dumps(d).encode()))
def test_no_bytes_raise_anything_but_a_target_error(text: bytes) -> None:
    with suppress(TargetError):
        assert min(parse_target(text, "fuzz").widest) >= 1


@pytest.mark.parametrize("name", target_names())
def test_a_target_survives_the_way_through_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.json"
    file.write_text(json.dumps(target_to_json(load_target(name))))
    assert load_target(file) == load_target(str(file)) == load_target(name)


UNREADABLE: list[tuple[Any, str]] = [
    ("cortex-m9", "there is no target 'cortex-m9'; shipped are aie-ml, bismo, .*path of a JSON"),
    ("/tmp", "there is no target '/tmp'"),
    ("", "there is no target ''"),
    ("x" * 5000, "cannot read the target 'xxx"),
    (3, "cannot read the target '3'"),
    (None, "cannot read the target 'None'"),
]


@pytest.mark.parametrize(("target", "message"), UNREADABLE, ids=lambda v: str(v)[:20])
def test_a_target_that_cannot_be_found(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target(target)


def rows(*given: tuple[int, int, str]) -> list[dict[str, Any]]:
    return [{"weight": w, "activation": a, figure: 1.0} for w, a, figure in given]


HIDDEN = [
    ({"*": rows((8, 8, "pJ"), (4, 8, "cycles"), (8, 8, "pJ"))}, "'.' has pJ for 8 x 8 bits twice"),
    (
        {"*": rows((8, 8, "pJ")), "*conv*": rows((8, 8, "pJ"))},
        r"'.conv.' is never reached, for '.'",
    ),
    (
        {"*conv*": rows((8, 8, "pJ")), "depthwise.*conv2d*": rows((8, 8, "pJ"))},
        r"'depthwise.\*conv2d\*' is never reached, for '\*conv\*' stands before it; put it first",
    ),
]


@pytest.mark.parametrize(("tables", "message"), HIDDEN)
def test_figures_that_would_never_be_looked_up_are_refused(
    tables: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(valid(tables=tables)))
    with pytest.raises(TargetError, match=message):
        load_target(tmp_path / "toy.json")


@pytest.mark.parametrize(
    "tables",
    [
        {"*": rows((8, 8, "pJ"), (8, 8, "cycles"), (4, 8, "pJ"))},
        {
            "depthwise.*": rows((8, 8, "pJ")),
            "*conv?d*": rows((8, 8, "pJ")),
            "*": rows((8, 8, "pJ")),
        },
        {"*conv?d*": rows((8, 8, "pJ")), "*conv*d*": rows((8, 8, "pJ"))},
        {"*conv2*": rows((8, 8, "pJ")), "*conv[12]*": rows((8, 8, "pJ"))},
    ],
)
def test_figures_that_are_looked_up_are_taken(tables: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(valid(tables=tables)))
    assert list(load_target(tmp_path / "toy.json").tables) == list(tables)


def test_a_huge_file_is_no_target(tmp_path: Path) -> None:
    text = json.dumps(valid()).encode()
    (tmp_path / "huge.json").write_bytes(text.ljust((1 << 20) + 1))
    with pytest.raises(TargetError, match=r"huge.json is larger than 1048576 bytes"):
        load_target(tmp_path / "huge.json")
    (tmp_path / "large.json").write_bytes(text.ljust(1 << 20))
    assert load_target(tmp_path / "large.json").name == "toy"


def test_a_text_that_is_no_path_is_cut_in_the_message() -> None:
    with pytest.raises(TargetError) as error:
        load_target("x" * 5000)
    assert str(error.value).startswith(f"cannot read the target '{'x' * 200}': ")
    assert not isinstance(error.value, UnknownTargetError)
    with pytest.raises(UnknownTargetError):
        load_target("cortex-m9")
