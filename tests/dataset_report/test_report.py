"""The report: each image as training uses it, and what captions and images have in common."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from PIL import Image, ImageEnhance

import lorakit
from lorakit.dataset_report.report import DataReport, ImageReport
from lorakit.dataset_report.text import report_lines
from lorakit.errors import ConfigError, DataError

Tables = Callable[..., dict[str, Any]]


def images_of(report: DataReport) -> dict[str, ImageReport]:
    """The images by their names."""
    return {image.path.name: image for image in report.images}


def text_of(report: DataReport) -> str:
    """The report in one line, so that where lines end does not matter."""
    return " ".join(" ".join(report_lines(report)).split())


def test_what_becomes_of_each_image(folder: Path, tables: Tables) -> None:
    """Bucket, crop, enlargement and repeats are those of training."""
    Image.open(folder / "chelsea.png").resize((128, 128)).save(folder / "small.png")
    report = lorakit.report_data(tables(num_repeats=3))
    images = images_of(report)
    assert {name: image.bucket for name, image in images.items()} == {
        "astronaut.png": (256, 256), "chelsea.png": (320, 192), "coffee.png": (320, 192), "coins.png": (256, 256),
        "rocket.jpg": (320, 192), "small.png": (256, 256),
    }  # fmt: skip
    # coins.png has 384x303 pixels, of which 303x303 are left; small.png is enlarged to twice its size.
    assert images["coins.png"].cropped == pytest.approx(1 - 303 / 384, abs=0.01)
    assert images["astronaut.png"].cropped == 0
    assert not images["astronaut.png"].is_cropped
    assert (images["small.png"].enlarged, images["coins.png"].is_enlarged) == (2.0, False)
    assert {image.appearances for image in report.images} == {3}
    text = text_of(report)
    assert "photos: 6 images; 18 an epoch, repeats counted" in text
    assert "256x256 3 9 7% 21% 1" in text
    assert "enlarged 1: small.png (128x128) 2.0 times" in text


def test_captions_that_are_missing_or_cut(folder: Path, tables: Tables) -> None:
    """None, an empty one, and one over the limit are told apart, and lengths are counted in tokens."""
    report = lorakit.report_data(tables())
    images = images_of(report)
    assert [name for name, image in images.items() if not image.has_caption] == ["coins.png"]
    assert [name for name, image in images.items() if report.is_cut(image)] == ["coffee.png"]
    assert (report.token_limit, images["chelsea.png"].tokens, images["rocket.jpg"].tokens) == (75, 4, 0)
    text = text_of(report)
    assert "no caption 1: coins.png empty 1: rocket.jpg cut captions 1, after 75 tokens: coffee.png of" in text
    assert "0 tokens 2" in text
    assert "5 CAPTIONS" in text
    named = lorakit.report_data(tables(class_tokens="coin"))
    assert images_of(named)["coins.png"].caption == "coin"
    assert "class tokens 1: coins.png" in text_of(named)
    longer = tables()
    longer["model"]["max_token_length"] = 225
    assert "cut captions 1" not in text_of(lorakit.report_data(longer))


def test_captions_are_as_long_as_options_make_them(folder: Path, tables: Tables) -> None:
    """Prefix and suffix count, and of wildcards the longest option."""
    (folder / "chelsea.txt").write_text("{cat|tabby cat}, whiskers")
    report = lorakit.report_data(tables(caption_prefix="photo of", enable_wildcard=True))
    assert images_of(report)["chelsea.png"].caption == "photo of tabby cat, whiskers"
    assert images_of(report)["chelsea.png"].tokens == 7


def test_held_out_regularisation_and_unused(folder: Path, tables: Tables, tmp_path: Path, save: Callable[..., Path]):
    """Images for validation and regularisation are told as such; subsets that are off have no images."""
    for name in ("reg", "off"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.png", red=64)
    subsets = [
        {"image_dir": folder, "num_repeats": 2},
        {"image_dir": tmp_path / "reg", "is_reg": True, "class_tokens": "thing"},
        {"image_dir": tmp_path / "off", "num_repeats": 0},
    ]
    datasets = [{"resolution": 256, "validation_split": 0.4, "subsets": subsets}]
    report = lorakit.report_data({**tables(), "data": {"datasets": datasets}})
    training, regularising, off = report.subsets
    assert [image.held_out for image in training.images].count(True) == 2
    assert sum(image.appearances for image in training.images) == 6
    assert regularising.is_reg
    assert [image.appearances for image in regularising.images] == [6]
    assert off.images == ()
    text = text_of(report)
    assert "5 images, 2 held out for validation; 6 an epoch" in text
    assert "1 image for regularisation; 6 an epoch" in text
    assert "off: no image is used" in text


def test_faces(folder: Path, tables: Tables) -> None:
    """Where crops are made around faces, no share is named, as it varies."""
    for path in folder.iterdir():
        path.unlink()
    shutil.copy(Path(lorakit.__file__).parents[1] / "examples/quickstart/zorps/zorp-01.png", folder / "a_20_20_9_9.png")
    report = lorakit.report_data(tables(enable_bucket=False, face_crop_aug_range=[1.5, 2.0]))
    assert images_of(report)["a_20_20_9_9.png"].cropped is None
    assert "varies varies" in text_of(report)


def test_equal_images(folder: Path, tables: Tables) -> None:
    """Files with the same content are found without any package; that nearly equal ones are not looked for is said."""
    shutil.copy(folder / "chelsea.png", folder / "again.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "imagehash", None)
        report = lorakit.report_data(tables())
    assert [[path.name for path in group] for group in report.alike.equal] == [["again.png", "chelsea.png"]]
    assert report.alike.nearly_equal is None
    assert "nearly equal not looked for; pip install imagehash" in text_of(report)


def test_nearly_equal_images(folder: Path, tables: Tables) -> None:
    """Copies that are smaller, compressed, brighter or turned by EXIF are found; different photographs are not."""
    pytest.importorskip("imagehash")
    with Image.open(folder / "chelsea.png") as cat:
        cat.resize((200, 133)).save(folder / "chelsea-small.jpg", quality=70)
        ImageEnhance.Brightness(cat).enhance(1.15).save(folder / "chelsea-bright.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        cat.rotate(90, expand=True).save(folder / "chelsea-turned.jpg", exif=exif, quality=90)
    shutil.copy(folder / "rocket.jpg", folder / "rocket-again.jpg")
    report = lorakit.report_data(tables())
    groups = [{path.name for path in group} for group in report.alike.nearly_equal or ()]
    assert groups == [{"chelsea.png", "chelsea-small.jpg", "chelsea-bright.png", "chelsea-turned.jpg"}]
    assert "equal 1: rocket-again.jpg = rocket.jpg" in text_of(report)


def test_copies_across_the_split_are_marked(folder: Path, tables: Tables) -> None:
    """Validation on a copy of what is trained on means nothing, so it is said which one is held out."""
    for name in ("a", "b", "c", "d"):
        shutil.copy(folder / "chelsea.png", folder / f"{name}.png")
    report = lorakit.report_data(tables(validation_split=0.5))
    (group,) = report.alike.equal
    held_out = [image.path.name for image in report.images if image.held_out and image.path in group]
    assert 0 < len(held_out) < len(group)
    assert all(f"{name} (held out)" in text_of(report) for name in held_out)


def test_damaged_images_are_named(folder: Path, tables: Tables) -> None:
    """An image whose header and end are good but whose middle is not is named when it is decoded."""
    pytest.importorskip("imagehash")
    content = bytearray((folder / "chelsea.png").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (folder / "chelsea.png").write_bytes(content)
    report = lorakit.report_data(tables())
    (damage,) = report.alike.damaged
    assert damage.startswith(f"{folder / 'chelsea.png'}: is damaged")
    assert "damaged" in text_of(report)


def test_what_is_known_is_not_read_again(folder: Path, tables: Tables) -> None:
    """A file of the same length and time is taken for the same, whatever is in it now; a wrong record is not."""
    pytest.importorskip("imagehash")
    shutil.copy(folder / "chelsea.png", folder / "other.png")
    Image.open(folder / "chelsea.png").save(folder / "other.png", compress_level=1)
    first = lorakit.report_data(tables())
    for path in folder.glob("*.png"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert text_of(lorakit.report_data(tables())) == text_of(first)
    known = folder.parent / "out" / "cache" / "files.json"
    records = json.loads(known.read_text())
    for record in records["files"].values():
        record["perceptual hash"] = "not a hash"
    known.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"chelsea\.png"):
        lorakit.report_data(tables())


def test_nothing_is_changed(folder: Path, tables: Tables) -> None:
    """No file beside images is written, and none is touched."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lorakit.report_data(tables())
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    written = {path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*")}
    assert {name for name in written if not name.startswith("photos")} <= {"out", "out/cache", "out/cache/files.json"}


def test_bad_input(folder: Path, tables: Tables) -> None:
    """A config or files that cannot be used are refused as in training."""
    with pytest.raises(ConfigError, match="resolution"):
        lorakit.report_data(tables(resolution=3))
    (folder / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png: is not a"):
        lorakit.report_data(tables())


def test_sentences_are_no_tags(folder: Path, tables: Tables) -> None:
    """Where captions are sentences, their parts are not listed as tags."""
    for path in folder.glob("*.txt"):
        path.write_text(f"A photograph of a thing named {path.stem}, in the middle of a large room")
    assert "NO TAGS: THE PARTS OF CAPTIONS HAVE 7 WORDS ON AVERAGE" in text_of(lorakit.report_data(tables()))


def test_without_token_counts(folder: Path, tables: Tables) -> None:
    """For a model family that counts no tokens, captions are measured in words, and none is said to be cut."""
    report = lorakit.report_data(tables())
    subsets = tuple(
        evolve(subset, images=tuple(evolve(image, tokens=None) for image in subset.images)) for subset in report.subsets
    )
    text = text_of(evolve(report, subsets=subsets, token_limit=None))
    assert "5 CAPTIONS, 25 WORDS ON AVERAGE" in text
    assert "cut captions" not in text
    assert "CUT CAPTIONS 256x256 2 2" in text
