"""What a verification is good for: what it must not pass, and what it must not blame.

And backwards and losses that a recorder or a handle would report wrongly if it took them for what they look like.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import persample

N, D = 5, 4


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sine(out: Tensor, _: Any = None) -> Tensor:
    return out.sin().flatten(1).sum(1)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Linear(D, D).double(), nn.Linear(D, 3).double(), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.function(self.a(x)))
        return out


def rows_of(model: nn.Module, losses: Tensor) -> Tensor:
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-9 * (1 + float(b.abs().max()))


# ---- what a sample alone can't say ------------------------------------------------------------------------------

NAN_ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "range of the batch": lambda h: (h - h.amin(0)) / (h.amax(0) - h.amin(0)),
    "covariance": lambda h: h @ torch.cov(h.T),
    "nearest neighbour": lambda h: h * (torch.cdist(h, h) + torch.diag(h.new_full((len(h),), torch.inf))).amin(1, True),
}


@pytest.mark.filterwarnings("ignore:cov\\(\\)")
@pytest.mark.parametrize("name", NAN_ALONE)
def test_coupling_that_makes_a_sample_alone_nan(name: str) -> None:
    model = Between(NAN_ALONE[name])
    for engine in ("hooks", "loop"):
        with pytest.raises(persample.BatchCoupledError):
            persample.gradients(model, sine, x(), engine=engine, verify=True)
    assert not persample.check(model, sine, x()).ok


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_that_are_not_finite_agree_with_such_only(bad: float) -> None:
    data = x()
    data[:] = bad
    G = persample.gradients(Between(torch.sin), sine, data, verify=True)
    assert not G["a.weight"].isfinite().any()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(D, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        return h + 0.1 * torch.randn_like(h)


def contrastive(out: Tensor, _: Any) -> Tensor:
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


@pytest.mark.parametrize(
    "loss", [contrastive, lambda o, _: sine(o - o.median(0).values), lambda o, _: sine(o - o[-1:])]
)
def test_noise_hides_no_coupling(loss: Any) -> None:
    with pytest.raises((persample.VerificationError, persample.BatchCoupledError)):
        persample.gradients(Noisy(), loss, x(), verify=True)


def test_noise_is_no_mistake() -> None:
    model = Noisy()
    before = torch.get_rng_state()
    G = persample.gradients(model, sine, x(), verify=True)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert close(G.flat(), rows_of(model, sine(model(x()))))
    assert torch.equal(torch.get_rng_state(), after) and "within the batch" in G.note
    report = persample.check(model, sine, x())
    assert report.ok and "verified within the batch" in str(report) and "alone" not in str(report)


def test_noise_in_a_model_that_takes_no_sample_alone() -> None:
    class Pairs(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) > 1
            return super().forward(x)

    model = Pairs()
    before = torch.get_rng_state()
    G = persample.gradients(model, sine, x(), verify=True)
    torch.set_rng_state(before)
    assert close(G.flat(), rows_of(model, sine(model(x())))) and "within the batch" in G.note


class Sized(Between):
    """Takes as many samples as it was made for."""

    def __init__(self, function: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
        super().__init__(function)
        self.sizes, self.centres = sizes, nn.Parameter(torch.rand(N, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        if len(x) not in self.sizes:
            raise RuntimeError("built for others")
        return super().forward(x), self.centres


def test_halves_of_a_batch_that_the_model_does_not_take() -> None:
    model = Sized(lambda h: h * (h > h.detach().mean() - 9), (1, N))
    with pytest.raises(persample.VerificationError, match=r"samples \[0, 2, 4\] by themselves .*built for others"):
        persample.gradients(model, lambda out, _: sine(out[0]), x())


@pytest.mark.parametrize(
    "criterion", [lambda o, _: sine(o[0] - o[1].mean(0)), lambda o, _: (o[0] * o[1].mean(0)).sum()]
)
def test_an_output_of_no_sample_where_the_model_takes_no_other_number(criterion: Any) -> None:
    model = Sized(torch.tanh, (N,))
    with pytest.raises(persample.SampleAxisError, match=r"shape \(5, 3\).*doesn't run with 1 .*built for others"):
        persample.gradients(model, criterion, x())


def test_the_sample_that_has_another_loss_is_named() -> None:
    """The row of the one that is always verified is zero, so the largest is looked at, too."""
    model = Between(lambda h: h.T.triu(2).T)
    with pytest.raises(persample.BatchCoupledError) as caught:
        persample.gradients(model, sine, x(), params="a")
    whole, alone = sine(model(x())), torch.cat([sine(model(one[None])) for one in x()])
    n, *values = caught.value.n, caught.value.batch, caught.value.alone  # type: ignore[attr-defined]
    assert n > 1 and torch.allclose(torch.tensor(values), torch.stack([whole[n], alone[n]]).float())


def test_noise_that_is_another_for_a_sample_alone() -> None:
    model = Between(lambda h: h * (1 + torch.rand((), dtype=h.dtype)))
    G = persample.gradients(model, sine, x(), engine="vmap", verify=True)
    assert "not verified" in G.note


# ---- what was verified is not this --------------------------------------------------------------------------------


def either(out: Tensor, targets: Any, kind: str) -> Tensor:
    return sine(out) if kind == "own" else contrastive(out, targets)


class Either:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, out: Tensor, targets: Any) -> Tensor:
        return either(out, targets, self.kind)

    def method(self, out: Tensor, targets: Any) -> Tensor:
        return self(out, targets)


CRITERIA: dict[str, Callable[[str], Any]] = {
    "partial": lambda kind: partial(either, kind=kind),
    "object": Either,
    "method": lambda kind: Either(kind).method,
    "closure": lambda kind: lambda out, targets: either(out, targets, kind),
    "default": lambda kind: lambda out, targets, kind=kind: either(out, targets, kind),
    "choice of functions": lambda kind: partial(lambda out, _, f: f(out, _), f=sine if kind == "own" else contrastive),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_that_differ_in_what_is_bound_to_them(name: str) -> None:
    make, model = CRITERIA[name], Between(torch.tanh)
    persample.gradients(model, make("own"), x())
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, make("all"), x())


# ---- data that isn't ------------------------------------------------------------------------------------------------


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, D).double(), nn.Linear(D, 3).double()

    def forward(self, e: Tensor) -> Tensor:
        out: Tensor = self.head(e.tanh()).mean(1)
        return out


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_inputs_and_targets_computed_from_parameters(engine: str) -> None:
    model, ids = Embeds(), torch.arange(N * 2).view(N, 2) % 9
    e = model.embed(ids)
    with pytest.raises(persample.CaptureError, match=r"an input.*'embed.weight'"):
        persample.gradients(model, sine, e, engine=engine)
    with pytest.raises(persample.CaptureError, match=r"a target.*'head.weight'"):
        persample.gradients(model, sine, e.detach(), model(e.detach()), engine=engine)
    assert close(
        persample.gradients(model, sine, e.detach(), engine=engine).norm(),
        persample.gradients(model, sine, e, engine=engine, params="head").norm(),
    )


def test_a_loss_that_diverges_is_not_ignored() -> None:
    model, y = nn.Linear(D, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    loss = lambda out, y: (out.gather(1, y[:, None]) - 0.2).sqrt().mean()  # noqa: E731
    G = persample.gradients(model, loss, x(), y)
    alone = torch.stack([loss(model(x()[n : n + 1]), y[n : n + 1]) for n in range(N)])
    assert alone.isnan().any() and torch.equal(G.losses.isnan(), alone.isnan())
    with pytest.warns(UserWarning, match=r"sample\(s\) \[2\] is ignored"):
        G = persample.gradients(model, partial(F.cross_entropy, ignore_index=2), x(), y)
    assert G.losses[2] == 0 and not G.flat()[2].any() and G.flat()[:2].all(1).any()


# ---- a handle, and backwards that aren't the user's whole loss ----------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.dead = (nn.Linear(D, 3).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        out: Tensor = self.a(x) + self.b(x)
        return out


@pytest.mark.parametrize("inside", [False, True], ids=["handle", "with-block"])
def test_a_backward_towards_one_of_two_branches(inside: bool) -> None:
    model, got = Branches(), list[Any]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    if inside:
        handle.__enter__()
    try:
        loss = sine(model(x())).mean()
        with pytest.warns(UserWarning, match="towards some inputs only"):
            loss.backward(inputs=list(model.a.parameters()), retain_graph=True)
        with pytest.warns(UserWarning, match="towards some inputs only"):
            torch.autograd.grad(loss, list(model.b.parameters()), retain_graph=True)
        assert not got
        loss.backward()
    finally:
        handle.__exit__(None, None, None) if inside else handle.remove()
    assert set(got[0].unused) == {"dead.weight", "dead.bias"}
    assert close(got[0].flat(), rows_of(model, sine(model(x()))))


def test_gradients_that_the_forward_takes_are_not_reported() -> None:
    class Langevin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.energy = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).double()
            self.head = nn.Linear(D, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                z = x.detach().requires_grad_()
                x = x - 0.1 * torch.autograd.grad(self.energy(z).sum(), z)[0]
            out: Tensor = self.head(x)
            return out

    model, got = Langevin(), list[Any]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    loss = sine(model(x())).mean()
    assert not got
    loss.backward()
    handle.remove()
    (G,) = got
    assert {name for name in G.names if name.startswith("energy")} == set(G.unused)
    assert close(G.flat(), rows_of(model, sine(model(x()))))


@pytest.mark.parametrize("recorders", [1, 2])
def test_forward_hooks_that_come_later_are_seen(recorders: int) -> None:
    model = nn.Sequential(nn.Linear(D, D)).double()
    model.register_parameter("scale", nn.Parameter(x(D)))
    got: list[Any] = []
    handles = [persample.extend(model, on_backward=got.append, reduction="mean") for _ in range(recorders)]
    own = model.register_forward_hook(lambda module, args, out: out * module.scale)
    for _ in range(2):
        sine(model(x())).mean().backward()
    for handle in handles:
        handle.remove()
    want = rows_of(model, sine(model(x())))
    own.remove()
    assert len(got) == 2 * recorders and all(close(G.flat(), want) for G in got)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_losses_after_a_step() -> None:
    model = Between(torch.tanh)
    with persample.extend(model) as recorder:
        losses = sine(model(x()))
        losses.mean().backward(retain_graph=True)
        torch.optim.SGD(model.parameters(), 0.1).step()
        with pytest.raises(persample.InplaceError, match=r"before"):
            recorder.gradients(losses)


# ---- what the batch computes that a sample alone doesn't -------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(D, 3, batch_first=True).double()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out: Tensor = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return out


def test_outputs_as_long_as_the_longest_of_the_batch() -> None:
    inputs = x(N, 6, D), torch.tensor([6, 3, 2, 4, 1])
    G = persample.gradients(Packed(), sine, inputs)
    for options in ({"engine": "loop"}, {"max_bytes": 1}):
        H = persample.gradients(Packed(), sine, inputs, **options)  # type: ignore[arg-type]
        assert H.outputs is None and close(H.flat(), G.flat())


def test_padding_that_only_shows_where_others_are_longer() -> None:
    """In the first batch all samples are as long as the longest; in later ones such a one may be verified."""

    class Largest(Packed):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(x, lengths).amax(1)

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(D, 3).double()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            x = x[:, : lengths.max()]
            there = torch.arange(x.shape[1]) < lengths[:, None]
            out: Tensor = (self.a(x).tanh() * there[..., None]).amax(1)
            return out

    ragged = torch.tensor([6, 3, 6, 1, 6])
    for make in (Packed, Largest, Cut):
        for verify in (None, True):
            model = make()
            persample.gradients(model, sine, (x(N, 6, D), torch.full((N,), 6)))
            for _ in range(4):
                if make is Packed:
                    G = persample.gradients(model, sine, (x(N, 6, D), ragged), verify=verify)
                    assert close(G.flat(), persample.gradients(model, sine, (x(N, 6, D), ragged), engine="loop").flat())
                else:
                    with pytest.raises(persample.BatchCoupledError) as error:
                        persample.gradients(model, sine, (x(N, 6, D), ragged), verify=verify)
                    assert "empty_like" not in str(error.value)


def test_outputs_whose_sample_axis_was_not_told() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(D, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x).T
            return out

    loss = lambda out, _: out.sin().sum(0)  # noqa: E731
    G = persample.gradients(Turned(), loss, x(7, D), max_bytes=1)
    assert G.outputs is None
    H = persample.gradients(Turned(), loss, x(7, D), max_bytes=1, batch_dim=(0, 0, 1))
    assert H.outputs.shape == (3, 7) and close(G.flat(), H.flat())


SPARSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "coo": lambda x, w: x.to_sparse() @ w,
    "csr": lambda x, w: x.to_sparse_csr() @ w,
    "mm": lambda x, w: torch.sparse.mm(x.to_sparse(), w),
    "weights": lambda x, w: (
        torch.sparse.mm(
            torch.sparse_coo_tensor(torch.tensor([[0, 1, 2, 0, 2], [0, 1, 2, 3, 1]]), w.flatten()[:5], (3, D)), x.T
        ).T
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_on_the_way(name: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(x(D, 3))

        def forward(self, x: Tensor) -> Tensor:
            return SPARSE[name](x, self.w)

    G = persample.gradients(Sparse(), sine, x(), verify=True)
    assert close(G.flat(), persample.gradients(Sparse(), sine, x(), engine="loop").flat())


# ---- numbers of the whole batch ------------------------------------------------------------------------------------


class Pools(nn.Module):
    """A mean over all tokens that are there, in the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(D, 3).double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = (self.l(x) * mask[..., None]).sum(1) / mask.sum() * len(x)
        return out


