"""The loss of sample n is what the criterion says of sample n alone, whatever the criterion."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample import curvature
from persample.losses import per_sample, unreduced

N, C, T = 4, 5, 3
weights = torch.linspace(0.5, 2, C, dtype=torch.float64)


def scores(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.randint(C, (N, *shape), generator=torch.Generator().manual_seed(1))


CRITERIONS: list[tuple[str, Any, Tensor, Tensor]] = [
    ("cross_entropy", nn.CrossEntropyLoss(), scores(C), labels()),
    ("cross_entropy_sum", nn.CrossEntropyLoss(reduction="sum"), scores(C), labels()),
    ("cross_entropy_class_weights", nn.CrossEntropyLoss(weights), scores(C), labels()),
    ("cross_entropy_label_smoothing", nn.CrossEntropyLoss(label_smoothing=0.1), scores(C), labels()),
    ("cross_entropy_positions", nn.CrossEntropyLoss(), scores(C, T), labels(T)),
    ("cross_entropy_probabilities", nn.CrossEntropyLoss(), scores(C), scores(C).softmax(1)),
    ("nll", nn.NLLLoss(), scores(C).log_softmax(1), labels()),
    ("mse_over_features", nn.MSELoss(), scores(C), scores(C) * 2),
    ("l1", nn.L1Loss(), scores(C), scores(C) * 2),
    ("huber", nn.HuberLoss(), scores(C), scores(C) * 3),
    ("smooth_l1", nn.SmoothL1Loss(), scores(C), scores(C) * 3),
    ("bce_logits", nn.BCEWithLogitsLoss(), scores(C), scores(C).sigmoid()),
    ("kl", nn.KLDivLoss(reduction="sum"), scores(C).log_softmax(1), scores(C).softmax(1)),
    ("poisson", nn.PoissonNLLLoss(), scores(C), labels(C).double()),
    ("multi_margin", nn.MultiMarginLoss(), scores(C), labels()),
    ("soft_margin", nn.SoftMarginLoss(), scores(C), scores(C).sign()),
    ("gaussian_nll", lambda out, y: F.gaussian_nll_loss(out, y, out.exp()), scores(C), scores(C)),
    ("reads_a_number", lambda out, y: (out * (1.0 if y.sum().item() > 7 else 2.0)).mean(), scores(C), labels(2)),
]


@pytest.mark.parametrize(("criterion", "out", "y"), [c[1:] for c in CRITERIONS], ids=[c[0] for c in CRITERIONS])
def test_scalar_criterion_is_meant_for_one_sample_alone(
    criterion: Callable[..., Tensor], out: Tensor, y: Tensor
) -> None:
    expected = torch.stack([criterion(out[n : n + 1], y[n : n + 1]) for n in range(N)])
    assert torch.allclose(per_sample(criterion, out, y), expected, rtol=1e-12, atol=0)


def test_what_vmap_says_of_its_own_speed_is_not_shown() -> None:
    """The criterions without a batching rule of their own; what the caller's own ``vmap`` says is."""
    margin = nn.MultiMarginLoss()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        per_sample(margin, scores(C), labels())
        per_sample(lambda out, y: warnings.warn("mine", stacklevel=1) or margin(out, y), scores(C), labels())
        assert {str(w.message) for w in heard} == {"mine"}
        torch.func.vmap(lambda out, y: margin(out[None], y[None]))(scores(C), labels())
    assert "performance drop" in str(heard[-1].message)


def test_that_it_is_not_shown_is_counted_over_threads() -> None:
    """Criterions that wait for each other in the middle."""
    margin, together = nn.MultiMarginLoss(), threading.Barrier(2, timeout=60)

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        if y.shape == (1,):
            together.wait()
        return margin(out, y)

    def repeatedly() -> None:
        for _ in range(3):
            per_sample(criterion, scores(C), labels())

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=repeatedly) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not heard
        torch.func.vmap(lambda out, y: margin(out[None], y[None]))(scores(C), labels())
    assert "performance drop" in str(heard[-1].message)


