"""Models of transformers that attend by `function`: it is known to transformers' public interface.

Apart from the function, since transformers takes a second and a half to import what models are
made of, and one that reads by weights of 8 bits needs none of it.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from model_adapter.attention.function import memory_attention
from model_adapter.attention.sight import Rule

NAME = "memdb"


def attend_by_memdb(model: Any) -> None:
    """Let a model of transformers attend by `memory_attention`."""
    model.set_attn_implementation(NAME)


def _rule(*_: Any, **arguments: Any) -> Rule:
    function = arguments["mask_function"]
    return Rule(
        function,
        function is causal_mask_function,
        # transformers leaves a plain causal mask out.
        lambda: sdpa_mask(**{**arguments, "allow_is_causal_skip": False}),
    )


AttentionInterface.register(NAME, memory_attention)
AttentionMaskInterface.register(NAME, _rule)
