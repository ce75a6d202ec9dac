"""`persample.extend`: rows inside any training code, and nothing that the user could notice."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample import calls
from persample.engines.hooks import _STANCES
from persample.factors import tensors
from persample.recorder import _HELD

N = 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))
    return model.double()


def batch(seed: int = 1, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(5, (n,), generator=generator)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def close(a: Any, b: Any, tol: float = 1e-12) -> bool:
    return bool((a - b).abs().max() < tol)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_context_manager_gives_rows_and_leaves_the_users_backward_alone() -> None:
    model, (x, y) = net(), batch()
    x.requires_grad_()
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    plain = copy.deepcopy(model)
    x_plain = x.detach().clone().requires_grad_()
    losses_of(plain, x_plain, y).mean().backward()
    with persample.extend(model) as recorder:
        losses = losses_of(model, x, y)
        G = recorder.gradients(losses)
        assert x.grad is None and all(p.grad is None for p in model.parameters())
        again = recorder.gradients(losses)
        losses.mean().backward()
    assert close(G.flat(), reference.flat()) and close(again.flat(), reference.flat())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(x.grad, x_plain.grad)
    assert no_hooks(model)


def test_a_training_loop_reaches_bitwise_the_same_parameters() -> None:
    trained = []
    for watched in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        recorder = persample.extend(model) if watched else None
        for step in range(5):
            losses = losses_of(model, *batch(step))
            if recorder is not None:
                assert len(recorder.gradients(losses)) == N
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        if recorder is not None:
            recorder.remove()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_penalty_in_the_loss_belongs_to_every_row() -> None:
    model, (x, y) = net(), batch()

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target, reduction="none") + 0.1 * model[0].weight.square().sum()

    with persample.extend(model) as recorder:
        G = recorder.gradients(loss_fn(model(x), y))
    reference = persample.gradients(model, loss_fn, x, y, engine="loop")
    assert close(G.flat(), reference.flat())


def test_penalty_outside_the_recorded_region_is_an_error_not_a_wrong_row() -> None:
    model, (x, y) = net(), batch()
    handle = persample.extend(model)
    losses = losses_of(model, x, y) + model[0].weight.square().sum()
    with pytest.raises(persample.CaptureError, match=r"0\.weight"):
        handle.gradients(losses)
    handle.remove()


@pytest.mark.parametrize(
    ("reduce", "reduction"),
    [
        (lambda losses: losses.mean(), "mean"),
        (lambda losses: losses.sum(), "sum"),
        (lambda losses: 0.3 * losses.sum(), 0.3),
        (lambda losses: 0.3 * losses.sum(), lambda: 0.3),
    ],
)
def test_persistent_handle_unscales_every_reduction(reduce: Any, reduction: Any) -> None:
    model, (x, y) = net(), batch()
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    plain = copy.deepcopy(model)
    got: list[persample.Gradients] = []
    handle = persample.extend(model, on_backward=got.append, reduction=reduction)
    for _ in range(2):  # accumulation: one result per backward
        reduce(losses_of(model, x, y)).backward()
        reduce(losses_of(plain, x, y)).backward()
    handle.remove()
    reduce(losses_of(model, x, y)).backward()
    assert len(got) == 2 and no_hooks(model)
    assert all(close(G.flat(), reference.flat()) for G in got)
    reduce(losses_of(plain, x, y)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [T, N, 6], [N, T]
        return self.layer(x.tanh()).square().sum(2).T * mask


@pytest.mark.parametrize("by_name", [0, 1, 2])
@pytest.mark.parametrize("batch_dim", [{"x": 1, "mask": 0}, ((1, 0), 0), [1, 0]], ids=str)
def test_a_handle_has_the_samples_where_batch_dim_says(batch_dim: Any, by_name: int) -> None:
    model, got = Sequences().double(), list[Any]()
    inputs = {"x": torch.randn(7, N, 6, dtype=torch.float64), "mask": torch.ones(N, 7, dtype=torch.float64)}
    args, kwargs = list(inputs.values())[: 2 - by_name], dict(list(inputs.items())[2 - by_name :])
    handle = persample.extend(model, on_backward=got.append, reduction="sum", batch_dim=batch_dim)
    if by_name and not isinstance(batch_dim, dict):  # axes of positional arguments
        with pytest.raises(persample.SampleAxisError, match="batch_dim does not fit"):
            model(*args, **kwargs)
        return
    model(*args, **kwargs).sum().backward()
    handle.remove()
    truth = persample.gradients(
        model, lambda out, _: out.sum(1), inputs, batch_dim=({"x": 1, "mask": 0}, 0), engine="loop"
    )
    assert close(got[0].flat(), truth.flat())


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
def test_axes_by_name_are_those_of_positional_arguments_too(wrap: Any) -> None:
    model, got = wrap(nn.Sequential(nn.Linear(6, 5))), list[Any]()
    with persample.extend(model, batch_dim={"input": 1}, on_backward=got.append, reduction="sum"):
        model(torch.randn(7, N, 6)).sum().backward()
    assert len(got[0]) == N  # not 7
    with persample.extend(model, batch_dim={"x": 1}), pytest.raises(persample.SampleAxisError, match="no entry"):
        model(torch.randn(7, N, 6))
    with persample.extend(model, batch_dim=(1, 0)) as recorder:
        assert len(recorder.gradients(model(input=torch.randn(7, N, 6)).sum((0, 2)))) == N


def test_samples_are_said_by_name_where_batch_dim_is() -> None:
    """Where another method than the forward is called."""
    model, x = Sequences().double(), torch.randn(7, N, 6, dtype=torch.float64)
    for batch_dim, args, kwargs in (({"x": 1}, (), {"x": x}), (1, (x,), {}), (1, (), {"x": x}), (1, (x,), {"y": x})):
        with persample.extend(model, batch_dim=batch_dim) as recorder:
            recorder.samples(*args, **kwargs)
            losses = model.layer(x).square().sum((0, 2))
            G = recorder.gradients(losses)
        rows = [torch.autograd.grad(model.layer(x[:, n]).square().sum(), [*model.parameters()]) for n in range(N)]
        assert close(G.flat(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    by_name = pytest.raises(persample.SampleAxisError, match="by name, too")
    with persample.extend(model, batch_dim={"x": 1}) as recorder, by_name:
        recorder.samples(x)


def test_several_forwards_before_their_backwards_in_any_order() -> None:
    model, got = net(), []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    batches = [batch(1), batch(2, n=3), batch(3)]
    losses = [losses_of(model, x, y).mean() for x, y in batches]
    for i in (2, 0, 1):
        losses[i].backward()
    handle.remove()
    for i, G in zip((2, 0, 1), got, strict=True):
        reference = persample.gradients(model, nn.CrossEntropyLoss(), *batches[i], engine="loop")
        assert close(G.flat(), reference.flat())


def test_two_forwards_of_one_batch_in_one_loss() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        G = recorder.gradients(F.cross_entropy(model(x) + model(2 * x), y, reduction="none"))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, x: Tensor) -> Tensor:
            return self.m(x) + self.m(2 * x)

    reference = persample.gradients(Twice(), nn.CrossEntropyLoss(), x, y, engine="loop")
    assert close(G.flat(), reference.flat())


def test_statistics_on_arrival() -> None:
    model, (x, y) = net(), batch()
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    asked: list[Any] = ["norm", "variance", ("clip", {"max_norm": 0.5})]
    with persample.extend(model, quantities=asked) as recorder:
        S = recorder.gradients(losses_of(model, x, y))
    assert isinstance(S, persample.Statistics)
    assert close(S.norm(), reference.norm())
    for name, expected in reference.clip(0.5).items():
        assert close(S.clip(0.5)[name], expected)
    got: list[Any] = []
    handle = persample.extend(model, quantities=["norm"], on_backward=got.append, reduction="mean")
    losses_of(model, x, y).mean().backward()
    handle.remove()
    assert close(got[0].norm(), reference.norm())


def test_frozen_and_thawed_between_runs() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        assert len(recorder.gradients(losses_of(model, x, y)).names) == 4
    handle = persample.extend(model)
    model[0].requires_grad_(False)
    G = handle.gradients(losses_of(model, x, y))
    model[0].requires_grad_(True)
    full = handle.gradients(losses_of(model, x, y))
    handle.remove()
    assert G.names == ("2.weight", "2.bias") and len(full.names) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_extended_model_is_a_plain_model(copied: Any) -> None:
    model, (x, y) = net(), batch()
    before = copied(model)
    with persample.extend(model) as recorder, persample.extend(model):  # the hooks of either may leave first
        during = copied(model)
        G = recorder.gradients(losses_of(model, x, y))
    after = copied(model)
    for other in (before, during, after):
        assert torch.equal(other(x), model(x))
        assert no_hooks(other)
        with persample.extend(other) as recorder:
            assert close(recorder.gradients(losses_of(other, x, y)).flat(), G.flat())


def test_nothing_is_left_after_an_exception() -> None:
    model, (x, y) = net(), batch()
    attributes = [set(vars(m)) for m in model.modules()]

    def fails() -> None:
        with persample.extend(model) as recorder:
            recorder.gradients(losses_of(model, x, y))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    handle = persample.extend(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(N, 99, dtype=torch.float64))  # raises half way
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
    assert close(handle.gradients(losses_of(model, x, y)).losses, losses_of(model, x, y))
    handle.remove()
    assert no_hooks(model) and attributes == [set(vars(m)) for m in model.modules()]


def test_forward_without_backward_and_without_grad() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        model(x)
        with torch.no_grad():
            model(x)
        G = recorder.gradients(losses_of(model, x, y))
    assert close(G.flat(), persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop").flat())


def test_hundreds_of_steps_leave_memory_flat() -> None:
    model, (x, y) = net(), batch()
    handle = persample.extend(model)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for step in range(300):
        losses = losses_of(model, x, y)
        if step % 3:
            handle.gradients(losses)
        if step == 20:
            before = alive()
    after = alive()
    handle.remove()
    assert after <= before + 5


class Reading(nn.Sequential):
    """Python reads a number of every batch."""

    def forward(self, x: Tensor) -> Tensor:
        assert bool((x > -100).any())
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("listens", [False, True])
def test_a_long_with_block_remembers_no_earlier_batches(listens: bool) -> None:
    model, sizes = Reading(*net()), list[tuple[int, int]]()
    told: dict[str, Any] = {"on_backward": lambda G: None, "reduction": "mean"} if listens else {}
    with persample.extend(model, **told) as recorder:
        for step in range(30):
            x, y = batch(step)
            losses = losses_of(model, x, y)
            if listens:
                losses.mean().backward()
            else:
                recorder.gradients(losses)
            assert recorder._capture is not None
            followed = recorder._capture.followed
            sizes.append((len(followed.known), len(followed.acts.read)))
    known, read = zip(*sizes, strict=True)
    assert known[29] < known[3] + 10 and read[29] == read[3]
    assert listens or len(_HELD[model]) < 4  # not every batch is a path of its own, to be verified


def test_two_models_extended_in_two_threads() -> None:
    results: dict[int, Tensor] = {}
    models = {seed: net() for seed in (1, 2)}

    def work(seed: int) -> None:
        for _ in range(20):
            with persample.extend(models[seed]) as recorder:
                results[seed] = recorder.gradients(losses_of(models[seed], *batch(seed))).flat()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        reference = persample.gradients(net(), nn.CrossEntropyLoss(), *batch(seed), engine="loop")
        assert close(results[seed], reference.flat())


def test_torch_func_over_an_extended_model() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        G = recorder.gradients(losses_of(model, x, y))
        params = {name: p.detach() for name, p in model.named_parameters()}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

        rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    for name, value in rows.items():
        assert close(value, G[name])


def test_misuse_is_told() -> None:
    model, (x, y) = net(), batch()
    with pytest.raises(ValueError, match="reduction"):
        persample.extend(model, on_backward=print)
    with pytest.raises(ValueError, match="reduction"):
        persample.extend(model, reduction="mean")
    with pytest.raises(ValueError, match="'sum', 'mean'"):
        persample.extend(model, on_backward=print, reduction="avg")
    with pytest.raises(persample.UnknownParameterError):
        persample.extend(model, params="nothing")
    assert no_hooks(model)
    with persample.extend(model) as recorder:
        with pytest.raises(persample.LossError, match=r"\[N\]"):
            recorder.gradients(losses_of(model, x, y).mean())
        with pytest.raises(persample.CaptureError, match="no recorded forward"):
            recorder.gradients(torch.zeros(N, requires_grad=True) * 2)
        with pytest.raises(
            persample.LossError, match=r"N = 4 samples, got \(20,\).*5 losses of every sample.*per token"
        ):
            recorder.gradients(model(x).flatten())
        with pytest.raises(persample.LossError, match=r"\(4, 5\).*flatten\(1\).sum\(1\).*per token"):
            recorder.gradients(model(x))
        with pytest.raises(persample.SampleAxisError, match="4 samples, but there are 3 losses"):
            recorder.gradients(model(x)[:3, 0])


def test_quantities_may_be_asked_for_at_every_call() -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model) as recorder:
        losses = losses_of(model, x, y)
        S, G = recorder.gradients(losses, quantities=["norm", "mean"]), recorder.gradients(losses)
        with pytest.raises(persample.QuantityError, match="unknown quantity 'norms'"):
            recorder.gradients(losses, quantities=["norms"])
    assert isinstance(S, persample.Statistics) and isinstance(G, persample.Gradients)
    assert close(S.norm(), G.norm()) and close(S.mean()["0.weight"], G.mean()["0.weight"])


def test_losses_that_compare_samples_are_refused_though_others_were_served() -> None:
    """A mean over the wrong axis has the shape of losses, but is made of all samples."""
    model, (x, _), targets = net(), batch(), torch.arange(float(N), dtype=torch.float64)
    with persample.extend(model) as recorder:
        apart = model(x)[:, :1] - targets  # [N, N], where [N] was meant
        recorder.gradients(apart.square().mean(1))  # each of one sample, if strange
        with pytest.raises(persample.BatchCoupledError, match=r"made of all samples.*\[N, 1\].*\[N\]"):
            recorder.gradients(apart.square().mean(0))


def test_warnings_point_to_the_line_of_the_user() -> None:
    model, (x, y), got = net(), batch(), []
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    losses = losses_of(model, x, y).sum()
    with pytest.warns(UserWarning, match="reports nothing") as seen:
        torch.autograd.grad(losses, model[2].weight)
    handle.remove()
    assert {w.filename for w in seen} == {__file__}


def test_batch_norm_in_training_mode_is_refused() -> None:
    model, (x, y) = nn.Sequential(net(), nn.BatchNorm1d(5)).double(), batch()
    with persample.extend(model) as recorder, pytest.raises(persample.BatchCoupledError, match=r"0\.0\.weight"):
        recorder.gradients(losses_of(model, x, y))
    handle = persample.extend(model, on_backward=print, reduction="mean")
    with pytest.raises(persample.BatchCoupledError):
        model(x)
    handle.remove()
    model.eval()
    with persample.extend(model) as recorder:
        assert len(recorder.gradients(losses_of(model, x, y))) == N


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_gradients_of_an_extended_model_are_none_of_the_recorders_business(engine: str) -> None:
    model, (x, y), got = net(), batch(), []
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    assert close(persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine).flat(), reference.flat())
    assert persample.check(model, nn.CrossEntropyLoss(), x, y, engine=engine).ok
    assert not got
    losses_of(model, x, y).mean().backward()
    handle.remove()
    assert len(got) == 1 and close(got[0].flat(), reference.flat())
    with persample.extend(model) as recorder:
        losses = losses_of(model, x, y)
        assert close(persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine).flat(), reference.flat())
        assert close(recorder.gradients(losses).flat(), reference.flat())


def test_handles_and_recorders_of_one_model_do_not_disturb_each_other() -> None:
    model, (x, y) = net(), batch()
    whole = nn.Sequential(model, nn.Linear(5, 5)).double()
    inner, outer = [], []
    handles = [
        persample.extend(model, on_backward=inner.append, reduction="mean"),
        persample.extend(model, on_backward=inner.append, reduction="mean"),
        persample.extend(whole, on_backward=outer.append, reduction="mean"),
    ]
    reference = persample.gradients(whole, nn.CrossEntropyLoss(), x, y, engine="loop")
    with persample.extend(whole) as recorder:
        losses = losses_of(whole, x, y)
        G = recorder.gradients(losses)
        assert not inner
        losses.mean().backward()
    for handle in handles:
        handle.remove()
    assert close(G.flat(), reference.flat()) and no_hooks(whole)
    assert [len(inner), len(outer)] == [2, 1] and close(outer[0].flat(), reference.flat())
    size = inner[0].flat().shape[1]
    assert all(close(rows.flat(), reference.flat()[:, :size]) for rows in inner)


def test_a_backward_of_two_batches_is_refused() -> None:
    model, got = net(), []
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    loss = losses_of(model, *batch(1)).sum() + losses_of(model, *batch(2, n=3)).sum()
    with pytest.raises(persample.SampleAxisError, match=r"4 samples|3 samples"):
        loss.backward()
    assert not got
    x, y = batch(3)
    losses_of(model, x, y).sum().backward()
    handle.remove()
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    assert len(got) == 1 and close(got[0].flat(), reference.flat())


def test_a_loss_on_intermediate_results_counts() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            h = self.net[0](x).tanh()
            self.aux = self.net[2](h * 2).square().mean(1)
            return self.net[2](h)

    model, (x, y), got = Aux(), batch(), []
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    out = model(x)
    (F.cross_entropy(out, y, reduction="sum") + model.aux.sum()).backward()
    handle.remove()
    for n in range(N):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) + model.aux.sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert close(got[0].flat()[n], torch.cat([g.flatten() for g in grads]))


def test_what_is_no_whole_backward_of_the_losses_is_not_reported() -> None:
    model, (x, y), got = net(), batch(), []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    with pytest.warns(UserWarning, match=r"some inputs only.*0\.weight"):
        losses_of(model, x, y).mean().backward(inputs=[model[2].weight])
    assert not got
    x.requires_grad_()
    (g,) = torch.autograd.grad(losses_of(model, x, y).mean(), x, create_graph=True)
    assert len(got) == 1
    with pytest.warns(UserWarning, match="create_graph=True"):
        g.square().sum().backward()
    handle.remove()
    reference = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    assert len(got) == 1 and close(got[0].flat(), reference.flat())


def test_hooks_that_the_user_sets_later_count() -> None:
    model, (x, y), got = net(), batch(), []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    out = model(x)
    out.register_hook(lambda g: 3 * g)
    F.cross_entropy(out, y).backward()
    handle.remove()
    for name, p in model.named_parameters():
        assert close(got[0].mean()[name], p.grad)


def test_a_forward_that_is_interrupted_from_outside_can_be_cleaned_up() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            raise SystemExit

    model, (x, _) = Interrupted(), batch()
    handle = persample.extend(model)
    with pytest.raises(SystemExit):
        model(x)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack() and no_hooks(model)


@pytest.mark.parametrize("first", ["create_graph", "backward", "another model", "many calls"])
def test_a_forward_that_is_interrupted_from_outside_is_in_nobodys_way(first: str) -> None:
    """Nobody says that it was: it is noticed before what it listens to would be taken for its own."""
    model, other, (x, y), got = net(), net(), batch(), list[Any]()
    coupled = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    expected = persample.gradients(coupled, nn.CrossEntropyLoss(), x, y, coupled="loss").flat()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    before = losses_of(model, x, y).mean()
    hook = model[1].register_forward_hook(lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        model(x)
    hook.remove()
    (left,) = torch.overrides._get_current_function_mode_stack()
    assert left.active
    if first == "create_graph":
        z = x.clone().requires_grad_()
        torch.autograd.grad(other(z).sum(), z, create_graph=True)
    elif first == "another model":
        assert close(persample.gradients(coupled, nn.CrossEntropyLoss(), x, y, coupled="loss").flat(), expected)
    elif first == "many calls":
        for _ in range(300):
            x.sum()
    else:
        before.backward()
        assert len(got) == 1
    assert not left.active
    losses_of(model, x, y).mean().backward()
    assert not torch.overrides._get_current_function_mode_stack()
    handle.remove()
    assert close(got[-1].flat(), persample.gradients(model, nn.CrossEntropyLoss(), x, y).flat())


def coupled_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).double()


def slopes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of a gradient penalty, as in every training of a critic."""
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(losses_of(model, z, y).sum(), z, create_graph=True)
    return torch.autograd.grad(g.square().sum(), next(model.parameters()))[0]


