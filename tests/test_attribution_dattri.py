"""What the adapter for dattri makes of parameters that are given in part, or in another order than the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample import adapters
from persample.errors import ArgumentError

CE = nn.CrossEntropyLoss()
NAMES = ["0.weight", "2.bias"]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


def expected(model: nn.Module, names: Any = None) -> Tensor:
    return persample.gradients(model, CE, *batch(), params=names, engine="loop").flat()  # type: ignore[no-any-return]


def flat(model: nn.Module, names: Any = None) -> Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if names is None or name in names])


def mixed(names: Any) -> nn.Module:
    """The first model with some parameters of the second."""
    model, other = net(0), dict(net(1).named_parameters())
    model.load_state_dict({name: other[name] if name in names else p for name, p in model.state_dict().items()})
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("params", [NAMES, NAMES[::-1], "2", None])
def test_parameters_that_are_chosen_are_enough(params: Any) -> None:
    """As a flat vector or by name, all or only those; the others are the model's, which is as it was after that."""
    model, other = net(0), net(1)
    grad = adapters.dattri.grad_function(model, CE, **({} if params is None else {"params": params}))
    before = copy.deepcopy(model.state_dict())
    names = {None: [*before], "2": ["2.weight", "2.bias"]}.get(params, NAMES) if not isinstance(params, list) else NAMES
    some = {name: p for name, p in other.named_parameters() if name in names}
    close(grad(flat(other), batch()), expected(other, params))
    close(grad(dict(other.named_parameters()), batch()), expected(other, params))
    close(grad(flat(other, names), batch()), expected(mixed(names), params))
    close(grad(some, batch()), expected(mixed(names), params))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_parameters_are_loaded_too() -> None:
    model, other = net(0), net(1)
    model[0].requires_grad_(False)
    found = adapters.dattri.grad_function(model, CE)(dict(other.named_parameters()), batch())
    close(found, expected(other, "2"))
    close(adapters.dattri.grad_function(model, CE)(flat(other, ["2.weight", "2.bias"]), batch()),
          expected(mixed(["2.weight", "2.bias"]), "2"))  # fmt: skip


def test_parameters_that_do_not_fit_are_refused() -> None:
    model = net()
    grad = adapters.dattri.grad_function(model, CE, params=NAMES)
    for wrong, named in (
        (torch.zeros(7), r"\(23 numbers\) or of all that require grad \(39\), got \[7\]"),
        (torch.zeros(23, 1), r"got \[23, 1\]"),
        ([0.0] * 23, "got list"),
        ({"weight": torch.zeros(4, 5)}, "'weight' .* no parameter"),
        ({"2.bias": torch.zeros(4)}, r"'2.bias' \[4\], which is \[3\]"),
        ({"2.bias": 0.0}, "'2.bias' float"),
        ({"0.weight": torch.zeros(5, 4)}, r"'0.weight' \[5, 4\], which is \[4, 5\]"),
    ):
        with pytest.raises(ArgumentError, match=named):
            grad(wrong, batch())


def test_flat_values_by_name() -> None:
    other = dict(net(1).named_parameters())
    values = {name: p.detach().flatten() for name, p in other.items()}
    close(adapters.dattri.grad_function(net(0), CE)(values, batch()), expected(net(1)))


@pytest.mark.parametrize("params", [None, NAMES, "2"])
def test_compiled_models_have_the_names_of_their_originals(params: Any) -> None:
    model, other = net(0), net(1)
    compiled = torch.compile(model)
    grad = adapters.dattri.grad_function(compiled, CE, **({} if params is None else {"params": params}))
    close(grad(flat(other), batch()), expected(other, params))
    for named in (other, torch.compile(other)):
        close(grad(dict(named.named_parameters()), batch()), expected(other, params))
    close(flat(model), flat(net(0)))


