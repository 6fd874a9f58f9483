"""Decode images and cut them into tiles, to the bit as Mllama's slow image processor does."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from coordinator.model.hparams import VisionParams
from protocol.errors import InputError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
MAX_DECODED: Final = 512 << 20  # bytes of memory that decoding and converting may take
_PIXEL_NBYTES: Final = {"WEBP": 16, "JPEG": 11}  # measured peaks per pixel (progressive JPEG), others 9
MAX_PIXELS: Final = MAX_DECODED // 9
_BAND: Final = 1 << 20  # pixels that are converted at a time
MAX_NBYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Tiles:
    """One image as the vision tower wants it.

    `pixels` is float32 [max_tiles, 3, S, S], normalised, row-major over the canvas; tiles past `num_tiles` = rows *
    cols are exactly 0. `aspect_ratio_id` counts canvases from 1.
    """

    pixels: npt.NDArray[np.float32]
    aspect_ratio_id: int
    num_tiles: int
    rows: int
    cols: int


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a PNG, JPEG, WebP, GIF (first frame), BMP or PPM file, upright.

    The rotation in EXIF is applied (transformers' processor leaves that to its caller). Gray of 16 bits is reduced to
    8. Raises InputError for a file that is missing, no image, truncated, damaged, or so large that decoding it would
    take more than MAX_DECODED bytes of memory.
    """
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: not a regular file")
        if info.st_size > MAX_NBYTES:
            raise InputError(f"{path}: {info.st_size:,} bytes: expected at most {MAX_NBYTES:,}")
        with path.open("rb") as file:
            return _decode(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(file: object, path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below its
            image = Image.open(file, formats=FORMATS)  # type: ignore[arg-type]
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels: not decoded") from None
    except Exception:  # Pillow's parsers let whatever went wrong inside them escape
        raise InputError(f"{path}: no image in a known format ({', '.join(FORMATS)})") from None
    width, height = image.size
    limit = MAX_DECODED // (_PIXEL_NBYTES.get(image.format or "", 9) + 2 * (image.mode == "CMYK"))
    if width * height > limit:
        raise InputError(
            f"{path}: {width} x {height} pixels: expected at most {limit:,} in a {image.format} file"
            f" (to decode it in {MAX_DECODED >> 20} MiB)"
        )
    _refuse_empty(image, str(path))
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:
        raise InputError(f"{path}: damaged or truncated {image.format} image: {_one_line(error)}") from None
    return _to_8_bits(image, str(path))


def _to_8_bits(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{where}: floating-point pixels are not supported")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return _by_bands(image, "L", _high_bytes)


def _high_bytes(image: Image.Image) -> Image.Image:
    wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray((wide >> 8).astype(np.uint8))


def _by_bands(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image converted a few rows at a time: a large one would take several times its memory at once."""
    width, height = image.size
    rows = max(1, _BAND // width)
    out = Image.new(mode, image.size)
    for top in range(0, height, rows):
        out.paste(convert(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return out


def preprocess(image: Image.Image, vision: VisionParams) -> Tiles:
    """Resize onto the best canvas, pad, normalise and cut into tiles. Raises InputError for an image of no pixels."""
    _refuse_empty(image, "image")
    side = vision.image_size
    width, height = image.size
    index, (rows, cols) = choose_canvas(height, width, vision)
    new_h, new_w = fitted_size(height, width, rows * side, cols * side, side)
    resized = to_rgb(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    # The padding is black before it is normalised, hence not 0 afterwards.
    canvas = np.zeros((rows * side, cols * side, 3), np.uint8)
    canvas[:new_h, :new_w] = np.asarray(resized)
    tiles = _normalise(canvas, vision).reshape(rows, side, cols, side, 3).transpose(0, 2, 4, 1, 3)
    pixels = np.zeros((vision.max_tiles, 3, side, side), np.float32)
    pixels[: rows * cols] = tiles.reshape(rows * cols, 3, side, side)
    return Tiles(pixels, index + 1, rows * cols, rows, cols)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as it is; everything else composed over opaque white."""
    if image.mode == "RGB":
        return image
    return _by_bands(image, "RGB", _over_white)


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def choose_canvas(height: int, width: int, vision: VisionParams) -> tuple[int, tuple[int, int]]:
    """Index and (rows, columns) of the canvas for an image: least enlargement, else least reduction.

    Equal scales are decided by the smaller area, then by the order of `vision.canvases`.
    """
    side = vision.image_size
    scales = [min(rows * side / height, cols * side / width) for rows, cols in vision.canvases]
    enlarging = [scale for scale in scales if scale >= 1]
    wanted = min(enlarging) if enlarging else max(scales)
    candidates = [index for index, scale in enumerate(scales) if scale == wanted]
    best = min(candidates, key=lambda index: vision.canvases[index][0] * vision.canvases[index][1])
    return best, vision.canvases[best]


def fitted_size(height: int, width: int, canvas_h: int, canvas_w: int, side: int) -> tuple[int, int]:
    """Height and width after resizing, ratio kept: enlarged to one tile at most, never beyond the canvas."""
    target_h, target_w = min(max(height, side), canvas_h), min(max(width, side), canvas_w)
    scale_h, scale_w = target_h / height, target_w / width
    if scale_w < scale_h:
        return min(int(height * scale_w) or 1, target_h), target_w
    return target_h, min(int(width * scale_h) or 1, target_w)


def _normalise(canvas: npt.NDArray[np.uint8], vision: VisionParams) -> npt.NDArray[np.float32]:
    """x / 255 in float64, then (x - mean) / std in float32; the order of roundings matters."""
    scaled = (canvas.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(vision.image_mean, np.float32), np.array(vision.image_std, np.float32)
    return np.asarray((scaled - mean) / std, np.float32)


def _refuse_empty(image: Image.Image, where: str) -> None:
    if 0 in image.size:
        raise InputError(f"{where}: {image.size[0]} x {image.size[1]} pixels: expected at least one")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
