"""One loss per sample, from any criterion: the loss of sample ``n`` is what the criterion says of sample ``n`` alone.

``loss_fn(outputs, targets)`` that returns ``[N]`` is taken as it is.  One that returns a scalar (most ``nn.*Loss()``
with its default reduction) is called with batches of one, ``loss_fn(outputs[n:n+1], targets[n:n+1])``, vectorised by
``vmap``, or in a loop where ``vmap`` can't follow (``.item()``).  So there is no ``1/N`` to configure.  Note what
follows: class weights cancel in a (weighted) mean over one sample, and a mean over positions is one over that
sample's positions.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap
from torch.nn import functional as F

from .batch import Batch, Tree, flatten, taken_apart, unflatten
from .errors import LossError, warn
from .layout import spreads
from .lone import Mapped
from .state import Buffers, restored
from .telling import tell

LossFunction = Callable[[Any, Any], Tensor]


def is_per_sample(losses: Any, n: int) -> bool:
    """Whether a criterion's value is already ``[N]``; an error if it is neither that nor a scalar."""
    if not isinstance(losses, Tensor):
        raise LossError(f"loss_fn must return a tensor, got {type(losses).__name__}.")
    if losses.layout is not torch.strided:
        raise LossError(f"loss_fn returned losses of layout {losses.layout}; return losses.to_dense().")
    if not losses.is_floating_point():
        raise LossError(f"loss_fn returned losses of type {losses.dtype}; they must be real numbers.")
    if losses.shape == (n,):
        return True
    if losses.ndim == 0:
        return False
    raise LossError(
        f"loss_fn returned shape {tuple(losses.shape)} for N = {n} samples; it must return [N] (reduction='none', then "
        f"reduced over everything but the samples) or a scalar (meant for one sample alone).{ways_out(losses, n)}"
    )


def ways_out(losses: Tensor, n: int) -> str:
    """For losses of a shape that isn't ``[N]``: how they become ``[N]``, if the shape tells; begins with a space."""
    shape = tuple(losses.shape)
    if shape == (n, n) and n > 1:
        return " Outputs [N, 1] against targets [N] broadcast to [N, N]: outputs.squeeze(-1)."
    per_token = "for a row per token, see 'Rows per token' in docs/losses.md"
    if len(shape) > 1 and shape[0] == n:
        return f" Sum or average each sample's own entries, losses.flatten(1).sum(1); {per_token}."
    if len(shape) == 1 and n > 1 and shape[0] > n and shape[0] % n == 0:
        return (
            f" If these are {shape[0] // n} losses of every sample, one after the other (tokens), sum or average them, "
            f"losses.view({n}, -1).sum(1); if they were picked by a mask, keep all and multiply by it, (losses * mask)"
            f".sum(1); {per_token}."
        )
    return ""


CRITERIA: dict[type[nn.Module], LossFunction] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}


