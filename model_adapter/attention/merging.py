"""Several attentions of the same queries, merged into what one softmax over all their keys gives.

Each attention comes with the logarithm of the sum of what its softmax divides by. With it, the
mean of the results, weighted by these sums, is the whole. So memories, what was read before, and
what is being read are attended to where they lie, each in its own way.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: Stands for -inf in what is added to scores: a row that sees nothing still has a mean.
LOWEST = -1e30
#: Queries whose scores against all keys are held at once, where no kernel does without.
BLOCK = 256


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys.

    Attributes:
        mixed: (rows, queries, heads, length of a value).
        logs: (rows, queries, heads) float32: the logarithm of the sum of the exponentials of all
            scores.
    """

    mixed: Tensor
    logs: Tensor

    def __add__(self, other: Part) -> Part:
        """Attention over the keys of both."""
        share = torch.sigmoid(other.logs - self.logs)[..., None]
        mixed = torch.lerp(self.mixed, other.mixed, share.to(self.mixed.dtype))
        return Part(mixed, torch.logaddexp(self.logs, other.logs))

    def beside(self, sinks: Tensor) -> Part:
        """With one more score in the softmax for each head, (heads,), which has no value."""
        share = torch.sigmoid(self.logs - sinks.float())[..., None]
        return Part(
            self.mixed * share.to(self.mixed.dtype), torch.logaddexp(self.logs, sinks.float())
        )

    def at(self, places: Tensor, shape: tuple[int, int]) -> Part:
        """Its queries in another order: those at these `places` of the flattened (rows * queries),
        as (rows, queries) of this shape."""
        both = (x.flatten(0, 1).index_select(0, places) for x in (self.mixed, self.logs))
        return Part(*(x.unflatten(0, shape) for x in both))


def joined(parts: Sequence[Part], along: int) -> Part:
    """Attentions of other queries (along 1) or of other heads (along 2), side by side."""
    mixed = torch.cat([part.mixed for part in parts], along)
    return Part(mixed, torch.cat([part.logs for part in parts], along))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Part:
    """Attention over some keys, at least one. It has no gradient.

    Args:
        query: (rows, heads, queries, head_dim).
        keys: (rows, kv heads, n, head_dim).
        values: (rows, kv heads, n, any).
        scale: factor of the scores.
        mask: float32, added to the scores, of a shape that expands to (rows, heads, queries, n).
            A query that sees nothing needs `LOWEST` in the place of -inf.
        causal: whether query i sees the keys up to i only.
        softcap: scores s become softcap * tanh(s / softcap), before the mask.
    """
    same = query.shape[-1] == values.shape[-1]
    if softcap is None and same and query.device.type == "cpu" and query.dtype in _ON_CPU:
        mixed, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, attn_mask=mask, scale=scale
        )
        return Part(mixed.transpose(1, 2), logs.transpose(1, 2))
    if softcap is None and same and query.device.type in _WITH_KERNEL:
        try:
            return _on_cuda(query, keys, values, scale, mask, causal)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _say_refused(str(query.device), str(error).strip().partition("\n")[0])
    return _in_blocks(query, keys, values, scale, mask, causal, softcap)


_WITH_KERNEL = ("cuda",)
_ON_CPU = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Part:
    group = query.shape[1] // keys.shape[1]
    if group > 1:  # that kernel wants as many of both
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if mask is not None:
        rows, heads, queries, _ = query.shape
        count = keys.shape[2]
        room = -(-count // 8) * 8  # it reads rows of a mask that begin at multiples of 16 bytes
        wide = query.new_zeros(*mask.shape[:-1], room)
        # Half precision has no -1e30, and needs none: 30,000 is as far as never.
        wide[..., :count] = mask.clamp_min(-3e4)
        mask = wide[..., :count].expand(rows, heads, queries, count)
    mixed, logs, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, mask, True, 0.0, causal, scale=scale
    )
    logs = logs[:, :, : query.shape[2]].float()  # it comes filled up
    return Part(mixed.transpose(1, 2), logs.transpose(1, 2))


@cache
def _say_refused(device: str, why: str) -> None:
    warnings.warn(
        f"PyTorch's attention kernel does not work on {device} ({why}); it is computed in plain "
        "steps, which takes longer",
        RuntimeWarning,
        stacklevel=4,
    )


def _in_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
) -> Part:
    """In plain steps, some queries at a time."""
    count = keys.shape[2]
    places = torch.arange(count, device=keys.device)
    parts = []
    for start in range(0, query.shape[2], BLOCK):
        block = query[:, :, start : start + BLOCK]
        end = min(start + BLOCK, count) if causal else count
        added = None
        if mask is not None:
            own = slice(start, start + BLOCK) if mask.shape[2] > 1 else slice(None)
            added = mask[:, :, own, :end]
        scores = scores_of(block, keys[:, :, :end], scale, softcap, added)
        if causal:
            later = places[:end] > places[start : start + BLOCK, None]
            scores = scores.masked_fill(later, LOWEST)
        logs = scores.logsumexp(-1)
        weights = (scores - logs[..., None]).exp().to(values.dtype)
        group = query.shape[1] // values.shape[1]
        # Query heads of one kv head side by side: values need no copies.
        weights = weights.unflatten(1, (-1, group)).flatten(2, 3)
        mixed = (weights @ values[:, :, :end]).unflatten(2, (group, -1)).flatten(1, 2)
        parts.append(Part(mixed.transpose(1, 2), logs.transpose(1, 2)))
    return joined(parts, 1)


def scores_of(
    query: Tensor, keys: Tensor, scale: float, softcap: float | None, mask: Tensor | None
) -> Tensor:
    """(rows, heads, queries, n) float32: the scores that a softmax is taken of; see `attend`. In
    float32, since half precision ends at 65504."""
    group = query.shape[1] // keys.shape[1]
    gathered = query.float().unflatten(1, (-1, group)).flatten(2, 3)
    scores = (gathered @ keys.float().transpose(2, 3)).unflatten(2, (group, -1)).flatten(1, 2)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if mask is None else scores + mask
