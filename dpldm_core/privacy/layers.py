"""What each supported layer contributes to the gradient of a unit, from its input a and its output's gradient b.

A contribution knows the squared norm of its part of every unit's gradient, and the sum of these parts with a factor for
each unit. ``Outer``: the part is a sum of outer products over the unit's M rows (records, noise draws, tokens), so its
norm comes from M x M Gram matrices and no per-unit gradient is formed. ``Fields``: the same for a convolution, whose
rows are pixels and their receptive fields. ``Direct``: the per-unit gradient itself, where that is smaller than the
Gram matrices: vectors, and weights that many pixels share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from dpldm_core.errors import UnsupportedLayerError

ROUNDING = 1e-5  # relative to (sum_m |a_m| |b_m|)^2, above float32's error for up to 10^4 terms
# Relative to sum_m |a_m| |b_m|: bfloat16 rounds each factor of a product by at most 2^-8. Float32's is in ROUNDING.
PRODUCT_ERROR = {"float32": 0.0, "bfloat16": (1 + 2.0**-8) ** 2 - 1}

_CHUNK = 32  # images whose receptive fields are copied at a time: they stay in the cache
_MOVE = 10  # products in the time that one number takes to be copied or added
_CACHED = 2**18  # entries of Gram matrices that are formed at a time, for the same reason


@dataclass
class Outer:
    """A weight [out, in] whose gradient is sum_m b_m (outer) a_m, and a bias [out] whose gradient is sum_m b_m."""

    a: Tensor  # [units, M, in]
    b: Tensor  # [units, M, out]
    weight: Tensor
    bias: Tensor | None

    def squared_norms(self, product_error: float) -> Tensor:
        """Upper bound on the squared norm of each unit's part as the sum will see it, [units].

        When a unit's rows cancel, rounding is large beside what is left of them; the bound carries that error.

        Args:
            product_error: Relative error of the products in :meth:`weighted_sums`, from PRODUCT_ERROR.
        """
        a, b, bias = self.a, self.b, float(self.bias is not None)  # a bias is a weight whose input is always one
        if a.shape[1] == 1:
            squared = (torch.linalg.vector_norm(a, dim=2).square_() + bias) * torch.linalg.vector_norm(
                b, dim=2
            ).square_()
            return squared[:, 0] * ((1 + ROUNDING) * (1 + product_error) ** 2)
        return _squared_norms((a @ a.transpose(1, 2) + bias) * (b @ b.transpose(1, 2)), product_error)

    def drop(self, keep: Tensor) -> None:
        """Remove the rows of units that are not kept, bool [units]: 0 times NaN would be NaN."""
        self.a = torch.where(keep[:, None, None], self.a, 0.0)
        self.b = torch.where(keep[:, None, None], self.b, 0.0)

    def weighted_sums(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, sum over units of factor times the unit's part)."""
        a, b, each = self.a, self.b, factors[:, None, None]
        a, b = (a * each, b) if a.shape[2] < b.shape[2] else (a, b * each)  # the smaller one is copied
        yield self.weight, (b.flatten(0, 1).T @ a.flatten(0, 1)).reshape(self.weight.shape)
        if self.bias is not None:
            yield self.bias, factors @ self.b.sum(1)