@pytest.mark.parametrize("quantities", [None, ["norm"]])
def test_a_mask_that_is_full_says_nothing_of_others(quantities: Any) -> None:
    model, full = Pools(), torch.ones(N, 6, dtype=torch.float64)
    ragged = full.clone()
    ragged[1, 2:] = ragged[2, 1:] = 0
    for _ in range(2):
        persample.gradients(model, sine, (x(N, 6, D), full), quantities=quantities)
    with pytest.raises(persample.BatchCoupledError, match="div"):
        persample.gradients(model, sine, (x(N, 6, D), ragged), quantities=quantities)


class Reduces(nn.Module):
    """Its loss, already reduced, beside its predictions, as models that are given labels return it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.l = nn.Embedding(9, D).double(), nn.Linear(D, 9).double()

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.l(self.e(ids))
        return F.cross_entropy(z.flatten(0, 1), labels.flatten()), z


def test_losses_that_a_model_has_reduced_among_its_outputs() -> None:
    ids = torch.arange(N * 3).view(N, 3) % 9
    inputs = {"ids": ids, "labels": ids.roll(1, 1)}
    for options in ({}, {"verify": False}, {"quantities": ["norm"]}):
        with pytest.raises(persample.LossError, match=r"\[\(\)\], none with N = 5.*use outputs.logits"):
            persample.gradients(Reduces(), lambda out, _: out[0], inputs, **options)  # type: ignore[arg-type]
    assert not persample.check(Reduces(), lambda out, _: out[0], inputs).ok
    alone = persample.gradients(Reduces(), lambda out, _: out[0], inputs, engine="loop", verify=False)
    each = lambda out, y: F.cross_entropy(out[1].transpose(1, 2), y, reduction="none").mean(1)  # noqa: E731
    assert close(persample.gradients(Reduces(), each, inputs, inputs["labels"]).flat(), alone.flat())


# ---- parameters that act in the loss of somebody else --------------------------------------------------------------


class Policy(nn.Module):
    def __init__(self, give: Callable[[Tensor, nn.Parameter], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mu, self.log_std, self.give = nn.Linear(D, 3).double(), nn.Parameter(x(3)), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.mu(x), self.log_std)


GIVES: dict[str, tuple[Callable[[Tensor, nn.Parameter], Any], Callable[[Any, nn.Parameter], Any]]] = {
    "a distribution": (lambda mu, s: torch.distributions.Normal(mu, s.exp()), lambda out, s: out),
    "the parameter": (lambda mu, s: (mu, s), lambda out, s: torch.distributions.Normal(out[0], out[1].exp())),
    "nothing": (lambda mu, s: mu, lambda out, s: torch.distributions.Normal(out, s.exp())),
}


@pytest.mark.parametrize("name", GIVES)
def test_a_parameter_that_acts_in_the_loss_of_a_handle(name: str) -> None:
    give, made = GIVES[name]
    model, actions, got = Policy(give), x(N, 3), list[Any]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    with pytest.raises(persample.CaptureError, match=r"'log_std'.*with-block"):
        (-made(model(x()), model.log_std).log_prob(actions).sum(-1)).mean().backward()
    handle.remove()
    assert not got
    with persample.extend(model) as recorder:
        losses = -made(model(x()), model.log_std).log_prob(actions).sum(-1)
        G = recorder.gradients(losses)
    assert close(G.flat(), rows_of(model, losses))
    handle = persample.extend(model, on_backward=got.append, reduction="mean", params="mu")
    (-made(model(x()), model.log_std).log_prob(actions).sum(-1)).mean().backward()
    handle.remove()
    assert close(got[0].flat(), G.select("mu").flat())


# ---- what a run is asked for --------------------------------------------------------------------------------------


def test_one_quantity_with_two_options() -> None:
    model, v = nn.Linear(D, 3).double(), torch.zeros(3 * D + 3, dtype=torch.float64)
    run = lambda *asked: persample.gradients(model, sine, x(), quantities=asked)  # noqa: E731
    for asked in (
        [("clip", {"max_norm": 1.0}), ("clip", {"max_norm": 2.0})],
        [("dot", {"direction": v + i}) for i in (0, 1)],
    ):
        with pytest.raises(persample.QuantityError, match="twice, with different options"):
            run(*asked)
    assert run("norm", "norm", ("dot", {"direction": v}), ("dot", {"direction": v})).norm().shape == (N,)
    with pytest.raises(persample.QuantityError, match="'sum' or 'mean'"):
        run("norm").mean()
    with pytest.raises(persample.QuantityError, match="times their weights"):
        run("norm", "mean").sum(torch.ones(N))


def test_a_row_per_token_of_one_sample() -> None:
    model = nn.Linear(D, 3).double()
    with persample.extend(model) as recorder, pytest.raises(persample.SampleAxisError, match="Rows per token"):
        recorder.gradients(model(x(1, 6, D)).sin().sum(2)[0])


# ---- methods other than the forward ------------------------------------------------------------------------------


class Agent(nn.Module):
    """It has no forward at all, as agents in reinforcement learning often are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.actor, self.critic = (nn.Linear(a, b).double() for a, b in ((D, 6), (6, 2), (6, 1)))
        self.log_std, self.steps = nn.Parameter(x(2)), nn.Embedding(N, 6).double()

    def hidden(self, x: Tensor) -> Tensor:
        at = self.steps(torch.arange(2)).sum(0)
        out: Tensor = self.body(x).tanh() + at
        return out

    def value(self, x: Tensor) -> Tensor:
        out: Tensor = self.critic(self.hidden(x)).squeeze(-1)
        return out

    def policy(self, x: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.actor(self.hidden(x)), self.log_std.exp())


