"""Einsum expressions put into each other: contract factors without ever building what they stand for.

An operand of an einsum is often the result of another one.  Per-sample gradients of a linear layer, for instance, are
``"nto,nti->noi"`` of output gradients and inputs, and a directional derivative is ``"noi,oi->n"`` of them:

>>> combine("noi,oi->n", {0: "nto,nti->noi"})
'nto,nti,oi->n'

One expression, and `einsum` contracts it along the cheapest path, which need not pass through ``[N, O, I]``.  Squared
norms and Gram matrices use the same factors twice; the indices summed inside are then renamed apart:

>>> combine("noi,noi->n", {"noi": "nto,nti->noi"})
'nto,nti,nso,nsi->n'
>>> combine("noi,moi->nm", {0: "nto,nti->noi", 1: "nto,nti->noi"})
'nto,nti,mso,msi->nm'

Axes that are one in a tensor and several in the expression are grouped as in einops, row-major: a weight of ``K``
blocks has shape ``[K O, I]``, so its gradient is ``"nkto,nkti->n(ko)i"``, and what meets it is grouped too:

>>> combine("npi,pi->n", {0: "nkto,nkti->n(ko)i"})
'nkto,nkti,(ko)i->n'

How it works.  An axis is a string of letters (one letter, or a group), a term a tuple of axes.  Substitution *unifies*
the output term of the inner expression with the operand's term: every letter becomes a string of letters, so that
both terms read the same.  Groups that are never taken apart are one axis again in the end.

Letters are single; blanks are ignored; there are no ellipses, no implicit outputs, and axes of size one are not
broadcast (a size that does not fit is an error).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from string import ascii_letters, ascii_lowercase

import torch
from torch import Size, Tensor

from .errors import EinsumError

MOST = 12  # operands

Axis = str  # its letters, outermost first; "" is an axis of size one
Term = tuple[Axis, ...]


@dataclass(frozen=True)
class Expression:
    """``inputs -> output``, each a tuple of axes, each axis a string of letters."""

    inputs: tuple[Term, ...]
    output: Term

    def __str__(self) -> str:
        return ",".join(map(_write, self.inputs)) + "->" + _write(self.output)


# ---- reading and writing ----------------------------------------------------------------------------------------


def parse(expression: str) -> Expression:
    """Read ``"nto,n(ko)i->nkti"``.  Every output letter must occur in an operand, and only once in the output."""
    if not isinstance(expression, str):
        raise EinsumError(f"an einsum expression is a string like 'ij,jk->ik', got {type(expression).__name__}")
    text = re.sub(r"\s", "", expression)
    left, arrow, right = text.partition("->")
    if not arrow:
        raise EinsumError(f"einsum expression {expression!r} has no '->': write the output's indices out")
    inputs = tuple(_read(term, f"operand {i}", expression) for i, term in enumerate(left.split(",")))
    output = _read(right, "the output", expression)
    known, written = set("".join(map("".join, inputs))), "".join(output)
    for letter in written:
        if letter not in known:
            raise EinsumError(f"output index {letter!r} of {expression!r} is in none of the operands")
        if written.count(letter) > 1:
            raise EinsumError(f"index {letter!r} occurs twice in the output of {expression!r}")
    return Expression(inputs, output)


def _read(term: str, where: str, expression: str) -> Term:
    if not re.fullmatch(r"([a-zA-Z]|\([a-zA-Z]*\))*", term):
        raise EinsumError(
            f"{where} of einsum expression {expression!r} reads {term!r}: only letters and groups like '(ko)' are known"
        )
    return tuple(single or group for single, group in re.findall(r"([a-zA-Z])|\(([a-zA-Z]*)\)", term))


def _write(term: Term) -> str:
    return "".join(axis if len(axis) == 1 else f"({axis})" for axis in term)


# ---- substitution -----------------------------------------------------------------------------------------------


def combine(outer: str, inner: Mapping[int | str, str]) -> str:
    """``outer`` with operands replaced by the expressions that produce them, as one expression.

    Args:
        outer: An einsum expression.
        inner: What produces an operand: the key is its position, or its indices (``"noi"``) for every operand with
            these; the value an einsum expression whose output has as many axes.  Its letters are its own.

    Returns:
        The combined expression.  The inner operands stand, in order, where the operand stood; letters of ``outer``
        are kept, a letter summed inside keeps its name while that is free and else takes the nearest free letter
        before it in the alphabet; groups that are nowhere taken apart are merged into one index.

    Raises:
        EinsumError: for an expression that can't be read, a key that is no operand, a number of axes or a grouping
            that doesn't fit, or more than 52 indices.

    `einsum` of the result equals the two steps.  Two groups for one axis are taken to be the same grouping if they
    have as many indices; where the operands' sizes say otherwise, `einsum` raises.
    """
    whole = parse(outer)
    chosen = _chosen(whole, inner, outer)
    letters = _Letters("".join("".join(term) for term in (*whole.inputs, whole.output)))
    terms: list[tuple[Term, ...]] = [(term,) for term in whole.inputs]
    equations: list[tuple[Axis, Axis, str]] = []
    for position, part in sorted(chosen.items()):
        renamed = _rename(part, whole.inputs[position], letters)
        where = f"operand {position} ({_write(whole.inputs[position])!r}) of {outer!r}"
        if len(renamed.output) != len(whole.inputs[position]):
            raise EinsumError(
                f"{where} has {len(whole.inputs[position])} axes, but {str(part)!r} gives {len(part.output)}"
            )
        equations += [(a, b, where) for a, b in zip(whole.inputs[position], renamed.output, strict=True)]
        terms[position] = renamed.inputs
    solution = _unify(equations)
    flat = tuple(tuple(_replace(axis, solution) for axis in term) for group in terms for term in group)
    result = Expression(flat, tuple(_replace(axis, solution) for axis in whole.output))
    return str(parse(str(_merge_groups(result))))


def _chosen(whole: Expression, inner: Mapping[int | str, str], outer: str) -> dict[int, Expression]:
    """The expression of every replaced operand, by position."""
    found: dict[int, Expression] = {}
    for key, expression in inner.items():
        if isinstance(key, int):
            positions = [key] if 0 <= key < len(whole.inputs) else []
        else:
            term = _read(re.sub(r"\s", "", key), f"key {key!r}", outer)
            positions = [i for i, candidate in enumerate(whole.inputs) if candidate == term]
        if not positions:
            raise EinsumError(
                f"{key!r} is no operand of {outer!r}: give a position from 0 to {len(whole.inputs) - 1}, or an "
                "operand's indices"
            )
        for position in positions:
            if position in found:
                raise EinsumError(f"operand {position} of {outer!r} is replaced twice")
            found[position] = parse(expression)
    return found


class _Letters:
    """Letters not yet used."""

    def __init__(self, used: str) -> None:
        self.used = set(used)

    def fresh(self, wish: str) -> str:
        """The wished letter if it is free, else the nearest free one before it in the alphabet."""
        start = ascii_lowercase.find(wish.lower())
        order = wish + ascii_lowercase[start::-1] + ascii_lowercase[:start:-1] + ascii_letters
        for letter in order:
            if letter not in self.used:
                self.used.add(letter)
                return letter
        raise EinsumError("the combined expression needs more than 52 indices")


def _rename(part: Expression, term: Term, letters: _Letters) -> Expression:
    """``part`` with letters of its own, except where an axis of its output is written like that of ``term``."""
    names: dict[str, str] = {}
    for axis, target in zip(part.output, term, strict=False):
        if len(axis) == len(target):
            names.update(zip(axis, target, strict=True))
    for letter in dict.fromkeys("".join(map("".join, part.inputs))):
        if letter not in names:
            names[letter] = letters.fresh(letter)

    def rename(old: Term) -> Term:
        return tuple("".join(names[letter] for letter in axis) for axis in old)

    return Expression(tuple(map(rename, part.inputs)), rename(part.output))


def _unify(equations: list[tuple[Axis, Axis, str]]) -> dict[str, Axis]:
    """Letters as strings of letters, so that both sides of every equation read the same."""
    solution: dict[str, Axis] = {}
    for left, right, where in equations:
        left, right = _replace(left, solution), _replace(right, solution)
        if left == right:
            continue
        if len(left) == len(right):
            new = dict(zip(right, left, strict=True))
        elif len(left) == 1 and left not in right:
            new = {left: right}
        elif len(right) == 1 and right not in left:
            new = {right: left}
        else:
            raise EinsumError(
                f"{where}: can't match the groups {_write((left,))} and {_write((right,))}: write both with the same "
                "number of indices"
            )
        _add(new, solution, where)
    return solution


def _add(new: Mapping[str, Axis], solution: dict[str, Axis], where: str) -> None:
    for letter, axis in new.items():
        letter, axis = _replace(letter, solution), _replace(axis, solution)
        if letter == axis:
            continue
        if len(letter) != 1 or letter in axis:
            raise EinsumError(f"{where}: index {letter!r} would have to be the same as {_write((axis,))}")
        for known, value in solution.items():
            solution[known] = value.replace(letter, axis)
        solution[letter] = axis


def _replace(axis: Axis, solution: Mapping[str, Axis]) -> Axis:
    return "".join(solution.get(letter, letter) for letter in axis)


def _merge_groups(expression: Expression) -> Expression:
    """``(ko)i,(ko)i->`` is ``ki,ki->``: an index that always follows another one inside a group is part of it."""
    axes = [axis for term in (*expression.inputs, expression.output) for axis in term]
    for pair in sorted({axis[i : i + 2] for axis in axes for i in range(len(axis) - 1)}):
        first, second, count = pair[0], pair[1], "".join(axes).count
        if sum(axis.count(pair) for axis in axes) == count(first) == count(second):
            merged = [
                tuple(axis.replace(pair, first) for axis in term) for term in (*expression.inputs, expression.output)
            ]
            return _merge_groups(Expression(tuple(merged[:-1]), merged[-1]))
    return expression


# ---- contraction ------------------------------------------------------------------------------------------------


def einsum(expression: str, *operands: Tensor, **sizes: int) -> Tensor:
    """The tensor that ``expression`` says: groups are split and merged, and all operands contracted along one path.

    Args:
        expression: As of `combine`; also any ordinary einsum with letters and an explicit output.
        operands: One tensor per input term.
        sizes: Lengths of indices that occur in groups only, like ``k=2`` for ``"n(ki),i->nk"``.

    Returns:
        A tensor with the output's axes; differentiable, and like ``torch.einsum`` a view where nothing is summed.

    Raises:
        EinsumError: if the number of operands, their axes or their sizes do not fit; names operand and index.

    Cost: that of the order of contraction, two operands at a time, with the fewest multiplications.  It is looked for
    once per expression and sizes, in ``3^n`` steps for ``n`` operands.
    """
    if odd := [type(x).__name__ for x in operands if not isinstance(x, Tensor)]:
        raise EinsumError(f"the operands of {expression!r} must be tensors, got {odd[0]} (torch.as_tensor makes one)")
    plan = _planned(expression, tuple(x.shape for x in operands), tuple(sizes.items()))
    split = [x.reshape(shape) for x, shape in zip(operands, plan.shapes, strict=True)]
    try:
        return _contract(plan.tree, split).reshape(plan.shape)
    except RuntimeError as error:  # which pairs of types can be multiplied depends on the order
        if len(kinds := sorted({str(x.dtype) for x in operands})) == 1:
            raise
        raise EinsumError(f"the operands of {expression!r} are of {' and '.join(kinds)}: give them one type") from error


@dataclass(frozen=True)
class Plan:
    """What there is to do: groups taken apart, axes of size one left out, contracted, and put together again."""

    shapes: list[list[int]]
    tree: Step | str
    shape: list[int]


@lru_cache(maxsize=4096)
def _planned(expression: str, shapes: tuple[Size, ...], sizes: tuple[tuple[str, int], ...]) -> Plan:
    parsed = parse(expression)
    if len(shapes) != len(parsed.inputs):
        raise EinsumError(f"{expression!r} has {len(parsed.inputs)} operands, but {len(shapes)} tensors were given")
    lengths = _lengths(parsed, shapes, dict(sizes), expression)
    *terms, output = ["".join(a for a in "".join(t) if lengths[a] != 1) for t in (*parsed.inputs, parsed.output)]
    return Plan(
        [[lengths[a] for a in term] for term in terms],
        contraction(tuple(terms), output, lengths),
        [prod(lengths[a] for a in axis) for axis in parsed.output],
    )


@dataclass(frozen=True)
class Step:
    """Two operands become one; each is the result of another step, or one of those given."""

    left: Step | int
    right: Step | int
    terms: tuple[str, str]
    output: str


def contraction(terms: tuple[str, ...], output: str, lengths: Mapping[str, int]) -> Step | str:
    """The order with the fewest multiplications, by dynamic programming over sets of operands (bits of an int); of one
    operand, the expression that it needs.
    """
    if len(terms) == 1:
        return f"{terms[0]}->{output}"
    if len(terms) > MOST:
        raise EinsumError(f"an expression of {len(terms)} operands: contract at most {MOST} at a time")
    whole = (1 << len(terms)) - 1
    made: dict[int, str] = {1 << i: term for i, term in enumerate(terms)}  # the indices of what a set is contracted to
    best: dict[int, tuple[int, Step | int]] = {1 << i: (0, i) for i in range(len(terms))}
    for some in range(1, whole + 1):
        if some in best:
            continue
        inside = dict.fromkeys("".join(term for i, term in enumerate(terms) if some >> i & 1))
        beside = set(output).union(*(term for i, term in enumerate(terms) if not some >> i & 1))
        made[some] = output if some == whole else "".join(a for a in inside if a in beside)
        part = some
        while part := (part - 1) & some:
            rest = some ^ part
            if part & some & -some:  # the first operand is on the left
                cost = best[part][0] + best[rest][0] + prod(lengths[a] for a in {*made[part], *made[rest]})
                if some not in best or cost < best[some][0]:
                    best[some] = cost, Step(best[part][1], best[rest][1], (made[part], made[rest]), made[some])
    found = best[whole][1]
    assert isinstance(found, Step)
    return found


def _contract(tree: Step | int | str, operands: list[Tensor]) -> Tensor:
    if isinstance(tree, str):
        return torch.einsum(tree, *operands)
    if isinstance(tree, int):
        return operands[tree]
    x, y = (_contract(part, operands) for part in (tree.left, tree.right))
    (a, b), out = tree.terms, tree.output
    own = len({*a}) == len(a)  # no diagonal
    if own and a == b and a[-1:] in out and out == "".join(letter for letter in a if letter in out):
        summed = [i for i, letter in enumerate(a) if letter not in out]
        return (x * y).sum(summed) if summed else x * y  # a matrix product would copy both
    return torch.einsum(f"{a},{b}->{out}", x, y)


def _lengths(parsed: Expression, shapes: tuple[Size, ...], sizes: Mapping[str, int], expression: str) -> dict[str, int]:
    """The size of every index: from axes that are one letter first, then what groups leave open."""
    found: dict[str, tuple[int, str]] = {letter: (size, "the arguments") for letter, size in sizes.items()}
    groups: list[tuple[Axis, int, str]] = []
    for i, (shape, term) in enumerate(zip(shapes, parsed.inputs, strict=True)):
        where = f"operand {i} ({_write(term)!r})"
        if len(shape) != len(term):
            raise EinsumError(
                f"{where} of {expression!r} has {len(term)} axes, but the tensor has shape {tuple(shape)}"
            )
        for axis, size in zip(term, shape, strict=True):
            if len(axis) == 1:
                _agree(found, axis, size, where, expression)
            else:
                groups.append((axis, size, where))
    while groups:
        ready = [g for g in groups if sum(letter not in found for letter in g[0]) <= 1]
        if not ready:
            letters = sorted(set("".join(g[0] for g in groups)) - found.keys())
            raise EinsumError(
                f"the sizes of {letters} in {expression!r} do not follow from the operands: give one, like "
                f"{letters[0]}=2"
            )
        axis, size, where = ready[0]
        groups.remove(ready[0])
        known = prod(found[a][0] for a in axis if a in found)
        for letter in set(axis) - found.keys():
            found[letter] = (size // known if known else 0, where)
        if prod(found[a][0] for a in axis) != size:
            shown = ", ".join(f"{a}={found[a][0]}" for a in axis)
            raise EinsumError(
                f"{where} of {expression!r}: the axis ({axis}) has {size} entries, which does not fit {shown or 1}"
            )
    return {letter: size for letter, (size, _) in found.items()}


def _agree(found: dict[str, tuple[int, str]], letter: str, size: int, where: str, expression: str) -> None:
    known, source = found.setdefault(letter, (size, where))
    if known != size:
        raise EinsumError(f"index {letter!r} of {expression!r} is {known} in {source} and {size} in {where}")
