"""A world of scenes: what a picture shows, which words say so, and which combinations are kept from training."""

from __future__ import annotations

import numpy as np
from attrs import evolve, frozen

from lorakit.utils.rng import derived_seed, keyed_generator

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "face")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 160, 70),
    "blue": (50, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "white": (245, 245, 245),
    "black": (30, 30, 30),
}
TEXTURES = ("plain", "striped", "checked")
SIZES = ("small", "medium", "big")
PLACES = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""The places by name: which step to the right and which step down from the picture's centre."""

_SYNONYMS = {
    "circle": ("disc",),
    "square": ("box",),
    "ring": ("hoop",),
    "cross": ("plus",),
    "face": ("smiley",),
    "purple": ("violet",),
    "small": ("little", "tiny"),
    "big": ("large",),
    "striped": ("stripy",),
    "checked": ("chequered",),
    "centre": ("center", "middle"),
}
_NUMBERS = {1: "a", 2: "two", 3: "three"}
_PLURALS = {"cross": "crosses", "box": "boxes", "plus": "pluses"}
_PATTERNS = (
    "{thing} {place} on {ground}",
    "{thing} on {ground} {place}",
    "{thing} on {ground}, {place}",
    "{place}, {thing} on {ground}",
    "{ground} with {thing} {place}",
    "{thing}, {place}, {ground}",
)
_PATTERNS_WITHOUT_PLACE = ("{thing} on {ground}", "{thing}, {ground}", "{ground} with {thing}")
_OPENINGS = ("", "", "a picture of ", "a drawing of ")
_TELLING = ("shape", "colour", "background")
"""The words of a scene whose combination decides whether it is held out."""


