"""BatchNorm modules that show their Jacobian: torch's in every other respect, and clear about having none."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian as autograd_jacobian

import persample
from persample import batchnorm
from persample.batchnorm import convert, jacobian, revert
from persample.errors import BatchNormError, InplaceError

PAIRS = [
    (nn.BatchNorm1d, batchnorm.BatchNorm1d, (6, 3)),
    (nn.BatchNorm1d, batchnorm.BatchNorm1d, (5, 3, 4)),
    (nn.BatchNorm2d, batchnorm.BatchNorm2d, (4, 3, 2, 3)),
    (nn.BatchNorm3d, batchnorm.BatchNorm3d, (3, 3, 2, 1, 2)),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"eps": 0.1, "momentum": 0.7},
]


class Net(nn.Module):
    """Nested, with a BatchNorm used twice, one without affine, and every number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.shared = nn.BatchNorm2d(3)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), self.shared, nn.ReLU(inplace=True))
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(3, affine=False), "linear": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.conv(x)).relu()
        x = x + self.branch(x)
        return self.head["linear"](self.head["norm"](x.mean((2, 3))))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dense(f: object, x: Tensor) -> Tensor:
    """``[C, M, M]`` by autograd."""
    (N, C), P = x.shape[:2], x[0, 0].numel()
    full = autograd_jacobian(f, x).detach().reshape(N, C, P, N, C, P)
    return torch.stack([full[:, c, :, :, c].reshape(N * P, N * P) for c in range(C)])


# -- torch's own in every respect


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_to_the_last_bit(
    theirs: type[nn.Module],
    ours: type[nn.Module],
    shape: tuple[int, ...],
    options: dict[str, object],
    dtype: torch.dtype,
) -> None:
    a, b = theirs(3, dtype=dtype, **options), ours(3, dtype=dtype, **options)
    if a.weight is not None:
        nn.init.normal_(a.weight)
    b.load_state_dict(a.state_dict())
    assert repr(b) == repr(a)
    for step in range(4):
        if step == 3:
            a.eval(), b.eval()
        xa = torch.randn(shape, dtype=dtype).requires_grad_()
        xb = xa.detach().clone().requires_grad_()
        ya, yb = a(xa), b(xb)
        (ya**3).sum().backward()
        (yb**3).sum().backward()
        assert torch.equal(ya, yb) and torch.equal(xa.grad, xb.grad)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert same(a.state_dict(), b.state_dict())
        expected = jacobian(a, xa)
        assert torch.equal(b.jacobian.dense(), expected.dense())
        assert torch.equal(b.coupling, expected.block_norms())


def test_isinstance_and_signature() -> None:
    bn = batchnorm.BatchNorm2d(3, 0.2, 0.3, False)
    assert isinstance(bn, nn.BatchNorm2d) and not isinstance(bn, nn.BatchNorm1d)
    assert (bn.eps, bn.momentum, bn.affine, bn.virtual_batch_size) == (0.2, 0.3, False, None)
    assert "virtual_batch_size=4" in repr(batchnorm.BatchNorm1d(3, virtual_batch_size=4))
    assert batchnorm.BatchNorm1d(3, virtual_batch_size=np.int64(4)).virtual_batch_size == 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 4D input"):
        bn(torch.randn(4, 3))


# -- which forward is shown


def test_jacobian_is_that_of_the_last_forward() -> None:
    bn = batchnorm.BatchNorm1d(3, dtype=torch.float64)
    for x in torch.randn(2, 6, 3, dtype=torch.float64):
        bn(x)
    torch.testing.assert_close(bn.jacobian.dense(), dense(copy.deepcopy(bn), x), rtol=1e-10, atol=1e-11)


def test_later_changes_of_the_module_do_not_reach_it() -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    bn(x)
    train = bn.jacobian.dense()
    bn.eval()(x)
    evaluated = bn.jacobian.dense()
    bn.train()(x)
    with torch.no_grad():
        bn.weight.mul_(3)
        bn.running_mean.zero_()
    bn.eps = 1.0
    bn.eval()
    assert torch.equal(bn.jacobian.dense(), train)
    assert torch.equal(bn.jacobian.output, jacobian(nn.BatchNorm1d(3), x).output)
    bn = batchnorm.BatchNorm1d(3).eval()
    bn.running_var.fill_(4.0)
    bn(x)
    bn.running_var.fill_(9.0)
    torch.testing.assert_close(bn.jacobian.scale, torch.full((1, 3), 0.5), rtol=1e-4, atol=0)
    assert not torch.equal(train, evaluated) and not bn.jacobian.coupled


def test_evaluation_mode_has_no_coupling() -> None:
    model = convert(Net()).eval()
    model(torch.randn(4, 2, 5, 5))
    for bn in norms(model):
        assert (bn.coupling[~torch.eye(4, dtype=torch.bool)] == 0).all()


