"""Faster decoding on a CPU: each Linear layer holds its weights a second time, in half the bytes.

A pass of one token waits for the weights: float32 SmolLM2-135M reads 540 MB for each. `make_fast`
adds a float16 copy to every `torch.nn.Linear` (the output head too), laid out for FBGEMM, which
multiplies it with float32 activations into float32 sums. Only what decodes reads the copy; passes
of several tokens a sequence, in which prompts are read and memories written, read the weights
themselves and give the same bits as before.

The price is memory: 1.5 times the weights of a float32 model, twice those of a bfloat16 one.
The error is the rounding of the weights, 2 ** -11 relative: on 1500 tokens of English, SmolLM2's
negative log-likelihood is the same to 5 digits and its first choice the same for 99.9% of them.

Why not fewer bytes: torch's int8 and int4 kernels with exact activations are no faster than this
one at one row and slower at several, and those that round the activations as well are little
faster and spoil the model (0.1 to 1 nat a token), whose activations have outliers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from memdb import InvalidInputError
from model_adapter.models.products import Linear

Precision = Literal["exact", "float16"]
Passes = Literal["decoding", "all", "none"]

_PLAIN = (torch.nn.Linear, Linear)

_passes: ContextVar[Passes] = ContextVar("passes", default="decoding")


def make_fast(model: torch.nn.Module, precision: Precision) -> int:
    """Change, in place, by which weights a model decodes on a CPU.

    Its parameters stay what they are, the same objects with the same names, tied or not, and so
    does its fingerprint. The copies are no parameters and no buffers: they are not saved, they do
    not move with `model.to(...)`, and they do not follow when weights change. Call it last, and
    not while another thread runs the model.

    A layer whose weights float16 cannot hold (the largest beyond 65504 or below 2 ** -14) stays
    as it is, and so does everything that is no `torch.nn.Linear`.

    Args:
        model: any decoder of transformers; float32 or bfloat16, on a CPU.
        precision: of the weights that decoding reads; `exact`: the parameters, which takes the
            copies away again.

    Returns:
        How many layers decode with a copy now.

    Raises:
        InvalidInputError: the model is not on a CPU, or torch has no float16 kernel for this one.
            Nothing was changed.
    """
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if precision == "exact":
        for layer in layers:
            if type(layer) is _FastLinear:
                layer.__class__ = Linear  # type: ignore[assignment]
                del layer.small
        return 0
    if precision != "float16":
        raise InvalidInputError(f"precision '{precision}' is none of: exact, float16")
    _require_kernel(model)
    plain = [layer for layer in layers if type(layer) in _PLAIN and _fits(layer.weight)]
    packed = [_packed(layer) for layer in plain]  # all, before the first is used
    for layer, small in zip(plain, packed, strict=True):
        # Another class, not another module: nobody who holds it, and no hook of it, is left behind.
        layer.__class__ = _FastLinear
        layer.small = small  # type: ignore[assignment]
    return sum(type(layer) is _FastLinear for layer in layers)


@contextmanager
def fast_passes(passes: Passes) -> Iterator[None]:
    """Choose, for this thread and within the `with`, which forward passes read the copies.

    Args:
        passes: `decoding`: those of one token a sequence, however many sequences (this holds
            without the `with`). `all`: every pass, by which a benchmark sees what the rounding
            changes when an answer is given to the model and not decoded. `none`.
    """
    token = _passes.set(passes)
    try:
        yield
    finally:
        _passes.reset(token)


class _FastLinear(Linear):
    """A Linear with a copy: `small(input)` is its result by the copy, for at least two axes."""

    small: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the input."""
        passes = _passes.get()
        if (
            passes == "all" or (passes == "decoding" and input.dim() == 3 and input.shape[1] == 1)
        ) and not torch.is_grad_enabled():  # the copy has no gradient
            return self.small(input)
        return super().forward(input)

    # What is packed and compiled can be neither copied nor pickled, but made again.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "small"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.small = _packed(self)


class _Half(torch.nn.Module):
    """The copy. A module, since that is what TorchScript compiles."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        result = torch.ops.quantized.linear_dynamic_fp16(input.float(), self.packed)
        return result.to(input.dtype)


def _packed(layer: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
    bias = None if layer.bias is None else layer.bias.detach().float()
    half = _Half(layer.weight.detach().float(), bias)
    try:
        # Handing the packed weights from Python to the kernel takes 20 microseconds, a third of
        # what all layers of a small model take. A compiled module has them at hand.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(half).forward
    except Exception:  # TorchScript is deprecated and may not know a newer Python
        return half.forward


def _fits(weight: Tensor) -> bool:
    half = torch.finfo(torch.float16)
    return bool(half.tiny <= weight.detach().abs().max() <= half.max)


def _require_kernel(model: torch.nn.Module) -> None:
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        raise InvalidInputError(
            f"the model is on '{device}'; precision 'float16' is for decoding on a CPU. Use 'exact'"
        )
    try:
        _Half(torch.eye(8), None)(torch.ones(1, 8))
    except (RuntimeError, AttributeError) as error:  # the latter: torch was built without it
        raise InvalidInputError(
            "torch has no kernel for float16 weights on this processor (it needs x86 with AVX2, "
            f"and torch.backends.quantized.engine is '{torch.backends.quantized.engine}'). "
            "Use precision 'exact'"
        ) from error
