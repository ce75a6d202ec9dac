"""TRAK: influence in the kernel of projected gradients of the margin, of one model or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..arguments import check_at_least
from ..errors import ArgumentError, LossError, QuantityError
from .features import both, check_finite

Several = Tensor | Sequence[Tensor]

# Singular values of features, in roundings of the largest: up to here they are nothing but rounding errors ...
NOISE = 4
# ... and from here on not.
SIGNAL = 32


def trak(train: Several, test: Several, residual: Several, *, damping: float = 0.0) -> Tensor:
    """``Q Phi (Phi^T Phi + damping I)^+ phi^T``, ``[n_train, n_test]``: TRAK.

    Park et al. 2023, "TRAK: attributing model behavior at scale", eq. 17.  ``Phi [n_train, k]`` and ``phi [n_test,
    k]`` are projected gradients of the `margin` (not of a loss), ``Q = diag(residual)`` with ``residual [n_train] = 1
    - p_i``, the probability that is missing from the correct class.  Lists are several models: both factors are
    averaged over them apart, as in the paper.

    The inverse is the pseudo-inverse, so that fewer samples than features (``n_train < k``) need no damping.  All is
    computed in float64: from the eigenvalues of ``Phi^T Phi`` (or ``Phi Phi^T``, the smaller), or where they span more
    than six decades, from the singular values of ``Phi``.  With ``eps`` the rounding unit of ``Phi``'s type (float64's
    with a damping, which takes ``Phi`` at its word), those up to ``4 eps`` of the largest count as 0; where some lie
    between ``4 eps`` and ``32 eps``, the rank can't be told, and that is an error.

    Raises:
        ArgumentError: ``damping`` is no number of 0 or more, or some are lists and others not (or of other lengths).
        QuantityError: what is given are no features, doesn't fit or isn't finite, or ``Phi`` has singular values at
            the edge of what its rounding errors allow.

    >>> from persample import gradients
    >>> from persample.attribution import Projection, margin, trak
    >>> model, R = torch.nn.Linear(4, 3), Projection(8)
    >>> x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    >>> G = gradients(model, margin, x, y)
    >>> trak(G.project(R), G.project(R), torch.sigmoid(-G.losses)).shape  # losses are the margins: 1 - p
    torch.Size([20, 20])
    """
    check_at_least(0, damping=damping)
    lists = [list(x) if isinstance(x, (Sequence, Iterator)) else [x] for x in (train, test, residual)]
    kinds = {isinstance(x, (Sequence, Iterator)) for x in (train, test, residual)}
    if len(kinds) > 1 or not lists[0] or len({len(x) for x in lists}) > 1:
        raise ArgumentError(
            "train, test and residual must be a tensor each (one model), or a list each with a tensor per model, got "
            f"{', '.join(type(x).__name__ for x in (train, test, residual))} of {[len(x) for x in lists]} model(s)."
        )
    models = list(zip(*lists, strict=True))
    pairs = [both(a, b, project=True) for a, b, _ in models]
    for a, b, q in models:
        if not isinstance(q, Tensor) or not q.dtype.is_floating_point or q.shape != (len(a),):
            got = f"{q.dtype} of shape {list(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
            raise QuantityError(f"residual must be [n_train] = [{len(a)}], one number per training sample, got {got}.")
        if not len(a) or len(a) != len(models[0][0]) or len(b) != len(models[0][1]):
            raise QuantityError(
                "there must be features of the same samples for all models, and of at least one to train on."
            )
        check_finite(residual=q)
    kernels = [_kernel(*pair, damping, a.dtype) for pair, (a, _, _) in zip(pairs, models, strict=True)]
    missing = torch.stack([q for _, _, q in models]).mean(0)
    return missing[:, None] * torch.stack(kernels).mean(0)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """``log p/(1 - p)`` of the correct class, ``[N]``, from logits ``[N, C]``: the output that TRAK linearises.

    ``1 - p`` is the sigmoid of minus it.  Pass it as ``loss_fn`` to `persample.gradients`.

    Raises:
        LossError: logits of fewer than two classes, which have no ``1 - p``; targets that are no classes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise LossError(
            f"margin needs logits [N, C] and classes [N], got {type(outputs).__name__} and {type(targets).__name__}. "
            "Where the model returns more than logits: loss_fn=lambda out, y: margin(out.logits, y)."
        )
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise LossError(
            f"margin needs logits [N, C] of two classes or more, got shape {list(outputs.shape)}. For a single logit "
            "z of a yes or no, the margin is z or -z: loss_fn=lambda z, y: z.squeeze(1) * (2 * y - 1)."
        )
    if targets.dtype not in (torch.int64, torch.int32) or targets.shape != outputs.shape[:1]:
        raise LossError(
            f"margin needs the classes of N = {len(outputs)} samples, [N] and integers, got targets of shape "
            f"{list(targets.shape)} and {targets.dtype}."
        )
    correct = outputs.gather(1, targets[:, None])
    others = outputs.scatter(1, targets[:, None], -torch.inf)
    return correct.squeeze(1) - others.logsumexp(1)


def _kernel(train: Tensor, test: Tensor, damping: float, kind: torch.dtype) -> Tensor:
    """``a (a^T a + damping I)^+ b^T``, of ``a`` with the rounding errors of ``kind``."""
    check_finite(train=train, test=test)
    a, b = train.double(), test.double()
    eps = torch.finfo(torch.float64 if damping else kind).eps
    few = len(a) < a.shape[1]
    square, basis = torch.linalg.eigh(a @ a.mT if few else a.mT @ a)
    square = square + damping
    if square.min() > max(1e-6, (SIGNAL * eps) ** 2) * square.max():  # rounding errors of 1e-10
        inverse = basis / square @ basis.mT
        kernel: Tensor = inverse @ (a @ b.mT) if few else a @ (inverse @ b.mT)
        return kernel.to(train.dtype)
    left, values, right = torch.linalg.svd(a, full_matrices=False)  # its errors are the square roots of those above
    size = values.hypot(values.new_tensor(math.sqrt(damping)))
    kept = size > NOISE * eps * size.max()
    if edge := int((kept & (size < SIGNAL * eps * size.max())).sum()):
        raise QuantityError(
            f"{edge} of the singular values of train {list(a.shape)} are about as large as its rounding errors, so "
            "whether they are 0 can't be told, and their inverses are mostly noise. Give a larger damping= (in units "
            f"of their squares, the largest of which is {float(values[0]) ** 2:.3g}), or features of a higher "
            "precision, or a smaller projection."
        )
    kernel = (left * torch.where(kept, values / size.square(), 0.0)) @ (right @ b.mT)
    return kernel.to(train.dtype)
