"""`max_bytes=`: the batch in slices gives the same numbers, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from benchmarks.measure import peak
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample import microbatch
from persample.factors import Conv, Dense, Factors, Outer, Rows, dense

N = 7
DIRECTION, PROJECTION = "direction", "projection"


class Text(nn.Module):
    """An embedding that is tied to the head, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        h = self.norm(torch.tanh(self.conv(self.embed(ids).mT).mT) * scale)
        return {"logits": F.linear(h, self.embed.weight), "scale": scale}


def losses(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"].mT, y, reduction="none").sum(1)


@pytest.fixture
def given() -> tuple[Any, ...]:
    model = Text().double()
    return model, losses, (torch.randint(11, (N, 5)), torch.rand(1, dtype=torch.float64)), torch.randint(11, (N, 5))


def requests(model: nn.Module) -> list[Any]:
    size = sum(p.numel() for p in model.parameters())
    v, r = torch.randn(size, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
    options = [("clip", {"max_norm": 0.7}), ("dot", {DIRECTION: v}), ("project", {PROJECTION: r})]
    return ["norm", "gram", "cosine", "sum", "mean", "second_moment", ("variance", {"ddof": 1}), *options]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# Of one sample the factors of `Text` take about 5 kB in float64.
@pytest.mark.parametrize("max_bytes", [1, 11_000, 16_000, 30_000, 10**9])
@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_quantities_dont_depend_on_it(given: tuple[Any, ...], engine: str, max_bytes: int) -> None:
    asked = requests(given[0])
    whole = persample.gradients(*given, quantities=asked[:-3] + asked[-2:] if engine != "hooks" else asked)
    options = {"engine": engine, "max_bytes": max_bytes, "verify": True}
    if engine != "hooks":
        asked.remove(asked[-3])  # clip needs hooks
    S = persample.gradients(*given, quantities=asked, **options)
    assert len(S) == N and S.unused == ("spare",) and S.names == whole.names
    close(S.losses, whole.losses)
    close(S.outputs["logits"], whole.outputs["logits"])
    for method in ("norm", "gram", "cosine", "sum", "mean", "second_moment", "variance", "std", "dot", "project"):
        close(getattr(S, method)(), getattr(whole, method)())
    close(S.gram(per_parameter=True), whole.gram(per_parameter=True))
    if engine == "hooks":
        close(S.clip(), whole.clip())


@pytest.mark.parametrize("max_bytes", [1, 11_000, 16_000])
def test_rows_dont_depend_on_it(given: tuple[Any, ...], max_bytes: int) -> None:
    whole = persample.gradients(*given)
    G = persample.gradients(*given, max_bytes=max_bytes)
    assert G.unused == ("spare",) and [type(g) for g in G.factors.values()] == [type(g) for g in whole.factors.values()]
    close(G.dense(), whole.dense())
    close(G.outputs, whole.outputs)
    close(G.gram(), whole.gram())


def test_slices_are_as_large_as_fits(given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    narrowed = microbatch.narrowed

    def noted(batch: Any, at: slice) -> Any:
        sizes.append(at.stop - at.start)
        return narrowed(batch, at)

    monkeypatch.setattr(microbatch, "narrowed", noted)
    for max_bytes, expected in ((1, [2, 1, 1, 1, 1, 1]), (10**9, [2, 5])):
        sizes.clear()
        persample.gradients(*given, quantities=["norm"], max_bytes=max_bytes)
        assert sizes == expected

    wide = nn.Linear(500, 500)  # whose result is much larger than what a sample takes: it isn't counted
    sizes.clear()
    batch = torch.randn(12, 500), torch.randint(500, (12,))
    persample.gradients(
        wide, nn.CrossEntropyLoss(), *batch, quantities=[("clip", {"max_norm": 1.0})], max_bytes=10**6, verify=False
    )
    assert sizes == [2, 10]


def test_memory_is_bounded() -> None:
    model = nn.Sequential(nn.Linear(3, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 3))
    x, y = torch.randn(2000, 3), torch.randint(3, (2000,))

    def run(max_bytes: int | None = None) -> Tensor:
        criterion = nn.CrossEntropyLoss(reduction="none")
        return persample.gradients(
            model, criterion, x, y, quantities=["norm"], verify=False, max_bytes=max_bytes
        ).norm()

    most, whole = peak(run)
    assert most > 8 << 20
    for bound in (2 << 20, 1 << 20):
        found, parts = peak(lambda bound=bound: run(bound))
        torch.testing.assert_close(parts, whole)
        assert 0.5 * bound < found < 1.25 * bound


@pytest.mark.parametrize(("asked", "results"), [(["second_moment"], 1), (["variance"], 2), (["sum", "variance"], 2)])
def test_slices_are_merged_in_the_memory_of_the_result(asked: list[str], results: int) -> None:
    """``results`` of the parameters' size, and a few of the largest layer's, whatever the number of slices."""
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(200, 200), nn.Tanh())))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    args = model, lambda o, t: (o - t).square().sum(1), torch.randn(64, 200), torch.randn(64, 200)

    def run(max_bytes: int | None) -> Any:
        S = persample.gradients(*args, quantities=asked, verify=False, max_bytes=max_bytes)
        return [getattr(S, method)() for method in asked]

    for _ in range(2):  # blocks of scratch memory are kept
        found, parts = peak(lambda: run(1))
    assert results * size < found < (results + 0.8) * size
    torch.testing.assert_close(parts, run(None))


