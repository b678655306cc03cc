"""The command that fills the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakit.cli import cli
from lorakit.config.writing import to_toml


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
