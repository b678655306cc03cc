"""The review: what may not be meant with images and captions that can be used, each thing once, with names and cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from PIL import Image

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache
from lorakit.data.index import index_datasets
from lorakit.data.review import longest_by_image, review
from lorakit.utils.wording import shown_path

WithSubset = Callable[..., DatasetConfig]


def said(*datasets: DatasetConfig) -> list[str]:
    """The warnings as they are printed."""
    return [str(warning) for warning in review(index_datasets(datasets))]


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int | None = None) -> Path:
    """An image that no other is equal to."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_nothing_is_said_of_a_good_folder(folder: Path, dataset: DatasetConfig, with_subset: WithSubset):
    """Captions, caches, notes, databases and what systems leave in folders are not worth a word."""
    for name in ("Thumbs.db", "desktop.ini", "a_sd.npz", "chelsea_0064x0096_sd.npz", "chelsea.json", "notes.txt"):
        (folder / name).write_text("x")
    for name in (".DS_Store", "._chelsea.png", ".hidden.heic", "checkpoint.safetensors", "README.md", "LICENSE"):
        (folder / name).write_text("x")
    (folder / "inner").mkdir()
    assert said(dataset) == said(with_subset(class_tokens="cat")) == []
    for file in folder.glob("*.txt"):
        file.unlink()
    assert said(with_subset(class_tokens="cat")) == []


def test_unread_files(folder: Path, dataset: DatasetConfig):
    """Few are named; of many the number of each kind is told, and the first names."""
    for name in ("e.HEIC", "f.jxl"):
        (folder / name).write_text("x")
    assert said(dataset) == [
        f"2 files in {shown_path(folder)} are not read: e.HEIC, f.jxl (convert images to JPEG or PNG)"
    ]
    for name in ("g.heic", "h.mp4", "i.psd", "j.NEF", "k.svg"):
        (folder / name).write_text("x")
    kinds = "2 .heic, 1 .jxl, 1 .mp4, 1 .psd, 1 .nef, 1 .svg"
    assert said(dataset) == [
        f"7 files in {shown_path(folder)} are not read, {kinds}: e.HEIC, f.jxl, g.heic, … "
        "(convert images to JPEG or PNG)"
    ]


def test_missing_captions(folder: Path, dataset: DatasetConfig, with_subset: WithSubset):
    """They are counted and named, with what the images train on instead; behind class tokens if others are there."""
    for name in ("coffee.txt", "rocket.txt"):
        (folder / name).unlink()
    names = f"2 of 5 images in {shown_path(folder)} have no caption and train on"
    cure = 'write coffee.txt …, or set class_tokens = "photo of my_dog"'
    assert said(dataset) == [f"{names} an empty one: coffee.png, rocket.png ({cure})"]
    assert said(with_subset(class_tokens="")) == said(dataset)
    assert said(with_subset(class_tokens="cup")) == [
        f'{names} class_tokens, "cup": coffee.png, rocket.png (write coffee.txt …)'
    ]
    (folder / "coffee.txt").write_text("a cup")
    assert said(dataset)[0].startswith(f"1 of 5 images in {shown_path(folder)} has no caption and trains on")


@pytest.mark.parametrize("class_tokens", [None, "cat"])
@pytest.mark.parametrize(
    ("wanted", "found", "cure"),
    [
        ("caption", ".txt", '= "caption" does not find them, but there are 5 .txt files: set it to ".txt", or leave'),
        (".tags", ".caption", 'but there are 5 .caption files: set it to ".caption", or leave it out'),
        (None, ".tags", '(there are 5 .tags files: set caption_extension = ".tags")'),
        (None, ".TAGS", '(there are 5 .tags files: set caption_extension = ".tags")'),
        (None, ".png.txt", '(there are 5 .png.txt files: set caption_extension = ".png.txt")'),
    ],
)  # fmt: skip
def test_captions_of_another_extension(
    folder: Path, with_subset: WithSubset, class_tokens: str | None, wanted: str | None, found: str, cure: str
):
    """Captions under names that are not looked for are noticed, also behind class tokens; the cure finds them."""
    for file in folder.glob("*.txt"):
        file.rename(file.with_suffix(found))
    (warning,) = said(with_subset(caption_extension=wanted, class_tokens=class_tokens))
    assert warning.startswith(f"5 of 5 images in {shown_path(folder)} have no caption and train on")
    assert cure in warning
    assert said(with_subset(caption_extension=found.lower())) == []


