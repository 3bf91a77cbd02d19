"""Random problems: what can be met is met without slack, what cannot be met is refused.

    python -m benchmarks.random_budgets --problems 1000 --seed 0 --resume random_budgets.jsonl

Every problem is a random network, scheme and budget of 1 to 4 constraints. Each comes twice: with
bounds that the smallest bit-widths satisfy, and with one bound below what they cost. The first must
be prepared, trained for some steps and finalized: the result, counted again from its graph alone,
must satisfy the budget, and no single gate may be raised by one level without breaking it. The
second must be refused before training.
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from math import inf, nextafter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.random_nets import random_net
from cgmq_fx import Bound, Budget, CgmqError, Constraint, InfeasibleBudgetError, Prepared, Scheme
from cgmq_fx.cost_models import (
    GraphFacts,
    Ledger,
    cost_model,
    highest_bits,
    load_target,
    lowest_bits,
    target_names,
)
from cgmq_fx.cost_models.errors import BudgetError, TargetError
from cgmq_fx.directions import DIRECTIONS, direction_of
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.passes.capture import Captured, ExampleInputs
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.recount import CostReport, count
from cgmq_fx.result import Result

PER_NET = 10
SCHEMES = 3
SAMPLE = 200
WIDTHS = (
    (2, 4, 8, 16, 32),
    (2, 4, 8),
    (0, 2, 4, 8),
    (0, 2, 4, 8, 16, 32),
    (3, 5, 8),
    (4, 8),
    (8, 16, 32),
)
COSTS = ("bops", "macs", "weights", "activations", "arena", "latency", "energy")
console = Console(highlight=False)


@dataclass(frozen=True)
class Outcome:
    """What came of one problem.

    Attributes:
        index: Number of the problem.
        feasible: Whether the budget can be met.
        budget: The budget.
        scheme: The scheme.
        gates: Number of gates.
        steps: Steps of training.
        satisfied: The result, counted again, satisfies the budget.
        maximal: No single gate of the result can be raised.
        refused: InfeasibleBudgetError was raised before training.
        error: Any other error.
        seconds: How long it took.
    """

    index: int
    feasible: bool
    budget: str
    scheme: str
    gates: int
    steps: int
    satisfied: bool = False
    maximal: bool = False
    refused: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether what must be true is."""
        if self.feasible:
            return self.satisfied and self.maximal
        return self.refused and not self.error


@dataclass(frozen=True)
class Range:
    """What a cost can be: least and most, and its value at a bound's base."""

    cost: Constraint
    floor: float
    ceiling: float

    def bounded(
        self, rng: random.Random, limit: float, facts: GraphFacts, *, up: bool
    ) -> Constraint:
        """The cost bounded by `limit`, absolute or relative; a share is rounded up or down."""
        base = rng.choice((None, None, 32, 32, 8))
        if base is None:
            return Constraint(self.cost.model, Bound(limit), self.cost.scope)
        unit = Constraint(self.cost.model, Bound(1.0, relative=True, base=base), self.cost.scope)
        reference = Ledger(facts, Budget((unit,)), lowest_bits(facts)).references[0]
        share = limit / reference
        while (share * reference < limit) if up else (share * reference > limit):
            share = nextafter(share, inf if up else 0.0)
        bound = Bound(share, relative=True, base=base)
        return Constraint(self.cost.model, bound, self.cost.scope)

    def feasible(self, rng: random.Random, facts: GraphFacts) -> Constraint:
        """Bounded by 0.1 % to 200 % of the span above the floor, now and then by the floor."""
        share = 0.0 if self.floor and rng.random() < 0.03 else 10 ** rng.uniform(-3, 0.301)
        return self.bounded(rng, self.floor + share * (self.ceiling - self.floor), facts, up=True)

    def infeasible(self, rng: random.Random, facts: GraphFacts) -> Constraint:
        """Bounded below the floor: by a share of the span, of the floor, or by the least bit."""
        below = self.floor - 10 ** rng.uniform(-3, 0.301) * (self.ceiling - self.floor)
        limit = below if below > 0 else self.floor * rng.uniform(0.01, 0.999)
        if rng.random() < 0.1:
            limit = nextafter(self.floor, 0.0)
        return self.bounded(rng, limit, facts, up=False)


