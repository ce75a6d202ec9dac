"""`persample.extend` of a model that changes: rows are of the parameters that it has when a forward begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import persample

N = 5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=generator, dtype=torch.float64), torch.randint(3, (N,), generator=generator)


def losses_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return F.cross_entropy(model(x), y, reduction="none")


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """The rows by N backward passes, with nothing recorded."""
    x, y = batch()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    columns = zip(
        *[torch.autograd.grad(F.cross_entropy(model(x[n]), y[n]), [*wanted.values()]) for n in range(N)], strict=True
    )
    return {name: torch.stack(rows) for name, rows in zip(wanted, columns, strict=True)}


def check(G: persample.Gradients, rows: dict[str, Tensor]) -> None:
    assert G.names == tuple(rows) and not G.unused
    assert all((G[name] - rows[name]).abs().max() < 1e-12 for name in rows)
    total = torch.cat([r.flatten(1) for r in rows.values()], 1)
    assert (G.norm() - total.norm(dim=1)).abs().max() < 1e-12


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def nothing(m: Any) -> None:
    pass


def new_head(m: Any) -> None:
    m[2] = nn.Linear(7, 3).double()


def new_weight(m: Any) -> None:
    m[0].weight = nn.Parameter(torch.randn(7, 6).double())


def freeze(m: Any) -> None:
    m[0].requires_grad_(False)


def thaw(m: Any) -> None:
    m[0].requires_grad_(True)


def swap_order(m: Any) -> None:
    m[1], m[2], m[0] = m[2], m[1], m[0]


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "another layer": (nothing, new_head),
    "another parameter": (nothing, new_weight),
    "assigned state": (
        nothing,
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    ),
    "frozen": (nothing, freeze),
    "thawed": (freeze, thaw),
    "pruned": (nothing, lambda m: prune.l1_unstructured(m[0], "weight", 0.5)),
    "pruned for good": (
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        lambda m: prune.remove(m[0], "weight"),
    ),
    "weight_norm": (nothing, lambda m: parametrizations.weight_norm(m[0])),
    "weight_norm as attributes": (nothing, lambda m: nn.utils.weight_norm(m[0])),
    "no weight_norm": (lambda m: nn.utils.weight_norm(m[0]), lambda m: nn.utils.remove_weight_norm(m[0])),
    "parametrised": (nothing, lambda m: parametrize.register_parametrization(m[0], "weight", Twice())),
    "not parametrised": (
        lambda m: parametrize.register_parametrization(m[0], "weight", Twice()),
        lambda m: parametrize.remove_parametrizations(m[0], "weight"),
    ),
    "one layer more": (nothing, lambda m: m.append(nn.Linear(3, 3).double())),
    "another order": (nothing, swap_order),
    "tied": (nothing, lambda m: setattr(m[2], "bias", nn.Parameter(m[2].bias.detach() + 1))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("recorded", [True, False], ids=["a forward before", "none before"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_a_with_block(change: str, recorded: bool, verify: bool) -> None:
    model, (before, after) = net(), CHANGES[change]
    before(model)
    with persample.extend(model, verify=verify) as recorder:
        if recorded:
            check(recorder.gradients(losses_of(model)), one_by_one(model))
        after(model)
        losses = losses_of(model)
        G = recorder.gradients(losses)
        by_loss = recorder.gradients(losses, coupled="loss")
        assert tuple(recorder.names) == G.names
    check(G, one_by_one(model))
    check(by_loss, one_by_one(model))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_under_a_handle(change: str) -> None:
    model, (before, after), got = net(), CHANGES[change], list[persample.Gradients]()
    before(model)
    expected = one_by_one(model)
    with persample.extend(model, on_backward=got.append, reduction="mean"):  # in a with-block, too
        losses_of(model).mean().backward()
        after(model)
        losses_of(model).mean().backward()
    check(got[0], expected)
    check(got[1], one_by_one(model))
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    losses_of(model).mean().backward()
    new_weight(model) if isinstance(getattr(model[0], "weight", None), nn.Parameter) else thaw(model)
    losses_of(model).mean().backward()
    handle.remove()
    assert len(got) == 4
    check(got[3], one_by_one(model))


@pytest.mark.parametrize("change", [new_head, thaw, new_weight], ids=lambda f: f.__name__)
@pytest.mark.parametrize("again", [True, False], ids=["another forward between", "none between"])
def test_losses_of_a_forward_before_the_change_have_its_rows(change: Callable[[Any], None], again: bool) -> None:
    model = net()
    if change is thaw:
        freeze(model)
    expected, names = one_by_one(model), [name for name, p in model.named_parameters() if p.requires_grad]
    with persample.extend(model, verify=True) as recorder:
        losses = losses_of(model)
        change(model)
        if again:
            check(recorder.gradients(losses_of(model)), one_by_one(model))
        G = recorder.gradients(losses)
    check(G, expected)
    assert list(G.names) == names

    model, got = net(), list[persample.Gradients]()
    if change is thaw:
        freeze(model)
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    first = losses_of(model).mean()
    change(model)
    if again:
        losses_of(model).mean().backward()
    first.backward()
    handle.remove()
    check(got[-1], expected)
    if again:
        check(got[0], one_by_one(model))


def test_losses_that_are_of_no_one_model_are_refused() -> None:
    model = net()
    with persample.extend(model) as recorder:
        losses = losses_of(model)
        freeze(model)
        with pytest.raises(persample.CaptureError, match=r"'0\.weight' was frozen after the forward.*requires_grad_"):
            recorder.gradients(losses)
        thaw(model)
        check(recorder.gradients(losses), one_by_one(model))  # as if nothing had been
        both = losses + losses_of(model)
        recorder.gradients(both)
        new_head(model)
        with pytest.raises(persample.CaptureError, match=r"'2\.weight' acts in these losses.*has changed since"):
            recorder.gradients(losses + model[2].weight.square().sum())
        with pytest.raises(persample.CaptureError, match=r"'2\.weight' was replaced between two forwards"):
            recorder.gradients(losses + losses_of(model))
    got: list[Any] = []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    losses = losses_of(model).mean()
    new_head(model)
    with pytest.raises(persample.CaptureError, match="two forwards between which parameters"):
        (losses + losses_of(model).mean()).backward()
    handle.remove()
    assert not got


def test_a_part_that_is_called_by_itself_after_a_change() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        recorder.samples(x)
        h = model[1](model[0](x))
        new_head(model)
        losses = F.cross_entropy(model[2](h), y, reduction="none")
        with pytest.raises(persample.CaptureError, match=r"'2\.weight' acts in these losses.*recorder\.samples"):
            recorder.gradients(losses)
        recorder.samples(x)
        G = recorder.gradients(F.cross_entropy(model[2](model[1](model[0](x))), y, reduction="none"))
    check(G, one_by_one(model))


def test_weights_that_were_derived_before_the_change() -> None:
    """A weight that is computed from a frozen parameter has no gradient; thawed, the next one has."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.shift = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 6))
            self.weight: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.weight is None:
                self.weight = self.raw + self.shift
            return F.linear(x, self.weight)

    model = Cached().double()
    chosen = {"raw"}
    with persample.extend(model, params=lambda name, p: name in chosen) as recorder:
        assert recorder.gradients(losses_of(model)).names == ("raw",)
        chosen.add("shift")
        G = recorder.gradients(losses_of(model))
    check(G, one_by_one(model))


