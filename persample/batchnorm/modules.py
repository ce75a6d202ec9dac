"""Drop-in BatchNorm modules that keep the structure of their last forward.

What they compute is torch's own forward: same outputs, same gradients, same buffers, same ``state_dict``. After a
forward, ``.jacobian`` is the structured ``d y / d x`` of that forward and ``.coupling`` the ``N x N`` norms of its
blocks. "The gradient of sample n" is not offered: under batch statistics it is not one thing.

Between the forward and a question only a reference to the input is kept (autograd holds the same tensor until the
backward), with copies of the ``[C]``-sized parameters as they were; nothing is computed before it is asked for. ``del
bn.jacobian`` lets the input go earlier than the next forward does.

:func:`convert` changes the *class* of the BatchNorm modules of a model and nothing else, so parameters, buffers, hooks,
modes, optimisers and sharing stay as they are, and :func:`revert` is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from persample.arguments import check_module
from persample.batchnorm.jacobian import BatchNormJacobian
from persample.batchnorm.linearize import Layer, ghost_batches, linearize, running_statistics, uses_batch_statistics
from persample.errors import BatchNormError, InplaceError, warn
from persample.state import OWN

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class _Forward:
    """The arguments of one forward; what may change afterwards is copied, but for the input, which has a version."""

    input: Tensor
    version: int | None  # None for the copy of an inference tensor, which has no version
    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor] | None
    eps: float
    virtual_batch_size: int | None

    @property
    def lost(self) -> bool:
        """Whether the input is another one by now."""
        return self.version is not None and self.input._version != self.version

    def jacobian(self) -> BatchNormJacobian:
        if self.lost:
            raise InplaceError(
                "the input of this BatchNorm was changed in place after the forward, so its Jacobian is lost; "
                "ask for it before the change, or make the change out of place"
            )
        size = self.virtual_batch_size
        group = None if size is None else ghost_batches(len(self.input), size, self.input.device)
        return linearize(self.input, self.weight, self.bias, self.eps, self.running, group)


class _Recording(Layer):
    """What the three classes share. ``_recorded`` is the last forward, or the reason why there is none."""

    virtual_batch_size: int | None = None
    _recorded: _Forward | str = "it has not run yet: do a forward first"
    __jit_unused_properties__: ClassVar[list[str]] = ["jacobian", "coupling"]

    def __init__(self, *args: Any, virtual_batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if virtual_batch_size is not None:
            self.virtual_batch_size = _checked(virtual_batch_size)

    def forward(self, input: Tensor) -> Tensor:
        """What the torch module of the same name computes, per ghost batch if there is a ``virtual_batch_size``."""
        if self.virtual_batch_size is None or not uses_batch_statistics(self):
            output = super().forward(input)
        else:
            normalise = super().forward
            chunks = input.chunk(max(1, math.ceil(len(input) / self.virtual_batch_size)))
            if chunks[-1].numel() == self.num_features:  # before the others have moved the running statistics
                raise BatchNormError(
                    f"Expected more than 1 value per channel in every ghost batch, but the last of the {len(input)} "
                    "samples is alone, with a single value: choose another virtual_batch_size than "
                    f"{self.virtual_batch_size}, or drop a sample."
                )
            output = torch.cat([normalise(chunk) for chunk in chunks])
        if torch.compiler.is_compiling() or not OWN.get():
            self._recorded = _record(self, input)
        return output

    @property
    def jacobian(self) -> BatchNormJacobian:
        """``d y / d x`` of the last forward that finished; ``del`` it to let go of the input.

        Computed anew at each access, ``O(N C S)``. Raises ``BatchNormError`` if there was no forward (or none that can
        be recorded), ``InplaceError`` if its input has been overwritten since.
        """
        if isinstance(self._recorded, str):
            raise BatchNormError(f"this {type(self).__name__} has no Jacobian to show: {self._recorded}")
        return self._recorded.jacobian()

    @jacobian.deleter
    def jacobian(self) -> None:
        self._recorded = "it was deleted: do another forward"

    @property
    def coupling(self) -> Tensor:
        """``|d y_n / d x_m|_F``, ``[N, N]``, of that forward: diagonal in evaluation mode. Raises as ``jacobian``."""
        return self.jacobian.block_norms()

    def __dir__(self) -> list[str]:
        """Without what would raise: whoever reads all that is listed (torch.jit, `inspect`) expects to be able to."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        there = isinstance(self._recorded, _Forward) and not self._recorded.lost
        return names if there else [name for name in names if name not in ("jacobian", "coupling")]

    def __prepare_scriptable__(self) -> nn.Module:
        raise BatchNormError(
            f"torch.jit.script can't compile a {type(self).__name__} that keeps its last forward. Script what it was "
            "before persample.batchnorm.convert, as revert() gives it back (of a copy, to go on with this one)."
        )

    def extra_repr(self) -> str:
        size = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        return f"{super().extra_repr()}{size}"  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles go without the last batch
        return {name: value for name, value in self.__dict__.items() if name != "_recorded"}


