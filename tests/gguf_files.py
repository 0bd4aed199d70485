"""Small GGUF files, as llama.cpp writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray

from model_adapter import LanguageModel
from tests.helpers import tiny_model

F32, Q5, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q5_0", "Q8_0"))
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
}


def random_model(architecture: str, **changes: object) -> LanguageModel:
    """Qwen2's has biases, which are not zero, and its head is its embedding."""
    given: dict[str, object] = {"tie_word_embeddings": architecture == "qwen2"}
    if architecture == "qwen3_moe":
        given |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    made = tiny_model(architecture, **(given | changes))
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return made


def write_gguf(
    file: Path,
    made: LanguageModel,
    kind: Callable[[str], gguf.GGMLQuantizationType] = lambda _: F32,
    without: str = "",
    parts: int = 1,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> None:
    """As llama.cpp writes a model: its names, and for Llama its order of the rows of q and k.

    Args:
        file: its name; llama.cpp's names of parts come of it.
        made: the model.
        kind: of the matrices, by their names in the file.
        without: a tensor that is left out.
        parts: files that it is split into.
        more: what else is written.
    """
    architecture, config = made.config.model_type, made.config
    tensors = len(list(made.model.parameters()))
    split = {"split_max_tensors": -(-tensors // parts)} if parts > 1 else {}
    kind_of_model = ARCHITECTURES[architecture]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind_of_model], **split)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = json.loads(made.tokenizer_json)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    control = {token["content"] for token in tokenizer["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([types.CONTROL if t in control else types.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(made.tokenizer.chat_template)
    for known, values in _tensors(made):
        if known != without:
            stored = kind(known) if values.ndim >= 2 else F32
            writer.add_tensor(known, quantize(values, stored), raw_dtype=stored)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(made: LanguageModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What llama.cpp makes of a model's weights."""
    architecture, config = made.config.model_type, made.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, weight in made.model.named_parameters():
        values = weight.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            for part, some in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                layer = name.split(".")[2]
                yield f"blk.{layer}.ffn_{part}_exps.weight", np.ascontiguousarray(some)
            continue
        stem, _, ending = name.rpartition(".")
        if name.endswith("experts.down_proj"):
            stem, ending = name, "weight"
        known = f"{names.get_name(stem)}.{ending}"
        if architecture == "llama" and (".attn_q." in known or ".attn_k." in known):
            rows, columns = values.shape
            heads = rows // config.head_dim
            values = values.reshape(heads, 2, config.head_dim // 2, columns)
            values = np.ascontiguousarray(values.swapaxes(1, 2).reshape(rows, columns))
        if architecture == "gemma2" and known.endswith("norm.weight"):
            values = values + 1
        yield known, values


def mixed(name: str) -> gguf.GGMLQuantizationType:
    return Q5 if "token_embd" in name else Q8 if "ffn_down" in name or "attn_k" in name else F32
