"""Pictures at the boundary: whatever a caller has becomes one upright 8-bit RGB image, or an error saying what to do.

Accepted: a path, a PIL image of any mode, a numpy array (H, W[, C]), a torch tensor (C, H, W). Transparent pixels are
laid over white. Nothing of more than `MAX_PIXELS` is decoded.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 100_000_000
Resize = Literal["crop", "pad", "stretch"]


def read_image(image: Any, name: str = "image") -> Image.Image:
    """Any picture as upright RGB; `name` is what errors call it.

    Numbers mean: uint8 0..255, uint16 0..65535, floats 0..1, booleans black and white. PIL's 32-bit integer mode "I"
    counts as 16-bit, its float mode "F" as floats.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(image, name)
    if isinstance(image, Image.Image):
        _check_size(image.size, name)
        return _from_pil(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        return _from_tensor(image, name)
    raise ValueError(
        f"{name} is a {type(image).__name__}; pass a path, a PIL image, a numpy array (H, W, C)"
        " or a torch tensor (C, H, W)"
    )


def fit(
    image: Image.Image,
    height: int,
    width: int,
    resize: str = "crop",
    two_level: bool | None = None,
    lines: bool = True,
    name: str = "image",
) -> Image.Image:
    """The image at exactly height x width.

    "crop" scales until the picture is covered and cuts the rest off evenly, "pad" scales until all of it is inside
    and adds black, "stretch" changes the aspect. `two_level` images stay black and white, where a smooth resize would
    leave greys; None looks whether the image is one. Made smaller, a pixel of them is white where at least half of it
    was, or with `lines` already where a line of one pixel went through it: an edge map keeps its lines unbroken.
    """
    if resize not in get_args(Resize):
        raise ValueError(f'resize={resize!r} for {name}; pass "crop", "pad" or "stretch"')
    if height < 1 or width < 1:
        raise ValueError(f"{name} cannot be fitted to {width}x{height}; pass a height and width of at least 1")
    if image.size == (width, height):
        return image
    if two_level is None:
        two_level = is_two_level(image)
    ratios = (image.width / width, image.height / height)
    factor = min(ratios) if resize == "crop" else max(ratios)  # source pixels along one pixel of the picture
    method = Image.Resampling.LANCZOS
    if two_level:
        method = Image.Resampling.BOX if factor > 1 else Image.Resampling.NEAREST
    if resize == "stretch":
        fitted = image.resize((width, height), method)
    elif resize == "pad":
        fitted = ImageOps.pad(image, (width, height), method)
    else:
        fitted = ImageOps.fit(image, (width, height), method)
    if method == Image.Resampling.BOX:
        # a line of one pixel covers 1 / factor of the pixels it goes through
        threshold = 255 / (2 * factor) if lines else 128
        fitted = fitted.point([255 * (value >= threshold) for value in range(256)] * len(fitted.getbands()))
    return fitted


def is_two_level(image: Image.Image) -> bool:
    """Whether every value is 0 or 255, as in an edge map or a mask."""
    values = np.asarray(image)
    return bool(((values == 0) | (values == 255)).all())


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    import torch

    values = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return values.permute(2, 0, 1).float().div_(127.5).sub_(1.0)  # (3, H, W)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> RGB images."""
    levels = pictures.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(image) for image in levels]


def mask_tensor(image: Any, height: int, width: int, resize: str = "crop", name: str = "mask") -> Tensor:
    """A mask of any kind -> (H, W) float32 in [0, 1], white = 1."""
    import torch

    fitted = fit(read_image(image, name), height, width, resize, lines=False, name=name)
    return torch.from_numpy(np.array(fitted.convert("L"))).float().div_(255.0)  # (H, W)


def _from_file(path: str | os.PathLike[str], name: str) -> Image.Image:
    text = os.fspath(path)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{name} is the address {text!r}; download it first and pass the file")
    if not os.path.isfile(text):
        raise ValueError(f"{name}: there is no file {text!r}; check the path")
    try:
        # the header alone tells the size: refuse a huge picture before any pixel is decoded
        with Image.open(text) as opened:
            _check_size(opened.size, name)
            opened.load()
            return _from_pil(opened, name)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: {text!r} is not an image file that can be read; pass a PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name}: {text!r} has more than {MAX_PIXELS // 10**6} million pixels; scale it down"
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name}: {text!r} is damaged or truncated ({error}); export it again") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty ({width}x{height}); pass a picture of at least 1x1")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} is {width}x{height}, more than {MAX_PIXELS // 10**6} million pixels; scale it down")


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise ValueError(
                f'{name} has mode "I" with values {values.min()}..{values.max()}; expected 0..65535:'
                ' convert it to mode "L" or "RGB"'
            )
        return _from_array(values if image.mode == "F" else values.astype(np.uint16), name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    # a fresh image: the caller's one, its file handle and its metadata stay behind
    plain = image.convert("RGB") if image.mode != "RGB" else image.copy()
    plain.info = {}
    return plain


def _from_array(values: np.ndarray[Any, Any], name: str) -> Image.Image:
    shape = tuple(values.shape)
    if values.ndim not in (2, 3):
        raise ValueError(f"{name} is an array of shape {shape}; expected one image as (H, W) or (H, W, C)")
    if values.ndim == 3 and shape[2] not in (1, 2, 3, 4):
        hint = "move the channels to the end" if shape[0] in (1, 3, 4) else "pass 1, 2, 3 or 4 channels"
        raise ValueError(f"{name} is an array of shape {shape}; expected (H, W) or (H, W, C): {hint}")
    _check_size((shape[1], shape[0]), name)
    levels = _to_levels(values, name)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]  # (H, W)
    return _from_pil(Image.fromarray(np.ascontiguousarray(levels)), name)


def _to_levels(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Values of any accepted type as uint8."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return np.round(values / 257.0).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} has dtype {values.dtype}; pass uint8 0..255, uint16 0..65535 or floats 0..1")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values; every value must be between 0 and 1")
    low, high = float(values.min()), float(values.max())
    if low < -1e-3 or high > 1 + 1e-3:
        hint = "pass x / 2 + 0.5" if low >= -1.001 and high <= 1.001 else "divide by 255 or pass uint8"
        raise ValueError(f"{name} has float values {low:.3g}..{high:.3g}; expected 0..1: {hint}")
    return np.round(values.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)


def _from_tensor(tensor: Tensor, name: str) -> Image.Image:
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and shape[0] != 1:
        raise ValueError(f"{name} is a tensor of {shape[0]} images {shape}; pass one at a time, as (C, H, W)")
    if tensor.ndim == 4:
        tensor = tensor[0]  # (C, H, W)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 2, 3, 4)):
        hint = "; move the channels to the front" if tensor.ndim == 3 and tensor.shape[-1] in (1, 3, 4) else ""
        raise ValueError(f"{name} is a tensor of shape {shape}; expected (C, H, W), 1 to 4 channels, or (H, W){hint}")
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)  # (H, W, C)
    # numpy has no bfloat16
    tensor = tensor.detach().cpu()
    return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), name)
