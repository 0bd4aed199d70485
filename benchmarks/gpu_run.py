"""What benchmarks/gpu.py measures."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from memdb import (
    DEFAULT_CODEC,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemoryShape,
    StoredMemory,
    from_float32,
    pack,
    pack_coded,
)
from model_adapter import Context, LanguageModel, Stretch
from model_adapter.attention.decoding import DeviceDecoder, SetOfMemories
from model_adapter.attention.stacking import Sets

PROMPT, REFERENCE, TOGETHER, PREFIX = 64, 128, 5, 16
SHARE = 1 / 8  # of all pairs that a memory keeps
FITTED, THIN = 256, 20  # memories that their codec is fitted to, most of them so much smaller
_DIMENSION = 8  # of the embeddings by which they are found


def _qwen(layers: int, width: int, heads: int, kv_heads: int, inner: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


#: By name: what makes the configuration. The sizes are those of Qwen2.5 and of Llama 3.
SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
    "0.5B": lambda: _qwen(24, 896, 14, 2, 4864),
    "1.5B": lambda: _qwen(28, 1536, 12, 2, 8960),
    "8B": lambda: LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
}


@dataclass(frozen=True)
class Row:
    """Attributes:
    model: its name.
    batch: sequences side by side.
    what: a way to answer, or to decode memories.
    first: seconds to the first token, or to the memories of all sequences; median.
    decoding: tokens/s, of all sequences together; 0: none are generated.
    reason: why there are no figures; "": there are.
    """

    model: str
    batch: int
    what: str
    first: float = 0.0
    decoding: float = 0.0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def machine(device: torch.device) -> str:
    """What it runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {version('transformers')}"


def rows(
    name: str, device: torch.device, batches: Sequence[int], steps: int, rounds: int, ends: float
) -> Iterator[Row]:
    """The rows of a model, as they are measured; what fails costs its own row.

    Args:
        name: of `SHAPES`, or of real weights.
        device: where it runs.
        batches: sizes.
        steps: tokens to decode.
        rounds: of first tokens.
        ends: on the monotonic clock; nothing begins later.
    """
    try:
        model = _model(name, device)
    except Exception as error:  # whatever does not fit, or is not there
        yield Row(name, 0, "-", reason=_brief(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(model, Path(folder), max(batches), steps, rounds)
        except Exception as error:
            yield Row(name, 0, "-", reason=_brief(error))
            return
        try:
            for batch in batches:
                for what, way in bench.ways().items():
                    yield _row(name, batch, what, way, ends)
        finally:
            bench.close()
    config = model.config
    del bench, model
    _free(device)
    if device.type != "cuda":
        yield Row(name, 0, "vLLM", reason="it needs a GPU")
        return
    yield from _vllm(name, config, batches, steps, rounds, ends)


def _row(
    name: str, batch: int, what: str, way: Callable[[int], tuple[float, float]], ends: float
) -> Row:
    if time.monotonic() > ends:
        return Row(name, batch, what, reason="no time was left")
    try:
        return Row(name, batch, what, *way(batch))
    except Exception as error:  # a row, not the run
        return Row(name, batch, what, reason=_brief(error))
    finally:
        _free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :90
    ]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _model(name: str, device: torch.device) -> LanguageModel:
    if name not in SHAPES:
        return LanguageModel.load(name, device=str(device))
    config = SHAPES[name]()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):  # made there, in no other dtype first
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    words = {f"w{number}": number for number in range(256)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))  # nobody reads what it says
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    return LanguageModel(model, tokenizer, name, fingerprint=f"random-{name}")


#: Stored memories as attention reads them.
_Decode = Callable[[Sequence[StoredMemory]], SetOfMemories]


