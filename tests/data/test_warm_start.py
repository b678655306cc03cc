"""A second start: it reads no file that it knows, and what changed on the disk is to it as if it were the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from lorakit.config.datasets import DatasetConfig
from lorakit.data.cache.encode import CaptionKeys, EncodeOptions, LatentKeys, encode_captions, encode_latents
from lorakit.data.cache.store import Cache
from lorakit.data.index import IndexedDataset, index_datasets
from tests.data.tiny import TinyModel

Known = tuple[tuple[IndexedDataset, ...], LatentKeys, CaptionKeys]


def start(dataset: DatasetConfig, cache_folder: Path, model: TinyModel | None = None) -> Known:
    """All that a run knows of its data when its first step begins."""
    cache, model, encoding = Cache(cache_folder), model or TinyModel(), EncodeOptions(device=torch.device("cpu"))
    datasets = index_datasets([dataset], memo=cache.memo)
    known = (
        datasets,
        encode_latents(datasets, model, cache, encoding),
        encode_captions(datasets, model, cache, encoding),
    )
    cache.memo.save()
    return known


def replace(path: Path, content: bytes, later: int) -> None:
    """Give a file this content, and the time of change that it had or one so many nanoseconds later."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))


def drawn(path: Path, colour: str, size: tuple[int, int] = (96, 64)) -> None:
    """Write an image of one colour; the length of a BMP file depends on its size alone."""
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def with_bitmap(folder: Path) -> Path:
    """A bitmap, of a folder with other images and their captions."""
    drawn(folder / "bitmap.bmp", "red")
    (folder / "bitmap.txt").write_text("a red bitmap")
    return folder / "bitmap.bmp"


def test_files_that_are_known_are_not_read(dataset: DatasetConfig, folder: Path, tmp_path: Path) -> None:
    """A second start gives what the first gave although all files are garbage of the same length and time now."""
    first, model = start(dataset, tmp_path / "cache"), TinyModel()
    files = [*folder.iterdir(), *(tmp_path / "cache").glob("*/*.safetensors")]
    assert len(files) == 4 * 5
    for file in files:
        replace(file, b"\xff" * file.stat().st_size, later=0)
    assert start(dataset, tmp_path / "cache", model) == first
    assert model.touched == set()


def _changes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Things that happen to a bitmap, or beside it, between two runs."""
    caption = ".txt"
    yield "nothing but its time", lambda own: replace(own, own.read_bytes(), later=1)
    yield "other pixels", lambda own: drawn(own, "blue")
    yield "other pixels, same length", lambda own: replace(own, own.read_bytes()[:-9] + b"\7" * 9, later=1)
    yield "another size", lambda own: drawn(own, "red", (64, 96))
    yield "removed", lambda own: (own.unlink(), own.with_suffix(caption).unlink())
    yield "another beside it", lambda own: drawn(own.with_name("another.bmp"), "green")
    yield "renamed", lambda own: own.rename(own.with_name("another.bmp"))
    yield "longer caption", lambda own: own.with_suffix(caption).write_text("a bitmap that is red")
    yield "caption of the same length", lambda own: replace(own.with_suffix(caption), b"a hot bitmap", later=1)
    yield "caption removed", lambda own: own.with_suffix(caption).unlink()
    yield "caption emptied", lambda own: own.with_suffix(caption).write_text("")
    yield "other kind of caption", lambda own: own.with_suffix(caption).rename(own.with_suffix(".caption"))


@pytest.mark.parametrize(("kind", "change"), _changes(), ids=[kind for kind, _ in _changes()])
def test_changes_are_seen(
    dataset: DatasetConfig, with_bitmap: Path, tmp_path: Path, kind: str, change: Callable[[Path], object]
) -> None:
    """After any change, a start that knows what was before gives what a start that knows nothing gives."""
    before = start(dataset, tmp_path / "cache")
    change(with_bitmap)
    now = start(dataset, tmp_path / "cache")
    assert now == start(dataset, tmp_path / "another cache")
    assert (now == before) is (kind in ("nothing but its time", "other kind of caption"))


def test_other_lines_of_known_captions(with_subset: Callable[..., DatasetConfig], folder: Path, tmp_path: Path) -> None:
    """That the first line of a caption is known is not taken for all of it, nor the other way round."""
    (folder / "coffee.txt").write_text("a cup\nof coffee")
    for first, second in ((True, False), (False, True)):
        start(with_subset(enable_wildcard=first), tmp_path / f"cache {first}")
        known, unknown = (
            start(with_subset(enable_wildcard=second), tmp_path / name) for name in (f"cache {first}", f"new {first}")
        )
        assert known == unknown
        assert ("a cup\nof coffee" in [own.caption for own in known[0][0].examples]) is second


def test_lost_entries_are_made_again(dataset: DatasetConfig, folder: Path, tmp_path: Path) -> None:
    """Of the entries that a second start finds removed, cut or emptied, each is made anew, and no other."""
    known = start(dataset, tmp_path / "cache")
    removed, cut, emptied, *_ = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    content = {path: path.read_bytes() for path in (removed, cut, emptied)}
    removed.unlink()
    cut.write_bytes(content[cut][:-1])
    emptied.write_bytes(b"")
    model = TinyModel()
    assert start(dataset, tmp_path / "cache", model) == known
    assert {path: path.read_bytes() for path in content} == content
    assert len(model._vae_encoder.batch_sizes) + sum(model._text_encoder.batch_sizes) == 3