def test_a_gram_matrix_sees_one_mask_per_sample() -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
    torch.manual_seed(1)
    asked = ["norm", "gram", ("project", {PROJECTION: torch.eye(363, dtype=torch.float64)})]
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=asked, max_bytes=4000, verify=False)
    rows = S.project()
    close(S.gram(), rows @ rows.T)
    close(S.norm(), rows.norm(dim=1))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["norm"], max_bytes=2000, verify=False)
    assert torch.equal(drawn, torch.rand(1))  # running slices again draws nothing


def test_every_slice_sees_the_same_buffers() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.linear(x) * self.count

    whole, parts = Drifting(), Drifting()
    parts.load_state_dict(whole.state_dict())
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    a = persample.gradients(whole, nn.CrossEntropyLoss(), x, y, quantities=["gram"], verify=False)
    b = persample.gradients(parts, nn.CrossEntropyLoss(), x, y, quantities=["gram"], verify=False, max_bytes=1)
    torch.testing.assert_close(a.gram(), b.gram())
    assert whole.count == parts.count == 1


@pytest.mark.parametrize("options", [{"max_bytes": 1}, {"quantities": ["gram"], "max_bytes": 1}, {"engine": "loop"}])
def test_what_is_left_of_buffers_is_that_of_one_forward(options: dict[str, Any]) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.lerp_(torch.fft.fft(x.detach()).mean(0), 0.1)
            return x

    whole = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(12, 3)),
        Spectrum(),
    ).double()
    parts = copy.deepcopy(whole)
    x, y = torch.randn(N, 2, 5, dtype=torch.float64), torch.randint(3, (N,))
    whole(x)
    persample.gradients(parts, nn.CrossEntropyLoss(), x, y, **options)
    assert not torch.equal(parts[1].running_mean, torch.zeros(3).double())  # type: ignore[arg-type]
    torch.testing.assert_close(dict(parts.named_buffers()), dict(whole.named_buffers()), rtol=1e-12, atol=1e-15)


def test_buffers_of_the_size_of_a_slice_stay_those_of_the_last() -> None:
    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("last", x.detach().sum(1))
            return super().forward(x)

    model, x = Remembers(4, 3), torch.randn(N, 4)
    model.register_buffer("last", torch.zeros(N))
    persample.gradients(model, nn.CrossEntropyLoss(), x, torch.randint(3, (N,)), engine="loop")
    torch.testing.assert_close(model.last, x[-1:].sum(1))


def test_coupled_batches_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    args = (model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)))
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(*args, max_bytes=1)
    for options in ({}, {"quantities": ["norm"]}):
        with pytest.raises(persample.BatchCoupledError, match="max_bytes= would run the batch in slices"):
            persample.gradients(*args, max_bytes=1, params=r"2\.", verify=False, **options)
    with pytest.raises(ValueError, match="whole batch"):
        persample.gradients(*args, max_bytes=1, coupled="eval")
    with pytest.raises(ValueError, match=r"after \.eval\(\)"):
        persample.gradients(*args, max_bytes=1, coupled="eval")
    with pytest.raises(ValueError, match="positive"):
        persample.gradients(*args, max_bytes=0)


FORMS: list[Factors] = [
    Dense(torch.randn(N, 4, 3)),
    Outer(torch.randn(N, 1, 2, 4), torch.randn(N, 1, 2, 3), torch.Size((4, 3))),
    Rows(torch.randint(4, (N, 2)), torch.randn(N, 2, 3), torch.Size((4, 3))),
    Conv(torch.randn(N, 3, 5), torch.randn(N, 4, 5), (1,), (0,), (1,), torch.Size((4, 3, 1))),
]


