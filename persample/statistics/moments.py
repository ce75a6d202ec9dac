"""Mean and scatter of all rows of a data set, exact whatever the batching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, QuantityError
from ..quantities import Quantities, check_ddof
from .accumulate import Accumulator
from .parts import check_measured, energy, mean_loss, named


@dataclass(frozen=True, eq=False)
class DatasetMoments:
    """Mean and scatter of ``count`` rows; serves every statistic of this package that needs no more than moments.

    ``loss`` is the mean loss.  ``a + b`` are the moments of both data sets together, by Chan et al. 1979, "Updating
    formulae and a pairwise algorithm for computing sample variances": means weighted by counts, scatters added with
    ``n_a n_b / (n_a + n_b) (mean_a - mean_b)^2``.
    """

    count: int
    average: dict[str, Tensor]  # {name: [*P]}
    scatter: dict[str, Tensor]  # {name: [*P]}, sum_n (g_n - mean)^2
    loss: Tensor

    def __add__(self, other: DatasetMoments) -> DatasetMoments:
        _same_shapes(self.average, other.average)
        n = self.count + other.count
        share = other.count / n
        average, scatter = {}, {}
        for name, mean in self.average.items():
            gap = other.average[name] - mean
            average[name] = mean + share * gap
            scatter[name] = self.scatter[name] + other.scatter[name] + (self.count * share) * energy(gap)
        return DatasetMoments(n, average, scatter, self.loss + share * (other.loss - self.loss))

    def __len__(self) -> int:
        return self.count

    @property
    def losses(self) -> Tensor:
        """``[1]``: the mean loss, for statistics that average losses."""
        return self.loss.reshape(1)

    def mean(self) -> dict[str, Tensor]:
        """``(1/n) sum_i g_i``, ``{name: [*P]}``."""
        return self.average

    def second_moment(self) -> dict[str, Tensor]:
        """``(1/n) sum_i g_i^2``, ``{name: [*P]}``, not centred."""
        return {name: self.scatter[name] / self.count + energy(mean) for name, mean in self.average.items()}

    def variance(self, ddof: int = 0) -> dict[str, Tensor]:
        """``1/(n - ddof) sum_i (g_i - mean)^2``, ``{name: [*P]}``."""
        check_ddof(ddof)
        if self.count <= ddof:
            raise QuantityError(f"a variance with ddof={ddof} needs more than {ddof} sample(s), but n = {self.count}.")
        return {name: s / (self.count - ddof) for name, s in self.scatter.items()}

    def std(self, ddof: int = 0) -> dict[str, Tensor]:
        """The square root of `variance`."""
        return {name: v.sqrt() for name, v in self.variance(ddof).items()}


class Moments(Accumulator[DatasetMoments]):
    """Mean, variance and second moment of all rows of a data set, ``{name: [*P]}`` each; computes `DatasetMoments`.

    What it computes can be given to `noise_scale`, `diversity`, `norm_test`, `signal_to_noise`, `cabs`, ... like one
    large batch.  It keeps two tensors of the size of the parameters, in no less than single precision.  Needs
    ``quantities=["mean", "variance"]``.
    """

    needs = ("mean", "variance")
    kind = DatasetMoments

    def of(self, G: Quantities) -> DatasetMoments:
        check_measured(G)
        n = len(G)
        return DatasetMoments(n, G.wide_mean(), {name: n * v for name, v in G.variance(0).items()}, mean_loss(G))


class Average(Accumulator[DatasetMoments]):
    """Mean and spread *over batches* of any statistic, such as ``Average(norm_test)``; computes `DatasetMoments`.

    ``statistic(G)`` returns a number or ``{group: number}`` (a number goes by the name ``""``), or several under names
    of their own: of `noise_scale`, averages are ``"trace"`` and ``"square"``, to be divided last, and with groups
    ``"group.trace"``.  Every batch counts once, whatever its size.  Python numbers and integers are averaged in double
    precision, half precision in single.  ``needs`` names the quantities of a statistics run that suffice.
    """

    kind = DatasetMoments

    def __init__(self, statistic: Callable[[Quantities], Any], needs: tuple[str, ...] | str | None = None) -> None:
        super().__init__()
        if not callable(statistic):
            raise ArgumentError(f"statistic must be a function of G, such as norm_test, got {statistic!r}.")
        self.statistic, self.needs = statistic, (needs,) if isinstance(needs, str) else needs

    def of(self, G: Quantities) -> DatasetMoments:
        values = {name: _averaged(name, v) for name, v in _by_name(self.statistic(G))}
        return DatasetMoments(1, values, {name: torch.zeros_like(v.real) for name, v in values.items()}, mean_loss(G))

    def _settings(self) -> dict[str, Any]:
        return {"statistic": named(self.statistic)}


def _same_shapes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if {name: v.shape for name, v in a.items()} != {name: v.shape for name, v in b.items()}:
        raise QuantityError(
            "these are moments of different parameters or shapes; accumulate the same parameters in every batch."
        )


def _by_name(found: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a statistic returned, number by number: those of a mapping, a named tuple or a dataclass by their names."""
    if hasattr(found, "_asdict"):
        found = found._asdict()
    elif is_dataclass(found):
        found = {f.name: getattr(found, f.name) for f in fields(found)}
    if not isinstance(found, Mapping):
        yield name, found
        return
    for part, value in found.items():
        yield from _by_name(value, f"{name}.{part}" if name != "" else part)


def _averaged(name: str, value: Any) -> Tensor:
    """A copy, for the run keeps its own, in a type that averages don't round."""
    try:
        x = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        of = f" for {name!r}" if name else ""
        raise QuantityError(
            f"a statistic to average returns numbers or tensors, {{name: number}}, or a dataclass or named tuple of "
            f"them, but this one returned {type(value).__name__}{of}."
        ) from None
    floating = x.is_floating_point() or x.is_complex()
    return x.detach().to(torch.promote_types(x.dtype, torch.float32) if floating else torch.float64, copy=True)
