"""Says whether a picture shows a scene, by measuring it: nothing here is learned.

The background is the one of all that fits the picture's margin best. What differs from it is the shapes; their
commonest colour is their colour, how far each pixel is from the background to that colour is how much of it they
cover, and a shape is the one whose drawing covers the same. Blur and a little noise change none of these much.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from attrs import astuple, frozen
from numpy.typing import NDArray
from pictures import SIDE, Plane, background, coverage, spots
from scenes import COLOURS, SHAPES, TEXTURES, Scene

_MARGIN = 3
"""Pixels along the picture's edges that are mostly background."""
_SAME = 60.0
"""Distance in RGB, of 255, up to which a colour counts as the same."""
_APART = 45.0
"""Distance in RGB from the background from which a pixel counts as part of a shape."""
_SMALLEST = 30
"""Pixels that a shape has at least; anything smaller is dirt."""
LIKENESS = 0.7
"""What a shape's cover and its drawing's have in common, as a share of what either has, at least."""
_NEAR = 6.0
"""Pixels that a shape may be from where it belongs, down or across."""


@frozen
class Verdict:
    """What is right about a picture."""

    colour: bool
    shape: bool
    position: bool
    """Whether there are as many shapes as there should be, each where it belongs."""
    background: bool
    """Whether the background has the right colour and texture."""

    @property
    def right(self) -> bool:
        """Whether everything is."""
        return all(astuple(self))


@frozen
class Sighting:
    """What a picture shows."""

    colour: str | None
    background: str | None
    texture: str | None
    shapes: tuple[str | None, ...]
    """The shapes from left to right; None for one that is like no known shape."""
    centres: tuple[tuple[float, float], ...]
    """For each shape the pixels to the right and down of its centre."""


def judge(picture: NDArray[np.uint8], scene: Scene) -> Verdict:
    """What is right about a picture, RGB [64, 64, 3], that should show the scene."""
    seen = look(picture)
    belonging = [(across, down) for across, down, _ in spots(scene)]
    return Verdict(
        colour=seen.colour == scene.colour,
        shape=bool(seen.shapes) and all(shape == scene.shape for shape in seen.shapes),
        position=len(seen.centres) == len(belonging)
        and all(is_near(*pair) for pair in zip(seen.centres, belonging, strict=True)),
        background=(seen.background, seen.texture) == (scene.background, scene.texture),
    )


