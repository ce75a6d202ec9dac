"""The forms stand for the matrices they claim to stand for, and stay closed under what is done to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forms import convolutions, examples, flat, forms, make_conv, make_dense, make_outer, make_rows, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor
from torch.testing import assert_close

from persample import cost, factors
from persample.factors import Across, Conv, Dense, Outer, Pulled, Rows, add, compact, dense, fold

EXAMPLES = examples()
same = pytest.mark.parametrize("name", EXAMPLES)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@same
def test_dense(name: str) -> None:
    g, rows = EXAMPLES[name]
    assert (len(g), g.shape) == (len(rows), rows.shape[1:])
    close(dense(g), rows)


@same
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "float32", "wide", "wide, in blocks"])
def test_dense_writes_into_a_given_buffer(name: str, layout: str) -> None:
    g, rows = EXAMPLES[name]
    out = torch.full_like(rows, torch.nan, dtype=torch.float32 if layout == "float32" else torch.float64)
    if layout == "permuted":
        out = out.permute(*reversed(range(out.ndim))).contiguous().permute(*reversed(range(out.ndim)))
    if "wide" in layout:  # columns of a matrix that holds other parameters too
        whole = torch.full((len(rows), 3 + rows[0].numel() + 2), torch.nan, dtype=torch.float64)
        out = whole[:, 3:-2].unflatten(1, rows.shape[1:]) if rows.ndim > 1 else whole[:, 3]
    with cost.using(**{"block": 20} if "blocks" in layout else {}):
        assert dense(g, out=out) is out
    if "wide" in layout:
        assert int(whole.isnan().sum()) == whole.numel() - rows.numel()
    if layout == "float32":
        assert_close(out, rows.float(), rtol=1e-5, atol=1e-5)
    else:
        close(out, rows)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_any_convolution(pair: tuple[Conv, torch.Tensor]) -> None:
    g, rows = pair
    close(dense(g), rows)
    close(dense(g, out=torch.empty_like(rows)), rows)


@settings(max_examples=60, deadline=None)
@given(forms(), st.floats(-2, 2))
def test_helpers(pair: tuple[factors.Factors, torch.Tensor], factor: float) -> None:
    g, rows = pair
    close(dense(factors.scale(g, factor)), factor * rows)
    close(dense(factors.scale(g, torch.tensor(factor, dtype=torch.float64))), factor * rows)
    close(dense(factors.index(g, slice(1, 3))), rows[1:3])
    picked = torch.arange(len(g)).flip(0)
    close(dense(factors.index(g, picked)), rows.flip(0))
    assert dense(factors.cast(g, torch.float32)).dtype == torch.float32
    close(dense(compact(g)), rows)
    close(dense(factors.reshape(g, Size((g.shape.numel(),)))), flat(rows))
    if len(g.shape) == 2:
        close(dense(factors.transpose(g)), rows.mT)


@same
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fold(name: str, size: int) -> None:
    g, rows = examples(n=4)[name]
    folded = fold(g, size)
    close(dense(folded), rows.unflatten(0, (4 // size, size)).sum(1))
    assert type(folded) is type(g)
    close(dense(fold(folded, 4 // size)), rows.sum(0, keepdim=True))


@same
def test_add_a_second_use(name: str) -> None:
    (a, rows_a), (b, rows_b) = EXAMPLES[name], examples(seed=7)[name]
    other = isinstance(a, Pulled) and not isinstance(a.back, Across)  # led back in another way
    assert type(add(a, b)) is (Dense if other else type(a))
    close(dense(add(a, b)), rows_a + rows_b)
    close(dense(add(add(a, b), a)), 2 * rows_a + rows_b)


def test_add_what_is_led_back_alike() -> None:
    (a, rows_a), (b, rows_b) = EXAMPLES["pulled_entries"], examples(seed=7)["outer"]
    assert isinstance(a, Pulled) and isinstance(a.back, Tensor)
    both = add(a, Pulled(b, a.back.clone(), a.shape))
    assert isinstance(both, Pulled) and isinstance(both.rows, Outer)
    close(dense(both), rows_a + rows_b * a.back)


def test_add_mixed_forms() -> None:
    n, v, d = 3, 5, 3
    all_forms = [make_dense(1, n, (v, d)), make_outer(2, n, 1, 2, v, d), make_rows(3, n, 2, v, d)]
    all_forms += [make_rows(4, n, 7, v, d), make_outer(5, n, v, 2, 1, d)]
    for a, rows_a in all_forms:
        for b, rows_b in all_forms:
            close(dense(add(a, b)), rows_a + rows_b)
    assert isinstance(add(all_forms[1][0], all_forms[2][0]), Outer)


def test_add_convolutions_of_other_sizes_and_geometries() -> None:
    k, one, zero = (3, 3), (1, 1), (0, 0)
    a, rows_a = make_conv(0, 3, 1, 4, 3, (6, 5), k, one, one, one)
    for size, stride, padding, dilation in [((4, 4), one, one, one), ((6, 5), (2, 1), one, one),
                                            ((6, 5), one, zero, one), ((6, 5), one, (2, 2), (2, 2))]:  # fmt: skip
        b, rows_b = make_conv(1, 3, 1, 4, 3, size, k, stride, padding, dilation)
        close(dense(add(a, b)), rows_a + rows_b)


def test_outer_promotes_dtypes() -> None:
    g = factors.outer(randn(0, 2, 1, 1, 3).float(), randn(1, 2, 1, 1, 4), Size((3, 4)))
    assert factors.dtype(g) == torch.float64
    assert {t.dtype for t in factors.tensors(g)} == {torch.float64}


def test_compact_keeps_the_smaller_form() -> None:
    few, many = make_outer(0, 2, 1, 2, 8, 8)[0], make_outer(0, 2, 1, 5, 8, 8)[0]
    assert compact(few) is few
    assert isinstance(compact(many), Dense)
    assert isinstance(compact(make_rows(0, 2, 3, 50, 4)[0]), Rows)
    assert isinstance(compact(make_rows(0, 2, 30, 5, 4)[0]), Dense)
    wide, tall = ((0, 2, 1, o, o, (s, s), (3, 3), (1, 1), (1, 1), (1, 1)) for o, s in [(16, 4), (2, 9)])
    assert isinstance(compact(make_conv(*wide)[0]), Conv)
    assert isinstance(compact(make_conv(*tall)[0]), Dense)
    assert factors.nbytes(few) == 2 * 2 * (8 + 8) * 8


@same
def test_layout_in_memory_does_not_matter(name: str) -> None:
    g, rows = EXAMPLES[name]
    fields = {key: value for key, value in vars(g).items() if isinstance(value, torch.Tensor)}
    turned = {key: value.movedim(-1, 0).contiguous().movedim(0, -1) for key, value in fields.items()}
    close(dense(replace(g, **turned)), rows)


def test_no_samples() -> None:
    for name, (g, rows) in examples(n=0).items():
        assert dense(g).shape == rows.shape, name
        assert len(fold(g, 2)) == 0


def test_a_convolution_of_lists() -> None:
    x, g, shape = randn(0, 2, 3, 5, 5), randn(1, 2, 4, 2, 2), Size((4, 3, 3, 3))
    lists = Conv(x, g, [2, 2], [0, 0], [1, 1], shape)  # type: ignore[arg-type]
    assert torch.equal(dense(lists), dense(Conv(x, g, (2, 2), (0, 0), (1, 1), shape)))


def test_factors_that_do_not_fit_together() -> None:
    x = randn
    with pytest.raises(ValueError, match=r"left \[N, K, T, O\].*got left \(2, 1, 3, 4\), right \(2, 1, 4, 5\)"):
        Outer(x(0, 2, 1, 3, 4), x(0, 2, 1, 4, 5), Size((4, 5)))
    with pytest.raises(ValueError, match=r"K O I entries.*shape \(4, 6\)"):
        Outer(x(0, 2, 1, 3, 4), x(0, 2, 1, 3, 5), Size((4, 6)))
    with pytest.raises(ValueError, match=r"index \[N, T\]"):
        Rows(torch.zeros(2, 3, dtype=torch.int64), x(0, 2, 3, 4), Size((9, 5)))
    with pytest.raises(ValueError, match=r"int64 or int32.*got index torch\.float32"):
        Rows(torch.zeros(2, 3), x(0, 2, 3, 4), Size((9, 4)))
    ones = (1, 1)
    with pytest.raises(ValueError, match="as many strides"):
        Conv(x(0, 2, 3, 5, 5), x(0, 2, 4, 5, 5), (1,), ones, ones, Size((4, 3, 3, 3)))
    with pytest.raises(ValueError, match=r"input \[N, K I, \*S\]"):
        Conv(x(0, 2, 3, 5, 5), x(0, 2, 4, 5, 5), ones, ones, ones, Size((4, 2, 3, 3)))
