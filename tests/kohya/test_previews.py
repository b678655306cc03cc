"""Previews of sd-scripts: prompts, when they are drawn, and what sd-scripts stops at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.config.load import config_from_tables
from lorakit.config.sd_scripts import OPTIONS
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import find_sampler
from tests.kohya.conftest import Convert, check


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sample_every_n_steps=50"], {"every_n_steps": 50}),
        (["--sample_every_n_epochs=2", "--sample_at_first"], {"every_n_epochs": 2, "at_first": True}),
        (["--sample_at_first", "--sample_sampler=k_euler_a"], {"at_first": True, "sampler": "k_euler_a"}),
        (["--sample_every_n_epochs=2", "--sample_every_n_steps=50"], {"every_n_epochs": 2}),
        (["--sample_every_n_epochs=0", "--sample_every_n_steps=50"], {"every_n_steps": 50}),
    ],
)
def test_previews(
    words: list[str], expected: dict[str, Any], converted: Convert, folder: Path, catalog: Catalog
) -> None:
    """Each option becomes a key of the observer, and the config is whole; epochs win over steps."""
    (folder / "prompts.txt").write_text("a cat")
    draft = converted("--sample_prompts=prompts.txt", *words)
    assert draft.tables()["observers"] == [{"name": "samples", "prompts": "prompts.txt", **expected}]
    assert check(draft, folder, catalog) == ()


def test_prompts_elsewhere(converted: Convert, folder: Path) -> None:
    """For a config in another folder, the path of the prompts is turned round."""
    draft = converted("--sample_prompts=p.toml", "--sample_at_first", target=folder / "configs")
    assert draft.tables()["observers"][0]["prompts"] == "../p.toml"


@pytest.mark.parametrize("option", ["--sample_every_n_steps=1", "--sample_every_n_epochs=1", "--sample_at_first"])
def test_previews_without_prompts(option: str, converted: Convert) -> None:
    """What sd-scripts stops at in the middle of a run is said at once."""
    with pytest.raises(ConfigError, match=f"{option.partition('=')[0]}: needs --sample_prompts"):
        converted(option)


def test_what_has_no_effect_is_told(converted: Convert) -> None:
    """Counts of zero and less mean never, and prompts that are never drawn mean nothing."""
    draft = converted("--sample_prompts=p.txt", "--sample_every_n_steps=-1", "--sample_every_n_epochs=0")
    assert "observers" not in draft.tables()
    without = "has no effect without --sample_every_n_epochs or --sample_every_n_steps"
    assert [str(remark) for remark in draft.remarks] == [
        "--sample_every_n_epochs: 0 means never",
        "--sample_every_n_steps: -1 means never",
        f"--sample_prompts: {without}",
    ]
    both = converted("--sample_prompts=p.txt", "--sample_every_n_steps=1", "--sample_every_n_epochs=1")
    assert [str(remark) for remark in both.remarks] == [
        "--sample_every_n_steps: has no effect with --sample_every_n_epochs"
    ]


def test_samplers_are_those_of_sd_scripts() -> None:
    """Each name that sd-scripts takes is a sampler here."""
    catalog = Catalog.discover()
    assert len(OPTIONS["sample_sampler"].choices) == 16
    assert all(find_sampler(name, catalog) for name in OPTIONS["sample_sampler"].choices)


def test_converted_previews_are_drawn(converted: Convert, folder: Path, train_tables: dict[str, Any]) -> None:
    """A run with the converted observer leaves its pictures, named after the epochs."""
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 3")
    words = ["--sample_prompts=prompts.txt", "--sample_every_n_epochs=2", "--sample_at_first"]
    observers = converted(*words, "--sample_sampler=heun").tables()["observers"]
    path = lorakit.train(config_from_tables({**train_tables, "observers": observers}, folder))
    names = sorted(file.name for file in (path.parent / "sample").glob("lora_e*"))
    assert [(name[:15], name[-6:]) for name in names] == [("lora_e000000_00", "_3.png"), ("lora_e000002_00", "_3.png")]


@pytest.mark.parametrize("prompt", ["a cat, best quality --n blurry --w 64", "a cat.", "/a/cat", "x" * 5000, "a\0b"])
def test_the_prompt_itself(prompt: str, converted: Convert, folder: Path, catalog: Catalog) -> None:
    """A text that is no prompt file holds the prompts, which stand in the config then."""
    draft = converted(f"--sample_prompts={prompt}", "--sample_at_first", target=folder / "configs")
    (observer,) = draft.tables()["observers"]
    assert observer["prompts"] == [prompt]


def test_several_prompts(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """Each line is one, but for comments, and the config has no problem."""
    draft = converted("--sample_prompts=a cat\n\n# none\n a dog --d 7 --s 3\n", "--sample_at_first")
    assert draft.tables()["observers"][0]["prompts"] == ["a cat", "a dog --d 7 --s 3"]
    assert check(draft, folder, catalog) == ()


@pytest.mark.parametrize("name", ["p.txt", "sub/P.TXT", "p.toml", "p.json"])
def test_prompt_files_that_are_not_there(name: str, converted: Convert) -> None:
    """The name of a prompt file is one, whether the file is there or not."""
    assert converted(f"--sample_prompts={name}", "--sample_at_first").tables()["observers"][0]["prompts"] == name


def test_prompts_in_the_config_are_drawn(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A run draws the prompts that its config holds, first and last; what is wrong with one is said by its number."""
    observer = {"name": "samples", "prompts": ["a cat --w 64 --h 64 --s 1 --d 3", "a dog --d 4"], "at_first": True}
    observer |= {"width": 64, "height": 64, "steps": 1}
    path = lorakit.train(config_from_tables({**train_tables, "observers": [observer]}, tmp_path))
    names = sorted(file.name[-6:] for file in (path.parent / "sample").glob("lora_0*"))
    assert names == ["_3.png", "_3.png", "_4.png", "_4.png"]
    for prompts, message in {
        ("a cat", "a dog --w 65.5"): "observers[0].prompts: prompt 2: --w: must be a whole number",
        (): "observers[0].prompts: must hold a prompt",
    }.items():
        with pytest.raises(ConfigError) as raised:
            config_from_tables({**train_tables, "observers": [{**observer, "prompts": list(prompts)}]}, tmp_path)
        assert message in str(raised.value)
