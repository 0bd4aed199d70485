"""Matrix products by oneDNN where MKL, torch's default on x86, is slow: on processors of AMD.

MKL leaves AVX-512 unused on another maker's processor. oneDNN, which torch has too, does not: for
passes of several tokens it multiplies float32 matrices about twice as fast there, out of the same
weights, and as exactly (benchmarks/products.py). So references are written, and texts and prompts
read, faster, and nothing else changes.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

#: Rows of a product from which on oneDNN is the faster one; a token that is decoded is one row.
_ROWS = 8


class Linear(torch.nn.Linear):
    """A Linear whose products of several rows are oneDNN's where that pays; with gradients, which
    oneDNN's product has not, it is torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if (
            torch.is_grad_enabled()
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or input.device.type != "cpu"
            or self.weight.device.type != "cpu"
            or input.numel() < _ROWS * self.in_features
            or not pays()
        ):
            return super().forward(input)
        return _product(input, self.weight, self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


def use_fast_products(model: torch.nn.Module) -> bool:
    """Let a model's Linear layers multiply by oneDNN, if that is the faster way on this machine.

    Parameters stay what they are. What is no `torch.nn.Linear` stays as it is.

    Args:
        model: any; its layers change in place, however often this is called.

    Returns:
        Whether they do.
    """
    if not pays():
        return False
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            # Another class, not another module: nobody who holds it, and no hook of it, is left
            # behind.
            layer.__class__ = Linear
    return True


@cache
def pays() -> bool:
    """Whether oneDNN is the faster one here, by the processor's maker, not by a measurement: one
    machine always gives the same numbers."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "AuthenticAMD" in _processor()
        and _is_right()
    )


def _processor() -> str:
    """What the system says of the processor, its maker included."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()


def _is_right() -> bool:
    """Whether oneDNN's product, a name that torch keeps for itself, is there and does what it did
    when this was written."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    rows = torch.randn(2, _ROWS, 40, generator=generator)
    try:
        found = _product(rows, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
    usual = torch.nn.functional.linear(rows, weight, bias)
    return found.shape == usual.shape and torch.allclose(found, usual, rtol=1e-4, atol=1e-4)
