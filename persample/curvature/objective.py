"""The batch loss as a function that can be run again and again: same masks, same statistics, no trace left behind.

Curvature needs the loss of a batch at one fixed point, many times over.  `Objective` runs the model as it is, in its
own mode, on the whole batch; every run sees the random state of the moment at which the objective was made (one
dropout mask for all products with an operator) and the autocast region that it was made in.  Afterwards buffers
(running statistics, counters, power iterations) and the random state are what they were before.  ``.grad`` is never
touched.

What can't be differentiated twice (fused attention, cuDNN's recurrent layers, PyTorch's ``weight_norm``) is computed
by other means meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .. import aten
from ..batch import Tree, call_model
from ..capture import Capture, unrecorded
from ..errors import ArgumentError, CaptureError, LossError
from ..lone import NORMALISE, put_right
from ..losses import batch_losses
from ..patched import unpatched
from ..problem import Problem
from ..state import AutocastState, RandomState, autocast_as, autocast_state, random_state, restored, set_random_state
from ..verify import with_own_inputs


@dataclass(frozen=True)
class Start:
    """The random state in which every pass begins, and its autocast region: those of the moment when it was made."""

    random: RandomState
    autocast: AutocastState = field(default_factory=autocast_state)

    @staticmethod
    def now(model: nn.Module) -> Start:
        return Start(random_state(model))

    @contextmanager
    def again(self, problem: Problem) -> Iterator[None]:
        """Inside, a pass begins there and can be differentiated twice; afterwards, it has left no trace."""
        twice = twice_differentiable()
        with unrecorded(), restored(*problem.owners), torch.enable_grad(), twice, autocast_as(self.autocast):
            set_random_state(self.random)
            yield


@dataclass(frozen=True)
class Objective:
    """``scale * sum_n l_n`` of a batch, at the model's current parameters."""

    problem: Problem
    reduction: str
    start: Start
    silent: list[bool] = field(default_factory=lambda: [True])  # whether it was said what the losses aren't; once

    @staticmethod
    def of(problem: Problem, reduction: str) -> Objective:
        """``reduction="mean"``: scale ``1/N``; ``"sum"``: 1."""
        if reduction not in ("mean", "sum"):
            raise ArgumentError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        return Objective(problem, reduction, Start.now(problem.model), silent=[False])

    @property
    def scale(self) -> float:
        """``c``, ``1/N`` or 1."""
        return 1 / self.problem.batch.n if self.reduction == "mean" else 1.0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.problem.parameters

    @contextmanager
    def forward(self, capture: Capture | None = None) -> Iterator[Any]:
        """The outputs with their graph, to be differentiated inside the ``with`` block; ``capture`` records calls."""
        with self.start.again(self.problem):
            inputs = with_own_inputs(self.problem).batch.inputs.over(lambda x, _: x.detach())
            if capture is None:
                yield call_model(self.problem.model, inputs.whole())
            else:
                yield self._recorded(capture, inputs)

    def _recorded(self, capture: Capture, inputs: Tree) -> Any:
        try:
            with capture:
                capture.start(self.problem.batch.n, inputs.tensors())
                return call_model(self.problem.model, inputs.whole())
        finally:
            capture.stop()

    def losses(self, outputs: Any) -> Tensor:
        """``[N]``: the loss of every sample, unscaled, with its graph."""
        batch, (told, self.silent[0]) = self.problem.batch, (not self.silent[0], True)
        return batch_losses(self.problem.loss_fn, batch.outputs(outputs), batch.targets, batch.n, told)

    def loss_at(self, outputs: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The losses as a function of the outputs alone: the outputs with a graph, their leaves, the losses ``[N]``."""
        tree = self.problem.batch.outputs(outputs)
        ends = list({id(x): x for x in tree.leaves if isinstance(x, Tensor) and x.requires_grad}.values())
        cut = {id(x): x.detach().requires_grad_() for x in ends}
        given = {key: leaf.clone() for key, leaf in cut.items()}  # which loss_fn may change in place
        losses = self.losses(Tree([given.get(id(x), x) for x in tree.leaves], tree.spec, tree.axes).whole())
        if losses.requires_grad:
            self._refuse_penalties(losses)
        return ends, list(cut.values()), losses

    def _refuse_penalties(self, losses: Tensor) -> None:
        found = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True, retain_graph=True)
        if named := [name for name, g in zip(self.parameters, found, strict=True) if g is not None]:
            raise LossError(
                f"loss_fn depends on parameter '{named[0]}' directly, not only through the model's outputs (a penalty, "
                "or an intermediate result). Gauss-Newton and Fisher matrices are defined by the loss as a function "
                "of the outputs: use hvp, or add the penalty's curvature yourself."
            )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, functions are computed in ways whose backward passes can be differentiated again."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), WrittenOut():
        yield


class WrittenOut(TorchFunctionMode):
    """Runs ``weight_norm`` as the operations that it is made of: PyTorch's own differentiates its backward pass as if
    the norms were constants (in 2.13), and the second derivatives are wrong.  Normalisations are `put_right`.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        kwargs = kwargs or {}
        if type(func) in aten.OPERATIONS and (run := aten.in_torch(func, args, kwargs)) is not None:
            with self:
                return run()
        out = (_weight_norm if func is torch._weight_norm else func)(*args, **kwargs)
        if func in NORMALISE:
            put_right(out)
        return out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# ---- what has a first derivative only -----------------------------------------------------------------------------


def refuse_once_differentiable(ends: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> None:
    """Raise where a backward pass from ``ends`` (towards the leaves ``inputs``, if there are any) meets a function
    whose backward is marked ``@once_differentiable``: differentiated again, it is a constant, and nobody says so.  Or
    PyTorch's ``weight_norm`` where it could not be `WrittenOut`.
    """
    leaves = {id(x) for x in inputs}
    leads: dict[Any, bool] = {}  # whether a node is on the way
    stack = [(x.grad_fn, False) for x in ends if x.grad_fn is not None]
    while stack:
        node, visited = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if visited:
            leads[node] |= any(leads[n] for n in following)
            if leads[node] and node.name() == "WeightNormInterfaceBackward0":
                raise CaptureError(
                    "PyTorch's second derivative of weight_norm is wrong, and can't be replaced in a weight that was "
                    "computed before, or by a scripted module. Give the original model, not a scripted or traced one, "
                    "outside of parametrize.cached()."
                )
            if leads[node] and (name := _once_differentiable(node)):
                raise once_only(f"the autograd.Function {name} marks its backward as @once_differentiable")
        elif node not in leads:
            leads[node] = not leaves or id(getattr(node, "variable", None)) in leaves
            stack.append((node, True))
            stack += [(n, False) for n in following]


_ONCE = once_differentiable(lambda _: None).__code__


def _once_differentiable(node: Any) -> str:
    """The name of the class whose backward pass a node is, if it is so marked, also inside of other decorators."""
    own = getattr(type(node), "_forward_cls", None)
    for backward in (getattr(own, "backward", None), getattr(own, "vjp", None)):
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                return str(getattr(own, "__qualname__", own))
            backward = getattr(backward, "__wrapped__", None)
    return ""


def once_only(why: str) -> CaptureError:
    """What to raise of a function without a second derivative."""
    return CaptureError(
        f"{why}, so that there is no second derivative of it. Write it with operations that can be differentiated "
        "twice; or use what takes first derivatives only: empirical_fisher(..., method='rows'), kfac(..., "
        "type='empirical'), and if the function is in the model, not in the loss, any kfac, kflr and ekfac."
    )


@contextmanager
def named_derivatives() -> Iterator[None]:
    """Inside, what PyTorch has no second derivative of is refused by name."""
    try:
        yield
    except RuntimeError as error:
        if found := re.search(r"derivative for '?(?:aten::)?_?(\w+)_backward\w*'? is not implemented", str(error)):
            raise once_only(f"PyTorch doesn't differentiate the backward pass of {found[1]}") from error
        if any(told in str(error) for told in _UNFINISHED):
            raise once_only(f"PyTorch fails to differentiate the backward pass of a function here ({error})") from error
        raise


# What functions say whose backward pass was written without a second one in mind.
_UNFINISHED = ("arguments don't support automatic differentiation", "an undefined Tensor in C++")
