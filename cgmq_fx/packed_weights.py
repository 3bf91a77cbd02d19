"""Packing: a weight as the codes of its gates, each in as many bits as its gate has.

The elements at one bit-width stand together, in the order of the tensor, the narrowest first; each
run ends at a byte. Codes are shifted so that the lowest is 0; elements at 32 bits are float32;
those at 0 bits take no room. What is unpacked are the values that the quantizer rounds to, so a
model computes the same with them to the last bit.

Where gates are many, which of them has which width is itself information. It is deflated, and with
one gate per element so are the codes, where that is smaller.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.passes.grid import BITS_DTYPE, PASS_THROUGH, grid
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import set_tensor, tensor_at

Bytes: TypeAlias = npt.NDArray[np.uint8]
Entries: TypeAlias = dict[str, dict[str, Any]]

_MOST_PER_BYTE = 4096
"""Elements that a byte of a file may stand for: pruned ones take none."""

_FLOOR = 1 << 20
_RAW = -15
"""Deflated data without a header."""


def pack_bits(codes: npt.NDArray[np.int64], width: int) -> Bytes:
    """Numbers from 0 to 2^width - 1, `width` bits each, the lowest bit first.

    Args:
        codes: Shape (count,).
        width: Bits of each, 1 to 16.
    """
    bits = (codes[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little")


def unpack_bits(data: Bytes, count: int, width: int) -> npt.NDArray[np.int64]:
    """The inverse of `pack_bits`."""
    bits = np.unpackbits(data, bitorder="little", count=count * width)
    weights = 1 << np.arange(width, dtype=np.int64)
    found: npt.NDArray[np.int64] = bits.reshape(count, width).astype(np.int64) @ weights
    return found


def pack_weights(module: GraphModule) -> tuple[dict[str, Tensor], Entries]:
    """The weights of a frozen graph, packed.

    Args:
        module: The graph.

    Returns:
        Bytes by the name of the weight, and what is needed to unpack them. Weights that something
        other than their quantizer reads are not among them.
    """
    tensors: dict[str, Tensor] = {}
    entries: Entries = {}
    for name, path in _packable(module):
        weight, quantizer = tensor_at(module, name), module.get_submodule(path)
        if weight is None or not isinstance(quantizer, Quantizer):
            continue
        codes, deflated = _pack(weight.detach().cpu(), quantizer), []
        gates = quantizer.bits.detach().cpu().reshape(-1)
        rows = {name: codes} if gates.numel() == weight.numel() else {}
        if gates.numel() > 1:
            widths = torch.tensor(quantizer.spec.bit_widths, dtype=BITS_DTYPE)
            indices = torch.searchsorted(widths, gates).numpy().astype(np.int64)
            rows[f"{path}.bits"] = pack_bits(indices, _index_bits(len(widths)))
        tensors[name] = torch.from_numpy(codes)
        for key, data in rows.items():
            small = _deflated(data)
            deflated += [key] if small.size < data.size else []
            tensors[key] = torch.from_numpy(min(data, small, key=len))
        entries[name] = {"quantizer": path, "shape": list(weight.shape), "deflated": deflated}
    return tensors, entries


def _deflated(data: Bytes) -> Bytes:
    found = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, strategy)
        found.append(packer.compress(data.tobytes()) + packer.flush())
    return np.frombuffer(min(found, key=len), np.uint8).copy()


def _inflated(tensor: Tensor, entry: Mapping[str, Any], key: str, size: int) -> Bytes:
    """The bytes of a packed tensor, at most `size` and one: more is an error of the caller's."""
    data = _bytes(tensor)
    if key not in entry.get("deflated", ()):
        return data
    try:
        found = zlib.decompressobj(_RAW).decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise ArtifactError(f"{key} is damaged: {error}") from error
    return np.frombuffer(found, np.uint8)