class BatchNorm1d(_Recording, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, input ``[N, C]`` or ``[N, C, L]``, with its ``jacobian`` and ``coupling``.

    All arguments are those of the torch module. ``virtual_batch_size`` (ghost batch normalisation, Hoffer et al. 2017,
    arXiv:1705.08741) normalises chunks of about that many consecutive samples separately where batch statistics are
    used; chunks are those of ``torch.chunk``: at most ``ceil(N / virtual_batch_size)``, all but the last one of equal
    size. Each updates the running statistics in turn; a last one with a single value per channel is refused. After
    several forwards the last one that finished counts, but for those of this library's own passes
    (`persample.gradients`); inside ``torch.compile`` and ``torch.func`` transforms nothing is recorded.
    """


class BatchNorm2d(_Recording, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, input ``[N, C, H, W]``; otherwise as :class:`BatchNorm1d`."""


class BatchNorm3d(_Recording, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, input ``[N, C, D, H, W]``; otherwise as :class:`BatchNorm1d`."""


CONVERTED: dict[type[nn.Module], type[_Recording]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
REVERTED: dict[type[nn.Module], type[nn.Module]] = {new: old for old, new in CONVERTED.items()}


def convert(model: Model, virtual_batch_size: int | None = None) -> Model:
    """Turn every ``torch.nn.BatchNorm1d/2d/3d`` in ``model``, or itself, into ours, in place; returns ``model``.

    Only the class of those modules changes: parameters, buffers, hooks, modes and sharing are untouched, and so is what
    the model computes, unless ``virtual_batch_size`` is given, which turns them (and those already converted) into
    ghost batch normalisation.

    Raises ``BatchNormError``, before anything is changed, for a ``SyncBatchNorm`` (its statistics span processes, of
    which one sees only its own input) and for lazy modules (run the model once first). Subclasses of other people are
    left alone, with a warning: what they compute is theirs to say.
    """
    check_module(model)
    size = None if virtual_batch_size is None else _checked(virtual_batch_size)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    for name, module in layers.items():
        _refuse(name, module)
    foreign = [f"{name!r} ({type(m).__name__})" for name, m in layers.items() if type(m) not in CONVERTED | REVERTED]
    if foreign:
        warn(f"BatchNorm subclasses are left as they are: {', '.join(foreign)}")
    for module in layers.values():
        if type(module) in CONVERTED:
            module.__class__ = CONVERTED[type(module)]
        if size is not None and isinstance(module, _Recording):
            module.virtual_batch_size = size
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: the modules become those of ``torch.nn`` again, in place; returns ``model``.

    Forgets the last forward and ``virtual_batch_size``, which torch's modules do not have.
    """
    check_module(model)
    for module in model.modules():
        if type(module) in REVERTED:
            module.__class__ = REVERTED[type(module)]
            for name in ("_recorded", "virtual_batch_size"):
                module.__dict__.pop(name, None)
    return model


def _record(bn: _Recording, input: Tensor) -> _Forward | str:
    if torch.compiler.is_compiling():
        return "its last forward ran inside torch.compile; run the original module"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "its last forward ran inside a torch.func transform; run it outside, or use persample.batchnorm.jacobian"
    inference = input.is_inference()
    kept = input.detach().clone() if inference else input.detach()
    running = running_statistics(bn)
    size = bn.virtual_batch_size if running is None else None
    if running is not None:
        running = running[0].clone(), running[1].clone()
    weight, bias = (None if t is None else t.detach().clone() for t in (bn.weight, bn.bias))
    return _Forward(kept, None if inference else kept._version, weight, bias, running, bn.eps, size)


def _refuse(name: str, module: Layer) -> None:
    if isinstance(module, nn.SyncBatchNorm):
        raise BatchNormError(
            f"{name!r} is a SyncBatchNorm: its statistics are those of all processes, and only one's input is here; "
            "convert before torch.nn.SyncBatchNorm.convert_sync_batchnorm, or analyse one process"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise BatchNormError(
            f"{name!r} is a {type(module).__name__} that has not seen an input; run the model once first"
        )


def _checked(virtual_batch_size: int) -> int:
    integer = isinstance(virtual_batch_size, Integral) and not isinstance(virtual_batch_size, bool)
    if not integer or virtual_batch_size < 1:
        raise BatchNormError(
            f"virtual_batch_size must be at least 1, a whole number of samples, got {virtual_batch_size!r}"
        )
    return virtual_batch_size
