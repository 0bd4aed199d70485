"""Bringing a model into memory: from where, onto what, in which numbers; and of one that reads more
than text, its language model alone.

What is taken from transformers is imported where it is asked for: a model whose rounded weights are
kept needs little of it, and all of it takes two seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

from memdb import DType, InvalidInputError, MemDBError
from model_adapter.catalog import CATALOG, Notify, in_brief, pull
from model_adapter.models.eight_bit.graph import is_fast
from model_adapter.models.eight_bit.reading import (
    Exact,
    ExactWeights,
    ReadingAdapter,
    kept_model,
    rounded_model,
)
from model_adapter.models.fingerprint import weights_fingerprint
from model_adapter.models.gguf_models import exact_model, gguf_in, is_gguf, model_folder
from model_adapter.models.loading_options import require_device, require_no_code, warn_of_fast

_TOKENS = 8


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        device: default: the GPU if there is one (CUDA's, else Apple's), else the CPU.
        dtype: what it computes in, by name or torch's; default: float32 on a CPU, else as the
            weights are stored (float16 in the place of bfloat16 where the GPU has none).
        device_map: spread its layers over several devices, as transformers and accelerate do
            (`auto`, or layers by name); in the place of `device`.
        threads: of torch on the CPU, for the whole process; default: torch's.
        revision: of a model of a hub: a branch, a tag or a commit.
        quantization_config: as transformers takes it, an object, or a dictionary with
            `quant_method`.
        trust_remote_code: whether code that comes with the model may run.
        exact: read by the exact weights. Else on a CPU, in float32, prompts and answers are read by
            weights of 8 bits, where the processor has a kernel for them.
        fast: does nothing: what it asked for is less than the default now.

    Raises:
        InvalidInputError: naming the option.
    """

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    device_map: str | dict[str, Any] | None = None
    threads: int | None = None
    revision: str | None = None
    quantization_config: Any = None
    trust_remote_code: bool = False
    exact: bool = False
    fast: bool = False

    def __post_init__(self) -> None:
        if self.fast:
            warn_of_fast()
        if isinstance(self.dtype, str) and self.dtype not in get_args(DType):
            raise InvalidInputError(
                f"the dtype is one of {', '.join(get_args(DType))}, not {self.dtype!r}"
            )
        if self.threads is not None and (isinstance(self.threads, bool) or self.threads < 1):
            raise InvalidInputError(f"threads must be at least 1, got {self.threads!r}")
        if self.device is not None:
            if self.device_map is not None:
                raise InvalidInputError("give a device or a device_map, not both")
            require_device(self.device)

    @property
    def key(self) -> object:
        """What tells two apart."""
        told = (field.name for field in fields(self) if field.name != "fast")
        return tuple(repr(getattr(self, name)) for name in told)

    @property
    def place(self) -> torch.device | None:
        """The device that all of it goes to; None: it is spread over several."""
        if self.device_map is not None:
            return None
        return default_device() if self.device is None else torch.device(self.device)

    @property
    def numbers(self) -> torch.dtype | None:
        """What it computes in; None: as its weights are stored."""
        if isinstance(self.dtype, str):
            return getattr(torch, self.dtype)
        place = self.place
        cpu = place is not None and place.type == "cpu"
        if self.dtype is None and cpu and self.quantization_config is None:
            return torch.float32
        return self.dtype