def test_captions_in_the_hubs_files(folder: Path, with_subset: WithSubset):
    """A metadata file beside images without captions is named with its key, which reads it."""
    for file in folder.glob("*.txt"):
        file.unlink()
    lines = [json.dumps({"file_name": path.name, "text": "a photo"}) for path in folder.iterdir()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for tokens in (None, "cat"):
        (warning,) = said(with_subset(class_tokens=tokens))
        assert f'(to read metadata.jsonl, set metadata_file = "{folder}/metadata.jsonl")' in warning
    assert said(with_subset(metadata_file=folder / "metadata.jsonl")) == []
    (folder / "metadata.jsonl").write_text(lines[0].replace("text", "label"))
    assert said(with_subset(metadata_file=folder / "metadata.jsonl"))[0].endswith(
        "(its keys caption, text, prompt and tags are read)"
    )


def test_captions_that_are_used_in_part(folder: Path, with_subset: WithSubset):
    """Empty captions and further lines are told, the latter not where lines are used."""
    (folder / "coffee.txt").write_text(" \n")
    (folder / "rocket.txt").write_text("a rocket\n\na sky\n")
    cure = "write one line, or set enable_wildcard = true to use one of them at random"
    empty = f"1 caption in {shown_path(folder)} is empty: coffee.txt"
    assert said(with_subset()) == [
        f"{empty} (write captions)",
        f"1 caption in {shown_path(folder)} has several lines, of which the first is used: rocket.txt ({cure})",
    ]
    assert said(with_subset(enable_wildcard=True, class_tokens="cat")) == [
        f"{empty} (write captions, or remove the files to train with class_tokens)"
    ]


def test_images_that_share_a_caption(folder: Path, with_subset: WithSubset):
    """Images whose names differ in their extensions only are named."""
    picture(folder / "coffee.jpg")
    assert said(with_subset()) == [
        f"2 images in {shown_path(folder)} share a caption with another of the same name: coffee.jpg, coffee.png"
        " (rename one with its own caption)"
    ]


def test_animations(folder: Path, with_subset: WithSubset):
    """That only the first frame of an animation is used is told."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:])
    assert said(with_subset(class_tokens="a"))[1:] == [
        f"1 image in {shown_path(folder)} has several frames or pages, of which the first is used: a.webp"
    ]


def test_small_and_long_images(folder: Path, dataset: DatasetConfig, with_subset: WithSubset):
    """Images that are enlarged more than twice or cropped to less than half are counted, and the worst is named."""
    for name, size in {"tiny": (20, 20), "small": (40, 40), "long": (1000, 60), "longer": (1000, 50)}.items():
        picture(folder / f"{name}.png", size)
        (folder / f"{name}.txt").write_text("x")
    enlarged, cropped = said(dataset)
    assert enlarged == (
        f"2 of 9 images in {shown_path(folder)} are enlarged more than twice: tiny.png, of 20x20 pixels, 4.8 times, …"
        " (use larger ones, or lower resolution)"
    )
    assert cropped.startswith(
        f"2 of 9 images in {shown_path(folder)} are cropped to less than half: longer.png, of 1000x50"
    )
    assert cropped.endswith("%, … (crop them yourself)")
    assert said(with_subset(random_crop=True)) == [enlarged]
    square = evolve(dataset, enable_bucket=False, resolution=(64, 64))
    assert said(square)[-1].endswith("(set enable_bucket = true, or crop them yourself)")


def test_equal_images(folder: Path, dataset: DatasetConfig):
    """Files of the same bytes are named together; the same length or the same middle is not enough."""
    shutil.copy(folder / "coffee.png", folder / "cup.png")
    shutil.copy(folder / "coffee.txt", folder / "cup.txt")
    for name, colours in {"a": ("red", "blue"), "b": ("blue", "red")}.items():
        image = Image.new("RGB", (128, 128), "green")
        image.putpixel((0, 0), Image.new("RGB", (1, 1), colours[0]).getpixel((0, 0)))
        image.save(folder / f"{name}.bmp")
        (folder / f"{name}.txt").write_text("x")
    cure = "keep one; num_repeats repeats images"
    assert said(dataset) == [f"1 image in {shown_path(folder)} is the same as another: coffee.png = cup.png ({cure})"]
    other = evolve(dataset, resolution=(128, 128))
    assert said(dataset, other) == said(dataset)


def test_known_images_are_not_read_again(folder: Path, dataset: DatasetConfig, tmp_path: Path):
    """A second review knows from the memo which files are equal."""
    shutil.copy(folder / "coffee.png", folder / "cup.png")
    memo = FileStatCache(tmp_path / "files.json")
    first = review(index_datasets([dataset], memo=memo), memo)
    memo.save()
    records = json.loads((tmp_path / "files.json").read_text())["files"]
    assert sorted(Path(path).name for path, record in records.items() if "digest" in record) == [
        "coffee.png",
        "cup.png",
    ]
    again = FileStatCache(tmp_path / "files.json")
    assert review(index_datasets([dataset], memo=again), again) == first


def test_a_folder_in_two_subsets(folder: Path, dataset: DatasetConfig):
    """That is told of one dataset, not of several, which may have other resolutions."""
    twice = evolve(dataset, subsets=dataset.subsets * 2)
    (warning,) = said(twice)
    assert warning.startswith(f"{shown_path(folder)} is in 2 subsets of one dataset")
    assert said(dataset, evolve(dataset, resolution=(128, 128))) == []
    off = SubsetConfig(image_dir=folder, num_repeats=0)
    assert said(evolve(dataset, subsets=(*dataset.subsets, off))) == []


def test_captions_at_their_longest(folder: Path, with_subset: WithSubset):
    """A caption is as long as it can be: with all tags, prefix and suffix, its longest line and longest wildcards."""
    (folder / "coffee.txt").write_text("a cup\na {small|very large} cup, {{red}}\n")
    settings = {"enable_wildcard": True, "shuffle_caption": True, "caption_tag_dropout_rate": 0.9}
    index = index_datasets([with_subset(caption_prefix="photo", token_warmup_step=5, **settings)])
    assert longest_by_image(index)[shown_path(folder / "coffee.png")] == "photo a very large cup, {red}"
