"""What every default of the training recipe is worth: each is switched off, or another one on.

    python -m benchmarks.accuracy.ablations --cifar cifar10_jpeg.npz --resnet20 weights.safetensors

ResNet-20 at 1.6 % BOPs with few steps, so that what makes training quick shows; every variant has
the same data, steps and seed. Rows go to `ablations.jsonl`, what is there is not run again.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import cgmq_fx
from benchmarks.accuracy.cases import CASES, Files
from benchmarks.lenet5 import accuracy
from cgmq_fx import calibrate, controller, directions, distortion, prepared, run, training
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.history import StepRecord
from cgmq_fx.passes import norms
from cgmq_fx.passes.infra import PassResult
from cgmq_fx.passes.norms import NormaliseBatches
from cgmq_fx.projection import Projection

console = Console()

_FILE = "ablations.jsonl"
_DECAY = 0.98


def _labels(images: Tensor, labels: Tensor) -> object:
    return labels


class Steps:
    """So many batches an epoch, each target in the form that a variant asks for."""

    def __init__(
        self,
        data: Iterable[tuple[Tensor, Tensor]],
        steps: int,
        form: Callable[[Tensor, Tensor], object] = _labels,
    ) -> None:
        self.data, self.steps, self.form = data, steps, form

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, object]]:
        for images, labels in islice(self.data, self.steps):
            yield images, self.form(images, labels)


class Averaged(cgmq_fx.Callback):
    """Keeps a moving average of weights and ranges while tuning, and ends with it."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: dict[str, Tensor] = {}

    def on_start(self, prepared: cgmq_fx.Prepared, steps: int) -> None:
        self.model = prepared.model

    @torch.no_grad()
    def on_step(self, record: StepRecord) -> None:
        if record.phase != "tune":
            return
        for name, parameter in self.model.named_parameters():
            self.mean.setdefault(name, parameter.clone()).lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def on_end(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.mean.get(name, parameter))


def _one_range(table: Callable[..., RangeTable], *args: object) -> RangeTable:
    """The range that suits the most bits, for all bit-widths."""
    found = table(*args)
    widest = found.log_ranges[-1:].expand_as(found.log_ranges)
    return replace(found, log_ranges=widest.clone())


def _largest(values: Tensor, bits: int, signed: bool, *_: object, **__: object) -> Tensor:
    """The range that clips nothing."""
    top = values.abs().amax(1).clamp(min=1e-6)
    return top * ((2**bits - 1) / (2**bits - 2) if signed else 1.0)


def _constant(search: int, total: int) -> Callable[[int], float]:
    warm = max(1, round(0.02 * total))
    return lambda step: min(1.0, (step + 1) / warm)


def _cosine(search: int, total: int) -> Callable[[int], float]:
    return training.schedule(0, total)


