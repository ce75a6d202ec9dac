"""How to get a quantity from other libraries, the way their documentation says.

Where a library returns individual gradients, the rest is computed from those by `benchmarks.quantities.reduced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import distributions

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .engines import Engine, Run, Unserved
from .quantities import MAX_NORM, Result, Rows, reduced
from .workloads import losses

BACKPACK_CLASS = {"Q2": "BatchL2Grad", "Q3": "SumGradSquared", "Q4": "Variance"}


def from_rows(quantity: str, rows: Callable[[], Rows]) -> Run:
    """Anything from individual gradients; they come in fresh memory."""
    if quantity == "Q1r":
        raise Unserved("rows are made in fresh memory")
    return lambda: reduced(quantity, [rows()])


# ---- PyTorch ----------------------------------------------------------------------------------------------------


def functional(chunk: int | None = None, compile: bool = False) -> Engine:
    """``torch.func``: ``vmap(grad(...))``, reduced chunk by chunk."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
        if quantity == "Q1r":
            raise Unserved("rows are made in fresh memory")
        if chunk and quantity in ("Q1", "Q5", "all"):
            raise Unserved("needs all rows at a time")
        values = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return losses(functional_call(model, (values, buffers), (x[None],)), y[None])[0]

        rows = vmap(grad(loss), in_dims=(None, 0, 0))

        def chunks(x: Tensor, y: Tensor) -> Iterator[Rows]:
            step = chunk or len(x)
            yield from (rows(values, *part) for part in zip(x.split(step), y.split(step), strict=True))

        def run(x: Tensor, y: Tensor) -> Result:
            return reduced(quantity, chunks(x, y))

        if compile:
            run = torch.compile(run, fullgraph=True, dynamic=False)
        return lambda: run(x, y)

    return prepare


def expanded_weights(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """``torch.nn.utils._per_sample_grad``."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    forward = call_for_per_sample_grads(model, batch_size=len(x), loss_reduction="sum")

    def rows() -> Rows:
        for p in model.parameters():
            p.grad_sample = None
        losses(forward(x), y).sum().backward()
        return {name: p.grad_sample for name, p in model.named_parameters()}

    return from_rows(quantity, rows)


# ---- BackPACK ---------------------------------------------------------------------------------------------------


def backpack(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    from backpack import backpack as extensions
    from backpack import extend
    from backpack import extensions as available

    if y.ndim > 1:
        raise Unserved("the loss must be nn.CrossEntropyLoss of one token per sample")
    model, criterion = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))
    extension = getattr(available, BACKPACK_CLASS.get(quantity, "BatchGrad"))()

    def backward() -> None:
        model.zero_grad()
        with extensions(extension):
            criterion(model(x), y).backward()

    def taken(attribute: str) -> Rows:
        backward()
        found = {name: getattr(p, attribute) for name, p in model.named_parameters()}
        for p in model.parameters():
            delattr(p, attribute)
        return found

    match quantity:
        case "Q2":
            return lambda: {"norm": sum(taken("batch_l2").values(), start=torch.zeros(())).sqrt()}
        case "Q3":
            return lambda: {name: s / len(x) for name, s in taken("sum_grad_squared").items()}
        case "Q4":
            return lambda: taken("variance")
    return from_rows(quantity, lambda: taken("grad_batch"))


# ---- Opacus -----------------------------------------------------------------------------------------------------


def opacus_model(model: nn.Module) -> nn.Module:
    """With the replacements that Opacus asks for, where they are the same function."""
    from opacus.validators import ModuleValidator

    model.train()  # its hooks sleep otherwise
    return ModuleValidator.fix(model) if any(isinstance(m, nn.RNNBase) for m in model.modules()) else model


def opacus(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(opacus_model(model), loss_reduction="sum")

    def rows() -> Rows:
        wrapped.zero_grad()
        losses(wrapped(x), y).sum().backward()
        return {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}

    return from_rows(quantity, rows)


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    if quantity not in ("Q2", "clip"):
        raise Unserved("norms and clipped sums only")
    wrapped = GradSampleModuleFastGradientClipping(opacus_model(model), loss_reduction="sum", max_grad_norm=MAX_NORM)

    def run() -> Result:
        wrapped.zero_grad()
        found = losses(wrapped(x), y)
        found.sum().backward(retain_graph=quantity == "clip")
        if quantity == "Q2":
            return {"norm": wrapped.get_norm_sample()}
        coefficients = wrapped.get_clipping_coef()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (coefficients * found).sum().backward()
        wrapped.enable_hooks()
        return {name.removeprefix("_module."): p.grad for name, p in wrapped.named_parameters()}

    return run


# ---- TorchJD ----------------------------------------------------------------------------------------------------


def torchjd(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    from torchjd.autogram import Engine as Gramian
    from torchjd.autojac import jac

    if quantity in ("Q2", "Q5"):
        gramian = Gramian(model, batch_dim=0)

        def gram() -> Result:
            found = gramian.compute_gramian(losses(model(x), y))
            return {"gram": found} if quantity == "Q5" else {"norm": found.diagonal().sqrt()}

        return gram
    names, parameters = zip(*model.named_parameters(), strict=True)
    return from_rows(quantity, lambda: dict(zip(names, jac(losses(model(x), y), parameters), strict=True)))


# ---- TRAK ------------------------------------------------------------------------------------------------


def trak(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """TRAK's projection of the rows of ``torch.func``."""
    from trak.projectors import BasicProjector

    if quantity != "project":
        raise Unserved("projections only")
    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(size, 512, seed=0, proj_type="rademacher", device="cpu", block_size=32)
    rows = functional()(model, x, y, "Q1")
    return lambda: {"project": projector.project(torch.cat([r.flatten(1) for r in rows().values()], 1), model_id=0)}


PEERS: dict[str, Engine] = {
    "torch.func": functional(),
    "torch.func, chunks of 8": functional(8),
    "torch.func, compiled": functional(compile=True),
    "ExpandedWeights": expanded_weights,
    "BackPACK": backpack,
    "Opacus": opacus,
    "Opacus, ghost clipping": opacus_ghost,
    "TorchJD": torchjd,
    "TRAK": trak,
}


def versions() -> dict[str, str]:
    """Of what is installed."""
    installed = {d.name.lower(): d.version for d in distributions()}
    names = ("torch", "numpy", "backpack-for-pytorch", "opacus", "torchjd", "traker")
    return {name: installed[name] for name in names if name in installed}
