"""Random changes of what loaders read: bytes, JSON values, tensors, text."""

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, -0.0]
FLOATS = [float("inf"), float("-inf"), float("nan"), 1e-320, 1e308, -1e308]
TEXTS = [
    "", "x", "leaf", "0", "a.b.c", "__class__", "../../etc/passwd", "/dev/zero", "\x1b[2J",
    "*" * 300,
    "aten.unbind.int", "aten.split.Tensor", "aten.zeros.default", "aten.repeat.default",
    "aten.softmax.int", "aten.conv2d.default", "aten.linear.default", "aten.expand.default",
    "aten.reshape.default", "aten.pad.default", "aten.as_strided.default", "aten.cat.default",
    "operator.mul", "operator.pow", "operator.getitem", "operator.add", "math.floor", "output",
    "placeholder", "call_function", "get_attr", "call_module", "float16", "int64", "Quantizer",
]  # fmt: skip


def scalar(rng: Random) -> Any:
    kinds: list[list[Any]] = [[None, True, False], NUMBERS, FLOATS, TEXTS, NUMBERS]
    return rng.choice(rng.choice(kinds))


def value(rng: Random, depth: int = 3) -> Any:
    kind = rng.randrange(6) if depth else 0
    if kind == 4:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        keys = ["node", "tuple", "dict", "slice", "dtype", "float", "tensor", "a"]
        return {rng.choice(keys): value(rng, depth - 1) for _ in range(rng.choice([1, 1, 2]))}
    return scalar(rng)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found, stack = [], [tree]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        stack += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def change_json(rng: Random, tree: Any) -> Any:
    """A copy with one to three changes: what is removed, replaced, copied or repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(tree)
        if not found:
            return value(rng)
        numbers = [(h, k) for h, k in found if type(h[k]) is int]
        ops = [(h, k) for h, k in found if str(h[k]).startswith(("aten.", "operator."))]
        holder, key = rng.choice(found)
        kind = rng.randrange(9)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, index = rng.choice(found)
            holder[key] = json.loads(json.dumps(other[index]))
        elif kind == 2 and isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice([1, 2, 50])
        elif kind in (3, 4, 5) and numbers:
            holder, key = rng.choice(numbers)
            holder[key] = rng.choice([*NUMBERS, *range(-2, 12)])
        elif kind == 6 and ops:
            holder, key = rng.choice(ops)
            holder[key] = rng.choice([text for text in TEXTS if "." in text])
        else:
            holder[key] = value(rng)
    return tree


def change_bytes(rng: Random, content: bytes) -> bytes:
    """A copy that is cut, or has bytes flipped, removed, repeated or replaced."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at : at + rng.randrange(16)]
        elif kind == 2:
            changed[at:at] = changed[: rng.randrange(64)]
        elif kind == 3:
            changed[at : at + 8] = struct.pack("<Q", rng.choice([0, 8, 2**31, 2**63, 2**64 - 1]))
        elif at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def change_text(rng: Random, texts: Sequence[str]) -> str:
    """Parts of texts put together anew, with odd characters in between."""
    parts: list[Callable[[], str]] = [
        lambda: rng.choice(texts)[: rng.randrange(40)],
        lambda: rng.choice(texts)[rng.randrange(20) :],
        lambda: str(scalar(rng)),
        lambda: rng.choice(" ,;&%[]<=≤\t\n\0µKkMiBe+-."),
        lambda: rng.choice(" 9ae[%") * rng.choice([1, 10, 5000]),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    return "".join(rng.choice(parts)() for _ in range(rng.randrange(1, 8)))
