"""Dataset sources of plugins: chosen in a subset, listed, trained on, and named when they fail."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, frozen

from lorakit.api.dataset_source import DatasetSourceConfig, SourceImage
from lorakit.config.dump import to_tables, to_toml
from lorakit.config.load import config_from_tables
from lorakit.config.toml_files import parse_toml
from lorakit.config.train_config import TrainConfig
from lorakit.data.index import index_datasets
from lorakit.errors import ConfigError, DataError, PluginError
from lorakit.plugins.catalog import Catalog, Registration
from lorakit.plugins.discovery import PluginSource


@frozen
class Pairs:
    """A JSON file of pairs: image and caption."""

    file: Path

    def list_images(self, problems: list[str]) -> Iterable[SourceImage]:
        """The pairs whose images are there."""
        for name, caption in json.loads(self.file.read_text()):
            image = self.file.parent / name
            if image.is_file():
                yield SourceImage(image, caption)
            else:
                problems.append(f"{image}: is not there")


@frozen(kw_only=True)
class PairsConfig(DatasetSourceConfig):
    """Pairs of images and captions in a JSON file."""

    name = "pairs"

    pairs: Path
    """The file."""
    limit: int = 10
    """An option with a default."""

    def build(self, subset: Any) -> Pairs:  # noqa: ARG002
        """The source."""
        return Pairs(self.pairs)


@frozen(kw_only=True)
class BrokenConfig(DatasetSourceConfig):
    """Lists what is no image."""

    name = "broken"

    def build(self, subset: Any) -> Any:  # noqa: ARG002
        """A source that lists a text."""

        class Broken:
            def list_images(self, problems: list[str]) -> list[str]:  # noqa: ARG002
                return ["a.png"]

        return Broken()


@pytest.fixture
def catalog() -> Catalog:
    """What is installed, and a plugin with the two sources."""
    plugin = PluginSource("lorakit-pairs", "1.0", "pairs", "lorakit_pairs")
    installed = Catalog.discover()
    added = (Registration(component, plugin) for component in (PairsConfig, BrokenConfig))
    return evolve(installed, registrations=(*installed.registrations, *added))


@pytest.fixture
def read(train_tables: dict[str, Any], photographs: Path, catalog: Catalog) -> Any:
    """A function that reads a config with that [data]; relative paths are relative to the photographs."""

    def make(data: dict[str, Any]) -> TrainConfig:
        return config_from_tables(
            {**train_tables, "data": data if "datasets" in data else {"resolution": 64, **data}}, photographs, catalog
        )

    return make


@pytest.fixture
def pairs(tmp_path: Path, photographs: Path) -> Path:
    """A file with two pairs, whose images are links to photographs."""
    for name in ("snow.png", "beach.png"):
        (tmp_path / name).symlink_to(photographs / name)
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([["snow.png", "snow\nmore"], ["beach.png", "a beach"]]))
    return file


@pytest.mark.parametrize("form", ["short", "tables"])
def test_source_of_a_plugin(form: str, read: Any, pairs: Path, photographs: Path, catalog: Catalog) -> None:
    """A subset names the source and its options in one table; images come sorted by name, with their captions."""
    subset = {"source": "pairs", "pairs": str(pairs), "num_repeats": 3}
    config = read(subset if form == "short" else {"datasets": [{"resolution": 64, "subsets": [subset]}]})
    (dataset,) = index_datasets(config.data.datasets)
    assert [(example.image.name, example.caption) for example in dataset.examples] == [
        ("beach.png", "a beach"),
        ("snow.png", "snow"),
    ]
    assert [example.sample_id for example in dataset.examples] == ["0/0/beach.png", "0/0/snow.png"]
    assert {example.repeats for example in dataset.examples} == {3}
    (written,) = to_tables(config)["data"]["datasets"][0]["subsets"]
    assert (written["source"], written["pairs"], written["limit"]) == ("pairs", str(pairs), 10)
    assert config_from_tables(parse_toml(to_toml(config)), photographs, catalog) == config


@pytest.mark.parametrize(
    ("subset", "problem"),
    [
        ({"source": "pears"}, "data.source: no dataset source is called 'pears' (did you mean 'pairs'?)"),
        ({"source": 3}, "data.source: must be a text in quotes, not 3"),
        ({"source": "pairs"}, "data.pairs: is missing"),
        ({"source": "pairs", "pairs": "a", "limits": 3}, "data.limits: is not a known key"),
        ({"source": "pairs", "pairs": "a", "limit": 1.5}, "data.limit: must be a whole number, not 1.5"),
        ({"source": "folder"}, "data.image_dir: is missing"),
        ({"source": "metadata_file", "image_dir": "."}, "data.metadata_file: is missing"),
        ({"image_dir": ".", "pairs": "a"}, "data.pairs: is not a known key"),
    ],
)
def test_problems(subset: dict[str, Any], problem: str, read: Any) -> None:
    """An unknown source, and keys that its options do not take, are problems of the subset's table."""
    with pytest.raises(ConfigError) as caught:
        read(subset)
    assert problem in str(caught.value)


def test_builtin_sources_by_name(read: Any, photographs: Path) -> None:
    """`source = "folder"` is what a subset without it does."""
    named, plain = (read({"image_dir": str(photographs), **source}) for source in ({"source": "folder"}, {}))
    examples = [[(e.image, e.caption, e.sample_id) for d in index_datasets(c.data.datasets) for e in d.examples]
                for c in (named, plain)]  # fmt: skip
    assert len(examples[0]) == 4
    assert examples[0] == examples[1]


def test_entries_that_cannot_be_used(read: Any, pairs: Path) -> None:
    """Problems that a source collects, and images that it lists twice, are reported together."""
    pairs.write_text(json.dumps([["gone.png", ""], ["snow.png", "a"], ["snow.png", "b"]]))
    with pytest.raises(DataError) as caught:
        index_datasets(read({"source": "pairs", "pairs": str(pairs)}).data.datasets)
    assert "gone.png: is not there" in str(caught.value)
    assert "source 'pairs': snow.png is listed twice" in str(caught.value)


def test_source_that_lists_something_else(read: Any) -> None:
    """What is no SourceImage is the plugin's fault, which is named."""
    with pytest.raises(PluginError, match=r"dataset source 'broken' of .* failed in list_images: .*not a SourceImage"):
        index_datasets(read({"source": "broken"}).data.datasets)
