"""Models of which every process has a copy (`DistributedDataParallel`): they stay alike only while their gradients are
summed over processes, which happens in a backward pass of torch, and not in what is written or stepped along here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ArgumentError
from .state import modules_of

_SEEN: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def see(model: nn.Module) -> None:
    """Gradients of this model may come back, to be written or stepped along."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    _SEEN.update(module for module in modules_of(model) if isinstance(module, DistributedDataParallel))


def check_only_copy(parameters: Iterable[Tensor], what: str, *, local: bool = False) -> None:
    """Raise where ``what`` would be done to one of several copies of the parameters, by its own samples; unless
    ``local``: inside of ``no_sync()``, by which one says that they are to be summed later.
    """
    model = _copied(parameters)
    if model is None or (local and not model.require_backward_grad_sync):
        return
    raise ArgumentError(
        f"{what} is by the samples of this process alone, and the parameters are those of a DistributedDataParallel in "
        f"{distributed.get_world_size(model.process_group)} processes, whose copies would drift apart. Sum over "
        "processes, and step with an optimizer of torch.optim: for name, total in G.clip(C).items(): "
        "all_reduce(total); p[name].grad = total / B. Inside of model.no_sync(), G.backward() adds to the .grad of "
        "this process."
    )


def _copied(parameters: Iterable[Tensor]) -> DistributedDataParallel | None:
    """The model of several processes that one of the parameters belongs to."""
    if not _SEEN or not distributed.is_initialized():
        return None
    given = {id(p) for p in parameters}
    spread = (model for model in _SEEN if distributed.get_world_size(model.process_group) > 1)
    return next((model for model in spread if any(id(p) in given for p in model.parameters())), None)