CE = nn.CrossEntropyLoss()
IN_BETWEEN = {
    **{
        kind: lambda m, x, y, kind=kind: persample.gradients(m, CE, x, y, coupled=kind).flat()
        for kind in ("loss", "influence", "frozen", "copy")
    },
    "table": lambda m, x, y: persample.coupling(m, CE, x, y).norms(),
    "ggn": lambda m, x, y: persample.curvature.ggn(m, CE, x, y).dense(),
    "hvp": lambda m, x, y: persample.curvature.hvp(m, CE, x, y).dense(),
    "kfac": lambda m, x, y: persample.curvature.kflr(m.eval(), CE, x, y).dense(),
    "penalty": slopes,
    "alone": lambda m, x, y: persample.gradients(m.eval(), CE, x, y).flat(),
}


@pytest.mark.parametrize("way", ["with", "handle"])
@pytest.mark.parametrize("what", IN_BETWEEN)
def test_other_models_are_seen_by_nobody_in_a_recording(what: str, way: str) -> None:
    """A with-block goes on listening after the forward, as losses may use parameters: of its own model."""
    model, (x, y), got = net(), batch(), list[persample.Gradients]()
    expected = IN_BETWEEN[what](coupled_net(), x, y)
    rows = persample.gradients(model, CE, x, y).flat()
    if way == "with":
        with persample.extend(model) as recorder:
            losses = losses_of(model, x, y)
            found = IN_BETWEEN[what](coupled_net(), x, y)
            recorded = recorder.gradients(losses)
    else:
        handle = persample.extend(model, on_backward=got.append, reduction="sum")
        losses = losses_of(model, x, y)
        found = IN_BETWEEN[what](coupled_net(), x, y)
        losses.sum().backward()
        handle.remove()
        (recorded,) = got
    assert close(found, expected) and close(recorded.flat(), rows) and "coupled" not in recorded.note


