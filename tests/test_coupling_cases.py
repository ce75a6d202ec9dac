"""What may couple and how: kinds of layers, of inputs, of modes; what does not; what can't be told, with its error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled_nets import setups
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import persample
from persample import batchnorm
from persample.batchnorm.coupling import Coupling
from persample.batchnorm.network import cheaper, costs
from persample.gradients import Gradients

CE = nn.CrossEntropyLoss()


class Fn(nn.Module):
    """Modules and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def data(*shape: int, classes: int = 3, at: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (shape[at],), generator=generator)


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(1, p.shape[-1]) ** 0.5)
    return model.double()


def agrees_with_autograd(C: Coupling, model: nn.Module, x: Any, y: Tensor, atol: float = 1e-10) -> None:
    """Rows by both routes, against autograd on the model as it is; their sums; what does not depend on the route."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    torch.random.manual_seed(5)
    losses = F.cross_entropy(model(*x) if isinstance(x, tuple) else model(x), y, reduction="none")
    parameters = {name: p for name, p in model.named_parameters() if name in C.names}
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    for b, before in buffers:
        b.copy_(before)
    expected = {name: torch.stack(r) for name, r in zip(parameters, zip(*rows, strict=True), strict=True)}
    effects = []
    for route in ("samples", "statistics"):
        other = Coupling(type(C.network)(C.network.point, route))
        rows_of_losses, copies = other.gradients("loss"), other.gradients("copy").sum()
        effects.append(other.gradients("influence"))
        for name, value in expected.items():
            torch.testing.assert_close(rows_of_losses[name], value, rtol=0, atol=atol)
            torch.testing.assert_close(copies[name], value.sum(0), rtol=0, atol=atol)
        sums = C.losses + other.statistic_influence().sum(0)
        torch.testing.assert_close(sums, C.effective_losses(), rtol=0, atol=atol)
    torch.testing.assert_close(effects[0].flat(), effects[1].flat(), rtol=0, atol=10 * atol)
    total = torch.cat([value.sum(0).flatten() for value in expected.values()])
    torch.testing.assert_close(effects[0].flat().sum(0), total, rtol=0, atol=10 * atol)


# ---- kinds of coupling ----------------------------------------------------------------------------------------------


def bn1(**options: Any) -> nn.Module:
    return nn.BatchNorm1d(4, **options)


def layered(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), norm, nn.ReLU(inplace=True), nn.Linear(4, 3))


def functional(m: Any, x: Tensor) -> Tensor:
    h = F.batch_norm(m.fc(x), None, None, training=True)
    return m.out(torch.tanh(torch.batch_norm(h, m.bn.weight, m.bn.bias, None, None, True, 0.1, 1e-3, False)))


def tokens(m: Any, x: Tensor) -> Tensor:
    """BatchNorm over all tokens of all samples: [N T, D]."""
    n, t, _ = x.shape
    h = m.bn(m.fc(x).reshape(n * t, -1)).reshape(n, t, -1)
    return m.out(torch.relu(h).mean(1))


def sequence_first(m: Any, x: Tensor) -> Tensor:
    t, n, _ = x.shape
    h = m.bn(m.fc(x).reshape(t * n, -1)).reshape(t, n, -1)
    return m.out(torch.relu(h).mean(0))


def positions(m: Any, x: Tensor) -> Tensor:
    """Samples on a spatial axis: [1, C, N]."""
    return m.out(torch.relu(m.bn(m.fc(x).T.unsqueeze(0))).squeeze(0).T)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: layered(bn1()), (6, 5)),
    "no affine": (lambda: layered(bn1(affine=False)), (6, 5)),
    "no running statistics": (lambda: layered(bn1(track_running_stats=False)), (6, 5)),
    "no running statistics in eval": (lambda: layered(bn1(track_running_stats=False)).eval(), (6, 5)),
    "nothing to know it by": (lambda: layered(bn1(track_running_stats=False, affine=False)).eval(), (6, 5)),
    "cumulative average": (lambda: layered(bn1(momentum=None)), (6, 5)),
    "functional": (lambda: Fn(functional, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)), (6, 5)),
    "tokens": (lambda: Fn(tokens, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)), (4, 3, 5)),
    "positions": (lambda: Fn(positions, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)), (6, 5)),
    "lengths": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), bn1(), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (5, 2, 6)),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, 3)),
        (5, 1, 3, 3, 3),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), bn1(), nn.Dropout(0.3), nn.Linear(4, 3)),
        (6, 5),
    ),
    "on the input": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), (6, 5)),
    "at the end": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), (6, 5)),
    "two samples": (lambda: layered(bn1(eps=0.1)), (2, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_coupling(kind: str) -> None:
    build, shape = KINDS[kind]
    model = seeded(build())
    x, y = data(*shape)
    torch.random.manual_seed(5)
    C = persample.coupling(model, CE, x, y)
    assert C.coupled or kind == "on the input"
    agrees_with_autograd(C, model, x, y)


def test_sequence_first() -> None:
    model = seeded(Fn(sequence_first, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)))
    x, y = data(3, 4, 5, at=1)
    C = persample.coupling(model, CE, x, y, batch_dim=(1, 0, 0))
    agrees_with_autograd(C, model, x, y)
    first = persample.coupling(
        Fn(lambda m, x: model(x.transpose(0, 1)), inner=model), CE, x.transpose(0, 1).contiguous(), y
    )
    torch.testing.assert_close(C.norms(), first.norms(), rtol=0, atol=1e-12)
    torch.testing.assert_close(C.input_norms(), first.input_norms(), rtol=0, atol=1e-12)


def test_ghost_batches_are_blocks() -> None:
    model = seeded(nn.Sequential(nn.Linear(5, 4), bn1(), nn.Tanh(), nn.Linear(4, 4), bn1(), nn.Linear(4, 3)))
    batchnorm.convert(model, virtual_batch_size=3)
    x, y = data(8, 5)
    C = persample.coupling(model, CE, x, y)
    assert list(C.layers) == ["1", "1#2", "1#3", "4", "4#2", "4#3"]
    agrees_with_autograd(C, model, x, y)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    apart = group[:, None] != group
    for matrix in (C.norms(), C.input_norms(), C.statistic_influence(), C.leave_one_out()):
        assert torch.equal(matrix[apart], torch.zeros(int(apart.sum()), dtype=torch.float64))
        assert bool((matrix[~apart] != 0).all())
    for route in ("samples", "statistics"):
        other = persample.coupling(model, CE, x, y, route=route)
        torch.testing.assert_close(
            other.column(4).flat()[2], torch.zeros_like(other.column(4).flat()[2]), rtol=0, atol=0
        )
        torch.testing.assert_close(other.column(4)["0.weight"][3], C.entry(3, 4)["0.weight"], rtol=0, atol=1e-12)
    with pytest.raises(persample.PersampleError, match="single value"):
        persample.coupling(model, CE, *data(7, 5))


def test_names_of_layers_and_what_they_couple() -> None:
    C = persample.coupling(*_arguments("reused"))
    assert C.layers == {"bn": 5, "bn#2": 5}
    assert C.coupled == {
        "fc1.weight": ["bn", "bn#2"], "fc1.bias": ["bn", "bn#2"], "bn.weight": ["bn#2"], "bn.bias": ["bn#2"],
        "fc2.weight": ["bn#2"], "fc2.bias": ["bn#2"],
    }  # fmt: skip
    assert C.uncoupled == ["out.weight", "out.bias"]
    C = persample.coupling(*_arguments("branches"))
    assert C.layers == {"bn0": 4, "a": 3, "b": 3}
    assert C.coupled["bn0.weight"] == ["a", "b"] and C.coupled["fc2.weight"] == ["b"]
    model = seeded(KINDS["nothing to know it by"][0]())
    assert list(persample.coupling(model, CE, *data(6, 5)).layers) == ["1"]
    model = seeded(KINDS["functional"][0]())
    assert list(persample.coupling(model, CE, *data(6, 5)).layers) == ["batch_norm", "bn"]


def _arguments(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    setup = setups[name]()
    return setup.net, CE, setup.x, setup.y


def test_uncoupled_parameters_keep_ordinary_gradients() -> None:
    net, loss, x, y = _arguments("mlp")
    C = persample.coupling(net, loss, x, y)
    assert C.uncoupled == ["bn2.weight", "bn2.bias", "out.weight", "out.bias"]
    ordinary = persample.gradients(net, loss, x, y, params=C.uncoupled)
    for notion in ("frozen", "copy", "loss"):
        G = C.gradients(notion)
        for name in C.uncoupled:
            torch.testing.assert_close(G[name], ordinary[name], rtol=0, atol=1e-12)
    with pytest.raises(persample.BatchCoupledError, match=r"fc1\.weight"):
        persample.gradients(net, loss, x, y)


def test_a_layer_that_no_loss_depends_on_does_not_count() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.bn(m.fc(x))
        return m.out(m.fc(x))

    C = persample.coupling(seeded(Fn(run, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3))), CE, *data(6, 5))
    assert C.layers == {} and C.coupled == {} and C.gradients("loss").unused == ("bn.weight", "bn.bias")


@pytest.mark.parametrize("norm", ["group", "layer", "instance", "eval", "none"])
def test_without_coupling_every_index_is_exactly_zero(norm: str) -> None:
    layers = {
        "group": nn.GroupNorm(2, 4), "layer": nn.LayerNorm([4, 3, 3]), "instance": nn.InstanceNorm2d(4, affine=True),
        "eval": nn.BatchNorm2d(4).eval(), "none": nn.Identity(),
    }  # fmt: skip
    model = seeded(nn.Sequential(nn.Conv2d(2, 4, 3), layers[norm], nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)))
    C = persample.coupling(model, CE, *data(5, 2, 5, 5))
    n = len(C)
    diagonal = ~torch.eye(n, dtype=torch.bool)
    for table in (C.norms(), C.input_norms(), C.output_input_norms(), C.statistic_influence(), C.leave_one_out(True)):
        assert table.shape == (n, n) and torch.equal(table[diagonal], torch.zeros(n * n - n, dtype=table.dtype))
    assert torch.equal(C.statistic_influence().diagonal(), torch.zeros(n, dtype=torch.float64))
    for index in (C.data_coupling(), C.theta_coupling(), C.participation() - 1, C.effective_losses() - C.losses):
        assert torch.equal(index, torch.zeros(n, dtype=torch.float64))
    assert C.adjoints() == {} and C.coupled == {} and C.layers == {} and C.uncoupled == list(C.names)
    ordinary = persample.gradients(model, CE, *data(5, 2, 5, 5))
    for notion in ("eval", "frozen", "copy", "loss", "influence"):
        for name, value in C.gradients(notion).dense().items():
            torch.testing.assert_close(value, ordinary[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(C.norms().diagonal(), ordinary.norm(), rtol=0, atol=1e-12)


def test_criteria_with_ignored_targets_penalties_and_losses_of_their_own() -> None:
    model = seeded(layered(bn1()))
    x, y = data(6, 5)

    def each(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t, reduction="none")

    agrees_with_autograd(persample.coupling(model, each, x, y), model, x, y)

    def penalised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + model[0].weight.square().sum()

    plain, C = persample.coupling(model, CE, x, y), persample.coupling(model, penalised, x, y)
    for notion in ("frozen", "copy", "loss", "influence"):
        with_penalty = plain.gradients(notion)["0.weight"] + 2 * model[0].weight.detach()
        torch.testing.assert_close(C.gradients(notion)["0.weight"], with_penalty, rtol=0, atol=1e-10)
    ignored = y.clone()
    ignored[2] = -100

    def run() -> list[Gradients]:
        C = persample.coupling(model, nn.CrossEntropyLoss(ignore_index=-100), x, ignored)
        routes = [Coupling(type(C.network)(C.network.point, route)) for route in ("samples", "statistics")]
        return [other.gradients("loss") for other in routes] + [C.gradients("copy")]

    with pytest.warns(UserWarning, match=r"sample\(s\) \[2\] is ignored"):
        *rows, copies = run()
    keep = torch.tensor([0, 1, 3, 4, 5])
    for G in rows:
        torch.testing.assert_close(G["0.weight"][keep], plain.gradients("loss")["0.weight"][keep], rtol=0, atol=1e-10)
        assert torch.equal(G["0.weight"][2], torch.zeros(4, 5, dtype=torch.float64)) and G.losses[2] == 0
    torch.testing.assert_close(copies.sum()["0.weight"], rows[0].sum()["0.weight"], rtol=0, atol=1e-10)
    assert bool((copies["0.weight"][2] != 0).any())  # its activations still move the statistics of the others


@given(
    n=st.integers(2, 6),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    t=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_shape_by_both_routes(n: int, widths: list[int], t: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 2
    for width in widths:
        layers += [nn.Conv1d(before, width, 1), nn.BatchNorm1d(width, eps=0.1, affine=seed % 2 == 0), nn.Tanh()]
        before = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * t, 3)).double()
    x, y = data(n, 2, t)
    agrees_with_autograd(persample.coupling(model, CE, x, y), model, x, y)


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def everything(C: Coupling) -> None:
    for notion in ("eval", "frozen", "copy", "loss", "influence"):
        C.gradients(notion)
    C.norms(), C.column(0), C.input_norms(), C.leave_one_out(True), C.via_statistics(), C.adjoints()
    C @ {name: p.detach() for name, p in C.network.problem.parameters.items()}


def test_nothing_is_left_behind() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(5, 4), bn1(momentum=None), nn.Dropout(0.5), nn.Linear(4, 4), bn1(), nn.Linear(4, 3))
    )
    x, y = data(6, 5)
    x.requires_grad_()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, random = deepcopy(model.state_dict()), torch.get_rng_state()
    everything(persample.coupling(model, CE, x, y))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and x.grad is None
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("notion", ["eval", "frozen", "copy", "loss", "influence"])
def test_gradients_draw_as_one_forward_pass_and_move_no_statistics(notion: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(5, 4), bn1(), nn.Dropout(0.5), nn.Linear(4, 3)))
    x, y = data(6, 5)
    before = deepcopy(model.state_dict())
    torch.manual_seed(2)
    G = persample.gradients(model, CE, x, y, coupled=notion)
    drawn = torch.rand(3)
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    if notion == "eval":
        model[1].eval()
    torch.manual_seed(2)
    losses = F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(G.losses, losses.detach())
    assert torch.equal(drawn, torch.rand(3))
    assert f"coupled='{notion}'" in repr(G)
    model.load_state_dict(before)
    state = torch.get_rng_state()
    a, b = (
        persample.gradients(model, CE, x, y, coupled=notion, generator=torch.Generator().manual_seed(7)) for _ in "ab"
    )
    torch.testing.assert_close(a.flat(), b.flat())
    assert torch.equal(state, torch.get_rng_state())


def test_statistics_runs() -> None:
    arguments = _arguments("mlp")
    for notion in ("frozen", "copy", "loss", "influence"):
        G = persample.gradients(*arguments, coupled=notion)
        S = persample.gradients(
            *arguments, coupled=notion, quantities=["norm", "variance", ("clip", {"max_norm": 0.1})]
        )
        torch.testing.assert_close(S.norm(), G.norm())
        for name, value in G.clip(0.1).items():
            torch.testing.assert_close(S.clip()[name], value)
            torch.testing.assert_close(S.variance()[name], G.variance()[name])


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_the_cheaper_route_is_taken_on_both_sides_of_the_crossover() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(5, 4), bn1(), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 3))
    )
    K = 12
    for n in (5, K, K + 2, 40):
        x, y = data(n, 5)
        C = persample.coupling(model, CE, x, y, verify=False)
        before = C.passes.backward
        C.gradients("loss")
        expected = min(n, 1 + K) + (n < 1 + K)  # uncoupled parameters take one frozen pass in either route
        assert C.passes.backward - before == 1 + expected  # and the structure one
        assert C.costs() == {"samples": n, "statistics": 1 + K}
        assert C.costs()[cheaper(n, K)] == min(C.costs().values())
        by = {}
        for route in ("samples", "statistics"):
            other = persample.coupling(model, CE, x, y, verify=False, route=route)
            other.gradients("loss")
            by[route] = other.passes.backward
        assert C.passes.backward == min(by.values())
    assert costs(10, 0)["statistics"] == 0


def test_passes_of_everything_else() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(5, 4), bn1(), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 3))
    )
    C = persample.coupling(model, CE, *data(9, 5), verify=False)

    def cost(run: Callable[[], Any]) -> tuple[int, int]:
        before = C.passes.forward, C.passes.backward
        run()
        return C.passes.forward - before[0], C.passes.backward - before[1]

    assert cost(lambda: C.gradients("frozen")) == (1, 1)
    assert cost(lambda: C.gradients("frozen")) == (0, 0)
    assert cost(lambda: C.gradients("copy")) == (1, 1)
    assert cost(lambda: C.gradients("eval")) == (1, 1)
    assert cost(lambda: C.effective_losses()) == (1, 1)
    assert cost(lambda: C.effective_losses()) == (0, 0)
    assert cost(lambda: C.row(0)) == (1, 1)
    assert cost(lambda: C.gradients("loss", samples=[0, 5])) == (1, 2)
    assert cost(lambda: C.norms()) == (1, 9)
    assert cost(lambda: C.norms()) == (0, 0)
    assert cost(lambda: C.statistic_influence()) == (1, 9)
    assert cost(lambda: C.adjoints()) == (0, 0)
    assert cost(lambda: C @ {name: p.detach() for name, p in C.network.problem.parameters.items()}) == (1, 2)
    assert cost(lambda: C.via_statistics("4")) == (1, 4)
    assert cost(lambda: C.outgoing_norms(probes=3)) == (1, 3)
    assert cost(lambda: C.loss_norms(probes=3)) == (1, 4)
    assert cost(lambda: C.leave_one_out(exact=True)) == (9, 0)


def test_only_the_statistics_before_the_chosen_parameters_are_paid_for() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(5, 4), bn1(), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 3))
    )
    C = persample.coupling(model, CE, *data(50, 5), params=r"3\.|4\.|5\.", verify=False)
    assert C.costs() == {"samples": 50, "statistics": 5} and C.coupled == {"3.weight": ["4"], "3.bias": ["4"]}
    whole = persample.coupling(model, CE, *data(50, 5)).gradients("loss")
    torch.testing.assert_close(C.gradients("loss")["3.weight"], whole["3.weight"], rtol=0, atol=1e-12)


def conv_net(c: int = 16) -> nn.Module:
    """64 BatchNorm channels with c = 16."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.b0(m.c0(x)))
        x = torch.relu(x + m.b2(m.c2(torch.relu(m.b1(m.c1(x))))))
        return m.out(torch.relu(m.b3(m.c3(x))).mean((2, 3)))

    def conv(i: int) -> nn.Module:
        return nn.Conv2d(i, c, 3, padding=1)

    return Fn(
        run, c0=conv(3), c1=conv(c), c2=conv(c), c3=conv(c), b0=nn.BatchNorm2d(c), b1=nn.BatchNorm2d(c),
        b2=nn.BatchNorm2d(c), b3=nn.BatchNorm2d(c), out=nn.Linear(c, 10),
    )  # fmt: skip


