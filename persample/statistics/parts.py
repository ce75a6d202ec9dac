"""What the statistics are made of: numbers that add up over parameters, so that every statistic exists per layer too.

A statistic is a *formula* of a few parts, each ``{parameter name: tensor}``; parts of one group of parameters are added
before the formula is applied.  ``by=None`` means one group (the whole model), ``by="layer"`` groups parameters by the
module that owns them, ``by="parameter"`` takes each alone, and any function from a name to a group's name will do.

Parts can be had from `Gradients` (rows), from `Statistics` (a run with ``quantities=``, if what is needed was asked
for; a Gram matrix serves for norms and for the norm of the mean), and, but for Grams, from `DatasetMoments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..attribution.called import called
from ..errors import ArgumentError, EmptyBatchError, QuantityError, warn
from ..factors import dense, index
from ..gradients import Gradients
from ..quantities import COUPLED, NEEDS, Quantities, add_up, notion_of
from ..statistics_run import Statistics

BLOCK = 1 << 21  # entries of G at a time

LOST = (
    "the noise along the mean gradient, or across it, is so small that inner products can't tell it in this precision: "
    "keep the rows, by leaving quantities= out."
)

By = Callable[[str], str] | str | None
Part = Mapping[str, Tensor]


@runtime_checkable
class HasMoments(Protocol):
    """Mean and variance per parameter of ``len()`` samples: one batch, or a data set."""

    def __len__(self) -> int: ...
    def mean(self) -> dict[str, Tensor]: ...
    def second_moment(self) -> dict[str, Tensor]: ...
    def variance(self, ddof: int = 0) -> dict[str, Tensor]: ...


def per_group(by: By, formula: Callable[..., Any], *parts: Part) -> Any:
    """``formula`` of the parts added up: its value for the whole model, or ``{group: value}``."""
    if by is None:
        return formula(*(add_up(part.values()) for part in parts))
    groups: dict[str, list[str]] = {}
    for name in parts[0]:
        groups.setdefault(group_of(name, by), []).append(name)
    return {
        group: formula(*(add_up(part[name] for name in names) for part in parts)) for group, names in groups.items()
    }


def group_of(name: str, by: By) -> str:
    """The name of the group that a parameter belongs to."""
    if callable(by):
        return by(name)
    if by in ("parameter", None):
        return name
    if by == "layer":
        return name.rpartition(".")[0] or name
    raise ArgumentError(f"by must be None, 'layer', 'parameter' or a function of the parameter's name, got {by!r}.")


def named(function: Callable[..., Any] | str | None) -> str | None:
    """What stands for ``by``, or for a statistic, in a state: the name of a function, and what it is set to."""
    return called(function) if callable(function) else function


# ---- parts ------------------------------------------------------------------------------------------------------


def squares(G: Quantities) -> Part:
    """``{name: |g_n|^2}``, ``[N]`` each."""
    if _lacks(G, "squares") and not _lacks(G, "gram"):
        return {name: K.diagonal().real for name, K in G.gram(per_parameter=True).items()}
    return G.squared_norm(per_parameter=True)  # type: ignore[no-any-return]


def square_total(G: HasMoments) -> Part:
    """``{name: sum_n |g_n|^2}``."""
    if not isinstance(G, Quantities) or (_lacks(G, "squares") and not _lacks(G, "mean_square")):
        return {name: len(G) * m.sum() for name, m in G.second_moment().items()}
    if _lacks(G, "squares") and _lacks(G, "gram") and not _lacks(G, "variance"):
        squared = mean_square(G)
        return {name: len(G) * (v.sum() + squared[name]) for name, v in G.variance(0).items()}
    return {name: s.sum() for name, s in squares(G).items()}


def mean_square(G: HasMoments) -> Part:
    """``{name: |gbar|^2}``, of the mean gradient ``gbar``."""
    if _lacks(G, "sum") and not _lacks(G, "gram"):
        assert isinstance(G, Quantities)
        return {name: K.double().mean().to(K.dtype) for name, K in products(G).items()}
    return {name: energy(m).sum() for name, m in means(G).items()}


def divisor(G: HasMoments, by: By = None) -> Part:
    """`mean_square`, to be divided by: inner products alone know it to ``1/N`` of the rounding of a squared norm."""
    found = mean_square(G)
    if _lacks(G, "sum") and not _lacks(G, "gram"):
        sizes = {name: total / len(G) ** 2 for name, total in square_total(G).items()}
        refuse(
            per_group(by, cancelled, found, sizes),
            "the mean gradient is so small against the gradients of samples that inner products can't tell it in this "
            "precision: ask for 'mean' too, quantities=[..., 'mean'], or keep the rows.",
        )
    return found


def means(G: HasMoments) -> Part:
    """``{name: [*P]}``: means that are not rounded to half precision, as parameters may be."""
    return G.wide_mean() if isinstance(G, Quantities) else G.mean()


def energy(x: Tensor) -> Tensor:
    """``|x|^2`` of every entry, in no less than single precision: squares of half precision are often zero."""
    x = x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))
    return (x * x.conj()).real if x.is_complex() else x.square()


def centred_total(G: HasMoments, mean_squares: Part | None = None, by: By = None) -> Part:
    """``{name: sum_n |g_n - gbar|^2}``, the trace of the scatter matrix; ``mean_squares`` where they are there anyway.

    From norms it is the difference ``sum |g|^2 - N |gbar|^2``, which loses digits where the noise is tiny against the
    gradient.  Where half of them are gone, rows are centred before squaring instead; without rows, `QuantityError`
    (if that is so for the sum over a group of ``by``).
    """
    if not isinstance(G, Quantities) or (isinstance(G, Statistics) and not _lacks(G, "variance")):
        return {name: len(G) * v.sum() for name, v in G.variance(0).items()}
    totals, mean_squares = square_total(G), mean_square(G) if mean_squares is None else mean_squares
    differences = {name: total - len(G) * mean_squares[name] for name, total in totals.items()}
    if isinstance(G, Gradients):
        for name, difference in differences.items():
            if cancelled(difference, totals[name]):
                differences[name] = len(G) * G.select([name]).variance(0)[name].sum()
    else:
        refuse(
            per_group(by, cancelled, differences, totals),
            "the noise is so small against the mean gradient that norms (or inner products) and mean can't tell it in "
            "this precision: ask for 'variance' too, quantities=[..., 'variance'], or keep the rows.",
        )
    return differences


def cancelled(difference: Tensor, total: Tensor) -> bool:
    """Whether a difference has lost half of the digits of what it was taken from."""
    return bool(difference < torch.finfo(total.dtype).eps ** 0.5 * total)


def refuse(lost: Any, message: str) -> None:
    """Raise where a number, or that of any group, is lost."""
    if any(lost.values()) if isinstance(lost, dict) else lost:
        raise QuantityError(message)


def products(G: Quantities) -> Part:
    """``{name: K}``, the Gram matrix ``[N, N]`` of every parameter's rows; of complex ones, its real part."""
    if not isinstance(G, Quantities):
        raise QuantityError("moments say nothing about pairs of samples: this needs rows, or quantities=['gram'].")
    return {name: K.real for name, K in G.gram(per_parameter=True).items()}


