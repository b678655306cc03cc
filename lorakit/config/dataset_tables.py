"""The [data] section: a dataset file in sd-scripts' format, the same tables in place, or the short form.

A key that is absent in a subset is looked up in its dataset and then in [general], as in sd-scripts.
Relative paths in a dataset file are relative to the folder of that file, so that the file means the
same wherever it is used from.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorakit.api.dataset_source import DatasetSourceConfig
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.table_reader import TableReader, field_names
from lorakit.config.toml_files import read_toml
from lorakit.config.values import toml_repr
from lorakit.errors import PluginError
from lorakit.plugins.failures import collect_problems

SUBSET_KEYS = field_names(SubsetConfig)
DATASET_KEYS = [key for key in field_names(DatasetConfig) if key != "subsets"]
SECTION_KEYS = [key for key in field_names(DataSection) if key != "datasets"]
OWN_KEYS = ("image_dir", "metadata_file", "source", "is_reg", "conditioning_data_dir")
"""What belongs to one subset; the rest can be shared."""
SHARED_KEYS = [key for key in (*DATASET_KEYS, *SUBSET_KEYS) if key not in OWN_KEYS]

UNSUPPORTED_DEFAULTS: Mapping[str, object] = {"custom_attributes": {}}
"""Options of sd-scripts' dataset files that lorakit does not have, with the value that changes nothing."""

EMPTY_VALUES = {"conditioning_data_dir": "", "face_crop_aug_range": [], "resize_interpolation": ""}
"""Keys that may be there with a value that says no more than if they were absent."""

_NOTHING = object()

IGNORED_KEYS = frozenset({"cache_info", "network_multiplier"})
"""Options of sd-scripts' dataset files that change nothing in what is trained."""


Shared = Mapping[str, tuple[Any, str]]
"""Values that datasets and subsets inherit, each with its full key."""


def read_data_section(
    reader: TableReader, table: Mapping[str, Any], defaults: Mapping[str, object] = MappingProxyType({})
) -> DataSection | None:
    """The [data] section, with its dataset file read if it names one; `defaults` are the model family's."""
    absent = {key: (value, f"data.{key}") for key, value in defaults.items()}
    own = {key: value for key, value in table.items() if key in SECTION_KEYS}
    rest = {key: value for key, value in table.items() if key not in SECTION_KEYS}
    if "config" in rest:
        datasets = _from_file(reader, rest, absent)
    elif "datasets" in rest or "general" in rest:
        datasets = _from_tables(reader, rest, "data", absent)
    else:
        datasets = _short_form(reader, rest, absent)
    values = reader.values(DataSection, own, "data", given=["datasets"])
    if values is None or datasets is None:
        return None
    return reader.instance(DataSection, {**values, "datasets": datasets}, "data")


def _from_file(reader: TableReader, table: Mapping[str, Any], absent: Shared) -> tuple[DatasetConfig, ...] | None:
    for key in table:
        if key in (*SHARED_KEYS, *OWN_KEYS, "general", "datasets"):
            reader.report(f"data.{key}", "cannot be combined with data.config", "write it in the dataset file")
        elif key != "config":
            reader.report_unknown_keys([key], [*SECTION_KEYS, "config"], "data")
    path = reader.path(table["config"], "data.config")
    if path is None:
        return None
    try:
        tables = read_toml(path)
    except ValueError as error:
        reader.report("data.config", f"{path} {error}")
        return None
    inner = TableReader(path.parent, path.name, reader.places, reader.catalog)
    datasets = _from_tables(inner, tables, "", absent)
    reader.problems += inner.problems
    return datasets


