"""The tagger, with a tiny model whose tags are colours: what it sees, what it writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import onnx
import pytest
from lorakit_tagger.component import TaggerConfig
from lorakit_tagger.tagger import Tagger, to_input
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from lorakit.api import ModelError
from lorakit.testing.contracts import CaptionerContract

SIDE = 16
TAGS = {
    "general": ("9", (1.0, 0.0, 0.0)),
    "blue_sky": ("0", (1.0, 0.0, 0.0)),
    "green_grass": ("0", (0.0, 1.0, 0.0)),
    "red": ("0", (0.0, 0.0, 1.0)),
    ">_<": ("0", (0.0, 0.0, 0.9)),
    "red_hero_(comic)": ("4", (0.0, 0.0, 0.9)),
}
"""Each tag with its category and how much of it is blue, green and red."""


def make_model(folder: Path, batch: int | str = "batch", channels: int = 3) -> Path:
    """A model whose probabilities are the mean colours of an image, weighted for each tag."""
    folder.mkdir(exist_ok=True)
    weights = np.array([weights for _, weights in TAGS.values()], np.float32).T / 255
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["colours"], keepdims=0),
        helper.make_node("MatMul", ["colours", "weights"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, SIDE, SIDE, channels])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, len(TAGS)])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights[:channels], "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    rows = [f"{number},{name},{category},1" for number, (name, (category, _)) in enumerate(TAGS.items())]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the model."""
    return make_model(tmp_path / "tagger")


@pytest.fixture
def tag(model: Path) -> Callable[..., list[str]]:
    """A function that tags images of colours, with other options."""

    def tagged(*colours: str, size: tuple[int, int] = (20, 20), **options: object) -> list[str]:
        config = TaggerConfig(model=str(model), **options)  # type: ignore[arg-type]
        return config.build("cpu").caption([Image.new("RGB", size, colour) for colour in colours])

    return tagged


class TestTagger(CaptionerContract):
    """The tagger."""

    config = TaggerConfig(model="tagger", threshold=0.2)

    @pytest.fixture(autouse=True)
    def _with_a_model(self, _in_a_folder_of_its_own: None, tmp_path: Path) -> None:
        self.config = attrs.evolve(self.config, model=str(make_model(tmp_path / "tagger")))


def test_tags_of_colours(tag: Callable[..., list[str]]) -> None:
    """Characters first, then the likeliest; underscores become spaces but in faces; ratings are left out."""
    assert tag("red", "lime", "blue") == ["red hero (comic), red, >_<", "green grass", "blue sky"]
    assert tag("#006400") == ["green grass"]
    assert tag("black") == [""]


def test_options(tag: Callable[..., list[str]]) -> None:
    """Thresholds, excluded tags and underscores."""
    assert tag("red", threshold=0.95) == ["red hero (comic), red"]
    assert tag("red", character_threshold=0.95) == ["red, >_<"]
    assert tag("red", exclude=("red", "red_hero_(comic)", ">_<")) == [""]
    assert tag("red", exclude=("red hero (comic)",), keep_underscores=True) == ["red, >_<"]
    assert tag("blue", keep_underscores=True) == ["blue_sky"]
    assert tag("#640000", threshold=0.39) == ["red"]


@pytest.mark.parametrize(("size", "white"), [((20, 20), 0.0), ((20, 10), 0.5), ((10, 40), 0.75)])
def test_input(size: tuple[int, int], white: float) -> None:
    """Squares are padded with white, around the image; blue comes first; numbers go up to 255."""
    pixels = to_input(Image.new("RGB", size, "red"), 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.float32)
    assert tuple(pixels[16, 16]) == (0, 0, 255)
    assert pixels[..., 0].mean() / 255 == pytest.approx(white, abs=0.05)
    if white:
        assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == (255, 255, 255)


def test_transparent_pixels_are_white() -> None:
    """An image with transparency is put on white."""
    assert to_input(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), 8).min() == 255


def test_a_model_for_one_image_at_a_time(tmp_path: Path) -> None:
    """Models that were exported with a batch of one tag several images one by one."""
    config = TaggerConfig(model=str(make_model(tmp_path / "one", batch=1)))
    assert config.build("cpu").caption([Image.new("RGB", (8, 8), colour) for colour in ("lime", "blue")]) == [
        "green grass",
        "blue sky",
    ]


def problems(model: str | Path) -> list[str]:
    """What is wrong with a path, as messages say it."""
    return [str(problem) for problem in TaggerConfig(model=str(model)).problems()]


def test_paths_that_lead_nowhere(tmp_path: Path, model: Path) -> None:
    """A missing folder, and one without a file, are named with what to give; a Hub id is taken on trust."""
    assert problems(model) == problems("SmilingWolf/wd-vit-tagger-v3") == []
    assert problems(tmp_path / "none")[0].startswith(f"model: {tmp_path / 'none'} does not exist (give a folder with")
    (model / "selected_tags.csv").unlink()
    assert problems(model) == [
        f"model: {model} has no selected_tags.csv (give a folder with model.onnx and selected_tags.csv)"
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.onnx", b"nothing", r"model\.onnx cannot be read"),
        ("selected_tags.csv", b"a,b\n1,2\n", r"selected_tags\.csv cannot be read: it has no column 'name'"),
        ("selected_tags.csv", b"\xff\xfe", r"selected_tags\.csv cannot be read"),
        ("selected_tags.csv", b"name,category\nx,0\n", r"knows 6 tags, and selected_tags\.csv beside it 1"),
    ],
)
def test_damaged_files(model: Path, file: str, content: bytes, message: str) -> None:
    """Each is named."""
    (model / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tagger(TaggerConfig(model=str(model)), "cpu")


def test_other_models_and_devices(tmp_path: Path, model: Path) -> None:
    """A model that takes something else than images, and a device that onnxruntime cannot use here."""
    with pytest.raises(ModelError, match="it is no tagger of the WD14 kind"):
        Tagger(TaggerConfig(model=str(make_model(tmp_path / "grey", channels=1))), "cpu")
    with pytest.raises(ModelError, match="cpu or cuda, not on 'mps'"):
        Tagger(TaggerConfig(model=str(model)), "mps")
    with pytest.raises(ModelError, match=r"there is no cuda:1: pip install onnxruntime-gpu"):
        Tagger(TaggerConfig(model=str(model)), "cuda:1")
