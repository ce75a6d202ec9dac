"""Kronecker factors of Fisher and Gauss-Newton blocks, from the tokens of layers and gradients of pseudo losses.

One forward pass records the layers; then one backward pass for each column ``u`` of output gradients ``[N, ...]``:

=========  ==============================================================  =========
type       columns                                                         known as
=========  ==============================================================  =========
empirical  the gradients of the losses at the given targets, one           KFAC (empirical)
mc         gradients at targets drawn from the model, one per draw         KFAC
exact      a square root of the loss Hessian, ``sum_j u_nj u_nj^T = H_n``  KFLR
=========  ==============================================================  =========

With ``a_nt`` the input tokens of a layer, ``delta_ntj`` the gradients of its outputs for column ``j``, ``N`` samples,
``T`` positions, and ``c`` the reduction (``1/N`` for "mean", 1 for "sum"), the factors are (Martens and Grosse 2015;
Eschenhagen et al. 2023)

======  ====================================================  ========================================================
expand  ``A = 1/(N T) sum_nt a_nt a_nt^T``                      ``G = c sum_ntj delta_ntj delta_ntj^T``
reduce  ``A = 1/N sum_n abar_n abar_n^T``, ``abar`` mean over t  ``G = c sum_nj d_nj d_nj^T``, ``d`` sum over ``t``
======  ====================================================  ========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from ..arguments import one_of
from ..errors import ArgumentError, KroneckerError
from ..factors import Factors, outer
from ..losses import LossFunction
from ..problem import Selection, pose
from ..reductions import square_sum
from ..telling import telling
from .columns import Passes, passes
from .kronecker import Block, Kronecker
from .layers import UNUSED, Layer, find_layers
from .likelihood import wide
from .objective import Objective

Receive = Callable[[Layer, Tensor, Tensor], None]  # gets inputs [N, K, T, I] and output gradients [N, K, T, O]


@telling
def kfac(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    type: str = "mc", approximation: str = "expand", bias: str = "joined", samples: int = 1,
    generator: torch.Generator | None = None, params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
    verify: bool | None = None,
) -> Kronecker:  # fmt: skip
    """``blockdiag(G (x) A)``, ``[D, D]``: one Kronecker product per layer, for the Fisher or Gauss-Newton matrix.

    Args:
        type: which output gradients: "empirical", those of the losses at the given targets; "mc", those at targets that
            are drawn from the model; "exact", the columns of a square root of the Hessian of the losses (`kflr`).
        approximation: "expand" or "reduce": how a weight that is shared over positions is treated; without sharing they
            are the same.
        bias: "joined" as a last column of the weight's matrix, or "apart" in a block of its own.
        samples, generator: for "mc", how many targets are drawn, and from where, as in `persample.curvature.fisher`.
        params: by default every layer that is found, and other parameters are listed in ``uncovered``; if given, all of
            them must be covered.
        verify: hold the gradient of one sample against that sample alone, as `persample.gradients` does; by default at
            the first call for a model, shapes and mode.
        model, loss_fn, inputs, targets, batch_dim, reduction: as in `persample.curvature.hvp`.

    Layers are ``F.linear``, convolutions and transposed convolutions, with any options, however these functions are
    called.  Positions are those of the output, of transposed convolutions too: ``A`` is over the inputs that reach one,
    ``C_in / groups`` times the kernel's size (and the bias), ``G`` over its ``C_out / groups`` channels, with a block
    for each group.  The block is exact for deep linear networks with squared loss: without sharing; with "expand" if
    the loss is a sum over positions; with "reduce" if the network averages or sums over positions.

    The factors of a whole data set are `merge` of those of its batches.

    Raises:
        BatchCoupledError: if samples depend on each other through the chosen parameters.
        VerificationError: if the gradient of a sample is not that of the sample alone.
        KroneckerError: if there is no layer, or a parameter in ``params`` belongs to none.
        LossError: for "mc" without a known likelihood, for "exact" if the loss is not convex in the outputs.

    Cost: one forward pass, one backward pass per column, and the products ``A`` and ``G``.  "exact" has as many
    columns as the output has entries ``F`` per sample, and forms the loss Hessian ``[N, F, F]``.
    """
    one_of("approximation", approximation, ("expand", "reduce"))
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    with recorded(objective, type, samples, generator, bias, verify, strict=params is not None) as run:
        return _factors(run, approximation, f"KFAC ({type}, {approximation}, {reduction})")


def kflr(model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, **options: Any) -> Kronecker:
    """`kfac` with the exact loss Hessian (Botev et al. 2017): ``type="exact"``; the other options are the same."""
    if "type" in options:
        raise ArgumentError(f"kflr is kfac with type='exact': leave type={options['type']!r} out, or use kfac.")
    return kfac(model, loss_fn, inputs, targets, type="exact", **options)


@telling
def ekfac(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    type: str = "mc", approximation: str = "expand", bias: str = "joined", samples: int = 1,
    generator: torch.Generator | None = None, params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
    verify: bool | None = None, basis: Kronecker | None = None,
) -> Kronecker:  # fmt: skip
    """`kfac` with corrected eigenvalues (George et al. 2018): the matrix's own diagonal in the basis ``U_G (x) U_A``.

    The eigenvalue of ``u_G (x) u_A`` is ``c sum_nj (u_G^T g_nj u_A)^2``, with ``g_nj = sum_t delta_ntj a_nt^T`` the
    gradient of sample ``n`` for column ``j``: of all matrices with these eigenvectors the nearest to the block
    (Frobenius norm).  Where a factor has equal eigenvalues (transposed convolutions whose stride is the size of their
    kernel; zeros, if there are fewer samples than inputs), the eigenvectors are those that keep its entries apart.

    ``basis``: factors whose eigenvectors are taken, in place of those of this batch; see `merge`.  Other arguments and
    errors as in `kfac`; costs a second backward pass per column (not with a ``basis``), and the eigenvectors of all
    factors.
    """
    one_of("approximation", approximation, ("expand", "reduce"))
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    with recorded(objective, type, samples, generator, bias, verify, strict=params is not None) as run:
        title = f"EKFAC ({type}, {approximation}, {reduction})"
        plain = _factors(run, approximation, title) if basis is None else _with_vectors(basis, run, title)
        moments = {name: torch.zeros_like(block.eigenvalues) for name, block in plain.blocks.items()}

        def receive(layer: Layer, inputs: Tensor, grads: Tensor) -> None:
            if layer.weight not in plain.blocks or plain.blocks[layer.weight].layer != layer:
                raise KroneckerError(f"basis= has no block for '{layer.weight}' as it is here, with bias={bias!r}.")
            g, a = plain.blocks[layer.weight].bases
            rows = outer(grads.to(g.dtype) @ g, inputs.to(a.dtype) @ a, moments[layer.weight].shape)
            moments[layer.weight].add_(square_sum(rows), alpha=objective.scale)

        run.sweep(receive)
        if basis is not None:
            _check_all_met(basis, run)
    return replace(plain, blocks={name: replace(block, moments=moments[name]) for name, block in plain.blocks.items()})


# ---- the layers of one recorded forward pass ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The layers of a forward pass, and the passes back through it."""

    objective: Objective
    passes: Passes
    layers: dict[str, Layer]
    uncovered: dict[str, str]  # grows where the uses of a weight turn out to have no common form
    bias: str

    def sweep(self, receive: Receive) -> None:
        """One backward pass per column; ``receive`` gets the tokens of every layer, each time."""

        def emit(name: str, g: Factors) -> None:
            layer = self.layers[name]
            tokens = layer.tokens(g)
            if tokens is None:
                uses = self.passes.uses(parameters[name])
                lost = "its gradients have no factored form"
                if uses > 1:  # another resolution, stride or padding
                    lost = f"it is used {uses} times, in ways that have no factored form in common"
                self.uncovered.update(dict.fromkeys(layer.shapes, lost))
                return
            for part, inputs in _parts(layer, self.bias, tokens[0]):
                receive(part, inputs, tokens[1])

        parameters = {name: self.objective.parameters[name] for name in self.layers}
        for name in self.passes.sweep(parameters, emit):
            self.uncovered.update(dict.fromkeys(self.layers[name].shapes, UNUSED))


