"""How keys turn, where a GGUF file says it in another way than transformers reads.

transformers takes the base from a file and passes over what stretches it: Llama 3's factors, which
lie in the file as a tensor, Phi's, and `linear` or `yarn`. Without them a model says other things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb import InvalidInputError
from model_adapter.gguf.file import GGUFFile, Stored

_FACTORS, _LONG, _SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
#: Of Llama 3.1 to 3.3, in transformers' words; the files say only what comes of it.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GLOBAL = "full_attention"


def stretch(config: Any, file: GGUFFile, tensors: Mapping[str, Stored]) -> None:
    """Add to a configuration, as transformers reads it, how the file stretches positions.

    Raises:
        InvalidInputError: in a way that transformers' configuration cannot say.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    by_kind = all(isinstance(value, dict) for value in parameters.values())
    told = parameters.get(_GLOBAL) if by_kind else parameters
    if told is None or told.get("rope_type", "default") != "default":
        return  # transformers has it
    found = _found(config, told, file, tensors, by_kind)
    if not found:
        return
    made = {**told, **found}
    config.rope_parameters = {**parameters, _GLOBAL: made} if by_kind else made


def _found(
    config: Any,
    told: Mapping[str, Any],
    file: GGUFFile,
    tensors: Mapping[str, Stored],
    by_kind: bool,
) -> dict[str, Any]:
    architecture = file.fields.get("general.architecture")
    said = f"{architecture}.rope.scaling."
    of_scaling = {
        name.removeprefix(said): value for name, value in file.fields.items() if said in name
    }
    original = of_scaling.get("original_context_length")
    if _LONG in tensors and _SHORT in tensors:
        original = original or config.max_position_embeddings
        attention = of_scaling.get("attn_factor")
        return {
            "rope_type": "longrope",
            "long_factor": _numbers(tensors[_LONG]).tolist(),
            "short_factor": _numbers(tensors[_SHORT]).tolist(),
            "original_max_position_embeddings": int(original),
            "factor": config.max_position_embeddings / original,
            **({} if attention is None else {"attention_factor": float(attention)}),
        }
    if _FACTORS in tensors and not by_kind:
        return _of_llama3(config, told, file, _numbers(tensors[_FACTORS]))
    factor = float(of_scaling.get("factor", 1.0))
    kind = of_scaling.get("type", "linear")
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        betas = {name: of_scaling.get(f"yarn_{name}") for name in ("beta_fast", "beta_slow")}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(original),
            **{name: float(beta) for name, beta in betas.items() if beta is not None},
        }
    raise _refused(file, f"by {kind!r} with the factor {factor:g}")


def _of_llama3(
    config: Any, told: Mapping[str, Any], file: GGUFFile, factors: NDArray[np.float32]
) -> dict[str, Any]:
    if np.allclose(factors, 1):
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = float(factors.max())
    waves = 2 * math.pi * told["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    part = np.clip((_LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - part) / whole + part)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise _refused(file, f"by factors of its own (tensor {_FACTORS})")
    return {"rope_type": "llama3", "factor": whole, **_LLAMA3}


def _numbers(stored: Stored) -> NDArray[np.float32]:
    return stored.rows(0, stored.shape[0])


def _refused(file: GGUFFile, how: str) -> InvalidInputError:
    return InvalidInputError(
        f"the GGUF file '{file.path}' stretches its positions {how}, which is not read here: take "
        "the model as a Hugging Face folder"
    )