SPLIT: list[tuple[str, Any, Tensor, Tensor]] = [
    ("cross_entropy", nn.CrossEntropyLoss(), scores(C), labels()),
    ("sum", nn.CrossEntropyLoss(reduction="sum"), scores(C, T), labels(T)),
    ("smoothing", nn.CrossEntropyLoss(label_smoothing=0.1), scores(C, T), labels(T)),
    ("probabilities", nn.CrossEntropyLoss(), scores(C, T), scores(C, T).softmax(1)),
    ("one_sample", nn.CrossEntropyLoss(), scores(C)[:1], labels()[:1]),
    ("nll", nn.NLLLoss(), scores(C, T).log_softmax(1), labels(T)),
    ("mse", nn.MSELoss(), scores(C, T), scores(C, T) * 2),
    ("mse_of_numbers", nn.MSELoss(), scores(), scores() * 2),
    ("l1", nn.L1Loss(reduction="sum"), scores(C), scores(C) * 2),
    ("huber", nn.HuberLoss(delta=0.3), scores(C), scores(C) * 3),
    ("smooth_l1", nn.SmoothL1Loss(beta=0.3), scores(C), scores(C) * 3),
    ("bce", nn.BCELoss(), scores(C).sigmoid(), scores(C).sigmoid()),
    ("bce_logits", nn.BCEWithLogitsLoss(), scores(C), scores(C).sigmoid()),
    ("function", F.cross_entropy, scores(C, T), labels(T)),
    ("function_mse", F.mse_loss, scores(C), scores(C) * 2),
]


class Doubled(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def replaced() -> nn.MSELoss:
    criterion = nn.MSELoss()
    criterion.forward = lambda out, y: (out - 2 * y).square().mean()  # type: ignore[method-assign]
    return criterion


def hooked() -> nn.MSELoss:
    criterion = nn.MSELoss()
    criterion.register_forward_hook(lambda module, given, loss: 3 * loss)
    return criterion


WHOLE: list[tuple[str, Any, Tensor, Tensor]] = [
    ("class_weights", nn.CrossEntropyLoss(weights), scores(C), labels()),
    ("positive_weights", nn.BCEWithLogitsLoss(pos_weight=weights), scores(C), scores(C).sigmoid()),
    ("ignored", nn.CrossEntropyLoss(ignore_index=int(labels(T)[0, 0])), scores(C, T), labels(T)),
    ("ignored_by_function", F.cross_entropy, scores(C), labels().index_fill(0, torch.tensor([1]), -100)),
    ("broadcast", nn.MSELoss(), scores(C, 1), scores(C, T)),
    ("one_distribution_over_the_batch", nn.CrossEntropyLoss(), scores(), scores().softmax(0)),
    ("of_a_subclass", Doubled(), scores(C), scores(C) * 2),
    ("replaced_forward", replaced(), scores(C), scores(C) * 2),
    ("hooked", hooked(), scores(C), scores(C) * 2),
    ("another_criterion", nn.SoftMarginLoss(), scores(C), scores(C).sign()),
]


@pytest.mark.parametrize(("criterion", "out", "y"), [c[1:] for c in SPLIT], ids=[c[0] for c in SPLIT])
def test_the_short_way_for_criteria_of_torch_gives_the_same(criterion: Any, out: Tensor, y: Tensor) -> None:
    expected = torch.stack([criterion(out[n : n + 1], y[n : n + 1]) for n in range(len(out))])
    found = unreduced(criterion, out, y, len(out))
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("criterion", "out", "y"), [c[1:] for c in WHOLE], ids=[c[0] for c in WHOLE])
def test_the_short_way_is_not_taken_where_it_might_differ(criterion: Any, out: Tensor, y: Tensor) -> None:
    assert unreduced(criterion, out, y, N) is None


def test_per_sample_losses_are_taken_as_they_are() -> None:
    out, y = scores(C), labels()
    assert torch.equal(
        per_sample(nn.CrossEntropyLoss(reduction="none"), out, y), F.cross_entropy(out, y, reduction="none")
    )


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(C, C).double()


