"""The CPU kernel of `fake_quantize.cpp`: built where it first pays, cached from then on.

The source has a plain C interface and is called through ctypes, so building takes a C++ compiler
and a few seconds, and no headers of PyTorch. The choice between it and the reference depends on the
tensor alone, so that a run repeats exactly. Without a compiler the reference does everything; the
log says so once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.passes.grid import BITS_DTYPE
from cgmq_fx.passes.placement import like, nested, per_range, places

logger = logging.getLogger(__name__)

SMALLEST = 4096
"""Elements from which the native kernel is used; below, calls cost more than arithmetic."""

SWITCH = "CGMQ_FX_NATIVE"
"""Environment variable; "0" keeps this module from building or loading anything."""

_FILES = ("fake_quantize.cpp", "fake_quantize.h", "vectors.h", "walk.h")
_SOURCES = [Path(__file__).with_name(name) for name in _FILES]
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
_TIMEOUT = 300

_lock = threading.Lock()


@lru_cache(maxsize=4096)
def _shape(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    limit: tuple[int, ...],
    bits: tuple[int, ...],
) -> ctypes.Array[ctypes.c_int64] | None:
    """The `Shape` of `fake_quantize.cpp`, or None if the kernel cannot walk the tensors."""
    ranges, gates = places(shape, strides, limit), places(shape, strides, bits)
    if ranges is None or gates is None or not nested(ranges, gates):
        return None
    size = 1
    for n in shape:
        size *= n
    return (ctypes.c_int64 * 5)(size, *ranges, *gates)


def forward(x: Tensor, limit: Tensor, bits: Tensor, signed: bool) -> Tensor | None:
    """`fake_quantize` of `kernel.py`, or None where the reference has to do it."""
    if not _taken(x):
        return None
    y = torch.empty_like(x)
    shape = _shape(x.shape, y.stride(), limit.shape, bits.shape)
    if shape is None or (library := _library()) is None:
        return None
    x, limit, bits = like(x, y), _limit(limit, x), _as(bits, BITS_DTYPE)
    library.cgmq_forward(
        _DTYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        limit.data_ptr(),
        bits.data_ptr(),
        signed,
        shape,
        torch.get_num_threads(),
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`fake_quantize_backward` of `kernel.py` with the statistic `CHANGE` if `adjacent` is given.

    Returns:
        Gradients of the tensor, the range and the gates, or None where the reference has to do it.
    """
    if not _taken(x) or grad.dtype != x.dtype:
        return None
    out = torch.empty_like(x)
    shape = _shape(x.shape, out.stride(), limit.shape, bits.shape)
    if shape is None or (library := _library()) is None:
        return None
    grad, x = like(grad, out), like(x, out)
    beta, widths = _limit(limit, x), _as(bits, BITS_DTYPE)
    neighbours = None if adjacent is None else _as(adjacent, torch.int32)
    range_grad = torch.empty(limit.shape, dtype=beta.dtype)
    rows = 0 if adjacent is None else 1
    reported = torch.empty((rows, *bits.shape), dtype=beta.dtype)
    library.cgmq_backward(
        _DTYPES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        beta.data_ptr(),
        widths.data_ptr(),
        None if neighbours is None else neighbours.data_ptr(),
        signed,
        shape,
        per_range(x, limit, batched),
        range_grad.data_ptr(),
        reported.data_ptr(),
        torch.get_num_threads(),
    )
    return out, _as(range_grad, limit.dtype), _as(reported, limit.dtype)


def _taken(x: Tensor) -> bool:
    return x.numel() >= SMALLEST and x.dtype in _DTYPES and x.device.type == "cpu"


def _limit(limit: Tensor, x: Tensor) -> Tensor:
    return _as(limit, torch.float64 if x.dtype is torch.float64 else torch.float32)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` contiguous in `dtype`: itself mostly, which costs no call."""
    return t if t.dtype is dtype and t.is_contiguous() else t.detach().to(dtype).contiguous()


def _library() -> Any:
    """The loaded library, or None if there is none."""
    with _lock:
        return _loaded()


@lru_cache(maxsize=1)
def _loaded() -> Any:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _built()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "fake quantization falls back to plain PyTorch operators, which are slower: %s",
            _reason(error),
        )
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed: {error.stderr.strip()[-500:]}"
    return str(error)


def _built() -> ctypes.CDLL:
    compiler = _compiler()
    flags = (*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    try:
        return _load(_cached(compiler, (*flags, "-fopenmp")))
    except (OSError, subprocess.CalledProcessError):
        # OpenMP is not that of PyTorch, or there is none: on one thread, then.
        return _load(_cached(compiler, flags))


def _compiler() -> str:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    for name in names:
        if name and os.name == "posix" and (found := shutil.which(name)):
            return found
    raise OSError("there is no C++ compiler; the environment variable CXX can name one")


def _cached(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library built with `flags`, from the cache if it is there."""
    sources = [source.read_text() for source in _SOURCES]
    parts = (*sources, platform.machine(), platform.system(), *flags)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _folder() / f"fake_quantize-{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _build(compiler, flags, Path(work))
            os.replace(Path(work) / "built.so", target)  # noqa: PTH105  # atomic, also for others
    return target


def _build(compiler: str, flags: tuple[str, ...], work: Path) -> None:
    # Linked without -fopenmp: its symbols are to be found in PyTorch's own runtime, whose threads
    # this kernel shares; a second runtime would fight for the same cores.
    shared = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
    for command in (
        (compiler, *flags, "-c", str(_SOURCES[0]), "-o", "built.o"),
        (compiler, "-shared", *shared, "built.o", "-o", "built.so"),
    ):
        subprocess.run(
            command, cwd=work, check=True, capture_output=True, text=True, timeout=_TIMEOUT
        )


@lru_cache(maxsize=1)
def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "cgmq_fx"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="cgmq_fx-"))


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    forward, backward = library.cgmq_forward, library.cgmq_backward
    forward.argtypes = (number, *[pointer] * 4, number, pointer, number)
    backward.argtypes = (number, *[pointer] * 6, number, pointer, real, pointer, pointer, number)
    forward.restype = backward.restype = None
    return library
