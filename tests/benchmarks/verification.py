"""``python -m benchmarks.verification``: what holding one row against a sample alone costs.

The ratio of `persample.gradients` with ``verify=True`` (as at the first call for a model) to one call with
``verify=False``, in one process, the two alternating: the median over pairs, with its quartiles.  With dropout the
batch is run once more, without it.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import persample

from .measure import Timing, compare
from .workloads import FULL, TOY, Workload, losses


class Dropped(nn.Module):
    """A model behind dropout of its inputs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.drop, self.body = nn.Dropout(0.1), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(self.drop(x))
        return out


def cost(workload: Workload, budget: float, dropout: bool = False) -> Timing:
    """``verify=True`` next to ``verify=False``."""
    model, x, y = workload.make()
    model = Dropped(model) if dropout else model
    one, two = (lambda v=v: persample.gradients(model, losses, x, y, verify=v) for v in (False, True))
    one(), two()
    return compare(one, two, budget=budget)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verification", description=__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per line")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="tiny models: does everything run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model and batch | dropout | ratio | quartiles |\n|---|---|---|---|")
    for workload in (TOY if args.toy else FULL).values():
        for dropout in (False, True):
            if dropout and not workload.make()[1].is_floating_point():
                continue
            t = cost(workload, args.budget, dropout)
            title, used = workload.title, "yes" if dropout else "no"
            print(f"| {title} | {used} | {t.ratio:.2f} | {t.low:.2f} to {t.high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
