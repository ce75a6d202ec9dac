"""`coupling`: what is left of per-sample gradients when BatchNorm couples the batch, by name, with the coupling itself.

The mathematics is in `network`, the five gradients in `notions`, the table of all cross-sample derivatives in `table`,
and what is read off it in `indices`.  Here they get the names by which they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index as index_of
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..curvature.operator import Operator
from ..errors import ArgumentError, UnknownParameterError
from ..factors import Dense, Factors, dense, index
from ..gradients import Gradients, Sink
from ..losses import LossFunction
from ..problem import Emit, Pass, Selection, pose
from ..quantities import PART
from ..scratch import kernel
from ..state import unwrapped
from ..telling import telling
from . import ggn, indices, notions, plots, table
from .indices import Noise
from .network import Network, Route, costs
from .passes import Passes, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@telling
def coupling(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    params: Selection = None,
    batch_dim: Any = 0,
    route: Route | None = None,
    verify: bool = True,
) -> Coupling:
    """The coupling of the samples of one batch by BatchNorm, at the model's parameters and in the mode it is in.

    Args:
        model, loss_fn, inputs, targets, params, batch_dim: as for `persample.gradients`.
        route: how to compute what takes many passes: "samples" (``N`` backward passes), "statistics" (``K``, two for
            each channel of each BatchNorm call), or the cheaper one.  Results are the same.
        verify: check on two samples that nothing but BatchNorm's statistics couples the batch, at the cost of about a
            pass.

    Running statistics, ``num_batches_tracked``, ``.grad`` and the random state stay as they are.  Random masks
    (dropout) are those that a forward pass would draw now, and the same in everything the result computes.  It runs
    passes when something is asked for, and raises `InplaceError` if parameters, batch, modes or other settings of
    modules have changed since; running statistics are those of now, whatever moves them later.

    Raises:
        BatchCoupledError: something else than BatchNorm couples the batch.
        BatchNormError: a BatchNorm whose statistics can't be taken apart by sample.
        PersampleError: what `persample.gradients` raises for arguments that do not fit.
    """
    if route not in (None, "samples", "statistics"):
        raise ArgumentError(f"route must be 'samples', 'statistics' or None, got {route!r}.")
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    network = Network(Point.of(problem), route)
    if verify:
        network.verify()
    return Coupling(network)


@dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """One batch, coupled by BatchNorm: ``N`` samples, ``K`` statistics, unscaled losses ``l_n``; made by `coupling`.

    As an operator it is the table ``G[n, m] = dl_n/dtheta^(m)``, where ``theta^(m)`` is the copy of the parameters that
    sample ``m`` uses.  ``coupling @ v`` is ``[N]``, the derivatives of all losses along ``v``, ``{name: [*P]}`` or
    flat ``[D]`` (or ``{name: [N, *P]}``, one direction for every copy).  ``coupling.T @ w``, for ``w [N]``, are
    `Gradients` with the rows ``sum_n w[n] G[n, m]``.
    """

    network: Network

    # ---- the batch ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.network.n

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters asked for."""
        return tuple(self.network.problem.parameters)

    @property
    def losses(self) -> Tensor:
        """``[N]``: the unscaled losses of the batch."""
        return self.network.structure.losses

    @property
    def outputs(self) -> Any:
        """What the model returns for the batch."""
        return self.network.structure.outputs

    @property
    def passes(self) -> Passes:
        """How many forward passes and vector-Jacobian products were run so far."""
        return self.network.point.passes

    @property
    def layers(self) -> dict[str, int]:
        """The BatchNorm calls that couple the losses, in the order of the forward pass, with their channels.

        ``"bn#2"`` is the second call of the module ``"bn"``.
        """
        return {node.name: node.channels for node in self.network.structure.nodes}

    @property
    def coupled(self) -> dict[str, list[str]]:
        """``{name: [layers]}``: the parameters that statistics depend on which reach a loss, and whose statistics."""
        nodes = self.network.structure.nodes
        return {name: [nodes[i].name for i in self.network.nodes_of([name])] for name in self.network.coupled}

    @property
    def uncoupled(self) -> list[str]:
        """The other parameters (the last BatchNorm's own, what follows it): they have ordinary per-sample gradients."""
        return [name for name in self.names if name not in self.network.coupled]

    def costs(self) -> dict[str, int]:
        """Backward passes of the batch that ``gradients("loss")`` takes by either route; by samples, one more gives the
        rows of parameters that no statistic depends on.
        """
        which = self.network.nodes_of(self.network.coupled)
        return costs(len(self), sum(2 * self.network.structure.nodes[i].channels for i in which))

    # ---- gradients ----------------------------------------------------------------------------------------------

    @telling
    def gradients(self, notion: str, samples: Iterable[int] | None = None) -> Gradients:
        """One of the five per-sample gradients, ``[N, *P]`` for each parameter.

        =============  ===========================================================  ============  ====================
        ``notion``     row ``n``                                                    sums to grad  backward passes
        =============  ===========================================================  ============  ====================
        "eval"         BatchNorm layers with their running statistics               no            1
        "frozen"       the statistics of the batch held fixed                       no            1
        "copy"         with respect to the copy of the parameters that the sample   yes           1
                       uses: what hooks return
        "loss"         ``dl_n/dtheta``, the gradient of each loss of the batch      yes           ``min(N, K)``
        "influence"    how the batch gradient moves with the weight of sample       yes           ``min(N, K)``, each of
                       ``n``, in the loss and in the statistics                                   about three
        =============  ===========================================================  ============  ====================

        ``samples``: only these rows, losses and outputs; "loss" and "influence" then take at most as many passes.

        Raises:
            BatchNormError: "eval" for a layer without running statistics.
        """
        if not isinstance(notion, str) or notion not in notions.NOTIONS:
            raise ArgumentError(
                f"'the gradient of sample n' is not one thing: say which of {list(notions.NOTIONS)}, got {notion!r}."
            )
        if samples is not None and not isinstance(samples, Iterable):
            raise ArgumentError(f"samples must be a list of their numbers, got {samples!r}.")
        some = None if samples is None else [self._sample(n) for n in samples]
        at = None if some is None else torch.tensor(some, dtype=torch.int64, device=self.losses.device)
        part = "" if some is None or sorted(some) == [*range(len(self))] else f", {PART}"
        return self._collect(notion + part, lambda emit: notions.NOTIONS[notion](self.network, emit, at))

    def _sample(self, n: Any) -> int:
        """The number of a sample, also if it is counted from the end."""
        try:
            if isinstance(n, bool) or (isinstance(n, Tensor) and n.dtype == torch.bool):
                raise TypeError
            return range(len(self))[index_of(n)]
        except (TypeError, IndexError):
            raise ArgumentError(
                f"samples are given by their numbers, 0 to {len(self) - 1} (of a mask: mask.nonzero()), got {n!r}."
            ) from None

    @telling
    def via_statistics(self, layer: str | None = None) -> Gradients:
        """The part of ``dl_n/dtheta`` that flows through the statistics: "loss" minus "frozen".

        With a ``layer``, what flows from the parameters directly into the statistics of that one; the layers add up.
        """
        layers = list(self.layers) if layer is None else [layer]
        if unknown := set(layers) - set(self.layers):
            raise UnknownParameterError(f"no coupling BatchNorm call {unknown.pop()!r}; there are {list(self.layers)}.")
        note = "via statistics" if layer is None else f"via {layer!r}"
        return self._collect(note, lambda emit: notions.through(self.network, layers, emit))

    def _collect(self, note: str, run: Callable[[Emit], Pass]) -> Gradients:
        problem = self.network.problem
        sink = Sink(problem.model, problem.parameters, problem.aliases, None)
        return sink.result(run(sink.emit), note)  # type: ignore[return-value]

    def _gradients(self, factors: Mapping[str, Factors], note: str) -> Gradients:
        problem, own = self.network.problem, {name: factors[name] for name in self.names}
        aliases, wrapper = problem.aliases, unwrapped(problem.model)[1]
        return Gradients(own, self.losses, aliases=aliases, parameters=problem.parameters, note=note, wrapper=wrapper)

    # ---- the table ----------------------------------------------------------------------------------------------

    def norms(self, per_parameter: bool = False) -> Any:
        """``|G[n, m]|``, ``[N, N]``: how much loss ``n`` depends on the parameters through sample ``m``.

        ``{name: [N, N]}`` per parameter.  ``N`` backward passes, each reduced on arrival.
        """
        return {name: s.sqrt() for name, s in self._squares.items()} if per_parameter else self._total.sqrt()

    @cached_property
    def _squares(self) -> dict[str, Tensor]:
        return table.squared_norms(self.network)

    @property
    def _total(self) -> Tensor:
        return torch.stack(list(self._squares.values())).sum(0)

    def row(self, n: int) -> Gradients:
        """``G[n, :]``: row ``m`` is ``dl_n/dtheta^(m)``; they sum to ``dl_n/dtheta``.  One pass."""
        return self._gradients(table.row(self.network, self._sample(n)), f"table[{n}, :]")

    @telling
    def column(self, m: int) -> Gradients:
        """``G[:, m]``: row ``n`` is ``dl_n/dtheta^(m)``; they sum to row ``m`` of "copy".

        ``min(N, 2 K)`` passes: a table row each, or `adjoints` (shared) and as many for the statistics of sample ``m``.
        """
        found = table.column(self.network, self._sample(m))
        return self._gradients({name: Dense(value) for name, value in found.items()}, f"table[:, {m}]")

    def entry(self, n: int, m: int) -> dict[str, Tensor]:
        """``G[n, m] = dl_n/dtheta^(m)``, ``{name: [*P]}``.  One pass."""
        m = self._sample(m)
        row = table.row(self.network, self._sample(n))
        return {name: dense(index(row[name], slice(m, m + 1)))[0] for name in self.network.problem.parameters}

    def __matmul__(self, v: Mapping[str, Tensor] | Tensor) -> Tensor:
        return table.directional(self.network, v)

    @property
    def T(self) -> Transposed:
        """The transpose of the table."""
        return Transposed(self)

    def input_norms(self) -> Tensor:
        """``|dl_n/dx_m|``, ``[N, N]``, over all floating inputs.  ``N`` passes."""
        return table.input_squares(self.network).sqrt()

    def output_input_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``|df_n/dx_m|_F``, ``[N, N]``: the Jacobian of the network between samples.

        A pass for every output of every sample; or estimated (unbiased squares) from ``probes`` signs, ``N`` each.
        """
        return table.output_input_squares(self.network, probes, generator).sqrt()

    @telling
    def loss_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``|dl_n/dtheta|``, ``[N]``; or estimated from ``probes`` Gaussian directional derivatives, a pass each.

        The squares are then unbiased, with a relative standard deviation of ``sqrt(2 / probes)``.
        """
        if probes is None:
            return self.gradients("loss").norm()  # type: ignore[no-any-return]
        return table.loss_squares(self.network, probes, generator).sqrt()

    def outgoing_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``sqrt(sum_n |G[n, m]|^2)``, ``[N]``: how much all losses depend on the parameters through sample ``m``.

        With ``probes`` estimated from random signs of the losses, a pass each; the squares are then unbiased.
        """
        if probes is None:
            return self._total.sum(0).sqrt()
        return table.outgoing_squares(self.network, probes, generator).sqrt()

    # ---- statistics ---------------------------------------------------------------------------------------------

    @telling
    def adjoints(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``lambda_n``, ``{layer: (mean [N, C], variance [N, C])}``: which channel couples.

        Total derivatives of every loss with respect to the statistics, later layers included.  ``min(N, K)`` passes.
        """
        pieces = zip(self.network.by_node(self.network.adjoints), self.layers.items(), strict=True)
        return {name: (both[:, :channels], both[:, channels:]) for both, (name, channels) in pieces}

    @kernel
    @telling
    def statistic_influence(self) -> Tensor:
        """``T[n, m] = dl_n/dw_m``, ``[N, N]``: the derivative of loss ``n`` in sample ``m``'s weight in the statistics.

        Weights are normalised, so rows sum to 0; rank at most ``K``.  ``min(N, K)`` passes, shared with `adjoints`.
        """
        return self.network.adjoints @ self.network.deviation.mT

    @kernel
    def effective_losses(self) -> Tensor:
        """``phi_m = l_m + sum_n T[n, m]``, ``[N]``: the loss of sample ``m``, and what its presence does to all losses.

        Its mean is the mean loss, its gradients are those of "influence", and up to ``O(1/N)`` it is the jackknife
        pseudo-value ``N L - (N-1) L_-m`` of the batch loss.  One pass for all.
        """
        return self.losses + self.network.deviation @ self.network.structure.total

    @telling
    def leave_one_out(self, exact: bool = False) -> Tensor:
        """``[N, N]``: loss ``n`` without sample ``m`` in the statistics, minus loss ``n``; approximately, by default.

        The default is the first order, ``-T[n, m]`` (`statistic_influence`), whose error is of the order ``1/N^2``
        where the entries are of the order ``1/N``.  ``exact=True`` takes ``N`` forward passes.
        """
        if not isinstance(exact, bool):
            raise ArgumentError(f"exact must be True or False, got {exact!r}; of one sample m, take column [:, m].")
        return indices.leave_one_out(self.network) if exact else -self.statistic_influence()

    # ---- curvature ----------------------------------------------------------------------------------------------

    def ggn(self, reduction: str = "mean") -> Operator:
        """The Gauss-Newton matrix ``c sum_n J_n^T H_n J_n``, ``[D, D]``, ``J_n = df_n/dtheta`` with the statistics.

        ``c`` is ``1/N`` for "mean", 1 for "sum".  About three backward passes a product.
        """
        return ggn.ggn(self.network, reduction)

    def ggn_diagonal(
        self, draws: int | None = None, generator: torch.Generator | None = None, reduction: str = "mean"
    ) -> dict[str, Tensor]:
        """The diagonal of `ggn`, ``{name: [*P]}``: exactly by ``D`` products, for small networks.

        Or without bias from ``draws`` targets drawn from the model (for a log-likelihood), a backward pass each.
        """
        return ggn.diagonal(self.network, draws, generator, reduction)

    # ---- indices ------------------------------------------------------------------------------------------------

    def data_coupling(self) -> Tensor:
        """``|G[n, != n]| / |G[n, :]|``, ``[N]``: the share of the other samples; each one's falls as ``1/N``."""
        return indices.data_coupling(self._total)

    @telling
    def theta_coupling(self) -> Tensor:
        """``|dl_n/dtheta - d_n| / |dl_n/dtheta|``, ``[N]``: the share of the statistics; no decay with ``N``."""
        return indices.theta_coupling(self.network, self.gradients("loss"))

    def participation(self) -> Tensor:
        """``(sum_m a_m)^2 / sum_m a_m^2`` of ``a_m = |G[n, m]|^2``, ``[N]``: on how many samples loss ``n`` depends."""
        return indices.participation(self._total)

    @telling
    def noise(self, kinds: Iterable[str] = ("influence", "loss", "copy", "frozen")) -> dict[str, Noise]:
        """Gradient noise as each notion sees it.

        Only "influence" predicts the covariance of mini-batch gradients, ``trace / N``.  The others leave out that a
        sample also moves the statistics: their estimates are biased, and given for comparison.  ``scale`` is the
        ratio to the square of this batch's mean, noise included, so that it is smaller than the unbiased one,
        ``statistics.noise_scale(coupling.gradients("influence"))``.
        """
        return {kind: indices.noise(self.gradients(kind)) for kind in kinds}

    # ---- to be looked at ----------------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat map of `norms` without its diagonal.  Needs matplotlib; more pictures in `persample.batchnorm`."""
        return plots.of_table(self.norms(), ax)

    def __repr__(self) -> str:
        what = ", ".join(f"{name}: {value}" for name, value in plots.summary(self).items())
        return f"Coupling({what}; see .norms(), .gradients(notion), .data_coupling(), .plot())"

    def _repr_html_(self) -> str:
        return plots.html(self)


@dataclass(frozen=True, eq=False)
class Transposed:
    """``G^T``: from weights of the losses to rows for the samples' copies of the parameters."""

    coupling: Coupling

    def __matmul__(self, w: Tensor) -> Gradients:
        """`Gradients` with the rows ``sum_n w[n] G[n, m]``; ones give "copy".  One pass."""
        return self.coupling._gradients(table.transposed(self.coupling.network, w), "weighted copy")