def test_under_no_grad_and_inference_mode() -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    expected = jacobian(nn.BatchNorm1d(3), x).dense()
    with torch.no_grad():
        bn(x)
    assert torch.equal(bn.jacobian.dense(), expected)
    with torch.inference_mode():
        y = x.clone()
        bn(y)
        y.zero_()  # unseen by any version counter
        assert torch.equal(bn.jacobian.dense(), expected)
    assert torch.equal(bn.jacobian.dense(), expected)


def test_nothing_to_show_is_said() -> None:
    bn = batchnorm.BatchNorm1d(3)
    with pytest.raises(BatchNormError, match="has no Jacobian to show: it has not run yet"):
        _ = bn.jacobian
    bn(torch.randn(6, 3))
    del bn.jacobian
    with pytest.raises(BatchNormError, match="it was deleted"):
        _ = bn.coupling
    bn(torch.randn(6, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        bn(torch.randn(1, 3))
    assert bn.coupling.shape == (6, 6)  # still that of the forward that finished


def test_input_changed_in_place() -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    bn(x).relu_()  # the output is another tensor
    assert bn.coupling.shape == (6, 6)
    x[0] += 1
    with pytest.raises(InplaceError, match="changed in place after the forward"):
        _ = bn.jacobian


def test_inside_transforms_nothing_is_recorded() -> None:
    bn = batchnorm.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(2, 6, 3)
    expected = torch.func.vmap(nn.BatchNorm1d(3, track_running_stats=False))(x)
    bn(x[0])
    torch.testing.assert_close(torch.func.vmap(bn)(x), expected)
    with pytest.raises(BatchNormError, match=r"inside a torch\.func transform"):
        _ = bn.jacobian


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_inside_compiled_code_nothing_is_recorded() -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    bn(x)
    compiled = torch.compile(bn, backend="eager")
    torch.testing.assert_close(compiled(x), nn.BatchNorm1d(3)(x))
    with pytest.raises(BatchNormError, match=r"inside torch\.compile"):
        _ = bn.jacobian
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant: bool) -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(bn, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(bn.jacobian.dense(), jacobian(nn.BatchNorm1d(3), x).dense())


# -- what is kept


def test_keeps_a_reference_to_the_input_and_no_copy() -> None:
    bn, x = batchnorm.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    h = x * 1
    bn(h)
    held = [t for t in vars(bn._recorded).values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held if t.data_ptr() != h.data_ptr()) == 6  # weight and bias, [C] each
    assert not any(t.requires_grad for t in held)


def test_holds_neither_the_graph_nor_older_inputs() -> None:
    bn, source = batchnorm.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    storages = []
    for _ in range(2):
        h = source * 2
        graph = weakref.ref(h)
        bn(h)
        storages.append(weakref.ref(bn._recorded.input))
    del h
    gc.collect()
    assert graph() is None  # only its values are held
    assert storages[0]() is None and storages[1]() is not None
    del bn.jacobian
    gc.collect()
    assert storages[1]() is None


def test_copies_and_pickles_go_without_the_last_batch() -> None:
    model, x = convert(Net(), virtual_batch_size=2), torch.randn(6, 2, 5, 5)
    size = len(pickle.dumps(model))
    model(x)
    assert len(pickle.dumps(model)) == size
    for other in (copy.deepcopy(model), copy.copy(model.shared), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in norms(other)] == [type(m) for m in norms(model)][: len(norms(other))]
        assert all(m.virtual_batch_size == 2 for m in norms(other))
        with pytest.raises(BatchNormError, match="has not run yet"):
            _ = norms(other)[0].jacobian
    assert model.shared.jacobian.normed.shape == (6, 3, 5, 5)
    replica, again = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert torch.equal(replica(x), again(x))


# -- convert and revert


def test_convert_changes_nothing_but_the_class() -> None:
    model, x = Net(), torch.randn(6, 2, 5, 5)
    model.shared.momentum = None
    model.head["norm"].eval()
    model.shared.note = "mine"
    calls: list[str] = []
    model.shared.register_forward_hook(lambda *_: calls.append("hook"))
    before = copy.deepcopy(model)
    objects = {name: id(m) for name, m in model.named_modules()}
    tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    assert convert(model) is model
    assert {name: id(m) for name, m in model.named_modules()} == objects
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert [type(m) for m in norms(model)] == [batchnorm.BatchNorm2d, batchnorm.BatchNorm1d]
    assert model.branch[1] is model.shared and model.shared.momentum is None and model.shared.note == "mine"
    assert model.shared.training and not model.head["norm"].training

    ours, theirs = model(x), before(x)
    assert torch.equal(ours, theirs) and calls == ["hook", "hook"] * 2
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert same(model.state_dict(), before.state_dict())
    assert model.head["norm"].coupling.count_nonzero() == 6 and model.shared.coupling.count_nonzero() == 36

    assert revert(model) is model
    assert {name: id(m) for name, m in model.named_modules()} == objects
    assert [type(m) for m in norms(model)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert vars(model.shared).keys() == vars(before.shared).keys()
    assert torch.equal(model(x), before(x))


def test_convert_twice_and_a_bare_module() -> None:
    bn = nn.BatchNorm3d(2)
    assert convert(convert(bn)) is bn and type(bn) is batchnorm.BatchNorm3d
    assert type(revert(revert(bn))) is nn.BatchNorm3d
    assert list(convert(nn.Linear(2, 2)).state_dict()) == ["weight", "bias"]


def test_state_dicts_and_optimisers_carry_over() -> None:
    model = Net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    convert(model).load_state_dict(state)
    weight = model.shared.weight.detach().clone()
    model(torch.randn(6, 2, 5, 5))[:, 0].square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.shared.weight, weight)
    Net().load_state_dict(model.state_dict())


def test_convert_in_a_compiled_wrapper_and_with_parametrisations() -> None:
    bn = nn.BatchNorm1d(3)
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Identity())
    with pytest.warns(UserWarning, match="left as they are: '' \\(ParametrizedBatchNorm1d\\)"):
        convert(bn)
    converted = convert(nn.BatchNorm1d(3))
    torch.nn.utils.parametrize.register_parametrization(converted, "weight", nn.Identity())
    converted(torch.randn(6, 3))
    assert converted.coupling.shape == (6, 6)


def test_what_cannot_be_converted_stops_before_any_change() -> None:
    for refused, message in [
        (nn.SyncBatchNorm(3), "'1' is a SyncBatchNorm: its statistics are those of all processes"),
        (nn.LazyBatchNorm1d(), "'1' is a LazyBatchNorm1d that has not seen an input"),
    ]:
        model = nn.Sequential(nn.BatchNorm1d(3), refused)
        with pytest.raises(BatchNormError, match=message):
            convert(model)
        assert type(model[0]) is nn.BatchNorm1d
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    lazy(torch.randn(4, 3))
    assert type(convert(lazy)[0]) is batchnorm.BatchNorm1d


def test_foreign_subclasses_are_left_with_a_warning() -> None:
    class Mine(nn.BatchNorm1d):
        pass

    model = nn.Sequential(Mine(3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"left as they are: '0' \(Mine\)") as seen:
        convert(model)
    assert {w.filename for w in seen} == {__file__}
    assert [type(m) for m in model] == [Mine, batchnorm.BatchNorm1d]


def test_sync_batchnorm_conversion_afterwards_and_before() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convert(nn.Sequential(nn.BatchNorm1d(3))))
    assert type(model[0]) is nn.SyncBatchNorm


def test_export_of_the_reverted_model() -> None:
    model = revert(convert(nn.Sequential(nn.BatchNorm1d(3)))).eval()
    x = torch.randn(4, 3)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


# -- ghost batches


@pytest.mark.parametrize(("N", "size", "sizes"), [(8, 4, [4, 4]), (7, 3, [3, 3, 1]), (5, 8, [5]), (10, 4, [4, 4, 2])])
def test_ghost_batches_are_those_of_chunk(N: int, size: int, sizes: list[int]) -> None:
    x = torch.randn(N, 3, 2, dtype=torch.float64, requires_grad=True)
    ours = batchnorm.BatchNorm1d(3, dtype=torch.float64, virtual_batch_size=size)
    theirs = nn.BatchNorm1d(3, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    expected = torch.cat([theirs(part) for part in x.split(sizes)])
    y = ours(x)
    assert torch.equal(y, expected) and same(ours.state_dict(), theirs.state_dict())
    v = torch.randn_like(x)
    torch.testing.assert_close(ours.jacobian @ v, torch.autograd.grad(y, x, v)[0], rtol=1e-10, atol=1e-11)
    label = torch.repeat_interleave(torch.tensor(sizes))
    assert torch.equal(ours.coupling > 0, label[:, None] == label)
    torch.testing.assert_close(jacobian(ours, x).dense(), ours.jacobian.dense(), rtol=0, atol=0)


def test_ghost_batches_matter_only_where_statistics_are_of_the_batch() -> None:
    ours, x = batchnorm.BatchNorm1d(3, virtual_batch_size=2).eval(), torch.randn(6, 3)
    assert torch.equal(ours(x), nn.BatchNorm1d(3).eval()(x)) and not ours.jacobian.coupled
    free = batchnorm.BatchNorm1d(3, virtual_batch_size=2, track_running_stats=False).eval()
    free(x)
    assert (free.coupling[:2, 2:] == 0).all() and (free.coupling[:2, :2] > 0).all()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        free(torch.randn(5, 3))  # leaves a single sample over
    for build in (
        lambda: batchnorm.BatchNorm1d(3, virtual_batch_size=0),
        lambda: convert(Net(), virtual_batch_size=-1),
        lambda: convert(Net(), virtual_batch_size=2.5),
    ):
        with pytest.raises(BatchNormError, match="virtual_batch_size must be at least 1"):
            build()


def test_convert_to_ghost_batches_and_back() -> None:
    model, x = Net(), torch.randn(6, 2, 5, 5)
    expected = copy.deepcopy(model)(x)
    convert(model, virtual_batch_size=3)
    assert not torch.allclose(model(x), expected)
    assert model.shared.jacobian.mean.shape == (2, 3)
    convert(model)
    assert model.shared.virtual_batch_size == 3
    assert not hasattr(revert(model).shared, "virtual_batch_size")


def test_a_lone_sample_in_the_last_ghost_batch_is_refused_before_anything_has_moved() -> None:
    bn = batchnorm.BatchNorm1d(2, virtual_batch_size=3)
    before = {name: b.clone() for name, b in bn.named_buffers()}
    with pytest.raises(BatchNormError, match=r"last of the 7 samples is alone.*virtual_batch_size than 3"):
        bn(torch.randn(7, 2))
    assert same(bn.state_dict() | before, bn.state_dict())
    assert bn(torch.randn(7, 2, 2)).shape == (7, 2, 2)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(2, 9),
    space=st.lists(st.integers(1, 3), max_size=3),
    size=st.one_of(st.none(), st.integers(1, 9)),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_any_shape(N: int, space: list[int], size: int | None, affine: bool, eps: float) -> None:
    kind = {0: batchnorm.BatchNorm1d, 1: batchnorm.BatchNorm1d, 2: batchnorm.BatchNorm2d, 3: batchnorm.BatchNorm3d}
    bn = kind[len(space)](2, eps=eps, affine=affine, dtype=torch.float64, virtual_batch_size=size)
    x = torch.randn(N, 2, *space, dtype=torch.float64, generator=torch.Generator().manual_seed(N)).requires_grad_()
    smallest = min(len(chunk) for chunk in x.chunk(-(-N // size) if size else 1))
    if smallest * x[0, 0].numel() == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            bn(x)
        return
    y = bn(x)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(size or 0))
    torch.testing.assert_close(bn.jacobian @ v, torch.autograd.grad(y, x, v)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bn.jacobian.output, y.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_passes_of_the_library_leave_the_record_of_the_last_forward(training: bool) -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    model.train(training)(torch.randn(7, 3).double())
    before = model[1].jacobian.normed  # type: ignore[union-attr]
    loss = nn.CrossEntropyLoss()
    passes: list[Callable[[], Any]] = [
        lambda: persample.gradients(model, loss, x, y, coupled="loss" if training else None),
        lambda: persample.coupling(model, loss, x, y).norms(),
        lambda: persample.curvature.hvp(model, loss, x, y) @ torch.ones(34, dtype=torch.float64),
        lambda: persample.check(model, loss, x, y),
    ]
    for run in passes if training else passes[:1]:
        run()
        assert torch.equal(model[1].jacobian.normed, before)  # type: ignore[union-attr]
    with persample.extend(model) as recorder:  # this forward is the user's
        recorder.gradients(nn.functional.cross_entropy(model(x), y, reduction="none"), coupled="loss")
    assert len(model[1].jacobian.normed) == 6  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ran", [False, True])
def test_torch_jit_and_converted_layers(ran: bool) -> None:
    """Traces are those of torch's own layers; scripts are refused in words, and leave the model as it is."""
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    if ran:
        model(x)
    with pytest.raises(BatchNormError, match=r"can't compile a BatchNorm2d.*revert\(\)"):
        torch.jit.script(model)
    assert type(model[1]) is batchnorm.BatchNorm2d
    plain = revert(copy.deepcopy(model))
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), plain(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.jit.script(plain)(x), plain(x), rtol=0, atol=1e-12)
    model(x)
    torch.testing.assert_close(model[1].jacobian.output, plain(x), rtol=0, atol=1e-12)  # type: ignore[union-attr]


def test_only_what_can_be_read_is_listed() -> None:
    bn, x = batchnorm.BatchNorm1d(3), torch.randn(4, 3)
    assert not {"jacobian", "coupling"} & {name for name, _ in inspect.getmembers(bn)}
    bn(x)
    assert {"jacobian", "coupling", "weight", "running_mean"} <= {name for name, _ in inspect.getmembers(bn)}
    x.add_(1)  # and the Jacobian is lost
    assert not {"jacobian", "coupling"} & set(dir(bn))
    with pytest.raises(InplaceError):
        bn.jacobian  # noqa: B018