@frozen
class Scene:
    """What a picture shows: one shape somewhere, or a row of two or three, on a background of another colour."""

    shape: str
    colour: str
    background: str
    texture: str = "plain"
    place: str = "centre"
    """Always `centre` where there are several shapes."""
    size: str = "medium"
    """Always `medium` where there are several shapes."""
    count: int = 1


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees the scene: a tenth of all combinations of shape, colour and background colour."""
    return derived_seed("held out", *(getattr(scene, word) for word in _TELLING)) % 10 == 0


def training_scene(seed: int, index: int) -> Scene:
    """The scene of that number to learn from; it is never a held-out one."""
    return _first(keyed_generator(seed, "training scene", index), held_out=False)


def held_out_scene(seed: int, index: int) -> Scene:
    """The scene of that number to be tested with: its shape, colour and background never occur together in training."""
    return _first(keyed_generator(seed, "held-out scene", index), held_out=True)


def _first(generator: np.random.Generator, held_out: bool) -> Scene:
    while is_held_out(scene := _any_scene(generator)) != held_out:
        pass
    return scene


def _any_scene(generator: np.random.Generator) -> Scene:
    colour, background = generator.choice(list(COLOURS), 2, replace=False).tolist()
    shape = SHAPES[generator.integers(len(SHAPES))]
    texture = any_texture(generator)
    scene = Scene(shape, colour, background, texture, count=max(int(generator.integers(-6, 4)), 1))
    if scene.count > 1:
        return scene
    place = list(PLACES)[generator.integers(len(PLACES))]
    return evolve(scene, place=place, size=SIZES[generator.integers(len(SIZES))])


def any_texture(generator: np.random.Generator) -> str:
    """A texture, most often none."""
    return TEXTURES[max(int(generator.integers(-4, len(TEXTURES))), 0)]


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """What one may say of a scene, in one of many ways: "a red disc on a blue background, at the top left".

    A plain background, the medium size and the place of several shapes go unsaid, the centre sometimes.
    """
    parts = {
        "thing": _thing(scene, generator),
        "ground": _ground(scene, generator),
        "place": _where(scene.place, generator),
    }
    is_left_out = scene.count > 1 or (scene.place == "centre" and generator.integers(2))
    patterns = _PATTERNS_WITHOUT_PLACE if is_left_out else _PATTERNS
    said = patterns[generator.integers(len(patterns))].format(**parts)
    return said if said.startswith(parts["place"]) else _OPENINGS[generator.integers(len(_OPENINGS))] + said


def plain_caption(scene: Scene) -> str:
    """The scene in the plainest words: "a small red circle on a striped blue background, top left"."""
    size = "" if scene.size == "medium" else f"{scene.size} "
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    thing = f"{_NUMBERS[scene.count]} {size}{scene.colour} {_plural(scene.shape, scene.count)}"
    place = "" if scene.count > 1 else f", {scene.place}"
    return _with_articles(f"{thing} on a {texture}{scene.background} background{place}")


def _thing(scene: Scene, generator: np.random.Generator) -> str:
    words = [_NUMBERS[scene.count], _said(scene.colour, generator), _plural(_said(scene.shape, generator), scene.count)]
    if scene.size != "medium":
        words.insert(1, _said(scene.size, generator))
    return _with_articles(" ".join(words))


def _ground(scene: Scene, generator: np.random.Generator) -> str:
    texture = "" if scene.texture == "plain" else _said(scene.texture, generator) + " "
    word = ("background", "backdrop")[generator.integers(2)]
    return _with_articles(f"a {texture}{_said(scene.background, generator)} {word}")


def _where(place: str, generator: np.random.Generator) -> str:
    if place == "centre":
        return "in the " + _said(place, generator)
    words = place.replace("top ", "upper ").replace("bottom ", "lower ") if generator.integers(3) == 0 else place
    return ("", "at the ", "on the ")[generator.integers(3)] + words


def _said(word: str, generator: np.random.Generator) -> str:
    """The word itself or, in one case of three, another one for the same."""
    others = _SYNONYMS.get(word, ())
    return others[generator.integers(len(others))] if others and generator.integers(3) == 0 else word


def _plural(word: str, count: int) -> str:
    return word if count == 1 else _PLURALS.get(word, f"{word}s")


def _with_articles(text: str) -> str:
    return text.replace("a orange", "an orange")


def scene_of(text: str) -> Scene:
    """The scene that a caption speaks of.

    Raises ValueError if a word is unknown or a shape, a colour or the background is missing.
    """
    meanings = _meanings()
    said = [word for word in text.replace(",", "").lower().split() if word not in _SILENT]
    if unknown := [word for word in said if word not in meanings]:
        raise ValueError(f'not a scene: "{text}" (unknown: {", ".join(unknown)})')
    words = [meanings[word] for word in said]
    ground = words.index("background") if "background" in words else 0
    texture = words[ground - 2] if ground > 1 and words[ground - 2] in TEXTURES else "plain"
    others = words[: max(ground - 1, 0)] + words[ground:]
    background, shape, colour = (
        next((word for word in place if word in known), None)
        for place, known in ((words[ground - 1 : ground], COLOURS), (others, SHAPES), (others, COLOURS))
    )
    if not (shape and colour and background):
        raise ValueError(f'not a scene: "{text}" (it needs a shape, a colour and a background)')
    size = next((word for word in others if word in SIZES), "medium")
    count = next((number for number, word in _NUMBERS.items() if word in others), 1)
    places = [word for word in ("centre", "top", "bottom", "left", "right") if word in others]
    return Scene(shape, colour, background, texture, " ".join(places) or "centre", size, count)


_SILENT = {"a", "an", "of", "on", "in", "at", "the", "with", "picture", "drawing"}


def _meanings() -> dict[str, str]:
    """The word of the world that each word of a caption stands for."""
    known = [*SHAPES, *COLOURS, *TEXTURES, *SIZES, *" ".join(PLACES).split(), *_NUMBERS.values(), "background"]
    meanings = {word: word for word in known} | {"upper": "top", "lower": "bottom", "backdrop": "background"}
    meanings |= {other: word for word, others in _SYNONYMS.items() for other in others}
    return meanings | {_plural(word, 2): meaning for word, meaning in meanings.items() if meaning in SHAPES}
