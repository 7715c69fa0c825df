"""Networks in TensorFlow Lite's file format, converted to safetensors and run in plain torch.

`convert` reads the file once: constants are unpacked (half precision, sparse) and the operators that are left become a
list. `Network` runs that list. Four-dimensional tensors are (B, H, W, C) in the format and (B, C, H, W) here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Array = NDArray[Any]

# the numbers by which the format knows its operators
_OPERATORS = {
    0: "add", 2: "concatenation", 3: "conv", 4: "depthwise_conv", 5: "depth_to_space", 6: "dequantize", 14: "logistic",
    17: "max_pool", 22: "reshape", 23: "resize_bilinear", 34: "pad", 124: "densify",
}  # fmt: skip
# of quantised constants, 8 bits with a scale of their own, none is read
_TYPES: dict[int, DTypeLike] = {0: np.float32, 1: np.float16, 2: np.int32, 4: np.int64}
_ACTIVATIONS = ("none", "relu", "relu_n1_to_1", "relu6", "tanh")
_PADDINGS = ("same", "valid")


@dataclass(frozen=True)
class Operator:
    """One step: numbers of the tensors it reads and of the one it writes, and its settings."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run, the tensors that go in and out, and the constants they read."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[Operator, ...]
    constants: dict[int, Array]


def convert(files: Mapping[str, Path], out: Path) -> None:
    """Networks by name -> one safetensors file: constants as NAME.NUMBER, the operators as JSON in its metadata."""
    tensors, graphs = {}, {}
    for name, file in files.items():
        graph = read_graph(file.read_bytes(), name)
        for number, values in graph.constants.items():
            tensors[f"{name}.{number}"] = torch.from_numpy(np.array(values, order="C"))
        operators = [asdict(operator) for operator in graph.operators]
        graphs[name] = json.dumps({"inputs": graph.inputs, "outputs": graph.outputs, "operators": operators})
    save_file(tensors, out, metadata=graphs)


def load(file: Path, name: str) -> Network:
    """One of the networks that `convert` wrote, in float32."""
    with safe_open(file, "pt") as opened:
        graph = json.loads((opened.metadata() or {})[name])
        constants = {
            int(key.removeprefix(f"{name}.")): opened.get_tensor(key)
            for key in opened.keys()  # noqa: SIM118
            if key.startswith(f"{name}.")
        }
    operators = [
        Operator(step["kind"], tuple(step["inputs"]), step["output"], step["settings"]) for step in graph["operators"]
    ]
    return Network(graph["inputs"], graph["outputs"], operators, constants)


class Network(nn.Module):
    """The operators of a file, one after the other: pictures (B, C, H, W) in, all outputs in the file's order out."""

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], operators: Sequence[Operator], constants: dict[int, Tensor]
    ) -> None:
        super().__init__()
        (self.input,) = inputs
        self.outputs = tuple(outputs)
        self.operators = tuple(operators)
        self.constants = tuple(constants)
        for number, values in constants.items():
            self.register_buffer(f"constant_{number}", values.float())

    def forward(self, image: Tensor) -> list[Tensor]:
        values: dict[int, Tensor] = {number: getattr(self, f"constant_{number}") for number in self.constants}
        values[self.input] = image
        for operator in self.operators:
            # -1 stands for an input that may be left out, a bias say
            inputs = [values[number] for number in operator.inputs if number >= 0]
            values[operator.output] = run(operator, inputs)
        return [values[number] for number in self.outputs]