def test_all_losses_of_a_convolutional_net() -> None:
    """N = 512 images of 8 x 8, 64 BatchNorm channels: 129 passes instead of 512."""
    torch.manual_seed(0)
    model, x, y = conv_net(), torch.randn(512, 3, 8, 8), torch.randint(10, (512,))
    C = persample.coupling(model, CE, x, y, verify=False)
    G = C.gradients("loss")
    assert C.passes.backward == 1 + 1 + 128 and sum(C.layers.values()) == 64
    losses = F.cross_entropy(model(x), y, reduction="none")
    for n in (0, 300):
        grads = torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True)
        for name, g in zip(C.names, grads, strict=True):
            assert float((G[name][n] - g).norm()) < 1e-3 * float(g.norm()) + 1e-5, name


# ---- what can't be told ---------------------------------------------------------------------------------------------


def test_other_coupling_is_noticed() -> None:
    model = seeded(
        Fn(lambda m, x: m.out(m.bn(m.fc(x)) - m.fc(x).mean(0)), fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3))
    )
    with pytest.raises(persample.BatchCoupledError, match="something else"):
        persample.coupling(model, CE, *data(6, 5))
    with pytest.raises(persample.BatchCoupledError, match="something else"):
        persample.gradients(model, CE, *data(6, 5), coupled="loss")


