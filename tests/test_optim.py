"""Optimizers against torch's own, and against direct formulas on the rows of the loop engine."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import persample
from persample import optim, statistics
from persample.batchnorm.coupling import coupling
from persample.errors import ArgumentError, BatchCoupledError, EmptyBatchError, QuantityError, UnknownParameterError
from persample.factors import Dense

N = 6
HUGE = 1e6


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()


def batch(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def grads(net: nn.Module, seed: int = 0, n: int = N, **options: Any) -> Any:
    return persample.gradients(net, nn.CrossEntropyLoss(), *batch(seed, n), **options)


def flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in values])


def moved(net: nn.Module, make: Callable[..., Optimizer], **options: Any) -> tuple[Tensor, Tensor]:
    """The rows ``J`` of the loop engine before one step, and minus the change that it makes."""
    J = grads(net, engine="loop").flat()
    before = flat(net.parameters())
    make(net.named_parameters(), **options).step(grads(net))  # type: ignore[arg-type]
    return J, before - flat(net.parameters())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
PLAIN: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "ClippedSGD": (optim.ClippedSGD, torch.optim.SGD, SGD, {"max_norm": HUGE}),
    "ClippedSGD nesterov": (optim.ClippedSGD, torch.optim.SGD, {**SGD, "nesterov": True}, {"max_norm": HUGE}),
    "ClippedSGD without momentum": (optim.ClippedSGD, torch.optim.SGD, {"lr": 0.1}, {"max_norm": HUGE}),
    "ClippedAdam": (optim.ClippedAdam, torch.optim.AdamW, ADAM, {"max_norm": HUGE}),
    "PerSampleAdam": (optim.PerSampleAdam, torch.optim.AdamW, ADAM, {"group_size": None}),
    "GradientSurgery": (
        optim.GradientSurgery,
        torch.optim.SGD,
        SGD,
        {"weighting": lambda K: torch.full_like(K[0], 1 / len(K))},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_like_its_plain_counterpart(name: str) -> None:
    """Without clipping, noise, grouping or surgery, ten steps are those of torch's optimizer; under a schedule too."""
    ours, theirs, options, extra = PLAIN[name]
    a, b = model(), model()
    mine, plain = ours(a.named_parameters(), **options, **extra), theirs(b.parameters(), **options)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (mine, plain)]
    for step in range(10):
        mine.step(grads(a, step))
        plain.zero_grad()
        nn.CrossEntropyLoss()(b(batch(step)[0]), batch(step)[1]).backward()
        plain.step()
        for schedule in schedules:
            schedule.step()
    close(flat(a.parameters()), flat(b.parameters()))
    assert all(p.grad is None for p in a.parameters())


def complex_problem() -> tuple[nn.Module, Callable[..., Tensor], Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2, dtype=torch.complex128)
    return net, lambda out, _: out.abs().square().sum(1), torch.randn(N, 3, dtype=torch.complex128)


@pytest.mark.parametrize("name", PLAIN)
def test_like_its_plain_counterpart_in_complex_numbers(name: str) -> None:
    ours, theirs, options, extra = PLAIN[name]
    a, loss, x = complex_problem()
    b = copy.deepcopy(a)
    mine, plain = ours(a.named_parameters(), **options, **extra), theirs(b.parameters(), **options)
    for _ in range(4):
        mine.step(persample.gradients(a, loss, x))
        plain.zero_grad()
        loss(b(x), None).mean().backward()
        plain.step()
    close(flat(a.parameters()), flat(b.parameters()))


EVERY: dict[str, Callable[[nn.Module], Any]] = {
    "ClippedSGD": lambda m: optim.ClippedSGD(m.named_parameters(), max_norm=0.1, momentum=0.9),
    "ClippedAdam": lambda m: optim.ClippedAdam(m.named_parameters(), max_norm=0.1),
    "PerSampleAdam": lambda m: optim.PerSampleAdam(m.named_parameters(), group_size=2),
    "NaturalGradient": lambda m: optim.NaturalGradient(m.named_parameters(), momentum=0.5, nesterov=True),
    "GradientSurgery": lambda m: optim.GradientSurgery(m.named_parameters(), momentum=0.9),
}


@pytest.mark.parametrize("name", EVERY)
def test_state_dict(name: str) -> None:
    """Stopped after three steps, saved, loaded and continued: exactly the same."""
    a = model()
    opt = EVERY[name](a)
    for step in range(3):
        opt.step(grads(a, step))
    b, file = copy.deepcopy(a), io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = EVERY[name](b)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        opt.step(grads(a, step))
        again.step(grads(b, step))
    close(flat(a.parameters()), flat(b.parameters()), 0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", EVERY)
def test_a_copy_together_with_the_model_goes_on_alike(name: str, copied: Callable[[Any], Any]) -> None:
    """Copied in the middle of training, under a schedule (which patches ``step``): the same steps, of the copy only."""
    a = model()
    opt = EVERY[name](a)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    for step in range(3):
        opt.step(grads(a, step))
        schedule.step()
    b, again = copied((a, opt))
    assert again.param_groups[0]["params"][0] is b[0].weight
    before = flat(a.parameters())
    for step in range(3, 6):
        again.step(grads(b, step))
    close(flat(a.parameters()), before, 0)
    for step in range(3, 6):
        opt.step(grads(a, step))
    close(flat(a.parameters()), flat(b.parameters()), 0)
    assert not torch.equal(flat(a.parameters()), before)


def test_a_copy_draws_the_noise_that_the_original_would_draw() -> None:
    net = model()
    opt = optim.ClippedSGD(
        net.named_parameters(), max_norm=1, noise_multiplier=1, generator=torch.Generator().manual_seed(1)
    )
    opt.step(grads(net))
    for b, again in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))):
        a, once = copy.deepcopy((net, opt))
        again.step(grads(b))
        once.step(grads(a))
        close(flat(a.parameters()), flat(b.parameters()), 0)


