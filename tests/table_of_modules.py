"""What serves every parametrised module of `torch.nn`: the table of ``docs/coverage.md``, made by running them.

``python tests/table_of_modules.py`` writes the page again; a test holds that a new run gives the page that is there.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from zoo.case import readout

import persample

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
N, T, C = 4, 3, 6  # samples, tokens, channels
EXACT = 1e-9
Make = Callable[[], nn.Module]


def parametrised() -> set[str]:
    """The modules of `torch.nn` that make parameters, themselves or by the layers they are made of."""
    words = ("Parameter(", "parameter(", "Linear(", "Attention(", "Layer(")
    found = set()
    for name, kind in vars(nn).items():
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules"):
            parents = [k for k in kind.mro() if k.__module__.startswith("torch.nn.modules") and k is not nn.Module]
            source = "".join(inspect.getsource(k) for k in parents).split("def __init__", 1)[-1]
            if any(word in source for word in words):
                found.add(name)
    return found | {"TransformerEncoder", "TransformerDecoder"}


BARE = {"RNNBase", "RNNCellBase", "Sequential", "ModuleList"}  # what others are built on, with nothing of their own


@dataclass(frozen=True)
class Row:
    """A module with options, and the inputs that it is called with; ``pick``: what of its output the loss sees."""

    name: str
    options: str
    make: Make
    inputs: Callable[[], tuple[Any, ...]]
    batch_dim: Any = 0
    pick: Callable[[Any], Any] = lambda out: out


class Called(nn.Module):
    """A module by itself, of whose output the loss sees a part."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.body, self.pick = row.make(), row.pick

    def forward(self, *inputs: Any) -> Any:
        return self.pick(self.body(*inputs))


def normal(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def ids(*shape: int, below: int = 7) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(below, shape),)


def grid(dims: int) -> tuple[int, ...]:
    return (6, 5, 4)[:dims]


def linear() -> Iterator[Row]:
    for bias in (True, False):
        yield Row("Linear", f"bias={bias}, any rank", lambda bias=bias: nn.Linear(C, 5, bias=bias), normal((N, T, C)))
    yield Row("Bilinear", "", lambda: nn.Bilinear(C, 5, 3), normal((N, C), (N, 5)))
    yield Row("LazyLinear", "before its first forward", lambda: nn.LazyLinear(5), normal((N, C)))
    yield Row("PReLU", "one for each channel", lambda: nn.PReLU(C), normal((N, C, T)))


def convolutions() -> Iterator[Row]:
    modes = ["circular", "reflect", "replicate"]
    for d in (1, 2, 3):
        x = normal((N, 4, *grid(d)))
        for name in (f"Conv{d}d", f"LazyConv{d}d"):
            make = getattr(nn, name)
            given = (8, 3) if name.startswith("Lazy") else (4, 8, 3)
            yield Row(name, "stride, padding", lambda make=make, given=given: make(*given, stride=2, padding=1), x)
            if not name.startswith("Lazy"):
                yield Row(name, "groups, dilation, no bias",
                          lambda make=make: make(4, 8, 2, dilation=2, groups=2, bias=False), x)  # fmt: skip
                yield Row(name, "padding='same'", lambda make=make: make(4, 8, 3, padding="same"), x)
                for mode in modes:
                    yield Row(name, f"padding_mode='{mode}'",
                              lambda make=make, mode=mode: make(4, 8, 3, padding=1, padding_mode=mode), x)  # fmt: skip
        for name in (f"ConvTranspose{d}d", f"LazyConvTranspose{d}d"):
            make = getattr(nn, name)
            given = (8, 2) if name.startswith("Lazy") else (4, 8, 2)
            yield Row(name, "stride, padding, output_padding",
                      lambda make=make, given=given: make(*given, stride=2, padding=1, output_padding=1),
                      x)  # fmt: skip
            if not name.startswith("Lazy"):
                yield Row(name, "groups, dilation", lambda make=make: make(4, 8, 2, dilation=2, groups=2), x)


