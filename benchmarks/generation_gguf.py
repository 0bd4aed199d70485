"""A model as a GGUF file for llama.cpp, of the same weights, by gguf's own quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors import safe_open

from memdb import InvalidInputError

_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
_CUTTING = {"llama": "smollm", "qwen2": "qwen2"}  # how llama.cpp cuts texts; prompts come as tokens
_FILE_TYPES = {"Q8_0": 7, "Q4_1": 3}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, target: Path, kind: str) -> None:
    """Write a folder of Hugging Face (Llama, Qwen 2) as a GGUF file.

    Args:
        folder: with safetensors and tokenizer.json.
        target: the file.
        kind: of all matrices: `Q8_0` or `Q4_1`.

    Raises:
        InvalidInputError: it is of another architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = _ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise InvalidInputError(f"a model of type '{config['model_type']}' is not written as GGUF")
    writer = gguf.GGUFWriter(target, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_FILE_TYPES[kind])
    _add_tokenizer(writer, folder, config)
    form = gguf.GGMLQuantizationType[kind]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                values = opened.get_tensor(name).astype(np.float32)
                theirs = _name(name)
                if architecture == "llama" and ".attn_q." in theirs:
                    values = _turned(values, heads)
                if architecture == "llama" and ".attn_k." in theirs:
                    values = _turned(values, kv_heads)
                values = np.ascontiguousarray(values)
                if values.ndim == 2:
                    writer.add_tensor(theirs, quantize(values, form), raw_dtype=form)
                else:
                    writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    control = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    size = config["vocab_size"]
    texts = [f"[unused {i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, place in {**tokenizer["model"]["vocab"], **control}.items():
        texts[place] = text
        types[place] = gguf.TokenType.CONTROL if text in control else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_CUTTING[config["model_type"]])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    ends = config.get("eos_token_id")
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends or 0)


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _turned(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of a head as llama.cpp turns them: pairs side by side, not halves."""
    half = values.shape[0] // heads // 2
    apart = values.reshape(heads, 2, half, *values.shape[1:])
    return apart.swapaxes(1, 2).reshape(values.shape)
