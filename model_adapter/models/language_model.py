"""A Hugging Face model with its tokenizer, ready to write and read memories."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, Self, Unpack, get_args

import torch
from torch import Tensor

from memdb import DType, InvalidInputError, Rope, UnsupportedModelError
from model_adapter.attention import function as attention
from model_adapter.attention.buffers import ContextCache
from model_adapter.attention.carried import asked_layers
from model_adapter.attention.function import Observer
from model_adapter.attention.sight import Sight
from model_adapter.catalog import Notify, source_key
from model_adapter.models import observing
from model_adapter.models.adapters import Adapter, adapter_key, load_adapter
from model_adapter.models.eight_bit.fused import FusedModel
from model_adapter.models.eight_bit.prefixes import kept_prefix
from model_adapter.models.eight_bit.reading import ExactWeights, ReadingAdapter
from model_adapter.models.fingerprint import weights_fingerprint
from model_adapter.models.loading import Loaded, Loading, language_model_of, load
from model_adapter.models.loading_options import LoadingOptions
from model_adapter.models.noted_tokenizer import NotedTokenizer
from model_adapter.models.observing import KeyValues
from model_adapter.models.probe import (
    Found,
    class_of,
    find_out,
    note_sources,
    own_logits,
    require_right,
    unrotation_is_right,
)
from model_adapter.models.products import use_fast_products
from model_adapter.models.tried import note_tried, was_tried
from model_adapter.models.words import Part, Words

#: What a pass is for: by which weights it runs depends on the adapter.
Pass = Literal["read", "choose", "write"]

_NO_END = 1 << 30  # positions of a model that names none


class LanguageModel:
    """A decoder of transformers whose attention runs through `model_adapter.attention.function`.

    Args:
        model: a causal language model of transformers, with RoPE and grouped-query (or multi-head)
            attention; of one that reads more than text its language model is taken. Its attention
            implementation is set to `memdb`, which without memories is plain attention. Or one of
            weights of 8 bits (`FusedModel`).
        tokenizer: its fast tokenizer, of transformers or noted (`NotedTokenizer`).
        name: how to load it again.
        adapter: trained for it, by which it writes memories (and reads them, if it is so made).
        fingerprint: of its weights as they are stored, where they are held in fewer bits.
        tried: what it is, if it is known to say the same by this attention as by its own.
        exact: what writes, where `model` has weights of 8 bits; it has the adapter in it then, if
            that reads.

    Attributes:
        model: the weights that read.
        adapter: see above.
        tokenizer_json: the text of the tokenizer's tokenizer.json.
        words: from text to tokens, control tokens or none.

    Raises:
        UnsupportedModelError: saying what the model lacks.
        InvalidInputError: the adapter is for another model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        adapter: Adapter | None = None,
        fingerprint: str | None = None,
        *,
        tried: Found | None = None,
        exact: ExactWeights | None = None,
    ) -> None:
        fused = isinstance(model, FusedModel)
        if not fused:
            model = language_model_of(model).eval()
        self.model = model
        self._exact = exact
        self._base = model if exact is None else None
        self._writing: Any = None
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()  # of one that reads more than text
        self._require_supported()
        # One that is fused is held against what transformers makes of the same weights.
        plain = model.unfused if fused else lambda: model
        own = None if tried is not None else own_logits(self, plain)
        if not fused:
            _attend_by_memdb(model)
        self._fingerprint = fingerprint
        self._prefixes: dict[tuple[tuple[int, ...], int | None], KeyValues] = {}
        self._guard = threading.Lock()
        self._loading = threading.RLock()
        self.tokenizer_json: str = (
            tokenizer.json
            if isinstance(tokenizer, NotedTokenizer)
            else str(tokenizer.backend_tokenizer.to_str())
        )
        self.words = Words(self.tokenizer_json)
        self._found = find_out(self) if tried is None else tried
        if self._found.turning and getattr(self.config, "rope_parameters", None) is None:
            raise self._unsupported("has no rotary position embedding")
        note_sources(model, self._found.sources)
        if own is not None:
            require_right(self, self._found, own)
        if adapter is not None:
            adapter.require_base(self.fingerprint, name)
            if exact is None:
                merged = adapter.merged(self.base)
                self._writing = merged if adapter.writes else self.base
                self.model = merged if adapter.reads else self.base

    @classmethod
    def load(
        cls,
        name: str,
        *,
        adapter: str | None = None,
        notify: Notify = lambda _: None,
        **loading: Unpack[LoadingOptions],
    ) -> Self:
        """Load a model by a name of the catalogue, by folder, by GGUF file (of several parts: any
        of them), or by Hugging Face id.

        On a CPU it reads (prompts, and what it generates) by weights of 8 bits, three to five times
        as fast as by float32, in a third of the memory; they are kept in the cache folder. Memories
        are written by the exact weights, which are loaded when the first has to be written.

        Args:
            name: e.g. `smollm2-135m`; an id may end in @ and a revision.
            adapter: a trained adapter for it: a name of the catalogue, or a folder.
            notify: told when a model of the catalogue has to be pulled.
            loading: `device`, `dtype` and what else `Loading` has.

        Raises:
            InvalidInputError: it, or the adapter, cannot be loaded, or an option is wrong.
            UnsupportedModelError: it can, but not be used.
        """
        how = Loading(**loading)
        trained = None if adapter is None else load_adapter(adapter)
        reads = None
        if trained is not None and trained.reads:
            merged = partial(_merged, trained, name)
            reads = ReadingAdapter(trained.name, trained.fingerprint, merged)

        parts = load(name, how, notify, reads)
        if parts.exact is None:
            return cls._of(parts, trained)
        try:
            return cls._of(parts, trained)
        except UnsupportedModelError as error:  # or only so: by its exact weights it will tell
            refused = error
        loaded = cls._of(load(name, replace(how, exact=True, fast=False), notify), trained)
        notify(f"{name} reads by its exact weights: {refused}")
        return loaded

    @classmethod
    def _of(cls, parts: Loaded, adapter: Adapter | None) -> Self:
        exact = parts.exact
        tried = was_tried(parts.model, exact is None)
        given = parts.model, parts.tokenizer, parts.name, adapter, parts.fingerprint
        loaded = cls(*given, tried=tried, exact=exact)
        if tried is None:
            note_tried(parts.model, exact is None, loaded._found)
        return loaded

    # --- what it is ---

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        if self._exact is not None:  # asked for each token, and transformers looks for a parameter
            return torch.device("cpu")
        return torch.device(self.model.device)

    @property
    def dtype(self) -> DType:
        """What it computes in, by name."""
        name: DType = str(self.model.dtype).removeprefix("torch.")  # type: ignore[assignment]
        return name

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Those that memories can be of. In most models all; not those that do not attend, that
        attend to the keys of another layer, or whose keys are of another shape than most."""
        return self._found.memory_layers

    @property
    def reads_whole_memories(self) -> bool:
        """Whether a text as a memory can be all that the same text in the prompt is: every layer
        has it. Of a hybrid the layers that carry a state on have not."""
        return self._found.whole

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a memory layer."""
        return self._found.kv_heads

    @property
    def heads(self) -> int:
        """Query heads of a memory layer."""
        return self._found.heads

    @property
    def heads_of_all_layers(self) -> int:
        """Query heads of all layers that attend."""
        return self._found.every_head

    @property
    def head_dim(self) -> int:
        """Length of a key of a memory layer."""
        return self._found.head_dim

    @property
    def max_positions(self) -> int:
        """Longest sequence it was made for. With LongRoPE, whose keys change with the sequence's
        length, the length up to which they stay as they are."""
        parameters = dict(getattr(self.config, "rope_parameters", None) or {})
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and original:
            return int(original)
        return int(getattr(self.config, "max_position_embeddings", None) or _NO_END)

    @property
    def base(self) -> Any:
        """The exact weights without the adapter, by which it is chosen what a memory keeps."""
        with self._loading:
            if self._base is None:
                self._base = self._load_exact()
            return self._base

    def _load_exact(self) -> Any:
        assert self._exact is not None
        with _quiet():  # it happens in the middle of something else
            model = self._exact.load().eval()
        _attend_by_memdb(model)
        note_sources(model, self._found.sources)
        return model

    @property
    def writing(self) -> Any:
        """The exact weights that memories are written by. Without an adapter they are `base`. With
        one the two share what it does not change: so nothing is switched while other threads run,
        at the price of its layers' weights once more."""
        with self._loading:
            if self._writing is None:
                adapter = self.adapter
                writes = adapter is not None and adapter.writes
                self._writing = adapter.merged(self.base) if adapter and writes else self.base
            return self._writing

    @property
    def is_exact(self) -> bool:
        """Whether it reads by the exact weights, and not by 8 bits."""
        return self._exact is None

    @cached_property
    def fingerprint(self) -> str:
        """Over all exact weights as they are stored, without the adapter."""
        if self._exact is not None:
            return self._exact.fingerprint
        return self._fingerprint or weights_fingerprint(self.base)

    def is_known_as(self, fingerprint: str, dtype: DType) -> bool:
        """Whether these are the weights with that fingerprint; also if it was taken of what they
        are when they are rounded to this dtype, as releases before this one did. It is theirs
        then."""
        if self.fingerprint == fingerprint:
            return True
        own = (self._fingerprint, weights_fingerprint(self.base))
        if fingerprint not in (*own, weights_fingerprint(self.base, getattr(torch, dtype))):
            return False
        self.fingerprint = fingerprint
        return True

    def weights(self, what: Pass) -> Any:
        """The model whose weights a pass runs by."""
        if what == "read":
            return self.model
        return self.base if what == "choose" else self.writing

    def rope(self, layer: int) -> Rope | None:
        """The rotary position embedding of a layer; None where keys do not depend on position."""
        if layer not in self._found.turning:
            return None
        parameters = dict(self.config.rope_parameters)
        kind = (getattr(self.config, "layer_types", None) or [None] * self.layers)[layer]
        if kind in parameters:  # one set for each kind of layer
            parameters = dict(parameters[kind])
        parameters = {
            key: value for key, value in parameters.items() if not isinstance(value, dict)
        }
        base, rope_type = parameters.pop("rope_theta", None), parameters.pop("rope_type", "default")
        if base is None:  # said in another way
            return None
        return Rope(float(base), rope_type, parameters)

    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end a text."""
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            stops = self.tokenizer.eos_token_id
        if stops is None:
            return frozenset()
        return frozenset([stops] if isinstance(stops, int) else stops)

    def _require_supported(self) -> None:
        lacking = None
        if self.dtype not in get_args(DType):
            lacking = f"computes in {self.dtype}; memories are {', '.join(get_args(DType))}"
        elif any(weight.is_meta for weight in self.model.parameters()):
            lacking = "keeps weights out of memory (offloading); map it onto devices that hold all"
        elif not getattr(self.tokenizer, "is_fast", False):
            lacking = "has a slow tokenizer; memdb stores the fast one's tokenizer.json"
        if lacking:
            raise self._unsupported(lacking)

    def _unsupported(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"the model '{self.name}' ({class_of(self.model)}) {why}")

    # --- what it does ---

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text that goes on behind other text, nothing added. What looks like a
        control token in it is plain text unless `special` (for text that the framing writes
        itself, and that nothing stands before)."""
        if special:
            return self.words.beginning([Part(text, control=True)]).ids
        return self.words.text(text).ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """From which character to which each token of a text stands, see `tokens`."""
        return self.words.text(text).spans

    def require_position(self, end: int) -> None:
        """Raise `InvalidInputError` if a text that ends before this position is too long."""
        if end > self.max_positions:
            raise InvalidInputError(
                f"the text reaches position {end}; the model '{self.name}' ends at "
                f"{self.max_positions}. Shorten the prompt, or generate fewer tokens."
            )

    @torch.no_grad()
    def run(
        self, tokens: Tensor, positions: Tensor, cache: Any, sight: Sight, keep: Sequence[int]
    ) -> Tensor:
        """One forward pass; `model_adapter.Context` is what to read with.

        Args:
            tokens: (batch, tokens) ids.
            positions: (batch, tokens).
            cache: a cache of transformers; the tokens are added to it.
            sight: what they see.
            keep: which tokens' logits are wanted.

        Returns:
            (batch, len(keep), vocabulary) logits.
        """
        # By a number a model may leave tokens out in layers that have no keys of their own, too.
        one = list(keep) == [tokens.shape[1] - 1] and not self._found.sources
        logits: Tensor = attention.run(
            self.model,
            tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            explicit_memory=sight,
            logits_to_keep=1 if one else torch.tensor(keep, device=tokens.device),
        ).logits
        return logits

    def new_cache(self, capacity: int) -> ContextCache:
        """A cache for one context, that makes room for so many tokens."""
        return ContextCache(self._asked_layers, capacity)

    @cached_property
    def _asked_layers(self) -> list[Any]:
        return asked_layers(self.config)

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int], what: Pass = "read") -> KeyValues:
        """What a prefix at positions 0 and on leaves behind, always by the exact weights: memories
        are read behind the prefix that they were written behind (see `eight_bit/prefixes.py`).
        Computed once: no memory is seen there, so it is the same for every text."""
        kept = self._exact is not None and bool(tokens) and self._reads_as(what)
        key = tuple(tokens), None if kept else id(self.weights(what))
        with self._guard:
            if key not in self._prefixes:
                self._prefixes[key] = (
                    self._kept_prefix(tokens)
                    if kept
                    else observing.key_values(self.weights(what), tokens)
                )
            return self._prefixes[key]

    def _reads_as(self, what: Pass) -> bool:
        """Whether a pass runs by the weights that read, apart from rounding."""
        reads = self.adapter is not None and self.adapter.reads
        return what == "read" or (not reads and self.weights(what) is self.base)

    def _kept_prefix(self, tokens: Sequence[int]) -> KeyValues:
        """By the weights that read, before they were rounded. Nobody may have loaded these yet, and
        then they are not held."""
        reads = self.adapter if self.adapter is not None and self.adapter.reads else None

        def computed() -> KeyValues:
            with self._loading:
                model = self._load_exact() if self._base is None else self._base
            return observing.key_values(model if reads is None else reads.merged(model), tokens)

        return kept_prefix([self.fingerprint, reads and reads.fingerprint], tokens, computed)

    @torch.no_grad()
    def observe(
        self,
        sequences: Sequence[Sequence[int]],
        observer: Observer,
        *,
        prefix: Sequence[int] = (),
        start: int | None = None,
        last_layer: int | None = None,
        what: Pass = "choose",
    ) -> None:
        """Run several sequences behind a prefix by the base weights, side by side, padded at their
        ends (which no token before sees), and show each layer's queries, keys and values to the
        observer. The prefix has keys and values, but no queries: it is computed once.

        Args:
            sequences: token ids, without the prefix.
            observer: see `Observer`.
            prefix: what stands before each of them.
            start: position of the first token; default: right behind the prefix.
            last_layer: behind it nothing is computed; default: the last one.
            what: the pass whose weights they run by.
        """
        start = len(prefix) if start is None else start
        last = self.layers - 1 if last_layer is None else last_layer
        before = self.prefix(prefix, what)
        observing.observe(self.weights(what), sequences, observer, before, start, last)

    @cached_property
    def normalizes_attention(self) -> bool:
        """Whether attention's output is normalized before it is added to the residual stream (Gemma
        2 and 3, OLMo 2, GLM-4): such layers have a norm behind their MLP, too."""
        if isinstance(self.model, FusedModel):
            return self.model.normalizes_attention
        ends = ("post_feedforward_layernorm", "post_mlp_layernorm")
        return any(name.endswith(ends) for name, _ in self.model.named_modules())

    @cached_property
    def can_unrotate(self) -> bool:
        """Whether `unrotate` is right for this model: kinds of rotation differ, so it is tried."""
        return unrotation_is_right(self)

    def unrotate(self, vectors: Tensor, layer: int, start: int) -> Tensor:
        """Queries or keys of a layer before RoPE, (heads, tokens, head_dim), given those after it
        at positions from `start` on: the rotation undone."""
        if layer not in self._found.turning:
            return vectors.float()
        positions = torch.arange(start, start + vectors.shape[1], device=vectors.device)[None]
        rotary = self.model.get_decoder().rotary_emb
        kinds = getattr(self.config, "layer_types", None)
        if kinds and "layer_type" in inspect.signature(rotary.forward).parameters:
            cos, sin = rotary(vectors, positions, layer_type=kinds[layer])
        else:
            cos, sin = rotary(vectors, positions)
        rotated = cos.shape[-1]
        x, rest = vectors[..., :rotated].float(), vectors[..., rotated:].float()
        half = rotated // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        cos, sin = cos.float(), sin.float()
        # cos and sin may carry a scale (YaRN); their squares then sum to its square.
        x = (x * cos - turned * sin) / (cos**2 + sin**2)
        return torch.cat((x, rest), -1)


def _attend_by_memdb(model: Any) -> None:
    """Let a model of transformers attend to memories, and multiply fast."""
    from model_adapter.attention.registered import attend_by_memdb  # here: it takes a second

    attend_by_memdb(model)
    use_fast_products(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _merged(adapter: Adapter, name: str, model: Any) -> Any:
    adapter.require_base(weights_fingerprint(model), name)
    return adapter.merged(model)


_loaded: dict[object, LanguageModel] = {}
_loading = threading.Lock()


def load_model(
    name: str,
    notify: Notify = lambda _: None,
    *,
    adapter: str | None = None,
    **loading: Unpack[LoadingOptions],
) -> LanguageModel:
    """`LanguageModel.load`, once per process, name and options; again if a folder changed."""
    how = Loading(**loading)
    with _loading:
        which = adapter_key(adapter), how.key
        model = _loaded.get((source_key(name), *which))
        if model is None:
            model = LanguageModel.load(name, adapter=adapter, notify=notify, **loading)
            _loaded[source_key(name), *which] = model  # as it is now that it is pulled
        elif how.threads is not None:
            torch.set_num_threads(how.threads)
        return model
