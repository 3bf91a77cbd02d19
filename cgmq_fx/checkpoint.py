"""Checkpoints: a folder with the newest state of a run and the one before it.

Each is one safetensors file with JSON in its header. A file is written beside the others, flushed
to the disk and then renamed, so that at every moment at least one complete checkpoint is there.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from cgmq_fx.cost_models.errors import CheckpointError, OptionError
from cgmq_fx.given import path_of
from cgmq_fx.identity import difference
from cgmq_fx.packing import pack, unpack

FORMAT = 2
NEWEST = "newest.safetensors"
PREVIOUS = "previous.safetensors"
_TEMPORARY = ".checkpoint-{}.tmp"
_KEY = "cgmq_fx.checkpoint"
_MINUTES = 5.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run is kept, and how often.

    Attributes:
        folder: Made if it does not exist. The same call with the same folder resumes the run.
        steps: Steps between checkpoints; None for none by steps.
        minutes: Minutes between checkpoints; None for none by time.

    Raises:
        OptionError: If the folder is no path, or an interval is not positive.
    """

    folder: str | Path
    steps: int | None = None
    minutes: float | None = _MINUTES

    def __post_init__(self) -> None:
        path_of("checkpoint=", self.folder)
        for name, value in (("steps", self.steps), ("minutes", self.minutes)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise OptionError(f"the {name} between checkpoints must be positive, not {value!r}")


def checkpoint_of(given: str | Path | Checkpoint | None) -> Checkpoint | None:
    """What `checkpoint=` means.

    Raises:
        OptionError: If it is neither a path nor a `Checkpoint`.
    """
    return given if given is None or isinstance(given, Checkpoint) else Checkpoint(given)


class OtherRunError(CheckpointError):
    """A checkpoint is of another model, budget, version, or has other options."""


class CheckpointStore:
    """Writes and reads the checkpoints of one run.

    Args:
        checkpoint: Where and how often.
        identity: What the run is: a checkpoint with another identity is refused.
    """

    def __init__(self, checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
        self._options = checkpoint
        self._folder = Path(checkpoint.folder)
        self._identity = identity
        self._written: float | None = None

    def due(self, step: int) -> bool:
        """Whether to write after `step` steps: after the first one, and then by the intervals."""
        if self._written is None:
            return True
        options = self._options
        if options.steps is not None and step % options.steps == 0:
            return True
        passed = time.monotonic() - self._written
        return options.minutes is not None and passed >= 60 * options.minutes

    def write(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; the newest becomes the previous one.

        The first one of a run has to succeed. Later ones warn when they fail (the disk may be full
        for a while): training goes on, and the checkpoints that are there stay.

        Raises:
            CheckpointError: If the state holds what a checkpoint cannot, or the first one fails.
        """
        data, tensors = pack(state)
        header = {"format": FORMAT, "identity": self._identity, "state": data}
        content = serialize(tensors, {_KEY: json.dumps(header, allow_nan=False)})
        first, self._written = self._written is None, time.monotonic()
        try:
            self._replace(content)
        except OSError as error:
            message = f"the checkpoint in {self._folder} cannot be written: {error}"
            if first:
                raise CheckpointError(message) from error
            warnings.warn(f"{message}; the one before it stays", RuntimeWarning, stacklevel=2)

    def read(self) -> dict[str, Any] | None:
        """The newest state that can be read, or None if there is none.

        Raises:
            CheckpointError: If there are checkpoints but none can be read, or it is of another run;
                the message names the difference.
        """
        errors: list[Exception] = []
        for name in (NEWEST, PREVIOUS):
            path = self._folder / name
            try:
                if not path.is_file():
                    continue
                state = self._state(path)
            except OtherRunError:
                raise
            except (CheckpointError, OSError) as error:
                errors.append(error)
                continue
            for damage in errors:
                warnings.warn(f"{damage}; using the one before it", RuntimeWarning, stacklevel=2)
            self._written = time.monotonic()
            return state
        if errors:
            raise CheckpointError(str(errors[0])) from errors[0]
        return None

    def _replace(self, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(_TEMPORARY.format("[0-9a-f]" * 32)):  # by a killed process
            left.unlink(missing_ok=True)
        temporary = self._folder / _TEMPORARY.format(uuid4().hex)
        newest = self._folder / NEWEST
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if newest.exists():
                newest.replace(self._folder / PREVIOUS)
            temporary.replace(newest)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(self._folder)

    def _state(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(text) if text is not None else None
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if not isinstance(header, dict) or not isinstance(header.get("identity"), dict):
            raise CheckpointError(f"{path} is no checkpoint that cgmq_fx wrote")
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {header.get('format')!r}, this version reads {FORMAT}"
            )
        found = difference(self._identity, header["identity"])
        if found is not None:
            raise OtherRunError(
                f"{path} is a checkpoint of another run: {found}; pass what it was made with, "
                "or another folder"
            )
        state = unpack(header.get("state"), tensors)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no state")
        return state


def _flush(folder: Path) -> None:
    """Make renames durable, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
