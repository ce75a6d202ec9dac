"""The table ``G [N, N, D]``: ``G[n, m] = dl_n/dtheta^(m)``, with ``theta^(m)`` the copy of the parameters that sample
``m`` uses.

Row sums are the gradients of the losses, column sums what hooks return.  The table is never formed: the hook engine,
started with loss ``n`` alone, gives row ``n`` as factors, ``N`` rows of which each is reduced on arrival.  The same
for the derivatives with respect to the inputs, ``dl_n/dx_m``, and of the outputs, ``df_n/dx_m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .. import reductions
from ..batch import Tree
from ..errors import BatchNormError, DirectionError
from ..factors import Dense, Factors, dense, index
from .network import Network, cheaper
from .passes import Forward, Recorded
from .statistics import constant, live

R = TypeVar("R")


def row(network: Network, n: int) -> dict[str, Factors]:
    """``G[n, :]``: row ``m`` is with respect to the parameters of sample ``m``.  One pass."""
    with network.point.recorded() as run:
        return _row(network, run, n)


def rows(network: Network, reduce: Callable[[str, Factors], R]) -> Iterator[dict[str, R]]:
    """Every row of the table in turn, each parameter's factors reduced on arrival: ``N`` backward passes, one forward
    pass.
    """
    with network.point.recorded() as run:
        for n in range(network.n):
            parts: dict[str, R] = {}
            run.rows(lambda name, g, parts=parts: parts.__setitem__(name, reduce(name, g)), _one(network, n))
            yield parts


def squared_norms(network: Network) -> dict[str, Tensor]:
    """``|G[n, m]|^2`` of every parameter, ``{name: [N, N]}``."""
    names = list(network.problem.parameters)
    if not network.structure.size:
        own = {name: reductions.row_dot(g, g) for name, g in network.direct.factors.items()}
        return {name: torch.diag(own[name]) for name in names}
    found = list(rows(network, lambda _, g: reductions.row_dot(g, g)))
    return {name: torch.stack([parts[name] for parts in found]) for name in names}


def column(network: Network, m: int) -> dict[str, Tensor]:
    """``G[:, m]``, ``{name: [N, *P]}``: by every row of the table, or by every statistic of sample ``m`` alone.

    ``G[:, m] = e_m d_m + (1/N) lambda a_m``, where ``a_m = dh_m/dtheta`` at fixed statistics.
    """
    names = list(network.problem.parameters)
    m = range(network.n)[m]
    if (network.route or cheaper(network.n, 2 * network.structure.size)) == "samples":
        found = list(rows(network, lambda _, g: dense(index(g, slice(m, m + 1)))[0].clone()))
        return {name: torch.stack([parts[name] for parts in found]) for name in names}
    with network.point.forward(constant) as run:
        shares, weights = [], []
        for node, adjoint in zip(network.alive(run.nodes), network.by_node(network.adjoints), strict=True):
            place = m if node.members is None else int((node.members == m).nonzero().sum())
            present = node.members is None or bool((node.members == m).any())
            shares += [h[place] for h in node.moments] if present else []
            weights += [adjoint / len(node.moments[0])] if present else []
        a = network.jacobian(shares, names)
    weight = torch.cat([network.adjoints[:, :0], *weights], 1)
    result = {name: torch.tensordot(weight.to(x.dtype), x, 1) for name, x in a.items()}
    for name, g in network.direct.factors.items():
        result[name][m] += dense(index(g, slice(m, m + 1)))[0]
    return result


def transposed(network: Network, weight: Tensor) -> dict[str, Factors]:
    """``G^T w``: row ``m`` is ``sum_n w[n] G[n, m]``.  One pass."""
    if weight.shape != (network.n,):
        raise DirectionError(f"coupling.T @ w needs one weight per loss, [{network.n}], got {list(weight.shape)}.")
    factors: dict[str, Factors] = {}
    with network.point.recorded() as run:
        run.rows(factors.__setitem__, weight)
    return {name: factors[name] for name in network.problem.parameters}


def directional(network: Network, v: Mapping[str, Tensor]) -> Tensor:
    """``[N]``: derivatives of all losses along ``v {name: [*P]}``, or ``{name: [N, *P]}`` with a direction for every copy.

    The former is one derivative forward, as two in reverse; the latter takes ``N`` passes.
    """
    parameters = network.problem.parameters
    if odd := v.keys() ^ parameters.keys():
        raise DirectionError(f"the direction must have one tensor for each of {list(parameters)[:8]}; see {sorted(odd)[:4]}.")
    if all(v[name].shape == p.shape for name, p in parameters.items()):
        with network.point.forward(live) as run:
            return next(_pushed(network, run, [v]))
    for name, p in parameters.items():
        if v[name].shape != (network.n, *p.shape):
            raise DirectionError(
                f"the direction for '{name}' must have shape {list(p.shape)}, or {[network.n, *p.shape]} with one for "
                f"every copy, got {list(v[name].shape)}."
            )
    each = {name: Dense(x.detach()) for name, x in v.items()}
    return torch.stack([_sum(parts).sum() for parts in rows(network, lambda name, g: reductions.row_dot(g, each[name]))])


def _pushed(network: Network, run: Forward, directions: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """Directional derivatives of all losses, ``[N]`` each: the derivative in ``w`` of the gradient of ``w^T l``."""
    parameters = network.problem.parameters
    w = torch.zeros_like(run.losses, requires_grad=True)
    found = network.point.gradient([run.losses], list(parameters.values()), [w], again=True)
    pulled = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    for v in directions:
        (pushed,) = network.point.gradient(
            list(pulled.values()), [w], [v[name].detach().to(g.dtype) for name, g in pulled.items()]
        )
        yield torch.zeros_like(run.losses) if pushed is None else pushed.detach()


def loss_squares(network: Network, probes: int, generator: torch.Generator | None) -> Tensor:
    """``|dl_n/dtheta|^2``, ``[N]``, estimated without bias from Gaussian directional derivatives: a pass for each."""

    def normal(p: Tensor) -> Tensor:
        return torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)

    parameters = network.problem.parameters
    directions = ({name: normal(p) for name, p in parameters.items()} for _ in range(probes))
    with network.point.forward(live) as run:
        return _mean(x.square() for x in _pushed(network, run, directions))


def outgoing_squares(network: Network, probes: int, generator: torch.Generator | None) -> Tensor:
    """``sum_n |G[n, m]|^2``, ``[N]``, estimated without bias from random signs of the losses: a pass for each."""

    def squares(run: Recorded) -> Tensor:
        parts: dict[str, Tensor] = {}
        run.rows(lambda name, g: parts.__setitem__(name, reductions.row_dot(g, g)), signs(run.losses, generator))
        return _sum(parts)

    with network.point.recorded() as run:
        return _mean(squares(run) for _ in range(probes))


# ---- inputs ---------------------------------------------------------------------------------------------------------


def input_squares(network: Network) -> Tensor:
    """``|dl_n/dx_m|^2``, ``[N, N]``: ``N`` backward passes."""
    with network.point.forward(inputs=True) as run:
        return _input_squares(network, run.inputs, run.losses)


def output_input_squares(network: Network, probes: int | None, generator: torch.Generator | None) -> Tensor:
    """``|df_n/dx_m|_F^2``, ``[N, N]``: a backward pass for every output of every sample; or estimated without bias from
    ``probes`` random signs over each sample's outputs, ``N`` passes each.
    """
    with network.point.forward(inputs=True) as run:
        tree = network.problem.batch.outputs(run.outputs)
        outs = [x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None] for x, axis in tree.tensors() if axis is not None and x.requires_grad]
        if not outs:
            raise BatchNormError("none of the outputs has a sample axis and depends on the inputs (say where it is with batch_dim=).")
        f = torch.cat([x.to(run.losses.dtype) for x in outs], 1)  # [N, O]
        if probes is None:
            squares = _input_squares(network, run.inputs, f.reshape(-1))
            return squares.view(network.n, f.shape[1], network.n).sum(1)
        return _mean(_input_squares(network, run.inputs, (f * signs(f, generator)).sum(1)) for _ in range(probes))


def _input_squares(network: Network, inputs: Tree, out: Tensor) -> Tensor:
    """``[R, N]``: squared norms of ``d out_r / dx_m``."""
    leaves = [(x, axis) for x, axis in inputs.tensors() if axis is not None and x.requires_grad]
    if not leaves:
        raise BatchNormError("no input with a sample axis is of floating type, so there is no derivative with respect to inputs.")
    squares = out.detach().new_zeros(len(out), network.n)
    for at, grads in network.point.rows(out, [x for x, _ in leaves], network.step(sum(x.numel() for x, _ in leaves))):
        for g, (_, axis) in zip(grads, leaves, strict=True):
            if g is not None:
                squares[at] += g.movedim(axis + 1, 1).reshape(len(g), network.n, -1).square().sum(2)
    return squares


def _row(network: Network, run: Recorded, n: int) -> dict[str, Factors]:
    factors: dict[str, Factors] = {}
    run.rows(factors.__setitem__, _one(network, n))
    return {name: factors[name] for name in network.problem.parameters}


def _one(network: Network, n: int) -> Tensor:
    weight = torch.zeros_like(network.structure.losses)
    weight[n] = 1
    return weight


def signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def _sum(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


def _mean(values: Iterable[Tensor]) -> Tensor:
    first, *rest = values
    for value in rest:
        first = first + value
    return first / (1 + len(rest))
