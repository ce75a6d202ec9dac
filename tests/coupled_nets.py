"""Small networks with BatchNorm, and what they compute written a second time, with parameters for every sample.

A `Net` says once how its modules are put together (`run`), and a way of running them says what each does: the modules
themselves, or `ByCopies`, which gives sample ``m`` the parameters ``theta[name][m]`` and normalises by hand, so that
``dl_n/dtheta^(m)`` is plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Modules under their names, and ``run(op, x)`` with ``op(name, x)`` for each use of one."""

    def __init__(self, run: Callable[[Callable[[str, Tensor], Tensor], Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda name, z: getattr(self, name)(z), x)


@dataclass
class ByCopies:
    """The network with parameters ``theta {name: [N, *P]}``; statistics "live", "frozen", or weighted by ``w [N]``."""

    net: Net
    theta: dict[str, Tensor]
    statistics: str | Tensor = "live"

    def __call__(self, x: Tensor) -> Tensor:
        return self.net.run(self.op, x)

    def op(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self.net, name)
        w, b = self.theta.get(f"{name}.weight"), self.theta.get(f"{name}.bias")
        if isinstance(module, nn.Linear):
            y = torch.einsum("noi,ni->no", w, x)
            return y if b is None else y + b
        if isinstance(module, nn.Conv2d):
            n, c = x.shape[:2]
            y = F.conv2d(x.reshape(1, n * c, *x.shape[2:]), w.flatten(0, 1), padding=module.padding, groups=n)
            y = y.reshape(n, -1, *y.shape[2:])
            return y if b is None else y + b[:, :, None, None]
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        axes = [0, *range(2, x.ndim)]
        share = x.new_ones(len(x)) if isinstance(self.statistics, str) else self.statistics
        share = (share / share.sum() / (x[0, 0].numel())).reshape(-1, *[1] * (x.ndim - 1))
        mean = (share * x).sum(axes, keepdim=True)
        var = (share * x.square()).sum(axes, keepdim=True) - mean.square()
        if isinstance(self.statistics, str) and self.statistics == "frozen":
            mean, var = mean.detach(), var.detach()
        y = (x - mean) / (var + module.eps).sqrt()
        shape = (len(x), -1, *[1] * (x.ndim - 2))
        return y if w is None else y * w.view(shape) + b.view(shape)


@dataclass
class Setup:
    net: Net
    x: Tensor
    y: Tensor

    def losses(self, theta: dict[str, Tensor], statistics: str | Tensor = "live") -> Tensor:
        return F.cross_entropy(ByCopies(self.net, theta, statistics)(self.x), self.y, reduction="none")

    def copies(self) -> dict[str, Tensor]:
        """The parameters, one copy for every sample."""
        return {
            k: p.detach().repeat(len(self.x), *[1] * p.ndim).requires_grad_() for k, p in self.net.named_parameters()
        }

    def table(self) -> dict[str, Tensor]:
        """``dl_n/dtheta^(m)``, ``{name: [N, N, *P]}``."""
        theta = self.copies()
        losses = self.losses(theta)
        rows = [torch.autograd.grad(loss, list(theta.values()), retain_graph=True) for loss in losses]
        return {name: torch.stack(parts) for name, parts in zip(theta, zip(*rows, strict=True), strict=True)}


def _randomise(net: Net) -> Net:
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is not None:
                    module.weight.copy_(torch.randn_like(module.weight))
                    module.bias.copy_(torch.randn_like(module.bias))
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
    return net


def _setup(build: Callable[[], Net], n: int, *shape: int, classes: int = 4) -> Callable[[], Setup]:
    def make() -> Setup:
        before = torch.get_default_dtype()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float64)
            try:
                return Setup(_randomise(build()), torch.randn(n, *shape), torch.randint(classes, (n,)))
            finally:
                torch.set_default_dtype(before)

    return make


def _mlp() -> Net:
    def run(op: Any, x: Tensor) -> Tensor:
        x = torch.relu(op("bn1", op("fc1", x)))
        return op("out", torch.tanh(op("bn2", op("fc2", x))))

    return Net(
        run,
        fc1=nn.Linear(5, 6),
        bn1=nn.BatchNorm1d(6),
        fc2=nn.Linear(6, 3),
        bn2=nn.BatchNorm1d(3, eps=0.1),
        out=nn.Linear(3, 4),
    )


def _residual() -> Net:
    """Conv, BN, a residual block with an affine=False BN in one branch and a BN in the other, BN, head."""

    def run(op: Any, x: Tensor) -> Tensor:
        x = F.relu(op("bn0", op("conv0", x)))
        left = op("bn2", op("conv2", F.relu(op("bn1", op("conv1", x)))))
        x = F.relu(left + op("bn3", op("skip", x)))
        return op("out", op("bn4", op("conv4", x)).mean((2, 3)))

    return Net(
        run, conv0=nn.Conv2d(2, 3, 3, padding=1, bias=False), bn0=nn.BatchNorm2d(3),
        conv1=nn.Conv2d(3, 2, 3, padding=1),
        bn1=nn.BatchNorm2d(2, momentum=None), conv2=nn.Conv2d(2, 3, 3, padding=1), bn2=nn.BatchNorm2d(3, affine=False),
        skip=nn.Conv2d(3, 3, 1), bn3=nn.BatchNorm2d(3, track_running_stats=False), conv4=nn.Conv2d(3, 2, 3),
        bn4=nn.BatchNorm2d(2),
        out=nn.Linear(2, 4),
    )  # fmt: skip


def _reused() -> Net:
    """One BatchNorm and one linear layer, each called twice."""

    def run(op: Any, x: Tensor) -> Tensor:
        x = torch.tanh(op("bn", op("fc1", x)))
        return op("out", torch.tanh(op("bn", op("fc2", op("fc2", x)))))

    return Net(run, fc1=nn.Linear(4, 5), bn=nn.BatchNorm1d(5), fc2=nn.Linear(5, 5), out=nn.Linear(5, 4))


def _branches() -> Net:
    """BatchNorms side by side; one directly on the input, one whose gain is zero."""

    def run(op: Any, x: Tensor) -> Tensor:
        x = op("bn0", x)
        return op("out", torch.tanh(op("a", op("fc1", x))) + torch.sigmoid(op("b", op("fc2", x))))

    return Net(
        run,
        bn0=nn.BatchNorm1d(4),
        fc1=nn.Linear(4, 3),
        a=nn.BatchNorm1d(3),
        fc2=nn.Linear(4, 3),
        b=nn.BatchNorm1d(3),
        out=nn.Linear(3, 4),
    )


def zero_gain() -> Setup:
    setup = setups["branches"]()
    with torch.no_grad():
        setup.net.b.weight.zero_()
        setup.net.bn0.weight[1] = 0
    return setup


setups: dict[str, Callable[[], Setup]] = {
    "mlp": _setup(_mlp, 7, 5),
    "residual": _setup(_residual, 5, 2, 5, 5),
    "reused": _setup(_reused, 6, 4),
    "branches": _setup(_branches, 6, 4),
}
setups["zero gain"] = zero_gain