class Bench:
    """A model, and a database of memories for it. The ways to answer are its methods: each gives
    the seconds to the first token, and tokens/s of decoding, for a batch.

    Args:
        model: that answers.
        folder: for the database.
        batch: the largest.
        steps: tokens to decode.
        rounds: of first tokens.
    """

    def __init__(
        self, model: LanguageModel, folder: Path, batch: int, steps: int, rounds: int
    ) -> None:
        self._model, self._steps, self._rounds = model, steps, rounds
        self._random = np.random.default_rng(0)
        found = model.memory_layers
        self._shape = MemoryShape(
            "random",
            tuple(found),
            model.kv_heads,
            model.head_dim,
            model.dtype,
            tuple(range(1, PREFIX + 1)),
        )
        many = TOGETHER * min(batch, 8)
        self._db = MemDB.create(
            folder / "db", shape=self._shape, dimension=_DIMENSION, cache_bytes=0
        )
        vectors = self._random.standard_normal((FITTED, _DIMENSION)).astype(np.float32)
        vectors[many:] = -np.abs(vectors[many:])  # nobody asks for those
        self._db.insert_many(
            [f"reference {number}" for number in range(FITTED)],
            embeddings=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            memories=[*self._memories(many, SHARE), *self._memories(FITTED - many, SHARE / THIN)],
        )
        with suppress(InvalidInputError):  # a tiny model's are too unlike, and stay in int8
            self._db.recode(DEFAULT_CODEC)
        self._decoder = DeviceDecoder(model.device, model.model.dtype)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def ways(self) -> dict[str, Callable[[int], tuple[float, float]]]:
        """Those that this model has, by name; the first two are what others are compared with."""
        return {
            "transformers": self._alone,
            "RAG": self._rag,
            "memory": partial(self._memory, False),
            "memory, graph": partial(self._memory, True),
            "memory, CPU's": partial(self._memory, True, by=self._pack),
            "5 memories": self._decode_only,
            "5, by the CPU": partial(self._decode_only, by=self._pack),
        }

    def _memories(self, many: int, share: float) -> list[ExplicitMemory]:
        """At random, as uneven over the heads as real ones: some keep nearly all, most next to
        nothing. Their vectors lie along few directions, as real ones do, else no codec would pay.

        Args:
            many: how many.
            share: of all pairs that each keeps.
        """
        rows, d = len(self._shape.layers) * self._shape.kv_heads, self._shape.head_dim
        turned = np.linalg.qr(np.random.default_rng(1).standard_normal((d, d)))[0]
        along = (np.geomspace(3, 0.03, d)[:, None] * turned).astype(np.float32)
        shares = self._random.lognormal(0.0, 1.5, rows)
        shares *= share / shares.mean()
        made = []
        for _ in range(many):
            counts = (shares * self._random.lognormal(0.0, 0.3, rows) * REFERENCE).astype(int)
            counts = counts.clip(0, REFERENCE)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            positions = [np.sort(self._random.permutation(REFERENCE)[:count]) for count in counts]
            vectors = self._random.standard_normal((2, offsets[-1], d), np.float32) @ along
            keys, values = (from_float32(part, self._shape.dtype) for part in vectors)
            places = np.concatenate(positions).astype(self._shape.position_dtype)
            made.append(ExplicitMemory(offsets, places, keys, values))
        return made

    def _ids(self, batch: int, tokens: int) -> Tensor:
        ids = self._random.integers(0, 256, (batch, tokens))
        return torch.from_numpy(ids).to(self._model.device)

    # --- the ways ---

    def _alone(self, batch: int) -> tuple[float, float]:
        return self._transformers(batch, PROMPT)

    def _rag(self, batch: int) -> tuple[float, float]:
        return self._transformers(batch, PROMPT + TOGETHER * REFERENCE)

    @torch.no_grad()
    def _transformers(self, batch: int, tokens: int) -> tuple[float, float]:
        """By its own attention: a loop over its forward pass, which costs less than `generate`."""
        model = self._model.model
        ids = self._ids(batch, tokens)

        def first() -> tuple[Tensor, Any]:
            cache = DynamicCache(config=model.config)
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1), cache

        model.set_attn_implementation("sdpa")
        try:
            seconds, (chosen, cache) = self._firsts(first)

            def step(tokens: Tensor) -> Tensor:
                given = model(tokens[:, None], past_key_values=cache, use_cache=True)
                chosen: Tensor = given.logits[:, -1].argmax(-1)
                return chosen

            return seconds, self._decoded(step, chosen)
        finally:
            model.set_attn_implementation("memdb")

    def _decode(self, stored: Sequence[StoredMemory]) -> SetOfMemories:
        """As a generation does it on a GPU."""
        return self._decoder(pack_coded(stored, self._shape))

    def _pack(self, stored: Sequence[StoredMemory]) -> SetOfMemories:
        """As it does on a CPU."""
        return pack(stored, self._shape)

    def _decode_only(self, batch: int, by: _Decode | None = None) -> tuple[float, float]:
        """The memories of all sequences, from the database to the device."""
        queries = self._queries(batch)
        like = torch.zeros(
            1, self._shape.kv_heads, 0, self._shape.head_dim, dtype=self._model.model.dtype
        ).to(self._model.device)

        def decode() -> tuple[Tensor, Any]:
            found = self._db.retrieve_batch(queries, TOGETHER)
            sets = Sets([(by or self._decode)(retrieval.stored) for retrieval in found])
            there = [sets.sets(layer, like).keys for layer in self._shape.layers]
            return torch.stack([keys.flatten()[-1] for keys in there]), there

        return self._firsts(decode)[0], 0.0

    @torch.no_grad()
    def _memory(self, fixed: bool, batch: int, by: _Decode | None = None) -> tuple[float, float]:
        first = self._reader(batch, by or self._decode)
        seconds, (chosen, context) = self._firsts(first)
        if fixed and not context.fix(self._steps):
            raise ValueError("its steps cannot be recorded")
        return seconds, self._decoded(lambda tokens: context.step(tokens).argmax(-1), chosen)

    def _queries(self, batch: int) -> list[NDArray[np.float32]]:
        drawn = self._random.standard_normal((batch, _DIMENSION))
        return list(np.abs(drawn).astype(np.float32))

    def _reader(self, batch: int, decode: _Decode) -> Callable[[], tuple[Tensor, Context]]:
        """What reads a prompt behind memories: the first tokens, and the context that goes on."""
        ids = self._ids(batch, PROMPT).tolist()
        queries = self._queries(batch)

        def first() -> tuple[Tensor, Context]:
            found = self._db.retrieve_batch(queries, TOGETHER)
            context = Context(
                self._model,
                self._shape.prefix,
                PREFIX + REFERENCE,
                batch=batch,
                capacity=PROMPT + self._steps,
            )
            packed = [decode(retrieval.stored) for retrieval in found]
            logits = context.read([[Stretch(row, p)] for row, p in zip(ids, packed, strict=True)])
            return torch.cat(logits).argmax(-1), context

        return first

    # --- the clock ---

    def _firsts(self, call: Callable[[], tuple[Tensor, Any]]) -> tuple[float, tuple[Tensor, Any]]:
        """Median seconds of a call, and what it gave at last. The first one warms up."""
        seconds = []
        for _ in range(self._rounds + 1):
            self._wait()
            began = time.perf_counter()
            given = call()
            given[0].tolist()  # the tokens are here
            seconds.append(time.perf_counter() - began)
        return median(seconds[1:]), given

    def _decoded(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
        """Tokens/s of greedy steps; each waits for its tokens, as one that looks at them must."""
        warm = min(4, self._steps // 2)
        began = 0.0
        for number in range(self._steps - 1):
            if number == warm:
                self._wait()
                began = time.perf_counter()
            tokens = step(tokens)
            tokens.tolist()
        return len(tokens) * (self._steps - 1 - warm) / (time.perf_counter() - began)

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


# --- vLLM -----------------------------------------------------------------------------------------


def _vllm(
    name: str, config: Any, batches: Sequence[int], steps: int, rounds: int, ends: float
) -> Iterator[Row]:
    if time.monotonic() > ends:
        yield Row(name, 0, "vLLM", reason="no time was left")
        return
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        yield Row(name, 0, "vLLM", reason=_brief(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name in SHAPES:
                config.save_pretrained(folder)
            peer = _Peer(
                vllm.LLM(
                    folder if name in SHAPES else name,
                    load_format="dummy" if name in SHAPES else "auto",  # dummy: random weights
                    skip_tokenizer_init=True,
                    max_model_len=2048,
                    gpu_memory_utilization=0.6,
                    enable_prefix_caching=False,
                ),
                vllm.SamplingParams,
                steps,
                rounds,
            )
        except Exception as error:
            yield Row(name, 0, "vLLM", reason=_brief(error))
            return
        for batch in batches:
            yield _row(name, batch, "vLLM", partial(peer.answer, PROMPT), ends)
            longer = partial(peer.answer, PROMPT + TOGETHER * REFERENCE)
            yield _row(name, batch, "vLLM, RAG", longer, ends)
        del peer
    _free(torch.device("cuda"))


class _Peer:
    """vLLM with its model."""

    def __init__(self, llm: Any, options: Any, steps: int, rounds: int) -> None:
        self._llm, self._options = llm, options
        self._steps, self._rounds = steps, rounds
        self._random = np.random.default_rng(0)

    def answer(self, tokens: int, batch: int) -> tuple[float, float]:
        """Seconds to the first token of prompts of so many tokens, and tokens/s of decoding."""
        self._seconds(batch, tokens, 4)  # warms up
        first = median(self._seconds(batch, tokens, 1) for _ in range(self._rounds))
        whole = self._seconds(batch, tokens, self._steps)
        return first, batch * (self._steps - 1) / (whole - first)

    def _seconds(self, batch: int, tokens: int, new: int) -> float:
        ids = self._random.integers(0, 256, (batch, tokens)).tolist()
        options = self._options(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": row} for row in ids], options, use_tqdm=False)
        return time.perf_counter() - began
