"""Deployment presets: what a runtime can execute, and so what must be trained.

A target answers two questions. What can run: a preset, from the table here. What it costs: a chip,
from a JSON file. `target=` takes the name of either, the path of a chip's file, or one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models import (
    ActivationMemory,
    Arena,
    Budget,
    Target,
    WeightMemory,
    load_target,
    target_names,
)
from cgmq_fx.cost_models.errors import OptionError, UnknownTargetError, UnsupportedModelError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.infra import place
from cgmq_fx.passes.opaque import OpaqueCall
from cgmq_fx.passes.scheme import Granularity, Scheme
from cgmq_fx.passes.state import value_of
from cgmq_fx.runtime_ops import (
    BYTE_RULES,
    HLS4ML,
    HLS4ML_RULES,
    LITERT,
    ONNXRUNTIME,
    ONNXRUNTIME_RULES,
    XNNPACK,
    Rule,
)

_CONTAINER = tuple(range(2, 9))
"""Bit-widths of codes that a runtime with 8-bit tensors holds."""

_PRUNED = (0, *_CONTAINER)
"""The same where nothing may be left of a tensor or a channel."""

Trial: TypeAlias = Callable[[Captured], str | None]
"""Tries a captured float graph in a runtime: what speaks against it, or None."""

_DEFAULTS = Scheme()
_FEW = 24
"""How many ops a message lists."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What a runtime can execute. A model quantized under it can be exported to its formats.

    Attributes:
        name: What `target=` calls it.
        description: One sentence.
        formats: The formats of `Result.export` that it guarantees.
        scheme: What is trained where the user says nothing: each field takes the place of one that
            the user's scheme leaves at its default.
        widths: The bit-widths that tensors may have; empty for any.
        weights: The granularities that gates of weights may have.
        ops: Names of the ATen ops that it executes exactly; empty for any.
        rules: For some of them, what says why a node cannot be executed after all; for `output`,
            what says why something cannot be returned.
        trial: Tries a model that has other ops; what speaks against it, or None.
        channels_last: Whether what is deployed takes images with their channels last.
        bytes_only: Whether it keeps every tensor in whole bytes when it runs.
    """

    name: str
    description: str
    formats: tuple[str, ...]
    scheme: Scheme
    widths: tuple[int, ...] = _CONTAINER
    weights: tuple[Granularity, ...] = ("tensor", "channel", "element")
    ops: tuple[str, ...] = ()
    rules: tuple[tuple[str, Rule], ...] = ()
    trial: Trial | None = None
    channels_last: bool = False
    bytes_only: bool = False

    def apply(self, given: Scheme | None) -> Scheme:
        """The scheme to train: what is given, and the preset's own where that is at its default.

        Raises:
            OptionError: Naming the option that the runtime cannot execute, and what it can.
        """
        chosen = given or _DEFAULTS
        own = {
            field.name: getattr(self.scheme, field.name)
            for field in fields(Scheme)
            if getattr(chosen, field.name) == getattr(_DEFAULTS, field.name)
        }
        if "bit_widths" not in own or chosen.weights == "element":  # whose grids have to nest
            own.pop("weight_widths", None)
        chosen = replace(chosen, **own)
        if self.widths:
            self._check(chosen)
        return chosen

    def remarks(self, budget: Budget) -> tuple[str, ...]:
        """What a budget does not say about memory there, if anything."""
        memory = (WeightMemory, ActivationMemory, Arena)
        named = [c.name for c in budget if isinstance(c.model, memory)] if self.bytes_only else []
        if not named:
            return ()
        return (
            f"{self.name} keeps weights and activations of fewer than 8 bits in bytes, but "
            f"{' and '.join(named)} count them at their own bits: at run time they take more",
        )

    def check_ops(self, captured: Captured) -> None:
        """Insist that the runtime executes every op of a model, before it is trained.

        Args:
            captured: The captured and normalised float graph.

        Raises:
            UnsupportedModelError: Naming the nodes that it does not execute, and where they are.
        """
        nodes = captured.module.graph.nodes
        said = {node: self._foreign(captured.module, node) for node in nodes}
        untried = {node: name for node in nodes if (name := self._untried(node))}
        hint = self._known if untried else "write the model without it"
        if untried and self.trial is not None and not any(said.values()):
            reason = self.trial(captured)
            if reason is None:
                return
            hint = reason
        said |= untried
        foreign: dict[str, str] = {}
        for node, what in said.items():
            if what:
                foreign.setdefault(what, f"{what} ({place(node) or node.name})")
        if foreign:
            listed = "; ".join(foreign.values())
            raise UnsupportedModelError(f"the target {self.name} cannot execute {listed}; {hint}")

    def _foreign(self, module: GraphModule, node: Node) -> str | None:
        """What a node does that the runtime is known not to execute."""
        if node.op == "call_module" and self.formats:
            owner = module.get_submodule(str(node.target))
            return f"{owner.path}, kept as it is" if isinstance(owner, OpaqueCall) else None
        name = node.op if node.op == "output" else float_op(node)
        rule = dict(self.rules).get(name)
        reason = rule(node) if rule is not None else None
        return f"{name} {reason}" if reason else None

    def _untried(self, node: Node) -> str | None:
        """The op of a node that the runtime was never seen to execute."""
        name = float_op(node)
        return name if name and self.ops and name not in self.ops else None

    @property
    def _known(self) -> str:
        """What can be done about an op that is refused."""
        if not self.ops:
            return "write it with what can be captured and executed"
        if len(self.ops) <= _FEW:
            return f"it takes {', '.join(self.ops)}"
        return (
            f"it takes what was tried there, PRESETS[{self.name!r}].ops; to try another op, give "
            f"dataclasses.replace(PRESETS[{self.name!r}], ops=()) as the target: export compares"
        )

    def _check(self, scheme: Scheme) -> None:
        ends = [bits for bits in (scheme.input_bits, scheme.rounded_output) if bits is not None]
        layers = [bits for _, widths in scheme.layer_widths for bits in widths]
        weights = scheme.widths_of(Role.WEIGHT)
        wide = sorted({*scheme.bit_widths, *weights, *layers, *ends} - {*self.widths})
        if wide:
            listed = ", ".join(map(str, wide))
            few = [bits for bits in self.widths if bits]
            none = "0 or " if 0 in self.widths else ""
            raise self._refused(f"{listed} bits", f"{none}{few[0]} to {few[-1]} bits")
        if scheme.weights not in self.weights:
            raise self._refused(f"weights={scheme.weights!r}", f"weights of {self.weights}")
        needed = [("activations", "tensor")]
        if self.scheme.weight_ranges == "tensor":
            needed.append(("weight_ranges", "tensor"))
        for name, value in needed:
            if getattr(scheme, name) != value:
                raise self._refused(f"{name}={getattr(scheme, name)!r}", f"{name}={value!r}")
        shared = scheme.weights == "element" or scheme.weight_ranges == "tensor" != scheme.weights
        if shared and not scheme.power_of_two and not _nest(weights):
            name = "bit_widths" if scheme.weight_widths is None else "weight_widths"
            raise self._refused(
                f"{name}={weights} within one range",
                "widths that divide each other there, such as (2, 4, 8), or power_of_two=True",
            )

    def _refused(self, what: str, instead: str) -> OptionError:
        return OptionError(f"the target {self.name} cannot execute {what}; it takes {instead}")


def float_op(node: Node) -> str:
    """The name of the op that makes a float tensor, or several; empty for any other node."""
    name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
    made = value_of(node)
    parts = made if isinstance(made, tuple | list) else [made]
    found = any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
    return str(name) if found else ""


def _nest(widths: Sequence[int]) -> bool:
    """Whether every grid is part of the next finer one: 2^a - 1 divides 2^b - 1 iff a divides b.

    The one of 0 bits, which is zero, is part of all.
    """
    return all(b % a == 0 for a, b in pairwise(widths) if a)


def _in_onnx(captured: Captured) -> str | None:
    from cgmq_fx.exporters.onnx_trial import onnx_refusal  # it imports what exports results

    return onnx_refusal(captured)


_INTEGER = Scheme(bit_widths=(2, 4, 8), output_bits=8)
_SHIFTS = replace(_INTEGER, weight_ranges="tensor", power_of_two=True)
_FAST = replace(_INTEGER, weight_widths=(2, 4, 7))
"""ONNX Runtime: on x86, products of 8 by 8 bits are exact on its slow kernels only."""

NONE = Preset("none", "No runtime in mind: everything may be used.", (), _DEFAULTS, ())

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "onnxruntime",
            "ONNX Runtime on its fast integer kernels: weights of at most 7 bits, the rest of 8.",
            ("onnx",),
            _FAST,
            widths=_PRUNED,
            ops=ONNXRUNTIME,
            rules=ONNXRUNTIME_RULES,
            trial=_in_onnx,
            bytes_only=True,
        ),
        Preset(
            "fpga",
            "FPGAs through hls4ml: steps of powers of two, one per weight tensor.",
            ("qonnx",),
            _SHIFTS,
            weights=("tensor",),
            ops=HLS4ML,
            rules=HLS4ML_RULES,
            channels_last=True,
        ),
        Preset(
            "xnnpack",
            "ExecuTorch with XNNPACK, on Arm and x86 processors: 8-bit tensors.",
            ("executorch",),
            _INTEGER,
            ops=XNNPACK,
            rules=BYTE_RULES,
            bytes_only=True,
        ),
        Preset(
            "litert",
            "LiteRT (TensorFlow Lite): 8-bit tensors, images with channels last.",
            ("litert",),
            _INTEGER,
            ops=LITERT,
            rules=BYTE_RULES,
            channels_last=True,
            bytes_only=True,
        ),
        NONE,
    )
}
"""The presets by name."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a model is to run.

    Attributes:
        preset: What the runtime can execute.
        chip: What the chip's operations cost, or None.
    """

    preset: Preset = NONE
    chip: Target | None = None

    def scheme(self, given: Scheme | None) -> Scheme:
        """The scheme to train: the preset's, without bit-widths that the chip would have to split.

        Bit-widths that the user names are taken as they are.

        Raises:
            OptionError: If it is no scheme, or the scheme and the preset contradict each other.
        """
        if given is not None and not isinstance(given, Scheme):
            raise OptionError(
                f"scheme= takes a Scheme, such as Scheme(weights='channel'), not {given!r}"
            )
        chosen = self.preset.apply(given)
        named = given or _DEFAULTS
        if self.chip is None or named.bit_widths != _DEFAULTS.bit_widths:
            return chosen
        weight, activation = self.chip.widest
        widths, weights = _fitting(chosen.bit_widths, activation), chosen.weight_widths
        if named.weight_widths is None:
            fitting = _fitting(chosen.bit_widths if weights is None else weights, weight)
            weights = fitting if weights is not None or fitting != widths else None
        return replace(chosen, bit_widths=widths, weight_widths=weights)


def _fitting(widths: tuple[int, ...], widest: int) -> tuple[int, ...]:
    return tuple(b for b in widths if b <= widest) or widths[:1]


TargetLike: TypeAlias = str | Path | Target | Preset | Sequence[str | Path | Target | Preset]
"""What `target=` takes."""


def deployment(target: TargetLike | None) -> Deployment:
    """What `target=` means: a preset, a chip, or one of each.

    Raises:
        TargetError: If there is no such preset or chip, or its file cannot be read.
        OptionError: If there are two presets or two chips.
    """
    several = isinstance(target, Sequence) and not isinstance(target, str)
    entries: Any = target if several else [] if target is None else [target]
    found = [_one(entry) for entry in entries]
    presets = [one for one in found if isinstance(one, Preset)]
    chips = [one for one in found if isinstance(one, Target)]
    for kind, group in (("presets", presets), ("chips", chips)):
        if len(group) > 1:
            names = " and ".join(one.name for one in group)
            raise OptionError(f"target= takes one preset and one chip; {names} are two {kind}")
    return Deployment(presets[0] if presets else NONE, chips[0] if chips else None)


def _one(entry: Any) -> Preset | Target:
    if isinstance(entry, Preset | Target):
        return entry
    if isinstance(entry, str) and entry in PRESETS:
        return PRESETS[entry]
    if not isinstance(entry, str | Path):
        raise OptionError(f"target= takes names, files, presets and targets, not {entry!r}")
    try:
        return load_target(entry)
    except UnknownTargetError:
        word, known = str(entry).lower(), [*PRESETS, *target_names()]
        begun = [name for name in known if word and name.startswith(word)]
        close = begun or get_close_matches(word, known, 1)
        hint = f"did you mean {close[0]!r}? Presets" if close else "presets"
        raise UnknownTargetError(
            f"there is no target {str(entry)!r}; {hint} are {', '.join(PRESETS)}, chips are "
            f"{', '.join(target_names())}, or give the path of a chip's JSON file"
        ) from None
