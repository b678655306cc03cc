"""Max-norm scaling in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.setup import run_training

LIMIT = 0.02


def norms_of(path: Path) -> dict[str, float]:
    """The norm of each layer's update in a file, by the full matrix in float64."""
    tensors = load_file(path)
    norms = {}
    for key in {name.split(".")[0] for name in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        update = up.flatten(1) @ down.flatten(1) * (tensors[f"{key}.alpha"].double() / len(down))
        norms[key] = update.norm().item()
    return norms


def test_limits_every_update(make_config, catalog: Catalog, tmp_path: Path) -> None:
    """With a limit, norms end at it that are beyond it without; the last numbers in the log are those of the file."""
    without = norms_of(run_training(prepare(make_config()), catalog))
    assert max(without.values()) > 2 * LIMIT
    config = make_config(
        network={"scale_weight_norms": LIMIT},
        observers=[{"name": "tensorboard", "dir": str(tmp_path / "logs")}],
    )
    file = run_training(prepare(config), catalog)
    norms = norms_of(file).values()
    assert max(norms) == pytest.approx(LIMIT, rel=1e-5)
    with safe_open(file, "pt") as stream:
        assert stream.metadata()["ss_scale_weight_norms"] == str(LIMIT)
    (folder,) = (tmp_path / "logs").iterdir()
    log = EventAccumulator(str(folder)).Reload()
    curves = {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    assert curves["max_norm/max_key_norm"][-1] == pytest.approx(max(norms), rel=1e-5)
    assert curves["norm/avg_key_norm"][-1] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert len(curves["max_norm/keys_scaled"]) == len(curves["loss"]) == 6
    assert 0 < curves["max_norm/keys_scaled"][-1] <= len(norms)
