"""A program (docs/program.md) -> the same as an ONNX graph, whose weights stay in the program's own file.

The graph is of opset 21, with free batch, height and width. A value is named after the register that it goes into. A program that
computes something of x alone is also given in two parts, so that this need not be computed at every step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from sr3rt.bundle import NETWORK, ONCE, STEP
from sr3rt.program import GAIN, LIFT, parts
from sr3rt.safetensors import Weights

OPSET = 21
IR = 10  # the version of ONNX's file format that came with it
INSIDE = 256  # bytes; smaller tensors are copied into the graph

LEAST = 1e-7  # of 1 - gamma
END = np.iinfo(np.int64).max
HEIGHT, WIDTH = 2, 3


def graphs(program: Mapping[str, Any], weights: Path, *, channels: int) -> dict[str, onnx.ModelProto]:
    """By file name, the graphs of a program whose tensors are in the file `weights`, for pictures of so many channels.

    NETWORK from x, y and level to out. Where convolutions depend on x alone, also ONCE, from x to the registers that these end in,
    and STEP, from x, y, level and those registers to out. The weights' SHA-256 is put into each graph, whose own then stands for both.
    """
    operations = program["operations"]
    with weights.open("rb") as stream:
        digest, tensors = hashlib.file_digest(stream, "sha256").hexdigest(), Weights(stream)

        def model(some: Iterable[Mapping[str, Any]], *, level: bool = True, **registers: Any) -> onnx.ModelProto:
            made = _graph(_Writer(tensors, weights.name, channels), some, program["level"] if level else None, **registers)
            helper.set_model_props(made, {"weights_sha256": digest})
            return made

        found = {NETWORK: model(operations)}
        if apart := parts(operations):
            found[ONCE] = model(apart.once, level=False, ends=apart.given)
            given = {one.name: one.type.tensor_type.shape.dim[1].dim_value for one in found[ONCE].graph.output}
            found[STEP] = model(apart.step, given=given)
    return found


def _graph(
    writer: _Writer,
    operations: Iterable[Mapping[str, Any]],
    level: Mapping[str, Any] | None,
    *,
    given: Mapping[str, int] | None = None,
    ends: Iterable[str] = ("out",),
) -> onnx.ModelProto:
    """level: the encoding of the level, None where no operation reads y or the level. given: registers that are inputs, with channels."""
    pictures = {"x": writer.channels} | ({} if level is None else {"y": writer.channels})
    inputs = [_value(name, channels) for name, channels in pictures.items()]
    if level is not None:
        inputs.append(helper.make_tensor_value_info("level", TensorProto.FLOAT, ("batch", 1)))
        writer.embed(**level)
    for name, channels in (given or {}).items():
        inputs.append(_value(name, channels, name))
        writer.give(name, channels)
    for operation in operations:
        writer.operation(**operation)
    outputs = [_value(name, writer.end(name), *([] if name == "out" else [name])) for name in ends]
    typed = [helper.make_tensor_value_info(name, kind, None) for name, kind in writer.types.items()]
    made = helper.make_graph(writer.nodes, "sr3", inputs, outputs, list(writer.tensors.values()), value_info=typed)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="sr3rt")


def _value(name: str, channels: int, size: str = "") -> onnx.ValueInfoProto:
    """size: what names its height and width, where they are others than the picture's."""
    sides = (f"{size}.height", f"{size}.width") if size else ("height", "width")
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", channels, *sides))


