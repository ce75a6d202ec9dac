"""Numbers of all samples together that act on single ones are coupling that shows without running anything twice: also
where nothing is verified, as in a handle that reports backward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N, D = 5, 6
OPS = torch.ops.aten
Y = torch.arange(N) % 3


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


class Between(nn.Module):
    """Two layers, with a function of the batch between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(D, D), nn.Linear(D, 3), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)))
        return out


class Weighted(Between):
    """The same, where the function is of the inputs, and gives weights."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x) * self.function(x))
        return out


def written(h: Tensor) -> Tensor:
    """A mean, one entry of which is written once more."""
    mean = h.mean(0).clone()
    mean[0] = h[:, 0].mean()
    return mean


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda h: h - h.mean(0),
    "in_place": lambda h: h.clone().sub_(h.mean(0, keepdim=True)),
    "normalised": lambda h: (h - h.mean(dim=0)) / (h.var(0, unbiased=False) + 1e-3).sqrt(),
    "std": lambda h: h / torch.std(h, 0),
    "norm": lambda h: h / h.norm(2, 0),
    "vector_norm": lambda h: h / torch.linalg.vector_norm(h),
    "one_number": lambda h: h * h.sum(),
    "nested": lambda h: h * h.square().sum((0, 1)).sqrt().exp(),
    "leave_one_out": lambda h: (h.sum(0) - h) / (N - 1),
    "expanded": lambda h: h + h.mean(0).expand_as(h),
    "joined": lambda h: torch.cat([h[:, :3], h.mean(0, keepdim=True).expand(N, -1)[:, 3:]], 1),
    "where": lambda h: torch.where(h > 0, h, h.mean(0)),
    "normalize": lambda h: F.normalize(h, dim=0),
    "softmax": lambda h: h * h.softmax(0),
    "log_softmax": lambda h: h * F.log_softmax(h, dim=-2),
    "softmax of torch.special": lambda h: h * torch.special.softmax(h, 0),
    "log_softmax of torch.special": lambda h: torch.special.log_softmax(h, dim=0),
    "cumsum": lambda h: h.cumsum(0),
    "cumsum_": lambda h: h.cumsum_(0),
    "cumprod_": lambda h: h.clone().cumprod_(dim=0),
    "fourier": lambda h: torch.fft.fft(h, dim=0).real,
    "covariance": lambda h: h @ (h.mT @ h),
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "attention, causal": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    "attention, masked": lambda h: F.scaled_dot_product_attention(h, h, h, attn_mask=torch.ones(N, N).tril().bool()),
    "attention by hand": lambda h: (h @ h.mT).softmax(-1) @ h,
    "attention by hand, transposed": lambda h: (h.mT @ (h @ h.mT).softmax(0)).mT,
    "attention of a layer without batch_first": lambda h: F.multi_head_attention_forward(
        *[h.view(N, 2, 3)] * 3, 3, 1, torch.eye(3).repeat(3, 1), None, None, None, False, 0.0, torch.eye(3), None
    )[0].flatten(1),
    "bags of neighbours": lambda h: F.embedding_bag(torch.stack([torch.arange(N), torch.arange(N).roll(1)], 1), h),
    "kernel": lambda h: (-torch.cdist(h, h)).exp() @ h,
    "linear": lambda h: h * F.linear(h.t(), h.t()).sum(),
    "transposed": lambda h: (h.t() - h.t().mean(1, keepdim=True)).t(),
    "unflattened": lambda h: (h.view(N, 2, 3) * h.view(N, 2, 3).mean((0, 2), keepdim=True)).flatten(1),
    "logsumexp": lambda h: h - h.logsumexp(0),
    "smallest": lambda h: h - h.kthvalue(1, 0).values,
    "most_frequent": lambda h: h / h.mode(0).values,
    "written": lambda h: h - written(h),
    "largest": lambda h: h / h.abs().amax(),
    "mean_by_name": lambda h: h - torch.mean(input=h, dim=0),
    "std_by_name": lambda h: h / torch.std(dim=0, input=h),
    "largest_by_name": lambda h: h / torch.amax(input=h.abs(), dim=0),
    "std_of_all": lambda h: h / h.std(False) + h.var(False),
    "numpy_axis": lambda h: h - h.mean(np.int64(0)),
    "numpy_softmax": lambda h: h * h.softmax(np.int64(-2)),
    "vector_norm_by_name": lambda h: h / torch.linalg.vector_norm(x=h, dim=0),
    "products_half_by_name": lambda h: h * h.mT.mm(mat2=h).sum(),
    "products_by_name": lambda h: h * torch.matmul(other=h, input=h.mT).sum(),
    "softmax_by_name": lambda h: h * F.softmax(dim=0, input=h),
    "layer_norm": lambda h: F.layer_norm(h.mT, (N,)).mT,
    "layer_norm_by_name": lambda h: torch.layer_norm(input=h.mT, normalized_shape=(N,)).mT,
    "layer_norm_of_all": lambda h: F.layer_norm(h, (N, D)),
    "rms_norm": lambda h: F.rms_norm(h.mT, [N]).mT,
    "group_norm": lambda h: F.group_norm(h.view(1, N, D), 1).view(N, D),
    "group_norm_in_halves": lambda h: F.group_norm(h.view(1, 2 * N, 3), num_groups=N // 5).view(N, D),
    "batch_norm, as torch calls it": lambda h: torch._batch_norm_impl_index(
        h, None, None, None, None, True, 0.1, 1e-5, False
    )[0],
    "batch_norm, without statistics": lambda h: torch._native_batch_norm_legit(h, None, None, True, 0.1, 1e-5)[0],
    "batch_norm, exported as a function": lambda h: OPS._batch_norm_with_update_functional(
        h, h.new_ones(D), h.new_zeros(D), h.new_zeros(D), h.new_ones(D), 0.1, 1e-5
    )[0],
    "batch_norm, by name": lambda h: torch._native_batch_norm_legit(
        h, None, None, running_mean=h.new_zeros(D), running_var=h.new_ones(D), training=True, momentum=0.1, eps=1e-5
    )[0],
    "batch_norm, exported": lambda h: OPS._batch_norm_with_update(
        h, None, None, h.new_zeros(D), h.new_ones(D), 0.1, 1e-5
    )[0],
    "fft": lambda h: torch.fft.fft(h.mT).real.mT,
    "fft2": lambda h: torch.fft.fft2(h).real,
    "renorm": lambda h: h.renorm(2, 1, 0.5),
    "fftn": lambda h: torch.fft.fftn(h).real,
    "instance_norm": lambda h: F.instance_norm(h.mT.unsqueeze(0)).squeeze(0).mT,
    "handed_through": lambda h: h - h.mean(0).contiguous().to(h.dtype),
    "changed_in_place": lambda h: h / h.square().mean(0, keepdim=True).add_(1e-3).sqrt_(),
    "criterion": lambda h: h * F.mse_loss(h, -h),
    "criterion of shared targets": lambda h: h + F.cross_entropy(h, Y, reduction="sum"),
    "criterion by name": lambda h: h / F.huber_loss(target=torch.zeros_like(h), input=h),
    "largest_by_feature": lambda h: h * (1 / (1e-3 + h.abs().max(0).values)),
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "attention with a finite mask": lambda h: F.scaled_dot_product_attention(
        h, h, h, attn_mask=(1 - torch.eye(N)) * torch.finfo(torch.float32).min
    ),
    "attention that nobody needs": lambda h: (F.scaled_dot_product_attention(*[h.detach()] * 3), h)[1],
    "totals that are put nowhere": lambda h: h.index_put((h > 99,), h.detach().min()),
    "fftn of the last axes": lambda h: torch.fft.irfftn(torch.fft.rfftn(h.view(N, 2, 3), dim=[1, 2]), s=(2, 3)).view(
        N, D
    ),
    "renorm": lambda h: h.renorm(2, 0, 0.5),
    "features": lambda h: h - h.mean(1, keepdim=True),
    "features_softmax": lambda h: h.softmax(-1) + F.normalize(h) + h.cumsum(1),
    "norms": lambda h: F.layer_norm(h, (D,)) + F.rms_norm(h, (D,)) + F.group_norm(h, 2),
    "features_in_order": lambda h: h - h.kthvalue(2, keepdim=True).values - h.mode(1, keepdim=True).values,
    "features_in_places": lambda h: h - h.argmax(1, keepdim=True) - h.max(1, keepdim=True).indices,
    "features_by_name": lambda h: h - torch.mean(input=h, dim=1, keepdim=True) + torch.softmax(input=h, dim=-1),
    "norms_by_name": lambda h: torch.group_norm(input=h, num_groups=2) + torch.rms_norm(input=h, normalized_shape=(D,)),
    "group_norm_of_samples": lambda h: F.group_norm(h.view(1, N, D), N).view(N, D),
    "group_norm_within_samples": lambda h: F.group_norm(h.view(1, 2 * N, 3), N).view(N, D),
    "instance_norm_of_samples": lambda h: F.instance_norm(h.view(1, N, D)).view(N, D),
    "batch_norm of running statistics, half by name": lambda h: torch._native_batch_norm_legit(
        h, None, None, h.new_zeros(D), h.new_ones(D), training=False, momentum=0.1, eps=1e-5
    )[0],
    "batch_norm of running statistics, by name": lambda h: torch._native_batch_norm_legit(
        h, None, None, running_mean=h.new_zeros(D), running_var=h.new_ones(D), training=False, momentum=0.1, eps=1e-5
    )[0],
    "detached": lambda h: h - 0 * h.mean(0).detach(),
    "stabilised": lambda h: (h - h.max()).exp() / (h - h.max()).exp().sum(1, keepdim=True),
    "stabilised_by_amax": lambda h: (h - h.amax((0, 1))).softmax(1),
    "stabilised_handed_through": lambda h: (h - h.amax((0, 1)).to(h.device)).softmax(1),
    "products": lambda h: (h.unsqueeze(1) @ h.unsqueeze(2)).flatten(1) * h,
    "bags": lambda h: (
        F.embedding_bag(torch.arange(2 * N).view(N, 2), h.view(2 * N, 3)).repeat(1, 2)
        + F.embedding_bag(torch.arange(N), h, torch.arange(N + 1), include_last_offset=True)
    ),
    "diagonal matrices": lambda h: h[:, 0].diag() @ h + ((h @ h.mT) * torch.eye(N)) @ h + (h.mT @ h[:, 1].diag()).mT,
    "criteria": lambda h: h * F.l1_loss(h, -h, reduction="none") * torch.stack([F.mse_loss(a, -a) for a in h])[:, None],
    "diagonal of products": lambda h: h * (h @ h.mT).diagonal()[:, None],
    "attention of each to itself": lambda h: F.scaled_dot_product_attention(h, h, h, attn_mask=torch.eye(N).log()),
    "compared": lambda h: h * (h > h.mean(0) * float("inf")),
    "constants": lambda h: h * torch.ones(N, 1).sum(0),
    "by_hand": lambda h: h.amax() + (h - h.amax()).exp().sum(1, keepdim=True).log() - h,
}


def capacity(h: Tensor) -> Tensor:
    """Of the samples that a mixture of experts sends to one of them, the first two are served."""
    chosen = F.one_hot(h.argmax(-1), D)
    return h * ((chosen.cumsum(0) * chosen).sum(-1) <= 2).unsqueeze(1)


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {  # by autograd
    "median": lambda h: h * (h > h.detach().median()),
    "medians": lambda h: h * (h > h.nanmedian(0).values),
    "place of the largest": lambda h: h * (h.argmax(0) < 2),
    "place of the largest, subtracted": lambda h: h - 0.5 * h.argmax(0),
    "places beside the largest": lambda h: h - 0.5 * h.max(0).indices,
    "smallest but some": lambda h: h * (h > torch.kthvalue(input=h.detach(), k=1, dim=0).values + 0.5),
    "most frequent": lambda h: h * (h > h.detach().mode(0).values + 0.5),
    "places so far": lambda h: h * (1 + h.cummax(0).indices),
    "threshold, converted": lambda h: h * (h > h.detach().mean().clamp_(min=-9).float()),
    "capacity": capacity,
    "threshold": lambda h: h * (h > h.detach().mean()),
    "quantile": lambda h: h * (h.detach() > h.detach().quantile(0.3)),
    "rank": lambda h: h * (h[:, 0].argsort().argsort() < 3).unsqueeze(1),
    "branch": lambda h: h * 2 if h.mean() > 0 else h,
    "number": lambda h: h * h.mean().item(),
    "python": lambda h: h * float(h.detach().mean()),
    "scaled": lambda h: h / h.detach().abs().amax(),
    "clamped": lambda h: h.clamp(max=0.5 * h.max().item()),
}


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {  # what acts on single samples is of inputs, so there is no gradient
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "fourier": lambda x: torch.fft.fft(x, dim=0).real,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention by hand": lambda x: (x @ x.mT).softmax(-1) @ x,
}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, D)


@pytest.mark.parametrize("name", COUPLED)
def test_in_a_model(name: str, x: Tensor) -> None:
    model = Between(COUPLED[name])
    for engine in ({}, {"verify": False}, {"quantities": ["norm"], "verify": False}):
        with pytest.raises(persample.BatchCoupledError, match=r"first.weight.* \(and 1 more\).*last.weight"):
            persample.gradients(model, losses, x, Y, **engine)  # type: ignore[arg-type]
    behind = persample.gradients(model, losses, x, Y, params="last", verify=False)
    out = losses(model(x), Y)
    for n in range(N):
        (expected,) = torch.autograd.grad(out[n], model.last.weight, retain_graph=True)
        torch.testing.assert_close(behind["last.weight"][n], expected)


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("name", [*COUPLED, "batch_norm"])
def test_nothing_is_reported_to_a_handle(name: str, block: bool, x: Tensor) -> None:
    model, reported = Between(COUPLED.get(name, nn.BatchNorm1d(D))), list[Any]()
    handle = persample.extend(model, reduction="mean", on_backward=reported.append)
    with handle if block else contextlib.nullcontext(), pytest.raises(persample.BatchCoupledError):
        losses(model(x), Y).mean().backward()
    handle.remove()
    assert not reported and all(p.grad is None for p in model.parameters())


def test_losses_that_are_coupled_inside_the_block_of_a_handle(x: Tensor) -> None:
    model, reported = Between(torch.tanh), list[Any]()
    with persample.extend(model, reduction="mean", on_backward=reported.append):
        each = losses(model(x), Y)
        with pytest.raises(persample.BatchCoupledError, match=r"sub .*depend on the other samples"):
            (each - each.mean()).square().mean().backward()
    assert not reported


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda losses: losses - losses.mean(),
        lambda losses: losses / losses.sum(),
        lambda losses: losses * losses.softmax(0),
        lambda losses: losses.cumsum(0),
    ],
)
def test_in_the_losses_given_to_a_recorder(function: Callable[[Tensor], Tensor], warm: bool, x: Tensor) -> None:
    """Also after the model was verified with other losses."""
    model = Between(torch.tanh)
    with persample.extend(model) as recorder:
        if warm:
            recorder.gradients(losses(model(x), Y))
        with pytest.raises(persample.BatchCoupledError):
            recorder.gradients(function(losses(model(x), Y)))


@pytest.mark.parametrize("name", ALONE)
def test_what_couples_nothing(name: str, x: Tensor) -> None:
    model = Between(ALONE[name]).double()
    x, reported = x.double(), list[Any]()
    g = persample.gradients(model, losses, x, Y, verify=False)
    with persample.extend(model, reduction="mean", on_backward=reported.append):
        losses(model(x), Y).mean().backward()
    out = losses(model(x), Y)
    for n in range(N):
        grads = torch.autograd.grad(out[n], list(model.parameters()), retain_graph=True)
        for (p, _), expected in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(g[p][n], expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(reported[0][p][n], expected, rtol=1e-9, atol=1e-12)


class InTwoOrders(nn.Linear):
    """Two tokens of every sample, which ask in turns, and answer in blocks; each only those of its own sample."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        keys, asking = h.view(2 * N, 3), h.view(N, 2, 3).transpose(0, 1).reshape(2 * N, 3)
        other = torch.arange(N).repeat(2)[:, None] != torch.arange(N).repeat_interleave(2)
        found = (asking @ keys.T).masked_fill(other, -torch.inf).softmax(-1) @ keys
        return h.new_zeros(N, 3).index_add(0, torch.arange(N).repeat(2), found)