def embeddings() -> Iterator[Row]:
    yield Row("Embedding", "padding_idx", lambda: nn.Embedding(7, C, padding_idx=2), ids(N, T))
    yield Row("Embedding", "sparse=True", lambda: nn.Embedding(7, C, sparse=True), ids(N, T))
    yield Row("Embedding", "max_norm", lambda: nn.Embedding(7, C, max_norm=1.0), ids(N, T))
    yield Row("Embedding", "scale_grad_by_freq", lambda: nn.Embedding(7, C, scale_grad_by_freq=True), ids(N, T))
    for mode in ("sum", "mean", "max"):
        yield Row("EmbeddingBag", f"mode='{mode}', 2-D", lambda mode=mode: nn.EmbeddingBag(7, C, mode=mode), ids(N, T))
    yield Row("EmbeddingBag", "offsets, padding_idx", lambda: Bags(nn.EmbeddingBag(7, C, padding_idx=2)), ids(N, T))
    yield Row("EmbeddingBag", "per_sample_weights", lambda: nn.EmbeddingBag(7, C, mode="sum"),
              lambda: (torch.randint(7, (N, T)), None, torch.randn(N, T)))  # fmt: skip
    yield Row("EmbeddingBag", "max_norm", lambda: nn.EmbeddingBag(7, C, max_norm=1.0), ids(N, T))
    yield Row("EmbeddingBag", "scale_grad_by_freq", lambda: nn.EmbeddingBag(7, C, scale_grad_by_freq=True), ids(N, T))


