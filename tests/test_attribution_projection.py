"""Projections applied to factors against their definition as a matrix, and what they promise on average."""

from __future__ import annotations

import hashlib
import json

import forms
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.attribution import Projection, grad_dot
from persample.attribution import projection as source
from persample.errors import ArgumentError
from persample.factors import Dense, Outer, cast

EXAMPLES = forms.examples()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_form_of_the_same_rows(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, rows, and rows times the matrix agree, in one block or in many."""
    g, rows = EXAMPLES[name]
    R = Projection(12, seed=3, tile=tile)
    expected = rows.reshape(len(rows), -1) @ R.matrix("w", g.shape).reshape(-1, 12)
    close(R.part("w", g), expected)
    close(R.part("w", Dense(rows)), expected)
    monkeypatch.setattr(source, "BLOCK", 1)
    close(R.part("w", g), expected)
    assert R.part("w", Dense(rows[:0])).shape == (0, 12)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.sampled_from([(4, 1), (18, 3)]))
def test_outer_products_of_any_size(k: int, o: int, i: int, t: int, sizes: tuple[int, int]) -> None:
    g, rows = forms.make_outer(0, 2, k, t, o, i)
    R = Projection(sizes[0], tile=sizes[1])
    close(R.part("w", g), rows.flatten(1) @ R.matrix("w", g.shape).reshape(-1, sizes[0]))


def test_outer_products_that_are_reshaped() -> None:
    """A parameter of shape [heads, d, I] used as a matrix [heads d, I]: its first axis is not the left side."""
    outer, rows = forms.make_outer(0, 2, 1, 1, 12, 7)
    g = Outer(outer.left, outer.right, torch.Size((3, 4, 7)))
    R = Projection(5)
    close(R.part("w", g), rows.flatten(1) @ R.matrix("w", g.shape).reshape(-1, 5))


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_complex_rows_are_projected_as_real_ones(shape: tuple[int, ...]) -> None:
    """To numbers whose inner products are those of the rows on average, also beside rows of real parameters."""
    torch.manual_seed(0)
    rows, R = torch.randn(5, *shape, dtype=torch.complex128), Projection(8, tile=2)
    real = torch.view_as_real(rows).flatten(1)
    close(R.part("w", Dense(rows)), real @ R.matrix("w", torch.Size((*shape, 2))).reshape(-1, 8))
    G = persample.Gradients({"w": Dense(rows), "v": Dense(real)}, None)
    mean = sum(grad_dot(*[G.project(Projection(64, seed))] * 2) for seed in range(200)) / 200
    assert (mean - G.gram()).abs().max() < 0.1 * G.squared_norm().max()


def test_large_factors_are_never_written_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    g, rows = forms.make_outer(0, 3, 1, 1, 30, 20)
    conv, _ = forms.make_conv(0, 2, 1, 16, 16, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1))
    monkeypatch.setattr(source, "dense", lambda g: pytest.fail("rows were written"))
    R = Projection(8)
    close(R.part("w", g), rows.flatten(1) @ R.matrix("w", g.shape).reshape(-1, 8))
    assert R.part("w", conv).shape == (2, 8)


def test_definition() -> None:
    """The documented bits: Philox keyed by SHA-256 of seed, name and side, 64 signs per word, lowest bit first."""
    R = Projection(6, seed=11)

    def side(which: str, size: int) -> Tensor:
        key = int.from_bytes(hashlib.sha256(f"11\nlayer.weight\n{which}".encode()).digest()[:16], "little")
        words = [int(w) for w in np.random.Philox(key=key).random_raw(6)]
        signs = [1.0 - 2 * (words[b // 64] >> b % 64 & 1) for b in range(6 * size)]
        return torch.tensor(signs, dtype=torch.float64).view(6, size)

    rows = forms.randn(0, 2, 4, 3, 5)
    expected = torch.einsum("nab,ja,jb->nj", rows.flatten(2), side("left", 4), side("right", 15)) / 6**0.5
    close(R.part("layer.weight", Dense(rows)), expected)
    assert R.part("layer.weight", Dense(rows)).tolist()[0] == pytest.approx(expected[0].tolist())


@pytest.mark.parametrize("shape", [(), (50,), (6, 9), (3, 4, 5)])
def test_matrix_has_entries_of_variance_one_over_dim(shape: tuple[int, ...]) -> None:
    matrix = Projection(64, tile=2).matrix("w", torch.Size(shape))
    assert matrix.shape == (*shape, 64)
    close(matrix.square(), torch.full_like(matrix, 1 / 64))


@pytest.mark.parametrize("tile", [1, 2, 4])
def test_inner_products_are_unbiased_for_every_shape(tile: int) -> None:
    """Averaged over seeds, within five standard errors; the spread shrinks like 1/dim and grows with the tile."""
    for shape in [(7,), (30, 2), (4, 5, 3)]:
        a, b = forms.randn(1, 1, *shape), forms.randn(2, 1, *shape)
        b = a + b
        true = float((a * b).sum())
        found = torch.tensor([
            float((R.part("w", Dense(a)) * R.part("w", Dense(b))).sum())
            for R in (Projection(16, seed=s, tile=tile) for s in range(300))
        ]).double()  # fmt: skip
        assert abs(found.mean() - true) < 5 * found.std() / 300**0.5
    assert found.std() > 0


def test_parameters_and_seeds_are_independent() -> None:
    x = forms.randn(0, 1, 400)
    R = Projection(64)
    assert not torch.equal(R.part("a", Dense(x)), R.part("b", Dense(x)))
    assert not torch.equal(R.part("a", Dense(x)), Projection(64, seed=1).part("a", Dense(x)))
    close(R.part("a", Dense(x)), Projection(64).part("a", Dense(x)), 0)
    assert R == Projection(64) != Projection(64, tile=8)
    assert Projection(**R.spec()) == R


def test_relative_variance_is_what_the_docstring_says() -> None:
    """Squared norms of rank-one rows: 8/dim with tile 1, ((1 + 2/f)^2 - 1) f^2/dim with tile f."""
    u, v = forms.randn(1, 50), forms.randn(2, 50)
    row = Outer(u.view(1, 1, 1, -1), v.view(1, 1, 1, -1), torch.Size((50, 50)))
    true = float(u.square().sum() * v.square().sum())
    for tile in (1, 4):
        projections = (Projection(64, seed=seed, tile=tile) for seed in range(1500))
        squares = [float(R.part("w", row).square().sum()) / true for R in projections]
        expected = ((1 + 2 / tile) ** 2 - 1) * tile**2 / 64
        assert torch.tensor(squares).var() == pytest.approx(expected, rel=0.2)


def test_gradients_and_statistics_runs() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 2, 3, 3).double(), torch.randint(0, 4, (5,))
    R = Projection(32, seed=1)
    loop = persample.gradients(net, nn.CrossEntropyLoss(), x, y, engine="loop")
    matrix = torch.cat([R.matrix(name, shape).reshape(-1, 32) for name, shape in loop.shapes.items()])
    expected = loop.flat() @ matrix
    close(persample.gradients(net, nn.CrossEntropyLoss(), x, y).project(R), expected)
    asked = [("project", {"projection": R})]
    close(persample.gradients(net, nn.CrossEntropyLoss(), x, y, quantities=asked).project(), expected)


def test_half_precision_is_projected_in_float32() -> None:
    g, _ = forms.make_outer(0, 2, 1, 2, 20, 20)
    half = cast(g, torch.bfloat16)
    close(Projection(8).part("w", half), Projection(8).part("w", cast(half, torch.float32)), 1e-6)


def test_numbers_are_integers() -> None:
    for wrong in ({"dim": 8.0}, {"dim": "8"}, {"dim": 8, "seed": 1.0}, {"dim": 8, "tile": None}):
        with pytest.raises(ArgumentError, match="must be an integer"):
            Projection(**wrong)  # type: ignore[arg-type]
    assert json.dumps(Projection(np.int64(8), np.int32(3)).spec()) == '{"dim": 8, "seed": 3, "tile": 1}'


def test_sizes_are_checked() -> None:
    for dim, tile in ((0, 1), (8, 0), (8, 3)):
        with pytest.raises(ValueError, match=r"multiple of tile\^2"):
            Projection(dim, tile=tile)