def square(reverse: bool) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """A model of parameters of one shape, and these in an order or the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    pairs = list(net.named_parameters())
    return net, pairs[::-1] if reverse else pairs


ORDERED: dict[str, Callable[..., Any]] = {
    "ClippedSGD": lambda p: optim.ClippedSGD(p, max_norm=0.1, momentum=0.9),
    "ClippedAdam": lambda p: optim.ClippedAdam(p, max_norm=0.1),
    "PerSampleAdam": lambda p: optim.PerSampleAdam(p, group_size=2),
    "NaturalGradient": lambda p: optim.NaturalGradient(p, momentum=0.5),
    "GradientSurgery": lambda p: optim.GradientSurgery(p, momentum=0.9),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ORDERED)
def test_states_are_loaded_by_name(name: str, groups: int) -> None:
    """Loaded into an optimizer with the parameters in another order: the same trajectory."""

    def make(pairs: list[tuple[str, nn.Parameter]]) -> Any:
        bias, weight = (sorted((p for p in pairs if p[0].endswith(end)), key=pairs.index) for end in ("bias", "weight"))
        return ORDERED[name](pairs if groups == 1 else [{"params": weight, "lr": 0.05}, {"params": bias}])

    a, pairs = square(False)
    opt = make(pairs)
    for step in range(3):
        opt.step(grads(a, step))
    b, backwards = square(True)
    b.load_state_dict(a.state_dict())
    again = make(backwards)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch would share what it holds
    for group in again.param_groups:
        assert all(
            dict(b.named_parameters())[n] is p for n, p in zip(group["param_names"], group["params"], strict=True)
        )
    for step in range(3, 6):
        opt.step(grads(a, step))
        again.step(grads(b, step))
    close(flat(a.parameters()), flat(b.parameters()), 0)


def test_states_of_other_parameters_are_refused() -> None:
    net, pairs = square(False)
    opt = ORDERED["ClippedAdam"](pairs)
    opt.step(grads(net))
    saved = copy.deepcopy(opt.state_dict())
    other = ORDERED["ClippedAdam"]([(f"module.{name}", p) for name, p in pairs])
    with pytest.raises(
        UnknownParameterError, match=r"group 0 of the saved state has parameter '1\.bias', .*param_names"
    ):
        other.load_state_dict(saved)
    split = ORDERED["ClippedAdam"]([{"params": pairs[:2]}, {"params": pairs[2:]}])
    swapped = ORDERED["ClippedAdam"]([{"params": pairs[2:]}, {"params": pairs[:2]}])
    with pytest.raises(UnknownParameterError, match="group 0 of the saved state"):
        swapped.load_state_dict(split.state_dict())
    with pytest.raises(ValueError, match="number of parameter groups"):
        split.load_state_dict(saved)
    # the way out: by position, and names stay those of the parameters
    for group in saved["param_groups"]:
        del group["param_names"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"][0] == "module.1.weight"
    assert torch.equal(other.state[pairs[0][1]]["exp_avg"], opt.state[pairs[0][1]]["exp_avg"])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_states_of_other_shapes_are_refused(name: str, named: bool) -> None:
    """When they are loaded, not in the middle of a step."""
    a, b = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, k)).double() for k in (2, 5))
    x, y = torch.randn(N, 4).double(), torch.zeros(N, dtype=torch.int64)
    one, other = EVERY[name](a), EVERY[name](b)
    other.step(persample.gradients(b, nn.CrossEntropyLoss(), x, y))
    saved = copy.deepcopy(other.state_dict())
    if not named:
        for group in saved["param_groups"]:
            del group["param_names"]
    with pytest.raises(UnknownParameterError, match=r"parameter '1\.weight' has shape \[5, 3\] .* is \[2, 3\]"):
        one.load_state_dict(saved)
    assert not one.state
    one.step(persample.gradients(a, nn.CrossEntropyLoss(), x, y))


def test_a_state_of_older_versions_without_a_momentum() -> None:
    net = model()
    opt = EVERY["ClippedSGD"](net)
    saved = opt.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(4)}
    opt.load_state_dict(saved)
    opt.step(grads(net))
    assert all(state["momentum_buffer"].isfinite().all() for state in opt.state.values())


def test_a_hook_may_rename_what_is_loaded() -> None:
    net, pairs = square(False)
    opt = ORDERED["ClippedSGD"](pairs)
    opt.step(grads(net))
    again = ORDERED["ClippedSGD"]([(f"module.{name}", p) for name, p in pairs[::-1]])

    def rename(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**g, "param_names": [f"module.{n}" for n in g["param_names"]]} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    again.register_load_state_dict_pre_hook(rename)
    again.load_state_dict(opt.state_dict())
    for _, p in pairs:
        assert torch.equal(again.state[p]["momentum_buffer"], opt.state[p]["momentum_buffer"])


TORCH: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ClippedSGD": (torch.optim.SGD, lambda p: optim.ClippedSGD(p, max_norm=HUGE)),
    "ClippedAdam": (torch.optim.AdamW, lambda p: optim.ClippedAdam(p, max_norm=HUGE)),
    "PerSampleAdam": (torch.optim.AdamW, lambda p: optim.PerSampleAdam(p, group_size=None)),
}


def train(net: nn.Module, opt: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        opt.zero_grad()
        nn.CrossEntropyLoss()(net(batch(step)[0]), batch(step)[1]).backward()
        opt.step()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_states_of_torch_are_gone_on_with(name: str, named: bool) -> None:
    """In full precision, though torch counts steps in single; and the count of the other optimizer stays its own."""
    theirs, ours = TORCH[name]
    a = model()
    options = {"lr": 0.01, "weight_decay": 0.1, "foreach": True} | ({"momentum": 0.9} if name == "ClippedSGD" else {})
    plain = theirs(a.named_parameters() if named else a.parameters(), **options)
    train(a, plain, range(3))
    b = copy.deepcopy(a)
    mine = ours(b.named_parameters())
    mine.load_state_dict(plain.state_dict())
    again = ours(b.named_parameters())
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    if name != "ClippedSGD":
        mine.step(grads(copy.deepcopy(b)))
        assert all(state["step"] == 3 for state in plain.state.values())
    b.load_state_dict(a.state_dict())
    plain.load_state_dict(copy.deepcopy(again.state_dict()))
    train(a, plain, range(3, 6))
    for step in range(3, 6):
        again.step(grads(b, step))
    close(flat(a.parameters()), flat(b.parameters()), 1e-13)
    again.add_param_group({"params": [("other", nn.Parameter(torch.zeros(1)))]})  # the unused options do no harm
    assert len(again.param_groups) == 2


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "ClippedSGD", "maximize=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "ClippedSGD", "dampening=0.5"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "ClippedAdam", "amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "PerSampleAdam", "differentiable=True"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "PerSampleAdam", "decoupled_weight_decay=False"),
        (lambda p: torch.optim.NAdam(p), "ClippedAdam", "no option 'momentum_decay'"),
        (lambda p: torch.optim.RMSprop(p), "NaturalGradient", "no option 'nesterov'"),
        (lambda p: torch.optim.SGD(p), "ClippedAdam", "no option 'betas', which ClippedAdam needs"),
    ],
)
def test_states_that_say_something_else_are_refused(theirs: Callable[..., Any], ours: str, message: str) -> None:
    net = model()
    opt = EVERY[ours](net)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ArgumentError, match=message):
        opt.load_state_dict(theirs(model().parameters()).state_dict())
    assert opt.state_dict() == before
    opt.step(grads(net))


def test_a_state_of_adam_without_weight_decay_is_that_of_adamw() -> None:
    opt = EVERY["ClippedAdam"](model())
    opt.load_state_dict(torch.optim.Adam(model().parameters(), lr=0.5).state_dict())
    assert opt.param_groups[0]["lr"] == 0.5


def test_groups_are_added_under_a_schedule() -> None:
    """Which keeps numbers of its own in the groups: they may be loaded too."""
    net = model()
    opt = optim.ClippedSGD(net[3].named_parameters(prefix="3"), max_norm=1.0, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9)
    opt.add_param_group({"params": net[0].named_parameters(prefix="0")})
    opt.load_state_dict(opt.state_dict())
    before = flat(net.parameters())
    opt.step(grads(net))
    assert len(opt.param_groups) == 2 and not torch.equal(before, flat(net.parameters()))


@pytest.mark.parametrize("name", EVERY)
def test_parameters_of_a_compiled_model(name: str) -> None:
    """Named with a prefix by it, and without by `gradients`: the steps and the states are those of the model."""
    a, b = model(), model()
    cover = torch.compile(b, backend="eager")
    plain, compiled = EVERY[name](a), EVERY[name](cover)  # type: ignore[arg-type]
    plain.step(grads(a))
    compiled.step(grads(cover))  # type: ignore[arg-type]
    x, y = batch(1)
    with persample.extend(cover) as recorder:  # type: ignore[arg-type]
        compiled.step(recorder.gradients(nn.functional.cross_entropy(cover(x), y, reduction="none")))
    plain.step(grads(a, 1))
    close(flat(a.parameters()), flat(b.parameters()))
    saved = copy.deepcopy(plain.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [f"_orig_mod.{n}" for n in group["param_names"]]
    compiled.load_state_dict(saved)
    assert compiled.param_groups[0]["param_names"] == plain.param_groups[0]["param_names"]


def test_names_are_of_one_parameter_each() -> None:
    (a, first), (_, second) = square(False), square(False)
    opt = ORDERED["ClippedSGD"](first)
    for add in (lambda: ORDERED["ClippedSGD"](first + second), lambda: opt.add_param_group({"params": second})):
        with pytest.raises(ValueError, match=r"'1\.weight' is the name of two parameters"):
            add()
    assert len(opt.param_groups) == 1
    opt.step(grads(a))


@pytest.mark.parametrize("name", EVERY)
def test_groups_hooks_and_frozen_parameters(name: str) -> None:
    """Options per group, a frozen parameter that stays, hooks that fire once per step."""
    net = model()
    net[0].requires_grad_(False)
    opt = EVERY[name](net)
    head = [pair for pair in net.named_parameters() if pair[0].startswith("3")]
    assert opt.param_groups[0]["param_names"][-1] == "3.bias"
    opt.param_groups[0]["params"], opt.param_groups[0]["param_names"] = [head[0][1]], [head[0][0]]
    opt.add_param_group({"params": [head[1]], "lr": 0.0})
    fired: list[int] = []
    opt.register_step_pre_hook(lambda *_: fired.append(1))
    before = copy.deepcopy(net)
    opt.step(grads(net))
    assert fired == [1]
    close(flat(before[0].parameters()), flat(net[0].parameters()), 0)
    close(before[3].bias, net[3].bias, 0)
    assert not torch.equal(before[3].weight, net[3].weight)


def test_parameters_need_names_and_must_agree() -> None:
    net = model()
    with pytest.raises(ValueError, match="named_parameters"):
        optim.ClippedSGD(net.parameters(), max_norm=1)
    opt = optim.ClippedSGD(net.named_parameters(), max_norm=1)
    with pytest.raises(UnknownParameterError, match=r"'0\.bias': the gradients don't have it"):
        opt.step(grads(net, params="3"))
    head = optim.ClippedSGD([p for p in net.named_parameters() if p[0].startswith("3")], max_norm=1)
    with pytest.raises(UnknownParameterError, match=r"'0\.bias': the optimizer doesn't hold it"):
        head.step(grads(net))
    head.step(grads(net).select("3"))
    other = persample.Gradients(
        {name: Dense(torch.zeros(2, 1)) for name in opt.param_groups[0]["param_names"]}, torch.zeros(2)
    )
    with pytest.raises(UnknownParameterError, match="different models"):
        opt.step(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.ClippedSGD(p, max_norm=0.0),
        lambda p: optim.ClippedSGD(p, max_norm=1.0, lr=-1.0),
        lambda p: optim.ClippedAdam(p, max_norm=1.0, noise_multiplier=-1.0),
        lambda p: optim.ClippedAdam(p, max_norm=1.0, expected_batch_size=0),
        lambda p: optim.PerSampleAdam(p, group_size=0),
        lambda p: optim.ClippedAdam(p, max_norm=1.0, betas=(1.5, 0.9)),
        lambda p: optim.ClippedSGD(p, max_norm=1.0, nesterov=True),
        lambda p: optim.ClippedSGD([{"params": list(p), "lr": -1.0}], max_norm=1.0),
        lambda p: optim.ClippedSGD([{"params": list(p), "max_norm": 0.1}], max_norm=1.0),
        lambda p: optim.ClippedSGD([{"params": list(p), "maximize": True}], max_norm=1.0),
        lambda p: optim.PerSampleAdam(p, group_size=2.5),  # type: ignore[arg-type]
        lambda p: optim.PerSampleAdam(p, betas=(0.9, 1.0)),
        lambda p: optim.PerSampleAdam(p, betas=(1.0, 0.9)),
        lambda p: optim.PerSampleAdam(p, betas=(0.9, 1.5)),
        lambda p: optim.PerSampleAdam(p, betas=(0.9, torch.nan)),
        lambda p: optim.PerSampleAdam(p, betas=0.9),  # type: ignore[arg-type]
        lambda p: optim.NaturalGradient(p, nesterov=True),
        lambda p: optim.NaturalGradient(p, damping=-1.0),
        lambda p: optim.NaturalGradient(p, damping=torch.inf),
        lambda p: optim.GradientSurgery(p, nesterov=True),
        lambda p: optim.GradientSurgery(p, weighting="pcgrad"),  # type: ignore[arg-type]
        lambda p: optim.ClippedSGD(p, max_norm="1"),  # type: ignore[arg-type]
        lambda p: optim.ClippedSGD(p, max_norm=torch.nan),
        lambda p: optim.ClippedSGD(p, max_norm=torch.inf, noise_multiplier=1.0),
        lambda p: optim.ClippedAdam(p, max_norm=torch.tensor(torch.inf), noise_multiplier=1.0),  # type: ignore[arg-type]
        lambda p: optim.ClippedAdam(p, max_norm=1.0, noise_multiplier=torch.inf),
        lambda p: optim.ClippedAdam(p, max_norm=1.0, noise_multiplier="1"),  # type: ignore[arg-type]
        lambda p: optim.ClippedAdam(p, max_norm=1.0, expected_batch_size=torch.inf),
        lambda p: optim.ClippedAdam(p, max_norm=1.0, expected_batch_size="8"),  # type: ignore[arg-type]
        lambda p: optim.ClippedSGD(p, max_norm=1.0, lr="0.1"),  # type: ignore[arg-type]
        lambda p: optim.ClippedSGD(p, max_norm=1.0, lr=torch.inf),
        lambda p: optim.ClippedSGD(p, max_norm=1.0, momentum=None),  # type: ignore[arg-type]
        lambda p: optim.PerSampleAdam(p, betas=("0.9", 0.9)),  # type: ignore[arg-type]
    ],
)
def test_options_are_checked(make: Callable[[Any], Optimizer]) -> None:
    with pytest.raises(ArgumentError, match=r"must be|momentum > 0|no option 'max(_norm|imize)'"):
        make(model().named_parameters())


@pytest.mark.parametrize("make", [EVERY["ClippedAdam"], EVERY["PerSampleAdam"]])
def test_options_of_groups_are_checked(make: Callable[[nn.Module], Any]) -> None:
    opt = make(model())
    with pytest.raises(ArgumentError, match="betas must be two numbers"):
        opt.add_param_group({"params": [("other", nn.Parameter(torch.zeros(1)))], "betas": (2.0, 3.0)})
    assert len(opt.param_groups) == 1
    saved = opt.state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 1.0)
    with pytest.raises(ArgumentError, match="betas must be two numbers"):
        opt.load_state_dict(saved)


# ---- clipping ---------------------------------------------------------------------------------------------------


def clipped(J: Tensor, bound: float) -> Tensor:
    return (J * (bound / J.norm(dim=1)).clamp(max=1)[:, None]).sum(0)


def test_clipped_step() -> None:
    net = model()
    bound = float(grads(net).norm().median())
    J, step = moved(net, optim.ClippedSGD, lr=0.1, max_norm=bound, expected_batch_size=4)
    close(step, 0.1 * clipped(J, bound) / 4)


def test_clipped_step_of_a_statistics_run_and_of_pieces() -> None:
    nets = [model() for _ in range(3)]
    bound = float(grads(nets[0]).norm().median())
    whole, lean, pieces = (optim.ClippedSGD(net.named_parameters(), lr=0.1, max_norm=bound) for net in nets)
    whole.step(grads(nets[0]))
    lean.step(grads(nets[1], quantities=[("clip", {"max_norm": bound})]))
    x, y = batch()
    parts = [persample.gradients(nets[2], nn.CrossEntropyLoss(), x[i], y[i]) for i in (slice(2), slice(2, None))]
    pieces.step(parts)
    close(flat(nets[0].parameters()), flat(nets[1].parameters()))
    close(flat(nets[0].parameters()), flat(nets[2].parameters()))
    with pytest.raises(
        QuantityError, match=rf"clipped at {2 * bound}.*max_norm={bound} is asked for.*by the optimizer"
    ):
        lean.step(grads(nets[1], quantities=[("clip", {"max_norm": 2 * bound})]))


@pytest.mark.parametrize("make", [optim.ClippedSGD, optim.ClippedAdam])
def test_noise(make: Callable[..., Any]) -> None:
    """Standard deviation sigma C on the sum, reproducible from the generator, drawn once for a batch in pieces."""
    net = nn.Linear(40, 50, bias=False)
    x, y = torch.randn(3, 40), torch.randint(0, 50, (3,))
    G = persample.gradients(net, nn.CrossEntropyLoss(), x, y)
    seeds = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    options = {"max_norm": 0.5, "noise_multiplier": 2.0, "expected_batch_size": 10}
    opts = [make(copy.deepcopy(net).named_parameters(), **options, generator=seeds()) for _ in range(2)]
    found = [opt.clipping.gradient(G, opt)["weight"] for opt in opts]
    close(found[0], found[1], 0)
    noise = found[0] * 10 - G.clip(0.5)["weight"]
    assert abs(noise.std() / (2 * 0.5) - 1) < 0.05 and abs(noise.mean()) < 0.1
    empty = opts[0].clipping.gradient([], opts[0])["weight"]  # an empty Poisson batch is noise
    assert abs(10 * empty.std() - 1) < 0.05 and not torch.equal(empty, noise / 10)
    pieces = opts[0].clipping.gradient([G, G], opts[0])["weight"] * 10 - 2 * G.clip(0.5)["weight"]
    assert abs(pieces.std() - 1) < 0.05
    with pytest.raises(ValueError, match="expected_batch_size"):
        make(net.named_parameters(), max_norm=1.0).step([])


def test_noise_of_complex_parameters() -> None:
    """Of standard deviation sigma C in either part, as an entry is two real ones."""
    net = nn.Linear(50, 60, bias=False, dtype=torch.complex128)
    opt = optim.ClippedSGD(
        net.named_parameters(), lr=1.0, max_norm=0.5, noise_multiplier=4.0, expected_batch_size=1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    before = net.weight.detach().clone()
    opt.step([])
    real, imag = torch.view_as_real(net.weight.detach() - before).flatten(0, 1).T
    assert abs(real.std() / 2 - 1) < 0.05 and abs(imag.std() / 2 - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([real, imag]))[0, 1]) < 0.06


def test_coupled_samples_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 2, (5,))
    opts = [make(net.named_parameters(), max_norm=1.0) for make in (optim.ClippedSGD, optim.ClippedAdam)]
    before = flat(net.parameters())
    with pytest.raises(BatchCoupledError):
        persample.gradients(net, nn.CrossEntropyLoss(), x, y)
    for notion in ("influence", "loss", "copy", "frozen"):
        rows = coupling(net, nn.CrossEntropyLoss(), x, y).gradients(notion)
        for opt in opts:
            with pytest.raises(BatchCoupledError, match="clipping its own row bounds nothing"):
                opt.step(rows)  # type: ignore[arg-type]
    for how in ({}, {"quantities": [("clip", {"max_norm": 1.0})]}):
        with pytest.raises(BatchCoupledError, match="coupled='copy'"):
            opts[0].step(persample.gradients(net, nn.CrossEntropyLoss(), x, y, coupled="copy", **how))  # type: ignore[arg-type]
    close(flat(net.parameters()), before, 0)
    for how in ({}, {"quantities": [("clip", {"max_norm": 1.0})]}, {"verify": False}):
        opts[0].step(persample.gradients(net, nn.CrossEntropyLoss(), x, y, coupled="eval", **how))  # type: ignore[arg-type]
    net.eval()
    for opt in opts:
        opt.step(persample.gradients(net, nn.CrossEntropyLoss(), x, y))  # type: ignore[arg-type]
    assert not torch.equal(flat(net.parameters()), before)


def test_rows_behind_batch_statistics_are_refused() -> None:
    """They are right, but exchanging one sample moves all others: clipping bounds nothing."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    x, y = torch.randn(5, 4).double(), torch.randint(0, 2, (5,))
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    opt = optim.ClippedSGD(named, max_norm=1.0)
    with persample.extend(net) as recorder:
        recorded = recorder.gradients(nn.functional.cross_entropy(net(x), y, reduction="none"))
    got: list[Any] = []
    handle = persample.extend(net, on_backward=got.append, reduction="mean")
    nn.CrossEntropyLoss()(net(x), y).backward()
    handle.remove()
    asked = [("clip", {"max_norm": 1.0})]
    runs = [persample.gradients(net, nn.CrossEntropyLoss(), x, y, quantities=q) for q in (None, asked)]
    for G in (*runs, recorded, *got):
        with pytest.raises(BatchCoupledError, match=r"batch-coupled\): every sample"):
            opt.step(G)
        assert "batch-coupled" in repr(G)
    net[0].requires_grad_(True)
    with pytest.raises(BatchCoupledError):
        opt.step(persample.gradients(net, nn.CrossEntropyLoss(), x, y, params=r"[12]\."))
    net[1].eval()
    net[0].requires_grad_(False)
    opt.step(persample.gradients(net, nn.CrossEntropyLoss(), x, y))