def test_a_selection_is_of_the_model_as_it_is() -> None:
    model = net()
    with persample.extend(model, params=(name for name in ["2.weight", "2.bias"])) as recorder:
        new_head(model)
        G = recorder.gradients(losses_of(model))
        rows = one_by_one(model)
        check(G, {name: rows[name] for name in ("2.weight", "2.bias")})
        model[2].requires_grad_(False)
        frozen = losses_of(model)  # may be a step that only the inputs, or other layers, are trained in
        with pytest.raises(persample.CaptureError, match="no recorded forward"):
            recorder.gradients(frozen)


@pytest.mark.parametrize("how", ["with-block", "handle", "recorder"])
def test_a_call_with_other_values_has_rows_of_the_parameters(how: str) -> None:
    """``functional_call`` puts what it is given in the parameters' place; what that was computed from, is asked for."""
    model, (x, y) = net(), batch()

    def losses(n: slice = slice(None)) -> Tensor:
        doubled = {name: 2 * p for name, p in model.named_parameters()}
        return F.cross_entropy(functional_call(model, doubled, (x[n],)), y[n], reduction="none")

    expected = [torch.autograd.grad(losses(slice(n, n + 1)).sum(), [*model.parameters()]) for n in range(N)]
    rows = {name: torch.stack([g[i] for g in expected]) for i, (name, _) in enumerate(model.named_parameters())}
    got: list[Any] = []
    if how == "with-block":
        with persample.extend(model) as recorder:
            check(recorder.gradients(losses_of(model)), one_by_one(model))
            got.append(recorder.gradients(losses()))
            check(recorder.gradients(losses_of(model)), one_by_one(model))
    elif how == "handle":
        handle = persample.extend(model, on_backward=got.append, reduction="mean")
        losses().mean().backward()
        handle.remove()
    else:
        recorder = persample.extend(model)
        got.append(recorder.gradients(losses()))
        recorder.remove()
    check(got[-1], rows)


def test_nothing_is_selected_anew_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, times = net(), persample.asked.asked_for, list[int]()
    monkeypatch.setattr(persample.asked, "asked_for", lambda *args: times.append(1) or asked(*args))
    with warnings.catch_warnings(), persample.extend(model, params=".*weight") as recorder:
        for _ in range(4):
            recorder.gradients(losses_of(model))
        before = len(times)
        freeze(model)
        recorder.gradients(losses_of(model))
    assert before <= 2 and len(times) == before + 1


@pytest.mark.parametrize("params", [None, ["0.weight"], r"0\.", lambda name, _: name.startswith("0")])
def test_a_model_that_is_frozen_for_a_while(params: Any) -> None:
    """As the discriminator of a GAN, in the step of the generator."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(), torch.randn(5, 3).double()
    with persample.extend(model, params=params) as recorder:
        first = recorder.gradients(model(x).square().flatten())
        model.requires_grad_(False)
        fake = torch.randn(5, 3).double().requires_grad_()
        model(fake).sum().backward()
        model.requires_grad_(True)
        again = recorder.gradients(model(x).square().flatten())
    assert torch.equal(first.flat(), again.flat()) and list(first) == list(again)
