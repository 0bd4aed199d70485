"""A pass of a Llama-like model in few calls: all between two attentions is one graph.

Called one by one from Python, the operations of a token's pass take longer than its products by
weights of 8 bits. A layer of these models has no other form than here, in any of their versions
that the class is named for; a model of another class runs as transformers has it, over linear
layers of 8 bits. `tests/adapter/test_eight_bit.py` holds the two against each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_adapter.models.eight_bit.file import WeightFile
from model_adapter.models.eight_bit.graph import PLACES, ROWS, TABLES, Graph, bound
from model_adapter.models.eight_bit.huge_pages import in_huge_pages

#: Models whose layers are of the form here, by their class in transformers; the value: whether
#: their norms multiply by 1 + weight.
_KNOWN = {
    "LlamaModel": False,
    "MistralModel": False,
    "Qwen2Model": False,
    "Qwen3Model": False,
    "Gemma3TextModel": True,
}
#: Sequences side by side up to which what a pass writes into is kept for the next.
_FEW = 16


def fuse(base: Any, names: Mapping[int, str], file: WeightFile) -> bool:
    """Let a model without its head run in few calls, if it is one that is known here.

    Args:
        base: of transformers; its linear layers are in the file. Its `forward` changes.
        names: of its weights in the file, by the `id` of module: `NAME.weight`, `NAME.bias`.
        file: of the weights.

    Returns:
        Whether it does now.
    """
    config = base.config
    if type(base).__name__ not in _KNOWN or getattr(config, "use_bidirectional_attention", False):
        return False
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        return False
    base.forward = _FusedModel(base, names, file, activation).forward
    return True


#: Of a gate, as transformers calls them: an operation of ONNX Runtime, and what it is told.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "silu": ("com.microsoft/QuickGelu", {"alpha": 1.0}),
    "gelu_pytorch_tanh": ("com.microsoft/FastGelu", {}),
}


class _FusedModel:
    """The graphs of a model: before its first attention, between two, behind the last."""

    def __init__(
        self, base: Any, names: Mapping[int, str], file: WeightFile, activation: str
    ) -> None:
        config = base.config
        self._embed, self._rotary, self._config = base.embed_tokens, base.rotary_emb, config
        self._attentions = [layer.self_attn for layer in base.layers]
        kinds = getattr(config, "layer_types", None)
        self._kinds = kinds or [None] * len(self._attentions)
        self._asking = [
            {
                "dropout": 0.0,
                "scaling": attention.scaling,
                "sliding_window": getattr(attention, "sliding_window", None),
            }
            for attention in self._attentions
        ]
        # Gemma 3 turns by its kind of layer.
        self._turns_by_kind = type(base).__name__.startswith("Gemma3")
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._head_dim = int(self._attentions[0].head_dim)
        self._width = int(config.hidden_size)
        self._of_thread = threading.local()
        self._of_a_step: Any = None
        maker = _Maker(names, file, _KNOWN[type(base).__name__], _ACTIVATIONS[activation])
        self._made: tuple[int, list[Any]] | None = None
        self._making = threading.Lock()

        def make() -> list[Any]:
            layers, threads = list(base.layers), torch.get_num_threads()
            stages = [maker.stage(None, layers[0], None, self._shape, threads)]
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                stages.append(maker.stage(layer, following, base.norm, self._shape, threads))
            return stages

        self._make = make

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self._width, self._heads, self._kv_heads, self._head_dim

    @property
    def stages(self) -> list[Any]:
        """The graphs, made for the first pass."""
        process = os.getpid()  # a child that was forked has not the threads of its parent's
        if self._made is None or self._made[0] != process:
            with self._making:
                if self._made is None or self._made[0] != process:
                    self._of_thread = threading.local()
                    with in_huge_pages():
                        self._made = process, self._make()
        return self._made[1]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the model's own, which says what each is."""
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens, _ = x.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self._config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + tokens)[None]
        masks = self._masks(x, attention_mask, past_key_values, position_ids, **kwargs)
        turns = self._turns(x, position_ids)
        attend = ALL_ATTENTION_FUNCTIONS[self._config._attn_implementation]
        room = self._room(batch * tokens)
        room.state.copy_(x.reshape(-1, self._width))
        shape = batch, tokens, -1, self._head_dim
        # Who looks on may keep what it sees.
        kept = kwargs.get("observer") is not None
        turned, value = (part.view(shape).transpose(1, 2) for part in room.projected)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        for layer, (attention, kind) in enumerate(zip(self._attentions, self._kinds, strict=True)):
            room.run(layer, turns[kind])
            keys, values = (key, value)
            if past_key_values is not None:
                keys, values = past_key_values.update(key, value, layer)
            mixed, _ = attend(
                attention,
                query.clone() if kept else query,
                keys,
                values,
                masks[kind] if isinstance(masks, dict) else masks,
                **self._asking[layer],
                **kwargs,
            )
            room.mixed.copy_(mixed.reshape(batch * tokens, -1))
        room.run(len(self._attentions), None)
        return BaseModelOutputWithPast(
            last_hidden_state=room.normed.clone().view(batch, tokens, self._width),
            past_key_values=past_key_values,
        )

    def _masks(
        self, x: Tensor, given: Tensor | None, past: Any, positions: Tensor, **kwargs: Any
    ) -> Any:
        """As transformers makes them. Where a `Sight` says what is seen, a mask is no more than a
        rule, the same for every step."""
        step = x.shape[1] == 1 and kwargs.get("explicit_memory") is not None and past is not None
        if not step:
            return create_masks_for_generate(self._config, x, given, past, positions)
        if self._of_a_step is None:
            self._of_a_step = create_masks_for_generate(self._config, x, given, past, positions)
        return self._of_a_step

    def _turns(self, x: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines of each kind of layer, (batch * tokens, half of head_dim)."""
        positions = positions.expand(len(x), -1)
        half = self._head_dim // 2

        def turn(*kind: str | None) -> tuple[Tensor, Tensor]:
            cos, sin = self._rotary(x, positions, *kind)
            first, second = (part[..., :half].reshape(-1, half) for part in (cos, sin))
            return first, second

        kinds = set(self._kinds)
        if self._turns_by_kind:
            return {kind: turn(kind) for kind in kinds}
        return dict.fromkeys(kinds, turn())

    def _room(self, rows: int) -> _Room:
        stages = self.stages
        if rows > _FEW:
            return _Room(stages, rows, self._shape)
        kept: dict[int, _Room] = self._of_thread.__dict__.setdefault("rooms", {})
        if rows not in kept:
            kept[rows] = _Room(stages, rows, self._shape)
        return kept[rows]


class _Room:
    """What a pass of so many rows writes into, bound to the graphs; for one thread."""

    def __init__(self, stages: list[Any], rows: int, shape: tuple[int, int, int, int]) -> None:
        width, heads, kv_heads, head_dim = shape
        #: (rows, width): the residual stream, before attention and behind; normed at the end.
        self.state = torch.empty(rows, width)
        self.normed = torch.empty(rows, width)
        #: (rows, heads * head_dim): queries and keys, values; and what attention made of them.
        sizes = ((heads + kv_heads) * head_dim, kv_heads * head_dim)
        self.projected = tuple(torch.empty(rows, size) for size in sizes)
        self.mixed = torch.empty(rows, heads * head_dim)
        self._next = torch.empty(rows, width)
        self._cos, self._sin = torch.empty(2, rows, head_dim // 2)
        self._places = torch.arange(min(rows, ROWS))
        self._turned: object = None
        self._stages = stages
        self._runs = [self._bound(number) for number in range(len(stages))]

    def run(self, stage: int, turn: tuple[Tensor, Tensor] | None) -> None:
        """Run a graph, with the cosines and sines of the layer that comes."""
        if turn is not None and turn is not self._turned:
            self._cos.copy_(turn[0])
            self._sin.copy_(turn[1])
            self._turned = turn
        for binding in self._runs[stage]:
            self._stages[stage].run_with_iobinding(binding)

    def _bound(self, stage: int) -> list[Any]:
        last = len(self._stages) - 1
        # The stream goes from one to the other and back: a graph does not write what it reads.
        here, there = (self.state, self._next) if stage % 2 else (self._next, self.state)
        inputs = {"state": here, "mixed": self.mixed}
        outputs = {"turned": self.projected[0], "value": self.projected[1]}
        if stage == 0:
            inputs = {"state": self.state}
        elif stage < last:
            outputs["next"] = there
        if stage == last:
            outputs = {"normed": self.normed}
        else:
            inputs |= {"cos": self._cos, "sin": self._sin}
        bindings = []
        rows = len(self.state)
        for start in range(0, rows, ROWS):
            end = min(start + ROWS, rows)
            own = {name: tensor[start:end] for name, tensor in inputs.items()}
            if stage < last:
                own[PLACES] = self._places[: end - start]
            made = {name: tensor[start:end] for name, tensor in outputs.items()}
            bindings.append(bound(self._stages[stage], own, made))
        return bindings


class _Maker:
    """Makes the graphs of a model."""

    def __init__(
        self, names: Mapping[int, str], file: WeightFile, plus_one: bool, activation: Any
    ) -> None:
        self._names, self._file = names, file
        self._plus_one, self._activation = plus_one, activation

    def stage(
        self,
        layer: Any,
        following: Any,
        norm: Any,
        shape: tuple[int, int, int, int],
        threads: int,
    ) -> Any:
        """The rest of a layer behind its attention, and the next one up to its own.

        Args:
            layer: None: there is none before.
            following: None: there is none behind, but the model's norm.
            norm: that one.
            shape: width, heads, kv heads, head_dim.
            threads: that share a product.
        """
        width, heads, kv_heads, head_dim = shape
        graph = Graph(self._file)
        inputs, outputs = {"state": width}, {}
        norm = norm if following is None else following.input_layernorm
        normed = "normed" if following is None else "before"
        if layer is None:
            self._norm(graph, norm, "state", normed)
        else:
            inputs["mixed"] = heads * head_dim
            self._rest(graph, layer)
            summed = "" if following is None else "next"
            self._add(graph, "middle", "change", summed, norm, normed)
        if following is None:
            return graph.session(inputs, {"normed": width}, threads)
        if layer is not None:
            outputs["next"] = width
        inputs |= {"cos": head_dim // 2, "sin": head_dim // 2, PLACES: 0}
        outputs |= {"turned": (heads + kv_heads) * head_dim, "value": kv_heads * head_dim}
        self._project(graph, following.self_attn, heads, kv_heads, head_dim)
        return graph.session(inputs, outputs, threads)

    def _rest(self, graph: Graph, layer: Any) -> None:
        """Behind attention: its output is added to the stream, which is `middle` then, and the MLP
        makes of it what is added next, `change`."""
        attention, mlp = layer.self_attn, layer.mlp
        four = hasattr(layer, "pre_feedforward_layernorm")  # norms of a layer: Gemma
        mixed = attention.o_proj
        self._linears(graph, [mixed], "mixed", {"attended": mixed.out_features})
        attended, norm = "attended", layer.post_attention_layernorm
        if four:
            attended = self._norm(graph, norm, "attended", "attended.normed")
            norm = layer.pre_feedforward_layernorm
        self._add(graph, "state", attended, "middle", norm, "within")
        both = dict.fromkeys(("gate", "up"), mlp.gate_proj.out_features)
        self._linears(graph, [mlp.gate_proj, mlp.up_proj], "within", both)
        kind, told = self._activation
        graph.node(kind, ["gate"], ["active"], **told)
        graph.node("Mul", ["active", "up"], ["hidden"])
        down = "down" if four else "change"
        self._linears(graph, [mlp.down_proj], "hidden", {down: mlp.down_proj.out_features})
        if four:
            self._norm(graph, layer.post_feedforward_layernorm, "down", "change")

    def _project(
        self, graph: Graph, attention: Any, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        """Queries and keys, turned by their positions, and values."""
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        counts = {"query": heads, "key": kv_heads}
        value = {"value": kv_heads * head_dim}
        if not hasattr(attention, "q_norm"):
            both = {"straight": sum(counts.values()) * head_dim}
            self._linears(graph, linears, "before", both | value)
        else:
            widths = {name: count * head_dim for name, count in counts.items()}
            self._linears(graph, linears, "before", widths | value)
            for name, count in counts.items():
                norm = attention.q_norm if name == "query" else attention.k_norm
                apart = graph.constant(f"{name}.apart", np.array([1, -1, count, head_dim]))
                flat = graph.constant(f"{name}.flat", np.array([1, -1, count * head_dim]))
                graph.node("Reshape", [name, apart], [f"{name}.heads"])
                self._norm(graph, norm, f"{name}.heads", f"{name}.normed")
                graph.node("Reshape", [f"{name}.normed", flat], [f"{name}.row"])
            graph.node("Concat", ["query.row", "key.row"], ["straight"], axis=-1)
        turning = ["straight", PLACES, *TABLES]
        kind = "com.microsoft/RotaryEmbedding"
        graph.node(kind, turning, ["turned"], num_heads=sum(counts.values()))

    def _linears(
        self, graph: Graph, linears: list[Any], rows: str, outputs: Mapping[str, int]
    ) -> None:
        names = [self._names[id(linear)] for linear in linears]
        biases = [f"{name}.bias" for name in names]
        graph.products(
            rows,
            outputs,
            [f"{name}.weight" for name in names],
            [bias if bias in self._file.places else None for bias in biases],
        )

    def _norm(self, graph: Graph, norm: Any, rows: str, output: str) -> str:
        scale, epsilon = self._scale(graph, norm, output)
        kind = "SimplifiedLayerNormalization"
        graph.node(kind, [rows, scale], [output], axis=-1, epsilon=epsilon)
        return output

    def _add(
        self, graph: Graph, stream: str, change: str, summed: str, norm: Any, output: str
    ) -> None:
        """A change to the stream: both summed (empty: nobody asks for it), and that normed."""
        scale, epsilon = self._scale(graph, norm, output)
        kind = "com.microsoft/SkipSimplifiedLayerNormalization"
        outputs = [output, "", "", summed] if summed else [output]
        graph.node(kind, [change, stream, scale], outputs, epsilon=epsilon)

    def _scale(self, graph: Graph, norm: Any, output: str) -> tuple[str, float]:
        weight = norm.weight.detach().float().numpy()
        scale = graph.constant(f"{output}.scale", weight + 1 if self._plus_one else weight)
        return scale, float(getattr(norm, "variance_epsilon", None) or norm.eps)