def test_attention_in_two_orders_couples_nothing(x: Tensor) -> None:
    model = InTwoOrders(D, D).double()
    g = persample.gradients(model, losses, x.double(), Y, verify=False)
    out = losses(model(x.double()), Y)
    expected = [torch.autograd.grad(out[n], model.weight, retain_graph=True)[0] for n in range(N)]
    torch.testing.assert_close(g["weight"], torch.stack(expected), rtol=1e-9, atol=1e-12)


class Nearest(nn.Linear):
    """Every sample takes from its nearest neighbour alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        scores = (h @ h.T).masked_fill(torch.eye(len(h)).bool(), -torch.inf)
        return (F.one_hot(scores.argmax(-1), len(h)).to(h.dtype) @ h)[:, :3]


def test_neighbours_are_said_without_verification_and_refused_with_it(x: Tensor) -> None:
    model = Nearest(D, D).double()
    assert "batch-coupled" in repr(persample.gradients(model, losses, x.double(), Y, verify=False))
    with pytest.raises((persample.VerificationError, persample.BatchCoupledError)):
        persample.gradients(model, losses, x.double(), Y)


class Remembers(nn.Linear):
    """Every sample attends to two memories of all of them: weights of another size than the batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return ((h @ torch.cat([h, 2 * h]).T).softmax(-1) @ torch.cat([h, h]))[:, :3]