def test_a_backward_of_two_forwards_is_coupled_by_either() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    x, got = torch.randn(5, 4).double(), list[Any]()
    handle = persample.extend(net, on_backward=got.append, reduction="mean")
    first, _ = net(x), net.eval()
    (first + net(x)).square().sum(1).mean().backward()
    net(x).square().sum(1).mean().backward()
    handle.remove()
    assert ["batch-coupled" in G.note for G in got] == [True, False]


def test_noise_of_the_model_is_no_coupling() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(len(x), self.out_features).to(x)

    net = Noisy(4, 2).double()
    G = persample.gradients(net, nn.CrossEntropyLoss(), torch.randn(5, 4).double(), torch.randint(0, 2, (5,)))
    assert G.note
    optim.ClippedSGD(net.named_parameters(), max_norm=1.0).step(G)


@pytest.mark.parametrize("name", EVERY)
def test_steps_of_no_sample_are_refused(name: str) -> None:
    net = model()
    G = grads(net)
    empty = persample.Gradients({n: Dense(G[n][:0]) for n in G.names}, torch.zeros(0))
    opt, before = EVERY[name](net), flat(net.parameters())
    with pytest.raises((ArgumentError, EmptyBatchError)):
        opt.step(empty)
    close(flat(net.parameters()), before, 0)
    assert not opt.state


