"""Small changes of the cost models and the controller: how many of them do the tests notice?

    python -m benchmarks.mutation run --sample 400 --out mutants.jsonl    # goes on where it stopped
    python -m benchmarks.mutation show --out mutants.jsonl                # the share, the survivors

Mutants are made by cosmic-ray. Each runs in a fork of a process that has imported everything but
the package, with the tests that are about the mutated module first; the first that fails kills it.
"""

import argparse
import ast
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from random import Random
from types import CodeType
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[1]
LONGEST = 120
"""CPU seconds after which a mutant counts as one that hangs; the slowest list of tests takes 40."""

MOST_BYTES = 12 << 30
WARM = ("torch.export", "torch._dynamo", "pytest", "hypothesis", "networkx", "scipy.optimize")
OPTIONS = (
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # hypothesis is there already
    *("-o", "timeout=0"),  # the time of the CPU is limited instead
    *("-x", "-q", "-p", "no:cacheprovider"),
)
NONE = "none"
"""The operator that changes nothing: the tests have to pass with it."""

OWN = "test_own_loops_keep_their_state"

TESTS = {
    "cost_models/target.py": ["target_files", "target", "parse", "constraint"],
    "cost_models/tables.py": ["target", "promises", "cost_model"],
    "cost_models/parse.py": ["parse", "constraint", "target", "ledger"],
    "cost_models/memory.py": ["memory", "ledger", "marginals", "promises", "constraint"],
    "cost_models/bits.py": ["bits", "costs", "ledger", "memory", "cost_model", "constraint"],
    "cost_models/constraint.py": ["constraint", "parse", "ledger", "cost_model", "costing"],
    "cost_models/preflight.py": ["cost_model", "promises", "ledger", "parse", "costing"],
    "cost_models/ledger.py": ["ledger", "marginals", "greedy", "cost_model", "costing", "moves"],
    "cost_models/lookup.py": ["ledger", "marginals", "moves"],
    "cost_models/model.py": ["cost_model", "costs", "parse", "promises"],
    "cost_models/builtin.py": ["costs", "bits", "cost_model", "ledger"],
    "cost_models/facts.py": ["constraint", "costs", "cost_model", "memory", "annotate"],
    "cost_models/errors.py": ["constraint", "parse", "cost_model", "user_errors", "wrong"],
    "cgmq_fx/projection.py": ["greedy", "projection", "oracle", "search"],
    "cgmq_fx/controller.py": ["moves", "controller", "search", "distortion", f"checkpoint::{OWN}"],
    "cgmq_fx/gates.py": ["gates", "constraint", "moves", "controller", "distortion", "projection"],
    "cgmq_fx/marginals.py": ["marginals", "moves", "controller", "search", f"checkpoint::{OWN}"],
    "cgmq_fx/directions.py": ["gates", "moves", "controller", "search", "distortion"],
}
"""By module, what notices fast first."""

Place: TypeAlias = tuple[int, int]
"""Line and column."""


@dataclass(frozen=True)
class Mutant:
    """A change: the operator of cosmic-ray, and the how manieth place that it fits."""

    module: str
    operator: str
    occurrence: int
    line: int
    column: int


def mutants() -> list[Mutant]:
    """Every mutant that can change anything, in the order of the source."""
    plugins, tree = import_module("cosmic_ray.plugins"), import_module("cosmic_ray.ast")
    found = []
    for module in TESTS:
        source = (ROOT / module).read_text()
        nodes, dead = list(tree.ast_nodes(tree.get_ast(source))), list(without_effect(source))
        for name in plugins.operator_names():
            kind = plugins.get_operator(name)
            if kind.arguments():
                continue
            operator = kind()
            places = (place for node in nodes for place in operator.mutation_positions(node))
            for number, (start, _) in enumerate(places):
                if not any(low <= tuple(start) < high for low, high in dead):
                    found.append(Mutant(module, name, number, *start))
    return sorted(found, key=lambda m: (m.module, m.line, m.column, m.operator, m.occurrence))


