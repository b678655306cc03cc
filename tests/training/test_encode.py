"""The command that fills the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakit.cli.commands import cli
from lorakit.config.dump import to_toml


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_only_the_main_process_says_that_it_is_done(rank: str, said: bool, make_config, tmp_path: Path) -> None:
    """Of several processes that fill the cache together, one tells the user; held-out images are in it too."""
    cache = tmp_path / "own cache"
    file = tmp_path / "config.toml"
    file.write_text(to_toml(make_config(data={"cache_dir": str(cache), "validation_split": 0.5})))
    result = CliRunner().invoke(cli, ["cache", str(file)], env={"RANK": rank}, catch_exceptions=False)
    assert (f"Done: {cache}" in result.stdout) is said
    assert ("  images   4 encoded, 0 there already" in result.stdout) is said
    assert ("  captions are encoded in each step" in result.stdout) is said
    assert len(list(cache.glob("*/*.safetensors"))) == 4


def test_a_finished_lora_is_not_said_to_be_replaced(make_config, tmp_path: Path) -> None:
    """Filling the cache replaces no LoRA, so it does not warn of one; a check of the run does."""
    config = make_config(output={"dir": str(tmp_path / "out"), "name": "mine"})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.safetensors").touch()
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    said = {
        command: CliRunner().invoke(cli, [command, str(file)], catch_exceptions=False) for command in ("check", "cache")
    }
    assert "will be replaced" in said["check"].stderr
    assert said["cache"].exit_code == 0
    assert "will be replaced" not in said["cache"].stderr