def along_mean(G: Quantities, from_rows: bool = False) -> Part:
    """``{name: (g_n - gbar) . gbar}``, ``[N]``: without the Gram matrix where the rows are there, which are centred
    first (``from_rows``) where the difference would lose half of its digits.
    """
    found = {}
    if not isinstance(G, Gradients):
        for name, K in products(G).items():
            row = K.double().mean(1)  # whose rounding is not that of K
            found[name] = (row - row.mean()).to(K.dtype)
        return found
    for name, mean in means(G).items():
        along, square = G.select([name]).dot({name: mean}).real, energy(mean).sum()
        found[name] = along - square
        if from_rows or cancelled(found[name].square().mean().sqrt(), square):
            pieces = (((g - mean) * mean.conj()).real for _, g in blocks(G, name))
            found[name] = torch.cat([x.reshape(len(x), -1).sum(1) for x in pieces])
    return found


def across_mean(G: Quantities, mean_squares: Part, by: By = None) -> Part:
    """``{name: sum_n |g_n - gbar - s_n gbar|^2}``, with ``s_n = (g_n - gbar) . gbar / |gbar|^2`` of the group: what
    the scatter has across the mean.  From rows where the difference of the two loses digits, as in `centred_total`.
    """

    def shares(along: Part) -> Part:
        found = per_group(by, lambda a, square: a / square, along, mean_squares)
        return {name: found if by is None else found[group_of(name, by)] for name in along}

    centred, along = centred_total(G, mean_squares, by), along_mean(G)
    within = {name: s.square().sum() * mean_squares[name] for name, s in shares(along).items()}
    found = {name: centred[name] - 2 * (s * along[name]).sum() + within[name] for name, s in shares(along).items()}
    if not isinstance(G, Gradients):

        def lost(across: Tensor, centred: Tensor, square: Tensor) -> bool:
            return cancelled(across, centred + len(G) * torch.finfo(square.dtype).eps * square)

        refuse(per_group(by, lost, found, centred, mean_squares), LOST)
    elif any(cancelled(found[name], centred[name] + size) for name, size in within.items()):
        for name, s in shares(along_mean(G, from_rows=True)).items():
            mean = G.select([name]).wide_mean()[name]
            rests = (g - mean - s[i].view(-1, *[1] * mean.ndim) * mean for i, g in blocks(G, name))
            found[name] = add_up(energy(rest).sum() for rest in rests)
    return found


