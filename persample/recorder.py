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
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, detached, flatten, suspended
from .calls import Call, Reached, reached
from .capture import Capture
from .collect import Collect, check_complete, check_uncoupled
from .engines.hooks import eager
from .errors import ArgumentError, CaptureError, LossError, SampleAxisError, warn
from .factors import Factors, compact, strided
from .gradients import Gradients
from .losses import ways_out
from .problem import Pass, Selection, check_model, named_parameters, select
from .statistics_run import Request, Statistics, listed
from .verify import compared, raise_if_wrong, row_of

Reduction = str | float | Callable[[], float] | None
Result = Gradients | Statistics


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
    scalers, accumulation).  ``callback`` gets one `Gradients` (or `Statistics`, with ``quantities=``) per backward.
    Parameters that act in the loss outside the model's forward (penalties) are not part of those rows.

    ``params``, ``batch_dim`` (an int, or a dict for keyword arguments) and ``quantities`` are as for
    `persample.gradients`.  The handle does not go along when the model is copied or pickled.  Batch-coupled models
    raise `BatchCoupledError`.

    ``verify``: at ``gradients(losses)``, hold one row against the ordinary gradient of that one loss; by default at the
    first call for a model, a number of samples and modes.  It costs one more backward pass, and catches losses that
    depend on several samples, or stand in another order.  What a persistent handle reports can't be held against
    anything: use `persample.check` for its model.
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
        if not callable(reduction) and reduction not in (None, "sum", "mean"):
            _number(reduction)
        if on_backward is not None and not callable(on_backward):
            raise ArgumentError(f"on_backward must be a function of the result, got {on_backward!r}.")
        self.model = model
        self.reduction, self.on_backward = reduction, on_backward
        self.quantities = None if quantities is None else listed(quantities)
        self.batch_dim, self.verify = batch_dim, verify
        found, aliases = named_parameters(model)
        self.names = select(found, aliases, params)
        self._params = params
        self._capture: Capture | None = None
        self._modes = contextlib.ExitStack()  # that stay on for a forward, or a whole with-block
        self._entered = False  # the mode is on for a whole with-block
        self._depth = 0
        self._thread = 0  # that runs the forward, or the with-block
        self._lock = threading.Lock()
        self._sleeps = threading.local()
        self._outputs: Any = None
        self._calls: list[weakref.ref[Call]] = []
        self._collect: Collect | None = None
        self._displaced: set[int] = set()  # backwards in the middle of which another began
        self._task = -1  # the backward that it collects
        self._ends = -1  # the backward whose end is awaited
        self._arrived: list[Call] = []
        self._creates = False  # that backward is recorded for differentiation
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "_before"), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self, "_after"), with_kwargs=True, always_call=True),
        ]
        if self.quantities is not None:
            Statistics(self.quantities, {name: found[name] for name in self.names})  # complain now, not in a backward

    # ---- around forwards ----------------------------------------------------------------------------------------

    @property
    def _asleep(self) -> bool:
        """Whether this thread makes passes that are not the user's."""
        return getattr(self._sleeps, "now", False)

    @_asleep.setter
    def _asleep(self, value: bool) -> None:
        self._sleeps.now = value

    def __enter__(self) -> Recorder:
        self._take(0)
        self._modes.enter_context(eager())
        self._capture = self._new_capture()
        self._capture.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True
        return self

    def __exit__(self, *exc: Any) -> None:
        capture, self._capture, self._entered = self._capture, None, False
        self.remove()
        if capture is not None:
            capture.stop()
            capture.__exit__(*exc)  # type: ignore[no-untyped-call]
        self._modes.close()

    def remove(self) -> None:
        """Take the hooks off the model, and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for call in self._live():
            call.listener = None
        self._calls, self._outputs, self._collect = [], None, None
        if (capture := self._capture) is not None and not self._entered:  # a forward was interrupted from outside
            capture.stop()
            self._capture = None
            if (modes := torch.overrides._get_current_function_mode_stack()) and modes[-1] is capture:
                capture.__exit__(None, None, None)
            self._modes.close()

    def _new_capture(self) -> Capture:
        found, aliases = named_parameters(self.model)  # requires_grad may have changed
        self._aliases = aliases
        self._parameters = {name: found[name] for name in select(found, aliases, self._params)}
        wanted = {id(p) for p in self._parameters.values()}
        return Capture(self.model, wanted, self._listen if self.on_backward else None, owner=self, begun=self._begun)

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
        self._take(1)
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        if not self._entered and getattr(self.model, "_compiled_call_impl", None) is not None:
            raise CaptureError(
                "the extended model was compiled in place (model.compile()), and its calls can't be seen there. Use "
                "torch.compile(model) instead, or a with-block, which runs it as it was written."
            )
        dims = (0, self.batch_dim) if isinstance(self.batch_dim, dict) else self.batch_dim
        batch = Batch.of([list(args), kwargs], None, [dims[0], dims[1]] if isinstance(dims, tuple) else dims)
        if not self._entered:
            self._modes.enter_context(eager())
            self._capture = self._new_capture()
            self._capture.__enter__()  # type: ignore[no-untyped-call]
        assert self._capture is not None
        self._capture.start(batch.n, batch.inputs.tensors())

    def _after(self, output: Any) -> None:
        if self._thread != threading.get_ident():  # it was refused
            return
        self._depth -= 1
        capture = self._capture
        if self._depth or capture is None or not capture.active:
            return
        self._outputs = detached(output)
        if self._entered:
            return  # the loss may use parameters too: go on listening
        capture.stop()
        capture.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._modes.close()
        self._capture = None
        if self.on_backward is not None and output is not None:
            found = reached((t.grad_fn for t in flatten(output)[0] if isinstance(t, Tensor)), self)
            check_complete(found, self._parameters)
            check_uncoupled(found, self._parameters)
            self._calls = [ref for ref in [*self._calls, *capture.recorded] if ref() is not None]
            for call in self._live():
                call.expected = 0  # which outputs a loss will depend on is not known here

    def _live(self) -> list[Call]:
        return [call for ref in self._calls if (call := ref()) is not None]

    # ---- losses given -------------------------------------------------------------------------------------------

    def gradients(self, losses: Tensor, quantities: Iterable[Request] | None = None) -> Result:
        """Per-sample gradients of ``losses [N]``, by one backward pass that keeps the graph and touches no ``.grad``
        (and another, at the first call, that verifies one row; see `extend`).

        With ``quantities=``, here or in `extend`, the result is a `Statistics`.  Raises `LossError` for losses that
        are not ``[N]``, `CaptureError` for losses that no recorded forward leads to.
        """
        if self.on_backward is not None:
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
            if not found.calls and not any(id(p) in found.leaves for p in self._known_parameters().values()):
                raise CaptureError(
                    "no recorded forward of the model leads to these losses. Run the model inside the with-block (or "
                    "after extend()), with gradients "
                    "enabled, and don't detach its outputs."
                )
            check_complete(found, self._parameters)
            check_uncoupled(found, self._parameters)
            sizes = {call.layout.n for call in found.calls if call.shared}
            if len(sizes) == 1 and (out := ways_out(losses, n := sizes.pop())):
                raise LossError(
                    f"gradients() needs [N] losses, one for each of N = {n} samples, got {tuple(losses.shape)}.{out}"
                )
            return self._reduced(losses, found, wanted)
        finally:
            if capture is not None and active:
                capture.active = self._entered  # later uses of the same forward may follow

    def _known_parameters(self) -> dict[str, nn.Parameter]:
        if not hasattr(self, "_parameters"):
            self._new_capture()
        return self._parameters

    def _reduced(self, losses: Tensor, found: Reached, quantities: list[Request] | None) -> Result:
        sink = _Sink(self._parameters, self._aliases, quantities)
        modes = tuple(module.training for module in self.model.modules())
        seen = None if self._capture is None else self._capture.samples_of(losses)
        kind = (len(losses), losses.dtype, modes, tuple(self._parameters), seen)
        held = _HELD.setdefault(self.model, set())
        verifies = kind not in held if self.verify is None else self.verify
        n = int(torch.randint(len(losses), (), generator=torch.Generator().manual_seed(len(losses))))
        rows: dict[str, Tensor] = {}

        def emit(name: str, g: Factors) -> None:
            if verifies:
                rows[name] = row_of(g, n)
            sink.emit(name, g)

        collect = Collect(found, self._parameters, emit, len(losses), release=False)
        try:
            if found.roots:
                with suspended(self.model):  # other recorders of this model don't take this for a backward of the user
                    ones = torch.ones_like(losses)
                    torch.autograd.grad(losses, found.roots, ones, retain_graph=True, allow_unused=True)
            unused = collect.finish()
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise CaptureError(
                "an earlier backward() has freed the graph of these losses. Call gradients(losses) before backward(), "
                "or backward(retain_graph=True)."
            ) from error
        finally:
            collect.detach()
        if verifies:
            self._hold(losses, n, rows)
            held.add(kind)
        return sink.result(Pass(losses.detach(), self._outputs, unused), "verify=False" if self.verify is False else "")

    def _hold(self, losses: Tensor, n: int, rows: dict[str, Tensor]) -> None:
        """Row ``n`` against the ordinary gradient of loss ``n``, on the same graph: with the same random draws."""
        if not losses.requires_grad:
            return
        with suspended(self.model):
            found = torch.autograd.grad(
                losses[n], list(self._parameters.values()), retain_graph=True, allow_unused=True
            )
        wanted = {name: None if g is None else strided(g) for name, g in zip(self._parameters, found, strict=True)}
        raise_if_wrong(compared(rows, wanted, n, losses.dtype), None)

    # ---- someone else's backward --------------------------------------------------------------------------------

    def _begun(self, task: int) -> None:
        """A backward has come to a recorded call: be there when it ends."""
        if task != self._ends and not self._asleep and self.on_backward is not None:
            self._ends = task
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._finish, task))

    def _listen(self, call: Call, grads: Any) -> None:
        """The first arrival of a backward begins a collection; the end of that backward completes it."""
        if self._asleep:
            return
        task = torch._C._current_graph_task_id()
        task = self._ends if task == -1 else task  # at the end of that backward
        with self._lock:
            collect = self._collecting(call, task)
            self._arrived.append(call)
        if call.shared and call.layout.n != collect.n:
            raise SampleAxisError(
                f"this backward is of losses of {collect.n} and of {call.layout.n} samples, so its rows are not "
                "those of one batch: call backward() for each of them."
            )
        collect.arrive(call, grads)

    def _collecting(self, call: Call, task: int) -> Collect:
        """The collection of this backward."""
        if task in self._displaced:
            raise CaptureError(
                "another backward of the extended model ran in the middle of this one, so its rows are lost. Let them "
                "take turns, or give each thread a copy of the model."
            )
        if self._collect is None or task not in (self._task, -1):
            if self._collect is not None:  # it may also have raised half way
                self._displaced.add(self._task)
            self._task, self._arrived, self._creates = task, [], torch.is_grad_enabled()
            n = call.layout.n
            calls = [c for c in self._live() if not c.shared or c.layout.n == n]
            for c in calls:
                c.parts = c.parts if c.task == task else {}
            self._sink = _Sink(self._parameters, self._aliases, self.quantities)
            self._collect = Collect(
                Reached(calls), self._parameters, self._sink.emit, n, release=False, scale=self._scale(n), listen=False
            )
        return self._collect

    def _scale(self, n: int) -> float:
        if self.reduction == "mean":
            return float(n)
        if self.reduction == "sum":
            return 1.0
        assert not isinstance(self.reduction, str) and self.reduction is not None
        return 1.0 / _number(self.reduction() if callable(self.reduction) else self.reduction)

    def _finish(self, task: int) -> None:
        for call in self._live():
            if call.task == task:
                call.flush()
        if task in self._displaced:
            _skipped("another one of the same model ran in the middle of it")
            return
        collect, self._collect = self._collect, None
        arrived, self._arrived = self._arrived, []
        if collect is None or self.on_backward is None:
            return
        if self._creates:  # what comes back from derivatives of this backward is no gradient of the losses
            for call in arrived:
                call.listener = _second
        if missing := self._missing(arrived):
            _skipped(f"it ran towards some inputs only, and did not come to {missing.name}")
            return
        unused = collect.finish()
        self.on_backward(self._sink.result(Pass(None, self._outputs, unused)))

    def _missing(self, arrived: list[Call]) -> Call | None:
        """A call upstream of those that got a gradient, which got none: a whole backward would have come there."""
        found = reached((node for call in arrived for node in call.inputs), self)
        for call in found.calls:
            call.expected = 0
        return next((call for call in found.calls if call.shared and call not in arrived), None)


def _second(call: Call, grads: Any) -> None:
    """In place of a listener, once a backward was itself recorded for differentiation."""
    call.listener = None
    _skipped("it differentiates an earlier backward (create_graph=True)")


def _skipped(why: str) -> None:
    warn(f"persample.extend reports nothing of a backward: {why}.")


def _number(reduction: Any) -> float:
    """What the loss is of the sum of the per-sample losses."""
    try:
        factor = float("nan") if isinstance(reduction, str) else float(reduction)
    except (TypeError, ValueError):
        factor = float("nan")
    if not math.isfinite(factor) or factor == 0:
        raise ArgumentError(
            "reduction must be 'sum', 'mean', a number c other than 0 (the loss is c times the sum of the samples' "
            f"losses), or a function that returns c, got {reduction!r}."
        )
    return factor


# What was verified: by model, the kinds of calls.
_HELD: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


class _Sink:
    """Where complete factors go: kept as `Gradients`, or reduced as `Statistics`."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], aliases: dict[str, str], quantities: list[Request] | None
    ) -> None:
        self.parameters, self.aliases = parameters, aliases
        self.kept: dict[str, Factors] = {}
        self.statistics = None if quantities is None else Statistics(quantities, parameters)

    def emit(self, name: str, g: Factors) -> None:
        if self.statistics is not None:
            self.statistics.emit(name, g)
        else:
            self.kept[name] = compact(g)

    def result(self, run: Pass, note: str = "") -> Result:
        if self.statistics is not None:
            return self.statistics.finish(run, note)
        kept = {name: self.kept[name] for name in self.parameters}
        return Gradients(
            kept,
            run.losses,
            run.outputs,
            unused=run.unused,
            aliases=self.aliases,
            parameters=self.parameters,
            note=note,
        )


