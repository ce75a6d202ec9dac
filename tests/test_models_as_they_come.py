"""Models wrapped, compiled, scripted, sharded, copied, shared by threads: exact, or an error that says what to do.

What traps, recorder and zoo test already (checkpointing, autocast, forwards and backwards in any order, exceptions half
way, `requires_grad` changed after extending) is not repeated here.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import persample
from persample import optim, rounding
from persample import verify as verification

N, D = 4, 5
ENGINES = ["hooks", "vmap", "loop"]
MakeModel = Callable[[], nn.Module]


def inputs() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_of(out: Tensor, _: Any = None) -> Tensor:
    return (out.sin() + out.square()).flatten(1).sum(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def truth(model: nn.Module | None = None) -> Tensor:
    """Rows ``[N, D]`` by plain autograd, one sample at a time."""
    model = net() if model is None else model
    rows = []
    for one in inputs().split(1):
        found = torch.autograd.grad(losses_of(model(one)).sum(), list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def by_recorder(model: nn.Module) -> Tensor:
    with persample.extend(model) as recorder:
        return recorder.gradients(losses_of(model(inputs()))).flat()


def by_handle(model: nn.Module) -> Tensor:
    got: list[persample.Gradients] = []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    try:
        losses_of(model(inputs())).mean().backward()
    finally:
        handle.remove()
    return got[0].flat()


WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    **{e: lambda m, e=e: persample.gradients(m, losses_of, inputs(), engine=e).flat() for e in ENGINES},
    "recorder": by_recorder,
    "handle": by_handle,
}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-11)


# ---- spread over processes and devices ----------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_distributed_data_parallel(alone: None, way: str) -> None:
    """Rows are those of this process's samples; a training step afterwards is what it always was."""
    model = nn.parallel.DistributedDataParallel(net())
    assert close(WAYS[way](model), truth())
    model.zero_grad()
    losses_of(model(inputs())).mean().backward()
    assert close(torch.cat([p.grad.flatten() for p in model.parameters()]), truth().mean(0))
    assert persample.gradients(model, losses_of, inputs()).names[0] == "module.0.weight"


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "clipped": lambda m: optim.ClippedSGD(m.named_parameters(), max_norm=1.0, expected_batch_size=N),
    "noised": lambda m: optim.ClippedAdam(m.named_parameters(), max_norm=1.0, noise_multiplier=1.0),
    "adam": lambda m: optim.PerSampleAdam(m.named_parameters()),
    "natural": lambda m: optim.NaturalGradient(m.named_parameters()),
    "surgery": lambda m: optim.GradientSurgery(m.named_parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_of_a_model_do_not_drift_apart(alone: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing here sums over processes: what would be written to one copy is refused, and nothing has changed."""
    model = nn.parallel.DistributedDataParallel(net())
    G, S = (persample.gradients(model, losses_of, inputs(), quantities=q) for q in (None, ["mean"]))
    optimizer = OPTIMIZERS[name](model)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    before = copy.deepcopy(model.module)
    steps = [lambda: optimizer.step(G), G.backward, S.backward]
    for step in steps + ([lambda: optimizer.step([])] if name == "clipped" else []):
        with pytest.raises(persample.ArgumentError, match=r"DistributedDataParallel in 2 processes.*all_reduce"):
            step()
    pairs = zip(model.module.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(p, q) and p.grad is None for p, q in pairs)
    with model.no_sync():
        G.backward()  # which says that it is to be summed later
    assert close(torch.cat([p.grad.flatten() for p in model.parameters()]), truth().mean(0))
    with model.no_sync(), pytest.raises(persample.ArgumentError, match="drift apart"):
        optimizer.step(G)
    OPTIMIZERS[name](plain := net()).step(persample.gradients(plain, losses_of, inputs()))  # one without copies


@pytest.mark.parametrize("way", WAYS)
def test_data_parallel(way: str) -> None:
    assert close(WAYS[way](nn.DataParallel(net())), truth())


def projected_by_gradients(model: nn.Module, R: Any) -> Tensor:
    return persample.gradients(model, losses_of, inputs()).project(R)  # type: ignore[no-any-return]


def projected_by_recorder(model: nn.Module, R: Any) -> Tensor:
    with persample.extend(model) as recorder:
        return recorder.gradients(losses_of(model(inputs()))).project(R)


def projected_by_handle(model: nn.Module, R: Any) -> Tensor:
    got: list[persample.Statistics] = []
    asked = [("project", {"projection": R})]
    handle = persample.extend(model, on_backward=got.append, reduction="mean", quantities=asked)
    losses_of(model(inputs())).mean().backward()
    handle.remove()
    return got[0].project()


def projected_in_slices(model: nn.Module, R: Any) -> Tensor:
    asked = [("project", {"projection": R})]
    return persample.gradients(model, losses_of, inputs(), quantities=asked, max_bytes=1).project()  # type: ignore[no-any-return]


def projected_of_some(model: nn.Module, R: Any) -> Tensor:
    return persample.gradients(model, losses_of, inputs()).select(lambda *_: True).project(R)  # type: ignore[no-any-return]


def projected_of_coupling(model: nn.Module, R: Any) -> Tensor:
    found = persample.coupling(model, losses_of, inputs())
    rows = torch.stack([found.row(n).project(R)[n] for n in range(len(found))])
    assert close(found.gradients("copy").project(R), rows)
    return rows


@pytest.mark.parametrize(
    "way",
    [
        projected_by_gradients,
        projected_by_recorder,
        projected_by_handle,
        projected_in_slices,
        projected_of_some,
        projected_of_coupling,
    ],
)
def test_a_projection_is_that_of_the_model_whatever_was_put_around_it(alone: None, way: Any) -> None:
    """Signs belong to names, and these have others in front of them."""
    R = persample.attribution.Projection(8)
    matrix = torch.cat([R.matrix(name, p.shape).flatten(0, -2) for name, p in net().named_parameters()])
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel, nn.DataParallel, compiled, twice):
        assert close(way(wrap(net()), R), truth() @ matrix)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def twice(model: nn.Module) -> nn.Module:
    return compiled(nn.DataParallel(model))


class Module(nn.Module):
    """A model with a layer of that name, which it doesn't merely run."""

    def __init__(self) -> None:
        super().__init__()
        self.module = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(2 * x)  # type: ignore[no-any-return]


def test_a_layer_that_is_called_module_keeps_its_name() -> None:
    R, model = persample.attribution.Projection(8), Module()
    matrix = torch.cat([R.matrix(name, p.shape).flatten(0, -2) for name, p in model.named_parameters()])
    assert close(projected_by_gradients(model, R), truth(model) @ matrix)


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, twice])
def test_a_store_is_of_the_model_whatever_was_put_around_it(tmp_path: Path, wrap: Any) -> None:
    R, model = persample.attribution.Projection(8), net()
    store = persample.attribution.GradientStore(tmp_path, wrap(model), projection=R, dtype=torch.float64)
    store.extend(losses_of, [(inputs(), None)])
    store.append(persample.gradients(wrap(model), losses_of, inputs()))
    store = persample.attribution.GradientStore(tmp_path, model, projection=R, dtype=torch.float64)
    store.append(persample.gradients(model, losses_of, inputs()))
    expected = projected_by_gradients(model, R)
    assert close(store.rows(), expected.repeat(3, 1))
    batches = [(inputs(), None)]
    crossed = persample.attribution.cross_gram(wrap(model), losses_of, batches, batches, projection=R)
    assert close(crossed, expected @ expected.T)


