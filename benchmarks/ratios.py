"""Speed and memory side by side, as ratios from one run.

    python -m benchmarks.ratios [--part kernel|step|compiled|memory|controller] [--rounds 7]

What is compared takes turns, round by round, and medians are compared; time is processor time, so
that other work on the machine matters less. `compiled` takes minutes, and is measured only on
request.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.kernel_forms import (
    FORMS,
    GRANULARITIES,
    Inputs,
    available,
    copy,
    forward,
    forward_backward,
    traffic,
)
from benchmarks.peak_memory import peak_of
from benchmarks.peers import COMPILING, PEERS, converted, installed
from benchmarks.step_nets import NETS

_ELEMENTS = 2_400_000
_OTHERS = 2**24  # what takes the place of the tensors in caches: 64 MiB
_SEARCH = 1000


def medians(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median processor time of each of `work`, in seconds, taken in turns, each after `before`."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            before()
            start = time.process_time()
            function()
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def kernel(rounds: int) -> Table:
    """The forms of fake quantization as multiples of a copy of the tensor, none of it in caches."""
    others = torch.zeros(_OTHERS)
    columns = (*FORMS, "memory alone")
    table = Table("2.4 M elements", "copy", *columns, title="Kernel, time of a copy = 1")
    for granularity in GRANULARITIES:
        inputs = Inputs.of(_ELEMENTS, granularity)
        for title, run in (("forward", forward), ("forward + backward", forward_backward)):
            forms = [form for form in FORMS if available(form, granularity)]
            work: dict[str, Callable[[], object]] = {f: partial(run, f, inputs) for f in forms}
            work["copy"] = partial(copy, inputs)
            work["memory alone"] = partial(traffic, inputs, run is forward_backward)
            found = medians(work, 3 * rounds, partial(others.add_, 1))
            unit = found["copy"]
            cells = [f"{found[c] / unit:.2f}" if c in found else "-" for c in columns]
            table.add_row(f"per {granularity}, {title}", f"{unit * 1e3:.2f} ms", *cells)
    return table


def batch_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    return torch.rand(shape), torch.randint(10, shape[:1])


def stepping(
    model: nn.Module, batch: tuple[Tensor, Tensor], after: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """One training step of a model on a batch of images, over and over."""
    images, target = batch
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), target).backward()
        optimizer.step()
        after()

    return step


def variants(name: str, peers: Iterable[str] = PEERS) -> dict[str, Callable[[], None]]:
    """The training step of a network in float, quantized by this library, and by others."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, batch = make().train(), batch_of(shape)
    run = prepared(model, shape)
    work = {"float": stepping(model, batch), "ours": stepping(run.model, batch, run.step)}
    for peer in filter(installed, peers):
        work[peer] = stepping(converted(model, peer, batch[0]), batch)
    return work


def prepared(model: nn.Module, shape: tuple[int, ...]) -> cgmq_fx.Prepared:
    """The model at the start of a search."""
    run = cgmq_fx.prepare(model, "bops <= 2%", torch.rand(2, *shape[1:]), search_steps=_SEARCH)
    run.calibrate([torch.rand(8, *shape[1:])])
    return run


def step(rounds: int) -> Table:
    """Training steps as multiples of the float step."""
    names = ["ours", *PEERS]
    table = Table("training step", "float", *names, title="Training step, float step = 1")
    for name in NETS:
        found = medians(variants(name), rounds)
        cells = [f"{found[n] / found['float']:.2f}" if n in found else "-" for n in names]
        table.add_row(name, f"{found['float'] * 1e3:.0f} ms", *cells)
    return table


def compiled(rounds: int) -> Table:
    """Training steps of ResNet-20 through `torch.compile`, as multiples of the float one."""
    make, shape = NETS["ResNet-20"]
    torch.manual_seed(0)
    model, batch = make().train(), batch_of(shape)
    run = prepared(model, shape)
    others = {peer: converted(model, peer, batch[0]) for peer in COMPILING}
    models = {
        name: cast(nn.Module, torch.compile(made))
        for name, made in {"float": model, "ours": run.model, **others}.items()
    }
    work = {name: stepping(made, batch) for name, made in models.items()}
    work["ours"] = stepping(models["ours"], batch, run.step)
    found = medians(work, rounds)
    table = Table("compiled step", *found, title="Compiled step, float step = 1")
    cells = [f"{found[name] / found['float']:.2f}" for name in list(found)[1:]]
    table.add_row("ResNet-20", f"{found['float'] * 1e3:.0f} ms", *cells)
    return table


def memory(rounds: int) -> Table:
    """Peak memory that a training step takes beyond what was there, against float."""
    table = Table("peak memory of a step", "float", "ours", title="Memory, float step = 1")
    for name in NETS:
        work = variants(name, ())
        peaks = {n: peak_of(work[n]) for n in ("float", "ours")}
        ratio = peaks["ours"] / peaks["float"]
        table.add_row(name, f"{peaks['float'] / 2**20:.1f} MiB", f"{ratio:.2f}")
    return table


def controller(rounds: int) -> Table:
    """The controller's part of a training step during the search."""
    table = Table("network", "gates", "controller", "share", title="Controller in the search")
    for name in ("LeNet-5", "ResNet-20"):
        make, shape = NETS[name]
        run = prepared(make().train(), shape)
        own: list[float] = []

        def after(run: cgmq_fx.Prepared = run, own: list[float] = own) -> None:
            start = time.process_time()
            run.step()
            own.append(time.process_time() - start)

        whole = medians({"step": stepping(run.model, batch_of(shape), after)}, 3 * rounds)["step"]
        mean = statistics.mean(own[1:])
        gates = str(run.controller.gates.numel())
        table.add_row(name, gates, f"{mean * 1e3:.2f} ms", f"{mean / whole:.1%}")
    return table


DEFAULT = {"kernel": kernel, "step": step, "memory": memory, "controller": controller}
PARTS = {**DEFAULT, "compiled": compiled}


def show(parts: Iterable[str], rounds: int, console: Console) -> None:
    """Measure and print some parts."""
    for part in parts:
        console.print(PARTS[part](rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    show(options.part or DEFAULT, options.rounds, Console(width=100))


if __name__ == "__main__":
    main()