@pytest.mark.parametrize("verify", [True, False])
def test_attention_to_a_memory_of_all_is_refused(verify: bool, x: Tensor) -> None:
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(Remembers(D, D).double(), losses, x.double(), Y, verify=verify)


def test_totals_that_meet_only_totals(x: Tensor) -> None:
    """The loss of a backward of one's own, with a penalty on statistics of the batch."""
    model, reported = Between(torch.tanh), list[Any]()
    with persample.extend(model, reduction="mean", on_backward=reported.append):
        out = model(x)
        (losses(out, Y).mean() + out.mean(0).square().sum() / out.std()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(reported[0].mean()[name], p.grad)


def test_one_sample_is_not_coupled(x: Tensor) -> None:
    model = Between(COUPLED["centred"])
    assert persample.gradients(model, losses, x[:1], Y[:1]).norm().shape == (1,)


@pytest.mark.parametrize(
    "move",
    [lambda v: v.sort().values, lambda v: v.flip(0), lambda v: v.roll(1), lambda v: v[torch.tensor([1, 0, 2, 3, 4])]],
)
def test_losses_in_another_order(move: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model = Between(torch.tanh)
    with pytest.raises(persample.SampleAxisError, match=r"losses\[\d\] is that of sample \d"):
        persample.gradients(model, lambda o, y: move(losses(o, y)), x, Y, verify=False)
    order = pytest.raises(persample.SampleAxisError, match="not in the order of the samples")
    with persample.extend(model, verify=False) as recorder, order:
        recorder.gradients(move(losses(model(x), Y)))
    ordered = persample.gradients(model, lambda o, y: losses(o, y).view(1, -1)[0].clone(), x, Y, verify=False)
    assert ordered.losses is not None and len(ordered.losses) == N


def test_a_recorder_verifies_losses_of_another_kind(x: Tensor) -> None:
    """What functions were called is part of what was verified."""
    model = Between(torch.tanh)
    with persample.extend(model) as recorder:
        recorder.gradients(losses(model(x), Y))
        out = losses(model(x), Y)
        mixed = out + out.unfold(0, 1, 1).amax()  # a largest number isn't looked at
        with pytest.raises(persample.VerificationError, match="off by"):
            recorder.gradients(mixed)


def test_a_check_of_numbers_that_are_not_finite(x: Tensor) -> None:
    """NaN is never exact."""
    model = Between(torch.tanh)
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    report = persample.check(model, losses, x, Y)
    assert not report.ok and {row.verdict for row in report.rows} == {"not finite"}
    with pytest.raises(persample.VerificationError, match="no finite number"):
        report.raise_if_bad()


@pytest.mark.parametrize("name", UNSEEN)
def test_what_acts_without_a_gradient_is_said_or_refused(name: str) -> None:
    """Whatever a batch is like: no sample but the one that is always verified need be moved by the others."""
    torch.manual_seed(0)
    model, told = Between(UNSEEN[name]).double(), 0
    for _ in range(12):
        x, y = torch.randn(8, D).double(), torch.randint(3, (8,))
        try:
            g = persample.gradients(model, losses, x, y)
        except persample.BatchCoupledError:
            told += 1
            continue
        rows = torch.stack([_alone(model, x[n : n + 1], y[n : n + 1]) for n in range(8)])
        if "batch-coupled" in repr(g):
            told += 1
            with pytest.raises(persample.BatchCoupledError):
                persample.optim.ClippedSGD(model.named_parameters(), lr=0.1, max_norm=1.0).step(g)
        else:
            torch.testing.assert_close(g.flat(), rows, rtol=1e-9, atol=1e-12)
    assert told > 3


@pytest.mark.parametrize(
    "name",
    [
        *("median", "medians", "smallest but some", "most frequent", "threshold, converted"),
        *("place of the largest", "place of the largest, subtracted", "places beside the largest", "places so far"),
    ],
)
def test_what_acts_after_a_batch_in_which_it_did_not(name: str) -> None:
    """That first batch was verified, and says nothing of others."""
    torch.manual_seed(0)
    model, x, y = Between(UNSEEN[name]).double(), torch.randn(8, D).double(), torch.randint(3, (8,))
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(D))
    falling = x.sort(0, descending=True).values
    first = persample.gradients(model, losses, falling if "place" in name else x[:1].expand(8, D).clone(), y)
    assert not first.note
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, losses, x, y)


