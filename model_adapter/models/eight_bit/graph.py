"""Small graphs for ONNX Runtime, bound to torch's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from model_adapter.models.eight_bit.file import WeightFile
from model_adapter.models.eight_bit.rounding import BLOCK, rounded, unrounded
from model_adapter.models.onnx_graph import OnnxGraph, opened

#: Rows that one run of a graph takes: so what it needs beside is small, however long a prompt is.
ROWS = 256
#: Inputs that are no rows: the numbers of the rows, (1, rows) int64, and tables by these numbers.
PLACES, TABLES = "places", ("cos", "sin")
#: Threads of a graph, at most: each has its own, which sleep while it does not run.
_THREADS = 8
#: How long they wait awake for the next product of the graph before they sleep.
_SPIN_MICROSECONDS = 20

_KINDS = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float32): TensorProto.FLOAT}


class Graph(OnnxGraph):
    """A graph while it is made: nodes, and the weights that they need.

    Args:
        file: where weights lie that are asked for by name.
    """

    def __init__(self, file: WeightFile | None = None) -> None:
        super().__init__()
        self._file = file

    def weight(self, names: Sequence[str]) -> str:
        """Weights of the file that lie side by side, which are mapped, as one; its name."""
        assert self._file is not None
        places = [self._file.places[name] for name in names]
        first, name = places[0], "+".join(names)
        tensor = TensorProto(
            name=name, data_type=_KINDS[first.dtype], data_location=TensorProto.EXTERNAL
        )
        tensor.dims.extend([sum(place.shape[0] for place in places), *first.shape[1:]])
        length = sum(place.length for place in places)
        where = {"location": self._file.path.name, "offset": first.start, "length": length}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self._weights[name] = tensor
        return name

    def product(self, rows: str, output: str, weight: str, bias: str | None = None) -> None:
        """Rows times a weight of the file that is rounded to 8 bits."""
        self._products(rows, output, [weight], [] if bias is None else [bias])

    def products(
        self,
        rows: str,
        outputs: Mapping[str, int],
        weights: Sequence[str],
        biases: Sequence[str | None],
    ) -> None:
        """The same rows times several weights, and what comes of it cut into outputs of these
        widths. Weights that lie side by side in the file are one: its bytes come in one stream, and
        rows are rounded once."""
        given = [bias for bias in biases if bias is not None]
        whole = "+".join(outputs)
        if len(given) in (0, len(weights)) and self._are_side_by_side(weights, given):
            self._products(rows, whole, weights, given)
        else:
            parts = [f"{whole}.{number}" for number in range(len(weights))]
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                self.product(rows, part, weight, bias)
            self.node("Concat", parts, [whole], axis=-1)
        if len(outputs) > 1:
            cut = self.constant(f"{whole}.widths", np.array([*outputs.values()], np.int64))
            self.node("Split", [whole, cut], list(outputs), axis=-1)

    def _products(
        self, rows: str, output: str, weights: Sequence[str], biases: Sequence[str]
    ) -> None:
        assert self._file is not None
        matrices = [self._file.matrices[weight] for weight in weights]
        names = [
            self.weight([matrix.numbers for matrix in matrices]),
            self.weight([matrix.scales for matrix in matrices]),
        ]
        added = ["", "", self.weight(biases)] if biases else []
        width = sum(matrix.rows for matrix in matrices)
        self._product([rows, *names, *added], output, width, matrices[0].columns)

    def _are_side_by_side(self, weights: Sequence[str], biases: Sequence[str]) -> bool:
        assert self._file is not None
        matrices = [self._file.matrices[weight] for weight in weights]
        runs = (
            [matrix.numbers for matrix in matrices],
            [matrix.scales for matrix in matrices],
            list(biases),
        )
        places = [[self._file.places[name] for name in names] for names in runs]
        return len({matrix.columns for matrix in matrices}) == 1 and all(
            one.start + one.length == other.start for run in places for one, other in pairwise(run)
        )

    def product_of_arrays(
        self,
        rows: str,
        output: str,
        numbers: NDArray[np.uint8],
        scales: NDArray[np.float32],
        columns: int,
    ) -> None:
        """The same for a weight that the graph itself holds."""
        names = [
            self.constant(f"{output}.numbers", numbers),
            self.constant(f"{output}.scales", scales),
        ]
        self._product([rows, *names], output, len(numbers), columns)

    def _product(self, inputs: Sequence[str], output: str, rows: int, columns: int) -> None:
        self.node(
            "com.microsoft/MatMulNBits",
            inputs,
            [output],
            K=columns,
            N=rows,
            bits=8,
            block_size=BLOCK,
            accuracy_level=4,  # activations, too, as 8 bits in blocks
        )

    def session(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        threads: int,
    ) -> Any:
        """The graph ready to run, (1, rows, width) float32 in and out, as `bound` has it.

        Args:
            inputs: their widths; that of `PLACES` is not looked at.
            outputs: their widths.
            threads: see `_THREADS`.
        """

        def declared(names: Mapping[str, int]) -> list[Any]:
            shapes: dict[str, list[Any]] = {PLACES: [1, "rows"]}
            shapes |= {name: ["rows", names[name]] for name in TABLES if name in names}
            return [
                helper.make_tensor_value_info(
                    name,
                    TensorProto.INT64 if name == PLACES else TensorProto.FLOAT,
                    shapes.get(name, [1, "rows", width]),
                )
                for name, width in names.items()
            ]

        settings = {
            "session.intra_op.allow_spinning": "1",
            "session.intra_op.spin_duration_us": str(_SPIN_MICROSECONDS),
        }
        if self._file is not None:
            settings["session.model_external_initializers_file_folder_path"] = str(
                self._file.path.parent
            )
        model = self.model(declared(inputs), declared(outputs))
        # What a run needs beside is small, and there are many graphs: none keeps an arena.
        return opened(model, max(1, min(threads, _THREADS)), settings, arena=False)


def bound(session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
    """A session's inputs and outputs bound to tensors, (rows, width) and contiguous, which must
    outlive it."""
    binding = session.io_binding()
    for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, tensor in tensors.items():
            kind = np.int64 if name == PLACES else np.float32
            shape = tuple(tensor.shape) if name in TABLES else (1, *tensor.shape)
            bind(name, "cpu", 0, kind, shape, tensor.data_ptr())
    return binding


@cache
def is_fast() -> bool:
    """Whether ONNX Runtime has a kernel of its own for such products on this processor. What it
    computes tells: the kernel rounds activations, what stands in for it (and is slow) does not."""
    generator = torch.Generator().manual_seed(0)
    weights, row = (torch.randn(count, 64, generator=generator) for count in (64, 1))
    numbers, scales = rounded(weights)
    graph = Graph()
    graph.product_of_arrays("x", "y", numbers.numpy(), scales.numpy(), 64)
    (found,) = graph.session({"x": 64}, {"y": 64}, threads=1).run(None, {"x": row.numpy()[None]})
    exact = row @ unrounded(numbers, scales, 64).T
    return not np.allclose(found[0], exact.numpy(), rtol=1e-4, atol=1e-4)