def random_scheme(rng: random.Random) -> Scheme:
    """Any bit-widths, any granularity."""
    return Scheme(
        rng.choice(WIDTHS),
        weights=rng.choice(("tensor", "channel", "element")),
        activations=rng.choice(("tensor", "channel")),
        weight_ranges=rng.choice(("tensor", "channel")),
        input_bits=rng.choice((None, None, None, 8)),
    )


def ranges(rng: random.Random, facts: GraphFacts) -> list[Range]:
    """The costs that bits change and that some target has figures for."""
    found = []
    target = load_target(rng.choice(target_names()))
    modules = sorted({node.module or node.name for node in facts.nodes if node.macs})
    scopes = [("bops", rng.choice(modules)), ("weights", f"{rng.choice(modules)[:3]}*")]
    for name, scope in [*[(name, None) for name in COSTS], *scopes]:
        try:
            cost = Constraint(cost_model(name, target), Bound(1.0), scope)
            budget = Budget((cost,))
            low, high = (Ledger(facts, budget, e(facts)) for e in (lowest_bits, highest_bits))
        except (BudgetError, TargetError):  # no clock, no figure for this op
            continue
        if low.totals[0] < high.totals[0]:
            found.append(Range(cost, low.totals[0], high.totals[0]))
    return found


def random_budget(rng: random.Random, facts: GraphFacts, *, feasible: bool) -> Budget:
    """1 to 4 constraints; of an infeasible budget one at least is below its floor."""
    known = ranges(rng, facts)
    rng.shuffle(known)
    if not feasible:
        known.sort(key=lambda r: r.floor == 0)  # nothing is below 0
    bounds = [r.feasible(rng, facts) for r in known[: rng.randint(1, 4)]]
    if not feasible:
        bounds[0] = known[0].infeasible(rng, facts)
    rng.shuffle(bounds)
    return Budget(tuple(bounds))


def copied(graph: Captured) -> Captured:
    """The same graph, to be changed."""
    return Captured(copy_graph(graph.module), graph.inputs, graph.dynamic)


