"""Matrices of several batches as one: that of all their samples together, of a whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, KroneckerError
from .kronecker import Block, Kronecker
from .likelihood import wide
from .operator import Operator
from .products import Products

Matrix = TypeVar("Matrix", Operator, Kronecker)


def merge(parts: Iterable[Matrix]) -> Matrix:
    """The matrix of all samples, from those of batches: ``sum_b (N_b / N) M_b`` for ``reduction="mean"``, else their
    sum, ``[D, D]``.

    ``merge(ggn(model, loss_fn, x, y) for x, y in loader)``; batches may be of any sizes.  Exactly the matrix of one
    batch of all samples, where these don't act on each other and nothing is drawn (dropout, targets of "mc").

    Of operators (`hvp`, `ggn`, `fisher`, `empirical_fisher`), a product is one with each of them: their batches stay
    in memory, and parameters have to stay as they are.

    Of Kronecker factors (`kfac`, `kflr`), the factors are merged, ``A`` by the number of input tokens and ``G`` as said
    above: a generator has one batch in memory at a time.  So are those of `kfra`, which averages within each batch on
    its way, and of all samples at once would be another matrix.  Corrected eigenvalues (`ekfac`) belong to
    eigenvectors, which have to be the same for all batches: ::

        basis = merge(kfac(model, loss_fn, x, y) for x, y in loader)
        K = merge(ekfac(model, loss_fn, x, y, basis=basis) for x, y in loader)

    Raises:
        ArgumentError: nothing to merge; matrices of different kinds, parameters or reductions, also where a layer is in
            some of them only.
        KroneckerError: corrected eigenvalues for different eigenvectors, or biases that are apart in some of them only.
    """
    rest = iter([] if isinstance(parts, (Operator, Kronecker)) else parts)
    first = next(rest, None)
    if not isinstance(first, (Operator, Kronecker)):
        raise ArgumentError(
            "merge takes operators, or Kronecker factors, one after the other (hvp, ggn, fisher, empirical_fisher; "
            f"kfac, kflr, kfra, ekfac), as in merge(kfac(model, loss_fn, x, y) for x, y in loader); got "
            f"{type(parts).__name__ if first is None else f'a {type(first).__name__} first'}."
        )
    if isinstance(first, Operator):
        operators = [first]
        for part in rest:
            _check_alike(first, part)
            operators.append(part)
        return _summed(operators)
    for part in rest:
        _check_alike(first, part)
        first = _both(first, part)
    return first


def _check_alike(a: Operator | Kronecker, b: object) -> None:
    if not isinstance(b, type(a)) or b.title != a.title or [*b.shapes.items()] != [*a.shapes.items()]:
        kind = str(b) if isinstance(b, (Operator, Kronecker)) else type(b).__name__
        raise ArgumentError(
            f"only matrices of one kind, with one reduction and of the same parameters can be merged: got [{a}] "
            f"{list(a.shapes)[:8]}, and [{kind}] {list(getattr(b, 'shapes', ()))[:8]}."
        )


def _summed(parts: Sequence[Operator]) -> Operator:
    samples = sum(part.samples for part in parts)
    weights = [part.samples / samples if part.reduction == "mean" else 1.0 for part in parts]

    def apply(matrix: Tensor) -> Tensor:
        total = torch.zeros_like(wide(matrix))  # in half precision, the last of many batches would be lost
        for weight, part in zip(weights, parts, strict=True):
            total.add_(part.apply(matrix), alpha=weight)
        return total.to(matrix.dtype)

    return replace(parts[0], apply=Products(parts[0].title, apply), samples=samples)


def _both(a: Kronecker, b: Kronecker) -> Kronecker:
    pairs = [[matrix.blocks.get(name) for matrix in (a, b)] for name in a.shapes]
    if odd := [name for name, (x, y) in zip(a.shapes, pairs, strict=True) if (x and x.layer) != (y and y.layer)]:
        raise KroneckerError(
            f"parameter '{odd[0]}' is in another block in some of the batches: biases are joined to weights in all of "
            "them, or apart in all."
        )
    samples = a.samples + b.samples
    ours, theirs = (a.samples / samples, b.samples / samples) if a.reduction == "mean" else (1.0, 1.0)

    def weighted(x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x * ours, y, alpha=theirs)

    def joined(x: Block, y: Block) -> Block:
        if x.moments is not None and y.moments is not None:
            if x.inputs is not y.inputs or x.gradients is not y.gradients:
                raise KroneckerError(
                    f"the corrected eigenvalues of '{x.layer.weight}' belong to the eigenvectors of each batch. Merge "
                    "kfac(...) of all batches first, and give that as basis= to ekfac."
                )
            return replace(x, moments=weighted(x.moments, y.moments))
        tokens = x.tokens + y.tokens
        inputs, gradients = torch.lerp(x.inputs, y.inputs, y.tokens / tokens), weighted(x.gradients, y.gradients)
        return Block(x.layer, inputs, gradients, tokens=tokens)

    blocks = {name: joined(block, b.blocks[name]) for name, block in a.blocks.items()}
    return replace(a, blocks=blocks, uncovered={**b.uncovered, **a.uncovered}, samples=samples)
