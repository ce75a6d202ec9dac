"""`combine` and `einsum` against the same contraction done in two steps by plain torch.einsum."""

from __future__ import annotations

import doctest
import sys
from math import prod
from string import ascii_letters
from typing import Any

import opt_einsum
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persample.einsum import Step, _planned, combine, contraction, einsum, parse
from persample.errors import EinsumError, PersampleError

SIZES = dict(zip("abcdefgh", (2, 3, 1, 4, 2, 3, 5, 2), strict=True))


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("noi,oi->n", {0: "nto,nti->noi"}, "nto,nti,oi->n"),
        ("noi,oi->n", {0: "nta,ntb->nab"}, "nto,nti,oi->n"),  # letters inside are the expression's own
        ("oi,noi->n", {1: "nto,nti->noi"}, "oi,nto,nti->n"),  # order of the operands
        ("noi,noi->n", {0: "nto,nti->noi", 1: "nto,nti->noi"}, "nto,nti,nso,nsi->n"),
        ("noi,noi->n", {"noi": "nto,nti->noi"}, "nto,nti,nso,nsi->n"),
        ("noi,moi->nm", {"noi": "nto,nti->noi", "moi": "nto,nti->noi"}, "nto,nti,mso,msi->nm"),
        ("nto,nti->noi", {1: "nio->nio"}, "nto,nti->noi"),  # an identity disappears
        ("nii->n", {0: "nto,nti->noi"}, "nti,nti->n"),  # a diagonal is taken inside
        ("npi,pi->n", {0: "nkto,nkti->n(ko)i"}, "nkto,nkti,(ko)i->n"),
        ("npi,npi->n", {"npi": "nkto,nkti->n(ko)i"}, "nkto,nkti,nkso,nksi->n"),
        ("npi->np", {0: "nkto,nkti->n(ko)i"}, "nkto,nkti->n(ko)"),
        ("nkoi,koi->n", {0: "n(ko)i->nkoi", 1: "(ko)i->koi"}, "nki,ki->n"),  # never taken apart: one index
        ("npi,pi->n", {0: "nkabi->n(kab)i"}, "nkabi,(kab)i->n"),
        ("(ab)c->cab", {0: "xy,y->yx"}, "c(ab),(ab)->cab"),
    ],
)
def test_expressions(outer: str, inner: dict[int | str, str], expected: str) -> None:
    assert combine(outer, inner) == expected


def test_nested_twice() -> None:
    rows = combine("nto,nti->noi", {0: "ntc,co->nto"})  # a layer's output gradient through the next layer's weight
    assert combine("noi,noi->n", {"noi": rows}) == "ntc,co,nti,nsb,bo,nsi->n"


@st.composite
def nested(draw: st.DrawFn) -> tuple[str, dict[int | str, str]]:
    """An outer expression whose operands are (some of them) products of factors with summed indices of their own."""
    letters = st.text("abcde", min_size=0, max_size=3)
    terms = draw(st.lists(letters, min_size=1, max_size=3))
    used = sorted(set("".join(terms)))
    output = draw(st.lists(st.sampled_from(used), unique=True, max_size=3)) if used else []
    inner: dict[int | str, str] = {}
    for i in draw(st.sets(st.integers(0, len(terms) - 1))):
        own = draw(st.permutations("abcdefgh"))[: len(terms[i])]
        factors = draw(st.lists(st.text("abcdefgh", max_size=3), min_size=1, max_size=2))
        missing = set(own) - set("".join(factors))
        factors[0] += "".join(sorted(missing))
        inner[i] = ",".join(factors) + "->" + "".join(own)
    return ",".join(terms) + "->" + "".join(output), inner


