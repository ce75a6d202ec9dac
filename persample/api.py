"""`gradients`: the front door."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import nn

from .engines import ENGINES, hooks
from .engines import vmap as vmap_engine
from .factors import Factors, compact
from .gradients import Gradients
from .losses import LossFunction
from .problem import Pass, Problem, Selection, pose
from .statistics_run import Request, Statistics


def gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    engine: str = "hooks",
    params: Selection = None,
    batch_dim: Any = 0,
    coupled: str | None = None,
    quantities: Iterable[Request] | None = None,
    max_bytes: int | None = None,
    verify: bool | None = None,
    generator: torch.Generator | None = None,
) -> Gradients | Statistics:
    """Per-sample gradients ``G [N, D]`` of ``loss_fn(model(inputs), targets)``: one row per sample, unscaled."""
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {list(ENGINES)}, got {engine!r}.")
    if quantities is not None:
        statistics = Statistics(quantities, {name: p.shape for name, p in problem.parameters.items()})
        return statistics.finish(_run(problem, engine, statistics.emit, statistics.again, max_bytes))
    kept: dict[str, Factors] = {}

    def keep(name: str, g: Factors) -> None:
        kept[name] = compact(g)

    run = _run(problem, engine, keep, False, max_bytes)
    return Gradients(
        {name: kept[name] for name in problem.parameters}, run.losses, run.outputs,
        unused=run.unused, aliases=problem.aliases, parameters=problem.parameters,
    )  # fmt: skip


def _run(problem: Problem, engine: str, emit: Any, again: bool, max_bytes: int | None) -> Pass:
    if engine == "hooks":
        return hooks(problem, emit, again=again)
    if engine == "vmap":
        return vmap_engine(problem, emit, max_bytes=max_bytes)
    return ENGINES[engine](problem, emit)
