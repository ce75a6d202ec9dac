"""Every module of torch.nn that has parameters, with every documented option: by a rule, exact, or its clear error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import table_of_modules
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import persample
from persample.errors import BatchCoupledError

N, T, C = 4, 3, 6
Make = Callable[..., nn.Module]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(out: Tensor, _: Any = None) -> Tensor:
    weight = torch.arange(1.0, 1 + out[0].numel()).view(out.shape[1:]).cos()
    return (out.sin() * weight + out.square()).flatten(1).sum(1)


def randomised(module: nn.Module) -> nn.Module:
    """Nothing may be right because it is 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) / max(1, p[0].numel() if p.ndim else 1) ** 0.5)
        for b in module.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape) + 0.5)
    return module


def check(module: nn.Module, *shapes: tuple[int, ...], batch_dim: Any = 0, fallback: bool = False) -> None:
    """Alone (nothing upstream requires grad), hook rows are the loop's; every one by a rule unless ``fallback``."""
    inputs = tuple(torch.randn(shape) for shape in shapes)
    with pytest.MonkeyPatch.context() as patch:
        if not fallback:
            patch.setattr("persample.collect.by_samples", _refuse)
        G = persample.gradients(module, losses, inputs, batch_dim=batch_dim, verify=False)
    reference = persample.gradients(module, losses, inputs, batch_dim=batch_dim, engine="loop")
    assert G.names == reference.names and G.unused == reference.unused == ()
    for name in G.names:
        torch.testing.assert_close(
            G[name], reference[name], rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def _refuse(call: Any, *_: Any) -> Any:
    raise AssertionError(f"the fallback served {call.name}")


def options(**choices: list[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def grid(dims: int) -> tuple[int, ...]:
    return (5, 4, 3)[:dims]


SHAPES = [(N, C), (N, T, C), (N, C, C), (C, C), (1, T, C), (N, 2, T, C)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_bilinear(bias: bool, shape: tuple[int, ...]) -> None:
    check(randomised(nn.Linear(C, 5, bias=bias)), shape)
    check(randomised(nn.Bilinear(C, C, 5, bias=bias)), shape, shape)
    check(_ready(nn.LazyLinear(5, bias=bias), shape), shape)


def _ready(lazy: nn.Module, *shapes: tuple[int, ...]) -> nn.Module:
    lazy(*(torch.randn(shape) for shape in shapes))
    return randomised(lazy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine, bias", [(True, True), (True, False)])
def test_layer_and_rms_norm(shape: tuple[int, ...], affine: bool, bias: bool) -> None:
    for normalized in {shape[-1:], shape[1:]}:
        check(randomised(nn.LayerNorm(normalized, elementwise_affine=affine, bias=bias, eps=0.1)), shape)
        for eps in (None, 0.1):
            check(randomised(nn.RMSNorm(normalized, eps=eps)), shape)


@pytest.mark.parametrize("groups", [1, 2, C])
@pytest.mark.parametrize("shape", [(N, C), (N, C, 3), (C, C, 2), (N, C, 3, 2), (1, C, 3), (N, C, 2, 3, 2)], ids=str)
def test_group_norm(groups: int, shape: tuple[int, ...]) -> None:
    if len(shape) > 2 or groups < C:
        check(randomised(nn.GroupNorm(groups, C, eps=0.1)), shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("track, training", [(False, True), (False, False), (True, False)])
def test_instance_norm(dims: int, track: bool, training: bool) -> None:
    make: Make = getattr(nn, f"InstanceNorm{dims}d")
    for n in (N, C, 1):
        check(randomised(make(C, affine=True, track_running_stats=track)).train(training), (n, C, *grid(dims)))


def test_instance_norm_that_learns_statistics() -> None:
    """Its outputs are those of each sample alone; what it remembers isn't part of any loss."""
    check(randomised(nn.InstanceNorm2d(C, affine=True, track_running_stats=True)).train(), (N, C, 5, 4))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm(dims: int) -> None:
    make: Make = getattr(nn, f"BatchNorm{dims}d")
    shape = (N, C, *grid(dims))
    check(randomised(make(C, eps=0.1)).eval(), shape)
    check(randomised(nn.SyncBatchNorm(C)).eval(), shape)
    body = nn.Sequential(nn.Conv2d(C, C, 1) if dims == 2 else nn.Identity(), make(C))
    if dims == 2:
        with pytest.raises(BatchCoupledError, match="training mode"):
            persample.gradients(body, losses, torch.randn(shape))
        body[1] = make(C, track_running_stats=False)
        with pytest.raises(BatchCoupledError, match="no running statistics"):
            persample.gradients(body.eval(), losses, torch.randn(shape))


@pytest.mark.parametrize("count", [1, C])
@pytest.mark.parametrize("shape", [(N, C), (C, C), (N, C, 3), (N, C, 3, 2), (1, C)], ids=str)
def test_prelu(count: int, shape: tuple[int, ...]) -> None:
    check(randomised(nn.PReLU(count)), shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "choice",
    options(stride=[1, 2], padding=[0, 1], dilation=[1, 2], groups=[1, 2, 4], bias=[True])
    + options(padding=["same", "valid"], dilation=[1, 2], groups=[1, 4])
    + options(padding=[1], padding_mode=["circular", "reflect", "replicate"], groups=[1, 4], bias=[False]),
    ids=str,
)
def test_convolution(dims: int, choice: dict[str, Any]) -> None:
    make: Make = getattr(nn, f"Conv{dims}d")
    lazy: Make = getattr(nn, f"LazyConv{dims}d")
    shape = (3, 4, *(7, 6, 5)[:dims])
    if dims == 3 and choice.get("padding_mode") == "reflect":
        shape = (3, 4, 5, 5, 5)
    check(randomised(make(4, 8, 2, **choice)), shape)
    if choice.get("stride") == 2 and choice["dilation"] == 1:
        check(_ready(lazy(8, 2, **choice), shape), shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "choice",
    options(stride=[1, 2], padding=[0, 1], dilation=[1, 2], groups=[1, 2], bias=[True])
    + options(stride=[3], output_padding=[1, 2], groups=[1, 4], bias=[False]),
    ids=str,
)
def test_transposed_convolution(dims: int, choice: dict[str, Any]) -> None:
    make: Make = getattr(nn, f"ConvTranspose{dims}d")
    lazy: Make = getattr(nn, f"LazyConvTranspose{dims}d")
    shape = (3, 4, *(4, 3, 3)[:dims])
    check(randomised(make(4, 8, 2, **choice)), shape)
    if choice["stride"] == 3:
        check(_ready(lazy(8, 2, **choice), shape), shape)


@pytest.mark.parametrize("choice", [*options(padding_idx=[None, 2, -1], sparse=[False]), {"sparse": True}], ids=str)
@pytest.mark.parametrize("shape", [(N,), (N, T), (N, N), (C, C), (1, T), (N, 2, T)], ids=str)
def test_embedding(choice: dict[str, Any], shape: tuple[int, ...]) -> None:
    module, ids = nn.Embedding(7, C, **choice), torch.randint(7, shape)
    G = persample.gradients(module, losses, ids)
    sparse = persample.gradients(module, losses, ids, engine="loop")
    S = persample.gradients(module, losses, ids, quantities=["norm", ("clip", {"max_norm": 0.1})])
    module.sparse = False
    reference = persample.gradients(module, losses, ids, engine="loop")
    torch.testing.assert_close(sparse["weight"], reference["weight"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S.clip()["weight"], reference.clip(0.1)["weight"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(G["weight"], reference["weight"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"] + [f"LazyInstanceNorm{d}d" for d in (1, 2, 3)]
)
def test_lazy_norms(name: str) -> None:
    shape = (N, C, *grid(int(name[-2])))
    make: Make = getattr(nn, name)
    check(_ready(make(affine=True), shape).eval(), shape)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_lazy_before_its_first_forward(engine: str) -> None:
    """Its shapes are found out first."""
    x = torch.randn(N, C)
    G = persample.gradients(nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2)), losses, x, engine=engine)
    assert G["0.weight"].shape == (N, 3, C) and G["2.weight"].shape == (N, 2, 3)
    norm = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()).eval()
    assert persample.gradients(norm, losses, x, engine=engine)["1.weight"].shape == (N, 3)


# ---- parametrizations -----------------------------------------------------------------------------------------------


BODIES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(C, C), (N, T, C)),
    "tall": (lambda: nn.Linear(4, C), (N, 4)),
    "conv": (lambda: nn.Conv2d(4, 5, 2, groups=1), (N, 4, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 5, 2), (N, 4, 3)),
    "embedding": (lambda: nn.Embedding(7, C), (N, T)),
}


def given(shape: tuple[int, ...], body: str) -> Tensor:
    return torch.randint(7, shape) if body == "embedding" else torch.randn(shape)


def check_parametrized(module: nn.Module, x: Tensor) -> None:
    G = persample.gradients(module, losses, x, verify=False)
    reference = persample.gradients(module, losses, x, engine="loop")
    for name in reference.names:
        torch.testing.assert_close(
            G[name], reference[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(body: str, dim: int | None) -> None:
    make, shape = BODIES[body]
    check_parametrized(parametrizations.weight_norm(make(), dim=dim), given(shape, body))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm(body: str, dim: int | None, training: bool) -> None:
    """In training mode every forward does a step of power iteration: converged, it repeats itself."""
    make, shape = BODIES[body]
    module = parametrizations.spectral_norm(make(), dim=dim, n_power_iterations=200)
    x = given(shape, body)
    for _ in range(3):
        module(x)
    check_parametrized(module.train(training), x)


def test_spectral_norm_while_it_iterates() -> None:
    """Rows are those of the weight that this very forward used."""
    module = parametrizations.spectral_norm(nn.Linear(C, C), n_power_iterations=1)
    x = torch.randn(N, C)
    with persample.extend(module) as recorder:
        each = losses(module(x))
        G = recorder.gradients(each)
    for n, loss in enumerate(each):
        rows = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        for (name, _), row in zip(module.named_parameters(), rows, strict=True):
            torch.testing.assert_close(G[name][n], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("body", ["linear", "tall", "conv", "embedding"])
@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_orthogonal(body: str, orthogonal_map: str) -> None:
    make, shape = BODIES[body]
    module = make()
    if orthogonal_map != "householder" and module.weight.flatten(1).shape[0] != module.weight.flatten(1).shape[1]:
        use = {"use_trivialization": False}
    else:
        use = {}
    check_parametrized(parametrizations.orthogonal(module, orthogonal_map=orthogonal_map, **use), given(shape, body))


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj"])
def test_parametrized_attention(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(C, 2, batch_first=True)
            if name == "out_proj":
                parametrizations.weight_norm(self.attention.out_proj)
            else:
                parametrizations.weight_norm(self.attention, name)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x)[0]
            return out

    check_parametrized(Model(), torch.randn(N, T, C))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_parametrized_cell(cell: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = parametrizations.spectral_norm(
                parametrizations.weight_norm(cell(C, C), "weight_ih"), "weight_hh"
            ).eval()

        def forward(self, x: Tensor) -> Tensor:
            state: Any = None
            for x_t in x.unbind(1):
                state = self.cell(x_t, state)
            out: Tensor = torch.cat(state, 1) if isinstance(state, tuple) else state
            return out

    check_parametrized(Model(), torch.randn(N, T, C))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("parametrized", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_recurrence(layer: Any, parametrized: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = parametrized(layer(C, C, 2, batch_first=True), "weight_hh_l1")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)[0]
            return out

    check_parametrized(Model(), torch.randn(N, T, C))


# ---- none is left out -----------------------------------------------------------------------------------------------


def test_every_module_with_parameters_is_in_the_table() -> None:
    """And the committed table of the documentation is what a new run gives (with the PyTorch that it names)."""
    modules = {row.name for row in table_of_modules.ROWS} - set(parametrizations.__all__)
    assert modules == table_of_modules.parametrised() - table_of_modules.BARE
    assert set(parametrizations.__all__) < {row.name for row in table_of_modules.ROWS}
    committed, new = table_of_modules.PAGE.read_text(), table_of_modules.page()
    if torch.__version__.split("+")[0] in committed:
        assert new == committed, "run: python tests/table_of_modules.py"


COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda x, p: torch.bmm(x, p.expand(len(x), 3, 3)),
    "attention": lambda x, p: F.scaled_dot_product_attention(x, p.expand(len(x), 3, 3), x),
    "samples among channels": lambda x, p: F.conv1d(
        x.reshape(1, -1, 3), p.unsqueeze(1).repeat(len(x), 1, 1), groups=3 * len(x), padding=1
    ).view(len(x), 3, 3),
}


class Bare(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.function = nn.Parameter(torch.rand(3, 3)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", COUPLED)
def test_one_by_one_beside_a_sample_without_a_number(name: str, bad: float) -> None:
    """The output gradients of the others are left out, not multiplied by zero."""
    net, x, scale = Bare(COUPLED[name]), torch.randn(N, 3, 3), torch.ones(N)
    scale[2] = bad
    G = persample.gradients(net, lambda out, t: losses(out) * t, x, scale)
    for i in (0, 1, 3):
        (row,) = torch.autograd.grad(losses(net(x[i : i + 1])).sum(), [net.p])
        torch.testing.assert_close(G["p"][i], row, rtol=1e-11, atol=1e-11)
    assert not G["p"][2].isfinite().all()


@torch.library.custom_op("persample_tests::scaled", mutates_args=())
def scaled(x: Tensor, table: Tensor, p: Tensor) -> Tensor:
    return x * table.double() * p


def _saved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _scaled_back(ctx: Any, g: Tensor) -> Any:
    x, table, p = ctx.saved_tensors
    return g * table.double() * p, None, (g * x * table.double()).sum(0)


scaled.register_autograd(_scaled_back, setup_context=_saved)


def test_a_function_of_a_type_that_has_no_common_one() -> None:
    table = torch.randn(3).to(torch.float8_e4m3fn)
    net, x = Bare(lambda x, p: scaled(x, table, p[0])), torch.randn(N, 3)
    G = persample.gradients(net, losses, x)
    for i in range(N):
        (row,) = torch.autograd.grad(losses(net(x[i : i + 1])).sum(), [net.p])
        torch.testing.assert_close(G["p"][i], row, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_default_eps_is_of_the_inputs_type() -> None:
    """Also where the gain has a wider one."""
    net, x = nn.RMSNorm(C), 1e-5 * torch.randn(N, C, dtype=torch.float32)
    G = persample.gradients(net, losses, x)
    for i in range(N):
        (row,) = torch.autograd.grad(losses(net(x[i : i + 1])).sum(), [net.weight])
        torch.testing.assert_close(G["weight"][i], row, rtol=1e-4, atol=0)
