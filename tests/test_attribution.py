"""Scores and their evaluation against direct computations on the rows of the loop engine."""

from __future__ import annotations

from collections import UserDict, deque
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import attribution, curvature
from persample.errors import ArgumentError, DirectionError, LossError, QuantityError

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


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_features_of_half_precision_are_multiplied_in_float32(kind: torch.dtype, size: float) -> None:
    """Squares that half precision has no numbers for: too small, or too large."""
    torch.manual_seed(0)
    a, b = (torch.randn(N, 64) * size).to(kind), (torch.randn(M, 64) * size).clamp(-6e4, 6e4).to(kind)
    a = a.clamp(-6e4, 6e4)
    J, H = a.double(), b.double()
    for found, expected in (
        (attribution.grad_dot(a, b), J @ H.T),
        (attribution.grad_cos(a, b), J @ H.T / J.norm(dim=1)[:, None] / H.norm(dim=1)),
        (attribution.self_influence(a), J.square().sum(1)),
        (attribution.tracin([(0.5, a, b)]), J @ H.T / 2),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cosines_of_very_small_and_very_large_rows(size: float) -> None:
    x = torch.randn(N, 5)
    torch.testing.assert_close(attribution.grad_cos(x * size, x), attribution.grad_cos(x, x), rtol=1e-5, atol=1e-5)


def test_a_cosine_with_nan_is_nan() -> None:
    x = torch.tensor([[1.0, torch.nan], [3.0, 4.0], [0.0, 0.0]])
    found = attribution.grad_cos(x, x[1:2])
    assert found[0].isnan() and found[1:, 0].tolist() == pytest.approx([1, 0])


def test_features_that_do_not_fit_are_refused() -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    for score in (attribution.grad_dot, attribution.grad_cos):
        with pytest.raises(QuantityError, match=f"{J.shape[1]} features and test 3"):
            score(J, H[:, :3])
        with pytest.raises(QuantityError, match=r"train must be real features \[n, k\]"):
            score(J[0], H)
        with pytest.raises(QuantityError, match="int64"):
            score(J.long(), H)
        with pytest.raises(QuantityError, match=r"test must be features .*list"):
            score(J, H.tolist())
        close(score(J.float(), H), score(J.float().double(), H))
    for wrong in (J, None):
        with pytest.raises(QuantityError, match="must be Gradients"):
            attribution.influence(train, wrong, lambda v: v)
    statistics = persample.gradients(net, nn.CrossEntropyLoss(), *batch(M, M), quantities=["norm"])
    with pytest.raises(QuantityError, match="must be Gradients"):
        attribution.influence(train, statistics, lambda v: v)
    with pytest.raises(QuantityError, match="needs the rows of train"):
        attribution.influence(statistics, test, lambda v: v)
    with pytest.raises(QuantityError, match="different parameters"):
        attribution.influence(train.select("0"), test.select("2"), lambda v: v)
    with pytest.raises(QuantityError, match=r"solve must return .*\[31, 4\], got \[31, 1\]"):
        attribution.influence(train, test, lambda v: v[:, :1])


def test_checkpoints() -> None:
    nets, rates = [model(seed) for seed in (0, 1, 2)], [0.1, 0.2, 0.05]
    both = [rows(net) for net in nets]
    found = attribution.tracin((lr, *pair(net)) for lr, net in zip(rates, nets, strict=True))
    close(found, sum(lr * J @ H.T for lr, (J, H) in zip(rates, both, strict=True)))
    selves = attribution.self_influence((lr, pair(net)[0]) for lr, net in zip(rates, nets, strict=True))
    close(selves, sum(lr * J.square().sum(1) for lr, (J, _) in zip(rates, both, strict=True)))
    with pytest.raises(QuantityError, match="checkpoint"):
        attribution.tracin([])
    J, H = both[0]
    close(attribution.tracin([(torch.tensor(0.5).double(), J, H)]), J @ H.T / 2)
    for wrong in ([(0.1, J)], [J, H], [pair(nets[0])[0]]):
        with pytest.raises(ArgumentError, match=r"tuple \(lr, train, test\)"):
            attribution.tracin(wrong)  # type: ignore[arg-type]
    for two in ([J, J], [J[:2]], [pair(nets[0])[0]] * 2):  # of two rows: a pair, to who unpacks it
        with pytest.raises(ArgumentError, match=r"tuple \(lr, train\)"):
            attribution.self_influence(two)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not one alone"):
        attribution.tracin(J)  # type: ignore[arg-type]
    for lr in (torch.nan, "0.1", J):
        with pytest.raises(ArgumentError, match="lr of a checkpoint"):
            attribution.tracin([(lr, J, H)])  # type: ignore[list-item]
    with pytest.raises(QuantityError, match="different samples"):
        attribution.tracin([(0.1, J, H), (0.1, J[:1], H)])  # [1, M] would be added to every row


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
    for wrong in (torch.nan, torch.inf, "1", None):
        with pytest.raises(ArgumentError, match="damping must be positive"):
            attribution.influence_from_gram(torch.eye(2), torch.eye(2), wrong)  # type: ignore[arg-type]
    for cross in (torch.eye(2), torch.ones(3)):
        with pytest.raises(QuantityError, match=r"\[n, n\]"):
            attribution.influence_from_gram(torch.eye(3), cross, 1)
    with pytest.raises(QuantityError, match="not positive definite"):
        attribution.influence_from_gram(-torch.eye(2), torch.eye(2), 0.1)
    overflowed = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]]).half()
    with pytest.raises(QuantityError, match="K holds numbers that are infinite"):
        attribution.empirical_fisher_influence(overflowed, overflowed, damping=0.1)
    large = torch.tensor([[3e4, 1.0], [1.0, 2.0]]).half()
    expected = attribution.empirical_fisher_influence(large.double(), large.double(), damping=0.1)
    found = attribution.empirical_fisher_influence(large, large, damping=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_influence_of_any_curvature() -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    A = torch.randn(J.shape[1], J.shape[1]).double()
    matrix = A @ A.T + torch.eye(len(A)).double()
    close(attribution.influence(train, test, lambda v: torch.linalg.solve(matrix, v)), J @ matrix.inverse() @ H.T)


def test_a_matrix_is_no_solve_and_the_error_says_what_is() -> None:
    net = model()
    (train, test), (J, H) = pair(net), rows(net)
    K, op = (make(net, nn.CrossEntropyLoss(), *batch(N, N)) for make in (curvature.kfac, curvature.ggn))
    for wrong in (K, K.solve):
        with pytest.raises(ArgumentError, match=r"lambda columns: K\.solve\(columns, damping=1e-3\)"):
            attribution.influence(train, test, wrong)
    with pytest.raises(ArgumentError, match=r"lambda columns: torch\.linalg\.solve\(K\.dense\(\) \+ damping"):
        attribution.influence(train, test, op)
    D = len(H.T)
    scores = attribution.influence(
        train, test, lambda c: torch.linalg.solve(op.dense() + 1e-3 * torch.eye(D).double(), c)
    )
    close(scores, J @ (op.dense() + 1e-3 * torch.eye(D).double()).inverse() @ H.T)


def test_curvature_of_some_parameters_says_which() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    (train, test), K = pair(net), curvature.kfac(net, nn.CrossEntropyLoss(), *batch(N, N))
    with pytest.raises(DirectionError, match=r"'0\.weight', .*'2\.bias', without '1\.weight', '1\.bias'.*G\.select"):
        attribution.influence(train, test, lambda columns: K.solve(columns, damping=1e-3))
    chosen = train.select(K.names), test.select(K.names)
    scores = attribution.influence(*chosen, lambda columns: K.solve(columns, damping=1e-3))
    damped = K.dense() + 1e-3 * torch.eye(K.shape[0]).double()
    close(scores, chosen[0].flat() @ damped.inverse() @ chosen[1].flat().T)


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
    for several in (list, iter, deque):
        close(attribution.trak(*map(several, (a, b, q))), torch.diag(q.mean(0)) @ kernels.mean(0))


def spectrum(n: int, k: int, values: Tensor) -> Tensor:
    """A matrix ``[n, k]`` of these singular values."""
    generator = torch.Generator().manual_seed(n)
    left, right = (torch.linalg.qr(torch.randn(m, m, generator=generator).double())[0] for m in (n, k))
    return left[:, : len(values)] * values @ right[: len(values)]


def test_trak_of_fewer_samples_than_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A singular ``Phi^T Phi``: the pseudo-inverse; ``Phi Phi^T`` is well-conditioned, so it is got from that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(70, 12).double(), torch.randint(3, (70,))
    G = persample.gradients(net, attribution.margin, x, y)
    features, q = G.project(attribution.Projection(128)), torch.sigmoid(-G.losses)[:60]
    P, Q = features[:60], features[60:]
    expected = P @ torch.linalg.pinv(P) @ torch.linalg.pinv(P.T) @ Q.T
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("the slow path"))
    close(attribution.trak(P, Q, q), q[:, None] * expected)
    for damping in (1e-3, 1.0):
        expected = P @ torch.linalg.solve(P.T @ P + damping * torch.eye(128).double(), Q.T)
        close(attribution.trak(P, Q, q, damping=damping), q[:, None] * expected)


