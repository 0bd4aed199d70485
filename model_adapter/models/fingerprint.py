"""Fingerprints: do these weights give the same numbers as those?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

if TYPE_CHECKING:  # it takes a second to load
    import torch


def weights_fingerprint(module: torch.nn.Module, held: torch.dtype | None = None) -> str:
    """32 hexadecimal digits over the shapes and values of all parameters.

    Neither names nor dtypes take part, since libraries rename parameters from release to release,
    and the same weights may be loaded as bfloat16 here and as float32 there. XXH3-128: about as
    fast as memory can be read. It tells models apart; it is no protection against somebody who
    wants them to collide.

    Args:
        module: whose.
        held: of what its values are when they are rounded to this; default: as they are.
    """
    values = (parameter.detach() for parameter in module.parameters())
    rounded = values if held is None else (value.to(held) for value in values)
    return values_fingerprint(value.float().cpu().numpy() for value in rounded)


def values_fingerprint(parameters: Iterable[NDArray[np.float32]]) -> str:
    """The same of parameters that are arrays."""
    digests = []
    for values in parameters:
        digest = digest_of(values.shape)
        digest.update(np.ascontiguousarray(values).reshape(-1).data)
        digests.append(digest)
    return combined(digests)


def digest_of(shape: Sequence[int]) -> xxhash.xxh3_128:
    """The digest of a parameter of this shape, before its values, which are float32."""
    return xxhash.xxh3_128(str(tuple(shape)).encode())


def combined(digests: Iterable[xxhash.xxh3_128]) -> str:
    """The fingerprint of parameters with these digests, in whatever order."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(sorted(one.digest() for one in digests))))
