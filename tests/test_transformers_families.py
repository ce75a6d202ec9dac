"""Families of `transformers` beyond those of the zoo, built from tiny configurations: as they come, and exact.

The zoo holds one model for each difficulty, and tests every quantity on it; here are more architectures, each held
once against plain autograd on one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.case import N, Problem, readout
from zoo.huggingface import BART, IMAGE, LLAMA, ONES, TEXT, T, V, _build, _ids, _masked, _pair, _pixels, _text
from zoo.oracle import rows

import persample

pytest.importorskip("transformers")
Inputs = Callable[[], dict[str, Tensor]]


def tokens(n: int) -> Inputs:
    return lambda: {"input_ids": _ids(N, n)}


def normal(**shapes: tuple[int, ...]) -> Inputs:
    return lambda: {name: torch.randn(N, *shape) for name, shape in shapes.items()}


MOE = {**LLAMA, "num_experts_per_tok": 1, "experts_implementation": "eager", "num_experts": 2}
SPEECH = {
    "conv_dim": (4, 4), "conv_stride": (3, 2), "conv_kernel": (4, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, **ONES,
}  # fmt: skip
STAGES = {"num_channels": 2, "depths": [1, 1], "drop_path_rate": 0.0}

FAMILIES: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    # decoders
    "falcon": ("FalconForCausalLM", {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1,
               "num_attention_heads": 2, "use_cache": False}, _text),
    "gpt_neo, local": ("GPTNeoForCausalLM", {"vocab_size": V, "hidden_size": 8, "num_layers": 2, "num_heads": 2,
                       "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 8, "window_size": 2,
                       "use_cache": False}, _text),
    "gptj, rotary": ("GPTJForCausalLM", {"vocab_size": V, "n_embd": 8, "n_layer": 1, "n_head": 2, "rotary_dim": 4,
                     "n_positions": 8, "use_cache": False}, _text),
    "phi, partly rotary": ("PhiForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}, _text),
    "gemma2, soft caps": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 4}, _text),
    # mixtures of experts
    "qwen3 moe": ("Qwen3MoeForCausalLM", {**MOE, "moe_intermediate_size": 6, "head_dim": 4}, _text),
    "deepseek, latent attention": ("DeepseekV3ForCausalLM", {**MOE, "n_routed_experts": 2, "n_group": 1,
                                   "topk_group": 1, "moe_intermediate_size": 6, "first_k_dense_replace": 0,
                                   "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2,
                                   "v_head_dim": 4, "num_key_value_heads": 2}, _text),
    "switch": ("SwitchTransformersForConditionalGeneration", {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 6,
               "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "num_experts": 2,
               "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 8,
               "pad_token_id": 0, "use_cache": False}, _pair),
    # state spaces and recurrences
    "mamba2": ("Mamba2Model", {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "expand": 2,
               "conv_kernel": 2, "num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 2,
               "use_cache": False}, _text),
    "jamba": ("JambaForCausalLM", {**MOE, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 3, "mamba_dt_rank": 2,
              "mamba_d_conv": 2, "pad_token_id": 0}, _text),
    "recurrent gemma": ("RecurrentGemmaForCausalLM", {**LLAMA, "num_hidden_layers": 3, "lru_width": 8,
                        "attention_window_size": 4, "block_types": ["recurrent", "recurrent", "attention"],
                        "head_dim": 4}, _text),
    "xlstm": ("xLSTMForCausalLM", {"vocab_size": V, "hidden_size": 8, "num_heads": 2, "num_hidden_layers": 1,
              "num_blocks": 1, "chunk_size": 4, "use_cache": False, "qk_dim_factor": 1.0}, _text),
    # encoders
    "xlnet, time first": ("XLNetForSequenceClassification", {"vocab_size": V, "d_model": 8, "n_layer": 1, "n_head": 2,
                          "d_inner": 12}, _text),
    "funnel, pooled": ("FunnelModel", {"vocab_size": V, "block_sizes": [1, 1], "d_model": 8, "n_head": 2, "d_head": 4,
                       "d_inner": 12, "num_decoder_layers": 1}, tokens(8)),
    "mobilebert": ("MobileBertForSequenceClassification", {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1,
                   "num_attention_heads": 2, "intermediate_size": 8, "embedding_size": 8, "intra_bottleneck_size": 8,
                   "max_position_embeddings": 8}, _text),
    "convbert": ("ConvBertForSequenceClassification", {**TEXT, "embedding_size": 8, "head_ratio": 1,
                 "conv_kernel_size": 3, "num_groups": 1}, _text),
    "fnet": ("FNetForSequenceClassification", TEXT, _text),
    "modernbert": ("ModernBertForSequenceClassification", {**TEXT, "pad_token_id": 0}, _text),
    "deberta": ("DebertaForSequenceClassification", {**TEXT, "relative_attention": True, "max_relative_positions": 4,
                "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "pooler_hidden_size": 8}, _masked),
    "perceiver": ("PerceiverModel", {"num_latents": 3, "d_latents": 8, "d_model": 8, "num_blocks": 1,
                  "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
                  "num_cross_attention_heads": 1}, normal(inputs=(5, 8))),
    # encoders with decoders
    "m2m": ("M2M100ForConditionalGeneration", BART, _pair),
    "prophetnet": ("ProphetNetForConditionalGeneration", {"vocab_size": V, "hidden_size": 8, "encoder_ffn_dim": 12,
                   "num_encoder_layers": 1, "num_encoder_attention_heads": 2, "decoder_ffn_dim": 12,
                   "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "max_position_embeddings": 16,
                   "use_cache": False, "ngram": 2, "num_buckets": 4, "relative_max_distance": 4}, _pair),
    # speech and series
    "wavlm": ("WavLMModel", {**SPEECH, "num_buckets": 8, "max_bucket_distance": 16}, normal(input_values=(60,))),
    "sew": ("SEWModel", {**SPEECH, "squeeze_factor": 2}, normal(input_values=(60,))),
    "ast": ("ASTForAudioClassification", {**ONES, "patch_size": 2, "max_length": 8, "num_mel_bins": 4,
            "frequency_stride": 2, "time_stride": 2}, normal(input_values=(8, 4))),
    "patchtst": ("PatchTSTForPrediction", {"num_input_channels": 2, "context_length": 8, "patch_length": 2,
                 "patch_stride": 2, "num_hidden_layers": 1, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 12,
                 "prediction_length": 2, "norm_type": "layernorm", "loss": "mse"}, normal(past_values=(8, 2))),
    "decision transformer": ("DecisionTransformerModel", {"state_dim": 3, "act_dim": 2, "hidden_size": 8, "n_layer": 1,
                             "n_head": 2, "max_ep_len": 8, "n_positions": 32},
                             lambda: {**normal(states=(T, 3), actions=(T, 2), rewards=(T, 1), returns_to_go=(T, 1))(),
                                      "timesteps": torch.arange(T).repeat(N, 1), "attention_mask": torch.ones(N, T)}),
    # vision
    "poolformer": ("PoolFormerForImageClassification", {**STAGES, "patch_size": 3, "stride": 2, "hidden_sizes": [4, 4],
                   "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}, _pixels(16)),
    "regnet": ("RegNetForImageClassification", {"num_channels": 2, "embedding_size": 4, "hidden_sizes": [4, 4],
               "depths": [1, 1], "groups_width": 2}, _pixels(16)),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}, _pixels()),
    "hiera": ("HieraForImageClassification", {**STAGES, "image_size": [16, 16], "patch_size": [3, 3],
              "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": 4, "num_heads": [1, 2],
              "query_stride": [2, 2], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False],
              "num_query_pool": 1}, _pixels(16)),
    "focalnet": ("FocalNetForImageClassification", {**STAGES, "image_size": 16, "patch_size": 2, "embed_dim": 4,
                 "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [4, 8]}, _pixels(16)),
}  # fmt: skip


def losses(outputs: Any, _: Any = None) -> Tensor:
    """Losses of what each kind of model is for."""
    names = ("logits", "last_hidden_state", "prediction_outputs", "action_preds")
    return readout(next(outputs[name] for name in names if name in outputs))


def problem(name: str, options: dict[str, Any], inputs: Inputs) -> Problem:
    torch.set_default_dtype(torch.float64)
    try:
        return Problem(_build(name, "eager", options).double(), losses, inputs())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_samples_alone(family: str) -> None:
    p = problem(*FAMILIES[family])
    truth = rows(p)
    G = persample.gradients(p.model, p.loss_fn, p.inputs, verify=True)
    scale = float(truth.flat.abs().max())
    assert scale > 0 and G.unused == truth.unused
    for name, want in truth.rows.items():
        double = want.dtype is torch.float64  # routers may be in single precision, and are rounded by what a CPU has
        rtol, atol = (1e-9, 1e-11 * scale) if double else (1e-6, 1e-6 * scale)
        torch.testing.assert_close(G[name], want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_nystromformer_is_coupled_by_its_pseudo_inverse() -> None:
    """Its start is scaled by a maximum over the whole batch."""
    options = {**TEXT, "segment_means_seq_len": 6, "num_landmarks": 3, "conv_kernel_size": 3}
    p = problem("NystromformerForSequenceClassification", options, tokens(6))
    with pytest.raises(persample.BatchCoupledError, match=r"word_embeddings.*torch\.Tensor\.mul") as raised:
        persample.gradients(p.model, p.loss_fn, p.inputs)
    behind = [name for name, _ in p.model.named_parameters() if name not in raised.value.parameters]
    G = persample.gradients(p.model, p.loss_fn, p.inputs, params=behind)
    batch = losses(p.model(**p.inputs))
    for n in range(N):
        found = torch.autograd.grad(batch[n], [p.model.get_parameter(name) for name in behind], retain_graph=True)
        for name, want in zip(behind, found, strict=True):
            torch.testing.assert_close(G[name][n], want, rtol=1e-9, atol=1e-12)
