"""A graph of ONNX while it is made, and ready to run. Nothing here waits for torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_OPSETS = (("", 17), ("com.microsoft", 1))


class OnnxGraph:
    """Nodes, and the arrays that they need.

    Attributes:
        handed: arrays that the model only names, to be handed to `opened`.
    """

    def __init__(self) -> None:
        self.handed: dict[str, NDArray[np.float32]] = {}
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """Add an operation of ONNX; `com.microsoft/...` for one of ONNX Runtime's own
        (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md)."""
        domain, _, name = kind.rpartition("/")
        self._nodes.append(helper.make_node(name, inputs, outputs, domain=domain, **attributes))

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """An array that the graph itself holds; its name."""
        self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def hand(self, name: str, values: NDArray[np.float32]) -> str:
        """An array that is used where it lies; its name. A large one is not copied so: what the
        graph itself holds is, five times."""
        self.handed[name] = np.ascontiguousarray(values)
        tensor = TensorProto(
            name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
        )
        tensor.dims.extend(values.shape)
        tensor.external_data.add(key="location", value="handed")
        self._weights[name] = tensor
        return name

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        """The whole, given what goes in and out (`onnx.helper.make_tensor_value_info`)."""
        weights = list(self._weights.values())
        graph = helper.make_graph(self._nodes, "graph", inputs, outputs, weights)
        sets = [helper.make_opsetid(*opset) for opset in _OPSETS]
        made = helper.make_model(graph, opset_imports=sets, ir_version=9)
        serialized: bytes = made.SerializeToString()
        return serialized


def opened(
    model: bytes,
    threads: int,
    settings: Mapping[str, str],
    handed: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    *,
    arena: bool = True,
) -> onnxruntime.InferenceSession:
    """A model ready to run on the CPU.

    Args:
        model: see `OnnxGraph.model`.
        handed: see `OnnxGraph`; they must outlive it.
        threads: that share an operation; 0: as many as there are cores.
        settings: of the session, by ONNX Runtime's names.
        arena: whether it keeps what a run needs beside, and plans it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in handed.values()]
    options.add_external_initializers(list(handed), values)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
