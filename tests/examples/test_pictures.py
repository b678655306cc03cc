"""The world of scenes: its captions say what its pictures show, and what is held out stays out of training."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from pictures import SIDE, coverage, medley, toy, training_caption, training_picture
from scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    held_out_scene,
    is_held_out,
    plain_caption,
    scene_of,
    training_scene,
)

from lorakit.utils.rng import keyed_generator


def telling(scene: Scene) -> tuple[str, str, str]:
    return scene.shape, scene.colour, scene.background


def test_held_out_combinations_never_occur_in_training() -> None:
    """No training scene has a held-out combination, and each word of those occurs in training with others."""
    trained = {telling(training_scene(0, index)) for index in range(20_000)}
    kept_back = {telling(held_out_scene(0, index)) for index in range(2_000)}
    assert not trained & kept_back
    assert len(trained) + len(kept_back) == len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1), "all combinations occur"
    assert 0.07 < len(kept_back) / (len(trained) + len(kept_back)) < 0.13
    for shape, colour, background in kept_back:
        assert any(combination[:2] == (shape, colour) for combination in trained)
        assert any(combination[1:] == (colour, background) for combination in trained)


def test_what_is_held_out_depends_on_nothing_but_three_words() -> None:
    """Place, size, texture and number never bring a held-out combination back into training."""
    for index in range(20):
        scene = held_out_scene(1, index)
        for texture, place, size, count in product(TEXTURES, PLACES, SIZES, (1, 2, 3)):
            assert is_held_out(Scene(*telling(scene), texture, place, size, count))


def test_captions_say_what_the_scene_is() -> None:
    """Each caption, however worded, is read back as the scene it is of; the plain one too."""
    texts = set()
    for index in range(3_000):
        scene = training_scene(5, index)
        text = training_caption(5, index)
        assert scene_of(text) == scene, text
        assert scene_of(plain_caption(scene)) == scene
        texts.add(text)
    assert len(texts) > 2_900, "captions are worded in many ways"


def test_captions_of_one_scene_differ() -> None:
    """A picture told again gets other words for the same, and the same words for the same telling."""
    told = [training_caption(0, 3, telling) for telling in range(30)]
    assert len(set(told)) > 10
    assert {scene_of(text) for text in told} == {training_scene(0, 3)}
    assert told == [training_caption(0, 3, telling) for telling in range(30)]


@pytest.mark.parametrize(
    "text", ["a red dog on a blue background", "a red circle", "a circle on a blue background", ""]
)
def test_what_is_no_scene_is_said(text: str) -> None:
    """A text with unknown words, without a colour or without a background is refused by its wording."""
    with pytest.raises(ValueError, match="not a scene"):
        scene_of(text)


def test_pictures_depend_on_seed_and_number_alone() -> None:
    """The same seed and number draw the same bytes, in any order; others draw other pictures."""
    forwards = [training_picture(0, index) for index in range(10)]
    backwards = [training_picture(0, index) for index in reversed(range(10))]
    assert np.array_equal(forwards, backwards[::-1])
    assert len({picture.tobytes() for picture in forwards}) == 10
    assert not np.array_equal(training_picture(1, 0), forwards[0])
    assert np.array_equal(medley(0, 4), medley(0, 4))
    assert np.array_equal(toy(0, 4), toy(0, 4))
    assert forwards[0].shape == medley(0, 0).shape == toy(0, 0).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.95**2),
        ("square", 1.64**2),
        ("triangle", 0.98 * 1.75),
        ("star", 10 * 0.5 * 1.05 * 0.47 * np.sin(np.pi / 5)),
        ("heart", 2 * 0.8**2 + np.pi * 0.8**2 / 2),
        ("ring", np.pi * (0.97**2 - 0.47**2)),
        ("cross", 2 * 1.9 * 0.6 - 0.6**2),
    ],
)
def test_shapes_cover_their_area(shape: str, area: float) -> None:
    """The covered pixels add up to the shape's area by the formula, whole, turned and between pixels."""
    for across, turn in ((32.0, 0.0), (31.3, 0.0), (32.4, 0.7)):
        assert coverage(shape, across, 32.2, 20.0, turn).sum() == pytest.approx(area * 400, rel=0.02)


def test_captions_use_every_word() -> None:
    """All shapes, colours, textures, places and sizes are spoken of."""
    told = [caption(training_scene(2, index), keyed_generator(2, index)) for index in range(2_000)]
    words = {word.strip(",") for text in told for word in text.split()}
    unsaid = {"plain", "medium"}
    assert {*SHAPES, *COLOURS, *TEXTURES, *SIZES, *" ".join(PLACES).split()} - unsaid <= words
