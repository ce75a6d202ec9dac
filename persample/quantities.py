"""The named quantities: what `Gradients` and `Statistics` answer, each a line or two over parts.

A *part* is what one parameter contributes: a primitive of `persample.reductions` applied to its factors.  In *sample
space* (``[N]``, ``[N, M]``) the parts of all parameters add up; in *parameter space* (``[*P]``) they stay apart, in a
dictionary.  A new quantity is a method of `Quantities`, and a line in `NEEDS` if a statistics run shall offer it.

Rows are gradients of *unscaled* per-sample losses, and ``mean`` is over the ``N`` samples of the batch.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Size, Tensor
from torch.utils._pytree import tree_leaves

from . import display, reductions
from .errors import BatchCoupledError, QuantityError, UnknownParameterError, warn
from .factors import Factors, strided
from .kept import PAST, Elsewhere, Stamp, stamps
from .replicas import check_only_copy
from .streaming import joined

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Parts = dict[str, Any]
Direction = Mapping[str, Tensor] | Tensor


class Projects(Protocol):
    """A projection that applies itself to factors, parameter by parameter (`persample.attribution.Projection`)."""

    def part(self, name: str, g: Factors) -> Tensor:
        """``G R`` for one parameter, ``[N, k]``; ``name`` is that in the model itself, whatever was put around it."""


def _moments(g: Factors) -> tuple[Tensor, Tensor]:
    total, centred = reductions.moments(g)
    return total, centred.div_(len(g))  # in place: fresh memory for it costs as much as computing it


# What one parameter contributes: (its factors, its piece of the argument) -> part.
PARTS: dict[str, Callable[[Factors, Any], Any]] = {
    "squares": lambda g, _: reductions.row_dot(g, g),  # [N]
    "gram": lambda g, _: reductions.gram(g, g),  # [N, N]
    "sum": lambda g, _: reductions.weighted_sum(g),  # [*P]
    "mean_square": lambda g, _: reductions.square_sum(g).div_(len(g)),  # [*P]
    "moments": lambda g, _: _moments(g),  # (sum, variance), [*P] each
    "variance": lambda g, _: reductions.centred(g).div_(len(g)),  # [*P]
    "dot": reductions.dot,  # [N]
    "project": lambda g, r: r(g) if callable(r) else reductions.project(g, r),  # [N, k]
}

# Parts for which most forms stream their rows, and how they are put together from those of pieces of the parameter:
# (parts, how it was split, its shape) -> part.
READERS: dict[str, Callable[[list[Any], str, Size], Any]] = {
    "gram": lambda parts, split, shape: functools.reduce(Tensor.add_, parts),
    "mean_square": joined,
    "moments": lambda parts, split, shape: tuple(joined(list(p), split, shape) for p in zip(*parts, strict=True)),
    "variance": joined,
}

# Parts that are read off another one, where a run computes that anyway: (that part, N) -> part.
READ_OFF: dict[str, tuple[str, Callable[[Any, int], Any]]] = {
    "squares": ("gram", lambda products, _: products.diagonal().clone()),
    "sum": ("moments", lambda pair, _: pair[0]),
    "variance": ("moments", lambda pair, _: pair[1]),
    "mean_square": ("moments", lambda pair, n: (pair[0] * pair[0].conj()).real.div_(n * n).add_(pair[1])),
}

# The part each quantity of a statistics run is made of.
NEEDS: dict[str, str] = {
    "norm": "squares",
    "squared_norm": "squares",
    "clip": "squares",
    "gram": "gram",
    "cosine": "gram",
    "sum": "sum",
    "mean": "sum",
    "second_moment": "mean_square",
    "variance": "variance",
    "std": "variance",
    "dot": "dot",
    "project": "project",
}


class Quantities(abc.ABC):
    """Everything that can be asked of the per-sample gradients of one batch."""

    losses: Tensor | None  # [N], detached; None where somebody else owns the loss (`persample.extend` with a callback)
    outputs: Any
    names: tuple[str, ...]
    unused: tuple[str, ...]  # of the names, those of parameters that no loss depends on
    shapes: dict[str, torch.Size]
    _parameters: Mapping[str, Tensor]  # what `backward` writes to
    _at: dict[str, Stamp]  # what these were when the run ended
    _wrapper: str  # what is before names only because something was put around the model (`persample.state.unwrapped`)

    @abc.abstractmethod
    def _parts(self, kind: str, argument: Any = None) -> Parts:
        """``{name: part}``, with an argument split by parameter where there is one."""

    @abc.abstractmethod
    def _weighted(self, weight: Tensor | None) -> dict[str, Tensor]:
        """``weight^T G`` for every parameter, in no less than single precision."""

    @abc.abstractmethod
    def _kind(self, name: str) -> torch.dtype:
        """The type of the rows of a parameter, which is that of sums that are handed out."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of samples ``N``."""

    def of_versions(self, seen: Mapping[int, int]) -> None:
        """Say of which versions of the parameters the rows are, ``{id: version}``, where it isn't those of now."""
        for name, p in self._parameters.items():
            version, place = self._at[name]
            self._at[name] = seen.get(id(p), version), place

    def _moved(self) -> list[str]:
        """The parameters that were written to since the run, of those that there are."""
        now = stamps(self._parameters)
        return [name for name, before in self._at.items() if now.get(name, before) != before]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at": dict.fromkeys(self._moved(), PAST)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._at = {**stamps(self._parameters), **state.get("_at", {})}  # a copy's tensors begin to count changes anew
        self._parameters = Elsewhere(self._parameters)

    # ---- sample space: parameters add up ------------------------------------------------------------------------

    def squared_norm(self, per_parameter: bool = False) -> Any:
        """``diag(G G^T)``, ``[N]``: the squared L2 norm of every sample's gradient; ``{name: [N]}`` per parameter."""
        parts = self._parts("squares")
        return dict(parts) if per_parameter else add_up(parts.values())

    def norm(self, per_parameter: bool = False) -> Any:
        """``[N]``: the L2 norm of every sample's gradient, over all parameters; ``{name: [N]}`` per parameter."""
        squares = self.squared_norm(per_parameter)
        return {name: s.sqrt() for name, s in squares.items()} if per_parameter else squares.sqrt()

    def gram(self, other: Quantities | None = None, per_parameter: bool = False) -> Any:
        """``G H^T``, ``[N, M]``: inner products of all rows with those of ``other`` (by default with themselves); of
        complex entries, those of their real and imaginary parts (the real part of ``G H^*``).
        """
        parts = self._parts("gram") if other is None or other is self else self._cross(other)
        return dict(parts) if per_parameter else add_up(parts.values())

    def _cross(self, other: Quantities) -> Parts:
        raise QuantityError(
            "the inner products with another batch need the rows of both: compute gradients without quantities=."
        )

    def cosine(self, other: Quantities | None = None) -> Tensor:
        """``[N, M]``: cosines between all rows; 0 where a row is 0."""
        products = self.gram(other)
        if other is None or other is self:
            mine = theirs = products.diagonal().sqrt()
        else:
            mine, theirs = self.norm(), other.norm()
        scale = mine[:, None] * theirs[None, :]
        return torch.where(scale == 0, 0.0, products / scale)  # NaN stays NaN

    def dot(self, direction: Direction) -> Tensor:
        """``G v``, ``[N]``: the derivative of every sample's loss along ``direction``, ``{name: [*P]}`` or flat
        ``[D]``.
        """
        return add_up(self._parts("dot", direction).values())

    def project(self, projection: Mapping[str, Tensor] | Tensor | Projects) -> Tensor:
        """``G R``, ``[N, k]``: rows times ``{name: [*P, k]}``, a flat ``[D, k]``, or a
        `persample.attribution.Projection`.
        """
        return add_up(self._parts("project", projection).values())

    # ---- parameter space: parameters stay apart -----------------------------------------------------------------

    def sum(self, weight: Tensor | None = None) -> dict[str, Tensor]:
        """``sum_n weight[n] G_n``, ``{name: [*P]}``: with no weight, the gradient of the summed loss."""
        return self._rounded(self._weighted(weight))

    def mean(self) -> dict[str, Tensor]:
        """``(1/N) sum_n G_n``, ``{name: [*P]}``: the gradient of the mean loss."""
        return self._rounded(self.wide_mean())

    def wide_mean(self) -> dict[str, Tensor]:
        """`mean` in no less than single precision: for what is computed from it."""
        return {name: total / len(self) for name, total in self._weighted(None).items()}

    def _rounded(self, sums: Parts) -> dict[str, Tensor]:
        return {name: total.to(self._kind(name)) for name, total in sums.items()}

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """``sum_n min(1, max_norm / |G_n|) G_n``, ``{name: [*P]}``: the sum of rows, each clipped to an L2 norm over
        all parameters of at most ``max_norm`` (Abadi et al. 2016, algorithm 1, without noise and not divided by N).

        Of coupled samples (BatchNorm in training mode), that bounds the rows, but not what a sample adds to the sum, as
        it also moves the rows of all others: optimizers that clip refuse them.
        """
        return self._rounded(self.wide_clip(max_norm))

    def wide_clip(self, max_norm: float) -> dict[str, Tensor]:
        """`clip` in no less than single precision: for what is computed from it."""
        check_max_norm(max_norm)
        norm = self.norm()
        weight = torch.where(norm > max_norm, max_norm / norm, 1.0)
        return self._weighted(weight.masked_fill(norm.isinf(), torch.nan))  # not 0, which would drop the row unseen

    def second_moment(self) -> dict[str, Tensor]:
        """``(1/N) sum_n G_n^2``, ``{name: [*P]}``: the mean of squares, not centred."""
        return dict(self._parts("mean_square"))

    def variance(self, ddof: int = 0) -> dict[str, Tensor]:
        """``1/(N - ddof) sum_n (G_n - mean)^2``, ``{name: [*P]}``: centred before squaring, never negative."""
        check_ddof(ddof)
        if len(self) <= ddof:
            raise QuantityError(f"a variance with ddof={ddof} needs more than {ddof} sample(s), but N = {len(self)}.")
        found, n = dict(self._parts("variance")), len(self)
        return found if not ddof else {name: variance * (n / (n - ddof)) for name, variance in found.items()}

    def std(self, ddof: int = 0) -> dict[str, Tensor]:
        """The square root of `variance`, ``{name: [*P]}``."""
        return {name: v.sqrt() for name, v in self.variance(ddof).items()}

    def backward(self, weight: Tensor | None = None) -> None:
        """Add ``sum_n weight[n] G_n`` to ``.grad`` of the parameters in ``names``; ``None`` means 1/N each, the mean
        loss.  A ``.grad`` of ``None`` stays that for `unused` parameters, as it does in ``loss.backward()``: optimizers
        leave these alone.

        It is the gradient of the weighted loss.  Where rows of a notion (``coupled=``) don't add up to that, it raises
        `BatchCoupledError`: those of "frozen" never do, those of "copy" and "influence" with equal weights only.  Rows
        of "eval" are of another function, the model with its running statistics: a warning says so.

        A copy (deepcopy, pickle) that was made together with the model, as ``copy.deepcopy((model, G))``, writes into
        the copied model; one of the result alone has none to write to, and raises.  So do gradients of a
        `DistributedDataParallel` of several processes, outside of its ``no_sync()``: nothing sums them over processes.
        """
        if missing := [name for name in self.names if name not in self._parameters]:
            raise QuantityError(
                f"there is no parameter '{missing[0]}' of a model to write to: these gradients were copied without its "
                "model, or made without parameters=. Copy both together (copy.deepcopy((model, G)), or one pickle), or "
                f"write what mean() or sum(weight) returns: p.grad = G.mean()['{missing[0]}']."
            )
        check_only_copy((self._parameters[name] for name in self.names), "G.backward()", local=True)
        sums = self.mean() if weight is None else self.sum(weight)
        check_adds_up(self, weight)
        if notion_of(self) == "eval":
            warn(
                "rows of coupled='eval' are of the model with its running statistics: what backward() writes into "
                ".grad is the gradient of that loss, not of the one that the model has in training mode "
                "(coupled='loss' or 'copy'). To train with fixed statistics, .eval() the BatchNorm layers and leave "
                "coupled= out."
            )
        for name, value in sums.items():
            p = self._parameters[name]
            if p.grad is None and name in self.unused:
                continue
            value = value.to(p.dtype)
            p.grad = value if p.grad is None else value + p.grad  # which may be sparse

    # ---- to be looked at ----------------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the gradient norms of the samples; draws into ``ax`` if given, and returns the axes.

        Needs matplotlib, the extra ``persample[plot]``.
        """
        return display.plot_norms(self, ax)

    def _complex(self) -> bool:
        """Whether any rows may be complex."""
        return any(p.is_complex() for p in self._parameters.values()) or not self._parameters

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _split(self, kind: str, argument: Any) -> dict[str, Any]:
        """The piece of a direction or projection that belongs to each parameter."""
        what = "projection" if kind == "project" else "direction"
        if hasattr(argument, "part"):
            own = {name: name.removeprefix(self._wrapper) for name in self.names}
            return {name: lambda g, name=name: argument.part(own[name], g) for name in self.names}
        behind = 1 if kind == "project" else 0
        given = tree_leaves(argument)
        if any(isinstance(x, Tensor) and x.is_complex() for x in given) and not self._complex():
            raise QuantityError(
                f"the {what} is complex, but the rows are real: give its real and imaginary part apart."
            )
        if isinstance(argument, Tensor):
            size = sum(shape.numel() for shape in self.shapes.values())
            if argument.ndim != 1 + behind or len(argument) != size or 0 in argument.shape[1:]:
                raise QuantityError(
                    f"a flat {what} must have shape [{size}{', k' * behind}] for these parameters, got "
                    f"{list(argument.shape)}."
                )
            pieces = strided(argument).split([shape.numel() for shape in self.shapes.values()])
            return {
                name: x.reshape((*shape, *x.shape[1:]))
                for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)
            }
        if not isinstance(argument, Mapping):
            raise QuantityError(f"the {what} must be a tensor or {{name: tensor}}, got {type(argument).__name__}.")
        if missing := [name for name in self.names if name not in argument]:
            raise UnknownParameterError(
                f"the {what} has no entry for parameter '{missing[0]}'; it needs all of {list(self.names)[:8]}."
            )
        k: int | str = "k"  # the same for all
        for name, shape in self.shapes.items():
            piece = argument[name]
            got = list(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
            k = got[-1] if behind and k == "k" and len(got) == len(shape) + 1 and isinstance(got[-1], int) else k
            if got != [*shape, *[k] * behind] or k == 0:
                raise QuantityError(
                    f"the {what} for '{name}' must be a tensor of shape {[*shape, *[k or 'k'] * behind]}, got {got}."
                )
        return {name: strided(argument[name]) for name in self.names}  # gradients of embeddings may be sparse


COUPLED = "batch-coupled"  # the note on rows in which other samples were seen to act
PART = "of some samples"  # the note on rows of a coupled batch that are not all of them


def notion_of(G: Any) -> str:
    """What the note on rows says of a coupled batch: the notion that they are of, or "batch-coupled" (of parameters
    that are not coupled themselves); "" where samples are independent, as far as that is known.
    """
    notes = re.split(r", (?![^\[]*\])", str(getattr(G, "note", "")))  # not within table[0, :]
    found = [note for note in notes if note and not note.startswith(("verif", "not verif"))]
    return found[0].removeprefix("coupled=").strip("'") if found else ""


def check_adds_up(G: Quantities, weight: Tensor | None = None) -> None:
    """Raise for rows of a notion whose (weighted) sum isn't the gradient of the (weighted) sum of the losses."""
    notion = notion_of(G)
    if notion in ("", "loss", "eval", COUPLED):
        return
    part = f" {PART}" if str(getattr(G, "note", "")).endswith(PART) else ""
    whole = notion in ("copy", "influence") and not part
    uneven = weight is not None and bool((weight != weight[:1]).any())
    if uneven or not whole:
        way = "'loss'" if uneven or part else "'copy' (one backward pass) or 'loss'"
        raise BatchCoupledError(
            f"{'with these weights, ' if uneven else ''}rows of coupled={notion!r}{part} don't add up to the gradient "
            "of the batch's loss, for a sample also acts through the statistics of all others: take those of coupled="
            f"{way}. Parameters behind the last BatchNorm (params=) need no coupled=. The sum of rows itself is "
            "sum(weight)."
        )


def check_max_norm(max_norm: Any) -> None:
    """Raise for a bound of norms that is no positive number."""
    number = isinstance(max_norm, Real) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
    if not number or not max_norm > 0:
        raise QuantityError(f"max_norm must be a positive number, got {max_norm!r}.")


def check_ddof(ddof: Any) -> None:
    """Raise for degrees of freedom that are no number."""
    if not isinstance(ddof, Real) or not float(ddof) >= 0:
        raise QuantityError(f"ddof must be a number, 0 or more (1 for the unbiased variance), got {ddof!r}.")


# Of the options of a quantity, before the run.
CHECKS: dict[str, Callable[[Any], None]] = {"clip": check_max_norm, "variance": check_ddof, "std": check_ddof}


def add_up(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    first, *rest = tensors
    return sum(rest, first)