@settings(deadline=None)
@given(nested(), st.integers(0, 99))
def test_equals_two_steps(case: tuple[str, dict[int | str, str]], seed: int) -> None:
    outer, inner = case
    terms = outer.split("->")[0].split(",")
    operands: list[Tensor] = []
    intermediate: list[Tensor] = []
    for i, term in enumerate(terms):
        if i not in inner:
            intermediate.append(tensor(seed + i, *[SIZES[a] for a in term]))
            operands.append(intermediate[-1])
            continue
        left, right = inner[i].split("->")
        sizes = {a: SIZES[b] for a, b in zip(right, term, strict=True)}  # inner names stand for the outer's sizes
        factors = [
            tensor(seed + 10 * i + j, *[sizes.get(a, SIZES[a]) for a in f]) for j, f in enumerate(left.split(","))
        ]
        operands += factors
        intermediate.append(torch.einsum(inner[i], *factors))
    assert_close(einsum(combine(outer, inner), *operands), torch.einsum(outer, *intermediate))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_groups_equal_two_steps(n: int, k: int, o: int, t: int, seed: int) -> None:
    left, right = tensor(seed, n, k, t, o), tensor(seed + 1, n, k, t, 2)
    rows = torch.einsum("nkto,nkti->nkoi", left, right).reshape(n, k * o, 2)
    assert_close(einsum("nkto,nkti->n(ko)i", left, right), rows)
    v = tensor(seed + 2, k * o, 2)
    dot = combine("npi,pi->n", {0: "nkto,nkti->n(ko)i"})
    assert_close(einsum(dot, left, right, v), torch.einsum("npi,pi->n", rows, v))
    gram = combine("npi,mpi->nm", {"npi": "nkto,nkti->n(ko)i", "mpi": "nkto,nkti->n(ko)i"})
    assert_close(einsum(gram, left, right, left, right), torch.einsum("npi,mpi->nm", rows, rows))


def test_groups_need_a_size_only_when_it_does_not_follow() -> None:
    x = tensor(0, 3, 8)
    assert_close(einsum("n(ki)->nki", x, k=2), x.reshape(3, 2, 4))
    assert_close(einsum("n(ki),k->ni", x, tensor(1, 4)), torch.einsum("nki,k->ni", x.reshape(3, 4, 2), tensor(1, 4)))
    assert_close(einsum("n(ki)()->kin", x[:, :, None], i=4), x.reshape(3, 2, 4).permute(1, 2, 0))
    with pytest.raises(EinsumError, match=r"sizes of \['i', 'k'\]"):
        einsum("n(ki)->nki", x)
    with pytest.raises(EinsumError, match=r"operand 0 .*axis \(ki\) has 8 entries.*k=3"):
        einsum("n(ki)->nki", x, k=3)


def test_is_differentiable() -> None:
    left, right = tensor(0, 2, 4, 3).requires_grad_(), tensor(1, 2, 4, 2).requires_grad_()
    squared = einsum(combine("noi,noi->n", {"noi": "nto,nti->noi"}), left, right, left, right)
    rows = torch.einsum("nto,nti->noi", left, right)
    for a, b in zip(
        torch.autograd.grad(squared.sum(), (left, right)),
        torch.autograd.grad(rows.square().sum(), (left, right)),
        strict=True,
    ):
        assert_close(a, b)


def steps(tree: Any) -> list[Step]:
    return [*steps(tree.left), *steps(tree.right), tree] if isinstance(tree, Step) else []


