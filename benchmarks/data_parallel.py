"""Throughput of data parallel training: several processes of one thread each against one.

    python -m benchmarks.data_parallel [--processes 2] [--steps 10] [--rounds 3]

Each process takes its part of the same global batch of ResNet-20, under gloo, in the search.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ratios import prepared, stepping
from benchmarks.step_nets import NETS

_NET = "ResNet-20"


def timed(rank: int, count: int, steps: int, folder: str, joined: bool = True) -> None:
    """Train for some steps and leave the seconds of the median one and the levels in a file.

    Args:
        rank: Which process this is.
        count: How many there are, each with its part of the batch.
        steps: Timed steps.
        folder: Where they meet, and where the file goes.
        joined: Whether they exchange anything; if not, their speed is the most that can be had.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, (batch, *shape) = NETS[_NET]
    joined = joined and count > 1
    if joined:
        where = f"file://{folder}/rendezvous"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    run = prepared(make(), (batch, *shape))
    model: nn.Module = DistributedDataParallel(run.model) if joined else run.model
    images, target = torch.rand(batch, *shape), torch.randint(10, (batch,))  # everywhere the same
    part = slice(rank * batch // count, (rank + 1) * batch // count)
    step = stepping(model, (images[part], target[part]), run.step)
    step()
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    seconds = median(taken)
    torch.save((seconds, run.controller.levels.tolist()), f"{folder}/{count}-{rank}.pt")
    if joined:
        distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    count = options.processes
    alone: list[float] = []
    apart: list[float] = []
    joined: list[float] = []
    same = True
    for _ in range(options.rounds):  # one after the other, as machines get faster and slower
        with tempfile.TemporaryDirectory() as folder:
            timed(0, 1, options.steps, folder)
            seconds, expected = torch.load(Path(folder) / "1-0.pt")
            alone.append(seconds)
            for found, exchange in ((apart, False), (joined, True)):
                rows = _together(count, options.steps, folder, exchange)
                found.append(max(seconds for seconds, _ in rows))
            same = same and all(levels == expected for _, levels in rows)
    one, bound, all_of_them = (median(found) * 1e3 for found in (alone, apart, joined))
    print(
        f"{count} processes: {one / all_of_them:.2f}x the throughput of one, "
        f"{one / bound:.2f}x without any exchange "
        f"({all_of_them:.0f}, {bound:.0f} and alone {one:.0f} ms a step); "
        f"the bits of one: {same}"
    )


def _together(count: int, steps: int, folder: str, joined: bool) -> list[Any]:
    spawn(timed, (count, steps, folder, joined), nprocs=count)
    return [torch.load(Path(folder) / f"{count}-{rank}.pt") for rank in range(count)]


if __name__ == "__main__":
    main()
