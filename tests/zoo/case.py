"""What a case of the zoo is: a small model, a loss and a batch, named for the one difficulty it holds.

A `Case` only says how to build a `Problem`; building seeds itself, so the same case is the same problem everywhere.
Everything is float64 and tiny. Sizes differ (N = 4, T = 3, widths from 5 on) so that a wrong axis cannot go unnoticed,
except in the cases whose difficulty is that they coincide. `problem`, `sample` and `take` are all the tests need: the
batch, one sample alone, other samples.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

N, T, D = 4, 3, 5  # samples, tokens, width


@dataclass(frozen=True)
class Problem:
    """A model, its loss, and a batch: what `persample.gradients` takes."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    inputs: Any
    targets: Any = None


@dataclass(frozen=True, eq=False)
class Case:
    """One difficulty. `raises` maps an engine to the error it must raise instead of rows, with the reason."""

    name: str
    build: Callable[[], Problem]
    batch_dim: int = 0
    unused: tuple[str, ...] = ()  # parameters no loss depends on
    raises: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    single: bool = False  # the model computes some of its parts in single precision, whatever its dtype
    coupled: bool = False  # the outputs of a sample depend on the other samples
    samples_in_outputs: bool = True  # outputs have the samples where inputs have them
    needs: str | None = None  # a package that may be missing

    def __str__(self) -> str:
        return self.name

    @property
    def missing(self) -> bool:
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


# Limits of torch.func that several cases meet.
VMAP_NUMBERS = {"vmap": ("CaptureError", "values are read as Python numbers, which torch.func cannot do")}


def problem(case: Case) -> Problem:
    """The problem of a case in float64: the same one at every call."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(case.name.encode()))
        torch.set_default_dtype(torch.float64)
        try:
            built = case.build()
        finally:
            torch.set_default_dtype(before)
    built.model.double()
    return built


def size(tree: Any, batch_dim: int = 0) -> int:
    """The number of samples N in a batch."""
    return max((t.shape[batch_dim] for t in _tensors(tree) if t.dim() > batch_dim), default=0)


def take(tree: Any, index: Iterable[int], batch_dim: int = 0) -> Any:
    """The batch of the samples in `index`. Leaves of size 1 (or none) along the sample axis are shared and stay."""
    n = size(tree, batch_dim)
    chosen = torch.as_tensor(list(index))

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() <= batch_dim or leaf.shape[batch_dim] != n:
            return leaf
        return leaf.index_select(batch_dim, chosen)

    return tree_map(pick, tree)


def sample(tree: Any, n: int, batch_dim: int = 0) -> Any:
    """Sample n alone, as a batch of one."""
    return take(tree, [n], batch_dim)


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(x)`, `model(*tuple)` or `model(**dict)`."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---- what most cases are made of --------------------------------------------------------------------------------


def readout(outputs: Any, targets: Any = None) -> Tensor:
    """Losses [N] that see every entry of every output, each with its own weight, and are not linear in it."""
    total: Tensor | None = None
    for leaf in _tensors(outputs):
        if leaf.is_floating_point():
            flat = leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1)
            weight = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))
            part = (flat.sin() * weight + 0.1 * flat.square()).sum(1)
            total = part if total is None else total + part
    assert total is not None
    return total


def readout_dim1(outputs: Any, targets: Any = None) -> Tensor:
    """`readout` for outputs [T, N, ...]."""
    return readout(tree_map(lambda leaf: leaf.movedim(1, 0) if isinstance(leaf, Tensor) else leaf, outputs))


def alone(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Problem]:
    """The layer is the first thing that sees a float input of this shape: nothing before it requires grad."""
    return lambda: Problem(make(), readout, torch.randn(shape))


def inner(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Problem]:
    """The layer sits between a linear layer (over the last axis) and a tanh: gradients have to pass through it."""
    return lambda: Problem(
        nn.Sequential(nn.Linear(shape[-1], shape[-1]), make(), nn.Tanh()), readout, torch.randn(shape)
    )


def on(make: Callable[[], nn.Module], *inputs: Callable[[], Any]) -> Callable[[], Problem]:
    """A model called with these inputs (each built after the model)."""

    def build() -> Problem:
        model = make()
        built = tuple(i() for i in inputs)
        return Problem(model, readout, built[0] if len(built) == 1 else built)

    return build


class Fn(nn.Module):
    """A model written as one function of its bare parameters, `forward(p, x)`: functional code, no class for each."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def fn(function: Callable[..., Any], shape: tuple[int, ...], /, **shapes: tuple[int, ...]) -> Callable[[], Problem]:
    """`function(p, x)` with bare parameters of the given shapes, on a float input."""

    def build() -> Problem:
        model = Fn(function, **{name: torch.randn(s) / max(1, s[-1] if s else 1) ** 0.5 for name, s in shapes.items()})
        return Problem(model, readout, torch.randn(shape))

    return build


def tokens(*shape: int, vocabulary: int = 7) -> Callable[[], Tensor]:
    """Random token ids."""
    return lambda: torch.randint(vocabulary, shape)


def normal(*shape: int) -> Callable[[], Tensor]:
    """Random floats."""
    return lambda: torch.randn(shape)