def _short_form(reader: TableReader, table: Mapping[str, Any], absent: Shared) -> tuple[DatasetConfig, ...] | None:
    if not {"image_dir", "metadata_file", "source"} & table.keys():
        reader.report("data", "names no images", "give image_dir, or config with a dataset file, or [[data.datasets]]")
        known = [*SHARED_KEYS, *OWN_KEYS, "config", "datasets", "general", *SECTION_KEYS]
        _refuse_unknown(reader, table, known, "data")
        return None
    options = _source_options(reader, table)
    _refuse_unknown(reader, table, [*SHARED_KEYS, *OWN_KEYS, *SECTION_KEYS, *options], "data")
    given = {key: (value, f"data.{key}") for key, value in table.items() if key in SHARED_KEYS}
    shared = {**absent, **given}
    own = {key: table[key] for key in (*OWN_KEYS, *options) if key in table}
    dataset = _dataset(reader, [(own, "data")], shared, "data")
    return (dataset,) if dataset else None


def _from_tables(
    reader: TableReader, tables: Mapping[str, Any], section: str, absent: Shared
) -> tuple[DatasetConfig, ...] | None:
    prefix = f"{section}." if section else ""
    _refuse_unknown(reader, tables, ["general", "datasets"], section)
    general = tables.get("general", {})
    if not isinstance(general, Mapping):
        reader.report(f"{prefix}general", f"must be a table, not {toml_repr(general)}")
        general = {}
    _refuse_unknown(reader, general, SHARED_KEYS, f"{prefix}general")
    shared = {**absent, **{key: (value, f"{prefix}general.{key}") for key, value in general.items()}}
    datasets = []
    for index, table in enumerate(_list_of_tables(reader, tables, f"{prefix}datasets")):
        place = f"{prefix}datasets[{index}]"
        _refuse_unknown(reader, table, [*SHARED_KEYS, "subsets"], place)
        own = {key: (value, f"{place}.{key}") for key, value in table.items()}
        subsets = [
            (subset, f"{place}.subsets[{number}]")
            for number, subset in enumerate(_list_of_tables(reader, table, f"{place}.subsets"))
        ]
        for subset, subset_place in subsets:
            _refuse_unknown(reader, subset, [*SUBSET_KEYS, *_source_options(reader, subset)], subset_place)
        datasets.append(_dataset(reader, subsets, {**shared, **own}, place))
    complete = tuple(dataset for dataset in datasets if dataset)
    return complete if complete and len(complete) == len(datasets) else None


def _dataset(
    reader: TableReader, subsets: list[tuple[Mapping[str, Any], str]], shared: Shared, place: str
) -> DatasetConfig | None:
    """One dataset; `subsets` are its tables and their places, `shared` the values and full keys that they inherit."""
    made = []
    for table, subset_place in subsets:
        inherited = {key: shared[key] for key in SUBSET_KEYS if key in shared and key not in table}
        own = {key: value for key, value in table.items() if key in SUBSET_KEYS}
        own |= {key: value for key, (value, _) in inherited.items()}
        file = table.get("metadata_file")
        if isinstance(file, str) and file:
            own.setdefault("image_dir", str(Path(file).parent))
        own = {key: value for key, value in own.items() if value != EMPTY_VALUES.get(key, _NOTHING)}
        options = {key: value for key, value in table.items() if key not in SUBSET_KEYS}
        keys = {key: full_key for key, (_, full_key) in inherited.items()}
        made.append(_subset(reader, own, options, subset_place, keys))
    found = {key: shared[key][0] for key in DATASET_KEYS if key in shared}
    keys = {key: shared[key][1] for key in found}
    if not isinstance(found.get("resolution", ()), list | tuple):  # one number for both sides
        found["resolution"] = (found["resolution"], found["resolution"])
    values = reader.values(DatasetConfig, found, place, keys, given=["subsets"])
    complete = tuple(subset for subset in made if subset)
    if values is None or not complete:
        return None
    dataset = reader.instance(DatasetConfig, {**values, "subsets": complete}, place, keys)
    return dataset if len(complete) == len(made) else None