@pytest.mark.parametrize("what", ["ggn", "hvp", "kfac", "alone"])
def test_the_model_itself_is_not_recorded_in_passes_of_the_library(what: str) -> None:
    model, (x, y) = net(), batch()
    expected, rows = IN_BETWEEN[what](model, x, y), persample.gradients(model, CE, x, y).flat()
    with persample.extend(model) as recorder:
        losses = losses_of(model, x, y)
        assert close(IN_BETWEEN[what](model, x, y), expected)
        assert close(recorder.gradients(losses).flat(), rows)
    with persample.extend(model), pytest.raises(persample.HigherOrderError, match="create_graph"):
        slopes(model, x, y)


def test_a_handle_that_listens_takes_no_losses() -> None:
    model, (x, y) = net(), batch()
    handle = persample.extend(model, on_backward=print, reduction="mean")
    with pytest.raises(persample.CaptureError, match="extend the model once more"):
        handle.gradients(losses_of(model, x, y))
    handle.remove()


@pytest.mark.parametrize(
    "coupled",
    [
        lambda each, out: each.flip(0),
        lambda each, out: each.sum().expand(N),
        lambda each, out: each * each.softmax(0),
        lambda each, out: torch.logsumexp(out @ out.T, 1),
    ],
    ids=["another order", "summed", "weighted by the batch", "contrastive"],
)
def test_losses_that_are_not_of_their_samples(coupled: Any) -> None:
    """Seen in the calls that were recorded, or by one row that is held against the gradient of that very loss."""
    model, (x, y) = net(), batch()
    refused = "another order|not in the order of the samples|depend on the other samples|made of all samples"
    with persample.extend(model) as recorder:
        out = model(x)
        with pytest.raises(persample.PersampleError, match=refused):
            recorder.gradients(coupled(F.cross_entropy(out, y, reduction="none"), out))
        G = recorder.gradients(losses_of(model, x, y))
    with persample.extend(model, verify=False) as recorder:
        unverified = recorder.gradients(losses_of(model, x, y))
    assert close(G.flat(), unverified.flat()) and "verify=False" in repr(unverified) and "verify" not in repr(G)


