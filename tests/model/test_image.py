from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordinator.model.hparams import VisionParams
from coordinator.model.image import MAX_PIXELS, choose_canvas, fitted_size, load_image, preprocess, to_rgb
from protocol.errors import InputError

REFERENCE = Path(__file__).parent.parent / "data" / "ref_mllama"
PROCESSOR = json.loads((REFERENCE / "cases.json").read_text())["processor"]


@pytest.mark.parametrize("name", ["square_2x2", "wide_1x3", "small_1x1"])
def test_pixels_equal_the_reference_bit_for_bit(name: str, reference: Path, ref_vision: VisionParams) -> None:
    expected = np.load(reference / f"{name}.npz")
    tiles = preprocess(load_image(reference / "images" / f"{name}.png"), ref_vision)
    assert tiles.pixels.dtype == np.float32
    assert np.array_equal(tiles.pixels.view(np.uint32), expected["pixel_values"][0, 0].view(np.uint32))
    assert tiles.aspect_ratio_id == int(expected["aspect_ratio_ids"].item())
    assert tiles.num_tiles == int(expected["num_tiles"].item()) == tiles.rows * tiles.cols
    assert expected["aspect_ratio_mask"].ravel().tolist() == [1] * tiles.num_tiles + [0] * (4 - tiles.num_tiles)


def test_there_are_fourteen_processor_cases() -> None:
    assert len(PROCESSOR) == 14


@pytest.mark.parametrize("case", PROCESSOR, ids=lambda case: f"{case['w']}x{case['h']}")
def test_processor_case(case: dict[str, int], ref_vision: VisionParams) -> None:
    side = ref_vision.image_size
    index, (rows, cols) = choose_canvas(case["h"], case["w"], ref_vision)
    assert [rows * side, cols * side] == case["canvas_hw"]
    assert list(fitted_size(case["h"], case["w"], rows * side, cols * side, side)) == case["resized_hw"]
    tiles = preprocess(Image.new("RGB", (case["w"], case["h"]), (200, 100, 50)), ref_vision)
    assert (tiles.aspect_ratio_id, tiles.num_tiles) == (case["id"], case["num_tiles"]) == (index + 1, rows * cols)
    assert not tiles.pixels[tiles.num_tiles :].any()
    # Padding inside the canvas is black, then normalised: it is where the red channel has its least value.
    canvas = tiles.pixels[: tiles.num_tiles].reshape(rows, cols, 3, side, side).transpose(2, 0, 3, 1, 4)
    inside = canvas.reshape(3, rows * side, cols * side)[0] > 0
    assert inside.sum() == case["resized_hw"][0] * case["resized_hw"][1]
    assert inside[: case["resized_hw"][0], : case["resized_hw"][1]].all()


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), tiles=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_fitted_size_stays_inside_the_canvas(width: int, height: int, tiles: int) -> None:
    vision = VisionParams(1, 1, 8, 8, 1, 1e-5, 56, 14, tiles, 3, (0,), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True)
    index, (rows, cols) = choose_canvas(height, width, vision)
    assert vision.canvases[index] == (rows, cols)
    new_h, new_w = fitted_size(height, width, rows * 56, cols * 56, 56)
    assert 1 <= new_h <= rows * 56
    assert 1 <= new_w <= cols * 56