def _subset(
    reader: TableReader, values: dict[str, Any], options: Mapping[str, Any], place: str, keys: Mapping[str, str]
) -> SubsetConfig | None:
    """One subset; `options` are the keys of its source, `keys` the full keys of values that it inherits."""
    source, name = None, values.pop("source", None)
    if name is not None:
        component = reader.component(DatasetSourceConfig, name, f"{place}.source")
        source = reader.structure(component, options, place) if component else None
        if component and not component.needs_image_dir:
            values.setdefault("image_dir", str(reader.base))
    read = reader.values(SubsetConfig, values, place, keys, given=["source"])
    if read is None or (name is not None and source is None):
        return None
    subset = reader.instance(SubsetConfig, {**read, "source": source}, place, keys)
    if subset:
        _refuse_missing(reader, subset, place)
        for problem in collect_problems(source, "problems_in", subset) if source else ():
            reader.report(f"{place}.{problem.key}", problem.message, problem.hint)
    return subset


def _source_options(reader: TableReader, table: Mapping[str, Any]) -> list[str]:
    """The further keys that a subset has because of its `source`; none if that is not known."""
    try:
        return field_names(reader.catalog.find(DatasetSourceConfig, table.get("source", "")))
    except (PluginError, TypeError, AttributeError):  # which is reported where the source is read
        return []


def _refuse_missing(reader: TableReader, subset: SubsetConfig, place: str) -> None:
    """Note each folder and file that the subset names and that is not there, if it is not switched off."""
    if subset.num_repeats == 0:
        return
    for key in ("image_dir", "conditioning_data_dir"):
        path = getattr(subset, key)
        if path and os.path.isfile(path):  # noqa: PTH113 - `Path.is_file` raises for overlong names
            hint = f'give a folder, "{path.parent.as_posix()}" perhaps'
            if path.suffix.lower() in (".json", ".jsonl", ".csv"):
                hint = f'to read captions from it: metadata_file = "{path.as_posix()}"'
            elif path.suffix.lower() == ".toml":
                hint = f'to read a dataset file: [data] with config = "{path.as_posix()}" alone'
            reader.report(f"{place}.{key}", f"{path} is a file, not a folder", hint)
        elif path and not os.path.isdir(path):  # noqa: PTH112 - likewise
            where = f"relative paths are relative to the folder of {reader.file or 'the config file'}"
            reader.report(f"{place}.{key}", f"{path} is not a folder", f"{_near_names(path)} {where}".strip())
    file = subset.metadata_file
    if file and not os.path.isfile(file):  # noqa: PTH113 - likewise
        reader.report(f"{place}.metadata_file", f"{file} is not a file", _near_names(file))


def _near_names(path: Path) -> str:
    """A hint with the names beside a path that are nearly the same; empty if there are none."""
    try:
        names = os.listdir(path.parent)  # noqa: PTH208 - names are what is compared
    except (OSError, ValueError):
        return ""
    by_lower = {name.lower(): name for name in sorted(names)}
    near = difflib.get_close_matches(path.name.lower(), by_lower, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""


def _refuse_unknown(reader: TableReader, table: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Note each key that has no place in this table of a dataset file, and where it belongs if that is known."""
    prefix = f"{place}." if place else ""
    for key, value in table.items():
        if key in known or key in IGNORED_KEYS or (key in UNSUPPORTED_DEFAULTS and value == UNSUPPORTED_DEFAULTS[key]):
            continue
        if key in UNSUPPORTED_DEFAULTS:
            reader.report(f"{prefix}{key}", "is an option of sd-scripts that lorakit does not support", "remove it")
        elif key in OWN_KEYS:
            reader.report(f"{prefix}{key}", "does not belong here", "write it in [[datasets.subsets]]")
        elif key in SHARED_KEYS:
            where = "[[datasets]] or [general]" if key in DATASET_KEYS else "[general] or [[datasets.subsets]]"
            reader.report(f"{prefix}{key}", "does not belong here", f"write it in {where}")
        else:
            reader.report_unknown_keys([key], known, place)


def _list_of_tables(reader: TableReader, table: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """The tables in the list called by the last name of `place`; an empty list is reported."""
    name = place.rpartition(".")[2]
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        reader.report(place, f"must be a list of tables, [[…{name}]], not {toml_repr(found)}")
        return []
    if not found:
        example = "[[datasets.subsets]] with image_dir" if name == "subsets" else "[[datasets]]"
        reader.report(place, "has no entry", f"add {example}")
    return found
