"""Every decoder that the installed transformers has, built tiny and random from its own
configuration class."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

#: What a configuration gets of these, where it has them.
_SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "vocab_size_per_layer_input": 400,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "emb_dim": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "ffn_dim": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 1024,
    "n_positions": 1024,
    "initializer_range": 0.3,  # so that attention is not uniform
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    # linear attention, and what is like it
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "n_mamba_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # latent attention (MLA), whose values are shorter than its keys
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    # vision
    "depth": 1,
    "image_size": 16,
    "patch_size": 8,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IN_THREE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_CONV = ["conv", "full_attention", "conv", "full_attention"]
#: What these alone get, by the type of configuration.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {"layer_types": _HYBRID},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "attention"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 32,
        "head_dim": 4,
    },
    "qwen2_vl_text": _IN_THREE,
    "qwen2_5_vl_text": _IN_THREE,
    "glm4v_text": _IN_THREE,
    "glm_ocr_text": _IN_THREE,
    "paddleocr_vl_text": _IN_THREE,
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "xdrope_section": [1, 1, 1, 1]}},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "mimo_v2_flash": {"v_head_dim": 6},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
}


#: What cannot be built so: of what it is made, no small values are known here, or a library is
#: missing. Nothing is said of these.
NOT_BUILT = {
    "blt",
    "chameleon",
    "cohere_compass",
    "cohere_compass_text",
    "dbrx",
    "deepseek_ocr2",
    "dots3_note",
    "ernie4_5_vl_moe",
    "evolla",
    "fast_vlm",
    "florence2",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "glm5_next",
    "granite4_vision",
    "granite_docling",
    "inkling2",
    "kosmos-2",
    "kosmos-2.5",
    "molmo2",
    "moshi",
    "muse_spark",
    "musicgen",
    "musicgen_melody",
    "nemotron_h_omni",
    "perception_lm",
    "pi0",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "step3p7",
    "zamba",
}


def names() -> list[str]:
    """Types of configuration of all decoders, and of all models that read images, too."""
    there = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(there - NOT_BUILT)


def tiny_config(name: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[name](**_values(CONFIG_MAPPING[name]))


def _values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    there = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {key: value for key, value in _SMALL.items() if key in there}
    if "kv_lora_rank" in there:  # each head has keys of its own
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    for part, of in kind.sub_configs.items():
        if dataclasses.is_dataclass(of):
            values[part] = _values(of)  # type: ignore[arg-type]
        elif (usual := getattr(kind(), part, None)) is not None:  # of a type that it names
            values[part] = {**_values(type(usual)), "model_type": usual.model_type}
    values.update(_OWN.get(kind.model_type, {}))
    sections = getattr(kind(), "rope_parameters", None) or {}
    if "mrope_section" in sections:  # positions in three dimensions: a third of a head each
        values["rope_parameters"] = {**sections, "mrope_section": [2, 1, 1]}
    return values


def tiny_of(name: str) -> Any:
    """A model of that type of configuration; the same weights each time."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForImageTextToText
    return auto.from_config(tiny_config(name))
