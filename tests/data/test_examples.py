"""Indexing: which files become examples, in which order, and how all bad ones are told at once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve
from PIL import Image

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache
from lorakit.data.index import has_dynamic_captions, index_datasets
from lorakit.errors import DataError

WithSubset = Callable[..., DatasetConfig]


def test_examples_of_a_folder(dataset: DatasetConfig):
    """Every image is an example, sorted by name, with its caption, bucket and a name without its folder."""
    (indexed,) = index_datasets([dataset])
    assert [example.image.stem for example in indexed.examples] == [
        "astronaut",
        "chelsea",
        "coffee",
        "motorcycle",
        "rocket",
    ]
    assert [example.placement.bucket for example in indexed.examples] == [(96, 96), *[(112, 80)] * 3, (80, 112)]
    first = indexed.examples[0]
    assert first.caption == "photo, astronaut, sharp"
    assert first.sample_id == "0/0/astronaut.png"
    assert first.subset is dataset.subsets[0]


def test_identity_does_not_depend_on_where_the_folder_is(dataset: DatasetConfig, folder: Path, with_subset: WithSubset):
    """A copy of the folder elsewhere has the same identities; another subset or dataset has its own."""
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder, elsewhere)
    moved = with_subset(image_dir=elsewhere)

    def identities(*datasets: DatasetConfig) -> list[str]:
        return [example.sample_id for indexed in index_datasets(datasets) for example in indexed.examples]

    assert identities(moved) == identities(dataset)
    twice = evolve(dataset, subsets=dataset.subsets * 2)
    assert len(set(identities(twice, moved))) == 15


def test_result_does_not_depend_on_the_number_of_threads(dataset: DatasetConfig):
    """One thread and many find the same."""
    assert index_datasets([dataset, dataset], workers=1) == index_datasets([dataset, dataset], workers=7)


def test_only_images_are_taken(folder: Path, dataset: DatasetConfig):
    """Extensions count in any case; other files, hidden files and folders do not; links are followed."""
    (folder / "notes.md").write_text("no image")
    (folder / "._chelsea.png").write_bytes(b"what macOS leaves on foreign disks")
    (folder / "inner.png").mkdir()
    shutil.copy(folder / "coffee.png", folder / "upper.PnG")
    (folder / "linked.png").symlink_to(folder / "rocket.png")
    names = {example.image.name for example in index_datasets([dataset])[0].examples}
    assert names == {f"{name}.png" for name in ("astronaut", "chelsea", "coffee", "linked", "motorcycle", "rocket")} | {
        "upper.PnG"
    }


def test_images_of_one_stem_share_a_caption(folder: Path, dataset: DatasetConfig):
    """Two images that differ in their extension only are two examples with the same caption."""
    with Image.open(folder / "chelsea.png") as image:
        image.rotate(180).save(folder / "chelsea.jpg")
    pair = [example for example in index_datasets([dataset])[0].examples if example.image.stem == "chelsea"]
    assert [example.caption for example in pair] == ["photo, chelsea, sharp"] * 2
    assert len({example.sample_id for example in pair}) == 2


def test_name_that_is_no_text(folder: Path, with_subset: WithSubset):
    """A file name with bytes that are no UTF-8 still has an identity that can be a key."""
    shutil.copy(folder / "coffee.png", os.fsencode(folder) + b"/A\xff.png")
    examples = index_datasets([with_subset()])[0].examples
    assert examples[0].sample_id.encode() == rb"0/0/A\udcff.png"


def test_missing_captions(folder: Path, dataset: DatasetConfig, with_subset: WithSubset):
    """Class tokens stand in for a missing caption file, not for an empty one; without them the caption is empty."""
    for name in ("coffee.txt", "rocket.txt"):
        (folder / name).unlink()
    (folder / "astronaut.txt").write_text("")
    examples = index_datasets([with_subset(class_tokens="a thing")])[0].examples
    assert [example.caption for example in examples if example.image.stem in ("coffee", "rocket")] == ["a thing"] * 2
    assert examples[0].caption == ""
    assert [example.caption for example in index_datasets([dataset])[0].examples].count("") == 3


def test_all_bad_files_are_told_at_once(folder: Path, dataset: DatasetConfig, with_subset: WithSubset):
    """One error names every folder and file that cannot be used, each with its cause and cure."""
    (folder / "coffee.png").write_bytes(b"")
    (folder / "rocket.txt").write_bytes(b"\xff\xff")
    empty = folder.parent / "empty"
    empty.mkdir()
    datasets = [dataset, with_subset(image_dir=empty), with_subset(image_dir=folder / "nowhere")]
    with pytest.raises(DataError) as caught:
        index_datasets(datasets)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems with the data:"
    assert sorted(lines[1:]) == sorted(
        [
            f"  {empty}: contains no images"
            " (PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF files in it are read, not those in folders inside it)",
            f"  {folder / 'nowhere'}: cannot be listed: No such file or directory (check its path and permissions)",
            f"  {folder / 'coffee.png'}: is empty (restore or remove it)",
            f"  {folder / 'rocket.txt'}: is not UTF-8 text from byte 0 on (save it as UTF-8)",
        ]
    )


def test_long_lists_of_problems_are_cut(folder: Path, dataset: DatasetConfig):
    """Of 25 bad files 20 are listed and the rest is counted."""
    for number in range(25):
        (folder / f"{number:02}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        index_datasets([dataset])
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 problems with the data:"
    assert len(lines) == 22
    assert lines[-1] == "  … and 5 more"


def test_image_too_small_for_a_bucket_is_named(folder: Path, dataset: DatasetConfig):
    """With bucket_no_upscale, a tiny image is an error that names it."""
    Image.new("RGB", (15, 40)).save(folder / "tiny.png")
    with pytest.raises(DataError, match=r"tiny\.png: 15x40 pixels leave no bucket"):
        index_datasets([evolve(dataset, bucket_no_upscale=True)])


def test_image_dir_that_is_a_file(folder: Path, with_subset: WithSubset):
    """A file in the place of the folder is an error that names it."""
    with pytest.raises(DataError, match=r"coffee\.png: cannot be listed: Not a directory"):
        index_datasets([with_subset(image_dir=folder / "coffee.png")])


def test_warm_start_opens_no_image(dataset: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a memo of an earlier run, indexing opens no image; of a changed image it does."""
    memo_file = tmp_path / "files.json"
    memo = FileStatCache(memo_file)
    cold = index_datasets([dataset], memo=memo)
    memo.save()
    opened: list[Path] = []
    really_open = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: (opened.append(path), really_open(path, **options))[1])
    assert index_datasets([dataset], memo=FileStatCache(memo_file)) == cold
    assert opened == []
    changed = cold[0].examples[2].image
    Image.new("RGB", (64, 128)).save(changed)
    warm = index_datasets([dataset], memo=FileStatCache(memo_file))
    assert opened == [changed]
    assert warm[0].examples[2].placement.bucket == (64, 128)


