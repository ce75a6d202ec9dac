"""A network with BatchNorm at one batch: its statistics ``s [K]``, and what flows through them.

With ``d_n = dl_n/dtheta`` (`Network.direct`) and ``u_n = dl_n/ds`` (`Network.u`) at fixed statistics, and with ``S =
ds/dtheta [K, D]`` the Jacobian of the statistics themselves, those of the layers before included, the gradient of a
loss of the batch is

    dl_n/dtheta = d_n + S^T u_n.

How a change of one statistic alone spreads to the later ones is the resolvent ``R = (I - B)^{-1} [K, K]``, unit lower
triangular; ``lambda_n = R^T u_n`` is the total derivative of ``l_n`` with respect to the statistics
(`Network.adjoints`).  With ``a_m = dh_m/dtheta [K, D]``, the table of all derivatives of losses with respect to the
samples' copies of the parameters is

    G[n, m] = delta_nm d_n + share_m lambda_n^T a_m:         row sums dl_n/dtheta, column sums what hooks return.

So there are two exact routes to what depends on ``n`` through the statistics: ``N`` vector-Jacobian products, one for
each loss, or ``K``, one for each statistic.  `cheaper` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import detached
from ..calls import reached
from ..dropout import NoDropout
from ..errors import RECORDED, BatchCoupledError
from ..factors import Factors, compact
from ..problem import Pass, Problem
from ..rounding import tolerance
from ..scratch import kernel
from ..state import parameters_of
from ..telling import numbered_as
from .passes import CHUNK, Forward, Grads, Point
from .statistics import Copies, Explicit, Node, Pool, given, live, pooled

Route = Literal["samples", "statistics"]


def costs(rows: int, statistics: int) -> dict[str, int]:
    """Backward passes of the batch that ``rows`` rows take by either route.

    "samples": one for every row.  "statistics": one for each statistic, and one with fixed statistics.  (Those of an
    early layer are shorter than a whole pass, which about pays for the explicit statistics and the product at the
    end.)
    """
    return {"samples": rows, "statistics": 1 + statistics if statistics else 0}


def cheaper(rows: int, statistics: int) -> Route:
    """The route with fewer passes."""
    passes = costs(rows, statistics)
    return "samples" if passes["samples"] < passes["statistics"] else "statistics"


@dataclass(frozen=True, eq=False)
class Structure:
    """The statistics that the losses depend on, at the batch; everything is detached."""

    losses: Tensor  # [N]
    outputs: Any
    nodes: list[Node]
    alive: list[int]  # which of the calls of a forward pass these nodes are
    sources: list[frozenset[str]]  # for each node, the parameters that its statistics depend on
    total: Tensor  # [K], Lambda = sum_n lambda_n

    @property
    def size(self) -> int:
        """``K``: two statistics for every channel."""
        return len(self.total)


@dataclass(frozen=True, eq=False)
class Direct:
    """A pass at fixed statistics: ``d_n`` as factors, and the gradients of the samples' copies of all statistics."""

    run: Pass
    factors: dict[str, Factors]
    nodes: list[Node]
    copies: Grads


