"""The [data] section in its three forms, and dataset files as sd-scripts has them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.config.dataset_tables import EMPTY_VALUES, IGNORED_KEYS, UNSUPPORTED_DEFAULTS
from lorakit.config.datasets import DataSection, SubsetConfig
from lorakit.config.train_config import TrainConfig
from tests.config.conftest import Tables

Read = Callable[[Tables], TrainConfig]
Problems = Callable[[Tables], dict[str, str]]

DATASET_FILE = """
[general]
enable_bucket = true
shuffle_caption = true
num_repeats = 2

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "photos"
  num_repeats = 10
  class_tokens = "a cat"

  [[datasets.subsets]]
  image_dir = "more"
  shuffle_caption = false

[[datasets]]
resolution = [640, 768]
enable_bucket = false
num_repeats = 3

  [[datasets.subsets]]
  image_dir = "photos"
  caption_extension = ".cap"
"""


@pytest.fixture
def data_of(read: Read, tables: Tables) -> Callable[[dict[str, Any]], DataSection]:
    """A function from a [data] table to the section."""
    return lambda table: read({**tables, "data": table}).data


@pytest.fixture
def data_problems(problems: Problems, tables: Tables) -> Callable[[dict[str, Any]], dict[str, str]]:
    """A function from a [data] table to what is wrong with it."""
    return lambda table: problems({**tables, "data": table})


def test_a_dataset_file_of_sd_scripts(data_of: Callable[..., DataSection], base: Path) -> None:
    """Values are taken from the subset, else from its dataset, else from [general], else the default."""
    (base / "dataset.toml").write_text(DATASET_FILE)
    first, second = data_of({"config": "dataset.toml", "cache_dir": "cache"}).datasets
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((512, 512), 4, True)
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((640, 768), 1, False)
    assert first.subsets == (
        SubsetConfig(
            image_dir=base / "photos", num_repeats=10, class_tokens="a cat", shuffle_caption=True, keep_tokens=1
        ),
        SubsetConfig(image_dir=base / "more", num_repeats=2, shuffle_caption=False, keep_tokens=1),
    )
    assert second.subsets == (
        SubsetConfig(image_dir=base / "photos", num_repeats=3, shuffle_caption=True, caption_extension=".cap"),
    )


def test_the_same_tables_in_place_and_in_json(data_of: Callable[..., DataSection], base: Path) -> None:
    """A dataset file in JSON, and its tables under [data], give what the TOML file gives."""
    tables = tomllib.loads(DATASET_FILE)
    (base / "dataset.toml").write_text(DATASET_FILE)
    (base / "dataset.JSON").write_text(json.dumps(tables))
    expected = data_of({"config": "dataset.toml"})
    assert data_of({"config": "dataset.JSON"}) == expected
    assert data_of(tables) == expected


def test_the_short_form_is_one_dataset_of_one_subset(data_of: Callable[..., DataSection]) -> None:
    """Keys of subset, dataset and section may stand side by side in [data]."""
    short = {"image_dir": "photos", "resolution": [64, 128], "batch_size": 3, "flip_aug": True, "workers": 2}
    long = {
        "workers": 2,
        "datasets": [
            {"resolution": [64, 128], "batch_size": 3, "subsets": [{"image_dir": "photos", "flip_aug": True}]}
        ],
    }
    assert data_of(short) == data_of(long)


def test_paths_in_a_dataset_file_are_relative_to_it(data_of: Callable[..., DataSection], base: Path) -> None:
    """The folder that a dataset file is in is the one its paths start from."""
    (base / "photos" / "here.toml").write_text('[[datasets]]\nresolution=64\n[[datasets.subsets]]\nimage_dir="../more"')
    (dataset,) = data_of({"config": "photos/here.toml"}).datasets
    assert dataset.subsets[0].image_dir.resolve() == (base / "more").resolve()
    assert data_of({"config": str(base / "photos" / "here.toml")}).datasets == (dataset,)


def test_problems_of_a_dataset_file_name_it(data_problems: Callable[..., dict[str, str]], base: Path) -> None:
    """Every problem in a dataset file is told at once, with the file and the place where the value was written."""
    (base / "wrong.toml").write_text(
        "[general]\nnum_repeats = 'x'\nimage_dir = 'photos'\n[extra]\n"
        "[[datasets]]\nbatch_siz = 1\nenable_bucket = true\nresolution = '512'\n"
        "[[datasets.subsets]]\nbatch_size = 2\nflip_aug = 1\n"
        "[[datasets.subsets]]\nimage_dir = 'nowhere'\nnum_repeats = 1\nshuffle_captions = true\n"
    )
    found = data_problems({"config": "wrong.toml", "workers": 0})
    assert {key.removeprefix("wrong.toml: ") for key in found} == {
        "general.num_repeats", "general.image_dir", "extra", "datasets[0].batch_siz", "datasets[0].resolution",
        "datasets[0].subsets[0].batch_size", "datasets[0].subsets[0].flip_aug",
        "datasets[0].subsets[1].image_dir", "datasets[0].subsets[1].shuffle_captions", "data.workers",
    }  # fmt: skip
    assert "must be a whole number, not 'x'" in found["wrong.toml: general.num_repeats"]
    assert "must be a whole number, not '512'" in found["wrong.toml: datasets[0].resolution"]
    assert "write it in [[datasets.subsets]]" in found["wrong.toml: general.image_dir"]
    assert "write it in [[datasets]] or [general]" in found["wrong.toml: datasets[0].subsets[0].batch_size"]
    assert "did you mean datasets[0].batch_size?" in found["wrong.toml: datasets[0].batch_siz"]
    assert "shuffle_caption?" in found["wrong.toml: datasets[0].subsets[1].shuffle_captions"]
    assert "relative to the folder of wrong.toml" in found["wrong.toml: datasets[0].subsets[1].image_dir"]


def test_a_wrong_value_that_subsets_inherit_is_one_problem(data_problems: Callable[..., dict[str, str]]) -> None:
    """What is written once is wrong once, however many subsets inherit it."""
    subsets = [{"image_dir": "photos"}, {"image_dir": "more"}]
    table = {"general": {"keep_tokens": -1, "resolution": 64}, "datasets": [{"subsets": subsets}, {"subsets": subsets}]}
    assert list(data_problems(table)) == ["data.general.keep_tokens"]


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({}, "data", "names no images (give image_dir"),
        ({"datasets": []}, "data.datasets", "has no entry"),
        ({"general": {"resolution": 64}}, "data.datasets", "has no entry"),
        ({"datasets": {}}, "data.datasets", "must be a list of tables"),
        ({"datasets": [1]}, "data.datasets", "must be a list of tables"),
        ({"datasets": [{"resolution": 64}]}, "data.datasets[0].subsets", "has no entry"),
        ({"datasets": [{"resolution": 64, "subsets": {}}]}, "data.datasets[0].subsets", "must be a list of tables"),
        ({"general": 3, "datasets": [{"resolution": 64, "subsets": [{"image_dir": "more"}]}]}, "data.general", "table"),
        ({"config": 3}, "data.config", "must be a path in quotes, not 3"),
        ({"config": "nowhere.toml"}, "data.config", "nowhere.toml cannot be read: No such file"),
        ({"config": "photos/image.png"}, "data.config", "image.png is an image, not a config"),
        ({"image_dir": "photos"}, "data.resolution", "is missing (Width and height"),
        ({"image_dir": "photos", "resolution": [64, 64, 64]}, "data.resolution", "must have 2 values, not 3"),
        ({"image_dir": "photos", "resolution": True}, "data.resolution", "must be a whole number, not true"),
        ({"image_dir": "photos", "resolution": 64.0}, "data.resolution", "must be a whole number, not 64.0"),
        ({"image_dir": "photos", "resolution": 64, "subsets": []}, "data.subsets", "is not a known key"),
    ],
)
def test_data_sections_that_cannot_be(
    data_problems: Callable[..., dict[str, str]], table: dict[str, Any], key: str, message: str
) -> None:
    """Each shape that is no [data] section is one problem that says what to write."""
    found = data_problems(table)
    assert list(found) == [key]
    assert message in found[key]


def test_a_dataset_file_stands_alone(data_problems: Callable[..., dict[str, str]], base: Path) -> None:
    """Keys of datasets beside data.config would be ignored, so they are refused."""
    (base / "good.toml").write_text('[[datasets]]\nresolution=64\n[[datasets.subsets]]\nimage_dir="photos"')
    found = data_problems({"config": "good.toml", "batch_size": 2, "image_dir": "more", "nonsense": 1})
    assert set(found) == {"data.batch_size", "data.image_dir", "data.nonsense"}
    assert "cannot be combined with data.config (write it in the dataset file)" in found["data.batch_size"]


@pytest.mark.parametrize("content", ["[1, 2]", '{"datasets": [', "null"])
def test_json_that_is_no_dataset_file(data_problems: Callable[..., dict[str, str]], base: Path, content: str) -> None:
    """JSON that is broken or holds no table is a problem at data.config."""
    (base / "wrong.json").write_text(content)
    assert list(data_problems({"config": "wrong.json"})) == ["data.config"]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_DEFAULTS))
def test_options_of_sd_scripts_that_are_not_here(
    data_of: Callable[..., DataSection], data_problems: Callable[..., dict[str, str]], name: str
) -> None:
    """An option that would change the training is refused by name; switched off, it is let through."""
    table = {"image_dir": "photos", "resolution": 64}
    assert data_of({**table, name: UNSUPPORTED_DEFAULTS[name]}) == data_of(table)
    found = data_problems({**table, name: "something"})
    assert "is an option of sd-scripts that lorakit does not support" in found[f"data.{name}"]


@pytest.mark.parametrize("name", sorted(EMPTY_VALUES))
def test_empty_values_count_as_absent(
    data_of: Callable[..., DataSection], data_problems: Callable[..., dict[str, str]], name: str
) -> None:
    """An empty value of a key that files of sd-scripts may leave empty says as much as none."""
    subset = {"image_dir": "photos"}
    assert data_of({"datasets": [{"resolution": 64, "subsets": [{**subset, name: EMPTY_VALUES[name]}]}]}) == data_of(
        {**subset, "resolution": 64}
    )
    assert list(data_problems({**subset, "resolution": 64, name: 5})) == [f"data.{name}"]


AUGMENTATIONS = {
    "color_aug": True,
    "random_crop": True,
    "face_crop_aug_range": [2.0, 4.0],
    "resize_interpolation": "area",
    "alpha_mask": True,
}


def test_augmentations_are_shared(data_of: Callable[..., DataSection], base: Path) -> None:
    """They may stand in [general] for all subsets, and a subset may say otherwise; masks belong to one subset."""
    subsets = [{"image_dir": "photos", "conditioning_data_dir": "more"}, {"image_dir": "photos", "random_crop": False}]
    table = {"general": AUGMENTATIONS, "datasets": [{"resolution": 64, "subsets": subsets}]}
    first, second = data_of(table).datasets[0].subsets
    for subset in (first, second):
        assert (subset.color_aug, subset.alpha_mask, subset.resize_interpolation) == (True, True, "area")
        assert subset.face_crop_aug_range == (2.0, 4.0)
    assert (first.random_crop, second.random_crop) == (True, False)
    assert (first.conditioning_data_dir, second.conditioning_data_dir) == (base / "more", None)


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"face_crop_aug_range": [4, 2]}, "data.face_crop_aug_range", "the greater one last, not [4, 2]"),
        ({"face_crop_aug_range": [0, 2]}, "data.face_crop_aug_range", "two numbers above 0"),
        ({"face_crop_aug_range": [2]}, "data.face_crop_aug_range", "must have 2 values"),
        ({"face_crop_aug_range": [2, 4], "enable_bucket": True}, "data.enable_bucket", "with face_crop_aug_range"),
        ({"resize_interpolation": "sharp"}, "data.resize_interpolation", "must be one of 'lanczos', 'nearest'"),
        ({"conditioning_data_dir": "nowhere"}, "data.conditioning_data_dir", "nowhere is not a folder"),
        ({"color_aug": "yes"}, "data.color_aug", "must be true or false"),
    ],
)
def test_wrong_augmentations(
    data_problems: Callable[..., dict[str, str]], table: dict[str, Any], key: str, message: str
) -> None:
    """What cannot be meant is told with its key."""
    found = data_problems({"image_dir": "photos", "resolution": 512, **table})
    assert list(found) == [key]
    assert message in found[key]


def test_masks_belong_to_one_subset(data_problems: Callable[..., dict[str, str]]) -> None:
    """The folder of masks cannot stand where several subsets would share it."""
    general = {"resolution": 64, "conditioning_data_dir": "more"}
    found = data_problems({"general": general, "datasets": [{"subsets": [{"image_dir": "photos"}]}]})
    assert "write it in [[datasets.subsets]]" in found["data.general.conditioning_data_dir"]


def test_masks_win_over_transparency(read: Read, tables: Tables) -> None:
    """That alpha_mask has no effect with a folder of masks is a warning."""
    data = {"image_dir": "photos", "resolution": 64, "conditioning_data_dir": "more", "alpha_mask": True}
    warnings = {warning.key: warning.message for warning in read({**tables, "data": data}).warnings()}
    assert "has no effect" in warnings["data.alpha_mask"]


@pytest.mark.parametrize("name", sorted(IGNORED_KEYS))
def test_options_of_sd_scripts_without_effect(data_of: Callable[..., DataSection], name: str) -> None:
    """Options of dataset files that change nothing in training are let through in subsets too."""
    subset = {"image_dir": "photos", name: 5}
    assert data_of({"datasets": [{"resolution": 64, "subsets": [subset]}]}) == data_of(
        {"image_dir": "photos", "resolution": 64}
    )


CAPTION_OPTIONS = {
    "caption_prefix": "sks",
    "caption_suffix": "photo",
    "enable_wildcard": True,
    "keep_tokens_separator": "|||",
    "secondary_separator": ";;;",
    "caption_dropout_rate": 0.1,
    "caption_dropout_every_n_epochs": 3,
    "caption_tag_dropout_rate": 1,
    "token_warmup_step": 0.2,
    "token_warmup_min": 2,
}


@pytest.mark.parametrize("name", sorted(CAPTION_OPTIONS))
def test_caption_options_in_every_scope(data_of: Callable[..., DataSection], name: str) -> None:
    """A caption option holds from [general], [[datasets]] and [[datasets.subsets]] on, the nearer one first."""
    value = CAPTION_OPTIONS[name]
    option = {name: value}
    off = {name: getattr(SubsetConfig(image_dir=Path()), name)}

    def found(general: dict[str, Any], dataset: dict[str, Any], subset: dict[str, Any]) -> object:
        tables = {
            "general": general,
            "datasets": [{"resolution": 64, **dataset, "subsets": [{"image_dir": "photos", **subset}]}],
        }
        return getattr(data_of(tables).datasets[0].subsets[0], name)

    assert found(option, {}, {}) == found({}, option, {}) == found({}, {}, option) == found(off, option, {}) == value
    assert found(option, option, off) == off[name] != value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("caption_dropout_rate", 1.1, "must be at most 1, not 1.1"),
        ("caption_tag_dropout_rate", -0.1, "must be at least 0, not -0.1"),
        ("caption_dropout_every_n_epochs", 0.5, "must be a whole number, not 0.5"),
        ("token_warmup_step", -1, "must be at least 0"),
        ("token_warmup_min", -1, "must be at least 0"),
        ("caption_prefix", 1, "must be a text in quotes"),
        ("enable_wildcard", 1, "must be true or false"),
        ("keep_tokens_separator", ",", "must not be part of caption_separator"),
        ("secondary_separator", "a,b", "must not contain caption_separator, ','"),
        ("prior_loss_weight", -1, "must be at least 0"),
    ],
)
def test_caption_options_that_cannot_be(
    data_problems: Callable[..., dict[str, str]], name: str, value: object, message: str
) -> None:
    """A value out of range or of another type is one problem at its key."""
    found = data_problems({"image_dir": "photos", "resolution": 64, name: value})
    assert list(found) == [f"data.{name}"]
    assert message in found[f"data.{name}"]


def test_regularisation_belongs_to_a_subset(
    data_of: Callable[..., DataSection], data_problems: Callable[..., dict[str, str]]
) -> None:
    """is_reg stands in a subset beside one of other images; elsewhere the message says where to write it."""
    images, regularising = {"image_dir": "photos"}, {"image_dir": "more", "is_reg": True}
    section = data_of({"prior_loss_weight": 0.5, "datasets": [{"resolution": 64, "subsets": [images, regularising]}]})
    assert [subset.is_reg for subset in section.datasets[0].subsets] == [False, True]
    assert section.prior_loss_weight == 0.5
    shared = {"general": {"is_reg": True}, "datasets": [{"resolution": 64, "subsets": [images]}]}
    assert "write it in [[datasets.subsets]]" in data_problems(shared)["data.general.is_reg"]
    alone = {"datasets": [{"resolution": 64, "subsets": [regularising]}]}
    assert "are all regularisation images" in data_problems(alone)["data.datasets[0].subsets"]
    short = {"image_dir": "photos", "resolution": 64}
    assert data_of({**short, "is_reg": False}) == data_of(short)
    assert "are all regularisation images" in data_problems({**short, "is_reg": True})["data.subsets"]


def test_metadata_files(
    data_of: Callable[..., DataSection], data_problems: Callable[..., dict[str, str]], base: Path
) -> None:
    """A metadata file may stand without image_dir, which is its folder then; it must be there."""
    (base / "photos" / "meta.json").write_text("{}")
    short = {"resolution": 64, "metadata_file": "photos/meta.json"}
    (dataset,) = data_of(short).datasets
    assert dataset.subsets == (SubsetConfig(image_dir=base / "photos", metadata_file=base / "photos" / "meta.json"),)
    (elsewhere,) = data_of({**short, "image_dir": "more"}).datasets
    assert elsewhere.subsets[0].image_dir == base / "more"
    assert (
        "meta.txt is not a file" in data_problems({**short, "metadata_file": "photos/meta.txt"})["data.metadata_file"]
    )
    general = {"general": {"metadata_file": "photos/meta.json"}, "datasets": [{"resolution": 64, "subsets": [{}]}]}
    assert "write it in [[datasets.subsets]]" in data_problems(general)["data.general.metadata_file"]


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"image_dir": "phtos"}, "image_dir", "phtos is not a folder (did you mean photos? relative paths"),
        ({"image_dir": "Photos"}, "image_dir", "Photos is not a folder (did you mean photos? relative"),
        ({"image_dir": "elsewhere/x"}, "image_dir", "is not a folder (relative paths are relative to the folder of"),
        ({"image_dir": "photos/a.png"}, "image_dir", 'a.png is a file, not a folder (give a folder, "BASE/photos"'),
        ({"image_dir": "photos/meta.jsonl"}, "image_dir", 'captions from it: metadata_file = "BASE/photos/meta.jsonl"'),
        ({"image_dir": "dataset.toml"}, "image_dir", 'a dataset file: [data] with config = "BASE/dataset.toml" alone)'),
        ({"metadata_file": "photos/mta.jsonl"}, "metadata_file", "is not a file (did you mean meta.jsonl"),
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(
    data_problems: Callable[..., dict[str, str]], base: Path, table: dict[str, Any], key: str, message: str
) -> None:
    """What is in the place of a folder is told with what it is good for, and which names are near."""
    for name in ("photos/a.png", "photos/meta.jsonl", "dataset.toml"):
        (base / name).write_text("{}")
    found = data_problems({"resolution": 64, **table})
    assert message.replace("BASE", str(base)) in found[f"data.{key}"]


def test_subsets_that_are_switched_off(
    read: Read, tables: Tables, data_problems: Callable[..., dict[str, str]]
) -> None:
    """Without repeats a subset is left out with a warning, whatever it says; not all of them can be."""
    on, off = {"image_dir": "photos"}, {"image_dir": "nowhere", "num_repeats": 0}
    for datasets in ([{"subsets": [on, off]}], [{"subsets": [off]}, {"subsets": [on]}]):
        data = {"general": {"resolution": 64}, "datasets": datasets}
        warnings = {warning.key: warning.message for warning in read({**tables, "data": data}).warnings()}
        assert warnings["data.num_repeats"].startswith("is 0, which disables ")
        assert warnings["data.num_repeats"].endswith("nowhere")
    short = {"resolution": 64, **off}
    message = "is 0 in every subset, so there is nothing to train on (1 is usual)"
    assert data_problems(short) == {"data.num_repeats": message}
    regularising = [off, {**on, "is_reg": True}]
    found = data_problems({"datasets": [{"resolution": 64, "subsets": regularising}]})
    assert "are all regularisation images" in found["data.datasets[0].subsets"]


def test_validation_is_of_datasets(
    data_of: Callable[..., DataSection], data_problems: Callable[..., dict[str, str]]
) -> None:
    """Share and seed of the validation split stand in [general] or a dataset; in a subset the message says so."""
    subset = {"image_dir": "photos"}
    own = {"resolution": 64, "validation_split": 0.5, "subsets": [subset]}
    tables = {
        "general": {"validation_split": 0.1, "validation_seed": 0},
        "datasets": [own, {**own, "validation_seed": 3}],
    }
    del tables["datasets"][1]["validation_split"]
    found = data_of(tables).datasets
    assert [(each.validation_split, each.validation_seed) for each in found] == [(0.5, 0), (0.1, 3)]
    wrong = {"datasets": [{"resolution": 64, "validation_split": 1, "subsets": [{**subset, "validation_split": 0.1}]}]}
    problems = data_problems(wrong)
    assert "must be less than 1" in problems["data.datasets[0].validation_split"]
    assert "write it in [[datasets]] or [general]" in problems["data.datasets[0].subsets[0].validation_split"]
