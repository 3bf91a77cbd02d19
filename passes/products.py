"""Ops written with those that the tables know: one function per op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ATEN = torch.ops.aten
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y_o = sum_ij x_i W_oij z_j`: a linear layer over i, then a product with z over j."""
    outputs, inner, other = weight.shape
    flat = weight.transpose(1, 2).reshape(outputs * other, inner)
    rows = F.linear(first, flat).unflatten(-1, (outputs, other))
    result = torch.matmul(rows, second.unsqueeze(-1)).squeeze(-1)
    return result if bias is None else result + bias


def _inner(first: Tensor, second: Tensor) -> Tensor:
    if first.dim() == 0 or second.dim() == 0:
        return first * second
    if second.dim() == 1:
        return torch.matmul(first, second)
    rows = F.linear(first, second.reshape(-1, second.shape[-1]))
    return rows.reshape(*first.shape[:-1], *second.shape[:-1])


def _vecdot(first: Tensor, second: Tensor, dim: int = -1) -> Tensor:
    first, second = (x.movedim(dim, -1) for x in torch.broadcast_tensors(first, second))
    return torch.matmul(first.unsqueeze(-2), second.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def _outer(first: Tensor, second: Tensor) -> Tensor:
    return first.unsqueeze(-1) * second


def _added(base: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """What runtimes without an op for it execute: scaled where that changes anything, added."""
    scaled = product if alpha == 1 else product * alpha
    if beta == 0:
        return scaled
    return (base if beta == 1 else base * beta) + scaled


def _addr(
    base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return _added(base, _outer(first, second), beta, alpha)


def _addmv(
    base: Tensor, matrix: Tensor, vector: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return _added(base, torch.matmul(matrix, vector), beta, alpha)


def _addbmm(
    base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return _added(base, torch.bmm(first, second).sum(0), beta, alpha)


def _baddbmm(
    base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return _added(base, torch.bmm(first, second), beta, alpha)


def _conv_tbc(inputs: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Time, batch, channels; weight (kernel, in, out)."""
    image = F.conv1d(inputs.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad)
    return image.permute(2, 0, 1)


def _convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """What every convolution is once a program has been decomposed."""
    place, sizes = weight.dim() - 3, (stride, padding)
    function: Callable[..., Tensor] = (_CONV_TRANSPOSE if transposed else _CONV)[place]
    rest = (output_padding, groups, dilation) if transposed else (dilation, groups)
    return function(inputs, weight, bias, *sizes, *rest)


def _batch_norm(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What batch norm is once a program has been decomposed; the statistics it gives are empty."""
    output = F.batch_norm(inputs, mean, variance, weight, bias, False, momentum, eps)
    return output, inputs.new_empty(0), inputs.new_empty(0)


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.bilinear.default: _bilinear,
    _ATEN.mv.default: torch.matmul,
    _ATEN.dot.default: torch.matmul,
    _ATEN.vdot.default: torch.matmul,
    _ATEN.linalg_matmul.default: torch.matmul,
    _ATEN.linalg_vecdot.default: _vecdot,
    _ATEN.inner.default: _inner,
    _ATEN.outer.default: _outer,
    _ATEN.ger.default: _outer,
    _ATEN.addr.default: _addr,
    _ATEN.addmv.default: _addmv,
    _ATEN.addbmm.default: _addbmm,
    _ATEN.baddbmm.default: _baddbmm,
    _ATEN.conv_tbc.default: _conv_tbc,
    _ATEN.convolution.default: _convolution,
    _ATEN._native_batch_norm_legit_no_training.default: _batch_norm,
}
