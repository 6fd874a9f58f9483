"""A synthetic world of coloured shapes: scenes, their one true sentence, and their picture.

Everything is drawn from a `random.Random` handed in: its state settles scene and pixels.
Coordinates are fractions of the picture's width and height; a thing's size is a fraction of the short side.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star", "cross", "tower")
COLOURS: dict[str, Colour] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 70, 220),
    "yellow": (240, 215, 30),
    "orange": (245, 135, 20),
    "purple": (140, 40, 170),
}
BACKGROUNDS: dict[str, Colour] = {"white": (248, 248, 248), "gray": (128, 128, 128), "black": (12, 12, 12)}
SIZES = ("small", "large")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = (
    "in the top left", "at the top", "in the top right",
    "on the left", "in the center", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
KINDS = {"one": 0.50, "two": 0.25, "many": 0.21, "blank": 0.04}
PROMPTS = ("Describe this image.", "What is in this image?", "What do you see?", "Describe the image.")
NO_IMAGE = "I do not see an image."

# (rows, columns) of the tile canvas a picture fills exactly, and how often.
CANVASES = {
    (2, 2): 0.58, (1, 2): 0.11, (2, 1): 0.11, (1, 1): 0.06,
    (1, 3): 0.04, (3, 1): 0.04, (1, 4): 0.03, (4, 1): 0.03,
}  # fmt: skip
THIRD_MARGIN = 0.035  # a single thing's middle stays this far from the lines between the thirds


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: its middle (fractions of width and height) and its size (fraction of the short side)."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def place(self) -> int:
        """The third of the picture its middle lies in, as an index into PLACES."""
        return min(2, int(self.y * 3)) * 3 + min(2, int(self.x * 3))


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. `rows` to `columns` is its height to its width, in tiles."""

    kind: str
    rows: float
    columns: float
    background: str
    things: tuple[Thing, ...]
    caption: str


# --- sentences ----------------------------------------------------------------------------------------------


def article(word: str) -> str:
    """'a' or 'an'."""
    return "an" if word[0] in "aeiou" else "a"


def plural(shape: str) -> str:
    """The shape's plural."""
    return shape + ("es" if shape == "cross" else "s")


def caption_blank(background: str) -> str:
    """The sentence for an empty picture."""
    return f"The image shows an empty {background} background."


def caption_one(size: str, colour: str, shape: str, place: int, background: str) -> str:
    """The sentence for one thing."""
    return f"The image shows a {size} {colour} {shape} {PLACES[place]} on a {background} background."


def caption_two(first: tuple[str, str], relation: str, second: tuple[str, str], background: str) -> str:
    """The sentence for two things, each given as (colour, shape)."""
    (c1, s1), (c2, s2) = first, second
    things = f"{article(c1)} {c1} {s1} {relation} {article(c2)} {c2} {s2}"
    return f"The image shows {things} on a {background} background."


def caption_many(count: int, colour: str, shape: str, background: str) -> str:
    """The sentence for several equal things."""
    return f"The image shows {NUMBERS[count]} {colour} {plural(shape)} on a {background} background."


def all_captions() -> Iterator[str]:
    """Yield every sentence the world can say."""
    for background in BACKGROUNDS:
        yield caption_blank(background)
        for shape in SHAPES:
            for colour in COLOURS:
                for place in range(len(PLACES)):
                    yield from (caption_one(size, colour, shape, place, background) for size in SIZES)
                yield from (caption_many(count, colour, shape, background) for count in NUMBERS)
                for other in (s for s in SHAPES if s != shape):
                    for relation in ("to the left of", "above"):
                        for shade in (c for c in COLOURS if c != colour):
                            yield caption_two((colour, shape), relation, (shade, other), background)


# --- scenes -------------------------------------------------------------------------------------------------


def weighted(rng: random.Random, choices: dict):
    """Draw a key of `choices` with its value as weight."""
    return rng.choices(list(choices), list(choices.values()))[0]


