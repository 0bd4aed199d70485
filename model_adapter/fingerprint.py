"""Fingerprints: do these weights give the same numbers as those?"""

from __future__ import annotations

import torch
import xxhash


def weights_fingerprint(module: torch.nn.Module) -> str:
    """32 hexadecimal digits over the names, dtypes, shapes and bytes of all parameters.

    XXH3-128: about as fast as memory can be read. It tells models apart; it is no protection
    against somebody who wants them to collide.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(module.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return str(digest.hexdigest())
