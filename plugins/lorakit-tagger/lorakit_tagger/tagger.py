"""The tagger itself: images to probabilities, probabilities to tags.

B images, S pixels along the sides of the model's input, T tags.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from lorakit.api import ModelError
from lorakit_tagger.component import MODEL_FILE, TAGS_FILE, TaggerConfig

GENERAL, CHARACTER = "0", "4"
"""Categories of tags, as Danbooru numbers them; ratings, 9, are not written."""
KAOMOJI = frozenset(
    {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@"}
    | {"^_^", "o_o", "u_u", "x_x", "|_|", "||_||"}
)
"""Tags that are faces, in which underscores are mouths."""


class Tag(NamedTuple):
    """A tag that the model knows."""

    name: str
    category: str


class Tagger:
    """Writes the tags that an ONNX model gives probabilities of: characters first, then from likely to unlikely."""

    def __init__(self, config: TaggerConfig, device: str) -> None:
        """Read the model onto a device. Raises ModelError where its files cannot be used."""
        self._config = config
        location = config.location()
        folder = location if isinstance(location, Path) else location.fetch([MODEL_FILE, TAGS_FILE])
        self._tags = read_tags(folder / TAGS_FILE)
        self._excluded = {_plain(tag) for tag in config.exclude}
        path = folder / MODEL_FILE
        providers = _providers(device)
        try:
            self._session = onnxruntime.InferenceSession(path, providers=providers)
        except Exception as error:  # onnxruntime raises many types, without a common base, for damaged files
            raise ModelError(f"{path} cannot be read: {error}; download it again") from error
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._size = _side(path, self._input.shape)
        count = self._output.shape[-1]
        if isinstance(count, int) and count != len(self._tags):
            raise ModelError(f"{path} knows {count} tags, and {TAGS_FILE} beside it {len(self._tags)}; get both anew")

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """The tags of each image, separated by commas."""
        pixels = np.stack([to_input(image, self._size) for image in images])
        # Some models were exported for one image at a time.
        together = len(images) if isinstance(self._input.shape[0], str | None) else 1
        batches = (pixels[start : start + together] for start in range(0, len(images), together))
        outputs = [self._session.run([self._output.name], {self._input.name: batch})[0] for batch in batches]
        return [", ".join(self._chosen(row)) for output in outputs for row in np.asarray(output)]

    def _chosen(self, probabilities: NDArray[np.float32]) -> Iterator[str]:
        """The tags to write, given the probability of each, [T]."""
        order = sorted(range(len(self._tags)), key=lambda place: -probabilities[place])
        thresholds = {CHARACTER: self._config.character_threshold, GENERAL: self._config.threshold}
        for category, threshold in thresholds.items():
            for place in order:
                tag = self._tags[place]
                is_wanted = tag.category == category and _plain(tag.name) not in self._excluded
                if is_wanted and probabilities[place] >= threshold:
                    yield tag.name if self._config.keep_underscores else _plain(tag.name)


def read_tags(path: Path) -> list[Tag]:
    """The tags in a `selected_tags.csv`, in the order of the model's outputs. Raises ModelError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [Tag(row["name"], row["category"]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        reason = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{path} cannot be read: {reason}; download it again") from error


def to_input(image: Image.Image, side: int) -> NDArray[np.float32]:
    """An image as the models were trained with: on white, padded to a square, BGR, 0 to 255, [S, S, 3]."""
    opaque = image.convert("RGBA")
    canvas = Image.new("RGBA", (max(image.size),) * 2, "white")
    canvas.alpha_composite(opaque, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    small = canvas.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small)[..., ::-1], dtype=np.float32)


def _plain(tag: str) -> str:
    """A tag with spaces instead of underscores, unless it is a face."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def _side(path: Path, shape: Sequence[int | str | None]) -> int:
    """The side of the images that a model takes, of its input's shape [B, S, S, 3]. Raises ModelError."""
    match shape:
        case [_, int() as height, int() as width, 3] if height == width:
            return height
    raise ModelError(f"{path} takes {list(shape)}, not images [B, S, S, 3]: it is no tagger of the WD14 kind")


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """What is to compute on a device, best first. Raises ModelError where the installed onnxruntime cannot use it."""
    there = onnxruntime.get_available_providers()
    kind, _, number = device.partition(":")
    if kind == "cpu" or (kind == "auto" and "CUDAExecutionProvider" not in there):
        return ["CPUExecutionProvider"]
    if kind not in ("auto", "cuda"):
        raise ModelError(f"the tagger computes on cpu or cuda, not on {device!r}")
    if "CUDAExecutionProvider" not in there:
        raise ModelError(f"onnxruntime is installed without CUDA, so there is no {device}: pip install onnxruntime-gpu")
    return [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"]