def train(run: Prepared, steps: int) -> None:
    """Some steps towards noise."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    inputs = run.example_inputs
    for _ in range(steps):
        optimizer.zero_grad()
        output = run.model(*inputs.args, **inputs.kwargs)
        F.mse_loss(output, torch.randn_like(output)).backward()
        optimizer.step()
        run.step()


def raisable(rng: random.Random, report: CostReport, budget: Budget) -> Iterator[str]:
    """Every gate (of many, a sample) that could be one level higher."""
    ledger = Ledger(report.facts, budget, report.assignment)
    for name, quantizer in report.facts.quantizers.items():
        bits = ledger.assignment[name]
        gates: Iterable[int] = range(bits.size)
        if quantizer.gates > SAMPLE:
            gates = rng.sample(range(bits.size), SAMPLE)
        for gate in gates:
            level = quantizer.bit_widths.index(int(bits[gate])) + 1
            if level < len(quantizer.bit_widths):
                raised = bits.copy()
                raised[gate] = quantizer.bit_widths[level]
                if ledger.fits(ledger.trial(name, raised)):
                    yield f"{name}[{gate}] {bits[gate]} -> {raised[gate]}"


def solve(
    graph: Captured, scheme: Scheme, budget: Budget, rng: random.Random, steps: int
) -> Result:
    """Prepare, train for some steps, finalize."""
    search = rng.choice((1, 2, 3, 50))
    direction = direction_of(rng.choice(sorted(DIRECTIONS)))
    run = Prepared(copied(graph), budget, scheme, direction, search)
    train(run, steps)
    return run.finalize()


def problem(
    graph: Captured, scheme: Scheme, facts: GraphFacts, seed: int, index: int, *, feasible: bool
) -> Outcome:
    """Draw a problem and see what comes of it."""
    start = time.perf_counter()
    rng = random.Random(f"{seed} {index} {feasible}")
    torch.manual_seed(rng.randrange(2**31))
    budget = random_budget(rng, facts, feasible=feasible)
    steps, gates = rng.randrange(4), sum(q.gates for q in facts.quantizers.values())
    satisfied = maximal = refused = False
    error = ""
    try:
        result = solve(graph, scheme, budget, rng, steps)
        report = count(result.model, result.inputs, result.budget)
        satisfied = report.satisfied
        error = ", ".join(raisable(rng, report, result.budget))[:300]
        maximal = not error
    except InfeasibleBudgetError:
        refused = True
    except (CgmqError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as wrong:
        error = f"{type(wrong).__name__}: {wrong}"[:600]
    seconds = round(time.perf_counter() - start, 3)
    return Outcome(
        index, feasible, str(budget), str(scheme), gates, steps,
        satisfied, maximal, refused, error, seconds,
    )  # fmt: skip


def problems_of_net(seed: int, net: int, indices: Sequence[int]) -> list[Outcome]:
    """The problems of one network, whose numbers are `indices`, each in both kinds."""
    rng = random.Random(f"{seed} net {net}")
    model, inputs = random_net(rng)
    graph = float_graph(model, ExampleInputs(inputs))
    schemes = [random_scheme(rng) for _ in range(SCHEMES)]
    facts = [quantized_graph(copied(graph), scheme)[1] for scheme in schemes]
    found = []
    for index in indices:
        for feasible in (True, False):
            which = index % SCHEMES
            found.append(
                problem(graph, schemes[which], facts[which], seed, index, feasible=feasible)
            )
    return found


def outcomes(seed: int, indices: Iterable[int], workers: int) -> Iterator[list[Outcome]]:
    """All problems, network by network; the order is that in which they are done."""
    nets: dict[int, list[int]] = {}
    for index in indices:
        nets.setdefault(index // PER_NET, []).append(index)
    if workers <= 1:
        yield from (problems_of_net(seed, net, own) for net, own in nets.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(problems_of_net, seed, net, own) for net, own in nets.items()]
        yield from (future.result() for future in as_completed(futures))


def summary(found: Sequence[Outcome]) -> Table:
    """The final table."""
    table = Table(title="Random budgets", title_justify="left")
    for column in ("", "problems", "satisfied", "maximal", "refused", "wrong", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for feasible in (True, False):
        rows = [o for o in found if o.feasible == feasible]
        counts = [
            len(rows),
            sum(o.satisfied for o in rows),
            sum(o.maximal for o in rows),
            sum(o.refused for o in rows),
            sum(not o.right for o in rows),
        ]
        seconds = sum(o.seconds for o in rows)
        kind = "feasible" if feasible else "infeasible"
        table.add_row(kind, *map(str, counts), f"{seconds:.0f}")
    return table


def earlier(path: Path | None, seed: int) -> list[Outcome]:
    """What an interrupted run has written."""
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if any(row.pop("seed") != seed for row in rows):
        raise SystemExit(f"{path} was written with another --seed")
    return [Outcome(**row) for row in rows]


def main() -> None:
    """Run the problems that are not done yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a file that is continued, a line per problem")
    options = parser.parse_args()
    found = earlier(options.resume, options.seed)
    done = {o.index for o in found}
    todo = [i for i in range(options.problems) if i not in done]
    for batch in outcomes(options.seed, todo, options.workers):
        found += batch
        if options.resume is not None:
            with options.resume.open("a") as file:
                file.writelines(
                    json.dumps({"seed": options.seed, **asdict(o)}) + "\n" for o in batch
                )
        for outcome in batch:
            if not outcome.right:
                console.print(f"WRONG {outcome}", markup=False)
        console.print(f"{len(found)} done, {sum(not o.right for o in found)} wrong")
    console.print(summary(found))
    raise SystemExit(any(not o.right for o in found))


if __name__ == "__main__":
    main()
