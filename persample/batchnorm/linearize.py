"""From a BatchNorm layer and its input to the Jacobian: which statistics, of which groups, and when there is none.

A layer is only read. Batch statistics are used exactly when torch uses them: in training mode, and in evaluation mode
where there are no running ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persample.batchnorm.jacobian import BatchNormJacobian
from persample.batchnorm.operator import group_sum
from persample.errors import BatchNormError

Layer = nn.modules.batchnorm._BatchNorm

# where the forwards are defined that are BatchNorm and nothing else
PLAIN = ("torch.nn.modules.batchnorm", "persample.batchnorm.modules")


def uses_batch_statistics(bn: Layer) -> bool:
    """Whether the layer couples its samples now: in training mode, and without running statistics in evaluation mode
    too.
    """
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def running_statistics(bn: Layer) -> tuple[Tensor, Tensor] | None:
    """Mean and variance ``[C]`` by which the layer normalises now, or None where it uses those of the batch."""
    if uses_batch_statistics(bn):
        return None
    if bn.running_mean is None or bn.running_var is None:
        raise BatchNormError("this BatchNorm has only one of running_mean and running_var; set both, or none")
    return bn.running_mean, bn.running_var


def jacobian(bn: Layer, x: Tensor, groups: int | Tensor | None = None) -> BatchNormJacobian:
    """``d y / d x`` of the BatchNorm layer ``bn`` at the input ``x [N, C, *S]``, in the mode it is in, as a structured
    operator.

    ``groups`` gives ghost batches: a number of equal groups of consecutive samples, or labels ``[N]``; by default those
    of ``bn`` itself (``virtual_batch_size`` of a :class:`persample.batchnorm.BatchNorm1d`, ...), else one. They play no
    role where the running statistics are used. The layer is only read: no running statistic moves, no forward is run.
    ``eps = 0`` is allowed here.

    A ``SyncBatchNorm`` is accepted where it normalises by the statistics of its own process only; otherwise concatenate
    the inputs of all processes and pass an ordinary BatchNorm with the same parameters.

    Raises ``BatchNormError`` for inputs of another shape, for fewer than two values per channel and group, for a
    constant channel with ``eps = 0``, for subclasses with a forward of their own (another function, hence another
    Jacobian).

    Cost ``O(N C S)``: about one normalisation.
    """
    _check(bn, x)
    running = running_statistics(bn)
    if groups is None:
        size = getattr(bn, "virtual_batch_size", None)
        group = None if size is None else ghost_batches(len(x), size, x.device)
    else:
        group = _labels(groups, x)
    return linearize(x, bn.weight, bn.bias, bn.eps, running, group if running is None else None)


@torch.no_grad()
def linearize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    group: Tensor | None = None,
) -> BatchNormJacobian:
    """The Jacobian of ``F.batch_norm`` at ``x``, without a module: batch statistics per ``group [N]`` unless
    ``running`` is given.

    ``group`` holds the numbers ``0 .. G - 1``, each at least once. Raises as :func:`jacobian`.
    """
    if not x.numel():
        raise BatchNormError(f"an input without values has no Jacobian; got {tuple(x.shape)}")
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
    rows = values.reshape(*values.shape[:2], -1)
    if running is not None:
        mean, variance = (t.detach()[None].to(values.dtype) for t in running)
    else:
        mean, variance = _statistics(rows, group, x.shape)
    spread = variance + eps
    if eps == 0 and bool((spread == 0).any()):
        channel = int((spread == 0).any(0).nonzero()[0])
        raise BatchNormError(f"channel {channel} has variance 0 and eps is 0: it has no derivative there; use eps > 0")
    normed = (rows - mean[group][..., None]) / spread.sqrt()[group][..., None]
    gain, shift = (None if t is None else t.detach().to(values.dtype, copy=True) for t in (weight, bias))
    return BatchNormJacobian(normed.reshape(x.shape), mean, variance, group, eps, gain, shift, running is None)


def ghost_batches(samples: int, size: int, device: torch.device) -> Tensor:
    """Group labels ``[N]`` of the chunks of about ``size`` consecutive samples that ``torch.chunk`` makes."""
    chunks = torch.arange(samples, device=device).chunk(max(1, -(-samples // size)))
    return torch.cat([torch.full_like(chunk, g) for g, chunk in enumerate(chunks)])


def _statistics(rows: Tensor, group: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per group and channel, ``[G, C]``, in two passes; ``rows`` is ``[N, C, P]``."""
    samples = torch.bincount(group)
    count = samples[:, None] * rows.shape[2]
    if int(count.min()) < 2:
        where = "" if len(count) == 1 else f" in every group (groups have {samples.tolist()} samples)"
        raise BatchNormError(
            f"Expected more than 1 value per channel when training{where}, got input size {shape}; "
            "use a larger batch, larger groups, or evaluation mode"
        )
    mean = group_sum(rows.sum(2), group, len(count)) / count
    centred = rows - mean[group][..., None]
    return mean, group_sum(centred.square().sum(2), group, len(count)) / count


def _labels(groups: int | Tensor, x: Tensor) -> Tensor:
    """Group labels ``0 .. G - 1`` of every sample, from a number of groups or from any labels."""
    if isinstance(groups, int):
        if groups < 1 or len(x) % groups:
            raise BatchNormError(
                f"groups={groups} does not divide the batch of {len(x)} samples; pass a label for every sample, "
                "e.g. torch.arange(N) // size"
            )
        return torch.arange(len(x), device=x.device) // (len(x) // groups)
    if not isinstance(groups, Tensor) or groups.shape != x.shape[:1]:
        got = tuple(groups.shape) if isinstance(groups, Tensor) else repr(groups)
        raise BatchNormError(f"groups needs a number, or a tensor with one label per sample, [{len(x)}]; got {got}")
    labels: Tensor = torch.unique(groups.to(x.device), return_inverse=True)[1]
    return labels


def _check(bn: Layer, x: Tensor) -> None:
    if not isinstance(bn, Layer):
        raise BatchNormError(f"jacobian() takes a BatchNorm layer, got {type(bn).__name__}")
    if not isinstance(x, Tensor):
        raise BatchNormError(f"x must be the input of the layer, a tensor [N, C, *S], got {type(x).__name__}")
    kind = type(bn).__name__
    if type(bn).forward.__module__ not in PLAIN:
        raise BatchNormError(
            f"{kind} is a BatchNorm with a forward of its own, so its Jacobian is another one; pass a plain BatchNorm "
            "with the same parameters and buffers for the normalisation inside it"
        )
    if isinstance(bn, nn.SyncBatchNorm) and bn.training and _world_size(bn) > 1:
        raise BatchNormError(
            "SyncBatchNorm normalises by the statistics of all processes, of which only this one's input is here; "
            "concatenate the inputs of all processes and pass an ordinary BatchNorm with the same parameters"
        )
    try:
        bn._check_input_dim(x)
    except ValueError as error:
        raise BatchNormError(f"{kind}: {error}") from error
    if x.shape[1] != bn.num_features:
        raise BatchNormError(f"{kind} has {bn.num_features} channels; the input {tuple(x.shape)} has {x.shape[1]}")


def _world_size(bn: nn.SyncBatchNorm) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(bn.process_group)
