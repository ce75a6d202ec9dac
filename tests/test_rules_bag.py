"""EmbeddingBag: every option, in two dimensions and with offsets; what couples or mutates is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import BatchCoupledError, CaptureError, PersampleError, SampleAxisError

N, V, D = 4, 7, 5
LENGTHS = [[3, 1, 4, 2], [2, 0, 3, 1], [0, 0, 2, 0], [1, 1, 1, 1], [3, 3, 3, 3]]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Any, *_: Any) -> Any:
        raise AssertionError(f"the fallback served {call.name}")

    monkeypatch.setattr("persample.collect.by_samples", refuse)


def losses(out: Tensor, _: Any = None) -> Tensor:
    return (out.sin() * torch.arange(1.0, D + 1).cos() + out.square()).flatten(1).sum(1)


def check(model: nn.Module, inputs: Any, batch_dim: Any = 0) -> None:
    G = persample.gradients(model, losses, inputs, batch_dim=batch_dim, verify=False)
    reference = persample.gradients(model, losses, inputs, batch_dim=batch_dim, engine="loop")
    for name in G.names:
        torch.testing.assert_close(G[name], reference[name], rtol=1e-12, atol=1e-12)


class Bags(nn.Module):
    """Bags of rows of ids, with fixed, given or learned weights."""

    def __init__(self, weights: str = "", **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, **options)
        self.weights, self.scale = weights, nn.Parameter(torch.randn(6)) if weights == "learned" else None
        self.net = nn.Linear(1, 6) if weights == "sampled" else None

    def forward(self, ids: Tensor) -> Tensor:
        w = None
        if self.scale is not None:
            w = self.scale[: ids.shape[1]].expand(ids.shape)
        elif self.net is not None:
            w = torch.tanh(self.net(ids[:, :1].double()))[:, : ids.shape[1]]
        return self.bag(ids, per_sample_weights=w)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize(
    "shape, vocabulary", [((N, 6), V), ((N, 6), 2), ((N, N), V), ((N, 1), V), ((1, 3), V), ((D, D), 3)]
)
def test_two_dimensions(mode: str, padding_idx: int | None, shape: tuple[int, int], vocabulary: int) -> None:
    ids = torch.randint(vocabulary, shape)
    if padding_idx == -1:
        ids[0] = V - 1  # a bag of padding only
    check(Bags(mode=mode, padding_idx=padding_idx), ids)


@pytest.mark.parametrize("weights", ["learned", "sampled"])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("n", [N, 6, 1])
def test_weights_per_index(weights: str, padding_idx: int | None, n: int) -> None:
    check(Bags(weights, mode="sum", padding_idx=padding_idx), torch.randint(V, (n, 6)))


class Flat(nn.Module):
    """Padded ids and lengths, given to the bag as one flat list with offsets."""

    def __init__(self, last: bool, weights: bool = False, by_mask: bool = True, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, include_last_offset=last, **options)
        self.last, self.by_mask = last, by_mask
        self.scale = nn.Parameter(torch.randn(6)) if weights else None

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        flat = ids[mask] if self.by_mask else torch.cat([row[:k] for row, k in zip(ids, lengths.tolist(), strict=True)])
        w = None if self.scale is None else self.scale[: ids.shape[1]].expand(ids.shape)[mask]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends]) if self.last else ends - lengths
        return self.bag(flat, offsets, per_sample_weights=w)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_offsets(mode: str, last: bool, by_mask: bool, lengths: list[int]) -> None:
    for padding_idx in (None, 1):
        model = Flat(last, by_mask=by_mask, mode=mode, padding_idx=padding_idx)
        check(model, (torch.randint(V, (N, 4)), torch.tensor(lengths)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_offsets_with_learned_weights(last: bool, lengths: list[int]) -> None:
    check(Flat(last, True, mode="sum"), (torch.randint(V, (N, 4)), torch.tensor(lengths)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("names", [False, True])
def test_a_flat_list_as_input(mode: str, names: bool) -> None:
    """The list has no sample axis, the offsets have: rows are those of the single bags."""
    bag, lengths = nn.EmbeddingBag(V, D, mode=mode), torch.tensor([3, 1, 4, 2])
    flat, offsets = torch.randint(V, (10,)), lengths.cumsum(0) - lengths
    inputs: Any = {"input": flat, "offsets": offsets} if names else (flat, offsets)
    batch_dim: Any = ({"input": None, "offsets": 0} if names else (None, 0), 0)
    G = persample.gradients(bag, losses, inputs, batch_dim=batch_dim, verify=False)
    for n, ids in enumerate(flat.split(lengths.tolist())):
        (g,) = torch.autograd.grad(losses(bag(ids[None])).sum(), [bag.weight])
        torch.testing.assert_close(G["weight"][n], g, rtol=1e-12, atol=1e-12)
    with pytest.raises(SampleAxisError, match="flat list of indices"):
        persample.gradients(bag, losses, inputs, batch_dim=batch_dim, engine="loop")
    with pytest.raises(PersampleError):
        persample.gradients(bag, losses, inputs, batch_dim=batch_dim, engine="vmap")
    with pytest.raises(PersampleError):
        persample.gradients(bag, losses, inputs, batch_dim=batch_dim)


def test_what_couples_or_mutates() -> None:
    ids = torch.randint(V, (N, 3))
    with pytest.raises(BatchCoupledError, match="scale_grad_by_freq"):
        persample.gradients(nn.EmbeddingBag(V, D, scale_grad_by_freq=True), losses, ids)
    with pytest.raises(CaptureError, match="max_norm"):
        persample.gradients(nn.EmbeddingBag(V, D, max_norm=1.0), losses, ids)
    bag, ids = nn.EmbeddingBag(V, D), torch.randint(V, (N, N))
    with pytest.raises(SampleAxisError, match="where the samples are"):
        persample.gradients(bag, losses, ids, batch_dim=(1, 0, 0), verify=False)