def test_canvas_order(ref_vision: VisionParams) -> None:
    assert ref_vision.canvases == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def save(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_formats(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (10, 200, 30))
    for name in ("a.png", "a.webp", "a.bmp", "a.ppm", "a.gif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        loaded = to_rgb(load_image(save(tmp_path, image, name, **options)))
        assert loaded.size == (20, 10)
        assert loaded.getpixel((3, 3)) == (10, 200, 30), name
    pixel = to_rgb(load_image(save(tmp_path, image, "a.jpg"))).getpixel((3, 3))
    assert all(abs(a - b) < 6 for a, b in zip(pixel, (10, 200, 30), strict=True))  # type: ignore[arg-type]


def test_alpha_and_palette_over_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(load_image(save(tmp_path, clear, "a.png"))).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert to_rgb(load_image(save(tmp_path, half, "b.png"))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert to_rgb(load_image(save(tmp_path, palette, "c.png"))).getpixel((0, 0)) == (9, 8, 7)
    assert to_rgb(load_image(save(tmp_path, palette, "d.png", transparency=1))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(load_image(save(tmp_path, Image.new("L", (4, 4), 77), "e.png"))).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(load_image(save(tmp_path, Image.new("1", (4, 4), 1), "f.png"))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert to_rgb(load_image(save(tmp_path, cmyk, "g.jpg"))).getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_are_reduced(tmp_path: Path) -> None:
    wide = Image.fromarray(np.full((5, 7), 0x8080, np.uint16))
    loaded = load_image(save(tmp_path, wide, "a.png"))
    assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("L", (7, 5), 0x80)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    loaded = load_image(save(tmp_path, image, "a.png", exif=exif))
    assert loaded.size == (10, 20)
    assert loaded.getpixel((5, 1)) == (255, 255, 255)
    assert loaded.getpixel((5, 18)) == (0, 0, 0)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_bad_images(tmp_path: Path, reference: Path) -> None:
    good = (reference / "images" / "square_2x2.png").read_bytes()
    bomb = png_header(60_000, 60_000) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    large = bomb.replace(png_header(60_000, 60_000), png_header(8_000, 7_457))
    for name, data, pattern in (
        ("text.png", b"no image at all", "no image in a known format"),
        ("empty.png", b"", "no image in a known format"),
        ("cut.png", good[: len(good) // 2], "damaged or truncated"),
        ("head.png", good[:40], "damaged or truncated|no image"),
        ("zero.png", png_header(0, 10) + bomb[33:], "no image|expected at least one"),
        ("bomb.png", bomb, f"more than {MAX_PIXELS:,} pixels"),
        ("large.png", large, f"8000 x 7457 pixels: expected at most {MAX_PIXELS:,} in a PNG"),
        ("icon.ico", b"\0\0\1\0\1\0", "no image in a known format"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=pattern) as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_image(tmp_path)


def test_large_images_are_converted_in_bands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any size of bands gives the same pixels."""
    values = np.random.default_rng(0).integers(0, 256, (37, 23, 4), np.uint8)
    wide = Image.fromarray(values[..., 0].astype(np.uint16) * 251)
    whole = [to_rgb(Image.fromarray(values)), load_image(save(tmp_path, wide, "wide.png"))]
    monkeypatch.setattr("coordinator.model.image._BAND", 60)
    bands = [to_rgb(Image.fromarray(values)), load_image(save(tmp_path, wide, "wide.png"))]
    assert [np.asarray(a).tolist() for a in whole] == [np.asarray(b).tolist() for b in bands]


def test_formats_that_need_more_memory_have_lower_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.model.image.MAX_DECODED", 10_000)
    image = Image.new("RGB", (30, 30))
    assert load_image(save(tmp_path, image, "a.png")).size == (30, 30)
    assert load_image(save(tmp_path, image, "a.jpg")).size == (30, 30)
    for name, limit in (("b.webp", 625), ("c.jpg", 769)):
        large = image.convert("CMYK") if name == "c.jpg" else image
        with pytest.raises(InputError, match=f"30 x 30 pixels: expected at most {limit}"):
            load_image(save(tmp_path, large, name))


def test_empty_image(ref_vision: VisionParams) -> None:
    with pytest.raises(InputError, match="0 x 5 pixels"):
        preprocess(Image.new("RGB", (0, 5)), ref_vision)


@given(st.lists(st.tuples(st.integers(8, 1 << 12), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_flipped_bytes(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.png"
    data = bytearray((REFERENCE / "images" / "small_1x1.png").read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    path.write_bytes(bytes(data))
    try:
        image = load_image(path)
    except InputError:
        return
    assert 0 not in image.size


def test_other_tile_counts(ref_vision: VisionParams) -> None:
    vision = replace(ref_vision, max_tiles=2)
    tiles = preprocess(Image.new("RGB", (300, 10)), vision)
    assert tiles.pixels.shape == (2, 3, 56, 56)
    assert (tiles.rows, tiles.cols, tiles.aspect_ratio_id) == (1, 2, 2)