def fully_sharded() -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs fully_shard")
    sharded: nn.Module = fsdp.fully_shard(net(), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return sharded


def flat_sharded(original: bool) -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    sharded: nn.Module = fsdp.FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=original)
    return sharded


def distributed_tensors() -> nn.Module:
    tensor = pytest.importorskip("torch.distributed.tensor")
    spread: nn.Module = tensor.distribute_module(net(), dist.device_mesh.init_device_mesh("cpu", (1,)))
    return spread


@pytest.mark.filterwarnings("ignore:FSDP", "ignore:.*FullyShardedDataParallel", "ignore:.*NO_SHARD")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (fully_sharded, "the model is a FSDPSequential"),
        (lambda: nn.Sequential(fully_sharded()), "module '0' is a FSDPSequential"),
        (lambda: flat_sharded(True), "the model is a FullyShardedDataParallel"),
        (lambda: flat_sharded(False), "the model is a FullyShardedDataParallel"),
        (distributed_tensors, "parameter '0.weight' is a DTensor"),
    ],
    ids=["fully_shard", "a part", "fsdp", "fsdp flat", "dtensor"],
)
def test_sharded_parameters(alone: None, make: MakeModel, match: str, way: str) -> None:
    with pytest.raises(persample.ArgumentError, match=f"{match}.*before it is sharded"):
        WAYS[way](make())