def test_a_single_value_has_no_variance() -> None:
    with pytest.raises(persample.PersampleError, match="single value"):
        persample.coupling(layered(bn1()).double(), CE, *data(1, 5))


def test_samples_of_unknown_place() -> None:
    model = seeded(
        Fn(lambda m, x: m.out(m.bn(m.fc(x).T).T), fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(6), out=nn.Linear(4, 3))
    )
    with pytest.raises(persample.PersampleError, match="'bn': can't tell where the samples are"):
        persample.coupling(model, CE, *data(6, 5))


def test_changes_between_passes_are_noticed() -> None:
    for change, what in (
        (lambda m, x: m[0].weight.detach().mul_(2), "parameter '0.weight'"),
        (lambda m, x: m[1].eval(), "the mode of module '1'"),
        (lambda m, x: x.add_(1), "the batch"),
    ):
        model = seeded(layered(bn1()))
        x, y = data(6, 5)
        C = persample.coupling(model, CE, x, y)
        C.gradients("loss"), model(x)  # a forward pass of the user's is no change
        C.gradients("copy")
        change(model, x)
        with pytest.raises(persample.PersampleError, match=what):
            C.gradients("copy")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of copies of its own
@pytest.mark.parametrize("asked", [False, True], ids=["untouched", "asked"])
@pytest.mark.parametrize(
    "copied", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_are_at_the_same_point(copied: Callable[[Any], Any], asked: bool) -> None:
    model = seeded(nn.Sequential(nn.Linear(5, 4), bn1(), nn.Dropout(0.5), nn.Linear(4, 3)))
    C = persample.coupling(model, CE, *data(6, 5))
    if asked:
        C.norms()
    (other, D), alone = copied((model, C)), copied(C)
    for notion in ("loss", "influence", "eval"):
        for again in (D, alone):
            assert torch.equal(again.gradients(notion).flat(), C.gradients(notion).flat())
    D.gradients("loss").backward()
    assert model[0].weight.grad is None and other[0].weight.grad is not None
    with torch.no_grad():
        other[0].weight.mul_(2)
    for stale in (D, copied(D)):
        with pytest.raises(persample.InplaceError, match=r"parameter '0\.weight' changed"):
            stale.gradients("loss")
    C.gradients("loss")
    model.load_state_dict(model.state_dict())
    with pytest.raises(persample.InplaceError, match=r"'0\.weight' changed \(or was written to, as by load_state_dict"):
        C.gradients("loss")


def test_checkpointing() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(checkpoint(lambda x: torch.tanh(m.bn(m.fc(x))), x, use_reentrant=False))

    model = seeded(Fn(run, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)))
    with pytest.raises(persample.PersampleError, match="Turn checkpointing off"):
        persample.coupling(model, CE, *data(6, 5))
    assert persample.gradients(model, CE, *data(6, 5), coupled="copy", verify=False)["fc.weight"].shape == (6, 4, 5)


