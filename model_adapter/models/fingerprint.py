"""Fingerprints: do these weights give the same numbers as those?"""

from __future__ import annotations

import torch
import xxhash


def weights_fingerprint(module: torch.nn.Module) -> str:
    """32 hexadecimal digits over the shapes and values of all parameters.

    Neither names nor dtypes take part, since libraries rename parameters from release to release,
    and the same weights may be loaded as bfloat16 here and as float32 there. XXH3-128: about as
    fast as memory can be read. It tells models apart; it is no protection against somebody who
    wants them to collide.
    """
    digests = []
    for parameter in module.parameters():
        values = parameter.detach().float().cpu().contiguous()
        digest = xxhash.xxh3_128(str(tuple(values.shape)).encode())
        digest.update(memoryview(values.reshape(-1).numpy()))  # type: ignore[arg-type]
        digests.append(digest.digest())
    return str(xxhash.xxh3_128_hexdigest(b"".join(sorted(digests))))