def _parts(layer: Layer, bias: str, inputs: Tensor) -> list[tuple[Layer, Tensor]]:
    """One block, or one for the weight and one for the bias, with their columns of the input tokens."""
    if layer.bias is None or bias == "joined":
        return [(layer, inputs)]
    alone = Layer(layer.bias, Size([layer.outputs]), groups=layer.groups)
    return [(replace(layer, bias=None), inputs[..., :-1]), (alone, inputs[..., -1:])]


@contextmanager
def recorded(
    objective: Objective,
    type: str,
    samples: int,
    generator: torch.Generator | None,
    bias: str,
    verify: bool | None,
    *,
    strict: bool,
) -> Iterator[Run]:
    """A forward pass under the hook engine's capture; every parameter that is not in a layer is accounted for."""
    one_of("type", type, ("empirical", "mc", "exact"))
    one_of("bias", bias, ("joined", "apart"))
    with passes(objective, type, samples, generator, verify) as found:
        layers, uncovered = find_layers(found.found, objective.parameters)
        run = Run(objective, found, {x.weight: x for x in layers}, uncovered, bias)
        yield run
        if strict and run.uncovered:
            name, reason = next(iter(run.uncovered.items()))
            raise KroneckerError(
                f"parameter '{name}' has no Kronecker factors: {reason}. Leave it out of params= (by default all "
                "layers are found), or use ggn."
            )