class Bags(nn.Module):
    """All bags of the batch in one, with offsets."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))
        return out


def behind(layer: nn.Module) -> nn.Module:
    """With a layer in front, whose parameters act through the statistics."""
    return nn.Sequential(nn.Linear(C, C), layer)


def norms() -> Iterator[Row]:
    yield Row("LayerNorm", "no bias", lambda: nn.LayerNorm((T, C), bias=False), normal((N, T, C)))
    yield Row("RMSNorm", "", lambda: nn.RMSNorm(C), normal((N, T, C)))
    yield Row("GroupNorm", "", lambda: nn.GroupNorm(2, C), normal((N, C, 3)))
    for lazy in ("", "Lazy"):
        for d in (1, 2, 3):
            x, given = normal((N, C, *grid(d))), () if lazy else (C,)
            batch, instance = (getattr(nn, f"{lazy}{kind}Norm{d}d") for kind in ("Batch", "Instance"))
            yield Row(batch.__name__, "eval()", lambda make=batch, given=given: make(*given).eval(), x)
            if not lazy:
                for training in (True, False):
                    make = lambda make=batch, t=training: make(C, track_running_stats=t).train(t)  # noqa: E731
                    mode = "train()" if training else "no running statistics, eval()"
                    yield Row(batch.__name__, f"{mode}, by itself", make, x)
                    if d == 1:
                        yield Row(batch.__name__, f"{mode}, behind a layer", lambda make=make: behind(make()),
                                  normal((N, C)))  # fmt: skip
            for track in (False, True):
                own = {"affine": True, "track_running_stats": track}
                yield Row(instance.__name__, f"affine, track_running_stats={track}",
                          lambda make=instance, given=given, own=own: make(*given, **own), x)  # fmt: skip
    yield Row("SyncBatchNorm", "eval()", lambda: nn.SyncBatchNorm(C).eval(), normal((N, C, 5)))
    yield Row("SyncBatchNorm", "train(), by itself", lambda: nn.SyncBatchNorm(C), normal((N, C, 5)))
    yield Row("SyncBatchNorm", "train(), behind a layer", lambda: behind(nn.SyncBatchNorm(C)), normal((N, C)))


def recurrences() -> Iterator[Row]:
    for name in ("RNN", "GRU", "LSTM"):
        make = getattr(nn, name)
        yield Row(name, "batch_first", lambda make=make: make(C, 5, batch_first=True), normal((N, T, C)),
                  pick=lambda out: out[0])  # fmt: skip
        yield Row(name, "time first, 2 layers, both directions",
                  lambda make=make: make(C, 5, num_layers=2, bidirectional=True), normal((T, N, C)), (1, 0, 0),
                  pick=lambda out: out[0].transpose(0, 1))  # fmt: skip
        yield Row(name, "packed inside the model", lambda make=make: Packs(make(C, 5, batch_first=True)),
                  lambda: (torch.randn(N, T, C), torch.tensor([3, 1, 2, 3])))  # fmt: skip
        cell = getattr(nn, f"{name}Cell")
        yield Row(f"{name}Cell", "", lambda cell=cell: cell(C, 5), normal((N, C)))
    yield Row("LSTM", "proj_size", lambda: nn.LSTM(C, 5, proj_size=2, batch_first=True), normal((N, T, C)),
              pick=lambda out: out[0])  # fmt: skip


class Packs(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out: Tensor = nn.utils.rnn.pad_packed_sequence(self.body(packed)[0], batch_first=True, total_length=T)[0]
        return out


def attention() -> Iterator[Row]:
    x = normal((N, T, C), (N, T, C), (N, T, C))
    yield Row("MultiheadAttention", "batch_first", lambda: nn.MultiheadAttention(C, 2, batch_first=True), x)
    yield Row("MultiheadAttention", "kdim, vdim, bias_kv, zero_attn", lambda: nn.MultiheadAttention(
        C, 2, kdim=5, vdim=7, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        normal((N, T, C), (N, 5, 5), (N, 5, 7)))  # fmt: skip
    yield Row("MultiheadAttention", "time first", lambda: nn.MultiheadAttention(C, 2),
              normal((T, N, C), (T, N, C), (T, N, C)), (1, 0, 0),
              pick=lambda out: (out[0].transpose(0, 1), out[1]))  # fmt: skip
    options = {"d_model": C, "nhead": 2, "dim_feedforward": 8, "batch_first": True, "dropout": 0.0}
    encoder, decoder = (lambda k=k: k(**options) for k in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    yield Row("TransformerEncoderLayer", "", encoder, normal((N, T, C)))
    yield Row("TransformerDecoderLayer", "", decoder, normal((N, T, C), (N, 2, C)))
    yield Row("TransformerEncoder", "", lambda: nn.TransformerEncoder(encoder(), 2), normal((N, T, C)))
    yield Row("TransformerDecoder", "", lambda: nn.TransformerDecoder(decoder(), 2), normal((N, T, C), (N, 2, C)))
    yield Row("Transformer", "", lambda: nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **options),
              normal((N, T, C), (N, 2, C)))  # fmt: skip


class Uses(nn.Module):
    """A container of parameters, used by name or number."""

    def __init__(self, held: Any, key: Any) -> None:
        super().__init__()
        self.held, self.key = held, key

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ self.held[self.key]
        return out


def rest() -> Iterator[Row]:
    weight = lambda: nn.Parameter(torch.randn(C, 5))  # noqa: E731
    yield Row("ParameterList", "", lambda: Uses(nn.ParameterList([weight()]), 0), normal((N, T, C)))
    yield Row("ParameterDict", "", lambda: Uses(nn.ParameterDict({"w": weight()}), "w"), normal((N, T, C)))
    classes = lambda: (torch.randn(N, 8), torch.tensor([0, 4, 8, 5]))  # noqa: E731
    yield Row("AdaptiveLogSoftmaxWithLoss", "", lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 6], 2.0), classes,
              pick=lambda out: out.output)  # fmt: skip
    if hasattr(nn, "LinearCrossEntropyLoss"):
        yield Row("LinearCrossEntropyLoss", "reduction='none'",
                  lambda: nn.LinearCrossEntropyLoss(8, 10, bias=True, reduction="none"), classes)  # fmt: skip


def parametrizations_() -> Iterator[Row]:
    makes: list[tuple[str, Make, Callable[[], tuple[Any, ...]]]] = [
        ("Linear", lambda: nn.Linear(C, C), normal((N, T, C))),
        ("Conv2d", lambda: nn.Conv2d(4, 5, 2), normal((N, 4, 4, 3))),
        ("Embedding", lambda: nn.Embedding(7, C), ids(N, T)),
    ]
    for body, make, x in makes:
        yield Row("weight_norm", body, lambda make=make: parametrizations.weight_norm(make()), x)
        yield Row("spectral_norm", f"{body}, train()", lambda make=make: parametrizations.spectral_norm(make()), x)
        yield Row(
            "spectral_norm", f"{body}, eval()", lambda make=make: parametrizations.spectral_norm(make()).eval(), x
        )
        yield Row("orthogonal", body, lambda make=make: parametrizations.orthogonal(make()), x)
    for how in ("cayley", "householder"):
        yield Row("orthogonal", f"Linear, '{how}'",
                  lambda how=how: parametrizations.orthogonal(nn.Linear(C, C), orthogonal_map=how),
                  normal((N, C)))  # fmt: skip


ROWS = [
    *linear(),
    *convolutions(),
    *embeddings(),
    *norms(),
    *recurrences(),
    *attention(),
    *rest(),
    *parametrizations_(),
]


# ---- a run --------------------------------------------------------------------------------------------------------


def built(row: Row) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """The module, its inputs, and where their samples are."""
    torch.manual_seed(0)
    model, inputs = Called(row), row.inputs()
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        with torch.no_grad():
            model(*inputs)  # a lazy module finds out its shapes
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # nothing may be right because it is 0 or 1
                p.add_(torch.randn_like(p), alpha=0.5)
    return model, inputs, row.batch_dim


def served(row: Row, engine: str) -> str:
    """How an engine serves a module: exact, compared for every sample, or its error."""
    model, inputs, batch_dim = built(row)
    options: dict[str, Any] = {"batch_dim": batch_dim}
    report = persample.check(model, lambda out, _: readout(out), inputs, engine=engine, samples=N, **options)
    if report.failure is not None:
        return f"`{type(report.failure).__name__}`: {reason(str(report.failure))}"
    wrong = [r for r in report.rows if r.verdict != "exact" or max(r.error, r.sum_error) > EXACT]
    if wrong:
        raise AssertionError(f"{row.name} ({row.options}), engine={engine}\n{report}")
    if engine != "hooks":
        return "exact"
    found: dict[str, set[str]] = {}
    for r in report.rows:
        for function, how in re.findall(r"([\w.]+) \(([a-z ]+?)(?:, \d+x)?\)", r.served):
            found.setdefault(how, set()).add(function.rsplit(".", 1)[-1])
    return "; ".join(f"{how}: {', '.join(sorted(names))}" for how, names in sorted(found.items(), reverse=True))


def reason(message: str) -> str:
    """Why, in a few words."""
    return next(why for pattern, why in REASONS if re.search(pattern, message, re.DOTALL))


REASONS = [
    (r"training mode|no running statistics", "statistics of the batch"),
    (r"max_norm|embedding_renorm_", "the forward pass changes the weight"),
    (r"scale_grad_by_freq", "scaled by how often the batch looks an entry up"),
    (r"running_mean or running_var, which will be updated", "it changes its running statistics"),
    (r"SparseCPU", "sparse gradients"),
    (r"doesn't match the broadcast shape", "`torch.func` has no batched form of recurrences"),
    (r"\.item\(\)|stack expects each tensor to be equal size", "samples have several lengths"),
    (r"aten::nonzero", "shapes depend on values"),
]


def table(rows: list[Row]) -> str:
    """As Markdown, with rows that say the same joined."""
    engines = ("hooks", "vmap", "loop")
    lines = [f"| module | options | {' | '.join(f'`{e}`' for e in engines)} |", "|---|---|---|---|---|"]
    joined: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        joined.setdefault((row.name, *(served(row, engine) for engine in engines)), []).append(row.options)
    for (name, *how), options in joined.items():
        lines.append(f"| `{name}` | {'; '.join(o for o in options if o) or '-'} | {' | '.join(how)} |")
    return "\n".join(lines)


HEAD = """# Coverage

Every module of `torch.nn` that has parameters, and what serves it. Each line was run: what is no error is exact to
{exact:g}, against plain autograd on each sample alone, in float64. A rule knows how the gradient of a function factors,
also where a tensor derived from parameters is used (a normalised weight, a part of a projection); what has no rule goes
through the fallback, `vmap(vjp(...))` of that one call, which is exact and slower.

This page is made by `python tests/table_of_modules.py` (here with PyTorch {version}), and a test holds that a new run
gives the same.

"""


def page() -> str:
    """The whole page."""
    version = torch.__version__.split("+")[0]
    names = [*{row.name for row in parametrizations_()}]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about unusual options
            modules = table([row for row in ROWS if row.name not in names])
            parts = table([row for row in ROWS if row.name in names])
    finally:
        torch.set_default_dtype(before)
    head = HEAD.format(version=version, exact=EXACT)
    return f"{head}## Modules\n\n{modules}\n\n## Parametrizations\n\nOf `torch.nn.utils.parametrizations`.\n\n{parts}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
