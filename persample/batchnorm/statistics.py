"""The statistics of BatchNorm as explicit variables of a forward pass.

Every BatchNorm call that uses the statistics of the batch is replaced by its definition.  With ``z_m [C, P]`` what it
gets of sample ``m``:

    h_m = (mean z_m,  mean (z_m - mu)^2)                         what sample m contributes: [C] each, over its positions
    s   = (mu, v) = pool(h)                                      the statistics
    y_m = weight (z_m - mu) / sqrt(v + eps) + bias

Given ``s`` the samples are independent, as under GroupNorm; all coupling flows through ``s``.  So what is
differentiated is decided by the pool alone, and nothing else in the package knows how BatchNorm normalises
(``share_m = 1 / N``; where samples have several numbers of positions, that part of all positions):

================  ==============================  ==================================================================
`live`            ``sum_m share_m h_m``           the batch as it is
`Copies`          constants, one copy per sample  no coupling: ``dl_n/dtheta`` and ``u_n = dl_n/ds`` in one pass
`weighted` (w)    ``sum_m w_m share_m h_m``, by   re-weighted batches, a sample left out
                  the sum of the weights
`given` (values)  known constants                 a part of the batch as it was within the whole
================  ==============================  ==================================================================

The second moment is centred: ``dv/dmu = 0`` at the batch, so a layer's two statistics don't act on each other (to first
order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import aten, rules
from ..calls import function_name
from ..capture import Capture
from ..errors import BatchCoupledError, BatchNormError, CaptureError
from ..followed import SharedTensor
from ..layout import Layout, ranks, samples_first
from ..patched import unpatched

Layer = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, eq=False)
class Node:
    """The two statistics of one coupled call, and what they are pooled from."""

    name: str  # the module's path; "#2" for its second call
    members: Tensor | None  # [M], the samples that take part; None for all of them
    positions: int  # P, the most that a sample has
    share: Tensor  # [M], of the statistics; 1 / M each where all have as many positions
    moments: tuple[Tensor, Tensor]  # h, [M, C] each: mean and centred second moment of every sample
    pooled: tuple[Tensor, Tensor]  # s, mean and (biased) variance, [C] each, or [M, C] for copies

    @property
    def channels(self) -> int:
        return self.moments[0].shape[1]

    def spread(self, values: Tensor, n: int) -> Tensor:
        """``[M, C]`` of the samples that take part as ``[N, C]``; the others have 0."""
        if self.members is None:
            return values
        return values.new_zeros(n, self.channels).index_copy(0, self.members, values)

    def places(self, sample: int) -> list[int]:
        """Where a sample is among those that take part: one place, or none."""
        return [sample] if self.members is None else (self.members == sample).nonzero().flatten().tolist()

    def detached(self) -> Node:
        """The same without its graph."""
        (first, second), (mean, variance) = self.moments, self.pooled
        moments, statistics = (first.detach(), second.detach()), (mean.detach(), variance.detach())
        return replace(self, moments=moments, pooled=statistics)

    def weigh(self, values: Tensor) -> Tensor:
        """``share_m`` times row ``m`` of ``[M, C]``."""
        return values * self.share.to(values.dtype).unsqueeze(1)


# ---- pools: from the moments h [M, C] of the samples to a statistic -----------------------------------------------

# (h, share, members, the call's name) -> s, [C] or [M, C]; called twice for every node
Pool = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]


def average(h: Tensor, share: Tensor) -> Tensor:
    """``sum_m share_m h_m``, as precise as the statistics of the layer itself."""
    with torch.autocast(h.device.type, enabled=False):
        return share.to(h.dtype) @ h


def live(h: Tensor, share: Tensor, members: Tensor | None, name: str) -> Tensor:
    """The statistics of the batch; a leaf where they depend on no parameter."""
    s = average(h, share)
    return s if s.requires_grad else s.requires_grad_()


class Copies:
    """The statistics of the batch as constants, with a leaf ``[M, C]`` for each: row ``m`` is the copy that sample
    ``m`` uses.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []

    def __call__(self, h: Tensor, share: Tensor, members: Tensor | None, name: str) -> Tensor:
        self.leaves.append(average(h.detach(), share).repeat(len(h), 1).requires_grad_())
        return self.leaves[-1]


def constant(h: Tensor, share: Tensor, members: Tensor | None, name: str) -> Tensor:
    """The statistics of the batch, held fixed."""
    return average(h.detach(), share)


