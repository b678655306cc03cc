"""Draws scenes, 64 pixels square, each a pure function of a seed and a number; run it to see some.

Shapes are signed distances: negative inside, in units of the shape's radius. A pixel is covered by as much as the
outline's distance from its centre says, which makes smooth edges without drawing at a higher resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scenes import COLOURS, PLACES, SHAPES, TEXTURES, Scene, any_texture, caption, training_scene

from lorakit.utils.rng import keyed_generator

SIDE = 64
"""Pixels along each side of a picture."""
STEP = 16
"""Pixels from one place to the next."""
RADII = {"small": 9.5, "medium": 11.5, "big": 13.5}
"""Radius in pixels of a single shape of each size."""
_ROWS = {2: ((-15, 15), 11.0), 3: ((-20.5, 0, 20.5), 9.0)}
"""For two and three shapes: how far each is right of the centre, and their radius, both in pixels."""

Plane = NDArray[np.float32]
"""One number for each pixel, `[h, w]`, or anything that broadcasts to it."""


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.95


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _triangle(x: Plane, y: Plane) -> Plane:
    slope = (1.75 * np.abs(x) - 0.98 * (y + 0.9)) / np.hypot(1.75, 0.98)
    return np.maximum(slope, y - 0.85)


def _star(x: Plane, y: Plane) -> Plane:
    """Five points; one line bounds each tenth, from the tip to the notch beside it."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    radius, tip, notch = np.hypot(x, y), 1.05, 0.47
    run, rise = tip - notch * np.cos(tenth), notch * np.sin(tenth)
    return (rise * (radius * np.cos(angle) - tip) + run * radius * np.sin(angle)) / np.hypot(run, rise)


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner with half a disc on both upper sides."""
    x, y, half = np.abs(x), y - 0.08, 0.8
    discs = np.hypot(x - half / 2, y + half / 2) - half / np.sqrt(2)
    return np.minimum((x + np.abs(y) - half) / np.sqrt(2), discs)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.72) - 0.25


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.3, y - 0.95), np.maximum(y - 0.3, x - 0.95))


def _face(x: Plane, y: Plane) -> Plane:
    """A disc through whose eyes and mouth one sees the background."""
    eyes = np.hypot(np.abs(x) - 0.37, y + 0.27) - 0.19
    mouth = np.maximum(np.abs(np.hypot(x, y + 0.05) - 0.57) - 0.13, 0.18 - y)
    return np.maximum(np.hypot(x, y) - 1.0, -np.minimum(eyes, mouth))


_DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "face": _face,
}
_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_X, _Y = _AXIS[None, :], _AXIS[:, None]


def coverage(shape: str, across: float, down: float, radius: float, turn: float = 0.0) -> Plane:
    """How much of each pixel a shape covers, 0 to 1, `[64, 64]`; centre and radius in pixels, the turn in radians."""
    x, y = (_X - np.float32(across)) / np.float32(radius), (_Y - np.float32(down)) / np.float32(radius)
    if turn:
        cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        x, y = x * cosine + y * sine, y * cosine - x * sine
    return np.clip(0.5 - _DISTANCES[shape](x, y) * np.float32(radius), 0, 1)


def background(colour: tuple[int, int, int], texture: str) -> NDArray[np.float32]:
    """A background, values 0 to 255, `[64, 64, 3]`: plain, stripes of 8 pixels or squares of 16, in two tones."""
    first = np.asarray(colour, np.float32)
    second = first * 0.7 if first.max() > 60 else first * 0.7 + 255 * 0.3
    marks = {
        "plain": np.zeros((SIDE, SIDE), bool),
        "striped": np.broadcast_to(_Y // 8 % 2 == 1, (SIDE, SIDE)),
        "checked": (_X // 16 + _Y // 16) % 2 == 1,
    }
    return np.where(marks[texture][..., None], second, first)


def spots(scene: Scene) -> list[tuple[float, float, float]]:
    """Where a scene's shapes belong: for each the pixels to the right and down of its centre, and its radius."""
    middle = SIDE / 2
    if scene.count > 1:
        offsets, radius = _ROWS[scene.count]
        return [(middle + offset, middle, radius) for offset in offsets]
    right, down = PLACES[scene.place]
    return [(middle + STEP * right, middle + STEP * down, RADII[scene.size])]


def draw(scene: Scene, generator: np.random.Generator) -> NDArray[np.uint8]:
    """The scene as a picture, RGB, `[64, 64, 3]`; up to 1.5 pixels from where it belongs and 5 % larger or smaller."""
    shift, stretch = generator.uniform(-1.5, 1.5, 2), generator.uniform(0.95, 1.05)
    picture = background(COLOURS[scene.background], scene.texture)
    for across, down, radius in spots(scene):
        amount = coverage(scene.shape, across + shift[0], down + shift[1], radius * stretch)
        picture = painted(picture, amount, COLOURS[scene.colour])
    return rounded(picture)


