"""The coupling of a network by BatchNorm: every identity, against the network written again with explicit copies."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled_nets import ByCopies, Setup, setups
from torch import Tensor, nn

import persample
from persample import optim
from persample.batchnorm.coupling import Coupling
from persample.batchnorm.network import Route
from persample.gradients import Gradients

TIGHT = 1e-10
ROUTES: list[Route] = ["samples", "statistics"]
NAMES = list(setups)


@cache
def made(name: str) -> tuple[Setup, dict[str, Tensor]]:
    setup = setups[name]()
    return setup, setup.table()


@cache
def coupled(name: str, route: Route | None = None) -> Coupling:
    setup = made(name)[0]
    return persample.coupling(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y, route=route)


def close(actual: Gradients | dict[str, Tensor], expected: dict[str, Tensor], atol: float = TIGHT) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].detach(), value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def flat(rows: dict[str, Tensor], keep: int) -> Tensor:
    return torch.cat([r.flatten(keep) for r in rows.values()], -1)


# ---- the five notions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_rows_are_the_gradients_of_the_losses_of_the_batch(name: str, route: Route) -> None:
    setup, table = made(name)
    G = coupled(name, route).gradients("loss")
    losses = F.cross_entropy(setup.net(setup.x), setup.y, reduction="none")
    parameters = dict(setup.net.named_parameters())
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    close(G, {k: torch.stack(r) for k, r in zip(parameters, zip(*rows, strict=True), strict=True)})
    close(G, {k: t.sum(1) for k, t in table.items()})
    torch.testing.assert_close(G.losses, losses.detach(), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_copy_rows_are_the_derivatives_by_the_copies(name: str) -> None:
    close(coupled(name).gradients("copy"), {k: t.sum(0) for k, t in made(name)[1].items()})


@pytest.mark.parametrize("name", NAMES)
def test_frozen_rows_hold_the_statistics_fixed(name: str) -> None:
    setup = made(name)[0]
    theta = setup.copies()
    rows = torch.autograd.grad(setup.losses(theta, "frozen").sum(), list(theta.values()))
    close(coupled(name).gradients("frozen"), dict(zip(theta, rows, strict=True)))


@pytest.mark.parametrize("name", NAMES)
def test_eval_rows_are_those_of_running_statistics(name: str) -> None:
    setup = setups[name]()
    C = persample.coupling(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y)
    if name == "residual":
        with pytest.raises(persample.PersampleError, match="'bn3' has no running statistics"):
            C.gradients("eval")
        return
    G = C.gradients("eval")
    setup.net.eval()
    expected = persample.gradients(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y, engine="loop")
    close(G, expected.dense())
    torch.testing.assert_close(G.losses, expected.losses)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_influence_rows_are_finite_differences_in_the_weight_of_a_sample(name: str, route: Route) -> None:
    setup = made(name)[0]
    parameters = {k: p.detach().requires_grad_() for k, p in setup.net.named_parameters()}
    n = len(setup.x)

    def gradient(w: Tensor) -> Tensor:
        theta = {k: p.expand(n, *p.shape) for k, p in parameters.items()}
        L = (w * setup.losses(theta, w)).sum() / w.sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(L, list(parameters.values()))])

    ones, eps = torch.ones(n, dtype=torch.float64), 1e-4
    steps = eps * torch.eye(n, dtype=torch.float64)
    slopes = torch.stack([(gradient(ones + e) - gradient(ones - e)) / (2 * eps) for e in steps])
    psi = flat(coupled(name, route).gradients("influence").dense(), 1)
    torch.testing.assert_close(psi, gradient(ones) + n * slopes, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(psi.mean(0), gradient(ones), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_what_sums_to_the_gradient_of_the_batch(name: str) -> None:
    total = {k: t.sum((0, 1)) for k, t in made(name)[1].items()}
    for notion in ("copy", "loss", "influence"):
        close(coupled(name).gradients(notion).sum(), total)
    frozen = coupled(name).gradients("frozen").sum()
    assert max(float((frozen[k] - total[k]).abs().max()) for k in total) > 1e-3


@pytest.mark.parametrize("notion", ["frozen", "copy", "loss", "influence"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_some_samples_only(name: str, notion: str) -> None:
    whole = coupled(name).gradients(notion)
    for route in ROUTES:
        part = coupled(name, route).gradients(notion, samples=[3, 1])
        close(part, {k: v[[3, 1]] for k, v in whole.dense().items()})
        torch.testing.assert_close(part.losses, whole.losses[[3, 1]])


@pytest.mark.parametrize("notion", ["frozen", "copy", "loss", "influence", "eval"])
def test_gradients_with_coupled_is_the_same(notion: str) -> None:
    setup = setups["mlp"]()
    arguments = setup.net, nn.CrossEntropyLoss(), setup.x, setup.y
    close(
        persample.gradients(*arguments, coupled=notion), persample.coupling(*arguments).gradients(notion).dense(), 1e-12
    )


@pytest.mark.parametrize("notion", ["loss", "copy"])
@pytest.mark.parametrize("name", NAMES)
def test_by_a_recorder(name: str, notion: str) -> None:
    """The same rows from the losses of an ordinary forward, whose running statistics and graph are left alone."""
    setup = setups[name]()
    want = persample.coupling(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y).gradients(notion)
    buffers = {name: b.clone() for name, b in setup.net.named_buffers()}
    with persample.extend(setup.net) as recorder:
        losses = F.cross_entropy(setup.net(setup.x), setup.y, reduction="none")
        after = {name: b.clone() for name, b in setup.net.named_buffers()}
        with pytest.raises(persample.BatchCoupledError, match=r"gradients\(losses, coupled="):
            recorder.gradients(losses)
        G = recorder.gradients(losses, coupled=notion)
        S = recorder.gradients(losses, quantities=["gram", "sum"], coupled=notion)
        losses.sum().backward()
    close(G, want.dense())
    torch.testing.assert_close(S.gram(), want.gram(), rtol=0, atol=TIGHT)
    close(S.sum(), {name: p.grad for name, p in setup.net.named_parameters() if p.grad is not None})
    assert G.note == S.note == f"coupled={notion!r}" and G.unused == want.unused
    assert any(not torch.equal(b, buffers[k]) for k, b in after.items()) or not buffers
    assert all(torch.equal(b, after[k]) for k, b in setup.net.named_buffers())


@pytest.mark.parametrize("notion", ["loss", "copy", "influence", "frozen", "eval"])
@pytest.mark.parametrize("quantities", [None, ["mean"]])
def test_backward_writes_the_gradient_or_says_that_it_can_not(notion: str, quantities: Any) -> None:
    setup = setups["mlp"]()
    own, n = dict(setup.net.named_parameters()), len(setup.x)
    ask = partial(persample.gradients, setup.net, nn.CrossEntropyLoss(), setup.x, setup.y, coupled=notion, verify=False)
    G, weight = ask(quantities=quantities), torch.linspace(0, 1, n, dtype=torch.float64)
    losses = F.cross_entropy(setup.net(setup.x), setup.y, reduction="none")
    for w in (None, torch.full_like(weight, 0.5), weight) if quantities is None else (None,):
        setup.net.zero_grad()
        if notion == "frozen" or (notion in ("copy", "influence") and w is weight):
            with pytest.raises(persample.BatchCoupledError, match=rf"coupled='{notion}' don't add up.*'loss'"):
                G.backward(w)
            assert all(p.grad is None for p in own.values())
        elif notion == "eval":
            with pytest.warns(UserWarning, match="running statistics.*not of the one"):
                G.backward(w)
        else:
            G.backward(w)
            want = torch.autograd.grad(
                (losses / n if w is None else losses * w).sum(), [*own.values()], retain_graph=True
            )
            close({name: p.grad for name, p in own.items()}, dict(zip(own, want, strict=True)))


def test_rows_that_do_not_add_up_are_no_direction_of_a_step() -> None:
    setup = setups["mlp"]()
    own = list(setup.net.named_parameters())
    coupling = persample.coupling(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y)
    steps: list[Any] = [
        optim.PerSampleAdam(own),
        optim.NaturalGradient(own, lr=0.1, damping=0.1),
        optim.GradientSurgery(own, optim.pcgrad_weights, lr=0.1),
    ]
    frozen, loss, copied = (coupling.gradients(notion) for notion in ("frozen", "loss", "copy"))
    for opt in steps:
        with pytest.raises(persample.BatchCoupledError, match="coupled='frozen' don't add up"):
            opt.step(frozen)
        opt.step(loss)
    uneven = optim.GradientSurgery(own, lambda K: torch.linspace(0, 1, len(K), dtype=K.dtype), lr=0.1)
    with pytest.raises(persample.BatchCoupledError, match="with these weights, rows of coupled='copy'"):
        uneven.step(copied)


def test_parts_of_a_coupled_batch_are_no_gradient_of_it() -> None:
    setup = setups["mlp"]()
    coupling = persample.coupling(setup.net, nn.CrossEntropyLoss(), setup.x, setup.y)
    parts = [coupling.via_statistics(), coupling.row(0), coupling.column(1), coupling.T @ torch.ones_like(setup.y)]
    parts += [coupling.gradients(notion, [0, 2]) for notion in ("copy", "influence")]
    for G in parts:
        with pytest.raises(persample.BatchCoupledError, match="don't add up"):
            G.backward()
        with pytest.raises(persample.BatchCoupledError, match="don't add up"):
            optim.PerSampleAdam(setup.net.named_parameters()).step(G)
    assert all(p.grad is None for p in setup.net.parameters())
    coupling.gradients("copy", range(len(setup.x))).backward()  # all of them
    coupling.gradients("loss", [0, 2]).backward()  # the gradient of these losses


def test_notions_that_a_recorder_does_not_have() -> None:
    setup = setups["mlp"]()
    with persample.extend(setup.net) as recorder:
        losses = F.cross_entropy(setup.net(setup.x), setup.y, reduction="none")
        for notion in ("influence", "eval", "frozen", "los"):
            with pytest.raises(persample.ArgumentError, match="'loss' or 'copy'"):
                recorder.gradients(losses, coupled=notion)
        losses.sum().backward()
        with pytest.raises(persample.CaptureError, match="freed the graph"):
            recorder.gradients(losses, coupled="loss")


# ---- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_table_entries_rows_columns_and_norms(name: str) -> None:
    table, C = made(name)[1], coupled(name)
    close(C.row(1), {k: t[1] for k, t in table.items()})
    close(C.entry(2, 4), {k: t[2, 4] for k, t in table.items()})
    assert list(C.entry(2, 4)) == list(C.gradients("loss").names)
    for route in ROUTES:
        close(coupled(name, route).column(-2), {k: t[:, -2] for k, t in table.items()})
    close(C.norms(per_parameter=True), {k: t.flatten(2).norm(dim=2) for k, t in table.items()})
    torch.testing.assert_close(C.norms(), flat(table, 2).norm(dim=2), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_table_is_a_linear_operator(name: str) -> None:
    table, C = made(name)[1], coupled(name)
    generator = torch.Generator().manual_seed(1)
    v = {k: torch.randn(t.shape[2:], generator=generator, dtype=t.dtype) for k, t in table.items()}
    V = {k: torch.randn(t.shape[1:], generator=generator, dtype=t.dtype) for k, t in table.items()}
    w = torch.randn(len(C), generator=generator, dtype=torch.float64)
    along = sum((t * v[k]).flatten(1).sum(1) for k, t in table.items())
    torch.testing.assert_close(C @ v, along, rtol=0, atol=TIGHT)
    torch.testing.assert_close(C @ flat(v, 0), along, rtol=0, atol=TIGHT)
    torch.testing.assert_close(C @ V, sum((t * V[k]).flatten(1).sum(1) for k, t in table.items()), rtol=0, atol=TIGHT)
    close(C.T @ w, {k: torch.tensordot(w, t, 1) for k, t in table.items()})


@pytest.mark.parametrize("name", ["mlp", "residual", "reused"])
def test_input_and_output_norms(name: str) -> None:
    setup, C = made(name)[0], coupled(name)
    x = setup.x.clone().requires_grad_()
    theta = {k: p.detach() for k, p in setup.copies().items()}
    f = ByCopies(setup.net, theta)(x)
    J = torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in f.flatten()]).unflatten(0, f.shape)
    torch.testing.assert_close(C.output_input_norms(), J.flatten(3).square().sum((1, 3)).sqrt(), rtol=0, atol=TIGHT)
    slope = f.detach().softmax(1) - F.one_hot(setup.y, f.shape[1])
    torch.testing.assert_close(
        C.input_norms(), torch.einsum("no,nom...->nm...", slope, J).flatten(2).norm(dim=2), rtol=0, atol=TIGHT
    )
    estimate = C.output_input_norms(probes=400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, C.output_input_norms(), rtol=0.15, atol=1e-3)


def test_sketched_norms() -> None:
    C = coupled("mlp")
    torch.testing.assert_close(C.loss_norms(300, torch.Generator().manual_seed(0)), C.loss_norms(), rtol=0.15, atol=0)
    torch.testing.assert_close(
        C.outgoing_norms(300, torch.Generator().manual_seed(0)), C.outgoing_norms(), rtol=0.15, atol=0
    )
    torch.testing.assert_close(C.outgoing_norms(), C.norms().square().sum(0).sqrt(), rtol=0, atol=TIGHT)
    torch.testing.assert_close(C.loss_norms(), flat(made("mlp")[1], 2).sum(1).norm(dim=1), rtol=0, atol=TIGHT)


# ---- through the statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_influence_of_statistics_is_the_derivative_in_the_weights(name: str, route: Route) -> None:
    setup, C = made(name)[0], coupled(name, route)
    w = torch.ones(len(setup.x), dtype=torch.float64, requires_grad=True)
    losses = setup.losses({k: p.detach() for k, p in setup.copies().items()}, w)
    T = torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses])
    torch.testing.assert_close(C.statistic_influence(), T, rtol=0, atol=TIGHT)
    assert float(C.statistic_influence().sum(1).abs().max()) < 1e-14
    torch.testing.assert_close(C.effective_losses(), C.losses + T.sum(0), rtol=0, atol=TIGHT)
    torch.testing.assert_close(C.effective_losses().mean(), C.losses.mean(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "reused", "branches"])
def test_adjoints_are_rescaled_gradients_of_gain_and_bias(name: str) -> None:
    """``lambda_mu = -(gamma/s) dl/dbeta``, ``lambda_v = -(gamma/2s^2) dl/dgamma``; calls of one module add up."""
    setup, C = made(name)[0], coupled(name)
    G, adjoints = C.gradients("loss"), C.adjoints()
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        getattr(setup.net, k).register_forward_pre_hook(
            lambda _, args, k=k: seen.setdefault(k, []).append(args[0].detach())
        )
        for k in {layer.split("#")[0] for layer in adjoints}
    ]
    setup.net(setup.x)
    for hook in hooks:
        hook.remove()
    T = torch.zeros(len(C), len(C), dtype=torch.float64)
    for module, inputs in seen.items():
        bn = getattr(setup.net, module)
        beta = gamma = 0.0
        for x, layer in zip(inputs, [layer for layer in adjoints if layer.split("#")[0] == module], strict=True):
            mean, variance = adjoints[layer]
            s = (x.var(0, correction=0) + bn.eps).sqrt()
            xh = (x - x.mean(0)) / s
            beta = beta - mean * s / bn.weight.detach()
            gamma = gamma - 2 * variance * s.square() / bn.weight.detach()
            own = mean @ (x - x.mean(0)).T + variance @ ((x - x.mean(0)).square() - x.var(0, correction=0)).T
            T += own / len(C)
            if len(inputs) == 1:  # T in gradients of gain and bias, for one call
                direct = -(bn.weight * G[f"{module}.bias"]) @ xh.T
                direct -= 0.5 * (bn.weight * G[f"{module}.weight"]) @ (xh.square() - 1 + bn.eps / s.square()).T
                torch.testing.assert_close(own, direct.detach(), rtol=0, atol=TIGHT)
        torch.testing.assert_close(beta, G[f"{module}.bias"], rtol=0, atol=TIGHT)
        torch.testing.assert_close(gamma, G[f"{module}.weight"], rtol=0, atol=TIGHT)
    torch.testing.assert_close(C.statistic_influence(), T, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_last_layer_adjoints_come_from_the_frozen_pass(name: str) -> None:
    C = coupled(name, "samples")
    last = list(C.layers)[-1]
    u = C.network.by_node(C.network.u)[-1]
    torch.testing.assert_close(torch.cat(C.adjoints()[last], 1), u, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_adjoints_agree_by_both_routes(name: str) -> None:
    a, b = (coupled(name, route).network.adjoints for route in ROUTES)
    torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)
    torch.testing.assert_close(a.sum(0), coupled(name).network.structure.total, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_split_into_direct_and_through_each_layer(name: str) -> None:
    C = coupled(name)
    loss, frozen, through = (G.dense() for G in (C.gradients("loss"), C.gradients("frozen"), C.via_statistics()))
    close({k: frozen[k] + through[k] for k in loss}, loss)
    layers = [C.via_statistics(layer).dense() for layer in C.layers]
    close({k: sum(part[k] for part in layers) for k in loss}, through)


def test_bias_before_batchnorm() -> None:
    """Exactly without effect on any loss of the batch; by copies and frozen statistics it seems to have one."""
    C = coupled("mlp", "samples")
    for bias in ("fc1.bias", "fc2.bias"):
        assert float(C.gradients("loss")[bias].abs().max()) < 1e-15
        assert float(C.gradients("copy")[bias].abs().max()) > 1e-2
        assert float(C.gradients("frozen")[bias].abs().max()) > 1e-2
        torch.testing.assert_close(
            C.gradients("copy")[bias].sum(0),
            torch.zeros(len(C.gradients("copy")[bias][0]), dtype=torch.float64),
            rtol=0,
            atol=1e-14,
        )


def test_scale_invariance_law() -> None:
    """``<w_c, dl_n/dw_c> = eps/(v_c + eps) gamma_c dl_n/dgamma_c`` for every single loss; not so by copies."""
    setup, C = made("mlp")[0], coupled("mlp")
    x = setup.x
    for fc, bn in (("fc1", "bn1"), ("fc2", "bn2")):
        layer, norm = getattr(setup.net, fc), getattr(setup.net, bn)
        z = layer(x).detach()
        x = torch.relu(norm(z)).detach()
        shrink = norm.eps / (z.var(0, correction=0) + norm.eps)
        for notion in ("loss", "copy"):
            G = C.gradients(notion)
            left = (G[f"{fc}.weight"] * layer.weight.detach()).sum(2) + G[f"{fc}.bias"] * layer.bias.detach()
            off = float((left - shrink * norm.weight.detach() * G[f"{bn}.weight"]).abs().max())
            assert off < TIGHT if notion == "loss" else off > 1e-2


# ---- without a sample ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_leave_one_out_is_exact(name: str) -> None:
    setup, C = made(name)[0], coupled(name)
    theta = {k: p.detach() for k, p in setup.copies().items()}
    exact = C.leave_one_out(exact=True)
    for m in range(len(C)):
        w = torch.ones(len(C), dtype=torch.float64)
        w[m] = 0
        torch.testing.assert_close(exact[:, m], setup.losses(theta, w) - C.losses, rtol=0, atol=TIGHT)
    torch.testing.assert_close(C.leave_one_out(), -C.statistic_influence(), rtol=0, atol=0)
    with pytest.raises(persample.errors.ArgumentError, match=r"exact must be True or False, got 3; .* column \[:, m\]"):
        C.leave_one_out(3)  # type: ignore[arg-type]


def big_mlp(n: int) -> Coupling:
    setup = setups["mlp"]()
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    x += torch.rand(n, 1, generator=generator, dtype=torch.float64) > 0.8
    return persample.coupling(setup.net, nn.CrossEntropyLoss(), x, (x[:, 0] > 0).long())


def test_leave_one_out_estimates_and_jackknife_converge() -> None:
    """``phi`` is the jackknife pseudo-value ``N L - (N-1) L_-m`` of the batch loss up to ``1/N``; the loss is not."""
    errors, off = [], []
    for n in (16, 64, 256):
        C = big_mlp(n)
        exact = C.leave_one_out(exact=True)
        errors.append(float((C.leave_one_out() - exact).norm() / exact.norm()))
        without = C.losses[:, None] + exact
        L = (without.sum(0) - without.diagonal()) / (n - 1)
        pseudo = n * C.losses.mean() - (n - 1) * L
        off.append(float((pseudo - C.effective_losses()).square().mean().sqrt()))
        assert float((pseudo - C.losses).square().mean().sqrt()) > 0.1
    assert errors[2] < 0.6 * errors[1] < 0.6**2 * errors[0] < 0.1
    assert off[2] < 0.4 * off[1] < 0.4**2 * off[0] < 0.01


def test_data_coupling_falls_with_the_batch_and_theta_coupling_does_not() -> None:
    data, theta = [], []
    for n in (16, 64):
        C = big_mlp(n)
        data.append(float(C.input_norms().fill_diagonal_(0).sum() / (n * (n - 1))))
        theta.append(float(C.theta_coupling().mean()))
    assert 0.15 < data[1] / data[0] < 0.35
    assert 0.7 < theta[1] / theta[0] < 1.4


def test_only_influence_predicts_the_noise_of_batches() -> None:
    """Against the covariance of gradients of independent batches; the others' estimates are given and biased."""
    setup = setups["mlp"]()
    with torch.no_grad():
        setup.net.out.weight.mul_(2)
    generator = torch.Generator().manual_seed(0)
    n, pool = 64, 4096
    x = torch.randn(pool, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (pool,), generator=generator)
    grads = []
    for _ in range(600):
        some = torch.randint(pool, (n,), generator=generator)
        loss = F.cross_entropy(setup.net(x[some]), y[some])
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(setup.net.parameters()))]))
    true = float(torch.stack(grads).var(0).sum()) * n
    some = torch.randint(pool, (1024,), generator=generator)
    noise = persample.coupling(setup.net, nn.CrossEntropyLoss(), x[some], y[some]).noise()
    assert abs(noise["influence"].trace / true - 1) < 0.15
    assert abs(noise["copy"].trace / true - 1) > 0.25
    assert noise["influence"].squared_mean == pytest.approx(noise["copy"].squared_mean)


