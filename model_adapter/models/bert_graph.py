"""BERT and RoBERTa encoders on ONNX Runtime, straight from a sentence-transformers folder.

A query needs one pass of a small encoder. torch, transformers and sentence-transformers take five
seconds to import for it, ONNX Runtime a tenth of one, and the vectors are the same but for rounding
(a test compares them). What a folder has beyond the usual layers is left to sentence-transformers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from model_adapter.models.fingerprint import values_fingerprint
from model_adapter.models.onnx_graph import OnnxGraph, opened

_FAMILIES = ("bert", "roberta", "xlm-roberta")
_MODULES = ("Transformer", "Pooling", "Normalize")  # as they follow each other
_BATCH = 32  # texts in one pass
_KNOWN_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class _Unusual(Exception):  # noqa: N818 (no error: sentence-transformers takes it)
    """Something that is not computed here."""


@dataclass(frozen=True)
class _Recipe:
    """What a folder says of its encoder.

    Attributes:
        config: of the transformer.
        pooling: `mean` or `cls`.
        longest: tokens, at most.
        lower: whether texts are made lower case before they are cut into tokens.
        prompts: what may stand before a text, by name.
        default_prompt_name: which of them does if no other is meant.
    """

    config: Mapping[str, Any]
    pooling: str
    longest: int
    lower: bool
    prompts: Mapping[str, str | None]
    default_prompt_name: str | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        modules = _json(folder / "modules.json")
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if tuple(kinds) not in (_MODULES, _MODULES[:2]):
            raise _Unusual
        settings = _json(folder / "config_sentence_transformers.json")
        inner = folder / modules[0]["path"]
        config, how = _json(inner / "config.json"), _json(inner / "sentence_bert_config.json")
        usual = {"position_embedding_type": "absolute", "hidden_act": "gelu", "is_decoder": False}
        if config.get("model_type") not in _FAMILIES or inner != folder:
            raise _Unusual
        if any(config.get(name, value) != value for name, value in usual.items()):
            raise _Unusual
        if how.keys() - {"max_seq_length", "do_lower_case"}:
            raise _Unusual
        modes = _json(folder / modules[1]["path"] / "config.json")
        chosen = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on]
        if (
            not modes.get("include_prompt", True)
            or len(chosen) != 1
            or chosen[0] not in _KNOWN_POOLING
        ):
            raise _Unusual
        longest = int(how["max_seq_length"])
        lower = bool(how.get("do_lower_case"))
        prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
        return cls(config, _KNOWN_POOLING[chosen[0]], longest, lower, prompts, default)


class BertGraph:
    """Texts to vectors of length 1.

    Args:
        recipe: what the folder says.
        weights: by transformers' names, without the model's own; float32.
        tokenizer: of `tokenizers`.

    Attributes:
        dimension: length of a vector.
        pooling: how one vector is made of a text's many.
        longest: tokens of a text; what comes behind is cut off.
        prompts: what may stand before a text, by name. Who embeds puts it there.
        default_prompt_name: which of them does if no other is meant.
        weights_fingerprint: as `weights_fingerprint` has it of the module.
    """

    def __init__(
        self, recipe: _Recipe, weights: Mapping[str, NDArray[np.float32]], tokenizer: Tokenizer
    ) -> None:
        self.dimension = int(recipe.config["hidden_size"])
        self.pooling, self.longest = recipe.pooling, recipe.longest
        self.prompts, self.default_prompt_name = recipe.prompts, recipe.default_prompt_name
        self.weights_fingerprint = values_fingerprint(weights.values())
        self._lower = recipe.lower
        self._first = 0 if recipe.config["model_type"] == "bert" else _padding(recipe.config) + 1
        self._tokenizer = tokenizer
        self._graph, self._handed = _graph(recipe.config, weights)
        self._opened: tuple[int, onnxruntime.InferenceSession] | None = None
        self._guard = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The encoder in a folder; None: sentence-transformers has to load it."""
        try:
            recipe = _Recipe.read(folder)
            weights = _weights(folder / "model.safetensors", recipe.config)
            tokenizer = _tokenizer(folder / "tokenizer.json")
        except (_Unusual, OSError, KeyError, ValueError, TypeError, SafetensorError):
            return None
        tokenizer.enable_truncation(recipe.longest)
        tokenizer.enable_padding(pad_id=_padding(recipe.config))
        return cls(recipe, weights, tokenizer)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, dimension) vectors."""
        cleaned = [text.strip() for text in texts]
        if self._lower:
            cleaned = [text.lower() for text in cleaned]
        vectors = np.empty((len(texts), self.dimension), np.float32)
        order = np.argsort([-len(text) for text in cleaned], kind="stable")
        for start in range(0, len(texts), _BATCH):
            places = order[start : start + _BATCH]
            vectors[places] = self._embedded([cleaned[place] for place in places])
        return vectors

    def _embedded(self, texts: list[str]) -> NDArray[np.float32]:
        encodings = self._tokenizer.encode_batch(texts)
        ids = np.array([encoding.ids for encoding in encodings], np.int32)
        seen = np.array([encoding.attention_mask for encoding in encodings], np.int32)
        # RoBERTa counts from behind its padding token's id, and what fills up stays there.
        every = np.ones_like(seen)
        counted = every.cumsum(1) - 1 if self._first == 0 else seen.cumsum(1) * seen
        positions = counted + max(0, self._first - 1)
        (hidden,) = self._session.run(
            ["hidden"], {"ids": ids, "positions": positions.astype(np.int32), "seen": seen}
        )
        if self.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            part = seen[:, :, None].astype(np.float32)
            vectors = (hidden * part).sum(1) / np.maximum(part.sum(1), 1e-9)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(length, 1e-12), np.float32)

    @property
    def _session(self) -> onnxruntime.InferenceSession:
        """One for each process: its threads do not come along into a child that is forked."""
        with self._guard:
            if self._opened is None or self._opened[0] != os.getpid():
                # Threads that wait sleep: beside another program spinning ones cost much more.
                asleep = {"session.intra_op.allow_spinning": "0"}
                threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
                session = opened(self._graph, threads, asleep, self._handed)
                self._opened = os.getpid(), session
            return self._opened[1]


def _tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # it has no kind of its own
        raise _Unusual from error


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def _padding(config: Mapping[str, Any]) -> int:
    return int(config.get("pad_token_id") or 0)


def _weights(file: Path, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The parameters by name; each of the model's has to be there, and no other."""
    layers = range(int(config["num_hidden_layers"]))
    modules = [
        *("word", "position", "token_type"),
        *("embeddings.LayerNorm", "pooler.dense"),
        *(f"encoder.layer.{n}.{part}" for n in layers for part in _PARTS),
    ]
    expected = {f"embeddings.{name}_embeddings.weight" for name in modules[:3]}
    expected |= {f"{name}.{end}" for name in modules[3:] for end in ("weight", "bias")}
    found = {}
    for name, values in load_file(file).items():
        if np.issubdtype(values.dtype, np.floating):
            for family in ("bert.", "roberta."):
                name = name.removeprefix(family)
            found[name] = np.asarray(values, np.float32)
    if found.keys() != expected:
        raise _Unusual
    return found