def weighted(w: Tensor) -> Pool:
    """Sample ``m`` counts ``w[m]`` in every statistic; weights are normalised."""

    def pool(h: Tensor, share: Tensor, members: Tensor | None, name: str) -> Tensor:
        own = (w if members is None else w[members]) * share.to(w.dtype)
        if not bool(own.detach().any()):
            raise BatchNormError(f"'{name}' normalises a single sample, without which it has no statistics.")
        return average(h, own) / own.sum()

    return pool


def given(nodes: Sequence[Node]) -> Pool:
    """The statistics of these nodes, by the names of the calls: not all of them need be made (experts)."""
    known = {node.name: iter([s.detach() for s in node.pooled]) for node in nodes}
    return lambda h, share, members, name: next(known[name])


# ---- the calls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arguments:
    """A BatchNorm call, however it was spelled."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.weight, self.bias


def _functional(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Arguments:  # fmt: skip
    return Arguments(input, running_mean, running_var, weight, bias, eps)


def _native(
    input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Arguments:  # fmt: skip
    return Arguments(input, running_mean, running_var, weight, bias, eps)


READ: dict[Callable[..., Any], Callable[..., Arguments]] = {F.batch_norm: _functional, torch.batch_norm: _native}


Replacement = Callable[[str, Arguments, Callable[[], Layout]], Tensor]  # (name, call, where its samples are) -> output


class Explicit:
    """A coupled call by its definition; the statistics are in ``nodes``, in the order of the calls."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.nodes: list[Node] = []

    def __call__(self, name: str, call: Arguments, where: Callable[[], Layout]) -> Tensor:
        x, layout = call.input, where()
        if not x.numel():  # of samples that were picked: none
            return x.clone()
        z, members, counts = to_samples(x, layout)
        if z.shape[0] * z.shape[2] == 1:
            raise BatchNormError(f"'{name}' normalises a single value per channel. Use more than one sample.")
        if z.dtype.itemsize < 4:
            z = z.float()  # as BatchNorm itself does in half precision
        sizes = z.new_full((len(z),), z.shape[2]) if counts is None else counts.to(z.dtype)
        share = sizes / sizes.sum()
        first = z.sum(2) / sizes.unsqueeze(1)
        mean = self.pool(first, share, members, name)
        centred = z - mean.unsqueeze(-1)
        if counts is not None:  # what was filled up is nobody's
            centred = centred * (torch.arange(z.shape[2], device=z.device) < counts.unsqueeze(1)).unsqueeze(1)
        second = centred.square().sum(2) / sizes.unsqueeze(1)
        variance = self.pool(second, share, members, name)
        self.nodes.append(Node(name, members, z.shape[2], share, (first, second), (mean, variance)))
        y = centred * (variance + call.eps).rsqrt().unsqueeze(-1)
        if call.weight is not None:
            y = y * call.weight.view(-1, 1)
        if call.bias is not None:
            y = y + call.bias.view(-1, 1)
        return from_samples(y, x, layout).to(x.dtype)


def running(name: str, call: Arguments, where: Callable[[], Layout]) -> Tensor:
    """A coupled call with its running statistics instead: evaluation mode for this layer only."""
    if call.running_mean is None or call.running_var is None:
        raise BatchNormError(
            f"'{name}' has no running statistics (track_running_stats=False), so there is no evaluation mode to "
            "switch it to. Use one of the other notions: 'frozen', 'copy', 'loss' or 'influence'."
        )
    mean, variance = call.running_mean.clone(), call.running_var.clone()
    return F.batch_norm(call.input, mean, variance, call.weight, call.bias, False, 0.0, call.eps)


CHECKPOINTED = (
    "a BatchNorm inside torch.utils.checkpoint is run again by the backward pass, where its statistics can't be made "
    "explicit. Turn checkpointing off for the analysis."
)


