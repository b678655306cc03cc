"""The validation split: which images are held out, and that none of them is trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import pytest
from PIL import Image

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.config.table_reader import field_names
from lorakit.data.captions import caption_variants
from lorakit.data.index import Example, index_datasets
from lorakit.data.review import review
from lorakit.errors import DataError

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A function that makes a folder with so many small images."""

    def make(count: int, name: str = "many") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            Image.new("L", (8, 8), number).save(folder / f"{number:03d}.png")
        return folder

    return make


def config_of(*subsets: SubsetConfig | Path, share: float = 0.2, **settings: object) -> DatasetConfig:
    """A dataset of these subsets, some of whose images are held out."""
    made = tuple(SubsetConfig(image_dir=own) if isinstance(own, Path) else own for own in subsets)
    return DatasetConfig(subsets=made, resolution=(64, 64), validation_split=share, **settings)


def names(examples: Sequence[Example]) -> set[str]:
    """The names of their files."""
    return {example.image.name for example in examples}


def held_out(*datasets: DatasetConfig, seed: int = 1) -> set[str]:
    """The names of the files that are held out."""
    return names([example for indexed in index_datasets(datasets, seed=seed) for example in indexed.held_out])


@pytest.mark.parametrize("count", [1, 2, 5, 10, 23])
@pytest.mark.parametrize("share", [0.0, 0.04, 0.1, 0.25, 0.5, 0.99])
def test_every_image_is_trained_on_or_held_out(make_folder: MakeFolder, count: int, share: float) -> None:
    """The round(n · share) images that are held out and the others are all images, and one at least is trained on."""
    (indexed,) = index_datasets([config_of(make_folder(count), share=share)])
    training, validation = names(indexed.examples), names(indexed.held_out)
    assert not training & validation
    assert len(training) + len(indexed.held_out) == count
    assert len(validation) == min(round(count * share), count - 1)
    if 0 < len(validation) < count - 1:
        assert len(training) in (ceil(count * (1 - share)), count - round(count * share))


def test_the_seeds_and_names_alone_decide(make_folder: MakeFolder, tmp_path: Path) -> None:
    """A copy of the folder elsewhere, among others, is split alike; with another seed of split or run, otherwise."""
    folder = make_folder(40)
    chosen = held_out(config_of(folder))
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    assert held_out(config_of(copied)) == chosen
    (first, second) = index_datasets(
        [config_of(make_folder(3, "more")), config_of(make_folder(2, "few"), copied)], seed=1
    )
    assert names(second.held_out) == chosen
    assert len(first.held_out) == 1
    assert held_out(config_of(folder), seed=2) != chosen
    own = config_of(folder, validation_seed=1)
    assert held_out(own, seed=1) == held_out(own, seed=2) == chosen != held_out(config_of(folder, validation_seed=3))


def test_new_images_move_few(make_folder: MakeFolder) -> None:
    """When an image is added, at most one other image changes sides."""
    folder = make_folder(40)
    for number in range(40, 60):
        before = held_out(config_of(folder))
        Image.new("L", (8, 8), number).save(folder / f"{number:03d}.png")
        after = held_out(config_of(folder))
        assert len((before ^ after) - {f"{number:03d}.png"}) <= 1


def test_regularisation_images_follow_what_is_trained_on(make_folder: MakeFolder) -> None:
    """They are not split, and are as many as the images that are left."""
    folder, class_images = make_folder(10), make_folder(12, "class")
    regularising = SubsetConfig(image_dir=class_images, is_reg=True)
    (indexed,) = index_datasets([config_of(SubsetConfig(image_dir=folder, num_repeats=2), regularising, share=0.5)])
    assert [example.repeats for example in indexed.held_out] == [1] * 5
    assert not any(example.subset.is_reg for example in indexed.held_out)
    assert sum(example.repeats for example in indexed.examples if example.subset.is_reg) == 10


