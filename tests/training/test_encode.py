"""The command that fills the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lorakit.cli.group import cli
from lorakit.config.dump import to_toml
from lorakit.data.cache.encode import EncodeOptions, LatentKeys
from lorakit.training import encode
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import load_model

CPU = torch.device("cpu")
GIB = 2**30
Sections = dict[str, dict[str, object]]


class Seen(Exception):  # no error
    """What was to be seen was."""


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


@pytest.mark.parametrize(
    ("device", "free", "sections", "expected"),
    [
        ("cuda", 140 * GIB, {}, 8),
        ("cuda", 140 * GIB, {"data": {"encode_batch_size": 3}}, 3),
        ("cuda", 140 * GIB, {"data": {"encode_batch_size": 3}, "training": {"deterministic": True}}, 3),
        ("cuda", 140 * GIB, {"training": {"deterministic": True}}, 1),
        ("cuda", 2 * 5 * 2600 * 64 * 64, {}, 5),
        ("cuda", 2600, {}, 1),
        ("cpu", 140 * GIB, {}, 1),
    ],
)
def test_images_are_encoded_together_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, make_config, device: str, free: int, sections: Sections, expected: int
) -> None:
    """On CUDA in half of the free memory, unless the config says a number or asks for the same bytes each time."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 140 * GIB))
    prepared = prepare(make_config(**sections))
    seen: list[int] = []

    def noting(_datasets: object, _model: object, _cache: object, options: EncodeOptions) -> LatentKeys:
        seen.append(options.batch_size)
        raise Seen

    monkeypatch.setattr(encode, "encode_latents", noting)
    with pytest.raises(Seen):
        encode.encode_data(prepared, load_model(prepared.config, CPU), Distributed(torch.device(device)))
    assert seen == [expected]