@pytest.mark.parametrize("g", FORMS, ids=lambda g: type(g).__name__)
def test_concatenated(g: Factors) -> None:
    from persample.factors import index

    parts = [index(g, at) for at in (slice(0, 2), slice(2, 3), slice(3, N))]
    whole = microbatch.concatenated(parts)
    assert type(whole) is type(g)
    torch.testing.assert_close(dense(whole), dense(g))
    mixed = microbatch.concatenated([parts[0], Dense(dense(parts[1])), parts[2]])
    torch.testing.assert_close(dense(mixed), dense(g))


def test_concatenated_of_other_tokens() -> None:
    a = Outer(torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 3), torch.Size((4, 3)))
    b = Outer(torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 3), torch.Size((4, 3)))
    torch.testing.assert_close(dense(microbatch.concatenated([a, b])), torch.cat([dense(a), dense(b)]))


def test_the_first_call_has_as_large_slices_as_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification takes, gradients of all parameters, is no part of what a sample takes."""
    sizes: list[int] = []
    model = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 3))
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, y = torch.randn(600, 50), torch.arange(600) % 3
    largest = []
    for _ in range(2):
        sizes.clear()
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["norm"], max_bytes=1_000_000)
        largest.append(max(sizes))
    assert largest[0] == largest[1] > 2


def test_what_is_verified_is_no_part_of_what_a_slice_takes() -> None:
    """So that slices are as large, and draw the same masks, whether they are verified or not."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    found = [
        persample.gradients(
            model, F.cross_entropy, x, y, quantities=["norm"], max_bytes=20000, verify=verify,
            generator=torch.Generator().manual_seed(3),
        ).norm()
        for verify in (True, False, None, None)
    ]  # fmt: skip
    assert all(torch.equal(norms, found[0]) for norms in found)


def test_verifying_takes_a_row_and_a_gradient() -> None:
    model = nn.Sequential(nn.Embedding(40_000, 50), nn.Flatten(), nn.Linear(150, 3))
    x, y = torch.randint(40_000, (8, 3)), torch.randint(3, (8,))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for bound in (None, 1):
        most, _ = peak(
            lambda bound=bound: persample.gradients(
                model, F.cross_entropy, x, y, quantities=["norm"], verify=True, max_bytes=bound
            )
        )
        assert 2 * size < most < 3 * size + (4 << 20)  # a new [V, D] of the backward pass, and some blocks


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.sizes = nn.GRU(4, 5, batch_first=True), list[int]()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.sizes.append(len(x))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.read(packed)[1][0]  # type: ignore[no-any-return]


def test_packed_sequences_are_verified_once_for_a_call() -> None:
    """Not in every slice of the first batches, but in one of each size."""
    model, x, lengths = Packed(), torch.randn(24, 6, 4), torch.arange(24) % 6 + 1
    y = torch.randint(5, (24,))
    for number in range(2):
        model.sizes.clear()
        persample.gradients(model, F.cross_entropy, (x, lengths), y, quantities=["norm"], max_bytes=1)
        if number:  # the others' kind is known by now
            assert 22 + 1 < model.sizes.count(1) < 22 + 12 and model.sizes.count(2) < 4


class Capacity(nn.Module):
    """An expert that takes the first twenty rows that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        sent = (x[:, 0] > 0).nonzero().flatten()[:20]
        return x.index_copy(0, sent, self.expert(x[sent]).tanh())


def test_large_slices_are_verified_in_the_first_batches_too() -> None:
    """What couples many samples doesn't show in the first two."""
    model, y = Capacity().double(), torch.randn(40, 3, dtype=torch.float64)
    x = torch.randn(40, 3, dtype=torch.float64).abs()
    few = torch.where(torch.arange(40).unsqueeze(1) % 4 == 0, x, -x)
    for _ in range(2):
        persample.gradients(model, F.mse_loss, few, y, max_bytes=10**9)
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, F.mse_loss, x, y, max_bytes=10**9)


@pytest.mark.parametrize("max_bytes", [None, 1, 10**9])
@pytest.mark.parametrize("options", [{}, {"quantities": [("clip", {"max_norm": 1.0})]}])
def test_two_samples_remain_coupled(options: dict[str, Any], max_bytes: int | None) -> None:
    """Two samples are one slice, which statistics of the batch couple: exchanging one moves the row of the other."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 2])
    for verify in (None, False):
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, max_bytes=max_bytes, verify=verify, **options)
        assert G.note.split(", ").count("batch-coupled") == 1
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(persample.BatchCoupledError):
            persample.optim.ClippedSGD(named, max_norm=1.0).step(G)
