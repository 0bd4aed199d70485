"""What has to be known of a Llama-like model, beside its weights, to run it without transformers.

It is noted when the weights are rounded, from transformers' own model, so that nothing of it is
computed in a second way: how keys turn, for instance, of which there are a dozen kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class _Form:
    """What classes differ in: whether norms multiply by 1 + weight, and which layers have the
    configuration's sliding window."""

    plus_one: bool
    windows: Literal["none", "all", "by kind"]


#: Models whose layers are of the form that `fused` has, by their class in transformers.
_KNOWN = {
    "LlamaForCausalLM": _Form(False, "none"),
    "MistralForCausalLM": _Form(False, "all"),
    "Qwen2ForCausalLM": _Form(False, "by kind"),
    "Qwen3ForCausalLM": _Form(False, "by kind"),
    "Gemma3ForCausalLM": _Form(True, "by kind"),
}
#: Of a gate, as transformers calls them: an operation of ONNX Runtime, and what it is told.
ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "silu": ("com.microsoft/QuickGelu", {"alpha": 1.0}),
    "gelu_pytorch_tanh": ("com.microsoft/FastGelu", {}),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
#: What some of these models do beside, and `fused` does not; none that is published does.
_BESIDE = ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Turn:
    """How queries and keys turn with their position: cosines and sines, times `factor`, of the
    position times each of `frequencies`, (half of head_dim)."""

    frequencies: list[float]
    factor: float


@dataclass(frozen=True)
class Described:
    """A model.

    Attributes:
        kind: its class in transformers.
        config: its configuration, as that says it in JSON.
        eos: token ids that end a text; None: it does not say.
        windows: for each layer, how many tokens are seen; None: all.
        turns: for each layer, which of `turning`.
        turning: how its keys turn.
        head_dim: length of a key.
        scaling: factor of attention's scores.
        plus_one: whether norms multiply by 1 + weight.
        activation: of its gates, see `ACTIVATIONS`.
        embedding_scale: what embeddings are multiplied by.
        head: the output head's matrix.
    """

    kind: str
    config: dict[str, Any]
    eos: int | list[int] | None
    windows: list[int | None]
    turns: list[str]
    turning: dict[str, Turn]
    head_dim: int
    scaling: float
    plus_one: bool
    activation: str
    embedding_scale: float
    head: str

    @classmethod
    def of(cls, model: Any) -> Described | None:
        """Of a model of transformers; None: it is none that `fused` runs."""
        kind, config = type(model).__name__, model.config
        if kind not in _KNOWN or not type(model).__module__.startswith("transformers."):
            return None
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        form = _KNOWN[kind]
        usual = _FULL if form.windows == "none" else _SLIDING
        kinds = [usual for _ in range(config.num_hidden_layers)]
        if form.windows == "by kind":
            kinds = list(config.layer_types)
        asked = [name for name in _BESIDE if getattr(config, name, None) not in (None, False)]
        if activation not in ACTIVATIONS or asked or not {*kinds} <= {_FULL, _SLIDING}:
            return None
        base = model.base_model
        turning, turns = _turning(base.rotary_emb, kinds)
        attention = base.layers[0].self_attn
        tied = model.get_output_embeddings().weight is base.embed_tokens.weight
        return cls(
            kind=kind,
            config=json.loads(config.to_json_string(use_diff=False)),
            eos=model.generation_config.eos_token_id,
            windows=[config.sliding_window if one == _SLIDING else None for one in kinds],
            turns=turns,
            turning=turning,
            head_dim=int(attention.head_dim),
            scaling=float(attention.scaling),
            plus_one=form.plus_one,
            activation=activation,
            embedding_scale=float(getattr(base.embed_tokens, "scalar_embed_scale", 1.0)),
            head="model.embed_tokens" if tied else "lm_head",
        )

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> Described:
        """As `noted` has it."""
        turning = {kind: Turn(**turn) for kind, turn in noted["turning"].items()}
        return cls(**{**noted, "turning": turning})

    @property
    def noted(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def _turning(rotary: Any, kinds: list[str]) -> tuple[dict[str, Turn], list[str]]:
    """How keys turn by kind of layer, where a model makes a difference; which of it each does."""
    if hasattr(rotary, "inv_freq"):
        found = Turn(rotary.inv_freq.tolist(), float(rotary.attention_scaling))
        return {"": found}, ["" for _ in kinds]
    turning = {
        kind: Turn(
            getattr(rotary, f"{kind}_inv_freq").tolist(),
            float(getattr(rotary, f"{kind}_attention_scaling")),
        )
        for kind in sorted({*kinds})
    }
    return turning, list(kinds)
