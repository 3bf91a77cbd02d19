"""Loaders under random input, each in a process of its own that is watched."""

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from benchmarks.mutate import change_bytes, change_json, change_text, value
from cgmq_fx import BOPs, CgmqError, Scheme, load, prepare
from cgmq_fx.checkpoint import NEWEST, Checkpoint, CheckpointStore
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.cost_models.facts import NodeFacts
from cgmq_fx.cost_models.target import parse_target, target_names

HANG = 2.0
"""CPU seconds: the wall clock of a machine that does other things as well proves nothing."""

_DEAD = 60
_ROUND = 500
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Loader:
    """A loader.

    Attributes:
        make: A random input, from a generator and the folder of the samples.
        load: Loads an input and uses what it got.
    """

    make: Callable[[Random, Path], Any]
    load: Callable[[Any, Path], None]


def _parts(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {}), deserialize(content)


def _change_file(rng: Random, content: bytes) -> bytes:
    """A safetensors file with other bytes, another header of ours, or other tensors."""
    kind = rng.randrange(6)
    if kind == 0:
        return change_bytes(rng, content)
    header, tensors = _parts(content)
    ((key, text),) = header.items()
    if kind == 1:
        name = rng.choice(sorted(tensors))
        shape = [rng.choice([0, 1, 2, 3, 1000]) for _ in range(rng.randrange(3))]
        dtype = rng.choice([torch.float32, torch.float16, torch.int32, torch.int64, torch.bool])
        filled = torch.full(shape, rng.choice([0, 1, -1, 2, 8, 33, 1e30, float("nan")]))
        tensors[name] = filled.nan_to_num().to(dtype) if not dtype.is_floating_point else filled
    elif kind == 2:
        text = change_bytes(rng, text.encode()).decode(errors="replace")
    else:
        text = json.dumps(change_json(rng, json.loads(text)))
    return serialize(tensors, {key: text})


def _sample(rng: Random, folder: Path, pattern: str) -> bytes:
    return rng.choice(sorted(folder.glob(pattern))).read_bytes()


def _load_artifact(content: bytes, folder: Path) -> None:
    path = folder / f"{os.getpid()}.fuzzed"
    path.write_bytes(content)
    result = load(path)
    assert result.cost.satisfied
    str(result)
    json.dumps(result.report())


def _load_checkpoint(content: bytes, folder: Path) -> None:
    own = folder / f"{os.getpid()}.run"
    own.mkdir(exist_ok=True)
    (own / NEWEST).write_bytes(content)
    state = CheckpointStore(Checkpoint(own), {"seed": 0}).read()
    assert state is not None
    prepared().load_state_dict(state)


def _make_target(rng: Random, folder: Path) -> bytes:
    kind, content = rng.randrange(4), _sample(rng, folder, "*.json")
    if kind == 0:
        return change_bytes(rng, content)
    return json.dumps(change_json(rng, json.loads(content)) if kind > 1 else value(rng)).encode()


NODES = [NodeFacts("a", op, 10) for op in ("aten.conv2d.default", "aten.linear.default")]
BUDGETS = [
    "bops <= 0.4%, weights <= 64 KiB",
    "activations <= 60% of 8 bits & macs <= 2.5M",
    "bops[encoder.*] <= 1G; weights <= 1e3",
    "latency <= 5 ms and energy <= 20 uJ",
]


def _load_target(content: bytes, _: Path) -> None:
    target = parse_target(content, "the file")
    for node in NODES:
        for bits in (2, 8, 32):
            target.price(node, bits, 8, lambda row: row.cycles)


LOADERS = {
    "artifact": Loader(lambda r, f: _change_file(r, _sample(r, f, "*.artifact")), _load_artifact),
    "checkpoint": Loader(
        lambda r, f: _change_file(r, _sample(r, f, "*.checkpoint")), _load_checkpoint
    ),
    "target": Loader(_make_target, _load_target),
    "budget": Loader(lambda r, _: change_text(r, BUDGETS), lambda text, _: print_budget(text)),
    "mapping": Loader(
        lambda r, _: {change_text(r, ["bops", "weights"]): value(r)},
        lambda data, _: print_budget(data),
    ),
}


def print_budget(budget: Any) -> None:
    str(parse_budget(budget))


def prepared() -> Any:
    torch.manual_seed(0)
    scheme = Scheme(weights="channel", activations="channel")
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return prepare(net, BOPs() <= "20%", torch.rand(2, 2, 4, 4), scheme=scheme)


def write_samples(folder: Path) -> None:
    """Valid files that the random ones are made from."""
    own = prepared()
    CheckpointStore(Checkpoint(folder), {"seed": 0}).write(own.state_dict())
    (folder / NEWEST).rename(folder / "a.checkpoint")
    own.finalize().save(folder / "a.artifact")
    scheme = Scheme(weights="element")
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))
    mixed = prepare(net, "bops <= 30%, arena <= 90%", torch.rand(2, 6), scheme=scheme)
    mixed.finalize().save(folder / "b.artifact")
    for name in target_names():
        shipped = Path(__file__).parents[1] / "cost_models" / "targets" / f"{name}.json"
        (folder / f"{name}.json").write_bytes(shipped.read_bytes())


def _work(name: str, seed: int, numbers: range, folder: Path, pipe: Any) -> None:
    """Feed inputs to a loader; for each, tell how it ended, and the time that it took."""
    torch.set_num_threads(1)
    loader = LOADERS[name]
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        given = loader.make(Random(f"{seed}/{name}/{number}"), folder)
        pipe.send(("begun", number, 0.0, 0.0))
        signal.alarm(_DEAD)
        start, ended = time.process_time(), "accepted"
        try:
            loader.load(given, folder)
        except CgmqError:
            ended = "refused"
        except Exception as error:  # noqa: BLE001 - what is not the library's is counted
            ended = f"{type(error).__name__}: {str(error)[:200]}"
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        pipe.send((ended, number, time.process_time() - start, peak))
        signal.alarm(0)


def fuzz(name: str, inputs: int, seed: int = 0) -> dict[str, Any]:
    """Feed random inputs to a loader.

    Returns:
        How many were accepted and refused, crashes and hangs (with the number of the input), errors
        that are not the library's, the slowest in CPU seconds, and the largest growth of the peak
        memory of one process that loaded up to 500 of them.
    """
    counts = {"accepted": 0, "refused": 0}
    crashes: list[int] = []
    hangs: list[int] = []
    unexpected: list[str] = []
    slowest = peak = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_samples(folder)
        done = 0
        while done < inputs:
            ours, theirs = FORK.Pipe(duplex=False)
            numbers = range(done, min(inputs, done + _ROUND))
            child = FORK.Process(target=_work, args=(name, seed, numbers, folder, theirs))
            child.start()
            theirs.close()
            while True:
                try:
                    ended, number, seconds, grown = ours.recv()
                except EOFError:
                    break
                if ended == "begun":
                    done = number + 1
                    last = number
                    continue
                last = -1
                slowest, peak = max(slowest, seconds), max(peak, grown)
                if seconds > HANG:
                    hangs.append(number)
                if ended in counts:
                    counts[ended] += 1
                else:
                    unexpected.append(f"{number}: {ended}")
            child.join()
            if last >= 0:
                (hangs if child.exitcode == -signal.SIGALRM else crashes).append(last)
    return {
        "loader": name,
        "inputs": inputs,
        **counts,
        "crashes": crashes,
        "hangs": hangs,
        "unexpected": unexpected[:20],
        "slowest_s": round(slowest, 3),
        "peak_mib": round(peak, 1),
    }
