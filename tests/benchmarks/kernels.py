"""``python -m benchmarks.kernels``: does `persample.cost` choose well among the kernels of a convolution?

Draws convolutions (dims, channels, groups, sizes, strides, dilations) and times the norms of their rows, or the inner
products of all of them, by each kernel, and as `persample.cost` chooses.  Prints what the choice costs relative to the
best, both together with the layer's weight gradient: ``(chosen + unit) / (best + unit)``.  The figures in
`persample.cost.Costs` are from such runs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from persample import convolution, cost, reductions
from persample.factors import Conv

STREAM, PIXELS = ({"conv_norm": how, "conv_gram": how} for how in ("stream", "pixels"))
KERNELS: dict[str, dict[str, Any]] = {
    "offsets": STREAM | {"conv_rows": "offsets"},
    "gradient": STREAM | {"conv_rows": "native", "correlated": (1e9,) * 6, "single": (1e9, 1e9)},
    "correlated": STREAM | {"conv_rows": "native", "correlated": (0.0,) * 6, "single": (0.0, 0.0)},
    "tokens": STREAM | {"conv_rows": "tokens"},
    "pixels": PIXELS,
}
QUANTITIES = {"norms": reductions.row_dot, "gram": reductions.gram}


def draw(rng: random.Random, work: tuple[float, float]) -> Conv:
    """Factors of a convolution whose weight gradient takes between so many multiplications."""
    while True:
        dims = rng.choice([1, 2, 2, 2, 3])
        n, channels, outputs = (
            rng.choice(choices) for choices in ([4, 16, 32, 128], *[[1, 3, 6, 16, 20, 32, 64, 100, 128, 256]] * 2)
        )
        groups = rng.choice([1, 1, 1, 1, 4, channels])
        kernel, stride, dilation = (
            rng.choice([2, 3, 3, 3, 5, 7][: 4 if dims == 3 else 6]),
            rng.choice([1, 1, 2]),
            rng.choice([1, 1, 1, 2]),
        )
        size = rng.choice({1: [32, 128, 1024, 4096], 2: [4, 8, 16, 32, 48], 3: [4, 8, 12]}[dims])
        padding = kernel // 2
        positions = (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1
        if positions < 1 or channels % groups or outputs % groups:
            continue
        if work[0] <= n * channels * outputs / groups * (kernel * positions) ** dims <= work[1]:
            break
    shape = torch.Size((outputs, channels // groups, *(kernel,) * dims))
    input, grad = torch.randn(n, channels, *(size,) * dims), torch.randn(n, outputs, *(positions,) * dims)
    return Conv(input, grad, (stride,) * dims, (padding,) * dims, (dilation,) * dims, shape)


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The least of a few."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def compared(g: Conv, quantity: str = "norms") -> tuple[float, dict[str, float]]:
    """The time as chosen, and by each kernel, in units of the weight gradient."""

    def compute() -> object:
        return QUANTITIES[quantity](g, g)

    unit = seconds(lambda: convolution.summed(g.input, g.grad, g.geometry))
    chosen, each = seconds(compute) / unit, {}
    sizes = convolution.sizes(g.input.shape, g.grad.shape, g.geometry)
    pairs = sizes.batch * sizes.pixels**2 * (len(g) if quantity == "gram" else 1)
    for name, forced in KERNELS.items():
        if name != "pixels" or (pairs < 1e9 and sizes.pixels**2 <= cost.costs().block):  # or it takes forever
            with cost.using(**forced):
                each[name] = seconds(compute) / unit
    return chosen, each


def regrets(
    seed: int, duration: float, work: tuple[float, float] = (3e6, 1.5e9), quantity: str = "norms"
) -> Iterator[tuple[Conv, float, str]]:
    """Convolutions, what the choice costs relative to the best, and which kernel that is; at least one."""
    rng, end = random.Random(seed), time.perf_counter() + duration
    while True:
        g = draw(rng, work)
        chosen, each = compared(g, quantity)
        best = min(each, key=each.__getitem__)
        yield g, (chosen + 1) / (each[best] + 1), best
        if time.perf_counter() >= end:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--quantity", choices=QUANTITIES, default="norms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = list(regrets(args.seed, args.seconds, quantity=args.quantity))
    for g, regret, best in sorted(found, key=lambda f: -f[1])[:10]:
        sizes = f"input {list(g.input.shape)}, weight {list(g.shape)}, stride {g.stride[0]}, dilation {g.dilation[0]}"
        print(f"{regret:5.2f}  {best:8} is best for {sizes}")
    mean, off = statistics.mean(r for _, r, _ in found), sum(r > 1.2 for _, r, _ in found)
    print(f"{len(found)} convolutions: {mean:.3f} of the best on average, {off} off by more than a fifth")


if __name__ == "__main__":
    main()
