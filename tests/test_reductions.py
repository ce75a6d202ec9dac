"""Every primitive on every form (and pair of forms) against the plain matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from benchmarks.measure import peak
from forms import examples, flat, forms, make_conv, make_dense, make_outer, make_rows, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from persample import convolution, cost, doubt, factors, lookup, reductions, scratch
from persample import moments as moments_file
from persample.factors import Conv, Dense, Factors, Outer, dense

EXAMPLES, SECOND, LARGER = examples(), examples(seed=5), examples(seed=5, n=5)
same = pytest.mark.parametrize("name", EXAMPLES)


SMALL = {"block": 40, "wide": 60, "samples": 2, "long": 4, "pulled": 40}
VARIANTS = {
    "default": {},
    "stream": {"outer_norm": "stream", "outer_gram": "stream", "outer_moments": "stream", "conv_norm": "stream",
               "conv_gram": "stream", "conv_rows": "offsets"},
    "products": {"outer_norm": "tokens", "outer_gram": "tokens", "outer_moments": "products", "conv_norm": "pixels",
                 "conv_gram": "pixels", "conv_rows": "native", "few": 0},
    "halves": {"outer_norm": "tokens", "tokens": 1, "long": 1},
    "native": {"conv_norm": "stream", "conv_gram": "stream", "conv_rows": "native"},
    "tokens": {"outer_norm": "tokens", "outer_gram": "tokens", "conv_norm": "stream", "conv_rows": "tokens"},
}  # fmt: skip
VARIANTS |= {f"{name}_small": SMALL | changes for name, changes in VARIANTS.items()}
VARIANTS["stream_blocks"] = VARIANTS["stream_small"] | {"long": 1000}
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
    close(reductions.centred(g), centred(rows))
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


@pytest.mark.parametrize("lanes", [3, 64])
@pytest.mark.parametrize("how", ["offsets", "native", "tokens"])
@pytest.mark.parametrize("block", [40, 10**4])
@same
def test_every_thread_has_totals_of_its_own(
    name: str, block: int, how: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are dealt out to totals, however many there are of both, block by block."""
    monkeypatch.setattr(cost, "lanes", lambda like, n, row: lanes)
    for n in (1, 5, 8):
        g, rows = examples(5, n)[name]
        with cost.using(block=block, long=1, wide=10**9, conv_rows=how, outer_moments="stream"):
            close(reductions.square_sum(g), rows.square().sum(0))
            total, square = reductions.moments(g)
            close(total, rows.sum(0))
            close(square, centred(rows))


