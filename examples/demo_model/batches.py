"""Training batches: pictures cut as the image processor would, captions, labels for the auxiliary heads."""

import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import world
from architecture import CANVASES, GRID, MEAN, PATCH, STD, TILE, TILES
from PIL import Image
from transformers.models.mllama.image_processing_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

IGNORE = -100  # the label cross_entropy leaves out
COVERED = 0.18  # share of a patch a thing has to cover for the patch to be labelled with it
ENLARGEMENTS = (1.0, 1.0, 1.5, 2.0, 2.5, 3.0)  # picture size over canvas size
COLOUR_NAMES = tuple(world.COLOURS)


@dataclass(frozen=True, slots=True)
class Batch:
    """B pictures of T tiles of P patches, M things in all; labels that do not apply are IGNORE."""

    pixels: torch.Tensor  # [B, 1, T, 3, TILE, TILE]
    ratio_ids: torch.Tensor  # [B, 1]
    tile_mask: torch.Tensor  # [B, 1, T]
    patch_shape: torch.Tensor  # [B*T*P], 0 is background
    patch_colour: torch.Tensor  # [B*T*P], 0 is background
    patch_place: torch.Tensor  # [B*T*P], the third that the patch's thing lies in
    patch_thing: torch.Tensor  # [B*T*P], number of the thing within the batch, -1 for none
    thing_shape: torch.Tensor  # [M]
    scene_count: torch.Tensor  # [B], number of things
    scene_place: torch.Tensor  # [B], of single things
    scene_size: torch.Tensor  # [B], of single things
    captions: list[str]


def fit(width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The canvas (rows, columns) and the (height, width) within it that the image processor would choose."""
    high, wide = get_optimal_tiled_canvas(height, width, TILES, TILE)
    size = get_image_size_fit_to_canvas(height, width, high, wide, TILE)
    return (int(high) // TILE, int(wide) // TILE), (int(size[0]), int(size[1]))


def cut_tiles(picture: Image.Image, canvas: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Cut into [TILES, 3, TILE, TILE].

    Padding within the canvas is black before normalising; absent tiles are 0 after it.
    """
    rows, columns = canvas
    pixels = np.zeros((rows * TILE, columns * TILE, 3), np.float32)
    small = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels[: size[0], : size[1]] = np.asarray(small, np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.float32(MEAN)) / np.float32(STD)
    tiles = np.zeros((TILES, 3, TILE, TILE), np.float32)
    cut = pixels.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    tiles[: rows * columns] = cut.reshape(-1, 3, TILE, TILE)
    return tiles


def patch_labels(scene: world.Scene, canvas: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """[4, TILES, GRID * GRID]: shape, colour, place and number of the thing each patch shows."""
    rows, columns = canvas
    present = rows * columns
    things = np.zeros((rows * TILE, columns * TILE), np.uint8)
    things[: size[0], : size[1]] = np.asarray(world.label_map(scene, size[1], size[0]))
    things = things.reshape(rows, GRID, PATCH, columns, GRID, PATCH)
    labels = np.empty((4, TILES, GRID * GRID), np.int64)
    labels[:, :present] = np.array([0, 0, IGNORE, -1])[:, None, None]
    labels[:, present:] = np.array([IGNORE, IGNORE, IGNORE, -1])[:, None, None]
    for i, thing in enumerate(scene.things):
        covered = (things == i + 1).mean((2, 5)).transpose(0, 2, 1, 3).reshape(present, GRID * GRID)
        shape, colour = world.SHAPES.index(thing.shape) + 1, COLOUR_NAMES.index(thing.colour) + 1
        labels[:, :present][:, covered > COVERED] = np.array([shape, colour, thing.place, i])[:, None]
    return labels


def scene_labels(scene: world.Scene) -> tuple[int, int, int]:
    """The number of things, and place and size of a single one."""
    if scene.kind != "one":
        return len(scene.things), IGNORE, IGNORE
    thing = scene.things[0]
    return 1, thing.place, int(thing.size > 0.4)


def sample_picture(rng: random.Random, free: float) -> tuple[world.Scene, Image.Image]:
    """Draw a scene and paint it at a random size."""
    scene = world.sample_scene(rng, free)
    enlargement = 1.0 if (scene.rows, scene.columns) == (1, 1) else rng.choice(ENLARGEMENTS)
    width, height = (int(side * TILE * enlargement) for side in (scene.columns, scene.rows))
    return scene, world.render(scene, rng, width, height)


def make_batch(rng: random.Random, n: int, free: float) -> Batch:
    """Draw n pictures with all their labels."""
    tiles, ratio_ids, masks, patches, scenes, thing_shapes, captions = [], [], [], [], [], [], []
    for _ in range(n):
        scene, picture = sample_picture(rng, free)
        canvas, size = fit(*picture.size)
        labels = patch_labels(scene, canvas, size)
        labels[3][labels[3] >= 0] += len(thing_shapes)
        present = canvas[0] * canvas[1]
        tiles.append(cut_tiles(picture, canvas, size))
        ratio_ids.append(1 + CANVASES.index(canvas))
        masks.append([1] * present + [0] * (TILES - present))
        patches.append(labels)
        scenes.append(scene_labels(scene))
        thing_shapes += [world.SHAPES.index(thing.shape) for thing in scene.things]
        captions.append(scene.caption)
    per_patch = torch.from_numpy(np.stack(patches, axis=1)).reshape(4, -1)
    per_scene = torch.tensor(scenes).T
    return Batch(
        torch.from_numpy(np.stack(tiles))[:, None],
        torch.tensor(ratio_ids)[:, None],
        torch.tensor(masks)[:, None],
        *per_patch,
        torch.tensor(thing_shapes, dtype=torch.long),
        *per_scene,
        captions,
    )


def stream(seed: int, rank: int, first: int, last: int, n: int, free: float) -> Iterator[Batch]:
    """Yield the batches of steps first to last, made ahead in a thread. Each step has its own generator."""
    ready: queue.Queue[Batch] = queue.Queue(8)

    def produce() -> None:
        for step in range(first, last + 1):
            ready.put(make_batch(random.Random(f"train {seed} {rank} {step}"), n, free))

    threading.Thread(target=produce, daemon=True).start()
    for _ in range(first, last + 1):
        yield ready.get()
