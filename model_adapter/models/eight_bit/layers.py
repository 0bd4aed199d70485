"""Linear layers and embeddings by weights of 8 bits, in the place of torch's."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from model_adapter.models.eight_bit.file import WeightFile
from model_adapter.models.eight_bit.graph import ROWS, Graph, bound
from model_adapter.models.eight_bit.huge_pages import in_huge_pages
from model_adapter.models.eight_bit.rounding import unrounded

#: Weights of a layer from which on its products are shared by several threads: each layer has
#: threads of its own.
_LARGE = 1 << 22


class EightBitLinear(torch.nn.Module):
    """A Linear without parameters: its weights lie in a file, and are read when it first runs.

    Args:
        file: of the weights.
        weight: the matrix's name there.
        bias: the name of what is added; None: nothing is.
    """

    def __init__(self, file: WeightFile, weight: str, bias: str | None) -> None:
        super().__init__()
        matrix = file.matrices[weight]
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self._names = (weight, bias)
        self._file = file
        self._session: tuple[int, Any] | None = None
        self._making = threading.Lock()

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), float32."""
        rows = input.detach().float().reshape(-1, self.in_features).contiguous()
        output = torch.empty(len(rows), self.out_features)
        session = self._made()
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            session.run_with_iobinding(bound(session, {"x": rows[part]}, {"y": output[part]}))
        return output.view(*input.shape[:-1], self.out_features)

    def _made(self) -> Any:
        process = os.getpid()  # a child that was forked has not the threads of its parent's
        if self._session is None or self._session[0] != process:
            with self._making:
                if self._session is None or self._session[0] != process:
                    graph = Graph(self._file)
                    weight, bias = self._names
                    graph.product("x", "y", weight, bias)
                    large = self.in_features * self.out_features >= _LARGE
                    threads = torch.get_num_threads() if large else 1
                    widths = {"x": self.in_features}, {"y": self.out_features}
                    with in_huge_pages() if large else nullcontext():
                        self._session = process, graph.session(*widths, threads)
        return self._session[1]

    def extra_repr(self) -> str:
        """Its shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class EightBitEmbedding(torch.nn.Module):
    """An embedding whose rows are read from the file when they are asked for.

    Args:
        file: of the weights.
        weight: the matrix's name there.
        scale: what rows are multiplied by (Gemma).
    """

    def __init__(self, file: WeightFile, weight: str, scale: float = 1.0) -> None:
        super().__init__()
        matrix = file.matrices[weight]
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns
        self._names = (matrix.numbers, matrix.scales)
        self._file = file
        self._scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids to (..., embedding_dim) float32."""
        ids = input.flatten().tolist()
        numbers, scales = (self._file.rows(name, ids) for name in self._names)
        rows = unrounded(numbers, scales, self.embedding_dim)
        rows = rows.view(*input.shape, self.embedding_dim)
        return rows if self._scale == 1 else rows * self._scale

    def extra_repr(self) -> str:
        """Its shape."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
