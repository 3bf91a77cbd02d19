"""The main job: LeNet-5, trained on MNIST, quantized under a hard bound.

    python -m benchmarks.demo --out demo-output

Trains the float network, quantizes it, prints a table, and writes a folder with the model, a JSON
report and plots.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.lenet5 import FloatStep, LeNet5, accuracy, train_float
from benchmarks.mnist import Batches, load_mnist

console = Console()


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    parser.add_argument("--budget", default="bops <= 0.4%", help="what the result may cost")
    parser.add_argument("--float-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of quantization")
    parser.add_argument("--weights", default="tensor", choices=("tensor", "channel", "element"))
    parser.add_argument("--activations", default="tensor", choices=("tensor", "channel"))
    parser.add_argument("--input-bits", type=int, help="fix the network's input at so many bits")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(data: Batches, test: Batches, epochs: int) -> LeNet5:
    """Train LeNet-5 in float, a line per epoch."""
    model = LeNet5()

    def show(step: FloatStep) -> None:
        if step.step == step.steps_per_epoch:
            console.print(f"float epoch {step.epoch}  loss {float(step.loss):.4f}", highlight=False)

    train_float(model, data, epochs, on_step=show)
    model.eval()
    console.print(f"float accuracy {accuracy(model, test):.2%}", highlight=False)
    return model


def main() -> None:
    """Run the demo."""
    options = arguments()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    mnist = load_mnist()
    data = Batches(mnist.train_images, mnist.train_labels, 128, shuffle=True, seed=options.seed)
    test = Batches(mnist.test_images, mnist.test_labels, 1000, shuffle=False, seed=0)
    scheme = cgmq_fx.Scheme(
        weights=options.weights, activations=options.activations, input_bits=options.input_bits
    )
    cgmq_fx.prepare(LeNet5(), options.budget, mnist.test_images[:2], scheme=scheme)  # feasible?
    model = train(data, test, options.float_epochs)
    result = cgmq_fx.quantize(
        model,
        options.budget,
        data,
        loss=cross_entropy,
        val_data=test,
        epochs=options.epochs,
        scheme=scheme,
    )
    print(result)
    options.out.mkdir(parents=True, exist_ok=True)
    result.save(options.out / "lenet5.safetensors")
    (options.out / "report.json").write_text(json.dumps(result.report(), indent=1))
    result.to_html(options.out / "report.html")
    result.plot(options.out)
    console.print(
        f"wrote {options.out}/ after {time.perf_counter() - start:.0f} s", highlight=False
    )


if __name__ == "__main__":
    try:
        main()
    except cgmq_fx.CgmqError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