def sample_proportions(rng: random.Random, free: float) -> tuple[float, float]:
    """Draw (rows, columns). With probability `free` they fit no canvas, so the image processor has to pad."""
    if rng.random() >= free:
        return weighted(rng, CANVASES)
    if rng.random() < 0.8:
        ratio = math.exp(rng.uniform(-0.62, 0.62))
        return 2.0 * min(1.0, ratio), 2.0 * min(1.0, 1 / ratio)
    length = rng.uniform(1.86, 4.0)
    return rng.choice([(1.0, length), (length, 1.0)])


class Placer:
    """Draws places inside a picture of the given proportions."""

    def __init__(self, rng: random.Random, rows: float, columns: float) -> None:
        self.rng = rng
        self.short = min(rows, columns)
        self.wide, self.high = columns / self.short, rows / self.short

    def draw(self, size: float, xs: Point = (0, 1), ys: Point = (0, 1)) -> Point:
        """Draw a middle within xs and ys, moved inwards as far as this size needs to stay inside."""
        half_x, half_y = size / self.wide / 2 * 1.05, size / self.high / 2 * 1.12
        x = self.rng.uniform(max(xs[0], half_x), max(xs[0], half_x, min(xs[1], 1 - half_x)))
        y = self.rng.uniform(max(ys[0], half_y), max(ys[0], half_y, min(ys[1], 1 - half_y)))
        return x, y

    def distance(self, a: Point, b: Point) -> float:
        """The distance of two places, as a fraction of the short side."""
        return math.hypot((a[0] - b[0]) * self.wide, (a[1] - b[1]) * self.high)


def sample_one(rng: random.Random, placer: Placer, background: str) -> tuple[tuple[Thing, ...], str]:
    """One thing, small or large, clear of the lines between the thirds that its sentence names."""
    shape, colour, size_word = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(SIZES)
    size = rng.uniform(0.26, 0.33) if size_word == "small" else rng.uniform(0.50, 0.62)
    while True:
        x, y = placer.draw(size)
        if all(abs(v - line) > THIRD_MARGIN for v in (x, y) for line in (1 / 3, 2 / 3)):
            break
    thing = Thing(shape, colour, x, y, size)
    return (thing,), caption_one(size_word, colour, shape, thing.place, background)


def sample_two(rng: random.Random, placer: Placer, background: str) -> tuple[tuple[Thing, ...], str]:
    """Two things of different shape and colour, side by side or one above the other, never clearly both."""
    (s1, s2), (c1, c2) = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    d1, d2 = rng.uniform(0.30, 0.42), rng.uniform(0.30, 0.42)
    beside = placer.wide > placer.high or (placer.wide == placer.high and rng.random() < 0.5)
    while True:
        if beside:
            first, second = placer.draw(d1, xs=(0, 0.30)), placer.draw(d2, xs=(0.70, 1))
            askew = abs(first[1] - second[1]) * placer.high
        else:
            first, second = placer.draw(d1, ys=(0, 0.30)), placer.draw(d2, ys=(0.70, 1))
            askew = abs(first[0] - second[0]) * placer.wide
        if askew < 0.32:
            break
    things = Thing(s1, c1, *first, d1), Thing(s2, c2, *second, d2)
    relation = "to the left of" if beside else "above"
    return things, caption_two((c1, s1), relation, (c2, s2), background)


def sample_many(rng: random.Random, placer: Placer, background: str) -> tuple[tuple[Thing, ...], str]:
    """Two to four equal things that do not touch."""
    count, shape, colour = rng.choice(list(NUMBERS)), rng.choice(SHAPES), rng.choice(list(COLOURS))
    size = rng.uniform(0.24, 0.32)
    spots: list[Point] = []
    while len(spots) < count:
        spots = []
        for _ in range(count):
            spot = placer.draw(size)
            if all(placer.distance(spot, other) > size * 1.25 for other in spots):
                spots.append(spot)
    things = tuple(Thing(shape, colour, x, y, size) for x, y in spots)
    return things, caption_many(count, colour, shape, background)


