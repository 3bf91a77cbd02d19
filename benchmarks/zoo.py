"""A zoo of models through every stage: capture, insert, calibrate, train, freeze, save, load.

    python -m benchmarks.zoo --zoo path/to/zoo.py --out zoo.jsonl [NAME ...]

The zoo is a Python file with `ZOO`, a mapping of names, and `build(name)`, which returns a model
with its example arguments and keyword arguments. Each model runs in a process of its own; a line
of JSON per model is appended to the output file, and models in it already are not run again.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import cgmq_fx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import plain_value
from cgmq_fx.passes.copying import copy_graph, copy_model
from cgmq_fx.passes.inputs import ExampleInputs

_TIME = 600
_RATES = (1e-4, 1e-5, 1e-6, 1e-7)
console = Console()


def load_zoo(path: Path) -> ModuleType:
    """Import the zoo from its file."""
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = zoo
    spec.loader.exec_module(zoo)
    return zoo


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output, as a list."""
    leaves = pytree.tree_leaves(plain_value(value))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def difference(a: Any, b: Any) -> float:
    """The largest difference between two outputs, relative to the largest value."""
    pairs = list(zip(floats(a), floats(b), strict=True))
    gaps = [(x - y).abs().max() / y.abs().max().clamp(min=1e-6) for x, y in pairs if y.numel()]
    return max(map(float, gaps), default=0.0)


def loss_of(output: Any) -> Tensor:
    """Any scalar to train on: the mean squared distance of all outputs to fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for x in floats(output):
        target = torch.randn(x.shape, generator=generator)
        losses.append((x.float() - target).square().mean() if x.numel() else x.sum())
    return torch.stack(losses).sum()


def settle(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Give batch norm the statistics of the example, as in a trained model: else signals vanish."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    # one value per channel has no variance: then the statistics stay as they are
    with suppress(ValueError), torch.no_grad():
        call(model, args, kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def call(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The output of a model; some models write into the lists that they are given."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf, (tuple(args), dict(kwargs)))
    return model(*args, **kwargs)


def train(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    rate: float,
    after: Callable[[], None] = lambda: None,
) -> tuple[set[str], list[float]]:
    """Three steps: the names of the parameters that moved, and the loss before each and at last."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = loss_of(call(model, args, kwargs))
        losses.append(float(loss.detach()))
        if step < 3:
            loss.backward()
            optimizer.step()
            after()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return moved, losses


def learning_rate(graph: GraphModule, args: Any, kwargs: Any) -> tuple[float, set[str], bool]:
    """A rate at which the loss of the float graph falls, what moves then, and whether it falls.

    Some models have a state that moves with every call, and the loss with it, whatever the rate.
    """
    for rate in _RATES:
        moved, losses = train(copy_graph(graph), args, kwargs, rate)
        if losses[-1] < losses[0]:
            return rate, moved, True
    return rate, moved, False


def run(zoo: ModuleType, name: str) -> dict[str, Any]:
    """Every stage of one model; the record says how far it came and what was found."""
    record: dict[str, Any] = {"name": name, "stage": "build"}
    start = time.perf_counter()
    try:
        _stages(record, zoo, name)
        record["stage"] = "done"
    except Exception as error:  # noqa: BLE001 - the point is to record what any model raises
        record["error"] = f"{type(error).__name__}: {error}"[:600]
        record["ours"] = isinstance(error, cgmq_fx.CgmqError)
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def _stages(record: dict[str, Any], zoo: ModuleType, name: str) -> None:
    model, args, kwargs = zoo.build(name)
    settle(model, args, kwargs)
    with FlopCounterMode(display=False) as counter:
        expected = pytree.tree_map_only(
            Tensor, Tensor.detach, call(copy_model(model), args, kwargs)
        )
    record["flop_counter"] = counter.get_total_flops() // 2
    record["stage"] = "capture"
    captured = float_graph(model, ExampleInputs(args, kwargs))
    record.update(dynamic=captured.dynamic, steps=[step[:200] for step in captured.steps])
    graph = captured.module.eval()
    with torch.no_grad():
        record["difference"] = difference(call(graph, args, kwargs), expected)
    rate, in_float, record["falls_in_float"] = learning_rate(graph, args, kwargs)
    record["stage"] = "prepare"
    inputs = ExampleInputs(args, kwargs)
    prepared = cgmq_fx.prepare(model, "bops <= 25%", inputs)
    facts = prepared.facts
    batch = facts.batch
    quantized = [n.macs for n in facts.nodes if n.operands and all(o.quantizer for o in n.operands)]
    record.update(macs=facts.macs * batch, quantized=sum(quantized) * batch)
    record.update(unknown=facts.unknown, opaque=facts.opaque, assumptions=facts.assumptions)
    record["stage"] = "train"
    moved, losses = train(prepared.model, args, kwargs, rate, prepared.step)
    record.update(before=losses[0], after=losses[-1], stuck=sorted(in_float - moved)[:5])
    record["stage"] = "finalize"
    result = prepared.finalize()
    record["cost"] = str(result.cost)
    record["stage"] = "save"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = result.save(Path(folder) / "model.safetensors")
        targets = [n.target for n in result.model.graph.nodes]
        libraries = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
        loaded = cgmq_fx.load(file, libraries=libraries)
        same = difference(call(loaded.model, args, kwargs), call(result.model, args, kwargs))
    record["reloaded"] = same


def verdict(record: dict[str, Any]) -> str:
    """What came of a model, in a few words."""
    if record["stage"] != "done":
        return f"{record['stage']} failed"
    checks = {
        "outputs differ": record["difference"] > 1e-3,
        "loss did not fall": record.get("falls_in_float", True)
        and not record["after"] < record["before"],
        "parameters stuck": bool(record["stuck"]),
        "reload differs": record["reloaded"] > 1e-5,
        "under 95 % of MACs quantized": record["quantized"] < 0.95 * counted(record),
    }
    return next((name for name, failed in checks.items() if failed), "ok")


def counted(record: dict[str, Any]) -> int:
    """MACs by our count or by torch's, whichever is larger."""
    return max(int(record["macs"]), int(record["flop_counter"]))


def main() -> None:
    """Run the models that have no line in the output yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--one", help="run one model in this process and print its record")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(run(load_zoo(options.zoo), options.one)))
        return
    names = options.names or list(load_zoo(options.zoo).ZOO)
    known = {r["name"] for r in _records(options.out)}
    for name in names:
        if name not in known:
            record = _in_process(options.zoo, name)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            console.print(
                f"{name:28s} {verdict(record)}  {record.get('error', '')[:90]}", markup=False
            )
    _summary([r for r in _records(options.out) if r["name"] in names])


def _in_process(zoo: Path, name: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.zoo",
        "--zoo",
        str(zoo),
        "--one",
        name,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME, check=False)
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"name": name, "stage": "process", "error": str(error)[:300], "ours": False}


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _summary(records: list[dict[str, Any]]) -> None:
    table = Table("verdict", "models", "which")
    for text, count in Counter(map(verdict, records)).most_common():
        which = [r["name"] for r in records if verdict(r) == text]
        table.add_row(text, str(count), "" if text == "ok" else ", ".join(which))
    console.print(table)


if __name__ == "__main__":
    main()