def test_arguments() -> None:
    arguments = _arguments("mlp")
    C = persample.coupling(*arguments)
    with pytest.raises(ValueError, match="not one thing"):
        C.gradients("true")
    with pytest.raises(ValueError, match="route"):
        persample.coupling(*arguments, route="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coupled must be one of"):
        persample.gradients(*arguments, coupled="true")
    with pytest.raises(ValueError, match="needs engine='hooks'"):
        persample.gradients(*arguments, coupled="loss", engine="vmap")
    with pytest.raises(persample.PersampleError, match="direction"):
        C @ {"fc1.weight": torch.zeros(6, 5)}
    with pytest.raises(persample.PersampleError, match=r"\[6, 5\]"):
        C @ {name: torch.zeros(3) for name in C.names}
    with pytest.raises(persample.PersampleError, match="one weight per loss"):
        C.T @ torch.ones(3)
    with pytest.raises(persample.PersampleError, match="no coupling BatchNorm call 'bn9'"):
        C.via_statistics("bn9")


def test_inputs_that_have_no_derivative() -> None:
    model = seeded(Fn(lambda m, x: m.out(m.bn(m.e(x))), e=nn.Embedding(7, 4), bn=bn1(), out=nn.Linear(4, 3)))
    x, y = torch.randint(7, (6,)), torch.randint(3, (6,))
    C = persample.coupling(model, CE, x, y)
    agrees_with_autograd(C, model, x, y)
    with pytest.raises(persample.PersampleError, match="floating"):
        C.input_norms()


