"""The judge sees what a picture shows, also when it is blurred and noisy, and is not deceived."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from attrs import astuple, evolve
from judge import Verdict, judge, look
from numpy.typing import NDArray
from pictures import SIDE, medley, training_picture
from PIL import Image, ImageFilter
from scenes import COLOURS, PLACES, SHAPES, TEXTURES, Scene, training_scene

from lorakit.utils.rng import keyed_generator

COUNT = 150


def as_generated(index: int) -> NDArray[np.uint8]:
    """A picture as a VAE may give it back: blurred, shaded and noisy."""
    generator = keyed_generator("spoiled", index)
    blurred = Image.fromarray(training_picture(7, index)).filter(ImageFilter.GaussianBlur(0.8))
    shade = generator.uniform(-12, 12, 3)
    noise = generator.normal(0, 8, (SIDE, SIDE, 3))
    return np.clip(np.asarray(blurred) + shade + noise, 0, 255).astype(np.uint8)


def wrong(scene: Scene, index: int) -> Iterator[tuple[str, Scene]]:
    """The scene with one thing changed, after what is then wrong about a picture of it."""
    generator = keyed_generator("wrong", index)

    def other(choices: list[str], *taken: str) -> str:
        return str(generator.choice([choice for choice in choices if choice not in taken]))

    yield "colour", evolve(scene, colour=other(list(COLOURS), scene.colour, scene.background))
    yield "shape", evolve(scene, shape=other(list(SHAPES), scene.shape))
    yield "background", evolve(scene, background=other(list(COLOURS), scene.colour, scene.background))
    yield "background", evolve(scene, texture=other(list(TEXTURES), scene.texture))
    yield "position", evolve(scene, count=scene.count % 3 + 1)
    if scene.count == 1:
        yield "position", evolve(scene, place=other(list(PLACES), scene.place))


@pytest.fixture(scope="module")
def generated() -> list[tuple[Scene, NDArray[np.uint8]]]:
    return [(training_scene(7, index), as_generated(index)) for index in range(COUNT)]


def test_right_pictures_are_right(generated: list[tuple[Scene, NDArray[np.uint8]]]) -> None:
    """Pictures as drawn are all right; of those as generated, more than 98 of 100."""
    assert all(judge(training_picture(7, index), training_scene(7, index)).right for index in range(60))
    assert np.mean([judge(picture, scene).right for scene, picture in generated]) > 0.98


def test_what_is_wrong_is_told_from_what_is_right(generated: list[tuple[Scene, NDArray[np.uint8]]]) -> None:
    """With one thing in the description wrong the judge says that this is wrong, and that nothing else is."""
    exact = []
    for index, (scene, picture) in enumerate(generated[:40]):
        for wrong_part, description in wrong(scene, index):
            expected = evolve(Verdict(True, True, True, True), **{wrong_part: False})
            verdict = judge(picture, description)
            assert not verdict.right, (scene, description)
            exact.append(astuple(verdict) == astuple(expected))
    assert np.mean(exact) > 0.98


@pytest.mark.parametrize("seed", range(4))
def test_pictures_of_nothing_known_are_not_right(seed: int) -> None:
    """Noise, empty backgrounds and medleys of strange colours are never a scene, whatever is asked for."""
    scene = training_scene(3, seed)
    noise = keyed_generator("noise", seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    empty = np.full((SIDE, SIDE, 3), COLOURS[scene.background], np.uint8)
    half_done = (0.75 * empty + 0.25 * training_picture(3, seed)).astype(np.uint8)
    for picture in (noise, empty, medley(0, seed), half_done):
        assert not judge(picture, scene).right
    assert look(empty).background == scene.background
    assert not look(empty).shapes
