"""Which loaders rows on disk can be gone on with: those that give the same samples in the same order every time."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import persample
from persample.attribution import GradientStore, cross_gram
from persample.attribution import called as names
from persample.attribution import loaders as source
from persample.errors import ArgumentError, StoreError
from persample.statistics import Moments, accumulate

N = 12
LOSS = nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def data(n: int = N, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, generator=generator).double(), torch.arange(n) % 2)


def store(path: Path, net: nn.Module) -> GradientStore:
    return GradientStore(path, net, dtype=torch.float64)


def flat(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return persample.gradients(net, LOSS, x, y, engine="loop").flat()  # type: ignore[no-any-return]


class Drawn(Sampler[int]):
    """Somebody's own sampler: of an order that is drawn anew each time, or is always the same."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())


class Derived(BatchSampler):
    """Somebody's own batches, which are the same until the sampler below is told the next epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        yield list(self.sampler)


# ---- samplers ---------------------------------------------------------------------------------------------------

own = torch.Generator()
seeded = torch.Generator().manual_seed(0)
twisted = [3, 1, 2, 0]

RANDOM: dict[str, Any] = {
    "shuffle": {"shuffle": True},
    "shuffle with a generator": {"shuffle": True, "generator": seeded},
    "a random sampler": {"sampler": RandomSampler(data(), generator=seeded)},
    "with replacement": {"sampler": RandomSampler(data(), replacement=True)},
    "a random subset": {"sampler": SubsetRandomSampler(range(4))},
    "weights": {"sampler": WeightedRandomSampler(torch.ones(N), N)},
    "distributed": {"sampler": DistributedSampler(data(), 2, 0, shuffle=True)},
    "batches of a random sampler": {"batch_sampler": BatchSampler(RandomSampler(data()), 4, False)},
    "batches of batches": {"batch_sampler": BatchSampler(BatchSampler(RandomSampler(data()), 2, False), 2, False)},
    "batches of weights": {"batch_sampler": BatchSampler(WeightedRandomSampler(torch.ones(N), N), 4, False)},
    "own batches, distributed": {"batch_sampler": Derived(DistributedSampler(data(), 2, 0), 4, False)},
    "own, of torch": {"sampler": Drawn(lambda: torch.randperm(N))},
    "own, of numpy": {"sampler": Drawn(lambda: np.random.permutation(N))},  # noqa: NPY002
    "own, of python": {"sampler": Drawn(lambda: random.sample(range(N), N))},
    "own, with a generator": {"sampler": Drawn(lambda: torch.randperm(N, generator=own))},
    "own batches": {"batch_sampler": Drawn(lambda: torch.randperm(N).view(3, 4).tolist())},
    "batches of an own one": {"batch_sampler": BatchSampler(Drawn(lambda: torch.randperm(N)), 4, False)},
    "workers in any order": {"num_workers": 1, "in_order": False},
}

ORDERED: dict[str, Any] = {
    "plain": {},
    "without batches": {"batch_size": None},
    "in sequence": {"sampler": SequentialSampler(data())},
    "distributed": {"sampler": DistributedSampler(data(), 2, 1, shuffle=False)},
    "batches in sequence": {"batch_sampler": BatchSampler(SequentialSampler(data()), 4, False)},
    "batches of a list": {"batch_sampler": BatchSampler(twisted, 2, False)},
    "a list": {"sampler": twisted},
    "own": {"sampler": Drawn(lambda: twisted)},
    "own, of tensors": {"sampler": Drawn(lambda: torch.tensor(twisted))},
    "own, with a seed": {"sampler": Drawn(lambda: torch.randperm(N, generator=torch.Generator().manual_seed(0)))},
    "own batches": {"batch_sampler": Drawn(lambda: [np.array(twisted), [5]])},
}


@pytest.mark.parametrize("name", RANDOM)
def test_loaders_that_shuffle_are_refused(tmp_path: Path, name: str) -> None:
    loader = DataLoader(data(), **RANDOM[name])
    mine = store(tmp_path, model())
    with pytest.raises(StoreError, match="any order" if "workers" in name else "shuffles"):
        mine.extend(LOSS, loader)
    assert len(mine) == 0
    for pair in ((loader, DataLoader(data(2))), (DataLoader(data(2)), loader)):
        with pytest.raises(StoreError, match=r"shuffles|any order"):
            cross_gram(model(), LOSS, *pair)


@pytest.mark.parametrize("name", ORDERED)
def test_loaders_in_order_are_taken(name: str) -> None:
    source.check_ordered(DataLoader(data(), **ORDERED[name]))


def test_a_sampler_that_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="or nothing"):
        store(tmp_path, model()).extend(LOSS, DataLoader(data(), sampler=iter(range(N))))


def test_rows_are_in_the_order_of_a_sampler(tmp_path: Path) -> None:
    net, (x, y) = model(), data().tensors
    mine = store(tmp_path, net)
    for _ in range(2):
        mine.extend(LOSS, DataLoader(data(), 3, sampler=Drawn(lambda: twisted)))
    torch.testing.assert_close(mine.rows(), flat(net, x[twisted], y[twisted]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["own, of torch", "own, of numpy", "own, of python"])
def test_looking_at_a_sampler_leaves_random_generators_as_they_were(name: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index] # noqa: NPY002
    with pytest.raises(StoreError):
        source.check_ordered(DataLoader(data(), **RANDOM[name]))
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002


# ---- samples ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Data without a sampler to look at."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        return (data()[i] for i in self.order)


def test_other_samples_are_refused(tmp_path: Path) -> None:
    """Whatever gives them: by the first, and by the one where rows end."""
    net, order = model(), list(range(N))
    mine = store(tmp_path, net)
    mine.extend(LOSS, DataLoader(Stream(order[:6]), 4))
    before = mine.rows().clone()
    for position, wrong in (
        (0, [7, *order[1:]]),
        (5, [*order[:5], 7, *order[6:]]),
        (0, order[::-1]),
        (5, [*order[:3]] * 4),
    ):
        with pytest.raises(StoreError, match=f"sample {position} of the loader is not"):
            mine.extend(LOSS, DataLoader(Stream(wrong), 3))
    with pytest.raises(StoreError, match="rows of 6 samples, but the loader gives only 5"):
        mine.extend(LOSS, DataLoader(Stream(order[:5]), 3))
    with pytest.raises(StoreError, match="gives only 0"):
        mine.extend(LOSS, iter([]))
    assert torch.equal(mine.rows(), before)
    store(tmp_path, net).extend(LOSS, DataLoader(Stream(order), 5))
    torch.testing.assert_close(GradientStore(tmp_path).rows(), flat(net, *data().tensors), rtol=1e-9, atol=1e-9)


def test_targets_are_part_of_a_sample(tmp_path: Path) -> None:
    net, (x, y) = model(), data().tensors
    mine = store(tmp_path, net)
    mine.extend(LOSS, [(x, y)])
    with pytest.raises(StoreError, match="sample 0"):
        mine.extend(LOSS, [(x, 1 - y)])


def test_samples_of_rows_appended_by_hand_are_not_known(tmp_path: Path) -> None:
    net, (x, y) = model(), data().tensors
    mine = store(tmp_path, net)
    mine.append(persample.gradients(net, LOSS, x[:4], y[:4]))
    mine.extend(LOSS, [(x, y)])
    torch.testing.assert_close(mine.rows(), flat(net, x, y), rtol=1e-9, atol=1e-9)
    with pytest.raises(StoreError, match=f"sample {N - 1}"):
        mine.extend(LOSS, [(torch.cat([x[:-1], -x[-1:]]), y)])
    for first in (-1, N + 1):
        with pytest.raises(ArgumentError, match="first must be"):
            mine.append(persample.gradients(net, LOSS, x, y), first)


def test_batches_must_be_pairs(tmp_path: Path) -> None:
    x, y = data().tensors
    for batch, named in (((x, y, y), "tuple of 3"), ({"x": x, "y": y}, "dict"), (x, "Tensor")):
        with pytest.raises(ArgumentError, match=f"a {named}.* unpack="):
            store(tmp_path, model()).extend(LOSS, [batch])
        with pytest.raises(ArgumentError, match=f"a {named}.* unpack="):
            cross_gram(model(), LOSS, [(x, y)], [batch])


# ---- digests ----------------------------------------------------------------------------------------------------


def test_a_data_set_is_no_loader(tmp_path: Path) -> None:
    """Its items would be taken for batches, with the positions of a sequence for samples."""
    net, sequences = (
        nn.Linear(3, 1).double(),
        TensorDataset(torch.randn(6, 4, 3).double(), torch.randn(6, 4, 1).double()),
    )
    batches = DataLoader(sequences, batch_size=3)
    for wrong, match in ((sequences, "DataLoader.dataset"), (None, "got NoneType")):
        for ask in (
            lambda wrong=wrong: GradientStore(tmp_path, net).extend(nn.MSELoss(), wrong),
            lambda wrong=wrong: cross_gram(net, nn.MSELoss(), wrong, batches),
            lambda wrong=wrong: cross_gram(net, nn.MSELoss(), batches, wrong),
            lambda wrong=wrong: accumulate(net, nn.MSELoss(), wrong, Moments()),
        ):
            with pytest.raises(ArgumentError, match=match):
                ask()
    assert cross_gram(net, nn.MSELoss(), batches, [sequences[:2]]).shape == (6, 2)


def test_digests_tell_what_differs() -> None:
    x = torch.arange(4.0)
    trees: list[Any] = [
        x, x.double(), x.view(2, 2), -x, x[:0], x.int(), x + 0j, x > 1, (x, "a"), (x, "b"), (x, 1), (x, None),
        {"x": (x, x)},
    ]  # fmt: skip
    assert len({names.digest(tree) for tree in trees}) == len(trees)
    assert names.digest(x[::2]) == names.digest(x[::2].clone())
    assert names.digest(torch.eye(3).to_sparse()) == names.digest(torch.eye(3))
    assert names.digest((x + 1j).conj()) == names.digest(x - 1j)


def test_loss_functions_are_told_apart() -> None:
    def other(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    functions = [
        lambda: F.cross_entropy, lambda: other, lambda: nn.CrossEntropyLoss(), lambda: nn.MultiMarginLoss(),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1), lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0])),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
        lambda: functools.partial(F.cross_entropy, weight=torch.ones(2)),
        lambda: functools.partial(F.cross_entropy, weight=torch.zeros(2)),
    ]  # fmt: skip
    assert len({names.called(f()) for f in functions}) == len(functions)
    assert [names.called(f()) for f in functions] == [names.called(f()) for f in functions]
    assert names.called(F.cross_entropy) == "torch.nn.functional.cross_entropy"


class Plain:
    """A loss that is no module; with settings, and with something else that it is called by."""

    def __init__(self, gamma: Any) -> None:
        self._gamma = gamma

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.of(outputs, targets)

    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._gamma * F.cross_entropy(outputs, targets, reduction="none")  # type: ignore[no-any-return]


class Slotted(Plain):
    __slots__ = ("gamma",)

    def __init__(self, gamma: Any) -> None:
        self.gamma = gamma


class Private(nn.Module):
    def __init__(self, gamma: Any) -> None:
        super().__init__()
        self._gamma = gamma


class Wrapped(nn.Module):
    def __init__(self, smoothing: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.CrossEntropyLoss(label_smoothing=smoothing))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.inner[1](outputs, targets)  # type: ignore[no-any-return]


def defaulted(gamma: Any) -> Any:
    def loss(outputs: Tensor, targets: Tensor, gamma: Any = gamma) -> Tensor:
        return outputs

    return loss


def by_keyword(gamma: Any) -> Any:
    def loss(outputs: Tensor, targets: Tensor, *, gamma: Any = gamma) -> Tensor:
        return outputs

    return loss


def closed(gamma: Any) -> Any:
    return lambda outputs, targets: outputs * gamma


def marked(gamma: Any) -> Any:
    loss = closed(1)
    loss.gamma = gamma
    return loss


SET: dict[str, Any] = {
    "plain": Plain, "slots": Slotted, "private": Private, "wrapped": Wrapped, "method": lambda g: Plain(g).of,
    "default": defaulted, "keyword": by_keyword, "closure": closed, "attribute": marked,
    "tensor": lambda g: Private(torch.tensor(g)), "tuple": lambda g: Private((1, g)), "nested": lambda g: Plain([(g,)]),
    "dictionary": lambda g: Private({"gamma": g}), "key": lambda g: Private({g: 1}),
    "array": lambda g: Plain(np.array(g)),
    "namespace": lambda g: Plain(types.SimpleNamespace(gamma=g)), "callable": lambda g: Private(Plain(g)),
    "set": lambda g: Plain({g, 7.0}), "partial": lambda g: functools.partial(Plain(g), 1),
    "of a closure": lambda g: closed(Wrapped(g)), "compiled": lambda g: torch.compile(Wrapped(g)),
    "decorated": lambda g: torch.no_grad()(closed(g)),
}  # fmt: skip


@pytest.mark.parametrize("name", SET)
def test_what_a_loss_is_set_to(name: str) -> None:
    make = SET[name]
    assert names.called(make(0.0)) == names.called(make(0.0)) != names.called(make(0.5))
    assert " at 0x" not in names.called(make(0.0))


def test_other_objects_are_told_by_their_type() -> None:
    own = Plain(None)
    own._gamma = [own, object(), iter([])]  # holds itself
    assert names.called(own) == f"{__name__}.Plain(_gamma=list [itself, builtins.object, builtins.list_iterator])"
    net = Private(own.of)
    net.also = Private(0)
    net.also.above = (net,)  # type: ignore[assignment]
    assert "itself" in names.called(net)


def test_losses_that_are_compiled_are_called_as_they_were() -> None:
    for loss in (nn.CrossEntropyLoss(), closed(2)):
        before = names.called(loss)
        assert names.called(torch.compile(loss)) == before == names.called(loss)


def test_losses_are_called_as_they_were() -> None:
    """Rows that were written before settings of sub-modules, functions and objects counted can be gone on with."""
    state = "e3b0c44298fc1c14"
    for function, expected in (
        (nn.MSELoss(), f"torch.nn.modules.loss.MSELoss(reduction='mean'; {state})"),
        (
            functools.partial(F.cross_entropy, label_smoothing=0.1),
            "torch.nn.functional.cross_entropy(label_smoothing=0.1)",
        ),
        (model, f"{__name__}.model"),
    ):
        assert names.called(function) == expected


SCRIPT = """
import functools, torch
from torch import nn
from persample.attribution.called import called
def make(gamma):
    ce = nn.CrossEntropyLoss(torch.ones(2))
    return lambda o, t, also={"b", "a", "c"}: ce(o, t) * gamma
print(called(make(2)), called(functools.partial(make(3), k=object())))
"""


def test_names_are_the_same_in_every_process() -> None:
    def run(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True, text=True
        ).stdout

    found = run("1")
    assert found == run("2") and "gamma=2" in found


def test_fingerprints_tell_parameters_buffers_and_modes() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    found = [source.fingerprint(net)]
    net[1].running_mean.add_(1)  # type: ignore[operator, union-attr]
    found.append(source.fingerprint(net))
    net[0].weight.data.add_(1)  # type: ignore[operator, union-attr]
    found.append(source.fingerprint(net))
    net[1].eval()
    found.append(source.fingerprint(net))
    assert len({*found}) == 4 and source.fingerprint(net) == found[-1]