# ---- curvature ------------------------------------------------------------------------------------------------------


def output_jacobian(setup: Setup) -> Tensor:
    f = setup.net(setup.x)
    parameters = list(setup.net.parameters())
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in f.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).unflatten(0, f.shape)


@pytest.mark.parametrize("name", ["mlp", "reused"])
def test_gauss_newton_keeps_the_sum_over_outputs(name: str) -> None:
    setup, C = made(name)[0], coupled(name)
    J, p = output_jacobian(setup), C.outputs.softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("noi,nop,npj->ij", J, H, J) / len(C)
    torch.testing.assert_close(C.ggn().dense(), G, rtol=0, atol=TIGHT)
    exact = flat(C.ggn_diagonal(reduction="sum"), 0)
    torch.testing.assert_close(exact, len(C) * G.diagonal(), rtol=0, atol=TIGHT)
    mc = flat(C.ggn_diagonal(draws=1000, generator=torch.Generator().manual_seed(0)), 0)
    assert not torch.equal(*(flat(C.ggn_diagonal(draws=1), 0) for _ in range(2)))  # new draws every time
    assert float((mc - G.diagonal()).norm() / G.diagonal().norm()) < 0.15
    theta = setup.copies()
    D = torch.stack([  # at fixed statistics the samples' own Jacobians
        flat(dict(zip(theta, torch.autograd.grad(y.sum(), list(theta.values()), retain_graph=True), strict=True)), 1)
        for y in ByCopies(setup.net, theta, "frozen")(setup.x).T
    ], 1)  # fmt: skip
    fixed = torch.einsum("noi,nop,npj->ij", D, H, D) / len(C)
    difference = torch.linalg.matrix_rank(G - fixed, rtol=1e-9)
    assert 0 < int(difference) <= 2 * C.network.structure.size
    assert float((G - fixed).norm() / G.norm()) > 0.1