def test_pieces_of_other_parameters() -> None:
    net = model()
    with pytest.raises(ValueError, match="same parameters"):
        optim.ClippedSGD(net.named_parameters(), max_norm=1.0).step([grads(net), grads(net, params="3")])


# ---- second moments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_second_moment_of_groups(size: int) -> None:
    net = model()
    J = grads(net, engine="loop").flat()
    expected = J.view(N // size, size, -1).mean(1).square().mean(0)
    close(flat(optim.group_second_moment(grads(net), size).values()), expected)
    b1, b2, lr, eps = 0.9, 0.99, 0.01, 1e-3
    J, step = moved(net, optim.PerSampleAdam, lr=lr, betas=(b1, b2), eps=eps, group_size=size)
    close(step, lr * J.mean(0) / (expected.sqrt() + eps))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_second_moment_of_complex_groups(size: int) -> None:
    """``|ghat|^2``, real; in a step, real and imaginary parts have their own."""
    net, loss, x = complex_problem()
    J = persample.gradients(net, loss, x, engine="loop").flat()
    means = J.view(N // size, size, -1).mean(1)
    found = flat(optim.group_second_moment(persample.gradients(net, loss, x), size).values())
    close(found, means.abs().square().mean(0))
    lr, eps, before = 0.01, 1e-3, flat(net.parameters())
    optim.PerSampleAdam(net.named_parameters(), lr=lr, eps=eps, group_size=size).step(persample.gradients(net, loss, x))
    scale = torch.view_as_real(means).square().mean(0).sqrt() + eps
    close(torch.view_as_real(before - flat(net.parameters())), lr * torch.view_as_real(J.mean(0)) / scale)


def test_second_moments_of_complex_parts_need_rows() -> None:
    net, loss, x = complex_problem()
    before = flat(net.parameters())
    opt = optim.PerSampleAdam(net.named_parameters())
    with pytest.raises(QuantityError, match="'weight' is complex"):
        opt.step(persample.gradients(net, loss, x, quantities=["mean", "second_moment"]))
    close(flat(net.parameters()), before, 0)


@pytest.mark.parametrize("build", [
    lambda p: optim.ClippedAdam(p, max_norm=1e4),
    lambda p: optim.PerSampleAdam(p, group_size=None),
    lambda p: optim.PerSampleAdam(p, group_size=2),
])  # fmt: skip
def test_squares_of_large_gradients_in_half_precision_are_finite(build: Any) -> None:
    """Of 256 and more they aren't, nor is a first average without its bias: the parameter would never move again."""
    ours, theirs = (nn.Linear(2, 1, bias=False).half() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine, other = build(ours.named_parameters()), torch.optim.AdamW(theirs.parameters(), weight_decay=0)
    x = torch.full((4, 2), 500.0).half()
    for _ in range(3):
        mine.step(persample.gradients(ours, lambda out, _: out.sum(1), x))
        theirs.weight.grad = x[:1].clone()
        other.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_second_moments_of_half_precision_are_in_single(size: int) -> None:
    G = persample.Gradients({"a": Dense(torch.full((4, 1), 1e-4).half())}, torch.zeros(4))
    found = optim.group_second_moment(G, size)["a"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1e-8, rel=1e-2)


def test_second_moment_of_groups_that_do_not_fit() -> None:
    net = model()
    for size in (0, -3, 1.5):
        with pytest.raises(ValueError, match="size of a group"):
            optim.group_second_moment(grads(net), size)  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match="must divide"):
        optim.group_second_moment(grads(net), 4)
    lean = grads(net, quantities=["mean", "second_moment"])
    close(flat(optim.group_second_moment(lean, 1).values()), flat(grads(net).second_moment().values()))
    with pytest.raises(QuantityError, match="rows"):
        optim.group_second_moment(lean, 2)


# ---- weights from the Gram matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_natural_gradient(damping: float) -> None:
    J, step = moved(model(), optim.NaturalGradient, lr=1.0, damping=damping)
    F = J.T @ J / N + damping * torch.eye(J.shape[1]).double()
    close(step, torch.linalg.solve(F, J.mean(0)), 1e-9)
    with pytest.raises(ValueError, match="damping"):
        optim.natural_weights(torch.eye(2), 0.0)


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (torch.full((2, 2), torch.nan), "infinite or NaN"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "larger damping"),
        (torch.ones(2, 3), r"\[N, N\] of real numbers, got torch.float32 \[2, 3\]"),
        (torch.ones(0, 0), "Gram matrix"),
        (torch.eye(2).long(), "of real numbers, got torch.int64"),
        (torch.eye(2).cfloat(), "of real numbers"),
    ],
)
def test_matrices_that_are_no_gram_matrices(K: Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, QuantityError), match=message):
        optim.natural_weights(K, 1e-3)
    if "real numbers" in message:
        for function in (optim.pcgrad_weights, lambda K: optim.surgery_weights(K, optim.pcgrad_weights)):
            for bad in (K, K.tolist()):
                with pytest.raises(ArgumentError, match="K must be a Gram matrix"):
                    function(bad)


