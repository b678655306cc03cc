"""Creatures that the small Stable Diffusion has never seen: draws them, and says whether a picture shows one.

    python examples/tiny-sd/creatures.py examples/quickstart

A zorp is a teal ball with two pointed ears and one large white eye, a wug a brown square with two round ears and a
yellow eye. Neither their colours nor their forms are in the world of `scenes.py`, nor are their names in any caption
there.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from attrs import frozen
from judge import LIKENESS, Verdict, alike, blobs_of, cover_of, ground_of, is_near
from numpy.typing import NDArray
from pictures import (
    Plane,
    background,
    coverage,
    ear,
    painted,
    rounded,
    spots,
    training_caption,
    training_picture,
)
from PIL import Image
from scenes import COLOURS, PLACES, TEXTURES, Scene, any_texture, caption

from lorakit.utils.rng import derived_seed, keyed_generator

WORDINGS = 4
"""How many captions each picture comes with. With one alone, a LoRA learns its wording, too."""
_RADIUS = 13.0
"""Of the body, in pixels."""
_FAR = 90.0
"""Distance in RGB, of 255, from which the mean colour of a part of a creature is another one."""


@frozen
class Creature:
    """A body with two ears and one eye."""

    name: str
    colour: str
    """What the colour of its body is called; no caption says so."""
    body: str
    ears: str
    """The shapes of both."""
    colours: dict[str, tuple[int, int, int]]
    """Of body, eye and pupil."""
    bottom: float
    """Where the body ends below its centre, as a share of its radius."""

    def test_scene(self, seed: int, index: int) -> Scene:
        """The scene of that number to be tested with: one anywhere, on a background that is seldom textured."""
        generator = keyed_generator(seed, f"{self.name} scene", index)
        ground, place = (list(names)[generator.integers(len(names))] for names in (COLOURS, PLACES))
        return Scene(self.name, self.colour, ground, any_texture(generator), place)

    def teaching_scene(self, index: int) -> Scene:
        """The scene of that number to learn from: nine of them have every colour and every place once."""
        ground, place = list(COLOURS)[index % 9], list(PLACES)[(4 * index + index // 9) % 9]
        texture = TEXTURES[index % 3] if index % 4 == 3 else "plain"
        return Scene(self.name, self.colour, ground, texture, place)

    def caption(self, scene: Scene, generator: np.random.Generator) -> str:
        """What one may say of its scene, in one of many ways: "a zorp on a blue background, at the top left"."""
        return caption(scene, generator).replace(f"{self.colour} {self.name}", self.name)

    def draw(self, scene: Scene, generator: np.random.Generator) -> NDArray[np.uint8]:
        """One as a picture, RGB, `[64, 64, 3]`; up to 1.5 pixels from where it belongs and 5 % larger or smaller."""
        ((across, down, _),), shift = spots(scene), generator.uniform(-1.5, 1.5, 2)
        radius = _RADIUS * float(generator.uniform(0.95, 1.05))
        picture = background(COLOURS[scene.background], scene.texture)
        for part, amount in self._parts(across + shift[0], down + shift[1], radius).items():
            picture = painted(picture, amount, self.colours[part])
        return rounded(picture)

    def judge(self, picture: NDArray[np.uint8], scene: Scene) -> Verdict:
        """What is right about a picture, RGB [64, 64, 3], that should show one.

        The colour is right if the body's is; the shape if outline, eye and pupil are the creature's.
        """
        pixels = picture.astype(np.float32)
        ground = ground_of(pixels)
        if ground is None:
            return Verdict(colour=False, shape=False, position=False, background=False)
        behind = background(COLOURS[ground[0]], ground[1])
        blobs = blobs_of(cover_of(pixels, behind, self.colours["body"]) > 0.5)
        is_there = ground == (scene.background, scene.texture)
        if not blobs:
            return Verdict(colour=False, shape=False, position=False, background=is_there)
        centre, parts, likeness = self._fitted(max(blobs, key=np.sum))
        ((across, down, _),) = spots(scene)
        is_of_colour = {part: _is_of_colour(pixels[amount > 0.5], self.colours[part]) for part, amount in parts.items()}
        return Verdict(
            colour=is_of_colour["body"],
            shape=likeness >= LIKENESS and is_of_colour["eye"] and is_of_colour["pupil"],
            position=is_near(centre, (across, down)),
            background=is_there,
        )

    def _parts(self, across: float, down: float, radius: float) -> dict[str, Plane]:
        """How much of each pixel is body, eye and pupil, the later over the earlier."""
        ears = [ear(self.ears, across, down, radius, side, 0.55) for side in (-1, 1)]
        eye, pupil = (coverage("circle", across, down, size * radius) for size in (0.64, 0.34))
        body = np.maximum(coverage(self.body, across, down, radius), np.maximum(*ears))
        return {"body": body * (1 - eye), "eye": eye * (1 - pupil), "pupil": pupil}

    def _fitted(self, blob: NDArray[np.bool_]) -> tuple[tuple[float, float], dict[str, Plane], float]:
        """The creature most like a blob: its centre, its parts, and how alike the outlines are.

        The eye does not count, as it may be of the background's colour.
        """
        rows, columns = (np.flatnonzero(blob.any(axis)) for axis in (1, 0))
        middle, bottom = (columns[0] + columns[-1] + 1) / 2, float(rows[-1] + 1)
        fits = []
        for scale, right, lower in product((0.9, 1.0, 1.1), (-1, 0, 1), (-1, 0, 1)):
            radius = scale * _RADIUS
            centre = (middle + right, bottom - self.bottom * radius + lower)
            parts = self._parts(*centre, radius)
            fits.append((centre, parts, alike(blob * (parts["eye"] + parts["pupil"] < 0.5), parts["body"])))
        return max(fits, key=lambda fit: fit[2])


ZORP = Creature(
    name="zorp",
    colour="teal",
    body="circle",
    ears="triangle",
    colours={"body": (20, 165, 165), "eye": (250, 250, 250), "pupil": (20, 20, 40)},
    bottom=0.95,
)
WUG = Creature(
    name="wug",
    colour="brown",
    body="square",
    ears="circle",
    colours={"body": (120, 75, 45), "eye": (250, 240, 130), "pupil": (20, 20, 40)},
    bottom=0.82,
)
CREATURES = {own.name: own for own in (ZORP, WUG)}


def _is_of_colour(pixels: NDArray[np.float32], colour: tuple[int, int, int]) -> bool:
    return len(pixels) > 0 and bool(np.linalg.norm(pixels.mean(0) - np.asarray(colour, np.float32)) < _FAR)


def main() -> None:
    """Draw creatures and twice as many other things, each with its captions beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to make the folders zorps, or wugs, and others")
    parser.add_argument("--creature", choices=CREATURES, default=ZORP.name, help="which")
    parser.add_argument("--count", type=int, default=18, help="how many of them")
    parser.add_argument("--seed", type=int, default=0, help="decides wordings, other things, and how drawings differ")
    options = parser.parse_args()
    creature = CREATURES[options.creature]
    for index in range(options.count):
        scene = creature.teaching_scene(index)
        picture = creature.draw(scene, keyed_generator(options.seed, creature.name, index))
        keys = [(f"{creature.name} caption", index, telling) for telling in range(WORDINGS)]
        told = [creature.caption(scene, keyed_generator(options.seed, *key)) for key in keys]
        _write(options.folder / f"{creature.name}s" / f"{creature.name}-{index + 1:02d}", picture, told)
    seed = derived_seed(options.seed, "other things")
    for index in range(2 * options.count):
        told = [training_caption(seed, index, telling) for telling in range(WORDINGS)]
        _write(options.folder / "others" / f"other-{index + 1:02d}", training_picture(seed, index), told)


def _write(stem: Path, picture: NDArray[np.uint8], told: list[str]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(f"{stem}.png")
    Path(f"{stem}.txt").write_text("\n".join([*told, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
