"""Attention over memories and context each by themselves, merged: for passes of several tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from model_adapter.attention.merging import BLOCK, LOWEST, Part, attend, joined, scores_of
from model_adapter.attention.sight import LayerMemory, Rule, Sight, rows_of

# Tokens that stand before a pass, up to which they cost least as a part of it: a prefix.
_SHORT = 64


def in_parts(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    sight: Sight,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Part:
    """Memories and context each by themselves, merged: for a pass of several tokens, in which no
    mask is as large as tokens times tokens, and the context is copied for no stretch. Without
    gradients."""
    whole = _context(query, key, value, rule, sight, scale, softcap)
    if sinks is not None:
        whole = whole.beside(sinks)
    memory = _sets(layer, key, sight)
    if memory is None or memory.mask.shape[2] == 0:
        return whole
    rows, cut = query, sight.stretches
    if cut is not None:
        rows = rows_of(query.transpose(1, 2), cut).transpose(1, 2)
    mask = sight.memory_mask(rule, memory).float().clamp_min(LOWEST)
    mask = mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
    part = _memories(rows, memory, mask, value.shape[-1], scale, softcap)
    if cut is not None:
        part = part.at(cut.places, (query.shape[0], query.shape[2]))
    whole = whole + part
    if sight.witness is not None:
        logs = whole.logs if cut is None else rows_of(whole.logs, cut)
        scores = scores_of(rows, memory.keys, scale, softcap, mask)
        sight.witness((scores - logs.transpose(1, 2)[..., None]).exp(), memory)
    return whole


def _context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    sight: Sight,
    scale: float,
    softcap: float | None,
) -> Part:
    if not rule.is_causal:
        parts = []
        for block in sight.blocks(rule):
            seen = slice(block.first, block.end)
            parts.append(
                attend(
                    query[:, :, block.start : block.start + BLOCK],
                    key[:, :, seen],
                    value[:, :, seen],
                    scale,
                    mask=block.mask,
                    softcap=softcap,
                )
            )
        return joined(parts, 1)
    # What fills up a sequence stands behind all that its tokens see.
    cached = sight.cached
    if cached <= _SHORT and sight.hidden is None:
        # Queries that nobody asks about, so that the others stand where their keys do.
        more = query.new_zeros(query.shape[0], query.shape[1], cached, query.shape[3])
        led = torch.cat([more, query], 2) if cached else query
        part = attend(led, key, value, scale, causal=True, softcap=softcap)
        return Part(part.mixed[:, cached:], part.logs[:, cached:])
    own = key[:, :, cached:], value[:, :, cached:]
    before = key[:, :, :cached], value[:, :, :cached]
    return attend(query, *own, scale, causal=True, softcap=softcap) + attend(
        query, *before, scale, mask=sight.hidden, softcap=softcap
    )


def _memories(
    rows: Tensor,
    memory: LayerMemory,
    mask: Tensor,
    length: int,
    scale: float,
    softcap: float | None,
) -> Part:
    """Attention over memories: queries (sets, heads, tokens, head_dim), mask (sets, heads, 1 or
    tokens, width)."""
    per = rows.shape[1] // memory.keys.shape[1]
    parts = []
    for group in memory.in_groups:
        if group.width == 0:
            shape = rows.shape[0], rows.shape[2], (group.end - group.first) * per
            nothing = rows.new_full(shape, LOWEST, dtype=torch.float32)
            parts.append(Part(rows.new_zeros(*shape, length), nothing))
            continue
        own, start = slice(group.first, group.end), memory.mask.shape[2] - group.width
        heads = slice(group.first * per, group.end * per)
        parts.append(
            attend(
                rows[:, heads],
                memory.keys[:, own, start:],
                memory.values[:, own, start:, :length],
                scale,
                mask=mask[:, heads, :, start:],
                softcap=softcap,
            )
        )
    return joined(parts, 2)


def _sets(layer: int, like: Tensor, sight: Sight) -> LayerMemory | None:
    if sight.memories is None:
        return None
    if sight.stretches is not None:
        return sight.memories.sets(layer, like)
    joined = sight.memories.joined(layer)
    return sight.memories.sets(layer, like) if joined is None else joined.memory
