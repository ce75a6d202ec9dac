"""Scores and their evaluation against direct computations on the rows of the loop engine."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import attribution
from persample.errors import QuantityError

N, M = 7, 4


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def pair(net: nn.Module, **options: Any) -> tuple[Any, Any]:
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return tuple(persample.gradients(net, loss, *batch(n, n), **options) for n in (N, M))  # type: ignore[return-value]


def rows(net: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    train, test = pair(net, engine="loop", **options)
    return train.flat(), test.flat()


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_inner_products() -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    for a, b in ((train, test), (J, H)):
        close(attribution.grad_dot(a, b), J @ H.T)
        close(attribution.grad_cos(a, b), J @ H.T / J.norm(dim=1)[:, None] / H.norm(dim=1))
        close(attribution.self_influence(a), J.square().sum(1))
    assert attribution.grad_cos(torch.zeros(2, 3), torch.ones(1, 3)).tolist() == [[0], [0]]
    with pytest.raises(QuantityError, match="both sides"):
        attribution.grad_dot(train, H)


def test_checkpoints() -> None:
    nets, rates = [model(seed) for seed in (0, 1, 2)], [0.1, 0.2, 0.05]
    both = [rows(net) for net in nets]
    found = attribution.tracin((lr, *pair(net)) for lr, net in zip(rates, nets, strict=True))
    close(found, sum(lr * J @ H.T for lr, (J, H) in zip(rates, both, strict=True)))
    selves = attribution.self_influence((lr, pair(net)[0]) for lr, net in zip(rates, nets, strict=True))
    close(selves, sum(lr * J.square().sum(1) for lr, (J, _) in zip(rates, both, strict=True)))
    with pytest.raises(QuantityError, match="checkpoint"):
        attribution.tracin([])


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_empirical_fisher_influence(damping: float) -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    F = J.T @ J / N + damping * torch.eye(J.shape[1]).double()
    expected = J @ torch.linalg.solve(F, H.T)
    close(attribution.empirical_fisher_influence(train, test, damping=damping), expected)
    close(attribution.empirical_fisher_influence(J, H, damping=damping), expected)
    K, cross = J @ J.T, J @ H.T
    woodbury = (cross - K @ torch.linalg.solve(K + N * damping * torch.eye(N).double(), cross)) / damping
    close(attribution.influence_from_gram(K, cross, damping), woodbury)


def test_influence_from_gram_is_checked() -> None:
    with pytest.raises(ValueError, match="damping"):
        attribution.influence_from_gram(torch.eye(2), torch.eye(2), 0)
    with pytest.raises(QuantityError, match=r"\[n, n\]"):
        attribution.influence_from_gram(torch.eye(3), torch.eye(2), 1)


def test_influence_of_any_curvature() -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    A = torch.randn(J.shape[1], J.shape[1]).double()
    curvature = A @ A.T + torch.eye(len(A)).double()
    close(attribution.influence(train, test, lambda v: torch.linalg.solve(curvature, v)), J @ curvature.inverse() @ H.T)


def test_trak() -> None:
    net, R = model(), attribution.Projection(5)
    (train, test), (J, H) = pair(net, loss=attribution.margin), rows(net, loss=attribution.margin)
    p = net(batch(N, N)[0]).softmax(1).gather(1, batch(N, N)[1][:, None]).squeeze(1).detach()
    close(train.losses, (p / (1 - p)).log())
    close(torch.sigmoid(-train.losses), 1 - p)
    matrix = torch.cat([R.matrix(name, shape).reshape(-1, 5) for name, shape in train.shapes.items()])
    a, b = J @ matrix, H @ matrix
    for damping in (0.0, 0.1):
        expected = torch.diag(1 - p) @ a @ torch.linalg.inv(a.T @ a + damping * torch.eye(5).double()) @ b.T
        close(attribution.trak(train.project(R), test.project(R), 1 - p, damping=damping), expected)


def test_trak_of_several_models() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, q = (torch.rand(3, n, *k, generator=generator).double() for n, k in ((N, (2,)), (M, (2,)), (N, ())))
    kernels = torch.stack([x @ torch.linalg.inv(x.T @ x) @ y.T for x, y in zip(a, b, strict=True)])
    close(attribution.trak(list(a), list(b), list(q)), torch.diag(q.mean(0)) @ kernels.mean(0))


def test_scores_are_positive_where_the_sample_helps() -> None:
    """One small step on a training sample lowers the loss of a test sample by lr times the score, to first order."""
    net, lr = model(), 1e-6
    x, y = batch(N, N)
    u, v = batch(M, M)
    score = attribution.grad_dot(*pair(net))
    before = nn.functional.cross_entropy(net(u), v, reduction="none")
    nn.functional.cross_entropy(net(x[2:3]), y[2:3]).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= lr * p.grad
        after = nn.functional.cross_entropy(net(u), v, reduction="none")
    torch.testing.assert_close((before - after) / lr, score[2], rtol=1e-3, atol=1e-4)


# ---- evaluation -------------------------------------------------------------------------------------------------

values = st.lists(st.integers(-3, 3), min_size=6, max_size=6)  # few values: many ties


@settings(max_examples=50)
@given(values, values)
def test_rank_correlation_and_auc_with_ties(a: list[int], b: list[int]) -> None:
    from persample.attribution.evaluate import ranks, spearman

    x, y = torch.tensor(a).double(), torch.tensor(b).double()
    close(ranks(x), torch.tensor(scipy.stats.rankdata(a)))
    if len(set(a)) > 1 and len(set(b)) > 1:
        close(spearman(x[:, None], y[:, None]), torch.tensor([scipy.stats.spearmanr(a, b).statistic]))
    wrong = torch.tensor([True, False, True, False, False, True])
    assert attribution.mislabel_auc(x, wrong) == pytest.approx(sklearn.metrics.roc_auc_score(wrong, x))


def test_linear_datamodelling_score() -> None:
    scores, subsets, outputs = torch.randn(N, M).double(), torch.rand(9, N) < 0.5, torch.randn(9, M).double()
    found = attribution.linear_datamodelling_score(scores, subsets, outputs)
    for j in range(M):
        predicted = [sum(float(scores[i, j]) for i in range(N) if subsets[s, i]) for s in range(9)]
        assert float(found[j]) == pytest.approx(scipy.stats.spearmanr(predicted, outputs[:, j]).statistic)
    linear = subsets.double() @ scores
    close(attribution.linear_datamodelling_score(scores, subsets, 3 * linear.exp()), torch.ones(M).double())


def test_leave_one_out_correlation() -> None:
    scores, changes = torch.randn(N, M).double(), torch.randn(N, M).double()
    found = attribution.leave_one_out_correlation(scores, changes)
    for j in range(M):
        assert float(found[j]) == pytest.approx(scipy.stats.pearsonr(scores[:, j], changes[:, j]).statistic)
    close(attribution.leave_one_out_correlation(scores, 2 * scores + 1), torch.ones(M).double())


def test_evaluations_check_shapes() -> None:
    with pytest.raises(QuantityError, match="subsets"):
        attribution.linear_datamodelling_score(torch.ones(3, 2), torch.ones(5, 4), torch.ones(5, 2))
    with pytest.raises(QuantityError, match="changes"):
        attribution.leave_one_out_correlation(torch.ones(3, 2), torch.ones(2, 3))
    with pytest.raises(QuantityError, match="both be"):
        attribution.mislabel_auc(torch.ones(3), torch.ones(2))
    with pytest.raises(QuantityError, match="samples that are wrong"):
        attribution.mislabel_auc(torch.ones(3), torch.zeros(3))
