"""Random ways to train: every one ends in a satisfying result or in an error of the library."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgmq_fx import CgmqError, Scheme, quantize
from cgmq_fx.directions import DIRECTIONS

INPUT = (2, 6, 6)
CLASSES = 3


class Mixed(nn.Module):
    """A model that runs in part under autocast."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = self.net(x)
        return y.float()


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)),
    "norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES)
    ),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Hardswish(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    ),
}
DTYPES = [torch.float32] * 5 + [torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [(2, 4, 8, 16, 32), (2, 4, 8), (0, 2, 4, 8), (3, 5, 8), (4,), (8, 32), (0, 32), (32,)]
OPTIMIZERS: list[Any] = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
]
BUDGETS = ["bops <= {}%", "weights <= {}%", "activations <= {}% of 8 bits", "arena <= {}%"]
VALUES = ["plain"] * 24 + ["constant", "zero", "tiny", "huge", "infinite", "nan", "one nan"]


def batch(rng: Random, size: int, values: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, *INPUT)
    if values == "one nan" and size:
        x.view(-1)[rng.randrange(x.numel())] = float("nan")
    scale = {"zero": 0.0, "tiny": 1e-38, "huge": 1e30}.get(values, 1.0)
    x = x * scale
    if values in ("constant", "infinite", "nan"):
        x.fill_({"constant": 3.0, "infinite": float("inf"), "nan": float("nan")}[values])
    return x.to(dtype), torch.randint(CLASSES, (size,))


def configuration(rng: Random) -> dict[str, Any]:
    return {
        "net": rng.choice(sorted(NETS)),
        "mixed": rng.random() < 0.15,
        "weights_are": rng.choice(["plain"] * 24 + ["zero", "huge", "nan"]),
        "dtype": rng.choice(DTYPES),
        "channels_last": rng.random() < 0.15,
        "deterministic": rng.random() < 0.1,
        "sizes": rng.choice([[4, 4], [1, 1], [5, 3, 1], [2], [4, 0, 4], [0], [3, 2], [4, 4], [6]]),
        "values": rng.choice(VALUES),
        "weights": rng.choice(["tensor", "channel", "element"]),
        "activations": rng.choice(["tensor", "channel"]),
        "bit_widths": rng.choice(WIDTHS),
        "input_bits": rng.choice([None, None, 8, 7]),
        "budget": ", ".join(
            b.format(round(10 ** rng.uniform(1, 2.6), 3))
            for b in rng.sample(BUDGETS, rng.choice([1, 1, 2, 3]))
        ),
        "optimizer": rng.choice(OPTIMIZERS),
        "rate": rng.choice([None, None, 1e-3, 0.1, 10.0, 1e6]),
        "direction": rng.choice(sorted(DIRECTIONS)),
        "teacher": rng.random() < 0.3,
        "epochs": rng.choice([0, 1, 2, 3]),
    }


def train(chosen: dict[str, Any], rng: Random) -> str:
    """How a configuration ends: satisfied, or the name of the library's error."""
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = chosen["dtype"]
    net = NETS[chosen["net"]]().to(dtype)
    if chosen["mixed"] and dtype is torch.float32:
        net = Mixed(net)
    scale = {"plain": 1.0, "zero": 0.0, "huge": 1e30, "nan": float("nan")}[chosen["weights_are"]]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    data = [batch(rng, size, chosen["values"], dtype) for size in chosen["sizes"]]
    if chosen["channels_last"]:
        convert: Any = net.to  # its annotations lack the memory format
        net = convert(memory_format=torch.channels_last)
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind: Any = chosen["optimizer"]
        if chosen["rate"] is not None:
            groups = [{**g, "lr": chosen["rate"]} for g in groups]
        made: torch.optim.Optimizer = kind(groups)
        return made

    try:
        scheme = Scheme(
            chosen["bit_widths"],
            chosen["weights"],
            chosen["activations"],
            input_bits=chosen["input_bits"],
        )
        result = quantize(
            net,
            chosen["budget"],
            [x for x, _ in data] if chosen["teacher"] else data,
            loss=None if chosen["teacher"] else lambda y, t: cross_entropy(y.float(), t),
            scheme=scheme,
            epochs=chosen["epochs"],
            optimizer=optimizer,
            direction=chosen["direction"],
            progress=False,
        )
    except CgmqError as error:
        return type(error).__name__
    assert result.cost.satisfied
    result.model(torch.randn(2, *INPUT, dtype=dtype))
    finite = all(t.isfinite().all() for t in result.model.state_dict().values())
    return "satisfied" if finite else "satisfied, not finite"


def run_configurations(count: int, seed: int, console: Console) -> bool:
    """Train in `count` random ways; False if one ended in anything else."""
    ends: Counter[str] = Counter()
    failures = 0
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        chosen = configuration(rng)
        torch.use_deterministic_algorithms(chosen["deterministic"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ends[train(chosen, rng)] += 1
        except Exception as error:  # noqa: BLE001 - what is not the library's is counted
            failures += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            ends[f"{type(error).__name__} at {where.filename}:{where.lineno}"] += 1
            console.print(f"{number}: {type(error).__name__}: {str(error)[:300]} {chosen}")
        finally:
            torch.use_deterministic_algorithms(False)
        if (number + 1) % 50 == 0 or number + 1 == count:
            console.print(f"{number + 1} configurations: {dict(ends.most_common())}")
    return failures == 0 and not ends["satisfied, not finite"] and not ends["BoundError"]
