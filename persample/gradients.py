"""The result of a run that keeps the rows: the per-sample gradients of a whole model, as one matrix ``G [N, D]``; and
`Sink`, where complete factors go in any run.

The rows of every parameter are kept as factors (`persample.factors`), so most quantities never write ``[N, *P]``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import display, doubt, reductions
from .errors import QuantityError, UnknownParameterError
from .factors import Dense, Factors, compact, dense, dtype, nbytes, tensors
from .kept import Checked, Kept, stamps
from .problem import Pass, Selection, select
from .quantities import COUPLED, PARTS, Parts, Quantities
from .report import bytes_text
from .scratch import fresh
from .state import unwrapped
from .statistics_run import Request, Statistics


class Gradients(Quantities):
    """Per-sample gradients ``G``: row ``n`` is the gradient of the *unscaled* loss of sample ``n``, one block per
    parameter.

    ``names`` are those of ``model.named_parameters()`` (a tied parameter once; it answers to all its names);
    ``unused`` lists the parameters that no loss depends on, whose rows are zeros.  ``losses [N]`` and ``outputs`` are
    those of the same pass, detached (outputs that a run in slices can't put together are ``None``); rows are not
    differentiable.

    An entry of a complex parameter counts as the two real ones that it is: norms, inner products (``G H^T``), dots and
    projections are real.

    ``factors`` are the rows as they are kept, ``{name: Factors}`` in the forms of `persample.factors`, for what is
    computed from them by `persample.reductions`.  They may alias tensors of the model's forward pass: if one of them
    has been changed in place since, reading raises `InplaceError` instead of returning a wrong number.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        losses: Tensor | None,
        outputs: Any = None,
        *,
        unused: tuple[str, ...] = (),
        aliases: Mapping[str, str] | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        note: str = "",
        wrapper: str = "",
    ) -> None:
        """``parameters``: what `backward` writes to; ``note``: shown by ``repr``; ``wrapper``: what is before names
        that isn't the model's.
        """
        if not factors:
            raise QuantityError("no parameter to take gradients of.")
        self._kept = {name: Kept.of(name, g) for name, g in _apart(factors).items()}
        self.factors = Checked(self._kept)
        self.losses, self.outputs, self.unused, self.note = losses, outputs, tuple(unused), note
        self.names = tuple(factors)
        self.shapes = {name: torch.Size(g.shape) for name, g in factors.items()}
        self._aliases = dict(aliases or {})
        self._parameters = dict(parameters or {})
        self._at = stamps(self._parameters)
        self._wrapper = wrapper

    def __len__(self) -> int:
        return len(self._any())

    def _any(self) -> Factors:
        return next(iter(self._kept.values())).factors

    def _complex(self) -> bool:
        return any(dtype(kept.factors).is_complex for kept in self._kept.values())

    def _parts(self, kind: str, argument: Any = None) -> Parts:
        pieces = self._split(kind, argument) if kind in ("dot", "project") else dict.fromkeys(self.names)
        return doubt.computed(self.names, lambda name: PARTS[kind](self.factors[name], pieces[name]))

    def _weighted(self, weight: Tensor | None) -> dict[str, Tensor]:
        if weight is not None and (
            not isinstance(weight, Tensor) or weight.shape != (len(self),) or weight.is_complex() or weight.is_sparse
        ):
            got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise QuantityError(
                f"weight must be a dense real tensor of shape [{len(self)}], one number per sample, got {got}."
            )
        return {name: kept.weighted_sum(weight) for name, kept in self._kept.items()}

    def _kind(self, name: str) -> torch.dtype:
        return dtype(self._kept[name].factors)

    def _cross(self, other: Quantities) -> Parts:
        if not isinstance(other, Gradients):
            return super()._cross(other)  # which raises
        if self.shapes != other.shapes:
            raise QuantityError(
                f"the two have different parameters: {_difference(self.shapes, other.shapes)}. Use select() on both."
            )
        theirs = other.factors
        return doubt.computed(self.names, lambda name: reductions.gram(self.factors[name], theirs[name]))

    # ---- the rows themselves ------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """``[N, *P]``: the individual gradients of one parameter.

        They are the caller's: no other rows that are handed out share their memory.  Those that are kept as such are no
        copy the first time: once they are changed in place, asking for anything that needs them raises `InplaceError`.
        """
        if not isinstance(name, str):
            raise UnknownParameterError(
                f"rows are asked for by the name of a parameter, got {name!r}; sample n is G['name'][n], or "
                "G.flat()[n] with all parameters."
            )
        name = self._aliases.get(name, name)
        if name not in self._kept:
            raise UnknownParameterError(f"no parameter '{name}'; there are {list(self.names)}.")
        return self._kept[name].rows()

    def __contains__(self, name: object) -> bool:
        return name in self._kept or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def dense(self, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``{name: [N, *P]}``: all individual gradients, written into ``out``, a dictionary of the same, where given
        (much faster than fresh memory, and never what is kept; see `__getitem__`).
        """
        if out is None:
            return {name: self._kept[name].rows() for name in self.names}
        if not isinstance(out, Mapping):
            raise QuantityError(
                f"out must be a dictionary {{name: tensor [N, *P]}}, got {type(out).__name__}; one wide matrix "
                "[N, D] is for flat(out=)."
            )
        if wrong := [n for n in self.names if n in out and not isinstance(out[n], Tensor)]:
            raise QuantityError(f"out['{wrong[0]}'] must be a tensor, got {type(out[wrong[0]]).__name__}.")
        if wrong := [n for n, shape in self.shapes.items() if n not in out or out[n].shape != (len(self), *shape)]:
            shape = [len(self), *self.shapes[wrong[0]]]
            raise QuantityError(
                f"out must have a tensor of shape {shape} for '{wrong[0]}', and one for each parameter; of larger "
                "ones, for more samples, give the first rows."
            )
        if wrong := [n for n in self.names if not (out[n].is_floating_point() or out[n].is_complex())]:
            raise QuantityError(
                f"out must not be of integers, but the tensor for '{wrong[0]}' is {out[wrong[0]].dtype}."
            )
        _writable({name: out[name] for name in self.names})
        return {name: dense(self.factors[name], out[name]) for name in self.names}

    def flat(self, out: Tensor | None = None) -> Tensor:
        """``[N, D]``: all individual gradients, parameters side by side in the order of ``names``, in a type that
        holds those of all parameters.
        """
        size = sum(shape.numel() for shape in self.shapes.values())
        if out is None:
            kinds = [dtype(kept.factors) for kept in self._kept.values()]
            kind = functools.reduce(torch.promote_types, kinds)
            out = fresh(tensors(self._any())[-1], len(self), size, dtype=kind)
        elif not isinstance(out, Tensor):
            raise QuantityError(f"out must be a tensor [{len(self)}, {size}], got {type(out).__name__}.")
        elif out.shape != (len(self), size) or not (out.is_floating_point() or out.is_complex()):
            raise QuantityError(
                f"out must have shape [{len(self)}, {size}] and not be of integers, got {list(out.shape)}, {out.dtype}."
            )
        else:
            _writable({"all parameters": out})
        for (name, shape), column in zip(
            self.shapes.items(), out.split([s.numel() for s in self.shapes.values()], 1), strict=True
        ):
            dense(self.factors[name], out=column.unflatten(1, shape) if shape else column.squeeze(1))
        return out

    def select(self, params: Selection) -> Gradients:
        """The gradients of some parameters: a regular expression (``re.match``), names, or a predicate ``(name,
        parameter)``.
        """
        values = {name: self._parameters.get(name, _like(kept.factors)) for name, kept in self._kept.items()}
        names = select(values, self._aliases, params)

        def keep(source: Mapping[str, Any]) -> dict[str, Any]:
            return {name: source[name] for name in names if name in source}

        chosen = Gradients(
            {name: self._kept[name].factors for name in names},
            self.losses,
            self.outputs,
            unused=tuple(n for n in self.unused if n in names),
            aliases={a: n for a, n in self._aliases.items() if n in names},
            parameters=keep(self._parameters),
            note=self.note,
            wrapper=self._wrapper,
        )
        chosen._kept.update(keep(self._kept))
        chosen._at = keep(self._at)
        return chosen

    def __repr__(self) -> str:
        kinds = sorted({type(kept.factors).__name__ for kept in self._kept.values()})
        size = sum(nbytes(kept.factors) for kept in self._kept.values())
        note = f", {self.note}" if self.note else ""
        what = f"parameters={len(self.names)}, forms={'/'.join(kinds)}, memory={bytes_text(size)}"
        return f"Gradients(N={len(self)}, {what}{note})"

    def _repr_html_(self) -> str:
        return display.gradients_html(self)


