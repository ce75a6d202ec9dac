"""The table ``G [N, N, D]``: ``G[n, m] = dl_n/dtheta^(m)``, ``theta^(m)`` the copy of the parameters that sample ``m``
uses.

Row sums are the gradients of the losses, column sums what hooks return.  The table is never formed: the hook engine,
started with loss ``n`` alone, gives row ``n`` as factors, which are reduced on arrival.  Likewise for the derivatives
with respect to the inputs, ``dl_n/dx_m`` and ``df_n/dx_m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .. import reductions
from ..arguments import check_samples
from ..batch import Listed, Tree
from ..curvature.operator import unflatten
from ..errors import BatchNormError, DirectionError
from ..factors import Dense, Factors, dense, index
from ..quantities import add_up
from ..scratch import kernel
from ..state import seed_of
from .network import Network, cheaper
from .passes import Forward, Recorded
from .statistics import constant, live

R = TypeVar("R")
Direction = Mapping[str, Tensor]


def row(network: Network, n: int) -> dict[str, Factors]:
    """``G[n, :]``: row ``m`` is with respect to the parameters of sample ``m``.  One pass."""
    weight = torch.zeros_like(network.structure.losses)
    weight[n] = 1
    return transposed(network, weight)


def transposed(network: Network, weight: Tensor) -> dict[str, Factors]:
    """``G^T w``: row ``m`` is ``sum_n w[n] G[n, m]``.  One pass."""
    if not isinstance(weight, Tensor) or weight.shape != (network.n,):
        found = list(weight.shape) if isinstance(weight, Tensor) else repr(weight)
        raise DirectionError(f"coupling.T @ w needs a tensor with one weight per loss, [{network.n}], got {found}.")
    with network.point.recorded() as run:
        return _reduced(run, weight, lambda _, g: g)


def rows(network: Network, reduce: Callable[[str, Factors], R]) -> Iterator[dict[str, R]]:
    """Every row of the table in turn, each parameter's factors reduced on arrival: ``N`` backward passes."""
    with network.point.recorded() as run:
        for weight in torch.eye(network.n, dtype=run.losses.dtype, device=run.losses.device):
            yield _reduced(run, weight, reduce)


def _reduced(run: Recorded, weight: Tensor, reduce: Callable[[str, Factors], R]) -> dict[str, R]:
    parts: dict[str, R] = {}

    def emit(name: str, g: Factors) -> None:
        parts[name] = reduce(name, g)

    run.rows(emit, weight)
    return parts


def squared_norms(network: Network) -> dict[str, Tensor]:
    """``|G[n, m]|^2`` for every parameter, ``{name: [N, N]}``."""
    if not network.structure.size:  # the samples are independent
        return {name: torch.diag(reductions.row_dot(g, g)) for name, g in network.direct.factors.items()}
    found = list(rows(network, lambda _, g: reductions.row_dot(g, g)))
    return {name: torch.stack([parts[name] for parts in found]) for name in network.problem.parameters}


def column(network: Network, m: int) -> dict[str, Tensor]:
    """``G[:, m]``, ``{name: [N, *P]}``: by every row of the table, or by every statistic of sample ``m`` alone."""
    if (network.route or cheaper(network.n, 2 * network.structure.size)) == "statistics":
        return _column_by_statistics(network, m)
    found = list(rows(network, lambda _, g: dense(index(g, slice(m, m + 1)))[0].clone()))
    return {name: torch.stack([parts[name] for parts in found]) for name in network.problem.parameters}


@kernel
def _column_by_statistics(network: Network, m: int) -> dict[str, Tensor]:
    """``e_m d_m + share_m lambda a_m``, where ``a_m = dh_m/dtheta`` at fixed statistics."""
    shares, weights = [], [network.adjoints[:, :0]]
    with network.point.forward(constant) as run:
        for node, adjoint in zip(network.alive(run.nodes), network.by_node(network.adjoints), strict=True):
            for place in node.places(m):
                shares += [h[place] for h in node.moments]
                weights.append(adjoint * node.share[place].to(adjoint.dtype))
        a = network.jacobian(shares, list(network.problem.parameters))
    lambdas = torch.cat(weights, 1)
    result = {name: torch.tensordot(lambdas.to(x.dtype), x, 1) for name, x in a.items()}
    for name, g in network.direct.factors.items():
        result[name][m] += dense(index(g, slice(m, m + 1)))[0]
    return result


# ---- as an operator -------------------------------------------------------------------------------------------------


def directional(network: Network, v: Direction | Tensor) -> Tensor:
    """``[N]``: derivatives of all losses along ``v {name: [*P]}`` or flat ``[D]``, or ``{name: [N, *P]}``.

    The latter has a direction for every copy, and takes ``N`` passes; the former one derivative forward, as two in
    reverse.
    """
    parameters = network.problem.parameters
    v = _by_name(network, v) if isinstance(v, Tensor) else v
    if not isinstance(v, Mapping) or not all(isinstance(x, Tensor) for x in v.values()):
        raise DirectionError(f"a direction is a tensor [D], or {{name: tensor}}, got {type(v).__name__}.")
    if odd := v.keys() ^ parameters.keys():
        raise DirectionError(f"the direction needs an entry for each of {list(parameters)[:8]}; see {sorted(odd)[:4]}.")
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
    found = rows(network, lambda name, g: reductions.row_dot(g, each[name]).sum())
    return torch.stack([_sum(parts) for parts in found])


