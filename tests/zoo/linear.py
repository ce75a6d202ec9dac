"""Linear layers, and bare parameters in every form in which people multiply and add them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, D, N, Problem, T, alone, fn, inner, normal, on


def _mlp() -> Problem:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(N, 6), torch.randint(3, (N,)))


class _OwnForward(nn.Linear):
    """A subclass of a known layer whose forward is another function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs() + 0.1, self.bias) * self.weight.sum()


class _PackedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(15, 5) / 3)
        self.bias = nn.Parameter(torch.randn(15) / 3)

    def forward(self, x: Tensor) -> Tensor:
        wq, wk, wv = self.weight.chunk(3)
        bq, bk, bv = self.bias.split(5)
        q, k, v = F.linear(x, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class _Lists(nn.Module):
    """Parameters in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.randn(D, D) / 2 for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(D), "scale": torch.randn(D)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.rows:
            x = torch.tanh(x @ w)
        return x * self.named["scale"] + self.named["shift"]


def _changed_after(p: nn.Module, x: Tensor) -> Tensor:
    """The exponential knows its result, and doesn't miss its argument."""
    scaled = p.w * 2
    w = scaled.exp()
    scaled.mul_(3)
    return x @ w


def _standardised(w: Tensor) -> Tensor:
    variance, mean = torch.var_mean(w, dim=1, keepdim=True)
    return (w - mean) / (variance + 1e-3).sqrt()


def _spectral(p: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, p.w / torch.dot(p.u, torch.mv(p.w, p.v)))


class _Buffer(nn.Module):
    """A weight times a buffer (pruning masks, equalised learning rates): a derived weight."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 6)
        self.register_buffer("mask", (torch.rand(6, D) > 0.5).double())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * self.mask, self.linear.bias)


X, X3 = (N, D), (N, T, D)

layers = [
    Case("mlp", _mlp),
    Case("linear_first", alone(lambda: nn.Linear(6, 8), N, 6)),
    Case("linear_no_bias", inner(lambda: nn.Linear(6, 8, bias=False), N, 6)),
    Case("linear_one_output", inner(lambda: nn.Linear(6, 1), N, 6)),
    Case("linear_rank3", inner(lambda: nn.Linear(6, 8), N, T, 6)),
    Case("linear_rank3_wide", inner(lambda: nn.Linear(12, 14), N, 2, 12)),
    Case("linear_rank4", inner(lambda: nn.Linear(5, 7), N, 2, T, 5)),
    Case("linear_rank3_t_equals_n", inner(lambda: nn.Linear(6, 8), 3, 3, 6)),
    Case("linear_rank3_no_bias_first", alone(lambda: nn.Linear(6, 8, bias=False), N, T, 6)),
    Case("linear_all_sizes_equal", inner(lambda: nn.Linear(4, 4), 4, 4, 4)),
    Case("linear_own_forward", inner(lambda: _OwnForward(D, 6), N, D)),
    Case("linear_one_sample", inner(lambda: nn.Linear(6, 8), 1, 6)),
    Case("linear_one_sample_rank3", inner(lambda: nn.Linear(6, 8), 1, T, 6)),
    Case("linear_non_contiguous", on(lambda: nn.Linear(6, 8), lambda: torch.randn(6, T, N).permute(2, 1, 0))),
    Case("linear_expanded_input", on(lambda: nn.Linear(6, 8), lambda: torch.randn(N, 1, 6).expand(N, T, 6))),
    Case("bilinear", on(lambda: nn.Bilinear(4, 5, 3), normal(N, 4), normal(N, 5))),
    Case("bilinear_no_bias_rank3", on(lambda: nn.Bilinear(4, 5, 3, bias=False), normal(N, T, 4), normal(N, T, 5))),
    Case("prelu_one", inner(lambda: nn.PReLU(), N, D)),
    Case("prelu_channels", inner(lambda: nn.PReLU(5), N, 5, 6)),
    Case("prelu_2d_input_channels", inner(lambda: nn.PReLU(5), N, 5)),
    Case("functional_prelu", fn(lambda p, x: F.prelu(x, p.a), (N, 5, 2), a=(5,))),
    Case("parameter_containers", on(_Lists, normal(N, D))),
    Case("packed_qkv_chunks", on(_PackedQKV, normal(N, T, D))),
    Case("weight_times_buffer", on(_Buffer, normal(N, D))),
]

products = [
    Case("matmul_right", fn(lambda p, x: x @ p.w, X, w=(D, 6))),
    Case("matmul_right_rank3", fn(lambda p, x: torch.matmul(x, p.w), X3, w=(D, 7))),
    Case("matmul_left", fn(lambda p, x: p.w @ x, (N, D, T), w=(7, D))),
    Case("matmul_vector", fn(lambda p, x: x @ p.w, X, w=(D,))),
    Case("matmul_vector_rank3", fn(lambda p, x: x @ p.w, X3, w=(D,))),
    Case("matmul_heads", fn(lambda p, x: x.unsqueeze(1) @ p.w, X3, w=(2, D, 6))),
    Case("matmul_heads_of_their_own", fn(lambda p, x: x @ p.w, (N, 2, T, D), w=(2, D, 6))),
    Case("matmul_heads_n_coincides", fn(lambda p, x: x.unsqueeze(1) @ p.w, X3, w=(N, D, 6))),
    Case("mm_method", fn(lambda p, x: x.mm(p.w), X, w=(D, 6))),
    Case("addmm", fn(lambda p, x: torch.addmm(p.b, x, p.w), X, w=(D, 6), b=(6,))),
    Case("addmm_scaled", fn(lambda p, x: torch.addmm(p.b, x, p.w, beta=0.5, alpha=2.0), X, w=(D, 6), b=(6,))),
    Case(
        "addmm_conv1d_of_gpt2",
        fn(lambda p, x: torch.addmm(p.b, x.view(-1, x.size(-1)), p.w).view(*x.shape[:-1], -1), X3, w=(D, 6), b=(6,)),
    ),
    Case("bmm_expanded", fn(lambda p, x: torch.bmm(x, p.w.expand(x.size(0), -1, -1)), X3, w=(D, 6))),
    Case("bmm_unsqueezed", fn(lambda p, x: torch.bmm(x, p.w.unsqueeze(0).expand(len(x), D, 6)), X3, w=(D, 6))),
    Case("baddbmm", fn(lambda p, x: torch.baddbmm(p.b, x, p.w.expand(len(x), -1, -1)), X3, w=(D, 6), b=(6,))),
    Case("einsum_linear", fn(lambda p, x: torch.einsum("ni,io->no", x, p.w), X, w=(D, 6))),
    Case("einsum_broadcast", fn(lambda p, x: torch.einsum("ni,io->no", x, p.w), X, w=(1, 6))),
    Case("einsum_tokens", fn(lambda p, x: torch.einsum("nti,hio->nhto", x, p.w), X3, w=(2, D, 6))),
    Case("einsum_mixes_tokens", fn(lambda p, x: torch.einsum("nti,st->nsi", x, p.w), X3, w=(7, T))),
    Case("einsum_two_parameters", fn(lambda p, x: torch.einsum("ni,ir,ro->no", x, p.a, p.b), X, a=(D, 2), b=(2, 6))),
    Case("einsum_parameter_first", fn(lambda p, x: torch.einsum("oi,nti->nto", p.w, x), X3, w=(6, D))),
    Case("tensordot", fn(lambda p, x: torch.tensordot(x, p.w, dims=([1, 2], [0, 1])), X3, w=(T, D, 6))),
    Case("functional_linear", fn(lambda p, x: F.linear(x, p.w, p.b), X3, w=(7, D), b=(7,))),
    Case("functional_bilinear", fn(lambda p, x: F.bilinear(x, x.cos(), p.w), X, w=(3, D, D))),
    Case("quadratic_form", fn(lambda p, x: torch.einsum("ni,ij,nj->n", x, p.w, x), X, w=(D, D))),
    Case("low_rank_product", fn(lambda p, x: x @ (p.a @ p.b), X3, a=(D, 2), b=(2, 6))),
    Case("cdist_to_centres", fn(lambda p, x: torch.cdist(x, p.w), X, w=(6, D))),
    Case("outer_with_sample_scalar", fn(lambda p, x: x[:, :1] * p.w, X, w=(6,))),
    Case(
        "complex_spectral_weight",
        fn(lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(p.w), n=6), (N, 6), w=(4, 2)),
    ),
]

elementwise = [
    Case("add_bias", fn(lambda p, x: x + p.b, X, b=(D,))),
    Case("add_bias_width_equals_n", fn(lambda p, x: x + p.b, (N, N), b=(N,))),
    Case("add_reversed", fn(lambda p, x: p.b + x, X3, b=(D,))),
    Case("add_alpha", fn(lambda p, x: torch.add(x, p.b, alpha=0.3), X, b=(D,))),
    Case("sub_and_rsub", fn(lambda p, x: (x - p.a).tanh() + (p.b - x), X3, a=(D,), b=(T, 1))),
    Case("mul_scale", fn(lambda p, x: x * p.s, X3, s=(D,))),
    Case("mul_scalar_parameter", fn(lambda p, x: x * p.s + p.b, X3, s=(), b=())),
    Case("mul_keeps_ones", fn(lambda p, x: x * p.s, X3, s=(1, T, 1))),
    Case("mul_makes_larger", fn(lambda p, x: x.unsqueeze(-1) * p.s, X, s=(6,))),
    Case("div", fn(lambda p, x: x / (p.s.square() + 1), X, s=(D,))),
    Case("rdiv", fn(lambda p, x: p.s / (x.square() + 1), X, s=(D,))),
    Case("pow_by_parameter", fn(lambda p, x: (x.square() + 1) ** p.s, X, s=(D,))),
    Case("addcmul", fn(lambda p, x: torch.addcmul(p.b, x, p.s, value=0.5), X, b=(D,), s=(D,))),
    Case("lerp", fn(lambda p, x: torch.lerp(x, p.b, p.s.sigmoid()), X, b=(D,), s=())),
    Case("where", fn(lambda p, x: torch.where(x > 0, x, p.b), X, b=(D,))),
    Case("maximum", fn(lambda p, x: torch.maximum(x, p.b), X, b=(D,))),
    Case("inplace_add_parameter", fn(lambda p, x: x.tanh().add_(p.b), X, b=(D,))),
    Case("inplace_mul_parameter", fn(lambda p, x: x.clone().mul_(p.s).add_(1), X, s=(D,))),
    Case("inplace_iadd", fn(lambda p, x: _iadd(x @ p.w, p.b), X, w=(D, 6), b=(6,))),
    Case(
        "cat_with_expanded",
        fn(lambda p, x: torch.cat([p.cls.expand(len(x), -1, -1), x], 1).square(), X3, cls=(1, 1, D)),
    ),
    Case("stack_with_expanded", fn(lambda p, x: torch.stack([x, p.b.expand_as(x)], 1).sin(), X, b=(D,))),
    Case("expand_repeat", fn(lambda p, x: x * p.b.repeat(len(x), 1), X, b=(D,))),
    Case("written_by_setitem", fn(lambda p, x: _write(x, p.b), X3, b=(D,))),
    Case("masked_fill_by_parameter", fn(lambda p, x: torch.where(x.isnan() | (x > 1), p.mask, x), X3, mask=(D,))),
    Case("parameter_chosen_by_sample", fn(lambda p, x: p.w[(x[:, 0] > 0).long()] * x, X, w=(2, D))),
    Case("gathered_by_sample", fn(lambda p, x: p.w.index_select(0, (x[:, 0] > 0).long()) * x, X, w=(2, D))),
]

views = [
    Case("weight_transposed_t", fn(lambda p, x: x @ p.w.t(), X, w=(6, D))),
    Case("weight_transposed_T", fn(lambda p, x: x @ p.w.T, X3, w=(7, D))),
    Case("weight_transposed_mT", fn(lambda p, x: x.unsqueeze(1) @ p.w.mT, X3, w=(2, 6, D))),
    Case("weight_double_transposed", fn(lambda p, x: x @ p.w.t().contiguous().t(), X, w=(D, 6))),
    Case("weight_view", fn(lambda p, x: x @ p.w.view(D, 6), X, w=(6 * D,))),
    Case("weight_reshape_permute", fn(lambda p, x: x @ p.w.permute(2, 0, 1).reshape(D, 6), X, w=(2, 3, D))),
    Case("weight_sliced", fn(lambda p, x: x @ p.w[1:6, ::2], X, w=(7, 8))),
    Case("weight_selected_row", fn(lambda p, x: x * p.w[2] + p.w[0], X, w=(3, D))),
    Case("weight_unbind", fn(lambda p, x: _affine(x, *p.w.unbind()), X3, w=(2, D))),
    Case("weight_padded", fn(lambda p, x: F.linear(x, F.pad(p.w, (1, 1))), X, w=(6, D - 2))),
    Case("weight_concatenated", fn(lambda p, x: x @ torch.cat([p.a, p.b], 1), X, a=(D, 2), b=(D, 4))),
    Case("weight_exponential", fn(lambda p, x: x @ p.w.exp(), X, w=(D, 6))),
    Case("weight_softmax", fn(lambda p, x: x @ p.w.softmax(0), X3, w=(D, 6))),
    Case("weight_normalised", fn(lambda p, x: F.linear(F.normalize(x, dim=-1), F.normalize(p.w)), X, w=(6, D))),
    Case("weight_symmetrised", fn(lambda p, x: x @ (p.w + p.w.t()), X, w=(D, D))),
    Case("weight_matrix_exp", fn(lambda p, x: x @ torch.matrix_exp(p.w - p.w.t()), X, w=(D, D))),
    Case("weight_used_as_is_and_derived", fn(lambda p, x: (x @ p.w).tanh() @ p.w.t(), X, w=(D, 6))),
    Case("weight_dtype_round_trip", fn(lambda p, x: x @ p.w.to(torch.float64).type_as(x), X, w=(D, 6))),
    Case("weight_low_rank", fn(lambda p, x: F.linear(x, p.w + 2 * p.b @ p.a), X, w=(6, D), a=(2, D), b=(6, 2))),
    Case("weight_low_rank_tokens", fn(lambda p, x: x @ F.linear(p.a, p.b, p.c), X3, a=(D, 2), b=(6, 2), c=(6,))),
    Case("weight_low_rank_of_low_rank", fn(lambda p, x: x @ (p.a @ p.b @ p.c), X3, a=(D, 2), b=(2, 3), c=(3, 4))),
    Case("weight_times_rows", fn(lambda p, x: F.linear(x, p.w * p.s), X, w=(6, D), s=(6, 1))),
    Case("weight_times_columns", fn(lambda p, x: F.linear(x, p.s * p.w), X3, w=(6, D), s=(D,))),
    Case("weight_times_scalar", fn(lambda p, x: F.linear(x, p.w * p.s), X, w=(6, D), s=())),
    Case("weight_times_weight", fn(lambda p, x: F.linear(x, p.w * p.s), X, w=(6, D), s=(6, D))),
    Case("weight_times_itself", fn(lambda p, x: F.linear(x, p.w * p.w), X, w=(6, D))),
    Case("weight_broadcast_both", fn(lambda p, x: F.linear(x, p.w * p.s), X, w=(6, 1), s=(1, D))),
    Case("weight_over_rows", fn(lambda p, x: F.linear(x, p.w / p.s.exp()), X3, w=(6, D), s=(6, 1))),
    Case("weight_over_scalar", fn(lambda p, x: F.linear(x, p.w / p.s.exp() / 3), X, w=(6, D), s=())),
    Case("weight_over_its_norm", fn(lambda p, x: F.linear(x, p.w / p.w.norm()), X, w=(6, D))),
    Case("weight_over_its_root", fn(lambda p, x: F.linear(x, p.w / (1 + p.w.square()).sqrt()), X, w=(6, D))),
    Case("weight_entries_chained", fn(lambda p, x: x @ (p.w.tanh() * p.s.sigmoid()).t(), X, w=(6, D), s=(6, D))),
    Case("weight_relu_in_place", fn(lambda p, x: x @ F.relu(p.w * 2, inplace=True), X, w=(D, 6))),
    Case("weight_changed_in_place_after", fn(_changed_after, X, w=(D, 6))),
    Case("weight_standardised", fn(lambda p, x: F.linear(x, _standardised(p.w)), X, w=(6, D))),
    Case("weight_normalised_columns", fn(lambda p, x: F.linear(x, F.normalize(p.w, dim=0)), X3, w=(6, D))),
    Case("weight_normalised_whole", fn(lambda p, x: F.linear(x, F.normalize(p.w, dim=(0, 1))), X, w=(6, D))),
    Case("weight_normalised_zero", fn(lambda p, x: F.linear(x, F.normalize(p.w * 1e-20)), X, w=(6, D))),
    Case(
        "weight_largest_singular", fn(lambda p, x: F.linear(x, p.w / (p.u @ (p.w @ p.v))), X, w=(6, D), u=(6,), v=(D,))
    ),
    Case("weight_dotted", fn(_spectral, X, w=(6, D), u=(6,), v=(D,))),
    Case(
        "weight_concatenated_rows", fn(lambda p, x: F.linear(x, torch.cat([p.a, p.b.tanh()])), X3, a=(2, D), b=(4, D))
    ),
    Case("weight_of_kernel_times", fn(lambda p, x: F.conv1d(x, p.w * p.s), (N, 2, 6), w=(3, 2, 3), s=(3, 1, 1))),
    Case("weight_of_kernel_masked", fn(lambda p, x: F.conv1d(x, p.w * p.s), (N, 2, 6), w=(3, 2, 3), s=(3, 2, 3))),
    Case("weight_of_kernel_taps", fn(lambda p, x: F.conv1d(x, p.w * p.s), (N, 2, 6), w=(3, 2, 3), s=(3,))),
    Case(
        "weight_of_kernel_joined",
        fn(lambda p, x: F.conv1d(x, torch.cat([p.a, p.b])), (N, 2, 6), a=(3, 2, 3), b=(1, 2, 3)),
    ),
    Case(
        "weight_of_table_scaled",
        fn(lambda p, x: F.embedding((x[:, :3] * 2).long() % 5, p.w * p.s), X, w=(5, 4), s=(4,)),
    ),
    Case("weight_times_mask", fn(lambda p, x: F.linear(x, p.w * (p.w > 0)), X, w=(6, D))),
    Case(
        "bias_concatenated", fn(lambda p, x: F.linear(x, p.w, torch.cat([p.a, p.b * 2])), X3, w=(6, D), a=(2,), b=(4,))
    ),
    Case("weight_zero_size", fn(lambda p, x: x + (x @ p.w).sum(1, keepdim=True), X, w=(D, 0)), unused=()),
]


def _iadd(y: Tensor, b: Tensor) -> Tensor:
    y += b
    return y


def _write(x: Tensor, b: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = b
    return y.sin()


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


cases = layers + products + elementwise + views
