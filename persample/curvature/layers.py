"""Layers as matrix products, ``output token = W [input token, 1]``: which calls are of that form, and their tokens.

======================  ===========================================================  ==================
layer                   input token of output position ``t``                         matrix of weight
======================  ===========================================================  ==================
linear                  the features at ``t``                                        ``[O, I]``
convolution             the patch that ``t`` reads, ``[I kernel]``                   ``[O, I kernel]``
transposed convolution  the inputs that reach ``t``, each at the kernel offset that  ``[O, I kernel]``
                        it comes through, ``[I kernel]``
======================  ===========================================================  ==================

A weight shared over positions ``t`` is a linear layer on tokens, and both convolutions are such layers on unfolded
inputs; ``K`` groups are ``K`` layers side by side.  Several uses of a weight are further positions,
where they are added up in such a form: of a convolution those of one resolution, stride and padding.  Tokens come
from the factors that the hook engine finds (`Outer`, `Conv`), output gradients from whatever is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from ..calls import Call, Reached
from ..convolution import Geometry, windows
from ..factors import Conv, Factors, Outer
from ..refusals import parameters_of

# function: whether the weight is stored as [I, O, ...], and place and name of weight and bias
_FORMS: dict[Callable[..., Any], tuple[bool, tuple[int, str], tuple[int, str]]] = {
    F.linear: (False, (1, "weight"), (2, "bias")),
    torch.addmm: (True, (2, "mat2"), (0, "input")),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (False, (1, "weight"), (2, "bias"))),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (True, (1, "weight"), (2, "bias"))),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A weight as ``K`` matrices ``[O, I]``, with its bias (if it has one) as a last column."""

    weight: str
    shape: Size
    bias: str | None = None
    groups: int = 1
    transposed: bool = False

    @property
    def shapes(self) -> dict[str, Size]:
        """The parameters of the layer."""
        own = {self.weight: self.shape}
        return own if self.bias is None else {**own, self.bias: Size([self.outputs])}

    @property
    def outputs(self) -> int:
        """Output features, of all groups."""
        return self.groups * self.shape[1] if self.transposed else self.shape[0]

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """``[k, K, O, I]`` from ``{name: [k, *P]}``."""
        w = values[self.weight]
        w = w.reshape(len(w), self.groups, self.shape[0] // self.groups, -1, prod(self.shape[2:]))
        w = (w.transpose(2, 3) if self.transposed else w).flatten(3)
        if self.bias is None:
            return w
        return torch.cat([w, values[self.bias].reshape(*w.shape[:3], 1)], 3)

    def parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """``{name: [k, *P]}`` from ``[k, K, O, I]``."""
        k = len(matrix)
        weight, bias = (matrix, None) if self.bias is None else (matrix[..., :-1], matrix[..., -1])
        w = weight.reshape(*weight.shape[:3], -1, prod(self.shape[2:]))
        w = (w.transpose(2, 3) if self.transposed else w).reshape(k, *self.shape)
        return (
            {self.weight: w} if bias is None or self.bias is None else {self.weight: w, self.bias: bias.reshape(k, -1)}
        )

    def tokens(self, g: Factors) -> tuple[Tensor, Tensor] | None:
        """Inputs ``[N, K, T, I]`` (a one for the bias) and output gradients ``[N, K, T, O]``, if ``g`` has such."""
        match g:
            case Outer(left, right) if left.shape[1] == self.groups:
                inputs, grads = (left, right) if self.transposed else (right, left)
            case Conv(input, grad):
                unfold, x, d = (reaching, grad, input) if self.transposed else (windows, input, grad)
                positions = tuple(d.shape[2:])
                sides = (unfold(x, positions, g.geometry), d)  # [N, K I, kernel, T], or more dims of each
                inputs, grads = (y.reshape(len(y), self.groups, -1, prod(positions)).mT for y in sides)
            case _:
                return None
        return inputs if self.bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], 3), grads