def _alone(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses(model(x), y)[0], list(model.parameters()))])


@pytest.mark.parametrize("name", ["threshold", "threshold, converted", "scaled"])
def test_what_acts_without_a_gradient_is_said_where_nothing_runs_alone(name: str, x: Tensor) -> None:
    model, reported = Between(UNSEEN[name]), list[Any]()
    assert "batch-coupled" in repr(persample.gradients(model, losses, x, Y, verify=False))
    with persample.extend(model) as recorder:
        assert "batch-coupled" in repr(recorder.gradients(losses(model(x), Y)))
    with persample.extend(model, reduction="mean", on_backward=reported.append):
        losses(model(x), Y).mean().backward()
    assert "batch-coupled" in repr(reported[0])


def test_a_model_that_couples_later_is_said_to(x: Tensor) -> None:
    """The first call has verified rows of independent samples; these are verified again, as those within the batch."""
    centred = False
    model = Between(lambda h: h - h.mean(0) if centred else h)
    model.first.requires_grad_(False)
    assert not persample.gradients(model, losses, x, Y).note
    centred = True
    for quantities in (None, ["norm"]):
        assert persample.gradients(model, losses, x, Y, quantities=quantities).note == "batch-coupled"


def test_a_model_that_was_refused_is_not_trusted_for_passing_once() -> None:
    """Large entries alone are scaled, by a number of the batch that Python has found; in some batches, none."""

    def scaled(h: Tensor) -> Tensor:
        return torch.where(h.abs() > 9, h / max(h.detach().abs().flatten().tolist()), h)

    torch.manual_seed(0)
    model = Between(scaled).double()
    small, large = torch.zeros(N, D).double(), 100 * torch.randn(N, D).double()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, losses, large, Y)
    persample.gradients(model, losses, small, Y)
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, losses, large, Y)