def test_half_precision_and_criteria_per_sample() -> None:
    model = layered(bn1()).bfloat16()
    x, y = torch.randn(8, 5).bfloat16(), torch.randint(3, (8,))
    G = persample.coupling(model, lambda f, t: F.cross_entropy(f.float(), t, reduction="none"), x, y).gradients("loss")
    exact = persample.coupling(deepcopy(model).float(), CE, x.float(), y).gradients("loss")
    assert float((G.flat().float() - exact.flat()).norm() / exact.flat().norm()) < 0.1


# ---- to be looked at ------------------------------------------------------------------------------------------------


def test_repr_and_html() -> None:
    C = persample.coupling(*_arguments("mlp"))
    assert repr(C).startswith("Coupling(samples: 7, statistics: 18 of 2 BatchNorm calls")
    assert "see .norms(), .gradients(notion)" in repr(C)
    page = C._repr_html_()
    assert "bn1" in page and "fc1.weight" in page and page.count("<tr>") == page.count("</tr>")
    plain = persample.coupling(seeded(nn.Linear(5, 3)), CE, *data(6, 5))
    assert "no BatchNorm" in repr(plain) and "<table" in plain._repr_html_()


def test_plots() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    C = persample.coupling(*_arguments("mlp"))
    for draw in (Coupling.plot, batchnorm.plot_layers, batchnorm.plot_spectrum, batchnorm.plot_notions):
        figure, ax = plt.subplots()
        assert draw(C, ax=ax) is ax and ax.has_data()
        plt.close(figure)
    ax = batchnorm.plot_decay([C, persample.coupling(*_arguments("mlp"))])
    assert len(ax.lines) == 2
    plt.close("all")
    with pytest.raises(persample.ArgumentError, match=r"plot_decay\(\[c32, c64\]\), got Coupling"):
        batchnorm.plot_decay(C)  # type: ignore[arg-type]