def _sgd(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    rates = [{**group, "lr": 10 * float(str(group["lr"]))} for group in groups]
    return torch.optim.SGD(rates, momentum=0.9)


def _left(_: NormaliseBatches, module: GraphModule) -> PassResult:
    module.add_module(norms.NORMS, nn.Module())
    return PassResult(module, modified=False)


@contextmanager
def _patched(*patches: tuple[object, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


PATCHES: dict[str, tuple[tuple[object, str, object], ...]] = {
    "as it is": (),
    "one range for all bit-widths": (
        (calibrate, "range_table", partial(_one_range, calibrate.range_table)),
    ),
    "ranges from the largest value": ((calibrate, "best_range", _largest),),
    "learning rate never falls": ((run, "schedule", _constant),),
    "learning rate falls from the start": ((run, "schedule", _cosine),),
    "no exchanges after the projection": ((Projection, "exchange", lambda *_: None),),
    "worth of bits from gradients alone": ((directions.Marginal, "measured", False),),
    "sensitivities of the last step only": ((controller, "_MEMORY", 0.0),),
    "search of a fifth of the time": ((training, "_SEARCH_SHARE", 0.2),),
    "search of two thirds of the time": ((training, "_SEARCH_SHARE", 0.67),),
    "one learning rate for all weights": ((training, "_LEAST_RATE", 1e-3),),
    "a third of the learning rates": (
        (training, "_SHARE", 3e-3),
        (training, "_LEAST_RATE", 3e-5),
        (training, "_WEIGHT_RATE", 3e-4),
    ),
    "three times the learning rates": (
        (training, "_SHARE", 3e-2),
        (training, "_LEAST_RATE", 3e-4),
        (training, "_WEIGHT_RATE", 3e-3),
    ),
    "a tenth of the ranges' rate": ((training, "_RANGE_RATE", 1e-3),),
    "batch norm folded from the start": ((NormaliseBatches, "run", _left),),
    "weights before batch norm as fast as others": ((training, "_NORMALISED", 1.0),),
    "weights before batch norm ten times as fast": ((training, "_NORMALISED", 10.0),),
    "gates move for all of the search": ((prepared, "_KNOWN_SHARE", 1.0),),
    "bits measured with batch norm as in evaluation": (
        (distortion, "normalised_batches", lambda _: nullcontext()),
    ),
    "weights averaged": (),
    "float network teaches as well": (),
    "plain SGD instead of Adam": (),
}


def taught(teacher: nn.Module) -> Callable[[Tensor, Tensor], object]:
    """Targets of labels and of what the float network says."""

    @torch.no_grad()
    def form(images: Tensor, labels: Tensor) -> object:
        return labels, log_softmax(teacher(images), 1)

    return form


def imitating(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, and the divergence from the float network in equal parts."""
    labels, wanted = target
    found = log_softmax(output, 1)
    return cross_entropy(output, labels) + kl_div(found, wanted, None, None, "batchmean", True)


def train(name: str, options: argparse.Namespace, files: Files) -> dict[str, object]:
    """Run a variant; its row."""
    case = CASES["resnet20"]
    model, before = case.float_net(files, console.print)
    teaches = name == "float network teaches as well"
    data = case.train_data(files, options.seed)
    with _patched(*PATCHES[name]):
        result = cgmq_fx.quantize(
            model,
            options.bound,
            Steps(data, options.steps, taught(model) if teaches else _labels),
            loss=imitating if teaches else cross_entropy,
            epochs=1,
            seed=options.seed,
            progress=False,
            optimizer=_sgd if name == "plain SGD instead of Adam" else training.default_optimizer,
            callbacks=[Averaged(_DECAY)] if name == "weights averaged" else [],
        )
    found = accuracy(result.model, case.test_data(files))
    cost = result.cost.states[0]
    return {
        "variant": name,
        "seed": options.seed,
        "steps": options.steps,
        "bound": options.bound,
        "accuracy": found,
        "float": before,
        "cost": cost.value / cost.reference,
    }


def main() -> None:
    """Run what has not been run, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="folder for results")
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as JPEG, npz")
    parser.add_argument("--resnet20", type=Path, help="weights of a trained ResNet-20")
    parser.add_argument("--variants", nargs="+", choices=PATCHES, default=list(PATCHES))
    parser.add_argument("--bound", default="bops <= 1.6%")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    files, path = Files(options.out, options.cifar, options.resnet20), options.out / _FILE
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["variant"], r["seed"], r["steps"], r["bound"]) for r in rows}
    for name in options.variants:
        if (name, options.seed, options.steps, options.bound) not in known:
            rows.append(train(name, options, files))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    table = Table("variant", "seeds", "test accuracy", "cost")
    for name in PATCHES:
        own = [r for r in rows if r["variant"] == name and r["steps"] == options.steps]
        if own:
            mean = sum(r["accuracy"] for r in own) / len(own)
            table.add_row(name, str(len(own)), f"{mean:.2%}", f"{own[0]['cost']:.3%}")
    console.print(table)


if __name__ == "__main__":
    main()