@pytest.mark.parametrize("name", UNSEEN)
def test_a_report_looks_at_more_samples_where_numbers_of_the_batch_act(name: str) -> None:
    told = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model, x, y = Between(UNSEEN[name]).double(), torch.randn(8, D).double(), torch.randint(3, (8,))
        report = persample.check(model, losses, x, y, samples=1)
        together = losses(model(x), y)
        apart = torch.cat([losses(model(x[n : n + 1]), y[n : n + 1]) for n in range(8)])
        assert report.ok == torch.allclose(together, apart)
        told += not report.ok
    assert told


def of_all(v: Tensor) -> Tensor:
    return (v - v.mean()) / v.std()


@pytest.mark.filterwarnings("ignore:the criterion of the whole batch")
@pytest.mark.parametrize(
    "criterion",
    [
        lambda o, y: (of_all(o) * of_all(y)).mean(),
        lambda o, y: ((o - y) / y.norm()).square().sum(),
        lambda o, y: (o / o.detach().abs().max().item() - y).square().mean(),
        lambda o, y: F.mse_loss(o, y) if bool((o.sum() > 0) | (o.sum() <= 0)) else o.sum(),
    ],
    ids=["correlation", "relative", "read", "decided"],
)
def test_numbers_of_a_criterion_that_sees_one_sample_are_no_coupling(criterion: Any, x: Tensor) -> None:
    """What it makes of the whole batch is not used."""
    x, model, y, forwards = x.double(), Between(torch.tanh).double(), torch.rand(N, 3).double(), list[int]()
    model.register_forward_hook(lambda *_: forwards.append(1))
    for verify in (None, False):
        g = persample.gradients(model, criterion, x, y, verify=verify)
        assert "coupled" not in repr(g)
        for n in range(N):
            grads = torch.autograd.grad(criterion(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
            for row, expected in zip(g, grads, strict=True):
                torch.testing.assert_close(g[row][n], expected, rtol=1e-9, atol=1e-12)
    norms = persample.gradients(model, criterion, x, y, quantities=["norm"], max_bytes=1, verify=False).norm()
    torch.testing.assert_close(norms, g.norm(), rtol=1e-9, atol=1e-12)
    persample.optim.ClippedSGD(model.named_parameters(), max_norm=1.0).step(g)
    forwards.clear()
    persample.gradients(model, criterion, x, y)
    assert len(forwards) == 1


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_act_on_each_other_are_said(name: str, x: Tensor) -> None:
    model, reported = Weighted(INPUTS[name]), list[Any]()
    with persample.extend(model) as recorder:
        G = recorder.gradients(losses(model(x), Y))
    with persample.extend(model, reduction="sum", on_backward=reported.append):
        losses(model(x), Y).sum().backward()
    for rows in (G, *reported, persample.gradients(model, losses, x, Y, verify=False)):
        assert "batch-coupled" in repr(rows)


@pytest.mark.parametrize("by", [lambda x: x - x.mean(0), lambda x: x / x.abs().max()], ids=["mean", "maximum"])
def test_inputs_that_are_normalised_by_the_batch(by: Any) -> None:
    """In single precision, whatever the numbers: a loss that others hardly move, or not at all, is no proof."""

    class Normalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(by(x))

    for seed in range(20):
        torch.manual_seed(seed)
        model, x, y = Normalised(6, 3), torch.randn(5, 6), torch.randint(3, (5,))
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
        assert G.note == "batch-coupled"
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        rows = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(G["weight"], torch.stack(rows))
        for engine in ("loop", "vmap"):
            with pytest.raises(persample.BatchCoupledError, match="within the batch"):
                persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine)