def run(operator: Operator, inputs: Sequence[Tensor]) -> Tensor:
    """What one operator makes of its inputs."""
    settings = operator.settings
    x = inputs[0]
    match operator.kind:
        case "conv" | "depthwise_conv":
            groups = x.shape[1] if operator.kind == "depthwise_conv" else 1
            weight, bias = inputs[1], inputs[2] if len(inputs) > 2 else None
            x = _padded(x, weight.shape[2:], settings)
            x = F.conv2d(x, weight, bias, stride=settings["stride"], dilation=settings["dilation"], groups=groups)
        case "max_pool":
            x = F.max_pool2d(
                _padded(x, settings["window"], settings, -torch.inf), settings["window"], settings["stride"]
            )
        case "add":
            x = x + inputs[1]
        case "pad":
            x = F.pad(x, settings["margins"])
        case "concatenation":
            x = torch.cat(list(inputs), dim=settings["dim"])
        case "reshape":
            # the format's own order is what the new shape counts in
            channels_last = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
            x = channels_last.reshape(x.shape[0], *settings["shape"][1:])
            x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
        case "resize_bilinear":
            x = F.interpolate(x, settings["size"], mode="bilinear", align_corners=settings["align_corners"])
        case "depth_to_space":
            # the block's pixel comes before the channel here, and after it in F.pixel_shuffle
            block = settings["block"]
            x = x.unflatten(1, (block, block, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        case "logistic":
            x = x.sigmoid()
        case _:
            raise ValueError(f"operator {operator.kind!r} is not known here; convert the file again")
    return _activated(x, settings.get("activation", "none"))


def _padded(x: Tensor, window: Sequence[int], settings: Mapping[str, Any], value: float = 0.0) -> Tensor:
    """With "same" padding: as many places as the strides need, and of an odd number the larger half at the end."""
    if settings["padding"] == "valid":
        return x
    margins: list[int] = []
    for size, width, stride, dilation in zip(
        x.shape[2:], window, settings["stride"], settings.get("dilation", (1, 1)), strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        margins = [total // 2, total - total // 2, *margins]  # F.pad begins with the last dimension
    return F.pad(x, margins, value=value)


def _activated(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "relu":
            return x.relu()
        case "relu_n1_to_1":
            return x.clamp(-1, 1)
        case "relu6":
            return x.clamp(0, 6)
        case "tanh":
            return x.tanh()
    return x


def read_graph(data: bytes, name: str = "network") -> Graph:
    """The first graph of a tflite file. Steps that only unpack constants are done here and leave nothing behind."""
    if data[4:8] != b"TFL3":
        raise ValueError(f"{name} is no tflite file: it has no TFL3 mark")
    model = _Table.root(data)
    codes = [max(code.number(0, "b"), code.number(3)) for code in model.tables(1)]
    buffers = model.tables(4)
    graph = model.tables(2)[0]
    tensors = graph.tables(0)
    shapes = [tuple(int(side) for side in tensor.numbers(0)) for tensor in tensors]
    constants = {}
    for number, tensor in enumerate(tensors):
        packed = buffers[tensor.number(2, "I")].numbers(0, np.uint8)
        if packed.size:
            constants[number] = _constant(packed, tensor, shapes[number], name)
    operators: list[Operator] = []
    used: dict[int, Array] = {}
    for step in graph.tables(3):
        code = codes[step.number(0, "I")]
        kind = _OPERATORS.get(code)
        inputs = tuple(int(i) for i in step.numbers(1))
        (output,) = (int(i) for i in step.numbers(2))
        if kind is None:
            raise ValueError(f"{name} uses operator {code} of tflite, which is not known here")
        if kind in ("dequantize", "densify"):
            if inputs[0] not in constants:
                raise ValueError(f"{name} unpacks what it computes ({kind}), which is not known here")
            constants[output] = constants[inputs[0]]  # unpacked already
            continue
        settings = _settings(kind, step.table(4), inputs, shapes, constants)
        kept = inputs[:1] if kind in ("reshape", "resize_bilinear", "pad") else inputs
        for place, number in enumerate(kept):
            if number in constants:
                used[number] = _channels_first(constants[number], kind, place, len(shapes[output]))
        operators.append(Operator(kind, kept, output, settings))
    ends = [tuple(int(i) for i in graph.numbers(slot)) for slot in (1, 2)]
    return Graph(ends[0], ends[1], tuple(operators), used)


def _constant(packed: Array, tensor: _Table, shape: tuple[int, ...], name: str) -> Array:
    kind = tensor.number(1, "b")
    if kind not in _TYPES:
        raise ValueError(f"{name} has a constant of type {kind}, which is not known here")
    values = packed.view(_TYPES[kind])
    sparsity = tensor.table(6)
    if not sparsity:
        return values.reshape(shape)
    levels: list[Any] = []
    for level in sparsity.tables(2):
        if level.number(0, "b") == 0:
            levels.append(level.number(1))
        else:
            levels.append((_index_vector(level, 2), _index_vector(level, 4)))
    order, blocks = (sparsity.numbers(slot).tolist() for slot in (0, 1))
    return densify(values, shape, order, blocks, levels)


def _index_vector(level: _Table, slot: int) -> Array:
    return level.table(slot + 1).numbers(0, {1: np.int32, 2: np.uint16, 3: np.uint8}[level.number(slot, "B")])


def densify(
    values: Array, shape: Sequence[int], order: Sequence[int], blocks: Sequence[int], levels: Sequence[Any]
) -> Array:
    """The dense form of a sparse constant.

    The dimensions are those of `shape`, each counted in blocks, then one for the inside of every block; `blocks` says
    to which dimension of `shape` each of the latter belongs. `levels` describes them in the order `order`: the size of
    one that is stored whole, or (segments, indices) of one that is compressed by rows.
    """
    position = np.zeros(1, np.int64)  # of the stored entries of a level, in its order
    places: dict[int, NDArray[np.int64]] = {}  # their coordinates, dimension by dimension
    inside: dict[int, int] = {}
    for dimension, level in zip(order, levels, strict=True):
        if isinstance(level, tuple):
            segments, indices = (part.astype(np.int64) for part in level)
            counts = segments[position + 1] - segments[position]
            rank = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            parent = np.repeat(np.arange(len(position)), counts)
            position = segments[position][parent] + rank
            coordinate = indices[position]
        else:
            parent = np.repeat(np.arange(len(position)), level)
            coordinate = np.tile(np.arange(level), len(position))
            position = position[parent] * level + coordinate
            if dimension >= len(shape):
                inside[blocks[dimension - len(shape)]] = level
        places = {key: value[parent] for key, value in places.items()}
        places[dimension] = coordinate
    for i, dimension in enumerate(blocks):
        places[dimension] = places[dimension] * inside[dimension] + places[len(shape) + i]
    dense = np.zeros(tuple(shape), values.dtype)
    dense[tuple(places[dimension] for dimension in range(len(shape)))] = values[position]
    return dense


def _settings(
    kind: str, options: _Table, inputs: Sequence[int], shapes: Sequence[tuple[int, ...]], constants: Mapping[int, Array]
) -> dict[str, Any]:
    """What `run` has to know beside the inputs; field numbers are those of the format's schema."""
    rank = len(shapes[inputs[0]])
    match kind:
        case "conv" | "depthwise_conv":
            shift = 0 if kind == "conv" else 1  # a depthwise one also says how many channels it makes of each
            return {
                "padding": _PADDINGS[options.number(0, "b")],
                "stride": [options.number(2), options.number(1)],
                "dilation": [options.number(5 + shift, default=1), options.number(4 + shift, default=1)],
                "activation": _ACTIVATIONS[options.number(3 + shift, "b")],
            }
        case "max_pool":
            return {
                "padding": _PADDINGS[options.number(0, "b")],
                "stride": [options.number(2), options.number(1)],
                "window": [options.number(4), options.number(3)],
                "activation": _ACTIVATIONS[options.number(5, "b")],
            }
        case "add":
            return {"activation": _ACTIVATIONS[options.number(0, "b")]}
        case "concatenation":
            axis = options.number(0) % rank
            return {
                "dim": (0, 2, 3, 1)[axis] if rank == 4 else axis,
                "activation": _ACTIVATIONS[options.number(1, "b")],
            }
        case "pad":
            margins = constants[inputs[1]].tolist()  # one pair a dimension
            if rank == 4:
                margins = [margins[i] for i in (0, 3, 1, 2)]
            return {"margins": [side for pair in reversed(margins) for side in pair]}
        case "reshape":
            shape = constants[inputs[1]].tolist() if len(inputs) > 1 else options.numbers(0).tolist()
            return {"shape": shape}
        case "resize_bilinear":
            aligned, half = options.number(2, "b"), options.number(3, "b")
            if not aligned and not half:
                raise ValueError("resize_bilinear without half_pixel_centers is not known here")
            return {"size": constants[inputs[1]].tolist(), "align_corners": bool(aligned)}
        case "depth_to_space":
            return {"block": options.number(0)}
    return {}


def _channels_first(values: Array, kind: str, place: int, rank: int) -> Array:
    """A constant in the layout that `run` reads."""
    if kind == "conv" and place == 1:
        return values.transpose(0, 3, 1, 2)  # (out, in, h, w)
    if kind == "depthwise_conv" and place == 1:
        return values.transpose(3, 0, 1, 2)  # (channels, 1, h, w)
    if kind in ("add", "concatenation") and rank == 4:
        return values.transpose(0, 3, 1, 2) if values.ndim == 4 else values.reshape(-1, 1, 1)
    return values


class _Table:
    """A table of a FlatBuffer: fields by number, every one of them may be absent."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _number(data, 0, "I"))

    def _place(self, number: int) -> int:
        """Where the field stands, 0 for nowhere."""
        fields = self.position - _number(self.data, self.position, "i")
        entry = 4 + 2 * number
        offset = _number(self.data, fields + entry, "H") if entry < _number(self.data, fields, "H") else 0
        return self.position + offset if offset else 0

    def number(self, number: int, kind: str = "i", default: int = 0) -> int:
        place = self._place(number)
        return _number(self.data, place, kind) if place else default

    def numbers(self, number: int, dtype: DTypeLike = np.int32) -> Array:
        place = self._place(number)
        if not place:
            return np.zeros(0, dtype)
        start = place + _number(self.data, place, "I")
        return np.frombuffer(self.data, dtype, _number(self.data, start, "I"), start + 4)

    def table(self, number: int) -> _Table:
        place = self._place(number)
        return _Table(self.data, place + _number(self.data, place, "I")) if place else _NOTHING

    def tables(self, number: int) -> list[_Table]:
        place = self._place(number)
        if not place:
            return []
        start = place + _number(self.data, place, "I")
        places = range(start + 4, start + 4 + 4 * _number(self.data, start, "I"), 4)
        return [_Table(self.data, place + _number(self.data, place, "I")) for place in places]

    def __bool__(self) -> bool:
        return self is not _NOTHING


def _number(data: bytes, place: int, kind: str) -> int:
    return int(struct.unpack_from(f"<{kind}", data, place)[0])


_NOTHING = _Table(struct.pack("<HHi", 4, 0, 4), 4)
