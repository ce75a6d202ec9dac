"""The five per-sample gradients of a coupled network.  Each is an engine: it emits the rows of every parameter, and
says how.

=========  ==========================================================  =====================  ========================================
notion     row ``n``                                                   rows sum to the        passes
                                                                       batch gradient
=========  ==========================================================  =====================  ========================================
eval       BatchNorm layers with their running statistics              no                     1
frozen     ``d_n``: the statistics of the batch held fixed             no                     1
copy       ``c_n = sum_m G[m, n]``: with respect to the copy of the    yes                    1
           parameters that sample ``n`` uses; what hooks return
loss       ``dl_n/dtheta = d_n + S^T u_n = sum_m G[n, m]``: the true   yes                    ``min(N, K)``
           gradient of a loss of the batch
influence  ``psi_n = dphi_n/dtheta``: how the batch gradient moves     yes                    ``3 min(N, K)``
           with the weight of sample ``n``, in loss and statistics
=========  ==========================================================  =====================  ========================================

Parameters on which no statistic depends have the same rows in frozen, copy and loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import reductions
from ..curvature.objective import set_random_state
from ..factors import Dense, Factors, compact, dense, index
from ..problem import Emit, Pass, Problem
from ..verify import remember, verified
from .network import Network, cheaper
from .passes import Point
from .statistics import Copies, Explicit, constant, live, pooled, running, weighted

Notion = Callable[[Network, Emit, Tensor | None], Pass]  # (network, emit, which samples; None: all)


def evaluation(network: Network, emit: Emit, samples: Tensor | None = None) -> Pass:
    """Only the coupling layers change their mode."""
    with network.point.recorded(running) as run:
        unused, _ = run.rows(_picked(emit, samples))
    return Pass(_pick(run.losses, samples), run.outputs, unused)


def frozen(network: Network, emit: Emit, samples: Tensor | None = None) -> Pass:
    """``d_n``."""
    for name, g in network.direct.factors.items():
        _picked(emit, samples)(name, g)
    return _pass(network, network.direct.unused, samples)


def copy(network: Network, emit: Emit, samples: Tensor | None = None) -> Pass:
    """``c_n``: the hook engine, on the batch as it is."""
    with network.point.recorded() as run:
        unused, _ = run.rows(_picked(emit, samples))
    return _pass(network, unused, samples)


def loss(network: Network, emit: Emit, samples: Tensor | None = None) -> Pass:
    """``dl_n/dtheta``: through the statistics, or one vector-Jacobian product for each loss."""
    names, which = network.coupled, network.nodes_of(network.coupled)
    K = sum(2 * network.structure.nodes[i].channels for i in which)
    rows = network.n if samples is None else len(samples)
    by_statistics = (network.route or cheaper(rows, K)) == "statistics"
    through: dict[str, Tensor] = {}
    if names and by_statistics:
        with network.point.forward(live) as run:
            nodes = network.alive(run.nodes)
            S = network.jacobian([t for i in which for t in nodes[i].pooled], names)
        u = _pick(network.of_nodes(network.direct.u, which), samples)
    elif names:
        with network.point.forward() as run:
            through = network.jacobian([_pick(run.losses, samples)], names)
    for name, d in network.direct.factors.items():
        d = _pick_rows(d, samples)
        if name not in names:
            emit(name, d)
        elif by_statistics:
            emit(name, Dense(_plus(dense(d), u, S.pop(name))))
        else:
            emit(name, Dense(through.pop(name)))
    return _pass(network, network.direct.unused, samples)


def influence(network: Network, emit: Emit, samples: Tensor | None = None) -> Pass:
    """``psi_n = grad L + N d2L/(dtheta dw_n)``, with ``L(w) = sum w l(s(w)) / sum w`` and the statistics weighted
    alike.

    It is the gradient of the effective loss ``phi_n = l_n + Lambda^T ds/dw_n`` (`Coupling.effective_losses`), in which
    ``s`` and ``Lambda`` are themselves functions of the parameters:

        psi_n = dphi_n/dtheta|_(s, Lambda) + S^T dphi_n/ds + (dLambda/dtheta)^T ds/dw_n,

    where the first term is ``c_n``.  So it takes ``S`` and ``dLambda/dtheta``, one and three passes for each
    statistic, or three for each sample.
    """
    if not network.structure.size:
        return frozen(network, emit, samples)
    rows = network.n if samples is None else len(samples)
    if (network.route or cheaper(3 * rows, 4 * network.structure.size)) == "samples":
        return _influence_by_samples(network, emit, samples)
    names = list(network.problem.parameters)
    with network.point.forward(live) as run:
        s = pooled(network.alive(run.nodes))
        total = network.point.gradient([run.losses], s, [torch.ones_like(run.losses)], again=True)
        slopes = network.jacobian([g for g in total if g is not None], names)
        S = network.jacobian(s, network.coupled)
    copies, factors = _phi(network)
    bend, deviation = _pick(copies, samples), _pick(network.deviation, samples)
    for name in names:
        rows_of = _plus(dense(_pick_rows(factors[name], samples)), deviation, slopes.pop(name))
        emit(name, Dense(_plus(rows_of, bend, S.pop(name)) if name in S else rows_of))
    return _pass(network, network.direct.unused, samples)


def _phi(network: Network) -> tuple[Tensor, dict[str, Factors]]:
    """``dphi_m/ds [N, K]`` and ``dphi_m/dtheta`` (factors), both at fixed ``s`` and ``Lambda``: one pass with fixed
    statistics.
    """
    factors: dict[str, Factors] = {}
    explicit = Explicit(copies := Copies())
    with network.point.recorded(explicit) as run:
        moments = list(itertools.chain.from_iterable(node.moments for node in network.alive(explicit.nodes)))
        Lambda = network.structure.total.split([h.shape[1] for h in moments])
        extra = [(h, (adjoint / len(h)).to(h.dtype).expand_as(h)) for h, adjoint in zip(moments, Lambda, strict=True)]
        _, grads = run.rows(lambda name, g: factors.__setitem__(name, compact(g)), extra=extra, wrt=copies.leaves)
    member = network.beside(explicit.nodes, [torch.full_like(t, 1 / len(t)) for t in copies.leaves])
    return network.beside(explicit.nodes, grads) - network.structure.total * member, factors


def _influence_by_samples(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """One derivative of the gradient in every weight."""
    names, parameters = list(network.problem.parameters), list(network.problem.parameters.values())
    w = torch.ones(network.n, dtype=network.structure.losses.dtype, device=network.structure.losses.device, requires_grad=True)
    with network.point.forward(weighted(w)) as run:
        L = w @ run.losses / w.sum()
        mean = network.point.gradient([L], parameters, [torch.ones_like(L)])
        (slope,) = network.point.gradient([L], [w], [torch.ones_like(L)], again=True)
        assert slope is not None
        rows = network.jacobian([_pick(network.n * slope, samples)], names)
    for name, g in zip(names, mean, strict=True):
        emit(name, Dense(rows[name] if g is None else rows[name] + g))
    return _pass(network, network.direct.unused, samples)


NOTIONS: dict[str, Notion] = {"eval": evaluation, "frozen": frozen, "copy": copy, "loss": loss, "influence": influence}


def coupled_pass(problem: Problem, notion: str, emit: Emit, verify: bool | None) -> tuple[Pass, str]:
    """``persample.gradients(coupled=notion)``: the pass, and a note on the result.

    Random numbers are drawn as by one forward pass; buffers (running statistics) stay as they are.
    """
    if notion not in NOTIONS:
        raise ValueError(f"coupled must be one of {list(NOTIONS)}, got {notion!r}.")
    network = Network(Point.of(problem))
    if verify or (verify is None and verified(problem, "coupled") is None):
        network.verify()
        remember(problem, "coupled")
    run = NOTIONS[notion](network, emit, None)

    def weighted_sum(weight: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        NOTIONS[notion](network, lambda name, g: sums.__setitem__(name, reductions.weighted_sum(g, weight)), None)
        return sums

    if network.point.passes.drawn is not None:
        set_random_state(network.point.passes.drawn)
    note = f"coupled={notion!r}" + (", verify=False" if verify is False else "")
    return replace(run, weighted=weighted_sum), note


def through(network: Network, layers: Sequence[str], emit: Emit) -> None:
    """``A^T lambda_n``: what flows from the parameters into the statistics of some nodes directly, and from there into
    loss ``n``.

    ``A`` is the Jacobian of these statistics at fixed statistics of all other layers; over all nodes this is ``S^T
    u_n``.
    """
    which = [i for i, node in enumerate(network.structure.nodes) if node.name in layers]
    names = [name for name in network.coupled if set(network.nodes_of([name])) & set(which)]
    with network.point.forward(constant) as run:
        nodes = network.alive(run.nodes)
        A = network.jacobian([h.mean(0) for i in which for h in nodes[i].moments], names)
    weights = network.of_nodes(network.adjoints, which)
    for name, p in network.problem.parameters.items():
        zeros = p.detach().new_zeros(network.n, *p.shape)
        emit(name, Dense(_plus(zeros, weights, A[name]) if name in A else zeros))


# ---- details ----------------------------------------------------------------------------------------------------------


def _pass(network: Network, unused: tuple[str, ...], samples: Tensor | None) -> Pass:
    return Pass(_pick(network.structure.losses, samples), network.structure.outputs, unused)


def _pick(x: Tensor, samples: Tensor | None) -> Tensor:
    return x if samples is None else x[samples]


def _pick_rows(g: Factors, samples: Tensor | None) -> Factors:
    return g if samples is None else index(g, samples)


def _picked(emit: Emit, samples: Tensor | None) -> Emit:
    return lambda name, g: emit(name, _pick_rows(g, samples))


def _plus(rows: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """``rows [N, *P] + weights [N, K] @ basis [K, *P]``."""
    flat_rows = rows.reshape(len(rows), -1)
    return torch.addmm(flat_rows, weights.to(rows.dtype), basis.reshape(len(basis), -1)).reshape(rows.shape)