def test_methods_other_than_the_forward() -> None:
    agent, actions, returns = Agent(), x(N, 2), x(N)
    with persample.extend(agent) as recorder, pytest.raises(persample.CaptureError, match=r"recorder.samples\(x\)"):
        recorder.gradients((agent.value(x()) - returns).square())
    with persample.extend(agent) as recorder:
        inputs = x()
        recorder.samples(inputs)
        losses = (agent.value(inputs) - returns).square() - agent.policy(inputs).log_prob(actions).sum(-1)
        G = recorder.gradients(losses)
        with pytest.raises(persample.BatchCoupledError):
            recorder.gradients(losses / losses.sum())
    assert close(G.flat(), rows_of(agent, losses)) and G.outputs is None
    with pytest.raises(persample.CaptureError, match="with-block"):
        recorder.samples(inputs)


class Normalised(nn.Module):
    """Its first bias is taken out again: its gradient is zero but for rounding."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), norm, nn.Linear(64, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).flatten(1))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.GroupNorm(4, 4)], ids=["instance", "group"])
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_rows_that_are_nothing_but_rounding(engine: Any, norm: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = Normalised(norm, dtype), torch.randn(6, 2, 6, 6, dtype=dtype), torch.arange(6) % 3
    size = float(persample.gradients(model, F.cross_entropy, x, y, engine=engine).norm().max())
    alone = persample.gradients(model, F.cross_entropy, x, y, engine=engine, params=["conv.bias"])
    assert float(alone.norm().max()) < 1e4 * torch.finfo(dtype).eps * size
    assert persample.check(model, F.cross_entropy, x, y, engine=engine, params=["conv.bias"]).ok
    with persample.extend(model, params=["conv.bias"]) as recorder:
        recorder.gradients(F.cross_entropy(model(x), y, reduction="none"))
    model.requires_grad_(False).conv.bias.requires_grad_(True)
    persample.gradients(model, F.cross_entropy, x, y, engine=engine)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["conv.bias"]


class Doubled(torch.autograd.Function):
    """With twice the gradient where there are several samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * (2 if len(g) > 1 else 1)