def is_near(place: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two places, each across and down in pixels, are the same but for what a drawing may be off."""
    return bool(np.abs(np.subtract(place, other)).max() <= _NEAR)


def cover_of(pixels: NDArray[np.float32], behind: NDArray[np.float32], colour: tuple[int, int, int]) -> Plane:
    """How far each pixel is from the background to a colour, 0 to 1: how much of it something of that colour covers."""
    way = np.asarray(colour, np.float32) - behind
    return np.clip(((pixels - behind) * way).sum(-1) / np.square(way).sum(-1), 0, 1)


def look(picture: NDArray[np.uint8]) -> Sighting:
    """What a picture, RGB [64, 64, 3], shows."""
    pixels = picture.astype(np.float32)
    ground = ground_of(pixels)
    if ground is None:
        return Sighting(None, None, None, (), ())
    behind = background(COLOURS[ground[0]], ground[1])
    colour = _colour(pixels, behind, ground[0])
    if colour is None:
        return Sighting(None, *ground, (), ())
    cover = cover_of(pixels, behind, COLOURS[colour])
    blobs = blobs_of(cover > 0.5)
    boxes = sorted((_box(blob, cover), index) for index, blob in enumerate(blobs))
    return Sighting(
        colour,
        *ground,
        shapes=tuple(_shape(cover * grown(blobs[index]), box) for box, index in boxes),
        centres=tuple(((left + right) / 2, (top + bottom) / 2) for (left, right, top, bottom), _ in boxes),
    )


@cache
def _grounds() -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """All backgrounds by colour and texture, and their pixels along the edges [backgrounds, pixels, 3]."""
    names = list(product(COLOURS, TEXTURES))
    return names, np.stack([background(COLOURS[colour], texture)[_edges()] for colour, texture in names])


@cache
def _edges() -> NDArray[np.bool_]:
    inside = slice(_MARGIN, SIDE - _MARGIN)
    edges = np.ones((SIDE, SIDE), bool)
    edges[inside, inside] = False
    return edges


def ground_of(pixels: NDArray[np.float32]) -> tuple[str, str] | None:
    """Colour and texture of the background, or None if no background is like the picture's edges."""
    names, known = _grounds()
    distances = np.minimum(np.linalg.norm(known - pixels[_edges()], axis=-1), 2 * _SAME).mean(1)
    best = int(distances.argmin())
    return names[best] if distances[best] < _SAME / 2 else None


def _colour(pixels: NDArray[np.float32], behind: NDArray[np.float32], ground: str) -> str | None:
    """The commonest colour of pixels that are not of the background, or None if there are too few."""
    names = [name for name in COLOURS if name != ground]
    palette = np.asarray([COLOURS[name] for name in names], np.float32)
    others = pixels[np.linalg.norm(pixels - behind, axis=-1) > _APART]
    distances = np.linalg.norm(others[:, None] - palette, axis=-1)
    nearest = distances.argmin(1)[distances.min(1) < _SAME] if len(others) else np.empty(0, int)
    votes = np.bincount(nearest, minlength=len(names))
    return names[int(votes.argmax())] if votes.max() >= _SMALLEST else None


def blobs_of(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The parts of a mask that hang together, diagonally too; dirt is left out."""
    left, blobs = mask.copy(), []
    while left.any():
        blob = np.zeros_like(mask)
        blob.flat[int(left.argmax())] = True
        while (larger := grown(blob) & left).sum() > blob.sum():
            blob = larger
        left &= ~blob
        if blob.sum() >= _SMALLEST:
            blobs.append(blob)
    return blobs


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the pixels around it."""
    wide = np.pad(mask, 1)
    tall = wide[:-2] | wide[1:-1] | wide[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def _box(blob: NDArray[np.bool_], cover: Plane) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a blob in pixels and fractions of one."""
    own = cover * grown(blob)
    sides: list[float] = []
    for axis in (0, 1):
        peaks = own.max(axis)
        inside = np.flatnonzero(blob.any(axis))
        first, last = int(inside[0]), int(inside[-1])
        before = peaks[first - 1] if first else 0.0
        after = peaks[last + 1] if last + 1 < SIDE else 0.0
        sides += [first + 1 - float(peaks[first]) - float(before), last + float(peaks[last]) + float(after)]
    return sides[0], sides[1], sides[2], sides[3]


def _shape(cover: Plane, box: tuple[float, float, float, float]) -> str | None:
    """The shape whose drawing covers the same pixels, or None if none is like it."""
    likeness = {shape: max(alike(cover, drawing) for drawing in _drawings(shape, box)) for shape in SHAPES}
    best = max(likeness, key=lambda shape: likeness[shape])
    return best if likeness[best] >= LIKENESS else None


def alike(one: Plane, other: Plane) -> float:
    """What two covers have in common as a share of what either has."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _drawings(shape: str, box: tuple[float, float, float, float]) -> list[Plane]:
    """Drawings of a shape that fill the box, a little smaller, and larger, each sharp and blurred."""
    left, right, top, bottom = box
    width, height, middle = _extent(shape)
    radius = (right - left + bottom - top) / (width + height)
    across, down = (left + right) / 2, (top + bottom) / 2
    sharp = [coverage(shape, across, down - middle * radius * factor, radius * factor) for factor in (0.94, 1.0, 1.06)]
    return sharp + [_blurred(drawing) for drawing in sharp]


def _blurred(cover: Plane) -> Plane:
    """The cover with each pixel mixed with its neighbours, 1 : 2 : 1 across and down."""
    wide = np.pad(cover, 1, mode="edge")
    tall = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    return (tall[:, :-2] + 2 * tall[:, 1:-1] + tall[:, 2:]) / 16


@cache
def _extent(shape: str) -> tuple[float, float, float]:
    """Width and height of a shape of radius 1, and how far down the middle between its top and bottom is."""
    scale, middle = 20.0, SIDE / 2
    inside = coverage(shape, middle, middle, scale)
    across, down = inside.max(0), inside.max(1)
    rows = np.flatnonzero(down)
    first, last = rows[0] + 1 - down[rows[0]], rows[-1] + down[rows[-1]]
    return float(across.sum() / scale), float(down.sum() / scale), float(((first + last) / 2 - middle) / scale)
