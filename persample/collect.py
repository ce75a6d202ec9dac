"""From output gradients to the complete factors of every parameter.

`Collect` is told which calls the losses depend on.  It listens to them, turns each arriving output gradient into
factors, adds up the uses of a parameter (tied weights, reused modules, derived tensors pulled back), and hands the
factors of a parameter to the sink as soon as its last use has arrived.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from . import cost, rules
from .calls import Call, Derivation, Reached, Shared, function_name, leaves_of, reached
from .errors import CaptureError, InplaceError, PersampleError, SampleAxisError
from .factors import INDICES, Dense, Factors, Outer, Pulled, add, cast, dense, dtype, nothing, strided, tensors
from .problem import Emit
from .rules.apart import Diagonal, Lone, Rowlike, plain
from .rules.derived import pulled
from .rules.fallback import by_samples, of_one
from .scratch import kernel

Key = int | Derivation  # a parameter by its id, or a derived tensor
Served = tuple[Callable[..., Any], str]  # the function a parameter was used by, and "rule" or "fallback"


class Collect:
    """Listens to the calls in ``found`` during one backward pass."""

    def __init__(
        self,
        found: Reached,
        parameters: Mapping[str, Tensor],
        emit: Emit,
        n: int,
        *,
        release: bool,
        scale: float = 1.0,
        listen: bool = True,
    ) -> None:
        """``release``: let go of each call's tensors once its gradient has arrived; ``scale``: what undoes a
        reduction; ``listen``: else somebody else listens, and passes on what arrives.
        """
        self.found, self.parameters, self.emit, self.n = found, parameters, emit, n
        self.release, self.scale, self.listen = release, scale, listen
        self.names = {id(p): name for name, p in parameters.items()}
        self.terms: dict[Key, list[Rowlike | Lone]] = {}
        self.emitted: set[str] = set()
        self.served: dict[Key, list[Served]] = {}  # by which function, and how
        self.pending = Counter[Key]()
        self.leaves: dict[Derivation, list[Tensor]] = {}
        self.hooks: list[RemovableHandle] = []  # on derivations
        self.task: int | None = None  # the backward that it listens to
        for call in found.calls:
            if call.shared and call.layout.n != n:
                raise SampleAxisError(
                    f"{call.name} saw {call.layout.n} samples, but there are {n} losses: record one batch at a time"
                    + (
                        "; for a row per token of a sample, see 'Rows per token' in docs/losses.md, and for losses of "
                        "several rows each (pairs of views), gradients(losses, coupled='loss') in a with-block."
                        if n > 1
                        else "."
                    )
                )
            for shared in call.shared:
                self._expect(shared)
                several = not listen and len(call.outputs) > 1  # which may not all get a gradient
                if several and shared.derivation is None and shared.tensor.requires_grad:
                    hook = partial(_updates, weakref.ref(call), torch._C._current_graph_task_id())
                    self.hooks.append(get_gradient_edge(shared.tensor).node.register_prehook(hook))
            if listen:
                call.listener, call.heeds = self.arrive, self._heeds
                call.hear_last()

    def _expect(self, shared: Shared) -> None:
        key = key_of(shared)
        self.pending[key] += 1
        if isinstance(key, Derivation) and key not in self.leaves:
            check_no_hook(shared.tensor, key)
            self.leaves[key] = [p for p in leaves_of(key) if id(p) in self.names]
            self.pending.update(id(p) for p in self.leaves[key])
            if not self.listen:  # in a backward that frees the graph as it goes
                task = torch._C._current_graph_task_id()
                hook = partial(_passes, weakref.ref(self), weakref.ref(key), task)
                self.hooks.append(key.out.node.register_prehook(hook))

    def detach(self) -> None:
        """Stop listening."""
        while self.hooks:  # a graph that is kept would collect them
            self.hooks.pop().remove()
        for call in self.found.calls if self.listen else ():
            call.listener, call.heeds, call.parts = None, None, {}

    def differentiate(self, ends: Sequence[Tensor], grads: Sequence[Tensor], retain_graph: bool | None = None) -> None:
        """The backward pass; hooks of the model may make others of the same graph in its middle (implicit layers)."""

        def begins(_: Tensor) -> None:
            self.task = torch._C._current_graph_task_id() if self.task is None else self.task

        with torch.enable_grad():
            ends = [end.view_as(end) for end in ends]  # what begins comes before the hooks of the model's own
        for end in ends:
            end.register_hook(begins)
        torch.autograd.grad(ends, self.found.roots, grads, retain_graph=retain_graph, allow_unused=True)

    def _heeds(self, task: int) -> bool:
        return self.task in (None, task)

    # ---- arrival ------------------------------------------------------------------------------------------------

    @kernel
    def arrive(self, call: Call, grads: Sequence[Tensor | None]) -> None:
        """The output gradients of a call are there."""
        with torch._C.DisableTorchFunction():
            if call.shared:
                for shared, rows, how in factors_of(call, [self._prepared(call, g) for g in grads]):
                    key = key_of(shared)
                    self.terms.setdefault(key, []).append(rows)
                    self.served.setdefault(key, []).append((call.func, how))
                for shared in call.shared:
                    self._arrived(key_of(shared))
        if self.release:
            call.listener = None
            call.release()

    def _prepared(self, call: Call, g: Tensor | None) -> Tensor | None:
        """Unscaled, and in no less precision than the parameters (autocast)."""
        if g is None:
            return None
        for shared in call.shared:
            if g.dtype is not shared.tensor.dtype:
                g = g.to(torch.promote_types(g.dtype, shared.tensor.dtype))
        return g if self.scale == 1.0 else g * self.scale

    def _arrived(self, key: Key) -> None:
        self.pending[key] -= 1
        if self.pending[key] == 0:
            self._complete(key)

    def _complete(self, key: Key) -> None:
        """All uses of a tensor have arrived: add them up, and pass them on."""
        parts = self.terms.pop(key, [])
        if isinstance(key, Derivation):
            if parts:
                last = {id(p) for p in self.leaves[key] if self.pending[id(p)] == 1}
                for p, g in pull_back(key, total(parts), self.leaves[key], last):
                    self.terms.setdefault(id(p), []).append(g)
            for p in self.leaves[key]:
                self._arrived(id(p))
        elif parts and key in self.names:
            self._emit(self.names[key], total(parts))

    def _emit(self, name: str, rows: Rowlike) -> None:
        if name in self.emitted:
            raise CaptureError(
                f"parameter '{name}' was used by calls that nobody expected, after its rows were complete. Compute the "
                "losses inside the recorded region, or use persample.gradients."
            )
        rows, kind = plain(rows), self.parameters[name].dtype
        if (own := dtype(rows)) is not kind and own.is_complex == kind.is_complex:
            rows = cast(rows, kind)  # of an argument in another type, which was multiplied with it or added to it
        self.emitted.add(name)
        self.emit(name, rows)

    @kernel
    def last_chance(self, key: Derivation) -> None:
        """The graph of a derivation is about to be freed: uses that haven't arrived by now never will."""
        for call in self.found.calls if self.pending[key] > 0 else ():
            if any(shared.derivation is key for shared in call.shared):
                call.flush()
        if self.pending[key] > 0:
            self.pending[key] = 0
            with torch._C.DisableTorchFunction():
                self._complete(key)

    # ---- the end ------------------------------------------------------------------------------------------------

    def direct(self, losses: Tensor) -> None:
        """Parameters inside the criterion itself (penalties): one ordinary gradient per loss."""
        found = reached([losses.grad_fn])
        if found.calls:
            raise CaptureError(
                "loss_fn uses intermediate results of the model besides its outputs, which a criterion of one sample "
                "alone "
                "can't: return them from the model, or let loss_fn return [N] losses."
            )
        used = [p for p in self.parameters.values() if id(p) in found.leaves]
        if used:
            rows = torch.autograd.grad(
                losses,
                used,
                torch.eye(self.n, dtype=losses.dtype, device=losses.device),
                retain_graph=True,
                is_grads_batched=True,
            )
            for p, row in zip(used, rows, strict=True):
                self.terms.setdefault(id(p), []).append(Dense(row))

    @kernel
    def finish(self) -> tuple[str, ...]:
        """Complete what got no gradient; rows of zeros for the unused parameters, whose names are returned."""
        for call in self.found.calls:
            call.flush()
        self.detach()
        with torch._C.DisableTorchFunction():
            for key in sorted((k for k in self.terms if isinstance(k, Derivation)), key=lambda d: -d.order):
                for p, g in pull_back(key, total(self.terms.pop(key)), self.leaves[key]):
                    self.terms.setdefault(id(p), []).append(g)
            unused = []
            for name, p in self.parameters.items():
                if parts := self.terms.pop(id(p), []):
                    self._emit(name, total(parts))
                elif name not in self.emitted:
                    unused.append(name)
                    self._emit(name, nothing(p, self.n))
        return tuple(unused)

    def served_by(self) -> dict[str, list[Served]]:
        """How every parameter was served: the functions that used it, itself or derived tensors."""
        found: dict[str, list[Served]] = {name: list(self.served.get(id(p), [])) for name, p in self.parameters.items()}
        for d, leaves in self.leaves.items():
            for p in leaves:
                found[self.names[id(p)]] += [
                    (func, f"{how} of a derived tensor") for func, how in self.served.get(d, [])
                ]
        return found