class Small(nn.Module):
    """A part whose gradients are a tiny part of all."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.last, self.size = nn.Linear(3, 4), nn.Linear(4, 3), size

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Doubled.apply(self.size * self.first(x)))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(1e-3, torch.float64), (1e-7, torch.float32), (1e-12, torch.float64)])
def test_wrong_rows_are_not_taken_for_rounding(size: float, dtype: torch.dtype, frozen: bool) -> None:
    """However large the gradients of other parameters are."""
    torch.manual_seed(0)
    model, x, y = Small(size).to(dtype), torch.randn(6, 3, dtype=dtype), torch.arange(6) % 3
    model.last.requires_grad_(not frozen)
    with pytest.raises(persample.VerificationError, match=r"first\.(weight|bias)"):
        persample.gradients(model, F.cross_entropy, x, y, params=r"first")
    assert not persample.check(model, F.cross_entropy, x, y, params=r"first").ok


@pytest.mark.parametrize("clip", [1e-3, 1e-6])
def test_a_backward_that_is_not_linear_hides_no_wrong_rows(clip: float) -> None:
    torch.manual_seed(0)
    model, x, y = Small(1.0).double(), torch.randn(6, 3).double(), torch.arange(6) % 3
    model.last.register_forward_pre_hook(lambda _, args: args[0].register_hook(lambda g: g.clamp(-clip, clip)) and None)
    with pytest.raises(persample.VerificationError, match=r"first\.(weight|bias)"):
        persample.gradients(model, lambda o, t: 1e-3 * F.cross_entropy(o, t, reduction="none"), x, y)


class Three(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.l = nn.Linear(6, D).to(dtype)

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.l(a), self.l(p), self.l(n)


TRIPLETS: dict[str, Callable[[Any, Any], Tensor]] = {
    "distances": lambda out, _: F.triplet_margin_loss(*out, reduction="none"),
    "squares": lambda out, _: ((out[0] - out[1]).square().sum(1) - (out[0] - out[2]).square().sum(1) + 1).relu(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TRIPLETS)
def test_a_bias_that_cancels_is_no_mistake(name: str, dtype: torch.dtype) -> None:
    """Its row is nothing but rounding, of samples beside the one that is verified too."""
    for seed in range(8):
        torch.manual_seed(seed)
        model, inputs = Three(dtype), tuple(torch.randn(3, 6, 6, dtype=dtype))
        G = persample.gradients(model, TRIPLETS[name], inputs)
        L = persample.gradients(model, TRIPLETS[name], inputs, engine="loop")
        assert float((G.flat() - L.flat()).norm()) <= 100 * torch.finfo(dtype).eps * float(L.flat().norm())
        assert persample.check(model, TRIPLETS[name], inputs).ok
        with persample.extend(model) as recorder:
            recorder.gradients(TRIPLETS[name](model(*inputs), None))


@pytest.mark.parametrize("name", TRIPLETS)
def test_a_bias_that_cancels_is_called_wrong_where_it_is_all_that_is_asked_for(name: str) -> None:
    """A limit: alone it is exactly zero, and there is nothing to say how large rounding may be."""
    torch.manual_seed(1)
    model, inputs = Three(torch.float64), tuple(torch.randn(3, 6, 6, dtype=torch.float64))
    with pytest.raises(persample.VerificationError, match="nothing but rounding"):
        persample.gradients(model, TRIPLETS[name], inputs, params=["l.bias"])
    G = persample.gradients(model, TRIPLETS[name], inputs, params=["l.bias"], verify=False)
    assert float(G.flat().norm()) <= 1e-14


class Checkpointed(nn.Module):
    """Dropout that runs once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(D, D).double(), nn.Linear(D, D).double()
        self.c, self.drop = nn.Linear(D, 3).double(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: self.drop(self.b(h)).tanh(), self.a(x), use_reentrant=False)
        out: Tensor = self.c(h)
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_dropout_that_a_checkpoint_runs_again(frozen: bool) -> None:
    model = Checkpointed()
    model.a.requires_grad_(not frozen)
    if frozen:
        model.a.weight.requires_grad_()
    before = torch.get_rng_state()
    G = persample.gradients(model, sine, x())
    torch.set_rng_state(before)
    losses, parameters = sine(model(x())), list(model.parameters())
    parameters = [p for p in parameters if p.requires_grad]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    assert close(G.flat(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    assert persample.check(model, sine, x()).ok and persample.check(model, sine, x(), engine="loop").ok


class Centres(Checkpointed):
    """In a way that no call shows."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        shift = torch.from_numpy(h.detach().numpy().mean(0))
        h = checkpoint(lambda h: self.drop(self.b(h)).tanh(), h - shift, use_reentrant=False)
        out: Tensor = self.c(h)
        return out


def test_dropout_in_a_checkpoint_hides_no_coupling() -> None:
    model = Centres()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, sine, x())
    assert not persample.check(model, sine, x()).ok
