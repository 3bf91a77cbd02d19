"""Accuracy under hard bounds, one command, resumable at any time.

    python -m benchmarks.accuracy lenet5 --out accuracy
    python -m benchmarks.accuracy resnet20 --cifar cifar10_jpeg.npz --resnet20 resnet20.safetensors

Runs that are in `results.jsonl` of the folder are not repeated, one that was stopped is taken up
where its last checkpoint is. Then writes a table (`CASE.md`) and a plot (`CASE.png`).
"""

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.accuracy.cases import CASES, Case, Files
from benchmarks.accuracy.methods import METHODS, Job, run
from benchmarks.accuracy.summary import plot, read, table

console = Console()

_PENALTIES = tuple(f"penalty:{weight}" for weight in (3, 10, 30, 100, 300, 1000))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="folder for results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["marginal"])
    parser.add_argument("--baselines", action="store_true", help="all baselines as well")
    parser.add_argument("--bounds", nargs="+", help="those of the case by default")
    parser.add_argument("--weights", nargs="+", default=_PENALTIES, help="of the penalty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="those of the case by default")
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG, npz")
    parser.add_argument("--resnet20", type=Path, help="weights of a trained ResNet-20")
    parser.add_argument("--report-only", action="store_true", help="table and plot of what is done")
    return parser.parse_args()


def jobs(options: argparse.Namespace, case: Case) -> Iterator[Job]:
    """What is to be done, every seed after the other."""
    epochs = options.epochs or case.epochs
    peers = ("brevitas",) if find_spec("brevitas") else ()
    others = ("uniform", "knapsack", "random", "penalty", *peers) if options.baselines else ()
    for seed in options.seeds:
        for method in dict.fromkeys((*options.methods, *others)):
            if method == "penalty":
                bounds = options.weights
            elif method in options.methods:
                bounds = options.bounds or case.bounds
            else:
                bounds = options.bounds or case.baselines
            for bound in bounds:
                yield Job(case, method, bound, seed, epochs)


def main() -> None:
    """Run what has not been run, then report."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    case = CASES[options.case]
    files = Files(options.out, options.cifar, options.resnet20, options.device)
    files.out.mkdir(parents=True, exist_ok=True)
    results = files.out / "results.jsonl"
    for job in () if options.report_only else jobs(options, case):
        if any(row.key == job.key for row in read(results)):
            continue
        row = run(job, files, lambda text: console.print(text, highlight=False))
        with results.open("a") as file:
            file.write(json.dumps(row.as_dict()) + "\n")
        costs = ", ".join(f"{c:.4%}" if c < 1 else f"{c:.0f}" for c in row.costs)
        console.print(f"{job.key}: {row.accuracy:.2%} at {costs} ({row.seconds:.0f} s)")
    rows = [row for row in read(results) if row.case == case.name]
    text = table(rows)
    (files.out / f"{case.name}.md").write_text(text)
    console.print(text, markup=False, highlight=False)
    plot(rows, files.out / f"{case.name}.png")


if __name__ == "__main__":
    main()
