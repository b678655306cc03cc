"""Folders of images as a stranger may pack them: pipes, loops, paths that lead out, endless texts."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache
from lorakit.data.cache.store import Cache
from lorakit.data.captions import LONGEST
from lorakit.data.images.decode import inspect_image
from lorakit.data.index import IndexedDataset, index_datasets
from lorakit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one image with its caption, beside a secret one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("red")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "secret.png")
    return folder


def index(folder: Path, **settings: Any) -> IndexedDataset:
    """What is found in a folder."""
    subset = SubsetConfig(image_dir=folder, **settings)
    (found,) = index_datasets([DatasetConfig(subsets=(subset,), resolution=(64, 64))])
    return found


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def long_loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


SPECIAL: list[tuple[Callable[[Path], None], str]] = [
    (pipe, "not a regular file"), (device, "not a regular file"),
    (loop, "symbolic links"), (long_loop, "symbolic links"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), SPECIAL, ids=[make.__name__ for make, _ in SPECIAL])
@pytest.mark.parametrize("name", ["b.png", "a.txt"])
def test_what_is_no_file_is_refused(folder: Path, name: str, make: Callable[[Path], None], reason: str) -> None:
    """A pipe, a device or a loop of links in the place of an image or a caption is named, and never waited for."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: .*{reason}"):
        index(folder)


@pytest.mark.parametrize(("make", "reason"), SPECIAL, ids=[make.__name__ for make, _ in SPECIAL])
def test_masks_that_are_no_files(folder: Path, tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    """The same holds for masks."""
    (tmp_path / "masks").mkdir()
    make(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=rf"a\.png: cannot be read: .*{reason}"):
        index(folder, conditioning_data_dir=tmp_path / "masks")


def test_folders_that_lead_back(folder: Path) -> None:
    """A link to the folder itself is not followed, as folders inside of image_dir are not looked into."""
    (folder / "b.png").symlink_to(folder)
    assert len(index(folder).examples) == 1


@pytest.mark.parametrize(
    "name", ["../secret.png", "../secret", "{parent}/secret.png", "x/../../secret.png", "/etc/passwd"]
)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_metadata_that_lead_out_of_the_folder(folder: Path, name: str, form: str) -> None:
    """A file of captions cannot point to images outside of image_dir, whether they exist or not."""
    name = name.format(parent=folder.parent)
    entry = {name: {"caption": "secret"}} if form == "json" else {"image_path": name, "caption": "secret"}
    (folder / f"meta.{form}").write_text(json.dumps(entry))
    with pytest.raises(DataError, match=r"is outside image_dir \(give an image_dir that holds all images"):
        index(folder, metadata_file=folder / f"meta.{form}")


@pytest.mark.parametrize("name", ["a.png", "a", "./a.png", "x/../a.png", "{folder}/a.png"])
def test_metadata_that_stay_in_the_folder(folder: Path, name: str) -> None:
    """However a path inside of image_dir is written, its image is found."""
    (folder / "meta.json").write_text(json.dumps({name.format(folder=folder): {"caption": "red"}}))
    (example,) = index(folder, metadata_file=folder / "meta.json").examples
    assert example.image.samefile(folder / "a.png")


def test_endless_captions(folder: Path) -> None:
    """A caption file longer than any caption is named instead of read."""
    os.truncate(folder / "a.txt", LONGEST + 1)
    with pytest.raises(DataError, match=r"a\.txt: is longer than any caption: 1048577 bytes"):
        index(folder)


def test_endless_metadata(folder: Path) -> None:
    """So is a file of captions, which takes no place on this disk but would in memory."""
    (folder / "meta.json").touch()
    os.truncate(folder / "meta.json", 1 << 40)
    with pytest.raises(DataError, match=r"meta\.json: .*more than 268435456 bytes"):
        index(folder, metadata_file=folder / "meta.json")


RECORDS: list[Any] = [
    "stamp", {"stamp": 3, "image": 5}, {"image": [64, 64]}, {"image": [0, 0, False, 1, 1]},
    {"image": [-1, 9, False, 1, 1]}, {"image": ["a", "b", False, 1, 1]}, {"image": [1e400, 3, False, 1, 1]},
    {"image": [64, 64, 7, 1, 1]}, {"image": [64, 64, False, "a", 1]}, {"image": {}}, {"digest": {}},
    {"every line": []}, [], None,
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_memo_that_lies(folder: Path, tmp_path: Path, record: Any) -> None:
    """Whatever a stranger's memo says of an image, its size is a size."""
    path, status = folder / "a.png", (folder / "a.png").stat()
    if isinstance(record, dict) and "stamp" not in record:
        record = {"stamp": [status.st_size, status.st_mtime_ns], **record}
    (tmp_path / "files.json").write_text(json.dumps({"format": 1, "files": {str(path): record}}))
    memo = FileStatCache(tmp_path / "files.json")
    assert memo.image(path).size == inspect_image(path).size
    assert isinstance(memo.digest(path), str)


def test_a_memo_of_brackets(tmp_path: Path) -> None:
    """A memo that is nothing but brackets counts as empty."""
    (tmp_path / "files.json").write_text("[" * 1_000_000)
    assert not Cache(tmp_path).has("0" * 40)


@pytest.mark.parametrize("make", [pipe, device, loop])
def test_a_cache_of_pipes(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """What is no file in a cache counts as absent, the memo too."""
    make(tmp_path / "files.json")
    (tmp_path / "00").mkdir()
    make(tmp_path / "00" / f"{'0' * 40}.safetensors")
    cache = Cache(tmp_path)
    assert not cache.has("0" * 40)
    with pytest.raises(DataError, match="was removed or damaged"):
        cache.load("0" * 40)


def test_images_that_lie_about_their_size(folder: Path) -> None:
    """A file of 70 bytes that claims billions of pixels is refused before memory is asked for."""
    content = bytearray((folder / "a.png").read_bytes())
    for side, reason in ((60_000, "3600 megapixels; at most 179 are read"), (0, "")):
        content[16:24] = side.to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        (folder / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.png: .*{reason}"):
            index(folder)
