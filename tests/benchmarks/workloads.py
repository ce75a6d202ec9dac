"""What is measured on: ordinary models and batches, at full size and at toy size.

Nothing here knows an engine.  Layers are modules that are called as modules, and inputs have their samples first, so
that every library under comparison can serve what it can serve.  Losses are per sample, ``[N]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """``[N]``: cross entropy, the mean over the tokens of a sample where there are tokens."""
    each = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view(len(outputs), -1).mean(1)


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[], Batch]

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
        """The model and a batch, the same in every process."""
        torch.manual_seed(0)
        model = self.build()
        x, y = self.draw()
        return model.to(dtype), x.to(dtype) if x.is_floating_point() else x, y


def images(n: int, size: int, channels: int = 3, classes: int = 10) -> Batch:
    return torch.randn(n, channels, size, size), torch.randint(classes, (n,))


def mlp(sizes: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def three_conv_three_dense(width: int = 32) -> nn.Module:
    """3c3d (Schneider et al. 2019, "DeepOBS") for images of 32 x 32."""
    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    convs = [
        nn.Conv2d(3, 2 * width, 5),
        nn.Conv2d(2 * width, 3 * width, 3),
        nn.Conv2d(3 * width, 4 * width, 3, padding=1),
    ]
    return nn.Sequential(
        *(layer for conv in convs for layer in (conv, nn.ReLU(), pool())),
        nn.Flatten(),
        mlp([36 * width, 16 * width, 8 * width, 10]),
    )


def all_convolutional(width: int = 96) -> nn.Module:
    """All-CNN-C (Springenberg et al. 2015) without dropout."""
    layers: list[nn.Module] = []
    channels = 3
    first, second = (
        [(width, 3, 1), (width, 3, 1), (width, 3, 2)],
        [(2 * width, 3, 1), (2 * width, 3, 1), (2 * width, 3, 2)],
    )
    last = [(2 * width, 3, 1), (2 * width, 1, 1), (10, 1, 1)]
    for out, kernel, stride in [*first, *second, *last]:
        layers += [nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), norm(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x) + self.skip(x))


def resnet18(norm: Callable[[int], nn.Module], width: int = 32) -> nn.Module:
    """The layout of ResNet-18 (He et al. 2016) for images of 32 x 32, in evaluation mode."""
    blocks = [
        Residual(
            width * max(1, 2**stage // (1 if second else 2)), width * 2**stage, 2 if stage and not second else 1, norm
        )
        for stage in range(4)
        for second in (False, True)
    ]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)).eval()


class Block(nn.Module):
    """A block of a transformer: causal attention and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """A language model like GPT-2 (Radford et al. 2019)."""

    def __init__(
        self, vocabulary: int = 1000, width: int = 256, depth: int = 4, heads: int = 4, length: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1]).expand_as(x)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(place))))


class Recurrent(nn.Module):
    """An embedding, an LSTM, and a classifier of its last state."""

    def __init__(self, vocabulary: int = 1000, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0][:, -1])


def sequences(n: int, length: int, vocabulary: int, classes: int | None = None) -> Batch:
    y = torch.randint(vocabulary, (n, length)) if classes is None else torch.randint(classes, (n,))
    return torch.randint(vocabulary, (n, length)), y


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class FrozenStatistics(nn.BatchNorm2d):
    """BatchNorm with running statistics as if it had been trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.normal_(std=0.1)
        self.running_var.uniform_(0.5, 1.5)


def flat(n: int, width: int, classes: int = 10) -> Batch:
    return torch.randn(n, width), torch.randint(classes, (n,))


FULL = {
    w.name: w
    for w in (
        Workload("W1", "MLP 784-512-512-10, N=128", lambda: mlp([784, 512, 512, 10]), lambda: flat(128, 784)),
        Workload("W2", "3c3d, 32x32, N=128", three_conv_three_dense, lambda: images(128, 32)),
        Workload("W3", "ResNet-18 with GroupNorm, 32x32, N=32", lambda: resnet18(group_norm), lambda: images(32, 32)),
        Workload("W4", "GPT-like, d=256, 4 layers, T=128, V=1000, N=16", Transformer, lambda: sequences(16, 128, 1000)),
        Workload("W5", "All-CNN-C, 32x32, N=32", all_convolutional, lambda: images(32, 32)),
        Workload("W6", "Embedding + LSTM(128), T=64, N=64", Recurrent, lambda: sequences(64, 64, 1000, 10)),
        Workload("W7", "ResNet-18 with frozen BatchNorm", lambda: resnet18(FrozenStatistics), lambda: images(32, 32)),
    )
}

TOY = {
    w.name: w
    for w in (
        Workload("W1", "toy MLP", lambda: mlp([6, 5, 5, 10]), lambda: flat(5, 6)),
        Workload("W2", "toy 3c3d", lambda: three_conv_three_dense(1), lambda: images(3, 32)),
        Workload("W3", "toy ResNet-18", lambda: resnet18(group_norm, 4), lambda: images(3, 8)),
        Workload("W4", "toy GPT", lambda: Transformer(11, 8, 1, 2, 5), lambda: sequences(3, 5, 11)),
        Workload("W5", "toy All-CNN-C", lambda: all_convolutional(2), lambda: images(3, 8)),
        Workload("W6", "toy LSTM", lambda: Recurrent(11, 4), lambda: sequences(3, 5, 11, 10)),
        Workload("W7", "toy ResNet-18", lambda: resnet18(FrozenStatistics, 4), lambda: images(3, 8)),
    )
}


def scaled(axis: str, size: int) -> Workload:
    """A transformer of moderate size, with one of N (samples), T (tokens), width and depth changed."""
    at = {"N": 8, "T": 64, "width": 128, "depth": 2, axis: size}
    return Workload(
        f"{axis}={size}",
        f"transformer, {axis}={size}",
        lambda: Transformer(500, at["width"], at["depth"], 4, at["T"]),
        lambda: sequences(at["N"], at["T"], 500),
    )


AXES = {
    "N": [2, 4, 8, 16, 32, 64],
    "T": [8, 16, 32, 64, 128, 256],
    "width": [32, 64, 128, 256, 512],
    "depth": [1, 2, 4, 8],
}
