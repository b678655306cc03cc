"""The [data] section: a dataset file in sd-scripts' format, the same tables in place, or the short form.

A key that is absent in a subset is looked up in its dataset and then in [general], as in sd-scripts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import tomlkit
from tomlkit.exceptions import TOMLKitError

from lorakit.config.datasets import DatasetConfig, DataSection, SubsetConfig
from lorakit.config.tables import TableReader
from lorakit.config.values import shown

SUBSET_KEYS = [field.name for field in attrs.fields(SubsetConfig)]
DATASET_KEYS = [field.name for field in attrs.fields(DatasetConfig)]
SECTION_KEYS = [field.name for field in attrs.fields(DataSection) if field.name != "datasets"]
# image_dir belongs to one subset; the rest can be shared.
SHARED_KEYS = [key for key in (*DATASET_KEYS, *SUBSET_KEYS) if key not in ("subsets", "image_dir")]


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML (or JSON) file; raises ValueError with the reason why it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else tomlkit.parse(text).unwrap()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text; save it as UTF-8") from error
    except (TOMLKitError, ValueError) as error:
        raise ValueError(f"is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("must hold a table of keys")
    return found


def read_data_section(reader: TableReader, table: Mapping[str, Any]) -> DataSection | None:
    """The [data] section, with its dataset file read if it names one."""
    own = {key: value for key, value in table.items() if key in SECTION_KEYS}
    rest = {key: value for key, value in table.items() if key not in SECTION_KEYS}
    if "config" in rest:
        datasets = _from_file(reader, rest)
    elif "datasets" in rest or "general" in rest:
        datasets = _read_datasets(reader, rest, "data")
    elif "image_dir" in rest:
        datasets = _short_form(reader, rest)
    else:
        reader.report("data", "names no images", "give image_dir, or config with a dataset file, or [[data.datasets]]")
        reader.refuse_unknown(rest, [*SHARED_KEYS, "config", "datasets", "general", "image_dir"], "data")
        datasets = None
    section = reader.structure(DataSection, {**own, "datasets": datasets or ("",)}, "data")
    return section if datasets else None


def _from_file(reader: TableReader, table: Mapping[str, Any]) -> tuple[DatasetConfig, ...] | None:
    reader.refuse_unknown({key: value for key, value in table.items() if key != "config"}, [], "data")
    value = table["config"]
    if not isinstance(value, str):
        reader.report("data.config", f"must be a path in quotes, not {shown(value)}")
        return None
    path = (reader.base / value).absolute()
    try:
        tables = read_toml(path)
    except ValueError as error:
        reader.report("data.config", f"{path} {error}")
        return None
    inner = TableReader(path.parent, file=path.name)
    inner.refuse_unknown(tables, ["general", "datasets"], "")
    datasets = _read_datasets(inner, tables, "")
    reader.problems += inner.problems
    return datasets


def _short_form(reader: TableReader, table: Mapping[str, Any]) -> tuple[DatasetConfig, ...] | None:
    reader.refuse_unknown(table, [*SECTION_KEYS, "config", "image_dir", *SHARED_KEYS], "data")
    subset = {key: value for key, value in table.items() if key in SUBSET_KEYS}
    shared = {key: (value, f"data.{key}") for key, value in table.items() if key in SHARED_KEYS}
    dataset = _read_dataset(reader, {"subsets": [subset]}, "data", shared)
    return (dataset,) if dataset else None


def _read_datasets(reader: TableReader, tables: Mapping[str, Any], section: str) -> tuple[DatasetConfig, ...] | None:
    prefix = f"{section}." if section else ""
    general = reader.table(tables, "general")
    reader.refuse_unknown(general, SHARED_KEYS, f"{prefix}general")
    shared = {key: (value, f"{prefix}general.{key}") for key, value in general.items()}
    before = len(reader.problems)
    if section:
        reader.refuse_unknown(
            {key: value for key, value in tables.items() if key not in ("general", "datasets")}, SECTION_KEYS, section
        )
    datasets = [
        _read_dataset(reader, table, f"{prefix}datasets[{index}]", shared)
        for index, table in enumerate(_list_of_tables(reader, tables, "datasets", prefix))
    ]
    if len(reader.problems) == before and not datasets:
        reader.report(f"{prefix}datasets", "has no entry", "add a [[datasets]] table with [[datasets.subsets]]")
    complete = tuple(dataset for dataset in datasets if dataset)
    return complete if complete and len(complete) == len(datasets) else None


def _read_dataset(
    reader: TableReader, table: Mapping[str, Any], section: str, inherited: Mapping[str, tuple[Any, str]]
) -> DatasetConfig | None:
    is_short_form = section == "data"
    reader.refuse_unknown(table, [*SHARED_KEYS, "subsets"], section)
    shared = {**inherited, **{key: (value, f"{section}.{key}") for key, value in table.items() if key != "subsets"}}
    subsets = []
    for index, subset in enumerate(_list_of_tables(reader, table, "subsets", f"{section}.")):
        subset_section = section if is_short_form else f"{section}.subsets[{index}]"
        values, paths = _inherit(subset, shared, SUBSET_KEYS)
        subsets.append(reader.structure(SubsetConfig, values, subset_section, paths))
    values, paths = _inherit({}, shared, DATASET_KEYS)
    resolution = values.get("resolution")
    if isinstance(resolution, int) and not isinstance(resolution, bool):
        values["resolution"] = (resolution, resolution)
    complete = tuple(subset for subset in subsets if subset)
    dataset = reader.structure(DatasetConfig, {**values, "subsets": complete or ("",)}, section, paths)
    if not subsets and isinstance(table.get("subsets", []), list):
        reader.report(f"{section}.subsets", "has no entry", "add a [[datasets.subsets]] table with image_dir")
    return dataset if complete and len(complete) == len(subsets) else None


def _inherit(
    own: Mapping[str, Any], shared: Mapping[str, tuple[Any, str]], keys: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values for one table, and the full keys of those that were written elsewhere."""
    elsewhere = {key: shared[key] for key in keys if key in shared and key not in own}
    values = {**own, **{key: value for key, (value, _) in elsewhere.items()}}
    return values, {key: path for key, (_, path) in elsewhere.items()}


def _list_of_tables(reader: TableReader, table: Mapping[str, Any], key: str, prefix: str) -> list[Mapping[str, Any]]:
    found = table.get(key, [])
    if isinstance(found, list) and all(isinstance(item, Mapping) for item in found):
        return found
    reader.report(f"{prefix}{key}", f"must be a list of tables, [[{key}]], not {shown(found)}")
    return []