@pytest.mark.parametrize("n, k", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-8, 0.0])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3])
def test_trak_of_any_spectrum(n: int, k: int, smallest: float, damping: float) -> None:
    """Against the singular values that the matrix was made with; also where ``Phi^T Phi`` has lost the smallest."""
    values = torch.tensor([1, 0.5, 0.1, 0.1, smallest]).double()
    a, b = spectrum(n, k, values), torch.randn(M, k, generator=torch.Generator().manual_seed(0)).double()
    inverse = torch.where(values > 0, values / (values.square() + damping), 0.0)
    expected = spectrum(n, k, inverse) @ b.T
    found = attribution.trak(a, b, torch.ones(n).double(), damping=damping)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_trak_tells_rank_from_rounding_errors() -> None:
    """What is nothing in float32 is dropped, what can be told is kept, and in between there is no answer."""
    ones, b = torch.ones(12), torch.eye(7)
    for smallest, meant in ((1e-9, 0.0), (1e-4, 1e4)):
        values = torch.tensor([1, 0.5, smallest]).double()
        expected = spectrum(12, 7, torch.tensor([1, 2, meant]).double())
        found = attribution.trak(spectrum(12, 7, values).float(), b, ones)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-2 * float(expected.abs().max()))
    unclear = spectrum(12, 7, torch.tensor([1, 0.5, 1.5e-6]).double()).float()
    with pytest.raises(QuantityError, match="larger damping="):
        attribution.trak(unclear, b, ones)
    assert attribution.trak(unclear, b, ones, damping=1e-3).isfinite().all()
    assert not attribution.trak(torch.zeros(3, 2), torch.ones(1, 2), torch.ones(3)).any()