def default_device() -> torch.device:
    """CUDA's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer.

    Attributes:
        name: how to load it again.
        model: of transformers, or of weights of 8 bits.
        tokenizer: its own.
        fingerprint: of the weights as they are stored, where they are held in fewer bits than that;
            else None: it can be taken of the model.
        exact: the exact weights, where those of the model are rounded to 8 bits.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str | None
    exact: ExactWeights | None = None


def load(
    name: str, loading: Loading, notify: Notify, adapter: ReadingAdapter | None = None
) -> Loaded:
    """Load a model by a name of the catalogue, by folder, by GGUF file, or by Hugging Face id, that
    may end in @ and a revision. An adapter that reads is in the weights if these are rounded to 8
    bits; else they are the model's own.

    Raises:
        InvalidInputError: it cannot be loaded.
    """
    entry = CATALOG.get(name)
    if entry is not None and entry.kind != "language":
        raise InvalidInputError(f"'{name}' is an embedder, not a language model")
    source, revision = name, loading.revision
    if entry is not None or Path(name).is_dir() or is_gguf(name):
        if revision is not None:
            raise InvalidInputError(
                f"a revision ('{revision}') is one of a model of a hub; '{name}' is none"
            )
        if entry is not None:
            source = str(pull(name, notify))
        else:
            name = str(Path(name).resolve())
            source = str(model_folder(name, notify) or name)
    else:
        source, _, at = name.partition("@")
        revision = revision or at or None
        name = source if revision is None else f"{source}@{revision}"
    if loading.threads is not None:
        torch.set_num_threads(loading.threads)
    try:
        return _load(name, source, revision, loading, notify, adapter)
    except MemDBError:
        raise
    except Exception as error:  # hub, file and configuration errors have no common base
        require_no_code("model", name, error)
        raise InvalidInputError(
            f"the model '{name}' cannot be loaded: {in_brief(error)}"
        ) from error


def _load(
    name: str,
    source: str,
    revision: str | None,
    loading: Loading,
    notify: Notify,
    adapter: ReadingAdapter | None,
) -> Loaded:
    trusted = loading.trust_remote_code
    of = {"revision": revision, "trust_remote_code": trusted} if revision else {}
    of = {"trust_remote_code": trusted, **of}
    place, numbers = loading.place, loading.numbers

    @cache
    def config() -> Any:
        return transformers.AutoConfig.from_pretrained(source, **of)

    @cache
    def tokenizer() -> Any:
        return transformers.AutoTokenizer.from_pretrained(source, **of)

    def read(dtype: torch.dtype | None) -> Any:
        gguf = gguf_in(Path(source)) if Path(source).is_dir() else []
        auto, as_told = _auto(config()), {"dtype": dtype or "auto", **how}
        if gguf:
            model = exact_model(auto, Path(source), gguf, config(), **as_told)
        else:
            model = auto.from_pretrained(source, **as_told)
        return language_model_of(model)

    how: dict[str, Any] = dict(of)
    given = Exact(source, revision, config, tokenizer, lambda: read(numbers))
    if _may_be_rounded(loading):
        rounded = kept_model(given, adapter)
        if rounded is None and _can_be_rounded(config()):
            tokenizer()  # what is wrong with it is said before weights are read
            rounded = rounded_model(given, adapter, notify)
        if rounded is not None:
            return Loaded(name, rounded.model, rounded.tokenizer, None, rounded.exact)
    quantized = loading.quantization_config or getattr(config(), "quantization_config", None)
    if loading.quantization_config is not None:
        how["quantization_config"] = loading.quantization_config
    if place is None:
        how["device_map"] = loading.device_map
    elif quantized is not None:
        how["device_map"] = {"": place}  # it is packed as it arrives there
    fingerprint = None
    if quantized is None and numbers in (torch.float16, torch.bfloat16):
        # As they are stored they may have more bits than are wanted; whose they are, all bits say.
        model = read(None)
        if model.dtype != numbers:
            fingerprint = weights_fingerprint(model)
            del model
            model = read(numbers)
    else:
        model = read(numbers)
    if place is not None and quantized is None:
        if place.type == "mps" and model.dtype == torch.bfloat16 and not _has_bfloat16(place):
            fingerprint = weights_fingerprint(model)
            model = model.half()
        model = model.to(place)
    return Loaded(name, model, tokenizer(), fingerprint)


def _may_be_rounded(loading: Loading) -> bool:
    """Whether a model is to be read by weights of 8 bits here, if it can be."""
    place = loading.place
    asked = not loading.exact and loading.numbers == torch.float32
    plain = not loading.trust_remote_code and loading.quantization_config is None
    return asked and plain and place is not None and place.type == "cpu" and is_fast()


def _can_be_rounded(config: Any) -> bool:
    """Whether a model can be made of weights of 8 bits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    alone = config.get_text_config() is config and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return alone and getattr(config, "quantization_config", None) is None


def _has_bfloat16(device: torch.device) -> bool:
    """Apple's GPU has it from macOS 14 on."""
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device).add_(1).cpu()
    except (RuntimeError, TypeError):
        return False
    return True


def _auto(config: Any) -> Any:
    """What of transformers loads a model of this configuration."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    remote: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    kind = type(config)
    reads_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and reads_images and not remote:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


@torch.no_grad()
def language_model_of(model: Any) -> Any:
    """Of a model that reads more than text its language model, if transformers has a class for that
    alone and it says the same; else the model as it is.

    What it is made of are the model's own modules: no weight is copied.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model.config.get_text_config()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if config is model.config or decoder is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return model
    with suppress(Exception):  # its configuration or its modules are of another kind
        with torch.device("meta"):
            alone = transformers.AutoModelForCausalLM.from_config(config)
        if alone.config is config and type(alone.base_model) is type(decoder):
            setattr(alone, alone.base_model_prefix, decoder)
            alone.set_output_embeddings(model.get_output_embeddings())
            whole = not any(weight.is_meta for weight in alone.parameters())
            if whole and _say_the_same(model.eval(), alone.eval()):
                alone.generation_config = model.generation_config
                return alone
    return model


def _say_the_same(one: Any, other: Any) -> bool:
    ids = torch.arange(3, 3 + _TOKENS, device=one.device)[None] % other.config.vocab_size
    return torch.allclose(one(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)