@dataclass
class Direct:
    """The per-unit gradient of a parameter. Norm and sum read the same numbers: nothing is lost where rows cancel."""

    gradient: Tensor  # [units, size of the parameter]
    parameter: Tensor

    def squared_norms(self, product_error: float) -> Tensor:
        """Upper bound on the squared norm of each unit's part, [units]; see :meth:`Outer.squared_norms`."""
        squared = torch.linalg.vector_norm(self.gradient, dim=1).square_()
        return squared * ((1 + ROUNDING) * (1 + product_error) ** 2)

    def drop(self, keep: Tensor) -> None:
        """Remove the parts of units that are not kept, bool [units]."""
        self.gradient = torch.where(keep[:, None], self.gradient, 0.0)

    def weighted_sums(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, sum over units of factor times the unit's part)."""
        yield self.parameter, (factors @ self.gradient).reshape(self.parameter.shape)


@dataclass
class Fields:
    """The weight and bias of a convolution: as Outer, with b_m an output pixel and a_m the field of inputs it sees.

    Two fields share their offsets, so their product is a sum over the kernel of products of input pixels: the Gram
    matrix of the fields, which are never copied out, is a sum of shifted parts of that of the pixels.
    """

    layer: nn.Conv2d
    a: Tensor  # [images, channels, height, width]; those of one unit are consecutive
    b: Tensor  # [images, out channels, rows, columns]
    units: int

    def squared_norms(self, product_error: float) -> Tensor:
        """Upper bound on the squared norm of each unit's part, [units]; see :meth:`Outer.squared_norms`."""
        images = len(self.a) // self.units
        entries = (images * max(self.a[0, 0].numel(), self.b[0, 0].numel())) ** 2
        chunk = max(1, _CACHED // entries) * images
        pairs = zip(self.a.split(chunk), self.b.split(chunk), strict=True)
        return torch.cat([self._bounds(a, b, images, product_error) for a, b in pairs])

    def _bounds(self, a: Tensor, b: Tensor, images: int, product_error: float) -> Tensor:
        fields = _pixel_gram(a, images)  # [units, y, x, image, y, x, image]
        for axis in (1, 0):
            fields = _sum_of_shifts(fields, axis, b.shape[2 + axis], list(_offsets(self.layer, a, b, axis)))
        if _trainable(self.layer.bias) is not None:
            fields += 1.0  # a bias is a weight whose input is always one
        rows = math.prod(fields.shape[1:4])
        return _squared_norms(fields.mul_(_pixel_gram(b, images)).view(-1, rows, rows), product_error)

    def drop(self, keep: Tensor) -> None:
        """Remove the images of units that are not kept, bool [units]."""
        keep = keep.repeat_interleave(len(self.a) // self.units)[:, None, None, None]
        self.a, self.b = torch.where(keep, self.a, 0.0), torch.where(keep, self.b, 0.0)

    def weighted_sums(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, sum over units of factor times the unit's part)."""
        layer, b = self.layer, self.b * factors.repeat_interleave(len(self.a) // self.units)[:, None, None, None]
        yield (
            layer.weight,
            conv2d_weight(self.a, layer.weight.shape, b, stride=layer.stride, padding=layer.padding),
        )
        if (bias := _trainable(layer.bias)) is not None:
            yield bias, b.sum((0, 2, 3))


Contribution = Outer | Fields | Direct


def _squared_norms(products: Tensor, product_error: float) -> Tensor:
    """Bounds from the products <a_m, a_n> <b_m, b_n> of a unit's rows, [units, M, M], to [units]."""
    before_cancelling = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)
    squared = products.sum((1, 2)).clamp_(min=0) + ROUNDING * before_cancelling.square()
    return (squared.sqrt_() + product_error * before_cancelling).square_() if product_error else squared


def _pixel_gram(x: Tensor, images: int) -> Tensor:
    """Products of all pixels of a unit's images [n, c, h, w], as [units, h, w, images, h, w, images]."""
    rows = x.unflatten(0, (-1, images)).permute(0, 2, 3, 4, 1)  # [units, c, h, w, images]
    flat = rows.flatten(2)
    return torch.bmm(flat.transpose(1, 2), flat).view(len(flat), *rows.shape[2:], *rows.shape[2:])


def _sum_of_shifts(gram: Tensor, axis: int, size: int, offsets: list[tuple[slice, slice]]) -> Tensor:
    """Sum over a kernel's places along one axis of the products that two output pixels of ``size`` find there."""
    shape = list(gram.shape)
    shape[1 + axis] = shape[4 + axis] = size
    everything: list[slice] = [slice(None)] * gram.ndim
    total = None
    for inner, outer in sorted(offsets, key=lambda found: found[1].start - found[1].stop):  # the widest first
        read, written = list(everything), list(everything)
        read[1 + axis] = read[4 + axis] = inner
        written[1 + axis] = written[4 + axis] = outer
        if total is None and outer == slice(0, size):
            total = gram[tuple(read)].clone(memory_format=torch.contiguous_format)
            continue
        total = gram.new_zeros(shape) if total is None else total
        total[tuple(written)] += gram[tuple(read)]
    return gram.new_zeros(shape) if total is None else total


def _offsets(layer: nn.Conv2d, a: Tensor, b: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """For each place of a kernel along an axis: the input pixels it reads, and the output pixels it reads them for."""
    assert not isinstance(layer.padding, str)  # refused by _check_conv
    stride, padding, size = layer.stride[axis], layer.padding[axis], a.shape[2 + axis]
    for place in range(layer.kernel_size[axis]):
        shift = place - padding
        first = max(0, -(shift // stride))  # smallest output pixel whose input pixel is not padding
        last = min(b.shape[2 + axis] - 1, (size - 1 - shift) // stride)
        if first <= last:
            yield slice(first * stride + shift, last * stride + shift + 1, stride), slice(first, last + 1)


def contributions(layer: nn.Module, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    """The parts of every unit's gradient that belong to the layer's trainable parameters.

    Args:
        layer: A supported layer.
        a: Its input; rows of one unit are consecutive in the first axis.
        b: Gradient of the summed loss with respect to its output.
        units: Units in the batch.
    """
    return _SUPPORTED[type(layer)][1](layer, a, b, units)


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse layers, and settings of known layers, whose per-unit gradient is not the one computed here.

    Raises:
        UnsupportedLayerError: Names the layer, says why, and what to use instead.
    """
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        reason = "it mixes records; use GroupNorm or LayerNorm"
    elif type(layer) not in _SUPPORTED:
        reason = f"use {', '.join(kind.__name__ for kind in _SUPPORTED)} for trainable weights"
    else:
        reason = _SUPPORTED[type(layer)][0](layer)
    if reason:
        raise UnsupportedLayerError(f"{name or 'the model'} is {type(layer).__name__}: {reason}")


def _trainable(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is not None and parameter.requires_grad else None


def _linear(layer: nn.Linear, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    a, b = a.reshape(units, -1, layer.in_features), b.reshape(units, -1, layer.out_features)
    bias = _trainable(layer.bias)
    if a.shape[1] * (a.shape[2] + b.shape[2]) <= a.shape[2] * b.shape[2] or a.shape[1] == 1:
        return [Outer(a, b, layer.weight, bias)]
    found: list[Contribution] = [Direct((b.transpose(1, 2) @ a).flatten(1), layer.weight)]
    return [*found, Direct(b.sum(1), bias)] if bias is not None else found


def _patches(x: Tensor, layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """Receptive fields of a convolution as a strided view, [n, c, kh, kw, rows, columns]; no F.unfold."""
    assert not isinstance(layer.padding, str)  # refused by _check_conv
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    return F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw).permute(0, 1, 4, 5, 2, 3)


def _conv(layer: nn.Conv2d, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    """The sum over output pixels of their gradient times their receptive field."""
    rows = len(b) // units * max(a[0, 0].numel(), b[0, 0].numel())
    gram = rows * (a.shape[1] + b.shape[1] + 2 * _MOVE)  # per row: products, and entries that are shifted and added
    direct = layer.weight.numel() + layer.weight[0].numel() * _MOVE  # products, and a receptive field that is copied
    if _trainable(layer.weight) is not None and gram <= direct:
        return [Fields(layer, a, b, units)]
    return _convolution(layer, b, a, b, units)


def _conv_transpose(layer: nn.ConvTranspose2d, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    """The adjoint: the sum over input pixels of their value times the gradients of the output pixels they reach."""
    return _convolution(layer, a, b, b, units)


def _convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, pixels: Tensor, fields: Tensor, b: Tensor, units: int
) -> list[Contribution]:
    """Per-unit gradients: pixels [n, ., height, width] times their receptive fields in the other side's image."""
    images = len(pixels) // units  # of one unit: its records and their noise draws
    height, width = pixels.shape[2:]
    gradient = pixels.new_empty(units, pixels.shape[1], layer.weight[0].numel())
    step = max(1, _CHUNK // images)
    for start in range(0, units, step):
        rows = slice(start * images, (start + step) * images)
        found = _patches(fields[rows], layer)[..., :height, :width]  # [rows, c, kh, kw, height, width]
        found = found.unflatten(0, (-1, images)).movedim(1, 4).reshape(-1, gradient.shape[2], images * height * width)
        values = pixels[rows].unflatten(0, (-1, images)).movedim(1, 2).reshape(len(found), -1, found.shape[2])
        torch.bmm(values, found.transpose(1, 2), out=gradient[start : start + step])
    parts: list[Contribution] = [Direct(gradient.flatten(1), layer.weight)]
    if (bias := _trainable(layer.bias)) is not None:
        parts.append(Direct(b.sum((2, 3)).view(units, images, -1).sum(1), bias))
    return parts


def _embedding(layer: nn.Embedding, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    """The weight is [num, dim]: the one-hot index plays b, the output's gradient plays a."""
    one_hot = F.one_hot(a.reshape(units, -1), layer.num_embeddings).to(b.dtype)
    return [Outer(b.reshape(units, -1, layer.embedding_dim), one_hot, layer.weight, None)]


def _layer_norm(layer: nn.LayerNorm, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    return _affine(layer, F.layer_norm(a, layer.normalized_shape, eps=layer.eps), b, units, layer.weight.numel())


def _group_norm(layer: nn.GroupNorm, a: Tensor, b: Tensor, units: int) -> list[Contribution]:
    normed = F.group_norm(a, layer.num_groups, eps=layer.eps)
    return _affine(layer, normed.movedim(1, -1), b.movedim(1, -1), units, layer.num_channels)


def _affine(layer: nn.LayerNorm | nn.GroupNorm, normed: Tensor, b: Tensor, units: int, size: int) -> list[Contribution]:
    """Y = weight x + bias on the last axes: gradients are sums over all other positions of the unit."""
    x, rows = normed.reshape(units, -1, size), b.reshape(units, -1, size)
    parts = ((x * rows).sum(1), _trainable(layer.weight)), (rows.sum(1), _trainable(layer.bias))
    return [Direct(gradient, parameter) for gradient, parameter in parts if parameter is not None]


def _check_conv(layer: nn.Conv2d | nn.ConvTranspose2d) -> str:
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return (
        ""
        if plain and not isinstance(layer.padding, str)
        else "only groups=1, dilation=1 and numeric zero padding are bounded"
    )


def _check_embedding(layer: nn.Embedding) -> str:
    changed = layer.max_norm is not None or layer.scale_grad_by_freq or layer.padding_idx is not None or layer.sparse
    return "max_norm, padding_idx, sparse and scale_grad_by_freq change gradients across records" if changed else ""


def _always(layer: nn.Module) -> str:
    return ""


_SUPPORTED: dict[type[nn.Module], tuple[Callable[..., str], Callable[..., list[Contribution]]]] = {
    nn.Linear: (_always, _linear),
    nn.Conv2d: (_check_conv, _conv),
    nn.ConvTranspose2d: (_check_conv, _conv_transpose),
    nn.GroupNorm: (_always, _group_norm),
    nn.LayerNorm: (_always, _layer_norm),
    nn.Embedding: (_check_embedding, _embedding),
}