def test_rows_are_verified_once() -> None:
    model, (x, y) = net(), batch()
    passes: list[int] = []
    for verify, wanted in ((None, 2), (None, 1), (True, 2), (False, 1)):
        with persample.extend(model, verify=verify) as recorder:
            losses = losses_of(model, x, y)
            losses.register_hook(lambda g: passes.append(1))
            recorder.gradients(losses)
        assert len(passes) == wanted
        passes.clear()


@pytest.mark.parametrize(
    "part",
    [
        lambda out, n: out[n : n + 1].sum(),
        lambda out, n: out[n : n + 1].mean((0, 1)),
        lambda out, n: out[n : n + 1].square().sum(1).sum(0),
        lambda out, n: out[[n]].sum(),
        lambda out, n: out.narrow(0, n, 1).logsumexp((0, 1)),
        lambda out, n: torch.einsum("nd,nd->", out[n : n + 1], out[n : n + 1]),
    ],
    ids=["slice", "mean", "one by one", "index", "narrow", "einsum"],
)
def test_losses_sample_by_sample(part: Any) -> None:
    model, (x, y) = net(), batch()
    with persample.extend(model, verify=False) as recorder:
        out = model(x)
        each = [
            F.cross_entropy(out[n : n + 1], y[n : n + 1]) - part(out, n) + part(out, n) * out[n].amax()
            for n in range(N)
        ]
        losses = torch.stack([loss + model[0].weight.square().sum() for loss in each])
        G = recorder.gradients(losses)
        rows = [torch.autograd.grad(loss, model[2].weight, retain_graph=True)[0] for loss in losses]
        decayed = [torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in losses]
    assert close(G["2.weight"], torch.stack(rows)) and close(G["0.weight"], torch.stack(decayed))


def test_how_a_handle_shows_itself() -> None:
    model = net()
    handle = persample.extend(model, on_backward=lambda G: None, reduction="mean")
    assert repr(handle) == "<persample.extend of Sequential, 4 parameters, reports every backward (reduction='mean')>"
    handle.remove()
    assert repr(handle).endswith(", removed>")
    with persample.extend(model, params=".*bias") as recorder:
        assert repr(recorder) == "<persample.extend of Sequential, 2 parameters>"


