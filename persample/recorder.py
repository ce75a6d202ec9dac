"""`extend`: per-sample gradients in code that owns its own forward and backward.

As a context manager around any training code, ``recorder.gradients(losses)`` takes the ``[N]`` losses and does one
backward of its own, leaving the graph, every ``.grad`` and the user's own ``backward()`` as they are.  As a
persistent handle it only listens: whoever calls ``backward()``, the callback gets the per-sample gradients of that
backward.

On the model there are one forward pre-hook and one forward hook of the root module, until ``remove()``; nothing else
is touched.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .asked import Asked, Asking, asked_in, check_unchanged
from .batch import Batch, detached, flatten, suspended, three_dims
from .calls import Reached, between, reached
from .capture import Capture
from .collect import Collect
from .engines.hooks import eager
from .engines.loop import emit_stacked
from .errors import ArgumentError, CaptureError, InplaceError, LossError, SampleAxisError, warn
from .factors import Factors, strided
from .gradients import Result, Sink
from .hook import Hook
from .listener import Listener, Reduction, alive
from .losses import ways_out
from .problem import Pass, Selection, check_model, check_no_hooks
from .refusals import check_complete, check_uncoupled
from .state import Buffers, modules_of, unwrapped
from .statistics_run import Request, Statistics, listed
from .verify import chosen, compared, raise_if_wrong, row_of


def extend(
    model: nn.Module,
    *,
    reduction: Reduction = None,
    on_backward: Callable[[Any], None] | None = None,
    quantities: Iterable[Request] | None = None,
    params: Selection = None,
    batch_dim: Any = 0,
    verify: bool | None = None,
) -> Recorder:
    """Record what ``model`` computes, to get the per-sample gradients of it.

    Context manager::

        with persample.extend(model) as recorder:
            losses = per_sample_losses(model(x), y)  # [N]
            G = recorder.gradients(losses)

    Persistent handle, where someone else calls ``backward()`` on a reduced loss::

        handle = persample.extend(model, on_backward=callback, reduction="mean")
        ...
        handle.remove()

    ``reduction`` says how that loss was made of the per-sample losses, so that rows come out unscaled: ``"sum"``,
    ``"mean"`` (a row is N times the sample's contribution; for a mean over tokens, N times the sample's share), a
    number ``c`` (the loss is ``c`` times the sum), or a function that returns ``c`` at every backward (gradient
    scalers, accumulation).  ``callback`` gets one `Gradients` (or `Statistics`, with ``quantities=``) per backward, at
    its end, as hooks do: in its thread and without gradients being recorded.  Forwards of ``model`` are what is seen; a
    part of it that is called by itself is not.
    Parameters that act in the loss outside the model's forward (penalties) are not part of those rows.

    ``params``, ``batch_dim`` (a dict: all arguments by name, those given by position too) and ``quantities`` are as for
    `persample.gradients`.  The handle does not go along when the model is copied or pickled.  Batch-coupled models
    raise `BatchCoupledError`.

    ``verify``: at ``gradients(losses)``, hold one row against the ordinary gradient of that one loss; by default at the
    first call for a model, a number of samples, modes and functions called.  It costs one more backward pass, and
    catches losses that depend on several samples, or stand in another order.  What a persistent handle reports can't be
    held against anything: use `persample.check` for its model.
    """
    return Recorder(
        model,
        reduction=reduction,
        on_backward=on_backward,
        quantities=quantities,
        params=params,
        batch_dim=batch_dim,
        verify=verify,
    )


class Recorder:
    """The handle of `extend`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Reduction,
        on_backward: Callable[[Any], None] | None,
        quantities: Iterable[Request] | None,
        params: Selection,
        batch_dim: Any,
        verify: bool | None,
    ) -> None:
        if (reduction is None) != (on_backward is None):
            raise ArgumentError(
                "on_backward= and reduction= go together: whoever calls backward() on a reduced loss must say how it "
                "was reduced ('sum', 'mean', a number "
                "or a function). To give the [N] losses yourself, use neither, and call gradients(losses)."
            )
        check_model(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise CaptureError(
                f"a scripted or traced module ({type(model).__name__}) runs where its calls can't be seen. Extend the "
                "original module, or use persample.gradients(..., engine='loop')."
            )
        three_dims(batch_dim)  # complain now, not in a forward
        self.model = model
        self.quantities = None if quantities is None else listed(quantities)
        if on_backward is not None and "_is_torch_compile" in vars(model):  # torch.compile says it to the original
            warn(
                f"torch.compile was given this {type(model).__name__}, and what it has compiled before doesn't notice "
                "persample.extend, so that nothing would be reported. Extend what torch.compile returned (which then "
                "runs as it was written), or extend the model before it is compiled."
            )
        self._asking = Asking(model, params)
        asked = self._asking.last
        if self.quantities is not None:
            Statistics(self.quantities, asked.parameters)  # complain now, not in a backward, and before there is a hook
        self._listener = (
            None
            if on_backward is None
            else Listener(
                on_backward, reduction, self.quantities, self, asked, lambda: self._asleep or self._differentiates
            )
        )
        self.batch_dim, self.verify = batch_dim, verify
        self._capture: Capture | None = None
        self._modes = contextlib.ExitStack()  # that stay on for a forward, or a whole with-block
        self._entered = False  # the mode is on for a whole with-block
        self._reported = False  # rows of the last forward were asked for
        self._lists = False  # an argument of the forward is a list of tensors, which may be a sample each
        self._depth = 0
        self._frame: FrameType | None = None  # of the forward that runs
        self._thread = 0  # that runs the forward, or the with-block
        self._lock = threading.Lock()
        self._sleeps = threading.local()
        self._outputs: Any = None
        self._handles = Hook.attach(self, model)

    @property
    def names(self) -> list[str]:
        """Of the parameters that are asked for, in the model as it was last seen."""
        return list(self._asking.last.parameters)

    def __repr__(self) -> str:
        how = "" if self._listener is None else f", reports every backward (reduction={self._listener.reduction!r})"
        state = "" if self._handles else ", removed"
        return f"<persample.extend of {type(self.model).__name__}, {len(self.names)} parameters{how}{state}>"

    def __reduce__(self) -> Any:
        return type(None), ()  # it stays behind when a model is copied that refers to it

    # ---- around forwards ----------------------------------------------------------------------------------------

    @property
    def _asleep(self) -> bool:
        """Whether this thread makes passes that are not the user's."""
        return getattr(self._sleeps, "now", False)

    @_asleep.setter
    def _asleep(self, value: bool) -> None:
        self._sleeps.now = value

    @property
    def _differentiates(self) -> bool:
        """Whether the model's forward is taking gradients of its own at this moment."""
        return self._depth > 0 and self._capture is not None and self._capture.differentiates

    def __enter__(self) -> Recorder:
        self._take(0)
        if self._entered:
            raise CaptureError(
                "this recorder is in a with-block already. Leave that one first, or extend the model once more: "
                "`with persample.extend(model) as other:`."
            )
        self._leave_forward()  # that was interrupted from outside
        self._record()
        if not self._handles:  # it was in a with-block before
            self._handles = Hook.attach(self, self.model)
        self._entered = True
        return self

    def __exit__(self, *exc: Any) -> None:
        self._entered = False
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model, and forget what was recorded."""
        try:
            if not self._entered:  # a with-block ends, or a forward was interrupted from outside
                self._leave_forward()
        finally:
            for handle in self._handles:
                handle.remove()
        self._handles = []
        self._outputs = None
        if self._listener is not None:
            self._listener.forget()

    def _new_capture(self) -> Capture:
        asked = self._asking.now()
        if (listener := self._listener) is None:
            return Capture(self.model, asked.wanted, owner=self, asked=asked)
        listener.asked = asked
        capture = Capture(self.model, asked.wanted, listener.listen, owner=self, asked=asked, begun=listener.begun)
        listener.running = capture.recorded
        return capture

    def _record(self) -> None:
        """From now on, see the calls of this thread."""
        capture = self._new_capture()  # which may raise
        self._modes.enter_context(eager())
        self._capture = capture
        capture.__enter__()  # type: ignore[no-untyped-call]

    def _begin(self, batch: Batch) -> None:
        """Record for the parameters of the model as it is now: it may have got others, or frozen some."""
        capture = self._capture
        assert capture is not None
        if (asked := self._asking.now()) is not capture.asked:
            capture.asked = asked
            capture.want(self.model, asked.wanted)
            if self._listener is not None:
                self._listener.asked = asked
        asked_of: Any = self if self._listener is None else self._listener
        if asked_of._reported:
            capture.next_batch()
            asked_of._reported = False
        capture.many = alive(capture.recorded, capture.many)  # or a with-block around all of a training would keep them
        capture.start(batch.n, batch.inputs.tensors())

    def _take(self, depth: int) -> None:
        """This thread records; one at a time."""
        me = threading.get_ident()
        with self._lock:
            if (self._depth or self._entered) and self._thread != me:
                raise CaptureError(
                    "another thread is running the extended model at this moment, and the calls of the two can't be "
                    "told apart. Let the threads take turns, or give each a copy of the model."
                )
            self._thread = me
            self._depth += depth

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._recover()
        self._take(1)
        hooks: Any = self.model._forward_hooks
        if not isinstance(next(reversed(hooks.values())), Hook):  # those of the user's come first, whoever was there
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                hooks.move_to_end(key)
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        if not self._entered and getattr(self.model, "_compiled_call_impl", None) is not None:
            raise CaptureError(
                "the extended model was compiled in place (model.compile()), and its calls can't be seen there. Use "
                "torch.compile(model) instead, or a with-block, which runs it as it was written."
            )
        dims, inputs = three_dims(self.batch_dim)[0], cast(Any, [list(args), kwargs])
        if isinstance(dims, dict):  # by name, also of what is given by position
            inputs = {**inspect.signature(unwrapped(self.model)[0].forward).bind_partial(*args).arguments, **kwargs}
        elif dims is list:
            dims, inputs = [list, list], [args, kwargs]
        elif not isinstance(dims, int):
            dims = [dims, 0]
        batch = Batch.of(inputs, None, dims)
        several = (x for x in (*args, *kwargs.values()) if isinstance(x, list) and len(x) > 1)
        self._lists = self.batch_dim == 0 and any(all(isinstance(t, Tensor) for t in x) for x in several)
        if not self._entered:
            self._record()
        self._begin(batch)

    def _recover(self) -> None:
        """Forget a forward that was interrupted from outside (Ctrl-C): nobody says so, but its frame has gone."""
        caller = sys._getframe()
        while caller.f_back is not None and caller.f_code is not nn.Module._call_impl.__code__:
            caller = caller.f_back
        if self._depth and self._thread != threading.get_ident():
            return
        if self._depth and not self._runs():
            self._depth = 0
            if not self._entered:
                self._leave_forward()
        if not self._depth:
            self._frame = caller

    def _runs(self) -> bool:
        """Whether this is inside of the forward that is recorded."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def interrupted(self) -> bool:
        """Whether the forward that is recorded ended without a word."""
        return not self._entered and not self._runs()

    def _leave_forward(self) -> None:
        if (capture := self._capture) is None:
            return
        capture.stop()
        capture.leave()
        self._modes.close()
        self._capture = None  # last: what is interrupted here (Ctrl-C) is done again by whoever comes next

    def _after(self, output: Any) -> None:
        if self._thread != threading.get_ident():  # it was refused
            return
        self._depth -= 1
        if not self._depth:
            self._frame = None
        capture = self._capture
        if self._depth or capture is None or not capture.active:
            return
        if self._entered and not torch.is_grad_enabled():  # no losses come of it
            return
        self._outputs = detached(output)
        if self._listener is not None:
            self._listener.outputs = self._outputs
        if self._entered:  # the loss may use parameters too: go on listening
            if self._listener is not None and output is not None:
                self._listener.check(output, capture.followed.couples)
            return
        ends = [t for t in flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad] if self._lists else []
        lost = self._listener is not None and capture.followed.lost_together(ends) and all(t.ndim for t in ends)
        self._leave_forward()
        if lost:
            raise SampleAxisError(
                "an argument of the model is a list of tensors, whose axis 0 was taken for that of "
                f"{capture.followed.n} samples, and all outputs are made of all of these. If the list has an entry for "
                "each sample, say extend(..., batch_dim=list)."
            )
        if self._listener is not None and output is not None:
            self._listener.forward_ends(output, capture.followed.couples)

    def samples(self, *inputs: Any, **named: Any) -> None:
        """Say which tensors hold the samples, before other methods of the model than its forward are called with them
        (``agent.get_value(x)``, ``module.training_step(batch)``); ``batch_dim`` as for `extend`: where it is a dict, by
        its names (``recorder.samples(x=x)``).
        """
        if self._capture is None or not self._entered:
            raise CaptureError("samples() belongs inside a with-block: `with persample.extend(model) as recorder:`.")
        if inputs and isinstance(three_dims(self.batch_dim)[0], dict):
            raise SampleAxisError(
                f"batch_dim={self.batch_dim!r} goes by names: give samples() its inputs by name, too, as in "
                "recorder.samples(x=x)."
            )
        given: Any = (inputs, named) if inputs and named else inputs or named
        self._begin(Batch.of(given, None, self.batch_dim))

    # ---- losses given -------------------------------------------------------------------------------------------

    def gradients(
        self, losses: Tensor, quantities: Iterable[Request] | None = None, coupled: str | None = None
    ) -> Result:
        """Per-sample gradients of ``losses [N]``, by one backward pass that keeps the graph and touches no ``.grad``
        (and another, at the first call, that verifies one row; see `extend`).

        With ``quantities=``, here or in `extend`, the result is a `Statistics`.  Where samples are coupled,
        ``coupled="loss"`` gives the ordinary gradient of every loss (by ``N`` backward passes of this graph), and
        ``"copy"`` the credit to each sample's activations (by one); the other notions of `persample.gradients` take
        passes of their own.  Raises `LossError` for losses that are not ``[N]``, `CaptureError` for losses that no
        recorded forward leads to, `BatchCoupledError` where ``coupled`` doesn't say which notion is meant.
        """
        if coupled not in (None, "loss", "copy"):
            raise ArgumentError(
                f"coupled must be 'loss' or 'copy' here, got {coupled!r}: other notions take passes of their own, "
                "persample.gradients(..., coupled=)."
            )
        if self._listener is not None:
            raise CaptureError("this handle listens to backward(); for losses of your own, extend the model once more.")
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not len(losses) or losses.is_sparse:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            out = ways_out(losses, len(losses)) if isinstance(losses, Tensor) and losses.ndim > 1 else ""
            raise LossError(
                f"gradients() needs the losses of all samples, [N] and not reduced (reduction='none'), got {shape}."
                f"{out}"
            )
        wanted = self.quantities if quantities is None else listed(quantities)
        capture, active = self._capture, False
        if capture is not None:
            active, capture.active = capture.active, False
        try:
            found = reached([losses.grad_fn], self)
            now = self._asking.now()
            asked = asked_in(found, now)
            if not found.calls and not any(id(p) in found.leaves for p in asked.parameters.values()):
                raise CaptureError(
                    "no recorded forward of the model leads to these losses. Run the model inside the with-block (or "
                    "after extend()), with gradients enabled, and don't detach its outputs; where other methods are "
                    "called than model(...), say recorder.samples(x) before."
                )
            check_unchanged(asked, now, losses)
            check_no_hooks(asked.parameters)  # "loss" differentiates through them
            if coupled != "loss":
                check_complete(found, asked.parameters)
            if coupled is None:
                check_uncoupled(found, asked.parameters)
            if capture is not None:
                capture.followed.check_order(losses)
                if coupled is None:
                    capture.followed.check_apart(losses)
            places = [call.outputs[0][1] for call in found.calls if call.shared]  # unknown ones are no matter to "loss"
            sizes = {layout.n for layout in places if layout is not None}
            if len(sizes) == 1 and (out := ways_out(losses, n := sizes.pop())):
                raise LossError(
                    f"gradients() needs [N] losses, one for each of N = {n} samples, got {tuple(losses.shape)}.{out}"
                )
            self._reported = True
            again = any(call.again for call in found.calls)  # and buffers are moved, by every backward pass
            with Buffers(self.model) if again else contextlib.nullcontext():
                if coupled == "loss":
                    result = self._by_losses(losses, asked, wanted)
                else:
                    result = self._reduced(losses, found, asked, wanted, coupled)
            result.of_versions({i: v for call in found.calls for i, v in call.versions.items()})  # of the forward
            return result
        finally:
            if capture is not None and active:
                capture.active = self._entered  # later uses of the same forward may follow

    def _by_losses(self, losses: Tensor, asked: Asked, quantities: list[Request] | None) -> Result:
        """``N`` ordinary gradients."""
        sink = Sink(self.model, asked.parameters, asked.aliases, quantities)
        parameters = list(asked.parameters.values())
        with suspended(self.model), _told_of_changes():
            found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
        columns = map(list, zip(*found, strict=True))
        unused = emit_stacked(asked.parameters, dict(zip(asked.parameters, columns, strict=True)), sink.emit)
        return sink.result(Pass(losses.detach(), self._outputs, unused), "coupled='loss'")

    def _reduced(
        self, losses: Tensor, found: Reached, asked: Asked, quantities: list[Request] | None, notion: str | None
    ) -> Result:
        sink = Sink(self.model, asked.parameters, asked.aliases, quantities)
        modes = tuple(module.training for module in modules_of(self.model))
        seen = None if self._capture is None else self._capture.followed.samples_of(losses)
        if self._capture is None:
            forwards = {id(call.within): call.within for call in found.calls}
            called = between(losses, self).union(*(acts.called for acts in forwards.values()))
        else:
            called = self._capture.path
        kind = (len(losses), losses.dtype, modes, tuple(asked.parameters), seen, called)
        held = _HELD.setdefault(self.model, set())
        verifies = notion is None and (kind not in held if self.verify is None else self.verify)
        n = chosen(len(losses)) if verifies else 0
        rows: dict[str, Tensor] = {}

        def emit(name: str, g: Factors) -> None:
            if verifies:
                rows[name] = row_of(g, n)
            sink.emit(name, g)

        collect = Collect(found, asked.parameters, emit, len(losses), release=False)
        try:
            with _told_of_changes():
                if found.roots:
                    with suspended(self.model):  # other recorders of this model take this for no backward of the user
                        ones = torch.ones_like(losses)
                        collect.differentiate([losses], [ones], retain_graph=True)
                unused = collect.finish()
        finally:
            collect.detach()
        if verifies:
            self._hold(losses, asked, n, rows)
            held.add(kind)
        capture = self._capture
        coupled = any(call.couples or call.within.coupled or call.within.totals for call in found.calls)
        coupled = coupled or (capture is not None and capture.followed.couples)
        run = Pass(losses.detach(), self._outputs, unused, coupled and notion is None)
        note = "" if notion is None else f"coupled={notion!r}"
        return sink.result(run, note or ("verify=False" if self.verify is False else ""))

    def _hold(self, losses: Tensor, asked: Asked, n: int, rows: dict[str, Tensor]) -> None:
        """Row ``n`` against the ordinary gradient of loss ``n``, on the same graph: with the same random draws."""
        if not losses.requires_grad:
            return

        def gradients(seed: float = 1.0) -> dict[str, Tensor | None]:
            end, parameters = losses[n], list(asked.parameters.values())
            with suspended(self.model):
                found = torch.autograd.grad(
                    end, parameters, torch.full_like(end, seed), retain_graph=True, allow_unused=True
                )
            return {name: None if g is None else strided(g) for name, g in zip(asked.parameters, found, strict=True)}

        raise_if_wrong(compared(rows, gradients(), n, losses.dtype, gradients), None)


@contextlib.contextmanager
def _told_of_changes() -> Iterator[None]:
    """In our own words: graphs that were freed, and tensors that were changed, before the losses were given."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise InplaceError(
                "a parameter or activation that these losses were computed from was changed in place since, by "
                "optimizer.step() for instance. Call gradients(losses) before that."
            ) from error
        if "a second time" in str(error):
            raise CaptureError(
                "an earlier backward() has freed the graph of these losses. Call gradients(losses) before backward(), "
                "or backward(retain_graph=True)."
            ) from error
        raise


# What was verified: by model, the kinds of calls.
_HELD: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
