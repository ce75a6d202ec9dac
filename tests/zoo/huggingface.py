"""Models of `transformers` as they come, built from tiny random configurations; LoRA adapters by `peft`.

Nothing is fetched. Dropout is off (eval); what a loss sees is one field of the model's output, per sample.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import VMAP_NUMBERS, Case, N, Problem, readout

V, T = 11, 3  # vocabulary, tokens
ONES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TEXT: dict[str, Any] = {"vocab_size": V, "max_position_embeddings": 8, **ONES}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "use_cache": False}
BOS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 2, **ONES}
BART: dict[str, Any] = {
    "vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 8,
    "use_cache": False, **BOS,
}  # fmt: skip


def _build(name: str, attention: str, options: dict[str, Any]) -> nn.Module:
    transformers = importlib.import_module("transformers")
    kind = getattr(transformers, name)
    config = kind.config_class(**options)
    model: nn.Module = kind._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():  # the usual initial values make attention uniform: its gradients would test little
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, V, shape or (N, T))


def _mask() -> Tensor:
    """Sample 1 has one token less, at the end."""
    mask = torch.ones(N, T, dtype=torch.long)
    mask[1, -1] = 0
    return mask


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _masked() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "attention_mask": _mask()}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(N, 2)}


def _pixels(size: int = 8, channels: int = 2) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(N, channels, size, size)}


class _Only(nn.Module):
    """A model of which we take only these outputs: the others mix samples (similarities of all pairs)."""

    def __init__(self, body: nn.Module, *fields: str) -> None:
        super().__init__()
        self.body, self.fields = body, fields

    def forward(self, **inputs: Any) -> list[Tensor]:
        outputs = self.body(**inputs)
        return [outputs[field] for field in self.fields]


def _hf(
    name: str, inputs: Callable[[], dict[str, Any]], *, attention: str = "eager",
    change: Callable[[nn.Module], nn.Module] = lambda model: model, **options: Any,
) -> Callable[[], Problem]:  # fmt: skip
    def build() -> Problem:
        model = change(_build(name, attention, options))
        return Problem(model, lambda outputs, targets: readout(_seen(outputs)), inputs())

    return build


def _seen(outputs: Any) -> Any:
    """What the loss sees: logits, or the last hidden state."""
    if isinstance(outputs, list):
        return outputs
    return outputs["logits" if "logits" in outputs else "last_hidden_state"]


def _lora(model: nn.Module) -> nn.Module:
    """Low-rank adapters beside frozen weights; both factors random, so that both have gradients."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between the two packages
        adapted: nn.Module = peft.get_peft_model(model, config)
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    return adapted.eval()


GPT2: dict[str, Any] = {
    "vocab_size": V, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2, "use_cache": False, **BOS,
}  # fmt: skip

_SPEECH: dict[str, Any] = {k: v for k, v in BART.items() if k != "max_position_embeddings"}

_gpt = [
    ("gpt2", _hf("GPT2LMHeadModel", _text, **GPT2)),
    ("gpt2_sdpa", _hf("GPT2LMHeadModel", _text, attention="sdpa", **GPT2)),
    ("gpt2_mask", _hf("GPT2LMHeadModel", _masked, attention="sdpa", **GPT2)),
    ("gpt2_caches", _hf("GPT2LMHeadModel", _text, **{**GPT2, "use_cache": True})),
]

_decoders = [
    ("llama", _hf("LlamaForCausalLM", _text, **LLAMA)),
    ("llama_sdpa_mask", _hf("LlamaForCausalLM", _masked, attention="sdpa", **LLAMA)),
    ("mistral_window", _hf("MistralForCausalLM", _text, sliding_window=2, **LLAMA)),
    ("qwen2_tied", _hf("Qwen2ForCausalLM", _text, tie_word_embeddings=True, **LLAMA)),
    ("gpt_neox", _hf("GPTNeoXForCausalLM", _text, use_cache=False, **TEXT)),
    ("bloom", _hf("BloomForCausalLM", _text, vocab_size=V, hidden_size=8, n_layer=1, n_head=2, use_cache=False)),
    (
        "opt",
        _hf(
            "OPTForCausalLM",
            _text,
            vocab_size=V,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=12,
            max_position_embeddings=8,
            word_embed_proj_dim=8,
            use_cache=False,
            **BOS,
        ),
    ),
    (
        "mixtral",
        _hf(
            "MixtralForCausalLM",
            _text,
            num_local_experts=2,
            num_experts_per_tok=1,
            experts_implementation="eager",
            **LLAMA,
        ),
    ),
    (
        "mixtral_batched_experts",
        _hf(
            "MixtralForCausalLM",
            _text,
            num_local_experts=2,
            num_experts_per_tok=1,
            experts_implementation="batched_mm",
            **LLAMA,
        ),
    ),
    (
        "mamba",
        _hf(
            "MambaModel",
            _text,
            vocab_size=V,
            hidden_size=6,
            num_hidden_layers=1,
            state_size=3,
            expand=2,
            conv_kernel=2,
            time_step_rank=2,
            use_cache=False,
        ),
    ),
]

