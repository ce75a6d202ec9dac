"""Rows on disk and the cross-Gram in pieces: exact, resumable after any kill, strict about what belongs together."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample import attribution
from persample.attribution import GradientStore, Projection, cross_gram, lock
from persample.attribution import appendable as source
from persample.attribution import store as begun
from persample.errors import ArgumentError, StoreError

N, M = 11, 5
LOSS = nn.CrossEntropyLoss()


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(
        torch.randn(n, 3, generator=generator).double(), torch.randint(0, 2, (n,), generator=generator)
    )


def loader(n: int = N, size: int = 3) -> DataLoader[Any]:
    return DataLoader(data(n), batch_size=size)


def flat(net: nn.Module, n: int = N) -> Tensor:
    return persample.gradients(net, LOSS, *data(n).tensors, engine="loop").flat()  # type: ignore[no-any-return]


def store(path: Path, net: nn.Module, **options: Any) -> GradientStore:
    return GradientStore(path, net, dtype=torch.float64, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- store ------------------------------------------------------------------------------------------------------


def test_rows_and_projected_rows(tmp_path: Path) -> None:
    net, R = model(), Projection(7)
    whole, projected = store(tmp_path / "rows", net), store(tmp_path / "projected", net, projection=R)
    whole.extend(LOSS, loader())
    projected.extend(LOSS, loader(size=4))
    close(whole.rows(), flat(net))
    matrix = torch.cat([R.matrix(name, p.shape).reshape(-1, 7) for name, p in net.named_parameters()])
    close(projected.rows(), flat(net) @ matrix)
    close(GradientStore(tmp_path / "projected").rows(), projected.rows())
    assert repr(whole) == "GradientStore(11 rows of 26, projection=None)"
    some = store(tmp_path / "some", net, params="2")
    some.extend(LOSS, loader())
    close(some.rows(), flat(net)[:, 16:])
    single = GradientStore(tmp_path / "single", net)
    single.extend(LOSS, loader())
    assert single.rows().dtype == torch.float32
    torch.testing.assert_close(single.rows().double(), flat(net), rtol=1e-6, atol=1e-6)


def test_readable_without_the_library(tmp_path: Path) -> None:
    net = model()
    store(tmp_path, net).extend(LOSS, loader())
    meta = json.loads((tmp_path / "rows.json").read_text())
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r", allow_pickle=False)[: meta["rows"]]
    np.testing.assert_allclose(rows, flat(net), rtol=1e-9)
    assert meta["layout"] == {name: list(p.shape) for name, p in net.named_parameters()}
    assert meta["scale"] == "unscaled" and meta["projection"] is None and len(meta["model"]) == 64


def test_going_on_computes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with other batches than before; a batch that is half there adds its other half."""
    net = model()
    first = store(tmp_path, net)
    first.extend(LOSS, itertools.islice(loader(), 2))
    assert len(first) == 6
    computed: list[int] = []
    run = persample.gradients

    def counted(model: nn.Module, loss_fn: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        computed.append(len(x))
        return run(model, loss_fn, x, *args, **options)

    monkeypatch.setattr("persample.attribution.store.gradients", counted)
    again = store(tmp_path, net)
    again.extend(LOSS, loader(size=4))
    assert computed == [4, 3]  # of batches 4, 4, 3
    close(again.rows(), flat(net))
    again.extend(LOSS, loader())
    assert len(again) == N and computed == [4, 3]


def test_a_reader_knows_the_projection(tmp_path: Path) -> None:
    net, R = model(), Projection(6, seed=3)
    store(tmp_path / "projected", net, projection=R).extend(LOSS, loader())
    store(tmp_path / "rows", net).extend(LOSS, loader())
    assert GradientStore(tmp_path / "projected").projection == R
    assert GradientStore(tmp_path / "projected", projection=R).projection == R
    assert GradientStore(tmp_path / "rows").projection is None
    for other in (Projection(6), Projection(7, seed=3)):
        with pytest.raises(StoreError, match="projection"):
            GradientStore(tmp_path / "projected", projection=other)
    with pytest.raises(StoreError, match="projection"):
        GradientStore(tmp_path / "rows", projection=R)
    with pytest.raises(ArgumentError, match="projection must be"):
        GradientStore(tmp_path / "rows", projection=7)  # type: ignore[arg-type]
    meta = tmp_path / "projected" / "rows.json"
    meta.write_text(meta.read_text().replace('"tile"', '"tiles"'))
    with pytest.raises(StoreError, match="can't be read"):
        GradientStore(tmp_path / "projected")


def test_another_model_layout_scale_or_projection_is_refused(tmp_path: Path) -> None:
    net, R = model(), Projection(7)
    store(tmp_path, net, projection=R).extend(LOSS, loader())
    for wrong, options in (
        ("model", {"model": model(1), "projection": R}),
        ("layout", {"model": net, "projection": R, "params": "0"}),
        ("scale", {"model": net, "projection": R, "scale": "mean over the batch"}),
        ("projection", {"model": net, "projection": Projection(7, seed=1)}),
        ("projection", {"model": net}),
    ):
        with pytest.raises(StoreError, match=f"another {wrong}"):
            GradientStore(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="<f8"):
        GradientStore(tmp_path, net, projection=R).append(persample.gradients(net, LOSS, *data(M).tensors))
    assert len(store(tmp_path, net, projection=R)) == N


class Two(nn.Module):
    """Two parameters of one shape, in either order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.full((3, 2), float(ord(name))).double()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a + (x @ self.b).tanh()


def test_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    """Columns are in their order."""
    one, other = Two("a", "b"), Two("b", "a")
    mine = store(tmp_path, one)
    with pytest.raises(StoreError, match="another layout"):
        store(tmp_path, other)
    with pytest.raises(StoreError, match="other parameters"):
        mine.append(persample.gradients(other, LOSS, *data().tensors))


def test_gradients_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    net = model()
    mine = store(tmp_path, net)
    with pytest.raises(StoreError, match="parameters"):
        mine.append(persample.gradients(net, LOSS, *data(M).tensors, params="0"))
    with pytest.raises(StoreError, match="rows"):
        mine.append(persample.gradients(net, LOSS, *data(M).tensors, quantities=["norm"]))
    G = persample.gradients(net, LOSS, *data(M).tensors)
    mine.append(G)
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(StoreError, match="has changed"):
        mine.append(persample.gradients(net, LOSS, *data(M).tensors))
    with pytest.raises(StoreError, match="reading"):
        GradientStore(tmp_path).append(G)
    with pytest.raises(StoreError, match="reading"):
        GradientStore(tmp_path).extend(LOSS, loader())
    with pytest.raises(StoreError, match="no store"):
        GradientStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="shuffles"):
        store(tmp_path / "new", net).extend(LOSS, DataLoader(data(), shuffle=True))


@pytest.mark.parametrize("first", [1.5, -1, N + 1, None])
def test_the_first_row_to_append_is_a_sample(tmp_path: Path, first: Any) -> None:
    mine = store(tmp_path, net := model())
    with pytest.raises(ArgumentError, match=f"first must be a sample of the batch, 0 to {N}, got {first}"):
        mine.append(persample.gradients(net, LOSS, *data().tensors), first=first)
    assert len(mine) == 0


def test_another_loss_function_is_refused(tmp_path: Path) -> None:
    net = model()
    mine = store(tmp_path, net)
    mine.extend(LOSS, itertools.islice(loader(), 2))
    for other in (nn.MultiMarginLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.functional.cross_entropy):
        with pytest.raises(StoreError, match="another loss"):
            store(tmp_path, net).extend(other, loader())
    with pytest.raises(StoreError, match="another coupled"):
        mine.extend(LOSS, loader(), coupled="loss")
    mine.extend(nn.CrossEntropyLoss(), loader())
    close(mine.rows(), flat(net))


class Wrapped(nn.Module):
    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.inner(outputs, targets)  # type: ignore[no-any-return]


class Focal:
    def __init__(self, gamma: float) -> None:
        self._gamma = gamma

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return losses * (1 - (-losses).exp()) ** self._gamma


@pytest.mark.parametrize("make, named", [
    (Wrapped, r"label_smoothing=0\.0.* there, .*label_smoothing=0\.5.* here"),
    (Focal, r"_gamma=0\.0\) there, .*_gamma=0\.5\) here"),
    (lambda g: Focal(g).__call__, r"_gamma=0\.0\) there, .*_gamma=0\.5\) here"),
])  # fmt: skip
def test_a_loss_that_is_set_to_something_else_is_refused(tmp_path: Path, make: Any, named: str) -> None:
    net = model()
    store(tmp_path, net).extend(make(0.0), itertools.islice(loader(), 2))
    with pytest.raises(StoreError, match=f"another loss.*{named}"):
        store(tmp_path, net).extend(make(0.5), loader())
    assert len(store(tmp_path, net)) == 6
    store(tmp_path, net).extend(make(0.0), loader())
    close(store(tmp_path, net).rows(), persample.gradients(net, make(0.0), *data().tensors, engine="loop").flat())
    found = cross_gram(net, make(0.0), loader(), loader(M), out=tmp_path / "gram")
    with pytest.raises(StoreError, match=f"another loss.*{named}"):
        cross_gram(net, make(0.5), loader(), loader(M), out=tmp_path / "gram")
    close(cross_gram(net, make(0.0), loader(), loader(M), out=tmp_path / "gram"), found)


def test_compiled_models_have_the_names_of_their_originals(tmp_path: Path) -> None:
    net = model()
    compiled = torch.compile(net)
    mine = store(tmp_path, compiled, params="2")
    mine.append(persample.gradients(compiled, LOSS, *data(3).tensors, params="2"))
    mine.extend(LOSS, [data(3)[:], data()[:]])
    expected = torch.cat([flat(net, 3), flat(net)])[:, 16:]
    close(mine.rows(), expected)
    close(store(tmp_path, net, params="2").rows(), expected)
    for _ in range(2):
        found = cross_gram(compiled, LOSS, loader(), loader(M), params="2", out=tmp_path / "gram")
        close(found, flat(net)[:, 16:] @ flat(net, M)[:, 16:].T)
    close(cross_gram(net, LOSS, loader(), loader(M), params="2", out=tmp_path / "gram"), found)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_statistics_and_modes_belong_to_the_model(tmp_path: Path) -> None:
    """BatchNorm in evaluation mode: rows depend on its buffers."""
    net = normed().eval()
    mine = store(tmp_path, net)
    mine.extend(LOSS, itertools.islice(loader(), 1))
    net[1].running_mean += 1  # type: ignore[index, operator]
    with pytest.raises(StoreError, match="buffers"):
        mine.extend(LOSS, loader())
    with pytest.raises(StoreError, match="buffers"):
        mine.append(persample.gradients(net, LOSS, *data().tensors))
    with pytest.raises(StoreError, match=r"another model .*buffers"):
        store(tmp_path, net)
    net[1].running_mean -= 1  # type: ignore[index, operator]
    with torch.no_grad():
        net[0].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
    with pytest.raises(StoreError, match="has changed"):
        mine.extend(LOSS, loader())
    other = store(tmp_path / "other", net)
    net.train()
    with pytest.raises(StoreError, match="has changed"):
        other.append(persample.gradients(net, LOSS, *data().tensors, coupled="loss"))
    with pytest.raises(StoreError, match=r"another model .*train, eval"):
        store(tmp_path, normed().train())


class Centred(nn.Module):
    """Samples act on each other where nobody differentiates, so rows are those within the batch; their note says it."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double().requires_grad_(False), nn.Linear(4, 2).double()
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h - h.mean(0) if self.centred else h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("projection", [None, Projection(7)])
def test_rows_of_another_notion_are_refused(tmp_path: Path, projection: Projection | None) -> None:
    """Also after the store was opened again, and of statistics."""
    net, (x, y) = normed(), data().tensors
    asked = None if projection is None else [("project", {"projection": projection})]

    def rows(notion: str, n: int = N, verify: bool | None = None) -> Any:
        return persample.gradients(net, LOSS, x[:n], y[:n], coupled=notion, quantities=asked, verify=verify, params="0")

    mine = store(tmp_path, net, projection=projection, params="0")
    mine.append(rows("frozen"))
    mine.append(rows("frozen", 4, verify=False))
    if projection is None:
        mine.append(persample.coupling(net, LOSS, x, y, params="0").gradients("frozen"))
    done = len(mine)
    for again in (mine, store(tmp_path, net, projection=projection, params="0")):
        with pytest.raises(StoreError, match=r"another notion.*'frozen' there, 'loss' here\..*or begin in another"):
            again.append(rows("loss"))
        with pytest.raises(StoreError, match="'frozen' there, 'copy' here"):
            again.append(rows("copy", 2))
        assert len(again) == done
    meta = json.loads((tmp_path / "rows.json").read_text())
    assert meta.pop("notion") == "frozen"
    (tmp_path / "rows.json").write_text(json.dumps(meta))
    old = store(tmp_path, net, projection=projection, params="0")  # of an earlier version: what is added next says it
    old.append(rows("loss"))
    with pytest.raises(StoreError, match="'loss' there, 'frozen' here"):
        old.append(rows("frozen"))


@pytest.mark.parametrize("first", [True, False])
def test_rows_within_the_batch_are_another_notion(tmp_path: Path, first: bool) -> None:
    notions = ["'batch-coupled'", "of independent samples"]
    there, here = notions if first else notions[::-1]

    def rows(centred: bool, n: int = N) -> Any:
        return persample.gradients(Centred(centred), LOSS, *data(n).tensors)

    mine = store(tmp_path, Centred(first))
    mine.append(rows(first))
    with pytest.raises(StoreError, match=f"another notion.*{there} there, {here} here"):
        mine.append(rows(not first))
    mine.append(rows(first, 1))  # the last of a loader: of one sample nothing is coupled
    mine.append(rows(first))
    assert len(mine) == 2 * N + 1


class Counted(nn.Module):
    """A model with settings, one of them a word, and with what its passes count."""

    def __init__(self, slope: Any = 0.1, how: Any = "leaky_relu", act: Any = torch.sin) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.slope, self.how, self.act = nn.Linear(3, 2).double(), slope, how, act
        self.calls, self.mean, self.first = 0, 0.0, True

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.mean, self.first = self.calls + 1, float(x.mean()), False
        self.last = tuple(x.shape)
        slope = self.slope[0] if isinstance(self.slope, tuple) else self.slope
        return self.act(getattr(F, self.how)(self.layer(x), slope))


class Dying:
    """A loader that dies after its first batch."""

    def __iter__(self) -> Iterator[Any]:
        yield next(iter(loader()))
        raise Killed


class Derived(Counted):
    pass


SETTINGS: dict[str, Any] = {
    r"'slope' was 0\.1 then, and is 0\.9 now": lambda: Counted(0.9),
    r"'slope' was 0\.1 then, and is \(0\.1, 2\) now": lambda: Counted((0.1, 2)),
    r"'how' was 'leaky_relu' then, and is 'elu' now": lambda: Counted(how="elu"),
    r"'act' was \S*sin then, and is \S*cos now": lambda: Counted(act=torch.cos),
    r"it was \S*Counted then, and is \S*Derived now": Derived,
}


@pytest.mark.parametrize("said", SETTINGS)
def test_a_model_that_is_set_to_something_else_is_refused(tmp_path: Path, said: str) -> None:
    """Its parameters and buffers are the same."""
    store(tmp_path, Counted()).extend(LOSS, loader(6))
    with pytest.raises(StoreError, match=rf"rows\.npy .*{said}"):
        store(tmp_path, SETTINGS[said]())
    cross_gram(Counted(), LOSS, loader(), loader(M), out=tmp_path / "gram")
    with pytest.raises(StoreError, match=rf"columns-00000\.npy .*{said}"):
        cross_gram(SETTINGS[said](), LOSS, loader(), loader(M), out=tmp_path / "gram")


def test_a_model_that_is_set_to_something_else_while_its_store_is_open(tmp_path: Path) -> None:
    net = Counted()
    mine, G = store(tmp_path, net), persample.gradients(net, LOSS, *data().tensors)
    mine.append(G)
    net.slope = 0.5
    for use in (lambda: mine.append(G), lambda: mine.extend(LOSS, loader(N + 1))):
        with pytest.raises(StoreError, match=r"'slope' was 0\.1 then, and is 0\.5 now\. Set it back"):
            use()
    net.slope = 0.1
    mine.append(G)
    assert len(mine) == 2 * N


def test_what_passes_of_a_model_change_is_no_setting(tmp_path: Path) -> None:
    mine = store(tmp_path, Counted())
    mine.extend(LOSS, itertools.islice(loader(), 2))
    net = Counted()
    net(torch.zeros(2, 3).double())
    again = store(tmp_path, net)
    again.extend(LOSS, itertools.islice(loader(), 3))
    net(torch.zeros(2, 3).double())
    again.extend(LOSS, loader())
    close(again.rows(), flat(Counted()))
    for block in (1, None):
        path = tmp_path / str(block)
        with pytest.raises(Killed):
            cross_gram(Counted(), LOSS, Dying(), loader(M), block=block, out=path)
        close(cross_gram(net, LOSS, loader(), loader(M), block=block, out=path), flat(net) @ flat(net, M).T)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_counters_of_rows_that_are_appended_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Counting(3, 2)).double()
    mine = store(tmp_path, net)
    for batch in itertools.islice(loader(), 2):
        mine.append(persample.gradients(net, LOSS, *batch))
    net(torch.zeros(2, 3).double())
    again = store(tmp_path, net)
    for batch in itertools.islice(loader(), 2, None):
        again.append(persample.gradients(net, LOSS, *batch))
    close(mine.rows(), flat(net)[:6])
    close(again.rows(), flat(net))