def unpack_gates(
    tensors: Mapping[str, Tensor], entries: Entries, modules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Put the bit-widths of packed weights back, and room for the weights themselves.

    Args:
        tensors: What the file holds.
        entries: What `pack_weights` said.
        modules: The quantizers as the file describes them.

    Raises:
        ArtifactError: If the sizes do not fit.
    """
    restored = dict(tensors)
    for name, entry in entries.items():
        shape = [int(size) for size in entry["shape"]]
        room = _FLOOR + _MOST_PER_BYTE * tensors[name].numel()
        if min(shape, default=1) < 0 or prod(shape) > room:
            raise ArtifactError(f"{name} of shape {shape} is too large for its bytes")
        restored[name] = torch.zeros(shape, dtype=torch.float32)
        path = f"{entry['quantizer']}.bits"
        widths = torch.tensor(modules[entry["quantizer"]]["bit_widths"], dtype=BITS_DTYPE)
        gates = [int(size) for size in modules[entry["quantizer"]]["gate_shape"]]
        if prod(gates) <= 1:
            continue
        if min(gates) < 1 or prod(gates) > prod(shape):
            raise ArtifactError(f"{path} has no room for gates of shape {gates}")
        each = _index_bits(len(widths))
        size = -(-prod(gates) * each // 8)
        packed = _inflated(tensors[path], entry, path, size)
        if packed.size != size:
            raise ArtifactError(f"{path} has no room for gates of shape {gates}")
        indices = unpack_bits(packed, prod(gates), each)
        if int(indices.max()) >= len(widths):
            raise ArtifactError(f"{path} holds bit-widths that there are not")
        restored[path] = widths[torch.from_numpy(indices)].reshape(gates)
    return restored


def unpack_weights(module: GraphModule, tensors: Mapping[str, Tensor], entries: Entries) -> None:
    """Fill the weights of a graph whose quantizers are in place.

    Raises:
        ArtifactError: If bytes are missing or left over.
    """
    for name, entry in entries.items():
        quantizer = module.get_submodule(entry["quantizer"])
        weight = tensor_at(module, name)
        if not isinstance(quantizer, Quantizer) or weight is None:
            raise ArtifactError(f"{name} has no quantizer")
        data = _inflated(tensors[name], entry, name, 4 * weight.numel())  # 32 bits at most
        values = _unpack(data, quantizer, tuple(weight.shape), name)
        trained = isinstance(weight, nn.Parameter)
        set_tensor(module, name, nn.Parameter(values) if trained else values)


def _packable(module: GraphModule) -> Iterator[tuple[str, str]]:
    """Names of weights that only one quantizer reads, and its path."""
    for node in module.graph.nodes:
        owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(owner, Quantizer) or not isinstance(source, Node):
            continue
        tensor = tensor_at(module, source.target) if source.op == "get_attr" else None
        if tensor is not None and tensor.dtype == torch.float32 and set(source.users) == {node}:
            yield str(source.target), str(node.target)


def _index_bits(widths: int) -> int:
    """Bits of an index: 1, 2, 4 or 8, so that none of them stands in two bytes."""
    needed = max((widths - 1).bit_length(), 1)
    return next(size for size in (1, 2, 4, 8, 16) if needed <= size)


def _bytes(tensor: Tensor) -> Bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ArtifactError("a packed tensor is no row of bytes")
    return tensor.numpy()


def _grid_of(quantizer: Quantizer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step, lowest and highest code, and bits of every element."""
    bits = quantizer.bits.cpu()
    step, low, high = grid(quantizer.limit.detach().cpu(), bits, quantizer.signed)
    rows = [t.expand(shape).reshape(-1) for t in (step, low, high, bits)]
    return rows[0], rows[1], rows[2], rows[3]


def _pack(weight: Tensor, quantizer: Quantizer) -> Bytes:
    step, low, high, bits = _grid_of(quantizer, tuple(weight.shape))
    flat, parts = weight.reshape(-1), []
    for width in bits.unique().tolist():
        own = bits == width
        if width == PASS_THROUGH:
            parts.append(flat[own].numpy().view(np.uint8))
        elif width:
            codes = (flat[own] / step[own]).round().maximum(low[own]).minimum(high[own])
            parts.append(pack_bits((codes - low[own]).numpy().astype(np.int64), width))
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def _unpack(data: Bytes, quantizer: Quantizer, shape: tuple[int, ...], name: str) -> Tensor:
    step, low, _, bits = _grid_of(quantizer, shape)
    values, start = torch.zeros(prod(shape), dtype=torch.float32), 0
    for width in bits.unique().tolist():
        own = bits == width
        count = int(own.sum())
        end = start + (4 * count if width == PASS_THROUGH else -(-count * width // 8))
        part = data[start:end]
        if len(part) != end - start:
            raise ArtifactError(f"{name} has fewer bytes than its bit-widths need")
        if width == PASS_THROUGH:
            values[own] = torch.from_numpy(part.copy().view(np.float32))
        elif width:
            codes = torch.from_numpy(unpack_bits(part, count, width)).float() + low[own]
            values[own] = codes * step[own]
        start = end
    if start != len(data):
        raise ArtifactError(f"{name} has more bytes than its bit-widths need")
    return values.reshape(shape)