def without_effect(source: str) -> Iterator[tuple[Place, Place]]:
    """Where a change never changes what is computed, as begin and end.

    Annotations are only text, with `from __future__ import annotations`. Some decorators are for
    type checkers or speed, slots for memory, and `strict=True` asserts lengths that are equal.
    """
    for node in ast.walk(ast.parse(source)):
        found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for decorator in getattr(node, "decorator_list", []):
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(called) in ("final", "overload", "lru_cache"):
                yield (decorator.lineno, decorator.col_offset - 1), _end(decorator)
        if isinstance(node, ast.keyword) and ast.unparse(node) in ("slots=True", "strict=True"):
            found.append(node.value)
        yield from (((own.lineno, own.col_offset), _end(own)) for own in found if own is not None)


def _end(node: ast.expr) -> Place:
    return node.end_lineno or node.lineno, node.end_col_offset or 0


def changed(mutant: Mutant) -> str:
    """The source of the module with the mutant in it."""
    source = (ROOT / mutant.module).read_text()
    if mutant.operator == NONE:
        return source
    plugins, mutating = import_module("cosmic_ray.plugins"), import_module("cosmic_ray.mutating")
    operator = plugins.get_operator(mutant.operator)()
    code: str = mutating.mutate_code(source, operator, mutant.occurrence)
    return code


def tried(mutant: Mutant) -> dict[str, Any]:
    """How a mutant ended: killed by a failed test or by its time, or survived."""
    code, start = changed(mutant), time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(tested(mutant, code))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end = "survived" if status == 0 else "hung" if status == -signal.SIGXCPU else "killed"
    line = (ROOT / mutant.module).read_text().splitlines()[mutant.line - 1]
    became = code.splitlines()[mutant.line - 1] if mutant.line <= len(code.splitlines()) else ""
    shown = {"end": end, "seconds": round(time.monotonic() - start, 1)}
    return asdict(mutant) | shown | {"was": line.strip(), "became": became.strip()}


def tested(mutant: Mutant, code: str) -> int:
    """In a process of its own: run the tests with the mutant in place of its module."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST + 10))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    target, plain = (ROOT / mutant.module).resolve(), SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if Path(self.path).resolve() == target:
            return compile(code, self.path, "exec")
        return plain(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]
    hypothesis = import_module("hypothesis")
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # nobody reads the example
    options = {"deadline": None, "derandomize": True, "database": None, "phases": phases}
    hypothesis.settings.register_profile("mutation", **options)
    hypothesis.settings.load_profile("mutation")
    sys.dont_write_bytecode = mutant.operator != NONE
    pytest, status = import_module("pytest"), 0
    for name in TESTS[mutant.module]:
        file, colons, test = name.partition("::")
        status = int(pytest.main([*OPTIONS, f"tests/test_{file}.py{colons}{test}"]))
        if status:
            break
    return status


def run(sample: int, seed: int, out: Path) -> None:
    """Try an even sample of the mutants; those whose ends are in the file are not tried again."""
    every = mutants()
    step = max(1.0, len(every) / sample)
    first = Random(seed).uniform(0, step)
    chosen = [every[int(first + i * step)] for i in range(min(sample, len(every)))]
    Random(seed).shuffle(chosen)  # so that what is done when time runs out is a sample, too
    done = {key(row) for row in rows(out)}
    for name in WARM:
        import_module(name)
    import_module("torch").set_num_threads(1)
    print(f"{len(chosen)} of {len(every)} mutants", flush=True)
    for mutant in [*(Mutant(module, NONE, 0, 1, 0) for module in TESTS), *chosen]:
        if key(asdict(mutant)) in done:
            continue
        row = tried(mutant)
        if mutant.operator == NONE and row["end"] != "survived":
            raise SystemExit(f"the tests of {mutant.module} fail without any mutant")
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["module"], row["operator"], row["occurrence"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def show(out: Path) -> None:
    """Print the share that was killed, by module, and the survivors."""
    found = [row for row in rows(out) if row["operator"] != NONE]
    for module in [*TESTS, ""]:
        ends = Counter(row["end"] for row in found if row["module"].startswith(module))
        if total := sum(ends.values()):
            share = 1 - ends["survived"] / total
            print(f"{module or 'all'}: {total} mutants, {share:.1%} killed, {ends['hung']} by time")
    for row in sorted(found, key=lambda row: (row["module"], row["line"])):
        if row["end"] == "survived":
            print(f"{row['module']}:{row['line']}: {row['was']}\n    {row['became']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["run", "show"])
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.task == "run":
        run(options.sample, options.seed, options.out)
    show(options.out)


if __name__ == "__main__":
    main()