class Balanced(nn.Module):
    """A mixture of experts that also hands out a loss of the whole batch, by which its router is balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 2), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.router(x).softmax(1)
        outputs = (self.experts(x).view(-1, 2, 5) * share.unsqueeze(-1)).sum(1)
        return outputs, (share.mean(0) * share.mean(0).detach().log() * share).sum()


def test_a_handle_judges_by_the_outputs_that_a_backward_comes_from() -> None:
    torch.manual_seed(0)
    model, got = Balanced().double(), list[persample.Gradients]()
    handle, (x, y) = persample.extend(model, on_backward=got.append, reduction="mean"), batch()
    F.cross_entropy(model(x)[0], y).backward()
    losses = F.cross_entropy(model(x)[0], y, reduction="none")
    for n in range(N):
        grads = torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True)
        assert close(got[0].flat()[n], torch.cat([g.flatten() for g in grads]))
    before = len(got)
    outputs, balance = model(x)
    with pytest.raises(persample.BatchCoupledError, match=r"router"):
        (F.cross_entropy(outputs, y) + balance).backward()
    model.zero_grad()
    F.cross_entropy(model(x)[0], y).backward()  # as if nothing had happened
    assert len(got) > before and close(got[-1].flat(), got[0].flat())
    handle.remove()
    assert no_hooks(model)


class Gated(nn.Module):
    """A weight that is computed from parameters, a function with several outputs, a parameter for the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.scale = nn.LSTM(3, 4, batch_first=True), nn.Parameter(torch.rand(5, 4))
        self.head, self.log_std = nn.Linear(4, 5), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(x.view(-1, 2, 3))[0].chunk(2, 1)[0]
        return F.linear(hidden[:, 0], self.head.weight * self.scale, self.head.bias)


def test_a_listener_in_a_with_block_knows_the_calls_of_the_loss_too() -> None:
    torch.manual_seed(0)
    model, (x, y), got = Gated().double(), batch(), list[persample.Gradients]()

    def losses() -> Tensor:
        return F.cross_entropy(model(x) / model.log_std.exp(), y, reduction="none")

    expected = [torch.autograd.grad(losses()[n], [*model.parameters()]) for n in range(N)]
    with persample.extend(model, on_backward=got.append, reduction="mean") as recorder:
        for _ in range(3):
            losses().mean().backward()
        assert recorder._capture is not None
        assert len(recorder._capture.recorded) < 20  # those of earlier steps are gone
    assert len(got) == 3 and not got[2].unused
    for n in range(N):
        assert close(got[2].flat()[n], torch.cat([g.flatten() for g in expected[n]]))


def test_gradients_towards_parameters_that_the_forward_does_not_use() -> None:
    """They are unused, or act in the loss alone: as in a backward into ``.grad``."""
    torch.manual_seed(0)
    model, (x, y), got = Gated().double(), batch(), list[persample.Gradients]()
    parameters = list(model.parameters())
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    expected = torch.autograd.grad(losses_of(model, x, y).mean(), parameters, allow_unused=True)
    assert got[0].unused == ("log_std",)
    for (name, _), g in zip(model.named_parameters(), expected, strict=True):
        assert close(got[0].mean()[name], 0 if g is None else g)
    with pytest.raises(persample.CaptureError, match=r"'log_std' gets a gradient.*with-block"):
        torch.autograd.grad(F.cross_entropy(model(x) / model.log_std.exp(), y), parameters)
    handle.remove()