def test_an_image_in_several_subsets_is_held_out_of_all(make_folder: MakeFolder) -> None:
    """It is validated in each of them but regularisation subsets, and trained on in none, whatever their shares."""
    folder = make_folder(10)
    unsplit = config_of(folder, SubsetConfig(image_dir=folder, is_reg=True), share=0.0)
    split, other = index_datasets([config_of(folder, share=0.3), unsplit])
    assert names(split.held_out) == names(other.held_out)
    assert len(split.held_out) == len(other.held_out) == 3
    assert not names(split.held_out) & names([*split.examples, *other.examples])
    twice = index_datasets([config_of(folder, share=0.3), config_of(folder, share=0.3)])
    assert names(twice[0].held_out) == names(twice[1].held_out)


def test_a_dataset_keeps_something_to_train_on(make_folder: MakeFolder, tmp_path: Path) -> None:
    """A dataset whose only images are held out by another is refused by its folder."""
    folder, linked = make_folder(4), tmp_path / "linked"
    linked.mkdir()
    for name in held_out(config_of(folder, share=0.5)):
        (linked / name).symlink_to(folder / name)
    with pytest.raises(DataError, match="linked: all images are held out for validation"):
        index_datasets([config_of(folder, share=0.5), config_of(linked, share=0.0)], seed=1)


def test_a_share_of_no_image_is_told(make_folder: MakeFolder) -> None:
    """Where the share of every subset rounds to none, a warning says so and everything is trained on."""
    (indexed,) = index_datasets([config_of(make_folder(4), share=0.1)])
    (warning,) = (warning for warning in review([indexed]) if "validation_split" in warning.key)
    assert warning.message.startswith("of 0.1 holds out none of 4 images")
    assert (len(indexed.examples), indexed.held_out) == (4, ())


def test_what_is_held_out_stays_the_same(make_folder: MakeFolder) -> None:
    """Its caption takes one form, it is never mirrored, and it counts once."""
    folder = make_folder(2)
    for image in list(folder.iterdir()):
        image.with_suffix(".txt").write_text("one, two, three")
    varied = SubsetConfig(
        image_dir=folder, num_repeats=7, shuffle_caption=True, caption_dropout_rate=0.5, flip_aug=True,
        caption_dropout_every_n_epochs=2, caption_tag_dropout_rate=0.5, token_warmup_step=9, caption_prefix="a",
    )  # fmt: skip
    (indexed,) = index_datasets([config_of(varied, share=0.5)])
    (example,) = indexed.held_out
    assert caption_variants(example.caption, example.subset) == ("a one, two, three",)
    assert (example.repeats, example.subset.flip_aug, example.subset.num_repeats) == (1, False, 1)
    assert indexed.examples[0].subset == varied


def test_every_option_that_varies_images_is_known() -> None:
    """Whatever a subset says is either left out of validation or the same in each epoch; a new option is neither."""
    still = {
        "image_dir", "metadata_file", "caption_extension", "class_tokens", "caption_separator", "keep_tokens",
        "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix",
        "token_warmup_min", "is_reg", "resize_interpolation", "alpha_mask", "conditioning_data_dir", "source",
    }  # fmt: skip
    varying = {
        "num_repeats", "shuffle_caption", "caption_dropout_rate", "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate", "token_warmup_step", "flip_aug",
        "color_aug", "random_crop", "face_crop_aug_range",
    }  # fmt: skip
    assert still | varying == set(field_names(SubsetConfig))


def test_images_of_a_metadata_file_are_split_too(make_folder: MakeFolder) -> None:
    """Only what the file lists counts, by the paths that it lists."""
    folder = make_folder(9)
    (folder / "meta.json").write_text(json.dumps({f"{number:03d}.png": {"caption": "a"} for number in range(6)}))
    subset = SubsetConfig(image_dir=folder, metadata_file=folder / "meta.json")
    (indexed,) = index_datasets([config_of(subset, share=0.5)])
    assert (len(indexed.examples), len(indexed.held_out)) == (3, 3)
    assert names([*indexed.examples, *indexed.held_out]) == {f"{number:03d}.png" for number in range(6)}
