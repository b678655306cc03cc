"""Creatures: their judge knows them, also when they are blurred and noisy, and nothing else for them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from attrs import astuple, evolve
from creatures import CREATURES, ZORP, Creature, main
from judge import Verdict
from numpy.typing import NDArray
from pictures import SIDE, background, training_picture
from PIL import Image, ImageFilter
from scenes import COLOURS, PLACES, Scene

from lorakit.utils.rng import keyed_generator

COUNT = 150
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture(params=CREATURES.values(), ids=list(CREATURES))
def creature(request: pytest.FixtureRequest) -> Creature:
    """Each of them."""
    found: Creature = request.param
    return found


def spoiled(creature: Creature, index: int) -> NDArray[np.uint8]:
    """One as a VAE may give it back: blurred and noisy."""
    generator = keyed_generator(f"spoiled {creature.name}", index)
    drawn = Image.fromarray(creature.draw(creature.test_scene(1, index), generator)).filter(
        ImageFilter.GaussianBlur(0.8)
    )
    return np.clip(np.asarray(drawn) + generator.normal(0, 8, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def test_drawn_creatures_are_right(creature: Creature) -> None:
    """Of drawings that are blurred and noisy at least 98 of 100 are right in every respect."""
    right = sum(creature.judge(spoiled(creature, index), creature.test_scene(1, index)).right for index in range(COUNT))
    assert right >= 0.98 * COUNT


@pytest.mark.parametrize("texture", ["plain", "striped", "checked"])
def test_each_background_and_place(creature: Creature, texture: str) -> None:
    """One is known on every background and in every place."""
    for ground, place in product(COLOURS, PLACES):
        scene = Scene(creature.name, creature.colour, ground, texture, place)
        assert creature.judge(creature.draw(scene, keyed_generator(ground, place)), scene).right, scene


def test_nothing_else_is_one(creature: Creature) -> None:
    """No picture of the world or of the other creature has colour and shape of one, nor has an empty background."""
    (other,) = (own for own in CREATURES.values() if own is not creature)
    pictures = [training_picture(2, index) for index in range(COUNT)]
    pictures += [spoiled(other, index) for index in range(COUNT // 5)]
    for index, picture in enumerate(pictures):
        verdict = creature.judge(picture, creature.test_scene(1, index))
        assert not (verdict.colour and verdict.shape)
    empty = np.rint(background(COLOURS["blue"], "plain")).astype(np.uint8)
    scene = Scene(creature.name, creature.colour, "blue")
    assert creature.judge(empty, scene) == Verdict(colour=False, shape=False, position=False, background=True)
    noise = keyed_generator("noise").integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    assert not any(astuple(creature.judge(noise, scene)))


def test_what_is_wrong_is_said() -> None:
    """A zorp elsewhere, on another background, in red, or without its eye is wrong in that and in nothing else."""
    scene = Scene("zorp", "teal", "blue", place="left")
    picture = ZORP.draw(scene, keyed_generator("zorp"))
    assert astuple(ZORP.judge(picture, evolve(scene, place="right"))) == (True, True, False, True)
    assert astuple(ZORP.judge(picture, evolve(scene, background="red"))) == (True, True, True, False)
    assert astuple(ZORP.judge(picture, evolve(scene, texture="striped"))) == (True, True, True, False)
    blind = np.where((picture.min(-1) > 150)[..., None] | (picture.max(-1) < 60)[..., None], (20, 165, 165), picture)
    assert astuple(ZORP.judge(blind.astype(np.uint8), scene)) == (True, False, True, True)
    teal = (picture[..., 0] < 60) & (picture[..., 1] > 120)
    red = np.where(teal[..., None], (220, 40, 40), picture).astype(np.uint8)
    assert not ZORP.judge(red, scene).colour


def test_captions_name_it_and_where_it_is(creature: Creature) -> None:
    """Every caption says its name and the background, and never a colour of its own."""
    for index in range(COUNT):
        scene = creature.test_scene(0, index)
        told = creature.caption(scene, keyed_generator("told", index))
        assert f"a {creature.name}" in told
        assert creature.colour not in told
        assert scene.background in told or scene.background == "purple"


def test_the_quick_start_teaches_every_colour_and_place() -> None:
    """Nine pictures in a row show all backgrounds and all places once; the files are as the script draws them."""
    for first in (0, 9):
        scenes = [ZORP.teaching_scene(index) for index in range(first, first + 9)]
        assert {scene.background for scene in scenes} == set(COLOURS)
        assert {scene.place for scene in scenes} == set(PLACES)


def test_the_quick_starts_files_are_as_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script draws the very pictures and captions that the quick start comes with: 18 zorps, 36 other things."""
    monkeypatch.setattr("sys.argv", ["creatures.py", str(tmp_path)])
    main()
    for folder, count in (("zorps", 18), ("others", 36)):
        drawn = sorted((tmp_path / folder).glob("*.png"))
        assert len(drawn) == count
        for file in drawn:
            kept = QUICKSTART / folder / file.name
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(kept)))
            assert file.with_suffix(".txt").read_text() == kept.with_suffix(".txt").read_text()