def test_a_coupling_keeps_the_autocast_region_that_it_was_made_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = persample.coupling(model, CE, x, y).norms()
        C = persample.coupling(model, CE, x, y)
    assert torch.equal(C.norms(), inside)
    assert not torch.equal(persample.coupling(model, CE, x, y).norms(), inside)
    assert all(noise.trace > 0 and noise.squared_mean > 0 for noise in C.noise().values())


# ---- complex parameters, numbers of samples -------------------------------------------------------------------------


def complex_coupling() -> tuple[Coupling, Tensor]:
    """A complex layer in front of a BatchNorm, and the rows of "loss" by plain autograd, as real numbers."""
    a, norm, b = nn.Linear(3, 4, dtype=torch.complex128), nn.BatchNorm1d(4).double(), nn.Linear(4, 3).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*a.parameters(), *b.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model = Fn(lambda m, x: m.b(m.norm(m.a(x).abs())), a=a, norm=norm, b=b)
    x, y = torch.randn(5, 3, generator=generator, dtype=torch.complex128), torch.tensor([0, 1, 2, 1, 0])
    losses, parameters = F.cross_entropy(model(x), y, reduction="none"), list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    real = [[torch.view_as_real(g) if g.is_complex() else g for g in row] for row in rows]
    return persample.coupling(model, CE, x, y), torch.stack([torch.cat([g.flatten() for g in row]) for row in real])


def test_complex_parameters_before_a_batch_norm() -> None:
    C, rows = complex_coupling()
    norms = rows.norm(dim=1)
    torch.testing.assert_close(C.loss_norms(), norms, rtol=1e-9, atol=1e-9)
    estimate = C.loss_norms(probes=4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, norms, rtol=0.1, atol=0)  # relative standard deviation sqrt(2 / 4000) / 2
    noise = C.noise(["loss"])["loss"]
    assert noise.squared_mean == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-9)
    assert noise.trace == pytest.approx(float(rows.var(0).sum()), rel=1e-9)
    share = C.theta_coupling()
    assert share.shape == (5,) and bool(((share > 0) & (share.isfinite())).all())
    for draws in (None, 3):
        with pytest.raises(persample.ArgumentError, match=r"parameter 'a.weight' is complex.*no diagonal"):
            C.ggn_diagonal(draws=draws)


