"""Models that move samples about, or do something else that once went wrong without a word: against the definition,
with nothing verified, where N is also every other size.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

import persample
from persample.factors import scale
from persample.verify import chosen

N = 4
PERM = torch.tensor([2, 0, 3, 1])
QUANTILES = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) * targets).sum(1)


class Moved(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.move = nn.Linear(N, N), nn.Linear(N, 2), move

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.move(self.first(x)))
        return out


def into(h: Tensor, fresh: Callable[[Tensor], Tensor], index: Any = PERM) -> Tensor:
    h = h[PERM]
    out = fresh(h)
    out[index] = h
    return out


def zeros(h: Tensor) -> Tensor:
    """In the order of samples that were sorted."""
    return torch.zeros_like(h[PERM])


def in_a_loop(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for k in range(N):
        out[k] = h[N - 1 - k]
    return torch.stack([out[N - 1 - k] for k in range(N)])


SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": lambda h: into(h, torch.zeros_like),
    "empty_like": lambda h: into(h, torch.empty_like),
    "new_zeros": lambda h: into(h, lambda h: h.new_zeros(h.shape)),
    "rows": lambda h: into(h, torch.zeros_like, (PERM, slice(None))),
    "in_a_loop": in_a_loop,
    "windows by strides": lambda h: F.pad(h, (1, 1)).as_strided((N, N, 3), (N + 2, 1, 1)).amax(2),
    "index_copy": lambda h: zeros(h).index_copy(0, PERM, h[PERM]),
    "index_copy_": lambda h: zeros(h).index_copy_(0, PERM, h[PERM]),
    "index_put": lambda h: zeros(h).index_put((PERM,), h[PERM]),
    "scatter": lambda h: zeros(h).scatter(0, PERM[:, None].expand(N, N), h[PERM]),
    "scatter_src": lambda h: zeros(h).scatter(0, PERM[:, None].expand(N, N), src=h[PERM]),
    "table": lambda h: F.embedding(PERM.argsort(), F.embedding(PERM, h) * 2),
    "table of keywords": lambda h: F.embedding(input=PERM.argsort(), weight=h[PERM]),
    "vstack": lambda h: torch.vstack([h[n] for n in range(N)]),
    "vstack of slices": lambda h: torch.vstack([one[None] for one in h]),
    "hstack": lambda h: torch.hstack([h[n][:, None] for n in range(N)]).T,
    "hstack of lists": lambda h: torch.hstack([h[n] for n in range(N)]).view(N, N),
    "dstack": lambda h: torch.dstack([h[n] for n in range(N)])[0].T,
    "column_stack": lambda h: torch.column_stack([h[n] for n in range(N)]).T,
    "pad_sequence": lambda h: nn.utils.rnn.pad_sequence([h[n] for n in range(N)], batch_first=True),
    "pad_sequence, time first": lambda h: nn.utils.rnn.pad_sequence([h[n] for n in range(N)]).T,
    "quantiles": lambda h: torch.quantile(h, QUANTILES, dim=1).T,
    "quantiles by a method": lambda h: h.quantile(QUANTILES, dim=-1, keepdim=True).squeeze(2).T,
    "quantiles of numbers": lambda h: torch.nanquantile(h, QUANTILES, dim=1).T,
    "broadcast": lambda h: torch.broadcast_tensors(h, torch.ones(N, 1, dtype=h.dtype))[0],
    "broadcast, of a list": lambda h: torch.broadcast_tensors(*[h[:, None], torch.ones(3, 1)])[0].mean(1),
    "at least": lambda h: torch.atleast_3d(h, h[0])[0].squeeze(2),
    "flipud": lambda h: torch.flipud(torch.flipud(h) * 2),
    "rot90": lambda h: torch.rot90(torch.rot90(h, 2), 2),
    "tensordot": lambda h: torch.tensordot(torch.eye(N, dtype=h.dtype) * 2, h, dims=([1], [1])).T,
    "cdist": lambda h: torch.cdist(torch.ones(N, N, dtype=h.dtype), h).T,
    "einsum_ellipsis": lambda h: torch.einsum("n...,o...->on", h, torch.ones(N, N, dtype=h.dtype)).T,
    "einsum_moved": lambda h: torch.einsum("n...->...n", h).T,
    "einsum_implicit": lambda h: torch.einsum("nd,od", h, torch.eye(N, dtype=h.dtype)),
    "transposed by name": lambda h: torch.t(input=torch.transpose(input=h, dim0=0, dim1=1).tanh()),
    "picked by name": lambda h: torch.index_select(input=h, dim=0, index=PERM)[PERM.argsort()],
    "flipped by name": lambda h: torch.flip(input=torch.roll(input=h, shifts=1, dims=0), dims=[0]).flip(0).roll(-1, 0),
    "chosen by name": lambda h: torch.where(condition=h > 0, input=h, other=h.tanh()),
    "chosen, half by name": lambda h: torch.where(h > 0, other=h.tanh(), input=h).where(condition=h > 0, other=0),
    "tiled by name": lambda h: torch.tile(input=h, dims=(1, 2))[:, ::2] + h.tile(dims=(2, 1))[: len(h)],
    "transpose_copy": lambda h: torch.transpose_copy(h, 0, 1).T,
    "features": lambda h: h @ torch.eye(N, dtype=h.dtype),
    "vstack of batches": lambda h: torch.vstack([h, 2 * h])[:N] + torch.row_stack((h.sin(), h))[N:],
    "hstack of batches": lambda h: torch.hstack([h, 2 * h])[:, 1 : N + 1],
}
# What can't be followed is refused, where a parameter meets it.
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted by a matrix, by name": lambda h: torch.matmul(input=F.one_hot(PERM).to(h.dtype), other=h),
    "transposed by name": lambda h: torch.transpose(input=h, dim0=0, dim1=1),
    "permuted by a matrix": lambda h: F.one_hot(PERM).to(h.dtype) @ h,
    "index_add": lambda h: zeros(h).index_add(0, PERM, h[PERM]),
    "index_put, added": lambda h: h.index_put((PERM,), h, accumulate=True),
    "shifted": lambda h: torch.cat([h[1:], h[:1]]) + 0 * into(h, torch.zeros_like, slice(None)),
    "expert slots": lambda h: torch.einsum("nec,nd->ecd", torch.eye(N)[:, None].to(h.dtype), h)[0],
}


def expected(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Rows of the losses of this batch, one by one."""
    out, named = losses(model(x), y), dict(model.named_parameters())
    rows = [torch.autograd.grad(out[n], list(named.values()), retain_graph=True) for n in range(len(x))]
    return dict(zip(named, map(torch.stack, zip(*rows, strict=True)), strict=True))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, N, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", SERVED)
