"""Weighted captions in runs: encoded once, and in each step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorakit
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run

CAPTIONS = {"beach": "a (beach:1.4), [sky]", "meadow": "a meadow, ((grass))", "night": "night", "snow": ""}


@pytest.fixture
def weighted(photographs: Path, tmp_path: Path) -> Path:
    """The photographs with brackets in their captions."""
    folder = shutil.copytree(photographs, tmp_path / "weighted")
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption)
    return folder


def conditioning(config) -> dict[str, torch.Tensor]:
    """The hidden states that a run trains on before its first update, by the names of the images."""
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    return {
        name: states.detach()
        for batch in run.schedule.batches_from(0, run.loader)
        for name, states in zip(batch.images, run.encode(batch)["hidden_states"], strict=True)
    }


def test_weights_are_the_same_from_the_cache_and_in_each_step(make_config, weighted: Path) -> None:
    """Captions encoded once, and those encoded in each step by a trained text encoder, weigh the same words alike."""
    data = {"image_dir": str(weighted)}
    cached, live, plain = (
        conditioning(make_config(network={"parts": parts}, data={**data, "weighted_captions": weighs}))
        for parts, weighs in ((["unet"], True), (["unet", "text_encoder"], True), (["unet"], False))
    )
    assert cached.keys() == live.keys() == plain.keys() == {f"{name}.png" for name in CAPTIONS}
    for name, states in cached.items():
        torch.testing.assert_close(states, live[name])
        assert torch.equal(states, plain[name]) is (CAPTIONS[Path(name).stem] in ("night", ""))


@pytest.mark.parametrize("parts", [["unet"], ["unet", "text_encoder"]])
def test_runs_with_dropped_captions(make_config, weighted: Path, parts: list[str]) -> None:
    """A run with caption dropout ends, its file says that captions were weighted, and the weights change the result."""
    data = {"image_dir": str(weighted), "caption_dropout_rate": 0.3}
    files = [
        lorakit.train(
            make_config(
                network={"parts": parts},
                data={**data, "weighted_captions": weighs},
                output={"name": f"weighs-{weighs}"},
            )
        )
        for weighs in (True, False)
    ]
    with_weights, without = (load_file(file) for file in files)
    assert all(tensor.isfinite().all() for tensor in with_weights.values())
    assert any(not torch.equal(with_weights[key], without[key]) for key in without)
    for file, weighs in zip(files, ("True", "False"), strict=True):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["ss_weighted_captions"] == weighs
