"""Configs, dataset files, files of captions, captions and prompts: whatever is in them, a result or a plain refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.config.load import read_config
from lorakit.data.captions import CaptionContext, apply_caption_options, caption_variants, read_caption
from lorakit.data.index import index_datasets
from lorakit.errors import ConfigError, DataError
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompt_files import read_prompts
from lorakit.previews.prompts import PromptSettings
from lorakit.utils.rng import keyed_generator
from tests.fuzz.conftest import CONFIG, DATASET, META
from tests.fuzz.mutations import damaged, ends_well, few, mutated

CATALOG = Catalog.discover()
SOUND = tomlkit.dumps(CONFIG).encode()
CAPTION = b"a {red|{blue}}, b ||| c, (d:1.2)\r\nx"
PROMPTS = {
    ".txt": b"# pictures\na cat --n dog --w 64 --h 128 --d 3 --s 20 --l 7.5 --ss ddim\nplain\n",
    ".toml": b'[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a cat"\nscale = 7.5\nsample_sampler = "ddim"\n',
    ".json": b'[{"prompt": "a cat", "width": 64, "seed": 1, "scale": 7.5, "sample_steps": 3}, "plain", null]',
}


def without_none(value: Any) -> Any:
    """A value as TOML can have it."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value if inner is not None]
    too_long = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63
    return 5 if too_long else value


def dumped(tables: Any) -> bytes:
    """Tables as TOML, or as JSON where TOML cannot have them."""
    try:
        return tomlkit.dumps(without_none(tables)).encode()
    except Exception:  # what the writer cannot write is not the matter here
        return json.dumps(tables).encode()


def test_what_is_damaged_is_sound(base: Path) -> None:
    """The config that is damaged below is one."""
    assert read_config(base / "sound.toml", (), CATALOG).network is not None


@few(60)
@given(content=mutated(CONFIG).map(dumped) | damaged(SOUND) | st.binary(max_size=80))
def test_configs(base: Path, content: bytes) -> None:
    """Any config file gives a config, or a ConfigError with a message for each problem."""
    path = base / "config.toml"
    path.write_bytes(content)

    def act() -> None:
        list(read_config(path, (), CATALOG).warnings())

    ends_well("config files", act, ConfigError, "")


@few(40)
@given(
    override=st.text(max_size=30)
    | st.builds("{}.{}={}".format, st.sampled_from(list(CONFIG)), st.text(max_size=9), st.text(max_size=9))
    | st.builds(
        "data.datasets[{}].subsets[{}].num_repeats={}".format, st.integers(-2, 2), st.integers(-2, 10**30), st.text()
    )
)
def test_overrides(base: Path, override: str) -> None:
    """Any `--set` is taken, or refused by a key."""
    ends_well("overrides", lambda: read_config(base / "sound.toml", (override,), CATALOG), ConfigError, "")


@few(40)
@given(content=mutated(DATASET), is_json=st.booleans())
def test_dataset_files(base: Path, content: Any, is_json: bool) -> None:
    """Any dataset file gives datasets or a ConfigError."""
    path = base / f"dataset.{'json' if is_json else 'toml'}"
    path.write_bytes(json.dumps(content).encode() if is_json else dumped(content))
    config = base / "by_file.toml"
    config.write_text(tomlkit.dumps({**CONFIG, "data": {"config": path.name}}))
    ends_well("dataset files", lambda: read_config(config, (), CATALOG), ConfigError, path.name, "data")


@few(60)
@given(
    content=mutated(META).map(json.dumps).map(str.encode) | damaged(json.dumps(META).encode()) | st.binary(max_size=40),
    as_lines=st.booleans(),
    wildcards=st.booleans(),
)
def test_metadata_files(base: Path, content: bytes, as_lines: bool, wildcards: bool) -> None:
    """Any file of captions gives examples or a DataError that names it or an image."""
    path = base / "photos" / f"meta.{'jsonl' if as_lines else 'json'}"
    path.write_bytes(content)
    subset = SubsetConfig(image_dir=base / "photos", metadata_file=path, enable_wildcard=wildcards)
    dataset = DatasetConfig(subsets=(subset,), resolution=(64, 64))
    ends_well("metadata files", lambda: index_datasets([dataset]), DataError, str(path), str(base / "photos"))


@few(100)
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | damaged(CAPTION),
    options=st.fixed_dictionaries(
        {},
        optional={
            "enable_wildcard": st.booleans(), "shuffle_caption": st.booleans(), "keep_tokens": st.integers(0, 9),
            "keep_tokens_separator": st.sampled_from(["|||", "a", ","]),
            "secondary_separator": st.sampled_from([";", ","]),
            "caption_tag_dropout_rate": st.floats(0, 1), "caption_dropout_rate": st.floats(0, 1),
            "token_warmup_step": st.floats(0, 9), "caption_prefix": st.text(max_size=5),
        },
    ),
)  # fmt: skip
def test_captions(base: Path, content: bytes, options: dict[str, Any]) -> None:
    """Any caption can be used in every way, or is refused by its file's name."""
    path = base / "caption.txt"
    path.write_bytes(content)
    subset = SubsetConfig(image_dir=base, **options)

    def act() -> None:
        caption = read_caption(path)
        possible = caption_variants(caption, subset)
        for step in range(3):
            used = apply_caption_options(caption, subset, CaptionContext(1, step, 3), keyed_generator)
            assert possible is None or used in possible

    ends_well("captions", act, DataError, str(path))


@few(80)
@given(data=st.data(), suffix=st.sampled_from(list(PROMPTS)))
def test_prompt_files(base: Path, data: st.DataObject, suffix: str) -> None:
    """Any prompt file gives prompts that can be drawn, or a ConfigError that names it."""
    path = base / f"fuzzed{suffix}"
    path.write_bytes(
        data.draw(damaged(PROMPTS[suffix]) | st.binary(max_size=40) | st.text(max_size=60).map(str.encode))
    )

    def act() -> None:
        for prompt in read_prompts(path, PromptSettings()).prompts:
            assert all(side is None or side % 8 == 0 for side in (prompt.width, prompt.height))
            assert prompt.scale is None or math.isfinite(prompt.scale)

    ends_well("prompt files", act, ConfigError, path.name)