PICKLED = """
import sys, torch
from torch.utils.hooks import RemovableHandle
model, seen = torch.load(sys.argv[1], weights_only=False), []
assert RemovableHandle.next_id == 0
def before(module, args): seen.append("before")
def after(module, args, output): seen.append("after")
def register(): model.register_forward_pre_hook(before), model.register_forward_hook(after)
x = torch.randn(4, 6, dtype=torch.float64)
if sys.argv[2] == "before":
    register()
model(x)
assert len(model._forward_hooks) == len(model._forward_pre_hooks) == len(seen) // 2
assert not (model._forward_pre_hooks_with_kwargs or model._forward_hooks_with_kwargs)
assert not model._forward_hooks_always_called
if sys.argv[2] == "after":
    register()
    model(x)
assert seen == ["before", "after"]
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_users_on_a_copy_in_another_process(when: str, tmp_path: Path) -> None:
    """Where torch numbers hooks from 0 again, and calls them as it would have called those of these numbers."""
    model = net()
    handle = persample.extend(model, on_backward=lambda G: None, reduction="mean")
    torch.save(model, tmp_path / "model.pt")
    handle.remove()
    assert no_hooks(model) and not (model._forward_hooks_with_kwargs or model._forward_hooks_always_called)
    subprocess.run([sys.executable, "-c", PICKLED, str(tmp_path / "model.pt"), when], check=True, env=os.environ)


def test_a_recorder_may_be_entered_again_but_not_twice() -> None:
    model, (x, y) = net(), batch()
    expected = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop").flat()
    recorder = persample.extend(model)
    for _ in range(2):
        with recorder:
            with pytest.raises(persample.CaptureError, match="in a with-block already"):
                recorder.__enter__()
            assert close(recorder.gradients(losses_of(model, x, y)).flat(), expected)
        assert no_hooks(model) and not torch.overrides._get_current_function_mode_stack()


def test_with_blocks_that_are_left_in_another_order() -> None:
    """As tasks of asyncio do."""
    models, (x, y) = [net(), net(), net()], batch()
    expected = persample.gradients(models[0], nn.CrossEntropyLoss(), x, y, engine="loop").flat()
    recorders = [persample.extend(model) for model in models]
    for recorder in recorders:
        recorder.__enter__()
    for i in (1, 0, 2):
        assert close(recorders[i].gradients(losses_of(models[i], x, y)).flat(), expected)
        recorders[i].__exit__(None, None, None)
    assert not torch.overrides._get_current_function_mode_stack() and all(map(no_hooks, models))


def test_what_cannot_be_recorded_leaves_no_mode_behind() -> None:
    model, (x, y) = net(), batch()
    for recorder in (persample.extend(model, params=["0.weight"]), persample.extend(model, params="0")):
        layer, model[0] = model[0], nn.Identity()
        with pytest.raises(persample.UnknownParameterError):
            model(x)
        with pytest.raises(persample.UnknownParameterError):
            recorder.__enter__()
        assert not torch.overrides._get_current_function_mode_stack() and not _STANCES
        model[0] = layer
        assert recorder.gradients(losses_of(model, x, y)).names[0] == "0.weight"
        recorder.remove()


class Remembers(nn.Module):
    """Attends to features of an earlier batch, which are no samples of this one."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.key, self.out = nn.Linear(5, N).double(), nn.Linear(N, N).double(), nn.Linear(N, 3).double()
        self.use, self.memory = use, torch.randn(N, N, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.enc(x).tanh()
        self.last = z.detach()
        k = self.key(self.memory)
        if self.use == "attention":
            z = F.scaled_dot_product_attention(z[:, None], *[k.expand(len(z), -1, -1)] * 2)[:, 0]
        elif self.use == "linear":
            z = F.linear(z, k)
        elif self.use == "bmm":
            z = torch.bmm(z[:, None], k.expand(len(z), -1, -1))[:, 0]
        else:
            z = z @ (self.memory * self.key.weight)
        out: Tensor = self.out(z)
        return out


@pytest.mark.parametrize("use", ["attention", "linear", "bmm", "product"])
@pytest.mark.parametrize("how", ["recorder", "handle", "recorder in every other batch"])
def test_features_of_earlier_batches_are_constants(use: str, how: str) -> None:
    listens, every = how == "handle", 2 if "other" in how else 1
    model, got = Remembers(use), list[Any]()
    told: dict[str, Any] = {"on_backward": got.append, "reduction": "mean"} if listens else {}
    x, y = torch.randn(6, N, 5, dtype=torch.float64), torch.randint(3, (6, N))
    wanted = []
    with persample.extend(model, **told) as recorder:
        for step in range(6):
            losses = F.cross_entropy(model(x[step]), y[step], reduction="none")
            if not listens and step % every == 0:
                got.append(recorder.gradients(losses))
            losses.mean().backward()
            if step % every:
                model.memory = model.last
                continue
            twin = Remembers(use)
            twin.load_state_dict(model.state_dict())
            twin.memory = model.memory
            wanted.append(persample.gradients(twin, nn.CrossEntropyLoss(), x[step], y[step], engine="loop").flat())
            if step in (2, 3):
                model.memory = model.last
    for G, rows in zip(got, wanted, strict=True):
        torch.testing.assert_close(G.flat(), rows, rtol=1e-9, atol=1e-12)


class Mixes(nn.Module):
    """Its frozen first layer sees all samples, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mixes = nn.Linear(5, 4).double(), nn.Linear(4, 3).double(), False
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(h * h.mean() if self.mixes else h)
        return out


def test_coupling_of_one_batch_is_not_said_of_the_next() -> None:
    model, x, y = Mixes(), torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
    with persample.extend(model) as recorder:
        for coupled in (False, True, False):
            model.mixes = coupled
            G = recorder.gradients(F.cross_entropy(model(x), y, reduction="none"))
            assert ("batch-coupled" in G.note) == coupled


class Stateful(nn.Module):
    """Goes on from where the last batch ended."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out, self.by_hand = nn.GRUCell(5, N).double(), nn.Linear(N, 3).double(), by_hand
        self.state = torch.randn(N, N, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        c, h = self.cell, self.state
        if self.by_hand:
            h = (F.linear(x, c.weight_ih, c.bias_ih)[:, :N] + F.linear(h, c.weight_hh, c.bias_hh)[:, :N]).tanh()
        else:
            h = c(x, h)
        self.state = h.detach()
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_states_that_go_on_from_batch_to_batch(by_hand: bool, inside: bool) -> None:
    """Exact, or an error: they are the samples' own, but that can't be seen."""
    model, x, y = Stateful(by_hand), torch.randn(4, N, 5, dtype=torch.float64), torch.randint(3, (N,))
    recorder = persample.extend(model)
    try:
        if inside:
            recorder.__enter__()
        for step in range(4):
            losses = F.cross_entropy(model(x[step]), y, reduction="none")
            parameters = list(model.parameters())
            rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
            want = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            torch.testing.assert_close(recorder.gradients(losses).flat(), want, rtol=1e-9, atol=1e-12)
    finally:
        recorder.__exit__(None, None, None) if inside else recorder.remove()


class Temperature(nn.Module):
    """Two views of every sample, compared with all others' at a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.t = nn.Linear(6, 3), nn.Linear(6, 3), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.normalize(self.a(x), dim=1), F.normalize(self.b(x + 0.1), dim=1)
        out: Tensor = a @ b.T * self.t.exp()
        return out


class Mixup(nn.Module):
    """Of features, with those of the next sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        out: Tensor = self.b(0.7 * h + 0.3 * h.roll(1, 0))
        return out


def both_ways(logits: Tensor, y: Tensor) -> Tensor:
    same = torch.arange(len(y))
    return (F.cross_entropy(logits, same, reduction="none") + F.cross_entropy(logits.T, same, reduction="none")) / 2


@pytest.mark.parametrize("kind", [Temperature, Mixup])
def test_gradients_of_losses_whose_samples_were_lost(kind: type[nn.Module]) -> None:
    """They are differentiated one by one, so it doesn't matter where the samples of a layer are."""
    torch.manual_seed(0)
    model, (x, y) = kind().double(), batch()
    parameters = dict(model.named_parameters())
    with persample.extend(model) as recorder:
        losses = both_ways(model(x), y) if kind is Temperature else losses_of(model, x, y)
        G = recorder.gradients(losses, coupled="loss")
        rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
        with pytest.raises(persample.PersampleError):
            recorder.gradients(losses)
        with pytest.raises(persample.LossError, match=r"gradients\(\) needs \[N\] losses"):
            recorder.gradients(model(x).flatten(), coupled="loss")
    for name, *grads in zip(parameters, *rows, strict=True):
        torch.testing.assert_close(G[name], torch.stack(grads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupled", [None, "loss", "copy"])
def test_hooks_on_parameters_are_refused_whatever_is_asked_for(coupled: Any) -> None:
    model, (x, y) = net(), batch()
    hook = model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    with persample.extend(model) as recorder:
        losses = losses_of(model, x, y)
        with pytest.raises(persample.CaptureError, match=r"parameter '0\.weight' has a hook"):
            recorder.gradients(losses, coupled=coupled)
        hook.remove()
        G = recorder.gradients(losses, coupled=coupled)
        (g,) = torch.autograd.grad(losses[1], model[0].weight)
    assert close(G["0.weight"][1], g)


def by_losses(losses: Tensor, model: nn.Module) -> Tensor:
    """The rows ``[N, P]`` by N backward passes."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


LATER: dict[str, Any] = {
    "weighted": lambda outputs, losses: losses * losses.softmax(0),
    "normalised": lambda outputs, losses: losses / losses.mean(),
    "contrastive": lambda outputs, losses: losses + (outputs @ outputs.T).logsumexp(1),
    "sorted": lambda outputs, losses: losses.sort().values,
    "flipped": lambda outputs, losses: losses.flip(0),
}


@pytest.mark.parametrize("later", LATER)
def test_losses_outside_of_a_with_block_are_verified_when_they_change(later: str) -> None:
    model, (x, y) = net(), batch()
    recorder = persample.extend(model)
    for _ in range(2):  # also where others are verified by now
        losses = losses_of(model, x, y)
        assert close(recorder.gradients(losses).flat(), by_losses(losses, model))
        outputs = model(x)
        with pytest.raises(persample.VerificationError):
            recorder.gradients(LATER[later](outputs, F.cross_entropy(outputs, y, reduction="none")))
    recorder.remove()


def test_losses_of_another_axis_are_verified_outside_of_a_with_block() -> None:
    """The same functions, of the columns where they were of the rows."""
    model, (x, _), targets = net(), batch(), torch.arange(float(N), dtype=torch.float64)
    recorder = persample.extend(model)
    recorder.gradients((model(x)[:, :1] - targets).square().mean(1))
    with pytest.raises(persample.VerificationError):
        recorder.gradients((model(x)[:, :1] - targets).square().mean(0))
    recorder.remove()


class Switched(nn.Module):
    """Later in training, it calls another function between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.later = net(), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        out: Tensor = self.net[2](h.sigmoid() if self.later else h.tanh())
        return out


def test_a_forward_that_changes_is_another_one_outside_of_a_with_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y), held = Switched(), batch(), list[int]()
    monkeypatch.setattr(persample.recorder.Recorder, "_hold", lambda self, losses, asked, n, rows: held.append(n))
    recorder = persample.extend(model)
    for later in (False, False, True, True, False):
        model.later = later
        recorder.gradients(losses_of(model, x, y))
    recorder.remove()
    assert len(held) == 2  # once for each of the two


class Drifting(nn.Module):
    """Its centres follow the mean of the batch, before they are used."""

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8).double()
        self.register_buffer("centres", torch.randn(5, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        with torch.no_grad():
            self.centres = self.centres.lerp(h.mean(0).expand(5, -1), 0.5)
        return h @ self.centres.T


@pytest.mark.parametrize("inside", [False, True])
def test_coupled_rows_say_so_wherever_the_losses_are_given(inside: bool) -> None:
    model, (x, y) = Drifting(), batch()
    optimizer = persample.optim.ClippedSGD(model.named_parameters(), lr=0.1, max_norm=1.0)
    recorder = persample.extend(model)
    if inside:
        recorder.__enter__()
    G = recorder.gradients(losses_of(model, x, y), quantities=[("clip", {"max_norm": 1.0})])
    recorder.remove() if not inside else recorder.__exit__(None, None, None)
    assert "batch-coupled" in G.note
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(persample.BatchCoupledError):
        optimizer.step(G)
    assert all(map(torch.equal, before, model.parameters()))


class Critic(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(6, 8).double(), nn.Linear(8, 1).double(), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.act(self.a(x))).squeeze(1)
        return out


@pytest.mark.parametrize("act", [torch.tanh, F.relu])
@pytest.mark.parametrize("order", ["penalty last", "penalty first"])
def test_a_backward_with_a_penalty_on_gradients_is_not_reported_without_it(act: Any, order: str) -> None:
    """As the critic of a Wasserstein GAN has one."""
    model, (x, _), got = Critic(act), batch(), list[persample.Gradients]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    between = (x / 2).requires_grad_()
    scores = model(x) if order == "penalty last" else None
    (g,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    scores = model(x) if scores is None else scores
    before = len(got)
    with pytest.warns(UserWarning, match="create_graph=True"):
        (scores.mean() + (g.norm(2, 1) - 1).square().mean()).backward()
    assert len(got) == before
    losses = model(x)
    losses.mean().backward()  # the next one is reported as ever
    handle.remove()
    assert len(got) == before + 1 and close(got[-1].flat(), by_losses(model(x), model))


class Recomputing(nn.Module):
    """A checkpoint that hides the calls inside it, and an output that pytrees don't know."""

    def __init__(self, wrap: Any, reentrant: bool) -> None:
        super().__init__()
        self.net, self.wrap, self.reentrant = net(), wrap, reentrant
        self.net[1] = nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        h = torch.utils.checkpoint.checkpoint(self.net[1:], self.net[0](x), use_reentrant=self.reentrant)
        return self.wrap(logits=h)


@pytest.mark.parametrize("wrap", [torch.distributions.Categorical, types.SimpleNamespace])
def test_checkpoints_behind_outputs_that_are_no_pytrees(wrap: Any) -> None:
    (x, y), got = batch(), list[persample.Gradients]()
    for reentrant in (True, False):
        model = Recomputing(wrap, reentrant).double()
        handle = persample.extend(model, on_backward=got.append, reduction="mean")
        loss = F.cross_entropy(model(x).logits, y)
        if reentrant:
            with pytest.raises(persample.CaptureError, match="use_reentrant=True"):
                loss.backward()
            assert not got
        else:
            loss.backward()
        handle.remove()
    reference = by_losses(F.cross_entropy(model(x).logits, y, reduction="none"), model)
    assert len(got) == 1 and not got[0].unused and close(got[0].flat(), reference)


@pytest.mark.parametrize("listens", [False, True])
def test_outputs_are_those_of_the_losses_whatever_runs_without_grad(listens: bool) -> None:
    model, (x, y), got = net(), batch(), list[Any]()
    told: dict[str, Any] = {"on_backward": got.append, "reduction": "mean"} if listens else {}
    with persample.extend(model, **told) as recorder:
        outputs = model(x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(x + 1)
        losses = F.cross_entropy(outputs, y, reduction="none")
        if listens:
            losses.mean().backward()
        else:
            got.append(recorder.gradients(losses))
    assert torch.equal(got[0].outputs, outputs) and not got[0].outputs.requires_grad


class Disabling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        torch.set_grad_enabled(False)
        return out


def test_a_forward_that_turns_gradients_off_ends_its_recording() -> None:
    model, (x, y), got = Disabling(), batch(), list[persample.Gradients]()
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    outputs = model(x)
    torch.set_grad_enabled(True)
    assert not torch.overrides._get_current_function_mode_stack()
    F.cross_entropy(outputs, y, reduction="sum").backward()
    handle.remove()
    assert len(got) == 1 and torch.equal(got[0].outputs, outputs)


def test_a_discriminator_whose_parameters_behind_batch_norm_are_asked_for() -> None:
    """Frozen in the step of the generator, which goes through the batch's statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    x, fake, got = batch()[0], torch.randn(N, 6, dtype=torch.float64, requires_grad=True), list[Any]()
    handle = persample.extend(model, params=r"3\.", on_backward=got.append, reduction="mean")
    for step in range(1, 3):
        model(x).square().mean().backward()
        assert len(got) == step
        model.requires_grad_(False)
        model(fake).mean().backward()
        model.requires_grad_(True)
        assert len(got) == step and fake.grad is not None
    handle.remove()
    losses = model(x).square().flatten()
    rows = by_losses(losses, model[3])
    assert close(got[0].flat(), rows) and close(got[1].flat(), rows)


class Steps(nn.Module):
    """A recurrent layer, or a cell, of which not every output acts in the losses."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        cell = kind.endswith("Cell")
        self.cell = getattr(nn, kind)(3, 5) if cell else getattr(nn, kind)(3, 5, num_layers=2, batch_first=True)
        self.head, self.steps = nn.Linear(5, 5), cell

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.steps:
            out = self.head(self.cell(x.view(-1, 2, 3))[0][:, -1])
            return out
        h = self.cell(x[:, :3])
        h = self.cell(x[:, 3:], h)
        out = self.head(h[0] if isinstance(h, tuple) else h)
        return out


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell"])
def test_an_optimizer_that_steps_inside_the_backward(kind: str) -> None:
    """As recurrent layers are read when all of a backward has come to them, and not only at its end."""
    model, (x, y), got = Steps(kind).double(), batch(), list[persample.Gradients]()

    def descend(p: Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.sub_(p.grad, alpha=0.1)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(descend)
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    for step in range(2):
        before = copy.deepcopy(model)
        losses_of(model, x, y).mean().backward()
        assert not close(model.head.bias, before.head.bias)
        assert not got[step].unused and close(got[step].flat(), by_losses(losses_of(before, x, y), before))
    handle.remove()


@torch.overrides.wrap_torch_function(lambda x, a, b: (x, a, b))
def paired(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (x @ a).tanh(), (x @ b).sin()


class Paired(nn.Module):
    """A function with two outputs, each of a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second = paired(x, self.a, self.b)
        return first * 2 + second.exp()


def test_a_backward_that_comes_to_one_parameter_before_the_other_output() -> None:
    model, (x, y), got = Paired().double(), batch(), list[persample.Gradients]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    losses_of(model, x, y).mean().backward()
    handle.remove()
    assert len(got) == 1 and close(got[0].flat(), by_losses(losses_of(model, x, y), model))


@pytest.mark.parametrize("how", ["handle", "recorder", "with"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: torch.optim.swa_utils.AveragedModel(m).module,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["deepcopy", "averaged", "pickle"],
)
def test_a_model_that_refers_to_its_recorder_can_be_copied(copied: Any, how: str) -> None:
    model, (x, y), got = Switched(), batch(), list[persample.Gradients]()
    told: dict[str, Any] = {"on_backward": got.append, "reduction": "mean"} if how == "handle" else {}
    recorder = persample.extend(model, **told)
    model.recorder = recorder
    if how == "with":
        recorder.__enter__()
    other = copied(model)
    assert other.recorder is None and model.recorder is recorder
    losses = losses_of(model, x, y)
    if how == "handle":
        losses.mean().backward()
    else:
        got.append(recorder.gradients(losses))
    recorder.__exit__(None, None, None)
    assert torch.equal(other(x), model(x)) and no_hooks(other) and no_hooks(model)
    assert close(got[0].flat(), by_losses(losses_of(other, x, y), other))


def test_a_handle_keeps_nothing_of_what_it_has_reported() -> None:
    model, (x, y), refs = net(), batch(), list[Any]()

    def report(G: Any) -> None:
        refs.extend(weakref.ref(t) for factors in G.factors.values() for t in tensors(factors))

    handle = persample.extend(model, on_backward=report, reduction="mean")
    losses_of(model, x, y).mean().backward()
    gc.collect()
    assert len(refs) >= 4 and not [ref for ref in refs if ref() is not None]
    handle.remove()


def test_a_handle_keeps_nothing_of_a_backward_that_raised() -> None:
    model, (x, y), got = net(), batch(n=77), list[persample.Gradients]()

    def fail(g: Tensor) -> None:
        raise ZeroDivisionError

    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    failing = model[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    loss = losses_of(model, x, y).mean()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    failing.remove()
    del loss
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (77, 8)]  # activations
    losses_of(model, x, y).mean().backward()
    handle.remove()
    assert len(got) == 1 and close(got[0].flat(), by_losses(losses_of(model, x, y), model))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.mixes = nn.GRUCell(6, 5).double(), False

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h * h.mean() if self.mixes else h)
        return h, h + x[:, :5]


class Counted(list[Any]):
    seen = 0

    def __iter__(self) -> Any:
        self.seen += len(self)
        return super().__iter__()


@pytest.mark.parametrize("inside", [False, True])
def test_steps_of_a_cell_are_looked_at_once(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a state has all steps before in it, which were found in order then."""
    model, (x, y), got = Cell(), batch(), list[persample.Gradients]()
    visits, look = list[Any](), calls.metadata
    monkeypatch.setattr(calls, "metadata", lambda node: visits.append(node) or look(node))
    recorder = persample.extend(model, on_backward=got.append, reduction="mean")
    listener = recorder._listener
    assert listener is not None
    if inside:
        recorder.__enter__()
        assert recorder._capture is not None
        kept = listener.running = recorder._capture.recorded = Counted()
    else:
        kept = listener._calls = Counted()
    h, counts = torch.zeros(N, 5, dtype=torch.float64), list[int]()
    for _ in range(60):
        before = len(visits)
        h, _ = model(x, h)
        counts.append(len(visits) - before)
    assert 0 < max(counts[2:]) == min(counts[2:]) < 20 and 0 < kept.seen < 3 * 60
    losses = F.cross_entropy(h, y, reduction="none")
    losses.mean().backward(retain_graph=True)
    recorder.__exit__(None, None, None)
    assert len(got) == 1 and close(got[0].flat(), by_losses(losses, model))


def test_steps_of_a_cell_are_checked_whatever_came_before() -> None:
    model, (x, _) = Cell(), batch()
    handle = persample.extend(model, on_backward=lambda G: None, reduction="mean")
    start = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def steps() -> Tensor:
        h = torch.zeros(N, 5, dtype=torch.float64) + start
        for _ in range(3):
            h, _ = model(x, h)
        return h

    h = steps()
    with pytest.raises(persample.CaptureError, match=r"cell\.weight_hh"):  # in between, where nobody records
        model(x, h * model.cell.weight_hh.mean())
    model.mixes = True
    with pytest.raises(persample.BatchCoupledError):
        model(x, h)
    model.mixes = False
    model(x, h)
    model.start = start  # which becomes a parameter after it was used
    with pytest.raises(persample.CaptureError, match="'start'"):
        model(x, h)
    handle.remove()


class Parallel(nn.Module):
    """One state of two mixes samples, which matters to those who go on with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).tanh(), self.second(x) * self.second(x).mean(0)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_state_that_mixes_samples_is_told_from_another(mixed: bool) -> None:
    model, (x, _), got = Parallel(), batch(), list[persample.Gradients]()
    handle = persample.extend(model, params="first", on_backward=got.append, reduction="mean")
    model(model(x)[1])  # nothing that is asked for is coupled
    handle.remove()
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    state = model(x)[mixed]
    if mixed:
        with pytest.raises(persample.BatchCoupledError):
            model(state)
    else:
        model(state)[0].mean().backward()
        rows = torch.cat([g.flatten() for g in torch.autograd.grad(model(model(x)[0])[0].mean(), model.first.weight)])
        assert len(got) == 2 and close(got[0].mean()["first.weight"].flatten(), rows)
    handle.remove()