@pytest.mark.parametrize("samples", [torch.tensor([False] * 3 + [True] * 2), [True], [1.7], [5], [-6], ["0"]])
def test_samples_are_given_by_their_numbers(samples: Any) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    C = persample.coupling(model, CE, *data(5, 3))
    with pytest.raises(persample.ArgumentError, match=r"numbers, 0 to 4 \(of a mask: mask.nonzero\(\)\)"):
        C.gradients("loss", samples=samples)
    for ask in (C.row, C.column):
        with pytest.raises(persample.ArgumentError, match="numbers, 0 to 4"):
            ask(samples[0])
    rows = C.gradients("loss").flat()
    for some in ([3, -5], torch.tensor([3, 0]), []):
        assert torch.equal(C.gradients("loss", samples=some).flat(), rows[[3, 0]][: len(some)])


@pytest.mark.parametrize("probes", [0, -1, 2.5, True])
def test_numbers_of_draws(probes: Any) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    C = persample.coupling(model, CE, *data(5, 3))
    for ask in (C.loss_norms, C.outgoing_norms, C.output_input_norms):
        with pytest.raises(persample.ArgumentError, match="probes must be a positive integer"):
            ask(probes=probes)
    with pytest.raises(persample.ArgumentError, match="draws must be a positive integer"):
        C.ggn_diagonal(draws=probes)


