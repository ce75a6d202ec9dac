"""`coupling`: what is left of per-sample gradients when BatchNorm couples the batch, by name, with the coupling itself.

The mathematics is in `persample.batchnorm.network`, the five notions in `notions`, the table of all cross-sample
derivatives in `table`. Here they get their names, their indices, and a face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BatchNormError, UnknownParameterError
from ..factors import Dense, Factors, compact, dense, index
from ..gradients import Gradients
from ..losses import LossFunction
from ..problem import Emit, Selection, pose
from . import notions, plots, table
from .network import Network, Route, costs
from .notions import NOTIONS
from .passes import Passes, Point
from .statistics import weighted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    """The coupling of the samples of one batch by BatchNorm, at the model's current parameters and in its current mode.

    Args:
        model, loss_fn, inputs, targets, params, batch_dim: as for `persample.gradients`.
        route: how to compute what takes many passes: "samples" (``N`` backward passes), "statistics" (``K``, two for
        each
            channel of each BatchNorm call), or by default the cheaper one.  Results are the same.
        verify: check on two samples that nothing but BatchNorm's statistics couples the batch; costs about one pass.

    Nothing is left behind: running statistics, ``num_batches_tracked``, ``.grad`` and the random state stay as they
    are. Random masks (dropout) are those that a forward pass would draw now, the same ones in everything the result
    computes.  The model, its parameters and the batch must not change while the result is in use: it runs passes when
    something is asked for.

    Raises:
        BatchCoupledError: something else than BatchNorm couples the batch.
        BatchNormError: a BatchNorm whose statistics can't be taken apart by sample, with the reason.
        and what `persample.gradients` raises for arguments that do not fit.
    """
    if route not in (None, "samples", "statistics"):
        raise ValueError(f"route must be 'samples', 'statistics' or None, got {route!r}.")
    network = Network(Point.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)), route)
    if verify:
        network.verify()
    return Coupling(network)


class Noise(NamedTuple):
    """Gradient noise as some notion of per-sample gradients sees it."""

    trace: float  # of the covariance of rows (ddof=1): N times that of the mini-batch gradient, if the notion is right
    squared_mean: float  # |mean row|^2
    scale: float  # trace / squared_mean, McCandlish et al. 2018


@dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """One batch, coupled by BatchNorm: ``N`` samples, ``K`` statistics, ``l_n`` the unscaled losses.

    ``coupling @ v`` is ``[N]``, the derivatives of all losses along ``v``: ``{name: [*P]}`` or flat ``[D]``; with
    ``{name: [N, *P]}``, one direction for every sample's copy of the parameters.  ``coupling.T @ w``, for ``w [N]``,
    are `Gradients` with the rows ``sum_n w[n] G[n, m]``.
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
        """The BatchNorm calls that couple the losses, in the order of the forward pass, with their channels;
        ``"bn#2"`` is the second call of the module ``"bn"``.
        """
        return {node.name: node.channels for node in self.network.structure.nodes}

    @property
    def coupled(self) -> dict[str, list[str]]:
        """``{name: [layers]}``: the parameters on which statistics depend that reach a loss, and whose statistics
        these are.
        """
        structure = self.network.structure
        on = {name: [structure.nodes[i].name for i in self.network.nodes_of([name])] for name in self.names}
        return {name: layers for name, layers in on.items() if layers}

    @property
    def uncoupled(self) -> list[str]:
        """The other parameters: the last BatchNorm's own, and what follows.  They have ordinary per-sample gradients.
        """
        return [name for name in self.names if name not in self.coupled]

    def costs(self) -> dict[str, int]:
        """Backward passes of the batch that ``gradients("loss")`` takes, by either route."""
        where = self.network.nodes_of(self.network.coupled)
        return costs(len(self), sum(2 * self.network.structure.nodes[i].channels for i in where))

    # ---- gradients ----------------------------------------------------------------------------------------------

    def gradients(self, notion: str, samples: Iterable[int] | None = None) -> Gradients:
        """One of the five per-sample gradients, as `Gradients`: ``"eval"``, ``"frozen"``, ``"copy"``, ``"loss"`` or
        ``"influence"``.

        ==========  ==================================================================  ============  ==============
        eval        BatchNorm layers with their running statistics                                    1 pass
        frozen      the statistics of the batch held fixed                                            1
        copy        with respect to the copy of the parameters that the sample uses     sums to grad  1
        loss        ``dl_n/dtheta``, the gradient of each loss of the batch             sums to grad  ``min(N, K)``
        influence   how the batch gradient depends on the weight of the sample,         sums to grad  ``3 min(N, K)``
                    in the loss and in the statistics
        ==========  ==================================================================  ============  ==============

        ``samples``: only these rows; "loss" and "influence" then cost that many passes at most.

        Raises:
            BatchNormError: "eval" for a layer without running statistics.
        """
        if notion not in NOTIONS:
            raise ValueError(f"the notion must be one of {list(NOTIONS)}, got {notion!r}: 'the gradient of sample n' is not one thing.")
        some = None if samples is None else torch.as_tensor(list(samples), dtype=torch.int64, device=self.losses.device)
        return self._collected(notion, lambda emit: NOTIONS[notion](self.network, emit, some))

    def via_statistics(self, layer: str | None = None) -> Gradients:
        """The part of ``dl_n/dtheta`` that flows through the statistics: of all layers (``loss`` minus ``frozen``), or
        what flows from the parameters into those of one ``layer`` directly; the layers add up.
        """
        layers = list(self.layers) if layer is None else [layer]
        if unknown := set(layers) - set(self.layers):
            raise UnknownParameterError(f"no coupling BatchNorm call {unknown.pop()!r}; there are {list(self.layers)}.")

        def run(emit: Emit) -> None:
            notions.through(self.network, layers, emit)

        return self._collected("via statistics" if layer is None else f"via '{layer}'", run)

    def _collected(self, note: str, run: Callable[[Emit], Any]) -> Gradients:
        kept: dict[str, Factors] = {}
        done = run(lambda name, g: kept.__setitem__(name, compact(g)))
        losses, outputs, unused = (self.losses, self.outputs, ()) if done is None else (done.losses, done.outputs, done.unused)
        return self._gradients(kept, note, losses, outputs, unused)

    def _gradients(self, factors: Mapping[str, Factors], note: str, losses: Tensor, outputs: Any = None, unused: tuple[str, ...] = ()) -> Gradients:
        problem = self.network.problem
        return Gradients(
            {name: factors[name] for name in self.names}, losses, outputs,
            unused=unused, aliases=problem.aliases, parameters=problem.parameters, note=note,
        )  # fmt: skip

    # ---- the table ----------------------------------------------------------------------------------------------

    def norms(self, per_parameter: bool = False) -> Any:
        """``|G[n, m]|``, ``[N, N]``: how much loss ``n`` depends on the parameters through sample ``m``; ``{name: [N,
        N]}`` per parameter.

        ``N`` backward passes, each reduced on arrival.  Exactly diagonal where nothing couples.
        """
        squares = self._squares
        return {name: s.sqrt() for name, s in squares.items()} if per_parameter else _total(squares).sqrt()

    @cached_property
    def _squares(self) -> dict[str, Tensor]:
        return table.squared_norms(self.network)

    def row(self, n: int) -> Gradients:
        """``G[n, :]``: the `Gradients` whose row ``m`` is ``dl_n/dtheta^(m)``; they sum to ``dl_n/dtheta``.  One pass.
        """
        return self._gradients(table.row(self.network, range(len(self))[n]), f"row {n}", self.losses)

    def column(self, m: int) -> Gradients:
        """``G[:, m]``: the `Gradients` whose row ``n`` is ``dl_n/dtheta^(m)``; they sum to row ``m`` of "copy".
        ``min(N, 2 K)`` passes.
        """
        rows = {name: Dense(value) for name, value in table.column(self.network, m).items()}
        return self._gradients(rows, f"column {m}", self.losses)

    def entry(self, n: int, m: int) -> dict[str, Tensor]:
        """``G[n, m] = dl_n/dtheta^(m)``, ``{name: [*P]}``.  One pass."""
        m = range(len(self))[m]
        row = table.row(self.network, range(len(self))[n])
        return {name: dense(index(g, slice(m, m + 1)))[0] for name, g in row.items()}

    def __matmul__(self, v: Mapping[str, Tensor] | Tensor) -> Tensor:
        if isinstance(v, Tensor):
            shapes = {name: p.shape for name, p in self.network.problem.parameters.items()}
            pieces = v.split([shape.numel() for shape in shapes.values()], -1)
            v = {name: x.reshape(*x.shape[:-1], *shape) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}
        return table.directional(self.network, v)

    @property
    def T(self) -> Transposed:
        """The transpose of the table."""
        return Transposed(self)

    def input_norms(self) -> Tensor:
        """``|dl_n/dx_m|``, ``[N, N]``, over all floating inputs.  ``N`` passes."""
        return table.input_squares(self.network).sqrt()

    def output_input_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``|df_n/dx_m|_F``, ``[N, N]``: the Jacobian of the network between samples.  A pass for every output of
        every sample; with ``probes`` random sign vectors only ``N * probes``, for an unbiased estimate of the squares.
        """
        return table.output_input_squares(self.network, probes, generator).sqrt()

    def loss_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``|dl_n/dtheta|``, ``[N]``; with ``probes`` estimated from that many Gaussian directional derivatives (three
        passes each, whatever ``N`` and ``K``): the squares are unbiased, with a relative standard deviation of
        ``sqrt(2 / probes)``.
        """
        if probes is None:
            return self.gradients("loss").norm()
        return table.loss_squares(self.network, probes, generator).sqrt()

    def outgoing_norms(self, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``sqrt(sum_n |G[n, m]|^2)``, ``[N]``: how much all losses depend on sample ``m``; with ``probes`` estimated
        from that many random signs of the losses (one pass each): the squares are unbiased.
        """
        if probes is None:
            return _total(self._squares).sum(0).sqrt()
        return table.outgoing_squares(self.network, probes, generator).sqrt()

    # ---- statistics ---------------------------------------------------------------------------------------------

    def adjoints(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``{layer: (mean [N, C], variance [N, C])}``: ``lambda_n``, the derivative of every loss with respect to the
        statistics of every channel, later layers included: which channel couples.  For the last layer one pass would
        do; for all ``min(N, K)``.
        """
        parts = self.network.by_node(self.network.adjoints)
        return {name: tuple(part.chunk(2, -1)) for name, part in zip(self.layers, parts, strict=True)}  # type: ignore[misc]

    def statistic_influence(self) -> Tensor:
        """``T[n, m] = dl_n/dw_m``, ``[N, N]``: the derivative of loss ``n`` in the weight of sample ``m`` in all
        statistics.

        Weights are normalised, so rows sum to 0; rank at most ``K``.  ``-T[n, m]`` is to first order what leaving
        ``m`` out of the statistics does to loss ``n``.
        """
        return self.network.adjoints @ self.network.deviation.mT

    def effective_losses(self) -> Tensor:
        """``phi_m = l_m + sum_n T[n, m]``, ``[N]``: the loss of sample ``m`` with what its presence does to all losses.

        Its mean is the mean loss; it is the jackknife pseudo-value of the batch loss to first order, and its gradients
        are those of "influence".  One backward pass for all.
        """
        return self.losses + self.network.deviation @ self.network.structure.total

    def leave_one_out(self, exact: bool = False) -> Tensor:
        """``[N, N]``: loss ``n`` without sample ``m`` in the statistics, minus loss ``n``; to first order ``-T[n,
        m]``, or exactly by ``N`` forward passes.
        """
        if not exact:
            return -self.statistic_influence()
        if len(self) < 2:
            raise BatchNormError("leave_one_out needs two samples: without the only one there are no statistics.")
        without = []
        for m in range(len(self)):
            w = torch.ones_like(self.losses)
            w[m] = 0
            with self.network.point.forward(weighted(w)) as run:
                without.append(run.losses.detach() - self.losses)
        return torch.stack(without, 1)

    # ---- indices ------------------------------------------------------------------------------------------------

    def data_coupling(self) -> Tensor:
        """``|G[n, != n]| / |G[n, :]|``, ``[N]``: the share of other samples in what loss ``n`` depends on.  Falls as
        ``1/sqrt(N)`` to ``1/N``.
        """
        squares = _total(self._squares)
        others = squares.clone().fill_diagonal_(0)
        return _ratio(others.sum(1).sqrt(), squares.sum(1).sqrt())

    def theta_coupling(self) -> Tensor:
        """``|dl_n/dtheta - d_n| / |dl_n/dtheta|``, ``[N]``: the share that flows through the statistics.  Does not
        vanish as ``N`` grows.
        """
        G = self.gradients("loss")
        through = torch.zeros_like(self.losses)
        for name in self.coupled:
            through += (G[name] - dense(self.network.direct.factors[name])).reshape(len(self), -1).square().sum(1)
        return _ratio(through.sqrt(), G.norm())

    def participation(self) -> Tensor:
        """``(sum_m a_m)^2 / sum_m a_m^2`` with ``a_m = |G[n, m]|^2``, ``[N]``: on how many samples loss ``n`` depends,
        1 to ``N``.
        """
        squares = _total(self._squares)
        return torch.where(squares.sum(1) > 0, _ratio(squares.sum(1).square(), squares.square().sum(1)), 1.0)

    def noise(self, kinds: Iterable[str] = ("influence", "loss", "copy", "frozen")) -> dict[str, Noise]:
        """Gradient noise by notion.  Only "influence" predicts the covariance of mini-batch gradients (``trace / N``):
        the others leave out that a sample also moves the statistics, and their estimates, given for comparison, are
        biased.
        """
        found = {}
        for kind in kinds:
            G = self.gradients(kind)
            trace = float(sum(v.sum() for v in G.variance(ddof=1).values()))
            squared = float(sum(g.square().sum() for g in G.mean().values()))
            found[kind] = Noise(trace, squared, trace / squared if squared else float("inf"))
        return found

    # ---- to be looked at ----------------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat map of `norms`, ``[N, N]``, its diagonal left out.  Needs matplotlib."""
        return plots.heat_map(self.norms(), ax, "sample m", "loss n", "|dl_n / dtheta_m|")

    def __repr__(self) -> str:
        return f"Coupling({', '.join(f'{name}: {value}' for name, value in plots.summary(self).items())})"

    def _repr_html_(self) -> str:
        return plots.html(self)


@dataclass(frozen=True, eq=False)
class Transposed:
    """``G^T``: from weights of the losses to rows for the samples' copies of the parameters."""

    coupling: Coupling

    def __matmul__(self, w: Tensor) -> Gradients:
        """`Gradients` with the rows ``sum_n w[n] G[n, m]``; ones give "copy".  One pass."""
        return self.coupling._gradients(table.transposed(self.coupling.network, w), "weighted copy", self.coupling.losses)


def _total(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, 0 where both are."""
    return torch.where(b > 0, a / b, 0.0)