def _factors(run: Run, approximation: str, title: str) -> Kronecker:
    """The factors ``A`` and ``G`` of every block."""
    layers: dict[str, Layer] = {}
    tokens: dict[str, int] = {}
    inputs_sums: dict[str, Tensor] = {}
    gradient_sums: dict[str, Tensor] = {}

    def receive(layer: Layer, inputs: Tensor, grads: Tensor) -> None:
        if approximation == "reduce":
            inputs, grads = inputs.mean(2, keepdim=True), grads.sum(2, keepdim=True)
        name = layer.weight
        if name not in layers:  # the inputs are the same for every column
            layers[name] = layer
            tokens[name] = inputs.shape[0] * inputs.shape[2]
            inputs_sums[name] = _gram(inputs) / tokens[name]
            gradient_sums[name] = torch.zeros_like(_gram(grads))
        gradient_sums[name].add_(_gram(grads), alpha=run.objective.scale)

    run.sweep(receive)
    if not layers:
        reasons = "; ".join(f"'{name}': {why}" for name, why in list(run.uncovered.items())[:4])
        raise KroneckerError(f"none of the chosen parameters belongs to a linear layer or a convolution ({reasons})")
    names = [name for name in run.objective.parameters if name in layers]
    blocks = {name: Block(layers[name], inputs_sums[name], gradient_sums[name], tokens=tokens[name]) for name in names}
    covered = {name: shape for block in blocks.values() for name, shape in block.layer.shapes.items()}
    shapes = {name: covered[name] for name in run.objective.parameters if name in covered}
    return Kronecker(title, blocks, shapes, run.uncovered, run.objective.problem.batch.n, run.objective.reduction)


def _with_vectors(basis: Kronecker, run: Run, title: str) -> Kronecker:
    """The blocks of ``basis``, as those of this batch."""
    if not isinstance(basis, Kronecker):
        kind = basis.__class__.__name__
        raise ArgumentError(f"basis= takes Kronecker factors (of kfac, kflr, kfra, or merge of these), got {kind}.")
    n = run.objective.problem.batch.n
    return Kronecker(title, basis.blocks, basis.shapes, run.uncovered, n, run.objective.reduction)


def _check_all_met(basis: Kronecker, run: Run) -> None:
    """Raise for blocks of ``basis`` that this batch has no tokens for, as is known after a sweep."""
    if lost := [name for name in basis.shapes if name not in run.objective.parameters or name in run.uncovered]:
        reason = run.uncovered.get(lost[0], "it isn't among its parameters")
        raise KroneckerError(f"basis= is about parameter '{lost[0]}', and this batch is not: {reason}.")


def _gram(tokens: Tensor) -> Tensor:
    """``[K, D, D]`` from ``[N, K, T, D]``; half precision is accumulated in float32."""
    x = tokens.transpose(0, 1).flatten(1, 2)
    return wide(x).mT @ wide(x)