def unreduced(loss_fn: Any, outputs: Any, targets: Any, n: int) -> Tensor | None:
    """``[N]``: the lone losses from a criterion of torch's own with ``reduction="none"``, cheaper than `lone_losses`;
    ``None`` where the two might differ: other criteria, class weights, ignored targets, broadcasting.
    """
    if not (type(outputs) is Tensor and type(targets) is Tensor):
        return None
    ignore: int | None
    if type(loss_fn) in CRITERIA and all(b is None for b in loss_fn._buffers.values()):
        if any(getattr(loss_fn, hooks) for hooks in HOOKS) or nn.modules.module._has_any_global_hook():
            return None
        each, reduction, ignore = _not_reducing(loss_fn), loss_fn.reduction, getattr(loss_fn, "ignore_index", None)
    elif any(loss_fn is f for f in CRITERIA.values()):
        each, reduction = partial(loss_fn, reduction="none"), "mean"
        ignore = -100 if loss_fn in (F.cross_entropy, F.nll_loss) else None
    else:
        return None
    if targets.is_floating_point():  # probabilities, not classes
        ignore = None
    shape = outputs.shape if ignore is None else outputs.shape[:1] + outputs.shape[2:]
    fits = outputs.shape[:1] == (n,) and targets.shape == shape and reduction in ("mean", "sum")
    if not fits or (ignore is not None and bool(targets.eq(ignore).any())):
        return None
    losses: Tensor = each(outputs, targets)
    if losses.shape[:1] != (n,):
        return None
    if losses.ndim > 1:
        losses = losses.flatten(1).mean(1) if reduction == "mean" else losses.flatten(1).sum(1)
    return losses


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _not_reducing(criterion: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The criterion with ``reduction="none"``; ``copy`` takes several times as long."""
    each = object.__new__(type(criterion))
    each.__dict__.update(criterion.__dict__, reduction="none")
    return each.forward


def reduced(shapes: list[tuple[int, ...]], n: int) -> LossError:
    """What is wrong with a criterion of outputs that have no sample axis."""
    if not shapes:
        return LossError(
            f"loss_fn returns one number for the batch, and the model no tensors, none with N = {n} samples, of which "
            "it could be given one alone (other objects than tuples, lists, dicts and dataclasses, such as "
            "distributions, can't be taken apart): let loss_fn return [N] losses, or the model tensors."
        )
    return LossError(
        f"loss_fn uses outputs of the model of shape(s) {shapes}, none with N = {n} samples: a loss that the model has "
        "already reduced can't be taken apart. Let the model return its predictions (for transformers: leave out "
        "labels=, use outputs.logits), and give loss_fn; or say where the samples are, batch_dim=(inputs, targets, "
        "outputs). A single sample needs a batch axis too: x.unsqueeze(0)."
    )


def check_outputs(loss_fn: Any, outputs: Any) -> None:
    """Raise where a criterion of torch is given the whole output object of a model."""
    if not isinstance(outputs, Tensor) and (type(loss_fn) in CRITERIA or loss_fn in CRITERIA.values()):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        field = ".logits" if hasattr(outputs, "logits") else ""
        if isinstance(outputs, Mapping) and outputs and not field:
            field = f"[{next(iter(outputs))!r}]"
        raise LossError(
            f"{name} takes a tensor, but the model returns a {type(outputs).__name__}: give it the one that is meant, "
            f"loss_fn=lambda outputs, targets: criterion(outputs{field or '[0]'}, targets)."
        )


def unrelated() -> LossError:
    """What to raise of a loss that depends on parameters but on no output."""
    return LossError(
        "loss_fn doesn't use what the model returns, but parameters all the same: its value is no loss of a "
        "sample (computed beforehand, or from another call of the model, it is that of the whole batch). "
        "Compute it from its arguments, loss_fn(outputs, targets)."
    )


@contextmanager
def hinted(outputs: Any, targets: Any) -> Iterator[None]:
    """What ``loss_fn`` raises inside says how it is called, where that is the likely cause."""
    try:
        yield
    except Exception as error:
        if targets is None and "NoneType" in str(error):
            _note(error, "targets is None: give targets=, if loss_fn needs them (of an autoencoder, the inputs again).")
        if isinstance(targets, (list, tuple)) and "must be Tensor, not" in str(error):
            _note(error, f"targets is a {type(targets).__name__}: give a tensor (torch.as_tensor, torch.stack).")
        if isinstance(error, TypeError) and "positional argument" in str(error) and isinstance(outputs, (tuple, list)):
            _note(error, "persample calls loss_fn(outputs, targets): loss_fn gets the whole tuple as outputs.")
        raise


def _note(error: Exception, text: str) -> None:
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(text)


def valued(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    """What a criterion says of a batch; an error if it is a scalar, for which samples alone are next, and outputs are
    no longer what they were, or targets, or buffers of its own, which would be changed again.
    """
    with torch._C.DisableTorchFunction():  # every attribute of a tensor is a call to a mode
        given = [flatten(tree) for tree in (outputs, targets)]
        before = [_versions(leaves) for leaves, _ in given]
        own = Buffers(loss_fn)
    with hinted(outputs, targets):
        whole = loss_fn(outputs, targets)
    with torch._C.DisableTorchFunction():
        changed = [_versions(leaves) != versions for (leaves, _), versions in zip(given, before, strict=True)]
        again = any(changed) and isinstance(whole, Tensor) and not whole.ndim
        if again and (changed[0] or not _settled(loss_fn, unflatten(*given[0]), *given[1], whole)):
            raise LossError(
                "loss_fn changes outputs or targets in place and returns a scalar, so that it is called once more, for "
                "every sample alone, with what it has left of them. Use operations that are not in place (masked_fill "
                "instead of masked_fill_, out = out / 2 instead of out /= 2), or return [N] losses."
            )
        if isinstance(loss_fn, nn.Module) and isinstance(whole, Tensor) and not whole.ndim and (moved := own.moved()):
            with restored(loss_fn), torch.no_grad():
                twice = loss_fn(outputs, targets)
            if not _alike(twice, whole):
                raise LossError(
                    f"loss_fn moves its buffer '{moved}' and returns a scalar that depends on it, so that it is called "
                    "once more, for every sample alone, with another one. Move it outside of the forward, or return "
                    "[N] losses."
                )
    return whole


def _alike(x: Any, y: Any) -> bool:
    """The same numbers, NaN as well."""
    return bool(((x == y) | ((x != x) & (y != y))).all())


def _versions(leaves: list[Any]) -> list[int]:
    return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


def _settled(loss_fn: LossFunction, outputs: Any, leaves: list[Any], spec: Any, whole: Tensor) -> bool:
    """Whether a criterion that has changed targets (``y[y == 255] = -100``) now leaves them, and says the same."""
    own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
    with torch.no_grad():
        again = loss_fn(outputs, unflatten(own, spec))
    pairs = [(again, whole), *[(x, y) for x, y in zip(own, leaves, strict=True) if isinstance(y, Tensor)]]
    return all(_alike(x, y) for x, y in pairs)  # NaN as well: all are ignored


def lone_losses(loss_fn: LossFunction, outputs: Tree, targets: Tree, n: int) -> Tensor:
    """``[N]``: a scalar criterion of every sample alone."""
    if not outputs.sampled():
        raise reduced([tuple(x.shape) for x in outputs.leaves if isinstance(x, Tensor)], n)
    if sparse := [x.layout for x in outputs.leaves if isinstance(x, Tensor) and x.layout is not torch.strided]:
        raise LossError(
            f"the model returned outputs of layout {sparse[0]}, of which loss_fn can't be given one sample alone: "
            "return outputs.to_dense(), or let loss_fn return [N] losses."
        )

    def one(pieces: list[list[Tensor]]) -> Tensor:
        with Mapped():
            return _scalar(loss_fn(outputs.one(pieces[0]), targets.one(pieces[1])))

    try:
        samples, dims = taken_apart(outputs, targets)
        with _slow_in_silence():
            return vmap(one, in_dims=(dims,), randomness="error")(samples)
    except LossError:
        raise
    except Exception:  # data-dependent criterions: one by one, which raises the user's own error if there is one
        try:
            own = [targets.select(torch.tensor([i], device="cpu")).whole() for i in range(n)]  # which it may write into
            return torch.stack([_scalar(loss_fn(outputs.sample(i), y)) for i, y in enumerate(own)])
        except Exception as error:
            _note(
                error,
                "persample calls a loss_fn that returns a scalar with the outputs and targets of one sample alone: "
                "give targets as targets=, rather than take those of the batch from outside; or return [N] losses.",
            )
            raise


@contextmanager
def _slow_in_silence() -> Iterator[None]:
    """Inside, ``vmap`` does not say that it has no batching rule for a function (CTC, margins) and runs it sample by
    sample, which nobody who calls a criterion can change.

    Its switch is one for all threads, and can't be read: the last to leave puts it back to what it is by default.  A
    filter of warnings would be one for all threads too, and make Python show every warning anew.
    """
    global _silent
    with _LOCK:
        _silent += 1
        _tell(False)
    try:
        yield
    finally:
        with _LOCK:
            _silent -= 1
            _tell(_silent == 0)


_LOCK, _silent = threading.Lock(), 0
_tell: Callable[[bool], None] = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda _: None)


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise LossError(f"loss_fn returned shape {tuple(loss.shape)} for one sample alone; it must return a scalar.")
    return loss.reshape(())


def ignored(loss_fn: LossFunction, losses: Tensor, outputs: Tree, targets: Tree, first: int = 0) -> Tensor | None:
    """Samples whose every target is ignored (a mean over nothing is NaN, whatever the outputs are): their rows are
    zero.  ``None`` if there are none.
    """
    bad = losses.detach().isnan()
    if not bool(bad.any()):
        return None
    n = len(losses)
    if all(x.is_floating_point() for x, _ in targets.sampled()):
        return None
    for x, axis in outputs.sampled():
        if x.is_floating_point():
            bad = bad & x.detach().movedim(axis, 0).reshape(n, -1).isfinite().all(1)
    for value in (0.0, 1.0, -1.0) if bool(bad.any()) else ():
        pairs = zip(outputs.leaves, outputs.axes, strict=True)
        others = [x if a is None or not x.is_floating_point() else torch.full_like(x, value) for x, a in pairs]
        with torch.no_grad():
            bad = bad & lone_losses(loss_fn, replace(outputs, leaves=others), targets, n).isnan()
    if not bool(bad.any()):
        return None
    if n > 1 and bool(bad.all()):  # a mean over nothing is NaN for the batch, too
        with torch.no_grad():
            whole = loss_fn(outputs.whole(), targets.whole())
        if bool(whole.isfinite()):
            raise _compares(whole, "NaN")
    tell((bad.nonzero().flatten() + first).tolist())
    return bad


def check_not_broadcast(loss_fn: LossFunction, whole: Tensor, outputs: Tree, targets: Tree, n: int) -> None:
    """Raise where the criterion has compared samples with each other by broadcasting outputs ``[N, 1]`` with targets
    ``[N]``: ``whole`` is not made of the lone losses, and would be if both had the same shape.
    """
    _check_no_distribution(loss_fn, whole, outputs, targets, n)
    given = [[x.shape for x, _ in tree.sampled()] for tree in (outputs, targets)]
    for x, y in ((x, y) for x in given[0] for y in given[1] if spreads(x, y)):
        shape = max(x, y, key=len)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the broadcasting itself
            try:
                alone = lone_losses(loss_fn, outputs, targets, n)
                alike = (t.map(lambda z, _: z.reshape(shape) if z.shape in (x, y) else z) for t in (outputs, targets))  # noqa: B023
                proven = not _made_of(whole, alone) and _made_of(loss_fn(*alike), alone)
            except Exception:  # a criterion that needs its shapes as they are
                continue
        if proven:
            long, short = ("outputs", "targets") if len(x) > len(y) else ("targets", "outputs")
            last = shape[:-1] == min(x, y, key=len)
            raise LossError(
                f"loss_fn broadcasts outputs of shape {tuple(x)} with targets of shape {tuple(y)} to "
                f"{tuple(torch.broadcast_shapes(x, y))}: it compares every sample with all others. Give both one "
                f"shape: {long}.{'squeeze(-1)' if last else f'reshape({short}.shape)'}."
            )


def _check_no_distribution(loss_fn: LossFunction, whole: Tensor, outputs: Tree, targets: Tree, n: int) -> None:
    """Raise where lone losses are made with a distribution of all samples, which pytrees can't take apart."""
    kind = next((type(x).__name__ for x in outputs.leaves if isinstance(x, Distribution)), "")
    if not kind or whole.ndim or not outputs.sampled():
        return
    with torch.no_grad():
        alone = lone_losses(loss_fn, outputs, targets, n)
    if not _made_of(whole, alone):
        raise LossError(
            f"loss_fn returns one number for the batch, and the model a {kind} of all samples, of which it can't be "
            "given one alone: let loss_fn return [N] losses; or the model the distribution's parameters (logits), and "
            "make it in loss_fn."
        )


def _made_of(whole: Tensor, losses: Tensor) -> bool:
    """Whether a criterion's value is the lone losses ``[N]``, or their mean or sum."""
    rounding = max(1e-3, 4 * max(torch.finfo(x.dtype).eps for x in (whole, losses)))  # that of half precision
    whole, losses, n = whole.detach().double(), losses.detach().double(), len(losses)
    if whole.ndim:
        return whole.shape == losses.shape and torch.allclose(whole, losses, rtol=rounding, atol=1e-6, equal_nan=True)
    mean = losses.mean()
    tolerance = rounding * (mean.abs() + whole.abs()) + 1e-6
    return not bool(((mean - whole).abs() > tolerance) & ((mean * n - whole).abs() > tolerance * n))


def warn_if_not_mean(loss_fn: LossFunction, whole: Tensor, losses: Tensor, outputs: Tree, targets: Tree) -> None:
    """Say so where the criterion of the batch is neither the mean nor the sum of the lone losses; raise where these are
    all zero, or where it takes nothing but batches of this size and samples alone, which it broadcasts with what it has
    of the batch.
    """
    if not _made_of(whole, losses):
        if bool(whole.isfinite() & ~losses.any()):
            raise _compares(whole, "0")
        _check_any_size(loss_fn, outputs, targets, len(losses))
        warn(
            f"the criterion of the whole batch is {float(whole.detach()):.6g}, the mean of the samples' own losses "
            f"{float(losses.detach().double().mean()):.6g}. Legitimate causes: class weights, ignore_index, or masks "
            "with unequal counts per sample. Otherwise outputs and targets are broadcast over the samples (compare "
            "[N, 1] with [N]), or the criterion looks at several samples at once (contrastive losses): let loss_fn "
            "return [N] losses."
        )


def _compares(whole: Tensor, alone: str) -> LossError:
    return LossError(
        f"loss_fn is {float(whole.detach()):.6g} for the batch and {alone} for every sample alone: it compares "
        "samples (a contrastive or triplet loss, a deviation or correlation over the batch). Let it return [N] losses "
        "of the batch: `with persample.extend(model) as recorder: recorder.gradients(losses, coupled='loss')`."
    )


def _check_any_size(loss_fn: LossFunction, outputs: Tree, targets: Tree, n: int) -> None:
    """Raise for a criterion in which another number of samples meets something of ``n``; asked once."""
    if (key := id(loss_fn)) in _SIZED:
        return
    size = 3 if n == 2 else 2
    some = torch.arange(size, device="cpu") % n
    owner = loss_fn if isinstance(loss_fn, torch.nn.Module) else torch.nn.Identity()
    with restored(owner), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss_fn(outputs.select(some).whole(), targets.select(some).whole())
        except Exception as error:
            if not {str(n), str(size)} <= {*re.findall(r"\d+", str(error))}:
                return  # it has other reasons, to want more samples for instance
            raise LossError(
                f"loss_fn takes all N = {n} samples, and one alone, where it has another value, but not {size} of them "
                f"({type(error).__name__}: {error}): it uses a tensor of N samples from outside (a closure), which is "
                "compared with every sample alone. Pass it as targets=."
            ) from error
    with contextlib.suppress(TypeError):  # what no weak reference can be made to is asked again
        _SIZED[key] = weakref.ref(loss_fn, lambda _: _SIZED.pop(key, None))


_SIZED: dict[int, weakref.ref[Any]] = {}  # criteria that were asked, by id


def per_sample(loss_fn: LossFunction, outputs: Any, targets: Any = None, batch_dim: Any = 0) -> Tensor:
    """``[N]``: the unscaled loss of every sample, of any criterion; differentiable with respect to ``outputs``.

    The sample axes are as for `persample.gradients`; raises `LossError` where the losses can't be had per sample.
    """
    batch = Batch.of(outputs, targets, batch_dim)
    return batch_losses(loss_fn, batch.inputs, batch.targets, batch.n)


def batch_losses(loss_fn: LossFunction, outputs: Tree, targets: Tree, n: int, told: bool = False) -> Tensor:
    """``[N]``: the losses of a batch, whatever the criterion returns; ``told``: see `warn_if_not_mean`."""
    own, given = outputs.whole(), targets.whole()
    whole = valued(loss_fn, own, given)
    each = is_per_sample(whole, n)
    check_not_broadcast(loss_fn, whole, outputs, targets, n)
    if each:
        return whole
    losses = lone_losses(loss_fn, outputs, targets, n)
    if (bad := ignored(loss_fn, losses, outputs, targets)) is None:
        if told:
            warn_if_not_mean(loss_fn, whole, losses, outputs, targets)
        return losses
    kept, losses = (~bad).nonzero().flatten(), losses.detach().masked_fill(bad, 0)
    if not len(kept):
        return losses
    alone = lone_losses(loss_fn, outputs.select(kept), targets.select(kept), len(kept))
    return losses.index_copy(0, kept, alone)  # in a gradient, 0 * NaN of the ignored samples would be NaN