@given(st.lists(st.text("abcde", min_size=1, max_size=3), min_size=2, max_size=5), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_no_order_of_contraction_is_cheaper(words: list[str], seed: int) -> None:
    """No more multiplications than the path that opt_einsum finds by trying all, and the numbers of `torch.einsum`."""
    terms = tuple("".join(dict.fromkeys(word)) for word in words)
    letters = sorted(set("".join(terms)))
    lengths = {a: 2 + (seed // 7**i) % 5 for i, a in enumerate(letters)}
    output = "".join(letters[: seed % 3])
    expression = ",".join(terms) + "->" + output

    def cost(pairs: list[tuple[str, ...]]) -> int:
        return sum(prod(lengths[a] for a in set("".join(pair))) for pair in pairs)

    own = cost([step.terms for step in steps(contraction(terms, output, lengths))])
    shapes = [tuple(lengths[a] for a in term) for term in terms]
    info = opt_einsum.contract_path(expression, *shapes, shapes=True, optimize="optimal")[1]
    assert own <= cost([tuple(step[2].split("->")[0].split(",")) for step in info.contraction_list])
    tensors = [tensor(seed + i, *shape) for i, shape in enumerate(shapes)]
    assert_close(einsum(expression, *tensors), torch.einsum(expression, *tensors))


def test_an_order_is_looked_for_once() -> None:
    x = tensor(0, 3, 3)
    einsum("ab,bc,cd->ad", x, x, x)
    before = _planned.cache_info()
    einsum("ab,bc,cd->ad", x, x, x)
    after = _planned.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_path_avoids_the_large_intermediate() -> None:
    expression = parse(combine("noi,oi->n", {0: "nto,nti->noi"}))
    tree = contraction(tuple(map("".join, expression.inputs)), "n", {"n": 8, "t": 1, "o": 50, "i": 40})
    assert all(prod({"n": 8, "t": 1, "o": 50, "i": 40}[a] for a in step.output) < 8 * 50 * 40 for step in steps(tree))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse("ab,bc"), "no '->'"),
        (lambda: parse("a...->a"), "operand 0 .*reads 'a...'"),
        (lambda: parse("a,(b->a"), r"operand 1 .*reads '\(b'"),
        (lambda: parse("ab->ac"), "output index 'c'"),
        (lambda: parse("ab->aa"), "'a' occurs twice"),
        (lambda: combine("ab,b->a", {2: "xy->xy"}), "2 is no operand .* from 0 to 1"),
        (lambda: combine("ab,b->a", {"ac": "xy->xy"}), "'ac' is no operand"),
        (lambda: combine("ab,b->a", {0: "xy->xy", "ab": "xy->xy"}), "operand 0 .*replaced twice"),
        (lambda: combine("ab,b->a", {0: "xyz->xyz"}), "operand 0 .'ab'. .*2 axes, but 'xyz->xyz' gives 3"),
        (lambda: combine("(ab)c->abc", {0: "xyzw->(xyz)w"}), r"can't match the groups \(ab\) and \(xyz\)"),
        (lambda: combine(",".join(ascii_letters) + ",z->", {52: "zy->z"}), "more than 52"),
        (lambda: einsum("ab,b->a", tensor(0, 2, 3)), "2 operands, but 1 tensors"),
        (lambda: einsum("a,b->a", tensor(0, 2), 3.0), "operands of 'a,b->a' must be tensors, got float"),
        (lambda: einsum(3, tensor(0, 2)), "is a string like 'ij,jk->ik', got int"),
        (lambda: combine("ab,b->a", {0: 3}), "is a string like 'ij,jk->ik', got int"),
        (lambda: einsum(",".join("a" * 13) + "->", *[tensor(0, 2)] * 13), "13 operands"),
        (lambda: einsum("ab,b->a", tensor(0, 2, 3), tensor(0, 3, 1)), r"operand 1 \('b'\) .*1 axes.*shape \(3, 1\)"),
        (
            lambda: einsum("ab,b->a", tensor(0, 2, 3), tensor(0, 1)),
            r"index 'b' .*3 in operand 0 \('ab'\) and 1 in operand 1",
        ),
    ],
)
def test_errors_name_the_operand_or_index(call: Any, message: str) -> None:
    with pytest.raises(EinsumError, match=message) as caught:
        call()
    assert isinstance(caught.value, PersampleError)


def test_types_that_do_not_fit_are_named() -> None:
    with pytest.raises(EinsumError, match=r"are of torch\.float32 and torch\.float64: give"):
        einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64))


def test_documentation_runs() -> None:
    result = doctest.testmod(sys.modules["persample.einsum"])
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize(
    "equation", ["aab,aab->b", "aab,aab,b->b", "aa,aa->", "bab,bab->ab", "aab,aab->ab", "ab,ab->b"]
)
def test_equal_operands_with_a_repeated_letter(equation: str) -> None:
    """Only the diagonal counts: they are no product entry by entry, summed."""
    terms = equation.split("->")[0].split(",")
    operands = [tensor(i, *[{"a": 3, "b": 4}[a] for a in term]) for i, term in enumerate(terms)]
    assert_close(einsum(equation, *operands), torch.einsum(equation, *operands))