def _runs_again() -> bool:
    """Whether this is a checkpointed region, whose backward pass may or may not notice what is saved otherwise."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook")


class Replace(TorchFunctionMode):
    """Runs a model with every coupled BatchNorm call replaced by ``by(name, arguments, where the samples are)``."""

    def __init__(self, model: nn.Module, capture: Capture, by: Replacement) -> None:
        """``capture`` is active around this mode: it knows where the samples are in a tensor, and the names of
        parameters and buffers.
        """
        super().__init__()
        self.model, self.capture, self.by = model, capture, by
        self.calls: dict[str, int] = {}
        self.announced: tuple[str, set[int]] = "", set()  # the module that is about to make a call, and its tensors
        self.hooks = ExitStack()

    def __enter__(self) -> Replace:
        for path, module in self.model.named_modules():
            if isinstance(module, Layer):
                own = {id(t) for t in (*module.parameters(), *module.buffers())}
                announce = lambda *_, at=(path, own): setattr(self, "announced", at)  # noqa: E731
                self.hooks.callback(module.register_forward_pre_hook(announce).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self.hooks.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        kwargs = kwargs or {}
        if type(func) in aten.OPERATIONS and (run := aten.in_torch(func, args, kwargs)) is not None:
            with self:
                return run()
        reason = rules.coupling(func, args, kwargs)
        if func in READ:
            call = READ[func](*args, **kwargs)
            name = self._name(call)
            weights = self.capture.active and isinstance(self.capture.followed.kind(call.input), SharedTensor)
            if reason and not weights:
                if _runs_again():
                    raise CaptureError(CHECKPOINTED)
                self.capture.trusts = True
                try:
                    return self.by(name, call, lambda: self._layout(name, call.input))
                finally:
                    self.capture.trusts = False
        elif reason:
            raise BatchCoupledError(
                f"{function_name(func)} {reason}, in a way that has no known statistics: only calls of "
                "torch.nn.functional.batch_norm (and torch.batch_norm) can be taken apart."
            )
        return func(*args, **kwargs)

    def _name(self, call: Arguments) -> str:
        """The path of the module; for functional calls that of the module which owns a tensor of the call."""
        (announced, own), self.announced = self.announced, ("", set())
        owners = [self.capture.names[id(t)].rpartition(".")[0] for t in call.tensors if id(t) in self.capture.names]
        if own.isdisjoint(map(id, call.tensors)) and owners:  # that one computes by itself, and somebody else calls
            announced = ""
        name = announced or next(iter(owners), "") or "batch_norm"
        self.calls[name] = count = self.calls.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def _layout(self, name: str, x: Tensor) -> Layout:
        layout: Layout | None = getattr(self.capture.followed.kind(x), "layout", None)
        if layout is None and not self.capture.active and x.shape[0] == self.capture.followed.n:
            layout = Layout(self.capture.followed.n)  # inside a criterion
        if layout is None or layout.axis == 1 or x.ndim < 2:
            raise BatchNormError(
                f"'{name}': can't tell where the samples are in an input of shape {tuple(x.shape)}. Its statistics "
                "must be over samples: keep them on one axis of their own (not the channel axis), or say where they "
                "are with batch_dim=."
            )
        return layout


# ---- samples first --------------------------------------------------------------------------------------------------


def to_samples(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``z [M, C, P]``: the positions of every sample that takes part; which samples these are (``None``: all); and how
    many positions each has, where that is not ``P`` (what is behind them is zero).
    """
    if layout.alone is not None:  # in a loop over the samples
        return x.transpose(0, 1).flatten(1).unsqueeze(0), torch.tensor([layout.alone], device=x.device), None
    if layout.plain and layout.axis == 0:
        return (x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)), None, None
    rows, members, counts = samples_first(x, layout), None, None
    if layout.owner is not None:
        members, counts = layout.owner.to(x.device).unique(return_counts=True)
        rows = rows if len(members) == layout.n else rows[members]
    z = rows.movedim(2 if layout.axis == 0 else 3, 1)  # C was first, or behind the first, of the other axes
    counts = None if counts is None or int(counts.min()) == z.shape[2] else counts * z.shape[3:].numel()
    return z.flatten(2), None if members is None or len(members) == layout.n else members, counts


def from_samples(z: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """``z [M, C, P]`` as the output for an input ``x``."""
    if layout.alone is not None:
        return z.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    if layout.plain and layout.axis == 0:
        return z.reshape(x.shape)
    rest = x.movedim(layout.axis, 0).shape[1:]
    place = 0 if layout.axis == 0 else 1  # of the channels in rest
    rows = z.reshape(*z.shape[:2], -1, *rest[:place], *rest[place + 1 :]).movedim(1, 2 + place)
    if layout.owner is None:
        rows = rows.unflatten(1, (layout.outer, layout.inner)).transpose(0, 1).flatten(0, 2)
    else:
        owner = layout.owner.to(x.device)
        rows = rows[owner.unique(return_inverse=True)[1], ranks(owner)]
    return rows.movedim(0, layout.axis)


def pooled(nodes: Sequence[Node]) -> list[Tensor]:
    """The ``K`` statistics, two tensors for every node: mean and variance of one after the other."""
    return [s for node in nodes for s in node.pooled]
