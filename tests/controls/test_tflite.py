"""Files of TensorFlow Lite, written here by hand from the format's schema, and what each operator computes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaleweaver.controls import tflite
from scaleweaver.controls.tflite import Operator, densify, run

RNG = np.random.default_rng(0)


class Flat:
    """A FlatBuffer: tables are {field: value}, a value is (kind, number), an array, a table or a list of tables."""

    def __init__(self, root: dict[int, Any]) -> None:
        self.data = bytearray(b"\0\0\0\0TFL3")
        struct.pack_into("<I", self.data, 0, self.put(root))

    def put(self, value: Any) -> int:
        if isinstance(value, np.ndarray):
            start = len(self.data)
            self.data += struct.pack("<I", value.size) + value.tobytes()
            return start
        if isinstance(value, list):
            start = len(self.data)
            self.data += struct.pack("<I", len(value)) + bytes(4 * len(value))
            for i, each in enumerate(value):
                place = start + 4 + 4 * i
                struct.pack_into("<I", self.data, place, self.put(each) - place)
            return start
        count = max(value, default=-1) + 1
        fields = len(self.data)
        self.data += struct.pack("<HH", 4 + 2 * count, 4 + 4 * count)
        self.data += b"".join(struct.pack("<H", 4 + 4 * i if i in value else 0) for i in range(count))
        start = len(self.data)
        self.data += struct.pack("<i", start - fields) + bytes(4 * count)
        for i, each in value.items():
            place = start + 4 + 4 * i
            if isinstance(each, tuple):
                struct.pack_into(f"<{each[0]}", self.data, place, each[1])
            else:
                struct.pack_into("<I", self.data, place, self.put(each) - place)
        return start


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def model(tensors: list[tuple[Any, ...]], steps: list[tuple[Any, ...]], outputs: tuple[int, ...]) -> bytes:
    """tensors: (shape, values or None[, sparsity]); steps: (operator, inputs, output, options). Tensor 0 goes in."""
    codes = sorted({step[0] for step in steps})
    kinds = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 2, np.dtype(np.int8): 9}
    buffers: list[dict[int, Any]] = [{}]
    rows = []
    for shape, values, *sparsity in tensors:
        row: dict[int, Any] = {0: ints(*shape)}
        if values is not None:
            row[1], row[2] = ("b", kinds[values.dtype]), ("I", len(buffers))
            buffers.append({0: np.frombuffer(values.tobytes(), np.uint8)})
        if sparsity:
            row[6] = sparsity[0]
        rows.append(row)
    operators = [
        {0: ("I", codes.index(code)), 1: ints(*inputs), 2: ints(output), 4: options}
        for code, inputs, output, options in steps
    ]
    graph = {0: rows, 1: ints(0), 2: ints(*outputs), 3: operators}
    return bytes(Flat({1: [{3: ("i", code)} for code in codes], 2: [graph], 4: buffers}).data)


def converted(data: bytes, folder: Path) -> tflite.Network:
    (folder / "net.tflite").write_bytes(data)
    tflite.convert({"net": folder / "net.tflite"}, folder / "net.safetensors")
    return tflite.load(folder / "net.safetensors", "net")


def plain_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """ "same" convolution of (H, W, C) by (out, h, w, C), from the formula."""
    height, width = (-(-side // stride) for side in x.shape[:2])
    k = weight.shape[1]
    total = [max((n - 1) * stride + k - side, 0) for n, side in zip((height, width), x.shape[:2], strict=True)]
    padded = np.pad(x, [(t // 2, t - t // 2) for t in total] + [(0, 0)])
    out = np.zeros((height, width, len(weight)))
    for row in range(height):
        for column in range(width):
            window = padded[row * stride : row * stride + k, column * stride : column * stride + k]
            out[row, column] = (window * weight).sum((1, 2, 3)) + bias
    return out


@pytest.mark.parametrize("side", [6, 7])
def test_a_file_is_read_converted_and_run(side: int, tmp_path: Path) -> None:
    weight = RNG.normal(size=(4, 3, 3, 2)).astype(np.float16)
    bias = RNG.normal(size=4).astype(np.float32)
    half = -(-side // 2)
    tensors = [
        ((1, side, side, 2), None), (weight.shape, weight), (weight.shape, None), ((4,), bias),
        ((1, half, half, 4), None), ((2,), ints(1, half * half * 4)), ((1, half * half * 4), None),
        ((1, half * half * 4), None),
    ]  # fmt: skip
    steps = [
        (6, (1,), 2, {}),  # dequantize: nothing of it is left
        # same padding, stride 2, relu6
        (3, (0, 2, 3), 4, {0: ("b", 0), 1: ("i", 2), 2: ("i", 2), 3: ("b", 3)}),
        (22, (4, 5), 6, {}),
        (14, (6,), 7, {}),
    ]
    net = converted(model(tensors, steps, (7, 4)), tmp_path)
    assert [operator.kind for operator in net.operators] == ["conv", "reshape", "logistic"]
    x = RNG.normal(size=(2, side, side, 2)).astype(np.float32)
    flat, grid = net(torch.from_numpy(x).permute(0, 3, 1, 2))
    for i in range(2):  # the file says one picture, a batch goes through too
        expected = plain_conv(x[i], weight.astype(np.float64), bias, 2).clip(0, 6)
        np.testing.assert_allclose(grid[i].permute(1, 2, 0).numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(flat[i].numpy(), 1 / (1 + np.exp(-expected.ravel())), atol=1e-5)


def sparse_rows(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, segments, indices) of a matrix compressed by rows."""
    rows, columns = np.nonzero(dense)
    segments = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return dense[rows, columns], segments, columns