def test_a_sample_whose_every_target_is_ignored_has_a_zero_row_and_a_warning() -> None:
    model = linear()
    x, y = scores(T, C), labels(T)
    y[1] = -100
    y[2, 0] = -100

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out.mT, target)

    for engine in ("hooks", "vmap", "loop"):
        with pytest.warns(UserWarning, match="ignored"):
            G = persample.gradients(model, loss_fn, x, y, engine=engine)
        assert G.losses[1] == 0 and not G["weight"][1].any() and G["weight"][[0, 2, 3]].isfinite().all()
        alone = F.cross_entropy(model(x[2:3]).mT, y[2:3])
        assert torch.allclose(G["weight"][2], torch.autograd.grad(alone, model.weight)[0], atol=1e-12)


def test_nan_of_a_diverged_model_stays_nan() -> None:
    x = scores(C)
    x[1] = float("nan")
    G = persample.gradients(linear(), nn.CrossEntropyLoss(), x, labels(), verify=False)
    assert G.losses[1].isnan() and G.norm()[1].isnan() and G.norm()[0].isfinite()


def test_a_batch_criterion_that_is_not_the_mean_is_told() -> None:
    model, x, y = linear(), scores(C), labels()
    with pytest.warns(UserWarning, match="class\\s+weights"):
        persample.gradients(model, nn.CrossEntropyLoss(weights), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        persample.gradients(model, nn.CrossEntropyLoss(), x, y)
        persample.gradients(model, nn.CrossEntropyLoss(reduction="sum"), x, y)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_penalty_inside_a_scalar_criterion_belongs_to_every_row(engine: str) -> None:
    model, x, y = linear(), scores(C), labels()

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + 0.1 * model.weight.square().sum()

    G = persample.gradients(model, criterion, x, y, engine=engine)
    plain = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    assert torch.allclose(G["weight"], plain["weight"] + 0.2 * model.weight.detach(), atol=1e-12)
    assert torch.allclose(G["bias"], plain["bias"], atol=1e-12)


def test_parameters_of_the_criterion_are_not_in_the_result() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return self.scale * F.cross_entropy(out, y)

    G = persample.gradients(linear(), Scaled(), scores(C), labels())
    assert G.names == ("weight", "bias")


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda out, y: out, r"\(4, 5\).*must return \[N\]"),
        (lambda out, y: (out[:, :1] - y).square(), r"outputs.squeeze\(-1\)"),
        (lambda out, y: float(out.detach().sum()), "must return a tensor"),
        (lambda out, y: y, "real numbers"),
    ],
)
def test_losses_of_the_wrong_shape(loss_fn: Any, match: str) -> None:
    with pytest.raises(persample.LossError, match=match):
        persample.gradients(linear(), loss_fn, scores(C), labels())
    for engine in ("vmap", "loop"):
        with pytest.raises(persample.PersampleError):
            persample.gradients(linear(), loss_fn, scores(C), labels(), engine=engine)