# ---- scripted, traced, compiled -----------------------------------------------------------------------------------


def with_part(i: int, change: Callable[[nn.Module], Any]) -> nn.Module:
    model = net()
    model[i] = change(model[i])
    return model


SCRIPTED: dict[str, MakeModel] = {
    "scripted": lambda: torch.jit.script(net()),
    "traced": lambda: torch.jit.trace(net(), inputs()),
    "a scripted part": lambda: with_part(2, torch.jit.script),
    "a traced part": lambda: with_part(2, lambda m: torch.jit.trace(m, torch.ones(2, 6, dtype=torch.float64))),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", SCRIPTED.values(), ids=SCRIPTED)
@pytest.mark.parametrize("way", WAYS)
def test_scripted_and_traced(make: MakeModel, way: str) -> None:
    """Their calls can't be seen; engines that need no calls serve them."""
    model = make()
    if way in ("vmap", "loop"):
        assert close(WAYS[way](model), truth())
    else:
        with pytest.raises(persample.CaptureError, match=r"scripted.*original module.*engine='loop'"):
            WAYS[way](model)
    assert close(losses_of(model(inputs())), losses_of(net()(inputs()))) and not model._forward_hooks


def with_norm(change: Callable[[nn.Module], Any], training: bool, whole: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model(inputs())
    model.train(training)
    if not whole:
        model[1] = change(model[1])
    return change(model) if whole else model  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_scripted_batch_norm(engine: str, whole: bool) -> None:
    """It couples the batch where that can't be seen; in evaluation mode it is as any scripted module."""
    model = with_norm(torch.jit.script, True, whole)
    before = {name: b.clone() for name, b in model.named_buffers()}
    for verify in (True, False):
        with pytest.raises(persample.BatchCoupledError, match=r"module '1' is a scripted.*original module.*coupled="):
            persample.gradients(model, losses_of, inputs(), engine=engine, verify=verify)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    if engine == "loop" or (engine == "vmap" and not whole):
        expected = persample.gradients(with_norm(lambda m: m, False), losses_of, inputs()).flat()
        found = persample.gradients(with_norm(torch.jit.script, False, whole), losses_of, inputs(), engine=engine)
        assert close(found.flat(), expected)


class CompiledFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.function = torch.compile(lambda h: self.net[2](h.tanh()), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.net[0](x))
        return out


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


COMPILED: dict[str, MakeModel] = {
    "compiled": lambda: torch.compile(net(), backend="aot_eager"),
    "in place": lambda: compiled_in_place(net()),
    "a part": lambda: with_part(0, lambda m: torch.compile(m, backend="aot_eager")),
    "a function": CompiledFunction,
}


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compilers count what they have compiled, and give up after some."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler reads
@pytest.mark.parametrize("warm", [False, True], ids=["", "warm"])
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("way", WAYS)
def test_compiled(compiler: None, make: MakeModel, way: str, warm: bool) -> None:
    model = make()
    if warm:
        losses_of(model(inputs())).sum().backward()
        model.zero_grad()
    if way == "handle" and make is COMPILED["in place"]:
        with pytest.raises(persample.CaptureError, match=r"compiled in place.*torch.compile\(model\).*with-block"):
            WAYS[way](model)
    else:
        assert close(WAYS[way](model), truth())
    assert close(losses_of(model(inputs())), losses_of(net()(inputs())))


@pytest.mark.parametrize("way", WAYS)
def test_symbolically_traced(way: str) -> None:
    assert close(WAYS[way](torch.fx.symbolic_trace(net())), truth())


def test_an_exported_program_has_its_batch_size_built_in(compiler: None) -> None:
    model = torch.export.export(net(), (inputs(),)).module()
    with pytest.raises(persample.VerificationError, match=r"alone does not.*verify=False"):
        persample.gradients(model, losses_of, inputs())
    G = persample.gradients(model, losses_of, inputs(), verify=False)
    assert close(torch.cat([G[name].flatten(1) for name, _ in net().named_parameters()], 1), truth())


# ---- where gradients are off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_surroundings_without_gradients(engine: str) -> None:
    with torch.no_grad():
        rows = WAYS[engine](net())
        assert not torch.is_grad_enabled()
    model = net()
    assert close(rows, truth())
    with torch.inference_mode():
        with pytest.raises(persample.ArgumentError, match=r"inference_mode.*outside"):
            persample.gradients(model, losses_of, inputs(), engine=engine)
        made_inside, x = net(), inputs()
    with pytest.raises(persample.ArgumentError, match=r"inference_mode.*cloned"):
        persample.gradients(made_inside, losses_of, inputs(), engine=engine)
    with pytest.raises(persample.SampleAxisError, match=r"inputs.*inference_mode.*clone"):
        persample.gradients(model, losses_of, x, engine=engine)
    assert close(persample.gradients(model, losses_of, x.clone(), engine=engine).flat(), truth())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_recorder_without_gradients(off: Any) -> None:
    model = net()
    with persample.extend(model) as recorder:
        with off():
            losses = losses_of(model(inputs()))
        with pytest.raises(persample.CaptureError, match=r"no recorded forward.*gradients enabled"):
            recorder.gradients(losses)
        assert close(recorder.gradients(losses_of(model(inputs()))).flat(), truth())


# ---- copies and switches ------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_at_any_time(copied: Callable[[Any], Any]) -> None:
    """Before, during (between a forward and its backward, too) and after being extended; the handle notices nothing."""
    model = net()
    copies, got = [copied(model)], []
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    copies.append(copied(model))
    losses = losses_of(model(inputs()))
    copies.append(copied(model))
    losses.sum().backward()
    handle.remove()
    copies.append(copied(model))
    assert close(got[0].flat(), truth())
    for other in copies:
        losses_of(other(inputs())).sum().backward()
        assert len(got) == 1
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
        for way in WAYS.values():
            assert close(way(other), truth())


@pytest.mark.parametrize("engine", ENGINES)
def test_requires_grad_changed_between_runs(engine: str) -> None:
    model, all_rows = net(), truth()
    for frozen, columns in ((0, slice(36, None)), (2, slice(0, 36)), (None, slice(None))):
        for i in (0, 2):
            model[i].requires_grad_(i != frozen)
        G = persample.gradients(model, losses_of, inputs(), engine=engine)
        assert close(G.flat(), all_rows[:, columns])
        assert not any(p.grad is not None for p in model.parameters())


# ---- state that a forward changes ---------------------------------------------------------------------------------


class Counts(nn.Module):
    """Every forward in training mode acts differently: it multiplies by how many there were."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return x * self.count


def iterating() -> nn.Module:
    torch.manual_seed(0)
    return nn.utils.parametrizations.spectral_norm(nn.Linear(D, D), n_power_iterations=1).double()


STATEFUL: dict[str, MakeModel] = {
    "in place": lambda: nn.Sequential(nn.Linear(D, D).double(), Counts(True)),
    "replaced": lambda: nn.Sequential(nn.Linear(D, D).double(), Counts(False)),
    "power iteration": lambda: nn.Sequential(iterating(), nn.Tanh()),
    "with dropout": lambda: nn.Sequential(iterating(), nn.Dropout(0.5), Counts(True)),
}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_alone_finds_the_state_that_the_batch_found(make: MakeModel, engine: str) -> None:
    """No false alarm, the same rows by every engine, and one forward's change to the state."""
    torch.manual_seed(0)
    model = make()
    once = copy.deepcopy(model)
    losses = losses_of(once(inputs()))
    rows = [torch.autograd.grad(loss, list(once.parameters()), retain_graph=True) for loss in losses]
    G = persample.gradients(model, losses_of, inputs(), engine=engine, verify=True)
    if not any(isinstance(m, nn.Dropout) for m in model.modules()):
        assert close(G.flat(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    if engine != "vmap":  # which leaves buffers alone
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), once.buffers(), strict=True))
    before = copy.deepcopy(model.state_dict())
    assert persample.check(model, losses_of, inputs(), engine=engine).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- threads ------------------------------------------------------------------------------------------------------


class Waits(nn.Module):
    """Lets another thread run in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.between: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[0](x)
        if (between := self.between) is not None:
            self.between = None
            in_a_thread(between)
        out: Tensor = self.body[2](self.body[1](h))
        return out


def test_two_threads_on_one_extended_model() -> None:
    """The second is told; the first is not disturbed."""
    model, got, errors = Waits(), [], []

    def second() -> None:
        try:
            model(inputs())
        except persample.CaptureError as error:
            errors.append(str(error))

    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    for k in (1, 2):
        model.between = second
        losses_of(model(inputs())).sum().backward()
        assert len(errors) == k and "another thread" in errors[-1] and "copy of the model" in errors[-1]
        assert len(got) == k and close(got[-1].flat(), truth())
    in_a_thread(lambda: losses_of(model(inputs())).sum().backward())  # one after the other
    handle.remove()
    assert len(got) == 3 and close(got[-1].flat(), truth())


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_in_one_thread_while_another_records(engine: str) -> None:
    model, got, rows = Waits(), [], []
    other = lambda: rows.append(persample.gradients(model, losses_of, inputs(), engine=engine).flat())  # noqa: E731
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    model.between = other
    losses_of(model(inputs())).sum().backward()
    handle.remove()
    with persample.extend(model) as recorder:
        model.between = other
        G = recorder.gradients(losses_of(model(inputs())))
    assert len(rows) == 2 and all(close(r, truth()) for r in [*rows, got[0].flat(), G.flat()])


def test_the_compiler_is_as_it_was_when_threads_have_recorded_side_by_side(compiler: None) -> None:
    """Each enters while the other is inside, and the first leaves first."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    seen: list[str] = []
    counts = torch._dynamo.testing.CompileCounter()
    first, second = persample.extend(net()), persample.extend(net())
    first.__enter__()
    ready, done = threading.Event(), threading.Event()

    def other() -> None:
        with second:
            ready.set()
            done.wait(10)
        seen.append("left")

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(10)
    first.__exit__(None, None, None)
    done.set()
    thread.join()
    torch.compile(lambda x: x * 2, backend=counts)(torch.ones(1))
    assert seen == ["left"] and counts.frame_count == 1


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [in_a_thread, lambda work: work()], ids=["threads", "nested"])
def test_a_backward_in_the_middle_of_another(run: Callable[[Callable[[], None]], None]) -> None:
    """The first is told; the second, and what comes later, is exact."""
    model, got = net(), []
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    hidden: list[Tensor] = []
    remember = model[1].register_forward_hook(lambda module, args, out: hidden.append(out))
    first, second = (losses_of(model(inputs())).sum() for _ in range(2))
    remember.remove()

    def between(g: Tensor) -> None:
        run(second.backward)

    hidden[0].register_hook(between)
    with pytest.raises(persample.CaptureError, match=r"in the middle of this one.*copy of the model"):
        first.backward()
    assert len(got) == 1 and close(got[0].flat(), truth())
    losses_of(model(inputs())).sum().backward()
    handle.remove()
    assert len(got) == 2 and close(got[1].flat(), truth())


