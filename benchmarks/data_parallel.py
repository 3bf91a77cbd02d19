"""Throughput of data parallel training: several processes of one thread each against one.

    python -m benchmarks.data_parallel [--processes 2] [--steps 20]

Each process takes its part of the same global batch of ResNet-20, under gloo, in the search.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ratios import prepared, stepping
from benchmarks.step_nets import NETS

_NET = "ResNet-20"


def timed(rank: int, count: int, steps: int, folder: str) -> None:
    """Train for some steps and leave the seconds and the levels in a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, (batch, *shape) = NETS[_NET]
    if count > 1:
        where = f"file://{folder}/rendezvous"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    run = prepared(make(), (batch, *shape))
    model: nn.Module = DistributedDataParallel(run.model) if count > 1 else run.model
    images, target = torch.rand(batch, *shape), torch.randint(10, (batch,))  # everywhere the same
    part = slice(rank * batch // count, (rank + 1) * batch // count)
    step = stepping(model, (images[part], target[part]), run.step)
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = time.perf_counter() - start
    torch.save((seconds, run.controller.levels.tolist()), f"{folder}/{count}-{rank}.pt")
    if count > 1:
        distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    count = options.processes
    with tempfile.TemporaryDirectory() as folder:
        timed(0, 1, options.steps, folder)
        spawn(timed, (count, options.steps, folder), nprocs=count)
        alone, expected = torch.load(Path(folder) / "1-0.pt")
        rows = [torch.load(Path(folder) / f"{count}-{rank}.pt") for rank in range(count)]
    slowest = max(seconds for seconds, _ in rows)
    same = all(levels == expected for _, levels in rows)
    print(
        f"{count} processes: {alone / slowest:.2f}x the throughput of one "
        f"({alone / options.steps * 1e3:.0f} ms a step), the bits of one: {same}"
    )


if __name__ == "__main__":
    main()