def test_a_scalar_criterion_that_changes_outputs_in_place_is_refused() -> None:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.mul_(2), y)

    model, x = nn.Linear(3, C).double(), scores(3)
    for run in (persample.gradients, curvature.empirical_fisher, curvature.hvp, curvature.kflr):
        with pytest.raises(persample.LossError, match="in place"):
            run(model, loss_fn, x, labels()).dense()
    rows = persample.gradients(model, lambda out, y: F.cross_entropy(out.mul_(2), y, reduction="none"), x, labels())
    torch.testing.assert_close(
        rows.flat(), persample.gradients(model, lambda out, y: F.cross_entropy(out * 2, y), x, labels()).flat()
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_a_scalar_criterion_may_change_targets_that_it_leaves_then(engine: str, verify: bool) -> None:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        y[y == 255] = -100
        return F.cross_entropy(out, y)

    def same(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, ignore_index=255)

    torch.manual_seed(0)
    model, x, y = nn.Conv1d(3, C, 1).double(), scores(3, 5), labels(5)
    y[:, 1::2] = 255
    rows = persample.gradients(model, loss_fn, x, y.clone(), engine=engine, verify=verify)
    torch.testing.assert_close(rows.flat(), persample.gradients(model, same, x, y, engine="loop").flat())
    rows = persample.gradients(model, lambda out, y: loss_fn(out, y.pop("y")), x, {"y": y.clone()}, verify=verify)
    torch.testing.assert_close(rows.flat(), persample.gradients(model, same, x, y).flat())
    with pytest.warns(UserWarning, match="ignored"):
        rows = persample.gradients(model, loss_fn, x, torch.full_like(y, 255), verify=verify)
    assert not rows.flat().any()


def test_targets_that_a_criterion_changes_in_place() -> None:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return (out - y.mul_(2)).square().mean(1)

    model, x, y = nn.Linear(3, C).double(), scores(3), scores(C)
    rows = persample.gradients(model, loss_fn, x, y.clone(), engine="loop", verify=True)
    torch.testing.assert_close(rows.flat(), persample.gradients(model, nn.MSELoss(), x, 2 * y).flat())
    for verify in (True, False):
        with pytest.raises(persample.LossError, match="targets in place"):
            persample.gradients(model, lambda out, y: F.mse_loss(out, y.mul_(2)), x, y.clone(), verify=verify)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_outputs_beside_that_were_made_in_inference_mode(engine: str) -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                count = x.detach().gt(0).sum(1)
            return super().forward(x), count

    model, x, y = Counts(3, C).double(), scores(3), labels()
    rows = persample.gradients(model, lambda out, y: F.cross_entropy(out[0], y), x, y, engine=engine)
    each = persample.gradients(model, lambda out, y: F.cross_entropy(out[0], y, reduction="none"), x, y, engine=engine)
    torch.testing.assert_close(rows.flat(), each.flat())


def test_losses_of_another_batch() -> None:
    with pytest.raises(persample.LossError, match=r"\(2,\) for N = 4"):
        persample.gradients(linear(), lambda out, y: out[:2].sum(1), scores(C), labels())


def test_a_loss_that_the_model_has_already_reduced() -> None:
    class Reduces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = linear()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.l(x), labels)

    with pytest.raises(persample.LossError, match="already reduced"):
        persample.gradients(Reduces(), lambda out, _: out, {"x": scores(C), "labels": labels()})


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_outputs_that_can_not_be_taken_apart(engine: str) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = linear()

        def forward(self, x: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Categorical(logits=self.l(x))

    model, x, y = Policy(), scores(C), labels()
    with pytest.raises(persample.LossError, match=r"such as distributions.*return \[N\] losses"):
        persample.gradients(model, lambda out, y: -out.log_prob(y).mean(), x, y, engine=engine)
    each = persample.gradients(model, lambda out, y: -out.log_prob(y), x, y, engine="hooks")
    torch.testing.assert_close(each.flat(), persample.gradients(model.l, F.cross_entropy, x, y).flat())


@pytest.mark.parametrize("verify", [False, None])
def test_a_distribution_beside_tensors_is_not_that_of_one_sample(verify: bool | None) -> None:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.v = linear(), nn.Linear(C, 1).double()

        def forward(self, x: Tensor) -> tuple[torch.distributions.Distribution, Tensor]:
            return torch.distributions.Categorical(logits=self.l(x)), self.v(x).squeeze(-1)

    def losses(out: Any, y: Tensor) -> Tensor:
        return (out[1] - 1) ** 2 - out[0].log_prob(y)

    model, x, y = ActorCritic(), scores(C), labels()
    with pytest.raises(persample.LossError, match=r"a Categorical of all samples.*return \[N\] losses"):
        persample.gradients(model, lambda out, y: losses(out, y).mean(), x, y, verify=verify)
    each = persample.gradients(model, losses, x, y, verify=verify)
    loop = persample.gradients(model, losses, x, y, engine="loop")
    torch.testing.assert_close(each.flat(), loop.flat())
    value = persample.gradients(model, lambda out, y: (out[1] - 1).square().mean(), x, y, verify=verify)  # uses none
    torch.testing.assert_close(value["v.bias"], 2 * (value.outputs[1] - 1)[:, None])


def test_targets_in_a_list_are_told() -> None:
    with pytest.raises(TypeError) as told:
        persample.gradients(linear(), F.cross_entropy, scores(C), labels().tolist())
    told_of = "targets is a list: give a tensor"
    assert any(told_of in note for note in getattr(told.value, "__notes__", [told_of]))  # from Python 3.11 on


def test_a_loss_function_that_raises_shows_its_own_error() -> None:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        persample.gradients(linear(), loss_fn, scores(C), labels())


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("empty", range(3))
def test_losses_per_sample_are_taken_as_they_are_also_where_they_are_not_a_number(engine: str, empty: int) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(3, 5, 4).double(), torch.randint(3, (3, 5))
    y[empty] = -100

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(outputs.mT, targets, reduction="none")
        return each.sum(1) / (targets != -100).sum(1)  # 0 / 0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        G = persample.gradients(model, losses, x, y, engine=engine)
    assert G.losses.isnan().nonzero().flatten().tolist() == [empty]
    for n, loss in enumerate(losses(model(x), y)):
        (row,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
        assert torch.allclose(G["weight"][n], row, rtol=0, atol=1e-12, equal_nan=True)


def test_warnings_name_the_sample_that_is_ignored() -> None:
    """Also the one that is run alone to verify."""
    model, x = nn.Linear(3, C).double(), scores(3)
    for n in range(N):
        y = labels().index_fill(0, torch.tensor([n]), -100)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            persample.gradients(model, nn.CrossEntropyLoss(), x, y, verify=True)
        ignored = [str(w.message) for w in seen if "is ignored" in str(w.message)]
        assert ignored and all(f"sample(s) [{n}] " in message for message in ignored)


# ---- samples that meet by broadcasting ------------------------------------------------------------------------------

BROADCASTING: list[Any] = [
    lambda out, y: (out - y).square().mean(),
    lambda out, y: (out - y).square().sum(),
    lambda out, y: (out - y).square().mean(1),
    lambda out, y: (out - y).square().sum(1),
]


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("loss_fn", BROADCASTING)
def test_a_loss_that_broadcasts_samples_over_samples_is_refused(loss_fn: Any, engine: str) -> None:
    model, x, y = nn.Linear(C, 1).double(), scores(C), scores()
    for verify in (None, False) if engine == "hooks" else (None,):
        with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\).*\(4, 4\).*outputs.squeeze\(-1\)"):
            persample.gradients(model, loss_fn, x, y, engine=engine, verify=verify)
    squeezed = persample.gradients(model, lambda out, y: (out.squeeze(-1) - y).square(), x, y, engine=engine)
    alike = persample.gradients(model, nn.MSELoss(), x, y[:, None], engine=engine)
    assert torch.allclose(squeezed.flat(), alike.flat(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using a target size")  # PyTorch's, of the same thing
def test_a_criterion_of_torch_that_broadcasts_is_refused() -> None:
    model, x, y = nn.Linear(C, 1).double(), scores(C), scores()
    with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\)"):
        persample.gradients(model, nn.MSELoss(), x, y)
    with pytest.raises(persample.LossError, match=r"targets.squeeze\(-1\)"):
        persample.gradients(nn.Sequential(model, nn.Flatten(0)), nn.MSELoss(), x, y[:, None])
    with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\)"):
        per_sample(nn.MSELoss(), model(x), y)


def test_broadcasting_is_refused_wherever_the_shapes_are() -> None:
    weight, y = scores().square(), scores()
    model = nn.Linear(C, 1).double()
    with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\).*squeeze\(-1\)"):
        persample.gradients(
            model, lambda out, t: ((out - t["y"]).square() * t["w"]).mean(), scores(C), {"y": y, "w": weight}
        )
    with pytest.raises(persample.LossError, match=r"\(4, 1, 5\).*\(4, 5\).*outputs.reshape\(targets.shape\)"):
        persample.gradients(
            nn.Sequential(linear(), nn.Unflatten(1, (1, C))),
            lambda out, t: (out - t).square().mean(),
            scores(C),
            scores(C),
        )
    with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\)"):
        persample.curvature.kfac(model, lambda out, t: (out - t).square().mean(), scores(C), y)
    bn = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1)).double()
    with pytest.raises(persample.LossError, match=r"\(4, 1\).*\(4,\)"):
        persample.coupling(bn, lambda out, t: (out - t).square().mean(), scores(C), y).norms()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda out, y: (out[:, 0] - y).square().mean(),
        lambda out, y: (out.mean(-1) - y).square(),
        lambda out, y: (out.flatten() - y).square().sum(),
    ],
)
def test_shapes_that_could_broadcast_and_do_not_are_no_matter(loss_fn: Any) -> None:
    model, x, y = nn.Linear(C, 1).double(), scores(C), scores()
    G = persample.gradients(model, loss_fn, x, y)
    assert torch.allclose(G.losses, (model(x)[:, 0] - y).square().detach())


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda out, y: F.cross_entropy(out.mT, y, reduction="none"), r"\(4, 3\).*flatten\(1\).sum\(1\).*per token"),
        (
            lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none"),
            r"\(12,\).*3 losses of every sample.*view\(4, -1\).sum\(1\).*per token",
        ),
    ],
)
def test_losses_per_token_are_told_the_ways_out(loss_fn: Any, match: str) -> None:
    with pytest.raises(persample.LossError, match=match):
        persample.gradients(linear(), loss_fn, scores(T, C), labels(T))


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_losses_of_one_column_are_no_broadcasting(engine: str) -> None:
    """Of a sample alone they are ``[1, 1]``, as if all samples were compared with all."""
    with pytest.raises(persample.LossError, match=r"losses.flatten\(1\).sum\(1\)") as raised:
        persample.gradients(linear(), lambda out, y: out.sum(1, keepdim=True), scores(C), labels(), engine=engine)
    assert "squeeze" not in str(raised.value)


