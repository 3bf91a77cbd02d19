"""A process that dies or stalls is an error on the others, and the run goes on from its state."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cgmq_fx import Prepared, prepare

STEPS, BROKEN, TIMEOUT = 12, 5, 6


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(STEPS)
    ]


def begun() -> tuple[Prepared, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    run = prepare(net, "bops <= 2%", torch.zeros(2, 6), search_steps=8 * (STEPS - 2))
    run.calibrate(batches())
    return run, torch.optim.SGD(run.model.parameters(), 1e-2)


def work(rank: int, folder: str, stalls: bool) -> None:
    torch.set_num_threads(1)
    method, wait = f"file://{folder}/rendezvous", timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", method, wait, world_size=2, rank=rank)
    run, optimizer = begun()
    model = DistributedDataParallel(run.model)
    start = time.monotonic()
    try:
        for step, (inputs, target) in enumerate(batches()):
            if step == BROKEN and rank == 1:
                time.sleep(4 * TIMEOUT if stalls else 0)
                os._exit(0)
            start = time.monotonic()
            optimizer.zero_grad()
            part = slice(rank * 4, rank * 4 + 4)
            cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
            run.step()
            if rank == 0:
                torch.save(run.state_dict(), f"{folder}/state.pt")
    except RuntimeError as error:
        taken = time.monotonic() - start
        Path(folder, "error").write_text(f"{step} {taken < 3 * TIMEOUT} {error}")
    os._exit(0)


@pytest.mark.filterwarnings("ignore")  # of the processes' start
@pytest.mark.parametrize("stalls", [False, True], ids=["dies", "stalls"])
def test_a_lost_process_is_an_error_and_its_run_goes_on(stalls: bool, tmp_path: Path) -> None:
    spawn(work, (str(tmp_path), stalls), nprocs=2)
    assert (tmp_path / "error").read_text().startswith(f"{BROKEN} True ")
    run, optimizer = begun()
    run.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert run.controller.taken == BROKEN
    whole, alone = begun()
    for number, (inputs, target) in enumerate(batches()):
        for own, steps in ((whole, alone), (run, optimizer)):
            if own is whole or number >= BROKEN:
                steps.zero_grad()
                cross_entropy(own.model(inputs), target).backward()
                steps.step()
                own.step()
    first, second = run.finalize(), whole.finalize()
    assert first.cost.satisfied
    assert str(first.cost) == str(second.cost)
    states = first.model.state_dict(), second.model.state_dict()
    torch.testing.assert_close(states[0], states[1], rtol=1e-2, atol=1e-2)  # biases are rounded