class _Writer:
    """Collects nodes and tensors. Methods return the name of the value that they make; those of operations are the program's own."""

    def __init__(self, weights: Weights, file: str, channels: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.types: dict[str, int] = {}  # of values: ONNX's own inference does not know every operation
        self.channels, self._weights, self._file = channels, weights, file
        self._registers = {"x": ("x", channels), "y": ("y", channels)}  # value and number of channels
        self._to = "level"  # the register that is being made
        self._shared: dict[Any, str] = {}  # what several operations need, made once

    # --- nodes

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one value."""
        return self.nodes_of(1, kind, *inputs, **attributes)[0]

    def split(self, h: str, *sizes: int) -> list[str]:
        """The channels in parts of those sizes."""
        return self.nodes_of(len(sizes), "Split", h, self.constant(sizes, np.int64), axis=1)

    def nodes_of(self, values: int, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{self._to}:{len(self.nodes)}{'abc'[i] if i else ''}" for i in range(values)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        whole = kind == "Shape" or (kind == "Concat" and any(self.types.get(name) == TensorProto.INT64 for name in inputs))
        self.types.update(dict.fromkeys(names, TensorProto.INT64 if whole else TensorProto.FLOAT))
        return names

    def constant(self, values: ArrayLike, kind: Any = np.float32) -> str:
        """A small tensor; equal ones are one."""
        array = np.asarray(values, kind)
        name = f"{array.dtype}{array.tolist()}".replace(" ", "")
        self.tensors.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str) -> str:
        """A tensor of the file."""
        if name not in self.tensors:
            place = self._weights.place(name)
            if place.length < INSIDE:
                self.tensors[name] = numpy_helper.from_array(np.asarray(self._weights[name]), name)
            else:
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=place.shape, data_location=TensorProto.EXTERNAL)
                for key, value in (("location", self._file), ("offset", place.offset), ("length", place.length)):
                    tensor.external_data.add(key=key, value=str(value))
                self.tensors[name] = tensor
        return name

    def silu(self, h: str) -> str:
        return self.node("Mul", h, self.node("Sigmoid", h))

    def linear(self, e: str, weight: str, bias: str) -> str:
        return self.node("Gemm", e, self.weight(weight), self.weight(bias), transB=1)

    def scaled(self, h: str, by: float) -> str:
        return h if by == 1 else self.node("Mul", h, self.constant(by))

    def joined(self, sources: Iterable[str]) -> str:
        """Along the channels."""
        names = tuple(sources)
        return names[0] if len(names) == 1 else self._once(names, lambda: self.node("Concat", *names, axis=1))

    def resampled(self, h: str, by: str) -> str:
        if by == "up":
            options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            return self.node("Resize", h, "", self.constant([1, 1, 2, 2]), **options)
        return self.node("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2])

    def sliced(self, h: str, axis: int, start: int, end: int = END, step: int = 1) -> str:
        return self.node("Slice", h, *(self.constant([one], np.int64) for one in (start, end, axis, step)))

    def _once(self, key: Any, make: Any) -> str:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    # --- the level

    def embed(self, *, input: str, scale: float, frequencies: str, layers: list[dict[str, str]], silu: bool) -> None:
        if input == "level":
            value = self.scaled("level", scale)
        else:
            value = self.scaled(self.node("Log", self.node("Div", self._noise(), self._gamma())), scale / 2)
        phase = self.node("Mul", value, self.weight(frequencies))
        e = self.node("Concat", self.node("Sin", phase), self.node("Cos", phase), axis=1)
        for i, layer in enumerate(layers):
            e = self.linear(self.silu(e) if i else e, **layer)
        self._embedding = self.silu(e) if silu else e

    def _gamma(self) -> str:
        return self._once("gamma", lambda: self.node("Mul", "level", "level"))

    def _noise(self) -> str:
        def make() -> str:
            return self.node("Max", self.node("Sub", self.constant(1), self._gamma()), self.constant(LEAST))

        return self._once("noise", make)

    def _everywhere(self, value: str) -> str:
        """One number for each picture, or for each channel, for all its places."""
        return self._once((value, "everywhere"), lambda: self.node("Unsqueeze", value, self.constant([2, 3], np.int64)))

    # --- operations

    def operation(self, *, do: str, to: str, **rest: Any) -> None:
        self._to = to
        values, channels = zip(*(self._registers[name] for name in rest.pop("from")), strict=True)
        self._registers[to] = getattr(self, f"do_{do}")(values, channels, **rest)

    def give(self, name: str, channels: int) -> None:
        """A register that is an input of the graph."""
        self._registers[name] = name, channels

    def end(self, name: str) -> int:
        """A register becomes an output of the graph, of its name. Returns its channels."""
        value, channels = self._registers[name]
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if one == value else one for one in names]
        del self.types[value]
        return channels

    def do_convolution(
        self,
        values: tuple[str, ...],
        channels: tuple[int, ...],
        *,
        norm: dict[str, Any] | None,
        silu: bool,
        resample: str | None,
        weight: str,
        bias: str | None,
        stride: int,
        level: dict[str, str] | None,
        after: str | None,
        add: str | None,
        gain: float,
    ) -> tuple[str, int]:
        h = self.joined(values)
        if norm is not None:
            scale, shift = self.weight(norm["weight"]), self.weight(norm["bias"])
            h = self.node("GroupNormalization", h, scale, shift, epsilon=norm["eps"], num_groups=norm["groups"])
        h = self.silu(h) if silu else h
        h = self.resampled(h, resample) if resample else h
        features, _, *kernel = self._weights.place(weight).shape
        parameters = [self.weight(name) for name in (weight, bias) if name]
        h = self.node("Conv", h, *parameters, kernel_shape=kernel, strides=[stride] * 2, pads=[kernel[0] // 2] * 4)
        if level is not None:
            h = self._conditioned(h, features, **level)
        h = self.silu(h) if after else h
        h = self.node("Add", h, self._registers[add][0]) if add else h
        return self.scaled(h, gain), features

    def _conditioned(self, h: str, features: int, *, weight: str, bias: str, kind: str) -> str:
        s = self._everywhere(self.linear(self._embedding, weight, bias))
        if kind == "shift":
            return self.node("Add", h, s)
        scale, shift = self.split(s, features, features)
        return self.node("Add", self.node("Mul", h, self.node("Add", scale, self.constant(1))), shift)

    def do_resample(self, values: tuple[str], channels: tuple[int], *, by: str) -> tuple[str, int]:
        return self.resampled(values[0], by), channels[0]

    def do_attention(self, values: tuple[str], channels: tuple[int]) -> tuple[str, int]:
        features = channels[0] // 3
        q, k, v = self.split(self.node("Reshape", values[0], self.constant([0, channels[0], -1], np.int64)), *[features] * 3)
        scores = self.node("MatMul", self.node("Transpose", self.scaled(q, features**-0.5), perm=[0, 2, 1]), k)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=2), self.node("Transpose", v, perm=[0, 2, 1]))
        shape = self.node("Concat", self.constant([0, features], np.int64), self.node("Shape", values[0], start=2), axis=0)
        return self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1]), shape), features

    def do_unshuffle(self, values: tuple[str], channels: tuple[int], *, by: int) -> tuple[str, int]:
        order = np.arange(by * by * channels[0]).reshape(by * by, channels[0]).T.reshape(-1)  # SpaceToDepth puts the channel last
        places = self.node("SpaceToDepth", values[0], blocksize=by)
        return self.node("Gather", places, self.constant(order, np.int64), axis=1), by * by * channels[0]

    def do_to_bands(self, values: tuple[str, str, str], channels: tuple[int, int, int], *, detail: float) -> tuple[str, int]:
        x, y, places = values
        mean = self._mean(x, places, channels[0], channels[2])
        seen, _ = self.do_unshuffle((mean,), channels[:1], by=2)
        details = self.node("Mul", self._details(mean, y), self._everywhere(self._root(detail)))
        return self.node("Concat", seen, details, axis=1), 7 * channels[0]

    def do_from_bands(self, values: tuple[str, str, str, str], channels: tuple[int, int, int, int], *, detail: float) -> tuple[str, int]:
        x, y, places, fine = values
        mean = self._mean(x, places, channels[0], channels[2])
        kept = self._everywhere(self.node("Div", self.scaled("level", detail**2), self._spread(detail)))
        made = self._everywhere(self.node("Mul", self.scaled(self.node("Sqrt", self._noise()), detail), self._root(detail)))
        both = self.node("Add", self.node("Mul", self._details(mean, y), kept), self.node("Mul", fine, made))
        first, second, third = self.split(both, *[channels[0]] * 3)
        rows = self._merged(self.scaled(first, 0.0), first, WIDTH), self._merged(second, third, WIDTH)
        return self.node("Add", mean, self._merged(*rows, HEIGHT)), channels[0]

    # --- wavelets

    def _spread(self, detail: float) -> str:
        return self._once(("spread", detail), lambda: self.node("Add", self.scaled(self._gamma(), detail**2), self._noise()))

    def _root(self, detail: float) -> str:
        """1 / sqrt(spread)."""
        return self._once(("root", detail), lambda: self.node("Reciprocal", self.node("Sqrt", self._spread(detail))))

    def _mean(self, x: str, places: str, channels: int, held: int) -> str:
        """x and what `places` holds for each square of it."""

        def make() -> str:
            side = math.isqrt(held // channels)
            return self.node("Add", x, self.node("DepthToSpace", places, blocksize=side, mode="CRD"))

        return self._once(("mean", x, places), make)

    def _details(self, mean: str, y: str) -> str:
        def make() -> str:
            low, high = self._split(self.node("Sub", y, self.node("Mul", self._everywhere("level"), mean)), HEIGHT)
            _, first = self._split(low, WIDTH)
            return self.node("Concat", first, *self._split(high, WIDTH), axis=1)

        return self._once(("details", mean, y), make)

    def _lifted(self, line: str, other: str, step: int, axis: int, *, back: bool = False) -> str:
        """A step of the lifting on `line`, or its undoing: odd places where `step` is even, from their neighbours in `other`.

        The sum over neighbours is a convolution of each channel by itself, which precision.py leaves in float32.
        """
        taps, odd, channels = LIFT[step], step % 2 == 0, self._registers["x"][1]
        sides = np.zeros((2, 4), np.int64)
        sides[:, axis] = len(taps) - odd, len(taps) - 1 + odd
        wide = self.node("Pad", other, self.constant(sides.reshape(-1), np.int64), mode="edge")
        shape = (1, 1, -1, 1) if axis == HEIGHT else (1, 1, 1, -1)
        kernel = np.asarray([*taps[::-1], *taps], np.float32).reshape(shape).repeat(channels, axis=0)
        moved = self.node("Conv", wide, self.constant(kernel), kernel_shape=kernel.shape[2:], group=channels)
        return self.node("Sub" if back else "Add", line, moved)

    def _split(self, h: str, axis: int) -> tuple[str, str]:
        even, odd = self.sliced(h, axis, 0, step=2), self.sliced(h, axis, 1, step=2)
        odd = self._lifted(odd, even, 0, axis)
        even = self._lifted(even, odd, 1, axis)
        odd = self._lifted(odd, even, 2, axis)
        return self.scaled(even, GAIN), self.node("Div", odd, self.constant(GAIN))

    def _merged(self, low: str, high: str, axis: int) -> str:
        """The inverse of `_split`; along the height, to the size of x."""
        even, odd = self.node("Div", low, self.constant(GAIN)), self.scaled(high, GAIN)
        odd = self._lifted(odd, even, 2, axis, back=True)
        even = self._lifted(even, odd, 1, axis, back=True)
        odd = self._lifted(odd, even, 0, axis, back=True)
        if axis == HEIGHT:  # each even row, then its odd one: that is how rows lie in memory
            return self.node("Reshape", self.node("Concat", even, odd, axis=WIDTH), self.node("Shape", "x"))
        pairs = [self.node("Unsqueeze", one, self.constant([4], np.int64)) for one in (even, odd)]
        return self.node("Reshape", self.node("Concat", *pairs, axis=4), self.constant([0, 0, 0, -1], np.int64))
