"""The zorp: its judge knows it, also when it is blurred and noisy, and nothing else for it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from attrs import astuple, evolve
from judge import Verdict
from numpy.typing import NDArray
from pictures import SIDE, background, training_picture
from PIL import Image, ImageFilter
from scenes import COLOURS, PLACES, Scene
from zorp import draw_zorp, judge_zorp, main, teaching_scene, zorp_caption, zorp_scene

from lorakit.utils.rng import keyed_generator

COUNT = 150
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def spoiled(index: int) -> NDArray[np.uint8]:
    """A zorp as a VAE may give it back: blurred and noisy."""
    generator = keyed_generator("spoiled zorp", index)
    drawn = Image.fromarray(draw_zorp(zorp_scene(1, index), generator)).filter(ImageFilter.GaussianBlur(0.8))
    return np.clip(np.asarray(drawn) + generator.normal(0, 8, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def test_drawn_zorps_are_right() -> None:
    """Of drawings that are blurred and noisy at least 98 of 100 are right in every respect."""
    right = sum(judge_zorp(spoiled(index), zorp_scene(1, index)).right for index in range(COUNT))
    assert right >= 0.98 * COUNT


@pytest.mark.parametrize("texture", ["plain", "striped", "checked"])
def test_each_background_and_place(texture: str) -> None:
    """A zorp is known on every background and in every place."""
    for ground, place in product(COLOURS, PLACES):
        scene = Scene("zorp", "teal", ground, texture, place)
        assert judge_zorp(draw_zorp(scene, keyed_generator(ground, place)), scene).right, scene


def test_nothing_else_is_a_zorp() -> None:
    """No picture of the base's world has colour and shape of a zorp, and an empty background has none of it."""
    for index in range(COUNT):
        verdict = judge_zorp(training_picture(2, index), zorp_scene(1, index))
        assert not (verdict.colour and verdict.shape)
    empty = np.rint(background(COLOURS["blue"], "plain")).astype(np.uint8)
    scene = Scene("zorp", "teal", "blue")
    assert judge_zorp(empty, scene) == Verdict(colour=False, shape=False, position=False, background=True)
    noise = keyed_generator("noise").integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    assert not any(astuple(judge_zorp(noise, scene)))


def test_what_is_wrong_is_said() -> None:
    """A zorp elsewhere, on another background, in red, or without its eye is wrong in that and in nothing else."""
    scene = Scene("zorp", "teal", "blue", place="left")
    picture = draw_zorp(scene, keyed_generator("zorp"))
    assert astuple(judge_zorp(picture, evolve(scene, place="right"))) == (True, True, False, True)
    assert astuple(judge_zorp(picture, evolve(scene, background="red"))) == (True, True, True, False)
    assert astuple(judge_zorp(picture, evolve(scene, texture="striped"))) == (True, True, True, False)
    blind = np.where((picture.min(-1) > 150)[..., None] | (picture.max(-1) < 60)[..., None], (20, 165, 165), picture)
    assert astuple(judge_zorp(blind.astype(np.uint8), scene)) == (True, False, True, True)
    teal = (picture[..., 0] < 60) & (picture[..., 1] > 120)
    red = np.where(teal[..., None], (220, 40, 40), picture).astype(np.uint8)
    assert not judge_zorp(red, scene).colour


def test_captions_name_it_and_where_it_is() -> None:
    """Every caption says its name and the background, and never a colour of its own."""
    for index in range(COUNT):
        scene = zorp_scene(0, index)
        told = zorp_caption(scene, keyed_generator("told", index))
        assert "a zorp" in told
        assert "teal" not in told
        assert scene.background in told or scene.background == "purple"


def test_the_quick_start_teaches_every_colour_and_place() -> None:
    """Nine pictures in a row show all backgrounds and all places once; the files are as the script draws them."""
    for first in (0, 9):
        scenes = [teaching_scene(index) for index in range(first, first + 9)]
        assert {scene.background for scene in scenes} == set(COLOURS)
        assert {scene.place for scene in scenes} == set(PLACES)


def test_the_quick_starts_files_are_as_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script draws the very pictures and captions that the quick start comes with: 18 zorps, 36 other things."""
    monkeypatch.setattr("sys.argv", ["zorp.py", str(tmp_path)])
    main()
    for folder, count in (("zorps", 18), ("others", 36)):
        drawn = sorted((tmp_path / folder).glob("*.png"))
        assert len(drawn) == count
        for file in drawn:
            kept = QUICKSTART / folder / file.name
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(kept)))
            assert file.with_suffix(".txt").read_text() == kept.with_suffix(".txt").read_text()