# ---- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "bias": "all"}, {"use_dora": True}, {"modules_to_save": ["2"]}],
    ids=["lora", "rslora", "dora", "saved"],
)
@pytest.mark.parametrize("way", WAYS)
def test_lora(options: dict[str, Any], way: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"] if "modules_to_save" in options else ["0", "2"], **options)
    model = peft.get_peft_model(net(), config).double()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(losses_of(model(one)).sum(), trained) for one in inputs().split(1)]
    assert close(WAYS[way](model), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))


@pytest.mark.parametrize("hidden", [False, True])  # the backbone under no_grad, or just frozen
def test_a_trainable_head_on_a_frozen_backbone_with_batch_norm(hidden: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()).requires_grad_(False)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not hidden):
                h = self.backbone(x)
            return self.head(h)

    torch.manual_seed(0)
    model = Model().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = [torch.autograd.grad(one, model.head.weight, retain_graph=True)[0] for one in losses]
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, verify=True)
    torch.testing.assert_close(G["head.weight"], torch.stack(expected), rtol=0, atol=1e-9)
    assert persample.check(model, nn.CrossEntropyLoss(), x, y).ok
    with pytest.raises(persample.BatchCoupledError, match="slices"):  # which would have other statistics
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, max_bytes=1000, verify=False)