class Scaled(nn.Module):
    """An attribute that the forward reads, and one that it counts with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.act, self.drop, self.scale, self.calls = nn.LeakyReLU(0.1), nn.Dropout(0.3), 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.out(self.drop(self.act(self.bn(self.fc(x)) * self.scale)))
        return out


SETTINGS: dict[str, Callable[[Any, Any], None]] = {
    "slope": lambda model, _: setattr(model.act, "negative_slope", 0.5),
    "dropout": lambda model, _: setattr(model.drop, "p", 0.6),
    "criterion": lambda _, criterion: setattr(criterion, "label_smoothing", 0.4),
    "module": lambda model, _: setattr(model, "act", nn.Tanh()),
    "attribute": lambda model, _: setattr(model, "scale", 2.0),
}


@pytest.mark.parametrize("route", ["samples", "statistics"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_belong_to_the_point(setting: str, route: Any) -> None:
    torch.manual_seed(0)
    model, criterion = Scaled().double(), nn.CrossEntropyLoss()
    C = persample.coupling(model, criterion, *data(6, 5), route=route)
    before = C.gradients("copy").flat()
    model(data(6, 5)[0])
    assert torch.equal(C.gradients("copy").flat(), before)
    SETTINGS[setting](model, criterion)
    with pytest.raises(persample.InplaceError, match="changed since the coupling was set up"):
        C.gradients("frozen")


@pytest.mark.parametrize("passes", [0, 2])
def test_running_statistics_belong_to_the_point(passes: int) -> None:
    """Another batch moves them, and stays; the rows are those of before."""
    torch.manual_seed(0)
    model = Scaled().double().train()
    x, y = data(6, 5)
    for _ in range(passes):
        model(x)
    C = persample.coupling(model, CE, x, y)
    first = C.gradients("eval").flat()
    model(3 * x + 2)
    moved = model.bn.running_mean.clone()
    assert torch.equal(C.gradients("eval").flat(), first)
    assert torch.equal(model.bn.running_mean, moved)
    assert not torch.allclose(persample.coupling(model, CE, x, y).gradients("eval").flat(), first)


ASKS: dict[str, Callable[[Coupling], Any]] = {
    "loss": lambda C: C.gradients("loss"),
    "influence": lambda C: C.gradients("influence"),
    "ggn": lambda C: C.ggn(),
    "diagonal": lambda C: C.ggn_diagonal(),
}


@pytest.mark.parametrize("route", ["samples", "statistics"])
@pytest.mark.parametrize("ask", ASKS)
def test_hooks_on_parameters_are_refused(ask: str, route: Any) -> None:
    """They would clip each of several derivatives by itself, and not the gradient of a loss."""
    model = seeded(layered(bn1()))
    x, y = data(6, 5)
    C = persample.coupling(model, CE, x, y, route=route)
    hook = model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    with pytest.raises(persample.CaptureError, match=r"parameter '0\.weight' has a hook"):
        ASKS[ask](C)
    if ask in ("loss", "influence"):
        with pytest.raises(persample.CaptureError, match=r"parameter '0\.weight' has a hook"):
            persample.gradients(model, CE, x, y, coupled=ask)
    persample.gradients(model, CE, x, y, params=["0.bias"], coupled="loss")  # nobody asks for the one with the hook
    hook.remove()
    ASKS[ask](C)


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "step": (lambda model, _: model[0].weight.detach().mul_(2), r"parameter '0\.weight' changed"),
    "mode": (lambda model, _: model.eval(), "the mode of module"),
    "eps": (lambda model, _: setattr(model[1], "eps", 1.0), "the eps of module '1'"),
    "batch": (lambda _, x: x.add_(1), "the batch changed"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ask", [lambda C: C.ggn(), lambda C: C.ggn_diagonal(), lambda C: C.ggn_diagonal(draws=2)])
def test_gauss_newton_belongs_to_the_point(ask: Callable[[Coupling], Any], change: str) -> None:
    model = seeded(layered(bn1()))
    x, y = data(6, 5)
    C = persample.coupling(model, CE, x, y)
    ask(C), model(x)  # a forward pass of the user's is no change
    ask(C)
    act, what = CHANGES[change]
    act(model, x)
    with pytest.raises(persample.InplaceError, match=f"{what}.*since the coupling was set up"):
        ask(C)


def test_gauss_newton_of_a_model_that_counts_its_passes() -> None:
    torch.manual_seed(0)
    C = persample.coupling(Scaled().double(), CE, *data(6, 5))
    first = C.ggn().dense()
    C.norms(), C.ggn_diagonal(draws=2)
    assert torch.equal(C.ggn().dense(), first)


@pytest.mark.parametrize("notion", ["loss", "copy", "frozen", "influence", "eval"])
def test_checkpoints_that_do_not_compare_what_they_save(notion: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        part = lambda x: torch.tanh(m.bn(m.fc(x).unsqueeze(2)).squeeze(2))  # noqa: E731
        return m.out(checkpoint(part, x, use_reentrant=False, determinism_check="none"))

    model = seeded(Fn(run, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)))
    with pytest.raises(persample.CaptureError, match="Turn checkpointing off"):
        persample.gradients(model, CE, *data(6, 5), coupled=notion)


@pytest.mark.parametrize("coupled", ["loss", "copy"])
def test_a_recorder_moves_no_statistics_of_checkpoints(coupled: str) -> None:
    """Every backward pass runs the layer once more."""
    part = lambda m, x: torch.tanh(m.bn(m.fc(x)))  # noqa: E731
    again = lambda m, x: m.out(checkpoint(part, m, x, use_reentrant=False))  # noqa: E731
    model = seeded(Fn(again, fc=nn.Linear(5, 4), bn=bn1(), out=nn.Linear(4, 3)))
    x, y = data(6, 5)
    with persample.extend(model) as recorder:
        losses = F.cross_entropy(model(x), y, reduction="none")
        before = {name: b.clone() for name, b in model.named_buffers()}
        G = recorder.gradients(losses, coupled=coupled)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        losses.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(G[name].sum(0), p.grad, rtol=0, atol=1e-12)
    assert int(model.bn.num_batches_tracked) == 2  # type: ignore[arg-type]  # PyTorch's own, of that backward


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)], ids=["affine", "plain"])
def test_a_layer_in_a_loop_over_samples(norm: nn.Module) -> None:
    """Its statistics are each sample's own, over the positions."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.stack([m.bn(m.conv(t.unsqueeze(0))).squeeze(0) for t in x]).flatten(1))

    model = seeded(Fn(run, conv=nn.Conv2d(2, 3, 2), bn=norm, out=nn.Linear(12, 3)))
    x, y = data(5, 2, 3, 3)
    agrees_with_autograd(persample.coupling(model, CE, x, y), model, x, y)
    rows = persample.gradients(model, CE, x, y, coupled="loss")
    off = persample.gradients(model, CE, x, y, coupled="copy").flat() - rows.flat()
    assert float(off.abs().max()) < 1e-12 < float(rows.norm().min())


class Coarse(nn.Module):
    """A residual network that computes in bfloat16, between a parameter and losses in single precision."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        conv = lambda n: nn.Conv2d(n, width, 3, padding=1, bias=False)  # noqa: E731
        self.first = nn.Sequential(conv(3), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width), nn.BatchNorm2d(width), nn.ReLU(), conv(width), nn.BatchNorm2d(width))
            for _ in range(depth)
        )
        self.out = nn.Linear(width, 10)
        self.bfloat16()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first((self.gain * x).bfloat16())
        for block in self.blocks:
            h = torch.relu(h + block(h))
        out: Tensor = self.out(h.mean((2, 3)))
        return out.float()


@pytest.mark.parametrize("params", [None, ["gain"]])
def test_losses_finer_than_the_network_are_held_to_its_rounding(params: Any) -> None:
    for seed in (0, 5, 6):
        torch.manual_seed(seed)
        C = persample.coupling(Coarse(4, 16), CE, torch.randn(4, 3, 4, 4), torch.arange(4), params=params)
        assert C.coupled