# ---- unfolded inputs ----------------------------------------------------------------------------------------------


def reaching(x: Tensor, positions: Sequence[int], geo: Geometry) -> Tensor:
    """``[N, C, kernel, T]``: what of ``x [N, C, *S]`` reaches each output position of a transposed convolution."""
    inner = tuple(slice(low, low + length) for low, length in zip(geo.padding, positions, strict=True))
    size = [max(r, i.stop) for r, i in zip(geo.reach(tuple(x.shape[2:])), inner, strict=True)]
    every, found = (slice(None), slice(None)), []
    for offset in product(*map(range, geo.kernel)):
        sides = zip(offset, geo.dilation, geo.stride, x.shape[2:], strict=True)
        spread = x.new_zeros(*x.shape[:2], *size)
        spread[(*every, *(slice(a * e, a * e + (p - 1) * s + 1, s) for a, e, s, p in sides))] = x
        found.append(spread[(*every, *inner)].flatten(2))
    return torch.stack(found, 2)


# ---- which parameters are layers ----------------------------------------------------------------------------------


def find_layers(found: Reached, parameters: Mapping[str, Tensor]) -> tuple[list[Layer], dict[str, str]]:
    """The layers among the chosen parameters, and why the other parameters are none."""
    roles: dict[str, set[Layer | str]] = {name: set() for name in parameters}
    names = {id(p): name for name, p in parameters.items()}
    for call in found.calls:
        for p in parameters_of(Reached(calls=[call])):
            if id(p) in names:
                roles[names[id(p)]].add(_role(call, p, names))
    layers, why = list[Layer](), dict[str, str]()
    for name, own in roles.items():
        layer = next(iter(own)) if len(own) == 1 else None
        if not isinstance(layer, Layer):
            why[name] = _reason(own)
        elif any(roles[other] != own for other in layer.shapes):
            why[name] = "it shares a layer with a parameter that is used elsewhere too"
        elif layer.weight == name:
            layers.append(layer)
    return layers, why


UNUSED = "no loss depends on it"


def _reason(roles: set[Layer | str]) -> str:
    if not roles:
        return UNUSED
    said = [role for role in roles if isinstance(role, str)]
    return said[0] if said else "it is used in different ways, or with different biases"


def _role(call: Call, p: Tensor, names: Mapping[int, str]) -> Layer | str:
    """The layer whose weight or bias ``p`` is in this call, or why it isn't one."""
    if call.func not in _FORMS:
        return f"it is used by {call.name}"
    if not call.wants(p):
        return "it is not used itself, but something computed from it"
    if p.is_complex():
        return "it is complex, and what mixes real and imaginary parts is no Kronecker product of complex factors"
    transposed, *places = _FORMS[call.func]
    weight, bias = (_argument(call, *place) for place in places)
    if weight is p or bias is p:
        if weight is None or id(weight) not in names:
            return f"the weight of its layer ({call.name}) is not among the chosen parameters"
        if call.layout.owner is not None:
            return f"{call.name} gets entries that were picked out of the batch (a part of it, masked or packed tokens)"
        if weight.ndim == 1 or {call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)} != {1}:
            return f"{call.name} with these arguments is no layer on tokens"
        groups = _argument(call, 6, "groups") if weight.ndim > 2 else 1
        alone = Layer(names[id(weight)], weight.shape, None, groups or 1, transposed)
        if bias is None:
            return alone
        if bias.shape != (alone.outputs,):  # linear and addmm broadcast it: over features, or one for every position
            said = f"as the bias of {call.name} it has shape {tuple(bias.shape)}, not ({alone.outputs},)"
            return said if bias is p else alone
        return replace(alone, bias=names.get(id(bias)))
    return f"it is used by {call.name}, but not as its weight"


def _argument(call: Call, place: int, name: str) -> Any:
    return call.args[place] if place < len(call.args) else call.kwargs.get(name)