def test_rows_that_are_not_finite_make_no_step() -> None:
    net = model()
    opt, before = EVERY["NaturalGradient"](net), flat(net.parameters())
    G = persample.gradients(net, nn.CrossEntropyLoss(), *batch())
    bad = persample.Gradients({name: Dense(G[name] * torch.nan) for name in G.names}, G.losses)
    with pytest.raises(QuantityError, match="NaN"):
        opt.step(bad)
    close(flat(net.parameters()), before, 0)


def pcgrad(J: Tensor) -> Tensor:
    """Rows after surgery, one after the other as in the paper, averaged."""
    rows = []
    for i, row in enumerate(J):
        for j, other in enumerate(J):
            if i != j and row @ other < 0:
                row = row - (row @ other) / other.square().sum() * other
        rows.append(row)
    return torch.stack(rows).mean(0)


def test_gradient_surgery() -> None:
    J, step = moved(model(), optim.GradientSurgery, lr=1.0)
    assert (J @ J.T).min() < 0
    close(step, pcgrad(J), 1e-9)
    zero = torch.tensor([[0.0, 0.0], [0.0, 1.0]])  # a row of zeros conflicts with nobody
    assert optim.pcgrad_weights(zero).tolist() == [0.5, 0.5]


def test_gradient_surgery_of_groups() -> None:
    net, groups = model(), torch.tensor([4, 7, 4, 9, 9, 4])
    J = grads(net, engine="loop").flat()
    means = torch.stack([J[groups == g].mean(0) for g in (4, 7, 9)])
    before = flat(net.parameters())
    optim.GradientSurgery(net.named_parameters(), lr=1.0).step(grads(net), groups)
    close(before - flat(net.parameters()), pcgrad(means), 1e-9)
    with pytest.raises(QuantityError, match="groups"):
        optim.surgery_weights(torch.eye(3), optim.pcgrad_weights, groups)
    with pytest.raises(QuantityError, match="weighting returned"):
        optim.surgery_weights(torch.eye(3), lambda K: K)
    for weighting in (lambda K: K, lambda K: [1.0, 2.0, 3.0], lambda K: K[0, :2]):
        for given in (None, torch.tensor([0, 1, 2])):
            with pytest.raises(QuantityError, match="weighting returned"):
                optim.surgery_weights(torch.eye(3), weighting, given)
    before = flat(net.parameters())
    for bad in (groups.tolist(), groups.double(), groups.numpy()):
        with pytest.raises(ArgumentError, match=r"groups must be a tensor \[6\], one integer per sample, got"):
            optim.GradientSurgery(net.named_parameters(), momentum=0.9).step(grads(net), bad)
    close(flat(net.parameters()), before, 0)


