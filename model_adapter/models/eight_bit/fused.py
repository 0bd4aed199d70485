"""A Llama-like model in few calls: all between two attentions is one graph.

Called one by one from Python, the operations of a token's pass take longer than its products by
weights of 8 bits. A layer of these models has no other form than here, in any of their versions
that the class is named for; a model of another class runs as transformers has it, over linear
layers of 8 bits (`skeleton`). Nothing of transformers' models is imported here, which takes it
longer than all the rest takes to read a prompt. `tests/adapter/test_fused.py` holds the two against
each other, and so does `LanguageModel` when it first loads one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from model_adapter.attention.function import memory_attention
from model_adapter.attention.sight import Rule
from model_adapter.models.eight_bit.described import ACTIVATIONS, Described, Turn
from model_adapter.models.eight_bit.file import WeightFile
from model_adapter.models.eight_bit.graph import PLACES, ROWS, TABLES, Graph, bound
from model_adapter.models.eight_bit.huge_pages import in_huge_pages
from model_adapter.models.eight_bit.layers import EightBitEmbedding, EightBitLinear

#: Sequences side by side up to which what a pass writes into is kept for the next.
_FEW = 16


@dataclass
class Passed:
    """What a pass gives: hidden states, normed, or logits."""

    last_hidden_state: Tensor
    logits: Tensor | None = None


class FusedModel(torch.nn.Module):
    """A causal language model that reads by weights of 8 bits on a CPU, and has no gradients. To
    whom it is given, it looks as one of transformers does, as far as anybody asks.

    Args:
        file: of its weights.
        described: what it is.
        unfused: makes the same model as transformers has it, over the same weights.

    Attributes:
        kind: its class in transformers.
        unfused: see above.
        normalizes_attention: whether what attention gives is normalized before it is added to the
            residual stream.
    """

    base_model_prefix = "model"
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, file: WeightFile, described: Described, unfused: Callable[[], Any]) -> None:
        super().__init__()
        self.kind = described.kind
        self.config = PreTrainedConfig(**described.config)
        self.generation_config = SimpleNamespace(eos_token_id=described.eos)
        self.unfused = unfused
        self.normalizes_attention = _has(file, "model.layers.0.post_feedforward_layernorm")
        self.model = _Decoder(file, described)
        self.lm_head = EightBitLinear(file, f"{described.head}.weight", None)

    @property
    def base_model(self) -> _Decoder:
        """Itself without its head."""
        return self.model

    def get_decoder(self) -> _Decoder:
        """Likewise."""
        return self.model

    def get_output_embeddings(self) -> torch.nn.Module:
        """Its head."""
        return self.lm_head

    def forward(
        self, input_ids: Tensor, *, logits_to_keep: int | Tensor = 0, **given: Any
    ) -> Passed:
        """Logits of tokens.

        Args:
            input_ids: (batch, tokens).
            logits_to_keep: of so many of the last tokens, or of those at these places; 0: of all.
            given: see `_Decoder.forward`.
        """
        hidden = self.model(input_ids, **given).last_hidden_state
        last = isinstance(logits_to_keep, int)
        kept = hidden[:, slice(-logits_to_keep, None) if last else logits_to_keep]
        return Passed(hidden, self.lm_head(kept))


class _Attention(torch.nn.Module):
    """Stands for a layer where attention asks which one it is of."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer


class _Rotary(torch.nn.Module):
    """Cosines and sines."""

    def __init__(self, turning: Mapping[str, Turn]) -> None:
        super().__init__()
        self._turning = {
            kind: (torch.tensor(turn.frequencies), turn.factor) for kind, turn in turning.items()
        }

    def halves(self, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Of positions (...), each (..., half of head_dim)."""
        frequencies, factor = self._turning[kind]
        angles = positions[..., None].float() * frequencies
        return angles.cos() * factor, angles.sin() * factor

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """As models of transformers have it: (batch, tokens, head_dim), in the dtype of `x`."""
        kind = layer_type if layer_type in self._turning else ""
        cos, sin = self.halves(position_ids, kind or "")
        return torch.cat([cos, cos], -1).to(x.dtype), torch.cat([sin, sin], -1).to(x.dtype)


class _Decoder(torch.nn.Module):
    """A model without its head: its graphs, before the first attention, between two, and behind the
    last."""

    def __init__(self, file: WeightFile, described: Described) -> None:
        super().__init__()
        config = described.config
        self.embed_tokens = EightBitEmbedding(
            file, "model.embed_tokens.weight", described.embedding_scale
        )
        self.rotary_emb = _Rotary(described.turning)
        layers = len(described.windows)
        self.attentions = torch.nn.ModuleList(_Attention(layer) for layer in range(layers))
        self._rules = {window: Rule.behind(window) for window in described.windows}
        self._described = described
        self._scaling = described.scaling
        self._width = int(config["hidden_size"])
        self._heads = int(config["num_attention_heads"])
        self._kv_heads = int(config["num_key_value_heads"])
        self._head_dim = described.head_dim
        self._of_thread = threading.local()
        self._made: tuple[int, list[Any]] | None = None
        self._making = threading.Lock()
        maker = _Maker(file, described, self._shape)

        def make() -> list[Any]:
            names = [f"model.layers.{layer}" for layer in range(layers)]
            threads = torch.get_num_threads()
            pairs = zip([None, *names], [*names, None], strict=True)
            return [maker.stage(layer, following, threads) for layer, following in pairs]

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
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Passed:
        """Read tokens.

        Args:
            input_ids: (batch, tokens).
            position_ids: (batch or 1, tokens); default: behind those of the cache.
            past_key_values: a cache of transformers, to which the tokens are added; None: nothing
                stands before them.
            use_cache: as the cache says.
            kwargs: `explicit_memory` and `observer`, see `memory_attention`.
        """
        batch, tokens = input_ids.shape
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(seen + tokens)[None]
        if position_ids is None:
            position_ids = places[:, seen:]
        masks: Mapping[int | None, Any] = self._rules
        if kwargs.get("explicit_memory") is None:  # nobody knows where the tokens of before stand
            masks = {
                window: rule.between(places[:, seen:], places)
                for window, rule in self._rules.items()
            }
        everywhere = position_ids.expand(batch, -1).reshape(-1)
        turns = {kind: self.rotary_emb.halves(everywhere, kind) for kind in self._described.turning}
        room = self._room(batch * tokens)
        room.state.copy_(self.embed_tokens(input_ids).reshape(-1, self._width))
        shape = batch, tokens, -1, self._head_dim
        # Who looks on may keep what it sees.
        kept = kwargs.get("observer") is not None
        turned, value = (part.view(shape).transpose(1, 2) for part in room.projected)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        for layer, attention in enumerate(self.attentions):
            room.run(layer, turns[self._described.turns[layer]])
            keys, values = (key, value)
            if past_key_values is not None:
                keys, values = past_key_values.update(key, value, layer)
            mixed, _ = memory_attention(
                attention,
                query.clone() if kept else query,
                keys,
                values,
                masks[self._described.windows[layer]],
                scaling=self._scaling,
                **kwargs,
            )
            room.mixed.copy_(mixed.reshape(batch * tokens, -1))
        room.run(len(self.attentions), None)
        return Passed(room.normed.clone().view(batch, tokens, self._width))

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
    """Makes the graphs of a model.

    Args:
        file: of its weights.
        described: what it is.
        shape: width, heads, kv heads, head_dim.
    """

    def __init__(
        self, file: WeightFile, described: Described, shape: tuple[int, int, int, int]
    ) -> None:
        self._file, self._shape = file, shape
        self._plus_one = described.plus_one
        self._activation = ACTIVATIONS[described.activation]
        self._epsilon = float(described.config["rms_norm_eps"])

    def stage(self, layer: str | None, following: str | None, threads: int) -> Any:
        """The rest of a layer behind its attention, and the next one up to its own.

        Args:
            layer: by what its weights' names begin; None: there is none before.
            following: likewise; None: there is none behind, but the model's norm.
            threads: that share a product.
        """
        width, heads, kv_heads, head_dim = self._shape
        graph = Graph(self._file)
        inputs, outputs = {"state": width}, {}
        norm = "model.norm" if following is None else f"{following}.input_layernorm"
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
        self._project(graph, f"{following}.self_attn")
        return graph.session(inputs, outputs, threads)

    def _rest(self, graph: Graph, layer: str) -> None:
        """Behind attention: its output is added to the stream, which is `middle` then, and the MLP
        makes of it what is added next, `change`."""
        four = _has(self._file, f"{layer}.pre_feedforward_layernorm")  # norms of a layer: Gemma
        width = self._shape[0]
        self._linears(graph, [f"{layer}.self_attn.o_proj"], "mixed", {"attended": width})
        attended, norm = "attended", f"{layer}.post_attention_layernorm"
        if four:
            attended = self._norm(graph, norm, "attended", "attended.normed")
            norm = f"{layer}.pre_feedforward_layernorm"
        self._add(graph, "state", attended, "middle", norm, "within")
        gate, up = f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"
        both = dict.fromkeys(("gate", "up"), self._file.matrices[f"{gate}.weight"].rows)
        self._linears(graph, [gate, up], "within", both)
        kind, told = self._activation
        graph.node(kind, ["gate"], ["active"], **told)
        graph.node("Mul", ["active", "up"], ["hidden"])
        down = "down" if four else "change"
        self._linears(graph, [f"{layer}.mlp.down_proj"], "hidden", {down: width})
        if four:
            self._norm(graph, f"{layer}.post_feedforward_layernorm", "down", "change")

    def _project(self, graph: Graph, attention: str) -> None:
        """Queries and keys, turned by their positions, and values."""
        _, heads, kv_heads, head_dim = self._shape
        linears = [f"{attention}.{name}_proj" for name in "qkv"]
        counts = {"query": heads, "key": kv_heads}
        value = {"value": kv_heads * head_dim}
        if not _has(self._file, f"{attention}.q_norm"):
            both = {"straight": sum(counts.values()) * head_dim}
            self._linears(graph, linears, "before", both | value)
        else:
            widths = {name: count * head_dim for name, count in counts.items()}
            self._linears(graph, linears, "before", widths | value)
            for name, count in counts.items():
                norm = f"{attention}.{name[0]}_norm"
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
        self, graph: Graph, names: list[str], rows: str, outputs: Mapping[str, int]
    ) -> None:
        biases = [f"{name}.bias" for name in names]
        graph.products(
            rows,
            outputs,
            [f"{name}.weight" for name in names],
            [bias if bias in self._file.places else None for bias in biases],
        )

    def _norm(self, graph: Graph, norm: str, rows: str, output: str) -> str:
        scale = self._scale(graph, norm, output)
        kind = "SimplifiedLayerNormalization"
        graph.node(kind, [rows, scale], [output], axis=-1, epsilon=self._epsilon)
        return output

    def _add(
        self, graph: Graph, stream: str, change: str, summed: str, norm: str, output: str
    ) -> None:
        """A change to the stream: both summed (empty: nobody asks for it), and that normed."""
        scale = self._scale(graph, norm, output)
        kind = "com.microsoft/SkipSimplifiedLayerNormalization"
        outputs = [output, "", "", summed] if summed else [output]
        graph.node(kind, [change, stream, scale], outputs, epsilon=self._epsilon)

    def _scale(self, graph: Graph, norm: str, output: str) -> str:
        weight = self._file.tensor(f"{norm}.weight").numpy()
        return graph.constant(f"{output}.scale", weight + 1 if self._plus_one else weight)


def _has(file: WeightFile, norm: str) -> bool:
    return f"{norm}.weight" in file.places