def test_a_sparse_constant_is_unpacked(tmp_path: Path) -> None:
    # 1x1 convolution whose (3, 1, 1, 4) weights are stored by rows: the last dimension is compressed
    matrix = RNG.normal(size=(3, 4)).astype(np.float16) * (RNG.random((3, 4)) < 0.5)
    values, segments, indices = sparse_rows(matrix)
    assert 0 < len(values) < 12
    whole = [{0: ("b", 0), 1: ("i", side)} for side in (3, 1, 1)]
    rows = {
        0: ("b", 1), 2: ("B", 2), 3: {0: segments.astype(np.uint16)}, 4: ("B", 3), 5: {0: indices.astype(np.uint8)},
    }  # fmt: skip
    sparsity = {0: ints(0, 1, 2, 3), 2: [*whole, rows]}
    tensors = [
        ((1, 2, 2, 4), None), ((3, 1, 1, 4), values, sparsity), ((3, 1, 1, 4), None), ((3, 1, 1, 4), None),
        ((3,), np.zeros(3, np.float32)), ((1, 2, 2, 3), None),
    ]  # fmt: skip
    steps = [(124, (1,), 2, {}), (6, (2,), 3, {}), (3, (0, 3, 4), 5, {0: ("b", 1), 1: ("i", 1), 2: ("i", 1)})]
    net = converted(model(tensors, steps, (5,)), tmp_path)
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("oc,bchw->bohw", torch.from_numpy(matrix).float(), x)
    torch.testing.assert_close(net(x)[0], expected)


def test_densify_by_rows_and_by_columns() -> None:
    dense = np.array([[0, 5, 0], [0, 0, 0], [7, 0, 8], [0, 9, 0]])
    values, segments, indices = sparse_rows(dense)
    assert np.array_equal(densify(values, (4, 3), [0, 1], [], [4, (segments, indices)]), dense)
    values, segments, indices = sparse_rows(dense.T)
    assert np.array_equal(densify(values, (4, 3), [1, 0], [], [3, (segments, indices)]), dense)


