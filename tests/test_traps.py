"""Where per-sample gradients have gone wrong elsewhere: every trap is exact here, or its own clear error.

The first part are layers and models that are silently wrong, or missing, somewhere: each trap names the cases of the
zoo that hold it, so that none of them can get lost there. The rest is written out. The truth is plain autograd on one
sample at a time, in float64 at 1e-9.
"""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Case, cases, problem
from zoo.case import Problem, readout
from zoo.oracle import rows

import persample
from persample import cost, errors, reductions
from persample.factors import Dense, Outer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
    pytest.mark.filterwarnings("ignore:the criterion of the whole batch"),
]
N, D = 4, 5
ENGINES = ("hooks", "vmap", "loop")
BY_NAME = {case.name: case for case in cases}


def float64(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int = D, n: int = N) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))


def exact(p: Problem, *engines: str, batch_dim: int = 0, **options: Any) -> persample.Gradients:
    """Every engine gives the rows of plain autograd, and norms and Grams of them; the last engine's result."""
    truth = rows(p, batch_dim)
    for engine in engines or ENGINES:
        G = persample.gradients(p.model, p.loss_fn, p.inputs, p.targets, engine=engine, batch_dim=batch_dim, **options)
        assert tuple(G.names) == tuple(truth.rows) and set(G.unused) == set(truth.unused)
        for name, want in truth.rows.items():
            assert same(G[name], want), f"{engine}: {name}"
        assert same(G.norm(), truth.flat.norm(dim=1)), engine
        assert same(G.gram(), truth.flat @ truth.flat.T), engine
    return G


# ---- layers, as they are in the zoo -----------------------------------------------------------------------------

