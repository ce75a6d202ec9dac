"""The samples of a loader: always in the same order, and the same as before.

Rows on disk belong to samples by their position alone.  So a loader that is known to shuffle is refused before anything
is computed, and the first and the last sample that rows were written for are remembered as digests: a loader that does
not give them again at their places is refused as well, whatever it is.  Rows of coupled samples (``coupled=``) depend
on the batch that they were in, so of those the sizes of all batches are remembered, and have to be the same again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..batch import Batch
from ..errors import ArgumentError, StoreError
from ..progress import bar
from ..state import random_kept
from .called import digest, update

Unpack = Callable[[Any], tuple[Any, Any]]
Batches = list[list[int]]  # [size, how many of it one after the other], of all batches in their order

# Digests of the "first" sample of a loader and the "last" of those seen (None: unknown), and where rows depend on them,
# all "batches".
Ends = dict[str, Any]

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
ORDERED = (SequentialSampler, BatchSampler, DistributedSampler)  # themselves, not what is derived from them
LOOKED_AT = 1 << 20  # entries of any other sampler


def missing(
    loader: Iterable[Any], done: int, ends: Ends, unpack: Unpack, progress: bool, options: Mapping[str, Any]
) -> Iterator[tuple[int, Any, Any, Ends]]:
    """Batches beyond the first ``done`` samples: the first sample that is not done, inputs, targets, and ends.

    ``options`` are those of `persample.gradients`.

    Raises:
        StoreError: the first or the last of the samples that are done is another one than ``ends`` says, or the
            loader has fewer; or they were done in other batches, and are coupled.
    """
    coupled = options.get("coupled")
    together = coupled not in (None, "eval")  # whether a row depends on the batch
    seen, begin, batches = 0, "", Batches()
    for batch in bar(loader, progress, "gradients"):
        inputs, targets = unpacked(batch, unpack)
        given = Batch.of(inputs, targets, options.get("batch_dim", 0))
        begin, batches = begin or _sample(given, 0), grown(batches, given.n)
        if not seen and done:
            _check_same("first", begin, ends, 0)
        if seen < done <= seen + given.n:
            if together:
                _check_batches(batches, ends.get("batches", []), done, coupled)
            _check_same("last", _sample(given, done - seen - 1), ends, done - 1)
        if done < seen + given.n:
            found = {"first": begin, "last": _sample(given, given.n - 1)}
            yield max(0, done - seen), inputs, targets, {**found, "batches": batches} if together else found
        seen += given.n
    if seen < done:
        raise StoreError(
            f"there are rows of {done} samples, but the loader gives only {seen}. Give the one that was begun with "
            "(one that was read before gives nothing: a generator, an iterator), or begin in another directory."
        )


def unpacked(batch: Any, unpack: Unpack) -> tuple[Any, Any]:
    """Inputs and targets of a batch."""
    pair = unpack(batch)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArgumentError(
            f"a batch must be (inputs, targets), got a {type(pair).__name__}"
            + (f" of {len(pair)}" if isinstance(pair, (tuple, list)) else "")
            + ". Say how to take it apart with unpack=: a function from a batch to inputs and targets."
        )
    return pair[0], pair[1]


def _check_same(which: str, mine: str, ends: Ends, position: int) -> None:
    if ends.get(which) not in (None, mine):
        raise StoreError(
            f"sample {position} of the loader is not the one that the row there was computed for. Give the same "
            "samples in the same order (no shuffling, no random augmentation; where samples are padded to the longest "
            "of a batch, also in the same batches), or begin in another directory."
        )


def grown(batches: Batches, size: int) -> Batches:
    """Batches, and one more."""
    if batches and batches[-1][0] == size:
        return [*batches[:-1], [size, batches[-1][1] + 1]]
    return [*batches, [size, 1]]


def _check_batches(mine: Batches, theirs: Batches, done: int, coupled: Any) -> None:
    if mine != theirs:
        there, here = (", ".join(f"{count} of {size}" for size, count in x) or "unknown" for x in (theirs, mine))
        raise StoreError(
            f"with coupled={coupled!r} a row depends on its whole batch, and the {done} rows that are there were "
            f"computed in other batches ({there}) than the loader gives ({here}). Give the same batches, or begin in "
            "another directory."
        )


def check_loader(loader: Any) -> None:
    """Raise for what gives no batches: nothing to iterate over, or a data set, which gives sample after sample."""
    if isinstance(loader, Dataset) and not hasattr(loader, "__iter__"):
        raise ArgumentError(
            f"a loader gives batches, and a {type(loader).__name__} gives single samples, whose first axis would be "
            "taken for that of the samples: DataLoader(dataset, batch_size=32); batch_size=None, if it gives batches."
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ArgumentError(
            f"a loader gives batches one after the other (a DataLoader, or a list of them), got {type(loader).__name__}"
        )


# ---- order ------------------------------------------------------------------------------------------------------


def check_ordered(loader: Iterable[Any]) -> None:
    """Raise for a loader that gives its samples in another order every time, as far as its sampler tells.

    Those of PyTorch are known; of others, two iterations are compared.  What an `IterableDataset` or any other
    iterable gives can't be known before.
    """
    check_loader(loader)
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        raise StoreError("the loader gives batches in any order, but rows keep it: use in_order=True.")
    outer = sampler = _inner(loader)
    known = True
    while sampler is not None:
        if isinstance(sampler, RANDOM) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise StoreError(
                f"the loader shuffles (it has a {type(sampler).__name__}), but rows keep its order, and are resumed by "
                "it: use shuffle=False, or a sampler that gives the same order every time."
            )
        known = known and type(sampler) in ORDERED
        sampler = _inner(sampler)
    if not known and not _repeats(outer):
        raise StoreError(
            f"the loader shuffles: its {type(outer).__name__} gave another order the second time (or nothing), but "
            "rows keep their order, and are resumed by it. Use a sampler that gives the same order every time."
        )


def _inner(x: Any) -> Any:
    """The sampler that a loader or a sampler reads, that of batches first; ``None`` if it has none."""
    batches = getattr(x, "batch_sampler", None)
    return getattr(x, "sampler", None) if batches is None else batches


def _repeats(sampler: Iterable[Any]) -> bool:
    """Whether a sampler gives the same twice; it costs no data, and random generators stay as they were."""
    with random_kept([]):
        first, second = ([_plain(index) for index in islice(sampler, LOOKED_AT)] for _ in range(2))
    return first == second


def _plain(index: Any) -> Any:
    if isinstance(index, (list, tuple)):
        return [_plain(x) for x in index]
    return index.tolist() if isinstance(index, (Tensor, np.ndarray)) else index


# ---- digests ----------------------------------------------------------------------------------------------------


def _sample(batch: Batch, n: int) -> str:
    return digest((batch.inputs.sample(n), batch.targets.sample(n)))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers (names, types, shapes, values), and of which modules are training."""
    found = hashlib.sha256()
    for name, t in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        update(found, name, t)
    found.update("".join(f"{name} {module.training}\n" for name, module in model.named_modules()).encode())
    return found.hexdigest()