def test_warnings_point_to_the_line_of_the_user() -> None:
    model, x, y = linear(), scores(C), labels()
    with pytest.warns(UserWarning, match="whole batch") as seen:
        persample.gradients(model, nn.CrossEntropyLoss(weights), x, y)
    with pytest.warns(UserWarning, match="is ignored") as more:
        persample.gradients(model, nn.CrossEntropyLoss(), x, y.index_fill(0, torch.tensor([1]), -100), engine="loop")
    assert {w.filename for w in [*seen, *more]} == {__file__}


IGNORED = torch.tensor([1, 3, 4])
TELLS: dict[str, Callable[..., Any]] = {
    **{f"gradients, {engine}": partial(persample.gradients, engine=engine) for engine in ("hooks", "vmap", "loop")},
    "gradients, verified": partial(persample.gradients, verify=True),
    "gradients, in slices": partial(persample.gradients, max_bytes=1000),
    "gram, in slices": partial(persample.gradients, max_bytes=1000, quantities=["gram"]),
    "check": persample.check,
    "explain": persample.explain,
    "fisher": curvature.fisher,
    "fisher, drawn": partial(curvature.fisher, type="mc"),
    "fisher, product": lambda *given: quietly(curvature.fisher, *given).dense,
    "hvp, product": lambda *given: curvature.hvp(*given).dense(),
    "empirical fisher, rows": partial(curvature.empirical_fisher, method="rows"),
    "kfac": curvature.kfac,
    "kflr": curvature.kflr,
    "kfra": curvature.kfra,
    "ekfac": curvature.ekfac,
    "per_sample_hvp": lambda *given: curvature.per_sample_hvp(*given, torch.ones(30).double()),
    "per_sample_hvp, loop": lambda *given: curvature.per_sample_hvp(*given, torch.ones(30).double(), engine="loop"),
    "coupling": persample.coupling,
    "coupled rows": partial(persample.gradients, coupled="influence"),
    **{
        f"coupling, {name}": lambda *given, name=name: getattr(quietly(persample.coupling, *given), name)
        for name in ("norms", "via_statistics", "loss_norms", "adjoints", "theta_coupling", "noise", "leave_one_out")
    },
}


