"""A float32 graph -> the same in float16, strongly typed: every tensor's type stands in the graph, as TensorRT 11 demands.

Convolutions and what follows them work in float16. Float32 stay

- the graph's inputs and output;
- GroupNormalization and Softmax, whose sums float16 cannot hold;
- whatever depends on the noise level alone (the embedding), until it meets the picture's features;
- whatever reaches the output without passing a convolution (the loop's own arithmetic inside a network, as residuals on `x`);
- convolutions of each channel by itself, which are not learnt but the wavelet of such arithmetic.

Works on the graph, so that a bundle needs neither its checkpoint nor PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sr3rt.errors import BundleIncompatible, ParityError

LARGEST = float(np.finfo(np.float16).max)
KEEPS = {"GroupNormalization", "Softmax"}  # float32 inside, float16 around
ONLY_DATA = {"Resize"}  # whose other float inputs are float32 by definition


def half(model: onnx.ModelProto, external: bytes = b"") -> onnx.ModelProto:
    """`model` with float16 weights, opset and names unchanged; its own copy. external: the file that its weights are in, if they are.

    Raises ParityError for a weight beyond float16's range, BundleIncompatible for a graph without types.
    """
    return _Half(model, external).model()


class _Half:
    def __init__(self, model: onnx.ModelProto, external: bytes) -> None:
        self._source, self._external = onnx.shape_inference.infer_shapes(model), external
        graph = self._source.graph
        values = (*graph.input, *graph.output, *graph.value_info)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        untyped = [name for node in graph.node for name in node.output if name not in types]
        if untyped:
            raise BundleIncompatible(f"the graph does not say what type {untyped[0]} has: export the bundle again")
        self._float = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self._weights = {item.name: item for item in graph.initializer if item.data_type == TensorProto.FLOAT}
        self._half: set[str] = set()  # float16 tensors
        self._level = {"level"}  # float32 tensors that depend on the level alone
        self._made: dict[tuple[str, int], str] = {}  # casts and converted weights
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[TensorProto] = []

    def model(self) -> onnx.ModelProto:
        graph = self._source.graph
        for node in graph.node:
            self._convert(node)
        for output in graph.output:
            self._finish(output.name)
        used = {name for node in self._nodes for name in node.input}
        kept = [self._inlined(item) for item in graph.initializer if item.name in used]
        made = helper.make_graph(self._nodes, graph.name, list(graph.input), list(graph.output), [*kept, *self._constants])
        made.value_info.extend(self._typed(value) for value in graph.value_info)
        model = helper.make_model(made, opset_imports=list(self._source.opset_import), ir_version=self._source.ir_version)
        onnx.checker.check_model(model)
        return model

    def _convert(self, source: onnx.NodeProto) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        if self._float.isdisjoint(source.output):  # numbers of places, and the like
            self._nodes.append(node)
            return
        data = [name for name in source.input if name in self._float or name in self._half]
        floats = [name for name in data if name not in self._half]
        alone = any(attribute.name == "group" for attribute in node.attribute)  # each channel by itself
        hard = [name for name in floats if name not in self._level]
        if node.op_type in KEEPS:
            self._cast_inputs(node, TensorProto.FLOAT)
            if any(name in self._half for name in data):
                self._lower(node)
        elif not alone and (node.op_type == "Conv" or (any(name in self._half for name in data) and not hard)):
            self._cast_inputs(node, TensorProto.FLOAT16)
            self._half.update(node.output)
        else:
            self._cast_inputs(node, TensorProto.FLOAT)
            if data and not hard and len(floats) == len(data):
                self._level.update(node.output)
        self._nodes.append(node)
        if node.op_type in KEEPS and any(name in self._half for name in source.output):
            self._nodes.append(helper.make_node("Cast", [node.output[0]], [source.output[0]], to=TensorProto.FLOAT16))

    def _lower(self, node: onnx.NodeProto) -> None:
        """The node writes float32 under another name; its own name is for the float16 copy."""
        name = node.output[0]
        node.output[0] = f"{name}.float32"
        self._half.add(name)

    def _cast_inputs(self, node: onnx.NodeProto, to: int) -> None:
        for i, name in enumerate(node.input):
            if i and node.op_type in ONLY_DATA:
                continue
            if name in self._weights:
                if to == TensorProto.FLOAT16:
                    node.input[i] = self._weight(name)
            elif (name in self._half) != (to == TensorProto.FLOAT16) and (name in self._half or name in self._float):
                node.input[i] = self._cast(name, to)

    def _cast(self, name: str, to: int) -> str:
        if (name, to) not in self._made:
            self._made[name, to] = f"{name}.{'half' if to == TensorProto.FLOAT16 else 'float'}"
            self._nodes.append(helper.make_node("Cast", [name], [self._made[name, to]], to=to))
        return self._made[name, to]

    def _weight(self, name: str) -> str:
        key = (name, TensorProto.FLOAT16)
        if key not in self._made:
            values = self._values(self._weights[name])
            largest = float(np.abs(values).max(initial=0))
            if not largest <= LARGEST:
                raise ParityError(f"{name} holds {largest:.4g}, and float16 ends at {LARGEST:.0f}: keep this network in float32")
            self._made[key] = f"{name}.half"
            self._constants.append(numpy_helper.from_array(values.astype(np.float16), self._made[key]))
        return self._made[key]

    def _typed(self, value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        typed = onnx.ValueInfoProto()
        typed.CopyFrom(value)
        if value.name in self._half:
            typed.type.tensor_type.elem_type = TensorProto.FLOAT16
        return typed

    def _inlined(self, weight: TensorProto) -> TensorProto:
        inside = weight.data_location != TensorProto.EXTERNAL
        return weight if inside else numpy_helper.from_array(self._values(weight), weight.name)

    def _values(self, weight: TensorProto) -> NDArray[Any]:
        if weight.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(weight)
        place = {item.key: item.value for item in weight.external_data}
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(weight.data_type)).newbyteorder("<")
        return np.frombuffer(self._external, kind, math.prod(weight.dims), int(place.get("offset", 0))).reshape(tuple(weight.dims))

    def _finish(self, name: str) -> None:
        """A graph output is float32 under its own name."""
        if name not in self._half:
            return
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [f"{name}.half" if one == name else one for one in names]
        self._nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
