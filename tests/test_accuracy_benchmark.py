"""The accuracy benchmark: every method ends in a row, and the exact knapsack is one."""

import itertools
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cgmq_fx
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import cases, methods
from benchmarks.accuracy.cases import CASES, Case, Files
from benchmarks.accuracy.fixed import knapsack, random_assignment, widest_uniform
from benchmarks.accuracy.penalty import Penalised
from benchmarks.accuracy.summary import cells, plot, read, table
from benchmarks.accuracy.vgg7 import VGG7
from benchmarks.mnist import Batches, Mnist
from cgmq_fx.cost_models import Ledger

BOUND = "bops <= 2%"


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case small enough for a test: 64 random images, a net of two layers."""
    torch.manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(3, (64,))
    monkeypatch.setattr(cases, "_mnist", lambda _: Mnist(images, labels, images, labels))

    def make(_: Files) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    found = Case("lenet5", make, (BOUND,), (BOUND,), float_epochs=1, rate=1e-3, epochs=2)
    monkeypatch.setitem(CASES, "lenet5", found)
    return found


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_gives_a_row(method: str, case: Case, tmp_path: Path) -> None:
    if method == "brevitas":
        pytest.importorskip("brevitas")
    bound = "penalty:30" if method == "penalty" else BOUND
    row = methods.run(methods.Job(case, method, bound, 0, 2), Files(tmp_path), lambda _: None)
    assert 0 <= row.accuracy <= 1
    assert row.satisfied
    assert method == "penalty" or row.costs[0] <= 0.02
    assert not list(tmp_path.glob("run-*"))


def test_runs_have_names_of_their_own() -> None:
    jobs = [methods.Job(CASES["lenet5"], method, BOUND, 0, 2) for method in methods.METHODS]
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_penalty_takes_bits_and_hardens_to_allowed_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = cgmq_fx.prepare(net, "bops <= 100%", torch.rand(4, 6))
    penalised = Penalised(prepared, 100.0)
    optimizer = torch.optim.Adam(penalised.groups(), lr=0.01)
    costs = []
    for _ in range(120):
        cost = penalised.penalty()
        optimizer.zero_grad()
        (cost + 0 * prepared.model(torch.rand(2, 6)).sum()).backward()
        optimizer.step()
        costs.append(float(cost.detach()) / 100)
    assert costs[0] == pytest.approx(8 * 8 / 32**2)  # starts at 8 bits everywhere
    assert all(after < before + 1e-6 for before, after in pairwise(costs))
    penalised.harden()
    result = prepared.finalize()
    bits = {int(b) for own in result.cost.assignment.values() for b in own}
    assert bits == {4}  # 1.2 levels below 8 bits
    assert result.cost.states[0].value / result.cost.states[0].reference == 4 * 4 / 32**2


def test_the_command_runs_only_what_is_missing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["accuracy", "lenet5", "--out", str(tmp_path), "--seeds", "0", "1"]
    )
    command.main()
    first = (tmp_path / "results.jsonl").read_text()
    command.main()
    assert (tmp_path / "results.jsonl").read_text() == first
    assert "| bops <= 2% | marginal |" in (tmp_path / "lenet5.md").read_text()
    assert (tmp_path / "lenet5.png").stat().st_size > 1000
    assert "seed_1" in capsys.readouterr().out


def test_the_table_has_means_and_standard_errors(tmp_path: Path) -> None:
    rows = [
        methods.Row(f"k{i}", "lenet5", m, BOUND, i, 3, a, 0.99, (0.019,), True, {}, 1.0)
        for m, found in {"marginal": [0.9, 0.92, 0.94], "uniform": [0.8]}.items()
        for i, a in enumerate(found)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row.as_dict()) for row in rows) + '\n{"torn')
    assert read(path) == rows
    best = next(cell for cell in cells(rows) if cell.method == "marginal")
    assert best.accuracy == pytest.approx(0.92)
    assert best.error == pytest.approx(0.02 / 3**0.5)  # stdev 0.02 over 3 seeds
    assert "| bops <= 2% | marginal | 92.00% ± 1.15% | 1.900% | 3 | 3 |" in table(rows)
    assert "| bops <= 2% | uniform | 80.00% | 1.900% | 3 | 1 |" in table(rows)
    plot(rows, tmp_path / "plot.png")


@pytest.fixture(scope="module")
def prepared() -> cgmq_fx.Prepared:
    scheme = cgmq_fx.Scheme((2, 4, 8))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    return cgmq_fx.prepare(net, "bops <= 2%, weights <= 30%", torch.rand(4, 6), scheme=scheme)


def test_the_knapsack_is_exact(prepared: cgmq_fx.Prepared) -> None:
    """Against all assignments, tried one by one."""
    facts, budget = prepared.facts, prepared.budget
    rng = np.random.default_rng(0)
    rises = {n: sorted(rng.random(3), reverse=True) for n in facts.quantizers}
    names = list(facts.quantizers)
    best = min(
        sum(rises[n][level] for n, level in zip(names, levels, strict=True))
        for levels in itertools.product(range(3), repeat=len(names))
        if Ledger(facts, budget, _bits(prepared, levels)).satisfied
    )
    found = knapsack(facts, budget, rises)
    assert Ledger(facts, budget, found).satisfied
    total = sum(rises[n][(2, 4, 8).index(int(found[n][0]))] for n in names)
    assert total == pytest.approx(best)


def _bits(prepared: cgmq_fx.Prepared, levels: tuple[int, ...]) -> dict[str, np.ndarray]:
    names = prepared.facts.quantizers
    return {n: np.array([(2, 4, 8)[k]]) for n, k in zip(names, levels, strict=True)}


def test_random_assignments_satisfy_and_leave_no_slack(prepared: cgmq_fx.Prepared) -> None:
    facts, budget = prepared.facts, prepared.budget
    for seed in range(10):
        bits = random_assignment(facts, budget, seed)
        ledger = Ledger(facts, budget, bits)
        assert ledger.satisfied
        for name, own in bits.items():
            if own[0] < 8:
                assert not ledger.fits(ledger.trial(name, own * 2))


def test_the_widest_uniform_assignment(prepared: cgmq_fx.Prepared) -> None:
    # 4 x 4 of 32 x 32 bits are 1.5625 % of the BOPs, 5 x 5 are 2.44 %
    assert widest_uniform(prepared.facts, prepared.budget) == 4


def test_vgg7_has_the_macs_of_its_docstring() -> None:
    cost = cgmq_fx.cost(VGG7(), torch.rand(2, 3, 32, 32), "macs")
    assert cost.facts.macs == 615_917_568
    assert "615,917,568" in str(VGG7.__doc__)


def test_vgg7_trains_under_a_bound() -> None:
    torch.manual_seed(0)
    data = Batches(torch.rand(16, 3, 32, 32), torch.randint(10, (16,)), 8)
    result = cgmq_fx.quantize(
        VGG7(width=0.05), "bops <= 1.6%", data, loss=nn.functional.cross_entropy, epochs=1
    )
    assert result.cost.satisfied