@pytest.mark.parametrize(
    ("settings", "vary"),
    [
        ({}, False),
        ({"shuffle_caption": True}, True),
        ({"shuffle_caption": True, "keep_tokens": 1}, True),
        ({"shuffle_caption": True, "keep_tokens": 2}, False),
        ({"shuffle_caption": True, "caption_separator": ";"}, False),
        ({"caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2}, False),
        ({"caption_tag_dropout_rate": 0.5}, True),
        ({"caption_suffix": ", {red|blue}"}, False),
        ({"caption_suffix": ", {red|blue}", "enable_wildcard": True}, True),
        ({"token_warmup_step": 0.5}, True),
    ],
)
def test_captions_vary(with_subset: WithSubset, settings: dict[str, object], vary: bool):
    """Captions vary only where tags or wildcards take more forms than can be listed."""
    assert has_dynamic_captions(index_datasets([with_subset(**settings)])) is vary


def test_index_and_plan_import_no_torch():
    """Checking a dataset and planning an epoch need no torch."""
    code = "import sys, lorakit.data.batch_sampler, lorakit.data.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unused_subset_config_is_kept_apart(dataset: DatasetConfig, folder: Path):
    """Each example knows the subset that it came from."""
    other = SubsetConfig(image_dir=folder, num_repeats=3)
    (indexed,) = index_datasets([evolve(dataset, subsets=(*dataset.subsets, other))])
    assert [example.subset.num_repeats for example in indexed.examples] == [1] * 5 + [3] * 5


def test_broken_link_is_told(folder: Path, dataset: DatasetConfig):
    """A link to an image that is gone is an error that names it, not an image left out in silence."""
    (folder / "linked.png").symlink_to(folder / "gone.png")
    with pytest.raises(DataError, match=r"linked\.png: cannot be read: No such file"):
        index_datasets([dataset])


def test_wildcards_need_every_line(folder: Path, with_subset: WithSubset):
    """A caption file's further lines are read with enable_wildcard, and only then."""
    (folder / "astronaut.txt").write_text("one\ntwo\n")
    for enabled, caption in ((True, "one\ntwo"), (False, "one")):
        (indexed,) = index_datasets([with_subset(enable_wildcard=enabled)])
        assert indexed.examples[0].caption == caption


@pytest.mark.parametrize(
    ("repeats", "reg_repeats", "expected"),
    [(1, 1, [1] * 5), (1, 2, [2, 2, 2]), (3, 1, [3] * 5), (2, 1, [2] * 5), (1, 9, [9])],
)
def test_regularisation_images_are_as_many_as_others(
    dataset: DatasetConfig, folder: Path, repeats: int, reg_repeats: int, expected: list[int]
):
    """Those that are not needed are no examples, and where they are too few they appear more often."""
    regularising = SubsetConfig(image_dir=folder, num_repeats=reg_repeats, is_reg=True)
    training, flags = SubsetConfig(image_dir=folder, num_repeats=repeats), (False, True)
    for subsets in ((training, regularising), (regularising, training)):
        (indexed,) = index_datasets([evolve(dataset, subsets=subsets)])
        found = {is_reg: [own.repeats for own in indexed.examples if own.subset.is_reg is is_reg] for is_reg in flags}
        assert found == {False: [repeats] * 5, True: expected}


def test_unused_regularisation_images_are_told(dataset: DatasetConfig, folder: Path, caplog: pytest.LogCaptureFixture):
    """That images of the user have no part in the training is said."""
    regularising = SubsetConfig(image_dir=folder, num_repeats=2, is_reg=True)
    with caplog.at_level(logging.INFO):
        index_datasets([evolve(dataset, subsets=(*dataset.subsets, regularising))])
    assert "using 3 of 5 regularisation images" in caplog.text


FOUND = [
    (["20_fluffy dog"], """contains no images; 1 is in "FOLDER/20_fluffy dog" (as kohya_ss has it: """
     """image_dir = "FOLDER/20_fluffy dog", num_repeats = 20, class_tokens = "fluffy dog")"""),
    (["img/3_cat"], """1 is in "FOLDER/img/3_cat" (as kohya_ss has it: image_dir = "FOLDER/img/3_cat", """
     """num_repeats = 3, class_tokens = "cat")"""),
    (["7"], """(as kohya_ss has it: image_dir = "FOLDER/7", num_repeats = 7)"""),
    (["photos"], """1 is in "FOLDER/photos" (image_dir = "FOLDER/photos")"""),
    (["a", "b/c", "d", "e"], """1 is in "FOLDER/a", 1 is in "FOLDER/d", 1 is in "FOLDER/e", … """
     """(each in a [[data.datasets.subsets]]; image_dir = "FOLDER/a")"""),
    ([".hidden", "a/b/c/d"], "contains no images (PNG, JPEG,"),
]  # fmt: skip


@pytest.mark.parametrize(("inner", "message"), FOUND)
def test_images_in_folders_inside(tmp_path: Path, with_subset: WithSubset, inner: list[str], message: str):
    """Where a folder has no images but folders inside it do, the error says what to write in the config."""
    for name in inner:
        (tmp_path / "above" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "above" / name / "a.png")
    with pytest.raises(DataError) as caught:
        index_datasets([with_subset(image_dir=tmp_path / "above")])
    assert message.replace("FOLDER", str(tmp_path / "above")) in str(caught.value)


def test_folders_of_unread_formats(tmp_path: Path, with_subset: WithSubset):
    """A folder of photographs from a telephone is refused with their number and the cure; so is the Hub's layout."""
    phone = tmp_path / "phone"
    phone.mkdir()
    for name in ("a.HEIC", "b.heic", "c.MOV", "c.txt"):
        (phone / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"but 2 \.heic, 1 \.mov: a\.HEIC, b\.heic, c\.MOV \(convert them to JPEG"):
        index_datasets([with_subset(image_dir=phone)])
    (phone / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=rf'set metadata_file = "{phone}/metadata.jsonl"'):
        index_datasets([with_subset(image_dir=phone)])


def test_subsets_that_are_switched_off(dataset: DatasetConfig, folder: Path):
    """Without repeats a subset has no examples though its folder is gone, and the others keep their identities."""
    off, on = SubsetConfig(image_dir=folder / "gone", num_repeats=0), dataset.subsets[0]
    (indexed,) = index_datasets([evolve(dataset, subsets=(off, on))])
    assert [example.sample_id.split("/")[1] for example in indexed.examples] == ["1"] * 5
    none, some = index_datasets([evolve(dataset, subsets=(off,)), dataset])
    assert (len(none.examples), len(some.examples)) == (0, 5)
