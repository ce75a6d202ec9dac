"""The five per-sample gradients of a coupled network.  Each is an engine: it emits the rows of every parameter.

=========  =============================================================  =====  ================
notion     row ``n``                                                      sums   backward passes
=========  =============================================================  =====  ================
eval       BatchNorm layers with their running statistics                 no     1
frozen     ``d_n``: the statistics of the batch held fixed                no     1
copy       ``c_n = sum_m G[m, n]``: with respect to the copy of the       yes    1
           parameters that sample ``n`` uses; what hooks return
loss       ``dl_n/dtheta = d_n + S^T u_n = sum_m G[n, m]``: the true      yes    ``min(N, K)``
           gradient of a loss of the batch
influence  ``psi_n = dphi_n/dtheta``: how the batch gradient moves with   yes    ``min(N, K)``,
           the weight of sample ``n`` in the loss and the statistics             each of about 3
=========  =============================================================  =====  ================

"Sums": whether the rows sum to the gradient of the summed loss.  Parameters on which no statistic depends have the
same rows in frozen, copy and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..factors import Dense, Factors, compact, dense, index
from ..problem import Emit, Pass, Problem
from ..remembered import remember, verified
from ..scratch import kernel
from ..state import set_random_state
from .network import Network, cheaper
from .passes import Grads, Point
from .statistics import Copies, Explicit, average, constant, live, pooled, running, weighted

Notion = Callable[[Network, Emit, Tensor | None], Pass]  # (network, emit, which samples; None: all)


def evaluation(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """Only the layers that couple change their mode."""
    with network.point.recorded(running) as run:
        unused, _ = run.rows(lambda name, g: emit(name, _rows(g, samples)))
    return _of(network, Pass(run.losses, run.outputs, unused, run.coupled), samples)


def frozen(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """``d_n``."""
    for name, g in network.direct.factors.items():
        emit(name, _rows(g, samples))
    return _pass(network, samples)


def copy(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """``c_n``: the hook engine, on the batch as it is."""
    with network.point.recorded() as run:
        unused, _ = run.rows(lambda name, g: emit(name, _rows(g, samples)))
    return _of(network, Pass(run.losses, run.outputs, unused), samples)


def loss(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """``dl_n/dtheta``: by one vector-Jacobian product for each loss, or by ``d_n + S^T u_n``."""
    if not (names := network.coupled):
        return frozen(network, emit, samples)
    which = network.nodes_of(names)
    size = sum(2 * network.structure.nodes[i].channels for i in which)
    by_samples = _route(network, samples, size) == "samples"
    with network.point.forward(None if by_samples else live) as run:
        nodes = network.alive(run.nodes) if run.nodes else []
        outs = [_pick(run.losses, samples)] if by_samples else pooled([nodes[i] for i in which])
        jacobian = network.jacobian(outs, names)
    for name, d in network.direct.factors.items():
        d = _rows(d, samples)
        if name in jacobian and by_samples:
            emit(name, Dense(jacobian.pop(name)))
        elif name in jacobian:
            u = _pick(network.of_nodes(network.u, which), samples)
            emit(name, Dense(_plus(dense(d), u, jacobian.pop(name))))
        else:
            emit(name, d)
    return _pass(network, samples)


def influence(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """``psi_n = grad L + N d2L/(dtheta dw_n)``, ``L(w) = sum w l(s(w)) / sum w``, the statistics weighted alike.

    It is the gradient of the effective loss ``phi_n = l_n + Lambda^T ds/dw_n``, where the statistics ``s`` and their
    adjoint ``Lambda`` are functions of the parameters too:

        psi_n = c_n + S^T dphi_n/ds + (dLambda/dtheta)^T ds/dw_n,         c_n = dphi_n/dtheta at fixed s, Lambda.

    So it takes ``S`` and ``dLambda/dtheta``, about three passes for each statistic, as ``dL/dw`` does for each sample.
    """
    if not network.structure.size:
        return frozen(network, emit, samples)
    if _route(network, samples, network.structure.size) == "samples":
        return _influence_by_samples(network, emit, samples)
    with network.point.forward(live) as run:
        s = pooled(network.alive(run.nodes))
        Lambda = network.point.gradient([run.losses], s, [torch.ones_like(run.losses)], again=True)
        slopes = network.jacobian([g for g in Lambda if g is not None], list(network.problem.parameters))
        S = network.jacobian(s, network.coupled)
    factors, bend = _effective(network)
    bend, deviation = _pick(bend, samples), _pick(network.deviation, samples)
    for name in network.problem.parameters:
        psi = _plus(dense(_rows(factors.pop(name), samples)), deviation, slopes.pop(name))
        emit(name, Dense(_plus(psi, bend, S.pop(name)) if name in S else psi))
    return _pass(network, samples)


def _effective(network: Network) -> tuple[dict[str, Factors], Tensor]:
    """``dphi_m/dtheta`` and ``dphi_m/ds [N, K]`` at fixed ``s`` and ``Lambda``, by one pass with fixed statistics.

    It starts from the losses, and from ``share_m Lambda`` at the moments ``h_m``.
    """
    Lambda, factors = network.structure.total, dict[str, Factors]()
    explicit = Explicit(copies := Copies())
    with network.point.recorded(explicit) as run:
        moments = [(node, h) for node in network.alive(explicit.nodes) for h in node.moments]
        pieces = zip(moments, Lambda.split([h.shape[1] for _, h in moments]), strict=True)
        extra = [(h, node.weigh(piece.expand_as(h)).to(h.dtype)) for (node, h), piece in pieces]
        _, grads = run.rows(lambda name, g: factors.__setitem__(name, compact(g)), extra=extra, wrt=copies.leaves)
    shares: Grads = [node.weigh(torch.ones_like(h)) for node in explicit.nodes for h in node.moments]
    share = network.beside(explicit.nodes, shares)
    return factors, network.beside(explicit.nodes, grads) - Lambda * share


def _influence_by_samples(network: Network, emit: Emit, samples: Tensor | None) -> Pass:
    """The gradient, and its derivative in every weight."""
    names, parameters = list(network.problem.parameters), list(network.problem.parameters.values())
    w = torch.ones_like(network.structure.losses, requires_grad=True)
    with network.point.forward(weighted(w)) as run:
        L = (w * run.losses).sum() / w.sum()
        mean = network.point.gradient([L], parameters, [torch.ones_like(L)])
        (slope,) = network.point.gradient([L], [w], [torch.ones_like(L)], again=True)
        assert slope is not None
        rows = network.jacobian([_pick(network.n * slope, samples)], names)
    for name, g in zip(names, mean, strict=True):
        emit(name, Dense(rows[name] if g is None else rows[name] + g))
    return _pass(network, samples)


NOTIONS: dict[str, Notion] = {
    "eval": evaluation,
    "frozen": frozen,
    "copy": copy,
    "loss": loss,
    "influence": influence,
}


def through(network: Network, layers: Sequence[str], emit: Emit) -> Pass:
    """``A^T lambda_n``: what flows from the parameters directly into the statistics of some nodes, and on to loss
    ``n``.

    ``A`` is the Jacobian of these statistics at fixed statistics of all other layers; over all nodes this is ``S^T
    u_n``.
    """
    which = [i for i, node in enumerate(network.structure.nodes) if node.name in layers]
    names = [name for name in network.coupled if set(network.nodes_of([name])) & set(which)]
    with network.point.forward(constant) as run:
        nodes = network.alive(run.nodes)
        A = network.jacobian([average(h, nodes[i].share) for i in which for h in nodes[i].moments], names)
    last = which == [len(network.structure.nodes) - 1]  # lambda = u: nothing comes after it
    weights = network.of_nodes(network.u if last else network.adjoints, which)
    for name, p in network.problem.parameters.items():
        zeros = p.detach().new_zeros(network.n, *p.shape)
        emit(name, Dense(_plus(zeros, weights, A[name]) if name in A else zeros))
    return _pass(network, None)


def coupled_pass(problem: Problem, notion: str, emit: Emit, verify: bool | None) -> tuple[Pass, str]:
    """``persample.gradients(coupled=notion)``: the pass, and a note on the result.

    Random numbers are drawn as by one forward pass; buffers (running statistics) stay as they are.
    """
    if not isinstance(notion, str) or notion not in NOTIONS:
        raise ArgumentError(f"coupled must be one of {list(NOTIONS)}, got {notion!r}.")
    network = Network(Point.of(problem))
    alone = notion == "eval" and network.n == 1  # there is nothing to verify, and no statistics of a batch
    if not alone and (verify or (verify is None and not verified(problem, "coupled"))):
        network.verify()
        remember(problem, "coupled")
    run = NOTIONS[notion](network, emit, None)

    if network.point.passes.drawn is not None:
        set_random_state(network.point.passes.drawn)
    note = f"coupled={notion!r}" + (", verify=False" if verify is False else "")
    return run, note


# ---- details --------------------------------------------------------------------------------------------------------


def _route(network: Network, samples: Tensor | None, size: int) -> str:
    return network.route or cheaper(network.n if samples is None else len(samples), size)


def _pass(network: Network, samples: Tensor | None) -> Pass:
    return _of(network, network.direct.run, samples)


def _of(network: Network, run: Pass, samples: Tensor | None) -> Pass:
    """What is said of these samples only."""
    if samples is None:
        return run
    assert run.losses is not None
    outputs = network.problem.batch.outputs(run.outputs).select(samples).whole()
    return replace(run, losses=run.losses[samples], outputs=outputs)


def _pick(x: Tensor, samples: Tensor | None) -> Tensor:
    return x if samples is None else x[samples]


def _rows(g: Factors, samples: Tensor | None) -> Factors:
    return g if samples is None else index(g, samples)


@kernel
def _plus(rows: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """``rows [N, *P] + weights [N, K] @ basis [K, *P]``."""
    flat = rows.reshape(len(rows), -1)
    return torch.addmm(flat, weights.to(rows.dtype), basis.reshape(len(basis), -1)).reshape(rows.shape)