def test_stores_that_know_nothing_of_settings_are_read_only(tmp_path: Path) -> None:
    store(tmp_path, model()).extend(LOSS, itertools.islice(loader(), 2))
    meta = json.loads((tmp_path / "rows.json").read_text())
    del meta["settings"]
    (tmp_path / "rows.json").write_text(json.dumps(meta))
    close(GradientStore(tmp_path).rows(), flat(model())[:6])
    with pytest.raises(StoreError, match=r"earlier version.*can be read, but not gone on with"):
        store(tmp_path, model())


def test_a_model_in_training_mode(tmp_path: Path) -> None:
    """Its statistics are written by every pass, and put back: it is still the same."""
    net = normed()
    mine = store(tmp_path, net)
    mine.extend(LOSS, loader(size=6), coupled="loss")
    parts = [persample.gradients(net, LOSS, *batch, engine="hooks", coupled="loss").flat() for batch in loader(size=6)]
    close(mine.rows(), torch.cat(parts))


def test_a_loader_in_the_place_of_the_loss(tmp_path: Path) -> None:
    mine = store(tmp_path, model())
    with pytest.raises(ArgumentError, match=r"extend\(loss_fn, loader\), got DataLoader and CrossEntropyLoss"):
        mine.extend(loader(), LOSS)  # type: ignore[arg-type]
    mine.extend(LOSS, loader())
    with pytest.raises(persample.QuantityError, match=r"train must be features.*store\.rows\(\)"):
        attribution.grad_dot(mine, mine.rows())  # type: ignore[arg-type]
    G = persample.gradients(mine.model, LOSS, *data().tensors)  # type: ignore[arg-type]
    with pytest.raises(persample.QuantityError, match=r"G\.flat\(\) beside.*store\.rows\(\)"):
        attribution.grad_dot(mine, G)  # type: ignore[arg-type]


