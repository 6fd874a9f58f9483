"""Render the example pictures and their true sentences.

    python make_images.py [FOLDER]

The scenes are set by hand, the shades drawn from a fixed seed: the same pixels every time.
"""

import json
import random
import sys
from pathlib import Path

import world
from world import PLACES, Scene, Thing

SEED = 10780
FOLDER = Path(__file__).resolve().parent.parent / "images"


def blank(background: str) -> Scene:
    """An empty scene."""
    return Scene("blank", 1, 1, background, (), world.caption_blank(background))


def one(size: str, colour: str, shape: str, place: str, background: str) -> Scene:
    """A single thing in the middle of its place, or for a large one as far out as it fits."""
    index = PLACES.index(place)
    extent, inset = (0.56, 0.29) if size == "large" else (0.3, 0.2)
    at = (inset, 0.5, 1 - inset)
    thing = Thing(shape, colour, at[index % 3], at[index // 3], extent)
    return Scene("one", 1, 1, background, (thing,), world.caption_one(size, colour, shape, index, background))


def two(first: tuple[str, str], relation: str, second: tuple[str, str], background: str) -> Scene:
    """Two (colour, shape) side by side or one above the other."""
    spots = [(0.26, 0.47), (0.75, 0.54)] if relation == "to the left of" else [(0.46, 0.25), (0.53, 0.75)]
    named = zip((first, second), spots, strict=True)
    things = tuple(Thing(shape, colour, x, y, 0.38) for (colour, shape), (x, y) in named)
    return Scene("two", 1, 1, background, things, world.caption_two(first, relation, second, background))


def many(spots: list[tuple[float, float]], colour: str, shape: str, background: str) -> Scene:
    """Equal things at these spots."""
    things = tuple(Thing(shape, colour, x, y, 0.3) for x, y in spots)
    return Scene("many", 1, 1, background, things, world.caption_many(len(spots), colour, shape, background))


THREE = [(0.24, 0.3), (0.72, 0.26), (0.5, 0.74)]
COLUMN = [(0.32, 0.16), (0.66, 0.42), (0.4, 0.8)]
FOUR = [(0.25, 0.25), (0.74, 0.3), (0.27, 0.76), (0.73, 0.73)]
EXAMPLES: dict[str, tuple[Scene, int, int]] = {
    "tower.png": (one("large", "red", "tower", "in the center", "gray"), 432, 432),
    "star.png": (one("small", "yellow", "star", "in the top right", "black"), 288, 288),
    "cross.png": (one("large", "green", "cross", "on the left", "white"), 320, 240),
    "side_by_side.png": (two(("blue", "square"), "to the left of", ("orange", "circle"), "white"), 384, 384),
    "stacked.png": (two(("purple", "cross"), "above", ("green", "triangle"), "gray"), 240, 240),
    "two_squares.png": (many([(0.28, 0.34), (0.7, 0.62)], "purple", "square", "gray"), 192, 192),
    "three_circles.png": (many(THREE, "green", "circle", "black"), 288, 288),
    "four_stars.png": (many(FOUR, "orange", "star", "white"), 288, 288),
    "blank.png": (blank("white"), 192, 192),
    "wide.png": (two(("red", "circle"), "to the left of", ("blue", "star"), "black"), 384, 192),
    "tall.png": (two(("yellow", "tower"), "above", ("purple", "square"), "white"), 192, 384),
    "panorama.png": (one("large", "orange", "triangle", "on the right", "gray"), 576, 144),
    "column.png": (many(COLUMN, "blue", "circle", "white"), 144, 432),
    "tile.png": (one("large", "purple", "circle", "in the center", "black"), 48, 48),
}  # fmt: skip


def main() -> None:
    """Render everything."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, (scene, width, height) in EXAMPLES.items():
        picture = world.render(scene, random.Random(f"{SEED} {name}"), width, height)
        picture.save(folder / name, optimize=True)
        captions[name] = scene.caption
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")


if __name__ == "__main__":
    main()