class Joined(nn.Module):
    """Tokens ``[N, 1, D]`` with something made of a parameter beside them."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.p, self.linear = nn.Parameter(torch.empty(*shape).double()), nn.Linear(D, D).double()
        self.make, self.dim = make, dim

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).unsqueeze(1)
        return torch.cat([self.make(self.p, h), h], self.dim).sum(1)


EMPTY: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int]] = {
    "expand": (lambda p, h: p.expand(len(h), -1, -1), (0, D), 1),  # the registers of DINOv3
    "expand_as": (lambda p, h: p.expand_as(h[:, :0]), (1, 0, D), 1),
    "broadcast_to": (lambda p, h: p.broadcast_to(len(h), 0, D), (1, 0, D), 1),
    "repeat": (lambda p, h: p.repeat(len(h), 1, 1), (1, 0, D), 1),
    "where": (lambda p, h: torch.where(torch.ones(1, 0, 1) > 0, p, h[:, :0]), (1, 0, D), 1),
    "embedding": (lambda p, h: nn.functional.embedding(torch.zeros(h.shape[:2]).long(), p), (3, 0), 2),
    "linear": (lambda p, h: nn.functional.linear(h, p), (0, D), 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EMPTY)
def test_parameters_without_entries(name: str, way: str) -> None:
    torch.manual_seed(0)
    model = Joined(*EMPTY[name])
    expected = truth(model)
    assert expected.any() and expected.shape == (N, D * D + D)
    torch.testing.assert_close(WAYS[way](model), expected, rtol=1e-9, atol=1e-12)


class SingleInside(nn.Module):
    """Double precision outside, single inside (``.float()``, as in ``transformers``), where rounding is enlarged."""

    def __init__(self, couples: bool = False) -> None:
        super().__init__()
        self.linear, self.couples = nn.Linear(64, 64), couples

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x.float(), self.linear.weight.float()).to(x.dtype)
        if self.couples:
            h = h * (1 + 0.001 * h.detach().amax(0))
        return (30 * h).sin()


@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_single_precision_inside_a_double_model(engine: str) -> None:
    """Rounding isn't taken for an error, and coupling not for rounding."""
    failed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        model, x = SingleInside().double(), torch.randn(9, 64).double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "inner_types", lambda problem: frozenset())
            try:
                persample.gradients(model, losses_of, x, engine=engine, verify=True)
            except (persample.VerificationError, persample.BatchCoupledError):
                failed += 1
        persample.gradients(model, losses_of, x, engine=engine, verify=True)
        assert persample.check(model, losses_of, x, engine=engine).ok
    assert failed
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(SingleInside(couples=True).double(), losses_of, x, engine=engine, verify=True)


