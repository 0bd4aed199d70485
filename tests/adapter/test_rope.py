"""The engine's angles are those of the models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from memdb import MemoryShape, Rope
from memdb.codecs.rope import Turns, frequencies

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
KINDS: dict[str, dict[str, Any]] = {"default": {}, "linear": {"factor": 4.0}, "llama3": LLAMA3}


def config(kind: str, base: float, head_dim: int) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": base, **KINDS[kind]}
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_those_of_transformers(kind: str, base: float, head_dim: int) -> None:
    theirs = config(kind, base, head_dim)
    if kind in ROPE_INIT_FUNCTIONS:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    else:
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    assert scale == 1
    angles = frequencies(Rope(base, kind, KINDS[kind]), head_dim)
    assert angles is not None
    np.testing.assert_allclose(angles, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_turned_as_a_model_turns_them(kind: str) -> None:
    head_dim, length, prefix = 16, 100, (1, 2, 3)
    rope = Rope(10000.0, kind, KINDS[kind])
    shape = MemoryShape("m", (0,), 1, head_dim, "float32", prefix, rope=(rope,))
    keys = np.random.default_rng(0).standard_normal((length, head_dim)).astype(np.float32)
    places = torch.arange(len(prefix), len(prefix) + length)[None]
    embedding = LlamaRotaryEmbedding(config(kind, 10000.0, head_dim))
    there = torch.from_numpy(keys.copy())[None, None]
    _, expected = apply_rotary_pos_emb(there, there, *embedding(there, places))
    turns = Turns([frequencies(rope, head_dim)], shape)
    turns(keys, np.array([length]), np.arange(length, dtype=np.uint8))
    np.testing.assert_allclose(keys, expected[0, 0].numpy(), atol=1e-4)