def test_options_of_the_store_are_refused_elsewhere(tmp_path: Path) -> None:
    mine = store(tmp_path, model())
    for option, value in (("params", "0"), ("quantities", ["norm"])):
        with pytest.raises(ArgumentError, match=f"{option}= is not asked for here"):
            mine.extend(LOSS, loader(), **{option: value})
    with pytest.raises(ArgumentError, match="quantities="):
        cross_gram(model(), LOSS, loader(), loader(), quantities=["norm"])
    with pytest.raises(ArgumentError, match="projection must be"):
        store(tmp_path / "other", model(), projection=7)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_dtypes_that_would_lose_rows_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match="dtype must be one of"):
        GradientStore(tmp_path, model(), dtype=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, size, named", [
    (torch.float16, 1e6, "infinite"), (torch.float16, 1e-9, "zero"), (torch.float32, 1e50, "infinite"),
    (torch.float32, 1e-60, "zero"),
])  # fmt: skip
def test_rows_that_the_dtype_cannot_hold_are_refused(
    tmp_path: Path, kind: torch.dtype, size: float, named: str
) -> None:
    net = model()
    mine = GradientStore(tmp_path, net, dtype=kind)
    mine.extend(LOSS, itertools.islice(loader(), 1))
    scaled = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none") * size  # noqa: E731
    with pytest.raises(StoreError, match=f"would be {named}"):
        mine.append(persample.gradients(net, scaled, *data().tensors))
    assert len(mine) == 3
    torch.testing.assert_close(mine.rows().double(), flat(net)[:3], rtol=1e-3, atol=1e-3)