@pytest.mark.parametrize("kind, size", [(torch.float64, 1e-9), (torch.float64, 1e-3), (torch.float32, 1e-4)])
def test_means_of_groups_that_cancel(kind: torch.dtype, size: float) -> None:
    """Two samples that are opposite up to ``size``: the direction of their mean is told, or the group refused."""
    torch.manual_seed(2)
    J = torch.randn(4, 5, dtype=torch.float64)
    J[1] = -J[0] + size * J[1]
    J[2] = J[3] - 2 * (J[0] + J[1]) / size
    G, groups = persample.Gradients({"w": Dense(J.to(kind))}, torch.zeros(4)), torch.tensor([5, 5, 8, 8])
    if size < 1e-3:
        with pytest.raises(QuantityError, match="mean gradient of group 5 is so small"):
            optim.surgery_weights(G.gram(), optim.pcgrad_weights, groups)
        return
    means = torch.stack([J[:2].mean(0), J[2:].mean(0)])
    assert means[0] @ means[1] < 0
    close(optim.surgery_weights(G.gram(), optim.pcgrad_weights, groups) @ J, pcgrad(means), 1e-9)


def test_no_bound_and_no_noise_is_sgd() -> None:
    J, step = moved(model(), optim.ClippedSGD, lr=0.1, max_norm=torch.inf)
    close(step, 0.1 * J.mean(0))


def test_a_weighting_of_torchjd_plugs_in() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J, step = moved(model(), optim.GradientSurgery, weighting=aggregation.UPGradWeighting(), lr=1.0)
    close(step, aggregation.UPGrad()(J), 1e-9)
    assert (J @ step).min() > -1e-3 * step.square().sum() > (J @ J.mean(0)).min()  # it conflicts with nobody


# ---- batch size -------------------------------------------------------------------------------------------------


def test_rules() -> None:
    net = model()
    G, J = grads(net), grads(net, engine="loop").flat()
    estimate = statistics.noise_scale(G)
    for rule, expected in (
        (optim.by_norm_test(0.5), (J.var(0).sum(), 0.25 * J.mean(0).square().sum())),
        (optim.by_noise_scale(2.0), (2 * estimate.trace, estimate.square)),
        (optim.by_cabs(0.1), (0.1 * J.var(0, correction=0).sum(), G.losses.mean())),
    ):
        for source in (G, grads(net, quantities=["norm", "mean"])):
            for a, b in zip(rule(source), expected, strict=True):
                close(a, b, 1e-9)