_encoder_decoders = [
    (
        "t5",
        _hf(
            "T5ForConditionalGeneration",
            _pair,
            vocab_size=V,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            use_cache=False,
            relative_attention_num_buckets=4,
            relative_attention_max_distance=6,
            pad_token_id=0,
        ),
    ),
    ("bart", _hf("BartForConditionalGeneration", _pair, **BART)),
    (
        "whisper",
        _hf(
            "WhisperForConditionalGeneration",
            lambda: {"input_features": torch.randn(N, 4, 12), "decoder_input_ids": _ids(N, 2)},
            num_mel_bins=4,
            max_source_positions=6,
            max_target_positions=4,
            **_SPEECH,
        ),
    ),
    (
        "wav2vec2",
        _hf(
            "Wav2Vec2ForCTC",
            lambda: {"input_values": torch.randn(N, 60)},
            vocab_size=V,
            conv_dim=(4, 4),
            conv_stride=(3, 2),
            conv_kernel=(4, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            **ONES,
        ),
    ),
]

_encoders = [
    ("bert", _hf("BertForSequenceClassification", _masked, **TEXT)),
    ("bert_sdpa_tied", _hf("BertForMaskedLM", _text, attention="sdpa", **TEXT)),
    ("roberta", _hf("RobertaForSequenceClassification", _text, **TEXT, pad_token_id=1)),
    (
        "distilbert",
        _hf(
            "DistilBertForSequenceClassification",
            _masked,
            vocab_size=V,
            dim=8,
            n_layers=1,
            n_heads=2,
            hidden_dim=12,
            max_position_embeddings=8,
        ),
    ),
    (
        "albert_shares_layers",
        _hf(
            "AlbertForSequenceClassification",
            _text,
            embedding_size=5,
            num_hidden_groups=1,
            **{**TEXT, "num_hidden_layers": 2},
        ),
    ),
    ("electra", _hf("ElectraForTokenClassification", _text, embedding_size=5, **TEXT)),
    (
        "deberta_relative",
        _hf(
            "DebertaV2ForSequenceClassification",
            _text,
            relative_attention=True,
            max_relative_positions=4,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            type_vocab_size=0,
            **TEXT,
        ),
    ),
]

_vision = [
    ("vit", _hf("ViTForImageClassification", _pixels(), **IMAGE)),
    ("vit_sdpa", _hf("ViTForImageClassification", _pixels(), attention="sdpa", **IMAGE)),
    ("deit", _hf("DeiTForImageClassification", _pixels(), **IMAGE)),
    ("beit_relative", _hf("BeitForImageClassification", _pixels(), use_relative_position_bias=True, **IMAGE)),
    (
        "swin",
        _hf(
            "SwinForImageClassification",
            _pixels(16),
            image_size=16,
            patch_size=2,
            num_channels=2,
            embed_dim=4,
            depths=[2, 1],
            num_heads=[1, 2],
            window_size=4,
            drop_path_rate=0.0,
        ),
    ),
    (
        "convnext",
        _hf(
            "ConvNextForImageClassification",
            _pixels(),
            num_channels=2,
            patch_size=2,
            num_stages=2,
            hidden_sizes=[4, 6],
            depths=[1, 1],
            drop_path_rate=0.0,
        ),
    ),
    (
        "resnet_eval",
        _hf(
            "ResNetForImageClassification",
            _pixels(16),
            num_channels=2,
            embedding_size=4,
            hidden_sizes=[4, 6],
            depths=[1, 1],
            layer_type="basic",
        ),
    ),
    (
        "segformer",
        _hf(
            "SegformerForSemanticSegmentation",
            _pixels(16),
            num_channels=2,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[4, 8],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=6,
        ),
    ),
]

_clip = _hf(
    "CLIPModel", lambda: {"input_ids": _ids(), **_pixels()()}, projection_dim=4,
    change=lambda model: _Only(model, "image_embeds", "text_embeds"),
    text_config={**TEXT, **BOS}, vision_config=IMAGE,
)  # fmt: skip

_RAISES: dict[str, dict[str, tuple[str, str]]] = {
    "bloom": {"vmap": ("CaptureError", "an autograd.Function without setup_context")},
    **dict.fromkeys(("gpt2", "gpt2_sdpa", "gpt2_mask", "gpt2_caches", "llama_sdpa_mask", "mixtral"), VMAP_NUMBERS),
    **dict.fromkeys(("bert", "distilbert", "deberta_relative"), VMAP_NUMBERS),
}

cases = [
    *(Case(f"hf_{name}", build, needs="transformers", single=True, raises=_RAISES.get(name, {}))
      for name, build in _gpt + _decoders + _encoder_decoders + _encoders + _vision),
    Case("hf_clip", _clip, needs="transformers", single=True, unused=("body.logit_scale",)),
    Case("peft_lora_gpt2", _hf("GPT2LMHeadModel", _text, change=_lora, **GPT2), needs="peft", single=True,
         raises=VMAP_NUMBERS),
]  # fmt: skip
