"""Config files as text: what is written reads back, and the starter is a config to start from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import attrs
import pytest

from lorakit.api.components import OptimizerConfig
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.dump import starter, to_toml
from lorakit.config.field_docs import field_docs
from lorakit.config.load import PLAIN_SECTIONS, SECTIONS, config_from_tables
from lorakit.config.table_reader import field_names
from lorakit.config.train_config import TrainConfig
from lorakit.config.values import value_converter
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from tests.config.conftest import Tables
from tests.guests import install, optimizer_source

ALL_CLASSES = [
    *(registration.component for registration in Catalog.discover().registrations),
    *PLAIN_SECTIONS.values(), SubsetConfig, DatasetConfig, DataSection,
]  # fmt: skip


def test_a_config_with_tables_of_all_kinds_reads_back(
    base: Path, tables: Tables, catalog: Catalog, read: Callable[[Tables], TrainConfig]
) -> None:
    """Datasets, observers, paths, tuples and characters that TOML escapes survive writing and reading."""
    subsets = [{"image_dir": "photos", "class_tokens": 'a "cat"\n\\ \u00e9'}, {"image_dir": "more", "flip_aug": True}]
    tables["data"] = {
        "datasets": [{"resolution": [64, 128], "subsets": subsets}, {"resolution": 72, "subsets": subsets[:1]}]
    }
    tables["observers"] = [{"name": "tensorboard", "dir": "logs"}, {"name": "progress", "average": 0.5}]
    tables["optimizer"] = {"name": "adafactor", "eps": [1e-30, 1e-3], "weight_decay": 1e22}
    config = read(tables)
    written = to_toml(config)
    assert config_from_tables(tomllib.loads(written), Path("/nowhere"), catalog) == config
    assert "[[data.datasets.subsets]]" in written


def test_names_that_clash_are_written_in_full(
    base: Path, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A component that was picked by `distribution:name` is written so that it is picked again."""
    install(tmp_path, "rival", rival_adamw=optimizer_source("adamw"))
    monkeypatch.syspath_prepend(tmp_path)
    catalog = Catalog.discover()
    for distribution in ("lorakit", "rival"):
        config = config_from_tables({**tables, "optimizer": {"name": f"{distribution}:adamw"}}, base, catalog)
        written = to_toml(config, catalog)
        assert f'name = "{distribution}:adamw"' in written
        assert config_from_tables(tomllib.loads(written), base, catalog) == config
    with pytest.raises(ConfigError, match=r"'lorakit:adamw' or 'rival:adamw'"):
        config_from_tables({**tables, "optimizer": {"name": "adamw"}}, base, catalog)


@pytest.mark.parametrize("cls", ALL_CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_is_documented(cls: type) -> None:
    """Each field has a help text of a sentence and a type that can be read strictly; the class says what it is."""
    assert cls.__doc__
    docs, types = field_docs(cls), get_type_hints(cls)
    for field in attrs.fields(cls):
        assert re.fullmatch(r"[A-Z0-9].*\.", docs.get(field.name, "")), f"{cls.__name__}.{field.name}: {docs}"
        if field.name not in ("subsets", "datasets", "source"):
            with pytest.raises(ValueError, match=r"^must "):
                value_converter(Path()).structure(object(), types[field.name])


def test_help_texts_of_classes_without_source() -> None:
    """A class that no file holds has no help texts, and none is needed."""
    made = attrs.make_class("Made", {"key": attrs.field(default=1)})
    assert field_docs(made) == {}


def test_the_starter_says_every_key(catalog: Catalog) -> None:
    """The starter is valid TOML with all sections, names each key once with its help, and fits a screen's width."""
    text = starter(catalog)
    assert set(SECTIONS) - tomllib.loads(text).keys() == {"observers"}
    for cls in (
        *PLAIN_SECTIONS.values(),
        SubsetConfig,
        DatasetConfig,
        DataSection,
        catalog.find(OptimizerConfig, "adamw"),
    ):
        for key in field_names(cls):
            if key not in ("subsets", "datasets"):
                assert re.search(rf"^(# )?{key} =.*  +# [A-Z]", text, re.MULTILINE), key
    assert max(map(len, text.splitlines())) <= 120


def test_the_starter_shows_the_defaults(base: Path, catalog: Catalog) -> None:
    """The starter with every commented default switched on is the same config; its observers can be switched on too."""
    text = starter(catalog).replace("v1-5-pruned.safetensors", "model.safetensors")
    expected = config_from_tables(tomllib.loads(text), base, catalog)
    switched_on = re.sub(r"^# (\w+ = [^ ])", r"\1", text, flags=re.MULTILINE)
    assert switched_on.count("\n# ") < text.count("\n# ")
    (base / "prompts.txt").write_text("a cat")
    config = config_from_tables(tomllib.loads(switched_on.replace("# [[observers]]", "[[observers]]")), base, catalog)
    assert {observer.name for observer in config.observers} == {"tensorboard", "samples", "hub"}
    assert attrs.evolve(config, observers=()) == expected


def test_the_starter_lacks_only_the_users_files(catalog: Catalog, tmp_path: Path) -> None:
    """What is wrong with an untouched starter is that the model and the images are not there."""
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tomllib.loads(starter(catalog)), tmp_path, catalog)
    assert [problem.key for problem in caught.value.problems] == ["model.path", "data.image_dir"]