def test_lanes_and_blocks_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    like, block, wide = torch.empty(1), cost.costs().block, cost.costs().wide
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [cost.lanes(like, 16, row) for row in (block // 17, block // 16, wide // 4, wide // 4 + 1)] == [1, 4, 4, 1]
    assert cost.lanes(like, 15, block) == cost.lanes(like.to("meta"), 16, block) == 1
    assert [cost.chunk(block // n) for n in (1, 3, 4, 5, 7, 8, 9)] == [1, 3, 4, 4, 4, 8, 8]
    assert [cost.shared(row) for row in (wide // 4 + 1, wide // 4, block // 5)] == [1, 4, 4]


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
    mixed = [make_dense(1, 3, (6, 4)), make_rows(3, 3, 4, 6, 4)]
    mixed += [make_outer(2, 3, 1, 2, 6, 4), make_outer(2, 3, 3, 2, 2, 4)]
    for a in mixed:
        for b in mixed:
            check_pair(*a, *b)


@settings(max_examples=150, deadline=None)
@given(forms(), st.sampled_from(list(VARIANTS)))
def test_any_form(pair: tuple[Factors, Tensor], variant: str) -> None:
    with cost.using(**VARIANTS[variant]):
        check(*pair)


@pytest.mark.parametrize("n", [1, 31, 63, 64, 65, 97, 128, 129, 200])
@pytest.mark.parametrize("width", [7, 8])
def test_inner_products_in_bands_of_samples(n: int, width: int) -> None:
    """No product is computed twice, nor left out."""
    g, rows = make_dense(0, n, (width, 2))
    h, more = make_outer(1, n, 1, 3, 4, width)
    with cost.using(long=4, outer_gram="stream", tiny=0):
        close(reductions.gram(g, g), flat(rows) @ flat(rows).mT)
        close(reductions.gram(h, h), flat(more) @ flat(more).mT)


@settings(max_examples=60, deadline=None)
@given(forms(), st.sampled_from(list(VARIANTS)))
def test_any_form_where_numbers_of_entries_are_not_asked_for(pair: tuple[Factors, Tensor], variant: str) -> None:
    with pytest.MonkeyPatch.context() as patch, cost.using(**VARIANTS[variant]):
        patch.setattr(doubt, "waits", lambda device: True)
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


@every_kernel
def test_parameters_without_entries(variant: str) -> None:
    with cost.using(**VARIANTS[variant]):
        check(*make_dense(0, 3, (0, 4)))
        check(*make_outer(0, 3, 1, 2, 0, 4))
        check(*make_outer(0, 3, 2, 1, 4, 0))
        check(*make_rows(0, 3, 2, 4, 0))


# ---- numbers ----------------------------------------------------------------------------------------------------


def single(g: Factors) -> tuple[Factors, Tensor]:
    """``g`` in float32, and the matrix of exactly these numbers in float64."""
    g = factors.cast(g, torch.float32)
    return g, factors.dense(factors.cast(g, torch.float64))


def opposite_tokens(difference: float, tokens: int = 2) -> Outer:
    """Tokens in pairs that cancel up to a relative ``difference``."""
    left, right = randn(0, 4, 1, tokens // 2, 16), randn(1, 4, 1, tokens // 2, 16)
    left = torch.cat([left, -left + difference * randn(2, *left.shape)], 2)
    right = torch.cat([right, right + difference * randn(3, *right.shape)], 2)
    return Outer(left, right, torch.Size((16, 16)))


# At 1e-4, rows in float32 themselves have lost four of their seven digits.
cancelling = pytest.mark.parametrize(("difference", "rtol"), [(1e-2, 1e-4), (1e-3, 1e-4), (1e-4, 1e-3)])


@cancelling
@pytest.mark.parametrize("tokens", [2, 6])
@pytest.mark.parametrize("variant", ["default", "products", "stream"])
def test_tokens_that_nearly_cancel(difference: float, rtol: float, tokens: int, variant: str) -> None:
    g, rows = single(opposite_tokens(difference, tokens))
    with cost.using(**VARIANTS[variant]):
        norms, products = reductions.row_dot(g, g), reductions.gram(g, g)
    expected = flat(rows) @ flat(rows).mT
    scale = expected.diagonal().sqrt()
    assert_close(norms.double(), expected.diagonal(), rtol=rtol, atol=0)
    assert float(((products - expected) / scale / scale[:, None]).abs().max()) < rtol


@cancelling
@pytest.mark.parametrize("variant", ["default", "products", "stream"])
def test_pixels_that_nearly_cancel(difference: float, rtol: float, variant: str) -> None:
    sign = torch.ones(8, 8, dtype=torch.float64)
    sign[:, ::2] = -1
    input = 1 + difference * randn(0, 4, 64, 8, 8)
    grad = sign + difference * randn(1, 4, 64, 8, 8)
    g, rows = single(factors.Conv(input, grad, (1, 1), (0, 0), (1, 1), torch.Size((64, 64, 1, 1))))
    g3, rows3 = single(factors.Conv(input, grad[..., :6, :6], (1, 1), (0, 0), (1, 1), torch.Size((64, 64, 3, 3))))
    with cost.using(**VARIANTS[variant]):
        assert_close(reductions.row_dot(g, g).double(), flat(rows).square().sum(1), rtol=rtol, atol=0)
        assert_close(reductions.row_dot(g3, g3).double(), flat(rows3).square().sum(1), rtol=rtol, atol=0)
        products = reductions.gram(g3, g3)
    expected = flat(rows3) @ flat(rows3).mT
    scale = expected.diagonal().sqrt()
    assert float(((products - expected) / scale / scale[:, None]).abs().max()) < rtol


@cancelling
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("axes", [(1,), (0, 1)])
def test_rows_that_nearly_lie_along(difference: float, rtol: float, tokens: int, axes: tuple[int, ...]) -> None:
    """What a projection leaves is small beside what it takes out."""
    direction = randn(0, 16)
    left = 1 + difference * randn(1, 40, 1, tokens, 12)
    right = direction + difference * randn(2, 40, 1, tokens, 16)
    unit = torch.ones(12, 1).double() * direction
    unit /= unit.square().sum(axes, keepdim=True).sqrt()
    whole = Outer(left, right, torch.Size((12, 16)))
    g, rows = single(factors.Pulled(whole, factors.Across(unit, axes), whole.shape))
    expected = flat(rows) @ flat(rows).mT
    scale = expected.diagonal().sqrt()
    assert_close(reductions.row_dot(g, g).double(), expected.diagonal(), rtol=rtol, atol=0)
    with cost.using(wide=0 if tokens > 1 else cost.costs().wide):  # rows are not formed for being few
        products = reductions.gram(g, g)
    assert float(((products - expected) / scale / scale[:, None]).abs().max()) < rtol
    for found, wanted in (
        (reductions.square_sum(g), rows.square().sum(0)),
        (reductions.centred(g), centred(rows)),
        (reductions.moments(g)[1], centred(rows)),
    ):
        assert_close(found.double(), wanted, rtol=10 * rtol, atol=0)


@pytest.mark.parametrize("variant", ["default", "products", "stream", "stream_small"])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 0.0])
@pytest.mark.parametrize("form", ["dense", "outer", "outer_one_token", "rows", "conv"])
def test_moments_around_a_large_mean(form: str, spread: float, variant: str) -> None:
    """In float32, squares less the squared mean would be negative in half of all entries."""
    n = 20

    def like(seed: int, *shape: int) -> Tensor:
        return 1 + spread * randn(seed, *shape)

    g, rows = single({
        "dense": Dense(like(0, n, 3, 4)),
        "outer": factors.Outer(like(0, n, 2, 3, 3), like(1, n, 2, 3, 4), torch.Size((6, 4))),
        "outer_one_token": factors.Outer(like(0, n, 2, 1, 3), like(1, n, 2, 1, 4), torch.Size((6, 4))),
        "rows": factors.Rows(torch.arange(3).expand(n, 3), like(0, n, 3, 4), torch.Size((5, 4))),
        "conv": factors.Conv(like(0, n, 3, 5), like(1, n, 4, 3), (1,), (0,), (1,), torch.Size((4, 3, 3))),
    }[form])  # fmt: skip
    with cost.using(**VARIANTS[variant]):
        total, square = reductions.moments(g)
        torch.testing.assert_close(reductions.centred(g), square, rtol=0, atol=0)
    assert float(square.min()) >= 0
    assert_close(total.double(), rows.sum(0), rtol=1e-5, atol=0)
    expected = centred(rows)
    noise = float((n * rows.mean(0).square()).max()) * 1e-11  # what rounding the rows to float32 makes of no variance
    assert_close(square.double(), expected, rtol=2e-3 if spread < 1e-2 else 1e-4, atol=noise)


def test_the_variance_of_a_table_takes_the_memory_of_one() -> None:
    table = torch.Size((2000, 50))
    g = factors.Rows(torch.arange(12).view(4, 3), randn(0, 4, 3, 50).float(), table)
    most, _ = peak(lambda: reductions.centred(g))
    assert 1 <= most / (4 * table.numel()) < 1.2


def test_products_of_tokens_stream_the_entries_that_cancel() -> None:
    """Some entries with no variance, among many with much."""
    left, right = randn(0, 50, 2, 1, 6), randn(1, 50, 2, 1, 5)
    left[:, 1, 0, 2], right[:, 1, 0, 3] = 3 + 1e-3 * randn(2, 50), 2.0
    g, rows = single(factors.Outer(left, right, torch.Size((12, 5))))
    for square in (reductions.moments(g)[1], reductions.centred(g)):
        assert_close(square.double(), centred(rows), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "outer",
        "outer_one_token",
        "outer_many_tokens",
        "rows",
        "conv",
        "conv1d",
        "across_one_token",
        "across",
        "across_conv",
    ],
)
def test_half_precision_is_accumulated_in_float32(name: str, kind: torch.dtype) -> None:
    g = factors.cast(examples(n=40)[name][0], kind)
    rows = factors.dense(factors.cast(g, torch.float64))
    v, matrix, weight = randn(1, *g.shape), randn(2, *g.shape, 3), randn(3, len(g))
    found = [
        (reductions.weighted_sum(g, weight), torch.einsum("n,n...->...", weight, rows)),
        (reductions.square_sum(g), rows.square().sum(0)),
        (reductions.moments(g)[0], rows.sum(0)),
        (reductions.moments(g)[1], centred(rows)),
        (reductions.centred(g), centred(rows)),
        (reductions.row_dot(g, g), flat(rows).square().sum(1)),
        (reductions.gram(g, g), flat(rows) @ flat(rows).mT),
        (reductions.dot(g, v), flat(rows) @ v.flatten()),
        (reductions.project(g, matrix), flat(rows) @ matrix.reshape(-1, 3)),
    ]
    for actual, expected in found:
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_dtypes_are_promoted() -> None:
    (a, rows_a), (b, rows_b) = make_dense(0, 3, (4, 5)), make_outer(1, 3, 1, 2, 4, 5)
    a32 = factors.cast(a, torch.float32)
    assert reductions.gram(a32, b).dtype == torch.float64
    assert_close(reductions.gram(a32, b), flat(rows_a.float().double()) @ flat(rows_b).mT)
    assert reductions.row_dot(factors.cast(a, torch.float16), factors.cast(b, torch.bfloat16)).dtype == torch.float32
    mixed = Outer(b.left.float(), b.right, b.shape)
    assert_close(reductions.row_dot(mixed, mixed), flat(factors.dense(mixed)).square().sum(1))


def test_complex_entries_are_two_real_ones() -> None:
    value = torch.complex(randn(0, 5, 2, 3), randn(1, 5, 2, 3))
    other, v = torch.complex(randn(2, 4, 2, 3), randn(3, 4, 2, 3)), torch.complex(randn(4, 2, 3), randn(5, 2, 3))
    g, matrix, weight = Dense(value), torch.stack([v, v.conj(), 1j * v], -1), randn(6, 5)
    real = flat(torch.view_as_real(value))
    total, square = reductions.moments(g)
    close(total, value.sum(0))
    close(square, (value - value.mean(0)).abs().square().sum(0))
    close(reductions.centred(g), square)
    close(reductions.square_sum(g), value.abs().square().sum(0))
    close(reductions.weighted_sum(g, weight), torch.einsum("n,nab->ab", weight.to(value.dtype), value))
    close(reductions.row_dot(g, g), real.square().sum(1))
    close(reductions.gram(g, g), real @ real.mT)
    close(reductions.gram(g, Dense(other)), real @ flat(torch.view_as_real(other)).mT)
    close(reductions.dot(g, v), real @ torch.view_as_real(v).flatten())
    columns = [torch.view_as_real(column).flatten() for column in matrix.unbind(-1)]
    close(reductions.project(g, matrix), real @ torch.stack(columns, -1))
    close(reductions.row_dot(Dense(value[:4].conj()), Dense(other)), (value[:4] * other).real.flatten(1).sum(1))


@every_kernel
def test_int32_indices(variant: str) -> None:
    g, rows = make_rows(0, 3, 6, 5, 3)
    with cost.using(**VARIANTS[variant]):
        check(replace(g, index=g.index.int()), rows)


def test_int32_indices_of_a_large_table_do_not_overflow() -> None:
    index = torch.tensor([[0], [2**30], [2**30 + 1]], dtype=torch.int32)  # times N, beyond 2^31
    found = lookup.entries(factors.Rows(index, randn(0, 3, 1, 2), torch.Size((2**30 + 2, 2))))
    assert (found.sample.tolist(), found.entry.tolist()) == ([0, 1, 2], index.flatten().tolist())


# ---- surroundings -----------------------------------------------------------------------------------------------


def everything(g: Factors) -> list[Tensor]:
    v, weight = torch.ones(g.shape, dtype=torch.float64), torch.ones(len(g), dtype=torch.float64)
    return [
        reductions.weighted_sum(g, weight), reductions.square_sum(g), *reductions.moments(g), reductions.centred(g),
        reductions.row_dot(g, g), reductions.gram(g, g), reductions.dot(g, v),
        reductions.project(g, v.unsqueeze(-1)), factors.dense(g),
    ]  # fmt: skip


@same
def test_results_are_plain_numbers_in_any_mode(name: str) -> None:
    g, expected = EXAMPLES[name][0], everything(EXAMPLES[name][0])
    tracked = replace(g, **{k: v.clone().requires_grad_() for k, v in vars(g).items()
                            if isinstance(v, Tensor) and v.is_floating_point()})  # fmt: skip
    with torch.inference_mode():
        inferred = everything(g)
    for found in (everything(tracked)[:-1], inferred):
        for actual, target in zip(found, expected, strict=False):
            assert not actual.requires_grad
            close(actual, target)


@same
def test_autocast_does_not_reach_kernels(name: str) -> None:
    g = factors.cast(EXAMPLES[name][0], torch.float32)
    expected = everything(g)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(g)
        assert torch.is_autocast_enabled("cpu")
    for actual, target in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, target, rtol=1e-5, atol=1e-5)


def test_scratch_made_in_inference_mode_serves_later_calls() -> None:
    g = EXAMPLES["outer"][0]

    def work() -> list[Tensor]:  # a thread has no scratch yet
        with torch.inference_mode():
            everything(g)
        return everything(g)

    with ThreadPoolExecutor(1) as thread, cost.using(**VARIANTS["stream"]):
        for actual, target in zip(thread.submit(work).result(), everything(g), strict=True):
            close(actual, target)


def test_scratch_in_use_is_not_handed_out_again() -> None:
    like = torch.zeros(0)
    with scratch.borrow(like, 10) as a, scratch.borrow(like, 2, 5) as b:
        a.fill_(1)
        b.fill_(2)
        assert float(a.sum()) == 10
    with scratch.borrow(like, 10) as c:
        assert c.data_ptr() in (a.data_ptr(), b.data_ptr())


@same
def test_later_calls_do_not_touch_earlier_results(name: str) -> None:
    with cost.using(**VARIANTS["stream_small"]):
        first = everything(EXAMPLES[name][0])
        copies = [t.clone() for t in first]
        everything(SECOND[name][0])
    for actual, copy in zip(first, copies, strict=True):
        assert torch.equal(actual, copy)


def test_two_threads_at_once() -> None:
    g, (h, _) = make_outer(0, 8, 1, 6, 24, 20)[0], make_outer(1, 8, 1, 6, 24, 20)

    def work(form: Factors) -> list[list[Tensor]]:
        with cost.using(**VARIANTS["stream"], block=1000, wide=2000):
            return [everything(form) for _ in range(3)]

    expected = {id(form): everything(form) for form in (g, h)}
    with ThreadPoolExecutor(2) as threads:
        for form, results in zip((g, h) * 2, threads.map(work, (g, h) * 2), strict=True):
            for found in results:
                for actual, target in zip(found, expected[id(form)], strict=True):
                    close(actual, target)


@pytest.fixture
def narrow() -> Iterator[None]:
    """The figures of a CPU without AVX-512, on any."""
    with cost.using(**asdict(cost.measured("AVX2"))):
        yield


def test_costs_are_restored() -> None:
    before = cost.costs()
    with cost.using(block=7, outer_norm="stream"):
        assert (cost.costs().block, cost.outer_norm(1000, 1, 500, 500)) == (7, "stream")
    assert cost.costs() is before


FILLED = {
    True: [(8, 24), (8, 8), (24, 8), (64, 32)],
    False: [(3, 20), (4, 8), (20, 1), (64, 32)],
}


def filled_or_not(filled: bool) -> dict[str, Any]:
    """Whether torch's grouped convolutions get whole vectors of channels, whatever it costs."""
    ways: dict[str, Any] = {"odd": (0, 0, 0, 0, 0, 1e15)} if filled else {"filled": 1e9}
    return ways | {"correlated": (1e9,) * 6, "single": (1e9, 1e9)}


@pytest.mark.parametrize("t", [2, 3, 4])
@pytest.mark.parametrize("lost", ["none", "some", "all"])
def test_moments_of_few_tokens(t: int, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pairs of tokens; entries whose terms cancel are computed from the rows, one by one or all of them."""
    n, o, i = 9, 12, 13
    left, right = randn(0, n, 1, t, o).float(), randn(1, n, 1, t, i).float()
    if lost != "none":
        at = slice(None) if lost == "all" else slice(3, 4)
        tail = torch.arange(i) >= (0 if lost == "all" else i - 1)
        left[:, :, 1, at], right[:, :, 1, tail] = -left[:, :, 0, at], right[:, :, 0, tail] * (1 + 1e-4)
        left[:, :, 2:, at] = 0
    streams: list[int] = []
    original = moments_file._accumulated
    monkeypatch.setattr(moments_file, "_accumulated", lambda *a: streams.append(1) or original(*a))
    g = Outer(left, right, torch.Size((o, i)))
    rows = (left.double().mT @ right.double())[:, 0]
    with cost.using(few=0):
        square, (total, around), alone = reductions.square_sum(g), reductions.moments(g), reductions.centred(g)
    # what is known of rows in single precision
    off = 1e-7 * torch.einsum("nkto,nkti->oi", left.abs(), right.abs()).double()
    for found, expected in [(square, rows.square().sum(0)), (around, centred(rows)), (alone, centred(rows))]:
        bound = (expected.sqrt() + off).square() - expected + 1e-5 * expected
        assert ((found - expected).abs() <= bound).all() and (found >= 0).all()
    assert_close(total.double(), rows.sum(0), rtol=1e-4, atol=1e-4)
    assert len(streams) == (3 if lost == "all" else 0)


@pytest.mark.parametrize("side", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_convolutions_at_few_positions(side: tuple[int, int], groups: int) -> None:
    for kernel, stride in [((3, 3), (1, 1)), ((1, 1), (1, 1)), ((2, 3), (2, 1))]:
        size = tuple((m - 1) * s + k for m, s, k in zip(side, stride, kernel, strict=True))
        g, rows = make_conv(0, 9, groups, 4, 3, size, kernel, stride, (0, 0), (1, 1))
        with cost.using(conv_rows="tokens"):
            total, square = reductions.moments(g)
            close(reductions.square_sum(g), rows.square().sum(0))
            close(reductions.centred(g), centred(rows))
        close(total, rows.sum(0))
        close(square, centred(rows))


@pytest.mark.usefixtures("narrow")
def test_the_cost_model_decides_by_shape() -> None:
    assert cost.outer_norm(16, 128, 256, 1024) == "tokens"
    assert cost.outer_norm(8, 512, 256, 256) == "stream"
    assert [cost.outer_moments(n, 1) for n in (1, 6, 7, 128)] == ["stream", "stream", "products", "products"]
    assert [cost.outer_moments(128, t) for t in (0, 1, 2, 4, 5)] == ["stream", "products", "pairs", "pairs", "stream"]
    assert [cost.halvings(t) for t in (0, 1, 31, 63, 64, 127, 128, 197, 1024)] == [0, 0, 0, 0, 1, 1, 2, 2, 5]
    assert cost.outer_gram(128, 128, 1, 1, 512, 512) == "tokens"
    assert cost.outer_gram(64, 64, 64, 64, 512, 128) == "stream"
    assert [cost.outer_gram(n, n, 16, 16, d, d) for n, d in ((8, 128), (32, 256))] == ["stream", "tokens"]
    like = torch.empty(32, 1, 1, 1)

    def conv(channels: int, outputs: int, side: int, kernel: int = 3, dims: int = 2) -> cost.Convolution:
        reach, tokens = side + kernel - 1, side * (side + kernel - 1) ** (dims - 1)
        return cost.Convolution(32, channels, outputs, reach**dims, side**dims, tokens, kernel**dims)

    assert cost.conv_norm(like, conv(128, 128, 8)) == "pixels"
    assert cost.conv_norm(like, conv(32, 32, 32)) == "stream"
    assert cost.conv_gram(32, 32, conv(256, 256, 4)) == "pixels"
    assert cost.conv_gram(32, 32, conv(128, 128, 8)) == "stream"
    assert cost.conv_rows(like, conv(3, 64, 32)) == "tokens"
    assert cost.conv_rows(like, conv(32, 32, 28)) == "native"
    assert cost.conv_rows(like, conv(64, 64, 28)) == "offsets"
    assert cost.conv_rows(like, conv(64, 64, 28), streamed=True) == "native"
    assert cost.conv_rows(like, conv(256, 256, 4)) == "tokens"
    assert cost.conv_rows(like.double(), conv(256, 64, 16)) == "offsets"
    assert cost.conv_rows(like.double(), conv(256, 64, 8)) == "offsets"
    assert cost.conv_rows(like.double(), conv(256, 64, 8), transposed=True) == "tokens"
    assert cost.conv_rows(like, conv(128, 128, 8, kernel=1)) == "tokens"
    assert cost.conv_rows(like, conv(3, 64, 1024, dims=1)) == "tokens"
    assert "native" not in (cost.conv_rows(x, conv(64, 64, 32)) for x in (like.double(), like[..., None, None, None]))
    steps = [cost.conv_slice(like, conv(*sizes), 32, 1) for sizes in ((96, 96, 32), (96, 192, 16), (192, 192, 8))]
    assert steps == [96, 96, 0]
    assert cost.conv_slice(like, conv(256, 16, 32, 7), 128, 1) == 0  # few outputs would be left in a slice
    with cost.using(conv_rows="offsets"):
        assert cost.conv_slice(like, conv(96, 96, 32), 32, 1) == 0
    with cost.using(conv_rows="tokens", wide=1):
        assert cost.conv_slice(like, conv(2, 6, 8), 32, 4) == 6  # a whole group
        assert cost.conv_slice(like, conv(2, 6, 8), 32, 1) == 1
    with cost.using(conv_rows="tokens", wide=20 * 32 * 2 * 9):
        assert cost.conv_slice(like, conv(2, 72, 8), 32, 1) == 32  # whole vectors
    odd = [conv(*sizes, 28) for sizes in ((3, 20), (4, 8), (20, 1), (64, 32))]
    assert cost.vectors(like, conv(12, 32, 32)) == (16, 32)
    assert cost.vectors(like, conv(3, 64, 8, 7)) == (3, 64)
    assert cost.vectors(like, conv(12, 32, 32)._replace(unfolds=True)) == (12, 32)
    for filled, sizes in FILLED.items():
        with cost.using(**filled_or_not(filled)):
            assert [cost.vectors(like, c) for c in odd] == sizes
            assert [cost.vectors(like.to("meta"), c) for c in odd] == FILLED[False]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 0, 1), (1, 2, 2), (3, 4, 2)])
@pytest.mark.parametrize(("groups", "channels", "outputs"), [(4, 1, 1), (1, 2, 3), (3, 2, 1), (2, 1, 8)])
def test_convolutions_are_convolutions_of_images_with_gradients(
    dims: int, stride: int, padding: int, dilation: int, groups: int, channels: int, outputs: int
) -> None:
    """Rows, and their sum, as another convolution or as a weight gradient; also of more groups than it takes."""
    torch.manual_seed(0)
    input = torch.randn(5, groups * channels, *(7, 9, 6)[:dims], dtype=torch.float64)
    weight = torch.randn(groups * outputs, channels, *(3, 2, 1)[:dims], dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    grad = torch.randn_like(convolve(input, weight, None, stride, padding, dilation, groups))
    g = Conv(input, grad, *((value,) * dims for value in (stride, padding, dilation)), weight.shape)
    with cost.using(conv_rows="tokens"):
        expected = dense(g)
    sizes = convolution.sizes(input.shape, grad.shape, g.geometry)
    single = replace(g, input=input.float(), grad=grad.float())
    for each, chosen in ((0.0, True), (1e9, False)):
        ways: dict[str, Any] = {"correlated": (each,) * 6, "single": (each, each)}
        with cost.using(conv_rows="native", added=(0.0, -1.0 if chosen else math.inf), **ways):
            assert cost.correlates(grad, sizes) is chosen
            assert_close(dense(g), expected, rtol=1e-12, atol=1e-12)
            assert_close(reductions.row_dot(g, g), expected.flatten(1).square().sum(1), rtol=1e-12, atol=1e-12)
            ordinary = dims == 2 and (channels, outputs, dilation) == (1, 1, 1) and sizes.offsets == 9
            assert cost.summed(single.grad, sizes, groups) is (chosen and not ordinary)
            for form in (single, factors.fold(single, 1)):
                assert_close(reductions.weighted_sum(form).double(), expected.sum(0), rtol=1e-4, atol=1e-4)
    assert not cost.correlates(grad.to("meta"), sizes) and not cost.summed(grad, sizes, groups)


@pytest.mark.usefixtures("narrow")
def test_sums_of_rows_against_weight_gradients() -> None:
    """Where an ordinary pass unfolds, or fills up a single channel, rows are cheaper: by shape."""
    like = torch.empty(1, 1, 1, 1)

    def conv(channels: int, outputs: int, side: int, kernel: int, unfolds: bool = False, n: int = 16) -> Any:
        reach = side + kernel - 1
        return cost.Convolution(n, channels, outputs, reach**2, side**2, side * reach, kernel**2, unfolds)

    depthwise = [cost.summed(like, conv(1, 1, 28, k, n=16 * 64), 64) for k in (1, 3, 5, 7)]
    assert depthwise == [False, False, True, True]
    assert cost.summed(like, conv(1, 64, 56, 7), 1) and not cost.summed(like, conv(3, 16, 16, 3), 1)
    assert cost.summed(like, conv(48, 8, 48, 3, unfolds=True), 1) and not cost.summed(like, conv(48, 48, 28, 3), 1)
    assert not cost.summed(like, conv(1, 1, 1, 7, n=16 * 64), 64)
    assert not cost.summed(like.to("meta"), conv(1, 64, 56, 7), 1)


def test_wide_vectors_have_figures_of_their_own() -> None:
    """Where a CPU has AVX-512, weight gradients are fast, also dilated ones, and so are rows by them."""
    like = torch.empty(1, 1, 1, 1)

    def conv(channels: int, outputs: int, side: int, unfolds: bool = False) -> cost.Convolution:
        reach = side + 2
        return cost.Convolution(32, channels, outputs, reach**2, side**2, side * reach, 9, unfolds)

    found = {}
    for capability in ("AVX2", "AVX512", "AVX512_BF16", "DEFAULT"):
        with cost.using(**asdict(cost.measured(capability))):
            layers = [conv(128, 128, 16), conv(64, 64, 32), conv(32, 64, 48)]
            found[capability] = [
                *(cost.correlates(like, layer) for layer in layers),
                cost.summed(like, conv(48, 8, 48, unfolds=True), 1),
            ]
    assert found["AVX512"] == found["AVX512_BF16"] == [False, False, False, False]
    assert found["AVX2"] == found["DEFAULT"] == [True, True, True, True]
    assert asdict(cost.costs()) == asdict(cost.measured(torch.backends.cpu.get_cpu_capability()))


@pytest.mark.parametrize(
    ("dims", "groups", "kernel", "added"), [(3, 1, 3, math.inf), (3, 1, 3, -1.0), (2, 16, 5, -1.0)]
)
def test_both_sides_of_a_convolution_are_copied_some_samples_at_a_time(
    dims: int, groups: int, kernel: int, added: float
) -> None:
    """For rows, for their sum, and for a weight gradient of three dims, which is padded first."""
    size = (8,) * 3 if dims == 3 else (24, 24)
    input, grad = torch.randn(64, 16, *size), torch.randn(64, 16, *size)
    one = (1,) * dims
    g = Conv(input, grad, one, (kernel // 2,) * dims, one, torch.Size((16, 16 // groups, *(kernel,) * dims)))
    for of in (lambda: reductions.row_dot(g, g), lambda: reductions.weighted_sum(g)):
        with cost.using(wide=1 << 16, block=1 << 14, conv_rows="native", conv_norm="stream", added=(0.0, added)):
            found, expected = peak(of)[0], of()
        assert found < input.nbytes / 2
        with cost.using(conv_rows="tokens", conv_norm="stream"):
            assert_close(of(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(("groups", "outputs", "channels"), [(1, 72, 4), (1, 3, 9), (2, 3, 5), (3, 8, 4), (3, 2, 1)])
def test_rows_in_slices_of_outputs(groups: int, outputs: int, channels: int, filled: bool) -> None:
    """Also of so many outputs that slices are whole vectors, of one form with another, and filled up with zeros."""
    sizes = (groups, outputs, channels, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    (a, rows_a), (b, rows_b) = (make_conv(seed, 3, *sizes) for seed in (0, 1))
    for wide in (72, 500, 2000, 10**6):
        ways = filled_or_not(filled)
        with cost.using(wide=wide, conv_rows="native", conv_norm="stream", conv_gram="stream", **ways):
            check(a, rows_a)
            close(factors.dense(a), rows_a)
            check_pair(a, rows_a, b, rows_b)
            check_pair(a, rows_a, Dense(rows_b), rows_b)
            check_pair(Dense(rows_a), rows_a, b, rows_b)


@pytest.mark.parametrize("least", [1, 2, 3, 32])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 13, 64, 101])
def test_norms_from_products_by_halves(tokens: int, least: int) -> None:
    left, right = randn(tokens, 3, 2, tokens, 4), randn(tokens + 1, 3, 2, tokens, 5)
    left, right = left.mT.contiguous().mT, right[:, :, torch.arange(tokens)]  # both ways to lie
    g = Outer(left, right, torch.Size((2, 4, 5)))
    with cost.using(outer_norm="tokens", tokens=least):
        close(reductions.row_dot(g, g), flat(factors.dense(g)).square().sum(1))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_centred_squares_beside_an_entry_that_is_no_number(bad: float) -> None:
    """One entry's square is no number; those of the others, which cancel, are formed again all the same."""
    right = 10 + 1e-7 * randn(1, 12, 1, 1, 5)
    left = randn(2, 1, 1, 1, 4).sign().repeat(12, 1, 1, 1)
    left[3, ..., -1] = bad
    g = Outer(left, right, torch.Size((4, 5)))
    with cost.using(outer_moments="products"):
        found = reductions.centred(g)
    assert_close(found[:-1], centred(dense(g))[:-1], rtol=1e-6, atol=0)
    assert found[-1].isnan().all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_products_of_looked_up_rows_beside_one_that_is_no_number(bad: float) -> None:
    """Samples that share no entry with it keep their inner products with each other."""
    index = torch.tensor([[4, 1], [1, 2], [2, 3], [0, 0], [1, 3], [2, 3], [1, 2]])
    value = randn(1, 7, 2, 8)
    value[3] = bad
    g = factors.Rows(index, value, torch.Size((50, 8)))
    rows, others = flat(dense(g)), torch.arange(7) != 3
    found = reductions.gram(g, g)
    assert_close(found[others][:, others], rows[others] @ rows[others].mT)
    assert not found[3, 3].isfinite()


def test_norms_of_long_rows_keep_their_digits() -> None:
    value = torch.full((1, 1), 0.1).expand(2, (1 << 22) + 5)
    expected = value[:, :1].double().square() * value.shape[1]
    g = Dense(value.contiguous())
    assert_close(reductions.row_dot(g, g).double(), expected.squeeze(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 12])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_norms_of_rows_in_parts(n: int, length: int) -> None:
    """Rows without entries, of less than two parts, of whole parts and some more; as they lie, and apart."""
    wide = randn(1, n, 2 * length)
    for value in (wide[:, :length], wide[:, ::2], wide[:, :1].expand(-1, length), wide[:, :length].mT.contiguous().mT):
        g = Dense(value)
        with cost.using(long=4):
            close(reductions.row_dot(g, g), value.square().sum(1))