def _by_name(network: Network, v: Tensor) -> Direction:
    shapes = {name: p.shape for name, p in network.problem.parameters.items()}
    size = sum(shape.numel() for shape in shapes.values())
    if v.shape != (size,):
        raise DirectionError(f"a flat direction must have shape [{size}] for these parameters, got {list(v.shape)}.")
    return unflatten(v, shapes)


def _pushed(network: Network, run: Forward, directions: Iterable[Direction]) -> Iterator[Tensor]:
    """Directional derivatives of all losses, ``[N]`` each: the derivative in ``w`` of the gradient of ``w^T l``."""
    parameters = network.problem.parameters
    w = torch.zeros_like(run.losses, requires_grad=True)
    found = network.point.gradient([run.losses], list(parameters.values()), [w], again=True)
    pulled = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    for v in directions:
        along = [v[name].detach().to(g.dtype) for name, g in pulled.items()]
        (pushed,) = network.point.gradient(list(pulled.values()), [w], along)
        yield torch.zeros_like(run.losses) if pushed is None else pushed.detach()


# ---- sketches -------------------------------------------------------------------------------------------------------


def loss_squares(network: Network, probes: int, generator: torch.Generator | None) -> Tensor:
    """``|dl_n/dtheta|^2``, ``[N]``, estimated without bias from Gaussian directional derivatives: a pass for each."""

    def direction() -> Direction:
        shapes = network.problem.parameters.items()
        return {name: _gaussian(p, generator) for name, p in shapes}

    check_samples(probes, "probes", "directions")
    generator = _of_its_own(network, generator)
    with network.point.forward(live) as run:
        return add_up(x.square() for x in _pushed(network, run, (direction() for _ in range(probes)))) / probes


def outgoing_squares(network: Network, probes: int, generator: torch.Generator | None) -> Tensor:
    """``sum_n |G[n, m]|^2``, ``[N]``, estimated without bias from random signs of the losses: a pass for each."""
    check_samples(probes, "probes", "directions")
    generator = _of_its_own(network, generator)
    with network.point.recorded() as run:
        signs = (_signs(run.losses, generator) for _ in range(probes))
        return add_up(_sum(_reduced(run, w, lambda _, g: reductions.row_dot(g, g))) for w in signs) / probes


# ---- inputs ---------------------------------------------------------------------------------------------------------


def input_squares(network: Network) -> Tensor:
    """``|dl_n/dx_m|^2``, ``[N, N]``: ``N`` backward passes."""
    with network.forward(inputs=True) as run:
        return _input_squares(network, run.inputs, run.losses)


def output_input_squares(network: Network, probes: int | None, generator: torch.Generator | None) -> Tensor:
    """``|df_n/dx_m|_F^2``, ``[N, N]``, by a backward pass for every output of every sample.

    Or estimated without bias from ``probes`` random signs over each sample's outputs, ``N`` passes each.
    """
    if probes is not None:
        check_samples(probes, "probes", "directions")
        generator = _of_its_own(network, generator)
    with network.forward(inputs=True) as run:
        leaves = network.problem.batch.outputs(run.outputs).sampled()
        outs = [x.movedim(axis, 0).reshape(network.n, -1) for x, axis in leaves if x.requires_grad]
        if not outs:
            raise BatchNormError("no output with a sample axis depends on the inputs. Say where it is with batch_dim=.")
        f = torch.cat([x.to(run.losses.dtype) for x in outs], 1)  # [N, O]
        if probes is None:
            return _input_squares(network, run.inputs, f.reshape(-1)).view(*f.shape, network.n).sum(1)
        signed = ((f * _signs(f, generator)).sum(1) for _ in range(probes))
        return add_up(_input_squares(network, run.inputs, y) for y in signed) / probes


def _input_squares(network: Network, inputs: Tree, out: Tensor) -> Tensor:
    """``[R, N]``: squared norms of ``d out_r / dx_m``."""
    leaves = [(x, axis) for x, axis in inputs.sampled() if x.requires_grad]
    if any(type(x) is Listed for x in inputs.leaves):
        raise BatchNormError("of inputs in a list (batch_dim=list), derivatives are not taken: pad them to a tensor.")
    if not leaves:
        raise BatchNormError("no input with a sample axis is of floating type: there is no derivative to take.")
    squares = out.detach().new_zeros(len(out), network.n)
    step = network.step(sum(x.numel() for x, _ in leaves))
    for at, grads in network.point.rows(out, [x for x, _ in leaves], step):
        for g, (_, axis) in zip(grads, leaves, strict=True):
            if g is not None:
                squares[at] += g.movedim(axis + 1, 1).reshape(len(g), network.n, -1).abs().square().sum(2)
    return squares


def _of_its_own(network: Network, generator: torch.Generator | None) -> torch.Generator:
    """One that is seeded before the pass, where every pass puts the global one into the same state."""
    if generator is None:
        generator = torch.Generator(network.structure.losses.device).manual_seed(seed_of(None))
    return generator


def _gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Of variance one, also the real and the imaginary part each."""
    kind, parts = like.dtype.to_real(), (2,) if like.is_complex() else ()
    drawn = torch.randn(*like.shape, *parts, dtype=kind, device=like.device, generator=generator)
    return torch.view_as_complex(drawn) if like.is_complex() else drawn


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def _sum(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)
