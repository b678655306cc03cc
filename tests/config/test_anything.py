"""Properties of config reading: whatever the tables, the answer is a config or a ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.config.dataset_tables import DATASET_KEYS, SUBSET_KEYS, UNSUPPORTED_DEFAULTS
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.dump import to_toml
from lorakit.config.load import COMPONENT_SECTIONS, PLAIN_SECTIONS, SECTIONS, config_from_tables
from lorakit.config.sd_scripts import OTHER_KEYS
from lorakit.config.table_reader import field_names
from lorakit.config.toml_files import read_toml
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CATALOG = Catalog.discover()

KEYS = sorted(
    {"name", "family", "config", "datasets", "general", "subsets", *SECTIONS, *DATASET_KEYS, *SUBSET_KEYS}
    | {key for found in CATALOG.registrations for key in field_names(found.component)}
    | {*list(OTHER_KEYS)[::5], *list(UNSUPPORTED_DEFAULTS)[::3]}
)
NAMES = sorted({name for base in REGISTRATION_HOOKS.values() for name in CATALOG.of_kind(base)})

scalars = (
    st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 64, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["model.safetensors", "photos", "", "~", "unet", *NAMES])
)
keys = st.sampled_from(KEYS) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def read(tables: dict[str, Any], base: Path) -> TrainConfig | ConfigError:
    """The config in the tables, or what is wrong with them."""
    try:
        return config_from_tables(tables, base, CATALOG)
    except ConfigError as error:
        return error


@quick
@given(tables=st.dictionaries(keys, values, max_size=5))
@example(tables={"model": {"path": "~x"}, "data": {"config": "\x00"}, "observers": [{"name": {}}], "network": None})
def test_random_tables_give_a_config_error(base: Path, tables: dict[str, Any]) -> None:
    """No nest of TOML values raises anything else, and the error has a message for each problem."""
    outcome = read(tables, base)
    if isinstance(outcome, ConfigError):
        assert outcome.problems
        assert all(str(problem).strip() for problem in outcome.problems)


def fitting(type_: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type may take."""
    origin, members = get_origin(type_), get_args(type_)
    if origin is Literal:
        return st.sampled_from(members)
    if origin is tuple:
        elements = members[:1] * 2 if members[-1] is Ellipsis else members
        return st.tuples(*map(fitting, elements)).map(list)
    if members:
        return st.one_of(fitting(member) for member in members if member is not type(None))
    simple = {bool: st.booleans(), int: st.integers(1, 12), float: st.floats(0, 0.999) | st.integers(0, 2)}
    return simple.get(type_, st.text(min_size=1, max_size=9))


def table_of(cls: type, likely: float = 0.3) -> st.SearchStrategy[dict[str, Any]]:
    """Tables with some of the keys of a config class, most with values that fit."""
    types = get_type_hints(cls)
    optional = {
        key: fitting(types[key]) | (scalars if key == "seed" else st.nothing())
        for key in field_names(cls)
        if key not in ("path", "datasets", "subsets", "image_dir", "resolution", "weights", "vae", "parts")
        and "reso" not in key
    }
    return (
        st.lists(st.sampled_from(list(optional)), max_size=round(1 + likely * len(optional)), unique=True).flatmap(
            lambda chosen: st.fixed_dictionaries({key: optional[key] for key in chosen})
        )
        if optional
        else st.just({})
    )


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs that are mostly good: any components, with any of their keys."""
    tables: dict[str, Any] = {}
    for section, (base, _) in COMPONENT_SECTIONS.items():
        found = draw(st.sampled_from([found for same in CATALOG.of_kind(base).values() for found in same]))
        tables[section] = {base.name_key: found.component.name, **draw(table_of(found.component))}
    for section, cls in PLAIN_SECTIONS.items():
        tables[section] = draw(table_of(cls))
    family = CATALOG.find(ModelFamilyConfig, "sd1")
    data = {**draw(table_of(SubsetConfig)), **draw(table_of(DatasetConfig)), **draw(table_of(DataSection))}
    return {
        **tables,
        "model": {**draw(table_of(family)), "path": "model.safetensors"},
        "data": {**data, "image_dir": "photos", "resolution": 64},
        "output": {**tables["output"], "dir": "out"},
        "observers": draw(st.lists(st.just({"name": "tensorboard", "dir": "logs"}), max_size=2)),
    }


@quick
@given(tables=configs())
def test_what_is_read_is_written_so_that_it_reads_back(base: Path, tables: dict[str, Any]) -> None:
    """A config with any options is refused in words, or written as TOML that gives the same config anywhere."""
    outcome = read(tables, base)
    event(type(outcome).__name__)
    if isinstance(outcome, ConfigError):
        assert all(str(problem).strip() for problem in outcome.problems)
        return
    path = base / "written.toml"
    path.write_text(to_toml(outcome), encoding="utf-8")
    assert read(read_toml(path), Path("/")) == outcome


@quick
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), suffix=st.sampled_from([".toml", ".json"])
)
def test_random_files_are_read_or_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    """Whatever bytes a file holds, it gives a table or a ValueError with a reason."""
    path = tmp_path / f"random{suffix}"
    path.write_bytes(content)
    try:
        found: object = read_toml(path)
    except ValueError as error:
        found = str(error)
    assert isinstance(found, dict) or found