def test_complex_rows_need_a_complex_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2, dtype=torch.complex128)
    x = data().tensors[0]
    G = persample.gradients(net, lambda z, _: (z * z.conj()).real.sum(1), x + 0j)
    with pytest.raises(StoreError, match="complex"):
        store(tmp_path / "real", net).append(G)
    mine = GradientStore(tmp_path / "complex", net, dtype=torch.complex128)
    mine.append(G)
    close(mine.rows(), G.flat())


def step(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p += 1


def put_back(net: nn.Module) -> None:
    """Rows are of a model that was there for a while: no version tells how it came, but that it has gone."""
    state = {name: t.clone() for name, t in net.state_dict().items()}
    for p in net.parameters():
        p.data.sub_(1)
    net.load_state_dict(state)


def replaced(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data + 1


@pytest.mark.parametrize("change", [step, put_back, replaced])
@pytest.mark.parametrize(
    "kind", ["rows", "selected", "statistics", "in slices", "recorder", "table", "copy", "late copy"]
)
def test_rows_of_parameters_as_they_were_are_refused(tmp_path: Path, kind: str, change: Any) -> None:
    net, (x, y), R = model(), data(M).tensors, Projection(7)
    asked = [("project", {"projection": R})] if kind in ("statistics", "in slices") else None

    def rows() -> Any:
        if kind == "recorder":
            with persample.extend(net) as recorder:
                return recorder.gradients(F.cross_entropy(net(x), y, reduction="none"))
        if kind == "table":
            return persample.coupling(net, LOSS, x, y).row(0)
        size = 3000 if kind == "in slices" else None
        G = persample.gradients(net, LOSS, x, y, quantities=asked, max_bytes=size)
        return G.select(lambda *_: True) if kind == "selected" else G

    def copied(G: Any, early: bool) -> Any:
        nonlocal net
        if kind == ("copy" if early else "late copy"):
            net, G = copy.deepcopy((net, G))
        return G

    G = copied(rows(), early=True)
    change(net)
    G = copied(G, early=False)
    mine = store(tmp_path, net, projection=None if asked is None else R)
    with pytest.raises(StoreError, match=r"parameter '0\.weight' was written to after these gradients .* again"):
        mine.append(G)
    assert not len(mine)
    mine.append(copied(rows(), early=True) if "copy" not in kind else persample.gradients(net, LOSS, x, y))
    assert len(mine) == M


def test_a_copy_of_rows_and_model_belongs_to_its_store(tmp_path: Path) -> None:
    net = model()
    G = persample.gradients(net, LOSS, *data(M).tensors)
    net, G = copy.deepcopy((net, G))
    mine = store(tmp_path, net)
    mine.append(G)
    G.backward()
    mine.append(pickle.loads(pickle.dumps(G)))
    assert len(mine) == 2 * M


def test_losses_of_a_forward_before_a_step_are_rows_of_then(tmp_path: Path) -> None:
    net, (x, y) = nn.Sequential(nn.Linear(3, 2).double()), data(M).tensors
    with persample.extend(net) as recorder:
        losses = F.cross_entropy(net(x), y, reduction="none")
        step(net)
        G = recorder.gradients(losses)
    with pytest.raises(StoreError, match=r"'0\.weight' was written to after"):
        store(tmp_path, net).append(G)


# ---- damaged ----------------------------------------------------------------------------------------------------


def test_rows_that_are_missing_are_never_zeros(tmp_path: Path) -> None:
    net = model()
    mine = store(tmp_path, net)
    mine.extend(LOSS, itertools.islice(loader(), 2))
    size = (tmp_path / "rows.npy").stat().st_size
    os.truncate(tmp_path / "rows.npy", size - 1)
    for use in (
        lambda: mine.extend(LOSS, loader()),
        mine.rows,
        lambda: GradientStore(tmp_path),
        lambda: store(tmp_path, net),
    ):
        with pytest.raises(StoreError, match=r"rows\.npy is damaged: it has \d+ bytes, but 6 rows"):
            use()
    assert (tmp_path / "rows.npy").stat().st_size == size - 1
    (tmp_path / "rows.npy").unlink()
    with pytest.raises(StoreError, match="it has 0 bytes"):
        GradientStore(tmp_path)


@pytest.mark.parametrize("text", ["", '{"rows": 3, "wid', "[1, 2]", "{}", '{"rows": 3}', '{"rows": "3"}'])
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    net = model()
    store(tmp_path, net).extend(LOSS, loader())
    cross_gram(net, LOSS, loader(), loader(M), out=tmp_path / "gram")
    for path in (tmp_path / "rows.json", tmp_path / "gram" / "columns-00000.json"):
        path.write_text(text)
    for use in (
        lambda: GradientStore(tmp_path),
        lambda: store(tmp_path, net),
        lambda: cross_gram(net, LOSS, loader(), loader(M), out=tmp_path / "gram"),
    ):
        with pytest.raises(StoreError, match=r"\.json is damaged"):
            use()


def test_an_index_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"rows": 0}')
    with pytest.raises(StoreError, match="another layout: None there"):
        store(tmp_path, model())
    assert repr(GradientStore(tmp_path)) == "GradientStore(0 rows of ?, projection=None)"


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    store(tmp_path, model())
    assert len(GradientStore(tmp_path)) == 0 and GradientStore(tmp_path).rows().shape == (0, 0)


@pytest.mark.parametrize("use", ["append", "extend", "open"])
def test_rows_of_another_handle_are_never_cut_off(tmp_path: Path, use: str) -> None:
    net = model()
    G = persample.gradients(net, LOSS, *data(3).tensors)
    one, other = store(tmp_path, net), store(tmp_path, net)
    one.append(G)
    one.append(G)
    with pytest.raises(StoreError, match=r"rows\.json is not what this handle .* 6 rows, not 0.* open it again"):
        other.append(G) if use == "append" else other.extend(LOSS, loader())
    close(one.rows(), flat(net, 3).repeat(2, 1))
    if use == "open":
        store(tmp_path, net).append(G)
        with pytest.raises(StoreError, match="9 rows, not 6"):
            one.append(G)
    assert len(store(tmp_path, net)) == (9 if use == "open" else 6)


def test_a_store_that_was_deleted_is_not_begun_again_in_the_middle(tmp_path: Path) -> None:
    net = model()
    mine = store(tmp_path, net)
    mine.extend(LOSS, loader())
    for file in ("rows.json", "rows.npy"):
        (tmp_path / file).unlink()
    with pytest.raises(StoreError, match="0 rows, not 11"):
        mine.append(persample.gradients(net, LOSS, *data(3).tensors))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.lock"]


@pytest.mark.parametrize("again", ["projected", "the same", "nothing"])
def test_a_reader_finds_a_store_that_was_begun_anew(tmp_path: Path, again: str) -> None:
    """Its JSON says nothing of the rows that are there now, which have another width, or are of other samples."""
    net = model()
    store(tmp_path, net).extend(LOSS, itertools.islice(loader(), 2))
    reader = GradientStore(tmp_path)
    store(tmp_path, net).extend(LOSS, loader())
    close(reader.rows(), flat(net)[:6])  # that more were added does no harm
    shutil.rmtree(tmp_path)
    if again != "nothing":
        projection = Projection(64) if again == "projected" else None
        store(tmp_path, net, projection=projection).extend(LOSS, loader())
    with pytest.raises(StoreError, match=r"rows\.npy holds other rows than .* begun anew, since\. Open it again"):
        reader.rows()


def meanwhile(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Any) -> list[threading.Thread]:
    """Let another thread act at the next call of ``owner.name``, for as long as it can."""
    original, threads = getattr(owner, name), list[threading.Thread]()

    def call(*args: Any) -> Any:
        monkeypatch.undo()
        threads.append(threading.Thread(target=act))
        threads[0].start()
        threads[0].join(0.5)
        return original(*args)

    monkeypatch.setattr(owner, name, call)
    return threads


@pytest.mark.parametrize("where", ["_check_whole", "_replace"])
def test_an_append_that_returns_has_its_rows_whoever_appends_at_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    net = model()
    one, other = store(tmp_path, net), store(tmp_path, net)
    G, H = (persample.gradients(net, LOSS, *data(n).tensors) for n in (3, 4))
    said: list[str] = []

    def second() -> None:
        try:
            other.append(H)
            said.append("")
        except StoreError as error:
            said.append(str(error))

    threads = meanwhile(monkeypatch, one.table, where, second)
    one.append(G)
    threads[0].join()
    assert "it says 3 rows, not 0" in said[0] and "open it again" in said[0]
    close(GradientStore(tmp_path).rows(), flat(net, 3))
    close(torch.from_numpy(np.load(tmp_path / "rows.npy")), flat(net, 3))


def test_a_store_that_is_opened_writes_nothing_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    store(tmp_path, net).extend(LOSS, loader())
    cross_gram(net, LOSS, loader(), loader(M), out=tmp_path)

    def fails(*_: Any) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(os, "replace", fails)
    assert len(store(tmp_path, net)) == N
    assert cross_gram(net, LOSS, loader(), loader(M), out=tmp_path).shape == (N, M)


@pytest.mark.parametrize("rows", [0, 3])
def test_two_begin_a_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Where both say the same, nobody has to begin again; what one has added since is not taken back."""
    net = model()
    G = persample.gradients(net, LOSS, *data(3).tensors)

    def other() -> None:
        mine = store(tmp_path, net)
        if rows:
            mine.append(G)

    threads = meanwhile(monkeypatch, begun, "describe", other)
    if rows:
        with pytest.raises(StoreError, match="it says 3 rows, not 0"):
            store(tmp_path, net)
    else:
        store(tmp_path, net).append(G)
    threads[0].join()
    close(GradientStore(tmp_path).rows(), flat(net, 3))


def test_where_there_are_no_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    net = model()
    monkeypatch.setattr(lock, "_take", refused)
    with pytest.warns(UserWarning, match=r"rows\.lock can't be locked \(No locks available\)"):
        mine = store(tmp_path, net)
    with pytest.warns(UserWarning, match="Let one write"):
        mine.extend(LOSS, loader())
    close(mine.rows(), flat(net))


def test_header_is_numpys(tmp_path: Path) -> None:
    for rows in (1, 10**9):
        header = source._header("<f4", rows, 12345678)
        assert len(header) == source.HEADER
        (tmp_path / "x.npy").write_bytes(header)
        with (tmp_path / "x.npy").open("rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((rows, 12345678), False, np.dtype("<f4"))


# ---- killed -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a process feels when it dies."""


def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Die at the k-th thing that reaches the disk, for k = 1, 2, ... until nothing is left to die at."""
    sync, replace = source._sync, os.replace
    for k in itertools.count(1):
        left = [k]

        def last(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] == 0

        def dying_sync(file: Any, last: Any = last) -> None:
            if last():
                file.flush()
                os.truncate(file.name, max(0, os.path.getsize(file.name) - 13))  # half written
                raise Killed
            sync(file)

        def dying_replace(a: Any, b: Any, last: Any = last) -> None:
            if last():
                raise Killed
            replace(a, b)

        monkeypatch.setattr(source, "_sync", dying_sync)
        monkeypatch.setattr(os, "replace", dying_replace)
        yield k
        monkeypatch.undo()
        if left[0] > 0:
            return


def test_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    expected, died = flat(net), 0
    for k in deaths(monkeypatch):
        path = tmp_path / str(k)
        try:
            store(path, net).extend(LOSS, loader())
        except Killed:
            died += 1
        monkeypatch.undo()
        again = store(path, net)
        if len(again):
            close(again.rows(), expected[: len(again)])  # whole batches, nothing half written
        assert len(again) % 3 == 0 or len(again) == N
        again.extend(LOSS, loader())
        close(again.rows(), expected)
        np.testing.assert_array_equal(np.load(path / "rows.npy"), again.rows())
    assert died > 12


WRITER = """
import sys, numpy as np
from persample.attribution.appendable import Appendable
table = Appendable(sys.argv[1], "rows")
print("ready", flush=True)
for n in range(len(table), 10**6):
    table.append(np.full((1, 300), n, dtype="<f8"))
    print(n, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that can't be caught")
def test_killed_for_real(tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments: every append that had returned is there, once, in order."""
    reported = -1
    for wait in (0.0, 0.011, 0.3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            lines = [line for line in process.stdout.read().splitlines() if line]
        reported = max([reported, *map(int, lines[:-1])])  # the last line may be cut
        rows = source.Appendable(tmp_path, "rows").rows()
        assert len(rows) > reported
        if len(rows):
            np.testing.assert_array_equal(rows, np.arange(len(rows))[:, None] * np.ones(300))
    assert reported > 0


# ---- cross-Gram -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 1, 2])
def test_cross_gram(tmp_path: Path, block: int | None) -> None:
    net = model()
    expected = flat(net) @ flat(net, M).T
    close(cross_gram(net, LOSS, loader(), loader(M, 2), block=block), expected)
    close(cross_gram(net, LOSS, loader(), loader(M, 2), block=block, out=tmp_path), expected)
    files = sorted(tmp_path.glob("columns-*.npy"))
    assert len(files) == {None: 1, 1: 3, 2: 2}[block]
    close(torch.from_numpy(np.hstack([np.load(file) for file in files])), expected)
    R = Projection(6)
    matrix = torch.cat([R.matrix(name, p.shape).reshape(-1, 6) for name, p in net.named_parameters()])
    found = cross_gram(net, LOSS, loader(), loader(M, 2), block=block, projection=R)
    close(found, flat(net) @ matrix @ (flat(net, M) @ matrix).T)


def test_cross_gram_of_some_parameters_and_other_batches() -> None:
    net = model()
    batches = [{"x": x, "y": y} for x, y in loader()]
    unpack = lambda batch: (batch["x"], batch["y"])  # noqa: E731
    found = cross_gram(net, LOSS, batches, batches[:2], params="2", unpack=unpack)
    close(found, flat(net)[:, 16:] @ flat(net)[:6, 16:].T)


def test_cross_gram_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    expected, died = flat(net) @ flat(net, M).T, 0
    for k in deaths(monkeypatch):
        path = tmp_path / str(k)
        try:
            cross_gram(net, LOSS, loader(size=6), loader(M), block=1, out=path)
        except Killed:
            died += 1
        monkeypatch.undo()
        close(cross_gram(net, LOSS, loader(size=6), loader(M), block=1, out=path), expected)
    assert died > 12


def test_cross_gram_that_is_finished_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    found = cross_gram(net, LOSS, loader(), loader(M), out=tmp_path)
    monkeypatch.setattr("persample.attribution.cross.gradients", lambda *_, **__: pytest.fail("computed again"))
    close(cross_gram(net, LOSS, loader(), loader(M), out=tmp_path), found)


def test_cross_gram_refuses_what_does_not_belong(tmp_path: Path) -> None:
    net = model()
    cross_gram(net, LOSS, loader(), loader(M), out=tmp_path)
    with pytest.raises(StoreError, match="another model"):
        cross_gram(model(1), LOSS, loader(), loader(M), out=tmp_path)
    with pytest.raises(StoreError, match="another block"):
        cross_gram(net, LOSS, loader(), loader(M), block=1, out=tmp_path)
    shuffled = DataLoader(data(), shuffle=True)
    for pair in ((shuffled, loader(M)), (loader(), shuffled)):
        with pytest.raises(StoreError, match="shuffles"):
            cross_gram(net, LOSS, *pair)
    with pytest.raises(StoreError, match="empty"):
        cross_gram(net, LOSS, loader(), [])
    for block in (0, -1, 1.5, "1"):
        with pytest.raises(ArgumentError, match="block"):
            cross_gram(net, LOSS, loader(), loader(M), block=block)  # type: ignore[arg-type]
    for empty in ([], iter([])):
        with pytest.raises(StoreError, match="train loader is empty"):
            cross_gram(net, LOSS, empty, loader(M))


def test_cross_gram_is_never_that_of_something_else(tmp_path: Path) -> None:
    net = model()
    found = cross_gram(net, LOSS, loader(), loader(M), out=tmp_path)
    x, y = data(M).tensors
    longer, shorter = [data()[:], data(1)[:]], [data()[:2]]
    for named, call in {
        "another loss": lambda: cross_gram(net, nn.MultiMarginLoss(), loader(), loader(M), out=tmp_path),
        "another coupled": lambda: cross_gram(net, LOSS, loader(), loader(M), out=tmp_path, coupled="loss"),
        "another layout": lambda: cross_gram(net, LOSS, loader(), loader(M), out=tmp_path, params="0"),
        "another test_samples": lambda: cross_gram(net, LOSS, loader(), [(x, 1 - y)], out=tmp_path),
        "11 training samples, but the loader gives more": lambda: cross_gram(
            net, LOSS, longer, loader(M), out=tmp_path
        ),
        "gives only 2": lambda: cross_gram(net, LOSS, shorter, loader(M), out=tmp_path),
        "sample 0 of the loader": lambda: cross_gram(net, LOSS, loader(N + 1), loader(M), out=tmp_path),
        "gives only 0": lambda: cross_gram(net, LOSS, iter([]), loader(M), out=tmp_path),
    }.items():
        with pytest.raises(StoreError, match=named):
            call()
    close(cross_gram(net, LOSS, loader(), loader(M), out=tmp_path), found)


def test_cross_gram_of_fewer_columns(tmp_path: Path) -> None:
    net = model()
    cross_gram(net, LOSS, loader(), loader(4, 2), block=1, out=tmp_path)
    with pytest.raises(StoreError, match="more columns"):
        cross_gram(net, LOSS, loader(), itertools.islice(loader(4, 2), 1), block=1, out=tmp_path)


class Changing:
    """Batches that are others every time they are read."""

    def __init__(self, *versions: list[Any]) -> None:
        self.versions = iter(versions)

    def __iter__(self) -> Iterator[Any]:
        return iter(next(self.versions))


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_block_meets_the_same_training_samples(tmp_path: Path, on_disk: bool) -> None:
    net, (x, y), out = model(), data().tensors, tmp_path if on_disk else None
    with pytest.raises(ArgumentError, match="generator, which can be read only once"):
        cross_gram(net, LOSS, (batch for batch in loader()), loader(M, 2), block=1, out=out)
    for k, other in enumerate([[(x.flip(0), y.flip(0))], [(x[:-1], y[:-1])], [(x, y), (x, y)]]):
        with pytest.raises(StoreError, match="the same every time"):
            cross_gram(net, LOSS, Changing([(x, y)], other), loader(M, 2), block=2, out=out and out / str(k))
    with pytest.raises(StoreError, match="empty"):
        cross_gram(net, LOSS, Changing([(x, y)], []), loader(M, 2), block=2)
    once = cross_gram(net, LOSS, (batch for batch in loader()), loader(M, 2), out=out)
    close(once, flat(net) @ flat(net, M).T)


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    cross_gram(model(), LOSS, loader(), loader(M), progress=True)
    assert "4/4" in capfd.readouterr().err


# ---- rows that depend on their batch, and models that change in a pass ------------------------------------------


@pytest.mark.parametrize("notion", ["frozen", "copy", "loss", "influence"])
def test_coupled_rows_go_on_in_the_batches_they_were_begun_in(tmp_path: Path, notion: str) -> None:
    net = normed()
    whole = [persample.gradients(net, LOSS, *batch, coupled=notion) for batch in loader(size=6)]
    store(tmp_path, net).extend(LOSS, itertools.islice(loader(size=6), 1), coupled=notion)
    for size in (4, 3, N):  # the rows that are there end within a batch, behind two, and within the only one
        with pytest.raises(StoreError, match=r"depends on its whole batch.*\(1 of 6\)"):
            store(tmp_path, net).extend(LOSS, loader(size=size), coupled=notion)
    mine = store(tmp_path, net)
    mine.extend(LOSS, loader(size=6), coupled=notion)
    close(mine.rows(), torch.cat([G.flat() for G in whole]))
    mine.extend(LOSS, loader(size=6), coupled=notion)
    with pytest.raises(StoreError, match=r"\(1 of 6, 1 of 5\) than the loader gives \(1 of 11\)"):
        mine.extend(LOSS, loader(size=N), coupled=notion)
    longer = [data()[:6], tuple(torch.cat([t, t])[6:15] for t in data().tensors)]
    with pytest.raises(StoreError, match=r"\(1 of 6, 1 of 5\) than the loader gives \(1 of 6, 1 of 9\)"):
        mine.extend(LOSS, longer, coupled=notion)
    assert len(mine) == N


def test_coupled_rows_that_were_appended_by_hand(tmp_path: Path) -> None:
    net = normed()
    first, last = (persample.gradients(net, LOSS, *batch, coupled="loss") for batch in loader(size=6))
    mine = store(tmp_path / "whole", net)
    mine.append(first)
    with pytest.raises(StoreError, match="depends on its whole batch"):
        mine.extend(LOSS, loader(size=3), coupled="loss")
    mine.extend(LOSS, loader(size=6), coupled="loss")
    close(mine.rows(), torch.cat([first.flat(), last.flat()]))
    mine.append(first)
    twice = [*loader(size=6), data()[:6], data()[:6]]
    with pytest.raises(StoreError, match="depends on its whole batch"):
        mine.extend(LOSS, [data()[:], data()[:]], coupled="loss")
    mine.extend(LOSS, twice, coupled="loss")
    assert len(mine) == N + 12
    part = store(tmp_path / "part", net)
    part.append(persample.gradients(net, LOSS, *data().tensors, coupled="loss"), first=5)
    with pytest.raises(StoreError, match="unknown"):
        part.extend(LOSS, [[t[5:] for t in data().tensors], *loader(size=6)], coupled="loss")


def test_rows_of_running_statistics_go_on_in_any_batches(tmp_path: Path) -> None:
    net = normed()
    mine = store(tmp_path, net)
    mine.extend(LOSS, itertools.islice(loader(size=6), 1), coupled="eval")
    mine.extend(LOSS, loader(size=4), coupled="eval")
    close(mine.rows(), flat(net.eval()))


def test_coupled_cross_gram_goes_on_in_the_batches_it_was_begun_in(tmp_path: Path) -> None:
    net = normed()
    expected = cross_gram(net, LOSS, loader(size=6), loader(M), coupled="loss")

    def cut() -> Iterator[Any]:
        yield next(iter(loader(size=6)))
        raise Killed

    with pytest.raises(Killed):
        cross_gram(net, LOSS, cut(), loader(M), coupled="loss", out=tmp_path)
    for _ in range(2):  # half done, and finished
        with pytest.raises(StoreError, match=r"depends on its whole batch.*than the loader gives \(. of 4"):
            cross_gram(net, LOSS, loader(size=4), loader(M), coupled="loss", out=tmp_path)
        close(cross_gram(net, LOSS, loader(size=6), loader(M), coupled="loss", out=tmp_path), expected)
    x, y = data().tensors
    other = Changing([(x, y)], [(x[:6], y[:6]), (x[6:], y[6:])])
    with pytest.raises(StoreError, match="the same every time"):
        cross_gram(net, LOSS, other, loader(4, 2), block=1, coupled="loss")
    close(
        cross_gram(model(), LOSS, Changing([(x, y)], [(x[:6], y[:6]), (x[6:], y[6:])]), loader(M, 2), block=2),
        flat(model()) @ flat(model(), M).T,
    )


def iterating() -> nn.Module:
    """Spectral norm: every forward in training mode moves its power iteration on."""
    torch.manual_seed(0)
    spectral = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(spectral(nn.Linear(3, 6)), nn.Tanh(), spectral(nn.Linear(6, 2))).double()


def counting() -> nn.Module:
    """Instance norm: every forward in training mode moves its running statistics on."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
        nn.Linear(8, 2),
    ).double()  # fmt: skip


@pytest.mark.parametrize("build", [iterating, counting])
def test_every_batch_finds_the_buffers_as_they_were_given(tmp_path: Path, build: Any) -> None:
    net = build()
    given = {name: b.clone() for name, b in net.named_buffers()}
    rows, other = (persample.gradients(build(), LOSS, *data(n).tensors).flat() for n in (N, M))
    mine = store(tmp_path / "rows", net)
    mine.extend(LOSS, itertools.islice(loader(), 2))
    mine.extend(LOSS, loader(size=4))
    close(mine.rows(), rows)
    for block in (None, 1, 2):
        for _ in range(2):
            out = tmp_path / f"gram-{block}"
            close(cross_gram(net, LOSS, loader(), loader(M, 2), block=block, out=out), rows @ other.T)
    with pytest.raises(ArgumentError):
        cross_gram(net, LOSS, [data()[:], data()[0][0]], loader(M))
    assert given and all(torch.equal(b, given[name]) for name, b in net.named_buffers())


def test_batches_draw_numbers_of_their_own(tmp_path: Path) -> None:
    """Only buffers are put back: with the random state, all batches would be dropped out alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.Dropout(), nn.Linear(40, 2)).double()
    mine = store(tmp_path, net)
    mine.extend(LOSS, [data()[:], data()[:]])
    assert not torch.allclose(mine.rows()[:N], mine.rows()[N:])


@pytest.mark.parametrize("projection", [None, Projection(8)])
def test_hooks_of_what_is_around_the_model_are_run(tmp_path: Path, projection: Projection | None) -> None:
    net, (x, y) = model(), data().tensors
    around = nn.DataParallel(net)
    around.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    G = persample.gradients(around, LOSS, x, y)
    want = G.flat() if projection is None else G.project(projection)
    mine = GradientStore(tmp_path / "rows", around, projection=projection)
    mine.extend(LOSS, loader(size=4))
    assert torch.allclose(mine.rows(), want.to(mine.rows().dtype), rtol=1e-5, atol=1e-6)
    K = cross_gram(around, LOSS, loader(size=4), loader(size=3), projection=projection)
    assert torch.allclose(K, want @ want.T, rtol=1e-5, atol=1e-6)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_first_sample_that_is_alone_tells_no_notion(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(nn.Linear(3, 4), Shifted(), nn.Linear(4, 2)).double(), data().tensors
    mine = store(tmp_path, net, params="2")
    for n in (1, 5, 1, 4):
        mine.append(persample.gradients(net, LOSS, x[:n], y[:n], params="2"))
    assert len(mine) == 11 and json.loads((tmp_path / "rows.json").read_text())["notion"] == "batch-coupled"


def test_data_sets_of_batches_are_loaders(tmp_path: Path) -> None:
    """What is read by its index alone, as iteration allows."""

    class Batches:
        def __getitem__(self, i: int) -> Any:
            if i > 2:
                raise IndexError
            return [t[3 * i : 3 * i + 3] for t in data().tensors]

    net = model()
    mine = store(tmp_path, net)
    mine.extend(LOSS, Batches())  # type: ignore[arg-type]
    close(mine.rows(), flat(net)[:9])
    with pytest.raises(ArgumentError, match="loss function first"):
        mine.extend(loader(), LOSS)  # type: ignore[arg-type]