def test_samples_are_where_they_were_put(name: str) -> None:
    x, y = batch()
    model = Moved(SERVED[name]).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", REFUSED)
def test_samples_that_are_lost(name: str) -> None:
    x, y = batch()
    model = Moved(REFUSED[name]).double()
    with pytest.raises((persample.SampleAxisError, persample.BatchCoupledError)):
        persample.gradients(model, losses, x, y, verify=False)


def test_a_batch_that_was_sorted_already_verifies_nothing_for_the_next() -> None:
    class Sorted(Moved):
        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort()
            h = self.first(x[order])
            out = torch.zeros_like(h)
            out[order] = h
            found: Tensor = self.last(out)
            return found

    x, y = batch()
    model = Sorted(torch.tanh).double()
    persample.gradients(model, losses, x[x[:, 0].argsort()], y)
    g = persample.gradients(model, losses, x, y)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


def test_indices_that_stand_apart() -> None:
    class Assigns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(N, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(N, 4, 2, 3).clone()
            x[:, torch.tensor([0, 1, 2, 3]), :, torch.tensor([0, 1, 2, 0])] = self.p.unsqueeze(1)
            return x.square()

    x = torch.randn(N, 24, dtype=torch.float64)
    model, y = Assigns().double(), torch.randn(N, 24, dtype=torch.float64)
    g = persample.gradients(model, losses, x, y, verify=False)
    torch.testing.assert_close(g["p"], expected(model, x, y)["p"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_that_have_changed(layer: Any) -> None:
    model, x = layer(3, 2, batch_first=True), torch.randn(4, 5, 3)
    with persample.extend(model, params=r"weight.*", verify=False) as recorder:
        each = model(x)[0].square().sum((1, 2))
        with torch.no_grad():
            model.weight_hh_l0.add_(1)
        with pytest.raises((persample.InplaceError, RuntimeError), match=r"changed in place|inplace operation"):
            recorder.gradients(each)


@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_hooks_of_parameters_are_refused(engine: str) -> None:
    model, (x, y) = nn.Linear(N, 2).double(), batch()
    handle = model.weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
    with pytest.raises(persample.CaptureError, match=r"'weight' has a hook"):
        persample.gradients(model, losses, x, y, engine=engine)
    with persample.extend(model) as recorder, pytest.raises(persample.CaptureError, match="hook"):
        recorder.gradients(losses(model(x), y))
    rows = persample.gradients(model, losses, x, y, engine="loop")["weight"]
    assert rows.abs().max() <= 0.1
    handle.remove()
    assert persample.gradients(model, losses, x, y, engine=engine)["weight"].abs().max() > 0.1


def test_hooks_of_derived_weights_are_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, N))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w * 2
            w.register_hook(lambda g: g.clamp(-0.1, 0.1))
            return F.linear(x, w)

    x, y = batch()
    with pytest.raises(persample.CaptureError, match="hook"):
        persample.gradients(Doubled().double(), losses, x, y, verify=False)


def test_an_interrupted_forward_is_forgotten() -> None:
    """Ctrl-C runs no hook; the next forward notices."""
    interrupts = [False]

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if interrupts[0]:
                raise KeyboardInterrupt
            return out

    model, reported = Net(3, 2), list[Any]()
    handle = persample.extend(model, reduction="sum", on_backward=reported.append)
    x = torch.randn(6, 3)
    interrupts[0] = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    interrupts[0] = False
    for n in (6, 3, 6):
        model(x[:n]).square().sum().backward()
    assert [len(g) for g in reported] == [6, 3, 6]
    assert not torch.overrides._get_current_function_mode_stack()
    for g, n in zip(reported, (6, 3, 6), strict=True):
        torch.testing.assert_close(g["weight"], 2 * model(x[:n]).detach().unsqueeze(2) * x[:n].unsqueeze(1))
    handle.remove()
    assert handle._depth == 0


@pytest.mark.parametrize(("dtype", "p"), [(torch.float16, 300.0), (torch.float32, 2e19)])
def test_a_divisor_whose_square_is_no_number(dtype: torch.dtype, p: float) -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([p, p], dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            return x / self.p

    model, x = Divides(), (0.5 + torch.rand(3, 2)).to(dtype)
    y = torch.full((3, 2), p / 3).to(dtype)
    g = persample.gradients(model, losses, x, y, verify=False)["p"]
    rows = expected(model, x, y)["p"]
    assert rows.isfinite().all() and rows.abs().min() > 0
    torch.testing.assert_close(g, rows, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    "derive",
    [
        lambda w, v: w.exp().unsqueeze(1) * v[:1],
        lambda w, v: (w * 2).view(N, 1) * v[:1].square(),
        lambda w, v: F.normalize(w, dim=0).unsqueeze(1) * v,
        lambda w, v: F.linear(v.unsqueeze(0), torch.outer(w, v), v[:1]).T * w[:, None],
    ],
    ids=["exp", "scaled", "normalize", "bias of one"],
)
def test_weights_from_vectors(derive: Any) -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.rand(N) + 0.5), nn.Parameter(torch.rand(3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            w = derive(self.w, self.v)
            return F.linear(x[:, : w.shape[1]], w)

    torch.manual_seed(0)
    model, x, y = Vectors().double(), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)
    for verify in (True, False):
        g = persample.gradients(model, losses, x, y, verify=verify)
        for name, rows in expected(model, x, y).items():
            torch.testing.assert_close(g[name], rows, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(g.norm(per_parameter=True)[name], rows.flatten(1).norm(dim=1))


def test_weight_norm_of_a_bias() -> None:
    """Every entry is a vector of its own: its direction has no gradient."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(N, 2), "bias", 0).double()
    x, y = batch()
    g = persample.gradients(model, losses, x, y, verify=False)
    for name, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[name], rows, rtol=1e-9, atol=1e-14)


def with_itself(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A function that PyTorch hands to modes as a whole, and that returns its arguments too."""
    if has_torch_function((x, w)):
        out: tuple[Tensor, Tensor, Tensor] = handle_torch_function(with_itself, (x, w), x, w)
        return out
    return x, x @ w, w


def test_arguments_that_are_handed_through() -> None:
    class Passes(Moved):
        def __init__(self) -> None:
            super().__init__(torch.tanh)
            self.w = nn.Parameter(torch.randn(N, N))

        def forward(self, x: Tensor) -> Tensor:
            h, product, w = with_itself(self.first(x), self.w.sin())
            out: Tensor = self.last(h + product @ w)
            return out

    x, y = batch()
    model = Passes().double()
    g = persample.gradients(model, losses, x, y, verify=False)
    with persample.extend(model) as recorder:
        recorded = recorder.gradients(losses(model(x), y))
    for parameter, rows in expected(model, x, y).items():
        for found in (g, recorded):
            torch.testing.assert_close(found[parameter], rows, rtol=1e-9, atol=1e-11)


def slices(h: Tensor) -> list[Tensor]:
    return [h[n : n + 1] for n in range(N)]


LENGTHS = [1, 3, 2, 2]


def ragged(h: Tensor) -> tuple[Tensor, ...]:
    """Some entries of every sample, of all together ``[8, N]``, split."""
    return h.repeat_interleave(torch.tensor(LENGTHS), 0).split(LENGTHS)


SLICED: dict[str, Callable[[Tensor], Tensor]] = {
    "sums": lambda h: torch.stack([s.sum() * s[0] for s in slices(h)]),
    "sums that keep the axis": lambda h: torch.cat([s * s.mean(0, keepdim=True).sum() for s in slices(h)]),
    "softmax": lambda h: torch.cat([s.T.softmax(1).T * s for s in slices(h)]),
    "scores": lambda h: torch.stack([(s @ s.T).sum() * s[0] for s in slices(h)]),
    "by counted index": lambda h: torch.stack([h[n] * h[n].sum() for n in torch.arange(N)]),
    "by index": lambda h: torch.stack([h[[n]].std() * h[n] for n in range(N)]),
    "stack": lambda h: torch.stack(slices(h)).squeeze(1),
    "stack, time first": lambda h: torch.stack(slices(h), 2)[0].T,
    "lines": lambda h: torch.stack([s.squeeze(0) for s in slices(h)]),
    "pad_sequence of slices": lambda h: nn.utils.rnn.pad_sequence(slices(h), batch_first=True).squeeze(1),
    "split": lambda h: torch.stack([part.logsumexp(0) for part in ragged(h)]),
    "split, attention": lambda h: torch.stack([(part.softmax(0) * part).sum(0) for part in ragged(h)]),
    "split, pad_sequence": lambda h: nn.utils.rnn.pad_sequence(ragged(h), batch_first=True).sum(1),
    "split, pad_sequence, time first": lambda h: nn.utils.rnn.pad_sequence(ragged(h)).sum(0),
    "split, joined": lambda h: torch.cat(ragged(h)).new_zeros(N, N).index_add(
        0, torch.arange(N).repeat_interleave(torch.tensor(LENGTHS)), torch.cat([p * p.sum() for p in ragged(h)])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_one_sample(name: str) -> None:
    x, y = batch()
    model = Moved(SLICED[name]).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "move",
    [
        lambda h: h - h[:1],
        lambda h: h * h[1:2].sum(0),
        lambda h: torch.where(h > 0, h, h[:1]),
        lambda h: torch.where(h > 0, h, h[0]),
        lambda h: torch.where(h > 0, h.flip(0), h),
        lambda h: h - h[:1].expand(N, N),
        lambda h: torch.cat([h[:2] * h[2:3], h[2:]]),
        lambda h: h * h[:1].sum(),
        lambda h: torch.stack([h, h.flip(0)], 1).sum(1),
        lambda h: torch.cat([h[1:3].softmax(0), h[:2]]),
    ],
    ids=[
        "first",
        "line",
        "choice",
        "choice of a line",
        "choice of another",
        "expanded",
        "part",
        "sum",
        "stacked",
        "softmax of two",
    ],
)
def test_slices_that_act_on_other_samples(move: Callable[[Tensor], Tensor]) -> None:
    x, y = batch()
    for model in (Moved(move).double(), nn.Sequential(nn.Linear(N, N), Then(move)).double()):
        with pytest.raises(persample.BatchCoupledError, match="depend on the other samples"):
            persample.gradients(model, lambda out, y: (out * y[:, :1]).sum(1), x, y, verify=False)


class Then(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x)


def rows_by_mask(h: Tensor) -> Tensor:
    out = torch.zeros_like(W)
    out[torch.arange(N) > 1, :] = h[2:]
    return out


W = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double()
PUT: dict[str, Callable[[Tensor], Tensor]] = {
    "index_put": lambda h: torch.zeros_like(W).index_put((PERM,), h[PERM]),
    "index_put, added": lambda h: W.index_put((PERM,), h[PERM], accumulate=True),
    "index_put_": lambda h: torch.zeros_like(W).index_put_((PERM,), h[PERM]),
    "index_put by mask": lambda h: W.index_put((torch.arange(N) > 1,), h[2:]),
    "rows by mask": rows_by_mask,
    "index_put by pairs": lambda h: h.new_zeros(N, 3, N).index_put(
        (torch.arange(N).repeat_interleave(2), torch.tensor([0, 2] * N)), h.repeat_interleave(2, 0)
    ).sum(1),
    "pairs": lambda h: into(h, lambda h: h.new_zeros(N, N, N), (PERM, PERM.flip(0))).sum(1),
    "cdist with a repeated constant": lambda h: torch.cdist(h[:, None], W.repeat(N, 1, 1)).squeeze(1),
    "cdist, swapped": lambda h: torch.cdist(W.expand(N, N, N), h[:, None], p=1.0).squeeze(2),
    "cdist of samples": lambda h: torch.cdist(x1=h[:, None], x2=h.view(N, 2, 2).tile(2)).flatten(1).tile(2),
    "cdist, with one more axis": lambda h: torch.cdist(W.expand(N, 2, N, N), h.view(N, 1, 1, N))[:, 0].squeeze(2),
    "solve with a repeated constant": lambda h: torch.linalg.solve(h.exp().diag_embed(), W.expand(N, N, N))[:, :, 0],
    "solved triangles": lambda h: torch.linalg.solve_triangular(
        h.exp().diag_embed() + h[:, None].tril(), W[:, :2].repeat(N, 1, 1), upper=False
    )[:, :, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", PUT)
def test_samples_beside_constants(name: str) -> None:
    x, y = batch()
    model = Moved(PUT[name]).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


class Distances(nn.Module):
    def __init__(self, spread: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.c, self.last, self.spread = nn.Parameter(torch.randn(3, N)), nn.Linear(3, 2), spread

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.cdist(x.view(-1, 1, N), self.spread(self.c)).squeeze(1))
        return out


@pytest.mark.parametrize("spread", [lambda c: c.expand(N, -1, -1), lambda c: c.repeat(N, 1, 1)], ids=["view", "copy"])
def test_distances_from_centres_of_the_model(spread: Callable[[Tensor], Tensor]) -> None:
    x, y = batch()
    model = Distances(spread).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "move",
    [
        lambda h: into(h.sum(1), lambda h: h.new_zeros(N, N)),  # a column for each sample
        lambda h: h.new_zeros(N, N).index_put((torch.arange(N),), h.sum(1)),
        lambda h: h.new_zeros(N, N).index_put((PERM, PERM), h.sum(1), accumulate=True).index_select(1, PERM),
        lambda h: h.new_zeros(N, N).index_put((PERM,), h),
        lambda h: torch.cdist(h, h),
        lambda h: torch.cdist(h[:, None], h[PERM, None]).repeat(1, 1, N).squeeze(1),
        lambda h: torch.cdist(h.T, W),
    ],
    ids=["broadcast", "index_put", "transposed", "permuted", "pairs", "paired", "features"],
)
def test_samples_that_stand_elsewhere(move: Callable[[Tensor], Tensor]) -> None:
    x, y = batch()
    model = Moved(move).double()
    try:
        g = persample.gradients(model, losses, x, y, verify=False)
    except (persample.SampleAxisError, persample.BatchCoupledError):
        return
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


class Slots(nn.Module):
    """Tokens of all samples are gathered in the slots of one expert, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.last = nn.Parameter(torch.randn(N, N)), nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        slots = F.one_hot(x[:, 0].argsort().argsort(), N).to(x.dtype)
        h = torch.einsum("cd,df->cf", torch.einsum("nc,nd->cd", slots, x), self.w)
        out: Tensor = self.last(x + torch.einsum("nc,cf->nf", slots, h))
        return out


def test_explain_tells_what_gradients_says_of_coupled_parameters() -> None:
    x, y = batch()
    model = Slots().double()
    with pytest.raises(persample.BatchCoupledError) as error:
        persample.gradients(model, losses, x, y, verify=False)
    rows = {row.name: row for row in persample.explain(model, losses, x, y).rows}
    assert error.value.parameters == ("w",) == tuple(n for n, row in rows.items() if row.served == "- (coupled)")
    assert "einsum makes a sample's values depend on the other samples: let the model act" in rows["w"].why
    free = persample.gradients(model, losses, x, y, params=r"last", verify=False)
    assert [n for n, row in rows.items() if row.served.endswith("linear (rule)")] == list(free.names)


def test_the_call_is_named_where_samples_were_lost() -> None:
    x, y = batch()
    model = Moved(lambda h: torch.tensordot(F.one_hot(PERM).to(h.dtype), h, 1).tanh() + 1).double()
    told = r"'last.weight'\): .* of shape \(4, 2\), as they were lost in torch.functional.tensordot \(output \(4, 4\)\)"
    with pytest.raises(persample.SampleAxisError, match=told):
        persample.gradients(model, losses, x, y, verify=False)
    with persample.extend(model) as recorder, pytest.raises(persample.SampleAxisError, match=told):
        recorder.gradients(losses(model(x), y))


class OneByOne(nn.Module):
    """Layers act on slices, as batches of one sample."""

    def __init__(self, act: Callable[[OneByOne, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(2, 2, 3), act
        self.lstm, self.lstm_time_first = nn.LSTM(N, 2, batch_first=True), nn.LSTM(N, 2)
        self.attention = nn.MultiheadAttention(N, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.act(self, x[n : n + 1]) for n in range(len(x))])

    def both(self, x: Tensor, dim: int = 1) -> Tensor:
        return torch.stack([x, x.sin()], dim)


@pytest.mark.parametrize(
    "act",
    [
        lambda m, x: m.conv(m.both(x)).mean(2),
        lambda m, x: m.conv(m.both(x.mean(0, keepdim=True))).mean(2),
        lambda m, x: m.lstm(m.both(x))[0].sum(1),
        lambda m, x: m.lstm_time_first(m.both(x, 0))[0].sum(0),
        lambda m, x: m.attention(*[m.both(x)] * 3)[0].mean(1)[:, :2],
        lambda m, x: m.lstm(torch.vstack([x, x.sin()])[None])[0].sum(1),
        lambda m, x: m.lstm(nn.utils.rnn.pad_sequence([x, x.repeat(2, 1)]).sum(1)[None])[0][:, 1],
    ],
    ids=["conv", "conv of a mean", "lstm", "lstm, time first", "attention", "vstack", "pad_sequence"],
)  # fmt: skip
def test_layers_on_slices(act: Any) -> None:
    x, y = batch()
    model = OneByOne(act).double()
    g = persample.gradients(model, losses, x, y)
    reference = persample.gradients(model, losses, x, y, engine="loop")
    torch.testing.assert_close(g.flat(), reference.flat(), rtol=1e-9, atol=1e-12)


# ---- constants into which samples are written -------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Picked(nn.Module):
    """Sequences first, [T, N, D]: only some positions are transformed, and put back into zeros."""

    def __init__(self, put: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.put = nn.Linear(3, 4), nn.Linear(4, 2), put

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(x).flatten(0, 1)
        at = mask.flatten().nonzero()[:, 0]
        return self.head(self.put(h, at, self.inner(h[at]))).tanh().unflatten(0, x.shape[:2])


def _set(h: Tensor, at: Tensor, new: Tensor) -> Tensor:
    out = new.new_zeros(len(h), 4)
    out[at] = new
    return out


PUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "setitem": _set,
    "index_add": lambda h, at, new: new.new_zeros(len(h), 4).index_add(0, at, new),
    "index_add_": lambda h, at, new: new.new_zeros(len(h), 4).index_add_(0, at, new),
    "index_copy": lambda h, at, new: new.new_zeros(len(h), 4).index_copy(0, at, new),
    "index_put": lambda h, at, new: new.new_zeros(len(h), 4).index_put((at,), new),
    "scatter": lambda h, at, new: new.new_zeros(len(h), 4).scatter(0, at[:, None].expand(-1, 4), new),
    "scatter_add_": lambda h, at, new: new.new_zeros(len(h), 4).scatter_add_(0, at[:, None].expand(-1, 4), new),
}


@pytest.mark.parametrize("put", PUTS)
def test_where_samples_are_put_is_found_in_every_batch(put: str) -> None:
    """Also where the places alone fit several orders of the samples: those of the diagonal."""
    torch.manual_seed(0)
    model, y = Picked(PUTS[put]).double(), torch.randn(3, 3, 2, dtype=torch.float64)
    masks = [torch.ones(3, 3) - torch.eye(3), torch.eye(3), torch.eye(3).flip(0), torch.tensor([[1, 0, 0]] * 3)]
    for mask in masks:  # the first one is verified, the others are of the same kind
        given = (torch.randn(3, 3, 3, dtype=torch.float64), mask.bool())
        found, expected = (
            persample.gradients(
                model, lambda o, t: (o - t).square().mean((0, 2)), given, y, batch_dim=1, engine=engine, verify=verify
            ).flat()
            for engine, verify in (("hooks", True), ("loop", False))
        )
        close(found, expected)


class Messages(nn.Module):
    """A graph of each sample inside of one big graph, with as many nodes as it has; messages go along edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor, edges: Tensor) -> Tensor:
        h = torch.tanh(self.first(x[mask]))
        number = torch.zeros(mask.shape, dtype=torch.long)
        number[mask] = torch.arange(len(h))
        sample, start, end = (edges & mask[:, :, None] & mask[:, None]).nonzero(as_tuple=True)
        sums = torch.zeros(len(h), 4, dtype=h.dtype).index_add_(0, number[sample, end], h[number[sample, start]])
        out = x.new_zeros(*mask.shape, 2)
        out[mask] = self.last(sums)
        return out


def test_messages_between_nodes_of_ragged_graphs() -> None:
    torch.manual_seed(0)
    model, right = Messages().double(), 0
    for _ in range(40):
        x, sizes = torch.randn(3, 4, 3, dtype=torch.float64), torch.randint(1, 5, (3,))
        given = (x, torch.arange(4) < sizes[:, None], torch.rand(3, 4, 4) < 0.3)
        y = torch.randn(3, 4, 2, dtype=torch.float64)

        def rows(engine: str, verify: bool, given: Any = given, y: Tensor = y) -> Tensor:
            loss = lambda o, t: (o - t).square().sum((1, 2))  # noqa: E731
            return persample.gradients(model, loss, given, y, engine=engine, verify=verify).flat()

        try:
            found = rows("hooks", True)
        except persample.SampleAxisError:  # a few edges may not say whose the other nodes are
            continue
        close(found, rows("loop", False))
        right += 1
    assert right > 30


def test_a_parameter_with_a_row_for_each_sample_is_copied_by_index() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([[1.5]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x.index_copy(1, torch.tensor([1]), self.p.expand(len(x), 1))

    x, y = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    y[2] = 0  # the sample that is verified has no gradient
    found, expected = (
        persample.gradients(Copied(), lambda o, t: (o * t).sum(1), x, y, engine=e).flat() for e in ("hooks", "loop")
    )
    close(found, expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_stacks_of_samples_and_shared_rows(dim: int, n: int) -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack(torch.broadcast_tensors(x, self.p), dim).sin().sum(dim)

    x = torch.randn(n, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = lambda o, _: o.square().flatten(1).sum(1)  # noqa: E731
    expected = persample.gradients(Stacked(), loss, x, engine="loop").flat()
    for options in ({"verify": False}, {"verify": False, "max_bytes": 1}):
        close(persample.gradients(Stacked(), loss, x, **options).flat(), expected)


# ---- shapes that change in place, shared rows beside samples, hooks in the model ----------------------------------


def _transposed(h: Tensor, p: Tensor) -> Tensor:
    h.t_()
    return (h * p).t()


def _there_and_back(h: Tensor, p: Tensor) -> Tensor:
    h.transpose_(0, 1)
    h.mul_(p)
    return h.swapaxes_(0, 1)


def _product(h: Tensor, p: Tensor) -> Tensor:
    h.swapdims_(0, 1)
    return (p.T @ h).t()


def _squeezed(h: Tensor, p: Tensor) -> Tensor:
    h.unsqueeze_(0)
    h = h * p.T
    h.squeeze_(0)
    return h


RESHAPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "t_": _transposed,
    "transpose_": _there_and_back,
    "swapdims_": _product,
    "unsqueeze_": _squeezed,
    "unsqueeze_ in front": lambda h, p: (h.unsqueeze_(0) * p[None, :1]).transpose(0, 1).flatten(1),
    "hstack": lambda h, p: torch.hstack([h, p[:2].T.expand(len(h), 2)]),
    "column_stack": lambda h, p: torch.column_stack([h, p[0].expand(len(h))]),
    "dstack": lambda h, p: torch.dstack([h, p[:, 0].expand(len(h), 3)]).flatten(1),
    "lstsq": lambda h, p: torch.linalg.lstsq(torch.diag_embed(h * h + 1), p.expand(len(h), 3, 1))[0].flatten(1),
    "batch_norm": lambda h, p: F.batch_norm(
        h.t().reshape(1, -1, 1), h.new_zeros(3 * len(h)), h.new_ones(3 * len(h)), p.flatten().repeat_interleave(len(h))
    ).view(3, len(h)).t(),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("name", RESHAPED)
def test_shapes_that_change_in_place_and_shared_rows(name: str, n: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([[0.5], [-1.0], [2.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return RESHAPED[name](x * 1, self.p)

    x, model = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), Model().double()
    loss = lambda o, _: o.square().sum(1)  # noqa: E731
    expected = persample.gradients(model, loss, x, engine="loop").flat()
    for verify in (True, False):
        close(persample.gradients(model, loss, x, verify=verify).flat(), expected)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("kind", ["two outputs", "a threshold"])
def test_models_that_hook_their_activations(kind: str, engine: str) -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            h = x * self.p
            h.register_hook(lambda g: g * 1)
            return (h, h.sin()) if kind == "two outputs" else h * (h.detach() > h.detach().mean() - 1e9)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = Hooked().p.detach()
    if kind == "two outputs":
        rows = persample.gradients(Hooked(), lambda o, _: (o[0].square() + o[1]).mean(), x, engine=engine)["p"]
        close(rows, (2 * x * p + (x * p).cos()) * x / 3)
    else:
        close(persample.gradients(Hooked(), lambda o, _: o.square().sum(1), x, engine=engine)["p"], 2 * x * x * p)


def test_a_row_of_zeros_says_nothing_so_another_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.a(x) + gate[:, None] * self.b(x)

    model = Twice()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate = torch.arange(1.0, 5.0).double().index_fill(0, torch.tensor([chosen(4)]), 0)
    true = import_module("persample.engines.hooks").hooks

    def wrong(problem: Any, emit: Any, **options: Any) -> Any:
        return true(problem, lambda name, g: emit(name, scale(g, 2) if name == "b.weight" else g), **options)

    monkeypatch.setattr(import_module("persample.api"), "hooks", wrong)
    with pytest.raises(persample.VerificationError, match=r"'b.weight' \(and 0 more\): the row of sample"):
        persample.gradients(model, losses, (x, gate), torch.ones(4, 2).double())


# ---- where samples lie by the values of a batch -----------------------------------------------------------------


class Picks(nn.Module):
    """One table for all samples, of which each takes the rows that its mask says."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.first, self.pick = nn.Parameter(torch.randn(N, N)), nn.Linear(N, N), pick

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.first(x), x > 0
        picked = self.pick(self.table.expand(len(x), N, N), mask)
        return h.index_add(0, mask.nonzero()[:, 0], (picked * h[mask][:, None]).expand(-1, N))[:, :2]


PICKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all of an axis": lambda t, mask: t[mask, :],
    "an entry": lambda t, mask: t[mask, 0][:, None],
    "behind an axis": lambda t, mask: t.movedim(2, 0)[:, mask].T,
    "behind all axes": lambda t, mask: t.movedim(2, 0)[..., mask].T,
    "behind a new axis": lambda t, mask: t[None, mask, 1:].sum(2).T,
    "masked_select": lambda t, mask: torch.masked_select(t, mask[..., None]).view(-1, N),
    "masked_select behind an axis": lambda t, mask: torch.masked_select(t.movedim(2, 0), mask).view(N, -1).T,
}


@pytest.mark.parametrize("name", PICKED)
def test_rows_of_a_table_that_a_mask_of_the_samples_picks(name: str) -> None:
    x, y = batch()
    for marks in (x, x * 0 + torch.eye(N) - 0.5):  # the second picks as many as there are samples
        model = Picks(PICKED[name]).double()
        g = persample.gradients(model, losses, marks, y, verify=False)
        for parameter, rows in expected(model, marks, y).items():
            torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


class Asked(nn.Module):
    """What is computed from values, a mask and shared weights; batches of one kind differ in the mask alone."""

    def __init__(self, how: Callable[[Asked, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.first, self.last, self.how = nn.Embedding(80, 3), nn.Linear(3, 3), nn.Linear(3, 3), how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.how(self, x, mask)


def _of(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _numbers(x: Tensor, mask: Tensor) -> Tensor:
    return mask + 2 * (x[..., 0] > 0)


ASKED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "bincount": lambda m, x, k: (m.table(torch.bincount(_of(k), minlength=len(x)))[:, None] * x).sum(1),
    "ones added": lambda m, x, k: (
        m.table(torch.zeros(len(x)).scatter_add_(0, _of(k), torch.ones(len(_of(k)))).long())[:, None] * x
    ).sum(1),
    "flags": lambda m, x, k: (m.table(torch.zeros(len(x)).index_fill_(0, _of(k), 1).long())[:, None] * x).sum(1),
    "index_reduce": lambda m, x, k: m.last(x.new_zeros(len(x), 3).index_reduce(0, _of(k), m.first(x[k]), "amax")),
    "unique": lambda m, x, k: (lambda u, at: m.table(u)[at].mean(1))(
        *torch.unique(_numbers(x, k), return_inverse=True)
    ),
    "searchsorted": lambda m, x, k: (lambda u: m.table(u)[torch.searchsorted(u, _numbers(x, k))].mean(1))(
        _numbers(x, k).unique()
    ),
    "unique_consecutive": lambda m, x, k: (lambda u, at: m.last(m.table(u))[at].sin().mean(1))(
        *torch.unique_consecutive(_numbers(x, k), return_inverse=True)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("name", ASKED)
def test_counts_and_places_that_depend_on_the_batch(name: str) -> None:
    """As many entries as samples, by chance: the numbers of the loop, or an error, and mostly the former."""
    torch.manual_seed(0)
    model, y, right = Asked(ASKED[name]).double(), torch.randn(3, 3, dtype=torch.float64), 0
    masks = [[[1, 1], [1, 0], [1, 0]], [[1, 1], [1, 0], [0, 0]], [[0, 0], [1, 1], [1, 0]], [[1, 0], [1, 0], [1, 0]]]
    for mask in (torch.tensor(m).bool() for m in masks):
        given = (torch.randn(3, 2, 3, dtype=torch.float64), mask)
        expected = persample.gradients(model, losses, given, y, engine="loop", verify=False).flat()
        try:
            found = persample.gradients(model, losses, given, y).flat()
        except persample.PersampleError:
            continue
        close(found, expected)
        right += 1
    assert right >= 3


class Graphs(nn.Module):
    """Nodes in blocks of their graphs, and one row at the end for what doesn't fit, which a layer may see."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(2, 3), nn.Linear(3, 3), seen

    def forward(self, x: Tensor) -> Tensor:
        (n, k), nodes = x.shape[:2], self.first(x).flatten(0, 1)
        blocks = nodes.new_zeros(n * k + 1, 3)
        blocks[torch.arange(n * k)] = nodes
        if self.seen:
            blocks = self.last(blocks)
        blocks = blocks[: n * k].view(n, k, 3)
        out: Tensor = (blocks if self.seen else self.last(blocks)).sin().mean(1)
        return out


def test_rows_that_nothing_was_put_into_are_nobodys() -> None:
    x, y = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    model = Graphs(seen=False).double()
    expected = persample.gradients(model, losses, x, y, engine="loop").flat()
    for verify in (True, False):
        close(persample.gradients(model, losses, x, y, verify=verify).flat(), expected)
    with pytest.raises(persample.SampleAxisError, match=r"'last.weight'.* belong to no sample.* Cut them off"):
        persample.gradients(Graphs(seen=True).double(), losses, x, y)


MEET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda g, h: g * h,
    "einsum": lambda g, h: torch.einsum("nd,nd->n", g, h)[:, None],
    "bmm": lambda g, h: torch.bmm(g[:, None], h[:, :, None]).flatten(1),
    "broadcast": lambda g, h: (h[:, None] * g[:, :, None]).flatten(1),
    "cat": lambda g, h: torch.cat([h, g], 1).prod(1, keepdim=True),
}


@pytest.mark.parametrize("name", MEET)
def test_samples_that_meet_others_in_a_later_batch(name: str) -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(3, 3)

        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            h = torch.tanh(self.w(x))
            return MEET[name](h[(torch.arange(len(h)) + k) % len(h)], h).flatten(1).sum(1)

    torch.manual_seed(0)
    model, x, loss = Rolled().double(), torch.randn(N, 3, dtype=torch.float64), lambda o, _: o.square()
    same = (x, torch.zeros(N).long())
    close(*(persample.gradients(model, loss, same, engine=engine).flat() for engine in ("hooks", "loop")))
    for verify in (None, False):
        with pytest.raises(persample.BatchCoupledError):
            persample.gradients(model, loss, (x, torch.tensor([1, 2, 0, 3])), verify=verify)


def test_inputs_that_are_expanded_along_the_samples() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.einsum("nd,nd->n", torch.stack([self.a(row) for row in x.unbind(0)]), z)

    torch.manual_seed(0)
    model, z = Each().double(), torch.randn(N, 3, dtype=torch.float64)
    persample.gradients(model, lambda o, _: o.square(), (torch.randn(N, 3, dtype=torch.float64), z))
    with pytest.raises(persample.SampleAxisError, match="can't tell where the samples are"):
        persample.gradients(
            model, lambda o, _: o.square(), (torch.randn(1, 3, dtype=torch.float64).expand(N, 3), z), verify=False
        )


class OwnKernels(nn.Module):
    """A convolution with kernels of each sample's own, as one with samples among channels and ``c`` groups for each."""

    def __init__(self, transposed: bool, shared: bool, c: int, by: str) -> None:
        super().__init__()
        self.transposed, self.shared, self.c, self.by = transposed, shared, c, by
        self.start, self.kernels = nn.Parameter(torch.randn(1, c, 4)), nn.Linear(3, 4 * 3)
        self.bias, self.last = nn.Linear(3, 4), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        n, convolve = len(z), F.conv_transpose1d if self.transposed else F.conv1d
        x = self.start.repeat(n, 1, 1) if self.shared else x
        w = self.kernels(z).view(-1, 4 // self.c, 3) if self.transposed else self.kernels(z).view(-1, 1, 3)
        x, bias, groups = x.reshape(1, -1, 4), self.bias(z).flatten(), n * self.c
        if self.by == "convolution":
            h = torch.convolution(x, w, bias, [1], [1], [1], self.transposed, [0], groups)
        else:
            h = convolve(x, w, bias, padding=1, groups=groups)
        return self.last(h.view(n, 4, -1).tanh())


@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by", ["its dims", "convolution"])
def test_samples_as_groups_of_a_convolution(by: str, transposed: bool, shared: bool, n: int, c: int) -> None:
    torch.manual_seed(0)
    model, loss = OwnKernels(transposed, shared, c, by).double(), lambda o, _: o.square().sum((1, 2))
    inputs = (torch.randn(n, c, 4, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64))
    expected = persample.gradients(model, loss, inputs, engine="loop").flat()
    close(persample.gradients(model, loss, inputs, verify=False).flat(), expected)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda h: F.unfold(h, 3),
    "fold": lambda h: F.fold(F.unfold(h, 2, stride=2), h.shape[-2:], 2, stride=2),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h, 2),
    "pixel_unshuffle": lambda h: F.pixel_unshuffle(h, 2),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("n", [2, 4])
def test_samples_among_channels_that_are_cut(name: str, n: int) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 4, 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = CUTS[name](self.first(x).view(1, -1, 4, 6))
            out: Tensor = self.last(h.reshape(len(x), -1, 2))
            return out

    torch.manual_seed(0)
    model, x = Cut().double(), torch.randn(n, 2, 4, 6, dtype=torch.float64)
    loss = lambda o, _: o.square().sum((1, 2))  # noqa: E731
    expected = persample.gradients(model, loss, x, engine="loop").flat()
    close(persample.gradients(model, loss, x, verify=False).flat(), expected)


def test_samples_as_channels_that_a_convolution_adds_up() -> None:
    class Meet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight, self.last = nn.Linear(4, 4), torch.randn(N, N, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(F.conv1d(self.first(x).unsqueeze(0), self.weight).squeeze(0))
            return out

    for verify in (None, False):
        with pytest.raises((persample.BatchCoupledError, persample.SampleAxisError)):
            persample.gradients(Meet(), lambda o, _: o.square().sum(1), torch.randn(N, 4), verify=verify)


def test_samples_as_the_weight_of_a_linear_map() -> None:
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.p, x).t()

    x = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = lambda o, _: o.square().sum(1)  # noqa: E731
    expected = persample.gradients(Weight(), loss, x, engine="loop").flat()
    close(persample.gradients(Weight(), loss, x, verify=False).flat(), expected)


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
def test_ragged_samples_are_verified_in_more_than_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    api, seen = import_module("persample.api"), list[int]()
    true = api.run_verified

    def counted(problem: Any, *args: Any) -> Any:
        seen.append(args[-1])
        return true(problem, *args)

    monkeypatch.setattr(api, "run_verified", counted)
    torch.manual_seed(0)
    y = torch.randn(3, 3, dtype=torch.float64)
    for ragged in (True, False):
        model = Asked(ASKED["index_reduce"] if ragged else lambda m, x, _: m.last(m.first(x)).sum(1)).double()
        seen.clear()
        for _ in range(24):
            given = (torch.randn(3, 2, 3, dtype=torch.float64), torch.tensor([[1, 1], [1, 0], [0, 1]]).bool())
            persample.gradients(model, losses, given, y)
        assert len(seen) == (8 + 2 if ragged else 1)  # calls 0 to 7, 8, 16
        assert (len({*seen}) > 1) == ragged  # not always the same sample


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("behind", [True, False])
def test_nested_tensors_inside_the_model(behind: bool) -> None:
    def padded(m: Asked, x: Tensor, mask: Tensor) -> Tensor:
        parts = (m.first(x) if behind else x)[mask].split(mask.sum(1).tolist())
        nested = torch.nested.as_nested_tensor(list(parts))
        return m.last(torch.nested.to_padded_tensor(nested, 0.0).sum(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, mask = Asked(padded).double(), torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    given, y = (torch.randn(3, 2, 3, dtype=torch.float64), mask), torch.randn(3, 3, dtype=torch.float64)
    assert persample.gradients(model, losses, given, y, engine="loop").norm().min() > 0
    with pytest.raises(persample.SampleAxisError, match="nested"):
        persample.gradients(model, losses, given, y)


# ---- limits that are said by name -------------------------------------------------------------------------------


def test_a_transform_in_the_forward_is_refused_where_it_cannot_be_seen() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

        def forward(self, x: Tensor) -> Tensor:
            slope: Tensor = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]
            return slope

    torch.manual_seed(0)
    model, x, loss = Slope(), torch.randn(5, 2, dtype=torch.float64), lambda o, _: o.square().sum(1)
    with pytest.raises(persample.CaptureError, match=r"'net.0.weight'.*torch.func"):
        persample.gradients(model, loss, x)
    close(*(persample.gradients(model, loss, x, engine=engine).flat() for engine in ("vmap", "loop")))


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_a_generator_of_the_model_is_named_among_the_causes(engine: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            out: Tensor = self.linear(x + torch.randn(x.shape, generator=generator, dtype=x.dtype))
            return out

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(persample.BatchCoupledError, match="a generator of its own"):
        persample.gradients(Noisy(), lambda o, _: o.square().sum(1), x, engine=engine)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("verify", [None, False])
def test_one_matrix_for_the_right_hand_sides_of_all_samples(engine: str, verify: bool | None) -> None:
    """PyTorch 2.13 gets vmap of `linalg.solve` wrong there: in a model, and in a criterion that is a scalar."""

    class Solved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.linalg.solve(self.p @ self.p.T, x.unsqueeze(-1))
            return out.flatten(1)

    matrix = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)

    def distance(out: Tensor, y: Tensor) -> Tensor:
        rest = (out - y).unsqueeze(-1)
        return (rest * torch.linalg.solve(matrix, rest)).sum()

    x, y = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (Solved(), nn.Linear(2, 2).double()):
        found = persample.gradients(model, distance, x, y, engine=engine, verify=verify)
        for n in range(3):
            loss = distance(model(x[n : n + 1]), y[n : n + 1])
            expected = torch.autograd.grad(loss, list(model.parameters()))
            close(found.flat()[n], torch.cat([g.flatten() for g in expected]))
        matrices = [persample.curvature.hvp(model, f, x, y).dense() for f in (distance, _each(distance))]
        close(*matrices)
        each = persample.curvature.per_sample_hvp(model, distance, x, y, torch.ones(len(matrices[0])).double())
        close(each.mean(0), matrices[0].sum(1))


def _each(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: torch.stack([loss(out[n : n + 1], y[n : n + 1]) for n in range(len(out))])


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # a layer, and back
    "fftshift": (torch.fft.fftshift, torch.fft.ifftshift),
    "ifftshift of all axes": (
        lambda h: torch.fft.ifftshift(h, dim=(0, 1)),
        lambda h: torch.fft.fftshift(h, dim=(0, 1)),
    ),
    "channel_shuffle": (
        lambda h: torch.channel_shuffle(h.repeat_interleave(2, 0)[None, :, :, None], N)[0, :, :, 0],
        lambda h: h[:N] + 2 * h[N:],
    ),
    "shuffled by a layer": (
        lambda h: nn.ChannelShuffle(N)(h.repeat_interleave(2, 0)[None, :, :, None])[0, :, :, 0],
        lambda h: h[:N] - h[N:].sin(),
    ),
    "a latent repeated in time": (
        lambda h: h[:, None].expand(-1, 3, -1).unbind(1)[1],
        lambda h: h,
    ),
    "its chunks": (lambda h: h[:, None].expand(-1, 4, -1).chunk(2, 1)[1][:, 0], lambda h: h),
    "its parts": (lambda h: h[:, None].expand(-1, 4, -1).split([1, 1, 2], 1)[1][:, 0], lambda h: h),
    "repeated in front": (lambda h: h.expand(3, N, N).unbind(0)[2], lambda h: h),
}


class Between(nn.Module):
    """Another layer where the samples were moved to."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, 2)
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.back(self.second(self.there(self.first(x))).tanh()))
        return out


@pytest.mark.parametrize("name", BETWEEN)
def test_a_layer_where_samples_were_moved_to(name: str) -> None:
    x, y = batch()
    model = Between(*BETWEEN[name]).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)


def test_a_tensor_expanded_along_its_samples_has_views_of_several() -> None:
    x, y = batch()
    model = Between(lambda h: torch.stack(h[:1].expand(N, N).unbind(0)), lambda h: h).double()
    with pytest.raises((persample.SampleAxisError, persample.BatchCoupledError)):
        persample.gradients(model, losses, x, y, verify=False)


class Buffers(nn.Module):
    """A buffer for each sample, filled step by step."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.join = nn.Linear(4, 4), nn.Linear(4, 2), join

    def forward(self, x: Tensor) -> Tensor:
        each = []
        for one in x:
            buffer = torch.zeros(5, 4, dtype=x.dtype)
            for t in range(5):
                buffer[t] = self.first(one[t])
            each.append(buffer)
        out: Tensor = self.last(self.join(each)).sum(1)
        return out


JOINED: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "stack": torch.stack,
    "in the middle": lambda each: torch.stack(each, 1).transpose(0, 1),
    "dstack": lambda each: torch.dstack(each).permute(2, 0, 1),
    "pad_sequence": lambda each: nn.utils.rnn.pad_sequence(each, batch_first=True),
}


@pytest.mark.parametrize("name", JOINED)
def test_parts_of_which_it_is_not_known_whose_they_are(name: str) -> None:
    """The first one's is known, which isn't that of the others."""
    torch.manual_seed(0)
    model, x, y = Buffers(JOINED[name]).double(), torch.randn(3, 5, 4).double(), torch.randn(3, 2).double()
    with pytest.raises(persample.SampleAxisError, match=r"last\.weight"):
        persample.gradients(model, losses, x, y, verify=False)
    handle = persample.extend(model, on_backward=lambda _: None, reduction="sum")
    try:
        with pytest.raises(persample.SampleAxisError, match=r"last\.weight"):
            losses(model(x), y).sum().backward()
    finally:
        handle.remove()
    rows = persample.gradients(model, losses, x, y, engine="loop")
    for parameter, want in expected(model, x, y).items():
        torch.testing.assert_close(rows[parameter], want, rtol=1e-9, atol=1e-11)


TAKEN: dict[str, Callable[[Tensor, int], Tensor]] = {
    "both at once": lambda h, n: h[n, 1],
    "from behind": lambda h, n: h[n - len(h), -1],
    "time first": lambda h, n: h.transpose(0, 1)[1, n],
    "blocks": lambda h, n: h.repeat_interleave(2, 0)[2 * n + 1, 2],
    "turns": lambda h, n: h.repeat(2, 1, 1)[len(h) + n, 2],
    "an order of its own": lambda h, n: h[PERM][int(PERM.argsort()[n]), 1],
    "one number": lambda h, n: h[n, 1, 2].expand(N),
}


@pytest.mark.parametrize("name", TAKEN)
def test_one_step_of_one_sample(name: str) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(N, N), nn.Linear(N, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return torch.stack([self.last(TAKEN[name](h, n)) for n in range(N)])

    torch.manual_seed(0)
    model, x, y = Steps().double(), torch.randn(N, N, N).double(), torch.randn(N, 2).double()
    g = persample.gradients(model, losses, x, y, verify=False)
    for parameter, rows in expected(model, x, y).items():
        torch.testing.assert_close(g[parameter], rows, rtol=1e-9, atol=1e-11)