@dataclass(frozen=True, eq=False)
class Network:
    """A coupled network at one point.  Passes are run when something is asked for, and small results are kept."""

    point: Point
    route: Route | None = None  # None: the cheaper one

    @property
    def problem(self) -> Problem:
        return self.point.problem

    @property
    def n(self) -> int:
        return self.point.n

    # ---- the statistics -----------------------------------------------------------------------------------------

    @cached_property
    def structure(self) -> Structure:
        """One forward and backward pass: the statistics, what they depend on, and ``Lambda``."""
        names = {id(p): name for name, p in self.problem.parameters.items()}
        with self.point.forward(live) as run:
            found = self.point.gradient([run.losses], pooled(run.nodes), [torch.ones_like(run.losses)])
            alive = [i for i in range(len(run.nodes)) if found[2 * i] is not None]
            nodes = [run.nodes[i] for i in alive]
            leaves = [reached([h.grad_fn for h in node.moments]).leaves for node in nodes]
            sources = [frozenset(names[i] for i in own if i in names) for own in leaves]
            losses = run.losses.detach()
            total = torch.cat([losses[:0], *(g.detach() for g in found if g is not None)])
            return Structure(losses, detached(run.outputs), [n.detached() for n in nodes], alive, sources, total)

    @contextmanager
    def forward(self, pool: Pool | None = None, *, inputs: bool = False) -> Iterator[Forward]:
        """`Point.forward` for what needs the structure too: found only within, it would take a pass inside of this one,
        after buffers have moved.
        """
        _ = self.structure
        with self.point.forward(pool, inputs=inputs) as run:
            yield run

    def alive(self, nodes: Sequence[Node]) -> list[Node]:
        """Of the nodes of a forward pass those that the losses depend on."""
        return [nodes[i] for i in self.structure.alive]

    def nodes_of(self, names: Iterable[str]) -> list[int]:
        """Which nodes depend on any of these parameters."""
        wanted = set(names)
        return [i for i, sources in enumerate(self.structure.sources) if sources & wanted]

    @cached_property
    def coupled(self) -> list[str]:
        """The parameters that some statistic depends on."""
        return [name for name in self.problem.parameters if self.nodes_of([name])]

    @cached_property
    def deviation(self) -> Tensor:
        """``ds/dw_m = share_m (h_m - s)``, ``[N, K]``: how the weight of a sample moves the statistics; sums to 0 over
        samples.
        """
        parts = [self.structure.losses.new_empty(self.n, 0)]
        for node in self.structure.nodes:
            for h, s in zip(node.moments, node.pooled, strict=True):
                parts.append(node.spread(node.weigh(h - s), self.n))
        return torch.cat(parts, 1)

    def by_node(self, values: Tensor) -> list[Tensor]:
        """``[..., K]`` in pieces ``[..., 2 C]``, one for each node."""
        sizes = [2 * node.channels for node in self.structure.nodes]
        return list(values.split(sizes, -1)) if sizes else []

    def of_nodes(self, values: Tensor, which: Sequence[int]) -> Tensor:
        """``[..., K]`` for some of the nodes only."""
        parts = self.by_node(values)
        return torch.cat([values[..., :0], *(parts[i] for i in which)], -1)

    # ---- at fixed statistics ------------------------------------------------------------------------------------

    @cached_property
    def direct(self) -> Direct:
        """One pass with fixed statistics: the samples are independent."""
        factors: dict[str, Factors] = {}
        explicit = Explicit(copies := Copies())
        with self.point.recorded(explicit) as run:
            unused, u = run.rows(lambda name, g: factors.__setitem__(name, compact(g)), wrt=copies.leaves)
        factors = {name: factors[name] for name in self.problem.parameters}
        return Direct(Pass(run.losses, run.outputs, unused), factors, [n.detached() for n in explicit.nodes], u)

    @cached_property
    def u(self) -> Tensor:
        """``u_n = dl_n/ds``, ``[N, K]``: at fixed statistics of all other layers."""
        return self.beside(self.direct.nodes, self.direct.copies)

    def beside(self, nodes: Sequence[Node], grads: Grads) -> Tensor:
        """Gradients with respect to the samples' own copies of all statistics, ``[M, C]`` each, as ``[N, K]``."""
        parts = [self.structure.losses.new_empty(self.n, 0)]
        for i in self.structure.alive:
            for h, g in zip(nodes[i].moments, grads[2 * i : 2 * i + 2], strict=True):
                parts.append(nodes[i].spread(torch.zeros_like(h) if g is None else g, self.n).detach())
        return torch.cat(parts, 1)

    # ---- through the statistics ---------------------------------------------------------------------------------

    def jacobian(self, outs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """``d outs / dtheta``, ``{name: [R, *P]}``, for ``outs`` with ``R`` entries together: a pass for each."""
        parameters = [self.problem.parameters[name] for name in names]
        jacobian = [p.detach().new_zeros(sum(map(len, outs)), *p.shape) for p in parameters]
        step, start = self.step(sum(p.numel() for p in parameters)), 0
        for out in outs:
            for at, grads in self.point.rows(out, parameters, step):
                for g, target in zip(grads, jacobian, strict=True):
                    if g is not None:
                        target[start + at.start : start + at.stop] = g.detach()
            start += len(out)
        return dict(zip(names, jacobian, strict=True))

    @cached_property
    @kernel
    def adjoints(self) -> Tensor:
        """``lambda_n``, ``[N, K]``: total derivatives of all losses with respect to the statistics."""
        if (self.route or cheaper(self.n, self.structure.size)) == "statistics":
            return self.u @ self.resolvent
        with self.forward(live) as run:
            return self._onto_statistics(run, [run.losses])

    @cached_property
    def resolvent(self) -> Tensor:
        """``R = (I - B)^{-1}``, ``[K, K]``: how a change of one statistic (column) moves all of them."""
        with self.forward(live) as run:
            return self._onto_statistics(run, pooled(self.alive(run.nodes)))

    def _onto_statistics(self, run: Forward, outs: Sequence[Tensor]) -> Tensor:
        targets = pooled(self.alive(run.nodes))
        rows = [self.structure.total[None, :][:0]]
        for out in outs:
            for at, grads in self.point.rows(out, targets, self.step(0)):
                count = at.stop - at.start
                pairs = zip(grads, targets, strict=True)
                parts = [t.detach().new_zeros(count, len(t)) if g is None else g.detach() for g, t in pairs]
                rows.append(torch.cat([out.detach().new_empty(count, 0), *parts], 1))
        return torch.cat(rows)

    def step(self, size: int) -> int:
        """How many vector-Jacobian products that end in ``size`` numbers are best taken at once."""
        work = sum(4 * node.moments[0].numel() * node.positions for node in self.structure.nodes)
        return max(1, CHUNK // max(1, work + size))

    # ---- is that all? -------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Given the statistics, samples must be independent: raise if a loss changes with the other samples."""
        n, dtype = self.n // 2, self.structure.losses.dtype
        with NoDropout():
            with self.point.forward(live) as run:
                nodes = [node.detached() for node in run.nodes]
                before, losses = float(run.losses[n].detach()), run.losses.detach()
            with self.point.forward() as run:
                plain = run.losses.detach()
            alike = self.problem.batch.select(
                torch.full((self.n,), n, device="cpu")
            )  # all others replaced by copies of sample n
            with numbered_as([n] * self.n), self.point.forward(given(nodes), alike) as run:
                after = float(run.losses[n].detach())
        numbers = (p.dtype for p in parameters_of(self.problem.model) if p.is_floating_point() or p.is_complex())
        tol = tolerance(dtype, *numbers)  # losses may be finer than what they come from
        if not torch.allclose(losses, plain, rtol=tol, atol=1e-3 * tol, equal_nan=True):
            raise BatchCoupledError(
                "the model has other losses where BatchNorm's statistics are explicit: it uses something else of these "
                "layers than their outputs (running statistics that this forward updates), which isn't taken apart."
            )
        if abs(before - after) > tol * (abs(before) + abs(after)) + 1e-3 * tol:
            same = "with the same BatchNorm statistics but " if nodes else ""
            raise BatchCoupledError(
                f"sample {n} has loss {before:.6g} within the batch, {after:.6g} {same}among other samples. So "
                "something else than BatchNorm couples them (a loss that compares samples?), which no notion "
                f"of coupled= takes apart, or they are not where batch_dim= says. {RECORDED}"
            )