class _Hook:
    """A forward hook that stays behind when the model is copied or pickled."""

    def __init__(self, recorder: Recorder | None, method: str) -> None:
        self.recorder, self.method = recorder, method

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if "torch._dynamo" in sys.modules:  # a model that was compiled in place would have its hooks compiled, too
            torch.compiler.disable(_Hook._act)(self, module, args, kwargs, *output)
        else:
            self._act(module, args, kwargs, *output)

    def _act(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if self.recorder is None:
            self._leave(module)
        elif self.recorder._asleep:
            return
        elif self.method == "_before":
            self.recorder._before(args, kwargs)
        else:
            self.recorder._after(*output)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While the library makes passes of its own over an extended model, the user's recorder does not listen."""
        if (recorder := self.recorder) is None:
            yield
            return
        mine = recorder._thread == threading.get_ident()
        capture, asleep = recorder._capture if mine else None, recorder._asleep
        active = capture is not None and capture.active
        recorder._asleep = True
        if capture is not None:
            capture.active = False
        try:
            yield
        finally:
            recorder._asleep = asleep
            if capture is not None:
                capture.active = active

    def _leave(self, module: nn.Module) -> None:
        """A copy's hook takes itself off at the first call."""
        hooks = module._forward_pre_hooks if self.method == "_before" else module._forward_hooks
        for key in [k for k, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None, self.method)

    def __reduce__(self) -> Any:
        return (_Hook, (None, self.method))