def test_trak_is_checked() -> None:
    a, b, q = torch.randn(N, 3).double(), torch.randn(M, 3).double(), torch.rand(N).double()
    for wrong in (q[:, None], q[:1], q[None], q.long(), q.tolist()[0]):
        with pytest.raises(QuantityError, match=rf"residual must be \[n_train\] = \[{N}\]"):
            attribution.trak([a], [b], [wrong])  # type: ignore[list-item]
    with pytest.raises(QuantityError, match="residual"):
        attribution.trak(a, b, q[:, None])
    for three in (([a], b, q), (a, [b], [q]), ([a, a], [b, b], [q]), ([a], [b, b], [q]), ([], [], [])):
        with pytest.raises(ArgumentError, match="a tensor each"):
            attribution.trak(*three)  # type: ignore[arg-type]
    train, test = pair(model(), loss=attribution.margin)
    with pytest.raises(QuantityError, match=r"train must be features .*G\.project"):
        attribution.trak(train, test, q)
    with pytest.raises(QuantityError, match="same samples for all models"):
        attribution.trak([a, a[:2]], [b, b], [q, q[:2]])
    with pytest.raises(QuantityError, match="3 features and test 2"):
        attribution.trak(a, b[:, :2], q)
    for x, y, z in ((a / 0, b, q), (a, b / 0, q), (a, b, q * torch.nan)):
        with pytest.raises(QuantityError, match="infinite or NaN"):
            attribution.trak(x, y, z)
    for damping in (-1.0, torch.nan, torch.inf, "0"):
        with pytest.raises(ArgumentError, match="damping"):
            attribution.trak(a, b, q, damping=damping)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_evaluations_refuse_what_is_not_finite(bad: float) -> None:
    scores, outputs, subsets = torch.rand(6, 2), torch.rand(5, 2), torch.rand(5, 6) < 0.5
    broken = scores.clone()
    broken[3, 1] = bad
    for call in (
        lambda: attribution.mislabel_auc(broken[:, 1], torch.arange(6) < 2),
        lambda: attribution.linear_datamodelling_score(broken, subsets, outputs),
        lambda: attribution.leave_one_out_correlation(broken, scores),
    ):
        with pytest.raises(QuantityError, match="scores must be finite, but 1 of"):
            call()
    with pytest.raises(QuantityError, match="outputs must be finite"):
        attribution.linear_datamodelling_score(scores, subsets, outputs + bad)
    with pytest.raises(QuantityError, match="changes must be finite"):
        attribution.leave_one_out_correlation(scores, scores + bad)


