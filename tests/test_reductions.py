"""Every primitive on every form (and pair of forms) against the plain matrix."""

from __future__ import annotations

import pytest
import torch
from forms import examples, flat, forms, make_dense, make_outer, make_rows, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from persample import cost, factors, reductions
from persample.factors import Dense, Factors

EXAMPLES, SECOND, LARGER = examples(), examples(seed=5), examples(seed=5, n=5)
same = pytest.mark.parametrize("name", EXAMPLES)


SMALL = {"block": 40, "wide": 60, "samples": 2, "long": 4}
VARIANTS = {
    "default": {},
    "stream": {"outer_norm": "stream", "outer_gram": "stream", "outer_moments": "stream", "conv_norm": "stream",
               "conv_rows": "offsets"},
    "products": {"outer_norm": "tokens", "outer_gram": "tokens", "outer_moments": "products", "conv_norm": "pixels",
                 "conv_rows": "native", "few": 0},
    "tokens": {"outer_norm": "tokens", "outer_gram": "tokens", "conv_norm": "stream", "conv_rows": "tokens"},
}  # fmt: skip
VARIANTS |= {f"{name}_small": SMALL | changes for name, changes in VARIANTS.items()}
every_kernel = pytest.mark.parametrize("variant", VARIANTS)


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def centred(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)).square().sum(0) if len(rows) else rows.sum(0)


def check(g: Factors, rows: Tensor) -> None:
    """All primitives of one form."""
    n, shape = len(rows), rows.shape[1:]
    weight, v, matrix = randn(91, n), randn(92, *shape), randn(93, *shape, 3)
    close(reductions.weighted_sum(g, weight), torch.einsum("n,n...->...", weight, rows))
    close(reductions.weighted_sum(g), rows.sum(0))
    close(reductions.square_sum(g), rows.square().sum(0))
    total, square = reductions.moments(g)
    close(total, rows.sum(0))
    close(square, centred(rows))
    close(reductions.row_dot(g, g), flat(rows).square().sum(1))
    close(reductions.gram(g, g), flat(rows) @ flat(rows).mT)
    close(reductions.dot(g, v), flat(rows) @ v.flatten())
    close(reductions.project(g, matrix), flat(rows) @ matrix.reshape(-1, 3))


def check_pair(a: Factors, rows_a: Tensor, b: Factors, rows_b: Tensor) -> None:
    close(reductions.gram(a, b), flat(rows_a) @ flat(rows_b).mT)
    if len(rows_a) == len(rows_b):
        close(reductions.row_dot(a, b), (flat(rows_a) * flat(rows_b)).sum(1))


@same
@every_kernel
def test_primitives(name: str, variant: str) -> None:
    with cost.using(**VARIANTS[variant]):
        check(*EXAMPLES[name])


@same
@every_kernel
def test_two_batches(name: str, variant: str) -> None:
    with cost.using(**VARIANTS[variant]):
        check_pair(*EXAMPLES[name], *SECOND[name])
        check_pair(*EXAMPLES[name], *LARGER[name])


@same
@every_kernel
def test_with_dense(name: str, variant: str) -> None:
    (g, rows), other = EXAMPLES[name], randn(8, 3, *EXAMPLES[name][1].shape[1:])
    with cost.using(**VARIANTS[variant]):
        check_pair(g, rows, Dense(other), other)
        check_pair(Dense(other), other, g, rows)


@same
@every_kernel
def test_individual_gradients(name: str, variant: str) -> None:
    g, rows = EXAMPLES[name]
    with cost.using(**VARIANTS[variant]):
        close(factors.dense(g), rows)
        close(factors.dense(g, out=torch.empty_like(rows)), rows)


def test_mixed_forms() -> None:
    mixed = [make_dense(1, 3, (6, 4)), make_outer(2, 3, 1, 2, 6, 4), make_outer(2, 3, 3, 2, 2, 4), make_rows(3, 3, 4, 6, 4)]
    for a in mixed:
        for b in mixed:
            check_pair(*a, *b)


@settings(max_examples=150, deadline=None)
@given(forms(), st.sampled_from(list(VARIANTS)))
def test_any_form(pair: tuple[Factors, Tensor], variant: str) -> None:
    with cost.using(**VARIANTS[variant]):
        check(*pair)


@settings(max_examples=30, deadline=None)
@given(forms(), st.integers(1, 3))
def test_folded_and_added(pair: tuple[Factors, Tensor], size: int) -> None:
    g, rows = pair
    n = len(rows) // size * size
    g, rows = factors.index(g, slice(0, n)), rows[:n]
    check(factors.add(factors.fold(g, size), factors.fold(g, size)), 2 * rows.unflatten(0, (n // size, size)).sum(1))


@same
def test_no_samples(name: str) -> None:
    (g, rows), (b, rows_b) = examples(n=0)[name], EXAMPLES[name]
    check(g, rows)
    close(reductions.gram(g, b), flat(rows) @ flat(rows_b).mT)
    close(reductions.gram(b, g), flat(rows_b) @ flat(rows).mT)