def painted(picture: NDArray[np.float32], amount: Plane, colour: tuple[int, ...]) -> NDArray[np.float32]:
    """The picture with a colour over it, as much of it in each pixel as the amount there, 0 to 1, says."""
    return picture + amount[..., None] * (np.asarray(colour, np.float32) - picture)


def rounded(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture in whole numbers."""
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def training_picture(seed: int, index: int) -> NDArray[np.uint8]:
    """The picture of that number to learn from, of `training_scene`."""
    return draw(training_scene(seed, index), keyed_generator(seed, "drawing", index))


def training_caption(seed: int, index: int, telling: int = 0) -> str:
    """What the picture's caption says the `telling`-th time it is told."""
    return caption(training_scene(seed, index), keyed_generator(seed, "caption", index, telling))


def medley(seed: int, index: int) -> NDArray[np.uint8]:
    """A picture of anything: up to six shapes of any colour, size and turn, one over the other.

    The VAE learns from these too, so that it can show what the world of scenes does not have.
    """
    generator = keyed_generator(seed, "medley", index)
    ground, texture = generator.integers(256, size=3), TEXTURES[generator.integers(len(TEXTURES))]
    picture = background((int(ground[0]), int(ground[1]), int(ground[2])), texture)
    for _ in range(generator.integers(1, 7)):
        shape = SHAPES[generator.integers(len(SHAPES))]
        across, down = generator.uniform(8, SIDE - 8, 2)
        amount = coverage(shape, across, down, generator.uniform(3, 18), generator.uniform(0, 2 * np.pi))
        picture = painted(picture, amount, tuple(generator.integers(256, size=3)))
    return rounded(picture)


def toy(seed: int, index: int) -> NDArray[np.uint8]:
    """A picture of a toy anywhere: a body with or without ears, with one eye or two, all of any colour and size.

    The VAE learns from these that one thing may have several colours.
    """
    generator = keyed_generator(seed, "toy", index)
    across, down = generator.uniform(14, SIDE - 14, 2)
    radius = generator.uniform(10, 15)
    ground, colour = generator.integers(256, size=(2, 3))
    if generator.integers(2):
        ground = np.asarray(list(COLOURS.values())[generator.integers(len(COLOURS))])
    picture = background(tuple(ground), any_texture(generator))
    ears = ("", "triangle", "circle")[generator.integers(3)]
    body = coverage(SHAPES[generator.integers(len(SHAPES))], across, down, radius)
    for side in (-1, 1) if ears else ():
        body = np.maximum(body, ear(ears, across, down, radius, side, generator.uniform(0.4, 0.6)))
    picture = painted(picture, body, tuple(colour))
    apart, eye = ((0.0, 0.64), (0.42, 0.36))[generator.integers(2)]
    pupil = generator.uniform(0.45, 0.6) * eye
    white, black = generator.integers(190, 256, 3), generator.integers(70, size=3)
    for side in (-1, 1) if apart else (1,):
        for size, shade in ((eye, white), (pupil, black)):
            amount = coverage("circle", across + side * apart * radius, down, size * radius)
            picture = painted(picture, amount, tuple(shade))
    return rounded(picture)


def ear(shape: str, across: float, down: float, radius: float, side: int, size: float) -> Plane:
    """How much of each pixel an ear covers: of a body with that centre and radius in pixels, -1 the left, 1 the right.

    The ear's size is a share of the body's.
    """
    return coverage(shape, across + side * 0.68 * radius, down - 0.72 * radius, size * radius, side * 0.6)


def sheet(pictures: list[NDArray[np.uint8]], columns: int = 8) -> Image.Image:
    """Pictures side by side in rows, 4 pixels apart."""
    rows = -(-len(pictures) // columns)
    pitch = SIDE + 4
    paper = Image.new("RGB", (columns * pitch + 4, rows * pitch + 4), "white")
    for index, picture in enumerate(pictures):
        paper.paste(Image.fromarray(picture), (4 + index % columns * pitch, 4 + index // columns * pitch))
    return paper


def main() -> None:
    """Draw a sheet of pictures and print their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to save the sheet, such as pictures.png")
    parser.add_argument("--count", type=int, default=32, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="which pictures")
    parser.add_argument("--medley", action="store_true", help="draw the VAE's medleys, which have no captions")
    options = parser.parse_args()
    drawn = medley if options.medley else training_picture
    sheet([drawn(options.seed, index) for index in range(options.count)]).save(options.file)
    if not options.medley:
        print("\n".join(training_caption(options.seed, index) for index in range(options.count)))


if __name__ == "__main__":
    main()