def test_a_batch_size_of_negative_losses_is_refused() -> None:
    """As by `cabs`: they are no distance from an infimum of 0."""
    net = model()
    G = persample.gradients(net, lambda out, _: -out.square().sum(1), batch()[0])
    controller = optim.AdaptiveBatchSize(8, optim.by_cabs(0.1), maximum=64)
    for refused in (lambda: controller.update(G), lambda: statistics.cabs(G, 0.1)):
        with pytest.raises(QuantityError, match="CABS divides by the mean loss, taken to have infimum 0, but it is -"):
            refused()
    assert controller.state_dict() == {"size": 8, "numerator": 0.0, "denominator": 0.0}
    got: list[Any] = []
    handle = persample.extend(net, on_backward=got.append, reduction="mean")
    nn.CrossEntropyLoss()(net(batch()[0]), batch()[1]).backward()
    handle.remove()
    for refused in (lambda: controller.update(got[0]), lambda: statistics.cabs(got[0], 0.1)):
        with pytest.raises(QuantityError, match="never told the losses"):
            refused()


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf, "1", None])
@pytest.mark.parametrize("rule, name", [
    (optim.by_norm_test, "theta"), (optim.by_noise_scale, "factor"), (optim.by_cabs, "lr"),
    (lambda lr: statistics.cabs(grads(model()), lr), "lr"),
])  # fmt: skip
def test_arguments_of_rules_are_checked(rule: Callable[[Any], Any], name: str, bad: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be a positive and finite number"):
        rule(bad)


@pytest.mark.parametrize("options", [
    {"size": 8.5}, {"maximum": 1e9}, {"minimum": "2"}, {"decay": "0.9"}, {"growth": None}, {"rule": "norm_test"},
])  # fmt: skip
def test_arguments_of_a_controller_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"whole numbers|decay must be|rule must be a function"):
        optim.AdaptiveBatchSize(**{"size": 8, "rule": ratio(1.0, 1.0), "maximum": 64, **options})


def ratio(above: float, below: float) -> Callable[[Any], tuple[Tensor, Tensor]]:
    return lambda G: (torch.tensor(above), torch.tensor(below))


def test_controller() -> None:
    G = grads(model())
    one = grads(model(), n=1)
    grow = optim.AdaptiveBatchSize(8, ratio(100.2, 1.0), maximum=150)
    assert [grow.update(G) for _ in range(5)] == [16, 32, 64, 101, 101]
    assert grow.update(one) == 101
    keep = optim.AdaptiveBatchSize(64, ratio(10.0, 1.0), maximum=150)
    assert keep.update(G) == 64
    shrink = optim.AdaptiveBatchSize(64, ratio(10.0, 1.0), maximum=150, shrink=True)
    assert [shrink.update(G) for _ in range(4)] == [32, 16, 10, 10]
    unknown = optim.AdaptiveBatchSize(64, ratio(10.0, -1.0), maximum=150)
    assert [unknown.update(G) for _ in range(3)] == [128, 150, 150]
    averaged = optim.AdaptiveBatchSize(4, optim.by_norm_test(0.1), maximum=10**6, growth=1e6, decay=0.5)
    values = [optim.by_norm_test(0.1)(grads(model(), step)) for step in (0, 1)]
    for step in (0, 1):
        averaged.update(grads(model(), step))
    again = optim.AdaptiveBatchSize(4, optim.by_norm_test(0.1), maximum=10**6)
    again.load_state_dict(averaged.state_dict())
    assert again.size == averaged.size
    expected = (0.5 * values[0][0] + values[1][0]) / (0.5 * values[0][1] + values[1][1])
    assert averaged.numerator / averaged.denominator == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="minimum"):
        optim.AdaptiveBatchSize(1, ratio(1.0, 1.0), maximum=4)
    with pytest.raises(ValueError, match="growth"):
        optim.AdaptiveBatchSize(4, ratio(1.0, 1.0), maximum=4, growth=1.0)


def test_a_batch_that_overflowed_says_nothing() -> None:
    controller = optim.AdaptiveBatchSize(8, ratio(torch.nan, 1.0), maximum=64)
    with pytest.warns(UserWarning, match="skipped"):
        assert controller.update(grads(model())) == 8
    assert controller.state_dict() == {"size": 8, "numerator": 0.0, "denominator": 0.0}
    with pytest.raises(ArgumentError, match="no state of an AdaptiveBatchSize: it has no 'denominator'"):
        controller.load_state_dict({"size": 16, "numerator": 0.0})
    for wrong in ({"size": 8.5}, {"size": None}, {"numerator": torch.nan}, {"denominator": "1"}):
        with pytest.raises(ArgumentError, match="a whole size and two finite averages"):
            controller.load_state_dict({**controller.state_dict(), **wrong})
    for saved, size in ((1, 2), (20, 20), (100, 64)):  # of other bounds: a size of 1 would say nothing for ever
        controller.load_state_dict({"size": saved, "numerator": 1.0, "denominator": 2.0})
        assert controller.state_dict() == {"size": size, "numerator": 1.0, "denominator": 2.0}
    with pytest.raises(ArgumentError, match="G must be"):
        controller.update(torch.ones(3, 2))  # type: ignore[arg-type]
    for said in (1.0, torch.ones(3), (1.0, None)):
        other = optim.AdaptiveBatchSize(8, lambda G, said=said: said, maximum=64)  # type: ignore[misc]
        with pytest.raises(ArgumentError, match="a rule returns two numbers"):
            other.update(grads(model()))


def test_controller_feeds_a_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(30))
    controller = optim.AdaptiveBatchSize(4, ratio(100.0, 1.0), maximum=11)
    G, seen = grads(model()), []
    for (x,) in torch.utils.data.DataLoader(data, batch_sampler=controller.batches(range(30))):  # type: ignore[arg-type]
        seen.append(x)
        controller.update(G)
    assert [len(x) for x in seen] == [4, 8, 11, 7]
    assert torch.cat(seen).tolist() == list(range(30))


# ---- options, states and parameters of all kinds -----------------------------------------------------------------