_PARTS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


def _graph(
    config: Mapping[str, Any], weights: Mapping[str, NDArray[np.float32]]
) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """The encoder as an ONNX model: ids, positions and seen, (batch, tokens) int32 each, to hidden,
    (batch, tokens, dimension) float32 (Devlin et al., 2018). And the arrays that it names."""
    heads, epsilon = int(config["num_attention_heads"]), float(config["layer_norm_eps"])
    graph = OnnxGraph()

    def named(name: str) -> str:
        return graph.hand(name, weights[name])

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node(kind, inputs, [output], **attributes)
        return output

    def product(x: str, name: str, *, biased: bool = True) -> str:
        """x times the weights of a linear layer."""
        weight = graph.hand(f"{name}.weight", weights[f"{name}.weight"].T)
        made = node("MatMul", [x, weight], f"{name}.product")
        return node("Add", [made, named(f"{name}.bias")], f"{name}.out") if biased else made

    def added(x: str, residual: str, name: str, norm: str) -> str:
        """A linear layer's output on top of what went in, normalized."""
        inputs = [product(x, name, biased=False), residual, named(f"{norm}.weight")]
        inputs += [named(f"{norm}.bias"), named(f"{name}.bias")]
        return node("com.microsoft/SkipLayerNormalization", inputs, f"{norm}.out", epsilon=epsilon)

    table = "embeddings.{}_embeddings.weight".format
    # All tokens are of type 0: that is one row, added to every position's.
    placed = graph.hand("placed", weights[table("position")] + weights[table("token_type")][0])
    words = node("Gather", [named(table("word")), "ids"], "words")
    places = node("Gather", [placed, "positions"], "places")
    norm = [named("embeddings.LayerNorm.weight"), named("embeddings.LayerNorm.bias")]
    whole = node("Add", [words, places], "embedded")
    x = node("LayerNormalization", [whole, *norm], "begin", epsilon=epsilon, axis=-1)
    for number in range(int(config["num_hidden_layers"])):
        layer = f"encoder.layer.{number}"
        three = [product(x, f"{layer}.attention.self.{p}") for p in ("query", "key", "value")]
        attended = node(
            "com.microsoft/MultiHeadAttention",
            [*three, "", "seen"],
            f"{layer}.attended",
            num_heads=heads,
        )
        after = f"{layer}.attention.output"
        x = added(attended, x, f"{after}.dense", f"{after}.LayerNorm")
        wide = product(x, f"{layer}.intermediate.dense", biased=False)
        wide = node(
            "com.microsoft/BiasGelu",
            [wide, named(f"{layer}.intermediate.dense.bias")],
            f"{layer}.wide",
        )
        x = added(wide, x, f"{layer}.output.dense", f"{layer}.output.LayerNorm")
    node("Identity", [x], "hidden")
    shape = ("batch", "tokens")
    given = [
        helper.make_tensor_value_info(name, TensorProto.INT32, shape)
        for name in ("ids", "positions", "seen")
    ]
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, (*shape, None))
    return graph.model(given, [hidden]), graph.handed
