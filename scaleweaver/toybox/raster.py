"""An exact, batched z-buffer in plain torch.

No window tests: every triangle is cut into pixel rows, every row into its covered span, and the spans are unrolled into
one flat list of fragments, so work is proportional to the pixels covered. Depth and triangle number are packed in one
int64 and reduced with a minimum, which makes the result independent of order, batch and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TRIANGLE_BITS = 24
_DEPTH_STEPS = float(2**30)
EMPTY = 2**62  # what a pixel holds that no triangle covers


def rasterise(corners: Tensor, depth: Tensor, image: Tensor, *, images: int, size: int, facing: int = 1) -> Tensor:
    """Which triangle is nearest at every pixel centre: packed z-buffer (images, size, size) int64.

    corners (F, 3, 2) are pixel positions (x right, y down, the first pixel spans 0 to 1), depth (F, 3) is in [0, 1] and
    linear on the screen (so pass 1 - near/z for a perspective view), image (F,) says which image a triangle belongs to.
    facing +1 keeps triangles that are counter-clockwise to the viewer, -1 the others. Triangles may leave the screen.
    """
    if len(corners) >= 1 << _TRIANGLE_BITS:
        raise ValueError(f"{len(corners)} triangles in one pass, at most {1 << _TRIANGLE_BITS}; render fewer at a time")
    device = corners.device
    # pixel centres on whole numbers, y up so that counter-clockwise has positive area
    x, y = corners[..., 0] - 0.5, corners[..., 1] - 0.5
    area = (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0]) - (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0])
    low, high = y.amin(1), y.amax(1)
    top = low.ceil().clamp(min=0)
    rows = (high.floor().clamp(max=size - 1) - top + 1).clamp(min=0)
    seen = (area * facing > 1e-9) & (rows > 0) & (x.amax(1) >= 0) & (x.amin(1) <= size - 1)
    triangle = seen.nonzero()[:, 0]  # (T,)
    x, y, z = x[triangle], y[triangle], depth[triangle]

    # half planes a x + b y + c >= 0; the shared edge of two triangles gives exactly negated numbers: no cracks
    after = [1, 2, 0]
    flip = -float(facing)
    a = (y - y[:, after]) * flip  # (T, 3)
    b = (x[:, after] - x) * flip  # (T, 3)
    c = (x * y[:, after] - x[:, after] * y) * flip  # (T, 3)
    twice = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    dz1, dz2 = z[:, 1] - z[:, 0], z[:, 2] - z[:, 0]
    slope_x = (dz1 * (y[:, 2] - y[:, 0]) - dz2 * (y[:, 1] - y[:, 0])) / twice
    slope_y = (dz2 * (x[:, 1] - x[:, 0]) - dz1 * (x[:, 2] - x[:, 0])) / twice

    # triangles -> rows
    count = rows[triangle].long()
    owner, step = _unroll(count)  # (R,)
    row = top[triangle][owner] + step
    across = -(b[owner] * row[:, None] + c[owner]) / a[owner]  # (R, 3)
    rising, falling = a[owner] > 0, a[owner] < 0
    left = torch.where(rising, across, -torch.inf).amax(1).ceil().clamp(min=0)
    right = torch.where(falling, across, torch.inf).amin(1).floor().clamp(max=size - 1)
    width = (right - left + 1).clamp(min=0).long()
    start_depth = z[owner, 0] + slope_x[owner] * (left - x[owner, 0]) + slope_y[owner] * (row - y[owner, 0])
    start_pixel = (image[triangle][owner] * size + row.long()) * size + left.long()

    # rows -> fragments; slivers may extrapolate, so depth stays within the triangle's own
    span, step = _unroll(width)  # (N,)
    nearest, farthest = z.amin(1)[owner], z.amax(1)[owner]
    value = start_depth[span] + slope_x[owner][span] * step
    value = torch.minimum(torch.maximum(value, nearest[span]), farthest[span]).clamp(0, 1)
    packed = ((value * _DEPTH_STEPS).long() << _TRIANGLE_BITS) | triangle[owner][span]
    buffer = torch.full((images * size * size,), EMPTY, dtype=torch.int64, device=device)
    buffer.scatter_reduce_(0, start_pixel[span] + step, packed, "amin")
    return buffer.view(images, size, size)


def unpack(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Depth in [0, 1] (float32) and triangle number (int64); meaningless where the buffer is EMPTY."""
    return (buffer >> _TRIANGLE_BITS).float() / _DEPTH_STEPS, buffer & ((1 << _TRIANGLE_BITS) - 1)


def _unroll(count: Tensor) -> tuple[Tensor, Tensor]:
    """[2, 0, 3] -> owners [0, 0, 2, 2, 2] and steps [0, 1, 0, 1, 2]."""
    owner = torch.repeat_interleave(count)
    start = torch.cumsum(count, 0) - count
    return owner, torch.arange(len(owner), device=count.device) - start[owner]