@pytest.mark.parametrize("verify", [None, True])
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_slices_whose_verification_is_tried_again(engine: str, verify: bool | None) -> None:
    """What the first attempt has emitted counts for nothing."""
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = SingleInside().double(), torch.randn(20, 64).double()
        options: dict[str, Any] = {"engine": engine, "max_bytes": 200_000}
        expected = persample.gradients(model, losses_of, x, engine=engine, verify=False)
        asked = ["norm", "sum", "variance", "second_moment"]
        S = persample.gradients(model, losses_of, x, quantities=asked, verify=verify, **options)
        G = persample.gradients(model, losses_of, x, verify=verify, **options)
        assert len(S) == len(G) == 20 and G.flat().shape == expected.flat().shape
        for method in asked:
            for found in (getattr(S, method)(), getattr(G, method)()):
                torch.testing.assert_close(found, getattr(expected, method)(), rtol=1e-2, atol=1e-2)


class Unseen(torch.autograd.Function):
    """Scales by a little more where the largest of the batch is large, where no recorded call shows it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.factor = 1 + 0.1 * h.amax(0).tanh()
        return h * ctx.factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.factor


def test_half_precision_at_the_end_hides_no_coupling() -> None:
    """Hooks see that it couples without a gradient, and say so; the loop has only the losses to go by."""

    class Rounds(nn.Module):
        def __init__(self, coupled: bool) -> None:
            super().__init__()
            self.linear, self.coupled = nn.Linear(D, 3), coupled

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return (Unseen.apply(h) if self.coupled else h).to(torch.bfloat16)

    def run(coupled: bool, engine: str = "loop") -> persample.Gradients:
        torch.manual_seed(0)
        model = Rounds(coupled).double()
        return persample.gradients(model, lambda o, _: o.double().square().sum(1), inputs(), engine=engine, verify=True)

    assert run(coupled=False).flat().any() and "batch-coupled" in repr(run(coupled=True, engine="hooks"))
    with pytest.raises(persample.BatchCoupledError):
        run(coupled=True)
    with pytest.MonkeyPatch.context() as patch:  # it is the tolerance that decides
        patch.setitem(rounding.INNER, torch.bfloat16, 0.2)
        run(coupled=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_takes_an_output_out(engine: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.linear(x)
            return {"logits": h, "features": h.detach().tanh() + self.linear(x)}

    model, x, y = Named().double(), inputs(), torch.arange(N) % 3
    G = persample.gradients(model, lambda o, t: nn.functional.cross_entropy(o.pop("logits"), t), x, y, engine=engine)
    expected = persample.gradients(
        model, lambda o, t: nn.functional.cross_entropy(o["logits"], t), x, y, engine="hooks"
    )
    torch.testing.assert_close(G.flat(), expected.flat(), rtol=1e-9, atol=1e-12)


class Equilibrium(nn.Module):
    """Where ``z = f(z)``; in the backward, a hook differentiates ``f`` there until that has settled, too."""

    def __init__(self, last: bool, linear: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.linear = nn.Linear(D, D), nn.Linear(D, D), linear
        self.last = nn.Linear(D, 2) if last else nn.Identity()
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(x)

        def f(z: Tensor) -> Tensor:
            found: Tensor = self.inner(z + x) if self.linear else self.inner(z).tanh() + x
            return found

        z = x.detach()
        with torch.no_grad():
            for _ in range(50):
                z = f(z)
        z.requires_grad_()
        new = f(z)
        out = new.view_as(new)
        if out.requires_grad:
            out.register_hook(lambda g: settled(new, z, g))
        found: Tensor = self.last(out)
        return found


def settled(new: Tensor, z: Tensor, g: Tensor) -> Tensor:
    y = g
    for _ in range(50):
        y = torch.autograd.grad(new, z, y, retain_graph=True)[0] + g
    return y


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_hooks_that_differentiate_the_graph_of_the_backward_they_are_in(last: bool, linear: bool) -> None:
    torch.manual_seed(0)
    model, x = Equilibrium(last, linear).double(), inputs()
    want = truth(model)
    close: Callable[..., None] = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
    for verify in (None, False):
        close(persample.gradients(model, losses_of, x, verify=verify).flat(), want)
    with persample.extend(model) as recorder:
        each = losses_of(model(x))
        for _ in range(2):
            close(recorder.gradients(each).flat(), want)
    columns = persample.curvature.ggn_diagonal(model, nn.MSELoss(), x, torch.zeros_like(model(x)))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
        for o in model(x).flatten()
    ]
    expected = torch.stack(rows).square().sum(0) * 2 / len(rows)
    close(torch.cat([columns[name].flatten() for name, _ in model.named_parameters()]), expected)


def test_a_handle_reports_no_backward_that_a_hook_runs_in_another_one() -> None:
    torch.manual_seed(0)
    model, got = Equilibrium(last=False, linear=False).double(), list[persample.Gradients]()
    handle = persample.extend(model, on_backward=got.append, reduction="sum")
    try:
        with pytest.warns(UserWarning, match="in the middle of another"):
            losses_of(model(inputs())).sum().backward()
    finally:
        handle.remove()
    assert len(got) == 1
    torch.testing.assert_close(got[0].flat(), truth(model), rtol=1e-9, atol=1e-12)


def test_losses_that_are_given_twice_or_are_views_and_leaves_beside_them() -> None:
    """Where a backward begins: at a view, at several outputs that are one tensor, beside an input that is handed on."""

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.linear(x)
            return h, h, x

    model, x = Outputs().double(), inputs().requires_grad_()

    def loss(out: tuple[Tensor, Tensor, Tensor], _: Any) -> Tensor:
        return (out[0] * out[1].sin()).sum(1) + out[2].square().sum(1)

    rows = [torch.autograd.grad(loss(model(one), None).sum(), list(model.parameters())) for one in x.split(1)]
    want = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for criterion in (loss, lambda out, y: loss(out, y).mean()):
        found = persample.gradients(model, criterion, x, verify=False).flat()
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    with persample.extend(model) as recorder:
        each = loss(model(x), None)
        torch.testing.assert_close(recorder.gradients(each[:]).flat(), want, rtol=1e-9, atol=1e-12)
    assert x.grad is None