class Masked(nn.Module):
    """A parameter that is infinite where a class is masked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.mask = nn.Linear(4, 3), nn.Parameter(torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + self.mask


@pytest.mark.parametrize("name", ["ClippedSGD", "GradientSurgery"])
def test_infinite_parameters_stay_what_they_are_without_weight_decay(name: str) -> None:
    ours, theirs, _, extra = PLAIN[name]
    a, b = Masked().double(), Masked().double()
    x, y = batch()
    y = y.where(y != 1, 0)
    mine, plain = ours(a.named_parameters(), lr=0.1, **extra), theirs(b.parameters(), lr=0.1)
    for _ in range(2):
        mine.step(persample.gradients(a, nn.CrossEntropyLoss(), x, y))
        plain.zero_grad()
        nn.CrossEntropyLoss()(b(x), y).backward()
        plain.step()
    assert a.mask[1] == -torch.inf
    assert not torch.equal(a.mask, Masked().mask.double())
    close(flat(a.parameters()), flat(b.parameters()))


@pytest.mark.parametrize("make", [lambda p: optim.ClippedAdam(p, max_norm=1.0), optim.PerSampleAdam])
def test_conjugate_parameters_are_refused_by_what_takes_their_parts(make: Callable[[Any], Any]) -> None:
    """Parts would be those of a copy, and no step be seen; SGD needs none."""
    net = nn.Linear(3, 2, bias=False, dtype=torch.complex128)
    net.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128).conj())
    with pytest.raises(ArgumentError, match=r"'weight' is the conjugate"):
        make(net.named_parameters())
    x, loss, before = torch.randn(4, 3, dtype=torch.complex128), Magnitude(), net.weight.detach().clone()
    J = persample.gradients(net, loss, x, engine="loop").flat()
    optim.ClippedSGD(net.named_parameters(), lr=0.1, max_norm=HUGE).step(persample.gradients(net, loss, x))
    close(before - net.weight.detach(), 0.1 * J.mean(0).view(2, 3))
    net.weight = nn.Parameter(net.weight.detach().resolve_conj())
    make(net.named_parameters()).step(persample.gradients(net, loss, x))


class Magnitude(nn.Module):
    """A loss of complex outputs."""

    def forward(self, out: Tensor, *_: Any) -> Tensor:
        return out.abs().square().sum(1)


STATES: dict[str, Callable[[Any], Any]] = {
    "ClippedSGD": lambda p: optim.ClippedSGD(p, max_norm=1.0),
    "ClippedSGD with momentum": lambda p: optim.ClippedSGD(p, max_norm=1.0, momentum=0.9, weight_decay=0.1),
    "ClippedAdam": lambda p: optim.ClippedAdam(p, max_norm=1.0, weight_decay=0.1),
    "PerSampleAdam": optim.PerSampleAdam,
    "NaturalGradient": lambda p: optim.NaturalGradient(p, momentum=0.9),
    "GradientSurgery": lambda p: optim.GradientSurgery(p, momentum=0.9),
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_states_go_through_distributed_checkpoints(name: str, flatten: bool) -> None:
    """Into a new optimizer, which goes on alike; neither parameters nor options change, and no gradient is left."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    a, b = model(), model()
    mine, other = STATES[name](a.named_parameters()), STATES[name](b.named_parameters())
    empty = state_dict.get_optimizer_state_dict(b, other, options=options)  # before the first step
    assert empty
    close(flat(a.parameters()), flat(b.parameters()), 0)
    for seed in range(2):
        mine.step(grads(a, seed))
        other.step(grads(b, seed))  # what was made for the checkpoint is the state of no step
    close(flat(a.parameters()), flat(b.parameters()), 0)
    saved = copy.deepcopy(state_dict.get_optimizer_state_dict(a, mine, options=options))
    b.load_state_dict(a.state_dict())
    other = STATES[name](b.named_parameters())
    lr = other.param_groups[0]["lr"]
    state_dict.set_optimizer_state_dict(b, other, saved, options=options)
    assert other.param_groups[0]["lr"] == lr > 0
    assert all(p.grad is None for p in b.parameters())
    close(flat(a.parameters()), flat(b.parameters()), 0)
    for net, opt in ((a, mine), (b, other)):
        opt.step(grads(net, 2))
    close(flat(a.parameters()), flat(b.parameters()), 0)


@pytest.mark.parametrize("name", STATES)
def test_a_step_without_gradients_is_refused(name: str) -> None:
    """But for the call by which checkpoints have states made, with every ``lr`` and ``.grad`` at zero."""
    net = model()
    opt = STATES[name](net.named_parameters())
    for arguments in ({}, {"closure": None}, {"closure": lambda: 0.0}):
        with pytest.raises(ArgumentError, match=r"step\(\) takes the per-sample gradients"):
            opt.step(**arguments)
    opt.param_groups[0]["lr"] = 0.0  # as at the start of a warmup
    with pytest.raises(ArgumentError, match=r"step\(\) takes the per-sample gradients"):
        opt.step(closure=None)
    with pytest.raises(ArgumentError, match="A closure would compute what is given here"):
        opt.step(grads(net), closure=lambda: 0.0)


@pytest.mark.parametrize("label", [{"name": "head"}, {"group_name": "head"}, {"lr_scale": 0.5}])
@pytest.mark.parametrize("name", ["ClippedSGD", "ClippedAdam"])
def test_labels_of_groups_change_nothing(name: str, label: dict[str, Any]) -> None:
    ours, theirs, options, extra = PLAIN[name]
    a, b = model(), model()
    mine = ours([{"params": list(a.named_parameters()), **label}], **options, **extra)
    plain = theirs([{"params": list(b.parameters()), **label}], **options)
    mine.step(grads(a))
    nn.CrossEntropyLoss()(b(batch()[0]), batch()[1]).backward()
    plain.step()
    close(flat(a.parameters()), flat(b.parameters()))
    mine.load_state_dict(mine.state_dict())
    assert mine.param_groups[0].items() >= label.items()


NUMBERS = ("lr", "weight_decay", "momentum", "eps")
FAMILIES = ("ClippedSGD nesterov", "ClippedAdam", "PerSampleAdam")


@pytest.mark.parametrize(("name", "option"), [(f, key) for f in FAMILIES for key in NUMBERS if key in PLAIN[f][2]])
def test_options_that_are_tensors_of_one_element(name: str, option: str) -> None:
    ours, _, options, extra = PLAIN[name]
    a, b = model(), model()
    tensor = {**options, option: torch.tensor([options[option]], dtype=torch.float64)}
    for net, given in ((a, options), (b, tensor)):
        opt = ours(net.named_parameters(), **given, **extra)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        for seed in range(3):
            opt.step(grads(net, seed))
            schedule.step()
    close(flat(a.parameters()), flat(b.parameters()))


@pytest.mark.parametrize("option", ["max_norm", "noise_multiplier", "expected_batch_size"])
@pytest.mark.parametrize("make", [optim.ClippedSGD, optim.ClippedAdam])
def test_bounds_and_noise_that_are_tensors_of_one_element(make: Callable[..., Any], option: str) -> None:
    options = {"max_norm": 0.5, "noise_multiplier": 2.0, "expected_batch_size": 8}
    nets = []
    for value in (options[option], torch.tensor([options[option]])):
        net = nn.Sequential(model(), Scalar()).double()
        given = {**options, option: value, "generator": torch.Generator().manual_seed(0)}
        make(net.named_parameters(), **given).step(grads(net))
        nets.append(flat(net.parameters()))
    close(*nets)
    assert not torch.equal(nets[0], flat(nn.Sequential(model(), Scalar()).double().parameters()))


class Scalar(nn.Module):
    """A parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_sizes_of_groups_are_whole_numbers_of_any_kind() -> None:
    a, b = model(), model()
    for net, size in ((a, 2), (b, np.int64(2))):
        optim.PerSampleAdam(net.named_parameters(), group_size=size).step(grads(net))  # type: ignore[arg-type]
    close(flat(a.parameters()), flat(b.parameters()), 0)
    assert not torch.equal(flat(a.parameters()), flat(model().parameters()))
