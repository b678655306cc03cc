"""Metadata files: images, captions and tags as sd-scripts' tools list them, and all that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from lorakit.config.datasets import DatasetConfig
from lorakit.data.index import index_datasets
from lorakit.errors import DataError

WithSubset = Callable[..., DatasetConfig]

ENTRIES = {
    "rocket.png": {"caption": "a rocket\n starting", "tags": "sky, fire", "image_size": [64, 96]},
    "chelsea": {"caption": "a cat"},
    "inner/coffee.png": {"tags": "cup, saucer"},
    "astronaut.png": {"caption": None, "tags": ""},
}


@pytest.fixture
def listed(folder: Path) -> Path:
    """The photographs, one of them moved into a folder inside, and no caption files that could be mistaken."""
    (folder / "inner").mkdir()
    (folder / "coffee.png").rename(folder / "inner" / "coffee.png")
    return folder


def write(folder: Path, name: str = "meta.json") -> Path:
    """The entries as JSON or JSON Lines."""
    lines = [json.dumps({"image_path": path, **entry}) for path, entry in ENTRIES.items()]
    (folder / name).write_text(json.dumps(ENTRIES) if name.endswith("json") else "\n\n".join(lines))
    return folder / name


@pytest.mark.parametrize("name", ["meta.json", "meta.jsonl"])
@pytest.mark.parametrize(
    ("settings", "rocket"),
    [({}, "a rocket, sky, fire"), ({"enable_wildcard": True}, "a rocket, sky, fire\nstarting, sky, fire")],
)
def test_images_and_captions_of_a_metadata_file(
    listed: Path, with_subset: WithSubset, name: str, settings: dict[str, object], rocket: str
):
    """The listed images are there and no other, each with caption and tags, in the order of their paths."""
    subset = with_subset(metadata_file=write(listed, name), class_tokens="photo", **settings)
    (indexed,) = index_datasets([subset])
    found = [(example.image.relative_to(listed).as_posix(), example.caption) for example in indexed.examples]
    assert found == [
        ("astronaut.png", "photo"),
        ("chelsea.png", "a cat"),
        ("inner/coffee.png", "cup, saucer"),
        ("rocket.png", rocket),
    ]
    assert [example.sample_id for example in indexed.examples] == [
        "0/0/astronaut.png", "0/0/chelsea", "0/0/inner/coffee.png", "0/0/rocket.png",
    ]  # fmt: skip


HUB = {
    "metadata.jsonl": """{"file_name": "rocket.png", "text": "a rocket"}\n{"file_name": "inner/coffee.png"}""",
    "metadata.csv": """file_name,text,year\nrocket.png,a rocket,1\ninner/coffee.png,,2\n""",
    "metadata.json": """[{"file_name": "rocket.png", "text": "a rocket"}, {"file_name": "inner/coffee.png"}]""",
    "prompts.jsonl": """{"image": "rocket.png", "prompt": "a rocket"}\n{"image": "inner/coffee.png", "prompt": null}""",
    "by_path.json": """{"rocket.png": {"text": "a rocket"}, "inner/coffee.png": {}}""",
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_form(listed: Path, with_subset: WithSubset, name: str):
    """`file_name` and `text`, as the Hub's image folders have them, mean the same, in JSON, JSON Lines and CSV."""
    (listed / name).write_text(HUB[name])
    (indexed,) = index_datasets([with_subset(metadata_file=listed / name, class_tokens="cup")])
    found = [(example.image.relative_to(listed).as_posix(), example.caption) for example in indexed.examples]
    assert found == [("inner/coffee.png", "cup"), ("rocket.png", "a rocket")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"rocket.png": ', "a.json: is not valid JSON"),
        ("a.json", "[1]", "a.json: lists no images"),
        ("a.jsonl", "1\n", "a.jsonl: lists no images"),
        ("a.jsonl", "", "a.jsonl: lists no images"),
        ("a.jsonl", '{"file_name": "rocket.png"}\n\n{"file_name": ', r"is not valid JSON: .* \(line 3 of the file\)"),
        ("a.jsonl", "{}\n" + "[" * 100000, r"a\.jsonl: is not valid JSON: .* \(line 2 of the file\)"),
        ("a.json", '{"gone.png": {"caption": "a"}}', "a.json: gone.png: is not an image file"),
        ("a.json", '{"gone": {"caption": "a"}}', "a.json: gone: is not an image file"),
        ("a.json", '{"rocket.png": "a rocket"}', "rocket.png: must have caption and tags"),
        ("a.json", '{"rocket.png": {"caption": ["a"]}}', "rocket.png: must have caption and tags"),
        ("a.json", r'{"rocket.png": {"tags": "a \ud83d"}}', "must have caption and tags, each a text in UTF-8"),
        (
            "a.jsonl",
            '{"caption": "a"}',
            r"has no image path \(expected in one of the keys image_path, file_name",
        ),
        ("a.csv", "a,b\n1,2\n", "has no image path"),
        ("a.csv", "file_name,text\n", "a.csv: lists no images"),
        ("a.jsonl", '{"file_name": "a.heic", "text": "a"}', r"a\.heic: has an unsupported format \(convert it"),
        ("a.jsonl", '{"file_name": "../a.png", "text": "a"}', r"\.\./a\.png: is outside image_dir"),
        ("a.jsonl", '{"image_path": "rocket.png"}\n{"image_path": "rocket.png"}', "rocket.png: is listed twice"),
    ],
)
def test_metadata_files_that_cannot_be_used(
    listed: Path, with_subset: WithSubset, name: str, content: str, message: str
):
    """Each is one error that names the file, the entry where there is one, and the cause."""
    (listed / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        index_datasets([with_subset(metadata_file=listed / name)])
    assert str(listed / name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_metadata_file_that_is_no_text(listed: Path, with_subset: WithSubset):
    """Another encoding is told with its cure."""
    (listed / "a.json").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json: is not UTF-8 text \(save it as UTF-8\)"):
        index_datasets([with_subset(metadata_file=listed / "a.json")])


def test_both_kinds_of_subset_in_a_dataset(listed: Path, dataset: DatasetConfig):
    """A subset of a metadata file and one of a folder stand side by side."""
    subset = dataset.subsets[0]
    (indexed,) = index_datasets([evolve(dataset, subsets=(evolve(subset, metadata_file=write(listed)), subset))])
    assert len(indexed.examples) == 4 + 4