def _like(g: Factors) -> Tensor:
    """A parameter of which only shape and type are known."""
    return torch.empty(g.shape, dtype=dtype(g), device="meta")


def _apart(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Rows of every parameter in memory of their own, for whoever is handed them may write into them: two parameters
    that are added up have the same ones.
    """
    found, taken = dict(factors), set[int]()
    for name, g in found.items():
        if isinstance(g, Dense):
            place = g.value.untyped_storage().data_ptr()
            if place in taken and g.value.numel():
                found[name] = Dense(g.value.clone())
            taken.add(place)
    return found


def _writable(out: Mapping[str, Tensor]) -> None:
    """Raise for what can't be written into: no tensors, or such whose entries share memory."""
    for name, t in out.items():
        if t.requires_grad or t.is_meta or _overlaps_itself(t):
            raise QuantityError(
                f"out can't be written into: the tensor for '{name}' requires grad, has no memory, or has entries that "
                "share it (expand, as_strided). Give torch.empty of that shape."
            )
    spans = sorted(((t.data_ptr(), name) for name, t in out.items() if t.numel() and t.data_ptr()))
    for (_, a), (_, b) in pairwise(spans):
        if not _disjoint(out[a], out[b]):
            raise QuantityError(f"out must be tensors of their own, but those for '{a}' and '{b}' overlap.")


def _overlaps_itself(t: Tensor) -> bool:
    """Whether any two entries may have one place: of strides in order, each is to step over all that is smaller."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _disjoint(a: Tensor, b: Tensor) -> bool:
    """Whether ``b``, which begins behind ``a``, surely shares no memory with it; parts of the rows of one matrix lie
    between each other, and don't.
    """
    (first, rows, pitch), (second, others, same) = ((t.data_ptr(), *_extent(t)) for t in (a, b))
    if second >= first + (len(a) - 1) * pitch + rows:
        return True
    return pitch == same and rows <= (second - first) % pitch <= pitch - others


def _extent(t: Tensor) -> tuple[int, int]:
    """The bytes from the first entry of a row to behind its last one, and from one row to the next."""
    size = t.element_size()
    inner = sum((length - 1) * stride for stride, length in zip(t.stride()[1:], t.shape[1:], strict=True))
    return (inner + 1) * size, t.stride(0) * size


def _difference(a: Mapping[str, torch.Size], b: Mapping[str, torch.Size]) -> str:
    wrong = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return ", ".join(
        f"'{name}' {tuple(a[name]) if name in a else 'absent'} against {tuple(b[name]) if name in b else 'absent'}"
        for name in wrong[:3]
    )


Result = Gradients | Statistics


class Sink:
    """Where complete factors go: kept as `Gradients`, or reduced as `Statistics`."""

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], aliases: dict[str, str],
        quantities: Iterable[Request] | None,
    ) -> None:  # fmt: skip
        self.parameters, self.aliases, self.wrapper = parameters, aliases, unwrapped(model)[1]
        self.kept: dict[str, Factors] = {}
        self.statistics = None if quantities is None else Statistics(quantities, parameters, self.wrapper)

    def emit(self, name: str, g: Factors) -> None:
        if self.statistics is not None:
            self.statistics.emit(name, g)
        else:
            self.kept[name] = compact(g)

    def result(self, run: Pass, note: str = "") -> Result:
        note = ", ".join(filter(None, [note, COUPLED if run.coupled else ""]))
        if self.statistics is not None:
            return self.statistics.finish(run, note)
        kept = {name: self.kept[name] for name in self.parameters}
        return Gradients(
            kept,
            run.losses,
            run.outputs,
            unused=run.unused,
            aliases=self.aliases,
            parameters=self.parameters,
            note=note,
            wrapper=self.wrapper,
        )
