"""Memory that is reused: never while somebody holds what lies in it."""

from __future__ import annotations

import gc
import mmap
import re
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import persample
from persample import factors, scratch
from persample.factors import Outer

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory of results is reused on Linux only")
SHAPE = (scratch.LARGE // 1000, 1000)
LIKE = torch.zeros(1)


def a_result(*shape, **options):
    return scratch.fresh(LIKE, *(shape or SHAPE), **options)


@pytest.fixture(autouse=True)
def nothing_idle():
    scratch._pool.idle.clear()
    yield
    scratch._pool.idle.clear()


def test_what_was_dropped_is_handed_out_again():
    first = a_result()
    where = first.data_ptr()
    del first
    assert a_result().data_ptr() == where


@pytest.mark.parametrize(
    "part",
    [
        lambda t: t[3],
        lambda t: t.numpy(),
        lambda t: t.detach().requires_grad_().T,
        lambda t: t.untyped_storage(),
        lambda t: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t)),
        lambda t: (t.requires_grad_() ** 2).grad_fn,
        lambda t: memoryview(t.numpy()),
    ],
    ids=["view", "numpy", "transposed", "storage", "dlpack", "graph", "buffer"],
)
def test_what_anybody_holds_is_not(part):
    first = a_result()
    where = first.data_ptr()
    held = part(first)
    del first
    gc.collect()
    assert a_result().data_ptr() != where
    del held
    gc.collect()
    assert where in [block.bytes.data_ptr() for block in scratch._pool.idle]


def test_other_sizes_replace_what_is_idle():
    several = [a_result(n, *SHAPE) for n in (1, 2, 4)]
    del several
    assert sum(block.size for block in scratch._pool.idle) == 7 * 4 * SHAPE[0] * SHAPE[1]
    kept = a_result(3, *SHAPE)
    assert sum(block.size for block in scratch._pool.idle) + kept.nbytes <= 7 * 4 * SHAPE[0] * SHAPE[1]


def test_no_more_is_kept_than_is_told(monkeypatch):
    monkeypatch.setattr(scratch, "SPARE", 3 * scratch.LARGE)
    several = [a_result(scratch.LARGE // 4) for _ in range(5)]
    del several
    assert 0 < sum(block.size for block in scratch._pool.idle) <= 3 * scratch.LARGE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.bool])
def test_types_share_memory(dtype):
    first = a_result(scratch.LARGE)
    where = first.data_ptr()
    del first
    again = a_result(4 * scratch.LARGE // dtype.itemsize, dtype=dtype)
    assert (again.dtype, again.data_ptr()) == (dtype, where)
    assert not again._is_view() and again.untyped_storage().nbytes() == again.nbytes


def test_under_modes_it_is_what_a_new_tensor_is():
    with torch.device("meta"):
        assert a_result().device.type == "cpu"
    with torch.inference_mode():
        assert a_result().is_inference()
    assert not a_result().is_inference()
    with torch.autocast("cpu"):
        assert a_result().dtype == torch.float32


def test_inside_a_transform():
    def inner(x):
        return scratch.fresh(x, *SHAPE).zero_() + x

    assert torch.equal(torch.func.vmap(inner)(torch.ones(2, 1)), torch.ones(2, *SHAPE))


G, X = torch.ones(SHAPE[0], 1), torch.ones(SHAPE[0], 1000)


def some_rows(g=G, x=X):
    """What the rows of a layer are made with, of `SHAPE`."""
    return factors.dense(Outer(g[:, None, None], x[:, None, None], torch.Size([1, 1000])))


def test_where_results_are_traced():
    def twice(factor):
        return some_rows() * factor

    expected = twice(torch.tensor(2.0))
    assert torch.equal(torch.compile(twice, backend="eager")(torch.tensor(2.0)), expected)
    assert torch.equal(make_fx(twice)(torch.tensor(3.0))(torch.tensor(2.0)), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert some_rows(torch.ones(SHAPE[0], 1), torch.ones(SHAPE[0], 1000)).shape == expected.shape


def test_a_mode_does_not_see_results_go():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list = []
    held = [a_result(), a_result()]
    with Seen():
        held.clear()
    assert not calls and len(scratch._pool.idle) == 2


def test_saved_and_shared(tmp_path):
    first = a_result().fill_(3)
    torch.save(first, tmp_path / "rows")
    assert torch.equal(torch.load(tmp_path / "rows"), first)
    first.share_memory_()
    assert first.is_shared() and (first == 3).all()


def test_dropped_by_another_thread():
    first = [a_result()]
    where = first[0].data_ptr()
    thread = threading.Thread(target=first.clear)
    thread.start()
    thread.join()
    assert a_result().data_ptr() == where


def test_rows_of_two_batches_do_not_meet():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(600, 64), torch.nn.Flatten(), torch.nn.Linear(256, 256))
    tokens, targets = torch.randint(600, (2, 32, 4)), torch.randint(256, (2, 32))
    criterion = torch.nn.functional.cross_entropy

    def rows(i):
        return persample.gradients(model, criterion, tokens[i], targets[i]).dense()

    wanted = [{name: g.clone() for name, g in rows(i).items()} for i in range(2)]
    before = rows(0)
    for _ in range(3):
        now = rows(1)
        for name in before:
            assert torch.equal(before[name], wanted[0][name]) and torch.equal(now[name], wanted[1][name])
    where = {g.data_ptr() for g in now.values()}
    del now
    assert where & {g.data_ptr() for g in rows(1).values()}


@pytest.mark.parametrize("system", ["asks for large pages", "has none"])
def test_individual_gradients_lie_in_large_pages(monkeypatch, system):
    asked = []

    def advise(begin, size, how):
        asked.append((begin, size, how))

    monkeypatch.setattr(scratch, "LARGE", 1 << 16)
    monkeypatch.setattr(scratch, "_ADVISE", None if system == "has none" else advise)
    g = Outer(torch.rand(8, 1, 2, 65).double(), torch.rand(8, 1, 2, 64).double(), torch.Size([65, 64]))
    found = factors.dense(g)
    assert torch.allclose(found, torch.einsum("nkto,nkti->noi", g.left, g.right), rtol=1e-12)
    factors.dense(g, out=found)
    factors.dense(Outer(g.left[:1], g.right[:1], g.shape))
    if system == "has none":
        assert asked == []
        return
    ((begin, size, how),) = asked  # once, for the pages of what was returned: not for `out`, nor for what is small
    assert how == mmap.MADV_HUGEPAGE
    assert begin % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert 0 <= begin - found.data_ptr() < mmap.PAGESIZE  # and no page that something else lies in, too
    assert 0 <= found.data_ptr() + found.nbytes - (begin + size) < mmap.PAGESIZE
    del found
    assert asked[1:] == [(begin, size, mmap.MADV_FREE)]


def test_the_system_hears_the_wish_for_large_pages():
    rows = a_result(2 * scratch.LARGE)
    span, flags = (0, 0), None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            span = (int(found[1], 16), int(found[2], 16))
        elif line.startswith("VmFlags:") and span[0] <= rows.data_ptr() + rows.nbytes // 2 < span[1]:
            flags = line.split()[1:]
    if flags is None:
        pytest.skip("this system does not tell what it was asked for")
    assert "hg" in flags
