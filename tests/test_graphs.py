"""Networks of torch_geometric on lists of graphs, collated inside the model: each against one graph at a time."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions at import, which PyTorch has deprecated
    pytest.importorskip("torch_geometric")
    from torch_geometric import nn as gnn
    from torch_geometric.data import Batch, Data
    from torch_geometric.utils import scatter, to_dense_adj, to_dense_batch

pytestmark = [  # of torch_geometric's own
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse .*:UserWarning"),
]
NODES = (3, 5, 2, 4)
F = 8


def mlp(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, o))


CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN": gnn.GCNConv,
    "GraphSAGE": gnn.SAGEConv,
    "GAT": gnn.GATConv,
    "GATv2": gnn.GATv2Conv,
    "GIN": lambda i, o: gnn.GINConv(mlp(i, o)),
    "GraphConv": gnn.GraphConv,
    "TAG": gnn.TAGConv,
    "Chebyshev": lambda i, o: gnn.ChebConv(i, o, 2),
    "transformer": gnn.TransformerConv,
    "ARMA": gnn.ARMAConv,
    "SGC": gnn.SGConv,
    "gated": gnn.ResGatedGraphConv,
    "EdgeConv": lambda i, o: gnn.EdgeConv(nn.Linear(2 * i, o)),
    "LEConv": gnn.LEConv,
    "FeaSt": gnn.FeaStConv,
    "ClusterGCN": gnn.ClusterGCNConv,
    "FiLM": gnn.FiLMConv,
}


class Network(nn.Module):
    """A convolution, what comes behind it, and a layer on the pooled features."""

    def __init__(self, conv: Callable[[int, int], nn.Module], rest: Any = None, pool: Any = None) -> None:
        super().__init__()
        self.conv, self.rest, self.head = conv(4, F), rest() if rest is not None else None, nn.Linear(F, 3)
        self.pool = pool or (lambda rest, h, b: gnn.global_mean_pool(h, b.batch))

    def forward(self, graphs: list[dict[str, Tensor]]) -> Tensor:
        b = Batch.from_data_list([Data(**graph) for graph in graphs])
        return self.head(self.pool(self.rest, self.conv(b.x, b.edge_index).tanh(), b))


def attends(rest: Any, h: Tensor, b: Any) -> Tensor:
    dense, mask = to_dense_batch(h, b.batch)
    return (rest(dense, dense, dense, key_padding_mask=~mask)[0] * mask[..., None]).sum(1)


def by_matrix(rest: Any, h: Tensor, b: Any) -> Tensor:
    dense, mask = to_dense_batch(h, b.batch)
    return (to_dense_adj(b.edge_index, b.batch).to(h.dtype) @ rest(dense) * mask[..., None]).sum(1)


def pooled(rest: Any, h: Tensor, b: Any) -> Tensor:
    h, edges, _, batch, *_ = rest[0](h, b.edge_index, None, b.batch)
    return gnn.global_mean_pool(rest[1](h, edges), batch)


def messages(reduce: str) -> Callable[[Any, Tensor, Any], Tensor]:
    def pool(rest: Any, h: Tensor, b: Any) -> Tensor:
        source, target = b.edge_index
        return gnn.global_add_pool(scatter(h[source], target, dim=0, dim_size=len(h), reduce=reduce), b.batch)

    return pool


def mean_of(f: Callable[[Any, Tensor, Any], Tensor]) -> Callable[[Any, Tensor, Any], Tensor]:
    return lambda rest, h, b: gnn.global_mean_pool(f(rest, h, b), b.batch)


NETWORKS: dict[str, Callable[[], Network]] = {
    **{name: (lambda conv=conv: Network(conv)) for name, conv in CONVOLUTIONS.items()},
    "sum": lambda: Network(gnn.GCNConv, None, lambda rest, h, b: gnn.global_add_pool(h, b.batch)),
    "maximum": lambda: Network(gnn.GCNConv, None, lambda rest, h, b: gnn.global_max_pool(h, b.batch)),
    "GraphNorm": lambda: Network(
        gnn.GCNConv, lambda: gnn.GraphNorm(F), mean_of(lambda rest, h, b: rest(h, b.batch, b.num_graphs))
    ),
    "LayerNorm of graphs": lambda: Network(
        gnn.GCNConv, lambda: gnn.LayerNorm(F), mean_of(lambda rest, h, b: rest(h, b.batch, b.num_graphs))
    ),
    "top k": lambda: Network(gnn.GCNConv, lambda: nn.ModuleList([gnn.TopKPooling(F, 0.5), gnn.GCNConv(F, F)]), pooled),
    "self-attention pooling": lambda: Network(
        gnn.GCNConv, lambda: nn.ModuleList([gnn.SAGPooling(F, 0.5), gnn.GCNConv(F, F)]), pooled
    ),
    "attentional": lambda: Network(
        gnn.GCNConv, lambda: gnn.AttentionalAggregation(nn.Linear(F, 1)), lambda rest, h, b: rest(h, b.batch)
    ),
    "Set2Set": lambda: Network(
        gnn.GCNConv,
        lambda: nn.ModuleList([gnn.Set2Set(F, 2), nn.Linear(2 * F, F)]),
        lambda rest, h, b: rest[1](rest[0](h, b.batch)),
    ),
    "dense, attention": lambda: Network(gnn.GCNConv, lambda: nn.MultiheadAttention(F, 2, batch_first=True), attends),
    "dense, adjacency": lambda: Network(gnn.GCNConv, lambda: nn.Linear(F, F), by_matrix),
    "mean of neighbours": lambda: Network(gnn.GCNConv, None, messages("mean")),
    "maximum of neighbours": lambda: Network(gnn.GCNConv, None, messages("max")),
    "slices": lambda: Network(
        gnn.GCNConv, None, lambda rest, h, b: torch.stack([h[i:j].mean(0) for i, j in itertools.pairwise(b.ptr)])
    ),
    "virtual node": lambda: Network(
        gnn.GCNConv,
        lambda: nn.Linear(F, F),
        mean_of(lambda rest, h, b: h + rest(gnn.global_mean_pool(h, b.batch))[b.batch]),
    ),
    "GraphUNet": lambda: Network(
        gnn.GCNConv,
        lambda: gnn.models.GraphUNet(F, F, F, 1),
        mean_of(lambda rest, h, b: rest(h, b.edge_index, b.batch)),
    ),
    "GPS": lambda: Network(
        gnn.GCNConv,
        lambda: gnn.GPSConv(F, gnn.GINConv(nn.Linear(F, F)), heads=2, norm=None),
        mean_of(lambda rest, h, b: rest(h, b.edge_index, b.batch)),
    ),
}


def graphs() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(k, 4).double(), "edge_index": torch.randint(k, (2, 2 * k))} for k in NODES]


def square(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().sum(1)


@pytest.mark.parametrize("verify", [False, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_graphs(name: str, verify: bool | None) -> None:
    model, xs, y = NETWORKS[name]().double(), graphs(), torch.randn(len(NODES), 3).double()
    G = persample.gradients(model, square, xs, y, batch_dim=list, verify=verify)
    parameters = dict(model.named_parameters())
    each = [
        torch.autograd.grad(
            square(model([graph]), target[None]).sum(), list(parameters.values()), allow_unused=True,
            materialize_grads=True,
        )
        for graph, target in zip(xs, y, strict=True)
    ]  # fmt: skip
    for parameter, rows in zip(parameters, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(G[parameter], torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_what_padding_changes_is_refused() -> None:
    """An LSTM that reads the nodes of every graph, padded to the largest, ends somewhere else alone."""

    def last(rest: Any, h: Tensor, b: Any) -> Tensor:
        return rest(h, b.batch)

    model = Network(gnn.GCNConv, lambda: gnn.LSTMAggregation(F, F), last).double()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, square, graphs(), torch.randn(len(NODES), 3).double(), batch_dim=list)


@pytest.mark.parametrize("norm", [lambda: gnn.BatchNorm(F), lambda: nn.BatchNorm1d(F)])
def test_batch_normalisation_over_all_nodes(norm: Callable[[], nn.Module]) -> None:
    """It couples graphs; the gradients of this batch's own losses are served by name."""

    def pool(rest: Any, h: Tensor, b: Any) -> Tensor:
        return gnn.global_add_pool(rest[1](rest[0](h), b.edge_index).tanh(), b.batch)

    def layers() -> nn.Module:
        return nn.ModuleList([norm(), gnn.GINConv(nn.Sequential(nn.Linear(F, F), nn.BatchNorm1d(F), nn.Tanh()))])

    model, xs, y = Network(gnn.GCNConv, layers, pool).double(), graphs(), torch.randn(len(NODES), 3).double()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, square, xs, y, batch_dim=list)
    G = persample.gradients(model, square, xs, y, batch_dim=list, coupled="loss")
    parameters = dict(model.named_parameters())
    each = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in square(model(xs), y)]
    for parameter, rows in zip(parameters, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(G[parameter], torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_entries_of_their_own_type() -> None:
    """`Data` holds tensors where they aren't seen: the rows are right, by a backward pass for each."""

    class Collated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = gnn.GCNConv(4, F), nn.Linear(F, 3)

        def forward(self, graphs: list[Data]) -> Tensor:
            b = Batch.from_data_list(graphs)
            return self.head(gnn.global_mean_pool(self.conv(b.x, b.edge_index).tanh(), b.batch))

    model, xs, y = Collated().double(), [Data(**graph) for graph in graphs()], torch.randn(len(NODES), 3).double()
    G = persample.gradients(model, square, xs, y, batch_dim=list)
    for n, (graph, target) in enumerate(zip(xs, y, strict=True)):
        grads = torch.autograd.grad(square(model([graph]), target[None]).sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(G[name][n], g, rtol=1e-9, atol=1e-9)