def test_densify_in_blocks() -> None:
    # 2x2 blocks, each whole, of which the two on the diagonal are stored
    dense = np.array([[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]])
    levels = [2, (np.array([0, 1, 2]), np.array([0, 1])), 2, 2]
    assert np.array_equal(densify(np.arange(1, 9), (4, 4), [0, 1, 2, 3], [0, 1], levels), dense)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="photo is no tflite file"):
        tflite.read_graph(b"\x89PNG\r\n\x1a\n0000", "photo")
    with pytest.raises(ValueError, match="net uses operator 99"):
        tflite.read_graph(model([((1, 2), None), ((1, 2), None)], [(99, (0,), 1, {})], (1,)), "net")
    with pytest.raises(ValueError, match=r"net unpacks what it computes \(dequantize\)"):
        tflite.read_graph(model([((1, 2), None), ((1, 2), None)], [(6, (0,), 1, {})], (1,)), "net")
    quantised = model([((1, 2), None), ((2,), np.ones(2, np.int8)), ((2,), None)], [(6, (1,), 2, {})], (2,))
    with pytest.raises(ValueError, match="net has a constant of type 9"):
        tflite.read_graph(quantised, "net")
    with pytest.raises(ValueError, match="operator 'gelu' is not known here"):
        run(Operator("gelu", (0,), 1), [torch.ones(1)])
    resize = model(
        [((1, 2, 2, 1), None), ((2,), ints(4, 4)), ((1, 4, 4, 1), None)], [(23, (0, 1), 2, {})], (2,)
    )  # neither of the two rules that torch has
    with pytest.raises(ValueError, match="half_pixel_centers"):
        tflite.read_graph(resize)


def test_operators_on_four_dimensions(tmp_path: Path) -> None:
    """Pad, depth to space, concatenation along channels and the sum with a constant, in the file's own layout."""
    shift = RNG.normal(size=8).astype(np.float32)
    tensors = [
        ((1, 2, 3, 8), None), ((4, 2), ints(0, 0, 1, 0, 0, 2, 0, 0)), ((1, 3, 5, 8), None), ((8,), shift),
        ((1, 3, 5, 8), None), ((1, 3, 5, 16), None), ((1, 6, 10, 4), None),
    ]  # fmt: skip
    steps = [
        (34, (0, 1), 2, {}), (0, (2, 3), 4, {0: ("b", 1)}), (2, (2, 4), 5, {0: ("i", -1)}), (5, (5,), 6, {0: ("i", 2)}),
    ]  # fmt: skip
    x = RNG.normal(size=(1, 2, 3, 8)).astype(np.float32)
    (out,) = converted(model(tensors, steps, (6,)), tmp_path)(torch.from_numpy(x).permute(0, 3, 1, 2))
    padded = np.pad(x, [(0, 0), (1, 0), (0, 2), (0, 0)])
    joined = np.concatenate([padded, np.maximum(padded + shift, 0)], axis=-1)
    # block * block pixels lie one after the other in the channels
    expected = joined.reshape(1, 3, 5, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(1, 6, 10, 4)
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)


def test_depthwise_convolution_has_its_own_filter_for_each_channel(tmp_path: Path) -> None:
    weight = RNG.normal(size=(1, 3, 3, 2)).astype(np.float32)
    tensors = [((1, 5, 5, 2), None), (weight.shape, weight), ((2,), np.zeros(2, np.float32)), ((1, 5, 5, 2), None)]
    steps = [(4, (0, 1, 2), 3, {0: ("b", 0), 1: ("i", 1), 2: ("i", 1), 3: ("i", 1), 4: ("b", 1)})]
    x = RNG.normal(size=(1, 5, 5, 2)).astype(np.float32)
    (out,) = converted(model(tensors, steps, (3,)), tmp_path)(torch.from_numpy(x).permute(0, 3, 1, 2))
    for c in range(2):
        alone = plain_conv(x[0, :, :, c : c + 1], weight[..., c : c + 1], np.zeros(1), 1)[..., 0]
        np.testing.assert_allclose(out[0, c].numpy(), np.maximum(alone, 0), atol=1e-5)


def test_pooling_ignores_what_it_pads() -> None:
    settings = {"padding": "same", "window": [2, 2], "stride": [2, 2], "activation": "none"}
    x = torch.tensor([[[[-3.0, -2.0, -5.0]]]])
    assert run(Operator("max_pool", (0,), 1, settings), [x]).tolist() == [[[[-2.0, -5.0]]]]


def test_bilinear_resize_counts_from_the_middles_of_pixels() -> None:
    settings = {"size": [1, 4], "align_corners": False}
    x = torch.tensor([[[[0.0, 4.0]]]])
    assert run(Operator("resize_bilinear", (0,), 1, settings), [x]).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