def quietly(make: Callable[..., Any], *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*given)


@pytest.mark.parametrize("name", TELLS)
def test_ignored_samples_are_told_once_for_a_call(name: str) -> None:
    """However many passes it takes: by their numbers in the batch, at the line of the user's."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(C).double() if "coupl" in name else nn.Tanh()
    model, (x, y) = nn.Sequential(nn.Linear(C, C).double(), layer), (torch.randn(6, C).double(), torch.arange(6) % C)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = TELLS[name](model, nn.CrossEntropyLoss(), x, y.index_fill(0, IGNORED, -100))
        if callable(made):  # what was made before, without being heard
            made()
    told = [(w.filename, "sample(s) [1, 3, 4] is ignored" in str(w.message)) for w in seen]
    assert told == [(__file__, True)]


def test_losses_that_are_zero_alone_compare_samples() -> None:
    """InfoNCE and batch-hard triplets, reduced by the user: rows would be zeros."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.tensor([0, 0, 1, 1])
    info = lambda z, _: F.cross_entropy(z @ z.T, torch.arange(len(z)))  # noqa: E731

    def hard(z: Tensor, y: Tensor) -> Tensor:
        d, same = torch.cdist(z, z), y[:, None] == y
        return (d.masked_fill(~same, 0).amax(1) - d.masked_fill(same, 9).amin(1) + 9).relu().sum() - 0 * z.sum()

    for loss in (info, hard):
        for engine in ("hooks", "vmap", "loop"):
            with pytest.raises((persample.LossError, persample.BatchCoupledError)):
                persample.gradients(model, loss, x, y, engine=engine)
        with pytest.raises(persample.LossError, match="compares samples"):
            persample.gradients(model, loss, x, y)
        assert not persample.check(model, loss, x, y).ok
    assert persample.gradients(model, lambda z, _: (z - 99).relu().mean(), x).losses.eq(0).all()