@pytest.mark.filterwarnings("ignore")  # what dattri warns of is its own
def test_layers_are_in_the_order_of_the_model() -> None:
    task_of = pytest.importorskip("dattri.task").AttributionTask
    model, other = net(0), net(1)

    def task(**options: Any) -> Any:
        made = task_of(loss_func=lambda params, data: data, model=model, checkpoints=model.state_dict())
        return adapters.dattri.attach(made, CE, **options)

    grad = task().get_grad_loss_func((None, 0), layer_name=NAMES, ckpt_idx=0)
    close(grad(flat(other, NAMES), batch()), expected(mixed(NAMES), NAMES))
    single = task().get_grad_loss_func((None, 0), layer_name="2.weight", ckpt_idx=0)
    close(single(flat(other, ["2.weight"]), batch()), expected(mixed(["2.weight"]), ["2.weight"]))
    for names in (NAMES[::-1], ["2.bias", "2.weight"], [*NAMES, "2.bias"], ["3.bias"]):
        with pytest.raises(ArgumentError, match="in the order of the model"):
            task().get_grad_loss_func((None, 0), layer_name=names, ckpt_idx=0)
    compiled = task_of(loss_func=lambda params, data: data, model=torch.compile(model), checkpoints=[])
    compiled._load_checkpoints = lambda ckpt_idx: None
    grad = adapters.dattri.attach(compiled, CE).get_grad_loss_func((None, 0), layer_name=NAMES, ckpt_idx=0)
    close(grad(flat(other, NAMES), batch()), expected(mixed(NAMES), NAMES))
    with pytest.raises(ArgumentError, match="give one"):
        task(params="2").get_grad_loss_func((None, 0), layer_name=NAMES, ckpt_idx=0)


@pytest.mark.filterwarnings("ignore")  # what dattri warns of is its own
def test_samples_are_where_dattri_says() -> None:
    """Its influence functions have them on axis 1, behind an axis of one: that of a batch, for each sample alone."""
    task_of = pytest.importorskip("dattri.task").AttributionTask
    model, inside = net(), tuple(x.unsqueeze(0) for x in batch())
    task = task_of(loss_func=lambda params, data: data, model=model, checkpoints=model.state_dict())
    task = adapters.dattri.attach(task, CE)
    for given, options in (
        (inside, {}),
        (inside, {"in_dims": (None, 1)}),
        (inside, {"in_dims": (None, (1, 1))}),
        (batch(), {"in_dims": (None, 0)}),
        (batch(), {"in_dims": (None, (0, 0))}),
        ((inside[0], batch()[1]), {"in_dims": (None, (1, 0))}),
    ):
        close(task.get_grad_loss_func(**options)(flat(model), given), expected(model))
    for given, dims in (
        (batch(), (None, 1)),
        (inside, (None, 2)),
        (batch(), (None, (0, None))),
        (batch(), (None, (0,))),
    ):
        with pytest.raises(ArgumentError, match="samples must be on axis 0"):
            task.get_grad_loss_func(in_dims=dims)(flat(model), given)


@pytest.mark.filterwarnings("ignore")
def test_influence_functions_of_dattri() -> None:
    functions = pytest.importorskip("dattri.algorithm.influence_function")
    task_of = pytest.importorskip("dattri.task").AttributionTask
    model, mean, x = net().float(), nn.MSELoss(), batch()[0].float()
    data = DataLoader(TensorDataset(x, x[:, :3]), batch_size=3)

    def loss(params: Any, data: Any) -> Tensor:
        return mean(torch.func.functional_call(model, params, (data[0],)), data[1])  # type: ignore[no-any-return]

    def scores(attach: bool) -> Tensor:
        task = task_of(loss_func=loss, model=model, checkpoints=model.state_dict())
        task = adapters.dattri.attach(task, mean) if attach else task
        attributor = functions.IFAttributorExplicit(task=task, regularization=0.1)
        attributor.cache(DataLoader(data.dataset, batch_size=6))
        with torch.no_grad():
            return attributor.attribute(data, data)  # type: ignore[no-any-return]

    torch.testing.assert_close(scores(True), scores(False))