def _passes(collect: weakref.ref[Collect], key: weakref.ref[Derivation], task: int, _: Any) -> None:
    """Before this backward (and no other: not one that leads rows back) goes through a derivation; the graph, which
    keeps this, keeps neither of them.
    """
    listening, derivation = collect(), key()
    if listening is not None and derivation is not None and task == torch._C._current_graph_task_id():
        listening.last_chance(derivation)


def _updates(call: weakref.ref[Call], task: int, _: Any) -> None:
    """Before this backward comes to a parameter, which a hook of the user's may change then (an optimizer that steps in
    the backward pass): all that the call gets has arrived.
    """
    used = call()
    if used is not None and used.task == task == torch._C._current_graph_task_id():
        used.flush()


# ---- one call -----------------------------------------------------------------------------------------------------


def factors_of(call: Call, grads: Sequence[Tensor | None]) -> Iterator[tuple[Shared, Rowlike | Lone, str]]:
    """The factors of every shared argument of a call, and whether they are by its ``"rule"`` or the ``"fallback"``."""
    shared = {id(s.tensor): s for s in call.shared}
    served: list[tuple[Tensor, Rowlike]] = []
    try:
        served = _by_rule(call, grads) if call.layout.alone is None else []
    except CaptureError:
        if call.n > 1:  # one sample's rows are the gradient, however its tensors lie
            raise
    times = [id(t) for t, _ in served]
    known = {i for i in times if times.count(i) == shared[i].places}
    yield from ((shared[id(t)], rows, "rule") for t, rows in served if id(t) in known)
    if rest := [s.tensor for i, s in shared.items() if i not in known]:
        one = 0 if call.n == 1 else call.layout.alone
        for tensor, rows in by_samples(call, grads, rest) if one is None else of_one(call, grads, rest, one):
            yield shared[id(tensor)], rows, "fallback"