def test_hooks_of_all_modules_act_on_criteria() -> None:
    criterion, out, y = nn.CrossEntropyLoss(), scores(C), labels()
    double = lambda module, _, loss: 2 * loss if module is criterion else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        G, truth = (
            persample.gradients(linear(), criterion, out, y, verify=v, engine=e)
            for v, e in ((False, "hooks"), (None, "loop"))
        )
    finally:
        handle.remove()
    assert torch.allclose(G.flat(), truth.flat(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
def test_losses_that_are_nan_alone_are_not_ignored_targets() -> None:
    """The deviation of one sample is not a number: its row was zero, as if its target were ignored."""
    model, x, y = linear(), scores(C), labels()
    spread = lambda out, y: F.cross_entropy(out, y) - out.std(0).mean()  # noqa: E731
    for engine in ("hooks", "vmap", "loop"):
        with pytest.raises(persample.LossError, match="NaN for every sample alone: it compares"):
            persample.gradients(model, spread, x, y, engine=engine)
    for engine in ("hooks", "vmap"):
        with pytest.raises(persample.LossError, match="NaN for every sample alone: it compares"):
            persample.gradients(model, spread, x, y, engine=engine, verify=False)
    assert not persample.check(model, spread, x, y).ok
    with pytest.raises(persample.LossError, match="NaN for every sample alone: it compares"):
        per_sample(spread, x, y)
    with pytest.warns(UserWarning, match="every target"):
        G = persample.gradients(model, F.cross_entropy, x, torch.full_like(y, -100))
    assert not G.flat().any()


def test_criteria_that_want_many_samples_are_no_closures() -> None:
    """And are asked once only, and from the state that they are in."""

    class Mines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            losses = F.cross_entropy(out, y, reduction="none")
            return losses.mean() if len(losses) == 1 else 2 * losses.topk(3).values.mean()

    loss, out, y = Mines(), scores(C), labels()
    counted = []
    for _ in range(3):
        before = float(loss.calls)
        with pytest.warns(UserWarning, match="the criterion of the whole batch"):
            persample.gradients(nn.Linear(C, C).double(), loss, out, y, verify=False)
        counted.append(float(loss.calls) - before)
    assert counted[0] == counted[1] == counted[2]