TRAPS: dict[str, str] = {
    "convolution_padding_modes": "conv_1d_circular conv_2d_reflect conv_3d_replicate conv_2d_circular conv_1d_reflect",
    "convolution_padding_same": "conv_1d_same_even_kernel conv_2d_same_even_kernel_dilated conv_3d_dilated_same",
    "convolution_grouped_norms": "conv_1d_grouped conv_2d_grouped_strided_dilated conv_2d_depthwise_multiplier "
    "conv_3d_grouped_strided conv_circular_same_grouped conv_transposed_2d_depthwise",
    "convolution_channels_last": "conv_2d_channels_last conv_2d_non_contiguous conv_2d_batch_not_outermost",
    "non_contiguous_and_expanded_inputs": "linear_non_contiguous linear_expanded_input conv_2d_expanded_input",
    "embedding_padding_idx": "embedding_padding embedding_negative_padding",
    "embedding_scale_grad_by_freq": "coupled_embedding_scaled_by_frequency",
    "bag_with_a_repeated_index": "bag_duplicates embedding_duplicates",
    "bag_max": "bag_max bag_offsets_max",
    "bag_padding_idx": "bag_padding bag_sum_padding bag_max_padding bag_offsets_padding",
    "weight_used_functionally": "tied_functionally functional_linear functional_conv",
    "tied_parameters": "tied_decoder tied_decoder_bias reuse_shared_weight",
    "parameter_also_in_a_penalty": "loss_penalty_by_attribute loss_penalty_in_scalar loss_penalty_only",
    "t_equals_n": "linear_rank3_t_equals_n tied_decoder_t_equals_n positions_arange_t_equals_n "
    "positions_weight_sliced_t_equals_n token_types_t_equals_n mha_sequence_first_t_equals_n lstm_t_equals_n",
    "broadcast_position_ids": "positions_arange_unsqueezed positions_arange_expanded token_types_from_buffer",
    "sequence_first_inputs": "batch_dim_one batch_dim_one_t_equals_n encoder_sequence_first gru_sequence_first",
    "flattened_inputs": "outputs_flattened_tokens net_flattened_tokens net_windows",
    "batch_norm_in_training": "coupled_batch_norm_1d coupled_batch_norm_2d coupled_batch_norm_3d",
    "batch_norm_without_running_statistics_in_eval": "coupled_batch_norm_without_statistics_eval",
    "batch_norm_functional": "coupled_batch_norm_functional",
    "batch_norm_sync": "norm_sync_batch_eval",
    "frozen_or_unused_parameters": "frozen_layers unused_layers cut_by_detach",
    "in_place_relu": "inplace_relu inplace_relu_last",
    "in_place_residual": "inplace_residual inplace_everywhere",
    "module_called_twice": "reuse_linear_twice reuse_conv_twice reuse_norm_twice reuse_in_list",
    "module_nested_or_in_sibling_branches": "reuse_nested reuse_branches reuse_block_twice reuse_lengths_differ",
    "children_called_with_keywords_none_or_int": "children_called_with_keywords inputs_tuple_with_none_and_int",
    "several_inputs_tuple_or_dict_outputs": "inputs_nested outputs_tuple outputs_dict outputs_dataclass",
    "child_module_named_output": "children_with_reserved_names",
    "multihead_attention_out_proj": "mha mha_sequence_first mha_kdim_vdim mha_bias_kv mha_everything transformer",
    "packed_sequences": "rnn_packed gru_packed lstm_packed lstm_packed_two_layers_bidirectional lstm_packed_sorted",
    "recurrent_proj_size": "lstm_projection lstm_projection_everything lstm_packed_projection",
    "recurrent_bidirectional_and_multi_layer": "rnn_two_layers_bidirectional gru_two_layers_bidirectional "
    "lstm_two_layers_bidirectional",
    "recurrent_cells_in_a_loop": "rnn_cell gru_cell lstm_cell rnn_cell_relu_no_bias",
    "norms_without_bias": "norm_layer_no_bias norm_layer_bias_only norm_rms norm_group_no_affine",
    "instance_norm_with_running_statistics": "norm_instance_running_eval norm_instance_train",
    "transposed_convolution_output_padding": "conv_transposed_1d_all_options conv_transposed_2d_output_padding "
    "conv_transposed_3d_all_options conv_transposed_output_size",
    "prelu_and_bilinear": "prelu_one prelu_channels prelu_2d_input_channels bilinear bilinear_no_bias_rank3",
    "bare_parameters": "add_bias mul_scale where lerp pow_by_parameter written_by_setitem complex_spectral_weight",
    "parametrised_weights": "weight_norm_linear weight_norm_conv weight_norm_cached weight_norm_by_pre_hook "
    "spectral_norm_eval orthogonal_matrix_exp orthogonal_cayley parametrized_symmetric",
    "subclass_with_its_own_forward": "linear_own_forward",
    "activation_checkpointing": "checkpoint checkpoint_sequential net_gpt_checkpointed",
    "one_sample": "linear_one_sample conv_2d_one_sample mha_one_sample lstm_one_sample net_gpt_one_sample "
    "positions_and_class_token_one_sample embedding_one_sample",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_layer(trap: str) -> None:
    for case in (BY_NAME[name] for name in TRAPS[trap].split()):
        for engine in ("hooks", "vmap"):
            one_case(case, engine)


def one_case(case: Case, engine: str) -> None:
    p = problem(case)
    if engine in case.raises:
        with pytest.raises(getattr(errors, case.raises[engine][0])):
            persample.gradients(p.model, p.loss_fn, p.inputs, p.targets, engine=engine, batch_dim=case.batch_dim)
    else:
        exact(p, engine, batch_dim=case.batch_dim)


# ---- silently wrong somewhere -----------------------------------------------------------------------------------


def test_second_backward_and_accumulation_overwrite_nothing() -> None:
    """Elsewhere the second result replaces the first, or turns into a list."""
    model, got = nn.Linear(D, 3).double(), []
    batches = [float64(seed=seed) for seed in range(3)]
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    for x in batches:
        readout(model(x)).mean().backward()  # accumulates in .grad
    handle.remove()
    for G, x in zip(got, batches, strict=True):
        truth = rows(Problem(model, readout, x))
        assert isinstance(G["weight"], Tensor) and same(G.flat(), truth.flat)
    assert same(model.weight.grad, sum(G.mean()["weight"] for G in got))  # type: ignore[arg-type]


def test_variance_in_single_precision_is_not_negative() -> None:
    """``E[g^2] - E[g]^2`` cancels where rows hardly differ."""
    model = nn.Linear(3, 2)
    x = torch.ones(64, 3) * 1000 + torch.randn(64, 3) * 0.01
    for quantities in (None, ["variance", "std"]):
        G = persample.gradients(model, lambda out, _: out.sum(1), x, quantities=quantities)
        variance = G.variance()["weight"]
        assert bool((variance >= 0).all()) and not G.std()["weight"].isnan().any()
        assert torch.allclose(variance, x.double().var(0, unbiased=False).float().expand(2, 3), rtol=2e-2)


@pytest.mark.parametrize("kernel", ["tokens", "offsets", "native", None])
def test_convolutions_that_read_nothing_but_padding(kernel: Literal["tokens", "offsets", "native"] | None) -> None:
    """One output position, behind more zeros than the kernel is wide: there is nothing of the input to cut."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 3, 2, stride=9, padding=3)).double()
    x = float64(N, 2, 4)
    with cost.using(conv_rows=kernel):
        G = exact(Problem(model, lambda out, _: out.flatten(1).square().sum(1), x, None), "hooks")
    assert not G["1.weight"].any() and G["1.bias"].any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_convolution_without_channels() -> None:
    model, x = nn.Conv2d(0, 3, 2).double(), float64(N, 0, 4, 4)
    loss = lambda out, _: (out + 1).flatten(1).square().sum(1)  # noqa: E731
    G, L = (persample.gradients(model, loss, x, engine=engine) for engine in ("hooks", "loop"))
    assert G["weight"].shape == (N, 3, 0, 2, 2) and same(G["bias"], L["bias"]) and same(G.gram(), L.gram())


@pytest.mark.parametrize("forced", ["tokens", "stream"])
def test_norms_of_two_nearly_opposite_tokens(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sum_ts (a_t a_s)(b_t b_s)`` cancels: single precision loses what double would not."""
    a, b = torch.randn(N, 1, 64), torch.randn(N, 1, 64)
    left = torch.cat([a, -a * (1 + 1e-3)], 1).unsqueeze(1)
    right = torch.cat([b, b], 1).unsqueeze(1)
    g = Outer(left, right, torch.Size((64, 64)))
    truth = torch.einsum("nkto,nkti->noi", left.double(), right.double()).flatten(1).norm(dim=1)
    if forced == "stream":
        monkeypatch.setattr(cost, "outer_norm", lambda *_: "stream")
    got = persample.Gradients({"w": g}, torch.zeros(N)).norm()
    assert float(((got - truth) / truth).abs().max()) < 1e-3


def test_norms_in_half_precision_accumulate_in_single() -> None:
    value = torch.full((2, 100_000), 0.01, dtype=torch.bfloat16)
    norm = persample.Gradients({"w": Dense(value)}, torch.zeros(2)).norm()
    assert norm.dtype is torch.float32
    assert torch.allclose(norm.double(), value.double().norm(dim=1), rtol=1e-4)  # summed in bf16 it stops growing at 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [["mean"], ["variance", "sum"]])
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_sums_have_one_type_whatever_is_kept(dtype: torch.dtype, asked: list[str], max_bytes: int | None) -> None:
    """That of the rows, rounded once; second moments, variances and norms stay in single precision."""
    model, x = nn.Linear(D, 3).to(dtype), float64().to(dtype)
    loss = lambda out, _: out.float().square().sum(1)  # noqa: E731
    G = persample.gradients(model, loss, x)
    S = persample.gradients(model, loss, x, quantities=asked, max_bytes=max_bytes)
    exact = {name: p.double().sum(0) for name, p in G.dense().items()}
    for name, kept in G.sum().items():
        assert kept.dtype == S.sum()[name].dtype == S.mean()[name].dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(kept.double(), exact[name], rtol=4 * eps, atol=8 * eps)  # rows are rounded, too
        torch.testing.assert_close(S.sum()[name], kept, rtol=4 * eps, atol=4 * eps)  # added up in another order
    assert G.norm().dtype == G.variance()["bias"].dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
def test_sync_batch_norm_in_training_couples(engine: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.SyncBatchNorm(D), nn.Linear(D, 2)).double()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, readout, float64(), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_norm_patched_for_functorch_is_no_instance_norm(engine: str) -> None:
    """``replace_all_batch_norm_modules_`` and vmap give InstanceNorm in disguise."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten()).double()
    torch.func.replace_all_batch_norm_modules_(model)
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, readout, float64(N, 2, 6), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["normalize", "layer_norm", "group_norm", "relu", "Tensor.norm", "batch_norm"])
def test_wrappers_in_the_place_of_functions_run_once(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode is told the wrapper, which ran already, for it has the name of the function that it calls."""
    place, name = (Tensor, name[7:]) if name.startswith("Tensor") else (F, name)
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: 2 * original(*args, **kwargs))

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(super().forward(F.normalize(x, dim=1)))
            return x * x.detach().norm(dim=1, keepdim=True)

    norms = {"layer_norm": nn.LayerNorm(4), "group_norm": nn.GroupNorm(2, 4), "batch_norm": nn.BatchNorm1d(4).eval()}
    model = Net(nn.Linear(D, 4), norms.get(name, nn.Identity())).double()
    x = float64()
    rows = [torch.autograd.grad(readout(model(x[n : n + 1]), None).sum(), [*model.parameters()]) for n in range(N)]
    for verify in (True, False):
        G = persample.gradients(model, readout, x, engine=engine, verify=verify)
        assert same(G.flat(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    if name == "batch_norm":
        with pytest.raises(persample.BatchCoupledError):
            persample.gradients(model.train(), readout, x, engine=engine, verify=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_rows_belong_to_the_masks_of_the_outputs(engine: str) -> None:
    """Elsewhere the mask of the gradients is another than that of the forward the user saw."""
    model, x = nn.Sequential(nn.Linear(D, 40), nn.Dropout(0.5)).double(), float64()
    G = persample.gradients(model, lambda out, _: out.sum(1), x, engine=engine)
    mask = (G.outputs != 0).double() * 2
    assert 0.3 < float(mask.mean()) / 2 < 0.7 and not torch.equal(mask[0], mask[1])
    assert same(G["0.weight"], mask.unsqueeze(2) * x.unsqueeze(1)) and same(G["0.bias"], mask)
    assert same(G.losses, G.outputs.sum(1))


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_no_rows_of_zeros(engine: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)).double()
    model[0].weight.requires_grad_(False)
    G = persample.gradients(model, readout, float64(), engine=engine)
    assert G.names == ("0.bias", "2.weight", "2.bias") and "0.weight" not in G and G.unused == ()
    with pytest.raises(persample.UnknownParameterError, match=r"0\.weight"):
        G["0.weight"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_are_unscaled_whatever_the_reduction(engine: str, reduction: str) -> None:
    """A mean where a sum was meant: factor N, and N^2 in what is quadratic."""
    model, x, y = nn.Linear(D, D).double(), float64(), labels()
    G = persample.gradients(model, nn.CrossEntropyLoss(reduction=reduction), x, y, engine=engine)
    truth = rows(Problem(model, nn.CrossEntropyLoss(reduction="sum"), x, y))
    assert same(G.flat(), truth.flat)
    squares = torch.cat([v.flatten() for v in G.second_moment().values()])
    assert same(squares, truth.flat.square().mean(0))


def test_scores_are_not_projected_unless_asked() -> None:
    model, x, y = nn.Linear(D, D).double(), float64(), labels()
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    flat = rows(Problem(model, nn.CrossEntropyLoss(), x, y)).flat
    assert same(persample.attribution.grad_dot(G, G), flat @ flat.T)


# ---- raises or is missing somewhere -----------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True), nn.Linear(6, D)).double()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels(n=len(x)), reduction="none")


def truth_of(model: nn.Module, x: Tensor) -> Tensor:
    return rows(Problem(model, nn.CrossEntropyLoss(), x, labels(n=len(x)))).flat


def test_two_forwards_before_a_backward_and_backward_in_another_order() -> None:
    model, first, second = net(), float64(seed=1), float64(3, D, seed=2)
    with persample.extend(model) as recorder:
        a, b = losses_of(model, first), losses_of(model, second)
        later, earlier = recorder.gradients(b), recorder.gradients(a)
    assert same(later.flat(), truth_of(model, second)) and same(earlier.flat(), truth_of(model, first))


def test_forward_without_backward_and_a_step_that_raised_half_way() -> None:
    model, x, got = net(), float64(), []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    losses_of(model, x)  # no backward
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError):
        model(float64(N, D + 1))  # raises in the middle of a forward
    broken = losses_of(model, x).mean()
    broken.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.backward()  # raises in the middle of a backward
    losses_of(model, x).mean().backward()
    handle.remove()
    assert len(got) == 1 and same(got[0].flat(), truth_of(model, x))
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_backward_that_raises_after_some_calls_have_arrived() -> None:
    """What was collected until then does not end up in the next result."""
    model, x, got = net(), float64(), []
    handle = persample.extend(model, on_backward=got.append, reduction="mean")
    fails = [True]

    def fail(g: Tensor) -> None:
        if fails[0]:
            raise ZeroDivisionError

    hooked = model[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    with pytest.raises(ZeroDivisionError):
        losses_of(model, x).mean().backward()
    fails[0] = False
    losses_of(model, x).mean().backward()
    handle.remove()
    hooked.remove()
    assert len(got) == 1 and same(got[0].flat(), truth_of(model, x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Ternary(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.tanh(), None if bias is None else bias.exp())


class Gain(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


@pytest.mark.parametrize("layer", [Doubled(D, D), Gain(D), Ternary(1, 2, 3)], ids=lambda m: type(m).__name__)
def test_subclasses_do_not_take_the_parents_rule(layer: nn.Module) -> None:
    shape = (N, 1, D) if isinstance(layer, Ternary) else (N, D)
    exact(Problem(copy.deepcopy(layer).double(), readout, float64(*shape)))


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
)
def test_precisions(dtype: torch.dtype, autocast: bool) -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8))
    exact_rows = rows(Problem(copy.deepcopy(model).double(), readout, float64(N, 2, 6))).flat
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        G = persample.gradients(model.to(dtype), readout, float64(N, 2, 6).to(dtype))
    tolerance = 1e-12 if dtype is torch.float64 else 5e-2 if autocast or dtype is torch.bfloat16 else 1e-5
    assert G.flat().dtype is dtype and G.norm().dtype is torch.promote_types(dtype, torch.float32)
    assert float((G.flat().double() - exact_rows).norm() / exact_rows.norm()) < tolerance


def test_compiled_models_run_as_they_were_written() -> None:
    model, x = net(), float64()
    compiled = torch.compile(model, backend="eager")
    G = persample.gradients(compiled, nn.CrossEntropyLoss(), x, labels())
    assert same(G.flat(), truth_of(model, x))


def test_requires_grad_changed_after_extending() -> None:
    model, x = net(), float64()
    handle = persample.extend(model)
    model[0].requires_grad_(False)
    assert handle.gradients(losses_of(model, x)).names == ("2.weight", "2.bias")
    model[0].requires_grad_(True)
    G = handle.gradients(losses_of(model, x))
    handle.remove()
    assert same(G.flat(), truth_of(model, x))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_sample(engine: str) -> None:
    with pytest.raises(persample.EmptyBatchError, match="N = 0"):
        persample.gradients(net(), readout, float64(0, D), engine=engine)


def test_extended_model_without_samples() -> None:
    model = net()
    with persample.extend(model), pytest.raises(persample.EmptyBatchError):
        model(float64(0, D))
    assert model(float64(0, D)).shape == (0, D)


def test_transforms_of_torch_func_over_an_extended_model() -> None:
    model, x = net(), float64()
    with persample.extend(model):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels())
    assert same(torch.cat([r.flatten(1) for r in found.values()], 1), truth_of(model, x))


class Registered(nn.Module):
    """One module under two names, one parameter under three."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)
        self.b = self.a
        self.c = nn.Linear(D, D)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_registered_twice_is_itself_afterwards(fails: bool) -> None:
    """``torch.func.functional_call`` puts parameters back in the wrong order and leaves tensors of its own behind."""
    model = Registered().double()
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}

    def loss_fn(out: Tensor, _: Any) -> Tensor:
        if fails:
            raise ZeroDivisionError
        return readout(out)

    for engine in ENGINES:
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            persample.gradients(model, loss_fn, float64(), engine=engine)
        assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    if not fails:
        exact(Problem(model, readout, float64()))


# ---- checks that catch most of it -------------------------------------------------------------------------------


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def with_rule(rule: Callable[..., Any]) -> Any:
    return persample.rule(F.linear)(rule)


def linear(call: Any, g: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, shift: int, scale: float) -> Any:
    g = call.samples(g).squeeze(1)
    yield weight, lambda: scale * torch.einsum("no,ni->noi", g, call.samples(input).squeeze(1)).roll(shift, 0)
    if bias is not None:
        yield bias, lambda: g


def test_sum_of_rows_catches_a_wrong_rule() -> None:
    rule = with_rule(lambda call, g, input, weight, bias=None: linear(call, g, input, weight, bias, 0, 2.0))
    try:
        report = persample.check(Straight().double(), readout, float64(), samples=N)
    finally:
        rule.remove()
    assert [row.verdict for row in report.rows] == ["wrong", "exact", "wrong", "exact"]
    assert all(row.sum_error > 0.5 for row in report.rows[::2]) and "don't add up" in report.rows[0].reason


def test_sum_of_rows_catches_wrong_imaginary_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    check, right = importlib.import_module("persample.check"), reductions.weighted_sum
    monkeypatch.setattr(check, "weighted_sum", lambda g: right(g).conj())
    model, x = nn.Linear(3, 2, dtype=torch.complex128), torch.randn(N, 3, dtype=torch.complex128)
    report = persample.check(model, lambda out, _: out.abs().square().sum(1), x, samples=0)
    assert [row.verdict for row in report.rows] == ["wrong", "wrong"]


def test_only_a_sample_alone_catches_rows_of_other_samples() -> None:
    rule = with_rule(lambda call, g, input, weight, bias=None: linear(call, g, input, weight, bias, 1, 1.0))
    try:
        report = persample.check(Straight().double(), readout, float64(), samples=N)
        with pytest.raises(persample.VerificationError, match=r"'[ab]\.weight'"):
            persample.gradients(Straight().double(), readout, float64())
    finally:
        rule.remove()
    assert [row.verdict for row in report.rows] == ["wrong", "exact", "wrong", "exact"]
    assert all(row.sum_error < 1e-9 for row in report.rows) and "single rows are not" in report.rows[0].reason


def test_missed_uses_are_caught() -> None:
    """A parameter that is also used where no call can be seen is named, not forgotten."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    class Model(Straight):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + Hidden.apply(x, self.a.weight)

    with pytest.raises(persample.CaptureError, match=r"'a\.weight'"):
        persample.gradients(Model().double(), readout, float64())


@pytest.mark.parametrize(
    "body",
    [lambda x: x - x.mean(0), lambda x: x / x.detach().norm(), lambda x: x.softmax(0), lambda x: x.sort(0).values],
    ids=["centred", "normed", "softmax", "sorted"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_alone_catches_hidden_coupling(body: Callable[[Tensor], Tensor], engine: str) -> None:
    class Model(Straight):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(body(self.a(x)))

    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(Model().double(), readout, float64(), engine=engine)


def test_the_sample_axis_is_looked_for_at_every_call() -> None:
    class Model(Straight):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x[: len(x) - 1]).sum(0).expand(len(x), D))

    with pytest.raises((persample.SampleAxisError, persample.BatchCoupledError)):
        persample.gradients(Model().double(), readout, float64())
    with pytest.raises(persample.LossError, match=r"\(20,\)"):
        persample.gradients(Straight().double(), lambda out, _: out.flatten(), float64())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_parameter_has_rows_or_is_listed(engine: str) -> None:
    class Model(Straight):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Linear(D, D)

    model = Model().double()
    G = persample.gradients(model, readout, float64(), engine=engine)
    assert set(G.names) == {name for name, _ in model.named_parameters()}
    assert G.unused == ("never.weight", "never.bias") and not G["never.weight"].any()


# ---- what people ask for ----------------------------------------------------------------------------------------


def test_per_sample_gradients_where_possible_and_grad_everywhere() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Linear(D, 2)).double()
    x = float64()
    with persample.extend(model, params="[12]") as recorder:
        losses = readout(model(x))
        G = recorder.gradients(losses)
        losses.sum().backward()
    assert set(G.names) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert model[0].weight.grad is not None and same(G.sum()["2.weight"], model[2].weight.grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_hundreds_of_steps_leave_nothing_behind(engine: str) -> None:
    """Memory flat, no hooks, no attributes, no modes."""
    model = nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True), nn.LSTM(6, 4, batch_first=True)).double()
    model = (
        nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True), nn.Linear(6, D)).double() if engine == "vmap" else model
    )
    attributes = [set(vars(m)) for m in model.modules()]
    x, before = float64(3, 2, D), 0

    def loss_fn(out: Any, _: Any) -> Tensor:
        return readout(out[0] if isinstance(out, tuple) else out)

    for step in range(120 if engine == "loop" else 250):
        verify = None if step % 50 == 0 else False
        G = persample.gradients(
            model, loss_fn, x, engine=engine, verify=verify, quantities=["norm"] if step % 2 else None
        )
        assert G.norm().shape == (3,)
        if step == 20:
            before = alive()
    assert alive() <= before + 3
    assert attributes == [set(vars(m)) for m in model.modules()]
    hooks = [getattr(m, kind) for m in model.modules() for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    assert not any(hooks) and not any(p._backward_hooks for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not torch.overrides._get_current_function_mode_stack()


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


class Tokens(nn.Module):
    """A stem with a normalisation, whose image becomes tokens: the gradient of a single image lies channels last."""

    def __init__(self, norm: nn.Module, axes: int = 2) -> None:
        super().__init__()
        self.stem = (nn.Conv2d, nn.Conv3d)[axes - 2](2, 3, 2)
        self.norm, self.tokens, self.head = norm, nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(self.norm(self.stem(x)).flatten(2).mT)).square().mean((1, 2))


@pytest.mark.parametrize(
    ("norm", "axes"),
    [(nn.BatchNorm2d(3), 2), (nn.BatchNorm3d(3), 3), (nn.InstanceNorm2d(3, affine=True), 2)],
    ids=["batch", "batch of volumes", "instance"],
)
def test_normalised_images_alone_whose_gradient_is_channels_last(norm: nn.Module, axes: int) -> None:
    # The backward pass of PyTorch 2.13 is wrong for them: as a batch of two, they are right.
    torch.manual_seed(0)
    model, x = Tokens(norm, axes).double().eval(), float64(N, 2, *[4] * axes)
    p = dict(model.named_parameters())
    twice = [torch.autograd.grad(model(x[[n, n]])[0], [*p.values()]) for n in range(N)]
    expected = {name: torch.stack(g) for name, g in zip(p, zip(*twice, strict=True), strict=True)}

    def check(G: persample.Gradients, n: int = N) -> None:
        assert all(same(G[name], rows[:n]) for name, rows in expected.items())

    for engine in ENGINES:
        check(persample.gradients(model, lambda o, _: o, x, x, engine=engine, verify=True))
        check(persample.gradients(model, lambda o, _: o, x[:1], x[:1], engine=engine, verify=True), 1)
    check(persample.gradients(model, lambda o, _: o, x, x, max_bytes=1, verify=False))
    assert persample.check(model, lambda o, _: o, x, x).ok
    with persample.extend(model) as recorder:
        check(recorder.gradients(model(x[:1])), 1)


@pytest.mark.parametrize("engine", ["vmap", "compiled"])
def test_a_parameter_held_elsewhere_that_the_model_maps_over(engine: str) -> None:
    # As containers of stacked parameters do: no call is seen before vmap has wrapped the parameter.
    functorch = torch._C._functorch

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(3, 2, D))
            self.held = (self.weight,)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)

            def one(_: Tensor) -> Tensor:
                level = functorch.maybe_current_level()
                return F.linear(h, functorch._add_batch_dim(self.held[0], 0, level))

            return torch.vmap(one, out_dims=1)(torch.zeros(3))

    torch.manual_seed(0)
    model, x = Stacked().double(), float64()
    with pytest.raises(errors.CaptureError, match="'weight' is used through a reference of its own"):
        persample.gradients(model, lambda o, _: o.square().flatten(1).sum(1), x, x, engine=engine, verify=False)