def _by_rule(call: Call, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Rowlike]]:
    """What the call's rule serves; nothing if there is none, or if it doesn't know this way to call the function."""
    rule = rules.RULES.get(call.func)
    if rule is None or any(g is not None and g.is_complex() for g in grads):  # rules leave conjugates to autograd
        return []
    g = grads[0] if len(grads) == 1 else grads
    if not _takes(rule, 2 + len(call.args), tuple(call.kwargs)):
        return []
    for x in call.args:
        if isinstance(x, Tensor) and x.layout is not torch.strided:
            return []
    found: list[tuple[Tensor, Rowlike]] = []
    unusual: set[int] = set()
    try:
        for tensor, factors in rule(call, g, *call.args, **call.kwargs):
            if call.wants(tensor):
                try:
                    found.append((tensor, factors() if callable(factors) else factors))
                except NotImplementedError:  # an unusual layout: the fallback serves this tensor
                    unusual.add(id(tensor))
    except (PersampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CaptureError(
            f"{call.name}: its rule raised {type(error).__name__}: {error}. Correct the rule or remove() it, or use "
            "engine='loop'."
        ) from error
    return [(tensor, _as_rows(call, tensor, rows)) for tensor, rows in found if id(tensor) not in unusual]


def _as_rows(call: Call, tensor: Tensor, rows: Any) -> Rowlike:
    """What a rule gave; a tensor ``[N, *P]`` is dense rows."""
    rows = Dense(rows) if isinstance(rows, Tensor) else rows
    if not isinstance(rows, Rowlike):
        raise CaptureError(
            f"{call.name}: its rule gave a {type(rows).__name__} instead of factors or a tensor [N, *P]."
        )
    n = len(rows.value) if isinstance(rows, Diagonal) else len(rows)
    if n != call.n or rows.shape != tensor.shape:
        raise CaptureError(
            f"{call.name}: its rule gave rows of shape {(n, *rows.shape)} instead of {(call.n, *tensor.shape)}."
        )
    return rows


@functools.lru_cache(maxsize=4096)
def _takes(rule: Callable[..., Any], count: int, names: tuple[str, ...]) -> bool:
    """Whether ``rule`` can be called with so many positional arguments, and these keywords."""
    try:
        inspect.signature(rule).bind(*range(count), **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def pull_back(
    d: Derivation, rows: Rowlike, leaves: list[Tensor], last: Collection[int] = ()
) -> Iterator[tuple[Tensor, Rowlike]]:
    """From rows of a derived tensor to those of the parameters it was derived from; ``last`` are the ids of parameters
    whose rows are complete with these, and so are read before a backward can free the graph of the derivation.
    """
    steps = None if isinstance(rows, Dense | Diagonal) and rows.value.is_complex() else pulled(d, rows)
    if steps is None:
        yield from _by_autograd(d, plain(rows), leaves, last)
        return
    for tensor, factor in steps:
        source = next((s for s in d.sources if s.tensor is tensor), None)
        if source is None:
            continue
        d.read(tensor)
        if source.derivation is not None:
            check_no_hook(tensor, d)
        found = factor()
        if found.shape != tensor.shape:
            raise CaptureError(
                f"{function_name(d.func)}: its pull-back gave rows of shape {tuple(found.shape)} for an argument of "
                f"shape {tuple(tensor.shape)}. Correct it or remove() it, or use engine='loop'."
            )
        if not isinstance(found, Diagonal):
            found = cast(found, tensor.dtype)
        if source.derivation is None:
            yield tensor, found
        else:
            yield from pull_back(source.derivation, found, leaves, last)


def check_no_hook(tensor: Tensor, d: Derivation) -> None:
    """Raise for a derived tensor with a function that changes its gradient."""
    if tensor._backward_hooks:
        raise CaptureError(
            f"{function_name(d.func)}: a tensor of shape {tuple(tensor.shape)} that is computed from parameters has a "
            "hook (register_hook), which acts on the gradient of each loss by itself. Remove it, or use engine='loop'."
        )


def _by_autograd(
    d: Derivation, rows: Factors, leaves: list[Tensor], last: Collection[int]
) -> Iterator[tuple[Tensor, Factors]]:
    """Through the graph of the derivation: at once where there is little of it, else when rows are read."""
    there = reached([d.out.node]).leaves
    reach = [p for p in leaves if id(p) in there and any(p is leaf for leaf in leaves_of(d))]
    wait = [p for p in reach if id(p) in last and _may_wait(rows, p)]
    yield from ((p, Pulled(rows, partial(_led_back, d, p), p.shape)) for p in wait)
    now = [p for p in reach if not any(p is other for other in wait)]
    if now:
        parts = [_rows_of(d, piece, now) for piece in dense(rows).split(cost.pulled(d.shape.numel()))]
        for p, column in zip(now, zip(*parts, strict=True), strict=True):
            if column[0] is not None:
                yield p, Dense(torch.cat([c for c in column if c is not None]))


def _may_wait(rows: Factors, leaf: Tensor) -> bool:
    """Whether there is much to lead back, and no change of type on the way."""
    kinds = {t.dtype for t in (*tensors(rows), leaf)} - {*INDICES}
    much = len(rows) > cost.pulled(max(rows.shape.numel(), leaf.numel()))
    return much and kinds in ({torch.float32}, {torch.float64})


def _led_back(d: Derivation, leaf: Tensor, seeds: Tensor) -> Tensor:
    (rows,) = _rows_of(d, seeds, [leaf])
    return seeds.new_zeros(len(seeds), *leaf.shape) if rows is None else strided(rows)


def _rows_of(d: Derivation, seeds: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        try:
            return torch.autograd.grad(
                d.out, leaves, seeds, is_grads_batched=True, allow_unused=True, retain_graph=True
            )
        except RuntimeError as error:  # a backward that vmap doesn't support
            if "inplace operation" in str(error):
                raise InplaceError(
                    f"{function_name(d.func)}: what its gradient needs was changed in place afterwards. Use the "
                    "out-of-place operation, or engine='loop'."
                ) from error
            rows = [torch.autograd.grad(d.out, leaves, seed, allow_unused=True, retain_graph=True) for seed in seeds]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))


def total(parts: Sequence[Rowlike | Lone]) -> Rowlike:
    """The sum of several uses, added in pairs so that nothing is copied more than a few times."""
    if lone := [p for p in parts if isinstance(p, Lone)]:
        rows = lone[0].value.new_zeros(lone[0].n, *lone[0].shape)
        for one in lone:
            rows[one.sample] += one.value
        return total([Dense(rows), *(p for p in parts if not isinstance(p, Lone))])
    if len(parts) > 2 and (joined := _joined(parts)) is not None:
        return joined
    if len(parts) > 1:
        half = len(parts) // 2
        return _plus(total(parts[:half]), total(parts[half:]))
    (rest,) = parts
    assert not isinstance(rest, Lone)
    return rest


def _joined(parts: Sequence[Rowlike | Lone]) -> Outer | None:
    """Many uses of one form (the steps of a loop): all tokens in a row, copied once."""
    outers = [p for p in parts if isinstance(p, Outer)]
    kinds = {(p.left.shape[1], p.left.shape[3], p.left.dtype, p.right.dtype) for p in outers}
    if len(outers) < len(parts) or len(kinds) > 1:
        return None
    return Outer(torch.cat([p.left for p in outers], 2), torch.cat([p.right for p in outers], 2), outers[0].shape)


def _plus(a: Rowlike, b: Rowlike) -> Rowlike:
    if isinstance(a, Diagonal) and isinstance(b, Diagonal) and a.axis == b.axis and a.place is b.place:
        return Diagonal(a.value + b.value, a.axis, a.shape, a.place)
    return add(plain(a), plain(b))


def key_of(shared: Shared) -> Key:
    return id(shared.tensor) if shared.derivation is None else shared.derivation