def blocks(G: Gradients, name: str) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a parameter, a block of samples at a time."""
    g = G.factors[name]
    step = max(1, BLOCK // max(1, g.shape.numel()))
    for start in range(0, len(g), step):
        samples = slice(start, start + step)
        yield samples, dense(index(g, samples))


def _lacks(G: object, kind: str) -> bool:
    return isinstance(G, Statistics) and all(NEEDS[name] != kind for name in G.requests)


def mean_loss(G: HasMoments) -> Tensor:
    """The mean of the losses, in no less than single precision; NaN where somebody else owns them."""
    losses: Tensor | None = getattr(G, "losses", None)
    if losses is None:
        return torch.tensor(torch.nan, device="cpu")
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()


def check_measured(G: Any) -> None:
    """Raise for what holds nothing of the gradients of samples, or of none."""
    if not isinstance(G, (Quantities, HasMoments)):
        raise ArgumentError(
            f"G must be what persample.gradients(...) returns, or moments of a data set, got {type(G).__name__}."
        )
    if not len(G):
        raise EmptyBatchError("there is no sample in G, and statistics are of one at least: leave empty batches out.")


def check_drawn(G: object) -> None:
    """Warn of rows whose spread isn't how much a batch gradient varies: those of a coupled batch (of parameters behind
    batch statistics, too), but for the two notions that are meant for it.
    """
    if (notion := notion_of(G)) in ("loss", "copy", "frozen", COUPLED):
        rows = "of coupled samples" if notion == COUPLED else f"of coupled={notion!r}"
        warn(
            f"rows {rows} don't tell how much a batch gradient varies, for a sample also acts through all others: "
            "for gradient noise under BatchNorm take persample.gradients(..., coupled='influence') ('eval': of the "
            "model with its running statistics); under a loss that compares samples, gradients of whole batches of two "
            "sizes (statistics.noise_scale_of_two)."
        )


def several(G: HasMoments, what: str) -> int:
    """``N``, which must be at least two."""
    check_measured(G)
    if len(G) < 2:
        raise QuantityError(f"{what} compares samples with each other: it needs at least 2 of them, but N = {len(G)}.")
    return len(G)
