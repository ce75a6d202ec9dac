"""What `persample.coupling` and ``coupled=`` must not be taken in by: coupling beside BatchNorm's, samples that were
picked, random numbers, and changes in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import persample
from persample import optim
from persample.batchnorm import jacobian
from persample.batchnorm.coupling import Coupling

N, CE = 6, nn.CrossEntropyLoss()
NOTIONS = ("loss", "copy", "frozen", "influence", "eval")
Body = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, body: Body, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.first, self.last = body, nn.Linear(4, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, x))


def net(body: Body, norm: nn.Module | None = None) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net(body, norm).double(), torch.randn(N, 4).double(), torch.arange(N) % 3


def true_rows(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(model(x), y, reduction="none")
    grads = [
        torch.autograd.grad(each, list(model.parameters()), retain_graph=True, allow_unused=True) for each in losses
    ]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    return torch.stack(
        [torch.cat([(z if g is None else g).flatten() for g, z in zip(row, zeros, strict=True)]) for row in grads]
    )


def masked_centring(m: Net, x: Tensor) -> Tensor:
    h = m.norm(m.first(x)).tanh()
    mask, out = torch.tensor([1, 1, 1, 0, 1, 1]).bool(), h.clone()  # the sample that is verified is not among them
    out[mask] = h[mask] - h[mask].mean(0)
    return out


def by_domain(m: Net, x: Tensor) -> Tensor:
    h, w = m.norm(m.first(x)).tanh(), torch.tensor([1.0, 0, 1, 0, 0, 1]).double()[:, None]
    return h - w * (w * h).sum(0) / w.sum()


def own_norm(m: Net, x: Tensor) -> Tensor:
    h = m.norm(m.first(x)).tanh()
    return (h - h.mean(0)) / h.std(0)


def normalised(m: Net, x: Tensor) -> Tensor:
    return F.normalize(m.norm(m.first(x)).tanh(), dim=0)


def straight_through(m: Net, x: Tensor) -> Tensor:
    h = m.norm(m.first(x)).tanh()
    return h + h.mean(0) - h.mean(0).detach()


@pytest.mark.parametrize("verify", [None, True, False])
@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("norm", [None, nn.Identity()], ids=["bn", "none"])
@pytest.mark.parametrize("body", [masked_centring, by_domain, own_norm, normalised, straight_through])
def test_other_coupling_is_refused(body: Body, norm: nn.Module | None, notion: str, verify: bool | None) -> None:
    model, x, y = net(body, norm)
    for _ in range(2):
        with pytest.raises(persample.BatchCoupledError):
            persample.gradients(model, CE, x, y, coupled=notion, verify=verify)


@pytest.mark.parametrize("route", ["samples", "statistics"])
@pytest.mark.parametrize("body", [masked_centring, by_domain, own_norm, straight_through])
def test_other_coupling_is_refused_by_a_coupling(body: Body, route: Any) -> None:
    model, x, y = net(body)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    questions: list[Callable[[Any], Any]] = [
        lambda C: C.gradients("loss"), lambda C: C.norms(), lambda C: C @ v, lambda C: C.T @ torch.ones(N).double(),
        lambda C: C.loss_norms(probes=2), lambda C: C.theta_coupling(), lambda C: C.losses,
    ]  # fmt: skip
    for ask in questions:
        with pytest.raises(persample.BatchCoupledError, match="something else than BatchNorm couples"):
            ask(persample.coupling(model, CE, x, y, route=route, verify=False))


def test_parameters_behind_other_coupling_are_served() -> None:
    model, x, y = net(own_norm)
    G = persample.gradients(model, CE, x, y, coupled="loss", params="last", verify=False)
    torch.testing.assert_close(G.flat(), true_rows(model, x, y)[:, 25:43], rtol=1e-9, atol=1e-12)


def by_value(m: Any, x: Tensor) -> Tensor:
    """Half of the samples, told by their values, so that a sample takes its place along."""
    h = m.first(x)
    mask, out = x[:, 0] > x.new_tensor(m.threshold), h.clone()
    out[mask] = m.norm(h[mask])
    return out.tanh()


@pytest.mark.parametrize("sample", range(N))
def test_experts_with_a_norm_each(sample: int) -> None:
    """Only the experts of the sample that is verified are called there; any sample may be the one."""

    def body(m: Any, x: Tensor) -> Tensor:
        h, out = m.first(x), m.first(x) * 0
        for i, norm in enumerate(m.norm):
            if (mask := (x[:, 0] > 0) == bool(i)).any():
                out = out.index_put((mask,), norm(h[mask]))
        return out.tanh()

    model, x, y = net(body, nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2)))
    x = x.roll(sample, 0)
    x[:, 0] = torch.tensor([1.0, -1, 1, -1, -1, 1]).double().roll(sample)
    G = persample.gradients(model, CE, x, y, coupled="loss", verify=True)
    torch.testing.assert_close(G.flat(), true_rows(model, x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_norm_of_picked_samples(first: float) -> None:
    """Whether or not the sample that is verified is among them."""
    model, x, y = net(by_value)
    model.threshold = 0.5
    x[:, 0] = torch.tensor([first, 1, 0, 1 - first, 1, 0]).double()
    for notion in ("loss", "copy", "frozen"):
        G = persample.gradients(model, CE, x, y, coupled=notion, verify=True)
        assert G.flat().isfinite().all()
        if notion == "loss":
            torch.testing.assert_close(G.flat(), true_rows(model, x, y), rtol=1e-9, atol=1e-12)


def test_weights_that_are_standardised_by_batch_norm() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        w = F.batch_norm(m.first.weight.view(1, 5, -1), None, None, training=True).view_as(m.first.weight)
        return m.norm(F.linear(x, w, m.first.bias)).tanh()

    model, x, y = net(body)
    for verify in (True, False):
        G = persample.gradients(model, CE, x, y, coupled="loss", verify=verify)
        torch.testing.assert_close(G.flat(), true_rows(model, x, y), rtol=1e-9, atol=1e-12)


def test_probes_are_new_ones_every_time_and_right_in_the_mean() -> None:
    model, x, y = net(lambda m, x: m.norm(m.first(x)).tanh())
    C = persample.coupling(model, CE, x, y)
    torch.manual_seed(0)
    found = torch.stack([C.loss_norms(probes=1).square() for _ in range(400)])
    assert len({tuple(row.tolist()) for row in found}) == 400
    exact, error = true_rows(model, x, y).square().sum(1), found.std(0) / 20
    assert ((found.mean(0) - exact).abs() < 5 * error).all()
    for method in ("outgoing_norms", "output_input_norms"):
        torch.manual_seed(0)
        one, two = (getattr(C, method)(probes=1) for _ in range(2))
        assert not torch.equal(one, two)
        torch.manual_seed(0)
        assert torch.equal(getattr(C, method)(probes=1), one)


def test_leaving_out_the_only_sample_of_a_group() -> None:
    norm = persample.batchnorm.convert(nn.BatchNorm1d(5), virtual_batch_size=2)
    model, x, y = net(lambda m, x: m.norm(m.first(x).unsqueeze(2) * torch.arange(1.0, 4)).sum(2).tanh(), norm)
    C = persample.coupling(model, CE, x[:5], y[:5])
    with pytest.raises(persample.errors.BatchNormError, match="'norm#3' normalises a single sample"):
        C.leave_one_out(exact=True)


def test_one_sample() -> None:
    model, x, y = net(lambda m, x: m.norm(m.first(x)).tanh())
    G = persample.gradients(model, CE, x[:1], y[:1], coupled="eval")
    expected = true_rows(model.eval(), x[:1], y[:1])
    torch.testing.assert_close(G.flat(), expected, rtol=1e-9, atol=1e-12)
    model.train()
    for verify in (None, False):
        with pytest.raises(persample.errors.BatchNormError, match="'norm' normalises a single value per channel"):
            persample.gradients(model, CE, x[:1], y[:1], coupled="frozen", verify=verify)


def test_sparse_embeddings() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm, self.last = nn.Embedding(7, 5, sparse=True), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.norm(self.words(ids).mean(1)).tanh())

    torch.manual_seed(0)
    model, ids, y = Words().double(), torch.randint(7, (N, 3)), torch.arange(N) % 3
    dense = nn.Embedding(7, 5, _weight=model.words.weight)
    for route in ("samples", "statistics"):
        C = persample.coupling(model, CE, ids, y, route=route)
        found = [C.gradients(notion).flat() for notion in NOTIONS]
        sparse, model.words = model.words, dense
        expected = persample.coupling(model, CE, ids, y, route=route)
        for rows, notion in zip(found, NOTIONS, strict=True):
            torch.testing.assert_close(rows, expected.gradients(notion).flat(), rtol=1e-9, atol=1e-12)
        model.words = sparse


def test_the_name_of_a_functional_call() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            assert self.running_mean is not None and self.running_var is not None
            return (x - self.running_mean) / (self.running_var + self.eps).sqrt()

    def body(m: Any, x: Tensor) -> Tensor:
        own, norm = m.norm
        return F.batch_norm(own(m.first(x)), norm.running_mean, norm.running_var, norm.weight, norm.bias, True).tanh()

    model, x, y = net(body, nn.ModuleList([Own(5), nn.BatchNorm1d(5)]))
    assert persample.coupling(model, CE, x, y).layers == {"norm.1": 5}


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda m, C, x, y: C.gradients("loss", 3), persample.ArgumentError, "samples must be a list"),
        (lambda m, C, x, y: C.gradients(["loss"]), persample.ArgumentError, "say which of"),
        (lambda m, C, x, y: C.T @ [1.0] * N, persample.errors.DirectionError, "one weight per loss"),
        (lambda m, C, x, y: C @ 1.0, persample.errors.DirectionError, "got float"),
        (lambda m, C, x, y: C @ dict.fromkeys(C.names, 1.0), persample.errors.DirectionError, "a direction is"),
        (lambda m, C, x, y: persample.gradients(m, CE, x, y, coupled=["loss"]), persample.ArgumentError, "must be one"),
        (lambda m, C, x, y: jacobian(m.norm, m.first(x), groups=[0, 1]), ValueError, "groups needs"),
        (
            lambda m, C, x, y: persample.coupling(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), CE, x, y),
            persample.ArgumentError,
            r"parameter '0.weight' has no values yet",
        ),
    ],
)  # fmt: skip
def test_what_is_no_argument(ask: Any, error: type[Exception], match: str) -> None:
    model, x, y = net(lambda m, x: m.norm(m.first(x)).tanh())
    with pytest.raises(error, match=match):
        ask(model, persample.coupling(model, CE, x, y), x, y)


@pytest.mark.parametrize("notion", NOTIONS)
def test_some_samples_have_their_own_losses_and_outputs(notion: str) -> None:
    model, x, y = net(lambda m, x: m.norm(m.first(x)).tanh())
    C = persample.coupling(model, CE, x, y)
    some, whole = C.gradients(notion, [4, 1]), C.gradients(notion)
    for a, b in ((some.flat(), whole.flat()), (some.losses, whole.losses), (some.outputs, whole.outputs)):
        torch.testing.assert_close(a, b[[4, 1]], rtol=1e-9, atol=1e-12)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0].square()


def distances(h: Tensor) -> Tensor:
    return torch.cdist(h[:, :, None], h[:, :, None]).sum(2)


@pytest.mark.parametrize("route", ["samples", "statistics"])
@pytest.mark.parametrize(("function", "name"), [(Cube.apply, "Cube marks"), (distances, "cdist")])
def test_what_has_no_second_derivative_is_refused_by_name(function: Any, name: str, route: Any) -> None:
    """Where one is needed; nothing else is."""
    model, x, y = net(lambda m, x: function(m.norm(m.first(x)).tanh()))
    C = persample.coupling(model, CE, x, y, route=route)
    torch.testing.assert_close(C.gradients("loss").flat(), true_rows(model, x, y), rtol=1e-9, atol=1e-12)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for ask in (lambda: C.gradients("influence"), lambda: C @ v, lambda: C.loss_norms(probes=2)):
        with pytest.raises(persample.CaptureError, match=name):
            ask()
    for notion in ("copy", "frozen", "eval"):
        assert C.gradients(notion).flat().isfinite().all()


@pytest.mark.parametrize("route", ["samples", "statistics"])
def test_inputs_that_a_model_changes_in_place(route: Any) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.first(x.mul_(2))).tanh()

    model, x, y = net(body)
    expected, before = true_rows(model, x.clone(), y), x.clone()
    C = persample.coupling(model, CE, x, y, route=route)
    for _ in range(2):
        torch.testing.assert_close(C.gradients("loss").flat(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(C.gradients("copy").flat().sum(0), expected.sum(0), rtol=1e-9, atol=1e-12)
    assert torch.equal(x, before)
    G = persample.gradients(model, CE, x, y, coupled="loss", verify=True)
    torch.testing.assert_close(G.flat(), expected, rtol=1e-9, atol=1e-12)


def test_models_that_count_their_passes() -> None:
    """A buffer that every pass moves is no change of the point, whichever is asked for first."""

    def body(m: Any, x: Tensor) -> Tensor:
        m.passes += 1
        return m.norm(m.first(x)).tanh()

    model, x, y = net(body)
    model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
    inputs = x.clone().requires_grad_()
    losses = F.cross_entropy(model(inputs), y, reduction="none")
    expected = torch.stack([torch.autograd.grad(each, inputs, retain_graph=True)[0].norm(dim=1) for each in losses])
    model.passes.zero_()

    def coupling(route: Any = None) -> Coupling:
        return persample.coupling(model, CE, x, y, route=route, verify=False)

    torch.testing.assert_close(coupling().input_norms(), expected, rtol=1e-9, atol=1e-12)
    known = coupling()
    known.gradients("loss")
    torch.testing.assert_close(coupling().output_input_norms(), known.output_input_norms(), rtol=1e-9, atol=1e-12)
    by_samples, by_statistics = (coupling(route).statistic_influence() for route in ("samples", "statistics"))
    torch.testing.assert_close(by_samples, by_statistics, rtol=1e-9, atol=1e-12)
    assert int(model.passes) == 0


def test_a_forward_that_switches_modes() -> None:
    """One of two norms is frozen by the forward itself, whatever mode the model was put into."""

    def body(m: Any, x: Tensor) -> Tensor:
        first, frozen = m.norm
        return frozen.eval()(first(m.first(x)).tanh())

    model, x, y = net(body, nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2)))
    for notion in NOTIONS:
        G = persample.gradients(model.train(), CE, x, y, coupled=notion)
        assert G.flat().isfinite().all()
        if notion == "loss":
            torch.testing.assert_close(G.flat(), true_rows(model, x, y), rtol=1e-9, atol=1e-12)
    C = persample.coupling(model.train(), CE, x, y)
    C.gradients("loss")
    model.norm[1].train()
    with pytest.raises(persample.InplaceError, match=r"the mode of module 'norm\.1' changed"):
        C.gradients("copy")


def routed(m: Any, x: Tensor) -> Tensor:
    """The better half of the samples goes on, the others are dropped."""
    h = m.norm(m.first(x))
    return h * torch.zeros(len(h), dtype=h.dtype).index_fill(0, h.sum(1).topk(len(h) // 2).indices, 1.0)[:, None]


def ranked(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.first(x))
    keep = torch.zeros(len(h), dtype=h.dtype)
    keep[h.detach().sum(1).topk(len(h) // 2).indices] = 1.0
    return h * keep[:, None]


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("body", [routed, ranked])
def test_samples_that_are_ranked_beside_batch_norm_are_said_to_be_coupled(body: Body, verify: bool | None) -> None:
    """Another sample moves their rows, statistics of the training set or not: clipping bounds nothing."""
    model, x, y = net(body)
    still = copy.deepcopy(model).eval()
    other = torch.cat([x[:-1], torch.where(torch.arange(2)[:, None] == 0, 100.0, -100.0) * x[-1]])
    moved = [true_rows(still, torch.stack([*x[:-1], z]), y)[:-1] for z in other[-2:]]
    assert (moved[0] - moved[1]).abs().max() > 1e-3
    opt, before = optim.ClippedSGD(model.named_parameters(), max_norm=1.0), copy.deepcopy(model)
    try:
        G = persample.gradients(model, CE, x, y, coupled="eval", verify=verify)
    except persample.BatchCoupledError:
        assert verify is None  # the sample that was looked at has another loss alone
    else:
        torch.testing.assert_close(G.flat(), true_rows(still, x, y), rtol=1e-9, atol=1e-12)
        assert G.note.endswith("batch-coupled")
        with pytest.raises(persample.BatchCoupledError, match="clipping its own row bounds nothing"):
            opt.step(G)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def logged(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.first(x))
    m.seen = h.detach().norm().item()
    return h.tanh()


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("body", [lambda m, x: m.norm(m.first(x)).tanh(), logged])
def test_samples_that_only_batch_norm_couples_are_clipped(body: Body, verify: bool | None) -> None:
    model, x, y = net(body)
    G = persample.gradients(model, CE, x, y, coupled="eval", verify=verify)
    rows = true_rows(copy.deepcopy(model).eval(), x, y)
    torch.testing.assert_close(G.flat(), rows, rtol=1e-9, atol=1e-12)
    assert "batch-coupled" not in G.note
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optim.ClippedSGD(model.named_parameters(), lr=1.0, max_norm=0.1).step(G)
    wanted = (rows * (0.1 / rows.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(before - after, wanted, rtol=1e-9, atol=1e-12)
