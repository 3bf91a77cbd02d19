"""Two processes train like one on the same global batch; sharded parameters are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import batch_norm, cross_entropy
from torch.nn.parallel import DistributedDataParallel

import cgmq_fx
from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.normaliser import Normaliser
from cgmq_fx.passes.norms import agree_on_norms
from cgmq_fx.passes.processes import Averages
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.rescue import blame

STEPS = 12


NORMS: dict[str, list[type[nn.Module]]] = {
    "none": [],
    "own": [nn.BatchNorm2d],
    "shared": [nn.SyncBatchNorm],
}


def net(norm: str = "none") -> nn.Module:
    torch.manual_seed(0)
    between = [kind(4) for kind in NORMS[norm]]
    return nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def trained(rank: int, count: int, norm: str) -> dict[str, Any]:
    """What a search looked like, on this process's part of every batch."""
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.rand(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(STEPS)
    ]
    run = cgmq_fx.prepare(net(norm), "bops <= 2%", data[0][0], search_steps=8 * STEPS)
    run.calibrate(data)
    model: nn.Module = DistributedDataParallel(run.model) if count > 1 else run.model
    optimizer = torch.optim.SGD(run.model.parameters(), 1e-2)
    levels = []
    for inputs, target in data:
        optimizer.zero_grad()
        part = slice(rank * 16 // count, (rank + 1) * 16 // count)
        cross_entropy(model(inputs[part]), target[part]).backward()
        optimizer.step()
        run.step()
        levels.append(torch.from_numpy(run.controller.levels.copy()))
    agree_on_norms(run.model)
    return {
        "levels": torch.stack(levels),
        "sensitivity": run.controller.sensitivity,
        "state": {n: t for n, t in run.model.state_dict().items() if t.is_floating_point()},
    }


def joint(rank: int) -> dict[str, Any]:
    """What normalisers give that look at the batches of both processes."""
    x = 3 * torch.rand(8, 2, 64, 64, generator=torch.Generator().manual_seed(2)) + 1
    half = Normaliser(torch.zeros(2), torch.ones(2), None, shared=True).half()
    rows = half(x[4 * rank : 4 * rank + 4].half(), torch.zeros(2).half())
    scheme = cgmq_fx.Scheme(bit_widths=(0, 2, 8), weights="channel")
    run = cgmq_fx.prepare(net("shared"), "bops <= 90%", torch.rand(16, 1, 8, 8), scheme=scheme)
    bits = {name: np.array(b) for name, b in run.controller.assignment.items()}
    first = next(name for name, q in run.facts.quantizers.items() if q.gates == 4)
    bits[first][:] = (0, 8, 8, 8)
    run.freeze(bits)
    given: list[Tensor] = []
    owner = next(module for module in run.model.modules() if isinstance(module, Normaliser))
    owner.register_forward_hook(lambda *call: given.append(call[-1]))
    inputs = torch.rand(2, 1, 8, 8)  # 4 samples in both, too few to tell
    run.model.train()(inputs)
    alone = blame(run.model, ExampleInputs((inputs,))) if rank else ""  # the other does not wait
    return {"half": rows.float(), "whole": x, "blame": alone, "pruned": given[0][:, 0]}


def work(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    found = {norm: trained(rank, count, norm) for norm in NORMS}
    torch.save({**found, "joint": joint(rank)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of the processes' start
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    spawn(work, (2, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for norm in NORMS:
        first, second = (found[norm] for found in both)
        assert len(first["levels"].unique(dim=0)) > 2
        assert torch.equal(first["levels"], second["levels"])
        assert torch.equal(first["sensitivity"], second["sensitivity"])
        torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
        if norm == "own":  # each process normalises by its part of the batch
            continue
        alone = trained(0, 1, norm)
        assert torch.equal(first["levels"], alone["levels"])
        torch.testing.assert_close(first["sensitivity"], alone["sensitivity"], rtol=1e-3, atol=0)
        torch.testing.assert_close(first["state"], alone["state"], rtol=1e-4, atol=1e-5)

    first, second = (found["joint"] for found in both)
    wanted = batch_norm(first["whole"], None, None, training=True)
    found = torch.cat([first["half"], second["half"]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)
    assert not first["pruned"].any()
    assert second["blame"].startswith("every value in the graph is finite")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    where = f"file://{tmp_path}/rendezvous"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of FSDP's own
def test_sharded_parameters_are_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, inputs = init_device_mesh("cpu", (1,)), torch.rand(4, 1, 8, 8)
    whole, run = (cgmq_fx.prepare(net(), "bops <= 2%", inputs) for _ in range(2))
    with pytest.raises(ValueError, match="fully_shard doesn't support scalar parameters"):
        fully_shard(whole.model, mesh=mesh)  # PyTorch's own
    ranges = {m.log_range for m in run.model.modules() if isinstance(m, Quantizer)}
    fully_shard(run.model, mesh=mesh, ignored_params=ranges)
    run.model(inputs).sum().backward()
    with pytest.raises(OptionError, match=r"sharded \(FSDP\).*DistributedDataParallel instead"):
        run.step()


def test_gradients_are_averaged_when_backward_ends(one_process: None) -> None:
    weights = [torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    averages = Averages()
    reported: list[Tensor] = []

    def loss() -> Tensor:
        first, second = (w * 2 for w in weights)
        for y in (first, second):
            averages.watch(y, reported.append)
        return (first.sum() * 3 + second.sum() * 5).log()

    def fails(_: Tensor) -> None:
        raise RuntimeError("on the way")

    broken = loss()
    hook = weights[1].register_hook(fails)
    with pytest.raises(RuntimeError, match="on the way"):
        broken.backward()
    assert not reported
    hook.remove()
    loss().backward()
    # 3 * 12 + 5 * 8 = 76
    first, second = sorted(reported, key=Tensor.numel, reverse=True)
    torch.testing.assert_close(first, torch.full((2, 3), 3 / 76))
    torch.testing.assert_close(second, torch.full((4,), 5 / 76))
