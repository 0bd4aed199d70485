"""Attention of one token by rows: each kv head of each sequence over what it has, and no more.

What memories keep differs from head to head by a hundred times. In a mask over all places, each
head costs as much as the widest; here a row says where its keys begin and how many they are. Both
are tensors, and no shape depends on them, so that a GPU can record the step.

Memories end where the context begins, so a row is a run of places in a layer's buffer, and nothing
is copied. PyTorch's memory-efficient kernel reads such runs (`cu_seqlens_k`, `seqlen_k`). It is
tried against the plain way before it is believed.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from model_adapter.attention.merging import scores_of

_NEVER = -3e4  # for -inf, which is not a number once it is taken from itself


class Rows:
    """The keys and values of one layer, row by row.

    Args:
        keys: (batch, kv heads, places, head_dim), contiguous.
        values: (batch, kv heads, places, any), contiguous.
        lengths: (batch * kv heads,) int32, which becomes theirs: how many keys each row has.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        batch, kv_heads, places, _ = keys.shape
        count = batch * kv_heads
        self.keys, self.values, self.lengths = keys, values, lengths
        self.begin = 0  # the place where the context begins
        #: (rows + 1,) int32; the first place that each row reads, in all of them. The last is none.
        self.starts = torch.full((count + 1,), count * places, dtype=torch.int32).to(keys.device)
        #: (rows, places); what is added to the scores of each row's keys, from its first on.
        self.added = keys.new_zeros(count, places)
        self._ends: dict[int, Tensor] = {}

    def look(self, filled: Tensor | None, begin: int, length: int, mask: Tensor) -> None:
        """Take in what the buffer holds.

        Args:
            filled: (batch, kv heads) int64; how many places before the context memories fill; None:
                there are none.
            begin: the place where the context begins.
            length: of the context.
            mask: (batch, kv heads, 1, places) added to the scores of all that is there.
        """
        count, places = self.added.shape
        self.begin = begin
        filled = self.lengths.new_zeros(count, 1) if filled is None else filled.view(count, 1)
        first = begin - filled
        runs = torch.arange(count, device=first.device) * places
        self.starts[:-1] = first[:, 0] + runs
        self.lengths.copy_(filled[:, 0] + length)
        column = torch.arange(places, device=first.device)
        shifted = mask.view(count, places).gather(1, (first + column).clamp_max(places - 1))
        # What comes is seen.
        self.added.copy_(shifted.clamp_min(_NEVER).masked_fill(column >= filled + length, 0))

    def attend(self, query: Tensor, scale: float) -> Tensor | None:
        """Attention of one token of each sequence, without a gradient.

        Args:
            query: (batch, heads, 1, head_dim).
            scale: factor of the scores.

        Returns:
            (batch, 1, heads, length of a value); None: the kernel does not work here.
        """
        group = query.shape[1] // self.keys.shape[1]
        if query.device.type != "cuda":
            mixed = plain(self, query, scale)
        elif works(query.device, query.dtype, query.shape[3], self.values.shape[3], group):
            mixed = by_kernel(self, query, scale)
        else:
            return None
        return mixed.view(query.shape[0], 1, query.shape[1], -1)

    def ends(self, group: int) -> Tensor:
        """(rows + 1,) int32: where the queries of each row begin, `group` of them."""
        if group not in self._ends:
            places = torch.arange(len(self.starts), dtype=torch.int32, device=self.keys.device)
            self._ends[group] = places * group
        return self._ends[group]


def by_kernel(rows: Rows, query: Tensor, scale: float) -> Tensor:
    """(rows * group, length of a value) by PyTorch's kernel."""
    count, places = rows.added.shape
    group = query.shape[1] // rows.keys.shape[1]
    queries, total = count * group, count * places
    # To the kernel a row's bias begins `places` behind that of the row before, with its first key.
    added = rows.added.as_strided((1, 1, queries, total), (places, places, 0, 1))
    mixed, *_ = torch.ops.aten._efficient_attention_forward(
        query.reshape(1, queries, 1, query.shape[3]),
        rows.keys.view(1, total, 1, rows.keys.shape[3]),
        rows.values.view(1, total, 1, rows.values.shape[3]),
        added,
        rows.ends(group),
        rows.starts,
        group,  # the most queries of a row
        places,  # the most keys
        0.0,  # dropout
        0,  # no mask of its own
        False,  # nobody asks for the sums
        scale=scale,
        seqlen_k=rows.lengths,
    )
    return mixed.view(queries, -1)


def plain(rows: Rows, query: Tensor, scale: float) -> Tensor:
    """The same in plain steps."""
    count, places = rows.added.shape
    column = torch.arange(places, device=query.device)
    where = (rows.starts[:-1, None] + column).clamp_max(count * places - 1).long()
    keys, values = (part.flatten(0, 2)[where][:, None] for part in (rows.keys, rows.values))
    added = rows.added.float().masked_fill(column >= rows.lengths[:, None], -torch.inf)
    queries = query.reshape(count, -1, 1, query.shape[3])
    scores = scores_of(queries, keys, scale, None, added[:, None, None])
    mixed = scores.softmax(-1).to(values.dtype) @ values
    return mixed.view(-1, values.shape[-1])


@cache
def works(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, group: int
) -> bool:
    """Whether the kernel computes what the plain way does, tried once on rows of many lengths. If
    not, that is said."""
    batch, kv_heads, room, capacity = 3, 2, 48, 80
    given = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=given).to(device, dtype)

    places = room + capacity
    lengths = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)
    keys, values = (drawn(batch, kv_heads, places, size) for size in (head_dim, value_dim))
    rows = Rows(keys, values, lengths)
    filled = torch.tensor([[0, 48], [1, 17], [40, 8]], device=device)
    mask = drawn(batch, kv_heads, 1, places)
    mask[1, :, :, room + 3 : room + 20] = -torch.inf
    rows.look(filled, room, 61, mask)
    query = drawn(batch, kv_heads * group, 1, head_dim)
    try:
        off = (by_kernel(rows, query, head_dim**-0.5) - plain(rows, query, head_dim**-0.5)).abs()
        most = float(off.max())
    except (RuntimeError, TypeError) as error:
        refused = str(error).strip().partition("\n")[0]
    else:
        if most < 0.05:  # of numbers around 1; half precision errs by less than a tenth of it
            return True
        refused = f"it is off by {most:.2g}"
    warnings.warn(
        f"attention by rows does not work on {device} in {dtype} ({refused}); steps read all "
        "places there are, through a mask",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