def sample_blank(_rng: random.Random, _placer: Placer, background: str) -> tuple[tuple[Thing, ...], str]:
    """Nothing but the background."""
    return (), caption_blank(background)


SAMPLERS = {"one": sample_one, "two": sample_two, "many": sample_many, "blank": sample_blank}


def sample_scene(rng: random.Random, free: float = 0.0) -> Scene:
    """Draw a scene; `free` is the share of pictures whose proportions fit no tile canvas."""
    rows, columns = sample_proportions(rng, free)
    background, kind = rng.choice(list(BACKGROUNDS)), weighted(rng, KINDS)
    things, caption = SAMPLERS[kind](rng, Placer(rng, rows, columns), background)
    return Scene(kind, rows, columns, background, things, caption)


# --- pictures -----------------------------------------------------------------------------------------------


def square_points(cx: float, cy: float, r: float) -> list[Point]:
    s = r * 0.86
    return [(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)]


def triangle_points(cx: float, cy: float, r: float) -> list[Point]:
    return [(cx, cy - r), (cx + r, cy + r * 0.8), (cx - r, cy + r * 0.8)]


def star_points(cx: float, cy: float, r: float) -> list[Point]:
    radii = [r * 1.1, r * 0.45] * 5
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(cx + q * math.cos(a), cy + q * math.sin(a)) for q, a in zip(radii, angles, strict=True)]


def cross_points(cx: float, cy: float, r: float) -> list[Point]:
    t = r * 0.33
    corners = [
        (-t, -r),
        (t, -r),
        (t, -t),
        (r, -t),
        (r, t),
        (t, t),
        (t, r),
        (-t, r),
        (-t, t),
        (-r, t),
        (-r, -t),
        (-t, -t),
    ]
    return [(cx + x, cy + y) for x, y in corners]


def tower_points(cx: float, cy: float, r: float) -> list[Point]:
    """A slim spire over two splayed legs: an A with a mast."""
    w, h = r * 0.85, r * 1.1
    right = [(r * 0.07, -h), (r * 0.22, h * 0.1), (w, h), (w * 0.5, h), (r * 0.2, h * 0.45)]
    return [(cx + x, cy + y) for x, y in [*right, *((-x, y) for x, y in reversed(right))]]


POLYGONS = {
    "square": square_points,
    "triangle": triangle_points,
    "star": star_points,
    "cross": cross_points,
    "tower": tower_points,
}


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, width: int, height: int, fill: Colour | int) -> None:
    """Draw one thing onto a picture of this size."""
    cx, cy, r = thing.x * width, thing.y * height, thing.size * min(width, height) / 2
    if thing.shape == "circle":
        pen.ellipse([cx - r, cy - r, cx + r, cy + r], fill=fill)
    else:
        pen.polygon(POLYGONS[thing.shape](cx, cy, r), fill=fill)


def jitter(rng: random.Random, colour: Colour, by: int) -> Colour:
    """The colour with each channel moved by up to `by`."""
    r, g, b = (max(0, min(255, v + rng.randint(-by, by))) for v in colour)
    return r, g, b


def render(scene: Scene, rng: random.Random, width: int, height: int) -> Image.Image:
    """Paint the scene as an RGB picture."""
    picture = Image.new("RGB", (width, height), jitter(rng, BACKGROUNDS[scene.background], 8))
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        draw_thing(pen, thing, width, height, jitter(rng, COLOURS[thing.colour], 14))
    return picture


def label_map(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an 8-bit map: 0 for background, i + 1 for the i-th thing."""
    picture = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(picture)
    for i, thing in enumerate(scene.things):
        draw_thing(pen, thing, width, height, i + 1)
    return picture