def test_evaluations_refuse_indices_for_bools() -> None:
    with pytest.raises(QuantityError, match="wrong must be bools"):
        attribution.mislabel_auc(torch.rand(3), torch.tensor([0, 1, 2]))
    with pytest.raises(QuantityError, match="subsets must be bools"):
        attribution.linear_datamodelling_score(torch.rand(3, 1), torch.tensor([[0, 1, 2]]), torch.rand(1, 1))


def test_correlations_with_a_constant_are_nan() -> None:
    """Also where its mean is another number than it is, by rounding."""
    constant, scores = torch.full((3, 1), 0.1, dtype=torch.float64), torch.randn(3, 1).double()
    assert (constant - constant.mean(0)).any()
    assert attribution.leave_one_out_correlation(scores, constant).isnan().all()
    assert attribution.leave_one_out_correlation(constant, scores).isnan().all()


@pytest.mark.parametrize("shape", [(6, 1), (6,), (6, 3, 2)])
def test_a_margin_is_over_other_classes(shape: tuple[int, ...]) -> None:
    with pytest.raises(LossError, match=rf"two classes or more, got shape .*{shape[-1]}\]"):
        attribution.margin(torch.randn(shape), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("targets", [torch.zeros(6), torch.zeros(6, 1, dtype=torch.long)])
def test_a_margin_is_of_classes(targets: Tensor) -> None:
    with pytest.raises(LossError, match=r"classes of N = 6 samples, \[N\] and integers, got targets of shape \[6"):
        attribution.margin(torch.randn(6, 3), targets)


def test_what_tokenizers_return_is_known_again(tmp_path: Path) -> None:
    """A mapping that is no dict: other texts with the same labels are other test samples."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.table(input_ids).mean(1))

    def texts(seed: int) -> UserDict[str, Tensor]:
        drawn = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(seed))
        return UserDict({"input_ids": drawn})

    model, criterion, y = Bag(), nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0])
    train = [(texts(1), y), (texts(2), y)]
    first = attribution.cross_gram(model, criterion, train, [(texts(3), y)], out=tmp_path / "a").clone()
    again = attribution.cross_gram(model, criterion, train, [(texts(3), y)], out=tmp_path / "a")
    assert torch.equal(first, again)
    with pytest.raises(persample.errors.StoreError):
        attribution.cross_gram(model, criterion, train, [(texts(4), y)], out=tmp_path / "a")
