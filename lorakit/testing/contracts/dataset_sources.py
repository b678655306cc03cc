"""What every dataset source must do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from lorakit.api.dataset_source import DatasetSourceConfig, SourceImage
from lorakit.config.datasets import SubsetConfig
from lorakit.config.load import config_from_tables
from lorakit.config.table_reader import field_names
from lorakit.config.train_config import TrainConfig
from lorakit.data.index import index_datasets
from lorakit.plugins.build import build_component
from lorakit.testing.contracts.component import ComponentContract


class DatasetSourceContract(ComponentContract):
    """What every dataset source must do.

        class TestParquet(DatasetSourceContract):
            config = ParquetConfig(file=Path("captions.parquet"))

    The source is used in a subset whose `image_dir` is a folder with the images `beach.png`, `meadow.png`, `night.png`
    and `snow.png`; it must list at least one image, there or elsewhere.
    """

    config: DatasetSourceConfig
    subset_settings: Mapping[str, Any] = {}
    """Further keys of the subset, by name; relative paths are relative to the folder of the test."""

    @pytest.fixture
    def subset(self, photographs: Path) -> SubsetConfig:
        """A subset that uses the source, with the test's photographs as its `image_dir`."""
        return self.subset_of(photographs)

    def subset_of(self, folder: Path) -> SubsetConfig:
        """A subset that uses the source."""
        settings: dict[str, Any] = {"image_dir": folder, "source": self.config}
        for key, value in self.subset_settings.items():
            settings[key] = value.absolute() if isinstance(value, Path) else value
        return SubsetConfig(**settings)

    def listed(self, subset: SubsetConfig) -> list[SourceImage]:
        """What the source lists; fails where it reports problems."""
        problems: list[str] = []
        images = list(build_component(self.config, subset).list_images(problems))
        assert not problems
        return images

    def test_lists_files_that_exist(self, subset: SubsetConfig) -> None:
        """Images, masks, and captions in files of their own are files."""
        images = self.listed(subset)
        assert images
        for item in images:
            assert isinstance(item, SourceImage)
            files = [item.image, item.mask, item.caption if isinstance(item.caption, Path) else None]
            assert all(file.is_file() for file in files if file is not None)

    def test_names_identify_images(self, subset: SubsetConfig, tmp_path: Path) -> None:
        """No two images have the same name, and names do not depend on where the data is."""
        names = [item.name for item in self.listed(subset)]
        assert len(set(names)) == len(names)
        assert not any(str(folder) in name for name in names for folder in (tmp_path, subset.image_dir))

    def test_lists_the_same_again(self, subset: SubsetConfig) -> None:
        """Unchanged data gives the same list, on which all processes of a run and a resumed run depend."""
        by_name = [sorted(self.listed(subset), key=lambda item: item.name) for _ in range(2)]
        assert by_name[0] == by_name[1]

    def test_options_have_names_of_their_own(self) -> None:
        """No option is called as a key that every subset has, as both are in one table."""
        assert not set(field_names(type(self.config))) & set(field_names(SubsetConfig))

    def test_trains(self, train_tables: dict[str, Any], tmp_path: Path, subset: SubsetConfig) -> None:
        """Every listed image is an example to train on, with its caption."""
        config = _with_subset(config_from_tables(train_tables, tmp_path), subset)
        (dataset,) = index_datasets(config.data.datasets)
        listed = {item.name: item for item in self.listed(subset)}
        assert len(dataset.examples) == len(listed)
        for example in dataset.examples:
            item = listed[example.sample_id.split("/", 2)[2]]
            assert example.image == item.image
            assert isinstance(item.caption, Path) or example.caption == (item.caption or "").partition("\n")[0]

    def train_config(self, tables: dict[str, Any], base: Path) -> TrainConfig:
        """The config of a run with a subset that uses the source."""
        return _with_subset(config_from_tables(tables, base), self.subset_of(Path(tables["data"]["image_dir"])))


def _with_subset(config: TrainConfig, subset: SubsetConfig) -> TrainConfig:
    (dataset,) = config.data.datasets
    data = attrs.evolve(config.data, datasets=(attrs.evolve(dataset, subsets=(subset,)),))
    return attrs.evolve(config, data=data)
