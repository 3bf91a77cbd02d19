"""Residual adds: a grid for each operand and a rescale, against one shared grid.

    python -m benchmarks.residual_grids --cifar cifar10_jpeg.npz --weights resnet20.safetensors

An integer runtime can add two quantized tensors of one scale, or rescale them first. This quantizes
ResNet-20 under the same budget both ways, with the same data and steps, and prints the accuracies.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.cifar10 import load_cifar10, test_batches, train_batches
from benchmarks.lenet5 import accuracy
from benchmarks.resnet20 import load_resnet20
from cgmq_fx.passes.oplists import BINARY
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.prepared import Prepared
from cgmq_fx.training import parameter_groups, schedule

console = Console()


def share_grids(module: GraphModule) -> int:
    """Put both operands of every residual add on the shortcut's grid; how many were changed."""
    changed = 0
    for node in list(module.graph.nodes):
        operands = [a for a in node.args if isinstance(a, torch.fx.Node) and a.op == "call_module"]
        if node.target not in BINARY or len(operands) != 2:
            continue
        link = next((o for o in operands if _widest(module, o) <= 8), None)
        if link is None:
            continue
        other = next(o for o in operands if o is not link)
        with module.graph.inserting_before(node):
            shared = module.graph.call_module(str(other.target), (link,))
        node.replace_input_with(link, shared)
        quantizer = module.get_submodule(str(other.target))
        assert isinstance(quantizer, Quantizer)
        quantizer.signed = True  # the branch is: the shortcut pays half of its codes for that
        changed += 1
    module.recompile()
    return changed


def _widest(module: GraphModule, node: torch.fx.Node) -> int:
    quantizer = module.get_submodule(str(node.target))
    return max(quantizer.spec.bit_widths) if isinstance(quantizer, Quantizer) else 32


def run(options: argparse.Namespace, shared: bool) -> float:
    """Search and tune for a fixed number of steps; the test accuracy."""
    data = load_cifar10(options.cifar)
    model = load_resnet20(options.weights)
    train = train_batches(data, 128, seed=options.seed)
    search = options.steps // 3
    prepared: Prepared = cgmq_fx.prepare(
        model, options.budget, next(iter(train))[0], search_steps=search
    )
    if shared:
        console.print(f"{share_grids(prepared.model)} adds share a grid")
    prepared.calibrate(train)
    optimizer = torch.optim.Adam(parameter_groups(prepared.model))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(search, options.steps))
    batches = (batch for _ in range(1000) for batch in train)
    for images, labels in islice(batches, options.steps):
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(prepared.model(images), labels)
        loss.backward()
        optimizer.step()
        rate.step()
        prepared.step()
    result = prepared.finalize()
    console.print(f"shared={shared}: {result.cost}", markup=False, highlight=False)
    return accuracy(result.model, islice(test_batches(data, 500), options.test_batches))


def main() -> None:
    """Run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as JPEG, npz")
    parser.add_argument("--weights", type=Path, required=True, help="trained ResNet-20")
    parser.add_argument("--budget", default="bops <= 1.6%")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test-batches", type=int, default=20, help="of 500 images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the accuracies")
    options = parser.parse_args()
    table = Table("operands of residual adds", "test accuracy")
    found = {}
    for shared in (False, True):
        name = "one shared grid" if shared else "a grid each, rescaled"
        found[name] = run(options, shared)
        table.add_row(name, f"{found[name]:.2%}")
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
